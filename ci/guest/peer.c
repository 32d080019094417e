/*
 * One end of ci/guest/matrix.job: the kernel's rxe through libibverbs. The other end, Lowtide's,
 * tells it over a Unix socket what to do, cell by cell; see tools/peers/src/bin/matrix for the
 * conversation.
 *
 *   peer DEVICE GID-INDEX-OF-IPV4 GID-INDEX-OF-IPV6 SOCKET
 *
 * Every byte that arrives is compared with what the other end was told to send.
 */
#include <arpa/inet.h>
#include <infiniband/verbs.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { LIMIT = 8 << 20, GRH = 40, PATIENCE = 20, QKEY = 0x11111111 };
enum { RIGHTS = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ |
                IBV_ACCESS_REMOTE_ATOMIC | IBV_ACCESS_MW_BIND };

struct cell {
    char family, role, kind, op[16]; /* kind: c for UC, d for UD, else RC */
    int mtu, rounds, timeout, retry, sizes, size[32];
};

static struct ibv_context *context;
static struct ibv_pd *pd;
static struct ibv_comp_channel *channel;
static struct ibv_cq *cq;
static struct ibv_mr *mr;
static struct ibv_ah *ah;
static uint8_t *area;
static int control, gid_index[2];
static char words[256]; /* why the cell failed */
static struct { unsigned qpn, psn, rkey; uint64_t va; union ibv_gid gid; } theirs;

static int fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(words, sizeof words, format, args);
    va_end(args);
    return -1;
}

static int say(const char *format, ...)
{
    char line[512];
    va_list args;
    va_start(args, format);
    int length = vsnprintf(line, sizeof line, format, args);
    va_end(args);
    return write(control, line, length) == length ? 0 : fail("the control socket is closed");
}

static int hear(char *line, int size)
{
    int length = 0;
    line[0] = 0;
    while (length < size - 1) {
        if (read(control, line + length, 1) != 1)
            return fail("the control socket is closed");
        if (line[length] == '\n')
            break;
        length++;
    }
    line[length] = 0;
    return strncmp(line, "fail", 4) ? 0 : fail("the other end gave up");
}

static int expect(const char *word)
{
    char line[512];
    if (hear(line, sizeof line))
        return -1;
    return strcmp(line, word) ? fail("heard %s, not %s", line, word) : 0;
}

/* Sleeps until a completion comes, or the other end gives up. */
static int doze(void)
{
    struct pollfd fds[] = { { channel->fd, POLLIN, 0 }, { control, POLLIN, 0 } };
    void *user;
    struct ibv_cq *of;
    char first;
    int n = poll(fds, 2, PATIENCE * 1000);
    if (n > 0 && !fds[0].revents) {
        if (recv(control, &first, 1, MSG_PEEK) != 1 || first == 'f')
            return fail("the other end gave up");
        /* It is only ahead of us. */
        n = poll(fds, 1, PATIENCE * 1000);
    }
    if (n <= 0)
        return fail("no completion for %d s", PATIENCE);
    if (ibv_get_cq_event(channel, &of, &user))
        return fail("ibv_get_cq_event");
    ibv_ack_cq_events(of, 1);
    return 0;
}

/* The next completion, which must be a good one of this kind. */
static int await(enum ibv_wc_opcode opcode, struct ibv_wc *wc)
{
    int n;
    while (!(n = ibv_poll_cq(cq, 1, wc))) {
        if (ibv_req_notify_cq(cq, 0))
            return fail("ibv_req_notify_cq");
        /* What came just before asks for no event. */
        if ((n = ibv_poll_cq(cq, 1, wc)))
            break;
        if (doze())
            return -1;
    }
    if (n < 0)
        return fail("ibv_poll_cq");
    if (wc->status != IBV_WC_SUCCESS)
        return fail("completion: %s", ibv_wc_status_str(wc->status));
    return wc->opcode == opcode ? 0 : fail("completion of kind %d, not %d", wc->opcode, opcode);
}

