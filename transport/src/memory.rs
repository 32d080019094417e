//! Registered memory: what a queue pair may read and write, and who else may.
//!
//! Owns: every byte that leaves by a payload vector or is placed by a peer, and the keys to it.
//! Five kinds of region:
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
//! * **foreign** ([`Foreign`]): what the program registered where it lies. It may be unmapped at any
//!   time, so only the kernel touches it for us, and an access to what is gone fails.
//!
//! A memory window is a key of its own to part of a shared or foreign region.
//!
//! Invariants: a key is an index and an 8-bit generation; after deregistration it never matches
//! again until the generation has wrapped. A key to something lent is a random number instead,
//! [`LENT_KEY_MIN`] or more, and works for one protection domain: one connection's. A remote access is checked for key, protection domain,
//! right and range before any byte moves, and a range is checked without overflow.
//!
//! Deliberately absent: pinning and page tables (the kernel copies for us).
//!
//! Source: ibverbs' memory regions; Linux `rxe_mr.c` for the checks and the key layout.

#[allow(unsafe_code)] // copies by the kernel, and the probe of what is registered
mod foreign;
mod lent;
mod shared;
mod shown;
#[allow(unsafe_code)] // vectors of words
mod wide;
mod window;
#[allow(unsafe_code)] // words of memory that is zero
mod zeroed;

use std::io;
use std::sync::Arc;

use lowtide_transport_proto::qp::AtomicOp;

use self::foreign::Bounce;
pub use self::foreign::Foreign;
use self::lent::{LENT_KEY_END, LentTable};
pub use self::lent::{LENT_KEY_MIN, Lent, Piece};
pub use self::shared::SharedMemory;
use self::window::Window;
pub use self::window::{WindowKind, WindowPlace};
pub(crate) use self::zeroed::zeroed_words;
use crate::host::Exports;
use crate::names::{Names, Random};

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
    /// Peers may FLUSH for visibility.
    pub flush_global: bool,
    /// Memory windows may be bound here.
    pub window_bind: bool,
}

impl Access {
    /// Local reading and writing only.
    pub const LOCAL: Access = Access {
        local_write: true,
        remote_write: false,
        remote_read: false,
        remote_atomic: false,
        flush_global: false,
        window_bind: false,
    };
    /// Everything.
    pub const ALL: Access = Access {
        local_write: true,
        remote_write: true,
        remote_read: true,
        remote_atomic: true,
        flush_global: true,
        window_bind: true,
    };

    /// Whether all of `wanted` is among these rights.
    pub fn allows(self, wanted: Access) -> bool {
        wanted.bits() & !self.bits() == 0
    }

    /// One bit per right: several are compared at once.
    #[inline]
    const fn bits(self) -> u8 {
        self.local_write as u8
            | (self.remote_write as u8) << 1
            | (self.remote_read as u8) << 2
            | (self.remote_atomic as u8) << 3
            | (self.flush_global as u8) << 4
            | (self.window_bind as u8) << 5
    }

    fn is_remote(self) -> bool {
        self.remote_write || self.remote_read || self.remote_atomic || self.flush_global
    }
}

/// Key of a region, random in all bits. Local and remote key are the same number. The low eight bits
/// are a window's owner's to choose; the others name the region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key(pub u32);

impl Key {
    fn name(self) -> u32 {
        self.0 >> 8
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
    /// The memory has been unmapped, or is less accessible than it was when registered.
    Gone,
    /// An atomic's address is no multiple of eight.
    Unaligned,
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
    /// They are the program's.
    Foreign(Foreign),
    /// They are part of another region.
    Window(Window),
}

#[derive(Debug)]
struct Entry {
    region: Option<Region>,
    key: Key,
    domain: u32,
    access: Access,
    /// The same.
    rights: u8,
    /// The address of the first byte, as work requests and peers name it.
    base: u64,
    /// Windows bound here.
    windows: u32,
}

/// All regions of one device.
#[derive(Debug, Default)]
pub struct Memory {
    entries: Vec<Entry>,
    free: Vec<u32>,
    /// From keys to entries.
    names: Names,
    random: Random,
    lent: LentTable,
    /// Made with the first foreign region.
    bounce: Option<Bounce>,
    /// What peers on this host are shown of it.
    pub(crate) exports: Option<Exports>,
}

impl Memory {
    /// Regions a device may have.
    pub const REGIONS_MAX: usize = 1 << 20;

