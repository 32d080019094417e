//! One shard's storage behind the mind's [`Storage`] trait: overlay, log, and its way to the
//! extents and to the committer.

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam_channel::Sender;
use lowtide_engine_core::destination::shard::Shard;
use lowtide_engine_core::ids::{Epoch, Lsn};
use lowtide_engine_core::op::{Bytes, Key, Range};
use lowtide_engine_core::record::{
    Extent, Objects, OpRecord, Position, Record, Storage, Stored, Value,
};
use lowtide_engine_core::session::Page;
use lowtide_engine_core::wire;

use super::work::{Bulk, BulkBatch, CheckpointPart, Unwritten};
use super::{Durability, StorageError, bounds, decode_key, encode_key, extent_ref};
use crate::log::commit::{GroupPin, Publisher};
use crate::log::{self, Append, Log, LogReader};
use crate::store::extents::ExtentFile;
use crate::store::overlay::{FreezePoint, Overlay};

/// What a shard's storage lets others see.
#[derive(Debug)]
pub struct ShardGauge {
    /// Bytes that its log takes, beyond what undoing what it keeps would take.
    free: AtomicU64,
    /// Why its log does not grow, in words, when it should.
    grows: Mutex<Option<String>>,
    /// Bytes that a checkpoint would write now.
    pub active_bytes: AtomicUsize,
    /// Bytes of objects held in memory in front of the store.
    pub overlay_bytes: AtomicUsize,
}

impl ShardGauge {
    fn words(&self) -> MutexGuard<'_, Option<String>> {
        self.grows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that its log takes, beyond what undoing what it keeps would take.
    #[must_use]
    pub fn free(&self) -> u64 {
        self.free.load(Ordering::Acquire)
    }

    /// Why its log does not grow, in words, when it should.
    #[must_use]
    pub fn grows(&self) -> Option<String> {
        self.words().clone()
    }
}

/// What all shards of a node share.
#[derive(Debug)]
pub(super) struct Common {
    pub(super) extents: Arc<ExtentFile>,
    pub(super) durability: Arc<Durability>,
    pub(super) bulk: Sender<Bulk>,
    /// Bulk data that is not in its file yet.
    pub(super) unwritten: Arc<Unwritten>,
    pub(super) checkpoints: Sender<CheckpointPart>,
    /// All logs, for undo after the number of shards has changed.
    pub(super) readers: Vec<LogReader>,
    /// Shards that need records of other logs than their own; no log is recycled meanwhile.
    pub(super) moved: AtomicU32,
    /// What should be free in each log so that new work may come, in bytes.
    pub(super) needed: AtomicU64,
    /// What each log keeps for itself, in bytes.
    pub(super) log_reserve: u64,
}

/// A shard's storage. Calls of [`Storage`] lie between [`ShardStorage::begin`] and
/// [`ShardStorage::finish`].
#[derive(Debug)]
pub struct ShardStorage {
    number: u32,
    overlay: Overlay,
    log: Log,
    publisher: Publisher,
    common: Arc<Common>,
    /// Group of the batch under way.
    group: u64,
    last_group: u64,
    appended: bool,
    placed: bool,
    /// Batches that the bulk thread has not handed to the committer.
    bulk_under_way: Arc<AtomicU64>,
    checkpoint_lsn: u64,
    /// It counts in [`Common::moved`].
    moved: bool,
    gauge: Arc<ShardGauge>,
    /// Its log had less than was needed when it looked last.
    is_short: bool,
}

impl ShardStorage {
    pub(super) fn new(
        number: u32,
        overlay: Overlay,
        log: log::commit::ShardLog,
        common: Arc<Common>,
        checkpoint_lsn: u64,
    ) -> ShardStorage {
        common.moved.fetch_add(1, Ordering::Relaxed);
        let free = log.log.free_bytes().saturating_sub(common.log_reserve);
        ShardStorage {
            number,
            overlay,
            log: log.log,
            publisher: log.publisher,
            common,
            group: 0,
            last_group: 0,
            appended: false,
            placed: false,
            bulk_under_way: Arc::default(),
            checkpoint_lsn,
            moved: true,
            gauge: Arc::new(ShardGauge {
                free: AtomicU64::new(free),
                grows: Mutex::new(None),
                active_bytes: AtomicUsize::new(0),
                overlay_bytes: AtomicUsize::new(0),
            }),
            is_short: false,
        }
    }

    /// What others may see of it.
    #[must_use]
    pub fn gauge(&self) -> Arc<ShardGauge> {
        self.gauge.clone()
    }

