//! Registered memory: what a queue pair may read and write, and who else may.
//!
//! Owns: every byte that leaves by a payload vector or is placed by a peer, and the keys to it.
//! Four kinds of region:
//!
//! * **private** ([`Region::Private`]): plain bytes that only the owning thread touches. No remote
//!   right can be given to them, so they can be lent as `&[u8]` and sent without a copy.
//! * **slabs** ([`Region::Slab`]): private bytes that are shared out, unchanged, once they have left
//!   the table: what a READ of ours fills.
//! * **lent** ([`Lent`]): bytes that nobody can change as long as they lie here, in pieces. One peer
//!   may READ them, nothing else, so they too are sent without a copy.
//! * **shared** ([`SharedMemory`]): what a peer may read or change at any time, and what other
//!   threads of this process may hold meanwhile. Never lent as `&[u8]`: bytes are copied in and out
//!   by atomic words, so a race yields old or new words and never undefined behaviour.
//!
//! Invariants: a key is an index and an 8-bit generation; after deregistration it never matches
//! again until the generation has wrapped. A key to something lent is a random number instead,
//! [`LENT_KEY_MIN`] or more, and works for one protection domain: one connection's. A remote access is checked for key, protection domain,
//! right and range before any byte moves, and a range is checked without overflow.
//!
//! Deliberately absent: pinning and page tables (the kernel copies for us), registration of memory
//! that somebody else owns (a raw layer for a C ABI will need that, with `unsafe` in its contract).
//!
//! Source: ibverbs' memory regions; Linux `rxe_mr.c` for the checks and the key layout.

mod lent;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use self::lent::LentTable;
pub use self::lent::{LENT_KEY_MIN, Lent, Piece};

/// Rights of a region. A private region has none of the remote ones.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Access {
    /// Receives and READ responses of this side may be placed here.
    pub local_write: bool,
    /// Peers may WRITE.
    pub remote_write: bool,
    /// Peers may READ.
    pub remote_read: bool,
    /// Peers may do atomics.
    pub remote_atomic: bool,
}

impl Access {
    /// Local reading and writing only.
    pub const LOCAL: Access = Access {
        local_write: true,
        remote_write: false,
        remote_read: false,
        remote_atomic: false,
    };
    /// Everything.
    pub const ALL: Access = Access {
        local_write: true,
        remote_write: true,
        remote_read: true,
        remote_atomic: true,
    };

    /// Whether all of `wanted` is among these rights.
    pub fn allows(self, wanted: Access) -> bool {
        (self.local_write || !wanted.local_write)
            && (self.remote_write || !wanted.remote_write)
            && (self.remote_read || !wanted.remote_read)
            && (self.remote_atomic || !wanted.remote_atomic)
    }

    fn is_remote(self) -> bool {
        self.remote_write || self.remote_read || self.remote_atomic
    }
}

/// Key of a region: 24 bits of index, 8 of generation. Local and remote key are the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key(pub u32);

impl Key {
    /// Index of the region it names, if it names one.
    pub fn region(self) -> u32 {
        self.0 >> 8
    }

    fn index(self) -> usize {
        (self.0 >> 8) as usize
    }

    fn generation(self) -> u8 {
        self.0 as u8
    }
}

/// A checked stretch of one region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Index of the region.
    pub region: u32,
    /// Offset of the first byte in it.
    pub offset: u64,
    /// Length in bytes.
    pub len: u32,
}

/// Why an access was refused. The wire knows only one code for all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum AccessError {
    /// No region has this key.
    UnknownKey,
    /// The region belongs to another protection domain.
    WrongDomain,
    /// The region does not give this right.
    NoRight,
    /// Part of the range lies outside the region.
    OutOfRange,
}

/// The bytes of a region.
#[derive(Debug)]
pub enum Region {
    /// Only the owning thread touches them.
    Private(Box<[u8]>),
    /// The same; nobody else has them until they leave the table.
    Slab(Arc<[u8]>),
    /// Peers and other threads may touch them.
    Shared(Arc<SharedMemory>),
}

#[derive(Debug)]
struct Entry {
    region: Option<Region>,
    generation: u8,
    domain: u32,
    access: Access,
}

/// All regions of one device.
#[derive(Debug, Default)]
pub struct Memory {
    entries: Vec<Entry>,
    free: Vec<u32>,
    lent: LentTable,
}

impl Memory {
    /// Regions a device may have.
    pub const REGIONS_MAX: usize = 1 << 20;

    /// Registers private memory of `len` zero bytes; none when the table is full.
    pub fn register_private(&mut self, domain: u32, len: usize) -> Option<Key> {
        let bytes = vec![0; len].into_boxed_slice();
        self.register(domain, Region::Private(bytes), Access::LOCAL)
    }

