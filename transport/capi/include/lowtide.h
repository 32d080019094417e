// RDMA verbs in userspace: soft-RoCE over plain UDP sockets, for C and C++.
//
// Made by cbindgen from transport/capi/src; `cargo test -p lowtide-capi` holds it against them.
//
// Names, numbers and meaning are those of <infiniband/verbs.h>, with `lowtide_` for `ibv_`, and the
// manual pages of ibverbs describe them. What differs:
//
// * Objects are opaque; what ibverbs shows as fields is asked for by functions.
// * Every function that returns an int returns 0 or an errno value, but for lowtide_poll_cq; one that
//   returns a pointer returns NULL and sets errno. lowtide_error_message says why in words.
// * NULL is refused with EINVAL wherever the text does not allow it. No call ends the process.
// * An object that another still uses is not destroyed: EBUSY.
// * A list of requests is posted under one lock and sent together.
//
// Objects may be used by several threads at once, but for destroying them. Nothing here may be called
// from a signal handler or, with objects of the parent, in a forked child.

#ifndef LOWTIDE_H
#define LOWTIDE_H

#include <stddef.h>
#include <stdint.h>

// The UDP port of RoCE v2.
#define LOWTIDE_ROCE_PORT 4791

// Elements of a request's list at most.
#define LOWTIDE_SGE_MAX 4

// Rights of a region or window, and what the peer of a queue pair may do.
enum lowtide_access_flags {
    LOWTIDE_ACCESS_LOCAL_WRITE = 1,
    LOWTIDE_ACCESS_REMOTE_WRITE = (1 << 1),
    LOWTIDE_ACCESS_REMOTE_READ = (1 << 2),
    LOWTIDE_ACCESS_REMOTE_ATOMIC = (1 << 3),
    LOWTIDE_ACCESS_MW_BIND = (1 << 4),
    LOWTIDE_ACCESS_ZERO_BASED = (1 << 5),
    LOWTIDE_ACCESS_ON_DEMAND = (1 << 6),
    LOWTIDE_ACCESS_HUGETLB = (1 << 7),
    LOWTIDE_ACCESS_FLUSH_GLOBAL = (1 << 8),
    LOWTIDE_ACCESS_FLUSH_PERSISTENT = (1 << 9),
    LOWTIDE_ACCESS_RELAXED_ORDERING = (1 << 20),
};

// What happens without a work request.
enum lowtide_async_event_type {
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
};

// What happens on an event channel.
enum lowtide_cm_event_type {
    // Somebody asks: id is new, to be accepted or rejected with, and to be destroyed.
    LOWTIDE_CM_EVENT_CONNECT_REQUEST = 4,
    // The peer has not answered for too long.
    LOWTIDE_CM_EVENT_UNREACHABLE = 7,
    // The peer refused; status is the reason of the InfiniBand architecture.
    LOWTIDE_CM_EVENT_REJECTED = 8,
    // Both sides are ready: the queue pair is in RTS.
    LOWTIDE_CM_EVENT_ESTABLISHED = 9,
    // The connection has ended, whoever wanted it; the queue pair is in ERR.
    LOWTIDE_CM_EVENT_DISCONNECTED = 10,
};

// Payload of full packets.
enum lowtide_mtu {
    LOWTIDE_MTU_256 = 1,
    LOWTIDE_MTU_512 = 2,
    LOWTIDE_MTU_1024 = 3,
    LOWTIDE_MTU_2048 = 4,
    LOWTIDE_MTU_4096 = 5,
};

// Type of a memory window.
enum lowtide_mw_type {
    LOWTIDE_MW_TYPE_1 = 1,
    LOWTIDE_MW_TYPE_2 = 2,
};

// The port spaces of rdma_cm.
enum lowtide_port_space {
    LOWTIDE_PS_TCP = 262,
    LOWTIDE_PS_UDP = 273,
};

