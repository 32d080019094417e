//! Storing a directory of this machine into a tree.
//!
//! Several threads walk the directory, read files and submit operations; each thread keeps a
//! window of operations in flight and looks at outcomes only when the window is full or there is
//! nothing else to do. A file of at most one chunk, with its name and inode, is one operation.
//!
//! - *Restart.* Storing again completes what an interrupted run began: what exists with equal
//!   kind, size, attributes and target is skipped, anything else is replaced. A file that can be
//!   seen in the tree is whole, so equal attributes mean equal contents to the extent that they
//!   do for rsync.
//! - *Sharing.* The clients of one [`Share`] divide the entries by directory, those of large
//!   directories by ranges of name slots. Who needs a directory creates it, or opens the one that
//!   another has created. A file with several names is stored by one client, whoever owns the
//!   names' directories; so every client looks at the attributes of all files.
//! - *Attributes* go with the operation that creates, also those of directories: no operation of
//!   the tree touches a modification time by itself, so nothing needs an order.
//!
//! Whatever cannot be read is named and counted and does not end the run; neither do files that
//! change while they are read (they are read again, and named if they never hold still).
//!
//! Deliberately absent: removing what the tree has and the directory has not; extended
//! attributes; holes (zeros are kept small by the chunk format instead).

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use lowtide_engine_core::session::Session;
use rustix::io::Errno;

use crate::error::TreeError;
use crate::input::{self, Listing, Sort};
use crate::layout::{self, Attributes, Entry, Ino, Kind, mix};
use crate::pool::{self, Pool, Worker};
use crate::report::{Notes, Progress};
use crate::tree::{AttributeChange, Tree};

mod entry;

use entry::{Entries, Window};

/// Directories with more entries than this are divided among the clients of a share.
const SPLIT_ENTRIES: usize = 4096;
/// Entries of one directory that are one task.
const BATCH_ENTRIES: usize = 64;

/// Which part of a directory one client of several stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Number of this client, below `of`.
    pub index: u32,
    /// How many clients there are.
    pub of: u32,
}

impl Share {
    /// Everything.
    pub const ALL: Share = Share { index: 0, of: 1 };
}

/// How to store.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// Which part.
    pub share: Share,
    /// Directory of the tree that receives the entries and attributes of the input directory.
    pub into: Ino,
    /// Threads that read and submit.
    pub threads: usize,
    /// Operations in flight, all threads together.
    pub in_flight_operations_max: usize,
    /// Bytes of values in flight, all threads together; a single file may exceed a thread's part.
    pub in_flight_bytes_max: usize,
    /// Hears the path of every entry that this run stored, once its operation has *executed*. It
    /// is stable when a [`Session::wait_stable`] that began later has returned.
    pub executed: Option<Sender<Vec<u8>>>,
}

impl Default for StoreOptions {
    fn default() -> StoreOptions {
        StoreOptions {
            share: Share::ALL,
            into: Ino::ROOT,
            threads: default_threads(),
            in_flight_operations_max: 2048,
            in_flight_bytes_max: 32 << 20,
            executed: None,
        }
    }
}

/// Threads unless told otherwise: enough to hide waiting on a small machine.
pub(crate) fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(4, |n| (2 * n.get()).clamp(4, 16))
}

/// What was stored, by this client.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoreReport {
    /// Files created or replaced.
    pub files: u64,
    /// Directories created.
    pub directories: u64,
    /// Symbolic links created or replaced.
    pub symlinks: u64,
    /// Further names of files and symbolic links.
    pub links: u64,
    /// Bytes of file contents written.
    pub bytes: u64,
    /// Entries that were there already and equal.
    pub skipped: u64,
    /// What could not be read, and why.
    pub unreadable: Notes,
    /// Files that changed whenever they were read, or that vanished.
    pub changed: Notes,
    /// Device nodes, sockets and FIFOs, which are not stored.
    pub special: Notes,
}

