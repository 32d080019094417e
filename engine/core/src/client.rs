//! Where operations are born: a session of an application (O1).
//!
//! Requests form one queue. The head acquires its locks in one global order (pinning what it
//! has), evaluates its checks, is stamped, enters the redo and the streams, and only then may
//! leave: pin, read the epoch, insert, send (E21). Requests behind it prefetch their locks. So
//! operations of one session are stamped in the order of submission, and a lock cycle cannot form.
//!
//! A lock is yielded only when every operation stamped up to the last one under it is everywhere
//! committed: `commit_on_share` exactly as b.9 words it, because this source's earlier operations
//! are all that a later one can depend on. Hence nobody ever reads an unstable write of another
//! source, and UNLOCK never overtakes REINT (T3).
//!
//! Each home is reached through one tier: a proxy while its life stands, the home itself
//! otherwise. When a proxy's life ends, its grants are void; the operations stamped under them are
//! sent again on the new path (stream positions make that harmless), and the root is told once they
//! are everywhere committed (Drained), so that the dead proxy's own locks may go. Reads under way
//! are asked again under new locks. A life that the root called dead is never listened to again,
//! although its process may still run and grant.
//!
//! Deliberately absent: what values mean; blocking calls (the hands match tickets to callers).

mod locks;
mod queue;

use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::effect::{Effect, Port};
use crate::ids::{Epoch, Incarnation, Life, NodeId, Seq, Time, ViewId};
use crate::lock::{Holdings, normalise};
use crate::member::{Intervals, Joined, Member};
use crate::message::{Envelope, Message, Role};
use crate::op::{Key, Mode, Operation, Range, Refusal, Request, Stamp, Want};
use crate::room::{Budget, Ledger, Words};
use crate::session::{Page, Ticket};
use crate::source::{Outbox, Redo, WindowCounters};
use crate::teeth::{Tooth, bites};
use crate::tier::{Query, Requests, Tiers};

use queue::{Checking, For, Item, Queued, validate};

/// Requests behind the head that prefetch their locks.
pub const PREFETCH: usize = 64;
/// Reads and scans under way at one time.
pub const READS_MAX: usize = 256;

/// Settings of a client.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// Root of the cluster.
    pub root: NodeId,
    /// Where pings go: the root or an aggregator.
    pub parent: NodeId,
    /// Ticks between pings.
    pub pings: Intervals,
    /// Different for every start of the process.
    pub nonce: u64,
    /// Homes reached through a proxy; all others are reached directly.
    pub via: BTreeMap<NodeId, NodeId>,
    /// Ticks for which a proxy may be dead before its homes are reached directly.
    pub bypass_after: u64,
    /// Bytes of redo above which everywhere committed operations are let go before m passes them.
    pub redo_bytes: usize,
    /// What may be stamped and not everywhere committed, per home.
    pub budget: Budget,
}

/// Figures of a client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClientCounters {
    /// Operations stamped.
    pub stamped: u64,
    /// Requests refused.
    pub refused: u64,
    /// Locks asked for.
    pub locks_asked: u64,
    /// Ranges yielded.
    pub yielded: u64,
}

/// How homes are reached.
#[derive(Debug)]
struct Routes {
    /// The proxy of a home, as configured; all other homes are reached directly.
    via: BTreeMap<NodeId, NodeId>,
    /// Homes whose proxy is bypassed.
    bypassed: BTreeSet<NodeId>,
}

impl Routes {
    /// The tier through which a home is reached.
    fn through(&self, home: NodeId) -> NodeId {
        let proxy = self.via.get(&home);
        let proxy = proxy.filter(|_| !self.bypassed.contains(&home));
        proxy.copied().unwrap_or(home)
    }

    fn is_proxy(&self, node: NodeId) -> bool {
        self.via.values().any(|proxy| *proxy == node)
    }

    /// Whether any home is reached through a proxy.
    fn is_used(&self, proxy: NodeId) -> bool {
        let mut homes = self.via.keys();
        homes.any(|home| self.through(*home) == proxy)
    }

    /// Reaches a proxy's homes directly from now on; returns which they are.
    fn bypass(&mut self, proxy: NodeId) -> Vec<NodeId> {
        let homes = self.via.keys().copied();
        let homes: Vec<NodeId> = homes.filter(|home| self.through(*home) == proxy).collect();
        self.bypassed.extend(&homes);
        homes
    }
}

