//! The engine thread: input, state machine, effects, again.
//!
//! One round: wait for datagrams, a command, something durable, or a timer; hand everything to the
//! state machine; end the batch (log, checkpoint); let the effects out. Effects leave only after
//! the storage was asked whether it is still sound.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use hdrhistogram::Histogram;
use lowtide_engine_core::aggregator::{Aggregator, AggregatorConfig};
use lowtide_engine_core::client::{Client, ClientConfig};
use lowtide_engine_core::destination::DestinationConfig;
use lowtide_engine_core::destination::shard::SHARDS_MAX;
use lowtide_engine_core::effect::{Effect, Refusals};
use lowtide_engine_core::ids::{Life, NodeId, Time};
use lowtide_engine_core::member::Intervals;
use lowtide_engine_core::proxy::{Proxy, ProxyConfig};
use lowtide_engine_core::room::{Budget, HomeRule};
use lowtide_engine_core::root::{Root, RootConfig};
use lowtide_engine_core::session::{SessionError, Ticket};
use lowtide_transport::message::{
    ConnId, Endpoint, EndpointConfig, EndpointCtx, Event, Faults, Limits, Waker,
};

use super::core::Core;
use super::link::Links;
use super::rootfile::RootFile;
use super::{Board, NodeConfig, NodeError, Role, StartError};
use crate::frame;
use crate::server::Server;
use crate::session::{Command, Ledger, Outcome, Shared};
use crate::status::{LatencyUs, Status};

/// How often the status is refreshed while things happen.
const STATUS_EVERY: Duration = Duration::from_millis(20);
/// Longest message: a part with the largest value, and the rest of its operation.
const MESSAGE_MAX: usize = 20 << 20;
/// Least time between two warnings of messages with an incredible epoch.
const WARN_EVERY: Duration = Duration::from_secs(1);
/// Commands taken per round.
const COMMANDS_MAX: usize = 512;

/// Everything the engine thread owns.
pub(super) struct Engine {
    endpoint: Endpoint,
    inner: Inner,
}

struct Inner {
    config: NodeConfig,
    core: Core,
    links: Links,
    commands: Receiver<Command>,
    board: Arc<Mutex<Board>>,
    shared: Arc<Shared>,
    ledger: Ledger,
    outcomes: Vec<(Ticket, Outcome)>,
    latency: Histogram<u64>,
    born: Instant,
    next_status: Instant,
    /// Whether something has happened that the status does not show yet.
    is_status_old: bool,
    frames_dropped: u64,
    /// Refusals that the log has, and when the next may be written.
    refusals_logged: (Refusals, Instant),
    /// Connections whose state changed while the endpoint was in use.
    joined: bool,
    stop: bool,
    failure: Option<NodeError>,
}

impl Engine {
    pub(super) fn new(
        config: NodeConfig,
        commands: Receiver<Command>,
        board: Arc<Mutex<Board>>,
        shared: Arc<Shared>,
    ) -> Result<Engine, StartError> {
        let root = config
            .root()
            .ok_or(StartError::Config("the cluster has no root"))?;
        let nonce = process_nonce();
        let mut endpoint_config = EndpointConfig::new(config.addr, u64::from(config.id.0), nonce);
        endpoint_config.hello = config.id.0.to_le_bytes().to_vec();
        endpoint_config.limits = Limits {
            message_max: MESSAGE_MAX,
            ..Limits::default()
        };
        endpoint_config.faults = Faults {
            seed: config.seed,
            loss_percent: config.loss_percent,
            ..Faults::default()
        };
        endpoint_config.capture = config.capture.clone();
        endpoint_config.same_host = config.same_host;
        endpoint_config.device = config.device.clone();
        let endpoint = Endpoint::bind(endpoint_config)?;
        let core = make_core(&config, root, nonce, endpoint.waker())?;
        let peers = config.peers.iter().map(|p| (p.id, p.addr));
        let links = Links::new(config.id, peers);
        let now = Instant::now();
        let latency = Histogram::new_with_bounds(1, 600_000_000, 2)
            .map_err(|_| StartError::Config("latency histogram"))?;
        let mut engine = Engine {
            endpoint,
            inner: Inner {
                core,
                links,
                commands,
                board,
                shared,
                ledger: Ledger::default(),
                outcomes: Vec::new(),
                latency,
                born: now,
                next_status: now,
                is_status_old: true,
                frames_dropped: 0,
                refusals_logged: (Refusals::default(), now),
                joined: false,
                stop: false,
                failure: None,
                config,
            },
        };
        if root != engine.inner.config.id {
            engine.inner.links.want(&mut engine.endpoint, root);
        }
        if let Some(parent) = engine.inner.config.parent {
            engine.inner.links.want(&mut engine.endpoint, parent);
        }
        Ok(engine)
    }

