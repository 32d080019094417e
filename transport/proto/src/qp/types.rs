//! The vocabulary of queue pairs: work requests, completions, attributes, packets to send, and the
//! [`Memory`] they work on. Names and meanings are those of ibverbs.

use core::fmt;

use crate::wire::{HEADER_LEN_MAX, Mtu, Psn, Qpn, RnrTimer};

/// Scatter/gather elements per work request, and so fragments per packet.
pub const SGE_MAX: usize = 4;

/// The caller's name for a work request, returned in its completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct WrId(pub u64);

/// Key of a memory region for its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Lkey(pub u32);

/// Key of a memory region for the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Rkey(pub u32);

/// A piece of local memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Sge {
    /// Key of the region it lies in.
    pub lkey: Lkey,
    /// Address of its first byte.
    pub addr: u64,
    /// Length, bytes.
    pub len: u32,
}

/// More than [`SGE_MAX`] elements, or more than 2^31 bytes in sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooManySges;

/// The local memory of a work request: up to [`SGE_MAX`] pieces, at most 2^31 bytes in all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct SgList {
    elements: [Sge; SGE_MAX],
    count: u8,
    total: u32,
}

impl SgList {
    /// No memory: a message of zero bytes.
    pub const EMPTY: Self = Self {
        elements: [Sge {
            lkey: Lkey(0),
            addr: 0,
            len: 0,
        }; SGE_MAX],
        count: 0,
        total: 0,
    };

    /// The list of `elements`, in order.
    ///
    /// # Errors
    ///
    /// [`TooManySges`] beyond the limits above.
    pub fn new(elements: &[Sge]) -> Result<Self, TooManySges> {
        let mut list = Self::EMPTY;
        if elements.len() > SGE_MAX {
            return Err(TooManySges);
        }
        let mut total = 0u64;
        for (slot, element) in list.elements.iter_mut().zip(elements) {
            *slot = *element;
            total += u64::from(element.len);
        }
        if total > u64::from(crate::wire::MESSAGE_LEN_MAX) {
            return Err(TooManySges);
        }
        list.count = elements.len() as u8;
        list.total = total as u32;
        Ok(list)
    }

    /// One piece.
    ///
    /// # Panics
    ///
    /// If `len` exceeds 2^31: a bug of the caller.
    #[must_use]
    pub fn one(lkey: Lkey, addr: u64, len: u32) -> Self {
        assert!(len <= crate::wire::MESSAGE_LEN_MAX);
        let mut list = Self::EMPTY;
        list.elements[0] = Sge { lkey, addr, len };
        list.count = 1;
        list.total = len;
        list
    }

    /// The pieces.
    #[must_use]
    pub fn elements(&self) -> &[Sge] {
        &self.elements[..usize::from(self.count)]
    }

    /// Bytes in all.
    #[must_use]
    pub const fn total(&self) -> u32 {
        self.total
    }

    /// The fragments that hold bytes `offset` to `offset + len`, as far as the list reaches.
    #[must_use]
    pub(crate) fn slice(&self, offset: u32, len: u32) -> Fragments {
        let mut fragments = Fragments::EMPTY;
        let (mut skip, mut left) = (offset, len);
        for sge in self.elements() {
            if skip >= sge.len {
                skip -= sge.len;
                continue;
            }
            let take = left.min(sge.len - skip);
            if take == 0 {
                break;
            }
            fragments.push(Fragment {
                key: Key::Local(sge.lkey),
                addr: sge.addr.wrapping_add(u64::from(skip)),
                len: take,
            });
            left -= take;
            skip = 0;
        }
        fragments
    }
}

/// By which key a fragment's memory is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// Memory of a local work request.
    Local(Lkey),
    /// Our memory, named by the peer in a WRITE or READ.
    Remote(Rkey),
}

/// A piece of registered memory of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Which region.
    pub key: Key,
    /// Address of the first byte.
    pub addr: u64,
    /// Length, bytes.
    pub len: u32,
}

/// The payload of one packet: up to [`SGE_MAX`] fragments in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragments {
    list: [Fragment; SGE_MAX],
    count: u8,
}

impl Fragments {
    /// No payload.
    pub const EMPTY: Self = Self {
        list: [Fragment {
            key: Key::Local(Lkey(0)),
            addr: 0,
            len: 0,
        }; SGE_MAX],
        count: 0,
    };

    /// Append; a list is made from at most [`SGE_MAX`] elements, so there is room.
    pub(crate) fn push(&mut self, fragment: Fragment) {
        self.list[usize::from(self.count)] = fragment;
        self.count += 1;
    }

    /// The fragments.
    #[must_use]
    pub fn as_slice(&self) -> &[Fragment] {
        &self.list[..usize::from(self.count)]
    }

    /// Bytes in all.
    #[must_use]
    pub fn total(&self) -> u32 {
        self.as_slice().iter().map(|f| f.len).sum()
    }
}

