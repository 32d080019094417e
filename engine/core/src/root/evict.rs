//! Rule X: fence everywhere, decide once, complete or undo, drain, release.
//!
//! The decision keeps a *prefix* of the dead life's operations in the order of their stamps: all
//! operations up to the first one that cannot be completed (its predecessor vanished, or nobody
//! holds a missing part). That is stricter than the rule needs where later operations touch other
//! objects, and makes a dead source's history a prefix for its application; what is undone was
//! never stable.
//!
//! A proxy that the decision names as a supplier may die before it has supplied. Then everybody is
//! fenced again and a second decision is taken, which keeps no more than the first one did: what
//! was undone stays undone, and undoing more is possible as long as the locks are held.
//!
//! Lives of one node are released in their order, so that a home may keep one number per node for
//! all lives that are GONE.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

use super::Root;
use super::state::{Decision, Eviction, Stage};
use crate::ids::{Epoch, Life, NodeId, Seq, StreamSeq, Time};
use crate::message::{Held, Message, Role};
use crate::op::Participant;
use crate::teeth::{Tooth, bites};

impl Root {
    pub(super) fn eviction_message(&mut self, from: Life, body: Message) {
        let (victim, stage, round) = match &body {
            Message::Fenced { victim, round, .. } => (*victim, Stage::Fencing, Some(*round)),
            Message::Resolved { victim, round } => (*victim, Stage::Resolving, Some(*round)),
            Message::Drained { victim } => (*victim, Stage::Draining, None),
            Message::GoneAck { victim } => (*victim, Stage::Releasing, None),
            _ => return,
        };
        let Some(eviction) = self.evictions.get_mut(&victim) else {
            return;
        };
        if eviction.stage != stage || round.is_some_and(|r| r != eviction.round) {
            return;
        }
        let row = self.state.rows.iter().find(|r| r.life.node == from.node);
        if row.is_none_or(|r| r.role == Role::Proxy && r.life != from) {
            // A proxy's earlier life answers; the one that counts has not heard yet.
            return;
        }
        eviction.answered.insert(from.node);
        if let Message::Fenced { held, .. } = body {
            eviction.fenced.retain(|life, _| life.node != from.node);
            eviction.fenced.insert(from, held);
        }
    }

    pub(super) fn evictions_settle(&mut self, now: Time) {
        let victims: Vec<Life> = self.evictions.keys().copied().collect();
        for victim in victims {
            while self.advance_eviction(now, victim) {}
        }
    }

    /// Nodes that must answer the current stage.
    fn expected(&self, victim: Life, stage: Stage, role: Role) -> BTreeSet<NodeId> {
        let mut nodes = BTreeSet::new();
        if stage == Stage::Draining {
            if role == Role::Proxy && !bites(Tooth::NotDrained) {
                nodes = self.live_nodes(Role::Client);
            }
        } else {
            nodes = self.live_nodes(Role::Destination);
            nodes.extend(self.live_nodes(Role::Proxy));
        }
        // The victim's node may already live again; its new life knows nothing of the old one.
        if stage != Stage::Releasing {
            nodes.remove(&victim.node);
        }
        nodes
    }

    /// Nodes that have not answered the current stage of an eviction.
    pub(super) fn unanswered(&self, eviction: &Eviction) -> Vec<NodeId> {
        let (victim, stage) = (eviction.victim, eviction.stage);
        let mut expected = self.expected(victim, stage, eviction.role);
        if stage == Stage::Resolving {
            // A home that has not joined yet may be a participant all the same.
            expected.extend(eviction.decision.until.iter().map(|(node, _)| *node));
        }
        expected.difference(&eviction.answered).copied().collect()
    }

    /// Sends or repeats the current stage, or enters the next; returns whether it advanced.
    fn advance_eviction(&mut self, now: Time, victim: Life) -> bool {
        let Some(eviction) = self.evictions.get(&victim) else {
            return false;
        };
        let (stage, role) = (eviction.stage, eviction.role);
        if stage == Stage::Resolving && self.has_lost_supplier(&eviction.decision) {
            if let Some(eviction) = self.evictions.get_mut(&victim) {
                eviction.round += 1;
                eviction.fenced.clear();
                eviction.enter(Stage::Fencing);
                self.changed = true;
            }
            return true;
        }
        let mut missing = self.unanswered(eviction);
        // A dead client may have stamped under a dead proxy's locks: it is resolved first.
        let clients_pending =
            role == Role::Proxy && self.evictions.values().any(|e| e.role == Role::Client);
        let older_pending = self
            .evictions
            .keys()
            .any(|life| life.node == victim.node && life < &victim);
        let waits = stage == Stage::Draining && (clients_pending || older_pending);
        if missing.is_empty() && !waits {
            self.finish_stage(victim, stage);
            return true;
        }
        let Some(eviction) = self.evictions.get_mut(&victim) else {
            return false;
        };
        if stage == Stage::Resolving && !missing.is_empty() {
            // What a supplier sent may have been lost on the way.
            let suppliers = eviction.decision.supply.iter().map(|(life, _)| life.node);
            missing.extend(suppliers);
            missing.sort_unstable();
            missing.dedup();
        }
        if now >= eviction.next_send {
            eviction.next_send = now.after(self.config.retry_after);
            let (round, decision) = (eviction.round, eviction.decision.clone());
            for node in missing {
                let body = stage_message((victim, round), stage, &decision, node);
                self.port.send(node, body);
            }
        }
        false
    }

