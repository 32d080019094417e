//! The endpoint: a device, its connections, and the wait.
//!
//! Owns: the round of work (`turn`): receive, hand up, expire timers, post, transmit; and the table
//! of connections with their life from `connect` or REQ to `Closed`.
//!
//! Invariants:
//! * a handler runs with nothing half done: it may send, connect and close, also the connection it
//!   is told about;
//! * `Connected` comes before any other event of a connection, `Closed` after all others.
//!
//! Deliberately absent: the bytes of management datagrams (`handshake`).

mod life;

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lowtide_transport_proto::qp::{self, CompletionKind, InitAttr, QpCaps, Status};
use lowtide_transport_proto::time::Nanos;
use lowtide_transport_proto::wire::{PKEY_DEFAULT, Psn, Qpn};

use super::connection::{Arrived, RESERVE, SENDS_MAX, Stream};
use super::handshake::{Greeting, Handshakes};
use super::outbox::SlotPool;
use super::parcel::next_record;
use super::{
    BindError, CloseReason, ConnId, Counters, EndpointConfig, Event, HELLO_MAX, SendError, Waker,
};
use crate::device::{Device, DeviceOptions, Input, Peers, QpId};
use crate::udp::{Arrival, ReceiveBatch};

/// The one protection domain: nothing here gives a peer a key.
const DOMAIN: u32 = 0;
/// Reassembly buffers kept for the next long message.
const SPARE_MAX: usize = 4;
/// The index part of an id that never had an entry.
const INDEX_NONE: u32 = 0xFF_FFFF;
const TOKEN_SOCKET: mio::Token = mio::Token(0);
const TOKEN_WAKER: mio::Token = mio::Token(1);

/// See the [module](super).
pub struct Endpoint {
    ctx: EndpointCtx,
    batch: ReceiveBatch,
    /// Whether the last receive left nothing behind.
    is_drained: bool,
    /// Whether the last poll brought work, so that spinning may pay.
    is_busy: bool,
    poll: mio::Poll,
    occurred: mio::Events,
    waker: Waker,
}

/// What a handler may use: the endpoint without its wait.
pub struct EndpointCtx {
    device: Device,
    handshakes: Handshakes,
    config: EndpointConfig,
    connections: Vec<Option<Connection>>,
    free: Vec<u32>,
    next_serial: u64,
    /// Which connection a queue pair serves.
    by_qp: HashMap<QpId, u32>,
    pool: SlotPool,
    /// Connections that may have something to post.
    dirty: VecDeque<u32>,
    spare: Vec<Vec<u8>>,
    /// Connections that were refused before they had an entry.
    refused: VecDeque<ConnId>,
    next_silence_check: Nanos,
    random: RandomState,
    draws: u64,
}

struct Connection {
    id: ConnId,
    peer: SocketAddr,
    qp: QpId,
    qpn: Qpn,
    psn: Psn,
    /// What we say: `connect`'s hello, or the configuration's.
    hello: Vec<u8>,
    is_incoming: bool,
    /// Their queue pair; 0 until known.
    peer_qpn: Qpn,
    /// What the peer said of itself; known from its REQ or REP on.
    greeting: Option<Greeting>,
    /// Present from the moment the queue pair works.
    stream: Option<Stream>,
    /// Whether `Connected` has been handed up.
    is_established: bool,
    wants_writable: bool,
    is_dirty: bool,
    heard: Nanos,
}

type Handler<'h> = dyn FnMut(&mut EndpointCtx, Event<'_>) + 'h;