// Which fields of a lowtide_qp_attr are meant.
enum lowtide_qp_attr_mask {
    LOWTIDE_QP_STATE = 1,
    LOWTIDE_QP_CUR_STATE = (1 << 1),
    LOWTIDE_QP_EN_SQD_ASYNC_NOTIFY = (1 << 2),
    LOWTIDE_QP_ACCESS_FLAGS = (1 << 3),
    LOWTIDE_QP_PKEY_INDEX = (1 << 4),
    LOWTIDE_QP_PORT = (1 << 5),
    LOWTIDE_QP_QKEY = (1 << 6),
    LOWTIDE_QP_AV = (1 << 7),
    LOWTIDE_QP_PATH_MTU = (1 << 8),
    LOWTIDE_QP_TIMEOUT = (1 << 9),
    LOWTIDE_QP_RETRY_CNT = (1 << 10),
    LOWTIDE_QP_RNR_RETRY = (1 << 11),
    LOWTIDE_QP_RQ_PSN = (1 << 12),
    LOWTIDE_QP_MAX_QP_RD_ATOMIC = (1 << 13),
    LOWTIDE_QP_MIN_RNR_TIMER = (1 << 15),
    LOWTIDE_QP_SQ_PSN = (1 << 16),
    LOWTIDE_QP_MAX_DEST_RD_ATOMIC = (1 << 17),
    LOWTIDE_QP_DEST_QPN = (1 << 20),
};

// State of a queue pair.
enum lowtide_qp_state {
    LOWTIDE_QPS_RESET = 0,
    LOWTIDE_QPS_INIT = 1,
    LOWTIDE_QPS_RTR = 2,
    LOWTIDE_QPS_RTS = 3,
    LOWTIDE_QPS_SQD = 4,
    LOWTIDE_QPS_SQE = 5,
    LOWTIDE_QPS_ERR = 6,
};

// Type of a queue pair.
enum lowtide_qp_type {
    LOWTIDE_QPT_RC = 2,
    LOWTIDE_QPT_UC = 3,
    LOWTIDE_QPT_UD = 4,
};

// How a send work request is to be treated.
enum lowtide_send_flags {
    LOWTIDE_SEND_FENCE = 1,
    LOWTIDE_SEND_SIGNALED = (1 << 1),
    LOWTIDE_SEND_SOLICITED = (1 << 2),
    LOWTIDE_SEND_INLINE = (1 << 3),
};

// Which fields of a lowtide_srq_attr are meant.
enum lowtide_srq_attr_mask {
    // Not served: a shared receive queue keeps its size.
    LOWTIDE_SRQ_MAX_WR = 1,
    LOWTIDE_SRQ_LIMIT = (1 << 1),
};

// What a completion carries.
enum lowtide_wc_flags {
    LOWTIDE_WC_GRH = 1,
    LOWTIDE_WC_WITH_IMM = (1 << 1),
    LOWTIDE_WC_WITH_INV = (1 << 3),
};

// What completed; means something only if it succeeded.
enum lowtide_wc_opcode {
    LOWTIDE_WC_SEND = 0,
    LOWTIDE_WC_RDMA_WRITE = 1,
    LOWTIDE_WC_RDMA_READ = 2,
    LOWTIDE_WC_COMP_SWAP = 3,
    LOWTIDE_WC_FETCH_ADD = 4,
    LOWTIDE_WC_BIND_MW = 5,
    LOWTIDE_WC_LOCAL_INV = 6,
    LOWTIDE_WC_FLUSH = 8,
    LOWTIDE_WC_ATOMIC_WRITE = 9,
    // All receives have this bit.
    LOWTIDE_WC_RECV = 128,
    LOWTIDE_WC_RECV_RDMA_WITH_IMM = 129,
};

// How a work request ended.
enum lowtide_wc_status {
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
};

// What a send work request does.
enum lowtide_wr_opcode {
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
};

// A destination of datagrams.
struct lowtide_ah;

// Where events of listeners and connections arrive.
struct lowtide_cm_channel;

// A listener, a request, or a connection.
struct lowtide_cm_id;

