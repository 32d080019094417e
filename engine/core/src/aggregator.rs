//! An inner node of the tree that reduces the minimum: members ping it, it reports one bound up.
//!
//! A child counts from the moment the root has confirmed its attachment, starting at the floor the
//! root gave (b.3 rule 3); its entry only rises. A restarted aggregator has an empty table; the
//! root holds its children until they attach again (rule 5, N9), which they do because a ping of
//! somebody who does not count is not answered. A report bounds exactly the children it lists: a
//! silent child is left out of both, and the root then holds and judges it.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use crate::effect::{Effect, Port};
use crate::ids::{Epoch, Incarnation, Life, NodeId, Time, ViewId};
use crate::member::{Intervals, Joined, Member, Resting};
use crate::message::{Covered, Envelope, Message, Role, Waits};

/// Settings of an aggregator.
#[derive(Clone, Copy, Debug)]
pub struct AggregatorConfig {
    /// Root of the cluster.
    pub root: NodeId,
    /// Ticks between pings, and between reports.
    pub pings: Intervals,
    /// Different for every start of the process.
    pub nonce: u64,
    /// Ticks of silence after which a child is no longer covered (the root then judges it).
    pub silent_after: u64,
}

#[derive(Debug)]
struct Child {
    attach: u32,
    bound: Epoch,
    waits: Waits,
    last_heard: Time,
}

/// An aggregator. See the module's head.
#[derive(Debug)]
pub struct Aggregator {
    port: Port,
    member: Member,
    config: AggregatorConfig,
    children: BTreeMap<Life, Child>,
    resting: Resting,
    last_report: Option<Time>,
    /// The epoch of the last report, unless a child has said something new since.
    reported: Option<Epoch>,
}

impl Aggregator {
    /// An aggregator that has not joined yet.
    #[must_use]
    pub fn new(node: NodeId, config: AggregatorConfig) -> Aggregator {
        let life = Life {
            node,
            incarnation: Incarnation(0),
        };
        let AggregatorConfig {
            root, pings, nonce, ..
        } = config;
        Aggregator {
            port: Port::new(life, root, Epoch(0)),
            member: Member::new(root, root, Role::Aggregator, nonce, pings),
            config,
            children: BTreeMap::new(),
            resting: Resting::default(),
            last_report: None,
            reported: None,
        }
    }

    /// A message arrived.
    pub fn handle_message(&mut self, now: Time, envelope: Envelope) {
        if self.port.receive(&envelope).is_err() {
            return;
        }
        let (from, epoch) = (envelope.from, envelope.epoch);
        self.tell_resting();
        match envelope.body {
            Message::Attach { life, attach } if self.member.is_joined() => {
                self.port
                    .send(self.config.root, Message::Attach { life, attach });
            }
            Message::Attached {
                life,
                attach,
                floor,
            } if life != self.port.life() => {
                self.reported = None;
                let child = self.children.entry(life).or_insert(Child {
                    attach,
                    bound: floor,
                    waits: Waits::No,
                    last_heard: now,
                });
                if attach > child.attach {
                    *child = Child {
                        attach,
                        bound: floor,
                        waits: Waits::No,
                        last_heard: now,
                    };
                }
                self.port.send(
                    life.node,
                    Message::Attached {
                        life,
                        attach,
                        floor,
                    },
                );
            }
            Message::Ping {
                attach,
                lower_bound,
                view,
                waits,
                ..
            } => {
                let known = self.children.get_mut(&from).filter(|c| c.attach == attach);
                let Some(child) = known else {
                    return;
                };
                if lower_bound > child.bound || waits != child.waits {
                    self.reported = None;
                }
                child.bound = child.bound.max(lower_bound);
                child.waits = waits;
                child.last_heard = now;
                self.pong(from.node, view);
                let rests = waits == Waits::No && epoch == self.port.epoch();
                self.resting
                    .answered(from.node, self.member.view_id(), rests);
            }
            body => {
                if self.member.handle(&mut self.port, from.node, &body) == Joined::ViewChanged {
                    self.forget_replaced();
                    self.tell_resting();
                }
            }
        }
    }

    /// The connection to `peer` is up.
    pub fn handle_connected(&mut self, peer: NodeId) {
        self.member.connected(peer);
        if peer == self.config.root {
            self.reported = None;
        }
    }

    fn pong(&mut self, to: NodeId, known: ViewId) {
        let view = self.member.view();
        let view = (known < view.id).then(|| view.clone());
        self.port.send(to, Message::Pong { view });
    }

    /// News for the children that rest.
    fn tell_resting(&mut self) {
        let (epoch, view) = (self.port.epoch(), self.member.view_id());
        for (node, known) in self.resting.news(epoch, view) {
            self.pong(node, known);
        }
    }

    /// Time passed: ping, and report what the children allow.
    pub fn handle_timeout(&mut self, now: Time) {
        let told = (self.port.epoch(), Waits::No);
        self.member.handle_timeout(now, &mut self.port, told);
        if now < self.next_report() || !self.member.is_joined() {
            return;
        }
        self.last_report = Some(now);
        self.reported = Some(self.port.epoch());
        let mut lower_bound = self.port.epoch();
        let mut lowest = None;
        let mut waits = Waits::No;
        let mut covers = Vec::with_capacity(self.children.len());
        for (&life, c) in &self.children {
            if now.since(c.last_heard) <= self.config.silent_after {
                if c.bound < lower_bound {
                    lower_bound = c.bound;
                    lowest = Some(life);
                }
                waits = waits.max(c.waits);
                let attach = c.attach;
                covers.push(Covered { life, attach });
            }
        }
        let view = self.member.view_id();
        self.port.send(
            self.config.root,
            Message::Report {
                lower_bound,
                lowest,
                covers,
                view,
                waits,
            },
        );
    }

