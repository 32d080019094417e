//! Storing the entries of one directory that are not directories.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use lowtide_engine_core::session::Session;
use rustix::fs::Stat as FileStat;
use rustix::io::Errno;

use super::directory::Place;
use super::window::{New, What, is_same};
use super::{Later, StoreError, Task, Thread, failed, lock};
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
    /// Which entries of the listing.
    pub indices: Vec<usize>,
    /// What the tree already has, in the listing's order; `None` when it had nothing, or nobody
    /// looked.
    pub known: Option<Arc<Vec<Option<Entry>>>>,
    pub whose: Whose,
}

/// Who stores the entries of a directory. A file of several names is stored by whom its identity
/// says, wherever they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whose {
    /// This client.
    Mine,
    /// All clients, by ranges of slots.
    Divided,
    /// Another client.
    Foreign,
    /// Of another client's directory those that are this one's after all.
    Picked,
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
    pub(super) fn entries(&mut self, entries: Entries) -> Result<(), StoreError> {
        if entries.whose == Whose::Foreign {
            return self.pick(entries);
        }
        let known = |index: usize| entries.known.as_ref().and_then(|known| known[index]);
        let inos: Vec<Ino> = entries
            .indices
            .iter()
            .filter_map(|&index| known(index))
            .filter(|known| known.kind != Kind::Directory)
            .map(|known| known.ino)
            .collect();
        let stats = self
            .run
            .tree
            .stat_many(&inos)
            .map_err(|why| failed(&entries.place.path(), why))?;
        for &index in &entries.indices {
            let found = entries.listing.at(index);
            let here = Here {
                entries: &entries,
                name: found.name,
                known: known(index),
                stored: known(index)
                    .and_then(|known| stats.get(&known.ino))
                    .and_then(|stat| stat.as_ref().ok()),
            };
            let is_mine = match entries.whose {
                Whose::Divided => self.owns_slot(found.slot),
                _ => true,
            };
            match found.sort {
                Sort::Kind(Kind::Directory) => {}
                Sort::Special if is_mine => self.report.special.add(&here.path(), "special file"),
                Sort::Special => {}
                Sort::Kind(_) if !is_mine && !self.owns_names(&entries.fd, found.name) => {}
                Sort::Kind(Kind::Symlink) => self.symlink(&here)?,
                Sort::Kind(Kind::File) => self.file(&here)?,
            }
        }
        Ok(())
    }

    /// Looks among entries of another client's directory for names of files of this one's.
    fn pick(&mut self, mut entries: Entries) -> Result<(), StoreError> {
        entries.indices.retain(|&index| {
            let found = entries.listing.at(index);
            let is_candidate = matches!(found.sort, Sort::Kind(Kind::File | Kind::Symlink));
            is_candidate && self.owns_names(&entries.fd, found.name)
        });
        if entries.indices.is_empty() {
            return Ok(());
        }
        entries.whose = Whose::Picked;
        let place = Arc::clone(&entries.place);
        self.once_there(&place, Some(Task::Entries(entries)))
    }

    /// Whether an entry of a directory that all clients divide is this one's.
    fn owns_slot(&self, slot: u64) -> bool {
        self.run.options.share.slots().contains(&slot)
    }

    /// Whether this is one of several names of a file of this client's. If it cannot be told, its
    /// owner will notice.
    fn owns_names(&self, directory: &OwnedFd, name: &[u8]) -> bool {
        self.run.options.share.of > 1
            && input::stat_at(directory, name)
                .is_ok_and(|stat| stat.st_nlink > 1 && self.owns(&stat))
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

    /// The counterpart of a directory; tasks on what is in it begin only when it is there.
    fn directory_of(&self, place: &Place) -> Result<Ino, StoreError> {
        let there = place.data.there();
        there.map_or_else(
            || Err(failed(&place.path(), TreeError::NotFound)),
            |(ino, _)| Ok(ino),
        )
    }

    /// The directory of the tree that receives the name, without a directory of that name.
    fn ready_directory(&mut self, here: &Here<'_>) -> Result<Ino, StoreError> {
        let directory = self.directory_of(&here.entries.place)?;
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
    pub(super) fn remove_directory(&self, directory: Ino, name: &[u8]) -> Result<(), TreeError> {
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
        let (ino, mut request) = self
            .run
            .tree
            .request_create(directory, here.name, &new.inode, new.chunk.as_ref())
            .map_err(|why| failed(&here.path(), why))?;
        if here.entries.whose == Whose::Divided {
            // Once for all; asked for one by one, each name's lock would go from client to client.
            let slots = self.run.options.share.slots();
            request
                .locks
                .push(self.run.tree.names_lock(directory, slots));
        }
        let place = &here.entries.place;
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
        let Some((directory, is_fresh)) = later.place.data.there() else {
            let place = Arc::clone(&later.place);
            return self.once_there(&place, Some(Task::Link(later)));
        };
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
        let what = What::Link(target);
        self.submit(request, &later.place, directory, &later.name, what)
    }
}

/// What reading a small file came to.
enum Small {
    /// Inode, contents, and whether the file held still.
    Whole(Inode, Option<Chunk>, bool),
    /// It is no longer small.
    Grown(FileStat),
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
