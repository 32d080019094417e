//! The connection manager's messages: 256-byte management datagrams of class 7.
//!
//! Owns their byte layout. [`Message::decode`] borrows from the datagram, [`Message::encode`] fills
//! one; fields that Linux leaves zero or constant on RoCEv2 (LIDs, alternate paths, end-to-end
//! contexts) are emitted so and ignored when read.
//!
//! Absent: path migration (LAP, APR), service id resolution for datagrams (SIDR).
//! Source: Linux `ibta_vol1_c12.h`, `cm_msgs.h`, `cma.c`.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::wire::{Mtu, Psn, Qpn};

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
    /// READs and atomics it will serve at once.
    pub responder_resources: u8,
    /// READs and atomics it wants to have under way at once.
    pub initiator_depth: u8,
    /// How fast the server should answer: exponent of 4.096 us.
    pub remote_response_timeout: u8,
    /// How fast the client answers.
    pub local_response_timeout: u8,
    /// Its first PSN.
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
    /// Its first PSN.
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
    /// The application's data; padded with zeros on the wire.
    pub private_data: &'a [u8],
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
            attribute::REQ => Self::Req(decode_req(body)?),
            attribute::MRA => Self::Mra {
                local,
                remote,
                message: body[8] >> 6,
                timeout: body[9] >> 3,
            },
            attribute::REJ => Self::Rej(Rej {
                local,
                remote,
                message: body[8] >> 6,
                reason: u16(body, 10),
                private_data: &body[84..84 + REJ_PRIVATE_MAX],
            }),
            attribute::REP => Self::Rep(decode_rep(body)),
            attribute::RTU => Self::Rtu { local, remote },
            attribute::DREQ => Self::Dreq {
                local,
                remote,
                qpn: Qpn::new(u24(body, 8)),
            },
            attribute::DREP => Self::Drep { local, remote },
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
            Self::Req(req) => encode_req(req, body),
            Self::Rep(rep) => encode_rep(rep, body),
            Self::Rej(rej) => {
                put_ids(body, rej.local, rej.remote);
                body[8] = rej.message << 6;
                body[10..12].copy_from_slice(&rej.reason.to_be_bytes());
                put_private(&mut body[84..84 + REJ_PRIVATE_MAX], rej.private_data);
            }
            Self::Mra {
                local,
                remote,
                message,
                timeout,
            } => {
                put_ids(body, *local, *remote);
                (body[8], body[9]) = (message << 6, timeout << 3);
            }
            Self::Rtu { local, remote } | Self::Drep { local, remote } => {
                put_ids(body, *local, *remote);
            }
            Self::Dreq { local, remote, qpn } => {
                put_ids(body, *local, *remote);
                put24(body, 8, qpn.value());
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
        }
    }
}

fn decode_req(body: &[u8]) -> Result<Req<'_>, BadMad> {
    let private = &body[140..BODY_LEN];
    let cma = decode_cma(private);
    Ok(Req {
        local: CommId(u32(body, 0)),
        service: ServiceId(u64(body, 8)),
        ca_guid: u64(body, 16),
        qpn: Qpn::new(u24(body, 32)),
        responder_resources: body[35],
        initiator_depth: body[39],
        remote_response_timeout: body[43] >> 3,
        psn: Psn::new(u24(body, 44)),
        local_response_timeout: body[47] >> 3,
        retry_count: body[47] & 7,
        pkey: u16(body, 48),
        mtu: Mtu::from_code(body[50] >> 4).ok_or(BadMad::Field)?,
        rnr_retry: body[50] & 7,
        cm_retries: body[51] >> 4,
        srq: body[51] & 8 != 0,
        local_gid: gid_at(body, 56),
        remote_gid: gid_at(body, 72),
        flow_label: u24(body, 88) >> 4,
        rate: body[91] & 0x3f,
        traffic_class: body[92],
        hop_limit: body[93],
        service_level: body[94] >> 4,
        subnet_local: body[94] & 8 != 0,
        ack_timeout: body[95] >> 3,
        cma,
        private_data: if cma.is_some() {
            &private[CMA_LEN..]
        } else {
            private
        },
    })
}

