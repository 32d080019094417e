//! Messages that the peer READs: what is lent, to whom, and how much at once.
//!
//! Owns: the bound on everything lent by an endpoint ([`LoanPool`]), and what one connection has lent
//! ([`Loans`]). A loan lasts from the offer until the peer says that it has taken it, or until the
//! connection ends; its key works for that connection alone and for no longer (on
//! softroce; a device of libibverbs keeps keys, see `ibv::carrier`).
//!
//! Invariants: no more is lent than the pool's bound, no more to one connection than its share (so
//! that a few peers that have stopped reading cannot keep the rest from being served); a message
//! of any admitted length fits an empty share.
//!
//! Deliberately absent: the offer's way to the peer (`outbox`), and reading (`fetch`).

use std::collections::VecDeque;

use super::fabric::Registrar;
use super::parcel::Offer;
use super::{Limits, Violation};
use crate::memory::{Key, Lent, Piece};

/// Offers that one connection may have open.
pub(crate) const OFFERS_MAX: usize = 64;
/// One connection's share of the pool, in parts, unless the longest message is more.
const SHARES: usize = 4;
/// Bytes of buffers kept for the next messages that have to be copied.
const SPARE_BYTES_MAX: usize = 16 << 20;

/// What an endpoint has lent in all.
#[derive(Debug)]
pub(crate) struct LoanPool {
    bytes: usize,
    bytes_max: usize,
    bytes_peak: usize,
    share_max: usize,
    spare: Vec<Vec<u8>>,
    spare_bytes: usize,
    /// Lists of pieces for the next messages, empty.
    spare_lists: Vec<Lent>,
    /// Connections that were refused for want of room.
    pub(super) refused: VecDeque<u32>,
    /// Whether room has been freed since the refused ones were last told.
    is_freed: bool,
}

impl LoanPool {
    pub(crate) fn new(limits: &Limits) -> LoanPool {
        LoanPool {
            bytes: 0,
            bytes_max: limits.lent_max,
            bytes_peak: 0,
            share_max: limits.message_max.max(limits.lent_max / SHARES),
            spare: Vec::new(),
            spare_bytes: 0,
            spare_lists: Vec::new(),
            refused: VecDeque::new(),
            is_freed: false,
        }
    }

    /// Room has been freed: those who were refused want to be told.
    pub(super) fn note_freed(&mut self) {
        self.is_freed = true;
    }

    /// Whether they want to be told; not twice.
    pub(super) fn take_freed(&mut self) -> bool {
        std::mem::take(&mut self.is_freed) && !self.refused.is_empty()
    }

    /// The most that was ever lent at once, in bytes.
    pub(crate) fn bytes_peak(&self) -> usize {
        self.bytes_peak
    }

    /// Whether something is lent, which will come back.
    pub(crate) fn is_any_lent(&self) -> bool {
        self.bytes > 0
    }

    /// An empty buffer that has been in use, so that its pages are there.
    pub(crate) fn buffer(&mut self) -> Vec<u8> {
        let buffer = self.spare.pop().unwrap_or_default();
        self.spare_bytes -= buffer.capacity();
        buffer
    }

    /// A message of these pieces.
    pub(crate) fn message(&mut self, pieces: impl IntoIterator<Item = Piece>) -> Lent {
        let mut lent = self.spare_lists.pop().unwrap_or_default();
        lent.fill(pieces);
        lent
    }

    fn recycle(&mut self, mut lent: Lent) {
        for piece in lent.drain() {
            if let Piece::Owned(mut bytes) = piece
                && self.spare_bytes + bytes.capacity() <= SPARE_BYTES_MAX
            {
                bytes.clear();
                self.spare_bytes += bytes.capacity();
                self.spare.push(bytes);
            }
        }
        if self.spare_lists.len() < OFFERS_MAX {
            self.spare_lists.push(lent);
        }
    }
}

/// What one connection has lent, oldest first.
#[derive(Debug)]
pub(crate) struct Loans {
    domain: u32,
    open: VecDeque<(Key, usize)>,
    bytes: usize,
    /// Offers made, told, and taken so far, modulo 2^32.
    made: u32,
    told: u32,
    taken: u32,
}

impl Loans {
    /// Keys of these loans are good for `domain`, which nobody else may have.
    pub(crate) fn new(domain: u32) -> Loans {
        Loans {
            domain,
            open: VecDeque::new(),
            bytes: 0,
            made: 0,
            told: 0,
            taken: 0,
        }
    }

    /// Whether nothing is lent.
    pub(crate) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// The key of the loan made last.
    #[cfg(test)]
    pub(crate) fn newest_key(&self) -> Key {
        self.open.back().expect("something is lent").0
    }

    /// Whether a message of `len` bytes may be lent now.
    pub(crate) fn admits(&self, pool: &LoanPool, len: usize) -> bool {
        self.open.len() < OFFERS_MAX
            && self.bytes + len <= pool.share_max
            && pool.bytes + len <= pool.bytes_max
    }

    /// The same with half of the share empty, so that who was refused is not called for every
    /// single message that is taken.
    pub(crate) fn is_roomy(&self, pool: &LoanPool, len: usize) -> bool {
        self.admits(pool, len)
            && self.open.len() <= OFFERS_MAX / 2
            && (self.is_empty() || self.bytes + len <= pool.share_max / 2)
    }

