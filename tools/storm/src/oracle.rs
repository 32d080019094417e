//! The god's-eye view: what every operation is, where it stands at every home, and whether the
//! invariants hold.
//!
//! It learns of operations from the redo of whoever stamped them, and of executions from the logs
//! as they are appended, so it does not depend on what the nodes believe. Names of invariants as in
//! the protocol notes: I1–I26; L1: no two lives hold conflicting locks.

mod judge;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lowtide_engine_core::destination::add_words;
use lowtide_engine_core::ids::{Epoch, Life, NodeId, OpId, Seq, Step, StreamSeq};
use lowtide_engine_core::message::{Reclaim, StreamState};
use lowtide_engine_core::op::{Bytes, Change, Key, Operation};
use lowtide_engine_core::record::{OpRecord, Position, Record};

use crate::app::{LISTS, tags_of};
use crate::disk::Logged;

/// How an operation stands at one participant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Not in the log.
    Absent,
    /// Executed, at this position.
    Executed(Step),
    /// Executed and undone, the latter at this position.
    Undone(Step),
}

#[derive(Debug)]
struct OpState {
    op: Arc<Operation>,
    places: Vec<Place>,
    /// Its source is GONE and it did not survive.
    dropped: bool,
}

#[derive(Clone, Copy, Debug)]
enum Entry {
    Op(OpId),
    Undone(OpId),
    Fence(Life),
    Marks(Epoch),
    Other,
}

/// An object's history: the operations in effect, oldest first, with the value each left behind.
type History = Vec<(OpId, Epoch, Option<Bytes>)>;

/// One home as the oracle knows it.
#[derive(Debug, Default)]
struct Home {
    log: Vec<(Step, Entry)>,
    synced: Step,
    objects: BTreeMap<Key, History>,
    counters: BTreeMap<Key, Bytes>,
    positions: BTreeMap<Life, StreamSeq>,
    fenced: BTreeSet<Life>,
    minimum: Epoch,
    /// Highest epoch that left this node.
    epoch_sent: Epoch,
    /// Highest position per stream that was ever durable.
    durable_positions: BTreeMap<Life, StreamSeq>,
}

/// Figures for probes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Operations stamped.
    pub stamped: u64,
    /// Executions.
    pub executed: u64,
    /// Undo steps.
    pub undone: u64,
    /// Executions inside a completion.
    pub completed: u64,
    /// Operations of lives that are GONE and survive.
    pub survived: u64,
    /// Operations of lives that are GONE and do not.
    pub dropped: u64,
    /// Executions in which several shards took part.
    pub executed_by_several: u64,
    /// Undo steps in which several shards took part.
    pub undone_by_several: u64,
    /// Executed operations that a crash took.
    pub lost_in_crash: u64,
    /// Lives that are GONE.
    pub gone: u64,
}

/// See the module's head.
#[derive(Debug, Default)]
pub struct Oracle {
    ops: BTreeMap<OpId, OpState>,
    by_tag: BTreeMap<u64, Vec<OpId>>,
    /// Neither everywhere durable nor dropped.
    unfinished: BTreeSet<(Epoch, OpId)>,
    homes: BTreeMap<NodeId, Home>,
    gone: BTreeSet<Life>,
    /// Locks of lives whose process is gone.
    frozen: BTreeMap<Life, Vec<Reclaim>>,
    /// Seen by another life than their source.
    observed: BTreeSet<OpId>,
    minimum_durable: Epoch,
    /// Newest seq that was taken over per life.
    known: BTreeMap<Life, Seq>,
    /// Figures.
    pub tally: Tally,
    failure: Option<String>,
}

impl Oracle {
    /// The first violation.
    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// Reports a violation; the first one counts.
    pub fn fail(&mut self, what: String) {
        self.failure.get_or_insert(what);
    }

    /// Newest operation of a life that the oracle knows.
    #[must_use]
    pub fn known(&self, life: Life) -> Seq {
        self.known.get(&life).copied().unwrap_or_default()
    }