    pub(super) fn waker(&self) -> Waker {
        self.endpoint.waker()
    }

    pub(super) fn run(mut self) {
        while !self.inner.stop && self.inner.failure.is_none() {
            if let Err(error) = self.round() {
                self.inner.failure = Some(NodeError::Transport(error.to_string()));
            }
        }
        self.inner.leave(&mut self.endpoint);
    }

    fn round(&mut self) -> std::io::Result<()> {
        let Engine { endpoint, inner } = self;
        let timeout = inner.timeout();
        endpoint.poll(timeout, &mut |ctx, event| {
            inner.handle_event(ctx, event);
        })?;
        inner.shared.rearm();
        inner.take_commands(endpoint);
        let now = inner.now();
        inner.core.handle_durability(now);
        if now >= inner.core.poll_timeout() {
            inner.core.handle_timeout(now);
        }
        inner.core.finish_batch(now);
        if let Some(why) = inner.core.failure() {
            inner.failure = Some(NodeError::Storage(why));
            return Ok(());
        }
        inner.let_effects_out(endpoint);
        endpoint.flush();
        inner.settle_sessions();
        inner.refresh_status(endpoint);
        Ok(())
    }
}

impl Inner {
    fn now(&self) -> Time {
        Time(self.born.elapsed().as_millis() as u64)
    }

    /// How long there is nothing to do but what datagrams and the waker bring. A status that shows
    /// everything needs no timer.
    fn timeout(&self) -> Option<Duration> {
        if !self.commands.is_empty() {
            return Some(Duration::ZERO);
        }
        let timer = self.core.poll_timeout().since(self.now()).max(1);
        let status = self.next_status.saturating_duration_since(Instant::now());
        let status = self.is_status_old.then_some(status);
        let status = status.map(|left| left.max(Duration::from_millis(1)));
        status
            .into_iter()
            .chain([Duration::from_millis(timer)])
            .min()
    }

    fn handle_event(&mut self, ctx: &mut EndpointCtx, event: Event<'_>) {
        match event {
            Event::Connected {
                conn,
                node,
                is_incoming,
                ..
            } => {
                let node = NodeId(node as u32);
                if !is_incoming && self.links.peer(conn) != Some(node) {
                    ctx.close(conn);
                    return;
                }
                match self.links.connected(ctx, conn, node, is_incoming) {
                    Some((peer, broke)) => {
                        if broke {
                            self.core.handle_disconnected(peer);
                        }
                        let now = self.now();
                        if !is_incoming {
                            self.core.handle_connected(now, peer);
                        }
                    }
                    None => ctx.close(conn),
                }
            }
            Event::Message { conn, bytes } => self.handle_frame(ctx, conn, bytes),
            Event::Writable { conn } => self.links.writable(ctx, conn),
            Event::Closed { conn, reason } => {
                if let Some(peer) = self.links.closed(ctx, conn) {
                    tracing::debug!(%peer, ?reason, "connection closed");
                    self.core.handle_disconnected(peer);
                }
            }
            _ => {}
        }
    }

