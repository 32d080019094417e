//! C's structures and numbers.

use std::ffi::c_void;

use crate::completion::lowtide_cq;
use crate::memory::{lowtide_mr, lowtide_mw};
use crate::queue_pair::{lowtide_ah, lowtide_qp, lowtide_srq};

/// The UDP port of RoCE v2.
pub const LOWTIDE_ROCE_PORT: u16 = 4791;
/// Elements of a request's list at most.
pub const LOWTIDE_SGE_MAX: u32 = 4;

/// Rights of a region or window, and what the peer of a queue pair may do.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum lowtide_access_flags {
    LOWTIDE_ACCESS_LOCAL_WRITE = 1,
    LOWTIDE_ACCESS_REMOTE_WRITE = 1 << 1,
    LOWTIDE_ACCESS_REMOTE_READ = 1 << 2,
    LOWTIDE_ACCESS_REMOTE_ATOMIC = 1 << 3,
    LOWTIDE_ACCESS_MW_BIND = 1 << 4,
    LOWTIDE_ACCESS_ZERO_BASED = 1 << 5,
    LOWTIDE_ACCESS_ON_DEMAND = 1 << 6,
    LOWTIDE_ACCESS_HUGETLB = 1 << 7,
    LOWTIDE_ACCESS_FLUSH_GLOBAL = 1 << 8,
    LOWTIDE_ACCESS_FLUSH_PERSISTENT = 1 << 9,
    LOWTIDE_ACCESS_RELAXED_ORDERING = 1 << 20,
}

/// Payload of full packets.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum lowtide_mtu {
    LOWTIDE_MTU_256 = 1,
    LOWTIDE_MTU_512 = 2,
    LOWTIDE_MTU_1024 = 3,
    LOWTIDE_MTU_2048 = 4,
    LOWTIDE_MTU_4096 = 5,
}

/// Type of a memory window.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum lowtide_mw_type {
    LOWTIDE_MW_TYPE_1 = 1,
    LOWTIDE_MW_TYPE_2 = 2,
}

/// Type of a queue pair.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum lowtide_qp_type {
    LOWTIDE_QPT_RC = 2,
    LOWTIDE_QPT_UC = 3,
    LOWTIDE_QPT_UD = 4,
}

/// State of a queue pair.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum lowtide_qp_state {
    LOWTIDE_QPS_RESET = 0,
    LOWTIDE_QPS_INIT = 1,
    LOWTIDE_QPS_RTR = 2,
    LOWTIDE_QPS_RTS = 3,
    LOWTIDE_QPS_SQD = 4,
    LOWTIDE_QPS_SQE = 5,
    LOWTIDE_QPS_ERR = 6,
}

/// Which fields of a lowtide_qp_attr are meant.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum lowtide_qp_attr_mask {
    LOWTIDE_QP_STATE = 1,
    LOWTIDE_QP_CUR_STATE = 1 << 1,
    LOWTIDE_QP_EN_SQD_ASYNC_NOTIFY = 1 << 2,
    LOWTIDE_QP_ACCESS_FLAGS = 1 << 3,
    LOWTIDE_QP_PKEY_INDEX = 1 << 4,
    LOWTIDE_QP_PORT = 1 << 5,
    LOWTIDE_QP_QKEY = 1 << 6,
    LOWTIDE_QP_AV = 1 << 7,
    LOWTIDE_QP_PATH_MTU = 1 << 8,
    LOWTIDE_QP_TIMEOUT = 1 << 9,
    LOWTIDE_QP_RETRY_CNT = 1 << 10,
    LOWTIDE_QP_RNR_RETRY = 1 << 11,
    LOWTIDE_QP_RQ_PSN = 1 << 12,
    LOWTIDE_QP_MAX_QP_RD_ATOMIC = 1 << 13,
    LOWTIDE_QP_MIN_RNR_TIMER = 1 << 15,
    LOWTIDE_QP_SQ_PSN = 1 << 16,
    LOWTIDE_QP_MAX_DEST_RD_ATOMIC = 1 << 17,
    LOWTIDE_QP_DEST_QPN = 1 << 20,
}

/// Which fields of a lowtide_srq_attr are meant.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum lowtide_srq_attr_mask {
    /// Not served: a shared receive queue keeps its size.
    LOWTIDE_SRQ_MAX_WR = 1,
    LOWTIDE_SRQ_LIMIT = 1 << 1,
}

