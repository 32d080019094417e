//! The connection manager's messages: 256-byte management datagrams of class 7.
//!
//! [`Message::decode`] borrows from the datagram, [`Message::encode`] fills one; fields that Linux
//! leaves zero or constant on RoCEv2 (LIDs, alternate paths, end-to-end contexts) are emitted so and
//! ignored when read. Where each field lies is `layout`'s.
//!
//! Absent: path migration (LAP, APR), private data of RTU, DREQ, DREP and MRA (rdma_cm puts none).
//! Source: Linux `ibta_vol1_c12.h`, `cm_msgs.h`, `cma.c`.

mod layout;

use core::net::{IpAddr, Ipv6Addr};

use crate::wire::{Mtu, Psn, Qpn};
use layout::{u16, u24, u32, u64};

/// Length of a management datagram, bytes.
pub const MAD_LEN: usize = 256;
/// Length of the MAD header, bytes; offsets of the messages count from its end.
const HEADER_LEN: usize = 24;
const BODY_LEN: usize = MAD_LEN - HEADER_LEN;

/// Private data an application may put into a connection request, bytes: 92 less rdma_cm's header.
pub const REQ_PRIVATE_MAX: usize = 92 - CMA_LEN;
/// Private data of a reply, bytes.
pub const REP_PRIVATE_MAX: usize = 196;
/// Private data of a rejection, bytes.
pub const REJ_PRIVATE_MAX: usize = 148;
/// Private data an application may put into a request for a datagram queue pair, bytes: 216 less
/// rdma_cm's header.
pub const SIDR_REQ_PRIVATE_MAX: usize = 216 - CMA_LEN;
/// Private data of the reply to it, bytes.
pub const SIDR_REP_PRIVATE_MAX: usize = 136;
/// Length of rdma_cm's own header at the start of a request's private data, bytes.
const CMA_LEN: usize = 36;

mod attribute {
    pub const REQ: u16 = 0x0010;
    pub const MRA: u16 = 0x0011;
    pub const REJ: u16 = 0x0012;
    pub const REP: u16 = 0x0013;
    pub const RTU: u16 = 0x0014;
    pub const DREQ: u16 = 0x0015;
    pub const DREP: u16 = 0x0016;
    pub const SIDR_REQ: u16 = 0x0017;
    pub const SIDR_REP: u16 = 0x0018;
}

/// A communication id: each side's name for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct CommId(pub u32);

/// What a listener listens on and a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceId(pub u64);

impl ServiceId {
    /// The service that rdma_cm derives from a port of its TCP port space.
    #[must_use]
    pub const fn tcp(port: u16) -> Self {
        Self(0x0106 << 16 | port as u64)
    }

    /// The service that rdma_cm derives from a port of its UDP port space.
    #[must_use]
    pub const fn udp(port: u16) -> Self {
        Self(0x0111 << 16 | port as u64)
    }

    /// The port, if the service is of one of rdma_cm's port spaces.
    #[must_use]
    pub const fn port(self) -> Option<u16> {
        match self.0 >> 16 {
            0x0106 | 0x0111 => Some(self.0 as u16),
            _ => None,
        }
    }
}

/// An IP address as a GID: IPv6 as it is, IPv4 mapped.
#[must_use]
pub const fn gid(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// The IP address of a GID.
#[must_use]
pub const fn address(gid: [u8; 16]) -> IpAddr {
    Ipv6Addr::from_octets(gid).to_canonical()
}

/// rdma_cm's header in a request: which IP addresses and client port the connection stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CmaHeader {
    /// The client's port in the port space of the service id.
    pub source_port: u16,
    /// The client.
    pub source: IpAddr,
    /// The server.
    pub target: IpAddr,
}

/// A connection request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Req<'a> {
    /// The client's name for the connection.
    pub local: CommId,
    /// What it wants to talk to.
    pub service: ServiceId,
    /// The client's channel adapter.
    pub ca_guid: u64,
    /// Its queue pair.
    pub qpn: Qpn,
    /// Transport of the queue pair: 0 RC, 1 UC, 3 extended.
    pub transport: u8,
    /// READs and atomics it will serve at once.
    pub responder_resources: u8,
    /// READs and atomics it wants to have under way at once.
    pub initiator_depth: u8,
    /// How fast the server should answer: exponent of 4.096 us.
    pub remote_response_timeout: u8,
    /// How fast the client answers.
    pub local_response_timeout: u8,
    /// The first PSN that the server shall send.
    pub psn: Psn,
    /// For the server's queue pair: transport retries.
    pub retry_count: u8,
    /// For the server's queue pair: RNR retries.
    pub rnr_retry: u8,
    /// Partition.
    pub pkey: u16,
    /// Path MTU.
    pub mtu: Mtu,
    /// How often the client resends.
    pub cm_retries: u8,
    /// It uses a shared receive queue.
    pub srq: bool,
    /// The client's GID.
    pub local_gid: [u8; 16],
    /// The server's GID.
    pub remote_gid: [u8; 16],
    /// Flow label, 20 bits.
    pub flow_label: u32,
    /// Packet rate, 6 bits.
    pub rate: u8,
    /// Traffic class.
    pub traffic_class: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Service level, 4 bits.
    pub service_level: u8,
    /// The peers share a subnet.
    pub subnet_local: bool,
    /// For the server's queue pair: local ACK timeout exponent.
    pub ack_timeout: u8,
    /// rdma_cm's header; `None` where a peer speaks the bare protocol.
    pub cma: Option<CmaHeader>,
    /// The application's data; padded with zeros on the wire.
    pub private_data: &'a [u8],
}

