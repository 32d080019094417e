//! Rule X at a destination: fence a dead life, tell what is held of it, then complete or undo by
//! the root's logged decision, and release its locks when it is GONE.
//!
//! Undo runs over the life's operations from the newest back, so every object returns through the
//! states it had; nobody else can have written them meanwhile, because the dead life's locks stay
//! until GONE (I25). Every step is a log record, so a crash repeats nothing and skips nothing (I24).

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;

use super::{Destination, Entry, add_words, negate_words};
use crate::ids::{Epoch, Life, Lsn, NodeId, Seq, StreamSeq, Term, Version};
use crate::message::{Held, Message};
use crate::op::{Change, Operation, Update};
use crate::record::{OpRecord, Record, Recorded, Storage, Stored, UndoneRecord, Value};
use crate::teeth::{Tooth, bites};

/// Evictions under way here.
#[derive(Debug, Default)]
pub(super) struct Resolutions {
    /// Fences to acknowledge to the root once durable: victim → (root, position).
    fencing: BTreeMap<Life, (NodeId, Lsn)>,
    /// Decisions being carried out.
    resolving: BTreeMap<Life, Decision>,
    /// GONE to acknowledge once durable.
    leaving: BTreeMap<Life, (NodeId, Lsn)>,
}

#[derive(Clone, Debug)]
struct Decision {
    root: NodeId,
    term: Term,
    through: Seq,
    until: StreamSeq,
    supply: Vec<(Seq, NodeId)>,
    supplied: bool,
    /// Log position at which the state agreed with the decision.
    whole: Option<Lsn>,
}

impl Destination {
    pub(super) fn resolve_message<S: Storage>(
        &mut self,
        from: Life,
        body: Message,
        storage: &mut S,
    ) {
        match body {
            Message::Fence { victim } => self.fence(from.node, victim, storage),
            Message::Resolve {
                victim,
                through,
                until,
                supply,
            } => {
                let term = self.port.term();
                let newer = self
                    .resolutions
                    .resolving
                    .get(&victim)
                    .is_none_or(|d| d.term <= term);
                if newer && !self.is_gone(victim) {
                    // A home that joined after the others were fenced learns of it here.
                    self.refuse(victim, storage);
                    let root = from.node;
                    let before = self.resolutions.resolving.remove(&victim);
                    // A repeated decision supplies again; how far it is stays known.
                    let whole = before
                        .filter(|d| (d.through, d.until) == (through, until))
                        .and_then(|d| d.whole);
                    let decision = Decision {
                        root,
                        term,
                        through,
                        until,
                        supply,
                        supplied: false,
                        whole,
                    };
                    self.resolutions.resolving.insert(victim, decision);
                }
            }
            Message::Complete { op } => self.complete(&op, storage),
            Message::Gone { victim } => self.release(from.node, victim, storage),
            _ => {}
        }
    }

    /// Durably refuse the life, then list what is held of it.
    fn fence<S: Storage>(&mut self, root: NodeId, victim: Life, storage: &mut S) {
        if self.is_gone(victim) {
            self.port.send(
                root,
                Message::Fenced {
                    victim,
                    held: Vec::new(),
                },
            );
            return;
        }
        self.refuse(victim, storage);
        // A decision under way is about to be replaced; its end must not be taken for the next one's.
        self.resolutions.resolving.remove(&victim);
        self.resolutions.fencing.insert(victim, (root, self.end));
    }

    /// Takes nothing of a life from now on.
    fn refuse<S: Storage>(&mut self, victim: Life, storage: &mut S) {
        if !self.is_fenced(victim) {
            self.log(&Record::Fence(victim), Epoch(0), storage);
            self.sources.entry(victim).or_default().fenced = !bites(Tooth::NotFenced);
            if bites(Tooth::ReleasedAtFence) {
                self.locks.release_life(victim, &mut self.notices);
            }
            self.sessions.retain(|_, life| *life != victim);
            self.locks.forget_waiting(victim, &mut self.notices);
            self.deferred.retain(|(asker, _)| *asker != victim);
        }
    }

