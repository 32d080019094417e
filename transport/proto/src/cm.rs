//! The connection manager: the handshake that rdma_cm peers speak on queue pair 1.
//!
//! [`Cm`] owns the connections of one device from request to disconnection. It makes 256-byte
//! [management datagrams](Message) that the caller sends as UD SEND Only to [`Qpn::GSI`] with
//! Q_Key [`GSI_QKEY`], and events that tell the caller what to do with its queue pairs:
//!
//! ```text
//! client                                            server (listening)
//! connect   -- REQ -->   ConnectRequest: queue pair to RTR and RTS, accept (or reject)
//! Accepted  <-- REP --   (REJ: Rejected)
//! queue pair to RTR and RTS, establish
//!           -- RTU -->   Established
//! disconnect -- DREQ -->  Disconnected
//! Disconnected <-- DREP --
//! ```
//!
//! A datagram queue pair has no connection; a client asks where it is:
//!
//! ```text
//! resolve -- SIDR_REQ -->  Inquiry: answer
//! Resolved, Unresolved <-- SIDR_REP --
//! ```
//!
//! Every message that waits for an answer is sent again, at first after [`CmConfig::resend_after`],
//! then after twice that and so on, until [`CmConfig::give_up_after`]. Duplicates are answered as
//! the first was, also for a while after the end ([`CmConfig::time_wait`]), and a duplicate that
//! the caller has not decided about yet by MRA, which asks for patience. A request from a queue
//! pair that already has a connection here is of that host's next life: the old connection ends.
//! Ids count up from what the caller chooses; there is no random source here.
//!
//! Contract: commands, `handle_mad`, `handle_timeout`; then drain `poll_transmit`, `poll_event`,
//! and ask `poll_timeout`.
//!
//! Absent: queue pairs (the caller moves them), path migration, UC and XRC (refused with
//! [`reason::INVALID_TRANSPORT`]).
//! Source: IBTA volume 1, chapter 12; Linux `cm.c`, `cma.c`.

mod incoming;
mod mad;
mod sidr;
#[cfg(test)]
mod tests;
mod types;

use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use core::net::{IpAddr, SocketAddr};

pub use mad::{
    BadMad, CmaHeader, CommId, MAD_LEN, Message, REJ_PRIVATE_MAX, REP_PRIVATE_MAX, REQ_PRIVATE_MAX,
    Rej, Rep, Req, SIDR_REP_PRIVATE_MAX, SIDR_REQ_PRIVATE_MAX, ServiceId, SidrRep, SidrReq,
    address, gid, reason, sidr_status,
};
pub use types::{
    CmConfig, CmError, CmEvent, CmOutcome, CmState, CmTransmit, ConnectParams, ConnectRequest,
    Inquiry, QpOffer, ResolveParams,
};

use crate::time::Nanos;
use crate::wire::{PKEY_DEFAULT, Qpn};

/// The Q_Key of queue pair 1.
pub const GSI_QKEY: u32 = 0x8001_0000;
/// Datagrams and events that may wait for the caller; beyond, input is dropped as if lost.
const WAITING_MAX: usize = 256;
/// The longest pause between two sendings of one message.
const RESEND_MAX: Nanos = Nanos::from_millis(4_000);
/// The pause that an MRA of ours asks for: exponent of 4.096 us, 1.1 s.
const MRA_TIMEOUT: u8 = 18;
/// "I answer within 4.3 s", as Linux says (exponent of 4.096 us).
const RESPONSE_TIMEOUT: u8 = 20;
/// How often a message is resent, as Linux says. Ours are bounded by time.
const CM_RETRIES: u8 = 15;
const HOP_LIMIT: u8 = 64;

/// One connection.
#[derive(Debug)]
struct Connection {
    state: CmState,
    peer: SocketAddr,
    /// The peer's id; 0 until it is known.
    remote: CommId,
    remote_qpn: Qpn,
    /// Transaction of the handshake; the peer's replies repeat it.
    tid: u64,
    /// We asked for the connection.
    is_client: bool,
    /// The last message sent, to send again.
    sent: [u8; MAD_LEN],
    /// When to repeat it, or to forget the connection; `None` if nothing is awaited. Mirrored in
    /// `Cm::timers`.
    due: Option<Nanos>,
    pause: Nanos,
    give_up: Nanos,
}

