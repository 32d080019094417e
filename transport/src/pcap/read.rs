//! Capture files in, whoever wrote them: classic pcap and pcapng, in either byte order.
//!
//! Owns: the two file formats, and the way from a link layer's frame to the UDP datagram in it.
//! What a file says is believed nowhere: lengths are bounded before anything is allocated.
//!
//! Deliberately absent: other blocks of pcapng than sections, interfaces and packets (passed over);
//! fragments are told from datagrams, not put together: RoCEv2 forbids them.
//!
//! Source: draft-ietf-opsawg-pcap, draft-ietf-opsawg-pcapng, the registry of link types.

use std::fmt;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use lowtide_transport_proto::icrc::{Flow, Ip};

/// The longest frame that is read, bytes: what tcpdump takes at most.
pub const FRAME_MAX: u32 = 262_144;
/// The longest block of a pcapng file that is looked into, bytes.
const BLOCK_MAX: u32 = FRAME_MAX + (64 << 10);
/// Interfaces of one section; more are a damaged file.
const INTERFACES_MAX: usize = 4096;

const SECTION: u32 = 0x0A0D_0D0A;
const INTERFACE: u32 = 1;
const SIMPLE_PACKET: u32 = 3;
const ENHANCED_PACKET: u32 = 6;
const BYTE_ORDER: u32 = 0x1A2B_3C4D;
const TIME_RESOLUTION: u16 = 9;

/// Why a capture file cannot be read on.
#[derive(Debug)]
#[non_exhaustive]
pub enum ReadError {
    /// The operating system's words.
    Io(io::Error),
    /// It begins like no capture file.
    NotACapture,
    /// It ends in the middle of something: whoever wrote it was killed, or the disk was full.
    Truncated {
        /// Whole frames before.
        frames: u64,
    },
    /// A length or a reference in it cannot be.
    Damaged {
        /// Whole frames before.
        frames: u64,
        /// What cannot be.
        what: &'static str,
    },
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ReadError::Io(error) => error.fmt(f),
            ReadError::NotACapture => f.write_str("neither a pcap nor a pcapng file"),
            ReadError::Truncated { frames } => {
                write!(f, "ends in the middle of what follows frame {frames}")
            }
            ReadError::Damaged { frames, what } => {
                write!(f, "damaged after frame {frames}: {what}")
            }
        }
    }
}

impl std::error::Error for ReadError {}

/// A frame as it was captured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Its place in the file, from 1.
    pub number: u64,
    /// Seconds since 1970.
    pub seconds: u64,
    /// And nanoseconds.
    pub nanos: u32,
    /// The link layer, by its number in the registry.
    pub link: u32,
    /// Its length on the wire; what was captured may be shorter.
    pub wire_len: u32,
    /// What was captured.
    pub bytes: Vec<u8>,
}

#[derive(Clone, Copy)]
struct Interface {
    link: u32,
    snap_len: u32,
    ticks_per_second: u64,
}

enum Format {
    Classic { link: u32, is_nanos: bool },
    Next { interfaces: Vec<Interface> },
}

/// A capture file being read.
pub struct Reader<R> {
    input: R,
    format: Format,
    is_big_endian: bool,
    frames: u64,
}

impl<R: Read> Reader<R> {
    /// Reads the head of a file.
    ///
    /// # Errors
    /// [`ReadError::NotACapture`], or the head is cut off or cannot be read.
    pub fn new(mut input: R) -> Result<Reader<R>, ReadError> {
        let mut magic = [0; 4];
        if fill(&mut input, &mut magic)? != 4 {
            return Err(ReadError::NotACapture);
        }
        let mut reader = Reader {
            input,
            format: Format::Next {
                interfaces: Vec::new(),
            },
            is_big_endian: false,
            frames: 0,
        };
        if u32::from_le_bytes(magic) == SECTION {
            reader.begin_section()?;
            return Ok(reader);
        }
        let (is_big_endian, is_nanos) = match magic {
            [0xD4, 0xC3, 0xB2, 0xA1] => (false, false),
            [0x4D, 0x3C, 0xB2, 0xA1] => (false, true),
            [0xA1, 0xB2, 0xC3, 0xD4] => (true, false),
            [0xA1, 0xB2, 0x3C, 0x4D] => (true, true),
            _ => return Err(ReadError::NotACapture),
        };
        reader.is_big_endian = is_big_endian;
        let rest: [u8; 20] = reader.exact()?;
        // The upper bits tell of frame check sequences.
        let link = reader.word(&rest, 16) & 0xFFFF;
        reader.format = Format::Classic { link, is_nanos };
        Ok(reader)
    }

