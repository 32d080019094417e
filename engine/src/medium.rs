//! What the log and the store stand on: bytes that are volatile until synced.
//!
//! Owns: the [`Medium`] trait (one file) and the [`Volume`] trait (one directory), the poison gate
//! ([`Gated`]), and three implementations: [`dir`] (real files), [`recording`] (in memory; builds
//! crash images and injects faults) and [`power`] (a wrapper over real files that can lose power).
//!
//! # What a medium is trusted with
//!
//! * A store is volatile. The medium may make any unsynced page durable at any time, in any order,
//!   whole or torn: sectors of 512 bytes, or a prefix of its stores.
//! * A sync that returned `Ok` made every byte stored before it in its range durable.
//! * A sync that failed says nothing about any page, now or later: the kernel may have marked them
//!   clean. It is never retried; [`Gated`] refuses everything afterwards.
//! * Bytes whose value does not change are not damaged by a failing write of their neighbours
//!   (powersafe overwrite). Everything else in a sector under write may turn to garbage.
//! * [`Volume::create`] is atomic: after a crash the file is there in full length, zero and durable,
//!   or not there.
//!
//! Deliberately absent: truncating a mapped file, growing a mapped file, renaming (create does it),
//! asynchronous I/O.
//!
//! Source: redb's `StorageBackend` and "Assumptions about underlying media"; SQLite's crash tests.
#![deny(unsafe_code)]

pub mod dir;
pub mod power;
pub mod recording;

use crate::log::teeth::{Tooth, bites};
use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// Unit of write-back, bytes. Sync ranges are rounded outwards to it.
pub const PAGE: u64 = 4096;
/// Unit of tearing, bytes.
pub const SECTOR: u64 = 512;

/// How a file is going to be accessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Stores go to memory until a sync writes them: fixed length, no system call per store. A store
    /// that begins a page may fill the page with zeros, unless it was stored to before.
    Mapped,
    /// Stores are positioned writes: the length may change.
    Positioned,
    /// As positioned, but long stores go past the page cache where the file system can: what was
    /// stored is not expected to be read soon, and the store of a stretch that does not end with a
    /// page may fill that page with zeros.
    Bulk,
}

/// The kinds of call a medium or volume gets; faults are injected by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Call {
    /// [`Medium::read`].
    Read,
    /// [`Medium::store`].
    Store,
    /// [`Medium::sync`].
    Sync,
    /// [`Medium::resize`].
    Resize,
    /// [`Medium::close`].
    Close,
    /// [`Volume::create`].
    Create,
    /// [`Volume::open`].
    Open,
    /// [`Volume::remove`].
    Remove,
    /// [`Volume::list`].
    List,
}

impl Call {
    /// All kinds, in the order of declaration.
    pub const ALL: [Call; 9] = [
        Call::Read,
        Call::Store,
        Call::Sync,
        Call::Resize,
        Call::Close,
        Call::Create,
        Call::Open,
        Call::Remove,
        Call::List,
    ];
}

/// Why a medium or volume refused.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum MediumError {
    /// The file system has no room (or the quota or file size limit is reached). Nothing changed.
    #[error("{file}: no space for {wanted} bytes")]
    NoSpace {
        /// File name within its volume.
        file: String,
        /// Length in bytes that was asked for.
        wanted: u64,
    },
    /// The operating system reported an error.
    #[error("{file}: {call:?} of {len} bytes at {offset} failed: {source}")]
    Io {
        /// File name within its volume, or the directory.
        file: String,
        /// What was being done.
        call: Call,
        /// Byte offset in the file.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// The cause; shared because a poisoned medium repeats it.
        source: Arc<io::Error>,
    },
    /// An earlier sync or store failed; nothing is done or promised any more.
    #[error("{file}: refused after an earlier failure: {first}")]
    Poisoned {
        /// File name within its volume.
        file: String,
        /// The first failure.
        first: String,
    },
    /// The access lies outside of the file, or the operation does not exist for it.
    #[error("{file}: {call:?} of {len} bytes at {offset} is outside of its {size} bytes")]
    OutOfRange {
        /// File name within its volume.
        file: String,
        /// What was being done.
        call: Call,
        /// Byte offset in the file.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// The file's length in bytes.
        size: u64,
    },
    /// No file of that name.
    #[error("{file}: not found")]
    NotFound {
        /// File name within its volume.
        file: String,
    },
    /// Another process holds the directory.
    #[error("{dir}: in use by process {}", pid.map_or("unknown".into(), |p| p.to_string()))]
    InUse {
        /// The directory.
        dir: String,
        /// Process id written in the lock file, if readable.
        pid: Option<u32>,
    },
    /// The simulated machine has lost power (recording medium only).
    #[error("power lost")]
    PowerLost,
}

