//! The soft-RoCE device: queue pairs, their packets, their timers, their peers.
//!
//! Owns: the socket, the registered memory, every queue pair's state machine with its number, its
//! timer and its place in the round of senders, and a [`Budget`] per peer. It is driven by one
//! thread at a time, which calls in this order: [`Device::receive`] with [`Device::handle`] for each
//! datagram, [`Device::expire`], whatever it wants to post, [`Device::transmit`]. So an
//! acknowledgement that a batch of packets earned leaves in one packet at its end.
//!
//! Invariants:
//! * a datagram changes nothing before its ICRC is known good and its source is the queue pair's
//!   peer; everything else is counted and dropped;
//! * numbers of queue pairs are drawn, 24 bits, so nobody guesses one, and late packets for one that is
//!   gone find nobody, but for one chance in as many;
//! * payload is staged by reference and sent before the next packet is handled, so no slot changes
//!   its owner in between.
//!
//! Deliberately absent: completion queues (`raw`), messages and connections (`message`), and any
//! wait: this module never blocks.
//! Input is `input`'s, sending `output`'s; `datagram` has what only datagrams need.

mod budget;
mod counters;
mod datagram;
mod host;
#[cfg(any(test, fuzzing))]
pub(crate) mod hostile;
mod identity;
mod input;
mod kept;
mod output;
mod shared_receives;
#[cfg(test)]
mod tests;
mod timers;
mod view;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::time::Instant;

use lowtide_transport_proto::qp::{
    self, Completion, Lkey, QpCaps, QpEvent, QpKind, QpState, QueuePair, UdQueuePair,
};
use lowtide_transport_proto::time::Nanos;
use lowtide_transport_proto::wire::{Mtu, Qpn};

use self::budget::Budget;
pub use self::counters::Counters;
use self::counters::add_counters;
use self::datagram::Group;
pub(crate) use self::datagram::{ADDRESSES_MAX, GROUPS_MAX};
use self::identity::Identities;
pub(crate) use self::identity::Peers;
pub(crate) use self::input::Input;
use self::kept::Kept;
pub(crate) use self::shared_receives::SharedReceives;
use self::timers::Timers;
use crate::faults::{FaultInjector, Faults};
use crate::host::{Hosts, QpEntry, SameHost};
use crate::memory::Memory;
use crate::names::{Names, Random};
use crate::pcap::Capture;
use crate::udp::{Frame, Socket, SocketOptions, TransmitBatch};

/// Queue pairs a device may have.
pub(crate) const QUEUE_PAIRS_MAX: usize = 32_768;
/// Work requests in one queue of a queue pair: their memory is reserved when it is made.
pub(crate) const WORK_REQUESTS_MAX: u32 = 1 << 16;
/// The lowest queue pair number given out, as Linux rxe's; 0 and 1 are special.
const QPN_FIRST: u32 = 16;
/// Local key of receives whose bytes are not stored but handed up where they arrived.
pub(crate) const IN_PLACE: Lkey = Lkey(u32::MAX);

/// How a device is opened.
#[derive(Debug, Clone, Default)]
pub struct DeviceOptions {
    /// Socket buffers and offloads.
    pub socket: SocketOptions,
    /// Injected faults.
    pub faults: Faults,
    /// A pcap file to be written, of everything sent and everything with a right ICRC received.
    pub capture: Option<PathBuf>,
    /// How peers on this host are reached. By UDP in any case if there are faults or a capture: both
    /// are about packets on a wire.
    pub same_host: SameHost,
}

/// Which queue pair; valid until it is destroyed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct QpId(pub(crate) u32);

/// Which sort of queue pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Of one peer.
    Connected(QpKind),
    /// Of everybody, with messages of at most one packet of this size.
    Datagram(Mtu),
}

/// A queue pair's state machine.
#[allow(clippy::large_enum_variant, reason = "almost all are the large one")]
pub(crate) enum Machine {
    Connected(QueuePair),
    Datagram(UdQueuePair),
}

