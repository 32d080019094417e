//! Parcels: what one SEND of a connection carries.
//!
//! Owns the byte layout of the message layer, little endian:
//!
//! ```text
//!  0       1       2               4               8              12              16
//! +-------+-------+---------------+---------------+---------------+---------------+
//! |version| kind  | credits       | sequence      | a             | b             | body …
//! +-------+-------+---------------+---------------+---------------+---------------+
//! ```
//! * kind 1, *records*: `a` whole messages, `b` = 0. Each is a u32 length, the bytes, and zeroes up
//!   to a multiple of four. The parcel fits one packet, so its messages are handed up in place.
//! * kind 2, *message*: one message of `a` bytes, more than a packet and at most [`MESSAGE_MAX`];
//!   `b` = 0.
//! * kind 3, *credit*: nothing but credits, and how many offers have been taken so far (`a`, modulo
//!   2^32); `b` = 0.
//! * kind 4, *offer*: a message of `a` bytes, more than [`MESSAGE_MAX`], waits under key `b` to be
//!   READ. The body is its address (u64), the offer's number (u32: 0, 1, 2 …) and four zeroes.
//!
//! Kinds 1 and 2 with 128 added are *urgent*: handed up at once, whatever else is being waited for.
//!
//! `credits` returns receive slots: in its low 12 bits how many more parcels the other end may have
//! under way, in its high 4 bits how many more urgent ones. `sequence` counts the parcels of this
//! direction; queue pairs deliver in order, so a surprise there is a broken peer.
//!
//! Invariant: whatever bytes come, parsing neither panics nor allocates.
//!
//! Deliberately absent: who may send when (`connection`), and any checksum (the ICRC has been
//! verified, and the engine's own header has another).

use super::Violation;

/// Version of the layout.
pub(crate) const VERSION: u8 = 3;
/// Length of the parcel header in bytes.
pub(crate) const HEADER_LEN: usize = 16;
/// A slot holds one parcel of fifteen full packets: as many as one UDP_SEGMENT send carries.
pub(crate) const SLOT_LEN: usize = 15 * 4096;
/// The longest message that a parcel carries, in bytes; longer ones are offered.
pub(crate) const MESSAGE_MAX: usize = SLOT_LEN - HEADER_LEN;
/// Length of an offer's body.
pub(crate) const OFFER_LEN: usize = 16;
/// Length prefix of a record.
pub(crate) const RECORD_PREFIX: usize = 4;
/// What is added to the kind of an urgent parcel.
const URGENT: u8 = 0x80;
/// Ordinary credits that a header has room for, and urgent ones above them.
const CREDITS_BITS: u32 = 12;

/// Which of two lines a message goes in. Both keep their order, neither waits for the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Lane {
    #[default]
    Ordinary,
    /// Few and short, and ahead of all ordinary ones that wait.
    Urgent,
}

/// What a parcel carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Whole messages.
    Records {
        /// How many.
        count: u32,
    },
    /// One message.
    Message {
        /// Its length in bytes.
        len: u32,
    },
    /// Nothing.
    Credit {
        /// Offers taken so far.
        taken: u32,
    },
    /// Where a message is to be READ.
    Offer {
        /// Its length in bytes.
        len: u32,
        /// The key.
        rkey: u32,
    },
}

/// The body of an offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Offer {
    pub(crate) address: u64,
    pub(crate) number: u32,
}

impl Offer {
    pub(crate) fn emit(self, out: &mut [u8]) {
        out[..8].copy_from_slice(&self.address.to_le_bytes());
        out[8..12].copy_from_slice(&self.number.to_le_bytes());
        out[12..OFFER_LEN].fill(0);
    }

    pub(crate) fn parse(body: &[u8]) -> Result<Offer, Violation> {
        let (address, rest) = body.split_first_chunk::<8>().ok_or(Violation::Layout)?;
        let (number, rest) = rest.split_first_chunk::<4>().ok_or(Violation::Layout)?;
        if rest != [0; 4] {
            return Err(Violation::Layout);
        }
        Ok(Offer {
            address: u64::from_le_bytes(*address),
            number: u32::from_le_bytes(*number),
        })
    }
}

/// What every parcel says, whatever it carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// Receive slots returned, fewer than 4096.
    pub(crate) credits: u16,
    /// Those for urgent parcels, fewer than 16.
    pub(crate) urgent_credits: u16,
    pub(crate) sequence: u32,
}

/// A parcel's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    /// Urgent ones are records or one message.
    pub(crate) lane: Lane,
    pub(crate) stamp: Stamp,
}

impl Header {
    /// Writes the header to the start of `out`.
    pub(crate) fn emit(&self, out: &mut [u8]) {
        let (kind, a, b) = match self.kind {
            Kind::Records { count } => (1, count, 0),
            Kind::Message { len } => (2, len, 0),
            Kind::Credit { taken } => (3, taken, 0),
            Kind::Offer { len, rkey } => (4, len, rkey),
        };
        let Stamp {
            credits,
            urgent_credits,
            sequence,
        } = self.stamp;
        let credits = credits | urgent_credits << CREDITS_BITS;
        out[0] = VERSION;
        out[1] = match self.lane {
            Lane::Ordinary => kind,
            Lane::Urgent => kind | URGENT,
        };
        out[2..4].copy_from_slice(&credits.to_le_bytes());
        out[4..8].copy_from_slice(&sequence.to_le_bytes());
        out[8..12].copy_from_slice(&u32::to_le_bytes(a));
        out[12..16].copy_from_slice(&u32::to_le_bytes(b));
    }

