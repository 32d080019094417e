//! How an envelope travels: a fixed 64-byte header and a body, each with its own CRC-32C.
//!
//! ```text
//!  0  version u8 | kind u8 | reserved u16 | body length u32
//!  8  from node u32 | to node u32
//! 16  from incarnation u64
//! 24  to incarnation u64        0: not known
//! 32  epoch u64                 the sender's (E2)
//! 40  minimum u64               the sender's copy of m
//! 48  term u32 | sequence u32
//! 56  body CRC-32C u32 | header CRC-32C u32
//! ```
//!
//! Values that are long are not copied on the way: a frame refers to them ([`Frame`]), and a frame that
//! arrives in shared memory lends them.
//!
//! All little-endian; reserved bytes are zero and checked. Bytes come from the network: a frame that
//! is not whole is a typed [`Drop`], counted by the caller, never a panic.

use std::sync::Arc;

use lowtide_engine_core::ids::{Epoch, Incarnation, Life, NodeId, Term};
use lowtide_engine_core::message::{Envelope, Message, VERSION};
use lowtide_engine_core::op::Bytes;
use lowtide_engine_core::wire::{self, Reader, Sink, Wire};
use lowtide_transport::message::Piece;

/// Length of the header, in bytes.
pub const HEADER: usize = 64;

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

/// A value at least this long is sent from where it is, in bytes.
const KEPT_MIN: usize = 16 << 10;

/// An encoded frame, long values left where they are.
#[derive(Debug, Default)]
pub struct Frame {
    /// Everything else, in order.
    bytes: Vec<u8>,
    /// Long values, each with the offset in `bytes` where it belongs.
    values: Vec<(usize, Bytes)>,
}

impl Sink for Frame {
    fn slice(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    fn value(&mut self, value: &Bytes) {
        if value.len() < KEPT_MIN {
            self.slice(value);
        } else {
            self.values.push((self.bytes.len(), value.clone()));
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
        let length = (self.len() - HEADER) as u32;
        let body_crc = self.body_crc();
        let (header, body) = self.bytes.split_at_mut(HEADER);
        header[0] = VERSION;
        header[1] = body.first().copied().unwrap_or(0);
        put(header, 4, &length.to_le_bytes());
        put(header, 8, &envelope.from.node.0.to_le_bytes());
        put(header, 12, &to.node.0.to_le_bytes());
        put(header, 16, &envelope.from.incarnation.0.to_le_bytes());
        put(header, 24, &to.incarnation.0.to_le_bytes());
        put(header, 32, &envelope.epoch.0.to_le_bytes());
        put(header, 40, &envelope.minimum.0.to_le_bytes());
        put(header, 48, &(envelope.term.0 as u32).to_le_bytes());
        put(header, 52, &sequence.to_le_bytes());
        put(header, 56, &body_crc.to_le_bytes());
        let crc = crc32c::crc32c(&header[..60]);
        put(header, 60, &crc.to_le_bytes());
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty, reason = "a frame has a header")]
    pub fn len(&self) -> usize {
        let values = self.values.iter().map(|(_, value)| value.len());
        self.bytes.len() + values.sum::<usize>()
    }

    /// All of it, if nothing was left elsewhere.
    pub fn as_slice(&self) -> Option<&[u8]> {
        self.values.is_empty().then_some(&self.bytes)
    }

    /// Takes it, as pieces in order.
    pub fn take_pieces(&mut self) -> Vec<Piece> {
        if self.values.is_empty() {
            return vec![Piece::Owned(std::mem::take(&mut self.bytes))];
        }
        let mut pieces = Vec::with_capacity(2 * self.values.len() + 1);
        let mut at = 0;
        for (before, value) in self.values.drain(..) {
            pieces.push(Piece::Owned(self.bytes[at..before].to_vec()));
            let (owner, range) = value.place();
            pieces.push(Piece::Shared(owner.clone(), range));
            at = before;
        }
        pieces.push(Piece::Owned(self.bytes[at..].to_vec()));
        pieces
    }

    fn body_crc(&self) -> u32 {
        let mut crc = 0;
        let mut at = HEADER;
        for (before, value) in &self.values {
            crc = crc32c::crc32c_append(crc, &self.bytes[at..*before]);
            crc = crc32c::crc32c_append(crc, value);
            at = *before;
        }
        crc32c::crc32c_append(crc, &self.bytes[at..])
    }
}

/// Decodes a frame that arrived at `own`. If it is the first bytes of `owner`, its long values stay
/// there.
///
/// # Errors
/// Why the frame is dropped.
pub fn decode(bytes: &[u8], owner: Option<&Arc<[u8]>>, own: Life) -> Result<Envelope, Drop> {
    let (header, body) = bytes.split_at_checked(HEADER).ok_or(Drop::Short)?;
    if crc32c::crc32c(&header[..60]) != u32_at(header, 60) || header[2..4] != [0, 0] {
        return Err(Drop::Corrupt);
    }
    if header[0] != VERSION {
        return Err(Drop::Version(header[0]));
    }
    if body.len() != u32_at(header, 4) as usize {
        return Err(Drop::Short);
    }
    if crc32c::crc32c(body) != u32_at(header, 56) || body.first() != Some(&header[1]) {
        return Err(Drop::Corrupt);
    }
    let to_incarnation = u64_at(header, 24);
    let stale = to_incarnation != 0 && to_incarnation != own.incarnation.0;
    if u32_at(header, 12) != own.node.0 || stale {
        return Err(Drop::Misdirected);
    }
    let input = match owner {
        Some(owner) => Reader::within(owner, HEADER..bytes.len()),
        None => Reader::new(body),
    };
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
        let value = |len: usize| Bytes::from_iter((0..len).map(|i| (i * 7 >> 3) as u8));
        let entries = [10, 100_000, KEPT_MIN - 1, KEPT_MIN, 0].map(|len| {
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

        let arrived: Arc<[u8]> = pieces
            .iter()
            .flat_map(|piece| piece.bytes().to_vec())
            .chain([0xEE; 1000]) // the slab is longer than the message
            .collect();
        let frame = &arrived[..arrived.len() - 1000];
        let decoded = decode(frame, Some(&arrived), to).unwrap();
        assert_eq!(decoded, envelope);
        let Message::ScanReply { entries, .. } = decoded.body else {
            panic!("it is equal");
        };
        let stays = |(_, value): &(Key, Bytes)| Arc::ptr_eq(value.place().0, &arrived);
        let stays: Vec<bool> = entries.iter().map(stays).collect();
        assert_eq!(stays, [false, true, false, true, false]);
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