impl Endpoint {
    /// Binds the socket. Peers may connect from now on; their REQs are answered while polling.
    ///
    /// # Errors
    /// [`BindError`], with the address and what to do.
    pub fn bind(config: EndpointConfig) -> Result<Endpoint, BindError> {
        if config.hello.len() > HELLO_MAX {
            return Err(BindError::Config("the hello is longer than HELLO_MAX"));
        }
        if !(2..=1024).contains(&config.limits.credits) {
            return Err(BindError::Config("limits.credits must be 2 to 1024"));
        }
        if config.limits.message_max > 1 << 30 {
            return Err(BindError::Config(
                "limits.message_max must be at most 1 GiB",
            ));
        }
        let addr = config.addr;
        let random = RandomState::new();
        let salt = random.build_hasher().finish() as u32;
        let options = DeviceOptions {
            socket: config.socket,
            faults: config.faults,
            capture: config.capture.clone(),
        };
        let device = Device::bind(addr, &options, Peers::Own, salt);
        let device = device.map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => BindError::AddrInUse(addr),
            _ => BindError::Io(addr, error),
        })?;
        let waiting = || -> io::Result<(mio::Poll, Waker)> {
            let poll = mio::Poll::new()?;
            let fd = device.as_raw_fd();
            let mut source = mio::unix::SourceFd(&fd);
            poll.registry()
                .register(&mut source, TOKEN_SOCKET, mio::Interest::READABLE)?;
            let waker = mio::Waker::new(poll.registry(), TOKEN_WAKER)?;
            Ok((poll, Waker(Arc::new(waker))))
        };
        let (poll, waker) = waiting().map_err(|error| BindError::Io(addr, error))?;
        Ok(Endpoint {
            ctx: EndpointCtx::new(device, config, random),
            batch: ReceiveBatch::default(),
            is_drained: false,
            is_busy: false,
            poll,
            occurred: mio::Events::with_capacity(8),
            waker,
        })
    }

    /// Our address and port.
    pub fn local_addr(&self) -> SocketAddr {
        self.ctx.device.local_addr()
    }

    /// A handle that ends a `poll` from another thread.
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// Does what there is to do, and calls `handler` for each event. If there is nothing, waits for
    /// something to happen, for the waker, or for `timeout` (none: for ever). Returns the number of
    /// events handed up, which may be 0.
    ///
    /// # Errors
    /// Those of the socket and of epoll; none is known for a healthy system.
    pub fn poll(
        &mut self,
        timeout: Option<Duration>,
        handler: &mut dyn FnMut(&mut EndpointCtx, Event<'_>),
    ) -> io::Result<usize> {
        let start = Instant::now();
        let mut events = self.turn(handler)?;
        if events == 0 && self.is_busy {
            while events == 0 && start.elapsed() < self.ctx.config.spin {
                std::hint::spin_loop();
                events = self.turn(handler)?;
            }
        }
        let deadline = timeout.and_then(|timeout| start.checked_add(timeout));
        let mut is_woken = false;
        while events == 0 && !is_woken {
            let now = Instant::now();
            let left = deadline.map(|deadline| deadline.saturating_duration_since(now));
            if left.is_some_and(|left| left.is_zero()) {
                break;
            }
            is_woken = self.wait(left)?;
            events = self.turn(handler)?;
        }
        self.is_busy = events > 0;
        Ok(events)
    }

    /// Sends what is queued, also a `close`, without handing anything up: for a caller that will not
    /// poll soon.
    pub fn flush(&mut self) {
        let now = self.ctx.device.now();
        self.ctx.pump();
        self.ctx.handshakes.transmit(&mut self.ctx.device);
        self.ctx.device.transmit(now);
    }

    /// Sleeps until the socket, the waker, a timer or `left`; returns whether it was the waker.
    fn wait(&mut self, left: Option<Duration>) -> io::Result<bool> {
        let timeout = if self.is_drained && !self.ctx.device.has_output() {
            let due = self.ctx.next_timeout();
            let now = self.ctx.device.now();
            let due = due.map(|due| Duration::from_nanos(due.since(now).0));
            [left, due].into_iter().flatten().min()
        } else {
            Some(Duration::ZERO)
        };
        match self.poll.poll(&mut self.occurred, timeout) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        Ok(self
            .occurred
            .iter()
            .any(|event| event.token() == TOKEN_WAKER))
    }

    /// One round of work.
    fn turn(&mut self, handler: &mut Handler<'_>) -> io::Result<usize> {
        let Endpoint { ctx, batch, .. } = self;
        let mut events = 0;
        let mut count = |ctx: &mut EndpointCtx, event: Event<'_>| {
            events += 1;
            handler(ctx, event);
        };
        let now = ctx.device.now();
        let filled = ctx.device.receive(batch)?;
        for slot in 0..filled {
            match batch.arrival(slot) {
                Some(arrival) if !arrival.is_truncated => ctx.arrive(now, &arrival, &mut count),
                _ => ctx.device.count_malformed(),
            }
        }
        while let Some(id) = ctx.device.expire(now) {
            ctx.poll_completions(id, None, &mut count);
        }
        ctx.manage(now, &mut count);
        ctx.pump();
        ctx.device.transmit(now);
        self.is_drained = filled < batch.capacity();
        Ok(events)
    }
}

/// The endpoint's own share of [`EndpointCtx`].
impl std::ops::Deref for Endpoint {
    type Target = EndpointCtx;

