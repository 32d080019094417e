//! All logs of a node, opened together.
//!
//! Owns: the names of a node's logs, the commit log's shape, and the decision which commit groups
//! count after a restart.
//!
//! A group counts iff its claim (see [`super::commit`]) is intact and every log is valid up to the
//! claimed end. `D` is the largest such group. Groups above `D` are *void*: an `OPEN` record says
//! so in every log, durably, before anything is appended, and new groups start above every group
//! seen. Records of void groups stay where they are and are skipped. (Cutting the logs instead
//! would lose records of group `D` that stand after one of group `D+1`, which two shards can
//! produce.)
//!
//! *Loss is detected*: a claim also carries the newest group known durable when it was written; if
//! the logs do not satisfy that group, [`OpenError::CommittedMissing`] names the log. *Not
//! detected*: loss of the newest groups when no later claim survived (see the parent module).
//!
//! Deliberately absent: removal of logs that a smaller number of shards has left over; they are
//! opened, read and synced like the others.

use super::commit::{self, Committed, Committer, ShardLog};
use super::record::{ClaimBody, KIND_CLAIM, LogIdentity, OpenBody};
use super::recover::Scanned;
use super::verdict::{OpenError, Proof, Recovered};
use super::{Log, LogConfig, LogError, Lsn};
use crate::medium::{MediumError, Poison, Volume};
use std::sync::Arc;

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

/// Shape of a node's logs.
#[derive(Debug, Clone)]
pub struct SetConfig {
    /// The storage's uuid.
    pub storage: u128,
    /// Logs wanted: one per shard. Logs of a larger number found on disk are opened too.
    pub shards: u32,
    /// Pattern for the shards' logs; prefix, identity and what must be there are filled in.
    pub shard: LogConfig,
    /// Checkpoint positions by log number, 0 for none: a log with one must hold every record from
    /// there on.
    pub must_reach: Vec<Lsn>,
    /// The node was started before, so the first log has a segment.
    pub was_opened: bool,
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
    pub(super) logs: Vec<Log>,
    pub(super) commits: Log,
    pub(super) poison: Arc<Poison>,
    pub(super) durable_group: u64,
    pub(super) next_group: u64,
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
        commit::start(self, Box::new(notify))
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
    let known = config.must_reach.get(number as usize).copied();
    LogConfig {
        prefix: shard_prefix(number),
        identity: LogIdentity {
            storage: config.storage,
            number,
        },
        must_reach: known.unwrap_or_default(),
        // Nothing goes before a checkpoint has it.
        needed_from: known.or(config.was_opened.then_some(Lsn(0))),
        // Others may have been added since, by a start that was cut off.
        was_opened: config.was_opened && number == 0,
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
