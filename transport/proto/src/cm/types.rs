//! What callers of the connection manager give and get.

use alloc::vec::Vec;
use core::fmt;
use core::net::{IpAddr, SocketAddr};

use super::mad::{BadMad, CommId, MAD_LEN, ServiceId};
#[cfg(doc)]
use super::{Cm, REQ_PRIVATE_MAX, SIDR_REQ_PRIVATE_MAX, reason, sidr_status};
use crate::time::Nanos;
use crate::wire::{Mtu, Psn, Qpn};

/// How a connection manager behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CmConfig {
    /// The device's address.
    pub local: IpAddr,
    /// The device's GUID.
    pub ca_guid: u64,
    /// The first communication id. Should differ from life to life of a device, lest a peer takes
    /// a new connection for an old one.
    pub first_comm_id: u32,
    /// High half of the transaction ids.
    pub tid_high: u32,
    /// Connections at once; those that are over give way to new ones. An eighth of them peers that
    /// call cannot have.
    pub connections_max: usize,
    /// Pause before the first repetition of a message.
    pub resend_after: Nanos,
    /// Time after which a message is no longer repeated.
    pub give_up_after: Nanos,
    /// How long an ended connection is remembered at most, to answer duplicates.
    pub time_wait: Nanos,
}

impl CmConfig {
    /// Sensible times: first repetition after 50 ms, end after 30 s, memory for 5 s.
    #[must_use]
    pub const fn new(local: IpAddr, ca_guid: u64, first_comm_id: u32) -> Self {
        Self {
            local,
            ca_guid,
            first_comm_id,
            tid_high: 1,
            connections_max: 4096,
            resend_after: Nanos::from_millis(50),
            give_up_after: Nanos::from_millis(30_000),
            time_wait: Nanos::from_millis(5_000),
        }
    }
}

/// What both sides of a connection tell each other of their queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QpOffer {
    /// The queue pair.
    pub qpn: Qpn,
    /// The first PSN that the *peer* shall send to it (IBTA 12.7.31). Two ends that both take it
    /// for the first one sent understand each other, too, but no kernel.
    pub psn: Psn,
    /// READs and atomics it serves at once: bounds the peer's `max_rd_atomic`.
    pub responder_resources: u8,
    /// READs and atomics it has under way at once: bounds the peer's `max_dest_rd_atomic`.
    pub initiator_depth: u8,
    /// RNR retries that the *peer's* queue pair shall use.
    pub rnr_retry: u8,
}

/// What a client asks for.
#[derive(Clone, Copy, Debug)]
pub struct ConnectParams<'a> {
    /// Where requests go: the peer's address and UDP port (4791 but for our own peers elsewhere).
    pub to: SocketAddr,
    /// What to talk to.
    pub service: ServiceId,
    /// The client's port in the service's port space; some servers show it.
    pub source_port: u16,
    /// The client's queue pair.
    pub qp: QpOffer,
    /// Path MTU.
    pub mtu: Mtu,
    /// Transport retries that the server's queue pair shall use.
    pub retry_count: u8,
    /// Local ACK timeout exponent that the server's queue pair shall use.
    pub ack_timeout: u8,
    /// At most [`REQ_PRIVATE_MAX`] bytes.
    pub private_data: &'a [u8],
}

/// A client's request, as the server sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectRequest {
    /// The client's address and UDP port.
    pub from: SocketAddr,
    /// What it wants to talk to.
    pub service: ServiceId,
    /// Its port in the service's port space, if it said so.
    pub source_port: Option<u16>,
    /// Its channel adapter.
    pub ca_guid: u64,
    /// Its queue pair.
    pub qp: QpOffer,
    /// Path MTU it proposes; the server may use no other.
    pub mtu: Mtu,
    /// Transport retries for the server's queue pair.
    pub retry_count: u8,
    /// Local ACK timeout exponent for the server's queue pair.
    pub ack_timeout: u8,
    /// Its private data; the wire pads with zeros.
    pub private_data: Vec<u8>,
}

/// What a client asks of a datagram service.
#[derive(Clone, Copy, Debug)]
pub struct ResolveParams<'a> {
    /// Where requests go, as in [`ConnectParams`].
    pub to: SocketAddr,
    /// What to talk to.
    pub service: ServiceId,
    /// The client's port in the service's port space.
    pub source_port: u16,
    /// At most [`SIDR_REQ_PRIVATE_MAX`] bytes.
    pub private_data: &'a [u8],
}

