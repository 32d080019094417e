//! UD and UC: what arrives is whole and in order, what does not is forgotten.

mod common;

use common::*;
use lowtide_transport_proto::qp::*;
use lowtide_transport_proto::wire::*;

const REGION: u32 = 7;
const QKEY: u32 = 0x1111_2222;
const GRH: [u8; GRH_LEN] = [0x45; GRH_LEN];

fn pair() -> [(UdQueuePair, TestMemory); 2] {
    [0, 1].map(|i| {
        let caps = QpCaps {
            send_wr_max: 4,
            recv_wr_max: 4,
            shared_receives: false,
        };
        let mut qp = UdQueuePair::new(QPNS[i], Mtu::B1024, caps);
        qp.to_init(
            InitAttr {
                access: Access::default(),
                pkey: PKEY_DEFAULT,
            },
            QKEY,
        )
        .unwrap();
        qp.to_rtr().unwrap();
        qp.to_rts(Psn::new(0xff_ffff)).unwrap();
        let mut memory = TestMemory::default();
        memory.register(
            REGION,
            (0..8192u32).map(|b| (b * 7 + i as u32) as u8).collect(),
        );
        (qp, memory)
    })
}

fn datagram(id: u64, len: u32) -> UdSendWr {
    UdSendWr {
        wr_id: WrId(id),
        local: piece(REGION, 0, len),
        address: AddressHandle(99),
        dest: QPNS[1],
        qkey: QKEY,
        imm: None,
        signalled: true,
        solicited: false,
    }
}

fn recv(qp: &mut UdQueuePair, id: u64, len: u32) {
    qp.post_recv(RecvWr {
        wr_id: WrId(id),
        local: piece(REGION, 4096, len),
    })
    .unwrap();
}

/// Send the next datagram of the first end to the second.
fn carry(ends: &mut [(UdQueuePair, TestMemory); 2]) -> Outcome {
    let (transmit, address) = ends[0].0.poll_transmit().unwrap();
    assert_eq!(address, AddressHandle(99));
    let bytes = assemble(&transmit, &ends[0].1, &flow(0));
    let (qp, memory) = &mut ends[1];
    qp.handle_packet(&Packet::new_checked(&bytes).unwrap(), &GRH, memory)
}

#[test]
fn a_datagram_arrives_behind_its_ip_header() {
    for (len, imm) in [
        (0, None),
        (1, Some(7)),
        (1023, None),
        (1024, Some(0xffff_ffff)),
    ] {
        let mut ends = pair();
        recv(&mut ends[1].0, 20, 40 + 1024);
        let wr = UdSendWr {
            imm,
            solicited: true,
            ..datagram(1, len)
        };
        ends[0].0.post_send(wr).unwrap();
        assert_eq!(carry(&mut ends), Outcome::Accepted);
        let sent = ends[0].0.poll_completion().unwrap();
        assert_eq!(
            (sent.wr_id, sent.status, sent.kind),
            (WrId(1), Status::Success, CompletionKind::Send)
        );
        let got = ends[1].0.poll_completion().unwrap();
        assert_eq!(
            (got.wr_id, got.status, got.byte_len),
            (WrId(20), Status::Success, 40 + len)
        );
        assert_eq!((got.imm, got.solicited, got.source), (imm, true, QPNS[0]));
        let [from, to] = [0, 1].map(|i| &ends[i].1.regions[&REGION].bytes);
        assert_eq!(to[4096..4136], GRH);
        assert_eq!(to[4136..][..len as usize], from[..len as usize]);
    }
}

