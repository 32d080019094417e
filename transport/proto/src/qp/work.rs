//! Work requests and completions. Names and meanings are those of ibverbs.

use super::memory::{Access, Lkey, Remote, Rkey, SgList};
use super::types::{QpKind, QpState};
use crate::wire::Qpn;

/// The caller's name for a work request, returned in its completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct WrId(pub u64);

/// What a send work request does. Immediate data is a number here, big endian on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendOp {
    /// Message into the peer's next receive.
    Send,
    /// The same with 32 bits of immediate data.
    SendImm(u32),
    /// The same, and the peer's key becomes invalid.
    SendInvalidate(Rkey),
    /// Placement in the peer's memory.
    Write(Remote),
    /// Placement, then immediate data that consumes a receive.
    WriteImm(Remote, u32),
    /// Bytes from the peer's memory.
    Read(Remote),
    /// If the 64-bit word equals `compare`, it becomes `swap`; its old value is returned into the
    /// request's memory (8 bytes, native order).
    CompareSwap {
        /// The word; its address must be a multiple of 8.
        remote: Remote,
        /// Compared with the word.
        compare: u64,
        /// Stored if equal.
        swap: u64,
    },
    /// The word grows by `add`, wrapping; its old value is returned as above.
    FetchAdd {
        /// The word; its address must be a multiple of 8.
        remote: Remote,
        /// The addend.
        add: u64,
    },
    /// The eight bytes of the request replace the word at once; its address must be a multiple
    /// of 8. Finished when they are there, as a READ is.
    AtomicWrite(Remote),
    /// What was written before is visible, or persistent, when this has finished.
    Flush(Flush),
    /// A key of ours becomes invalid. Nothing is sent.
    LocalInvalidate(Rkey),
    /// A memory window gets a place and a key. Nothing is sent.
    BindWindow(Bind),
}

impl SendOp {
    /// Whether the request is carried out at this end, without a packet.
    #[must_use]
    pub const fn is_local(&self) -> bool {
        matches!(self, Self::LocalInvalidate(_) | Self::BindWindow(_))
    }

    /// Whether only a response of its own, not a plain ACK, finishes it.
    #[must_use]
    pub const fn wants_response(&self) -> bool {
        matches!(
            self,
            Self::Read(_)
                | Self::CompareSwap { .. }
                | Self::FetchAdd { .. }
                | Self::AtomicWrite(_)
                | Self::Flush(_)
        )
    }

    /// Whether it takes a receive of the peer's, and so is reported there.
    #[must_use]
    pub const fn takes_receive(&self) -> bool {
        matches!(
            self,
            Self::Send | Self::SendImm(_) | Self::SendInvalidate(_) | Self::WriteImm(..)
        )
    }
}

/// What a FLUSH asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flush {
    /// Where the range starts.
    pub remote: Remote,
    /// Its length, bytes.
    pub len: u32,
    /// Visible to everybody there.
    pub global: bool,
    /// Kept over a power loss.
    pub persistent: bool,
    /// The whole region of the key, whatever the range.
    pub whole_region: bool,
}

/// A window's place: part of a region, under a key of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bind {
    /// The window's key so far.
    pub window: Rkey,
    /// Its key from now on; only the low eight bits may differ.
    pub rkey: Rkey,
    /// The region.
    pub region: Lkey,
    /// Address of the first byte.
    pub addr: u64,
    /// Length, bytes; 0 takes the place away.
    pub len: u64,
    /// What peers may do there.
    pub access: Access,
    /// Peers count addresses from the start of the window.
    pub zero_based: bool,
}

/// A send work request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SendWr {
    /// The caller's name for it.
    pub wr_id: WrId,
    /// What to do.
    pub op: SendOp,
    /// Where the payload lies, or goes (READ, atomics).
    pub local: SgList,
    /// Report success too. Failures and flushes are always reported.
    pub signalled: bool,
    /// Wake the peer's event handler.
    pub solicited: bool,
    /// Start only when all earlier READs and atomics have finished.
    pub fence: bool,
}

impl SendWr {
    /// A signalled, unfenced request.
    #[must_use]
    pub const fn new(wr_id: WrId, op: SendOp, local: SgList) -> Self {
        Self {
            wr_id,
            op,
            local,
            signalled: true,
            solicited: false,
            fence: false,
        }
    }

    /// Whether a connection of this kind does such a thing, with memory of this length.
    #[must_use]
    pub const fn suits(&self, kind: QpKind) -> bool {
        let total = self.local.total();
        let fits = match self.op {
            SendOp::CompareSwap { .. } | SendOp::FetchAdd { .. } | SendOp::AtomicWrite(_) => {
                total == 8
            }
            SendOp::Flush(_) | SendOp::LocalInvalidate(_) | SendOp::BindWindow(_) => total == 0,
            _ => true,
        };
        let reliable_only =
            self.op.wants_response() || matches!(self.op, SendOp::SendInvalidate(_));
        fits && !(reliable_only && matches!(kind, QpKind::Uc))
    }
}

