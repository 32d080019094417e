//! What is lent to one peer: bytes in pieces, READ by nobody else and changed by nobody at all.
//!
//! Owns: the loans and their keys. A key is random in 32 bits (nearly: none is in the smallest
//! sixteenth, nor the key of a region), and a key of one domain is worth nothing in another, so a peer
//! can neither guess nor pass on what it was not offered.
//!
//! Invariant: the length of a loan and the bytes in it never change. That is why pieces are slices
//! whose owner is here, not trait objects.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Range;
use std::sync::Arc;

use super::{Access, AccessError, Key, Span};

/// Loans have keys from here on, but for the last few; spans of regions have numbers below.
pub const LENT_KEY_MIN: u32 = 1 << 28;
/// From here on numbers have meanings of their own.
pub(super) const LENT_KEY_END: u32 = u32::MAX - 0xFF;

/// A stretch of immutable bytes.
#[derive(Debug, Clone)]
pub enum Piece {
    /// Part of what others hold too.
    Shared(Arc<[u8]>, Range<usize>),
    /// Given away.
    Owned(Vec<u8>),
}

impl Piece {
    /// Its bytes. A range beyond the bytes is empty.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Piece::Shared(bytes, range) => bytes.get(range.clone()).unwrap_or_default(),
            Piece::Owned(bytes) => bytes,
        }
    }
}

/// Pieces that are READ as one stretch of bytes.
#[derive(Debug, Default)]
pub struct Lent {
    pieces: Vec<Piece>,
    /// Offset behind each piece.
    ends: Vec<usize>,
}

impl Lent {
    /// The pieces, in order; empty ones are left out.
    pub fn new(pieces: impl IntoIterator<Item = Piece>) -> Lent {
        let mut lent = Lent::default();
        lent.fill(pieces);
        lent
    }

    /// The same, in the memory of one that was emptied.
    pub fn fill(&mut self, pieces: impl IntoIterator<Item = Piece>) {
        for piece in pieces {
            if !piece.bytes().is_empty() {
                self.ends.push(self.len() + piece.bytes().len());
                self.pieces.push(piece);
            }
        }
    }

    /// Takes the pieces out.
    pub fn drain(&mut self) -> impl Iterator<Item = Piece> {
        self.ends.clear();
        self.pieces.drain(..)
    }

    /// The pieces, in order.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Whether there is not one byte.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// The pieces again.
    pub fn into_pieces(self) -> Vec<Piece> {
        self.pieces
    }

    /// The piece in which `offset` lies, from there on.
    fn from(&self, offset: usize) -> Option<&[u8]> {
        let index = self.ends.partition_point(|end| *end <= offset);
        let piece = self.pieces.get(index)?.bytes();
        let start = self.ends[index] - piece.len();
        piece.get(offset - start..)
    }
}

#[derive(Debug)]
struct Loan {
    domain: u32,
    lent: Lent,
}

