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
//!   source address too.
//! * No call blocks, and nothing allocates once the batches have been built.
//!
//! Deliberately absent: what a datagram means (`device`), lost or doubled datagrams (`faults`),
//! raw sockets (they need CAP_NET_RAW; the receiver solves for the Identification instead).
//!
//! Source: RoCEv2 over plain UDP sockets as measured on Linux 6.18; `net/ipv4/ip_output.c`,
//! `net/ipv4/udp_offload.c`.

use std::io;
use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};

use socket2::{Domain, Protocol, SockAddr, Socket as RawSocket, Type};

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
}

impl Default for SocketOptions {
    fn default() -> Self {
        SocketOptions {
            receive_buffer_bytes: 4 << 20,
            send_buffer_bytes: 4 << 20,
            offload: true,
        }
    }
}

/// An unconnected UDP socket whose IPv4 Identification is predictable.
#[derive(Debug)]
pub struct Socket {
    socket: UdpSocket,
    local: SocketAddr,
    is_segmenting: bool,
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
        match local {
            SocketAddr::V4(_) => {
                let discover = libc::IP_PMTUDISC_DO;
                set_option(fd, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, discover)?;
                set_option(fd, libc::IPPROTO_IP, libc::IP_PKTINFO, 1)?;
            }
            SocketAddr::V6(_) => {
                raw.set_only_v6(true)?;
                let discover = libc::IPV6_PMTUDISC_DO;
                set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, discover)?;
                set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1)?;
                // Adapters and the kernel's rxe send checksum 0 over IPv6 too.
                set_option(fd, libc::SOL_UDP, libc::UDP_NO_CHECK6_RX, 1)?;
            }
        }
        set_option(fd, libc::SOL_SOCKET, libc::SO_RXQ_OVFL, 1)?;
        // A kernel without the offloads only makes us slower.
        let is_segmenting =
            options.offload && set_option(fd, libc::SOL_UDP, libc::UDP_SEGMENT, 0).is_ok();
        if options.offload {
            let _ = set_option(fd, libc::SOL_UDP, libc::UDP_GRO, 1);
        }
        raw.bind(&SockAddr::from(local))?;
        let receive_buffer_bytes = raw.recv_buffer_size()?;
        let socket = UdpSocket::from(raw);
        let local = socket.local_addr()?;
        Ok(Socket {
            socket,
            local,
            is_segmenting,
            receive_buffer_bytes,
        })
    }

    /// The address and port in use.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// How many full datagrams the receive buffer holds while nobody reads it.
    pub fn receive_budget(&self) -> usize {
        self.receive_buffer_bytes / DATAGRAM_TRUESIZE
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
            let taken = batch.submit(self.socket.as_raw_fd(), &payload);
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

    /// Receives what is there, without waiting. Returns the number of receive calls' worth of
    /// slots filled; fewer than [`ReceiveBatch::capacity`] means that the socket is empty.
    ///
    /// # Errors
    /// Those of `recvmmsg` except `WouldBlock` and `Interrupted`, which are an empty batch.
    pub fn receive(&mut self, batch: &mut ReceiveBatch) -> io::Result<usize> {
        batch.fill(self.socket.as_raw_fd())
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

/// The MTU of the route from `local` to `target`, in bytes, as the kernel knows it.
///
/// # Errors
/// No route, or an address of another family.
pub fn path_mtu(local: SocketAddr, target: SocketAddr) -> io::Result<u32> {
    // Only a connected socket has a route to ask for; this one never sends.
    let probe = UdpSocket::bind(SocketAddr::new(local.ip(), 0))?;
    probe.connect(target)?;
    let (level, name) = match target {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MTU),
        SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_MTU),
    };
    let mut mtu: libc::c_int = 0;
    let mut len = mem::size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: value and length pointers describe live variables of the right size.
    let result = unsafe {
        libc::getsockopt(
            probe.as_raw_fd(),
            level,
            name,
            (&raw mut mtu).cast(),
            &raw mut len,
        )
    };
    if result == 0 {
        Ok(mtu.max(0) as u32)
    } else {
        Err(io::Error::last_os_error())
    }
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

fn force_buffer(fd: RawFd, name: i32, bytes: usize) -> io::Result<()> {
    set_option(
        fd,
        libc::SOL_SOCKET,
        name,
        i32::try_from(bytes).unwrap_or(i32::MAX),
    )
}

/// Where a frame's payload lies. The frame never owns it: the owner keeps it unchanged until the
/// batch has been sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Payload {
    /// Which memory, in the words of the caller's `payload` function.
    pub region: u32,
    /// Length in bytes.
    pub len: u32,
    /// Offset of the first byte in that memory.
    pub offset: u64,
}

