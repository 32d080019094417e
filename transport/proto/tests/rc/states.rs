//! States.

use super::*;

#[test]
fn the_transition_table_holds() {
    use QpState::*;
    let all = [Reset, Init, Rtr, Rts, Sqd, Sqe, Err];
    let legal = [
        (Reset, Init),
        (Init, Init),
        (Init, Rtr),
        (Rtr, Rts),
        (Rts, Rts),
        (Rts, Sqd),
        (Sqd, Sqd),
        (Sqd, Rts),
        (Sqe, Rts),
    ];
    for from in all {
        for to in all {
            let expected = matches!(to, Reset | Err) || legal.contains(&(from, to));
            assert_eq!(from.legal(to), expected, "{from:?} {to:?}");
        }
    }
    let mut qp = connected(0, Setup::default());
    let error = qp
        .to_init(InitAttr {
            access: Access::ALL,
            pkey: PKEY_DEFAULT,
        })
        .unwrap_err();
    assert_eq!(
        error,
        InvalidTransition {
            from: Rts,
            to: Init
        }
    );
    assert_eq!(error.to_string(), "queue pair cannot go from Rts to Init");
}

#[test]
fn posting_needs_the_right_state_and_room() {
    let caps = QpCaps {
        send_wr_max: 2,
        recv_wr_max: 2,
        shared_receives: false,
    };
    let mut qp = QueuePair::new(QpKind::Rc, QPNS[0], caps);
    let send = SendWr::new(WrId(1), SendOp::Send, SgList::EMPTY);
    let recv = RecvWr {
        wr_id: WrId(2),
        local: SgList::EMPTY,
    };
    assert_eq!(qp.post_send(send), Err(PostError::State(QpState::Reset)));
    assert_eq!(qp.post_recv(recv), Err(PostError::State(QpState::Reset)));
    qp.to_init(InitAttr {
        access: Access::ALL,
        pkey: PKEY_DEFAULT,
    })
    .unwrap();
    assert_eq!(qp.post_send(send), Err(PostError::State(QpState::Init)));
    assert_eq!(qp.post_recv(recv), Ok(()));
    assert_eq!(qp.post_recv(recv), Ok(()));
    assert_eq!(qp.post_recv(recv), Err(PostError::QueueFull));
    assert_eq!(qp.receives_posted(), 2);

    // Completions not polled take room too.
    qp.to_error();
    assert_eq!(qp.post_recv(recv), Err(PostError::QueueFull));
    assert_eq!(qp.post_send(send), Ok(()));
    assert_eq!(qp.post_send(send), Ok(()));
    assert_eq!(qp.post_send(send), Err(PostError::QueueFull));
    let drained: Vec<_> = std::iter::from_fn(|| qp.poll_completion()).collect();
    assert_eq!(drained.len(), 4);
    assert!(drained.iter().all(|c| c.status == Status::Flushed));
    assert_eq!(qp.post_recv(recv), Ok(()));

    let mut qp = connected(0, Setup::default());
    let add = SendOp::FetchAdd {
        remote: remote(REGION, 0),
        add: 1,
    };
    let wrong = SendWr::new(WrId(1), add, piece(REGION, 0, 4));
    assert_eq!(qp.post_send(wrong), Err(PostError::Invalid));
}

