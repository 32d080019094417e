//! A persistent destination: executes updates (O2), keeps undo, grants locks at the objects' home.
//!
//! Flow of one part: `Reint` arrives in stream order → executed in volatile state and appended to
//! the log with its undo image → *executed* travels back (cumulative per stream) → the hands make
//! the log durable and call [`Destination::handle_durable`] → *committed* travels back → m passes
//! the epoch, m is made durable here (b.6) → the undo record may go.
//!
//! Stages after a restart: `Reconnect` until every life that may hold locks here has opened its
//! session again or is GONE, then `Serving`. Stamped parts, fences and resolutions are processed in
//! every stage; only new locks wait.
//!
//! Invariants kept here: I4 (asserted at every locked write), I5 (stream positions), I6 (fences),
//! I7, I13, I25, I27. The WAL rule I8 is the storage's.
//!
//! Deliberately absent: what an update means, and any wait for another node.

mod recover;
mod resolve;

use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::vec::Vec;

pub use recover::{Image, RecoverError};

use crate::effect::{Effect, Port};
use crate::ids::{Epoch, Incarnation, Life, Lsn, NodeId, Seq, StreamSeq, Time, Version};
use crate::lock::{LockServer, Notice};
use crate::member::{Joined, Member};
use crate::message::{
    Envelope, LockRefusal, Message, Parts, Reclaim, Role, StreamBase, StreamState,
};
use crate::op::{Bytes, Change, Mode, Operation, Range, Update};
use crate::record::{OpRecord, Record, Recorded, Storage, Stored, Value, Write};
use crate::teeth::{Tooth, bites};

/// Values at least this long are placed out of line and their record points to them, in bytes.
pub const BULK_BYTES: usize = 64 << 10;
/// How far ahead of the epoch the durable ceiling is kept.
pub const CEILING_STEP: u64 = 1000;

/// Settings of a destination.
#[derive(Clone, Copy, Debug)]
pub struct DestinationConfig {
    /// Root of the cluster.
    pub root: NodeId,
    /// Where pings go: the root or an aggregator.
    pub parent: NodeId,
    /// Ticks between pings.
    pub ping_interval: u64,
    /// Different for every start of the process.
    pub nonce: u64,
    /// Most bytes of other participants' updates in one record.
    pub carry_bytes: usize,
}

/// Where a destination stands after a start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Waiting for lives that may hold locks here.
    Reconnect,
    /// Everything is served.
    Serving,
}

/// Figures of a destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DestinationCounters {
    /// Operations executed (undo records appended).
    pub executed: u64,
    /// Undo records let go.
    pub purged: u64,
    /// Operations undone.
    pub undone: u64,
    /// Operations executed inside a resolution.
    pub completed: u64,
    /// Parts that had executed already.
    pub duplicates: u64,
    /// Parts refused because their source or sender is fenced.
    pub refused_fenced: u64,
    /// Parts out of stream order, or of a stream that was not announced.
    pub refused_order: u64,
    /// Claims that conflicted after a restart; not 0 means a bug.
    pub claims_refused: u64,
}

/// An executed operation whose undo record is kept.
#[derive(Clone, Copy, Debug)]
struct Entry {
    at: StreamSeq,
    seq: Seq,
    epoch: Epoch,
    lsn: Lsn,
}

/// One source life as this home knows it.
#[derive(Debug, Default)]
struct Source {
    fenced: bool,
    gone: bool,
    executed: StreamSeq,
    committed: StreamSeq,
    /// Kept undo records, ascending; the last one is at `executed`.
    index: VecDeque<Entry>,
    /// Sessions that announced the stream and want its progress.
    hops: BTreeSet<NodeId>,
    /// Progress to tell.
    dirty: bool,
}

