//! A two-shard node in memory whose operations are half in one log and half in the other.

use crate::common::{STORAGE, tiny};
use lowtide_engine::log::commit::{Committer, ShardLog};
use lowtide_engine::log::set::{LogSet, SetConfig, SetRecovered};
use lowtide_engine::log::{Append, Lsn, OpenError};
use lowtide_engine::medium::recording::RecordingVolume;
use lowtide_engine::medium::{SplitMix, Volume};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

/// What the committer said: a durable group, or that it gave up.
pub type Said = Result<u64, String>;

/// A running node.
pub struct Node {
    pub shards: Vec<ShardLog>,
    pub committer: Committer,
    pub said: Receiver<Said>,
}

pub fn config(shards: u32) -> SetConfig {
    SetConfig {
        storage: STORAGE,
        shards,
        shard: tiny("", 0),
        must_reach: Vec::new(),
        was_opened: false,
    }
}

pub fn start(
    volume: &RecordingVolume,
    shards: u32,
) -> Result<(Node, SetRecovered, Ops), OpenError> {
    let volume: Arc<dyn Volume> = Arc::new(volume.clone());
    let (set, report) = LogSet::open(volume, &config(shards))?;
    let found = ops(&set);
    let (say, said) = channel();
    let (shards, committer) = set.start(move |committed| {
        let _ = say.send(committed.map(|c| c.group).map_err(ToString::to_string));
    })?;
    Ok((
        Node {
            shards,
            committer,
            said,
        },
        report,
        found,
    ))
}

/// Operations found: number → logs that hold a half, with the group.
pub type Ops = BTreeMap<u64, Vec<(usize, u64)>>;

pub fn ops(set: &LogSet) -> Ops {
    let mut found = Ops::new();
    for (shard, log) in set.logs().iter().enumerate() {
        for record in log.iter(Lsn(0)) {
            let header = record.unwrap().header;
            found
                .entry(header.epoch)
                .or_default()
                .push((shard, header.group));
        }
    }
    found
}

/// What the workload knows.
#[derive(Clone, Default)]
pub struct Known {
    pub issued: u64,
    /// Operation → group.
    pub group_of: BTreeMap<u64, u64>,
    /// Largest group that was acknowledged.
    pub acknowledged: u64,
}

/// Issues `batches` batches of operations, each half in two logs, the halves interleaved so that
/// groups are not monotonic within a log; waits for an acknowledgement now and then.
pub fn run(
    node: &mut Node,
    known: &mut Known,
    batches: usize,
    rng: &mut SplitMix,
) -> Result<(), ()> {
    for _ in 0..batches {
        let clock = node.shards[0].publisher.clock().clone();
        let outer = clock.pin();
        for _ in 0..1 + rng.next_u64() % 3 {
            known.issued += 1;
            known.group_of.insert(known.issued, outer.group());
            let body = vec![known.issued as u8; (rng.next_u64() % 300) as usize];
            let first = rng.next_u64() as usize % 2;
            let append = Append {
                kind: 1,
                flags: 0,
                epoch: known.issued,
                group: outer.group(),
                parts: &[&body],
            };
            for shard in [first, 1 - first] {
                let ShardLog { log, publisher } = &mut node.shards[shard];
                log.append(append).map_err(|_| ())?;
                let end = log.end_batch(outer.group());
                publisher.publish(outer.clone(), end);
            }
        }
        let group = outer.group();
        drop(outer);
        for shard in &mut node.shards {
            if shard.log.free_bytes() < 20 << 10 {
                let keep = shard.log.durable();
                shard.log.recycle(Lsn(keep.0.saturating_sub(16 << 10)));
            }
        }
        if rng.next_u64().is_multiple_of(3) {
            await_group(node, known, group)?;
        }
    }
    Ok(())
}

/// Waits until the group is acknowledged; `Err` when the committer gave up.
pub fn await_group(node: &Node, known: &mut Known, group: u64) -> Result<(), ()> {
    while known.acknowledged < group {
        match node.said.recv() {
            Ok(Ok(durable)) => known.acknowledged = durable,
            Ok(Err(_)) | Err(_) => return Err(()),
        }
    }
    Ok(())
}

/// After a restart: every acknowledged operation is whole, no operation is half, unless its records
/// were recycled; and groups count from the bottom.
pub fn check(known: &Known, report: &SetRecovered, found: &Ops) -> Result<(), String> {
    if report.durable_group < known.acknowledged {
        return Err(format!(
            "group {} was acknowledged, {report:?}",
            known.acknowledged
        ));
    }
    let oldest = |shard| {
        found
            .iter()
            .find(|(_, h)| h.iter().any(|x| x.0 == shard))
            .map(|x| *x.0)
    };
    let from = oldest(0)
        .unwrap_or(u64::MAX)
        .max(oldest(1).unwrap_or(u64::MAX));
    for (op, halves) in found.range(from..) {
        if halves.len() != 2 {
            return Err(format!("operation {op} is half there: {halves:?}"));
        }
        if known.group_of.get(op) != Some(&halves[0].1) || halves[0].1 > report.durable_group {
            return Err(format!("operation {op} in {halves:?}, {report:?}"));
        }
    }
    for (op, group) in known.group_of.range(from.min(known.issued)..) {
        if *group <= known.acknowledged && from != u64::MAX && !found.contains_key(op) {
            return Err(format!(
                "operation {op} of acknowledged group {group} is missing"
            ));
        }
    }
    if from == u64::MAX && known.acknowledged > 0 {
        return Err("everything acknowledged is missing".to_owned());
    }
    Ok(())
}
