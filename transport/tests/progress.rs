//! What a device's own thread does while programs poll, and while nothing happens at all. In a
//! program of its own: the threads of other tests would be counted too.

mod common;

use std::fs;
use std::time::{Duration, Instant};

use common::PATIENCE;
use lowtide_transport::verbs::{
    Access, Buffer, CompletionQueue, Device, DeviceOptions, QueuePair, SendOp, Status,
};

/// How often the threads of devices have gone to sleep.
fn sleeps() -> u64 {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let mut sum = 0;
    for task in tasks {
        let path = task.unwrap().path();
        if fs::read_to_string(path.join("comm")).is_ok_and(|name| name.starts_with("lowtide-soft"))
        {
            let status = fs::read_to_string(path.join("status")).unwrap_or_default();
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            sum += line.map_or(0, |n| n.trim().parse().unwrap());
        }
    }
    sum
}

struct Side {
    _device: Device,
    queue: CompletionQueue,
    qp: QueuePair,
}

fn side() -> Side {
    let device = Device::open(common::address(), &DeviceOptions::default()).unwrap();
    let domain = device.protection_domain();
    let queue = device.completion_queue(64);
    let qp = domain.queue_pair(&queue, &queue, 16, 16).unwrap();
    qp.to_init(Access::ALL).unwrap();
    Side {
        _device: device,
        queue,
        qp,
    }
}

/// Polls until something completes.
fn next(side: &Side) {
    let start = Instant::now();
    loop {
        if let Some(completion) = side.queue.poll() {
            assert_eq!(completion.status, Status::Success);
            return;
        }
        assert!(start.elapsed() < PATIENCE);
    }
}

#[test]
fn the_device_sleeps_while_programs_poll_and_while_nothing_happens() {
    const ROUNDS: u64 = 20_000;
    let (a, b) = (side(), side());
    a.qp.connect(&b.qp.address()).unwrap();
    b.qp.connect(&a.qp.address()).unwrap();
    let (start, before) = (Instant::now(), sleeps());
    for round in 0..ROUNDS {
        let (from, to) = if round % 2 == 0 { (&a, &b) } else { (&b, &a) };
        to.qp.post_recv(round, Buffer::Empty).unwrap();
        from.qp
            .post_send(round, SendOp::Send, Buffer::Empty)
            .unwrap();
        next(to);
        next(from);
    }
    // Each of the two looks once per millisecond; most of the packets, two per round, wake nobody.
    let looked = sleeps() - before;
    let admitted = 2 * (start.elapsed().as_millis() as u64 + 50) + ROUNDS / 4;
    assert!(looked <= admitted, "{looked} sleeps, {admitted} admitted");
    // Sleeping until a completion comes needs no poll in between.
    b.qp.post_recv(1, Buffer::Empty).unwrap();
    a.qp.post_send(2, SendOp::Send, Buffer::Empty).unwrap();
    for side in [&a, &b] {
        let completion = side.queue.wait(PATIENCE).unwrap();
        assert_eq!(completion.status, Status::Success);
    }
    std::thread::sleep(Duration::from_millis(50));
    let before = sleeps();
    std::thread::sleep(Duration::from_secs(1));
    assert!(sleeps() - before <= 4, "idle devices wake nobody");
}
