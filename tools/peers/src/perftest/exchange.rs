//! What perftest's two ends tell each other over TCP: the client speaks first, each time.
//!
//! Source: perftest 4.5, `perftest_communication.c`.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use lowtide_transport::raw::types::{Gid, Mtu, Psn, Qpn, Remote, Rkey};

use super::PeerError;
use crate::end::{End, Place};

/// What each side says of its queue pair and memory, a text padded with zeros.
const PLACE_LEN: usize = 108;
/// The version that perftest 4.5 says; the other end only warns of another one.
const VERSION: &[u8; 4] = b"6.06";

pub(super) struct Exchange {
    stream: TcpStream,
    is_client: bool,
}

impl Exchange {
    /// `patience` is how long the other end may take to answer.
    pub(super) fn new(
        stream: TcpStream,
        is_client: bool,
        patience: Duration,
    ) -> Result<Exchange, PeerError> {
        let ready = stream.set_read_timeout(Some(patience));
        ready.map_err(PeerError::Exchange)?;
        Ok(Exchange { stream, is_client })
    }

    pub(super) fn is_client(&self) -> bool {
        self.is_client
    }

    fn swap<const N: usize>(&mut self, ours: [u8; N]) -> Result<[u8; N], PeerError> {
        let mut theirs = [0; N];
        let mut swap = || -> io::Result<()> {
            if self.is_client {
                self.stream.write_all(&ours)?;
                self.stream.read_exact(&mut theirs)
            } else {
                self.stream.read_exact(&mut theirs)?;
                self.stream.write_all(&ours)
            }
        };
        swap().map_err(PeerError::Exchange)?;
        Ok(theirs)
    }

    /// Version, sizes of a page and a cache line, MTU: the smaller one counts.
    pub(super) fn begin(&mut self, mtu: Mtu) -> Result<Mtu, PeerError> {
        let mut version = [0; 16];
        version[..4].copy_from_slice(VERSION);
        self.swap(version)?;
        self.swap(4096u32.to_be_bytes())?;
        self.swap(64u32.to_be_bytes())?;
        let theirs = self.swap([b'0' + mtu as u8, 0])?;
        let code = Mtu::from_code(theirs[0].wrapping_sub(b'0'));
        let theirs = code.ok_or_else(|| PeerError::Words(theirs.escape_ascii().to_string()))?;
        Ok(mtu.min(theirs))
    }

    /// Where both are, and how many READs the other end serves at once.
    pub(super) fn places(&mut self, ours: &Place) -> Result<(Place, u8), PeerError> {
        let theirs = self.swap(encode(ours))?;
        decode(&theirs).ok_or_else(|| PeerError::Words(theirs.escape_ascii().to_string()))
    }

    /// Both have come so far, several times.
    pub(super) fn agree(&mut self, ours: &Place, times: u32) -> Result<(), PeerError> {
        for _ in 0..times {
            self.swap(encode(ours))?;
        }
        Ok(())
    }

    /// The results of a bandwidth test: none of ours.
    pub(super) fn results(&mut self) -> Result<(), PeerError> {
        for _ in 0..5 {
            self.swap([0; 8])?;
        }
        Ok(())
    }

    pub(super) fn end(&mut self, ours: &Place) -> Result<(), PeerError> {
        self.agree(ours, 1)?;
        // Whoever is first may be gone.
        let _ = self.stream.write_all(b"done\0");
        let _ = self.stream.read_exact(&mut [0; 5]);
        Ok(())
    }
}

fn encode(place: &Place) -> [u8; PLACE_LEN] {
    let Remote { va, rkey } = place.remote;
    let gid = place.gid.0.map(|byte| format!("{byte:02x}")).join(":");
    let (qpn, psn) = (place.qpn.value(), place.psn.value());
    let text = format!(
        "0000:{:04x}:{qpn:06x}:{psn:06x}:{:08x}:{va:016x}:{gid}:{:08x}:",
        End::READS,
        rkey.0,
        0
    );
    let mut bytes = [0; PLACE_LEN];
    bytes[..text.len()].copy_from_slice(text.as_bytes());
    bytes
}

/// LID, READs, queue pair, PSN, key, address, and the 16 bytes of the GID, all in hexadecimal.
fn decode(bytes: &[u8]) -> Option<(Place, u8)> {
    let mut words = std::str::from_utf8(bytes).ok()?.split(':');
    let mut word = || u64::from_str_radix(words.next()?, 16).ok();
    let (_lid, reads, qpn, psn) = (word()?, word()?, word()?, word()?);
    let (rkey, va, mut gid) = (word()?, word()?, Gid([0; 16]));
    for byte in &mut gid.0 {
        *byte = word()?.try_into().ok()?;
    }
    let place = Place {
        qpn: Qpn::new(u32::try_from(qpn).ok()?),
        psn: Psn::new(u32::try_from(psn).ok()?),
        remote: Remote {
            va,
            rkey: Rkey(u32::try_from(rkey).ok()?),
        },
        gid,
    };
    Some((place, reads.min(255) as u8))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_what_perftest_prints() {
        let place = Place {
            qpn: Qpn::new(0x11),
            psn: Psn::new(0xAB_CDEF),
            remote: Remote {
                va: 0x7F00_1234_5000,
                rkey: Rkey(0x0102_0304),
            },
            gid: Gid::from_ip([10, 9, 0, 1].into()),
        };
        let bytes = encode(&place);
        let text = "0000:0010:000011:abcdef:01020304:00007f0012345000:\
            00:00:00:00:00:00:00:00:00:00:ff:ff:0a:09:00:01:00000000:";
        assert_eq!(
            bytes.trim_ascii_end().split(|b| *b == 0).next(),
            Some(text.as_bytes())
        );
        assert_eq!(decode(&bytes), Some((place, End::READS)));
    }

    #[test]
    fn what_is_no_place_is_refused() {
        let good = encode(&Place {
            qpn: Qpn::new(1),
            psn: Psn::new(2),
            remote: Remote {
                va: 3,
                rkey: Rkey(4),
            },
            gid: Gid([5; 16]),
        });
        assert!(decode(&good).is_some());
        for len in 0..90 {
            assert_eq!(decode(&good[..len]), None, "{len}");
        }
        for bad in [&b"\xFF"[..], b"", b"GET / HTTP/1.1\r\n", b"0000:zz:"] {
            assert_eq!(decode(bad), None);
        }
        // A queue pair of 40 bits, a byte of 12.
        let mut words = String::from_utf8(good.to_vec()).unwrap();
        words = words.replacen("000001", "ffffffffff", 1);
        assert_eq!(decode(words.as_bytes()), None);
        let words = String::from_utf8(good.to_vec())
            .unwrap()
            .replacen(":05:", ":505:", 1);
        assert_eq!(decode(words.as_bytes()), None);
    }
}
