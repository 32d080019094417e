//! Places for what is under way, named by numbers, from any thread to any other without waiting.
//!
//! Owns: the line of free places, and which were never used. Who puts something in has its name; who has
//! the name takes it out. The name goes from one thread to the next by other means (a line, a ring),
//! so a place is never locked by two at once.
//!
//! Places that are free form a stack: the one given back last is taken first, so that few are ever
//! touched. Its head carries a number that changes with every step, lest a place that was taken and
//! given back meanwhile be taken for one that has lain there.
//!
//! Invariant: no more than `depth` things are in places at once; the caller counts them, and counts one
//! as gone only after it has taken it out. So there is a place whenever one is asked for.
//!
//! Deliberately absent: counting.
//!
//! Source: Treiber, "Systems programming: coping with parallelism" (1986), for the stack.

use std::sync::OnceLock;

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

/// Places made at once at first; each further chunk has twice as many.
const FIRST: u32 = if cfg!(loom) { 2 } else { 64 };
/// Chunks: together [`DEPTH_MAX`] places.
const CHUNKS: usize = 17;
/// Places that there can be.
pub const DEPTH_MAX: u32 = FIRST * ((1 << CHUNKS) - 1);

#[derive(Debug)]
struct Place<T> {
    /// Of a free place: one more than the free place below it, or 0.
    below: AtomicU32,
    item: Mutex<Option<T>>,
}

/// See the [module](self).
#[derive(Debug)]
pub struct Places<T> {
    chunks: [OnceLock<Box<[Place<T>]>>; CHUNKS],
    /// The stack's head: a number of steps, then one more than the top place, or 0.
    free: AtomicU64,
    /// Places below this were in use.
    fresh: AtomicU32,
}

impl<T> Places<T> {
    /// With memory for the first; more comes when it is needed.
    pub fn new() -> Places<T> {
        let new = Places {
            chunks: [const { OnceLock::new() }; CHUNKS],
            free: AtomicU64::new(0),
            fresh: AtomicU32::new(0),
        };
        new.place(0);
        new
    }

    fn place(&self, name: u32) -> &Place<T> {
        let chunk = (name / FIRST + 1).ilog2();
        let size = FIRST << chunk;
        let place = |_| Place {
            below: AtomicU32::new(0),
            item: Mutex::new(None),
        };
        let places = self.chunks[chunk as usize].get_or_init(|| (0..size).map(place).collect());
        &places[(name - (size - FIRST)) as usize]
    }

    /// Puts something in; its name.
    pub fn put(&self, item: T) -> u32 {
        let name = self.pop();
        // Relaxed: the stack has handed the place over, and a fresh one nobody else has.
        let name = name.unwrap_or_else(|| self.fresh.fetch_add(1, Ordering::Relaxed));
        *hold(&self.place(name).item) = Some(item);
        name
    }

    /// Lets `act` see it.
    pub fn with<R>(&self, name: u32, act: impl FnOnce(&mut T) -> R) -> Option<R> {
        hold(&self.place(name).item).as_mut().map(act)
    }

    /// Takes it out.
    pub fn take(&self, name: u32) -> Option<T> {
        let item = hold(&self.place(name).item).take()?;
        self.push(name);
        Some(item)
    }

    /// Takes out all that is there. Nobody else may be at it.
    pub fn drain(&self) -> impl Iterator<Item = T> {
        let names = 0..self.fresh.load(Ordering::Relaxed);
        names.filter_map(|name| self.take(name))
    }

    fn pop(&self) -> Option<u32> {
        // Acquire pairs with `push`: what was written to the place before it was free.
        let mut seen = self.free.load(Ordering::Acquire);
        loop {
            let name = (seen as u32).checked_sub(1)?;
            // Relaxed: worth something only if the head is still the same.
            let below = self.place(name).below.load(Ordering::Relaxed);
            let next = step(seen, below);
            let swapped =
                self.free
                    .compare_exchange(seen, next, Ordering::Acquire, Ordering::Acquire);
            match swapped {
                Ok(_) => return Some(name),
                Err(now) => seen = now,
            }
        }
    }

    fn push(&self, name: u32) {
        let below = &self.place(name).below;
        let mut seen = self.free.load(Ordering::Relaxed);
        loop {
            below.store(seen as u32, Ordering::Relaxed);
            let next = step(seen, name + 1);
            // AcqRel: whoever pops this place, or those below it, sees what was written to them.
            let swapped =
                self.free
                    .compare_exchange(seen, next, Ordering::AcqRel, Ordering::Relaxed);
            match swapped {
                Ok(_) => return,
                Err(now) => seen = now,
            }
        }
    }
}

/// The next head, with this on top.
fn step(head: u64, top: u32) -> u64 {
    ((head >> 32).wrapping_add(1) << 32) | u64::from(top)
}

fn hold<T>(item: &Mutex<T>) -> MutexGuard<'_, T> {
    item.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn few_places_are_used_again_and_again() {
        let places = Places::new();
        for round in 0..1000 {
            let names: Vec<u32> = (0..round % 7).map(|item| places.put(item)).collect();
            for (item, name) in names.iter().enumerate().rev() {
                assert_eq!(places.with(*name, |item| *item), Some(item as u64));
                assert_eq!(places.take(*name), Some(item as u64));
                assert_eq!(places.take(*name), None);
            }
        }
        assert_eq!(places.fresh.load(Ordering::Relaxed), 6);
        assert_eq!(places.drain().count(), 0);
    }

    #[test]
    fn many_places_are_all_different() {
        let places = Places::new();
        for item in 0..10_000 {
            assert_eq!(places.put(item), item);
        }
        assert_eq!(places.take(5_000), Some(5_000));
        let left: Vec<u32> = places.drain().collect();
        assert_eq!(left.len(), 9_999);
        assert!(left.is_sorted());
        // The last place that there can be.
        assert_eq!(places.with(DEPTH_MAX - 1, |_| ()), None);
    }
}

/// Explored by `ci/loom`.
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    /// Two threads put in and take out, the second twice: each finds what it has put in, and no more
    /// places are used than there were things at once.
    #[test]
    fn nobody_finds_what_another_has_put_in() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            let places = Arc::new(Places::new());
            let theirs = places.clone();
            let other = thread::spawn(move || {
                for item in [10, 11] {
                    let name = theirs.put(item);
                    assert_eq!(theirs.take(name), Some(item));
                }
            });
            let first = places.put(20);
            let second = places.put(21);
            assert_eq!(places.take(first), Some(20));
            assert_eq!(places.take(second), Some(21));
            let third = places.put(22);
            assert_eq!(places.take(third), Some(22));
            other.join().unwrap();
            assert!(places.fresh.load(Ordering::Relaxed) <= 3);
        });
    }

    /// Places that were used by one thread and given back are taken by two at once: a stack whose top
    /// comes back meanwhile.
    #[test]
    fn a_place_that_comes_back_is_not_given_twice() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            let places = Arc::new(Places::new());
            let names = [places.put(1), places.put(2)];
            names.map(|name| places.take(name));
            let theirs = places.clone();
            let other = thread::spawn(move || {
                let names = [theirs.put(10), theirs.put(11)];
                names.map(|name| theirs.take(name)) == [Some(10), Some(11)]
            });
            let name = places.put(20);
            assert_eq!(places.take(name), Some(20));
            let again = places.put(21);
            assert_eq!(places.take(again), Some(21));
            assert!(other.join().unwrap());
        });
    }
}
