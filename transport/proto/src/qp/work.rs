//! Work requests and completions. Names and meanings are those of ibverbs.

use super::memory::{Remote, Rkey, SgList};
use super::types::QpState;
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

/// How a work request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Status {
    /// Done.
    Success,
    /// The message was longer than the receive.
    LocalLength,
    /// The request's memory was not registered as needed.
    LocalProtection,
    /// The responder's answer made no sense.
    BadResponse,
    /// Another request failed first, or the queue pair was moved to the error state.
    Flushed,
    /// The peer refused: invalid request.
    RemoteInvalidRequest,
    /// The peer refused: key, range or rights.
    RemoteAccess,
    /// The peer failed.
    RemoteOperation,
    /// No answer after all retries.
    RetryExceeded,
    /// The peer had no receive posted after all retries.
    RnrRetryExceeded,
}

/// Which kind of work completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompletionKind {
    /// A SEND of any sort.
    Send,
    /// A WRITE of any sort.
    Write,
    /// A READ.
    Read,
    /// Compare and swap.
    CompareSwap,
    /// Fetch and add.
    FetchAdd,
    /// A receive, filled by a SEND.
    Recv,
    /// A receive, consumed by a WRITE with immediate data.
    RecvWriteImm,
}

impl CompletionKind {
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