// Where completion queues report that something has come.
struct lowtide_comp_channel;

// An open device.
struct lowtide_context;

// A completion queue.
struct lowtide_cq;

// A memory region.
struct lowtide_mr;

// A memory window.
struct lowtide_mw;

// A protection domain.
struct lowtide_pd;

// A queue pair.
struct lowtide_qp;

// A shared receive queue.
struct lowtide_srq;

// A work completion. If status is not 0, only wr_id, qp_num and vendor_err mean something.
struct lowtide_wc {
    uint64_t wr_id;
    // A lowtide_wc_status.
    uint32_t status;
    // A lowtide_wc_opcode.
    uint32_t opcode;
    uint32_t vendor_err;
    // Bytes received (datagrams: with the 40 bytes of header), read, or returned by an atomic.
    uint32_t byte_len;
    // In network order; with LOWTIDE_WC_WITH_IMM.
    uint32_t imm_data;
    // With LOWTIDE_WC_WITH_INV.
    uint32_t invalidated_rkey;
    uint32_t qp_num;
    // Datagrams: the sender.
    uint32_t src_qp;
    // lowtide_wc_flags.
    uint32_t wc_flags;
};

// A device's address as verbs know it: IPv6, or IPv4 as ::ffff:a.b.c.d.
struct lowtide_gid {
    uint8_t raw[16];
};

// What both sides of a connection agree on.
struct lowtide_conn_param {
    // Told to the peer's program, padded with zeros; NULL is none.
    const void *private_data;
    uint8_t private_data_len;
    // READs and atomics of the peer served at once, and of ours under way at once.
    uint8_t responder_resources;
    uint8_t initiator_depth;
    // A client's word counts for both sides; 7 is without limit.
    uint8_t retry_count;
    uint8_t rnr_retry_count;
    // Local ACK timeout: 4.096 us times 2 to this power. A client's word counts for both sides.
    uint8_t ack_timeout;
};

// An event. All it points to lives until it is acknowledged.
struct lowtide_cm_event {
    struct lowtide_cm_id *id;
    // Requests: the listener; NULL if it has gone.
    struct lowtide_cm_id *listen_id;
    // A lowtide_cm_event_type.
    uint32_t event;
    int32_t status;
    // What the peer's program says, padded with zeros.
    const void *private_data;
    uint32_t private_data_len;
    // Requests: the client's address.
    struct lowtide_gid peer;
};

// What a device can do at most.
struct lowtide_device_attr {
    uint64_t node_guid;
    uint64_t max_mr_size;
    uint32_t max_qp;
    uint32_t max_qp_wr;
    uint32_t max_sge;
    // Bytes; ibverbs has no such field.
    uint32_t max_inline_data;
    uint32_t max_cq;
    uint32_t max_cqe;
    uint32_t max_mr;
    uint32_t max_mw;
    uint32_t max_pd;
    uint32_t max_ah;
    uint32_t max_srq;
    uint32_t max_srq_wr;
    uint32_t max_qp_rd_atom;
    uint32_t max_qp_init_rd_atom;
    uint32_t max_mcast_grp;
    // 0: none; 1: atomic among this device's queue pairs; 2: among all that reaches the memory.
    uint32_t atomic_cap;
    uint32_t phys_port_cnt;
};

// A port.
struct lowtide_port_attr {
    // 4 is active.
    uint32_t state;
    uint32_t max_mtu;
    uint32_t active_mtu;
    uint32_t gid_tbl_len;
    uint32_t max_msg_sz;
    uint16_t pkey_tbl_len;
    // 2 is Ethernet.
    uint8_t link_layer;
};

