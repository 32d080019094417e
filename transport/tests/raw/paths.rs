//! What is the same whichever way a peer is reached, and that it is the way asked for.

use std::sync::atomic::AtomicU64;
use std::thread;

use lowtide_transport::verbs::SameHost;

use super::*;

/// A queue pair's end with a slab for its memory.
pub struct Slab {
    pub mr: MemoryRegion,
}

impl Slab {
    pub fn new(end: &End, len: u64) -> Slab {
        Slab {
            mr: end.pd.slab(len, ALL).unwrap(),
        }
    }

    pub fn sge(&self, offset: u64, len: u32) -> Sge {
        Sge {
            lkey: self.mr.lkey(),
            addr: self.mr.address() + offset,
            len,
        }
    }

    pub fn remote(&self, offset: u64) -> Remote {
        Remote {
            va: self.mr.address() + offset,
            rkey: self.mr.rkey(),
        }
    }

    pub fn words(&self) -> &[AtomicU64] {
        let at = std::ptr::with_exposed_provenance(self.mr.address() as usize);
        // SAFETY: a slab is mapped as long as its region, aligned to a page, and changed by atomic
        // words or by requests that the test waits for.
        unsafe { std::slice::from_raw_parts(at, self.mr.len() as usize / 8) }
    }

    pub fn fill(&self, from: usize, len: usize, seed: u64) {
        for (i, word) in self.words()[from..from + len].iter().enumerate() {
            word.store(seed.wrapping_mul(0x9E37_79B9) + i as u64, Ordering::Relaxed);
        }
    }

    pub fn holds(&self, from: usize, len: usize, seed: u64) -> bool {
        let words = self.words()[from..from + len].iter().enumerate();
        words.into_iter().all(|(i, word)| {
            word.load(Ordering::Relaxed) == seed.wrapping_mul(0x9E37_79B9) + i as u64
        })
    }
}

/// The first requests may be faster than the peer's answer to the connection.
pub fn meet(a: &End, remote: Remote, sge: Sge) {
    let since = Instant::now();
    let is_met = || SAME_HOST != SameHost::Direct || a.context.counters().host_direct > 0;
    while !is_met() {
        assert!(since.elapsed() < PATIENCE);
        a.post(0, SendOp::Write(remote), &[sge]);
        a.succeed();
    }
}

#[test]
fn packets_and_requests_go_the_way_that_was_asked_for() {
    let (a, b) = pair(QpType::Rc);
    let (x, y) = (Slab::new(&a, 1 << 20), Slab::new(&b, 1 << 20));
    let swap = |compare, swap| SendOp::CompareSwap {
        remote: y.remote(8 * 1000),
        compare,
        swap,
    };
    meet(&a, y.remote(0), x.sge(0, 8));
    let before = a.context.counters();
    for (round, len) in [8u32, 600, 4096, 100_000, 1 << 20].into_iter().enumerate() {
        let words = len as usize / 8;
        x.fill(0, words, round as u64);
        a.post(4, SendOp::Write(y.remote(0)), &[x.sge(0, len)]);
        a.succeed();
        assert!(y.holds(0, words, round as u64));
        y.fill(0, words, 100 + round as u64);
        a.post(5, SendOp::Read(y.remote(0)), &[x.sge(0, len)]);
        assert_eq!(a.succeed().byte_len, len);
        assert!(x.holds(0, words, 100 + round as u64));
        y.words()[1000].store(7, Ordering::Relaxed);
        a.post(6, swap(7, 9), &[x.sge(8, 8)]);
        a.succeed();
        let word = |slab: &Slab, at: usize| slab.words()[at].load(Ordering::Relaxed);
        assert_eq!((word(&x, 1), word(&y, 1000)), (7, 9));
    }
    let after = a.context.counters();
    let direct = after.host_direct - before.host_direct;
    let packets = after.host_tx_packets - before.host_tx_packets;
    let datagrams = after.sent_pkts - before.sent_pkts;
    match SAME_HOST {
        SameHost::Udp => assert!(datagrams > 15 && packets == 0 && direct == 0),
        SameHost::Rings => assert!(datagrams == 0 && packets > 15 && direct == 0),
        SameHost::Direct => assert!(datagrams == 0 && packets == 0 && direct == 15),
    }
    assert_eq!(after.host_lost_packets, 0);
}

/// Memory of the program, which no peer maps.
#[test]
fn memory_of_the_program_is_reached_too() {
    let (a, b) = pair(QpType::Rc);
    meet(&a, b.remote(0), a.sge(0, 4096));
    let before = a.context.counters().host_direct;
    for (round, len) in [100usize, 5000, 300_000].into_iter().enumerate() {
        let text = bytes(len, round);
        a.pages.write(3, &text);
        let cut = len / 3;
        let list = [a.sge(3, cut as u32), a.sge(3 + cut, (len - cut) as u32)];
        a.post(1, SendOp::Write(b.remote(500_001)), &list);
        a.succeed();
        assert_eq!(b.pages.read(500_001, len), text);
        a.post(
            2,
            SendOp::Read(b.remote(500_001)),
            &[a.sge(400_000, len as u32)],
        );
        a.succeed();
        assert_eq!(a.pages.read(400_000, len), text);
    }
    // One process may always reach itself; short requests are packets anyway.
    let direct = a.context.counters().host_direct - before;
    assert_eq!(direct, if SAME_HOST == SameHost::Direct { 4 } else { 0 });
}

