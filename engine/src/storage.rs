//! A destination's storage: one log, overlay and way to the committer per shard
//! ([`ShardStorage`]), and what the node has once ([`NodeStorage`]): checkpoint store, extents,
//! committer, superblock.
//!
//! Order of durability (D2): an extent is synced before the log record that points to it can
//! commit; a checkpoint is written only once every record it reflects is durable on every log (the
//! overlay asserts it). Everything that blocks runs on other threads: the committer syncs logs, the
//! bulk thread writes and syncs extents, the checkpoint thread writes the store.
//!
//! The engine thread gives the steps of a round one commit group and pins it; each shard's batch
//! carries a clone of the pin until its records are published. Groups are given by one thread, so
//! they rise with the steps, in every log, and "group durable" says "steps durable".
//!
//! A checkpoint is of the node: the front's image and every shard's objects as of one step, written
//! in one transaction. So objects may move between shards from one start to the next.
//!
//! A failure anywhere is kept in [`Durability`]; the node looks before it lets any effect out and
//! leaves the cluster, so nothing is acknowledged after it.

mod recover;
mod shard;
mod work;

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, unbounded};
use lowtide_engine_core::destination::{Image, RecoverError};
use lowtide_engine_core::ids::{Step, StorageId};
use lowtide_engine_core::op::{Key, Range};
use lowtide_engine_core::record::Extent;
use lowtide_engine_core::room::{Cost, Space};

pub use shard::{ShardGauge, ShardStorage};
use work::{BulkSync, CheckpointPart, Checkpointer, Unwritten};

use crate::log::commit::{Committer, GroupClock, GroupPin, ShardLog};
use crate::log::set::{LogSet, SetConfig};
use crate::log::superblock::{NodeState, SUPERBLOCK_FILE, Superblock, SuperblockError};
use crate::log::{self, Log, LogConfig, LogIdentity, OpenError};
use crate::medium::dir::{DirOptions, DirVolume};
use crate::medium::{MediumError, Volume};
use crate::store::extents::{EXTENTS_FILE, ExtentError, ExtentFile, ExtentRef};
use crate::store::overlay::DurablePoint;
use crate::store::redb_store::{RedbStore, STORE_FILE};
use crate::store::{Store, StoreError};

/// Page cache of the checkpoint store, in bytes.
const STORE_CACHE: usize = 32 << 20;
/// How often the disk is asked how much is free.
const DISK_EVERY: Duration = Duration::from_millis(20);
/// Most segments of a log. They bound how many clients a home takes: each needs room for its budget
/// in every log, so at most 38.
const SEGMENTS_MAX: usize = 24;
/// This part of a segment is kept by each log for itself.
const LOG_RESERVE: u64 = 4;

/// Shape of a destination's storage.
#[derive(Clone, Debug)]
pub struct StorageConfig {
    /// Shards, from 1 to the mind's `SHARDS_MAX`; may be another number than the last time.
    pub shards: u32,
    /// Length of a log segment, in bytes. Fixed for the life of the state.
    pub segment_bytes: u64,
    /// Longest log record, in bytes; at most a quarter of a segment.
    pub record_bytes_max: u64,
    /// Most segments of one shard's log.
    pub segments_max: usize,
    /// A checkpoint begins when the overlays hold this much, in bytes.
    pub checkpoint_bytes: usize,
    /// Largest extent file, in bytes.
    pub extents_max: u64,
}

impl StorageConfig {
    /// The product's shape.
    #[must_use]
    pub fn new(shards: u32) -> StorageConfig {
        StorageConfig {
            shards,
            segment_bytes: 64 << 20,
            record_bytes_max: 12 << 20,
            segments_max: SEGMENTS_MAX,
            checkpoint_bytes: 32 << 20,
            extents_max: 1 << 40,
        }
    }
}

/// What is known of the disk under the files.
#[derive(Debug)]
struct Disk {
    volume: Arc<dyn Volume>,
    /// When to ask again.
    due: Instant,
    /// Bytes free when asked last.
    free: u64,
}

impl Disk {
    fn ask(&mut self, extents: &ExtentFile) -> Result<(), StorageError> {
        let now = Instant::now();
        if now >= self.due {
            self.due = now + DISK_EVERY;
            let free = self.volume.free_bytes()?;
            self.free = free.saturating_add(extents.free_bytes());
        }
        Ok(())
    }
}

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
    /// The superblock is gone and other files of the state are not.
    #[error(
        "{SUPERBLOCK_FILE} is missing beside {0}: without it nothing says whose state this is; \
         restore it from a copy"
    )]
    SuperblockMissing(String),
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
pub(crate) fn encode_key(key: &Key) -> Vec<u8> {
    let mut out = Vec::with_capacity(16 + key.name.len());
    out.extend_from_slice(&key.space.to_be_bytes());
    out.extend_from_slice(&key.slot.to_be_bytes());
    out.extend_from_slice(&key.name);
    out
}

