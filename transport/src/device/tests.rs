//! The device: peers that behave, and peers that do not.

use std::net::Ipv4Addr;

use lowtide_transport_proto::icrc;
use lowtide_transport_proto::qp::{Lkey, QpState, RecvWr, SendOp, SendWr, SgList, WrId};
use lowtide_transport_proto::wire::{Deth, Extension, Header, Opcode, Packet, Psn, Reth};

use super::hostile::*;
use super::output::RESPONSES_MAX;
use super::output::flow;
use super::*;
use crate::memory::{Access, Key, SharedMemory};
use crate::names::Random;
use crate::udp::{Arrival, ReceiveBatch};

fn state(device: &mut Device, id: QpId) -> QpState {
    device.qp(id).unwrap().state()
}

#[test]
fn a_peer_invalidates_only_what_peers_of_its_domain_may_reach() {
    let mut device = device();
    let held = device.memory.reserve(ATTACKED).unwrap();
    device.memory.attach(held, vec![7; 64].into_boxed_slice());
    let shared = |device: &mut Device, domain, access| {
        let memory = SharedMemory::new(64);
        device.memory.register_shared(domain, memory, access)
    };
    let local = shared(&mut device, ATTACKED, Access::LOCAL).unwrap();
    let foreign = shared(&mut device, OTHER, Access::ALL).unwrap();
    let granted = shared(&mut device, ATTACKED, Access::ALL).unwrap();
    for (key, domain, may) in [
        (held, ATTACKED, false),
        (local, ATTACKED, false),
        (foreign, OTHER, false),
        (Key(granted.0 ^ 1), ATTACKED, false),
        (granted, ATTACKED, true),
    ] {
        let (id, qpn) = connect(&mut device, ATTACKED, peer(1));
        let list = SgList::EMPTY;
        let wr_id = WrId(1);
        let qp = device.qp(id).unwrap();
        qp.post_recv(RecvWr { wr_id, local: list }).unwrap();
        let ieth = Extension::Ieth(key.0);
        let header = request(Opcode::RcSendOnlyInvalidate, qpn, PSN, ieth);
        deliver(&mut device, peer(1), header, &[]);
        let is_there = |device: &Device| {
            let check = device.memory.check(domain, key, 0, 64, Access::default());
            check.is_ok()
        };
        if may {
            assert!(!is_there(&device), "{key:?}");
            assert_eq!(state(&mut device, id), QpState::Rts);
        } else {
            assert_eq!(state(&mut device, id), QpState::Err, "{key:?}");
            let real = Key(key.0 ^ u32::from(key.0 == granted.0 ^ 1));
            let check = device.memory.check(domain, real, 0, 64, Access::default());
            assert!(check.is_ok(), "{key:?}");
        }
        device.destroy_qp(id);
    }
    assert_eq!(&device.memory.detach(held).unwrap()[..], [7; 64]);
}

#[test]
fn a_long_read_is_served_in_turns() {
    const LEN: u32 = 8 << 20;
    let mut device = device();
    let memory = SharedMemory::new(LEN as usize);
    let key = device
        .memory
        .register_shared(ATTACKED, memory, Access::ALL)
        .unwrap();
    let (_, qpn) = connect(&mut device, ATTACKED, peer(1));
    let reth = Reth {
        va: 0,
        rkey: key.0,
        len: LEN,
    };
    let header = request(Opcode::RcReadRequest, qpn, PSN, Extension::Reth(reth));
    deliver(&mut device, peer(1), header, &[]);
    let mut sent = 0;
    let mut turns = 0;
    while device.has_output() {
        let now = device.now();
        device.transmit(now);
        let counters = device.counters();
        let after = counters.sent_pkts + counters.send_err;
        assert!(after - sent <= u64::from(RESPONSES_MAX), "one turn");
        (sent, turns) = (after, turns + 1);
        assert!(turns < 1000);
    }
    assert_eq!(sent, u64::from(LEN / 4096));
}

