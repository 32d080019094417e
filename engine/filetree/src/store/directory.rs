//! Directories of the input and their counterparts in the tree: looking, dividing, creating.
//!
//! A counterpart is created once that of the parent is there, and what needs it waits with it: a
//! thread that comes to something whose directory is not there leaves it as a task and goes on.
//! Directories of this client are opened only when their parent's counterpart is there, and few are
//! created at a time, so few are open at a time.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, OnceLock};

use lowtide_engine_core::session::Session;

use super::entry::{Entries, Whose};
use super::window::What;
use super::{Share, StoreError, Task, Thread, failed, lock};
use crate::error::TreeError;
use crate::input::{self, Listing, Sort};
use crate::layout::{self, Attributes, Entry, Ino, Kind, mix};
use crate::tree::AttributeChange;

/// Directories with more entries than this are divided among the clients of a share.
const SPLIT_ENTRIES: usize = 4096;
/// Entries of one directory that are one task.
const BATCH_ENTRIES: usize = 64;
/// Subtrees for each client of a share, about: enough to divide evenly. Below them clients do not
/// meet, so no lock goes from one to the other.
const SUBTREES: usize = 256;
/// Entries of a directory read from the tree at a time.
const PAGE_ENTRIES: usize = 4096;

/// A directory of the input, with its counterpart in the tree.
pub(super) type Place = input::Place<Made>;

/// What the walk knows of a directory.
pub(super) struct Made {
    subtree: Subtree,
    attributes: OnceLock<Attributes>,
    counterpart: Mutex<Counterpart>,
}

impl Made {
    pub fn root() -> Made {
        Made::new(Subtree { hash: 0, width: 1 })
    }

    fn new(subtree: Subtree) -> Made {
        Made {
            subtree,
            attributes: OnceLock::new(),
            counterpart: Mutex::new(Counterpart::Unasked),
        }
    }

    /// The directory in the tree if it is there, and whether this run created it, so that it was
    /// empty.
    pub fn there(&self) -> Option<(Ino, bool)> {
        match *lock(&self.counterpart) {
            Counterpart::There(ino, is_fresh) => Some((ino, is_fresh)),
            _ => None,
        }
    }
}

/// The directory in the tree.
enum Counterpart {
    /// Nobody has asked for it.
    Unasked,
    /// It is being created; what waits for it.
    Asked(Vec<Task>),
    /// It is there; whether this run created it.
    There(Ino, bool),
}

/// The subtree that a directory belongs to, by which shares divide directories. All clients must
/// come to the same one, whatever else they know.
#[derive(Clone, Copy, Debug)]
struct Subtree {
    hash: u64,
    /// How many subtrees there are at this depth, if everything is as wide as it is here.
    width: usize,
}

impl Subtree {
    fn is_of(self, share: Share) -> bool {
        self.hash % u64::from(share.of) == u64::from(share.index)
    }

    /// That of one of `directories` within this directory.
    fn child(self, slot: u64, directories: usize, share: Share) -> Subtree {
        if self.width >= SUBTREES.saturating_mul(share.of as usize) {
            return self;
        }
        Subtree {
            hash: mix(self.hash ^ slot),
            width: self.width.saturating_mul(directories),
        }
    }
}

/// A directory that a task may open.
pub(super) enum Unopened {
    Root(OwnedFd),
    In(Arc<OwnedFd>),
}

/// A directory that has been read.
pub(super) struct Listed {
    fd: Arc<OwnedFd>,
    listing: Listing,
    place: Arc<Place>,
    whose: Whose,
}

impl<S: Session + ?Sized> Thread<'_, '_, S> {
    /// Lists a directory.
    pub(super) fn directory(
        &mut self,
        unopened: Unopened,
        place: Arc<Place>,
    ) -> Result<(), StoreError> {
        let share = self.run.options.share;
        let is_mine = place.data.subtree.is_of(share);
        if is_mine
            && let Some(parent) = place.parent().cloned()
            && parent.data.there().is_none()
        {
            let task = Task::Directory(unopened, place);
            return self.once_there(&parent, Some(task));
        }
        match open_and_list(unopened, &place) {
            Ok((fd, listing)) => {
                let whose = if share.of > 1 && listing.len() > SPLIT_ENTRIES {
                    Whose::Divided
                } else if is_mine {
                    Whose::Mine
                } else {
                    Whose::Foreign
                };
                let listed = Listed {
                    fd: Arc::new(fd),
                    listing,
                    place: Arc::clone(&place),
                    whose,
                };
                match whose {
                    Whose::Foreign => self.listed(listed),
                    _ => self.once_there(&place, Some(Task::Listed(listed))),
                }
            }
            Err(why) => {
                if is_mine {
                    self.not_read(&place.path(), why);
                    if place.data.attributes.get().is_some() {
                        self.once_there(&place, None)?;
                    }
                }
                Ok(())
            }
        }
    }