impl Payload {
    /// No payload: acknowledgements and READ requests.
    pub const EMPTY: Payload = Payload {
        region: u32::MAX,
        len: 0,
        offset: 0,
    };
}

/// One datagram to be sent: headers, payload elsewhere, pad and ICRC.
#[derive(Debug, Clone, Copy)]
pub struct Frame {
    /// Peer's address and UDP port.
    pub target: SocketAddr,
    /// BTH and extended headers; `header_len` bytes of it count.
    pub header: [u8; HEADER_MAX],
    /// Bytes used in `header`.
    pub header_len: u8,
    /// Bytes used in `trailer`: pad and ICRC.
    pub trailer_len: u8,
    /// Pad bytes (zero), then the ICRC that `seal` writes.
    pub trailer: [u8; TRAILER_MAX],
    /// What lies between them.
    pub payload: Payload,
    /// An injected fault: to be sealed wrongly.
    pub is_spoilt: bool,
}

impl Frame {
    /// Length of the UDP payload.
    pub fn wire_len(&self) -> usize {
        usize::from(self.header_len) + self.payload.len as usize + usize::from(self.trailer_len)
    }

    /// The headers.
    pub fn header(&self) -> &[u8] {
        &self.header[..usize::from(self.header_len)]
    }
}

/// Consecutive frames that leave in one send.
#[derive(Debug, Clone, Copy, Default)]
struct Run {
    frames: u16,
    segment: u16,
    bytes: u32,
}

/// Frames waiting for one [`Socket::send`], and the arrays that the kernel reads.
pub struct TransmitBatch {
    frames: Vec<Frame>,
    runs: Vec<Run>,
    /// Index of the first frame of `runs[0]`.
    first: usize,
    messages: Vec<libc::mmsghdr>,
    vectors: Vec<libc::iovec>,
    names: Vec<libc::sockaddr_storage>,
    controls: Vec<Control>,
}

// SAFETY: the raw pointers in `messages` and `vectors` are rebuilt by every `submit` and mean
// nothing between calls; everything else is plain data.
unsafe impl Send for TransmitBatch {}

#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; CONTROL_BYTES]);

impl Default for TransmitBatch {
    fn default() -> Self {
        TransmitBatch {
            frames: Vec::with_capacity(TRANSMIT_FRAMES_MAX),
            runs: Vec::with_capacity(TRANSMIT_FRAMES_MAX),
            first: 0,
            messages: Vec::with_capacity(TRANSMIT_FRAMES_MAX),
            vectors: Vec::with_capacity(3 * TRANSMIT_FRAMES_MAX),
            names: vec![zeroed_name(); TRANSMIT_FRAMES_MAX],
            controls: vec![Control([0; CONTROL_BYTES]); TRANSMIT_FRAMES_MAX],
        }
    }
}

impl TransmitBatch {
    /// Whether no further frame fits.
    pub fn is_full(&self) -> bool {
        self.frames.len() >= TRANSMIT_FRAMES_MAX
    }

    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Frames waiting.
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// Adds a frame. The batch must not be full.
    pub fn push(&mut self, frame: Frame) {
        assert!(!self.is_full());
        self.frames.push(frame);
    }