/// The keys are random already.
#[derive(Debug, Default)]
struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0 << 8 | u64::from(*byte);
        }
    }

    fn write_u32(&mut self, key: u32) {
        self.0 = u64::from(key) << 32 | u64::from(key);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// All loans of a device.
#[derive(Debug, Default)]
pub(super) struct LentTable {
    loans: HashMap<u32, Loan, BuildHasherDefault<KeyHasher>>,
}

impl LentTable {
    pub(super) fn insert(&mut self, domain: u32, key: Key, lent: Lent) -> Result<(), Lent> {
        if !(LENT_KEY_MIN..LENT_KEY_END).contains(&key.0) || self.loans.contains_key(&key.0) {
            return Err(lent);
        }
        self.loans.insert(key.0, Loan { domain, lent });
        Ok(())
    }

    pub(super) fn has(&self, key: Key) -> bool {
        self.loans.contains_key(&key.0)
    }

    pub(super) fn remove(&mut self, key: Key) -> Option<Lent> {
        self.loans.remove(&key.0).map(|loan| loan.lent)
    }

    /// As [`Memory::check`](super::Memory::check), with [bits](Access::bits) for rights.
    #[inline(never)] // or all checks would save registers for it
    pub(super) fn check(
        &self,
        domain: u32,
        key: Key,
        offset: u64,
        len: u32,
        wanted: u8,
    ) -> Result<Span, AccessError> {
        let loan = self.loans.get(&key.0).ok_or(AccessError::UnknownKey)?;
        if loan.domain != domain {
            return Err(AccessError::WrongDomain);
        }
        let read_only = Access {
            remote_read: true,
            ..Access::default()
        };
        if wanted & !read_only.bits() != 0 {
            return Err(AccessError::NoRight);
        }
        match offset.checked_add(u64::from(len)) {
            Some(end) if end <= loan.lent.len() as u64 => Ok(Span {
                region: key.0,
                offset,
                len,
            }),
            _ => Err(AccessError::OutOfRange),
        }
    }

    /// A checked span, if it lies in one piece.
    pub(super) fn piece(&self, span: Span) -> Option<&[u8]> {
        let loan = self.loans.get(&span.region)?;
        loan.lent
            .from(span.offset as usize)?
            .get(..span.len as usize)
    }

    /// Copies a checked span out; zeroes what has been taken back.
    pub(super) fn copy(&self, span: Span, into: &mut [u8]) {
        let mut at = span.offset as usize;
        let mut rest = into;
        let loan = self.loans.get(&span.region);
        while !rest.is_empty() {
            let Some(piece) = loan.and_then(|loan| loan.lent.from(at)) else {
                return rest.fill(0);
            };
            let (now, later) = rest.split_at_mut(rest.len().min(piece.len()));
            now.copy_from_slice(&piece[..now.len()]);
            at += now.len();
            rest = later;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Memory, SharedMemory};
    use super::*;

    const READ: Access = Access {
        local_write: false,
        remote_write: false,
        remote_read: true,
        remote_atomic: false,
        flush_global: false,
        window_bind: false,
    };

    fn lent(text: &[&str]) -> Lent {
        Lent::new(text.iter().map(|t| Piece::Owned(t.as_bytes().to_vec())))
    }

    #[test]
    fn pieces_are_read_as_one() {
        let mut memory = Memory::default();
        let key = Key(0x8000_0001);
        let shared: Arc<[u8]> = Arc::from(&b"-def-"[..]);
        let pieces = [
            Piece::Owned(b"abc".to_vec()),
            Piece::Owned(Vec::new()),
            Piece::Shared(shared, 1..4),
            Piece::Owned(b"ghij".to_vec()),
        ];
        memory.lend(5, key, Lent::new(pieces)).unwrap();
        let all = b"abcdefghij";
        for from in 0..=10 {
            for to in from..=10 {
                let len = (to - from) as u32;
                let span = memory.check(5, key, from as u64, len, READ).unwrap();
                let mut out = vec![0xEE; to - from];
                memory.fetch(span, &mut out).unwrap();
                assert_eq!(out, all[from..to]);
                if let Some(bytes) = memory.stable(span) {
                    assert_eq!(bytes, &all[from..to]);
                } else {
                    let is_split = [3, 6].iter().any(|cut| (from + 1..to).contains(cut));
                    assert!(is_split || from == 10, "{from}..{to} lies in one piece");
                }
            }
        }
    }

    #[test]
    fn a_loan_is_for_one_domain_for_reading_and_for_a_time() {
        let mut memory = Memory::default();
        let key = Key(0x9000_0000);
        memory.lend(5, key, lent(&["hello"])).unwrap();
        let check = |memory: &Memory, domain, offset, len, wanted| {
            memory.check(domain, key, offset, len, wanted)
        };
        let write = Access {
            remote_write: true,
            ..Access::default()
        };
        assert_eq!(check(&memory, 6, 0, 1, READ), Err(AccessError::WrongDomain));
        assert_eq!(check(&memory, 5, 0, 1, write), Err(AccessError::NoRight));
        assert_eq!(
            check(&memory, 5, 0, 1, Access::LOCAL),
            Err(AccessError::NoRight)
        );
        assert_eq!(check(&memory, 5, 0, 6, READ), Err(AccessError::OutOfRange));
        assert_eq!(
            check(&memory, 5, u64::MAX, 6, READ),
            Err(AccessError::OutOfRange)
        );
        assert_eq!(memory.invalidate(5, 0, key), Err(AccessError::UnknownKey));
        assert!(
            memory.lend(5, key, lent(&["again"])).is_err(),
            "it is taken"
        );
        assert!(
            memory.lend(5, Key(7), lent(&["low"])).is_err(),
            "no key of a loan"
        );
        assert!(memory.lend(5, Key(u32::MAX), lent(&["high"])).is_err());
        let span = check(&memory, 5, 0, 5, READ).unwrap();
        assert!(memory.take_back(key).is_some());
        assert!(memory.take_back(key).is_none());
        assert_eq!(check(&memory, 5, 0, 5, READ), Err(AccessError::UnknownKey));
        let mut out = [1; 5];
        memory.fetch(span, &mut out).unwrap();
        assert_eq!(out, [0; 5], "gone memory reads as zeroes");
    }

    #[test]
    fn no_region_has_the_key_of_a_loan() {
        let mut memory = Memory::default();
        let shared = memory.register_shared(1, SharedMemory::new(8), Access::ALL);
        let key = shared.unwrap();
        assert!(memory.lend(1, key, lent(&["taken"])).is_err());
        const { assert!(Memory::REGIONS_MAX as u64 <= LENT_KEY_MIN as u64) };
    }
}
