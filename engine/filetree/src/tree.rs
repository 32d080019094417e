//! The operations of a file tree over a session.
//!
//! Each change is *one* operation of the engine: it is planned from what was read, carries what
//! it was planned on as checks, and is planned anew when a check does not hold because somebody
//! else was faster. So every change is atomic and serialisable without a lock that outlives it.
//!
//! Invariants kept by every operation:
//!
//! - T1 an entry names an inode that exists, of the entry's kind;
//! - T2 the count of a file or symbolic link is the number of its names, at least 1;
//! - T3 the count of a directory is the number of its entries;
//! - T4 a directory has one name (the root none) and its parent object names the directory that
//!   holds it; following parents ends at the root;
//! - T5 a file's chunks are exactly those that its size demands, each as long as that demands;
//! - T6 chunks of no file belong to a pending or a freeing note.
//!
//! Whoever changes an entry holds its slot exclusively and changes the directory's count in the
//! same operation; whoever removes the directory holds all its slots exclusively. Hence a count
//! compared then is exact. (The engine must not answer such a comparison from a cache that a
//! concurrent addition does not reach.) A removed directory leaves a note that whoever adds a name
//! demands to be absent.
//!
//! Deliberately absent: permission checks, open files (a file without a name is gone), and
//! implicit changes of modification times.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use lowtide_engine_core::ids::NodeId;
use lowtide_engine_core::op::{Bytes, Key, Range, Refusal, Request};
use lowtide_engine_core::session::{Session, SessionError};

use crate::error::TreeError;
use crate::layout::{
    self, Attributes, CHUNK_LOG2_DEFAULT, CHUNK_LOG2_MAX, CHUNK_LOG2_MIN, DATA, Entry, INODES, Ino,
    Inode, InodePart, Kind, Layout, Malformed, Parent, Region,
};
use crate::plan::Plan;

mod change;
mod content;
mod many;
mod remove;
mod upload;

pub use change::AttributeChange;
pub(crate) use change::symlink_inode;
pub use content::Reader;

/// How often an operation is planned anew before [`TreeError::Contended`].
const ATTEMPTS_MAX: u32 = 1000;
/// How often an operation is planned anew before objects that contradict each other are corrupt.
const LOOKS_MAX: u32 = 4;
/// How many directories are remembered as such.
const DIRECTORIES_MAX: usize = 1 << 16;
/// How long a full server is asked again before its refusal is reported.
const FULL_PATIENCE: Duration = Duration::from_secs(60);
const FULL_PAUSE_FIRST: Duration = Duration::from_millis(10);
const FULL_PAUSE_MAX: Duration = Duration::from_millis(500);
/// Bytes asked for when the few small objects of one inode are scanned.
const INODE_SCAN_BYTES: usize = 16 << 10;

/// A file tree as one session sees it. Shared by threads.
///
/// There is at most one `Tree` of a session at a time: it hands out the inode numbers of the
/// session's life.
pub struct Tree<'s, S: Session + ?Sized> {
    session: &'s S,
    layout: Layout,
    chunk_log2: u8,
    region: Region,
    /// Next inode number to hand out; `None` until the first is needed.
    next: Mutex<Option<u64>>,
    /// Inodes that are or were directories, as far as remembered.
    directories: Mutex<HashSet<Ino>>,
}

/// What [`Tree::stat`] tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    /// The inode.
    pub inode: Inode,
    /// Names of a file or symbolic link; entries of a directory.
    pub count: i64,
    /// The directory that holds a directory; the root is its own.
    pub parent: Option<Ino>,
}

/// One entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// File name: bytes, not necessarily UTF-8.
    pub name: Vec<u8>,
    /// Inode and kind.
    pub entry: Entry,
}

/// Some entries of a directory, in the order of [`layout::name_slot`], then of names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirPage {
    /// The entries.
    pub entries: Vec<DirEntry>,
    /// Objects in the place of entries that are none.
    pub damaged: Vec<Key>,
    /// Where the next page begins; `None` after the last.
    pub next: Option<Cursor>,
}

/// A place between two entries of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor(Key);

impl<'s, S: Session + ?Sized> Tree<'s, S> {
    /// The tree of the session's cluster; its root directory is created if there is none.
    ///
    /// # Errors
    /// [`TreeError::NoServers`], [`TreeError::LifeTooLarge`], or a failure of the session.
    pub fn open(session: &'s S) -> Result<Self, TreeError> {
        Self::with_chunk_log2(session, CHUNK_LOG2_DEFAULT)
    }

