//! The invariant CRC: CRC-32 (IEEE 802.3) over everything that the network may not change.
//!
//! Owns the pseudo header (eight 0xff bytes, IP and UDP header with the variable fields masked) and
//! the masking of BTH byte 4; the rest of the packet is fed as slices, so that a sender needs no
//! contiguous copy. The caller knows the IP header, or all of it except the IPv4 identification:
//! a plain UDP socket never shows that field. Then [`check_unknown_identification`] solves for it.
//! The CRC is linear, so the difference between the ICRC computed with a guess and the one received
//! is `(identification ^ guess) * x^(8n+32) mod P`, n being the number of bytes between field
//! and ICRC. Multiplying by the inverse power gives a polynomial that has degree below 16 exactly
//! when some identification explains the packet: one 32-step multiplication per packet, none when
//! the guess is right, as it mostly is of our own ends.
//!
//! In that mode a random error passes with probability 2^-16, no single-bit error passes but those
//! of the identification itself, and the caller narrows the identifications it believes
//! ([`GSO_IDENTIFICATION_MAX`] for our own ends).
//!
//! Absent: IP options (never sent on RoCEv2), and the link-layer CRCs.
//! Source: IBTA annex A17; Linux `rxe_icrc.c`.

mod fold;

use core::net::{Ipv4Addr, Ipv6Addr};

use crate::wire::{BTH_LEN, ICRC_LEN, Packet, UDP_PORT};

/// Identifications that one of our own ends sends: UDP segmentation offload numbers the at most
/// 128 segments of a call from 0.
pub const GSO_IDENTIFICATION_MAX: u16 = 127;

/// CRC-32 of eight 0xff bytes, which stand for the local route header that RoCEv2 does not have.
const SEED: u32 = 0x2144_df1c;
const IPV4_LEN: usize = 20;
const IPV6_LEN: usize = 40;
const UDP_LEN: usize = 8;
/// Bytes from the BTH on that are summed up in one piece with the headers before them: pieces cost more than
/// bytes, and one of them is masked anyway.
const SHORT_MAX: usize = 128;
const _: () = assert!(SHORT_MAX >= BTH_LEN);
/// That piece at most.
const HEAD_MAX: usize = IPV6_LEN + UDP_LEN + SHORT_MAX;
/// Offset, in the BTH, of the byte with FECN and BECN, which switches may change.
const RESV8A: usize = 4;

/// The parts of IP and UDP header that the ICRC covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Addresses, and for IPv4 what else of the header is covered.
    pub ip: Ip,
    /// UDP source port.
    pub source_port: u16,
    /// UDP destination port.
    pub target_port: u16,
}

/// The network layer of a [`Flow`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ip {
    /// IPv4 without options.
    V4 {
        /// Source address.
        source: Ipv4Addr,
        /// Destination address.
        target: Ipv4Addr,
        /// Identification field.
        identification: u16,
        /// Flags and fragment offset as on the wire: [`DONT_FRAGMENT`] for all known senders.
        flags: u16,
    },
    /// IPv6.
    V6 {
        /// Source address.
        source: Ipv6Addr,
        /// Destination address.
        target: Ipv6Addr,
    },
}

/// The IPv4 flags field with "don't fragment" set.
pub const DONT_FRAGMENT: u16 = 0x4000;

impl Flow {
    /// An IPv4 flow to the RoCEv2 port with identification 0 and "don't fragment", as unconnected
    /// sockets with `IP_MTU_DISCOVER=DO` send.
    #[must_use]
    pub const fn v4(source: Ipv4Addr, target: Ipv4Addr, source_port: u16) -> Self {
        let ip = Ip::V4 {
            source,
            target,
            identification: 0,
            flags: DONT_FRAGMENT,
        };
        Self {
            ip,
            source_port,
            target_port: UDP_PORT,
        }
    }

    /// An IPv6 flow to the RoCEv2 port.
    #[must_use]
    pub const fn v6(source: Ipv6Addr, target: Ipv6Addr, source_port: u16) -> Self {
        Self {
            ip: Ip::V6 { source, target },
            source_port,
            target_port: UDP_PORT,
        }
    }

