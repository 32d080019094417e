//! Storing the entries of one directory that are not directories, and the window of operations
//! in flight.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use lowtide_engine_core::op::Refusal;
use lowtide_engine_core::session::{Session, SessionError, Ticket};
use rustix::fs::Stat as FileStat;
use rustix::io::Errno;

use super::{Later, Place, StoreError, Thread, failed, lock};
use crate::error::TreeError;
use crate::input::{self, Listing, Sort};
use crate::layout::{Chunk, Entry, Ino, Inode, Kind, mix};
use crate::tree::{Stat, symlink_inode};

/// How often a file that changes while it is read is read.
const READS_MAX: u32 = 3;

/// Some entries of one directory.
pub(super) struct Entries {
    pub fd: Arc<OwnedFd>,
    pub place: Arc<Place>,
    pub listing: Arc<Listing>,
    pub range: Range<usize>,
    /// What the tree already has, in the listing's order; `None` when it had nothing.
    pub known: Option<Arc<Vec<Option<Entry>>>>,
    /// Whether the directory is this client's.
    pub is_mine: bool,
    /// Whether all clients divide it.
    pub is_split: bool,
}

/// Operations of one thread in flight, oldest first.
pub(super) struct Window {
    open: VecDeque<Open>,
    bytes: usize,
    operations_max: usize,
    bytes_max: usize,
}

impl Window {
    pub fn new(operations_max: usize, bytes_max: usize) -> Window {
        Window {
            open: VecDeque::new(),
            bytes: 0,
            operations_max: operations_max.max(1),
            bytes_max,
        }
    }

    fn is_full(&self) -> bool {
        self.open.len() >= self.operations_max || self.bytes > self.bytes_max
    }

    fn push(&mut self, open: Open) {
        self.bytes += open.weight();
        self.open.push_back(open);
    }

    fn pop(&mut self) -> Option<Open> {
        let open = self.open.pop_front()?;
        self.bytes -= open.weight();
        Some(open)
    }
}

/// An operation in flight, with all it takes to do the same another way.
struct Open {
    ticket: Ticket,
    place: Arc<Place>,
    directory: Ino,
    name: Vec<u8>,
    what: What,
}

enum What {
    Create(New, Ino),
    Link(Entry),
}

/// A file of at most one chunk, or a symbolic link, ready to be stored.
struct New {
    inode: Inode,
    chunk: Option<Chunk>,
    /// Identity of a file with several names.
    identity: Option<(u64, u64)>,
}

impl Open {
    fn weight(&self) -> usize {
        match &self.what {
            What::Create(new, _) => new.chunk.as_ref().map_or(0, Chunk::len) + 512,
            What::Link(_) => 512,
        }
    }
}

/// One name of the directory being stored.
struct Here<'e> {
    entries: &'e Entries,
    name: &'e [u8],
    known: Option<Entry>,
    /// Attributes of what is known.
    stored: Option<&'e Stat>,
}

impl Here<'_> {
    fn path(&self) -> Vec<u8> {
        self.entries.place.path_of(self.name)
    }
}

impl<S: Session + ?Sized> Thread<'_, '_, S> {
    pub(super) fn entries(&mut self, entries: &Entries) -> Result<(), StoreError> {
        let share = self.run.options.share;
        let known = |index: usize| entries.known.as_ref().and_then(|known| known[index]);
        let inos: Vec<Ino> = entries
            .range
            .clone()
            .filter_map(known)
            .filter(|known| known.kind != Kind::Directory)
            .map(|known| known.ino)
            .collect();
        let stats = self
            .run
            .tree
            .stat_many(&inos)
            .map_err(|why| failed(&entries.place.path(), why))?;
        for index in entries.range.clone() {
            let found = entries.listing.at(index);
            let is_mine = if entries.is_split {
                let owner = (u128::from(found.slot) * u128::from(share.of)) >> 64;
                owner == u128::from(share.index)
            } else {
                entries.is_mine
            };
            let here = Here {
                entries,
                name: found.name,
                known: known(index),
                stored: known(index)
                    .and_then(|known| stats.get(&known.ino))
                    .and_then(|stat| stat.as_ref().ok()),
            };
            match found.sort {
                Sort::Kind(Kind::Directory) => {}
                Sort::Special => {
                    if is_mine {
                        self.report.special.add(&here.path(), "special file");
                    }
                }
                Sort::Kind(_) if !is_mine => self.foreign(&here)?,
                Sort::Kind(Kind::Symlink) => self.symlink(&here)?,
                Sort::Kind(Kind::File) => self.file(&here)?,
            }
        }
        Ok(())
    }

