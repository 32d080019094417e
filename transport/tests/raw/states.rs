//! The state table from outside.

use super::*;

fn wait_drained(end: &End) {
    let deadline = Instant::now() + PATIENCE;
    while end.qp.query().sq_draining {
        assert!(Instant::now() < deadline, "it never drains");
    }
}

#[test]
fn query_tells_the_truth_in_every_state() {
    for kind in [QpType::Rc, QpType::Uc, QpType::Ud] {
        let (a, b) = (end(kind), end(kind));
        let cap = a.qp.init_attr().cap;
        let state = |end: &End| end.qp.query().state;
        let is_new = |attr: QpAttr| match provider::HAS_WORDS {
            true => {
                attr == QpAttr {
                    cap,
                    ..QpAttr::default()
                }
            }
            // C says no more of RESET.
            false => (attr.state, attr.cap) == (QpState::Reset, cap),
        };
        assert!(is_new(a.qp.query()), "{:?}", a.qp.query());
        a.to_init();
        let attr = a.qp.query();
        assert_eq!(
            (attr.state, attr.port, attr.pkey_index),
            (QpState::Init, 1, 0)
        );
        if kind == QpType::Ud {
            assert_eq!(attr.qkey, QKEY);
        } else {
            assert_eq!(attr.access, ALL);
        }
        a.to_rtr(&b.context, b.qp.qpn());
        let attr = a.qp.query();
        assert_eq!(attr.state, QpState::Rtr);
        if kind != QpType::Ud {
            assert_eq!((attr.dest, attr.path_mtu), (b.qp.qpn(), Mtu::B1024));
            assert_eq!(attr.rq_psn, Psn::new(0xFF_FFFE));
            assert_eq!(attr.address.dgid, b.context.gid().gid);
        }
        a.to_rts();
        let attr = a.qp.query();
        assert_eq!(
            (attr.state, attr.sq_psn),
            (QpState::Rts, Psn::new(0xFF_FFFE))
        );
        if kind == QpType::Rc {
            let retries = (
                attr.timeout,
                attr.retry_cnt,
                attr.rnr_retry,
                attr.max_rd_atomic,
            );
            assert_eq!(retries, (14, 7, 7, 4));
        }
        let sqd = to(attr, QpState::Sqd);
        a.qp.modify(&sqd, QpAttrMask::STATE).unwrap();
        wait_drained(&a);
        assert_knows(&a, &b, QpState::Sqd);
        a.qp.modify(&to(attr, QpState::Rts), QpAttrMask::STATE)
            .unwrap();
        assert_knows(&a, &b, QpState::Rts);
        a.qp.modify(&to(attr, QpState::Err), QpAttrMask::STATE)
            .unwrap();
        assert_knows(&a, &b, QpState::Err);
        a.qp.modify(&to(attr, QpState::Reset), QpAttrMask::STATE)
            .unwrap();
        assert!(is_new(a.qp.query()), "{:?}", a.qp.query());
        // And once more, all the way.
        a.connect(&b.context, b.qp.qpn());
        assert_eq!(state(&a), QpState::Rts);
    }
}

/// The queue pair is in this state, and still knows what it was told on its way there.
fn assert_knows(end: &End, peer: &End, state: QpState) {
    let attr = end.qp.query();
    let kind = end.qp.init_attr().kind;
    assert_eq!((attr.state, attr.port), (state, 1));
    if kind == QpType::Ud {
        assert_eq!(attr.qkey, QKEY);
        return;
    }
    let told = (attr.dest, attr.path_mtu, attr.address.dgid, attr.access);
    let gid = peer.context.gid().gid;
    assert_eq!(told, (peer.qp.qpn(), Mtu::B1024, gid, ALL));
    if kind == QpType::Rc {
        let retries = (attr.timeout, attr.retry_cnt, attr.rnr_retry);
        assert_eq!(retries, (14, 7, 7));
        let reads = (attr.max_rd_atomic, attr.max_dest_rd_atomic);
        assert_eq!((reads, attr.min_rnr_timer), ((4, 4), RnrTimer::new(1)));
    }
}