// What a device has seen since it was opened; the names of anomalies are those of Linux rxe.
struct lowtide_counters {
    uint64_t sent_pkts;
    uint64_t tx_bytes;
    uint64_t rx_datagrams;
    // Those of them that were packets with a right ICRC.
    uint64_t rcvd_pkts;
    uint64_t rx_bytes;
    // Datagrams that the kernel refused to send.
    uint64_t send_err;
    // Datagrams that the socket's buffer had no room for.
    uint64_t rx_overflow;
    uint64_t rx_malformed;
    uint64_t rx_bad_icrc;
    uint64_t rx_unknown_qp;
    // For a queue pair, but not from its peer's address.
    uint64_t rx_wrong_peer;
    uint64_t duplicate_request;
    uint64_t out_of_seq_request;
    uint64_t rcvd_seq_err;
    uint64_t rcvd_rnr_err;
    uint64_t send_rnr_err;
    uint64_t retry_exceeded_err;
    uint64_t retry_rnr_exceeded_err;
    uint64_t completer_retry_err;
    uint64_t rdma_sends;
    uint64_t rdma_recvs;
    uint64_t ack_timeout;
    uint64_t retransmitted_pkts;
    // Packets that a queue pair had no use for.
    uint64_t dropped_pkts;
};

// What an asynchronous event is about.
union lowtide_event_element {
    struct lowtide_cq *cq;
    struct lowtide_qp *qp;
    struct lowtide_srq *srq;
    int32_t port_num;
};

// An asynchronous event.
struct lowtide_async_event {
    union lowtide_event_element element;
    // A lowtide_async_event_type.
    uint32_t event_type;
};

// A memory window's place. A length of 0 takes the place away.
struct lowtide_mw_bind_info {
    struct lowtide_mr *mr;
    uint64_t addr;
    uint64_t length;
    uint32_t mw_access_flags;
};

// The bind of a type 1 window by lowtide_bind_mw.
struct lowtide_mw_bind {
    uint64_t wr_id;
    uint32_t send_flags;
    struct lowtide_mw_bind_info bind_info;
};

// Memory of a work request.
struct lowtide_sge {
    uint64_t addr;
    uint32_t length;
    uint32_t lkey;
};

// Where a WRITE, READ, ATOMIC WRITE or FLUSH goes.
struct lowtide_rdma {
    uint64_t remote_addr;
    uint32_t rkey;
};

// An atomic's word and operands.
struct lowtide_atomic {
    uint64_t remote_addr;
    uint64_t compare_add;
    uint64_t swap;
    uint32_t rkey;
};

// Where a datagram goes.
struct lowtide_ud {
    struct lowtide_ah *ah;
    uint32_t remote_qpn;
    uint32_t remote_qkey;
};

// By opcode: rdma for WRITE, READ, ATOMIC WRITE and FLUSH, atomic for atomics, ud for datagrams.
union lowtide_remote {
    struct lowtide_rdma rdma;
    struct lowtide_atomic atomic;
    struct lowtide_ud ud;
};

// The bind of a type 2 window by a work request.
struct lowtide_bind_mw_wr {
    struct lowtide_mw *mw;
    // The key from now on: lowtide_inc_rkey of the one so far.
    uint32_t rkey;
    struct lowtide_mw_bind_info bind_info;
};

// What a FLUSH asks for besides its place.
struct lowtide_flush {
    // Bytes from remote_addr on.
    uint32_t length;
    // Not 0: the whole region, whatever the range.
    uint8_t whole_region;
    // Not 0: until the data is persistent. No region here grants it.
    uint8_t persistent;
};

// A send work request; fields that its opcode does not need are not looked at.
struct lowtide_send_wr {
    uint64_t wr_id;
    // NULL ends the list.
    struct lowtide_send_wr *next;
    struct lowtide_sge *sg_list;
    int32_t num_sge;
    // A lowtide_wr_opcode.
    uint32_t opcode;
    // lowtide_send_flags.
    uint32_t send_flags;
    // In network order.
    uint32_t imm_data;
    // The key that SEND_WITH_INV or LOCAL_INV makes invalid.
    uint32_t invalidate_rkey;
    union lowtide_remote wr;
    struct lowtide_bind_mw_wr bind_mw;
    struct lowtide_flush flush;
};

