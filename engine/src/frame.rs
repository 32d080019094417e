//! How an envelope travels: a fixed 64-byte header, a body, and the long values of the body behind
//! it, each with its own CRC-32C.
//!
//! ```text
//!  0  version u8 | kind u8 | count of long values u16 | body length u32
//!  8  from node u32 | to node u32
//! 16  from incarnation u64
//! 24  to incarnation u64        0: not known
//! 32  epoch u64                 the sender's (E2)
//! 40  minimum u64               the sender's copy of m
//! 48  term u32 | sequence u32
//! 56  body CRC-32C u32 | header CRC-32C u32
//! 64  the message, then for each long value: length u32 | CRC-32C u32
//!     the long values; those of at least 128 KiB each at the next multiple of 4096, zeros before it
//! ```
//!
//! Values that are long are not copied on the way: a frame refers to them ([`Frame`]), and a frame that
//! arrives in shared memory lends them. Their checksums go with them, so whoever passes them on or
//! stores them need not compute them again; and the longest lie as a disk can take them.
//!
//! All little-endian; zeros are checked. Bytes come from the network: a frame that
//! is not whole is a typed [`Drop`], counted by the caller, never a panic.

use std::sync::Arc;

use lowtide_engine_core::ids::{Epoch, Incarnation, Life, NodeId, Term};
use lowtide_engine_core::message::{Envelope, Message, VERSION};
use lowtide_engine_core::op::Bytes;
use lowtide_engine_core::wire::{self, BESIDE_MIN, Reader, Sink, Wire};
use lowtide_transport::message::Piece;

use crate::crc::crc32c;

/// Length of the header, in bytes.
pub const HEADER: usize = 64;
/// What a body says of each long value, in bytes.
const TABLE_ENTRY: usize = 8;

/// Why a frame was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drop {
    /// Shorter than a header, or than its header says.
    Short,
    /// Another version of the encoding.
    Version(u8),
    /// A checksum does not match, or reserved bytes are not zero.
    Corrupt,
    /// For another node, or for an earlier life of this one.
    Misdirected,
    /// The body does not decode.
    Malformed(&'static str),
}

fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// A value at least this long begins at a multiple of [`ALIGN`], in bytes.
const ALIGNED_MIN: usize = 128 << 10;
/// A page.
const ALIGN: usize = 4096;
/// What lies between a value and the next multiple of [`ALIGN`].
static ZEROS: [u8; ALIGN] = [0; ALIGN];

/// Where a value of `len` bytes begins that comes behind `end` bytes of frame.
fn place(end: usize, len: usize) -> usize {
    match len >= ALIGNED_MIN {
        true => end.next_multiple_of(ALIGN),
        false => end,
    }
}

/// An encoded frame, long values left where they are.
#[derive(Debug, Default)]
pub struct Frame {
    /// Header and body.
    bytes: Vec<u8>,
    /// Long values, in order.
    values: Vec<Bytes>,
}

impl Sink for Frame {
    fn slice(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    fn value(&mut self, value: &Bytes) {
        if value.len() < BESIDE_MIN {
            self.slice(value);
        } else {
            self.values.push(value.clone());
        }
    }
}

impl Frame {
    /// Encodes an envelope for `to`, replacing what was encoded before.
    pub fn encode(&mut self, envelope: &Envelope, to: Life, sequence: u32) {
        self.values.clear();
        self.bytes.clear();
        self.bytes.resize(HEADER, 0);
        envelope.body.put(self);
        for value in &self.values {
            let crc = value.checksum().unwrap_or_else(|| crc32c(value));
            self.bytes.extend((value.len() as u32).to_le_bytes());
            self.bytes.extend(crc.to_le_bytes());
        }
        let (header, body) = self.bytes.split_at_mut(HEADER);
        let count = u16::try_from(self.values.len()).expect("all of them fit a message");
        header[0] = VERSION;
        header[1] = body.first().copied().unwrap_or(0);
        put(header, 2, &count.to_le_bytes());
        put(header, 4, &(body.len() as u32).to_le_bytes());
        put(header, 8, &envelope.from.node.0.to_le_bytes());
        put(header, 12, &to.node.0.to_le_bytes());
        put(header, 16, &envelope.from.incarnation.0.to_le_bytes());
        put(header, 24, &to.incarnation.0.to_le_bytes());
        put(header, 32, &envelope.epoch.0.to_le_bytes());
        put(header, 40, &envelope.minimum.0.to_le_bytes());
        put(header, 48, &(envelope.term.0 as u32).to_le_bytes());
        put(header, 52, &sequence.to_le_bytes());
        put(header, 56, &crc32c(body).to_le_bytes());
        let crc = crc32c(&header[..60]);
        put(header, 60, &crc.to_le_bytes());
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty, reason = "a frame has a header")]
    pub fn len(&self) -> usize {
        let lengths = self.values.iter().map(|value| value.len());
        lengths.fold(self.bytes.len(), |end, len| place(end, len) + len)
    }