#[test]
fn query_tells_the_next_packet_numbers_in_every_state_that_has_them() {
    for kind in [QpType::Rc, QpType::Uc] {
        let (a, b) = pair(kind);
        for wr_id in 0..3 {
            b.receive(wr_id, &[b.sge(0, 8)]);
            a.post(wr_id, SendOp::Send, &[a.sge(0, 8)]);
            a.succeed();
            b.succeed();
        }
        // Both began two before the numbers go round.
        let next = Psn::new(1);
        for state in [QpState::Rts, QpState::Sqd, QpState::Err] {
            let moved = state != QpState::Rts;
            for end in [&a, &b].into_iter().filter(|_| moved) {
                let attr = to(QpAttr::default(), state);
                end.qp.modify(&attr, QpAttrMask::STATE).unwrap();
                wait_drained(end);
            }
            let (at_a, at_b) = (a.qp.query(), b.qp.query());
            assert_eq!((at_a.state, at_b.state), (state, state));
            assert_eq!(
                (at_a.sq_psn, at_b.rq_psn),
                (next, next),
                "{kind:?} {state:?}"
            );
        }
    }
}

#[test]
fn wrong_moves_change_nothing() {
    let (a, b) = (end(QpType::Rc), end(QpType::Rc));
    let attr = attr_to(&b.context, b.qp.qpn());
    let modify = |state, mask| a.qp.modify(&to(attr, state), mask);
    let (from, rts) = (QpState::Reset, QpState::Rts);
    assert_refused(
        modify(rts, QpAttrMask::STATE),
        Error::Transition(InvalidTransition { from, to: rts }),
    );
    assert_refused(
        modify(QpState::Init, INIT),
        Error::MissingAttributes(QpAttrMask::ACCESS),
    );
    let excess = INIT | QpAttrMask::ACCESS | QpAttrMask::SQ_PSN;
    assert_refused(
        modify(QpState::Init, excess),
        Error::ExcessAttributes(QpAttrMask::SQ_PSN),
    );
    assert_eq!(a.qp.query().state, QpState::Reset);
}

#[test]
fn wrong_attributes_change_nothing() {
    let (a, b) = (end(QpType::Rc), end(QpType::Rc));
    let attr = attr_to(&b.context, b.qp.qpn());
    a.to_init();
    type Change = fn(&mut QpAttr);
    let changes: [(Change, QpAttrMask); 5] = [
        (|attr| attr.address.port = 2, RTR_RC),
        (
            |attr| attr.address.dgid = Gid::from_ip("::1".parse().unwrap()),
            RTR_RC,
        ),
        (
            |attr| attr.address.dgid = Gid::from_ip("224.0.0.9".parse().unwrap()),
            RTR_RC,
        ),
        (|attr| attr.max_dest_rd_atomic = 129, RTR_RC),
        (|attr| attr.pkey_index = 1, RTR_RC | QpAttrMask::PKEY_INDEX),
    ];
    for (change, mask) in changes {
        let mut attr = to(attr, QpState::Rtr);
        change(&mut attr);
        let refused = a.qp.modify(&attr, mask).unwrap_err();
        let has_words = matches!(refused, Error::Limit(_) | Error::Argument(_));
        assert!(has_words || !provider::HAS_WORDS, "{refused}");
        assert_eq!(a.qp.query().state, QpState::Init);
    }
}

#[test]
fn wrong_beliefs_and_steps_back_change_nothing() {
    let (a, b) = (end(QpType::Rc), end(QpType::Rc));
    let attr = attr_to(&b.context, b.qp.qpn());
    let modify = |state, mask| a.qp.modify(&to(attr, state), mask);
    a.to_init();
    let wrong = QpAttr {
        current_state: QpState::Rts,
        ..to(attr, QpState::Rtr)
    };
    assert!(
        a.qp.modify(&wrong, RTR_RC | QpAttrMask::CURRENT_STATE)
            .is_err()
    );
    a.to_rtr(&b.context, b.qp.qpn());
    let (from, to) = (QpState::Rtr, QpState::Init);
    assert_refused(
        modify(to, INIT | QpAttrMask::ACCESS),
        Error::Transition(InvalidTransition { from, to }),
    );
    assert_eq!(a.qp.query().state, QpState::Rtr);
}

