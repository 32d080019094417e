//! Restart of a destination from its logs (b.8, BOOT): which lives are known, what is kept for undo,
//! and the marks.
//!
//! The hands load the checkpoint (objects, and the [`Image`] that was encoded with it), merge the
//! durable records of all logs by their steps, and feed them in that order. Records of steps that
//! the checkpoint covers only refill the undo index; later ones are applied to the objects as well.
//! The number of shards may be another than when the records were written: a shard then keeps
//! records of other logs for undo and heeds the writes to its own objects in them.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;

use super::shard::{Kept, Replaced, ShardSet, extents_replaced, shard_of};
use super::{Destination, Entry, Source, objects};
use crate::identity::StoreMark;
use crate::ids::{Epoch, Incarnation, Life, NodeId, Step, StorageId, StreamSeq};
use crate::record::{Objects, OpRecord, Position, Record, UndoneRecord};
use crate::wire::{Malformed, Reader, Wire};
use crate::wire_struct;

/// What a destination knows besides its objects; part of every checkpoint.
#[derive(Debug)]
pub struct Image {
    pub(super) sources: BTreeMap<Life, Source>,
    pub(super) gone: BTreeMap<NodeId, Incarnation>,
    pub(super) rows: BTreeMap<Life, Step>,
    pub(super) minimum: Epoch,
    pub(super) ceiling: Epoch,
    /// The newest step known.
    pub(super) step: Step,
    /// Which storage this is of, and the newest step that counts ([`StoreMark`]).
    pub(super) store: StoreMark,
    /// Steps up to here are covered by the checkpoint.
    covered: Step,
    /// Records kept for undo, per shard.
    pub(super) kept: Vec<BTreeMap<Life, VecDeque<Kept>>>,
    /// Extents that those operations replaced, per shard.
    pub(super) replaced: Vec<Replaced>,
    /// Pieces that are still to come of the operation replayed last.
    missing: Option<(Life, StreamSeq, u16)>,
}

/// Why a log cannot be replayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecoverError {
    /// A record does not decode although its checksum is right: another version, or a bug.
    Malformed(Malformed),
    /// A stream skips a position: records are missing.
    Gap {
        /// The source.
        source: Life,
        /// Position that was found.
        found: StreamSeq,
        /// Position that was expected.
        expected: StreamSeq,
    },
    /// An operation over several shards lacks a record in one of their logs.
    Piece {
        /// The source.
        source: Life,
        /// Position of the operation.
        at: StreamSeq,
    },
    /// A record's step is older than the one before it in the order of steps.
    Order {
        /// The step.
        step: Step,
    },
}

impl core::fmt::Display for RecoverError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            RecoverError::Malformed(m) => write!(f, "log record: {m}"),
            RecoverError::Gap {
                source,
                found,
                expected,
            } => {
                write!(
                    f,
                    "log of {source} continues at {found} where {expected} should be"
                )
            }
            RecoverError::Piece { source, at } => {
                write!(f, "the operation of {source} at {at} lacks a record")
            }
            RecoverError::Order { step } => write!(f, "the record of step {step} comes too late"),
        }
    }
}

impl core::error::Error for RecoverError {}

struct Row {
    life: Life,
    fenced: bool,
    gone: bool,
    executed: StreamSeq,
}
wire_struct!(Row {
    life,
    fenced,
    gone,
    executed
});

impl Destination {
    /// Encodes what [`Image::decode`] needs, as of everything ordered so far. Kept undo records
    /// are not part of it: they are read from the logs again.
    #[must_use]
    pub fn image(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.step.put(&mut out);
        let rows: Vec<Row> = self
            .sources
            .iter()
            .map(|(&life, s)| Row {
                life,
                fenced: s.fenced,
                gone: s.gone,
                executed: s.ordered,
            })
            .collect();
        rows.put(&mut out);
        let gone: Vec<(NodeId, Incarnation)> = self.gone.iter().map(|(&n, &i)| (n, i)).collect();
        gone.put(&mut out);
        let rows: Vec<Life> = self.rows.keys().copied().collect();
        rows.put(&mut out);
        self.marks_logged.put(&mut out);
        self.counting.put(&mut out);
        out
    }
}

