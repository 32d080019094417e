//! The connection manager of one device, under the device's lock.
//!
//! Owns: the state machine, whose handle every connection is, the moves of queue pairs that follow
//! from a handshake, and the queues of events with the pipes that make them wait for epoll.
//!
//! Rules:
//! * a client's queue pair goes to RTS when the server has accepted, and only then RTU leaves; a
//!   server's goes to RTS before REP leaves;
//! * the queue pair of a connection that has ended is in ERR before the event says so;
//! * a byte is in a channel's pipe exactly as long as an event is in its queue, so neither end of
//!   the pipe ever blocks.
//!
//! Answers go to the sender's UDP port 4791, because kernels and adapters send from other ports
//! than they listen on. Our own ends may listen elsewhere: the transaction ids they choose begin
//! with a mark and their port. Their CA GUID begins with another mark and how many full datagrams
//! their receive buffer holds; nobody else reads either.

use std::collections::{HashMap, VecDeque};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::net::SocketAddr;

use lowtide_transport_proto::cm::{
    Cm, CmConfig, CmError, CmEvent, CommId, ConnectParams, ConnectRequest, Inquiry, QpOffer,
    ResolveParams, ServiceId, reason, sidr_status,
};
use lowtide_transport_proto::qp::{QpState, RtrAttr, RtsAttr};
use lowtide_transport_proto::time::Nanos;
use lowtide_transport_proto::wire::{Mtu, Psn, Qpn, RnrTimer, UDP_PORT};

use super::gsi::Gsi;
use crate::device::{Device, QpId};

/// Mark of our own ends: the high half of a transaction id is this and the UDP port.
const PORT_MARK: [u8; 2] = *b"LT";
/// Mark of our own ends: a CA GUID begins with this, then 16 bits of budget. A kernel makes such a
/// beginning of a MAC address `0c:4c:54:…`, and then has [`EUI48`] where the budget would be.
const GUID_MARK: u64 = 0x0E_4C54;
const EUI48: u16 = 0xFFFE;
/// Response packets asked for by one READ request at most: as in `verbs`.
const READ_CHUNK: u32 = 33;
/// Receives that find nothing posted are tried again after 0.64 ms.
const RNR_TIMER: u8 = 12;
/// Events that may wait in one channel; what a peer begins beyond is refused.
const EVENTS_MAX: usize = 4096;

/// Which event channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ChannelId(u64);

/// What happened, before handles are made of it.
#[derive(Debug)]
pub(crate) enum Happening {
    Request(CommId, ConnectRequest),
    Established(CommId, Vec<u8>),
    Rejected(CommId, u16, Vec<u8>),
    Unreachable(CommId),
    Disconnected(CommId),
    Inquiry(CommId, Inquiry),
    Resolved(CommId, Qpn, u32, Vec<u8>),
    Unresolved(CommId, u8, Vec<u8>),
}

#[derive(Debug)]
struct Channel {
    events: VecDeque<Happening>,
    reader: PipeReader,
    writer: PipeWriter,
}

impl Channel {
    fn push(&mut self, event: Happening) {
        if self.events.is_empty() {
            // An empty pipe has room for a byte; if the write fails all the same, epoll misses one
            // event, `poll` and `wait` miss none.
            let _ = self.writer.write_all(&[0]);
        }
        self.events.push_back(event);
    }

    fn pop(&mut self) -> Option<Happening> {
        let event = self.events.pop_front()?;
        if self.events.is_empty() {
            let _ = self.reader.read_exact(&mut [0]);
        }
        Some(event)
    }
}

/// A connection, request or inquiry of ours.
#[derive(Debug)]
struct Entry {
    channel: ChannelId,
    qp: Option<ConnectingQp>,
}

/// A queue pair on its way to a connection, and what it will be told.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ConnectingQp {
    pub(crate) id: QpId,
    /// The first that the peer shall send.
    pub(crate) psn: Psn,
    pub(crate) mtu: Mtu,
    pub(crate) peer: SocketAddr,
    pub(crate) timeout: u8,
    pub(crate) retry_count: u8,
    pub(crate) responder_resources: u8,
    pub(crate) initiator_depth: u8,
}

