//! Refusals.

use super::*;

/// Post `op` and expect both ends to fail: the client with `status`, the NAK being `nak`.
fn refused(mut net: SimNet, op: SendOp, len: u32, nak: u8, status: Status) -> SimNet {
    let log = tap(&mut net, |_, _| false);
    recv(&mut net, 20, 100);
    send(&mut net, 1, write_to(0), 10);
    send(&mut net, 2, op, len);
    send(&mut net, 3, write_to(0), 10);
    net.run(1_000);
    let expected = [(1, Status::Success), (2, status), (3, Status::Flushed)];
    assert_eq!(statuses(&net.completions(0)), expected, "{op:?}");
    assert_eq!(log.borrow().last().unwrap().3, Some(nak), "{op:?}");
    assert_eq!(net.ends[0].qp.state(), QpState::Err);
    assert_eq!(net.ends[1].qp.state(), QpState::Err);
    net
}

#[test]
fn bad_keys_ranges_and_rights_are_remote_access_errors() {
    let at = |key: u32, va: u64| Remote {
        va,
        rkey: Rkey(key),
    };
    let base = base_of(REGION);
    for place in [
        at(REGION + 1, base),
        at(REGION, base - 1),
        at(REGION, base + u64::from(LEN) - 15),
        at(REGION, u64::MAX - 3),
        at(REGION, 0),
    ] {
        for op in [SendOp::Write(place), SendOp::Read(place)] {
            let net = refused(net(Setup::default()), op, 16, 0x62, Status::RemoteAccess);
            let before = pattern(1, LEN);
            let after = &net.ends[1].memory.regions[&REGION].bytes;
            assert_eq!(after[10..], before[10..], "nothing was written");
        }
    }
    for op in [
        write_to(0),
        read_from(0),
        SendOp::FetchAdd {
            remote: remote(REGION, 0),
            add: 1,
        },
    ] {
        let mut net = net(Setup::default());
        // The first WRITE, which must succeed, goes to another region.
        let region = net.ends[1].memory.regions.get_mut(&REGION).unwrap();
        region.access = Access::WRITE;
        if matches!(op, SendOp::Write(_)) {
            region.access = Access::READ;
            send(&mut net, 2, op, 8);
            net.run(1_000);
            assert_eq!(statuses(&net.completions(0)), [(2, Status::RemoteAccess)]);
        } else {
            refused(net, op, 8, 0x62, Status::RemoteAccess);
        }
    }
}

#[test]
fn a_queue_pair_without_the_right_answers_invalid_request() {
    let none = Access {
        remote_write: true,
        ..Access::default()
    };
    let setup = Setup {
        access: none,
        ..Setup::default()
    };
    let word = remote(REGION, 0);
    for op in [
        read_from(0),
        SendOp::FetchAdd {
            remote: word,
            add: 1,
        },
        SendOp::CompareSwap {
            remote: word,
            compare: 0,
            swap: 1,
        },
    ] {
        refused(net(setup), op, 8, 0x61, Status::RemoteInvalidRequest);
    }
    for op in [write_to(0), SendOp::AtomicWrite(word)] {
        let mut net = net(Setup {
            access: Access::READ,
            ..Setup::default()
        });
        send(&mut net, 1, op, 8);
        net.run(1_000);
        let refused = [(1, Status::RemoteInvalidRequest)];
        assert_eq!(statuses(&net.completions(0)), refused, "{op:?}");
    }
}

#[test]
fn reads_and_atomics_need_responder_resources() {
    let setup = Setup {
        rd_atomic: 0,
        ..Setup::default()
    };
    for op in [
        read_from(0),
        SendOp::FetchAdd {
            remote: remote(REGION, 0),
            add: 1,
        },
    ] {
        refused(net(setup), op, 8, 0x61, Status::RemoteInvalidRequest);
    }
}