/// A persistent destination. See the module's head.
#[derive(Debug)]
pub struct Destination {
    port: Port,
    member: Member,
    config: DestinationConfig,
    locks: LockServer,
    sources: BTreeMap<Life, Source>,
    /// Highest life of each node that is GONE.
    gone: BTreeMap<NodeId, Incarnation>,
    /// Lives that may hold locks here, with the position of the row's record.
    rows: BTreeMap<Life, Lsn>,
    /// Rows that opened a session since this start.
    returned: BTreeSet<Life>,
    /// Connected sessions.
    sessions: BTreeMap<NodeId, Life>,
    /// Sessions whose row is not durable yet.
    opening: Vec<Life>,
    /// Sessions asked for before this process joined, with their claims.
    early: BTreeMap<NodeId, (Life, Vec<Reclaim>)>,
    /// Lock requests that wait for the stage to pass.
    deferred: Vec<(Life, Message)>,
    stage: Stage,
    end: Lsn,
    durable: Lsn,
    /// Undo steps that are not durable: position of the step and of the record it used.
    undoing: VecDeque<(Lsn, Lsn)>,
    marks_logged: (Epoch, Epoch),
    marks_pending: VecDeque<(Lsn, Epoch, Epoch)>,
    minimum_durable: Epoch,
    ceiling_durable: Epoch,
    resolutions: resolve::Resolutions,
    notices: Vec<Notice>,
    /// Sessions that were told that there is no room.
    told_full: BTreeSet<NodeId>,
    counters: DestinationCounters,
}

impl Destination {
    /// A destination in `port`'s (yet unjoined) life, with the state that `image` recovered.
    #[must_use]
    pub fn new(node: NodeId, config: DestinationConfig, image: Image) -> Destination {
        let life = Life {
            node,
            incarnation: Incarnation(0),
        };
        let Image {
            sources,
            gone,
            rows,
            minimum,
            ceiling,
            end,
        } = image;
        let stage = if rows.is_empty() {
            Stage::Serving
        } else {
            Stage::Reconnect
        };
        let first = if bites(Tooth::EpochReset) {
            Epoch(0)
        } else {
            ceiling
        };
        Destination {
            port: Port::new(life, first),
            member: Member::new(
                config.root,
                config.parent,
                Role::Destination,
                config.nonce,
                config.ping_interval,
            ),
            config,
            locks: LockServer::default(),
            sources,
            gone,
            rows,
            returned: BTreeSet::new(),
            sessions: BTreeMap::new(),
            opening: Vec::new(),
            early: BTreeMap::new(),
            deferred: Vec::new(),
            stage,
            end,
            durable: end,
            undoing: VecDeque::new(),
            marks_logged: (minimum, ceiling),
            marks_pending: VecDeque::new(),
            minimum_durable: minimum,
            ceiling_durable: ceiling,
            resolutions: resolve::Resolutions::default(),
            notices: Vec::new(),
            told_full: BTreeSet::new(),
            counters: DestinationCounters::default(),
        }
    }

    /// A connection to `peer` is up.
    pub fn handle_connected(&mut self, _peer: NodeId) {}

    /// The connection to `peer` broke.
    pub fn handle_disconnected(&mut self, peer: NodeId) {
        if let Some(life) = self.sessions.remove(&peer) {
            self.locks.forget_waiting(life, &mut self.notices);
            self.deferred.retain(|(asker, _)| *asker != life);
            self.opening.retain(|l| *l != life);
        }
        self.early.remove(&peer);
        for source in self.sources.values_mut() {
            source.hops.remove(&peer);
        }
    }

    /// A message arrived.
    pub fn handle_message<S: Storage>(&mut self, now: Time, envelope: Envelope, storage: &mut S) {
        if self.port.receive(&envelope).is_err() {
            return;
        }
        let from = envelope.from;
        match envelope.body {
            Message::Joined { .. } | Message::Attached { .. } | Message::Pong { .. } => {
                let said = self.member.handle(&mut self.port, &envelope.body);
                if matches!(said, Joined::Entered { .. }) {
                    for (_, (from, reclaim)) in core::mem::take(&mut self.early) {
                        self.open(from, &reclaim, storage);
                    }
                }
            }
            Message::Open { reclaim, .. } => self.open(from, &reclaim, storage),
            Message::Stream { base } => self.announce(from, base, storage),
            Message::Reint { parts, .. } => {
                if self.is_refused(from) {
                    self.counters.refused_fenced += parts.len() as u64;
                } else {
                    for part in parts {
                        self.reintegrate(&part, storage);
                    }
                }
            }
            body @ (Message::Lock { .. } | Message::Unlock { .. }) => {
                self.lock_message(from, body, storage);
            }
            Message::Read { request, key, .. } => {
                let stored = storage.get(&key);
                let value = stored.and_then(|s| storage.fetch(&s.value));
                self.port
                    .send(from.node, Message::ReadReply { request, value });
            }
            Message::Scan {
                request,
                range,
                after,
                bytes_max,
                ..
            } => {
                let page = storage.scan(&range, after.as_ref(), bytes_max as usize);
                let (entries, more) = (page.entries, page.more);
                self.port.send(
                    from.node,
                    Message::ScanReply {
                        request,
                        entries,
                        more,
                    },
                );
            }
            body => self.resolve_message(from, body, storage),
        }
        self.settle(now, storage);
    }