#[test]
fn a_congestion_notification_halves_the_budget_of_its_peer_alone() {
    let mut device = device();
    let (_, qpn) = connect(&mut device, ATTACKED, peer(1));
    connect(&mut device, ATTACKED, peer(2));
    let rooms = |device: &Device| -> Vec<u32> {
        device.peers.iter().map(|peer| peer.budget.room()).collect()
    };
    let before = rooms(&device);
    let mut header = Header::new(Opcode::Cnp, qpn, Psn::new(0), Extension::Cnp);
    header.becn = true;
    deliver(&mut device, peer(1), header, &[]);
    assert_eq!(rooms(&device), [before[0] / 2, before[1]]);
}

/// Receives until the socket is empty, as whoever drives a device does.
fn receive_all(device: &mut Device, batch: &mut ReceiveBatch) -> usize {
    let mut taken = 0;
    while device.receive(batch).unwrap() > 0 {
        let now = device.now();
        for slot in 0..batch.len() {
            let arrival = batch.arrival(slot).unwrap();
            for datagram in arrival.bytes.chunks(arrival.segment) {
                let input = device.handle(now, &arrival, 0, datagram);
                taken += usize::from(matches!(input, Input::Taken { .. }));
            }
        }
    }
    device.flush();
    taken
}

/// A marked packet that really comes over a socket is answered with one notification per interval;
/// an unmarked one and a marked notification with none.
#[test]
fn a_marked_packet_is_answered_with_a_congestion_notification() {
    const CONGESTED: u32 = 3;
    let mut device = device();
    let ip = Ipv4Addr::new(127, 0, 78, 1);
    // A socket of ours, so that the Identification of what it sends is known.
    let far = Socket::bind((ip, 0).into(), &SocketOptions::default()).unwrap();
    let far = far.plain();
    let options = socket2::SockRef::from(far);
    let from = far.local_addr().unwrap();
    let (_, qpn) = connect(&mut device, ATTACKED, from);
    let mut batch = ReceiveBatch::default();
    let mut send = |device: &mut Device, header: Header, class| {
        options.set_tos_v4(class).unwrap();
        let bytes = datagram(device, from, header, &[]);
        let sent = device.counters().np_cnp_sent;
        far.send_to(&bytes, device.local_addr()).unwrap();
        while receive_all(device, &mut batch) == 0 {}
        device.counters().np_cnp_sent - sent
    };
    let request = |psn| request(Opcode::RcSendOnly, qpn, psn, Extension::Bare);
    let mut notification = Header::new(Opcode::Cnp, qpn, Psn::new(0), Extension::Cnp);
    notification.becn = true;
    assert_eq!(send(&mut device, request(PSN), 0), 0);
    assert_eq!(send(&mut device, notification, CONGESTED), 0);
    assert_eq!(device.counters().rp_cnp_handled, 1);
    assert_eq!(send(&mut device, request(PSN), CONGESTED), 1);
    assert_eq!(device.counters().np_ecn_marked_roce_packets, 2);

    let mut bytes = [0; 4200];
    let found = std::iter::from_fn(|| far.recv(&mut bytes).ok().map(|len| bytes[..len].to_vec()));
    let found: Vec<Vec<u8>> = found
        .filter(|bytes| bytes[0] == Opcode::Cnp.code())
        .collect();
    assert_eq!(found.len(), 1);
    let packet = Packet::new_checked(&found[0]).unwrap();
    assert_eq!(found[0].len(), 32, "BTH, sixteen reserved bytes, ICRC");
    assert_eq!((packet.dest(), packet.psn()), (Qpn::new(0x77), Psn::new(0)));
    assert_eq!(found[0][4], 0x40, "BECN and nothing else");
    let flow = flow(device.local_addr(), ip.into(), from.port()).unwrap();
    assert!(icrc::check(&flow, &packet));
}

