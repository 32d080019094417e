//! Scripts: a cluster under the hand of a test instead of a plan's faults.
//!
//! A test says what clients ask for and what befalls whom, waits for situations event by event, and
//! looks at what stands where. All invariants of the oracle are checked all the while, and
//! [`Scenario::finish`] heals everything and demands convergence.
//!
//! Deliberately absent: chance in what a crash keeps. [`Scenario::crash`] loses every record that
//! is not durable.

use std::collections::BTreeMap;

use lowtide_engine_core::client::Client;
use lowtide_engine_core::destination::{Destination, Stage};
use lowtide_engine_core::identity::JoinRefusal;
use lowtide_engine_core::ids::{Epoch, Life, NodeId, OpId, Term, ViewId};
use lowtide_engine_core::message::{Envelope, Message, Waits};
use lowtide_engine_core::op::{
    Bytes, Change, Check, Expect, Key, Mode, Request, Stamp, Update, Want,
};
use lowtide_engine_core::proxy::{Originate, Proxy};
use lowtide_engine_core::root::Root;
use lowtide_engine_core::session::{SessionError, Ticket};

use crate::app::REGISTERS;
use crate::disk::Disk;
use crate::fate::Losses;
use crate::net::pair;
use crate::oracle::{Oracle, Place};
use crate::plan::{ClientPlan, Index, Plan};
use crate::world::{Core, Event, Report, World};

/// Ticks within which anything that a script waits for must happen.
const PATIENCE: u64 = 20_000;
/// Tickets of scripts are numbered from here; those of the plan's own application lie below.
pub(crate) const TICKETS: u64 = 1 << 40;

/// What became of a request of a script.
pub type Outcome = Result<Stamp, SessionError>;

/// A cluster under a script. See the module's head.
#[derive(Debug)]
pub struct Scenario {
    world: World,
    next_ticket: u64,
}

/// A plan of two homes and two proxies as in seed 000: D0 is reached through S0 and D1 through S1.
/// No work and no fault of its own.
#[must_use]
pub fn two_by_two(clients: usize) -> Plan {
    let client = ClientPlan {
        via: vec![(0, 0), (1, 1)],
        ops: 0,
        aggregated: false,
    };
    Plan {
        proxies: 2,
        clients: vec![client; clients],
        ..Plan::quiet(1)
    }
}

/// Key of a register.
#[must_use]
pub fn register(slot: u64) -> Key {
    Key::at(REGISTERS, slot)
}

/// A value that names itself.
#[must_use]
pub fn value(tag: u64) -> Bytes {
    Bytes::from(tag.to_le_bytes())
}

impl Scenario {
    /// The cluster of a plan, all nodes up and joined, every home serving.
    #[must_use]
    pub fn new(plan: Plan) -> Scenario {
        let mut scenario = Scenario::starting(plan);
        scenario.until("every node joined", |s| s.is_settled());
        // Sessions are opened.
        scenario.run(150);
        scenario
    }

    /// The cluster of a plan before its first event.
    #[must_use]
    pub fn starting(plan: Plan) -> Scenario {
        let mut world = World::new(plan, true);
        world.losses = Losses::All;
        Scenario {
            world,
            next_ticket: TICKETS,
        }
    }

    fn is_settled(&self) -> bool {
        self.world.nodes.iter().all(|n| match &n.core {
            Core::Down => false,
            Core::Destination(d) => d.stage().0 == Stage::Serving && n.life.incarnation.0 > 0,
            _ => n.life.incarnation.0 > 0,
        })
    }

    /// Index of a home of the plan.
    #[must_use]
    pub fn d(&self, number: usize) -> Index {
        self.world.plan.first_destination() + number
    }

    /// Index of a proxy of the plan.
    #[must_use]
    pub fn s(&self, number: usize) -> Index {
        self.world.plan.first_proxy() + number
    }

    /// Index of a client of the plan.
    #[must_use]
    pub fn c(&self, number: usize) -> Index {
        self.world.plan.first_client() + number
    }

    /// Identity of a node.
    #[must_use]
    pub fn id(&self, node: Index) -> NodeId {
        self.world.nodes[node].id
    }

    /// Newest life of a node.
    #[must_use]
    pub fn life(&self, node: Index) -> Life {
        self.world.nodes[node].life
    }