#[test]
fn an_error_flushes_everything_once_and_reset_begins_anew() {
    let mut net = net(Setup::default());
    recv(&mut net, 10, 9000);
    recv(&mut net, 11, 9000);
    send(&mut net, 1, SendOp::Send, 3000);
    send(&mut net, 2, read_from(0), 10);
    // Two packets of the message arrive, then both ends fail.
    for _ in 0..2 {
        let transmit = net.ends[0].qp.poll_transmit(Nanos(1), Allow::All).unwrap();
        let bytes = assemble(&transmit, &net.ends[0].memory, &flow(0));
        let packet = Packet::new_checked(&bytes).unwrap();
        let end = &mut net.ends[1];
        end.qp.handle_packet(Nanos(1), &packet, &mut end.memory);
    }
    for end in &mut net.ends {
        end.qp.to_error();
        end.qp.to_error();
    }
    net.pump();
    assert_eq!(
        statuses(&net.completions(0)),
        [(1, Status::Flushed), (2, Status::Flushed)]
    );
    assert_eq!(
        statuses(&net.completions(1)),
        [(10, Status::Flushed), (11, Status::Flushed)]
    );
    assert_eq!(net.ends[0].qp.poll_timeout(), None);
    let late = request(Opcode::RcSendOnly, FIRST_PSN, Extension::Bare, b"late");
    assert_eq!(
        ask(&mut net, &late).0,
        Outcome::Dropped(DropReason::State(QpState::Err))
    );

    for (i, end) in net.ends.iter_mut().enumerate() {
        end.qp.to_reset();
        let fresh = Setup {
            psn: [0x5000, 0x6000],
            ..Setup::default()
        };
        end.qp
            .to_init(InitAttr {
                access: Access::ALL,
                pkey: PKEY_DEFAULT,
            })
            .unwrap();
        end.qp
            .to_rtr(RtrAttr {
                dest: QPNS[1 - i],
                path_mtu: fresh.mtu,
                rq_psn: Psn::new(fresh.psn[1 - i]),
                max_dest_rd_atomic: 4,
                min_rnr_timer: RnrTimer::new(12),
            })
            .unwrap();
        end.qp
            .to_rts(RtsAttr {
                sq_psn: Psn::new(fresh.psn[i]),
                timeout: 14,
                retry_cnt: 7,
                rnr_retry: 7,
                max_rd_atomic: 4,
                read_chunk_packets: 0,
            })
            .unwrap();
    }
    // An answer of the old life is stale.
    send(&mut net, 3, write_to(0), 100);
    while net.ends[0].qp.poll_transmit(Nanos(1), Allow::All).is_some() {}
    let aeth = Extension::Aeth(Aeth {
        syndrome: Syndrome::ACK,
        msn: 1,
    });
    let bytes = raw(
        Header::new(Opcode::RcAcknowledge, QPNS[0], Psn::new(FIRST_PSN), aeth),
        &[],
    );
    let packet = Packet::new_checked(&bytes).unwrap();
    let end = &mut net.ends[0];
    let outcome = end.qp.handle_packet(Nanos(2), &packet, &mut end.memory);
    assert_eq!(outcome, Outcome::Dropped(DropReason::Stale));
    net.run(1_000);
    assert_eq!(statuses(&net.completions(0)), [(3, Status::Success)]);
}

#[test]
fn packets_of_other_classes_partitions_and_states_are_dropped() {
    let mut net = net(Setup::default());
    let dropped = |reason| Outcome::Dropped(reason);
    let uc = request(Opcode::UcSendOnly, FIRST_PSN, Extension::Bare, b"x");
    assert_eq!(ask(&mut net, &uc).0, dropped(DropReason::Class));
    let deth = Extension::Deth(Deth {
        qkey: 1,
        source: QPNS[0],
    });
    let ud = request(Opcode::UdSendOnly, FIRST_PSN, deth, b"x");
    assert_eq!(ask(&mut net, &ud).0, dropped(DropReason::Class));
    let write = Extension::Reth(reth(0, 1));
    for (pkey, ours) in [
        (0xffff, true),
        (0x7fff, true),
        (0xfffe, false),
        (0x0001, false),
    ] {
        let mut net = self::net(Setup::default());
        let mut header = Header::new(Opcode::RcWriteOnly, QPNS[1], Psn::new(FIRST_PSN), write);
        header.pkey = pkey;
        let outcome = ask(&mut net, &raw(header, b"x")).0;
        assert_eq!(outcome == Outcome::Accepted, ours, "{pkey:#x}");
        assert_eq!(outcome == dropped(DropReason::Pkey), !ours, "{pkey:#x}");
    }
    let cnp = Header::new(Opcode::Cnp, QPNS[1], Psn::new(0), Extension::Cnp);
    assert_eq!(ask(&mut net, &raw(cnp, &[])).0, Outcome::Accepted);
    assert_eq!(net.ends[1].qp.counters().cnp_handled, 1);
}