#[test]
fn nothing_is_posted_in_a_state_that_does_not_send() {
    let (a, b) = (end(QpType::Rc), end(QpType::Rc));
    a.to_init();
    a.to_rtr(&b.context, b.qp.qpn());
    let refused = a.try_post(signalled(1, SendOp::Send, &[]));
    assert_refused(refused, Error::State(QpState::Rtr));
    let reset = to(QpAttr::default(), QpState::Reset);
    a.qp.modify(&reset, QpAttrMask::STATE).unwrap();
    // SAFETY: nothing is named.
    let refused = unsafe {
        a.qp.post_recv(&[RecvWr {
            wr_id: 1,
            sg_list: &[],
        }])
    };
    let refused = refused.map_err(|bad| bad.error);
    assert_refused(refused, Error::State(QpState::Reset));
}

#[test]
fn a_drained_queue_keeps_what_is_posted_until_it_is_resumed() {
    drained_and_resumed(&[QpType::Rc]);
}

#[test]
fn a_drained_queue_of_an_unreliable_queue_pair_too() {
    drained_and_resumed(&[QpType::Uc, QpType::Ud]);
}

fn drained_and_resumed(kinds: &[QpType]) {
    for kind in kinds.iter().copied() {
        let (a, b) = pair(kind);
        let ah = handle(&a, &b.context);
        let to_b = Destination {
            ah: ah.id(),
            qpn: b.qp.qpn(),
            qkey: QKEY,
        };
        let send = |id| SendWr {
            to: Some(to_b),
            ..signalled(id, SendOp::Send, &[])
        };
        for id in 0..4 {
            b.receive(id, &[b.sge(0, 100)]);
        }
        a.try_post(send(1)).unwrap();
        let attr = QpAttr::default();
        let mask = QpAttrMask::STATE | QpAttrMask::SQD_NOTIFY;
        a.qp.modify(&to(attr, QpState::Sqd), mask).unwrap();
        assert_eq!(a.succeed().wr_id, 1, "what has begun is finished");
        assert_eq!(a.event(), AsyncEvent::SendQueueDrained(a.qp.qpn()));
        b.succeed();
        a.try_post(send(2)).unwrap();
        a.try_post(send(3)).unwrap();
        assert!(a.is_silent() && b.is_silent());
        let move_to = |state| a.qp.modify(&to(attr, state), QpAttrMask::STATE).unwrap();
        move_to(QpState::Rts);
        assert_eq!((a.succeed().wr_id, a.succeed().wr_id), (2, 3));
        assert_eq!((b.succeed().wr_id, b.succeed().wr_id), (1, 2));
    }
}

#[test]
fn that_a_queue_has_drained_is_told_to_who_asks() {
    let (a, _b) = pair(QpType::Rc);
    let sqd = to(QpAttr::default(), QpState::Sqd);
    a.qp.modify(&sqd, QpAttrMask::STATE).unwrap();
    assert_eq!(a.context.async_event(), None, "nobody has asked");
    let rts = to(QpAttr::default(), QpState::Rts);
    a.qp.modify(&rts, QpAttrMask::STATE).unwrap();
    let asked = QpAttrMask::STATE | QpAttrMask::SQD_NOTIFY;
    a.qp.modify(&sqd, asked).unwrap();
    assert_eq!(a.event(), AsyncEvent::SendQueueDrained(a.qp.qpn()));
}

#[test]
fn attributes_change_while_drained() {
    let (a, b) = pair(QpType::Rc);
    let mask = QpAttrMask::TIMEOUT | QpAttrMask::RETRY_CNT | QpAttrMask::MAX_RD_ATOMIC;
    let attr = QpAttr {
        timeout: 10,
        retry_cnt: 1,
        max_rd_atomic: 1,
        ..QpAttr::default()
    };
    a.qp.modify(&to(attr, QpState::Sqd), QpAttrMask::STATE)
        .unwrap();
    wait_drained(&a);
    a.qp.modify(&to(attr, QpState::Sqd), mask | QpAttrMask::STATE)
        .unwrap();
    a.qp.modify(&to(attr, QpState::Rts), QpAttrMask::STATE)
        .unwrap();
    let now = a.qp.query();
    assert_eq!((now.timeout, now.retry_cnt, now.max_rd_atomic), (10, 1, 1));
    // The new patience is short: the peer is gone, and that is known soon.
    drop(b);
    a.post(1, SendOp::Send, &[]);
    assert_eq!(a.next().status, Status::RetryExceeded);
}

