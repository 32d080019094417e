//! Holding a stored tree against a directory of this machine: every entry, every attribute, every
//! byte, and which names share an inode.
//!
//! The entries of a directory are walked in the order in which the tree has them, both sides at
//! once. What differs but has changed in the directory since the storing began is named as
//! changed and is no mismatch: the inode's change time tells, which no program can set.
//!
//! Deliberately absent: judging the tree by itself (`check`).

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use lowtide_engine_core::session::Session;
use rustix::fs::Stat as FileStat;
use rustix::io::Errno;

use crate::error::TreeError;
use crate::input::{self, Listing, Sort};
use crate::layout::{self, Attributes, CHUNK_LOG2_MAX, Chunk, Entry, Ino, Inode, Kind};
use crate::pool::{self, Pool, Worker};
use crate::report::{Notes, Progress};
use crate::store::default_threads;
use crate::tree::{Stat, Tree};

/// Entries of a stored directory read at a time.
const PAGE_ENTRIES: usize = 4096;
/// Entries that are one task.
const BATCH_ENTRIES: usize = 64;
/// Bytes of small files that one task reads together.
const TOGETHER_BYTES_MAX: u64 = 8 << 20;

/// How to compare.
#[derive(Clone, Debug)]
pub struct CompareOptions {
    /// Directory of the tree to be held against the input.
    pub from: Ino,
    /// Threads that read and compare.
    pub threads: usize,
    /// When the storing began: what changed in the directory since then may differ.
    pub since: Option<SystemTime>,
}

impl Default for CompareOptions {
    fn default() -> CompareOptions {
        CompareOptions {
            from: Ino::ROOT,
            threads: default_threads(),
            since: None,
        }
    }
}

/// How a tree differs from a directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CompareReport {
    /// Entries of the directory that were compared, the top included.
    pub entries: u64,
    /// Bytes of file contents compared.
    pub bytes: u64,
    /// Differences, each with its reason.
    pub mismatches: Notes,
    /// What differs because it changed in the directory since the storing began.
    pub changed: Notes,
    /// What could not be read in the directory, so that nothing can be said about it.
    pub unreadable: Notes,
    /// Device nodes, sockets and FIFOs, which a tree does not hold.
    pub special: Notes,
}

impl CompareReport {
    /// Whether the tree equals the directory, as far as that held still and can be read.
    #[must_use]
    pub fn is_equal(&self) -> bool {
        self.mismatches.is_empty()
    }

    fn merge(&mut self, other: CompareReport) {
        self.entries += other.entries;
        self.bytes += other.bytes;
        self.mismatches.merge(other.mismatches);
        self.changed.merge(other.changed);
        self.unreadable.merge(other.unreadable);
        self.special.merge(other.special);
    }
}

/// Why comparing ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompareError {
    /// The directory cannot be opened.
    #[error("cannot open {path}: {why}")]
    Input {
        /// The directory.
        path: PathBuf,
        /// Why.
        why: std::io::Error,
    },
    /// The session failed.
    #[error("{path}: {why}")]
    Tree {
        /// Path within the tree.
        path: PathBuf,
        /// Why.
        #[source]
        why: TreeError,
    },
}

/// Compares a directory of the tree with the directory `input`.
///
/// # Errors
/// [`CompareError`] when the directory cannot be opened or the session fails. Differences and
/// damage are no errors but part of the report.
pub fn compare<S: Session + ?Sized>(
    tree: &Tree<'_, S>,
    input: &Path,
    options: &CompareOptions,
    progress: &Progress,
) -> Result<CompareReport, CompareError> {
    let root = input::open_root(input).map_err(|e| CompareError::Input {
        path: input.to_path_buf(),
        why: e.into(),
    })?;
    let run = Run {
        tree,
        progress,
        since: options.since.map(split_time),
        links: Mutex::default(),
    };
    let workers = (0..options.threads.max(1))
        .map(|_| Thread {
            run: &run,
            report: CompareReport::default(),
            buffer: Vec::new(),
        })
        .collect();
    let seed = Task::Directory {
        parent: None,
        opened: Some(root),
        place: Place::root(()),
        ino: options.from,
    };
    let mut report = CompareReport::default();
    for thread in pool::run(vec![seed], workers)? {
        report.merge(thread.report);
    }
    run.judge_links(&mut report);
    Ok(report)
}

type Place = input::Place<()>;

/// What all threads share.
struct Run<'r, 's, S: Session + ?Sized> {
    tree: &'r Tree<'s, S>,
    progress: &'r Progress,
    /// Seconds and nanoseconds.
    since: Option<(i64, i64)>,
    /// Files of several names, by device and inode number.
    links: Mutex<HashMap<(u64, u64), Links>>,
}