#[test]
fn a_misaligned_atomic_is_an_invalid_request() {
    for offset in 1..8 {
        let op = SendOp::FetchAdd {
            remote: remote(REGION, offset),
            add: 1,
        };
        let net = refused(
            net(Setup::default()),
            op,
            8,
            0x61,
            Status::RemoteInvalidRequest,
        );
        assert_eq!(net.ends[1].memory.atomics, 0);
    }
}

#[test]
fn a_message_longer_than_its_receive_fails_both_ends() {
    for len in [101, 1024, 5000] {
        let net = refused(
            net(Setup::default()),
            SendOp::Send,
            len,
            0x61,
            Status::RemoteInvalidRequest,
        );
        let got = statuses(&net.ends[1].completions);
        assert_eq!(got, [(20, Status::LocalLength)]);
        let beyond = (32 << 10) + 100;
        let after = &net.ends[1].memory.regions[&REGION].bytes[beyond..];
        assert_eq!(
            *after,
            pattern(1, LEN)[beyond..],
            "nothing beyond the receive was written"
        );
    }
}

#[test]
fn a_receive_in_memory_that_is_not_writable_fails_both_ends() {
    let mut net = net(Setup::default());
    net.ends[1]
        .memory
        .regions
        .get_mut(&REGION)
        .unwrap()
        .local_write = false;
    recv(&mut net, 20, 100);
    send(&mut net, 1, SendOp::Send, 50);
    net.run(1_000);
    assert_eq!(
        statuses(&net.completions(0)),
        [(1, Status::RemoteOperation)]
    );
    assert_eq!(
        statuses(&net.completions(1)),
        [(20, Status::LocalProtection)]
    );
}

#[test]
fn invalidating_an_unknown_key_fails_both_ends() {
    let op = SendOp::SendInvalidate(Rkey(1234));
    let net = refused(net(Setup::default()), op, 8, 0x62, Status::RemoteAccess);
    assert_eq!(
        statuses(&net.ends[1].completions),
        [(20, Status::LocalProtection)]
    );
}

#[test]
fn every_nak_code_fails_the_right_request() {
    for (byte, status) in [
        (0x61, Status::RemoteInvalidRequest),
        (0x62, Status::RemoteAccess),
        (0x63, Status::RemoteOperation),
    ] {
        let mut net = net(Setup::default());
        for id in 1..=3 {
            send(&mut net, id, write_to(0), 2000);
        }
        while net.ends[0].qp.poll_transmit(Nanos(1), Allow::All).is_some() {}
        // The second message's second packet is refused.
        let aeth = Aeth {
            syndrome: Syndrome::from_byte(byte),
            msn: 1,
        };
        let psn = Psn::new(FIRST_PSN + 3);
        let nak = raw(
            Header::new(Opcode::RcAcknowledge, QPNS[0], psn, Extension::Aeth(aeth)),
            &[],
        );
        let packet = Packet::new_checked(&nak).unwrap();
        let end = &mut net.ends[0];
        assert_eq!(
            end.qp.handle_packet(Nanos(2), &packet, &mut end.memory),
            Outcome::Accepted
        );
        net.pump();
        let expected = [(1, Status::Success), (2, status), (3, Status::Flushed)];
        assert_eq!(statuses(&net.completions(0)), expected);
        assert_eq!(net.ends[0].qp.state(), QpState::Err);
    }
}