    /// Registers shared memory with rights for peers; none when the table is full.
    pub fn register_shared(
        &mut self,
        domain: u32,
        memory: Arc<SharedMemory>,
        access: Access,
    ) -> Option<Key> {
        self.register(domain, Region::Shared(memory), access)
    }

    fn register(&mut self, domain: u32, region: Region, access: Access) -> Option<Key> {
        assert!(!access.is_remote() || matches!(region, Region::Shared(_)));
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.entries.len() >= Self::REGIONS_MAX => return None,
            None => {
                let generation = 0;
                self.entries.push(Entry {
                    region: None,
                    generation,
                    domain,
                    access,
                });
                self.entries.len() as u32 - 1
            }
        };
        let entry = &mut self.entries[index as usize];
        *entry = Entry {
            region: Some(region),
            generation: entry.generation.wrapping_add(1),
            domain,
            access,
        };
        Some(Key(index << 8 | u32::from(entry.generation)))
    }

    /// Makes a key for private memory that is elsewhere for now; none when the table is full.
    pub fn reserve(&mut self, domain: u32) -> Option<Key> {
        let key = self.register(domain, Region::Private(Box::default()), Access::LOCAL)?;
        self.entries[key.index()].region = None;
        Some(key)
    }

    /// Puts private memory behind a key made by `reserve`.
    pub fn attach(&mut self, key: Key, bytes: Box<[u8]>) {
        let entry = &mut self.entries[key.index()];
        assert!(entry.generation == key.generation() && entry.region.is_none());
        entry.region = Some(Region::Private(bytes));
    }

    /// Takes private memory from behind a key made by `reserve`; the key stays reserved.
    pub fn detach(&mut self, key: Key) -> Option<Box<[u8]>> {
        let entry = self.entries.get_mut(key.index())?;
        if entry.generation != key.generation() {
            return None;
        }
        match entry.region.take()? {
            Region::Private(bytes) => Some(bytes),
            shared => {
                entry.region = Some(shared);
                None
            }
        }
    }

    /// Gives a reserved key up; whatever is behind it goes too.
    pub fn unreserve(&mut self, key: Key) {
        if let Some(entry) = self.entries.get_mut(key.index())
            && entry.generation == key.generation()
        {
            entry.region = None;
            // No later reservation has this generation.
            entry.generation = entry.generation.wrapping_add(1);
            self.free.push(key.index() as u32);
        }
    }

    /// Registers a slab to be filled; none when the table is full. Nobody else may have it.
    pub fn register_slab(&mut self, domain: u32, slab: Arc<[u8]>) -> Option<Key> {
        assert!(Arc::strong_count(&slab) == 1 && Arc::weak_count(&slab) == 0);
        self.register(domain, Region::Slab(slab), Access::LOCAL)
    }

    /// Lends bytes to the peer of `domain`, to be READ under `key`.
    ///
    /// # Errors
    /// The bytes again, if that is no key for a loan or is taken.
    pub fn lend(&mut self, domain: u32, key: Key, lent: Lent) -> Result<(), Lent> {
        self.lent.insert(domain, key, lent)
    }

    /// Ends a loan; its key is worthless from now on.
    pub fn take_back(&mut self, key: Key) -> Option<Lent> {
        self.lent.remove(key)
    }

    /// What a peer may do to its rights: give them up, on memory that is shared with its domain.
    ///
    /// # Errors
    /// As [`check`](Self::check); private memory is not the peer's to deregister.
    pub fn invalidate(&mut self, domain: u32, key: Key) -> Result<(), AccessError> {
        self.check(domain, key, 0, 0, Access::default())?;
        match self.entries.get(key.index()) {
            Some(entry) if entry.access.is_remote() => self
                .deregister(key)
                .map(drop)
                .ok_or(AccessError::UnknownKey),
            _ => Err(AccessError::NoRight),
        }
    }

    /// Takes a region out of service; its key is worthless from now on.
    pub fn deregister(&mut self, key: Key) -> Option<Region> {
        let entry = self.entries.get_mut(key.index())?;
        if entry.generation != key.generation() {
            return None;
        }
        let region = entry.region.take()?;
        self.free.push(key.index() as u32);
        Some(region)
    }

    /// Checks an access of `len` bytes at `offset` from the start of the region.
    ///
    /// # Errors
    /// The first check that failed, in the order of [`AccessError`].
    pub fn check(
        &self,
        domain: u32,
        key: Key,
        offset: u64,
        len: u32,
        wanted: Access,
    ) -> Result<Span, AccessError> {
        if key.0 >= LENT_KEY_MIN {
            return self.lent.check(domain, key, offset, len, wanted);
        }
        let entry = self
            .entries
            .get(key.index())
            .ok_or(AccessError::UnknownKey)?;
        let region = entry.region.as_ref().ok_or(AccessError::UnknownKey)?;
        if entry.generation != key.generation() {
            return Err(AccessError::UnknownKey);
        }
        if entry.domain != domain {
            return Err(AccessError::WrongDomain);
        }
        if !entry.access.allows(wanted) {
            return Err(AccessError::NoRight);
        }
        match offset.checked_add(u64::from(len)) {
            Some(end) if end <= region.len() as u64 => Ok(Span {
                region: key.index() as u32,
                offset,
                len,
            }),
            _ => Err(AccessError::OutOfRange),
        }
    }

    /// The bytes of a checked span, to send from; none where somebody may change them meanwhile,
    /// where they lie in several pieces, and of a departed region.
    pub fn stable(&self, span: Span) -> Option<&[u8]> {
        if span.region >= LENT_KEY_MIN {
            return self.lent.piece(span);
        }
        let bytes: &[u8] = match self.entries.get(span.region as usize)?.region.as_ref()? {
            Region::Private(bytes) => bytes,
            Region::Slab(bytes) => bytes,
            Region::Shared(_) => return None,
        };
        bytes.get(span.offset as usize..)?.get(..span.len as usize)
    }

    /// The bytes of a private region, to fill; none for any other.
    pub fn private_mut(&mut self, region: u32) -> Option<&mut [u8]> {
        match self.entries.get_mut(region as usize)?.region.as_mut()? {
            Region::Private(bytes) => Some(bytes),
            Region::Slab(_) | Region::Shared(_) => None,
        }
    }

    /// Copies `bytes` to the start of a checked span. Does nothing if the region has gone.
    pub fn place(&mut self, span: Span, bytes: &[u8]) {
        assert!(bytes.len() <= span.len as usize);
        let start = span.offset as usize;
        let entry = self.entries.get_mut(span.region as usize);
        match entry.and_then(|entry| entry.region.as_mut()) {
            Some(Region::Private(to)) => to[start..start + bytes.len()].copy_from_slice(bytes),
            Some(Region::Slab(to)) => {
                let to = Arc::get_mut(to).expect("nobody else has a slab that is registered");
                to[start..start + bytes.len()].copy_from_slice(bytes);
            }
            Some(Region::Shared(to)) => to.write(start, bytes),
            None => {}
        }
    }

    /// Copies a checked span out into `into`, which has its length. Zeroes if the region has gone.
    pub fn fetch(&self, span: Span, into: &mut [u8]) {
        assert_eq!(into.len(), span.len as usize);
        if span.region >= LENT_KEY_MIN {
            return self.lent.copy(span, into);
        }
        let start = span.offset as usize;
        let entry = self.entries.get(span.region as usize);
        match entry.and_then(|entry| entry.region.as_ref()) {
            Some(Region::Private(from)) => into.copy_from_slice(&from[start..start + into.len()]),
            Some(Region::Slab(from)) => into.copy_from_slice(&from[start..start + into.len()]),
            Some(Region::Shared(from)) => from.read(start, into),
            None => into.fill(0),
        }
    }

    /// The shared memory behind a checked span.
    pub fn shared(&self, span: Span) -> Option<&SharedMemory> {
        match self.entries.get(span.region as usize)?.region.as_ref()? {
            Region::Private(_) | Region::Slab(_) => None,
            Region::Shared(memory) => Some(memory),
        }
    }
}

