//! The endpoint: a device, its connections, and the wait.
//!
//! Owns: the round of work (`turn`): receive, hand up, expire timers, post, transmit; and the table
//! of connections. What comes in is `input`'s, long messages are `bulk`'s, the way from `connect` or
//! REQ to `Closed` is `life`'s, memory that a device refuses is `shortage`'s.
//!
//! Invariants:
//! * a handler runs with nothing half done: it may send, connect and close, also the connection it
//!   is told about;
//! * `Connected` comes before any other event of a connection, `Closed` after all others.
//!
//! Deliberately absent: the bytes of management datagrams (`handshake`).

mod bulk;
mod input;
mod life;
mod shortage;

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lowtide_transport_proto::qp::QpCaps;
use lowtide_transport_proto::time::Nanos;
use lowtide_transport_proto::wire::{Psn, Qpn};

use self::shortage::{Need, SHORTAGE_MAX, Short};
use super::connection::{RESERVE, SENDS_MAX, Stream};
use super::fabric::Fabric;
use super::fetch::{FetchPool, READS_MAX};
use super::handshake::{Greeting, Handshakes, REQUEST_PAUSE};
use super::loans::LoanPool;
use super::outbox::SlotPool;
use super::parcel::{Lane, MESSAGE_MAX};
use super::{
    BindError, CloseReason, ConnId, Counters, EndpointConfig, Event, HELLO_MAX, SendError, Waker,
};
use crate::device::QpId;
use crate::host::HostBatch;
use crate::memory::Piece;
use crate::udp::ReceiveBatch;

/// Protection domain of our own work requests. What a peer may reach is in one of its connection's.
const DOMAIN: u32 = 0;
/// The index part of an id that never had an entry.
const INDEX_NONE: u32 = 0xFF_FFFF;
/// Credits of a connection of a device of libibverbs, at most.
const CREDITS_OF_DEVICES: u16 = 16;
/// And connections at once: some 1.4 MiB of receives each.
const CONNECTIONS_OF_DEVICES: usize = 256;
const TOKEN_SOCKET: mio::Token = mio::Token(0);
const TOKEN_WAKER: mio::Token = mio::Token(1);

/// See the [module](super).
pub struct Endpoint {
    ctx: EndpointCtx,
    batch: ReceiveBatch,
    host_batch: HostBatch,
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
    device: Fabric,
    handshakes: Handshakes,
    config: EndpointConfig,
    connections: Vec<Option<Connection>>,
    free: Vec<u32>,
    next_serial: u64,
    /// Which connection a queue pair serves.
    by_qp: Vec<Option<u32>>,
    pool: SlotPool,
    lending: LoanPool,
    fetching: FetchPool,
    /// What holds the message being handed up, if it was fetched.
    handing_up: Option<(Arc<[u8]>, usize)>,
    /// Connections that may have something to post.
    dirty: VecDeque<u32>,
    spare: Vec<Vec<u8>>,
    /// Connections that were refused before they had an entry, and when to say so: not at once, lest
    /// who asks again at once is refused for ever in one turn.
    refused: VecDeque<(Nanos, ConnId)>,
    next_silence_check: Nanos,
    /// When refused registrations are tried again, if there are any, and how long at most.
    next_retry: Option<Nanos>,
    shortage_max: Nanos,
    random: RandomState,
    draws: u64,
    is_mixed_told: bool,
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
    /// Length of the message that was not taken for want of room.
    refused: Option<usize>,
    /// Whether an urgent one was not taken.
    is_urgent_refused: bool,
    short: Short,
    is_dirty: bool,
    heard: Nanos,
}

type Handler<'h> = dyn FnMut(&mut EndpointCtx, Event<'_>) + 'h;