    fn handle_frame(&mut self, ctx: &mut EndpointCtx, conn: ConnId, bytes: &[u8]) {
        let own = self.core.port().life();
        let owner = ctx.shared_message();
        match frame::decode(bytes, owner, own) {
            Ok(envelope) if self.links.peer(conn) == Some(envelope.from.node) => {
                if self.links.heard(envelope.from) {
                    let now = self.now();
                    self.core.handle_message(now, envelope);
                    // A durable position is never far behind; effects are let out per round.
                }
            }
            Ok(_) | Err(frame::Drop::Misdirected) => self.frames_dropped += 1,
            Err(why) => {
                self.frames_dropped += 1;
                tracing::warn!(?why, length = bytes.len(), "frame dropped");
                if let Some(peer) = self.links.closed(ctx, conn) {
                    // Whoever sends such frames is not in step; start over from state.
                    ctx.close(conn);
                    self.core.handle_disconnected(peer);
                }
            }
        }
    }

    fn take_commands(&mut self, ctx: &mut EndpointCtx) {
        let now = self.now();
        for _ in 0..COMMANDS_MAX {
            let Ok(command) = self.commands.try_recv() else {
                return;
            };
            match command {
                Command::Block { peer, blocked } => {
                    if let Some(addr) = self.links.addr(peer) {
                        ctx.set_blocked(addr, blocked);
                    }
                }
                Command::DeclareDead { node } => {
                    if let Core::Root(root, _) = &mut self.core {
                        root.declare_dead(now, node);
                    }
                }
                Command::Stop => self.stop = true,
                command => self.session_command(now, command),
            }
        }
    }

    fn session_command(&mut self, now: Time, command: Command) {
        let Core::Client(client) = &mut self.core else {
            if let Command::Submit { ticket, .. }
            | Command::Read { ticket, .. }
            | Command::Scan { ticket, .. }
            | Command::Barrier { ticket } = command
            {
                self.outcomes
                    .push((ticket, Outcome::Stamped(Err(SessionError::Closed))));
            }
            return;
        };
        match command {
            Command::Submit { ticket, request } => {
                self.ledger.submitted(ticket);
                client.submit(now, ticket, request);
            }
            Command::Read { ticket, home, key } => client.read(now, ticket, home, key),
            Command::Scan {
                ticket,
                home,
                range,
                after,
                bytes_max,
            } => {
                client.scan(now, ticket, (home, range), after, bytes_max);
            }
            Command::Barrier { ticket } => self.ledger.barrier(ticket),
            Command::Block { .. } | Command::DeclareDead { .. } | Command::Stop => {}
        }
    }

    fn let_effects_out(&mut self, ctx: &mut EndpointCtx) {
        while let Some(effect) = self.core.poll_effect() {
            match effect {
                Effect::Send { to, envelope } => self.links.send(ctx, to, &envelope),
                Effect::Connect(peer) => self.links.want(ctx, peer),
                Effect::Outcome { ticket, result } => {
                    self.ledger.finished(ticket, &result);
                    self.outcomes.push((ticket, Outcome::Stamped(result)));
                }
                Effect::Value { ticket, result } => {
                    self.outcomes.push((ticket, Outcome::Value(result)));
                }
                Effect::Listing { ticket, result } => {
                    self.outcomes.push((ticket, Outcome::Listing(result)));
                }
                Effect::Persist { version, state } => {
                    if let Core::Root(_, file) = &self.core {
                        file.persist(version, state);
                    }
                }
                Effect::Evicted => self.failure = Some(NodeError::Evicted),
                Effect::Rejected(reason) => self.failure = Some(reason.into()),
            }
        }
    }

