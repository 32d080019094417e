//! What is done at this end, drained send queues, shared receives, ATOMIC WRITE and FLUSH.

use super::*;

fn bind(key: u32) -> SendOp {
    SendOp::BindWindow(Bind {
        window: Rkey(0),
        rkey: Rkey(key),
        region: Lkey(REGION),
        addr: base_of(REGION),
        len: 8,
        access: Access::ALL,
        zero_based: false,
    })
}

#[test]
fn local_work_is_done_in_its_place_and_completes_in_its_place() {
    let mut net = net(Setup::default());
    let log = tap(&mut net, |_, _| false);
    send(&mut net, 1, write_to(0), 5000);
    send(&mut net, 2, bind(50), 0);
    send(&mut net, 3, SendOp::LocalInvalidate(Rkey(50)), 0);
    send(&mut net, 4, bind(51), 0);
    send(&mut net, 5, write_to(0), 100);
    net.run(1_000);
    let done = net.completions(0);
    assert_eq!(
        statuses(&done),
        [1, 2, 3, 4, 5].map(|id| (id, Status::Success))
    );
    assert_eq!(
        done[1..4].iter().map(|c| c.kind).collect::<Vec<_>>(),
        [
            CompletionKind::BindWindow,
            CompletionKind::LocalInvalidate,
            CompletionKind::BindWindow
        ]
    );
    let keys = net.ends[0].memory.regions.keys();
    assert_eq!(keys.copied().collect::<Vec<_>>(), [REGION, 51]);
    let requests = log.borrow().iter().filter(|entry| entry.0 == 0).count();
    assert_eq!(requests, 6, "nothing of it was sent");
}

#[test]
fn local_work_is_not_done_again_when_packets_are() {
    let mut net = net(Setup::default());
    let log = tap(&mut net, drop_nth(0, Opcode::RcWriteOnly, 1));
    send(&mut net, 1, write_to(0), 100);
    send(&mut net, 2, bind(50), 0);
    send(&mut net, 3, write_to(200), 100);
    send(&mut net, 4, SendOp::LocalInvalidate(Rkey(50)), 0);
    send(&mut net, 5, write_to(400), 100);
    net.run(1_000);
    // Done twice, the invalidation would have failed.
    let done = net.completions(0);
    assert_eq!(
        statuses(&done),
        [1, 2, 3, 4, 5].map(|id| (id, Status::Success))
    );
    assert!(
        count(&log, Opcode::RcWriteOnly) > 3,
        "packets were sent again"
    );
}

#[test]
fn fenced_local_work_waits_for_reads() {
    let mut net = net(Setup::default());
    let fenced = SendWr {
        fence: true,
        ..SendWr::new(WrId(2), bind(50), SgList::EMPTY)
    };
    send(&mut net, 1, read_from(0), 5000);
    net.ends[0].qp.post_send(fenced).unwrap();
    net.pump();
    assert!(!net.ends[0].memory.regions.contains_key(&50));
    net.run(1_000);
    assert_eq!(
        statuses(&net.completions(0)),
        [(1, Status::Success), (2, Status::Success)]
    );
    assert!(net.ends[0].memory.regions.contains_key(&50));
}

#[test]
fn failed_local_work_ends_an_rc_and_pauses_a_uc() {
    for (kind, state) in [(QpKind::Rc, QpState::Err), (QpKind::Uc, QpState::Sqe)] {
        let mut net = net(Setup {
            kind,
            ..Setup::default()
        });
        send(&mut net, 1, bind(50), 0);
        send(&mut net, 2, SendOp::LocalInvalidate(Rkey(49)), 0);
        send(&mut net, 3, bind(52), 0);
        net.run(1_000);
        assert_eq!(
            statuses(&net.completions(0)),
            [
                (1, Status::Success),
                (2, Status::LocalOperation),
                (3, Status::Flushed)
            ]
        );
        assert_eq!(net.ends[0].qp.state(), state);
        assert!(!net.ends[0].memory.regions.contains_key(&52));
    }
}