    /// An entry of another client's: ours only if it is one of several names of a file of ours.
    fn foreign(&mut self, here: &Here<'_>) -> Result<(), StoreError> {
        if self.run.options.share.of == 1 {
            return Ok(());
        }
        match input::stat_at(&here.entries.fd, here.name) {
            Ok(stat) if stat.st_nlink > 1 && self.owns(&stat) => match input::sort_of(&stat) {
                Sort::Kind(Kind::File) => self.file(here),
                Sort::Kind(Kind::Symlink) => self.symlink(here),
                _ => Ok(()),
            },
            _ => Ok(()), // its owner will notice
        }
    }

    /// Whether a file of several names is stored by this client.
    fn owns(&self, stat: &FileStat) -> bool {
        let (device, number) = input::identity(stat);
        let share = self.run.options.share;
        mix(mix(device) ^ number) % u64::from(share.of) == u64::from(share.index)
    }

    fn symlink(&mut self, here: &Here<'_>) -> Result<(), StoreError> {
        let fd = &here.entries.fd;
        let read = input::stat_at(fd, here.name)
            .and_then(|stat| Ok((stat, input::read_link(fd, here.name)?)));
        let (stat, target) = match read {
            Ok(read) => read,
            Err(Errno::INVAL) => {
                self.report.changed.add(&here.path(), "no longer a symlink");
                return Ok(());
            }
            Err(why) => {
                self.not_read(&here.path(), why);
                return Ok(());
            }
        };
        let inode = symlink_inode(&target, &input::attributes(&stat))
            .map_err(|why| failed(&here.path(), why))?;
        if self.is_elsewhere(here, &stat) || self.is_equal(here, &stat, &inode) {
            return Ok(());
        }
        let identity = (stat.st_nlink > 1).then(|| input::identity(&stat));
        self.submit_new(
            here,
            New {
                inode,
                chunk: None,
                identity,
            },
        )
    }

    fn file(&mut self, here: &Here<'_>) -> Result<(), StoreError> {
        let opened = input::open_file(&here.entries.fd, here.name)
            .and_then(|file| Ok((rustix::fs::fstat(&file)?, file)));
        let (stat, mut file) = match opened {
            Ok(opened) => opened,
            Err(why) => {
                self.not_read(&here.path(), why);
                return Ok(());
            }
        };
        if input::sort_of(&stat) != Sort::Kind(Kind::File) {
            self.report.changed.add(&here.path(), "no longer a file");
            return Ok(());
        }
        if self.is_elsewhere(here, &stat) {
            return Ok(());
        }
        let expected = self
            .run
            .tree
            .file_inode(stat.st_size as u64, &input::attributes(&stat))
            .map_err(|why| failed(&here.path(), why))?;
        if self.is_equal(here, &stat, &expected) {
            return Ok(());
        }
        if expected.chunks() > 1 {
            return self.large_file(here, stat, file);
        }
        match self.read_small(&mut file, stat) {
            Ok(Small::Whole(inode, chunk, is_still)) => {
                if !is_still {
                    self.report.changed.add(&here.path(), "changed while read");
                }
                let identity = (stat.st_nlink > 1).then(|| input::identity(&stat));
                self.submit_new(
                    here,
                    New {
                        inode,
                        chunk,
                        identity,
                    },
                )
            }
            Ok(Small::Grown(stat)) => match input::open_file(&here.entries.fd, here.name) {
                Ok(file) => self.large_file(here, stat, file),
                Err(why) => {
                    self.forget(&stat);
                    self.not_read(&here.path(), why);
                    Ok(())
                }
            },
            Err(why) => {
                self.forget(&stat);
                self.report.unreadable.add(&here.path(), why.to_string());
                Ok(())
            }
        }
    }