    /// As [`Tree::open`]; files created through this tree have chunks of 2^`chunk_log2` bytes.
    ///
    /// # Errors
    /// As [`Tree::open`], and [`TreeError::InvalidAttribute`] for a chunk size outside
    /// [`CHUNK_LOG2_MIN`] ..= [`CHUNK_LOG2_MAX`].
    pub fn with_chunk_log2(session: &'s S, chunk_log2: u8) -> Result<Self, TreeError> {
        if !(CHUNK_LOG2_MIN..=CHUNK_LOG2_MAX).contains(&chunk_log2) {
            return Err(TreeError::InvalidAttribute);
        }
        let tree = Tree {
            session,
            layout: Layout::new(session.placement())?,
            chunk_log2,
            region: Region::of(session.life())?,
            next: Mutex::new(None),
            directories: Mutex::default(),
        };
        tree.create_root()?;
        Ok(tree)
    }

    /// The session.
    #[must_use]
    pub fn session(&self) -> &'s S {
        self.session
    }

    /// Where the tree's objects are.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// What `name` stands for in `directory`.
    ///
    /// # Errors
    /// [`TreeError::NotFound`], also when `directory` does not exist or is none;
    /// [`TreeError::InvalidName`].
    pub fn lookup(&self, directory: Ino, name: &[u8]) -> Result<Entry, TreeError> {
        match self.read_entry(directory, name)? {
            Some((entry, _)) => Ok(entry),
            None => Err(TreeError::NotFound),
        }
    }

    /// Follows a path of names separated by `/` from the root. Empty parts and `.` are skipped;
    /// `..` and symbolic links are not followed.
    ///
    /// # Errors
    /// [`TreeError::NotFound`], [`TreeError::InvalidName`].
    pub fn resolve(&self, path: &[u8]) -> Result<Entry, TreeError> {
        let mut at = Entry {
            ino: Ino::ROOT,
            kind: Kind::Directory,
        };
        for name in path.split(|&b| b == b'/') {
            if !name.is_empty() && name != b"." {
                at = self.lookup(at.ino, name)?;
            }
        }
        Ok(at)
    }

    /// Attributes and count of an inode.
    ///
    /// # Errors
    /// [`TreeError::NotFound`], [`TreeError::Corrupt`].
    pub fn stat(&self, ino: Ino) -> Result<Stat, TreeError> {
        Ok(self.read_stat(ino)?.stat)
    }

    /// Up to about `entries_max` entries of `directory`, from its begin or from a cursor on.
    /// An entry that exists throughout is seen exactly once by a walk over all pages.
    ///
    /// # Errors
    /// [`TreeError::NotFound`], [`TreeError::NotADirectory`]. What is corrupt is in the page.
    pub fn readdir(
        &self,
        directory: Ino,
        from: Option<&Cursor>,
        entries_max: usize,
    ) -> Result<DirPage, TreeError> {
        const ENTRY_BYTES: usize = 16;
        let home = self.layout.home(directory);
        let mut range = Range::whole(layout::names_space(directory));
        if let Some(Cursor(key)) = from {
            range.lo = key.slot;
        }
        let bytes_max = entries_max.max(1).saturating_mul(ENTRY_BYTES);
        let page = self
            .session
            .scan(home, range, from.map(|c| &c.0), bytes_max)?;
        if page.entries.is_empty() && from.is_none() {
            self.demand_directory(directory)?;
        }
        let removed = layout::removed_key(directory);
        if page.entries.last().is_some_and(|(key, _)| *key == removed) {
            return Err(TreeError::NotFound);
        }
        let next = match page.entries.last() {
            Some((key, _)) if page.more => Some(Cursor(key.clone())),
            _ => None,
        };
        let mut listed = DirPage {
            entries: Vec::with_capacity(page.entries.len()),
            damaged: Vec::new(),
            next,
        };
        for (key, value) in page.entries {
            let is_entry_key =
                layout::is_file_name(&key.name) && key.slot == layout::name_slot(&key.name);
            match Entry::decode(&value) {
                Ok(entry) if is_entry_key => listed.entries.push(DirEntry {
                    name: key.name,
                    entry,
                }),
                _ => listed.damaged.push(key),
            }
        }
        Ok(listed)
    }

    /// The directory that holds `directory`; the root is its own.
    ///
    /// # Errors
    /// [`TreeError::NotFound`] when `directory` does not exist or is none.
    pub fn parent(&self, directory: Ino) -> Result<Ino, TreeError> {
        Ok(self.read_parent(directory)?.0)
    }

    fn create_root(&self) -> Result<(), TreeError> {
        let home = self.layout.home(Ino::ROOT);
        let key = layout::parent_key(Ino::ROOT);
        if self.session.read(home, &key)?.is_some() {
            return Ok(());
        }
        let root = Inode {
            kind: Kind::Directory,
            attributes: Attributes {
                mode: 0o755,
                ..Attributes::default()
            },
            size: 0,
            chunk_log2: 0,
            writes: 0,
            target: Vec::new(),
        };
        let mut plan = Plan::default();
        plan.absent(home, key.clone());
        plan.put(home, layout::inode_key(Ino::ROOT), root.encode());
        plan.put(home, layout::count_key(Ino::ROOT), layout::count_value(0));
        plan.put(home, key, Parent(Ino::ROOT).encode());
        match self.run(plan) {
            Err(e) if e.is_check_failed() => Ok(()), // somebody else created it
            other => other,
        }
    }

    /// A number that no inode has had.
    fn allocate(&self) -> Result<Ino, TreeError> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let number = match *next {
            Some(number) => number,
            None => self.first_free()?,
        };
        *next = Some(number + 1);
        if number > self.region.last {
            return Err(TreeError::InodesExhausted);
        }
        Ino::new(number).ok_or(TreeError::InodesExhausted)
    }

    /// Smallest number of the region above all that carry an object. A life is fresh unless an
    /// earlier `Tree` of this very session has used numbers.
    fn first_free(&self) -> Result<u64, TreeError> {
        let Region { first, last } = self.region;
        if !self.is_used(first, last)? {
            return Ok(first);
        }
        let (mut used, mut free) = (first, last + 1);
        while used + 1 < free {
            let middle = used + (free - used) / 2;
            if self.is_used(middle, last)? {
                used = middle;
            } else {
                free = middle;
            }
        }
        Ok(free)
    }

    fn is_used(&self, lo: u64, hi: u64) -> Result<bool, TreeError> {
        let spaces = [(INODES, self.layout.meta()), (DATA, self.layout.object())];
        for (space, homes) in spaces {
            for &home in homes {
                let range = Range { space, lo, hi };
                if !self.session.scan(home, range, None, 1)?.entries.is_empty() {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Numbers from `ino` to the end of this life's region: what a lock for a new inode covers,
    /// so that the engine grants it once. Larger numbers do not exist yet, so nobody else wants
    /// them.
    fn fresh_range(&self, space: u64, ino: Ino) -> Range {
        Range {
            space,
            lo: ino.get(),
            hi: self.region.last.max(ino.get()),
        }
    }

    /// Executes a plan and waits for it; nothing is asked for a plan that changes nothing. A full
    /// server is asked again for a while.
    fn run(&self, plan: Plan) -> Result<(), TreeError> {
        let request = plan.finish();
        if request.updates.is_empty() {
            return Ok(());
        }
        let ticket = self.session.submit(request.clone())?;
        match self.session.wait(ticket) {
            Err(SessionError::Refused(Refusal::Full { .. })) => self.run_when_not_full(request),
            other => Ok(other.map(|_| ())?),
        }
    }

    /// Executes a request that a full server has refused, again and again until it has room.
    fn run_when_not_full(&self, request: Request) -> Result<(), TreeError> {
        let begun = Instant::now();
        let mut pause = FULL_PAUSE_FIRST;
        loop {
            thread::sleep(pause);
            pause = (pause * 2).min(FULL_PAUSE_MAX);
            let ticket = self.session.submit(request.clone())?;
            match self.session.wait(ticket) {
                Err(SessionError::Refused(Refusal::Full { .. }))
                    if begun.elapsed() < FULL_PATIENCE => {}
                other => return Ok(other.map(|_| ())?),
            }
        }
    }

    /// Plans and runs an operation until no check of it fails any more.
    fn attempt<T>(
        &self,
        mut plan: impl FnMut() -> Result<(Plan, T), TreeError>,
    ) -> Result<T, TreeError> {
        for attempt in 1..=ATTEMPTS_MAX {
            let (plan, outcome) = match plan() {
                // Two objects may contradict each other because one was read before and one
                // after somebody else's operation.
                Err(TreeError::Corrupt { .. }) if attempt < LOOKS_MAX => continue,
                planned => planned?,
            };
            match self.run(plan) {
                Ok(()) => return Ok(outcome),
                Err(e) if e.is_check_failed() => {}
                Err(e) => return Err(e),
            }
        }
        Err(TreeError::Contended)
    }

    /// Entry of a name with the bytes that were read.
    fn read_entry(&self, directory: Ino, name: &[u8]) -> Result<Option<(Entry, Bytes)>, TreeError> {
        demand_name(name)?;
        let home = self.layout.home(directory);
        let key = layout::entry_key(directory, name);
        match self.session.read(home, &key)? {
            None => Ok(None),
            Some(bytes) => {
                let entry = Entry::decode(&bytes).map_err(|why| corrupt(home, &key, why))?;
                Ok(Some((entry, bytes)))
            }
        }
    }

    fn read_parent(&self, directory: Ino) -> Result<(Ino, Bytes), TreeError> {
        let home = self.layout.home(directory);
        let key = layout::parent_key(directory);
        let bytes = self.session.read(home, &key)?.ok_or(TreeError::NotFound)?;
        let Parent(ino) = Parent::decode(&bytes).map_err(|why| corrupt(home, &key, why))?;
        Ok((ino, bytes))
    }

    fn read_stat(&self, ino: Ino) -> Result<StatRead, TreeError> {
        let home = self.layout.home(ino);
        let range = layout::inode_range(ino);
        let page = self.session.scan(home, range, None, INODE_SCAN_BYTES)?;
        self.assemble(ino, page.entries)
    }

    /// Makes an inode and its count of the objects of its slot.
    fn assemble(&self, ino: Ino, objects: Vec<(Key, Bytes)>) -> Result<StatRead, TreeError> {
        let home = self.layout.home(ino);
        let mut inode = None;
        let mut count = None;
        let mut parent = None;
        for (key, value) in objects {
            match layout::inode_part(&key) {
                Some(InodePart::Inode) => inode = Some(value),
                Some(InodePart::Count) => count = Some(value),
                Some(InodePart::Parent) => {
                    let decoded = Parent::decode(&value);
                    parent = Some(decoded.map_err(|why| corrupt(home, &key, why))?.0);
                }
                None => return Err(corrupt(home, &key, Malformed::Key)),
            }
        }
        let inode_bytes = inode.ok_or(TreeError::NotFound)?;
        let inode = Inode::decode(&inode_bytes)
            .map_err(|why| corrupt(home, &layout::inode_key(ino), why))?;
        let count_bytes =
            count.ok_or_else(|| corrupt(home, &layout::count_key(ino), Malformed::Missing))?;
        let count = layout::read_count(&count_bytes)
            .map_err(|why| corrupt(home, &layout::count_key(ino), why))?;
        Ok(StatRead {
            stat: Stat {
                inode,
                count,
                parent,
            },
            inode_bytes,
            count_bytes,
        })
    }

    /// Fails with the reason why nothing can be named in `directory`.
    fn demand_directory(&self, directory: Ino) -> Result<(), TreeError> {
        match self.read_parent(directory) {
            Ok(_) => {
                self.remember_directory(directory);
                Ok(())
            }
            Err(TreeError::NotFound) => {
                self.read_stat(directory)?;
                Err(TreeError::NotADirectory)
            }
            Err(e) => Err(e),
        }
    }

    /// Fails unless `directory` is or was one. No operation brings entries into a removed
    /// directory, so what was one once need not be asked for again.
    fn demand_ever_directory(&self, directory: Ino) -> Result<(), TreeError> {
        let known = self.directories.lock();
        if known
            .unwrap_or_else(PoisonError::into_inner)
            .contains(&directory)
        {
            return Ok(());
        }
        self.demand_directory(directory)
    }

    pub(crate) fn remember_directory(&self, directory: Ino) {
        let mut known = self
            .directories
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if known.len() == DIRECTORIES_MAX {
            known.clear();
        }
        known.insert(directory);
    }
}

/// An inode and its count with the bytes that were read, to be checked by what is planned on them.
struct StatRead {
    stat: Stat,
    inode_bytes: Bytes,
    count_bytes: Bytes,
}

fn demand_name(name: &[u8]) -> Result<(), TreeError> {
    if layout::is_file_name(name) {
        Ok(())
    } else {
        Err(TreeError::InvalidName)
    }
}

fn corrupt(home: NodeId, key: &Key, why: Malformed) -> TreeError {
    TreeError::Corrupt {
        home,
        key: key.clone(),
        why,
    }
}
