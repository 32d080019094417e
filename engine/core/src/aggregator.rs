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
use crate::ids::{Epoch, Incarnation, Life, NodeId, Time};
use crate::member::{Joined, Member};
use crate::message::{Covered, Envelope, Message, Role};

/// Settings of an aggregator.
#[derive(Clone, Copy, Debug)]
pub struct AggregatorConfig {
    /// Root of the cluster.
    pub root: NodeId,
    /// Ticks between pings and reports.
    pub interval: u64,
    /// Different for every start of the process.
    pub nonce: u64,
    /// Ticks of silence after which a child is no longer covered (the root then judges it).
    pub silent_after: u64,
}

#[derive(Debug)]
struct Child {
    attach: u32,
    bound: Epoch,
    waits: bool,
    last_heard: Time,
}

/// An aggregator. See the module's head.
#[derive(Debug)]
pub struct Aggregator {
    port: Port,
    member: Member,
    config: AggregatorConfig,
    children: BTreeMap<Life, Child>,
    next_report: Time,
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
            root,
            interval,
            nonce,
            ..
        } = config;
        Aggregator {
            port: Port::new(life, Epoch(0)),
            member: Member::new(root, root, Role::Aggregator, nonce, interval),
            config,
            children: BTreeMap::new(),
            next_report: Time(0),
        }
    }

    /// A message arrived.
    pub fn handle_message(&mut self, now: Time, envelope: Envelope) {
        if self.port.receive(&envelope).is_err() {
            return;
        }
        let from = envelope.from;
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
                let child = self.children.entry(life).or_insert(Child {
                    attach,
                    bound: floor,
                    waits: false,
                    last_heard: now,
                });
                if attach > child.attach {
                    *child = Child {
                        attach,
                        bound: floor,
                        waits: false,
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
                child.bound = child.bound.max(lower_bound);
                child.waits = waits;
                child.last_heard = now;
                let newer = (view < self.member.view_id()).then(|| self.member.view().clone());
                self.port.send(from.node, Message::Pong { view: newer });
            }
            body => {
                if self.member.handle(&mut self.port, &body) == Joined::ViewChanged {
                    self.forget_replaced();
                }
            }
        }
    }

    /// Time passed: ping, and report what the children allow.
    pub fn handle_timeout(&mut self, now: Time) {
        let told = (self.port.epoch(), false);
        self.member.handle_timeout(now, &mut self.port, told);
        if now < self.next_report || !self.member.is_joined() {
            return;
        }
        self.next_report = now.after(self.config.interval);
        let mut lower_bound = self.port.epoch();
        let mut waits = false;
        let mut covers = Vec::with_capacity(self.children.len());
        for (&life, c) in &self.children {
            if now.since(c.last_heard) <= self.config.silent_after {
                lower_bound = lower_bound.min(c.bound);
                waits |= c.waits;
                let attach = c.attach;
                covers.push(Covered { life, attach });
            }
        }
        let view = self.member.view_id();
        self.port.send(
            self.config.root,
            Message::Report {
                lower_bound,
                covers,
                view,
                waits,
            },
        );
    }

    /// When [`Aggregator::handle_timeout`] wants to run.
    #[must_use]
    pub fn poll_timeout(&self) -> Time {
        self.member.timeout().min(self.next_report)
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
        let view = self.member.view();
        self.children.retain(|life, _| {
            view.seat(life.node)
                .is_some_and(|s| s.life == *life && s.live)
        });
    }
}
