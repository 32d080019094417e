//! The safe verbs beside other threads: who posts or polls waits for none of them, and slots are neither
//! lost nor mixed up.

mod common;

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use common::{PATIENCE, beside_one_that_drives};
use lowtide_transport::raw::{Queues, types};
use lowtide_transport::verbs::{
    Access, Buffer, CompletionKind, CompletionQueue, Device, DeviceOptions, PostError, PostRefused,
    ProtectionDomain, QueuePair, SameHost, SendOp, Slot, Status, WorkCompletion,
};

struct Side {
    domain: ProtectionDomain,
    queue: CompletionQueue,
    qp: QueuePair,
    device: Device,
}

fn side(same_host: SameHost) -> Side {
    let options = DeviceOptions {
        same_host,
        ..DeviceOptions::default()
    };
    let device = Device::open(common::address(), &options).unwrap();
    let domain = device.protection_domain();
    let queue = device.completion_queue(64);
    let qp = domain.queue_pair(&queue, &queue, 16, 16).unwrap();
    qp.to_init(Access::ALL).unwrap();
    Side {
        domain,
        queue,
        qp,
        device,
    }
}

fn pair(same_host: SameHost) -> (Side, Side) {
    let (a, b) = (side(same_host), side(same_host));
    a.qp.connect(&b.qp.address()).unwrap();
    b.qp.connect(&a.qp.address()).unwrap();
    (a, b)
}

impl Side {
    fn slot(&self, fill: u8) -> Slot {
        let mut slot = self.domain.slot(64).unwrap();
        slot.fill(fill);
        slot
    }

    fn succeed(&self) -> WorkCompletion {
        let work = self.queue.wait(PATIENCE).expect("a completion");
        assert_eq!(work.status, Status::Success);
        work
    }

    /// Runs `act` while another thread has the device in hand.
    fn beside(&self, act: impl FnOnce() + Send) {
        let context = self.device.context();
        let cq = context.completion_queue(4, None).unwrap();
        let queues = Queues {
            send: &cq,
            recv: &cq,
            shared: None,
        };
        let init = types::QpInitAttr {
            kind: types::QpType::Rc,
            cap: types::QpCap {
                max_send_wr: 1,
                max_recv_wr: 1,
                ..types::QpCap::default()
            },
            sq_sig_all: true,
        };
        let other = context.protection_domain().queue_pair(queues, &init);
        beside_one_that_drives(&other.unwrap(), act);
    }
}

#[test]
fn posts_and_polls_do_not_wait_for_who_drives_the_device() {
    for same_host in [SameHost::Udp, SameHost::Rings, SameHost::Direct] {
        let (a, b) = pair(same_host);
        for id in 0..16 {
            let buffer = Buffer::Slot(b.slot(0xEE), 64);
            b.qp.post_recv(id, buffer).unwrap();
        }
        a.qp.post_send(100, SendOp::Send, Buffer::Slot(a.slot(100), 64))
            .unwrap();
        let first = b.succeed();
        assert_eq!((first.id, &first.slot.unwrap()[..]), (0, &[100; 64][..]));
        let start = Instant::now();
        // Its completion is there before somebody has the device.
        while a.queue.poll().is_none_or(|work| work.id != 100) {
            assert!(start.elapsed() < PATIENCE);
        }
        let slots: Vec<Slot> = (0..16).map(|fill| a.slot(fill)).collect();
        let (spare, foreign) = (a.slot(99), b.slot(98));
        let glove = a.slot(97);
        let mut refused = [None, None];
        a.beside(|| {
            assert!(a.queue.poll().is_none());
            for (id, slot) in slots.into_iter().enumerate() {
                let op = SendOp::SendImm(id as u32);
                a.qp.post_send(id as u64, op, Buffer::Slot(slot, 64))
                    .unwrap();
            }
            // Refused at once, with the memory: a full queue, another device's slot.
            let full = a.qp.post_send(16, SendOp::Send, Buffer::Slot(spare, 64));
            let wrong = a.qp.post_recv(17, Buffer::Slot(foreign, 64));
            // Dropping a slot frees its key, and does wait: not here.
            refused = [full, wrong].map(Result::err);
            a.qp.post_recv(18, Buffer::Slot(glove, 64)).unwrap();
            let mut done = Vec::new();
            assert_eq!(a.queue.poll_many(16, &mut done), 0);
        });
        let expected = [(PostError::QueueFull, 99), (PostError::Invalid, 98)];
        for (refused, (error, fill)) in refused.into_iter().zip(expected) {
            let PostRefused { error: why, buffer } = refused.expect("it was refused");
            assert_eq!(why, error);
            assert!(matches!(buffer, Buffer::Slot(slot, 64) if slot[..] == [fill; 64]));
        }
        for id in 0..15u8 {
            let got = b.succeed();
            assert_eq!(got.imm, Some(u32::from(id)));
            assert_eq!(&got.slot.unwrap()[..], [id; 64]);
        }
        b.qp.post_recv(16, Buffer::Empty)
            .unwrap_or_else(|refused| panic!("{refused}"));
        for id in 0..15u8 {
            let sent = a.succeed();
            assert_eq!(
                (sent.id, &sent.slot.unwrap()[..]),
                (u64::from(id), &[id; 64][..])
            );
        }
    }
}

