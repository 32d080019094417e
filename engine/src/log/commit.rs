//! Node-wide commit groups over several logs, as in Silo.
//!
//! Owns: the group clock, the commit log, the committer thread, and the opening of all logs of a
//! node together.
//!
//! A record carries the group that its operation was pinned to; both halves of an operation over
//! two shards carry the same. The committer closes the current group (new operations get the next
//! one), waits until nobody has it pinned, reads the logs' ends, writes them as a *claim* into the
//! commit log, syncs the logs that grew and the commit log, and reports the group durable. One
//! sync after another: what arrives meanwhile forms the next group, so batching needs no timer.
//!
//! At a restart a group counts iff its claim is intact and every log is valid up to the claimed
//! end. `D` is the largest such group. Groups above `D` are *void*: an `OPEN` record says so in
//! every log, durably, before anything is appended, and new groups start above every group seen.
//! Records of void groups stay where they are and are skipped. (Cutting the logs instead would lose
//! records of group `D` that stand after one of group `D+1`, which two shards can produce.)
//!
//! *Loss is detected*: a claim also carries the newest group known durable when it was written; if
//! the logs do not satisfy that group, [`OpenError::CommittedMissing`] names the log. *Not detected*:
//! loss of the newest groups when no later claim survived (see the parent module).
//!
//! Invariants: a group is reported only after every sync returned `Ok`; after the first failure
//! nothing is reported any more (one error, then silence).
//! Deliberately absent: retry; time; acknowledgements to peers (the notifier's business).
//!
//! Source: design D2, D5; Tu et al., "Speedy Transactions in Multicore In-Memory Databases".

use super::record::{ClaimBody, KIND_CLAIM, LogIdentity, OpenBody};
use super::recover::{OpenError, Proof, Recovered, Scanned};
use super::{Append, Log, LogConfig, LogError, Lsn, SyncHandle};
use crate::medium::{MediumError, Poison, Volume};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{JoinHandle, Thread};

/// File prefix of the commit log.
const COMMIT_PREFIX: &str = "commit";
/// Log number of the commit log.
const COMMIT_NUMBER: u32 = u32::MAX;
/// Most logs a node can have; their ends must fit into one claim.
pub const LOGS_MAX: u32 = 256;
/// Segment length of the commit log, bytes.
const COMMIT_SEGMENT: u64 = 256 << 10;

fn shard_prefix(number: u32) -> String {
    format!("shard-{number:03}")
}

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

    /// Ends a batch: everything appended under `pin` lies before `end`, the log's end.
    pub fn publish(&self, pin: GroupPin, end: Lsn) {
        // Release pairs with the committer's Acquire: it may sync what was stored before.
        self.end.store(end.0, Ordering::Release);
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

/// Shape of a node's logs.
#[derive(Debug, Clone)]
pub struct SetConfig {
    /// The storage's uuid.
    pub storage: u128,
    /// Logs wanted: one per shard. Logs of a larger number found on disk are opened too.
    pub shards: u32,
    /// Pattern for the shards' logs; prefix, identity and `must_reach` are filled in.
    pub shard: LogConfig,
    /// Checkpoint positions by log number, as the superblock has them.
    pub must_reach: Vec<Lsn>,
}

/// What the restart found and decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetRecovered {
    /// Groups up to this one count.
    pub durable_group: u64,
    /// The first group of this life; those between never happened.
    pub next_group: u64,
    /// Per shard log.
    pub shards: Vec<Recovered>,
    /// The commit log.
    pub commits: Recovered,
}

/// All logs of a node, open.
#[derive(Debug)]
pub struct LogSet {
    logs: Vec<Log>,
    commits: Log,
    poison: Arc<Poison>,
    durable_group: u64,
    next_group: u64,
}

impl LogSet {
    /// Opens, or creates, all logs of a node.
    ///
    /// # Errors
    /// See [`OpenError`].
    ///
    /// # Panics
    /// If more than [`LOGS_MAX`] shards are wanted.
    pub fn open(
        volume: Arc<dyn Volume>,
        config: &SetConfig,
    ) -> Result<(LogSet, SetRecovered), OpenError> {
        let Found {
            scans,
            commits,
            groups,
            poison,
        } = Found::scan(volume, config)?;
        let mut logs = Vec::new();
        let mut shards = Vec::new();
        for scan in scans {
            let (log, report) = scan.open(groups)?;
            logs.push(log);
            shards.push(report);
        }
        // Last, so that claims of this life follow a decision that every log knows.
        let (commits, commits_report) = commits.open(groups)?;
        let OpenBody {
            durable_group,
            next_group,
        } = groups;
        let report = SetRecovered {
            durable_group,
            next_group,
            shards,
            commits: commits_report,
        };
        Ok((
            LogSet {
                logs,
                commits,
                poison,
                durable_group,
                next_group,
            },
            report,
        ))
    }

