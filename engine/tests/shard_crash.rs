//! Power loss under a whole destination of one to three shards: what a restart shows, with the same
//! number of shards or another, is the work of a prefix of the operations, in every space; and what
//! was told as committed is in it. Undo after such a restart goes through records of all logs.

mod common;

use common::images;
use lowtide_engine::medium::SplitMix;
use lowtide_engine::medium::recording::{PageFate, RecordingVolume};
use lowtide_engine::storage::{NodeStorage, ShardStorage, StorageConfig};
use lowtide_engine_core::destination::shard::{Order, Shard, shard_of};
use lowtide_engine_core::destination::{Destination, DestinationConfig};
use lowtide_engine_core::effect::Effect;
use lowtide_engine_core::ids::{
    Epoch, Incarnation, Life, NodeId, OpId, Seq, StreamSeq, Term, Time,
};
use lowtide_engine_core::member::Intervals;
use lowtide_engine_core::message::{Envelope, Message, Parts, StreamBase, View};
use lowtide_engine_core::op::{Bytes, Change, Key, Operation, Participant, Update};
use lowtide_engine_core::record::Objects;
use lowtide_engine_core::room::{Budget, Cost, HomeRule};
use std::sync::Arc;

const HOME: NodeId = NodeId(2);
const ROOT: Life = life(1, 1);
const SOURCE: Life = life(5, 1);
/// One in each of three shards, and in both of two.
const SPACES: [u64; 3] = [1, 2, 3];
const SLOTS: u64 = 3;
const BULK: usize = 70 << 10;

const fn life(node: u32, incarnation: u64) -> Life {
    Life {
        node: NodeId(node),
        incarnation: Incarnation(incarnation),
    }
}

/// Room in a log of 64 KiB segments for what the script stamps.
const ROOM: HomeRule = HomeRule {
    budget: Budget {
        log: 8 << 10,
        disk: 0,
        replaced: 0,
        carried: 0,
    },
    reserve: Cost { log: 0, disk: 0 },
};

fn shape(shards: u32) -> StorageConfig {
    StorageConfig {
        shards,
        segment_bytes: 64 << 10,
        record_bytes_max: 4 << 10,
        segments_max: 6,
        checkpoint_bytes: 6 << 10,
        extents_max: 1 << 20,
    }
}

/// A destination on a volume, all on this thread but for what blocks.
struct Home {
    front: Destination,
    shards: Vec<(Shard, ShardStorage)>,
    node: NodeStorage,
    /// Newest position that was told as committed.
    committed: StreamSeq,
    resolved: bool,
    was_checkpointing: bool,
}

impl Home {
    fn open(volume: &RecordingVolume, shards: u32) -> Result<Home, String> {
        let opened = NodeStorage::open_on(Arc::new(volume.clone()), &shape(shards), || {});
        let (mut node, storages, image) = opened.map_err(|e| e.to_string())?;
        let config = DestinationConfig {
            root: ROOT.node,
            parent: ROOT.node,
            pings: Intervals {
                ping: 1000,
                rest: 1000,
            },
            nonce: 1,
            carry_bytes: 0,
            room: ROOM,
        };
        let (front, minds) = Destination::new(HOME, config, image);
        node.begin_at(front.step());
        let mut home = Home {
            front,
            shards: minds.into_iter().zip(storages).collect(),
            node,
            committed: StreamSeq(0),
            resolved: false,
            was_checkpointing: false,
        };
        let joined = Message::Joined {
            nonce: 1,
            life: life(HOME.0, 1),
            floor: Epoch(0),
            view: View::default(),
        };
        home.hear(ROOT, Epoch(0), joined);
        Ok(home)
    }

    fn hear(&mut self, from: Life, minimum: Epoch, body: Message) {
        let envelope = Envelope {
            from,
            epoch: Epoch(1),
            minimum,
            term: Term(1),
            body,
        };
        self.front.handle_message(Time(1), envelope);
        self.turn();
    }

