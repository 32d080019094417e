//! The opcodes: one list, expanded into the enum, its names and the table.
//!
//! Invariant: `OPCODES` is sorted by code, and `Opcode::from_code` knows exactly its rows.
//! Source: Linux `rxe_opcode.c` and `ib_pack.h`; the CNP from annex A17.

use super::BTH_LEN;

/// Transport class: bits 7 to 5 of an opcode. A packet's class must match its queue pair's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Reliable connection.
    Rc,
    /// Unreliable connection.
    Uc,
    /// Unreliable datagram.
    Ud,
    /// Congestion notification; outside any PSN space.
    Cnp,
}

/// What a packet does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Message into a posted receive.
    Send,
    /// Placement at an address the sender names.
    Write,
    /// Request for bytes at an address the sender names.
    ReadRequest,
    /// Those bytes.
    ReadResponse,
    /// ACK, NAK or RNR NAK; its AETH tells which.
    Acknowledge,
    /// Answer to an atomic.
    AtomicAcknowledge,
    /// 64-bit compare and swap.
    CompareSwap,
    /// 64-bit fetch and add.
    FetchAdd,
    /// FLUSH (IBTA 1.5).
    Flush,
    /// ATOMIC WRITE (IBTA 1.5).
    AtomicWrite,
    /// Congestion notification.
    Cnp,
}

/// Where in its message a packet stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Position {
    /// Starts a message of several packets.
    First,
    /// Neither first nor last.
    Middle,
    /// Ends a message of several packets.
    Last,
    /// A whole message.
    Only,
}

impl Position {
    /// First or Only.
    #[must_use]
    pub const fn starts(self) -> bool {
        matches!(self, Self::First | Self::Only)
    }

    /// Last or Only.
    #[must_use]
    pub const fn ends(self) -> bool {
        matches!(self, Self::Last | Self::Only)
    }
}

/// The chain of extension headers after the BTH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// None.
    Bare,
    /// Immediate data.
    Imm,
    /// Invalidate.
    Ieth,
    /// RDMA.
    Reth,
    /// RDMA, then immediate data.
    RethImm,
    /// Acknowledge.
    Aeth,
    /// Acknowledge, then the original value of the atomic.
    AtomicAck,
    /// Atomic.
    Atomic,
    /// Datagram.
    Deth,
    /// Datagram, then immediate data.
    DethImm,
    /// Flush, then RDMA.
    FethReth,
    /// The sixteen reserved bytes of a CNP.
    Cnp,
}

impl Shape {
    /// Length of BTH and chain, bytes.
    #[must_use]
    #[inline]
    pub const fn header_len(self) -> usize {
        BTH_LEN
            + match self {
                Self::Bare => 0,
                Self::Imm | Self::Ieth | Self::Aeth => 4,
                Self::Deth => 8,
                Self::AtomicAck | Self::DethImm => 12,
                Self::Reth | Self::Cnp => 16,
                Self::RethImm | Self::FethReth => 20,
                Self::Atomic => 28,
            }
    }
}

/// How much payload a packet may carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PayloadRule {
    /// Nothing.
    None,
    /// Exactly the path MTU, without pad.
    Full,
    /// 1 byte to the path MTU.
    Tail,
    /// 0 bytes to the path MTU.
    Any,
    /// Eight bytes.
    Eight,
}

impl PayloadRule {
    /// Whether `len` bytes with `pad` pad bytes can be right for some path MTU.
    #[must_use]
    #[inline]
    pub const fn admits(self, len: usize, pad: usize) -> bool {
        match self {
            Self::None => len == 0 && pad == 0,
            Self::Full => matches!(len, 256 | 512 | 1024 | 2048 | 4096) && pad == 0,
            Self::Tail => len >= 1 && len <= 4096,
            Self::Any => len <= 4096,
            Self::Eight => len == 8 && pad == 0,
        }
    }
}

/// One opcode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The opcode.
    pub opcode: Opcode,
    /// Its name.
    pub name: &'static str,
    /// Transport class.
    pub class: Class,
    /// What it does.
    pub kind: Kind,
    /// Where in its message it stands.
    pub position: Position,
    /// Which headers follow the BTH.
    pub shape: Shape,
    /// How much payload follows them.
    pub payload: PayloadRule,
}

macro_rules! opcodes {
    ($($code:literal $name:ident $class:ident $kind:ident $position:ident $shape:ident
       $rule:ident)*) => {
        /// Every opcode that this crate can name.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        #[allow(missing_docs, reason = "the names are the IBTA's; each row's fields say the rest")]
        pub enum Opcode { $($name = $code),* }

        /// All opcodes, ascending.
        pub const OPCODES: &[Row] = &[$(Row {
            opcode: Opcode::$name,
            name: stringify!($name),
            class: Class::$class,
            kind: Kind::$kind,
            position: Position::$position,
            shape: Shape::$shape,
            payload: PayloadRule::$rule,
        }),*];
    };
}

