//! What a start makes of store, logs and extents: the records of all logs, merged by their steps,
//! over the checkpoint; and the extents that are still needed.

use std::sync::Arc;

use lowtide_engine_core::destination::Image;
use lowtide_engine_core::destination::shard::shard_of;
use lowtide_engine_core::ids::{Lsn, StorageId};
use lowtide_engine_core::op::{Bytes, Key};
use lowtide_engine_core::record::{Objects, Position, Record, Recorded, Stored, Value, step_of};
use lowtide_engine_core::wire;

use super::{StorageConfig, StorageError, decode_key, encode_key, extent_ref};
use crate::log::set::LogSet;
use crate::log::{self, Log};
use crate::medium::Volume;
use crate::store::Store;
use crate::store::extents::{ExtentFile, ExtentRef};
use crate::store::overlay::Overlay;

/// What was recovered.
pub(super) struct Recovered {
    pub(super) image: Image,
    /// One per shard.
    pub(super) overlays: Vec<Overlay>,
    pub(super) extents: ExtentFile,
    pub(super) records: u64,
}

/// Replays all logs over the checkpoint whose image is given.
pub(super) fn replay(
    volume: &Arc<dyn Volume>,
    set: &LogSet,
    store: &Arc<dyn Store>,
    (config, storage, image): (&StorageConfig, StorageId, &[u8]),
) -> Result<Recovered, StorageError> {
    let malformed = |m: wire::Malformed| StorageError::Malformed(m.what);
    let shards = config.shards;
    let mut image = Image::decode(image, storage, shards).map_err(malformed)?;
    let mut replay = Replay {
        overlays: (0..shards).map(|_| Overlay::new(store.clone())).collect(),
        extents: ExtentFile::open_for_reading(&**volume, config.extents_max)?,
        read: Vec::new(),
        failure: None,
    };
    let bad = |e: log::ReadError| StorageError::Append(e.to_string());
    let mut logs: Vec<_> = set
        .logs()
        .iter()
        .map(|l| l.iter(log::Lsn(0)).peekable())
        .collect();
    let mut records = 0;
    loop {
        // Of few logs the one whose next record has the oldest step.
        let mut next = None;
        for (number, log) in (0..).zip(&mut logs) {
            let Some(peeked) = log.peek() else { continue };
            let step = match peeked {
                Ok(record) => step_of(&record.body).map_err(malformed)?,
                Err(error) => return Err(bad(error.clone())),
            };
            if next.is_none_or(|(oldest, _)| step < oldest) {
                next = Some((step, number));
            }
        }
        let Some((_, number)) = next else { break };
        let Some(record) = logs[number as usize].next() else {
            break;
        };
        let record = record.map_err(bad)?;
        let position = Position {
            log: number,
            lsn: Lsn(record.header.lsn.0),
        };
        image.replay(position, (record.header.kind, &record.body), &mut replay)?;
        records += 1;
    }
    image.finish()?;
    if let Some(failure) = replay.failure.take() {
        return Err(failure);
    }
    let mut live = replay.live(&**store)?;
    for position in image.kept() {
        live.extend(extents_of_record(set.logs(), position)?);
    }
    live.sort_unstable();
    live.dedup();
    let Replay {
        overlays, extents, ..
    } = replay;
    extents.adopt(live)?;
    Ok(Recovered {
        image,
        overlays,
        extents,
        records,
    })
}

/// What a kept record may restore or supply.
fn extents_of_record(logs: &[Log], position: Position) -> Result<Vec<ExtentRef>, StorageError> {
    let log = logs.get(position.log as usize);
    let log = log.ok_or(StorageError::Malformed("log number"))?;
    let record = log
        .read(log::Lsn(position.lsn.0))
        .map_err(|e| StorageError::Append(e.to_string()))?;
    let record = Record::from_parts(record.header.kind, &record.body)
        .map_err(|m| StorageError::Malformed(m.what))?;
    let (_, Record::Op(op)) = record else {
        return Ok(Vec::new());
    };
    let mut values = Vec::new();
    for w in &op.writes {
        values.extend(w.before.as_ref().map(|s| &s.value));
        if let Recorded::Put(value) = &w.change {
            values.push(value);
        }
    }
    Ok(values.into_iter().filter_map(extent).collect())
}

fn extent(value: &Value) -> Option<ExtentRef> {
    match value {
        Value::Extent(extent) => Some(extent_ref(extent)),
        Value::Inline(_) => None,
    }
}

/// All shards' objects, while records are replayed.
struct Replay {
    overlays: Vec<Overlay>,
    extents: ExtentFile,
    /// Extents that replaying has read: as long as the checkpoint is the same, the next start
    /// reads them too.
    read: Vec<ExtentRef>,
    failure: Option<StorageError>,
}

impl Replay {
    fn overlay(&mut self, space: u64) -> &mut Overlay {
        let count = self.overlays.len() as u32;
        &mut self.overlays[shard_of(space, count) as usize]
    }

    fn keep<T>(&mut self, result: Result<T, StorageError>) -> Option<T> {
        result
            .map_err(|error| self.failure.get_or_insert(error))
            .ok()
    }

    /// Extents that objects refer to now, and those that replaying needs again.
    fn live(&mut self, store: &dyn Store) -> Result<Vec<ExtentRef>, StorageError> {
        let mut live = std::mem::take(&mut self.read);
        let mut bad = None;
        let mut look = |value: &[u8]| match wire::decode::<Stored>(value, "stored object") {
            Ok(stored) => live.extend(extent(&stored.value)),
            Err(m) => bad = Some(StorageError::Malformed(m.what)),
        };
        for (_, value) in self.overlays.iter().flat_map(Overlay::newer) {
            value.into_iter().for_each(&mut look);
        }
        let all = (std::ops::Bound::Unbounded, std::ops::Bound::Unbounded);
        store.scan(all, usize::MAX, &mut |key, value| {
            let newer =
                decode_key(key).is_some_and(|k| self.overlay(k.space).cached(key).is_some());
            if !newer {
                look(value);
            }
            true
        })?;
        bad.map_or(Ok(live), Err)
    }
}

impl Objects for Replay {
    fn get(&mut self, key: &Key) -> Option<Stored> {
        let found = self.overlay(key.space).get(&encode_key(key));
        let bytes = self.keep(found.map_err(StorageError::from))??;
        let stored = wire::decode(&bytes, "stored object");
        self.keep(stored.map_err(|m| StorageError::Malformed(m.what)))
    }

    fn put(&mut self, key: &Key, value: Option<Stored>) {
        let encoded = value.map(|stored| wire::encode(&stored));
        self.overlay(key.space)
            .put(&encode_key(key), encoded.as_deref());
    }

    fn fetch(&mut self, value: &Value) -> Option<Bytes> {
        match value {
            Value::Inline(bytes) => Some(bytes.clone()),
            Value::Extent(extent) => {
                let extent = extent_ref(extent);
                self.read.push(extent);
                let read = self.extents.read_verify(extent);
                self.keep(read.map_err(StorageError::from))
            }
        }
    }
}
