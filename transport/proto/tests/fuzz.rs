//! Hostile bytes: nothing panics, nothing grows without bound, and what decodes comes out again.

mod common;

use std::net::SocketAddr;

use std::collections::HashMap;

use common::pcap::golden;
use common::{Early, QPNS, Rng, Setup, TestMemory, base_of, connected, piece, remote};
use lowtide_transport_proto::cm::{
    Cm, CmConfig, ConnectParams, MAD_LEN, Message, QpOffer, ResolveParams, ServiceId,
};
use lowtide_transport_proto::qp::*;
use lowtide_transport_proto::time::Nanos;
use lowtide_transport_proto::wire::*;
use proptest::prelude::{ProptestConfig, any, prop, prop_assert_eq, proptest};

const REGION: u32 = 7;

/// Decode, and if that works, use every accessor and emit the header again.
fn exercise(bytes: &[u8]) {
    let Ok(packet) = Packet::new_checked(bytes) else {
        return;
    };
    let header = packet.header();
    let mut out = [0; HEADER_LEN_MAX];
    let len = header.emit(&mut out);
    assert_eq!(len, packet.header_bytes().len());
    let again = [&out[..len], &bytes[len..]].concat();
    assert_eq!(Packet::new_checked(&again).unwrap().header(), header);
    assert_eq!(packet.payload(), &bytes[packet.payload_range()]);
    assert_eq!(packet.covered_bytes().len() + ICRC_LEN, packet.len());
    let _ = (packet.icrc(), packet.reth(), packet.aeth(), packet.imm());
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 4096,
        failure_persistence: None,
        ..Default::default()
    })]

    #[test]
    fn random_bytes_never_panic_the_parser(
        mut bytes in prop::collection::vec(any::<u8>(), 0..160),
    ) {
        exercise(&bytes);
        // Most random opcodes and versions are refused at once; help them past.
        if bytes.len() > 2 {
            bytes[0] = OPCODES[usize::from(bytes[0]) % OPCODES.len()].opcode.code();
            bytes[1] &= 0xf0;
            exercise(&bytes);
            bytes.truncate(bytes.len() / 4 * 4);
            exercise(&bytes);
        }
    }

    #[test]
    fn random_bytes_never_panic_the_connection_manager(
        bytes in prop::collection::vec(any::<u8>(), MAD_LEN),
        attribute in 0x10u8..0x1b,
    ) {
        let mut mad = bytes;
        mad[..4].copy_from_slice(&[1, 7, 2, 3]);
        mad[16..18].copy_from_slice(&[0, attribute]);
        if let Ok((tid, message)) = Message::decode(&mad) {
            let emitted = message.encode(tid);
            prop_assert_eq!(Message::decode(&emitted), Ok((tid, message)));
        }
        let mut cm = manager();
        cm.handle_mad(Nanos(1), from(), &mad);
    }
}

fn from() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 4791))
}

fn manager() -> Cm {
    let mut cm = Cm::new(CmConfig {
        connections_max: 50,
        ..CmConfig::new(from().ip(), 1, 1)
    });
    cm.listen(ServiceId::tcp(1));
    cm.listen(ServiceId::tcp(7471));
    cm.listen_datagram(ServiceId::udp(7471));
    cm
}

/// Change a few random bits or words.
fn mutate(rng: &mut Rng, bytes: &mut Vec<u8>) {
    for _ in 0..rng.below(4) {
        let at = rng.below(bytes.len() as u64) as usize;
        match rng.below(4) {
            0 => bytes[at] ^= 1 << rng.below(8),
            1 => bytes[at] = rng.next() as u8,
            2 => bytes[at] = [0, 0xff, 0x7f, 0x80][rng.below(4) as usize],
            _ => {
                let len = bytes.len() as u64;
                bytes.truncate((len - rng.below(len.min(64))) as usize);
                if bytes.is_empty() {
                    return;
                }
            }
        }
    }
}

