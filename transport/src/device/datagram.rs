//! Datagram queue pairs on the device: addresses, the IP header before each message, multicast.
//!
//! Owns: the table of address handles, the groups joined with a socket each, and the making of the
//! 40 bytes that a datagram's receive begins with. A UDP socket does not see the header that came, so
//! it is made from what is known: traffic class (but for the mark of congestion) and TTL are not. Its
//! checksum is right, because readers tell IPv4 from IPv6 by it.
//!
//! Invariants: a datagram goes to every queue pair attached to its group, each of which takes or
//! drops its copy by itself; a group's socket lives as long as some queue pair is attached.
//!
//! Source: IBTA annex A17; `get_grh_header_version` of rdma-core for how the header is read.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, RawFd};

use lowtide_transport_proto::qp::{AddressHandle, GRH_LEN, Outcome, UdQueuePair};
use lowtide_transport_proto::wire::Packet;

use super::view::View;
use super::{Device, Input, Machine, QpId};
use crate::udp::{Arrival, Socket};

/// Datagrams that one queue pair sends before the next has its turn.
const BURST: usize = 15;
/// Address handles a device may have.
pub(crate) const ADDRESSES_MAX: usize = 1 << 20;
/// Multicast groups a device may have joined: a socket each.
pub(crate) const GROUPS_MAX: usize = 256;
/// What a header's TTL is where the socket does not say.
const TTL: u8 = 64;
const UDP_PROTOCOL: u8 = 17;
const UDP_HEADER_LEN: usize = 8;
const IPV4_HEADER_LEN: usize = 20;

/// A multicast group that some queue pair is attached to.
pub(super) struct Group {
    pub(super) ip: IpAddr,
    pub(super) socket: Socket,
    members: Vec<QpId>,
}

impl Device {
    /// Makes a handle for a destination; none when there are too many.
    pub(crate) fn create_address(&mut self, target: SocketAddr) -> Option<AddressHandle> {
        let index = match self.free_addresses.pop() {
            Some(index) => index as usize,
            None if self.addresses.len() >= ADDRESSES_MAX => return None,
            None => {
                self.addresses.push(None);
                self.addresses.len() - 1
            }
        };
        self.addresses[index] = Some(target);
        Some(AddressHandle(index as u64))
    }

    pub(crate) fn destroy_address(&mut self, handle: AddressHandle) {
        let address = self.addresses.get_mut(handle.0 as usize);
        if address.and_then(Option::take).is_some() {
            self.free_addresses.push(handle.0 as u32);
        }
    }

    /// Whether the handle exists.
    pub(crate) fn has_address(&self, handle: AddressHandle) -> bool {
        matches!(self.addresses.get(handle.0 as usize), Some(Some(_)))
    }

    /// The datagram queue pair, to post to or to move; whatever it then wants to send will be sent.
    pub(crate) fn datagram(&mut self, id: QpId) -> Option<&mut UdQueuePair> {
        if matches!(
            self.slots.get(id.0 as usize)?.machine,
            Some(Machine::Datagram(_))
        ) {
            self.mark_ready(id.0);
        }
        match self.slots[id.0 as usize].machine.as_mut() {
            Some(Machine::Datagram(qp)) => Some(qp),
            _ => None,
        }
    }

    /// One turn of a datagram queue pair.
    pub(super) fn transmit_datagrams(&mut self, index: u32) {
        for _ in 0..BURST {
            let Some(Machine::Datagram(qp)) = &mut self.slots[index as usize].machine else {
                return;
            };
            let Some((transmit, AddressHandle(handle))) = qp.poll_transmit() else {
                return;
            };
            self.note_finished(index);
            // A handle destroyed under a posted request fails it like memory that has gone.
            let address = self.addresses.get(handle as usize).copied().flatten();
            let gathered = address.and_then(|to| Some((to, self.gather(index, &transmit).ok()?)));
            match gathered {
                Some((to, payload)) => self.push(to, transmit.header(), payload, false),
                None => {
                    if let Some(Machine::Datagram(qp)) = &mut self.slots[index as usize].machine {
                        qp.handle_transmit_failure();
                    }
                }
            }
        }
        self.mark_ready(index);
    }

    /// A datagram for queue pair `index`.
    pub(super) fn handle_datagram(
        &mut self,
        index: u32,
        arrival: &Arrival<'_>,
        identification: u16,
        packet: &Packet<'_>,
    ) -> Outcome {
        let target = arrival.target.unwrap_or(self.socket.local_addr().ip());
        let header = ip_header(arrival, target, identification, packet.len());
        let slot = &mut self.slots[index as usize];
        let Some(Machine::Datagram(qp)) = &mut slot.machine else {
            unreachable!("the caller has looked");
        };
        let mut view = View {
            memory: &mut self.memory,
            domain: slot.domain,
            peer_domain: slot.peer_domain,
            qp: slot.qpn.value(),
            placed: None,
            shared: slot
                .srq
                .map(|srq| &mut self.srqs[srq as usize])
                .and_then(Option::as_mut),
        };
        qp.handle_packet(packet, &header, &mut view)
    }

