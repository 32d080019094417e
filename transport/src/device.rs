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
//! * a queue pair number names one queue pair for as long as the device lives, but for a wrap of
//!   eight bits, and numbers start at random, so a restarted peer's packets find nobody;
//! * payload is staged by reference and sent before the next packet is handled, so no slot changes
//!   its owner in between.
//!
//! Deliberately absent: completion queues (`verbs`), messages and connections (`message`), and any
//! wait: this module never blocks.
//!
//! Source: Linux `rxe_recv.c` for the order of checks.

mod budget;
mod identity;
mod timers;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Instant;

use lowtide_transport_proto::cm::GSI_QKEY;
use lowtide_transport_proto::icrc::{self, Flow, Icrc, Ip};
use lowtide_transport_proto::qp::{
    self, AccessError, Allow, AtomicOp, Completion, Fragment, Lkey, QpCaps, QueuePair, Rkey,
    Transmit,
};
use lowtide_transport_proto::time::Nanos;
use lowtide_transport_proto::wire::{Class, Extension, Packet, Qpn, pad_len};

use self::budget::Budget;
use self::identity::Identities;
pub(crate) use self::identity::Peers;
use self::timers::Timers;
use crate::faults::{Fate, FaultInjector, Faults};
use crate::memory::{self, Access, Key, Memory};
use crate::udp::{
    Frame, HEADER_MAX, Payload, ReceiveBatch, Socket, SocketOptions, TRAILER_MAX, TransmitBatch,
};

/// Queue pairs a device may have.
pub(crate) const QUEUE_PAIRS_MAX: usize = 32_768;
/// The lowest queue pair number given out, as Linux rxe's; 0 and 1 are special.
const QPN_FIRST: u32 = 16;
/// Frames one queue pair sends before the next has its turn: one UDP_SEGMENT send.
const BURST: usize = 15;
/// Region number of payload that was copied for sending.
const SCRATCH: u32 = u32::MAX - 1;
/// Local key of receives whose bytes are not stored but handed up where they arrived.
pub(crate) const IN_PLACE: Lkey = Lkey(u32::MAX);

/// Which queue pair; valid until it is destroyed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct QpId(pub(crate) u32);

/// What happened to a datagram.
#[derive(Debug)]
pub(crate) enum Input {
    /// It was dropped, and counted.
    Dropped,
    /// A queue pair took it. `placed` are the bytes that went to a receive of key [`IN_PLACE`]:
    /// their offset in the message and where in the datagram they are.
    Taken {
        id: QpId,
        placed: Option<(u64, Range<usize>)>,
    },
    /// A management datagram for queue pair 1: where in the datagram it is.
    Management(Range<usize>),
    /// A good packet of a connection that does not exist here.
    UnknownQueuePair(Qpn),
}

/// What the device has seen; the names of anomalies are those of Linux rxe where it has them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the documentation of a counter")]
#[non_exhaustive]
pub struct Counters {
    pub tx_datagrams: u64,
    pub tx_bytes: u64,
    pub rx_datagrams: u64,
    pub rx_bytes: u64,
    /// Sends that carried several datagrams.
    pub gso_sends: u64,
    /// Receives that carried several datagrams.
    pub gro_receives: u64,
    /// Datagrams the kernel refused to send.
    pub tx_refused: u64,
    /// Datagrams our own socket dropped for want of buffer.
    pub rx_overflow: u64,
    pub rx_malformed: u64,
    pub rx_bad_icrc: u64,
    pub rx_unknown_qp: u64,
    /// Right queue pair, wrong source.
    pub rx_wrong_peer: u64,
    /// Dropped by the fault injector, both ways.
    pub faults_dropped: u64,
    pub duplicate_request: u64,
    pub out_of_seq_request: u64,
    pub rcvd_seq_err: u64,
    pub rcvd_rnr_err: u64,
    pub send_rnr_err: u64,
    pub ack_timeout: u64,
    pub probes: u64,
    pub retransmitted_pkts: u64,
    /// Packets a queue pair had no use for.
    pub dropped_pkts: u64,
    /// Messages handed up, and copies of whole messages made for sending or reassembly.
    pub messages: u64,
    pub copies: u64,
}