impl MediumError {
    /// Wraps an operating system error; out-of-space errors become [`MediumError::NoSpace`].
    pub(crate) fn from_io(
        file: &str,
        call: Call,
        offset: u64,
        len: u64,
        source: io::Error,
    ) -> MediumError {
        use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        let file = file.to_owned();
        match source.kind() {
            // A sync that reports lost space has lost data: that is no refusal.
            StorageFull | QuotaExceeded | FileTooLarge if call != Call::Sync => {
                MediumError::NoSpace {
                    file,
                    wanted: offset.saturating_add(len),
                }
            }
            io::ErrorKind::NotFound if call == Call::Open => MediumError::NotFound { file },
            _ => MediumError::Io {
                file,
                call,
                offset,
                len,
                source: Arc::new(source),
            },
        }
    }

    /// Whether the refusal was only about space, so that nothing is lost.
    pub fn is_no_space(&self) -> bool {
        matches!(self, MediumError::NoSpace { .. })
    }
}

impl From<MediumError> for io::Error {
    fn from(error: MediumError) -> io::Error {
        let kind = match &error {
            MediumError::NoSpace { .. } => io::ErrorKind::StorageFull,
            MediumError::Io { source, .. } => source.kind(),
            MediumError::NotFound { .. } => io::ErrorKind::NotFound,
            MediumError::OutOfRange { .. } => io::ErrorKind::InvalidInput,
            _ => io::ErrorKind::Other,
        };
        io::Error::new(kind, error)
    }
}

/// One file. Every method takes `&self`: one thread stores while another syncs.
pub trait Medium: Send + Sync + Debug {
    /// Length in bytes.
    fn len(&self) -> Result<u64, MediumError>;

    /// Whether the file has no bytes.
    fn is_empty(&self) -> Result<bool, MediumError> {
        Ok(self.len()? == 0)
    }

    /// Fills `out` from `offset`. Sees every store, synced or not.
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), MediumError>;

    /// Stores `bytes` at `offset`, within the length (mapped) or extending it (positioned).
    /// Volatile until a sync of the range returns `Ok`.
    fn store(&self, offset: u64, bytes: &[u8]) -> Result<(), MediumError>;

    /// Stores several stretches one behind the other, as so many calls of [`store`](Self::store)
    /// would; a medium that can makes one write of them.
    fn store_all(&self, offset: u64, stretches: &[&[u8]]) -> Result<(), MediumError> {
        store_each(self, offset, stretches)
    }

    /// Makes all pages that touch `range` durable.
    fn sync(&self, range: Range<u64>) -> Result<(), MediumError>;

    /// Sets the length, durably. Growth allocates space and reads as zero; a mapped file refuses.
    fn resize(&self, len: u64) -> Result<(), MediumError>;

    /// Makes stores to `range` cheap for a while, where the first store to a page costs a fault. A
    /// hint: changes nothing that can be read, and failing is silent.
    fn prefault(&self, range: Range<u64>) {
        let _ = range;
    }

    /// Last call. Releases what the medium holds; syncs nothing.
    fn close(&self) -> Result<(), MediumError> {
        Ok(())
    }
}

/// Stores stretches one behind the other, each by itself.
fn store_each<M: Medium + ?Sized>(
    medium: &M,
    offset: u64,
    stretches: &[&[u8]],
) -> Result<(), MediumError> {
    let mut at = offset;
    for bytes in stretches {
        medium.store(at, bytes)?;
        at += bytes.len() as u64;
    }
    Ok(())
}

/// One directory of files.
pub trait Volume: Send + Sync + Debug {
    /// Names of all files, sorted.
    fn list(&self) -> Result<Vec<String>, MediumError>;

    /// Opens an existing file.
    fn open(&self, name: &str, access: Access) -> Result<Arc<dyn Medium>, MediumError>;

    /// Creates a file of `len` zero bytes (replacing one of that name), with its space allocated
    /// and itself and its name durable. Atomic: see the module's trust section.
    fn create(&self, name: &str, len: u64, access: Access) -> Result<Arc<dyn Medium>, MediumError>;

    /// Removes a file, durably. Its name must not be open.
    fn remove(&self, name: &str) -> Result<(), MediumError>;