#[test]
fn notifications_of_one_queue_pair_keep_their_distance() {
    let mut device = device();
    let (_, first) = connect(&mut device, ATTACKED, peer(1));
    let (_, second) = connect(&mut device, ATTACKED, peer(1));
    let marked = Arrival {
        is_congested: true,
        ..arrival(peer(1))
    };
    let mut at = |micros, qpn| {
        let header = request(Opcode::RcSendOnly, qpn, PSN, Extension::Bare);
        let bytes = datagram(&device, peer(1), header, &[]);
        device.handle(Nanos::from_micros(micros), &marked, 0, &bytes);
        device.counters().np_cnp_sent
    };
    assert_eq!([at(100, first), at(149, first), at(150, first)], [1, 1, 2]);
    assert_eq!(at(151, second), 3, "each flow has its own");
}

#[test]
fn an_identification_out_of_turn_is_counted_and_dropped_until_the_next_confirms_it() {
    let mut device = device();
    let (id, qpn) = connect(&mut device, ATTACKED, peer(1));
    for place in 0..4 {
        let list = SgList::EMPTY;
        let qp = device.qp(id).unwrap();
        let wr_id = WrId(place);
        qp.post_recv(RecvWr { wr_id, local: list }).unwrap();
    }
    let mut send = |psn, identification| {
        let header = request(Opcode::RcSendOnly, qpn, psn, Extension::Bare);
        let bytes = identified(&device, peer(1), header, &[], identification);
        let now = device.now();
        let taken = matches!(
            device.handle(now, &arrival(peer(1)), 0, &bytes),
            Input::Taken { .. }
        );
        (taken, device.counters().rx_odd_identification)
    };
    assert_eq!(send(PSN, 0), (true, 0));
    assert_eq!(send(PSN + 1, 5000), (false, 1));
    assert_eq!(send(PSN + 1, 5007), (true, 1));
    assert_eq!(send(PSN + 2, 5100), (true, 1));
}

/// Also the one that is held back when its batch is full.
#[test]
fn datagrams_out_of_order_all_leave() {
    const COUNT: u64 = 10_000;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let options = DeviceOptions {
        faults: Faults {
            seed: 1,
            reorder_percent: 30.0,
            ..Faults::default()
        },
        ..DeviceOptions::default()
    };
    let mut device = Device::bind(address, &options, Peers::Any, Random::known).unwrap();
    for _ in 0..COUNT {
        device.send_management(peer(1), &[0; 20], &[]);
    }
    device.flush();
    let counters = device.counters();
    assert_eq!(counters.sent_pkts + counters.send_err, COUNT);
}

#[test]
fn peers_that_have_gone_are_forgotten() {
    let mut device = device();
    for port in 1..2000 {
        let address = SocketAddr::from((Ipv4Addr::new(127, 0, 77, 9), port));
        let (id, _) = connect(&mut device, ATTACKED, address);
        device.destroy_qp(id);
    }
    assert!(device.peers.len() <= 1 && device.peer_index.is_empty());
}

