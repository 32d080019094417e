//! Node-wide commit groups: the clock, and the thread that makes groups durable.
//!
//! A record carries the group that its operation was pinned to; both halves of an operation over
//! two shards carry the same. The committer closes the current group (new operations get the next
//! one), waits until nobody has it pinned, reads the logs' ends, syncs the logs that grew, the first
//! one together with a *claim* that says how far each reaches ([`super::claim`]), and reports the
//! group durable. So a node with one log pays one write per group. What arrives meanwhile forms the
//! next group, so batching needs no timer. What a restart makes of the claims stands in
//! [`super::set`].
//!
//! Invariants: a group is reported only after every sync returned `Ok`; after the first failure
//! nothing is reported any more (one error, then silence).
//! Deliberately absent: retry; time; acknowledgements to peers (the notifier's business).
//!
//! Source: design D2, D5; Tu et al., "Speedy Transactions in Multicore In-Memory Databases".

use super::claim::Claims;
use super::segment::Bell;
use super::set::LogSet;
use super::teeth::{Tooth, bites};
use super::{BatchEnd, Log, LogError, Lsn, SyncHandle};
use crate::medium::{Call, MediumError, Poison};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{JoinHandle, Thread};

/// Hands out the current commit group.
#[derive(Debug)]
pub struct GroupClock {
    current: AtomicU64,
    /// Pins of the current group and of the one being closed, by the group's lowest bit.
    pins: [AtomicU64; 2],
    /// The committer sleeps until the group being closed is unpinned.
    closing: AtomicBool,
    /// The largest group that something was published in; what the committer has to close.
    published: AtomicU64,
    /// A thread panicked while it held a pin: its operation may be half appended.
    broken: AtomicBool,
    committer: OnceLock<Thread>,
}

impl GroupClock {
    fn new(first: u64) -> GroupClock {
        GroupClock {
            current: AtomicU64::new(first),
            pins: [AtomicU64::new(0), AtomicU64::new(0)],
            closing: AtomicBool::new(false),
            published: AtomicU64::new(0),
            broken: AtomicBool::new(false),
            committer: OnceLock::new(),
        }
    }

    /// Pins the current group: it will not be closed until the pin and its clones are gone. Hold it
    /// while appending a batch, never while waiting for a commit.
    pub fn pin(self: &Arc<Self>) -> GroupPin {
        loop {
            // SeqCst, with the SeqCst pair in `close`: either the closer sees this pin, or this
            // thread sees the new group and tries again.
            let group = self.current.load(Ordering::SeqCst);
            self.pins[group as usize & 1].fetch_add(1, Ordering::SeqCst);
            let pin = GroupPin {
                clock: self.clone(),
                group,
            };
            if self.current.load(Ordering::SeqCst) == group {
                return pin;
            }
        }
    }

    /// Ends the current group and waits until nobody has it pinned. Only the committer calls it.
    fn close(&self) -> u64 {
        let group = self.current.load(Ordering::SeqCst);
        self.current.store(group + 1, Ordering::SeqCst);
        self.closing.store(true, Ordering::SeqCst);
        while self.pins[group as usize & 1].load(Ordering::SeqCst) > 0 {
            std::thread::park();
        }
        self.closing.store(false, Ordering::SeqCst);
        group
    }

    fn wake(&self) {
        if let Some(thread) = self.committer.get() {
            thread.unpark();
        }
    }
}

/// Keeps a commit group open.
#[derive(Debug)]
pub struct GroupPin {
    clock: Arc<GroupClock>,
    group: u64,
}

impl GroupPin {
    /// The group, for [`Append::group`].
    pub fn group(&self) -> u64 {
        self.group
    }
}

impl Clone for GroupPin {
    fn clone(&self) -> GroupPin {
        // The group is held open by `self`, so no check is needed.
        self.clock.pins[self.group as usize & 1].fetch_add(1, Ordering::SeqCst);
        GroupPin {
            clock: self.clock.clone(),
            group: self.group,
        }
    }
}

impl Drop for GroupPin {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.clock.broken.store(true, Ordering::SeqCst);
        }
        let left = self.clock.pins[self.group as usize & 1].fetch_sub(1, Ordering::SeqCst) - 1;
        // SeqCst: either this thread sees `closing`, or the closer sees the count.
        if left == 0 && self.clock.closing.load(Ordering::SeqCst) {
            self.clock.wake();
        }
    }
}