    fn deref(&self) -> &EndpointCtx {
        &self.ctx
    }
}

impl std::ops::DerefMut for Endpoint {
    fn deref_mut(&mut self) -> &mut EndpointCtx {
        &mut self.ctx
    }
}

impl EndpointCtx {
    fn new(device: Device, config: EndpointConfig, random: RandomState) -> EndpointCtx {
        EndpointCtx {
            handshakes: Handshakes::new(&config, device.local_addr(), random.hash_one(0)),
            device,
            config,
            connections: Vec::new(),
            free: Vec::new(),
            next_serial: 0,
            by_qp: HashMap::new(),
            pool: SlotPool::new(DOMAIN),
            dirty: VecDeque::new(),
            spare: Vec::new(),
            refused: VecDeque::new(),
            next_silence_check: Nanos::ZERO,
            random,
            draws: 0,
        }
    }

    fn draw(&mut self) -> u64 {
        self.draws += 1;
        self.random.hash_one(self.draws)
    }

    // What callers do.

    /// Starts to connect; `Connected` follows when the peer has answered, however long that takes.
    /// `hello` (at most [`HELLO_MAX`] bytes, cut beyond) is handed to the peer.
    ///
    /// Without a free queue pair or connection, `Closed` with `Refused` follows.
    pub fn connect(&mut self, peer: SocketAddr, hello: &[u8]) -> ConnId {
        let hello = hello[..hello.len().min(HELLO_MAX)].to_vec();
        match self.open(peer, hello) {
            Some(index) => {
                self.request(index);
                self.connections[index as usize]
                    .as_ref()
                    .expect("just opened")
                    .id
            }
            None => {
                let id = self.next_id(INDEX_NONE);
                self.refused.push_back(id);
                id
            }
        }
    }

