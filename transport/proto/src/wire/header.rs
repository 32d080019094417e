//! Headers to emit, and what a decoded packet is turned into.
//!
//! Invariant: a [`Header`]'s extension has the shape of its opcode; [`Header::emit`] asserts it.
//! Reserved bits are emitted as zero and ignored when read, as Linux rxe does.

use super::{Opcode, Psn, Qpn, Shape};

/// The longest BTH and extension chain (an atomic request), bytes.
pub const HEADER_LEN_MAX: usize = 40;
/// What follows the BTH of a CNP: reserved bytes.
const CNP_LEN: usize = 16;

/// Field offsets from the start of the BTH.
pub(super) mod field {
    pub const OPCODE: usize = 0;
    /// Solicited, MigReq, pad count, version.
    pub const FLAGS: usize = 1;
    pub const PKEY: usize = 2;
    /// FECN, BECN, reserved: the byte that the ICRC does not cover.
    pub const RESV8A: usize = 4;
    pub const DEST_QPN: usize = 5;
    /// AckReq, reserved.
    pub const ACK_REQ: usize = 8;
    pub const PSN: usize = 9;
    pub const EXTENSION: usize = crate::wire::BTH_LEN;
}

/// RDMA extended transport header: where a WRITE or READ works in the peer's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reth {
    /// Virtual address.
    pub va: u64,
    /// Remote key.
    pub rkey: u32,
    /// Length of the whole message, bytes; at most [`super::MESSAGE_LEN_MAX`] in a valid request.
    pub len: u32,
}

/// Atomic extended transport header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AtomicEth {
    /// Virtual address; must be a multiple of 8.
    pub va: u64,
    /// Remote key.
    pub rkey: u32,
    /// The value to swap in, or the addend.
    pub swap_add: u64,
    /// The value to compare with; 0 for fetch and add.
    pub compare: u64,
}

/// Acknowledge extended transport header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Aeth {
    /// ACK, RNR NAK or NAK.
    pub syndrome: Syndrome,
    /// Message sequence number: messages completed by the responder, 24 bits.
    pub msn: u32,
}

/// Datagram extended transport header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deth {
    /// Queue key; must equal the receiver's.
    pub qkey: u32,
    /// The sender's queue pair.
    pub source: Qpn,
}

/// Flush extended transport header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feth {
    /// Placement type (bits 3-0) and selectivity (bits 5-4), as on the wire.
    pub bits: u32,
}

impl Feth {
    const GLOBAL: u32 = 1;
    const PERSISTENT: u32 = 1 << 1;
    const WHOLE_REGION: u32 = 1 << 4;
    const KNOWN: u32 = Self::GLOBAL | Self::PERSISTENT | Self::WHOLE_REGION;

    /// Visible to everybody, kept over a power loss, for the whole region and not a range.
    #[must_use]
    #[inline]
    pub const fn new(global: bool, persistent: bool, whole_region: bool) -> Self {
        let mut bits = 0;
        if global {
            bits |= Self::GLOBAL;
        }
        if persistent {
            bits |= Self::PERSISTENT;
        }
        if whole_region {
            bits |= Self::WHOLE_REGION;
        }
        Self { bits }
    }

    /// Whether it asks for something, and for nothing that has no meaning yet.
    #[must_use]
    pub const fn is_valid(self) -> bool {
        self.bits & (Self::GLOBAL | Self::PERSISTENT) != 0 && self.bits & 0x3f & !Self::KNOWN == 0
    }

    /// Asks for visibility.
    #[must_use]
    pub const fn global(self) -> bool {
        self.bits & Self::GLOBAL != 0
    }

    /// Asks for persistence.
    #[must_use]
    pub const fn persistent(self) -> bool {
        self.bits & Self::PERSISTENT != 0
    }

    /// Means the whole region of the key.
    #[must_use]
    pub const fn whole_region(self) -> bool {
        self.bits & Self::WHOLE_REGION != 0
    }
}

/// A receiver-not-ready timer code: 5 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RnrTimer(u8);

impl RnrTimer {
    /// Waiting times by code, units of 10 microseconds.
    const TENS_OF_MICROS: [u32; 32] = [
        65_536, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1_024,
        1_536, 2_048, 3_072, 4_096, 6_144, 8_192, 12_288, 16_384, 24_576, 32_768, 49_152,
    ];

    /// The low five bits of `code`.
    #[must_use]
    #[inline]
    pub const fn new(code: u8) -> Self {
        Self(code & 0x1f)
    }