#[test]
fn datagrams_that_do_not_fit_are_dropped_and_the_receive_kept() {
    let mut ends = pair();
    let drop = |ends: &mut _, wr| {
        let ends: &mut [(UdQueuePair, TestMemory); 2] = ends;
        ends[0].0.post_send(wr).unwrap();
        let outcome = carry(ends);
        ends[0].0.poll_completion().unwrap();
        outcome
    };
    assert_eq!(
        drop(&mut ends, datagram(1, 10)),
        Outcome::Dropped(DropReason::NoReceive)
    );
    recv(&mut ends[1].0, 20, 49);
    assert_eq!(
        drop(&mut ends, datagram(2, 10)),
        Outcome::Dropped(DropReason::Length)
    );
    let wrong = UdSendWr {
        qkey: QKEY + 1,
        ..datagram(3, 5)
    };
    assert_eq!(drop(&mut ends, wrong), Outcome::Dropped(DropReason::Qkey));
    assert_eq!(drop(&mut ends, datagram(4, 9)), Outcome::Accepted);
    assert_eq!(ends[1].0.poll_completion().unwrap().wr_id, WrId(20));
    assert_eq!(ends[1].0.counters().dropped_pkts, 3);
    // A connected packet has no business here.
    let mut ack = [0; 20];
    let aeth = Aeth {
        syndrome: Syndrome::ACK,
        msn: 1,
    };
    Header::new(
        Opcode::RcAcknowledge,
        QPNS[1],
        Psn::new(1),
        Extension::Aeth(aeth),
    )
    .emit(&mut ack);
    let packet = Packet::new_checked(&ack).unwrap();
    let (qp, memory) = &mut ends[1];
    assert_eq!(
        qp.handle_packet(&packet, &GRH, memory),
        Outcome::Dropped(DropReason::Class)
    );
}

#[test]
fn datagram_queues_are_bounded_and_flushed() {
    let mut ends = pair();
    let qp = &mut ends[0].0;
    assert_eq!(qp.post_send(datagram(1, 1025)), Err(PostError::Invalid));
    for id in 0..4 {
        qp.post_send(datagram(id, 1)).unwrap();
        recv(qp, 10 + id, 100);
    }
    assert_eq!(qp.post_send(datagram(9, 1)), Err(PostError::QueueFull));
    let wr = RecvWr {
        wr_id: WrId(19),
        local: SgList::EMPTY,
    };
    assert_eq!(qp.post_recv(wr), Err(PostError::QueueFull));
    qp.to_error();
    let flushed: Vec<_> = std::iter::from_fn(|| qp.poll_completion()).collect();
    assert_eq!(
        flushed.iter().map(|c| c.wr_id.0).collect::<Vec<_>>(),
        [0, 1, 2, 3, 10, 11, 12, 13]
    );
    assert!(flushed.iter().all(|c| c.status == Status::Flushed));
    qp.post_send(datagram(9, 1)).unwrap();
    assert_eq!(qp.poll_completion().unwrap().status, Status::Flushed);
    assert!(qp.poll_transmit().is_none());
    qp.to_reset();
    assert_eq!(
        qp.post_send(datagram(9, 1)),
        Err(PostError::State(QpState::Reset))
    );
    assert_eq!(
        qp.to_rtr(),
        Err(InvalidTransition {
            from: QpState::Reset,
            to: QpState::Rtr
        })
    );
}

#[test]
fn a_datagram_without_memory_pauses_the_queue_and_draining_keeps_it() {
    let mut ends = pair();
    let qp = &mut ends[0].0;
    for id in 0..3 {
        qp.post_send(datagram(id, 1)).unwrap();
    }
    let _ = qp.poll_transmit().unwrap();
    let _ = qp.poll_transmit().unwrap();
    qp.handle_transmit_failure();
    assert_eq!(qp.state(), QpState::Sqe);
    let done: Vec<_> = std::iter::from_fn(|| qp.poll_completion())
        .map(|c| (c.wr_id.0, c.status))
        .collect();
    let expected = [
        (0, Status::Success),
        (1, Status::LocalProtection),
        (2, Status::Flushed),
    ];
    assert_eq!(done, expected);
    qp.post_send(datagram(3, 1)).unwrap();
    assert_eq!(qp.poll_completion().unwrap().status, Status::Flushed);
    qp.resume().unwrap();
    qp.to_sqd().unwrap();
    assert_eq!(qp.poll_event(), Some(QpEvent::SendQueueDrained));
    qp.post_send(datagram(4, 1)).unwrap();
    assert!(qp.poll_transmit().is_none() && !qp.has_pending_transmit());
    qp.resume().unwrap();
    assert!(qp.poll_transmit().is_some());
    assert_eq!(qp.poll_completion().unwrap().wr_id, WrId(4));
}