    /// A batch begins; its records belong to this commit group, which is kept open by a pin.
    pub fn begin(&mut self, group: u64) {
        self.group = group;
    }

    /// Ends a batch: hands what was appended to the committer, gives log space back.
    pub fn finish(&mut self, pin: GroupPin, shard: &Shard) {
        self.publish(pin);
        self.retire();
        self.recycle(shard);
        self.gauge
            .active_bytes
            .store(self.overlay.active_bytes(), Ordering::Relaxed);
        self.gauge
            .overlay_bytes
            .store(self.overlay.bytes(), Ordering::Relaxed);
        self.tell_free(shard.undo_bytes());
    }

    /// Tells what is free in the log, and has it grow when more is needed.
    fn tell_free(&mut self, undo: u64) {
        let free = self
            .log
            .free_bytes()
            .saturating_sub(self.common.log_reserve);
        self.gauge
            .free
            .store(free.saturating_sub(undo), Ordering::Release);
        let needed = self.common.needed.load(Ordering::Relaxed);
        let full = match self.log.reserve(needed.saturating_add(undo)) {
            Ok(_reservation) => None,
            Err(error) => {
                let is_space = matches!(
                    error,
                    log::ReserveError::HighWater { .. } | log::ReserveError::DiskFull { .. }
                );
                if !is_space {
                    self.fail(StorageError::Append(error.to_string()));
                }
                Some(error)
            }
        };
        if full.is_some() || self.is_short {
            self.is_short = full.is_some();
            let number = self.number;
            *self.gauge.words() = full.map(|error| format!("shard {number}: {error}"));
        }
    }

    /// Takes part in a checkpoint, as of now.
    pub fn freeze(&mut self) {
        self.retire();
        let end = self.log.end();
        let point = FreezePoint {
            lsn: end,
            group: self.last_group,
        };
        // The front begins a checkpoint only when the one before is written.
        let frozen = self.overlay.freeze(point);
        let frozen = frozen.expect("one checkpoint at a time");
        let part = CheckpointPart::Shard(self.number, frozen);
        // The thread lives as long as this sender.
        let _ = self.common.checkpoints.send(part);
    }

    fn publish(&mut self, pin: GroupPin) {
        if !std::mem::take(&mut self.appended) {
            return;
        }
        let end = self.log.end_batch(pin.group());
        // Once a batch waits for its extents, later ones queue behind it: publishing them would
        // commit the earlier one's records too.
        if std::mem::take(&mut self.placed) || self.bulk_under_way.load(Ordering::Acquire) > 0 {
            self.bulk_under_way.fetch_add(1, Ordering::AcqRel);
            let batch = BulkBatch {
                publisher: self.publisher.clone(),
                under_way: self.bulk_under_way.clone(),
                pin,
                end,
            };
            let _ = self.common.bulk.send(Bulk::Batch(batch));
        } else {
            self.publisher.publish(pin, end);
        }
    }

    fn retire(&mut self) {
        if let Some(point) = self.overlay.retire() {
            self.checkpoint_lsn = point.lsn.0;
        }
    }

    fn recycle(&mut self, shard: &Shard) {
        if self.moved && !shard.needs_other_logs(self.number) {
            self.moved = false;
            // Release pairs with the Acquire below: the last look into another log is over.
            self.common.moved.fetch_sub(1, Ordering::Release);
        }
        if self.common.moved.load(Ordering::Acquire) > 0 {
            return;
        }
        let floor = shard.undo_floor(self.number);
        let keep = floor.map_or(self.checkpoint_lsn, |lsn| lsn.0.min(self.checkpoint_lsn));
        self.log.recycle(log::Lsn(keep));
    }

    fn fail(&self, error: StorageError) {
        self.common.durability.fail(error.to_string());
    }

    fn keep<T>(&self, result: Result<T, StorageError>) -> Option<T> {
        result.map_err(|error| self.fail(error)).ok()
    }
}

impl Objects for ShardStorage {
    fn get(&mut self, key: &Key) -> Option<Stored> {
        let found = self.overlay.get(&encode_key(key));
        let bytes = self.keep(found.map_err(StorageError::from))??;
        let stored = wire::decode(&bytes, "stored object");
        self.keep(stored.map_err(|m| StorageError::Malformed(m.what)))
    }

    fn put(&mut self, key: &Key, value: Option<Stored>) {
        let encoded = value.map(|stored| wire::encode(&stored));
        self.overlay.put(&encode_key(key), encoded.as_deref());
    }

