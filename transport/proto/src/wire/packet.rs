//! A checked view of received bytes.

use super::header::field;
use super::{
    Aeth, AtomicEth, BTH_LEN, Deth, Extension, Feth, Header, ICRC_LEN, Opcode, Psn, Qpn, Reth, Row,
    Shape, Syndrome,
};

/// Why bytes are not a packet. Such bytes are dropped and counted, never answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Malformed {
    /// Too short for the BTH, or for header, pad and ICRC of its opcode.
    Short,
    /// No such opcode, or one of a class this crate does not speak.
    UnknownOpcode(u8),
    /// The transport header version is not 0.
    Version(u8),
    /// The length is not a multiple of four.
    Unaligned,
    /// Payload or pad that the opcode does not admit at any path MTU.
    Payload,
}

/// A received packet: the UDP payload, from BTH to ICRC.
///
/// If [`Self::new_checked`] returned `Ok`, no accessor panics. The ICRC has *not* been compared:
/// that needs the IP header, see [`crate::icrc`].
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    bytes: &'a [u8],
    /// The opcode's row of the table.
    row: &'static Row,
    /// Length of BTH and extension headers.
    header_len: usize,
    /// Where the payload ends and the pad begins.
    payload_end: usize,
}

impl<'a> Packet<'a> {
    /// Check lengths, opcode, version, pad and payload rule of a UDP payload.
    ///
    /// # Errors
    ///
    /// [`Malformed`], naming the first rule broken.
    #[inline]
    pub fn new_checked(udp_payload: &'a [u8]) -> Result<Self, Malformed> {
        let bytes = udp_payload;
        if bytes.len() < BTH_LEN + ICRC_LEN {
            return Err(Malformed::Short);
        }
        let code = bytes[field::OPCODE];
        let opcode = Opcode::from_code(code).ok_or(Malformed::UnknownOpcode(code))?;
        let version = bytes[field::FLAGS] & 0x0f;
        if version != 0 {
            return Err(Malformed::Version(version));
        }
        let row = opcode.row();
        let header_len = row.shape.header_len();
        let pad = usize::from(bytes[field::FLAGS] >> 4 & 3);
        let payload_end = bytes
            .len()
            .checked_sub(ICRC_LEN + pad)
            .filter(|&end| end >= header_len)
            .ok_or(Malformed::Short)?;
        if !bytes.len().is_multiple_of(4) {
            return Err(Malformed::Unaligned);
        }
        if !row.payload.admits(payload_end - header_len, pad) {
            return Err(Malformed::Payload);
        }
        Ok(Self {
            bytes,
            row,
            header_len,
            payload_end,
        })
    }

    /// Opcode.
    #[must_use]
    #[inline]
    pub const fn opcode(&self) -> Opcode {
        self.row.opcode
    }

