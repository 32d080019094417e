//! Rule X at a destination: fence a dead life, tell what is held of it, then complete or undo by
//! the root's logged decision, and release its locks when it is GONE.
//!
//! Undo runs over the life's operations from the newest back, so every object returns through the
//! states it had; nobody else can have written them meanwhile, because the dead life's locks stay
//! until GONE (I25). Each is one step, whichever shards have pieces of it. Every step is a log
//! record, so a crash repeats nothing and skips nothing (I24).
//!
//! What is held and what is supplied is gathered from the shards. Answers to an earlier question
//! are told by their step and dropped: an old list must not answer a new fence.

use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;

use super::Destination;
use super::shard::{HeldPiece, News, Order, ShardSet, Task};
use crate::ids::{Life, NodeId, Seq, Step, StreamSeq};
use crate::message::{Held, Message};
use crate::op::Operation;
use crate::record::Record;
use crate::teeth::{Tooth, bites};

/// Evictions under way here.
#[derive(Debug, Default)]
pub(super) struct Resolutions {
    /// Fences to acknowledge to the root once durable, with what is held.
    fencing: BTreeMap<Life, Fencing>,
    /// Decisions being carried out.
    resolving: BTreeMap<Life, Decision>,
    /// GONE to acknowledge once durable.
    leaving: BTreeMap<Life, (NodeId, Step)>,
}

#[derive(Debug)]
struct Fencing {
    root: NodeId,
    round: u32,
    /// What it lists must be durable up to here, the fence's own record included.
    step: Step,
    /// What is held, once it is asked for: the question's step, shards that have not answered.
    asked: Option<(Step, ShardSet)>,
    held: BTreeMap<Seq, Held>,
}

#[derive(Debug)]
struct Decision {
    root: NodeId,
    round: u32,
    through: Seq,
    until: StreamSeq,
    supply: Vec<(Seq, NodeId)>,
    /// Undo was ordered and supplies were asked for.
    begun: bool,
    supplies: BTreeMap<Seq, Supply>,
    /// Step at which the state agrees with the decision.
    whole: Option<Step>,
}

/// An operation on its way to homes that lack it.
#[derive(Debug)]
struct Supply {
    homes: BTreeSet<NodeId>,
    asked: Step,
    waiting: ShardSet,
    /// What the shards have found so far; `None` before the first and after a failure.
    op: Option<Operation>,
    failed: bool,
}

impl Destination {
    pub(super) fn resolve_message(&mut self, from: Life, body: Message) {
        match body {
            Message::Fence { victim, round } => self.fence(from.node, victim, round),
            Message::Resolve {
                victim,
                round,
                through,
                until,
                supply,
            } => {
                let resolving = &self.resolutions.resolving;
                let newer = resolving.get(&victim).is_none_or(|d| d.round <= round);
                if newer && !self.is_gone(victim) {
                    // A home that joined after the others were fenced learns of it here.
                    self.refuse(victim);
                    let before = self.resolutions.resolving.remove(&victim);
                    // A repeated decision supplies again; how far it is stays known.
                    let whole = before.filter(|d| d.round == round).and_then(|d| d.whole);
                    let decision = Decision {
                        root: from.node,
                        round,
                        through,
                        until,
                        supply,
                        begun: false,
                        supplies: BTreeMap::new(),
                        whole,
                    };
                    self.resolutions.resolving.insert(victim, decision);
                }
            }
            Message::Complete { op } => self.complete(op),
            Message::Gone { victim } => self.release(from.node, victim),
            _ => {}
        }
    }

    /// Durably refuse the life, then list what is held of it.
    fn fence(&mut self, root: NodeId, victim: Life, round: u32) {
        if self.is_gone(victim) {
            let held = Vec::new();
            let fenced = Message::Fenced {
                victim,
                round,
                held,
            };
            self.port.send(root, fenced);
            return;
        }
        self.refuse(victim);
        // A decision under way is about to be replaced; its end must not be taken for the next one's.
        self.resolutions.resolving.remove(&victim);
        let under_way = self.resolutions.fencing.get(&victim);
        if under_way.is_some_and(|f| (f.root, f.round) == (root, round)) {
            // Asked again while the shards are listing. A later round asks anew: the decision in
            // between may have changed what is held.
            return;
        }
        let fencing = Fencing {
            root,
            round,
            step: self.logged,
            asked: None,
            held: BTreeMap::new(),
        };
        self.resolutions.fencing.insert(victim, fencing);
    }

