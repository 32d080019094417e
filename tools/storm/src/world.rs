//! The simulated cluster: nodes, events in virtual time, and the loop that runs a plan.
//!
//! One thread. Events are ordered by time and then by the order in which they were scheduled; all
//! chance comes from branches of the plan's seed. A run returns the first violation, the trace
//! hash and the probes.
//!
//! Deliberately absent: real time, threads, sockets, files.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};

use lowtide_engine_core::aggregator::Aggregator;
use lowtide_engine_core::client::Client;
use lowtide_engine_core::destination::Destination;
use lowtide_engine_core::identity::JoinRefusal;
use lowtide_engine_core::ids::{
    Epoch, Incarnation, Life, NodeId, Seq, Step, StorageId, Time, ViewId,
};
use lowtide_engine_core::op::{Bytes, Stamp};
use lowtide_engine_core::proxy::Proxy;
use lowtide_engine_core::root::Root;
use lowtide_engine_core::session::{SessionError, Ticket};

use crate::app::App;
use crate::disk::{Disk, RootDisk};
use crate::fate::{Losses, Swapped};
use crate::net::Net;
use crate::old_root::OldRoot;
use crate::oracle::Oracle;
use crate::plan::{Fault, Index, Plan};
use crate::probe::{Probe, Probes};
use crate::rng::Rng;
use crate::shards::Shards;

/// Events kept for the report of a failure.
const TRACE_KEPT: usize = 20_000;
/// More events than this in one run mean that something spins.
const EVENTS_MAX: u64 = 3_000_000;

/// What runs at a node.
#[derive(Debug)]
pub enum Core {
    /// No process.
    Down,
    /// The root.
    Root(Box<Root>),
    /// A destination.
    Destination(Box<Destination>),
    /// A proxy.
    Proxy(Box<Proxy>),
    /// A client.
    Client(Box<Client>),
    /// The aggregator.
    Aggregator(Box<Aggregator>),
}

/// One node.
#[derive(Debug)]
pub struct Node {
    /// Its identity in the cluster.
    pub id: NodeId,
    /// The process.
    pub core: Core,
    /// Number of the process start.
    pub boot: u64,
    /// Storage of a destination.
    pub disk: Disk,
    /// Shards of a destination.
    pub(crate) shards: Shards,
    /// Storage of the root.
    pub root_disk: RootDisk,
    /// The application of a client.
    pub app: Option<App>,
    /// Nothing is processed before this time.
    pub paused_until: u64,
    /// Syncs are slow until then.
    pub slow_until: u64,
    /// When the timer event under way fires; `u64::MAX` for none.
    pub timer_at: u64,
    /// When the application's wake-up fires.
    pub wake_at: u64,
    /// Log records up to this step were shown to the oracle.
    pub reported: Step,
    /// Highest epoch of this process.
    pub epoch: Epoch,
    /// Newest life.
    pub life: Life,
    /// Newest incarnation that any process of the node has had.
    pub newest: Incarnation,
    /// The view that was compared with the connections last.
    pub compared: ViewId,
    /// Newest acknowledged operation of this life.
    pub acknowledged: Seq,
    /// Comes back when the plan's end heals everything.
    pub returns: bool,
    /// Operations that a proxy still wants to originate, and those under way.
    pub originate: (u64, u64),
}

/// Something that happens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Deliver {
        key: (Index, Index),
        lane: usize,
    },
    Dial {
        key: (Index, Index),
    },
    Timer {
        node: Index,
        boot: u64,
    },
    Wake {
        node: Index,
        boot: u64,
    },
    Synced {
        node: Index,
        boot: u64,
    },
    Persisted {
        node: Index,
        boot: u64,
    },
    Checkpoint {
        node: Index,
        boot: u64,
    },
    Stir {
        node: Index,
        boot: u64,
        shard: usize,
    },
    Answer {
        node: Index,
        boot: u64,
        shard: usize,
    },
    Fault {
        number: usize,
    },
    Start {
        node: Index,
    },
    Unfull {
        node: Index,
    },
    OldRoot,
    BreakLater {
        key: (Index, Index),
    },
}

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Report {
    /// The first violation.
    pub failure: Option<String>,
    /// Hash over everything that was delivered.
    pub hash: u64,
    /// Events processed.
    pub events: u64,
    /// Situations reached.
    pub probes: Probes,
    /// The last events, if asked for.
    pub trace: Vec<String>,
    /// What every node was at the end, if the trace was asked for.
    pub nodes: Vec<String>,
    /// Operations stamped.
    pub operations: u64,
}

