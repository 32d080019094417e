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
//! All little-endian; reserved bytes are zero and checked. Bytes come from the network: a frame that
//! is not whole is a typed [`Drop`], counted by the caller, never a panic.

use lowtide_engine_core::ids::{Epoch, Incarnation, Life, NodeId, Term};
use lowtide_engine_core::message::{Envelope, Message, VERSION};
use lowtide_engine_core::wire::{self, Wire};

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

/// Encodes an envelope for `to` into `out`, replacing what it held.
pub fn encode(envelope: &Envelope, to: Life, sequence: u32, out: &mut Vec<u8>) {
    out.clear();
    out.resize(HEADER, 0);
    envelope.body.put(out);
    let length = (out.len() - HEADER) as u32;
    let (header, body) = out.split_at_mut(HEADER);
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
    put(header, 56, &crc32c::crc32c(body).to_le_bytes());
    let crc = crc32c::crc32c(&header[..60]);
    put(header, 60, &crc.to_le_bytes());
}

/// Decodes a frame that arrived at `own`.
///
/// # Errors
/// Why the frame is dropped.
pub fn decode(bytes: &[u8], own: Life) -> Result<Envelope, Drop> {
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
    let body: Message = wire::decode(body, "message").map_err(|m| Drop::Malformed(m.what))?;
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

    #[test]
    fn a_frame_survives_the_trip_and_a_wrong_address_does_not() {
        let (envelope, to) = sample();
        let mut bytes = Vec::new();
        encode(&envelope, to, 1, &mut bytes);
        assert_eq!(decode(&bytes, to), Ok(envelope));
        let other = Life {
            node: NodeId(3),
            ..to
        };
        assert_eq!(decode(&bytes, other), Err(Drop::Misdirected));
        let later = Life {
            incarnation: Incarnation(10),
            ..to
        };
        assert_eq!(decode(&bytes, later), Err(Drop::Misdirected));
    }

    #[test]
    fn no_flipped_bit_passes() {
        let (envelope, to) = sample();
        let mut bytes = Vec::new();
        encode(&envelope, to, 1, &mut bytes);
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bad, to).is_err(), "bit {bit}");
        }
    }

    proptest! {
        #[test]
        fn hostile_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let own = Life { node: NodeId(0), incarnation: Incarnation(0) };
            let _ = decode(&bytes, own);
        }
    }
}
