//! A persistent destination: executes updates (O2), keeps undo, grants locks at the objects' home.
//!
//! It is made of a *front*, the [`Destination`], and one [`Shard`] or several. The front owns what
//! the node is as a whole: port, membership, sessions, rows, stage, stream positions, fences,
//! decisions, marks, progress. The shards own the objects, each those of some spaces. The hands
//! carry [`Order`]s and [`Answer`]s between them; see [`shard`].
//!
//! Flow of one part: `Reint` arrives in stream order → ordered of every shard whose objects it
//! writes, in one step → each executes in volatile state and appends to its log with the undo image
//! → when all have, *executed* travels back (cumulative per stream) → the hands make the step
//! durable on every log and call [`Destination::handle_durable`] → *committed* travels back → m
//! passes the epoch, m is made durable here (b.6) → the undo records may go.
//!
//! Stages after a restart: `Reconnect` until every life that may hold locks here has opened its
//! session again or is GONE, then `Serving`. Stamped parts, fences and resolutions are processed in
//! every stage; only new locks wait.
//!
//! Invariants kept here: I5 (stream positions), I6 (fences), I7, I13, I25, I27. I4 is the shards',
//! the WAL rule I8 the storage's.
//!
//! Deliberately absent: what an update means, objects, and any wait for another node.

mod objects;
mod recover;
mod resolve;
mod session;
pub mod shard;
mod stream;

use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::vec::Vec;

pub use objects::{BULK_BYTES, add_words, negate_words};
pub use recover::{Image, RecoverError};
use shard::{Answer, News, Order, Shard, Task, shard_of};

use crate::effect::{Effect, Port};
use crate::ids::{Epoch, Incarnation, Life, NodeId, Step, StreamSeq, Time, ViewId};
use crate::member::{Intervals, Joined, Member};
use crate::message::{Envelope, Message, Reclaim, Role, Waits};
use crate::record::Record;
use crate::room::{Cost, HomeRule, Space};
use crate::teeth::{Tooth, bites};
use stream::{Entry, Source};

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
    pub pings: Intervals,
    /// Different for every start of the process.
    pub nonce: u64,
    /// Most bytes of other participants' updates in one record.
    pub carry_bytes: usize,
    /// When there is room for new work.
    pub room: HomeRule,
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

/// A connected session.
#[derive(Clone, Copy, Debug)]
struct Session {
    life: Life,
    /// What shards say of earlier steps was meant for an earlier session.
    since: Step,
}

/// The way to one shard.
#[derive(Debug, Default)]
struct Lane {
    orders: VecDeque<Order>,
    /// Executions that it has not reported as done.
    unfinished: VecDeque<(Step, Life, StreamSeq)>,
}

/// The front of a persistent destination. See the module's head.
#[derive(Debug)]
pub struct Destination {
    port: Port,
    member: Member,
    lanes: Vec<Lane>,
    /// The newest step; everything up to it has been ordered.
    step: Step,
    /// The newest step that writes records.
    logged: Step,
    /// The newest step with a record that counts ([`StoreMark::commit`]): an operation's, or one of
    /// the front's own but for marks. Steps of undo lie between such ones.
    counting: Step,
    /// Such a step: the root is told of it once it is durable.
    telling: Step,
    /// The newest one that this start found. Of what was found nothing is told.
    recovered: Step,
    /// Steps up to here are durable, as far as they write records.
    durable: Step,
    sources: BTreeMap<Life, Source>,
    /// Highest life of each node that is GONE.
    gone: BTreeMap<NodeId, Incarnation>,
    /// Lives that may hold locks here, with the step of the row's record.
    rows: BTreeMap<Life, Step>,
    /// Rows that opened a session since this start.
    returned: BTreeSet<Life>,
    /// Connected sessions.
    sessions: BTreeMap<NodeId, Session>,
    /// Sessions whose row is not durable yet.
    opening: Vec<Life>,
    /// Sessions asked for before this process joined, with their claims.
    early: BTreeMap<NodeId, (Life, Vec<Reclaim>)>,
    /// Lock requests that wait for the stage to pass.
    deferred: Vec<(Life, Message)>,
    stage: Stage,
    marks_logged: (Epoch, Epoch),
    marks_pending: VecDeque<(Step, Epoch, Epoch)>,
    minimum_durable: Epoch,
    ceiling_durable: Epoch,
    resolutions: resolve::Resolutions,
    /// The last undo; once it is durable the shards let go of what it used.
    undone: Option<Step>,
    room: HomeRule,
    /// What is free, as the hands said last.
    space: Space,
    /// Lives that may have stamped for this home, or may yet: those that live, and the dead that are
    /// not GONE.
    counted: BTreeSet<Life>,
    /// What was said last about room: the view that was counted, if there was any.
    said: Option<ViewId>,
    /// Sessions that heard it.
    told: BTreeSet<NodeId>,
    counters: DestinationCounters,
}

