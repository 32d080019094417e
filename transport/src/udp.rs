//! The UDP socket under soft-RoCE: batches of datagrams in and out.
//!
//! Owns: one unconnected, non-blocking UDP socket and every system call made on it. Sends runs of
//! equal datagrams by UDP segmentation offload (`UDP_SEGMENT`), receives runs by `UDP_GRO`, and
//! everything else by `sendmmsg`/`recvmmsg`.
//!
//! Invariants:
//! * The socket is never connected and has `IP_MTU_DISCOVER = DO`. Only then is the IPv4
//!   Identification known before the kernel writes it: 0, or 0, 1, 2, … along the segments of one
//!   `UDP_SEGMENT` send. The ICRC covers it, so every frame is sealed here, at the moment its place
//!   in a run is known.
//! * The socket is bound to one address of this host, never to the wildcard: the ICRC covers the
//!   source address too. So what it receives was sent to that address.
//! * No call blocks, and nothing allocates once the batches have been built.
//!
//! Deliberately absent: what a datagram means (`device`), lost or doubled datagrams (`faults`),
//! raw sockets (they need CAP_NET_RAW; the receiver solves for the Identification instead).
//!
//! Source: RoCEv2 over plain UDP sockets as measured on Linux 6.18; `net/ipv4/ip_output.c`,
//! `net/ipv4/udp_offload.c`.

mod interface;
mod receive;
mod taken;
mod transmit;

use std::io;
use std::mem;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};

use socket2::{Domain, Protocol, SockAddr, Socket as RawSocket, Type};

use self::interface::interface_index;
pub use self::interface::{interface_addresses, interface_mtu, path_mtu};
pub use self::receive::{Arrival, ReceiveBatch};
pub use self::transmit::{Frame, Payload, TransmitBatch};

/// Largest BTH plus extended headers (a FLUSH or an atomic: 40 B), with room to spare.
pub const HEADER_MAX: usize = 64;
/// Three pad bytes and four of ICRC, rounded up.
pub const TRAILER_MAX: usize = 8;
/// Frames in one [`TransmitBatch`].
pub const TRANSMIT_FRAMES_MAX: usize = 128;
/// Segments in one `UDP_SEGMENT` send (`UDP_MAX_SEGMENTS` of kernels before 6.9).
const SEGMENTS_MAX: usize = 64;
/// UDP payload bytes in one send.
const SEND_BYTES_MAX: usize = 65_507;
/// Buffers given to one `recvmmsg`; each holds a whole `UDP_GRO` run.
const RECEIVE_SLOTS: usize = 16;
const RECEIVE_SLOT_BYTES: usize = 65_536;
/// `skb->truesize` charged to SO_RCVBUF for one datagram of a full 4 KiB packet: the default
/// 212,992 B holds 25 of them.
const DATAGRAM_TRUESIZE: usize = 8_519;

const CONTROL_BYTES: usize = 128;

/// What to ask of the kernel when binding.
#[derive(Debug, Clone, Copy)]
pub struct SocketOptions {
    /// Requested SO_RCVBUF in bytes; the kernel may grant less without privilege.
    pub receive_buffer_bytes: usize,
    /// Requested SO_SNDBUF in bytes.
    pub send_buffer_bytes: usize,
    /// Whether to try UDP_SEGMENT and UDP_GRO at all.
    pub offload: bool,
    /// Whether to look for marks of congestion (ECN), which costs a control message per receive; by
    /// default only where a switch can be on the way, so not on a loopback address.
    pub congestion_marks: Option<bool>,
}

impl Default for SocketOptions {
    fn default() -> Self {
        SocketOptions {
            receive_buffer_bytes: 4 << 20,
            send_buffer_bytes: 4 << 20,
            offload: true,
            congestion_marks: None,
        }
    }
}

/// An unconnected UDP socket whose IPv4 Identification is predictable.
#[derive(Debug)]
pub struct Socket {
    socket: UdpSocket,
    local: SocketAddr,
    is_segmenting: bool,
    /// At what length it segments by itself; 0: it does not.
    segment: u16,
    /// The segments of the last send of more than one frame.
    last_segment: u16,
    receive_buffer_bytes: usize,
}