// A receive work request.
struct lowtide_recv_wr {
    uint64_t wr_id;
    // NULL ends the list.
    struct lowtide_recv_wr *next;
    struct lowtide_sge *sg_list;
    int32_t num_sge;
};

// How much a queue pair can hold.
struct lowtide_qp_cap {
    uint32_t max_send_wr;
    uint32_t max_recv_wr;
    uint32_t max_send_sge;
    uint32_t max_recv_sge;
    uint32_t max_inline_data;
};

// What a queue pair is made with.
struct lowtide_qp_init_attr {
    // The program's own.
    void *qp_context;
    struct lowtide_cq *send_cq;
    struct lowtide_cq *recv_cq;
    // NULL: it has receives of its own.
    struct lowtide_srq *srq;
    struct lowtide_qp_cap cap;
    // A lowtide_qp_type.
    uint32_t qp_type;
    // Not 0: every send reports success, whatever its flags say.
    int32_t sq_sig_all;
};

// The global part of a path.
struct lowtide_global_route {
    struct lowtide_gid dgid;
    uint32_t flow_label;
    uint8_t sgid_index;
    uint8_t hop_limit;
    uint8_t traffic_class;
};

// A path to a peer. RoCE has global ones only: is_global must not be 0.
struct lowtide_ah_attr {
    struct lowtide_global_route grh;
    uint8_t sl;
    uint8_t is_global;
    uint8_t port_num;
};

// What can be set of and asked from a queue pair.
struct lowtide_qp_attr {
    uint32_t qp_state;
    uint32_t cur_qp_state;
    uint32_t path_mtu;
    uint32_t qkey;
    uint32_t rq_psn;
    uint32_t sq_psn;
    uint32_t dest_qp_num;
    // lowtide_access_flags.
    uint32_t qp_access_flags;
    struct lowtide_qp_cap cap;
    struct lowtide_ah_attr ah_attr;
    uint16_t pkey_index;
    uint8_t en_sqd_async_notify;
    uint8_t sq_draining;
    uint8_t max_rd_atomic;
    uint8_t max_dest_rd_atomic;
    uint8_t min_rnr_timer;
    uint8_t port_num;
    uint8_t timeout;
    uint8_t retry_cnt;
    uint8_t rnr_retry;
};

// A shared receive queue's limits.
struct lowtide_srq_attr {
    uint32_t max_wr;
    uint32_t max_sge;
    uint32_t srq_limit;
};

// What a shared receive queue is made with.
struct lowtide_srq_init_attr {
    // The program's own.
    void *srq_context;
    struct lowtide_srq_attr attr;
};

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// A new completion channel.
struct lowtide_comp_channel *lowtide_create_comp_channel(struct lowtide_context *context);

// Ends a channel.
int lowtide_destroy_comp_channel(struct lowtide_comp_channel *channel);

// The file descriptor that is readable as long as an event waits; -1 for NULL. It is the
// channel's: not to be closed or read, but O_NONBLOCK may be set.
int lowtide_comp_channel_fd(const struct lowtide_comp_channel *channel);

// A completion queue for cqe entries; one entry too many breaks it. channel may be NULL;
// comp_vector is not looked at.
struct lowtide_cq *lowtide_create_cq(struct lowtide_context *context,
                                     int cqe,
                                     void *cq_context,
                                     struct lowtide_comp_channel *channel,
                                     int _comp_vector);

// Ends a completion queue, after all its events are acknowledged.
int lowtide_destroy_cq(struct lowtide_cq *cq);

// Changes the number of entries.
int lowtide_resize_cq(struct lowtide_cq *cq, int cqe);

// Has the next completion told to the channel, once. solicited_only: the next one of a solicited
// message or a failure. What is there already is not told: poll once more afterwards.
int lowtide_req_notify_cq(struct lowtide_cq *cq, int solicited_only);

