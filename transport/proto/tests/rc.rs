//! The rules of a reliable connection, one by one: what is refused, retried, replayed and flushed.

mod common;

use std::cell::RefCell;
use std::rc::Rc;

use common::*;
use lowtide_transport_proto::qp::*;
use lowtide_transport_proto::time::Nanos;
use lowtide_transport_proto::wire::*;

/// A region for everything, at both ends.
const REGION: u32 = 7;
const LEN: u32 = 64 << 10;

fn pattern(seed: u64, len: u32) -> Vec<u8> {
    let mut rng = Rng(seed);
    (0..len).map(|_| rng.next() as u8).collect()
}

/// Two connected ends with one region each, of different bytes.
fn net(setup: Setup) -> SimNet {
    let mut net = SimNet::new(setup, Faults::default(), 1);
    for end in 0..2 {
        net.ends[end]
            .memory
            .register(REGION, pattern(end as u64, LEN));
    }
    net
}

fn send(net: &mut SimNet, id: u64, op: SendOp, len: u32) {
    let wr = SendWr::new(WrId(id), op, piece(REGION, 0, len));
    net.ends[0].qp.post_send(wr).unwrap();
}

fn recv(net: &mut SimNet, id: u64, len: u32) {
    let wr = RecvWr {
        wr_id: WrId(id),
        local: piece(REGION, 32 << 10, len),
    };
    net.ends[1].qp.post_recv(wr).unwrap();
}

fn write_to(offset: u64) -> SendOp {
    SendOp::Write(remote(REGION, offset))
}

fn read_from(offset: u64) -> SendOp {
    SendOp::Read(remote(REGION, offset))
}

fn statuses(completions: &[Completion]) -> Vec<(u64, Status)> {
    completions.iter().map(|c| (c.wr_id.0, c.status)).collect()
}

/// Everything that each end sent, in order: opcode, PSN, syndrome byte.
type Log = Rc<RefCell<Vec<(usize, Opcode, u32, Option<u8>)>>>;

/// Record all packets; drop those for which `drops` says so.
fn tap(net: &mut SimNet, mut drops: impl FnMut(usize, &Packet<'_>) -> bool + 'static) -> Log {
    let log = Log::default();
    let writer = Rc::clone(&log);
    net.filter = Some(Box::new(move |from, packet: &Packet<'_>| {
        let syndrome = packet.aeth().map(|aeth| aeth.syndrome.byte());
        writer
            .borrow_mut()
            .push((from, packet.opcode(), packet.psn().value(), syndrome));
        !drops(from, packet)
    }));
    log
}

fn count(log: &Log, opcode: Opcode) -> usize {
    log.borrow()
        .iter()
        .filter(|entry| entry.1 == opcode)
        .count()
}

/// A request packet made by hand, as the client would send it.
fn request(opcode: Opcode, psn: u32, extension: Extension, payload: &[u8]) -> Vec<u8> {
    let mut header = Header::new(opcode, QPNS[1], Psn::new(psn), extension);
    header.ack_req = true;
    raw(header, payload)
}

fn raw(mut header: Header, payload: &[u8]) -> Vec<u8> {
    header.pad = pad_len(payload.len()) as u8;
    let mut bytes = vec![0; header.len()];
    header.emit(&mut bytes);
    bytes.extend_from_slice(payload);
    bytes.resize(bytes.len() + usize::from(header.pad) + ICRC_LEN, 0);
    bytes
}

/// Hand `bytes` to the server and return the outcome and its answers.
fn ask(net: &mut SimNet, bytes: &[u8]) -> (Outcome, Vec<Header>) {
    let packet = Packet::new_checked(bytes).unwrap();
    let end = &mut net.ends[1];
    let outcome = end.qp.handle_packet(Nanos(5_000), &packet, &mut end.memory);
    let mut answers = Vec::new();
    while let Some(transmit) = end.qp.poll_transmit(Nanos(5_000), Allow::All) {
        let bytes = assemble(&transmit, &end.memory, &flow(1));
        answers.push(Packet::new_checked(&bytes).unwrap().header());
    }
    (outcome, answers)
}

fn syndrome(header: &Header) -> Syndrome {
    match header.extension {
        Extension::Aeth(aeth) | Extension::AtomicAck(aeth, _) => aeth.syndrome,
        _ => panic!("no AETH: {header:?}"),
    }
}

