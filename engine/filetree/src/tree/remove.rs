//! Operations that take a name away: unlink, rmdir, rename, and removing a whole subtree.

use std::collections::BTreeMap;

use lowtide_engine_core::op::{Mode, Range};
use lowtide_engine_core::session::Session;

use super::{DirPage, LOOKS_MAX, Tree, corrupt, demand_name};
use crate::error::TreeError;
use crate::layout::{self, Ino, Kind, Malformed, Parent};
use crate::plan::Plan;

/// Most directories between a directory and the root when a directory is moved there.
const DEPTH_MAX: usize = 100_000;
/// How often a directory without entries may turn out not to be empty.
const FUTILE_MAX: u32 = 1000;
/// Entries of a directory that are removed at a time.
const REMOVE_PAGE: usize = 1024;

impl<S: Session + ?Sized> Tree<'_, S> {
    /// Removes a name of a file or symbolic link, with the last one also the inode and its
    /// contents.
    ///
    /// # Errors
    /// [`TreeError::NotFound`], [`TreeError::IsADirectory`], [`TreeError::InvalidName`].
    pub fn unlink(&self, directory: Ino, name: &[u8]) -> Result<(), TreeError> {
        let freed = self.attempt(|| {
            let (entry, bytes) = self
                .read_entry(directory, name)?
                .ok_or(TreeError::NotFound)?;
            if entry.kind == Kind::Directory {
                return Err(TreeError::IsADirectory);
            }
            let mut plan = Plan::default();
            let home = self.layout.home(directory);
            let key = layout::entry_key(directory, name);
            plan.equal(home, key.clone(), bytes);
            plan.delete(home, key);
            self.plan_entries(&mut plan, directory, -1);
            let is_left = self.plan_release(&mut plan, entry)?;
            Ok((plan, is_left.then_some(entry.ino)))
        })?;
        freed.map_or(Ok(()), |ino| self.free(ino))
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// [`TreeError::NotFound`], [`TreeError::NotADirectory`], [`TreeError::NotEmpty`],
    /// [`TreeError::InvalidName`].
    pub fn rmdir(&self, directory: Ino, name: &[u8]) -> Result<(), TreeError> {
        self.attempt(|| {
            let (entry, bytes) = self
                .read_entry(directory, name)?
                .ok_or(TreeError::NotFound)?;
            if entry.kind != Kind::Directory {
                return Err(TreeError::NotADirectory);
            }
            let mut plan = Plan::default();
            let home = self.layout.home(directory);
            let key = layout::entry_key(directory, name);
            plan.equal(home, key.clone(), bytes);
            plan.delete(home, key);
            self.plan_entries(&mut plan, directory, -1);
            self.plan_rmdir(&mut plan, entry.ino)?;
            Ok((plan, ()))
        })
    }

    /// Removes what `name` stands for, a directory with all that is in it. Not atomic: whoever
    /// adds to the directory meanwhile sees his entries removed too, or has this start again.
    ///
    /// # Errors
    /// [`TreeError::NotFound`], [`TreeError::InvalidName`], [`TreeError::Corrupt`].
    pub fn remove_all(&self, directory: Ino, name: &[u8]) -> Result<(), TreeError> {
        let top = self.lookup(directory, name)?;
        if top.kind != Kind::Directory {
            return self.unlink(directory, name);
        }
        // A stack of (directory that holds the name, name, inode), not a recursion: trees may be
        // deeper than a thread's stack.
        let mut stack = vec![(directory, name.to_vec(), top.ino)];
        let mut futile = 0;
        while let Some((holder, name, ino)) = stack.last().cloned() {
            let page = match self.readdir(ino, None, REMOVE_PAGE) {
                Err(TreeError::NotFound) => DirPage::default(),
                other => other?,
            };
            if let Some(key) = page.damaged.first() {
                return Err(corrupt(self.layout.home(ino), key, Malformed::Key));
            }
            let is_empty = page.entries.is_empty();
            let mut child = None;
            for e in page.entries {
                if e.entry.kind == Kind::Directory {
                    child = Some((ino, e.name, e.entry.ino));
                } else {
                    ignore_absent(self.unlink(ino, &e.name))?;
                }
            }
            if let Some(child) = child {
                if self.is_within(&child)? {
                    stack.push(child);
                }
                continue;
            }
            match ignore_absent(self.rmdir(holder, &name)) {
                Err(TreeError::NotEmpty) if is_empty => {
                    // Somebody keeps adding entries, or the count of entries is wrong.
                    futile += 1;
                    if futile == FUTILE_MAX {
                        return Err(TreeError::NotEmpty);
                    }
                }
                Err(TreeError::NotEmpty) => {} // there is another page
                other => {
                    other?;
                    stack.pop();
                }
            }
        }
        Ok(())
    }

    /// Whether a directory says that it belongs where it was found, or that it is gone. Somebody may
    /// have moved it; else it fails: damaged directories could hold each other, and walking down
    /// would never end.
    fn is_within(&self, found: &(Ino, Vec<u8>, Ino)) -> Result<bool, TreeError> {
        let (holder, name, directory) = found;
        for _ in 0..LOOKS_MAX {
            match self.parent(*directory) {
                Ok(parent) if parent != *holder => {}
                other => return ignore_absent(other.map(|_| ())).map(|()| true),
            }
            let entry = self.read_entry(*holder, name)?;
            if entry.is_none_or(|(entry, _)| entry.ino != *directory) {
                return Ok(false);
            }
        }
        let home = self.layout.home(*directory);
        let key = layout::parent_key(*directory);
        Err(corrupt(home, &key, Malformed::Contradiction))
    }

    /// Renames `from.1` in directory `from.0` to `to.1` in `to.0`, replacing what stands there
    /// in the same moment: a file or symbolic link by one, an empty directory by a directory.
    /// Two names of one inode are left as they are.
    ///
    /// # Errors
    /// [`TreeError::NotFound`], [`TreeError::NotADirectory`], [`TreeError::IsADirectory`],
    /// [`TreeError::NotEmpty`], [`TreeError::InvalidName`]; [`TreeError::IntoItself`] when a
    /// directory would move below itself.
    pub fn rename(&self, from: (Ino, &[u8]), to: (Ino, &[u8])) -> Result<(), TreeError> {
        demand_name(to.1)?;
        let freed = self.attempt(|| self.plan_rename(from, to))?;
        freed.map_or(Ok(()), |ino| self.free(ino))
    }

    fn plan_rename(
        &self,
        from: (Ino, &[u8]),
        to: (Ino, &[u8]),
    ) -> Result<(Plan, Option<Ino>), TreeError> {
        let mut plan = Plan::default();
        let (moved, moved_bytes) = self
            .read_entry(from.0, from.1)?
            .ok_or(TreeError::NotFound)?;
        if from == to {
            // Read twice, the name could stand for two inodes, one before and one after a change.
            return Ok((plan, None));
        }
        self.demand_directory(to.0)?;
        let target = self.read_entry(to.0, to.1)?;
        if target.as_ref().is_some_and(|(t, _)| t.ino == moved.ino) {
            return Ok((plan, None));
        }
        if moved.kind == Kind::Directory && from.0 != to.0 {
            self.plan_reparent(&mut plan, moved.ino, to.0)?;
        }
        let (from_home, to_home) = (self.layout.home(from.0), self.layout.home(to.0));
        let (from_key, to_key) = (
            layout::entry_key(from.0, from.1),
            layout::entry_key(to.0, to.1),
        );
        let mut entries: BTreeMap<Ino, i64> = BTreeMap::new();
        *entries.entry(from.0).or_default() -= 1;
        *entries.entry(to.0).or_default() += 1;

        let mut freed = None;
        if let Some((target, _)) = &target {
            *entries.entry(to.0).or_default() -= 1;
            match (moved.kind, target.kind) {
                // It holds the name that moves, also if that has just been taken away.
                (Kind::Directory, Kind::Directory) if target.ino == from.0 => {
                    return Err(TreeError::NotEmpty);
                }
                (Kind::Directory, Kind::Directory) => self.plan_rmdir(&mut plan, target.ino)?,
                (Kind::Directory, _) => return Err(TreeError::NotADirectory),
                (_, Kind::Directory) => return Err(TreeError::IsADirectory),
                _ => freed = self.plan_release(&mut plan, *target)?.then_some(target.ino),
            }
        }
        plan.equal(from_home, from_key.clone(), moved_bytes);
        plan.delete(from_home, from_key);
        plan.absent(to_home, layout::removed_key(to.0));
        plan.as_read(to_home, to_key.clone(), target.map(|(_, bytes)| bytes));
        plan.put(to_home, to_key, moved.encode());
        for (directory, change) in entries {
            if change != 0 {
                self.plan_entries(&mut plan, directory, change);
            }
        }
        Ok((plan, freed))
    }

    /// Makes `to` the parent of directory `moved`, whose name the plan moves, provided that `moved` is not among the
    /// ancestors of `to`. The ancestors are checked, so no concurrent move closes a ring.
    fn plan_reparent(&self, plan: &mut Plan, moved: Ino, to: Ino) -> Result<(), TreeError> {
        let mut at = to;
        for _ in 0..DEPTH_MAX {
            if at == moved {
                return Err(TreeError::IntoItself);
            }
            if at == Ino::ROOT {
                let home = self.layout.home(moved);
                plan.put(home, layout::parent_key(moved), Parent(to).encode());
                return Ok(());
            }
            let (parent, bytes) = self.read_parent(at)?;
            plan.equal(self.layout.home(at), layout::parent_key(at), bytes);
            at = parent;
        }
        let home = self.layout.home(to);
        Err(corrupt(
            home,
            &layout::parent_key(to),
            Malformed::Contradiction,
        ))
    }

    /// Removes the inode of an empty directory, whose name the plan removes too.
    fn plan_rmdir(&self, plan: &mut Plan, ino: Ino) -> Result<(), TreeError> {
        let home = self.layout.home(ino);
        let names = Range::whole(layout::names_space(ino));
        if !self.session.scan(home, names, None, 1)?.entries.is_empty() {
            return Err(TreeError::NotEmpty);
        }
        let read = match self.read_stat(ino) {
            Err(TreeError::NotFound) => {
                return Err(corrupt(home, &layout::inode_key(ino), Malformed::Missing));
            }
            other => other?,
        };
        if read.stat.count != 0 {
            return Err(TreeError::NotEmpty);
        }
        // Whoever changes the count changes an entry in the same operation: it is exact here.
        plan.lock(home, names, Mode::Exclusive);
        plan.lock(home, layout::inode_range(ino), Mode::Exclusive);
        plan.equal(home, layout::count_key(ino), read.count_bytes);
        plan.put(home, layout::removed_key(ino), layout::removed_value());
        plan.delete(home, layout::inode_key(ino));
        plan.delete(home, layout::count_key(ino));
        plan.delete(home, layout::parent_key(ino));
        Ok(())
    }

    /// Changes a directory's count, along with an entry of it.
    fn plan_entries(&self, plan: &mut Plan, directory: Ino, change: i64) {
        let home = self.layout.home(directory);
        plan.add(home, layout::count_key(directory), change);
    }
}

fn ignore_absent(outcome: Result<(), TreeError>) -> Result<(), TreeError> {
    match outcome {
        Err(TreeError::NotFound) => Ok(()),
        other => other,
    }
}
