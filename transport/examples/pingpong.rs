//! RDMA without hardware, root or kernel module: two devices on loopback addresses, SEND and RECV
//! back and forth, then WRITE and READ of the peer's memory. All options may be left out:
//!
//! `cargo run -p lowtide-transport --example pingpong -- --drop PERCENT --seed N --pcap FILE`

use std::time::{Duration, Instant};

use lowtide_transport::verbs::{
    Access, Buffer, CompletionQueue, Device, DeviceOptions, MemoryRegion, ProtectionDomain,
    QueuePair, SendOp, Status, WorkCompletion,
};

struct Side {
    domain: ProtectionDomain,
    queue: CompletionQueue,
    qp: QueuePair,
    shared: MemoryRegion,
}

fn option(name: &str) -> Option<String> {
    std::env::args().skip_while(|arg| arg != name).nth(1)
}

#[rustfmt::skip]
fn side(last: u8) -> Side {
    let number = |name| option(name).map_or(0.0, |value| value.parse().expect("a number"));
    let mut options = DeviceOptions::default();
    options.faults.seed = number("--seed") as u64;
    options.faults.loss_percent = number("--drop");
    options.capture = option("--pcap").filter(|_| last == 1).map(Into::into);
    let pid = std::process::id();
    let ip = [127, 64 + (pid >> 8 & 31) as u8, pid as u8, last];
    let device = Device::open((ip, 4791).into(), &options).expect("a free port");
    let domain = device.protection_domain();
    let queue = device.completion_queue(16);
    let qp = domain.queue_pair(&queue, &queue, 8, 8).expect("room");
    let shared = domain.memory_region(1 << 20, Access::ALL).expect("room");
    qp.to_init(Access::ALL).expect("a new queue pair");
    Side { domain, queue, qp, shared }
}

fn next(side: &Side) -> WorkCompletion {
    let completion = side.queue.wait(Duration::from_secs(10)).expect("one");
    assert_eq!(completion.status, Status::Success);
    completion
}

fn main() {
    let (a, b) = (side(1), side(2));
    a.qp.connect(&b.qp.address()).expect("in Init");
    b.qp.connect(&a.qp.address()).expect("in Init");
    let [mut ball, mut glove] = [&a, &b].map(|side| side.domain.slot(64).expect("room"));
    let (start, rounds) = (Instant::now(), 1000u32);
    for round in 0..rounds {
        let (from, to) = if round % 2 == 0 { (&a, &b) } else { (&b, &a) };
        ball[..4].copy_from_slice(&round.to_le_bytes());
        to.qp.post_recv(1, Buffer::Slot(glove, 64)).expect("room");
        from.qp
            .post_send(2, SendOp::Send, Buffer::Slot(ball, 64))
            .expect("room");
        // Completions return what was posted. The catcher throws next, with its own slot.
        (ball, glove) = (
            next(to).slot.expect("posted"),
            next(from).slot.expect("posted"),
        );
        assert_eq!(ball[..4], round.to_le_bytes());
    }
    println!("{rounds} messages, {:?} each", start.elapsed() / rounds);
    a.shared.write(0, b"written from afar");
    let write = SendOp::Write(b.shared.remote(0));
    a.qp.post_send(3, write, a.shared.range(0, 1 << 20))
        .expect("room");
    next(&a);
    let read = SendOp::Read(a.shared.remote(0));
    b.qp.post_send(4, read, b.shared.range(0, 1 << 20))
        .expect("room");
    println!("wrote and read {} bytes", next(&b).byte_len);
}