fn reth(offset: u64, len: u32) -> Reth {
    Reth {
        va: base_of(REGION) + offset,
        rkey: REGION,
        len,
    }
}

fn fetch_add(offset: u64, add: u64) -> AtomicEth {
    AtomicEth {
        va: base_of(REGION) + offset,
        rkey: REGION,
        swap_add: add,
        compare: 0,
    }
}

const FIRST_PSN: u32 = 0x100;

// Segmentation and placement.

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

#[test]
fn solicited_events_are_marked_on_the_last_packet() {
    let mut net = net(Setup::default());
    recv(&mut net, 10, 4096);
    let mut wr = SendWr::new(WrId(1), SendOp::Send, piece(REGION, 0, 3000));
    wr.solicited = true;
    net.ends[0].qp.post_send(wr).unwrap();
    net.run(1_000);
    assert!(net.completions(1)[0].solicited);
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

// Loss.

/// Drop the `n`-th packet with `opcode` that end `from` sends.
fn drop_nth(from: usize, opcode: Opcode, n: usize) -> impl FnMut(usize, &Packet<'_>) -> bool {
    let mut seen = 0;
    move |sender, packet| {
        let hit = sender == from && packet.opcode() == opcode;
        seen += usize::from(hit);
        hit && seen == n
    }
}

#[test]
fn any_single_packet_may_be_lost() {
    use Opcode::*;
    let cases = [
        (0, RcSendFirst),
        (0, RcSendMiddle),
        (0, RcSendLast),
        (0, RcWriteFirst),
        (0, RcWriteMiddle),
        (0, RcWriteLastImm),
        (0, RcReadRequest),
        (0, RcFetchAdd),
        (0, RcCompareSwap),
        (1, RcAcknowledge),
        (1, RcReadResponseFirst),
        (1, RcReadResponseMiddle),
        (1, RcReadResponseLast),
        (1, RcAtomicAcknowledge),
    ];
    for (from, opcode) in cases {
        for n in 1..=3 {
            let mut net = net(Setup::default());
            let log = tap(&mut net, drop_nth(from, opcode, n));
            for round in 0..3 {
                recv(&mut net, 10 + 2 * round, 8192);
                recv(&mut net, 11 + 2 * round, 0);
                send(&mut net, 10 * round, SendOp::Send, 4000);
                send(
                    &mut net,
                    10 * round + 1,
                    SendOp::WriteImm(remote(REGION, 0), 1),
                    4000,
                );
                send(&mut net, 10 * round + 2, read_from(0), 4000);
                let add = SendOp::FetchAdd {
                    remote: remote(REGION, 4096),
                    add: 1,
                };
                send(&mut net, 10 * round + 3, add, 8);
                let word = remote(REGION, 4104);
                send(
                    &mut net,
                    10 * round + 4,
                    SendOp::CompareSwap {
                        remote: word,
                        compare: 0,
                        swap: 1,
                    },
                    8,
                );
            }
            net.run(20_000);
            let name = format!("{opcode:?} {n}");
            assert!(
                count(&log, opcode) >= n,
                "{name}: the packet was there to be lost"
            );
            let done = net.completions(0);
            assert_eq!(done.len(), 15, "{name}");
            assert!(done.iter().all(|c| c.status == Status::Success), "{name}");
            assert!(done.is_sorted_by_key(|c| c.wr_id.0), "{name}");
            let got = net.completions(1);
            assert_eq!(
                got.iter().map(|c| c.wr_id.0).collect::<Vec<_>>(),
                [10, 11, 12, 13, 14, 15]
            );
            assert_eq!(
                net.ends[1].memory.atomics, 6,
                "{name}: atomics ran once each"
            );
            // No loss costs more than a few probes.
            assert!(net.now < Nanos::from_millis(20), "{name}: {:?}", net.now);
        }
    }
}

#[test]
fn one_sequence_nak_per_gap() {
    let mut net = net(Setup::default());
    let log = tap(&mut net, drop_nth(0, Opcode::RcWriteMiddle, 2));
    send(&mut net, 1, write_to(0), 20 * 1024);
    net.run(1_000);
    let naks: Vec<_> = log
        .borrow()
        .iter()
        .filter(|e| e.3 == Some(0x60))
        .map(|e| e.2)
        .collect();
    assert_eq!(naks, [FIRST_PSN + 2]);
    assert_eq!(net.ends[0].qp.counters().rcvd_seq_err, 1);
    assert_eq!(net.ends[0].qp.counters().ack_timeout, 0);
    assert_eq!(statuses(&net.completions(0)), [(1, Status::Success)]);
}

#[test]
fn the_next_gap_is_told_too() {
    let mut net = net(Setup::default());
    let mut middles = 0;
    let log = tap(&mut net, move |_, packet| {
        let hit = packet.opcode() == Opcode::RcWriteMiddle;
        middles += usize::from(hit);
        hit && matches!(middles, 2 | 60)
    });
    send(&mut net, 1, write_to(0), 40 * 1024);
    net.run(1_000);
    let naks = log.borrow().iter().filter(|e| e.3 == Some(0x60)).count();
    assert_eq!((naks, net.ends[0].qp.counters().probes), (2, 0));
    assert_eq!(statuses(&net.completions(0)), [(1, Status::Success)]);
}

/// Hand the client an ACK, NAK or RNR NAK.
fn tell(net: &mut SimNet, byte: u8, psn: u32) -> Outcome {
    let syndrome = Syndrome::from_byte(byte);
    let aeth = Extension::Aeth(Aeth { syndrome, msn: 1 });
    let psn = Psn::new(psn);
    let bytes = raw(Header::new(Opcode::RcAcknowledge, QPNS[0], psn, aeth), &[]);
    let packet = Packet::new_checked(&bytes).unwrap();
    let end = &mut net.ends[0];
    end.qp.handle_packet(Nanos(2), &packet, &mut end.memory)
}

/// How many packets the client now sends.
fn burst(net: &mut SimNet, now: Nanos) -> usize {
    std::iter::from_fn(|| net.ends[0].qp.poll_transmit(now, Allow::All)).count()
}

#[test]
fn an_ack_that_comes_after_going_back_still_counts() {
    let mut net = net(Setup::default());
    send(&mut net, 1, write_to(0), 5 * 1024);
    assert_eq!(burst(&mut net, Nanos(1)), 5);
    assert_eq!(tell(&mut net, 0x60, FIRST_PSN + 1), Outcome::Accepted);
    // One packet goes out again; then it turns out that all had arrived.
    assert!(
        net.ends[0]
            .qp
            .poll_transmit(Nanos(2), Allow::All)
            .unwrap()
            .is_retransmission
    );
    assert_eq!(tell(&mut net, 0x1f, FIRST_PSN + 4), Outcome::Accepted);
    assert_eq!(burst(&mut net, Nanos(3)), 0);
    net.pump();
    assert_eq!(statuses(&net.completions(0)), [(1, Status::Success)]);
    assert_eq!(net.ends[0].qp.poll_timeout(), None);
}

#[test]
fn a_sequence_nak_after_an_rnr_wait_is_heard() {
    let mut net = net(Setup::default());
    send(&mut net, 1, SendOp::Send, 3000);
    assert_eq!(burst(&mut net, Nanos(1)), 3);
    tell(&mut net, 0x2c, FIRST_PSN);
    // rxe complains of the packets behind it, too; that must not end the wait.
    tell(&mut net, 0x60, FIRST_PSN);
    assert_eq!(burst(&mut net, Nanos(3)), 0);
    let due = net.ends[0].qp.poll_timeout().unwrap();
    assert_eq!(due, Nanos(2) + RnrTimer::new(12).wait());
    net.ends[0].qp.handle_timeout(due);
    assert_eq!(burst(&mut net, due), 3);
    // The first of them is lost again.
    tell(&mut net, 0x60, FIRST_PSN);
    assert_eq!(burst(&mut net, due), 3);
}

#[test]
fn when_everything_is_lost_one_probe_finds_out() {
    let mut net = net(Setup::default());
    let mut left = 40;
    tap(&mut net, move |_, _| {
        left -= 1;
        left >= 0
    });
    send(&mut net, 1, write_to(0), 40 * 1024);
    net.run(1_000);
    assert_eq!(statuses(&net.completions(0)), [(1, Status::Success)]);
    assert_eq!(net.ends[0].qp.counters().probes, 1);
}

#[test]
fn a_finished_read_makes_room_for_the_next() {
    let mut net = net(Setup {
        rd_atomic: 2,
        ..Setup::default()
    });
    for id in 0..4 {
        send(&mut net, id, read_from(0), 100);
    }
    let end = &mut net.ends[0];
    let asked =
        |qp: &mut QueuePair| std::iter::from_fn(|| qp.poll_transmit(Nanos(1), Allow::All)).count();
    assert_eq!(asked(&mut end.qp), 2);
    for (answered, more) in [(0, 1), (1, 1), (2, 0)] {
        let aeth = Extension::Aeth(Aeth {
            syndrome: Syndrome::ACK,
            msn: 1,
        });
        let psn = Psn::new(FIRST_PSN + answered);
        let header = Header::new(Opcode::RcReadResponseOnly, QPNS[0], psn, aeth);
        let bytes = raw(header, &[9; 100]);
        let packet = Packet::new_checked(&bytes).unwrap();
        end.qp.handle_packet(Nanos(2), &packet, &mut end.memory);
        assert_eq!(asked(&mut end.qp), more, "after answer {answered}");
    }
}

#[test]
fn waiting_for_a_receive_spends_no_retry() {
    // The peer asks for 655 ms, the ACK timeout is one.
    let setup = Setup {
        rnr_timer: 0,
        timeout: 8,
        retry_cnt: 0,
        ..Setup::default()
    };
    let mut net = net(setup);
    send(&mut net, 1, SendOp::Send, 100);
    net.pump();
    while net.ends[0].qp.counters().rcvd_rnr_err == 0 {
        assert!(net.step());
    }
    recv(&mut net, 10, 100);
    net.run(1_000);
    assert_eq!(statuses(&net.completions(0)), [(1, Status::Success)]);
    assert_eq!(net.ends[0].qp.counters().ack_timeout, 0);
}

#[test]
fn silence_exhausts_the_retries() {
    for (retry_cnt, timeouts) in [(0, 1), (1, 2), (3, 4), (6, 7)] {
        let mut net = net(Setup {
            retry_cnt,
            ..Setup::default()
        });
        tap(&mut net, |_, _| true);
        for id in 1..=3 {
            send(&mut net, id, SendOp::Send, 100);
        }
        recv(&mut net, 10, 100);
        net.run(10_000);
        let flushed = [
            (1, Status::RetryExceeded),
            (2, Status::Flushed),
            (3, Status::Flushed),
        ];
        assert_eq!(statuses(&net.completions(0)), flushed);
        assert_eq!(net.ends[0].qp.state(), QpState::Err);
        assert_eq!(net.ends[0].qp.counters().ack_timeout, timeouts);
        // 4.096 us * 2^14 each.
        let expected = 67_108_864 * timeouts;
        assert!(
            (expected..expected + 1_000_000).contains(&net.now.0),
            "{:?}",
            net.now
        );
        assert!(net.ends[0].qp.counters().probes > timeouts);
        assert_eq!(net.ends[0].qp.poll_timeout(), None);
    }
}

#[test]
fn retry_count_seven_never_gives_up() {
    let mut net = net(Setup {
        retry_cnt: 7,
        ..Setup::default()
    });
    let mut left = 300;
    tap(&mut net, move |_, _| {
        left -= 1;
        left > 0
    });
    send(&mut net, 1, write_to(0), 100);
    net.run(10_000);
    assert!(net.ends[0].qp.counters().ack_timeout > 7);
    assert_eq!(statuses(&net.completions(0)), [(1, Status::Success)]);
}

#[test]
fn without_ack_timeout_probes_still_recover() {
    let mut net = net(Setup {
        timeout: 0,
        retry_cnt: 0,
        ..Setup::default()
    });
    let mut left = 20;
    tap(&mut net, move |_, _| {
        left -= 1;
        left > 0
    });
    send(&mut net, 1, write_to(0), 5000);
    net.run(10_000);
    assert_eq!(statuses(&net.completions(0)), [(1, Status::Success)]);
    assert_eq!(net.ends[0].qp.counters().ack_timeout, 0);
}

// Receiver not ready.

#[test]
fn every_rnr_timer_code_is_waited_for() {
    let tens: [u64; 32] = [
        65536, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024,
        1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152,
    ];
    for code in 0..32 {
        let mut net = net(Setup {
            rnr_timer: code,
            ..Setup::default()
        });
        let log = tap(&mut net, |_, _| false);
        send(&mut net, 1, SendOp::Send, 100);
        net.pump();
        while count(&log, Opcode::RcAcknowledge) == 0 {
            assert!(net.step());
        }
        assert_eq!(log.borrow().last().unwrap().3, Some(0x20 | code));
        let refused = net.now;
        recv(&mut net, 10, 100);
        net.run(1_000);
        let waited = net.now.0 - refused.0;
        let asked = tens[usize::from(code)] * 10_000;
        assert!(
            (asked..asked + 30_000).contains(&waited),
            "{code}: {waited}"
        );
        assert_eq!(statuses(&net.completions(0)), [(1, Status::Success)]);
        assert_eq!(count(&log, Opcode::RcSendOnly), 2);
    }
}

#[test]
fn rnr_retries_are_counted_and_exhausted() {
    for rnr_retry in 0..7 {
        let mut net = net(Setup {
            rnr_retry,
            retry_cnt: 0,
            ..Setup::default()
        });
        let log = tap(&mut net, |_, _| false);
        send(&mut net, 1, SendOp::Send, 100);
        send(&mut net, 2, write_to(0), 100);
        net.run(10_000);
        assert_eq!(count(&log, Opcode::RcSendOnly), usize::from(rnr_retry) + 1);
        let flushed = [(1, Status::RnrRetryExceeded), (2, Status::Flushed)];
        assert_eq!(statuses(&net.completions(0)), flushed);
        assert_eq!(net.ends[0].qp.counters().ack_timeout, 0);
        assert_eq!(net.ends[1].qp.state(), QpState::Rts);
    }
}

#[test]
fn progress_reloads_the_rnr_count() {
    let mut net = net(Setup {
        rnr_retry: 1,
        ..Setup::default()
    });
    let log = tap(&mut net, |_, _| false);
    for id in 1..=4 {
        send(&mut net, id, SendOp::Send, 100);
    }
    net.pump();
    for posted in 0..4 {
        // Post the next receive only when the message was refused once more.
        while log
            .borrow()
            .iter()
            .filter(|e| e.3.is_some_and(|s| s >> 5 == 1))
            .count()
            <= posted
        {
            assert!(net.step());
        }
        recv(&mut net, 10 + posted as u64, 100);
    }
    net.run(1_000);
    assert_eq!(net.completions(0).len(), 4);
    assert_eq!(net.ends[0].qp.state(), QpState::Rts);
}

#[test]
fn a_write_with_immediate_waits_for_a_receive_and_runs_once() {
    for len in [100, 5000] {
        let mut net = net(Setup::default());
        let op = SendOp::WriteImm(remote(REGION, 0), 7);
        send(&mut net, 1, op, len);
        net.pump();
        while net.ends[1].qp.counters().send_rnr_err == 0 {
            assert!(net.step());
        }
        recv(&mut net, 10, 0);
        net.run(1_000);
        let got = net.completions(1);
        assert_eq!(
            (got[0].kind, got[0].byte_len),
            (CompletionKind::RecvWriteImm, len)
        );
        assert_eq!(got.len(), 1);
    }
}

#[test]
fn a_lost_rnr_nak_is_given_again() {
    let mut net = net(Setup {
        rnr_retry: 0,
        ..Setup::default()
    });
    tap(&mut net, drop_nth(1, Opcode::RcAcknowledge, 1));
    send(&mut net, 1, SendOp::Send, 100);
    net.run(1_000);
    assert_eq!(
        statuses(&net.completions(0)),
        [(1, Status::RnrRetryExceeded)]
    );
    assert_eq!(net.ends[1].qp.counters().send_rnr_err, 2);
}

// Refusals.

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
    let mut net = net(Setup {
        access: Access::READ,
        ..Setup::default()
    });
    send(&mut net, 1, write_to(0), 8);
    net.run(1_000);
    assert_eq!(
        statuses(&net.completions(0)),
        [(1, Status::RemoteInvalidRequest)]
    );
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

// Duplicates.

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

// States.

#[test]
fn the_transition_table_holds() {
    use QpState::*;
    let all = [Reset, Init, Rtr, Rts, Sqd, Sqe, Err];
    let legal = [(Reset, Init), (Init, Init), (Init, Rtr), (Rtr, Rts)];
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
        },
    );
    qp.to_init(InitAttr {
        access: Access::ALL,
        pkey: PKEY_DEFAULT,
    })
    .unwrap();
    qp.to_rtr(RtrAttr {
        dest: QPNS[0],
        path_mtu: Mtu::B1024,
        rq_psn: Psn::new(FIRST_PSN),
        max_dest_rd_atomic: 1,
        min_rnr_timer: RnrTimer::new(1),
    })
    .unwrap();
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
