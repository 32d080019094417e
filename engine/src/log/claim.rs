//! Claims: which commit group is durable, and how far each log reaches in it.
//!
//! Owns: where a claim is written, and the reading of claim slots. A claim has the form of a record
//! ([`KIND_CLAIM`], body [`ClaimBody`]) and stands in the node's first log: behind the group's
//! records there, in the *room* that a batch leaves at its end, so that one write takes both; or, if
//! that log got no records in the group, in one of the two *slots* of the segment where it ends.
//!
//! Invariants: a room is used only while nothing of it is durable, so a torn write damages nothing
//! that counts; claims of consecutive groups never stand in the same slot, each a page of its own,
//! so a torn write of the newest leaves the one before it; a claim carries its position, so one of
//! an earlier use of the file is not taken for one of this; a segment that holds the newest durable
//! claim is not recycled, because its log is durable into that segment and no further.
//! Deliberately absent: which claims count ([`super::set`]).

use super::record::{ALIGN, ClaimBody, KIND_CLAIM, Lsn, RecordHeader};
use super::segment::{CLAIM_SLOTS, Segment, SyncHandle};
use super::teeth::{Tooth, bites};
use super::{BatchEnd, Log, LogConfig, LogError, record_len};
use crate::crc::crc32c;
use crate::medium::{Medium, MediumError, PAGE};

/// Bytes in the body of a claim that batches leave room for, at most: more logs than this allows
/// have their claims in the slots, because every batch would pay for the room.
pub(super) const ROOM_BODY_MAX: usize = ClaimBody::len(7);

const _: () = assert!(
    record_len(ClaimBody::len(super::set::LOGS_MAX as usize) as u64) <= PAGE,
    "a claim of all logs fits into a slot"
);
const _: () = assert!(
    record_len(ROOM_BODY_MAX as u64) + 2 * ALIGN - 1 <= lowtide_engine_core::room::FRAME_BYTES,
    "what a source reserves covers a record that is a batch of its own"
);

/// An intact claim and its group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// The group that it is of.
    pub group: u64,
    /// What it says.
    pub body: ClaimBody,
}

/// What stands in a claim slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Slot {
    /// Nothing, or a claim of an earlier use of the file.
    Empty,
    /// A claim.
    Claim(Claim),
    /// Not a claim any more: torn by a crash while it was written, or damaged later.
    Damaged,
}

/// The slot for the claim of a group.
fn slot_of(group: u64) -> u64 {
    let slot = if bites(Tooth::OneClaimSlot) {
        0
    } else {
        group & 1
    };
    CLAIM_SLOTS[slot as usize]
}

/// Reads the slot at `offset` of a segment: of the log with this tag, at this position of it.
///
/// # Errors
/// The medium failed.
pub(super) fn read(
    medium: &dyn Medium,
    offset: u64,
    (tag, position): (u64, Lsn),
) -> Result<Slot, MediumError> {
    let mut page = [0u8; PAGE as usize];
    medium.read(offset, &mut page)?;
    let (head, rest) = page.split_at(ALIGN as usize);
    if head.iter().all(|b| *b == 0) {
        return Ok(Slot::Empty);
    }
    let header = head.first_chunk().map(RecordHeader::decode);
    let Some(Ok(header)) = header else {
        return Ok(Slot::Damaged);
    };
    if header.lsn != position {
        return Ok(Slot::Empty);
    }
    let body = rest.get(..header.body_len as usize);
    let body = body.filter(|body| crc32c(body) == header.body_crc);
    let is_claim = header.tag == tag && header.kind == KIND_CLAIM;
    Ok(match body.and_then(ClaimBody::decode) {
        Some(body) if is_claim => Slot::Claim(Claim {
            group: header.group,
            body,
        }),
        _ => Slot::Damaged,
    })
}

/// The intact claims in the slots of some segments.
///
/// # Errors
/// The medium failed.
pub(super) fn read_all<'a>(
    segments: impl Iterator<Item = &'a Segment>,
    config: &LogConfig,
) -> Result<Vec<Claim>, MediumError> {
    let tag = config.identity.tag();
    let mut claims = Vec::new();
    for segment in segments {
        for offset in CLAIM_SLOTS {
            let position = Lsn(segment.seq * config.segment_bytes + offset);
            if let Slot::Claim(claim) = read(&*segment.medium, offset, (tag, position))? {
                claims.push(claim);
            }
        }
    }
    Ok(claims)
}

/// Writes claims to the node's first log and syncs it; belongs to the committer.
#[derive(Debug)]
pub(super) struct Claims {
    first: SyncHandle,
    generation: u32,
    tag: u64,
    segment_bytes: u64,
    /// Bytes that a claim takes.
    len: u64,
    bytes: Vec<u8>,
}

impl Claims {
    /// For the node's first log of so many; its batches leave room from now on.
    pub fn of(first: &mut Log, logs: usize) -> Claims {
        let len = ClaimBody::len(logs);
        first.claim_len = (len <= ROOM_BODY_MAX).then_some(len);
        Claims {
            len: record_len(len as u64),
            first: first.sync_handle(),
            generation: first.generation(),
            tag: first.tag,
            segment_bytes: first.shared.config.segment_bytes,
            bytes: Vec::new(),
        }
    }

    /// Makes the first log's records before its end durable together with the claim that `group`
    /// reaches these ends, and that `durable_group` is durable already. The log's durable position
    /// stays, until [`settle`](Self::settle). `first` is the end of the first log.
    ///
    /// # Errors
    /// As [`SyncHandle::sync`].
    pub fn commit(
        &mut self,
        group: u64,
        durable_group: u64,
        first: BatchEnd,
        ends: &[Lsn],
    ) -> Result<(), LogError> {
        let end = first.end;
        // What lies behind the durable end was never synced.
        let is_fresh = end > self.first.durable() || bites(Tooth::StaleRoom);
        let offset = match first.has_room && is_fresh {
            true => end.0 % self.segment_bytes - self.len,
            false => slot_of(group),
        };
        let mut body = Vec::with_capacity(8 * (ends.len() + 1));
        ClaimBody::encode_into(durable_group, ends, &mut body);
        let header = RecordHeader {
            lsn: Lsn(end.0 / self.segment_bytes * self.segment_bytes + offset),
            epoch: 0,
            group,
            durable: self.first.durable(),
            generation: self.generation,
            body_len: body.len() as u32,
            body_crc: crc32c(&body),
            kind: KIND_CLAIM,
            flags: 0,
            tag: self.tag,
        };
        self.bytes.clear();
        self.bytes.extend_from_slice(&header.encode());
        self.bytes.extend_from_slice(&body);
        self.first.flush(end, Some((offset, &self.bytes)))
    }

    /// The group with this end in the first log is durable on every log.
    pub fn settle(&self, end: Lsn) {
        self.first.settle(end);
    }
}
