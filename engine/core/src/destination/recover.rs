//! Restart of a destination from its log (b.8, BOOT): which lives are known, what is kept for undo,
//! and the marks.
//!
//! The hands load the checkpoint (objects, and the [`Image`] that was encoded with it), then feed
//! every durable record in order. Records at or below the checkpoint only refill the undo index;
//! later ones are applied to the objects as well.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use super::{Destination, Entry, Source, add_words};
use crate::ids::{Epoch, Incarnation, Life, Lsn, NodeId, StreamSeq, Version};
use crate::op::{Bytes, Key};
use crate::record::{OpRecord, Record, Recorded, Storage, Stored, Value};
use crate::wire::{Malformed, Reader, Wire};
use crate::wire_struct;

/// What a destination knows besides its objects; part of every checkpoint.
#[derive(Debug, Default)]
pub struct Image {
    pub(super) sources: BTreeMap<Life, Source>,
    pub(super) gone: BTreeMap<NodeId, Incarnation>,
    pub(super) rows: BTreeMap<Life, Lsn>,
    pub(super) minimum: Epoch,
    pub(super) ceiling: Epoch,
    pub(super) end: Lsn,
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
    /// Encodes what [`Image::decode`] needs, as of the newest executed state. Kept undo records
    /// are not part of it: they are read from the log again.
    #[must_use]
    pub fn image(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let rows: Vec<Row> = self
            .sources
            .iter()
            .map(|(&life, s)| Row {
                life,
                fenced: s.fenced,
                gone: s.gone,
                executed: s.executed,
            })
            .collect();
        rows.put(&mut out);
        let gone: Vec<(NodeId, Incarnation)> = self.gone.iter().map(|(&n, &i)| (n, i)).collect();
        gone.put(&mut out);
        let rows: Vec<Life> = self.rows.keys().copied().collect();
        rows.put(&mut out);
        self.marks_logged.put(&mut out);
        out
    }
}

impl Image {
    /// An image encoded by [`Destination::image`]; empty input is the state before the first start.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn decode(bytes: &[u8]) -> Result<Image, Malformed> {
        let mut image = Image::default();
        if bytes.is_empty() {
            return Ok(image);
        }
        let mut input = Reader::new(bytes);
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
                executed,
                committed: executed,
                ..Source::default()
            };
            image.sources.insert(life, source);
        }
        image.gone = Vec::<(NodeId, Incarnation)>::take(&mut input)?
            .into_iter()
            .collect();
        let rows = Vec::<Life>::take(&mut input)?;
        image.rows = rows.into_iter().map(|life| (life, Lsn(0))).collect();
        (image.minimum, image.ceiling) = Wire::take(&mut input)?;
        input.finish("image")?;
        Ok(image)
    }

    /// Feeds the next durable record. `fresh` tells that it lies after the checkpoint, so that its
    /// effects are not in the objects yet.
    ///
    /// # Errors
    /// [`RecoverError`].
    pub fn replay<S: Storage>(
        &mut self,
        lsn: Lsn,
        (kind, body): (u8, &[u8]),
        fresh: bool,
        storage: &mut S,
    ) -> Result<(), RecoverError> {
        self.end = lsn;
        let record = Record::from_parts(kind, body).map_err(RecoverError::Malformed)?;
        match record {
            Record::Op(op) => return self.replay_op(lsn, &op, fresh, storage),
            Record::Undone(undone) => {
                let source = self.sources.entry(undone.source).or_default();
                while source.index.back().is_some_and(|e| e.at >= undone.at) {
                    source.index.pop_back();
                }
                if fresh {
                    source.executed = undone.at.before();
                    source.committed = source.executed;
                    for (key, stored) in undone.restored {
                        storage.put(&key, stored);
                    }
                }
            }
            Record::Fence(life) if fresh => self.sources.entry(life).or_default().fenced = true,
            Record::Row(life) if fresh => {
                self.rows.insert(life, lsn);
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
                self.sources.entry(base.source).or_insert_with(|| Source {
                    executed: before,
                    committed: before,
                    ..Source::default()
                });
            }
            Record::Marks { minimum, ceiling } => {
                self.minimum = self.minimum.max(minimum);
                self.ceiling = self.ceiling.max(ceiling);
            }
            Record::Fence(_) | Record::Row(_) | Record::Gone(_) | Record::Base(_) => {}
        }
        Ok(())
    }

    /// Call once after the last record: drops undo below the durable m.
    pub fn finish(&mut self) {
        let minimum = self.minimum;
        for source in self.sources.values_mut() {
            while source.index.front().is_some_and(|e| e.epoch < minimum) {
                source.index.pop_front();
            }
        }
        self.sources.retain(|_, s| !(s.gone && s.index.is_empty()));
    }

    fn replay_op<S: Storage>(
        &mut self,
        lsn: Lsn,
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
        if fresh {
            let expected = StreamSeq(source.executed.0 + 1);
            if op.at != expected {
                return Err(RecoverError::Gap {
                    source: life,
                    found: op.at,
                    expected,
                });
            }
            source.executed = op.at;
            source.committed = op.at;
        }
        source.index.push_back(Entry {
            at: op.at,
            seq: op.id.seq,
            epoch: op.epoch,
            lsn,
        });
        self.ceiling = self.ceiling.max(op.epoch);
        if fresh {
            for w in &op.writes {
                redo(&w.key, &w.change, op.epoch, storage);
            }
        }
        Ok(())
    }
}

fn redo<S: Storage>(key: &Key, change: &Recorded, epoch: Epoch, storage: &mut S) {
    let before = storage.get(key);
    let version = Version(before.as_ref().map_or(0, |s| s.version.0) + 1);
    let after = match change {
        Recorded::Put(value) => Some(Stored {
            version,
            epoch,
            value: value.clone(),
        }),
        Recorded::Delete => None,
        Recorded::Add(words) => {
            let old = before
                .and_then(|s| storage.fetch(&s.value))
                .unwrap_or_else(|| Bytes::from([]));
            let value = Value::Inline(add_words(&old, words));
            Some(Stored {
                version,
                epoch: Epoch(0),
                value,
            })
        }
    };
    storage.put(key, after);
}
