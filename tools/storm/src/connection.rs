//! How connections come up, carry messages and end; see [`net`](crate::net) for what they promise.

use lowtide_engine_core::effect::Port;
use lowtide_engine_core::ids::{Incarnation, Life};
use lowtide_engine_core::message::Envelope;
use lowtide_engine_core::teeth::{Tooth, bites};
use lowtide_engine_core::wire;

use crate::net::{Ghost, Item, Side, pair};
use crate::plan::Index;
use crate::probe::Probe;
use crate::world::{Core, Event, World};

impl World {
    /// Hands an encoded envelope to the connection.
    pub(crate) fn transmit(&mut self, from: Index, to: Index, envelope: &Envelope) {
        let (key, side) = pair(from, to);
        let link = self.net.link(key);
        if let Some(ghost) = link.ghost.as_mut().filter(|g| g.side == side) {
            ghost.asks = true;
            return self.lay_ghost(key);
        }
        if from == to || link.broken || link.side[side] != Side::Open {
            return;
        }
        let item = Item::Message {
            bytes: wire::encode(envelope),
            is_urgent: envelope.body.is_urgent(),
        };
        self.push(key, 1 - side, item);
    }

    /// Puts an item on a lane, in order; an urgent message before any number of those that it may
    /// overtake.
    pub(crate) fn push(&mut self, key: (Index, Index), lane: usize, item: Item) {
        let delay = 1 + self.rng.below(self.plan.delay_max);
        let now = self.now;
        let l = &mut self.net.link(key).lane[lane];
        let may_overtake = match item {
            Item::Message {
                is_urgent: true, ..
            } => l.overtakable(),
            _ => 0,
        };
        let overtaken = match may_overtake {
            0 => 0,
            most => self.rng.below(most as u64 + 1) as usize,
        };
        self.probes.hit_if(Probe::UrgentOvertook, overtaken > 0);
        l.last_at = l.last_at.max(now + delay).max(l.blocked_until);
        l.queue.insert(l.queue.len() - overtaken, item);
        let at = l.last_at;
        self.at(at, Event::Deliver { key, lane });
    }

    pub(crate) fn deliver(&mut self, key: (Index, Index), lane: usize) {
        let node = if lane == 0 { key.0 } else { key.1 };
        let peer = if lane == 0 { key.1 } else { key.0 };
        let l = &mut self.net.link(key).lane[lane];
        let until = l.blocked_until.max(self.nodes[node].paused_until);
        if until > self.now {
            self.at(until, Event::Deliver { key, lane });
            return;
        }
        let Some(item) = l.queue.pop_front() else {
            return;
        };
        let link = self.net.link(key);
        match item {
            Item::Up => {
                link.side[lane] = Side::Open;
                self.connected(node, peer);
            }
            Item::Message { bytes, .. } => self.receive(node, peer, &bytes),
            Item::Down => {
                let was_open = link.side[lane] == Side::Open;
                link.side[lane] = Side::Closed;
                if was_open {
                    self.disconnected(node, peer);
                }
                self.settle_link(key);
            }
        }
    }

    /// A connection that both sides gave up may be dialed again.
    pub(crate) fn settle_link(&mut self, key: (Index, Index)) {
        let link = self.net.link(key);
        let closed = link.side == [Side::Closed; 2];
        let empty = link.lane.iter().all(|l| l.queue.is_empty());
        if !closed || !empty {
            return;
        }
        link.broken = false;
        if link.wanted != [false; 2] && !link.dialing {
            link.dialing = true;
            let delay = self.rng.range(1, 2 * self.plan.delay_max);
            self.at(self.now + delay, Event::Dial { key });
        }
    }

    pub(crate) fn dial(&mut self, key: (Index, Index)) {
        let alive = [key.0, key.1].iter().all(|&n| {
            let node = &self.nodes[n];
            !matches!(node.core, Core::Down) && node.paused_until <= self.now
        });
        let now = self.now;
        let link = self.net.link(key);
        let passable = link.lane.iter().all(|l| l.blocked_until <= now);
        if link.wanted == [false; 2] || link.side != [Side::Closed; 2] {
            link.dialing = false;
            return;
        }
        if !alive || !passable {
            let delay = self.rng.range(3, 4 + 4 * self.plan.delay_max);
            self.at(now + delay, Event::Dial { key });
            return;
        }
        link.dialing = false;
        link.side = [Side::Opening; 2];
        self.push(key, 0, Item::Up);
        self.push(key, 1, Item::Up);
    }

