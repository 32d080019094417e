//! Power loss under logs, store and superblock together: no store page shows an update whose log
//! records are not durable in all logs, and a restart shows a prefix of the operations.

mod common;
#[path = "common/kv.rs"]
mod kv;

use common::images;
use kv::Kv;
use lowtide_engine::log::Lsn;
use lowtide_engine::medium::recording::{PageFate, RecordingVolume};
use lowtide_engine::medium::{MediumError, SplitMix, Volume};
use lowtide_engine::store::extents::{EXTENT_MAX, ExtentError, ExtentFile};
use lowtide_engine::store::overlay::{DurablePoint, FreezePoint, Overlay};
use lowtide_engine::store::redb_store::RedbStore;
use lowtide_engine::store::{Store, StoreError};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Rounds of a node's life: four operations and a commit group each.
const ROUNDS: u64 = 60;

/// Runs a node until the power fails; says how many operations were acknowledged.
fn live(volume: &RecordingVolume, rounds: u64) -> u64 {
    let Ok(mut kv) = Kv::open(Arc::new(volume.clone())) else {
        return 0;
    };
    let mut work = || -> Result<(), Box<dyn std::error::Error>> {
        for round in 0..rounds {
            for _ in 0..4 {
                kv.step()?;
            }
            kv.end_group();
            if round % 2 == 0 {
                kv.settle()?;
            }
            if round % 5 == 4 {
                kv.checkpoint()?;
            }
        }
        Ok(())
    };
    let _ = work();
    kv.stop()
}

#[test]
fn a_restart_shows_a_prefix_with_everything_acknowledged() {
    let mut rng = SplitMix(11);
    let whole = RecordingVolume::new();
    assert_eq!(live(&whole, ROUNDS), 4 * ROUNDS);
    let total = whole.durable_ops();
    // One group a round, whatever the load of the machine.
    assert!(total >= 150, "{total}");
    let mut looked_at = 0;
    for nth in 1..=total {
        let volume = RecordingVolume::new();
        volume.fail_power_at(nth);
        let acknowledged = live(&volume, ROUNDS);
        for image in images(&volume, 2, 8, false, &mut rng) {
            let second = image.crash_image(&mut |_| PageFate::Complete);
            let kv = Kv::open(Arc::new(image)).unwrap_or_else(|e| panic!("at {nth}: {e}"));
            assert!(
                kv.ops >= acknowledged,
                "at {nth}: {} of {acknowledged}",
                kv.ops
            );
            kv.stop();
            looked_at += 1;
            // Again, during the recovery or soon after.
            if looked_at % 5 == 0 {
                second.fail_power_at(1 + rng.next_u64() % 60);
                let acknowledged = live(&second, 6).max(acknowledged);
                for image in images(&second, 1, 3, false, &mut rng) {
                    let kv = Kv::open(Arc::new(image)).unwrap_or_else(|e| panic!("at {nth}: {e}"));
                    assert!(kv.ops >= acknowledged);
                    kv.stop();
                    looked_at += 1;
                }
            }
        }
    }
    println!("{total} operations, {looked_at} images");
    assert!(looked_at > 1500);
}

#[test]
#[should_panic(expected = "WAL rule")]
fn a_checkpoint_before_its_group_is_durable_is_our_own_bug() {
    let volume = RecordingVolume::new();
    let store = Arc::new(RedbStore::open(&volume, 1 << 20).unwrap());
    let mut overlay = Overlay::new(store.clone());
    overlay.put(b"key", Some(b"value"));
    let frozen = overlay
        .freeze(FreezePoint {
            lsn: Lsn(100),
            group: 7,
        })
        .unwrap();
    let durable = DurablePoint {
        lsn: Lsn(100),
        group: 6,
    };
    let _ = frozen.checkpoint(&*store, 0, b"", durable);
}

