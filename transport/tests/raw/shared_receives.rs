//! Receives that several queue pairs share.

use super::*;

fn shared(pd: &ProtectionDomain) -> SharedReceiveQueue {
    let attr = SrqAttr {
        max_wr: 8,
        max_sge: 2,
        limit: 0,
    };
    pd.shared_receive_queue(attr).unwrap()
}

/// Two servers that share, and a client of each.
fn two_that_share() -> (SharedReceiveQueue, [End; 2], [End; 2]) {
    let context = Context::open(common::address(), &options()).unwrap();
    let pd = context.protection_domain();
    let srq = shared(&pd);
    let servers = [0, 1].map(|_| end_in(context.clone(), pd.clone(), QpType::Rc, Some(&srq)));
    let clients = [0, 1].map(|_| end(QpType::Rc));
    for (server, client) in servers.iter().zip(&clients) {
        server.connect(&client.context, client.qp.qpn());
        client.connect(&context, server.qp.qpn());
    }
    (srq, servers, clients)
}

#[test]
fn queue_pairs_take_from_one_queue_and_the_limit_is_told() {
    let (srq, servers, clients) = two_that_share();
    let memory = &servers[0];
    let post = |wr_id| {
        let list = [memory.sge(wr_id as usize * 2000, 2000)];
        // SAFETY: the pages are only copied.
        unsafe {
            srq.post_recv(&[RecvWr {
                wr_id,
                sg_list: &list,
            }])
        }
    };
    // A device may give more than it is asked for.
    let depth = srq.query().max_wr;
    for id in 0..u64::from(depth) {
        post(id).unwrap();
    }
    assert_eq!(post(8).unwrap_err().error, Error::QueueFull);
    srq.set_limit(depth - 2).unwrap();
    assert_eq!(srq.query().limit, depth - 2);
    assert_refused(srq.set_limit(depth + 1), Error::Limit("the queue's depth"));
    for round in 0..4u64 {
        let from = (round % 2) as usize;
        let text = bytes(1500, round as usize);
        clients[from].pages.write(0, &text);
        clients[from].post(1, SendOp::Send, &[clients[from].sge(0, 1500)]);
        clients[from].succeed();
        let got = servers[from].succeed();
        assert_eq!((got.wr_id, got.qpn), (round, servers[from].qp.qpn()));
        assert_eq!(memory.pages.read(round as usize * 2000, 1500), text);
    }
    assert_eq!(memory.event(), AsyncEvent::SrqLimitReached(srq.id()));
    assert_eq!(memory.context.async_event(), None);
    if provider::HAS_WORDS {
        assert_eq!(srq.query().limit, 0);
    }
    // A WRITE with immediate data takes one too; a plain one none.
    clients[0].post(
        1,
        SendOp::Write(servers[0].remote(500_000)),
        &[clients[0].sge(0, 8)],
    );
    let with_imm = SendOp::WriteImm(servers[0].remote(500_000), 3);
    clients[0].post(1, with_imm, &[clients[0].sge(0, 8)]);
    assert_eq!(servers[0].succeed().wr_id, 4);
    clients[1].post(1, SendOp::Send, &[]);
    assert_eq!(servers[1].succeed().wr_id, 5);
}

#[test]
fn a_queue_pair_in_error_takes_no_more_from_its_shared_queue_and_says_so() {
    let (srq, servers, clients) = two_that_share();
    let list = [RecvWr {
        wr_id: 5,
        sg_list: &[],
    }];
    // SAFETY: nothing is named.
    unsafe { srq.post_recv(&list) }.unwrap();
    let attr = to(QpAttr::default(), QpState::Err);
    servers[0].qp.modify(&attr, QpAttrMask::STATE).unwrap();
    assert_eq!(
        servers[0].event(),
        AsyncEvent::LastWqeReached(servers[0].qp.qpn())
    );
    assert!(servers[0].is_silent(), "shared receives are not flushed");
    clients[1].post(1, SendOp::Send, &[]);
    assert_eq!(servers[1].succeed().wr_id, 5, "the other goes on");
}

#[test]
fn an_empty_shared_queue_makes_the_peer_wait() {
    let context = Context::open(common::address(), &options()).unwrap();
    let pd = context.protection_domain();
    let srq = shared(&pd);
    let server = end_in(context.clone(), pd.clone(), QpType::Rc, Some(&srq));
    let client = end(QpType::Rc);
    server.connect(&client.context, client.qp.qpn());
    client.connect(&context, server.qp.qpn());
    client.post(1, SendOp::Send, &[]);
    assert!(client.is_silent() && server.is_silent());
    assert!(client.context.counters().rcvd_rnr_err > 0);
    // SAFETY: nothing is named.
    unsafe {
        srq.post_recv(&[RecvWr {
            wr_id: 5,
            sg_list: &[],
        }])
    }
    .unwrap();
    assert_eq!((server.succeed().wr_id, client.succeed().wr_id), (5, 1));
}

#[test]
fn datagrams_and_unreliable_connections_share_too() {
    for kind in [QpType::Uc, QpType::Ud] {
        let context = Context::open(common::address(), &options()).unwrap();
        let pd = context.protection_domain();
        let srq = shared(&pd);
        let server = end_in(context.clone(), pd.clone(), kind, Some(&srq));
        let client = end(kind);
        server.connect(&client.context, client.qp.qpn());
        client.connect(&context, server.qp.qpn());
        let list = [server.sge(0, 5000)];
        // SAFETY: the pages are only copied.
        unsafe {
            srq.post_recv(&[RecvWr {
                wr_id: 7,
                sg_list: &list,
            }])
        }
        .unwrap();
        let ah = handle(&client, &context);
        let to = Destination {
            ah: ah.id(),
            qpn: server.qp.qpn(),
            qkey: QKEY,
        };
        let list = [client.sge(0, 900)];
        client
            .try_post(SendWr {
                to: Some(to),
                ..signalled(1, SendOp::Send, &list)
            })
            .unwrap();
        assert_eq!(server.succeed().wr_id, 7);
        let broken = self::to(QpAttr::default(), QpState::Err);
        server.qp.modify(&broken, QpAttrMask::STATE).unwrap();
        let last = AsyncEvent::LastWqeReached(server.qp.qpn());
        assert_eq!(server.event(), last, "{kind:?}");
    }
}

#[test]
fn what_does_not_belong_together_is_refused() {
    let context = Context::open(common::address(), &options()).unwrap();
    let (pd, other) = (context.protection_domain(), context.protection_domain());
    let srq = shared(&other);
    let cq = context.completion_queue(8, None).unwrap();
    let queues = Queues {
        send: &cq,
        recv: &cq,
        shared: Some(&srq),
    };
    let refused = pd.queue_pair(queues, &init_attr(QpType::Rc));
    assert_refused(refused.map(drop), Error::Argument(""));
}

#[test]
fn who_shares_has_no_receives_alone() {
    let context = Context::open(common::address(), &options()).unwrap();
    let pd = context.protection_domain();
    let srq = shared(&pd);
    let server = end_in(context, pd, QpType::Rc, Some(&srq));
    server.to_init();
    // SAFETY: nothing is named.
    let refused = unsafe {
        server.qp.post_recv(&[RecvWr {
            wr_id: 1,
            sg_list: &[],
        }])
    };
    assert_refused(refused.map_err(|bad| bad.error), Error::Argument(""));
}
