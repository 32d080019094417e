//! Duplicates.

use super::*;

#[test]
fn duplicates_are_acknowledged_again_and_not_executed() {
    let mut net = net(Setup::default());
    recv(&mut net, 20, 100);
    recv(&mut net, 21, 100);
    let send = request(Opcode::RcSendOnly, FIRST_PSN, Extension::Bare, b"once");
    let first = ask(&mut net, &send).1;
    let write = Extension::Reth(reth(0, 4));
    let write = request(Opcode::RcWriteOnly, FIRST_PSN + 1, write, b"abcd");
    ask(&mut net, &write);
    net.ends[1].memory.regions.get_mut(&REGION).unwrap().bytes[..4].copy_from_slice(b"zzzz");
    for again in [&send, &write] {
        let (outcome, answers) = ask(&mut net, again);
        assert_eq!(outcome, Outcome::Accepted);
        // The latest PSN and MSN, not those of the duplicate.
        assert_eq!(answers[0].psn.value(), FIRST_PSN + 1);
        assert_eq!(
            answers[0].extension,
            Extension::Aeth(Aeth {
                syndrome: Syndrome::ACK,
                msn: 2
            })
        );
    }
    assert_eq!(
        first[0].extension,
        Extension::Aeth(Aeth {
            syndrome: Syndrome::ACK,
            msn: 1
        })
    );
    net.pump();
    assert_eq!(net.completions(1).len(), 1);
    assert_eq!(net.ends[1].memory.regions[&REGION].bytes[..4], *b"zzzz");
    assert_eq!(net.ends[1].qp.counters().duplicate_request, 2);
}

/// What is answered by more than an ACK, at that PSN.
fn with_own_answers(psn: u32) -> [Vec<u8>; 5] {
    let reth = Extension::Reth(reth(0, 8));
    let feth = Feth::new(true, false, false);
    [
        request(Opcode::RcReadRequest, psn, reth, &[]),
        request(
            Opcode::RcFetchAdd,
            psn,
            Extension::Atomic(fetch_add(0, 5)),
            &[],
        ),
        request(
            Opcode::RcCompareSwap,
            psn,
            Extension::Atomic(fetch_add(0, 5)),
            &[],
        ),
        request(Opcode::RcAtomicWrite, psn, reth, &[7; 8]),
        request(
            Opcode::RcFlush,
            psn,
            Extension::FethReth(feth, self::reth(0, 8)),
            &[],
        ),
    ]
}

#[test]
fn no_ack_has_the_number_of_a_read_or_an_atomic() {
    // rxe takes it for the answer that was lost, or is still to come.
    for nth in 0..5 {
        let mut net = net(Setup::default());
        grant_flush(&mut net);
        recv(&mut net, 20, 100);
        let send = request(Opcode::RcSendOnly, FIRST_PSN, Extension::Bare, b"once");
        ask(&mut net, &send);
        let (outcome, answers) = ask(&mut net, &with_own_answers(FIRST_PSN + 1)[nth]);
        assert_eq!((outcome, answers.len()), (Outcome::Accepted, 1));
        let (outcome, answers) = ask(&mut net, &send);
        assert_eq!((outcome, answers.len()), (Outcome::Accepted, 1));
        assert_eq!(answers[0].psn.value(), FIRST_PSN);
        assert_eq!(
            answers[0].extension,
            Extension::Aeth(Aeth {
                syndrome: Syndrome::ACK,
                msn: 1
            })
        );
        // A gap that such a request closes.
        let early = request(Opcode::RcSendOnly, FIRST_PSN + 3, Extension::Bare, b"soon");
        let (_, nak) = ask(&mut net, &early);
        assert_eq!(nak[0].psn.value(), FIRST_PSN + 2);
        let (_, answers) = ask(&mut net, &with_own_answers(FIRST_PSN + 2)[nth]);
        let is_ack = |header: &&Header| header.opcode == Opcode::RcAcknowledge;
        let acks: Vec<_> = answers.iter().filter(is_ack).collect();
        assert_eq!(acks.len(), 1);
        assert_eq!(acks[0].psn.value(), FIRST_PSN);
        // What follows is acknowledged as ever.
        recv(&mut net, 21, 100);
        let (_, answers) = ask(&mut net, &early);
        assert_eq!(answers[0].psn.value(), FIRST_PSN + 3);
    }
}