#[test]
fn an_unreliable_connection_delivers_whole_messages_in_order_or_nothing() {
    let mut whole = [0; 3];
    for (i, loss) in [0, 20, 200].into_iter().enumerate() {
        let setup = Setup {
            kind: QpKind::Uc,
            ..Setup::default()
        };
        let faults = Faults {
            loss,
            ..Faults::default()
        };
        let mut net = SimNet::new(setup, faults, 5 + u64::from(loss));
        for end in 0..2 {
            let noise = (0..1 << 20)
                .map(|b| (b * 31 + b / 251 + end) as u8)
                .collect();
            net.ends[end].memory.register(REGION, noise);
        }
        let (mut got, mut writes) = (Vec::new(), 0);
        for id in 0..300u64 {
            let len = net.rng.below(5000) as u32;
            let local = piece(REGION, id * 1000, len);
            let receives = net.ends[1].qp.receives_posted();
            for n in receives..2 {
                let slot = (512 << 10) + u64::from(n) * 8192 + id % 7 * 16384;
                let wr = RecvWr {
                    wr_id: WrId(slot),
                    local: piece(REGION, slot, 8192),
                };
                net.ends[1].qp.post_recv(wr).unwrap();
            }
            let op = match id % 3 {
                0 => SendOp::SendImm(id as u32),
                1 => SendOp::WriteImm(remote(REGION, 0), id as u32),
                _ => SendOp::Write(remote(REGION, 0)),
            };
            net.ends[0]
                .qp
                .post_send(SendWr::new(WrId(id), op, local))
                .unwrap();
            net.run(1_000);
            let sent = net.completions(0);
            assert_eq!(
                (sent.len(), sent[0].wr_id, sent[0].status),
                (1, WrId(id), Status::Success)
            );
            for completion in net.completions(1) {
                assert_eq!(
                    (completion.status, completion.byte_len),
                    (Status::Success, len)
                );
                assert_eq!(completion.imm, Some(id as u32));
                let to = if completion.kind == CompletionKind::Recv {
                    completion.wr_id.0
                } else {
                    0
                };
                let from = &net.ends[0].memory.regions[&REGION].bytes[id as usize * 1000..];
                let there = &net.ends[1].memory.regions[&REGION].bytes[to as usize..];
                assert_eq!(there[..len as usize], from[..len as usize]);
                got.push(id);
            }
            writes += usize::from(id % 3 == 2);
        }
        assert_eq!(net.ends[0].qp.poll_timeout(), None);
        assert_eq!(net.ends[1].qp.state(), QpState::Rts);
        whole[i] = got.len();
        assert!(got.len() <= 300 - writes && got.is_sorted());
    }
    assert_eq!(whole[0], 200, "nothing lost, nothing missing");
    assert!(
        whole[1] < 200 && whole[2] < whole[1] && whole[2] > 20,
        "{whole:?}"
    );
}

#[test]
fn an_unreliable_connection_has_no_reads_and_no_atomics() {
    let setup = Setup {
        kind: QpKind::Uc,
        ..Setup::default()
    };
    let mut qp = connected(0, setup);
    let place = remote(REGION, 0);
    for op in [
        SendOp::Read(place),
        SendOp::FetchAdd {
            remote: place,
            add: 1,
        },
        SendOp::CompareSwap {
            remote: place,
            compare: 0,
            swap: 1,
        },
        SendOp::SendInvalidate(Rkey(1)),
    ] {
        let wr = SendWr::new(WrId(1), op, piece(REGION, 0, 8));
        assert_eq!(qp.post_send(wr), Err(PostError::Invalid));
    }
}
