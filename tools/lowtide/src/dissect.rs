//! What a RoCEv2 packet says, in words and as plain data.
//!
//! Owns: which datagrams of a capture count as RoCEv2, the verdict on the ICRC, and the names of
//! management datagrams. The formats themselves are `lowtide_transport_proto`'s.
//!
//! A datagram to or from UDP port 4791, or a port named by the user, is RoCEv2, and malformed if it
//! does not parse. On any other port it is RoCEv2 exactly if it parses and its ICRC is right, which
//! chance gets past once in 2^32.

mod management;

use std::fmt::{self, Write as _};
use std::net::SocketAddr;

use lowtide_transport::pcap::{Datagram, Frame};
use lowtide_transport_proto::icrc::{self, Ip};
use lowtide_transport_proto::wire::{
    Aeth, BTH_LEN, Extension, ICRC_LEN, Malformed, NakCode, Packet, Qpn, Reth, Syndrome, UDP_PORT,
};
use serde::Serialize;
use serde_json::{Value, json};

/// The longest RoCEv2 packet, bytes of UDP payload: longest header, 4096 bytes, ICRC.
const PACKET_MAX: usize = 40 + 4096 + 4;
/// The shortest: BTH and ICRC.
const SEGMENT_MIN: usize = BTH_LEN + ICRC_LEN;

/// What a frame is.
#[derive(Clone, Debug, PartialEq)]
pub enum Finding {
    /// Nothing of RoCEv2.
    Other,
    /// A datagram on a port of RoCEv2 that is no packet.
    Malformed {
        /// From where.
        source: SocketAddr,
        /// To where.
        target: SocketAddr,
        /// What is wrong.
        why: String,
    },
    /// A packet.
    Packet(Box<Explained>),
}

/// A packet in words.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explained {
    /// From where.
    pub source: SocketAddr,
    /// To where.
    pub target: SocketAddr,
    /// The code of the opcode.
    pub opcode: u8,
    /// Its name.
    pub name: String,
    /// The queue pair that it goes to.
    pub qpn: u32,
    /// Packet sequence number.
    pub psn: u32,
    /// Partition key.
    pub pkey: u16,
    /// The receiver shall acknowledge.
    pub ack_req: bool,
    /// The receiver's completion is a solicited one.
    pub solicited: bool,
    /// MigReq.
    pub mig_req: bool,
    /// Forward congestion notification.
    pub fecn: bool,
    /// Backward congestion notification.
    pub becn: bool,
    /// Pad bytes after the payload.
    pub pad: u8,
    /// Bytes of payload.
    pub payload: usize,
    /// The headers between BTH and payload, by their names.
    #[serde(flatten)]
    pub extension: serde_json::Map<String, Value>,
    /// What a management datagram (queue pair 1) says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mad: Option<Value>,
    /// The invariant CRC.
    pub icrc: IcrcVerdict,
    /// The extension headers and the datagram in words.
    #[serde(skip)]
    pub words: String,
}

/// Whether the ICRC is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "verdict")]
pub enum IcrcVerdict {
    /// It is.
    Right {
        /// Its four bytes in the order of the wire, as Wireshark shows them.
        value: u32,
    },
    /// It is not.
    Wrong {
        /// What the packet has.
        value: u32,
        /// What it should have.
        expected: u32,
    },
    /// Part of the packet was not captured.
    Unknown,
}

/// Looks into a frame; `ports` are those of RoCEv2 besides 4791. Several findings are the datagrams
/// of a run that segmentation offload had not cut up yet when it was captured.
#[must_use]
pub fn explain(frame: &Frame, ports: &[u16]) -> Vec<Finding> {
    let Ok(datagram) = frame.datagram() else {
        return vec![Finding::Other];
    };
    match explain_datagram(&datagram, ports) {
        Finding::Malformed { .. } | Finding::Other => {
            let run = segments(&datagram);
            let packets = run.iter().filter_map(|segment| packet(segment).ok());
            let findings: Vec<Finding> = packets
                .map(|packet| Finding::Packet(Box::new(packet)))
                .collect();
            match run.is_empty() || findings.len() != run.len() {
                true => vec![explain_datagram(&datagram, ports)],
                false => findings,
            }
        }
        packet @ Finding::Packet(_) => vec![packet],
    }
}