/// What a send work request does.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum lowtide_wr_opcode {
    LOWTIDE_WR_RDMA_WRITE = 0,
    LOWTIDE_WR_RDMA_WRITE_WITH_IMM = 1,
    LOWTIDE_WR_SEND = 2,
    LOWTIDE_WR_SEND_WITH_IMM = 3,
    LOWTIDE_WR_RDMA_READ = 4,
    LOWTIDE_WR_ATOMIC_CMP_AND_SWP = 5,
    LOWTIDE_WR_ATOMIC_FETCH_AND_ADD = 6,
    LOWTIDE_WR_LOCAL_INV = 7,
    LOWTIDE_WR_BIND_MW = 8,
    LOWTIDE_WR_SEND_WITH_INV = 9,
    LOWTIDE_WR_FLUSH = 14,
    LOWTIDE_WR_ATOMIC_WRITE = 15,
}

/// How a send work request is to be treated.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum lowtide_send_flags {
    LOWTIDE_SEND_FENCE = 1,
    LOWTIDE_SEND_SIGNALED = 1 << 1,
    LOWTIDE_SEND_SOLICITED = 1 << 2,
    LOWTIDE_SEND_INLINE = 1 << 3,
}

/// How a work request ended.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum lowtide_wc_status {
    LOWTIDE_WC_SUCCESS = 0,
    LOWTIDE_WC_LOC_LEN_ERR = 1,
    LOWTIDE_WC_LOC_QP_OP_ERR = 2,
    LOWTIDE_WC_LOC_PROT_ERR = 4,
    LOWTIDE_WC_WR_FLUSH_ERR = 5,
    LOWTIDE_WC_MW_BIND_ERR = 6,
    LOWTIDE_WC_BAD_RESP_ERR = 7,
    LOWTIDE_WC_LOC_ACCESS_ERR = 8,
    LOWTIDE_WC_REM_INV_REQ_ERR = 9,
    LOWTIDE_WC_REM_ACCESS_ERR = 10,
    LOWTIDE_WC_REM_OP_ERR = 11,
    LOWTIDE_WC_RETRY_EXC_ERR = 12,
    LOWTIDE_WC_RNR_RETRY_EXC_ERR = 13,
    LOWTIDE_WC_REM_ABORT_ERR = 16,
    LOWTIDE_WC_FATAL_ERR = 19,
    LOWTIDE_WC_RESP_TIMEOUT_ERR = 20,
    LOWTIDE_WC_GENERAL_ERR = 21,
}

/// What completed; means something only if it succeeded.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum lowtide_wc_opcode {
    LOWTIDE_WC_SEND = 0,
    LOWTIDE_WC_RDMA_WRITE = 1,
    LOWTIDE_WC_RDMA_READ = 2,
    LOWTIDE_WC_COMP_SWAP = 3,
    LOWTIDE_WC_FETCH_ADD = 4,
    LOWTIDE_WC_BIND_MW = 5,
    LOWTIDE_WC_LOCAL_INV = 6,
    LOWTIDE_WC_FLUSH = 8,
    LOWTIDE_WC_ATOMIC_WRITE = 9,
    /// All receives have this bit.
    LOWTIDE_WC_RECV = 128,
    LOWTIDE_WC_RECV_RDMA_WITH_IMM = 129,
}

/// What a completion carries.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum lowtide_wc_flags {
    LOWTIDE_WC_GRH = 1,
    LOWTIDE_WC_WITH_IMM = 1 << 1,
    LOWTIDE_WC_WITH_INV = 1 << 3,
}

/// What happens without a work request.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum lowtide_async_event_type {
    LOWTIDE_EVENT_CQ_ERR = 0,
    LOWTIDE_EVENT_QP_FATAL = 1,
    LOWTIDE_EVENT_QP_REQ_ERR = 2,
    LOWTIDE_EVENT_QP_ACCESS_ERR = 3,
    LOWTIDE_EVENT_COMM_EST = 4,
    LOWTIDE_EVENT_SQ_DRAINED = 5,
    LOWTIDE_EVENT_DEVICE_FATAL = 8,
    LOWTIDE_EVENT_PORT_ACTIVE = 9,
    LOWTIDE_EVENT_PORT_ERR = 10,
    LOWTIDE_EVENT_SRQ_ERR = 14,
    LOWTIDE_EVENT_SRQ_LIMIT_REACHED = 15,
    LOWTIDE_EVENT_QP_LAST_WQE_REACHED = 16,
}

/// A device's address as verbs know it: IPv6, or IPv4 as ::ffff:a.b.c.d.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct lowtide_gid {
    pub raw: [u8; 16],
}