/// A place in the peer's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remote {
    /// Virtual address there.
    pub va: u64,
    /// The peer's key for it.
    pub rkey: Rkey,
}

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

/// What a peer may do with our memory through one queue pair; also the rights asked of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Access {
    /// WRITE.
    pub remote_write: bool,
    /// READ.
    pub remote_read: bool,
    /// Atomics.
    pub remote_atomic: bool,
}

impl Access {
    /// All three.
    pub const ALL: Self = Self {
        remote_write: true,
        remote_read: true,
        remote_atomic: true,
    };
    /// READ alone.
    pub const READ: Self = Self {
        remote_write: false,
        remote_read: true,
        remote_atomic: false,
    };
    /// WRITE alone.
    pub const WRITE: Self = Self {
        remote_write: true,
        remote_read: false,
        remote_atomic: false,
    };
    /// Atomics alone.
    pub const ATOMIC: Self = Self {
        remote_write: false,
        remote_read: false,
        remote_atomic: true,
    };
}

/// Memory is not registered, not long enough, or not granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccessError;

/// An atomic operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtomicOp {
    /// Store `swap` if the word equals `compare`.
    CompareSwap {
        /// Compared with the word.
        compare: u64,
        /// Stored if equal.
        swap: u64,
    },
    /// Add, wrapping.
    FetchAdd {
        /// The addend.
        add: u64,
    },
}

/// Registered memory, as a queue pair needs it: implemented by the hands over their regions, by the
/// tests over vectors. One protection domain.
pub trait Memory {
    /// Whether the peer may do `access` to `len` bytes at `va` under `rkey`. Called once per WRITE
    /// message and READ request, with `len > 0`, before the first byte moves.
    ///
    /// # Errors
    ///
    /// [`AccessError`] if not; the peer gets a remote access NAK.
    fn check_remote(
        &self,
        rkey: Rkey,
        va: u64,
        len: u32,
        access: Access,
    ) -> Result<(), AccessError>;

    /// Copy received payload to the fragment (`payload.len() == target.len`).
    ///
    /// # Errors
    ///
    /// [`AccessError`] if the memory went away or was never writable.
    fn place(&mut self, target: Fragment, payload: &[u8]) -> Result<(), AccessError>;

    /// Perform `op` on the native-order 64-bit word at `va` (a multiple of 8) and return its old
    /// value, atomically with regard to all other queue pairs.
    ///
    /// # Errors
    ///
    /// [`AccessError`] if the peer may not.
    fn atomic(&mut self, rkey: Rkey, va: u64, op: AtomicOp) -> Result<u64, AccessError>;

    /// Make the peer's key invalid (SEND with invalidate).
    ///
    /// # Errors
    ///
    /// [`AccessError`] if there is no such key, or it may not be invalidated.
    fn invalidate(&mut self, rkey: Rkey) -> Result<(), AccessError>;
}

/// Type of a connected queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QpKind {
    /// Reliable connection.
    Rc,
    /// Unreliable connection.
    Uc,
}

/// States of a queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QpState {
    /// Created.
    Reset,
    /// Receives may be posted.
    Init,
    /// Ready to receive.
    Rtr,
    /// Ready to send: the working state.
    Rts,
    /// Send queue drained; part of ibverbs' vocabulary, never entered here.
    Sqd,
    /// Send queue error; part of ibverbs' vocabulary, never entered here.
    Sqe,
    /// Everything posted is flushed.
    Err,
}

impl QpState {
    /// Whether a queue pair may go from `self` to `next`:
    ///
    /// | from \ to | Reset | Init | Rtr | Rts | Err |
    /// |-----------|-------|------|-----|-----|-----|
    /// | Reset     | yes   | yes  |     |     | yes |
    /// | Init      | yes   | yes  | yes |     | yes |
    /// | Rtr       | yes   |      |     | yes | yes |
    /// | Rts       | yes   |      |     |     | yes |
    /// | Err       | yes   |      |     |     | yes |
    #[must_use]
    pub const fn legal(self, next: Self) -> bool {
        use QpState::{Err, Init, Reset, Rtr, Rts};
        matches!(
            (self, next),
            (_, Reset | Err) | (Reset | Init, Init) | (Init, Rtr) | (Rtr, Rts)
        )
    }
}

/// A transition that the table above does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidTransition {
    /// Where the queue pair is.
    pub from: QpState,
    /// Where it was told to go.
    pub to: QpState,
}

impl fmt::Display for InvalidTransition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "queue pair cannot go from {:?} to {:?}",
            self.from, self.to
        )
    }
}

/// What a queue pair is created with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QpCaps {
    /// Send work requests that may be outstanding or completed but not polled.
    pub send_wr_max: u32,
    /// The same for receives.
    pub recv_wr_max: u32,
}