impl Connection {
    /// One of a client that has yet to send its request to `peer`.
    fn new(state: CmState, peer: SocketAddr, tid: u64) -> Self {
        Self {
            state,
            peer,
            remote: CommId(0),
            remote_qpn: Qpn::new(0),
            tid,
            is_client: true,
            sent: [0; MAD_LEN],
            due: None,
            pause: Nanos::ZERO,
            give_up: Nanos::ZERO,
        }
    }
}

/// The connection manager of one device: see the [module](self).
#[derive(Debug)]
pub struct Cm {
    config: CmConfig,
    next_id: u32,
    services: BTreeSet<ServiceId>,
    /// Those of datagram queue pairs.
    datagram_services: BTreeSet<ServiceId>,
    /// Inquiries are connections that end with the answer.
    connections: BTreeMap<CommId, Connection>,
    /// Server side: connections by the client's address and id, to know a repeated request.
    requests: BTreeMap<(IpAddr, CommId), CommId>,
    /// The same of inquiries, whose ids are numbers of their own.
    inquiries: BTreeMap<(IpAddr, CommId), CommId>,
    /// Server side: connections by the client's queue pair, to know its host's next life.
    remote_qps: BTreeMap<(SocketAddr, Qpn), CommId>,
    /// Every connection's `due`, in order.
    timers: BTreeSet<(Nanos, CommId)>,
    transmits: VecDeque<CmTransmit>,
    events: VecDeque<CmEvent>,
}

