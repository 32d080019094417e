//! A persistent destination at work: the mind's front and shards, with their storage and threads.
//!
//! With one shard, its orders are carried out on the front's thread, between the input of a round
//! and its effects. With several, each shard has a thread of its own and two rings: batches of
//! orders one way, replies the other. A thread without orders spins briefly, then sleeps.
//!
//! Per round the front's orders leave in one batch per shard, all under one pin of one commit
//! group. A ring that is full keeps later batches here, in order, and the front then says that
//! there is no room for new work; what is stamped is still taken.
//!
//! Deliberately absent: the wait for input, messages, sockets (the engine thread's).

use std::collections::VecDeque;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lowtide_engine_core::destination::shard::{Answer, Order, Shard};
use lowtide_engine_core::destination::{Destination, DestinationConfig};
use lowtide_engine_core::ids::{NodeId, Step, Time};
use lowtide_engine_core::lock::LockServer;
use lowtide_engine_core::room::Space;

use crate::log::commit::GroupPin;
use crate::medium::Volume;
use crate::medium::dir::{DirOptions, DirVolume};
use crate::ring::{self, Receiver, Sender};
use crate::storage::{NodeStorage, ShardStorage, StorageConfig, StorageError};

/// Batches that a shard may have in its ring and in its hands.
const IN_FLIGHT: usize = 64;
/// Looks at an empty ring before a shard's thread sleeps.
const SPINS: u32 = 256;
/// How often a busy shard tells what it is doing.
const DESCRIBE_EVERY: Duration = Duration::from_millis(20);

/// Orders of one round for one shard.
struct Batch {
    orders: Vec<Order>,
    /// Take part in a checkpoint after the orders.
    freeze: bool,
    pin: GroupPin,
}

/// What came of a batch.
struct Reply {
    answers: Vec<Answer>,
    done: Step,
}

/// A shard with its storage.
struct Worker {
    shard: Shard,
    storage: ShardStorage,
}

impl Worker {
    fn work(&mut self, batch: Batch) -> Reply {
        let Batch {
            orders,
            freeze,
            pin,
        } = batch;
        self.storage.begin(pin.group());
        for order in orders {
            self.shard.handle(order, &mut self.storage);
        }
        if freeze {
            self.storage.freeze();
        }
        self.storage.finish(pin, &self.shard);
        Reply {
            answers: std::iter::from_fn(|| self.shard.poll_answer()).collect(),
            done: self.shard.done(),
        }
    }
}

/// A shard's thread, from outside.
struct Lane {
    orders: Sender<Batch>,
    replies: Receiver<Reply>,
    in_flight: usize,
    backlog: VecDeque<Batch>,
    waits: Arc<Mutex<Option<String>>>,
    thread: JoinHandle<()>,
}

impl Lane {
    fn start(
        number: usize,
        worker: Worker,
        (news, wake): (Arc<AtomicBool>, impl Fn() + Send + 'static),
    ) -> Result<Lane, StorageError> {
        let (orders, incoming) = ring::ring(IN_FLIGHT);
        let (outgoing, replies) = ring::ring(IN_FLIGHT);
        let waits = Arc::new(Mutex::new(None));
        let work = ShardThread {
            worker,
            incoming,
            outgoing,
            news,
            waits: waits.clone(),
            described: Instant::now(),
        };
        let thread = std::thread::Builder::new()
            .name(format!("lowtide-shard{number}"))
            .spawn(move || work.run(wake))
            .map_err(|e| StorageError::Append(format!("cannot start thread of shard: {e}")))?;
        Ok(Lane {
            orders,
            replies,
            in_flight: 0,
            backlog: VecDeque::new(),
            waits,
            thread,
        })
    }

    fn push(&mut self, batch: Batch) {
        self.backlog.push_back(batch);
        self.flush();
    }

    fn flush(&mut self) {
        while self.in_flight < IN_FLIGHT {
            let Some(batch) = self.backlog.pop_front() else {
                return;
            };
            self.in_flight += 1;
            if let Err(batch) = self.orders.send(batch) {
                // Cannot be: the ring holds as many as may be in flight.
                self.in_flight -= 1;
                self.backlog.push_front(batch);
                return;
            }
        }
    }

    fn receive(&mut self) -> Option<Reply> {
        let reply = self.replies.receive()?;
        self.in_flight -= 1;
        self.flush();
        Some(reply)
    }
}

struct ShardThread {
    worker: Worker,
    incoming: Receiver<Batch>,
    outgoing: Sender<Reply>,
    /// Set when there are replies that the front was woken for.
    news: Arc<AtomicBool>,
    waits: Arc<Mutex<Option<String>>>,
    described: Instant,
}

impl ShardThread {
    fn run(mut self, wake: impl Fn()) {
        let mut spins = 0;
        loop {
            if let Some(batch) = self.incoming.receive() {
                spins = 0;
                let reply = self.worker.work(batch);
                let sent = self.outgoing.send(reply);
                assert!(sent.is_ok(), "a reply has room for every batch in flight");
                // SeqCst, as where it is cleared: either the front sees the reply, or it is woken.
                if !self.news.swap(true, Ordering::SeqCst) {
                    wake();
                }
                if self.described.elapsed() >= DESCRIBE_EVERY {
                    self.describe();
                }
            } else if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
            } else {
                self.describe();
                if !self.incoming.wait() {
                    return;
                }
                spins = 0;
            }
        }
    }

