//! Starts, crashes, faults and healing.

use std::collections::BTreeMap;

use lowtide_engine_core::aggregator::{Aggregator, AggregatorConfig};
use lowtide_engine_core::client::{Client, ClientConfig};
use lowtide_engine_core::destination::{DestinationConfig, Stage};
use lowtide_engine_core::identity::JoinRefusal;
use lowtide_engine_core::ids::{Epoch, Life, NodeId, Seq, Step, StorageId, ViewId};
use lowtide_engine_core::member::Intervals;
use lowtide_engine_core::op::{Bytes, Change, Mode, Update, Want};
use lowtide_engine_core::proxy::{Originate, Proxy, ProxyConfig};
use lowtide_engine_core::root::{Root, RootConfig, RootState};
use lowtide_engine_core::session::Ticket;

use crate::app::{App, REGISTERS};
use crate::disk::Disk;
use crate::net::pair;
use crate::plan::{Fault, Index};
use crate::probe::Probe;
use crate::recovery::{check_restartable, recover};
use crate::rng::Rng;
use crate::shards::Shards;
use crate::world::{Core, Event, World};

/// What a crash keeps of records that are not durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Losses {
    /// Any prefix.
    Random,
    /// None: the power fails.
    All,
}

/// A home that runs on a disk that is not its own.
#[derive(Debug)]
pub(crate) struct Swapped {
    /// Its own.
    pub(crate) own: Disk,
    /// How often it starts again on the wrong one when it was not let in, and after how many ticks;
    /// then it gets its own back. `None` in scripts, which say so themselves.
    pub(crate) again: Option<(u32, u64)>,
}

impl World {
    /// Starts a node's process.
    pub(crate) fn start(&mut self, node: Index) {
        if !matches!(self.nodes[node].core, Core::Down) {
            return;
        }
        let n = &mut self.nodes[node];
        n.boot += 1;
        n.paused_until = 0;
        n.timer_at = u64::MAX;
        n.wake_at = u64::MAX;
        n.acknowledged = Seq(0);
        n.epoch = Epoch(0);
        n.compared = ViewId::default();
        let (id, boot) = (n.id, n.boot);
        n.life = Life {
            node: id,
            ..Life::default()
        };
        self.note(5, || format!("{id} starts, boot {boot}"));
        self.disturb(self.now);
        if self.is_destination(node) {
            self.start_destination(node);
        } else if node == 0 {
            self.start_root();
        } else {
            self.start_volatile(node);
        }
        if node != 0 {
            self.want(node, 0);
            if let Some(parent) = self.plan.aggregator_index() {
                self.want(node, parent);
            }
        }
        for key in self.net.pairs_of(node) {
            self.lay_ghost(key);
            self.settle_link(key);
        }
        self.after(node);
    }

    fn nonce(&self, node: Index) -> u64 {
        ((node as u64) << 32) + self.nodes[node].boot
    }

    fn start_root(&mut self) {
        let config = RootConfig {
            interval: 10,
            evict_after: self.plan.evict_after,
            retry_after: 15 + 2 * self.plan.delay_max,
        };
        let durable = &self.nodes[0].root_disk.durable;
        let state = if durable.is_empty() {
            Ok(RootState::default())
        } else {
            RootState::decode(durable)
        };
        match state {
            Ok(state) => {
                // A crash may have left a newer state than the last one told as durable.
                self.evictions_persisted(&state);
                self.oracle.minimum_persisted(state.minimum());
                let root = Root::new(self.nodes[0].id, config, state, self.time());
                self.nodes[0].core = Core::Root(Box::new(root));
            }
            Err(e) => self
                .oracle
                .fail(format!("the root's durable state does not decode: {e}")),
        }
    }

