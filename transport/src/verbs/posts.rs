//! Work requests from posting to polling: who they are to the program, and the slots that are theirs
//! meanwhile.
//!
//! Owns: what a completion queue has promised to the queues that it serves, and the way of a slot's
//! bytes back: whoever has the device's token takes them out of the device's table when the request
//! completes, and leaves them here for whoever polls. No thread waits for another.
//!
//! A connection's receives lie here most of its life, so a request takes 16 bytes; one with a slot
//! 40.
//!
//! Invariant: a request has its place until its completion has been polled, and counts as long.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::places::{DEPTH_MAX, Place, Places};
use crate::device::QUEUE_PAIRS_MAX;
use crate::memory::{Key, Memory};
use crate::raw::{CQE_MAX, Keeper};

/// A queue that is gone has its place while requests of it are left.
const _: () = assert!(CQE_MAX as usize + 2 * QUEUE_PAIRS_MAX <= DEPTH_MAX as usize);

/// In a count of requests: the queue that they are of is gone.
const ORPHANED: u32 = 1 << 31;

/// In a request's name for the raw layer: it has a slot, and its place is among those that have.
const LENT: u64 = 1 << 32;

/// Beside a request's queue: there is a request.
const IN_USE: u32 = 1 << 31;
const _: () = assert!(DEPTH_MAX < IN_USE);

/// A slot that belongs to a request.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) key: Key,
    /// Its bytes, once the request has completed.
    pub(super) bytes: Option<Box<[u8]>>,
}

/// A request that has been polled.
#[derive(Debug)]
pub(super) struct Post {
    /// The program's name for it.
    pub(super) id: u64,
    pub(super) slot: Option<Kept>,
}

/// A work queue that the completion queue serves.
#[derive(Debug, Clone, Copy)]
pub(super) struct Served(u32);

/// The place of a work queue.
#[derive(Debug, Default)]
struct Queue {
    /// Requests that are not polled yet.
    outstanding: AtomicU32,
}

/// The place of a request under way, or completed and not polled. Whoever has its name has the place,
/// so that nothing here is ordered by itself.
#[derive(Debug, Default)]
struct Request {
    /// The work queue that it is of, and [`IN_USE`].
    queue: AtomicU32,
    /// Of its slot, if it has one.
    key: AtomicU32,
    id: AtomicU64,
}

/// The place of a request with a slot.
#[derive(Debug, Default)]
struct Loan {
    request: Request,
    /// Those of the slot, once the request has completed.
    bytes: Mutex<Option<Box<[u8]>>>,
}
const _: () = assert!(size_of::<Request>() == 16 && size_of::<Loan>() <= 40);

impl Place for Queue {
    fn link(&self) -> &AtomicU32 {
        &self.outstanding
    }
}

impl Place for Request {
    fn link(&self) -> &AtomicU32 {
        &self.queue
    }
}

impl Place for Loan {
    fn link(&self) -> &AtomicU32 {
        &self.request.queue
    }
}

impl Request {
    fn begin(&self, queue: Served, id: u64, key: u32) {
        self.queue.store(queue.0 | IN_USE, Ordering::Relaxed);
        self.key.store(key, Ordering::Relaxed);
        self.id.store(id, Ordering::Relaxed);
    }

    /// Its queue, if there is one.
    fn queue(&self) -> Option<u32> {
        let queue = self.queue.load(Ordering::Relaxed);
        (queue & IN_USE != 0).then_some(queue & !IN_USE)
    }

    fn key(&self) -> Key {
        Key(self.key.load(Ordering::Relaxed))
    }

    fn id(&self) -> u64 {
        self.id.load(Ordering::Relaxed)
    }
}

impl Loan {
    /// Never waits: the slot's name is in one hand.
    fn bytes(&self) -> MutexGuard<'_, Option<Box<[u8]>>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Posts {
    /// Requests without a slot.
    requests: Places<Request>,
    loans: Places<Loan>,
    queues: Places<Queue>,
    /// The depths of the queues served, and what is left of those that are gone.
    promised: AtomicU32,
    depth: u32,
}