    /// The opcode's row of the table.
    #[must_use]
    #[inline]
    pub const fn row(&self) -> &'static Row {
        self.row
    }

    /// Solicited event bit.
    #[must_use]
    #[inline]
    pub fn solicited(&self) -> bool {
        self.bytes[field::FLAGS] & 0x80 != 0
    }

    /// MigReq bit.
    #[must_use]
    pub fn mig_req(&self) -> bool {
        self.bytes[field::FLAGS] & 0x40 != 0
    }

    /// Pad bytes, 0 to 3.
    #[must_use]
    pub fn pad(&self) -> u8 {
        self.bytes[field::FLAGS] >> 4 & 3
    }

    /// Partition key.
    #[must_use]
    #[inline]
    pub fn pkey(&self) -> u16 {
        u16::from_be_bytes([self.bytes[field::PKEY], self.bytes[field::PKEY + 1]])
    }

    /// Forward congestion notification bit.
    #[must_use]
    pub fn fecn(&self) -> bool {
        self.bytes[field::RESV8A] & 0x80 != 0
    }

    /// Backward congestion notification bit.
    #[must_use]
    pub fn becn(&self) -> bool {
        self.bytes[field::RESV8A] & 0x40 != 0
    }

    /// Destination queue pair.
    #[must_use]
    #[inline]
    pub fn dest(&self) -> Qpn {
        Qpn::new(self.u24(field::DEST_QPN))
    }

    /// AckReq bit.
    #[must_use]
    #[inline]
    pub fn ack_req(&self) -> bool {
        self.bytes[field::ACK_REQ] & 0x80 != 0
    }

    /// Packet sequence number.
    #[must_use]
    #[inline]
    pub fn psn(&self) -> Psn {
        Psn::new(self.u24(field::PSN))
    }

    /// The headers after the BTH.
    #[must_use]
    #[inline]
    pub fn extension(&self) -> Extension {
        match self.row.shape {
            Shape::Bare => Extension::Bare,
            Shape::Imm => Extension::Imm(self.u32(BTH_LEN)),
            Shape::Ieth => Extension::Ieth(self.u32(BTH_LEN)),
            Shape::Reth => Extension::Reth(self.reth_at(BTH_LEN)),
            Shape::RethImm => Extension::RethImm(self.reth_at(BTH_LEN), self.u32(BTH_LEN + 16)),
            Shape::Aeth => Extension::Aeth(self.aeth_at(BTH_LEN)),
            Shape::AtomicAck => Extension::AtomicAck(self.aeth_at(BTH_LEN), self.u64(BTH_LEN + 4)),
            Shape::Atomic => Extension::Atomic(AtomicEth {
                va: self.u64(BTH_LEN),
                rkey: self.u32(BTH_LEN + 8),
                swap_add: self.u64(BTH_LEN + 12),
                compare: self.u64(BTH_LEN + 20),
            }),
            Shape::Deth => Extension::Deth(self.deth_at(BTH_LEN)),
            Shape::DethImm => Extension::DethImm(self.deth_at(BTH_LEN), self.u32(BTH_LEN + 8)),
            Shape::FethReth => Extension::FethReth(
                Feth {
                    bits: self.u32(BTH_LEN),
                },
                self.reth_at(BTH_LEN + 4),
            ),
            Shape::Cnp => Extension::Cnp,
        }
    }

    /// The RETH, if the opcode has one.
    #[must_use]
    #[inline]
    pub fn reth(&self) -> Option<Reth> {
        match self.row.shape {
            Shape::Reth | Shape::RethImm => Some(self.reth_at(BTH_LEN)),
            Shape::FethReth => Some(self.reth_at(BTH_LEN + 4)),
            _ => None,
        }
    }

    /// The AETH, if the opcode has one.
    #[must_use]
    #[inline]
    pub fn aeth(&self) -> Option<Aeth> {
        match self.row.shape {
            Shape::Aeth | Shape::AtomicAck => Some(self.aeth_at(BTH_LEN)),
            _ => None,
        }
    }

    /// The immediate data, if the opcode has it.
    #[must_use]
    #[inline]
    pub fn imm(&self) -> Option<u32> {
        match self.row.shape {
            Shape::Imm => Some(self.u32(BTH_LEN)),
            Shape::RethImm => Some(self.u32(BTH_LEN + 16)),
            Shape::DethImm => Some(self.u32(BTH_LEN + 8)),
            _ => None,
        }
    }

    /// The key to be invalidated, if the opcode has one.
    #[must_use]
    #[inline]
    pub fn ieth(&self) -> Option<u32> {
        match self.row.shape {
            Shape::Ieth => Some(self.u32(BTH_LEN)),
            _ => None,
        }
    }

    /// The whole header, decoded.
    #[must_use]
    pub fn header(&self) -> Header {
        Header {
            opcode: self.opcode(),
            solicited: self.solicited(),
            mig_req: self.mig_req(),
            pad: self.pad(),
            pkey: self.pkey(),
            fecn: self.fecn(),
            becn: self.becn(),
            dest: self.dest(),
            ack_req: self.ack_req(),
            psn: self.psn(),
            extension: self.extension(),
        }
    }

    /// BTH and extension headers as they came.
    #[must_use]
    pub fn header_bytes(&self) -> &'a [u8] {
        &self.bytes[..self.header_len]
    }

    /// The payload without its pad.
    #[must_use]
    #[inline]
    pub fn payload(&self) -> &'a [u8] {
        &self.bytes[self.header_len..self.payload_end]
    }

    /// Where in the UDP payload the payload lies: for a caller that hands buffers on in place.
    #[must_use]
    #[inline]
    pub const fn payload_range(&self) -> core::ops::Range<usize> {
        self.header_len..self.payload_end
    }

    /// All of it.
    #[must_use]
    pub const fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Everything before the ICRC.
    #[must_use]
    pub fn covered_bytes(&self) -> &'a [u8] {
        &self.bytes[..self.bytes.len() - ICRC_LEN]
    }

    /// The ICRC as the packet carries it.
    #[must_use]
    pub fn icrc(&self) -> u32 {
        self.u32(self.bytes.len() - ICRC_LEN).swap_bytes()
    }

    /// Length of the UDP payload, bytes.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "a packet is never empty")]
    pub const fn len(&self) -> usize {
        self.bytes.len()
    }

    #[inline]
    fn u24(&self, at: usize) -> u32 {
        let b = &self.bytes[at..at + 3];
        u32::from_be_bytes([0, b[0], b[1], b[2]])
    }

    #[inline]
    fn u32(&self, at: usize) -> u32 {
        let b = &self.bytes[at..at + 4];
        u32::from_be_bytes([b[0], b[1], b[2], b[3]])
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from(self.u32(at)) << 32 | u64::from(self.u32(at + 4))
    }

    fn reth_at(&self, at: usize) -> Reth {
        Reth {
            va: self.u64(at),
            rkey: self.u32(at + 8),
            len: self.u32(at + 12),
        }
    }

    #[inline]
    fn aeth_at(&self, at: usize) -> Aeth {
        Aeth {
            syndrome: Syndrome::from_byte(self.bytes[at]),
            msn: self.u24(at + 1),
        }
    }

    fn deth_at(&self, at: usize) -> Deth {
        Deth {
            qkey: self.u32(at),
            source: Qpn::new(self.u24(at + 5)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{HEADER_LEN_MAX, OPCODES};
    use super::*;
    use std::vec;

    /// A plausible extension of each shape.
    fn extension(shape: Shape) -> Extension {
        let reth = Reth {
            va: 0x0102_0304_0506_0708,
            rkey: 0x1122_3344,
            len: 77,
        };
        let aeth = Aeth {
            syndrome: Syndrome::ACK,
            msn: 0x00ab_cdef,
        };
        let deth = Deth {
            qkey: 0x8001_0000,
            source: Qpn::new(0x123456),
        };
        match shape {
            Shape::Bare => Extension::Bare,
            Shape::Imm => Extension::Imm(0xdead_beef),
            Shape::Ieth => Extension::Ieth(0x0bad_cafe),
            Shape::Reth => Extension::Reth(reth),
            Shape::RethImm => Extension::RethImm(reth, 5),
            Shape::Aeth => Extension::Aeth(aeth),
            Shape::AtomicAck => Extension::AtomicAck(aeth, u64::MAX - 1),
            Shape::Atomic => Extension::Atomic(AtomicEth {
                va: 8,
                rkey: 9,
                swap_add: 10,
                compare: 11,
            }),
            Shape::Deth => Extension::Deth(deth),
            Shape::DethImm => Extension::DethImm(deth, 6),
            Shape::FethReth => Extension::FethReth(Feth { bits: 0x11 }, reth),
            Shape::Cnp => Extension::Cnp,
        }
    }

    #[test]
    fn every_row_emits_and_decodes_to_itself_and_no_shorter() {
        for row in OPCODES {
            for flags in 0..32u8 {
                let mut header = Header::new(
                    row.opcode,
                    Qpn::new(0xabcdef),
                    Psn::new(0x00fe_dcba),
                    extension(row.shape),
                );
                header.solicited = flags & 1 != 0;
                header.mig_req = flags & 2 != 0;
                header.fecn = flags & 4 != 0;
                header.becn = flags & 8 != 0;
                header.ack_req = flags & 16 != 0;
                header.pkey = 0x7fff;
                let payload = (0..=512).find(|&n| row.payload.admits(n, 0)).unwrap();
                let mut bytes = vec![0; header.len() + payload.next_multiple_of(4) + ICRC_LEN];
                header.pad = crate::wire::pad_len(payload) as u8;
                if !row.payload.admits(payload, header.pad.into()) {
                    header.pad = 0;
                }
                let n = header.emit(&mut bytes);
                assert!(n <= HEADER_LEN_MAX);
                let packet = Packet::new_checked(&bytes).unwrap();
                assert_eq!(packet.header(), header);
                assert_eq!(packet.payload().len(), payload);
                let short = &bytes[..bytes.len() - 4];
                if !row
                    .payload
                    .admits(payload.wrapping_sub(4), header.pad.into())
                {
                    assert!(Packet::new_checked(short).is_err(), "{row:?}");
                }
            }
        }
    }

    #[test]
    fn malformed_bytes_are_named() {
        let ack = {
            let mut bytes = [0; 20];
            let aeth = Aeth {
                syndrome: Syndrome::ACK,
                msn: 1,
            };
            Header::new(
                Opcode::RcAcknowledge,
                Qpn::new(17),
                Psn::new(1),
                Extension::Aeth(aeth),
            )
            .emit(&mut bytes);
            bytes
        };
        assert!(Packet::new_checked(&ack).is_ok());
        assert_eq!(Packet::new_checked(&[]).unwrap_err(), Malformed::Short);
        assert_eq!(
            Packet::new_checked(&ack[..16]).unwrap_err(),
            Malformed::Short
        );
        let mut unknown = ack;
        unknown[0] = 0x15;
        assert_eq!(
            Packet::new_checked(&unknown).unwrap_err(),
            Malformed::UnknownOpcode(0x15)
        );
        let mut version = ack;
        version[1] |= 3;
        assert_eq!(
            Packet::new_checked(&version).unwrap_err(),
            Malformed::Version(3)
        );
        // The pad count alone must not push the payload's end before its start.
        let mut padded = ack;
        padded[1] |= 0x30;
        assert_eq!(Packet::new_checked(&padded).unwrap_err(), Malformed::Short);
        let mut long = vec![0; 24];
        long[..20].copy_from_slice(&ack);
        assert_eq!(Packet::new_checked(&long).unwrap_err(), Malformed::Payload);
        long.push(0);
        assert_eq!(
            Packet::new_checked(&long).unwrap_err(),
            Malformed::Unaligned
        );
    }

    #[test]
    fn syndromes_survive_the_wire() {
        for byte in 0..=255 {
            assert_eq!(Syndrome::from_byte(byte).byte(), byte);
        }
        assert_eq!(
            Syndrome::from_byte(0x62),
            Syndrome::Nak(crate::wire::NakCode::RemoteAccess)
        );
    }
}