    fn start_destination(&mut self, node: Index) {
        let config = DestinationConfig {
            root: self.nodes[0].id,
            parent: self.nodes[0].id,
            pings: self.plan.pings(),
            nonce: self.nonce(node),
            carry_bytes: self.plan.carry_bytes,
            room: self.plan.room_rule(),
        };
        let n = &mut self.nodes[node];
        let id = n.id;
        let covered = n.disk.checkpoint.step;
        self.probes
            .hit_if(Probe::RestartFromCheckpoint, covered > Step(0));
        let count = self.plan.shards_at(n.boot);
        let before = self.plan.shards_at(n.boot.saturating_sub(1).max(1));
        self.probes.hit_if(Probe::ShardsChanged, count != before);
        if self.plan.recovers_twice() {
            let mut rng = Rng::branch(self.plan.seed, (n.boot << 32) + id.0 as u64);
            match check_restartable(&n.disk, (id, config), count, &mut rng, |_| ()) {
                Ok(()) => {
                    let has_lived = n.disk.synced > Step(0);
                    self.probes.hit_if(Probe::RecoveredTwice, has_lived);
                }
                Err(text) => return self.oracle.fail(text),
            }
        }
        let (front, shards) = match recover(&mut n.disk, (id, config), count) {
            Ok(recovered) => recovered,
            Err(e) => return self.oracle.fail(format!("{id} cannot be recovered: {e}")),
        };
        n.reported = front.step();
        n.core = Core::Destination(Box::new(front));
        n.shards = Shards::new(shards);
        let boot = n.boot;
        if !self.swapped.contains_key(&node) {
            let disk = &mut self.nodes[node].disk;
            // Crashes strike in the middle of reconnects and of undo, too (I24).
            self.oracle.compare(id, disk, "after a restart");
        }
        let pause = self.rng.range(10, 300);
        self.at(self.now + pause, Event::Checkpoint { node, boot });
    }

    fn start_volatile(&mut self, node: Index) {
        let root = self.nodes[0].id;
        let (id, nonce) = (self.nodes[node].id, self.nonce(node));
        let pings = self.plan.pings();
        let aggregator = self.plan.aggregator_index();
        if Some(node) == aggregator {
            let config = AggregatorConfig {
                root,
                pings: Intervals {
                    ping: pings.ping / 2,
                    rest: pings.rest / 2,
                },
                nonce,
                silent_after: self.plan.evict_after,
            };
            self.nodes[node].core = Core::Aggregator(Box::new(Aggregator::new(id, config)));
            self.probes
                .hit_if(Probe::AggregatorRestarted, self.nodes[node].boot > 1);
            return;
        }
        let parent = aggregator.map_or(root, |a| self.nodes[a].id);
        if self.is_proxy(node) {
            let number = node - self.plan.first_proxy();
            let (ops, shared) = self.plan.originate;
            let config = ProxyConfig {
                root,
                parent,
                pings,
                nonce,
                merge_interval: self.plan.merge_interval,
                window_bytes: self.plan.window_bytes,
                budget: self.plan.room_rule().budget,
                via: if shared {
                    self.peers_of(number)
                } else {
                    BTreeMap::new()
                },
            };
            self.nodes[node].originate = (ops, 0);
            self.nodes[node].core = Core::Proxy(Box::new(Proxy::new(id, config)));
            self.probes
                .hit_if(Probe::ProxyReturnedAsNewLife, self.nodes[node].boot > 1);
            return;
        }
        let plan = self.plan.clients[node - self.plan.first_client()].clone();
        let home = |d: usize| self.nodes[self.plan.first_destination() + d].id;
        let proxy = |p: usize| self.nodes[self.plan.first_proxy() + p].id;
        let config = ClientConfig {
            root,
            parent: if plan.aggregated { parent } else { root },
            pings,
            nonce,
            via: plan.via.iter().map(|&(d, p)| (home(d), proxy(p))).collect(),
            bypass_after: self.plan.bypass_after,
            redo_bytes: self.plan.redo_bytes,
            budget: self.plan.room_rule().budget,
        };
        let homes: Vec<NodeId> = (0..self.plan.destinations).map(home).collect();
        let label = ((node as u64) << 8) + self.nodes[node].boot;
        let app = App::new(&self.plan, homes, plan.ops, label, self.now);
        self.probes
            .hit_if(Probe::ClientReturnedAsNewLife, self.nodes[node].boot > 1);
        let n = &mut self.nodes[node];
        n.app = Some(app);
        n.core = Core::Client(Box::new(Client::new(id, config)));
    }

    /// Seed 000: destination d is merged by proxy d; a proxy hands parts for other homes over.
    fn peers_of(&self, number: usize) -> BTreeMap<NodeId, NodeId> {
        let mut via = BTreeMap::new();
        for d in 0..self.plan.destinations {
            let p = d % self.plan.proxies;
            if p != number {
                let home = self.nodes[self.plan.first_destination() + d].id;
                via.insert(home, self.nodes[self.plan.first_proxy() + p].id);
            }
        }
        via
    }