    fn settle_sessions(&mut self) {
        if !self.joined && self.core.port().life().incarnation.0 > 0 {
            self.joined = true;
            let life = self.core.port().life();
            tracing::info!(%life, role = self.config.role.name(), "joined");
            self.shared.joined(life);
        }
        self.ledger
            .passed(self.core.minimum().0, &mut self.outcomes);
        self.shared.set_held(self.core.held_bytes());
        let latency = &mut self.latency;
        self.shared.deliver(&mut self.outcomes, &mut |time| {
            latency.saturating_record((time.as_micros() as u64).max(1));
        });
    }

    fn refresh_status(&mut self, ctx: &mut EndpointCtx) {
        let now = Instant::now();
        self.is_status_old = now < self.next_status;
        if self.is_status_old {
            return;
        }
        self.next_status = now + STATUS_EVERY;
        self.drop_replaced_lives(ctx);
        self.log_refusals(now);
        let mut status = Status {
            id: self.config.id.0,
            role: self.config.role.name().to_owned(),
            ..Status::default()
        };
        self.core.describe(self.now(), &mut status);
        let (by_ring, by_udp) = ctx.paths();
        (status.host_connections, status.udp_connections) = (by_ring as u64, by_udp as u64);
        let transport = ctx.counters();
        status.counters.messages_sent = self.links.messages;
        status.counters.message_bytes_sent = self.links.bytes;
        status.counters.sent_bytes_copied = transport.bytes_copied_to_send();
        status.counters.received_bytes_copied = transport.bytes_copied_on_receipt();
        status.counters.frames_dropped = self.frames_dropped;
        let refusals = self.core.port().refusals();
        status.counters.epochs_refused = refusals.here;
        status.counters.epochs_refused_elsewhere = refusals.elsewhere;
        status.counters.datagrams_dropped =
            transport.rx_bad_icrc + transport.rx_odd_identification + transport.rx_malformed;
        status.counters.datagrams_lost = transport.faults_dropped;
        status.counters.datagrams_blocked = transport.faults_blocked;
        status.counters.packets_repeated = transport.retransmitted_pkts;
        let micros = |quantile| self.latency.value_at_quantile(quantile);
        if !self.latency.is_empty() {
            status.latency = LatencyUs {
                p50: micros(0.5),
                p99: micros(0.99),
                p999: micros(0.999),
            };
        }
        self.board
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .status = status;
    }

    /// Warns of messages that were refused for their epoch, at either end, now and then.
    fn log_refusals(&mut self, now: Instant) {
        let port = self.core.port();
        let refusals = port.refusals();
        let (logged, due) = self.refusals_logged;
        if refusals == logged || now < due {
            // What the log lacks is written when it is due.
            self.is_status_old |= refusals != logged;
            return;
        }
        self.refusals_logged = (refusals, now + WARN_EVERY);
        let own = port.epoch();
        if let Some((from, epoch)) = refusals.newest.filter(|_| refusals.here > logged.here) {
            let count = refusals.here - logged.here;
            tracing::warn!(%from, %epoch, %own, count, "message refused: its epoch is not credible");
        }
        let newest = refusals.newest_elsewhere;
        if let Some((by, epoch)) = newest.filter(|_| refusals.elsewhere > logged.elsewhere) {
            let count = refusals.elsewhere - logged.elsewhere;
            tracing::warn!(%by, %epoch, %own, count, "own message refused: its epoch is not credible");
        }
    }

    /// Starts over with peers of which the view, or for the root the term, names a newer life than the
    /// connection's. Below a router nothing is said to the root, so nothing else would tell.
    fn drop_replaced_lives(&mut self, ctx: &mut EndpointCtx) {
        let view = match &self.core {
            Core::Client(c) => c.view(),
            Core::Proxy(c) => c.view(),
            Core::Destination(c) => c.front().view(),
            Core::Root(..) | Core::Aggregator(_) => return,
        };
        let root = self.core.port().root_life();
        let lives = view.seats.iter().map(|seat| seat.life).chain([root]);
        let links = &mut self.links;
        let replaced: Vec<Life> = lives.filter(|life| links.is_replaced(ctx, *life)).collect();
        for life in replaced {
            self.links.reset(ctx, life.node);
            self.core.handle_disconnected(life.node);
        }
    }