    /// Groups the frames from `first` on into runs and seals them for their place in the run.
    fn plan<'m>(
        &mut self,
        first: usize,
        is_segmenting: bool,
        payload: &impl Fn(&Payload) -> &'m [u8],
        seal: &mut impl FnMut(&mut Frame, &[u8], u16),
    ) {
        self.first = first;
        self.runs.clear();
        let mut next = first;
        while next < self.frames.len() {
            let head = &self.frames[next];
            let (target, segment) = (head.target, head.wire_len());
            let mut run = Run {
                frames: 0,
                segment: segment as u16,
                bytes: 0,
            };
            while let Some(frame) = self.frames.get_mut(next + usize::from(run.frames)) {
                let len = frame.wire_len();
                let is_joining = run.frames > 0;
                if is_joining
                    && (!is_segmenting
                        || usize::from(run.frames) == SEGMENTS_MAX
                        || frame.target != target
                        || len > segment
                        || run.bytes as usize + len > SEND_BYTES_MAX)
                {
                    break;
                }
                seal(frame, payload(&frame.payload), run.frames);
                run.frames += 1;
                run.bytes += len as u32;
                if len < segment {
                    break;
                }
            }
            next += usize::from(run.frames);
            self.runs.push(run);
        }
    }

    /// Hands the planned runs to `sendmmsg`; returns how many of them it took.
    fn submit<'m>(
        &mut self,
        fd: RawFd,
        payload: &impl Fn(&Payload) -> &'m [u8],
    ) -> io::Result<usize> {
        self.vectors.clear();
        self.messages.clear();
        let frames = &mut self.frames[self.first..];
        for frame in frames.iter() {
            let body = payload(&frame.payload);
            assert_eq!(body.len(), frame.payload.len as usize);
            self.vectors.push(vector(frame.header()));
            self.vectors.push(vector(body));
            self.vectors
                .push(vector(&frame.trailer[..usize::from(frame.trailer_len)]));
        }
        let mut frame = 0;
        for (index, run) in self.runs.iter().enumerate() {
            let name_len = write_name(&mut self.names[index], &frames[frame].target);
            // SAFETY: an all-zero msghdr is a valid one.
            let mut message: libc::mmsghdr = unsafe { mem::zeroed() };
            let header = &mut message.msg_hdr;
            header.msg_name = (&raw mut self.names[index]).cast();
            header.msg_namelen = name_len;
            header.msg_iov = &raw mut self.vectors[3 * frame];
            header.msg_iovlen = 3 * usize::from(run.frames);
            if run.frames > 1 {
                let control = &mut self.controls[index];
                header.msg_control = control.0.as_mut_ptr().cast();
                header.msg_controllen = write_segment_control(control, run.segment);
            }
            self.messages.push(message);
            frame += usize::from(run.frames);
        }
        // SAFETY: `messages` has `len` valid entries; each points into `names`, `vectors` and
        // `controls`, which are not touched until the call returns, and each vector into a frame or
        // a payload that is borrowed for as long. The kernel only reads them.
        let sent = unsafe {
            libc::sendmmsg(
                fd,
                self.messages.as_mut_ptr(),
                self.messages.len() as libc::c_uint,
                libc::MSG_DONTWAIT,
            )
        };
        if sent < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(sent as usize)
        }
    }
}

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

fn write_segment_control(control: &mut Control, segment: u16) -> usize {
    let header = control.0.as_mut_ptr().cast::<libc::cmsghdr>();
    // SAFETY: `control` is aligned for cmsghdr and far larger than CMSG_SPACE(2).
    unsafe {
        (*header).cmsg_level = libc::SOL_UDP;
        (*header).cmsg_type = libc::UDP_SEGMENT;
        (*header).cmsg_len = libc::CMSG_LEN(2) as usize;
        libc::CMSG_DATA(header)
            .cast::<u16>()
            .write_unaligned(segment);
        libc::CMSG_SPACE(2) as usize
    }
}