    /// Lends an admitted message under a key, drawn from `draw` where keys may be chosen; returns
    /// the key and the offer to make.
    ///
    /// # Errors
    /// The message again, if it cannot be registered.
    pub(crate) fn lend(
        &mut self,
        pool: &mut LoanPool,
        memory: &mut dyn Registrar,
        draw: &mut dyn FnMut() -> u32,
        lent: Lent,
    ) -> Result<(Key, Offer), Lent> {
        let len = lent.len();
        assert!(self.admits(pool, len));
        let (key, address) = memory.lend_to(self.domain, draw, lent)?;
        self.open.push_back((key, len));
        self.bytes += len;
        pool.bytes += len;
        pool.bytes_peak = pool.bytes_peak.max(pool.bytes);
        let number = self.made;
        self.made = self.made.wrapping_add(1);
        Ok((key, Offer { address, number }))
    }

    /// An offer has been posted.
    pub(crate) fn note_told(&mut self) {
        self.told = self.told.wrapping_add(1);
    }

    /// The peer has taken so many offers in all. Returns whether that frees memory.
    ///
    /// # Errors
    /// [`Violation::Taken`] if it was not told of so many, or had taken more before.
    pub(crate) fn end_taken(
        &mut self,
        pool: &mut LoanPool,
        memory: &mut dyn Registrar,
        taken: u32,
    ) -> Result<bool, Violation> {
        let count = taken.wrapping_sub(self.taken);
        if count > self.told.wrapping_sub(self.taken) {
            return Err(Violation::Taken);
        }
        self.taken = taken;
        for _ in 0..count {
            self.end_oldest(pool, memory);
        }
        Ok(count > 0)
    }

    /// Ends the loan made last, of which the peer has not been told.
    pub(crate) fn end_newest(&mut self, pool: &mut LoanPool, memory: &mut dyn Registrar) -> Lent {
        self.made = self.made.wrapping_sub(1);
        let (key, len) = self.open.pop_back().expect("just made");
        self.end(pool, memory, key, len)
    }

    /// Ends everything; the queue pair must be gone.
    pub(crate) fn end_all(&mut self, pool: &mut LoanPool, memory: &mut dyn Registrar) {
        while !self.open.is_empty() {
            self.end_oldest(pool, memory);
        }
    }

    fn end_oldest(&mut self, pool: &mut LoanPool, memory: &mut dyn Registrar) {
        let (key, len) = self.open.pop_front().expect("as many as were made");
        let lent = self.end(pool, memory, key, len);
        pool.recycle(lent);
    }

    fn end(
        &mut self,
        pool: &mut LoanPool,
        memory: &mut dyn Registrar,
        key: Key,
        len: usize,
    ) -> Lent {
        let lent = memory.end_loan(key).expect("a loan lasts until it ends");
        self.bytes -= len;
        pool.bytes -= len;
        lent
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;

    fn limits(message_max: usize, lent_max: usize) -> Limits {
        Limits {
            message_max,
            lent_max,
            ..Limits::default()
        }
    }

    struct World {
        pool: LoanPool,
        memory: Memory,
        keys: u32,
    }

    impl World {
        fn lend(&mut self, loans: &mut Loans, len: usize) -> bool {
            if !loans.admits(&self.pool, len) {
                return false;
            }
            let (pool, memory) = (&mut self.pool, &mut self.memory);
            let lent = Lent::new([Piece::Owned(vec![1; len])]);
            let mut draw = || {
                self.keys += 1;
                0x8000_0000 + self.keys
            };
            loans.lend(pool, memory, &mut draw, lent).unwrap();
            loans.note_told();
            true
        }
    }

    fn world(limits: Limits) -> World {
        World {
            pool: LoanPool::new(&limits),
            memory: Memory::default(),
            keys: 0,
        }
    }

    #[test]
    fn the_pool_and_each_share_are_bounded_and_come_back() {
        let mut world = world(limits(100, 800));
        let mut connections: Vec<_> = (1..=5).map(Loans::new).collect();
        for loans in &mut connections[..4] {
            assert!(world.lend(loans, 100) && world.lend(loans, 100));
            assert!(!world.lend(loans, 1), "its share is 200");
        }
        assert!(!world.lend(&mut connections[4], 1), "the pool is 800");
        let World { pool, memory, .. } = &mut world;
        assert_eq!(connections[0].end_taken(pool, memory, 1), Ok(true));
        assert_eq!(connections[0].end_taken(pool, memory, 1), Ok(false));
        assert!(world.lend(&mut connections[4], 100));
        for loans in &mut connections {
            loans.end_all(&mut world.pool, &mut world.memory);
            assert!(loans.is_empty());
        }
        assert_eq!((world.pool.bytes, world.pool.bytes_peak()), (0, 800));
    }

    #[test]
    fn nothing_is_taken_that_was_not_offered_or_twice() {
        let mut world = world(limits(100, 800));
        let mut loans = Loans::new(1);
        assert!(world.lend(&mut loans, 10) && world.lend(&mut loans, 10));
        let World { pool, memory, .. } = &mut world;
        assert_eq!(loans.end_taken(pool, memory, 3), Err(Violation::Taken));
        assert_eq!(
            loans.end_taken(pool, memory, u32::MAX),
            Err(Violation::Taken)
        );
        assert_eq!(loans.end_taken(pool, memory, 2), Ok(true));
        assert_eq!(loans.end_taken(pool, memory, 1), Err(Violation::Taken));
        assert!(loans.is_empty());
    }

    #[test]
    fn a_message_of_the_longest_length_always_fits_an_empty_share() {
        let world = world(limits(500, 600));
        assert!(Loans::new(1).admits(&world.pool, 500));
    }

    #[test]
    fn offers_at_once_are_bounded_too() {
        let mut world = world(limits(100, 1 << 20));
        let mut loans = Loans::new(1);
        for _ in 0..OFFERS_MAX {
            assert!(world.lend(&mut loans, 1));
        }
        assert!(!world.lend(&mut loans, 1));
    }
}
