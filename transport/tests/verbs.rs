//! The verbs over real sockets on loopback addresses.

mod common;

use common::PATIENCE;
use lowtide_transport::udp::{Frame, Payload, Socket, TransmitBatch};
use lowtide_transport::verbs::{
    Access, Address, Buffer, CompletionQueue, CreateError, Device, DeviceOptions, Faults,
    MemoryRegion, PostError, ProtectionDomain, Qpn, QueuePair, Remote, Rkey, SendOp, SocketOptions,
    Status, WorkCompletion,
};
use lowtide_transport_proto::icrc::{Flow, Icrc};
use lowtide_transport_proto::wire::{Extension, Header, Opcode, Psn};
use std::net::IpAddr;

struct Side {
    domain: ProtectionDomain,
    queue: CompletionQueue,
    qp: QueuePair,
    device: Device,
}

fn side(faults: &Faults) -> Side {
    let options = DeviceOptions {
        faults: *faults,
        ..DeviceOptions::default()
    };
    side_of(Device::open(common::address(), &options).unwrap())
}

fn side_of(device: Device) -> Side {
    let domain = device.protection_domain();
    let queue = device.completion_queue(256);
    let qp = domain.queue_pair(&queue, &queue, 64, 64).unwrap();
    qp.to_init(Access::ALL).unwrap();
    Side {
        domain,
        queue,
        qp,
        device,
    }
}

fn pair(faults: &Faults) -> (Side, Side) {
    let (a, b) = (side(faults), side(faults));
    a.qp.connect(&b.qp.address()).unwrap();
    b.qp.connect(&a.qp.address()).unwrap();
    (a, b)
}

impl Side {
    fn next(&self) -> WorkCompletion {
        self.queue.wait(PATIENCE).expect("a completion")
    }

    fn succeed(&self) -> WorkCompletion {
        let completion = self.next();
        assert_eq!(completion.status, Status::Success);
        completion
    }
}

fn bytes(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 256 + seed) as u8).collect()
}

#[test]
fn slots_go_out_with_requests_and_come_back_with_completions() {
    let (a, b) = pair(&Faults::default());
    for (round, len) in [0, 1, 64, 4096, 4097, 100_000].into_iter().enumerate() {
        let mut slot = a.domain.slot(len).unwrap();
        slot.copy_from_slice(&bytes(len, round));
        let target = b.domain.slot(len + 10).unwrap();
        b.qp.post_recv(7, Buffer::Slot(target, len as u32 + 10))
            .unwrap();
        a.qp.post_send(8, SendOp::SendImm(99), Buffer::Slot(slot, len as u32))
            .unwrap();
        let received = b.succeed();
        assert_eq!(
            (received.id, received.imm, received.byte_len),
            (7, Some(99), len as u32)
        );
        assert_eq!(received.slot.unwrap()[..len], bytes(len, round));
        let sent = a.succeed();
        assert_eq!((sent.id, sent.qpn), (8, a.qp.address().qpn));
        assert_eq!(&sent.slot.unwrap()[..], bytes(len, round));
    }
}

#[test]
fn write_read_and_atomics_work_while_the_target_does_nothing() {
    for faults in [
        Faults::default(),
        Faults {
            seed: 3,
            loss_percent: 5.0,
            ..Faults::default()
        },
    ] {
        let (a, b) = pair(&faults);
        let target = b.domain.memory_region(1 << 20, Access::ALL).unwrap();
        let (source, sink) = (
            a.domain.memory_region(1 << 20, Access::LOCAL).unwrap(),
            a.domain.memory_region(1 << 20, Access::LOCAL).unwrap(),
        );
        source.write(0, &bytes(1 << 20, 5));
        // From here on b's thread never runs verbs: its device makes the progress.
        for (offset, len) in [(0u64, 1u32 << 20), (3, 100), (4096, 4096), (8, 0)] {
            let range = source.range(offset, len);
            a.qp.post_send(1, SendOp::Write(target.remote(offset)), range)
                .unwrap();
            a.succeed();
            sink.write(0, &vec![0; 1 << 20]);
            let range = sink.range(offset, len);
            a.qp.post_send(2, SendOp::Read(target.remote(offset)), range)
                .unwrap();
            assert_eq!(a.succeed().byte_len, len);
            let mut back = vec![0; len as usize];
            sink.read(offset as usize, &mut back);
            assert_eq!(back, bytes(1 << 20, 5)[offset as usize..][..len as usize]);
        }
        target.write(64, &5u64.to_ne_bytes());
        for expected in [5u64, 12] {
            let add = SendOp::FetchAdd {
                remote: target.remote(64),
                add: 7,
            };
            a.qp.post_send(3, add, sink.range(0, 8)).unwrap();
            a.succeed();
            let mut old = [0; 8];
            sink.read(0, &mut old);
            assert_eq!(u64::from_ne_bytes(old), expected);
        }
    }
}