    /// Whether a file of several names is another client's, or its first name is stored already;
    /// the further name then waits.
    fn is_elsewhere(&mut self, here: &Here<'_>, stat: &FileStat) -> bool {
        if stat.st_nlink <= 1 {
            return false;
        }
        if !self.owns(stat) {
            return true;
        }
        let identity = input::identity(stat);
        let mut links = lock(&self.run.links);
        if links.contains_key(&identity) {
            lock(&self.run.later).push(Later {
                place: Arc::clone(&here.entries.place),
                name: here.name.to_vec(),
                identity,
            });
            return true;
        }
        links.insert(identity, None);
        false
    }

    /// The first name of a file could not be stored; the next one may try.
    fn forget(&self, stat: &FileStat) {
        lock(&self.run.links).remove(&input::identity(stat));
    }

    /// Whether the tree has this entry already; it is done then.
    fn is_equal(&mut self, here: &Here<'_>, stat: &FileStat, expected: &Inode) -> bool {
        let (Some(known), Some(stored)) = (here.known, here.stored) else {
            return false;
        };
        let is_equal = is_same(&stored.inode, expected) && (stored.count == 1 || stat.st_nlink > 1);
        if is_equal {
            if stat.st_nlink > 1 {
                lock(&self.run.links).insert(input::identity(stat), Some(known));
            }
            self.report.skipped += 1;
            self.run.progress.equal();
        }
        is_equal
    }

    /// Reads a file of at most one chunk, again if it changes meanwhile.
    fn read_small(&mut self, file: &mut File, mut stat: FileStat) -> io::Result<Small> {
        for attempt in 1.. {
            let inode = self
                .run
                .tree
                .file_inode(stat.st_size as u64, &input::attributes(&stat))
                .map_err(io::Error::other)?;
            if inode.chunks() > 1 {
                return Ok(Small::Grown(stat));
            }
            let size = inode.size as usize;
            if self.buffer.len() <= size {
                self.buffer.resize(size + 1, 0);
            }
            let length = input::read_full(file, &mut self.buffer[1..=size])?;
            let after = rustix::fs::fstat(&*file)?;
            let is_still = length == size && input::is_unchanged(&stat, &after);
            if is_still || attempt == READS_MAX {
                let chunk = (length > 0).then(|| Chunk::from_framed(&mut self.buffer[..=length]));
                let inode = Inode {
                    size: length as u64,
                    ..inode
                };
                return Ok(Small::Whole(inode, chunk, is_still));
            }
            io::Seek::rewind(file)?;
            stat = after;
        }
        unreachable!("the loop returns at its last attempt")
    }

    /// Stores a file of several chunks, before going on.
    fn large_file(
        &mut self,
        here: &Here<'_>,
        mut stat: FileStat,
        mut file: File,
    ) -> Result<(), StoreError> {
        let tree = self.run.tree;
        for attempt in 1.. {
            let directory = self.ready_directory(here)?;
            let mut counted = Counted {
                file: &mut file,
                bytes: 0,
            };
            let attributes = input::attributes(&stat);
            let outcome = tree.replace(directory, here.name, &attributes, &mut counted);
            let bytes = counted.bytes;
            let ino = match outcome {
                Ok(ino) => Some(ino),
                Err(TreeError::Contended) if attempt < READS_MAX => None,
                Err(TreeError::Input(why)) => {
                    self.forget(&stat);
                    self.report.unreadable.add(&here.path(), why.to_string());
                    return Ok(());
                }
                Err(why) => return Err(failed(&here.path(), why)),
            };
            let after = rustix::fs::fstat(&file);
            let is_still = after
                .as_ref()
                .is_ok_and(|after| input::is_unchanged(&stat, after))
                && bytes == stat.st_size as u64;
            if let Some(ino) = ino
                && (is_still || attempt == READS_MAX)
            {
                if !is_still {
                    self.report.changed.add(&here.path(), "changed while read");
                }
                if stat.st_nlink > 1 {
                    let kind = Kind::File;
                    lock(&self.run.links).insert(input::identity(&stat), Some(Entry { ino, kind }));
                }
                self.report.files += 1;
                self.report.bytes += bytes;
                self.run.progress.entry(bytes, 1);
                self.tell_executed(|| here.path());
                return Ok(());
            }
            if let Err(why) = io::Seek::rewind(&mut file) {
                self.forget(&stat);
                self.report.unreadable.add(&here.path(), why.to_string());
                return Ok(());
            }
            stat = after.unwrap_or(stat);
        }
        unreachable!("the loop returns at its last attempt")
    }

