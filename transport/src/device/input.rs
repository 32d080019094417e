//! The device's receiving side: from a datagram to the queue pair that it is for.
//!
//! Owns: the order of checks, and the congestion notifications (CNP) that marked packets earn: at most
//! one per queue pair in [`CNP_INTERVAL`], however many marked packets come.
//!
//! Deliberately absent: marking our own packets ECN-capable. Kernels' soft-RoCE answers no mark, so
//! the packets would be let through without anybody slowing down.
//!
//! Source: Linux `rxe_recv.c` for the order of checks, annex A17 and DCQCN for the notification.

use std::io;
use std::net::SocketAddr;
use std::ops::Range;

use lowtide_transport_proto::cm::GSI_QKEY;
use lowtide_transport_proto::icrc;
use lowtide_transport_proto::qp;
use lowtide_transport_proto::time::Nanos;
use lowtide_transport_proto::wire::{Class, Extension, Header, Opcode, Packet, Psn, Qpn};

use super::output::flow;
use super::view::View;
use super::{Device, Machine, QpId, Slot};
use crate::udp::{Arrival, HEADER_MAX, Payload, ReceiveBatch};

/// The least time between two congestion notifications of one queue pair; adapters' default.
const CNP_INTERVAL: Nanos = Nanos::from_micros(50);

/// What happened to a datagram.
#[derive(Debug)]
pub(crate) enum Input {
    /// It was dropped, and counted.
    Dropped,
    /// A queue pair took it. `placed` are the bytes that went to a receive of key [`IN_PLACE`](super::IN_PLACE):
    /// their offset in the message and where in the datagram they are.
    Taken {
        id: QpId,
        placed: Option<(u64, Range<usize>)>,
    },
    /// A management datagram for queue pair 1: where in the datagram it is.
    Management(Range<usize>),
    /// A good packet of a connection that does not exist here.
    UnknownQueuePair(Qpn),
    /// A datagram for a group; `poll_finished` names the queue pairs that took it.
    Delivered,
}

impl Input {
    /// The queue pair that took it.
    pub(crate) fn queue_pair(&self) -> Option<QpId> {
        match self {
            Input::Taken { id, .. } => Some(*id),
            _ => None,
        }
    }
}

impl Device {
    /// Fills `batch` with what has arrived; less than its capacity means that the socket is empty.
    pub(crate) fn receive(&mut self, batch: &mut ReceiveBatch) -> io::Result<usize> {
        self.socket.receive(batch)
    }

    /// The same with at most `max` slots.
    pub(crate) fn receive_some(
        &mut self,
        batch: &mut ReceiveBatch,
        max: usize,
    ) -> io::Result<usize> {
        self.socket.receive_some(batch, max)
    }

    /// The same for the groups joined: 0 means that all their sockets are empty.
    pub(crate) fn receive_multicast(&mut self, batch: &mut ReceiveBatch) -> io::Result<usize> {
        for socket in self.group_sockets() {
            let filled = socket.receive(batch)?;
            if filled > 0 {
                return Ok(filled);
            }
        }
        Ok(0)
    }

    /// Counts a datagram that was cut short or came from nowhere.
    pub(crate) fn count_malformed(&mut self) {
        self.counters.rx_malformed += 1;
    }

    /// Notes what the kernel says about one receive.
    pub(crate) fn count_receive(&mut self, bytes: usize, datagrams: u64, overflow: Option<u32>) {
        self.counters.rx_bytes += bytes as u64;
        self.counters.rx_datagrams += datagrams;
        self.counters.gro_receives += u64::from(datagrams > 1);
        // A datagram without a byte is one that `handle` never sees.
        self.counters.rx_malformed += u64::from(datagrams == 0);
        if let Some(overflow) = overflow {
            self.counters.rx_overflow = u64::from(overflow);
        }
    }

    /// Takes one datagram of an arrival, in whose run it has this place. After `Taken` the caller polls
    /// that queue pair's completions.
    pub(crate) fn handle(
        &mut self,
        now: Nanos,
        arrival: &Arrival<'_>,
        place: u16,
        datagram: &[u8],
    ) -> Input {
        if self.faults.is_blocked(&arrival.source) {
            self.counters.faults_blocked += 1;
            return Input::Dropped;
        }
        let Ok(packet) = Packet::new_checked(datagram) else {
            self.counters.rx_malformed += 1;
            return Input::Dropped;
        };
        let Arrival { source, target, .. } = *arrival;
        let local = self.socket.local_addr();
        let Some(flow) = flow(source, target.unwrap_or(local.ip()), local.port()) else {
            self.counters.rx_malformed += 1;
            return Input::Dropped;
        };
        // Our own ends number the segments of a send so.
        let likely = flow.with_identification(place);
        let solved = icrc::check_unknown_identification(&likely, &packet);
        if let (Some(capture), Some(identification)) = (&mut self.capture, solved) {
            let target = SocketAddr::new(target.unwrap_or(local.ip()), local.port());
            capture.record(source, target, identification, &[datagram]);
        }
        let Some(solved) = solved else {
            self.counters.rx_bad_icrc += 1;
            return Input::Dropped;
        };
        if !self.identities.believe(now, source.ip(), solved) {
            self.counters.rx_odd_identification += 1;
            return Input::Dropped;
        }
        self.counters.rcvd_pkts += 1;
        if packet.dest() == Qpn::GSI {
            return match packet.extension() {
                Extension::Deth(deth) if deth.qkey == GSI_QKEY => {
                    Input::Management(packet.payload_range())
                }
                _ => {
                    self.counters.rx_unknown_qp += 1;
                    Input::Dropped
                }
            };
        }
        if packet.dest() == Qpn::MULTICAST {
            return self.handle_multicast(arrival, solved, &packet);
        }
        self.handle_unicast(now, arrival, solved, &packet)
    }

