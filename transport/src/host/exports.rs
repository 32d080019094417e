//! What peers on this host may reach by themselves: queue pairs, regions, slabs.
//!
//! Owns: the shared table, in which a peer looks up what our own checks would say, and the slabs that
//! peers map. It is written by us under the device's lock and only read by peers.
//!
//! An entry is a guard word and what it guards. The guard is 0 while the entry changes or means
//! nothing, so a reader that sees the same guard before and after has read one entry.
//!
//! Out of service means out of reach: after a guard has been cleared, we wait for every peer that is
//! just reaching something here. A peer that has been stopped in the middle of that makes us wait
//! until it goes on or dies.
//!
//! Deliberately absent: windows, lent memory and everything beyond the table's size. A peer does not
//! find them here and asks our engine, which always judges for itself.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::Duration;

use super::note::{Link, Note, tell};
use super::ring::Receiver;
use super::segment::Segment;
use crate::memory::{Access, Key};

/// Queue pairs and regions in the table.
const QUEUE_PAIRS: usize = 1 << 15;
const REGIONS: usize = 1 << 16;
const QP_WORDS: usize = 2;
const REGION_WORDS: usize = 8;
const REGIONS_AT: usize = QUEUE_PAIRS * QP_WORDS;
/// Bytes of the table; pages that nobody writes take no memory.
pub(super) const TABLE_LEN: usize = 8 * (REGIONS_AT + REGIONS * REGION_WORDS);
/// Set in every guard.
const VALID: u64 = 1 << 40;
/// What in a queue pair's guard is not its rights.
const QP_NAME: u64 = VALID | 0xFFFF_FFFF;
/// Places that an entry may have, from the one that its number says on. One that finds none free is
/// not shown.
const TRIES: usize = 4;
/// How long between two looks at a peer that reaches something here.
const LOOK: Duration = Duration::from_micros(20);

/// A peer that reads our table.
#[derive(Debug)]
pub(crate) struct Reader {
    /// Its ring, in which it says that it is reaching something.
    pub(super) ring: Segment,
    pub(super) link: Link,
}

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Exports {
    table: Segment,
    readers: Vec<Arc<Reader>>,
    slabs: Vec<(Key, Arc<Segment>)>,
}

/// What a peer wants to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    Write,
    Read,
    Atomic,
}

/// What the table says of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Found {
    /// Offset of the range in the region.
    pub(crate) offset: u64,
    /// Address of the range in its process.
    pub(crate) address: u64,
    /// It is a slab, known under the region's key.
    pub(crate) is_slab: bool,
}

/// A queue pair as peers see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct QpEntry {
    /// Whether its peer may WRITE, READ, and do atomics.
    pub(crate) rights: [bool; 3],
    /// Protection domain of what its peer names.
    pub(crate) domain: u32,
}

fn bits(rights: [bool; 3]) -> u64 {
    rights
        .iter()
        .rev()
        .fold(0, |bits, right| bits << 1 | u64::from(*right))
}

impl Exports {
    pub(super) fn new() -> io::Result<Exports> {
        Ok(Exports {
            table: Segment::create(TABLE_LEN)?,
            readers: Vec::new(),
            slabs: Vec::new(),
        })
    }