    fn leave(mut self, endpoint: &mut Endpoint) {
        if self.failure.is_none() {
            if let Core::Client(client) = &mut self.core {
                client.part();
            }
            let now = self.now();
            self.core.finish_batch(now);
            self.let_effects_out(endpoint);
            // Two short rounds, so that what was said last is acknowledged before the socket goes.
            for _ in 0..2 {
                let _ = endpoint.poll(Some(Duration::from_millis(10)), &mut |_, _| {});
            }
        }
        let Inner {
            core,
            board,
            shared,
            failure,
            ..
        } = self;
        if let Some(error) = &failure {
            tracing::error!(%error, "the node leaves the cluster");
        }
        board.lock().unwrap_or_else(PoisonError::into_inner).failure = failure;
        shared.close();
        core.close();
    }
}

/// Different for every start of a process, and larger than in any earlier one on this machine:
/// nanoseconds since 1970.
pub(crate) fn process_nonce() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| d.as_nanos() as u64)
}

fn make_core(
    config: &NodeConfig,
    root: NodeId,
    nonce: u64,
    waker: Waker,
) -> Result<Core, StartError> {
    let parent = config.parent.unwrap_or(root);
    let ping = config.ping_interval_ms.max(1);
    let pings = Intervals {
        ping,
        rest: config.rest_interval_ms.max(ping),
    };
    let dir = || {
        config
            .dir
            .clone()
            .ok_or(StartError::Config("a persistent role needs a directory"))
    };
    let via = config.via.iter().copied().collect();
    let budget = Budget::default();
    let wake = {
        let waker = waker.clone();
        move || {
            // The endpoint outlives these threads; a failed wake costs one status interval.
            let _ = waker.wake();
        }
    };
    Ok(match config.role {
        Role::Root => {
            let (file, state) = RootFile::open(dir()?, wake)?;
            let settings = RootConfig {
                interval: ping,
                evict_after: config.evict_after_ms,
                retry_after: 200,
            };
            let root = Root::new(config.id, settings, state, Time(0));
            Core::Root(Box::new(root), file)
        }
        Role::Meta | Role::Object => {
            let carry_bytes = config.carry_bytes;
            let settings = DestinationConfig {
                root,
                parent,
                pings,
                nonce,
                carry_bytes,
                room: HomeRule::default(),
            };
            if !(1..=SHARDS_MAX).contains(&config.shards) {
                return Err(StartError::Config("a server has 1 to 64 shards"));
            }
            let (id, shards) = (config.id, config.shards);
            let server = match &config.volume {
                Some(volume) => Server::open_on(id, settings, volume.clone(), shards, wake)?,
                None => {
                    let place = (&*dir()?, config.power_fail);
                    Server::open(id, settings, place, shards, wake)?
                }
            };
            Core::Destination(Box::new(server))
        }
        Role::Proxy => {
            let settings = ProxyConfig {
                root,
                parent,
                pings,
                nonce,
                merge_interval: 2,
                window_bytes: 64 << 20,
                via,
                budget,
            };
            Core::Proxy(Box::new(Proxy::new(config.id, settings)))
        }
        Role::Client => {
            let settings = ClientConfig {
                root,
                parent,
                pings,
                nonce,
                via,
                bypass_after: 3_000,
                redo_bytes: 16 << 20,
                budget,
            };
            Core::Client(Box::new(Client::new(config.id, settings)))
        }
        Role::Router => {
            let settings = AggregatorConfig {
                root,
                pings,
                nonce,
                silent_after: 1_000,
            };
            Core::Aggregator(Box::new(Aggregator::new(config.id, settings)))
        }
    })
}