/// The datagrams that a run will be cut into, found by the ICRC of the first; empty if it is none.
/// All but the last are of one length, and along them the Identification counts up.
fn segments<'a>(datagram: &Datagram<'a>) -> Vec<Datagram<'a>> {
    let bytes = datagram.payload;
    if datagram.missing > 0 || bytes.len() <= SEGMENT_MIN {
        return Vec::new();
    }
    let is_right = |len: usize| {
        let packet = Packet::new_checked(&bytes[..len]);
        packet.is_ok_and(|packet| icrc::check(&datagram.flow, &packet))
    };
    let longest = PACKET_MAX.min(bytes.len() - 1);
    let Some(len) = (SEGMENT_MIN..=longest)
        .step_by(4)
        .find(|&len| is_right(len))
    else {
        return Vec::new();
    };
    let start = match datagram.flow.ip {
        Ip::V4 { identification, .. } => identification,
        Ip::V6 { .. } => 0,
    };
    (0u16..)
        .zip(bytes.chunks(len))
        .map(|(i, payload)| Datagram {
            flow: datagram.flow.with_identification(start.wrapping_add(i)),
            payload,
            ..*datagram
        })
        .collect()
}

fn explain_datagram(datagram: &Datagram<'_>, ports: &[u16]) -> Finding {
    let (from, to) = (datagram.source.port(), datagram.target.port());
    let is_named = |port| port == UDP_PORT || ports.contains(&port);
    let is_roce = is_named(from) || is_named(to);
    match packet(datagram) {
        Ok(packet) if is_roce || matches!(packet.icrc, IcrcVerdict::Right { .. }) => {
            Finding::Packet(Box::new(packet))
        }
        Err(why) if is_roce => Finding::Malformed {
            source: datagram.source,
            target: datagram.target,
            why,
        },
        _ => Finding::Other,
    }
}

fn packet(datagram: &Datagram<'_>) -> Result<Explained, String> {
    let whole;
    let bytes = if datagram.missing == 0 {
        datagram.payload
    } else {
        // What was not captured is not looked at below, but for its length.
        whole = [datagram.payload, &vec![0; datagram.missing]].concat();
        &whole
    };
    let packet = Packet::new_checked(bytes).map_err(|error| words_of(error, bytes))?;
    if datagram.payload.len() < packet.header_bytes().len() {
        return Err("cut off in its headers".to_owned());
    }
    let icrc = if datagram.missing > 0 {
        IcrcVerdict::Unknown
    } else {
        let expected = icrc::expected(&datagram.flow, &packet).swap_bytes();
        let value = packet.icrc().swap_bytes();
        match value == expected {
            true => IcrcVerdict::Right { value },
            false => IcrcVerdict::Wrong { value, expected },
        }
    };
    let mut extension = serde_json::Map::new();
    let mut words = String::new();
    describe(packet.extension(), &mut extension, &mut words);
    let mad = (packet.dest() == Qpn::GSI && datagram.missing == 0)
        .then(|| management::explain(packet.payload(), &mut words));
    Ok(Explained {
        source: datagram.source,
        target: datagram.target,
        opcode: packet.opcode().code(),
        name: spaced(packet.row().name),
        qpn: packet.dest().value(),
        psn: packet.psn().value(),
        pkey: packet.pkey(),
        ack_req: packet.ack_req(),
        solicited: packet.solicited(),
        mig_req: packet.mig_req(),
        fecn: packet.fecn(),
        becn: packet.becn(),
        pad: packet.pad(),
        payload: packet.payload().len(),
        extension,
        mad,
        icrc,
        words,
    })
}

fn words_of(error: Malformed, bytes: &[u8]) -> String {
    match error {
        _ if bytes.len() > PACKET_MAX => format!("{} bytes are no packet", bytes.len()),
        Malformed::Short => format!("too short ({} bytes)", bytes.len()),
        Malformed::UnknownOpcode(code) => format!("unknown opcode {code:#04x}"),
        Malformed::Version(version) => format!("transport version {version}, expected 0"),
        Malformed::Unaligned => format!("{} bytes, not a multiple of four", bytes.len()),
        Malformed::Payload => {
            let code = bytes.first().copied().unwrap_or_default();
            format!(
                "{} bytes after the transport header, more or less than opcode {code:#04x} admits",
                bytes.len() - BTH_LEN
            )
        }
        other => format!("{other:?}"),
    }
}