impl Region {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        match self {
            Region::Private(bytes) => bytes.len(),
            Region::Slab(bytes) => bytes.len(),
            Region::Shared(memory) => memory.len(),
        }
    }

    /// Whether it has no byte at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Bytes that several threads and peers read and write at once, as whole atomic words.
///
/// A read during a write yields, for each aligned eight bytes, either all old or all new ones.
#[derive(Debug)]
pub struct SharedMemory {
    words: Box<[AtomicU64]>,
    len: usize,
}

impl SharedMemory {
    /// `len` zero bytes.
    pub fn new(len: usize) -> Arc<SharedMemory> {
        let words = (0..len.div_ceil(8)).map(|_| AtomicU64::new(0)).collect();
        Arc::new(SharedMemory { words, len })
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
        for (word, to) in self.words[at / 8..].iter().zip(&mut *words) {
            // Relaxed: the words carry no message but themselves; whoever needs an order gets it
            // from the completion queue.
            *to = word.load(Ordering::Relaxed).to_ne_bytes();
        }
        self.read_within(at + 8 * words.len(), tail);
    }

    /// Part of one word.
    fn read_within(&self, offset: usize, into: &mut [u8]) {
        if !into.is_empty() {
            let word = self.words[offset / 8].load(Ordering::Relaxed).to_ne_bytes();
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
        for (word, from) in self.words[at / 8..].iter().zip(words) {
            word.store(u64::from_ne_bytes(*from), Ordering::Relaxed);
        }
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
        let word = &self.words[offset / 8];
        let _ = word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, update);
    }

