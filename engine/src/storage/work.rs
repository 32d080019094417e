//! The threads that block: one syncs extents, one writes checkpoints.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crossbeam_channel::Receiver;

use super::{Durability, encode_position};
use crate::log;
use crate::log::commit::{GroupPin, Publisher};
use crate::store::Store;
use crate::store::extents::ExtentFile;
use crate::store::overlay::{DurablePoint, Frozen, checkpoint_all};

/// Records that point to extents, or stand behind such.
#[derive(Debug)]
pub(super) struct BulkBatch {
    pub(super) publisher: Publisher,
    /// The shard's batches that have come here and not gone on.
    pub(super) under_way: Arc<AtomicU64>,
    pub(super) pin: GroupPin,
    pub(super) end: log::Lsn,
}

/// Syncs extents, then lets the committer have the records that point to them.
pub(super) struct BulkSync {
    pub(super) extents: Arc<ExtentFile>,
    pub(super) durability: Arc<Durability>,
}

impl BulkSync {
    pub(super) fn run(self, batches: &Receiver<BulkBatch>) {
        while let Ok(first) = batches.recv() {
            // One sync serves all batches that wait.
            let mut waiting = vec![first];
            waiting.extend(batches.try_iter());
            if let Err(error) = self.extents.sync() {
                self.durability.fail(error.to_string());
                return;
            }
            for batch in waiting {
                batch.publisher.publish(batch.pin, batch.end);
                batch.under_way.fetch_sub(1, Ordering::AcqRel);
            }
        }
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