    /// Records up to `durable` are on the medium.
    pub fn handle_durable<S: Storage>(&mut self, now: Time, durable: Lsn, storage: &mut S) {
        self.durable = self.durable.max(durable);
        let durable = self.durable;
        for source in self.sources.values_mut() {
            let Some(first) = source.index.front().map(|e| e.at.0) else {
                continue;
            };
            let before = source.committed;
            while source.committed < source.executed {
                let next = source.committed.0 + 1;
                let entry = next
                    .checked_sub(first)
                    .and_then(|i| source.index.get(i as usize));
                if entry.is_some_and(|e| e.lsn > durable) {
                    break;
                }
                source.committed = StreamSeq(next);
            }
            source.dirty |= source.committed > before;
        }
        while self.undoing.front().is_some_and(|(lsn, _)| *lsn <= durable) {
            self.undoing.pop_front();
        }
        while let Some(&(lsn, minimum, ceiling)) = self.marks_pending.front() {
            if lsn > durable {
                break;
            }
            self.marks_pending.pop_front();
            self.minimum_durable = minimum;
            self.ceiling_durable = ceiling;
            self.purge();
        }
        let opening = core::mem::take(&mut self.opening);
        for life in opening {
            if self.rows.get(&life).is_some_and(|&lsn| lsn > durable) {
                self.opening.push(life);
            } else {
                self.opened(life);
            }
        }
        self.settle(now, storage);
    }

    /// Time passed.
    pub fn handle_timeout<S: Storage>(&mut self, now: Time, storage: &mut S) {
        let bound = self.port.epoch();
        self.member.handle_timeout(now, &mut self.port, bound);
        self.settle(now, storage);
    }

    /// When [`Destination::handle_timeout`] wants to run.
    #[must_use]
    pub fn poll_timeout(&self) -> Time {
        self.member.timeout()
    }

    /// The next effect. Nothing leaves while the epoch exceeds its durable ceiling (trap T2).
    pub fn poll_effect(&mut self) -> Option<Effect> {
        if self.port.epoch() > self.ceiling_durable {
            return None;
        }
        self.port.poll()
    }

    /// Position that the log must keep records from, as far as undo is concerned; `None` when no
    /// undo record is kept. A record is kept until the step that used it is durable.
    #[must_use]
    pub fn undo_floor(&self) -> Option<Lsn> {
        let kept = self.sources.values().filter_map(|s| s.index.front());
        let undoing = self.undoing.iter().map(|&(_, used)| used);
        kept.map(|e| e.lsn).chain(undoing).min()
    }

    /// Figures so far.
    #[must_use]
    pub fn counters(&self) -> DestinationCounters {
        self.counters
    }

    /// Undo records kept now.
    #[must_use]
    pub fn undo_kept(&self) -> usize {
        self.sources.values().map(|s| s.index.len()).sum()
    }

    /// Identity, epoch and minimum.
    #[must_use]
    pub fn port(&self) -> &Port {
        &self.port
    }

    /// Stage, and the lives it waits for.
    #[must_use]
    pub fn stage(&self) -> (Stage, Vec<Life>) {
        let waiting = match self.stage {
            Stage::Serving => Vec::new(),
            Stage::Reconnect => self
                .rows
                .keys()
                .filter(|l| !self.returned.contains(l))
                .copied()
                .collect(),
        };
        (self.stage, waiting)
    }

    /// The lock table, for invariant checks and status.
    #[must_use]
    pub fn locks(&self) -> &LockServer {
        &self.locks
    }