    /// Whether a life is resolved and released.
    #[must_use]
    pub fn is_gone(&self, life: Life) -> bool {
        self.gone.contains(&life)
    }

    /// m as the root has made durable.
    #[must_use]
    pub fn minimum_durable(&self) -> Epoch {
        self.minimum_durable
    }

    /// Operations that are neither everywhere durable nor dropped.
    #[must_use]
    pub fn unfinished(&self) -> usize {
        self.unfinished.len()
    }

    /// A source stamped an operation.
    pub fn stamped(&mut self, op: &Arc<Operation>) {
        let life = op.id.source;
        if op.id.seq.0 != self.known(life).0 + 1 {
            self.fail(format!("{} is stamped after {}", op.id, self.known(life)));
        }
        self.known.insert(life, op.id.seq);
        self.tally.stamped += 1;
        let dropped = self.gone.contains(&life);
        if !dropped {
            self.unfinished.insert((op.epoch, op.id));
            if op.epoch < self.minimum_durable {
                self.fail(format!(
                    "I10: {} stamped at {} below m {}",
                    op.id, op.epoch, self.minimum_durable
                ));
            }
        }
        for u in &op.updates {
            if let Change::Put(value) = &u.change {
                let tag = if u.key.space == LISTS {
                    tags_of(value).last()
                } else {
                    tags_of(value).next()
                };
                if let Some(tag) = tag {
                    let list = self.by_tag.entry(tag).or_default();
                    if !list.contains(&op.id) {
                        list.push(op.id);
                    }
                }
            }
        }
        let places = vec![Place::Absent; op.participants.len()];
        let state = OpState {
            op: op.clone(),
            places,
            dropped,
        };
        self.ops.insert(op.id, state);
    }

    /// m is durable at the root and may be published.
    pub fn minimum_persisted(&mut self, minimum: Epoch) {
        if minimum < self.minimum_durable {
            let before = self.minimum_durable;
            self.fail(format!("I9: m falls from {before} to {minimum}"));
        }
        if minimum <= self.minimum_durable {
            return;
        }
        self.minimum_durable = minimum;
        if let Some((epoch, id)) = self.unfinished.first()
            && *epoch < minimum
        {
            let places = &self.ops[id].places;
            let text = format!("I10: m rises to {minimum} above {id} at {epoch}: {places:?}");
            self.fail(text);
        }
    }

    /// An envelope left a node.
    pub fn sent(&mut self, from: Life, is_home: bool, epoch: Epoch, minimum: Epoch) {
        if minimum > self.minimum_durable {
            let durable = self.minimum_durable;
            self.fail(format!("I9: {from} says m {minimum}, durable is {durable}"));
        }
        if is_home {
            let home = self.homes.entry(from.node).or_default();
            let before = home.epoch_sent;
            home.epoch_sent = before.max(epoch);
            if epoch < before {
                self.fail(format!("I1: server {from} falls from {before} to {epoch}"));
            }
        }
    }

