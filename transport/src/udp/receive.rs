//! Datagrams on their way in: `recvmmsg` into a pool of buffers, and what the kernel says of each.

use std::io;
use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::RawFd;

use super::{CONTROL_BYTES, Control, RECEIVE_SLOT_BYTES, RECEIVE_SLOTS, vector, zeroed_name};

/// The ECN bits of a traffic class, and what a congested switch sets them to.
const ECN_MASK: u8 = 3;
const ECN_CONGESTED: u8 = 3;

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
    /// Whether a switch has marked it: congestion experienced (ECN, 0b11).
    pub is_congested: bool,
    /// Datagrams this socket has dropped for want of buffer, ever (SO_RXQ_OVFL).
    pub overflow: Option<u32>,
}

impl<'a> Arrival<'a> {
    /// The datagrams of the run and their places in it: what one send has segmented is numbered so.
    pub fn datagrams(&self) -> impl Iterator<Item = (u16, &'a [u8])> {
        (0..).zip(self.bytes.chunks(self.segment))
    }
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

    /// Slots filled by the last [`super::Socket::receive`].
    pub fn len(&self) -> usize {
        self.filled
    }

    /// Whether nothing arrived.
    pub fn is_empty(&self) -> bool {
        self.filled == 0
    }

    /// One `recvmmsg` for at most `max` slots.
    pub(super) fn fill(&mut self, fd: RawFd, max: usize) -> io::Result<usize> {
        self.filled = 0;
        // One borrow of each array: a second one would end what pointers from the first may reach.
        let buffers = self.buffers.chunks_exact_mut(RECEIVE_SLOT_BYTES);
        let slots = buffers.zip(&mut self.vectors).zip(&mut self.names);
        let slots = slots.zip(&mut self.controls).zip(&mut self.messages);
        for ((((buffer, vector), name), control), message) in slots.take(max) {
            *vector = libc::iovec {
                iov_base: buffer.as_mut_ptr().cast(),
                iov_len: buffer.len(),
            };
            let header = &mut message.msg_hdr;
            header.msg_name = (&raw mut *name).cast();
            header.msg_namelen = mem::size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            header.msg_iov = vector;
            header.msg_iovlen = 1;
            header.msg_control = control.0.as_mut_ptr().cast();
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
                max.min(RECEIVE_SLOTS) as libc::c_uint,
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
            is_congested: false,
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
                (libc::IPPROTO_IP, libc::IP_TOS) => {
                    arrival.is_congested = data.read() & ECN_MASK == ECN_CONGESTED;
                }
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                    let class = data.cast::<libc::c_int>().read_unaligned();
                    arrival.is_congested = class as u8 & ECN_MASK == ECN_CONGESTED;
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
