//! Undo of a dead life's operations, by a destination on real files.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

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
use lowtide_engine_core::record::{Objects, Value};
use lowtide_engine_core::room::HomeRule;

const ROOT: Life = life(1);
const HOME: NodeId = NodeId(2);
const CLIENT: Life = life(3);
const OTHER: Life = life(4);

const fn life(node: u32) -> Life {
    Life {
        node: NodeId(node),
        incarnation: Incarnation(1),
    }
}

struct Bench {
    front: Destination,
    shards: Vec<(Shard, ShardStorage)>,
    node: NodeStorage,
    durable: Receiver<()>,
}

impl Bench {
    fn new(dir: &std::path::Path, shards: u32) -> Bench {
        let (wake, durable) = channel();
        let wake = move || {
            let _ = wake.send(());
        };
        let shape = StorageConfig::new(shards);
        let opened = NodeStorage::open(dir, &shape, false, wake);
        let (mut node, storages, image) = opened.unwrap();
        let config = DestinationConfig {
            root: ROOT.node,
            parent: ROOT.node,
            pings: Intervals { ping: 1, rest: 1 },
            nonce: 7,
            carry_bytes: 0,
            room: HomeRule::default(),
        };
        let (front, minds) = Destination::new(HOME, config, image);
        node.begin_at(front.step());
        let mut bench = Bench {
            front,
            shards: minds.into_iter().zip(storages).collect(),
            node,
            durable,
        };
        let joined = Message::Joined {
            nonce: 7,
            life: life(HOME.0),
            floor: Epoch(0),
            view: View::default(),
        };
        bench.hears(ROOT, joined);
        bench
    }

    fn hears(&mut self, from: Life, body: Message) {
        let envelope = Envelope {
            from,
            epoch: Epoch(10),
            minimum: Epoch(0),
            term: Term(1),
            body,
        };
        self.front.handle_message(Time(0), envelope);
        self.pass();
    }

    /// Carries out what the front has ordered.
    fn pass(&mut self) {
        let mut busy = true;
        while std::mem::take(&mut busy) {
            for (number, (shard, storage)) in (0..).zip(&mut self.shards) {
                let front = &mut self.front;
                let orders: Vec<Order> = std::iter::from_fn(|| front.poll_order(number)).collect();
                busy |= !orders.is_empty();
                let pin = self.node.pin(front.step());
                storage.begin(pin.group());
                for order in orders {
                    shard.handle(order, storage);
                }
                storage.finish(pin, shard);
                while let Some(answer) = shard.poll_answer() {
                    front.handle_answer(number, answer);
                }
                front.handle_done(Time(0), number, shard.done());
            }
        }
    }

    /// An operation of `source`, number `seq`, on this home alone.
    fn executes(&mut self, source: Life, seq: u64, key: &Key, change: Change) {
        if seq == 1 {
            let base = StreamBase {
                source,
                home: HOME,
                base: StreamSeq(1),
            };
            self.hears(source, Message::Stream { base });
        }
        let op = Operation {
            id: OpId {
                source,
                seq: Seq(seq),
            },
            epoch: Epoch(10),
            previous: Epoch(if seq == 1 { 0 } else { 10 }),
            participants: vec![Participant {
                node: HOME,
                at: StreamSeq(seq),
            }],
            updates: vec![Update {
                home: HOME,
                key: key.clone(),
                change,
            }],
        };
        let part = Parts {
            homes: vec![HOME],
            op: Arc::new(op),
        };
        let parts = vec![part];
        let done = Seq(0);
        self.hears(source, Message::Reint { done, parts });
    }

    /// Fences a life and undoes all its operations after `through`.
    fn resolves(&mut self, victim: Life, through: u64) {
        self.hears(ROOT, Message::Fence { victim, round: 0 });
        self.says("Fenced");
        let resolve = Message::Resolve {
            victim,
            round: 0,
            through: Seq(through),
            until: StreamSeq(through),
            supply: Vec::new(),
        };
        self.hears(ROOT, resolve);
        self.says("Resolved");
    }

    fn says(&mut self, name: &str) {
        loop {
            let durable = self.node.durable();
            self.front.handle_durable(Time(0), durable);
            while let Some(effect) = self.front.poll_effect() {
                if matches!(&effect, Effect::Send { envelope, .. } if envelope.body.name() == name)
                {
                    return;
                }
            }
            self.pass();
            while let Some(effect) = self.front.poll_effect() {
                if matches!(&effect, Effect::Send { envelope, .. } if envelope.body.name() == name)
                {
                    return;
                }
            }
            let news = self.durable.recv_timeout(Duration::from_secs(20));
            news.unwrap_or_else(|_| panic!("{name} is never said"));
        }
    }

    fn value(&mut self, key: &Key) -> Option<Bytes> {
        let number = shard_of(key.space, self.shards.len() as u32);
        let stored = self.shards[number as usize].1.get(key)?;
        match stored.value {
            Value::Inline(bytes) => Some(bytes),
            Value::Extent(_) => panic!("a counter is small"),
        }
    }
}

fn word(value: i64) -> Bytes {
    Bytes::from(value.to_le_bytes())
}

#[test]
fn undone_additions_leave_a_counter_as_they_found_it() {
    undone_additions(1, 1);
}

#[test]
fn with_shards_too() {
    undone_additions(3, 2);
}

fn undone_additions(shards: u32, shards_later: u32) {
    let tmp = tempfile::tempdir().unwrap();
    let (made, absent, shared) = (Key::at(1, 1), Key::at(2, 2), Key::at(3, 3));
    let mut bench = Bench::new(tmp.path(), shards);
    bench.executes(OTHER, 1, &made, Change::Put(word(0)));
    bench.executes(CLIENT, 1, &made, Change::Add(word(5)));
    bench.executes(CLIENT, 2, &absent, Change::Add(word(5)));
    bench.executes(CLIENT, 3, &shared, Change::Add(word(5)));
    bench.executes(OTHER, 2, &shared, Change::Add(word(2)));
    bench.executes(CLIENT, 4, &made, Change::Add(word(1)));
    bench.resolves(CLIENT, 0);
    assert_eq!(bench.value(&made), Some(word(0)), "it was there before");
    assert_eq!(bench.value(&absent), None);
    assert_eq!(bench.value(&shared), Some(word(2)));
    assert_eq!(bench.front.counters().undone, 4);

    // The same from the log.
    let Bench { shards, node, .. } = bench;
    drop(shards);
    node.close();
    let mut bench = Bench::new(tmp.path(), shards_later);
    assert_eq!(bench.value(&made), Some(word(0)));
    assert_eq!(bench.value(&absent), None);
    assert_eq!(bench.value(&shared), Some(word(2)));
}
