//! The C types of libibverbs, as far as this provider uses them.
//!
//! Owns: their layout, nothing else. Sizes and offsets that matter are asserted at compile time;
//! the test behind the feature `abi-oracle` holds them against bindings made from the system's headers.
//! Names, order and numbers are those of `<infiniband/verbs.h>`, ABI of rdma-core 17 and later.
//! Structures that libibverbs allocates are known only as far as they are read here. What the extended
//! calls need is in `extended`.

mod extended;

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::mem::{offset_of, size_of};

pub use self::extended::{
    ATOMIC_WRITE_DEVICE, DeviceAttrEx, FLUSH_DEVICE, FLUSH_GLOBAL, FLUSH_PERSISTENT, FLUSH_RANGE,
    FLUSH_REGION, INIT_ATTR_PD, INIT_ATTR_SEND_OPS, QpEx, QpInitAttrEx, WITH_ATOMIC_WRITE,
    WITH_FLUSH, create_qp_ex_of, query_device_ex_of,
};

/// Never looked into.
#[repr(C)]
pub struct Device {
    _private: [u8; 0],
}

/// Filled by the provider library of the device; only the calls that C makes inline.
#[repr(C)]
pub struct ContextOps {
    _control: [*mut c_void; 7],
    pub alloc_mw: Option<unsafe extern "C" fn(*mut Pd, c_uint) -> *mut Mw>,
    pub bind_mw: Option<unsafe extern "C" fn(*mut Qp, *mut Mw, *mut MwBind) -> c_int>,
    pub dealloc_mw: Option<unsafe extern "C" fn(*mut Mw) -> c_int>,
    _create_cq: *mut c_void,
    pub poll_cq: Option<unsafe extern "C" fn(*mut Cq, c_int, *mut Wc) -> c_int>,
    pub req_notify_cq: Option<unsafe extern "C" fn(*mut Cq, c_int) -> c_int>,
    _queues: [*mut c_void; 7],
    pub post_srq_recv:
        Option<unsafe extern "C" fn(*mut Srq, *mut RecvWr, *mut *mut RecvWr) -> c_int>,
    _pairs: [*mut c_void; 4],
    pub post_send: Option<unsafe extern "C" fn(*mut Qp, *mut SendWr, *mut *mut SendWr) -> c_int>,
    pub post_recv: Option<unsafe extern "C" fn(*mut Qp, *mut RecvWr, *mut *mut RecvWr) -> c_int>,
    _rest: [*mut c_void; 5],
}

#[repr(C)]
pub struct Context {
    pub device: *mut Device,
    pub ops: ContextOps,
    pub cmd_fd: c_int,
    pub async_fd: c_int,
    pub num_comp_vectors: c_int,
    _mutex: libc::pthread_mutex_t,
    /// All ones: there is a table of extended calls in front of it.
    pub abi_compat: *mut c_void,
}

#[repr(C)]
pub struct Pd {
    pub context: *mut Context,
    pub handle: u32,
}

#[repr(C)]
pub struct Mr {
    pub context: *mut Context,
    pub pd: *mut Pd,
    pub addr: *mut c_void,
    pub length: usize,
    pub handle: u32,
    pub lkey: u32,
    pub rkey: u32,
}

#[repr(C)]
pub struct Mw {
    pub context: *mut Context,
    pub pd: *mut Pd,
    pub rkey: u32,
    pub handle: u32,
    pub kind: c_uint,
}

/// Where a window is to lie.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct MwBindInfo {
    pub mr: *mut Mr,
    pub addr: u64,
    pub length: u64,
    pub access: c_uint,
}

/// The bind of a type 1 window.
#[repr(C)]
pub struct MwBind {
    pub wr_id: u64,
    pub send_flags: c_uint,
    pub bind_info: MwBindInfo,
}

#[repr(C)]
pub struct CompChannel {
    pub context: *mut Context,
    pub fd: c_int,
    pub refcnt: c_int,
}

