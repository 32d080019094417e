//! Segment files and what the appending and the syncing thread share.
//!
//! Owns: the table of segments, their preparation, the durable position, the poison.
//! Invariants: the table's lock is never held over I/O; segments become ready in the order of their
//! numbers; the durable position is raised only after the sync returned.
//! Deliberately absent: record contents.

use super::record::SegmentHeader;
use super::teeth::{Tooth, bites};
use super::{LogConfig, Lsn};
use crate::medium::{Access, Gated, Medium, MediumError, PAGE, Poison, Volume};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::Thread;

/// Offsets of the claim slots, a page each; see [`super::claim`]. Used in a node's first log only.
pub(super) const CLAIM_SLOTS: [u64; 2] = [PAGE, 2 * PAGE];
/// Offset of the first record: header and claim slots have pages of their own.
pub(super) const SEGMENT_START: u64 = 3 * PAGE;
/// Ready segments that are kept ahead of the active one.
const READY_AHEAD: usize = 1;

/// How far ahead of the durable position memory is taken, bytes: what a busy core appends during one
/// sync.
const PREFAULT_AHEAD: u64 = 4 << 20;
/// Bytes that are worth a system call to take.
const PREFAULT_STEP: u64 = 2 << 20;

/// The log has failed for good: some bytes that were stored may never become durable.
#[derive(Debug, Clone, thiserror::Error)]
#[error("log poisoned: {cause}")]
pub struct LogError {
    /// The first failure.
    pub cause: String,
}

/// A segment file that is part of the log or about to be.
#[derive(Debug, Clone)]
pub(super) struct Segment {
    pub seq: u64,
    pub medium: Arc<Gated>,
}

#[derive(Debug, Default)]
pub(super) struct Table {
    /// Mirrors `Log::live`.
    pub live: VecDeque<Segment>,
    /// Headers durable, numbers following the last live one.
    pub ready: VecDeque<Segment>,
    /// Reusable, oldest first.
    pub free: VecDeque<Arc<Gated>>,
    /// Files there are.
    pub files: usize,
    /// Number of the next file's name.
    pub next_name: u32,
    /// Number of the next segment made ready.
    pub next_seq: u64,
}

/// See the module's comment.
#[derive(Debug)]
pub(super) struct Shared {
    pub config: LogConfig,
    pub volume: Arc<dyn Volume>,
    pub poison: Arc<Poison>,
    pub table: Mutex<Table>,
    /// One preparation at a time; held over I/O, never together with the table by choice of order.
    preparing: Mutex<()>,
    /// Everything before it is durable.
    durable: AtomicU64,
    /// Ready and free segments, for `free_bytes` without a lock.
    spare: AtomicUsize,
    /// Pages before this position have been faulted in.
    prefaulted: AtomicU64,
    want_growth: AtomicBool,
    disk_full: AtomicBool,
    /// Wakes whoever prepares segments, if somebody does: growth must not wait for a commit, since
    /// without room there may never be one.
    bell: OnceLock<Bell>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere leaves the table consistent: each critical section is one step.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cold]
fn poisoned(cause: &str) -> LogError {
    let cause = cause.to_owned();
    LogError { cause }
}

impl Shared {
    pub fn new(
        config: LogConfig,
        volume: Arc<dyn Volume>,
        poison: Arc<Poison>,
        table: Table,
    ) -> Shared {
        let spare = table.ready.len() + table.free.len();
        Shared {
            config,
            volume,
            poison,
            table: Mutex::new(table),
            preparing: Mutex::new(()),
            durable: AtomicU64::new(0),
            spare: AtomicUsize::new(spare),
            prefaulted: AtomicU64::new(0),
            want_growth: AtomicBool::new(false),
            disk_full: AtomicBool::new(false),
            bell: OnceLock::new(),
        }
    }

    pub fn file_name(prefix: &str, number: u32) -> String {
        format!("{prefix}-{number:05}.seg")
    }

    #[inline]
    pub fn check(&self) -> Result<(), LogError> {
        match self.poison.cause() {
            None => Ok(()),
            Some(cause) => Err(poisoned(cause)),
        }
    }

    /// A store or sync failed: poisons the log.
    pub fn lost(&self, error: MediumError) -> LogError {
        self.poison.set(&error);
        LogError {
            cause: self.poison.cause().unwrap_or_default().to_owned(),
        }
    }

    pub fn durable(&self) -> Lsn {
        // Acquire pairs with the Release in `sync`: who sees the position may rely on what the
        // syncing thread saw.
        Lsn(self.durable.load(Ordering::Acquire))
    }

    pub fn set_durable(&self, lsn: Lsn) {
        self.durable.fetch_max(lsn.0, Ordering::Release);
    }

