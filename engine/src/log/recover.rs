//! Finding the end of a log after a crash.
//!
//! Owns: the scan of the segment chain, the verdict on what lies beyond the end, the opening of a
//! new generation. The rules stand in the parent module's comment.
//! Invariants: nothing on disk is changed by a scan; a scan's work is linear in the log's length; an
//! opening that is cut off at any point leads, when repeated, to the same records.
//! Deliberately absent: repair. What cannot be trusted is reported, not guessed.

use super::chain::Chain;
use super::claim::{self, Claim};
use super::record::{
    ALIGN, BadHeader, ClaimBody, KIND_CLAIM, KIND_OPEN, KIND_SEAL, Lsn, OpenBody, RecordHeader,
};
use super::segment::{SEGMENT_START, Segment, Shared, Table};
use super::teeth::{Tooth, bites};
use super::verdict::{OpenError, Proof, Recovered, Stop, StopReason};
use super::{Log, LogConfig, ReadError, Record};
use crate::crc::crc32c;
use crate::medium::{Gated, Medium, MediumError, PAGE, Poison, Volume};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// Bytes looked at together when searching beyond the end.
const PROBE_CHUNK: usize = 1 << 16;

/// A record that is not there, before its position is known.
#[derive(Debug)]
pub(super) enum RecordError {
    Bad(StopReason),
    Medium(MediumError),
}

impl RecordError {
    pub fn at(self, lsn: Lsn) -> ReadError {
        match self {
            RecordError::Bad(reason) => ReadError::Bad { lsn, reason },
            RecordError::Medium(e) => ReadError::Medium(e),
        }
    }
}

impl From<MediumError> for RecordError {
    fn from(e: MediumError) -> RecordError {
        RecordError::Medium(e)
    }
}

/// Reads and verifies the record at `offset` of a segment; generations are the caller's business.
pub(super) fn read_record(
    segment: &Segment,
    offset: u64,
    config: &LogConfig,
    tag: u64,
) -> Result<Record, RecordError> {
    let room = config.segment_bytes.saturating_sub(offset);
    if room < ALIGN || !offset.is_multiple_of(ALIGN) {
        return Err(RecordError::Bad(StopReason::Malformed));
    }
    let mut bytes = [0u8; ALIGN as usize];
    segment.medium.read(offset, &mut bytes)?;
    let header = RecordHeader::decode(&bytes).map_err(|bad| {
        RecordError::Bad(match bad {
            BadHeader::Unwritten => StopReason::Unwritten,
            BadHeader::Damaged => StopReason::HeaderDamaged,
            BadHeader::Version(v) => StopReason::Version(v),
        })
    })?;
    let bad = |reason| Err(RecordError::Bad(reason));
    if header.tag != tag {
        return bad(StopReason::WrongLog);
    }
    let expected = segment.seq * config.segment_bytes + offset;
    if header.lsn.0 != expected && !bites(Tooth::AnyPosition) {
        return bad(StopReason::WrongPosition(header.lsn));
    }
    // A seal fills up to the very end; anything else leaves room for one.
    let is_seal = header.kind == KIND_SEAL;
    let fits = if is_seal {
        header.body_len == 0
    } else {
        header.total_len() + ALIGN <= room
    };
    if !fits || header.total_len() > config.record_bytes_max {
        return bad(StopReason::WrongLength(header.body_len));
    }
    let mut body = vec![0u8; header.body_len as usize];
    segment.medium.read(offset + ALIGN, &mut body)?;
    if crc32c(&body) != header.body_crc {
        return bad(StopReason::BodyDamaged);
    }
    Ok(Record { header, body })
}

/// Shows each intact record header at any possible position of a range of a segment: of the log with
/// this tag, the segment beginning at this position of it.
pub(super) fn headers(
    medium: &dyn Medium,
    range: Range<u64>,
    (tag, base): (u64, Lsn),
    each: &mut dyn FnMut(&RecordHeader),
) -> Result<(), MediumError> {
    let mut buffer = vec![0u8; PROBE_CHUNK];
    let mut at = range.start.next_multiple_of(ALIGN);
    while at < range.end {
        let len = PROBE_CHUNK.min((range.end - at) as usize);
        medium.read(at, &mut buffer[..len])?;
        let (slots, _) = buffer[..len].as_chunks::<{ ALIGN as usize }>();
        for (slot, offset) in slots.iter().zip((at..).step_by(ALIGN as usize)) {
            let Ok(header) = RecordHeader::decode(slot) else {
                continue;
            };
            let is_here = header.lsn.0 == base.0.wrapping_add(offset);
            if header.tag == tag && is_here && header.generation != u32::MAX {
                each(&header);
            }
        }
        at += len as u64;
    }
    Ok(())
}