static uint8_t pattern(int i, int seed) { return i * 31 + i / 256 + seed; }

static void fill(uint8_t *at, int size, int seed)
{
    for (int i = 0; i < size; i++)
        at[i] = pattern(i, seed);
}

static int check(const uint8_t *at, int size, int seed)
{
    for (int i = 0; i < size; i++)
        if (at[i] != pattern(i, seed))
            return fail("byte %d of %d is %#x, not %#x", i, size, at[i], pattern(i, seed));
    return 0;
}

/* The same of what an unreliable WRITE leaves, which may come after the word that it was sent. */
static int check_late(const uint8_t *at, int size, int seed)
{
    for (int i = 0; i < 1000 && check(at, size, seed); i++)
        usleep(1000);
    return check(at, size, seed);
}

static int post_recv(struct ibv_qp *qp, int size)
{
    struct ibv_sge sge = { (uintptr_t)area, size, mr->lkey };
    struct ibv_recv_wr *bad, wr = { .sg_list = &sge, .num_sge = size ? 1 : 0 };
    return ibv_post_recv(qp, &wr, &bad) ? fail("ibv_post_recv") : 0;
}

static int post_send(struct ibv_qp *qp, enum ibv_wr_opcode opcode, int size, int round)
{
    struct ibv_sge sge = { (uintptr_t)area, size, mr->lkey };
    struct ibv_send_wr *bad, wr = { .sg_list = &sge, .num_sge = size ? 1 : 0, .opcode = opcode,
                                    .send_flags = IBV_SEND_SIGNALED, .imm_data = htonl(round) };
    if (qp->qp_type == IBV_QPT_UD) {
        wr.wr.ud.ah = ah;
        wr.wr.ud.remote_qpn = theirs.qpn;
        wr.wr.ud.remote_qkey = QKEY;
    } else if (opcode == IBV_WR_SEND_WITH_INV) {
        wr.invalidate_rkey = theirs.rkey;
    } else if (opcode == IBV_WR_ATOMIC_CMP_AND_SWP || opcode == IBV_WR_ATOMIC_FETCH_AND_ADD) {
        wr.wr.atomic.remote_addr = theirs.va;
        wr.wr.atomic.rkey = theirs.rkey;
        wr.wr.atomic.compare_add = opcode == IBV_WR_ATOMIC_CMP_AND_SWP ? round : 5;
        wr.wr.atomic.swap = round + 3;
    } else {
        wr.wr.rdma.remote_addr = theirs.va;
        wr.wr.rdma.rkey = theirs.rkey;
    }
    return ibv_post_send(qp, &wr, &bad) ? fail("ibv_post_send") : 0;
}

static int is(const struct cell *c, const char *op) { return !strcmp(c->op, op); }
static int is_ud(const struct cell *c) { return c->kind == 'd'; }
static int is_rc(const struct cell *c) { return !c->kind; }
static int is_atomic(const struct cell *c) { return is(c, "swap") || is(c, "add"); }
static int has_imm(const struct cell *c) { return strstr(c->op, "imm") != NULL; }

