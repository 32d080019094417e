//! Completions on their way from whoever drives the device to whoever polls.
//!
//! Owns: a ring of entries with one producer, the holder of the device's token, and any number of
//! consumers, none of which ever waits for another thread.
//!
//! ```text
//! head, tail   each: epoch (32 bits), index (32 bits)
//! words        entries of four words; entry i lies at i modulo their number, a power of two
//! ```
//!
//! A consumer reads the entry at `head` first and claims it by moving `head` afterwards, as thieves
//! do in the deque of Chase and Lev: what it has read is worth nothing unless `head` was still
//! there. So the producer may use an entry again as soon as `head` is past it, and a consumer that is
//! stopped between the two blocks nobody.
//!
//! The producer begins at the front again when the ring is empty, in a new epoch, so that memory
//! for the worst case is not touched in all others.
//!
//! Deliberately absent: growing, and what an entry means (`tables`).

#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU64, Ordering};

/// Words of an entry.
pub const ENTRY: usize = 4;

/// Entries after which an empty ring begins at the front again.
const FRONT: u32 = if cfg!(loom) { 1 } else { 64 };

/// On cache lines of its own.
#[derive(Debug)]
#[repr(align(64))]
struct Padded(AtomicU64);

/// See the [module](self).
#[derive(Debug)]
pub struct Ring {
    head: Padded,
    tail: Padded,
    words: Box<[AtomicU64]>,
}

/// Where in the ring: ordered by epoch, then index.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place {
    epoch: u32,
    index: u32,
}

impl Place {
    const fn of(word: u64) -> Place {
        Place {
            epoch: (word >> 32) as u32,
            index: word as u32,
        }
    }

    const fn word(self) -> u64 {
        (self.epoch as u64) << 32 | self.index as u64
    }

    const fn next(self) -> Place {
        Place {
            epoch: self.epoch,
            index: self.index.wrapping_add(1),
        }
    }
}

impl Ring {
    /// An empty ring in words whose contents do not matter: [`ENTRY`] times a power of two of them.
    pub fn new(words: Box<[AtomicU64]>) -> Ring {
        assert!((words.len() / ENTRY).is_power_of_two() && words.len().is_multiple_of(ENTRY));
        Ring {
            head: Padded(AtomicU64::new(0)),
            tail: Padded(AtomicU64::new(0)),
            words,
        }
    }

    fn entry(&self, index: u32) -> &[AtomicU64; ENTRY] {
        let (entries, _) = self.words.as_chunks();
        &entries[index as usize & (entries.len() - 1)]
    }

    /// Entries in it. Exact for the producer while nobody consumes; else it was, or will be.
    #[inline]
    pub fn len(&self) -> usize {
        let head = Place::of(self.head.0.load(Ordering::Acquire));
        let tail = Place::of(self.tail.0.load(Ordering::Acquire));
        match head.epoch == tail.epoch {
            // A `head` that is ahead was read before the consumers reached `tail`.
            true => (tail.index.wrapping_sub(head.index) as i32).max(0) as usize,
            false => 0,
        }
    }

    /// Appends; false if it is full. One producer at a time.
    pub fn push(&self, entry: [u64; ENTRY]) -> bool {
        self.push_to(usize::MAX, entry)
    }

    /// The same if fewer than `depth` are there. What was consumed meanwhile may still be counted.
    #[inline]
    pub fn push_to(&self, depth: usize, entry: [u64; ENTRY]) -> bool {
        // Relaxed: written by producers only, and they hand over to each other by a lock.
        let mut tail = Place::of(self.tail.0.load(Ordering::Relaxed));
        // Acquire pairs with the consumers' claims: they have read what is written over here.
        let head = Place::of(self.head.0.load(Ordering::Acquire));
        let room = depth.min(self.words.len() / ENTRY);
        if tail.index.wrapping_sub(head.index) as usize >= room {
            return false;
        }
        if head == tail && tail.index >= FRONT {
            let front = Place {
                epoch: tail.epoch.wrapping_add(1),
                index: 0,
            };
            // Nobody claims from an empty ring, so this is the only write to `head`. A consumer that
            // has read the old one fails to claim. Release: it orders what is not there, but keeps
            // the chain of claims whole.
            self.head.0.swap(front.word(), Ordering::AcqRel);
            tail = front;
        }
        for (word, value) in self.entry(tail.index).iter().zip(entry) {
            word.store(value, Ordering::Relaxed);
        }
        // Release: whoever sees the new tail sees the entry.
        self.tail.0.store(tail.next().word(), Ordering::Release);
        true
    }

