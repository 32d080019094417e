//! A destination's storage in memory, with crashes.
//!
//! The log is a list of records of which a prefix is durable; a sync makes a longer prefix durable
//! after a delay. A crash keeps some prefix that is at least the durable one. Objects live in a
//! volatile map; the checkpoint is a copy of the map with the core's image, taken at one moment and
//! applied only once the log is durable up to that moment (I8). Positions grow by the length of
//! records, so they are not dense, and a position lost in a crash is used again.
//!
//! Deliberately absent: torn bytes within a record (the log's checksums turn those into a shorter
//! prefix), failing media.

use std::collections::{BTreeMap, VecDeque};

use lowtide_engine_core::ids::{Epoch, Lsn};
use lowtide_engine_core::op::{Bytes, Key, Range};
use lowtide_engine_core::record::{Extent, KIND_OP, Storage, Stored, Value};
use lowtide_engine_core::session::Page;

/// One appended record.
#[derive(Clone, Debug)]
pub struct Logged {
    /// Its position.
    pub lsn: Lsn,
    /// Kind byte.
    pub kind: u8,
    /// Epoch given at append.
    pub epoch: Epoch,
    /// Body.
    pub body: Vec<u8>,
}

/// A checkpoint: objects and image as of one position.
#[derive(Clone, Debug, Default)]
pub struct Checkpoint {
    /// Records up to here are covered.
    pub lsn: u64,
    /// The core's image.
    pub image: Vec<u8>,
    /// The objects.
    pub objects: BTreeMap<Key, Stored>,
}

/// Storage of one destination.
#[derive(Debug, Default)]
pub struct Disk {
    /// Newest executed objects (volatile).
    pub objects: BTreeMap<Key, Stored>,
    /// Records in the log, ascending.
    pub log: VecDeque<Logged>,
    /// Position of the newest record.
    pub end: u64,
    /// Records up to here survive a crash.
    pub synced: u64,
    /// Position that a sync under way will make durable.
    pub syncing: Option<u64>,
    /// The durable checkpoint.
    pub checkpoint: Checkpoint,
    /// A checkpoint that waits for the log.
    pub frozen: Option<Checkpoint>,
    /// No room for new reservations.
    pub full: bool,
    /// Records recycled so far.
    pub recycled: u64,
    /// Out-of-line values: offset → bytes, and the log's end when they were placed.
    extents: BTreeMap<u64, (Bytes, u64)>,
    next_extent: u64,
}

impl Disk {
    /// Loses what a crash loses; records up to `survives` (at least [`Disk::synced`]) remain.
    pub fn crash(&mut self, survives: u64) {
        assert!(
            survives >= self.synced,
            "a crash cannot take durable records"
        );
        while self.log.back().is_some_and(|r| r.lsn.0 > survives) {
            self.log.pop_back();
        }
        let end = self.log.back().map_or(0, |r| r.lsn.0);
        self.end = end.max(self.checkpoint.lsn).max(self.synced);
        self.extents.retain(|_, (_, placed)| *placed < self.end);
        self.synced = self.end;
        self.syncing = None;
        self.frozen = None;
        self.objects = self.checkpoint.objects.clone();
        self.full = false;
    }

    /// Applies the frozen checkpoint if the log is durable up to it. Returns whether it did.
    pub fn apply_checkpoint(&mut self) -> bool {
        match self.frozen.take() {
            Some(frozen) if frozen.lsn <= self.synced => {
                self.checkpoint = frozen;
                true
            }
            other => {
                self.frozen = other;
                false
            }
        }
    }

    /// Drops records that neither undo (`floor`) nor redo (the checkpoint) needs. Returns where
    /// the operations among them were.
    pub fn recycle(&mut self, floor: Option<Lsn>) -> Vec<Lsn> {
        let keep = floor.map_or(u64::MAX, |l| l.0).min(self.checkpoint.lsn + 1);
        let mut operations = Vec::new();
        while self.log.front().is_some_and(|r| r.lsn.0 < keep) {
            if let Some(record) = self.log.pop_front() {
                self.recycled += 1;
                if record.kind == KIND_OP {
                    operations.push(record.lsn);
                }
            }
        }
        operations
    }
}

impl Storage for Disk {
    fn get(&mut self, key: &Key) -> Option<Stored> {
        self.objects.get(key).cloned()
    }

    fn put(&mut self, key: &Key, value: Option<Stored>) {
        match value {
            Some(stored) => {
                self.objects.insert(key.clone(), stored);
            }
            None => {
                self.objects.remove(key);
            }
        }
    }

    fn is_empty(&mut self, range: &Range) -> bool {
        let from = Key::at(range.space, range.lo);
        let first = self.objects.range(from..).next();
        first.is_none_or(|(key, _)| !range.holds(key))
    }

    fn scan(&mut self, range: &Range, after: Option<&Key>, bytes_max: usize) -> Page {
        let from = Key::at(range.space, range.lo);
        let mut page = Page::default();
        let mut bytes = 0;
        for (key, stored) in self.objects.range(from..) {
            if !range.holds(key) {
                break;
            }
            if after.is_some_and(|a| key <= a) {
                continue;
            }
            if bytes >= bytes_max && !page.entries.is_empty() {
                page.more = true;
                break;
            }
            let value = match &stored.value {
                Value::Inline(bytes) => bytes.clone(),
                Value::Extent(e) => self.extents[&e.offset].0.clone(),
            };
            bytes += value.len();
            page.entries.push((key.clone(), value));
        }
        page
    }

    fn append(&mut self, kind: u8, epoch: Epoch, body: &[u8]) -> Lsn {
        self.end += 1 + body.len() as u64;
        let lsn = Lsn(self.end);
        let body = body.to_vec();
        self.log.push_back(Logged {
            lsn,
            kind,
            epoch,
            body,
        });
        lsn
    }

    fn load(&mut self, lsn: Lsn) -> Option<Vec<u8>> {
        let index = self.log.binary_search_by_key(&lsn, |r| r.lsn).ok()?;
        Some(self.log[index].body.clone())
    }

    fn place(&mut self, bytes: &Bytes) -> Extent {
        let offset = self.next_extent;
        self.next_extent += bytes.len() as u64;
        self.extents.insert(offset, (bytes.clone(), self.end));
        Extent {
            offset,
            len: bytes.len() as u32,
            crc: 0,
        }
    }

    fn fetch(&mut self, value: &Value) -> Option<Bytes> {
        match value {
            Value::Inline(bytes) => Some(bytes.clone()),
            Value::Extent(e) => self.extents.get(&e.offset).map(|(bytes, _)| bytes.clone()),
        }
    }

    fn has_room(&self) -> bool {
        !self.full
    }
}

/// Storage of the root: states that become durable in order.
#[derive(Debug, Default)]
pub struct RootDisk {
    /// The newest durable state; empty before the first.
    pub durable: Vec<u8>,
    /// States on their way, oldest first.
    pub pending: VecDeque<(u64, Vec<u8>)>,
}

impl RootDisk {
    /// The oldest pending state is durable.
    pub fn complete(&mut self) -> Option<u64> {
        let (version, state) = self.pending.pop_front()?;
        self.durable = state;
        Some(version)
    }
}
