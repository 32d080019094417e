//! What recovery says: what was found, where it stopped, why a log cannot be opened.
//!
//! Owns: the types of the report and the errors. Deliberately absent: any decision.

use super::record::{FORMAT, LogIdentity, Lsn};
use super::{AppendError, LogError};
use crate::medium::MediumError;

/// Why a scan stopped, or why bytes are not the record that was expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StopReason {
    /// No record was ever written here.
    #[error("unwritten")]
    Unwritten,
    /// The header's CRC is wrong.
    #[error("header damaged")]
    HeaderDamaged,
    /// The header is intact, the body's CRC is wrong.
    #[error("body damaged")]
    BodyDamaged,
    /// Intact, of another format version.
    #[error("format version {0}")]
    Version(u8),
    /// Intact, but written for another position: an earlier use of the segment.
    #[error("written for position {0}")]
    WrongPosition(Lsn),
    /// Intact, but of another log or storage.
    #[error("of another log")]
    WrongLog,
    /// Intact, but not of the current generation: it survived beyond an earlier end.
    #[error("of generation {found}, not {current}")]
    WrongGeneration {
        /// The record's generation.
        found: u32,
        /// The generation current at this place.
        current: u32,
    },
    /// Intact, but its length cannot be.
    #[error("impossible length {0}")]
    WrongLength(u32),
    /// A record of the log's own whose body makes no sense.
    #[error("malformed")]
    Malformed,
    /// The segment is sealed and there is no next one.
    #[error("no further segment")]
    NoSegment,
}

/// Where and why the scan stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stop {
    /// The position.
    pub lsn: Lsn,
    /// The file, if there is one.
    pub file: String,
    /// The byte offset in the file.
    pub offset: u64,
    /// Why.
    pub reason: StopReason,
    /// Intact record headers found beyond; they are dropped.
    pub intact_beyond: u64,
}

/// What a scan found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovered {
    /// First position kept.
    pub first: Lsn,
    /// The end: positions from here on are written anew.
    pub end: Lsn,
    /// Valid records, the log's own included.
    pub records: u64,
    /// The newest generation found (0 for a new log).
    pub generation: u32,
    /// Largest group seen anywhere, dropped records included.
    pub group_max: u64,
    /// Largest epoch of a valid record.
    pub epoch_max: u64,
    /// Segment files whose header was damaged; they count as free.
    pub headers_damaged: usize,
    /// Where and why the scan stopped; `None` for a new log.
    pub stop: Option<Stop>,
}

/// Why a log cannot be opened. Nothing was changed on disk unless the medium failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The medium failed or is full.
    #[error(transparent)]
    Medium(#[from] MediumError),
    /// The log was poisoned while being opened.
    #[error(transparent)]
    Poisoned(#[from] LogError),
    /// Written by another version of this program.
    #[error("{file}: format version {found}, supported is {}", FORMAT)]
    Version {
        /// The segment's file.
        file: String,
        /// Its version.
        found: u32,
    },
    /// Of another storage or another log, or no segment at all.
    #[error("{file}: not a segment of this log{}", found.map_or(String::new(), |f| format!(" but of log {} of storage {:032x}", f.number, f.storage)))]
    Foreign {
        /// The file.
        file: String,
        /// Whose it is, if it is a segment.
        found: Option<LogIdentity>,
    },
    /// Its length is not the one it was created with.
    #[error("{file}: {found} bytes long, {expected} expected")]
    Length {
        /// The segment's file.
        file: String,
        /// Its length, bytes.
        found: u64,
        /// What it must be, bytes.
        expected: u64,
    },
    /// Two files claim to be the same segment.
    #[error("{file}: second file for segment {seq}")]
    Duplicate {
        /// The second file.
        file: String,
        /// The segment's number.
        seq: u64,
    },
    /// The oldest segments are missing, or their headers are damaged, and their records are needed.
    #[error(
        "log {log}: begins at position {first}, but records from {needed} on are needed; \
         {headers_damaged} segment files with a damaged header"
    )]
    BeginningMissing {
        /// The log's file prefix.
        log: String,
        /// First position needed.
        needed: Lsn,
        /// First position there is.
        first: Lsn,
        /// Segment files that are not recognised any more; the missing ones may be among them.
        headers_damaged: usize,
    },
    /// No segment, or nothing in them, is left of a log that was written.
    #[error(
        "log {log}: no segment file is left, but it was written before; restore it from a copy; \
         {headers_damaged} segment files with a damaged header"
    )]
    SegmentsMissing {
        /// The log's file prefix.
        log: String,
        /// Segment files that are not recognised any more.
        headers_damaged: usize,
    },
    /// Records are missing that are proved to have been durable.
    #[error(
        "log {log}: committed records are missing from position {gap} on ({reason}); proof: {proof}"
    )]
    CommittedMissing {
        /// The log's file prefix.
        log: String,
        /// First missing position.
        gap: Lsn,
        /// What was found there.
        reason: StopReason,
        /// Who proves it.
        proof: Proof,
    },
    /// The claim of a durable group is lost or damaged, so which groups count is not known.
    #[error(
        "log {log}: the claim of a committed group is missing in the claim slots of its segments; \
         proof: {proof}; restore the log from a copy"
    )]
    ClaimMissing {
        /// The file prefix of the node's first log.
        log: String,
        /// Who proves that there was one.
        proof: Proof,
    },
}

/// What proves that a record had been durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Proof {
    /// A later record of the same log says that the log was durable up to here.
    #[error("a later record says the log was durable up to {0}")]
    LaterRecord(Lsn),
    /// A later segment exists although one before it is missing.
    #[error("segment {0} exists")]
    LaterSegment(u64),
    /// The caller knows (a checkpoint's position).
    #[error("the caller knows of position {0}")]
    Caller(Lsn),
    /// A claim, or an earlier opening, says that this group was durable on every log.
    #[error("group {0} is recorded as durable on every log")]
    Group(u64),
}

impl From<AppendError> for OpenError {
    fn from(error: AppendError) -> OpenError {
        match error {
            AppendError::Poisoned(e) => OpenError::Poisoned(e),
            AppendError::Full { wanted, .. } | AppendError::TooLong { len: wanted, .. } => {
                OpenError::Medium(MediumError::NoSpace {
                    file: "log".to_owned(),
                    wanted,
                })
            }
        }
    }
}
