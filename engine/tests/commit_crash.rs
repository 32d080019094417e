//! Power loss under a node with two logs and a committer: groups are atomic across logs.

mod common;
#[path = "common/set.rs"]
mod set;

use common::{TINY_SEGMENT, images};
use lowtide_engine::log::commit::ShardLog;
use lowtide_engine::log::set::LogSet;
use lowtide_engine::log::{Append, BatchEnd, Lsn, OpenError};
use lowtide_engine::medium::recording::{PageFate, RecordingVolume};
use lowtide_engine::medium::{PAGE, SplitMix};
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

/// A group that a claim proves is refused if one log lost it, even all of it.
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
    // A log as if it had never been written, and the second one without what came after its `OPEN`.
    for (victim, from) in [
        ("shard-000", 0),
        ("shard-001", 0),
        ("shard-001", 3 * PAGE + 128),
    ] {
        let image = volume.crash_image(&mut |_| PageFate::Absent);
        for number in 0..5 {
            let name = format!("{victim}-{number:05}.seg");
            let zeros = vec![0; (TINY_SEGMENT - from) as usize];
            image.corrupt(&name, from, &zeros);
        }
        let opened = LogSet::open(Arc::new(image), &config(2));
        let is_named = match &opened {
            Err(OpenError::CommittedMissing { log, .. }) => log == victim,
            Err(OpenError::SegmentsMissing { log, .. }) => log == victim && from == 0,
            _ => false,
        };
        assert!(is_named, "{victim} from {from}: {opened:?}");
    }
}

/// Zeroes the claim slots (0 and 1) of all segments of the first log.
fn wipe_claims(image: &RecordingVolume, slots: &[u64]) {
    for number in 0..5 {
        for slot in slots {
            let name = format!("shard-000-{number:05}.seg");
            image.corrupt(&name, (1 + slot) * PAGE, &[0; PAGE as usize]);
        }
    }
}

/// Commits one record of the first log, with its claim behind it or in a slot.
fn commit_one(node: &mut set::Node, known: &mut Known, in_room: bool) -> u64 {
    let pin = node.shards[0].publisher.clock().pin();
    let group = pin.group();
    let ShardLog { log, publisher } = &mut node.shards[0];
    let one = Append {
        kind: 1,
        flags: 0,
        epoch: 1000,
        group,
        parts: &[b"x"],
    };
    log.append(one).unwrap();
    // As when the log has no space for the room.
    let batch = match in_room {
        true => log.end_batch(group),
        false => BatchEnd {
            end: log.end(),
            has_room: false,
        },
    };
    publisher.publish(pin, batch);
    set::await_group(node, known, group).unwrap();
    group
}

/// The same for claims among the records: the newest may be lost, one before it is missed.
#[test]
fn a_damaged_claim_among_the_records_is_refused_if_anything_later_survived() {
    let volume = RecordingVolume::new();
    let (mut node, ..) = start(&volume, 2).unwrap();
    let mut known = Known::default();
    let mut ends = Vec::new();
    for _ in 0..3 {
        commit_one(&mut node, &mut known, true);
        ends.push(node.shards[0].log.end());
    }
    let newest = node.committer.durable_group();
    let crashed = || volume.crash_image(&mut |_| PageFate::Absent);
    let damaged = |end: Lsn| {
        let image = crashed();
        // Its body: the record before the end has 64 bytes of header and so many of body.
        assert!(image.corrupt("shard-000-00000.seg", end.0 % TINY_SEGMENT - 64, &[0xff; 8]));
        LogSet::open(Arc::new(image), &config(2))
    };
    let whole = LogSet::open(Arc::new(crashed()), &config(2)).unwrap().1;
    assert_eq!(whole.durable_group, newest);
    assert_eq!(damaged(ends[2]).unwrap().1.durable_group, newest - 1);
    for end in &ends[..2] {
        let opened = damaged(*end);
        assert!(
            matches!(&opened, Err(OpenError::CommittedMissing { log, .. }) if log == "shard-000"),
            "{:?}",
            opened.map(|_| ())
        );
    }
}

