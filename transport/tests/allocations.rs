//! Messages, and raw work requests, in steady state cost no allocation, at either end: pools are filled
//! once.
//!
//! A program of its own, for the allocator that counts.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::IoSlice;
use std::sync::Arc;
use std::time::Duration;

use common::{config, connect};
use lowtide_transport::message::{ConnId, Endpoint, Event, Piece};
use lowtide_transport::raw::types::*;
use lowtide_transport::raw::{CompletionQueue, Context, MemoryRegion, QueuePair, Queues};
use lowtide_transport::verbs::{Access, Buffer, Device, DeviceOptions};

/// The system's allocator, counting what each thread asks of it.
struct Counting;

thread_local! {
    static ASKED: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    ASKED.with(|asked| asked.set(asked.get() + 1));
}

// SAFETY: every call is handed on to the system's allocator unchanged; counting touches a cell of the
// thread that needs neither a destructor nor memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise is the one that is asked for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of this thread during `act`.
fn during(act: impl FnOnce()) -> u64 {
    let before = ASKED.get();
    act();
    ASKED.get() - before
}

/// Polls both ends until `b` has heard `count` messages in all.
fn hear(a: &mut Endpoint, b: &mut Endpoint, heard: &mut u64, count: u64) {
    while *heard < count {
        a.poll(Some(Duration::ZERO), &mut |_, _| {}).unwrap();
        b.poll(Some(Duration::ZERO), &mut |_, event| {
            *heard += u64::from(matches!(event, Event::Message { .. }));
        })
        .unwrap();
    }
}

/// Allocations that 500 messages cost once 500 have gone before, and copies that both ends made of each,
/// the sender's and the receiver's.
fn in_steady_state(mut send: impl FnMut(&mut Endpoint, ConnId)) -> (u64, [u64; 2]) {
    const MESSAGES: u64 = 500;
    let (mut a, mut b) = (
        Endpoint::bind(config(1)).unwrap(),
        Endpoint::bind(config(2)).unwrap(),
    );
    let (conn, _) = connect(&mut a, &mut b);
    let mut heard = 0;
    let mut run = |end: u64| {
        while heard < end {
            // Two at once, so that pools hold more than one of a kind.
            let next = heard + 2;
            send(&mut a, conn);
            send(&mut a, conn);
            hear(&mut a, &mut b, &mut heard, next);
        }
    };
    run(MESSAGES);
    let asked = during(|| run(2 * MESSAGES));
    let copies = [&a, &b].map(|end| end.counters().copies);
    assert!(
        copies
            .iter()
            .all(|copies| copies.is_multiple_of(2 * MESSAGES))
    );
    (asked, copies.map(|copies| copies / (2 * MESSAGES)))
}

#[test]
fn the_counter_counts() {
    assert_eq!(during(|| drop(std::hint::black_box(Box::new(1)))), 1);
}

/// One datagram, copied once to be sent, and handed up where it arrived.
#[test]
fn a_short_message_allocates_nothing() {
    let bytes = vec![7; 1000];
    let asked = in_steady_state(|a, conn| a.send(conn, &[IoSlice::new(&bytes)]).unwrap());
    assert_eq!(asked, (0, [1, 0]));
    let urgent = in_steady_state(|a, conn| a.send_urgent(conn, &[IoSlice::new(&bytes)]).unwrap());
    assert_eq!(urgent, (0, [1, 0]));
}

/// Several datagrams, put together by one more copy.
#[test]
fn a_message_of_several_packets_allocates_nothing() {
    let bytes = vec![7; 60_000];
    let asked = in_steady_state(|a, conn| a.send(conn, &[IoSlice::new(&bytes)]).unwrap());
    assert_eq!(asked, (0, [1, 1]));
}

/// Lent in pieces by one end, fetched by READ by the other.
#[test]
fn a_fetched_message_allocates_nothing() {
    let bytes: Arc<[u8]> = vec![7; 1 << 20].into();
    let mut pieces = Vec::with_capacity(2);
    let asked = in_steady_state(|a, conn| {
        pieces.push(Piece::Shared(bytes.clone(), 0..100));
        pieces.push(Piece::Shared(bytes.clone(), 100..1 << 20));
        a.send_pieces(conn, &mut pieces).unwrap();
    });
    // READ places it: no copy of a whole message.
    assert_eq!(asked, (0, [0, 0]));
}

