//! A destination's storage: log, overlay, checkpoint store and extents behind the mind's
//! [`Storage`] trait.
//!
//! Order of durability (D2): an extent is synced before the log record that points to it can
//! commit; a checkpoint is written only once every record it reflects is durable (the overlay
//! asserts it). Everything that blocks runs on other threads: the committer syncs logs, the bulk
//! thread writes and syncs extents, the checkpoint thread writes the store.
//!
//! A failure anywhere is kept in [`ShardStorage::failure`]; the node looks before it lets any
//! effect out and leaves the cluster, so nothing is acknowledged after it.
//!
//! Deliberately absent: freeing of extents while the node runs; the map is rebuilt at each start
//! from what the store and the log still refer to.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use lowtide_engine_core::destination::{Image, RecoverError};
use lowtide_engine_core::ids::{Epoch, Lsn};
use lowtide_engine_core::op::{Bytes, Key, Range};
use lowtide_engine_core::record::{Extent, Record, Recorded, Storage, Stored, Value};
use lowtide_engine_core::session::Page;
use lowtide_engine_core::wire;

use crate::log::commit::{Committer, GroupPin, Publisher};
use crate::log::set::{LogSet, SetConfig};
use crate::log::superblock::{NodeState, Superblock, SuperblockError};
use crate::log::{self, Append, Log, LogConfig, LogIdentity, OpenError};
use crate::medium::dir::{DirOptions, DirVolume};
use crate::medium::{MediumError, Volume};
use crate::store::extents::{ExtentError, ExtentFile, ExtentRef};
use crate::store::overlay::{DurablePoint, FreezePoint, Frozen, Overlay};
use crate::store::redb_store::RedbStore;
use crate::store::{Store, StoreError};

/// A checkpoint begins when the overlay holds this much, in bytes.
const CHECKPOINT_BYTES: usize = 32 << 20;
/// Page cache of the checkpoint store, in bytes.
const STORE_CACHE: usize = 32 << 20;
/// Largest extent file, in bytes.
const EXTENTS_MAX: u64 = 1 << 40;
/// Extents and batches that one sync serves at most.
const BULK_PER_SYNC: usize = 64;
/// Room that new work leaves in the log for what is already stamped, in bytes.
const ROOM: u64 = 48 << 20;
/// Disk space that new work leaves for the checkpoint store, whatever happens, in bytes.
const DISK_STORE: u64 = 2 * CHECKPOINT_BYTES as u64;
/// Disk space that new work leaves for what one client may have stamped, in bytes: a session lets
/// it have [`crate::session::UNCOMMITTED_BYTES_MAX`] under way and one operation more.
const DISK_CLIENT: u64 = crate::session::UNCOMMITTED_BYTES_MAX + (8 << 20);
/// How often the disk is asked how much is free.
const DISK_EVERY: Duration = Duration::from_millis(20);

