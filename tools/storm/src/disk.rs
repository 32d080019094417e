//! A destination's storage in memory, with crashes.
//!
//! There is one log per shard, each a list of records. A step of the node may have records in
//! several logs; a sync makes everything up to some step durable after a delay, as a commit group
//! does, and a crash keeps everything up to some step that is at least the durable one. Objects lie
//! in one volatile map; a shard may touch those of its own spaces only. The checkpoint is a copy of
//! the map with the core's image, every shard's part taken when that shard has come to the same
//! step, and applied only once the logs are durable up to it (I8). Positions grow by the length of
//! records, so they are not dense, and a position lost in a crash is used again.
//!
//! Deliberately absent: torn bytes within a record and logs of which one lost more than the others
//! (checksums and commit groups turn those into an earlier step), failing media.

use std::collections::{BTreeMap, VecDeque};

use lowtide_engine_core::destination::Image;
use lowtide_engine_core::destination::shard::{Shard, ShardSet, shard_of};
use lowtide_engine_core::ids::{Epoch, Lsn, Step, StorageId};
use lowtide_engine_core::op::{Bytes, Key, Range};
use lowtide_engine_core::record::{
    Extent, KIND_OP, Objects, OpRecord, Position, Record, Recorded, Storage, Stored, Value, step_of,
};
use lowtide_engine_core::room::{FRAME_BYTES, Space};
use lowtide_engine_core::session::Page;

/// One appended record.
#[derive(Clone, Debug)]
pub struct Logged {
    /// Its step.
    pub step: Step,
    /// Its position.
    pub lsn: Lsn,
    /// Kind byte.
    pub kind: u8,
    /// Epoch given at append.
    pub epoch: Epoch,
    /// Body.
    pub body: Vec<u8>,
}

impl Logged {
    /// What it takes at most, in bytes: as if each were a batch of its own.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        FRAME_BYTES + self.body.len() as u64
    }
}

/// A shard's log.
#[derive(Clone, Debug, Default)]
pub struct LogDisk {
    /// Its records, ascending.
    pub records: VecDeque<Logged>,
    /// What they take, in bytes.
    used: u64,
    /// Position of the newest record.
    end: u64,
}

/// A checkpoint: objects and image as of one step.
#[derive(Clone, Debug, Default)]
pub struct Checkpoint {
    /// Steps up to here are covered.
    pub step: Step,
    /// The core's image.
    pub image: Vec<u8>,
    /// The objects.
    pub objects: BTreeMap<Key, Stored>,
    /// Shards whose objects are still missing.
    waiting: ShardSet,
}

/// Storage of one destination.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    /// Tells this disk from every other one.
    pub storage: StorageId,
    /// Newest executed objects (volatile).
    pub objects: BTreeMap<Key, Stored>,
    /// One log per shard; more when there were more shards before.
    pub logs: Vec<LogDisk>,
    /// Steps up to here survive a crash.
    pub synced: Step,
    /// Step that a sync under way will make durable.
    pub syncing: Option<Step>,
    /// The durable checkpoint.
    pub checkpoint: Checkpoint,
    /// A checkpoint that waits for shards or for the logs.
    pub frozen: Option<Checkpoint>,
    /// There is no room for new work, whatever is free.
    pub full: bool,
    /// What each log takes, in bytes; no bound if `None`.
    pub log_bytes: Option<u64>,
    /// Shards of the running process.
    count: u32,
    /// Out-of-line values: offset → bytes, and the step in which they were placed.
    extents: BTreeMap<u64, (Bytes, Step)>,
    next_extent: u64,
}

impl Disk {
    /// An empty disk on which each log takes so many bytes.
    #[must_use]
    pub fn of(storage: StorageId, log_bytes: Option<u64>) -> Disk {
        Disk {
            storage,
            log_bytes,
            ..Disk::default()
        }
    }

    /// A process with this many shards starts.
    pub fn set_shards(&mut self, count: u32) {
        self.count = count;
        let logs = self.logs.len().max(count as usize);
        self.logs.resize_with(logs, LogDisk::default);
    }

