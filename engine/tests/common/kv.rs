//! A small storage node: two shards with a log and an overlay each, one store, one superblock. Every
//! operation changes the same key in both shards; a restart must show a prefix of the operations,
//! the same one in both.

use crate::common::{STORAGE, tiny};
use lowtide_engine::log::commit::{Committer, ShardLog};
use lowtide_engine::log::set::{LogSet, SetConfig};
use lowtide_engine::log::superblock::{NodeState, Superblock, SuperblockError};
use lowtide_engine::log::{Append, Lsn};
use lowtide_engine::medium::Volume;
use lowtide_engine::store::Store;
use lowtide_engine::store::overlay::{DurablePoint, FreezePoint, Overlay};
use lowtide_engine::store::redb_store::RedbStore;
use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

const KEYS: u64 = 37;

/// What operation `op` does: a key, and the value it sets or `None`.
fn change(op: u64) -> (Vec<u8>, Option<Vec<u8>>) {
    let key = format!("key {:02}", op * 7 % KEYS).into_bytes();
    let value = format!("{op:08} ")
        .repeat(1 + op as usize % 30)
        .into_bytes();
    (key, (!op.is_multiple_of(5)).then_some(value))
}

pub struct Kv {
    shards: Vec<ShardLog>,
    overlays: Vec<Overlay>,
    committer: Committer,
    store: Arc<RedbStore>,
    block: Superblock,
    said: Receiver<Result<u64, String>>,
    /// Operations done: 1 to this one.
    pub ops: u64,
    /// Largest group acknowledged, and the operations of each group not yet acknowledged.
    waiting: BTreeMap<u64, u64>,
    /// Operations acknowledged: 1 to this one.
    pub acknowledged: u64,
}

type Fault = Box<dyn std::error::Error>;

impl Kv {
    /// Opens the node and checks that it shows a prefix of the operations.
    pub fn open(volume: Arc<dyn Volume>) -> Result<Kv, Fault> {
        let mut block = match Superblock::open(&*volume, Some(STORAGE)) {
            Ok(block) => block,
            Err(SuperblockError::Absent | SuperblockError::Damaged) => {
                let state = NodeState {
                    storage: STORAGE,
                    ..NodeState::default()
                };
                Superblock::create(&*volume, state)?
            }
            Err(e) => return Err(e.into()),
        };
        block.update(|s| s.boots += 1)?;
        let must_reach = block.state().checkpoints.clone();
        let config = SetConfig {
            storage: STORAGE,
            shards: 2,
            shard: tiny("", 0),
            must_reach,
            was_opened: false,
        };
        let (set, _) = LogSet::open(volume.clone(), &config)?;
        let store = Arc::new(RedbStore::open(&*volume, 1 << 20)?);
        let mut overlays = Vec::new();
        let mut ops = Vec::new();
        for (shard, log) in set.logs().iter().enumerate() {
            let (overlay, newest) = redo(log, shard as u32, &store)?;
            overlays.push(overlay);
            ops.push(newest);
        }
        // The WAL rule and atomic groups, in one look.
        assert_eq!(ops[0], ops[1], "the shards show different prefixes");
        for overlay in &overlays {
            verify(overlay, ops[0]);
        }
        let (say, said) = channel();
        let (shards, committer) = set.start(move |committed| {
            let _ = say.send(committed.map(|c| c.group).map_err(ToString::to_string));
        })?;
        let (ops, waiting) = (ops[0], BTreeMap::new());
        Ok(Kv {
            shards,
            overlays,
            committer,
            store,
            block,
            said,
            ops,
            waiting,
            acknowledged: ops,
        })
    }

    /// Executes and publishes the next operation.
    pub fn step(&mut self) -> Result<(), Fault> {
        if self.shards.iter().any(|s| s.log.free_bytes() < 8 << 10) {
            self.checkpoint()?;
        }
        let op = self.ops + 1;
        let (key, value) = change(op);
        let pin = self.shards[0].publisher.clock().pin();
        let group = pin.group();
        for (ShardLog { log, publisher }, overlay) in self.shards.iter_mut().zip(&mut self.overlays)
        {
            let parts: [&[u8]; 2] = [&key, value.as_deref().unwrap_or_default()];
            let flags = u8::from(value.is_some());
            log.append(Append {
                kind: 1,
                flags,
                epoch: op,
                group,
                parts: &parts,
            })?;
            overlay.put(&key, value.as_deref());
            let end = log.end_batch(group);
            publisher.publish(pin.clone(), end);
        }
        self.ops = op;
        self.waiting.insert(group, op);
        Ok(())
    }