    /// Looks at all logs of a node and changes nothing: what opening them would find and decide.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn verify(volume: Arc<dyn Volume>, config: &SetConfig) -> Result<SetRecovered, OpenError> {
        let found = Found::scan(volume, config)?;
        let OpenBody {
            durable_group,
            next_group,
        } = found.groups;
        let shards = found.scans.iter().map(|s| s.report().clone()).collect();
        let commits = found.commits.report().clone();
        Ok(SetRecovered {
            durable_group,
            next_group,
            shards,
            commits,
        })
    }

    /// The logs, by number; before the committer starts, for redo and undo at recovery.
    pub fn logs(&self) -> &[Log] {
        &self.logs
    }

    /// Starts the committer. `notify` is called on its thread, once per group that became durable,
    /// and at most once with an error, as the last call.
    ///
    /// # Errors
    /// The thread could not be started.
    pub fn start(
        self,
        notify: impl FnMut(Result<Committed<'_>, &LogError>) + Send + 'static,
    ) -> Result<(Vec<ShardLog>, Committer), MediumError> {
        let clock = Arc::new(GroupClock::new(self.next_group));
        let durable_group = Arc::new(AtomicU64::new(self.durable_group));
        let stop = Arc::new(AtomicBool::new(false));
        let ends: Vec<_> = self
            .logs
            .iter()
            .map(|log| Arc::new(AtomicU64::new(log.end().0)))
            .collect();
        let work = Work {
            clock: clock.clone(),
            closed: self.next_group - 1,
            handles: self.logs.iter().map(Log::sync_handle).collect(),
            ends: ends.clone(),
            commits_sync: self.commits.sync_handle(),
            commits: self.commits,
            poison: self.poison,
            durable_group: durable_group.clone(),
            stop: stop.clone(),
            body: Vec::new(),
            notify: Box::new(notify),
        };
        let thread = std::thread::Builder::new()
            .name("lowtide-commit".to_owned())
            .spawn(move || work.run())
            .map_err(|e| MediumError::from_io(COMMIT_PREFIX, crate::medium::Call::Open, 0, 0, e))?;
        let _ = clock.committer.set(thread.thread().clone());
        // A shard cannot publish before it has its log, so no wake-up was lost.
        let shards = self.logs.into_iter().zip(ends).map(|(log, end)| {
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
}

/// All logs of a node, scanned, and the decision about groups.
struct Found {
    scans: Vec<Scanned>,
    commits: Scanned,
    groups: OpenBody,
    poison: Arc<Poison>,
}

impl Found {
    fn scan(volume: Arc<dyn Volume>, config: &SetConfig) -> Result<Found, OpenError> {
        assert!(config.shards >= 1 && config.shards <= LOGS_MAX);
        let poison = Arc::new(Poison::default());
        let mut scans = Vec::new();
        for number in 0..count_logs(&*volume, config.shards)? {
            let shard = shard_config(config, number);
            scans.push(Scanned::scan(volume.clone(), shard, poison.clone())?);
        }
        let mut claims = Vec::new();
        let commits =
            Scanned::scan_with(volume, commit_config(config), poison.clone(), &mut |r| {
                if r.header.kind == KIND_CLAIM
                    && let Some(body) = ClaimBody::decode(&r.body)
                {
                    claims.push((r.header.group, body));
                }
            })?;
        let groups = decide(&scans, &commits, &claims)?;
        Ok(Found {
            scans,
            commits,
            groups,
            poison,
        })
    }
}

fn shard_config(config: &SetConfig, number: u32) -> LogConfig {
    LogConfig {
        prefix: shard_prefix(number),
        identity: LogIdentity {
            storage: config.storage,
            number,
        },
        must_reach: config
            .must_reach
            .get(number as usize)
            .copied()
            .unwrap_or_default(),
        ..config.shard.clone()
    }
}

fn commit_config(config: &SetConfig) -> LogConfig {
    let identity = LogIdentity {
        storage: config.storage,
        number: COMMIT_NUMBER,
    };
    LogConfig {
        segment_bytes: COMMIT_SEGMENT,
        record_bytes_max: 4096,
        segments_min: 2,
        segments_max: 4,
        reserve_bytes: 0,
        ..LogConfig::new(COMMIT_PREFIX, identity)
    }
}

const _: () = assert!(
    super::record_len(8 * (LOGS_MAX as u64 + 1)) <= 4096,
    "a claim of all logs is one record"
);

fn count_logs(volume: &dyn Volume, wanted: u32) -> Result<u32, OpenError> {
    let mut count = wanted;
    for name in volume.list()? {
        let number = name
            .strip_prefix("shard-")
            .and_then(|rest| rest.get(..3)?.parse::<u32>().ok());
        if let Some(number) = number.filter(|n| *n < LOGS_MAX) {
            count = count.max(number + 1);
        }
    }
    Ok(count)
}

/// Decides which groups count; see the module's comment.
fn decide(
    scans: &[Scanned],
    commits: &Scanned,
    claims: &[(u64, ClaimBody)],
) -> Result<OpenBody, OpenError> {
    let all = || scans.iter().chain([commits]);
    let group_max = all().map(|s| s.report().group_max).max().unwrap_or(0);
    // The first opening of a node writes group 0 only; with more, there was a commit log.
    if commits.report().records == 0 && group_max > 0 {
        return Err(commits.missing(Proof::Group(group_max)));
    }
    let is_void = |group: u64| {
        let within = |o: &OpenBody| o.durable_group < group && group < o.next_group;
        all().any(|s| s.opens().iter().any(within))
    };
    let lacking = |claim: &ClaimBody| {
        let end = |i: usize| scans.get(i).map_or(Lsn(0), |s| s.report().end);
        (0..claim.ends.len()).find(|i| claim.ends[*i] > end(*i))
    };
    let base = commits
        .opens()
        .iter()
        .map(|o| o.durable_group)
        .max()
        .unwrap_or(0);
    let proved = claims
        .iter()
        .map(|(_, c)| c.durable_group)
        .max()
        .unwrap_or(0)
        .max(base);
    let mut durable = base;
    for (group, claim) in claims.iter().filter(|(group, _)| !is_void(*group)) {
        match lacking(claim) {
            None => durable = durable.max(*group),
            Some(log) if *group <= proved => {
                let log = scans.get(log).unwrap_or(commits);
                return Err(log.missing(Proof::Group(proved)));
            }
            Some(_) => {}
        }
    }
    if durable < proved {
        return Err(commits.missing(Proof::Group(proved)));
    }
    Ok(OpenBody {
        durable_group: durable,
        next_group: group_max + 1,
    })
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

type Notify = Box<dyn FnMut(Result<Committed<'_>, &LogError>) + Send>;

/// What the committer thread owns.
struct Work {
    clock: Arc<GroupClock>,
    /// Published ends, by log.
    ends: Vec<Arc<AtomicU64>>,
    /// The last group that was closed.
    closed: u64,
    handles: Vec<SyncHandle>,
    commits: Log,
    commits_sync: SyncHandle,
    poison: Arc<Poison>,
    durable_group: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    body: Vec<u8>,
    notify: Notify,
}

impl Work {
    fn run(mut self) {
        loop {
            // Looked at first, so that what was published before the stop is committed.
            let stop = self.stop.load(Ordering::SeqCst);
            if self.clock.published.load(Ordering::SeqCst) > self.closed {
                if let Err(error) = self.commit().and_then(|()| self.prepare()) {
                    (self.notify)(Err(&error));
                    return;
                }
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
        let ends: Vec<Lsn> = self
            .ends
            .iter()
            .map(|e| Lsn(e.load(Ordering::Acquire)))
            .collect();
        // They may include records of the next group: those are void until it is durable as well.
        let claim = self.claim(group, &ends)?;
        for (handle, end) in self.handles.iter().zip(&ends) {
            handle.sync(*end)?;
        }
        self.commits_sync.sync(self.commits.end())?;
        if let Some(cause) = self.poison.cause() {
            return Err(LogError {
                cause: cause.to_owned(),
            });
        }
        // Release pairs with the Acquire in `DurableGroup::get`.
        self.durable_group.store(group, Ordering::Release);
        (self.notify)(Ok(Committed { group, ends: &ends }));
        // The claim of the newest durable group stays: later claims refer to it.
        self.commits.recycle(claim);
        Ok(())
    }

    fn claim(&mut self, group: u64, ends: &[Lsn]) -> Result<Lsn, LogError> {
        self.body.clear();
        let durable = self.durable_group.load(Ordering::Relaxed);
        ClaimBody::encode_into(durable, ends, &mut self.body);
        let parts = [&self.body[..]];
        let claim = Append {
            kind: KIND_CLAIM,
            flags: 0,
            epoch: 0,
            group,
            parts: &parts,
        };
        self.commits.append_any(claim).map_err(|error| match error {
            super::AppendError::Poisoned(e) => e,
            // Each durable claim frees the segments before it, so this needs a disk that was full
            // when the log was created.
            other => LogError {
                cause: other.to_string(),
            },
        })
    }

    fn prepare(&self) -> Result<(), LogError> {
        self.commits_sync.prepare()?;
        self.handles.iter().try_for_each(SyncHandle::prepare)
    }
}
