//! Connections as rdma_cm makes them: listen, connect, accept, reject, disconnect, and events.
//!
//! The peer may be any rdma_cm program on a kernel's soft-RoCE or an adapter, or one of our own
//! devices. Handshakes are the InfiniBand connection manager's datagrams on queue pair 1; a program
//! sees only [`Event`]s, through an [`EventChannel`] that epoll can wait for:
//!
//! ```text
//! client                               server
//! channel.connect(to, service, qp)     channel.listen(service)
//!                                      Event::Request: request.accept(qp), request.reject(..)
//! Event::Established, ::Rejected       Event::Established
//!        queue pairs are in RTS, post as you like
//! connection.disconnect()              Event::Disconnected
//! ```
//!
//! A queue pair is given in INIT, with receives posted, and belongs to its [`Connection`] from then
//! on. It is moved to RTS for the program, and to ERR when the connection ends: what is posted then
//! comes back flushed. The device's thread answers while the program sleeps.
//!
//! Datagram services have no connections: a server [answers](Question::answer) where its datagram
//! queue pair is, a client [asks](EventChannel::resolve).
//!
//! Lost datagrams are sent again: at first after 50 ms, then after twice that and so on. A peer
//! that has not answered for 30 s is [`Event::Unreachable`]; one that asks for patience (MRA) is
//! given it, and a request that the program has not answered asks for it, for 30 s at most.
//!
//! Dropping a handle is an answer too: a [`Listener`] stops listening, a [`Request`] is rejected, a
//! [`Connection`] disconnects.
//!
//! Deliberately absent: address and route resolution (sockets have both), alternate paths,
//! multicast groups, UC. There is no authentication in this protocol: any process of any host that
//! reaches the port may ask, and whoever can send from a peer's address can disconnect it.
//!
//! The messages of [`crate::message`] stand on the same state machine, with queue pairs of their
//! own.

mod gsi;
mod handles;
mod manager;

use std::fmt;
use std::io::{self, PipeReader};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use lowtide_transport_proto::cm::{CommId, ConnectParams, QpOffer, ResolveParams};
use lowtide_transport_proto::wire::{Mtu, Psn};

pub use lowtide_transport_proto::cm::{
    CmError, REJ_PRIVATE_MAX, REP_PRIVATE_MAX, REQ_PRIVATE_MAX, SIDR_REP_PRIVATE_MAX,
    SIDR_REQ_PRIVATE_MAX, ServiceId, reason,
};

pub(crate) use self::gsi::Gsi;
pub use self::handles::{Connection, Listener, Question, Request};
pub(crate) use self::manager::Manager;
use self::manager::{ChannelId, ConnectingQp, Happening};
use crate::raw::types::QpType;
use crate::raw::{self, Context};
use crate::udp::path_mtu;
use crate::verbs::{Device, QpState, Qpn, QueuePair, deadline_in};

/// A queue pair that can be connected: of the safe verbs, of the raw ones, or shared by several
/// holders. Nobody else implements it.
pub trait Connectable: sealed::Connectable {}

mod sealed {
    use super::{Arc, Psn, QueuePair, raw};

    /// What the connection manager must know of it.
    pub trait Connectable {
        fn raw(&self) -> &raw::QueuePair;

        /// The first PSN that it will accept.
        fn first_psn(&self) -> Psn;
    }

    impl Connectable for QueuePair {
        fn raw(&self) -> &raw::QueuePair {
            self.raw()
        }

        fn first_psn(&self) -> Psn {
            self.psn
        }
    }

    impl Connectable for raw::QueuePair {
        fn raw(&self) -> &raw::QueuePair {
            self
        }

        fn first_psn(&self) -> Psn {
            self.random_psn()
        }
    }

    impl<Q: Connectable> Connectable for Arc<Q> {
        fn raw(&self) -> &raw::QueuePair {
            (**self).raw()
        }

        fn first_psn(&self) -> Psn {
            (**self).first_psn()
        }
    }
}

impl<Q: sealed::Connectable> Connectable for Q {}

/// Names a connection, request or question; never used twice in the life of a device, but for a
/// wrap of 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionId(CommId);

