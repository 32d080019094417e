//! Operations that add a name or change attributes.

use std::ops::RangeInclusive;

use lowtide_engine_core::op::{Bytes, Mode, Range, Request, UPDATES_MAX, Want};
use lowtide_engine_core::session::Session;

use super::{Tree, corrupt, demand_name};
use crate::error::TreeError;
use crate::layout::{
    self, Attributes, Chunk, DATA, Entry, INODES, Ino, Inode, Kind, Malformed, Parent, TARGET_MAX,
    count_value,
};
use crate::plan::Plan;

/// Most chunks that one operation deletes or writes next to the few objects of a name and inode.
pub(super) const CHUNKS_PER_OP_MAX: u64 = 32;
const _: () = assert!(CHUNKS_PER_OP_MAX as usize + 16 <= UPDATES_MAX);

/// Which attributes [`Tree::set_attributes`] changes: those that are given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttributeChange {
    /// Permission bits, at most `0o7777`.
    pub mode: Option<u16>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Modification time: seconds since 1970 and nanoseconds below 10^9.
    pub mtime: Option<(i64, u32)>,
}

impl AttributeChange {
    /// Changes everything to `attributes`.
    #[must_use]
    pub fn to(attributes: &Attributes) -> AttributeChange {
        AttributeChange {
            mode: Some(attributes.mode),
            uid: Some(attributes.uid),
            gid: Some(attributes.gid),
            mtime: Some((attributes.mtime_sec, attributes.mtime_nsec)),
        }
    }

    fn apply(&self, attributes: &mut Attributes) {
        attributes.mode = self.mode.unwrap_or(attributes.mode);
        attributes.uid = self.uid.unwrap_or(attributes.uid);
        attributes.gid = self.gid.unwrap_or(attributes.gid);
        if let Some((sec, nsec)) = self.mtime {
            attributes.mtime_sec = sec;
            attributes.mtime_nsec = nsec;
        }
    }
}

