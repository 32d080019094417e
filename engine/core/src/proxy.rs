//! A proxy: write-back cache between clients and destinations, and source of operations of its own.
//!
//! Downstream it is a lock server and the tier that executes: a client's part is accepted into the
//! proxy's volatile windows and answered *executed* at once. Upstream it is a source: it merges the
//! windows into the homes some time later, in batches, keeping every operation's tag, epoch and
//! stream position (no nesting, W7), and forwards *committed* notices.
//!
//! It grants a lock only within what it holds from the object's home (the chain of b.1), and yields
//! that only when no client holds it any more and everything stamped under it is committed at the
//! home. It never re-stamps, so a second copy of an operation on another path is harmless.
//!
//! When a client dies the proxy is a second holder of its operations: it answers the fence with
//! what it holds and supplies the parts that the resolver asks for.
//!
//! Deliberately absent: a copy of objects. Clients keep what they wrote until it is everywhere
//! committed, and nobody else may read it before.

mod originate;

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::sync::Arc;
use alloc::vec::Vec;

pub use originate::Originate;

use crate::effect::{Effect, Port};
use crate::ids::{Epoch, Incarnation, Life, NodeId, Time};
use crate::lock::{Holdings, LockServer, Notice};
use crate::member::{Joined, Member};
use crate::message::{
    Envelope, Held, LockRefusal, Message, Parts, Reclaim, Role, StreamBase, StreamState,
};
use crate::op::{Key, Mode, Operation, Range};
use crate::source::{Outbox, WindowCounters};

/// Settings of a proxy.
#[derive(Clone, Debug)]
pub struct ProxyConfig {
    /// Root of the cluster.
    pub root: NodeId,
    /// Where pings go: the root or an aggregator.
    pub parent: NodeId,
    /// Ticks between pings.
    pub ping_interval: u64,
    /// Different for every start of the process.
    pub nonce: u64,
    /// Ticks between merges, unless a lock is asked back or a batch is full.
    pub merge_interval: u64,
    /// Other proxies of the cluster and the homes that parts of own operations reach through them.
    pub via: BTreeMap<NodeId, NodeId>,
}

/// Figures of a proxy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProxyCounters {
    /// Parts accepted from clients.
    pub accepted: u64,
    /// Parts that had been accepted already.
    pub duplicates: u64,
    /// Parts refused because their source is fenced.
    pub refused_fenced: u64,
    /// Parts out of stream order.
    pub refused_order: u64,
    /// Ranges yielded to a home.
    pub yielded: u64,
    /// Operations stamped by this proxy.
    pub stamped: u64,
}

/// A request to the tier above.
#[derive(Clone, Debug)]
enum Asked {
    Lock {
        home: NodeId,
        range: Range,
        mode: Mode,
    },
    Read {
        to: Life,
        request: u64,
        home: NodeId,
        key: Key,
    },
    Scan {
        to: Life,
        request: u64,
        home: NodeId,
        range: Range,
        after: Option<Key>,
        bytes_max: u32,
    },
}

impl Asked {
    fn home(&self) -> NodeId {
        match self {
            Asked::Lock { home, .. } | Asked::Read { home, .. } | Asked::Scan { home, .. } => *home,
        }
    }
}

/// A client's lock request that waits for the proxy's own lock.
#[derive(Clone, Copy, Debug)]
struct WaitingLock {
    holder: Life,
    request: u64,
    home: NodeId,
    range: Range,
    mode: Mode,
}

/// One tier above: a home or another proxy of the cluster.
#[derive(Debug, Default)]
struct Hop {
    connected: bool,
    /// Open was said on this connection; it is said once.
    opening: bool,
    open: bool,
    life: Option<Life>,
}

/// A proxy. See the module's head.
#[derive(Debug)]
pub struct Proxy {
    port: Port,
    member: Member,
    config: ProxyConfig,
    locks: LockServer,
    holdings: Holdings,
    outbox: Outbox,
    hops: BTreeMap<NodeId, Hop>,
    /// Tiers above that the hands were asked to connect.
    dialed: BTreeSet<NodeId>,
    /// Which of the settings' proxies are used: those that live.
    via: BTreeMap<NodeId, NodeId>,
    sessions: BTreeMap<NodeId, Life>,
    /// Sessions asked for before this proxy joined.
    early: BTreeMap<NodeId, Life>,
    waiting: Vec<WaitingLock>,
    asked: BTreeMap<u64, Asked>,
    next_request: u64,
    fenced: BTreeSet<Life>,
    gone: BTreeMap<NodeId, Incarnation>,
    /// Streams whose progress is to be told downstream.
    dirty: BTreeSet<(Life, NodeId)>,
    notices: Vec<Notice>,
    full: BTreeSet<NodeId>,
    next_merge: Time,
    /// Something is to be merged before the interval is over.
    hurry: bool,
    own: originate::Own,
    evicted: bool,
    counters: ProxyCounters,
}