#[test]
fn an_ack_half_the_numbers_behind_is_none() {
    let mut net = net(Setup::default());
    let send = |psn| request(Opcode::RcSendOnly, psn, Extension::Bare, b"once");
    recv(&mut net, 20, 100);
    ask(&mut net, &send(FIRST_PSN));
    // READs of 64 packets each.
    let mut psn = FIRST_PSN + 1;
    while psn < FIRST_PSN + (1 << 23) {
        let read = Extension::Reth(reth(0, 64 * 1024));
        let read = request(Opcode::RcReadRequest, psn, read, &[]);
        let packet = Packet::new_checked(&read).unwrap();
        let end = &mut net.ends[1];
        let outcome = end.qp.handle_packet(Nanos(5_000), &packet, &mut end.memory);
        assert_eq!(outcome, Outcome::Accepted);
        while end.qp.poll_transmit(Nanos(5_000), Allow::All).is_some() {}
        psn += 64;
    }
    let (_, answers) = ask(&mut net, &send(psn - 1));
    assert_eq!(answers[0].psn.value(), psn - 1);
}

#[test]
fn duplicate_atomics_return_the_saved_value() {
    let mut net = net(Setup {
        rd_atomic: 2,
        ..Setup::default()
    });
    net.ends[1].memory.regions.get_mut(&REGION).unwrap().bytes[..8].fill(0);
    let add = |psn: u32| {
        request(
            Opcode::RcFetchAdd,
            psn,
            Extension::Atomic(fetch_add(0, 5)),
            &[],
        )
    };
    let original = |answers: &[Header]| match answers[0].extension {
        Extension::AtomicAck(_, original) => original,
        other => panic!("{other:?}"),
    };
    for i in 0..3 {
        assert_eq!(
            original(&ask(&mut net, &add(FIRST_PSN + i)).1),
            u64::from(i) * 5
        );
    }
    for _ in 0..3 {
        assert_eq!(original(&ask(&mut net, &add(FIRST_PSN + 1)).1), 5);
        assert_eq!(original(&ask(&mut net, &add(FIRST_PSN + 2)).1), 10);
    }
    assert_eq!(net.ends[1].memory.atomics, 3);
    // Two are remembered; the first is forgotten, and silence is the answer.
    let (outcome, answers) = ask(&mut net, &add(FIRST_PSN));
    assert_eq!(outcome, Outcome::Dropped(DropReason::Stale));
    assert!(answers.is_empty());
}

#[test]
fn duplicate_reads_are_answered_from_within_the_original() {
    let mut net = net(Setup::default());
    let read = |psn: u32, offset: u64, len: u32| {
        request(
            Opcode::RcReadRequest,
            psn,
            Extension::Reth(reth(offset, len)),
            &[],
        )
    };
    let (_, answers) = ask(&mut net, &read(FIRST_PSN, 100, 3000));
    assert_eq!(answers.len(), 3);
    let psns = |answers: &[Header]| answers.iter().map(|h| h.psn.value()).collect::<Vec<_>>();
    // Whole, tail, one packet of the middle.
    assert_eq!(
        psns(&ask(&mut net, &read(FIRST_PSN, 100, 3000)).1),
        [0x100, 0x101, 0x102]
    );
    let (_, tail) = ask(&mut net, &read(FIRST_PSN + 1, 1124, 1976));
    assert_eq!(psns(&tail), [0x101, 0x102]);
    assert_eq!(tail[0].opcode, Opcode::RcReadResponseFirst);
    let (_, one) = ask(&mut net, &read(FIRST_PSN + 1, 1124, 1024));
    assert_eq!(
        (psns(&one), one[0].opcode),
        (vec![0x101], Opcode::RcReadResponseOnly)
    );
    // Not within: other address, too long, other key, PSN beyond.
    let mut foreign = reth(100, 3000);
    foreign.rkey += 1;
    let twin = Region {
        base: base_of(REGION),
        bytes: vec![0; LEN as usize],
        access: Access::ALL,
        local_write: true,
    };
    net.ends[1].memory.regions.insert(REGION + 1, twin);
    let foreign = request(
        Opcode::RcReadRequest,
        FIRST_PSN,
        Extension::Reth(foreign),
        &[],
    );
    for bad in [
        read(FIRST_PSN, 0, 100),
        read(FIRST_PSN, 101, 100),
        read(FIRST_PSN, 100, 3001),
        read(FIRST_PSN + 1, 100, 1024),
        read(FIRST_PSN + 1, 1124, 1977),
        read(FIRST_PSN - 1, 100, 10),
        foreign,
    ] {
        let (outcome, answers) = ask(&mut net, &bad);
        assert_eq!(outcome, Outcome::Dropped(DropReason::Stale));
        assert!(answers.is_empty());
    }
}