    /// The next frame; none at the end.
    ///
    /// # Errors
    /// The file is cut off, damaged, or cannot be read. There is nothing to be read afterwards.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, ReadError> {
        match self.format {
            Format::Classic { link, is_nanos } => self.next_classic(link, is_nanos),
            Format::Next { .. } => self.next_block(),
        }
    }

    fn next_classic(&mut self, link: u32, is_nanos: bool) -> Result<Option<Frame>, ReadError> {
        let mut head = [0; 16];
        match fill(&mut self.input, &mut head)? {
            0 => return Ok(None),
            16 => {}
            _ => return Err(self.truncated()),
        }
        let word = |at| self.word(&head, at);
        let (seconds, fraction, len, wire_len) = (word(0), word(4), word(8), word(12));
        let nanos = fraction.saturating_mul(if is_nanos { 1 } else { 1000 });
        if len > FRAME_MAX {
            return Err(self.damaged("a frame of more than 256 KiB"));
        }
        let bytes = self.take(len)?;
        self.frames += 1;
        Ok(Some(Frame {
            number: self.frames,
            seconds: seconds.into(),
            nanos,
            link,
            wire_len,
            bytes,
        }))
    }

    /// Reads blocks up to the next packet.
    fn next_block(&mut self) -> Result<Option<Frame>, ReadError> {
        loop {
            let mut kind = [0; 4];
            match fill(&mut self.input, &mut kind)? {
                0 => return Ok(None),
                4 => {}
                _ => return Err(self.truncated()),
            }
            let kind = self.word(&kind, 0);
            if kind == SECTION {
                self.begin_section()?;
                continue;
            }
            let len: [u8; 4] = self.exact()?;
            let len = self.word(&len, 0);
            if len < 12 || !len.is_multiple_of(4) {
                return Err(self.damaged("a block's length"));
            }
            if !matches!(kind, INTERFACE | SIMPLE_PACKET | ENHANCED_PACKET) {
                self.skip(len - 8)?;
                continue;
            }
            if len > BLOCK_MAX {
                return Err(self.damaged("a block of more than 320 KiB"));
            }
            let body = self.take(len - 8)?;
            if self.word(&body, body.len() - 4) != len {
                return Err(self.damaged("a block whose two lengths differ"));
            }
            let body = &body[..body.len() - 4];
            if kind == INTERFACE {
                self.add_interface(body)?;
                continue;
            }
            return self.packet(kind, body).map(Some);
        }
    }

    /// What follows the type of a section header: length, byte order, version, options.
    fn begin_section(&mut self) -> Result<(), ReadError> {
        let head: [u8; 8] = self.exact()?;
        let order = <[u8; 4]>::try_from(&head[4..]).expect("four of eight bytes");
        self.is_big_endian = match (u32::from_le_bytes(order), u32::from_be_bytes(order)) {
            (BYTE_ORDER, _) => false,
            (_, BYTE_ORDER) => true,
            _ if self.frames == 0 => return Err(ReadError::NotACapture),
            _ => return Err(self.damaged("a section's byte order")),
        };
        let len = self.word(&head, 0);
        if len < 28 || !len.is_multiple_of(4) {
            return Err(self.damaged("a section header's length"));
        }
        self.format = Format::Next {
            interfaces: Vec::new(),
        };
        self.skip(len - 12)
    }

    fn add_interface(&mut self, body: &[u8]) -> Result<(), ReadError> {
        if body.len() < 8 {
            return Err(self.damaged("an interface without a link type"));
        }
        let mut interface = Interface {
            link: self.half(body, 0).into(),
            snap_len: self.word(body, 4),
            ticks_per_second: 1_000_000,
        };
        let mut options = &body[8..];
        while options.len() >= 4 {
            let (code, len) = (self.half(options, 0), usize::from(self.half(options, 2)));
            let Some(value) = options.get(4..4 + len) else {
                return Err(self.damaged("an interface's option"));
            };
            if let (TIME_RESOLUTION, [resolution]) = (code, value) {
                let power = u32::from(resolution & 0x7F);
                let base = if resolution & 0x80 == 0 { 10u64 } else { 2 };
                interface.ticks_per_second = base
                    .checked_pow(power)
                    .ok_or_else(|| self.damaged("an interface's time resolution"))?;
            }
            options = options
                .get(4 + len.next_multiple_of(4)..)
                .unwrap_or_default();
        }
        match &mut self.format {
            Format::Next { interfaces } if interfaces.len() < INTERFACES_MAX => {
                interfaces.push(interface);
                Ok(())
            }
            _ => Err(self.damaged("more than 4096 interfaces")),
        }
    }

    fn packet(&mut self, kind: u32, body: &[u8]) -> Result<Frame, ReadError> {
        let head = if kind == ENHANCED_PACKET { 20 } else { 4 };
        if body.len() < head {
            return Err(self.damaged("a packet block without its head"));
        }
        let which = if kind == ENHANCED_PACKET {
            self.word(body, 0)
        } else {
            0
        };
        let interface = match &self.format {
            Format::Next { interfaces } => interfaces.get(which as usize).copied(),
            Format::Classic { .. } => None,
        };
        let interface = interface.ok_or_else(|| self.damaged("a packet of no interface"))?;
        let (ticks, len, wire_len) = if kind == ENHANCED_PACKET {
            let ticks = u64::from(self.word(body, 4)) << 32 | u64::from(self.word(body, 8));
            (ticks, self.word(body, 12), self.word(body, 16))
        } else {
            let wire_len = self.word(body, 0);
            let snap_len = match interface.snap_len {
                0 => u32::MAX,
                some => some,
            };
            (0, wire_len.min(snap_len), wire_len)
        };
        let Some(bytes) = body[head..].get(..len as usize) else {
            return Err(self.damaged("a packet longer than its block"));
        };
        let per = interface.ticks_per_second;
        let nanos = u128::from(ticks % per) * 1_000_000_000 / u128::from(per);
        self.frames += 1;
        Ok(Frame {
            number: self.frames,
            seconds: ticks / per,
            nanos: nanos as u32, // below 10^9: the remainder is below `per`
            link: interface.link,
            wire_len,
            bytes: bytes.to_vec(),
        })
    }

    fn word(&self, bytes: &[u8], at: usize) -> u32 {
        let bytes = <[u8; 4]>::try_from(&bytes[at..at + 4]).expect("four bytes");
        if self.is_big_endian {
            u32::from_be_bytes(bytes)
        } else {
            u32::from_le_bytes(bytes)
        }
    }

    fn half(&self, bytes: &[u8], at: usize) -> u16 {
        let bytes = [bytes[at], bytes[at + 1]];
        if self.is_big_endian {
            u16::from_be_bytes(bytes)
        } else {
            u16::from_le_bytes(bytes)
        }
    }

    fn exact<const N: usize>(&mut self) -> Result<[u8; N], ReadError> {
        let mut bytes = [0; N];
        match fill(&mut self.input, &mut bytes)? == N {
            true => Ok(bytes),
            false => Err(self.truncated()),
        }
    }

    /// `len` bytes; the caller has bounded it.
    fn take(&mut self, len: u32) -> Result<Vec<u8>, ReadError> {
        let mut bytes = vec![0; len as usize];
        match fill(&mut self.input, &mut bytes)? == bytes.len() {
            true => Ok(bytes),
            false => Err(self.truncated()),
        }
    }

    fn skip(&mut self, len: u32) -> Result<(), ReadError> {
        let mut part = (&mut self.input).take(len.into());
        match io::copy(&mut part, &mut io::sink()).map_err(ReadError::Io)? == u64::from(len) {
            true => Ok(()),
            false => Err(self.truncated()),
        }
    }

    fn truncated(&self) -> ReadError {
        ReadError::Truncated {
            frames: self.frames,
        }
    }

    fn damaged(&self, what: &'static str) -> ReadError {
        ReadError::Damaged {
            frames: self.frames,
            what,
        }
    }
}

