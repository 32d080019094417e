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

use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::effect::{Effect, Port};
use crate::ids::{Epoch, Incarnation, Life, NodeId, Seq, StreamSeq, Time};
use crate::lock::{Holdings, normalise};
use crate::member::{Joined, Member};
use crate::message::{Envelope, Message, Role};
use crate::op::{
    Bytes, Change, Check, Expect, Key, Mode, Operation, Range, Refusal, Request, Stamp,
    UPDATES_MAX, Want,
};
use crate::session::{Page, SessionError, Ticket};
use crate::source::{Outbox, Redo, WindowCounters};

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
    pub ping_interval: u64,
    /// Different for every start of the process.
    pub nonce: u64,
    /// Homes reached through a proxy; all others are reached directly.
    pub via: BTreeMap<NodeId, NodeId>,
    /// Ticks for which a proxy may be dead before its homes are reached directly.
    pub bypass_after: u64,
    /// Bytes of redo above which everywhere committed operations are let go before m passes them.
    pub redo_bytes: usize,
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

#[derive(Debug)]
enum Item {
    Op(Request),
    Read {
        home: NodeId,
        key: Key,
    },
    Scan {
        home: NodeId,
        range: Range,
        after: Option<Key>,
        bytes_max: u32,
    },
}

#[derive(Debug)]
struct Queued {
    ticket: Ticket,
    item: Item,
    wants: Vec<Want>,
    /// Its locks were asked for ahead of its turn. Once only: what others took back since is
    /// needed more by them, and asking again for ever could starve them.
    prefetched: bool,
}

/// What the head of the queue has learned for its checks.
#[derive(Debug, Default)]
struct Checking {
    values: BTreeMap<usize, Option<Bytes>>,
    /// Checks whose object was asked for.
    asked: BTreeSet<usize>,
}

/// A request that the tier above has not answered yet.
#[derive(Debug)]
enum Asked {
    Lock {
        home: NodeId,
        range: Range,
        mode: Mode,
    },
    Read {
        ticket: Ticket,
        home: NodeId,
        key: Key,
    },
    CheckRead {
        check: usize,
        home: NodeId,
        key: Key,
    },
    Scan {
        ticket: Ticket,
        home: NodeId,
        range: Range,
        after: Option<Key>,
        bytes_max: u32,
    },
}

impl Asked {
    fn home(&self) -> NodeId {
        match self {
            Asked::Lock { home, .. }
            | Asked::Read { home, .. }
            | Asked::CheckRead { home, .. }
            | Asked::Scan { home, .. } => *home,
        }
    }
}

/// One tier above: a proxy or a home.
#[derive(Debug, Default)]
struct Hop {
    connected: bool,
    session: HopSession,
    /// Life that gave the grants held through this hop.
    life: Option<Life>,
}

/// Session with a hop on the present connection. One Open is answered by one Opened; saying it
/// twice would make the tier above forget what it granted in between.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum HopSession {
    /// None, or the life that answered is dead.
    #[default]
    Closed,
    /// Open was said.
    Opening,
    /// Opened was heard.
    Open,
}

