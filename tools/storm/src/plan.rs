//! What a seed stands for: topology, workload and faults, as plain data that the minimiser may
//! thin out.

mod small_disk;

pub use small_disk::SmallDisk;

use lowtide_engine_core::member::Intervals;

use crate::rng::Rng;

/// Index of a node in the plan: 0 is the root, then the aggregator if any, destinations, proxies,
/// clients.
pub type Index = usize;

/// A fault and when it strikes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The process dies; it starts again after `down` ticks, or never. `told`: the supervisor says
    /// so to the root.
    Crash {
        /// Who.
        node: Index,
        /// Ticks until it starts again.
        down: Option<u64>,
        /// Whether the root is told at once.
        told: bool,
    },
    /// The node processes nothing for so many ticks.
    Pause {
        /// Who.
        node: Index,
        /// For how long.
        ticks: u64,
    },
    /// The connection breaks.
    Break {
        /// One side.
        a: Index,
        /// The other.
        b: Index,
    },
    /// Messages from `from` to `to` are held back; the connection may break.
    Cut {
        /// Sender.
        from: Index,
        /// Receiver.
        to: Index,
        /// For how long.
        ticks: u64,
        /// Whether the transport gives the connection up.
        breaks: bool,
    },
    /// Nothing reaches or leaves the node.
    Isolate {
        /// Who.
        node: Index,
        /// For how long.
        ticks: u64,
        /// Whether the transport gives the connections up.
        breaks: bool,
    },
    /// Syncs take ten times as long.
    Slow {
        /// A destination or the root.
        node: Index,
        /// For how long.
        ticks: u64,
    },
    /// The destination has no room for new work.
    Full {
        /// A destination.
        node: Index,
        /// For how long.
        ticks: u64,
    },
    /// The client leaves on purpose.
    Part {
        /// A client.
        node: Index,
    },
    /// The root stops, a successor takes its place, and then it goes on.
    TwoRoots {
        /// Ticks until the successor starts.
        down: u64,
        /// Ticks from then on until the old root goes on.
        asleep: u64,
        /// For how long it does.
        ticks: u64,
    },
    /// Somebody copies a destination's disk.
    Copy {
        /// A destination.
        node: Index,
    },
    /// The process of a destination dies and starts on another disk, again and again until the root
    /// refuses it; then it gets its own back. Does not happen while the root would not know better.
    Swap {
        /// A destination.
        node: Index,
        /// Onto the copy that was made, if there is one; else onto an empty disk.
        copy: bool,
        /// Ticks until it starts, and starts again.
        down: u64,
    },
}

impl Fault {
    /// How long it lasts.
    #[must_use]
    pub fn ticks(&self) -> u64 {
        match self {
            Fault::Crash { down, .. } => down.unwrap_or_default(),
            Fault::Pause { ticks, .. }
            | Fault::Cut { ticks, .. }
            | Fault::Isolate { ticks, .. }
            | Fault::Slow { ticks, .. }
            | Fault::Full { ticks, .. } => *ticks,
            Fault::TwoRoots {
                down,
                asleep,
                ticks,
            } => down + asleep + ticks,
            Fault::Swap { down, .. } => 2 * down,
            Fault::Break { .. } | Fault::Part { .. } | Fault::Copy { .. } => 0,
        }
    }
}

/// A client of the plan.
#[derive(Clone, Debug)]
pub struct ClientPlan {
    /// Homes reached through proxies: (destination, proxy) numbers.
    pub via: Vec<(usize, usize)>,
    /// Operations that each of its lives tries.
    pub ops: u64,
    /// Whether its pings go through the aggregator.
    pub aggregated: bool,
}

/// Shares of the kinds of work, in no particular unit.
#[derive(Clone, Copy, Debug)]
pub struct Mix {
    /// Appending to lists, read first.
    pub append: u64,
    /// Writing registers without reading.
    pub blind: u64,
    /// Adding to counters.
    pub add: u64,
    /// Deleting registers.
    pub delete: u64,
    /// Conditional creation of registers.
    pub create: u64,
    /// Reading.
    pub read: u64,
    /// Scanning.
    pub scan: u64,
}