    /// Bytes that files may still grow by, as far as anybody can tell. Others may take them first.
    fn free_bytes(&self) -> Result<u64, MediumError> {
        Ok(u64::MAX)
    }
}

/// Shared memory of the first failure of a group of media.
#[derive(Debug, Default)]
pub struct Poison {
    first: OnceLock<String>,
}

impl Poison {
    /// The first failure, if there was one.
    pub fn cause(&self) -> Option<&str> {
        self.first.get().map(String::as_str)
    }

    /// Records a failure; only the first one counts.
    pub fn set(&self, cause: &MediumError) {
        let _ = self.first.set(cause.to_string());
    }

    #[inline]
    fn check(&self, file: &str) -> Result<(), MediumError> {
        match self.first.get() {
            None => Ok(()),
            Some(first) => Err(poisoned(file, first)),
        }
    }
}

#[cold]
fn poisoned(file: &str, first: &str) -> MediumError {
    MediumError::Poisoned {
        file: file.to_owned(),
        first: first.to_owned(),
    }
}

/// The one checked gate in front of a medium: the first failed store or sync poisons it, and every
/// medium that shares the same [`Poison`], for ever. A refusal for lack of space does not.
#[derive(Debug)]
pub struct Gated {
    name: String,
    inner: Arc<dyn Medium>,
    poison: Arc<Poison>,
}

impl Gated {
    /// Puts the gate before `inner`; `name` is used in errors.
    pub fn new(name: &str, inner: Arc<dyn Medium>, poison: Arc<Poison>) -> Gated {
        Gated {
            name: name.to_owned(),
            inner,
            poison,
        }
    }

    /// Poisons on a failure. An error is looked at where it is, never moved on the way of success: to
    /// copy it, the processor would have to wait until the stores before it are done.
    #[inline]
    fn guard(&self, result: Result<(), MediumError>) -> Result<(), MediumError> {
        match result {
            Ok(()) => Ok(()),
            Err(error) => Err(self.failed(error)),
        }
    }

    #[cold]
    fn failed(&self, error: MediumError) -> MediumError {
        if !error.is_no_space() && !bites(Tooth::RetrySync) {
            self.poison.set(&error);
        }
        error
    }
}

impl Medium for Gated {
    fn len(&self) -> Result<u64, MediumError> {
        self.inner.len()
    }

    // Reading stays possible (status, export) and does not poison: it promises nothing.
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), MediumError> {
        self.inner.read(offset, out)
    }

    #[inline]
    fn store(&self, offset: u64, bytes: &[u8]) -> Result<(), MediumError> {
        self.poison.check(&self.name)?;
        self.guard(self.inner.store(offset, bytes))
    }

    #[inline]
    fn store_all(&self, offset: u64, stretches: &[&[u8]]) -> Result<(), MediumError> {
        self.poison.check(&self.name)?;
        self.guard(self.inner.store_all(offset, stretches))
    }

    fn sync(&self, range: Range<u64>) -> Result<(), MediumError> {
        self.poison.check(&self.name)?;
        self.guard(self.inner.sync(range))?;
        // Another member of the group may have failed meanwhile; then nothing is promised.
        self.poison.check(&self.name)
    }

    fn resize(&self, len: u64) -> Result<(), MediumError> {
        self.poison.check(&self.name)?;
        self.guard(self.inner.resize(len))
    }

    fn prefault(&self, range: Range<u64>) {
        self.inner.prefault(range);
    }

    fn close(&self) -> Result<(), MediumError> {
        self.inner.close()
    }
}

/// Bytes in all; saturating, so that too many fit nowhere.
#[inline]
pub(crate) fn total_len(stretches: &[&[u8]]) -> u64 {
    let add = |sum: u64, bytes: &&[u8]| sum.saturating_add(bytes.len() as u64);
    match stretches {
        // A body, and a header with a body: no loop.
        [only] => only.len() as u64,
        [first, second] => add(first.len() as u64, second),
        // Saturating steps also keep the compiler from adding two numbers by vector.
        _ => stretches.iter().fold(0, add),
    }
}

/// Pages that touch `range`, as page numbers.
pub(crate) fn pages(range: &Range<u64>) -> Range<u64> {
    if range.start >= range.end {
        return 0..0;
    }
    range.start / PAGE..range.end.div_ceil(PAGE)
}

/// A small seeded generator (SplitMix64) for faults that must be repeatable.
#[derive(Debug, Clone)]
pub struct SplitMix(pub u64);

impl SplitMix {
    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}