    /// One round, as the engine thread's.
    fn turn(&mut self) {
        let durable = self.node.durable();
        self.node.set_needed(self.front.space_needed());
        self.node.ask_disk();
        self.front.handle_space(self.node.space());
        self.front.handle_durable(Time(1), durable);
        let freeze = self.node.begin_checkpoint(|| self.front.image());
        let mut tidy = freeze || (self.was_checkpointing && !self.node.is_checkpointing());
        self.was_checkpointing = self.node.is_checkpointing();
        loop {
            let pin = self.node.pin(self.front.step());
            let mut busy = false;
            for (number, (shard, storage)) in (0..).zip(&mut self.shards) {
                let front = &mut self.front;
                let orders: Vec<Order> = std::iter::from_fn(|| front.poll_order(number)).collect();
                if orders.is_empty() && !tidy {
                    continue;
                }
                busy = true;
                storage.begin(pin.group());
                for order in orders {
                    shard.handle(order, storage);
                }
                if freeze && tidy {
                    storage.freeze();
                }
                storage.finish(pin.clone(), shard);
                while let Some(answer) = shard.poll_answer() {
                    front.handle_answer(number, answer);
                }
                front.handle_done(Time(1), number, shard.done());
            }
            tidy = false;
            if !busy {
                break;
            }
        }
        if self.node.failure().is_some() {
            return;
        }
        while let Some(effect) = self.front.poll_effect() {
            match effect {
                Effect::Send {
                    envelope:
                        Envelope {
                            body: Message::Progress { streams, .. },
                            ..
                        },
                    ..
                } => {
                    for s in streams.iter().filter(|s| s.source == SOURCE) {
                        self.committed = self.committed.max(s.committed);
                    }
                }
                Effect::Send { envelope, .. } => {
                    self.resolved |= matches!(envelope.body, Message::Resolved { .. });
                }
                _ => {}
            }
        }
    }

    /// Rounds until `done`, or until the storage has failed.
    fn until(&mut self, done: impl Fn(&Home) -> bool) {
        while !done(self) && self.node.failure().is_none() {
            self.turn();
            std::thread::yield_now();
        }
    }

    /// The number of operations whose work the objects show; every space must agree. An error if
    /// the power has failed.
    fn shown(&mut self) -> Result<u64, String> {
        let count = self.shards.len() as u32;
        let mut values = Vec::new();
        for space in SPACES {
            let storage = &mut self.shards[shard_of(space, count) as usize].1;
            for slot in 0..SLOTS {
                let stored = storage.get(&Key::at(space, slot));
                let bytes = stored.map(|s| storage.fetch(&s.value));
                values.push((space, slot, bytes));
            }
        }
        if let Some(why) = self.node.failure() {
            return Err(why);
        }
        let readable = |v: Option<Option<Bytes>>| v.map(|b| b.expect("a readable value"));
        let values = values.into_iter().map(|(a, b, v)| (a, b, readable(v)));
        let values: Vec<_> = values.collect();
        let number = |bytes: &[u8]| u64::from_le_bytes(bytes[..8].try_into().unwrap());
        let newest = values.iter().filter_map(|(.., b)| b.as_deref().map(number));
        let newest = newest.max().unwrap_or(0);
        for (space, slot, bytes) in values {
            let expected = (1..=newest).rev().find(|op| op % SLOTS == slot);
            let expected = expected.map(|op| value(op, space));
            assert_eq!(
                bytes.as_deref(),
                expected.as_deref(),
                "{space} {slot} after {newest}"
            );
        }
        Ok(newest)
    }

    fn close(self) -> StreamSeq {
        drop(self.shards);
        self.node.close();
        self.committed
    }
}

/// What operation `op` writes in `space`; now and then bulk.
fn value(op: u64, space: u64) -> Vec<u8> {
    let mut value = op.to_le_bytes().to_vec();
    let bulk = op.is_multiple_of(11) && space == SPACES[(op / 11 % 3) as usize];
    value.resize(
        if bulk { BULK } else { 8 + (op % 50) as usize },
        space as u8,
    );
    value
}

/// Operation `op` writes one slot in all spaces.
fn operation(op: u64) -> Arc<Operation> {
    let updates = SPACES.map(|space| Update {
        home: HOME,
        key: Key::at(space, op % SLOTS),
        change: Change::Put(Bytes::from(value(op, space))),
    });
    Arc::new(Operation {
        id: OpId {
            source: SOURCE,
            seq: Seq(op),
        },
        epoch: Epoch(op),
        previous: Epoch(op - 1),
        participants: vec![Participant {
            node: HOME,
            at: StreamSeq(op),
        }],
        updates: updates.to_vec(),
    })
}

