//! Work that was posted while another thread had the device's token.
//!
//! Owns: the line in which such work waits ([`Line`]), how much of it a queue admits ([`Room`]), and the
//! word of which queues have some ([`Pending`]). Nothing here makes a thread wait.
//!
//! Who posts tries to take the token. If another has it, the work goes into the queue's line, the
//! queue is noted in [`Pending`], and the token is tried for once more. Who gives the token back looks
//! into [`Pending`] afterwards, and if there is something tries to take the token again. Both change the
//! same word, so one comes first: the holder, and the poster finds the token free, or the poster, and
//! the holder finds its bit.
//!
//! Invariants:
//! * work that [`Room`] has admitted finds room in its line: a line is as long as its queue is deep,
//!   and room is given back only after work has left the line. A queue pair's keeper (`tables`) admits by
//!   a count of its own, which it gives back later still;
//! * work leaves in the order in which posters took their places; who has not finished writing
//!   holds up those behind, but notes its queue again afterwards.

#[cfg(loom)]
use loom::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU32, AtomicU64, Ordering},
};
#[cfg(not(loom))]
use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

/// How much work a queue may have that is not finished.
#[derive(Debug)]
pub struct Room {
    used: AtomicU32,
    depth: u32,
}

impl Room {
    /// Of an empty queue for `depth` requests.
    pub fn new(depth: u32) -> Room {
        Room {
            used: AtomicU32::new(0),
            depth,
        }
    }

    /// Room for one more request; false if there is none.
    pub fn take(&self) -> bool {
        let more = |used| (used < self.depth).then_some(used + 1);
        // Acquire pairs with `give`: what was in the line has left it.
        self.used
            .fetch_update(Ordering::Acquire, Ordering::Relaxed, more)
            .is_ok()
    }

    /// So many requests are finished.
    pub fn give(&self, count: u32) {
        if count > 0 {
            self.used.fetch_sub(count, Ordering::Release);
        }
    }

    /// Requests that are not finished.
    #[cfg(test)]
    pub fn used(&self) -> u32 {
        self.used.load(Ordering::Relaxed)
    }
}

#[derive(Debug)]
struct Slot<T> {
    /// One more than the place of what lies here, once it is complete.
    ready: AtomicU64,
    /// Locked by whoever has the place, then by whoever takes it from there: never by two at once.
    item: Mutex<T>,
}

/// Work in the order of posting, from any number of threads to the holder of the token.
#[derive(Debug)]
pub struct Line<T> {
    slots: Box<[Slot<T>]>,
    /// Places given out.
    tail: AtomicU64,
    /// Places emptied; written by the holder of the token.
    head: AtomicU64,
}

impl<T> Line<T> {
    /// For `depth` requests; `item` makes room for one.
    pub fn new(depth: u32, item: impl Fn() -> T) -> Line<T> {
        let slot = |_| Slot {
            ready: AtomicU64::new(0),
            item: Mutex::new(item()),
        };
        Line {
            slots: (0..depth.max(1)).map(slot).collect(),
            tail: AtomicU64::new(0),
            head: AtomicU64::new(0),
        }
    }

    fn slot(&self, place: u64) -> &Slot<T> {
        &self.slots[(place % self.slots.len() as u64) as usize]
    }

    /// Appends what `fill` makes of a used item. It has been admitted.
    pub fn push(&self, fill: impl FnOnce(&mut T)) {
        // Relaxed: the slot's own word hands it over; that it is free is known from what admitted it.
        let place = self.tail.fetch_add(1, Ordering::Relaxed);
        let slot = self.slot(place);
        fill(&mut hold(&slot.item));
        slot.ready.store(place + 1, Ordering::Release);
    }

    /// Hands the first to `take`; false if there is none that is complete. Under the token.
    pub fn pop(&self, take: impl FnOnce(&mut T)) -> bool {
        let head = self.head.load(Ordering::Relaxed);
        let slot = self.slot(head);
        let is_ready = slot.ready.load(Ordering::Acquire) == head + 1;
        if is_ready {
            take(&mut hold(&slot.item));
            self.head.store(head + 1, Ordering::Relaxed);
        }
        is_ready
    }

    /// Whether nothing lies in it, complete or not. Under the token.
    pub fn is_empty(&self) -> bool {
        // Relaxed: a thread's own places are seen by it, and it is about these that it asks.
        self.head.load(Ordering::Relaxed) == self.tail.load(Ordering::Relaxed)
    }
}

fn hold<T>(item: &Mutex<T>) -> MutexGuard<'_, T> {
    item.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Queues of a set that each bit of the first word stands for.
const GROUP: usize = 16;
/// Queues that there may be.
pub const QUEUES_MAX: usize = 64 * GROUP * 64;

/// Which queues have work in their lines.
#[derive(Debug)]
pub struct Pending {
    /// A bit for each [`GROUP`] of `queues` that may not be zero.
    any: AtomicU64,
    /// A bit for each queue.
    queues: Box<[AtomicU64]>,
}