/// What a device can do at most.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct lowtide_device_attr {
    pub node_guid: u64,
    pub max_mr_size: u64,
    pub max_qp: u32,
    pub max_qp_wr: u32,
    pub max_sge: u32,
    /// Bytes; ibverbs has no such field.
    pub max_inline_data: u32,
    pub max_cq: u32,
    pub max_cqe: u32,
    pub max_mr: u32,
    pub max_mw: u32,
    pub max_pd: u32,
    pub max_ah: u32,
    pub max_srq: u32,
    pub max_srq_wr: u32,
    pub max_qp_rd_atom: u32,
    pub max_qp_init_rd_atom: u32,
    pub max_mcast_grp: u32,
    /// 0: none; 1: atomic among this device's queue pairs; 2: among all that reaches the memory.
    pub atomic_cap: u32,
    pub phys_port_cnt: u32,
}

/// A port.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct lowtide_port_attr {
    /// 4 is active.
    pub state: u32,
    pub max_mtu: u32,
    pub active_mtu: u32,
    pub gid_tbl_len: u32,
    pub max_msg_sz: u32,
    pub pkey_tbl_len: u16,
    /// 2 is Ethernet.
    pub link_layer: u8,
}

/// What a device has seen since it was opened; the names of anomalies are those of Linux rxe.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct lowtide_counters {
    pub sent_pkts: u64,
    pub tx_bytes: u64,
    pub rx_datagrams: u64,
    /// Those of them that were packets with a right ICRC.
    pub rcvd_pkts: u64,
    pub rx_bytes: u64,
    /// Datagrams that the kernel refused to send.
    pub send_err: u64,
    /// Datagrams that the socket's buffer had no room for.
    pub rx_overflow: u64,
    pub rx_malformed: u64,
    pub rx_bad_icrc: u64,
    pub rx_unknown_qp: u64,
    /// For a queue pair, but not from its peer's address.
    pub rx_wrong_peer: u64,
    pub duplicate_request: u64,
    pub out_of_seq_request: u64,
    pub rcvd_seq_err: u64,
    pub rcvd_rnr_err: u64,
    pub send_rnr_err: u64,
    pub retry_exceeded_err: u64,
    pub retry_rnr_exceeded_err: u64,
    pub completer_retry_err: u64,
    pub rdma_sends: u64,
    pub rdma_recvs: u64,
    pub ack_timeout: u64,
    pub retransmitted_pkts: u64,
    /// Packets that a queue pair had no use for.
    pub dropped_pkts: u64,
}

/// Memory of a work request.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct lowtide_sge {
    pub addr: u64,
    pub length: u32,
    pub lkey: u32,
}

/// Where a WRITE, READ, ATOMIC WRITE or FLUSH goes.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct lowtide_rdma {
    pub remote_addr: u64,
    pub rkey: u32,
}

/// An atomic's word and operands.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct lowtide_atomic {
    pub remote_addr: u64,
    pub compare_add: u64,
    pub swap: u64,
    pub rkey: u32,
}

/// Where a datagram goes.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct lowtide_ud {
    pub ah: *mut lowtide_ah,
    pub remote_qpn: u32,
    pub remote_qkey: u32,
}

/// By opcode: rdma for WRITE, READ, ATOMIC WRITE and FLUSH, atomic for atomics, ud for datagrams.
#[repr(C)]
#[derive(Clone, Copy)]
pub union lowtide_remote {
    pub rdma: lowtide_rdma,
    pub atomic: lowtide_atomic,
    pub ud: lowtide_ud,
}

/// A memory window's place. A length of 0 takes the place away.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct lowtide_mw_bind_info {
    pub mr: *mut lowtide_mr,
    pub addr: u64,
    pub length: u64,
    pub mw_access_flags: u32,
}

/// The bind of a type 2 window by a work request.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct lowtide_bind_mw_wr {
    pub mw: *mut lowtide_mw,
    /// The key from now on: lowtide_inc_rkey of the one so far.
    pub rkey: u32,
    pub bind_info: lowtide_mw_bind_info,
}

/// The bind of a type 1 window by lowtide_bind_mw.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct lowtide_mw_bind {
    pub wr_id: u64,
    pub send_flags: u32,
    pub bind_info: lowtide_mw_bind_info,
}

/// What a FLUSH asks for besides its place.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct lowtide_flush {
    /// Bytes from remote_addr on.
    pub length: u32,
    /// Not 0: the whole region, whatever the range.
    pub whole_region: u8,
    /// Not 0: until the data is persistent. No region here grants it.
    pub persistent: u8,
}