/// What one [`Socket::send`] did.
#[derive(Debug, Default, Clone, Copy)]
pub struct SendReport {
    /// Datagrams the kernel took.
    pub datagrams: u64,
    /// Bytes of UDP payload in them.
    pub bytes: u64,
    /// `UDP_SEGMENT` sends among them.
    pub gso_sends: u64,
    /// Datagrams the kernel refused; for the protocol above they are lost.
    pub refused: u64,
}

impl Socket {
    /// Binds to `local`, which must name one address of this host.
    ///
    /// # Errors
    /// `AddrInUse` when another socket (or the kernel's own soft-RoCE) has the port;
    /// `InvalidInput` for the wildcard address; whatever `bind` and `setsockopt` report otherwise.
    pub fn bind(local: SocketAddr, options: &SocketOptions) -> io::Result<Socket> {
        if local.ip().is_unspecified() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a RoCE socket is bound to one address: the invariant CRC covers it",
            ));
        }
        let raw = RawSocket::new(Domain::for_address(local), Type::DGRAM, Some(Protocol::UDP))?;
        raw.set_nonblocking(true)?;
        let fd = raw.as_raw_fd();
        force_buffer(fd, libc::SO_RCVBUFFORCE, options.receive_buffer_bytes)
            .or_else(|_| raw.set_recv_buffer_size(options.receive_buffer_bytes))?;
        force_buffer(fd, libc::SO_SNDBUFFORCE, options.send_buffer_bytes)
            .or_else(|_| raw.set_send_buffer_size(options.send_buffer_bytes))?;
        let is_marked = options.congestion_marks;
        let reads_marks = is_marked.unwrap_or(!local.ip().is_loopback()).into();
        match local {
            SocketAddr::V4(v4) => {
                let discover = libc::IP_PMTUDISC_DO;
                set_option(fd, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, discover)?;
                set_option(fd, libc::IPPROTO_IP, libc::IP_RECVTOS, reads_marks)?;
                where_known(raw.set_multicast_if_v4(v4.ip()))?;
            }
            SocketAddr::V6(v6) => {
                raw.set_only_v6(true)?;
                raw.set_multicast_if_v6(interface_index(*v6.ip()).unwrap_or(0))?;
                let discover = libc::IPV6_PMTUDISC_DO;
                set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, discover)?;
                set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, reads_marks)?;
                // Adapters and the kernel's rxe send checksum 0 over IPv6 too.
                set_option(fd, libc::SOL_UDP, libc::UDP_NO_CHECK6_RX, 1)?;
            }
        }
        where_known(set_option(fd, libc::SOL_SOCKET, libc::SO_RXQ_OVFL, 1))?;
        // A kernel without the offloads only makes us slower.
        let is_segmenting =
            options.offload && set_option(fd, libc::SOL_UDP, libc::UDP_SEGMENT, 0).is_ok();
        if options.offload {
            let _ = set_option(fd, libc::SOL_UDP, libc::UDP_GRO, 1);
        }
        raw.bind(&SockAddr::from(local))
            .map_err(|error| match error.kind() {
                io::ErrorKind::AddrInUse => taken::Taken::error(local),
                _ => error,
            })?;
        let receive_buffer_bytes = raw.recv_buffer_size()?;
        let socket = UdpSocket::from(raw);
        let local = socket.local_addr()?;
        Ok(Socket {
            socket,
            local,
            is_segmenting,
            segment: 0,
            last_segment: 0,
            receive_buffer_bytes,
        })
    }

    /// Joins the multicast group `ip` on the interface of `local`: a socket that receives what is
    /// sent to the group and `local`'s port. Several sockets of one host may; each gets a copy.
    ///
    /// # Errors
    /// `InvalidInput` if `ip` is no group of `local`'s family; whatever the kernel says otherwise.
    pub fn join(ip: IpAddr, local: SocketAddr) -> io::Result<Socket> {
        let group = SocketAddr::new(ip, local.port());
        let raw = RawSocket::new(Domain::for_address(group), Type::DGRAM, Some(Protocol::UDP))?;
        raw.set_nonblocking(true)?;
        raw.set_reuse_address(true)?;
        let fd = raw.as_raw_fd();
        match (ip, local.ip()) {
            (IpAddr::V4(group), IpAddr::V4(local)) if group.is_multicast() => {
                set_option(fd, libc::IPPROTO_IP, libc::IP_PKTINFO, 1)?;
                set_option(fd, libc::IPPROTO_IP, libc::IP_RECVTOS, 1)?;
                raw.join_multicast_v4(&group, &local)?;
            }
            (IpAddr::V6(group), IpAddr::V6(local)) if group.is_multicast() => {
                raw.set_only_v6(true)?;
                set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1)?;
                set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, 1)?;
                set_option(fd, libc::SOL_UDP, libc::UDP_NO_CHECK6_RX, 1)?;
                raw.join_multicast_v6(&group, interface_index(local)?)?;
            }
            _ => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "not a multicast group of the device's address family",
                ));
            }
        }
        raw.bind(&SockAddr::from(group))?;
        let receive_buffer_bytes = raw.recv_buffer_size()?;
        let socket = UdpSocket::from(raw);
        Ok(Socket {
            socket,
            local: group,
            is_segmenting: false,
            segment: 0,
            last_segment: 0,
            receive_buffer_bytes,
        })
    }

    /// The address and port in use.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// The socket itself, for what no device does.
    #[cfg(test)]
    pub fn plain(&self) -> &UdpSocket {
        &self.socket
    }

    /// How many full datagrams the receive buffer holds while nobody reads it.
    pub fn receive_budget(&self) -> usize {
        self.receive_buffer_bytes / DATAGRAM_TRUESIZE
    }

    /// Bytes of the receive buffer that the kernel granted.
    pub fn receive_buffer_bytes(&self) -> usize {
        self.receive_buffer_bytes
    }

    /// Whether runs still go out by `UDP_SEGMENT`.
    pub fn is_segmenting(&self) -> bool {
        self.is_segmenting
    }

    /// Seals and sends all frames of `batch`, in order, and empties it.
    ///
    /// `seal` is called once or more for every frame with the payload it will carry and the IPv4
    /// Identification it will have, and writes the ICRC into [`Frame::trailer`]. `payload` lends
    /// the bytes of a frame's payload.
    ///
    /// A datagram that the kernel refuses (send buffer full, no route, message too long) is counted
    /// and dropped: for the protocol above that is a lost packet, and it must cope with those
    /// anyway. The send buffer is larger than what a peer's budget lets be in flight.
    pub fn send<'m>(
        &mut self,
        batch: &mut TransmitBatch,
        payload: impl Fn(&Payload) -> &'m [u8],
        mut seal: impl FnMut(&mut Frame, &[u8], u16),
    ) -> SendReport {
        let mut report = SendReport::default();
        let mut next = 0;
        while next < batch.frames.len() {
            batch.plan(next, self.is_segmenting, &payload, &mut seal);
            if let [run] = *batch.runs {
                self.note_run(run);
            }
            let taken = batch.submit(self.socket.as_raw_fd(), self.segment, &payload);
            match taken {
                Ok(messages) => {
                    for run in &batch.runs[..messages] {
                        report.datagrams += u64::from(run.frames);
                        report.bytes += u64::from(run.bytes);
                        report.gso_sends += u64::from(run.frames > 1);
                        next += run.frames as usize;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    let first = batch.runs[0];
                    if first.frames > 1 && is_offload_refusal(&error) {
                        // Some drivers and old kernels advertise the offload and refuse its use.
                        self.is_segmenting = false;
                        self.segment_at(0);
                    } else {
                        report.refused += u64::from(first.frames);
                        next += first.frames as usize;
                    }
                }
            }
        }
        batch.frames.clear();
        report
    }

    /// A socket that has segmented at one length twice goes on so by itself: told once, the kernel
    /// need not read it from each send.
    fn note_run(&mut self, run: transmit::Run) {
        if run.frames > 1 && run.segment != std::mem::replace(&mut self.last_segment, run.segment) {
            return;
        }
        if run.frames > 1 && run.segment != self.segment {
            self.segment_at(run.segment);
        }
    }

    fn segment_at(&mut self, segment: u16) {
        let fd = self.socket.as_raw_fd();
        // If it does not take that, each send says it.
        if set_option(fd, libc::SOL_UDP, libc::UDP_SEGMENT, segment.into()).is_ok() {
            self.segment = segment;
        }
    }

    /// Receives what is there, without waiting. Returns the number of receive calls' worth of
    /// slots filled; fewer than [`ReceiveBatch::capacity`] means that the socket is empty.
    ///
    /// # Errors
    /// Those of `recvmmsg` except `WouldBlock` and `Interrupted`, which are an empty batch.
    pub fn receive(&mut self, batch: &mut ReceiveBatch) -> io::Result<usize> {
        self.receive_some(batch, batch.capacity())
    }

    /// The same, but no more than `max` slots: the kernel looks once more into the socket for each
    /// slot that could be filled.
    ///
    /// # Errors
    /// As `receive`.
    pub fn receive_some(&mut self, batch: &mut ReceiveBatch, max: usize) -> io::Result<usize> {
        batch.fill(self.socket.as_raw_fd(), max)
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// Keeps every signal from the calling thread, so that a device's own thread never runs a handler.
pub fn block_signals() {
    // SAFETY: the set is initialised by sigfillset before it is read, and the old one is not asked
    // for.
    unsafe {
        let mut all: libc::sigset_t = mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut());
    }
}

/// Runs `act` with SIGXFSZ kept from this thread, so that growing a file beyond what the process may
/// (`ulimit -f`) is an error of the call (EFBIG) and not the end of the process.
pub(crate) fn without_sigxfsz<T>(act: impl FnOnce() -> T) -> T {
    // SAFETY: all sets are initialised before they are read; the signal that is taken is the one that
    // `act` has raised in this thread, if none was pending before.
    unsafe {
        let (mut only, mut before, mut pending): (libc::sigset_t, _, _) = mem::zeroed();
        libc::sigemptyset(&raw mut only);
        libc::sigaddset(&raw mut only, libc::SIGXFSZ);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const only, &raw mut before);
        libc::sigpending(&raw mut pending);
        let was_pending = libc::sigismember(&raw const pending, libc::SIGXFSZ) == 1;
        let result = act();
        if !was_pending {
            let now: libc::timespec = mem::zeroed();
            libc::sigtimedwait(&raw const only, std::ptr::null_mut(), &raw const now);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
        result
    }
}

/// Bytes that a file of anybody's may have for this process to write to them.
pub(crate) fn file_size_max() -> u64 {
    // SAFETY: the kernel fills the structure.
    unsafe {
        let mut limit: libc::rlimit = mem::zeroed();
        match libc::getrlimit(libc::RLIMIT_FSIZE, &raw mut limit) {
            0 => limit.rlim_cur,
            _ => u64::MAX,
        }
    }
}

/// Has `hook` called when the process exits (by `exit`, or by returning from `main`).
pub fn at_exit(hook: extern "C" fn()) {
    // SAFETY: the hook is a function, which stays as long as its program or library is loaded; what
    // registers hooks of a library that is unloaded calls them then. Where no more hooks fit it is
    // not called, and what it would have done is left to the peer's patience.
    let _ = unsafe { libc::atexit(hook) };
}

fn is_offload_refusal(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EIO | libc::EINVAL | libc::ENOPROTOOPT | libc::EMSGSIZE | libc::EOPNOTSUPP)
    )
}