/// What both sides of a connection agree on. The defaults suit a data centre.
#[derive(Debug, Clone)]
pub struct ConnectOptions {
    /// What the peer's program is told, at most [`REQ_PRIVATE_MAX`] bytes by a client,
    /// [`REP_PRIVATE_MAX`] by a server. The wire pads with zeros and does not tell the length.
    pub private_data: Vec<u8>,
    /// READs and atomics of the peer that are served at once, at most 128.
    pub responder_resources: u8,
    /// READs and atomics that may be under way at once, at most 128, and at most what the peer
    /// serves.
    pub initiator_depth: u8,
    /// Timeouts without progress before a queue pair fails; 7 is without limit. A client's word
    /// counts for both sides.
    pub retry_count: u8,
    /// The same for a peer that finds no receive posted.
    pub rnr_retry: u8,
    /// Local ACK timeout: 4.096 us times 2 to this power. A client's word counts for both sides.
    pub ack_timeout: u8,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        ConnectOptions {
            private_data: Vec::new(),
            responder_resources: 8,
            initiator_depth: 8,
            retry_count: 7,
            rnr_retry: 7,
            ack_timeout: 14,
        }
    }
}

impl ConnectOptions {
    fn offer(&self, qpn: Qpn, psn: Psn) -> QpOffer {
        QpOffer {
            qpn,
            psn,
            responder_resources: self.responder_resources.min(128),
            initiator_depth: self.initiator_depth.min(128),
            rnr_retry: self.rnr_retry.min(7),
        }
    }
}

/// Why a queue pair was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConnectError {
    /// It is in this state, not in INIT.
    State(QpState),
    /// It is of this type; connections are reliable.
    Kind(QpType),
    /// It belongs to another device than the event channel.
    OtherDevice,
    /// It has a connection already, or is on its way to one.
    InUse,
    /// The peer's IP family is not the device's.
    Family,
    /// The peer's path MTU is larger than this link's; the request was rejected.
    Mtu,
    /// The connection manager refuses: too long private data, too many connections, or the request
    /// has been withdrawn.
    Refused(CmError),
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConnectError::State(state) => {
                write!(f, "the queue pair is in {state:?}; move it to Init first")
            }
            ConnectError::Kind(kind) => {
                write!(
                    f,
                    "a queue pair of type {kind:?}; connections are of type Rc"
                )
            }
            ConnectError::OtherDevice => {
                f.write_str("the queue pair belongs to another device than the event channel")
            }
            ConnectError::InUse => f.write_str("the queue pair has a connection; drop that first"),
            ConnectError::Family => {
                f.write_str("the peer's address is of another family than the device's")
            }
            ConnectError::Mtu => {
                f.write_str("the peer's path MTU is larger than this link carries; lower it there")
            }
            ConnectError::Refused(error) => error.fmt(f),
        }
    }
}

/// A queue pair that was not taken.
#[derive(Debug)]
pub struct ConnectRefused<Q = QueuePair> {
    /// Why.
    pub error: ConnectError,
    /// It, as it was.
    pub qp: Q,
}

impl<Q> fmt::Display for ConnectRefused<Q> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<Q: fmt::Debug> std::error::Error for ConnectRefused<Q> {}

/// What has happened on an [`EventChannel`].
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// Somebody asks for a connection to a service that is listened on.
    Request(Request),
    /// Both sides are ready.
    Established {
        /// The connection.
        id: ConnectionId,
        /// Client: what the server said when it accepted; padded with zeros.
        private_data: Vec<u8>,
    },
    /// The peer refused, or withdrew its request. The queue pair is as it was, in INIT, if it was a
    /// client's.
    Rejected {
        /// The connection.
        id: ConnectionId,
        /// Why: see [`reason`].
        reason: u16,
        /// What the peer said; padded with zeros.
        private_data: Vec<u8>,
    },
    /// The peer has not answered for too long.
    Unreachable {
        /// The connection.
        id: ConnectionId,
    },
    /// The connection has ended, whoever wanted it; its queue pair is in ERR.
    Disconnected {
        /// The connection.
        id: ConnectionId,
    },
    /// Somebody asks for the datagram queue pair of a service that is listened on.
    Question(Question),
    /// The datagram queue pair that was asked for.
    Resolved {
        /// The question.
        id: ConnectionId,
        /// The queue pair.
        qpn: Qpn,
        /// What its datagrams must carry.
        qkey: u32,
        /// What the server said; padded with zeros.
        private_data: Vec<u8>,
    },
    /// There is no such datagram queue pair.
    Unresolved {
        /// The question.
        id: ConnectionId,
        /// 1: nobody listens, 2: the server refuses, 3: it has no queue pair to give.
        status: u8,
        /// What the server said; padded with zeros.
        private_data: Vec<u8>,
    },
}

