//! Convergence after healing, and the last checks and probes of a run.

use lowtide_engine_core::destination::Stage;
use lowtide_engine_core::ids::NodeId;
use lowtide_engine_core::message::{LockRefusal, Message};
use lowtide_engine_core::op::Mode;

use crate::plan::Index;
use crate::probe::Probe;
use crate::world::{Core, World};

impl World {
    /// Probes that room ran out by itself, and that a lock that was refused for it was granted later.
    pub(crate) fn watch_room(&mut self, node: Index, to: NodeId, body: &Message) {
        let n = &self.nodes[node];
        let Core::Destination(front) = &n.core else {
            return;
        };
        if n.disk.log_bytes.is_none() || n.disk.full {
            return;
        }
        self.probes.hit_if(Probe::RoomRanOut, !front.has_room());
        match body {
            Message::Refused {
                reason: LockRefusal::Full,
                ..
            } => {
                self.refused.insert((node, to));
            }
            Message::Granted {
                mode: Mode::Exclusive,
                ..
            } => {
                let waited = self.refused.remove(&(node, to));
                self.probes.hit_if(Probe::GrantedAfterRoomCameBack, waited);
            }
            _ => {}
        }
    }

    /// Whether everything has come to rest: work done and stable, evictions over, undo and windows
    /// gone.
    pub(crate) fn is_converged(&self) -> bool {
        self.stuck().is_none()
    }

    /// The first thing that has not come to rest.
    fn stuck(&self) -> Option<String> {
        if self.oracle.unfinished() > 0 {
            return Some(format!("unfinished:{}", self.oracle.describe_unfinished()));
        }
        if let Some(node) = self.swapped.keys().next() {
            let id = self.nodes[*node].id;
            return Some(format!("{id} is on a disk that is not its own"));
        }
        let newest = self.oracle.newest();
        for node in 0..self.nodes.len() {
            let n = &self.nodes[node];
            let behind = n.core.port().is_some_and(|p| p.minimum() <= newest);
            let why = match &n.core {
                Core::Down if n.returns => Some("is down".to_owned()),
                Core::Down | Core::Aggregator(_) => None,
                Core::Root(r) => {
                    let under_way: Vec<_> = r.evictions().collect();
                    let waits = !under_way.is_empty() || behind;
                    waits.then(|| format!("evicts {under_way:?}, m held by {:?}", r.blocked_by()))
                }
                Core::Destination(d) => {
                    let (stage, waits) = d.stage();
                    let unpurged = d.undo_kept() > 0;
                    let busy = unpurged || behind || !d.has_room();
                    (stage != Stage::Serving || busy).then(|| {
                        format!(
                            "{stage:?} waits for {waits:?}, keeps {} undo records, has room: {}",
                            d.undo_kept(),
                            d.has_room()
                        )
                    })
                }
                Core::Proxy(p) => {
                    let working = n.originate.1 > 0 || p.held_bytes() > 0 || behind;
                    working.then(|| {
                        format!(
                            "originates {:?}, holds {} bytes",
                            n.originate,
                            p.held_bytes()
                        )
                    })
                }
                Core::Client(c) => {
                    let idle = n.app.as_ref().is_none_or(|a| a.is_done());
                    let rest =
                        idle && c.is_joined() && c.backlog() == (0, 0) && c.held_bytes() == 0;
                    (!rest || behind).then(|| {
                        format!(
                            "has backlog {:?}, holds {} bytes",
                            c.backlog(),
                            c.held_bytes()
                        )
                    })
                }
            };
            if let Some(why) = why {
                return Some(format!("{} {why}, newest epoch {newest}", n.life));
            }
        }
        let frozen = self.oracle.frozen_locks();
        if let Some(life) = frozen.keys().next() {
            return Some(format!("{life} is dead and not evicted"));
        }
        None
    }

    pub(crate) fn describe_stuck(&self) -> String {
        let mut text = self.stuck().unwrap_or_default();
        if let Core::Root(r) = &self.nodes[0].core {
            let under_way: Vec<_> = r.evictions().collect();
            text.push_str(&format!(
                "; evictions {under_way:?}, m held by {:?}",
                r.blocked_by()
            ));
        }
        text
    }