    /// The directory of the tree that receives the name, without a directory of that name.
    fn ready_directory(&mut self, here: &Here<'_>) -> Result<Ino, StoreError> {
        let (directory, _) = self.ensure(&here.entries.place)?;
        if here
            .known
            .is_some_and(|known| known.kind == Kind::Directory)
        {
            self.remove_directory(directory, here.name)
                .map_err(|why| failed(&here.path(), why))?;
        }
        Ok(directory)
    }

    /// Removes a directory that stands where something else has to.
    fn remove_directory(&self, directory: Ino, name: &[u8]) -> Result<(), TreeError> {
        match self.run.tree.lookup(directory, name) {
            Ok(entry) if entry.kind == Kind::Directory => {
                match self.run.tree.remove_all(directory, name) {
                    Err(TreeError::NotFound) => Ok(()),
                    other => other,
                }
            }
            Ok(_) | Err(TreeError::NotFound) => Ok(()),
            Err(e) => Err(e),
        }
    }

    fn submit_new(&mut self, here: &Here<'_>, new: New) -> Result<(), StoreError> {
        let directory = self.ready_directory(here)?;
        if here.known.is_some() {
            let stored = self
                .replace_new(directory, here.name, &new)
                .map_err(|why| failed(&here.path(), why))?;
            if stored {
                self.tell_executed(|| here.path());
            }
            return Ok(());
        }
        let (ino, request) = self
            .run
            .tree
            .request_create(directory, here.name, &new.inode, new.chunk.as_ref())
            .map_err(|why| failed(&here.path(), why))?;
        let place = Arc::clone(&here.entries.place);
        self.submit(request, place, directory, here.name, What::Create(new, ino))
    }

    /// A further name of a file that is stored by now.
    pub(super) fn link(&mut self, later: Later) -> Result<(), StoreError> {
        let target = lock(&self.run.links)
            .get(&later.identity)
            .copied()
            .flatten();
        let path = later.place.path_of(&later.name);
        let Some(target) = target else {
            self.report
                .unreadable
                .add(&path, "another name of an unreadable file");
            return Ok(());
        };
        let (directory, is_fresh) = self.ensure(&later.place)?;
        if !is_fresh {
            // An interrupted run may have begun to store the file under this name.
            self.run
                .tree
                .abandon(directory, &later.name)
                .map_err(|why| failed(&path, why))?;
            self.replace_with_link(directory, &later.name, target)
                .map_err(|why| failed(&path, why))?;
            self.tell_executed(|| path);
            return Ok(());
        }
        let request = self
            .run
            .tree
            .request_link(directory, &later.name, target)
            .map_err(|why| failed(&path, why))?;
        self.submit(
            request,
            later.place,
            directory,
            &later.name,
            What::Link(target),
        )
    }

    fn submit(
        &mut self,
        request: lowtide_engine_core::op::Request,
        place: Arc<Place>,
        directory: Ino,
        name: &[u8],
        what: What,
    ) -> Result<(), StoreError> {
        while self.window.is_full() {
            self.finish_oldest()?;
        }
        let ticket = self
            .run
            .tree
            .session()
            .submit(request)
            .map_err(|e| failed(&place.path_of(name), e.into()))?;
        self.window.push(Open {
            ticket,
            place,
            directory,
            name: name.to_vec(),
            what,
        });
        Ok(())
    }

    pub(super) fn settle_window(&mut self) -> Result<(), StoreError> {
        while !self.window.open.is_empty() {
            self.finish_oldest()?;
        }
        Ok(())
    }