#[test]
fn whatever_a_peer_sends_reaches_nobody_else_and_is_bounded_work() {
    for seed in 0..4 {
        let mut rng = Choices::Seeded(seed);
        let mut device = device();
        let bystander = bystander(&mut device);
        let memory = SharedMemory::new(8192);
        let mine = device
            .memory
            .register_shared(ATTACKED, memory.clone(), Access::ALL)
            .unwrap();
        let mut keys: Vec<u32> = [mine, bystander.slot, bystander.local, bystander.foreign]
            .map(|key| key.0)
            .into();
        let before = *device.qp(bystander.id).unwrap().counters();
        let mut live = None;
        let mut sent = 0;
        for round in 0..20_000u32 {
            let (id, qpn) = *live.get_or_insert_with(|| connect(&mut device, ATTACKED, peer(1)));
            if rng.below(16) == 0 {
                let local = SgList::one(Lkey(keys[0]), 0, 4096 + rng.below(4096) as u32);
                let qp = device.qp(id).unwrap();
                let wr_id = WrId(u64::from(round));
                let _ = qp.post_recv(RecvWr { wr_id, local });
                let _ = qp.post_send(SendWr::new(wr_id, SendOp::Send, local));
            }
            let psn = device.qp(id).unwrap().expected_psn().value();
            let from = peer(1 + u8::from(rng.below(8) == 0) * 7);
            let bytes = attack(&mut rng, &device, from, [qpn, bystander.qpn], &keys, psn);
            let now = device.now();
            device.handle(now, &arrival(from), 0, &bytes);
            while device.expire(now).is_some() {}
            device.transmit(now);
            let counters = device.counters();
            let after = counters.sent_pkts + counters.send_err;
            assert!(after - sent <= u64::from(RESPONSES_MAX) + 2 * u64::from(qp::WINDOW));
            sent = after;
            while device.poll_completion(id).is_some() {}
            if state(&mut device, id) == QpState::Err {
                device.destroy_qp(id);
                live = None;
            }
            let mine = Key(keys[0]);
            if device
                .memory
                .check(ATTACKED, mine, 0, 1, Access::default())
                .is_err()
            {
                // Its own region it may invalidate; a new one takes its place.
                keys[0] = device
                    .memory
                    .register_shared(ATTACKED, memory.clone(), Access::ALL)
                    .unwrap()
                    .0;
            }
        }
        let after = *device.qp(bystander.id).unwrap().counters();
        assert_eq!(before, after, "the bystander heard nothing");
        assert!(device.slots.len() <= 4 && device.peers.len() <= 3);
        assert!(device.timers.next().is_none() || device.ready.len() <= 4);
        let counters = device.counters();
        for (name, count) in [
            ("malformed", counters.rx_malformed),
            ("bad icrc", counters.rx_bad_icrc),
            ("unknown qp", counters.rx_unknown_qp),
            ("wrong peer", counters.rx_wrong_peer),
            ("dropped", counters.dropped_pkts),
            ("out of sequence", counters.out_of_seq_request),
            ("duplicate", counters.duplicate_request),
        ] {
            assert!(count > 100, "{name}: {count}");
        }
        bystander.check(&mut device);
    }
}

#[test]
fn a_packet_counts_only_from_the_address_of_the_peer() {
    let mut device = device();
    let (id, qpn) = connect(&mut device, ATTACKED, peer(1));
    let wr_id = WrId(1);
    let local = SgList::EMPTY;
    let qp = device.qp(id).unwrap();
    qp.post_recv(RecvWr { wr_id, local }).unwrap();
    let send = request(Opcode::RcSendOnly, qpn, PSN, Extension::Bare);
    let before = *device.qp(id).unwrap().counters();
    for last in [2, 3, 8] {
        let input = deliver(&mut device, peer(last), send, &[]);
        assert!(matches!(input, Input::Dropped), "{input:?}");
    }
    assert_eq!(device.counters().rx_wrong_peer, 3);
    assert_eq!(*device.qp(id).unwrap().counters(), before);
    assert!(device.poll_completion(id).is_none());
    // From another port of the peer's it counts: kernels and adapters send from any.
    let mut other_port = peer(1);
    other_port.set_port(50_000);
    let input = deliver(&mut device, other_port, send, &[]);
    assert!(matches!(input, Input::Taken { .. }), "{input:?}");
    assert_eq!(device.poll_completion(id).unwrap().wr_id, wr_id);
}

