//! Messages, and raw work requests, in steady state cost no allocation, at either end and in no thread:
//! pools are filled once.
//!
//! A program of its own, for the allocator that counts; its tests run one after the other, for the
//! threads of devices are counted, too.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::IoSlice;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use common::{PATIENCE, config, connect};
use lowtide_transport::message::{ConnId, Endpoint, Event, Piece};
use lowtide_transport::raw::types::*;
use lowtide_transport::raw::{
    AddressHandle, CompletionQueue, Context, MemoryRegion, ProtectionDomain, QueuePair, Queues,
    SharedReceiveQueue,
};
use lowtide_transport::verbs::{Access, Buffer, Device, DeviceOptions, Faults, SameHost};

/// The system's allocator, counting what each thread asks of it.
struct Counting;

thread_local! {
    static ASKED: Cell<u64> = const { Cell::new(0) };
}

/// What the threads of devices have asked for.
static ASKED_BY_DEVICES: AtomicU64 = AtomicU64::new(0);
/// How the name of such a thread begins.
const DEVICE: &[u8] = b"lowtide-soft";

fn count() {
    ASKED.with(|asked| asked.set(asked.get() + 1));
    let mut name = [0u8; 16];
    // SAFETY: the kernel fills sixteen bytes at most.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    if name.starts_with(DEVICE) {
        ASKED_BY_DEVICES.fetch_add(1, Ordering::Relaxed);
    }
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

/// Allocations of this thread and those of all devices.
fn asked() -> u64 {
    ASKED.get() + ASKED_BY_DEVICES.load(Ordering::Relaxed)
}

/// The same during `act`.
fn during(act: impl FnOnce()) -> u64 {
    let before = asked();
    act();
    asked() - before
}

/// Held by the one test that runs.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(|poison| poison.into_inner())
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
    let _alone = alone();
    let allocate = || drop(std::hint::black_box(Box::new(1)));
    assert_eq!(during(allocate), 1);
    let before = ASKED_BY_DEVICES.load(Ordering::Relaxed);
    std::thread::Builder::new()
        .name("lowtide-softroce".into())
        .spawn(allocate)
        .unwrap()
        .join()
        .unwrap();
    assert!(ASKED_BY_DEVICES.load(Ordering::Relaxed) > before);
}

/// One datagram, copied once to be sent, and handed up where it arrived.
#[test]
fn a_short_message_allocates_nothing() {
    let _alone = alone();
    let bytes = vec![7; 1000];
    let asked = in_steady_state(|a, conn| a.send(conn, &[IoSlice::new(&bytes)]).unwrap());
    assert_eq!(asked, (0, [1, 0]));
    let urgent = in_steady_state(|a, conn| a.send_urgent(conn, &[IoSlice::new(&bytes)]).unwrap());
    assert_eq!(urgent, (0, [1, 0]));
}

/// Several datagrams, put together by one more copy.
#[test]
fn a_message_of_several_packets_allocates_nothing() {
    let _alone = alone();
    let bytes = vec![7; 60_000];
    let asked = in_steady_state(|a, conn| a.send(conn, &[IoSlice::new(&bytes)]).unwrap());
    assert_eq!(asked, (0, [1, 1]));
}