#[test]
fn what_a_peer_may_not_do_fails_at_its_end_and_moves_no_byte() {
    let read_only = Access {
        remote_read: true,
        ..Access::LOCAL
    };
    let unchanged = |remote: Remote| remote;
    let other_key = |remote: Remote| Remote {
        rkey: Rkey(remote.rkey.0 ^ 1),
        ..remote
    };
    let beyond = |remote: Remote| Remote { va: 60, ..remote };
    let around = |remote: Remote| Remote {
        va: u64::MAX - 3,
        ..remote
    };
    type Change = fn(Remote) -> Remote;
    let wrong: [(&str, Change, bool); 4] = [
        ("no right to write", unchanged, true),
        ("another key", other_key, false),
        ("beyond the end", beyond, false),
        ("around the address space", around, false),
    ];
    for (name, change, is_write) in wrong {
        let (a, b) = pair(&Faults::default());
        let target = b.domain.memory_region(64, read_only).unwrap();
        let local = a.domain.memory_region(64, Access::LOCAL).unwrap();
        local.write(0, &[1; 64]);
        let remote = change(target.remote(0));
        let op = if is_write {
            SendOp::Write(remote)
        } else {
            SendOp::Read(remote)
        };
        a.qp.post_send(1, op, local.range(0, 8)).unwrap();
        assert_eq!(a.next().status, Status::RemoteAccess, "{name}");
        let mut untouched = [9; 64];
        target.read(0, &mut untouched);
        assert_eq!(untouched, [0; 64], "{name}");
    }
}

#[test]
fn a_region_dropped_under_a_request_fails_it() {
    let (a, b) = pair(&Faults::default());
    let target = b.domain.memory_region(64, Access::ALL).unwrap();
    let remote = target.remote(0);
    drop(target);
    let local = a.domain.memory_region(64, Access::LOCAL).unwrap();
    let range = local.range(0, 64);
    drop(local);
    a.qp.post_send(1, SendOp::Write(remote), range).unwrap();
    assert_eq!(a.next().status, Status::LocalProtection);
}

#[test]
fn without_a_receive_the_sender_waits_for_one() {
    let (a, b) = pair(&Faults::default());
    a.qp.post_send(1, SendOp::Send, Buffer::Empty).unwrap();
    let start = std::time::Instant::now();
    while a.device.counters().rcvd_rnr_err == 0 {
        assert!(start.elapsed() < PATIENCE);
        assert!(a.queue.poll().is_none());
    }
    b.qp.post_recv(2, Buffer::Empty).unwrap();
    assert_eq!((a.succeed().id, b.succeed().id), (1, 2));
}

#[test]
fn an_error_flushes_everything_and_returns_every_slot() {
    let (a, _b) = pair(&Faults::default());
    for id in 0..10 {
        a.qp.post_recv(id, Buffer::Slot(a.domain.slot(8).unwrap(), 8))
            .unwrap();
    }
    a.qp.to_error();
    for id in 0..10 {
        let flushed = a.next();
        assert_eq!((flushed.id, flushed.status), (id, Status::Flushed));
        assert!(flushed.slot.is_some());
    }
}