    /// The oldest entry, if there is one.
    #[inline]
    pub fn pop(&self) -> Option<[u64; ENTRY]> {
        self.pop_if(|_| true)
    }

    /// The oldest entry, if there is one and it is `wanted`.
    #[inline]
    pub fn pop_if(&self, wanted: impl Fn(&[u64; ENTRY]) -> bool) -> Option<[u64; ENTRY]> {
        let mut seen = self.head.0.load(Ordering::Acquire);
        loop {
            let head = Place::of(seen);
            let tail = Place::of(self.tail.0.load(Ordering::Acquire));
            if head.epoch != tail.epoch || head.index == tail.index {
                // Empty, or the producer has begun a new epoch since or is about to: look again.
                let now = self.head.0.load(Ordering::Acquire);
                if now == seen {
                    return None;
                }
                seen = now;
                continue;
            }
            let entry = self.peek(head.index);
            if !wanted(&entry) {
                // What has been read is only worth something if the entry is still there.
                let now = self.head.0.load(Ordering::Acquire);
                if now == seen {
                    return None;
                }
                seen = now;
                continue;
            }
            // Release: the entry is read before the producer sees that it may write there. Acquire:
            // so are those claimed before.
            let claimed = self.head.0.compare_exchange(
                seen,
                head.next().word(),
                Ordering::AcqRel,
                Ordering::Acquire,
            );
            match claimed {
                Ok(_) => return Some(entry),
                Err(now) => seen = now,
            }
        }
    }

    /// The first entries, as the producer last saw them: some may just have been consumed.
    #[inline]
    pub fn first(&self, count: usize) -> impl Iterator<Item = [u64; ENTRY]> {
        let head = Place::of(self.head.0.load(Ordering::Acquire));
        (0..count.min(self.len())).map(move |at| self.peek(head.index.wrapping_add(at as u32)))
    }

    /// Writes over one word of each entry that `is_meant`. A consumer that reads meanwhile has the old
    /// word or the new one; nobody's order changes. One producer at a time.
    pub fn mark(&self, word: usize, value: u64, is_meant: impl Fn(&[u64; ENTRY]) -> bool) {
        // Relaxed: as of `push`.
        let tail = Place::of(self.tail.0.load(Ordering::Relaxed));
        let mut at = Place::of(self.head.0.load(Ordering::Acquire));
        // Up to the tail, however many are consumed meanwhile: their entries are not used again yet.
        while at != tail {
            let index = at.index;
            at = at.next();
            if is_meant(&self.peek(index)) {
                // Relaxed: who must see it has been told by other means.
                self.entry(index)[word].store(value, Ordering::Relaxed);
            }
        }
    }

