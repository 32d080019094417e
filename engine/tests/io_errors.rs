//! The n-th call of each kind fails, for every n of a small workload: what was acknowledged stays,
//! a failed sync poisons for ever, a full disk does not.

mod common;
#[path = "common/set.rs"]
mod set;

use common::{STORAGE, tiny};
use lowtide_engine::log::superblock::{NodeState, Superblock, SuperblockError};
use lowtide_engine::log::{Append, AppendError, Log, Lsn, ReserveError};
use lowtide_engine::medium::recording::{Injected, PageFate, RecordingVolume};
use lowtide_engine::medium::{Call, MediumError, SplitMix, Volume};
use lowtide_engine::store::Store;
use lowtide_engine::store::extents::ExtentFile;
use lowtide_engine::store::redb_store::RedbStore;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A small life of everything: log, superblock, store, extents. Returns what was acknowledged
/// (number of records, boots, value in the store) before the first error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Acknowledged {
    records: u64,
    boots: u64,
    value: u64,
}

/// Says how many calls of each kind there were before everything was closed.
fn life(volume: &RecordingVolume, acked: &mut Acknowledged) -> Result<[u64; 9], String> {
    let err = |e: &dyn std::fmt::Display| e.to_string();
    let shared: Arc<dyn Volume> = Arc::new(volume.clone());
    let (mut log, _) = Log::open(shared, tiny("log", 1)).map_err(|e| err(&e))?;
    let mut block = match Superblock::open(volume, Some(STORAGE)) {
        Ok(block) => block,
        Err(e @ SuperblockError::Medium(_)) => return Err(err(&e)),
        Err(_) => {
            let state = NodeState {
                storage: STORAGE,
                ..NodeState::default()
            };
            Superblock::create(volume, state).map_err(|e| err(&e))?
        }
    };
    let store = RedbStore::open(volume, 1 << 20).map_err(|e| err(&e))?;
    let extents = ExtentFile::open(volume, 1 << 20, []).map_err(|e| err(&e))?;
    let handle = log.sync_handle();
    for i in 1..=24u64 {
        let body = [i as u8; 700];
        let append = Append {
            kind: 1,
            flags: 0,
            epoch: i,
            group: 1,
            parts: &[&body],
        };
        log.append(append).map_err(|e| err(&e))?;
        handle.sync(log.end()).map_err(|e| err(&e))?;
        acked.records = i;
        handle.prepare().map_err(|e| err(&e))?;
        if i % 8 == 0 {
            let extent = extents.write(&[i as u8; 5000]).map_err(|e| err(&e))?;
            extents.sync().map_err(|e| err(&e))?;
            extents.read_verify(extent).map_err(|e| err(&e))?;
            let value = i.to_le_bytes();
            let mut change = [(&b"key"[..], Some(&value[..]))].into_iter();
            store
                .apply_batch(&mut change, 0, &value)
                .map_err(|e| err(&e))?;
            acked.value = i;
            block
                .update(|s| s.boots = s.boots.max(i))
                .map_err(|e| err(&e))?;
            acked.boots = i;
        }
    }
    Ok(Call::ALL.map(|call| volume.calls(call)))
}

/// What a restart finds.
fn survey(volume: &RecordingVolume) -> Acknowledged {
    let shared: Arc<dyn Volume> = Arc::new(volume.clone());
    let (log, _) = Log::open(shared, tiny("log", 1)).unwrap();
    let records = log
        .iter(Lsn(0))
        .map(|r| r.unwrap().header.epoch)
        .last()
        .unwrap_or(0);
    let boots = Superblock::open(volume, Some(STORAGE)).map_or(0, |b| b.state().boots);
    let store = RedbStore::open(volume, 1 << 20).unwrap();
    let value = store
        .get(b"key")
        .unwrap()
        .map_or(0, |v| u64::from_le_bytes(v.try_into().unwrap()));
    Acknowledged {
        records,
        boots,
        value,
    }
}

fn at_least(found: Acknowledged, acked: Acknowledged) -> bool {
    found.records >= acked.records && found.boots >= acked.boots && found.value >= acked.value
}

#[test]
fn every_call_may_fail_once() {
    let whole = RecordingVolume::new();
    let heard = life(&whole, &mut Acknowledged::default()).unwrap();
    let mut failures = BTreeMap::new();
    let mut rng = SplitMix(9);
    for call in Call::ALL {
        for nth in 1..=whole.calls(call) {
            let volume = RecordingVolume::new();
            volume.fail_call(call, nth, Injected::Io);
            let mut acked = Acknowledged::default();
            let outcome = life(&volume, &mut acked);
            assert!(volume.has_failed(), "{call:?} {nth} did not happen");
            // What fails while closing is heard by nobody: nothing depends on it.
            if nth <= heard[call as usize] {
                assert!(outcome.is_err(), "{call:?} {nth} went unnoticed");
            }
            for _ in 0..3 {
                let image = volume.crash_image(&mut |p| {
                    PageFate::random(p.stores, false, &mut || rng.next_u64())
                });
                let found = survey(&image);
                assert!(
                    at_least(found, acked),
                    "{call:?} {nth}: {acked:?}, found {found:?}"
                );
            }
            *failures.entry(call).or_insert(0) += 1;
        }
    }
    println!("{failures:?}");
    for call in [
        Call::Read,
        Call::Store,
        Call::Sync,
        Call::Create,
        Call::Resize,
        Call::Open,
    ] {
        assert!(failures.contains_key(&call), "{call:?} never happened");
    }
}