    /// Keys that are in use, but for those to something lent.
    #[cfg(test)]
    pub(crate) fn keys(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    /// No region yet; keys are drawn from `random`.
    pub(crate) fn new(random: Random) -> Memory {
        Memory {
            random,
            ..Memory::default()
        }
    }

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
        self.register_shared_at(domain, memory, 0, access)
    }

    /// The same, so that its first byte has the address `base` for work requests and peers.
    pub fn register_shared_at(
        &mut self,
        domain: u32,
        memory: Arc<SharedMemory>,
        base: u64,
        access: Access,
    ) -> Option<Key> {
        let key = self.register(domain, Region::Shared(memory), access)?;
        let index = self.index(key)?;
        self.entries[index].base = base;
        self.show(key, index);
        Some(key)
    }

    fn register(&mut self, domain: u32, region: Region, access: Access) -> Option<Key> {
        assert!(!access.is_remote() || matches!(region, Region::Shared(_) | Region::Foreign(_)));
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.entries.len() >= Self::REGIONS_MAX => return None,
            None => {
                self.entries.push(Entry {
                    region: None,
                    key: Key(0),
                    domain,
                    access,
                    rights: 0,
                    base: 0,
                    windows: 0,
                });
                self.entries.len() as u32 - 1
            }
        };
        let low = self.random.draw() as u32 & 0xFF;
        let lent = &self.lent;
        // 0 is what forgetful programs say; the last few numbers have meanings of their own.
        let admits =
            |name| (1..LENT_KEY_END >> 8).contains(&name) && !lent.has(Key(name << 8 | low));
        let name = self.names.insert(index, &mut self.random, admits);
        let key = Key(name << 8 | low);
        self.entries[index as usize] = Entry {
            region: Some(region),
            key,
            domain,
            access,
            rights: access.bits(),
            base: 0,
            windows: 0,
        };
        Some(key)
    }

    /// The place of a key that was given out and not taken back.
    #[inline]
    fn index(&self, key: Key) -> Option<usize> {
        let index = self.names.find(key.name())? as usize;
        (self.entries[index].key == key).then_some(index)
    }

    /// Forgets a key.
    fn release(&mut self, index: usize) {
        self.names.remove(self.entries[index].key.name());
        self.free.push(index as u32);
    }

    /// Makes a key for private memory that is elsewhere for now; none when the table is full.
    pub fn reserve(&mut self, domain: u32) -> Option<Key> {
        let key = self.register(domain, Region::Private(Box::default()), Access::LOCAL)?;
        let index = self.index(key)?;
        self.entries[index].region = None;
        Some(key)
    }

    /// Puts private memory behind a key made by `reserve`.
    pub fn attach(&mut self, key: Key, bytes: Box<[u8]>) {
        let index = self.index(key).expect("a reserved key");
        let entry = &mut self.entries[index];
        assert!(entry.region.is_none());
        entry.region = Some(Region::Private(bytes));
    }