#[test]
fn in_rtr_requests_are_served_but_answers_are_not_expected() {
    let mut qp = QueuePair::new(
        QpKind::Rc,
        QPNS[1],
        QpCaps {
            send_wr_max: 4,
            recv_wr_max: 4,
            shared_receives: false,
        },
    );
    to_rtr(&mut qp, FIRST_PSN, 1);
    let mut memory = TestMemory::default();
    memory.register(REGION, vec![0; 64]);
    let write = request(
        Opcode::RcWriteOnly,
        FIRST_PSN,
        Extension::Reth(reth(0, 4)),
        b"abcd",
    );
    let packet = Packet::new_checked(&write).unwrap();
    assert_eq!(
        qp.handle_packet(Nanos(1), &packet, &mut memory),
        Outcome::Accepted
    );
    assert!(qp.poll_transmit(Nanos(1), Allow::All).unwrap().is_response);
    let aeth = Extension::Aeth(Aeth {
        syndrome: Syndrome::ACK,
        msn: 1,
    });
    let ack = raw(
        Header::new(Opcode::RcAcknowledge, QPNS[1], Psn::new(0), aeth),
        &[],
    );
    let packet = Packet::new_checked(&ack).unwrap();
    let outcome = qp.handle_packet(Nanos(1), &packet, &mut memory);
    assert_eq!(outcome, Outcome::Dropped(DropReason::State(QpState::Rtr)));
}

#[test]
fn memory_that_vanishes_fails_the_queue_pair() {
    // The sender's.
    let mut net = net(Setup::default());
    send(&mut net, 1, write_to(0), 100);
    send(&mut net, 2, write_to(0), 100);
    let transmit = net.ends[0].qp.poll_transmit(Nanos(1), Allow::All).unwrap();
    net.ends[0].qp.handle_transmit_failure(&transmit);
    net.pump();
    let expected = [(1, Status::LocalProtection), (2, Status::Flushed)];
    assert_eq!(statuses(&net.completions(0)), expected);

    // The responder's, in the middle of a READ.
    let mut net = self::net(Setup::default());
    recv(&mut net, 10, 10);
    let read = request(
        Opcode::RcReadRequest,
        FIRST_PSN,
        Extension::Reth(reth(0, 3000)),
        &[],
    );
    let packet = Packet::new_checked(&read).unwrap();
    let end = &mut net.ends[1];
    end.qp.handle_packet(Nanos(1), &packet, &mut end.memory);
    end.qp.poll_transmit(Nanos(1), Allow::All).unwrap();
    let second = end.qp.poll_transmit(Nanos(1), Allow::All).unwrap();
    end.qp.handle_transmit_failure(&second);
    let nak = end.qp.poll_transmit(Nanos(1), Allow::All).unwrap();
    let bytes = assemble(&nak, &end.memory, &flow(1));
    let header = Packet::new_checked(&bytes).unwrap().header();
    assert_eq!(header.psn.value(), FIRST_PSN + 1);
    assert_eq!(syndrome(&header), Syndrome::Nak(NakCode::RemoteOperational));
    assert_eq!(end.qp.poll_transmit(Nanos(1), Allow::All), None);
    net.pump();
    assert_eq!(statuses(&net.completions(1)), [(10, Status::Flushed)]);
}

#[test]
fn memory_that_vanishes_under_a_repeated_answer_harms_nobody() {
    let mut net = net(Setup::default());
    let read = request(
        Opcode::RcReadRequest,
        FIRST_PSN,
        Extension::Reth(reth(0, 3000)),
        &[],
    );
    let packet = Packet::new_checked(&read).unwrap();
    let end = &mut net.ends[1];
    end.qp.handle_packet(Nanos(1), &packet, &mut end.memory);
    let first: Vec<_> =
        core::iter::from_fn(|| end.qp.poll_transmit(Nanos(1), Allow::All)).collect();
    assert!(first.iter().all(|t| !t.is_retransmission));
    // Asked again, although nothing was lost; then the peer says that it has all, and the memory
    // goes while the second answer is under way.
    end.qp.handle_packet(Nanos(2), &packet, &mut end.memory);
    let again = end.qp.poll_transmit(Nanos(2), Allow::All).unwrap();
    assert!(again.is_retransmission && again.header() == first[0].header());
    end.qp.handle_transmit_failure(&again);
    assert_eq!(end.qp.poll_transmit(Nanos(2), Allow::All), None);
    assert_eq!(end.qp.state(), QpState::Rts);
    let next = request(
        Opcode::RcReadRequest,
        FIRST_PSN + first.len() as u32,
        Extension::Reth(reth(0, 10)),
        &[],
    );
    let packet = Packet::new_checked(&next).unwrap();
    end.qp.handle_packet(Nanos(3), &packet, &mut end.memory);
    let answer = end.qp.poll_transmit(Nanos(3), Allow::Answers).unwrap();
    assert_eq!(
        (answer.payload_len(), answer.is_retransmission),
        (10, false)
    );
}