/// Where events of any number of listeners and connections of one device arrive. Cloning shares it.
/// Its file descriptor is readable as long as an event waits.
#[derive(Debug, Clone)]
pub struct EventChannel(Arc<Channel>);

#[derive(Debug)]
struct Channel {
    context: Context,
    id: ChannelId,
    readable: PipeReader,
}

impl Drop for Channel {
    fn drop(&mut self) {
        let shared = &self.context.shared;
        let mut state = shared.lock();
        let now = state.device.now();
        state.manager.remove_channel(now, self.id);
        shared.drive(&mut state);
    }
}

impl AsFd for EventChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.readable.as_fd()
    }
}

impl EventChannel {
    /// A channel for connections of `device`.
    ///
    /// # Errors
    /// When the process has no file descriptors left.
    pub fn new(device: &Device) -> io::Result<EventChannel> {
        EventChannel::on(device.context())
    }

    /// The same for raw verbs.
    ///
    /// # Errors
    /// When the process has no file descriptors left.
    pub fn on(context: &Context) -> io::Result<EventChannel> {
        let (id, readable) = context.shared.lock().manager.add_channel()?;
        Ok(EventChannel(Arc::new(Channel {
            context: context.clone(),
            id,
            readable,
        })))
    }

    /// The next event, if there is one.
    pub fn poll(&self) -> Option<Event> {
        let shared = &self.0.context.shared;
        let mut state = shared.lock();
        if !state.manager.has_event(self.0.id) {
            shared.drive(&mut state);
        }
        let event = state.manager.pop_event(self.0.id)?;
        drop(state);
        Some(self.event(event))
    }

    /// The next event, asleep until it comes or `timeout` is over.
    pub fn wait(&self, timeout: Duration) -> Option<Event> {
        let deadline = deadline_in(timeout);
        loop {
            if let Some(event) = self.poll() {
                return Some(event);
            }
            let id = self.0.id;
            let has_event = |state: &crate::verbs::State| state.manager.has_event(id);
            if !self.0.context.shared.sleep_until(deadline, has_event) {
                return self.poll();
            }
        }
    }

    /// Reports requests for connections to `service` here, until the listener is dropped.
    ///
    /// # Errors
    /// `AddrInUse` when somebody listens on it already.
    pub fn listen(&self, service: ServiceId) -> io::Result<Listener> {
        self.listen_as(service, false)
    }

    /// The same for the datagram queue pair of `service`.
    ///
    /// # Errors
    /// `AddrInUse` when somebody listens on it already.
    pub fn listen_datagram(&self, service: ServiceId) -> io::Result<Listener> {
        self.listen_as(service, true)
    }

    fn listen_as(&self, service: ServiceId, is_datagram: bool) -> io::Result<Listener> {
        let mut state = self.0.context.shared.lock();
        if !state.manager.listen(self.0.id, service, is_datagram) {
            let taken = format!("service {:#x} is listened on already", service.0);
            return Err(io::Error::new(io::ErrorKind::AddrInUse, taken));
        }
        Ok(Listener {
            channel: self.clone(),
            service,
        })
    }

    /// Asks `to` (4791 is the port of RoCE) for a connection. [`Event::Established`], `Rejected` or
    /// `Unreachable` follows.
    ///
    /// # Errors
    /// [`ConnectRefused`] gives the queue pair back.
    pub fn connect<Q: Connectable>(
        &self,
        to: SocketAddr,
        service: ServiceId,
        qp: Q,
        options: &ConnectOptions,
    ) -> Result<Connection<Q>, ConnectRefused<Q>> {
        let shared = &self.0.context.shared;
        let mtu = link_mtu(self.0.context.local_addr(), to);
        let psn = qp.first_psn();
        let mut state = shared.lock();
        if let Some(error) = self.obstacle(&mut state, qp.raw(), to) {
            return Err(ConnectRefused { error, qp });
        }
        let connecting = ConnectingQp {
            mtu,
            timeout: options.ack_timeout.min(31),
            retry_count: options.retry_count.min(7),
            ..connecting(qp.raw(), psn, to, options)
        };
        let qpn = qp.raw().qpn();
        let params = ConnectParams {
            to,
            service,
            source_port: source_port(qpn),
            qp: options.offer(qpn, psn),
            mtu,
            retry_count: connecting.retry_count,
            ack_timeout: connecting.timeout,
            private_data: &options.private_data,
        };
        let now = state.device.now();
        match state.manager.connect(now, self.0.id, connecting, &params) {
            Ok(id) => {
                shared.drive(&mut state);
                drop(state);
                Ok(self.connection(id, qp))
            }
            Err(error) => {
                let error = ConnectError::Refused(error);
                Err(ConnectRefused { error, qp })
            }
        }
    }