/// A whole run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The seed.
    pub seed: u64,
    /// Whether it is one of the short ones.
    pub is_short: bool,
    /// Destinations.
    pub destinations: usize,
    /// Proxies.
    pub proxies: usize,
    /// Whether there is an aggregator.
    pub aggregator: bool,
    /// Clients.
    pub clients: Vec<ClientPlan>,
    /// Operations that each proxy's life originates, and whether parts go through the others.
    pub originate: (u64, bool),
    /// Faults by time.
    pub faults: Vec<(u64, Fault)>,
    /// No fault starts and all faults end after this time.
    pub horizon: u64,
    /// Longest delay of a message.
    pub delay_max: u64,
    /// Longest sync.
    pub sync_max: u64,
    /// Ticks between pings.
    pub ping_interval: u64,
    /// Ticks of silence that evict.
    pub evict_after: u64,
    /// Ticks until a dead proxy is bypassed.
    pub bypass_after: u64,
    /// Ticks between merges of a proxy.
    pub merge_interval: u64,
    /// Longest pause between two operations of a client.
    pub think_max: u64,
    /// Tasks a client has under way at one time.
    pub depth: u64,
    /// Slots per space: few make keys hot.
    pub slots: u64,
    /// Percent of operations with wide locks.
    pub wide: u64,
    /// Percent of operations that involve several homes.
    pub multi: u64,
    /// Bytes of redo at a client before early discards.
    pub redo_bytes: usize,
    /// Bytes of windows at a proxy before early discards.
    pub window_bytes: usize,
    /// Bytes of other participants' updates in a record.
    pub carry_bytes: usize,
    /// Percent of values that are bulk.
    pub bulk: u64,
    /// Shards of a destination in its first life, its second, and so on, again from the front.
    pub shards: Vec<u32>,
    /// Longest delay between a front and a shard.
    pub shard_delay: u64,
    /// Work.
    pub mix: Mix,
    /// A small disk under every home; without bounds if `None`.
    pub small_disk: Option<SmallDisk>,
}

impl Plan {
    /// Number of nodes.
    #[must_use]
    pub fn nodes(&self) -> usize {
        self.first_client() + self.clients.len()
    }

    /// Shards of a destination in its life number `boot`, counted from 1.
    #[must_use]
    pub fn shards_at(&self, boot: u64) -> u32 {
        let place = boot.saturating_sub(1) % self.shards.len() as u64;
        self.shards[place as usize]
    }

    /// Index of the aggregator.
    #[must_use]
    pub fn aggregator_index(&self) -> Option<Index> {
        self.aggregator.then_some(1)
    }

    /// Index of the first destination.
    #[must_use]
    pub fn first_destination(&self) -> Index {
        1 + usize::from(self.aggregator)
    }

    /// Index of the first proxy.
    #[must_use]
    pub fn first_proxy(&self) -> Index {
        self.first_destination() + self.destinations
    }

    /// Index of the first client.
    #[must_use]
    pub fn first_client(&self) -> Index {
        self.first_proxy() + self.proxies
    }

    /// A quiet plan to build scenarios from: two destinations, no proxy, no client, no fault.
    #[must_use]
    pub fn quiet(seed: u64) -> Plan {
        Plan {
            seed,
            is_short: true,
            destinations: 2,
            proxies: 0,
            aggregator: false,
            clients: Vec::new(),
            originate: (0, false),
            faults: Vec::new(),
            horizon: 0,
            delay_max: 4,
            sync_max: 6,
            ping_interval: 20,
            evict_after: 120,
            bypass_after: 60,
            merge_interval: 15,
            think_max: 10,
            depth: 2,
            slots: 3,
            wide: 0,
            multi: 50,
            redo_bytes: 1 << 20,
            window_bytes: 1 << 20,
            carry_bytes: 64 << 10,
            bulk: 0,
            shards: vec![1],
            shard_delay: 0,
            mix: Mix {
                append: 4,
                blind: 3,
                add: 2,
                delete: 1,
                create: 1,
                read: 1,
                scan: 1,
            },
            small_disk: None,
        }
    }

    /// Ticks between pings; at rest so many that silence of a member at rest is far from eviction.
    #[must_use]
    pub fn pings(&self) -> Intervals {
        Intervals {
            ping: self.ping_interval,
            rest: 3 * self.ping_interval,
        }
    }

    /// Whether epochs of idle nodes are watched at the end; it takes time, so some runs do.
    #[must_use]
    pub fn watches_idle(&self) -> bool {
        self.seed.is_multiple_of(16)
    }

    /// Whether homes are recovered twice at each start (I24); it takes time, so some runs do.
    #[must_use]
    pub fn recovers_twice(&self) -> bool {
        self.seed % 7 == 1
    }

    /// The same plan with every home reached directly.
    #[must_use]
    pub fn direct(mut self) -> Plan {
        self.clients.iter_mut().for_each(|c| c.via.clear());
        self
    }