struct Slot {
    qpn: Qpn,
    /// None while the slot is free.
    qp: Option<QueuePair>,
    domain: u32,
    peer: Option<u32>,
    /// Whether the slot is in `ready`.
    is_ready: bool,
    /// Whether it is in its peer's `waiting`. It may be in both: acknowledgements need no budget.
    is_waiting: bool,
    /// Its share of the peer's budget.
    in_flight: u32,
    /// Losses already answered by a cut.
    losses: u64,
}

struct Peer {
    address: SocketAddr,
    budget: Budget,
    /// Slots that have data to send and no budget for it.
    waiting: VecDeque<u32>,
}

/// A soft-RoCE device on one UDP socket.
pub(crate) struct Device {
    origin: Instant,
    socket: Socket,
    staged: TransmitBatch,
    scratch: Vec<u8>,
    /// A frame that the next one overtakes.
    overtaken: Option<Frame>,
    /// Everything registered.
    pub(crate) memory: Memory,
    faults: FaultInjector,
    identities: Identities,
    slots: Vec<Slot>,
    free: Vec<u32>,
    peers: Vec<Peer>,
    peer_index: HashMap<SocketAddr, u32>,
    ready: VecDeque<u32>,
    timers: Timers,
    counters: Counters,
    salt: u32,
    /// Queue pairs that failed while sending; their completions want to be polled.
    failed: VecDeque<QpId>,
}

impl Device {
    pub(crate) fn bind(
        address: SocketAddr,
        options: &SocketOptions,
        faults: &Faults,
        peers: Peers,
        salt: u32,
    ) -> io::Result<Device> {
        Ok(Device {
            origin: Instant::now(),
            socket: Socket::bind(address, options)?,
            staged: TransmitBatch::default(),
            scratch: Vec::new(),
            overtaken: None,
            memory: Memory::default(),
            faults: FaultInjector::new(faults),
            identities: Identities::new(peers),
            slots: Vec::new(),
            free: Vec::new(),
            peers: Vec::new(),
            peer_index: HashMap::new(),
            ready: VecDeque::new(),
            timers: Timers::default(),
            counters: Counters::default(),
            salt,
            failed: VecDeque::new(),
        })
    }

    pub(crate) fn now(&self) -> Nanos {
        Nanos(self.origin.elapsed().as_nanos() as u64)
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
        for slot in &self.slots {
            if let Some(qp) = &slot.qp {
                add_counters(&mut sum, qp.counters());
            }
        }
        sum
    }

    pub(crate) fn counters_mut(&mut self) -> &mut Counters {
        &mut self.counters
    }

    // Queue pairs.