#[test]
fn unknown_syndromes_and_stale_answers_change_nothing() {
    let mut net = net(Setup::default());
    send(&mut net, 1, write_to(0), 2000);
    while net.ends[0].qp.poll_transmit(Nanos(1), Allow::All).is_some() {}
    let answer = |byte: u8, psn: u32| {
        let aeth = Aeth {
            syndrome: Syndrome::from_byte(byte),
            msn: 1,
        };
        raw(
            Header::new(
                Opcode::RcAcknowledge,
                QPNS[0],
                Psn::new(psn),
                Extension::Aeth(aeth),
            ),
            &[],
        )
    };
    let end = &mut net.ends[0];
    for (byte, psn, reason) in [
        (0x40, FIRST_PSN, DropReason::Unsupported),
        (0x64, FIRST_PSN, DropReason::Unsupported),
        (0x7f, FIRST_PSN + 1, DropReason::Unsupported),
        (0xff, FIRST_PSN, DropReason::Unsupported),
        (0x1f, FIRST_PSN - 1, DropReason::Stale),
        (0x61, FIRST_PSN - 1, DropReason::Stale),
        (0x1f, FIRST_PSN + 2, DropReason::Stale),
        (0x62, FIRST_PSN + 0x7f_ffff, DropReason::Stale),
        (0x60, FIRST_PSN + 0x80_0000, DropReason::Stale),
    ] {
        let bytes = answer(byte, psn);
        let packet = Packet::new_checked(&bytes).unwrap();
        let outcome = end.qp.handle_packet(Nanos(2), &packet, &mut end.memory);
        assert_eq!(outcome, Outcome::Dropped(reason), "{byte:#x} {psn:#x}");
        assert_eq!(end.qp.packets_in_flight(), 2);
    }
    assert_eq!(end.qp.counters().dropped_pkts, 9);
    // All credit codes acknowledge alike.
    let bytes = answer(0x05, FIRST_PSN + 1);
    let packet = Packet::new_checked(&bytes).unwrap();
    assert_eq!(
        end.qp.handle_packet(Nanos(2), &packet, &mut end.memory),
        Outcome::Accepted
    );
    assert_eq!(end.qp.packets_in_flight(), 0);
}

#[test]
fn requests_out_of_order_within_a_message_are_invalid() {
    use Opcode::*;
    let full = vec![0xaa; 1024];
    let big = Extension::Reth(reth(0, 4096));
    let open_send = (RcSendFirst, Extension::Bare);
    let open_write = (RcWriteFirst, big);
    type Start = (Opcode, Extension);
    let cases: [(Option<Start>, Opcode, Extension, usize); 14] = [
        (None, RcSendMiddle, Extension::Bare, 1024),
        (None, RcSendLast, Extension::Bare, 10),
        (None, RcWriteMiddle, Extension::Bare, 1024),
        (None, RcWriteLast, Extension::Bare, 10),
        (Some(open_send), RcSendFirst, Extension::Bare, 1024),
        (Some(open_send), RcSendOnly, Extension::Bare, 10),
        (Some(open_send), RcWriteMiddle, Extension::Bare, 1024),
        (
            Some(open_send),
            RcWriteOnly,
            Extension::Reth(reth(0, 10)),
            10,
        ),
        (
            Some(open_send),
            RcReadRequest,
            Extension::Reth(reth(0, 10)),
            0,
        ),
        (
            Some(open_send),
            RcFetchAdd,
            Extension::Atomic(fetch_add(0, 1)),
            0,
        ),
        (Some(open_write), RcSendLast, Extension::Bare, 10),
        (Some(open_write), RcWriteFirst, big, 1024),
        (
            Some(open_write),
            RcReadRequest,
            Extension::Reth(reth(0, 10)),
            0,
        ),
        // FLUSH is not served.
        (
            None,
            RcFlush,
            Extension::FethReth(Feth { bits: 1 }, reth(0, 10)),
            0,
        ),
    ];
    for (open, opcode, extension, len) in cases {
        let mut net = net(Setup::default());
        recv(&mut net, 20, 9000);
        recv(&mut net, 21, 9000);
        let mut psn = FIRST_PSN;
        if let Some((opcode, extension)) = open {
            let (outcome, _) = ask(&mut net, &request(opcode, psn, extension, &full));
            assert_eq!(outcome, Outcome::Accepted);
            psn += 1;
        }
        let (_, answers) = ask(&mut net, &request(opcode, psn, extension, &full[..len]));
        let last = answers.last().unwrap();
        assert_eq!(
            syndrome(last),
            Syndrome::Nak(NakCode::InvalidRequest),
            "{opcode:?}"
        );
        assert_eq!(last.psn.value(), psn);
        assert_eq!(net.ends[1].qp.state(), QpState::Err, "{opcode:?}");
        net.pump();
        let flushed = [(20, Status::Flushed), (21, Status::Flushed)];
        assert_eq!(statuses(&net.completions(1)), flushed, "{opcode:?}");
    }
}