    fn describe(&mut self) {
        self.described = Instant::now();
        *self.waits.lock().unwrap_or_else(PoisonError::into_inner) =
            lock_waits(self.worker.shard.locks());
    }
}

enum Shards {
    Inline(Box<Worker>),
    Threads(Vec<Lane>, Arc<AtomicBool>),
}

/// A persistent destination with everything it needs but a network.
pub(crate) struct Server {
    front: Destination,
    shards: Shards,
    node: NodeStorage,
    /// What the front knows of the storage.
    durable: Step,
    has_room: bool,
    checkpointing: bool,
}

impl Server {
    /// Opens the state in `dir` and starts the shards' threads.
    pub(crate) fn open(
        id: NodeId,
        config: DestinationConfig,
        (dir, power_fail): (&Path, bool),
        shards: u32,
        wake: impl Fn() + Send + Sync + Clone + 'static,
    ) -> Result<Server, StorageError> {
        let options = DirOptions {
            power_fail,
            ..DirOptions::default()
        };
        let volume = Arc::new(DirVolume::open(dir, options)?);
        Server::open_on(id, config, volume, shards, wake)
    }

    /// As [`Server::open`], on a volume of the caller's.
    pub(crate) fn open_on(
        id: NodeId,
        config: DestinationConfig,
        volume: Arc<dyn Volume>,
        shards: u32,
        wake: impl Fn() + Send + Sync + Clone + 'static,
    ) -> Result<Server, StorageError> {
        let shape = StorageConfig::new(shards);
        let opened = NodeStorage::open_on(volume, &shape, wake.clone())?;
        let (mut node, storages, image) = opened;
        let (front, minds) = Destination::new(id, config, image);
        let workers = minds.into_iter().zip(storages);
        let mut workers = workers.map(|(shard, storage)| Worker { shard, storage });
        let shards = match (workers.next(), workers.len()) {
            (Some(only), 0) => Shards::Inline(Box::new(only)),
            (first, _) => {
                let news = Arc::new(AtomicBool::new(false));
                let all = first.into_iter().chain(workers).enumerate();
                let start =
                    |(number, worker)| Lane::start(number, worker, (news.clone(), wake.clone()));
                Shards::Threads(all.map(start).collect::<Result<_, _>>()?, news)
            }
        };
        node.begin_at(front.step());
        Ok(Server {
            durable: front.step(),
            front,
            shards,
            node,
            has_room: true,
            checkpointing: false,
        })
    }

    /// The mind's front.
    pub(crate) fn front(&self) -> &Destination {
        &self.front
    }

    /// The mind's front, to be given input. Follow up with [`Server::pass`].
    pub(crate) fn front_mut(&mut self) -> &mut Destination {
        &mut self.front
    }

    /// Hands the front what shards and storage have done since the last call.
    pub(crate) fn settle(&mut self, now: Time) {
        let mut crowded = false;
        if let Shards::Threads(lanes, news) = &mut self.shards {
            // Cleared first: what is sent from now on wakes again.
            news.store(false, Ordering::SeqCst);
            for (number, lane) in (0..).zip(lanes) {
                while let Some(reply) = lane.receive() {
                    tell(&mut self.front, now, number, reply);
                }
                crowded |= !lane.backlog.is_empty();
            }
        }
        let durable = self.node.durable();
        self.node.set_needed(self.front.space_needed());
        self.node.ask_disk();
        self.front.handle_space(Space {
            is_crowded: crowded,
            ..self.node.space()
        });
        let has_room = self.front.has_room();
        if durable > self.durable || has_room != self.has_room {
            (self.durable, self.has_room) = (durable, has_room);
            self.front.handle_durable(now, durable);
        }
    }