    fn peek(&self, index: u32) -> [u64; ENTRY] {
        let words = self.entry(index);
        // Relaxed: whether they belong together is found by claiming.
        std::array::from_fn(|at| words[at].load(Ordering::Relaxed))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn ring(entries: usize) -> Ring {
        Ring::new(
            (0..entries * ENTRY)
                .map(|_| AtomicU64::new(u64::MAX))
                .collect(),
        )
    }

    #[test]
    fn it_holds_as_many_as_it_has_room_for_in_order() {
        let ring = ring(4);
        let (mut next_in, mut next_out) = (0, 0);
        for round in 0..1000 {
            for _ in 0..round % 6 {
                let fits = next_in - next_out < 4;
                assert_eq!(ring.push([next_in; ENTRY]), fits);
                next_in += u64::from(fits);
                assert_eq!(ring.len() as u64, next_in - next_out);
            }
            for _ in 0..round % 5 {
                let expected = (next_out < next_in).then_some([next_out; ENTRY]);
                assert_eq!(ring.first(1).next(), expected);
                assert_eq!(ring.pop(), expected);
                next_out += u64::from(expected.is_some());
            }
        }
    }

    #[test]
    fn what_is_marked_stays_in_its_place() {
        let ring = ring(8);
        for value in 0..6 {
            assert!(ring.push([value; ENTRY]));
        }
        assert_eq!(ring.pop(), Some([0; ENTRY]));
        ring.mark(1, 77, |entry| entry[0] % 2 == 1);
        assert_eq!(ring.len(), 5);
        assert_eq!(ring.pop_if(|entry| entry[1] != 77), None);
        for value in 1..6 {
            let mut expected = [value; ENTRY];
            if value % 2 == 1 {
                expected[1] = 77;
            }
            assert_eq!(ring.pop_if(|entry| *entry == expected), Some(expected));
        }
        assert_eq!(ring.pop_if(|_| true), None);
    }

    #[test]
    fn what_is_seldom_full_stays_at_the_front() {
        let ring = ring(1024);
        for value in 0..10_000 {
            assert!(ring.push([value; ENTRY]));
            assert_eq!(ring.pop(), Some([value; ENTRY]));
        }
        let is_untouched = |word: &AtomicU64| word.load(Ordering::Relaxed) == u64::MAX;
        assert!(
            ring.words[FRONT as usize * ENTRY..]
                .iter()
                .all(is_untouched)
        );
    }
}

/// Explored by `ci/loom`.
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    fn ring(entries: usize) -> Arc<Ring> {
        let words = (0..entries * ENTRY).map(|_| AtomicU64::new(0)).collect();
        Arc::new(Ring::new(words))
    }

    fn take(ring: &Ring) -> Vec<u64> {
        let entries = std::iter::from_fn(|| ring.pop());
        let whole = |entry: [u64; ENTRY]| {
            assert!(entry.iter().all(|word| *word == entry[0]), "torn");
            entry[0]
        };
        entries.map(whole).collect()
    }

    /// Two consumers beside a producer that uses its entries again and begins anew: each entry
    /// is had once, whole, and by each consumer in order.
    #[test]
    fn entries_are_neither_lost_nor_torn_nor_doubled() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            let ring = ring(1);
            let consumers: Vec<_> = (0..2)
                .map(|_| {
                    let ring = ring.clone();
                    thread::spawn(move || take(&ring))
                })
                .collect();
            let mut pushed = Vec::new();
            for value in 1..=3 {
                if ring.push([value; ENTRY]) {
                    pushed.push(value);
                }
            }
            let mut had = Vec::new();
            for consumer in consumers {
                let of_one = consumer.join().unwrap();
                assert!(of_one.is_sorted());
                had.extend(of_one);
            }
            had.extend(take(&ring));
            had.sort_unstable();
            assert_eq!(had, pushed);
        });
    }

    /// A consumer beside a producer that marks the last entry: each is had once, in order, and who takes
    /// that one afterwards has it marked.
    #[test]
    fn marking_changes_nobodys_order() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            let ring = ring(4);
            for value in 1..=3 {
                assert!(ring.push([value; ENTRY]));
            }
            let consumer = {
                let ring = ring.clone();
                thread::spawn(move || {
                    let entries = std::iter::from_fn(|| ring.pop());
                    entries.collect::<Vec<_>>()
                })
            };
            ring.mark(1, 9, |entry| entry[0] == 3);
            let later: Vec<_> = std::iter::from_fn(|| ring.pop()).collect();
            let marked = [3, 9, 3, 3];
            assert!(later.iter().all(|entry| entry[0] != 3 || *entry == marked));
            let mut had = consumer.join().unwrap();
            assert!(had.is_sorted_by_key(|entry| entry[0]));
            had.extend(later);
            had.sort_unstable();
            assert_eq!(had[..2], [[1; ENTRY], [2; ENTRY]]);
            assert!(had[2] == [3; ENTRY] || had[2] == marked);
        });
    }
}
