//! The per-core log: preallocated segments, appended to without a system call, synced elsewhere.
//!
//! Owns: segment files `<prefix>-NNNNN.seg`, their order, appending, reading, recycling, space.
//! [`set`] opens the logs of a node together, [`commit`] makes their groups durable, [`claim`] says which
//! are, [`superblock`] keeps the few fields that stand outside of them, [`inspect`] shows them.
//!
//! # How a log is trusted after a crash
//!
//! * A record counts iff it is reachable: every record before it is valid, and its CRCs, position,
//!   tag and generation are the expected ones. Recovery stops at the first that is not and says
//!   where and why ([`Recovered`]).
//! * Recovery syncs what it accepted, then appends an `OPEN` record of a new generation at the end
//!   and syncs that, before anything else is appended. A generation is accepted only from its
//!   `OPEN` (or the seal that makes room for it) on and never decreases, so a record that survived
//!   beyond a gap stays dead.
//! * *Loss is detected* where it can be proved: each record carries the position up to which the log
//!   was durable when it was appended. If any intact record beyond the gap, or the caller's
//!   [`LogConfig::must_reach`] (a checkpoint's position), or a claim says that the
//!   missing one was durable, opening fails with [`OpenError::CommittedMissing`]. Likewise if a
//!   segment is missing between two others.
//! * *Loss is not detectable* if everything that was written after the lost record is lost too: the
//!   newest synced records, when nothing later survived, look like records never written.
//!
//! # Segments
//!
//! ```text
//!            create, write header, sync            append to it          next one taken
//! (no file) ───────────────────────────► READY ──────────────────► ACTIVE ─────────► SEALED
//!                                          ▲                                            │
//!                                          └── header with next number, sync ── FREE ◄──┘ recycle
//! ```
//! The header of a reused segment is durable before the first record is stored into it, and
//! segments are reused in the order of their numbers, so the chain on disk never has a hole.
//!
//! Deliberately absent: threads, clocks, any meaning of records; retry of a failed sync (the first
//! one poisons the log for ever); growth beyond [`LogConfig::segments_max`].
//!
//! Source: design D2, D3, D5; Crotty et al., "Are You Sure You Want to Use MMAP?" (CIDR 2022).
#![deny(unsafe_code)]

mod chain;
pub mod claim;
pub mod commit;
pub mod inspect;
pub(crate) mod mapped;
mod read;
pub mod record;
mod recover;
mod segment;
pub mod set;
pub mod superblock;
pub(crate) mod teeth;
mod verdict;

pub use read::{LogReader, Records};
pub use record::{LogIdentity, Lsn, RecordHeader, record_len};
pub use recover::Scanned;
pub use segment::{LogError, SyncHandle};
pub use verdict::{OpenError, Proof, Recovered, Stop, StopReason};

use crate::crc::crc32c_of_all;
use crate::medium::{Gated, Medium, MediumError, Poison, Volume, total_len};
use record::{ALIGN, FORMAT, KIND_OPEN, KIND_RESERVED, KIND_ROOM, KIND_SEAL, OpenBody};
use segment::{SEGMENT_START, Segment, Shared};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use teeth::{Tooth, bites};

const _: () = assert!(FORMAT == 3);

/// Shape and limits of a log.
#[derive(Debug, Clone)]
pub struct LogConfig {
    /// Files are called `<prefix>-NNNNN.seg`.
    pub prefix: String,
    /// Whose log it is.
    pub identity: LogIdentity,
    /// Length of a segment, bytes; a multiple of the page size. Fixed for the life of a log.
    pub segment_bytes: u64,
    /// Longest record, header included, bytes; at most a quarter of a segment.
    pub record_bytes_max: u64,
    /// Segments allocated when the log is opened, at least 2.
    pub segments_min: usize,
    /// Segments allocated at most.
    pub segments_max: usize,
    /// Bytes that reservations never touch: for undo steps, notices, checkpoints.
    pub reserve_bytes: u64,
    /// The log is known to have been durable up to here; opening fails if it ends earlier.
    pub must_reach: Lsn,
    /// Every record from here on is needed (0: from the first ever); opening fails if the oldest
    /// segment left begins later. `None`: whatever is left will do.
    pub needed_from: Option<Lsn>,
    /// It was opened before, so it has a segment; opening fails if there is none.
    pub was_opened: bool,
}

