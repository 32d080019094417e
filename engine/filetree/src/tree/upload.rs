//! Files of more than one chunk: their chunks are written first, by operations of their own, then
//! one operation gives the file its inode and its name. So a file that can be seen is whole.
//!
//! The first of those operations leaves a *pending* note under the file's future name, the last
//! removes it; all of them happen only while the note stands. Who finds the note of somebody who
//! died deletes its chunks ([`Tree::abandon`]) and begins anew; somebody who was only slow is then
//! refused with [`TreeError::Contended`] and leaves nothing behind.
//!
//! A file too large to be deleted in one operation leaves a *freeing* note until its chunks are
//! gone; anybody may go on with it ([`Tree::reclaim`]).

use std::collections::VecDeque;

use lowtide_engine_core::ids::{Life, NodeId};
use lowtide_engine_core::op::{Bytes, Key, Range, Refusal, Request};
use lowtide_engine_core::session::{Session, SessionError, Ticket};

use super::change::CHUNKS_PER_OP_MAX;
use super::{Tree, corrupt};
use crate::error::TreeError;
use crate::layout::{self, Chunk, Freeing, Ino, Malformed, Pending};
use crate::plan::Plan;

/// Contents of one operation of an upload are at most this, unless a single chunk is more.
const GROUP_BYTES_MAX: usize = 2 << 20;
/// Contents of one upload that may be in flight.
const IN_FLIGHT_BYTES_MAX: usize = 8 << 20;
/// Bytes of values per page when only keys matter; a page holds at least one object.
const KEY_SCAN_BYTES: usize = 1 << 20;

/// A file on its way into the tree.
pub(super) struct Upload<'t, 's, S: Session + ?Sized> {
    tree: &'t Tree<'s, S>,
    note_key: Key,
    note: Bytes,
    ino: Ino,
    /// Chunks handed over so far.
    chunks: u64,
    /// Chunks that wait for their operation.
    group: Vec<Chunk>,
    group_bytes: usize,
    /// Requests in flight, kept until they have executed.
    in_flight: VecDeque<(Ticket, usize, Request)>,
    in_flight_bytes: usize,
    home: NodeId,
}

impl<'t, 's, S: Session + ?Sized> Upload<'t, 's, S> {
    /// Leaves the note for `name` in `directory`; what a predecessor left behind is deleted.
    pub fn begin(
        tree: &'t Tree<'s, S>,
        directory: Ino,
        name: &[u8],
        ino: Ino,
    ) -> Result<Self, TreeError> {
        let home = tree.layout.home(directory);
        let note_key = layout::pending_key(directory, name);
        let note = Pending(ino).encode();
        tree.attempt(|| {
            if tree.session.read(home, &note_key)?.is_some() {
                tree.abandon(directory, name)?;
            }
            let mut plan = Plan::default();
            plan.absent(home, note_key.clone());
            plan.put(home, note_key.clone(), note.clone());
            Ok((plan, ()))
        })?;
        Ok(Upload {
            tree,
            note_key,
            note,
            ino,
            chunks: 0,
            group: Vec::new(),
            group_bytes: 0,
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
            home,
        })
    }

    /// Hands over the next chunk.
    pub fn push(&mut self, chunk: Chunk) -> Result<(), TreeError> {
        if self.group_bytes + chunk.len() > GROUP_BYTES_MAX
            || self.group.len() as u64 == CHUNKS_PER_OP_MAX
        {
            self.submit_group()?;
        }
        self.group_bytes += chunk.len();
        self.group.push(chunk);
        Ok(())
    }

    /// Waits until every chunk has executed. What remains is the operation that creates inode
    /// and name; it must contain [`Upload::plan_finish`].
    pub fn flush(&mut self) -> Result<(), TreeError> {
        self.submit_group()?;
        while !self.in_flight.is_empty() {
            self.wait_oldest()?;
        }
        Ok(())
    }

    /// Adds to the operation that creates the file: it happens only while the note is still
    /// ours, and removes it.
    pub fn plan_finish(&self, plan: &mut Plan) {
        plan.equal(self.home, self.note_key.clone(), self.note.clone());
        plan.delete(self.home, self.note_key.clone());
    }

    /// Whether the note is still ours.
    pub fn is_ours(&self) -> Result<bool, TreeError> {
        Ok(self.tree.session.read(self.home, &self.note_key)? == Some(self.note.clone()))
    }

    /// Deletes what was written.
    pub fn cancel(mut self) -> Result<(), TreeError> {
        while let Some((ticket, _, _)) = self.in_flight.pop_front() {
            match self.tree.session.wait(ticket) {
                Err(SessionError::Refused(_)) | Ok(_) => {}
                Err(e) => return Err(e.into()),
            }
        }
        self.tree
            .delete_pending(self.home, &self.note_key, &self.note, self.ino)
    }

    fn submit_group(&mut self) -> Result<(), TreeError> {
        if self.group.is_empty() {
            return Ok(());
        }
        let mut plan = Plan::default();
        plan.equal(self.home, self.note_key.clone(), self.note.clone());
        for chunk in self.group.drain(..) {
            self.tree
                .plan_chunk(&mut plan, self.ino, self.chunks, &chunk);
            self.chunks += 1;
        }
        let bytes = std::mem::take(&mut self.group_bytes);
        while self.in_flight_bytes + bytes > IN_FLIGHT_BYTES_MAX && !self.in_flight.is_empty() {
            self.wait_oldest()?;
        }
        let request = plan.finish();
        let ticket = self.tree.session.submit(request.clone())?;
        self.in_flight.push_back((ticket, bytes, request));
        self.in_flight_bytes += bytes;
        Ok(())
    }