impl Cm {
    /// A connection manager without connections.
    #[must_use]
    pub fn new(config: CmConfig) -> Self {
        Self {
            config,
            next_id: config.first_comm_id,
            services: BTreeSet::new(),
            datagram_services: BTreeSet::new(),
            connections: BTreeMap::new(),
            requests: BTreeMap::new(),
            inquiries: BTreeMap::new(),
            remote_qps: BTreeMap::new(),
            timers: BTreeSet::new(),
            transmits: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    /// Report requests for `service` from now on; others are rejected.
    pub fn listen(&mut self, service: ServiceId) {
        self.services.insert(service);
    }

    /// Reject requests for `service` again.
    pub fn unlisten(&mut self, service: ServiceId) {
        self.services.remove(&service);
    }

    /// State of a connection; `None` if there is none such.
    #[must_use]
    pub fn state(&self, id: CommId) -> Option<CmState> {
        self.connections.get(&id).map(|c| c.state)
    }

    /// Client: ask for a connection.
    ///
    /// # Errors
    ///
    /// [`CmError::PrivateDataTooLong`], [`CmError::TooManyConnections`].
    pub fn connect(&mut self, now: Nanos, params: &ConnectParams<'_>) -> Result<CommId, CmError> {
        if params.private_data.len() > REQ_PRIVATE_MAX {
            return Err(CmError::PrivateDataTooLong);
        }
        let id = self.allocate(self.config.connections_max)?;
        let tid = self.tid(id);
        let message = self.request(id, params);
        let connection = Connection {
            sent: message.encode(tid),
            ..Connection::new(CmState::ReqSent, params.to, tid)
        };
        self.connections.insert(id, connection);
        self.send_awaiting(now, id);
        Ok(id)
    }

    /// Server: accept a request. The queue pair must be able to receive.
    ///
    /// # Errors
    ///
    /// [`CmError`]; nothing was sent.
    pub fn accept(
        &mut self,
        now: Nanos,
        id: CommId,
        qp: QpOffer,
        private_data: &[u8],
    ) -> Result<(), CmError> {
        if private_data.len() > REP_PRIVATE_MAX {
            return Err(CmError::PrivateDataTooLong);
        }
        let ca_guid = self.config.ca_guid;
        let connection = self.in_state(id, &[CmState::ReqReceived])?;
        let rep = Message::Rep(Rep {
            local: id,
            remote: connection.remote,
            qpn: qp.qpn,
            psn: qp.psn,
            responder_resources: qp.responder_resources,
            initiator_depth: qp.initiator_depth,
            target_ack_delay: 15,
            flow_control: false,
            rnr_retry: qp.rnr_retry,
            srq: false,
            ca_guid,
            private_data,
        });
        connection.sent = rep.encode(connection.tid);
        connection.state = CmState::RepSent;
        self.send_awaiting(now, id);
        Ok(())
    }

    /// Either side, before the connection is established: refuse.
    ///
    /// # Errors
    ///
    /// [`CmError`]; nothing was sent.
    pub fn reject(
        &mut self,
        now: Nanos,
        id: CommId,
        reason: u16,
        private_data: &[u8],
    ) -> Result<(), CmError> {
        if private_data.len() > REJ_PRIVATE_MAX {
            return Err(CmError::PrivateDataTooLong);
        }
        let ca_guid = self.config.ca_guid;
        let connection = self.in_state(id, &[CmState::ReqReceived, CmState::RepReceived])?;
        let rej = Message::Rej(Rej {
            local: id,
            remote: connection.remote,
            message: u8::from(connection.is_client),
            reason,
            ca_guid,
            private_data,
        });
        connection.sent = rej.encode(connection.tid);
        self.send(id);
        self.wind_down(now, id);
        Ok(())
    }

    /// Client: the queue pair is ready, tell the server.
    ///
    /// # Errors
    ///
    /// [`CmError`]; nothing was sent.
    pub fn establish(&mut self, id: CommId) -> Result<(), CmError> {
        let connection = self.in_state(id, &[CmState::RepReceived])?;
        let rtu = Message::Rtu {
            local: id,
            remote: connection.remote,
        };
        connection.sent = rtu.encode(connection.tid);
        connection.state = CmState::Established;
        self.send(id);
        Ok(())
    }

    /// Server: a packet of the connection came before the client's RTU, which so is implied.
    pub fn handle_communication(&mut self, id: CommId) {
        if let Some(connection) = self.connections.get_mut(&id)
            && connection.state == CmState::RepSent
        {
            connection.state = CmState::Established;
            self.set_due(id, None);
            self.events.push_back(CmEvent::Established { id });
        }
    }

    /// Either side: end the connection. [`CmEvent::Disconnected`] follows, at the latest when the
    /// peer has not answered for [`CmConfig::give_up_after`]. A request not answered yet is
    /// withdrawn.
    ///
    /// # Errors
    ///
    /// [`CmError`]; nothing was sent.
    pub fn disconnect(&mut self, now: Nanos, id: CommId) -> Result<(), CmError> {
        use CmState::{Established, RepReceived, RepSent, ReqSent, SidrReqSent};
        let tid = self.tid(id);
        let states = [ReqSent, RepSent, RepReceived, Established, SidrReqSent];
        let connection = self.in_state(id, &states)?;
        if connection.state == SidrReqSent {
            self.forget(id);
            self.events.push_back(CmEvent::Disconnected { id });
            return Ok(());
        }
        if connection.state == ReqSent {
            // The server may have our request: tell it that nobody waits any more.
            let to = connection.peer;
            self.reject_unknown(to, tid, id, CommId(0), 2, reason::TIMEOUT);
            self.forget(id);
            self.events.push_back(CmEvent::Disconnected { id });
            return Ok(());
        }
        let (remote, qpn) = (connection.remote, connection.remote_qpn);
        connection.sent = Message::Dreq {
            local: id,
            remote,
            qpn,
        }
        .encode(tid);
        connection.state = CmState::DreqSent;
        self.send_awaiting(now, id);
        Ok(())
    }

    /// A datagram came to queue pair 1. `from` is where answers go: the sender's address, and the
    /// UDP port it listens on (4791 but for our own peers elsewhere).
    pub fn handle_mad(&mut self, now: Nanos, from: SocketAddr, mad: &[u8]) -> CmOutcome {
        let (tid, message) = match Message::decode(mad) {
            Ok(decoded) => decoded,
            Err(bad) => return CmOutcome::Malformed(bad),
        };
        if self.events.len() >= WAITING_MAX || self.transmits.len() >= WAITING_MAX {
            return CmOutcome::Busy;
        }
        match message {
            Message::Req(req) => self.handle_req(now, from, tid, &req),
            Message::Rep(rep) => self.handle_rep(from, tid, &rep),
            Message::Mra {
                remote, timeout, ..
            } => self.handle_mra(now, from, remote, timeout),
            Message::Rej(rej) => self.handle_rej(from, &rej),
            Message::Rtu { remote, .. } => self.handle_rtu(from, remote),
            Message::Dreq { local, remote, .. } => self.handle_dreq(now, from, tid, local, remote),
            Message::Drep { remote, .. } => self.handle_drep(now, from, remote),
            Message::SidrReq(req) => self.handle_sidr_req(now, from, tid, &req),
            Message::SidrRep(rep) => self.handle_sidr_rep(from, &rep),
        }
    }

    /// The time that [`Self::poll_timeout`] named has come (calling early does no harm).
    pub fn handle_timeout(&mut self, now: Nanos) {
        while let Some(&(due, id)) = self.timers.first()
            && due <= now
        {
            let Some(connection) = self.connections.get_mut(&id) else {
                break;
            };
            if connection.state == CmState::TimeWait {
                self.forget(id);
            } else if now < connection.give_up {
                connection.pause = Nanos((connection.pause.0 * 2).min(RESEND_MAX.0));
                let due = now + connection.pause;
                self.set_due(id, Some(due));
                self.send(id);
            } else {
                self.give_up(now, id);
            }
        }
    }

    /// The next datagram to send.
    pub fn poll_transmit(&mut self) -> Option<CmTransmit> {
        self.transmits.pop_front()
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<CmEvent> {
        self.events.pop_front()
    }

    /// When [`Self::handle_timeout`] wants to be called, unless something happens before.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Nanos> {
        self.timers.first().map(|(due, _)| *due)
    }

    // Messages out.

    fn request<'a>(&self, id: CommId, params: &ConnectParams<'a>) -> Message<'a> {
        Message::Req(Req {
            local: id,
            service: params.service,
            ca_guid: self.config.ca_guid,
            qpn: params.qp.qpn,
            transport: 0,
            responder_resources: params.qp.responder_resources,
            initiator_depth: params.qp.initiator_depth,
            remote_response_timeout: RESPONSE_TIMEOUT,
            local_response_timeout: RESPONSE_TIMEOUT,
            psn: params.qp.psn,
            retry_count: params.retry_count,
            rnr_retry: params.qp.rnr_retry,
            pkey: PKEY_DEFAULT,
            mtu: params.mtu,
            cm_retries: CM_RETRIES,
            srq: false,
            local_gid: gid(self.config.local),
            remote_gid: gid(params.to.ip()),
            flow_label: 0,
            rate: 0,
            traffic_class: 0,
            hop_limit: HOP_LIMIT,
            service_level: 0,
            subnet_local: false,
            ack_timeout: params.ack_timeout,
            cma: Some(CmaHeader {
                source_port: params.source_port,
                source: self.config.local,
                target: params.to.ip(),
            }),
            private_data: params.private_data,
        })
    }