impl StoreReport {
    /// Adds another client's or thread's report.
    pub fn merge(&mut self, other: StoreReport) {
        self.files += other.files;
        self.directories += other.directories;
        self.symlinks += other.symlinks;
        self.links += other.links;
        self.bytes += other.bytes;
        self.skipped += other.skipped;
        self.unreadable.merge(other.unreadable);
        self.changed.merge(other.changed);
        self.special.merge(other.special);
    }
}

/// Why storing ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The directory to be stored cannot be opened.
    #[error("cannot open {path}: {why}")]
    Input {
        /// The directory.
        path: PathBuf,
        /// Why.
        why: std::io::Error,
    },
    /// The tree refused or the session failed.
    #[error("{path}: {why}")]
    Tree {
        /// What was being stored.
        path: PathBuf,
        /// Why it was not.
        #[source]
        why: TreeError,
    },
}

/// Stores the directory `input`, or this client's share of it. Returns once all is *stable*.
///
/// # Errors
/// [`StoreError`] when the directory cannot be opened or the tree fails. What has been stored by
/// then stays; storing again completes it.
pub fn store<S: Session + ?Sized>(
    tree: &Tree<'_, S>,
    input: &Path,
    options: &StoreOptions,
    progress: &Progress,
) -> Result<StoreReport, StoreError> {
    let root = input::open_root(input).map_err(|e| StoreError::Input {
        path: input.to_path_buf(),
        why: e.into(),
    })?;
    let run = Run {
        tree,
        options,
        progress,
        links: Mutex::default(),
        later: Mutex::default(),
    };
    // What earlier lives of this very client left half-done nobody goes on with.
    let life = tree.session().life();
    tree.reclaim(|other| other.node == life.node && other.incarnation < life.incarnation)
        .map_err(|why| failed(b".", why))?;

    let place = Place::root(Made::new(0));
    let seed = Task::Directory(Unopened::Root(root), place);
    let workers = run_workers(&run, vec![seed])?;

    // Further names come when the first ones are there.
    let later = std::mem::take(&mut *lock(&run.later));
    let tasks = later.into_iter().map(Task::Link).collect();
    let mut report = StoreReport::default();
    for thread in workers.into_iter().chain(run_workers(&run, tasks)?) {
        report.merge(thread.report);
    }
    tree.session().wait_stable().map_err(|e| StoreError::Tree {
        path: input.to_path_buf(),
        why: e.into(),
    })?;
    Ok(report)
}

fn run_workers<'r, 's, S: Session + ?Sized>(
    run: &'r Run<'r, 's, S>,
    tasks: Vec<Task>,
) -> Result<Vec<Thread<'r, 's, S>>, StoreError> {
    let threads = run.options.threads.max(1);
    let workers = (0..threads)
        .map(|_| Thread {
            run,
            report: StoreReport::default(),
            window: Window::new(
                run.options.in_flight_operations_max / threads,
                run.options.in_flight_bytes_max / threads,
            ),
            buffer: Vec::new(),
        })
        .collect();
    pool::run(tasks, workers)
}

/// What all threads share.
struct Run<'r, 's, S: Session + ?Sized> {
    tree: &'r Tree<'s, S>,
    options: &'r StoreOptions,
    progress: &'r Progress,
    /// Files of several names, by device and inode number; `None` while the first name is being
    /// stored.
    links: Mutex<HashMap<(u64, u64), Option<Entry>>>,
    /// Further names.
    later: Mutex<Vec<Later>>,
}

/// A further name of a file, to be stored once the file is.
struct Later {
    place: Arc<Place>,
    name: Vec<u8>,
    identity: (u64, u64),
}

/// A directory of the input, with its counterpart in the tree.
type Place = input::Place<Made>;

struct Made {
    /// Hash of the path, by which shares divide directories.
    hash: u64,
    attributes: OnceLock<Attributes>,
    /// The directory in the tree once it exists; whether this run created it, so that it was
    /// empty.
    ino: Mutex<Option<(Ino, bool)>>,
}

impl Made {
    fn new(hash: u64) -> Made {
        Made {
            hash,
            attributes: OnceLock::new(),
            ino: Mutex::new(None),
        }
    }
}

/// A directory that a task may open.
enum Unopened {
    Root(OwnedFd),
    In(Arc<OwnedFd>),
}

