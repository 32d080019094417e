use alloc::sync::Arc;
use alloc::vec;

use super::*;
use crate::destination::add_words;
use crate::ids::{Epoch, Incarnation, Life, OpId, Step, StreamSeq, Version};
use crate::op::{Bytes, Key, Operation, Participant, UPDATES_MAX};
use crate::record::{
    Extent, OpRecord, Piece, Record, Recorded, Stored, UndoneRecord, Value, Write, encode_record,
};

const HOME: NodeId = NodeId(2);
const OTHER: NodeId = NodeId(3);

fn update(home: NodeId, slot: u64, name: usize, change: Change) -> Update {
    let name = vec![b'n'; name];
    let space = slot % 7;
    let key = Key { space, slot, name };
    Update { home, key, change }
}

fn put(len: usize) -> Change {
    Change::Put(vec![1; len].into())
}

fn stored(len: usize) -> Option<Stored> {
    let value = if len >= BULK_BYTES {
        let len = len as u32;
        Value::Extent(Extent {
            offset: 0,
            len,
            crc: 0,
        })
    } else {
        Value::Inline(vec![2; len].into())
    };
    Some(Stored {
        version: Version(9),
        epoch: Epoch(9),
        value,
    })
}

/// Bytes that a home's log takes for an operation and its undo step, if every update is of a shard
/// of its own and replaces a value of `replaced` bytes.
fn taken(op: &Operation, replaced: usize, carry_bytes: usize) -> u64 {
    let carried = op.carried(|home| home == HOME, carry_bytes);
    let mut bytes = 0;
    for (index, update) in op.updates_for(HOME).enumerate() {
        let others = op.updates.iter();
        let others = others.filter(|u| index == 0 && carried.contains(&u.home));
        let (change, before, restored) = match &update.change {
            Change::Put(value) if value.len() < BULK_BYTES => {
                let put = Recorded::Put(Value::Inline(value.clone()));
                (put, stored(replaced), stored(replaced))
            }
            Change::Put(value) => {
                let Some(Stored { value, .. }) = stored(value.len()) else {
                    unreachable!();
                };
                (Recorded::Put(value), stored(replaced), stored(replaced))
            }
            Change::Delete => (Recorded::Delete, stored(replaced), stored(replaced)),
            Change::Add(words) => {
                let sum = add_words(words, words).len();
                (Recorded::Add(words.clone()), stored(0), stored(sum))
            }
        };
        let at = StreamSeq(7);
        let record = Record::Op(OpRecord {
            id: op.id,
            epoch: op.epoch,
            previous: op.previous,
            participants: op.participants.clone(),
            at,
            piece: Piece { index: 0, count: 1 },
            writes: vec![Write {
                key: update.key.clone(),
                change,
                before,
            }],
            carried: others.cloned().collect(),
        });
        let undone = Record::Undone(UndoneRecord {
            source: op.id.source,
            seq: op.id.seq,
            at,
            restored: vec![(update.key.clone(), restored)],
        });
        for record in [record, undone] {
            bytes += encode_record(Step(1), &record).len() as u64 + FRAME_BYTES;
        }
    }
    bytes
}

fn operation(updates: Vec<Update>) -> Arc<Operation> {
    let mut homes: Vec<NodeId> = updates.iter().map(|u| u.home).collect();
    homes.sort_unstable();
    homes.dedup();
    let at = StreamSeq(7);
    let participants = homes.into_iter().map(|node| Participant { node, at });
    let source = Life {
        node: NodeId(1),
        incarnation: Incarnation(1),
    };
    Arc::new(Operation {
        id: OpId {
            source,
            seq: Seq(1),
        },
        epoch: Epoch(5),
        previous: Epoch(4),
        participants: participants.collect(),
        updates,
    })
}

#[test]
fn a_cost_is_no_less_than_what_the_log_takes_and_not_much_more() {
    let changes = [
        put(0),
        put(200),
        put(BULK_BYTES - 1),
        put(BULK_BYTES),
        Change::Delete,
        Change::Add(vec![1; 64].into()),
    ];
    let budget = Budget::default();
    for count in [1, 3, UPDATES_MAX / 2] {
        for (number, change) in changes.iter().enumerate() {
            for replaced in [0, 100, BULK_BYTES - 1] {
                for others in [0, 1, 20] {
                    let mut updates = Vec::new();
                    for slot in 0..count as u64 {
                        updates.push(update(HOME, slot, 30, change.clone()));
                    }
                    for slot in 0..others {
                        updates.push(update(OTHER, slot, 30, put(5_000)));
                    }
                    let op = operation(updates);
                    let carry_bytes = budget.carried as usize;
                    let taken = taken(&op, replaced, carry_bytes);
                    let costs = budget.costs(&op.updates, |_| Some(replaced as u64));
                    let (_, cost) = costs.iter().find(|(home, _)| *home == HOME).unwrap();
                    let case = (count, number, replaced, others);
                    assert!(cost.log >= taken, "{case:?}: {} < {taken}", cost.log);
                    let slack =
                        200 * count as u64 + 64 * others + budget.carried.min(6_000 * others);
                    assert!(
                        cost.log <= taken + slack,
                        "{case:?}: {} > {taken}",
                        cost.log
                    );
                    let bulk = count as u64 * BULK_BYTES as u64 * u64::from(number == 3);
                    assert!(cost.disk >= cost.log + bulk, "{case:?}");
                    assert!(cost.log <= budget.costs(&op.updates, |_| None)[0].1.log);
                }
            }
        }
    }
}