/// A cluster under simulation.
#[derive(Debug)]
pub struct World {
    /// What is being run.
    pub plan: Plan,
    /// Virtual time.
    pub now: u64,
    pub(crate) nodes: Vec<Node>,
    pub(crate) net: Net,
    pub(crate) oracle: Oracle,
    pub(crate) probes: Probes,
    pub(crate) rng: Rng,
    /// Delays between fronts and shards, apart from all others.
    pub(crate) shard_rng: Rng,
    heap: BinaryHeap<Reverse<(u64, u64)>>,
    events: BTreeMap<u64, Event>,
    scheduled: u64,
    processed: u64,
    hash: u64,
    trace: Option<VecDeque<String>>,
    pub(crate) is_healed: bool,
    pub(crate) by_id: BTreeMap<NodeId, Index>,
    /// Evictions that the root had under way.
    pub(crate) evicting: BTreeSet<Life>,
    /// Lives whose eviction a root has begun.
    pub(crate) begun: BTreeSet<Life>,
    /// Lives that have told the root that they leave.
    pub(crate) parted: BTreeSet<Life>,
    /// When the last fault ended, the last process began or ended and the last connection broke, or
    /// will have.
    pub(crate) disturbed_until: u64,
    /// Lives of clients and proxies that the root admitted.
    pub(crate) lives: BTreeSet<Life>,
    /// The root's membership that was looked at last.
    pub(crate) seen_view: ViewId,
    /// What a crash keeps of records that are not durable.
    pub(crate) losses: Losses,
    /// Homes whose syncs a script holds up.
    pub(crate) stalled: BTreeSet<Index>,
    /// Outcomes of requests that a script made.
    pub(crate) outcomes: BTreeMap<Ticket, Result<Stamp, SessionError>>,
    /// Values that a script's reads found.
    pub(crate) found: BTreeMap<Ticket, Option<Bytes>>,
    /// Nothing new is begun any more.
    pub(crate) at_rest: bool,
    /// Nothing but pings may be sent, and nothing written.
    pub(crate) is_quiet: bool,
    /// Requests answered and evictions finished.
    pub(crate) progress: u64,
    /// Pins held: (coordinator, peer).
    pub(crate) pins: BTreeSet<(Index, Index)>,
    /// Homes and whom they last refused a lock because room had run out.
    pub(crate) refused: BTreeSet<(Index, NodeId)>,
    /// A root that was replaced and goes on, and the kinds of messages that it said to those who
    /// have heard the other.
    pub(crate) old_root: Option<OldRoot>,
    pub(crate) old_root_said: BTreeSet<&'static str>,
    /// Copies of homes' disks that somebody made.
    pub(crate) copies: BTreeMap<Index, Disk>,
    /// Homes that run on a disk that is not theirs, or an old one. Nothing of that is the oracle's.
    pub(crate) swapped: BTreeMap<Index, Swapped>,
    /// Homes that the root did not let in, and why.
    pub(crate) rejections: Vec<(Index, JoinRefusal)>,
}