/// The connection manager of a device.
#[derive(Debug)]
pub(crate) struct Manager {
    cm: Cm,
    gsi: Gsi,
    listeners: HashMap<ServiceId, ChannelId>,
    entries: HashMap<CommId, Entry>,
    channels: HashMap<ChannelId, Channel>,
    channels_made: u64,
    /// Servers' queue pairs whose client has not said yet that it is ready.
    unconfirmed: HashMap<QpId, CommId>,
    /// Queue pairs that were moved to ERR: their completions want to be collected.
    failed: Vec<QpId>,
}

impl Manager {
    /// `random` tells lives of a device apart; `budget` is what its receive buffer holds.
    pub(crate) fn new(local: SocketAddr, budget: u32, random: u64) -> Manager {
        let budget = u64::from(budget.min(u32::from(EUI48 - 1)));
        let ca_guid = GUID_MARK << 40 | budget << 24 | random >> 40;
        Manager {
            cm: Cm::new(CmConfig {
                tid_high: u32::from(u16::from_be_bytes(PORT_MARK)) << 16 | u32::from(local.port()),
                ..CmConfig::new(local.ip(), ca_guid, random as u32)
            }),
            gsi: Gsi::default(),
            listeners: HashMap::new(),
            entries: HashMap::new(),
            channels: HashMap::new(),
            channels_made: 0,
            unconfirmed: HashMap::new(),
            failed: Vec::new(),
        }
    }

    // Channels.

    pub(crate) fn add_channel(&mut self) -> io::Result<(ChannelId, PipeReader)> {
        let (reader, writer) = io::pipe()?;
        let theirs = reader.try_clone()?;
        self.channels_made += 1;
        let id = ChannelId(self.channels_made);
        let channel = Channel {
            events: VecDeque::new(),
            reader,
            writer,
        };
        self.channels.insert(id, channel);
        Ok((id, theirs))
    }

    /// Nobody holds the channel any more: what waits in it is refused.
    pub(crate) fn remove_channel(&mut self, now: Nanos, id: ChannelId) {
        let Some(channel) = self.channels.remove(&id) else {
            return;
        };
        for event in channel.events {
            // It may have been withdrawn meanwhile.
            let _ = match event {
                Happening::Request(id, _) => self.reject(now, id, reason::CONSUMER, &[]),
                Happening::Inquiry(id, _) => self.answer_nothing(now, id),
                _ => Ok(()),
            };
        }
    }

    pub(crate) fn pop_event(&mut self, id: ChannelId) -> Option<Happening> {
        self.channels.get_mut(&id)?.pop()
    }

    pub(crate) fn has_event(&self, id: ChannelId) -> bool {
        self.channels.get(&id).is_some_and(|c| !c.events.is_empty())
    }

    // Commands.

    /// Whether nobody listens on `service` yet.
    pub(crate) fn listen(&mut self, id: ChannelId, service: ServiceId, is_datagram: bool) -> bool {
        if self.listeners.contains_key(&service) {
            return false;
        }
        self.listeners.insert(service, id);
        if is_datagram {
            self.cm.listen_datagram(service);
        } else {
            self.cm.listen(service);
        }
        true
    }

    pub(crate) fn unlisten(&mut self, service: ServiceId) {
        self.listeners.remove(&service);
        self.cm.unlisten(service);
        self.cm.unlisten_datagram(service);
    }

    pub(crate) fn connect(
        &mut self,
        now: Nanos,
        channel: ChannelId,
        qp: ConnectingQp,
        params: &ConnectParams<'_>,
    ) -> Result<CommId, CmError> {
        let id = self.cm.connect(now, params)?;
        let qp = Some(qp);
        self.entries.insert(id, Entry { channel, qp });
        Ok(id)
    }

    pub(crate) fn resolve(
        &mut self,
        now: Nanos,
        channel: ChannelId,
        params: &ResolveParams<'_>,
    ) -> Result<CommId, CmError> {
        let id = self.cm.resolve(now, params)?;
        self.entries.insert(id, Entry { channel, qp: None });
        Ok(id)
    }