/* We ask; what comes back is looked at here, what arrives there by the other end. */
static int initiate(const struct cell *c, struct ibv_qp *qp, int size, int round)
{
    static const struct {
        const char *op;
        enum ibv_wr_opcode opcode;
        enum ibv_wc_opcode done;
    } ops[] = {
        { "send", IBV_WR_SEND, IBV_WC_SEND }, { "rnr", IBV_WR_SEND, IBV_WC_SEND },
        { "send-imm", IBV_WR_SEND_WITH_IMM, IBV_WC_SEND },
        { "send-inv", IBV_WR_SEND_WITH_INV, IBV_WC_SEND },
        { "write", IBV_WR_RDMA_WRITE, IBV_WC_RDMA_WRITE },
        { "write-imm", IBV_WR_RDMA_WRITE_WITH_IMM, IBV_WC_RDMA_WRITE },
        { "read", IBV_WR_RDMA_READ, IBV_WC_RDMA_READ },
        { "swap", IBV_WR_ATOMIC_CMP_AND_SWP, IBV_WC_COMP_SWAP },
        { "add", IBV_WR_ATOMIC_FETCH_AND_ADD, IBV_WC_FETCH_ADD },
    };
    struct ibv_wc wc;
    unsigned i = 0;
    while (i < sizeof ops / sizeof *ops && !is(c, ops[i].op))
        i++;
    if (i == sizeof ops / sizeof *ops)
        return fail("no such operation: %s", c->op);
    if (is(c, "read") || is_atomic(c))
        memset(area, 0xEE, size);
    else
        fill(area, size, size + round);
    if (is(c, "send-inv")) {
        char line[64];
        if (hear(line, sizeof line) || sscanf(line, "go %x", &theirs.rkey) != 1)
            return fail("no key to invalidate");
    } else if (expect("go")) {
        return -1;
    }
    if (post_send(qp, ops[i].opcode, size, round) || await(ops[i].done, &wc))
        return -1;
    if (is(c, "read") && check(area, size, size + round))
        return -1;
    uint64_t old;
    memcpy(&old, area, 8);
    if (is_atomic(c) && old != (uint64_t)round)
        return fail("the word was %llu, not %d", (unsigned long long)old, round);
    return say("done\n") || expect("ok");
}

/* A window of the second type over the whole region: the key to invalidate. */
static int bind_window(struct ibv_qp *qp, struct ibv_mw *mw, unsigned *key)
{
    struct ibv_wc wc;
    *key = ibv_inc_rkey(*key);
    struct ibv_send_wr *bad, wr = { .opcode = IBV_WR_BIND_MW, .send_flags = IBV_SEND_SIGNALED };
    wr.bind_mw.mw = mw;
    wr.bind_mw.rkey = *key;
    wr.bind_mw.bind_info = (struct ibv_mw_bind_info){ mr, (uintptr_t)area, LIMIT,
                                                      IBV_ACCESS_REMOTE_WRITE };
    if (ibv_post_send(qp, &wr, &bad))
        return fail("binding a window");
    mw->rkey = *key;
    return await(IBV_WC_BIND_MW, &wc);
}

static int serve(const struct cell *c, struct ibv_qp *qp, struct ibv_mw *mw, int size, int round)
{
    static unsigned key;
    struct ibv_wc wc = { 0 };
    int head = is_ud(c) ? GRH : 0;
    int takes = !strncmp(c->op, "send", 4) || is(c, "rnr") || is(c, "write-imm");
    uint64_t word = round;
    if (mw && !round)
        key = mw->rkey;
    if (is(c, "read"))
        fill(area, size, size + round);
    else
        memset(area, 0xEE, head + size);
    if (is_atomic(c))
        memcpy(area, &word, 8);
    if (mw && bind_window(qp, mw, &key))
        return -1;
    /* The receive is posted when a request has found none, as the other end sees by its counter. */
    if (is(c, "rnr") && (say("go\n") || expect("refused")))
        return -1;
    if (takes && post_recv(qp, is(c, "write-imm") ? 0 : head + size))
        return -1;
    if (mw ? say("go %x\n", key) : is(c, "rnr") ? 0 : say("go\n"))
        return -1;
    if (takes && await(is(c, "write-imm") ? IBV_WC_RECV_RDMA_WITH_IMM : IBV_WC_RECV, &wc))
        return -1;
    if (takes && wc.byte_len != (unsigned)(head + size))
        return fail("%u bytes came, not %d", wc.byte_len, head + size);
    if (has_imm(c) && (!(wc.wc_flags & IBV_WC_WITH_IMM) || wc.imm_data != htonl(round)))
        return fail("immediate data %#x, not %#x", ntohl(wc.imm_data), round);
    /* The kernel sets the bit of IB_WC_WITH_INVALIDATE, which libibverbs calls IP_CSUM_OK. */
    int is_inv = wc.wc_flags & (IBV_WC_WITH_INV | IBV_WC_IP_CSUM_OK);
    if (mw && (!is_inv || wc.invalidated_rkey != key))
        return fail("key %#x invalidated, not %#x", wc.invalidated_rkey, key);
    if (expect("done"))
        return -1;
    memcpy(&word, area, 8);
    if (is_atomic(c) && word != (uint64_t)round + (is(c, "swap") ? 3 : 5))
        return fail("the word became %llu", (unsigned long long)word);
    int is_late = is(c, "write") && !is_rc(c);
    if (!is(c, "read") && !is_atomic(c)
        && (is_late ? check_late : check)(area + head, size, size + round))
        return -1;
    return say("ok\n");
}