#[test]
fn mutated_golden_packets_never_panic_a_queue_pair() {
    let corpus: Vec<Vec<u8>> = golden().iter().map(|g| g.udp_payload().to_vec()).collect();
    let mut rng = Rng(3);
    let (mut accepted, mut ahead, mut dropped, mut failures) = (0u64, 0u64, 0u64, 0u64);
    for round in 0..2_000 {
        let kind = if round % 4 == 3 {
            QpKind::Uc
        } else {
            QpKind::Rc
        };
        let mut qp = connected(
            0,
            Setup {
                kind,
                timeout: 8,
                retry_cnt: 3,
                early: match round % 2 {
                    0 => Early::Reported,
                    _ => Early::Dropped,
                },
                ..Setup::default()
            },
        );
        let mut kept = HashMap::new();
        let mut memory = TestMemory::default();
        memory.register(REGION, vec![1; 16 << 10]);
        let mut now = Nanos(1);
        let (mut posted, mut completed) = (0, 0);
        for _ in 0..1_000 {
            now = now + Nanos(rng.below(20_000));
            let mut bytes = corpus[rng.below(corpus.len() as u64) as usize].clone();
            if rng.chance(50) {
                bytes = report(&mut rng);
            }
            aim(&mut rng, &mut bytes, &qp);
            mutate(&mut rng, &mut bytes);
            exercise(&bytes);
            if let Ok(packet) = Packet::new_checked(&bytes) {
                match qp.handle_packet(now, &packet, &mut memory) {
                    Outcome::Accepted => accepted += 1,
                    Outcome::Ahead => {
                        ahead += 1;
                        kept.insert(EarlyPacket::of(&packet), bytes.clone());
                        qp.note_kept(&packet);
                    }
                    Outcome::Dropped(_) => dropped += 1,
                }
            }
            while let Some(wanted) = qp.wants_kept() {
                match kept.remove(&wanted).filter(|_| rng.chance(900)) {
                    None => qp.forget_kept(wanted),
                    Some(bytes) => {
                        let packet = Packet::new_checked(&bytes).unwrap();
                        qp.handle_packet(now, &packet, &mut memory);
                    }
                }
            }
            posted += post_something(&mut rng, &mut qp);
            if qp.poll_timeout().is_some_and(|due| due <= now) {
                qp.handle_timeout(now);
            }
            let mut sent = 0;
            while rng.chance(900)
                && let Some(transmit) = qp.poll_transmit(now, Allow::All)
            {
                sent += 1;
                assert!(sent <= 20_000, "unbounded output");
                assert!(transmit.udp_payload_len() <= 40 + 4096 + 4);
            }
            while rng.chance(500) && qp.has_local_work() {
                qp.execute_local(&mut memory);
            }
            while qp.poll_event().is_some() {}
            match (rng.below(50), qp.state()) {
                (0, QpState::Rts) => qp.to_sqd().unwrap(),
                (1..10, QpState::Sqd | QpState::Sqe) => qp.resume().unwrap(),
                _ => {}
            }
            while let Some(completion) = qp.poll_completion() {
                completed += 1;
                assert!(completion.byte_len <= 4096 || !completion.kind.is_recv());
            }
            if qp.state() == QpState::Err && rng.chance(100) {
                break;
            }
        }
        failures += u64::from(qp.state() == QpState::Err);
        qp.to_error();
        completed += std::iter::from_fn(|| qp.poll_completion()).count();
        assert_eq!(posted, completed, "every request completes exactly once");
    }
    println!("{accepted} accepted, {ahead} ahead, {dropped} dropped, {failures} of 2000 failed");
    assert!(accepted > 1_000 && ahead > 1_000 && dropped > 1_000 && failures > 200);
}