/// The overlay behaves as one map, whatever is active, frozen or stored.
#[test]
fn an_overlay_is_one_map() {
    let volume = RecordingVolume::new();
    let store = Arc::new(RedbStore::open(&volume, 1 << 20).unwrap());
    let mut overlay = Overlay::new(store.clone());
    let mut model: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
    let mut rng = SplitMix(4);
    let point = FreezePoint {
        lsn: Lsn(1),
        group: 1,
    };
    let durable = DurablePoint {
        lsn: Lsn(1),
        group: 1,
    };
    let mut frozen = None;
    for i in 0..3000u64 {
        let key = vec![(rng.next_u64() % 40) as u8; 1 + (rng.next_u64() % 2) as usize];
        if rng.next_u64().is_multiple_of(3) {
            overlay.put(&key, None);
            model.remove(&key);
        } else {
            overlay.put(&key, Some(&i.to_le_bytes()));
            model.insert(key.clone(), i.to_le_bytes().to_vec());
        }
        assert_eq!(overlay.get(&key).unwrap().as_ref(), model.get(&key));
        match rng.next_u64() % 50 {
            0 => frozen = overlay.freeze(point).or(frozen),
            1 => {
                if let Some(frozen) = frozen.take() {
                    assert!(overlay.freeze(point).is_none(), "one at a time");
                    assert!(overlay.retire().is_none(), "not before it is written");
                    frozen
                        .checkpoint(&*store, 3, &i.to_le_bytes(), durable)
                        .unwrap();
                    assert_eq!(overlay.retire(), Some(point));
                    assert_eq!(store.last_checkpoint(3).unwrap().unwrap(), i.to_le_bytes());
                }
            }
            2 => {
                let (from, to) = ([rng.next_u64() as u8 % 40], [rng.next_u64() as u8 % 45]);
                let limit = rng.next_u64() as usize % 20;
                let mut found = Vec::new();
                overlay
                    .scan(&from, Some(&to), limit, &mut |k, v| {
                        found.push((k.to_vec(), v.to_vec()));
                        true
                    })
                    .unwrap();
                let expected: Vec<_> = model
                    .iter()
                    .filter(|(k, _)| k.as_slice() >= &from[..] && k.as_slice() < &to[..])
                    .take(limit)
                    .map(|(k, v)| (k.clone(), v.clone()))
                    .collect();
                assert_eq!(found, expected);
            }
            _ => {}
        }
    }
    assert!(overlay.bytes() >= overlay.active_bytes() && overlay.bytes() > 0);
}

#[test]
fn a_store_that_is_none_is_refused() {
    let volume = RecordingVolume::new();
    let medium = volume
        .create(
            "store.redb",
            8192,
            lowtide_engine::medium::Access::Positioned,
        )
        .unwrap();
    medium.store(0, b"something else entirely").unwrap();
    assert!(matches!(
        RedbStore::open(&volume, 1 << 20),
        Err(StoreError::Foreign(_))
    ));
}