    /// A proxy's own operations: one register at each of some homes.
    pub(crate) fn feed_proxy(&mut self, node: Index) -> bool {
        let now = self.time();
        let n = &self.nodes[node];
        let Core::Proxy(proxy) = &n.core else {
            return false;
        };
        let idle = n.originate.0 > 0 && n.originate.1 < 2;
        if !idle || self.at_rest || proxy.port().life().incarnation.0 == 0 || !self.rng.chance(10) {
            return false;
        }
        let left = n.originate.0;
        let tag = ((node as u64) << 40) + (n.boot << 20) + left;
        let value = Bytes::from(tag.to_le_bytes());
        let mut asked = Originate {
            ticket: Ticket(left),
            locks: Vec::new(),
            updates: Vec::new(),
        };
        for d in 0..self.plan.destinations {
            if d > 0 && !self.rng.chance(70) {
                continue;
            }
            let home = self.nodes[self.plan.first_destination() + d].id;
            let slot = self.rng.below(self.plan.slots) * 10;
            let key = lowtide_engine_core::op::Key::at(REGISTERS, slot);
            asked.locks.push(Want {
                home,
                range: key.range(),
                mode: Mode::Exclusive,
            });
            let change = Change::Put(value.clone());
            asked.updates.push(Update { home, key, change });
        }
        self.hit(Probe::ProxyOriginated);
        let n = &mut self.nodes[node];
        n.originate.0 -= 1;
        n.originate.1 += 1;
        if let Core::Proxy(proxy) = &mut n.core {
            proxy.originate(now, asked);
        }
        true
    }

    /// Ends a node's process.
    pub(crate) fn crash(&mut self, node: Index) {
        if matches!(self.nodes[node].core, Core::Down) {
            return;
        }
        self.probe_crash(node);
        let life = self.nodes[node].life;
        let locks = self.leaf_locks(node);
        if node >= self.plan.first_proxy() {
            self.oracle.frozen(life, locks);
        }
        let id = self.nodes[node].id;
        self.note(6, || format!("{life} crashes"));
        self.disturb(self.now);
        let executed = match &self.nodes[node].core {
            Core::Destination(front) => self.nodes[node].shards.executed(front),
            _ => Step(0),
        };
        self.nodes[node].shards = Shards::default();
        self.nodes[node].core = Core::Down;
        self.nodes[node].app = None;
        if self.is_destination(node) {
            let disk = &self.nodes[node].disk;
            let ends = disk.records(disk.synced, executed);
            let mut choices: Vec<Step> = ends.iter().map(|(_, r)| r.step).collect();
            choices.dedup();
            choices.insert(0, disk.synced);
            let split = disk.newest(Step(u64::MAX)) > executed;
            self.probes.hit_if(Probe::CrashSplitShards, split);
            let survives = match self.losses {
                Losses::Random => *self.rng.pick(&choices),
                Losses::All => disk.synced,
            };
            self.probes
                .hit_if(Probe::CrashKeptUnsyncedRecords, survives > choices[0]);
            let lost = self.oracle.tally.lost_in_crash;
            self.nodes[node].disk.crash(survives);
            if !self.swapped.contains_key(&node) {
                self.oracle.crashed(id, survives);
            }
            let more = self.oracle.tally.lost_in_crash > lost;
            self.probes.hit_if(Probe::HomeCrashedWithUncommitted, more);
        } else if node == 0 {
            let pending = self.nodes[0].root_disk.pending.len() as u64;
            for _ in 0..self.rng.below(pending + 1) {
                self.nodes[0].root_disk.complete();
            }
            self.nodes[0].root_disk.pending.clear();
        }
        for key in self.net.pairs_of(node) {
            self.bereave(key, usize::from(key.1 == node));
        }
    }

