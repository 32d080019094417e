//! The bytes of a log record and of a segment's header page.
//!
//! Owns: both encodings, and the rules that make a record acceptable at a position. Nothing is
//! valid without its CRCs *and* the expected position, generation and log tag.
//!
//! ```text
//! record header, 64 bytes, little-endian                segment header, 64 bytes, in page 0
//!  0  magic u32 "LTRC"     4  CRC-32C of bytes 8..64      0  magic u32 "LTSG"   4  CRC-32C of 8..64
//!  8  LSN u64                                             8  version u32       12  log number u32
//! 16  epoch u64                                          16  storage uuid u128
//! 24  commit group u64                                   32  sequence number u64
//! 32  durable LSN u64 (of this log, when appended)       40  segment length u64
//! 40  generation u32      44  body length u32            48  reserved, zero
//! 48  body CRC-32C u32    52  kind u8
//! 53  flags u8            54  version u8    55  zero
//! 56  log tag u64 (from storage uuid and log number)
//! ```
//!
//! The body follows; the next record starts at the next multiple of 64. What lies between is not
//! covered by any CRC and never looked at.
//!
//! Deliberately absent: compression, and any meaning of the body or of caller kinds.

use crate::crc::{crc32c, crc32c_of_words};

/// A position in a log: `sequence number of the segment × segment length + offset in the file`.
/// Zero is no position. Positions never repeat in the life of a log, except that what lies after the
/// end found at a restart is written again, under a new generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lsn(pub u64);

impl std::fmt::Display for Lsn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Size of a record header and alignment of records, bytes.
pub const ALIGN: u64 = 64;
/// Version of the record and segment formats.
pub const FORMAT: u8 = 3;
/// First kind that belongs to the log itself; callers use lower ones.
pub const KIND_RESERVED: u8 = 0xf0;
/// The rest of the segment is unused; the log goes on in the next one.
pub const KIND_SEAL: u8 = 0xf0;
/// A generation begins here; see [`OpenBody`].
pub const KIND_OPEN: u8 = 0xf1;
/// Says how far each log reaches in a commit group; see [`ClaimBody`].
pub const KIND_CLAIM: u8 = 0xf2;
/// Room for a claim, of the same length, with a body of zeros.
pub const KIND_ROOM: u8 = 0xf3;

const MAGIC: u32 = u32::from_le_bytes(*b"LTRC");
const SEGMENT_MAGIC: u32 = u32::from_le_bytes(*b"LTSG");

/// A record's header, decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordHeader {
    /// Where the record stands.
    pub lsn: Lsn,
    /// The operation's epoch (opaque here).
    pub epoch: u64,
    /// Node-wide commit group.
    pub group: u64,
    /// This log was durable up to here when the record was appended: a proof for recovery.
    pub durable: Lsn,
    /// Which opening of the log wrote the record.
    pub generation: u32,
    /// Bytes of body.
    pub body_len: u32,
    /// CRC-32C of the body.
    pub body_crc: u32,
    /// The caller's kind, or one of the log's own.
    pub kind: u8,
    /// The caller's flags (opaque here).
    pub flags: u8,
    /// Which log of which storage wrote the record.
    pub tag: u64,
}

/// Why 64 bytes are not a record header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadHeader {
    /// No magic: never written, or the inside of something else.
    Unwritten,
    /// Magic, but the CRC is wrong.
    Damaged,
    /// Intact, of another version.
    Version(u8),
}

impl RecordHeader {
    /// Encodes the header with its CRC.
    pub fn encode(&self) -> [u8; ALIGN as usize] {
        let mut out = [0; ALIGN as usize];
        out.copy_from_slice(self.encode_words().as_flattened());
        out
    }

    /// Word by word: where a word is put together in memory, who reads it waits until those stores
    /// have left the processor, and all before them.
    #[inline]
    pub(super) fn encode_words(&self) -> [[u8; 8]; ALIGN as usize / 8] {
        let [kind, flags] = [self.kind, self.flags].map(u64::from);
        let words = [
            self.lsn.0,
            self.epoch,
            self.group,
            self.durable.0,
            u64::from(self.generation) | u64::from(self.body_len) << 32,
            u64::from(self.body_crc) | kind << 32 | flags << 40 | u64::from(FORMAT) << 48,
            self.tag,
        ]
        .map(u64::to_le_bytes);
        let crc = crc32c_of_words(&words);
        let first = (u64::from(MAGIC) | u64::from(crc) << 32).to_le_bytes();
        let [lsn, epoch, group, durable, lives, kinds, tag] = words;
        [first, lsn, epoch, group, durable, lives, kinds, tag]
    }

    /// Decodes a header. Says nothing about whether it belongs where it was found.
    pub fn decode(bytes: &[u8; ALIGN as usize]) -> Result<RecordHeader, BadHeader> {
        if u32_at(bytes, 0) != MAGIC {
            return Err(BadHeader::Unwritten);
        }
        if u32_at(bytes, 4) != crc32c(&bytes[8..]) {
            return Err(BadHeader::Damaged);
        }
        if bytes[54] != FORMAT {
            return Err(BadHeader::Version(bytes[54]));
        }
        if bytes[55] != 0 {
            return Err(BadHeader::Damaged);
        }
        Ok(RecordHeader {
            lsn: Lsn(u64_at(bytes, 8)),
            epoch: u64_at(bytes, 16),
            group: u64_at(bytes, 24),
            durable: Lsn(u64_at(bytes, 32)),
            generation: u32_at(bytes, 40),
            body_len: u32_at(bytes, 44),
            body_crc: u32_at(bytes, 48),
            kind: bytes[52],
            flags: bytes[53],
            tag: u64_at(bytes, 56),
        })
    }

