//! Segmentation and placement.

use super::*;

#[test]
fn messages_of_every_length_around_a_packet_arrive() {
    for mtu in [Mtu::B256, Mtu::B512, Mtu::B1024, Mtu::B2048, Mtu::B4096] {
        let n = mtu.bytes();
        for len in [
            0,
            1,
            2,
            3,
            4,
            5,
            n - 1,
            n,
            n + 1,
            2 * n - 1,
            2 * n,
            3 * n + 2,
        ] {
            let mut net = net(Setup {
                mtu,
                ..Setup::default()
            });
            recv(&mut net, 10, LEN / 2);
            recv(&mut net, 11, 0);
            send(&mut net, 1, SendOp::Send, len);
            send(
                &mut net,
                2,
                SendOp::WriteImm(remote(REGION, 0), 0xfeed_0001),
                len,
            );
            send(&mut net, 3, read_from(32 << 10), len);
            let sent = net.ends[0].memory.regions[&REGION].bytes[..len as usize].to_vec();
            net.run(1_000);
            let done = net.completions(0);
            let ok = [
                (1, Status::Success),
                (2, Status::Success),
                (3, Status::Success),
            ];
            assert_eq!(statuses(&done), ok, "{mtu:?} {len}");
            assert_eq!(done[2].byte_len, len);
            let got = net.completions(1);
            assert_eq!((got[0].byte_len, got[0].imm), (len, None));
            assert_eq!((got[1].byte_len, got[1].imm), (len, Some(0xfeed_0001)));
            let there = &net.ends[1].memory.regions[&REGION].bytes;
            assert_eq!(there[32 << 10..][..len as usize], sent);
            assert_eq!(there[..len as usize], sent);
        }
    }
}

#[test]
fn opcodes_and_psns_follow_the_rules() {
    let mut net = net(Setup {
        psn: [0xff_fffe, 0x200],
        ..Setup::default()
    });
    let log = tap(&mut net, |_, _| false);
    recv(&mut net, 10, 4096);
    recv(&mut net, 11, 4096);
    send(&mut net, 1, SendOp::SendImm(1), 2500);
    send(&mut net, 2, read_from(0), 3000);
    send(&mut net, 3, SendOp::SendInvalidate(Rkey(99)), 10);
    net.ends[1].memory.register(99, vec![0; 8]);
    net.run(1_000);
    use Opcode::*;
    let client: Vec<_> = log
        .borrow()
        .iter()
        .filter(|e| e.0 == 0)
        .map(|e| (e.1, e.2))
        .collect();
    assert_eq!(
        client,
        [
            (RcSendFirst, 0xff_fffe),
            (RcSendMiddle, 0xff_ffff),
            (RcSendLastImm, 0),
            (RcReadRequest, 1),
            (RcSendOnlyInvalidate, 4),
        ]
    );
    let server: Vec<_> = log
        .borrow()
        .iter()
        .filter(|e| e.0 == 1)
        .map(|e| (e.1, e.2, e.3))
        .collect();
    assert_eq!(
        server,
        [
            (RcAcknowledge, 0, Some(0x1f)),
            (RcReadResponseFirst, 1, Some(0x1f)),
            (RcReadResponseMiddle, 2, None),
            (RcReadResponseLast, 3, Some(0x1f)),
            (RcAcknowledge, 4, Some(0x1f)),
        ]
    );
    assert_eq!(net.completions(1)[1].invalidated, Some(Rkey(99)));
    assert!(!net.ends[1].memory.regions.contains_key(&99));
}

#[test]
fn unsignalled_requests_complete_silently_and_in_order() {
    let mut net = net(Setup::default());
    for id in 0..6 {
        let mut wr = SendWr::new(WrId(id), write_to(0), piece(REGION, 0, 100));
        wr.signalled = id % 3 == 2;
        net.ends[0].qp.post_send(wr).unwrap();
    }
    net.run(1_000);
    assert_eq!(
        statuses(&net.completions(0)),
        [(2, Status::Success), (5, Status::Success)]
    );
}

/// The mark is of messages that take a receive: elsewhere it would say nothing.
#[test]
fn solicited_events_are_marked_on_the_last_packet_of_what_takes_a_receive() {
    use Opcode::*;
    for (op, marked) in [
        (SendOp::Send, Some(RcSendLast)),
        (SendOp::SendImm(1), Some(RcSendLastImm)),
        (SendOp::WriteImm(remote(REGION, 0), 1), Some(RcWriteLastImm)),
        (write_to(0), None),
        (read_from(0), None),
    ] {
        let mut net = net(Setup::default());
        let marks = Rc::new(RefCell::new(Vec::new()));
        let writer = Rc::clone(&marks);
        tap(&mut net, move |_, packet| {
            if packet.solicited() {
                writer.borrow_mut().push(packet.opcode());
            }
            false
        });
        recv(&mut net, 10, 4096);
        let mut wr = SendWr::new(WrId(1), op, piece(REGION, 0, 3000));
        wr.solicited = true;
        net.ends[0].qp.post_send(wr).unwrap();
        net.run(1_000);
        assert_eq!(*marks.borrow(), Vec::from_iter(marked), "{op:?}");
        let done = net.completions(1);
        assert_eq!(done.first().map(|c| c.solicited), marked.map(|_| true));
    }
}