    fn probe_crash(&mut self, node: Index) {
        let down = self
            .nodes
            .iter()
            .filter(|n| matches!(n.core, Core::Down))
            .count();
        self.probes.hit_if(Probe::TwoNodesDownAtOnce, down > 0);
        let coordinator = self.pins.iter().any(|(c, _)| *c == node);
        self.probes
            .hit_if(Probe::CoordinatorDiedInPinRound, coordinator);
        self.pins.retain(|(c, p)| *c != node && *p != node);
        match &self.nodes[node].core {
            Core::Destination(d) => {
                let early = d.stage().0 == Stage::Reconnect;
                self.probes
                    .hit_if(Probe::HomeCrashedWhileReconnecting, early);
            }
            Core::Root(r) => {
                for (_, stage) in r.evictions() {
                    self.probes.hit(match stage {
                        "FENCING" => Probe::RootCrashedWhileFencing,
                        "RESOLVING" => Probe::RootCrashedWhileResolving,
                        "DRAINING" => Probe::RootCrashedWhileDraining,
                        _ => Probe::RootCrashedWhileReleasing,
                    });
                }
            }
            Core::Proxy(p) => {
                let number = node - self.plan.first_proxy();
                let own = p.counters().accepted > 0;
                let mut unmerged = false;
                for (index, client) in self.plan.clients.iter().enumerate() {
                    let n = &self.nodes[self.plan.first_client() + index];
                    for &(d, _) in client.via.iter().filter(|(_, p)| *p == number) {
                        let home = self.nodes[self.plan.first_destination() + d].id;
                        unmerged |= self.oracle.is_unmerged(n.life, n.acknowledged, home);
                    }
                }
                let hit = own && unmerged;
                self.probes
                    .hit_if(Probe::ProxyDiedWithUnmergedAcknowledged, hit);
                let resolving = match &self.nodes[0].core {
                    Core::Root(r) => r
                        .evictions()
                        .any(|(_, s)| s == "RESOLVING" || s == "FENCING"),
                    _ => false,
                };
                self.probes
                    .hit_if(Probe::SupplierProxyDied, resolving && own);
            }
            _ => {}
        }
    }

    /// The core says that its life was evicted: the process leaves and may start anew.
    pub(crate) fn evicted(&mut self, node: Index) {
        self.hit(Probe::ZombieEvicted);
        self.crash(node);
        self.nodes[node].returns = self.rng.chance(70);
        if self.nodes[node].returns {
            let delay = self.rng.range(1, 50);
            self.at(self.now + delay, Event::Start { node });
        }
    }

    /// Whether the root, if it died now, would know that a home on this disk is not right.
    fn would_be_missed(&self, node: Index, disk: &Disk) -> bool {
        let state = RootState::decode(&self.nodes[0].root_disk.durable);
        let known = state.ok().and_then(|s| s.store(self.nodes[node].id));
        known.is_some_and(|known| disk.storage != known.storage || disk.commit() < known.commit)
    }

    /// An empty disk for a home, which is not the one that it has.
    pub(crate) fn empty_disk(&self, node: Index) -> Disk {
        let drawn = (u128::from(self.now) << 32) + node as u128;
        Disk::of(StorageId(drawn), self.plan.log_bytes())
    }

    /// A home's process dies, and what starts next finds another disk.
    pub(crate) fn swap(&mut self, node: Index, wrong: Disk, again: Option<(u32, u64)>) {
        self.crash(node);
        let id = self.nodes[node].id;
        let what = wrong.storage;
        self.note(12, || format!("{id} gets the disk {what}"));
        let own = std::mem::replace(&mut self.nodes[node].disk, wrong);
        self.swapped.insert(node, Swapped { own, again });
    }

    /// A home that is down gets its own disk back.
    pub(crate) fn restore(&mut self, node: Index) {
        if let Some(Swapped { own, .. }) = self.swapped.remove(&node) {
            self.nodes[node].disk = own;
        }
    }

    /// The root does not let a home in: the process leaves.
    pub(crate) fn rejected(&mut self, node: Index, reason: JoinRefusal) {
        let id = self.nodes[node].id;
        self.note(13, || format!("{id} is not let in: {reason:?}"));
        self.rejections.push((node, reason));
        let Some(swapped) = self.swapped.get_mut(&node) else {
            let text = format!("D11: {id} on its own disk is not let in: {reason:?}");
            return self.oracle.fail(text);
        };
        let again = swapped.again;
        self.hit(match reason {
            JoinRefusal::OtherStorage { .. } => Probe::WipedHomeRejected,
            JoinRefusal::OlderStorage { .. } => Probe::OldCopyRejected,
        });
        self.crash(node);
        self.nodes[node].returns = again.is_some();
        let Some((tries, down)) = again else {
            return;
        };
        match tries.checked_sub(1) {
            Some(left) => {
                if let Some(swapped) = self.swapped.get_mut(&node) {
                    swapped.again = Some((left, down));
                }
            }
            None => self.restore(node),
        }
        self.at(self.now + down, Event::Start { node });
    }

