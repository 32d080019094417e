//! Finding the end of a log after a crash.
//!
//! Owns: the scan of the segment chain, the verdict on what lies beyond the end, the opening of a
//! new generation. The rules stand in the parent module's comment.
//! Invariants: nothing on disk is changed by a scan; a scan's work is linear in the log's length; an
//! opening that is cut off at any point leads, when repeated, to the same records.
//! Deliberately absent: repair. What cannot be trusted is reported, not guessed.

use super::record::{
    ALIGN, BadHeader, BadSegment, KIND_OPEN, KIND_SEAL, LogIdentity, Lsn, OpenBody, RecordHeader,
    SegmentHeader,
};
use super::segment::{LogError, SEGMENT_START, Segment, Shared, Table};
use super::{AppendError, Log, LogConfig, ReadError, Record};
use crate::medium::{Access, Gated, Medium, MediumError, PAGE, Poison, Volume};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// Bytes looked at together when searching beyond the end.
const PROBE_CHUNK: usize = 1 << 16;

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
    #[error("{file}: format version {found}, supported is {}", super::FORMAT)]
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
    /// The commit log says that this group was durable on every log.
    #[error("the commit log says that group {0} was durable")]
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
    if header.lsn.0 != segment.seq * config.segment_bytes + offset {
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
    if crc32c::crc32c(&body) != header.body_crc {
        return bad(StopReason::BodyDamaged);
    }
    Ok(Record { header, body })
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
    free: Vec<Arc<dyn Medium>>,
    files: usize,
    next_name: u32,
    end_offset: u64,
    /// Larger than any generation seen, dead ones included.
    next_generation: u32,
    opens: Vec<OpenBody>,
    report: Recovered,
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
            || !(is_first || opens || header.generation == current)
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
        let mut buffer = vec![0u8; PROBE_CHUNK];
        for segment in chain {
            let base = segment.seq * self.config.segment_bytes;
            for at in (from..self.config.segment_bytes).step_by(PROBE_CHUNK) {
                let len = PROBE_CHUNK.min((self.config.segment_bytes - at) as usize);
                segment.medium.read(at, &mut buffer[..len])?;
                let (slots, _) = buffer[..len].as_chunks::<{ ALIGN as usize }>();
                for (slot, lsn) in slots.iter().zip((base + at..).step_by(ALIGN as usize)) {
                    let Ok(header) = RecordHeader::decode(slot) else {
                        continue;
                    };
                    if header.tag != tag || header.lsn.0 != lsn || header.generation == u32::MAX {
                        continue;
                    }
                    // The record at the stop itself counts as well: its header may be intact.
                    stop.intact_beyond += u64::from(header.lsn > stop.lsn);
                    durable = durable.max(header.durable);
                    self.next_generation = self.next_generation.max(header.generation + 1);
                    self.report.group_max = self.report.group_max.max(header.group);
                }
            }
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
            generation: self.next_generation,
            tag,
            void,
            reserved: Arc::new(AtomicU64::new(0)),
            stalls: 0,
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
        // What was accepted is durable, and the OPEN record says so: see `Proof::LaterRecord`.
        shared.set_durable(log.end());
        log.append_open(groups)?;
        let handle = log.sync_handle();
        handle.sync(log.end())?;
        handle.prepare()?;
        Ok((log, self.report))
    }
}

/// The segment files of a log, sorted out.
struct Chain {
    /// Consecutive numbers.
    segments: Vec<Segment>,
    /// Their file names.
    names: Vec<String>,
    free: Vec<Arc<dyn Medium>>,
    files: usize,
    next_name: u32,
    headers_damaged: usize,
}