    /// Asks `to` for the datagram queue pair of a service, with at most [`SIDR_REQ_PRIVATE_MAX`]
    /// bytes for its program. [`Event::Resolved`], `Unresolved` or `Unreachable` follows.
    ///
    /// # Errors
    /// Too long private data, or too many connections.
    pub fn resolve(
        &self,
        to: SocketAddr,
        service: ServiceId,
        private_data: &[u8],
    ) -> Result<ConnectionId, CmError> {
        let params = ResolveParams {
            to,
            service,
            source_port: 0xC000,
            private_data,
        };
        let shared = &self.0.context.shared;
        let mut state = shared.lock();
        let now = state.device.now();
        let id = state.manager.resolve(now, self.0.id, &params)?;
        shared.drive(&mut state);
        Ok(ConnectionId(id))
    }

    fn connection<Q>(&self, id: CommId, qp: Q) -> Connection<Q> {
        Connection {
            channel: self.clone(),
            id,
            qp: Some(qp),
        }
    }

    /// What keeps `qp` from being connected to `peer`.
    fn obstacle(
        &self,
        state: &mut crate::verbs::State,
        qp: &raw::QueuePair,
        peer: SocketAddr,
    ) -> Option<ConnectError> {
        if !Arc::ptr_eq(&qp.context().shared, &self.0.context.shared) {
            return Some(ConnectError::OtherDevice);
        }
        let kind = qp.init_attr().kind;
        if kind != QpType::Rc {
            return Some(ConnectError::Kind(kind));
        }
        if state.manager.has_qp(qp.id()) {
            return Some(ConnectError::InUse);
        }
        if state.device.local_addr().is_ipv4() != peer.is_ipv4() {
            return Some(ConnectError::Family);
        }
        let is_in = state.device.qp(qp.id())?.state();
        (is_in != QpState::Init).then_some(ConnectError::State(is_in))
    }

    fn event(&self, event: Happening) -> Event {
        match event {
            Happening::Request(id, request) => Event::Request(Request {
                channel: self.clone(),
                id,
                request: Some(request),
            }),
            Happening::Inquiry(id, inquiry) => Event::Question(Question {
                channel: self.clone(),
                id,
                inquiry,
                is_answered: false,
            }),
            Happening::Established(id, private_data) => Event::Established {
                id: ConnectionId(id),
                private_data,
            },
            Happening::Rejected(id, reason, private_data) => Event::Rejected {
                id: ConnectionId(id),
                reason,
                private_data,
            },
            Happening::Unreachable(id) => Event::Unreachable {
                id: ConnectionId(id),
            },
            Happening::Disconnected(id) => Event::Disconnected {
                id: ConnectionId(id),
            },
            Happening::Resolved(id, qpn, qkey, private_data) => Event::Resolved {
                id: ConnectionId(id),
                qpn,
                qkey,
                private_data,
            },
            Happening::Unresolved(id, status, private_data) => Event::Unresolved {
                id: ConnectionId(id),
                status,
                private_data,
            },
        }
    }
}

fn connecting(
    qp: &raw::QueuePair,
    psn: Psn,
    peer: SocketAddr,
    options: &ConnectOptions,
) -> ConnectingQp {
    ConnectingQp {
        id: qp.id(),
        psn,
        mtu: Mtu::B256,
        peer,
        timeout: 0,
        retry_count: 0,
        responder_resources: options.responder_resources.min(128),
        initiator_depth: options.initiator_depth.min(128),
    }
}

/// The largest MTU that the link from `local` to `peer` carries.
fn link_mtu(local: SocketAddr, peer: SocketAddr) -> Mtu {
    let link = path_mtu(local, peer).unwrap_or(1500);
    Mtu::for_link(link).unwrap_or(Mtu::B256)
}

/// A port of the client in the service's port space, of the range for such ports.
fn source_port(qpn: Qpn) -> u16 {
    0xC000 | qpn.value() as u16 & 0x3FFF
}