    /// Takes nothing of a life from now on.
    fn refuse(&mut self, victim: Life) {
        if !self.is_fenced(victim) {
            self.log(Record::Fence(victim));
            self.sources.entry(victim).or_default().fenced = !bites(Tooth::NotFenced);
            if bites(Tooth::ReleasedAtFence) {
                self.reclaim(victim, &[]);
            }
            self.sessions.retain(|_, session| session.life != victim);
            self.forget(victim);
        }
    }

    fn complete(&mut self, op: Arc<Operation>) {
        let victim = op.id.source;
        let fenced = |s: &super::Source| s.fenced && !s.gone;
        let resolving = self.resolutions.resolving.get(&victim);
        let allowed = self.sources.get(&victim).is_some_and(fenced)
            && resolving.is_some_and(|d| op.id.seq <= d.through);
        let Some(at) = op.at(self.port.node()).filter(|_| allowed) else {
            return;
        };
        let writes = op.updates_for(self.port.node()).next().is_some();
        if writes && at.0 == self.ordered(victim).0 + 1 {
            self.execute(op, at);
            self.counters.completed += 1;
        }
    }

    fn ordered(&self, life: Life) -> StreamSeq {
        self.sources.get(&life).map_or(StreamSeq(0), |s| s.ordered)
    }

    fn release(&mut self, root: NodeId, victim: Life) {
        if !self.is_gone(victim) {
            self.log(Record::Gone(victim));
            let gone = self.gone.entry(victim.node).or_default();
            *gone = (*gone).max(victim.incarnation);
            self.reclaim(victim, &[]);
            self.rows.remove(&victim);
            self.counted.remove(&victim);
            self.resolutions.resolving.remove(&victim);
            if let Some(source) = self.sources.get_mut(&victim) {
                source.gone = true;
                source.hops.clear();
            }
        }
        self.resolutions.leaving.insert(victim, (root, self.logged));
    }

    /// Acknowledges what became durable and carries decisions out as far as possible.
    pub(super) fn resolutions_settle(&mut self) {
        let durable = self.durable;
        let fencing = &self.resolutions.fencing;
        let ready = fencing
            .iter()
            .filter(|(_, f)| f.step <= durable && f.asked.is_none());
        let ready: Vec<Life> = ready.map(|(&victim, _)| victim).collect();
        for victim in ready {
            let step = self.order_all(|_| Task::Gather { victim });
            let asked = (step, ShardSet::all(self.shards()));
            if let Some(fencing) = self.resolutions.fencing.get_mut(&victim) {
                fencing.asked = Some(asked);
            }
        }
        let leaving = &mut self.resolutions.leaving;
        for (victim, (root, _)) in leaving.extract_if(.., |_, (_, step)| *step <= durable) {
            self.port.send(root, Message::GoneAck { victim });
        }
        let victims: Vec<Life> = self.resolutions.resolving.keys().copied().collect();
        for victim in victims {
            self.carry_out(victim);
        }
    }

    pub(super) fn resolve_answer(&mut self, number: u32, step: Step, news: News) {
        match news {
            News::Gathered { victim, pieces } => self.gathered(number, step, victim, pieces),
            News::Supplied { victim, seq, op } => self.supplied(number, step, (victim, seq), op),
            _ => {}
        }
    }

    fn gathered(&mut self, number: u32, step: Step, victim: Life, pieces: Vec<HeldPiece>) {
        let own = self.port.node();
        let Some(fencing) = self.resolutions.fencing.get_mut(&victim) else {
            return;
        };
        let Some((asked, waiting)) = &mut fencing.asked else {
            return;
        };
        if *asked != step || !waiting.remove(number) {
            return;
        }
        for piece in pieces {
            let HeldPiece {
                seq,
                epoch,
                previous,
                participants,
                carried,
            } = piece;
            let held = fencing.held.entry(seq).or_insert_with(|| Held {
                seq,
                epoch,
                previous,
                participants,
                supplies: Vec::new(),
            });
            let known = |node: &NodeId| *node == own || carried.contains(node);
            for p in held.participants.iter().filter(|p| known(&p.node)) {
                if !held.supplies.contains(&p.node) {
                    held.supplies.push(p.node);
                }
            }
        }
        if waiting.is_empty()
            && let Some(fencing) = self.resolutions.fencing.remove(&victim)
        {
            let fenced = Message::Fenced {
                victim,
                round: fencing.round,
                held: fencing.held.into_values().collect(),
            };
            self.port.send(fencing.root, fenced);
        }
    }