/// Positions are multiples of [`ALIGN`](super::record::ALIGN): the lowest bit is free.
fn pack(batch: BatchEnd) -> u64 {
    batch.end.0 | u64::from(batch.has_room)
}

fn unpack(packed: u64) -> BatchEnd {
    BatchEnd {
        end: Lsn(packed & !1),
        has_room: packed & 1 == 1,
    }
}

/// A shard's way to tell the committer how far its log has come.
#[derive(Debug, Clone)]
pub struct Publisher {
    end: Arc<AtomicU64>,
    clock: Arc<GroupClock>,
}

impl Publisher {
    /// The clock to pin groups with.
    pub fn clock(&self) -> &Arc<GroupClock> {
        &self.clock
    }

    /// Hands a batch over: everything appended under `pin` lies before `end`, what
    /// [`Log::end_batch`] said last.
    pub fn publish(&self, pin: GroupPin, end: BatchEnd) {
        // Release pairs with the committer's Acquire: it may sync what was stored before.
        self.end.store(pack(end), Ordering::Release);
        // Before the pin goes: when the group is drained, everything about it is known. The first
        // to publish in a group wakes the committer, which then waits for the others.
        let before = self.clock.published.fetch_max(pin.group, Ordering::SeqCst);
        let group = pin.group;
        drop(pin);
        if before < group {
            self.clock.wake();
        }
    }
}

/// A log together with its way to the committer.
#[derive(Debug)]
pub struct ShardLog {
    /// The log.
    pub log: Log,
    /// Where to publish its end.
    pub publisher: Publisher,
}

/// What became durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Committed<'a> {
    /// This group and all before it.
    pub group: u64,
    /// How far each log is durable, by log number.
    pub ends: &'a [Lsn],
}

/// Starts the committer of a set; see [`super::set::LogSet::start`].
pub(super) fn start(
    mut set: LogSet,
    notify: Notify,
) -> Result<(Vec<ShardLog>, Committer), MediumError> {
    let logs = set.logs.len();
    let claims = Claims::of(&mut set.logs[0], logs);
    let clock = Arc::new(GroupClock::new(set.next_group));
    let durable_group = Arc::new(AtomicU64::new(set.durable_group));
    let stop = Arc::new(AtomicBool::new(false));
    let ends: Vec<_> = set
        .logs
        .iter()
        .map(|log| Arc::new(AtomicU64::new(log.end().0)))
        .collect();
    let spawned = |e| MediumError::from_io("threads", Call::Open, 0, 0, e);
    let prepared = set.logs.iter().map(Log::sync_handle);
    let work = Work {
        preparer: Preparer::start(prepared.collect()).map_err(spawned)?,
        clock: clock.clone(),
        closed: set.next_group - 1,
        claims,
        others: set.logs[1..].iter().map(Log::sync_handle).collect(),
        ends: ends.clone(),
        poison: set.poison,
        durable_group: durable_group.clone(),
        stop: stop.clone(),
        notify,
    };
    let thread = std::thread::Builder::new()
        .name("lowtide-commit".to_owned())
        .spawn(move || work.run())
        .map_err(spawned)?;
    let _ = clock.committer.set(thread.thread().clone());
    // A shard cannot publish before it has its log, so no wake-up was lost.
    let shards = set.logs.into_iter().zip(ends).map(|(log, end)| {
        let publisher = Publisher {
            end,
            clock: clock.clone(),
        };
        ShardLog { log, publisher }
    });
    let shards = shards.collect();
    Ok((
        shards,
        Committer {
            clock,
            durable_group,
            stop,
            thread: Some(thread),
        },
    ))
}