    fn fetch(&mut self, value: &Value) -> Option<Bytes> {
        match value {
            Value::Inline(bytes) => Some(bytes.clone()),
            Value::Extent(extent) => {
                if let Some(bytes) = self.common.unwritten.get(&extent_ref(extent)) {
                    return Some(bytes);
                }
                let read = self.common.extents.read_verify(extent_ref(extent));
                self.keep(read.map_err(StorageError::from))
            }
        }
    }
}

impl Storage for ShardStorage {
    fn is_empty(&mut self, range: &Range) -> bool {
        let (from, to) = bounds(range);
        let mut empty = true;
        let scanned = self.overlay.scan(&from, to.as_deref(), 1, &mut |_, _| {
            empty = false;
            false
        });
        self.keep(scanned.map_err(StorageError::from)).is_some() && empty
    }

    fn scan(&mut self, range: &Range, after: Option<&Key>, bytes_max: usize) -> Page {
        let (mut from, to) = bounds(range);
        if let Some(after) = after {
            // The first key behind `after` is `after` with one more byte.
            from = from.max([encode_key(after), vec![0]].concat());
        }
        let mut found: Vec<(Key, Value)> = Vec::new();
        let mut bytes = 0;
        let mut more = false;
        let mut bad = None;
        let scanned = self
            .overlay
            .scan(&from, to.as_deref(), usize::MAX, &mut |key, value| {
                if bytes >= bytes_max && !found.is_empty() {
                    more = true;
                    return false;
                }
                let stored = wire::decode::<Stored>(value, "stored object");
                let (Some(key), Ok(stored)) = (decode_key(key), stored) else {
                    bad = Some(StorageError::Malformed("object"));
                    return false;
                };
                bytes += key.name.len() + 32;
                bytes += match &stored.value {
                    Value::Inline(inline) => inline.len(),
                    Value::Extent(extent) => extent.len as usize,
                };
                found.push((key, stored.value));
                true
            });
        self.keep(scanned.map_err(StorageError::from));
        if let Some(bad) = bad {
            self.fail(bad);
        }
        let fetched = found
            .into_iter()
            .filter_map(|(key, value)| Some((key, self.fetch(&value)?)));
        Page {
            entries: fetched.collect(),
            more,
        }
    }

    fn append(&mut self, kind: u8, epoch: Epoch, body: &[u8]) -> Position {
        self.last_group = self.group;
        self.appended = true;
        let append = Append {
            kind,
            flags: 0,
            epoch: epoch.0,
            group: self.group,
            parts: &[body],
        };
        let lsn = match self.log.append(append) {
            Ok(lsn) => Lsn(lsn.0),
            Err(error) => {
                self.fail(StorageError::Append(error.to_string()));
                Lsn(u64::MAX)
            }
        };
        Position {
            log: self.number,
            lsn,
        }
    }

    fn load(&mut self, position: Position) -> Option<OpRecord> {
        let lsn = log::Lsn(position.lsn.0);
        let read = if position.log == self.number {
            self.log.read(lsn)
        } else {
            self.common.readers.get(position.log as usize)?.read(lsn)
        };
        let record = self.keep(read.map_err(|e| StorageError::Append(e.to_string())))?;
        let parsed = Record::from_parts(record.header.kind, &record.body);
        let parsed = parsed.map_err(|m| StorageError::Malformed(m.what));
        match self.keep(parsed)? {
            (_, Record::Op(record)) => Some(record),
            _ => self.keep(Err(StorageError::Malformed("undo record"))),
        }
    }

    fn place(&mut self, bytes: &Bytes) -> Extent {
        let reserved = self.common.extents.reserve(bytes, bytes.checksum());
        self.placed = true;
        let Some(extent) = self.keep(reserved.map_err(StorageError::from)) else {
            return Extent {
                offset: 0,
                len: 0,
                crc: 0,
            };
        };
        let unwritten = &self.common.unwritten;
        unwritten.map().insert(extent.offset, bytes.clone());
        // The thread lives as long as this sender, or has said why not.
        let _ = self.common.bulk.send(Bulk::Write(extent));
        Extent {
            offset: extent.offset,
            len: extent.len,
            crc: extent.crc32c,
        }
    }

    fn release(&mut self, extent: Extent) {
        let freed = self.common.extents.free(extent_ref(&extent));
        self.keep(freed.map_err(StorageError::from));
    }
}