struct Slot {
    qpn: Qpn,
    /// None while the slot is free.
    machine: Option<Machine>,
    /// The shared receive queue that it takes from.
    srq: Option<u32>,
    /// Protection domain of our own work requests.
    domain: u32,
    /// Protection domain of what the peer names.
    peer_domain: u32,
    peer: Option<u32>,
    /// Whether the slot is in `ready`.
    is_ready: bool,
    /// Whether it is in its peer's `waiting`. It may be in both: acknowledgements need no budget.
    is_waiting: bool,
    /// Its share of the peer's budget.
    in_flight: u32,
    /// Losses already answered by a cut.
    losses: u64,
    /// Answers sent in this turn.
    responses: u32,
    /// When its peer was last told of congestion.
    notified: Option<Nanos>,
    /// As peers on this host see it.
    shown: Option<QpEntry>,
    /// Bytes of the request at the front that have been copied into or from the peer's memory.
    copied: usize,
}

struct Peer {
    address: SocketAddr,
    /// Queue pairs connected to it; the entry is free without any.
    users: u32,
    budget: Budget,
    /// What it said that its receive buffer holds.
    told: Option<u32>,
    /// Slots that have data to send and no budget for it.
    waiting: VecDeque<u32>,
    /// The ring to it, if it is on this host.
    outlet: Option<u32>,
    /// It has left the ring for good.
    is_gone: bool,
}

/// A soft-RoCE device on one UDP socket.
pub(crate) struct Device {
    origin: Instant,
    socket: Socket,
    staged: TransmitBatch,
    scratch: Vec<u8>,
    /// How much of `scratch` the staged frames refer to.
    scratch_used: usize,
    /// A frame that the next one overtakes.
    overtaken: Option<Frame>,
    /// Everything registered.
    pub(crate) memory: Memory,
    faults: FaultInjector,
    capture: Option<Capture>,
    identities: Identities,
    slots: Vec<Slot>,
    free: Vec<u32>,
    peers: Vec<Peer>,
    peer_index: HashMap<SocketAddr, u32>,
    free_peers: Vec<u32>,
    ready: VecDeque<u32>,
    /// What answers READs so long that input has its turn first; empty but within `transmit`.
    later: Vec<u32>,
    timers: Timers,
    /// What arrived ahead of a gap.
    kept: Kept,
    counters: Counters,
    /// From numbers of queue pairs to slots.
    qpns: Names,
    random: Random,
    /// Queue pairs of which something was finished outside of `handle` and `expire`; their
    /// completions want to be polled.
    finished: VecDeque<QpId>,
    /// Shared receive queues by index.
    srqs: Vec<Option<SharedReceives>>,
    /// Destinations of datagrams by handle.
    addresses: Vec<Option<SocketAddr>>,
    free_addresses: Vec<u32>,
    groups: Vec<Group>,
    /// Peers on this host, if they are reached by rings.
    hosts: Option<Hosts>,
    /// When the socket and the connections of `hosts` were last looked at.
    looked: Nanos,
}

impl Device {
    pub(crate) fn bind(
        address: SocketAddr,
        options: &DeviceOptions,
        peers: Peers,
        random: impl Fn() -> Random,
    ) -> io::Result<Device> {
        let socket = Socket::bind(address, &options.socket)?;
        let (hosts, exports) = host::open(socket.local_addr(), options, random().draw())?;
        Ok(Device {
            origin: Instant::now(),
            socket,
            staged: TransmitBatch::default(),
            scratch: Vec::new(),
            scratch_used: 0,
            overtaken: None,
            memory: Memory::shown_by(exports, random()),
            faults: FaultInjector::new(&options.faults),
            capture: options
                .capture
                .as_deref()
                .map(Capture::create)
                .transpose()?,
            identities: Identities::new(peers),
            slots: Vec::new(),
            free: Vec::new(),
            peers: Vec::new(),
            peer_index: HashMap::new(),
            free_peers: Vec::new(),
            ready: VecDeque::new(),
            later: Vec::new(),
            timers: Timers::default(),
            kept: Kept::default(),
            counters: Counters::default(),
            qpns: Names::default(),
            random: random(),
            finished: VecDeque::new(),
            srqs: Vec::new(),
            addresses: Vec::new(),
            free_addresses: Vec::new(),
            groups: Vec::new(),
            hosts,
            looked: Nanos::ZERO,
        })
    }