impl Proxy {
    /// A proxy that has not joined yet.
    #[must_use]
    pub fn new(node: NodeId, config: ProxyConfig) -> Proxy {
        let life = Life {
            node,
            incarnation: Incarnation(0),
        };
        let member = Member::new(
            config.root,
            config.parent,
            Role::Proxy,
            config.nonce,
            config.ping_interval,
        );
        Proxy {
            port: Port::new(life, Epoch(0)),
            member,
            config,
            locks: LockServer::default(),
            holdings: Holdings::default(),
            outbox: Outbox::default(),
            hops: BTreeMap::new(),
            dialed: BTreeSet::new(),
            via: BTreeMap::new(),
            sessions: BTreeMap::new(),
            early: BTreeMap::new(),
            waiting: Vec::new(),
            asked: BTreeMap::new(),
            next_request: 1,
            fenced: BTreeSet::new(),
            gone: BTreeMap::new(),
            dirty: BTreeSet::new(),
            notices: Vec::new(),
            full: BTreeSet::new(),
            next_merge: Time(0),
            hurry: false,
            own: originate::Own::new(),
            evicted: false,
            counters: ProxyCounters::default(),
        }
    }

    /// A connection to `peer` is up.
    pub fn handle_connected(&mut self, now: Time, peer: NodeId) {
        let hop = self.hops.entry(peer).or_default();
        hop.connected = true;
        hop.opening = false;
        hop.open = false;
        if peer == self.config.root {
            let bound = self.bound();
            self.member.handle_timeout(now, &mut self.port, bound);
        }
        self.open_hop(peer);
    }

    /// The connection to `peer` broke.
    pub fn handle_disconnected(&mut self, peer: NodeId) {
        if let Some(hop) = self.hops.get_mut(&peer) {
            hop.connected = false;
            hop.opening = false;
            hop.open = false;
        }
        self.early.remove(&peer);
        if let Some(life) = self.sessions.remove(&peer) {
            self.locks.forget_waiting(life, &mut self.notices);
            self.waiting.retain(|w| w.holder != life);
        }
        let (via, own) = (&self.via, self.port.life());
        self.outbox
            .closed(|source, home| Self::hop_of(via, own, source, home) == peer);
    }

    /// A message arrived.
    pub fn handle_message(&mut self, now: Time, envelope: Envelope) {
        if self.evicted || self.port.receive(&envelope).is_err() {
            return;
        }
        let from = envelope.from;
        match envelope.body {
            Message::Joined { .. } | Message::Attached { .. } | Message::Pong { .. } => {
                match self.member.handle(&mut self.port, &envelope.body) {
                    Joined::Entered { .. } => self.entered(),
                    Joined::ViewChanged if self.member.is_evicted(self.port.life()) => {
                        self.evicted = true;
                        self.port.ask(Effect::Evicted);
                        return;
                    }
                    Joined::ViewChanged => self.view_changed(),
                    Joined::Nothing => {}
                }
            }
            Message::Open { known, reclaim } => self.open(from, known, &reclaim),
            Message::Opened { life } => self.hop_opened(life),
            Message::Stream { base } => self.announce(from, base),
            Message::Reint { parts } => self.accept(from, parts),
            Message::Progress { streams, full } => self.progress(from, &streams, &full),
            body @ (Message::Lock { .. }
            | Message::Unlock { .. }
            | Message::Read { .. }
            | Message::Scan { .. }) => self.downstream(from, body),
            body @ (Message::Granted { .. }
            | Message::Refused { .. }
            | Message::Revoke { .. }
            | Message::ReadReply { .. }
            | Message::ScanReply { .. }) => {
                // What a tier says between a connect and its Opened belongs to a session that our
                // Open has already replaced.
                if self.hops.get(&from.node).is_some_and(|h| h.open) {
                    self.upstream(body);
                }
            }
            Message::Pin { round } => self.pin(from, round),
            Message::Pinned { round, at } => self.pinned(from, round, at),
            Message::Unpin { round } => self.unpin(from, round),
            body => self.resolve_message(from, body),
        }
        self.settle(now);
    }

