//! Work requests from posting to polling: who they are to the program, and the slots that are theirs
//! meanwhile.
//!
//! Owns: what a completion queue has promised to the queues that it serves, and the way of a slot's
//! bytes back: whoever has the device's token takes them out of the device's table when the request
//! completes, and leaves them here for whoever polls. No thread waits for another.
//!
//! Invariant: a request has its place until its completion has been polled, and counts as long.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::places::{DEPTH_MAX, Places};
use crate::memory::{Key, Memory};
use crate::raw::{CQE_MAX, Keeper};

const _: () = assert!(CQE_MAX <= DEPTH_MAX);

/// In a count of requests: the queue that they are of is gone.
const ORPHANED: u32 = 1 << 31;

/// A slot that belongs to a request.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) key: Key,
    /// Its bytes, once the request has completed.
    pub(super) bytes: Option<Box<[u8]>>,
}

/// A request under way, or completed and not polled.
#[derive(Debug)]
pub(super) struct Post {
    /// The program's name for it.
    pub(super) id: u64,
    pub(super) slot: Option<Kept>,
    /// The queue that it is of.
    pub(super) of: Arc<Outstanding>,
}

/// Requests of one queue of a queue pair that are not polled yet.
#[derive(Debug, Default)]
pub(super) struct Outstanding(AtomicU32);

impl Outstanding {
    /// One more, if there are fewer than `depth`.
    pub(super) fn take(&self, depth: u32) -> bool {
        let more = |count| (count < depth).then_some(count + 1);
        // Acquire pairs with `give`: the place of what went is free.
        self.0
            .fetch_update(Ordering::Acquire, Ordering::Relaxed, more)
            .is_ok()
    }

    /// One less. Whether the queue is gone.
    fn give(&self) -> bool {
        self.0.fetch_sub(1, Ordering::Release) & ORPHANED != 0
    }

    /// The queue is gone; how many of its requests are not polled yet.
    fn orphan(&self) -> u32 {
        self.0.fetch_or(ORPHANED, Ordering::Relaxed)
    }
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Posts {
    places: Places<Post>,
    /// The depths of the queues served, and what is left of those that are gone.
    promised: AtomicU32,
    depth: u32,
}

impl Posts {
    /// Of a completion queue so deep.
    pub(super) fn new(depth: u32) -> Posts {
        Posts {
            places: Places::new(),
            promised: AtomicU32::new(0),
            depth,
        }
    }

    /// Whether another queue so deep finds room.
    pub(super) fn promise(&self, depth: u32) -> bool {
        let more = |promised: u32| promised.checked_add(depth).filter(|sum| *sum <= self.depth);
        // Relaxed: a count, of nothing that is handed over by it.
        self.promised
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .is_ok()
    }

    /// A queue is gone: what is not polled yet keeps its part of the promise.
    pub(super) fn release(&self, depth: u32, of: &Outstanding) {
        let left = of.orphan();
        self.promised.fetch_sub(depth - left, Ordering::Relaxed);
    }

    /// Puts a request in that [counts](Outstanding::take); its name for the raw layer.
    pub(super) fn add(&self, post: Post) -> u64 {
        u64::from(self.places.put(post))
    }

    /// Takes it out again.
    pub(super) fn take(&self, name: u64) -> Option<Post> {
        let post = self.places.take(u32::try_from(name).ok()?)?;
        if post.of.give() {
            self.promised.fetch_sub(1, Ordering::Relaxed);
        }
        Some(post)
    }

    /// The keys of slots whose requests nobody will poll any more.
    pub(super) fn abandoned(&self) -> impl Iterator<Item = Key> {
        self.places.drain().filter_map(|post| Some(post.slot?.key))
    }
}

impl Keeper for Posts {
    fn completed(&self, wr_id: u64, memory: &mut Memory) {
        let fetch = |post: &mut Post| {
            if let Some(kept) = &mut post.slot {
                kept.bytes = memory.detach(kept.key);
            }
        };
        self.places.with(wr_id as u32, fetch);
    }
}
