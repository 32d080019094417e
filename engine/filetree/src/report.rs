//! What storing, fetching and comparing tell: counters that may be read at any time, and lists
//! of names that stay bounded.

use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of work in progress. Shared: whoever shows progress reads it whenever he likes.
#[derive(Debug, Default)]
pub struct Progress {
    entries: AtomicU64,
    bytes: AtomicU64,
    operations: AtomicU64,
    skipped: AtomicU64,
}

impl Progress {
    /// Entries finished: files, directories, symbolic links, further names.
    pub fn entries(&self) -> u64 {
        self.entries.load(Ordering::Relaxed)
    }

    /// Bytes of file contents finished.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Engine operations that have executed on behalf of single entries. Operations within the
    /// upload of a large file count as one.
    pub fn operations(&self) -> u64 {
        self.operations.load(Ordering::Relaxed)
    }

    /// Entries among the finished ones that were found equal already.
    pub fn skipped(&self) -> u64 {
        self.skipped.load(Ordering::Relaxed)
    }

    // Relaxed throughout: the counters order nothing.

    pub(crate) fn entry(&self, bytes: u64, operations: u64) {
        self.entries.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.operations.fetch_add(operations, Ordering::Relaxed);
    }

    /// Bytes of an entry that is counted elsewhere.
    pub(crate) fn contents(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn equal(&self) {
        self.entries.fetch_add(1, Ordering::Relaxed);
        self.skipped.fetch_add(1, Ordering::Relaxed);
    }
}

/// Something that was noticed about one path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Path from the top of the walk; `.` is the top itself.
    pub path: PathBuf,
    /// What was noticed, for people.
    pub what: String,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.what)
    }
}

/// Notes of one sort: all are counted, the first [`Notes::KEPT_MAX`] are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notes {
    /// The notes that were kept.
    pub list: Vec<Note>,
    /// How many there were.
    pub count: u64,
}

impl Notes {
    /// How many notes are kept.
    pub const KEPT_MAX: usize = 10_000;

    /// Whether there were none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub(crate) fn add(&mut self, path: &[u8], what: impl Into<String>) {
        self.count += 1;
        if self.list.len() < Self::KEPT_MAX {
            self.list.push(Note {
                path: Path::new(std::ffi::OsStr::from_bytes(path)).to_path_buf(),
                what: what.into(),
            });
        }
    }

    pub(crate) fn merge(&mut self, other: Notes) {
        self.count += other.count;
        let room = Self::KEPT_MAX - self.list.len().min(Self::KEPT_MAX);
        self.list.extend(other.list.into_iter().take(room));
    }
}
