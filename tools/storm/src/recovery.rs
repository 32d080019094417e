//! How a home comes back from its disk, and that it may die on the way (I24).
//!
//! Everything that a start does is done to a copy of the disk as well: there the process, with any
//! number of shards, dies after some of the records, or when it has begun to write records of its
//! own, and another starts. Both must be the same in all that a state machine knows, and in objects
//! and out-of-line values. What becomes of undo steps and decisions that a crash interrupts is
//! checked otherwise: by the oracle's own account of each home's log at every start.

use lowtide_engine_core::destination::shard::Shard;
use lowtide_engine_core::destination::{Destination, DestinationConfig, Image};
use lowtide_engine_core::ids::{NodeId, Step, Time};

use crate::disk::Disk;
use crate::rng::Rng;

/// Feeds the first `records` records of the disk to a process of `shards` shards.
fn replay(disk: &mut Disk, shards: u32, records: usize) -> Result<Image, String> {
    disk.set_shards(shards);
    let image = Image::decode(&disk.checkpoint.image, disk.storage, shards);
    let mut image = image.map_err(|e| format!("the image does not decode: {e}"))?;
    let list = disk.records(Step(0), Step(u64::MAX));
    for (position, r) in list.iter().take(records) {
        let mut view = disk.view(None, r.step);
        let fed = image.replay(*position, (r.kind, &r.body), &mut view);
        fed.map_err(|e| e.to_string())?;
    }
    Ok(image)
}

/// Recovers a home for a process of `shards` shards: its front and its shards.
///
/// # Errors
/// Why it cannot be, in words.
pub(crate) fn recover(
    disk: &mut Disk,
    (node, config): (NodeId, DestinationConfig),
    shards: u32,
) -> Result<(Destination, Vec<Shard>), String> {
    let mut image = replay(disk, shards, usize::MAX)?;
    image.finish().map_err(|e| e.to_string())?;
    let kept: Vec<_> = image.kept().collect();
    disk.adopt_extents(kept.into_iter());
    Ok(Destination::new(node, config, image))
}

/// I24: recovers `disk` once, and once more after a crash in the midst of it; says how the two
/// differ. `meanwhile` befalls the disk in that crash.
///
/// # Errors
/// The difference, or why one of them failed.
pub(crate) fn check_restartable(
    disk: &Disk,
    home: (NodeId, DestinationConfig),
    shards: u32,
    rng: &mut Rng,
    meanwhile: impl Fn(&mut Disk),
) -> Result<(), String> {
    let (mut once, mut again) = (disk.clone(), disk.clone());
    let whole = recover(&mut once, home, shards)?;
    let records = disk.records(Step(0), Step(u64::MAX)).len() as u64;
    let others = rng.range(1, 3) as u32;
    let at = rng.below(records + 2);
    if at > records {
        // It came up and was about to say so.
        let (mut front, mut others) = recover(&mut again, home, others)?;
        front.handle_timeout(Time(0));
        for (number, shard) in (0..).zip(&mut others) {
            while let Some(order) = front.poll_order(number) {
                let mut view = again.view(Some(number), order.step);
                shard.handle(order, &mut view);
            }
        }
    } else {
        replay(&mut again, others, at as usize)?;
    }
    again.crash(disk.synced);
    meanwhile(&mut again);
    let second = recover(&mut again, home, shards)?;
    let differs = |what: &str, a: &dyn std::fmt::Debug, b: &dyn std::fmt::Debug| {
        Err(format!(
            "I24: {}, recovered again after a crash at record {at} of {records}, has {what} \
             {b:?} and not {a:?}",
            home.0,
        ))
    };
    let (a, b) = (format!("{whole:?}"), format!("{second:?}"));
    if a != b {
        return differs("other state", &a, &b);
    }
    if once.objects != again.objects {
        return differs("objects", &once.objects, &again.objects);
    }
    if once.extents() != again.extents() {
        return differs("values", &once.extents(), &again.extents());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use lowtide_engine_core::destination::shard::{Order, Task};
    use lowtide_engine_core::ids::{Epoch, Incarnation, Life, OpId, Seq, StorageId, StreamSeq};
    use lowtide_engine_core::member::Intervals;
    use lowtide_engine_core::op::{Bytes, Change, Key, Operation, Participant, Update};
    use lowtide_engine_core::record::Piece;
    use lowtide_engine_core::room::HomeRule;
    use std::sync::Arc;

    use super::*;

    const HOME: NodeId = NodeId(2);

    fn home() -> (NodeId, DestinationConfig) {
        let config = DestinationConfig {
            root: NodeId(1),
            parent: NodeId(1),
            pings: Intervals { ping: 10, rest: 10 },
            nonce: 7,
            carry_bytes: 0,
            room: HomeRule::default(),
        };
        (HOME, config)
    }

    /// A disk to whose one log three operations were written that each add 1 to a counter.
    fn counted() -> Disk {
        let mut disk = Disk::of(StorageId(7), None);
        let (_, mut shards) = recover(&mut disk, home(), 1).expect("an empty disk");
        let source = Life {
            node: NodeId(3),
            incarnation: Incarnation(1),
        };
        for number in 1..=3 {
            let (at, seq, step) = (StreamSeq(number), Seq(number), Step(number));
            let op = Operation {
                id: OpId { source, seq },
                epoch: Epoch(5),
                previous: Epoch(5),
                participants: vec![Participant { node: HOME, at }],
                updates: vec![Update {
                    home: HOME,
                    key: Key::at(1, 4),
                    change: Change::Add(Bytes::from(1i64.to_le_bytes())),
                }],
            };
            let (op, piece) = (Arc::new(op), Piece { index: 0, count: 1 });
            let task = Task::Execute { op, at, piece };
            let mut view = disk.view(Some(0), step);
            shards[0].handle(Order { step, task }, &mut view);
        }
        disk.crash(Step(3));
        disk
    }

    #[test]
    fn a_crash_anywhere_in_a_recovery_changes_nothing() {
        let disk = counted();
        for seed in 0..50 {
            let rng = &mut Rng::new(seed);
            let checked = check_restartable(&disk, home(), 2, rng, |_| ());
            assert_eq!(checked, Ok(()), "seed {seed}");
        }
    }

    /// A store that a recovery changes before its checkpoint is whole counts some additions twice.
    #[test]
    fn what_an_interrupted_recovery_leaves_behind_is_found() {
        let disk = counted();
        let mut half = disk.clone();
        replay(&mut half, 1, 2).expect("whole records");
        let leaves = |disk: &mut Disk| disk.objects.clone_from(&half.objects);
        let rng = &mut Rng::new(1);
        let checked = check_restartable(&disk, home(), 1, rng, leaves);
        let text = checked.expect_err("the counter is 5");
        assert!(
            text.starts_with("I24: ") && text.contains("objects"),
            "{text}"
        );
    }

    #[test]
    fn a_record_that_an_interrupted_recovery_loses_is_found() {
        let disk = counted();
        let loses = |disk: &mut Disk| {
            disk.logs[0].records.pop_back();
        };
        let rng = &mut Rng::new(1);
        let checked = check_restartable(&disk, home(), 1, rng, loses);
        let text = checked.expect_err("the stream is shorter");
        assert!(
            text.starts_with("I24: ") && text.contains("state"),
            "{text}"
        );
    }
}