/// Names of one file of the directory.
struct Links {
    ino: Ino,
    /// How many names the tree says it has.
    stored: i64,
    /// How many have been seen in the directory.
    seen: i64,
    path: Vec<u8>,
    has_changed: bool,
}

enum Task {
    Directory {
        parent: Option<Arc<OwnedFd>>,
        opened: Option<OwnedFd>,
        place: Arc<Place>,
        ino: Ino,
    },
    /// Names that both sides have, by their place in the listing.
    Entries {
        fd: Arc<OwnedFd>,
        place: Arc<Place>,
        listing: Arc<Listing>,
        pairs: Vec<(usize, Entry)>,
    },
}

struct Thread<'r, 's, S: Session + ?Sized> {
    run: &'r Run<'r, 's, S>,
    report: CompareReport,
    buffer: Vec<u8>,
}

impl<S: Session + ?Sized> Worker<Task, CompareError> for Thread<'_, '_, S> {
    fn work(&mut self, task: Task, pool: &Pool<Task, CompareError>) -> Result<(), CompareError> {
        match task {
            Task::Directory {
                parent,
                opened,
                place,
                ino,
            } => self.directory(parent.as_deref(), opened, &place, ino, pool),
            Task::Entries {
                fd,
                place,
                listing,
                pairs,
            } => self.entries(&fd, &place, &listing, &pairs),
        }
    }

    fn settle(&mut self) -> Result<(), CompareError> {
        Ok(())
    }
}

impl<S: Session + ?Sized> Thread<'_, '_, S> {
    fn directory(
        &mut self,
        parent: Option<&OwnedFd>,
        opened: Option<OwnedFd>,
        place: &Arc<Place>,
        ino: Ino,
        pool: &Pool<Task, CompareError>,
    ) -> Result<(), CompareError> {
        let path = place.path();
        let opened = match (opened, parent) {
            (Some(fd), _) => Ok(fd),
            (None, Some(parent)) => input::open_directory(parent, place.name()),
            (None, None) => Err(Errno::BADF),
        };
        let listed = opened.and_then(|fd| {
            let stat = rustix::fs::fstat(&fd)?;
            Ok((Listing::of(&fd)?, stat, fd))
        });
        let (listing, stat, fd) = match listed {
            Ok(listed) => listed,
            Err(why) => {
                self.not_read(&path, why);
                return Ok(());
            }
        };
        self.report.entries += 1;
        self.run.progress.entry(0, 0);
        match self.run.tree.stat(ino) {
            Ok(stored) => {
                if let Some(reason) = differing(&stored.inode.attributes, &stat) {
                    self.differs(&path, &stat, reason);
                }
            }
            Err(why) => self.damaged(&path, &stat, why)?,
        }
        self.walk_both(Arc::new(fd), listing, place, &stat, ino, pool)
    }

    /// Walks a stored directory and a listing in their common order.
    fn walk_both(
        &mut self,
        fd: Arc<OwnedFd>,
        listing: Listing,
        place: &Arc<Place>,
        stat: &FileStat,
        ino: Ino,
        pool: &Pool<Task, CompareError>,
    ) -> Result<(), CompareError> {
        let listing = Arc::new(listing);
        let mut at = 0;
        let mut cursor = None;
        loop {
            let page = match self.run.tree.readdir(ino, cursor.as_ref(), PAGE_ENTRIES) {
                Ok(page) => page,
                Err(why) => return self.damaged(&place.path(), stat, why),
            };
            for key in &page.damaged {
                let path = place.path_of(&key.name);
                self.report.mismatches.add(&path, "corrupt entry");
            }
            let mut pairs = Vec::new();
            for stored in page.entries {
                let key = (layout::name_slot(&stored.name), stored.name.as_slice());
                while at < listing.len() && (listing.at(at).slot, listing.at(at).name) < key {
                    self.missing(&fd, place, &listing, at);
                    at += 1;
                }
                if at < listing.len() && listing.at(at).name == stored.name {
                    let both = [Sort::Kind(stored.entry.kind), listing.at(at).sort];
                    if both == [Sort::Kind(Kind::Directory); 2] {
                        pool.push(Task::Directory {
                            parent: Some(Arc::clone(&fd)),
                            opened: None,
                            place: Place::below(place, listing.at(at).name, ()),
                            ino: stored.entry.ino,
                        });
                    } else {
                        pairs.push((at, stored.entry));
                    }
                    at += 1;
                } else {
                    // Removing it would have changed the directory.
                    let path = place.path_of(&stored.name);
                    self.differs(&path, stat, "only in the tree");
                }
            }
            // Neighbours in number were made together and are read together.
            pairs.sort_unstable_by_key(|(_, entry)| entry.ino);
            while !pairs.is_empty() {
                let rest = pairs.len().saturating_sub(BATCH_ENTRIES);
                pool.push(Task::Entries {
                    fd: Arc::clone(&fd),
                    place: Arc::clone(place),
                    listing: Arc::clone(&listing),
                    pairs: pairs.split_off(rest),
                });
            }
            cursor = page.next;
            if cursor.is_none() {
                break;
            }
        }
        while at < listing.len() {
            self.missing(&fd, place, &listing, at);
            at += 1;
        }
        Ok(())
    }