    /// Virtual time.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.world.now
    }

    /// The oracle's view.
    #[must_use]
    pub fn oracle(&self) -> &Oracle {
        &self.world.oracle
    }

    /// Lets time pass.
    pub fn run(&mut self, ticks: u64) {
        let until = self.world.now + ticks;
        self.world.run_until(until);
        self.check();
    }

    /// Goes on, event by event, until a situation is reached.
    ///
    /// # Panics
    /// When it is not reached in good time, or an invariant breaks.
    #[track_caller]
    pub fn until(&mut self, what: &str, reached: impl Fn(&Scenario) -> bool) {
        let deadline = self.world.now + PATIENCE;
        while !reached(self) {
            let stepped = self.world.step(deadline);
            self.check();
            assert!(stepped, "not reached: {what}\n{}", self.trace());
        }
    }

    #[track_caller]
    fn check(&self) {
        if let Some(what) = self.world.oracle.failure() {
            panic!("{what}\n{}", self.trace());
        }
    }

    fn trace(&self) -> String {
        let lines: Vec<String> = self.world.trace_end(60);
        lines.join("\n")
    }

    fn ticket(&mut self) -> Ticket {
        self.next_ticket += 1;
        Ticket(self.next_ticket)
    }

    /// Asks a client for an operation.
    pub fn submit(&mut self, client: Index, request: Request) -> Ticket {
        let ticket = self.ticket();
        let now = self.world.time();
        if let Core::Client(c) = &mut self.world.nodes[client].core {
            c.submit(now, ticket, request);
        }
        self.world.after(client);
        self.check();
        ticket
    }

    /// Asks a client to put registers: (home number, slot, tag).
    pub fn put(&mut self, client: Index, writes: &[(usize, u64, u64)]) -> Ticket {
        let request = self.request(writes, None);
        self.submit(client, request)
    }

    /// Asks a client to create registers that must not exist: (home number, slot, tag).
    pub fn create(&mut self, client: Index, writes: &[(usize, u64, u64)]) -> Ticket {
        let request = self.request(writes, Some(Expect::Absent));
        self.submit(client, request)
    }

    /// The request to put registers under exclusive locks, all checked for the same thing.
    #[must_use]
    pub fn request(&self, writes: &[(usize, u64, u64)], expect: Option<Expect>) -> Request {
        let mut request = Request::default();
        for &(number, slot, tag) in writes {
            let (home, key) = (self.id(self.d(number)), register(slot));
            request.locks.push(Want {
                home,
                range: key.range(),
                mode: Mode::Exclusive,
            });
            if let Some(expect) = expect.clone() {
                let key = key.clone();
                request.checks.push(Check { home, key, expect });
            }
            let change = Change::Put(value(tag));
            request.updates.push(Update { home, key, change });
        }
        request
    }

    /// Asks a client for an operation that needs no lock: it adds 1 to a counter at a home.
    pub fn count(&mut self, client: Index, number: usize, slot: u64) -> Ticket {
        let update = Update {
            home: self.id(self.d(number)),
            key: Key::at(crate::app::COUNTERS, slot),
            change: Change::Add(Bytes::from(1i64.to_le_bytes())),
        };
        let updates = vec![update];
        self.submit(
            client,
            Request {
                updates,
                ..Request::default()
            },
        )
    }

    /// Asks a client to read a register.
    pub fn read(&mut self, client: Index, number: usize, slot: u64) -> Ticket {
        let ticket = self.ticket();
        let (now, home) = (self.world.time(), self.id(self.d(number)));
        if let Core::Client(c) = &mut self.world.nodes[client].core {
            c.read(now, ticket, home, register(slot));
        }
        self.world.after(client);
        ticket
    }

    /// Asks a proxy to originate an operation (pin-then-max).
    pub fn originate(&mut self, proxy: Index, writes: &[(usize, u64, u64)]) -> Ticket {
        let ticket = self.ticket();
        let Request { locks, updates, .. } = self.request(writes, None);
        let asked = Originate {
            ticket,
            locks,
            updates,
        };
        let now = self.world.time();
        if let Core::Proxy(p) = &mut self.world.nodes[proxy].core {
            p.originate(now, asked);
        }
        self.world.after(proxy);
        self.check();
        ticket
    }

    /// What became of a request, once it is known.
    #[must_use]
    pub fn outcome(&self, ticket: Ticket) -> Option<&Outcome> {
        self.world.outcomes.get(&ticket)
    }

    /// What a read found, once it is known.
    #[must_use]
    pub fn found(&self, ticket: Ticket) -> Option<&Option<Bytes>> {
        self.world.found.get(&ticket)
    }

    /// Waits for the outcome of a request.
    ///
    /// # Panics
    /// When there is none in good time.
    #[track_caller]
    pub fn wait(&mut self, ticket: Ticket) -> Outcome {
        self.until("the outcome", |s| s.outcome(ticket).is_some());
        self.outcome(ticket).expect("just seen").clone()
    }

    /// Waits for an operation to be stamped, and names it.
    ///
    /// # Panics
    /// When it is refused, or nothing becomes of it in good time.
    #[track_caller]
    pub fn stamped(&mut self, ticket: Ticket) -> OpId {
        self.wait(ticket).expect("not refused").id
    }

    /// Where an operation stands at a home.
    #[must_use]
    pub fn place(&self, id: OpId, number: usize) -> Place {
        self.world.oracle.place(id, self.id(self.d(number)))
    }

    /// Whether an operation's record is durable at a home.
    #[must_use]
    pub fn is_committed(&self, id: OpId, number: usize) -> bool {
        self.world.oracle.is_committed(id, self.id(self.d(number)))
    }

    /// Newest executed value of a register.
    pub fn stored(&mut self, number: usize, slot: u64) -> Option<Bytes> {
        let node = self.d(number);
        let disk = &mut self.world.nodes[node].disk;
        let stored = disk.objects.get(&register(slot))?;
        disk.fetch(&stored.value)
    }

    /// The client at a node.
    ///
    /// # Panics
    /// When none runs there.
    #[must_use]
    pub fn client(&self, node: Index) -> &Client {
        match &self.world.nodes[node].core {
            Core::Client(c) => c,
            other => panic!("no client but {other:?}"),
        }
    }

    /// The proxy at a node.
    ///
    /// # Panics
    /// When none runs there.
    #[must_use]
    pub fn proxy(&self, node: Index) -> &Proxy {
        match &self.world.nodes[node].core {
            Core::Proxy(p) => p,
            other => panic!("no proxy but {other:?}"),
        }
    }

    /// The home at a node.
    ///
    /// # Panics
    /// When none runs there.
    #[must_use]
    pub fn home(&self, node: Index) -> &Destination {
        match &self.world.nodes[node].core {
            Core::Destination(d) => d,
            other => panic!("no home but {other:?}"),
        }
    }

    /// The root.
    ///
    /// # Panics
    /// When none runs.
    #[must_use]
    pub fn root(&self) -> &Root {
        match &self.world.nodes[0].core {
            Core::Root(r) => r,
            other => panic!("no root but {other:?}"),
        }
    }

    /// Whether a node runs.
    #[must_use]
    pub fn is_up(&self, node: Index) -> bool {
        !matches!(self.world.nodes[node].core, Core::Down)
    }

    /// Stage of a life's eviction.
    #[must_use]
    pub fn stage(&self, victim: Life) -> Option<&'static str> {
        if !self.is_up(0) {
            return None;
        }
        let mut under_way = self.root().evictions();
        under_way.find(|(life, _)| *life == victim).map(|(_, s)| s)
    }

    /// Ticks since the root heard of a life; `None` if it is not counted.
    #[must_use]
    pub fn silence(&self, life: Life) -> Option<u64> {
        self.root().silence(self.world.time(), life)
    }

    /// m as the root has made durable.
    #[must_use]
    pub fn minimum(&self) -> Epoch {
        self.world.oracle.minimum_durable()
    }

    /// The process dies and stays down until [`Scenario::start`]; a home loses every record that
    /// is not durable.
    pub fn crash(&mut self, node: Index) {
        self.world.crash(node);
        self.world.nodes[node].returns = false;
        self.check();
    }

    /// The process dies and the supervisor tells the root.
    pub fn kill(&mut self, node: Index) {
        self.crash(node);
        self.declare_dead(node);
    }

    /// The supervisor tells the root that a node's process is gone.
    pub fn declare_dead(&mut self, node: Index) {
        let (id, now) = (self.id(node), self.world.time());
        if let Core::Root(root) = &mut self.world.nodes[0].core {
            root.declare_dead(now, id);
        }
        self.world.after(0);
        self.check();
    }

    /// The root stops and its successor takes its place at once; after `asleep` ticks the old one
    /// goes on, for `ticks`, without hearing anybody. What it says arrives at whoever has heard the
    /// successor.
    pub fn replace_root(&mut self, asleep: u64, ticks: u64) {
        self.world.replace_root((1, asleep, ticks));
    }

    /// Kinds of messages that the old root has said to somebody.
    #[must_use]
    pub fn old_root_said(&self) -> Vec<&'static str> {
        self.world.old_root_said.iter().copied().collect()
    }

    /// The old root hears a ping of a node; returns whether it leaves.
    ///
    /// # Panics
    /// When the node is down.
    pub fn old_root_hears(&mut self, node: Index) -> bool {
        let port = self.world.nodes[node].core.port().expect("it is up");
        let envelope = Envelope {
            from: port.life(),
            epoch: port.epoch(),
            minimum: port.minimum(),
            term: port.term(),
            body: Message::Ping {
                attach: 0,
                lower_bound: port.epoch(),
                view: ViewId(0),
                waits: Waits::No,
                commit: None,
            },
        };
        self.world.old_root_hears(envelope)
    }

    /// Messages of old roots that a node has refused.
    #[must_use]
    pub fn outdated(&self, node: Index) -> u64 {
        let port = self.world.nodes[node].core.port();
        port.map_or(0, |port| port.outdated())
    }

    /// Term of the newest root that a node has heard.
    #[must_use]
    pub fn term(&self, node: Index) -> Term {
        let port = self.world.nodes[node].core.port();
        port.map_or(Term(0), |port| port.term())
    }

    /// Starts a node's process.
    pub fn start(&mut self, node: Index) {
        self.world.nodes[node].returns = true;
        self.world.start(node);
        self.check();
    }

    /// What somebody has who copies a home's disk now.
    #[must_use]
    pub fn copy(&self, node: Index) -> Disk {
        self.world.nodes[node].disk.copy()
    }

    /// A home's process dies; what starts next finds another disk: this one, or an empty one.
    pub fn swap(&mut self, node: Index, disk: Option<Disk>) {
        let disk = disk.unwrap_or_else(|| self.world.empty_disk(node));
        self.world.swap(node, disk, None);
        self.world.nodes[node].returns = false;
        self.check();
    }

    /// A home that is down gets its own disk back.
    pub fn restore(&mut self, node: Index) {
        self.world.restore(node);
    }

    /// Why the root did not let a home in, each time.
    #[must_use]
    pub fn rejections(&self, node: Index) -> Vec<JoinRefusal> {
        let all = self.world.rejections.iter();
        all.filter(|(n, _)| *n == node)
            .map(|(_, why)| *why)
            .collect()
    }

    /// The disk that a home runs on.
    #[must_use]
    pub fn disk(&self, node: Index) -> &Disk {
        &self.world.nodes[node].disk
    }

    /// A node that has not started yet starts at this time and not before.
    pub fn start_late(&mut self, node: Index, at: u64) {
        self.world.cancel_start(node);
        self.world.at(at, Event::Start { node });
    }

    /// A client leaves on purpose.
    pub fn part(&mut self, client: Index) {
        if let Core::Client(c) = &mut self.world.nodes[client].core {
            c.part();
        }
        self.world.after(client);
    }

    /// Whether `from` has a connection to `to`, and all that it has sent there has arrived.
    #[must_use]
    pub fn is_connected_and_idle(&self, from: Index, to: Index) -> bool {
        self.world.net.is_delivered(from, to)
    }

    /// Nothing that `from` sends reaches `to` from now on.
    pub fn cut(&mut self, from: Index, to: Index) {
        let (key, side) = pair(to, from);
        self.world.net.link(key).lane[side].blocked_until = u64::MAX / 2;
        self.world.disturb(u64::MAX / 2);
    }

    /// What was held back is delivered.
    pub fn mend(&mut self, from: Index, to: Index) {
        let (key, side) = pair(to, from);
        self.world.unblock(key, side);
        self.world.disturbed_until = self.world.now;
    }

    /// The connection of two nodes breaks and everything in flight on it is lost.
    pub fn sever(&mut self, a: Index, b: Index) {
        let (key, _) = pair(a, b);
        for lane in 0..2 {
            self.world.net.link(key).lane[lane].queue.clear();
        }
        self.world.break_link(key);
    }

    /// A node does nothing for a while.
    pub fn pause(&mut self, node: Index, ticks: u64) {
        let until = self.world.now + ticks;
        self.world.nodes[node].paused_until = until;
        self.world.disturb(until);
    }

    /// A home's syncs take very long from now on.
    pub fn stall_syncs(&mut self, node: Index) {
        self.world.stalled.insert(node);
    }

    /// A home's syncs take their usual time again; one that was stalled ends soon.
    pub fn resume_syncs(&mut self, node: Index) {
        self.world.stalled.remove(&node);
        let (now, boot) = (self.world.now, self.world.nodes[node].boot);
        self.world.at(now + 1, Event::Synced { node, boot });
    }

    /// Heals everything, waits until all has come to rest and makes the last checks.
    ///
    /// # Panics
    /// When an invariant is violated.
    #[track_caller]
    pub fn finish(mut self) -> Report {
        self.converge();
        self.world.into_report()
    }

    /// As [`Scenario::finish`], with the cluster to look at afterwards.
    ///
    /// # Panics
    /// When an invariant is violated.
    #[track_caller]
    pub fn converge(&mut self) {
        self.world.stalled.clear();
        self.world.converge();
        self.check();
    }

    /// Values of all registers at a home, by slot.
    pub fn registers(&mut self, number: usize) -> BTreeMap<u64, u64> {
        let node = self.d(number);
        let disk = &mut self.world.nodes[node].disk;
        let keys: Vec<Key> = disk.objects.keys().cloned().collect();
        let mut all = BTreeMap::new();
        for key in keys.into_iter().filter(|k| k.space == REGISTERS) {
            let bytes = disk.objects.get(&key).and_then(|s| disk.fetch(&s.value));
            if let Some(tag) = bytes.and_then(|b| b[..8].try_into().ok()) {
                all.insert(key.slot, u64::from_le_bytes(tag));
            }
        }
        all
    }
}