/// Fills `out` as far as there is something, and tells how far.
fn fill(input: &mut impl Read, out: &mut [u8]) -> Result<usize, ReadError> {
    let mut filled = 0;
    while filled < out.len() {
        match input.read(&mut out[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(ReadError::Io(error)),
        }
    }
    Ok(filled)
}

/// A UDP datagram in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram<'a> {
    /// From where.
    pub source: SocketAddr,
    /// To where.
    pub target: SocketAddr,
    /// What the ICRC covers of the headers.
    pub flow: Flow,
    /// Traffic class: DSCP and ECN.
    pub traffic_class: u8,
    /// What was captured of the UDP payload.
    pub payload: &'a [u8],
    /// Bytes of the payload that were not captured.
    pub missing: usize,
}

/// Why a frame holds no UDP datagram that can be looked into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NoDatagram {
    /// A link layer that is not known here.
    LinkType(u32),
    /// Something else than IP (ARP, say).
    NotIp,
    /// This protocol over IP.
    NotUdp(u8),
    /// A fragment.
    Fragment,
    /// IPv4 options.
    Options,
    /// Cut off in the headers, or lengths that contradict each other.
    Malformed,
}

impl fmt::Display for NoDatagram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NoDatagram::LinkType(link) => write!(f, "link type {link} is not known here"),
            NoDatagram::NotIp => f.write_str("not IP"),
            NoDatagram::NotUdp(protocol) => write!(f, "IP protocol {protocol}, not UDP"),
            NoDatagram::Fragment => f.write_str("a fragment"),
            NoDatagram::Options => f.write_str("IPv4 options"),
            NoDatagram::Malformed => f.write_str("headers cut off, or their lengths contradict"),
        }
    }
}

