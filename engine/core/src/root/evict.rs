//! Rule X: fence everywhere, decide once, complete or undo, drain, release.
//!
//! The decision keeps a *prefix* of the dead life's operations in the order of their stamps: all
//! operations up to the first one that cannot be completed (its predecessor vanished, or nobody
//! holds a missing part). That is stricter than the rule needs where later operations touch other
//! objects, and makes a dead source's history a prefix for its application; what is undone was
//! never stable.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

use super::Root;
use super::state::{Decision, Stage};
use crate::ids::{Epoch, Life, NodeId, Seq, StreamSeq, Time};
use crate::message::{Held, Message, Role};
use crate::op::Participant;

impl Root {
    pub(super) fn eviction_message(&mut self, from: Life, body: Message) {
        let (victim, stage) = match &body {
            Message::Fenced { victim, .. } => (*victim, Stage::Fencing),
            Message::Resolved { victim } => (*victim, Stage::Resolving),
            Message::Drained { victim } => (*victim, Stage::Draining),
            Message::GoneAck { victim } => (*victim, Stage::Releasing),
            _ => return,
        };
        let Some(eviction) = self.evictions.get_mut(&victim) else {
            return;
        };
        if eviction.stage != stage {
            return;
        }
        eviction.answered.insert(from.node);
        if let Message::Fenced { held, .. } = body {
            eviction.fenced.insert(from.node, held);
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
            if role == Role::Proxy {
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

    /// Sends or repeats the current stage, or enters the next; returns whether it advanced.
    fn advance_eviction(&mut self, now: Time, victim: Life) -> bool {
        let Some(eviction) = self.evictions.get(&victim) else {
            return false;
        };
        let (stage, role) = (eviction.stage, eviction.role);
        let expected = self.expected(victim, stage, role);
        let Some(eviction) = self.evictions.get(&victim) else {
            return false;
        };
        let missing: Vec<NodeId> = expected.difference(&eviction.answered).copied().collect();
        // A dead client may have stamped under a dead proxy's locks: it is resolved first.
        let clients_pending = stage == Stage::Draining
            && role == Role::Proxy
            && self.evictions.values().any(|e| e.role == Role::Client);
        if missing.is_empty() && !clients_pending {
            self.finish_stage(victim, stage);
            return true;
        }
        let Some(eviction) = self.evictions.get_mut(&victim) else {
            return false;
        };
        if now >= eviction.next_send {
            eviction.next_send = now.after(self.config.retry_after);
            let decision = eviction.decision.clone();
            for node in missing {
                let body = stage_message(victim, stage, &decision, node);
                self.port.send(node, body);
            }
        }
        false
    }

    fn finish_stage(&mut self, victim: Life, stage: Stage) {
        let minimum = self.port.minimum();
        let Some(eviction) = self.evictions.get_mut(&victim) else {
            return;
        };
        self.changed = true;
        match stage {
            Stage::Fencing => {
                let (decision, undone) = decide(&eviction.fenced, minimum);
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

fn stage_message(victim: Life, stage: Stage, decision: &Decision, node: NodeId) -> Message {
    match stage {
        Stage::Fencing => Message::Fence { victim },
        Stage::Resolving => {
            let until = decision
                .until
                .iter()
                .find(|(n, _)| *n == node)
                .map(|&(_, at)| at);
            let supply = decision.supply.iter().find(|(n, _)| *n == node);
            Message::Resolve {
                victim,
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
    suppliers: BTreeMap<NodeId, NodeId>,
}

/// Decides about every operation of a fenced life, and counts those that are undone somewhere.
fn decide(fenced: &BTreeMap<NodeId, Vec<Held>>, minimum: Epoch) -> (Decision, u64) {
    let mut union: BTreeMap<Seq, Known> = BTreeMap::new();
    for (&node, list) in fenced {
        for held in list {
            let known = union.entry(held.seq).or_default();
            known.epoch = held.epoch;
            known.previous = held.previous;
            known.participants.clone_from(&held.participants);
            known.listed.insert(node);
            for &home in &held.supplies {
                known.suppliers.entry(home).or_insert(node);
            }
        }
    }
    let mut decision = Decision::default();
    let mut until: BTreeMap<NodeId, StreamSeq> = BTreeMap::new();
    let mut supply: BTreeMap<NodeId, Vec<(Seq, NodeId)>> = BTreeMap::new();
    let mut survivors = 0;
    for (&seq, known) in &union {
        let follows = Seq(decision.through.0 + 1) == seq && survivors > 0;
        let first = seq == Seq(1) || known.previous < minimum;
        if !follows && !first {
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