    /// The same flow with another IPv4 identification (segment `i` of a UDP segmentation offload
    /// has identification `i`); no change for IPv6.
    #[must_use]
    pub const fn with_identification(mut self, value: u16) -> Self {
        if let Ip::V4 { identification, .. } = &mut self.ip {
            *identification = value;
        }
        self
    }

    /// Writes the masked IP and UDP headers, for a UDP payload of `udp_payload` bytes, and returns their
    /// length.
    #[inline]
    fn pseudo_header(&self, udp_payload: usize, out: &mut [u8; HEAD_MAX]) -> usize {
        // Both lengths fit: no caller passes more than a datagram holds.
        let udp_len = (udp_payload + UDP_LEN) as u16;
        let ip_len = match self.ip {
            Ip::V4 {
                source,
                target,
                identification,
                flags,
            } => {
                out[0] = 0x45;
                out[1] = 0xff; // traffic class: masked
                out[2..4].copy_from_slice(&(udp_len + IPV4_LEN as u16).to_be_bytes());
                out[4..6].copy_from_slice(&identification.to_be_bytes());
                out[6..8].copy_from_slice(&flags.to_be_bytes());
                out[8] = 0xff; // time to live: masked
                out[9] = 17;
                out[10..12].fill(0xff); // header checksum: masked
                out[12..16].copy_from_slice(&source.octets());
                out[16..20].copy_from_slice(&target.octets());
                IPV4_LEN
            }
            Ip::V6 { source, target } => {
                out[0] = 0x6f; // version; traffic class and flow label: masked
                out[1..4].fill(0xff);
                out[4..6].copy_from_slice(&udp_len.to_be_bytes());
                out[6] = 17;
                out[7] = 0xff; // hop limit: masked
                out[8..24].copy_from_slice(&source.octets());
                out[24..40].copy_from_slice(&target.octets());
                IPV6_LEN
            }
        };
        out[ip_len..ip_len + 2].copy_from_slice(&self.source_port.to_be_bytes());
        out[ip_len + 2..ip_len + 4].copy_from_slice(&self.target_port.to_be_bytes());
        out[ip_len + 4..ip_len + 6].copy_from_slice(&udp_len.to_be_bytes());
        out[ip_len + 6..ip_len + 8].fill(0xff); // UDP checksum: masked
        ip_len + UDP_LEN
    }
}

/// An ICRC in the making, over slices in wire order.
#[derive(Clone, Debug)]
pub struct Icrc {
    hasher: crc32fast::Hasher,
}

impl Icrc {
    /// Start with pseudo header and transport header. `header` is BTH and extension headers as
    /// emitted; `udp_payload` the length from BTH to ICRC, bytes.
    ///
    /// # Panics
    ///
    /// If `header` is shorter than five bytes or `udp_payload` exceeds a datagram: caller's bugs.
    #[must_use]
    pub fn begin(flow: &Flow, header: &[u8], udp_payload: usize) -> Self {
        assert!(header.len() > RESV8A);
        assert!(udp_payload <= usize::from(u16::MAX) - UDP_LEN - IPV4_LEN);
        let mut head = [0; HEAD_MAX];
        let len = flow.pseudo_header(udp_payload, &mut head);
        let now = header.len().min(SHORT_MAX);
        head[len..len + now].copy_from_slice(&header[..now]);
        head[len + RESV8A] = 0xff;
        let mut icrc = Self {
            hasher: crc32fast::Hasher::new_with_initial(SEED),
        };
        icrc.update(&head[..len + now]);
        icrc.update(&header[now..]);
        icrc
    }

    /// Add a piece of payload.
    #[inline]
    pub fn update(&mut self, payload: &[u8]) {
        if payload.len() >= fold::LEN_MIN && fold::is_better() {
            fold::update(&mut self.hasher, payload);
        } else if !payload.is_empty() {
            self.hasher.update(payload);
        }
    }

