//! Places named by numbers, handed out and given back by any thread without waiting.
//!
//! Owns: the line of free places, and which were never used. Who has taken a place has its name, and
//! with it what lies there, until the name is given back. The name goes from one thread to the next by
//! other means (a line, a ring), so that a place is never in two hands.
//!
//! Places that are free form a stack: the one given back last is taken first, so that few are ever
//! touched. Its head carries a number that changes with every step, lest a place that was taken and
//! given back meanwhile be taken for one that has lain there. A free place leads to the one below by a
//! word that is its holder's while it has one: who reads it too late finds the head changed.
//!
//! Invariant: no more than [`DEPTH_MAX`] places are in use at once; the caller counts them, and counts
//! one as free only after it has given it back. So there is a place whenever one is asked for.
//!
//! Deliberately absent: counting.
//!
//! Source: Treiber, "Systems programming: coping with parallelism" (1986), for the stack.

use std::sync::OnceLock;

#[cfg(loom)]
use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Places made at once at first; each further chunk has twice as many.
const FIRST: u32 = if cfg!(loom) { 2 } else { 64 };
/// Chunks after the first: together [`DEPTH_MAX`] places.
const LATER: usize = 16;
/// Places that there can be.
pub const DEPTH_MAX: u32 = FIRST * ((2 << LATER) - 1);

/// What a place holds. It is made once and used again and again.
pub trait Place: Default {
    /// A word that is the holder's while the place is in use, and the stack's while it is free.
    fn link(&self) -> &AtomicU32;
}

/// See the [module](self).
#[derive(Debug)]
pub struct Places<P> {
    /// Where most of them are that are ever used.
    first: Box<[P; FIRST as usize]>,
    later: [OnceLock<Box<[P]>>; LATER],
    /// The stack's head: a number of steps, then one more than the top place, or 0. A free place
    /// leads to the one below in the same way.
    free: AtomicU64,
    /// Places below this were in use.
    fresh: AtomicU32,
}

impl<P: Place> Places<P> {
    /// With memory for the first; the rest comes when it is needed.
    pub fn new() -> Places<P> {
        Places {
            first: Box::new(std::array::from_fn(|_| P::default())),
            later: [const { OnceLock::new() }; LATER],
            free: AtomicU64::new(0),
            fresh: AtomicU32::new(0),
        }
    }

    /// The place of that name. Panics beyond [`DEPTH_MAX`].
    #[inline]
    pub fn at(&self, name: u32) -> &P {
        match self.first.get(name as usize) {
            Some(place) => place,
            None => self.at_later(name),
        }
    }

    #[inline(never)]
    fn at_later(&self, name: u32) -> &P {
        let chunk = (name / FIRST + 1).ilog2();
        let size = FIRST << chunk;
        let places = self.later[chunk as usize - 1].get_or_init(|| {
            std::iter::repeat_with(P::default)
                .take(size as usize)
                .collect()
        });
        &places[(name - (size - FIRST)) as usize]
    }

    /// A free place and its name.
    #[inline]
    pub fn take(&self) -> (u32, &P) {
        self.pop().unwrap_or_else(|| {
            // Relaxed: nobody else has it.
            let name = self.fresh.fetch_add(1, Ordering::Relaxed);
            (name, self.at(name))
        })
    }

    /// The names of all that were ever in use.
    pub fn known(&self) -> std::ops::Range<u32> {
        0..self.fresh.load(Ordering::Relaxed)
    }

    #[inline]
    fn pop(&self) -> Option<(u32, &P)> {
        // Acquire pairs with `give`: what was written to the place before it was free.
        let mut seen = self.free.load(Ordering::Acquire);
        loop {
            let name = (seen as u32).checked_sub(1)?;
            let place = self.at(name);
            // Relaxed: worth something only if the head is still the same.
            let below = place.link().load(Ordering::Relaxed);
            let next = step(seen, below);
            let swapped =
                self.free
                    .compare_exchange(seen, next, Ordering::Acquire, Ordering::Acquire);
            match swapped {
                Ok(_) => return Some((name, place)),
                Err(now) => seen = now,
            }
        }
    }

    /// Gives a place back, which is the one of that name.
    #[inline]
    pub fn give(&self, name: u32, place: &P) {
        let below = place.link();
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

#[cfg(test)]
#[derive(Debug, Default)]
struct Numbered {
    link: AtomicU32,
    number: AtomicU32,
}

#[cfg(test)]
impl Place for Numbered {
    fn link(&self) -> &AtomicU32 {
        &self.link
    }
}

#[cfg(test)]
impl Places<Numbered> {
    fn put(&self, number: u32) -> u32 {
        let (name, place) = self.take();
        // As a holder may.
        place.link.store(u32::MAX, Ordering::Relaxed);
        place.number.store(number, Ordering::Relaxed);
        name
    }

    fn get(&self, name: u32) -> u32 {
        let place = self.at(name);
        let number = place.number.load(Ordering::Relaxed);
        self.give(name, place);
        number
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn few_places_are_used_again_and_again() {
        let places = Places::new();
        for round in 0..1000 {
            let names: Vec<u32> = (0..round % 7).map(|number| places.put(number)).collect();
            for (number, name) in names.iter().enumerate().rev() {
                assert_eq!(places.get(*name), number as u32);
            }
        }
        assert_eq!(places.known(), 0..6);
    }

    #[test]
    fn many_places_are_all_different() {
        let places = Places::new();
        for number in 0..10_000 {
            assert_eq!(places.put(number), number);
        }
        assert_eq!(places.get(5_000), 5_000);
        assert_eq!(places.put(77), 5_000);
        let numbers = places.known().map(|name| places.get(name));
        let right = (0..10_000).map(|number| if number == 5_000 { 77 } else { number });
        assert!(numbers.eq(right));
        // The last place that there can be.
        assert_eq!(places.at(DEPTH_MAX - 1).number.load(Ordering::Relaxed), 0);
    }
}

/// Explored by `ci/loom`.
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    /// With all memory that they take here: that a chunk is made once is the standard library's
    /// matter, and loom does not see it.
    fn made() -> Arc<Places<Numbered>> {
        let places = Places::new();
        places.at(FIRST);
        Arc::new(places)
    }

    /// Two threads take and give, the second twice: each finds what it has left, and no more places
    /// are used than there were in use at once.
    #[test]
    fn nobody_finds_what_another_has_left() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            let places = made();
            let theirs = places.clone();
            let other = thread::spawn(move || {
                for number in [10, 11] {
                    let name = theirs.put(number);
                    assert_eq!(theirs.get(name), number);
                }
            });
            let first = places.put(20);
            let second = places.put(21);
            assert_eq!(places.get(first), 20);
            assert_eq!(places.get(second), 21);
            let third = places.put(22);
            assert_eq!(places.get(third), 22);
            other.join().unwrap();
            assert!(places.known().end <= 3);
        });
    }

    /// Places that were used by one thread and given back are taken by two at once: a stack whose top
    /// comes back meanwhile.
    #[test]
    fn a_place_that_comes_back_is_not_given_twice() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            let places = made();
            let names = [places.put(1), places.put(2)];
            for name in names {
                places.get(name);
            }
            let theirs = places.clone();
            let other = thread::spawn(move || {
                let names = [theirs.put(10), theirs.put(11)];
                names.map(|name| theirs.get(name)) == [10, 11]
            });
            let name = places.put(20);
            assert_eq!(places.get(name), 20);
            let again = places.put(21);
            assert_eq!(places.get(again), 21);
            assert!(other.join().unwrap());
        });
    }
}