#[test]
fn patience_does_not_change_while_working() {
    let (a, _b) = pair(QpType::Rc);
    let mask = QpAttrMask::TIMEOUT | QpAttrMask::RETRY_CNT;
    let in_rts = a.qp.modify(&QpAttr::default(), mask);
    assert_refused(in_rts, Error::ExcessAttributes(mask));
}

#[test]
fn how_long_a_peer_waits_for_a_receive_changes_while_working() {
    let (a, b) = pair(QpType::Rc);
    // Half a second.
    let attr = QpAttr {
        min_rnr_timer: RnrTimer::new(31),
        ..QpAttr::default()
    };
    b.qp.modify(&attr, QpAttrMask::MIN_RNR_TIMER).unwrap();
    assert_eq!(b.qp.query().min_rnr_timer, attr.min_rnr_timer);
    let start = Instant::now();
    a.post(1, SendOp::Send, &[]);
    assert!(a.is_silent());
    b.receive(2, &[]);
    assert_eq!((b.succeed().wr_id, a.succeed().wr_id), (2, 1));
    assert!(start.elapsed() > Duration::from_millis(400));
}

#[test]
fn how_many_reads_are_served_changes_while_drained() {
    let (a, b) = pair(QpType::Rc);
    a.post(1, SendOp::Read(b.remote(0)), &[a.sge(0, 8)]);
    a.succeed();
    let sqd = to(QpAttr::default(), QpState::Sqd);
    b.qp.modify(&sqd, QpAttrMask::STATE).unwrap();
    wait_drained(&b);
    let mask = QpAttrMask::MAX_DEST_RD_ATOMIC | QpAttrMask::STATE;
    b.qp.modify(&sqd, mask).unwrap();
    assert_eq!(b.qp.query().max_dest_rd_atomic, 0);
    a.post(2, SendOp::Read(b.remote(0)), &[a.sge(0, 8)]);
    assert_eq!(a.next().status, Status::RemoteInvalidRequest);
}

#[test]
fn rights_change_while_working() {
    let (a, b) = pair(QpType::Rc);
    a.post(1, SendOp::Write(b.remote(0)), &[a.sge(0, 8)]);
    a.succeed();
    let attr = QpAttr {
        access: AccessFlags::REMOTE_READ,
        ..QpAttr::default()
    };
    b.qp.modify(&attr, QpAttrMask::ACCESS).unwrap();
    a.post(2, SendOp::Read(b.remote(0)), &[a.sge(0, 8)]);
    a.succeed();
    a.post(3, SendOp::Write(b.remote(0)), &[a.sge(0, 8)]);
    assert_eq!(a.next().status, Status::RemoteInvalidRequest);
}

#[test]
fn error_flushes_and_reset_forgets() {
    for kind in [QpType::Rc, QpType::Uc, QpType::Ud] {
        let (a, _b) = pair(kind);
        let attr = QpAttr::default();
        let move_to = |state| a.qp.modify(&to(attr, state), QpAttrMask::STATE).unwrap();
        for id in 0..3 {
            a.receive(id, &[a.sge(0, 100)]);
        }
        move_to(QpState::Err);
        for id in 0..3 {
            let flushed = a.next();
            assert_eq!((flushed.wr_id, flushed.status), (id, Status::Flushed));
        }
        a.receive(10, &[]);
        move_to(QpState::Reset);
        assert!(a.is_silent(), "completions of a reset queue pair are gone");
    }
}

#[test]
fn what_is_posted_in_error_is_flushed() {
    let (a, _b) = pair(QpType::Rc);
    let attr = to(QpAttr::default(), QpState::Err);
    a.qp.modify(&attr, QpAttrMask::STATE).unwrap();
    a.receive(9, &[]);
    assert_eq!(a.next().status, Status::Flushed);
    a.post(10, SendOp::Send, &[]);
    assert_eq!(a.next().status, Status::Flushed);
}

/// Memory that there is not.
const NOWHERE: Sge = Sge {
    lkey: Lkey(0xFFF_FF00),
    addr: 0,
    len: 8,
};