/// The committer, from outside.
#[derive(Debug)]
pub struct Committer {
    clock: Arc<GroupClock>,
    durable_group: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Committer {
    /// Groups up to this one are durable on every log.
    pub fn durable_group(&self) -> u64 {
        self.durable_group.load(Ordering::Acquire)
    }

    /// The same, for other threads.
    pub fn durable_group_cell(&self) -> DurableGroup {
        DurableGroup(self.durable_group.clone())
    }

    /// The clock that groups are pinned with.
    pub fn clock(&self) -> &Arc<GroupClock> {
        &self.clock
    }

    /// Whether the thread has ended: after a failure nothing is committed any more.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Commits what has been published and ends the thread. All pins must be gone.
    pub fn stop(mut self) {
        self.join();
    }

    fn join(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.clock.wake();
        if let Some(thread) = self.thread.take() {
            // A panic there was reported by the panic hook; nothing more is acknowledged.
            let _ = thread.join();
        }
    }
}

impl Drop for Committer {
    fn drop(&mut self) {
        self.join();
    }
}

/// Reads the newest durable group.
#[derive(Debug, Clone)]
pub struct DurableGroup(Arc<AtomicU64>);

impl DurableGroup {
    /// Groups up to this one are durable on every log.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
}

pub(super) type Notify = Box<dyn FnMut(Result<Committed<'_>, &LogError>) + Send>;

/// What the committer thread owns.
struct Work {
    clock: Arc<GroupClock>,
    /// Published ends, by log.
    ends: Vec<Arc<AtomicU64>>,
    /// The last group that was closed.
    closed: u64,
    /// The first log, with the claims.
    claims: Claims,
    others: Vec<SyncHandle>,
    preparer: Preparer,
    poison: Arc<Poison>,
    durable_group: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    notify: Notify,
}

impl Work {
    fn run(mut self) {
        loop {
            // Looked at first, so that what was published before the stop is committed.
            let stop = self.stop.load(Ordering::SeqCst);
            if self.clock.published.load(Ordering::SeqCst) > self.closed {
                if let Err(error) = self.commit() {
                    (self.notify)(Err(&error));
                    return;
                }
                self.preparer.wake();
            } else if stop {
                return;
            } else {
                std::thread::park();
            }
        }
    }

    /// Makes one group durable and reports it.
    fn commit(&mut self) -> Result<(), LogError> {
        let group = self.clock.close();
        self.closed = group;
        if self.clock.broken.load(Ordering::SeqCst) {
            return Err(LogError {
                cause: "a thread panicked while appending".to_owned(),
            });
        }
        // Acquire pairs with the Release in `publish`.
        let published = self.ends.iter().map(|e| unpack(e.load(Ordering::Acquire)));
        let published: Vec<BatchEnd> = published.collect();
        let ends: Vec<Lsn> = published.iter().map(|batch| batch.end).collect();
        // They may include records of the next group: those are void until it is durable as well.
        for (handle, end) in self.others.iter().zip(&ends[1..]) {
            if bites(Tooth::NoticeBeforeDurable) {
                break;
            }
            handle.sync(*end)?;
        }
        let durable = self.durable_group.load(Ordering::Relaxed);
        self.claims.commit(group, durable, published[0], &ends)?;
        if let Some(cause) = self.poison.cause() {
            return Err(LogError {
                cause: cause.to_owned(),
            });
        }
        self.claims.settle(ends[0]);
        // Release pairs with the Acquire in `DurableGroup::get`.
        self.durable_group.store(group, Ordering::Release);
        (self.notify)(Ok(Committed { group, ends: &ends }));
        Ok(())
    }
}

/// A second thread that allocates and faults in what the logs will need next, so that a commit
/// never waits for it. It is woken after each commit and when a log should grow, and ends with the
/// committer, or when a log is poisoned (which the committer finds out by itself).
#[derive(Debug)]
struct Preparer {
    bell: Bell,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Preparer {
    fn start(handles: Vec<SyncHandle>) -> std::io::Result<Preparer> {
        let asked = Arc::new(AtomicBool::new(true));
        let stop = Arc::new(AtomicBool::new(false));
        let (ask, halt, logs) = (asked.clone(), stop.clone(), handles.clone());
        let run = move || {
            while !halt.load(Ordering::SeqCst) {
                if !ask.swap(false, Ordering::SeqCst) {
                    std::thread::park();
                } else if handles.iter().try_for_each(SyncHandle::prepare).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("lowtide-prepare".to_owned())
            .spawn(run)?;
        let bell = Bell::new(asked, thread.thread().clone());
        for log in logs {
            log.set_bell(bell.clone());
        }
        Ok(Preparer {
            bell,
            stop,
            thread: Some(thread),
        })
    }

    fn wake(&self) {
        self.bell.ring();
    }
}

impl Drop for Preparer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.wake();
        if let Some(thread) = self.thread.take() {
            // A panic there was reported by the panic hook; appends then prepare for themselves.
            let _ = thread.join();
        }
    }
}