#[test]
fn nothing_beyond_the_end_of_a_read_is_a_duplicate_of_it() {
    let mut net = net(Setup::default());
    let read = |psn: u32, offset: u64, len: u32| {
        request(
            Opcode::RcReadRequest,
            psn,
            Extension::Reth(reth(offset, len)),
            &[],
        )
    };
    ask(&mut net, &read(FIRST_PSN, 0, 1024));
    let write = Extension::Reth(reth(0, 4));
    ask(
        &mut net,
        &request(Opcode::RcWriteOnly, FIRST_PSN + 1, write, b"abcd"),
    );
    let beyond = ask(&mut net, &read(FIRST_PSN + 1, 1024, 0));
    assert_eq!(beyond.0, Outcome::Dropped(DropReason::Stale));
}

#[test]
fn a_repeated_read_still_being_answered_is_not_answered_twice() {
    let mut net = net(Setup::default());
    let read = request(
        Opcode::RcReadRequest,
        FIRST_PSN,
        Extension::Reth(reth(0, 3000)),
        &[],
    );
    let packet = Packet::new_checked(&read).unwrap();
    let end = &mut net.ends[1];
    for _ in 0..5 {
        end.qp.handle_packet(Nanos(1), &packet, &mut end.memory);
    }
    let mut packets = 0;
    while end.qp.poll_transmit(Nanos(1), Allow::All).is_some() {
        packets += 1;
    }
    assert_eq!(packets, 3);
}

#[test]
fn a_repeated_atomic_still_waiting_is_not_answered_twice() {
    let mut net = net(Setup::default());
    let end = &mut net.ends[1];
    for i in [0, 1, 0, 1, 1] {
        let atomic = Extension::Atomic(fetch_add(0, 5));
        let bytes = request(Opcode::RcFetchAdd, FIRST_PSN + i, atomic, &[]);
        let packet = Packet::new_checked(&bytes).unwrap();
        end.qp.handle_packet(Nanos(1), &packet, &mut end.memory);
    }
    let answers = std::iter::from_fn(|| end.qp.poll_transmit(Nanos(1), Allow::All)).count();
    assert_eq!((answers, end.memory.atomics), (2, 2));
}

#[test]
fn answers_wait_in_a_bounded_line() {
    let mut net = net(Setup {
        rd_atomic: 4,
        ..Setup::default()
    });
    let mut busy = 0;
    for i in 0..100 {
        let read = request(
            Opcode::RcReadRequest,
            FIRST_PSN + i,
            Extension::Reth(reth(0, 100)),
            &[],
        );
        let packet = Packet::new_checked(&read).unwrap();
        let end = &mut net.ends[1];
        let outcome = end.qp.handle_packet(Nanos(1), &packet, &mut end.memory);
        busy += u32::from(outcome == Outcome::Dropped(DropReason::Busy));
    }
    assert_eq!(busy, 100 - 16);
    let end = &mut net.ends[1];
    let mut answers = 0;
    while end.qp.poll_transmit(Nanos(1), Allow::All).is_some() {
        answers += 1;
    }
    assert_eq!(answers, 16);
    // The refused requests were not executed: the next one expected is the first of them.
    let read = request(
        Opcode::RcReadRequest,
        FIRST_PSN + 16,
        Extension::Reth(reth(0, 100)),
        &[],
    );
    assert_eq!(ask(&mut net, &read).0, Outcome::Accepted);
}

#[test]
fn adjacent_acks_merge() {
    let mut net = net(Setup::default());
    let end = &mut net.ends[1];
    for i in 0..10 {
        let write = request(
            Opcode::RcWriteOnly,
            FIRST_PSN + i,
            Extension::Reth(reth(0, 4)),
            b"abcd",
        );
        let packet = Packet::new_checked(&write).unwrap();
        end.qp.handle_packet(Nanos(1), &packet, &mut end.memory);
    }
    let ack = end.qp.poll_transmit(Nanos(1), Allow::ControlOnly).unwrap();
    let bytes = assemble(&ack, &end.memory, &flow(1));
    let header = Packet::new_checked(&bytes).unwrap().header();
    assert_eq!(header.psn.value(), FIRST_PSN + 9);
    assert_eq!(
        header.extension,
        Extension::Aeth(Aeth {
            syndrome: Syndrome::ACK,
            msn: 10
        })
    );
    assert_eq!(end.qp.poll_transmit(Nanos(1), Allow::All), None);
}

