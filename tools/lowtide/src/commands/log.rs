//! `lowtide log`: prints and verifies log segments without opening the logs.
//!
//! A record that cannot be read is harmless at the end of a log (a crash tore it) and an error
//! anywhere else. Which it is follows from proofs in intact records: every record says up to where
//! its log was durable when it was appended, and a claim of the commit log says so for every log,
//! once a later claim shows that it held.

use std::collections::BTreeMap;
use std::io::{BufWriter, Write};

use lowtide_engine::log::inspect::{self, Entry, Verdict};
use lowtide_engine::log::record::{ClaimBody, KIND_CLAIM, SegmentHeader};

use super::{Failure, Kind};
use crate::cli::LogArgs;

pub(super) fn log(args: &LogArgs) -> Result<(), Failure> {
    let mut out = BufWriter::new(std::io::stdout().lock());
    let mut audit = Audit::default();
    for entry in inspect::inspect(&args.path).map_err(Failure::cluster)? {
        let entry = entry.map_err(Failure::cluster)?;
        audit.take(&entry);
        if !args.verify {
            writeln!(out, "{}", line(&entry)).map_err(Failure::cluster)?;
        }
    }
    if audit.segments.is_empty() && audit.headless.is_empty() {
        return Err(Failure::usage(format!(
            "{}: no log segments here",
            args.path.display()
        )));
    }
    let problems = audit.problems();
    for text in audit.summary() {
        writeln!(out, "{text}").map_err(Failure::cluster)?;
    }
    out.flush().map_err(Failure::cluster)?;
    match problems.as_slice() {
        [] => Ok(()),
        problems => Err(Failure::new(Kind::Verification, problems.join("\n"))),
    }
}

fn line(entry: &Entry) -> String {
    match entry {
        Entry::Segment {
            file,
            len,
            header: Some(header),
        } => format!(
            "{file}: log {} of storage {:032x}, segment {} of {len} bytes",
            log_name(header.identity.number),
            header.identity.storage,
            header.seq,
        ),
        Entry::Segment { file, len, .. } => format!("{file}: no intact header ({len} bytes)"),
        Entry::Record {
            offset,
            header,
            body,
            ..
        } => {
            let kind = match inspect::own_kind(header.kind) {
                Some(kind) => kind.to_owned(),
                None => format!("kind {}", header.kind),
            };
            format!(
                "  {offset:>10}  lsn {} {kind}, epoch {}, group {}, generation {}, {} bytes{}",
                header.lsn,
                header.epoch,
                header.group,
                header.generation,
                header.body_len,
                if body.is_some() { "" } else { ", BODY DAMAGED" },
            )
        }
        Entry::End {
            file,
            offset,
            verdict,
        } => format!("  {offset:>10}  {file} ends here: {}", words(*verdict)),
        _ => String::new(),
    }
}

fn words(verdict: Verdict) -> String {
    match verdict {
        Verdict::Sealed => "sealed".to_owned(),
        Verdict::Unwritten => "nothing written beyond".to_owned(),
        Verdict::Damaged => "damaged record".to_owned(),
        Verdict::Version(version) => format!("record of version {version}"),
        _ => "unknown".to_owned(),
    }
}

fn log_name(number: u32) -> String {
    match number {
        u32::MAX => "commit".to_owned(),
        number => number.to_string(),
    }
}

/// What a walk over all segments has shown.
#[derive(Debug, Default)]
struct Audit {
    /// By log and sequence number.
    segments: BTreeMap<(u32, u64), Segment>,
    /// Files without an intact header.
    headless: Vec<String>,
    /// Positions that must be there, by log.
    proofs: BTreeMap<u32, u64>,
    /// Claims by group, proven by a later claim.
    claims: BTreeMap<u64, ClaimBody>,
    current: Option<(u32, u64)>,
}

#[derive(Debug)]
struct Segment {
    file: String,
    header: SegmentHeader,
    records: u64,
    /// Byte offset up to which everything is intact.
    end: u64,
    verdict: Option<Verdict>,
}

