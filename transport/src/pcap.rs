//! Capture files: what a device sends and accepts, for Wireshark, tshark, scapy and
//! `lowtide dissect`; and files of anybody's read again.
//!
//! Owns: the file that a device writes and the IP and UDP headers in it, which are rebuilt, since a
//! socket does not see them. [`Reader`] reads pcap and pcapng, [`merge`] makes one file of several.
//! Sent packets have the Identification they are sealed for, received ones the one their ICRC was
//! solved for, so an independent check of the ICRC holds. A packet that the fault injector spoils
//! is in the file as it was sent; one that it loses is not.
//!
//! Invariant: a file that cannot be written to ends the capture, never the traffic.
//!
//! Source: the classic pcap format, link type 101 (raw IP).

mod merge;
mod read;

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::udp::without_sigxfsz;

pub use self::merge::{Merged, Piece, merge};
pub use self::read::{Datagram, FRAME_MAX, Frame, NoDatagram, ReadError, Reader};

const MAGIC_MICROSECONDS: u32 = 0xA1B2_C3D4;
const LINK_TYPE_RAW_IP: u32 = 101;
const PROTOCOL_UDP: u8 = 17;
const HOPS: u8 = 64;

/// A capture being written.
pub(crate) struct Capture {
    /// None after the first error.
    out: Option<BufWriter<Bounded>>,
}

/// A file that refuses to grow beyond what the process may write, instead of ending it.
struct Bounded(File);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        without_sigxfsz(|| self.0.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Capture {
    pub(crate) fn create(path: &Path) -> io::Result<Capture> {
        let mut out = BufWriter::new(Bounded(File::create(path)?));
        write_head(&mut out)?;
        Ok(Capture { out: Some(out) })
    }

    /// Writes one packet, whose UDP payload is the concatenation of `parts`.
    pub(crate) fn record(
        &mut self,
        source: SocketAddr,
        target: SocketAddr,
        identification: u16,
        parts: &[&[u8]],
    ) {
        if let Some(out) = &mut self.out
            && write(out, source, target, identification, parts).is_err()
        {
            self.out = None;
        }
    }
}

fn write_head(out: &mut impl Write) -> io::Result<()> {
    out.write_all(&MAGIC_MICROSECONDS.to_le_bytes())?;
    let words = [4 << 16 | 2u32, 0, 0, u32::from(u16::MAX), LINK_TYPE_RAW_IP];
    words
        .iter()
        .try_for_each(|word| out.write_all(&word.to_le_bytes()))
}

fn write(
    out: &mut impl Write,
    source: SocketAddr,
    target: SocketAddr,
    identification: u16,
    parts: &[&[u8]],
) -> io::Result<()> {
    let payload: usize = parts.iter().map(|part| part.len()).sum();
    let udp_len = (8 + payload) as u16;
    let mut headers = match (source.ip(), target.ip()) {
        (IpAddr::V4(source), IpAddr::V4(target)) => {
            let mut ip = vec![0x45, 0];
            ip.extend_from_slice(&(20 + udp_len).to_be_bytes());
            ip.extend_from_slice(&identification.to_be_bytes());
            ip.extend_from_slice(&[0x40, 0, HOPS, PROTOCOL_UDP, 0, 0]);
            ip.extend_from_slice(&source.octets());
            ip.extend_from_slice(&target.octets());
            let checksum = internet_checksum(&ip);
            ip[10..12].copy_from_slice(&checksum.to_be_bytes());
            ip
        }
        (IpAddr::V6(source), IpAddr::V6(target)) => {
            let mut ip = vec![0x60, 0, 0, 0];
            ip.extend_from_slice(&udp_len.to_be_bytes());
            ip.extend_from_slice(&[PROTOCOL_UDP, HOPS]);
            ip.extend_from_slice(&source.octets());
            ip.extend_from_slice(&target.octets());
            ip
        }
        _ => return Ok(()),
    };
    headers.extend_from_slice(&source.port().to_be_bytes());
    headers.extend_from_slice(&target.port().to_be_bytes());
    headers.extend_from_slice(&udp_len.to_be_bytes());
    headers.extend_from_slice(&[0, 0]);
    let time = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let len = (headers.len() + payload) as u32;
    for word in [time.as_secs() as u32, time.subsec_micros(), len, len] {
        out.write_all(&word.to_le_bytes())?;
    }
    out.write_all(&headers)?;
    parts.iter().try_for_each(|part| out.write_all(part))
}

/// The checksum of an IPv4 header whose own field is zero.
fn internet_checksum(header: &[u8]) -> u16 {
    let words = header
        .chunks_exact(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    let sum: u32 = words.sum();
    !((sum & 0xFFFF) + (sum >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_is_written_as_an_independent_hand_would() {
        let mut out = Vec::new();
        let source = "10.0.0.1:49152".parse().unwrap();
        let target = "10.0.0.2:4791".parse().unwrap();
        write(&mut out, source, target, 7, &[&[1, 2], &[3, 4, 5, 6]]).unwrap();
        let expected = [
            &[0x45, 0, 0, 34, 0, 7, 0x40, 0, 64, 17, 0x26, 0xC2][..],
            &[10, 0, 0, 1, 10, 0, 0, 2],
            &[0xC0, 0, 0x12, 0xB7, 0, 14, 0, 0],
            &[1, 2, 3, 4, 5, 6],
        ]
        .concat();
        assert_eq!(out[16..], expected);
        assert_eq!(out[8..12], 34u32.to_le_bytes());
    }
}