    fn carry_out(&mut self, victim: Life) {
        let Some(mut decision) = self.resolutions.resolving.remove(&victim) else {
            return;
        };
        if !decision.begun {
            decision.begun = true;
            self.undo_after(victim, decision.through);
            for (seq, home) in core::mem::take(&mut decision.supply) {
                self.supply(victim, (seq, home), &mut decision.supplies);
            }
        }
        if self.ordered(victim) < decision.until || !decision.supplies.is_empty() {
            self.resolutions.resolving.insert(victim, decision);
            return;
        }
        let whole = *decision.whole.get_or_insert(self.logged);
        if whole <= self.durable {
            let round = decision.round;
            self.port
                .send(decision.root, Message::Resolved { victim, round });
        } else {
            self.resolutions.resolving.insert(victim, decision);
        }
    }

    /// Orders the undo of a life's operations after `through`, from the newest back.
    fn undo_after(&mut self, victim: Life, through: Seq) {
        let Some(source) = self.sources.get_mut(&victim) else {
            return;
        };
        let mut step = self.step;
        let next = |index: &mut VecDeque<super::Entry>| {
            if bites(Tooth::UndoneForward) {
                let first = index.iter().position(|e| e.seq > through)?;
                index.remove(first)
            } else {
                index.pop_back_if(|e| e.seq > through)
            }
        };
        while let Some(entry) = next(&mut source.index) {
            let at = entry.at;
            step = Step(step.0 + 1);
            self.logged = step;
            self.undone = Some(step);
            for number in entry.shards.iter() {
                let task = Task::Undo { victim, at };
                self.lanes[number as usize]
                    .orders
                    .push_back(Order { step, task });
            }
            source.ordered = source.ordered.min(at.before());
            source.executed = source.executed.min(source.ordered);
            source.committed = source.committed.min(source.ordered);
            self.counters.undone += 1;
        }
        self.step = step;
    }

    /// Asks the shards for an operation that a home lacks, if it is held here.
    fn supply(
        &mut self,
        victim: Life,
        (seq, home): (Seq, NodeId),
        supplies: &mut BTreeMap<Seq, Supply>,
    ) {
        if let Some(supply) = supplies.get_mut(&seq) {
            supply.homes.insert(home);
            return;
        }
        let source = self.sources.get(&victim);
        let entry = source.and_then(|s| s.index.iter().find(|e| e.seq == seq));
        let Some(&super::Entry { shards, .. }) = entry else {
            return;
        };
        let asked = self.next_step();
        for number in shards.iter() {
            let task = Task::Supply { victim, seq };
            let order = Order { step: asked, task };
            self.lanes[number as usize].orders.push_back(order);
        }
        let supply = Supply {
            homes: BTreeSet::from([home]),
            asked,
            waiting: shards,
            op: None,
            failed: false,
        };
        supplies.insert(seq, supply);
    }

    fn supplied(
        &mut self,
        number: u32,
        step: Step,
        (victim, seq): (Life, Seq),
        found: Option<Operation>,
    ) {
        let Some(decision) = self.resolutions.resolving.get_mut(&victim) else {
            return;
        };
        let Some(supply) = decision.supplies.get_mut(&seq) else {
            return;
        };
        if supply.asked != step || !supply.waiting.remove(number) {
            return;
        }
        match (found, &mut supply.op) {
            (None, _) => supply.failed = true,
            (Some(found), Some(op)) => {
                // Records of another number of shards may carry the same update twice.
                for update in found.updates {
                    let same =
                        |u: &crate::op::Update| (u.home, &u.key) == (update.home, &update.key);
                    if !op.updates.iter().any(same) {
                        op.updates.push(update);
                    }
                }
            }
            (Some(found), op) => *op = Some(found),
        }
        if !supply.waiting.is_empty() {
            return;
        }
        let Some(Supply {
            homes,
            op: Some(op),
            failed: false,
            ..
        }) = decision.supplies.remove(&seq)
        else {
            return;
        };
        let op = Arc::new(op);
        for home in homes {
            self.port.ask(crate::effect::Effect::Connect(home));
            let op = op.clone();
            self.port.send(home, Message::Complete { op });
        }
    }
}