impl Endpoint {
    /// Binds the socket. Peers may connect from now on; their REQs are answered while polling.
    ///
    /// # Errors
    /// [`BindError`], with the address and what to do.
    pub fn bind(mut config: EndpointConfig) -> Result<Endpoint, BindError> {
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
        let pools = config.limits.lent_max.min(config.limits.fetched_max);
        if pools < config.limits.message_max {
            return Err(BindError::Config(
                "limits.lent_max and limits.fetched_max must be at least limits.message_max",
            ));
        }
        let addr = config.addr;
        let random = RandomState::new();
        if config.device.is_some() {
            // Each credit is a receive of a whole parcel, which a device keeps in locked memory.
            config.limits.credits = config.limits.credits.min(CREDITS_OF_DEVICES);
            let most = &mut config.limits.connections_max;
            *most = (*most).min(CONNECTIONS_OF_DEVICES);
        }
        let device = Fabric::open(&config)?;
        let waiting = || -> io::Result<(mio::Poll, Waker)> {
            let poll = mio::Poll::new()?;
            for fd in device.fds() {
                let mut source = mio::unix::SourceFd(&fd);
                poll.registry()
                    .register(&mut source, TOKEN_SOCKET, mio::Interest::READABLE)?;
            }
            let waker = mio::Waker::new(poll.registry(), TOKEN_WAKER)?;
            Ok((poll, Waker(Arc::new(waker))))
        };
        let (poll, waker) = waiting().map_err(|error| BindError::Io(addr, error))?;
        Ok(Endpoint {
            ctx: EndpointCtx::new(device, config, random),
            batch: ReceiveBatch::default(),
            host_batch: HostBatch::default(),
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
        let timeout = if self.is_drained && self.ctx.device.may_sleep() {
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
        let Endpoint {
            ctx,
            batch,
            host_batch,
            ..
        } = self;
        let mut events = 0;
        let mut count = |ctx: &mut EndpointCtx, event: Event<'_>| {
            events += 1;
            handler(ctx, event);
        };
        let now = ctx.device.now();
        let mut is_drained = ctx.receive_packets(now, batch, &mut count)?;
        is_drained &= ctx.receive_completions(now, &mut count)?;
        is_drained &= ctx.receive_host(now, host_batch, &mut count);
        while let Some(id) = ctx.device.expire(now) {
            ctx.poll_completions(id, None, &mut count);
        }
        ctx.manage(now, &mut count);
        ctx.offer_room_to_all(&mut count);
        ctx.retry_registrations(now, &mut count);
        ctx.pump();
        ctx.device.transmit(now);
        while let Some(id) = ctx.device.poll_finished() {
            ctx.poll_completions(id, None, &mut count);
        }
        self.is_drained = is_drained;
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
    fn new(device: Fabric, config: EndpointConfig, random: RandomState) -> EndpointCtx {
        EndpointCtx {
            handshakes: Handshakes::new(&config, device.local_addr(), random.hash_one(0)),
            lending: LoanPool::new(&config.limits),
            fetching: FetchPool::new(DOMAIN, &config.limits, device.receive_budget()),
            handing_up: None,
            device,
            config,
            connections: Vec::new(),
            free: Vec::new(),
            next_serial: 0,
            by_qp: Vec::new(),
            pool: SlotPool::new(DOMAIN),
            dirty: VecDeque::new(),
            spare: Vec::new(),
            refused: VecDeque::new(),
            next_silence_check: Nanos::ZERO,
            next_retry: None,
            shortage_max: SHORTAGE_MAX,
            random,
            draws: 0,
            is_mixed_told: false,
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
                self.refuse_later(id);
                id
            }
        }
    }

    /// Queues a message, the concatenation of `parts`; it is copied once, into registered memory.
    /// It leaves in the next `poll`, when the peer's credits and budget allow. A long message that is
    /// in shared memory is better sent by [`send_pieces`](Self::send_pieces).
    ///
    /// # Errors
    /// [`SendError`]; the message was not taken.
    pub fn send(&mut self, conn: ConnId, parts: &[IoSlice<'_>]) -> Result<(), SendError> {
        let len = parts.iter().map(|part| part.len()).sum::<usize>();
        let index = self.admit(conn, len)?;
        if len > MESSAGE_MAX {
            let mut copy = self.lending.buffer();
            copy.reserve(len);
            for part in parts {
                copy.extend_from_slice(part);
            }
            let counters = self.device.counters_mut();
            counters.copies += 1;
            counters.bulk_copied_bytes += len as u64;
            let lent = self.lending.message([Piece::Owned(copy)]);
            return self.lend(index, lent).map_err(|(error, _)| error);
        }
        match self.push(index, Lane::Ordinary, parts, len)? {
            true => Ok(()),
            false => Err(self.refuse(index, len)),
        }
    }

    /// Queues a short message, such as a ping, that overtakes: it leaves before all messages that have
    /// not left, needs none of their credits, and is handed up before those that are being fetched. Ahead
    /// of it are parcels that were posted before, at most as many as the peer grants
    /// ([`Limits::credits`](super::Limits::credits)), and no more than 128. Urgent messages keep
    /// their order; that to others is lost. What is sent with [`send`](Self::send) goes on beside them,
    /// however many there are.
    ///
    /// # Errors
    /// [`SendError`]; the message was not taken. `TooLarge` already from 61,425 bytes on; `WouldBlock` if
    /// some 100 KiB of urgent messages wait.
    pub fn send_urgent(&mut self, conn: ConnId, parts: &[IoSlice<'_>]) -> Result<(), SendError> {
        let len = parts.iter().map(|part| part.len()).sum::<usize>();
        if len > MESSAGE_MAX {
            return Err(SendError::TooLarge);
        }
        let index = self.admit(conn, len)?;
        if self.push(index, Lane::Urgent, parts, len)? {
            return Ok(());
        }
        if let Some(connection) = &mut self.connections[index as usize] {
            connection.is_urgent_refused = true;
        }
        Err(SendError::WouldBlock)
    }

    /// Copies an admitted message into a parcel; whether there was room.
    fn push(
        &mut self,
        index: u32,
        lane: Lane,
        parts: &[IoSlice<'_>],
        len: usize,
    ) -> Result<bool, SendError> {
        let stream = self.connections[index as usize]
            .as_mut()
            .and_then(|connection| connection.stream.as_mut())
            .ok_or(SendError::Closed)?;
        let memory = self.device.memory();
        let pushed = stream.outbox.push(&mut self.pool, memory, lane, parts, len);
        let is_refused = self.pool.take_refused();
        self.note_memory(index, Need::Send, is_refused);
        if pushed.is_err() {
            return Ok(false);
        }
        let counters = self.device.counters_mut();
        counters.copies += 1;
        counters.sent_copied_bytes += len as u64;
        self.mark_dirty(index);
        Ok(true)
    }

    /// Queues a message, the concatenation of `pieces`. softroce copies nothing if it is longer than a
    /// parcel (61,424 bytes): the peer fetches it from the pieces, which are taken out of the list and
    /// kept until it has.
    ///
    /// # Errors
    /// [`SendError`]; the message was not taken, and the pieces are still there.
    pub fn send_pieces(&mut self, conn: ConnId, pieces: &mut Vec<Piece>) -> Result<(), SendError> {
        let len = pieces
            .iter()
            .map(|piece| piece.bytes().len())
            .sum::<usize>();
        if len <= MESSAGE_MAX {
            let parts: Vec<_> = pieces.iter().map(|p| IoSlice::new(p.bytes())).collect();
            return self.send(conn, &parts);
        }
        let index = self.admit(conn, len)?;
        let lent = self.lending.message(pieces.drain(..));
        self.lend(index, lent).map_err(|(error, lent)| {
            pieces.extend(lent.into_pieces());
            error
        })
    }

    /// The memory that holds the message just being handed up, if it was fetched, and where in it the
    /// message begins: at a multiple of 4096 as an address. Who keeps this needs no copy, but keeps up
    /// to twice the message's length.
    pub fn shared_message(&self) -> Option<(&Arc<[u8]>, usize)> {
        self.handing_up.as_ref().map(|(slab, begin)| (slab, *begin))
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

    /// Asks whether the peer's process is still the one that this connection leads to, if nothing is
    /// under way that would ask it anyway: if not, `Closed` follows as soon as its successor hears
    /// of it. No event follows from a peer that is there.
    pub fn probe(&mut self, conn: ConnId) {
        if let Some(index) = self.index(conn)
            && let Some((stream, _)) = self.stream(index)
        {
            stream.probe();
            self.mark_dirty(index);
        }
    }

    /// Whether something sent on the connection has not been acknowledged: closing it now would lose
    /// that. What is acknowledged has reached the peer's endpoint, in a `poll` of which it is
    /// handed up.
    pub fn is_sending(&self, conn: ConnId) -> bool {
        let connection = self
            .index(conn)
            .and_then(|index| self.connections[index as usize].as_ref());
        connection
            .and_then(|connection| connection.stream.as_ref())
            .is_some_and(|stream| !stream.outbox.is_idle() || !stream.loans.is_empty())
    }

    /// Cuts a peer off, both ways, or lets it through again: an injected partition. Of softroce only: the
    /// packets of a device of libibverbs are its own.
    pub fn set_blocked(&mut self, peer: SocketAddr, is_blocked: bool) {
        self.device.set_blocked(peer, is_blocked);
    }

    /// What has been seen so far.
    pub fn counters(&self) -> Counters {
        let mut counters = self.device.counters();
        counters.lent_bytes_peak = self.lending.bytes_peak() as u64;
        counters.fetched_bytes_peak = self.fetching.bytes_peak() as u64;
        counters
    }

    /// Connections whose packets go through shared memory, and those whose packets go by UDP.
    pub fn paths(&self) -> (usize, usize) {
        self.device.paths()
    }

    /// Connections that are not closed, also those still being made.
    pub fn connections(&self) -> usize {
        self.connections.len() - self.free.len()
    }

    /// `Closed` follows for a connection that has no entry.
    fn refuse_later(&mut self, id: ConnId) {
        let due = self.device.now() + REQUEST_PAUSE;
        self.refused.push_back((due, id));
    }

    // The table.

    /// The connection that a queue pair serves.
    fn served_by(&self, id: QpId) -> Option<u32> {
        *self.by_qp.get(id.0 as usize)?
    }

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
            send_wr_max: u32::from(SENDS_MAX + RESERVE) + READS_MAX as u32,
            recv_wr_max: depth,
            shared_receives: false,
        };
        let (qp, qpn) = self.device.create_qp(DOMAIN, caps)?;
        if !(0..depth).all(|_| self.device.post_receive(qp)) {
            self.device.destroy_qp(qp);
            return None;
        }
        let index = self.free.pop().unwrap_or_else(|| {
            self.connections.push(None);
            self.connections.len() as u32 - 1
        });
        let psn = Psn::new(self.draw() as u32);
        let id = self.next_id(index);
        let heard = self.device.now();
        let at = qp.0 as usize;
        self.by_qp.resize(self.by_qp.len().max(at + 1), None);
        self.by_qp[at] = Some(index);
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
            refused: None,
            is_urgent_refused: false,
            short: Short::default(),
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
        self.by_qp[connection.qp.0 as usize] = None;
        self.free.push(index);
        if let Some(stream) = &mut connection.stream {
            stream.outbox.clear(&mut self.pool);
            stream
                .loans
                .end_all(&mut self.lending, self.device.memory());
            stream
                .inbox
                .clear(&mut self.fetching, &mut self.device, index);
            self.lending.refused.retain(|other| *other != index);
            self.lending.note_freed();
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
        if let CloseReason::Violation(_) = reason {
            self.device.counters_mut().violations += 1;
        }
        match reason {
            CloseReason::PeerClosed | CloseReason::PeerRestarted | CloseReason::Refused => {
                self.handshakes.forget(index);
            }
            CloseReason::Failed => {
                // The NAK that says why leaves before the goodbye.
                self.device.transmit(now);
                self.handshakes.disconnect(now, index);
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
                let is_refused = self.pool.take_refused();
                self.note_memory(index, Need::Credit, is_refused);
            }
        }
        self.ask();
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

#[cfg(test)]
mod tests;
