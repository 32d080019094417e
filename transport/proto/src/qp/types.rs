//! States and attributes of queue pairs, packets to send, outcomes and counters. Names and meanings
//! are those of ibverbs.

use core::fmt;

use super::memory::{Access, Fragments};
use crate::wire::{HEADER_LEN_MAX, Mtu, Psn, Qpn, RnrTimer};

/// Type of a connected queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QpKind {
    /// Reliable connection.
    Rc,
    /// Unreliable connection.
    Uc,
}

/// States of a queue pair. The numbers are those of ibverbs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum QpState {
    /// Created.
    Reset = 0,
    /// Receives may be posted.
    Init = 1,
    /// Ready to receive.
    Rtr = 2,
    /// Ready to send: the working state.
    Rts = 3,
    /// Send queue drained: what has begun is finished, nothing new begins. Receiving goes on.
    Sqd = 4,
    /// Send queue error: a send failed at this end, and what is posted after it is flushed.
    /// Receiving goes on. Not for RC, which goes to ERR instead.
    Sqe = 5,
    /// Everything posted is flushed.
    Err = 6,
}

impl QpState {
    /// The state with this number.
    #[must_use]
    pub const fn from_code(code: u8) -> Option<Self> {
        use QpState::{Err, Init, Reset, Rtr, Rts, Sqd, Sqe};
        const ALL: [QpState; 7] = [Reset, Init, Rtr, Rts, Sqd, Sqe, Err];
        if code < 7 {
            Some(ALL[code as usize])
        } else {
            None
        }
    }

    /// Whether a queue pair may be told to go from `self` to `next` (it enters SQE by itself):
    ///
    /// | from \ to | Reset | Init | Rtr | Rts | Sqd | Err |
    /// |-----------|-------|------|-----|-----|-----|-----|
    /// | Reset     | yes   | yes  |     |     |     | yes |
    /// | Init      | yes   | yes  | yes |     |     | yes |
    /// | Rtr       | yes   |      |     | yes |     | yes |
    /// | Rts       | yes   |      |     | yes | yes | yes |
    /// | Sqd       | yes   |      |     | yes | yes | yes |
    /// | Sqe       | yes   |      |     | yes |     | yes |
    /// | Err       | yes   |      |     |     |     | yes |
    #[must_use]
    pub const fn legal(self, next: Self) -> bool {
        use QpState::{Err, Init, Reset, Rtr, Rts, Sqd, Sqe};
        matches!(
            (self, next),
            (_, Reset | Err)
                | (Reset | Init, Init)
                | (Init, Rtr)
                | (Rtr | Rts | Sqd | Sqe, Rts)
                | (Rts | Sqd, Sqd)
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

impl core::error::Error for InvalidTransition {}

/// What a queue pair is created with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QpCaps {
    /// Send work requests that may be outstanding or completed but not polled.
    pub send_wr_max: u32,
    /// The same for receives; not looked at with shared receives.
    pub recv_wr_max: u32,
    /// Receives come from a queue shared with other queue pairs.
    pub shared_receives: bool,
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
    /// `max_rd_atomic` times this many response packets are under way. 0: one request per READ.
    pub read_chunk_packets: u16,
}

/// What [`poll_transmit`](super::QueuePair::poll_transmit) may return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allow {
    /// Any packet.
    All,
    /// No new request: the peer's buffer is full as far as we know. What it is owed still goes, READ
    /// responses too, for who asks for them keeps room for them; and so do probes.
    Answers,
    /// No payload and no new request. ACKs, NAKs and probes still go.
    ControlOnly,
}

/// A packet to send: header bytes, then the fragments, then pad and ICRC.
#[derive(Clone, Copy, Debug)]
pub struct Transmit {
    /// Behind the first `header_len` bytes lies what was there before.
    pub(crate) header: [u8; HEADER_LEN_MAX],
    pub(crate) header_len: u8,
    pub(crate) psn: Psn,
    /// The payload.
    pub payload: Fragments,
    /// Pad bytes (zeros) after the payload.
    pub pad: u8,
    /// It answers the peer's request (ACK, NAK, READ or atomic response).
    pub is_response: bool,
    /// It has been sent before, or answers a request that came before.
    pub is_retransmission: bool,
}

impl Transmit {
    /// To be written over by [`poll_transmit_into`](super::QueuePair::poll_transmit_into).
    pub const EMPTY: Self = Self {
        header: [0; HEADER_LEN_MAX],
        header_len: 0,
        psn: Psn::new(0),
        payload: Fragments::EMPTY,
        pad: 0,
        is_response: false,
        is_retransmission: false,
    };

    /// BTH and extension headers.
    #[must_use]
    #[inline]
    pub fn header(&self) -> &[u8] {
        &self.header[..usize::from(self.header_len)]
    }

    /// The same, and the room behind it.
    #[must_use]
    #[inline]
    pub const fn header_room(&self) -> (&[u8; HEADER_LEN_MAX], usize) {
        (&self.header, self.header_len as usize)
    }

    /// Payload bytes.
    #[must_use]
    #[inline]
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

    /// Put `header` in front of the payload, which is there, with the pad that it needs.
    #[inline(always)] // as `Header::write`
    pub(super) fn begin(&mut self, mut header: crate::wire::Header) {
        header.pad = crate::wire::pad_len(self.payload.total() as usize) as u8;
        self.header_len = header.write(&mut self.header) as u8;
        self.psn = header.psn;
        self.pad = header.pad;
        self.is_response = header.opcode.is_response();
        self.is_retransmission = false;
    }
}

impl PartialEq for Transmit {
    fn eq(&self, other: &Self) -> bool {
        let marks = |it: &Self| (it.psn, it.pad, it.is_response, it.is_retransmission);
        self.header() == other.header()
            && self.payload == other.payload
            && marks(self) == marks(other)
    }
}

impl Eq for Transmit {}

macro_rules! events {
    ($($(#[$doc:meta])* $name:ident)*) => {
        /// What a queue pair reports besides completions; each at most once until polled.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum QpEvent { $($(#[$doc])* $name),* }

        impl QpEvent {
            pub(super) const ALL: &[Self] = &[$(Self::$name),*];
        }
    };
}

events! {
    /// The first packet of the peer came in RTR.
    CommunicationEstablished
    /// The send queue has drained.
    SendQueueDrained
    /// The peer's request broke a rule; the queue pair is in ERR.
    RequestError
    /// The peer touched memory that it may not; the queue pair is in ERR.
    AccessError
    /// In ERR, and no more is taken from the shared receive queue.
    LastWqeReached
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It changed something, or was a duplicate that is answered again.
    Accepted,
    /// A packet before it is missing. A caller that keeps it says so
    /// ([`note_kept`](super::QueuePair::note_kept)); else the peer sends it again.
    Ahead,
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
    /// Requests that failed because the peer was silent for all retries.
    pub retry_exceeded_err: u64,
    /// Requests that failed because the peer had no receive for all retries.
    pub retry_rnr_exceeded_err: u64,
    /// Returns to the oldest packet that is not acknowledged, RNR NAKs excepted.
    pub completer_retry_err: u64,
    /// SENDs finished.
    pub rdma_sends: u64,
    /// Receives finished, those for immediate data of a WRITE among them.
    pub rdma_recvs: u64,
    /// NAKs sent, RNR excepted.
    pub send_nak: u64,
    /// Local ACK timeouts.
    pub ack_timeout: u64,
    /// Congestion notifications received.
    pub cnp_handled: u64,
}