    pub(crate) fn now(&self) -> Nanos {
        let elapsed = self.origin.elapsed();
        // 64 bits of nanoseconds last 584 years.
        Nanos(elapsed.as_secs() * 1_000_000_000 + u64::from(elapsed.subsec_nanos()))
    }

    /// When its clock began.
    pub(crate) fn origin(&self) -> Instant {
        self.origin
    }

    pub(crate) fn local_addr(&self) -> SocketAddr {
        self.socket.local_addr()
    }

    /// Full datagrams that our receive buffer holds: what we tell peers.
    pub(crate) fn receive_budget(&self) -> u32 {
        self.socket.receive_budget() as u32
    }

    pub(crate) fn set_blocked(&mut self, peer: SocketAddr, is_blocked: bool) {
        self.faults.set_blocked(peer, is_blocked);
    }

    /// The sum over all queue pairs that ever were, and the device's own.
    pub(crate) fn counters(&self) -> Counters {
        let mut sum = self.counters;
        for machine in self.slots.iter().filter_map(|slot| slot.machine.as_ref()) {
            add_counters(&mut sum, machine.counters());
        }
        sum
    }

    pub(crate) fn counters_mut(&mut self) -> &mut Counters {
        &mut self.counters
    }

    // Queue pairs.

    /// Creates a reliable connection's queue pair in the Reset state; none when there are too many or
    /// it is too deep.
    pub(crate) fn create_qp(&mut self, domain: u32, caps: QpCaps) -> Option<(QpId, Qpn)> {
        self.create(Kind::Connected(QpKind::Rc), domain, caps, None)
    }

