//! Writing a tree out to a directory of this machine: contents, permissions, owners where
//! permitted, modification times to the nanosecond, symbolic and hard links.
//!
//! Threads create directories and files; hard links follow when all files are there, attributes
//! of directories last and from the leaves up, because creating an entry changes its directory's
//! modification time and a directory may forbid its owner to write.
//!
//! What is corrupt or missing in the tree is named and left out; the rest is written.
//!
//! Deliberately absent: overwriting. The target must be empty or new.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lowtide_engine_core::session::Session;
use rustix::fs::{AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;

use crate::compare::small_files;
use crate::error::TreeError;
use crate::input::{self, Listing};
use crate::layout::{Attributes, Chunk, Ino, Inode, Kind};
use crate::pool::{self, Pool, Worker};
use crate::report::{Notes, Progress};
use crate::store::default_threads;
use crate::tree::{DirEntry, Stat, Tree};

/// Entries of a directory fetched at a time.
const PAGE_ENTRIES: usize = 4096;
/// Entries that are one task.
const BATCH_ENTRIES: usize = 64;

/// How to fetch.
#[derive(Clone, Debug)]
pub struct FetchOptions {
    /// Directory of the tree to be written out.
    pub from: Ino,
    /// Threads that read and write.
    pub threads: usize,
}

impl Default for FetchOptions {
    fn default() -> FetchOptions {
        FetchOptions {
            from: Ino::ROOT,
            threads: default_threads(),
        }
    }
}

/// What was written out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FetchReport {
    /// Files.
    pub files: u64,
    /// Directories, the top included.
    pub directories: u64,
    /// Symbolic links.
    pub symlinks: u64,
    /// Further names of files and symbolic links.
    pub links: u64,
    /// Bytes of file contents.
    pub bytes: u64,
    /// Whether owners were restored; only the superuser may.
    pub owners_restored: bool,
    /// What the tree names but does not have whole.
    pub damaged: Notes,
}