    /// Durable copy of m.
    #[must_use]
    pub fn minimum_durable(&self) -> Epoch {
        self.minimum_durable
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

    fn log<S: Storage>(&mut self, record: &Record, epoch: Epoch, storage: &mut S) -> Lsn {
        self.end = storage.append(record.kind(), epoch, &record.body());
        self.end
    }

    fn is_fenced(&self, life: Life) -> bool {
        self.is_gone(life) || self.sources.get(&life).is_some_and(|s| s.fenced)
    }

    /// Whether nothing is taken from a life any more: it is fenced, or the view says that it is
    /// dead. A home that joined after an eviction was never asked to fence; it has the view.
    fn is_refused(&self, life: Life) -> bool {
        self.is_fenced(life) || self.member.is_evicted(life)
    }

    fn is_gone(&self, life: Life) -> bool {
        self.gone
            .get(&life.node)
            .is_some_and(|&gone| life.incarnation <= gone)
    }

    /// A source opens its session: its grants are made to agree with what it claims. Without a
    /// view nobody is served, because the dead cannot be told from the living.
    fn open<S: Storage>(&mut self, from: Life, reclaim: &[Reclaim], storage: &mut S) {
        if !self.member.is_joined() {
            // Said once per connection, so it is kept.
            self.early.insert(from.node, (from, reclaim.to_vec()));
            return;
        }
        if self.is_refused(from) {
            return;
        }
        self.sessions.insert(from.node, from);
        self.deferred.retain(|(asker, _)| *asker != from);
        let refused = self.locks.reclaim(from, reclaim, &mut self.notices);
        self.counters.claims_refused += refused as u64;
        self.returned.insert(from);
        if !self.rows.contains_key(&from) {
            let lsn = self.log(&Record::Row(from), Epoch(0), storage);
            self.rows.insert(from, lsn);
        }
        if self.rows.get(&from).is_some_and(|&lsn| lsn <= self.durable) {
            self.opened(from);
        } else {
            self.opening.push(from);
        }
    }

    fn opened(&mut self, life: Life) {
        let own = self.port.life();
        self.port.send(life.node, Message::Opened { life: own });
        self.told_full.remove(&life.node);
    }

    fn announce<S: Storage>(&mut self, from: Life, base: StreamBase, storage: &mut S) {
        let refused = self.is_refused(from) || self.is_refused(base.source);
        if base.home != self.port.node() || refused || !self.member.is_joined() {
            return;
        }
        if !self.sources.contains_key(&base.source) && base.base.0 > 1 {
            // Positions below the base were committed and purged in an earlier life of this home.
            self.log(&Record::Base(base), Epoch(0), storage);
        }
        let source = self.sources.entry(base.source).or_insert_with(|| Source {
            executed: base.base.before(),
            committed: base.base.before(),
            ..Source::default()
        });
        source.hops.insert(from.node);
        source.dirty = true;
        if bites(Tooth::PositionForgotten) {
            source.executed = base.base.before();
        }
    }

    /// O2.
    fn reintegrate<S: Storage>(&mut self, parts: &Parts, storage: &mut S) {
        let (own, op) = (self.port.node(), &parts.op);
        let Some(at) = op.at(own).filter(|_| parts.homes.contains(&own)) else {
            self.counters.refused_order += 1;
            return;
        };
        if self.is_refused(op.id.source) {
            self.counters.refused_fenced += 1;
            return;
        }
        let Some(source) = self.sources.get_mut(&op.id.source) else {
            self.counters.refused_order += 1;
            return;
        };
        if bites(Tooth::StampedRefused) && !storage.has_room() {
            return;
        }
        if at <= source.executed {
            self.counters.duplicates += 1;
            source.dirty = true;
        } else if at.0 > source.executed.0 + 1
            || op.epoch < self.port.minimum()
            || op.updates_for(self.port.node()).next().is_none()
        {
            // The second cannot be: m passes an epoch only when its operations are committed. Nor
            // can the third: payloads are kept as long as anybody may need them.
            self.counters.refused_order += 1;
        } else {
            self.execute(op, at, storage);
        }
    }

    fn execute<S: Storage>(&mut self, op: &Operation, at: StreamSeq, storage: &mut S) {
        let own = self.port.node();
        // A message raised the epoch before; a stamp can still not lie ahead of it.
        self.port.raise(op.epoch);
        let writes = op
            .updates_for(own)
            .map(|u| write(u, op.epoch, storage))
            .collect();
        let homes = op.carried(|home| home == own, self.config.carry_bytes);
        let others = op.updates.iter().filter(|u| homes.contains(&u.home));
        let carried = others.cloned().collect();
        let record = Record::Op(OpRecord {
            id: op.id,
            epoch: op.epoch,
            previous: op.previous,
            participants: op.participants.clone(),
            at,
            writes,
            carried,
        });
        let lsn = self.log(&record, op.epoch, storage);
        let source = self.sources.entry(op.id.source).or_default();
        source.index.push_back(Entry {
            at,
            seq: op.id.seq,
            epoch: op.epoch,
            lsn,
        });
        source.executed = at;
        source.dirty = true;
        if bites(Tooth::CommittedEarly) {
            source.committed = at;
        }
        self.counters.executed += 1;
    }

    fn lock_message<S: Storage>(&mut self, from: Life, body: Message, storage: &mut S) {
        if self.is_refused(from) {
            if let Message::Lock { request, .. } = body {
                let reason = LockRefusal::Fenced;
                self.port
                    .send(from.node, Message::Refused { request, reason });
            }
            return;
        }
        if self.sessions.get(&from.node) != Some(&from) {
            return;
        }
        match body {
            // A shared lock brings no work, and what is stored can be read of a full home.
            Message::Lock { request, mode, .. }
                if mode == Mode::Exclusive && !storage.has_room() =>
            {
                let reason = LockRefusal::Full;
                self.port
                    .send(from.node, Message::Refused { request, reason });
            }
            body @ Message::Lock { .. } if self.stage == Stage::Reconnect => {
                self.deferred.push((from, body));
            }
            Message::Lock {
                request,
                home,
                range,
                mode,
            } => {
                let bound = Range::whole(range.space);
                let asker = (home, from, request);
                self.locks
                    .request(asker, range, mode, bound, &mut self.notices);
            }
            Message::Unlock { home, grant, range } => {
                self.locks
                    .unlock(home, from, grant, range, &mut self.notices);
            }
            _ => {}
        }
    }

    /// What follows from any input: stage, lock notices, marks, progress.
    fn settle<S: Storage>(&mut self, _now: Time, storage: &mut S) {
        if self.stage == Stage::Reconnect && self.rows.keys().all(|l| self.returned.contains(l)) {
            self.stage = Stage::Serving;
            for (from, body) in core::mem::take(&mut self.deferred) {
                self.lock_message(from, body, storage);
            }
        }
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
                    if self.sessions.get(&to.node) != Some(&to) {
                        // Not told to the node's next life; the reclaim of this one drops it.
                        continue;
                    }
                    let empty = storage.is_empty(&range);
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
                } => {
                    if self.sessions.get(&to.node) == Some(&to) {
                        self.port
                            .send(to.node, Message::Revoke { home, grant, range });
                    }
                }
            }
        }
        self.log_marks(storage);
        self.resolutions_settle(storage);
        self.tell_progress(storage);
    }

    /// m_D and the ceiling become durable before anything relies on them.
    fn log_marks<S: Storage>(&mut self, storage: &mut S) {
        let (logged_minimum, logged_ceiling) = self.marks_logged;
        let minimum = self.port.minimum().max(logged_minimum);
        let near = self.port.epoch().0 + CEILING_STEP / 2 > logged_ceiling.0;
        if minimum == logged_minimum && !near {
            return;
        }
        let ceiling = if near {
            Epoch(self.port.epoch().0 + CEILING_STEP)
        } else {
            logged_ceiling
        };
        self.marks_logged = (minimum, ceiling);
        let lsn = self.log(&Record::Marks { minimum, ceiling }, Epoch(0), storage);
        self.marks_pending.push_back((lsn, minimum, ceiling));
    }

    /// Undo records below the durable m go (b.6).
    fn purge(&mut self) {
        let minimum = if bites(Tooth::PurgedEarly) {
            self.port.minimum()
        } else {
            self.minimum_durable
        };
        for source in self.sources.values_mut() {
            while source
                .index
                .front()
                .is_some_and(|e| e.epoch < minimum && e.at <= source.committed)
            {
                source.index.pop_front();
                self.counters.purged += 1;
            }
        }
        self.sources.retain(|_, s| !(s.gone && s.index.is_empty()));
    }

    fn tell_progress<S: Storage>(&mut self, storage: &mut S) {
        let home = self.port.node();
        let mut per_hop: BTreeMap<NodeId, Vec<StreamState>> = BTreeMap::new();
        for (&life, s) in &mut self.sources {
            if !core::mem::take(&mut s.dirty) {
                continue;
            }
            let state = StreamState {
                source: life,
                home,
                executed: s.executed,
                committed: s.committed,
            };
            for &hop in &s.hops {
                per_hop.entry(hop).or_default().push(state);
            }
        }
        let full = !storage.has_room();
        if full {
            for &node in self.sessions.keys() {
                if self.told_full.insert(node) {
                    per_hop.entry(node).or_default();
                }
            }
        } else {
            for node in core::mem::take(&mut self.told_full) {
                per_hop.entry(node).or_default();
            }
        }
        for (hop, streams) in per_hop {
            let full = if full { alloc::vec![home] } else { Vec::new() };
            self.port.send(hop, Message::Progress { streams, full });
        }
    }
}