    pub fn spare(&self) -> usize {
        self.spare.load(Ordering::Relaxed)
    }

    pub fn want_growth(&self) {
        self.want_growth.store(true, Ordering::Relaxed);
        if let Some(bell) = self.bell.get() {
            bell.ring();
        }
    }

    /// Whom to wake when the log should grow.
    pub fn set_bell(&self, bell: Bell) {
        // A log has one committer in its life.
        let _ = self.bell.set(bell);
    }

    pub fn is_disk_full(&self) -> bool {
        self.disk_full.load(Ordering::Relaxed)
    }

    pub fn take_ready(&self) -> Option<Segment> {
        let next = lock(&self.table).ready.pop_front();
        if next.is_some() {
            self.spare.fetch_sub(1, Ordering::Relaxed);
        }
        next
    }

    /// The segment of this number, if it holds records.
    pub fn live_segment(&self, seq: u64) -> Option<Segment> {
        let table = lock(&self.table);
        table.live.iter().find(|s| s.seq == seq).cloned()
    }

    pub fn activate(&self, segment: Segment) {
        lock(&self.table).live.push_back(segment);
    }

    pub fn release(&self, count: usize) {
        let mut table = lock(&self.table);
        let freed: Vec<_> = table.live.drain(..count).map(|s| s.medium).collect();
        table.free.extend(freed);
        self.spare.fetch_add(count, Ordering::Relaxed);
    }