opcodes! {
    0x00 RcSendFirst          Rc Send              First  Bare      Full
    0x01 RcSendMiddle         Rc Send              Middle Bare      Full
    0x02 RcSendLast           Rc Send              Last   Bare      Tail
    0x03 RcSendLastImm        Rc Send              Last   Imm       Tail
    0x04 RcSendOnly           Rc Send              Only   Bare      Any
    0x05 RcSendOnlyImm        Rc Send              Only   Imm       Any
    0x06 RcWriteFirst         Rc Write             First  Reth      Full
    0x07 RcWriteMiddle        Rc Write             Middle Bare      Full
    0x08 RcWriteLast          Rc Write             Last   Bare      Tail
    0x09 RcWriteLastImm       Rc Write             Last   Imm       Tail
    0x0a RcWriteOnly          Rc Write             Only   Reth      Any
    0x0b RcWriteOnlyImm       Rc Write             Only   RethImm   Any
    0x0c RcReadRequest        Rc ReadRequest       Only   Reth      None
    0x0d RcReadResponseFirst  Rc ReadResponse      First  Aeth      Full
    0x0e RcReadResponseMiddle Rc ReadResponse      Middle Bare      Full
    0x0f RcReadResponseLast   Rc ReadResponse      Last   Aeth      Tail
    0x10 RcReadResponseOnly   Rc ReadResponse      Only   Aeth      Any
    0x11 RcAcknowledge        Rc Acknowledge       Only   Aeth      None
    0x12 RcAtomicAcknowledge  Rc AtomicAcknowledge Only   AtomicAck None
    0x13 RcCompareSwap        Rc CompareSwap       Only   Atomic    None
    0x14 RcFetchAdd           Rc FetchAdd          Only   Atomic    None
    0x16 RcSendLastInvalidate Rc Send              Last   Ieth      Tail
    0x17 RcSendOnlyInvalidate Rc Send              Only   Ieth      Any
    0x1c RcFlush              Rc Flush             Only   FethReth  None
    0x1d RcAtomicWrite        Rc AtomicWrite       Only   Reth      Eight
    0x20 UcSendFirst          Uc Send              First  Bare      Full
    0x21 UcSendMiddle         Uc Send              Middle Bare      Full
    0x22 UcSendLast           Uc Send              Last   Bare      Tail
    0x23 UcSendLastImm        Uc Send              Last   Imm       Tail
    0x24 UcSendOnly           Uc Send              Only   Bare      Any
    0x25 UcSendOnlyImm        Uc Send              Only   Imm       Any
    0x26 UcWriteFirst         Uc Write             First  Reth      Full
    0x27 UcWriteMiddle        Uc Write             Middle Bare      Full
    0x28 UcWriteLast          Uc Write             Last   Bare      Tail
    0x29 UcWriteLastImm       Uc Write             Last   Imm       Tail
    0x2a UcWriteOnly          Uc Write             Only   Reth      Any
    0x2b UcWriteOnlyImm       Uc Write             Only   RethImm   Any
    0x64 UdSendOnly           Ud Send              Only   Deth      Any
    0x65 UdSendOnlyImm        Ud Send              Only   DethImm   Any
    0x81 Cnp                  Cnp Cnp              Only   Cnp       None
}

/// Row number plus one of each code; 0 where there is none.
const INDEX: [u8; 256] = {
    let mut index = [0; 256];
    let mut i = 0;
    while i < OPCODES.len() {
        index[OPCODES[i].opcode as usize] = i as u8 + 1;
        i += 1;
    }
    index
};

impl Opcode {
    /// The opcode with this code, if there is one.
    #[must_use]
    #[inline]
    pub const fn from_code(code: u8) -> Option<Self> {
        match INDEX[code as usize] {
            0 => None,
            row => Some(OPCODES[row as usize - 1].opcode),
        }
    }

    /// The byte on the wire.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// Everything the table says about it.
    #[must_use]
    #[inline]
    pub const fn row(self) -> &'static Row {
        // Every variant has a row: both come from one list.
        &OPCODES[INDEX[self as usize] as usize - 1]
    }

    /// Whether the packet answers a request (and so goes to the requester half).
    #[must_use]
    #[inline]
    pub const fn is_response(self) -> bool {
        self.row().is_response()
    }
}

impl Row {
    /// Whether such a packet answers a request.
    #[must_use]
    #[inline]
    pub const fn is_response(&self) -> bool {
        matches!(
            self.kind,
            Kind::ReadResponse | Kind::Acknowledge | Kind::AtomicAcknowledge
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_sorted_and_found_by_code() {
        assert!(
            OPCODES
                .windows(2)
                .all(|w| w[0].opcode.code() < w[1].opcode.code())
        );
        for code in 0..=255 {
            match Opcode::from_code(code) {
                Some(opcode) => {
                    assert_eq!(opcode.code(), code);
                    assert_eq!(opcode.row().opcode, opcode);
                }
                None => assert!(OPCODES.iter().all(|r| r.opcode.code() != code)),
            }
        }
        assert_eq!(OPCODES.len(), 40);
    }

    #[test]
    fn classes_follow_the_code_bits() {
        for row in OPCODES {
            let class = match row.opcode.code() >> 5 {
                0 => Class::Rc,
                1 => Class::Uc,
                3 => Class::Ud,
                _ => Class::Cnp,
            };
            assert_eq!(row.class, class, "{}", row.name);
        }
    }

    #[test]
    fn header_lengths_are_the_published_ones() {
        for (opcode, len) in [
            (Opcode::RcSendFirst, 12),
            (Opcode::RcWriteOnly, 28),
            (Opcode::RcWriteOnlyImm, 32),
            (Opcode::RcAcknowledge, 16),
            (Opcode::RcAtomicAcknowledge, 24),
            (Opcode::RcFetchAdd, 40),
            (Opcode::RcFlush, 32),
            (Opcode::UdSendOnly, 20),
            (Opcode::UdSendOnlyImm, 24),
            (Opcode::Cnp, 28),
        ] {
            assert_eq!(opcode.row().shape.header_len(), len, "{opcode:?}");
        }
    }
}