impl LogConfig {
    /// The defaults: 64 MiB segments, 2 to 16 of them, records up to 1 MiB, 16 MiB in reserve.
    pub fn new(prefix: &str, identity: LogIdentity) -> LogConfig {
        LogConfig {
            prefix: prefix.to_owned(),
            identity,
            segment_bytes: 64 << 20,
            record_bytes_max: 1 << 20,
            segments_min: 2,
            segments_max: 16,
            reserve_bytes: 16 << 20,
            must_reach: Lsn(0),
            needed_from: None,
            was_opened: false,
        }
    }

    fn check(&self) {
        assert!(
            self.segment_bytes.is_multiple_of(crate::medium::PAGE),
            "segments are whole pages"
        );
        assert!(self.record_bytes_max >= 2 * ALIGN && self.record_bytes_max.is_multiple_of(ALIGN));
        assert!(
            self.record_bytes_max <= self.segment_bytes / 4,
            "record too long for a segment"
        );
        assert!(self.segments_min >= 2 && self.segments_max >= self.segments_min);
    }

    /// Bytes of records that fit into an empty segment however they fall.
    fn usable(&self) -> u64 {
        self.segment_bytes - SEGMENT_START - ALIGN - self.record_bytes_max
    }
}

/// What is appended: the parts make up the body.
#[derive(Debug, Clone, Copy)]
pub struct Append<'a> {
    /// The caller's kind, below 0xf0.
    pub kind: u8,
    /// The caller's flags.
    pub flags: u8,
    /// The operation's epoch.
    pub epoch: u64,
    /// The commit group, from [`commit::GroupPin::group`].
    pub group: u64,
    /// The body, in pieces.
    pub parts: &'a [&'a [u8]],
}

/// A record read back and verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its header.
    pub header: RecordHeader,
    /// Its body.
    pub body: Vec<u8>,
}

/// Why a record was not appended. Nothing was written.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum AppendError {
    /// No segment is left. Cannot happen to an append covered by a reservation.
    #[error("log full: {free} bytes left, {wanted} wanted")]
    Full {
        /// Bytes left in the active segment.
        free: u64,
        /// Bytes the record takes.
        wanted: u64,
    },
    /// Longer than [`LogConfig::record_bytes_max`].
    #[error("record of {len} bytes is longer than {max}")]
    TooLong {
        /// Bytes the record would take.
        len: u64,
        /// The limit.
        max: u64,
    },
    /// The log is poisoned: nothing is promised any more.
    #[error(transparent)]
    Poisoned(#[from] LogError),
}

/// Why space was not reserved. Back-pressure: the caller refuses or delays *new* work.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ReserveError {
    /// The log is above its high-water mark until segments are recycled.
    #[error(
        "log above high water: {available} bytes available, {reserved} reserved, {wanted} wanted"
    )]
    HighWater {
        /// Bytes available to reservations, those made included.
        available: u64,
        /// Bytes already reserved.
        reserved: u64,
        /// Bytes asked for.
        wanted: u64,
    },
    /// As `HighWater`, and the last attempt to allocate another segment found the disk full.
    #[error("no disk space for another log segment: {available} bytes available, {wanted} wanted")]
    DiskFull {
        /// Bytes available to reservations, those made included.
        available: u64,
        /// Bytes asked for.
        wanted: u64,
    },
    /// The log is poisoned.
    #[error(transparent)]
    Poisoned(#[from] LogError),
}

