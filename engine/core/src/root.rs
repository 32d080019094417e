//! The root: membership, the global minimum, and the resolver of dead lives (rule X).
//!
//! Its state is small: the members and their newest lives, m, the term, and evictions under way.
//! Every change is made durable before anything that rests on it leaves (effects wait for the
//! version of the state they belong to). A restart takes the next term and holds every member's
//! bound at m until a report of the new term arrives (b.3 rule 9), so it causes no eviction and no
//! step back of m (I42).
//!
//! m is the smallest of: the root's own epoch, each directly attached member's last reported bound,
//! each aggregator's branch value, each hold, and each evicted life's frozen bound. Reports are
//! absolute and bounds only rise, so a lost, late or repeated report only makes m smaller (claim 3).
//!
//! Deliberately absent: payloads. The resolver handles operation tags only.

mod evict;
mod holders;
mod join;
mod state;

use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::vec::Vec;

use holders::Holders;
use state::{Eviction, Row};
pub use state::{RootState, StateError};

use crate::effect::{Effect, Port};
use crate::ids::{Epoch, Incarnation, Life, NodeId, Term, Time, ViewId};
use crate::member::Resting;
use crate::message::{Covered, Envelope, Message, Role, View, Waits};
use crate::teeth::{Tooth, bites};

/// How far ahead of the epoch the durable ceiling is kept.
const CEILING_STEP: u64 = 10_000;
/// While the disk takes no state (it is full, say) everybody goes on pinging, asking and waiting. Of
/// more effects than this that wait for a state, those that repeat another one are dropped …
const WAITING_MANY: usize = 256;
/// … and of more minima than this the last ones are published together.
const UNPUBLISHED_MAX: usize = 256;

/// Settings of a root.
#[derive(Clone, Copy, Debug)]
pub struct RootConfig {
    /// Least ticks between two steps of the epoch (E3); it rests while nobody waits for m.
    pub interval: u64,
    /// Ticks of silence, or of holding m back while a log has no room, after which a client or
    /// proxy is evicted.
    pub evict_after: u64,
    /// Ticks after which an unanswered step of an eviction is repeated.
    pub retry_after: u64,
}

/// Figures of a root.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RootCounters {
    /// Lives evicted and GONE.
    pub evicted: u64,
    /// Lives whose eviction began because they held m back while a log had no room.
    pub held_back: u64,
    /// Operations of dead lives that survive.
    pub completed: u64,
    /// Operations of dead lives that are undone.
    pub undone: u64,
    /// Most ticks between two steps of m.
    pub lag_max: u64,
    /// Processes of homes that were not let in.
    pub rejected: u64,
}

/// How a member is counted.
#[derive(Clone, Copy, Debug)]
struct Bound {
    /// Bound kept by the root itself.
    hold: Epoch,
    /// Aggregator and attachment that cover the member, once a report said so.
    covered: Option<NodeId>,
    /// Newest attachment, and the aggregator it goes through.
    attach: (u32, Option<NodeId>),
    last_heard: Time,
}

/// A root. See the module's head.
#[derive(Clone, Debug)]
pub struct Root {
    port: Port,
    config: RootConfig,
    state: RootState,
    bounds: BTreeMap<Life, Bound>,
    /// Each aggregator's value, and the child whose bound that is.
    branches: BTreeMap<NodeId, (Epoch, Option<Life>)>,
    holders: Holders,
    evictions: BTreeMap<Life, Eviction>,
    resting: Resting,
    /// Effects with the version of the state that must be durable first.
    waiting: VecDeque<(u64, Effect)>,
    version: u64,
    persisted: u64,
    /// m per version, to be published once durable.
    unpublished: VecDeque<(u64, Epoch)>,
    changed: bool,
    /// What is known of storages rose, and is not part of a state yet.
    grown: bool,
    /// By node, the nonce of the last process that was not let in.
    rejected: BTreeMap<NodeId, u64>,
    /// Somebody waits for m: the epoch steps once, after `interval` at the earliest.
    wanted: bool,
    last_step: Time,
    /// When silence is looked at next.
    next_look: Time,
    last_rise: Time,
    counters: RootCounters,
    /// Another root has taken its place: it says nothing any more.
    is_replaced: bool,
}