    /// Records that a home's shards have appended, in the order of steps; all records of a step are
    /// shown together. `completing`: steps that a Complete brought about.
    pub fn appended(
        &mut self,
        node: NodeId,
        records: &[(Position, Logged)],
        completing: &BTreeSet<Step>,
    ) {
        for of_step in records.chunk_by(|(_, a), (_, b)| a.step == b.step) {
            let step = of_step[0].1.step;
            let mut pieces = Vec::new();
            let mut entry = Entry::Other;
            for (_, record) in of_step {
                let parsed = match Record::from_parts(record.kind, &record.body) {
                    Ok((_, parsed)) => parsed,
                    Err(e) => {
                        let text = format!("{node} wrote a record that does not decode: {e}");
                        return self.fail(text);
                    }
                };
                entry = match parsed {
                    Record::Op(r) => {
                        let id = r.id;
                        pieces.push(r);
                        Entry::Op(id)
                    }
                    Record::Undone(r) => Entry::Undone(OpId {
                        source: r.source,
                        seq: r.seq,
                    }),
                    Record::Fence(life) => Entry::Fence(life),
                    Record::Marks { minimum, .. } => Entry::Marks(minimum),
                    _ => Entry::Other,
                };
            }
            match entry {
                Entry::Op(_) => self.executed(node, &pieces, completing.contains(&step)),
                Entry::Undone(id) => {
                    self.tally.undone_by_several += u64::from(of_step.len() > 1);
                    self.check_undo(node, id);
                }
                Entry::Marks(minimum) if minimum > self.minimum_durable => {
                    self.fail(format!("I13: {node} takes m {minimum} that is not durable"));
                }
                _ => {}
            }
            self.homes.entry(node).or_default().log.push((step, entry));
            self.take_effect(node, step, entry);
        }
    }

    fn executed(&mut self, node: NodeId, pieces: &[OpRecord], completing: bool) {
        let r = &pieces[0];
        let life = r.id.source;
        self.tally.executed += 1;
        self.tally.executed_by_several += u64::from(pieces.len() > 1);
        self.tally.completed += u64::from(completing);
        let home = self.homes.entry(node).or_default();
        let last = home.positions.get(&life).copied().unwrap_or_default();
        let fenced = home.fenced.contains(&life);
        let Some(state) = self.ops.get(&r.id) else {
            return self.fail(format!("{} executes at {node} and was never stamped", r.id));
        };
        let op = &state.op;
        let Some(index) = op.participants.iter().position(|p| p.node == node) else {
            return self.fail(format!("{} executes at {node}, no participant", r.id));
        };
        let place = state.places[index];
        let mut wrong = None;
        if self.gone.contains(&life) {
            wrong = Some(format!(
                "I26: {} executes at {node} after its life is GONE",
                r.id
            ));
        } else if fenced && !completing {
            wrong = Some(format!("I6: {} executes at {node} though fenced", r.id));
        } else if matches!(place, Place::Executed(_)) {
            wrong = Some(format!("I5: {} executes at {node} twice", r.id));
        } else if matches!(place, Place::Undone(_)) {
            wrong = Some(format!(
                "I6: {} executes at {node} after it was undone",
                r.id
            ));
        } else if r.at.0 != last.0 + 1 || op.participants[index].at != r.at {
            wrong = Some(format!(
                "I5: {} executes at {node} at {} after {last}",
                r.id, r.at
            ));
        } else if r.epoch != op.epoch || r.participants != op.participants {
            wrong = Some(format!(
                "I3: {} executes at {node} with another stamp",
                r.id
            ));
        } else if r.epoch < self.minimum_durable {
            wrong = Some(format!(
                "I7: {} at {} executes at {node} below m",
                r.id, r.epoch
            ));
        } else if !are_whole(pieces, op, node) {
            wrong = Some(format!(
                "{} writes other objects at {node} than asked",
                r.id
            ));
        }
        let op = op.clone();
        if let Some(text) = wrong {
            return self.fail(text);
        }
        let home = &self.homes[&node];
        let mut text = None;
        for u in op.updates_for(node) {
            let top = home.objects.get(&u.key).and_then(|h| h.last());
            if matches!(u.change, Change::Add(_)) {
                continue;
            }
            if let Some((other, epoch, _)) = top.filter(|(_, epoch, _)| *epoch > op.epoch) {
                text = Some(format!(
                    "I4: {} at {} overwrites {other} at {epoch}",
                    op.id, op.epoch
                ));
            }
            if let (LISTS, Change::Put(value)) = (u.key.space, &u.change) {
                let old = top
                    .and_then(|(_, _, v)| v.clone())
                    .unwrap_or_else(|| Bytes::from([]));
                if value.len() != old.len() + 8 || value[..old.len()] != old[..] {
                    let list: Vec<u64> = tags_of(&old).collect();
                    text = Some(format!(
                        "lost update: {} at {node} {:?} does not extend {list:x?}",
                        op.id, u.key
                    ));
                }
            }
        }
        if let Some(text) = text {
            self.fail(text);
        }
    }