    /// The same of any kind, with or without a shared receive queue.
    pub(crate) fn create(
        &mut self,
        kind: Kind,
        domain: u32,
        caps: QpCaps,
        srq: Option<u32>,
    ) -> Option<(QpId, Qpn)> {
        if caps.send_wr_max.max(caps.recv_wr_max) > WORK_REQUESTS_MAX {
            return None;
        }
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.slots.len() >= QUEUE_PAIRS_MAX => return None,
            None => {
                self.slots.push(Slot {
                    qpn: Qpn::new(0),
                    machine: None,
                    srq: None,
                    domain,
                    peer_domain: domain,
                    peer: None,
                    is_ready: false,
                    is_waiting: false,
                    in_flight: 0,
                    losses: 0,
                    responses: 0,
                    notified: None,
                    shown: None,
                    copied: 0,
                });
                self.slots.len() as u32 - 1
            }
        };
        let admits = |qpn| (QPN_FIRST..Qpn::MULTICAST.value()).contains(&qpn);
        let qpn = Qpn::new(self.qpns.insert(index, &mut self.random, admits));
        let slot = &mut self.slots[index as usize];
        slot.qpn = qpn;
        slot.machine = Some(match kind {
            Kind::Connected(kind) => Machine::Connected(QueuePair::new(kind, qpn, caps)),
            Kind::Datagram(mtu) => Machine::Datagram(UdQueuePair::new(qpn, mtu, caps)),
        });
        slot.srq = srq;
        slot.domain = domain;
        slot.peer_domain = domain;
        slot.peer = None;
        slot.in_flight = 0;
        slot.losses = 0;
        slot.responses = 0;
        slot.notified = None;
        slot.copied = 0;
        Some((QpId(index), qpn))
    }

    /// Says whose packets the queue pair takes and where its own go: once, before it works.
    pub(crate) fn set_peer(&mut self, id: QpId, address: SocketAddr, budget: Option<u32>) {
        let before = self.slots[id.0 as usize].peer;
        assert!(before.is_none(), "a queue pair has one peer at a time");
        let index = match self.peer_index.get(&address) {
            Some(index) => *index,
            None => self.add_peer(address),
        };
        let peer = &mut self.peers[index as usize];
        peer.users += 1;
        if let Some(datagrams) = budget {
            peer.told = Some(datagrams);
            peer.budget.learn(datagrams);
        }
        let slot = &mut self.slots[id.0 as usize];
        slot.peer = Some(index);
        if let (Some(Machine::Connected(qp)), true) = (&mut slot.machine, budget.is_some()) {
            // Only our own kind tells its budget, and it keeps what arrives ahead of a gap.
            qp.set_reports_gaps(true);
        }
        self.meet(index);
    }

    /// Forgets the peer again: for a queue pair that has been reset.
    pub(crate) fn clear_peer(&mut self, id: QpId) {
        let slot = &mut self.slots[id.0 as usize];
        let Some(peer) = slot.peer.take() else { return };
        slot.copied = 0;
        let before = std::mem::take(&mut slot.in_flight);
        if std::mem::take(&mut slot.is_waiting) {
            self.peers[peer as usize]
                .waiting
                .retain(|index| *index != id.0);
        }
        self.peers[peer as usize].budget.update(before, 0);
        self.wake_waiting(peer);
        self.release_peer(peer);
    }

    fn add_peer(&mut self, address: SocketAddr) -> u32 {
        let peer = Peer {
            address,
            users: 0,
            budget: Budget::default(),
            told: None,
            waiting: VecDeque::new(),
            outlet: None,
            is_gone: false,
        };
        let index = match self.free_peers.pop() {
            Some(index) => {
                self.peers[index as usize] = peer;
                index
            }
            None => {
                self.peers.push(peer);
                self.peers.len() as u32 - 1
            }
        };
        self.peer_index.insert(address, index);
        index
    }

    /// A queue pair to this peer is gone; a peer without any is forgotten, or strangers who come
    /// and go would fill the table.
    fn release_peer(&mut self, index: u32) {
        let peer = &mut self.peers[index as usize];
        peer.users -= 1;
        if peer.users == 0 {
            if let (Some(outlet), Some(hosts)) = (peer.outlet.take(), &mut self.hosts) {
                hosts.disconnect(outlet);
            }
            self.peer_index.remove(&peer.address);
            self.free_peers.push(index);
        }
    }

    /// Lets the peer reach only memory of `domain`, whatever our own work requests reach.
    pub(crate) fn set_peer_domain(&mut self, id: QpId, domain: u32) {
        self.slots[id.0 as usize].peer_domain = domain;
    }

    pub(crate) fn destroy_qp(&mut self, id: QpId) {
        let slot = &mut self.slots[id.0 as usize];
        let Some(machine) = slot.machine.take() else {
            return;
        };
        self.qpns.remove(slot.qpn.value());
        add_counters(&mut self.counters, machine.counters());
        self.show(id.0);
        self.clear_peer(id);
        self.detach_all(id);
        self.free.push(id.0);
    }

    /// The state machine of a connection, to post to or to move; whatever it then wants to send will
    /// be sent.
    pub(crate) fn qp(&mut self, id: QpId) -> Option<&mut QueuePair> {
        if self.slots.get(id.0 as usize)?.machine.is_some() {
            self.mark_ready(id.0);
        }
        self.connected(id)
    }

    /// The same, for what makes it want to send nothing.
    pub(crate) fn connected(&mut self, id: QpId) -> Option<&mut QueuePair> {
        match self.slots.get_mut(id.0 as usize)?.machine.as_mut() {
            Some(Machine::Connected(qp)) => Some(qp),
            _ => None,
        }
    }

    pub(crate) fn poll_completion(&mut self, id: QpId) -> Option<Completion> {
        self.reporting(id)?.0.poll_completion()
    }

    /// Whether a queue pair has completions or events to poll.
    #[inline]
    pub(crate) fn has_reports(&self, id: QpId) -> bool {
        let machine = self
            .slots
            .get(id.0 as usize)
            .and_then(|slot| slot.machine.as_ref());
        machine.is_some_and(Machine::has_reports)
    }

    /// A queue pair for what it has to report, and the memory that requests brought.
    #[inline]
    pub(crate) fn reporting(&mut self, id: QpId) -> Option<(&mut Machine, &mut Memory)> {
        let machine = self.slots.get_mut(id.0 as usize)?.machine.as_mut()?;
        Some((machine, &mut self.memory))
    }

    fn mark_ready(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        if !slot.is_ready {
            slot.is_ready = true;
            self.ready.push_back(index);
        }
    }

    /// Lets the next queue pair whose timer is due act; the caller polls its completions.
    pub(crate) fn expire(&mut self, now: Nanos) -> Option<QpId> {
        while let Some(index) = self.timers.pop(now) {
            let Some(Machine::Connected(qp)) = self.slots[index as usize].machine.as_mut() else {
                continue;
            };
            match qp.poll_timeout() {
                Some(due) if due <= now => {
                    qp.handle_timeout(now);
                    self.settle(index);
                    self.mark_ready(index);
                    return Some(QpId(index));
                }
                due => self.timers.set(index, due),
            }
        }
        None
    }

    /// When `expire` must be called at the latest.
    pub(crate) fn next_timeout(&self) -> Option<Nanos> {
        self.timers.next()
    }

    /// Brings the peer's budget up to date after the queue pair has changed.
    #[inline]
    fn settle(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        let (Some(Machine::Connected(qp)), Some(peer)) = (&slot.machine, slot.peer) else {
            return;
        };
        let after = qp.packets_in_flight();
        let before = std::mem::replace(&mut slot.in_flight, after);
        if before != after {
            let to = &mut self.peers[peer as usize];
            to.budget.update(before, after);
            if !to.waiting.is_empty() {
                self.wake_waiting(peer);
            }
        }
    }

    #[cold]
    fn wake_waiting(&mut self, peer: u32) {
        while self.peers[peer as usize].budget.room() > 0 {
            let Some(index) = self.peers[peer as usize].waiting.pop_front() else {
                return;
            };
            self.slots[index as usize].is_waiting = false;
            self.mark_ready(index);
        }
    }

    /// A queue pair of which something was finished in the last `transmit`, or by a datagram to a
    /// group; the caller polls its completions.
    pub(crate) fn poll_finished(&mut self) -> Option<QpId> {
        self.finished.pop_front()
    }

    pub(crate) fn note_finished(&mut self, index: u32) {
        if self.finished.back() != Some(&QpId(index)) {
            self.finished.push_back(QpId(index));
        }
    }
}