    /// Compares and swaps the aligned word at `offset`; returns what was there.
    pub fn compare_swap(&self, offset: usize, compare: u64, swap: u64) -> u64 {
        assert!(offset.is_multiple_of(8));
        let word = &self.words[offset / 8];
        // SeqCst: verbs promise no less between atomics of one device.
        match word.compare_exchange(compare, swap, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(old) | Err(old) => old,
        }
    }

    /// Replaces the aligned word at `offset`; returns what was there.
    pub fn swap(&self, offset: usize, value: u64) -> u64 {
        assert!(offset.is_multiple_of(8));
        self.words[offset / 8].swap(value, Ordering::SeqCst)
    }

    /// Adds to the aligned word at `offset`, wrapping; returns what was there.
    pub fn fetch_add(&self, offset: usize, addend: u64) -> u64 {
        assert!(offset.is_multiple_of(8));
        self.words[offset / 8].fetch_add(addend, Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_dies_with_its_region_and_does_not_fit_the_next_one() {
        let mut memory = Memory::default();
        let first = memory.register_private(1, 100).unwrap();
        assert!(memory.deregister(first).is_some());
        assert!(memory.deregister(first).is_none());
        let second = memory.register_private(1, 100).unwrap();
        assert_eq!(first.index(), second.index());
        let check = |key| memory.check(1, key, 0, 1, Access::LOCAL);
        assert_eq!(check(first), Err(AccessError::UnknownKey));
        assert!(check(second).is_ok());
    }

    #[test]
    fn every_check_refuses_what_it_should() {
        let mut memory = Memory::default();
        let access = Access {
            remote_read: true,
            ..Access::default()
        };
        let key = memory
            .register_shared(3, SharedMemory::new(100), access)
            .unwrap();
        let read = access;
        let write = Access {
            remote_write: true,
            ..Access::default()
        };
        let check =
            |domain, key, offset, len, wanted| memory.check(domain, key, offset, len, wanted);
        assert!(check(3, key, 0, 100, read).is_ok());
        assert!(check(3, key, 100, 0, read).is_ok());
        assert_eq!(
            check(3, Key(key.0 ^ 1), 0, 1, read),
            Err(AccessError::UnknownKey)
        );
        assert_eq!(
            check(3, Key(77 << 8), 0, 1, read),
            Err(AccessError::UnknownKey)
        );
        assert_eq!(check(4, key, 0, 1, read), Err(AccessError::WrongDomain));
        assert_eq!(check(3, key, 0, 1, write), Err(AccessError::NoRight));
        assert_eq!(check(3, key, 1, 100, read), Err(AccessError::OutOfRange));
        assert_eq!(
            check(3, key, u64::MAX, 2, read),
            Err(AccessError::OutOfRange)
        );
    }

    #[test]
    fn a_peer_invalidates_only_what_was_shared_with_it() {
        let mut memory = Memory::default();
        let private = memory.register_private(3, 100).unwrap();
        let shared = memory
            .register_shared(3, SharedMemory::new(100), Access::ALL)
            .unwrap();
        assert_eq!(memory.invalidate(3, private), Err(AccessError::NoRight));
        assert_eq!(memory.invalidate(4, shared), Err(AccessError::WrongDomain));
        assert!(memory.private_mut(private.region()).is_some());
        assert_eq!(memory.invalidate(3, shared), Ok(()));
        assert_eq!(memory.invalidate(3, shared), Err(AccessError::UnknownKey));
    }

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

    #[test]
    fn atomics_return_what_was_there() {
        let shared = SharedMemory::new(16);
        assert_eq!(shared.fetch_add(8, 5), 0);
        assert_eq!(shared.compare_swap(8, 4, 9), 5);
        assert_eq!(shared.compare_swap(8, 5, 9), 5);
        assert_eq!(shared.fetch_add(8, u64::MAX), 9);
        let mut out = [0; 8];
        shared.read(8, &mut out);
        assert_eq!(u64::from_ne_bytes(out), 8);
    }
}
