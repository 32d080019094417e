//! Looking at logs without opening them: what `lowtide log` prints and verifies.
//!
//! Owns: a read-only walk over segment files, of one log or a whole directory.
//! Invariants: changes nothing, takes no lock (a running node may be looked at; its newest records
//! may then show as damaged); work linear in the files' length.
//! Deliberately absent: formatting; the meaning of bodies; which groups are void (`OPEN` entries
//! tell).

use super::claim::{self, Claim, Slot};
use super::record::{
    ALIGN, BadHeader, ClaimBody, KIND_CLAIM, KIND_OPEN, KIND_ROOM, KIND_SEAL, Lsn, RecordHeader,
    SegmentHeader,
};
use super::recover;
use super::segment::{CLAIM_SLOTS, SEGMENT_START};
use crate::crc::crc32c;
use crate::medium::{Access, Medium, MediumError, Volume, dir::DirVolume};
use std::path::Path;
use std::sync::Arc;

/// One thing found in a segment file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Entry {
    /// The file's header.
    Segment {
        /// File name.
        file: String,
        /// File length, bytes.
        len: u64,
        /// The header; `None` if there is no intact one, and then nothing else is shown.
        header: Option<SegmentHeader>,
    },
    /// What stands in a claim slot that is not empty.
    Claim {
        /// File name.
        file: String,
        /// Byte offset.
        offset: u64,
        /// The claim, or that it is damaged (or torn by a crash while it was written).
        slot: Slot,
    },
    /// A record.
    Record {
        /// File name.
        file: String,
        /// Byte offset.
        offset: u64,
        /// Its header.
        header: RecordHeader,
        /// Its body, if its CRC is right.
        body: Option<Vec<u8>>,
    },
    /// Where the records of a file stop, and why.
    End {
        /// File name.
        file: String,
        /// Byte offset.
        offset: u64,
        /// Why.
        verdict: Verdict,
        /// How far intact records behind it, of any generation, say that their log was durable.
        told: Lsn,
    },
}

/// Why the records of a file stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verdict {
    /// Sealed: the log goes on in the next segment.
    Sealed,
    /// The newest record, or nothing was ever written: no magic, or a record of an earlier use.
    Unwritten,
    /// A damaged header or body: torn by a crash if it is the end of the log.
    Damaged,
    /// The file is not as long as its header says: somebody cut it off or added to it.
    WrongLength,
    /// Another format version.
    Version(u32),
}

/// The name of a record kind that belongs to the log itself.
pub fn own_kind(kind: u8) -> Option<&'static str> {
    match kind {
        KIND_SEAL => Some("seal"),
        KIND_OPEN => Some("open"),
        KIND_CLAIM => Some("claim"),
        KIND_ROOM => Some("room for a claim"),
        _ => None,
    }
}

/// The claim that an intact record is, if it is one.
pub fn claim_of(header: &RecordHeader, body: &[u8]) -> Option<Claim> {
    let body = ClaimBody::decode(body).filter(|_| header.kind == KIND_CLAIM)?;
    let group = header.group;
    Some(Claim { group, body })
}

/// Walks all segment files of a directory, or one file: by log, then by sequence number.
///
/// # Errors
/// The directory cannot be listed or a header cannot be read.
pub fn inspect(path: impl AsRef<Path>) -> Result<Entries, MediumError> {
    let path = path.as_ref();
    let (dir, only) = match path.file_name().and_then(|n| n.to_str()) {
        Some(name) if path.is_file() => {
            let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
            (dir.unwrap_or(Path::new(".")), Some(name))
        }
        _ => (path, None),
    };
    inspect_volume(&DirVolume::inspect(dir), only)
}

/// As [`inspect`], on any volume.
///
/// # Errors
/// The volume cannot be listed or a header cannot be read.
pub fn inspect_volume(volume: &dyn Volume, only: Option<&str>) -> Result<Entries, MediumError> {
    let mut files = Vec::new();
    for name in volume.list()? {
        if !name.ends_with(".seg") || only.is_some_and(|o| o != name) {
            continue;
        }
        let medium = volume.open(&name, Access::Positioned)?;
        let len = medium.len()?;
        let header = match read_slot(&*medium, 0, len)? {
            Some(bytes) => SegmentHeader::decode(&bytes).ok(),
            None => None,
        };
        let prefix = name
            .rsplit_once('-')
            .map_or("", |(prefix, _)| prefix)
            .to_owned();
        files.push(File {
            name,
            prefix,
            medium,
            len,
            header,
        });
    }
    files.sort_by(|a, b| {
        let key = |f: &File| (f.prefix.clone(), f.header.map_or(u64::MAX, |h| h.seq));
        key(a).cmp(&key(b))
    });
    files.reverse();
    Ok(Entries {
        files,
        current: None,
    })
}