impl Hop {
    fn is_open(&self) -> bool {
        self.session == HopSession::Open
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
    /// Homes whose proxy is bypassed.
    direct: BTreeMap<NodeId, NodeId>,
    hops: BTreeMap<NodeId, Hop>,
    queue: VecDeque<Queued>,
    checking: Checking,
    asked: BTreeMap<u64, Asked>,
    next_request: u64,
    /// Locks pinned by the head and by reads under way.
    pins: Vec<(u64, NodeId, Range)>,
    /// Executed outcomes to tell: ticket by seq.
    stamped: VecDeque<(Ticket, Stamp)>,
    /// Dead proxy lives with the last operation stamped under their grants.
    voided: BTreeMap<Life, Seq>,
    /// Dead proxy lives that the root asked about.
    drains: Vec<Life>,
    /// Highest life of each proxy that the root called dead.
    dead: BTreeMap<NodeId, Incarnation>,
    /// Since when a proxy is not live.
    proxy_dead_since: BTreeMap<NodeId, Time>,
    /// Tiers above that the hands were asked to connect.
    dialed: BTreeSet<NodeId>,
    /// Homes that have no room for new work.
    full: Vec<NodeId>,
    /// A home refused this life; nothing more is asked for, the eviction will be heard.
    fenced: bool,
    evicted: bool,
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
            config.ping_interval,
        );
        Client {
            port: Port::new(life, Epoch(0)),
            member,
            config,
            redo: Redo::new(),
            outbox: Outbox::default(),
            holdings: Holdings::default(),
            direct: BTreeMap::new(),
            hops: BTreeMap::new(),
            queue: VecDeque::new(),
            checking: Checking::default(),
            asked: BTreeMap::new(),
            next_request: 1,
            pins: Vec::new(),
            stamped: VecDeque::new(),
            voided: BTreeMap::new(),
            drains: Vec::new(),
            dead: BTreeMap::new(),
            proxy_dead_since: BTreeMap::new(),
            dialed: BTreeSet::new(),
            full: Vec::new(),
            fenced: false,
            evicted: false,
            counters: ClientCounters::default(),
        }
    }

    /// Queues an operation.
    pub fn submit(&mut self, now: Time, ticket: Ticket, request: Request) {
        if let Err(refusal) = validate(&request) {
            self.refuse(ticket, refusal);
            return;
        }
        let wants = normalise(&request.locks);
        self.enqueue(
            now,
            Queued {
                ticket,
                item: Item::Op(request),
                wants,
                prefetched: false,
            },
        );
    }

    /// Queues a read of one object.
    pub fn read(&mut self, now: Time, ticket: Ticket, home: NodeId, key: Key) {
        let wants = alloc::vec![Want {
            home,
            range: key.range(),
            mode: Mode::Shared
        }];
        self.enqueue(
            now,
            Queued {
                ticket,
                item: Item::Read { home, key },
                wants,
                prefetched: false,
            },
        );
    }

    /// Queues a scan.
    pub fn scan(
        &mut self,
        now: Time,
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
        self.enqueue(
            now,
            Queued {
                ticket,
                item,
                wants,
                prefetched: false,
            },
        );
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
        let hop = self.hops.entry(peer).or_default();
        hop.connected = true;
        hop.session = HopSession::Closed;
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
            hop.session = HopSession::Closed;
        }
        let routes = self.routes_through(peer);
        self.outbox.closed(|_, home| routes.contains(&home));
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
                match self.member.handle(&mut self.port, &envelope.body) {
                    Joined::Entered { .. } => self.entered(now),
                    Joined::ViewChanged => self.view_changed(now),
                    Joined::Nothing => {}
                }
            }
            Message::Opened { life } => self.hop_opened(life),
            Message::Progress { streams, full } => {
                for state in &streams {
                    self.outbox.progress(from.node, state, false);
                }
                let routed = self.routes_through(from.node);
                self.full.retain(|home| !routed.contains(home));
                // A proxy speaks of all its homes; the word of a home's own route counts.
                self.full
                    .extend(full.iter().filter(|home| routed.contains(home)));
                self.redo.advance(&self.outbox);
            }
            Message::Granted {
                request,
                home,
                grant,
                range,
                mode,
                empty,
            } => {
                if let Some(Asked::Lock { .. }) = self.asked.remove(&request) {
                    self.holdings.granted(home, grant, range, mode, empty);
                    // What is on its way was not there when the home looked.
                    for key in self.redo.touched_in(home, &range) {
                        self.holdings.occupy(home, key);
                    }
                }
            }
            Message::Refused { request, reason } => self.lock_refused(request, reason),
            Message::Revoke { home, grant, range } => {
                let held = self.holdings.revoke(home, grant, range);
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
                if let Some(Asked::Scan { ticket, .. }) = self.asked.remove(&request) {
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
        self.settle(now);
    }

    /// Time passed.
    pub fn handle_timeout(&mut self, now: Time) {
        if self.evicted {
            return;
        }
        let bound = self.bound();
        self.member.handle_timeout(now, &mut self.port, bound);
        self.bypass_dead_proxies(now);
        self.settle(now);
    }

    /// When [`Client::handle_timeout`] wants to run.
    #[must_use]
    pub fn poll_timeout(&self) -> Time {
        self.member.timeout()
    }

    /// The next effect.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.port.poll()
    }

    /// lb: the first operation not everywhere committed, else the epoch itself.
    #[must_use]
    pub fn bound(&self) -> Epoch {
        self.redo.bound().unwrap_or(self.port.epoch())
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
        let asked: Vec<_> = self.asked.values().collect();
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

    /// Operations stamped after `seq` that the redo keeps, for invariant checks.
    pub fn stamped_after(&self, seq: Seq) -> impl Iterator<Item = &Arc<Operation>> {
        self.redo.after(seq)
    }

    fn enqueue(&mut self, now: Time, queued: Queued) {
        if self.evicted {
            self.fail(queued.ticket, &queued.item);
            return;
        }
        self.queue.push_back(queued);
        self.settle(now);
    }

    fn refuse(&mut self, ticket: Ticket, refusal: Refusal) {
        self.counters.refused += 1;
        let result = Err(SessionError::Refused(refusal));
        self.port.ask(Effect::Outcome { ticket, result });
    }

    fn fail(&mut self, ticket: Ticket, item: &Item) {
        let error = SessionError::Refused(Refusal::Evicted);
        self.port.ask(match item {
            Item::Op(_) => Effect::Outcome {
                ticket,
                result: Err(error),
            },
            Item::Read { .. } => Effect::Value {
                ticket,
                result: Err(error),
            },
            Item::Scan { .. } => Effect::Listing {
                ticket,
                result: Err(error),
            },
        });
    }

    fn entered(&mut self, now: Time) {
        self.connect();
        self.watch_proxies(now);
        let connected: Vec<NodeId> = self.hops.keys().copied().collect();
        for hop in connected {
            self.open_hop(hop);
        }
    }

    /// Connects every tier above that is not connected yet; new homes may have joined.
    fn connect(&mut self) {
        let mut hops: Vec<NodeId> = self.config.via.values().copied().collect();
        for seat in &self.member.view().seats {
            if seat.role == Role::Destination {
                hops.push(self.route(seat.life.node));
            }
        }
        for hop in hops {
            if self.dialed.insert(hop) {
                self.port.ask(Effect::Connect(hop));
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
        for proxy in self.config.via.values() {
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
            let homes = self.routes_through(proxy);
            let serves = self
                .hops
                .get(&proxy)
                .is_some_and(|h| h.is_open() && h.life.is_some_and(|l| !self.is_dead(l)));
            // A life that serves and is not in the view yet has only just joined.
            if homes.is_empty() || serves {
                continue;
            }
            if let Some(life) = self.hops.get(&proxy).and_then(|h| h.life) {
                self.void(life);
            }
            self.outbox.closed(|_, home| homes.contains(&home));
            for home in homes {
                self.direct.insert(home, home);
                if self.dialed.insert(home) {
                    self.port.ask(Effect::Connect(home));
                }
                self.open_hop(home);
            }
        }
    }

    /// Runs everything that any input may have made possible.
    fn settle(&mut self, _now: Time) {
        if self.evicted || !self.member.is_joined() {
            return;
        }
        self.advance_queue();
        self.yield_locks();
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
        let open: Vec<NodeId> = self
            .hops
            .iter()
            .filter(|(_, h)| h.is_open())
            .map(|(&node, _)| node)
            .collect();
        for hop in open {
            let homes = self.routes_through(hop);
            self.outbox
                .flush(&mut self.port, hop, |_, home| homes.contains(&home));
        }
    }

    fn tell_executed(&mut self) {
        let executed = self.redo.executed();
        while self
            .stamped
            .front()
            .is_some_and(|(_, s)| s.id.seq <= executed)
        {
            if let Some((ticket, stamp)) = self.stamped.pop_front() {
                self.port.ask(Effect::Outcome {
                    ticket,
                    result: Ok(stamp),
                });
            }
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

    /// O1 for the head of the queue, again and again while it can proceed.
    fn advance_queue(&mut self) {
        while self.advance_head() {}
        let mut ahead: Vec<Want> = Vec::new();
        for queued in self.queue.iter_mut().skip(1).take(PREFETCH) {
            if !core::mem::replace(&mut queued.prefetched, true) {
                ahead.extend(&queued.wants);
            }
        }
        for want in ahead {
            if !self.full.contains(&want.home) {
                self.want(&want);
            }
        }
    }

    /// Returns whether the head left the queue.
    fn advance_head(&mut self) -> bool {
        let Some(head) = self.queue.front() else {
            return false;
        };
        let ticket = head.ticket;
        let wants = head.wants.clone();
        if !self.acquire(ticket, &wants) {
            return false;
        }
        let Some(head) = self.queue.front() else {
            return false;
        };
        match &head.item {
            Item::Op(request) => {
                let full = request.updates.iter().any(|u| self.full.contains(&u.home));
                if full || !self.evaluate_checks() {
                    return false;
                }
                self.stamp_head();
            }
            Item::Read { home, key } => {
                let (home, key) = (*home, key.clone());
                if !self.start_read(ticket, home, key) {
                    return false;
                }
                self.queue.pop_front();
            }
            Item::Scan {
                home,
                range,
                after,
                bytes_max,
            } => {
                let (home, range, bytes_max) = (*home, *range, *bytes_max);
                let after = after.clone();
                if self.redo.last_touching(home, &range).is_some() || self.asked.len() >= READS_MAX
                {
                    return false;
                }
                self.queue.pop_front();
                self.ask(Asked::Scan {
                    ticket,
                    home,
                    range,
                    after,
                    bytes_max,
                });
            }
        }
        true
    }

    /// Evaluates the head's checks; `false` while values are missing or after a refusal (which
    /// removes the head).
    fn evaluate_checks(&mut self) -> bool {
        let Some(Queued {
            ticket,
            item: Item::Op(request),
            ..
        }) = self.queue.front()
        else {
            return false;
        };
        let ticket = *ticket;
        let checks: Vec<Check> = request.checks.clone();
        let mut missing = false;
        for (index, check) in checks.iter().enumerate() {
            let value = match self.checking.values.get(&index) {
                Some(value) => Some(value.clone()),
                None => self.known(check.home, &check.key),
            };
            let Some(value) = value else {
                missing = true;
                let (home, key) = (check.home, check.key.clone());
                // A counter of ours that is on its way is read once it is committed.
                let settled = self.redo.writer_of(home, &key).is_none();
                if settled && self.checking.asked.insert(index) {
                    self.ask(Asked::CheckRead {
                        check: index,
                        home,
                        key,
                    });
                }
                continue;
            };
            let holds = match &check.expect {
                Expect::Absent => value.is_none(),
                Expect::Present => value.is_some(),
                Expect::Value(expected) => value.as_ref() == Some(expected),
            };
            if !holds {
                self.queue.pop_front();
                self.head_left(ticket);
                self.refuse(ticket, Refusal::CheckFailed { check: index });
                self.advance_queue();
                return false;
            }
        }
        !missing
    }

    /// Value of an object as far as it is known here under the lock held on it.
    fn known(&self, home: NodeId, key: &Key) -> Option<Option<Bytes>> {
        if let Some(op) = self.redo.writer_of(home, key) {
            let last = op.updates_for(home).filter(|u| u.key == *key).last()?;
            return match &last.change {
                Change::Put(value) => Some(Some(value.clone())),
                Change::Delete => Some(None),
                Change::Add(_) => None,
            };
        }
        self.holdings
            .proves_empty(home, key.range())
            .then_some(None)
    }

    fn stamp_head(&mut self) {
        let Some(Queued {
            ticket,
            item: Item::Op(request),
            ..
        }) = self.queue.pop_front()
        else {
            return;
        };
        let life = self.port.life();
        let epoch = self.port.epoch();
        for u in &request.updates {
            self.holdings.occupy(u.home, &u.key);
        }
        let op = self.redo.stamp(life, epoch, request.updates);
        for p in &op.participants {
            self.outbox.open(life, p.node, StreamSeq(1));
            self.outbox.push(p.node, op.clone());
        }
        self.counters.stamped += 1;
        self.stamped.push_back((ticket, Stamp { id: op.id, epoch }));
        self.head_left(ticket);
    }

    fn head_left(&mut self, ticket: Ticket) {
        self.unpin(ticket.0);
        self.forget_checks();
    }

    /// Answers that are still on their way belong to another head or to lost locks.
    fn forget_checks(&mut self) {
        self.checking = Checking::default();
        self.asked
            .retain(|_, a| !matches!(a, Asked::CheckRead { .. }));
    }

    /// Answers a read from what is known, or asks the tier above. `false` when it must wait.
    fn start_read(&mut self, ticket: Ticket, home: NodeId, key: Key) -> bool {
        if let Some(value) = self.known(home, &key) {
            self.unpin(ticket.0);
            self.port.ask(Effect::Value {
                ticket,
                result: Ok(value),
            });
            return true;
        }
        if self.redo.writer_of(home, &key).is_some() || self.asked.len() >= READS_MAX {
            return false;
        }
        self.ask(Asked::Read { ticket, home, key });
        true
    }

    fn read_replied(&mut self, request: u64, value: Option<Bytes>) {
        match self.asked.remove(&request) {
            Some(Asked::Read { ticket, .. }) => {
                self.unpin(ticket.0);
                self.port.ask(Effect::Value {
                    ticket,
                    result: Ok(value),
                });
            }
            Some(Asked::CheckRead { check, .. }) => {
                self.checking.values.insert(check, value);
            }
            _ => {}
        }
    }
}

/// Limits and coverage of a request (S1 and S2 rest on it).
fn validate(request: &Request) -> Result<(), Refusal> {
    let covered = |home: NodeId, key: &Key, mode: Mode| {
        request
            .locks
            .iter()
            .any(|w| w.home == home && w.mode >= mode && w.range.holds(key))
    };
    let mut keys: Vec<(NodeId, &Key)> = request.updates.iter().map(|u| (u.home, &u.key)).collect();
    keys.sort_unstable();
    let distinct = keys.windows(2).all(|pair| pair[0] != pair[1]);
    let sized = !request.updates.is_empty() && request.updates.len() <= UPDATES_MAX;
    let updates = request.updates.iter().all(|u| {
        u.key.name.len() <= crate::op::NAME_MAX
            && u.change.weight() <= crate::op::VALUE_MAX
            && (matches!(u.change, Change::Add(_)) || covered(u.home, &u.key, Mode::Exclusive))
    });
    let checks = request
        .checks
        .iter()
        .all(|c| covered(c.home, &c.key, Mode::Shared));
    if distinct && sized && updates && checks {
        Ok(())
    } else {
        Err(Refusal::NotCovered)
    }
}