impl Pending {
    /// For queues below `count`, at most [`QUEUES_MAX`].
    pub fn new(count: usize) -> Pending {
        assert!(count <= QUEUES_MAX);
        let words = count.div_ceil(64 * GROUP) * GROUP;
        Pending {
            any: AtomicU64::new(0),
            queues: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Queue `index` has work in its line. The caller tries to take the token then.
    pub fn note(&self, index: usize) {
        let word = index / 64;
        // Release: who finds the bit finds the work. Acquire pairs with `is_any`.
        self.queues[word].fetch_or(1 << (index % 64), Ordering::Release);
        self.any.fetch_or(1 << (word / GROUP), Ordering::AcqRel);
    }

    /// Whether some queue has, for who has just given the token back. A change that changes nothing:
    /// who notes a queue after it finds the token free.
    pub fn is_any(&self) -> bool {
        self.any.fetch_or(0, Ordering::AcqRel) != 0
    }

    /// The same, for who has the token.
    pub fn has_any(&self) -> bool {
        self.any.load(Ordering::Relaxed) != 0
    }

    /// Calls `each` for the queues noted and forgets them. Under the token.
    pub fn take(&self, mut each: impl FnMut(usize)) {
        let mut any = self.any.swap(0, Ordering::Acquire);
        while any != 0 {
            let group = any.trailing_zeros() as usize * GROUP;
            any &= any - 1;
            for word in group..group + GROUP {
                if self.queues[word].load(Ordering::Relaxed) == 0 {
                    continue;
                }
                let mut bits = self.queues[word].swap(0, Ordering::Acquire);
                while bits != 0 {
                    each(word * 64 + bits.trailing_zeros() as usize);
                    bits &= bits - 1;
                }
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn room_is_what_the_queue_is_deep() {
        let room = Room::new(2);
        assert!(room.take() && room.take() && !room.take());
        room.give(1);
        assert!(room.take() && !room.take());
        assert_eq!(room.used(), 2);
    }

    #[test]
    fn every_queue_noted_is_found_once() {
        let pending = Pending::new(QUEUES_MAX);
        let noted = [0, 63, 64, 1023, 1024, 40_000, QUEUES_MAX - 1];
        for index in noted.into_iter().chain(noted) {
            pending.note(index);
        }
        assert!(pending.is_any());
        let mut found = Vec::new();
        pending.take(|index| found.push(index));
        assert_eq!(found, noted);
        assert!(!pending.is_any());
    }

    #[test]
    fn a_line_is_used_again_and_again() {
        let line = Line::<u64>::new(3, || 0);
        let (mut next_in, mut next_out) = (0, 0);
        for round in 0..100 {
            while next_in - next_out < round % 4 {
                line.push(|item| *item = next_in);
                next_in += 1;
            }
            while line.pop(|item| assert_eq!(*item, next_out)) {
                next_out += 1;
            }
            assert!(line.is_empty() && next_in == next_out);
        }
    }
}

/// Explored by `ci/loom`.
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    /// A queue, and the token of its device with what came of the work.
    struct Device {
        pending: Pending,
        line: Line<u64>,
        room: Room,
        token: Mutex<Vec<u64>>,
    }

    impl Device {
        fn new(depth: u32) -> Arc<Device> {
            Arc::new(Device {
                pending: Pending::new(1),
                line: Line::new(depth, || 0),
                room: Room::new(depth),
                token: Mutex::new(Vec::new()),
            })
        }

        /// As `Shared::take_left`.
        fn take_left(&self) {
            while self.pending.is_any() {
                let Ok(mut done) = self.token.try_lock() else {
                    return;
                };
                self.take_posts(&mut done);
            }
        }

        fn take_posts(&self, done: &mut Vec<u64>) {
            let mut is_noted = false;
            self.pending.take(|_| is_noted = true);
            while is_noted && self.line.pop(|item| done.push(*item)) {
                self.room.give(1);
            }
        }

        /// As a post: by oneself, or into the line.
        fn post(&self, value: u64) -> bool {
            if !self.room.take() {
                return false;
            }
            if let Ok(mut done) = self.token.try_lock() {
                self.take_posts(&mut done);
                if self.line.is_empty() {
                    done.push(value);
                    self.room.give(1);
                    drop(done);
                    self.take_left();
                    return true;
                }
            }
            self.line.push(|item| *item = value);
            self.pending.note(0);
            self.take_left();
            true
        }
    }

    /// Whoever posts, and whoever else had the token: in the end nothing lies in the line, and each
    /// thread's work was done in its order.
    #[test]
    fn work_is_neither_lost_nor_overtaken() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            let device = Device::new(4);
            let posters: Vec<_> = [10, 20]
                .into_iter()
                .map(|first| {
                    let device = device.clone();
                    thread::spawn(move || {
                        assert!(device.post(first) && device.post(first + 1));
                    })
                })
                .collect();
            // Somebody who has the token for a while and only gives it back.
            let token = hold(&device.token);
            // Where it is interrupted.
            device.room.used();
            drop(token);
            device.take_left();
            for poster in posters {
                poster.join().unwrap();
            }
            let mut done = hold(&device.token).clone();
            assert!(device.line.is_empty(), "work was left behind");
            for first in [10, 20] {
                let of = |value: u64| done.iter().position(|item| *item == value);
                assert!(of(first) < of(first + 1));
            }
            done.sort_unstable();
            assert_eq!(done, [10, 11, 20, 21]);
        });
    }

    /// A queue of one: what is refused was refused for good reason, and what is admitted is not
    /// written over what is still in the line.
    #[test]
    fn a_full_queue_refuses_and_loses_nothing() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            let device = Device::new(1);
            let theirs = device.clone();
            let poster = thread::spawn(move || (theirs.post(1), theirs.post(2)));
            let third = device.post(3);
            let (first, second) = poster.join().unwrap();
            let mut done = hold(&device.token).clone();
            done.sort_unstable();
            let posted = [(first, 1), (second, 2), (third, 3)];
            let expected: Vec<u64> = posted.iter().filter(|p| p.0).map(|p| p.1).collect();
            assert_eq!(done, expected);
        });
    }
}