/// A receive work request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecvWr {
    /// The caller's name for it.
    pub wr_id: WrId,
    /// Where the message goes. On a UD queue pair its first 40 bytes receive the IP header.
    pub local: SgList,
}

/// Why a work request was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PostError {
    /// The queue is full; completions must be polled first.
    QueueFull,
    /// The state does not admit posting.
    State(QpState),
    /// The request does not fit the queue pair: an operation UC does not have, an atomic whose
    /// memory is not 8 bytes, a datagram longer than the MTU.
    Invalid,
}

macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = $code:literal)*) => {
        /// How a work request ended. The numbers are those of ibverbs.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        #[repr(u8)]
        pub enum Status { $($(#[$doc])* $name = $code),* }

        impl Status {
            /// The status with this number; none for one that no soft-RoCE device reports.
            #[must_use]
            pub const fn from_code(code: u8) -> Option<Self> {
                match code {
                    $($code => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// The number.
            #[must_use]
            pub const fn code(self) -> u8 {
                self as u8
            }
        }
    };
}

statuses! {
    /// Done.
    Success = 0
    /// The message was longer than the receive.
    LocalLength = 1
    /// The queue pair cannot do what was asked.
    LocalOperation = 2
    /// The request's memory was not registered as needed, or has gone.
    LocalProtection = 4
    /// Another request failed first, or the queue pair was moved to the error state.
    Flushed = 5
    /// A memory window could not be bound.
    WindowBind = 6
    /// The responder's answer made no sense.
    BadResponse = 7
    /// The memory of a receive that a WRITE with immediate data used was not as needed.
    LocalAccess = 8
    /// The peer refused: invalid request.
    RemoteInvalidRequest = 9
    /// The peer refused: key, range or rights.
    RemoteAccess = 10
    /// The peer failed.
    RemoteOperation = 11
    /// No answer after all retries.
    RetryExceeded = 12
    /// The peer had no receive posted after all retries.
    RnrRetryExceeded = 13
    /// The operation was aborted by the peer.
    RemoteAbort = 16
    /// The device failed.
    Fatal = 19
    /// Too late.
    ResponseTimeout = 20
    /// Something else.
    General = 21
}

/// Which kind of work completed. The numbers are those of ibverbs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum CompletionKind {
    /// A SEND of any sort.
    Send = 0,
    /// A WRITE of any sort.
    Write = 1,
    /// A READ.
    Read = 2,
    /// Compare and swap.
    CompareSwap = 3,
    /// Fetch and add.
    FetchAdd = 4,
    /// A memory window was bound.
    BindWindow = 5,
    /// A key was invalidated at this end.
    LocalInvalidate = 6,
    /// FLUSH.
    Flush = 8,
    /// ATOMIC WRITE.
    AtomicWrite = 9,
    /// A receive, filled by a SEND.
    Recv = 128,
    /// A receive, consumed by a WRITE with immediate data.
    RecvWriteImm = 129,
}

impl CompletionKind {
    /// The kind with this number.
    #[must_use]
    pub const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0 => Self::Send,
            1 => Self::Write,
            2 => Self::Read,
            3 => Self::CompareSwap,
            4 => Self::FetchAdd,
            5 => Self::BindWindow,
            6 => Self::LocalInvalidate,
            8 => Self::Flush,
            9 => Self::AtomicWrite,
            128 => Self::Recv,
            129 => Self::RecvWriteImm,
            _ => return None,
        })
    }

    /// Whether a receive work request completed.
    #[must_use]
    pub const fn is_recv(self) -> bool {
        matches!(self, Self::Recv | Self::RecvWriteImm)
    }
}

/// A completed work request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The name given when posting.
    pub wr_id: WrId,
    /// How it ended. If not `Success`, only `wr_id` and `kind` mean something.
    pub status: Status,
    /// What it was.
    pub kind: CompletionKind,
    /// Bytes received (a receive; on UD with the 40 bytes of IP header), read, or returned by an
    /// atomic; 0 for SEND and WRITE.
    pub byte_len: u32,
    /// Immediate data.
    pub imm: Option<u32>,
    /// The key of ours that the message invalidated.
    pub invalidated: Option<Rkey>,
    /// The message asked for a solicited event.
    pub solicited: bool,
    /// UD: the sender's queue pair. RC and UC: the connected one.
    pub source: Qpn,
}