    /// The code, below 32.
    #[must_use]
    pub const fn code(self) -> u8 {
        self.0
    }

    /// The least time the requester must wait.
    #[must_use]
    pub const fn wait(self) -> crate::time::Nanos {
        crate::time::Nanos::from_micros(Self::TENS_OF_MICROS[self.0 as usize] as u64 * 10)
    }
}

/// Why a responder refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum NakCode {
    /// A gap in the PSNs; the NAK's PSN is the one expected.
    SequenceError = 0,
    /// A request that breaks the protocol.
    InvalidRequest = 1,
    /// Key, range or rights.
    RemoteAccess = 2,
    /// The responder failed for reasons of its own.
    RemoteOperational = 3,
}

/// The syndrome byte of an AETH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Syndrome {
    /// Positive; carries an end-to-end credit code, 0x1f where credits are not used.
    Ack {
        /// Credit code, 5 bits.
        credit: u8,
    },
    /// No receive was posted: try again after the timer.
    Rnr(RnrTimer),
    /// Refusal.
    Nak(NakCode),
    /// A value this crate does not know; handled as if the packet had not come.
    Unknown(u8),
}

impl Syndrome {
    /// The plain ACK that soft-RoCE devices send.
    pub const ACK: Self = Self::Ack { credit: 0x1f };

    /// Read from the wire.
    #[must_use]
    pub const fn from_byte(byte: u8) -> Self {
        match (byte >> 5, byte & 0x1f) {
            (0, credit) => Self::Ack { credit },
            (1, code) => Self::Rnr(RnrTimer::new(code)),
            (3, 0) => Self::Nak(NakCode::SequenceError),
            (3, 1) => Self::Nak(NakCode::InvalidRequest),
            (3, 2) => Self::Nak(NakCode::RemoteAccess),
            (3, 3) => Self::Nak(NakCode::RemoteOperational),
            _ => Self::Unknown(byte),
        }
    }

    /// The byte on the wire.
    #[must_use]
    pub const fn byte(self) -> u8 {
        match self {
            Self::Ack { credit } => credit & 0x1f,
            Self::Rnr(timer) => 0x20 | timer.code(),
            Self::Nak(code) => 0x60 | code as u8,
            Self::Unknown(byte) => byte,
        }
    }
}

/// What follows the BTH. Each variant is one [`Shape`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each variant is the chain its Shape documents")]
pub enum Extension {
    Bare,
    Imm(u32),
    Ieth(u32),
    Reth(Reth),
    RethImm(Reth, u32),
    Aeth(Aeth),
    AtomicAck(Aeth, u64),
    Atomic(AtomicEth),
    Deth(Deth),
    DethImm(Deth, u32),
    FethReth(Feth, Reth),
    Cnp,
}

impl Extension {
    /// Which chain this is.
    #[must_use]
    pub const fn shape(&self) -> Shape {
        match self {
            Self::Bare => Shape::Bare,
            Self::Imm(_) => Shape::Imm,
            Self::Ieth(_) => Shape::Ieth,
            Self::Reth(_) => Shape::Reth,
            Self::RethImm(..) => Shape::RethImm,
            Self::Aeth(_) => Shape::Aeth,
            Self::AtomicAck(..) => Shape::AtomicAck,
            Self::Atomic(_) => Shape::Atomic,
            Self::Deth(_) => Shape::Deth,
            Self::DethImm(..) => Shape::DethImm,
            Self::FethReth(..) => Shape::FethReth,
            Self::Cnp => Shape::Cnp,
        }
    }
}

/// A BTH and its extension headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Opcode.
    pub opcode: Opcode,
    /// Solicited event.
    pub solicited: bool,
    /// MigReq; soft-RoCE devices send false, hardware true, nobody minds.
    pub mig_req: bool,
    /// Pad bytes after the payload, 0 to 3: [`super::pad_len`] of its length.
    pub pad: u8,
    /// Partition key.
    pub pkey: u16,
    /// Forward congestion notification.
    pub fecn: bool,
    /// Backward congestion notification; set in a CNP.
    pub becn: bool,
    /// Destination queue pair.
    pub dest: Qpn,
    /// The responder shall acknowledge this packet.
    pub ack_req: bool,
    /// Packet sequence number.
    pub psn: Psn,
    /// The headers after the BTH.
    pub extension: Extension,
}

impl Header {
    /// A header with the default P_Key, no pad and all flags clear.
    #[must_use]
    #[inline]
    pub const fn new(opcode: Opcode, dest: Qpn, psn: Psn, extension: Extension) -> Self {
        Self {
            opcode,
            solicited: false,
            mig_req: false,
            pad: 0,
            pkey: super::PKEY_DEFAULT,
            fecn: false,
            becn: false,
            dest,
            ack_req: false,
            psn,
            extension,
        }
    }