impl Posts {
    /// Of a completion queue so deep. With memory for the first requests and slots.
    pub(super) fn new(depth: u32) -> Posts {
        Posts {
            requests: Places::new(),
            loans: Places::new(),
            queues: Places::new(),
            promised: AtomicU32::new(0),
            depth,
        }
    }

    /// Another queue so deep, if it finds room.
    pub(super) fn serve(&self, depth: u32) -> Option<Served> {
        let more = |promised: u32| promised.checked_add(depth).filter(|sum| *sum <= self.depth);
        // Relaxed: a count, of nothing that is handed over by it.
        let promised = self
            .promised
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        promised.ok()?;
        let (name, queue) = self.queues.take();
        queue.outstanding.store(0, Ordering::Relaxed);
        Some(Served(name))
    }

    /// A queue is gone: what is not polled yet keeps its part of the promise.
    pub(super) fn release(&self, queue: Served, depth: u32) {
        let place = self.queues.at(queue.0);
        let left = place.outstanding.fetch_or(ORPHANED, Ordering::AcqRel);
        self.promised.fetch_sub(depth - left, Ordering::Relaxed);
        if left == 0 {
            self.queues.give(queue.0, place);
        }
    }

    /// Puts a request in, if fewer than `depth` of its queue are there; its name for the raw layer.
    #[inline]
    pub(super) fn add(&self, queue: Served, depth: u32, id: u64, slot: Option<Key>) -> Option<u64> {
        let more = |count| (count < depth).then_some(count + 1);
        // Acquire pairs with `finish`: the place of what went is free.
        let counted = &self.queues.at(queue.0).outstanding;
        counted
            .fetch_update(Ordering::Acquire, Ordering::Relaxed, more)
            .ok()?;
        Some(match slot {
            Some(Key(key)) => {
                let (name, loan) = self.loans.take();
                loan.request.begin(queue, id, key);
                LENT | u64::from(name)
            }
            None => {
                let (name, request) = self.requests.take();
                request.begin(queue, id, 0);
                u64::from(name)
            }
        })
    }

    /// Takes it out again.
    #[inline]
    pub(super) fn take(&self, name: u64) -> Option<Post> {
        let place = name as u32;
        if name & LENT == 0 {
            let request = self.requests.at(place);
            let (queue, id) = (request.queue()?, request.id());
            self.requests.give(place, request);
            self.finish(queue);
            return Some(Post { id, slot: None });
        }
        let loan = self.loans.at(place);
        let (queue, id) = (loan.request.queue()?, loan.request.id());
        let slot = Kept {
            key: loan.request.key(),
            bytes: loan.bytes().take(),
        };
        self.loans.give(place, loan);
        self.finish(queue);
        Some(Post {
            id,
            slot: Some(slot),
        })
    }

    /// A request of that queue counts no more.
    fn finish(&self, queue: u32) {
        let place = self.queues.at(queue);
        // AcqRel: the request's place is free before it is no longer counted; whoever takes the last
        // one of a queue that is gone has seen all that was done to it.
        let left = place.outstanding.fetch_sub(1, Ordering::AcqRel) - 1;
        if left & ORPHANED != 0 {
            self.promised.fetch_sub(1, Ordering::Relaxed);
        }
        if left == ORPHANED {
            self.queues.give(queue, place);
        }
    }

    /// The keys of slots whose requests nobody will poll any more.
    pub(super) fn abandoned(&self) -> impl Iterator<Item = Key> {
        let names = self.loans.known().map(|name| LENT | u64::from(name));
        names.filter_map(|name| Some(self.take(name)?.slot?.key))
    }
}

impl Keeper for Posts {
    fn completed(&self, wr_id: u64, memory: &mut Memory) {
        if wr_id & LENT != 0 {
            let loan = self.loans.at(wr_id as u32);
            *loan.bytes() = memory.detach(loan.request.key());
        }
    }
}