    /// Takes private memory from behind a key made by `reserve`; the key stays reserved.
    pub fn detach(&mut self, key: Key) -> Option<Box<[u8]>> {
        let index = self.index(key)?;
        let entry = &mut self.entries[index];
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
        if let Some(index) = self.index(key) {
            self.entries[index].region = None;
            self.release(index);
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
        if self.names.find(key.name()).is_some() {
            return Err(lent);
        }
        self.lent.insert(domain, key, lent)
    }

    /// Ends a loan; its key is worthless from now on.
    pub fn take_back(&mut self, key: Key) -> Option<Lent> {
        self.lent.remove(key)
    }

    /// Registers memory where it lies, so that its first byte has the address `base` for work
    /// requests and peers; none when the table is full.
    ///
    /// # Errors
    /// `OutOfMemory` or whatever else keeps the system from making a buffer to copy through.
    pub fn register_foreign(
        &mut self,
        domain: u32,
        foreign: Foreign,
        base: u64,
        access: Access,
    ) -> io::Result<Option<Key>> {
        if self.bounce.is_none() {
            self.bounce = Some(Bounce::new()?);
        }
        let key = self.register(domain, Region::Foreign(foreign), access);
        if let Some(key) = key
            && let Some(index) = self.index(key)
        {
            self.entries[index].base = base;
            self.show(key, index);
        }
        Ok(key)
    }

    /// What a peer may do to its rights: give them up, on memory that is shared with its domain.
    ///
    /// # Errors
    /// As [`check`](Self::check); private memory is not the peer's to deregister.
    pub fn invalidate(&mut self, domain: u32, qp: u32, key: Key) -> Result<(), AccessError> {
        let (_, entry) = self.entry(domain, key)?;
        match entry.region {
            Some(Region::Window(_)) => self.unbind(qp, key),
            Some(Region::Shared(_)) if entry.access.is_remote() => self
                .deregister(key)
                .map(drop)
                .ok_or(AccessError::UnknownKey),
            _ => Err(AccessError::NoRight),
        }
    }

    /// The live entry of a key, and its place.
    #[inline]
    fn entry(&self, domain: u32, key: Key) -> Result<(u32, &Entry), AccessError> {
        let index = self.index(key).ok_or(AccessError::UnknownKey)?;
        let entry = &self.entries[index];
        if entry.region.is_none() {
            Err(AccessError::UnknownKey)
        } else if entry.domain == domain {
            Ok((index as u32, entry))
        } else {
            Err(AccessError::WrongDomain)
        }
    }

    /// Whether the peer of queue pair `qp` may FLUSH the region or window of this key.
    pub fn grants_flush(&self, domain: u32, qp: u32, key: Key) -> bool {
        let Ok((_, entry)) = self.entry(domain, key) else {
            return false;
        };
        entry.access.flush_global
            && match &entry.region {
                Some(Region::Window(window)) => window.place(Some(qp)).is_some(),
                _ => true,
            }
    }

    /// Takes a region out of service; its key is worthless from now on.
    pub fn deregister(&mut self, key: Key) -> Option<Region> {
        let index = self.index(key)?;
        let region = self.entries[index].region.take()?;
        self.release(index);
        if let Some(exports) = &mut self.exports {
            exports.withdraw(key);
        }
        Some(region)
    }

    /// Checks an access of our own to `len` bytes at address `va` of the region.
    ///
    /// # Errors
    /// The first check that failed, in the order of [`AccessError`].
    #[inline]
    pub fn check(
        &self,
        domain: u32,
        key: Key,
        va: u64,
        len: u32,
        wanted: Access,
    ) -> Result<Span, AccessError> {
        self.check_for(domain, None, key, (va, len), wanted.bits())
    }

    /// The same for the peer of a queue pair: it may also use windows.
    ///
    /// # Errors
    /// As `check`.
    #[inline]
    pub fn check_peer(
        &self,
        domain: u32,
        qp: u32,
        key: Key,
        va: u64,
        len: u32,
        wanted: Access,
    ) -> Result<Span, AccessError> {
        self.check_for(domain, Some(qp), key, (va, len), wanted.bits())
    }

    fn check_for(
        &self,
        domain: u32,
        peer_of: Option<u32>,
        key: Key,
        (va, len): (u64, u32),
        wanted: u8,
    ) -> Result<Span, AccessError> {
        let (index, entry) = match self.entry(domain, key) {
            Err(AccessError::UnknownKey) if key.0 >= LENT_KEY_MIN => {
                return self.lent.check(domain, key, va, len, wanted);
            }
            found => found?,
        };
        let (region, start, size) = match entry.region.as_ref() {
            None => return Err(AccessError::UnknownKey),
            Some(Region::Window(window)) => self.window(domain, peer_of, window)?,
            Some(region) => (index, 0, region.len() as u64),
        };
        if wanted & !entry.rights != 0 {
            return Err(AccessError::NoRight);
        }
        // An address below the base wraps to one that is far too high.
        let offset = va.wrapping_sub(entry.base);
        match offset.checked_add(u64::from(len)) {
            Some(end) if end <= size => Ok(Span {
                region,
                offset: start + offset,
                len,
            }),
            _ => Err(AccessError::OutOfRange),
        }
    }

    /// The region that a window is part of, and which part.
    #[inline(never)] // as `LentTable::check`
    fn window(
        &self,
        domain: u32,
        peer_of: Option<u32>,
        window: &Window,
    ) -> Result<(u32, u64, u64), AccessError> {
        let place = window.place(peer_of).ok_or(AccessError::UnknownKey)?;
        // Its region may have been deregistered, and another may have its index.
        let (region, _) = self.entry(domain, place.region)?;
        Ok((region, place.offset, place.len))
    }

    /// The bytes of a checked span, to send from; none where somebody may change them meanwhile,
    /// where they lie in several pieces, and of a departed region.
    #[inline]
    pub fn stable(&self, span: Span) -> Option<&[u8]> {
        if span.region >= LENT_KEY_MIN {
            return self.lent.piece(span);
        }
        let bytes: &[u8] = match self.entries.get(span.region as usize)?.region.as_ref()? {
            Region::Private(bytes) => bytes,
            Region::Slab(bytes) => bytes,
            Region::Shared(_) | Region::Foreign(_) | Region::Window(_) => return None,
        };
        bytes.get(span.offset as usize..)?.get(..span.len as usize)
    }

    /// Whether there are, for a span that has just been checked.
    #[inline]
    pub fn is_stable(&self, span: Span) -> bool {
        match self.entries.get(span.region as usize) {
            Some(entry) => matches!(entry.region, Some(Region::Private(_) | Region::Slab(_))),
            None => self.stable(span).is_some(),
        }
    }

    /// The bytes of a private region, to fill; none for any other.
    pub fn private_mut(&mut self, key: Key) -> Option<&mut [u8]> {
        let index = self.index(key)?;
        match self.entries[index].region.as_mut()? {
            Region::Private(bytes) => Some(bytes),
            _ => None,
        }
    }

    /// Copies `bytes` to the start of a checked span. Does nothing if the region has gone.
    ///
    /// # Errors
    /// [`AccessError::Gone`] if the program has unmapped the memory; part of it may be written.
    pub fn place(&mut self, span: Span, bytes: &[u8]) -> Result<(), AccessError> {
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
            Some(Region::Foreign(to)) => {
                let bounce = self
                    .bounce
                    .as_mut()
                    .expect("made with the first of its kind");
                return bounce.write(to, span.offset, bytes);
            }
            // A span names what a window is part of.
            Some(Region::Window(_)) | None => {}
        }
        Ok(())
    }