/* Tells where we are, learns where the other end is, and goes to RTS. */
static int connect_qp(const struct cell *c, struct ibv_qp *qp)
{
    int index = gid_index[c->family == '6'];
    char line[256], text[INET6_ADDRSTRLEN];
    union ibv_gid gid;
    unsigned psn = lrand48() & 0xFFFFFF;
    struct ibv_qp_attr attr = { .qp_state = IBV_QPS_INIT, .port_num = 1, .qkey = QKEY,
                                .qp_access_flags = RIGHTS & ~IBV_ACCESS_MW_BIND };
    int mask = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT;
    if (ibv_modify_qp(qp, &attr, mask | (is_ud(c) ? IBV_QP_QKEY : IBV_QP_ACCESS_FLAGS)))
        return fail("INIT");
    if (ibv_query_gid(context, 1, index, &gid) || !inet_ntop(AF_INET6, &gid, text, sizeof text))
        return fail("no GID %d", index);
    unsigned long long va = (uintptr_t)area;
    if (say("at %x %x %llx %x %s\n", qp->qp_num, psn, va, mr->rkey, text))
        return -1;
    if (hear(line, sizeof line))
        return -1;
    if (sscanf(line, "at %x %x %llx %x %45s", &theirs.qpn, &theirs.psn, &va, &theirs.rkey,
               text) != 5
        || inet_pton(AF_INET6, text, &theirs.gid) != 1)
        return fail("heard %s", line);
    theirs.va = va;
    struct ibv_ah_attr path = { .grh = { .dgid = theirs.gid, .sgid_index = index, .hop_limit = 64 },
                                .is_global = 1, .port_num = 1 };
    attr = (struct ibv_qp_attr){
        .qp_state = IBV_QPS_RTR, .dest_qp_num = theirs.qpn, .ah_attr = path,
        .path_mtu = c->mtu == 256 ? IBV_MTU_256 : c->mtu == 512 ? IBV_MTU_512 : c->mtu == 1024 ?
                    IBV_MTU_1024 : c->mtu == 2048 ? IBV_MTU_2048 : IBV_MTU_4096,
        .rq_psn = theirs.psn, .max_dest_rd_atomic = 8, .min_rnr_timer = 12 };
    mask = IBV_QP_STATE;
    if (!is_ud(c))
        mask |= IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN;
    if (is_rc(c))
        mask |= IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER;
    if (ibv_modify_qp(qp, &attr, mask))
        return fail("RTR");
    attr = (struct ibv_qp_attr){ .qp_state = IBV_QPS_RTS, .sq_psn = psn, .timeout = c->timeout,
                                 .retry_cnt = c->retry, .rnr_retry = 7, .max_rd_atomic = 8 };
    mask = IBV_QP_STATE | IBV_QP_SQ_PSN;
    if (is_rc(c))
        mask |= IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC;
    if (ibv_modify_qp(qp, &attr, mask))
        return fail("RTS");
    if (is_ud(c) && !(ah = ibv_create_ah(pd, &path)))
        return fail("no address handle");
    return say("up\n") || expect("up");
}