    #[inline(always)] // an arrival that was made of a ring's record exists nowhere else
    pub(super) fn handle_unicast(
        &mut self,
        now: Nanos,
        arrival: &Arrival<'_>,
        identification: u16,
        packet: &Packet<'_>,
    ) -> Input {
        let is_congested = arrival.is_congested;
        let index = self.qpns.find(packet.dest().value()).unwrap_or(u32::MAX);
        let slot = self.slots.get_mut(index as usize);
        if let Some(Slot {
            machine: Some(Machine::Datagram(_)),
            ..
        }) = slot
        {
            self.handle_datagram(index, arrival, identification, packet);
            return Input::Taken {
                id: QpId(index),
                placed: None,
            };
        }
        let connected = slot.filter(|slot| slot.machine.is_some());
        let Some(peer) = connected.and_then(|slot| slot.peer) else {
            self.counters.rx_unknown_qp += 1;
            return match packet.row().class {
                Class::Rc if !packet.opcode().is_response() => {
                    Input::UnknownQueuePair(packet.dest())
                }
                _ => Input::Dropped,
            };
        };
        if self.peers[peer as usize].address.ip() != arrival.source.ip() {
            self.counters.rx_wrong_peer += 1;
            return Input::Dropped;
        }
        if is_congested && packet.row().class != Class::Cnp {
            // Notifications about notifications would never end.
            self.notify_congestion(now, index, peer);
        }
        self.counters.np_ecn_marked_roce_packets += u64::from(is_congested);
        self.handle_connected(now, index, peer, packet)
    }

    /// Takes the packet of a queue pair that was kept and whose turn has come, and the datagram; until
    /// there is none after each `Taken`. The datagram is to be given back with [`Self::give_back`].
    #[inline]
    pub(crate) fn handle_kept(&mut self, now: Nanos, id: QpId) -> Option<(Input, Vec<u8>)> {
        let slot = self.slots.get_mut(id.0 as usize)?;
        let (Some(Machine::Connected(qp)), Some(peer)) = (&mut slot.machine, slot.peer) else {
            return None;
        };
        let wanted = qp.wants_kept()?;
        self.take_kept(now, id, peer, wanted)
    }

    fn take_kept(
        &mut self,
        now: Nanos,
        id: QpId,
        peer: u32,
        wanted: qp::EarlyPacket,
    ) -> Option<(Input, Vec<u8>)> {
        let Some(Machine::Connected(qp)) = &mut self.slots[id.0 as usize].machine else {
            return None;
        };
        let Some(datagram) = self.kept.take(id.0, wanted) else {
            qp.forget_kept(wanted);
            self.mark_ready(id.0);
            return None;
        };
        // It was one when it was kept.
        let packet = Packet::new_checked(&datagram).ok()?;
        let input = self.handle_connected(now, id.0, peer, &packet);
        Some((input, datagram))
    }

    pub(crate) fn give_back(&mut self, datagram: Vec<u8>) {
        self.kept.give_back(datagram);
    }

    #[inline]
    fn handle_connected(
        &mut self,
        now: Nanos,
        index: u32,
        peer: u32,
        packet: &Packet<'_>,
    ) -> Input {
        let slot = &mut self.slots[index as usize];
        let Some(Machine::Connected(qp)) = slot.machine.as_mut() else {
            return Input::Dropped;
        };
        let mut view = View {
            memory: &mut self.memory,
            domain: slot.domain,
            peer_domain: slot.peer_domain,
            qp: slot.qpn.value(),
            placed: None,
            shared: match slot.srq {
                Some(srq) => self.srqs[srq as usize].as_mut(),
                None => None,
            },
        };
        let outcome = qp.handle_packet(now, packet, &mut view);
        let placed = view.placed.map(|offset| (offset, packet.payload_range()));
        if outcome == qp::Outcome::Ahead {
            let name = qp::EarlyPacket::of(packet);
            self.kept.keep(index, name, packet.bytes());
            qp.note_kept(packet);
        }
        if packet.row().class == Class::Cnp && outcome == qp::Outcome::Accepted {
            self.peers[peer as usize].budget.note_congestion(now);
        }
        self.settle(index);
        self.mark_ready(index);
        Input::Taken {
            id: QpId(index),
            placed,
        }
    }

    /// Tells the sender of a marked packet that some switch on the way was congested, unless it has
    /// just been told.
    fn notify_congestion(&mut self, now: Nanos, index: u32, peer: u32) {
        let slot = &mut self.slots[index as usize];
        let Some(Machine::Connected(qp)) = &slot.machine else {
            return;
        };
        if slot
            .notified
            .is_some_and(|last| now.since(last) < CNP_INTERVAL)
        {
            return;
        }
        slot.notified = Some(now);
        let mut header = Header::new(Opcode::Cnp, qp.dest(), Psn::new(0), Extension::Cnp);
        header.becn = true;
        let mut bytes = [0; HEADER_MAX];
        let len = header.emit(&mut bytes);
        self.counters.np_cnp_sent += 1;
        let address = self.peers[peer as usize].address;
        self.push(address, &bytes[..len], Payload::EMPTY, false);
    }
}