    /// Copies a checked span out into `into`, which has its length. Zeroes if the region has gone.
    ///
    /// # Errors
    /// [`AccessError::Gone`] if the program has unmapped the memory.
    pub fn fetch(&mut self, span: Span, into: &mut [u8]) -> Result<(), AccessError> {
        assert_eq!(into.len(), span.len as usize);
        if span.region >= LENT_KEY_MIN {
            self.lent.copy(span, into);
            return Ok(());
        }
        let start = span.offset as usize;
        let entry = self.entries.get(span.region as usize);
        match entry.and_then(|entry| entry.region.as_ref()) {
            Some(Region::Private(from)) => into.copy_from_slice(&from[start..start + into.len()]),
            Some(Region::Slab(from)) => into.copy_from_slice(&from[start..start + into.len()]),
            Some(Region::Shared(from)) => from.read(start, into),
            Some(Region::Foreign(from)) => {
                let bounce = self
                    .bounce
                    .as_mut()
                    .expect("made with the first of its kind");
                return bounce.read(from, span.offset, into);
            }
            Some(Region::Window(_)) | None => into.fill(0),
        }
        Ok(())
    }

    /// Performs an atomic on the word of a checked span and returns its old value. On shared memory
    /// that is one instruction; on foreign memory it is atomic among the queue pairs of this device.
    ///
    /// # Errors
    /// [`AccessError::NoRight`] for memory that no peer reaches, [`AccessError::Unaligned`],
    /// [`AccessError::Gone`].
    pub fn atomic(&mut self, span: Span, op: AtomicOp) -> Result<u64, AccessError> {
        let entry = self.entries.get(span.region as usize);
        match entry.and_then(|entry| entry.region.as_ref()) {
            Some(Region::Shared(memory)) => memory.atomic(span.offset as usize, op),
            Some(Region::Foreign(memory)) => {
                let bounce = self
                    .bounce
                    .as_mut()
                    .expect("made with the first of its kind");
                bounce.atomic(memory, span.offset, op)
            }
            _ => Err(AccessError::NoRight),
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
            Region::Foreign(memory) => memory.len,
            Region::Window(window) => window.place_len(),
        }
    }

    /// Whether it has no byte at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
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
        assert_ne!(first, second);
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
        assert_eq!(memory.invalidate(3, 0, private), Err(AccessError::NoRight));
        assert_eq!(
            memory.invalidate(4, 0, shared),
            Err(AccessError::WrongDomain)
        );
        assert!(memory.private_mut(private).is_some());
        assert_eq!(memory.invalidate(3, 0, shared), Ok(()));
        assert_eq!(
            memory.invalidate(3, 0, shared),
            Err(AccessError::UnknownKey)
        );
    }
}