/// What a message announces is there when the message is.
#[test]
fn a_write_is_there_before_the_message_after_it() {
    let (a, b) = pair(QpType::Rc);
    let (x, y) = (Slab::new(&a, 1 << 17), Slab::new(&b, 1 << 17));
    for round in 0..300u64 {
        // Eight at once, each to another place, so that some wait for those before them.
        for part in 0..4 {
            b.receive(part, &[y.sge((1 << 16) + 64 * part, 64)]);
        }
        for part in 0..4u64 {
            let at = 2048 * part as usize;
            x.fill(at, 2048, round * 4 + part);
            let (at, len) = (8 * at as u64, 8 * 2048);
            a.post(1, SendOp::Write(y.remote(at)), &[x.sge(at, len)]);
            a.post(2, SendOp::SendImm(part as u32), &[x.sge(0, 64)]);
        }
        for part in 0..4u64 {
            assert_eq!(b.succeed().imm, Some(part as u32));
            assert!(y.holds(2048 * part as usize, 2048, round * 4 + part));
        }
        for _ in 0..4 {
            assert_eq!(a.succeed().kind, CompletionKind::Write);
            assert_eq!(a.succeed().kind, CompletionKind::Send);
        }
    }
}

/// Peers' atomics on a slab and the processor's own are one sort of atomics.
#[test]
fn atomics_on_a_slab_and_the_processors_add_up() {
    const EACH: u64 = 3000;
    let (a, b) = pair(QpType::Rc);
    let (x, y) = (Slab::new(&a, 64), Slab::new(&b, 64));
    let remote = y.remote(16);
    let itself = [(&a, &x), (&b, &y)];
    thread::scope(|scope| {
        for (end, slab) in itself {
            // `b` reaches its own word through `a`'s queue pair only; so it adds by itself.
            scope.spawn(move || {
                for _ in 0..EACH {
                    match std::ptr::eq(end, &raw const *itself[0].0) {
                        true => {
                            end.post(1, SendOp::FetchAdd { remote, add: 1 }, &[slab.sge(0, 8)]);
                            end.succeed();
                        }
                        false => {
                            slab.words()[2].fetch_add(1, Ordering::Relaxed);
                            thread::yield_now();
                        }
                    }
                }
            });
        }
    });
    assert_eq!(y.words()[2].load(Ordering::Relaxed), 2 * EACH);
}

/// After a region has been dropped nobody writes there, and who tries is told.
#[test]
fn a_region_goes_under_traffic() {
    for _ in 0..20 {
        let (a, b) = pair(QpType::Rc);
        let x = Slab::new(&a, 1 << 16);
        let region = b.pages.register(&b.pd, ALL);
        let remote = Remote {
            va: b.pages.address(),
            rkey: region.rkey(),
        };
        let rounds = AtomicU64::new(0);
        thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let status = loop {
                    let round = rounds.fetch_add(1, Ordering::Relaxed) + 1;
                    x.fill(0, 8192, round);
                    a.post(1, SendOp::Write(remote), &[x.sge(0, 1 << 16)]);
                    match a.next().status {
                        Status::Success => {}
                        status => break status,
                    }
                };
                assert_eq!(status, Status::RemoteAccess);
            });
            // In the midst of one, after others.
            while rounds.load(Ordering::Relaxed) < 4 && !writer.is_finished() {
                thread::yield_now();
            }
            drop(region);
            b.pages.write(0, &[0xEE; 1 << 16]);
            while !writer.is_finished() {
                thread::yield_now();
            }
            assert!(b.pages.read(0, 1 << 16).iter().all(|byte| *byte == 0xEE));
        });
    }
}

#[test]
fn addresses_of_a_slab_may_count_from_zero() {
    let (a, b) = pair(QpType::Rc);
    let slab = b.pd.slab(8192, ALL | AccessFlags::ZERO_BASED).unwrap();
    let at = |va| Remote {
        va,
        rkey: slab.rkey(),
    };
    let text = bytes(5000, 3);
    a.pages.write(0, &text);
    a.post(1, SendOp::Write(at(1000)), &[a.sge(0, 5000)]);
    a.succeed();
    a.post(2, SendOp::Read(at(1000)), &[a.sge(10_000, 5000)]);
    a.succeed();
    assert_eq!(a.pages.read(10_000, 5000), text);
    a.post(3, SendOp::Read(at(slab.address())), &[a.sge(0, 8)]);
    assert_eq!(a.next().status, Status::RemoteAccess);
}