#[test]
fn a_draining_queue_finishes_what_has_begun_even_over_a_loss() {
    let mut net = net(Setup::default());
    let _log = tap(&mut net, drop_nth(0, Opcode::RcWriteMiddle, 1));
    send(&mut net, 1, write_to(0), 20_000);
    net.pump();
    send(&mut net, 2, write_to(0), 100);
    let qp = &mut net.ends[0].qp;
    qp.to_sqd().unwrap();
    assert!(qp.is_draining());
    assert_eq!(qp.poll_event(), None);
    net.run(1_000);
    let qp = &mut net.ends[0].qp;
    assert!(!qp.is_draining());
    assert_eq!(qp.poll_event(), Some(QpEvent::SendQueueDrained));
    assert_eq!(qp.poll_event(), None);
    assert_eq!(qp.state(), QpState::Sqd);
    assert_eq!(statuses(&net.completions(0)), [(1, Status::Success)]);
    // An empty one is drained at once; what waits goes on afterwards.
    net.ends[0].qp.resume().unwrap();
    net.run(1_000);
    assert_eq!(statuses(&net.completions(0)), [(2, Status::Success)]);
    net.ends[0].qp.to_sqd().unwrap();
    let qp = &mut net.ends[0].qp;
    assert_eq!(qp.poll_event(), Some(QpEvent::SendQueueDrained));
    assert_eq!(qp.resume(), Ok(()));
    let expected = InvalidTransition {
        from: QpState::Rts,
        to: QpState::Rtr,
    };
    let attr = RtrAttr {
        dest: QPNS[1],
        path_mtu: Mtu::B1024,
        rq_psn: Psn::new(0),
        max_dest_rd_atomic: 1,
        min_rnr_timer: RnrTimer::new(1),
    };
    assert_eq!(qp.to_rtr(attr), Err(expected));
}

#[test]
fn an_unreliable_send_without_memory_fails_and_the_next_works_again() {
    let mut net = net(Setup {
        kind: QpKind::Uc,
        ..Setup::default()
    });
    let qp = &mut net.ends[0].qp;
    for id in 1..4 {
        let wr = SendWr::new(WrId(id), write_to(0), piece(REGION, 0, 10));
        qp.post_send(wr).unwrap();
    }
    let now = Nanos(2_000);
    let first = qp.poll_transmit(now, Allow::All).unwrap();
    let second = qp.poll_transmit(now, Allow::All).unwrap();
    assert_ne!(first.header(), second.header());
    qp.handle_transmit_failure(&second);
    assert_eq!(qp.state(), QpState::Sqe);
    assert!(qp.poll_transmit(now, Allow::All).is_none());
    qp.resume().unwrap();
    send(&mut net, 4, write_to(0), 10);
    net.run(1_000);
    assert_eq!(
        statuses(&net.completions(0)),
        [
            (1, Status::Success),
            (2, Status::LocalProtection),
            (3, Status::Flushed),
            (4, Status::Success)
        ]
    );
}

#[test]
fn shared_receives_are_taken_one_by_one_and_not_flushed() {
    let mut net = net(Setup {
        shared_receives: true,
        rnr_timer: 1,
        ..Setup::default()
    });
    let wr = |id| RecvWr {
        wr_id: WrId(id),
        local: piece(REGION, 32 << 10, 4000),
    };
    assert_eq!(net.ends[1].qp.post_recv(wr(1)), Err(PostError::Invalid));
    net.ends[1].memory.shared.extend((1..5).map(wr));
    send(&mut net, 1, SendOp::Send, 3000);
    send(&mut net, 2, write_to(0), 3000);
    send(&mut net, 3, SendOp::WriteImm(remote(REGION, 0), 9), 3000);
    net.run(1_000);
    assert_eq!(
        statuses(&net.completions(1)),
        [(1, Status::Success), (2, Status::Success)]
    );
    assert_eq!(net.ends[1].memory.shared.len(), 2);
    net.ends[1].memory.shared.clear();
    send(&mut net, 4, SendOp::Send, 10);
    net.pump();
    for _ in 0..20 {
        net.step();
    }
    assert!(net.ends[1].qp.counters().send_rnr_err > 0);
    net.ends[1].memory.shared.push_back(wr(9));
    net.run(1_000);
    assert_eq!(statuses(&net.completions(1)), [(9, Status::Success)]);
    net.ends[1].memory.shared.push_back(wr(10));
    let qp = &mut net.ends[1].qp;
    qp.to_error();
    assert_eq!(qp.poll_event(), Some(QpEvent::LastWqeReached));
    qp.to_error();
    assert_eq!(qp.poll_event(), None, "once");
    net.run(1_000);
    assert_eq!(net.completions(1).len(), 0);
}