/// A send work request; fields that its opcode does not need are not looked at.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lowtide_send_wr {
    pub wr_id: u64,
    /// NULL ends the list.
    pub next: *mut lowtide_send_wr,
    pub sg_list: *mut lowtide_sge,
    pub num_sge: i32,
    /// A lowtide_wr_opcode.
    pub opcode: u32,
    /// lowtide_send_flags.
    pub send_flags: u32,
    /// In network order.
    pub imm_data: u32,
    /// The key that SEND_WITH_INV or LOCAL_INV makes invalid.
    pub invalidate_rkey: u32,
    pub wr: lowtide_remote,
    pub bind_mw: lowtide_bind_mw_wr,
    pub flush: lowtide_flush,
}

/// A receive work request.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct lowtide_recv_wr {
    pub wr_id: u64,
    /// NULL ends the list.
    pub next: *mut lowtide_recv_wr,
    pub sg_list: *mut lowtide_sge,
    pub num_sge: i32,
}

/// A work completion. If status is not 0, only wr_id, qp_num and vendor_err mean something.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct lowtide_wc {
    pub wr_id: u64,
    /// A lowtide_wc_status.
    pub status: u32,
    /// A lowtide_wc_opcode.
    pub opcode: u32,
    pub vendor_err: u32,
    /// Bytes received (datagrams: with the 40 bytes of header), read, or returned by an atomic.
    pub byte_len: u32,
    /// In network order; with LOWTIDE_WC_WITH_IMM.
    pub imm_data: u32,
    /// With LOWTIDE_WC_WITH_INV.
    pub invalidated_rkey: u32,
    pub qp_num: u32,
    /// Datagrams: the sender.
    pub src_qp: u32,
    /// lowtide_wc_flags.
    pub wc_flags: u32,
}

/// How much a queue pair can hold.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct lowtide_qp_cap {
    pub max_send_wr: u32,
    pub max_recv_wr: u32,
    pub max_send_sge: u32,
    pub max_recv_sge: u32,
    pub max_inline_data: u32,
}

/// What a queue pair is made with.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct lowtide_qp_init_attr {
    /// The program's own.
    pub qp_context: *mut c_void,
    pub send_cq: *mut lowtide_cq,
    pub recv_cq: *mut lowtide_cq,
    /// NULL: it has receives of its own.
    pub srq: *mut lowtide_srq,
    pub cap: lowtide_qp_cap,
    /// A lowtide_qp_type.
    pub qp_type: u32,
    /// Not 0: every send reports success, whatever its flags say.
    pub sq_sig_all: i32,
}

/// The global part of a path.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct lowtide_global_route {
    pub dgid: lowtide_gid,
    pub flow_label: u32,
    pub sgid_index: u8,
    pub hop_limit: u8,
    pub traffic_class: u8,
}

/// A path to a peer. RoCE has global ones only: is_global must not be 0.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct lowtide_ah_attr {
    pub grh: lowtide_global_route,
    pub sl: u8,
    pub is_global: u8,
    pub port_num: u8,
}

/// What can be set of and asked from a queue pair.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct lowtide_qp_attr {
    pub qp_state: u32,
    pub cur_qp_state: u32,
    pub path_mtu: u32,
    pub qkey: u32,
    pub rq_psn: u32,
    pub sq_psn: u32,
    pub dest_qp_num: u32,
    /// lowtide_access_flags.
    pub qp_access_flags: u32,
    pub cap: lowtide_qp_cap,
    pub ah_attr: lowtide_ah_attr,
    pub pkey_index: u16,
    pub en_sqd_async_notify: u8,
    pub sq_draining: u8,
    pub max_rd_atomic: u8,
    pub max_dest_rd_atomic: u8,
    pub min_rnr_timer: u8,
    pub port_num: u8,
    pub timeout: u8,
    pub retry_cnt: u8,
    pub rnr_retry: u8,
}

/// A shared receive queue's limits.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct lowtide_srq_attr {
    pub max_wr: u32,
    pub max_sge: u32,
    pub srq_limit: u32,
}

/// What a shared receive queue is made with.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct lowtide_srq_init_attr {
    /// The program's own.
    pub srq_context: *mut c_void,
    pub attr: lowtide_srq_attr,
}

/// What an asynchronous event is about.
#[repr(C)]
#[derive(Clone, Copy)]
pub union lowtide_event_element {
    pub cq: *mut lowtide_cq,
    pub qp: *mut lowtide_qp,
    pub srq: *mut lowtide_srq,
    pub port_num: i32,
}

/// An asynchronous event.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lowtide_async_event {
    pub element: lowtide_event_element,
    /// A lowtide_async_event_type.
    pub event_type: u32,
}
