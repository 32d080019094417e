//! A device among hostile peers. Datagrams are handed to it directly, so every run is the same.

use std::net::Ipv4Addr;

use lowtide_transport_proto::icrc::Icrc;
use lowtide_transport_proto::qp::{
    Access as Rights, CompletionKind, InitAttr, QpState, RecvWr, RtrAttr, RtsAttr, SendOp, SendWr,
    SgList, Status, WrId,
};
use lowtide_transport_proto::wire::{
    Aeth, AtomicEth, Deth, Extension, Feth, Header, Mtu, OPCODES, Opcode, PKEY_DEFAULT, Packet,
    PayloadRule, Psn, Reth, RnrTimer, Shape, Syndrome, pad_len,
};

use super::output::RESPONSES_MAX;
use super::*;
use crate::memory::{Access, Key, SharedMemory};
use crate::udp::{Arrival, ReceiveBatch};

const ATTACKED: u32 = 1;
const OTHER: u32 = 2;
const PSN: u32 = 0xFF_FFF0;

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

fn device() -> Device {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    Device::bind(address, &DeviceOptions::default(), Peers::Any, 0x5A).unwrap()
}

fn peer(last: u8) -> SocketAddr {
    // Nobody listens there: what the device answers is dropped by the kernel.
    SocketAddr::from((Ipv4Addr::new(127, 0, 77, last), 4791))
}

/// A working queue pair of `domain`, connected to `address`.
fn connect(device: &mut Device, domain: u32, address: SocketAddr) -> (QpId, Qpn) {
    let caps = QpCaps {
        send_wr_max: 16,
        recv_wr_max: 16,
        shared_receives: false,
    };
    let (id, qpn) = device.create_qp(domain, caps).unwrap();
    let qp = device.qp(id).unwrap();
    qp.to_init(InitAttr {
        access: Rights::ALL,
        pkey: PKEY_DEFAULT,
    })
    .unwrap();
    qp.to_rtr(RtrAttr {
        dest: Qpn::new(0x77),
        path_mtu: Mtu::B4096,
        rq_psn: Psn::new(PSN),
        max_dest_rd_atomic: 16,
        min_rnr_timer: RnrTimer::new(1),
    })
    .unwrap();
    qp.to_rts(RtsAttr {
        sq_psn: Psn::new(PSN),
        timeout: 14,
        retry_cnt: 7,
        rnr_retry: 7,
        max_rd_atomic: 16,
        read_chunk_packets: 16,
    })
    .unwrap();
    device.set_peer(id, address, None);
    (id, qpn)
}

/// What the kernel says of a datagram: no more than where it came from.
fn arrival(source: SocketAddr) -> Arrival<'static> {
    Arrival {
        source,
        target: None,
        bytes: &[],
        segment: 1,
        is_truncated: false,
        is_congested: false,
        is_local: false,
        overflow: None,
    }
}

/// A datagram with a right ICRC.
fn datagram(device: &Device, from: SocketAddr, header: Header, payload: &[u8]) -> Vec<u8> {
    identified(device, from, header, payload, 0)
}

/// The same with an IPv4 Identification.
fn identified(
    device: &Device,
    from: SocketAddr,
    mut header: Header,
    payload: &[u8],
    identification: u16,
) -> Vec<u8> {
    header.pad = pad_len(payload.len()) as u8;
    let local = device.local_addr();
    let mut bytes = vec![0; 64];
    let len = header.emit(&mut bytes);
    bytes.truncate(len);
    let flow = flow(from, local.ip(), local.port()).unwrap();
    let flow = flow.with_identification(identification);
    let total = len + payload.len() + pad_len(payload.len()) + 4;
    let mut crc = Icrc::begin(&flow, &bytes, total);
    crc.update(payload);
    let (tail, tail_len) = crc.finish(pad_len(payload.len()));
    bytes.extend_from_slice(payload);
    bytes.extend_from_slice(&tail[..tail_len]);
    bytes
}

fn request(opcode: Opcode, to: Qpn, psn: u32, extension: Extension) -> Header {
    let mut header = Header::new(opcode, to, Psn::new(psn), extension);
    header.ack_req = true;
    header
}

fn deliver(device: &mut Device, from: SocketAddr, header: Header, payload: &[u8]) -> Input {
    let bytes = datagram(device, from, header, payload);
    let now = device.now();
    device.handle(now, &arrival(from), &bytes)
}

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
        let after = counters.tx_datagrams + counters.tx_refused;
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
                let input = device.handle(now, &arrival, datagram);
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
        device.handle(Nanos::from_micros(micros), &marked, &bytes);
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
            device.handle(now, &arrival(peer(1)), &bytes),
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
    let mut device = Device::bind(address, &options, Peers::Any, 0x5A).unwrap();
    for _ in 0..COUNT {
        device.send_management(peer(1), &[0; 20], &[]);
    }
    device.flush();
    let counters = device.counters();
    assert_eq!(counters.tx_datagrams + counters.tx_refused, COUNT);
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