/// A raw queue pair that is connected to the other of its kind.
struct Raw {
    context: Context,
    cq: CompletionQueue,
    qp: QueuePair,
    memory: Box<[u8]>,
    mr: MemoryRegion,
}

fn raw() -> Raw {
    raw_on(Context::open(common::address(), &DeviceOptions::default()).unwrap())
}

fn raw_on(context: Context) -> Raw {
    let pd = context.protection_domain();
    let cq = context.completion_queue(64, None).unwrap();
    let queues = Queues {
        send: &cq,
        recv: &cq,
        shared: None,
    };
    let cap = QpCap {
        max_send_wr: 16,
        max_recv_wr: 16,
        max_send_sge: 2,
        max_recv_sge: 2,
        max_inline_data: 64,
    };
    let init = QpInitAttr {
        kind: QpType::Rc,
        cap,
        sq_sig_all: true,
    };
    let qp = pd.queue_pair(queues, &init).unwrap();
    let mut memory = vec![1; 64 << 10].into_boxed_slice();
    let (at, flags) = (memory.as_mut_ptr() as u64, AccessFlags::LOCAL_WRITE);
    // SAFETY: nobody looks at the memory but the device.
    let mr = unsafe { pd.register(at, memory.len() as u64, at, flags) }.unwrap();
    Raw {
        context,
        cq,
        qp,
        memory,
        mr,
    }
}

impl Raw {
    fn connect(&self, peer: &Raw) {
        let attr = QpAttr {
            dest: peer.qp.qpn(),
            path_mtu: Mtu::B4096,
            address: AhAttr {
                dgid: peer.context.gid().gid,
                port: 1,
                ..AhAttr::default()
            },
            retry_cnt: 7,
            rnr_retry: 7,
            timeout: 14,
            ..QpAttr::default()
        };
        use QpAttrMask as M;
        let rtr = M::ADDRESS | M::PATH_MTU | M::DEST_QPN | M::RQ_PSN;
        let rts = M::SQ_PSN | M::TIMEOUT | M::RETRY_CNT | M::RNR_RETRY | M::MAX_RD_ATOMIC;
        let moves = [
            (QpState::Init, M::PKEY_INDEX | M::PORT | M::ACCESS),
            (QpState::Rtr, rtr | M::MAX_DEST_RD_ATOMIC | M::MIN_RNR_TIMER),
            (QpState::Rts, rts),
        ];
        for (state, mask) in moves {
            let attr = QpAttr { state, ..attr };
            self.qp.modify(&attr, mask | M::STATE).unwrap();
        }
    }

    fn sge(&self, len: u32) -> Sge {
        Sge {
            lkey: self.mr.lkey(),
            addr: self.memory.as_ptr() as u64,
            len,
        }
    }
}

/// One packet inline, one from registered memory, one message of several.
#[test]
fn raw_sends_allocate_nothing() {
    let (a, b) = (raw(), raw());
    a.connect(&b);
    b.connect(&a);
    // The devices' threads may have them in hand when something is posted.
    a.qp.expect_contention();
    b.qp.expect_contention();
    let mut done = Vec::with_capacity(16);
    let mut rounds = |count: u64| {
        for round in 0..count {
            let (len, flags) = [
                (64, SendFlags::INLINE),
                (4000, SendFlags::NONE),
                (30_000, SendFlags::NONE),
            ][round as usize % 3];
            let into = RecvWr {
                wr_id: round,
                sg_list: &[b.sge(64 << 10)],
            };
            let send = SendWr {
                wr_id: round,
                op: SendOp::Send,
                sg_list: &[a.sge(len)],
                flags,
                to: None,
            };
            // SAFETY: nobody looks at the memory but the device.
            unsafe { b.qp.post_recv(&[into]) }.unwrap();
            // SAFETY: as above.
            unsafe { a.qp.post_send(&[send]) }.unwrap();
            for cq in [&a.cq, &b.cq] {
                done.clear();
                while cq.poll(16, &mut done).unwrap() == 0 {}
                assert_eq!((done.len(), done[0].status), (1, Status::Success));
            }
        }
    };
    rounds(300);
    assert_eq!(during(|| rounds(600)), 0);
}

