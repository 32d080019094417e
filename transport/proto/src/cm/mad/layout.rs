//! Where the fields of the messages lie; offsets count from the end of the 24-byte MAD header.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{
    BODY_LEN, BadMad, CMA_LEN, CmaHeader, CommId, REJ_PRIVATE_MAX, REP_PRIVATE_MAX, Rej, Rep, Req,
    SIDR_REP_PRIVATE_MAX, ServiceId, SidrRep, SidrReq, reason,
};
use crate::wire::{Mtu, Psn, Qpn};

pub(super) fn req(body: &[u8]) -> Result<Req<'_>, BadMad> {
    let private = &body[140..BODY_LEN];
    let (cma, private_data) = split_private(private);
    Ok(Req {
        local: CommId(u32(body, 0)),
        service: ServiceId(u64(body, 8)),
        ca_guid: u64(body, 16),
        qpn: Qpn::new(u24(body, 32)),
        transport: body[43] >> 1 & 3,
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
        private_data,
    })
}

pub(super) fn put_req(req: &Req<'_>, body: &mut [u8]) {
    put_ids(body, req.local, CommId(0));
    put64(body, 8, req.service.0);
    put64(body, 16, req.ca_guid);
    put24(body, 32, req.qpn.value());
    body[35] = req.responder_resources;
    body[39] = req.initiator_depth;
    body[43] = req.remote_response_timeout << 3 | (req.transport & 3) << 1;
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
    put_request_private(&mut body[140..BODY_LEN], req.cma.as_ref(), req.private_data);
}

pub(super) fn rep(body: &[u8]) -> Rep<'_> {
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

pub(super) fn put_rep(rep: &Rep<'_>, body: &mut [u8]) {
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

pub(super) fn rej(body: &[u8]) -> Rej<'_> {
    let reason = u16(body, 10);
    let has_guid = reason == reason::TIMEOUT && body[9] >> 1 >= 8;
    Rej {
        local: CommId(u32(body, 0)),
        remote: CommId(u32(body, 4)),
        message: body[8] >> 6,
        reason,
        ca_guid: if has_guid { u64(body, 12) } else { 0 },
        private_data: &body[84..84 + REJ_PRIVATE_MAX],
    }
}

pub(super) fn put_rej(rej: &Rej<'_>, body: &mut [u8]) {
    put_ids(body, rej.local, rej.remote);
    body[8] = rej.message << 6;
    body[10..12].copy_from_slice(&rej.reason.to_be_bytes());
    if rej.reason == reason::TIMEOUT {
        body[9] = 8 << 1;
        put64(body, 12, rej.ca_guid);
    }
    put_private(&mut body[84..84 + REJ_PRIVATE_MAX], rej.private_data);
}

pub(super) fn sidr_req(body: &[u8]) -> SidrReq<'_> {
    let (cma, private_data) = split_private(&body[16..BODY_LEN]);
    SidrReq {
        request: CommId(u32(body, 0)),
        pkey: u16(body, 4),
        service: ServiceId(u64(body, 8)),
        cma,
        private_data,
    }
}

pub(super) fn put_sidr_req(req: &SidrReq<'_>, body: &mut [u8]) {
    body[..4].copy_from_slice(&req.request.0.to_be_bytes());
    body[4..6].copy_from_slice(&req.pkey.to_be_bytes());
    put64(body, 8, req.service.0);
    put_request_private(&mut body[16..BODY_LEN], req.cma.as_ref(), req.private_data);
}

pub(super) fn sidr_rep(body: &[u8]) -> SidrRep<'_> {
    SidrRep {
        request: CommId(u32(body, 0)),
        status: body[4],
        qpn: Qpn::new(u24(body, 8)),
        service: ServiceId(u64(body, 12)),
        qkey: u32(body, 20),
        private_data: &body[96..96 + SIDR_REP_PRIVATE_MAX],
    }
}

pub(super) fn put_sidr_rep(rep: &SidrRep<'_>, body: &mut [u8]) {
    body[..4].copy_from_slice(&rep.request.0.to_be_bytes());
    body[4] = rep.status;
    put24(body, 8, rep.qpn.value());
    put64(body, 12, rep.service.0);
    body[20..24].copy_from_slice(&rep.qkey.to_be_bytes());
    put_private(&mut body[96..96 + SIDR_REP_PRIVATE_MAX], rep.private_data);
}

/// A request's private data: rdma_cm's header, if there is one, and the application's.
fn split_private(private: &[u8]) -> (Option<CmaHeader>, &[u8]) {
    match cma_header(private) {
        Some(cma) => (Some(cma), &private[CMA_LEN..]),
        None => (None, private),
    }
}

fn put_request_private(private: &mut [u8], cma: Option<&CmaHeader>, data: &[u8]) {
    match cma {
        Some(cma) => {
            put_cma(cma, private);
            put_private(&mut private[CMA_LEN..], data);
        }
        None => put_private(private, data),
    }
}

/// rdma_cm's header, if the private data starts with one: version 0, then an IP version.
fn cma_header(private: &[u8]) -> Option<CmaHeader> {
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

fn put_cma(cma: &CmaHeader, private: &mut [u8]) {
    private[1] = if cma.source.is_ipv4() { 0x40 } else { 0x60 };
    private[2..4].copy_from_slice(&cma.source_port.to_be_bytes());
    for (at, end) in [(4, cma.source), (20, cma.target)] {
        match end {
            IpAddr::V4(v4) => private[at + 12..at + 16].copy_from_slice(&v4.octets()),
            IpAddr::V6(v6) => private[at..at + 16].copy_from_slice(&v6.octets()),
        }
    }
}

pub(super) fn u16(b: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([b[at], b[at + 1]])
}

pub(super) fn u24(b: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([0, b[at], b[at + 1], b[at + 2]])
}

pub(super) fn u32(b: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

pub(super) fn u64(b: &[u8], at: usize) -> u64 {
    u64::from(u32(b, at)) << 32 | u64::from(u32(b, at + 4))
}

fn gid_at(b: &[u8], at: usize) -> [u8; 16] {
    let mut gid = [0; 16];
    gid.copy_from_slice(&b[at..at + 16]);
    gid
}

pub(super) fn put24(b: &mut [u8], at: usize, value: u32) {
    b[at..at + 3].copy_from_slice(&value.to_be_bytes()[1..]);
}

fn put64(b: &mut [u8], at: usize, value: u64) {
    b[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

pub(super) fn put_ids(b: &mut [u8], local: CommId, remote: CommId) {
    b[..4].copy_from_slice(&local.0.to_be_bytes());
    b[4..8].copy_from_slice(&remote.0.to_be_bytes());
}

pub(super) fn put_private(area: &mut [u8], data: &[u8]) {
    assert!(data.len() <= area.len());
    area[..data.len()].copy_from_slice(data);
}