    /// Makes tasks of what is in a directory.
    pub(super) fn listed(&mut self, listed: Listed) -> Result<(), StoreError> {
        let Listed {
            fd,
            listing,
            place,
            whose,
        } = listed;
        let known = match place.data.there() {
            Some((ino, false)) if whose != Whose::Foreign => {
                Some(Arc::new(self.known_entries(ino, &listing, &place)?))
            }
            _ => None,
        };
        let is_directory = |sort| sort == Sort::Kind(Kind::Directory);
        let directories = listing.iter().filter(|f| is_directory(f.sort)).count();
        for found in listing.iter().filter(|f| is_directory(f.sort)) {
            let share = self.run.options.share;
            let subtree = place.data.subtree.child(found.slot, directories, share);
            let child = Place::below(&place, found.name, Made::new(subtree));
            let task = Task::Directory(Unopened::In(Arc::clone(&fd)), child);
            self.released.push(task);
        }
        let listing = Arc::new(listing);
        for begin in (0..listing.len()).step_by(BATCH_ENTRIES) {
            self.released.push(Task::Entries(Entries {
                fd: Arc::clone(&fd),
                place: Arc::clone(&place),
                listing: Arc::clone(&listing),
                indices: (begin..(begin + BATCH_ENTRIES).min(listing.len())).collect(),
                known: known.clone(),
                whose,
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

    /// Lets `task` be done once the counterpart of `place` is there; sees to it that it will be.
    pub(super) fn once_there(
        &mut self,
        place: &Arc<Place>,
        task: Option<Task>,
    ) -> Result<(), StoreError> {
        let (mut at, mut task) = (Arc::clone(place), task);
        loop {
            match &mut *lock(&at.data.counterpart) {
                Counterpart::There(..) => {
                    self.released.extend(task);
                    return Ok(());
                }
                Counterpart::Asked(waiting) => {
                    waiting.extend(task);
                    return Ok(());
                }
                unasked => *unasked = Counterpart::Asked(task.into_iter().collect()),
            }
            // Nobody else will create it.
            match at.parent() {
                Some(parent) if parent.data.there().is_none() => {
                    let parent = Arc::clone(parent);
                    task = Some(Task::Make(at));
                    at = parent;
                }
                _ => return self.make(&at),
            }
        }
    }

    /// Creates the counterpart of a directory whose parent's is there.
    pub(super) fn make(&mut self, place: &Arc<Place>) -> Result<(), StoreError> {
        let attributes = place.data.attributes.get().copied().unwrap_or_default();
        let parent = place.parent().map(|parent| (parent, parent.data.there()));
        let fail = |why| failed(&place.path(), why);
        let Some((parent, there)) = parent else {
            let into = self.run.options.into;
            self.adjust(into, &attributes).map_err(fail)?;
            self.arrived(place, into, false);
            return Ok(());
        };
        let (directory, _) = there.ok_or_else(|| fail(TreeError::NotFound))?;
        let (ino, request) = self
            .run
            .tree
            .request_mkdir(directory, place.name(), &attributes)
            .map_err(fail)?;
        let what = What::Directory(Arc::clone(place), ino);
        self.submit(request, parent, directory, place.name(), what)
    }

    /// What waited for the counterpart of a directory can go on.
    pub(super) fn arrived(&mut self, place: &Place, ino: Ino, is_fresh: bool) {
        let there = Counterpart::There(ino, is_fresh);
        let before = std::mem::replace(&mut *lock(&place.data.counterpart), there);
        if let Counterpart::Asked(waiting) = before {
            self.released.extend(waiting);
        }
    }

    /// Creates a directory whose name may be taken, or opens the one that is there.
    pub(super) fn open_or_make(&mut self, place: &Place, parent: Ino) -> Result<(), TreeError> {
        let tree = self.run.tree;
        let attributes = place.data.attributes.get().copied().unwrap_or_default();
        loop {
            match tree.lookup(parent, place.name()) {
                Ok(entry) if entry.kind == Kind::Directory => {
                    self.adjust(entry.ino, &attributes)?;
                    self.arrived(place, entry.ino, false);
                    return Ok(());
                }
                Ok(_) => match tree.unlink(parent, place.name()) {
                    Ok(()) | Err(TreeError::NotFound | TreeError::IsADirectory) => {}
                    Err(e) => return Err(e),
                },
                Err(TreeError::NotFound) => {}
                Err(e) => return Err(e),
            }
            match tree.mkdir(parent, place.name(), &attributes) {
                Ok(ino) => {
                    self.made(place, ino);
                    return Ok(());
                }
                Err(TreeError::Exists) => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// A directory was created.
    pub(super) fn made(&mut self, place: &Place, ino: Ino) {
        self.report.directories += 1;
        self.run.progress.entry(0, 1);
        self.tell_executed(|| place.path());
        self.arrived(place, ino, true);
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
}

/// Opens and lists a directory and takes down its attributes, also where its entries cannot be
/// read.
fn open_and_list(
    unopened: Unopened,
    place: &Place,
) -> Result<(OwnedFd, Listing), rustix::io::Errno> {
    let fd = match unopened {
        Unopened::Root(fd) => fd,
        Unopened::In(parent) => input::open_directory(&parent, place.name()).inspect_err(|_| {
            if let Ok(stat) = input::stat_at(&parent, place.name())
                && input::sort_of(&stat) == Sort::Kind(Kind::Directory)
            {
                let _ = place.data.attributes.set(input::attributes(&stat));
            }
        })?,
    };
    let attributes = input::attributes(&rustix::fs::fstat(&fd)?);
    let _ = place.data.attributes.set(attributes);
    let listing = Listing::of(&fd)?;
    Ok((fd, listing))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subtrees_are_told_apart_until_there_are_enough() {
        let share = Share { index: 1, of: 2 };
        let root = Made::root().subtree;
        let few = root.child(7, 3, share);
        assert_ne!(few.hash, root.hash);
        let many = few.child(8, 200, share);
        assert_ne!(many.hash, few.hash);
        // 600 subtrees for two clients: everything below belongs to whom this belongs to.
        assert_eq!(many.child(9, 5, share).hash, many.hash);
        let mine = (0..1000).filter(|&slot| few.child(slot, 1000, share).is_of(share));
        assert!((400..600).contains(&mine.count()));
    }
}