#[test]
fn answers_need_no_leave_to_send_requests() {
    let mut net = net(Setup::default());
    send(&mut net, 1, write_to(0), 100);
    let client = &mut net.ends[0].qp;
    assert_eq!(client.poll_transmit(Nanos(1), Allow::Answers), None);
    assert!(client.poll_transmit(Nanos(1), Allow::All).is_some());
    let due = client.poll_timeout().unwrap();
    client.handle_timeout(due);
    assert!(
        client.poll_transmit(due, Allow::Answers).is_some(),
        "a probe"
    );
}

#[test]
fn a_peer_that_vanishes_in_mid_traffic_leaves_everything_flushed_once() {
    for seed in 0..40 {
        let mut net = net(Setup {
            retry_cnt: 2,
            ..Setup::default()
        });
        let mut rng = Rng(seed);
        let mut left = rng.below(60);
        tap(&mut net, move |_, _| {
            left = left.saturating_sub(1);
            left == 0
        });
        for id in 0..20 {
            recv(&mut net, 100 + id, 1500);
            let op = match rng.below(3) {
                0 => SendOp::Send,
                1 => write_to(0),
                _ => read_from(0),
            };
            send(&mut net, id, op, 1500);
        }
        net.run(20_000);
        let done = net.completions(0);
        assert_eq!(
            done.iter().map(|c| c.wr_id.0).collect::<Vec<_>>(),
            (0..20).collect::<Vec<_>>()
        );
        let bad = done
            .iter()
            .position(|c| c.status != Status::Success)
            .unwrap();
        assert_eq!(done[bad].status, Status::RetryExceeded);
        assert!(done[bad + 1..].iter().all(|c| c.status == Status::Flushed));
        net.ends[1].qp.to_error();
        net.pump();
        let got = net.completions(1);
        assert_eq!(got.len(), 20);
        assert!(got.is_sorted_by_key(|c| c.wr_id.0));
    }
}

/// What the first peer was owed, what was kept of it, and that it reports gaps, is nothing to the next.
#[test]
fn a_reset_forgets_the_peer() {
    let mut net = net(Setup::default());
    for round in 0..3 {
        let psn = FIRST_PSN + 10 * round;
        let qp = &mut net.ends[1].qp;
        qp.to_reset();
        assert!(!qp.has_pending_transmit() && qp.poll_event().is_none());
        if round == 0 {
            qp.set_reports_gaps(true);
        }
        to_rtr(qp, psn, 4);
        let place = Extension::Reth(reth(64, 8));
        let early = request(Opcode::RcWriteOnly, psn + 2, place, &[1; 8]);
        let (outcome, answers) = ask(&mut net, &early);
        assert_eq!(outcome, Outcome::Ahead);
        let event = net.ends[1].qp.poll_event();
        assert_eq!(event, Some(QpEvent::CommunicationEstablished));
        let expected = match round {
            0 => Opcode::RcAtomicAcknowledge,
            _ => Opcode::RcAcknowledge,
        };
        let opcodes: Vec<_> = answers.iter().map(|answer| answer.opcode).collect();
        assert_eq!(opcodes, [expected], "a report, or a NAK");
        let word = Extension::Atomic(fetch_add(0, 1));
        let add = |psn| request(Opcode::RcFetchAdd, psn, word, &[]);
        if round > 0 {
            let stale = Outcome::Dropped(DropReason::Stale);
            let (outcome, answers) = ask(&mut net, &add(psn - 10));
            assert_eq!((outcome, answers.len()), (stale, 0), "it was another's");
        }
        assert_eq!(ask(&mut net, &add(psn)).0, Outcome::Accepted);
        let End { qp, memory, .. } = &mut net.ends[1];
        assert_eq!(qp.wants_kept(), None);
        // There is no receive; what says so is not sent any more.
        let send = request(Opcode::RcSendOnly, psn + 1, Extension::Bare, &[]);
        let send = Packet::new_checked(&send).unwrap();
        qp.note_kept(&Packet::new_checked(&early).unwrap());
        let outcome = qp.handle_packet(Nanos(5_000), &send, memory);
        assert_eq!(outcome, Outcome::Dropped(DropReason::NoReceive));
        assert!(qp.has_pending_transmit());
    }
    assert_eq!(net.ends[1].memory.atomics, 3);
}