/// Why fetching ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// The target directory has entries already.
    #[error("{path} is not empty")]
    NotEmpty {
        /// The target.
        path: PathBuf,
    },
    /// Something could not be written.
    #[error("cannot write {path}: {why}")]
    Output {
        /// Path within the target.
        path: PathBuf,
        /// Why.
        why: io::Error,
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

/// Writes a directory of the tree out as `to`, which must be empty or not exist.
///
/// # Errors
/// [`FetchError`]; what has been written by then stays.
pub fn fetch<S: Session + ?Sized>(
    tree: &Tree<'_, S>,
    to: &Path,
    options: &FetchOptions,
    progress: &Progress,
) -> Result<FetchReport, FetchError> {
    let root = open_target(to)?;
    let run = Run {
        tree,
        progress,
        restores_owners: rustix::process::geteuid().is_root(),
        directories: Mutex::default(),
        first_names: Mutex::default(),
        links: Mutex::default(),
    };
    let workers = (0..options.threads.max(1))
        .map(|_| Thread {
            run: &run,
            report: FetchReport::default(),
        })
        .collect();
    let seed = Task::Directory {
        fd: Arc::new(root.try_clone().map_err(|why| unwritable(b".", why))?),
        place: Place::root(()),
        holder: None,
        ino: options.from,
    };
    let mut report = FetchReport {
        owners_restored: run.restores_owners,
        ..FetchReport::default()
    };
    for thread in pool::run(vec![seed], workers)? {
        report.merge(thread.report);
    }
    run.make_links(&root, &mut report)?;
    run.finish_directories(&root)?;
    Ok(report)
}

impl FetchReport {
    fn merge(&mut self, other: FetchReport) {
        self.files += other.files;
        self.directories += other.directories;
        self.symlinks += other.symlinks;
        self.links += other.links;
        self.bytes += other.bytes;
        self.damaged.merge(other.damaged);
    }
}

type Place = input::Place<()>;

/// What all threads share.
struct Run<'r, 's, S: Session + ?Sized> {
    tree: &'r Tree<'s, S>,
    progress: &'r Progress,
    restores_owners: bool,
    /// Directories made so far, each after the one that holds it, with their final attributes.
    directories: Mutex<Vec<(Arc<Place>, Attributes)>>,
    /// Where the first name of an inode with several is.
    first_names: Mutex<HashMap<Ino, Name>>,
    /// Further names.
    links: Mutex<Vec<(Ino, Name)>>,
}

/// A name in a directory.
struct Name {
    place: Arc<Place>,
    name: Vec<u8>,
}

enum Task {
    /// An open, empty directory to be filled.
    Directory {
        fd: Arc<OwnedFd>,
        place: Arc<Place>,
        /// The stored directory that names it; `None` for the top.
        holder: Option<Ino>,
        ino: Ino,
    },
    /// Entries to be made in it.
    Entries {
        fd: Arc<OwnedFd>,
        place: Arc<Place>,
        holder: Ino,
        entries: Vec<DirEntry>,
    },
}

struct Thread<'r, 's, S: Session + ?Sized> {
    run: &'r Run<'r, 's, S>,
    report: FetchReport,
}

impl<S: Session + ?Sized> Worker<Task, FetchError> for Thread<'_, '_, S> {
    fn work(&mut self, task: Task, pool: &Pool<Task, FetchError>) -> Result<(), FetchError> {
        match task {
            Task::Directory {
                fd,
                place,
                holder,
                ino,
            } => self.directory(&fd, &place, (holder, ino), pool),
            Task::Entries {
                fd,
                place,
                holder,
                entries,
            } => self.entries(&fd, &place, (holder, entries), pool),
        }
    }

    fn settle(&mut self, _pool: &Pool<Task, FetchError>) -> Result<bool, FetchError> {
        Ok(false)
    }
}

impl<S: Session + ?Sized> Thread<'_, '_, S> {
    fn directory(
        &mut self,
        fd: &Arc<OwnedFd>,
        place: &Arc<Place>,
        (holder, ino): (Option<Ino>, Ino),
        pool: &Pool<Task, FetchError>,
    ) -> Result<(), FetchError> {
        let tree = self.run.tree;
        let Some(stat) = self.undamaged(&place.path(), tree.stat(ino))? else {
            return Ok(());
        };
        // Else directories could hold each other, and this would never end.
        if holder.is_some() && stat.parent != holder {
            self.report
                .damaged
                .add(&place.path(), "a directory that belongs elsewhere");
            return Ok(());
        }
        lock(&self.run.directories).push((Arc::clone(place), stat.inode.attributes));
        self.report.directories += 1;
        self.run.progress.entry(0, 0);
        let mut cursor = None;
        loop {
            let page = tree.readdir(ino, cursor.as_ref(), PAGE_ENTRIES);
            let Some(mut page) = self.undamaged(&place.path(), page)? else {
                return Ok(());
            };
            for key in &page.damaged {
                let path = place.path_of(&key.name);
                self.report.damaged.add(&path, "corrupt entry");
            }
            // Neighbours in number were made together and are read together.
            page.entries.sort_unstable_by_key(|e| e.entry.ino);
            while !page.entries.is_empty() {
                let rest = page.entries.len().saturating_sub(BATCH_ENTRIES);
                pool.push(Task::Entries {
                    fd: Arc::clone(fd),
                    place: Arc::clone(place),
                    holder: ino,
                    entries: page.entries.split_off(rest),
                });
            }
            cursor = page.next;
            if cursor.is_none() {
                return Ok(());
            }
        }
    }

    fn entries(
        &mut self,
        fd: &Arc<OwnedFd>,
        place: &Arc<Place>,
        (holder, entries): (Ino, Vec<DirEntry>),
        pool: &Pool<Task, FetchError>,
    ) -> Result<(), FetchError> {
        let tree = self.run.tree;
        let in_tree = |why| FetchError::Tree {
            path: as_path(&place.path()),
            why,
        };
        let (directories, others): (Vec<_>, Vec<_>) = entries
            .into_iter()
            .partition(|e| e.entry.kind == Kind::Directory);
        for e in directories {
            let path = place.path_of(&e.name);
            let made = make_directory(fd, &e.name).map_err(|why| unwritable(&path, why))?;
            pool.push(Task::Directory {
                fd: Arc::new(made),
                place: Place::below(place, &e.name, ()),
                holder: Some(holder),
                ino: e.entry.ino,
            });
        }
        let inos: Vec<Ino> = others.iter().map(|e| e.entry.ino).collect();
        let mut stats = tree.stat_many(&inos).map_err(in_tree)?;
        let small = small_files(&stats);
        let mut chunks = tree.read_many(&small).map_err(in_tree)?;
        for e in &others {
            // Taken, not borrowed: a further name in this batch finds its inode in the table.
            let ino = e.entry.ino;
            let stat = match stats.remove(&ino) {
                Some(stat) => stat,
                None => tree.stat(ino),
            };
            let Some(stat) = self.undamaged(&place.path_of(&e.name), stat)? else {
                continue;
            };
            self.entry(fd, place, e, &stat, chunks.remove(&ino))?;
        }
        Ok(())
    }

    fn entry(
        &mut self,
        fd: &Arc<OwnedFd>,
        place: &Arc<Place>,
        e: &DirEntry,
        stat: &Stat,
        chunk: Option<Chunk>,
    ) -> Result<(), FetchError> {
        let ino = e.entry.ino;
        if stat.count > 1 && !self.claim_first_name(ino, place, &e.name) {
            return Ok(());
        }
        let path = place.path_of(&e.name);
        if stat.inode.kind != e.entry.kind {
            self.report.damaged.add(&path, "not of its entry's kind");
            return Ok(());
        }
        match stat.inode.kind {
            Kind::Symlink => {
                self.symlink(fd, &e.name, &stat.inode)
                    .map_err(|why| unwritable(&path, why))?;
                self.report.symlinks += 1;
                self.run.progress.entry(0, 0);
            }
            _ => {
                let written = self.file(fd, &e.name, ino, &stat.inode, chunk);
                let written = match written {
                    Err(Failure::Output(why)) => return Err(unwritable(&path, why)),
                    Err(Failure::Tree(why)) => self.undamaged(&path, Err(why))?,
                    Ok(()) => Some(()),
                };
                if written.is_some() {
                    self.report.files += 1;
                    self.report.bytes += stat.inode.size;
                    self.run.progress.entry(stat.inode.size, 0);
                }
            }
        }
        Ok(())
    }

    /// Whether this is the first name seen of an inode with several; other names are noted.
    fn claim_first_name(&self, ino: Ino, place: &Arc<Place>, name: &[u8]) -> bool {
        let here = Name {
            place: Arc::clone(place),
            name: name.to_vec(),
        };
        let mut first_names = lock(&self.run.first_names);
        if first_names.contains_key(&ino) {
            lock(&self.run.links).push((ino, here));
            return false;
        }
        first_names.insert(ino, here);
        true
    }

    fn symlink(&self, fd: &OwnedFd, name: &[u8], inode: &Inode) -> io::Result<()> {
        let name = input::c_name(name)?;
        rustix::fs::symlinkat(input::c_name(&inode.target)?, fd, &name)?;
        let a = &inode.attributes;
        if self.run.restores_owners {
            let (uid, gid) = owner(a);
            rustix::fs::chownat(fd, &name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
        }
        rustix::fs::utimensat(fd, &name, &times(a), AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(())
    }

    fn file(
        &self,
        fd: &OwnedFd,
        name: &[u8],
        ino: Ino,
        inode: &Inode,
        chunk: Option<Chunk>,
    ) -> Result<(), Failure> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let name = input::c_name(name)?;
        let made = rustix::fs::openat(fd, &name, flags, Mode::RUSR | Mode::WUSR)?;
        let mut file = File::from(made);
        let written = match chunk {
            Some(chunk) => write_chunk(&mut file, &chunk).map_err(Failure::Output),
            None => self.contents(&mut file, ino, inode),
        };
        if let Err(Failure::Tree(_)) = &written {
            // No half files where the tree is damaged.
            rustix::fs::unlinkat(fd, &name, AtFlags::empty())?;
        }
        written?;
        // A file that ends in zeros, which were skipped, is not as long as it should be.
        file.set_len(inode.size)?;
        self.finish(file.as_fd(), &inode.attributes)?;
        Ok(())
    }

    fn contents(&self, file: &mut File, ino: Ino, inode: &Inode) -> Result<(), Failure> {
        let mut reader = self.run.tree.reader(ino, inode.clone());
        while let Some(chunk) = reader.next_chunk().map_err(Failure::Tree)? {
            write_chunk(file, &chunk)?;
        }
        Ok(())
    }

    fn finish(&self, fd: std::os::fd::BorrowedFd<'_>, attributes: &Attributes) -> io::Result<()> {
        self.run.finish(fd, attributes)
    }

    /// What was read from the tree, unless it is damaged; that is noted.
    fn undamaged<T>(
        &mut self,
        path: &[u8],
        read: Result<T, TreeError>,
    ) -> Result<Option<T>, FetchError> {
        match read {
            Ok(read) => Ok(Some(read)),
            Err(
                why @ (TreeError::Corrupt { .. } | TreeError::NotFound | TreeError::NotADirectory),
            ) => {
                self.report.damaged.add(path, why.to_string());
                Ok(None)
            }
            Err(why) => Err(FetchError::Tree {
                path: as_path(path),
                why,
            }),
        }
    }
}

impl<S: Session + ?Sized> Run<'_, '_, S> {
    fn make_links(&self, root: &OwnedFd, report: &mut FetchReport) -> Result<(), FetchError> {
        let first_names = lock(&self.first_names);
        for (ino, Name { place, name }) in lock(&self.links).iter() {
            let Some(first) = first_names.get(ino) else {
                continue;
            };
            let path = place.path_of(name);
            let linked = (|| {
                let from = input::open_beneath(root, &first.place.path())?;
                let to = input::open_beneath(root, &place.path())?;
                let (old, new) = (input::c_name(&first.name)?, input::c_name(name)?);
                rustix::fs::linkat(from, old, to, new, AtFlags::empty())
            })();
            match linked {
                Ok(()) => {
                    report.links += 1;
                    self.progress.entry(0, 0);
                }
                // The first name was damaged and not written.
                Err(Errno::NOENT) => report.damaged.add(&path, "another name of a damaged file"),
                Err(why) => return Err(unwritable(&path, why)),
            }
        }
        Ok(())
    }

    fn finish_directories(&self, root: &OwnedFd) -> Result<(), FetchError> {
        for (place, attributes) in lock(&self.directories).iter().rev() {
            let path = place.path();
            input::open_beneath(root, &path)
                .map_err(io::Error::from)
                .and_then(|fd| self.finish(fd.as_fd(), attributes))
                .map_err(|why| unwritable(&path, why))?;
        }
        Ok(())
    }

    /// Gives a finished file or directory its attributes. The owner first, because a change of
    /// owner clears set-user and set-group bits.
    fn finish(&self, fd: std::os::fd::BorrowedFd<'_>, a: &Attributes) -> io::Result<()> {
        if self.restores_owners {
            let (uid, gid) = owner(a);
            rustix::fs::fchown(fd, uid, gid)?;
        }
        rustix::fs::fchmod(fd, Mode::from_raw_mode(a.mode.into()))?;
        rustix::fs::futimens(fd, &times(a))?;
        Ok(())
    }
}

enum Failure {
    Tree(TreeError),
    Output(io::Error),
}

impl From<io::Error> for Failure {
    fn from(why: io::Error) -> Failure {
        Failure::Output(why)
    }
}

impl From<Errno> for Failure {
    fn from(why: Errno) -> Failure {
        Failure::Output(why.into())
    }
}

fn open_target(to: &Path) -> Result<OwnedFd, FetchError> {
    let unwritable = |why: io::Error| FetchError::Output {
        path: to.to_path_buf(),
        why,
    };
    match std::fs::create_dir(to) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(unwritable(e)),
        _ => {}
    }
    let fd = input::open_root(to).map_err(|e| unwritable(e.into()))?;
    let listing = Listing::of(&fd).map_err(|e| unwritable(e.into()))?;
    if listing.len() > 0 {
        return Err(FetchError::NotEmpty {
            path: to.to_path_buf(),
        });
    }
    Ok(fd)
}

/// Makes a directory that only its owner may use until it gets its own attributes.
fn make_directory(parent: &OwnedFd, name: &[u8]) -> Result<OwnedFd, Errno> {
    rustix::fs::mkdirat(parent, input::c_name(name)?, Mode::RWXU)?;
    input::open_directory(parent, name)
}

/// Writes a chunk at the file's position; zeros are skipped and become a hole.
fn write_chunk(file: &mut File, chunk: &Chunk) -> io::Result<()> {
    match chunk.contents() {
        Some(contents) => file.write_all(contents),
        None => file.seek(SeekFrom::Current(chunk.len() as i64)).map(|_| ()),
    }
}

/// Owner and group for chown; the number that means "unchanged" there is nobody's.
fn owner(a: &Attributes) -> (Option<Uid>, Option<Gid>) {
    (
        (a.uid != u32::MAX).then(|| Uid::from_raw(a.uid)),
        (a.gid != u32::MAX).then(|| Gid::from_raw(a.gid)),
    )
}

fn times(a: &Attributes) -> Timestamps {
    let mtime = Timespec {
        tv_sec: a.mtime_sec,
        tv_nsec: i64::from(a.mtime_nsec),
    };
    Timestamps {
        last_access: mtime,
        last_modification: mtime,
    }
}

fn unwritable(path: &[u8], why: impl Into<io::Error>) -> FetchError {
    FetchError::Output {
        path: as_path(path),
        why: why.into(),
    }
}

fn as_path(path: &[u8]) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(path))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