fn set_option(fd: RawFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    // SAFETY: the value pointer and its length describe a live i32 for the duration of the call.
    let result = unsafe {
        libc::setsockopt(
            fd,
            level,
            name,
            (&raw const value).cast(),
            mem::size_of::<i32>() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Passes an option by that only kernels know: emulators and sandboxes run without it, with a
/// counter that stays 0, or multicast on the default route's interface.
fn where_known(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(()),
        result => result,
    }
}

fn force_buffer(fd: RawFd, name: i32, bytes: usize) -> io::Result<()> {
    set_option(
        fd,
        libc::SOL_SOCKET,
        name,
        i32::try_from(bytes).unwrap_or(i32::MAX),
    )
}

/// A control block, aligned as the kernel wants it.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; CONTROL_BYTES]);

fn vector(bytes: &[u8]) -> libc::iovec {
    libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    }
}

fn zeroed_name() -> libc::sockaddr_storage {
    // SAFETY: sockaddr_storage is plain data for which all zeroes are valid.
    unsafe { mem::zeroed() }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn pair(last: u8, options: &SocketOptions) -> (Socket, Socket) {
        let pid = std::process::id();
        let address = |side: u8| {
            let ip = Ipv4Addr::new(127, (pid >> 8) as u8 | 1, pid as u8, last + side);
            Socket::bind(SocketAddr::from((ip, 0)), options).unwrap()
        };
        (address(0), address(1))
    }

    fn frame(target: SocketAddr, mark: u8, len: u32) -> Frame {
        let mut header = [0; HEADER_MAX];
        header[0] = mark;
        Frame {
            target,
            header,
            header_len: 12,
            trailer_len: 4,
            trailer: [0; TRAILER_MAX],
            payload: Payload {
                region: 0,
                len,
                offset: u64::from(mark),
            },
            is_spoilt: false,
        }
    }

    /// Sends frames of the given lengths and returns (mark, length, Identification sealed).
    fn exchange(
        options: &SocketOptions,
        last: u8,
        lens: &[u32],
    ) -> (Vec<(u8, usize, u16)>, SendReport) {
        let (mut from, mut to) = pair(last, options);
        carry(&mut from, &mut to, lens)
    }

    /// The same from one socket to the other.
    fn carry(
        from: &mut Socket,
        to: &mut Socket,
        lens: &[u32],
    ) -> (Vec<(u8, usize, u16)>, SendReport) {
        let memory: Vec<u8> = (0..8192u32).map(|i| i as u8).collect();
        let mut batch = TransmitBatch::default();
        for (mark, len) in lens.iter().enumerate() {
            batch.push(frame(to.local_addr(), mark as u8, *len));
        }
        let report = from.send(
            &mut batch,
            |p| &memory[p.offset as usize..][..p.len as usize],
            |frame, _, ident| frame.trailer[..2].copy_from_slice(&ident.to_le_bytes()),
        );
        let mut received = ReceiveBatch::default();
        let mut seen = Vec::new();
        while seen.len() < lens.len() {
            to.receive(&mut received).unwrap();
            for slot in 0..received.len() {
                let arrival = received.arrival(slot).unwrap();
                assert_eq!(arrival.source, from.local_addr());
                assert_eq!(arrival.target, None, "the socket has but one address");
                assert!(!arrival.is_truncated);
                for datagram in arrival.bytes.chunks(arrival.segment) {
                    let (mark, body) = (datagram[0], &datagram[12..datagram.len() - 4]);
                    assert_eq!(body, &memory[usize::from(mark)..][..body.len()]);
                    let trailer = &datagram[datagram.len() - 4..];
                    seen.push((
                        mark,
                        datagram.len(),
                        u16::from_le_bytes([trailer[0], trailer[1]]),
                    ));
                }
            }
        }
        (seen, report)
    }

    #[test]
    fn equal_frames_leave_in_one_send_and_a_shorter_one_ends_the_run() {
        let lens = [4096, 4096, 4096, 100, 4096, 8, 4096];
        let (seen, report) = exchange(&SocketOptions::default(), 10, &lens);
        let expected: Vec<_> = lens
            .iter()
            .zip(0..)
            .map(|(len, mark)| (mark, *len as usize + 16))
            .collect();
        assert_eq!(
            seen.iter().map(|s| (s.0, s.1)).collect::<Vec<_>>(),
            expected
        );
        assert_eq!((report.datagrams, report.refused), (7, 0));
        if report.gso_sends > 0 {
            assert_eq!(
                seen.iter().map(|s| s.2).collect::<Vec<_>>(),
                [0, 1, 2, 3, 0, 1, 0]
            );
        }
    }

    /// The socket is told a length once that it has segmented at twice; every other send says its own.
    #[test]
    fn a_socket_that_segments_by_itself_sends_other_lengths_as_they_are() {
        let (mut from, mut to) = pair(60, &SocketOptions::default());
        let sends: [(&[u32], &[u16]); 12] = [
            (&[64, 4], &[0, 1]),
            (&[64, 4], &[0, 1]),
            (&[64, 4], &[0, 1]),
            (&[64], &[0]),
            (&[4096], &[0]),
            (&[8], &[0]),
            (&[64, 64, 64], &[0, 1, 2]),
            (&[100, 100], &[0, 1]),
            (&[64, 4], &[0, 1]),
            (&[100, 4], &[0, 1]),
            (&[100, 4], &[0, 1]),
            (&[64, 4096, 64, 4], &[0, 0, 1, 0]),
        ];
        for (lens, places) in sends {
            let (seen, report) = carry(&mut from, &mut to, lens);
            let found: Vec<usize> = seen.iter().map(|(_, len, _)| len - 16).collect();
            let sent: Vec<usize> = lens.iter().map(|len| *len as usize).collect();
            assert_eq!((found, report.refused), (sent, 0), "{lens:?}");
            if report.gso_sends > 0 {
                let found: Vec<u16> = seen.iter().map(|(_, _, place)| *place).collect();
                assert_eq!(found, places, "{lens:?}");
            }
        }
        assert_eq!(from.segment, if from.is_segmenting { 116 } else { 0 });
    }

    #[test]
    fn a_kernel_that_refuses_the_offload_gets_the_same_datagrams_one_by_one() {
        let (mut from, mut to) = pair(50, &SocketOptions::default());
        // The kernel does not segment for a socket without checksums: EINVAL at the first send.
        set_option(from.as_raw_fd(), libc::SOL_SOCKET, libc::SO_NO_CHECK, 1).unwrap();
        assert!(from.is_segmenting());
        let memory = [7u8; 2048];
        for round in 0..2 {
            let mut batch = TransmitBatch::default();
            for mark in 0..8 {
                batch.push(frame(to.local_addr(), mark, 1000));
            }
            let report = from.send(
                &mut batch,
                |p| &memory[p.offset as usize..][..p.len as usize],
                |frame, _, ident| frame.trailer[..2].copy_from_slice(&ident.to_le_bytes()),
            );
            assert_eq!(
                (report.datagrams, report.gso_sends, report.refused),
                (8, 0, 0),
                "round {round}"
            );
            assert!(!from.is_segmenting(), "not tried again");
            let mut received = ReceiveBatch::default();
            let mut count = 0;
            while count < 8 {
                to.receive(&mut received).unwrap();
                for slot in 0..received.len() {
                    let arrival = received.arrival(slot).unwrap();
                    assert_eq!(arrival.bytes[0], count, "in order");
                    // Sealed again, for the Identification of a datagram that leaves alone.
                    let trailer = &arrival.bytes[arrival.bytes.len() - 4..];
                    assert_eq!(trailer[..2], [0, 0]);
                    count += 1;
                }
            }
        }
    }

    #[test]
    fn without_offload_every_identification_is_zero() {
        let options = SocketOptions {
            offload: false,
            ..SocketOptions::default()
        };
        let (seen, report) = exchange(&options, 20, &[4096; 40]);
        assert!(seen.iter().all(|s| s.2 == 0));
        assert_eq!((report.datagrams, report.gso_sends), (40, 0));
    }

    #[test]
    fn the_wildcard_is_refused_and_a_taken_port_is_named() {
        let options = SocketOptions::default();
        let wildcard = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        assert_eq!(
            Socket::bind(wildcard, &options).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
        let (first, _) = pair(30, &options);
        let taken = Socket::bind(first.local_addr(), &options).unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
        let words = taken.to_string();
        assert!(words.contains(&first.local_addr().to_string()), "{words}");
        assert!(words.contains("another device of this process"), "{words}");
    }
}