#[repr(C)]
pub struct Cq {
    pub context: *mut Context,
    pub channel: *mut CompChannel,
    pub cq_context: *mut c_void,
    pub handle: u32,
    pub cqe: c_int,
    // A mutex, a condition and counts of events follow.
}

#[repr(C)]
pub struct Srq {
    pub context: *mut Context,
    pub srq_context: *mut c_void,
    pub pd: *mut Pd,
    pub handle: u32,
    // A mutex, a condition and a count of events follow.
}

#[repr(C)]
pub struct Qp {
    pub context: *mut Context,
    pub qp_context: *mut c_void,
    pub pd: *mut Pd,
    pub send_cq: *mut Cq,
    pub recv_cq: *mut Cq,
    pub srq: *mut Srq,
    pub handle: u32,
    pub qp_num: u32,
    pub state: c_uint,
    pub qp_type: c_uint,
    // A mutex, a condition and a count of events follow.
}

/// Never looked into.
#[repr(C)]
pub struct Ah {
    _private: [u8; 0],
}

// The union has a 64-bit member, and so its alignment.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub struct Gid(pub [u8; 16]);

#[repr(C)]
#[derive(Clone, Copy)]
pub struct GidEntry {
    pub gid: Gid,
    pub gid_index: u32,
    pub port_num: u32,
    pub gid_type: u32,
    pub ndev_ifindex: u32,
}

#[repr(C)]
pub struct DeviceAttr {
    pub fw_ver: [c_char; 64],
    pub node_guid: u64, // big endian
    pub sys_image_guid: u64,
    pub max_mr_size: u64,
    pub page_size_cap: u64,
    pub vendor_id: u32,
    pub vendor_part_id: u32,
    pub hw_ver: u32,
    pub max_qp: c_int,
    pub max_qp_wr: c_int,
    pub device_cap_flags: c_uint,
    pub max_sge: c_int,
    pub max_sge_rd: c_int,
    pub max_cq: c_int,
    pub max_cqe: c_int,
    pub max_mr: c_int,
    pub max_pd: c_int,
    pub max_qp_rd_atom: c_int,
    pub max_ee_rd_atom: c_int,
    pub max_res_rd_atom: c_int,
    pub max_qp_init_rd_atom: c_int,
    pub max_ee_init_rd_atom: c_int,
    pub atomic_cap: c_uint,
    pub max_ee: c_int,
    pub max_rdd: c_int,
    pub max_mw: c_int,
    pub max_raw_ipv6_qp: c_int,
    pub max_raw_ethy_qp: c_int,
    pub max_mcast_grp: c_int,
    pub max_mcast_qp_attach: c_int,
    pub max_total_mcast_qp_attach: c_int,
    pub max_ah: c_int,
    pub max_fmr: c_int,
    pub max_map_per_fmr: c_int,
    pub max_srq: c_int,
    pub max_srq_wr: c_int,
    pub max_srq_sge: c_int,
    pub max_pkeys: u16,
    pub local_ca_ack_delay: u8,
    pub phys_port_cnt: u8,
}

/// As rdma-core 55 has it, four bytes longer than in 44: the library fills what it knows.
#[repr(C)]
pub struct PortAttr {
    pub state: c_uint,
    pub max_mtu: c_uint,
    pub active_mtu: c_uint,
    pub gid_tbl_len: c_int,
    pub port_cap_flags: u32,
    pub max_msg_sz: u32,
    pub bad_pkey_cntr: u32,
    pub qkey_viol_cntr: u32,
    pub pkey_tbl_len: u16,
    pub lid: u16,
    pub sm_lid: u16,
    pub lmc: u8,
    pub max_vl_num: u8,
    pub sm_sl: u8,
    pub subnet_timeout: u8,
    pub init_type_reply: u8,
    pub active_width: u8,
    pub active_speed: u8,
    pub phys_state: u8,
    pub link_layer: u8,
    pub flags: u8,
    pub port_cap_flags2: u16,
    pub active_speed_ex: u32,
}

