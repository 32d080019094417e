// The C interface as a program uses it, and as a program abuses it. Two devices on the addresses
// given; says which line does not hold.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <lowtide.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define MUST(condition)                                                                            \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "line %d: %s: errno %d, %s\n", __LINE__, #condition, errno,            \
                    lowtide_error_message());                                                      \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

enum { LENGTH = 1 << 16, QKEY = 0x1357, DEPTH = 8 };
enum {
    ALL = LOWTIDE_ACCESS_LOCAL_WRITE | LOWTIDE_ACCESS_REMOTE_WRITE | LOWTIDE_ACCESS_REMOTE_READ
          | LOWTIDE_ACCESS_REMOTE_ATOMIC | LOWTIDE_ACCESS_FLUSH_GLOBAL | LOWTIDE_ACCESS_MW_BIND
};

struct end {
    struct lowtide_context *context;
    struct lowtide_gid gid;
    struct lowtide_pd *pd;
    struct lowtide_comp_channel *channel;
    struct lowtide_cq *cq;
    struct lowtide_mr *mr;
    struct lowtide_qp *qp;
    char *memory;
};

static struct lowtide_qp *queue_pair(struct end *end, uint32_t type, struct lowtide_srq *srq)
{
    struct lowtide_qp_init_attr init = {.send_cq = end->cq, .recv_cq = end->cq, .srq = srq};
    init.qp_context = end;
    init.qp_type = type;
    init.cap.max_send_wr = init.cap.max_recv_wr = DEPTH;
    init.cap.max_send_sge = init.cap.max_recv_sge = 2;
    init.cap.max_inline_data = 32;
    struct lowtide_qp *qp = lowtide_create_qp(end->pd, &init);
    MUST(qp && lowtide_qp_context(qp) == end);
    MUST(init.cap.max_recv_wr == (srq ? 0 : DEPTH));
    return qp;
}

static void to_init(struct lowtide_qp *qp, int is_datagram)
{
    struct lowtide_qp_attr attr = {.qp_state = LOWTIDE_QPS_INIT, .port_num = 1, .qkey = QKEY};
    attr.qp_access_flags = LOWTIDE_ACCESS_REMOTE_WRITE | LOWTIDE_ACCESS_REMOTE_READ
                           | LOWTIDE_ACCESS_REMOTE_ATOMIC | LOWTIDE_ACCESS_FLUSH_GLOBAL;
    int mask = LOWTIDE_QP_STATE | LOWTIDE_QP_PKEY_INDEX | LOWTIDE_QP_PORT;
    mask |= is_datagram ? LOWTIDE_QP_QKEY : LOWTIDE_QP_ACCESS_FLAGS;
    MUST(lowtide_modify_qp(qp, &attr, mask) == 0);
}

static void to_rts(struct lowtide_qp *qp, struct lowtide_qp *peer, struct lowtide_gid to)
{
    struct lowtide_qp_attr attr = {.qp_state = LOWTIDE_QPS_RTR, .path_mtu = LOWTIDE_MTU_1024};
    attr.dest_qp_num = lowtide_qp_num(peer);
    attr.max_dest_rd_atomic = attr.max_rd_atomic = 4;
    attr.min_rnr_timer = 12;
    attr.ah_attr.is_global = attr.ah_attr.port_num = 1;
    attr.ah_attr.grh.dgid = to;
    attr.rq_psn = attr.sq_psn = 0xFFFFFF;
    int mask = LOWTIDE_QP_STATE | LOWTIDE_QP_AV | LOWTIDE_QP_PATH_MTU | LOWTIDE_QP_DEST_QPN
               | LOWTIDE_QP_RQ_PSN | LOWTIDE_QP_MAX_DEST_RD_ATOMIC | LOWTIDE_QP_MIN_RNR_TIMER;
    MUST(lowtide_modify_qp(qp, &attr, mask & ~LOWTIDE_QP_DEST_QPN) == EINVAL);
    MUST(strstr(lowtide_error_message(), "DEST_QPN"));
    MUST(lowtide_modify_qp(qp, &attr, mask) == 0);
    attr.qp_state = LOWTIDE_QPS_RTS;
    attr.timeout = 14;
    attr.retry_cnt = attr.rnr_retry = 7;
    mask = LOWTIDE_QP_STATE | LOWTIDE_QP_SQ_PSN | LOWTIDE_QP_TIMEOUT | LOWTIDE_QP_RETRY_CNT
           | LOWTIDE_QP_RNR_RETRY | LOWTIDE_QP_MAX_QP_RD_ATOMIC;
    MUST(lowtide_modify_qp(qp, &attr, mask) == 0);
}