    fn check_undo(&mut self, node: NodeId, id: OpId) {
        self.tally.undone += 1;
        let Some(state) = self.ops.get(&id) else {
            return self.fail(format!("{node} undoes {id} that was never stamped"));
        };
        let epoch = state.op.epoch;
        if epoch < self.minimum_durable {
            let m = self.minimum_durable;
            let text = format!("{node} undoes {id} at {epoch} though m is {m}");
            self.fail(text);
        }
        if self.observed.contains(&id) {
            self.fail(format!(
                "I18: {node} undoes {id} that another source has seen"
            ));
        }
        if self.gone.contains(&id.source) {
            self.fail(format!("{node} undoes {id} after its life is GONE"));
        }
    }

    /// Applies one log entry to the model of the home.
    fn take_effect(&mut self, node: NodeId, step: Step, entry: Entry) {
        let home = self.homes.entry(node).or_default();
        match entry {
            Entry::Op(id) => {
                let Some(state) = self.ops.get_mut(&id) else {
                    return;
                };
                for (p, place) in state.op.participants.iter().zip(&mut state.places) {
                    if p.node == node {
                        *place = Place::Executed(step);
                        home.positions.insert(id.source, p.at);
                    }
                }
                for u in state.op.updates_for(node) {
                    let after = match &u.change {
                        Change::Put(value) => Some(value.clone()),
                        Change::Delete => None,
                        Change::Add(words) => {
                            let sum = home
                                .counters
                                .entry(u.key.clone())
                                .or_insert_with(|| Bytes::from([]));
                            *sum = add_words(sum, words);
                            continue;
                        }
                    };
                    let history = home.objects.entry(u.key.clone()).or_default();
                    history.push((id, state.op.epoch, after));
                }
                self.refresh(id);
            }
            Entry::Undone(id) => {
                let Some(state) = self.ops.get_mut(&id) else {
                    return;
                };
                for (p, place) in state.op.participants.iter().zip(&mut state.places) {
                    if p.node == node {
                        *place = Place::Undone(step);
                        home.positions.insert(id.source, StreamSeq(p.at.0 - 1));
                    }
                }
                for u in state.op.updates_for(node) {
                    if let Change::Add(words) = &u.change {
                        let negated = lowtide_engine_core::destination::negate_words(words);
                        let sum = home
                            .counters
                            .entry(u.key.clone())
                            .or_insert_with(|| Bytes::from([]));
                        *sum = add_words(sum, &negated);
                    } else if let Some(history) = home.objects.get_mut(&u.key) {
                        history.retain(|(other, ..)| *other != id);
                    }
                }
                self.refresh(id);
            }
            Entry::Fence(life) => {
                home.fenced.insert(life);
            }
            Entry::Marks(minimum) => home.minimum = home.minimum.max(minimum),
            Entry::Other => {}
        }
    }

    fn is_durable(&self, state: &OpState) -> bool {
        state
            .op
            .participants
            .iter()
            .zip(&state.places)
            .all(|(p, place)| {
                let synced = self.homes.get(&p.node).map_or(Step(0), |h| h.synced);
                matches!(place, Place::Executed(step) if *step <= synced)
            })
    }

    /// Brings `unfinished` up to date for one operation.
    fn refresh(&mut self, id: OpId) {
        let Some(state) = self.ops.get(&id) else {
            return;
        };
        let entry = (state.op.epoch, id);
        if state.dropped || self.is_durable(state) {
            self.unfinished.remove(&entry);
        } else {
            self.unfinished.insert(entry);
        }
    }

