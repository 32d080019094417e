//! RoCEv2 packet formats, from the BTH to the ICRC.
//!
//! Owns the byte layout of everything after the UDP header. Two levels: [`Packet`] is a checked
//! view of received bytes (if [`Packet::new_checked`] returned `Ok`, no accessor panics), and
//! [`Header`] is the small space of headers that make sense, for emitting. Opcodes are rows of one
//! table.
//! Payload, pad and ICRC are never copied here: the hands gather header, payload, pad and ICRC.
//!
//! All fields are big endian, except the ICRC, which is little endian.
//!
//! Absent: IP and UDP headers (only the [`crate::icrc`] pseudo header knows them), RoCEv1, XRC, RD.
//! Source: IBTA volume 1, chapter 9 and annex A17; Linux `rxe_hdr.h`, `rxe_opcode.c`, `ib_pack.h`.

mod header;
mod number;
mod opcode;
mod packet;

pub use header::{
    Aeth, AtomicEth, Deth, Extension, Feth, HEADER_LEN_MAX, Header, NakCode, Reth, RnrTimer,
    Syndrome,
};
pub use number::{Mtu, Psn, Qpn};
pub use opcode::{Class, Kind, OPCODES, Opcode, PayloadRule, Position, Row, Shape};
pub use packet::{Malformed, Packet};

/// UDP destination port of RoCEv2.
pub const UDP_PORT: u16 = 4791;
/// Length of the base transport header, bytes.
pub const BTH_LEN: usize = 12;
/// Length of the invariant CRC that ends every packet, bytes.
pub const ICRC_LEN: usize = 4;
/// The P_Key that every soft-RoCE device has and sends (full member of the default partition).
pub const PKEY_DEFAULT: u16 = 0xffff;
/// The longest DMA length a RETH may carry, bytes (IBTA C9-94).
pub const MESSAGE_LEN_MAX: u32 = 1 << 31;

/// Pad bytes that bring `payload_len` to a multiple of four: 0 to 3.
#[must_use]
pub const fn pad_len(payload_len: usize) -> usize {
    payload_len.wrapping_neg() & 3
}