/// A client. See the module's head.
#[derive(Debug)]
pub struct Client {
    port: Port,
    member: Member,
    config: ClientConfig,
    redo: Redo,
    outbox: Outbox,
    holdings: Holdings,
    routes: Routes,
    tiers: Tiers,
    queue: VecDeque<Queued>,
    checking: Checking,
    asked: Requests<For>,
    /// Locks pinned by the head and by reads under way.
    pins: Vec<(u64, NodeId, Range)>,
    /// Executed outcomes to tell: ticket by seq.
    stamped: VecDeque<(Ticket, Stamp)>,
    /// Ages given so far.
    aged: u64,
    /// Dead proxy lives with the last operation stamped under their grants.
    voided: BTreeMap<Life, Seq>,
    /// Dead proxy lives that the root asked about.
    drains: Vec<Life>,
    /// Highest life of each proxy that the root called dead.
    dead: BTreeMap<NodeId, Incarnation>,
    /// Since when a proxy is not live.
    proxy_dead_since: BTreeMap<NodeId, Time>,
    /// What the tiers above said about room at homes.
    words: Words,
    /// What is stamped and not everywhere committed.
    ledger: Ledger,
    /// The view in which this life appeared.
    entered_at: ViewId,
    /// A home refused this life; nothing more is asked for, the eviction will be heard.
    fenced: bool,
    evicted: bool,
    /// Something was submitted since the last look at what can proceed.
    unsettled: bool,
    counters: ClientCounters,
}

impl Client {
    /// A client that has not joined yet.
    #[must_use]
    pub fn new(node: NodeId, config: ClientConfig) -> Client {
        let life = Life {
            node,
            incarnation: Incarnation(0),
        };
        let member = Member::new(
            config.root,
            config.parent,
            Role::Client,
            config.nonce,
            config.pings,
        );
        let routes = Routes {
            via: config.via.clone(),
            bypassed: BTreeSet::new(),
        };
        Client {
            port: Port::new(life, config.root, Epoch(0)),
            member,
            config,
            redo: Redo::new(),
            outbox: Outbox::default(),
            holdings: Holdings::default(),
            routes,
            tiers: Tiers::default(),
            queue: VecDeque::new(),
            checking: Checking::default(),
            asked: Requests::default(),
            pins: Vec::new(),
            stamped: VecDeque::new(),
            aged: 0,
            voided: BTreeMap::new(),
            drains: Vec::new(),
            dead: BTreeMap::new(),
            proxy_dead_since: BTreeMap::new(),
            words: Words::default(),
            ledger: Ledger::default(),
            entered_at: ViewId(0),
            fenced: false,
            evicted: false,
            unsettled: false,
            counters: ClientCounters::default(),
        }
    }

    /// Queues an operation.
    pub fn submit(&mut self, _now: Time, ticket: Ticket, request: Request) {
        if let Err(refusal) = validate(&request, &self.config.budget) {
            self.refuse(ticket, refusal);
            return;
        }
        let wants = normalise(&request.locks);
        self.enqueue(Queued {
            ticket,
            item: Item::Op(request),
            wants,
            prefetched: false,
            age: None,
        });
    }

    /// Queues a read of one object.
    pub fn read(&mut self, _now: Time, ticket: Ticket, home: NodeId, key: Key) {
        let wants = alloc::vec![Want {
            home,
            range: key.range(),
            mode: Mode::Shared
        }];
        self.enqueue(Queued {
            ticket,
            item: Item::Read { home, key },
            wants,
            prefetched: false,
            age: None,
        });
    }

    /// Queues a scan.
    pub fn scan(
        &mut self,
        _now: Time,
        ticket: Ticket,
        (home, range): (NodeId, Range),
        after: Option<Key>,
        bytes_max: u32,
    ) {
        let wants = alloc::vec![Want {
            home,
            range,
            mode: Mode::Shared
        }];
        let item = Item::Scan {
            home,
            range,
            after,
            bytes_max,
        };
        self.enqueue(Queued {
            ticket,
            item,
            wants,
            prefetched: false,
            age: None,
        });
    }

