//! The threads that block: one writes and syncs extents, one writes checkpoints.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam_channel::Receiver;
use lowtide_engine_core::op::Bytes;

use super::{Durability, encode_position};
use crate::log;
use crate::log::commit::{GroupPin, Publisher};
use crate::medium::Volume;
use crate::store::Store;
use crate::store::extents::{ExtentError, ExtentFile, ExtentRef};
use crate::store::overlay::{DurablePoint, Frozen, checkpoint_all};

/// Extents and batches that one sync serves at most.
const BULK_PER_SYNC: usize = 64;

/// Work of the bulk thread, done in the order given.
#[derive(Debug)]
pub(super) enum Bulk {
    /// Write this extent; its data is in [`Unwritten`].
    Write(ExtentRef),
    /// These records may commit once what was given before is durable.
    Batch(BulkBatch),
}

/// Records that point to extents, or stand behind such.
#[derive(Debug)]
pub(super) struct BulkBatch {
    pub(super) publisher: Publisher,
    /// The shard's batches that have come here and not gone on.
    pub(super) under_way: Arc<AtomicU64>,
    pub(super) pin: GroupPin,
    pub(super) end: log::BatchEnd,
}

/// Data of extents that are reserved and not written, by offset. Their sources hold them until they
/// are committed, which bounds them.
#[derive(Debug, Default)]
pub(super) struct Unwritten(Mutex<HashMap<u64, Bytes>>);

impl Unwritten {
    pub(super) fn map(&self) -> MutexGuard<'_, HashMap<u64, Bytes>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn get(&self, extent: &ExtentRef) -> Option<Bytes> {
        self.map().get(&extent.offset).cloned()
    }
}

/// Writes and syncs extents, then lets the committer have the records that point to them.
pub(super) struct BulkSync {
    pub(super) volume: Arc<dyn Volume>,
    pub(super) extents: Arc<ExtentFile>,
    pub(super) unwritten: Arc<Unwritten>,
    pub(super) durability: Arc<Durability>,
}

impl BulkSync {
    pub(super) fn run(self, work: &Receiver<Bulk>) {
        let mut waiting: Vec<BulkBatch> = Vec::new();
        let mut given: Vec<ExtentRef> = Vec::new();
        while let Ok(first) = work.recv() {
            // One sync serves all batches that wait, and one write extents that follow each other.
            let rest = work.try_iter().take(BULK_PER_SYNC);
            for bulk in std::iter::once(first).chain(rest) {
                match bulk {
                    Bulk::Batch(batch) => waiting.push(batch),
                    Bulk::Write(extent) => given.push(extent),
                }
            }
            let mut done = self.write(&given);
            if !given.is_empty() {
                // What is taken next is there.
                let grown = || self.extents.grow_ahead(|| self.volume.free_bytes());
                done = done.and_then(|()| grown());
            }
            if let Err(error) = done {
                return self.durability.fail(error.to_string());
            }
            given.clear();
            if waiting.is_empty() {
                continue;
            }
            if let Err(error) = self.extents.sync() {
                return self.durability.fail(error.to_string());
            }
            for batch in waiting.drain(..) {
                batch.publisher.publish(batch.pin, batch.end);
                batch.under_way.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }

    fn write(&self, given: &[ExtentRef]) -> Result<(), ExtentError> {
        let data = given.iter().map(|extent| self.unwritten.get(extent));
        let data: Option<Vec<Bytes>> = data.collect();
        let data = data.expect("it stays until it is written");
        let extents = given.iter().zip(&data).map(|(e, data)| (*e, &**data));
        let extents: Vec<(ExtentRef, &[u8])> = extents.collect();
        self.extents.fill_all(&extents)?;
        // From here on they are read from the file.
        let mut unwritten = self.unwritten.map();
        for extent in given {
            unwritten.remove(&extent.offset);
        }
        Ok(())
    }
}

/// A part of a checkpoint; it is whole with the front's part and one of every shard.
#[derive(Debug)]
pub(super) enum CheckpointPart {
    /// The mind's image, and the ends of logs that no shard has.
    Front(Vec<u8>, Vec<(u32, log::Lsn)>),
    /// A shard's objects.
    Shard(u32, Arc<Frozen>),
}

/// Writes frozen overlays to the store once the WAL rule allows it.
pub(super) struct Checkpointer {
    pub(super) store: Arc<dyn Store>,
    pub(super) durability: Arc<Durability>,
    pub(super) shards: usize,
    /// Cleared when the checkpoint is written.
    pub(super) under_way: Arc<AtomicBool>,
    pub(super) wake: Box<dyn Fn() + Send>,
}

impl Checkpointer {
    pub(super) fn run(self, parts: &Receiver<CheckpointPart>) {
        let mut front = None;
        let mut shards: Vec<(u32, Arc<Frozen>)> = Vec::new();
        while let Ok(part) = parts.recv() {
            match part {
                CheckpointPart::Front(image, ends) => front = Some((image, ends)),
                CheckpointPart::Shard(number, frozen) => shards.push((number, frozen)),
            }
            if shards.len() < self.shards {
                continue;
            }
            let Some((image, ends)) = front.take() else {
                continue;
            };
            if !self.write(std::mem::take(&mut shards), &image, ends) {
                return;
            }
        }
    }

    /// Whether there may be another one.
    fn write(
        &self,
        shards: Vec<(u32, Arc<Frozen>)>,
        image: &[u8],
        mut ends: Vec<(u32, log::Lsn)>,
    ) -> bool {
        let mut parts = Vec::new();
        for (number, frozen) in shards {
            let Some(durable) = self.await_durable(number, &frozen) else {
                return false;
            };
            ends.push((number, frozen.point().lsn));
            parts.push((frozen, durable));
        }
        ends.sort_unstable_by_key(|(number, _)| *number);
        let ends: Vec<log::Lsn> = ends.into_iter().map(|(_, end)| end).collect();
        let position = encode_position(&ends, image);
        if let Err(error) = checkpoint_all(&parts, &*self.store, &position) {
            self.durability.fail(error.to_string());
            return false;
        }
        // Release pairs with the Acquire where the next one begins.
        self.under_way.store(false, Ordering::Release);
        (self.wake)();
        true
    }

    fn await_durable(&self, number: u32, frozen: &Frozen) -> Option<DurablePoint> {
        loop {
            let durable = self.durability.point(number);
            if frozen.is_durable(durable) {
                return Some(durable);
            }
            if self.durability.failure().is_some() {
                return None;
            }
            // The committer is a sync away; checkpoints are rare and in no hurry.
            std::thread::park_timeout(std::time::Duration::from_millis(2));
        }
    }
}