/// The first posts beside a thread that drives the device, raw and safe ones, if they were expected;
/// and in the raw layer what it costs if not.
#[test]
fn posts_beside_who_drives_the_device_allocate_nothing_if_expected() {
    let (a, b) = (raw(), raw());
    a.connect(&b);
    b.connect(&a);
    let other = raw_on(a.context.clone());
    let post = |end: &Raw| {
        let list = [RecvWr {
            wr_id: 0,
            sg_list: &[],
        }];
        let wr = SendWr {
            wr_id: 0,
            op: SendOp::Send,
            sg_list: &[end.sge(64)],
            flags: SendFlags::INLINE,
            to: None,
        };
        // SAFETY: nobody looks at the memory but the device.
        unsafe { end.qp.post_recv(&list) }.unwrap();
        // SAFETY: as above.
        unsafe { end.qp.post_send(&[wr]) }.unwrap();
    };
    a.qp.expect_contention();
    common::beside_one_that_drives(&other.qp, || assert_eq!(during(|| post(&a)), 0));
    let other = raw_on(b.context.clone());
    common::beside_one_that_drives(&other.qp, || assert!(during(|| post(&b)) > 0));

    let device = Device::open(common::address(), &DeviceOptions::default()).unwrap();
    let domain = device.protection_domain();
    let queue = device.completion_queue(64);
    let qp = domain.queue_pair(&queue, &queue, 16, 16).unwrap();
    qp.to_init(Access::ALL).unwrap();
    qp.connect(&qp.address()).unwrap();
    qp.expect_contention();
    let [ball, glove] = [0, 1].map(|_| domain.slot(64).unwrap());
    let other = raw_on(device.context().clone());
    common::beside_one_that_drives(&other.qp, || {
        let asked = during(|| {
            qp.post_recv(1, Buffer::Slot(glove, 64)).unwrap();
            qp.post_send(2, SendOp::Send, Buffer::Slot(ball, 64))
                .unwrap();
            assert!(queue.poll().is_none());
        });
        assert_eq!(asked, 0);
    });
}

/// The safe verbs, in batches: slots go round.
#[test]
fn slots_in_batches_allocate_nothing() {
    const BATCH: usize = 4;
    let side = || {
        let device = Device::open(common::address(), &DeviceOptions::default()).unwrap();
        let domain = device.protection_domain();
        let queue = device.completion_queue(64);
        let qp = domain.queue_pair(&queue, &queue, 16, 16).unwrap();
        qp.to_init(Access::ALL).unwrap();
        qp.expect_contention();
        let slots: Vec<_> = (0..BATCH).map(|_| domain.slot(64).unwrap()).collect();
        (queue, qp, slots)
    };
    let (sends, a, mut balls) = side();
    let (receives, b, mut gloves) = side();
    a.connect(&b.address()).unwrap();
    b.connect(&a.address()).unwrap();
    let mut done = Vec::with_capacity(2 * BATCH);
    let mut rounds = |count: u32| {
        for _ in 0..count {
            let mut list = gloves.drain(..).map(|slot| (1, Buffer::Slot(slot, 64)));
            b.post_recvs(&mut list).unwrap();
            drop(list);
            let mut list = balls
                .drain(..)
                .map(|slot| (2, SendOp::Send, Buffer::Slot(slot, 64)));
            a.post_sends(&mut list).unwrap();
            drop(list);
            for (queue, slots) in [(&receives, &mut gloves), (&sends, &mut balls)] {
                while slots.len() < BATCH {
                    queue.poll_many(BATCH, &mut done);
                    slots.extend(done.drain(..).map(|work| work.slot.unwrap()));
                }
            }
        }
    };
    rounds(300);
    assert_eq!(during(|| rounds(600)), 0);
}