impl Root {
    /// A root with the durable state of its last life (or [`RootState::default`] for a new
    /// cluster), in the next term.
    #[must_use]
    pub fn new(node: NodeId, config: RootConfig, mut state: RootState, now: Time) -> Root {
        state.term = Term(state.term.0 + 1);
        let life = Life {
            node,
            incarnation: Incarnation(state.term.0),
        };
        let mut port = Port::new(life, node, Epoch(state.ceiling.0.max(1)));
        port.publish(state.term, state.minimum);
        let evictions: BTreeMap<Life, Eviction> = core::mem::take(&mut state.evictions)
            .into_iter()
            .map(|e| (e.victim, e))
            .collect();
        let hold = |_: &Life| Bound {
            hold: state.minimum,
            covered: None,
            attach: (0, None),
            last_heard: now,
        };
        let mut bounds = BTreeMap::new();
        for row in state
            .rows
            .iter()
            .filter(|r| r.live && r.role.is_volatile_source())
        {
            bounds.insert(row.life, hold(&row.life));
        }
        for victim in evictions.keys() {
            bounds.insert(*victim, hold(victim));
        }
        let mut root = Root {
            port,
            config,
            state,
            bounds,
            branches: BTreeMap::new(),
            holders: Holders::default(),
            evictions,
            resting: Resting::default(),
            waiting: VecDeque::new(),
            version: 0,
            persisted: 0,
            unpublished: VecDeque::new(),
            changed: true,
            grown: false,
            rejected: BTreeMap::new(),
            wanted: true,
            last_step: now,
            next_look: now,
            last_rise: now,
            counters: RootCounters::default(),
            is_replaced: false,
        };
        root.state.view = ViewId(root.state.view.0 + 1);
        root.settle(now);
        root
    }

    /// A message arrived. One of a newer term proves that another root has taken this one's place.
    pub fn handle_message(&mut self, now: Time, envelope: Envelope) {
        if envelope.term > self.state.term || self.is_replaced {
            return self.leave();
        }
        if self.port.receive(&envelope).is_err() {
            return;
        }
        let (from, epoch) = (envelope.from, envelope.epoch);
        match envelope.body {
            Message::Join { nonce, role, store } => {
                self.join(now, from.node, (nonce, role), store);
            }
            Message::Ping {
                lower_bound,
                view,
                attach,
                waits,
                commit,
            } => {
                self.heard(now, from);
                self.committed(from, commit);
                self.room_heard(now, from, waits);
                self.wanted |= waits > Waits::No;
                self.step(now);
                self.report_direct(from, attach, lower_bound);
                self.answer(from.node, view, (epoch, waits));
            }
            Message::Attach { life, attach } => self.attach(from, life, attach),
            Message::Report {
                lower_bound,
                lowest,
                covers,
                view,
                waits,
            } => {
                self.heard(now, from);
                self.wanted |= waits > Waits::No;
                self.step(now);
                self.report_branch(now, from, (lower_bound, lowest), &covers);
                self.answer(from.node, view, (epoch, waits));
            }
            Message::Part { life } => self.start_eviction(life),
            body => self.eviction_message(from, body),
        }
        self.settle(now);
    }

    /// The state of `version` is durable.
    pub fn handle_persisted(&mut self, now: Time, version: u64) {
        self.persisted = self.persisted.max(version);
        while let Some(&(version, minimum)) = self.unpublished.front() {
            if version > self.persisted {
                break;
            }
            self.unpublished.pop_front();
            self.port.publish(self.state.term, minimum);
            self.counters.lag_max = self.counters.lag_max.max(now.since(self.last_rise));
            self.last_rise = now;
        }
        self.settle(now);
    }

    /// Somebody who knows (the supervisor that saw the process exit) says that a life is over.
    pub fn declare_dead(&mut self, now: Time, node: NodeId) {
        if let Some(row) = self.row(node).filter(|r| r.live) {
            let (life, role) = (row.life, row.role);
            if role.is_volatile_source() {
                self.start_eviction(life);
            } else if role == Role::Aggregator {
                row.live = false;
                self.branch_lost(node);
                self.view_changed();
            }
        }
        self.settle(now);
    }