    /// Makes sure that `ahead` segments are ready, reusing free files first, then creating new ones
    /// up to the limit, one more if a reservation was refused. A full disk is remembered, not an error.
    pub fn prepare(&self, ahead: usize) -> Result<(), LogError> {
        let _one = lock(&self.preparing);
        loop {
            self.check()?;
            let reuse = {
                let mut table = lock(&self.table);
                if table.ready.len() >= ahead {
                    break;
                }
                table.free.pop_front()
            };
            let (medium, is_new) = match reuse {
                Some(medium) => (medium, false),
                None => match self.create()? {
                    Some(medium) => (medium, true),
                    None => return Ok(()),
                },
            };
            self.make_ready(medium)?;
            if is_new {
                self.spare.fetch_add(1, Ordering::Relaxed);
            }
        }
        if self.want_growth.swap(false, Ordering::Relaxed)
            && let Some(medium) = self.create()?
        {
            lock(&self.table).free.push_back(medium);
            self.spare.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Faults in the pages that appends will reach next: memory that is taken from the kernel must be
    /// cleared first, here rather than in the append.
    fn prefault(&self) {
        let durable = self.durable().0;
        let from = self.prefaulted.load(Ordering::Relaxed).max(durable);
        let to = durable + PREFAULT_AHEAD;
        if to < from + PREFAULT_STEP {
            return;
        }
        let segments: Vec<Segment> = {
            let table = lock(&self.table);
            table
                .live
                .iter()
                .rev()
                .take(2)
                .chain(&table.ready)
                .cloned()
                .collect()
        };
        let mut reached = from;
        for segment in segments {
            let base = segment.seq * self.config.segment_bytes;
            let end = (to.saturating_sub(base)).min(self.config.segment_bytes);
            let start = from.saturating_sub(base);
            if start < end {
                segment.medium.prefault(start..end);
                reached = reached.max(base + end);
            }
        }
        self.prefaulted.store(reached, Ordering::Relaxed);
    }

    /// Gives a file the next number and makes its header durable, before any record goes in.
    fn make_ready(&self, medium: Arc<Gated>) -> Result<(), LogError> {
        // Only preparation changes it, and there is one at a time.
        let seq = lock(&self.table).next_seq;
        let header = SegmentHeader {
            identity: self.config.identity,
            seq,
            segment_bytes: self.config.segment_bytes,
        };
        medium
            .store(0, &header.encode())
            .map_err(|e| self.lost(e))?;
        if !bites(Tooth::HeaderNotSynced) {
            medium.sync(0..PAGE).map_err(|e| self.lost(e))?;
        }
        let mut table = lock(&self.table);
        table.next_seq = seq + 1;
        table.ready.push_back(Segment { seq, medium });
        Ok(())
    }

    /// Creates files up to the configured minimum, at opening time.
    pub fn allocate_min(&self) -> Result<(), LogError> {
        while lock(&self.table).files < self.config.segments_min {
            let Some(medium) = self.create()? else { break };
            lock(&self.table).free.push_back(medium);
            self.spare.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Creates another file; `None` if the limit is reached or the disk is full.
    fn create(&self) -> Result<Option<Arc<Gated>>, LogError> {
        let name = {
            let table = lock(&self.table);
            if table.files >= self.config.segments_max {
                return Ok(None);
            }
            Shared::file_name(&self.config.prefix, table.next_name)
        };
        match self
            .volume
            .create(&name, self.config.segment_bytes, Access::Mapped)
        {
            Ok(medium) => {
                self.disk_full.store(false, Ordering::Relaxed);
                let mut table = lock(&self.table);
                table.files += 1;
                table.next_name += 1;
                Ok(Some(Arc::new(Gated::new(
                    &name,
                    medium,
                    self.poison.clone(),
                ))))
            }
            Err(error) if error.is_no_space() => {
                self.disk_full.store(true, Ordering::Relaxed);
                Ok(None)
            }
            // The file never had its name, so nothing stored is in doubt; but a disk that fails
            // here fails elsewhere, and fsync's answer will not be repeated.
            Err(error) => Err(self.lost(error)),
        }
    }
}

/// Wakes a thread that sleeps until it is asked for something.
#[derive(Debug, Clone)]
pub(super) struct Bell {
    asked: Arc<AtomicBool>,
    thread: Thread,
}

impl Bell {
    /// The thread looks at `asked` whenever it is unparked.
    pub fn new(asked: Arc<AtomicBool>, thread: Thread) -> Bell {
        Bell { asked, thread }
    }

    pub fn ring(&self) {
        if !self.asked.swap(true, Ordering::SeqCst) {
            self.thread.unpark();
        }
    }
}

/// Makes a log durable and keeps segments ready; lives on a thread that may block.
#[derive(Debug, Clone)]
pub struct SyncHandle {
    shared: Arc<Shared>,
}

impl SyncHandle {
    pub(super) fn new(shared: Arc<Shared>) -> SyncHandle {
        SyncHandle { shared }
    }

    /// Everything before this position is durable.
    pub fn durable(&self) -> Lsn {
        self.shared.durable()
    }

    /// Whom a refused reservation wakes, so that it calls [`SyncHandle::prepare`].
    pub(super) fn set_bell(&self, bell: Bell) {
        self.shared.set_bell(bell);
    }

    /// Makes everything before `up_to` durable, which must be a value of [`super::Log::end`] that
    /// was handed over by the appending thread. Syncs the exact pages of what is new.
    ///
    /// # Errors
    /// The first failure poisons the log; nothing after it is ever reported durable.
    pub fn sync(&self, up_to: Lsn) -> Result<Lsn, LogError> {
        if self.durable() < up_to {
            self.flush(up_to, None)?;
            self.settle(up_to);
        }
        Ok(self.durable())
    }

    /// Syncs the pages before `up_to` that are new, and with them a claim that is stored before,
    /// at an offset of the segment that `up_to` lies in, before it.
    pub(super) fn flush(&self, up_to: Lsn, claim: Option<(u64, &[u8])>) -> Result<(), LogError> {
        let shared = &self.shared;
        shared.check()?;
        let segment_bytes = shared.config.segment_bytes;
        let from = shared.durable().min(up_to);
        let (first, last) = (from.0 / segment_bytes, up_to.0 / segment_bytes);
        let dirty: Vec<Segment> = lock(&shared.table)
            .live
            .iter()
            .filter(|s| (first..=last).contains(&s.seq))
            .cloned()
            .collect();
        if dirty.last().is_none_or(|s| s.seq != last) {
            return Err(LogError {
                cause: format!("position {up_to} is in no segment"),
            });
        }
        for segment in dirty {
            let base = segment.seq * segment_bytes;
            let mut start = from.0.saturating_sub(base).max(SEGMENT_START);
            let end = (up_to.0 - base).min(segment_bytes);
            if let Some((at, bytes)) = claim
                && segment.seq == last
            {
                let stored = segment.medium.store(at, bytes);
                stored.map_err(|e| shared.lost(e))?;
                // One call: what is clean in between costs nothing.
                start = start.min(at);
            }
            if start < end {
                let mut done = segment.medium.sync(start..end);
                if bites(Tooth::RetrySync) && done.is_err() {
                    done = segment.medium.sync(start..end);
                }
                done.map_err(|e| shared.lost(e))?;
            }
        }
        // A failure on another log of the group came first: nothing is promised any more.
        shared.check()
    }

    /// Everything before `up_to` is durable from now on.
    pub(super) fn settle(&self, up_to: Lsn) {
        self.shared.set_durable(up_to);
    }

    /// Keeps a segment ready ahead of the active one: reuses or creates files as needed. To be
    /// called after each sync. A full disk is no error; reservations are refused instead.
    ///
    /// # Errors
    /// The log is or becomes poisoned.
    pub fn prepare(&self) -> Result<(), LogError> {
        self.shared.prepare(READY_AHEAD)?;
        self.shared.prefault();
        Ok(())
    }
}