    /// Bytes from this record to the next.
    pub fn total_len(&self) -> u64 {
        record_len(u64::from(self.body_len))
    }
}

/// Bytes that a record with a body of `body_len` bytes takes in the log.
pub const fn record_len(body_len: u64) -> u64 {
    ALIGN + body_len.next_multiple_of(ALIGN)
}

const _: () = assert!(record_len(0) == ALIGN && record_len(1) == 2 * ALIGN);
const _: () = assert!(
    8 + 8 + 8 + 8 + 8 + 4 + 4 + 4 + 4 + 8 == ALIGN,
    "header fields fill it"
);

/// Body of a [`KIND_OPEN`] record: what the restart decided about commit groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenBody {
    /// Groups up to this one are durable on every log of the node.
    pub durable_group: u64,
    /// The first group that this opening may use. Groups between the two are void: records that
    /// stand before this one and carry them never happened.
    pub next_group: u64,
}

impl OpenBody {
    /// Encoded length, bytes.
    pub const LEN: usize = 16;

    /// Encodes the body.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut out = [0u8; Self::LEN];
        out[0..8].copy_from_slice(&self.durable_group.to_le_bytes());
        out[8..16].copy_from_slice(&self.next_group.to_le_bytes());
        out
    }

    /// Decodes the body; `None` if it makes no sense.
    pub fn decode(body: &[u8]) -> Option<OpenBody> {
        if body.len() != Self::LEN {
            return None;
        }
        let open = OpenBody {
            durable_group: u64_at(body, 0),
            next_group: u64_at(body, 8),
        };
        (open.durable_group < open.next_group).then_some(open)
    }
}

/// Body of a [`KIND_CLAIM`] record: where every log must be valid up to for the record's group to be
/// durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimBody {
    /// This group was durable on every log when the claim was written: a proof.
    pub durable_group: u64,
    /// End position per log, in order of log number.
    pub ends: Vec<Lsn>,
}

impl ClaimBody {
    /// Encoded length for so many logs, bytes.
    pub const fn len(logs: usize) -> usize {
        8 * (logs + 1)
    }

    /// Appends the encoding to `out`.
    pub fn encode_into(durable_group: u64, ends: &[Lsn], out: &mut Vec<u8>) {
        out.extend_from_slice(&durable_group.to_le_bytes());
        for end in ends {
            out.extend_from_slice(&end.0.to_le_bytes());
        }
    }

    /// Decodes the body; `None` if it makes no sense.
    pub fn decode(body: &[u8]) -> Option<ClaimBody> {
        let (words, []) = body.as_chunks::<8>() else {
            return None;
        };
        let (first, ends) = words.split_first()?;
        Some(ClaimBody {
            durable_group: u64::from_le_bytes(*first),
            ends: ends.iter().map(|w| Lsn(u64::from_le_bytes(*w))).collect(),
        })
    }
}

/// Who a log is: which storage, and which of its logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogIdentity {
    /// The storage's uuid.
    pub storage: u128,
    /// The log's number within the node.
    pub number: u32,
}

impl LogIdentity {
    /// What each record carries of the identity.
    pub fn tag(&self) -> u64 {
        let folded = self.storage as u64 ^ (self.storage >> 64) as u64;
        folded ^ u64::from(self.number).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }
}

/// A segment's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Whose segment it is.
    pub identity: LogIdentity,
    /// Its place in the log; raised each time the file is used again.
    pub seq: u64,
    /// Its length in bytes.
    pub segment_bytes: u64,
}

/// Why a file's first bytes are not a segment header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadSegment {
    /// No magic: zero or foreign bytes.
    Unwritten,
    /// Magic, but the CRC is wrong.
    Damaged,
    /// Another version (read before the CRC: its layout may differ).
    Version(u32),
}

impl SegmentHeader {
    /// Encodes the header with its CRC.
    pub fn encode(&self) -> [u8; ALIGN as usize] {
        let mut out = [0u8; ALIGN as usize];
        out[0..4].copy_from_slice(&SEGMENT_MAGIC.to_le_bytes());
        out[8..12].copy_from_slice(&u32::from(FORMAT).to_le_bytes());
        out[12..16].copy_from_slice(&self.identity.number.to_le_bytes());
        out[16..32].copy_from_slice(&self.identity.storage.to_le_bytes());
        out[32..40].copy_from_slice(&self.seq.to_le_bytes());
        out[40..48].copy_from_slice(&self.segment_bytes.to_le_bytes());
        let crc = crc32c(&out[8..]);
        out[4..8].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Decodes a header.
    pub fn decode(bytes: &[u8; ALIGN as usize]) -> Result<SegmentHeader, BadSegment> {
        if u32_at(bytes, 0) != SEGMENT_MAGIC {
            return Err(BadSegment::Unwritten);
        }
        let version = u32_at(bytes, 8);
        if version != u32::from(FORMAT) {
            return Err(BadSegment::Version(version));
        }
        if u32_at(bytes, 4) != crc32c(&bytes[8..]) {
            return Err(BadSegment::Damaged);
        }
        let storage = u128::from(u64_at(bytes, 16)) | u128::from(u64_at(bytes, 24)) << 64;
        Ok(SegmentHeader {
            identity: LogIdentity {
                storage,
                number: u32_at(bytes, 12),
            },
            seq: u64_at(bytes, 32),
            segment_bytes: u64_at(bytes, 40),
        })
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0u8; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0u8; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}