    /// Time passed.
    pub fn handle_timeout(&mut self, now: Time) {
        if self.evicted {
            return;
        }
        let bound = self.bound();
        self.member.handle_timeout(now, &mut self.port, bound);
        self.settle(now);
    }

    /// When [`Proxy::handle_timeout`] wants to run.
    #[must_use]
    pub fn poll_timeout(&self) -> Time {
        if self.member.is_joined() {
            self.member.timeout().min(self.next_merge)
        } else {
            self.member.timeout()
        }
    }

    /// The next effect.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.port.poll()
    }

    /// lb over what this proxy stamped or shares with a coordinating proxy; its clients' own
    /// operations are covered by the clients.
    #[must_use]
    pub fn bound(&self) -> Epoch {
        let shared = self
            .member
            .view()
            .seats
            .iter()
            .filter(|s| s.role == Role::Proxy)
            .filter_map(|s| self.outbox.bound_of(s.life))
            .min();
        [self.own.bound(), shared]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(self.port.epoch())
    }

    /// Identity, epoch and minimum.
    #[must_use]
    pub fn port(&self) -> &Port {
        &self.port
    }

    /// Figures so far.
    #[must_use]
    pub fn counters(&self) -> ProxyCounters {
        self.counters
    }

    /// Figures about windows.
    #[must_use]
    pub fn windows(&self) -> WindowCounters {
        self.outbox.counters()
    }

    /// Bytes of windows held.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.outbox.bytes()
    }

    /// Windows held now.
    #[must_use]
    pub fn windows_held(&self) -> usize {
        self.outbox.windows_held()
    }

    /// The lock table, for invariant checks and status.
    #[must_use]
    pub fn locks(&self) -> &LockServer {
        &self.locks
    }

    /// What clients and homes wait for here, in words; `None` when nothing waits.
    #[must_use]
    pub fn waits_for(&self) -> Option<alloc::string::String> {
        let asked: Vec<_> = self.asked.values().collect();
        let yielding: Vec<_> = self
            .holdings
            .yielding()
            .into_iter()
            .map(|(home, _, range)| {
                let held = self.locks.is_held(home, range, |_, _| false);
                let touched = self.outbox.touched_in(home, &range).next().is_some();
                (home, range, held, touched)
            })
            .collect();
        if asked.is_empty() && yielding.is_empty() && self.waiting.is_empty() {
            return None;
        }
        Some(alloc::format!(
            "clients wait for {:?}; asked {asked:?}; to yield (home, range, held, touched) {yielding:?}",
            self.waiting
        ))
    }

    /// The newest membership view known.
    #[must_use]
    pub fn view(&self) -> &crate::message::View {
        self.member.view()
    }

    /// Pings sent.
    #[must_use]
    pub fn pings(&self) -> u64 {
        self.member.pings()
    }

    /// Lives that were dead before this one began are refused like fenced ones: their fences were
    /// or will be answered without this proxy.
    fn entered(&mut self) {
        for seat in &self.member.view().seats {
            let Life { node, incarnation } = seat.life;
            let dead = Incarnation(incarnation.0 - u64::from(seat.live));
            let gone = self.gone.entry(node).or_default();
            *gone = (*gone).max(dead);
        }
        self.view_changed();
        let connected: Vec<NodeId> = self.hops.keys().copied().collect();
        for hop in connected {
            self.open_hop(hop);
        }
        for (_, from) in core::mem::take(&mut self.early) {
            self.open(from, None, &[]);
        }
    }

    /// New homes are connected; parts of own operations do not wait for a dead proxy.
    fn view_changed(&mut self) {
        let view = self.member.view();
        let live = |node: NodeId| view.seat(node).is_some_and(|s| s.live);
        let via: BTreeMap<NodeId, NodeId> = self
            .config
            .via
            .iter()
            .filter(|(_, proxy)| live(**proxy))
            .map(|(&home, &proxy)| (home, proxy))
            .collect();
        if via != self.via {
            let own = self.port.life();
            let moved = |home: NodeId| via.get(&home) != self.via.get(&home);
            self.outbox
                .closed(|source, home| source == own && moved(home));
            self.own.forget_pins_of(|proxy| !live(proxy));
            self.via = via;
            self.hurry = true;
        }
        let mut hops: Vec<NodeId> = self.config.via.values().copied().collect();
        let homes = view.seats.iter().filter(|s| s.role == Role::Destination);
        hops.extend(homes.map(|s| s.life.node));
        for &hop in &hops {
            if self.dialed.insert(hop) {
                self.port.ask(Effect::Connect(hop));
            }
            self.open_hop(hop);
        }
    }

    fn is_fenced(&self, life: Life) -> bool {
        self.fenced.contains(&life)
            || self
                .gone
                .get(&life.node)
                .is_some_and(|&gone| life.incarnation <= gone)
    }

    /// Where parts of `source` for `home` go next: own operations may go through another proxy of
    /// the cluster, everything else straight home.
    fn hop_of(via: &BTreeMap<NodeId, NodeId>, own: Life, source: Life, home: NodeId) -> NodeId {
        let through = via.get(&home).filter(|_| source == own);
        through.copied().unwrap_or(home)
    }

    fn open_hop(&mut self, hop: NodeId) {
        let role = self.member.view().seat(hop).map(|s| s.role);
        let upstream = role == Some(Role::Destination)
            || (role == Some(Role::Proxy) && self.config.via.values().any(|p| *p == hop));
        let Some(state) = self.hops.get_mut(&hop) else {
            return;
        };
        let idle = state.connected && !state.opening && !state.open;
        if !idle || !upstream || !self.member.is_joined() {
            return;
        }
        state.opening = true;
        let known = state.life;
        self.holdings.forget_revokes(|home| home == hop);
        let reclaim = self.holdings.claims(|home| home == hop);
        self.port.send(hop, Message::Open { known, reclaim });
    }

    fn hop_opened(&mut self, life: Life) {
        let Some(hop) = self.hops.get_mut(&life.node).filter(|h| h.opening) else {
            return;
        };
        hop.life = Some(life);
        hop.opening = false;
        hop.open = true;
        let (via, own) = (&self.via, self.port.life());
        self.outbox
            .closed(|source, home| Self::hop_of(via, own, source, home) == life.node);
        // If it is still full, it says so again.
        if self.full.remove(&life.node) {
            self.tell_full();
        }
        let again: Vec<u64> = self
            .asked
            .iter()
            .filter(|(_, a)| a.home() == life.node)
            .map(|(&request, _)| request)
            .collect();
        for request in again {
            self.send_asked(request);
        }
        Self::repeat_pins(&mut self.port, &mut self.own, life.node);
        self.serve_waiting();
        self.hurry = true;
    }

    /// A client, or a coordinating proxy, opens its session.
    fn open(&mut self, from: Life, known: Option<Life>, reclaim: &[Reclaim]) {
        if !self.member.is_joined() {
            // Said once per connection, so it is kept until there is a life to answer with. Its
            // claims are on an earlier life of this proxy.
            self.early.insert(from.node, from);
            return;
        }
        if self.is_fenced(from) {
            return;
        }
        self.sessions.insert(from.node, from);
        self.waiting.retain(|w| w.holder != from);
        self.own.drop_pins_of(from);
        let own = self.port.life();
        // Claims on an earlier life of this proxy are void: it does not hold those locks.
        let claims = if known == Some(own) { reclaim } else { &[] };
        self.doubt_lost(from, claims);
        self.locks.reclaim(from, claims, &mut self.notices);
        self.port.send(from.node, Message::Opened { life: own });
        // What the tier above wants back is asked for again; the word may have been lost.
        for (home, _, range) in self.holdings.yielding() {
            self.locks.recall(home, range, &mut self.notices);
        }
    }

    /// What `holder` held exclusively and does not yield in order, it may have written under without
    /// its parts passing here: it took another path, or others completed them when it died.
    fn doubt_lost(&mut self, holder: Life, claims: &[Reclaim]) {
        let held = self
            .locks
            .grants()
            .filter(|g| g.2 == holder && g.3 == Mode::Exclusive);
        for (home, space, _, _, lo, hi) in held {
            let range = Range { space, lo, hi };
            if !claims
                .iter()
                .any(|c| c.home == home && c.range.contains(&range))
            {
                self.holdings.doubt(home, &range);
            }
        }
    }

    fn announce(&mut self, from: Life, base: StreamBase) {
        if self.is_fenced(base.source) || self.sessions.get(&from.node) != Some(&from) {
            return;
        }
        self.outbox.open(base.source, base.home, base.base);
        self.dirty.insert((base.source, base.home));
    }

    fn accept(&mut self, from: Life, batch: Vec<Parts>) {
        for Parts { homes, op } in batch {
            let source = op.id.source;
            if self.is_fenced(source) || self.is_fenced(from) {
                self.counters.refused_fenced += homes.len() as u64;
                continue;
            }
            for home in homes {
                self.accept_part(source, home, &op);
            }
        }
    }

    fn accept_part(&mut self, source: Life, home: NodeId, op: &Arc<Operation>) {
        let (Some(last), Some(at)) = (self.outbox.last(source, home), op.at(home)) else {
            self.counters.refused_order += 1;
            return;
        };
        self.dirty.insert((source, home));
        if at <= last {
            self.counters.duplicates += 1;
        } else if at.0 > last.0 + 1 {
            self.counters.refused_order += 1;
        } else {
            for u in op.updates_for(home) {
                self.holdings.occupy(home, &u.key);
            }
            self.outbox.push(home, op.clone());
            self.counters.accepted += 1;
        }
    }

    fn progress(&mut self, from: Life, streams: &[StreamState], full: &[NodeId]) {
        let was_full = self.full.contains(&from.node);
        // A home speaks for itself; what another proxy says of homes is hearsay.
        self.full.remove(&from.node);
        if full.contains(&from.node) {
            self.full.insert(from.node);
        }
        for state in streams {
            // What was listed to the resolver may be asked for, whoever has committed it since.
            let keep = self.is_fenced(state.source);
            if self.outbox.progress(from.node, state, keep) {
                self.dirty.insert((state.source, state.home));
            }
        }
        if was_full != self.full.contains(&from.node) {
            self.tell_full();
            self.serve_waiting();
        }
    }

    fn tell_full(&mut self) {
        let full: Vec<NodeId> = self.full.iter().copied().collect();
        for &client in self.sessions.keys() {
            let streams = Vec::new();
            let full = full.clone();
            self.port.send(client, Message::Progress { streams, full });
        }
    }

    fn downstream(&mut self, from: Life, body: Message) {
        if self.is_fenced(from) || self.sessions.get(&from.node) != Some(&from) {
            return;
        }
        match body {
            Message::Lock {
                request,
                home,
                range,
                mode,
            } => {
                self.waiting.push(WaitingLock {
                    holder: from,
                    request,
                    home,
                    range,
                    mode,
                });
                self.serve_waiting();
            }
            Message::Unlock { home, grant, range } => {
                self.locks
                    .unlock(home, from, grant, range, &mut self.notices);
            }
            Message::Read { request, home, key } => {
                self.ask(Asked::Read {
                    to: from,
                    request,
                    home,
                    key,
                });
            }
            Message::Scan {
                request,
                home,
                range,
                after,
                bytes_max,
            } => {
                self.ask(Asked::Scan {
                    to: from,
                    request,
                    home,
                    range,
                    after,
                    bytes_max,
                });
            }
            _ => {}
        }
    }

    /// Clients' lock requests that the proxy's own locks cover go to the lock server; for the
    /// others the home is asked.
    fn serve_waiting(&mut self) {
        let waiting = core::mem::take(&mut self.waiting);
        for w in waiting {
            if let Some(bound) = self.holdings.bound(w.home, w.range, w.mode) {
                let asker = (w.home, w.holder, w.request);
                self.locks
                    .request(asker, w.range, w.mode, bound, &mut self.notices);
                continue;
            }
            self.waiting.push(w);
            // Own requests wait until there is room; a client's is refused by the home.
            let waits = w.holder == self.port.life() && self.full.contains(&w.home);
            let pending = waits
                || self.asked.values().any(|a| {
                    matches!(a, Asked::Lock { home, range, mode }
                    if *home == w.home && range.contains(&w.range) && *mode >= w.mode)
                });
            if !pending {
                self.ask(Asked::Lock {
                    home: w.home,
                    range: w.range,
                    mode: w.mode,
                });
            }
        }
    }

    fn upstream(&mut self, body: Message) {
        match body {
            Message::Granted {
                request,
                home,
                grant,
                range,
                mode,
                empty,
            } => {
                let asked = self.asked.remove(&request);
                if asked.is_some() {
                    self.holdings.granted(home, grant, range, mode, empty);
                    if empty {
                        // What is on its way was not there when the home looked.
                        for key in self.outbox.touched_in(home, &range) {
                            self.holdings.occupy(home, key);
                        }
                    }
                    self.serve_waiting();
                }
            }
            Message::Refused { request, reason } => self.refused(request, reason),
            Message::Revoke { home, grant, range } => {
                if self.holdings.revoke(home, grant, range) {
                    for (holder, request, range, mode) in self.locks.withdraw(home, range) {
                        self.waiting.push(WaitingLock {
                            holder,
                            request,
                            home,
                            range,
                            mode,
                        });
                    }
                    self.locks.recall(home, range, &mut self.notices);
                    self.serve_waiting();
                } else {
                    self.port.send(home, Message::Unlock { home, grant, range });
                }
            }
            Message::ReadReply { request, value } => {
                if let Some(Asked::Read { to, request, .. }) = self.asked.remove(&request)
                    && self.sessions.get(&to.node) == Some(&to)
                {
                    self.port
                        .send(to.node, Message::ReadReply { request, value });
                }
            }
            Message::ScanReply {
                request,
                entries,
                more,
            } => {
                if let Some(Asked::Scan { to, request, .. }) = self.asked.remove(&request)
                    && self.sessions.get(&to.node) == Some(&to)
                {
                    self.port.send(
                        to.node,
                        Message::ScanReply {
                            request,
                            entries,
                            more,
                        },
                    );
                }
            }
            _ => {}
        }
    }

    fn refused(&mut self, request: u64, reason: LockRefusal) {
        let Some(Asked::Lock { home, range, .. }) = self.asked.remove(&request) else {
            return;
        };
        if reason != LockRefusal::Full {
            return;
        }
        let waiting = core::mem::take(&mut self.waiting);
        for w in waiting {
            let own = w.holder == self.port.life();
            if w.home == home && w.range.overlaps(&range) && !own {
                self.port.send(
                    w.holder.node,
                    Message::Refused {
                        request: w.request,
                        reason,
                    },
                );
            } else {
                self.waiting.push(w);
            }
        }
    }

    fn ask(&mut self, asked: Asked) {
        let request = self.next_request;
        self.next_request += 1;
        self.asked.insert(request, asked);
        self.send_asked(request);
    }

    fn send_asked(&mut self, request: u64) {
        let Some(asked) = self.asked.get(&request).cloned() else {
            return;
        };
        let home = asked.home();
        if !self.hops.get(&home).is_some_and(|h| h.open) {
            return;
        }
        let body = match asked {
            Asked::Lock { range, mode, .. } => Message::Lock {
                request,
                home,
                range,
                mode,
            },
            Asked::Read { key, .. } => Message::Read { request, home, key },
            Asked::Scan {
                range,
                after,
                bytes_max,
                ..
            } => Message::Scan {
                request,
                home,
                range,
                after,
                bytes_max,
            },
        };
        self.port.send(home, body);
    }

    fn settle(&mut self, now: Time) {
        if !self.member.is_joined() {
            return;
        }
        self.originate_settle();
        while !self.notices.is_empty() {
            self.send_notices();
            self.originate_settle();
        }
        self.yield_locks();
        if now >= self.next_merge || self.hurry {
            self.next_merge = now.after(self.config.merge_interval);
            self.hurry = false;
            self.merge();
        }
        self.tell_progress();
        self.outbox.purge(self.port.minimum());
        self.own_purge();
    }

    fn send_notices(&mut self) {
        for notice in core::mem::take(&mut self.notices) {
            match notice {
                Notice::Grant {
                    to,
                    request,
                    home,
                    grant,
                    range,
                    mode,
                } => {
                    if to == self.port.life() {
                        self.own_granted(request, home, grant, range);
                        continue;
                    }
                    if self.sessions.get(&to.node) != Some(&to) {
                        // Not told to the node's next life; the reclaim of this one drops it.
                        continue;
                    }
                    let empty = self.holdings.proves_empty(home, range);
                    self.port.send(
                        to.node,
                        Message::Granted {
                            request,
                            home,
                            grant,
                            range,
                            mode,
                            empty,
                        },
                    );
                }
                Notice::Revoke {
                    to,
                    home,
                    grant,
                    range,
                } if to != self.port.life() => {
                    if self.sessions.get(&to.node) == Some(&to) {
                        self.port
                            .send(to.node, Message::Revoke { home, grant, range });
                    }
                }
                Notice::Revoke { grant, range, .. } => self.own_revoked(grant, &range),
            }
        }
    }

    /// Merges the windows into the homes.
    fn merge(&mut self) {
        let open: Vec<NodeId> = self
            .hops
            .iter()
            .filter(|(_, h)| h.open)
            .map(|(&node, _)| node)
            .collect();
        let (via, own) = (&self.via, self.port.life());
        for hop in open {
            self.outbox.flush(&mut self.port, hop, |source, home| {
                Self::hop_of(via, own, source, home) == hop
            });
        }
    }

    fn yield_locks(&mut self) {
        for (home, grant, range) in self.holdings.yielding() {
            // What another grant covers as well, and is not asked back there, may stay held.
            let covered = |part, mode| self.holdings.covers(home, part, mode);
            if self.locks.is_held(home, range, covered) {
                continue;
            }
            if self.outbox.touched_in(home, &range).next().is_some() {
                self.hurry = true;
                continue;
            }
            if !self.hops.get(&home).is_some_and(|h| h.open) {
                continue;
            }
            self.holdings.yielded(home, grant, range);
            self.counters.yielded += 1;
            self.port.send(home, Message::Unlock { home, grant, range });
        }
    }

    fn tell_progress(&mut self) {
        let mut per_client: BTreeMap<NodeId, Vec<StreamState>> = BTreeMap::new();
        for (source, home) in core::mem::take(&mut self.dirty) {
            if self.sessions.get(&source.node) != Some(&source) {
                continue;
            }
            let (Some(state), Some(last)) = (
                self.outbox.state(source, home),
                self.outbox.last(source, home),
            ) else {
                continue;
            };
            per_client
                .entry(source.node)
                .or_default()
                .push(StreamState {
                    executed: last,
                    ..state
                });
        }
        let full: Vec<NodeId> = self.full.iter().copied().collect();
        for (client, streams) in per_client {
            self.port.send(
                client,
                Message::Progress {
                    streams,
                    full: full.clone(),
                },
            );
        }
    }

    fn resolve_message(&mut self, from: Life, body: Message) {
        match body {
            Message::Fence { victim, round } => {
                self.fenced.insert(victim);
                self.locks.forget_waiting(victim, &mut self.notices);
                self.waiting.retain(|w| w.holder != victim);
                self.own.drop_pins_of(victim);
                let held = self.held_of(victim);
                let fenced = Message::Fenced {
                    victim,
                    round,
                    held,
                };
                self.port.send(from.node, fenced);
            }
            Message::Resolve {
                victim,
                round,
                supply,
                ..
            } => {
                let held = self.outbox.held_of(victim);
                for (seq, home) in supply {
                    if let Some(op) = held.iter().find(|op| op.id.seq == seq) {
                        self.port.ask(Effect::Connect(home));
                        self.port.send(home, Message::Complete { op: op.clone() });
                    }
                }
                self.port
                    .send(from.node, Message::Resolved { victim, round });
            }
            Message::Gone { victim } => {
                let gone = self.gone.entry(victim.node).or_default();
                *gone = (*gone).max(victim.incarnation);
                self.fenced
                    .retain(|life| life.node != victim.node || life > &victim);
                self.outbox.forget(victim);
                self.doubt_lost(victim, &[]);
                self.locks.release_life(victim, &mut self.notices);
                self.port.send(from.node, Message::GoneAck { victim });
            }
            _ => {}
        }
    }

    fn held_of(&self, victim: Life) -> Vec<Held> {
        let held = self.outbox.held_of(victim);
        held.iter()
            .map(|op| {
                let has = |home: &NodeId| op.updates_for(*home).next().is_some();
                let homes = op.participants.iter().map(|p| p.node).filter(has);
                Held {
                    seq: op.id.seq,
                    epoch: op.epoch,
                    previous: op.previous,
                    participants: op.participants.clone(),
                    supplies: homes.collect(),
                }
            })
            .collect()
    }
}