impl Destination {
    /// A destination in a yet unjoined life, with the state that `image` recovered: its front, and
    /// its shards in the order of their numbers.
    #[must_use]
    pub fn new(node: NodeId, config: DestinationConfig, image: Image) -> (Destination, Vec<Shard>) {
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
            step,
            store,
            kept,
            replaced,
            ..
        } = image;
        let open = sources
            .iter()
            .filter(|(_, s)| !s.gone)
            .map(|(&life, _)| life);
        let counted = open.chain(rows.keys().copied()).collect();
        let stage = if rows.is_empty() {
            Stage::Serving
        } else {
            Stage::Reconnect
        };
        let count = kept.len() as u32;
        let shards = (0..count).zip(kept.into_iter().zip(replaced));
        let shards = shards.map(|(number, kept)| {
            Shard::new(node, (number, count), config.carry_bytes, kept, step)
        });
        let shards = shards.collect();
        let first = if bites(Tooth::EpochReset) {
            Epoch(0)
        } else {
            ceiling
        };
        let front = Destination {
            port: Port::new(life, config.root, first),
            member: Member::new(
                config.root,
                config.parent,
                Role::Destination,
                config.nonce,
                config.pings,
            )
            .with_store(store),
            lanes: (0..count).map(|_| Lane::default()).collect(),
            step,
            logged: step,
            counting: store.commit,
            telling: store.commit,
            recovered: store.commit,
            durable: step,
            sources,
            gone,
            rows,
            returned: BTreeSet::new(),
            sessions: BTreeMap::new(),
            opening: Vec::new(),
            early: BTreeMap::new(),
            deferred: Vec::new(),
            stage,
            marks_logged: (minimum, ceiling),
            marks_pending: VecDeque::new(),
            minimum_durable: minimum,
            ceiling_durable: ceiling,
            resolutions: resolve::Resolutions::default(),
            undone: None,
            room: config.room,
            space: Space::UNBOUNDED,
            counted,
            said: None,
            told: BTreeSet::new(),
            counters: DestinationCounters::default(),
        };
        (front, shards)
    }

    /// A connection to `peer` is up.
    pub fn handle_connected(&mut self, peer: NodeId) {
        self.member.connected(peer);
    }

    /// The connection to `peer` broke.
    pub fn handle_disconnected(&mut self, peer: NodeId) {
        if let Some(Session { life, .. }) = self.sessions.remove(&peer) {
            self.forget(life);
            self.opening.retain(|l| *l != life);
        }
        self.told.remove(&peer);
        self.early.remove(&peer);
        for source in self.sources.values_mut() {
            source.hops.remove(&peer);
        }
    }

    /// A message arrived.
    pub fn handle_message(&mut self, now: Time, envelope: Envelope) {
        if self.port.receive(&envelope).is_err() {
            return;
        }
        let from = envelope.from;
        match envelope.body {
            Message::Joined { .. }
            | Message::Rejected { .. }
            | Message::Attached { .. }
            | Message::Pong { .. } => {
                let said = self
                    .member
                    .handle(&mut self.port, from.node, &envelope.body);
                if let Joined::Rejected(reason) = said {
                    self.port.ask(Effect::Rejected(reason));
                } else if said != Joined::Nothing {
                    self.count_living();
                }
                if let Joined::Entered { life, .. } = said {
                    self.log(Record::Entered(life));
                    for (_, (from, reclaim)) in core::mem::take(&mut self.early) {
                        self.open(from, reclaim);
                    }
                }
            }
            Message::Open { reclaim, .. } => self.open(from, reclaim),
            // Nobody is answered, and nothing written, for a storage that may be the wrong one.
            _ if !self.member.is_joined() && !bites(Tooth::AnswersUnjoined) => {}
            Message::Stream { base } => self.announce(from, base),
            Message::Reint { parts, .. } => {
                if self.is_refused(from) {
                    self.counters.refused_fenced += parts.len() as u64;
                } else {
                    for part in parts {
                        self.reintegrate(part);
                    }
                }
            }
            body @ (Message::Lock { .. } | Message::Unlock { .. }) => self.lock_message(from, body),
            Message::Read { request, key, .. } => {
                let shard = self.shard_of(key.space);
                let to = from;
                self.order(shard, Task::Read { to, request, key });
            }
            Message::Scan {
                request,
                range,
                after,
                bytes_max,
                ..
            } => {
                let task = Task::Scan {
                    to: from,
                    request,
                    range,
                    after,
                    bytes_max,
                };
                self.order(self.shard_of(range.space), task);
            }
            body => self.resolve_message(from, body),
        }
        self.settle(now);
    }

    /// Every record of a step up to `durable` is on the medium, on every log.
    pub fn handle_durable(&mut self, now: Time, durable: Step) {
        self.durable = self.durable.max(durable);
        let durable = self.durable;
        for source in self.sources.values_mut() {
            source.advance(durable);
        }
        while let Some(&(step, minimum, ceiling)) = self.marks_pending.front() {
            if step > durable {
                break;
            }
            self.marks_pending.pop_front();
            self.minimum_durable = minimum;
            self.ceiling_durable = ceiling;
            self.purge();
        }
        if self.undone.take_if(|step| *step <= durable).is_some() {
            self.tidy();
        }
        self.tell_commit();
        let opening = core::mem::take(&mut self.opening);
        for life in opening {
            if self.rows.get(&life).is_some_and(|&step| step > durable) {
                self.opening.push(life);
            } else {
                self.opened(life);
            }
        }
        self.settle(now);
    }

    /// Shard `number` says something. Follow up with [`Destination::handle_done`].
    pub fn handle_answer(&mut self, number: u32, answer: Answer) {
        let Answer { step, news } = answer;
        match news {
            News::Notice { notice, empty } => self.notice(step, notice, empty),
            News::ClaimsRefused(count) => self.counters.claims_refused += count,
            News::Value { to, request, value } => {
                if self.is_open(to, step) {
                    self.port
                        .send(to.node, Message::ReadReply { request, value });
                }
            }
            News::Page { to, request, page } => {
                if self.is_open(to, step) {
                    let (entries, more) = (page.entries, page.more);
                    let reply = Message::ScanReply {
                        request,
                        entries,
                        more,
                    };
                    self.port.send(to.node, reply);
                }
            }
            news @ (News::Gathered { .. } | News::Supplied { .. }) => {
                self.resolve_answer(number, step, news);
            }
        }
    }

    /// Shard `number` has carried out every order up to `step`, and its answers were handed over.
    pub fn handle_done(&mut self, now: Time, number: u32, step: Step) {
        let durable = self.durable;
        let Some(lane) = self.lanes.get_mut(number as usize) else {
            return;
        };
        while let Some(&(ordered, life, at)) = lane.unfinished.front() {
            if ordered > step {
                break;
            }
            lane.unfinished.pop_front();
            let Some(source) = self.sources.get_mut(&life) else {
                continue;
            };
            // It may have been undone meanwhile, and another be in its place.
            if let Some(entry) = source.entry(at).filter(|e| e.step == ordered)
                && entry.waiting.remove(number)
                && entry.waiting.is_empty()
            {
                source.advance(durable);
            }
        }
        self.settle(now);
    }

    /// What is free now. To be said before anything else is handed in, whenever it has changed.
    pub fn handle_space(&mut self, space: Space) {
        self.space = space;
    }

    /// Whether there is room for new work ([`crate::room`]). Stamped operations are taken always.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.room.has_room(&self.space, self.sources_counted()) || bites(Tooth::Overgrants)
    }

    /// Clients and proxies that may have stamped operations under way.
    #[must_use]
    pub fn sources_counted(&self) -> u64 {
        self.counted.len() as u64
    }

    /// What must be free for new work to be let in.
    #[must_use]
    pub fn space_needed(&self) -> Cost {
        self.room.needed(self.sources_counted())
    }

    /// Time passed.
    pub fn handle_timeout(&mut self, now: Time) {
        let told = (self.port.epoch(), self.waits());
        self.member.handle_timeout(now, &mut self.port, told);
        self.settle(now);
    }

    /// When [`Destination::handle_timeout`] wants to run.
    #[must_use]
    pub fn poll_timeout(&self) -> Time {
        let epoch = self.port.epoch();
        self.member.timeout(epoch, self.waits(), || epoch)
    }

    /// The next effect. Nothing leaves while the epoch exceeds its durable ceiling (trap T2).
    pub fn poll_effect(&mut self) -> Option<Effect> {
        if self.port.epoch() > self.ceiling_durable {
            return None;
        }
        self.port.poll()
    }

    /// The next order for shard `number`.
    pub fn poll_order(&mut self, number: u32) -> Option<Order> {
        self.lanes.get_mut(number as usize)?.orders.pop_front()
    }

    /// How many shards there are.
    #[must_use]
    pub fn shards(&self) -> u32 {
        self.lanes.len() as u32
    }

    /// The newest step. A checkpoint that every shard takes when it has carried out its orders up
    /// to here belongs to [`Destination::image`] as of now.
    #[must_use]
    pub fn step(&self) -> Step {
        self.step
    }

    /// Figures so far.
    #[must_use]
    pub fn counters(&self) -> DestinationCounters {
        self.counters
    }

    /// Operations whose undo records are kept now.
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

    /// What waits for m here: undo records, and with them new work if the log has no room.
    fn waits(&self) -> Waits {
        let waits = self.undo_kept() > 0;
        let sources = self.sources_counted();
        if waits && !self.room.has_room_in_log(&self.space, sources) {
            return Waits::ForRoom;
        }
        waits.into()
    }

    fn shard_of(&self, space: u64) -> u32 {
        shard_of(space, self.shards())
    }

    fn next_step(&mut self) -> Step {
        self.step = Step(self.step.0 + 1);
        self.step
    }

    /// Orders something of one shard, in a step of its own.
    fn order(&mut self, shard: u32, task: Task) -> Step {
        let step = self.next_step();
        self.lanes[shard as usize]
            .orders
            .push_back(Order { step, task });
        step
    }

    /// Orders the same of every shard, in one step.
    fn order_all(&mut self, task: impl Fn(u32) -> Task) -> Step {
        let step = self.next_step();
        for (number, lane) in (0..).zip(&mut self.lanes) {
            let task = task(number);
            lane.orders.push_back(Order { step, task });
        }
        step
    }

    /// The front's own records stand in the log of shard 0.
    fn log(&mut self, record: Record) -> Step {
        let counts = !matches!(record, Record::Marks { .. });
        self.logged = self.order(0, Task::Log(record));
        if counts {
            self.counting = self.logged;
        }
        self.logged
    }

    /// Looks how far what counts is durable. While work goes on, some step of it is looked at: the
    /// newest one never is durable.
    fn tell_commit(&mut self) {
        let durable = self.durable;
        for _ in 0..2 {
            if self.telling <= durable || bites(Tooth::CommitToldEarly) {
                if self.telling > self.recovered {
                    self.member.commit(self.telling);
                }
                self.telling = self.counting;
            }
        }
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

    /// What follows from any input: stage, marks, decisions, progress.
    fn settle(&mut self, _now: Time) {
        if self.stage == Stage::Reconnect && self.rows.keys().all(|l| self.returned.contains(l)) {
            self.stage = Stage::Serving;
            for (from, body) in core::mem::take(&mut self.deferred) {
                self.lock_message(from, body);
            }
        }
        self.log_marks();
        self.resolutions_settle();
        self.tell_progress();
    }

    /// m_D and the ceiling become durable before anything relies on them; m only if it lets
    /// anything go, so a home at rest writes nothing.
    fn log_marks(&mut self) {
        let (logged_minimum, logged_ceiling) = self.marks_logged;
        let minimum = self.port.minimum().max(logged_minimum);
        let near = self.port.epoch().0 + CEILING_STEP / 2 > logged_ceiling.0;
        let lets_go = minimum > logged_minimum && self.sources.values().any(|s| s.is_past(minimum));
        if !lets_go && !near {
            return;
        }
        let ceiling = if near {
            Epoch(self.port.epoch().0 + CEILING_STEP)
        } else {
            logged_ceiling
        };
        self.marks_logged = (minimum, ceiling);
        let step = self.log(Record::Marks { minimum, ceiling });
        self.marks_pending.push_back((step, minimum, ceiling));
    }
}