impl Frame {
    /// The UDP datagram in it.
    ///
    /// # Errors
    /// What it is instead.
    pub fn datagram(&self) -> Result<Datagram<'_>, NoDatagram> {
        let ip = self.ip_packet()?;
        match ip.first().map(|first| first >> 4) {
            Some(4) => datagram_v4(ip),
            Some(6) => datagram_v6(ip),
            _ => Err(NoDatagram::NotIp),
        }
    }

    /// What the link layer carries, if it is IP.
    fn ip_packet(&self) -> Result<&[u8], NoDatagram> {
        let bytes = &self.bytes[..];
        let (mut kind_at, mut at) = match self.link {
            // BSD loopback: an address family in the host's order.
            0 | 108 => return bytes.get(4..).ok_or(NoDatagram::Malformed),
            1 => (12, 14),
            101 | 228 | 229 => return Ok(bytes),
            // Linux "any", versions 1 and 2.
            113 => (14, 16),
            276 => (0, 20),
            other => return Err(NoDatagram::LinkType(other)),
        };
        let kind = |at| half(bytes, at).ok_or(NoDatagram::Malformed);
        // At most two VLAN tags.
        for _ in 0..2 {
            if self.link == 1 && matches!(kind(kind_at)?, 0x8100 | 0x88A8) {
                (kind_at, at) = (kind_at + 4, at + 4);
            }
        }
        match kind(kind_at)? {
            0x0800 | 0x86DD => bytes.get(at..).ok_or(NoDatagram::Malformed),
            _ => Err(NoDatagram::NotIp),
        }
    }
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    let pair = bytes.get(at..at + 2)?;
    Some(u16::from_be_bytes([pair[0], pair[1]]))
}

fn datagram_v4(ip: &[u8]) -> Result<Datagram<'_>, NoDatagram> {
    let Some((head, rest)) = ip.split_first_chunk::<20>() else {
        return Err(NoDatagram::Malformed);
    };
    let field = |at| u16::from_be_bytes([head[at], head[at + 1]]);
    if head[0] != 0x45 {
        return Err(NoDatagram::Options);
    }
    if field(6) & 0x3FFF != 0 {
        return Err(NoDatagram::Fragment);
    }
    if head[9] != 17 {
        return Err(NoDatagram::NotUdp(head[9]));
    }
    let source = Ipv4Addr::new(head[12], head[13], head[14], head[15]);
    let target = Ipv4Addr::new(head[16], head[17], head[18], head[19]);
    let network = Ip::V4 {
        source,
        target,
        identification: field(4),
        flags: field(6),
    };
    let len = usize::from(field(2)).checked_sub(20);
    let ends = (source.into(), target.into());
    udp(ends, network, head[1], len, rest)
}

fn datagram_v6(ip: &[u8]) -> Result<Datagram<'_>, NoDatagram> {
    let Some((head, rest)) = ip.split_first_chunk::<40>() else {
        return Err(NoDatagram::Malformed);
    };
    match head[6] {
        17 => {}
        44 => return Err(NoDatagram::Fragment),
        other => return Err(NoDatagram::NotUdp(other)),
    }
    let octets = |at: usize| <[u8; 16]>::try_from(&head[at..at + 16]).expect("sixteen bytes");
    let (source, target) = (Ipv6Addr::from(octets(8)), Ipv6Addr::from(octets(24)));
    let class = head[0] << 4 | head[1] >> 4;
    let len = usize::from(u16::from_be_bytes([head[4], head[5]]));
    let network = Ip::V6 { source, target };
    udp(
        (source.into(), target.into()),
        network,
        class,
        Some(len),
        rest,
    )
}

