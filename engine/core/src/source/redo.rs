//! What a first source keeps of its operations: what is executed and committed everywhere, and which
//! objects unfinished ones write.
//!
//! Invariants: I3, and I11 through [`Redo::bound`].

use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;

use super::Outbox;
use crate::ids::{Epoch, Life, NodeId, OpId, Seq, StreamSeq};
use crate::op::{Key, Operation, Participant, Range, Update};
use crate::teeth::{Tooth, bites};

/// Operations that this node stamped itself, from stamp to stability.
#[derive(Debug, Default)]
pub struct Redo {
    /// Seq of the front of `ops`.
    first: u64,
    ops: VecDeque<Arc<Operation>>,
    /// All operations up to here are everywhere committed.
    done: Seq,
    /// All operations up to here have executed at the next tier of every participant.
    executed: Seq,
    previous: Epoch,
    next_at: BTreeMap<NodeId, StreamSeq>,
    /// Objects written by operations that are not everywhere committed, with the last writer.
    touched: BTreeMap<(NodeId, Key), Seq>,
}

impl Redo {
    /// An empty redo; the first operation gets seq 1.
    #[must_use]
    pub fn new() -> Redo {
        Redo {
            first: 1,
            ..Redo::default()
        }
    }

    /// O1: stamps an operation at `epoch` and enters it, before anything is sent.
    pub fn stamp(&mut self, source: Life, epoch: Epoch, updates: Vec<Update>) -> Arc<Operation> {
        assert!(epoch >= self.previous, "a source's epochs do not decrease");
        let mut homes: Vec<NodeId> = updates.iter().map(|u| u.home).collect();
        homes.sort_unstable();
        homes.dedup();
        let participants = homes
            .into_iter()
            .map(|node| {
                let at = self.next_at.entry(node).or_insert(StreamSeq(1));
                let participant = Participant { node, at: *at };
                at.0 += 1;
                participant
            })
            .collect();
        let seq = self.last().0 + 1;
        for u in &updates {
            self.touched.insert((u.home, u.key.clone()), Seq(seq));
        }
        let op = Arc::new(Operation {
            id: OpId {
                source,
                seq: Seq(seq),
            },
            epoch,
            previous: self.previous,
            participants,
            updates,
        });
        self.previous = epoch;
        self.ops.push_back(op.clone());
        op
    }

    /// Seq of the newest operation.
    #[must_use]
    pub fn last(&self) -> Seq {
        Seq(self.first + self.ops.len() as u64 - 1)
    }

    /// All operations up to and including this one are everywhere committed.
    #[must_use]
    pub fn done(&self) -> Seq {
        self.done
    }

    /// All operations up to and including this one have executed.
    #[must_use]
    pub fn executed(&self) -> Seq {
        self.executed
    }

    /// Recomputes the prefixes after progress.
    pub fn advance(&mut self, outbox: &Outbox) {
        let reached = |op: &Operation, committed: bool| {
            op.participants.iter().all(|p| {
                outbox.state(op.id.source, p.node).is_some_and(|s| {
                    p.at <= if committed && !bites(Tooth::FinishedOnReply) {
                        s.committed
                    } else {
                        s.executed.max(s.committed)
                    }
                })
            })
        };
        while let Some(op) = self.get(Seq(self.executed.0 + 1)) {
            if !reached(op, false) {
                break;
            }
            self.executed.0 += 1;
        }
        while let Some(op) = self.get(Seq(self.done.0 + 1)).cloned() {
            if !reached(&op, true) {
                break;
            }
            self.done.0 += 1;
            for u in &op.updates {
                let key = (u.home, u.key.clone());
                if self.touched.get(&key) == Some(&op.id.seq) {
                    self.touched.remove(&key);
                }
            }
        }
    }

    /// Forgets operations below `minimum` (b.5) and, when told so, everywhere committed ones.
    pub fn purge(&mut self, minimum: Epoch, early: bool) {
        while let Some(op) = self.ops.front() {
            if op.id.seq > self.done || (op.epoch >= minimum && !early) {
                break;
            }
            self.ops.pop_front();
            self.first += 1;
        }
    }

    /// lb: epoch of the first operation that is not everywhere committed.
    #[must_use]
    pub fn bound(&self) -> Option<Epoch> {
        self.get(Seq(self.done.0 + 1)).map(|op| op.epoch)
    }

    /// Whether m has not passed everything that was stamped.
    #[must_use]
    pub fn awaits(&self, minimum: Epoch) -> bool {
        self.last() > Seq(0) && self.previous >= minimum
    }

    /// The last unfinished operation of this source that wrote in `range`.
    #[must_use]
    pub fn last_touching(&self, home: NodeId, range: &Range) -> Option<Seq> {
        self.touched_between(home, range).map(|(_, &seq)| seq).max()
    }

    /// Objects in `range` that unfinished operations of this source write.
    pub fn touched_in<'a>(
        &'a self,
        home: NodeId,
        range: &'a Range,
    ) -> impl Iterator<Item = &'a Key> {
        self.touched_between(home, range).map(|((_, key), _)| key)
    }

    fn touched_between<'a>(
        &'a self,
        home: NodeId,
        range: &'a Range,
    ) -> impl Iterator<Item = (&'a (NodeId, Key), &'a Seq)> {
        let from = (home, Key::at(range.space, range.lo));
        self.touched
            .range(from..)
            .take_while(move |((h, key), _)| *h == home && range.holds(key))
    }

    /// The last unfinished operation of this source that wrote `key`.
    #[must_use]
    pub fn writer_of(&self, home: NodeId, key: &Key) -> Option<&Arc<Operation>> {
        let seq = self.touched.get(&(home, key.clone()))?;
        self.get(*seq)
    }

    /// Kept operations after `seq`, in order.
    pub fn after(&self, seq: Seq) -> impl Iterator<Item = &Arc<Operation>> {
        let skip = (seq.0 + 1).saturating_sub(self.first) as usize;
        self.ops.iter().skip(skip)
    }

    fn get(&self, seq: Seq) -> Option<&Arc<Operation>> {
        self.ops.get(seq.0.checked_sub(self.first)? as usize)
    }
}