    /// When [`Aggregator::handle_timeout`] wants to run.
    #[must_use]
    pub fn poll_timeout(&self) -> Time {
        let epoch = self.port.epoch();
        let ping = self.member.timeout(epoch, Waits::No, || epoch);
        ping.min(self.next_report())
    }

    /// When the next report is due: it rests with its own pings, and while no child waits or has said
    /// anything new.
    fn next_report(&self) -> Time {
        let Some(last) = self.last_report else {
            return Time(0);
        };
        let epoch = self.port.epoch();
        let rests = self.member.rests(epoch, Waits::No, || epoch)
            && self.reported == Some(epoch)
            && self.children.values().all(|c| c.waits == Waits::No);
        let Intervals { ping, rest } = self.config.pings;
        last.after(if rests { rest } else { ping })
    }

    /// The next effect.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.port.poll()
    }

    /// Identity, epoch and minimum.
    #[must_use]
    pub fn port(&self) -> &Port {
        &self.port
    }

    /// A life that was replaced or is being resolved is the root's to hold.
    fn forget_replaced(&mut self) {
        self.reported = None;
        let view = self.member.view();
        self.children.retain(|life, _| {
            view.seat(life.node)
                .is_some_and(|s| s.life == *life && s.live)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::View;

    const ROOT: NodeId = NodeId(1);
    const CHILDREN: [u32; 2] = [3, 4];

    fn life(node: u32) -> Life {
        Life {
            node: NodeId(node),
            incarnation: Incarnation(1),
        }
    }

    /// An aggregator with two children, and what it sent in an answer to somebody.
    struct Bench {
        aggregator: Aggregator,
        now: Time,
    }

    impl Bench {
        fn new() -> Bench {
            let pings = Intervals {
                ping: 10,
                rest: 100,
            };
            let config = AggregatorConfig {
                root: ROOT,
                pings,
                nonce: 7,
                silent_after: 1000,
            };
            let aggregator = Aggregator::new(NodeId(2), config);
            let mut bench = Bench {
                aggregator,
                now: Time(0),
            };
            let joined = Message::Joined {
                nonce: 7,
                life: life(2),
                floor: Epoch(5),
                view: View::default(),
            };
            bench.hears(ROOT.0, 5, joined);
            for child in CHILDREN {
                let attached = Message::Attached {
                    life: life(child),
                    attach: 1,
                    floor: Epoch(5),
                };
                bench.hears(ROOT.0, 5, attached);
            }
            bench
        }

        /// Whom it answers when it hears this.
        fn hears(&mut self, from: u32, epoch: u64, body: Message) -> Vec<u32> {
            let envelope = Envelope {
                from: life(from),
                epoch: Epoch(epoch),
                minimum: Epoch(0),
                term: crate::ids::Term(1),
                body,
            };
            self.aggregator.handle_message(self.now, envelope);
            self.sent(|body| matches!(body, Message::Pong { .. }))
        }

        fn sent(&mut self, which: impl Fn(&Message) -> bool) -> Vec<u32> {
            let mut to_whom = Vec::new();
            while let Some(effect) = self.aggregator.poll_effect() {
                if let Effect::Send { to, envelope } = effect
                    && which(&envelope.body)
                {
                    to_whom.push(to.0);
                }
            }
            to_whom
        }

        fn reports(&mut self, at: u64) -> usize {
            self.now = Time(at);
            self.aggregator.handle_timeout(self.now);
            self.sent(|body| matches!(body, Message::Report { .. }))
                .len()
        }
    }

    fn ping(epoch: u64, waits: Waits) -> Message {
        Message::Ping {
            attach: 1,
            lower_bound: Epoch(epoch),
            view: ViewId(0),
            waits,
            commit: None,
        }
    }

    #[test]
    fn it_rests_with_its_children_and_passes_on_what_wakes_them() {
        let mut bench = Bench::new();
        for child in CHILDREN {
            assert_eq!(bench.hears(child, 5, ping(5, Waits::No)), [child]);
        }
        assert_eq!(bench.reports(10), 1);
        bench.hears(ROOT.0, 5, Message::Pong { view: None });
        assert_eq!(bench.reports(20), 0, "there is nothing new to report");
        assert_eq!(bench.reports(110), 1);
        bench.hears(ROOT.0, 5, Message::Pong { view: None });

        // A child that waits ends the rest of the reports, and the root's answer that of the other.
        bench.hears(CHILDREN[0], 5, ping(5, Waits::Yes));
        assert_eq!(bench.reports(120), 1);
        let told = bench.hears(ROOT.0, 6, Message::Pong { view: None });
        assert_eq!(told, [CHILDREN[1]]);
        let told = bench.hears(ROOT.0, 7, Message::Pong { view: None });
        assert_eq!(told, [0u32; 0], "it does not rest any more");
    }
}