/// A reply: the server accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rep<'a> {
    /// The server's name for the connection.
    pub local: CommId,
    /// The client's.
    pub remote: CommId,
    /// The server's queue pair.
    pub qpn: Qpn,
    /// The first PSN that the client shall send.
    pub psn: Psn,
    /// READs and atomics it will serve at once.
    pub responder_resources: u8,
    /// READs and atomics it will have under way at once.
    pub initiator_depth: u8,
    /// How long it may take to acknowledge: exponent of 4.096 us.
    pub target_ack_delay: u8,
    /// End-to-end flow control.
    pub flow_control: bool,
    /// For the client's queue pair: RNR retries.
    pub rnr_retry: u8,
    /// It uses a shared receive queue.
    pub srq: bool,
    /// The server's channel adapter.
    pub ca_guid: u64,
    /// The application's data; padded with zeros on the wire.
    pub private_data: &'a [u8],
}

/// A rejection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rej<'a> {
    /// The rejecting side's name for the connection; 0 if it has none.
    pub local: CommId,
    /// The rejected side's.
    pub remote: CommId,
    /// Which message is rejected: 0 a request, 1 a reply, 2 neither.
    pub message: u8,
    /// Why: see [`reason`].
    pub reason: u16,
    /// The rejecting side's channel adapter: part of a rejection for [`reason::TIMEOUT`], which is
    /// found by it where ids are not known yet. 0 with other reasons.
    pub ca_guid: u64,
    /// The application's data; padded with zeros on the wire.
    pub private_data: &'a [u8],
}

/// A request for the address of a datagram queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SidrReq<'a> {
    /// The client's name for the request.
    pub request: CommId,
    /// Partition.
    pub pkey: u16,
    /// What it wants to talk to.
    pub service: ServiceId,
    /// rdma_cm's header; `None` where a peer speaks the bare protocol.
    pub cma: Option<CmaHeader>,
    /// The application's data; padded with zeros on the wire.
    pub private_data: &'a [u8],
}

/// The answer to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SidrRep<'a> {
    /// The client's name for the request.
    pub request: CommId,
    /// 0, or why there is no address: see [`sidr_status`].
    pub status: u8,
    /// The datagram queue pair.
    pub qpn: Qpn,
    /// What was asked for.
    pub service: ServiceId,
    /// What the queue pair's datagrams must carry.
    pub qkey: u32,
    /// The application's data; padded with zeros on the wire.
    pub private_data: &'a [u8],
}

/// Status of an answer about a datagram queue pair.
pub mod sidr_status {
    /// Here it is.
    pub const SUCCESS: u8 = 0;
    /// Nobody listens.
    pub const UNSUPPORTED: u8 = 1;
    /// The application refuses.
    pub const REJECT: u8 = 2;
    /// No queue pair available.
    pub const NO_QP: u8 = 3;
}

/// Reasons of a rejection.
pub mod reason {
    /// No queue pair available.
    pub const NO_QP: u16 = 1;
    /// No resources.
    pub const NO_RESOURCES: u16 = 3;
    /// The handshake took too long.
    pub const TIMEOUT: u16 = 4;
    /// No such communication id.
    pub const INVALID_COMM_ID: u16 = 6;
    /// Nobody listens.
    pub const INVALID_SERVICE_ID: u16 = 8;
    /// The queue pair is of a type that is not served.
    pub const INVALID_TRANSPORT: u16 = 9;
    /// A connection of an earlier life.
    pub const STALE_CONNECTION: u16 = 10;
    /// Path MTU not supported.
    pub const INVALID_MTU: u16 = 26;
    /// The application refuses.
    pub const CONSUMER: u16 = 28;
}