#[test]
fn an_ack_comes_unasked_after_64_packets() {
    let mut net = net(Setup {
        mtu: Mtu::B256,
        ..Setup::default()
    });
    let end = &mut net.ends[1];
    let len = 256 * 200;
    let mut acks = Vec::new();
    for i in 0..150 {
        let (opcode, extension) = match i {
            0 => (Opcode::RcWriteFirst, Extension::Reth(reth(0, len))),
            _ => (Opcode::RcWriteMiddle, Extension::Bare),
        };
        let bytes = raw(
            Header::new(opcode, QPNS[1], Psn::new(FIRST_PSN + i), extension),
            &[7; 256],
        );
        let packet = Packet::new_checked(&bytes).unwrap();
        end.qp.handle_packet(Nanos(1), &packet, &mut end.memory);
        if end.qp.poll_transmit(Nanos(1), Allow::All).is_some() {
            acks.push(i);
        }
    }
    assert_eq!(acks, [63, 127]);
}

#[test]
fn the_window_edge_of_2_to_the_23_divides_new_from_old() {
    let mut net = net(Setup::default());
    let write = |psn: u32| {
        let psn = psn & Psn::MASK;
        request(
            Opcode::RcWriteOnly,
            psn,
            Extension::Reth(reth(0, 4)),
            b"abcd",
        )
    };
    let ahead = ask(&mut net, &write(FIRST_PSN + 0x7f_ffff));
    assert_eq!(ahead.0, Outcome::Dropped(DropReason::OutOfSequence));
    assert_eq!(syndrome(&ahead.1[0]), Syndrome::Nak(NakCode::SequenceError));
    assert_eq!(ahead.1[0].psn.value(), FIRST_PSN);
    let behind = ask(&mut net, &write(FIRST_PSN + 0x80_0000));
    assert_eq!(behind.0, Outcome::Accepted);
    assert_eq!(syndrome(&behind.1[0]), Syndrome::ACK);
    assert_eq!(net.ends[1].qp.counters().duplicate_request, 1);
}

#[test]
fn a_wrong_read_response_is_a_bad_response() {
    for (opcode, len) in [
        (Opcode::RcReadResponseOnly, 99),
        (Opcode::RcReadResponseOnly, 101),
        (Opcode::RcReadResponseMiddle, 1024),
        (Opcode::RcAtomicAcknowledge, 0),
    ] {
        let mut net = net(Setup::default());
        send(&mut net, 1, read_from(0), 100);
        while net.ends[0].qp.poll_transmit(Nanos(1), Allow::All).is_some() {}
        let aeth = Aeth {
            syndrome: Syndrome::ACK,
            msn: 1,
        };
        let extension = match opcode.row().shape {
            Shape::Aeth => Extension::Aeth(aeth),
            Shape::AtomicAck => Extension::AtomicAck(aeth, 5),
            _ => Extension::Bare,
        };
        let bytes = raw(
            Header::new(opcode, QPNS[0], Psn::new(FIRST_PSN), extension),
            &vec![1; len],
        );
        let packet = Packet::new_checked(&bytes).unwrap();
        let end = &mut net.ends[0];
        end.qp.handle_packet(Nanos(2), &packet, &mut end.memory);
        net.pump();
        assert_eq!(
            statuses(&net.completions(0)),
            [(1, Status::BadResponse)],
            "{opcode:?}"
        );
    }
}

#[test]
fn an_ack_is_no_answer_to_a_read() {
    let mut net = net(Setup::default());
    send(&mut net, 1, read_from(0), 100);
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
    end.qp.handle_packet(Nanos(2), &packet, &mut end.memory);
    assert_eq!(end.qp.poll_completion(), None);
    // It says that the response was lost: the request goes out again, once.
    assert!(
        end.qp
            .poll_transmit(Nanos(2), Allow::All)
            .unwrap()
            .is_retransmission
    );
    end.qp.handle_packet(Nanos(2), &packet, &mut end.memory);
    assert_eq!(end.qp.poll_transmit(Nanos(2), Allow::All), None);
}