/// What was posted beside another thread comes back flushed, with its slot, from a queue pair that ends
/// before that was looked at; and what nobody polls is freed.
#[test]
fn what_waits_comes_back_when_its_queue_pair_ends() {
    let (a, _b) = pair(SameHost::Udp);
    let slots: Vec<Slot> = (0..8).map(|fill| a.slot(fill)).collect();
    let gloves: Vec<Slot> = (8..16).map(|fill| a.slot(fill)).collect();
    a.beside(|| {
        for (id, slot) in slots.into_iter().enumerate() {
            a.qp.post_send(id as u64, SendOp::Send, Buffer::Slot(slot, 64))
                .unwrap();
        }
        for (id, slot) in gloves.into_iter().enumerate() {
            a.qp.post_recv(8 + id as u64, Buffer::Slot(slot, 64))
                .unwrap();
        }
    });
    let Side {
        domain,
        queue,
        qp,
        device: _device,
    } = a;
    drop(qp);
    let mut ids = Vec::new();
    for _ in 0..12 {
        let work = queue.poll().expect("all are there");
        assert_eq!(work.status, Status::Flushed);
        assert_eq!(&work.slot.unwrap()[..], [work.id as u8; 64]);
        ids.push(work.id);
    }
    // The others keep their part of the queue's promise until they are polled.
    assert!(domain.queue_pair(&queue, &queue, 30, 31).is_err());
    let one = domain.queue_pair(&queue, &queue, 30, 30).unwrap();
    drop(one);
    ids.extend((0..4).map(|_| queue.poll().expect("all are there").id));
    ids.sort_unstable();
    assert_eq!(ids, (0..16).collect::<Vec<_>>());
    domain.queue_pair(&queue, &queue, 32, 32).unwrap();
}

/// Two threads post slots to one queue pair while two poll it, and both ends of a connection do so:
/// each slot comes back once, with its own bytes.
#[test]
fn threads_share_a_queue_pair_and_no_slot_is_lost_or_mixed_up() {
    const EACH: u64 = 2_000;
    for same_host in [SameHost::Udp, SameHost::Rings] {
        let (a, b) = pair(same_host);
        let ends = [&a, &b];
        let polled = [const { [const { AtomicU64::new(0) }; 2] }; 2];
        thread::scope(|scope| {
            for (end, polled) in ends.into_iter().zip(&polled) {
                for poster in 0..2u64 {
                    scope.spawn(move || {
                        for round in 0..EACH {
                            let id = poster * EACH + round;
                            post(|buffer| end.qp.post_recv(id, buffer), end.slot(0));
                            let mut slot = end.slot(id as u8);
                            slot[..8].copy_from_slice(&id.to_le_bytes());
                            post(|buffer| end.qp.post_send(id, SendOp::Send, buffer), slot);
                        }
                    });
                    scope.spawn(move || {
                        let is_over =
                            || polled.iter().all(|n| n.load(Ordering::Relaxed) >= 2 * EACH);
                        let start = Instant::now();
                        while !is_over() {
                            assert!(start.elapsed() < PATIENCE, "{polled:?}");
                            let Some(work) = end.queue.poll() else {
                                thread::yield_now();
                                continue;
                            };
                            assert_eq!(work.status, Status::Success);
                            let slot = work.slot.unwrap();
                            let id = u64::from_le_bytes(*slot.first_chunk().unwrap());
                            assert!(slot[8..].iter().all(|byte| *byte == id as u8));
                            let is_recv = work.kind == CompletionKind::Recv;
                            assert!(is_recv || work.id == id, "another's slot");
                            polled[usize::from(is_recv)].fetch_add(1, Ordering::Relaxed);
                        }
                    });
                }
            }
        });
        let counts = polled.map(|end| end.map(AtomicU64::into_inner));
        assert_eq!(counts, [[2 * EACH; 2]; 2]);
    }
}

/// Posts a slot until there is room.
fn post(mut post: impl FnMut(Buffer) -> Result<(), PostRefused>, slot: Slot) {
    let mut buffer = Buffer::Slot(slot, 64);
    let start = Instant::now();
    while let Err(refused) = post(buffer) {
        assert_eq!(refused.error, PostError::QueueFull);
        assert!(start.elapsed() < PATIENCE, "no room");
        buffer = refused.buffer;
        thread::yield_now();
    }
}
