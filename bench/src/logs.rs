//! The log: appending without sync against memcpy into a mapped file of the same kind, and group
//! commit against sequential write and fdatasync of the same blocks.
//!
//! Each block is a commit group of its own. `log-commit-…` waits for each block before it appends the
//! next, so every block has two wake-ups in it, the committer's and the waiter's. `log-commit-…-two`
//! appends the next block while the one before is synced; two are under way at most.
//!
//! Both sides of `log-append` store to memory that was mapped the same way and never used, as that of
//! a log's segment is, so that taking it from the kernel costs both the same. A record has 256 bytes in
//! the log, its header being 64 of them; the yardstick copies 256.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use lowtide_engine::log::commit::ShardLog;
use lowtide_engine::log::set::{LogSet, SetConfig};
use lowtide_engine::log::{Append, Log, LogConfig, LogIdentity, record_len};
use lowtide_engine::medium::dir::{DirOptions, DirVolume};
use lowtide_engine::medium::{Access, Volume};
use memmap2::{Advice, MmapOptions};

use crate::programs::{remove, settle};
use crate::row::{Better, Pick, Rounds, Row};
use crate::{Bench, Failure};

const ROUNDS: u32 = 11;
/// Bytes of a record.
const RECORD: usize = 256;
/// Bytes in its body.
const BODY: usize = RECORD - 64;
/// Records of an append round: they fit into one segment.
const RECORDS: usize = 150_000;
const SEGMENT: u64 = 64 << 20;
/// Bytes made durable at a time.
const BLOCKS: [(&str, usize); 3] = [("4k", 4 << 10), ("64k", 64 << 10), ("1m", 1 << 20)];
/// Bytes of a commit round at most …
const COMMIT_BYTES: usize = 32 << 20;
/// … and blocks.
const COMMITS: usize = 200;
/// Blocks under way, and what that is called.
const AHEAD: [(&str, usize); 2] = [("", 1), ("-two", 2)];
/// Within twice the yardstick.
const AIM: f64 = 2.0;

const _: () = assert!(record_len(BODY as u64) == RECORD as u64);
const _: () = assert!(RECORDS * RECORD + (1 << 20) < SEGMENT as usize);

/// ns per record, without sync.
///
/// # Errors
/// The disk refuses.
pub fn append(bench: &Bench) -> Result<Vec<Row>, Failure> {
    let contents = contents();
    let (mut ours, mut yardstick) = (Vec::new(), Vec::new());
    for _ in 0..bench.rounds.unwrap_or(ROUNDS) {
        let dir = bench.scratch.join("log");
        yardstick.push(copy_round(&contents).map_err(Failure::io("memory"))?);
        ours.push(append_round(open_volume(&dir)?, &contents)?);
        remove(&dir)?;
    }
    let rounds = Rounds {
        unit: "ns",
        better: Better::Lower,
        yardstick_is: "memcpy of as many bytes, a record's length at a time, into memory never used before",
        ours,
        yardstick,
    };
    let row = rounds
        .row("log-append", Pick::Median, &bench.machine)
        .aim(AIM)
        .with("record_bytes", RECORD)
        .with("body_bytes", BODY);
    Ok(vec![row])
}

/// MB/s through group commit.
///
/// # Errors
/// The disk refuses.
pub fn commit(bench: &Bench) -> Result<Vec<Row>, Failure> {
    let mut rows = Vec::new();
    for (name, block) in BLOCKS {
        let (mut ours, mut yardstick) = ([Vec::new(), Vec::new()], Vec::new());
        let dir = bench.scratch.join("log");
        for _ in 0..bench.rounds.unwrap_or(ROUNDS) {
            settle(&bench.scratch)?;
            yardstick.push(write_round(&dir, block)?);
            remove(&dir)?;
            for (ours, (_, ahead)) in ours.iter_mut().zip(AHEAD) {
                settle(&bench.scratch)?;
                ours.push(commit_round(&dir, block, ahead)?);
                remove(&dir)?;
            }
        }
        for (ours, (how, ahead)) in ours.into_iter().zip(AHEAD) {
            let rounds = Rounds {
                unit: "MB/s",
                better: Better::Higher,
                yardstick_is: "write and fdatasync of the same blocks, one after another, into an \
                               allocated file",
                ours,
                yardstick: yardstick.clone(),
            };
            let name = format!("log-commit-{name}{how}");
            rows.push(
                rounds
                    .row(name, Pick::Median, &bench.machine)
                    .aim(1.0 / AIM)
                    .with("block_bytes", block)
                    .with("blocks_under_way", ahead),
            );
        }
    }
    Ok(rows)
}

fn open_volume(dir: &Path) -> Result<Arc<dyn Volume>, Failure> {
    let volume = DirVolume::open(dir, DirOptions::default()).map_err(Failure::broken)?;
    Ok(Arc::new(volume))
}

/// Contents that no cache prediction can turn into one: 1 MiB of them, used in turn.
fn contents() -> Vec<[u8; RECORD]> {
    let all = (1 << 20) / RECORD;
    (0..all).map(|n| [n as u8; RECORD]).collect()
}