/// What a bad datagram does to the counters: only the one that is named.
#[test]
fn every_kind_of_bad_packet_has_its_counter() {
    type Change = fn(&mut Vec<u8>);
    type Count = fn(&Counters) -> u64;
    let mut device = device();
    let (id, qpn) = connect(&mut device, ATTACKED, peer(1));
    let send = |qpn| request(Opcode::RcSendOnly, qpn, PSN, Extension::Bare);
    let good = datagram(&device, peer(1), send(qpn), &[7; 64]);
    let now = device.now();
    let mut bad: Vec<(&str, Vec<u8>, Count)> = Vec::new();
    let changes: [(&str, Change); 6] = [
        ("empty", |bytes| bytes.clear()),
        ("truncated in the header", |bytes| bytes.truncate(11)),
        ("no whole words", |bytes| bytes.truncate(bytes.len() - 1)),
        ("another version", |bytes| bytes[1] |= 1),
        ("no such opcode", |bytes| bytes[0] = 0x1F),
        ("longer than any MTU", |bytes| bytes.resize(5000, 0)),
    ];
    for (what, change) in changes {
        let mut bytes = good.clone();
        change(&mut bytes);
        bad.push((what, bytes, |counters| counters.rx_malformed));
    }
    let mut flipped = good.clone();
    flipped[20] ^= 1;
    bad.push(("a bit flipped", flipped, |counters| counters.rx_bad_icrc));
    let cut = [&good[..good.len() - 8], &good[good.len() - 4..]].concat();
    bad.push(("truncated in the payload", cut, |counters| {
        counters.rx_bad_icrc
    }));
    let nobody = datagram(&device, peer(1), send(Qpn::new(qpn.value() ^ 1)), &[]);
    bad.push(("nobody's", nobody, |counters| counters.rx_unknown_qp));
    let stranger = datagram(&device, peer(3), send(qpn), &[]);
    bad.push(("a stranger's", stranger, |counters| counters.rx_wrong_peer));
    let mut partition = send(qpn);
    partition.pkey = 0x1234;
    let class = request(Opcode::UcSendOnly, qpn, PSN, Extension::Bare);
    let ud = Deth {
        qkey: 1,
        source: Qpn::new(9),
    };
    let datagram_class = request(Opcode::UdSendOnly, qpn, PSN, Extension::Deth(ud));
    let [partition, class, datagram_class] =
        [partition, class, datagram_class].map(|header| datagram(&device, peer(1), header, &[]));
    let dropped: Count = |counters| counters.dropped_pkts;
    bad.push(("another partition", partition, dropped));
    bad.push(("another class", class, dropped));
    bad.push(("a datagram to a connection", datagram_class, dropped));
    for (what, bytes, count) in &bad {
        let before = device.counters();
        let from = if *what == "a stranger's" {
            peer(3)
        } else {
            peer(1)
        };
        device.handle(now, &arrival(from), 0, bytes);
        let after = device.counters();
        assert_eq!(count(&after), count(&before) + 1, "{what}");
        let anomalies = |counters: &Counters| {
            counters.rx_malformed
                + counters.rx_bad_icrc
                + counters.rx_unknown_qp
                + counters.rx_wrong_peer
                + counters.dropped_pkts
        };
        assert_eq!(anomalies(&after), anomalies(&before) + 1, "{what}");
        assert_eq!(state(&mut device, id), QpState::Rts, "{what}");
        assert!(device.poll_completion(id).is_none(), "{what}");
    }
}

#[test]
fn a_bad_key_or_length_fails_the_queue_pair_that_it_was_sent_to() {
    let reth = |rkey, len| Reth { va: 0, rkey, len };
    let mut device = device();
    let memory = SharedMemory::new(4096);
    let key = device.memory.register_shared(ATTACKED, memory, Access::ALL);
    let key = key.unwrap().0;
    for (rkey, len) in [
        (key ^ 1, 64),
        (key ^ 1 << 31, 64),
        (0, 64),
        (key, 32),
        (key, 5000),
    ] {
        let (id, qpn) = connect(&mut device, ATTACKED, peer(1));
        let write = Extension::Reth(reth(rkey, len));
        let header = request(Opcode::RcWriteOnly, qpn, PSN, write);
        deliver(&mut device, peer(1), header, &[7; 64]);
        assert_eq!(state(&mut device, id), QpState::Err, "{rkey:#x} {len}");
        let mut bytes = [9; 4096];
        let span = device
            .memory
            .check(ATTACKED, Key(key), 0, 4096, Access::default());
        device.memory.fetch(span.unwrap(), &mut bytes).unwrap();
        assert_eq!(bytes, [0; 4096], "nothing is written");
        device.destroy_qp(id);
    }
}
