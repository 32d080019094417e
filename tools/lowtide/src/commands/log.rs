//! `lowtide log`: prints and verifies log segments without opening the logs.
//!
//! A record that cannot be read is harmless at the end of a log (a crash tore it) and an error
//! anywhere else. Which it is follows from proofs in intact records: every record says up to where
//! its log was durable when it was appended, and a claim in the first log says so for every log, once
//! a later claim shows that it held.

use std::collections::BTreeMap;
use std::io::{BufWriter, Write};

use lowtide_engine::log::claim::{Claim, Slot};
use lowtide_engine::log::inspect::{self, Entry, Verdict};
use lowtide_engine::log::record::{ClaimBody, SegmentHeader};
use lowtide_engine_core::record::{OpRecord, Record};

use super::{Failure, Kind};
use crate::cli::LogArgs;

pub(super) fn log(args: &LogArgs) -> Result<(), Failure> {
    let mut out = BufWriter::new(std::io::stdout().lock());
    let found = walk(args, &mut out);
    out.flush().map_err(Failure::output)?;
    found
}

fn walk(args: &LogArgs, out: &mut impl Write) -> Result<(), Failure> {
    let mut audit = Audit::default();
    for entry in inspect::inspect(&args.path).map_err(Failure::cluster)? {
        let entry = entry.map_err(Failure::cluster)?;
        audit.take(&entry);
        if !args.verify {
            writeln!(out, "{}", line(&entry)).map_err(Failure::output)?;
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
        writeln!(out, "{text}").map_err(Failure::output)?;
    }
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
            header.identity.number, header.identity.storage, header.seq,
        ),
        Entry::Claim { offset, slot, .. } => format!("  {offset:>10}  {}", words_of_slot(slot)),
        Entry::Segment { file, len, .. } => format!("{file}: no intact header ({len} bytes)"),
        Entry::Record {
            offset,
            header,
            body,
            ..
        } => {
            let what = match (inspect::own_kind(header.kind), body) {
                (_, None) => "BODY DAMAGED".to_owned(),
                (Some(kind), Some(body)) => inspect::claim_of(header, body)
                    .map_or_else(|| kind.to_owned(), |c| words_of_slot(&Slot::Claim(c))),
                (None, Some(body)) => meaning(header.kind, body),
            };
            format!(
                "  {offset:>10}  lsn {} epoch {} group {} generation {} {:>6} bytes  {what}",
                header.lsn, header.epoch, header.group, header.generation, header.body_len,
            )
        }
        Entry::End {
            file,
            offset,
            verdict,
            ..
        } => format!("  {offset:>10}  {file} ends here: {}", words(*verdict)),
        _ => String::new(),
    }
}

fn words_of_slot(slot: &Slot) -> String {
    match slot {
        Slot::Empty => "no claim".to_owned(),
        Slot::Damaged => "claim torn or damaged".to_owned(),
        Slot::Claim(Claim { group, body }) => {
            let ends: Vec<String> = body.ends.iter().map(ToString::to_string).collect();
            format!(
                "claim: group {group} is durable if the logs reach {}; group {} was",
                ends.join(", "),
                body.durable_group
            )
        }
    }
}

/// What a record of the engine says.
fn meaning(kind: u8, body: &[u8]) -> String {
    match Record::from_parts(kind, body) {
        Ok((step, record)) => format!("{step} {}", words_of(&record)),
        Err(error) => format!("kind {kind}: {error:?}"),
    }
}

fn words_of(record: &Record) -> String {
    match record {
        Record::Op(op) => operation(op),
        Record::Undone(undone) => format!("undone {}{}", undone.source, undone.seq),
        Record::Fence(life) => format!("fence {life}"),
        Record::Row(life) => format!("row {life}"),
        Record::Gone(life) => format!("gone {life}"),
        Record::Entered(life) => format!("entered {life}"),
        Record::Base(base) => format!("stream {base:?}"),
        Record::Marks { minimum, ceiling } => format!("minimum {minimum} ceiling {ceiling}"),
    }
}

fn operation(op: &OpRecord) -> String {
    let participants: Vec<String> = op
        .participants
        .iter()
        .map(|p| format!("{}{}", p.node, p.at))
        .collect();
    format!(
        "op {} piece {} of {} on {}: {} writes here, {} carried",
        op.id,
        op.piece.index + 1,
        op.piece.count,
        participants.join(" "),
        op.writes.len(),
        op.carried.len(),
    )
}

