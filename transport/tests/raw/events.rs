//! Notification: completion channels and asynchronous events.

use super::*;

/// An end whose receives complete in a queue of their own, of which a channel tells.
fn with_channel(kind: QpType) -> (End, CompletionQueue, provider::CompletionChannel) {
    let end = end(kind);
    let channel = end.context.completion_channel().unwrap();
    let cq = end.context.completion_queue(16, Some(&channel)).unwrap();
    let queues = Queues {
        send: &end.cq,
        recv: &cq,
        shared: None,
    };
    let qp = end.pd.queue_pair(queues, &init_attr(kind)).unwrap();
    (End { qp, ..end }, cq, channel)
}

#[test]
fn a_channel_tells_once_of_what_was_asked_for() {
    let (a2, (b2, cq, channel)) = (end(QpType::Rc), with_channel(QpType::Rc));
    a2.connect(&b2.context, b2.qp.qpn());
    b2.connect(&a2.context, a2.qp.qpn());
    let short = Duration::from_millis(30);
    for id in 0..8 {
        b2.receive(id, &[b2.sge(0, 8)]);
    }
    let send = |solicited| {
        let flags = if solicited {
            SendFlags::SOLICITED
        } else {
            SendFlags::NONE
        };
        a2.try_post(SendWr {
            flags,
            ..signalled(1, SendOp::Send, &[])
        })
        .unwrap();
    };
    let take = |count| {
        let mut done = Vec::new();
        let deadline = Instant::now() + PATIENCE;
        while done.len() < count {
            assert!(cq.wait(deadline));
            cq.poll(count, &mut done).unwrap();
        }
    };
    send(false);
    take(1);
    assert!(!is_readable(&channel, short), "nobody has asked");
    cq.request_notification(false);
    // The program sleeps in poll(2) here, and the device's thread works.
    send(false);
    assert!(is_readable(&channel, PATIENCE));
    assert_eq!((channel.event(), channel.event()), (Some(cq.id()), None));
    assert!(!is_readable(&channel, Duration::ZERO));
    send(false);
    assert!(!is_readable(&channel, short), "once is once");
    cq.request_notification(true);
    send(false);
    assert!(!is_readable(&channel, short), "not a solicited one");
    send(true);
    assert!(is_readable(&channel, PATIENCE));
    channel.event().unwrap();
    take(4);
}

#[test]
fn a_failure_is_told_to_whoever_waits_for_solicited_ones() {
    let (a, (b, cq, channel)) = (end(QpType::Rc), with_channel(QpType::Rc));
    b.connect(&a.context, a.qp.qpn());
    b.receive(1, &[]);
    cq.request_notification(true);
    let attr = to(QpAttr::default(), QpState::Err);
    b.qp.modify(&attr, QpAttrMask::STATE).unwrap();
    assert!(is_readable(&channel, PATIENCE));
}

/// Who waits for any completion and then asks for solicited ones goes on waiting for any.
#[test]
fn asking_for_solicited_ones_takes_nothing_back() {
    let (a, (b, cq, channel)) = (end(QpType::Rc), with_channel(QpType::Rc));
    a.connect(&b.context, b.qp.qpn());
    b.connect(&a.context, a.qp.qpn());
    b.receive(1, &[]);
    cq.request_notification(false);
    cq.request_notification(true);
    a.post(1, SendOp::Send, &[]);
    assert!(is_readable(&channel, PATIENCE));
}

#[test]
fn immediate_data_of_a_write_is_told_to_whoever_waits_for_solicited_ones() {
    let (a, (b, cq, channel)) = (end(QpType::Rc), with_channel(QpType::Rc));
    a.connect(&b.context, b.qp.qpn());
    b.connect(&a.context, a.qp.qpn());
    b.receive(1, &[]);
    cq.request_notification(true);
    let list = [a.sge(0, 8)];
    let op = SendOp::WriteImm(b.remote(0), 1);
    let flags = SendFlags::SOLICITED;
    a.try_post(SendWr {
        flags,
        ..signalled(1, op, &list)
    })
    .unwrap();
    assert!(is_readable(&channel, PATIENCE));
}

#[test]
fn a_target_is_told_that_it_has_refused() {
    for (access, place, event) in [
        (
            AccessFlags::NONE,
            0,
            AsyncEvent::QpRequestError as fn(Qpn) -> AsyncEvent,
        ),
        (ALL, LEN, AsyncEvent::QpAccessError),
    ] {
        let (a, b) = pair(QpType::Rc);
        let attr = QpAttr {
            access,
            ..QpAttr::default()
        };
        b.qp.modify(&attr, QpAttrMask::ACCESS).unwrap();
        a.post(1, SendOp::Write(b.remote(place)), &[a.sge(0, 8)]);
        assert_ne!(a.next().status, Status::Success);
        assert_eq!(b.event(), event(b.qp.qpn()));
    }
}