    pub(super) fn table(&self) -> BorrowedFd<'_> {
        self.table.as_fd()
    }

    /// A peer from now on; it is told of all slabs.
    pub(super) fn add_reader(&mut self, reader: Arc<Reader>) {
        for (key, slab) in &self.slabs {
            // Who has not heard of a slab does not find it, and asks our engine.
            let _ = tell(&reader.link.socket, &Note::Slab(*key), &[slab.as_fd()]);
        }
        self.readers.push(reader);
    }

    pub(super) fn remove_reader(&mut self, reader: &Arc<Reader>) {
        self.readers.retain(|other| !Arc::ptr_eq(other, reader));
    }

    /// Shows the queue pair of this number, or hides it.
    pub(crate) fn show_qp(&mut self, qpn: u32, entry: Option<QpEntry>) {
        let words = self.table.words();
        let guard = |at: usize| words[at].load(Ordering::Relaxed);
        let shown = qp_places(qpn).find(|at| guard(*at) & QP_NAME == VALID | u64::from(qpn));
        if let Some(at) = shown {
            words[at].store(0, Ordering::Relaxed);
            self.wait_for_readers();
        }
        let free = qp_places(qpn).find(|at| guard(*at) == 0);
        if let (Some(entry), Some(at)) = (entry, free) {
            words[at + 1].store(entry.domain.into(), Ordering::Relaxed);
            // Release pairs with the Acquire in `grants`.
            let word = VALID | bits(entry.rights) << 32 | u64::from(qpn);
            words[at].store(word, Ordering::Release);
        }
    }

    /// Shows a region of `len` bytes at `address`, whose first byte is `base` for peers.
    pub(crate) fn show(
        &mut self,
        key: Key,
        domain: u32,
        access: Access,
        (base, address, len): (u64, u64, usize),
        slab: Option<&Arc<Segment>>,
    ) {
        let rights = [
            access.remote_write,
            access.remote_read,
            access.remote_atomic,
        ];
        let words = self.table.words();
        let free = region_places(key).find(|at| words[*at].load(Ordering::Relaxed) == 0);
        let Some(at) = free.filter(|_| rights != [false; 3]) else {
            return;
        };
        let words = &words[at..at + REGION_WORDS];
        let flags = bits(rights) << 32 | u64::from(slab.is_some()) << 40 | u64::from(domain);
        for (word, value) in words[1..].iter().zip([base, len as u64, address, flags]) {
            word.store(value, Ordering::Relaxed);
        }
        // Release pairs with the Acquire in `find`.
        words[0].store(VALID | u64::from(key.0), Ordering::Release);
        if let Some(slab) = slab {
            self.slabs.push((key, slab.clone()));
            for reader in &self.readers {
                let _ = tell(&reader.link.socket, &Note::Slab(key), &[slab.as_fd()]);
            }
        }
    }

    /// Hides a region again, and returns when no peer is in it.
    pub(crate) fn withdraw(&mut self, key: Key) {
        let words = self.table.words();
        let guard = |at: usize| words[at].load(Ordering::Relaxed);
        let shown = region_places(key).find(|at| guard(*at) == VALID | u64::from(key.0));
        let Some(at) = shown else { return };
        words[at].store(0, Ordering::Relaxed);
        self.wait_for_readers();
        let count = self.slabs.len();
        self.slabs.retain(|(slab, _)| *slab != key);
        if self.slabs.len() < count {
            for reader in &self.readers {
                // A peer that does not hear it keeps a mapping for as long as the connection.
                let _ = tell(&reader.link.socket, &Note::SlabGone(key), &[]);
            }
        }
    }

    /// Waits until nobody reaches what has been hidden.
    fn wait_for_readers(&self) {
        for reader in &self.readers {
            let words = reader.ring.words();
            let Some(reach) = Receiver::reach(words) else {
                continue;
            };
            while reach.lasts(words) && !reader.link.has_ended() {
                // Microseconds at most, and rare: not worth a wake-up by every peer at every access.
                std::thread::sleep(LOOK);
            }
        }
    }
}

/// Where in a table the guard of a queue pair may be.
fn qp_places(qpn: u32) -> impl Iterator<Item = usize> {
    (0..TRIES).map(move |i| (qpn as usize + i) % QUEUE_PAIRS * QP_WORDS)
}

/// Where in a table the guard of a region may be.
fn region_places(key: Key) -> impl Iterator<Item = usize> {
    // The low eight bits of a key are a window's to choose.
    let first = key.0 as usize >> 8;
    (0..TRIES).map(move |i| REGIONS_AT + (first + i) % REGIONS * REGION_WORDS)
}

/// Whether the queue pair `qpn` of a table's owner lets its peer do this; the protection domain that
/// it may do it in.
pub(crate) fn grants(table: &Segment, qpn: u32, wish: Wish) -> Option<u32> {
    let right = 1 << (32 + wish as u32);
    qp_places(qpn).find_map(|at| {
        let [guard, domain] = table.words().get(at..at + QP_WORDS)? else {
            return None;
        };
        let word = guard.load(Ordering::Acquire);
        let domain = domain.load(Ordering::Relaxed);
        let is_it = word & QP_NAME == VALID | u64::from(qpn) && word & right != 0;
        (is_it && unchanged(guard, word)).then_some(domain as u32)
    })
}

/// The range of a region of a table's owner, if the table allows this.
pub(crate) fn find(
    table: &Segment,
    key: Key,
    domain: u32,
    (va, len): (u64, usize),
    wish: Wish,
) -> Option<Found> {
    let name = VALID | u64::from(key.0);
    let words = table.words();
    let at = region_places(key)
        .find(|at| words.get(*at).map(|guard| guard.load(Ordering::Acquire)) == Some(name))?;
    let [guard, base, size, address, flags, ..] = words.get(at..at + REGION_WORDS)? else {
        return None;
    };
    let word = guard.load(Ordering::Acquire);
    let [base, size, address, flags] =
        [base, size, address, flags].map(|word| word.load(Ordering::Relaxed));
    let is_granted = flags & 1 << (32 + wish as u32) != 0 && flags as u32 == domain;
    if word != name || !unchanged(guard, word) || !is_granted {
        return None;
    }
    let offset = va.wrapping_sub(base);
    let end = offset.checked_add(len as u64)?;
    (end <= size).then_some(Found {
        offset,
        address: address.wrapping_add(offset),
        is_slab: flags & 1 << 40 != 0,
    })
}

