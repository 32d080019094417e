//! Power loss under a node with two logs and a committer: groups are atomic across logs.

mod common;
#[path = "common/set.rs"]
mod set;

use common::images;
use lowtide_engine::log::OpenError;
use lowtide_engine::log::set::LogSet;
use lowtide_engine::medium::SplitMix;
use lowtide_engine::medium::recording::{PageFate, RecordingVolume};
use set::{Known, check, config, ops, run, start};
use std::sync::Arc;

/// Runs a node until the power fails; the threads' timing decides how far it gets.
fn live(volume: &RecordingVolume, known: &mut Known, batches: usize, rng: &mut SplitMix) {
    let Ok((mut node, report, found)) = start(volume, 2) else {
        return;
    };
    check(known, &report, &found).unwrap();
    // What a restart dropped is not expected again.
    known
        .group_of
        .retain(|_, group| *group <= report.durable_group);
    known.acknowledged = report.durable_group;
    let _ = run(&mut node, known, batches, rng);
    let set::Node {
        shards,
        committer,
        said,
    } = node;
    drop(shards);
    committer.stop();
    for group in said.try_iter().flatten() {
        known.acknowledged = group;
    }
}

#[test]
fn operations_over_two_logs_are_whole_or_absent_after_power_loss() {
    let mut rng = SplitMix(5);
    let whole = RecordingVolume::new();
    live(&whole, &mut Known::default(), 60, &mut SplitMix(1));
    let total = whole.durable_ops();
    assert!(total > 60, "{total}");
    let (mut looked_at, mut twice) = (0, 0);
    for nth in (1..=total).chain(1..=total) {
        let volume = RecordingVolume::new();
        volume.fail_power_at(nth);
        let mut known = Known::default();
        live(&volume, &mut known, 60, &mut SplitMix(1));
        for image in images(&volume, 3, 10, true, &mut rng) {
            let second = image.crash_image(&mut |_| PageFate::Complete);
            let (set, report) = LogSet::open(Arc::new(image.clone()), &config(2))
                .unwrap_or_else(|e| panic!("at operation {nth}: {e}"));
            check(&known, &report, &ops(&set)).unwrap_or_else(|e| panic!("at {nth}: {e}"));
            looked_at += 1;
            // Go on in the image, lose power again: in the recovery or soon after.
            if looked_at % 7 == 0 {
                second.fail_power_at(1 + rng.next_u64() % 40);
                let mut known = known.clone();
                live(&second, &mut known, 12, &mut rng);
                for image in images(&second, 2, 4, true, &mut rng) {
                    let (set, report) = LogSet::open(Arc::new(image), &config(2)).unwrap();
                    check(&known, &report, &ops(&set)).unwrap();
                    twice += 1;
                }
            }
        }
    }
    println!("{total} operations, {looked_at} images, {twice} images of a second crash");
    assert!(looked_at > 1000 && twice > 500);
}

/// A group that the commit log proves is refused if one log lost it, even all of it.
#[test]
fn a_log_that_lost_a_committed_group_is_refused() {
    let volume = RecordingVolume::new();
    let mut known = Known::default();
    live(&volume, &mut known, 8, &mut SplitMix(3));
    live(&volume, &mut known, 8, &mut SplitMix(4));
    let good = LogSet::verify(
        Arc::new(volume.crash_image(&mut |_| PageFate::Absent)),
        &config(2),
    );
    assert!(good.unwrap().durable_group >= known.acknowledged);
    for victim in ["shard-000", "shard-001"] {
        // The log as if it had never been written.
        let image = volume.crash_image(&mut |_| PageFate::Absent);
        for number in 0..5 {
            let name = format!("{victim}-{number:05}.seg");
            image.corrupt(&name, 0, &[0; 16 << 10]);
        }
        let opened = LogSet::open(Arc::new(image), &config(2));
        assert!(
            matches!(&opened, Err(OpenError::CommittedMissing { log, .. }) if log == victim),
            "{opened:?}"
        );
    }
    let image = volume.crash_image(&mut |_| PageFate::Absent);
    for number in 0..4 {
        image.corrupt(&format!("commit-{number:05}.seg"), 0, &vec![0; 256 << 10]);
    }
    let opened = LogSet::open(Arc::new(image), &config(2));
    assert!(
        matches!(opened, Err(OpenError::CommittedMissing { .. })),
        "{opened:?}"
    );
}

/// More cores, then fewer: nothing is lost, the surplus log is still read.
#[test]
fn the_number_of_logs_may_change() {
    let volume = RecordingVolume::new();
    let mut known = Known::default();
    live(&volume, &mut known, 6, &mut SplitMix(3));
    for shards in [4, 1, 2] {
        let image = volume.crash_image(&mut |_| PageFate::Absent);
        let (set, report) = LogSet::open(Arc::new(image), &config(shards)).unwrap();
        check(&known, &report, &ops(&set)).unwrap();
        assert_eq!(set.logs().len(), shards.max(2) as usize);
    }
}

/// Without anything published nothing is written; one publication is committed without another.
#[test]
fn the_committer_sleeps_and_wakes() {
    let volume = RecordingVolume::new();
    let (mut node, report, _) = start(&volume, 2).unwrap();
    let before = volume.durable_ops();
    let mut known = Known {
        acknowledged: report.durable_group,
        ..Known::default()
    };
    for _ in 0..50 {
        let pin = node.shards[0].publisher.clock().pin();
        let group = pin.group();
        let set::Node { shards, .. } = &mut node;
        let parts: &[&[u8]] = &[b"x"];
        let one = lowtide_engine::log::Append {
            kind: 1,
            flags: 0,
            epoch: 1,
            group,
            parts,
        };
        shards[1].log.append(one).unwrap();
        shards[1].publisher.publish(pin, shards[1].log.end());
        set::await_group(&node, &mut known, group).unwrap();
    }
    // One log and the commit log, each time; the idle log is left alone.
    assert_eq!(volume.durable_ops() - before, 100);
    node.committer.stop();
}