    /// Ends a round: carries the front's orders to its shards, and begins a checkpoint when due.
    pub(crate) fn pass(&mut self, now: Time) {
        let freeze = self.node.begin_checkpoint(|| self.front.image());
        // After a checkpoint every shard gives back what it covers, orders or not; and without room
        // it looks whether there is some again, because no work comes that would make it look.
        let tidy = std::mem::replace(&mut self.checkpointing, self.node.is_checkpointing());
        let tidy = freeze || (tidy && !self.checkpointing) || !self.has_room;
        match &mut self.shards {
            Shards::Inline(worker) => {
                let mut freeze = freeze;
                let mut tidy = tidy;
                loop {
                    let front = &mut self.front;
                    let orders: Vec<Order> = std::iter::from_fn(|| front.poll_order(0)).collect();
                    if orders.is_empty() && !tidy {
                        return;
                    }
                    let pin = self.node.pin(front.step());
                    let reply = worker.work(Batch {
                        orders,
                        freeze,
                        pin,
                    });
                    (freeze, tidy) = (false, false);
                    tell(front, now, 0, reply);
                }
            }
            Shards::Threads(lanes, _) => {
                let mut pin = None;
                for (number, lane) in (0..).zip(lanes) {
                    let front = &mut self.front;
                    let orders = std::iter::from_fn(|| front.poll_order(number));
                    let orders: Vec<Order> = orders.collect();
                    if !orders.is_empty() || tidy {
                        let step = front.step();
                        let pin = pin.get_or_insert_with(|| self.node.pin(step)).clone();
                        lane.push(Batch {
                            orders,
                            freeze,
                            pin,
                        });
                    }
                }
            }
        }
    }

    /// What broke, if anything. After that nothing may be acknowledged.
    pub(crate) fn failure(&self) -> Option<String> {
        let failure = self.node.failure();
        failure.or_else(|| match &self.shards {
            Shards::Threads(lanes, _) if lanes.iter().any(|l| l.thread.is_finished()) => {
                Some("a shard's thread ended".to_owned())
            }
            _ => None,
        })
    }

    /// Why new work is refused, in words, if it is.
    pub(crate) fn full(&self) -> Option<String> {
        let words = || "a shard has more to do than it can keep up with".to_owned();
        (!self.has_room).then(|| self.node.full().unwrap_or_else(words))
    }

    /// Lock requests that wait, in words.
    pub(crate) fn lock_waits(&self) -> Option<String> {
        match &self.shards {
            Shards::Inline(worker) => lock_waits(worker.shard.locks()),
            Shards::Threads(lanes, _) => lanes.iter().find_map(|lane| {
                let waits = lane.waits.lock();
                waits.unwrap_or_else(PoisonError::into_inner).clone()
            }),
        }
    }

    /// The objects of a server with one shard, to be read while nothing runs.
    pub(crate) fn objects(&mut self) -> Option<&mut ShardStorage> {
        match &mut self.shards {
            Shards::Inline(worker) => Some(&mut worker.storage),
            Shards::Threads(..) => None,
        }
    }

    /// Carries out what was ordered, commits it and stops all threads.
    pub(crate) fn close(mut self) {
        self.pass(Time(0));
        match self.shards {
            Shards::Inline(worker) => drop(worker),
            Shards::Threads(lanes, _) => {
                for mut lane in lanes {
                    while !lane.backlog.is_empty() && !lane.thread.is_finished() {
                        if lane.receive().is_none() {
                            std::thread::yield_now();
                        }
                    }
                    drop(lane.orders);
                    // A panic there was reported by the panic hook.
                    let _ = lane.thread.join();
                }
            }
        }
        self.node.close();
    }
}

fn tell(front: &mut Destination, now: Time, number: u32, reply: Reply) {
    for answer in reply.answers {
        front.handle_answer(number, answer);
    }
    front.handle_done(now, number, reply.done);
}

fn lock_waits(locks: &LockServer) -> Option<String> {
    let waiting: Vec<String> = locks
        .waiting()
        .take(4)
        .map(|(home, space, holder, mode, lo, hi)| {
            format!("{holder} waits for {mode:?} {home} {space:x}:{lo:x}-{hi:x}")
        })
        .collect();
    (!waiting.is_empty()).then(|| waiting.join(", "))
}