static struct end open_end(struct lowtide_context *context, const char *address)
{
    struct end end = {.context = context};
    MUST(end.context && lowtide_udp_port(end.context) != 0);
    struct lowtide_gid known;
    MUST(lowtide_query_gid(end.context, 1, 0, &end.gid) == 0);
    MUST(lowtide_parse_gid(address, &known) == 0 && memcmp(&known, &end.gid, sizeof known) == 0);
    MUST((end.pd = lowtide_alloc_pd(end.context)));
    MUST((end.channel = lowtide_create_comp_channel(end.context)));
    MUST((end.cq = lowtide_create_cq(end.context, 64, &end, end.channel, 0)));
    end.memory = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST((end.mr = lowtide_reg_mr(end.pd, end.memory, LENGTH, ALL)));
    end.qp = queue_pair(&end, LOWTIDE_QPT_RC, NULL);
    return end;
}

static void close_end(struct end *end)
{
    MUST(lowtide_close_device(end->context) == EBUSY);
    MUST(lowtide_dealloc_pd(end->pd) == EBUSY && lowtide_destroy_cq(end->cq) == EBUSY);
    MUST(lowtide_destroy_qp(end->qp) == 0);
    MUST(lowtide_destroy_comp_channel(end->channel) == EBUSY && lowtide_destroy_cq(end->cq) == 0);
    MUST(lowtide_destroy_comp_channel(end->channel) == 0);
    MUST(lowtide_dealloc_pd(end->pd) == EBUSY && strstr(lowtide_error_message(), "in use"));
    MUST(lowtide_dereg_mr(end->mr) == 0 && lowtide_dealloc_pd(end->pd) == 0);
    MUST(lowtide_close_device(end->context) == 0);
    munmap(end->memory, LENGTH);
}

// The next completion; `other` is driven too, so that nothing waits for the devices' threads.
static struct lowtide_wc completion(struct end *end)
{
    struct lowtide_wc wc = {0};
    int count;
    for (time_t end_at = time(NULL) + 60; (count = lowtide_poll_cq(end->cq, 1, &wc)) == 0;)
        MUST(time(NULL) < end_at);
    MUST(count == 1);
    return wc;
}

static struct lowtide_sge piece(const struct end *end, uint32_t at, uint32_t length)
{
    struct lowtide_sge sge = {(uintptr_t)end->memory + at, length, lowtide_mr_lkey(end->mr)};
    return sge;
}

static void receive(struct end *end, struct lowtide_qp *qp, uint32_t at, uint32_t length)
{
    struct lowtide_sge sge = piece(end, at, length);
    struct lowtide_recv_wr wr = {.wr_id = at, .sg_list = &sge, .num_sge = 1};
    MUST(lowtide_post_recv(qp, &wr, NULL) == 0);
}

static struct lowtide_send_wr request(uint32_t opcode, struct lowtide_sge *sge)
{
    struct lowtide_send_wr wr = {.opcode = opcode, .sg_list = sge, .num_sge = sge != NULL};
    wr.wr_id = opcode;
    wr.send_flags = LOWTIDE_SEND_SIGNALED;
    return wr;
}

// Posts one request and returns the status it completes with.
static uint32_t done(struct end *end, struct lowtide_send_wr wr)
{
    MUST(lowtide_post_send(end->qp, &wr, NULL) == 0);
    struct lowtide_wc wc = completion(end);
    MUST(wc.wr_id == wr.wr_id && wc.qp_num == lowtide_qp_num(end->qp));
    return wc.status;
}