pub const LINK_LAYER_ETHERNET: u8 = 2;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct GlobalRoute {
    pub dgid: Gid,
    pub flow_label: u32,
    pub sgid_index: u8,
    pub hop_limit: u8,
    pub traffic_class: u8,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct AhAttr {
    pub grh: GlobalRoute,
    pub dlid: u16,
    pub sl: u8,
    pub src_path_bits: u8,
    pub static_rate: u8,
    pub is_global: u8,
    pub port_num: u8,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct QpCap {
    pub max_send_wr: u32,
    pub max_recv_wr: u32,
    pub max_send_sge: u32,
    pub max_recv_sge: u32,
    pub max_inline_data: u32,
}

#[repr(C)]
pub struct QpInitAttr {
    pub qp_context: *mut c_void,
    pub send_cq: *mut Cq,
    pub recv_cq: *mut Cq,
    pub srq: *mut Srq,
    pub cap: QpCap,
    pub qp_type: c_uint,
    pub sq_sig_all: c_int,
}

#[repr(C)]
pub struct QpAttr {
    pub qp_state: c_uint,
    pub cur_qp_state: c_uint,
    pub path_mtu: c_uint,
    pub path_mig_state: c_uint,
    pub qkey: u32,
    pub rq_psn: u32,
    pub sq_psn: u32,
    pub dest_qp_num: u32,
    pub qp_access_flags: c_uint,
    pub cap: QpCap,
    pub ah_attr: AhAttr,
    pub alt_ah_attr: AhAttr,
    pub pkey_index: u16,
    pub alt_pkey_index: u16,
    pub en_sqd_async_notify: u8,
    pub sq_draining: u8,
    pub max_rd_atomic: u8,
    pub max_dest_rd_atomic: u8,
    pub min_rnr_timer: u8,
    pub port_num: u8,
    pub timeout: u8,
    pub retry_cnt: u8,
    pub rnr_retry: u8,
    pub alt_port_num: u8,
    pub alt_timeout: u8,
    pub rate_limit: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct SrqAttr {
    pub max_wr: u32,
    pub max_sge: u32,
    pub srq_limit: u32,
}

#[repr(C)]
pub struct SrqInitAttr {
    pub srq_context: *mut c_void,
    pub attr: SrqAttr,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Sge {
    pub addr: u64,
    pub length: u32,
    pub lkey: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Rdma {
    pub remote_addr: u64,
    pub rkey: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Atomic {
    pub remote_addr: u64,
    pub compare_add: u64,
    pub swap: u64,
    pub rkey: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ud {
    pub ah: *mut Ah,
    pub remote_qpn: u32,
    pub remote_qkey: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub union Wr {
    pub rdma: Rdma,
    pub atomic: Atomic,
    pub ud: Ud,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct SendWr {
    pub wr_id: u64,
    pub next: *mut SendWr,
    pub sg_list: *mut Sge,
    pub num_sge: c_int,
    pub opcode: c_uint,
    pub send_flags: c_uint,
    /// Immediate data in network order, or the key to be invalidated.
    pub imm_or_rkey: u32,
    pub wr: Wr,
    pub xrc_srqn: u32,
    /// The bind of a type 2 window; segmentation shares its place.
    pub bind: BindMw,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct BindMw {
    pub mw: *mut Mw,
    /// The key that it shall have.
    pub rkey: u32,
    pub bind_info: MwBindInfo,
}

impl SendWr {
    /// All zero: a WRITE of nothing.
    pub const ZERO: SendWr = SendWr {
        wr_id: 0,
        next: std::ptr::null_mut(),
        sg_list: std::ptr::null_mut(),
        num_sge: 0,
        opcode: 0,
        send_flags: 0,
        imm_or_rkey: 0,
        wr: Wr {
            atomic: Atomic {
                remote_addr: 0,
                compare_add: 0,
                swap: 0,
                rkey: 0,
            },
        },
        xrc_srqn: 0,
        bind: BindMw {
            mw: std::ptr::null_mut(),
            rkey: 0,
            bind_info: MwBindInfo {
                mr: std::ptr::null_mut(),
                addr: 0,
                length: 0,
                access: 0,
            },
        },
    };
}

pub const WR_RDMA_WRITE: c_uint = 0;
pub const WR_RDMA_WRITE_WITH_IMM: c_uint = 1;
pub const WR_SEND: c_uint = 2;
pub const WR_SEND_WITH_IMM: c_uint = 3;
pub const WR_RDMA_READ: c_uint = 4;
pub const WR_ATOMIC_CMP_AND_SWP: c_uint = 5;
pub const WR_ATOMIC_FETCH_AND_ADD: c_uint = 6;
pub const WR_LOCAL_INV: c_uint = 7;
pub const WR_BIND_MW: c_uint = 8;
pub const WR_SEND_WITH_INV: c_uint = 9;

/// Of a device's capability flags: windows of type 1, and of type 2B.
pub const MEM_WINDOW_DEVICE: c_uint = 1 << 17;
pub const MEM_WINDOW_2B_DEVICE: c_uint = 1 << 24;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct RecvWr {
    pub wr_id: u64,
    pub next: *mut RecvWr,
    pub sg_list: *mut Sge,
    pub num_sge: c_int,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Wc {
    pub wr_id: u64,
    pub status: c_uint,
    pub opcode: c_uint,
    pub vendor_err: u32,
    pub byte_len: u32,
    /// Immediate data in network order, or the key that was invalidated.
    pub imm_or_rkey: u32,
    pub qp_num: u32,
    pub src_qp: u32,
    pub wc_flags: c_uint,
    pub pkey_index: u16,
    pub slid: u16,
    pub sl: u8,
    pub dlid_path_bits: u8,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub union EventElement {
    pub cq: *mut Cq,
    pub qp: *mut Qp,
    pub srq: *mut Srq,
    pub port_num: c_int,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct AsyncEvent {
    pub element: EventElement,
    pub event_type: c_uint,
}

// Of 64-bit Linux; the same for all its architectures.
const _: () = {
    assert!(size_of::<ContextOps>() == 256);
    assert!(offset_of!(ContextOps, alloc_mw) == 56);
    assert!(offset_of!(ContextOps, dealloc_mw) == 72);
    assert!(offset_of!(ContextOps, poll_cq) == 88);
    assert!(offset_of!(ContextOps, req_notify_cq) == 96);
    assert!(offset_of!(ContextOps, post_srq_recv) == 160);
    assert!(offset_of!(ContextOps, post_send) == 200);
    assert!(offset_of!(ContextOps, post_recv) == 208);
    assert!(offset_of!(Context, ops) == 8);
    assert!(offset_of!(Context, async_fd) == 268);
    assert!(offset_of!(Qp, qp_num) == 52);
    assert!(offset_of!(Mr, lkey) == 36);
    assert!(size_of::<Mr>() == 48);
    assert!(size_of::<GidEntry>() == 32);
    assert!(size_of::<DeviceAttr>() == 232);
    assert!(size_of::<PortAttr>() == 56);
    assert!(size_of::<AhAttr>() == 32);
    assert!(size_of::<QpInitAttr>() == 64);
    assert!(size_of::<QpAttr>() == 144);
    assert!(offset_of!(QpAttr, ah_attr) == 56);
    assert!(size_of::<SrqInitAttr>() == 24);
    assert!(size_of::<SendWr>() == 128);
    assert!(offset_of!(SendWr, wr) == 40);
    assert!(offset_of!(SendWr, xrc_srqn) == 72);
    assert!(size_of::<RecvWr>() == 32);
    assert!(size_of::<Sge>() == 16);
    assert!(size_of::<Wc>() == 48);
    assert!(offset_of!(Wc, wc_flags) == 36);
    assert!(size_of::<AsyncEvent>() == 16);
};

#[cfg(all(test, feature = "abi-oracle"))]
mod tests {
    use super::*;

    macro_rules! same {
        ($($ours:ident = $theirs:ident { $($field:ident = $their_field:ident),* })*) => {$(
            $(assert_eq!(
                offset_of!($ours, $field),
                offset_of!(rdma_sys::$theirs, $their_field),
                concat!(stringify!($theirs), ".", stringify!($field))
            );)*
        )*};
    }

    macro_rules! same_size {
        ($($ours:ident = $theirs:ident)*) => {$(
            assert_eq!(size_of::<$ours>(), size_of::<rdma_sys::$theirs>(), stringify!($theirs));
            assert_eq!(align_of::<$ours>(), align_of::<rdma_sys::$theirs>(), stringify!($theirs));
        )*};
    }

    #[test]
    fn the_layout_is_that_of_bindings_made_from_the_headers() {
        same_size! {
            ContextOps = ibv_context_ops
            Mr = ibv_mr
            Mw = ibv_mw
            MwBindInfo = ibv_mw_bind_info
            MwBind = ibv_mw_bind
            CompChannel = ibv_comp_channel
            GidEntry = ibv_gid_entry
            DeviceAttr = ibv_device_attr
            AhAttr = ibv_ah_attr
            QpCap = ibv_qp_cap
            QpInitAttr = ibv_qp_init_attr
            QpAttr = ibv_qp_attr
            SrqAttr = ibv_srq_attr
            SrqInitAttr = ibv_srq_init_attr
            Sge = ibv_sge
            SendWr = ibv_send_wr
            RecvWr = ibv_recv_wr
            Wc = ibv_wc
            AsyncEvent = ibv_async_event
        }
        // Newer libraries have a longer one, and fill what the caller's headers knew.
        assert!(size_of::<PortAttr>() >= size_of::<rdma_sys::ibv_port_attr>());
        same! {
            ContextOps = ibv_context_ops { alloc_mw = alloc_mw, bind_mw = bind_mw,
                dealloc_mw = dealloc_mw, poll_cq = poll_cq, req_notify_cq = req_notify_cq,
                post_srq_recv = post_srq_recv, post_send = post_send, post_recv = post_recv }
            Context = ibv_context { device = device, ops = ops, cmd_fd = cmd_fd,
                async_fd = async_fd, num_comp_vectors = num_comp_vectors }
            Pd = ibv_pd { context = context, handle = handle }
            Mw = ibv_mw { pd = pd, rkey = rkey, handle = handle }
            MwBindInfo = ibv_mw_bind_info { mr = mr, addr = addr, length = length,
                access = mw_access_flags }
            MwBind = ibv_mw_bind { wr_id = wr_id, send_flags = send_flags, bind_info = bind_info }
            Mr = ibv_mr { addr = addr, length = length, lkey = lkey, rkey = rkey }
            CompChannel = ibv_comp_channel { context = context, fd = fd }
            Cq = ibv_cq { context = context, channel = channel, cq_context = cq_context, cqe = cqe }
            Srq = ibv_srq { context = context, srq_context = srq_context, pd = pd }
            Qp = ibv_qp { context = context, send_cq = send_cq, srq = srq, qp_num = qp_num,
                state = state, qp_type = qp_type }
            DeviceAttr = ibv_device_attr { node_guid = node_guid, max_mr_size = max_mr_size,
                max_qp = max_qp, max_qp_wr = max_qp_wr, max_sge = max_sge, max_cq = max_cq,
                max_cqe = max_cqe, max_mr = max_mr, max_pd = max_pd,
                max_qp_rd_atom = max_qp_rd_atom, max_qp_init_rd_atom = max_qp_init_rd_atom,
                max_mw = max_mw, max_mcast_grp = max_mcast_grp, max_ah = max_ah, max_srq = max_srq,
                max_srq_wr = max_srq_wr, phys_port_cnt = phys_port_cnt }
            PortAttr = ibv_port_attr { state = state, max_mtu = max_mtu, active_mtu = active_mtu,
                gid_tbl_len = gid_tbl_len, max_msg_sz = max_msg_sz, pkey_tbl_len = pkey_tbl_len,
                link_layer = link_layer }
            AhAttr = ibv_ah_attr { grh = grh, dlid = dlid, sl = sl, is_global = is_global,
                port_num = port_num }
            QpInitAttr = ibv_qp_init_attr { send_cq = send_cq, recv_cq = recv_cq, srq = srq,
                cap = cap, qp_type = qp_type, sq_sig_all = sq_sig_all }
            QpAttr = ibv_qp_attr { qp_state = qp_state, cur_qp_state = cur_qp_state,
                path_mtu = path_mtu, qkey = qkey, rq_psn = rq_psn, sq_psn = sq_psn,
                dest_qp_num = dest_qp_num, qp_access_flags = qp_access_flags, cap = cap,
                ah_attr = ah_attr, pkey_index = pkey_index,
                en_sqd_async_notify = en_sqd_async_notify, sq_draining = sq_draining,
                max_rd_atomic = max_rd_atomic, max_dest_rd_atomic = max_dest_rd_atomic,
                min_rnr_timer = min_rnr_timer, port_num = port_num, timeout = timeout,
                retry_cnt = retry_cnt, rnr_retry = rnr_retry }
            SendWr = ibv_send_wr { wr_id = wr_id, next = next, sg_list = sg_list,
                num_sge = num_sge, opcode = opcode, send_flags = send_flags,
                imm_or_rkey = imm_data_invalidated_rkey_union, wr = wr, xrc_srqn = qp_type,
                bind = bind_mw_tso_union }
            RecvWr = ibv_recv_wr { wr_id = wr_id, next = next, sg_list = sg_list,
                num_sge = num_sge }
            Sge = ibv_sge { addr = addr, length = length, lkey = lkey }
            Wc = ibv_wc { wr_id = wr_id, status = status, opcode = opcode,
                vendor_err = vendor_err, byte_len = byte_len,
                imm_or_rkey = imm_data_invalidated_rkey_union, qp_num = qp_num, src_qp = src_qp,
                wc_flags = wc_flags }
            AsyncEvent = ibv_async_event { element = element, event_type = event_type }
        }
    }

    #[test]
    fn the_numbers_are_those_of_the_headers() {
        use rdma_sys::*;
        for (ours, theirs) in [
            (WR_RDMA_WRITE, ibv_wr_opcode::IBV_WR_RDMA_WRITE),
            (
                WR_RDMA_WRITE_WITH_IMM,
                ibv_wr_opcode::IBV_WR_RDMA_WRITE_WITH_IMM,
            ),
            (WR_SEND, ibv_wr_opcode::IBV_WR_SEND),
            (WR_SEND_WITH_IMM, ibv_wr_opcode::IBV_WR_SEND_WITH_IMM),
            (WR_RDMA_READ, ibv_wr_opcode::IBV_WR_RDMA_READ),
            (
                WR_ATOMIC_CMP_AND_SWP,
                ibv_wr_opcode::IBV_WR_ATOMIC_CMP_AND_SWP,
            ),
            (
                WR_ATOMIC_FETCH_AND_ADD,
                ibv_wr_opcode::IBV_WR_ATOMIC_FETCH_AND_ADD,
            ),
            (WR_LOCAL_INV, ibv_wr_opcode::IBV_WR_LOCAL_INV),
            (WR_BIND_MW, ibv_wr_opcode::IBV_WR_BIND_MW),
            (WR_SEND_WITH_INV, ibv_wr_opcode::IBV_WR_SEND_WITH_INV),
        ] {
            assert_eq!(ours, theirs);
        }
    }
}