/// "RcSendOnlyImm" as "RC Send Only Imm".
fn spaced(name: &str) -> String {
    let mut out = String::new();
    for (i, c) in name.char_indices() {
        if i > 0 && c.is_ascii_uppercase() {
            out.push(' ');
        }
        out.push(c);
    }
    for class in ["Rc", "Uc", "Ud", "Cnp"] {
        if let Some(rest) = out.strip_prefix(class) {
            return class.to_uppercase() + rest;
        }
    }
    out
}

fn describe(extension: Extension, data: &mut serde_json::Map<String, Value>, words: &mut String) {
    let mut put = |name: &str, value: Value, text: String| {
        data.insert(name.to_owned(), value);
        words.push_str("  ");
        words.push_str(&text);
    };
    let mut imm = None;
    match extension {
        Extension::Bare | Extension::Cnp => {}
        Extension::Imm(word) => imm = Some(word),
        Extension::Ieth(rkey) => put("ieth", json!({ "rkey": rkey }), invalidates(rkey)),
        Extension::Reth(reth) => put("reth", reth_data(reth), reth_words(reth)),
        Extension::RethImm(reth, word) => {
            put("reth", reth_data(reth), reth_words(reth));
            imm = Some(word);
        }
        Extension::Aeth(aeth) => put("aeth", aeth_data(aeth), aeth_words(aeth)),
        Extension::AtomicAck(aeth, original) => {
            put("aeth", aeth_data(aeth), aeth_words(aeth));
            let text = format!("original {original:#x}");
            put("atomic_ack", json!({ "original": original }), text);
        }
        Extension::Atomic(it) => {
            let text = format!(
                "va {:#x} rkey {:#x} swap/add {:#x} compare {:#x}",
                it.va, it.rkey, it.swap_add, it.compare
            );
            let value = json!({ "va": it.va, "rkey": it.rkey, "swap_add": it.swap_add,
                                "compare": it.compare });
            put("atomic", value, text);
        }
        Extension::Deth(deth) => put("deth", deth_data(deth), deth_words(deth)),
        Extension::DethImm(deth, word) => {
            put("deth", deth_data(deth), deth_words(deth));
            imm = Some(word);
        }
        Extension::FethReth(feth, reth) => {
            let value = json!({ "global": feth.global(), "persistent": feth.persistent(),
                                "whole_region": feth.whole_region() });
            put("feth", value, format!("{:#x}", feth.bits));
            put("reth", reth_data(reth), reth_words(reth));
        }
    }
    if let Some(word) = imm {
        put("imm", json!(word), format!("imm {word:#010x}"));
    }
}

fn invalidates(rkey: u32) -> String {
    format!("invalidates rkey {rkey:#x}")
}

fn reth_data(reth: Reth) -> Value {
    json!({ "va": reth.va, "rkey": reth.rkey, "len": reth.len })
}

fn reth_words(reth: Reth) -> String {
    format!("va {:#x} rkey {:#x} len {}", reth.va, reth.rkey, reth.len)
}

fn deth_data(deth: lowtide_transport_proto::wire::Deth) -> Value {
    json!({ "qkey": deth.qkey, "source_qpn": deth.source.value() })
}

fn deth_words(deth: lowtide_transport_proto::wire::Deth) -> String {
    format!("from qp {:#x} qkey {:#x}", deth.source.value(), deth.qkey)
}

fn aeth_data(aeth: Aeth) -> Value {
    let (kind, detail) = syndrome(aeth.syndrome);
    json!({ "kind": kind, "detail": detail, "syndrome": aeth.syndrome.byte(), "msn": aeth.msn })
}

fn aeth_words(aeth: Aeth) -> String {
    let (kind, detail) = syndrome(aeth.syndrome);
    format!("{kind} {detail} msn {}", aeth.msn)
}