    /// Leaves the cluster: the root resolves what is unfinished and releases the locks.
    pub fn part(&mut self) {
        if self.member.is_joined() {
            let life = self.port.life();
            self.port.send(self.config.root, Message::Part { life });
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
        self.path_closed(peer);
    }

    /// A message arrived.
    pub fn handle_message(&mut self, now: Time, envelope: Envelope) {
        if self.evicted || self.port.receive(&envelope).is_err() {
            return;
        }
        let from = envelope.from;
        if self.is_stale(from, &envelope.body) {
            return;
        }
        match envelope.body {
            Message::Joined { .. } | Message::Attached { .. } | Message::Pong { .. } => {
                match self
                    .member
                    .handle(&mut self.port, from.node, &envelope.body)
                {
                    Joined::Entered { .. } => self.entered(now),
                    Joined::ViewChanged => self.view_changed(now),
                    // Only homes are.
                    Joined::Rejected(_) | Joined::Nothing => {}
                }
            }
            Message::Opened { life } => self.hop_opened(life),
            Message::Progress { streams, room } => {
                for state in &streams {
                    self.outbox.progress(from.node, state, false);
                }
                self.words.hear(from.node, &room);
                self.redo.advance(&self.outbox);
                self.ledger.settle(self.redo.done());
            }
            Message::Granted {
                request,
                home,
                grant,
                range,
                mode,
                empty,
            } => {
                if let Some((Query::Lock { .. }, _)) = self.asked.take(request) {
                    self.holdings.granted(home, grant, range, mode, empty);
                    // What is on its way was not there when the home looked.
                    for key in self.redo.touched_in(home, &range) {
                        self.holdings.occupy(home, key);
                    }
                }
            }
            Message::Refused { request, reason } => self.lock_refused(request, reason),
            Message::Revoke {
                home,
                grant,
                range,
                age,
            } => {
                let held = self.holdings.revoke(home, grant, range, age);
                if !held {
                    // Say so again, the word was lost.
                    let unlock = Message::Unlock { home, grant, range };
                    self.port.send(from.node, unlock);
                }
            }
            Message::ReadReply { request, value } => self.read_replied(request, value),
            Message::ScanReply {
                request,
                entries,
                more,
            } => {
                if let Some((_, For::Scan(ticket))) = self.asked.take(request) {
                    self.unpin(ticket.0);
                    let result = Ok(Page { entries, more });
                    self.port.ask(Effect::Listing { ticket, result });
                }
            }
            Message::Drain { victim } => {
                if !self.drains.contains(&victim) {
                    self.drains.push(victim);
                }
                let dead = self.dead.entry(victim.node).or_default();
                *dead = (*dead).max(victim.incarnation);
                self.void(victim);
            }
            _ => {}
        }
        self.settle();
    }

    /// Time passed.
    pub fn handle_timeout(&mut self, now: Time) {
        if self.evicted {
            return;
        }
        let told = (self.bound(), self.waits().into());
        self.member.handle_timeout(now, &mut self.port, told);
        self.bypass_dead_proxies(now);
        self.settle();
    }

    /// When [`Client::handle_timeout`] wants to run.
    #[must_use]
    pub fn poll_timeout(&self) -> Time {
        let epoch = self.port.epoch();
        self.member
            .timeout(epoch, self.waits().into(), || self.bound())
    }

    /// The next effect.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        // Here, so that what was submitted together leaves together.
        if core::mem::take(&mut self.unsettled) {
            self.settle();
        }
        self.port.poll()
    }

    /// lb: the first operation not everywhere committed, else the epoch itself.
    #[must_use]
    pub fn bound(&self) -> Epoch {
        if bites(Tooth::IdleIsUnbounded) && self.redo.bound().is_none() {
            return Epoch(self.port.epoch().0 + 1000);
        }
        self.redo.bound().unwrap_or(self.port.epoch())
    }

    /// Whether m has not passed everything that was stamped here, or is held for others.
    fn waits(&self) -> bool {
        self.redo.awaits(self.port.minimum()) || self.outbox.windows_held() > 0
    }

    /// Identity, epoch and minimum.
    #[must_use]
    pub fn port(&self) -> &Port {
        &self.port
    }

    /// Whether the client has a life.
    #[must_use]
    pub fn is_joined(&self) -> bool {
        self.member.is_joined()
    }

