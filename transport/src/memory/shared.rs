//! Memory of our own that peers and other threads may touch at any time, in atomic words.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lowtide_transport_proto::qp::AtomicOp;

use super::{AccessError, wide, zeroed_words};
use crate::host::{self, Segment};

/// Bytes that several threads and peers read and write at once, as whole atomic words.
///
/// A read during a write yields, for each aligned eight bytes, either all old or all new ones.
#[derive(Debug)]
pub struct SharedMemory {
    words: Words,
    len: usize,
}

#[derive(Debug)]
enum Words {
    /// Of this process.
    Own(Box<[AtomicU64]>),
    /// That peers on this host may map.
    Mapped(Arc<Segment>),
}

impl SharedMemory {
    /// `len` zero bytes.
    pub fn new(len: usize) -> Arc<SharedMemory> {
        Arc::new(SharedMemory {
            words: Words::Own(zeroed_words(len.div_ceil(8))),
            len,
        })
    }

    /// `len` zero bytes that peers on this host may map.
    ///
    /// # Errors
    /// The system has no file descriptor or no memory.
    pub(crate) fn mapped(len: usize) -> io::Result<Arc<SharedMemory>> {
        let segment = Arc::new(Segment::create(len)?);
        Ok(Arc::new(SharedMemory {
            words: Words::Mapped(segment),
            len,
        }))
    }

    fn words(&self) -> &[AtomicU64] {
        match &self.words {
            Words::Own(words) => words,
            Words::Mapped(segment) => segment.words(),
        }
    }

    /// What peers on this host may map of it.
    pub(crate) fn segment(&self) -> Option<&Arc<Segment>> {
        match &self.words {
            Words::Own(_) => None,
            Words::Mapped(segment) => Some(segment),
        }
    }

    /// Address of its first byte in this process.
    pub(crate) fn address(&self) -> u64 {
        self.words().as_ptr().expose_provenance() as u64
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no byte at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies bytes out from `offset` on. Panics outside the region.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        assert!(offset <= self.len && into.len() <= self.len - offset);
        let (head, rest) = into.split_at_mut(into.len().min(offset.wrapping_neg() % 8));
        self.read_within(offset, head);
        let at = offset + head.len();
        let (words, tail) = rest.as_chunks_mut();
        wide::load(&self.words()[at / 8..], words);
        self.read_within(at + 8 * words.len(), tail);
    }

    /// Part of one word.
    fn read_within(&self, offset: usize, into: &mut [u8]) {
        if !into.is_empty() {
            let word = self.words()[offset / 8]
                .load(Ordering::Relaxed)
                .to_ne_bytes();
            into.copy_from_slice(&word[offset % 8..][..into.len()]);
        }
    }