#[test]
fn extents_do_not_overlap_and_damage_is_found() {
    let volume = RecordingVolume::new();
    let limit = 3 << 20;
    let file = ExtentFile::open(&volume, limit, []).unwrap();
    let mut rng = SplitMix(8);
    let mut live = Vec::new();
    let mut refused = 0;
    for i in 0..600u64 {
        let len = 1 + rng.next_u64() as usize % 60_000;
        match file.write(&vec![i as u8; len]) {
            Ok(extent) => live.push((extent, i as u8)),
            Err(ExtentError::NoSpace { .. }) => {
                refused += 1;
                for _ in 0..5 {
                    let at = rng.next_u64() as usize % live.len();
                    file.free(live.swap_remove(at).0).unwrap();
                }
            }
            Err(e) => panic!("{e}"),
        }
    }
    assert!(refused > 10);
    file.sync().unwrap();
    let image = volume.crash_image(&mut |_| PageFate::Absent);
    let refs: Vec<_> = live.iter().map(|(e, _)| *e).collect();
    let again = ExtentFile::open(&image, limit, refs.clone()).unwrap();
    assert_eq!(again.used_bytes(), file.used_bytes());
    for (extent, byte) in &live {
        let data = again.read_verify(*extent).unwrap();
        assert!(data.len() == extent.len as usize && data.iter().all(|b| b == byte));
    }
    // Rebuilt from half of the references, the other half's space is found again.
    let half = &refs[..refs.len() / 2];
    let again = ExtentFile::open(&image, limit, half.iter().copied()).unwrap();
    while again.write(&[0xaa; 40_000]).is_ok() {}
    for extent in half {
        again.read_verify(*extent).unwrap();
    }
    // Refusals.
    let one = half[0];
    assert!(image.corrupt("extents.dat", one.offset, &[!live[0].1]));
    assert!(matches!(
        again.read_verify(one),
        Err(ExtentError::Damaged { .. })
    ));
    again.free(one).unwrap();
    assert!(matches!(again.free(one), Err(ExtentError::BadReference(_))));
    let mut overlapping = refs.clone();
    overlapping.push(lowtide_engine::store::extents::ExtentRef {
        len: one.len + 1,
        ..one
    });
    let opened = ExtentFile::open(&image, limit, overlapping);
    assert!(matches!(opened, Err(ExtentError::BadReference(_))));
    for len in [0, EXTENT_MAX as usize + 1] {
        assert!(matches!(
            file.write(&vec![0; len]),
            Err(ExtentError::Length { .. })
        ));
    }
    let outside = lowtide_engine::store::extents::ExtentRef {
        offset: u64::MAX - 4095,
        ..one
    };
    assert!(matches!(
        file.read_verify(outside),
        Err(ExtentError::BadReference(_))
    ));
}

/// The recording medium itself: what it may and may not show after a crash.
#[test]
fn crash_images_differ_from_the_durable_bytes_only_where_something_is_pending() {
    let volume = RecordingVolume::new();
    let file = volume
        .create("f", 16384, lowtide_engine::medium::Access::Mapped)
        .unwrap();
    file.store(0, &[1; 16384]).unwrap();
    file.sync(0..16384).unwrap();
    file.store(5000, &[2; 100]).unwrap();
    file.store(5600, &[3; 100]).unwrap();
    let read = |v: &RecordingVolume| {
        let mut bytes = vec![0; 16384];
        v.open("f", lowtide_engine::medium::Access::Positioned)
            .unwrap()
            .read(0, &mut bytes)
            .unwrap();
        bytes
    };
    let mut rng = SplitMix(1);
    let mut kinds = std::collections::BTreeSet::new();
    for image in images(&volume, 9, 300, true, &mut rng) {
        let bytes = read(&image);
        let untouched = |r: std::ops::Range<usize>| bytes[r].iter().all(|b| *b == 1);
        assert!(untouched(0..5000) && untouched(5100..5600) && untouched(5700..16384));
        let state = |r: std::ops::Range<usize>, new: u8| match &bytes[r] {
            b if b.iter().all(|b| *b == 1) => 0,
            b if b.iter().all(|b| *b == new) => 1,
            _ => 2,
        };
        kinds.insert((state(5000..5100, 2), state(5600..5700, 3)));
    }
    // Old and new in every combination (the second alone too: another sector), and torn.
    for kind in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 2)] {
        assert!(kinds.contains(&kind), "{kind:?} of {kinds:?}");
    }
    // A failed sync loses the pages; a later one reports success and does not bring them back.
    volume.fail_call(
        lowtide_engine::medium::Call::Sync,
        1,
        lowtide_engine::medium::recording::Injected::Io,
    );
    assert!(matches!(file.sync(0..16384), Err(MediumError::Io { .. })));
    file.sync(0..16384).unwrap();
    assert!(
        read(&volume.crash_image(&mut |_| PageFate::Complete))
            .iter()
            .all(|b| *b == 1)
    );
}
