//! Storing a directory of this machine into a tree.
//!
//! Several threads walk the directory, read files and submit operations; each thread keeps a
//! window of operations in flight and looks at outcomes only when the window is full or there is
//! nothing else to do. A file of at most one chunk, with its name and inode, is one operation.
//! What lies in a directory waits as a task until the directory is there; no thread does.
//!
//! - *Restart.* Storing again completes what an interrupted run began: what exists with equal
//!   kind, size, attributes and target is skipped, anything else is replaced. A file that can be
//!   seen in the tree is whole, so equal attributes mean equal contents to the extent that they
//!   do for rsync.
//! - *Sharing.* The clients of one [`Share`] divide the subtrees below the upper levels, those of
//!   large directories by ranges of name slots. Who needs a directory creates it, or opens the one
//!   that another has created. A file with several names is stored by one client, whoever owns the
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
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lowtide_engine_core::session::Session;
use rustix::io::Errno;

use crate::error::TreeError;
use crate::input;
use crate::layout::{Entry, Ino};
use crate::pool::{self, Pool, Worker};
use crate::report::{Notes, Progress};
use crate::tree::Tree;

mod directory;
mod entry;
mod window;

use directory::{Listed, Made, Place, Unopened};
use entry::Entries;
use window::Window;

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

    /// The slots of the names that this client stores of a directory that all clients divide.
    fn slots(self) -> RangeInclusive<u64> {
        let begin = |index: u32| ((u128::from(index) << 64).div_ceil(u128::from(self.of))) as u64;
        let end = match self.index + 1 {
            last if last >= self.of => u64::MAX,
            next => begin(next) - 1,
        };
        begin(self.index)..=end
    }
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

    let place = Place::root(Made::root());
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
            released: Vec::new(),
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

enum Task {
    /// Looks at a directory.
    Directory(Unopened, Arc<Place>),
    /// Creates the counterpart of a directory; that of its parent is there.
    Make(Arc<Place>),
    /// Makes tasks of what is in a directory; its counterpart is there if it is needed.
    Listed(Listed),
    /// Stores entries, or looks for some to be stored.
    Entries(Entries),
    /// Stores a further name.
    Link(Later),
}

struct Thread<'r, 's, S: Session + ?Sized> {
    run: &'r Run<'r, 's, S>,
    report: StoreReport,
    window: Window,
    /// Contents of small files pass through here.
    buffer: Vec<u8>,
    /// Tasks that wait no longer, on their way to the pool.
    released: Vec<Task>,
}

impl<S: Session + ?Sized> Worker<Task, StoreError> for Thread<'_, '_, S> {
    fn work(&mut self, task: Task, pool: &Pool<Task, StoreError>) -> Result<(), StoreError> {
        let done = match task {
            Task::Directory(unopened, place) => self.directory(unopened, place),
            Task::Make(place) => self.make(&place),
            Task::Listed(listed) => self.listed(listed),
            Task::Entries(entries) => self.entries(entries),
            Task::Link(later) => self.link(later),
        };
        self.released.drain(..).for_each(|task| pool.push(task));
        done
    }

    fn settle(&mut self, pool: &Pool<Task, StoreError>) -> Result<bool, StoreError> {
        let finished = self.finish_oldest();
        self.released.drain(..).for_each(|task| pool.push(task));
        finished
    }
}

impl<S: Session + ?Sized> Thread<'_, '_, S> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slots_of_a_share_lie_side_by_side() {
        for of in [1, 2, 3, 7, 1000] {
            let mut next = 0;
            for index in 0..of {
                let slots = Share { index, of }.slots();
                assert_eq!(*slots.start(), next);
                let width = slots.end() - slots.start();
                assert!(width >= u64::MAX / u64::from(of) - 1);
                next = slots.end().wrapping_add(1);
            }
            assert_eq!(next, 0, "up to the last slot");
        }
    }
}