fn identity() -> LogIdentity {
    LogIdentity {
        storage: 0xbe9c,
        number: 0,
    }
}

/// ns per record of the log.
fn append_round(volume: Arc<dyn Volume>, contents: &[[u8; RECORD]]) -> Result<f64, Failure> {
    let config = LogConfig {
        segment_bytes: SEGMENT,
        ..LogConfig::new("bench", identity())
    };
    let (mut log, _) = Log::open(volume, config).map_err(Failure::broken)?;
    let began = Instant::now();
    for n in 0..RECORDS {
        let parts: [&[u8]; 1] = [&contents[n % contents.len()][..BODY]];
        log.append(record(1, &parts)).map_err(Failure::broken)?;
    }
    Ok(began.elapsed().as_nanos() as f64 / RECORDS as f64)
}

/// ns per record's length copied.
fn copy_round(contents: &[[u8; RECORD]]) -> std::io::Result<f64> {
    let mut map = MmapOptions::new().len(SEGMENT as usize).map_anon()?;
    // Only a hint, the same that the log gives.
    let _ = map.advise(Advice::HugePage);
    let began = Instant::now();
    for (n, place) in map.chunks_exact_mut(RECORD).take(RECORDS).enumerate() {
        place.copy_from_slice(&contents[n % contents.len()]);
    }
    Ok(began.elapsed().as_nanos() as f64 / RECORDS as f64)
}

/// Blocks in a round.
fn commits(block: usize) -> usize {
    (COMMIT_BYTES / block).min(COMMITS)
}

/// MB/s of records, each block a group of its own, so many of them under way.
fn commit_round(dir: &Path, block: usize, ahead: usize) -> Result<f64, Failure> {
    let config = SetConfig {
        storage: 0xbe9c,
        shards: 1,
        shard: LogConfig::new("shard", identity()),
        must_reach: Vec::new(),
        was_opened: false,
    };
    let (set, _) = LogSet::open(open_volume(dir)?, &config).map_err(Failure::broken)?;
    let (tell, told) = channel();
    let (mut logs, committer) = set
        .start(move |news| {
            let news = news.map(|c| c.group).map_err(ToString::to_string);
            // Nobody listens any more once the round is over.
            let _ = tell.send(news);
        })
        .map_err(Failure::broken)?;
    let mut shard = logs.remove(0);
    let body = [7u8; BODY];
    let per_block = block as u64 / record_len(body.len() as u64);
    let count = commits(block);
    let mut under_way = VecDeque::new();
    let began = Instant::now();
    for _ in 0..count {
        if under_way.len() == ahead {
            await_group(&told, under_way.pop_front().unwrap_or_default())?;
        }
        let newest = under_way.back().copied().unwrap_or_default();
        under_way.push_back(publish_block(&mut shard, newest, &body, per_block)?);
    }
    for group in under_way {
        await_group(&told, group)?;
    }
    let seconds = began.elapsed().as_secs_f64();
    committer.stop();
    Ok((count * block) as f64 / seconds / 1e6)
}

/// Appends a block in a group after `newest` and says which.
fn publish_block(
    shard: &mut ShardLog,
    newest: u64,
    body: &[u8],
    records: u64,
) -> Result<u64, Failure> {
    // The committer is about to close the group of the block before.
    let pin = loop {
        let pin = shard.publisher.clock().pin();
        if pin.group() > newest {
            break pin;
        }
        drop(pin);
        std::thread::yield_now();
    };
    let group = pin.group();
    for _ in 0..records {
        let parts = [body];
        shard
            .log
            .append(record(group, &parts))
            .map_err(Failure::broken)?;
    }
    let end = shard.log.end_batch(group);
    shard.publisher.publish(pin, end);
    Ok(group)
}

fn await_group(told: &Receiver<Result<u64, String>>, group: u64) -> Result<(), Failure> {
    loop {
        let news = told.recv().map_err(Failure::broken)?;
        if news.map_err(Failure::broken)? >= group {
            return Ok(());
        }
    }
}

fn record<'a>(group: u64, parts: &'a [&'a [u8]]) -> Append<'a> {
    Append {
        kind: 1,
        flags: 0,
        epoch: 1,
        group,
        parts,
    }
}

/// MB/s of blocks written and synced.
fn write_round(dir: &Path, block: usize) -> Result<f64, Failure> {
    let count = commits(block);
    let volume = open_volume(dir)?;
    volume
        .create("blocks", (count * block) as u64, Access::Mapped)
        .map_err(Failure::broken)?;
    let path = dir.join("blocks");
    let bytes = vec![7u8; block];
    let write = || -> std::io::Result<f64> {
        let file: File = OpenOptions::new().write(true).open(&path)?;
        let began = Instant::now();
        for n in 0..count {
            file.write_all_at(&bytes, (n * block) as u64)?;
            file.sync_data()?;
        }
        Ok(began.elapsed().as_secs_f64())
    };
    let seconds = write().map_err(Failure::io(path.display()))?;
    Ok((count * block) as f64 / seconds / 1e6)
}