/// Where space can run out, running out is a refusal; what was acknowledged stays, and with space
/// again a restart works.
#[test]
fn no_space_is_a_refusal() {
    let whole = RecordingVolume::new();
    life(&whole, &mut Acknowledged::default()).unwrap();
    for call in [Call::Create, Call::Resize] {
        for nth in 1..=whole.calls(call) {
            let volume = RecordingVolume::new();
            volume.fail_call(call, nth, Injected::NoSpace);
            let mut acked = Acknowledged::default();
            let _ = life(&volume, &mut acked);
            let image = volume.crash_image(&mut |_| PageFate::Absent);
            assert!(at_least(survey(&image), acked), "{call:?} {nth}");
            let mut again = Acknowledged::default();
            life(&image, &mut again).unwrap();
        }
    }
}

#[test]
fn a_failed_sync_poisons_the_log_for_ever() {
    let volume = RecordingVolume::new();
    let (mut log, _) = Log::open(Arc::new(volume.clone()), tiny("log", 1)).unwrap();
    let handle = log.sync_handle();
    let append = Append {
        kind: 1,
        flags: 0,
        epoch: 1,
        group: 1,
        parts: &[b"payload"],
    };
    log.append(append).unwrap();
    handle.sync(log.end()).unwrap();
    log.append(append).unwrap();
    let durable = handle.durable();
    volume.fail_call(Call::Sync, 1, Injected::Io);
    assert!(handle.sync(log.end()).is_err());
    // The second sync would return success and write nothing, as Linux does; it is never made.
    assert!(handle.sync(log.end()).is_err());
    assert!(handle.prepare().is_err());
    assert!(matches!(log.append(append), Err(AppendError::Poisoned(_))));
    assert!(matches!(log.reserve(10), Err(ReserveError::Poisoned(_))));
    assert_eq!(handle.durable(), durable);
    assert_eq!(volume.calls_after_failure(Call::Sync), 0);
    assert_eq!(volume.calls_after_failure(Call::Store), 0);
    // Reading still works: the node says what it knows before it leaves.
    assert_eq!(log.iter(Lsn(0)).count(), 2);
}

/// Every sync of a running node fails once: nothing is acknowledged after it, and what was
/// acknowledged before is there.
#[test]
fn the_committer_says_nothing_after_a_failed_sync() {
    let whole = RecordingVolume::new();
    let (mut node, ..) = set::start(&whole, 2).unwrap();
    let before = whole.calls(Call::Sync);
    set::run(&mut node, &mut set::Known::default(), 20, &mut SplitMix(1)).unwrap();
    node.committer.stop();
    for nth in 1..=whole.calls(Call::Sync) - before {
        let volume = RecordingVolume::new();
        let (mut node, ..) = set::start(&volume, 2).unwrap();
        let mut known = set::Known::default();
        volume.fail_call(Call::Sync, nth, Injected::Io);
        let _ = set::run(&mut node, &mut known, 20, &mut SplitMix(1));
        let set::Node {
            shards,
            committer,
            said,
        } = node;
        drop(shards);
        committer.stop();
        let mut errors = 0;
        for message in said.try_iter() {
            match message {
                Ok(group) => {
                    assert_eq!(errors, 0, "group {group} acknowledged after a failure");
                    known.acknowledged = group;
                }
                Err(_) => errors += 1,
            }
        }
        if volume.has_failed() {
            // The preparing thread may have been about to sync a header; nobody begins one later.
            assert!(volume.calls_after_failure(Call::Sync) <= 1, "sync {nth}");
        }
        let image = volume.crash_image(&mut |_| PageFate::Absent);
        let (_, report, found) = set::start(&image, 2).unwrap();
        set::check(&known, &report, &found).unwrap();
    }
}

#[test]
fn a_full_disk_refuses_reservations_and_nothing_else() {
    let volume = RecordingVolume::new();
    let (mut log, _) = Log::open(Arc::new(volume.clone()), tiny("log", 1)).unwrap();
    let handle = log.sync_handle();
    let body = [1u8; 900];
    let parts: [&[u8]; 1] = [&body];
    let append = |epoch| Append {
        kind: 1,
        flags: 0,
        epoch,
        group: 1,
        parts: &parts,
    };
    // Everything that was promised fits, wherever the segment boundaries fall.
    let mut promised = Vec::new();
    let refused = loop {
        match log.reserve(900) {
            Ok(space) => promised.push(space),
            Err(refused) => break refused,
        }
    };
    assert!(
        matches!(refused, ReserveError::HighWater { .. }),
        "{refused}"
    );
    volume.fail_call(Call::Create, 1, Injected::NoSpace);
    handle.prepare().unwrap();
    assert!(matches!(
        log.reserve(900),
        Err(ReserveError::DiskFull { .. })
    ));
    let count = promised.len() as u64;
    assert!(count >= 20);
    for (epoch, space) in (1..).zip(promised) {
        log.append_reserved(append(epoch), space).unwrap();
    }
    handle.sync(log.end()).unwrap();
    assert_eq!(log.reserved_bytes(), 0);
    assert_eq!(log.iter(Lsn(0)).count() as u64, count);
    // Space again: the next preparation grows the log, and reservations are granted.
    handle.prepare().unwrap();
    let space = log.reserve(900).unwrap();
    log.append_reserved(append(count + 1), space).unwrap();
    // Recycling gives space back as well.
    handle.sync(log.end()).unwrap();
    assert!(log.recycle(log.durable()) > 0);
    assert!(log.free_bytes() > 20 << 10);
}