/// A log that was scanned and not changed; [`open`](Self::open) begins its next generation.
#[derive(Debug)]
pub struct Scanned {
    config: LogConfig,
    volume: Arc<dyn Volume>,
    poison: Arc<Poison>,
    /// Segments up to the one where the scan stopped.
    live: Vec<Segment>,
    /// Segments after that one: their numbers follow, their contents are dead.
    after: Vec<Segment>,
    free: Vec<Arc<Gated>>,
    files: usize,
    next_name: u32,
    end_offset: u64,
    /// Larger than any generation seen, dead ones included.
    next_generation: u32,
    opens: Vec<OpenBody>,
    /// Claims among the records.
    claims: Vec<Claim>,
    /// What the newest generation says of itself; see [`Scanned::settled`].
    settled: Settled,
    report: Recovered,
}

/// See [`Scanned::settled`].
#[derive(Debug, Default)]
struct Settled {
    /// The generation whose records tell.
    generation: u32,
    /// Behind its `OPEN`, if that is still there.
    opened: Lsn,
    /// The furthest that one of them says.
    told: Lsn,
}

impl Scanned {
    /// Scans a log.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn scan(
        volume: Arc<dyn Volume>,
        config: LogConfig,
        poison: Arc<Poison>,
    ) -> Result<Scanned, OpenError> {
        Scanned::scan_with(volume, config, poison, &mut |_| ())
    }

    /// As [`scan`](Self::scan), showing each valid record, the log's own included.
    pub fn scan_with(
        volume: Arc<dyn Volume>,
        config: LogConfig,
        poison: Arc<Poison>,
        visit: &mut dyn FnMut(&Record),
    ) -> Result<Scanned, OpenError> {
        config.check();
        let found = Chain::find(&*volume, &config, &poison)?;
        let first = found.segments.first().map_or(Lsn(0), |s| {
            Lsn(s.seq * config.segment_bytes + SEGMENT_START)
        });
        let mut scanned = Scanned {
            config,
            volume,
            poison,
            live: Vec::new(),
            after: Vec::new(),
            free: found.free,
            files: found.files,
            next_name: found.next_name,
            end_offset: SEGMENT_START,
            next_generation: 1,
            opens: Vec::new(),
            claims: Vec::new(),
            settled: Settled::default(),
            report: Recovered {
                first,
                end: first,
                records: 0,
                generation: 0,
                group_max: 0,
                epoch_max: 0,
                headers_damaged: found.headers_damaged,
                stop: None,
            },
        };
        scanned.walk(found.segments, &found.names, visit)?;
        scanned.judge()?;
        Ok(scanned)
    }

    /// What was found.
    pub fn report(&self) -> &Recovered {
        &self.report
    }

    /// The bodies of the `OPEN` records found, oldest first.
    pub fn opens(&self) -> &[OpenBody] {
        &self.opens
    }

    /// The intact claims in this log's segments.
    ///
    /// # Errors
    /// The medium failed.
    pub(super) fn claims(&self) -> Result<Vec<Claim>, MediumError> {
        let mut claims = claim::read_all(self.live.iter().chain(&self.after), &self.config)?;
        claims.extend_from_slice(&self.claims);
        Ok(claims)
    }

    /// How far records that were appended since the newest `OPEN` say that this log was durable,
    /// and where that `OPEN` ended. Of a node's first log the one exceeds the other only if there
    /// was a durable claim that reached as far.
    pub(super) fn settled(&self) -> (Lsn, Lsn) {
        (self.settled.told, self.settled.opened)
    }

    /// Follows the records until the first that is not acceptable.
    fn walk(
        &mut self,
        chain: Vec<Segment>,
        names: &[String],
        visit: &mut dyn FnMut(&Record),
    ) -> Result<(), OpenError> {
        let tag = self.config.identity.tag();
        let Some(newest) = chain.last() else {
            return Ok(());
        };
        let (mut index, mut offset) = (0, SEGMENT_START);
        let end_of_chain = Lsn((newest.seq + 1) * self.config.segment_bytes + SEGMENT_START);
        let reason = loop {
            let Some(segment) = chain.get(index) else {
                break StopReason::NoSegment;
            };
            let record = match read_record(segment, offset, &self.config, tag) {
                Ok(record) => record,
                Err(RecordError::Bad(_)) if bites(Tooth::ScanAfterGap) && self.can_skip(offset) => {
                    offset += ALIGN;
                    continue;
                }
                Err(RecordError::Bad(reason)) => break reason,
                Err(RecordError::Medium(e)) => return Err(e.into()),
            };
            if let Err(reason) = self.accept(&record) {
                break reason;
            }
            visit(&record);
            if record.header.kind == KIND_SEAL {
                (index, offset) = (index + 1, SEGMENT_START);
            } else {
                offset += record.header.total_len();
            }
        };
        let position = |s: &Segment| Lsn(s.seq * self.config.segment_bytes + offset);
        let lsn = chain.get(index).map_or(end_of_chain, position);
        let file = names.get(index).cloned().unwrap_or_default();
        self.report.end = lsn;
        self.report.generation = self.next_generation - 1;
        self.end_offset = offset;
        let mut stop = Stop {
            lsn,
            file,
            offset,
            reason,
            intact_beyond: 0,
        };
        let proof = self.probe(&chain[index.min(chain.len())..], offset, &mut stop)?;
        self.report.stop = Some(stop);
        self.after = chain;
        self.live = self
            .after
            .drain(..(index + 1).min(self.after.len()))
            .collect();
        match proof {
            Some(proof) => Err(self.missing(proof)),
            None => Ok(()),
        }
    }

    /// Whether the seeded fault may look further in this segment.
    fn can_skip(&self, offset: u64) -> bool {
        offset + 2 * ALIGN <= self.config.segment_bytes
    }

    /// Checks generation and own bodies of an otherwise valid record, and takes note of it.
    fn accept(&mut self, record: &Record) -> Result<(), StopReason> {
        let header = &record.header;
        let current = self.next_generation - 1;
        // An OPEN that does not fit is preceded by a seal of its generation. Everything else of a
        // generation follows its durable OPEN, so nothing else can raise it.
        let opens = matches!(header.kind, KIND_OPEN | KIND_SEAL) && header.generation > current;
        // The oldest segment may begin in the middle of a generation.
        let is_first = self.report.records == 0;
        if header.generation == 0
            || header.generation == u32::MAX
            || !(is_first || opens || header.generation == current || bites(Tooth::AnyGeneration))
        {
            return Err(StopReason::WrongGeneration {
                found: header.generation,
                current,
            });
        }
        if header.kind == KIND_OPEN {
            let body = OpenBody::decode(&record.body).ok_or(StopReason::Malformed)?;
            self.report.group_max = self.report.group_max.max(body.next_group - 1);
            self.opens.push(body);
            self.settled = Settled {
                generation: header.generation,
                opened: Lsn(header.lsn.0 + header.total_len()),
                told: Lsn(0),
            };
        } else if header.kind == KIND_CLAIM {
            let body = ClaimBody::decode(&record.body).ok_or(StopReason::Malformed)?;
            let group = header.group;
            self.claims.push(Claim { group, body });
        }
        if header.kind != KIND_OPEN && is_first {
            self.settled.generation = header.generation;
        }
        // A seal before an OPEN is of the new generation and speaks of what that found.
        if header.kind != KIND_OPEN && header.generation == self.settled.generation {
            self.settled.told = self.settled.told.max(header.durable);
        }
        self.next_generation = header.generation + 1;
        self.report.records += 1;
        self.report.group_max = self.report.group_max.max(header.group);
        self.report.epoch_max = self.report.epoch_max.max(header.epoch);
        Ok(())
    }

    /// Looks at every possible record position beyond the stop: new generations must be above what
    /// is found there, and one of them may prove that the missing record was durable.
    fn probe(
        &mut self,
        chain: &[Segment],
        offset: u64,
        stop: &mut Stop,
    ) -> Result<Option<Proof>, OpenError> {
        let tag = self.config.identity.tag();
        let mut durable = Lsn(0);
        let mut from = offset;
        for segment in chain {
            let base = Lsn(segment.seq * self.config.segment_bytes);
            let range = from..self.config.segment_bytes;
            headers(&*segment.medium, range, (tag, base), &mut |header| {
                // The record at the stop itself counts as well: its header may be intact.
                stop.intact_beyond += u64::from(header.lsn > stop.lsn);
                durable = durable.max(header.durable);
                if header.generation == self.settled.generation {
                    self.settled.told = self.settled.told.max(header.durable);
                }
                self.next_generation = self.next_generation.max(header.generation + 1);
                self.report.group_max = self.report.group_max.max(header.group);
            })?;
            from = SEGMENT_START;
        }
        Ok((durable > stop.lsn).then_some(Proof::LaterRecord(durable)))
    }

    fn judge(&self) -> Result<(), OpenError> {
        if let Some(Stop {
            reason: StopReason::Version(found),
            file,
            ..
        }) = &self.report.stop
        {
            return Err(OpenError::Version {
                file: file.clone(),
                found: u32::from(*found),
            });
        }
        if self.config.was_opened && self.report.first == Lsn(0) {
            return Err(self.segments_missing());
        }
        // Segments are numbered from 1, and the oldest goes only when what it holds is not needed.
        let begins = self.report.first.0 / self.config.segment_bytes;
        if let Some(needed) = self.config.needed_from
            && begins > (needed.0 / self.config.segment_bytes).max(1)
        {
            return Err(OpenError::BeginningMissing {
                log: self.config.prefix.clone(),
                needed,
                first: self.report.first,
                headers_damaged: self.report.headers_damaged,
            });
        }
        if self.report.end < self.config.must_reach {
            return Err(self.missing(Proof::Caller(self.config.must_reach)));
        }
        Ok(())
    }

    /// The error for records missing at this log's end.
    pub(super) fn missing(&self, proof: Proof) -> OpenError {
        OpenError::CommittedMissing {
            log: self.config.prefix.clone(),
            gap: self.report.end,
            reason: self
                .report
                .stop
                .as_ref()
                .map_or(StopReason::NoSegment, |s| s.reason),
            proof,
        }
    }

    /// The error for a log of which nothing is left.
    pub(super) fn segments_missing(&self) -> OpenError {
        OpenError::SegmentsMissing {
            log: self.config.prefix.clone(),
            headers_damaged: self.report.headers_damaged,
        }
    }

    /// The error for a claim that is missing in this log, the node's first.
    pub(super) fn claim_missing(&self, proof: Proof) -> OpenError {
        OpenError::ClaimMissing {
            log: self.config.prefix.clone(),
            proof,
        }
    }

    /// Begins a new generation: makes durable what was accepted, allocates, appends `OPEN` with the
    /// decision about commit groups, syncs it.
    ///
    /// # Errors
    /// See [`OpenError`]; it may be repeated after a restart.
    pub fn open(self, groups: OpenBody) -> Result<(Log, Recovered), OpenError> {
        let segment_bytes = self.config.segment_bytes;
        // After a mere kill the records were read from memory; the disk may not have them yet.
        for segment in &self.live {
            segment.medium.sync(0..segment_bytes)?;
        }
        for segment in &self.after {
            segment.medium.sync(0..PAGE)?;
        }
        let ended_sealed = self
            .report
            .stop
            .as_ref()
            .is_none_or(|s| s.reason == StopReason::NoSegment);
        let mut void: Vec<Range<u64>> = self
            .opens
            .iter()
            .chain([&groups])
            .map(|o| o.durable_group + 1..o.next_group)
            .collect();
        void.retain(|range| !range.is_empty());
        let newest = self.after.last().or(self.live.last());
        let table = Table {
            next_seq: newest.map_or(1, |s| s.seq + 1),
            live: self.live.iter().cloned().collect(),
            ready: self.after.into(),
            free: self.free.into(),
            files: self.files,
            next_name: self.next_name,
        };
        let tag = self.config.identity.tag();
        let shared = Arc::new(Shared::new(self.config, self.volume, self.poison, table));
        shared.allocate_min()?;
        let mut log = Log {
            shared: shared.clone(),
            live: self.live,
            offset: self.end_offset,
            base: Lsn(0),
            generation: self.next_generation,
            tag,
            void,
            reserved: Arc::new(AtomicU64::new(0)),
            stalls: 0,
            claim_len: None,
        };
        if ended_sealed {
            shared.prepare(1)?;
            let next = shared.take_ready().ok_or(MediumError::NoSpace {
                file: shared.config.prefix.clone(),
                wanted: segment_bytes,
            })?;
            log.live.push(next.clone());
            shared.activate(next);
            log.offset = SEGMENT_START;
        }
        log.base = Lsn(log.active().seq * segment_bytes);
        // What was accepted is durable, and the OPEN record says so: see `Proof::LaterRecord`.
        shared.set_durable(log.end());
        log.append_open(groups)?;
        let handle = log.sync_handle();
        handle.sync(log.end())?;
        handle.prepare()?;
        Ok((log, self.report))
    }
}