fn encode_req(req: &Req<'_>, body: &mut [u8]) {
    put_ids(body, req.local, CommId(0));
    put64(body, 8, req.service.0);
    put64(body, 16, req.ca_guid);
    put24(body, 32, req.qpn.value());
    body[35] = req.responder_resources;
    body[39] = req.initiator_depth;
    body[43] = req.remote_response_timeout << 3; // transport type 0: RC
    put24(body, 44, req.psn.value());
    body[47] = req.local_response_timeout << 3 | req.retry_count & 7;
    body[48..50].copy_from_slice(&req.pkey.to_be_bytes());
    body[50] = (req.mtu as u8) << 4 | req.rnr_retry & 7;
    body[51] = req.cm_retries << 4 | u8::from(req.srq) << 3;
    body[52..56].fill(0xff); // both LIDs permissive
    body[56..72].copy_from_slice(&req.local_gid);
    body[72..88].copy_from_slice(&req.remote_gid);
    put24(body, 88, req.flow_label << 4);
    body[91] = req.rate & 0x3f;
    body[92] = req.traffic_class;
    body[93] = req.hop_limit;
    body[94] = req.service_level << 4 | u8::from(req.subnet_local) << 3;
    body[95] = req.ack_timeout << 3;
    let private = &mut body[140..BODY_LEN];
    match &req.cma {
        Some(cma) => {
            encode_cma(cma, private);
            put_private(&mut private[CMA_LEN..], req.private_data);
        }
        None => put_private(private, req.private_data),
    }
}

fn decode_rep(body: &[u8]) -> Rep<'_> {
    Rep {
        local: CommId(u32(body, 0)),
        remote: CommId(u32(body, 4)),
        qpn: Qpn::new(u24(body, 12)),
        psn: Psn::new(u24(body, 20)),
        responder_resources: body[24],
        initiator_depth: body[25],
        target_ack_delay: body[26] >> 3,
        flow_control: body[26] & 1 != 0,
        rnr_retry: body[27] >> 5,
        srq: body[27] & 0x10 != 0,
        ca_guid: u64(body, 28),
        private_data: &body[36..36 + REP_PRIVATE_MAX],
    }
}

fn encode_rep(rep: &Rep<'_>, body: &mut [u8]) {
    put_ids(body, rep.local, rep.remote);
    put24(body, 12, rep.qpn.value());
    put24(body, 20, rep.psn.value());
    body[24] = rep.responder_resources;
    body[25] = rep.initiator_depth;
    body[26] = rep.target_ack_delay << 3 | u8::from(rep.flow_control);
    body[27] = rep.rnr_retry << 5 | u8::from(rep.srq) << 4;
    put64(body, 28, rep.ca_guid);
    put_private(&mut body[36..36 + REP_PRIVATE_MAX], rep.private_data);
}

/// rdma_cm's header, if the private data starts with one: version 0, then an IP version.
fn decode_cma(private: &[u8]) -> Option<CmaHeader> {
    let end = |at: usize| {
        let bytes = gid_at(private, at);
        match private[1] >> 4 {
            4 => Some(IpAddr::V4(Ipv4Addr::new(
                bytes[12], bytes[13], bytes[14], bytes[15],
            ))),
            6 => Some(IpAddr::V6(Ipv6Addr::from_octets(bytes))),
            _ => None,
        }
    };
    if private[0] != 0 {
        return None;
    }
    Some(CmaHeader {
        source_port: u16(private, 2),
        source: end(4)?,
        target: end(20)?,
    })
}

fn encode_cma(cma: &CmaHeader, private: &mut [u8]) {
    private[1] = if cma.source.is_ipv4() { 0x40 } else { 0x60 };
    private[2..4].copy_from_slice(&cma.source_port.to_be_bytes());
    for (at, end) in [(4, cma.source), (20, cma.target)] {
        match end {
            IpAddr::V4(v4) => private[at + 12..at + 16].copy_from_slice(&v4.octets()),
            IpAddr::V6(v6) => private[at..at + 16].copy_from_slice(&v6.octets()),
        }
    }
}

fn u16(b: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([b[at], b[at + 1]])
}

fn u24(b: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([0, b[at], b[at + 1], b[at + 2]])
}

fn u32(b: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

fn u64(b: &[u8], at: usize) -> u64 {
    u64::from(u32(b, at)) << 32 | u64::from(u32(b, at + 4))
}

fn gid_at(b: &[u8], at: usize) -> [u8; 16] {
    let mut gid = [0; 16];
    gid.copy_from_slice(&b[at..at + 16]);
    gid
}

fn put24(b: &mut [u8], at: usize, value: u32) {
    b[at..at + 3].copy_from_slice(&value.to_be_bytes()[1..]);
}

fn put64(b: &mut [u8], at: usize, value: u64) {
    b[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

fn put_ids(b: &mut [u8], local: CommId, remote: CommId) {
    b[..4].copy_from_slice(&local.0.to_be_bytes());
    b[4..8].copy_from_slice(&remote.0.to_be_bytes());
}

fn put_private(area: &mut [u8], data: &[u8]) {
    assert!(data.len() <= area.len());
    area[..data.len()].copy_from_slice(data);
}