    /// Reads a header; returns it and the body that follows in `bytes`.
    pub(crate) fn parse(bytes: &[u8]) -> Result<(Header, &[u8]), Violation> {
        let (header, body) = bytes
            .split_at_checked(HEADER_LEN)
            .ok_or(Violation::Layout)?;
        let word = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let (a, b) = (word(8), word(12));
        let lane = match header[1] & URGENT {
            0 => Lane::Ordinary,
            _ => Lane::Urgent,
        };
        let kind = match header[1] & !URGENT {
            1 if b == 0 => Kind::Records { count: a },
            2 if b == 0 => Kind::Message { len: a },
            3 if b == 0 && body.is_empty() => Kind::Credit { taken: a },
            4 => Kind::Offer { len: a, rkey: b },
            _ => return Err(Violation::Layout),
        };
        let has_lane = matches!(kind, Kind::Records { .. } | Kind::Message { .. });
        if header[0] != VERSION || (lane == Lane::Urgent && !has_lane) {
            return Err(Violation::Layout);
        }
        let credits = u16::from_le_bytes([header[2], header[3]]);
        let stamp = Stamp {
            credits: credits & ((1 << CREDITS_BITS) - 1),
            urgent_credits: credits >> CREDITS_BITS,
            sequence: word(4),
        };
        Ok((Header { kind, lane, stamp }, body))
    }
}

/// Bytes that a record of `len` message bytes takes.
pub(crate) fn record_len(len: usize) -> usize {
    RECORD_PREFIX + len.next_multiple_of(4)
}

/// Takes the first message off `body`, the rest of a records parcel.
pub(crate) fn next_record<'a>(body: &mut &'a [u8]) -> Result<&'a [u8], Violation> {
    let (prefix, rest) = body
        .split_first_chunk::<RECORD_PREFIX>()
        .ok_or(Violation::Layout)?;
    let len = u32::from_le_bytes(*prefix) as usize;
    if len > rest.len() {
        return Err(Violation::Layout);
    }
    let (record, rest) = rest
        .split_at_checked(len.next_multiple_of(4))
        .ok_or(Violation::Layout)?;
    *body = rest;
    Ok(&record[..len])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_come_back_as_they_were_written() {
        let kinds = [
            Kind::Records { count: 3 },
            Kind::Message { len: 61_424 },
            Kind::Credit { taken: 0xFFFF_FFFF },
            Kind::Offer {
                len: 1 << 20,
                rkey: 0x9ABC_DEF0,
            },
        ];
        for (kind, lane) in kinds
            .into_iter()
            .flat_map(|kind| [Lane::Ordinary, Lane::Urgent].map(|lane| (kind, lane)))
        {
            let header = Header {
                kind,
                lane,
                stamp: Stamp {
                    credits: 0x234,
                    urgent_credits: 0xE,
                    sequence: 0x89AB_CDEF,
                },
            };
            let mut bytes = [0xEE; HEADER_LEN];
            header.emit(&mut bytes);
            let has_lane = matches!(kind, Kind::Records { .. } | Kind::Message { .. });
            let expected = match has_lane || lane == Lane::Ordinary {
                true => Ok((header, &[][..])),
                false => Err(Violation::Layout),
            };
            assert_eq!(Header::parse(&bytes), expected);
        }
    }

    #[test]
    fn records_are_taken_off_one_by_one_and_lies_about_lengths_are_caught() {
        let mut bytes = Vec::new();
        for message in [&b"one"[..], b"", b"eight by"] {
            bytes.extend_from_slice(&(message.len() as u32).to_le_bytes());
            bytes.extend_from_slice(message);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        let mut body = &bytes[..];
        assert_eq!(next_record(&mut body), Ok(&b"one"[..]));
        assert_eq!(next_record(&mut body), Ok(&b""[..]));
        assert_eq!(next_record(&mut body), Ok(&b"eight by"[..]));
        assert_eq!(next_record(&mut body), Err(Violation::Layout));
        for len in [9u32, 1 << 31, u32::MAX] {
            let mut lie = len.to_le_bytes().to_vec();
            lie.extend_from_slice(b"eight by");
            assert_eq!(next_record(&mut &lie[..]), Err(Violation::Layout));
        }
    }

    #[test]
    fn no_bytes_make_the_parser_panic() {
        let mut state = 1u64;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) as u8
        };
        for round in 0..20_000 {
            let mut bytes: Vec<u8> = (0..round % 64).map(|_| next()).collect();
            if round % 2 == 0 && bytes.len() > 1 {
                (bytes[0], bytes[1]) = (VERSION, (1 + next() % 4) | (next() & URGENT));
            }
            if let Ok((_, mut body)) = Header::parse(&bytes) {
                let _ = Offer::parse(body);
                while next_record(&mut body).is_ok() {}
            }
        }
    }
}