impl Image {
    /// An image encoded by [`Destination::image`], for a node of `shards` shards that has this
    /// storage; empty input is the state before the first start.
    ///
    /// # Errors
    /// [`Malformed`].
    ///
    /// # Panics
    /// If there are no shards, or more than [`super::shard::SHARDS_MAX`].
    pub fn decode(bytes: &[u8], storage: StorageId, shards: u32) -> Result<Image, Malformed> {
        assert!((1..=super::shard::SHARDS_MAX).contains(&shards));
        let mut image = Image {
            sources: BTreeMap::new(),
            gone: BTreeMap::new(),
            rows: BTreeMap::new(),
            minimum: Epoch(0),
            ceiling: Epoch(0),
            step: Step(0),
            store: StoreMark {
                storage,
                commit: Step(0),
            },
            covered: Step(0),
            kept: (0..shards).map(|_| BTreeMap::new()).collect(),
            replaced: (0..shards).map(|_| Replaced::new()).collect(),
            missing: None,
        };
        if bytes.is_empty() {
            return Ok(image);
        }
        let mut input = Reader::new(bytes);
        image.covered = Wire::take(&mut input)?;
        image.step = image.covered;
        for row in Vec::<Row>::take(&mut input)? {
            let Row {
                life,
                fenced,
                gone,
                executed,
            } = row;
            let source = Source {
                fenced,
                gone,
                ..Source::at(executed)
            };
            image.sources.insert(life, source);
        }
        image.gone = Vec::<(NodeId, Incarnation)>::take(&mut input)?
            .into_iter()
            .collect();
        let rows = Vec::<Life>::take(&mut input)?;
        image.rows = rows.into_iter().map(|life| (life, Step(0))).collect();
        (image.minimum, image.ceiling) = Wire::take(&mut input)?;
        image.store.commit = Wire::take(&mut input)?;
        input.finish("image")?;
        Ok(image)
    }

    /// Feeds the next durable record in the order of steps (of equal steps, in any order).
    /// `storage` takes objects of all shards.
    ///
    /// # Errors
    /// [`RecoverError`].
    pub fn replay<S: Objects>(
        &mut self,
        position: Position,
        (kind, body): (u8, &[u8]),
        storage: &mut S,
    ) -> Result<(), RecoverError> {
        let (step, record) = Record::from_parts(kind, body).map_err(RecoverError::Malformed)?;
        let fresh = step > self.covered;
        if fresh && step < self.step {
            return Err(RecoverError::Order { step });
        }
        if let Some((source, at, _)) = self.missing {
            let next = matches!(&record, Record::Op(op) if (op.id.source, op.at) == (source, at));
            if fresh && !next {
                return Err(RecoverError::Piece { source, at });
            }
        }
        self.step = self.step.max(step);
        if !matches!(record, Record::Marks { .. }) {
            self.store.commit = self.store.commit.max(step);
        }
        match record {
            Record::Op(op) => {
                let undo = Kept::undo_of(body.len());
                self.replay_op((step, position, undo), &op, fresh, storage)?;
            }
            Record::Undone(undone) => self.replay_undone(undone, fresh, storage),
            Record::Fence(life) if fresh => self.sources.entry(life).or_default().fenced = true,
            Record::Row(life) if fresh => {
                self.rows.insert(life, step);
            }
            Record::Gone(life) if fresh => {
                let gone = self.gone.entry(life.node).or_default();
                *gone = (*gone).max(life.incarnation);
                self.rows.remove(&life);
                if let Some(source) = self.sources.get_mut(&life) {
                    source.gone = true;
                }
            }
            Record::Base(base) if fresh => {
                let before = base.base.before();
                self.sources
                    .entry(base.source)
                    .or_insert_with(|| Source::at(before));
            }
            Record::Marks { minimum, ceiling } => {
                self.minimum = self.minimum.max(minimum);
                self.ceiling = self.ceiling.max(ceiling);
            }
            Record::Fence(_)
            | Record::Row(_)
            | Record::Gone(_)
            | Record::Base(_)
            | Record::Entered(_) => {}
        }
        Ok(())
    }