/// Why a record could not be read.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The position is not within the log.
    #[error("no record at {lsn}: the log holds {first} to {end}")]
    Outside {
        /// The position asked for.
        lsn: Lsn,
        /// First position kept.
        first: Lsn,
        /// Where the next record will stand.
        end: Lsn,
    },
    /// What stands there is not the valid record it must be.
    #[error("bad record at {lsn}: {reason}")]
    Bad {
        /// The position.
        lsn: Lsn,
        /// What is wrong.
        reason: StopReason,
    },
    /// The medium failed.
    #[error(transparent)]
    Medium(#[from] crate::medium::MediumError),
}

/// Bytes promised to a later append; given back when dropped.
#[derive(Debug)]
#[must_use = "dropping a reservation gives the space back"]
pub struct Reservation {
    bytes: u64,
    ledger: Arc<AtomicU64>,
}

impl Reservation {
    /// Bytes promised.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // A counter on its own: nothing is published through it.
        self.ledger.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A log, held by the one thread that appends to it.
#[derive(Debug)]
pub struct Log {
    shared: Arc<Shared>,
    /// Segments with records, oldest first; the last one is active.
    live: Vec<Segment>,
    /// Offset of the next record in the active segment.
    offset: u64,
    /// Position of that segment's first byte.
    base: Lsn,
    generation: u32,
    tag: u64,
    /// Group ranges that never happened, from the `OPEN` records still in the log.
    void: Vec<Range<u64>>,
    reserved: Arc<AtomicU64>,
    /// How often an append had to prepare a segment itself.
    stalls: u64,
    /// Bytes in the body of a claim, if batches leave room for one.
    claim_len: Option<usize>,
}

/// Where a batch of records ends; see [`Log::end_batch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchEnd {
    /// Everything of the batch lies before it.
    pub end: Lsn,
    /// The last record before it is room for a claim.
    pub has_room: bool,
}

impl Log {
    /// Opens a log that stands alone: creates it if there is none, else recovers it.
    ///
    /// # Errors
    /// See [`OpenError`].
    ///
    /// # Panics
    /// If the configuration contradicts itself.
    pub fn open(volume: Arc<dyn Volume>, config: LogConfig) -> Result<(Log, Recovered), OpenError> {
        let scanned = Scanned::scan(volume, config, Arc::new(Poison::default()))?;
        let groups = OpenBody {
            durable_group: scanned.report().group_max,
            next_group: scanned.report().group_max + 1,
        };
        scanned.open(groups)
    }

    /// Appends a record and says where it stands: a CRC and a copy into the mapping. Not durable.
    /// Takes space whether or not it was reserved.
    ///
    /// # Errors
    /// See [`AppendError`]; nothing was written.
    ///
    /// # Panics
    /// If the kind is one of the log's own.
    #[inline]
    pub fn append(&mut self, a: Append<'_>) -> Result<Lsn, AppendError> {
        assert!(
            a.kind < KIND_RESERVED,
            "kinds from 0xf0 on belong to the log"
        );
        self.append_any(&a)
    }

    /// Appends into space that was reserved for it, and gives the rest back.
    ///
    /// # Errors
    /// As [`append`](Self::append), except that it is never `Full` if the reservation covers it.
    pub fn append_reserved(
        &mut self,
        a: Append<'_>,
        space: Reservation,
    ) -> Result<Lsn, AppendError> {
        let at = self.append(a);
        drop(space);
        at
    }

    pub(crate) fn append_any(&mut self, a: &Append<'_>) -> Result<Lsn, AppendError> {
        self.shared.check()?;
        let body_len = total_len(a.parts);
        let len = record_len(body_len);
        let max = self.shared.config.record_bytes_max;
        if len > max {
            return Err(AppendError::TooLong { len, max });
        }
        if self.offset + len + ALIGN > self.shared.config.segment_bytes {
            self.next_segment(len)?;
        }
        let body_crc = crc32c_of_all(a.parts);
        let lsn = self.end();
        let head = self.header(a, body_len as u32, body_crc).encode_words();
        let head = head.as_flattened();
        let medium = &self.active().medium;
        let stored = if let [body] = a.parts {
            medium.store_all(self.offset, &[head, body])
        } else {
            store_behind(medium, self.offset, head, a.parts)
        };
        if let Err(error) = stored {
            return Err(self.lost(error));
        }
        self.offset += len;
        Ok(lsn)
    }