fn write_name(storage: &mut libc::sockaddr_storage, address: &SocketAddr) -> libc::socklen_t {
    let len = match address {
        SocketAddr::V4(v4) => {
            // SAFETY: sockaddr_storage is larger than, and aligned for, every socket address; it
            // was initialised with zeroes.
            let name = unsafe { &mut *(&raw mut *storage).cast::<libc::sockaddr_in>() };
            name.sin_family = libc::AF_INET as libc::sa_family_t;
            name.sin_port = v4.port().to_be();
            name.sin_addr.s_addr = u32::from(*v4.ip()).to_be();
            mem::size_of::<libc::sockaddr_in>()
        }
        SocketAddr::V6(v6) => {
            // SAFETY: as above.
            let name = unsafe { &mut *(&raw mut *storage).cast::<libc::sockaddr_in6>() };
            name.sin6_family = libc::AF_INET6 as libc::sa_family_t;
            name.sin6_port = v6.port().to_be();
            name.sin6_flowinfo = 0;
            name.sin6_addr.s6_addr = v6.ip().octets();
            name.sin6_scope_id = v6.scope_id();
            mem::size_of::<libc::sockaddr_in6>()
        }
    };
    len as libc::socklen_t
}

/// Buffers for one `recvmmsg` and what arrived in them.
pub struct ReceiveBatch {
    buffers: Box<[u8]>,
    messages: Vec<libc::mmsghdr>,
    vectors: Vec<libc::iovec>,
    names: Vec<libc::sockaddr_storage>,
    controls: Vec<Control>,
    filled: usize,
}

// SAFETY: as for `TransmitBatch`.
unsafe impl Send for ReceiveBatch {}

/// What arrived in one slot: a datagram, or a run of them from one peer.
#[derive(Debug, Clone, Copy)]
pub struct Arrival<'a> {
    /// Where it came from.
    pub source: SocketAddr,
    /// Destination address of the packet, as the ICRC covers it; none if the kernel did not say.
    pub target: Option<IpAddr>,
    /// All bytes of the run.
    pub bytes: &'a [u8],
    /// Length of each datagram in `bytes` but the last, which may be shorter; never 0.
    pub segment: usize,
    /// Whether the kernel cut it short.
    pub is_truncated: bool,
    /// Datagrams this socket has dropped for want of buffer, ever (SO_RXQ_OVFL).
    pub overflow: Option<u32>,
}

impl Default for ReceiveBatch {
    fn default() -> Self {
        // SAFETY: an all-zero mmsghdr is a valid one.
        let message: libc::mmsghdr = unsafe { mem::zeroed() };
        ReceiveBatch {
            buffers: vec![0; RECEIVE_SLOTS * RECEIVE_SLOT_BYTES].into_boxed_slice(),
            messages: vec![message; RECEIVE_SLOTS],
            vectors: vec![vector(&[]); RECEIVE_SLOTS],
            names: vec![zeroed_name(); RECEIVE_SLOTS],
            controls: vec![Control([0; CONTROL_BYTES]); RECEIVE_SLOTS],
            filled: 0,
        }
    }
}

impl ReceiveBatch {
    /// Slots in the batch.
    pub fn capacity(&self) -> usize {
        RECEIVE_SLOTS
    }

    /// Slots filled by the last [`Socket::receive`].
    pub fn len(&self) -> usize {
        self.filled
    }

    /// Whether nothing arrived.
    pub fn is_empty(&self) -> bool {
        self.filled == 0
    }