    fn complete<S: Storage>(&mut self, op: &Arc<Operation>, storage: &mut S) {
        let victim = op.id.source;
        let allowed = self
            .sources
            .get(&victim)
            .is_some_and(|s| s.fenced && !s.gone)
            && self
                .resolutions
                .resolving
                .get(&victim)
                .is_some_and(|d| op.id.seq <= d.through);
        let Some(at) = op.at(self.port.node()).filter(|_| allowed) else {
            return;
        };
        let next = self.sources.get(&victim).map_or(1, |s| s.executed.0 + 1);
        if at.0 == next && op.updates_for(self.port.node()).next().is_some() {
            self.execute(op, at, storage);
            self.counters.completed += 1;
        }
    }

    fn release<S: Storage>(&mut self, root: NodeId, victim: Life, storage: &mut S) {
        if !self.is_gone(victim) {
            self.log(&Record::Gone(victim), Epoch(0), storage);
            let gone = self.gone.entry(victim.node).or_default();
            *gone = (*gone).max(victim.incarnation);
            self.locks.release_life(victim, &mut self.notices);
            self.rows.remove(&victim);
            self.resolutions.resolving.remove(&victim);
            if let Some(source) = self.sources.get_mut(&victim) {
                source.gone = true;
                source.hops.clear();
            }
        }
        self.resolutions.leaving.insert(victim, (root, self.end));
    }

    /// Acknowledges what became durable and carries decisions out as far as possible.
    pub(super) fn resolutions_settle<S: Storage>(&mut self, storage: &mut S) {
        let durable = self.durable;
        let ready = |map: &BTreeMap<Life, (NodeId, Lsn)>| -> Vec<(Life, NodeId)> {
            let done = map.iter().filter(|(_, (_, lsn))| *lsn <= durable);
            done.map(|(&life, &(root, _))| (life, root)).collect()
        };
        for (victim, root) in ready(&self.resolutions.fencing) {
            self.resolutions.fencing.remove(&victim);
            let held = self.held_of(victim, storage);
            self.port.send(root, Message::Fenced { victim, held });
        }
        for (victim, root) in ready(&self.resolutions.leaving) {
            self.resolutions.leaving.remove(&victim);
            self.port.send(root, Message::GoneAck { victim });
        }
        let victims: Vec<Life> = self.resolutions.resolving.keys().copied().collect();
        for victim in victims {
            self.carry_out(victim, storage);
        }
    }

    fn carry_out<S: Storage>(&mut self, victim: Life, storage: &mut S) {
        let Some(decision) = self.resolutions.resolving.get(&victim).cloned() else {
            return;
        };
        if !decision.supplied {
            while self
                .sources
                .get(&victim)
                .and_then(|s| s.index.back())
                .is_some_and(|e| e.seq > decision.through)
            {
                self.undo_last(victim, storage);
            }
            for &(seq, home) in &decision.supply {
                if let Some(op) = self.rebuild(victim, seq, storage) {
                    self.port.ask(crate::effect::Effect::Connect(home));
                    self.port.send(home, Message::Complete { op: Arc::new(op) });
                }
            }
            if let Some(d) = self.resolutions.resolving.get_mut(&victim) {
                d.supplied = true;
            }
        }
        let executed = self
            .sources
            .get(&victim)
            .map_or(StreamSeq(0), |s| s.executed);
        if executed < decision.until {
            return;
        }
        let whole = decision.whole.unwrap_or(self.end);
        if whole <= self.durable {
            self.resolutions.resolving.remove(&victim);
            self.port.send(decision.root, Message::Resolved { victim });
        } else if let Some(d) = self.resolutions.resolving.get_mut(&victim) {
            d.whole = Some(whole);
        }
    }