    #[cold]
    fn lost(&self, error: MediumError) -> AppendError {
        self.shared.lost(error).into()
    }

    /// Ends a batch that is going to be published in `group`. In a node's first log it leaves room
    /// behind the batch for the claim that makes the group count, so that one write takes both; if
    /// there is no space for that, the claim finds another place.
    pub fn end_batch(&mut self, group: u64) -> BatchEnd {
        let zeros = [0; claim::ROOM_BODY_MAX];
        let has_room = self.claim_len.is_some_and(|len| {
            let room = Append {
                kind: KIND_ROOM,
                flags: 0,
                epoch: 0,
                group,
                parts: &[&zeros[..len]],
            };
            self.append_any(&room).is_ok()
        });
        let end = self.end();
        BatchEnd { end, has_room }
    }

    #[inline]
    fn header(&self, a: &Append<'_>, body_len: u32, body_crc: u32) -> RecordHeader {
        RecordHeader {
            lsn: self.end(),
            epoch: a.epoch,
            group: a.group,
            durable: self.shared.durable(),
            generation: self.generation,
            body_len,
            body_crc,
            kind: a.kind,
            flags: a.flags,
            tag: self.tag,
        }
    }

    fn active(&self) -> &Segment {
        // A log is opened with an active segment and recycling keeps it.
        &self.live[self.live.len() - 1]
    }

    /// Seals the active segment and takes the next one.
    #[cold]
    fn next_segment(&mut self, wanted: u64) -> Result<(), AppendError> {
        let next = match self.shared.take_ready() {
            Some(next) => next,
            None => {
                self.stalls += 1;
                self.shared.prepare(1)?;
                let free = self.shared.config.segment_bytes - self.offset - ALIGN;
                self.shared
                    .take_ready()
                    .ok_or(AppendError::Full { free, wanted })?
            }
        };
        let seal = Append {
            kind: KIND_SEAL,
            flags: 0,
            epoch: 0,
            group: 0,
            parts: &[],
        };
        let header = self.header(&seal, 0, 0);
        self.active()
            .medium
            .store(self.offset, &header.encode())
            .map_err(|e| self.shared.lost(e))?;
        assert_eq!(
            next.seq,
            self.active().seq + 1,
            "segments are prepared in order"
        );
        self.live.push(next.clone());
        self.shared.activate(next);
        self.offset = SEGMENT_START;
        self.base.0 += self.shared.config.segment_bytes;
        Ok(())
    }

    /// Where the next record will stand, unless it needs a new segment. Everything appended so far
    /// lies before it.
    pub fn end(&self) -> Lsn {
        Lsn(self.base.0 + self.offset)
    }

    /// First position kept.
    pub fn first(&self) -> Lsn {
        Lsn(self.live[0].seq * self.shared.config.segment_bytes + SEGMENT_START)
    }

    /// Everything before this position is durable.
    pub fn durable(&self) -> Lsn {
        self.shared.durable()
    }

    /// The generation that this opening writes.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// How often an append had to prepare a segment because none was ready.
    pub fn stalls(&self) -> u64 {
        self.stalls
    }

    /// The half that makes the log durable, for another thread.
    pub fn sync_handle(&self) -> SyncHandle {
        SyncHandle::new(self.shared.clone())
    }