    pub(crate) fn strike(&mut self, fault: &Fault) {
        let shown = fault.clone();
        self.note(8, || format!("fault {shown:?}"));
        let now = self.now;
        self.disturb(now + fault.ticks());
        match *fault {
            Fault::Crash { node, down, told } => {
                if matches!(self.nodes[node].core, Core::Down) {
                    return;
                }
                self.crash(node);
                self.nodes[node].returns = down.is_some();
                if let Some(ticks) = down {
                    self.at(now + ticks, Event::Start { node });
                }
                if told && node > 0 {
                    let (id, time) = (self.nodes[node].id, self.time());
                    if let Core::Root(root) = &mut self.nodes[0].core {
                        root.declare_dead(time, id);
                        self.after(0);
                    }
                }
            }
            Fault::Pause { node, ticks } => {
                let n = &mut self.nodes[node];
                n.paused_until = n.paused_until.max(now + ticks);
                let short = ticks < self.plan.evict_after / 2 && ticks > self.plan.evict_after / 6;
                self.probes.hit_if(Probe::PausedAndNotEvicted, short);
            }
            Fault::Break { a, b } if a != b => self.break_link(pair(a, b).0),
            Fault::Break { .. } => {}
            Fault::Cut {
                from,
                to,
                ticks,
                breaks,
            } => {
                if from != to {
                    self.cut(from, to, ticks, breaks);
                }
            }
            Fault::Isolate {
                node,
                ticks,
                breaks,
            } => {
                for peer in (0..self.nodes.len()).filter(|p| *p != node) {
                    self.cut(node, peer, ticks, false);
                    self.cut(peer, node, ticks, breaks);
                }
            }
            Fault::Slow { node, ticks } => self.nodes[node].slow_until = now + ticks,
            Fault::Full { node, ticks } => {
                self.nodes[node].disk.full = true;
                self.at(now + ticks, Event::Unfull { node });
            }
            Fault::TwoRoots {
                down,
                asleep,
                ticks,
            } => self.replace_root((down, asleep, ticks)),
            Fault::Copy { node } => {
                if !self.swapped.contains_key(&node) {
                    let copy = self.nodes[node].disk.copy();
                    self.copies.insert(node, copy);
                }
            }
            Fault::Swap { node, copy, down } => {
                let copy = self.copies.get(&node).filter(|_| copy);
                let wrong = copy.cloned().unwrap_or_else(|| self.empty_disk(node));
                let is_up = !matches!(self.nodes[node].core, Core::Down);
                if !is_up || self.swapped.contains_key(&node) || !self.would_be_missed(node, &wrong)
                {
                    return;
                }
                self.swap(node, wrong, Some((2, down)));
                self.nodes[node].returns = true;
                self.at(now + down, Event::Start { node });
            }
            Fault::Part { node } => {
                if let Core::Client(client) = &mut self.nodes[node].core {
                    client.part();
                    self.hit(Probe::ClientParted);
                    self.after(node);
                }
            }
        }
    }

    fn cut(&mut self, from: Index, to: Index, ticks: u64, breaks: bool) {
        let (key, side) = pair(to, from);
        let until = self.now + ticks;
        let lane = &mut self.net.link(key).lane[side];
        lane.blocked_until = lane.blocked_until.max(until);
        if breaks {
            let delay = self.rng.below(ticks + 1);
            self.at(self.now + delay, Event::BreakLater { key });
        }
    }

    /// Every fault ends; nodes that are to come back do.
    pub(crate) fn heal(&mut self) {
        self.is_healed = true;
        self.old_root = None;
        self.note(9, || "everything heals".to_owned());
        for node in 0..self.nodes.len() {
            self.nodes[node].paused_until = 0;
            self.nodes[node].slow_until = 0;
            self.nodes[node].disk.full = false;
        }
        // Deliveries that waited for the end of a pause or partition happen soon.
        for key in self.net.pairs() {
            for lane in 0..2 {
                self.unblock(key, lane);
            }
        }
        for node in 0..self.nodes.len() {
            let n = &self.nodes[node];
            if matches!(n.core, Core::Down) && n.returns {
                self.start(node);
            }
        }
    }

    /// A partition ends in one direction: what was held back is delivered soon.
    pub(crate) fn unblock(&mut self, key: (Index, Index), lane: usize) {
        let l = &mut self.net.link(key).lane[lane];
        l.blocked_until = 0;
        l.last_at = self.now;
        for _ in 0..l.queue.len() {
            let delay = 1 + self.rng.below(self.plan.delay_max);
            self.at(self.now + delay, Event::Deliver { key, lane });
        }
    }
}