#[test]
fn a_fence_waits_for_reads() {
    for fence in [false, true] {
        let mut net = net(Setup::default());
        let log = tap(&mut net, |_, _| false);
        send(&mut net, 1, read_from(0), 3000);
        let mut wr = SendWr::new(WrId(2), write_to(0), piece(REGION, 9000, 10));
        wr.fence = fence;
        net.ends[0].qp.post_send(wr).unwrap();
        net.run(1_000);
        let at = |opcode| log.borrow().iter().position(|e| e.1 == opcode).unwrap();
        let waited = at(Opcode::RcWriteOnly) > at(Opcode::RcReadResponseLast);
        assert_eq!(waited, fence);
    }
}

#[test]
fn reads_under_way_are_limited_and_chunked() {
    let setup = Setup {
        rd_atomic: 2,
        read_chunk_packets: 3,
        ..Setup::default()
    };
    let mut net = net(setup);
    let log = tap(&mut net, |_, _| false);
    send(&mut net, 1, read_from(0), 20 * 1024 + 5);
    net.run(1_000);
    assert_eq!(count(&log, Opcode::RcReadRequest), 7);
    let (mut open, mut most) = (0, 0);
    for (_, opcode, ..) in log.borrow().iter() {
        match opcode {
            Opcode::RcReadRequest => open += 1,
            Opcode::RcReadResponseLast | Opcode::RcReadResponseOnly => open -= 1,
            _ => {}
        }
        most = most.max(open);
    }
    assert_eq!((open, most), (0, 2));
    let here = &net.ends[0].memory.regions[&REGION].bytes[..20 * 1024 + 5];
    assert_eq!(
        *here,
        net.ends[1].memory.regions[&REGION].bytes[..20 * 1024 + 5]
    );
    assert_eq!(statuses(&net.completions(0)), [(1, Status::Success)]);
}

#[test]
fn without_leave_to_send_data_only_control_goes() {
    let mut net = net(Setup::default());
    send(&mut net, 1, write_to(0), 5000);
    let client = &mut net.ends[0].qp;
    assert_eq!(client.poll_transmit(Nanos(1), Allow::ControlOnly), None);
    assert!(client.has_pending_transmit());
    assert!(client.poll_transmit(Nanos(1), Allow::All).is_some());
    assert_eq!(client.packets_in_flight(), 1);
    // The probe may go: it is how a full peer is found to be empty again.
    let due = client.poll_timeout().unwrap();
    client.handle_timeout(due);
    let probe = client.poll_transmit(due, Allow::ControlOnly).unwrap();
    assert!(probe.is_retransmission);
    assert_eq!(client.poll_transmit(due, Allow::ControlOnly), None);

    // At the server, READ responses wait and so do the ACKs behind them.
    let bytes = request(
        Opcode::RcReadRequest,
        FIRST_PSN,
        Extension::Reth(reth(0, 100)),
        &[],
    );
    let server = &mut net.ends[1];
    let packet = Packet::new_checked(&bytes).unwrap();
    server
        .qp
        .handle_packet(Nanos(1), &packet, &mut server.memory);
    assert_eq!(server.qp.poll_transmit(Nanos(1), Allow::ControlOnly), None);
    let response = server.qp.poll_transmit(Nanos(1), Allow::All).unwrap();
    assert!(response.is_response && response.payload_len() == 100);
}

#[test]
fn the_window_closes_at_128_packets_and_asks_for_acks_on_the_way() {
    let mut net = net(Setup {
        mtu: Mtu::B256,
        ..Setup::default()
    });
    send(&mut net, 1, write_to(0), LEN);
    let (mut sent, mut asked) = (0, Vec::new());
    while let Some(transmit) = net.ends[0].qp.poll_transmit(Nanos(1), Allow::All) {
        let bytes = assemble(&transmit, &net.ends[0].memory, &flow(0));
        if Packet::new_checked(&bytes).unwrap().ack_req() {
            asked.push(sent);
        }
        sent += 1;
    }
    assert_eq!(sent, WINDOW);
    assert_eq!(asked, [31, 63, 95, 127]);
}