    /// Queues a message, the concatenation of `parts`; it is copied once, into registered memory.
    /// It leaves in the next `poll`, when the peer's credits and budget allow.
    ///
    /// # Errors
    /// [`SendError`]; the message was not taken.
    pub fn send(&mut self, conn: ConnId, parts: &[IoSlice<'_>]) -> Result<(), SendError> {
        let len = parts.iter().map(|part| part.len()).sum::<usize>();
        if len > self.config.limits.message_max {
            return Err(SendError::TooLarge);
        }
        let index = self.index(conn).ok_or(SendError::Closed)?;
        let connection = self.connections[index as usize]
            .as_mut()
            .ok_or(SendError::Closed)?;
        let Some(stream) = &mut connection.stream else {
            return Err(SendError::WouldBlock);
        };
        let memory = &mut self.device.memory;
        if stream
            .outbox
            .push(&mut self.pool, memory, parts, len)
            .is_err()
        {
            connection.wants_writable = true;
            return Err(SendError::WouldBlock);
        }
        self.device.counters_mut().copies += 1;
        self.mark_dirty(index);
        Ok(())
    }

    /// Ends a connection: the peer gets a DREQ. What is queued and not yet acknowledged may be
    /// lost. No event of this connection follows. Closing twice does no harm.
    pub fn close(&mut self, conn: ConnId) {
        if let Some(index) = self.index(conn) {
            let now = self.device.now();
            self.handshakes.disconnect(now, index);
            self.remove(index);
        }
    }

    /// Whether something sent on the connection has not been acknowledged: closing it now would lose
    /// that. What is acknowledged has reached the peer's endpoint, in the `poll` of which it is
    /// handed up.
    pub fn is_sending(&self, conn: ConnId) -> bool {
        let connection = self
            .index(conn)
            .and_then(|index| self.connections[index as usize].as_ref());
        connection
            .and_then(|connection| connection.stream.as_ref())
            .is_some_and(|stream| stream.outbox.is_waiting() || stream.outbox.posted() > 0)
    }

    /// Cuts a peer off, both ways, or lets it through again: an injected partition.
    pub fn set_blocked(&mut self, peer: SocketAddr, is_blocked: bool) {
        self.device.set_blocked(peer, is_blocked);
    }

    /// What has been seen so far.
    pub fn counters(&self) -> Counters {
        self.device.counters()
    }

    /// Connections that are not closed, also those still being made.
    pub fn connections(&self) -> usize {
        self.connections.len() - self.free.len()
    }

    // The table.

    fn next_id(&mut self, index: u32) -> ConnId {
        self.next_serial += 1;
        ConnId(self.next_serial << 24 | u64::from(index))
    }

    fn index(&self, conn: ConnId) -> Option<u32> {
        let index = (conn.0 & 0xFF_FFFF) as usize;
        let connection = self.connections.get(index)?.as_ref()?;
        (connection.id == conn).then_some(index as u32)
    }

    /// A new connection with a queue pair in INIT and its receives posted.
    fn open(&mut self, peer: SocketAddr, hello: Vec<u8>) -> Option<u32> {
        if self.connections() >= self.config.limits.connections_max {
            return None;
        }
        let depth = u32::from(self.config.limits.credits + RESERVE);
        let caps = QpCaps {
            send_wr_max: u32::from(SENDS_MAX + RESERVE),
            recv_wr_max: depth,
        };
        let (qp, qpn) = self.device.create_qp(DOMAIN, caps)?;
        let state = self.device.qp(qp)?;
        let init = InitAttr {
            access: qp::Access::default(),
            pkey: PKEY_DEFAULT,
        };
        state.to_init(init).expect("a new queue pair is in Reset");
        for _ in 0..depth {
            Stream::post_receive(state);
        }
        let index = self.free.pop().unwrap_or_else(|| {
            self.connections.push(None);
            self.connections.len() as u32 - 1
        });
        let psn = Psn::new(self.draw() as u32);
        let id = self.next_id(index);
        let heard = self.device.now();
        self.by_qp.insert(qp, index);
        self.connections[index as usize] = Some(Connection {
            id,
            peer,
            qp,
            qpn,
            psn,
            hello,
            is_incoming: false,
            greeting: None,
            peer_qpn: Qpn::new(0),
            stream: None,
            is_established: false,
            wants_writable: false,
            is_dirty: false,
            heard,
        });
        Some(index)
    }

    fn remove(&mut self, index: u32) {
        let Some(mut connection) = self.connections[index as usize].take() else {
            return;
        };
        self.device.destroy_qp(connection.qp);
        self.by_qp.remove(&connection.qp);
        self.free.push(index);
        if let Some(stream) = &mut connection.stream {
            stream.outbox.clear(&mut self.pool);
        }
    }

    /// Ends a connection and says so.
    fn end(&mut self, index: u32, reason: CloseReason, handler: &mut Handler<'_>) {
        let Some(connection) = &self.connections[index as usize] else {
            return;
        };
        let conn = connection.id;
        // A caller who never got through was never here.
        let is_known = connection.is_established || !connection.is_incoming;
        let now = self.device.now();
        match reason {
            CloseReason::PeerClosed | CloseReason::PeerRestarted | CloseReason::Refused => {
                self.handshakes.forget(index);
            }
            _ => self.handshakes.disconnect(now, index),
        }
        self.remove(index);
        if is_known {
            handler(self, Event::Closed { conn, reason });
        }
    }

    fn mark_dirty(&mut self, index: u32) {
        if let Some(connection) = &mut self.connections[index as usize]
            && !connection.is_dirty
        {
            connection.is_dirty = true;
            self.dirty.push_back(index);
        }
    }

    // Input.

    fn arrive(&mut self, now: Nanos, arrival: &Arrival<'_>, handler: &mut Handler<'_>) {
        let datagrams = arrival.bytes.len().div_ceil(arrival.segment);
        self.device
            .count_receive(arrival.bytes.len(), datagrams as u64, arrival.overflow);
        for datagram in arrival.bytes.chunks(arrival.segment) {
            match self
                .device
                .handle(now, arrival.source, arrival.target, datagram)
            {
                Input::Dropped => {}
                Input::Taken { id, placed } => {
                    let placed = placed.map(|(offset, range)| (offset, &datagram[range]));
                    self.note_heard(id, now);
                    self.poll_completions(id, placed, handler);
                }
                Input::Management(range) => {
                    self.handshakes
                        .handle(now, arrival.source, &datagram[range]);
                    self.manage(now, handler);
                }
                Input::UnknownQueuePair(qpn) => {
                    self.handshakes.complain(now, arrival.source, qpn);
                }
            }
        }
    }

    fn note_heard(&mut self, id: QpId, now: Nanos) {
        if let Some(index) = self.by_qp.get(&id)
            && let Some(connection) = &mut self.connections[*index as usize]
        {
            connection.heard = now;
        }
    }

    /// Takes what a queue pair reports; `placed` is the payload that the packet just handled
    /// brought, and its offset in its parcel.
    fn poll_completions(
        &mut self,
        id: QpId,
        placed: Option<(u64, &[u8])>,
        handler: &mut Handler<'_>,
    ) {
        let Some(&index) = self.by_qp.get(&id) else {
            return;
        };
        let mut is_last = false;
        let mut is_failed = false;
        let mut is_acknowledged = false;
        while let Some(completion) = self.device.poll_completion(id) {
            match (completion.status, completion.kind) {
                (Status::Success, CompletionKind::Recv) => is_last = true,
                (Status::Success, _) => {
                    is_acknowledged = true;
                    if let Some(stream) = self.stream(index) {
                        stream.0.outbox.complete(stream.1);
                    }
                }
                _ => is_failed = true,
            }
        }
        if let Some((offset, payload)) = placed {
            self.take_payload(index, offset, payload, is_last, handler);
        } else if is_last {
            // A SEND without a byte: not even a parcel's header.
            self.end(index, CloseReason::Violation, handler);
        }
        // The handler may have closed the connection, and another may have its place.
        if self.by_qp.get(&id) != Some(&index) {
            return;
        }
        if is_failed {
            self.end(index, CloseReason::Failed, handler);
        } else if is_acknowledged {
            self.mark_dirty(index);
            self.offer_room(index, handler);
        }
    }

    fn stream(&mut self, index: u32) -> Option<(&mut Stream, &mut SlotPool)> {
        let connection = self.connections[index as usize].as_mut()?;
        Some((connection.stream.as_mut()?, &mut self.pool))
    }

    fn offer_room(&mut self, index: u32, handler: &mut Handler<'_>) {
        let Some(connection) = &mut self.connections[index as usize] else {
            return;
        };
        let is_roomy = connection
            .stream
            .as_ref()
            .is_some_and(|s| s.outbox.is_roomy());
        if connection.wants_writable && is_roomy {
            connection.wants_writable = false;
            let conn = connection.id;
            handler(self, Event::Writable { conn });
        }
    }

    fn take_payload(
        &mut self,
        index: u32,
        offset: u64,
        payload: &[u8],
        is_last: bool,
        handler: &mut Handler<'_>,
    ) {
        // The first packet may overtake the RTU: then it is as good as one.
        self.establish(index, handler);
        let message_max = self.config.limits.message_max;
        let Some(connection) = &mut self.connections[index as usize] else {
            return;
        };
        let (conn, qp) = (connection.id, connection.qp);
        let Some(stream) = &mut connection.stream else {
            return;
        };
        let arrived = stream.receive(payload, offset, is_last, message_max, &mut self.spare);
        if is_last {
            if let Some(qp) = self.device.qp(qp) {
                Stream::post_receive(qp);
            }
            self.mark_dirty(index);
        }
        match arrived {
            Ok(Arrived::Nothing) => {}
            Ok(Arrived::Whole(range)) => self.hand_up(conn, &payload[range], handler),
            Ok(Arrived::Records { count, body }) => {
                let mut body = &payload[body];
                for _ in 0..count {
                    let Ok(bytes) = next_record(&mut body) else {
                        break;
                    };
                    if self.index(conn).is_none() {
                        return;
                    }
                    self.hand_up(conn, bytes, handler);
                }
            }
            Ok(Arrived::Assembled(mut bytes)) => {
                self.device.counters_mut().copies += 1;
                self.hand_up(conn, &bytes, handler);
                if self.spare.len() < SPARE_MAX {
                    bytes.clear();
                    self.spare.push(bytes);
                }
            }
            Err(_) => self.end(index, CloseReason::Violation, handler),
        }
    }

    fn hand_up(&mut self, conn: ConnId, bytes: &[u8], handler: &mut Handler<'_>) {
        self.device.counters_mut().messages += 1;
        handler(self, Event::Message { conn, bytes });
    }

    // Output.

    /// Lets every connection post that may have something to post.
    fn pump(&mut self) {
        while let Some(index) = self.dirty.pop_front() {
            let Some(connection) = &mut self.connections[index as usize] else {
                continue;
            };
            connection.is_dirty = false;
            if let Some(stream) = &mut connection.stream {
                stream.pump(&mut self.device, &mut self.pool);
            }
        }
    }
}

/// A closed endpoint says goodbye, once; what is lost, complaints make good.
impl Drop for EndpointCtx {
    fn drop(&mut self) {
        let now = self.device.now();
        for index in 0..self.connections.len() as u32 {
            self.handshakes.disconnect(now, index);
        }
        self.handshakes.transmit(&mut self.device);
        self.device.flush();
    }
}