fn syndrome(syndrome: Syndrome) -> (&'static str, String) {
    match syndrome {
        Syndrome::Ack { credit: 0x1F } => ("ACK", "without credits".to_owned()),
        Syndrome::Ack { credit } => ("ACK", format!("credit code {credit}")),
        Syndrome::Rnr(timer) => {
            let micros = timer.wait().0 / 1000;
            let text = format!("receiver not ready, again after {micros} us");
            ("RNR NAK", text)
        }
        Syndrome::Nak(code) => {
            let what = match code {
                NakCode::SequenceError => "PSN sequence error",
                NakCode::InvalidRequest => "invalid request",
                NakCode::RemoteAccess => "remote access error",
                NakCode::RemoteOperational => "remote operational error",
            };
            ("NAK", what.to_owned())
        }
        Syndrome::Unknown(byte) => ("unknown", format!("syndrome {byte:#04x}")),
    }
}

impl fmt::Display for Explained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut flags = String::new();
        for (is_set, text) in [
            (self.ack_req, " ack-req"),
            (self.solicited, " solicited"),
            (self.mig_req, " mig-req"),
            (self.fecn, " fecn"),
            (self.becn, " becn"),
        ] {
            flags.push_str(if is_set { text } else { "" });
        }
        if self.pkey != 0xFFFF {
            let _ = write!(flags, " pkey {:#06x}", self.pkey);
        }
        write!(
            f,
            "{} > {}  {}  qp {:#08x} psn {}{flags}{}  {} bytes  {}",
            self.source,
            self.target,
            self.name,
            self.qpn,
            self.psn,
            self.words,
            self.payload,
            self.icrc
        )
    }
}