#[test]
fn queues_refuse_instead_of_overflowing() {
    let (a, _b) = pair(&Faults::default());
    for id in 0..64 {
        a.qp.post_recv(id, Buffer::Empty).unwrap();
    }
    let slot = a.domain.slot(8).unwrap();
    let refused = a.qp.post_recv(64, Buffer::Slot(slot, 8)).unwrap_err();
    assert!(
        matches!(refused.buffer, Buffer::Slot(..)),
        "memory comes back"
    );
    let shallow = a.device.completion_queue(10);
    let error = a.domain.queue_pair(&shallow, &shallow, 6, 6).unwrap_err();
    assert_eq!(error, CreateError::CompletionQueueTooShallow);
    // Room is given back with the queue pair.
    for _ in 0..100 {
        a.domain.queue_pair(&shallow, &shallow, 5, 5).unwrap();
    }
}

#[test]
fn a_stranger_who_knows_the_numbers_is_not_heard() {
    let (a, b) = pair(&Faults::default());
    let stranger = side(&Faults::default());
    // It claims a's place: same queue pair, same first PSN, right ICRC; only its address is wrong.
    stranger.qp.connect(&b.qp.address()).unwrap();
    b.qp.post_recv(1, Buffer::Slot(b.domain.slot(8).unwrap(), 8))
        .unwrap();
    stranger
        .qp
        .post_send(2, SendOp::Send, Buffer::Empty)
        .unwrap();
    let start = std::time::Instant::now();
    while b.device.counters().rx_wrong_peer == 0 {
        assert!(start.elapsed() < PATIENCE);
        assert!(b.queue.poll().is_none());
    }
    let mut slot = a.domain.slot(8).unwrap();
    slot.copy_from_slice(b"from a..");
    a.qp.post_send(3, SendOp::Send, Buffer::Slot(slot, 8))
        .unwrap();
    assert_eq!(&b.succeed().slot.unwrap()[..], b"from a..");
}

#[test]
fn a_slot_is_posted_to_its_own_device_only() {
    let (a, b) = pair(&Faults::default());
    for _ in 0..4 {
        let slot = b.domain.slot(8).unwrap();
        let refused = a.qp.post_recv(1, Buffer::Slot(slot, 8)).unwrap_err();
        assert_eq!(refused.error, PostError::Invalid);
        assert!(matches!(refused.buffer, Buffer::Slot(..)), "it comes back");
        drop(refused);
    }
}

#[test]
fn queues_deeper_than_any_device_has_are_refused() {
    let a = side(&Faults::default());
    let deep = a.device.completion_queue(u32::MAX);
    let error = a.domain.queue_pair(&deep, &deep, 1 << 30, 1).unwrap_err();
    assert_eq!(error, CreateError::Exhausted);
}

#[test]
fn the_same_over_ipv6() {
    // Port 0: the one address ::1 is shared, and the kernel picks a free port.
    let address = (std::net::Ipv6Addr::LOCALHOST, 0).into();
    let open = || Device::open(address, &DeviceOptions::default()).ok();
    let (Some(a), Some(b)) = (open(), open()) else {
        return common::not_checked("IPv6, which this machine has not on its loopback interface");
    };
    let (a, b) = (side_of(a), side_of(b));
    a.qp.connect(&b.qp.address()).unwrap();
    b.qp.connect(&a.qp.address()).unwrap();
    let target = b.domain.memory_region(1 << 20, Access::ALL).unwrap();
    let local = a.domain.memory_region(1 << 20, Access::LOCAL).unwrap();
    local.write(0, &bytes(1 << 20, 3));
    let whole = |region: &MemoryRegion| region.range(0, 1 << 20);
    a.qp.post_send(1, SendOp::Write(target.remote(0)), whole(&local))
        .unwrap();
    a.succeed();
    local.write(0, &vec![0; 1 << 20]);
    a.qp.post_send(2, SendOp::Read(target.remote(0)), whole(&local))
        .unwrap();
    a.succeed();
    let mut back = vec![0; 1 << 20];
    local.read(0, &mut back);
    assert_eq!(back, bytes(1 << 20, 3));
    let counters = b.device.counters();
    assert_eq!((counters.rx_bad_icrc, counters.rx_malformed), (0, 0));
}