/// Runs operations from the next one on until `last` or the power fails; m follows some way behind.
/// Says what was told as committed.
fn live(volume: &RecordingVolume, shards: u32, last: u64) -> u64 {
    let Ok(mut home) = Home::open(volume, shards) else {
        return 0;
    };
    let Ok(shown) = home.shown() else {
        home.close();
        return 0;
    };
    let first = shown + 1;
    home.committed = StreamSeq(first - 1);
    let base = StreamBase {
        source: SOURCE,
        home: HOME,
        base: StreamSeq(1),
    };
    home.hear(SOURCE, Epoch(0), Message::Stream { base });
    for op in first..=last {
        if home.node.failure().is_some() {
            break;
        }
        let part = Parts {
            homes: vec![HOME],
            op: operation(op),
        };
        // What m has passed is committed: here the source's word for it is the home's own.
        let minimum = Epoch(home.committed.0.saturating_sub(8));
        home.hear(
            SOURCE,
            minimum,
            Message::Reint {
                parts: vec![part],
                done: Seq(0),
            },
        );
        if op.is_multiple_of(4) {
            home.until(|h| h.committed.0 + 3 > op);
        }
    }
    home.until(|h| h.committed.0 >= last);
    home.close().0
}

#[test]
fn a_restart_with_any_number_of_shards_shows_whole_operations() {
    let mut rng = SplitMix(21);
    let (mut looked_at, mut committed_max) = (0, 0);
    for (before, after) in [(3, 3), (1, 3), (3, 1), (2, 3), (3, 2), (1, 1)] {
        let whole = RecordingVolume::new();
        assert_eq!(live(&whole, before, 60), 60);
        let total = whole.durable_ops();
        let mut nth = 1 + rng.next_u64() % 3;
        while nth <= total {
            let volume = RecordingVolume::new();
            volume.fail_power_at(nth);
            let committed = live(&volume, before, 60);
            committed_max = committed_max.max(committed);
            for image in images(&volume, 1, 2, false, &mut rng) {
                let mut home = Home::open(&image, after)
                    .unwrap_or_else(|e| panic!("{before} {after} {nth}: {e}"));
                let shown = home.shown().unwrap();
                assert!(shown >= committed, "{shown} of {committed} at {nth}");
                home.close();
                looked_at += 1;
                if looked_at % 4 == 0 {
                    undo_half(&image, (after, before), shown, &mut rng);
                }
            }
            nth += 1 + rng.next_u64() % 40;
        }
    }
    println!("{looked_at} images, up to {committed_max} operations committed");
    assert!(looked_at > 60 && committed_max > 30);
}

/// The source is dead: the newest of its operations that m has not passed are undone, and the power
/// fails meanwhile; another start with another number of shards finishes it.
fn undo_half(volume: &RecordingVolume, (now, later): (u32, u32), shown: u64, rng: &mut SplitMix) {
    let through = shown.saturating_sub(3);
    volume.fail_power_at(1 + rng.next_u64() % 30);
    if let Ok(mut home) = Home::open(volume, now) {
        resolve(&mut home, through);
        home.close();
    }
    let image =
        volume.crash_image(&mut |p| PageFate::random(p.stores, false, &mut || rng.next_u64()));
    let mut home = Home::open(&image, later).unwrap_or_else(|e| panic!("undoing: {e}"));
    let left = home.shown().unwrap();
    assert!(
        (through..=shown).contains(&left),
        "{left} of {through} to {shown}"
    );
    resolve(&mut home, through);
    assert_eq!((home.shown(), home.resolved), (Ok(through), true));
    home.close();
}

fn resolve(home: &mut Home, through: u64) {
    let decision = Message::Resolve {
        victim: SOURCE,
        round: 0,
        through: Seq(through),
        until: StreamSeq(through),
        supply: Vec::new(),
    };
    home.hear(ROOT, Epoch(0), decision);
    home.until(|h| h.resolved);
}