/// An extension with values that an attacker would try.
fn extension(rng: &mut Rng, shape: Shape, keys: &[u32]) -> Extension {
    let odd = [
        0,
        1,
        7,
        8,
        63,
        64,
        4095,
        4096,
        u64::from(u32::MAX),
        u64::MAX - 7,
        u64::MAX,
    ];
    let mut value = || odd[rng.below(odd.len() as u64) as usize];
    let va = value();
    let len = value() as u32;
    let word = value();
    let swap_add = value();
    let rkey = match rng.below(4) {
        0 => rng.next() as u32,
        1 => keys[rng.below(keys.len() as u64) as usize] ^ 1 << rng.below(32),
        _ => keys[rng.below(keys.len() as u64) as usize],
    };
    let reth = Reth { va, rkey, len };
    let aeth = Aeth {
        syndrome: Syndrome::from_byte(rng.next() as u8),
        msn: rng.next() as u32 & 0xFF_FFFF,
    };
    let deth = Deth {
        qkey: rng.next() as u32,
        source: Qpn::new(rng.next() as u32),
    };
    match shape {
        Shape::Bare => Extension::Bare,
        Shape::Imm => Extension::Imm(word as u32),
        Shape::Ieth => Extension::Ieth(rkey),
        Shape::Reth => Extension::Reth(reth),
        Shape::RethImm => Extension::RethImm(reth, word as u32),
        Shape::Aeth => Extension::Aeth(aeth),
        Shape::AtomicAck => Extension::AtomicAck(aeth, word),
        Shape::Atomic => Extension::Atomic(AtomicEth {
            va,
            rkey,
            swap_add,
            compare: word,
        }),
        Shape::Deth => Extension::Deth(deth),
        Shape::DethImm => Extension::DethImm(deth, word as u32),
        Shape::FethReth => Extension::FethReth(
            Feth {
                bits: rng.next() as u32,
            },
            reth,
        ),
        Shape::Cnp => Extension::Cnp,
    }
}

fn payload_len(rng: &mut Rng, rule: PayloadRule) -> usize {
    match rule {
        PayloadRule::None => 0,
        PayloadRule::Full => [256, 512, 1024, 2048, 4096, 4096, 4096][rng.below(7) as usize],
        PayloadRule::Eight => 8,
        PayloadRule::Tail => 1 + rng.below(4096) as usize,
        PayloadRule::Any => [0, 1, 64, 4096, rng.below(4097) as usize][rng.below(5) as usize],
    }
}

/// What the attacker may not touch: a queue pair, a slot posted to it, memory of two kinds.
struct Bystander {
    id: QpId,
    qpn: Qpn,
    slot: Key,
    local: Key,
    foreign: Key,
}

fn bystander(device: &mut Device) -> Bystander {
    let (id, qpn) = connect(device, OTHER, peer(2));
    let slot = device.memory.reserve(OTHER).unwrap();
    device.memory.attach(slot, vec![5; 64].into_boxed_slice());
    let local = SgList::one(Lkey(slot.0), 0, 64);
    let wr_id = WrId(9);
    device
        .qp(id)
        .unwrap()
        .post_recv(RecvWr { wr_id, local })
        .unwrap();
    let mut shared = |domain, access| {
        let memory = SharedMemory::new(64);
        memory.write(0, &[6; 64]);
        let key = device.memory.register_shared(domain, memory, access);
        key.unwrap()
    };
    let (local, foreign) = (shared(ATTACKED, Access::LOCAL), shared(OTHER, Access::ALL));
    Bystander {
        id,
        qpn,
        slot,
        local,
        foreign,
    }
}

impl Bystander {
    /// Its receive still works, and its memory is as it was.
    fn check(&self, device: &mut Device) {
        let header = request(Opcode::RcSendOnly, self.qpn, PSN, Extension::Bare);
        assert!(matches!(
            deliver(device, peer(2), header, b"for me"),
            Input::Taken { .. }
        ));
        let completion = device.poll_completion(self.id).unwrap();
        assert_eq!(completion.kind, CompletionKind::Recv);
        assert_eq!(
            (completion.wr_id, completion.status, completion.byte_len),
            (WrId(9), Status::Success, 6)
        );
        assert_eq!(&device.memory.detach(self.slot).unwrap()[..6], b"for me");
        for (domain, key) in [(ATTACKED, self.local), (OTHER, self.foreign)] {
            let span = device.memory.check(domain, key, 0, 64, Access::default());
            let mut bytes = [0; 64];
            device.memory.fetch(span.unwrap(), &mut bytes).unwrap();
            assert_eq!(bytes, [6; 64]);
        }
    }
}

/// One datagram of an attacker who knows all numbers of one connection and guesses the rest.
fn attack(
    rng: &mut Rng,
    device: &Device,
    from: SocketAddr,
    qpns: [Qpn; 2],
    keys: &[u32],
    psn: u32,
) -> Vec<u8> {
    let row = &OPCODES[rng.below(OPCODES.len() as u64) as usize];
    let to = match rng.below(8) {
        0 => qpns[1],
        1 => Qpn::new(rng.next() as u32),
        2 => Qpn::GSI,
        _ => qpns[0],
    };
    let psn = match rng.below(4) {
        0 => rng.next() as u32,
        1 => psn.wrapping_sub(rng.below(200) as u32),
        _ => psn,
    };
    let mut header = Header::new(
        row.opcode,
        to,
        Psn::new(psn),
        extension(rng, row.shape, keys),
    );
    header.ack_req = rng.below(2) == 0;
    let payload: Vec<u8> = (0..payload_len(rng, row.payload))
        .map(|_| rng.next() as u8)
        .collect();
    let mut bytes = datagram(device, from, header, &payload);
    match rng.below(12) {
        0 => bytes.truncate(rng.below(bytes.len() as u64 + 1) as usize),
        1 => {
            let at = rng.below(bytes.len() as u64) as usize;
            bytes[at] ^= 1 << rng.below(8);
        }
        2 => bytes.extend_from_slice(&[0; 3][..rng.below(4) as usize]),
        3 => bytes.clear(),
        _ => {}
    }
    bytes
}

#[test]
fn whatever_a_peer_sends_reaches_nobody_else_and_is_bounded_work() {
    for seed in 0..4 {
        let mut rng = Rng(seed);
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
            device.handle(now, &arrival(from), &bytes);
            while device.expire(now).is_some() {}
            device.transmit(now);
            let counters = device.counters();
            let after = counters.tx_datagrams + counters.tx_refused;
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