impl Machine {
    /// State.
    #[inline]
    pub(crate) fn state(&self) -> QpState {
        match self {
            Machine::Connected(qp) => qp.state(),
            Machine::Datagram(qp) => qp.state(),
        }
    }

    /// Its sends that are not finished, or finished and not polled.
    #[inline]
    pub(crate) fn sends_posted(&self) -> u32 {
        match self {
            Machine::Connected(qp) => qp.sends_posted(),
            Machine::Datagram(qp) => qp.sends_posted(),
        }
    }

    /// Whether there are completions or events to poll.
    #[inline]
    pub(crate) fn has_reports(&self) -> bool {
        match self {
            Machine::Connected(qp) => qp.has_reports(),
            Machine::Datagram(qp) => qp.has_reports(),
        }
    }

    #[inline]
    pub(crate) fn poll_completion(&mut self) -> Option<Completion> {
        match self {
            Machine::Connected(qp) => qp.poll_completion(),
            Machine::Datagram(qp) => qp.poll_completion(),
        }
    }

    #[inline]
    pub(crate) fn poll_event(&mut self) -> Option<QpEvent> {
        match self {
            Machine::Connected(qp) => qp.poll_event(),
            Machine::Datagram(qp) => qp.poll_event(),
        }
    }

    fn counters(&self) -> &qp::Counters {
        match self {
            Machine::Connected(qp) => qp.counters(),
            Machine::Datagram(qp) => qp.counters(),
        }
    }
}

impl AsRawFd for Device {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