    /// All of it, if nothing was left elsewhere.
    pub fn as_slice(&self) -> Option<&[u8]> {
        self.values.is_empty().then_some(&self.bytes)
    }

    /// Takes it, as pieces in order.
    pub fn take_pieces(&mut self) -> Vec<Piece> {
        let mut pieces = Vec::with_capacity(2 * self.values.len() + 1);
        let mut end = self.bytes.len();
        pieces.push(Piece::Owned(std::mem::take(&mut self.bytes)));
        for value in self.values.drain(..) {
            let at = place(end, value.len());
            if at > end {
                pieces.push(Piece::Owned(ZEROS[..at - end].to_vec()));
            }
            end = at + value.len();
            let (owner, range) = value.place();
            pieces.push(Piece::Shared(owner.clone(), range));
        }
        pieces
    }
}

/// The long values of a frame whose body ends at `end`, said by `table` to be there.
fn take_values(
    bytes: &[u8],
    owner: Option<(&Arc<[u8]>, usize)>,
    table: &[u8],
    mut end: usize,
) -> Result<Vec<Bytes>, Drop> {
    let mut values = Vec::with_capacity(table.len() / TABLE_ENTRY);
    for entry in table.chunks_exact(TABLE_ENTRY) {
        let (len, crc) = (u32_at(entry, 0) as usize, u32_at(entry, 4));
        let at = place(end, len);
        let value = at.checked_add(len).and_then(|to| bytes.get(at..to));
        let value = value.ok_or(Drop::Short)?;
        if crc32c(value) != crc || bytes[end..at] != ZEROS[..at - end] {
            return Err(Drop::Corrupt);
        }
        let kept = owner
            .filter(|_| len >= BESIDE_MIN)
            .and_then(|(owner, begin)| Bytes::part_of(owner, begin + at..begin + at + len));
        let kept = kept.unwrap_or_else(|| Bytes::from(value));
        values.push(kept.with_checksum(crc));
        end = at + len;
    }
    if end == bytes.len() {
        Ok(values)
    } else {
        Err(Drop::Short)
    }
}