    fn finish_oldest(&mut self) -> Result<(), StoreError> {
        let Some(open) = self.window.pop() else {
            return Ok(());
        };
        let waited = self.run.tree.session().wait(open.ticket);
        let outcome = match (waited, &open.what) {
            (Ok(_), What::Create(new, ino)) => {
                self.created(new, *ino);
                Ok(true)
            }
            (Ok(_), What::Link(_)) => {
                self.linked();
                Ok(true)
            }
            (
                Err(SessionError::Refused(Refusal::CheckFailed { .. } | Refusal::Full { .. })),
                what,
            ) => match what {
                What::Create(new, _) => self.replace_new(open.directory, &open.name, new),
                What::Link(target) => self
                    .replace_with_link(open.directory, &open.name, *target)
                    .map(|()| true),
            },
            (Err(e), _) => Err(e.into()),
        };
        let path = || open.place.path_of(&open.name);
        let stored = outcome.map_err(|why| failed(&path(), why))?;
        if stored {
            self.tell_executed(path);
        }
        Ok(())
    }

    /// Stores something whose name may be taken; `false` if somebody has stored it by now.
    fn replace_new(&mut self, directory: Ino, name: &[u8], new: &New) -> Result<bool, TreeError> {
        let tree = self.run.tree;
        loop {
            if let Some(entry) = self.equal_by_now(directory, name, new)? {
                if let Some(identity) = new.identity {
                    lock(&self.run.links).insert(identity, Some(entry));
                }
                self.report.skipped += 1;
                self.run.progress.equal();
                return Ok(false);
            }
            match tree.replace_whole(directory, name, &new.inode, new.chunk.as_ref()) {
                Ok(ino) => {
                    self.created(new, ino);
                    return Ok(true);
                }
                Err(TreeError::IsADirectory) => self.remove_directory(directory, name)?,
                Err(e) => return Err(e),
            }
        }
    }

    /// What stands at a name by now, if it equals what should.
    fn equal_by_now(
        &self,
        directory: Ino,
        name: &[u8],
        new: &New,
    ) -> Result<Option<Entry>, TreeError> {
        let tree = self.run.tree;
        let found = tree
            .lookup(directory, name)
            .and_then(|entry| Ok((entry, tree.stat(entry.ino)?)));
        match found {
            Ok((entry, stored)) => {
                let counts = stored.count == 1 || new.identity.is_some();
                Ok((counts && is_same(&stored.inode, &new.inode)).then_some(entry))
            }
            Err(TreeError::NotFound) => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn replace_with_link(
        &mut self,
        directory: Ino,
        name: &[u8],
        target: Entry,
    ) -> Result<(), TreeError> {
        loop {
            match self.run.tree.replace_link(directory, name, target) {
                Ok(()) => {
                    self.linked();
                    return Ok(());
                }
                Err(TreeError::IsADirectory) => self.remove_directory(directory, name)?,
                Err(e) => return Err(e),
            }
        }
    }

    fn created(&mut self, new: &New, ino: Ino) {
        let kind = new.inode.kind;
        if let Some(identity) = new.identity {
            lock(&self.run.links).insert(identity, Some(Entry { ino, kind }));
        }
        let bytes = match kind {
            Kind::File => new.inode.size,
            _ => 0,
        };
        match kind {
            Kind::File => self.report.files += 1,
            Kind::Symlink => self.report.symlinks += 1,
            Kind::Directory => self.report.directories += 1,
        }
        self.report.bytes += bytes;
        self.run.progress.entry(bytes, 1);
    }

    fn linked(&mut self) {
        self.report.links += 1;
        self.run.progress.entry(0, 1);
    }
}

/// What reading a small file came to.
enum Small {
    /// Inode, contents, and whether the file held still.
    Whole(Inode, Option<Chunk>, bool),
    /// It is no longer small.
    Grown(FileStat),
}

/// Whether a stored inode is what is to be stored. Chunk sizes may differ between runs.
fn is_same(stored: &Inode, expected: &Inode) -> bool {
    stored.kind == expected.kind
        && stored.attributes == expected.attributes
        && stored.size == expected.size
        && stored.target == expected.target
}

/// A file that counts what is read from it.
struct Counted<'f> {
    file: &'f mut File,
    bytes: u64,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.file.read(buffer)?;
        self.bytes += length as u64;
        Ok(length)
    }
}
