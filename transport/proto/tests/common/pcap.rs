//! Classic pcap files and the IP packets in them.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;

use lowtide_transport_proto::icrc::{Flow, Ip};

/// An IP packet of a capture file, from its version nibble to its ICRC.
pub struct Golden {
    pub file: String,
    pub number: usize,
    pub ip: Vec<u8>,
}

/// Every packet of every file in `tests/captures`.
pub fn golden() -> Vec<Golden> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/captures");
    let mut files: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|f| f.unwrap().path())
        .collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "pcap"));
    files.sort();
    let mut all = Vec::new();
    for path in files {
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes[..4], [0xd4, 0xc3, 0xb2, 0xa1], "little-endian pcap");
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
        let (mut at, mut number) = (24, 0);
        while at + 16 <= bytes.len() {
            let captured = word(at + 8);
            assert_eq!(captured, word(at + 12), "whole packets");
            let frame = &bytes[at + 16..at + 16 + captured];
            let ip_len = match frame[12..14] {
                [0x08, 0x00] => usize::from(u16::from_be_bytes([frame[16], frame[17]])),
                [0x86, 0xdd] => 40 + usize::from(u16::from_be_bytes([frame[18], frame[19]])),
                _ => panic!("IP only"),
            };
            number += 1;
            let file = path.file_name().unwrap().to_string_lossy().into_owned();
            all.push(Golden {
                file,
                number,
                ip: frame[14..14 + ip_len].to_vec(),
            });
            at += 16 + captured;
        }
    }
    all
}

impl Golden {
    pub fn is_ipv4(&self) -> bool {
        self.ip[0] >> 4 == 4
    }

    /// Length of IP and UDP header.
    pub fn headers(&self) -> usize {
        if self.is_ipv4() { 28 } else { 48 }
    }

    pub fn udp_payload(&self) -> &[u8] {
        &self.ip[self.headers()..]
    }
}

/// What a receiver that sees the IP header makes of it: the flow, if header and lengths are in
/// order.
pub fn parse(ip: &[u8]) -> Option<(Flow, &[u8])> {
    let be16 = |at: usize| u16::from_be_bytes([ip[at], ip[at + 1]]);
    let (network, udp) = match ip[0] >> 4 {
        4 => {
            if ip[0] != 0x45 || usize::from(be16(2)) != ip.len() || ip[9] != 17 {
                return None;
            }
            let octets = |at: usize| <[u8; 4]>::try_from(&ip[at..at + 4]).unwrap();
            let network = Ip::V4 {
                source: Ipv4Addr::from(octets(12)),
                target: Ipv4Addr::from(octets(16)),
                identification: be16(4),
                flags: be16(6),
            };
            (network, 20)
        }
        6 => {
            if usize::from(be16(4)) + 40 != ip.len() || ip[6] != 17 {
                return None;
            }
            let octets = |at: usize| <[u8; 16]>::try_from(&ip[at..at + 16]).unwrap();
            let network = Ip::V6 {
                source: Ipv6Addr::from(octets(8)),
                target: Ipv6Addr::from(octets(24)),
            };
            (network, 40)
        }
        _ => return None,
    };
    if usize::from(be16(udp + 4)) != ip.len() - udp {
        return None;
    }
    let flow = Flow {
        ip: network,
        source_port: be16(udp),
        target_port: be16(udp + 2),
    };
    Some((flow, &ip[udp + 8..]))
}