static void refuses_null(struct end *a)
{
    MUST(!lowtide_open_device(NULL, 0) && errno == EINVAL);
    MUST(!lowtide_open_device("localhost", 0) && errno == EINVAL);
    MUST(!lowtide_open_device("198.51.100.1", 0) && errno == EADDRNOTAVAIL);
    MUST(lowtide_close_device(NULL) == EINVAL);
    MUST(strstr(lowtide_error_message(), "context is NULL"));
    MUST(!lowtide_alloc_pd(NULL) && !lowtide_reg_mr(NULL, a->memory, 1, 0) && errno == EINVAL);
    MUST(!lowtide_create_cq(NULL, 1, NULL, NULL, 0) && !lowtide_create_comp_channel(NULL));
    MUST(!lowtide_create_qp(a->pd, NULL) && !lowtide_create_qp(NULL, NULL));
    MUST(!lowtide_create_srq(NULL, NULL) && !lowtide_create_ah(a->pd, NULL));
    MUST(!lowtide_alloc_mw(NULL, 1) && !lowtide_alloc_mw(a->pd, 3) && errno == EINVAL);
    MUST(!lowtide_cm_create_channel(NULL) && !lowtide_cm_listen(NULL, 0x0106, 1, NULL));
    MUST(!lowtide_cm_connect(NULL, &a->gid, 0, 0x0106, 1, a->qp, NULL, NULL));
    MUST(lowtide_dealloc_pd(NULL) == EINVAL && lowtide_dereg_mr(NULL) == EINVAL);
    MUST(lowtide_destroy_cq(NULL) == EINVAL && lowtide_destroy_qp(NULL) == EINVAL);
    MUST(lowtide_destroy_srq(NULL) == EINVAL && lowtide_destroy_ah(NULL) == EINVAL);
    MUST(lowtide_dealloc_mw(NULL) == EINVAL && lowtide_cm_destroy_id(NULL) == EINVAL);
    MUST(lowtide_cm_destroy_channel(NULL) == EINVAL && lowtide_cm_ack_event(NULL) == EINVAL);
    MUST(lowtide_destroy_comp_channel(NULL) == EINVAL && lowtide_async_fd(NULL) == -1);
    MUST(lowtide_modify_qp(a->qp, NULL, 0) == EINVAL && lowtide_query_qp(a->qp, NULL, 0, NULL));
    MUST(lowtide_post_send(NULL, NULL, NULL) == EINVAL && lowtide_post_recv(NULL, NULL, NULL));
    MUST(lowtide_poll_cq(NULL, 1, NULL) == -EINVAL && lowtide_poll_cq(a->cq, 1, NULL) == -EINVAL);
    MUST(lowtide_poll_cq(a->cq, -1, NULL) == -EINVAL && lowtide_poll_cq(a->cq, 0, NULL) == 0);
    MUST(lowtide_get_cq_event(a->channel, NULL, NULL) == EINVAL && lowtide_req_notify_cq(NULL, 0));
    MUST(lowtide_get_async_event(a->context, NULL) == EINVAL && lowtide_ack_async_event(NULL));
    MUST(lowtide_query_device(a->context, NULL) == EINVAL && lowtide_mr_lkey(NULL) == 0);
    MUST(lowtide_query_port(a->context, 2, &(struct lowtide_port_attr){0}) == EINVAL);
    MUST(lowtide_cm_accept(NULL, a->qp, NULL) == EINVAL && lowtide_cm_reject(NULL, NULL, 0));
    struct lowtide_qp_attr attr = {.qp_state = 7};
    MUST(lowtide_modify_qp(a->qp, &attr, LOWTIDE_QP_STATE) == EINVAL);
}