/// Executes one update in volatile state and returns what the record keeps of it.
fn write<S: Storage>(update: &Update, epoch: Epoch, storage: &mut S) -> Write {
    let before = storage.get(&update.key);
    let version = Version(before.as_ref().map_or(0, |s| s.version.0) + 1);
    let (change, after, before) = match &update.change {
        Change::Put(bytes) => {
            check_order(before.as_ref(), epoch);
            let value = if bytes.len() >= BULK_BYTES {
                Value::Extent(storage.place(bytes))
            } else {
                Value::Inline(bytes.clone())
            };
            let after = Stored {
                version,
                epoch,
                value: value.clone(),
            };
            (Recorded::Put(value), Some(after), before)
        }
        Change::Delete => {
            check_order(before.as_ref(), epoch);
            (Recorded::Delete, None, before)
        }
        Change::Add(words) => {
            let existed = before.clone().map(|stored| Stored {
                value: Value::Inline(Bytes::from([])),
                ..stored
            });
            let after = add(before, words, storage);
            (Recorded::Add(words.clone()), Some(after), existed)
        }
    };
    storage.put(&update.key, after);
    Write {
        key: update.key.clone(),
        change,
        before,
    }
}

/// I4: a locked write never has a smaller epoch than the one it overwrites. A violation is a bug
/// in the lock protocol, and continuing would let undo restore the wrong state.
fn check_order(before: Option<&Stored>, epoch: Epoch) {
    if let Some(stored) = before {
        assert!(
            epoch >= stored.epoch,
            "S2 violated: {epoch} after {}",
            stored.epoch
        );
    }
}