/// `len`: of UDP header and payload, as the IP header says.
fn udp(
    (source, target): (IpAddr, IpAddr),
    ip: Ip,
    traffic_class: u8,
    len: Option<usize>,
    bytes: &[u8],
) -> Result<Datagram<'_>, NoDatagram> {
    let Some((head, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(NoDatagram::Malformed);
    };
    let field = |at| u16::from_be_bytes([head[at], head[at + 1]]);
    let udp_len = usize::from(field(4));
    if len != Some(udp_len) || udp_len < 8 {
        return Err(NoDatagram::Malformed);
    }
    let payload = &rest[..rest.len().min(udp_len - 8)];
    Ok(Datagram {
        source: (source, field(0)).into(),
        target: (target, field(2)).into(),
        flow: Flow {
            ip,
            source_port: field(0),
            target_port: field(2),
        },
        traffic_class,
        payload,
        missing: udp_len - 8 - payload.len(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every file of packets from the kernel's rxe, with its number of frames.
    fn golden() -> Vec<(String, Vec<u8>)> {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/proto/tests/captures");
        let files = std::fs::read_dir(dir).unwrap().map(|f| f.unwrap().path());
        let pcaps = files.filter(|f| f.extension().is_some_and(|e| e == "pcap"));
        pcaps
            .map(|f| (f.display().to_string(), std::fs::read(f).unwrap()))
            .collect()
    }

    fn frames(bytes: &[u8]) -> Result<Vec<Frame>, ReadError> {
        let mut reader = Reader::new(bytes)?;
        let mut frames = Vec::new();
        while let Some(frame) = reader.next_frame()? {
            frames.push(frame);
        }
        Ok(frames)
    }

    /// The same frames as pcapng: two sections, the second big endian, with blocks of other kinds
    /// between, and times in powers of two.
    fn as_pcapng(frames: &[Frame]) -> Vec<u8> {
        let mut out = Vec::new();
        let half = frames.len() / 2;
        for (big, part) in [(false, &frames[..half]), (true, &frames[half..])] {
            let word = |value: u32| match big {
                true => value.to_be_bytes(),
                false => value.to_le_bytes(),
            };
            let short = |value: u16| match big {
                true => value.to_be_bytes(),
                false => value.to_le_bytes(),
            };
            let mut block = |kind: u32, body: &[u8]| {
                let len = 12 + body.len().next_multiple_of(4) as u32;
                out.extend([word(kind), word(len)].concat());
                out.extend(body);
                out.extend(vec![0; body.len().next_multiple_of(4) - body.len()]);
                out.extend(word(len));
            };
            let version = [short(1), short(0)].concat();
            block(
                SECTION,
                &[&word(BYTE_ORDER), &version[..], &[0xFF; 8]].concat(),
            );
            block(0x0BAD, b"passed over");
            let link = [short(1), short(0)].concat();
            let options = [short(9), short(1)].concat();
            let interface = [
                &link[..],
                &word(0),
                &options,
                &[0x80 | 10, 0, 0, 0],
                &[0; 4],
            ];
            block(INTERFACE, &interface.concat());
            for frame in part {
                let ticks = (frame.seconds << 10) + u64::from(frame.nanos) * 1024 / 1_000_000_000;
                let len = frame.bytes.len() as u32;
                let head = [0, (ticks >> 32) as u32, ticks as u32, len, frame.wire_len].map(word);
                block(
                    ENHANCED_PACKET,
                    &[&head.concat(), &frame.bytes[..]].concat(),
                );
            }
        }
        out
    }

    #[test]
    fn both_formats_and_byte_orders_hold_the_same_frames() {
        let mut count = 0;
        for (name, bytes) in golden() {
            let classic = frames(&bytes).unwrap();
            count += classic.len();
            let next = frames(&as_pcapng(&classic)).unwrap();
            assert_eq!(classic.len(), next.len(), "{name}");
            for (a, b) in classic.iter().zip(&next) {
                assert_eq!(
                    (a.number, a.link, a.wire_len),
                    (b.number, b.link, b.wire_len)
                );
                assert_eq!((a.seconds, &a.bytes), (b.seconds, &b.bytes));
                assert!(a.nanos - b.nanos < 1_000_000, "{name}: {a:?} {b:?}");
                assert_eq!(a.datagram().unwrap().missing, 0);
            }
        }
        assert_eq!(count, 486);
    }

    #[test]
    fn a_cut_file_gives_its_whole_frames_and_says_that_it_is_cut() {
        for (name, bytes) in golden().into_iter().take(3) {
            let whole = frames(&bytes).unwrap();
            for file in [bytes, as_pcapng(&whole)] {
                for end in 0..file.len() {
                    match frames(&file[..end]) {
                        Ok(some) => assert!(some.len() < whole.len() || end > 24, "{name}"),
                        Err(ReadError::NotACapture) => assert!(end < 12, "{name} {end}"),
                        Err(ReadError::Truncated { frames }) => {
                            assert!(frames < whole.len() as u64, "{name} {end}");
                        }
                        Err(other) => panic!("{name} {end}: {other}"),
                    }
                }
            }
        }
    }

    #[test]
    fn nothing_in_a_file_makes_the_reader_panic_or_allocate_without_bound() {
        let (_, bytes) = golden().swap_remove(0);
        let next = as_pcapng(&frames(&bytes).unwrap());
        let mut seed = 7u64;
        let mut random = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) as usize
        };
        let (mut read, mut refused) = (0, 0);
        for round in 0..40_000 {
            let mut file = if round % 2 == 0 {
                bytes.clone()
            } else {
                next.clone()
            };
            for _ in 0..1 + random() % 4 {
                let at = random() % file.len();
                file[at] = [0, 0xFF, 0x7F, random() as u8][random() % 4];
            }
            let Ok(mut reader) = Reader::new(&file[..]) else {
                refused += 1;
                continue;
            };
            while let Ok(Some(frame)) = reader.next_frame() {
                assert!(frame.bytes.len() <= FRAME_MAX as usize);
                read += usize::from(frame.datagram().is_ok());
            }
        }
        assert!(read > 100_000 && refused > 100, "{read} {refused}");
    }

    #[test]
    fn link_layers_lead_to_the_same_datagram() {
        let (_, bytes) = golden().swap_remove(0);
        let ethernet = frames(&bytes).unwrap().swap_remove(0);
        let expected = ethernet.datagram().unwrap();
        let (macs, rest) = ethernet.bytes.split_at(12);
        let ip = &rest[2..];
        let tagged = [macs, &[0x88, 0xA8, 0, 7, 0x81, 0, 0, 8], rest].concat();
        let cooked = [&[0; 14][..], rest].concat();
        let cooked2 = [&[8, 0][..], &[0; 18], ip].concat();
        for (link, bytes) in [
            (1, tagged),
            (101, ip.to_vec()),
            (108, [&[0, 0, 0, 2][..], ip].concat()),
            (113, cooked),
            (276, cooked2),
        ] {
            let frame = Frame {
                link,
                bytes,
                ..ethernet.clone()
            };
            assert_eq!(frame.datagram(), Ok(expected), "link type {link}");
        }
        let odd = |change: fn(&mut Vec<u8>)| {
            let mut bytes = ip.to_vec();
            change(&mut bytes);
            let frame = Frame {
                link: 101,
                bytes,
                ..ethernet.clone()
            };
            frame.datagram().map(|d| d.missing)
        };
        assert_eq!(odd(|b| b[0] = 0x46), Err(NoDatagram::Options));
        assert_eq!(odd(|b| b[6] = 0x20), Err(NoDatagram::Fragment));
        assert_eq!(odd(|b| b[9] = 6), Err(NoDatagram::NotUdp(6)));
        assert_eq!(odd(|b| b[3] += 1), Err(NoDatagram::Malformed));
        assert_eq!(odd(|b| b.truncate(25)), Err(NoDatagram::Malformed));
        assert_eq!(odd(|b| b.truncate(b.len() - 3)), Ok(3));
        assert_eq!(odd(Vec::clear), Err(NoDatagram::NotIp));
        let frame = Frame {
            link: 147,
            ..ethernet.clone()
        };
        assert_eq!(frame.datagram(), Err(NoDatagram::LinkType(147)));
    }
}