/// Decodes a frame that arrived at `own`. If it lies in shared memory, at that offset of `owner`,
/// its long values stay there.
///
/// # Errors
/// Why the frame is dropped.
pub fn decode(
    bytes: &[u8],
    owner: Option<(&Arc<[u8]>, usize)>,
    own: Life,
) -> Result<Envelope, Drop> {
    let (header, rest) = bytes.split_at_checked(HEADER).ok_or(Drop::Short)?;
    if crc32c(&header[..60]) != u32_at(header, 60) {
        return Err(Drop::Corrupt);
    }
    if header[0] != VERSION {
        return Err(Drop::Version(header[0]));
    }
    let body = rest.get(..u32_at(header, 4) as usize).ok_or(Drop::Short)?;
    if crc32c(body) != u32_at(header, 56) || body.first() != Some(&header[1]) {
        return Err(Drop::Corrupt);
    }
    let count = usize::from(u16::from_le_bytes([header[2], header[3]]));
    let message_len = body.len().checked_sub(count * TABLE_ENTRY);
    let (message, table) = body.split_at(message_len.ok_or(Drop::Short)?);
    let values = take_values(bytes, owner, table, HEADER + body.len())?;
    let to_incarnation = u64_at(header, 24);
    let stale = to_incarnation != 0 && to_incarnation != own.incarnation.0;
    if u32_at(header, 12) != own.node.0 || stale {
        return Err(Drop::Misdirected);
    }
    let input = Reader::beside(message, &values);
    let body: Message = wire::take_all(input, "message").map_err(|m| Drop::Malformed(m.what))?;
    Ok(Envelope {
        from: Life {
            node: NodeId(u32_at(header, 8)),
            incarnation: Incarnation(u64_at(header, 16)),
        },
        epoch: Epoch(u64_at(header, 32)),
        minimum: Epoch(u64_at(header, 40)),
        term: Term(u64::from(u32_at(header, 48))),
        body,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowtide_engine_core::op::Key;
    use proptest::prelude::*;

    fn sample() -> (Envelope, Life) {
        let from = Life {
            node: NodeId(7),
            incarnation: Incarnation(3),
        };
        let to = Life {
            node: NodeId(2),
            incarnation: Incarnation(9),
        };
        let body = Message::Pin { round: 77 };
        let (epoch, minimum, term) = (Epoch(1 << 40), Epoch(12), Term(4));
        (
            Envelope {
                from,
                epoch,
                minimum,
                term,
                body,
            },
            to,
        )
    }

    fn encoded(envelope: &Envelope, to: Life) -> Vec<u8> {
        let mut frame = Frame::default();
        frame.encode(envelope, to, 1);
        let len = frame.len();
        let pieces = frame.take_pieces();
        let bytes: Vec<u8> = pieces.iter().flat_map(|p| p.bytes().to_vec()).collect();
        assert_eq!(bytes.len(), len);
        bytes
    }

    #[test]
    fn long_values_are_neither_copied_out_nor_in() {
        let (mut envelope, to) = sample();
        let value = |len: usize| Bytes::from_iter((0..len).map(|i| ((i * 7) >> 3) as u8));
        let entries = [10, 100_000, BESIDE_MIN - 1, BESIDE_MIN, 0].map(|len| {
            let key = Key::at(1, len as u64);
            (key, value(len))
        });
        envelope.body = Message::ScanReply {
            request: 3,
            entries: entries.to_vec(),
            more: true,
        };
        let mut frame = Frame::default();
        frame.encode(&envelope, to, 1);
        assert!(frame.as_slice().is_none());
        let pieces = frame.take_pieces();
        let shared = |piece: &&Piece| matches!(piece, Piece::Shared(..));
        let shared: Vec<&Piece> = pieces.iter().filter(shared).collect();
        let is_at = |piece: &Piece, entry: usize| std::ptr::eq(piece.bytes(), &*entries[entry].1);
        assert!(shared.len() == 2 && is_at(shared[0], 1) && is_at(shared[1], 3));

        // The slab is longer than the message, on both sides.
        let around = [0xEE; 1000];
        let message = pieces.iter().flat_map(|piece| piece.bytes().to_vec());
        let arrived: Arc<[u8]> = around.into_iter().chain(message).chain(around).collect();
        let frame = &arrived[1000..arrived.len() - 1000];
        let decoded = decode(frame, Some((&arrived, 1000)), to).unwrap();
        assert_eq!(decoded, envelope);
        let Message::ScanReply { entries, .. } = decoded.body else {
            panic!("it is equal");
        };
        let stays = |(_, value): &(Key, Bytes)| Arc::ptr_eq(value.place().0, &arrived);
        let stays: Vec<bool> = entries.iter().map(stays).collect();
        assert_eq!(stays, [false, true, false, true, false]);
        let is_right = |(_, value): &(Key, Bytes)| match value.checksum() {
            Some(crc) => crc == crc32c(value),
            None => value.len() < BESIDE_MIN,
        };
        assert!(entries.iter().all(is_right));
    }

    /// A message with long values, and its frame.
    fn long() -> (Envelope, Life, Vec<u8>) {
        let (mut envelope, to) = sample();
        let entries = [ALIGNED_MIN, BESIDE_MIN, ALIGNED_MIN + 1].map(|len| {
            let value = Bytes::from_iter((0..len).map(|i| (i % 251) as u8 + 1));
            (Key::at(1, len as u64), value)
        });
        envelope.body = Message::ScanReply {
            request: 3,
            entries: entries.to_vec(),
            more: false,
        };
        let bytes = encoded(&envelope, to);
        (envelope, to, bytes)
    }

    #[test]
    fn the_longest_values_begin_with_a_page() {
        let (envelope, to, bytes) = long();
        let second = (4096 + ALIGNED_MIN + BESIDE_MIN).next_multiple_of(ALIGN);
        let Message::ScanReply { entries, .. } = &envelope.body else {
            panic!("made above");
        };
        assert!(bytes[4096..].starts_with(&entries[0].1));
        assert!(bytes[second..].starts_with(&entries[2].1));
        assert_eq!(decode(&bytes, None, to), Ok(envelope));
    }

    #[test]
    fn a_lie_about_long_values_is_found() {
        let (_, to, bytes) = long();
        let body_len = u32_at(&bytes, 4) as usize;
        let sealed = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bad = bytes.clone();
            change(&mut bad);
            let crc = crc32c(&bad[HEADER..HEADER + body_len]);
            put(&mut bad, 56, &crc.to_le_bytes());
            let crc = crc32c(&bad[..60]);
            put(&mut bad, 60, &crc.to_le_bytes());
            decode(&bad, None, to)
        };
        let table = HEADER + body_len - 3 * TABLE_ENTRY;
        assert!(sealed(&|_| ()).is_ok());
        let huge = u32::MAX.to_le_bytes();
        assert_eq!(sealed(&|bad| put(bad, table, &huge)), Err(Drop::Short));
        assert_eq!(
            sealed(&|bad| put(bad, table + 4, &huge)),
            Err(Drop::Corrupt)
        );
        assert_eq!(sealed(&|bad| bad.push(0)), Err(Drop::Short));
        assert_eq!(sealed(&|bad| bad.truncate(bad.len() - 1)), Err(Drop::Short));
        assert_eq!(
            sealed(&|bad| bad[HEADER + body_len] = 1),
            Err(Drop::Corrupt)
        );
        assert_eq!(sealed(&|bad| bad[5000] ^= 1), Err(Drop::Corrupt));
        assert!(sealed(&|bad| bad[2] += 1).is_err());
        // The message says one length, the table another.
        let shorter = sealed(&|bad| {
            let last = bad.len() - ALIGNED_MIN - 1;
            bad.truncate(bad.len() - 1);
            let crc = crc32c(&bad[last..]).to_le_bytes();
            put(
                bad,
                table + 2 * TABLE_ENTRY,
                &(ALIGNED_MIN as u32).to_le_bytes(),
            );
            put(bad, table + 2 * TABLE_ENTRY + 4, &crc);
        });
        assert_eq!(shorter, Err(Drop::Malformed("value")));
    }

    #[test]
    fn a_frame_survives_the_trip_and_a_wrong_address_does_not() {
        let (envelope, to) = sample();
        let bytes = encoded(&envelope, to);
        assert_eq!(decode(&bytes, None, to), Ok(envelope));
        let other = Life {
            node: NodeId(3),
            ..to
        };
        assert_eq!(decode(&bytes, None, other), Err(Drop::Misdirected));
        let later = Life {
            incarnation: Incarnation(10),
            ..to
        };
        assert_eq!(decode(&bytes, None, later), Err(Drop::Misdirected));
    }

    #[test]
    fn no_flipped_bit_passes() {
        let (envelope, to) = sample();
        let bytes = encoded(&envelope, to);
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bad, None, to).is_err(), "bit {bit}");
        }
    }

    proptest! {
        #[test]
        fn hostile_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let own = Life { node: NodeId(0), incarnation: Incarnation(0) };
            let _ = decode(&bytes, None, own);
        }
    }
}