    /// A datagram for a group.
    pub(super) fn handle_multicast(
        &mut self,
        arrival: &Arrival<'_>,
        identification: u16,
        packet: &Packet<'_>,
    ) -> Input {
        let group = arrival
            .target
            .and_then(|ip| self.groups.iter().position(|g| g.ip == ip));
        let Some(group) = group else {
            self.counters.rx_unknown_qp += 1;
            return Input::Dropped;
        };
        for member in 0..self.groups[group].members.len() {
            let QpId(index) = self.groups[group].members[member];
            if self.handle_datagram(index, arrival, identification, packet) == Outcome::Accepted {
                self.note_finished(index);
            }
        }
        Input::Delivered
    }

    /// Attaches a datagram queue pair to a group; its socket if it is new, to be waited for.
    pub(crate) fn attach(&mut self, id: QpId, ip: IpAddr) -> io::Result<Option<RawFd>> {
        if let Some(group) = self.groups.iter_mut().find(|group| group.ip == ip) {
            if !group.members.contains(&id) {
                group.members.push(id);
            }
            return Ok(None);
        }
        if self.groups.len() >= GROUPS_MAX {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        let socket = Socket::join(ip, self.socket.local_addr())?;
        let fd = socket.as_raw_fd();
        let members = vec![id];
        self.groups.push(Group {
            ip,
            socket,
            members,
        });
        Ok(Some(fd))
    }

    /// Detaches it again; false if it was not attached.
    pub(crate) fn detach(&mut self, id: QpId, ip: IpAddr) -> bool {
        let Some(group) = self.groups.iter_mut().find(|group| group.ip == ip) else {
            return false;
        };
        let before = group.members.len();
        group.members.retain(|member| *member != id);
        let was_attached = group.members.len() < before;
        self.groups.retain(|group| !group.members.is_empty());
        was_attached
    }

    /// Detaches a queue pair from everything.
    pub(super) fn detach_all(&mut self, id: QpId) {
        for group in &mut self.groups {
            group.members.retain(|member| *member != id);
        }
        self.groups.retain(|group| !group.members.is_empty());
    }

    /// The sockets of the groups, newest last.
    pub(crate) fn group_sockets(&mut self) -> impl DoubleEndedIterator<Item = &mut Socket> {
        self.groups.iter_mut().map(|group| &mut group.socket)
    }
}

/// The IP header of a datagram of `len` UDP payload bytes, as the first bytes of its receive.
fn ip_header(
    arrival: &Arrival<'_>,
    target: IpAddr,
    identification: u16,
    len: usize,
) -> [u8; GRH_LEN] {
    let mut bytes = [0; GRH_LEN];
    let udp_len = (UDP_HEADER_LEN + len) as u16;
    let class = if arrival.is_congested { 3 } else { 0 };
    match (arrival.source.ip(), target) {
        (IpAddr::V4(source), IpAddr::V4(target)) => {
            let header = &mut bytes[GRH_LEN - IPV4_HEADER_LEN..];
            header[0] = 0x45;
            header[1] = class;
            header[2..4].copy_from_slice(&(IPV4_HEADER_LEN as u16 + udp_len).to_be_bytes());
            header[4..6].copy_from_slice(&identification.to_be_bytes());
            header[6] = 0x40; // don't fragment
            header[8..10].copy_from_slice(&[TTL, UDP_PROTOCOL]);
            header[12..16].copy_from_slice(&source.octets());
            header[16..20].copy_from_slice(&target.octets());
            let checksum = checksum(header);
            header[10..12].copy_from_slice(&checksum.to_be_bytes());
        }
        (IpAddr::V6(source), IpAddr::V6(target)) => {
            bytes[0] = 0x60 | class >> 4;
            bytes[1] = class << 4;
            bytes[4..6].copy_from_slice(&udp_len.to_be_bytes());
            bytes[6..8].copy_from_slice(&[UDP_PROTOCOL, TTL]);
            bytes[8..24].copy_from_slice(&source.octets());
            bytes[24..40].copy_from_slice(&target.octets());
        }
        // A socket has one family.
        _ => {}
    }
    bytes
}

/// The ones' complement sum of RFC 1071.
fn checksum(header: &[u8]) -> u16 {
    let words = header.chunks_exact(2);
    let sum: u32 = words
        .map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])))
        .sum();
    !((sum & 0xFFFF) + (sum >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrival(source: &str) -> Arrival<'static> {
        Arrival {
            source: source.parse().unwrap(),
            target: None,
            bytes: &[],
            segment: 1,
            is_truncated: false,
            is_congested: true,
            overflow: None,
        }
    }

    #[test]
    fn the_header_is_one_that_readers_recognise() {
        let target = "10.0.0.2".parse().unwrap();
        let bytes = ip_header(&arrival("10.0.0.1:4791"), target, 0x1234, 280);
        assert_eq!(bytes[..20], [0; 20]);
        let header = &bytes[20..];
        assert_eq!(
            checksum(header),
            0,
            "the sum over a right header is all ones"
        );
        assert_eq!(header[..8], [0x45, 3, 0x01, 0x34, 0x12, 0x34, 0x40, 0]);
        assert_eq!(header[12..], [10, 0, 0, 1, 10, 0, 0, 2]);

        let target = "fe80::2".parse().unwrap();
        let bytes = ip_header(&arrival("[fe80::1]:4791"), target, 0, 280);
        assert_eq!(bytes[..8], [0x60, 0x30, 0, 0, 0x01, 0x20, 17, 64]);
        assert_eq!(
            (bytes[8], bytes[23], bytes[24], bytes[39]),
            (0xFE, 1, 0xFE, 2)
        );
    }
}