    fn entries(
        &mut self,
        fd: &OwnedFd,
        place: &Place,
        listing: &Listing,
        pairs: &[(usize, Entry)],
    ) -> Result<(), CompareError> {
        let tree = self.run.tree;
        let in_tree = |why| CompareError::Tree {
            path: as_path(&place.path()),
            why,
        };
        let inos: Vec<Ino> = pairs.iter().map(|(_, entry)| entry.ino).collect();
        let stats = tree.stat_many(&inos).map_err(in_tree)?;
        let small = small_files(&stats);
        let mut chunks = tree.read_many(&small).map_err(in_tree)?;
        for (index, entry) in pairs {
            let name = listing.at(*index).name;
            let path = place.path_of(name);
            let stat = match input::stat_at(fd, name) {
                Ok(stat) => stat,
                Err(why) => {
                    self.not_read(&path, why);
                    continue;
                }
            };
            self.report.entries += 1;
            match stats.get(&entry.ino) {
                Some(Ok(stored)) if stored.inode.kind != entry.kind => {
                    self.differs(&path, &stat, "inode and entry of different kinds");
                }
                Some(Ok(stored)) => {
                    let chunk = chunks.remove(&entry.ino);
                    self.entry(fd, name, &path, (entry.ino, stored), &stat, chunk)?;
                }
                Some(Err(why)) => self.differs(&path, &stat, &why.to_string()),
                None => self.differs(&path, &stat, "entry without an inode"),
            }
            self.run.progress.entry(0, 0);
        }
        Ok(())
    }

    fn entry(
        &mut self,
        fd: &OwnedFd,
        name: &[u8],
        path: &[u8],
        stored: (Ino, &Stat),
        stat: &FileStat,
        chunk: Option<Chunk>,
    ) -> Result<(), CompareError> {
        let (ino, Stat { inode, count, .. }) = stored;
        if input::sort_of(stat) != Sort::Kind(inode.kind) {
            self.differs(path, stat, "kind");
            return Ok(());
        }
        if let Some(reason) = differing(&inode.attributes, stat) {
            self.differs(path, stat, reason);
        }
        self.count_name(path, ino, *count, stat);
        if inode.kind == Kind::Symlink {
            match input::read_link(fd, name) {
                Ok(target) if target == inode.target => {}
                Ok(_) => self.differs(path, stat, "target"),
                Err(why) => self.not_read(path, why),
            }
            return Ok(());
        }
        if inode.size != stat.st_size as u64 {
            self.differs(path, stat, "size");
            return Ok(());
        }
        let opened = input::open_file(fd, name);
        let compared = opened
            .map_err(|why| Unequal::Input(why.into()))
            .and_then(|mut file| self.contents(&mut file, ino, inode, chunk));
        match compared {
            Ok(()) => {}
            Err(Unequal::At(offset)) => {
                // The file may have changed after its attributes were read.
                let now = input::stat_at(fd, name);
                let now = now.as_ref().unwrap_or(stat);
                self.differs(path, now, &format!("contents from byte {offset} on"));
            }
            Err(Unequal::Input(why)) => self.report.unreadable.add(path, why.to_string()),
            Err(Unequal::Tree(why)) => self.damaged(path, stat, why)?,
        }
        self.report.bytes += inode.size;
        self.run.progress.contents(inode.size);
        Ok(())
    }

    /// Compares contents of equal size.
    fn contents(
        &mut self,
        file: &mut File,
        ino: Ino,
        inode: &Inode,
        chunk: Option<Chunk>,
    ) -> Result<(), Unequal> {
        let mut reader = self.run.tree.reader(ino, inode.clone());
        let mut next = chunk;
        let mut offset = 0;
        loop {
            if next.is_none() {
                if offset == inode.size {
                    return Ok(());
                }
                next = reader.next_chunk().map_err(Unequal::Tree)?;
            }
            let Some(chunk) = next.take() else {
                return Ok(());
            };
            let length = chunk.len();
            debug_assert!(length <= 1 << CHUNK_LOG2_MAX);
            if self.buffer.len() < length {
                self.buffer.resize(length, 0);
            }
            let filled =
                input::read_full(file, &mut self.buffer[..length]).map_err(Unequal::Input)?;
            if !chunk.equals(&self.buffer[..filled]) {
                return Err(Unequal::At(offset));
            }
            offset += length as u64;
        }
    }

