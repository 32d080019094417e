//! Work requests from posting to polling: who they are to the program, and the slots that are theirs
//! meanwhile.
//!
//! Owns: what a completion queue has promised to the queues that it serves, and the way of a slot's
//! bytes back: whoever has the device's token takes them out of the device's table when the request
//! completes, and leaves them here for whoever polls. No thread waits for another.
//!
//! A connection's receives lie here most of its life, so a request takes 16 bytes; one with a slot
//! has 32 more.
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

/// In the place of a request's slot: there is no request.
const NOTHING: u32 = 0;
/// In the place of a request's slot: it has none. What is more is the slot's name.
const NO_SLOT: u32 = 1;

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
    /// The work queue that it is of.
    queue: AtomicU32,
    slot: AtomicU32,
    id: AtomicU64,
}

/// The place of a slot.
#[derive(Debug, Default)]
struct Loan {
    key: AtomicU32,
    bytes: Mutex<Option<Box<[u8]>>>,
}

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
        &self.key
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
    requests: Places<Request>,
    slots: Places<Loan>,
    queues: Places<Queue>,
    /// The depths of the queues served, and what is left of those that are gone.
    promised: AtomicU32,
    depth: u32,
}

impl Posts {
    /// Of a completion queue so deep. With memory for the first requests and slots.
    pub(super) fn new(depth: u32) -> Posts {
        let new = Posts {
            requests: Places::new(),
            slots: Places::new(),
            queues: Places::new(),
            promised: AtomicU32::new(0),
            depth,
        };
        new.requests.at(0);
        new.slots.at(0);
        new
    }

    /// Another queue so deep, if it finds room.
    pub(super) fn serve(&self, depth: u32) -> Option<Served> {
        let more = |promised: u32| promised.checked_add(depth).filter(|sum| *sum <= self.depth);
        // Relaxed: a count, of nothing that is handed over by it.
        let promised = self
            .promised
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        promised.ok()?;
        let name = self.queues.take();
        self.outstanding(name).store(0, Ordering::Relaxed);
        Some(Served(name))
    }

    /// A queue is gone: what is not polled yet keeps its part of the promise.
    pub(super) fn release(&self, queue: Served, depth: u32) {
        let outstanding = self.outstanding(queue.0);
        let left = outstanding.fetch_or(ORPHANED, Ordering::AcqRel);
        self.promised.fetch_sub(depth - left, Ordering::Relaxed);
        if left == 0 {
            self.queues.give(queue.0);
        }
    }

    fn outstanding(&self, queue: u32) -> &AtomicU32 {
        &self.queues.at(queue).outstanding
    }

    /// Puts a request in, if fewer than `depth` of its queue are there; its name for the raw layer.
    pub(super) fn add(&self, queue: Served, depth: u32, id: u64, slot: Option<Key>) -> Option<u64> {
        let more = |count| (count < depth).then_some(count + 1);
        // Acquire pairs with `take`: the place of what went is free.
        let counted = self.outstanding(queue.0);
        counted
            .fetch_update(Ordering::Acquire, Ordering::Relaxed, more)
            .ok()?;
        let slot = slot.map_or(NO_SLOT, |key| {
            let name = self.slots.take();
            self.slots.at(name).key.store(key.0, Ordering::Relaxed);
            NO_SLOT + 1 + name
        });
        let name = self.requests.take();
        let place = self.requests.at(name);
        place.queue.store(queue.0, Ordering::Relaxed);
        place.slot.store(slot, Ordering::Relaxed);
        place.id.store(id, Ordering::Relaxed);
        Some(u64::from(name))
    }

    /// Takes it out again.
    pub(super) fn take(&self, name: u64) -> Option<Post> {
        let name = u32::try_from(name).ok()?;
        let place = self.requests.at(name);
        let slot = place.slot.swap(NOTHING, Ordering::Relaxed);
        let slot = slot.checked_sub(NO_SLOT)?.checked_sub(1);
        let slot = slot.map(|slot| self.take_slot(slot));
        let id = place.id.load(Ordering::Relaxed);
        let queue = place.queue.load(Ordering::Relaxed);
        self.requests.give(name);
        // AcqRel: the place is free before it is no longer counted; whoever takes the last one of a
        // queue that is gone has seen all that was done to it.
        let left = self.outstanding(queue).fetch_sub(1, Ordering::AcqRel) - 1;
        if left & ORPHANED != 0 {
            self.promised.fetch_sub(1, Ordering::Relaxed);
        }
        if left == ORPHANED {
            self.queues.give(queue);
        }
        Some(Post { id, slot })
    }

    fn take_slot(&self, name: u32) -> Kept {
        let loan = self.slots.at(name);
        let key = Key(loan.key.load(Ordering::Relaxed));
        let bytes = loan.bytes().take();
        self.slots.give(name);
        Kept { key, bytes }
    }

    /// The keys of slots whose requests nobody will poll any more.
    pub(super) fn abandoned(&self) -> impl Iterator<Item = Key> {
        let posts = self.requests.known();
        posts.filter_map(|name| Some(self.take(u64::from(name))?.slot?.key))
    }
}

impl Keeper for Posts {
    fn completed(&self, wr_id: u64, memory: &mut Memory) {
        let place = self.requests.at(wr_id as u32);
        let slot = place.slot.load(Ordering::Relaxed);
        if let Some(name) = slot.checked_sub(NO_SLOT + 1) {
            let loan = self.slots.at(name);
            *loan.bytes() = memory.detach(Key(loan.key.load(Ordering::Relaxed)));
        }
    }
}