/// Claims that are gone are missed, since the first log's own records say how far groups were
/// durable; the claim before the newest is enough as long as nothing says that there was a newer.
#[test]
fn a_lost_claim_is_refused_if_anything_later_survived() {
    let volume = RecordingVolume::new();
    let (mut node, ..) = start(&volume, 2).unwrap();
    let mut known = Known::default();
    run(&mut node, &mut known, 8, &mut SplitMix(3)).unwrap();
    // The second of them is appended with the first one's end as durable.
    commit_one(&mut node, &mut known, false);
    let newest = commit_one(&mut node, &mut known, false);
    let crashed = || volume.crash_image(&mut |_| PageFate::Absent);
    let found = |image: RecordingVolume| LogSet::open(Arc::new(image), &config(2));
    assert_eq!(found(crashed()).unwrap().1.durable_group, newest);
    let both = crashed();
    wipe_claims(&both, &[0, 1]);
    let opened = found(both);
    assert!(
        matches!(&opened, Err(OpenError::ClaimMissing { log, .. }) if log == "shard-000"),
        "{:?}",
        opened.map(|_| ())
    );
    // Without the newest claim its group never happened: nothing later vouches for it.
    let one = crashed();
    wipe_claims(&one, &[newest & 1]);
    assert_eq!(found(one).unwrap().1.durable_group, newest - 1);
    // Without the one before: the newest says all.
    let one = crashed();
    wipe_claims(&one, &[1 - (newest & 1)]);
    assert_eq!(found(one).unwrap().1.durable_group, newest);
    // A record that was appended after the newest, never synced and yet on the disk, vouches for it.
    let ShardLog { log, .. } = &mut node.shards[0];
    let late = Append {
        kind: 1,
        flags: 0,
        epoch: 1001,
        group: newest + 1,
        parts: &[b"late"],
    };
    log.append(late).unwrap();
    let late = volume.crash_image(&mut |_| PageFate::Complete);
    wipe_claims(&late, &[newest & 1]);
    let opened = found(late);
    assert!(
        matches!(opened, Err(OpenError::ClaimMissing { .. })),
        "{opened:?}"
    );
    // An opening says for good what it found; then the claims before it are not needed.
    drop(node);
    let again = crashed();
    drop(found(again.clone()).unwrap());
    wipe_claims(&again, &[0, 1]);
    assert_eq!(found(again).unwrap().1.durable_group, newest);
}

/// A claim of a group that a restart dropped may stay in its slot for long. It means nothing, also
/// when the record that says so has been recycled and the log is not yet as long as it claims.
#[test]
fn a_claim_left_over_from_a_dropped_group_is_not_believed() {
    let mut config = config(1);
    config.shard.segments_max = 2;
    let life = |volume: &RecordingVolume| {
        let (set, report) = LogSet::open(Arc::new(volume.clone()), &config).unwrap();
        let (say, said) = std::sync::mpsc::channel();
        let (mut shards, committer) = set
            .start(move |committed| {
                let _ = say.send(committed.map(|c| c.group).unwrap());
            })
            .unwrap();
        (shards.remove(0), committer, said, report)
    };
    // One group of records of 960 bytes until the log has passed a position.
    let fill = |shard: &mut ShardLog, past: u64| {
        let pin = shard.publisher.clock().pin();
        while shard.log.end().0 < past {
            let append = Append {
                kind: 1,
                flags: 0,
                epoch: 1,
                group: pin.group(),
                parts: &[&[1; 896]],
            };
            shard.log.append(append).unwrap();
        }
        let group = pin.group();
        let end = shard.log.end_batch(group);
        shard.publisher.publish(pin, end);
        group
    };
    let volume = RecordingVolume::new();
    let (mut shard, committer, said, _) = life(&volume);
    let kept = fill(&mut shard, 2 * TINY_SEGMENT - 4096);
    assert_eq!(said.recv().unwrap(), kept);
    // A group that reaches into the second segment. Its claim is there, its first record is not.
    let gap = shard.log.end();
    let dropped = fill(&mut shard, 2 * TINY_SEGMENT + 5 * PAGE);
    assert_eq!(said.recv().unwrap(), dropped);
    drop((shard, committer));
    let image = volume.crash_image(&mut |_| PageFate::Absent);
    image.corrupt("shard-000-00000.seg", gap.0 % TINY_SEGMENT, &[0; 960]);
    let (mut shard, committer, said, report) = life(&image);
    assert_eq!(report.durable_group, kept);
    // Not as far as the dropped group; then the first segment, with the `OPEN`, is used again.
    let newest = fill(&mut shard, 2 * TINY_SEGMENT + 4 * PAGE);
    assert_eq!(said.recv().unwrap(), newest);
    assert_eq!(shard.log.recycle(shard.log.durable()), 1);
    shard.log.sync_handle().prepare().unwrap();
    drop((shard, committer));
    let (_, report) = LogSet::open(Arc::new(image), &config).unwrap();
    assert_eq!(report.durable_group, newest);
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
    // A node with one log pays one sync per group. With two, a group of the second one pays one for
    // its records and one for the claim; the first log is left alone otherwise.
    for (shards, busy, syncs) in [(1, 0, 1), (2, 0, 1), (2, 1, 2)] {
        let volume = RecordingVolume::new();
        let (mut node, report, _) = start(&volume, shards).unwrap();
        let before = volume.durable_ops();
        let mut known = Known {
            acknowledged: report.durable_group,
            ..Known::default()
        };
        // As many as fit into the first segment.
        for _ in 0..40 {
            let pin = node.shards[0].publisher.clock().pin();
            let group = pin.group();
            let parts: &[&[u8]] = &[b"x"];
            let one = Append {
                kind: 1,
                flags: 0,
                epoch: 1,
                group,
                parts,
            };
            let ShardLog { log, publisher } = &mut node.shards[busy];
            log.append(one).unwrap();
            let end = log.end_batch(group);
            publisher.publish(pin, end);
            set::await_group(&node, &mut known, group).unwrap();
        }
        assert_eq!(
            volume.durable_ops() - before,
            40 * syncs,
            "{busy} of {shards}"
        );
        node.committer.stop();
    }
}
