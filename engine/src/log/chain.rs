//! The segment files of a log, found and sorted out.
//!
//! Owns: recognition of files and headers. Invariants: nothing is changed; every file that is not
//! plainly ours or plainly unused is refused by name.
//! Deliberately absent: records.

use super::LogConfig;
use super::record::{ALIGN, BadSegment, Lsn, SegmentHeader};
use super::segment::{SEGMENT_START, Segment};
use super::verdict::{OpenError, Proof, StopReason};
use crate::medium::{Access, Gated, Medium, MediumError, PAGE, Poison, Volume};
use std::sync::Arc;

/// The segment files of a log, sorted out.
pub(super) struct Chain {
    /// Consecutive numbers.
    pub segments: Vec<Segment>,
    /// Their file names.
    pub names: Vec<String>,
    pub free: Vec<Arc<Gated>>,
    pub files: usize,
    pub next_name: u32,
    pub headers_damaged: usize,
}

impl Chain {
    pub fn find(
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
            let medium = Arc::new(Gated::new(&file, medium, poison.clone()));
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
fn segment_files(volume: &dyn Volume, prefix: &str) -> Result<Vec<(u32, String)>, MediumError> {
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