    /// Bytes of operations held for redo and in the queue's order of magnitude.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.outbox.bytes()
    }

    /// Requests not yet stamped, and operations stamped and not everywhere committed.
    #[must_use]
    pub fn backlog(&self) -> (usize, u64) {
        (self.queue.len(), self.redo.last().0 - self.redo.done().0)
    }

    /// Figures about windows.
    #[must_use]
    pub fn windows(&self) -> WindowCounters {
        self.outbox.counters()
    }

    /// Figures so far.
    #[must_use]
    pub fn counters(&self) -> ClientCounters {
        self.counters
    }

    /// What the head of the queue and the locks that are asked back wait for, in words; `None`
    /// when nothing waits.
    #[must_use]
    pub fn waits_for(&self) -> Option<alloc::string::String> {
        let head = self.queue.front().map(|q| &q.wants);
        let asked: Vec<_> = self.asked.queries().collect();
        let yielding = self.holdings.yielding();
        if head.is_none() && asked.is_empty() && yielding.is_empty() {
            return None;
        }
        Some(alloc::format!(
            "head wants {head:?}; pinned {:?}; asked {asked:?}; to yield {yielding:?}",
            self.pins
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

    /// What is held from the tiers above, for invariant checks.
    #[must_use]
    pub fn holdings(&self) -> &Holdings {
        &self.holdings
    }

    /// Whether every part of an operation can still be sent, for invariant checks (I14).
    #[must_use]
    pub fn holds(&self, op: &Operation) -> bool {
        self.outbox.holds(op)
    }

    /// Operations stamped after `seq` that the redo keeps, for invariant checks.
    pub fn stamped_after(&self, seq: Seq) -> impl Iterator<Item = &Arc<Operation>> {
        self.redo.after(seq)
    }

    fn entered(&mut self, now: Time) {
        self.entered_at = self.member.view_id();
        self.connect();
        self.watch_proxies(now);
        for hop in self.tiers.peers() {
            self.open_hop(hop);
        }
    }

    /// Connects every tier above that is not connected yet; new homes may have joined.
    fn connect(&mut self) {
        for &proxy in self.routes.via.values() {
            self.tiers.dial(&mut self.port, proxy);
        }
        for seat in &self.member.view().seats {
            if seat.role == Role::Destination {
                let hop = self.routes.through(seat.life.node);
                self.tiers.dial(&mut self.port, hop);
            }
        }
    }

    fn view_changed(&mut self, now: Time) {
        if self.member.is_evicted(self.port.life()) {
            self.evicted = true;
            for queued in core::mem::take(&mut self.queue) {
                self.fail(queued.ticket, &queued.item);
            }
            for (ticket, _) in core::mem::take(&mut self.stamped) {
                self.refuse(ticket, Refusal::Evicted);
            }
            self.port.ask(Effect::Evicted);
            return;
        }
        self.connect();
        self.watch_proxies(now);
        self.reopen_proxies();
    }

    fn watch_proxies(&mut self, now: Time) {
        for proxy in self.routes.via.values() {
            let live = self.member.view().seat(*proxy).is_some_and(|s| s.live);
            if live {
                self.proxy_dead_since.remove(proxy);
            } else {
                self.proxy_dead_since.entry(*proxy).or_insert(now);
            }
        }
    }

    fn bypass_dead_proxies(&mut self, now: Time) {
        let after = self.config.bypass_after;
        let dead: Vec<NodeId> = self
            .proxy_dead_since
            .iter()
            .filter(|(_, since)| now.since(**since) > after)
            .map(|(&proxy, _)| proxy)
            .collect();
        for proxy in dead {
            let life = self.tiers.life(proxy);
            // A life that serves and is not in the view yet has only just joined.
            let serves = self.tiers.is_open(proxy) && life.is_some_and(|l| !self.is_dead(l));
            if serves || !self.routes.is_used(proxy) {
                continue;
            }
            if let Some(life) = life {
                self.void(life);
            }
            self.path_closed(proxy);
            for home in self.routes.bypass(proxy) {
                self.tiers.dial(&mut self.port, home);
                self.open_hop(home);
            }
        }
    }

    /// Runs everything that any input may have made possible.
    fn settle(&mut self) {
        if self.evicted || !self.member.is_joined() {
            return;
        }
        self.advance_queue();
        if self.yield_locks() {
            self.advance_queue();
        }
        self.tell_executed();
        self.tell_drained();
        self.release_voided();
        self.flush();
        let pressed = self.outbox.bytes() > self.config.redo_bytes;
        if pressed {
            self.outbox
                .discard_early(self.port.life(), self.redo.done());
        }
        self.outbox.purge(self.port.minimum());
        self.redo.purge(self.port.minimum(), pressed);
    }

    fn flush(&mut self) {
        let (routes, done) = (&self.routes, self.redo.done());
        for hop in self.tiers.sessions() {
            self.outbox.flush(&mut self.port, hop, done, |_, home| {
                routes.through(home) == hop
            });
        }
    }

    fn tell_drained(&mut self) {
        let done = self.redo.done();
        let ready: Vec<Life> = self
            .drains
            .iter()
            .filter(|victim| self.voided.get(victim).is_none_or(|&seq| seq <= done))
            .copied()
            .collect();
        for victim in ready {
            self.drains.retain(|v| *v != victim);
            self.port
                .send(self.config.root, Message::Drained { victim });
        }
    }
}