/// A message between connection managers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(
    missing_docs,
    reason = "the names are the IBTA's; the fields are documented above"
)]
pub enum Message<'a> {
    Req(Req<'a>),
    /// The receiver needs more time: `timeout` as an exponent of 4.096 us.
    Mra {
        local: CommId,
        remote: CommId,
        message: u8,
        timeout: u8,
    },
    Rej(Rej<'a>),
    Rep(Rep<'a>),
    /// Ready to use.
    Rtu {
        local: CommId,
        remote: CommId,
    },
    /// Disconnect; `qpn` is the receiver's.
    Dreq {
        local: CommId,
        remote: CommId,
        qpn: Qpn,
    },
    /// Disconnected.
    Drep {
        local: CommId,
        remote: CommId,
    },
    SidrReq(SidrReq<'a>),
    SidrRep(SidrRep<'a>),
}

/// Why bytes are not a message of the connection manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BadMad {
    /// Not 256 bytes.
    Length,
    /// Version, class or method of another service.
    Header,
    /// An attribute this crate does not serve.
    Attribute(u16),
    /// A field out of its range.
    Field,
}

impl<'a> Message<'a> {
    /// Read a datagram: its transaction id and the message.
    ///
    /// # Errors
    ///
    /// [`BadMad`]; such datagrams are dropped.
    pub fn decode(mad: &'a [u8]) -> Result<(u64, Self), BadMad> {
        let mad: &'a [u8; MAD_LEN] = mad.try_into().map_err(|_| BadMad::Length)?;
        // Base version 1, class 7 of version 2, method Send.
        if mad[..4] != [1, 7, 2, 3] {
            return Err(BadMad::Header);
        }
        let tid = u64(mad, 8);
        let attribute = u16(mad, 16);
        let body: &'a [u8] = &mad[HEADER_LEN..];
        let (local, remote) = (CommId(u32(body, 0)), CommId(u32(body, 4)));
        let message = match attribute {
            attribute::REQ => Self::Req(layout::req(body)?),
            attribute::MRA => Self::Mra {
                local,
                remote,
                message: body[8] >> 6,
                timeout: body[9] >> 3,
            },
            attribute::REJ => Self::Rej(layout::rej(body)),
            attribute::REP => Self::Rep(layout::rep(body)),
            attribute::RTU => Self::Rtu { local, remote },
            attribute::DREQ => Self::Dreq {
                local,
                remote,
                qpn: Qpn::new(u24(body, 8)),
            },
            attribute::DREP => Self::Drep { local, remote },
            attribute::SIDR_REQ => Self::SidrReq(layout::sidr_req(body)),
            attribute::SIDR_REP => Self::SidrRep(layout::sidr_rep(body)),
            other => return Err(BadMad::Attribute(other)),
        };
        Ok((tid, message))
    }

    /// Write a datagram.
    ///
    /// # Panics
    ///
    /// If private data is longer than the message has room for: a bug of the caller.
    #[must_use]
    pub fn encode(&self, tid: u64) -> [u8; MAD_LEN] {
        let mut mad = [0; MAD_LEN];
        mad[..4].copy_from_slice(&[1, 7, 2, 3]);
        mad[8..16].copy_from_slice(&tid.to_be_bytes());
        mad[16..18].copy_from_slice(&self.attribute().to_be_bytes());
        let body = &mut mad[HEADER_LEN..];
        match self {
            Self::Req(req) => layout::put_req(req, body),
            Self::Rep(rep) => layout::put_rep(rep, body),
            Self::SidrReq(req) => layout::put_sidr_req(req, body),
            Self::SidrRep(rep) => layout::put_sidr_rep(rep, body),
            Self::Rej(rej) => layout::put_rej(rej, body),
            Self::Mra {
                local,
                remote,
                message,
                timeout,
            } => {
                layout::put_ids(body, *local, *remote);
                (body[8], body[9]) = (message << 6, timeout << 3);
            }
            Self::Rtu { local, remote } | Self::Drep { local, remote } => {
                layout::put_ids(body, *local, *remote);
            }
            Self::Dreq { local, remote, qpn } => {
                layout::put_ids(body, *local, *remote);
                layout::put24(body, 8, qpn.value());
            }
        }
        mad
    }

    const fn attribute(&self) -> u16 {
        match self {
            Self::Req(_) => attribute::REQ,
            Self::Mra { .. } => attribute::MRA,
            Self::Rej(_) => attribute::REJ,
            Self::Rep(_) => attribute::REP,
            Self::Rtu { .. } => attribute::RTU,
            Self::Dreq { .. } => attribute::DREQ,
            Self::Drep { .. } => attribute::DREP,
            Self::SidrReq(_) => attribute::SIDR_REQ,
            Self::SidrRep(_) => attribute::SIDR_REP,
        }
    }
}
