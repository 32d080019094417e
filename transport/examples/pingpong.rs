//! RDMA without hardware, root or kernel module: two devices on loopback addresses, SEND and RECV
//! back and forth, then WRITE and READ of the peer's memory.
//!
//! `cargo run -p lowtide-transport --example pingpong -- [--rounds 1000] [--drop PERCENT] [--seed N]`

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use lowtide_transport::udp::SocketOptions;
use lowtide_transport::verbs::{
    Access, Buffer, CompletionQueue, Device, Faults, MemoryRegion, ProtectionDomain, QueuePair,
    SendOp, Status, WorkCompletion,
};

struct Side {
    domain: ProtectionDomain,
    queue: CompletionQueue,
    qp: QueuePair,
    shared: MemoryRegion,
}

fn option(name: &str, default: f64) -> f64 {
    let mut args = std::env::args().skip_while(|arg| arg != name);
    args.nth(1)
        .map_or(default, |value| value.parse().expect("a number"))
}

fn side(last: u8) -> Side {
    let pid = std::process::id();
    let ip = Ipv4Addr::new(127, 64 + (pid >> 8 & 31) as u8, pid as u8, last);
    let faults = Faults {
        seed: option("--seed", 1.0) as u64,
        loss_percent: option("--drop", 0.0),
        ..Faults::default()
    };
    let device = Device::open(
        SocketAddr::from((ip, 4791)),
        &SocketOptions::default(),
        &faults,
    )
    .expect("a free port");
    let domain = device.protection_domain();
    let queue = device.completion_queue(16);
    let qp = domain.queue_pair(&queue, &queue, 8, 8).expect("room");
    qp.to_init(Access::ALL).expect("a new queue pair");
    let shared = domain.memory_region(1 << 20, Access::ALL).expect("room");
    Side {
        domain,
        queue,
        qp,
        shared,
    }
}

fn next(side: &Side) -> WorkCompletion {
    let completion = side
        .queue
        .wait(Duration::from_secs(10))
        .expect("a completion");
    assert_eq!(completion.status, Status::Success);
    completion
}

fn main() {
    let (a, b) = (side(1), side(2));
    a.qp.connect(&b.qp.address()).expect("in Init");
    b.qp.connect(&a.qp.address()).expect("in Init");
    let rounds = option("--rounds", 1000.0) as u64;
    let mut ball = a.domain.slot(64).expect("room");
    let mut glove = b.domain.slot(64).expect("room");
    let start = Instant::now();
    for round in 0..rounds {
        let (from, to) = if round % 2 == 0 { (&a, &b) } else { (&b, &a) };
        ball[..8].copy_from_slice(&round.to_le_bytes());
        to.qp
            .post_recv(round, Buffer::Slot(glove, 64))
            .expect("room");
        from.qp
            .post_send(round, SendOp::Send, Buffer::Slot(ball, 64))
            .expect("room");
        // Each side owns the slot it received into, and the one it sent from, again.
        let (caught, thrown) = (
            next(to).slot.expect("posted"),
            next(from).slot.expect("posted"),
        );
        assert_eq!(caught[..8], round.to_le_bytes());
        (ball, glove) = (caught, thrown);
    }
    println!(
        "{rounds} messages, {:.1} us each",
        start.elapsed().as_micros() as f64 / rounds as f64
    );
    a.shared.write(0, b"written from afar");
    let range = a.shared.range(0, 1 << 20);
    a.qp.post_send(1, SendOp::Write(b.shared.remote(0)), range)
        .expect("room");
    next(&a);
    let range = b.shared.range(0, 1 << 20);
    b.qp.post_send(2, SendOp::Read(a.shared.remote(0)), range)
        .expect("room");
    println!("read {} bytes back", next(&b).byte_len);
}