#[test]
fn a_failed_send_ends_a_reliable_connection() {
    let (a, _b) = pair(QpType::Rc);
    a.post(1, SendOp::Send, &[NOWHERE]);
    let failed = a.next();
    assert_eq!((failed.wr_id, failed.status), (1, Status::LocalProtection));
    assert_eq!(a.qp.query().state, QpState::Err);
}

#[test]
fn a_failed_send_pauses_the_unreliable() {
    for kind in [QpType::Uc, QpType::Ud] {
        let (a, b) = pair(kind);
        let ah = handle(&a, &b.context);
        let to_b = Destination {
            ah: ah.id(),
            qpn: b.qp.qpn(),
            qkey: QKEY,
        };
        let post = |id, list| {
            let wr = SendWr {
                to: Some(to_b),
                ..signalled(id, SendOp::Send, list)
            };
            a.try_post(wr).unwrap();
        };
        post(1, &[NOWHERE]);
        let failed = a.next();
        assert_eq!((failed.wr_id, failed.status), (1, Status::LocalProtection));
        assert_knows(&a, &b, QpState::Sqe);
        post(2, &[]);
        assert_eq!(a.next().status, Status::Flushed);
        // Receiving goes on meanwhile.
        let back = handle(&b, &a.context);
        let to_a = Destination {
            ah: back.id(),
            qpn: a.qp.qpn(),
            qkey: QKEY,
        };
        a.receive(3, &[a.sge(0, 100)]);
        b.try_post(SendWr {
            to: Some(to_a),
            ..signalled(4, SendOp::Send, &[])
        })
        .unwrap();
        assert_eq!(a.succeed().wr_id, 3);
        let attr = to(QpAttr::default(), QpState::Rts);
        a.qp.modify(&attr, QpAttrMask::STATE).unwrap();
        b.receive(5, &[b.sge(0, 100)]);
        post(6, &[]);
        assert_eq!((a.succeed().wr_id, b.next().wr_id), (6, 4));
        assert_eq!(b.succeed().wr_id, 5);
    }
}

/// A peer that posts no receive is asked again as often as was said, and then the queue pair gives up.
#[test]
fn retries_for_want_of_receives_end() {
    for (op, retries) in [
        (SendOp::Send, 0),
        (SendOp::SendImm(1), 1),
        (SendOp::Send, 3),
    ] {
        let (a, b) = (end(QpType::Rc), end(QpType::Rc));
        b.connect(&a.context, a.qp.qpn());
        a.to_init();
        a.to_rtr(&b.context, b.qp.qpn());
        let attr = QpAttr {
            rnr_retry: retries,
            ..attr_to(&b.context, b.qp.qpn())
        };
        a.qp.modify(&to(attr, QpState::Rts), RTS_RC).unwrap();
        let before = rnr_naks(&a);
        a.receive(3, &[a.sge(0, 8)]);
        a.post(1, op, &[a.sge(0, 8)]);
        a.post(2, SendOp::Write(b.remote(0)), &[a.sge(0, 8)]);
        let ends = [0; 3]
            .map(|_| a.next())
            .map(|work| (work.wr_id, work.status));
        assert_eq!(ends[0], (1, Status::RnrRetryExceeded));
        assert!(
            ends[1..].iter().all(|end| end.1 == Status::Flushed),
            "{ends:?}"
        );
        assert_eq!(a.qp.query().state, QpState::Err);
        // The kernel does not count the last, and tells what it counted some 10 ms late.
        let least = u64::from(retries) + u64::from(provider::HAS_WORDS);
        let mut told = rnr_naks(&a) - before;
        for _ in 0..100 {
            if told >= least {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
            told = rnr_naks(&a) - before;
        }
        // A busy machine may have us ask early, which is no retry.
        let most = u64::from(retries) + 1 + provider::asked_early(&a.context);
        assert!((least..=most).contains(&told), "{told} of {retries}");
        // What nobody received was not done in part either.
        assert_eq!(b.pages.read(0, 8), [0; 8]);
    }
}

/// How often its peers have had no receive.
fn rnr_naks(end: &End) -> u64 {
    end.context.counters().rcvd_rnr_err
}