/// Whether a guard is still the same after what it guards has been read.
fn unchanged(guard: &AtomicU64, word: u64) -> bool {
    // Acquire: what was read before is not read after.
    fence(Ordering::Acquire);
    guard.load(Ordering::Relaxed) == word
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_what_our_own_checks_would() {
        let mut exports = Exports::new().unwrap();
        let key = Key(5 << 8 | 3);
        let access = Access {
            remote_write: true,
            remote_atomic: true,
            ..Access::default()
        };
        exports.show(key, 9, access, (0x1000, 0x7000, 100), None);
        let table = Segment::adopt(exports.table().try_clone_to_owned().unwrap(), 8).unwrap();
        let ask = |key, domain, va, len, wish| find(&table, key, domain, (va, len), wish);
        let found = ask(key, 9, 0x1004, 96, Wish::Write).unwrap();
        assert_eq!(
            (found.offset, found.address, found.is_slab),
            (4, 0x7004, false)
        );
        assert!(ask(key, 9, 0x1000, 100, Wish::Atomic).is_some());
        for (key, domain, va, len, wish) in [
            (key, 9, 0x1000, 100, Wish::Read),
            (key, 8, 0x1000, 100, Wish::Write),
            (Key(key.0 ^ 1), 9, 0x1000, 100, Wish::Write),
            (Key(u32::MAX), 9, 0x1000, 100, Wish::Write),
            (key, 9, 0x1001, 100, Wish::Write),
            (key, 9, 0xFFF, 1, Wish::Write),
            (key, 9, u64::MAX, 2, Wish::Write),
            (key, 9, 0x1000, usize::MAX, Wish::Write),
        ] {
            assert_eq!(ask(key, domain, va, len, wish), None);
        }
        exports.withdraw(Key(key.0 ^ 1));
        assert!(ask(key, 9, 0x1000, 1, Wish::Write).is_some());
        exports.withdraw(key);
        assert_eq!(ask(key, 9, 0x1000, 1, Wish::Write), None);

        let entry = |domain| QpEntry {
            rights: [true, false, true],
            domain,
        };
        let granted = |qpn, wish| grants(&table, qpn, wish);
        // All of them want the same place, and there are four.
        let qpns: Vec<u32> = (0..5).map(|i| 0x17 + i * QUEUE_PAIRS as u32).collect();
        for (domain, qpn) in (4..).zip(&qpns) {
            exports.show_qp(*qpn, Some(entry(domain)));
        }
        for (domain, qpn) in (4..8).zip(&qpns) {
            assert_eq!(granted(*qpn, Wish::Write), Some(domain));
            assert_eq!(granted(*qpn, Wish::Atomic), Some(domain));
            assert_eq!(granted(*qpn, Wish::Read), None);
        }
        assert_eq!(granted(qpns[4], Wish::Write), None);
        exports.show_qp(qpns[1], None);
        exports.show_qp(qpns[2], Some(entry(9)));
        assert_eq!(granted(qpns[1], Wish::Write), None);
        assert_eq!(granted(qpns[2], Wish::Write), Some(9));
        assert_eq!(granted(0x18, Wish::Write), None);
    }

    #[test]
    fn a_table_full_of_rubbish_is_read_without_harm() {
        let table = Segment::create(TABLE_LEN).unwrap();
        for (i, word) in table.words().iter().enumerate().take(4096) {
            word.store(
                (i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15),
                Ordering::Relaxed,
            );
        }
        for index in 0..2048 {
            grants(&table, index, Wish::Read);
        }
        let at = REGIONS_AT + 3 * REGION_WORDS;
        for (i, value) in [VALID | 3 << 8, 0, u64::MAX, u64::MAX, 7 << 32]
            .into_iter()
            .enumerate()
        {
            table.words()[at + i].store(value, Ordering::Relaxed);
        }
        let found = find(&table, Key(3 << 8), 0, (8, 8), Wish::Read).unwrap();
        assert_eq!(found.address, 7, "it wraps; the kernel judges the address");
    }
}
