//! The operations of one thread in flight, and what is done when one ends: the next step, or the
//! same another way where a name turned out to be taken.

use std::collections::VecDeque;
use std::sync::Arc;

use lowtide_engine_core::op::{Refusal, Request};
use lowtide_engine_core::session::{Session, SessionError, Ticket};

use super::directory::Place;
use super::{StoreError, Thread, failed, lock};
use crate::error::TreeError;
use crate::layout::{Chunk, Entry, Ino, Inode, Kind};

/// Directories that one thread creates at a time; each is open until it is there.
const DIRECTORIES_MAX: usize = 16;

/// Operations of one thread in flight, oldest first.
pub(super) struct Window {
    open: VecDeque<Open>,
    bytes: usize,
    directories: usize,
    operations_max: usize,
    bytes_max: usize,
}

impl Window {
    pub fn new(operations_max: usize, bytes_max: usize) -> Window {
        Window {
            open: VecDeque::new(),
            bytes: 0,
            directories: 0,
            operations_max: operations_max.max(1),
            bytes_max,
        }
    }

    fn has_room_for(&self, what: &What) -> bool {
        let directory = matches!(what, What::Directory(..));
        self.open.len() < self.operations_max
            && self.bytes <= self.bytes_max
            && (!directory || self.directories < DIRECTORIES_MAX)
    }

    fn push(&mut self, open: Open) {
        self.bytes += open.weight();
        self.directories += usize::from(matches!(open.what, What::Directory(..)));
        self.open.push_back(open);
    }

    fn pop(&mut self) -> Option<Open> {
        let open = self.open.pop_front()?;
        self.bytes -= open.weight();
        self.directories -= usize::from(matches!(open.what, What::Directory(..)));
        Some(open)
    }
}

/// An operation in flight, with all it takes to do the same another way.
struct Open {
    ticket: Ticket,
    /// Directory of the name.
    place: Arc<Place>,
    directory: Ino,
    name: Vec<u8>,
    what: What,
}

/// What an operation does.
pub(super) enum What {
    /// Creates a file or symbolic link.
    Create(New, Ino),
    /// Gives a further name.
    Link(Entry),
    /// Creates the counterpart of a directory.
    Directory(Arc<Place>, Ino),
}

/// A file of at most one chunk, or a symbolic link, ready to be stored.
pub(super) struct New {
    pub inode: Inode,
    pub chunk: Option<Chunk>,
    /// Identity of a file with several names.
    pub identity: Option<(u64, u64)>,
}

impl Open {
    fn weight(&self) -> usize {
        match &self.what {
            What::Create(new, _) => new.chunk.as_ref().map_or(0, Chunk::len) + 512,
            What::Link(_) | What::Directory(..) => 512,
        }
    }
}

impl<S: Session + ?Sized> Thread<'_, '_, S> {
    /// Submits an operation on `name` in `directory`, the counterpart of `place`; before that
    /// finishes others as far as needed.
    pub(super) fn submit(
        &mut self,
        request: Request,
        place: &Arc<Place>,
        directory: Ino,
        name: &[u8],
        what: What,
    ) -> Result<(), StoreError> {
        while !self.window.has_room_for(&what) {
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
            place: Arc::clone(place),
            directory,
            name: name.to_vec(),
            what,
        });
        Ok(())
    }

    /// Waits for the oldest operation and does what follows from it; `false` when none is in flight.
    pub(super) fn finish_oldest(&mut self) -> Result<bool, StoreError> {
        let Some(open) = self.window.pop() else {
            return Ok(false);
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
            (Ok(_), What::Directory(place, ino)) => {
                self.run.tree.remember_directory(*ino);
                self.made(place, *ino);
                Ok(false) // told already
            }
            (
                Err(SessionError::Refused(Refusal::CheckFailed { .. } | Refusal::Full { .. })),
                what,
            ) => match what {
                What::Create(new, _) => self.replace_new(open.directory, &open.name, new),
                What::Link(target) => self
                    .replace_with_link(open.directory, &open.name, *target)
                    .map(|()| true),
                What::Directory(place, _) => {
                    self.open_or_make(place, open.directory).map(|()| false)
                }
            },
            (Err(e), _) => Err(e.into()),
        };
        let path = || open.place.path_of(&open.name);
        let is_news = outcome.map_err(|why| failed(&path(), why))?;
        if is_news {
            self.tell_executed(path);
        }
        Ok(true)
    }

    /// Stores something whose name may be taken; `false` if somebody has stored it by now.
    pub(super) fn replace_new(
        &mut self,
        directory: Ino,
        name: &[u8],
        new: &New,
    ) -> Result<bool, TreeError> {
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

    pub(super) fn replace_with_link(
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

/// Whether a stored inode is what is to be stored. Chunk sizes may differ between runs.
pub(super) fn is_same(stored: &Inode, expected: &Inode) -> bool {
    stored.kind == expected.kind
        && stored.attributes == expected.attributes
        && stored.size == expected.size
        && stored.target == expected.target
}