pub(crate) fn decode_key(bytes: &[u8]) -> Option<Key> {
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

/// Position of a checkpoint: how far each log is reflected, and the mind's image.
fn encode_position(ends: &[log::Lsn], image: &[u8]) -> Vec<u8> {
    let mut out = (ends.len() as u32).to_le_bytes().to_vec();
    for end in ends {
        out.extend_from_slice(&end.0.to_le_bytes());
    }
    out.extend_from_slice(image);
    out
}

fn decode_position(bytes: &[u8]) -> Result<(Vec<log::Lsn>, &[u8]), StorageError> {
    let malformed = StorageError::Malformed("checkpoint position");
    let Some((count, rest)) = bytes.split_first_chunk::<4>() else {
        return Err(malformed);
    };
    let count = u32::from_le_bytes(*count) as usize;
    let Some((ends, image)) = count.checked_mul(8).and_then(|n| rest.split_at_checked(n)) else {
        return Err(malformed);
    };
    let ends = ends.as_chunks::<8>().0.iter();
    let ends = ends.map(|e| log::Lsn(u64::from_le_bytes(*e))).collect();
    Ok((ends, image))
}

/// What is told to the engine thread from the threads that block.
#[derive(Debug, Default)]
pub struct Durability {
    /// Each log is durable before this position.
    ends: Vec<AtomicU64>,
    /// Groups up to this one are durable.
    group: AtomicU64,
    failed: std::sync::Mutex<Option<String>>,
}

impl Durability {
    /// How far log `number` and the groups are durable.
    fn point(&self, number: u32) -> DurablePoint {
        let end = self.ends.get(number as usize);
        DurablePoint {
            lsn: log::Lsn(end.map_or(0, |e| e.load(Ordering::Acquire))),
            group: self.group.load(Ordering::Acquire),
        }
    }

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

/// What a destination's storage has once, whatever the number of shards. Belongs to the thread of
/// the front.
#[derive(Debug)]
pub struct NodeStorage {
    clock: Arc<GroupClock>,
    durability: Arc<Durability>,
    /// Groups that were given out and are not known durable, with the newest step of each.
    groups: VecDeque<(u64, Step)>,
    durable: Step,
    checkpoint_bytes: usize,
    gauges: Vec<Arc<ShardGauge>>,
    checkpoints: Sender<CheckpointPart>,
    checkpointing: Arc<AtomicBool>,
    /// Logs that a larger number of shards has left.
    left: Vec<Log>,
    disk: Disk,
    needed: Cost,
    common: Arc<shard::Common>,
    threads: Vec<JoinHandle<()>>,
    committer: Committer,
    boots: u64,
    recovered_records: u64,
}

impl NodeStorage {
    /// Opens or creates the state in `dir` and recovers what the mind needs. `wake` is called from
    /// other threads whenever something became durable or failed.
    ///
    /// # Errors
    /// [`StorageError`] naming the file and what is wrong with it.
    ///
    /// # Panics
    /// If the number of shards is out of range.
    pub fn open(
        dir: &Path,
        config: &StorageConfig,
        power_fail: bool,
        wake: impl Fn() + Send + Sync + Clone + 'static,
    ) -> Result<(NodeStorage, Vec<ShardStorage>, Image), StorageError> {
        let options = DirOptions {
            power_fail,
            ..DirOptions::default()
        };
        let volume: Arc<dyn Volume> = Arc::new(DirVolume::open(dir, options)?);
        NodeStorage::open_on(volume, config, wake)
    }

    /// As [`NodeStorage::open`], on a volume of the caller's.
    ///
    /// # Errors
    /// As [`NodeStorage::open`].
    ///
    /// # Panics
    /// As [`NodeStorage::open`].
    pub fn open_on(
        volume: Arc<dyn Volume>,
        config: &StorageConfig,
        wake: impl Fn() + Send + Sync + Clone + 'static,
    ) -> Result<(NodeStorage, Vec<ShardStorage>, Image), StorageError> {
        let mut superblock = open_superblock(&*volume)?;
        let store: Arc<dyn Store> = Arc::new(RedbStore::open(&*volume, STORE_CACHE)?);
        let position = store.last_checkpoint(0)?;
        let position = position.unwrap_or_else(|| encode_position(&[], &[]));
        let (covered, image) = decode_position(&position)?;
        let storage = superblock.state().storage;
        let shards = config.shards;
        let shard = LogConfig {
            segment_bytes: config.segment_bytes,
            record_bytes_max: config.record_bytes_max,
            segments_max: config.segments_max,
            reserve_bytes: config.segment_bytes / LOG_RESERVE,
            ..LogConfig::new("shard", LogIdentity { storage, number: 0 })
        };
        let logs = SetConfig {
            storage,
            shards,
            shard,
            must_reach: covered.clone(),
            was_opened: superblock.state().boots > 0,
        };
        let (set, _report) = LogSet::open(volume.clone(), &logs)?;
        let whole = (config, StorageId(storage), image);
        let recovered = recover::replay(&volume, &set, &store, whole)?;
        superblock.update(|s| s.boots += 1)?;

        let durability = Arc::new(Durability {
            ends: set
                .logs()
                .iter()
                .map(|l| AtomicU64::new(l.end().0))
                .collect(),
            ..Durability::default()
        });
        let readers = set.logs().iter().map(Log::reader).collect();
        let (logs, committer) = start_committer(set, &durability, wake.clone())?;
        let extents = Arc::new(recovered.extents);
        let checkpointing = Arc::new(AtomicBool::new(false));
        let unwritten = Arc::new(Unwritten::default());
        let (bulk, batches) = unbounded();
        let (checkpoints, parts) = unbounded();
        let bulk_thread = BulkSync {
            volume: volume.clone(),
            extents: extents.clone(),
            unwritten: unwritten.clone(),
            durability: durability.clone(),
        };
        let checkpoint_thread = Checkpointer {
            store,
            durability: durability.clone(),
            shards: shards as usize,
            under_way: checkpointing.clone(),
            wake: Box::new(wake),
        };
        let threads = vec![
            spawn("lowtide-bulk", move || bulk_thread.run(&batches))?,
            spawn("lowtide-ckpt", move || checkpoint_thread.run(&parts))?,
        ];
        let common = Arc::new(shard::Common {
            extents,
            durability: durability.clone(),
            bulk,
            unwritten,
            checkpoints: checkpoints.clone(),
            readers,
            moved: AtomicU32::new(0),
            needed: AtomicU64::new(0),
            log_reserve: config.segment_bytes / LOG_RESERVE,
        });
        let mut logs: VecDeque<ShardLog> = logs.into();
        let mut list = Vec::new();
        for (number, overlay) in (0..).zip(recovered.overlays) {
            let covered = covered.get(number as usize).map_or(0, |lsn| lsn.0);
            let log = logs.pop_front().ok_or(StorageError::Malformed("logs"))?;
            list.push(ShardStorage::new(
                number,
                overlay,
                log,
                common.clone(),
                covered,
            ));
        }
        let node = NodeStorage {
            clock: committer.clock().clone(),
            durability,
            groups: VecDeque::new(),
            durable: Step(0),
            checkpoint_bytes: config.checkpoint_bytes,
            gauges: list.iter().map(ShardStorage::gauge).collect(),
            checkpoints,
            checkpointing,
            left: logs.into_iter().map(|l| l.log).collect(),
            disk: Disk {
                volume,
                due: Instant::now(),
                free: u64::MAX,
            },
            needed: Cost::default(),
            common,
            threads,
            committer,
            boots: superblock.state().boots,
            recovered_records: recovered.records,
        };
        Ok((node, list, recovered.image))
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

    /// Pins the current group for steps up to `last`, the newest that was ordered.
    pub fn pin(&mut self, last: Step) -> GroupPin {
        let pin = self.clock.pin();
        match self.groups.back_mut() {
            Some((group, step)) if *group == pin.group() => *step = last,
            _ => self.groups.push_back((pin.group(), last)),
        }
        pin
    }

    /// Records of steps up to this one are durable, since the start.
    pub fn durable(&mut self) -> Step {
        let group = self.durability.group.load(Ordering::Acquire);
        while let Some((_, step)) = self.groups.pop_front_if(|(g, _)| *g <= group) {
            self.durable = step;
        }
        self.durable
    }

    /// What broke, if anything. After that nothing may be acknowledged.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.durability.failure()
    }

    /// Everything up to this step was recovered, hence is durable.
    pub fn begin_at(&mut self, step: Step) {
        self.durable = step;
    }

    /// Whether a checkpoint is being written.
    #[must_use]
    pub fn is_checkpointing(&self) -> bool {
        self.checkpointing.load(Ordering::Acquire)
    }

    /// What is free.
    #[must_use]
    pub fn space(&self) -> Space {
        let logs = self.gauges.iter().map(|g| g.free());
        Space {
            log: logs.min().unwrap_or_default(),
            disk: self.disk.free,
            is_crowded: false,
        }
    }

    /// The mind lets new work in only while so much is free: the logs grow towards it.
    pub fn set_needed(&mut self, needed: Cost) {
        self.needed = needed;
        // A shard that reads an older figure reads this one in its next batch.
        self.common.needed.store(needed.log, Ordering::Relaxed);
    }

    fn logs_have_room(&self) -> bool {
        self.space().log >= self.needed.log
    }

    /// Why there is no room for new work, in words, if there is none.
    #[must_use]
    pub fn full(&self) -> Option<String> {
        let Space { log, disk, .. } = self.space();
        let kept = "are kept for what is under way";
        let needed = self.needed;
        if disk < needed.disk {
            let (free, needed) = (disk >> 20, needed.disk >> 20);
            let words = "no room for new work on the disk";
            return Some(format!("{words}: {free} MiB are free, {needed} MiB {kept}"));
        }
        (log < needed.log).then(|| {
            let (free, needed) = (log >> 20, needed.log >> 20);
            let words = "no room for new work in a log";
            let grows = self.gauges.iter().find_map(|g| g.grows());
            let grows = grows.map_or_else(String::new, |why| format!(": {why}"));
            format!("{words}: {free} MiB are free, {needed} MiB {kept}{grows}")
        })
    }

    /// Looks now and then how much the disk takes.
    pub fn ask_disk(&mut self) {
        if let Err(error) = self.disk.ask(&self.common.extents) {
            self.durability.fail(error.to_string());
        }
    }

    /// Begins a checkpoint if one is due and none is under way. The caller then has every shard
    /// [freeze](ShardStorage::freeze) when it has come to the step that `image` is of.
    pub fn begin_checkpoint(&mut self, image: impl FnOnce() -> Vec<u8>) -> bool {
        let gauges = self.gauges.iter();
        let bytes: usize = gauges.map(|g| g.active_bytes.load(Ordering::Relaxed)).sum();
        let due = bytes >= self.checkpoint_bytes || (!self.logs_have_room() && bytes > 0);
        // Acquire pairs with the Release when the one before was written.
        if !due || self.checkpointing.load(Ordering::Acquire) {
            return false;
        }
        self.checkpointing.store(true, Ordering::Relaxed);
        let first = self.gauges.len() as u32;
        let ends = self.left.iter().map(Log::end);
        let ends = (first..).zip(ends).collect();
        // The thread lives as long as this sender.
        let _ = self.checkpoints.send(CheckpointPart::Front(image(), ends));
        if self.common.moved.load(Ordering::Acquire) == 0 {
            // The checkpoint before covered them, or they were empty.
            for log in &mut self.left {
                let end = log.end();
                log.recycle(end);
            }
        }
        true
    }

    /// Bytes of objects held in memory in front of the store.
    #[must_use]
    pub fn overlay_bytes(&self) -> usize {
        let gauges = self.gauges.iter();
        gauges
            .map(|g| g.overlay_bytes.load(Ordering::Relaxed))
            .sum()
    }

    /// Commits what was appended and stops the threads. The shards' storages must be gone.
    pub fn close(self) {
        let NodeStorage {
            checkpoints,
            common,
            threads,
            committer,
            ..
        } = self;
        drop((checkpoints, common));
        for thread in threads {
            // A panic there was reported by the panic hook.
            let _ = thread.join();
        }
        committer.stop();
    }
}

fn start_committer(
    set: LogSet,
    durability: &Arc<Durability>,
    wake: impl Fn() + Send + 'static,
) -> Result<(Vec<ShardLog>, Committer), StorageError> {
    let told = durability.clone();
    let (logs, committer) = set.start(move |news| {
        match news {
            Ok(committed) => {
                for (cell, end) in told.ends.iter().zip(committed.ends) {
                    cell.store(end.0, Ordering::Release);
                }
                told.group.store(committed.group, Ordering::Release);
            }
            Err(error) => told.fail(error.to_string()),
        }
        wake();
    })?;
    durability
        .group
        .store(committer.durable_group(), Ordering::Release);
    Ok((logs, committer))
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, StorageError> {
    let thread = std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(work);
    thread.map_err(|e| StorageError::Append(format!("cannot start thread {name}: {e}")))
}

fn open_superblock(volume: &dyn Volume) -> Result<Superblock, StorageError> {
    match Superblock::open(volume, None) {
        Ok(superblock) => return Ok(superblock),
        Err(SuperblockError::Absent) => match first_file(volume)? {
            None => {}
            Some(file) => return Err(StorageError::SuperblockMissing(file)),
        },
        // Cut off while it was created: it is the first file with anything in it.
        Err(SuperblockError::Damaged) if first_file(volume)?.is_none() => {}
        Err(error) => return Err(error.into()),
    }
    let state = NodeState {
        storage: random_u128()?,
        ..NodeState::default()
    };
    Ok(Superblock::create(volume, state)?)
}

/// A file of the state, all of which are younger than the superblock: a store, a log, extents.
fn first_file(volume: &dyn Volume) -> Result<Option<String>, StorageError> {
    let is_ours = |n: &String| n == STORE_FILE || n == EXTENTS_FILE || n.ends_with(".seg");
    Ok(volume.list()?.into_iter().find(is_ours))
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

#[cfg(test)]
mod tests;