    /// Takes down which inode of the tree a name with others stands for.
    fn count_name(&mut self, path: &[u8], ino: Ino, stored: i64, stat: &FileStat) {
        if stat.st_nlink <= 1 {
            if stored != 1 {
                self.differs(path, stat, "number of names");
            }
            return;
        }
        let has_changed = self.run.has_changed(stat);
        let mut links = lock(&self.run.links);
        let known = links.entry(input::identity(stat)).or_insert_with(|| Links {
            ino,
            stored,
            seen: 0,
            path: path.to_vec(),
            has_changed,
        });
        known.seen += 1;
        known.has_changed |= has_changed;
        let is_other = known.ino != ino;
        drop(links);
        if is_other {
            self.differs(path, stat, "not the same inode as its other names");
        }
    }

    fn missing(&mut self, fd: &OwnedFd, place: &Place, listing: &Listing, index: usize) {
        let found = listing.at(index);
        let path = place.path_of(found.name);
        if found.sort == Sort::Special {
            self.report.special.add(&path, "special file");
            return;
        }
        let stat = match input::stat_at(fd, found.name) {
            Ok(stat) => stat,
            Err(why) => return self.not_read(&path, why),
        };
        // What nobody can read could not be stored either.
        match readable(fd, found.name, &stat) {
            Ok(()) => self.differs(&path, &stat, "not in the tree"),
            Err(why) => self.report.unreadable.add(&path, why.to_string()),
        }
    }

    /// Takes down a difference; `stat` is of what would show that the directory has changed.
    fn differs(&mut self, path: &[u8], stat: &FileStat, reason: &str) {
        if self.run.has_changed(stat) {
            self.report.changed.add(path, reason);
        } else {
            self.report.mismatches.add(path, reason);
        }
    }

    /// Takes down damage; a failure of the session ends the run.
    fn damaged(
        &mut self,
        path: &[u8],
        stat: &FileStat,
        why: TreeError,
    ) -> Result<(), CompareError> {
        match why {
            TreeError::Corrupt { .. } | TreeError::NotFound | TreeError::NotADirectory => {
                self.differs(path, stat, &why.to_string());
                Ok(())
            }
            why => Err(CompareError::Tree {
                path: as_path(path),
                why,
            }),
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

/// Whether an entry's contents can be read to their end.
fn readable(fd: &OwnedFd, name: &[u8], stat: &FileStat) -> io::Result<()> {
    if input::sort_of(stat) == Sort::Kind(Kind::File) {
        let mut file = input::open_file(fd, name)?;
        io::copy(&mut file, &mut io::sink())?;
    }
    Ok(())
}

impl<S: Session + ?Sized> Run<'_, '_, S> {
    fn has_changed(&self, stat: &FileStat) -> bool {
        self.since
            .is_some_and(|since| (stat.st_ctime, stat.st_ctime_nsec as i64) >= since)
    }

    /// Files whose names are not as many in the tree as were seen.
    fn judge_links(&self, report: &mut CompareReport) {
        for links in lock(&self.links).values() {
            if links.stored == links.seen {
                continue;
            }
            let reason = format!("{} names in the tree, not {}", links.stored, links.seen);
            if links.has_changed {
                report.changed.add(&links.path, reason);
            } else {
                report.mismatches.add(&links.path, reason);
            }
        }
    }
}

enum Unequal {
    At(u64),
    Input(std::io::Error),
    Tree(TreeError),
}

/// Files that are one chunk and together fit in memory.
pub(crate) fn small_files(stats: &HashMap<Ino, Result<Stat, TreeError>>) -> Vec<(Ino, &Inode)> {
    let mut room = TOGETHER_BYTES_MAX;
    let mut small = Vec::new();
    for (ino, stat) in stats {
        if let Ok(stat) = stat
            && stat.inode.chunks() == 1
            && stat.inode.size <= room
        {
            room -= stat.inode.size;
            small.push((*ino, &stat.inode));
        }
    }
    small
}

/// The first attribute that differs. Permissions of a symbolic link are nobody's.
fn differing(stored: &Attributes, stat: &FileStat) -> Option<&'static str> {
    let found = input::attributes(stat);
    let is_symlink = input::sort_of(stat) == Sort::Kind(Kind::Symlink);
    if stored.mode != found.mode && !is_symlink {
        Some("permissions")
    } else if (stored.uid, stored.gid) != (found.uid, found.gid) {
        Some("owner")
    } else if (stored.mtime_sec, stored.mtime_nsec) != (found.mtime_sec, found.mtime_nsec) {
        Some("modification time")
    } else {
        None
    }
}

/// A time as file attributes have it.
fn split_time(time: SystemTime) -> (i64, i64) {
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => (
            i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
            i64::from(since.subsec_nanos()),
        ),
        Err(_) => (i64::MIN, 0), // before 1970: everything has changed since
    }
}

fn as_path(path: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    PathBuf::from(std::ffi::OsStr::from_bytes(path))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