// The next completion queue of a channel that was asked to tell and got something, asleep until
// one does. EAGAIN: the descriptor does not block. Each event must be acknowledged:
// lowtide_destroy_cq waits for that. cq_context may be NULL.
int lowtide_get_cq_event(struct lowtide_comp_channel *channel,
                         struct lowtide_cq **cq,
                         void **cq_context);

// Acknowledges events of a completion queue.
int lowtide_ack_cq_events(struct lowtide_cq *cq, uint32_t nevents);

// Takes up to num_entries completions; returns how many, or a negative errno value: -ENOMEM when
// nothing is left of a queue that had no room once.
int lowtide_poll_cq(struct lowtide_cq *cq, int num_entries, struct lowtide_wc *wc);

// A new event channel.
struct lowtide_cm_channel *lowtide_cm_create_channel(struct lowtide_context *context);

// Ends a channel; requests that wait in it are rejected.
int lowtide_cm_destroy_channel(struct lowtide_cm_channel *channel);

// The file descriptor that is readable as long as an event waits; -1 for NULL. It is the
// channel's: not to be closed or read, but O_NONBLOCK may be set.
int lowtide_cm_channel_fd(const struct lowtide_cm_channel *channel);

// Listens for connections to a port of a lowtide_port_space, until the id is destroyed.
// EADDRINUSE: somebody does on this device.
struct lowtide_cm_id *lowtide_cm_listen(struct lowtide_cm_channel *channel,
                                        uint32_t port_space,
                                        uint16_t port,
                                        void *context);

// Asks the peer with this GID for a connection to a port of a lowtide_port_space. Its device is
// taken to listen on udp_port; 0 is the port of this device. The queue pair is in INIT, with
// receives posted, and the connection's until the id is destroyed. ESTABLISHED, REJECTED or
// UNREACHABLE follows. param may be NULL.
struct lowtide_cm_id *lowtide_cm_connect(struct lowtide_cm_channel *channel,
                                         const struct lowtide_gid *peer,
                                         uint16_t udp_port,
                                         uint32_t port_space,
                                         uint16_t port,
                                         struct lowtide_qp *qp,
                                         const struct lowtide_conn_param *param,
                                         void *context);

// Accepts a request with a queue pair in INIT, which is the connection's until the id is
// destroyed. It may be posted to at once; ESTABLISHED follows. param may be NULL. A request that
// could not be accepted is rejected.
int lowtide_cm_accept(struct lowtide_cm_id *id,
                      struct lowtide_qp *qp,
                      const struct lowtide_conn_param *param);

// Rejects a request; private_data may be NULL.
int lowtide_cm_reject(struct lowtide_cm_id *id, const void *private_data, uint8_t private_data_len);

// Ends a connection, or withdraws a request of ours. The queue pair goes to ERR at once;
// DISCONNECTED follows.
int lowtide_cm_disconnect(struct lowtide_cm_id *id);

// Ends an id, after all its events are acknowledged: stops listening, rejects, disconnects. No
// event follows.
int lowtide_cm_destroy_id(struct lowtide_cm_id *id);

// The program's own pointer that an id was made with (a request's is its listener's); NULL for
// NULL.
void *lowtide_cm_context(const struct lowtide_cm_id *id);

// The next event, asleep until it comes. EAGAIN: the descriptor does not block. Each must be
// acknowledged, which frees it: destroying its id waits for that.
int lowtide_cm_get_event(struct lowtide_cm_channel *channel, struct lowtide_cm_event **event);

// Acknowledges and frees an event.
int lowtide_cm_ack_event(struct lowtide_cm_event *event);

// The version of the library: 10,000 times the first number, 100 times the second, the third.
uint32_t lowtide_version(void);

// Opens a soft-RoCE device on a numeric address of this host and a UDP port. LOWTIDE_ROCE_PORT is
// the one that adapters and kernels know; both ends must use the same; 0 takes any that is free.
// EADDRINUSE: another process or the kernel's own soft-RoCE has the port, and the message says
// what to do.
struct lowtide_context *lowtide_open_device(const char *address_text, uint16_t port);