#[test]
fn an_empty_datagram_is_counted_too() {
    let a = side(&Faults::default());
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::LOCALHOST, 0)).unwrap();
    socket.send_to(&[], a.device.local_addr()).unwrap();
    let start = std::time::Instant::now();
    while a.device.counters().rx_malformed == 0 {
        assert!(start.elapsed() < PATIENCE);
        assert!(a.queue.poll().is_none());
    }
}

/// A hand-made peer: it sends what it likes from the address that a queue pair is connected to.
struct Forger {
    socket: Socket,
    victim: Address,
}

impl Forger {
    fn new(victim: &Side) -> Forger {
        let socket = Socket::bind(common::address(), &SocketOptions::default()).unwrap();
        let address = Address {
            socket: socket.local_addr(),
            qpn: Qpn::new(0x77),
            psn: 0,
            budget: 16,
        };
        victim.qp.connect(&address).unwrap();
        Forger {
            socket,
            victim: victim.qp.address(),
        }
    }

    fn send_frame(&self, psn: u32, len: u32, is_spoilt: bool) -> Frame {
        let header = Header::new(
            Opcode::RcSendOnly,
            self.victim.qpn,
            Psn::new(psn),
            Extension::Bare,
        );
        let mut bytes = [0; 64];
        let header_len = header.emit(&mut bytes);
        Frame {
            target: self.victim.socket,
            header: bytes,
            header_len: header_len as u8,
            trailer_len: 4,
            trailer: [0; 8],
            payload: Payload {
                region: 0,
                len,
                offset: u64::from(psn),
            },
            is_spoilt,
        }
    }
}

#[test]
fn good_datagrams_between_bad_ones_of_the_same_run_are_taken() {
    const COUNT: u32 = 16;
    let victim = side(&Faults::default());
    let mut forger = Forger::new(&victim);
    for id in 0..u64::from(COUNT) {
        let slot = victim.domain.slot(64).unwrap();
        victim.qp.post_recv(id, Buffer::Slot(slot, 64)).unwrap();
    }
    let memory = bytes(1024, 1);
    let mut batch = TransmitBatch::default();
    for psn in 0..COUNT {
        // Equal lengths, so that all leave in one send and arrive in one receive.
        batch.push(forger.send_frame(psn, 64, false));
        batch.push(forger.send_frame(psn + 1, 64, true));
    }
    let from = forger.socket.local_addr();
    let IpAddr::V4(source) = from.ip() else {
        unreachable!("the tests use IPv4")
    };
    let report = forger.socket.send(
        &mut batch,
        |payload| &memory[payload.offset as usize..][..payload.len as usize],
        |frame, payload, identification| {
            let IpAddr::V4(target) = frame.target.ip() else {
                unreachable!("the tests use IPv4")
            };
            let flow = Flow {
                target_port: frame.target.port(),
                ..Flow::v4(source, target, from.port())
            };
            let flow = flow.with_identification(identification);
            let mut crc = Icrc::begin(&flow, frame.header(), frame.wire_len());
            crc.update(payload);
            let (mut tail, len) = crc.finish(0);
            tail[0] ^= u8::from(frame.is_spoilt);
            frame.trailer[..len].copy_from_slice(&tail[..len]);
        },
    );
    assert_eq!(report.datagrams, 2 * u64::from(COUNT));
    for id in 0..u64::from(COUNT) {
        let received = victim.succeed();
        assert_eq!((received.id, received.byte_len), (id, 64));
        assert_eq!(received.slot.unwrap()[..], memory[id as usize..][..64]);
    }
    let counters = victim.device.counters();
    assert_eq!(counters.rx_bad_icrc, u64::from(COUNT));
    if report.gso_sends > 0 {
        assert!(counters.gro_receives > 0, "one receive brought several");
    }
}