    /// Add `pad` zero bytes (at most 3) and return pad and ICRC as they go on the wire, and their
    /// length.
    ///
    /// # Panics
    ///
    /// If `pad` exceeds 3: a bug of the caller.
    #[must_use]
    pub fn finish(mut self, pad: usize) -> ([u8; 3 + ICRC_LEN], usize) {
        let mut tail = [0; 3 + ICRC_LEN];
        assert!(pad <= 3);
        self.update(&tail[..pad]);
        tail[pad..pad + ICRC_LEN].copy_from_slice(&self.hasher.finalize().to_le_bytes());
        (tail, pad + ICRC_LEN)
    }
}

/// The ICRC that `packet` should carry if it came over `flow`.
#[must_use]
pub fn expected(flow: &Flow, packet: &Packet<'_>) -> u32 {
    let whole = Icrc::begin(flow, packet.covered_bytes(), packet.len());
    whole.hasher.finalize()
}

/// Whether the packet's ICRC is right, the whole IP header being known.
#[must_use]
pub fn check(flow: &Flow, packet: &Packet<'_>) -> bool {
    expected(flow, packet) == packet.icrc()
}

/// The IPv4 identification that makes the packet's ICRC right, or `None` if none does (or the
/// packet is longer than any this crate accepts).
///
/// For an IPv6 flow there is nothing to solve: `Some(0)` if the ICRC is right. The identification
/// in `flow` is a guess: if it is right, nothing has to be solved either. The caller must still
/// decide whether to believe the answer: see the head of this module.
#[must_use]
pub fn check_unknown_identification(flow: &Flow, packet: &Packet<'_>) -> Option<u16> {
    let difference = expected(flow, packet) ^ packet.icrc();
    let guess = match flow.ip {
        Ip::V4 { identification, .. } => identification,
        Ip::V6 { .. } => return (difference == 0).then_some(0),
    };
    if difference == 0 {
        return Some(guess);
    }
    let power = *INVERSE_POWERS.get(packet.len() / 4)?;
    let solution = multiply(difference, power);
    // Reflected: bit 31 is x^0. Degree below 16 means that the low half is empty.
    (solution & 0xffff == 0).then(|| guess ^ ((solution >> 16) as u16).swap_bytes())
}

/// The reflected generator polynomial without its x^32.
const POLYNOMIAL: u32 = 0xedb8_8320;
/// Longest UDP payload for which identifications are solved: an atomic-sized header, 4096 bytes of
/// payload, the ICRC.
const UDP_PAYLOAD_MAX: usize = 40 + 4096 + ICRC_LEN;
/// Bytes from the end of the identification field to the ICRC, for an empty UDP payload:
/// `IPV4_LEN + UDP_LEN - 6 - ICRC_LEN`.
const AFTER_IDENTIFICATION: usize = 18;

/// `x^-(8 (18 + 4i) + 32) mod P` for a UDP payload of `4 i` bytes.
static INVERSE_POWERS: [u32; UDP_PAYLOAD_MAX / 4 + 1] = {
    let mut powers = [0; UDP_PAYLOAD_MAX / 4 + 1];
    let mut power = 1 << 31; // x^0
    let mut steps = 8 * AFTER_IDENTIFICATION + 32;
    let mut i = 0;
    while i < powers.len() {
        while steps > 0 {
            power = divide_by_x(power);
            steps -= 1;
        }
        powers[i] = power;
        steps = 32;
        i += 1;
    }
    powers
};

/// `a * x mod P`, reflected.
const fn multiply_by_x(a: u32) -> u32 {
    (a >> 1) ^ (POLYNOMIAL & (a & 1).wrapping_neg())
}

/// `a / x mod P`, reflected: P has a constant term, so x is invertible.
const fn divide_by_x(a: u32) -> u32 {
    let carry = a >> 31;
    ((a ^ (POLYNOMIAL & carry.wrapping_neg())) << 1) | carry
}

/// `a * b mod P`, reflected.
const fn multiply(mut a: u32, b: u32) -> u32 {
    let mut product = 0;
    let mut bit = 0;
    while bit < 32 {
        // Bit 31 - k of b is the coefficient of x^k.
        product ^= a & (b >> (31 - bit) & 1).wrapping_neg();
        a = multiply_by_x(a);
        bit += 1;
    }
    product
}

#[cfg(test)]
mod tests;