    /// `node` wants a connection to `peer` from now on.
    pub(crate) fn want(&mut self, node: Index, peer: Index) {
        if node == peer {
            return;
        }
        let (key, side) = pair(node, peer);
        let link = self.net.link(key);
        link.wanted[side] = true;
        if let Some(ghost) = link.ghost.as_mut().filter(|g| g.side != side) {
            // The call of a new process says that the old one is gone.
            ghost.asks = true;
            self.lay_ghost(key);
        }
        self.settle_link(key);
    }

    /// The transport gives a connection up: a prefix of what is in flight still arrives.
    pub(crate) fn break_link(&mut self, key: (Index, Index)) {
        let link = self.net.link(key);
        if link.broken || link.side == [Side::Closed; 2] {
            return;
        }
        link.broken = true;
        for lane in 0..2 {
            self.cut_lane(key, lane);
        }
        self.note(7, || format!("link {key:?} breaks"));
        self.disturb(self.now);
    }

    /// The process at `gone`'s end of a connection has ended.
    pub(crate) fn bereave(&mut self, key: (Index, Index), gone: usize) {
        let node = if gone == 0 { key.0 } else { key.1 };
        let (newest, joined) = (self.nodes[node].newest, self.nodes[node].life.incarnation);
        let link = self.net.link(key);
        link.wanted[gone] = false;
        if link.side == [Side::Closed; 2] {
            return;
        }
        let other = 1 - gone;
        if link.ghost.is_some_and(|g| g.side == other) {
            // Not even the process before this one is known to be gone.
            return;
        }
        let asks = !link.lane[gone].queue.is_empty();
        let is_first = !std::mem::replace(&mut link.broken, true);
        link.side[gone] = Side::Closed;
        link.lane[gone].queue.clear();
        link.ghost = None;
        if is_first && link.side[other] == Side::Open {
            link.ghost = Some(Ghost {
                side: other,
                newest,
                joined: joined > Incarnation(0),
                asks,
            });
            self.lose_suffix(key, other);
        } else if is_first {
            self.cut_lane(key, other);
        }
        self.settle_link(key);
    }

    /// If something is under way to a process that is gone, and there is another at its address,
    /// that one answers that there is no such connection.
    pub(crate) fn lay_ghost(&mut self, key: (Index, Index)) {
        let Some(ghost) = self.net.link(key).ghost.filter(|g| g.asks) else {
            return;
        };
        let peer = if ghost.side == 0 { key.1 } else { key.0 };
        if !matches!(self.nodes[peer].core, Core::Down) {
            self.net.link(key).ghost = None;
            self.push(key, ghost.side, Item::Down);
        }
    }

    /// What the hands do when the view is a new one: a connection to a life that was replaced, the
    /// root's among them, and on which nothing is under way, is asked whether it is still there.
    pub(crate) fn compare_lives(&mut self, node: Index) {
        let view = match &self.nodes[node].core {
            Core::Client(c) => c.view(),
            Core::Proxy(c) => c.view(),
            Core::Destination(c) => c.view(),
            Core::Down | Core::Root(_) | Core::Aggregator(_) => return,
        };
        if view.id == self.nodes[node].compared {
            return;
        }
        let mut lives: Vec<Life> = view.seats.iter().map(|s| s.life).collect();
        if !bites(Tooth::ReturnedRootUnnoticed) {
            lives.extend(self.nodes[node].core.port().map(Port::root_life));
        }
        self.nodes[node].compared = view.id;
        for life in lives {
            let Some(&peer) = self.by_id.get(&life.node) else {
                continue;
            };
            if peer == node {
                continue;
            }
            let (key, side) = pair(node, peer);
            let ghost = self.net.link(key).ghost.as_mut();
            let quiet = |g: &&mut Ghost| g.side == side && !g.asks && life.incarnation > g.newest;
            if let Some(ghost) = ghost.filter(quiet) {
                if !ghost.joined && bites(Tooth::SilentEndIgnored) {
                    continue;
                }
                ghost.asks = true;
                let spoke = ghost.joined;
                self.probes.hit_if(Probe::SilentEndFoundByView, spoke);
                self.probes.hit_if(Probe::EndBeforeJoinFoundByView, !spoke);
                self.lay_ghost(key);
            }
        }
    }

    /// Loses a suffix of a lane and ends it.
    pub(crate) fn cut_lane(&mut self, key: (Index, Index), lane: usize) {
        self.lose_suffix(key, lane);
        if self.net.link(key).side[lane] != Side::Closed {
            self.push(key, lane, Item::Down);
        }
    }

    fn lose_suffix(&mut self, key: (Index, Index), lane: usize) {
        let length = self.net.link(key).lane[lane].queue.len() as u64;
        let keep = match self.net.link(key).side[lane] {
            Side::Closed => 0,
            Side::Opening | Side::Open => self.rng.below(length + 1),
        };
        self.net.link(key).lane[lane].queue.truncate(keep as usize);
    }
}