enum Task {
    Directory(Unopened, Arc<Place>),
    Entries(Entries),
    Link(Later),
}

struct Thread<'r, 's, S: Session + ?Sized> {
    run: &'r Run<'r, 's, S>,
    report: StoreReport,
    window: Window,
    /// Contents of small files pass through here.
    buffer: Vec<u8>,
}

impl<S: Session + ?Sized> Worker<Task, StoreError> for Thread<'_, '_, S> {
    fn work(&mut self, task: Task, pool: &Pool<Task, StoreError>) -> Result<(), StoreError> {
        match task {
            Task::Directory(unopened, place) => self.directory(unopened, &place, pool),
            Task::Entries(entries) => self.entries(&entries),
            Task::Link(later) => self.link(later),
        }
    }

    fn settle(&mut self) -> Result<(), StoreError> {
        self.settle_window()
    }
}

impl<S: Session + ?Sized> Thread<'_, '_, S> {
    /// Lists a directory and makes tasks of what is in it.
    fn directory(
        &mut self,
        unopened: Unopened,
        place: &Arc<Place>,
        pool: &Pool<Task, StoreError>,
    ) -> Result<(), StoreError> {
        let opened = match unopened {
            Unopened::Root(fd) => Ok(fd),
            Unopened::In(parent) => {
                let opened = input::open_directory(&parent, place.name());
                if opened.is_err() {
                    // Its attributes may be readable although its entries are not.
                    match input::stat_at(&parent, place.name()) {
                        Ok(stat) if input::sort_of(&stat) == Sort::Kind(Kind::Directory) => {
                            let _ = place.data.attributes.set(input::attributes(&stat));
                        }
                        _ => {}
                    }
                }
                opened
            }
        };
        let listed = opened.and_then(|fd| {
            let attributes = input::attributes(&rustix::fs::fstat(&fd)?);
            let _ = place.data.attributes.set(attributes);
            Ok((Listing::of(&fd)?, fd))
        });
        let is_mine = place.data.hash % u64::from(self.run.options.share.of)
            == u64::from(self.run.options.share.index);
        match listed {
            Ok((listing, fd)) => self.listed(Arc::new(fd), listing, place, is_mine, pool),
            Err(why) => {
                if is_mine {
                    self.not_read(&place.path(), why);
                    if place.data.attributes.get().is_some() {
                        self.ensure(place)?;
                    }
                }
                Ok(())
            }
        }
    }

    fn listed(
        &mut self,
        fd: Arc<OwnedFd>,
        listing: Listing,
        place: &Arc<Place>,
        is_mine: bool,
        pool: &Pool<Task, StoreError>,
    ) -> Result<(), StoreError> {
        let share = self.run.options.share;
        let is_split = share.of > 1 && listing.len() > SPLIT_ENTRIES;
        let mut known = None;
        if is_mine || is_split {
            let (ino, is_fresh) = self.ensure(place)?;
            if !is_fresh {
                known = Some(Arc::new(self.known_entries(ino, &listing, place)?));
            }
        }
        for found in listing.iter() {
            if found.sort == Sort::Kind(Kind::Directory) {
                let hash = mix(place.data.hash ^ found.slot);
                let child = Place::below(place, found.name, Made::new(hash));
                pool.push(Task::Directory(Unopened::In(Arc::clone(&fd)), child));
            }
        }
        let listing = Arc::new(listing);
        for begin in (0..listing.len()).step_by(BATCH_ENTRIES) {
            pool.push(Task::Entries(Entries {
                fd: Arc::clone(&fd),
                place: Arc::clone(place),
                listing: Arc::clone(&listing),
                range: begin..(begin + BATCH_ENTRIES).min(listing.len()),
                known: known.clone(),
                is_mine,
                is_split,
            }));
        }
        Ok(())
    }