/// A client's question for a datagram queue pair, as the server sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inquiry {
    /// The client's address and UDP port.
    pub from: SocketAddr,
    /// What it wants to talk to.
    pub service: ServiceId,
    /// Its port in the service's port space, if it said so.
    pub source_port: Option<u16>,
    /// Its private data; the wire pads with zeros.
    pub private_data: Vec<u8>,
}

/// What the caller must know or do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CmEvent {
    /// Server: [`Cm::accept`] or [`Cm::reject`] it.
    ConnectRequest {
        /// The new connection.
        id: CommId,
        /// What is asked.
        request: ConnectRequest,
    },
    /// Client: the server accepted. Move the queue pair to RTS, then [`Cm::establish`].
    Accepted {
        /// The connection.
        id: CommId,
        /// The server's queue pair.
        qp: QpOffer,
        /// Its channel adapter.
        ca_guid: u64,
        /// Its private data; the wire pads with zeros.
        private_data: Vec<u8>,
    },
    /// Server: the client is ready.
    Established {
        /// The connection.
        id: CommId,
    },
    /// The peer refused, or withdrew during the handshake. The connection is gone.
    Rejected {
        /// The connection.
        id: CommId,
        /// Why: see [`reason`].
        reason: u16,
        /// Its private data; the wire pads with zeros.
        private_data: Vec<u8>,
    },
    /// The peer disconnected, or answered our disconnection. The connection is gone.
    Disconnected {
        /// The connection.
        id: CommId,
    },
    /// The peer did not answer, or the caller did not answer its request. The connection is gone.
    TimedOut {
        /// The connection.
        id: CommId,
    },
    /// Server: [`Cm::answer`] it.
    Inquiry {
        /// The inquiry.
        id: CommId,
        /// What is asked.
        inquiry: Inquiry,
    },
    /// Client: where the service's datagram queue pair is. The inquiry is gone.
    Resolved {
        /// The inquiry.
        id: CommId,
        /// The datagram queue pair.
        qpn: Qpn,
        /// What its datagrams must carry.
        qkey: u32,
        /// The server's private data; the wire pads with zeros.
        private_data: Vec<u8>,
    },
    /// Client: the server has no datagram queue pair for us. The inquiry is gone.
    Unresolved {
        /// The inquiry.
        id: CommId,
        /// Why: see [`sidr_status`].
        status: u8,
        /// The server's private data; the wire pads with zeros.
        private_data: Vec<u8>,
    },
}

/// A datagram to send to queue pair 1 of the host `to`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CmTransmit {
    /// Address and UDP port.
    pub to: SocketAddr,
    /// The payload.
    pub mad: [u8; MAD_LEN],
}

/// Why a command was not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CmError {
    /// No such connection, or it has ended.
    UnknownConnection,
    /// The connection is in another state than the command needs.
    State(CmState),
    /// Private data longer than the message has room for.
    PrivateDataTooLong,
    /// [`CmConfig::connections_max`] is reached.
    TooManyConnections,
}

impl fmt::Display for CmError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "connection manager: {self:?}")
    }
}

/// What became of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CmOutcome {
    /// It was understood, be it as a duplicate.
    Accepted,
    /// It is no message of a connection manager.
    Malformed(BadMad),
    /// It belongs to no connection, or came in a state that has no use for it.
    Stale,
    /// Too much waits for the caller, or too many connections exist.
    Busy,
}

/// States of a connection.
///
/// | from \ on     | message in                  | command                       | silence   |
/// |---------------|-----------------------------|-------------------------------|-----------|
/// | ReqSent       | REP: RepReceived, REJ: gone | disconnect: gone              | gone      |
/// | ReqReceived   | REJ: gone                   | accept: RepSent, reject: TimeWait | gone  |
/// | RepSent       | RTU: Established, REJ: gone | disconnect: DreqSent          | gone      |
/// | RepReceived   | REJ: gone                   | establish: Established, reject: TimeWait | |
/// | Established   | DREQ: TimeWait, REJ: gone   | disconnect: DreqSent          |           |
/// | DreqSent      | DREP or DREQ: TimeWait, REJ: gone |                         | TimeWait  |
/// | SidrReqSent   | SIDR_REP: gone              | disconnect: gone              | gone      |
/// | SidrReqReceived |                           | answer: TimeWait              | gone      |
/// | TimeWait      |                             |                               | gone      |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(
    missing_docs,
    reason = "the names are Linux's; the table tells their meaning"
)]
pub enum CmState {
    ReqSent,
    ReqReceived,
    RepSent,
    RepReceived,
    Established,
    DreqSent,
    SidrReqSent,
    SidrReqReceived,
    TimeWait,
}