    /// Undoes the newest operation of a life.
    fn undo_last<S: Storage>(&mut self, victim: Life, storage: &mut S) {
        let Some(entry) = self.sources.get(&victim).and_then(|s| {
            let forward = bites(Tooth::UndoneForward);
            let entry = if forward {
                s.index.front()
            } else {
                s.index.back()
            };
            entry.copied()
        }) else {
            return;
        };
        let record = self.load(entry, storage);
        let mut restored = Vec::with_capacity(record.writes.len());
        for w in record.writes.iter().rev() {
            let now = storage.get(&w.key);
            let version = Version(now.as_ref().map_or(0, |s| s.version.0) + 1);
            let after = match &w.change {
                Recorded::Add(words) => {
                    let old = now.and_then(|s| storage.fetch(&s.value));
                    let sum = add_words(old.as_deref().unwrap_or(&[]), &negate_words(words));
                    // An addition that made the object takes it away again, unless others have
                    // added to it since.
                    let keeps = w.before.is_some() || sum.iter().any(|b| *b != 0);
                    let value = Value::Inline(sum);
                    keeps.then_some(Stored {
                        version,
                        epoch: Epoch(0),
                        value,
                    })
                }
                Recorded::Put(_) | Recorded::Delete => {
                    w.before.clone().map(|s| Stored { version, ..s })
                }
            };
            storage.put(&w.key, after.clone());
            restored.push((w.key.clone(), after));
        }
        let undone = UndoneRecord {
            source: victim,
            seq: entry.seq,
            at: entry.at,
            restored,
        };
        let step = self.log(&Record::Undone(undone), entry.epoch, storage);
        self.undoing.push_back((step, entry.lsn));
        if let Some(source) = self.sources.get_mut(&victim) {
            if bites(Tooth::UndoneForward) {
                source.index.pop_front();
            } else {
                source.index.pop_back();
            }
            source.executed = entry.at.before();
            source.committed = source.committed.min(source.executed);
        }
        self.counters.undone += 1;
    }

    fn load<S: Storage>(&self, entry: Entry, storage: &mut S) -> OpRecord {
        let body = storage
            .load(entry.lsn)
            .expect("a kept undo record is in the log");
        match Record::from_parts(crate::record::KIND_OP, &body) {
            Ok(Record::Op(record)) => record,
            _ => panic!(
                "log position {} does not hold the operation it was given",
                entry.lsn
            ),
        }
    }

    fn held_of<S: Storage>(&self, victim: Life, storage: &mut S) -> Vec<Held> {
        let Some(source) = self.sources.get(&victim) else {
            return Vec::new();
        };
        source
            .index
            .iter()
            .map(|entry| {
                let record = self.load(*entry, storage);
                let mut supplies: Vec<NodeId> = Vec::new();
                for p in &record.participants {
                    let own = p.node == self.port.node();
                    if own || record.carried.iter().any(|u| u.home == p.node) {
                        supplies.push(p.node);
                    }
                }
                Held {
                    seq: entry.seq,
                    epoch: entry.epoch,
                    previous: record.previous,
                    participants: record.participants,
                    supplies,
                }
            })
            .collect()
    }

    /// The operation as far as this record holds it.
    fn rebuild<S: Storage>(&self, victim: Life, seq: Seq, storage: &mut S) -> Option<Operation> {
        let entry = *self
            .sources
            .get(&victim)?
            .index
            .iter()
            .find(|e| e.seq == seq)?;
        let record = self.load(entry, storage);
        let home = self.port.node();
        let mut updates: Vec<Update> = record.carried;
        for w in record.writes {
            let change = match w.change {
                Recorded::Put(value) => Change::Put(storage.fetch(&value)?),
                Recorded::Delete => Change::Delete,
                Recorded::Add(words) => Change::Add(words),
            };
            updates.push(Update {
                home,
                key: w.key,
                change,
            });
        }
        Some(Operation {
            id: record.id,
            epoch: record.epoch,
            previous: record.previous,
            participants: record.participants,
            updates,
        })
    }
}