impl Audit {
    fn take(&mut self, entry: &Entry) {
        match entry {
            Entry::Segment { file, header, .. } => {
                self.current = None;
                let Some(header) = header else {
                    self.headless.push(file.clone());
                    return;
                };
                let key = (header.identity.number, header.seq);
                self.current = Some(key);
                let segment = Segment {
                    file: file.clone(),
                    header: *header,
                    records: 0,
                    end: 0,
                    verdict: None,
                };
                self.segments.insert(key, segment);
            }
            Entry::Record {
                offset,
                header,
                body,
                ..
            } => {
                let Some((key, segment)) = self.current() else {
                    return;
                };
                let Some(body) = body else {
                    segment.verdict.get_or_insert(Verdict::Damaged);
                    return;
                };
                if segment.verdict.is_none() {
                    segment.records += 1;
                    segment.end = offset + header.total_len();
                }
                let proof = self.proofs.entry(key.0).or_default();
                *proof = (*proof).max(header.durable.0);
                if header.kind == KIND_CLAIM
                    && let Some(claim) = ClaimBody::decode(body)
                {
                    self.claims.insert(header.group, claim);
                }
            }
            Entry::End {
                offset, verdict, ..
            } => {
                if let Some((_, segment)) = self.current() {
                    if segment.verdict.is_none() {
                        segment.end = *offset;
                    }
                    segment.verdict.get_or_insert(*verdict);
                }
            }
            _ => {}
        }
    }

    fn current(&mut self) -> Option<((u32, u64), &mut Segment)> {
        let key = self.current?;
        Some((key, self.segments.get_mut(&key)?))
    }

    fn summary(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for file in &self.headless {
            lines.push(format!("{file}: no intact header"));
        }
        for ((number, _), segment) in &self.segments {
            let verdict = segment.verdict.unwrap_or(Verdict::Unwritten);
            lines.push(format!(
                "{}: log {}, {} records, intact up to byte {}: {}",
                segment.file,
                log_name(*number),
                segment.records,
                segment.end,
                words(verdict),
            ));
        }
        lines
    }

    /// What was durable and is missing.
    fn problems(&self) -> Vec<String> {
        let mut proofs = self.proofs.clone();
        let proven = self.claims.values().map(|c| c.durable_group).max();
        for (_, claim) in self.claims.range(..=proven.unwrap_or(0)) {
            for (number, end) in (0..).zip(&claim.ends) {
                let proof = proofs.entry(number).or_default();
                *proof = (*proof).max(end.0);
            }
        }
        proofs
            .iter()
            .filter_map(|(number, proof)| self.missing(*number, *proof))
            .collect()
    }

    /// Whether everything of a log up to `proof` is there, as far back as its segments reach.
    fn missing(&self, number: u32, proof: u64) -> Option<String> {
        let (_, any) = self
            .segments
            .range((number, 0)..=(number, u64::MAX))
            .next()?;
        let segment_bytes = any.header.segment_bytes;
        // The position is an end: it lies in, or just behind, the segment of the byte before it.
        let last = proof.checked_sub(1)? / segment_bytes;
        let name = log_name(number);
        let Some(segment) = self.segments.get(&(number, last)) else {
            return Some(format!(
                "log {name}: segment {last} is missing, which was durable up to position {proof}"
            ));
        };
        if segment.verdict != Some(Verdict::Sealed) && segment.end < proof - last * segment_bytes {
            return Some(format!(
                "{}: a committed record is missing at byte {}: log {name} was durable up to byte {}",
                segment.file,
                segment.end,
                proof - last * segment_bytes,
            ));
        }
        let mut below = last;
        while let Some(segment) = below
            .checked_sub(1)
            .and_then(|seq| self.segments.get(&(number, seq)))
        {
            if segment.verdict != Some(Verdict::Sealed) {
                return Some(format!(
                    "{}: a committed record is missing at byte {}: log {name} goes on in segment {below}",
                    segment.file, segment.end,
                ));
            }
            below -= 1;
        }
        None
    }
}