static int run(const struct cell *c)
{
    /* Of its own, lest a completion of a failed cell is taken for one of this. */
    if (!(cq = ibv_create_cq(context, 64, NULL, channel, 0)))
        return fail("no completion queue");
    struct ibv_qp_init_attr init = { .send_cq = cq, .recv_cq = cq, .cap = { 8, 8, 1, 1, 0 },
                                     .qp_type = is_ud(c) ? IBV_QPT_UD :
                                                is_rc(c) ? IBV_QPT_RC : IBV_QPT_UC };
    struct ibv_qp *qp = ibv_create_qp(pd, &init);
    struct ibv_mw *mw = NULL;
    if (!qp)
        return fail("no queue pair");
    if (is(c, "send-inv") && c->role == 't')
        mw = ibv_alloc_mw(pd, IBV_MW_TYPE_2);
    int status = connect_qp(c, qp), round = 0;
    for (int i = 0; !status && i < c->sizes; i++)
        for (int n = 0; !status && n < c->rounds; n++, round++)
            status = c->role == 'i' ? initiate(c, qp, c->size[i], round)
                                    : serve(c, qp, mw, c->size[i], round);
    if (mw)
        ibv_dealloc_mw(mw);
    if (ah)
        ibv_destroy_ah(ah);
    ah = NULL;
    ibv_destroy_qp(qp);
    ibv_destroy_cq(cq);
    return status;
}

/* cell FAMILY ROLE OPERATION MTU ROUNDS TIMEOUT RETRY SIZE… */
static int parse(const char *line, struct cell *c)
{
    int used = 0, n;
    memset(c, 0, sizeof *c);
    if (sscanf(line, "cell %c %c %15s %d %d %d %d%n", &c->family, &c->role, c->op, &c->mtu,
               &c->rounds, &c->timeout, &c->retry, &used) != 7)
        return -1;
    if (c->op[0] == 'u' && c->op[2] == '-') {
        c->kind = c->op[1];
        memmove(c->op, c->op + 3, sizeof c->op - 3);
    }
    for (line += used; c->sizes < 32 && sscanf(line, "%d%n", &c->size[c->sizes], &n) == 1; line += n)
        if (c->size[c->sizes++] > LIMIT)
            return -1;
    return 0;
}

static int listen_on(const char *path)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    unlink(path);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address)
        || listen(listener, 1))
        return -1;
    return accept(listener, NULL, NULL);
}

static int open_device(const char *name)
{
    struct ibv_device **list = ibv_get_device_list(NULL);
    for (int i = 0; list && list[i]; i++)
        if (!strcmp(ibv_get_device_name(list[i]), name))
            context = ibv_open_device(list[i]);
    if (!context || !(pd = ibv_alloc_pd(context)) || !(channel = ibv_create_comp_channel(context)))
        return -1;
    area = aligned_alloc(4096, LIMIT + 4096);
    return area && (mr = ibv_reg_mr(pd, area, LIMIT + 4096, RIGHTS)) ? 0 : -1;
}

int main(int argc, char **argv)
{
    char line[512];
    struct cell c;
    if (argc != 5 || open_device(argv[1])) {
        fprintf(stderr, "peer DEVICE GID4 GID6 SOCKET: no such device, or no memory\n");
        return 2;
    }
    srand48(time(NULL) ^ getpid());
    gid_index[0] = atoi(argv[2]);
    gid_index[1] = atoi(argv[3]);
    if ((control = listen_on(argv[4])) < 0) {
        perror(argv[4]);
        return 2;
    }
    while (!hear(line, sizeof line)) {
        if (parse(line, &c))
            return 2;
        if (run(&c))
            say("fail %s\n", words);
        /* Whatever is under way ends here, on both ends. */
        if (say("end\n"))
            return 1;
        do {
            if (hear(line, sizeof line) && strncmp(line, "fail", 4))
                return 1;
        } while (strcmp(line, "end"));
    }
    return 0;
}