    /// Time passed.
    pub fn handle_timeout(&mut self, now: Time) {
        if now >= self.next_look {
            // What arrived while the root itself did nothing is not processed yet: its own absence
            // is nobody's silence.
            let absent = now.since(self.next_look.after(self.config.interval));
            for bound in self.bounds.values_mut() {
                bound.last_heard = bound.last_heard.after(absent);
            }
            self.holders.absent(absent);
            let look = (self.config.evict_after / 8).max(self.config.interval);
            self.next_look = now.after(look);
            self.changed |= self.grown;
            let silent: Vec<Life> = self
                .bounds
                .iter()
                .filter(|(_, b)| now.since(b.last_heard) > self.config.evict_after)
                .map(|(&life, _)| life)
                .collect();
            for life in silent {
                self.start_eviction(life);
            }
            self.evict_holders(now);
        }
        self.step(now);
        self.settle(now);
    }

    /// When [`Root::handle_timeout`] wants to run.
    #[must_use]
    pub fn poll_timeout(&self) -> Time {
        let step = self.last_step.after(self.config.interval);
        if self.wanted {
            self.next_look.min(step)
        } else {
            self.next_look
        }
    }

    /// E3, if anybody waits for m. Whoever waits says so with every ping, so the epoch goes on until
    /// m has passed what they wait for, and rests afterwards.
    fn step(&mut self, now: Time) {
        let wanted = self.wanted || bites(Tooth::NeverRests);
        if wanted && now >= self.last_step.after(self.config.interval) {
            self.wanted = false;
            self.last_step = now;
            self.port.tick();
        }
    }