    /// The disk as shard `number` sees it while it works at `step`; `None` for all shards at once.
    pub fn view(&mut self, shard: Option<u32>, step: Step) -> View<'_> {
        View {
            disk: self,
            shard,
            step,
        }
    }

    /// Records after `after` and up to `until`, of all logs, by steps.
    #[must_use]
    pub fn records(&self, after: Step, until: Step) -> Vec<(Position, Logged)> {
        let mut found = Vec::new();
        for (log, l) in (0..).zip(&self.logs) {
            let from = l.records.partition_point(|r| r.step <= after);
            let to = l.records.partition_point(|r| r.step <= until);
            let records = l.records.range(from..to.max(from));
            found.extend(records.map(|r| (Position { log, lsn: r.lsn }, r.clone())));
        }
        found.sort_by_key(|(position, r)| (r.step, position.log));
        found
    }

    /// Newest step with a record up to `until`.
    #[must_use]
    pub fn newest(&self, until: Step) -> Step {
        let newest = self.logs.iter().filter_map(|l| {
            let count = l.records.partition_point(|r| r.step <= until);
            Some(l.records.get(count.checked_sub(1)?)?.step)
        });
        newest.max().unwrap_or_default()
    }

    /// What is free, as hands report it.
    #[must_use]
    pub fn space<'a>(&self, shards: impl Iterator<Item = &'a Shard>) -> Space {
        if self.full {
            return Space::NONE;
        }
        let Some(limit) = self.log_bytes else {
            return Space::UNBOUNDED;
        };
        let free = |(log, shard): (&LogDisk, &Shard)| {
            let taken = log.used + shard.undo_bytes();
            limit.saturating_sub(taken)
        };
        let log = self.logs.iter().zip(shards).map(free).min();
        Space {
            log: log.unwrap_or_default(),
            ..Space::UNBOUNDED
        }
    }

    /// What somebody has who copies the disk now, and nothing that is not durable.
    #[must_use]
    pub fn copy(&self) -> Disk {
        let mut copy = self.clone();
        copy.crash(copy.synced);
        copy
    }

    /// The newest step that a start from here would tell ([`StoreMark::commit`]).
    ///
    /// [`StoreMark::commit`]: lowtide_engine_core::identity::StoreMark::commit
    #[must_use]
    pub fn commit(&self) -> Step {
        let image = Image::decode(&self.checkpoint.image, self.storage, 1);
        let covered = image.map_or(Step(0), |image| image.store().commit);
        let records = self.logs.iter().flat_map(|l| &l.records);
        let counts = records.filter(|r| {
            let record = Record::from_parts(r.kind, &r.body);
            !matches!(record, Ok((_, Record::Marks { .. })))
        });
        counts.map(|r| r.step).fold(covered, Step::max)
    }

    /// Loses what a crash loses; steps up to `survives` (at least [`Disk::synced`]) remain.
    pub fn crash(&mut self, survives: Step) {
        assert!(
            survives >= self.synced,
            "a crash cannot take durable records"
        );
        for log in &mut self.logs {
            while let Some(lost) = log.records.pop_back_if(|r| r.step > survives) {
                log.used -= lost.bytes();
            }
            // A position is used again, unless nothing is left to tell it from.
            log.end = log.records.back().map_or(log.end, |r| r.lsn.0);
        }
        self.synced = survives;
        self.extents.retain(|_, (_, placed)| *placed <= survives);
        self.syncing = None;
        self.frozen = None;
        self.objects = self.checkpoint.objects.clone();
        self.full = false;
    }

    /// Whether shards have still to take part in a checkpoint.
    #[must_use]
    pub fn is_freezing(&self) -> bool {
        self.frozen.as_ref().is_some_and(|f| !f.waiting.is_empty())
    }

    /// The front takes a checkpoint at `step`; the shards follow with [`Disk::freeze`].
    pub fn begin_checkpoint(&mut self, step: Step, image: Vec<u8>) {
        self.frozen = Some(Checkpoint {
            step,
            image,
            objects: BTreeMap::new(),
            waiting: ShardSet::all(self.count),
        });
    }

    /// A shard has come to the checkpoint's step.
    pub fn freeze(&mut self, number: u32) {
        let count = self.count;
        let Some(frozen) = &mut self.frozen else {
            return;
        };
        let own = |key: &Key| shard_of(key.space, count) == number;
        let objects = self.objects.iter().filter(|(key, _)| own(key));
        frozen
            .objects
            .extend(objects.map(|(key, stored)| (key.clone(), stored.clone())));
        frozen.waiting.remove(number);
    }

    /// Applies the frozen checkpoint if the logs are durable up to it. Returns whether it did.
    pub fn apply_checkpoint(&mut self) -> bool {
        match self.frozen.take() {
            // Steps without a record need not become durable.
            Some(frozen)
                if frozen.waiting.is_empty() && self.newest(frozen.step) <= self.synced =>
            {
                self.checkpoint = frozen;
                true
            }
            other => {
                self.frozen = other;
                false
            }
        }
    }

    /// Drops records that neither undo nor redo (the checkpoint) needs. Returns the steps of the
    /// operations among them, ascending.
    pub fn recycle<'a>(&mut self, shards: impl Iterator<Item = &'a Shard> + Clone) -> Vec<Step> {
        let mut operations = Vec::new();
        for (number, log) in (0..).zip(&mut self.logs) {
            let floor = shards.clone().filter_map(|s| s.undo_floor(number)).min();
            let keep = floor.unwrap_or(Lsn(u64::MAX));
            let covered = self.checkpoint.step;
            while let Some(record) = log
                .records
                .pop_front_if(|r| r.lsn < keep && r.step <= covered)
            {
                log.used -= record.bytes();
                if record.kind == KIND_OP {
                    operations.push(record.step);
                }
            }
        }
        operations.sort_unstable();
        operations
    }

    /// Out-of-line values by their offsets.
    #[must_use]
    pub fn extents(&self) -> BTreeMap<u64, &Bytes> {
        let values = self.extents.iter();
        values
            .map(|(offset, (bytes, _))| (*offset, bytes))
            .collect()
    }

    /// Extents that no object has.
    #[must_use]
    pub fn orphans(&self) -> usize {
        let used = self.objects.values().filter_map(|s| match &s.value {
            Value::Extent(extent) => Some(extent.offset),
            Value::Inline(_) => None,
        });
        let used: std::collections::BTreeSet<u64> = used.collect();
        self.extents.keys().filter(|e| !used.contains(e)).count()
    }

    /// Keeps the extents that objects and kept records refer to, as a start does.
    pub fn adopt_extents(&mut self, kept: impl Iterator<Item = Position>) {
        let mut live: std::collections::BTreeSet<u64> = std::collections::BTreeSet::new();
        let mut refer = |value: &Value| {
            if let Value::Extent(extent) = value {
                live.insert(extent.offset);
            }
        };
        self.objects.values().for_each(|s| refer(&s.value));
        for position in kept {
            let records = &self.logs[position.log as usize].records;
            let index = records.binary_search_by_key(&position.lsn, |r| r.lsn);
            let record = &records[index.expect("a kept record is in its log")];
            if let Ok((_, Record::Op(op))) = Record::from_parts(record.kind, &record.body) {
                for w in &op.writes {
                    w.before.iter().for_each(|s| refer(&s.value));
                    if let Recorded::Put(value) = &w.change {
                        refer(value);
                    }
                }
            }
        }
        self.extents.retain(|offset, _| live.contains(offset));
    }

    /// Bytes of a value.
    #[must_use]
    pub fn fetch(&self, value: &Value) -> Option<Bytes> {
        match value {
            Value::Inline(bytes) => Some(bytes.clone()),
            Value::Extent(e) => self.extents.get(&e.offset).map(|(bytes, _)| bytes.clone()),
        }
    }
}