impl<S: Session + ?Sized> Tree<'_, S> {
    /// Creates a directory.
    ///
    /// # Errors
    /// [`TreeError::Exists`], [`TreeError::NotFound`] and [`TreeError::NotADirectory`] about
    /// `directory`, [`TreeError::InvalidName`], [`TreeError::InvalidAttribute`].
    pub fn mkdir(
        &self,
        directory: Ino,
        name: &[u8],
        attributes: &Attributes,
    ) -> Result<Ino, TreeError> {
        self.make(directory, name, &directory_inode(attributes)?)
    }

    /// Creates a symbolic link.
    ///
    /// # Errors
    /// As [`Tree::mkdir`], and [`TreeError::InvalidTarget`].
    pub fn symlink(
        &self,
        directory: Ino,
        name: &[u8],
        target: &[u8],
        attributes: &Attributes,
    ) -> Result<Ino, TreeError> {
        self.make(directory, name, &symlink_inode(target, attributes)?)
    }

    /// Gives a file or symbolic link one more name.
    ///
    /// # Errors
    /// As [`Tree::mkdir`]; [`TreeError::NotFound`] also about `ino`, [`TreeError::IsADirectory`]
    /// when that is what `ino` is.
    pub fn link(&self, ino: Ino, directory: Ino, name: &[u8]) -> Result<(), TreeError> {
        demand_name(name)?;
        self.attempt(|| {
            let stat = self.read_stat(ino)?.stat;
            if stat.inode.kind == Kind::Directory {
                return Err(TreeError::IsADirectory);
            }
            self.demand_free(directory, name)?;
            let entry = Entry {
                ino,
                kind: stat.inode.kind,
            };
            Ok((self.plan_link(directory, name, entry), ()))
        })
    }

    /// Changes attributes of an inode of any kind.
    ///
    /// # Errors
    /// [`TreeError::NotFound`], [`TreeError::InvalidAttribute`].
    pub fn set_attributes(&self, ino: Ino, change: &AttributeChange) -> Result<(), TreeError> {
        self.attempt(|| {
            let read = self.read_stat(ino)?;
            let mut inode = read.stat.inode;
            change.apply(&mut inode.attributes);
            demand_valid(&inode.attributes)?;
            let home = self.layout.home(ino);
            let mut plan = Plan::default();
            plan.equal(home, layout::inode_key(ino), read.inode_bytes);
            plan.put(home, layout::inode_key(ino), inode.encode());
            Ok((plan, ()))
        })
    }

    /// Creates an inode with one name. The name must be free.
    fn make(&self, directory: Ino, name: &[u8], inode: &Inode) -> Result<Ino, TreeError> {
        demand_name(name)?;
        self.create_whole(directory, name, inode, None)
    }

    /// Creates an inode, with its contents where it is a file of one chunk, and its name, which
    /// must be free.
    pub(super) fn create_whole(
        &self,
        directory: Ino,
        name: &[u8],
        inode: &Inode,
        chunk: Option<&Chunk>,
    ) -> Result<Ino, TreeError> {
        self.demand_ever_directory(directory)?;
        let ino = self.allocate()?;
        self.attempt_optimistic(
            || self.plan_create(directory, name, ino, inode, chunk),
            || self.demand_free(directory, name),
        )?;
        if inode.kind == Kind::Directory {
            self.remember_directory(ino);
        }
        Ok(ino)
    }

    /// Runs a plan made of no reads; only where it fails is read why.
    fn attempt_optimistic(
        &self,
        plan: impl Fn() -> Plan,
        reason: impl Fn() -> Result<(), TreeError>,
    ) -> Result<(), TreeError> {
        let mut is_first = true;
        self.attempt(|| {
            if !std::mem::take(&mut is_first) {
                reason()?;
            }
            Ok((plan(), ()))
        })
    }

    /// Fails with the reason why `name` cannot be created in `directory`.
    pub(super) fn demand_free(&self, directory: Ino, name: &[u8]) -> Result<(), TreeError> {
        self.demand_directory(directory)?;
        match self.read_entry(directory, name)? {
            Some(_) => Err(TreeError::Exists),
            None => Ok(()),
        }
    }

    /// The request that creates an inode of at most one chunk under a free name, and its number.
    /// It has no effect unless the name is free and the directory alive.
    pub(crate) fn request_create(
        &self,
        directory: Ino,
        name: &[u8],
        inode: &Inode,
        chunk: Option<&Chunk>,
    ) -> Result<(Ino, Request), TreeError> {
        demand_name(name)?;
        let ino = self.allocate()?;
        let plan = self.plan_create(directory, name, ino, inode, chunk);
        Ok((ino, plan.finish()))
    }

    /// The lock on names of `directory` for who is going to create many: on all in `slots` except
    /// the note that the directory is removed, which everybody shares.
    pub(crate) fn names_lock(&self, directory: Ino, slots: RangeInclusive<u64>) -> Want {
        let range = Range {
            space: layout::names_space(directory),
            lo: *slots.start(),
            hi: (*slots.end()).min(layout::REMOVED_SLOT - 1),
        };
        Want {
            home: self.layout.home(directory),
            range,
            mode: Mode::Exclusive,
        }
    }

    /// The request that creates an empty directory under a free name, and its number. Once it has
    /// executed, [`Tree::remember_directory`] spares a question.
    pub(crate) fn request_mkdir(
        &self,
        directory: Ino,
        name: &[u8],
        attributes: &Attributes,
    ) -> Result<(Ino, Request), TreeError> {
        self.demand_ever_directory(directory)?;
        self.request_create(directory, name, &directory_inode(attributes)?, None)
    }

    /// The request that gives an existing file or symbolic link a name that must be free.
    pub(crate) fn request_link(
        &self,
        directory: Ino,
        name: &[u8],
        entry: Entry,
    ) -> Result<Request, TreeError> {
        demand_name(name)?;
        Ok(self.plan_link(directory, name, entry).finish())
    }

    fn plan_create(
        &self,
        directory: Ino,
        name: &[u8],
        ino: Ino,
        inode: &Inode,
        chunk: Option<&Chunk>,
    ) -> Plan {
        let kind = inode.kind;
        let mut plan = Plan::default();
        self.plan_entry(&mut plan, directory, name, Entry { ino, kind }, None);
        self.plan_inode(&mut plan, directory, ino, inode);
        if let Some(chunk) = chunk {
            self.plan_chunk(&mut plan, ino, 0, chunk);
        }
        plan
    }

    fn plan_link(&self, directory: Ino, name: &[u8], entry: Entry) -> Plan {
        let home = self.layout.home(entry.ino);
        let mut plan = Plan::default();
        self.plan_entry(&mut plan, directory, name, entry, None);
        plan.present(home, layout::inode_key(entry.ino));
        plan.lock(home, layout::inode_range(entry.ino), Mode::Exclusive);
        plan.add(home, layout::count_key(entry.ino), 1);
        plan
    }

    /// Lets `name` stand for `entry`, where `before` stood, in a directory that must not have been
    /// removed; that it has been one the caller knows.
    pub(super) fn plan_entry(
        &self,
        plan: &mut Plan,
        directory: Ino,
        name: &[u8],
        entry: Entry,
        before: Option<Bytes>,
    ) {
        let home = self.layout.home(directory);
        let key = layout::entry_key(directory, name);
        plan.absent(home, layout::removed_key(directory));
        if before.is_none() {
            plan.add(home, layout::count_key(directory), 1);
        }
        plan.as_read(home, key.clone(), before);
        plan.put(home, key, entry.encode());
    }

    /// Adds a new inode with one name or no entries.
    pub(super) fn plan_inode(&self, plan: &mut Plan, directory: Ino, ino: Ino, inode: &Inode) {
        let home = self.layout.home(ino);
        plan.lock(home, self.fresh_range(INODES, ino), Mode::Exclusive);
        plan.put(home, layout::inode_key(ino), inode.encode());
        if inode.kind == Kind::Directory {
            plan.put(home, layout::count_key(ino), count_value(0));
            plan.put(home, layout::parent_key(ino), Parent(directory).encode());
        } else {
            plan.put(home, layout::count_key(ino), count_value(1));
        }
    }

    /// Adds a chunk of a file that this tree numbered.
    pub(super) fn plan_chunk(&self, plan: &mut Plan, ino: Ino, number: u64, chunk: &Chunk) {
        let home = self.layout.chunk_home(ino, number);
        plan.lock(home, self.fresh_range(DATA, ino), Mode::Exclusive);
        plan.put(home, layout::chunk_key(ino, number), chunk.encode());
    }

    /// Takes one name from an inode that is no directory; with the last one, the inode. Returns
    /// whether chunks remain to be freed afterwards ([`Tree::free`]).
    pub(super) fn plan_release(&self, plan: &mut Plan, entry: Entry) -> Result<bool, TreeError> {
        let ino = entry.ino;
        let home = self.layout.home(ino);
        let broken = |why| corrupt(home, &layout::inode_key(ino), why);
        let read = match self.read_stat(ino) {
            Err(TreeError::NotFound) => return Err(broken(Malformed::Missing)),
            other => other?,
        };
        if read.stat.inode.kind != entry.kind {
            return Err(broken(Malformed::Contradiction));
        }
        plan.lock(home, layout::inode_range(ino), Mode::Exclusive);
        plan.equal(home, layout::count_key(ino), read.count_bytes);
        if read.stat.count > 1 {
            plan.add(home, layout::count_key(ino), -1);
            return Ok(false);
        }
        plan.equal(home, layout::inode_key(ino), read.inode_bytes);
        plan.delete(home, layout::inode_key(ino));
        plan.delete(home, layout::count_key(ino));
        let chunks = read.stat.inode.chunks();
        if chunks <= CHUNKS_PER_OP_MAX {
            self.plan_delete_chunks(plan, ino, 0..chunks);
            return Ok(false);
        }
        let note = layout::Freeing { chunks };
        plan.put(home, layout::freeing_key(ino), note.encode());
        Ok(true)
    }

    pub(super) fn plan_delete_chunks(
        &self,
        plan: &mut Plan,
        ino: Ino,
        numbers: std::ops::Range<u64>,
    ) {
        for number in numbers {
            let home = self.layout.chunk_home(ino, number);
            plan.delete(home, layout::chunk_key(ino, number));
        }
    }

    /// The inode of a file of `size` bytes created through this tree.
    pub(crate) fn file_inode(
        &self,
        size: u64,
        attributes: &Attributes,
    ) -> Result<Inode, TreeError> {
        demand_valid(attributes)?;
        Ok(Inode {
            kind: Kind::File,
            attributes: *attributes,
            size,
            chunk_log2: self.chunk_log2,
            writes: 0,
            target: Vec::new(),
        })
    }
}

/// The inode of a directory.
pub(crate) fn directory_inode(attributes: &Attributes) -> Result<Inode, TreeError> {
    demand_valid(attributes)?;
    Ok(Inode {
        kind: Kind::Directory,
        attributes: *attributes,
        size: 0,
        chunk_log2: 0,
        writes: 0,
        target: Vec::new(),
    })
}

/// The inode of a symbolic link.
pub(crate) fn symlink_inode(target: &[u8], attributes: &Attributes) -> Result<Inode, TreeError> {
    demand_valid(attributes)?;
    if target.is_empty() || target.len() > TARGET_MAX || target.contains(&0) {
        return Err(TreeError::InvalidTarget);
    }
    Ok(Inode {
        kind: Kind::Symlink,
        attributes: *attributes,
        size: target.len() as u64,
        chunk_log2: 0,
        writes: 0,
        target: target.to_vec(),
    })
}

fn demand_valid(attributes: &Attributes) -> Result<(), TreeError> {
    if attributes.is_valid() {
        Ok(())
    } else {
        Err(TreeError::InvalidAttribute)
    }
}