#[test]
fn lengths_that_contradict_each_other_are_invalid() {
    use Opcode::*;
    let bytes = vec![0xbb; 4096];
    let cases = [
        // Not the path MTU, or more than it.
        (RcSendFirst, Extension::Bare, 512),
        (RcSendFirst, Extension::Bare, 2048),
        (RcSendOnly, Extension::Bare, 1025),
        (RcWriteFirst, Extension::Reth(reth(0, 4096)), 512),
        (RcWriteOnly, Extension::Reth(reth(0, 2000)), 2000),
        // RETH and payload disagree.
        (RcWriteOnly, Extension::Reth(reth(0, 11)), 10),
        (RcWriteOnly, Extension::Reth(reth(0, 9)), 10),
        (RcWriteOnly, Extension::Reth(reth(0, 0)), 10),
        (RcWriteOnly, Extension::Reth(reth(0, 10)), 0),
        (RcWriteFirst, Extension::Reth(reth(0, 1024)), 1024),
        (RcWriteFirst, Extension::Reth(reth(0, 0)), 1024),
        // Longer than any message.
        (
            RcWriteFirst,
            Extension::Reth(reth(0, MESSAGE_LEN_MAX + 1)),
            1024,
        ),
        (
            RcReadRequest,
            Extension::Reth(reth(0, MESSAGE_LEN_MAX + 1)),
            0,
        ),
        (RcReadRequest, Extension::Reth(reth(0, u32::MAX)), 0),
    ];
    for (opcode, extension, len) in cases {
        let mut net = net(Setup::default());
        recv(&mut net, 20, 9000);
        let (_, answers) = ask(
            &mut net,
            &request(opcode, FIRST_PSN, extension, &bytes[..len]),
        );
        let nak = Syndrome::Nak(NakCode::InvalidRequest);
        assert_eq!(syndrome(&answers[0]), nak, "{opcode:?} {extension:?} {len}");
        let untouched = &net.ends[1].memory.regions[&REGION].bytes;
        assert_eq!(*untouched, pattern(1, LEN), "{opcode:?} {len}");
    }
}

#[test]
fn the_longest_lengths_are_range_errors_not_overflows() {
    for len in [MESSAGE_LEN_MAX, MESSAGE_LEN_MAX - 1] {
        for (opcode, payload) in [
            (Opcode::RcReadRequest, vec![]),
            (Opcode::RcWriteFirst, vec![0; 1024]),
        ] {
            for va in [base_of(REGION), u64::MAX, u64::MAX - u64::from(len) + 1] {
                let mut net = net(Setup::default());
                let extension = Extension::Reth(Reth {
                    va,
                    rkey: REGION,
                    len,
                });
                let (_, answers) = ask(&mut net, &request(opcode, FIRST_PSN, extension, &payload));
                assert_eq!(syndrome(&answers[0]), Syndrome::Nak(NakCode::RemoteAccess));
                assert_eq!(net.ends[1].qp.state(), QpState::Err);
            }
        }
    }
}

#[test]
fn zero_length_reads_and_writes_check_neither_key_nor_address() {
    let nowhere = Remote {
        va: 3,
        rkey: Rkey(0xdead),
    };
    let mut net = net(Setup::default());
    send(&mut net, 1, SendOp::Write(nowhere), 0);
    send(&mut net, 2, SendOp::Read(nowhere), 0);
    net.run(1_000);
    assert_eq!(
        statuses(&net.completions(0)),
        [(1, Status::Success), (2, Status::Success)]
    );
}