    /// A home tells of commits: all of them are durable there.
    pub fn committed(&mut self, node: NodeId, streams: &[StreamState]) {
        let home = self.homes.entry(node).or_default();
        let mut text = None;
        for s in streams {
            let durable = home
                .durable_positions
                .get(&s.source)
                .copied()
                .unwrap_or_default();
            if s.committed > durable {
                text = Some(format!(
                    "{node} calls {s:?} committed, durable is {durable}"
                ));
            }
        }
        if let Some(text) = text {
            self.fail(text);
        }
    }

    /// Records of a home up to `synced` are durable.
    pub fn synced(&mut self, node: NodeId, synced: Step) {
        let home = self.homes.entry(node).or_default();
        let before = home.synced;
        home.synced = synced;
        let start = home.log.partition_point(|(step, _)| *step <= before);
        let newly: Vec<OpId> = home.log[start..]
            .iter()
            .take_while(|(step, _)| *step <= synced)
            .filter_map(|(_, e)| match e {
                Entry::Op(id) | Entry::Undone(id) => Some(*id),
                _ => None,
            })
            .collect();
        for id in newly {
            let state = &self.ops[&id];
            let at = state.op.at(node).unwrap_or_default();
            let home = self.homes.entry(node).or_default();
            let durable = home.durable_positions.entry(id.source).or_default();
            *durable = (*durable).max(at);
            self.refresh(id);
        }
    }

    /// A home lost every record after `end`; the rest is durable.
    pub fn crashed(&mut self, node: NodeId, end: Step) {
        let home = self.homes.entry(node).or_default();
        let keep = home.log.partition_point(|(step, _)| *step <= end);
        let lost = home.log.split_off(keep);
        let log = std::mem::take(&mut home.log);
        let epoch_sent = home.epoch_sent;
        let mut durable_positions = std::mem::take(&mut home.durable_positions);
        for (_, entry) in &log {
            if let Entry::Op(id) = entry {
                let at = self
                    .ops
                    .get(id)
                    .and_then(|s| s.op.at(node))
                    .unwrap_or_default();
                let durable = durable_positions.entry(id.source).or_default();
                *durable = (*durable).max(at);
            }
        }
        *home = Home {
            synced: end,
            epoch_sent,
            durable_positions,
            ..Home::default()
        };
        let mut touched = BTreeSet::new();
        for (_, entry) in &lost {
            if let Entry::Op(id) | Entry::Undone(id) = entry {
                touched.insert(*id);
                self.tally.lost_in_crash += 1;
            }
        }
        for id in &touched {
            if let Some(state) = self.ops.get_mut(id) {
                for (p, place) in state.op.participants.iter().zip(&mut state.places) {
                    if p.node == node {
                        *place = Place::Absent;
                    }
                }
            }
        }
        for &(step, entry) in &log {
            self.take_effect(node, step, entry);
        }
        self.homes.entry(node).or_default().log = log;
        for id in touched {
            self.refresh(id);
        }
    }
}

/// Whether the pieces of an operation are all there and write exactly what it asks of `node`.
fn are_whole(pieces: &[OpRecord], op: &Operation, node: NodeId) -> bool {
    let asked: Vec<&Key> = op.updates_for(node).map(|u| &u.key).collect();
    let place = |key: &Key| asked.iter().position(|k| *k == key);
    let mut written = Vec::new();
    for piece in pieces {
        let places: Option<Vec<usize>> = piece.writes.iter().map(|w| place(&w.key)).collect();
        match places {
            Some(places) if places.is_sorted() => written.extend(places),
            _ => return false,
        }
    }
    written.sort_unstable();
    let numbered = (0..).zip(pieces).all(|(index, p): (u16, _)| {
        (p.piece.index, p.piece.count) == (index, pieces.len() as u16)
            && (p.id, p.at, p.epoch) == (pieces[0].id, pieces[0].at, pieces[0].epoch)
    });
    numbered && written.into_iter().eq(0..asked.len())
}
