//! Streams at the front: parts in order, what was executed and committed, undo that may go.

use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;

use super::Destination;
use super::shard::{Order, ShardSet, Task};
use crate::ids::{Epoch, Life, NodeId, Seq, Step, StreamSeq};
use crate::message::{Message, Parts, StreamBase, StreamState};
use crate::op::Operation;
use crate::record::{Piece, Record};
use crate::room::RoomAt;
use crate::teeth::{Tooth, bites};

/// An operation that was ordered and whose undo records are kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) at: StreamSeq,
    pub(super) seq: Seq,
    pub(super) epoch: Epoch,
    pub(super) step: Step,
    /// Shards that have a piece of it.
    pub(super) shards: ShardSet,
    /// Those of them that have not executed it.
    pub(super) waiting: ShardSet,
}

/// One source life as this home knows it.
#[derive(Debug, Default)]
pub(super) struct Source {
    pub(super) fenced: bool,
    pub(super) gone: bool,
    pub(super) ordered: StreamSeq,
    pub(super) executed: StreamSeq,
    pub(super) committed: StreamSeq,
    /// Operations with undo records, ascending; the last one is at `ordered`.
    pub(super) index: VecDeque<Entry>,
    /// Sessions that announced the stream and want its progress.
    pub(super) hops: BTreeSet<NodeId>,
    /// Progress to tell.
    pub(super) dirty: bool,
}

impl Source {
    /// Whether anything of it can go once `minimum` is durable.
    pub(super) fn is_past(&self, minimum: Epoch) -> bool {
        let first = self.index.front();
        first.map_or(self.gone, |e| e.epoch < minimum && e.at <= self.committed)
    }

    /// A stream that has come as far as `at`, all of it durable.
    pub(super) fn at(at: StreamSeq) -> Source {
        Source {
            ordered: at,
            executed: at,
            committed: at,
            ..Source::default()
        }
    }

    pub(super) fn entry(&mut self, at: StreamSeq) -> Option<&mut Entry> {
        let first = self.index.front()?.at;
        let place = at.0.checked_sub(first.0)?;
        self.index.get_mut(usize::try_from(place).ok()?)
    }

    /// Moves `executed` and `committed` as far as shards and logs allow.
    pub(super) fn advance(&mut self, durable: Step) {
        let before = (self.executed, self.committed);
        while self.executed < self.ordered {
            let next = StreamSeq(self.executed.0 + 1);
            if self.entry(next).is_some_and(|e| !e.waiting.is_empty()) {
                break;
            }
            self.executed = next;
        }
        while self.committed < self.executed {
            let next = StreamSeq(self.committed.0 + 1);
            let pending = self.entry(next).is_some_and(|e| e.step > durable);
            if pending && !bites(Tooth::CommittedEarly) {
                break;
            }
            self.committed = next;
        }
        self.dirty |= before != (self.executed, self.committed);
    }
}

impl Destination {
    pub(super) fn announce(&mut self, from: Life, base: StreamBase) {
        let refused = self.is_refused(from) || self.is_refused(base.source);
        if base.home != self.port.node() || refused || !self.member.is_joined() {
            return;
        }
        if !self.sources.contains_key(&base.source) && base.base.0 > 1 {
            // Positions below the base were committed and purged in an earlier life of this home.
            self.log(Record::Base(base));
        }
        let source = self
            .sources
            .entry(base.source)
            .or_insert_with(|| Source::at(base.base.before()));
        source.hops.insert(from.node);
        self.counted.insert(base.source);
        source.dirty = true;
        if bites(Tooth::PositionForgotten) {
            (source.ordered, source.executed) = (base.base.before(), base.base.before());
        }
    }

    /// O2.
    pub(super) fn reintegrate(&mut self, parts: Parts) {
        let Parts { homes, op } = parts;
        let own = self.port.node();
        let Some(at) = op.at(own).filter(|_| homes.contains(&own)) else {
            self.counters.refused_order += 1;
            return;
        };
        if self.is_refused(op.id.source) {
            self.counters.refused_fenced += 1;
            return;
        }
        if bites(Tooth::StampedRefused) && !self.has_room() {
            return;
        }
        let Some(source) = self.sources.get_mut(&op.id.source) else {
            self.counters.refused_order += 1;
            return;
        };
        if at <= source.ordered {
            self.counters.duplicates += 1;
            source.dirty = true;
        } else if at.0 > source.ordered.0 + 1
            || op.epoch < self.port.minimum()
            || op.updates_for(own).next().is_none()
        {
            // The second cannot be: m passes an epoch only when its operations are committed. Nor
            // can the third: payloads are kept as long as anybody may need them.
            self.counters.refused_order += 1;
        } else {
            self.execute(op, at);
        }
    }

    /// Orders an operation of every shard that keeps an object of it, in one step.
    pub(super) fn execute(&mut self, op: Arc<Operation>, at: StreamSeq) {
        // A message raised the epoch before; a stamp can still not lie ahead of it.
        self.port.raise(op.epoch);
        let mut shards = ShardSet::default();
        for update in op.updates_for(self.port.node()) {
            shards.insert(self.shard_of(update.key.space));
        }
        let (life, seq, epoch) = (op.id.source, op.id.seq, op.epoch);
        let step = self.next_step();
        (self.logged, self.counting) = (step, step);
        let count = shards.len() as u16;
        for (number, index) in shards.iter().zip(0..) {
            let lane = &mut self.lanes[number as usize];
            let (op, piece) = (op.clone(), Piece { index, count });
            let task = Task::Execute { op, at, piece };
            lane.orders.push_back(Order { step, task });
            lane.unfinished.push_back((step, life, at));
        }
        let source = self.sources.entry(life).or_default();
        source.index.push_back(Entry {
            at,
            seq,
            epoch,
            step,
            shards,
            waiting: shards,
        });
        source.ordered = at;
        self.counters.executed += 1;
    }

    /// Undo records below the durable m go (b.6).
    pub(super) fn purge(&mut self) {
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
        self.tidy();
    }

    /// The shards let go of what is past undo, and of what durable undo steps have used.
    pub(super) fn tidy(&mut self) {
        let minimum = if bites(Tooth::PurgedEarly) {
            self.port.minimum()
        } else {
            self.minimum_durable
        };
        let durable = self.durable;
        self.order_all(|_| Task::Keep { durable, minimum });
    }

    pub(super) fn tell_progress(&mut self) {
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
        let room = self.has_room().then_some(self.member.view_id());
        if core::mem::replace(&mut self.said, room) != room {
            self.told.clear();
        }
        if self.told.len() < self.sessions.len() {
            for &node in self.sessions.keys().filter(|node| self.told.insert(**node)) {
                per_hop.entry(node).or_default();
            }
        }
        for (hop, streams) in per_hop {
            let room = room.map(|view| RoomAt { home, view });
            let room = room.into_iter().collect();
            self.port.send(hop, Message::Progress { streams, room });
        }
    }
}