    /// Length on the wire, bytes: a multiple of four, at most [`HEADER_LEN_MAX`].
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "a header is never empty")]
    pub const fn len(&self) -> usize {
        self.opcode.row().shape.header_len()
    }

    /// Write the header to the start of `out` and return its length.
    ///
    /// # Panics
    ///
    /// If the extension does not have the opcode's shape, `pad` exceeds 3, or `out` is shorter than
    /// [`Self::len`]: bugs of the caller.
    pub fn emit(&self, out: &mut [u8]) -> usize {
        let mut bytes = [0; HEADER_LEN_MAX];
        let len = self.write(&mut bytes);
        out[..len].copy_from_slice(&bytes[..len]);
        len
    }

    /// The same where any header has room: what is written at fixed places needs no check. Behind the
    /// header `out` stays as it was.
    ///
    /// # Panics
    ///
    /// If the extension does not have the opcode's shape or `pad` exceeds 3.
    #[inline(always)] // most fields are constants where it is called
    pub fn write(&self, out: &mut [u8; HEADER_LEN_MAX]) -> usize {
        let shape = self.opcode.row().shape;
        assert!(self.extension.shape() as u8 == shape as u8);
        assert!(self.pad <= 3);
        let flags = u8::from(self.solicited) << 7 | u8::from(self.mig_req) << 6 | self.pad << 4;
        let congestion = u8::from(self.fecn) << 7 | u8::from(self.becn) << 6;
        let [opcode, flags, congestion] = [self.opcode.code(), flags, congestion].map(u32::from);
        let words = [
            opcode << 24 | flags << 16 | u32::from(self.pkey),
            congestion << 24 | self.dest.value(),
            u32::from(self.ack_req) << 31 | self.psn.value(),
        ];
        put32(out, field::OPCODE, words[0]);
        put32(out, field::RESV8A, words[1]);
        put32(out, field::ACK_REQ, words[2]);
        self.put_extension(out);
        shape.header_len()
    }

    #[inline(always)] // as `write`
    fn put_extension(&self, out: &mut Bytes) {
        const AT: usize = field::EXTENSION;
        match self.extension {
            Extension::Bare => {}
            Extension::Cnp => out[AT..AT + CNP_LEN].fill(0),
            Extension::Imm(word) | Extension::Ieth(word) => put32(out, AT, word),
            Extension::Reth(reth) => put_reth(out, AT, reth),
            Extension::RethImm(reth, imm) => {
                put_reth(out, AT, reth);
                put32(out, AT + 16, imm);
            }
            Extension::Aeth(aeth) => put_aeth(out, aeth),
            Extension::AtomicAck(aeth, original) => {
                put_aeth(out, aeth);
                put64(out, AT + 4, original);
            }
            Extension::Atomic(atomic) => {
                put64(out, AT, atomic.va);
                put32(out, AT + 8, atomic.rkey);
                put64(out, AT + 12, atomic.swap_add);
                put64(out, AT + 20, atomic.compare);
            }
            Extension::Deth(deth) => put_deth(out, deth),
            Extension::DethImm(deth, imm) => {
                put_deth(out, deth);
                put32(out, AT + 8, imm);
            }
            Extension::FethReth(feth, reth) => {
                put32(out, AT, feth.bits);
                put_reth(out, AT + 4, reth);
            }
        }
    }
}

type Bytes = [u8; HEADER_LEN_MAX];

#[inline]
fn put32(out: &mut Bytes, at: usize, value: u32) {
    out[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

#[inline]
fn put64(out: &mut Bytes, at: usize, value: u64) {
    out[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

#[inline]
fn put_reth(out: &mut Bytes, at: usize, reth: Reth) {
    put64(out, at, reth.va);
    put32(out, at + 8, reth.rkey);
    put32(out, at + 12, reth.len);
}

#[inline]
fn put_aeth(out: &mut Bytes, aeth: Aeth) {
    let syndrome = u32::from(aeth.syndrome.byte());
    put32(
        out,
        field::EXTENSION,
        syndrome << 24 | aeth.msn & 0x00ff_ffff,
    );
}

#[inline]
fn put_deth(out: &mut Bytes, deth: Deth) {
    put32(out, field::EXTENSION, deth.qkey);
    put32(out, field::EXTENSION + 4, deth.source.value());
}