    /// I16: an idle node's epoch trails the newest by at most two intervals per level of the tree
    /// of pings, and what messages and the root's syncs take on the way.
    pub(crate) fn watch_idle_epochs(&mut self) {
        if !self.plan.watches_idle() {
            return;
        }
        self.at_rest = true;
        let newest = self.nodes.iter().map(|n| n.epoch).max().unwrap_or_default();
        let plan = &self.plan;
        let depth = 1 + u64::from(plan.aggregator);
        let way = 2 * plan.delay_max + plan.sync_max;
        let bound = depth * (2 * plan.ping_interval + way);
        let until = self.now + bound;
        self.run_until(until);
        for n in &self.nodes {
            let behind = n.core.port().is_some_and(|p| p.epoch() < newest);
            if behind && self.oracle.failure().is_none() {
                let text = format!(
                    "I16: {} is at {} though {newest} was reached {bound} ticks ago",
                    n.life, n.epoch
                );
                self.oracle.fail(text);
                return;
            }
        }
        self.hit(Probe::IdleEpochsWatched);
        self.watch_rest();
    }

    /// Idle is idle: a cluster at rest sends pings and their answers and writes nothing.
    fn watch_rest(&mut self) {
        let plan = &self.plan;
        // What is on its way lands, and the last who waited hears of the m that it waited for.
        let calm = 10 * (plan.ping_interval + 2 * plan.delay_max + plan.sync_max)
            + 8 * plan.shard_delay
            + 2 * plan.bypass_after
            + plan.merge_interval;
        let until = self.now + calm;
        self.run_until(until);
        let epochs = |w: &World| w.nodes.iter().map(|n| n.epoch).collect::<Vec<_>>();
        let before = epochs(self);
        self.is_quiet = true;
        let until = self.now + 20 * self.plan.ping_interval;
        self.run_until(until);
        self.is_quiet = false;
        if self.oracle.failure().is_none() && epochs(self) != before {
            let text = format!("idle: epochs go on from {before:?} to {:?}", epochs(self));
            self.oracle.fail(text);
        }
        self.hit(Probe::RestWatched);
    }

    pub(crate) fn final_checks(&mut self) {
        let live: Vec<_> = self
            .nodes
            .iter()
            .filter(|n| !matches!(n.core, Core::Down))
            .map(|n| n.life)
            .collect();
        self.oracle.finish(|life| live.contains(&life));
        for node in 0..self.nodes.len() {
            if self.is_destination(node) {
                let id = self.nodes[node].id;
                let disk = &mut self.nodes[node].disk;
                self.oracle.compare(id, disk, "at the end");
                // All is past undo. A shard may not have heard of it yet.
                let n = &self.nodes[node];
                if let Core::Destination(front) = &n.core
                    && n.shards.executed(front) == front.step()
                    && n.disk.orphans() > 0
                {
                    let count = n.disk.orphans();
                    self.oracle
                        .fail(format!("{id} keeps {count} extents of no object"));
                }
            }
            if let Core::Destination(d) = &self.nodes[node].core
                && d.counters().claims_refused > 0
            {
                let life = self.nodes[node].life;
                self.oracle.fail(format!("{life} refused a claim"));
            }
        }
    }

    pub(crate) fn count_final_probes(&mut self) {
        let tally = self.oracle.tally;
        let p = &mut self.probes;
        p.hit_if(Probe::CompletedBySupply, tally.completed > 0);
        p.hit_if(Probe::UndoneAtEviction, tally.undone > 0);
        p.hit_if(Probe::DroppedUnseen, tally.dropped > 0);
        p.hit_if(Probe::SurvivedItsClient, tally.survived > 0);
        p.hit_if(
            Probe::ExecutedBySeveralShards,
            tally.executed_by_several > 0,
        );
        p.hit_if(Probe::UndoneBySeveralShards, tally.undone_by_several > 0);
        let pressed = self.plan.redo_bytes < 1000;
        for node in 0..self.nodes.len() as Index {
            match &self.nodes[node].core {
                Core::Root(c) => {
                    p.hit_if(Probe::HolderEvicted, c.counters().held_back > 0);
                }
                Core::Client(c) => {
                    let windows = c.windows();
                    p.hit_if(Probe::WindowsHeldMany, windows.held_max > 1);
                    p.hit_if(Probe::PartsReplayed, windows.replayed > 0);
                    p.hit_if(Probe::RedoPressed, pressed && c.counters().stamped > 4);
                    p.hit_if(Probe::LockYielded, c.counters().yielded > 0);
                }
                Core::Proxy(c) => {
                    p.hit_if(Probe::WindowsDiscardedEarly, c.windows().early > 0);
                }
                Core::Destination(d) => {
                    let counters = d.counters();
                    p.hit_if(Probe::UndoPurged, counters.purged > 0);
                    p.hit_if(Probe::FencedPartRefused, counters.refused_fenced > 0);
                    p.hit_if(Probe::DuplicateAtHome, counters.duplicates > 0);
                }
                _ => {}
            }
        }
        p.hit_if(
            Probe::BulkWritten,
            self.plan.bulk > 0 && tally.executed > 10,
        );
    }
}
