//! Initiators that reach one target by different ways: over UDP, by rings, and by themselves in its
//! memory. Their atomics are one sort, whoever carries them out.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use lowtide_transport::message::Counters;
use lowtide_transport::verbs::{DeviceOptions, SameHost};

use super::provider::{Context, MemoryRegion};
use super::suite::*;
use crate::common;
use lowtide_transport::raw::types::*;

/// Additions, and successful swaps, of each initiator.
const EACH: u64 = 1500;
/// More slabs than a peer maps.
const MANY: usize = 70;

/// The target's word that all go for, and its end of each initiator's connection.
struct Target {
    ends: Vec<End>,
    slab: MemoryRegion,
    _others: Vec<MemoryRegion>,
}

impl Target {
    fn word(&self) -> &AtomicU64 {
        let at = std::ptr::with_exposed_provenance(self.slab.address() as usize);
        // SAFETY: the slab is mapped as long as its region, aligned to a page, and changed by atomics
        // only.
        unsafe { &*at }
    }

    fn remote(&self) -> Remote {
        Remote {
            va: self.slab.address(),
            rkey: self.slab.rkey(),
        }
    }
}

/// An end with a slab for what it is told: who acts itself wants to be sure that its own memory stays.
struct Initiator {
    end: End,
    old: MemoryRegion,
}

impl Initiator {
    /// Carries out an atomic, and says what was there before.
    fn atomic(&self, op: SendOp) -> u64 {
        let old = Sge {
            lkey: self.old.lkey(),
            addr: self.old.address(),
            len: 8,
        };
        self.end.post(1, op, &[old]);
        self.end.succeed();
        let at = std::ptr::with_exposed_provenance::<u64>(self.old.address() as usize);
        // SAFETY: the slab is mapped as long as its region, and what was posted has completed.
        unsafe { at.read_volatile() }
    }

    fn counters(&self) -> Counters {
        self.end.context.counters()
    }
}

/// Initiators by all three ways, and their target.
fn around_a_slab(is_mapped: bool) -> ([Initiator; 3], Target) {
    let options = |same_host| DeviceOptions {
        same_host,
        ..DeviceOptions::default()
    };
    let open = |same_host| Context::open(common::address(), &options(same_host)).unwrap();
    let target = open(SameHost::Direct);
    let pd = target.protection_domain();
    // They come first, so they are what a peer maps.
    let others: Vec<_> = (0..if is_mapped { 0 } else { MANY })
        .map(|_| pd.slab(4096, ALL).unwrap())
        .collect();
    let slab = pd.slab(4096, ALL).unwrap();
    let ways = [SameHost::Udp, SameHost::Rings, SameHost::Direct];
    let mut ends = Vec::new();
    let initiators = ways.map(|way| {
        let a = end_on(open(way), QpType::Rc, None);
        let b = end_in(target.clone(), pd.clone(), QpType::Rc, None);
        a.connect(&b.context, b.qp.qpn());
        b.connect(&a.context, a.qp.qpn());
        ends.push(b);
        let old = a.pd.slab(4096, ALL).unwrap();
        Initiator { end: a, old }
    });
    let target = Target {
        ends,
        slab,
        _others: others,
    };
    // The first requests may be faster than the target's answer to the connection.
    let direct = &initiators[2].end;
    let own = target.ends[2].remote(0);
    while direct.context.counters().host_direct == 0 {
        direct.post(0, SendOp::Write(own), &[direct.sge(0, 4096)]);
        direct.succeed();
    }
    (initiators, target)
}

/// Each went its own way; the last carried out so many requests itself since it had done `before`.
fn assert_ways(initiators: &[Initiator; 3], before: u64, direct: u64) {
    let [udp, rings, itself] = initiators.each_ref().map(Initiator::counters);
    assert!(udp.sent_pkts >= EACH && udp.host_tx_packets == 0);
    assert!(rings.host_tx_packets >= EACH && rings.host_direct == 0);
    assert_eq!(itself.host_direct - before, direct);
    if direct == 0 {
        assert!(itself.host_tx_packets >= EACH);
    }
}

fn add_all(initiators: &[Initiator; 3], remote: Remote, also: impl FnOnce() + Send) {
    thread::scope(|scope| {
        for end in initiators {
            scope.spawn(move || {
                for _ in 0..EACH {
                    end.atomic(SendOp::FetchAdd { remote, add: 1 });
                }
            });
        }
        scope.spawn(also);
    });
}

#[test]
fn additions_by_all_ways_and_the_processors_add_up() {
    for is_mapped in [true, false] {
        let (initiators, target) = around_a_slab(is_mapped);
        let before = initiators[2].counters().host_direct;
        add_all(&initiators, target.remote(), || {
            for _ in 0..EACH {
                target.word().fetch_add(1, Ordering::Relaxed);
                thread::yield_now();
            }
        });
        assert_eq!(target.word().load(Ordering::Relaxed), 4 * EACH);
        assert_ways(&initiators, before, if is_mapped { EACH } else { 0 });
    }
}

/// In memory of the program, which is nobody's but the target's device to change.
#[test]
fn additions_by_all_ways_add_up_in_memory_of_the_program() {
    let (initiators, target) = around_a_slab(true);
    let before = initiators[2].counters().host_direct;
    let owner = &target.ends[0];
    owner.pages.write(64, &[0; 8]);
    add_all(&initiators, owner.remote(64), || {});
    assert_eq!(owner.pages.word(64), 3 * EACH);
    assert_ways(&initiators, before, 0);
}

#[test]
fn of_swaps_by_all_ways_that_want_the_same_one_succeeds() {
    for is_mapped in [true, false] {
        let (initiators, target) = around_a_slab(is_mapped);
        let remote = target.remote();
        thread::scope(|scope| {
            for end in &initiators {
                scope.spawn(move || {
                    let (mut known, mut swapped) = (0u64, 0);
                    while swapped < EACH {
                        let op = SendOp::CompareSwap {
                            remote,
                            compare: known,
                            swap: known + 1,
                        };
                        let seen = end.atomic(op);
                        swapped += u64::from(seen == known);
                        known = if seen == known { known + 1 } else { seen };
                    }
                });
            }
            scope.spawn(|| {
                let swap = |known| Some(known + 1);
                for _ in 0..EACH {
                    let order = Ordering::Relaxed;
                    target.word().fetch_update(order, order, swap).unwrap();
                    thread::yield_now();
                }
            });
        });
        assert_eq!(target.word().load(Ordering::Relaxed), 4 * EACH);
    }
}