impl World {
    /// A cluster in which every node starts within the first ticks.
    #[must_use]
    pub fn new(plan: Plan, traced: bool) -> World {
        let rng = Rng::branch(plan.seed, 2);
        let shard_rng = Rng::branch(plan.seed, 8);
        let mut nodes = Vec::new();
        let mut by_id = BTreeMap::new();
        for index in 0..plan.nodes() {
            let id = NodeId(index as u32 + 1);
            by_id.insert(id, index);
            nodes.push(Node {
                id,
                core: Core::Down,
                boot: 0,
                disk: Disk::of(StorageId(u128::from(id.0)), plan.log_bytes()),
                shards: Shards::default(),
                root_disk: RootDisk::default(),
                app: None,
                paused_until: 0,
                slow_until: 0,
                timer_at: u64::MAX,
                wake_at: u64::MAX,
                reported: Step(0),
                epoch: Epoch(0),
                life: Life::default(),
                newest: Incarnation(0),
                compared: ViewId::default(),
                acknowledged: Seq(0),
                returns: true,
                originate: (0, 0),
            });
        }
        let mut world = World {
            plan,
            now: 0,
            nodes,
            net: Net::default(),
            oracle: Oracle::default(),
            probes: Probes::default(),
            rng,
            shard_rng,
            heap: BinaryHeap::new(),
            events: BTreeMap::new(),
            scheduled: 0,
            processed: 0,
            hash: 0xcbf2_9ce4_8422_2325,
            trace: traced.then(VecDeque::new),
            is_healed: false,
            by_id,
            evicting: BTreeSet::new(),
            begun: BTreeSet::new(),
            parted: BTreeSet::new(),
            disturbed_until: 0,
            lives: BTreeSet::new(),
            seen_view: ViewId(0),
            losses: Losses::Random,
            stalled: BTreeSet::new(),
            outcomes: BTreeMap::new(),
            found: BTreeMap::new(),
            at_rest: false,
            is_quiet: false,
            progress: 0,
            pins: BTreeSet::new(),
            refused: BTreeSet::new(),
            old_root: None,
            old_root_said: BTreeSet::new(),
            copies: BTreeMap::new(),
            swapped: BTreeMap::new(),
            rejections: Vec::new(),
        };
        for node in 0..world.nodes.len() {
            let at = if node == 0 { 0 } else { world.rng.below(6) };
            world.at(at, Event::Start { node });
        }
        for number in 0..world.plan.faults.len() {
            let at = world.plan.faults[number].0;
            world.at(at, Event::Fault { number });
        }
        world
    }

    /// Runs the plan to its end: faults, healing, convergence.
    pub fn drive(&mut self) {
        let horizon = self.plan.horizon;
        self.run_until(horizon);
        self.converge();
        self.count_final_probes();
    }

    /// Heals everything and demands that all comes to rest in the right state.
    pub(crate) fn converge(&mut self) {
        self.heal();
        let patience = 30 * self.plan.evict_after
            + 100 * (self.plan.delay_max + self.plan.sync_max)
            + 100 * self.plan.shard_delay
            + 3000;
        if self.plan.watches_idle() {
            // What pauses and slow syncs put off lies behind.
            let last = self.plan.faults.iter().map(|(at, f)| at + f.ticks()).max();
            let calm = last.unwrap_or_default() + 10 * (1 + self.plan.sync_max);
            self.run_until(calm);
        }
        let mut deadline = self.now + patience;
        let mut progress = self.progress;
        while self.oracle.failure().is_none() && !self.is_converged() {
            // Work that goes on, however slowly, is not stuck.
            if self.progress > progress {
                progress = self.progress;
                deadline = self.now + patience;
            }
            if self.now > deadline || self.processed > EVENTS_MAX {
                let text = self.describe_stuck();
                self.oracle.fail(format!("I15: no convergence: {text}"));
                break;
            }
            let next = self.now + 25;
            self.run_until(next);
        }
        if self.oracle.failure().is_none() {
            self.watch_idle_epochs();
        }
        if self.oracle.failure().is_none() {
            self.final_checks();
        }
    }

    /// The last events of the trace.
    pub(crate) fn trace_end(&self, lines: usize) -> Vec<String> {
        let trace = self.trace.iter().flatten();
        let skip = self
            .trace
            .as_ref()
            .map_or(0, |t| t.len().saturating_sub(lines));
        trace.skip(skip).cloned().collect()
    }

    /// A state machine panicked: an assertion of its own failed.
    pub fn panicked(&mut self, text: &str) {
        self.oracle.fail(format!("panic: {text}"));
    }