    /// Frees the segments that end before `keep_from` and says how many. The caller must know that
    /// their undo and redo images are needed no more (epochs below the durable minimum, covered by a
    /// durable checkpoint). Segments that are not durable are kept.
    pub fn recycle(&mut self, keep_from: Lsn) -> usize {
        let segment_bytes = self.shared.config.segment_bytes;
        let bound = keep_from.min(self.durable()).0 / segment_bytes;
        let count = self.live[..self.live.len() - 1]
            .iter()
            .take_while(|s| s.seq < bound)
            .count();
        self.live.drain(..count);
        self.shared.release(count);
        count
    }

    /// Bytes that can be appended without recycling or growth, however records fall.
    pub fn free_bytes(&self) -> u64 {
        let config = &self.shared.config;
        let here =
            (config.segment_bytes - ALIGN - config.record_bytes_max).saturating_sub(self.offset);
        here + self.shared.spare() as u64 * config.usable()
    }

    /// Bytes reserved and not yet used or given back.
    pub fn reserved_bytes(&self) -> u64 {
        self.reserved.load(Ordering::Relaxed)
    }

    /// Reserves space for a record with a body of `body_len` bytes.
    ///
    /// # Errors
    /// See [`ReserveError`]. The log asks for another segment in the background; try again.
    pub fn reserve(&mut self, body_len: u64) -> Result<Reservation, ReserveError> {
        self.shared.check()?;
        let wanted = record_len(body_len);
        let reserved = self.reserved_bytes();
        let available = self
            .free_bytes()
            .saturating_sub(self.shared.config.reserve_bytes);
        if reserved + wanted > available {
            self.shared.want_growth();
            return Err(if self.shared.is_disk_full() {
                ReserveError::DiskFull { available, wanted }
            } else {
                ReserveError::HighWater {
                    available,
                    reserved,
                    wanted,
                }
            });
        }
        self.reserved.fetch_add(wanted, Ordering::Relaxed);
        Ok(Reservation {
            bytes: wanted,
            ledger: self.reserved.clone(),
        })
    }

    /// Reads the record at `lsn` and verifies it.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub fn read(&self, lsn: Lsn) -> Result<Record, ReadError> {
        let outside = ReadError::Outside {
            lsn,
            first: self.first(),
            end: self.end(),
        };
        if lsn < self.first() || lsn >= self.end() {
            return Err(outside);
        }
        let segment_bytes = self.shared.config.segment_bytes;
        let index = (lsn.0 / segment_bytes - self.live[0].seq) as usize;
        let segment = self.live.get(index).ok_or(outside)?;
        recover::read_record(
            segment,
            lsn.0 % segment_bytes,
            &self.shared.config,
            self.tag,
        )
        .map_err(|e| e.at(lsn))
    }

    /// Reads this log's records from any thread.
    pub fn reader(&self) -> LogReader {
        LogReader {
            shared: self.shared.clone(),
            tag: self.tag,
        }
    }

    /// The caller's records from `from` on (a record's position, or zero for the first), in order,
    /// without those of void groups.
    pub fn iter(&self, from: Lsn) -> Records<'_> {
        Records {
            log: self,
            next: from.max(self.first()),
        }
    }

    /// Whether a group was dropped by a restart.
    pub fn is_void(&self, group: u64) -> bool {
        !bites(Tooth::NothingVoid) && self.void.iter().any(|range| range.contains(&group))
    }

    fn append_open(&mut self, groups: OpenBody) -> Result<Lsn, OpenError> {
        let body = groups.encode();
        let group = groups.durable_group;
        let open = Append {
            kind: KIND_OPEN,
            flags: 0,
            epoch: 0,
            group,
            parts: &[&body],
        };
        self.append_any(&open).map_err(OpenError::from)
    }
}

/// Stores a record whose body is in pieces.
#[inline(never)]
fn store_behind(
    medium: &Gated,
    offset: u64,
    head: &[u8],
    parts: &[&[u8]],
) -> Result<(), MediumError> {
    medium.store(offset, head)?;
    medium.store_all(offset + ALIGN, parts)
}