/// The exchange that Linux 6.12 has in `pv-atomic-write.pcap`: 0x1d is answered by 0x10.
#[test]
fn an_atomic_write_is_answered_as_a_read_of_nothing_and_done_once() {
    let mut net = net(Setup::default());
    let value = *b"together";
    let write = request(
        Opcode::RcAtomicWrite,
        FIRST_PSN,
        Extension::Reth(reth(64, 8)),
        &value,
    );
    for round in 0..3 {
        let (outcome, answers) = ask(&mut net, &write);
        assert_eq!((outcome, answers.len()), (Outcome::Accepted, 1));
        assert_eq!(answers[0].opcode, Opcode::RcReadResponseOnly);
        assert_eq!(answers[0].psn, Psn::new(FIRST_PSN));
        assert_eq!(syndrome(&answers[0]), Syndrome::ACK);
        let memory = &net.ends[1].memory;
        assert_eq!(memory.atomics, 1, "round {round}");
        assert_eq!(memory.regions[&REGION].bytes[64..72], value);
    }
    let odd = [reth(68, 8), reth(64, 7), reth(64, 16)];
    for reth in odd {
        let mut net = super::net(Setup::default());
        let extension = Extension::Reth(reth);
        let bytes = request(Opcode::RcAtomicWrite, FIRST_PSN, extension, &value);
        let (_, answers) = ask(&mut net, &bytes);
        assert_eq!(
            syndrome(&answers[0]),
            Syndrome::Nak(NakCode::InvalidRequest)
        );
        assert_eq!(net.ends[1].qp.state(), QpState::Err);
        assert_eq!(net.ends[1].memory.atomics, 0);
    }
    // Any other payload is no packet at all.
    for len in [0, 4, 12] {
        let extension = Extension::Reth(reth(64, 8));
        let bytes = request(Opcode::RcAtomicWrite, FIRST_PSN, extension, &[1; 12][..len]);
        assert_eq!(Packet::new_checked(&bytes).unwrap_err(), Malformed::Payload);
    }
}

#[test]
fn a_flush_is_answered_after_what_was_written_and_done_once() {
    let mut net = net(Setup::default());
    grant_flush(&mut net);
    let flush = |feth, reth| {
        let extension = Extension::FethReth(feth, reth);
        request(Opcode::RcFlush, FIRST_PSN, extension, &[])
    };
    let whole = flush(Feth::new(true, false, true), reth(LEN.into(), 9));
    for _ in 0..3 {
        let (outcome, answers) = ask(&mut net, &whole);
        assert_eq!((outcome, answers.len()), (Outcome::Accepted, 1));
        assert_eq!(answers[0].opcode, Opcode::RcReadResponseOnly);
        assert_eq!(net.ends[1].memory.flushes, 1);
    }
    let refused = [
        (Feth { bits: 0 }, reth(0, 8), NakCode::InvalidRequest),
        (Feth { bits: 0x4 }, reth(0, 8), NakCode::InvalidRequest),
        (Feth { bits: 0x21 }, reth(0, 8), NakCode::InvalidRequest),
        (
            Feth::new(false, true, false),
            reth(0, 8),
            NakCode::InvalidRequest,
        ),
        (
            Feth::new(true, false, false),
            reth(LEN.into(), 8),
            NakCode::RemoteAccess,
        ),
    ];
    for (feth, reth, code) in refused {
        let mut net = super::net(Setup::default());
        net.ends[1].qp.set_access(Access {
            flush_global: true,
            ..Access::ALL
        });
        let (_, answers) = ask(&mut net, &flush(feth, reth));
        assert_eq!(syndrome(&answers[0]), Syndrome::Nak(code), "{feth:?}");
        assert_eq!(net.ends[1].memory.flushes, 0);
    }
}

#[test]
fn a_plain_ack_does_not_finish_an_atomic_write() {
    let mut net = net(Setup::default());
    send(&mut net, 1, SendOp::AtomicWrite(remote(REGION, 0)), 8);
    net.ends[0]
        .qp
        .poll_transmit(Nanos(2_000), Allow::All)
        .unwrap();
    let aeth = Aeth {
        syndrome: Syndrome::ACK,
        msn: 1,
    };
    let header = Header::new(
        Opcode::RcAcknowledge,
        QPNS[0],
        Psn::new(FIRST_PSN),
        Extension::Aeth(aeth),
    );
    let bytes = raw(header, &[]);
    let packet = Packet::new_checked(&bytes).unwrap();
    let end = &mut net.ends[0];
    end.qp.handle_packet(Nanos(3_000), &packet, &mut end.memory);
    assert_eq!(end.qp.poll_completion(), None);
    net.run(1_000);
    assert_eq!(statuses(&net.completions(0)), [(1, Status::Success)]);
}

#[test]
fn the_first_request_in_rtr_is_an_event_once() {
    let caps = QpCaps {
        send_wr_max: 4,
        recv_wr_max: 4,
        shared_receives: false,
    };
    let mut qp = QueuePair::new(QpKind::Rc, QPNS[1], caps);
    to_rtr(&mut qp, FIRST_PSN, 1);
    let mut memory = TestMemory::default();
    memory.register(REGION, vec![0; 1000]);
    for psn in [FIRST_PSN, FIRST_PSN + 1] {
        let extension = Extension::Reth(reth(0, 4));
        let bytes = request(Opcode::RcWriteOnly, psn, extension, &[1; 4]);
        let packet = Packet::new_checked(&bytes).unwrap();
        let outcome = qp.handle_packet(Nanos(1), &packet, &mut memory);
        assert_eq!(outcome, Outcome::Accepted);
    }
    assert_eq!(qp.poll_event(), Some(QpEvent::CommunicationEstablished));
    assert_eq!(qp.poll_event(), None);
}