    /// Creates a queue pair in the Reset state; none when there are too many.
    pub(crate) fn create_qp(&mut self, domain: u32, caps: QpCaps) -> Option<(QpId, Qpn)> {
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.slots.len() >= QUEUE_PAIRS_MAX => return None,
            None => {
                self.slots.push(Slot {
                    qpn: Qpn::new(0),
                    qp: None,
                    domain,
                    peer: None,
                    is_ready: false,
                    is_waiting: false,
                    in_flight: 0,
                    losses: 0,
                });
                self.slots.len() as u32 - 1
            }
        };
        self.salt = self.salt.wrapping_add(1);
        let slot = &mut self.slots[index as usize];
        let qpn = Qpn::new(self.salt << 16 | (QPN_FIRST + index));
        slot.qpn = qpn;
        slot.qp = Some(QueuePair::new(qp::QpKind::Rc, qpn, caps));
        slot.domain = domain;
        slot.peer = None;
        slot.in_flight = 0;
        slot.losses = 0;
        Some((QpId(index), qpn))
    }

    /// Says whose packets the queue pair takes and where its own go.
    pub(crate) fn set_peer(&mut self, id: QpId, address: SocketAddr, budget: Option<u32>) {
        let next = self.peers.len() as u32;
        let index = *self.peer_index.entry(address).or_insert(next);
        if index == next {
            let budget = Budget::default();
            self.peers.push(Peer {
                address,
                budget,
                waiting: VecDeque::new(),
            });
        }
        if let Some(datagrams) = budget {
            self.peers[index as usize].budget.learn(datagrams);
        }
        self.slots[id.0 as usize].peer = Some(index);
    }

    pub(crate) fn destroy_qp(&mut self, id: QpId) {
        let slot = &mut self.slots[id.0 as usize];
        let Some(qp) = slot.qp.take() else { return };
        add_counters(&mut self.counters, qp.counters());
        if let Some(peer) = slot.peer {
            let before = std::mem::take(&mut slot.in_flight);
            if std::mem::take(&mut slot.is_waiting) {
                self.peers[peer as usize]
                    .waiting
                    .retain(|index| *index != id.0);
            }
            self.peers[peer as usize].budget.update(before, 0);
            self.wake_waiting(peer);
        }
        self.free.push(id.0);
    }

    /// The state machine, to post to or to move; whatever it then wants to send will be sent.
    pub(crate) fn qp(&mut self, id: QpId) -> Option<&mut QueuePair> {
        if self.slots.get(id.0 as usize)?.qp.is_some() {
            self.mark_ready(id.0);
        }
        self.slots[id.0 as usize].qp.as_mut()
    }

    pub(crate) fn poll_completion(&mut self, id: QpId) -> Option<Completion> {
        self.slots
            .get_mut(id.0 as usize)?
            .qp
            .as_mut()?
            .poll_completion()
    }

    fn mark_ready(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        if !slot.is_ready {
            slot.is_ready = true;
            self.ready.push_back(index);
        }
    }

    // Input.

    /// Fills `batch` with what has arrived; less than its capacity means that the socket is empty.
    pub(crate) fn receive(&mut self, batch: &mut ReceiveBatch) -> io::Result<usize> {
        self.socket.receive(batch)
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
        if let Some(overflow) = overflow {
            self.counters.rx_overflow = u64::from(overflow);
        }
    }

    /// Takes one datagram. After `Taken` the caller polls that queue pair's completions.
    pub(crate) fn handle(
        &mut self,
        now: Nanos,
        source: SocketAddr,
        target: Option<IpAddr>,
        datagram: &[u8],
    ) -> Input {
        if self.faults.is_blocked(&source) {
            self.counters.faults_dropped += 1;
            return Input::Dropped;
        }
        let Ok(packet) = Packet::new_checked(datagram) else {
            self.counters.rx_malformed += 1;
            return Input::Dropped;
        };
        let local = self.socket.local_addr();
        let Some(flow) = flow(source, target.unwrap_or(local.ip()), local.port()) else {
            self.counters.rx_malformed += 1;
            return Input::Dropped;
        };
        let solved = icrc::check_unknown_identification(&flow, &packet);
        if !solved.is_some_and(|solved| self.identities.believe(now, source.ip(), solved)) {
            self.counters.rx_bad_icrc += 1;
            return Input::Dropped;
        }
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
        self.handle_connected(now, source, &packet)
    }

    fn handle_connected(&mut self, now: Nanos, source: SocketAddr, packet: &Packet<'_>) -> Input {
        let index = (packet.dest().value() & 0xFFFF).wrapping_sub(QPN_FIRST);
        let slot = self
            .slots
            .get_mut(index as usize)
            .filter(|slot| slot.qpn == packet.dest());
        let Some((slot, peer)) = slot.and_then(|slot| {
            let peer = slot.peer?;
            slot.qp.is_some().then_some((slot, peer))
        }) else {
            self.counters.rx_unknown_qp += 1;
            return match packet.row().class {
                Class::Rc if !packet.opcode().is_response() => {
                    Input::UnknownQueuePair(packet.dest())
                }
                _ => Input::Dropped,
            };
        };
        if self.peers[peer as usize].address.ip() != source.ip() {
            self.counters.rx_wrong_peer += 1;
            return Input::Dropped;
        }
        let Some(qp) = slot.qp.as_mut() else {
            return Input::Dropped;
        };
        let mut view = View {
            memory: &mut self.memory,
            domain: slot.domain,
            placed: None,
        };
        qp.handle_packet(now, packet, &mut view);
        let placed = view.placed.map(|offset| (offset, packet.payload_range()));
        self.settle(index);
        self.mark_ready(index);
        Input::Taken {
            id: QpId(index),
            placed,
        }
    }

    /// Lets the next queue pair whose timer is due act; the caller polls its completions.
    pub(crate) fn expire(&mut self, now: Nanos) -> Option<QpId> {
        while let Some(index) = self.timers.pop(now) {
            let Some(qp) = self.slots[index as usize].qp.as_mut() else {
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
    fn settle(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        let (Some(qp), Some(peer)) = (&slot.qp, slot.peer) else {
            return;
        };
        let after = qp.packets_in_flight();
        let before = std::mem::replace(&mut slot.in_flight, after);
        if before != after {
            self.peers[peer as usize].budget.update(before, after);
            self.wake_waiting(peer);
        }
    }

    fn wake_waiting(&mut self, peer: u32) {
        while self.peers[peer as usize].budget.room() > 0 {
            let Some(index) = self.peers[peer as usize].waiting.pop_front() else {
                return;
            };
            self.slots[index as usize].is_waiting = false;
            self.mark_ready(index);
        }
    }

    /// A queue pair that failed in the last `transmit`; the caller polls its completions.
    pub(crate) fn poll_failed(&mut self) -> Option<QpId> {
        self.failed.pop_front()
    }

    // Output.

    /// Whether some queue pair has something to send.
    pub(crate) fn has_output(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Sends what queue pairs have to send and budgets allow.
    pub(crate) fn transmit(&mut self, now: Nanos) {
        while let Some(index) = self.ready.pop_front() {
            self.slots[index as usize].is_ready = false;
            self.transmit_from(index, now);
        }
        self.flush();
    }

    /// One turn of one queue pair.
    fn transmit_from(&mut self, index: u32, now: Nanos) {
        let Some(peer) = self.slots[index as usize].peer else {
            return;
        };
        let address = self.peers[peer as usize].address;
        for sent in 0.. {
            if sent == BURST {
                self.mark_ready(index);
                break;
            }
            let room = self.peers[peer as usize].budget.room();
            let allow = if room > 0 {
                Allow::All
            } else {
                Allow::ControlOnly
            };
            let slot = &mut self.slots[index as usize];
            let Some(qp) = slot.qp.as_mut() else { return };
            let Some(transmit) = qp.poll_transmit(now, allow) else {
                if room == 0 && qp.has_pending_transmit() && !slot.is_waiting {
                    slot.is_waiting = true;
                    self.peers[peer as usize].waiting.push_back(index);
                }
                break;
            };
            let counters = qp.counters();
            let losses = counters.retransmitted_pkts - counters.probes;
            if losses > std::mem::replace(&mut slot.losses, losses) {
                self.peers[peer as usize].budget.cut(now);
            }
            let domain = slot.domain;
            self.settle(index);
            match self.gather(domain, &transmit) {
                Ok(payload) => self.push(address, transmit.header(), payload),
                Err(_) => {
                    // Memory that was deregistered under a posted request, or a peer's READ.
                    if let Some(qp) = &mut self.slots[index as usize].qp {
                        qp.handle_transmit_failure(&transmit);
                    }
                    self.settle(index);
                    self.failed.push_back(QpId(index));
                }
            }
        }
        let slot = &self.slots[index as usize];
        if let Some(qp) = &slot.qp {
            self.timers.set(index, qp.poll_timeout());
        }
    }

    /// Sends one management datagram of queue pair 1: headers and payload.
    pub(crate) fn send_management(&mut self, target: SocketAddr, header: &[u8], payload: &[u8]) {
        let payload = self.copy_to_scratch(|scratch| scratch.extend_from_slice(payload));
        self.push(target, header, payload);
    }

    fn copy_to_scratch(&mut self, copy: impl FnOnce(&mut Vec<u8>)) -> Payload {
        let offset = self.scratch.len();
        copy(&mut self.scratch);
        let len = (self.scratch.len() - offset) as u32;
        Payload {
            region: SCRATCH,
            offset: offset as u64,
            len,
        }
    }

    /// Finds a packet's payload: by reference where nobody else can change it, else as a copy.
    fn gather(&mut self, domain: u32, transmit: &Transmit) -> Result<Payload, memory::AccessError> {
        let fragments = transmit.payload.as_slice();
        let mut payload = Payload::EMPTY;
        for fragment in fragments {
            let right = match fragment.key {
                qp::Key::Local(_) => Access::default(),
                qp::Key::Remote(_) => wanted(qp::Access::READ),
            };
            let span =
                self.memory
                    .check(domain, key_of(fragment), fragment.addr, fragment.len, right)?;
            if fragments.len() == 1 && self.memory.private(span.region).is_some() {
                return Ok(Payload {
                    region: span.region,
                    offset: span.offset,
                    len: span.len,
                });
            }
            let start = self.scratch.len();
            if payload.len == 0 {
                payload = Payload {
                    region: SCRATCH,
                    offset: start as u64,
                    len: 0,
                };
            }
            self.scratch.resize(start + span.len as usize, 0);
            self.memory.fetch(span, &mut self.scratch[start..]);
            payload.len += span.len;
        }
        Ok(payload)
    }

    fn push(&mut self, target: SocketAddr, header: &[u8], payload: Payload) {
        let mut frame = Frame {
            target,
            header: [0; HEADER_MAX],
            header_len: header.len() as u8,
            trailer_len: (pad_len(payload.len as usize) + 4) as u8,
            trailer: [0; TRAILER_MAX],
            payload,
            is_spoilt: false,
        };
        frame.header[..header.len()].copy_from_slice(header);
        let fate = self.faults.fate(&target);
        match fate {
            Fate::Lose => {
                self.counters.faults_dropped += 1;
                return;
            }
            Fate::Reorder if self.overtaken.is_none() => {
                self.overtaken = Some(frame);
                return;
            }
            Fate::Corrupt => frame.is_spoilt = true,
            _ => {}
        }
        self.staged.push(frame);
        if fate == Fate::Duplicate && !self.staged.is_full() {
            self.staged.push(frame);
        }
        if !self.staged.is_full()
            && let Some(overtaken) = self.overtaken.take()
        {
            self.staged.push(overtaken);
        }
        if self.staged.is_full() {
            self.flush();
        }
    }

    /// Hands the batch to the kernel.
    pub(crate) fn flush(&mut self) {
        if let Some(overtaken) = self.overtaken.take() {
            // `push` flushes a full batch, so there is room.
            self.staged.push(overtaken);
        }
        if self.staged.is_empty() {
            return;
        }
        let Device {
            socket,
            staged,
            scratch,
            memory,
            counters,
            ..
        } = self;
        let local = socket.local_addr();
        let report = socket.send(
            staged,
            |payload| resolve(payload, scratch, memory),
            |frame, payload, identification| seal(local, frame, payload, identification),
        );
        counters.tx_datagrams += report.datagrams;
        counters.tx_bytes += report.bytes;
        counters.gso_sends += report.gso_sends;
        counters.tx_refused += report.refused;
        scratch.clear();
    }
}

impl AsRawFd for Device {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

fn add_counters(sum: &mut Counters, qp: &qp::Counters) {
    sum.duplicate_request += qp.duplicate_request;
    sum.out_of_seq_request += qp.out_of_seq_request;
    sum.rcvd_seq_err += qp.rcvd_seq_err;
    sum.rcvd_rnr_err += qp.rcvd_rnr_err;
    sum.send_rnr_err += qp.send_rnr_err;
    sum.ack_timeout += qp.ack_timeout;
    sum.probes += qp.probes;
    sum.retransmitted_pkts += qp.retransmitted_pkts;
    sum.dropped_pkts += qp.dropped_pkts;
}

fn key_of(fragment: &Fragment) -> Key {
    match fragment.key {
        qp::Key::Local(Lkey(key)) | qp::Key::Remote(Rkey(key)) => Key(key),
    }
}

fn resolve<'m>(payload: &Payload, scratch: &'m [u8], memory: &'m Memory) -> &'m [u8] {
    let bytes = match payload.region {
        _ if payload.len == 0 => return &[],
        SCRATCH => scratch,
        region => memory
            .private(region)
            .expect("staged payload outlives its batch"),
    };
    &bytes[payload.offset as usize..][..payload.len as usize]
}

/// The flow of a packet from `source` to `target`; none if their families differ.
fn flow(source: SocketAddr, target: IpAddr, target_port: u16) -> Option<Flow> {
    let ip = match (source.ip(), target) {
        (IpAddr::V4(source), IpAddr::V4(target)) => Ip::V4 {
            source,
            target,
            identification: 0,
            flags: icrc::DONT_FRAGMENT,
        },
        (IpAddr::V6(source), IpAddr::V6(target)) => Ip::V6 { source, target },
        _ => return None,
    };
    Some(Flow {
        ip,
        source_port: source.port(),
        target_port,
    })
}

/// Writes pad and ICRC for the place in a run that the frame got.
fn seal(local: SocketAddr, frame: &mut Frame, payload: &[u8], identification: u16) {
    let Some(flow) = flow(local, frame.target.ip(), frame.target.port()) else {
        return;
    };
    let flow = flow.with_identification(identification);
    let mut crc = Icrc::begin(&flow, frame.header(), frame.wire_len());
    crc.update(payload);
    let (mut trailer, len) = crc.finish(pad_len(payload.len()));
    if frame.is_spoilt {
        trailer[len - 1] ^= 0x10;
    }
    frame.trailer[..len].copy_from_slice(&trailer[..len]);
    frame.trailer_len = len as u8;
}

/// The device's memory as one queue pair sees it.
struct View<'a> {
    memory: &'a mut Memory,
    domain: u32,
    /// Offset in its message of a payload for an [`IN_PLACE`] receive.
    placed: Option<u64>,
}

fn wanted(access: qp::Access) -> Access {
    Access {
        local_write: false,
        remote_write: access.remote_write,
        remote_read: access.remote_read,
        remote_atomic: access.remote_atomic,
    }
}

impl qp::Memory for View<'_> {
    fn check_remote(
        &self,
        rkey: Rkey,
        va: u64,
        len: u32,
        access: qp::Access,
    ) -> Result<(), AccessError> {
        let checked = self
            .memory
            .check(self.domain, Key(rkey.0), va, len, wanted(access));
        checked.map(drop).map_err(|_| AccessError)
    }

    fn place(&mut self, target: Fragment, payload: &[u8]) -> Result<(), AccessError> {
        if target.key == qp::Key::Local(IN_PLACE) {
            self.placed = Some(target.addr);
            return Ok(());
        }
        let right = match target.key {
            qp::Key::Local(_) => Access::LOCAL,
            qp::Key::Remote(_) => Access {
                remote_write: true,
                ..Access::default()
            },
        };
        let key = key_of(&target);
        let span = self
            .memory
            .check(self.domain, key, target.addr, target.len, right)
            .map_err(|_| AccessError)?;
        self.memory.place(span, payload);
        Ok(())
    }

    fn atomic(&mut self, rkey: Rkey, va: u64, op: AtomicOp) -> Result<u64, AccessError> {
        let right = Access {
            remote_atomic: true,
            ..Access::default()
        };
        let span = self
            .memory
            .check(self.domain, Key(rkey.0), va, 8, right)
            .map_err(|_| AccessError)?;
        let shared = self.memory.shared(span).ok_or(AccessError)?;
        let offset = span.offset as usize;
        Ok(match op {
            AtomicOp::CompareSwap { compare, swap } => shared.compare_swap(offset, compare, swap),
            AtomicOp::FetchAdd { add } => shared.fetch_add(offset, add),
        })
    }

    fn invalidate(&mut self, rkey: Rkey) -> Result<(), AccessError> {
        self.memory
            .deregister(Key(rkey.0))
            .map(drop)
            .ok_or(AccessError)
    }
}