// The same, for a device that writes a capture file (pcap): every packet that it sends,
// and every one with a right ICRC that it receives. Its packets then go by UDP, also to peers on the
// same host. The message of an error says what is wrong with the file.
struct lowtide_context *lowtide_open_captured_device(const char *address_text,
                                                     uint16_t port,
                                                     const char *path);

// Closes a device.
int lowtide_close_device(struct lowtide_context *context);

// The UDP port that a device listens on; 0 for NULL.
uint16_t lowtide_udp_port(const struct lowtide_context *context);

// The GID of a numeric address.
int lowtide_parse_gid(const char *text, struct lowtide_gid *gid);

// What a device can do at most.
int lowtide_query_device(const struct lowtide_context *context, struct lowtide_device_attr *attr);

// A port of a device; there is one, number 1.
int lowtide_query_port(const struct lowtide_context *context,
                       uint8_t port,
                       struct lowtide_port_attr *attr);

// A device's GID; there is one, port 1, index 0.
int lowtide_query_gid(const struct lowtide_context *context,
                      uint8_t port,
                      int index,
                      struct lowtide_gid *gid);

// What a device has seen.
int lowtide_query_counters(const struct lowtide_context *context,
                           struct lowtide_counters *counters);

// A new protection domain.
struct lowtide_pd *lowtide_alloc_pd(struct lowtide_context *context);

// Ends a protection domain.
int lowtide_dealloc_pd(struct lowtide_pd *pd);

// The file descriptor that is readable as long as an asynchronous event waits; -1 for NULL. It is
// the device's: not to be closed or read, but O_NONBLOCK may be set.
int lowtide_async_fd(const struct lowtide_context *context);

// The next asynchronous event, asleep until it comes. EAGAIN: the descriptor does not block. Each
// must be acknowledged: destroying what it is about waits for that.
int lowtide_get_async_event(struct lowtide_context *context, struct lowtide_async_event *event);

// Acknowledges an event.
int lowtide_ack_async_event(const struct lowtide_async_event *event);

// Why the last call of this thread that failed did, in words; "no error" if none has. Valid until
// this thread's next call of this function.
const char *lowtide_error_message(void);

// A completion's status in words; never NULL.
const char *lowtide_wc_status_str(uint32_t status);

// Registers memory, under its own addresses. EFAULT: part of it is not mapped, or not writable as
// LOCAL_WRITE needs. It is not locked, and may be unmapped: requests that touch it then fail.
struct lowtide_mr *lowtide_reg_mr(struct lowtide_pd *pd, void *addr, uintptr_t length, int access);

// The same, under addresses that begin with iova.
struct lowtide_mr *lowtide_reg_mr_iova(struct lowtide_pd *pd,
                                       void *addr,
                                       uintptr_t length,
                                       uint64_t iova,
                                       int access);

// Takes a region out of service. EBUSY: windows are bound to it.
int lowtide_dereg_mr(struct lowtide_mr *mr);

// A region's key for work requests; 0 for NULL.
uint32_t lowtide_mr_lkey(const struct lowtide_mr *mr);

// A region's key for peers; 0 for NULL.
uint32_t lowtide_mr_rkey(const struct lowtide_mr *mr);

// A memory window without a place; type is a lowtide_mw_type.
struct lowtide_mw *lowtide_alloc_mw(struct lowtide_pd *pd, uint32_t mw_type);

// Ends a window; peers lose what it gave them.
int lowtide_dealloc_mw(struct lowtide_mw *mw);

// A window's key for peers, as the last bind that was posted gives it; 0 for NULL.
uint32_t lowtide_mw_rkey(const struct lowtide_mw *mw);

// The key for the next bind of a type 2 window.
uint32_t lowtide_inc_rkey(uint32_t rkey);

// Posts the bind of a type 1 window, and gives it a new key.
int lowtide_bind_mw(struct lowtide_qp *qp,
                    struct lowtide_mw *mw,
                    const struct lowtide_mw_bind *bind);