    /// The peer has been silent for too long, or the caller has.
    fn give_up(&mut self, now: Nanos, id: CommId) {
        use CmState::{DreqSent, RepSent, ReqReceived};
        let Some(connection) = self.connections.get(&id) else {
            return;
        };
        let (state, to, tid) = (connection.state, connection.peer, connection.tid);
        if state == DreqSent {
            self.wind_down(now, id);
            self.events.push_back(CmEvent::Disconnected { id });
            return;
        }
        if matches!(state, ReqReceived | RepSent) {
            // The client need not wait any longer either.
            let (remote, message) = (connection.remote, u8::from(state == RepSent) * 2);
            self.reject_unknown(to, tid, id, remote, message, reason::TIMEOUT);
        }
        self.forget(id);
        self.events.push_back(CmEvent::TimedOut { id });
    }

    /// Asks the peer for patience: `message` 0 with its request, 1 with its reply.
    fn delay(&mut self, id: CommId, message: u8) {
        if let Some(connection) = self.connections.get(&id) {
            let mra = Message::Mra {
                local: id,
                remote: connection.remote,
                message,
                timeout: MRA_TIMEOUT,
            };
            let (to, mad) = (connection.peer, mra.encode(connection.tid));
            self.transmits.push_back(CmTransmit { to, mad });
        }
    }