    /// The next effect whose foundation is durable.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        while let Some(effect) = self.port.poll() {
            if matches!(effect, Effect::Persist { .. }) {
                return Some(effect);
            }
            if self.waiting.len() < WAITING_MANY || !self.repeats(&effect) {
                self.waiting.push_back((self.version, effect));
            }
        }
        let (version, _) = self.waiting.front()?;
        if *version > self.persisted {
            return None;
        }
        let (_, mut effect) = self.waiting.pop_front()?;
        if let Effect::Send { envelope, .. } = &mut effect {
            // m that became durable while the message waited may travel with it.
            envelope.minimum = self.port.minimum();
        }
        Some(effect)
    }

    /// Whether an effect says what one that waits will say.
    fn repeats(&self, effect: &Effect) -> bool {
        let Effect::Send { to, envelope } = effect else {
            return false;
        };
        self.waiting.iter().any(|(_, waiting)| {
            matches!(waiting, Effect::Send { to: other, envelope: earlier }
                if other == to && earlier.body == envelope.body)
        })
    }

    /// Identity, epoch and minimum.
    #[must_use]
    pub fn port(&self) -> &Port {
        &self.port
    }

    /// The current membership.
    #[must_use]
    pub fn view(&self) -> View {
        self.state.view()
    }

    /// The bound that m may not pass for a life's sake; `None` if the life is not counted.
    #[must_use]
    pub fn counts(&self, life: Life) -> Option<Epoch> {
        self.bounds.get(&life).map(|b| self.effective(b))
    }

    /// Whether a life is a member: admitted, not replaced, not evicted.
    #[must_use]
    pub fn is_member(&self, life: Life) -> bool {
        let rows = &self.state.rows;
        let place = rows.binary_search_by_key(&life.node, |r| r.life.node);
        place.is_ok_and(|i| rows[i].life == life && rows[i].live)
    }

    /// The life that holds m back, with its bound.
    #[must_use]
    pub fn blocked_by(&self) -> Option<(Life, Epoch)> {
        self.bounds
            .iter()
            .map(|(&life, b)| (life, self.effective(b)))
            .min_by_key(|&(_, e)| e)
    }

    /// Evictions under way: victim and stage.
    pub fn evictions(&self) -> impl Iterator<Item = (Life, &'static str)> + '_ {
        self.evictions
            .iter()
            .map(|(&victim, e)| (victim, e.stage.name()))
    }

    /// The same with the nodes whose answer is awaited.
    pub fn unanswered_evictions(
        &self,
    ) -> impl Iterator<Item = (Life, &'static str, Vec<NodeId>)> + '_ {
        let evictions = self.evictions.iter();
        evictions.map(|(&victim, e)| (victim, e.stage.name(), self.unanswered(e)))
    }

    /// Figures so far.
    #[must_use]
    pub fn counters(&self) -> RootCounters {
        self.counters
    }

    /// Ticks since a member was last heard, for status.
    #[must_use]
    pub fn silence(&self, now: Time, life: Life) -> Option<u64> {
        self.bounds.get(&life).map(|b| now.since(b.last_heard))
    }

    fn heard(&mut self, now: Time, life: Life) {
        if let Some(bound) = self.bounds.get_mut(&life) {
            bound.last_heard = now;
        }
    }

    fn row(&mut self, node: NodeId) -> Option<&mut Row> {
        self.state.rows.iter_mut().find(|r| r.life.node == node)
    }

    fn view_changed(&mut self) {
        self.state.view = ViewId(self.state.view.0 + 1);
        self.changed = true;
        self.wanted = true;
    }

    /// Answers a ping or report that was sent at `epoch`.
    fn answer(&mut self, to: NodeId, known: ViewId, (epoch, waits): (Epoch, Waits)) {
        // First, so that the one who pinged is not told twice.
        self.tell_resting();
        self.pong(to, known);
        let rests = waits == Waits::No && epoch == self.port.epoch();
        self.resting.answered(to, self.state.view, rests);
    }

    /// News for the members that rest.
    fn tell_resting(&mut self) {
        let news = self.resting.news(self.port.epoch(), self.state.view);
        for (node, known) in news {
            self.pong(node, known);
        }
    }

    fn pong(&mut self, to: NodeId, known: ViewId) {
        let view = (known < self.state.view).then(|| self.view());
        self.port.send(to, Message::Pong { view });
    }

    /// A directly attached member's bound.
    fn report_direct(&mut self, life: Life, attach: u32, lower_bound: Epoch) {
        if self.evictions.contains_key(&life) {
            return;
        }
        let Some(bound) = self.bounds.get(&life).copied() else {
            return;
        };
        let hold = self.effective(&bound);
        if let Some(bound) = self.bounds.get_mut(&life) {
            if attach > bound.attach.0 {
                // It left its aggregator; what that one last said of it still holds.
                bound.hold = hold;
                bound.covered = None;
                bound.attach = (attach, None);
            }
            if attach == bound.attach.0 && bound.attach.1.is_none() {
                bound.hold = bound.hold.max(lower_bound);
            }
        }
    }

    /// Attach before detach: the hold bridges the gap (b.3 rules 3 and 4).
    fn attach(&mut self, via: Life, life: Life, attach: u32) {
        let Some(bound) = self.bounds.get(&life).copied() else {
            return;
        };
        if attach < bound.attach.0 || self.evictions.contains_key(&life) {
            return;
        }
        let hold = self.effective(&bound);
        if let Some(bound) = self.bounds.get_mut(&life)
            && bound.attach != (attach, Some(via.node))
        {
            bound.hold = hold;
            if bites(Tooth::DetachedFirst) {
                bound.hold = Epoch(u64::MAX);
            }
            bound.covered = None;
            bound.attach = (attach, Some(via.node));
        }
        self.port.send(
            via.node,
            Message::Attached {
                life,
                attach,
                floor: hold,
            },
        );
    }

    fn report_branch(
        &mut self,
        now: Time,
        from: Life,
        value: (Epoch, Option<Life>),
        covers: &[Covered],
    ) {
        if self
            .row(from.node)
            .is_none_or(|r| r.life != from || !r.live)
        {
            return;
        }
        let (before, _) = self.branches.insert(from.node, value).unwrap_or_default();
        let listed: BTreeMap<Life, u32> = covers.iter().map(|c| (c.life, c.attach)).collect();
        for (life, bound) in &mut self.bounds {
            if self.evictions.contains_key(life) {
                // Frozen.
                continue;
            }
            let number = listed.get(life).copied();
            let (newest, via) = bound.attach;
            let is_new = |n| n > newest || (n == newest && via.is_none());
            if number.is_some_and(is_new) && !bites(Tooth::AttachmentsForgotten) {
                // The root confirms every attachment before it is reported. It does not know this one,
                // so an earlier life of the root did (b.3 rule 9).
                bound.attach = (number.unwrap_or(newest), Some(from.node));
            }
            if number == Some(bound.attach.0) && bound.attach.1 == Some(from.node) {
                bound.covered = Some(from.node);
                bound.last_heard = now;
            } else if bound.covered == Some(from.node) {
                // No longer bounded by the branch: held where the branch last had it.
                bound.hold = before;
                if bites(Tooth::UnlistedNotHeld) {
                    bound.hold = Epoch(u64::MAX);
                }
                bound.covered = None;
            }
        }
    }

    /// An aggregator restarted or died: its children are held by the root again (b.3 rule 5).
    fn branch_lost(&mut self, aggregator: NodeId) {
        let Some((value, _)) = self.branches.remove(&aggregator) else {
            return;
        };
        for bound in self
            .bounds
            .values_mut()
            .filter(|b| b.covered == Some(aggregator))
        {
            bound.hold = value;
            bound.covered = None;
        }
    }

    fn effective(&self, bound: &Bound) -> Epoch {
        let branch = bound.covered.and_then(|a| self.branches.get(&a));
        branch.map_or(bound.hold, |(value, _)| *value)
    }

    /// Freezes a life's bound and begins rule X for it.
    fn start_eviction(&mut self, life: Life) {
        if self.evictions.contains_key(&life) || !self.bounds.contains_key(&life) {
            return;
        }
        let frozen = self.effective(&self.bounds[&life]);
        let mut role = Role::Client;
        if let Some(row) = self.row(life.node) {
            role = row.role;
            if row.life == life {
                row.live = false;
            }
        }
        if let Some(bound) = self.bounds.get_mut(&life) {
            bound.hold = frozen;
            if bites(Tooth::EvictedNotHeld) {
                bound.hold = Epoch(u64::MAX);
            }
            bound.covered = None;
        }
        self.evictions.insert(life, Eviction::new(life, role));
        self.view_changed();
    }

    /// Nothing that was to be said is said, nor is anything written.
    fn leave(&mut self) {
        if !core::mem::replace(&mut self.is_replaced, true) {
            while self.port.poll().is_some() {}
            self.waiting = VecDeque::from([(0, Effect::Evicted)]);
        }
    }

    fn settle(&mut self, now: Time) {
        if self.is_replaced {
            return;
        }
        self.evictions_settle(now);
        if !self.evictions.is_empty() {
            self.wanted = true;
            self.next_look = self.next_look.min(now.after(self.config.interval));
        }
        self.publish();
        self.tell_resting();
        if self.port.epoch().0 + CEILING_STEP / 2 > self.state.ceiling.0 {
            self.state.ceiling = Epoch(self.port.epoch().0 + CEILING_STEP);
            self.changed = true;
        }
        if core::mem::take(&mut self.changed) {
            self.grown = false;
            self.version += 1;
            let durable: Vec<Eviction> = self.evictions.values().cloned().collect();
            let state = self.state.encode(&durable);
            self.port.ask(Effect::Persist {
                version: self.version,
                state,
            });
        }
    }

    /// v = min over everything that counts; published once durable.
    fn publish(&mut self) {
        let members = self.bounds.values().map(|b| self.effective(b)).min();
        let value = members.map_or(self.port.epoch(), |m| m.min(self.port.epoch()));
        if value > self.state.minimum {
            self.state.minimum = value;
            self.changed = true;
            let version = self.version + 1;
            match self.unpublished.len() {
                0..UNPUBLISHED_MAX => self.unpublished.push_back((version, value)),
                // Later than it might be, never earlier.
                len => self.unpublished[len - 1] = (version, value),
            }
            if bites(Tooth::PublishedEarly) {
                self.port.publish(self.state.term, value);
            }
        }
    }

    fn live_nodes(&self, role: Role) -> BTreeSet<NodeId> {
        let rows = self.state.rows.iter().filter(|r| r.role == role);
        rows.filter(|r| r.live || role == Role::Destination)
            .map(|r| r.life.node)
            .collect()
    }
}

#[cfg(test)]
mod tests;