#[test]
fn mutated_datagrams_never_panic_a_queue_pair() {
    let corpus: Vec<Vec<u8>> = golden()
        .iter()
        .map(|g| g.udp_payload().to_vec())
        .filter(|bytes| bytes[0] & 0xe0 == 0x60)
        .collect();
    assert!(corpus.len() > 10);
    let mut rng = Rng(5);
    let (mut accepted, mut dropped) = (0u64, 0u64);
    let caps = QpCaps {
        send_wr_max: 8,
        recv_wr_max: 8,
        shared_receives: false,
    };
    let mut qp = UdQueuePair::new(Qpn::new(7), Mtu::B1024, caps);
    let init = InitAttr {
        access: Access::NONE,
        pkey: PKEY_DEFAULT,
    };
    qp.to_init(init, 0x1111_1111).unwrap();
    qp.to_rtr().unwrap();
    let mut memory = TestMemory::default();
    memory.register(REGION, vec![1; 16 << 10]);
    for id in 0..200_000 {
        let wr = RecvWr {
            wr_id: WrId(id),
            local: piece(REGION, rng.below(1000), 200 + rng.below(1000) as u32),
        };
        let _ = qp.post_recv(wr);
        let mut bytes = corpus[rng.below(corpus.len() as u64) as usize].clone();
        if rng.chance(900) {
            bytes[12..16].fill(0x11);
        }
        mutate(&mut rng, &mut bytes);
        if let Ok(packet) = Packet::new_checked(&bytes) {
            match qp.handle_packet(&packet, &[0; GRH_LEN], &mut memory) {
                Outcome::Accepted => accepted += 1,
                Outcome::Ahead | Outcome::Dropped(_) => dropped += 1,
            }
        }
        while let Some(completion) = qp.poll_completion() {
            assert!((GRH_LEN as u32..1200).contains(&completion.byte_len));
            assert_eq!(completion.status, Status::Success);
        }
    }
    println!("{accepted} accepted, {dropped} dropped");
    assert!(accepted > 10_000 && dropped > 10_000);
}

/// A report of a gap, of random packets behind it.
fn report(rng: &mut Rng) -> Vec<u8> {
    let aeth = Aeth {
        syndrome: Syndrome::Nak(NakCode::SequenceError),
        msn: 1,
    };
    let extension = Extension::AtomicAck(aeth, rng.next() & rng.next());
    let header = Header::new(Opcode::RcAtomicAcknowledge, QPNS[0], Psn::new(0), extension);
    let mut bytes = vec![0; header.len() + ICRC_LEN];
    header.emit(&mut bytes);
    bytes
}

/// Address the packet to `qp` and bring its PSN, keys and addresses near what `qp` expects, so that
/// it gets past the first checks.
fn aim(rng: &mut Rng, bytes: &mut [u8], qp: &QueuePair) {
    let response = Opcode::from_code(bytes[0]).is_some_and(Opcode::is_response);
    let counters = qp.counters();
    let start = if response { 0x100 } else { 0x200 };
    let psn = start + rng.below(4 + counters.rcvd_pkts.min(60)) as u32;
    bytes[9..12].copy_from_slice(&psn.to_be_bytes()[1..]);
    bytes[2..4].copy_from_slice(&PKEY_DEFAULT.to_be_bytes());
    if qp.kind() == QpKind::Uc && bytes[0] < 0x0c {
        bytes[0] |= 0x20;
    }
    let has_key = Opcode::from_code(bytes[0])
        .is_some_and(|o| matches!(o.row().shape, Shape::Reth | Shape::RethImm | Shape::Atomic));
    if has_key && rng.chance(900) {
        let va = base_of(REGION) + rng.below(8 << 10) / 8 * 8;
        bytes[12..20].copy_from_slice(&va.to_be_bytes());
        bytes[20..24].copy_from_slice(&REGION.to_be_bytes());
    }
}

/// Post a random request or receive; returns how many were taken.
fn post_something(rng: &mut Rng, qp: &mut QueuePair) -> usize {
    let local = piece(REGION, rng.below(1024), rng.below(4096) as u32);
    let place = remote(REGION, 0);
    let op = match rng.below(11) {
        0 => SendOp::Send,
        1 => SendOp::SendImm(1),
        2 => SendOp::Write(place),
        3 => SendOp::WriteImm(place, 2),
        4 => SendOp::Read(place),
        5 => SendOp::FetchAdd {
            remote: place,
            add: 1,
        },
        6 => SendOp::AtomicWrite(place),
        7 => SendOp::Flush(Flush {
            remote: place,
            len: 8,
            global: true,
            persistent: false,
            whole_region: rng.chance(500),
        }),
        8 => SendOp::LocalInvalidate(Rkey(100)),
        9 => SendOp::BindWindow(Bind {
            window: Rkey(99),
            rkey: Rkey(100),
            region: Lkey(REGION),
            addr: base_of(REGION),
            len: rng.below(20 << 10),
            access: Access::ALL,
            zero_based: false,
        }),
        _ => {
            return usize::from(
                qp.post_recv(RecvWr {
                    wr_id: WrId(1),
                    local,
                })
                .is_ok(),
            );
        }
    };
    let local = match op {
        SendOp::FetchAdd { .. } | SendOp::AtomicWrite(_) => piece(REGION, 0, 8),
        _ if op.is_local() || matches!(op, SendOp::Flush(_)) => SgList::EMPTY,
        _ => local,
    };
    usize::from(qp.post_send(SendWr::new(WrId(0), op, local)).is_ok())
}