    /// Waits until what was done so far has a commit group of its own: the committer has closed it
    /// and begins to sync, while the next operations are done. So the number of groups does not
    /// depend on when the committer gets to run.
    #[allow(dead_code, reason = "each test program uses a part")]
    pub fn end_group(&mut self) {
        let Some(&group) = self.waiting.keys().next_back() else {
            return;
        };
        let clock = self.committer.clock();
        while clock.pin().group() <= group && !self.committer.is_finished() {
            std::thread::yield_now();
        }
    }

    /// Waits until everything done is acknowledged.
    pub fn settle(&mut self) -> Result<u64, Fault> {
        while self.acknowledged < self.ops {
            let group = self.said.recv()??;
            while let Some(entry) = self.waiting.first_entry().filter(|e| *e.key() <= group) {
                self.acknowledged = entry.remove();
            }
        }
        Ok(self.acknowledged)
    }

    /// Freezes each shard, writes it to the store on another thread once the WAL rule allows, and
    /// gives log space back.
    pub fn checkpoint(&mut self) -> Result<(), Fault> {
        let group = self.waiting.last_key_value().map_or(0, |(group, _)| *group);
        let mut frozen = Vec::new();
        for (overlay, shard) in self.overlays.iter_mut().zip(&self.shards) {
            let point = FreezePoint {
                lsn: shard.log.end(),
                group,
            };
            frozen.push(overlay.freeze(point).ok_or("still frozen")?);
        }
        self.settle()?;
        for (number, frozen) in frozen.iter().enumerate() {
            let position = frozen.point().lsn.0.to_le_bytes();
            let lsn = self.shards[number].log.durable();
            let durable = DurablePoint {
                lsn,
                group: self.committer.durable_group(),
            };
            let store = self.store.clone();
            std::thread::scope(|s| {
                s.spawn(|| frozen.checkpoint(&*store, number as u32, &position, durable))
                    .join()
            })
            .map_err(|_| "checkpoint panicked")??;
        }
        let mut points = Vec::new();
        for overlay in &mut self.overlays {
            points.push(overlay.retire().ok_or("not written")?.lsn);
            verify(overlay, self.ops);
        }
        self.block.update(|s| s.checkpoints = points.clone())?;
        for (shard, point) in self.shards.iter_mut().zip(points) {
            shard.log.recycle(point);
        }
        Ok(())
    }

    /// Ends the node in good order; says what was acknowledged in the end.
    pub fn stop(mut self) -> u64 {
        self.committer.stop();
        for group in self.said.try_iter().flatten() {
            while let Some(entry) = self.waiting.first_entry().filter(|e| *e.key() <= group) {
                self.acknowledged = entry.remove();
            }
        }
        self.acknowledged
    }
}

/// Puts the log's records since the checkpoint over the store; says the newest operation.
fn redo(
    log: &lowtide_engine::log::Log,
    shard: u32,
    store: &Arc<RedbStore>,
) -> Result<(Overlay, u64), Fault> {
    let position = store.last_checkpoint(shard)?;
    let position = position.map_or(Lsn(0), |p| Lsn(u64::from_le_bytes(p.try_into().unwrap())));
    assert!(
        position <= log.end(),
        "the store is ahead of the log: {position}, {}",
        log.end()
    );
    let mut overlay = Overlay::new(store.clone());
    let mut newest = 0;
    for record in log.iter(Lsn(0)) {
        let record = record?;
        newest = record.header.epoch;
        if record.header.lsn >= position {
            let (key, value) = record.body.split_at(6);
            overlay.put(key, (record.header.flags == 1).then_some(value));
        }
    }
    // The log may have been given back wholly: then the store says how far it went.
    if newest == 0 {
        let all = (Bound::Unbounded, Bound::Unbounded);
        store.scan(all, usize::MAX, &mut |_, value| {
            newest = newest.max(std::str::from_utf8(&value[..8]).unwrap().parse().unwrap());
            true
        })?;
    }
    Ok((overlay, newest))
}

/// Compares a shard's whole state with that after operations 1 to `ops`.
fn verify(overlay: &Overlay, ops: u64) {
    let mut expected = BTreeMap::new();
    for op in 1..=ops {
        let (key, value) = change(op);
        expected.insert(key, value);
    }
    let mut found = BTreeMap::new();
    overlay
        .scan(b"", None, usize::MAX, &mut |key, value| {
            found.insert(key.to_vec(), value.to_vec());
            true
        })
        .unwrap();
    for (key, value) in &expected {
        assert_eq!(overlay.get(key).unwrap(), *value, "after {ops}");
    }
    expected.retain(|_, value| value.is_some());
    let expected: BTreeMap<_, _> = expected.into_iter().map(|(k, v)| (k, v.unwrap())).collect();
    assert_eq!(found, expected, "after {ops}");
}