#[derive(Debug)]
struct File {
    name: String,
    prefix: String,
    medium: Arc<dyn Medium>,
    len: u64,
    header: Option<SegmentHeader>,
}

/// Iterator over what is found; see [`inspect`].
#[derive(Debug)]
pub struct Entries {
    /// Files still to come, the next one last.
    files: Vec<File>,
    /// The file being walked, its header, and the offset.
    current: Option<(File, SegmentHeader, u64)>,
}

impl Iterator for Entries {
    type Item = Result<Entry, MediumError>;

    fn next(&mut self) -> Option<Self::Item> {
        while let Some((file, segment, offset)) = self.current.take() {
            if !CLAIM_SLOTS.contains(&offset) {
                return Some(self.step(file, segment, offset));
            }
            match self.claim_slot(file, segment, offset) {
                Ok(None) => {}
                Ok(Some(entry)) => return Some(Ok(entry)),
                Err(error) => return Some(Err(error)),
            }
        }
        let file = self.files.pop()?;
        let entry = Entry::Segment {
            file: file.name.clone(),
            len: file.len,
            header: file.header,
        };
        if let Some(header) = file.header {
            self.current = Some((file, header, CLAIM_SLOTS[0]));
        }
        Some(Ok(entry))
    }
}

impl Entries {
    /// Shows a claim slot and moves on to the next, or to the records.
    fn claim_slot(
        &mut self,
        file: File,
        segment: SegmentHeader,
        offset: u64,
    ) -> Result<Option<Entry>, MediumError> {
        // A file that is cut off there shows so when its records are read.
        let slot = match file.len < SEGMENT_START {
            true => Slot::Empty,
            false => {
                let at = position(&segment, offset);
                claim::read(&*file.medium, offset, (segment.identity.tag(), at))?
            }
        };
        let name = file.name.clone();
        let next = CLAIM_SLOTS.into_iter().find(|o| *o > offset);
        self.current = Some((file, segment, next.unwrap_or(SEGMENT_START)));
        Ok((slot != Slot::Empty).then_some(Entry::Claim {
            file: name,
            offset,
            slot,
        }))
    }

    fn step(
        &mut self,
        file: File,
        segment: SegmentHeader,
        offset: u64,
    ) -> Result<Entry, MediumError> {
        let end = |verdict| {
            let mut told = Lsn(0);
            let place = (segment.identity.tag(), position(&segment, 0));
            let medium = &*file.medium;
            recover::headers(medium, offset..file.len, place, &mut |header| {
                told = told.max(header.durable);
            })?;
            Ok(Entry::End {
                file: file.name.clone(),
                offset,
                verdict,
                told,
            })
        };
        let Some(bytes) = read_slot(&*file.medium, offset, file.len)? else {
            return end(match file.len == segment.segment_bytes {
                true => Verdict::Sealed,
                false => Verdict::WrongLength,
            });
        };
        let header = match RecordHeader::decode(&bytes) {
            Ok(header) => header,
            Err(BadHeader::Unwritten) => return end(Verdict::Unwritten),
            Err(BadHeader::Damaged) => return end(Verdict::Damaged),
            Err(BadHeader::Version(v)) => return end(Verdict::Version(u32::from(v))),
        };
        if header.lsn != position(&segment, offset) || header.tag != segment.identity.tag() {
            return end(Verdict::Unwritten);
        }
        let body_at = offset + ALIGN;
        if u64::from(header.body_len) > file.len.saturating_sub(body_at) {
            return end(Verdict::Damaged);
        }
        let mut body = vec![0u8; header.body_len as usize];
        file.medium.read(body_at, &mut body)?;
        let body = (crc32c(&body) == header.body_crc).then_some(body);
        let record = Entry::Record {
            file: file.name.clone(),
            offset,
            header,
            body,
        };
        // A seal is followed by nothing: the walk ends behind the file.
        let next = if header.kind == KIND_SEAL {
            file.len
        } else {
            offset + header.total_len()
        };
        self.current = Some((file, segment, next));
        Ok(record)
    }
}

/// The position that an offset stands for; of a hostile header any number.
fn position(segment: &SegmentHeader, offset: u64) -> Lsn {
    let base = segment.seq.wrapping_mul(segment.segment_bytes);
    Lsn(base.wrapping_add(offset))
}

fn read_slot(
    medium: &dyn Medium,
    offset: u64,
    len: u64,
) -> Result<Option<[u8; ALIGN as usize]>, MediumError> {
    if offset + ALIGN > len {
        return Ok(None);
    }
    let mut bytes = [0u8; ALIGN as usize];
    medium.read(offset, &mut bytes)?;
    Ok(Some(bytes))
}