impl Chain {
    fn find(
        volume: &dyn Volume,
        config: &LogConfig,
        poison: &Arc<Poison>,
    ) -> Result<Chain, OpenError> {
        let mut chain = Chain {
            segments: Vec::new(),
            names: Vec::new(),
            free: Vec::new(),
            files: 0,
            next_name: 0,
            headers_damaged: 0,
        };
        let mut found: Vec<(u64, String, Segment)> = Vec::new();
        for (number, file) in segment_files(volume, &config.prefix)? {
            let medium = open_segment(volume, &file, config)?;
            let medium: Arc<dyn Medium> = Arc::new(Gated::new(&file, medium, poison.clone()));
            chain.files += 1;
            chain.next_name = chain.next_name.max(number + 1);
            match segment_header(&*medium, &file, config)? {
                HeaderVerdict::Free => chain.free.push(medium),
                HeaderVerdict::Damaged => {
                    chain.headers_damaged += 1;
                    chain.free.push(medium);
                }
                HeaderVerdict::Segment(seq) => found.push((seq, file, Segment { seq, medium })),
            }
        }
        found.sort_by_key(|(seq, ..)| *seq);
        for pair in found.windows(2) {
            let [(seq, ..), (next, file, _)] = pair else {
                continue;
            };
            if next == seq {
                return Err(OpenError::Duplicate {
                    file: file.clone(),
                    seq: *seq,
                });
            }
            if *next != seq + 1 {
                return Err(OpenError::CommittedMissing {
                    log: config.prefix.clone(),
                    gap: Lsn((seq + 1) * config.segment_bytes + SEGMENT_START),
                    reason: StopReason::NoSegment,
                    proof: Proof::LaterSegment(*next),
                });
            }
        }
        for (_, file, segment) in found {
            chain.names.push(file);
            chain.segments.push(segment);
        }
        Ok(chain)
    }
}

/// Numbers and names of a log's segment files.
pub(super) fn segment_files(
    volume: &dyn Volume,
    prefix: &str,
) -> Result<Vec<(u32, String)>, MediumError> {
    let names = volume.list()?;
    let number = |name: &str| {
        let digits = name
            .strip_prefix(prefix)?
            .strip_prefix('-')?
            .strip_suffix(".seg")?;
        digits.parse::<u32>().ok()
    };
    Ok(names
        .into_iter()
        .filter_map(|name| Some((number(&name)?, name)))
        .collect())
}

fn open_segment(
    volume: &dyn Volume,
    file: &str,
    config: &LogConfig,
) -> Result<Arc<dyn Medium>, OpenError> {
    let expected = config.segment_bytes;
    let wrong = |found| OpenError::Length {
        file: file.to_owned(),
        found,
        expected,
    };
    let medium = volume.open(file, Access::Mapped).map_err(|e| match e {
        MediumError::OutOfRange { size, .. } => wrong(size),
        e => e.into(),
    })?;
    match medium.len()? {
        len if len == expected => Ok(medium),
        // The header may say why: it comes first if it can be read.
        len if len >= PAGE => {
            segment_header(&*medium, file, config)?;
            Err(wrong(len))
        }
        len => Err(wrong(len)),
    }
}

enum HeaderVerdict {
    Free,
    Damaged,
    Segment(u64),
}

fn segment_header(
    medium: &dyn Medium,
    file: &str,
    config: &LogConfig,
) -> Result<HeaderVerdict, OpenError> {
    let mut page = [0u8; PAGE as usize];
    medium.read(0, &mut page)?;
    let mut bytes = [0u8; ALIGN as usize];
    bytes.copy_from_slice(&page[..ALIGN as usize]);
    let foreign = |found| OpenError::Foreign {
        file: file.to_owned(),
        found,
    };
    match SegmentHeader::decode(&bytes) {
        Ok(header) if header.identity != config.identity => Err(foreign(Some(header.identity))),
        Ok(header) if header.segment_bytes != config.segment_bytes => Err(OpenError::Length {
            file: file.to_owned(),
            found: header.segment_bytes,
            expected: config.segment_bytes,
        }),
        Ok(header) => Ok(HeaderVerdict::Segment(header.seq)),
        Err(BadSegment::Version(found)) => Err(OpenError::Version {
            file: file.to_owned(),
            found,
        }),
        // Our header page is zero after the header; a header cut off by a crash leaves that so.
        Err(_) if page[ALIGN as usize..].iter().any(|b| *b != 0) => Err(foreign(None)),
        Err(BadSegment::Unwritten) if bytes.iter().all(|b| *b == 0) => Ok(HeaderVerdict::Free),
        Err(_) => Ok(HeaderVerdict::Damaged),
    }
}