    /// Accepts a request with a queue pair that is in INIT: moves it to RTS, then replies.
    pub(crate) fn accept(
        &mut self,
        device: &mut Device,
        id: CommId,
        qp: ConnectingQp,
        ours: QpOffer,
        (theirs, guid): (QpOffer, u64),
        private_data: &[u8],
    ) -> Result<(), CmError> {
        // The state machine first: a refused command must leave the queue pair untouched.
        self.cm.accept(device.now(), id, ours, private_data)?;
        if !bring_up(device, &qp, theirs, budget_of(guid)) {
            unreachable!("a queue pair in Init goes to Rtr and Rts under one lock");
        }
        self.unconfirmed.insert(qp.id, id);
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.qp = Some(qp);
        }
        Ok(())
    }

    pub(crate) fn reject(
        &mut self,
        now: Nanos,
        id: CommId,
        reason: u16,
        private_data: &[u8],
    ) -> Result<(), CmError> {
        self.entries.remove(&id);
        self.cm.reject(now, id, reason, private_data)
    }

    pub(crate) fn answer(
        &mut self,
        now: Nanos,
        id: CommId,
        status: u8,
        place: (Qpn, u32),
        private_data: &[u8],
    ) -> Result<(), CmError> {
        self.entries.remove(&id);
        self.cm.answer(now, id, status, place, private_data)
    }

    /// Answers an inquiry that nobody will look at: the client need not wait until it gives up.
    fn answer_nothing(&mut self, now: Nanos, id: CommId) -> Result<(), CmError> {
        self.answer(now, id, sidr_status::REJECT, (Qpn::new(0), 0), &[])
    }

    /// Ends a connection, or withdraws a request or an inquiry; nothing, if it has ended.
    pub(crate) fn disconnect(&mut self, device: &mut Device, id: CommId) {
        if self.cm.disconnect(device.now(), id).is_ok() {
            self.end_qp(device, id);
        }
    }

    /// The handle is gone: nobody wants to hear of it any more.
    pub(crate) fn forget(&mut self, id: CommId) {
        if let Some(qp) = self.entries.remove(&id).and_then(|entry| entry.qp) {
            self.unconfirmed.remove(&qp.id);
        }
    }

    /// Whether a connection has this queue pair, whatever has become of it.
    pub(crate) fn has_qp(&self, qp: QpId) -> bool {
        let mut known = self.entries.values().filter_map(|entry| entry.qp);
        known.any(|known| known.id == qp)
    }

    // Inputs.

    /// A management datagram has come from `source`.
    pub(crate) fn handle(&mut self, now: Nanos, source: SocketAddr, mad: &[u8]) {
        let from = SocketAddr::new(source.ip(), listening_port(mad));
        // What is malformed, stale or too much is as good as lost.
        let _ = self.cm.handle_mad(now, from, mad);
    }

    /// A packet came for this queue pair: its client is ready.
    pub(crate) fn note_communication(&mut self, qp: QpId) {
        if !self.unconfirmed.is_empty()
            && let Some(id) = self.unconfirmed.get(&qp)
        {
            self.cm.handle_communication(*id);
        }
    }

    pub(crate) fn next_timeout(&self) -> Option<Nanos> {
        self.cm.poll_timeout()
    }

    /// Does what is due: timers, queue pairs' moves, events, datagrams.
    pub(crate) fn advance(&mut self, now: Nanos, device: &mut Device) {
        if self.cm.poll_timeout().is_some_and(|due| due <= now) {
            self.cm.handle_timeout(now);
        }
        while let Some(event) = self.cm.poll_event() {
            self.take(now, device, event);
        }
        while let Some(transmit) = self.cm.poll_transmit() {
            self.gsi.send(device, transmit.to, &transmit.mad);
        }
    }

    /// A queue pair that the manager has moved to ERR; the caller collects its completions.
    pub(crate) fn poll_failed(&mut self) -> Option<QpId> {
        self.failed.pop()
    }

    fn take(&mut self, now: Nanos, device: &mut Device, event: CmEvent) {
        let (id, event) = match event {
            CmEvent::ConnectRequest { id, request } => {
                if !self.admit(id, request.service) {
                    let _ = self.cm.reject(now, id, reason::NO_RESOURCES, &[]);
                    return;
                }
                (id, Happening::Request(id, request))
            }
            CmEvent::Inquiry { id, inquiry } => {
                if !self.admit(id, inquiry.service) {
                    let _ = self.answer_nothing(now, id);
                    return;
                }
                (id, Happening::Inquiry(id, inquiry))
            }
            CmEvent::Accepted {
                id,
                qp,
                ca_guid,
                private_data,
            } => {
                let is_ready = self.accepted(now, device, id, (qp, ca_guid));
                let event = match is_ready {
                    true => Happening::Established(id, private_data),
                    false => Happening::Disconnected(id),
                };
                (id, event)
            }
            CmEvent::Established { id } => {
                if let Some(qp) = self.entries.get(&id).and_then(|entry| entry.qp) {
                    self.unconfirmed.remove(&qp.id);
                }
                (id, Happening::Established(id, Vec::new()))
            }
            CmEvent::Rejected {
                id,
                reason,
                private_data,
            } => (id, Happening::Rejected(id, reason, private_data)),
            CmEvent::Disconnected { id } => (id, Happening::Disconnected(id)),
            CmEvent::TimedOut { id } => (id, Happening::Unreachable(id)),
            CmEvent::Resolved {
                id,
                qpn,
                qkey,
                private_data,
            } => (id, Happening::Resolved(id, qpn, qkey, private_data)),
            CmEvent::Unresolved {
                id,
                status,
                private_data,
            } => (id, Happening::Unresolved(id, status, private_data)),
        };
        let goes_on = matches!(
            event,
            Happening::Request(..) | Happening::Inquiry(..) | Happening::Established(..)
        );
        if !goes_on {
            self.end_qp(device, id);
        }
        let Some(entry) = self.entries.get(&id) else {
            return;
        };
        if let Some(channel) = self.channels.get_mut(&entry.channel) {
            channel.push(event);
        }
        if !goes_on && entry.qp.is_none() {
            // Who has a queue pair holds a handle, and forgets with it.
            self.entries.remove(&id);
        }
    }

    /// Whether whoever listens on `service` has room for another request.
    fn admit(&mut self, id: CommId, service: ServiceId) -> bool {
        let Some(&channel) = self.listeners.get(&service) else {
            return false;
        };
        let has_room = self
            .channels
            .get(&channel)
            .is_some_and(|c| c.events.len() < EVENTS_MAX);
        if has_room {
            self.entries.insert(id, Entry { channel, qp: None });
        }
        has_room
    }

    /// The server has accepted: the queue pair is moved before the server hears that it is. False
    /// if the program has moved or destroyed it meanwhile.
    fn accepted(
        &mut self,
        now: Nanos,
        device: &mut Device,
        id: CommId,
        (theirs, guid): (QpOffer, u64),
    ) -> bool {
        let qp = self.entries.get(&id).and_then(|entry| entry.qp);
        let is_ready = qp.is_some_and(|qp| bring_up(device, &qp, theirs, budget_of(guid)));
        // It has just been accepted: there is something to establish, or to refuse.
        let _ = match is_ready {
            true => self.cm.establish(id),
            false => self.cm.reject(now, id, reason::CONSUMER, &[]),
        };
        is_ready
    }

    /// The connection is over: nothing that is posted will ever be sent.
    fn end_qp(&mut self, device: &mut Device, id: CommId) {
        let Some(qp) = self.entries.get(&id).and_then(|entry| entry.qp) else {
            return;
        };
        self.unconfirmed.remove(&qp.id);
        if let Some(machine) = device.qp(qp.id)
            && machine.state() != QpState::Init
        {
            machine.to_error();
            self.failed.push(qp.id);
        }
    }
}

