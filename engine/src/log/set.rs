//! All logs of a node, opened together.
//!
//! Owns: the names of a node's logs, and the decision which commit groups count after a restart.
//!
//! A group counts iff its claim (see [`super::claim`]) is intact and every log is valid up to the
//! claimed end, or if an earlier restart said so. `D` is the largest such group. Groups above `D`
//! are *void*: an `OPEN` record says so in every log, durably, before anything is appended, and new
//! groups start above every group seen. Records of void groups stay where they are and are skipped.
//! (Cutting the logs instead would lose records of group `D` that stand after one of group `D+1`,
//! which two shards can produce.) A node with one log needs claims as well: a record may reach the
//! disk before the extents that it points to, and only its group's claim says that they are there.
//!
//! *Loss is detected*: a claim also carries the newest group known durable when it was written; if
//! the logs do not satisfy that group, [`OpenError::CommittedMissing`] names the log. The first log
//! is called durable only when a group is, so its records vouch for claims as well
//! ([`OpenError::ClaimMissing`]). *Not detected*: loss of the newest groups when nothing later
//! survived (see the parent module).
//!
//! Claims grow in every log from group to group. One that reaches further than a newer one that
//! holds is left over from a void group whose `OPEN` was recycled, and means nothing.
//!
//! Deliberately absent: removal of logs that a smaller number of shards has left over; they are
//! opened, read and synced like the others.

use super::claim::Claim;
use super::commit::{self, Committed, Committer, ShardLog};
use super::record::{LogIdentity, OpenBody};
use super::recover::Scanned;
use super::verdict::{OpenError, Proof, Recovered};
use super::{Log, LogConfig, LogError, Lsn};
use crate::medium::{MediumError, Poison, Volume};
use std::sync::Arc;

/// Most logs a node can have; their ends must fit into one claim.
pub const LOGS_MAX: u32 = 256;
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
    /// Per log.
    pub shards: Vec<Recovered>,
}

/// All logs of a node, open.
#[derive(Debug)]
pub struct LogSet {
    pub(super) logs: Vec<Log>,
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
            groups,
            poison,
        } = Found::scan(volume, config)?;
        let mut opened = Vec::new();
        // The first one last, so that claims of this life follow a decision that every log knows.
        for scan in scans.into_iter().rev() {
            opened.push(scan.open(groups)?);
        }
        let (logs, shards) = opened.into_iter().rev().unzip();
        let OpenBody {
            durable_group,
            next_group,
        } = groups;
        let report = SetRecovered {
            durable_group,
            next_group,
            shards,
        };
        Ok((
            LogSet {
                logs,
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
        Ok(SetRecovered {
            durable_group,
            next_group,
            shards,
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
        let groups = decide(&scans, &scans[0].claims()?)?;
        Ok(Found {
            scans,
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
fn decide(scans: &[Scanned], claims: &[Claim]) -> Result<OpenBody, OpenError> {
    let first = &scans[0];
    let seen = scans.iter().map(|s| s.report().group_max);
    let group_max = seen.chain(claims.iter().map(|c| c.group)).max();
    let group_max = group_max.unwrap_or(0);
    // The first opening of a node writes group 0 only, and the first log last.
    if first.report().records == 0 && group_max > 0 {
        return Err(first.missing(Proof::Group(group_max)));
    }
    // Before a first claim every log has a durable `OPEN`, and recycling leaves it a record.
    for (number, scan) in scans.iter().enumerate() {
        let is_named = |c: &Claim| c.body.ends.get(number).is_some_and(|end| *end > Lsn(0));
        if scan.report().records == 0 && claims.iter().any(is_named) {
            return Err(scan.segments_missing());
        }
    }
    let is_void = |group: u64| {
        let within = |o: &OpenBody| o.durable_group < group && group < o.next_group;
        scans.iter().any(|s| s.opens().iter().any(within))
    };
    // The first log that does not reach as far as claimed.
    let lacking = |claim: &Claim| {
        let end = |i: usize| scans.get(i).map_or(Lsn(0), |s| s.report().end);
        let ends = &claim.body.ends;
        (0..ends.len()).find(|i| ends[*i] > end(*i))
    };
    let base = first.opens().iter().map(|o| o.durable_group).max();
    let base = base.unwrap_or(0);
    let proved = claims.iter().map(|c| c.body.durable_group).max();
    let proved = proved.unwrap_or(0).max(base);
    let mut claims: Vec<&Claim> = claims.iter().filter(|c| !is_void(c.group)).collect();
    claims.sort_by_key(|c| c.group);
    let newest = claims.iter().rposition(|c| lacking(c).is_none());
    for claim in &claims[newest.map_or(0, |n| n + 1)..] {
        if let Some(log) = lacking(claim)
            && claim.group <= proved
        {
            return Err(match scans.get(log) {
                Some(scan) => scan.missing(Proof::Group(proved)),
                None => OpenError::SegmentsMissing {
                    log: shard_prefix(log as u32),
                    headers_damaged: 0,
                },
            });
        }
    }
    let newest = newest.map(|n| claims[n]);
    let durable = newest.map_or(base, |c| c.group.max(base));
    if durable < proved {
        return Err(first.claim_missing(Proof::Group(proved)));
    }
    let (told, opened) = first.settled();
    let claimed = newest.and_then(|c| c.body.ends.first().copied());
    if told > opened.max(claimed.unwrap_or_default()) {
        return Err(first.claim_missing(Proof::LaterRecord(told)));
    }
    Ok(OpenBody {
        durable_group: durable,
        next_group: group_max + 1,
    })
}