    fn wait_oldest(&mut self) -> Result<(), TreeError> {
        let Some((ticket, bytes, request)) = self.in_flight.pop_front() else {
            return Ok(());
        };
        self.in_flight_bytes -= bytes;
        match self.tree.session.wait(ticket) {
            Err(SessionError::Refused(Refusal::Full { .. })) => {
                self.tree.run_when_not_full(request)
            }
            Err(SessionError::Refused(Refusal::CheckFailed { .. })) => Err(TreeError::Contended),
            other => Ok(other.map(|_| ())?),
        }
    }
}

impl<S: Session + ?Sized> Tree<'_, S> {
    /// Deletes what an interrupted creation of `name` in `directory` has left behind. Whether
    /// there was something.
    ///
    /// # Errors
    /// Failures of the session, [`TreeError::Corrupt`].
    pub fn abandon(&self, directory: Ino, name: &[u8]) -> Result<bool, TreeError> {
        let home = self.layout.home(directory);
        let key = layout::pending_key(directory, name);
        let Some(note) = self.session.read(home, &key)? else {
            return Ok(false);
        };
        let Pending(ino) = Pending::decode(&note).map_err(|why| corrupt(home, &key, why))?;
        self.delete_pending(home, &key, &note, ino)?;
        Ok(true)
    }

    /// Finishes interrupted deletions of large files, whoever began them, and undoes creations
    /// that were interrupted by the death of a life: `is_dead` tells which lives are. Returns how
    /// many files it was about.
    ///
    /// # Errors
    /// Failures of the session, [`TreeError::Corrupt`].
    pub fn reclaim(&self, is_dead: impl Fn(Life) -> bool) -> Result<u64, TreeError> {
        let mut files = 0;
        for &home in self.layout.meta() {
            for (key, _) in self.notes(home, layout::FREEING)? {
                let ino = Ino::new(key.slot)
                    .filter(|&ino| key == layout::freeing_key(ino))
                    .ok_or_else(|| corrupt(home, &key, Malformed::Key))?;
                self.free(ino)?;
                files += 1;
            }
            for (key, note) in self.notes(home, layout::PENDING)? {
                let Pending(ino) =
                    Pending::decode(&note).map_err(|why| corrupt(home, &key, why))?;
                if is_dead(ino.life()) {
                    self.delete_pending(home, &key, &note, ino)?;
                    files += 1;
                }
            }
        }
        Ok(files)
    }

    /// All objects of a space that holds few.
    fn notes(&self, home: NodeId, space: u64) -> Result<Vec<(Key, Bytes)>, TreeError> {
        let mut notes: Vec<(Key, Bytes)> = Vec::new();
        loop {
            let after = notes.last().map(|(key, _)| key);
            let page = self
                .session
                .scan(home, Range::whole(space), after, KEY_SCAN_BYTES)?;
            notes.extend(page.entries);
            if !page.more {
                return Ok(notes);
            }
        }
    }

    /// Deletes the chunks that are left of `ino`, then its freeing note. The effort follows from
    /// the chunks that there are, not from what a damaged inode or note says about them.
    pub(super) fn free(&self, ino: Ino) -> Result<(), TreeError> {
        let home = self.layout.home(ino);
        let key = layout::freeing_key(ino);
        loop {
            let is_done = self.attempt(|| {
                let mut plan = Plan::default();
                let Some(note) = self.session.read(home, &key)? else {
                    return Ok((plan, true)); // somebody else was faster
                };
                plan.equal(home, key.clone(), note);
                let first = self.first_chunk(ino)?;
                match first {
                    Some(first) => {
                        let end = first.saturating_add(CHUNKS_PER_OP_MAX);
                        self.plan_delete_chunks(&mut plan, ino, first..end);
                    }
                    None => plan.delete(home, key.clone()),
                }
                Ok((plan, first.is_none()))
            })?;
            if is_done {
                return Ok(());
            }
        }
    }

    /// Smallest number among the chunks that there are of a file.
    fn first_chunk(&self, ino: Ino) -> Result<Option<u64>, TreeError> {
        let mut first = None;
        for &server in self.layout.object() {
            let page = self
                .session
                .scan(server, layout::data_range(ino), None, 1)?;
            if let Some((key, _)) = page.entries.first() {
                let number = layout::chunk_number(key)
                    .filter(|&n| self.layout.chunk_home(ino, n) == server)
                    .ok_or_else(|| corrupt(server, key, Malformed::Key))?;
                first = Some(first.map_or(number, |other: u64| other.min(number)));
            }
        }
        Ok(first)
    }

    /// Undoes the creation that left this pending note, unless the note is no longer there. In one
    /// operation the note turns into a freeing one: whoever still writes chunks or would finish
    /// is refused from then on, so no chunk appears behind the back of the deletion.
    fn delete_pending(
        &self,
        home: NodeId,
        key: &Key,
        note: &Bytes,
        ino: Ino,
    ) -> Result<(), TreeError> {
        let mut plan = Plan::default();
        plan.equal(home, key.clone(), note.clone());
        plan.delete(home, key.clone());
        let freeing = Freeing {
            chunks: Freeing::CHUNKS_MAX, // as many as there are
        };
        plan.put(
            self.layout.home(ino),
            layout::freeing_key(ino),
            freeing.encode(),
        );
        match self.run(plan) {
            Err(e) if e.is_check_failed() => Ok(()), // somebody else was faster
            other => other.and_then(|()| self.free(ino)),
        }
    }
}
