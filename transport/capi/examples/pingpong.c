// A ping-pong between two processes: SEND and RECV, connected by the connection manager, asleep
// while nothing comes.
//
//   cc pingpong.c $(pkg-config --cflags --libs lowtide) -o pingpong
//   ./pingpong 127.0.0.2 &                the server's own address; it says when it listens
//   ./pingpong 127.0.0.3 127.0.0.2        the client's own, and the server's
#include <lowtide.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROUNDS = 1000, LENGTH = 64, PORT = 7471 };

static char memory[2][LENGTH]; // what is sent, what comes
static struct lowtide_mr *mr;
static struct lowtide_comp_channel *channel;
static struct lowtide_cq *cq;
static struct lowtide_qp *qp;

static void check(int is_good, const char *what)
{
    if (!is_good) {
        fprintf(stderr, "%s: %s\n", what, lowtide_error_message());
        exit(1);
    }
}

static void make_queue_pair(struct lowtide_context *context)
{
    struct lowtide_pd *pd = lowtide_alloc_pd(context);
    mr = lowtide_reg_mr(pd, memory, sizeof memory, LOWTIDE_ACCESS_LOCAL_WRITE);
    channel = lowtide_create_comp_channel(context);
    cq = lowtide_create_cq(context, 16, NULL, channel, 0);
    struct lowtide_qp_init_attr init = {.send_cq = cq, .recv_cq = cq, .qp_type = LOWTIDE_QPT_RC};
    init.cap.max_send_wr = init.cap.max_recv_wr = 4;
    init.cap.max_send_sge = init.cap.max_recv_sge = 1;
    init.sq_sig_all = 1;
    qp = lowtide_create_qp(pd, &init);
    check(mr && channel && qp, "memory region, channel, queue pair");
    struct lowtide_qp_attr attr = {.qp_state = LOWTIDE_QPS_INIT, .port_num = 1};
    int mask = LOWTIDE_QP_STATE | LOWTIDE_QP_PKEY_INDEX | LOWTIDE_QP_PORT | LOWTIDE_QP_ACCESS_FLAGS;
    check(!lowtide_modify_qp(qp, &attr, mask), "to INIT");
}

static void post(int is_receive)
{
    struct lowtide_sge sge = {(uintptr_t)memory[is_receive], LENGTH, lowtide_mr_lkey(mr)};
    struct lowtide_recv_wr recv = {.sg_list = &sge, .num_sge = 1};
    struct lowtide_send_wr send = {.sg_list = &sge, .num_sge = 1, .opcode = LOWTIDE_WR_SEND};
    check(!(is_receive ? lowtide_post_recv(qp, &recv, NULL) : lowtide_post_send(qp, &send, NULL)),
          "post");
}

// Sleeps until `sends` sends and `receives` receives have completed.
static void await(int sends, int receives)
{
    while (sends + receives > 0) {
        struct lowtide_wc wc;
        lowtide_req_notify_cq(cq, 0);
        int count = lowtide_poll_cq(cq, 1, &wc);
        check(count >= 0, "poll");
        if (count == 0) {
            check(!lowtide_get_cq_event(channel, &cq, NULL), "completion event");
            lowtide_ack_cq_events(cq, 1);
            continue;
        }
        check(wc.status == LOWTIDE_WC_SUCCESS, lowtide_wc_status_str(wc.status));
        *(wc.opcode & LOWTIDE_WC_RECV ? &receives : &sends) -= 1;
    }
}

// The next event of the connection manager, which must be `type`; the id that it is about.
static struct lowtide_cm_id *next(struct lowtide_cm_channel *events, uint32_t type)
{
    struct lowtide_cm_event *event;
    check(!lowtide_cm_get_event(events, &event), "connection event");
    struct lowtide_cm_id *id = event->id;
    check(event->event == type, "another event came");
    lowtide_cm_ack_event(event);
    return id;
}

int main(int argc, char **argv)
{
    struct lowtide_gid server;
    const char *own = argc > 1 ? argv[1] : NULL;
    struct lowtide_context *context = lowtide_open_device(own, LOWTIDE_ROCE_PORT);
    check(context != NULL, "device");
    struct lowtide_cm_channel *events = lowtide_cm_create_channel(context);
    make_queue_pair(context);
    post(1);
    if (argc > 2)
        check(!lowtide_parse_gid(argv[2], &server)
                  && lowtide_cm_connect(events, &server, 0, LOWTIDE_PS_TCP, PORT, qp, NULL, NULL),
              "connect");
    else {
        check(lowtide_cm_listen(events, LOWTIDE_PS_TCP, PORT, NULL) != NULL, "listen");
        puts("listening");
        fflush(stdout);
        struct lowtide_cm_id *request = next(events, LOWTIDE_CM_EVENT_CONNECT_REQUEST);
        check(!lowtide_cm_accept(request, qp, NULL), "accept");
    }
    struct lowtide_cm_id *connection = next(events, LOWTIDE_CM_EVENT_ESTABLISHED);
    for (int round = 0; round < ROUNDS; round++) {
        snprintf(memory[0], LENGTH, "ball %d", round);
        if (argc > 2)
            post(0);
        await(argc > 2, 1);
        check(argc == 2 || strcmp(memory[0], memory[1]) == 0, "another ball came back");
        memcpy(memory[0], memory[1], LENGTH);
        post(1);
        if (argc == 2) {
            post(0);
            await(1, 0);
        }
    }
    printf("%d rounds\n", ROUNDS);
    check(!lowtide_cm_disconnect(connection), "disconnect");
    next(events, LOWTIDE_CM_EVENT_DISCONNECTED);
    return 0;
}