#[test]
fn a_completion_queue_without_room_breaks_its_queue_pairs_and_no_others() {
    let (a, b) = pair(QpType::Rc);
    let small = b.context.completion_queue(2, None).unwrap();
    let queues = Queues {
        send: &b.cq,
        recv: &small,
        shared: None,
    };
    let qp = b.pd.queue_pair(queues, &init_attr(QpType::Rc)).unwrap();
    let a2 = end_in(a.context.clone(), a.pd.clone(), QpType::Rc, None);
    a2.to_init();
    a2.to_rtr(&b.context, qp.qpn());
    a2.to_rts();
    let attr = attr_to(&a2.context, a2.qp.qpn());
    qp.modify(&to(attr, QpState::Init), INIT | QpAttrMask::ACCESS)
        .unwrap();
    qp.modify(&to(attr, QpState::Rtr), RTR_RC).unwrap();
    for wr_id in 0..3 {
        // SAFETY: nothing is named.
        unsafe {
            qp.post_recv(&[RecvWr {
                wr_id,
                sg_list: &[],
            }])
        }
        .unwrap();
        a2.post(wr_id, SendOp::Send, &[]);
    }
    let mut events = [b.event(), b.event(), b.event()];
    events.sort_by_key(|event| format!("{event:?}"));
    let expected = [
        AsyncEvent::CommunicationEstablished(qp.qpn()),
        AsyncEvent::CqError(small.id()),
        AsyncEvent::QpFatal(qp.qpn()),
    ];
    assert_eq!(events, expected);
    assert_eq!(qp.query().state, QpState::Err);
    let mut done = Vec::new();
    assert_eq!(
        small.poll(9, &mut done),
        Ok(2),
        "what was there is still there"
    );
    assert!(matches!(small.poll(9, &mut done), Err(Error::Exhausted(_))));
    // The neighbour on the same device does not notice.
    a.post(1, SendOp::Write(b.remote(0)), &[a.sge(0, 8)]);
    a.succeed();
    assert_eq!(b.qp.query().state, QpState::Rts);
}

#[test]
fn a_completion_queue_without_room_is_told() {
    let b = end(QpType::Rc);
    let small = b.context.completion_queue(1, None).unwrap();
    let queues = Queues {
        send: &small,
        recv: &b.cq,
        shared: None,
    };
    let qp = b.pd.queue_pair(queues, &init_attr(QpType::Rc)).unwrap();
    let b = End { qp, ..b };
    b.connect(&b.context, b.qp.qpn());
    // A device may give more room than it is asked for.
    for wr_id in 0..8 {
        let list = [b.sge(0, 8)];
        let wr = signalled(wr_id, SendOp::Write(b.remote(64)), &list);
        // It may have failed by now.
        let _ = b.try_post(wr);
    }
    while b.event() != AsyncEvent::CqError(small.id()) {}
}

#[test]
fn the_first_packet_before_rts_is_told_once() {
    let (a, b) = (end(QpType::Rc), end(QpType::Rc));
    a.connect(&b.context, b.qp.qpn());
    b.to_init();
    b.receive(1, &[b.sge(0, 100)]);
    b.receive(2, &[b.sge(0, 100)]);
    b.to_rtr(&a.context, a.qp.qpn());
    for _ in 0..2 {
        a.post(1, SendOp::Send, &[]);
        a.succeed();
    }
    assert_eq!(b.event(), AsyncEvent::CommunicationEstablished(b.qp.qpn()));
    assert_eq!(b.context.async_event(), None);
    assert!(!is_readable(&b.context, Duration::ZERO));
    b.to_rts();
    assert_eq!(b.succeed().wr_id, 1);
}

/// What nobody has taken goes with what it is about.
#[test]
fn nothing_is_told_of_a_queue_pair_that_is_gone() {
    let (a, b) = pair(QpType::Rc);
    a.post(1, SendOp::Write(b.remote(LEN)), &[a.sge(0, 8)]);
    assert_ne!(a.next().status, Status::Success);
    assert!(is_readable(&b.context, PATIENCE));
    drop(b.qp);
    assert_eq!(b.context.async_event(), None);
}

/// The same.
#[test]
fn nothing_is_told_of_a_completion_queue_that_is_gone() {
    let (_a, b) = pair(QpType::Rc);
    let channel = b.context.completion_channel().unwrap();
    let cq = b.context.completion_queue(4, Some(&channel)).unwrap();
    let queues = Queues {
        send: &b.cq,
        recv: &cq,
        shared: None,
    };
    let qp = b.pd.queue_pair(queues, &init_attr(QpType::Rc)).unwrap();
    let b = End { qp, ..b };
    b.to_init();
    b.receive(1, &[]);
    cq.request_notification(false);
    let broken = to(QpAttr::default(), QpState::Err);
    b.qp.modify(&broken, QpAttrMask::STATE).unwrap();
    assert!(is_readable(&channel, PATIENCE));
    drop((b.qp, cq));
    assert!(!is_readable(&channel, Duration::ZERO));
    assert_eq!(channel.event(), None);
}

#[test]
fn a_completion_queue_is_resized_around_what_is_there() {
    let (a, b) = pair(QpType::Rc);
    for id in 0..3 {
        a.post(id, SendOp::Write(b.remote(0)), &[a.sge(0, 8)]);
    }
    let deadline = Instant::now() + PATIENCE;
    while a.qp.query().sq_psn != Psn::new(1) && Instant::now() < deadline {
        std::thread::yield_now();
    }
    let mut done = Vec::new();
    while done.is_empty() {
        assert!(a.cq.wait(deadline));
        a.cq.poll(1, &mut done).unwrap();
    }
    assert_refused(a.cq.resize(0), Error::Limit("completion queue entries"));
    a.cq.resize(40).unwrap();
    a.succeed();
    assert_eq!(a.succeed().wr_id, 2);
}