    /// Whether a proxy that shall supply parts is dead.
    fn has_lost_supplier(&self, decision: &Decision) -> bool {
        decision.supply.iter().any(|(life, _)| {
            let mut rows = self.state.rows.iter();
            let row = rows.find(|r| r.life.node == life.node);
            row.is_some_and(|r| r.role == Role::Proxy && (r.life != *life || !r.live))
        })
    }

    fn finish_stage(&mut self, victim: Life, stage: Stage) {
        let minimum = self.port.minimum();
        let rows = &self.state.rows;
        let role_of = |life: Life| {
            let row = rows.iter().find(|r| r.life.node == life.node)?;
            let counts = row.role == Role::Destination || (row.live && row.life == life);
            counts.then_some(row.role)
        };
        let Some(eviction) = self.evictions.get_mut(&victim) else {
            return;
        };
        self.changed = true;
        match stage {
            Stage::Fencing => {
                // Homes come first, so that they supply what they can: they outlive a crash.
                let mut answers: Vec<(Role, Life, Vec<Held>)> = Vec::new();
                for (life, held) in core::mem::take(&mut eviction.fenced) {
                    answers.extend(role_of(life).map(|role| (role, life, held)));
                }
                answers.sort_by_key(|(role, life, _)| (*role, *life));
                let cap = (eviction.round > 0).then_some(eviction.decision.through);
                let (decision, undone) = decide(&answers, minimum, cap);
                let completed = decision
                    .supply
                    .iter()
                    .map(|(_, list)| list.len() as u64)
                    .sum::<u64>();
                self.counters.completed += completed;
                self.counters.undone += undone;
                eviction.decision = decision;
                eviction.enter(Stage::Resolving);
            }
            Stage::Resolving => eviction.enter(Stage::Draining),
            Stage::Draining => eviction.enter(Stage::Releasing),
            Stage::Releasing => {
                self.evictions.remove(&victim);
                self.bounds.remove(&victim);
                self.counters.evicted += 1;
                self.view_changed();
            }
        }
    }
}

fn stage_message(
    (victim, round): (Life, u32),
    stage: Stage,
    decision: &Decision,
    node: NodeId,
) -> Message {
    match stage {
        Stage::Fencing => Message::Fence { victim, round },
        Stage::Resolving => {
            let until = decision
                .until
                .iter()
                .find(|(n, _)| *n == node)
                .map(|&(_, at)| at);
            let supply = decision.supply.iter().find(|(l, _)| l.node == node);
            Message::Resolve {
                victim,
                round,
                through: decision.through,
                until: until.unwrap_or_default(),
                supply: supply.map(|(_, list)| list.clone()).unwrap_or_default(),
            }
        }
        Stage::Draining => Message::Drain { victim },
        Stage::Releasing => Message::Gone { victim },
    }
}

/// One operation as the union of all answers knows it.
#[derive(Default)]
struct Known {
    epoch: Epoch,
    previous: Epoch,
    participants: Vec<Participant>,
    /// Nodes that list it. Only homes among the participants matter.
    listed: BTreeSet<NodeId>,
    /// For each home, a node that could send its part.
    suppliers: BTreeMap<NodeId, Life>,
}

/// Decides about every operation of a fenced life, and counts those that are undone somewhere.
/// Nothing after `cap` survives. Earlier answers are preferred as suppliers.
fn decide(
    answers: &[(Role, Life, Vec<Held>)],
    minimum: Epoch,
    cap: Option<Seq>,
) -> (Decision, u64) {
    let mut union: BTreeMap<Seq, Known> = BTreeMap::new();
    for (_, life, list) in answers {
        for held in list {
            let known = union.entry(held.seq).or_default();
            known.epoch = held.epoch;
            known.previous = held.previous;
            known.participants.clone_from(&held.participants);
            known.listed.insert(life.node);
            for &home in &held.supplies {
                known.suppliers.entry(home).or_insert(*life);
            }
        }
    }
    let mut decision = Decision::default();
    let mut until: BTreeMap<NodeId, StreamSeq> = BTreeMap::new();
    let mut supply: BTreeMap<Life, Vec<(Seq, NodeId)>> = BTreeMap::new();
    let mut survivors = 0;
    for (&seq, known) in &union {
        let follows = Seq(decision.through.0 + 1) == seq && survivors > 0;
        let first = seq == Seq(1) || known.previous < minimum;
        if (!follows && !first && !bites(Tooth::GapCompleted)) || cap.is_some_and(|cap| seq > cap) {
            break;
        }
        let stable = known.epoch < minimum;
        let missing: Vec<NodeId> = known
            .participants
            .iter()
            .map(|p| p.node)
            .filter(|home| !stable && !known.listed.contains(home))
            .collect();
        if missing
            .iter()
            .any(|home| !known.suppliers.contains_key(home))
        {
            if bites(Tooth::GapCompleted) {
                continue;
            }
            break;
        }
        for home in missing {
            supply
                .entry(known.suppliers[&home])
                .or_default()
                .push((seq, home));
        }
        for p in &known.participants {
            let at = until.entry(p.node).or_default();
            *at = (*at).max(p.at);
        }
        decision.through = seq;
        survivors += 1;
    }
    let undone = union.len() as u64 - survivors;
    decision.until = until.into_iter().collect();
    decision.supply = supply.into_iter().collect();
    (decision, undone)
}