/// INIT to RTS with what the peer says; false if the queue pair is not in INIT.
fn bring_up(device: &mut Device, qp: &ConnectingQp, theirs: QpOffer, budget: Option<u32>) -> bool {
    let chunk = READ_CHUNK.min(device.receive_budget() / 2).max(1);
    let (rtr, rts) = attributes(qp, theirs, chunk as u16);
    let Some(machine) = device.qp(qp.id) else {
        return false;
    };
    if machine.to_rtr(rtr).is_err() {
        return false;
    }
    machine.to_rts(rts).expect("Rtr leads to Rts");
    device.set_peer(qp.id, qp.peer, budget);
    true
}

/// What the queue pair is told on its way, with READs asked for in pieces of `chunk` packets.
fn attributes(qp: &ConnectingQp, theirs: QpOffer, chunk: u16) -> (RtrAttr, RtsAttr) {
    let rtr = RtrAttr {
        dest: theirs.qpn,
        path_mtu: qp.mtu,
        rq_psn: qp.psn,
        max_dest_rd_atomic: qp.responder_resources,
        min_rnr_timer: RnrTimer::new(RNR_TIMER),
    };
    let rts = RtsAttr {
        // Each side says at which number the other begins.
        sq_psn: theirs.psn,
        timeout: qp.timeout,
        retry_cnt: qp.retry_count,
        rnr_retry: theirs.rnr_retry,
        max_rd_atomic: qp.initiator_depth.min(theirs.responder_resources),
        read_chunk_packets: chunk,
    };
    (rtr, rts)
}