#[test]
fn an_append_longer_than_the_limit_is_refused_and_writes_nothing() {
    let volume = RecordingVolume::new();
    let (mut log, _) = Log::open(Arc::new(volume.clone()), tiny("log", 1)).unwrap();
    let end = log.end();
    let long = [0u8; 1000];
    let append = Append {
        kind: 1,
        flags: 0,
        epoch: 1,
        group: 1,
        parts: &[&long],
    };
    assert!(matches!(
        log.append(append),
        Err(AppendError::TooLong { .. })
    ));
    assert_eq!(log.end(), end);
}

#[test]
fn superblock_updates_are_atomic_and_survive_damage_of_one_copy() {
    let first = NodeState {
        storage: STORAGE,
        ..NodeState::default()
    };
    let update = |block: &mut Superblock, n: u64| {
        block.update(|s| {
            s.boots = n;
            s.epoch_ceiling = 1000 * n;
            s.minimum = 10 * n;
            s.purge_point = 5 * n;
            s.checkpoints = vec![Lsn(n), Lsn(2 * n)];
        })
    };
    let mut rng = SplitMix(3);
    for nth in 1..=2 + 2 * 8 + 1 {
        let volume = RecordingVolume::new();
        volume.fail_power_at(nth);
        let mut done = None;
        if let Ok(mut block) = Superblock::create(&volume, first.clone()) {
            done = Some(0);
            for n in 1..=8 {
                if update(&mut block, n).is_err() {
                    break;
                }
                done = Some(n);
            }
        }
        for image in common::images(&volume, 2, 16, true, &mut rng) {
            match (Superblock::open(&image, Some(STORAGE)), done) {
                (Ok(block), done) => {
                    let found = block.state().boots;
                    let done = done.unwrap_or(0);
                    assert!((done..=done + 1).contains(&found), "{found} after {done}");
                    assert_eq!(block.state().epoch_ceiling, 1000 * found);
                }
                // Not created: then it can be created now.
                (Err(_), None) => {
                    Superblock::create(&image, first.clone()).unwrap();
                }
                (Err(e), Some(n)) => panic!("lost after {n}: {e}"),
            }
        }
    }
    // Damage to either copy does not bring back an older state.
    let volume = RecordingVolume::new();
    let mut block = Superblock::create(&volume, first.clone()).unwrap();
    update(&mut block, 1).unwrap();
    update(&mut block, 2).unwrap();
    for copy in 0..2 {
        let image = volume.crash_image(&mut |_| PageFate::Absent);
        assert!(image.corrupt("node.meta", copy * 4096 + 50, &[0xff]));
        assert_eq!(Superblock::open(&image, None).unwrap().state().boots, 2);
    }
    // Every bit of a copy is covered, beside one wholly damaged copy.
    for bit in (0..88 * 8).filter(|bit| !(96..128).contains(bit)) {
        let image = volume.crash_image(&mut |_| PageFate::Absent);
        let mut byte = [0u8];
        let at = bit / 8;
        image
            .open("node.meta", lowtide_engine::medium::Access::Positioned)
            .unwrap()
            .read(at, &mut byte)
            .unwrap();
        assert!(image.corrupt("node.meta", at, &[byte[0] ^ 1 << (bit % 8)]));
        assert!(image.corrupt("node.meta", 4096, &[0; 4096]));
        assert!(Superblock::open(&image, None).is_err(), "bit {bit}");
    }
    assert!(matches!(
        Superblock::open(&volume, Some(1)),
        Err(SuperblockError::WrongStorage { .. })
    ));
    assert!(matches!(
        Superblock::create(&volume, first),
        Err(SuperblockError::Exists)
    ));
}

#[test]
fn a_poisoned_group_of_media_refuses_all_of_them() {
    let volume = RecordingVolume::new();
    let (log, _) = Log::open(Arc::new(volume.clone()), tiny("log", 1)).unwrap();
    drop(log);
    volume.fail_call(Call::Sync, 1, Injected::Io);
    let opened = Log::open(Arc::new(volume.clone()), tiny("log", 1));
    assert!(matches!(
        opened,
        Err(lowtide_engine::log::OpenError::Medium(
            MediumError::Io { .. }
        ))
    ));
}