    /// Call once after the last record: drops undo below the durable m.
    ///
    /// # Errors
    /// [`RecoverError::Piece`]: the last operation is not whole.
    pub fn finish(&mut self) -> Result<(), RecoverError> {
        if let Some((source, at, _)) = self.missing {
            return Err(RecoverError::Piece { source, at });
        }
        let minimum = self.minimum;
        for source in self.sources.values_mut() {
            while source.index.front().is_some_and(|e| e.epoch < minimum) {
                source.index.pop_front();
            }
        }
        self.sources.retain(|_, s| !(s.gone && s.index.is_empty()));
        for kept in &mut self.kept {
            kept.retain(|life, kept| {
                while kept.front().is_some_and(|k| k.epoch < minimum) {
                    kept.pop_front();
                }
                !kept.is_empty() && self.sources.contains_key(life)
            });
        }
        for (replaced, kept) in self.replaced.iter_mut().zip(&self.kept) {
            replaced.retain(|(life, at), _| {
                let kept = kept.get(life);
                kept.is_some_and(|kept| kept.iter().any(|k| k.at == *at))
            });
        }
        Ok(())
    }

    /// What the home will say of its storage.
    #[must_use]
    pub fn store(&self) -> StoreMark {
        self.store
    }

    /// Records that are kept for undo. One may be named more than once.
    pub fn kept(&self) -> impl Iterator<Item = Position> + '_ {
        let lists = self.kept.iter().flat_map(BTreeMap::values);
        lists.flatten().map(|kept| kept.position)
    }

    fn replay_undone<S: Objects>(&mut self, undone: UndoneRecord, fresh: bool, storage: &mut S) {
        if !fresh && !self.sources.contains_key(&undone.source) {
            // Gone and purged before the checkpoint.
            return;
        }
        let source = self.sources.entry(undone.source).or_default();
        while source.index.pop_back_if(|e| e.at >= undone.at).is_some() {}
        for kept in &mut self.kept {
            if let Some(kept) = kept.get_mut(&undone.source) {
                while kept.pop_back_if(|k| k.at >= undone.at).is_some() {}
            }
        }
        for replaced in &mut self.replaced {
            replaced.retain(|&(life, at), _| life != undone.source || at < undone.at);
        }
        if fresh {
            let at = undone.at.before();
            (source.ordered, source.executed, source.committed) = (at, at, at);
            for (key, stored) in undone.restored {
                storage.put(&key, stored);
            }
        }
    }

    fn replay_op<S: Objects>(
        &mut self,
        (step, position, undo): (Step, Position, u64),
        op: &OpRecord,
        fresh: bool,
        storage: &mut S,
    ) -> Result<(), RecoverError> {
        let life = op.id.source;
        if !fresh && !self.sources.contains_key(&life) {
            // Gone and purged before the checkpoint.
            return Ok(());
        }
        let source = self.sources.entry(life).or_default();
        let pending = self.missing.take().map_or(0, |(_, _, left)| left);
        if fresh && pending == 0 {
            let expected = StreamSeq(source.ordered.0 + 1);
            if op.at != expected {
                return Err(RecoverError::Gap {
                    source: life,
                    found: op.at,
                    expected,
                });
            }
            (source.ordered, source.executed, source.committed) = (op.at, op.at, op.at);
        }
        if fresh {
            let left = if pending > 0 { pending } else { op.piece.count };
            self.missing = (left > 1).then_some((life, op.at, left - 1));
        }
        let count = self.kept.len() as u32;
        let mut shards = ShardSet::default();
        for w in &op.writes {
            shards.insert(shard_of(w.key.space, count));
        }
        if shards.is_empty() {
            shards.insert(0);
        }
        for number in shards.iter() {
            let kept = self.kept[number as usize].entry(life).or_default();
            kept.push_back(Kept {
                at: op.at,
                seq: op.id.seq,
                epoch: op.epoch,
                position,
                undo,
            });
        }
        for w in &op.writes {
            let number = shard_of(w.key.space, count);
            for extent in extents_replaced(core::slice::from_ref(w)) {
                let replaced = self.replaced[number as usize].entry((life, op.at));
                replaced.or_default().push(extent);
            }
        }
        match source.index.back_mut().filter(|e| e.at == op.at) {
            Some(entry) => entry.shards.extend(shards),
            None => source.index.push_back(Entry {
                at: op.at,
                seq: op.id.seq,
                epoch: op.epoch,
                step,
                shards,
                waiting: ShardSet::default(),
            }),
        }
        self.ceiling = self.ceiling.max(op.epoch);
        if fresh {
            for w in &op.writes {
                objects::redo(&w.key, &w.change, op.epoch, storage);
            }
        }
        Ok(())
    }
}
