//! The shards of a simulated destination, and the queues between them and their front.
//!
//! With one shard, orders are carried out at once, as in the product. With several, each shard has
//! a queue of orders and one of answers; both lose nothing and keep order, and some of what waits
//! is processed after a delay, so that shards run apart from each other.

use std::collections::{BTreeSet, VecDeque};

use lowtide_engine_core::destination::Destination;
use lowtide_engine_core::destination::shard::{Answer, Order, Shard, Task};
use lowtide_engine_core::ids::Step;
use lowtide_engine_core::room::Space;

use crate::disk::Disk;
use crate::plan::Index;
use crate::probe::Probe;
use crate::world::{Core, Event, World};

/// What a shard finds in its queue.
#[derive(Debug)]
enum Item {
    Order(Order),
    /// Take part in the checkpoint under way.
    Freeze,
}

/// One shard and its queues.
#[derive(Debug)]
pub(crate) struct SimShard {
    pub(crate) shard: Shard,
    inbox: VecDeque<Item>,
    /// Answers, each list with how far the shard had come then.
    outbox: VecDeque<(Vec<Answer>, Step)>,
    /// An event for the queue is under way.
    stirred: bool,
    answering: bool,
}

/// The shards of one process.
#[derive(Debug, Default)]
pub(crate) struct Shards {
    pub(crate) list: Vec<SimShard>,
    /// Steps ordered by a Complete.
    pub(crate) completing: BTreeSet<Step>,
}

impl Shards {
    pub(crate) fn new(shards: Vec<Shard>) -> Shards {
        let list = shards.into_iter().map(|shard| SimShard {
            shard,
            inbox: VecDeque::new(),
            outbox: VecDeque::new(),
            stirred: false,
            answering: false,
        });
        Shards {
            list: list.collect(),
            completing: BTreeSet::new(),
        }
    }

    /// What is free at the node.
    pub(crate) fn space(&self, disk: &Disk) -> Space {
        disk.space(self.list.iter().map(|s| &s.shard))
    }

    /// Everything up to this step is executed by every shard.
    pub(crate) fn executed(&self, front: &Destination) -> Step {
        let first = |s: &SimShard| {
            let mut orders = s.inbox.iter().filter_map(|item| match item {
                Item::Order(order) => Some(order.step),
                Item::Freeze => None,
            });
            orders.next()
        };
        let open = self.list.iter().filter_map(first).min();
        open.map_or(front.step(), |step| Step(step.0 - 1))
    }
}

impl World {
    /// Takes orders from the front to its shards. With one shard, does them all.
    pub(crate) fn pass_orders(&mut self, node: Index) {
        let now = self.time();
        loop {
            let n = &mut self.nodes[node];
            let Core::Destination(front) = &mut n.core else {
                return;
            };
            for (number, s) in (0..).zip(&mut n.shards.list) {
                while let Some(order) = front.poll_order(number) {
                    s.inbox.push_back(Item::Order(order));
                }
            }
            if n.shards.list.len() > 1 {
                break;
            }
            let waiting = n.shards.list[0].inbox.len();
            if waiting == 0 {
                return;
            }
            let (answers, done) = self.work(node, 0, waiting);
            if let Core::Destination(front) = &mut self.nodes[node].core {
                for answer in answers {
                    front.handle_answer(0, answer);
                }
                front.handle_done(now, 0, done);
            }
        }
        let boot = self.nodes[node].boot;
        for shard in 0..self.nodes[node].shards.list.len() {
            let s = &mut self.nodes[node].shards.list[shard];
            if !s.inbox.is_empty() && !s.stirred {
                s.stirred = true;
                let at = self.now + self.shard_rng.below(self.plan.shard_delay + 1);
                self.at(at, Event::Stir { node, boot, shard });
            }
        }
    }

    /// A shard carries out its first `count` items.
    fn work(&mut self, node: Index, shard: usize, count: usize) -> (Vec<Answer>, Step) {
        let n = &mut self.nodes[node];
        let s = &mut n.shards.list[shard];
        let number = shard as u32;
        for item in s.inbox.drain(..count) {
            match item {
                Item::Order(order) => {
                    let undo = matches!(order.task, Task::Undo { .. });
                    let across = undo && s.shard.needs_other_logs(number);
                    self.probes.hit_if(Probe::UndoneAcrossShardsChange, across);
                    let mut view = n.disk.view(Some(number), order.step);
                    s.shard.handle(order, &mut view);
                }
                Item::Freeze => n.disk.freeze(number),
            }
        }
        let answers = std::iter::from_fn(|| s.shard.poll_answer()).collect();
        (answers, s.shard.done())
    }

    /// A shard does some of what waits for it.
    pub(crate) fn stir(&mut self, node: Index, shard: usize) {
        let s = &mut self.nodes[node].shards.list[shard];
        s.stirred = false;
        let waiting = s.inbox.len() as u64;
        if waiting == 0 {
            return;
        }
        let count = self.shard_rng.range(1, waiting) as usize;
        let (answers, done) = self.work(node, shard, count);
        self.note(11, || format!("shard {shard} of {node} comes to {done}"));
        let boot = self.nodes[node].boot;
        let s = &mut self.nodes[node].shards.list[shard];
        s.outbox.push_back((answers, done));
        if !s.answering {
            s.answering = true;
            let at = self.now + self.shard_rng.below(self.plan.shard_delay + 1);
            self.at(at, Event::Answer { node, boot, shard });
        }
        self.after(node);
    }

    /// The front hears of what a shard has done.
    pub(crate) fn answer(&mut self, node: Index, shard: usize) {
        let now = self.time();
        let n = &mut self.nodes[node];
        let space = n.shards.space(&n.disk);
        let s = &mut n.shards.list[shard];
        s.answering = false;
        let Core::Destination(front) = &mut n.core else {
            return;
        };
        front.handle_space(space);
        for (answers, done) in s.outbox.drain(..) {
            for answer in answers {
                front.handle_answer(shard as u32, answer);
            }
            front.handle_done(now, shard as u32, done);
        }
        self.after(node);
    }

    /// Begins a checkpoint, or recycles the logs behind the last one.
    pub(crate) fn checkpoint(&mut self, node: Index) {
        let id = self.nodes[node].id;
        let n = &mut self.nodes[node];
        if let Core::Destination(front) = &n.core {
            // The last shard may have taken part since the last sync.
            n.disk.apply_checkpoint();
            let recycled = n.disk.recycle(n.shards.list.iter().map(|s| &s.shard));
            if !n.disk.is_freezing() {
                n.disk.begin_checkpoint(front.step(), front.image());
                for s in &mut n.shards.list {
                    s.inbox.push_back(Item::Freeze);
                }
            }
            if !self.swapped.contains_key(&node) {
                self.oracle.recycled(id, &recycled);
            }
            self.probes.hit_if(Probe::Recycled, !recycled.is_empty());
            self.pass_orders(node);
            self.nodes[node].disk.apply_checkpoint();
        }
        let boot = self.nodes[node].boot;
        let pause = self.rng.range(10, 300);
        self.at(self.now + pause, Event::Checkpoint { node, boot });
        self.after(node);
    }
}