// Posts sends, in order, and sends them together. If one is not taken, bad_wr says which, and
// those before it were. bad_wr may be NULL. Data of LOWTIDE_SEND_INLINE is copied before the call
// returns; all other memory belongs to the device until the request has completed.
int lowtide_post_send(struct lowtide_qp *qp,
                      struct lowtide_send_wr *wr,
                      struct lowtide_send_wr **bad_wr);

// Posts receives, in order. If one is not taken, bad_wr says which, and those before it were.
// bad_wr may be NULL. The memory belongs to the device until the receive has completed.
int lowtide_post_recv(struct lowtide_qp *qp,
                      struct lowtide_recv_wr *wr,
                      struct lowtide_recv_wr **bad_wr);

// The same to a shared receive queue.
int lowtide_post_srq_recv(struct lowtide_srq *srq,
                          struct lowtide_recv_wr *wr,
                          struct lowtide_recv_wr **bad_wr);

// A queue pair in RESET. Writes the capacities that it got to init_attr.
struct lowtide_qp *lowtide_create_qp(struct lowtide_pd *pd, struct lowtide_qp_init_attr *init_attr);

// Ends a queue pair, after all its events are acknowledged. What is posted is forgotten. EBUSY: a
// connection has it.
int lowtide_destroy_qp(struct lowtide_qp *qp);

// A queue pair's number; 0 for NULL.
uint32_t lowtide_qp_num(const struct lowtide_qp *qp);

// The program's own pointer that a queue pair was made with; NULL for NULL.
void *lowtide_qp_context(const struct lowtide_qp *qp);

// A first PSN that nobody can guess; 0 for NULL.
uint32_t lowtide_random_psn(const struct lowtide_qp *qp);

// Moves a queue pair, or changes what may be changed where it is. A call that fails changes
// nothing.
int lowtide_modify_qp(struct lowtide_qp *qp, const struct lowtide_qp_attr *attr, int attr_mask);

// All attributes as they are now, whatever the mask says. init_attr may be NULL.
int lowtide_query_qp(struct lowtide_qp *qp,
                     struct lowtide_qp_attr *attr,
                     int _attr_mask,
                     struct lowtide_qp_init_attr *init_attr);

// Attaches a datagram queue pair to a multicast group; lid is InfiniBand's, and not looked at.
int lowtide_attach_mcast(struct lowtide_qp *qp, const struct lowtide_gid *gid, uint16_t _lid);

// Detaches it again.
int lowtide_detach_mcast(struct lowtide_qp *qp, const struct lowtide_gid *gid, uint16_t _lid);

// A shared receive queue; its limit is not armed yet, whatever the attributes say.
struct lowtide_srq *lowtide_create_srq(struct lowtide_pd *pd,
                                       const struct lowtide_srq_init_attr *init_attr);

// Ends a shared receive queue, after all its events are acknowledged.
int lowtide_destroy_srq(struct lowtide_srq *srq);

// The program's own pointer that a shared receive queue was made with; NULL for NULL.
void *lowtide_srq_context(const struct lowtide_srq *srq);

// Arms the limit (LOWTIDE_SRQ_LIMIT).
int lowtide_modify_srq(struct lowtide_srq *srq, const struct lowtide_srq_attr *attr, int mask);

// A shared receive queue's limits as they are.
int lowtide_query_srq(struct lowtide_srq *srq, struct lowtide_srq_attr *attr);

// A destination of datagrams; a multicast GID too.
struct lowtide_ah *lowtide_create_ah(struct lowtide_pd *pd, const struct lowtide_ah_attr *attr);

// The way back to the sender of a datagram: grh is the first 40 bytes of its receive.
struct lowtide_ah *lowtide_create_ah_from_grh(struct lowtide_pd *pd, const void *grh);

// Ends an address handle; requests that name it and have not been sent fail.
int lowtide_destroy_ah(struct lowtide_ah *ah);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* LOWTIDE_H */