    /// The plan of a seed. Every second one is short.
    #[must_use]
    pub fn of(seed: u64) -> Plan {
        let mut rng = Rng::branch(seed, 1);
        let is_short = seed.is_multiple_of(2);
        let mut plan = Plan::quiet(seed);
        plan.is_short = is_short;
        plan.destinations = 1 + rng.below(if is_short { 2 } else { 3 }) as usize;
        plan.proxies = if is_short {
            usize::from(rng.chance(40))
        } else {
            rng.below(3) as usize
        };
        plan.aggregator = !is_short && rng.chance(25);
        let clients = if is_short {
            rng.range(1, 2)
        } else {
            rng.range(2, 4)
        };
        let ops_max = if is_short { 4 } else { 25 };
        let style = rng.below(4);
        for number in 0..clients {
            let via = routes(&mut rng, &plan, style, number as usize);
            plan.clients.push(ClientPlan {
                via,
                ops: rng.range(1, ops_max),
                aggregated: rng.chance(60),
            });
        }
        if plan.proxies > 0 && rng.chance(30) {
            plan.originate = (rng.range(1, ops_max / 2 + 1), rng.chance(60));
        }
        plan.horizon = if is_short {
            rng.range(60, 250)
        } else {
            rng.range(400, 2500)
        };
        plan.knobs(&mut rng);
        let faults = if rng.chance(8) {
            0
        } else if is_short {
            rng.range(1, 3)
        } else {
            rng.range(1, 14)
        };
        let mut list: Vec<(u64, Fault)> = Vec::new();
        for _ in 0..faults {
            let (at, fault) = plan.draw_fault(&mut rng);
            // Misfortunes seldom come singly: some strike two nodes, or strike again soon.
            if rng.chance(20) {
                let again = at + rng.below(40);
                let (_, other) = plan.draw_fault(&mut rng);
                list.push((again, other));
            }
            if rng.chance(10) {
                list.push((at + rng.range(5, 60), fault.clone()));
            }
            list.push((at, fault));
        }
        let mut rng = Rng::branch(seed, 4);
        plan.window_bytes = *rng.pick(&[0, 300, 1 << 20, 1 << 20]);
        plan.draw_bypass(&mut list);
        plan.draw_shards(&mut Rng::branch(seed, 7));
        plan.draw_orphan(&mut list);
        plan.draw_disk(&mut Rng::branch(seed, 10));
        plan.draw_roots(&mut list, &mut Rng::branch(seed, 11));
        plan.draw_swap(&mut list);
        list.sort_by_key(|(at, _)| *at);
        plan.faults = list;
        plan
    }

    /// From a branch of its own: with one shard a plan runs as it did before there were more.
    fn draw_shards(&mut self, rng: &mut Rng) {
        if rng.chance(40) {
            return;
        }
        if rng.chance(10) {
            self.bulk = 30;
        }
        self.shard_delay = *rng.pick(&[0, 2, 8, 20]);
        let lives = if rng.chance(70) { 3 } else { 1 };
        self.shards = (0..lives).map(|_| rng.range(1, 3) as u32).collect();
    }

    /// A proxy that the root cannot hear is evicted and bypassed, while a home that does not hear
    /// the root still takes what the proxy brings: parts arrive over both paths.
    fn draw_bypass(&mut self, list: &mut Vec<(u64, Fault)>) {
        let mut rng = Rng::branch(self.seed, 3);
        if self.is_short || self.proxies == 0 || !rng.chance(6) {
            return;
        }
        let proxy = self.first_proxy() + rng.below(self.proxies as u64) as usize;
        let home = self.first_destination() + rng.below(self.destinations as u64) as usize;
        let at = rng.range(5, self.horizon / 2);
        let ticks = self.evict_after + self.bypass_after + rng.range(50, 800);
        self.bypass_after = rng.range(1, 20);
        for (from, to) in [(proxy, 0), (0, home)] {
            let breaks = false;
            let cut = Fault::Cut {
                from,
                to,
                ticks,
                breaks,
            };
            list.push((at, cut));
        }
    }

    /// A client dies while one home cannot hear it, and another home starts again, mostly with other
    /// shards, before what the client left half way is undone there.
    fn draw_orphan(&mut self, list: &mut Vec<(u64, Fault)>) {
        let mut rng = Rng::branch(self.seed, 9);
        if self.shards.len() < 2 || self.destinations < 2 || !rng.chance(30) {
            return;
        }
        let number = rng.below(self.clients.len() as u64) as usize;
        self.clients[number].via.clear();
        let client = self.first_client() + number;
        let deaf = rng.below(self.destinations as u64) as usize;
        let other = (deaf + 1) % self.destinations;
        let [deaf, other] = [deaf, other].map(|number| self.first_destination() + number);
        let at = rng.range(5, self.horizon / 4);
        let cut = Fault::Cut {
            from: client,
            to: deaf,
            ticks: rng.range(150, 500),
            breaks: false,
        };
        let restart = Fault::Crash {
            node: other,
            down: Some(rng.range(1, 20)),
            told: false,
        };
        let death = Fault::Crash {
            node: client,
            down: None,
            told: true,
        };
        let restarted = at + rng.range(20, 100);
        list.extend([(at, cut), (restarted, restart)]);
        list.push((restarted + rng.below(20), death));
    }