    /// Copies bytes in from `offset` on. Panics outside the region.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset <= self.len && bytes.len() <= self.len - offset);
        let (head, rest) = bytes.split_at(bytes.len().min(offset.wrapping_neg() % 8));
        self.write_within(offset, head);
        let at = offset + head.len();
        let (words, tail) = rest.as_chunks();
        wide::store(&self.words()[at / 8..], words);
        self.write_within(at + 8 * words.len(), tail);
    }

    /// Part of one word: neighbours may change it at the same time.
    fn write_within(&self, offset: usize, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let update = |old: u64| {
            let mut whole = old.to_ne_bytes();
            whole[offset % 8..][..bytes.len()].copy_from_slice(bytes);
            Some(u64::from_ne_bytes(whole))
        };
        let word = &self.words()[offset / 8];
        let _ = word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, update);
    }

    /// Performs `op` on the word at `offset` and returns what was there.
    ///
    /// # Errors
    /// [`AccessError::Unaligned`] if `offset` is no multiple of eight.
    pub fn atomic(&self, offset: usize, op: AtomicOp) -> Result<u64, AccessError> {
        if !offset.is_multiple_of(8) {
            return Err(AccessError::Unaligned);
        }
        let word = &self.words()[offset / 8];
        Ok(host::atomic(word, op))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_bytes_are_those_of_a_plain_array_at_any_alignment() {
        let shared = SharedMemory::new(64);
        let mut plain = [0u8; 64];
        for (round, (offset, len)) in (0..64)
            .flat_map(|o| (0..=64 - o).map(move |l| (o, l)))
            .enumerate()
        {
            let bytes: Vec<u8> = (0..len).map(|i| (round * 31 + i * 7) as u8).collect();
            shared.write(offset, &bytes);
            plain[offset..offset + len].copy_from_slice(&bytes);
            let mut out = vec![0; len];
            shared.read(offset, &mut out);
            assert_eq!(out, bytes);
        }
        let mut out = [0; 64];
        shared.read(0, &mut out);
        assert_eq!(out, plain);
    }

    /// Long enough for whole lines, at every place in them and of every length after them.
    #[test]
    fn long_pieces_are_those_of_a_plain_array_and_leave_their_neighbours_alone() {
        const LEN: usize = 4096;
        let shared = SharedMemory::new(LEN);
        let mut plain = vec![0u8; LEN];
        let bytes: Vec<u8> = (0..LEN as u32).map(|i| (i * i / 7) as u8).collect();
        for offset in 0..80 {
            for len in (60..260).chain(1000..1100).chain([LEN - offset]) {
                let from = &bytes[len % 61..][..len.min(LEN - 61)];
                shared.write(offset, from);
                plain[offset..][..from.len()].copy_from_slice(from);
                let mut out = vec![0; LEN - 3];
                shared.read(3, &mut out);
                assert_eq!(out, plain[3..], "{len} bytes at {offset}");
            }
        }
    }

    /// One thread stores pieces of words that are all alike, others look: each word is of one piece, and
    /// none is older than the one behind it, where the processor keeps the order of stores and of loads.
    #[test]
    fn whoever_looks_meanwhile_sees_whole_words_and_the_last_ones_last() {
        const WORDS: usize = 256;
        const ROUNDS: u64 = 20_000;
        let shared = SharedMemory::new(8 * WORDS);
        std::thread::scope(|scope| {
            let looker = scope.spawn(|| {
                let mut seen = 0;
                while seen != ROUNDS {
                    let mut later = u64::MAX;
                    for index in (0..WORDS).rev() {
                        let mut word = [0; 8];
                        shared.read(8 * index, &mut word);
                        let round = u64::from_ne_bytes(word);
                        assert_eq!(round >> 32, round & u64::from(u32::MAX), "half a word");
                        let round = round >> 32;
                        if cfg!(target_arch = "x86_64") && later != u64::MAX {
                            assert!(round >= later, "word {index} is older than the next");
                        }
                        later = round;
                        seen = if index == WORDS - 1 { round } else { seen };
                    }
                }
            });
            for round in 1..=ROUNDS {
                let word = (round << 32 | round).to_ne_bytes();
                shared.write(0, &word.repeat(WORDS));
            }
            looker.join().unwrap();
        });
    }

    #[test]
    fn atomics_return_what_was_there() {
        let shared = SharedMemory::new(16);
        let add = |add| AtomicOp::FetchAdd { add };
        let swap = |compare, swap| AtomicOp::CompareSwap { compare, swap };
        let value = 17u64.to_ne_bytes();
        let ops = [
            (add(5), 0),
            (swap(4, 9), 5),
            (swap(5, 9), 5),
            (add(u64::MAX), 9),
            (AtomicOp::Write { value }, 8),
        ];
        for (op, old) in ops {
            assert_eq!(shared.atomic(8, op), Ok(old));
        }
        let mut out = [0; 8];
        shared.read(8, &mut out);
        assert_eq!(out, value);
        assert_eq!(shared.atomic(4, add(1)), Err(AccessError::Unaligned));
    }
}