/// See [`Disk::view`].
#[derive(Debug)]
pub struct View<'a> {
    disk: &'a mut Disk,
    shard: Option<u32>,
    step: Step,
}

impl View<'_> {
    fn check(&self, space: u64) {
        if let Some(number) = self.shard {
            let owner = shard_of(space, self.disk.count);
            assert_eq!(owner, number, "a shard keeps to its own objects");
        }
    }
}

impl Objects for View<'_> {
    fn get(&mut self, key: &Key) -> Option<Stored> {
        self.check(key.space);
        self.disk.objects.get(key).cloned()
    }

    fn put(&mut self, key: &Key, value: Option<Stored>) {
        self.check(key.space);
        match value {
            Some(stored) => {
                self.disk.objects.insert(key.clone(), stored);
            }
            None => {
                self.disk.objects.remove(key);
            }
        }
    }

    fn fetch(&mut self, value: &Value) -> Option<Bytes> {
        self.disk.fetch(value)
    }
}

impl Storage for View<'_> {
    fn is_empty(&mut self, range: &Range) -> bool {
        self.check(range.space);
        let from = Key::at(range.space, range.lo);
        let first = self.disk.objects.range(from..).next();
        first.is_none_or(|(key, _)| !range.holds(key))
    }

    fn scan(&mut self, range: &Range, after: Option<&Key>, bytes_max: usize) -> Page {
        self.check(range.space);
        let from = Key::at(range.space, range.lo);
        let mut page = Page::default();
        let mut bytes = 0;
        for (key, stored) in self.disk.objects.range(from..) {
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
                Value::Extent(e) => self.disk.extents[&e.offset].0.clone(),
            };
            bytes += value.len();
            page.entries.push((key.clone(), value));
        }
        page
    }

    fn append(&mut self, kind: u8, epoch: Epoch, body: &[u8]) -> Position {
        let log = self.shard.expect("a shard appends");
        let step = step_of(body).expect("a record begins with its step");
        let l = &mut self.disk.logs[log as usize];
        let mut record = Logged {
            step,
            lsn: Lsn(0),
            kind,
            epoch,
            body: body.to_vec(),
        };
        l.end += record.bytes();
        l.used += record.bytes();
        let limit = self.disk.log_bytes.unwrap_or(u64::MAX);
        assert!(
            l.used <= limit,
            "a full log refuses a record of kind {kind}"
        );
        record.lsn = Lsn(l.end);
        let lsn = record.lsn;
        l.records.push_back(record);
        Position { log, lsn }
    }

    fn load(&mut self, position: Position) -> Option<OpRecord> {
        let records = &self.disk.logs[position.log as usize].records;
        let index = records.binary_search_by_key(&position.lsn, |r| r.lsn);
        let record = &records[index.expect("a kept undo record is in the log")];
        match Record::from_parts(record.kind, &record.body) {
            Ok((_, Record::Op(record))) => Some(record),
            _ => panic!("{position:?} does not hold the operation it was given"),
        }
    }

    fn place(&mut self, bytes: &Bytes) -> Extent {
        let offset = self.disk.next_extent;
        self.disk.next_extent += bytes.len() as u64;
        self.disk.extents.insert(offset, (bytes.clone(), self.step));
        Extent {
            offset,
            len: bytes.len() as u32,
            crc: 0,
        }
    }

    fn release(&mut self, extent: Extent) {
        let held = self.disk.extents.remove(&extent.offset);
        assert!(held.is_some(), "an extent is released once");
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