static void refuses_misuse(struct end *a, const char *address)
{
    MUST(!lowtide_open_device(address, LOWTIDE_ROCE_PORT) && errno == EADDRINUSE);
    MUST(strstr(lowtide_error_message(), address) && strstr(lowtide_error_message(), "4791"));
    struct lowtide_sge sge = piece(a, 0, 8);
    struct lowtide_send_wr wr = request(LOWTIDE_WR_SEND, &sge), *bad = NULL;
    MUST(lowtide_post_send(a->qp, &wr, &bad) == EINVAL && bad == &wr); // in RESET
    char *gone = mmap(NULL, LENGTH, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(!lowtide_reg_mr(a->pd, gone, LENGTH, LOWTIDE_ACCESS_LOCAL_WRITE) && errno == EFAULT);
    munmap(gone, LENGTH);
    MUST(!lowtide_reg_mr(a->pd, gone, LENGTH, 0) && errno == EFAULT);
    MUST(!lowtide_reg_mr(a->pd, a->memory, 0, 0) && errno == EINVAL);
    MUST(!lowtide_reg_mr(a->pd, a->memory, 1, LOWTIDE_ACCESS_REMOTE_WRITE) && errno == EINVAL);
    MUST(!lowtide_reg_mr(a->pd, a->memory, 1, 1 << 25) && errno == EINVAL);
}

static void sends(struct end *a, struct end *b)
{
    struct lowtide_cq *which;
    MUST(lowtide_get_cq_event(b->channel, &which, NULL) == EAGAIN);
    MUST(lowtide_req_notify_cq(b->cq, 0) == 0);
    for (int i = 0; i < 3; i++)
        receive(b, b->qp, 1000 * i, 1000);
    // One list: inline from memory that is not registered, two pieces, immediate data.
    char words[] = "three in one list";
    const uint32_t lengths[3] = {sizeof words, 7, 0};
    struct lowtide_sge in_line = {(uintptr_t)words, sizeof words, 0};
    struct lowtide_sge two[2] = {piece(a, 0, 3), piece(a, 100, 4)}, none[5] = {{0, 0, 0}};
    memcpy(a->memory, "low", 3);
    memcpy(a->memory + 100, "tide", 5);
    struct lowtide_send_wr list[4] = {request(LOWTIDE_WR_SEND, &in_line),
                                      request(LOWTIDE_WR_SEND, two),
                                      request(LOWTIDE_WR_SEND_WITH_IMM, NULL),
                                      request(LOWTIDE_WR_SEND, none)},
                           *bad = NULL;
    list[0].send_flags |= LOWTIDE_SEND_INLINE;
    list[1].num_sge = 2;
    list[2].imm_data = htonl(0x01020304);
    list[3].num_sge = 5;
    for (int i = 0; i < 3; i++)
        list[i].next = &list[i + 1];
    MUST(lowtide_post_send(a->qp, list, &bad) == EINVAL && bad == &list[3]);
    memset(words, 0, sizeof words);
    struct pollfd told = {lowtide_comp_channel_fd(b->channel), POLLIN, 0};
    MUST(poll(&told, 1, 60000) == 1);
    MUST(lowtide_get_cq_event(b->channel, &which, NULL) == 0 && which == b->cq);
    MUST(lowtide_ack_cq_events(which, 1) == 0);
    for (int i = 0; i < 3; i++) {
        struct lowtide_wc sent = completion(a), come = completion(b);
        MUST(sent.status == LOWTIDE_WC_SUCCESS && come.status == LOWTIDE_WC_SUCCESS);
        MUST(come.opcode == LOWTIDE_WC_RECV && come.wr_id == 1000u * i);
        MUST(come.byte_len == lengths[i]);
        MUST((come.wc_flags & LOWTIDE_WC_WITH_IMM) == (i == 2 ? LOWTIDE_WC_WITH_IMM : 0));
        MUST(i < 2 || ntohl(come.imm_data) == 0x01020304);
    }
    MUST(strcmp(b->memory, "three in one list") == 0);
    MUST(memcmp(b->memory + 1000, "lowtide", 7) == 0);
    // Other mistakes.
    struct lowtide_send_wr wr = request(99, NULL);
    MUST(lowtide_post_send(a->qp, &wr, NULL) == EINVAL);
    wr = request(LOWTIDE_WR_SEND, NULL);
    wr.num_sge = 1;
    MUST(lowtide_post_send(a->qp, &wr, NULL) == EINVAL);
    MUST(strstr(lowtide_error_message(), "sg_list"));
    wr.num_sge = -1;
    MUST(lowtide_post_send(a->qp, &wr, NULL) == EINVAL);
    // Receives: the queue has room for DEPTH.
    struct lowtide_recv_wr recvs[DEPTH + 1] = {{0}}, *full = NULL;
    for (int i = 0; i < DEPTH; i++)
        recvs[i].next = &recvs[i + 1];
    MUST(lowtide_post_recv(a->qp, recvs, &full) == ENOMEM && full == &recvs[DEPTH]);
}

static void one_sided(struct end *a, struct end *b)
{
    struct lowtide_sge sge = piece(a, 0, 8);
    struct lowtide_send_wr wr = request(LOWTIDE_WR_RDMA_WRITE, &sge);
    uint64_t *ours = (uint64_t *)a->memory, *theirs = (uint64_t *)b->memory;
    *ours = 40;
    wr.wr.rdma.remote_addr = (uintptr_t)theirs;
    wr.wr.rdma.rkey = lowtide_mr_rkey(b->mr);
    MUST(done(a, wr) == LOWTIDE_WC_SUCCESS && *theirs == 40);
    struct lowtide_send_wr atomic = request(LOWTIDE_WR_ATOMIC_FETCH_AND_ADD, &sge);
    atomic.wr.atomic.remote_addr = (uintptr_t)theirs;
    atomic.wr.atomic.rkey = lowtide_mr_rkey(b->mr);
    atomic.wr.atomic.compare_add = 2;
    MUST(done(a, atomic) == LOWTIDE_WC_SUCCESS && *ours == 40 && *theirs == 42);
    atomic.opcode = LOWTIDE_WR_ATOMIC_CMP_AND_SWP;
    atomic.wr.atomic.compare_add = 42;
    atomic.wr.atomic.swap = 7;
    MUST(done(a, atomic) == LOWTIDE_WC_SUCCESS && *ours == 42 && *theirs == 7);
    wr.opcode = LOWTIDE_WR_RDMA_READ;
    MUST(done(a, wr) == LOWTIDE_WC_SUCCESS && *ours == 7);
    *ours = 9;
    wr.opcode = LOWTIDE_WR_ATOMIC_WRITE;
    MUST(done(a, wr) == LOWTIDE_WC_SUCCESS && *theirs == 9);
    wr.opcode = LOWTIDE_WR_FLUSH;
    wr.num_sge = 0;
    wr.flush.length = 8;
    MUST(done(a, wr) == LOWTIDE_WC_SUCCESS);
}

// A type 2 window is bound, used, made invalid by the peer; a type 1 window bound by a call.
static void windows(struct end *a, struct end *b)
{
    struct lowtide_mw *mw = lowtide_alloc_mw(b->pd, LOWTIDE_MW_TYPE_2);
    MUST(mw);
    struct lowtide_send_wr bind = request(LOWTIDE_WR_BIND_MW, NULL);
    bind.bind_mw.mw = mw;
    bind.bind_mw.rkey = lowtide_inc_rkey(lowtide_mw_rkey(mw));
    bind.bind_mw.bind_info.mr = b->mr;
    bind.bind_mw.bind_info.addr = (uintptr_t)b->memory + 64;
    bind.bind_mw.bind_info.length = 64;
    bind.bind_mw.bind_info.mw_access_flags = LOWTIDE_ACCESS_REMOTE_WRITE;
    MUST(done(b, bind) == LOWTIDE_WC_SUCCESS && lowtide_mw_rkey(mw) == bind.bind_mw.rkey);
    MUST(lowtide_dereg_mr(b->mr) == EBUSY && strstr(lowtide_error_message(), "windows"));
    struct lowtide_sge sge = piece(a, 0, 8);
    struct lowtide_send_wr wr = request(LOWTIDE_WR_RDMA_WRITE, &sge);
    wr.wr.rdma.remote_addr = (uintptr_t)b->memory + 64;
    wr.wr.rdma.rkey = lowtide_mw_rkey(mw);
    MUST(done(a, wr) == LOWTIDE_WC_SUCCESS);
    receive(b, b->qp, 0, 8);
    wr.opcode = LOWTIDE_WR_SEND_WITH_INV;
    wr.invalidate_rkey = lowtide_mw_rkey(mw);
    MUST(done(a, wr) == LOWTIDE_WC_SUCCESS);
    struct lowtide_wc wc = completion(b);
    MUST(wc.wc_flags & LOWTIDE_WC_WITH_INV && wc.invalidated_rkey == lowtide_mw_rkey(mw));
    MUST(lowtide_dealloc_mw(mw) == 0);

    MUST((mw = lowtide_alloc_mw(b->pd, LOWTIDE_MW_TYPE_1)));
    struct lowtide_mw_bind call = {.wr_id = 5, .send_flags = LOWTIDE_SEND_SIGNALED};
    MUST(lowtide_bind_mw(b->qp, mw, NULL) == EINVAL);
    call.bind_info = bind.bind_mw.bind_info;
    uint32_t before = lowtide_mw_rkey(mw);
    MUST(lowtide_bind_mw(b->qp, mw, &call) == 0 && lowtide_mw_rkey(mw) != before);
    MUST(completion(b).status == LOWTIDE_WC_SUCCESS);
    wr.opcode = LOWTIDE_WR_RDMA_WRITE;
    wr.wr.rdma.rkey = lowtide_mw_rkey(mw);
    MUST(done(a, wr) == LOWTIDE_WC_SUCCESS && lowtide_dealloc_mw(mw) == 0);
}

static void datagrams(struct end *a, struct end *b)
{
    struct lowtide_qp *qps[2] = {queue_pair(a, LOWTIDE_QPT_UD, NULL),
                                 queue_pair(b, LOWTIDE_QPT_UD, NULL)};
    for (int i = 0; i < 2; i++) {
        to_init(qps[i], 1);
        struct lowtide_qp_attr attr = {.qp_state = LOWTIDE_QPS_RTR};
        MUST(lowtide_modify_qp(qps[i], &attr, LOWTIDE_QP_STATE) == 0);
        attr.qp_state = LOWTIDE_QPS_RTS;
        attr.sq_psn = lowtide_random_psn(qps[i]);
        MUST(lowtide_modify_qp(qps[i], &attr, LOWTIDE_QP_STATE | LOWTIDE_QP_SQ_PSN) == 0);
        receive(i ? b : a, qps[i], 0, 200);
    }
    struct lowtide_ah_attr path = {.port_num = 1, .grh = {.dgid = b->gid}};
    MUST(!lowtide_create_ah(a->pd, &path) && errno == EINVAL);
    path.is_global = 1;
    struct lowtide_ah *there = lowtide_create_ah(a->pd, &path);
    MUST(there);
    struct lowtide_sge sge = piece(a, 300, 100);
    struct lowtide_send_wr wr = request(LOWTIDE_WR_SEND, &sge);
    MUST(lowtide_post_send(qps[0], &wr, NULL) == EINVAL); // no address handle
    wr.wr.ud.ah = there;
    wr.wr.ud.remote_qpn = lowtide_qp_num(qps[1]);
    wr.wr.ud.remote_qkey = QKEY;
    MUST(lowtide_post_send(qps[0], &wr, NULL) == 0);
    MUST(completion(a).status == LOWTIDE_WC_SUCCESS);
    struct lowtide_wc wc = completion(b);
    MUST(wc.byte_len == 140 && wc.wc_flags & LOWTIDE_WC_GRH);
    MUST(wc.src_qp == lowtide_qp_num(qps[0]));
    struct lowtide_ah *back = lowtide_create_ah_from_grh(b->pd, b->memory);
    MUST(back && !lowtide_create_ah_from_grh(b->pd, b->memory + 100) && errno == EINVAL);
    sge = piece(b, 300, 50);
    wr.wr.ud.ah = back;
    wr.wr.ud.remote_qpn = wc.src_qp;
    MUST(lowtide_post_send(qps[1], &wr, NULL) == 0);
    MUST(completion(b).status == LOWTIDE_WC_SUCCESS && completion(a).byte_len == 90);
    MUST(lowtide_destroy_ah(there) == 0 && lowtide_destroy_ah(back) == 0);
    MUST(lowtide_destroy_qp(qps[0]) == 0 && lowtide_destroy_qp(qps[1]) == 0);
}

// A shared receive queue tells when it runs low; a completion queue that overflows breaks.
static void events(struct end *a, struct end *b)
{
    struct lowtide_async_event event;
    MUST(lowtide_get_async_event(b->context, &event) == EAGAIN);
    struct lowtide_srq_init_attr init = {.srq_context = b, .attr = {.max_wr = 8, .max_sge = 1}};
    struct lowtide_srq *srq = lowtide_create_srq(b->pd, &init);
    MUST(srq && lowtide_srq_context(srq) == b);
    struct lowtide_srq_attr attr = {.srq_limit = 9};
    MUST(lowtide_modify_srq(srq, &attr, LOWTIDE_SRQ_MAX_WR) == EOPNOTSUPP);
    MUST(lowtide_modify_srq(srq, &attr, LOWTIDE_SRQ_LIMIT) == EINVAL);
    attr.srq_limit = 2;
    MUST(lowtide_modify_srq(srq, &attr, LOWTIDE_SRQ_LIMIT) == 0);
    MUST(lowtide_query_srq(srq, &attr) == 0 && attr.max_wr == 8 && attr.srq_limit == 2);
    struct lowtide_qp *old[2] = {a->qp, b->qp};
    struct lowtide_cq *shallow = lowtide_create_cq(b->context, 1, NULL, NULL, 0), *cq = b->cq;
    MUST(shallow && lowtide_resize_cq(shallow, 0) == EINVAL && lowtide_resize_cq(shallow, 1) == 0);
    a->qp = queue_pair(a, LOWTIDE_QPT_RC, NULL);
    b->cq = shallow;
    b->qp = queue_pair(b, LOWTIDE_QPT_RC, srq);
    to_init(a->qp, 0), to_init(b->qp, 0);
    to_rts(a->qp, b->qp, b->gid), to_rts(b->qp, a->qp, a->gid);
    MUST(lowtide_destroy_srq(srq) == EBUSY);
    struct lowtide_recv_wr recvs[3] = {{.next = &recvs[1]}, {.next = &recvs[2]}, {0}};
    MUST(lowtide_post_srq_recv(srq, recvs, NULL) == 0);
    MUST(lowtide_post_recv(b->qp, recvs, NULL) == EINVAL);
    struct lowtide_send_wr wr = request(LOWTIDE_WR_SEND, NULL);
    MUST(lowtide_post_send(a->qp, &wr, NULL) == 0 && lowtide_post_send(a->qp, &wr, NULL) == 0);
    int seen = 0;
    while (seen != 7) {
        struct pollfd fd = {lowtide_async_fd(b->context), POLLIN, 0};
        MUST(poll(&fd, 1, 60000) == 1 && lowtide_get_async_event(b->context, &event) == 0);
        switch (event.event_type) {
        case LOWTIDE_EVENT_SRQ_LIMIT_REACHED: MUST(event.element.srq == srq); seen |= 1; break;
        case LOWTIDE_EVENT_CQ_ERR: MUST(event.element.cq == shallow); seen |= 2; break;
        case LOWTIDE_EVENT_QP_FATAL: MUST(event.element.qp == b->qp); seen |= 4; break;
        default: MUST(event.event_type == LOWTIDE_EVENT_QP_LAST_WQE_REACHED);
        }
        MUST(lowtide_ack_async_event(&event) == 0);
    }
    struct lowtide_wc wc[2];
    MUST(lowtide_poll_cq(shallow, 2, wc) == 1 && lowtide_poll_cq(shallow, 2, wc) == -ENOMEM);
    MUST(lowtide_destroy_qp(b->qp) == 0 && lowtide_destroy_qp(a->qp) == 0);
    MUST(lowtide_destroy_srq(srq) == 0 && lowtide_destroy_cq(shallow) == 0);
    while (lowtide_poll_cq(a->cq, 1, wc) == 1)
        ;
    a->qp = old[0], b->qp = old[1], b->cq = cq;
}

static struct lowtide_cm_event *next(struct lowtide_cm_channel *channel, uint32_t type)
{
    struct lowtide_cm_event *event;
    MUST(lowtide_cm_get_event(channel, &event) == 0);
    MUST(event->event == type);
    return event;
}

// Rejected once, then connected; the queue pair belongs to the connection until the id is
// destroyed.
static void connections(struct end *a, struct end *b)
{
    struct lowtide_cm_channel *channels[2] = {lowtide_cm_create_channel(a->context),
                                              lowtide_cm_create_channel(b->context)};
    MUST(channels[0] && channels[1]);
    MUST(!lowtide_cm_listen(channels[1], 1, 7, NULL) && errno == EINVAL);
    struct lowtide_cm_id *listener = lowtide_cm_listen(channels[1], LOWTIDE_PS_TCP, 7, b);
    MUST(listener && lowtide_cm_context(listener) == b);
    MUST(!lowtide_cm_listen(channels[1], LOWTIDE_PS_TCP, 7, b) && errno == EADDRINUSE);
    struct lowtide_qp *qps[2] = {queue_pair(a, LOWTIDE_QPT_RC, NULL),
                                 queue_pair(b, LOWTIDE_QPT_RC, NULL)};
    struct lowtide_qp *datagram = queue_pair(a, LOWTIDE_QPT_UD, NULL);
    struct lowtide_conn_param param = {.private_data = "who", .private_data_len = 4};
    param.responder_resources = param.initiator_depth = 4;
    param.retry_count = param.rnr_retry_count = 7;
    param.ack_timeout = 14;
    MUST(!lowtide_cm_connect(channels[0], &b->gid, 0, 0x0106, 7, qps[0], &param, a));
    MUST(errno == EINVAL && strstr(lowtide_error_message(), "Init"));
    MUST(!lowtide_cm_connect(channels[0], &b->gid, 0, 0x0106, 7, datagram, &param, a));
    MUST(errno == EINVAL && lowtide_destroy_qp(datagram) == 0);
    to_init(qps[0], 0), to_init(qps[1], 0);
    for (int round = 0; round < 2; round++) {
        struct lowtide_cm_id *ours
            = lowtide_cm_connect(channels[0], &b->gid, 0, LOWTIDE_PS_TCP, 7, qps[0], &param, a);
        MUST(ours && lowtide_destroy_qp(qps[0]) == EBUSY);
        MUST(!lowtide_cm_connect(channels[0], &b->gid, 0, 0x0106, 7, qps[0], &param, a));
        MUST(errno == EBUSY);
        struct lowtide_cm_event *event = next(channels[1], LOWTIDE_CM_EVENT_CONNECT_REQUEST);
        struct lowtide_cm_id *theirs = event->id;
        MUST(event->listen_id == listener && lowtide_cm_context(theirs) == b);
        MUST(event->private_data_len >= 4 && strcmp(event->private_data, "who") == 0);
        MUST(memcmp(&event->peer, &a->gid, sizeof a->gid) == 0);
        MUST(lowtide_cm_ack_event(event) == 0 && lowtide_cm_disconnect(theirs) == EINVAL);
        if (round == 0) {
            MUST(lowtide_cm_reject(theirs, "no", 3) == 0);
            MUST(lowtide_cm_accept(theirs, qps[1], NULL) == EINVAL);
            event = next(channels[0], LOWTIDE_CM_EVENT_REJECTED);
            MUST(event->status == 28 && strcmp(event->private_data, "no") == 0);
            lowtide_cm_ack_event(event);
        } else {
            MUST(lowtide_cm_accept(theirs, qps[1], &param) == 0);
            lowtide_cm_ack_event(next(channels[0], LOWTIDE_CM_EVENT_ESTABLISHED));
            lowtide_cm_ack_event(next(channels[1], LOWTIDE_CM_EVENT_ESTABLISHED));
            struct lowtide_qp_attr attr;
            MUST(lowtide_query_qp(qps[1], &attr, 0, NULL) == 0);
            MUST(attr.qp_state == LOWTIDE_QPS_RTS && attr.dest_qp_num == lowtide_qp_num(qps[0]));
            MUST(lowtide_cm_disconnect(ours) == 0);
            lowtide_cm_ack_event(next(channels[1], LOWTIDE_CM_EVENT_DISCONNECTED));
        }
        MUST(lowtide_cm_destroy_id(ours) == 0 && lowtide_cm_destroy_id(theirs) == 0);
    }
    MUST(lowtide_cm_destroy_channel(channels[1]) == EBUSY && lowtide_cm_destroy_id(listener) == 0);
    MUST(lowtide_cm_destroy_channel(channels[0]) == 0 && !lowtide_cm_destroy_channel(channels[1]));
    MUST(lowtide_destroy_qp(qps[0]) == 0 && lowtide_destroy_qp(qps[1]) == 0);
}

// A queue pair talks to itself, and the packets are in a file; who reads it is the caller's.
static void captures(const char *address, const char *path)
{
    MUST(!lowtide_open_captured_device(address, 0, NULL) && errno == EINVAL);
    MUST(!lowtide_open_captured_device(address, 0, "/nowhere/at.pcap") && errno == ENOENT);
    struct end end = open_end(lowtide_open_captured_device(address, 0, path), address);
    to_init(end.qp, 0);
    to_rts(end.qp, end.qp, end.gid);
    receive(&end, end.qp, 100, 8);
    struct lowtide_sge sge = piece(&end, 0, 8);
    struct lowtide_send_wr wr = request(LOWTIDE_WR_SEND, &sge);
    MUST(lowtide_post_send(end.qp, &wr, NULL) == 0);
    for (int i = 0; i < 2; i++)
        MUST(completion(&end).status == LOWTIDE_WC_SUCCESS);
    close_end(&end);
}

int main(int argc, char **argv)
{
    MUST(argc == 4 && lowtide_version() > 0 && strcmp(lowtide_error_message(), "no error") == 0);
    struct end a = open_end(lowtide_open_device(argv[1], LOWTIDE_ROCE_PORT), argv[1]);
    struct end b = open_end(lowtide_open_device(argv[2], LOWTIDE_ROCE_PORT), argv[2]);
    MUST(lowtide_udp_port(a.context) == LOWTIDE_ROCE_PORT);
    int fds[2] = {lowtide_comp_channel_fd(b.channel), lowtide_async_fd(b.context)};
    for (int i = 0; i < 2; i++)
        MUST(fcntl(fds[i], F_SETFL, fcntl(fds[i], F_GETFL) | O_NONBLOCK) == 0);
    refuses_null(&a);
    refuses_misuse(&a, argv[1]);
    to_init(a.qp, 0), to_init(b.qp, 0);
    to_rts(a.qp, b.qp, b.gid), to_rts(b.qp, a.qp, a.gid);
    sends(&a, &b);
    one_sided(&a, &b);
    windows(&a, &b);
    datagrams(&a, &b);
    events(&a, &b);
    connections(&a, &b);
    captures(argv[1], argv[3]);
    struct lowtide_counters seen;
    MUST(lowtide_query_counters(a.context, &seen) == 0 && seen.sent_pkts > 0);
    MUST(seen.rx_malformed == 0 && seen.rx_bad_icrc == 0);
    close_end(&a);
    close_end(&b);
    puts("all of it holds");
    return 0;
}