/// RESET to INIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InitAttr {
    /// What the peer may do to our memory.
    pub access: Access,
    /// Partition key, [`crate::wire::PKEY_DEFAULT`] on soft-RoCE.
    pub pkey: u16,
}

/// INIT to RTR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RtrAttr {
    /// The peer's queue pair.
    pub dest: Qpn,
    /// Payload of full packets, both ways.
    pub path_mtu: Mtu,
    /// The first PSN the peer will send.
    pub rq_psn: Psn,
    /// READs and atomics of the peer that are remembered for replay, at most 128.
    pub max_dest_rd_atomic: u8,
    /// How long a peer waits that found no receive posted.
    pub min_rnr_timer: RnrTimer,
}

/// RTR to RTS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RtsAttr {
    /// The first PSN we send.
    pub sq_psn: Psn,
    /// Local ACK timeout: 4.096 us times 2 to this power, 5 bits; 0 means that no timeout fails the
    /// queue pair (probes still recover losses).
    pub timeout: u8,
    /// Timeouts and sequence NAKs without progress before the queue pair fails, 0 to 6; 7 is
    /// without limit, as in Linux rxe.
    pub retry_cnt: u8,
    /// Tries after RNR NAKs, 0 to 6; 7 is without limit.
    pub rnr_retry: u8,
    /// READs and atomics of ours under way at once, at most 128 and at most the peer's
    /// `max_dest_rd_atomic`.
    pub max_rd_atomic: u8,
    /// A READ longer than this many packets goes out as several READ requests, so that at most
    /// `max_rd_atomic` times this many response packets are under way. 0 means one request per READ.
    pub read_chunk_packets: u16,
}

/// What [`poll_transmit`](super::QueuePair::poll_transmit) may return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allow {
    /// Any packet.
    All,
    /// No payload and no new request: the peer's buffer is full as far as we know. ACKs, NAKs and
    /// probes still go.
    ControlOnly,
}

/// A packet to send: header bytes, then the fragments, then pad and ICRC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transmit {
    pub(crate) header: [u8; HEADER_LEN_MAX],
    pub(crate) header_len: u8,
    /// The payload.
    pub payload: Fragments,
    /// Pad bytes (zeros) after the payload.
    pub pad: u8,
    /// It answers the peer's request (ACK, NAK, READ or atomic response).
    pub is_response: bool,
    /// It has been sent before.
    pub is_retransmission: bool,
}

impl Transmit {
    /// BTH and extension headers.
    #[must_use]
    pub fn header(&self) -> &[u8] {
        &self.header[..usize::from(self.header_len)]
    }

    /// Payload bytes.
    #[must_use]
    pub fn payload_len(&self) -> u32 {
        self.payload.total()
    }

    /// Length of the UDP payload: header, payload, pad, ICRC.
    #[must_use]
    pub fn udp_payload_len(&self) -> usize {
        usize::from(self.header_len)
            + self.payload_len() as usize
            + usize::from(self.pad)
            + crate::wire::ICRC_LEN
    }
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It changed something, or was a duplicate that is answered again.
    Accepted,
    /// It changed nothing.
    Dropped(DropReason),
}

/// Why a packet changed nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DropReason {
    /// The queue pair is in no state to take it.
    State(QpState),
    /// Its transport class is not the queue pair's.
    Class,
    /// Another partition.
    Pkey,
    /// Another Q_Key (UD).
    Qkey,
    /// A gap in the PSNs.
    OutOfSequence,
    /// An answer to what is already answered or was never asked, or a duplicate that cannot be
    /// replayed.
    Stale,
    /// A syndrome or opcode that this crate does not serve.
    Unsupported,
    /// Too many answers are waiting to be sent; the peer will repeat its request.
    Busy,
    /// No receive is posted.
    NoReceive,
    /// The message does not fit the receive (UD), or its lengths contradict each other (UC).
    Length,
}

/// Anomalies of one queue pair since it was created; the names follow Linux rxe's counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Counters {
    /// Packets sent, of all sorts.
    pub sent_pkts: u64,
    /// Packets accepted.
    pub rcvd_pkts: u64,
    /// Packets dropped for any [`DropReason`].
    pub dropped_pkts: u64,
    /// Packets sent again.
    pub retransmitted_pkts: u64,
    /// Probes sent.
    pub probes: u64,
    /// Duplicate requests seen.
    pub duplicate_request: u64,
    /// Requests beyond the expected PSN.
    pub out_of_seq_request: u64,
    /// Sequence NAKs received.
    pub rcvd_seq_err: u64,
    /// RNR NAKs received.
    pub rcvd_rnr_err: u64,
    /// RNR NAKs sent.
    pub send_rnr_err: u64,
    /// NAKs sent, RNR excepted.
    pub send_nak: u64,
    /// Local ACK timeouts.
    pub ack_timeout: u64,
    /// Congestion notifications received.
    pub cnp_handled: u64,
}