impl fmt::Display for IcrcVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            IcrcVerdict::Right { .. } => f.write_str("icrc right"),
            IcrcVerdict::Wrong { value, expected } => {
                write!(f, "icrc WRONG: {value:#010x}, expected {expected:#010x}")
            }
            IcrcVerdict::Unknown => f.write_str("icrc unknown: not all was captured"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowtide_transport::pcap::Reader;

    fn golden(name: &str) -> Vec<Frame> {
        let captures = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../transport/proto/tests/captures/"
        );
        let file = std::fs::File::open(format!("{captures}{name}.pcap")).unwrap();
        let mut reader = Reader::new(file).unwrap();
        std::iter::from_fn(|| reader.next_frame().unwrap()).collect()
    }

    fn one(frame: &Frame, ports: &[u16]) -> Finding {
        let mut findings = explain(frame, ports);
        assert_eq!(findings.len(), 1);
        findings.remove(0)
    }

    fn explained(frame: &Frame) -> Explained {
        match one(frame, &[]) {
            Finding::Packet(packet) => *packet,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_run_that_is_not_cut_up_yet_is_several_packets() {
        let capture = golden("rc-pingpong-5000");
        let datagrams: Vec<_> = capture.iter().map(|f| f.datagram().unwrap()).collect();
        // First, Middle, Last of one message, with Identifications that count up, in one frame.
        let first = datagrams.iter().position(|d| d.payload[0] == 0).unwrap();
        let (mut payload, flow) = (Vec::new(), datagrams[first].flow.with_identification(7));
        for (i, part) in datagrams[first..first + 2].iter().enumerate() {
            // Only equal ones, then a shorter one.
            let flow = flow.with_identification(7 + i as u16);
            let end = part.payload.len() - if i == 1 { 204 } else { 4 };
            let mut bytes = part.payload[..end].to_vec();
            if i == 1 {
                bytes[0] = 2; // Last
            }
            let whole = [&bytes[..], &[0; 4]].concat();
            let packet = Packet::new_checked(&whole).unwrap();
            bytes.extend(icrc::expected(&flow, &packet).to_le_bytes());
            payload.extend(bytes);
        }
        let mut frame = capture[first].clone();
        frame.bytes.truncate(42);
        frame.bytes.extend(&payload);
        let udp_len = (payload.len() + 8) as u16;
        frame.bytes[16..18].copy_from_slice(&(udp_len + 20).to_be_bytes());
        frame.bytes[18..20].copy_from_slice(&7u16.to_be_bytes());
        frame.bytes[38..40].copy_from_slice(&udp_len.to_be_bytes());
        let names: Vec<String> = explain(&frame, &[])
            .into_iter()
            .map(|finding| match finding {
                Finding::Packet(p) if matches!(p.icrc, IcrcVerdict::Right { .. }) => p.name,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(names, ["RC Send First", "RC Send Last"]);
    }

    #[test]
    fn packets_of_the_kernel_are_told_in_words() {
        let told = |name: &str, number: usize| explained(&golden(name)[number]).to_string();
        assert_eq!(
            told("rc-pingpong-64", 0),
            "10.9.0.1:49441 > 10.9.0.2:4791  RC Send Only  qp 0x000011 psn 11090318 ack-req  \
             64 bytes  icrc right"
        );
        assert!(told("pv-nak-access-rkey", 1).contains("NAK remote access error msn 0"));
        assert!(
            told("pv-rnr-recover", 1).contains("RNR NAK receiver not ready, again after 61440 us")
        );
        assert!(told("pv-send-imm", 0).contains("RC Send Only Imm"));
        assert!(told("read-bw-64", 0).contains("  va 0x"));
        assert!(
            told("rping", 0).contains("CM ConnectRequest"),
            "{}",
            told("rping", 0)
        );
    }

    #[test]
    fn damage_is_named_and_other_traffic_passed_over() {
        let frame = golden("rc-pingpong-64").swap_remove(0);
        let with = |change: fn(&mut Frame)| {
            let mut frame = frame.clone();
            change(&mut frame);
            one(&frame, &[])
        };
        let Finding::Packet(wrong) = with(|f| *f.bytes.last_mut().unwrap() ^= 1) else {
            panic!()
        };
        assert!(
            wrong
                .to_string()
                .contains("icrc WRONG: 0xf3d5362c, expected 0xf3d5362d")
        );
        let Finding::Packet(cut) = with(|f| f.bytes.truncate(60)) else {
            panic!()
        };
        assert_eq!((cut.icrc, cut.payload), (IcrcVerdict::Unknown, 64));
        for (change, why) in [
            (
                (|f| f.bytes[42] = 0x1F) as fn(&mut Frame),
                "unknown opcode 0x1f",
            ),
            (|f| f.bytes[43] |= 5, "transport version 5"),
            (|f| f.bytes.truncate(50), "cut off in its headers"),
            (|f| f.bytes[42] = 0x11, "than opcode 0x11 admits"),
        ] {
            match with(change) {
                Finding::Malformed { why: told, .. } => assert!(told.contains(why), "{told}"),
                other => panic!("{other:?}"),
            }
        }
        // Another port: a packet only while its ICRC says so.
        let moved = |f: &mut Frame| f.bytes[36..38].copy_from_slice(&5000u16.to_be_bytes());
        let mut elsewhere = frame.clone();
        moved(&mut elsewhere);
        assert_eq!(one(&elsewhere, &[]), Finding::Other);
        assert!(matches!(one(&elsewhere, &[5000]), Finding::Packet(_)));
        let Finding::Packet(packet) = one(&elsewhere, &[5000]) else {
            panic!()
        };
        let IcrcVerdict::Wrong { expected, .. } = packet.icrc else {
            panic!()
        };
        let end = elsewhere.bytes.len() - 4;
        elsewhere.bytes[end..].copy_from_slice(&expected.to_be_bytes());
        assert!(matches!(one(&elsewhere, &[]), Finding::Packet(_)));
    }

    #[test]
    fn no_flipped_byte_panics() {
        for name in ["rping", "atomic-bw-cas", "pv-send-inv"] {
            for frame in golden(name).iter().take(6) {
                for at in 0..frame.bytes.len() {
                    for flip in [0xFF, 0x01, 0x80] {
                        let mut damaged = frame.clone();
                        damaged.bytes[at] ^= flip;
                        if let Finding::Packet(packet) = one(&damaged, &[]) {
                            assert!(!serde_json::to_string(&packet).unwrap().is_empty());
                        }
                    }
                }
            }
        }
    }
}