    fn fill(&mut self, fd: RawFd) -> io::Result<usize> {
        self.filled = 0;
        for (index, buffer) in self
            .buffers
            .chunks_exact_mut(RECEIVE_SLOT_BYTES)
            .enumerate()
        {
            self.vectors[index] = libc::iovec {
                iov_base: buffer.as_mut_ptr().cast(),
                iov_len: buffer.len(),
            };
            let header = &mut self.messages[index].msg_hdr;
            header.msg_name = (&raw mut self.names[index]).cast();
            header.msg_namelen = mem::size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            header.msg_iov = &raw mut self.vectors[index];
            header.msg_iovlen = 1;
            header.msg_control = self.controls[index].0.as_mut_ptr().cast();
            header.msg_controllen = CONTROL_BYTES;
            header.msg_flags = 0;
        }
        // SAFETY: every entry of `messages` points at a name, a vector with its buffer, and a
        // control block of its own, all owned by `self` and borrowed mutably until the call
        // returns.
        let count = unsafe {
            libc::recvmmsg(
                fd,
                self.messages.as_mut_ptr(),
                RECEIVE_SLOTS as libc::c_uint,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        if count < 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(0),
                _ => Err(error),
            };
        }
        self.filled = count as usize;
        Ok(self.filled)
    }

    /// What arrived in slot `index`; none when its sender's address is of no family we know.
    pub fn arrival(&self, index: usize) -> Option<Arrival<'_>> {
        assert!(index < self.filled);
        let message = &self.messages[index];
        let start = index * RECEIVE_SLOT_BYTES;
        let len = (message.msg_len as usize).min(RECEIVE_SLOT_BYTES);
        let mut arrival = Arrival {
            source: read_name(&self.names[index])?,
            target: None,
            bytes: &self.buffers[start..start + len],
            segment: len.max(1),
            is_truncated: message.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
            overflow: None,
        };
        read_controls(&message.msg_hdr, &mut arrival);
        Some(arrival)
    }
}

fn read_name(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match i32::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: the kernel says that the storage holds a sockaddr_in, which is smaller.
            let name = unsafe { &*(&raw const *storage).cast::<libc::sockaddr_in>() };
            let ip = Ipv4Addr::from(u32::from_be(name.sin_addr.s_addr));
            Some(SocketAddrV4::new(ip, u16::from_be(name.sin_port)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: the kernel says that the storage holds a sockaddr_in6, which is smaller.
            let name = unsafe { &*(&raw const *storage).cast::<libc::sockaddr_in6>() };
            let ip = Ipv6Addr::from(name.sin6_addr.s6_addr);
            Some(SocketAddrV6::new(ip, u16::from_be(name.sin6_port), 0, name.sin6_scope_id).into())
        }
        _ => None,
    }
}

fn read_controls(header: &libc::msghdr, arrival: &mut Arrival<'_>) {
    // SAFETY: `header` is as the kernel left it: its control block is ours and `msg_controllen`
    // bytes of it are valid. CMSG_FIRSTHDR and CMSG_NXTHDR stay inside those, and each payload read
    // is of the type that the kernel writes for that level and type.
    unsafe {
        let mut next = libc::CMSG_FIRSTHDR(header);
        while let Some(control) = next.as_ref() {
            let data = libc::CMSG_DATA(control);
            match (control.cmsg_level, control.cmsg_type) {
                (libc::SOL_UDP, libc::UDP_GRO) => {
                    let segment = data.cast::<libc::c_int>().read_unaligned();
                    if let Ok(segment @ 1..) = usize::try_from(segment) {
                        arrival.segment = segment;
                    }
                }
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    let info = data.cast::<libc::in_pktinfo>().read_unaligned();
                    let address = Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr));
                    arrival.target = Some(address.into());
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    let info = data.cast::<libc::in6_pktinfo>().read_unaligned();
                    arrival.target = Some(Ipv6Addr::from(info.ipi6_addr.s6_addr).into());
                }
                (libc::SOL_SOCKET, libc::SO_RXQ_OVFL) => {
                    arrival.overflow = Some(data.cast::<u32>().read_unaligned());
                }
                _ => {}
            }
            next = libc::CMSG_NXTHDR(header, control);
        }
    }
}

#[cfg(test)]
mod tests {
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
                assert_eq!(arrival.target, Some(to.local_addr().ip()));
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
    }
}