    /// An old root goes on long enough to take everybody for silent.
    fn draw_roots(&self, list: &mut Vec<(u64, Fault)>, rng: &mut Rng) {
        if !rng.chance(3) {
            return;
        }
        let fault = Fault::TwoRoots {
            down: rng.range(1, 20),
            asleep: rng.range(1, 100),
            ticks: self.evict_after * 2 + rng.below(200),
        };
        list.push((rng.range(5, self.horizon), fault));
    }

    /// A home comes back on an empty disk, or on a copy of its own from before.
    fn draw_swap(&self, list: &mut Vec<(u64, Fault)>) {
        let mut rng = Rng::branch(self.seed, 12);
        if !rng.chance(10) {
            return;
        }
        let node = self.first_destination() + rng.below(self.destinations as u64) as usize;
        let copied = rng.range(1, self.horizon / 2);
        let swapped = copied + rng.range(1, self.horizon / 2);
        let swap = Fault::Swap {
            node,
            copy: rng.chance(60),
            down: rng.range(1, 60),
        };
        list.extend([(copied, Fault::Copy { node }), (swapped, swap)]);
    }

    fn knobs(&mut self, rng: &mut Rng) {
        self.delay_max = *rng.pick(&[2, 4, 8, 20]);
        self.sync_max = *rng.pick(&[2, 6, 20, 60]);
        self.ping_interval = *rng.pick(&[10, 20, 40]);
        self.evict_after = self.ping_interval * rng.range(6, 10) + 4 * self.delay_max;
        self.bypass_after = rng.range(5, 120);
        self.merge_interval = *rng.pick(&[2, 15, 50, 200]);
        self.think_max = *rng.pick(&[1, 10, 40]);
        self.depth = rng.range(1, 5);
        self.slots = rng.range(1, 5);
        self.wide = *rng.pick(&[0, 10, 40]);
        self.multi = *rng.pick(&[20, 50, 90]);
        self.redo_bytes = if rng.chance(15) { 300 } else { 1 << 20 };
        self.carry_bytes = if rng.chance(10) { 0 } else { 64 << 10 };
        self.bulk = if rng.chance(2) { 10 } else { 0 };
        let mut share = || *rng.pick(&[0, 1, 3, 6]);
        self.mix = Mix {
            append: 1 + share(),
            blind: share(),
            add: share(),
            delete: share(),
            create: share(),
            read: share(),
            scan: share(),
        };
    }

    fn draw_fault(&self, rng: &mut Rng) -> (u64, Fault) {
        let at = rng.range(5, self.horizon);
        let count = self.nodes() as u64;
        let any = |rng: &mut Rng| rng.below(count) as usize;
        let node = any(rng);
        let persistent = |rng: &mut Rng| {
            if rng.chance(20) {
                0
            } else {
                self.first_destination() + rng.below(self.destinations as u64) as usize
            }
        };
        let ticks = match rng.below(3) {
            0 => rng.range(1, 20),
            1 => rng.range(20, 150),
            _ => rng.range(100, 500),
        };
        let fault = match rng.below(100) {
            0..40 => {
                let volatile = node >= self.first_proxy();
                let down = Some(ticks).filter(|_| !volatile || rng.chance(65));
                Fault::Crash {
                    node,
                    down,
                    told: rng.chance(40),
                }
            }
            40..50 => Fault::Pause { node, ticks },
            50..65 => Fault::Break {
                a: node,
                b: any(rng),
            },
            65..75 => Fault::Cut {
                from: node,
                to: any(rng),
                ticks,
                breaks: rng.chance(50),
            },
            75..83 => Fault::Isolate {
                node,
                ticks,
                breaks: rng.chance(50),
            },
            83..91 => Fault::Slow {
                node: persistent(rng),
                ticks,
            },
            91..96 => Fault::Full {
                node: self.first_destination() + rng.below(self.destinations as u64) as usize,
                ticks,
            },
            _ => Fault::Part {
                node: self.first_client() + rng.below(self.clients.len() as u64) as usize,
            },
        };
        (at, fault)
    }
}

/// How a client reaches the homes.
fn routes(rng: &mut Rng, plan: &Plan, style: u64, number: usize) -> Vec<(usize, usize)> {
    let homes = 0..plan.destinations;
    if plan.proxies == 0 {
        return Vec::new();
    }
    match style {
        // Everybody directly, but for one.
        0 if number > 0 => Vec::new(),
        // One proxy for all homes; different clients may use different proxies.
        0 | 1 => homes.map(|home| (home, number % plan.proxies)).collect(),
        // Seed 000: D0 through S0 and D1 through S1.
        2 => homes.map(|home| (home, home % plan.proxies)).collect(),
        // Anything.
        _ => homes
            .filter_map(|home| {
                let proxy = rng.below(plan.proxies as u64) as usize;
                rng.chance(60).then_some((home, proxy))
            })
            .collect(),
    }
}