fn words(verdict: Verdict) -> String {
    match verdict {
        Verdict::Sealed => "sealed".to_owned(),
        Verdict::Unwritten => "nothing written beyond".to_owned(),
        Verdict::Damaged => "damaged record".to_owned(),
        Verdict::WrongLength => "the file is not as long as its header says".to_owned(),
        Verdict::Version(version) => format!("record of version {version}"),
        _ => "unknown".to_owned(),
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
    /// Claims by group.
    claims: BTreeMap<u64, ClaimBody>,
    current: Option<(u32, u64)>,
}

#[derive(Debug)]
struct Segment {
    file: String,
    /// Bytes of the file.
    len: u64,
    header: SegmentHeader,
    records: u64,
    /// Byte offset up to which everything is intact.
    end: u64,
    verdict: Option<Verdict>,
}

impl Audit {
    fn take(&mut self, entry: &Entry) {
        match entry {
            Entry::Segment { file, len, header } => {
                self.current = None;
                let Some(header) = header else {
                    self.headless.push(file.clone());
                    return;
                };
                let key = (header.identity.number, header.seq);
                self.current = Some(key);
                let segment = Segment {
                    file: file.clone(),
                    len: *len,
                    header: *header,
                    records: 0,
                    end: 0,
                    verdict: None,
                };
                self.segments.insert(key, segment);
            }
            Entry::Claim {
                slot: Slot::Claim(claim),
                ..
            } => {
                self.claims.insert(claim.group, claim.body.clone());
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
                if body.is_none() {
                    segment.verdict.get_or_insert(Verdict::Damaged);
                    return;
                }
                if segment.verdict.is_none() {
                    segment.records += 1;
                    segment.end = offset + header.total_len();
                }
                let proof = self.proofs.entry(key.0).or_default();
                *proof = (*proof).max(header.durable.0);
                let claim = body.as_deref().and_then(|b| inspect::claim_of(header, b));
                if let Some(claim) = claim {
                    self.claims.insert(claim.group, claim.body);
                }
            }
            Entry::End {
                offset,
                verdict,
                told,
                ..
            } => {
                if let Some((key, _)) = self.current() {
                    let proof = self.proofs.entry(key.0).or_default();
                    *proof = (*proof).max(told.0);
                }
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
                number,
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
        // The newest claim that a later one proves; those before reach less far, or are of groups
        // that a restart dropped.
        let proven = self.claims.values().map(|c| c.durable_group).max();
        if let Some(claim) = proven.and_then(|group| self.claims.get(&group)) {
            for (number, end) in (0..).zip(&claim.ends) {
                let proof = proofs.entry(number).or_default();
                *proof = (*proof).max(end.0);
            }
        }
        let cut = self
            .segments
            .values()
            .filter(|s| s.len != s.header.segment_bytes);
        let cut = cut.map(|s| {
            let expected = s.header.segment_bytes;
            format!("{}: {} bytes long, {expected} expected", s.file, s.len)
        });
        let missing = proofs.iter();
        cut.chain(missing.filter_map(|(number, proof)| self.missing(*number, *proof)))
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
        let Some(segment) = self.segments.get(&(number, last)) else {
            return Some(format!(
                "log {number}: segment {last} is missing, which was durable up to position {proof}"
            ));
        };
        if segment.verdict != Some(Verdict::Sealed) && segment.end < proof - last * segment_bytes {
            return Some(format!(
                "{}: a committed record is missing at byte {}: log {number} was durable up to byte {}",
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
                    "{}: a committed record is missing at byte {}: log {number} goes on in segment {below}",
                    segment.file, segment.end,
                ));
            }
            below -= 1;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::sync::Arc;

    use lowtide_engine::log::{Append, Log, LogConfig, LogIdentity};
    use lowtide_engine::medium::dir::{DirOptions, DirVolume};

    use super::*;

    const SEGMENT: u64 = 64 << 10;

    /// A log of three and a half segments, synced after every record, and its segment files.
    fn write_log(dir: &Path) -> Vec<PathBuf> {
        let identity = LogIdentity {
            storage: 5,
            number: 0,
        };
        let config = LogConfig {
            segment_bytes: SEGMENT,
            record_bytes_max: 4096,
            reserve_bytes: 0,
            ..LogConfig::new("shard-000", identity)
        };
        let volume = Arc::new(DirVolume::open(dir, DirOptions::default()).unwrap());
        let (mut log, _) = Log::open(volume, config).unwrap();
        let sync = log.sync_handle();
        let body = [7; 1000];
        for epoch in 0..200 {
            log.append(Append {
                kind: 1,
                flags: 0,
                epoch,
                group: 1,
                parts: &[&body],
            })
            .unwrap();
            sync.sync(log.end()).unwrap();
        }
        let mut files: Vec<PathBuf> = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|x| x == "seg"))
            .collect();
        files.sort();
        assert!(files.len() >= 4);
        files
    }

    fn verify(path: &Path) -> Result<(), Failure> {
        let args = LogArgs {
            path: path.to_owned(),
            verify: true,
        };
        walk(&args, &mut std::io::sink())
    }

    fn damage(file: &Path, at: usize) {
        let mut bytes = std::fs::read(file).unwrap();
        bytes[at] ^= 1;
        std::fs::write(file, bytes).unwrap();
    }

    #[test]
    fn an_intact_log_passes_and_a_torn_end_is_no_error() {
        let tmp = tempfile::tempdir().unwrap();
        let files = write_log(tmp.path());
        verify(tmp.path()).unwrap();
        // The newest record: nothing intact proves that it was durable.
        let mut audit = Audit::default();
        for entry in inspect::inspect(tmp.path()).unwrap() {
            audit.take(&entry.unwrap());
        }
        let newest = audit
            .segments
            .values()
            .filter(|s| s.records > 0)
            .max_by_key(|s| s.header.seq)
            .unwrap();
        let file = files.iter().find(|f| f.ends_with(&newest.file)).unwrap();
        damage(file, newest.end as usize - 100);
        verify(tmp.path()).unwrap();
    }

    #[test]
    fn a_committed_record_that_is_missing_is_found() {
        let tmp = tempfile::tempdir().unwrap();
        let files = write_log(tmp.path());
        damage(&files[1], SEGMENT as usize / 2);
        let failure = verify(tmp.path()).unwrap_err();
        assert_eq!(failure.kind, Kind::Verification);
        assert!(
            failure.message.contains("committed record is missing"),
            "{failure}"
        );
    }

    #[test]
    fn a_truncated_or_missing_segment_is_found() {
        let tmp = tempfile::tempdir().unwrap();
        let files = write_log(tmp.path());
        std::fs::File::options()
            .write(true)
            .open(&files[0])
            .unwrap()
            .set_len(SEGMENT / 2)
            .unwrap();
        let failure = verify(tmp.path()).unwrap_err();
        assert!(failure.message.contains("is missing"), "{failure}");

        let empty = tempfile::tempdir().unwrap();
        assert_eq!(verify(empty.path()).unwrap_err().kind, Kind::Usage);
    }
}