/// Lent in pieces by one end, fetched by READ by the other.
#[test]
fn a_fetched_message_allocates_nothing() {
    let _alone = alone();
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

/// A raw queue pair, with memory of the program and a slab.
struct Raw {
    context: Context,
    pd: ProtectionDomain,
    cq: CompletionQueue,
    shared: Option<SharedReceiveQueue>,
    qp: QueuePair,
    memory: Box<[u8]>,
    mr: MemoryRegion,
    slab: MemoryRegion,
}

const LEN: usize = 64 << 10;
const QKEY: u32 = 0x1234;
const RIGHTS: AccessFlags = AccessFlags::LOCAL_WRITE
    .with(AccessFlags::REMOTE_WRITE)
    .with(AccessFlags::REMOTE_READ)
    .with(AccessFlags::REMOTE_ATOMIC);

/// What a conversation is held over.
#[derive(Clone, Copy, Debug)]
struct Terms {
    kind: QpType,
    same_host: SameHost,
    /// Loss, and half as much of duplication and of reordering.
    loss_percent: f64,
    /// Receives come from a shared queue.
    is_shared: bool,
}

const PLAIN: Terms = Terms {
    kind: QpType::Rc,
    same_host: SameHost::Udp,
    loss_percent: 0.0,
    is_shared: false,
};

fn open(terms: Terms, seed: u64) -> Context {
    let options = DeviceOptions {
        same_host: terms.same_host,
        faults: Faults {
            seed,
            loss_percent: terms.loss_percent,
            duplicate_percent: terms.loss_percent / 2.0,
            reorder_percent: terms.loss_percent / 2.0,
            ..Faults::default()
        },
        ..DeviceOptions::default()
    };
    Context::open(common::address(), &options).unwrap()
}

fn raw_on(context: Context, terms: Terms) -> Raw {
    let pd = context.protection_domain();
    let cq = context.completion_queue(64, None).unwrap();
    let attr = SrqAttr {
        max_wr: 16,
        max_sge: 2,
        limit: 0,
    };
    let shared = terms
        .is_shared
        .then(|| pd.shared_receive_queue(attr).unwrap());
    let queues = Queues {
        send: &cq,
        recv: &cq,
        shared: shared.as_ref(),
    };
    let cap = QpCap {
        max_send_wr: 16,
        max_recv_wr: 16,
        max_send_sge: 2,
        max_recv_sge: 2,
        max_inline_data: 64,
    };
    let init = QpInitAttr {
        kind: terms.kind,
        cap,
        sq_sig_all: true,
    };
    let qp = pd.queue_pair(queues, &init).unwrap();
    let mut memory = vec![1; LEN].into_boxed_slice();
    let at = memory.as_mut_ptr() as u64;
    // SAFETY: nobody looks at the memory but the device.
    let mr = unsafe { pd.register(at, LEN as u64, at, RIGHTS) }.unwrap();
    let slab = pd.slab(LEN as u64, RIGHTS).unwrap();
    Raw {
        context,
        pd,
        cq,
        shared,
        qp,
        memory,
        mr,
        slab,
    }
}

/// Two ends that are connected.
fn raw_pair(terms: Terms) -> [Raw; 2] {
    let ends = [1, 2].map(|seed| raw_on(open(terms, seed), terms));
    let [a, b] = &ends;
    a.connect(b);
    b.connect(a);
    ends
}

impl Raw {
    fn way(&self) -> AhAttr {
        AhAttr {
            dgid: self.context.gid().gid,
            port: 1,
            ..AhAttr::default()
        }
    }

    fn connect(&self, peer: &Raw) {
        let attr = QpAttr {
            dest: peer.qp.qpn(),
            path_mtu: Mtu::B4096,
            address: peer.way(),
            access: RIGHTS,
            qkey: QKEY,
            max_rd_atomic: 4,
            max_dest_rd_atomic: 4,
            retry_cnt: 7,
            rnr_retry: 7,
            timeout: 14,
            ..QpAttr::default()
        };
        use QpAttrMask as M;
        let mut init = M::PKEY_INDEX | M::PORT;
        let mut rtr = M::NONE;
        let mut rts = M::SQ_PSN;
        if self.qp.init_attr().kind == QpType::Ud {
            init = init | M::QKEY;
        } else {
            init = init | M::ACCESS;
            rtr = M::ADDRESS | M::PATH_MTU | M::DEST_QPN | M::RQ_PSN;
            rtr = rtr | M::MAX_DEST_RD_ATOMIC | M::MIN_RNR_TIMER;
            rts = rts | M::TIMEOUT | M::RETRY_CNT | M::RNR_RETRY | M::MAX_RD_ATOMIC;
        }
        let moves = [
            (QpState::Init, init),
            (QpState::Rtr, rtr),
            (QpState::Rts, rts),
        ];
        for (state, mask) in moves {
            let attr = QpAttr { state, ..attr };
            self.qp.modify(&attr, mask | M::STATE).unwrap();
        }
    }

    /// Its memory, from the beginning: the program's or the slab.
    fn sge(&self, is_slab: bool, len: u32) -> Sge {
        match is_slab {
            true => Sge {
                lkey: self.slab.lkey(),
                addr: self.slab.address(),
                len,
            },
            false => Sge {
                lkey: self.mr.lkey(),
                addr: self.memory.as_ptr() as u64,
                len,
            },
        }
    }

    /// The same for peers.
    fn remote(&self, is_slab: bool) -> Remote {
        match is_slab {
            true => Remote {
                va: self.slab.address(),
                rkey: self.slab.rkey(),
            },
            false => Remote {
                va: self.memory.as_ptr() as u64,
                rkey: self.mr.rkey(),
            },
        }
    }

    /// Sends some bytes of the program's memory, which are copied at once.
    fn send_inline(&self) {
        let wr = SendWr {
            wr_id: 0,
            op: SendOp::Send,
            sg_list: &[self.sge(false, 60)],
            flags: SendFlags::INLINE,
            to: None,
        };
        // SAFETY: nobody changes the memory meanwhile.
        unsafe { self.qp.post_send(&[wr]) }.unwrap();
    }

    fn receive(&self, is_slab: bool) {
        let list = [RecvWr {
            wr_id: 1,
            sg_list: &[self.sge(is_slab, LEN as u32)],
        }];
        match &self.shared {
            // SAFETY: nobody looks at the memory but the device.
            Some(shared) => unsafe { shared.post_recv(&list) }.unwrap(),
            // SAFETY: as above.
            None => unsafe { self.qp.post_recv(&list) }.unwrap(),
        }
    }
}

/// Polls until both ends have as many completions as are due; that all are successes.
fn complete(ends: &[Raw; 2], mut due: [usize; 2], done: &mut Vec<WorkCompletion>) {
    let since = Instant::now();
    while due != [0, 0] {
        for (end, due) in ends.iter().zip(&mut due) {
            done.clear();
            *due -= end.cq.poll(16, done).unwrap();
            assert!(done.iter().all(|work| work.status == Status::Success));
        }
        assert!(since.elapsed() < PATIENCE);
    }
}

/// Allocations of so many rounds of `round` in steady state. What is taken once and kept may be taken
/// late, when threads meet for the first time or more comes ahead of a gap than ever before; so some
/// stretch of several has to do without.
fn in_steady_rounds(count: u64, mut round: impl FnMut(u64)) -> u64 {
    const STRETCHES: usize = 5;
    (0..count).for_each(&mut round);
    let mut stretch = || during(|| (0..2 * count).for_each(&mut round));
    let first_without = (0..STRETCHES).map(|_| stretch()).find(|asked| *asked == 0);
    first_without.unwrap_or_else(stretch)
}

/// Posts a receive and a send, each while another thread drives its device: what is posted then waits in
/// memory that is taken the first time. Allocations of the posts.
fn post_beside_others(
    ends: &[Raw; 2],
    terms: Terms,
    send: impl Fn() + Sync,
    done: &mut Vec<WorkCompletion>,
) -> u64 {
    let [a, b] = ends;
    let asked = AtomicU64::new(0);
    let counted = |act: &dyn Fn()| asked.fetch_add(during(act), Ordering::Relaxed);
    let beside = |end: &Raw, act: &(dyn Fn() + Sync)| {
        let other = raw_on(end.context.clone(), terms);
        common::beside_one_that_drives(&other.qp, || {
            counted(act);
        });
    };
    beside(b, &|| b.receive(false));
    beside(a, &send);
    complete(ends, [1, 1], done);
    asked.into_inner()
}

/// Every kind of request, short and long, from and into memory of both kinds.
fn requests_allocate(terms: Terms, rounds: u64) -> u64 {
    let ends = raw_pair(terms);
    let [a, b] = &ends;
    let mut done = Vec::with_capacity(16);
    post_beside_others(&ends, terms, || a.send_inline(), &mut done);
    let asked = in_steady_rounds(rounds, |round| {
        if round % 8 == 0 {
            // Now and then devices fall asleep, and have to be woken.
            std::thread::sleep(Duration::from_millis(4));
        }
        let is_slab = round % 2 == 0;
        let remote = b.remote(round / 2 % 2 == 0);
        let swap = SendOp::CompareSwap {
            remote,
            compare: 1,
            swap: 2,
        };
        let inline = SendFlags::INLINE;
        let plain = SendFlags::NONE;
        for (op, len, flags) in [
            (SendOp::Send, 60, inline),
            (SendOp::Send, 4000, plain),
            (SendOp::SendImm(7), 30_000, plain),
            (SendOp::Write(remote), 60, inline),
            (SendOp::Write(remote), 60_000, plain),
            (SendOp::WriteImm(remote, 7), 5000, plain),
            (SendOp::Read(remote), 60_000, plain),
            (SendOp::FetchAdd { remote, add: 1 }, 8, plain),
            (swap, 8, plain),
            (SendOp::AtomicWrite(remote), 8, plain),
        ] {
            let is_received =
                matches!(op, SendOp::Send | SendOp::SendImm(_) | SendOp::WriteImm(..));
            if is_received {
                b.receive(is_slab);
            }
            // Inline data are the program's.
            let is_slab = is_slab && flags == plain;
            let wr = SendWr {
                wr_id: round,
                op,
                sg_list: &[a.sge(is_slab, len)],
                flags,
                to: None,
            };
            // SAFETY: nobody looks at the memory but the device.
            unsafe { a.qp.post_send(&[wr]) }.unwrap();
            complete(&ends, [1, usize::from(is_received)], &mut done);
        }
    });
    // It was the way, and the network, that was asked for.
    let counters = a.context.counters();
    assert_eq!(
        counters.host_direct > 0,
        terms.same_host == SameHost::Direct
    );
    assert_eq!(
        counters.host_tx_packets > 0,
        terms.same_host != SameHost::Udp
    );
    let is_bad = terms.loss_percent > 0.0;
    let again = [counters, b.context.counters()].map(|c| c.retransmitted_pkts - c.probes);
    assert_eq!(again.iter().sum::<u64>() > rounds / 10, is_bad, "{again:?}");
    asked
}

#[test]
fn requests_of_every_kind_allocate_nothing_whatever_the_way() {
    let _alone = alone();
    for same_host in [SameHost::Udp, SameHost::Rings, SameHost::Direct] {
        for is_shared in [false, true] {
            let terms = Terms {
                same_host,
                is_shared,
                ..PLAIN
            };
            assert_eq!(requests_allocate(terms, 60), 0, "{terms:?}");
        }
    }
}

/// What is sent again, comes twice or comes ahead of a gap is kept in memory that is there.
#[test]
fn a_bad_network_allocates_nothing() {
    let _alone = alone();
    let terms = Terms {
        loss_percent: 4.0,
        ..PLAIN
    };
    assert_eq!(requests_allocate(terms, 150), 0);
}

#[test]
fn datagrams_allocate_nothing() {
    let _alone = alone();
    let terms = Terms {
        kind: QpType::Ud,
        ..PLAIN
    };
    let ends = raw_pair(terms);
    let [a, b] = &ends;
    let handle: AddressHandle = a.pd.address_handle(&b.way()).unwrap();
    let mut done = Vec::with_capacity(16);
    let send = |round: u64, len: u32| {
        let list = [a.sge(round.is_multiple_of(4), len)];
        let wr = SendWr {
            wr_id: round,
            op: SendOp::SendImm(3),
            sg_list: if len > 0 { &list } else { &[] },
            flags: SendFlags::NONE,
            to: Some(Destination {
                ah: handle.id(),
                qpn: b.qp.qpn(),
                qkey: QKEY,
            }),
        };
        // SAFETY: nobody looks at the memory but the device.
        unsafe { a.qp.post_send(&[wr]) }.unwrap();
    };
    post_beside_others(&ends, terms, || send(0, 60), &mut done);
    let asked = in_steady_rounds(300, |round| {
        b.receive(round % 2 == 0);
        send(round, [0, 60, 4000][round as usize % 3]);
        complete(&ends, [1, 1], &mut done);
    });
    assert_eq!(asked, 0);
}

/// What is posted while another thread drives the device waits in memory that is taken the first time.
#[test]
fn what_waits_for_another_thread_allocates_once() {
    let _alone = alone();
    let ends = raw_pair(PLAIN);
    let mut done = Vec::with_capacity(16);
    let mut round = || post_beside_others(&ends, PLAIN, || ends[0].send_inline(), &mut done);
    assert!(round() > 0);
    for _ in 0..20 {
        assert_eq!(round(), 0);
    }
}

/// The first posts beside a thread that drives the device, raw and safe ones, if they were expected;
/// and in the raw layer what it costs if not.
#[test]
fn posts_beside_who_drives_the_device_allocate_nothing_if_expected() {
    let _alone = alone();
    let [a, b] = raw_pair(PLAIN);
    let other = raw_on(a.context.clone(), PLAIN);
    let post = |end: &Raw| {
        let list = [RecvWr {
            wr_id: 0,
            sg_list: &[],
        }];
        let wr = SendWr {
            wr_id: 0,
            op: SendOp::Send,
            sg_list: &[end.sge(false, 64)],
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
    let other = raw_on(b.context.clone(), PLAIN);
    common::beside_one_that_drives(&other.qp, || assert!(during(|| post(&b)) > 0));

    let device = Device::open(common::address(), &DeviceOptions::default()).unwrap();
    let domain = device.protection_domain();
    let queue = device.completion_queue(64);
    let qp = domain.queue_pair(&queue, &queue, 16, 16).unwrap();
    qp.to_init(Access::ALL).unwrap();
    qp.connect(&qp.address()).unwrap();
    qp.expect_contention();
    let [ball, glove] = [0, 1].map(|_| domain.slot(64).unwrap());
    let other = raw_on(device.context().clone(), PLAIN);
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
    let _alone = alone();
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
    let asked = in_steady_rounds(300, |_| {
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
    });
    assert_eq!(asked, 0);
}