    /// Refuse a message that belongs to no connection of ours.
    fn reject_unknown(
        &mut self,
        to: SocketAddr,
        tid: u64,
        local: CommId,
        remote: CommId,
        message: u8,
        reason: u16,
    ) {
        let rej = Rej {
            local,
            remote,
            message,
            reason,
            ca_guid: self.config.ca_guid,
            private_data: &[],
        };
        let mad = Message::Rej(rej).encode(tid);
        self.transmits.push_back(CmTransmit { to, mad });
    }

    /// Send what `id` sent last, or now has to send.
    fn send(&mut self, id: CommId) {
        if let Some(connection) = self.connections.get(&id) {
            let (to, mad) = (connection.peer, connection.sent);
            self.transmits.push_back(CmTransmit { to, mad });
        }
    }

    /// The same for a message that wants an answer.
    fn send_awaiting(&mut self, now: Nanos, id: CommId) {
        let (pause, patience) = (self.config.resend_after, self.config.give_up_after);
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.pause = pause;
            connection.give_up = now + patience;
        }
        self.set_due(id, Some(now + pause));
        self.send(id);
    }

    // Connections.

    /// How many there may be when a peer asks for one more. An eighth is ours: strangers who ask and
    /// do not go on must not keep us from connecting.
    fn callers_max(&self) -> usize {
        self.config.connections_max - self.config.connections_max / 8
    }

    /// A free id, if there are fewer than `most`.
    fn allocate(&mut self, most: usize) -> Result<CommId, CmError> {
        if self.connections.len() >= most && !self.make_room() {
            return Err(CmError::TooManyConnections);
        }
        // Ends: fewer connections exist than ids.
        loop {
            let id = CommId(self.next_id);
            self.next_id = self.next_id.wrapping_add(1);
            if id != CommId(0) && !self.connections.contains_key(&id) {
                return Ok(id);
            }
        }
    }

    /// Forgets the connection that has been over for longest: lest peers that we refuse fill the
    /// table with what is only remembered. False if there is none.
    fn make_room(&mut self) -> bool {
        let over = self.timers.iter().map(|(_, id)| *id).find(|id| {
            let state = self.connections.get(id).map(|c| c.state);
            state == Some(CmState::TimeWait)
        });
        if let Some(id) = over {
            self.forget(id);
        }
        over.is_some()
    }

    fn tid(&self, id: CommId) -> u64 {
        u64::from(self.config.tid_high) << 32 | u64::from(id.0)
    }

    fn in_state(&mut self, id: CommId, states: &[CmState]) -> Result<&mut Connection, CmError> {
        let connection = self
            .connections
            .get_mut(&id)
            .ok_or(CmError::UnknownConnection)?;
        if states.contains(&connection.state) {
            Ok(connection)
        } else {
            Err(CmError::State(connection.state))
        }
    }

    /// The connection `id`, if it is with the host that speaks.
    fn of_peer(&mut self, id: CommId, from: SocketAddr) -> Option<&mut Connection> {
        self.connections
            .get_mut(&id)
            .filter(|c| c.peer.ip() == from.ip())
    }

    /// The connection has ended; remember it for a while, to answer duplicates.
    fn wind_down(&mut self, now: Nanos, id: CommId) {
        let until = now + self.config.time_wait;
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.state = CmState::TimeWait;
        }
        self.set_due(id, Some(until));
    }

    fn set_due(&mut self, id: CommId, due: Option<Nanos>) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        if let Some(old) = core::mem::replace(&mut connection.due, due) {
            self.timers.remove(&(old, id));
        }
        if let Some(due) = due {
            self.timers.insert((due, id));
        }
    }

    fn forget(&mut self, id: CommId) {
        self.set_due(id, None);
        if let Some(connection) = self.connections.remove(&id)
            && !connection.is_client
        {
            let key = (connection.peer.ip(), connection.remote);
            for known in [&mut self.requests, &mut self.inquiries] {
                if known.get(&key) == Some(&id) {
                    known.remove(&key);
                }
            }
            let key = (connection.peer, connection.remote_qpn);
            if self.remote_qps.get(&key) == Some(&id) {
                self.remote_qps.remove(&key);
            }
        }
    }
}