    /// What the tree already has under the names of a listing, in the listing's order.
    fn known_entries(
        &self,
        directory: Ino,
        listing: &Listing,
        place: &Place,
    ) -> Result<Vec<Option<Entry>>, StoreError> {
        const PAGE_ENTRIES: usize = 4096;
        let mut known = vec![None; listing.len()];
        let mut at = 0;
        let mut cursor = None;
        loop {
            let page = self
                .run
                .tree
                .readdir(directory, cursor.as_ref(), PAGE_ENTRIES)
                .map_err(|why| failed(&place.path(), why))?;
            for stored in page.entries {
                let key = (layout::name_slot(&stored.name), stored.name.as_slice());
                while at < listing.len() && (listing.at(at).slot, listing.at(at).name) < key {
                    at += 1;
                }
                if at < listing.len() && listing.at(at).name == stored.name {
                    known[at] = Some(stored.entry);
                }
            }
            cursor = page.next;
            if cursor.is_none() {
                return Ok(known);
            }
        }
    }

    /// The counterpart of a directory in the tree, created if need be together with those above
    /// it; and whether this run created it.
    fn ensure(&mut self, place: &Arc<Place>) -> Result<(Ino, bool), StoreError> {
        let mut missing = Vec::new();
        let mut at = Some(place);
        while let Some(here) = at {
            if lock(&here.data.ino).is_some() {
                break;
            }
            missing.push(here);
            at = here.parent();
        }
        for here in missing.into_iter().rev() {
            let mut made = lock(&here.data.ino);
            if made.is_none() {
                *made = Some(self.make(here).map_err(|why| failed(&here.path(), why))?);
            }
        }
        // Set above, or found set.
        lock(&place.data.ino).ok_or_else(|| failed(&place.path(), TreeError::NotFound))
    }

    fn make(&mut self, place: &Place) -> Result<(Ino, bool), TreeError> {
        let tree = self.run.tree;
        let attributes = place.data.attributes.get().copied().unwrap_or_default();
        let parent = place.parent().and_then(|parent| *lock(&parent.data.ino));
        let Some((parent, _)) = parent else {
            self.adjust(self.run.options.into, &attributes)?;
            return Ok((self.run.options.into, false));
        };
        loop {
            match tree.mkdir(parent, place.name(), &attributes) {
                Ok(ino) => {
                    self.report.directories += 1;
                    self.run.progress.entry(0, 1);
                    self.tell_executed(|| place.path());
                    return Ok((ino, true));
                }
                Err(TreeError::Exists) => {}
                Err(e) => return Err(e),
            }
            match tree.lookup(parent, place.name()) {
                Ok(entry) if entry.kind == Kind::Directory => {
                    self.adjust(entry.ino, &attributes)?;
                    return Ok((entry.ino, false));
                }
                Ok(_) => match tree.unlink(parent, place.name()) {
                    Ok(()) | Err(TreeError::NotFound | TreeError::IsADirectory) => {}
                    Err(e) => return Err(e),
                },
                Err(TreeError::NotFound) => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Gives an existing directory these attributes unless it has them.
    fn adjust(&mut self, ino: Ino, attributes: &Attributes) -> Result<(), TreeError> {
        if self.run.tree.stat(ino)?.inode.attributes == *attributes {
            self.report.skipped += 1;
            self.run.progress.equal();
            return Ok(());
        }
        self.run
            .tree
            .set_attributes(ino, &AttributeChange::to(attributes))?;
        self.run.progress.entry(0, 1);
        Ok(())
    }

    fn tell_executed(&self, path: impl FnOnce() -> Vec<u8>) {
        if let Some(listener) = &self.run.options.executed {
            // Whoever no longer listens does not want to know.
            let _ = listener.send(path());
        }
    }

    /// Takes down that something could not be read, or is no longer there.
    fn not_read(&mut self, path: &[u8], why: Errno) {
        let notes = match why {
            Errno::NOENT | Errno::NOTDIR | Errno::LOOP => &mut self.report.changed,
            _ => &mut self.report.unreadable,
        };
        notes.add(path, std::io::Error::from(why).to_string());
    }
}

fn failed(path: &[u8], why: TreeError) -> StoreError {
    use std::os::unix::ffi::OsStrExt;
    StoreError::Tree {
        path: PathBuf::from(std::ffi::OsStr::from_bytes(path)),
        why,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