    /// How it ended.
    #[must_use]
    pub fn into_report(self) -> Report {
        let mut nodes = Vec::new();
        if self.trace.is_some() {
            nodes.extend(self.nodes.iter().map(|n| format!("{:?}", n.core)));
        }
        Report {
            nodes,
            failure: self.oracle.failure().map(str::to_owned),
            hash: self.hash,
            events: self.processed,
            probes: self.probes,
            trace: self.trace.map(Vec::from).unwrap_or_default(),
            operations: self.oracle.tally.stamped,
        }
    }

    /// Processes everything up to and including `until`.
    pub fn run_until(&mut self, until: u64) {
        while self.oracle.failure().is_none() && self.processed <= EVENTS_MAX && self.step(until) {}
        self.now = self.now.max(until);
    }

    /// Processes the next event if it happens up to `until`; returns whether it did.
    pub(crate) fn step(&mut self, until: u64) -> bool {
        let Some(&Reverse((at, number))) = self.heap.peek() else {
            return false;
        };
        if at > until {
            return false;
        }
        self.heap.pop();
        self.now = at;
        self.processed += 1;
        if let Some(event) = self.events.remove(&number) {
            self.handle(event);
        }
        true
    }

    /// The first start of a node does not happen.
    pub(crate) fn cancel_start(&mut self, node: Index) {
        self.events.retain(|_, e| *e != Event::Start { node });
    }

    pub(crate) fn at(&mut self, at: u64, event: Event) {
        self.scheduled += 1;
        self.events.insert(self.scheduled, event);
        self.heap.push(Reverse((at.max(self.now), self.scheduled)));
    }

    pub(crate) fn time(&self) -> Time {
        Time(self.now)
    }

    /// What happens now, or until then, may cost somebody messages.
    pub(crate) fn disturb(&mut self, until: u64) {
        self.disturbed_until = self.disturbed_until.max(until);
    }

    /// Adds to the trace hash, and to the trace if there is one.
    pub(crate) fn note(&mut self, number: u64, text: impl FnOnce() -> String) {
        for word in [self.now, number] {
            self.hash = (self.hash ^ word)
                .wrapping_mul(0x0100_0000_01b3)
                .rotate_left(23);
        }
        let now = self.now;
        if let Some(trace) = &mut self.trace {
            if trace.len() == TRACE_KEPT {
                trace.pop_front();
            }
            let text = text();
            if !text.is_empty() {
                trace.push_back(format!("{now:>6} {text}"));
            }
        }
    }

    fn handle(&mut self, event: Event) {
        let paused = |w: &World, node: Index| w.nodes[node].paused_until.max(w.now);
        match event {
            Event::Deliver { key, lane } => self.deliver(key, lane),
            Event::Dial { key } => self.dial(key),
            Event::Timer { node, boot }
            | Event::Wake { node, boot }
            | Event::Synced { node, boot }
            | Event::Persisted { node, boot }
            | Event::Checkpoint { node, boot }
            | Event::Stir { node, boot, .. }
            | Event::Answer { node, boot, .. } => {
                let until = paused(self, node);
                if self.nodes[node].boot != boot || matches!(self.nodes[node].core, Core::Down) {
                    return;
                }
                if until > self.now {
                    self.at(until, event);
                    return;
                }
                match event {
                    Event::Timer { .. } => self.timer(node),
                    Event::Wake { .. } => self.wake(node),
                    Event::Synced { .. } => self.synced(node),
                    Event::Persisted { .. } => self.persisted(node),
                    Event::Stir { shard, .. } => self.stir(node, shard),
                    Event::Answer { shard, .. } => self.answer(node, shard),
                    _ => self.checkpoint(node),
                }
            }
            Event::Fault { number } => {
                let fault = self.plan.faults[number].1.clone();
                self.strike(&fault);
            }
            Event::Start { node } => self.start(node),
            Event::Unfull { node } => self.nodes[node].disk.full = false,
            Event::OldRoot => self.old_root_goes_on(),
            Event::BreakLater { key } => self.break_link(key),
        }
    }

    pub(crate) fn hit(&mut self, probe: Probe) {
        self.probes.hit(probe);
    }

    /// Faults of the plan, for reports.
    #[must_use]
    pub fn faults(&self) -> &[(u64, Fault)] {
        &self.plan.faults
    }
}