#[test]
fn mutated_handshakes_never_panic_the_connection_manager() {
    let mut corpus: Vec<Vec<u8>> = golden()
        .iter()
        .filter_map(|g| {
            Packet::new_checked(g.udp_payload())
                .ok()
                .map(|p| p.payload().to_vec())
        })
        .filter(|payload| Message::decode(payload).is_ok())
        .collect();
    assert_eq!(corpus.len(), 10);
    let mut rng = Rng(4);
    let mut cm = manager();
    let mut now = Nanos(1);
    let mut events = 0u64;
    for round in 0..100_000u64 {
        now = now + Nanos::from_micros(rng.below(20_000));
        let mut mad = corpus[rng.below(corpus.len() as u64) as usize].clone();
        // Small ids, so that messages meet connections.
        mad[24..32].fill(0);
        mad[27] = rng.below(40) as u8;
        mad[31] = rng.below(80) as u8;
        mutate(&mut rng, &mut mad);
        cm.handle_mad(now, from(), &mad);
        if round % 50 == 0 {
            let qp = QpOffer {
                qpn: Qpn::new(5),
                psn: Psn::new(6),
                responder_resources: 1,
                initiator_depth: 1,
                rnr_retry: 7,
            };
            let params = ConnectParams {
                to: from(),
                service: ServiceId::tcp(7471),
                source_port: 1,
                qp,
                mtu: Mtu::B1024,
                retry_count: 7,
                ack_timeout: 14,
                private_data: b"x",
            };
            let _ = cm.connect(now, &params);
            let question = ResolveParams {
                to: from(),
                service: ServiceId::udp(7471),
                source_port: 1,
                private_data: b"y",
            };
            let _ = cm.resolve(now, &question);
        }
        if cm.poll_timeout().is_some_and(|due| due <= now) {
            cm.handle_timeout(now);
        }
        while let Some(transmit) = cm.poll_transmit() {
            // What we say is well formed, and food for the next rounds.
            assert!(Message::decode(&transmit.mad).is_ok());
            if corpus.len() < 200 {
                corpus.push(transmit.mad.to_vec());
            }
        }
        while let Some(event) = cm.poll_event() {
            events += 1;
            answer(&mut rng, &mut cm, now, &event);
        }
    }
    assert!(events > 1_000, "{events}");
}

/// Do one of the things an application may do with an event.
fn answer(rng: &mut Rng, cm: &mut Cm, now: Nanos, event: &lowtide_transport_proto::cm::CmEvent) {
    use lowtide_transport_proto::cm::CmEvent::*;
    if let Inquiry { id, .. } = *event {
        let _ = cm.answer(now, id, rng.below(3) as u8, (Qpn::new(9), 9), b"here");
    }
    let (ConnectRequest { id, .. } | Accepted { id, .. } | Established { id }) = *event else {
        return;
    };
    let qp = QpOffer {
        qpn: Qpn::new(9),
        psn: Psn::new(9),
        responder_resources: 1,
        initiator_depth: 1,
        rnr_retry: 7,
    };
    let _ = match rng.below(5) {
        0 => cm.accept(now, id, qp, b"yes"),
        1 => cm.reject(now, id, 28, b"no"),
        2 => cm.establish(id),
        3 => cm.disconnect(now, id),
        _ => {
            cm.handle_communication(id);
            Ok(())
        }
    };
}