/// Why a destination's state cannot be opened or has failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageError {
    /// The medium.
    #[error(transparent)]
    Medium(#[from] MediumError),
    /// The log.
    #[error(transparent)]
    Log(#[from] OpenError),
    /// The log, while running.
    #[error("log: {0}")]
    Append(String),
    /// The checkpoint store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The superblock.
    #[error(transparent)]
    Superblock(#[from] SuperblockError),
    /// The extents.
    #[error(transparent)]
    Extents(#[from] ExtentError),
    /// A record that cannot be replayed.
    #[error("recovery: {0}")]
    Recover(#[from] RecoverError),
    /// A stored value or checkpoint position does not decode.
    #[error("stored state does not decode: {0}")]
    Malformed(&'static str),
}

/// Encodes a key so that byte order is key order.
fn encode_key(key: &Key) -> Vec<u8> {
    let mut out = Vec::with_capacity(16 + key.name.len());
    out.extend_from_slice(&key.space.to_be_bytes());
    out.extend_from_slice(&key.slot.to_be_bytes());
    out.extend_from_slice(&key.name);
    out
}

fn decode_key(bytes: &[u8]) -> Option<Key> {
    let space = u64::from_be_bytes(bytes.get(..8)?.try_into().ok()?);
    let slot = u64::from_be_bytes(bytes.get(8..16)?.try_into().ok()?);
    Some(Key {
        space,
        slot,
        name: bytes[16..].to_vec(),
    })
}

/// Bounds of a range in the store: first key, and the first key after it.
fn bounds(range: &Range) -> (Vec<u8>, Option<Vec<u8>>) {
    let from = encode_key(&Key::at(range.space, range.lo));
    let after = match (range.space, range.hi) {
        (space, hi) if hi < u64::MAX => Some(Key::at(space, hi + 1)),
        (space, _) if space < u64::MAX => Some(Key::at(space + 1, 0)),
        _ => None,
    };
    (from, after.map(|key| encode_key(&key)))
}

fn extent_ref(extent: &Extent) -> ExtentRef {
    ExtentRef {
        offset: extent.offset,
        len: extent.len,
        crc32c: extent.crc,
    }
}

/// Position of a checkpoint: how far the log is reflected, and the mind's image.
fn encode_position(lsn: u64, image: &[u8]) -> Vec<u8> {
    [&lsn.to_le_bytes()[..], image].concat()
}

fn decode_position(bytes: &[u8]) -> Result<(u64, &[u8]), StorageError> {
    let (lsn, image) = bytes
        .split_at_checked(8)
        .ok_or(StorageError::Malformed("checkpoint position"))?;
    Ok((
        u64::from_le_bytes(lsn.try_into().unwrap_or_default()),
        image,
    ))
}

/// What is told to the engine thread from the threads that block.
#[derive(Debug, Default)]
pub struct Durability {
    /// The log is durable before this position.
    pub lsn: AtomicU64,
    /// Groups up to this one are durable.
    pub group: AtomicU64,
    failed: std::sync::Mutex<Option<String>>,
}

impl Durability {
    fn fail(&self, why: String) {
        let mut failed = self
            .failed
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        failed.get_or_insert(why);
    }

    fn failure(&self) -> Option<String> {
        self.failed
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone()
    }
}

/// Everything a destination keeps, in one directory.
#[derive(Debug)]
pub struct ShardStorage {
    overlay: Overlay,
    log: Log,
    publisher: Publisher,
    pin: Option<GroupPin>,
    last_group: u64,
    appended: bool,
    extents: Arc<ExtentFile>,
    placed: bool,
    bulk: Sender<Bulk>,
    /// Bulk data that is not in its file yet.
    unwritten: Arc<Unwritten>,
    /// Batches that the bulk thread has not handed to the committer.
    bulk_under_way: Arc<AtomicU64>,
    durability: Arc<Durability>,
    checkpoints: Sender<(Arc<Frozen>, Vec<u8>)>,
    checkpoint_lsn: u64,
    threads: Vec<JoinHandle<()>>,
    committer: Option<Committer>,
    failure: Option<StorageError>,
    /// Why there is no room for new work, in words.
    full: Option<String>,
    disk: Disk,
    boots: u64,
    recovered_records: u64,
}

impl ShardStorage {
    /// Opens or creates the state in `dir` and recovers what the mind needs. `wake` is called from
    /// other threads whenever something became durable or failed.
    ///
    /// # Errors
    /// [`StorageError`] naming the file and what is wrong with it.
    pub fn open(
        dir: &Path,
        power_fail: bool,
        wake: impl Fn() + Send + Sync + Clone + 'static,
    ) -> Result<(ShardStorage, Image), StorageError> {
        let options = DirOptions {
            power_fail,
            ..DirOptions::default()
        };
        let volume: Arc<dyn Volume> = Arc::new(DirVolume::open(dir, options)?);
        let mut superblock = open_superblock(&*volume)?;
        let store: Arc<dyn Store> = Arc::new(RedbStore::open(&*volume, STORE_CACHE)?);
        let position = store
            .last_checkpoint(0)?
            .unwrap_or_else(|| encode_position(0, &[]));
        let (checkpoint_lsn, image) = decode_position(&position)?;
        let storage = superblock.state().storage;
        let shard = LogConfig {
            record_bytes_max: 12 << 20,
            segments_max: 24,
            ..LogConfig::new("shard", LogIdentity { storage, number: 0 })
        };
        let must_reach = vec![log::Lsn(checkpoint_lsn)];
        let config = SetConfig {
            storage,
            shards: 1,
            shard,
            must_reach,
        };
        let (set, _report) = LogSet::open(volume.clone(), &config)?;
        let live = live_extents(&*store, &set.logs()[0])?;
        let extents = Arc::new(ExtentFile::open(&*volume, EXTENTS_MAX, live)?);
        superblock.update(|s| s.boots += 1)?;
        let boots = superblock.state().boots;

        let durability = Arc::new(Durability::default());
        let (told, wake_commit) = (durability.clone(), wake.clone());
        let (mut logs, committer) = set.start(move |news| {
            match news {
                Ok(committed) => {
                    let end = committed.ends.first().map_or(0, |lsn| lsn.0);
                    told.lsn.store(end, Ordering::Release);
                    told.group.store(committed.group, Ordering::Release);
                }
                Err(error) => told.fail(error.to_string()),
            }
            wake_commit();
        })?;
        let shard = logs.remove(0);
        durability.lsn.store(shard.log.end().0, Ordering::Release);
        durability
            .group
            .store(committer.durable_group(), Ordering::Release);

        let bulk_under_way = Arc::new(AtomicU64::new(0));
        let unwritten = Arc::new(Unwritten::default());
        let (bulk, batches) = unbounded();
        let bulk_thread = BulkSync {
            unwritten: unwritten.clone(),
            extents: extents.clone(),
            publisher: shard.publisher.clone(),
            under_way: bulk_under_way.clone(),
            durability: durability.clone(),
        };
        let (checkpoints, frozen) = unbounded();
        let checkpoint_thread = Checkpointer {
            store: store.clone(),
            durability: durability.clone(),
            wake: Box::new(wake),
        };
        let threads = vec![
            spawn("lowtide-bulk", move || bulk_thread.run(&batches))?,
            spawn("lowtide-ckpt", move || checkpoint_thread.run(&frozen))?,
        ];
        let mut storage = ShardStorage {
            overlay: Overlay::new(store),
            log: shard.log,
            publisher: shard.publisher,
            pin: None,
            last_group: 0,
            appended: false,
            extents,
            placed: false,
            bulk,
            unwritten,
            bulk_under_way,
            durability,
            checkpoints,
            checkpoint_lsn,
            threads,
            committer: Some(committer),
            failure: None,
            full: None,
            disk: Disk {
                volume,
                due: Instant::now(),
                full: None,
            },
            boots,
            recovered_records: 0,
        };
        let image = storage.recover(image)?;
        Ok((storage, image))
    }

    fn recover(&mut self, image: &[u8]) -> Result<Image, StorageError> {
        let mut image = Image::decode(image).map_err(|m| StorageError::Malformed(m.what))?;
        let mut next = log::Lsn(0);
        // The log is read record by record, because replaying writes to the overlay.
        let record_at = |storage: &Self, lsn| storage.log.iter(lsn).next();
        while let Some(record) = record_at(self, next) {
            let record = record.map_err(|e| StorageError::Append(e.to_string()))?;
            let lsn = record.header.lsn;
            let fresh = lsn.0 >= self.checkpoint_lsn;
            image.replay(Lsn(lsn.0), (record.header.kind, &record.body), fresh, self)?;
            self.recovered_records += 1;
            next = log::Lsn(lsn.0 + record.header.total_len());
        }
        image.finish();
        if let Some(failure) = self.failure.take() {
            return Err(failure);
        }
        Ok(image)
    }

    /// How often this state was opened.
    #[must_use]
    pub fn boots(&self) -> u64 {
        self.boots
    }

    /// Records read back at the start.
    #[must_use]
    pub fn recovered_records(&self) -> u64 {
        self.recovered_records
    }

    /// Everything before this position is durable.
    #[must_use]
    pub fn durable(&self) -> Lsn {
        Lsn(self
            .durability
            .lsn
            .load(Ordering::Acquire)
            .saturating_sub(1))
    }

    /// What broke, if anything. After that nothing may be acknowledged.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.failure
            .as_ref()
            .map(ToString::to_string)
            .or_else(|| self.durability.failure())
    }

    /// Ends a batch: hands what was appended to the committer, checkpoints and recycles when due.
    /// `image` is the mind's image as of now, `undo_floor` its oldest kept undo record; `clients`
    /// tells how many may have stamped operations under way.
    pub fn finish_batch(
        &mut self,
        image: impl FnOnce() -> Vec<u8>,
        undo_floor: Option<Lsn>,
        clients: impl FnOnce() -> u64,
    ) {
        self.publish();
        if let Some(point) = self.overlay.retire() {
            self.checkpoint_lsn = point.lsn.0;
        }
        let keep = undo_floor.map_or(self.checkpoint_lsn, |lsn| lsn.0.min(self.checkpoint_lsn));
        self.log.recycle(log::Lsn(keep));
        let log_full = match self.log.reserve(ROOM) {
            Ok(_reservation) => None,
            Err(
                error @ (log::ReserveError::HighWater { .. } | log::ReserveError::DiskFull { .. }),
            ) => Some(format!("no room for new work in the log: {error}")),
            Err(error) => {
                let error = StorageError::Append(error.to_string());
                Some(self.failure.get_or_insert(error).to_string())
            }
        };
        let due = self.overlay.active_bytes() >= CHECKPOINT_BYTES
            || (log_full.is_some() && self.overlay.active_bytes() > 0);
        let asked = self.disk.ask(&self.extents, clients);
        let disk_full = self.keep(asked).flatten();
        self.full = log_full.or(disk_full);
        if due {
            let end = self.log.end();
            let point = FreezePoint {
                lsn: end,
                group: self.last_group,
            };
            if let Some(frozen) = self.overlay.freeze(point) {
                let position = encode_position(end.0, &image());
                // The thread lives as long as this sender.
                let _ = self.checkpoints.send((frozen, position));
            }
        }
    }

    fn publish(&mut self) {
        let Some(pin) = self.pin.take() else { return };
        if !std::mem::take(&mut self.appended) {
            return;
        }
        let end = self.log.end();
        // Once a batch waits for its extents, later ones queue behind it: publishing them would
        // commit the earlier one's records too.
        if std::mem::take(&mut self.placed) || self.bulk_under_way.load(Ordering::Acquire) > 0 {
            self.bulk_under_way.fetch_add(1, Ordering::AcqRel);
            let _ = self.bulk.send(Bulk::Batch(pin, end));
        } else {
            self.publisher.publish(pin, end);
        }
    }

    /// Why new work is refused, in words, if it is.
    #[must_use]
    pub fn full(&self) -> Option<&str> {
        self.full.as_deref()
    }

    /// Bytes of objects held in memory in front of the store.
    #[must_use]
    pub fn overlay_bytes(&self) -> usize {
        self.overlay.bytes()
    }

    /// Commits what was appended and stops the threads.
    pub fn close(mut self) {
        self.publish();
        let ShardStorage {
            bulk,
            checkpoints,
            threads,
            committer,
            ..
        } = self;
        drop((bulk, checkpoints));
        for thread in threads {
            // A panic there was reported by the panic hook.
            let _ = thread.join();
        }
        if let Some(committer) = committer {
            committer.stop();
        }
    }

    fn keep<T>(&mut self, result: Result<T, StorageError>) -> Option<T> {
        result
            .map_err(|error| self.failure.get_or_insert(error))
            .ok()
    }
}

/// What is known of the disk under the files. Operations that are stamped may not be refused any
/// more, so new ones are refused while the disk still holds whatever may be under way.
#[derive(Debug)]
struct Disk {
    volume: Arc<dyn Volume>,
    /// When to ask again.
    due: Instant,
    /// Why there is no room, in words, when asked last.
    full: Option<String>,
}

impl Disk {
    fn ask(
        &mut self,
        extents: &ExtentFile,
        clients: impl FnOnce() -> u64,
    ) -> Result<Option<String>, StorageError> {
        let now = Instant::now();
        if now >= self.due {
            self.due = now + DISK_EVERY;
            let wanted = DISK_STORE + clients() * DISK_CLIENT;
            let free = self
                .volume
                .free_bytes()?
                .saturating_add(extents.free_bytes());
            self.full = (free < wanted).then(|| {
                format!(
                    "no room for new work on the disk: {} MiB are free, {} MiB are kept for what \
                     is under way",
                    free >> 20,
                    wanted >> 20
                )
            });
        }
        Ok(self.full.clone())
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, StorageError> {
    let thread = std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(work);
    thread.map_err(|e| StorageError::Append(format!("cannot start thread {name}: {e}")))
}

fn open_superblock(volume: &dyn Volume) -> Result<Superblock, StorageError> {
    match Superblock::open(volume, None) {
        Ok(superblock) => Ok(superblock),
        Err(SuperblockError::Absent) => {
            let storage = random_u128()?;
            Ok(Superblock::create(
                volume,
                NodeState {
                    storage,
                    ..NodeState::default()
                },
            )?)
        }
        Err(error) => Err(error.into()),
    }
}

/// A storage's uuid, from the operating system.
fn random_u128() -> Result<u128, StorageError> {
    use std::io::Read;
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut bytes))
        .map_err(|e| StorageError::Append(format!("/dev/urandom: {e}")))?;
    Ok(u128::from_le_bytes(bytes))
}

/// Every extent that an object or a kept record refers to.
fn live_extents(store: &dyn Store, log: &Log) -> Result<Vec<ExtentRef>, StorageError> {
    let mut live = Vec::new();
    let mut bad = None;
    let all = (std::ops::Bound::Unbounded, std::ops::Bound::Unbounded);
    store.scan(all, usize::MAX, &mut |_, value| {
        match wire::decode::<Stored>(value, "stored object") {
            Ok(Stored {
                value: Value::Extent(extent),
                ..
            }) => live.push(extent_ref(&extent)),
            Ok(_) => {}
            Err(m) => bad = Some(m.what),
        }
        bad.is_none()
    })?;
    if let Some(what) = bad {
        return Err(StorageError::Malformed(what));
    }
    for record in log.iter(log::Lsn(0)) {
        let record = record.map_err(|e| StorageError::Append(e.to_string()))?;
        let Ok(record) = Record::from_parts(record.header.kind, &record.body) else {
            continue;
        };
        let mut values: Vec<&Value> = Vec::new();
        match &record {
            Record::Op(op) => {
                for w in &op.writes {
                    values.extend(w.before.as_ref().map(|s| &s.value));
                    if let Recorded::Put(value) = &w.change {
                        values.push(value);
                    }
                }
            }
            Record::Undone(undone) => {
                values.extend(
                    undone
                        .restored
                        .iter()
                        .filter_map(|(_, s)| Some(&s.as_ref()?.value)),
                );
            }
            _ => {}
        }
        live.extend(values.into_iter().filter_map(|value| match value {
            Value::Extent(extent) => Some(extent_ref(extent)),
            Value::Inline(_) => None,
        }));
    }
    live.sort_unstable();
    live.dedup();
    Ok(live)
}

/// Work of the bulk thread, done in the order given.
enum Bulk {
    /// Write this extent; its data is in [`Unwritten`].
    Write(ExtentRef),
    /// The batch of records up to here may commit once what was given before is durable.
    Batch(GroupPin, log::Lsn),
}

/// Data of extents that are reserved and not written, by offset. Their sources hold them until they
/// are committed, which bounds them.
#[derive(Debug, Default)]
struct Unwritten(Mutex<HashMap<u64, Bytes>>);

impl Unwritten {
    fn map(&self) -> MutexGuard<'_, HashMap<u64, Bytes>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, extent: &ExtentRef) -> Option<Bytes> {
        self.map().get(&extent.offset).cloned()
    }
}

/// Writes and syncs extents, then lets the committer have the records that point to them.
struct BulkSync {
    extents: Arc<ExtentFile>,
    unwritten: Arc<Unwritten>,
    publisher: Publisher,
    under_way: Arc<AtomicU64>,
    durability: Arc<Durability>,
}

impl BulkSync {
    fn run(self, work: &Receiver<Bulk>) {
        let mut waiting = Vec::new();
        while let Ok(first) = work.recv() {
            // One sync serves all batches that wait.
            let rest = work.try_iter().take(BULK_PER_SYNC);
            for bulk in std::iter::once(first).chain(rest) {
                match bulk {
                    Bulk::Batch(pin, end) => waiting.push((pin, end)),
                    Bulk::Write(extent) => {
                        if let Err(error) = self.write(extent) {
                            return self.durability.fail(error.to_string());
                        }
                    }
                }
            }
            if waiting.is_empty() {
                continue;
            }
            if let Err(error) = self.extents.sync() {
                return self.durability.fail(error.to_string());
            }
            let count = waiting.len() as u64;
            for (pin, end) in waiting.drain(..) {
                self.publisher.publish(pin, end);
            }
            self.under_way.fetch_sub(count, Ordering::AcqRel);
        }
    }

    fn write(&self, extent: ExtentRef) -> Result<(), ExtentError> {
        let data = self.unwritten.get(&extent);
        let data = data.expect("it stays until it is written");
        self.extents.fill(extent, &data)?;
        // From here on it is read from the file.
        self.unwritten.map().remove(&extent.offset);
        Ok(())
    }
}

/// Writes frozen overlays to the store once the WAL rule allows it.
struct Checkpointer {
    store: Arc<dyn Store>,
    durability: Arc<Durability>,
    wake: Box<dyn Fn() + Send>,
}

impl Checkpointer {
    fn run(self, work: &Receiver<(Arc<Frozen>, Vec<u8>)>) {
        while let Ok((frozen, position)) = work.recv() {
            let durable = loop {
                let durable = DurablePoint {
                    lsn: log::Lsn(self.durability.lsn.load(Ordering::Acquire)),
                    group: self.durability.group.load(Ordering::Acquire),
                };
                if frozen.is_durable(durable) {
                    break durable;
                }
                if self.durability.failure().is_some() {
                    return;
                }
                // The committer is a sync away; checkpoints are rare and in no hurry.
                std::thread::park_timeout(std::time::Duration::from_millis(2));
            };
            if let Err(error) = frozen.checkpoint(&*self.store, 0, &position, durable) {
                self.durability.fail(error.to_string());
                return;
            }
            (self.wake)();
        }
    }
}

impl Storage for ShardStorage {
    fn get(&mut self, key: &Key) -> Option<Stored> {
        let found = self
            .overlay
            .get(&encode_key(key))
            .map_err(StorageError::from);
        let bytes = self.keep(found)??;
        let stored = wire::decode(&bytes, "stored object");
        self.keep(stored.map_err(|m| StorageError::Malformed(m.what)))
    }

    fn put(&mut self, key: &Key, value: Option<Stored>) {
        let encoded = value.map(|stored| wire::encode(&stored));
        self.overlay.put(&encode_key(key), encoded.as_deref());
    }

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
            self.failure.get_or_insert(bad);
        }
        let fetched = found
            .into_iter()
            .filter_map(|(key, value)| Some((key, self.fetch(&value)?)));
        Page {
            entries: fetched.collect(),
            more,
        }
    }

    fn append(&mut self, kind: u8, epoch: Epoch, body: &[u8]) -> Lsn {
        let pin = self.pin.get_or_insert_with(|| self.publisher.clock().pin());
        let group = pin.group();
        self.last_group = group;
        self.appended = true;
        let append = Append {
            kind,
            flags: 0,
            epoch: epoch.0,
            group,
            parts: &[body],
        };
        match self.log.append(append) {
            Ok(lsn) => Lsn(lsn.0),
            Err(error) => {
                self.failure
                    .get_or_insert(StorageError::Append(error.to_string()));
                Lsn(u64::MAX)
            }
        }
    }

    fn load(&mut self, lsn: Lsn) -> Option<Vec<u8>> {
        let read = self
            .log
            .read(log::Lsn(lsn.0))
            .map_err(|e| StorageError::Append(e.to_string()));
        self.keep(read).map(|record| record.body)
    }

    fn place(&mut self, bytes: &Bytes) -> Extent {
        let reserved = self.extents.reserve(bytes).map_err(StorageError::from);
        self.placed = true;
        let reserved = self.keep(reserved);
        if let Some(extent) = reserved {
            self.unwritten.map().insert(extent.offset, bytes.clone());
            // The thread lives as long as this sender, or has said why not.
            let _ = self.bulk.send(Bulk::Write(extent));
        }
        match reserved {
            Some(ExtentRef {
                offset,
                len,
                crc32c,
            }) => Extent {
                offset,
                len,
                crc: crc32c,
            },
            None => Extent {
                offset: 0,
                len: 0,
                crc: 0,
            },
        }
    }

    fn fetch(&mut self, value: &Value) -> Option<Bytes> {
        match value {
            Value::Inline(bytes) => Some(bytes.clone()),
            Value::Extent(extent) => {
                if let Some(bytes) = self.unwritten.get(&extent_ref(extent)) {
                    return Some(bytes);
                }
                let read = self
                    .extents
                    .read_verify(extent_ref(extent))
                    .map_err(StorageError::from);
                self.keep(read).map(Bytes::from)
            }
        }
    }

    fn has_room(&self) -> bool {
        self.full.is_none()
    }
}

#[cfg(test)]
mod tests;
