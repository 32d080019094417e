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

mod downstream;
mod originate;
mod upstream;

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

pub use originate::Originate;

use crate::effect::{Effect, Port};
use crate::ids::{Epoch, Incarnation, Life, NodeId, Seq, Time, ViewId};
use crate::lock::{Asker, Holdings, LockServer, Notice, Recall};
use crate::member::{Intervals, Joined, Member};
use crate::message::{Envelope, Held, Message, Role};
use crate::op::{Mode, Range};
use crate::room::{Budget, Words};
use crate::source::{Outbox, WindowCounters};
use crate::tier::{Requests, Tiers};

/// Settings of a proxy.
#[derive(Clone, Debug)]
pub struct ProxyConfig {
    /// Root of the cluster.
    pub root: NodeId,
    /// Where pings go: the root or an aggregator.
    pub parent: NodeId,
    /// Ticks between pings.
    pub pings: Intervals,
    /// Different for every start of the process.
    pub nonce: u64,
    /// Ticks between merges, unless a lock is asked back or a batch is full.
    pub merge_interval: u64,
    /// Bytes of windows above which those are let go whose operations, and all that they depend
    /// on, are everywhere committed, although m has not passed them.
    pub window_bytes: usize,
    /// Other proxies of the cluster and the homes that parts of own operations reach through them.
    pub via: BTreeMap<NodeId, NodeId>,
    /// What it may have stamped itself and not everywhere committed, per home.
    pub budget: Budget,
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

/// A client's lock request that waits for the proxy's own lock.
#[derive(Clone, Copy, Debug)]
struct WaitingLock {
    asker: Asker,
    home: NodeId,
    range: Range,
    mode: Mode,
}

impl WaitingLock {
    fn is_in(&self, home: NodeId, space: u64) -> bool {
        self.home == home && self.range.space == space
    }
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
    tiers: Tiers,
    /// Which of the settings' proxies are used: those that live.
    via: BTreeMap<NodeId, NodeId>,
    sessions: BTreeMap<NodeId, Life>,
    /// Sessions asked for before this proxy joined.
    early: BTreeMap<NodeId, Life>,
    waiting: Vec<WaitingLock>,
    /// Requests to the tiers above; reads with the client's life and request.
    asked: Requests<Option<(Life, u64)>>,
    fenced: BTreeSet<Life>,
    /// Per source, the last operation of the prefix that it called everywhere committed.
    done: BTreeMap<Life, Seq>,
    gone: BTreeMap<NodeId, Incarnation>,
    /// Streams whose progress is to be told downstream.
    dirty: BTreeSet<(Life, NodeId)>,
    notices: Vec<Notice>,
    /// What the tiers above said about room at homes.
    words: Words,
    /// The view in which this life appeared.
    entered_at: ViewId,
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
            config.pings,
        );
        Proxy {
            port: Port::new(life, config.root, Epoch(0)),
            member,
            config,
            locks: LockServer::default(),
            holdings: Holdings::default(),
            outbox: Outbox::default(),
            tiers: Tiers::default(),
            via: BTreeMap::new(),
            sessions: BTreeMap::new(),
            early: BTreeMap::new(),
            waiting: Vec::new(),
            asked: Requests::default(),
            fenced: BTreeSet::new(),
            done: BTreeMap::new(),
            gone: BTreeMap::new(),
            dirty: BTreeSet::new(),
            notices: Vec::new(),
            words: Words::default(),
            entered_at: ViewId(0),
            next_merge: Time(0),
            hurry: false,
            own: originate::Own::new(),
            evicted: false,
            counters: ProxyCounters::default(),
        }
    }

    /// A connection to `peer` is up.
    pub fn handle_connected(&mut self, now: Time, peer: NodeId) {
        self.tiers.connected(peer);
        self.member.connected(peer);
        if peer == self.config.root {
            let told = (self.bound(), self.waits().into());
            self.member.handle_timeout(now, &mut self.port, told);
        }
        self.open_hop(peer);
    }

    /// The connection to `peer` broke.
    pub fn handle_disconnected(&mut self, peer: NodeId) {
        self.tiers.disconnected(peer);
        self.early.remove(&peer);
        if let Some(life) = self.sessions.remove(&peer) {
            self.locks.forget_waiting(life, &mut self.notices);
            self.waiting.retain(|w| w.asker.holder != life);
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
                match self
                    .member
                    .handle(&mut self.port, from.node, &envelope.body)
                {
                    Joined::Entered { .. } => self.entered(),
                    Joined::ViewChanged if self.member.is_evicted(self.port.life()) => {
                        self.evicted = true;
                        self.port.ask(Effect::Evicted);
                        return;
                    }
                    Joined::ViewChanged => self.view_changed(),
                    // Only homes are.
                    Joined::Rejected(_) | Joined::Nothing => {}
                }
            }
            Message::Open { known, reclaim } => self.open(from, known, &reclaim),
            Message::Opened { life } => self.hop_opened(life),
            Message::Stream { base } => self.announce(from, base),
            Message::Reint { done, parts } => self.accept(from, done, parts),
            Message::Progress { streams, room } => self.progress(from, &streams, &room),
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
                if self.tiers.is_open(from.node) {
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
        let told = (self.bound(), self.waits().into());
        self.member.handle_timeout(now, &mut self.port, told);
        self.settle(now);
    }

    /// When [`Proxy::handle_timeout`] wants to run.
    #[must_use]
    pub fn poll_timeout(&self) -> Time {
        let epoch = self.port.epoch();
        let waits = self.waits().into();
        let ping = self.member.timeout(epoch, waits, || self.bound());
        // A proxy that holds nothing has nothing to merge; what comes first is merged at once.
        if self.member.is_joined() && self.outbox.bytes() > 0 {
            ping.min(self.next_merge)
        } else {
            ping
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

    /// Whether m has not passed everything that was stamped here, or is held for others.
    fn waits(&self) -> bool {
        self.own.awaits(self.port.minimum()) || self.outbox.windows_held() > 0
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
        let asked: Vec<_> = self.asked.queries().collect();
        let yielding: Vec<_> = self
            .holdings
            .yielding()
            .into_iter()
            .map(|recall| {
                let Recall {
                    home, range, age, ..
                } = recall;
                let held = self.locks.is_used(home, range, age, |_, _| false);
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
        self.entered_at = self.member.view_id();
        for seat in &self.member.view().seats {
            let Life { node, incarnation } = seat.life;
            let dead = Incarnation(incarnation.0 - u64::from(seat.live));
            let gone = self.gone.entry(node).or_default();
            *gone = (*gone).max(dead);
        }
        self.view_changed();
        for hop in self.tiers.peers() {
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
        let homes = self
            .member
            .view()
            .seats
            .iter()
            .filter(|s| s.role == Role::Destination);
        hops.extend(homes.map(|s| s.life.node));
        for &hop in &hops {
            self.tiers.dial(&mut self.port, hop);
            self.open_hop(hop);
        }
        // Own requests may wait for a word about room that came over the new path.
        self.serve_waiting(|_| true);
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
        let pressed = self.outbox.bytes() > self.config.window_bytes;
        if pressed {
            self.outbox.discard_early(self.port.life(), self.own.done());
            for (&source, &done) in &self.done {
                self.outbox.discard_early(source, done);
            }
        }
        self.outbox.purge(self.port.minimum());
        self.own_purge(pressed);
    }

    fn resolve_message(&mut self, from: Life, body: Message) {
        match body {
            Message::Fence { victim, round } => {
                self.fenced.insert(victim);
                self.locks.forget_waiting(victim, &mut self.notices);
                self.waiting.retain(|w| w.asker.holder != victim);
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
                self.done.remove(&victim);
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