/// Where the sender of a management datagram listens.
fn listening_port(mad: &[u8]) -> u16 {
    match mad.get(8..12) {
        Some(&[l, t, high, low]) if [l, t] == PORT_MARK => u16::from_be_bytes([high, low]),
        _ => UDP_PORT,
    }
}

/// What one of our own ends says of its receive buffer.
fn budget_of(guid: u64) -> Option<u32> {
    let budget = (guid >> 24) as u16;
    let is_ours = guid >> 40 == GUID_MARK && budget > 0 && budget < EUI48;
    is_ours.then_some(u32::from(budget))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowtide_transport_proto::cm::Message;

    #[test]
    fn our_own_ends_say_where_they_listen_and_what_they_hold() {
        let to = SocketAddr::from(([127, 0, 0, 1], 4000));
        for port in [4791, 1, 65_535] {
            let mut manager = Manager::new(SocketAddr::new(to.ip(), port), 984, u64::MAX);
            let params = ResolveParams {
                to,
                service: ServiceId::udp(1),
                source_port: 0,
                private_data: &[],
            };
            manager.cm.resolve(Nanos(1), &params).unwrap();
            let mad = manager.cm.poll_transmit().unwrap().mad;
            assert_eq!(listening_port(&mad), port);
        }
        let linux = Message::Drep {
            local: CommId(1),
            remote: CommId(2),
        };
        assert_eq!(
            listening_port(&linux.encode(0x0000_0002_8b0c_77d1)),
            UDP_PORT
        );
        assert_eq!(listening_port(&[]), UDP_PORT);
        assert_eq!(
            budget_of(GUID_MARK << 40 | 984 << 24 | 0xFF_FFFF),
            Some(984)
        );
        assert_eq!(budget_of(GUID_MARK << 40), None);
        // Adapters' GUIDs.
        assert_eq!(budget_of(0x0E4C_54FF_FE00_0001), None);
        assert_eq!(budget_of(0x0001_0aff_fe09_0001), None);
    }

    /// Of READs each end has no more under way than it wants and the other serves, and serves what it
    /// has said.
    #[test]
    fn the_smaller_depth_counts() {
        let qp = ConnectingQp {
            id: QpId(0),
            psn: Psn::new(70),
            mtu: Mtu::B1024,
            peer: ([127, 0, 0, 1], 4791).into(),
            timeout: 14,
            retry_count: 6,
            responder_resources: 3,
            initiator_depth: 5,
        };
        for (served, under_way) in [(8, 5), (5, 5), (2, 2), (0, 0)] {
            let theirs = QpOffer {
                qpn: Qpn::new(9),
                psn: Psn::new(80),
                responder_resources: served,
                initiator_depth: 7,
                rnr_retry: 1,
            };
            let (rtr, rts) = attributes(&qp, theirs, 16);
            assert_eq!((rtr.max_dest_rd_atomic, rts.max_rd_atomic), (3, under_way));
            assert_eq!((rtr.dest, rtr.rq_psn), (theirs.qpn, qp.psn));
            assert_eq!((rts.sq_psn, rts.rnr_retry), (theirs.psn, 1));
        }
    }

    /// A device on a loopback address.
    fn device(local: SocketAddr) -> Device {
        let options = crate::device::DeviceOptions::default();
        let (peers, random) = (crate::device::Peers::Any, crate::names::Random::default);
        Device::bind(SocketAddr::new(local.ip(), 0), &options, peers, random).unwrap()
    }

    /// A request that finds no room in its channel is refused at once.
    #[test]
    fn a_request_that_nobody_will_look_at_is_refused() {
        let local: SocketAddr = ([127, 0, 0, 1], 4000).into();
        let (mut device, now) = (device(local), Nanos(1));
        let mut server = Manager::new(local, 984, 1);
        let (channel, _readable) = server.add_channel().unwrap();
        let service = ServiceId::tcp(1);
        assert!(server.listen(channel, service, false));
        let mut client = Manager::new(local, 984, 2).cm;
        let mut ask = |server: &mut Manager, qpn| {
            let params = ConnectParams {
                to: local,
                service,
                source_port: 0,
                qp: QpOffer {
                    qpn: Qpn::new(qpn),
                    psn: Psn::new(0),
                    responder_resources: 1,
                    initiator_depth: 1,
                    rnr_retry: 7,
                },
                mtu: Mtu::B1024,
                retry_count: 7,
                ack_timeout: 14,
                private_data: &[],
            };
            let asked = client.connect(now, &params).unwrap();
            server.handle(now, local, &client.poll_transmit().unwrap().mad);
            while let Some(event) = server.cm.poll_event() {
                server.take(now, &mut device, event);
            }
            let answer = server.cm.poll_transmit()?.mad;
            client.handle_mad(now, local, &answer);
            match client.poll_event() {
                Some(CmEvent::Rejected { id, reason, .. }) if id == asked => Some(reason),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(ask(&mut server, 2), None, "the program is to answer");
        let full = server.channels.get_mut(&channel).unwrap();
        while full.events.len() < EVENTS_MAX {
            full.push(Happening::Disconnected(CommId(9)));
        }
        assert_eq!(ask(&mut server, 3), Some(reason::NO_RESOURCES));
        assert_eq!(server.entries.len(), 1);
    }

    /// An inquiry that finds no room in its channel, and one whose channel goes away, are answered at
    /// once.
    #[test]
    fn an_inquiry_that_nobody_will_look_at_is_answered() {
        let local: SocketAddr = ([127, 0, 0, 1], 4000).into();
        let mut device = device(local);
        for is_full in [true, false] {
            let now = Nanos(1);
            let mut server = Manager::new(local, 984, 1);
            let (channel, _readable) = server.add_channel().unwrap();
            let service = ServiceId::udp(1);
            assert!(server.listen(channel, service, true));
            if is_full {
                let full = server.channels.get_mut(&channel).unwrap();
                (0..EVENTS_MAX).for_each(|_| full.push(Happening::Disconnected(CommId(9))));
            }
            let mut client = Manager::new(local, 984, 2).cm;
            let params = ResolveParams {
                to: local,
                service,
                source_port: 0,
                private_data: &[],
            };
            let asked = client.resolve(now, &params).unwrap();
            server.handle(now, local, &client.poll_transmit().unwrap().mad);
            while let Some(event) = server.cm.poll_event() {
                server.take(now, &mut device, event);
            }
            if !is_full {
                assert!(server.has_event(channel));
                assert!(
                    server.cm.poll_transmit().is_none(),
                    "the program is to answer"
                );
                server.remove_channel(now, channel);
            }
            let answer = server.cm.poll_transmit().expect("an answer").mad;
            client.handle_mad(now, local, &answer);
            let Some(CmEvent::Unresolved { id, status, .. }) = client.poll_event() else {
                panic!("it was not told");
            };
            assert_eq!((id, status), (asked, sidr_status::REJECT));
            assert!(server.entries.is_empty());
        }
    }
}