#[test]
fn the_product_s_budget_holds_every_operation_of_values_in_line() {
    let budget = Budget::default();
    let updates = (0..UPDATES_MAX as u64).map(|slot| update(HOME, slot, 1024, put(BULK_BYTES - 1)));
    let costs = budget.costs(&updates.collect::<Vec<_>>(), |_| None);
    assert!(!budget.is_exceeded_by(&costs[0].1), "{costs:?}");
    let updates = (0..8).map(|slot| update(HOME, slot, 0, put(8 << 20)));
    let costs = budget.costs(&updates.collect::<Vec<_>>(), |_| None);
    assert!(budget.is_exceeded_by(&costs[0].1), "64 MiB do not fit");
}

#[test]
fn a_ledger_admits_up_to_the_budget_and_gives_back_in_order() {
    let budget = Budget {
        log: 100,
        disk: 1000,
        ..Budget::default()
    };
    let cost = |log, disk| vec![(HOME, Cost { log, disk })];
    let mut ledger = Ledger::default();
    assert!(!ledger.admits(&budget, &cost(101, 0)));
    assert!(ledger.admits(&budget, &cost(100, 1000)));
    ledger.enter(Seq(1), cost(60, 0));
    ledger.enter(Seq(2), cost(40, 900));
    assert!(!ledger.admits(&budget, &cost(1, 0)));
    assert!(!ledger.admits(&budget, &cost(0, 101)));
    let elsewhere = vec![(OTHER, Cost { log: 100, disk: 0 })];
    assert!(ledger.admits(&budget, &elsewhere));
    ledger.settle(Seq(1));
    assert!(ledger.admits(&budget, &cost(60, 100)));
    assert!(!ledger.admits(&budget, &cost(61, 0)));
    ledger.settle(Seq(2));
    assert!(ledger.admits(&budget, &cost(100, 1000)));
}

#[test]
fn a_home_has_room_while_every_source_could_use_its_budget() {
    let rule = HomeRule {
        budget: Budget {
            log: 100,
            disk: 1000,
            ..Budget::default()
        },
        reserve: Cost { log: 7, disk: 70 },
    };
    let space = |log, disk| Space {
        log,
        disk,
        is_crowded: false,
    };
    assert!(rule.has_room(&space(307, 3070), 3));
    assert!(!rule.has_room(&space(306, 3070), 3));
    assert!(!rule.has_room(&space(307, 3069), 3));
    assert!(!rule.has_room(&space(307, 3070), 4));
    let crowded = Space {
        is_crowded: true,
        ..Space::UNBOUNDED
    };
    assert!(!rule.has_room(&crowded, 0));
    assert!(!rule.has_room(&Space::NONE, 0));
}

#[test]
fn a_word_counts_for_whom_it_counts() {
    let proxy = NodeId(9);
    let said = |view| {
        let view = ViewId(view);
        [RoomAt { home: HOME, view }]
    };
    let mut words = Words::default();
    assert!(!words.allow(HOME, HOME, ViewId(0)), "nothing was said");
    assert!(words.hear(HOME, &said(3)));
    assert!(!words.hear(HOME, &said(3)));
    assert!(words.allow(HOME, HOME, ViewId(8)), "its session is counted");
    assert!(
        !words.allow(proxy, HOME, ViewId(1)),
        "the proxy said nothing"
    );
    words.hear(proxy, &said(3));
    assert!(words.allow(proxy, HOME, ViewId(3)));
    assert!(
        !words.allow(proxy, HOME, ViewId(4)),
        "the home does not know it"
    );
    let own: Vec<RoomAt> = words.own().collect();
    assert_eq!(own, said(3), "hearsay is not passed on");
    words.refused(HOME, HOME);
    assert!(!words.allow(HOME, HOME, ViewId(0)));
    words.hear(proxy, &[]);
    assert!(!words.allow(proxy, HOME, ViewId(3)));
}

#[test]
fn bulk_is_out_of_line_wherever_it_lies() {
    let long: Bytes = vec![0; BULK_BYTES].into();
    let budget = Budget::default();
    let costs = budget.costs(&[update(HOME, 1, 0, Change::Put(long))], |_| Some(0));
    assert!(costs[0].1.log < 1000);
    assert_eq!(costs[0].1.disk - costs[0].1.log, BULK_BYTES as u64);
}