/// The object after `words` were added. Counters carry no epoch: they are ordered by no lock.
fn add<S: Storage>(before: Option<Stored>, words: &Bytes, storage: &mut S) -> Stored {
    let version = Version(before.as_ref().map_or(0, |s| s.version.0) + 1);
    let old = before
        .and_then(|s| storage.fetch(&s.value))
        .unwrap_or_else(|| Bytes::from([]));
    let sum = add_words(&old, words);
    Stored {
        version,
        epoch: Epoch(0),
        value: Value::Inline(sum),
    }
}

/// Word by word sum of two lists of little-endian i64, the shorter one extended by zeros.
#[must_use]
pub fn add_words(a: &[u8], b: &[u8]) -> Bytes {
    let word = |list: &[u8], i: usize| {
        let chunk = list.get(i * 8..i * 8 + 8)?;
        Some(i64::from_le_bytes(chunk.try_into().ok()?))
    };
    let count = (a.len() / 8).max(b.len() / 8);
    let mut sum = Vec::with_capacity(count * 8);
    for i in 0..count {
        let value = word(a, i)
            .unwrap_or(0)
            .wrapping_add(word(b, i).unwrap_or(0));
        sum.extend_from_slice(&value.to_le_bytes());
    }
    Bytes::from(sum)
}

/// The words whose addition undoes the addition of `words`.
#[must_use]
pub fn negate_words(words: &[u8]) -> Bytes {
    let mut negated = Vec::with_capacity(words.len());
    for chunk in words.chunks_exact(8) {
        let word = i64::from_le_bytes(chunk.try_into().unwrap_or_default());
        negated.extend_from_slice(&word.wrapping_neg().to_le_bytes());
    }
    Bytes::from(negated)
}
