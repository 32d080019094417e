//! How a node joins the cluster, pings its parent and learns the membership view.
//!
//! Pings go out at a fixed interval (E4), carry the lower bound, and are answered by the parent with
//! the newest view if the member's is old. A lost ping costs one interval; nothing is retransmitted.
//!
//! A member rests while it waits for nothing, its last ping was answered, and it would say the same
//! again: then the interval is a longer one. Whoever answers pings tells those who rest when its
//! epoch rises or the view changes ([`Resting`]), so nobody who waits for m waits for them.
//!
//! A member below an aggregator that gets no answers attaches anew, under the next number, and
//! pings the root until the aggregator has confirmed it (b.3 rule 5): the aggregator may be gone,
//! or may have restarted with an empty table, and then answers nobody it does not count. A new
//! connection to it is reason enough to ask it again, under the same number. While the member
//! waits for longer than usual before it attaches anew, it pings both, so that the root hears of it.

use alloc::collections::BTreeMap;

use crate::effect::Port;
use crate::identity::{JoinRefusal, StoreMark};
use crate::ids::{Epoch, Life, NodeId, Step, Time, ViewId};
use crate::message::{Message, Role, View, Waits};

/// Pings to an aggregator in a row without an answer after which a member attaches anew. Each
/// further attempt waits twice as long, because an attachment takes two round trips and a number
/// that was given up is not confirmed any more.
const UNANSWERED_MAX: u32 = 3;
/// Most pings that an attempt waits.
const PATIENCE_MAX: u32 = 96;

/// Membership half of a node.
#[derive(Clone, Debug)]
pub struct Member {
    root: NodeId,
    parent: NodeId,
    role: Role,
    nonce: u64,
    joined: bool,
    attach: u32,
    attached: bool,
    /// Pings sent since the aggregator last answered, or since it was asked to attach us.
    unanswered: u32,
    /// How many may be sent before the next attempt.
    patience: u32,
    every: Intervals,
    last_ping: Option<Time>,
    /// The node's own epoch and its lower bound as the last ping told them, if it waited for nothing.
    asked: Option<(Epoch, Epoch)>,
    /// The same, once that ping was answered.
    told: Option<(Epoch, Epoch)>,
    view: View,
    pings: u64,
    /// What a home has on disk.
    store: Option<StoreMark>,
    /// How far a home's history is durable, as this life knows.
    commit: Option<Step>,
}

/// Ticks between pings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Intervals {
    /// While anything moves.
    pub ping: u64,
    /// At rest; not shorter, and well below any silence that others judge.
    pub rest: u64,
}

/// Members whose last ping said all that its answer did, so that they rest; kept by whoever answers
/// them.
#[derive(Clone, Debug, Default)]
pub struct Resting {
    /// Each with the view that it knows.
    members: BTreeMap<NodeId, ViewId>,
    /// What all of them know.
    told: (Epoch, ViewId),
}

impl Resting {
    /// A ping of `node` was answered; `rests` if it waits for nothing and has our epoch.
    pub fn answered(&mut self, node: NodeId, view: ViewId, rests: bool) {
        match rests {
            true => self.members.insert(node, view),
            false => self.members.remove(&node),
        };
    }

    /// Whom to send an answer that nobody asked for, if there is news since the last call, and the view
    /// that each knows. They are not at rest any more.
    pub fn news(&mut self, epoch: Epoch, view: ViewId) -> BTreeMap<NodeId, ViewId> {
        let now = (epoch, view);
        let is_news = core::mem::replace(&mut self.told, now) != now;
        match is_news {
            true => core::mem::take(&mut self.members),
            false => BTreeMap::new(),
        }
    }
}

/// What a membership message meant for the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Joined {
    /// The node has entered a life; this is the floor.
    Entered {
        /// The life.
        life: Life,
        /// m at the root when it was admitted.
        floor: Epoch,
    },
    /// The root does not let the node in.
    Rejected(JoinRefusal),
    /// A newer view was learned.
    ViewChanged,
    /// Nothing changed.
    Nothing,
}

impl Member {
    /// A node that will join with `nonce`, different for every start of the process, and ping
    /// as often as `every` says. `parent` is the root or an aggregator.
    #[must_use]
    pub fn new(root: NodeId, parent: NodeId, role: Role, nonce: u64, every: Intervals) -> Member {
        Member {
            root,
            parent,
            role,
            nonce,
            joined: false,
            attach: u32::from(parent != root),
            attached: parent == root,
            unanswered: 0,
            patience: UNANSWERED_MAX,
            every,
            last_ping: None,
            told: None,
            asked: None,
            view: View::default(),
            pings: 0,
            store: None,
            commit: None,
        }
    }

    /// A home, with what it has on disk.
    #[must_use]
    pub fn with_store(mut self, store: StoreMark) -> Member {
        self.store = Some(store);
        self
    }

    /// From now on pings say that the home's history is durable up to here.
    pub fn commit(&mut self, commit: Step) {
        self.commit = self.commit.max(Some(commit));
    }

    /// Whether the node has a life.
    #[must_use]
    pub fn is_joined(&self) -> bool {
        self.joined
    }

    /// The newest view known.
    #[must_use]
    pub fn view(&self) -> &View {
        &self.view
    }

    /// Pings sent so far.
    #[must_use]
    pub fn pings(&self) -> u64 {
        self.pings
    }

    /// When [`Member::handle_timeout`] wants to run, given the node's epoch, what it waits for, and its
    /// lower bound.
    #[must_use]
    pub fn timeout(&self, epoch: Epoch, waits: Waits, bound: impl FnOnce() -> Epoch) -> Time {
        let Some(last) = self.last_ping else {
            return Time(0);
        };
        let rests = self.rests(epoch, waits, bound);
        last.after(if rests {
            self.every.rest
        } else {
            self.every.ping
        })
    }

    /// Whether a ping would say what the last one did, which was answered, and nothing waits.
    #[must_use]
    pub fn rests(&self, epoch: Epoch, waits: Waits, bound: impl FnOnce() -> Epoch) -> bool {
        let says_it_again = |(then, lower)| then == epoch && lower == bound();
        waits == Waits::No && self.attached && self.told.is_some_and(says_it_again)
    }

    /// The connection to `peer` is new. If it is the parent, whatever was told may be forgotten; an
    /// aggregator may be a new life that counts nobody, so it is asked to attach the member again.
    pub fn connected(&mut self, peer: NodeId) {
        if peer == self.parent || peer == self.root {
            self.told = None;
        }
        if peer == self.parent && peer != self.root {
            self.attached = false;
        }
    }

    /// Joins, attaches or pings, as the time has come, with the lower bound and what waits
    /// for the minimum.
    pub fn handle_timeout(&mut self, now: Time, port: &mut Port, (bound, waits): (Epoch, Waits)) {
        if now < self.timeout(port.epoch(), waits, || bound) {
            return;
        }
        self.last_ping = Some(now);
        self.told = None;
        let is_calm = self.joined && waits == Waits::No;
        self.asked = is_calm.then_some((port.epoch(), bound));
        if !self.joined {
            port.send(
                self.root,
                Message::Join {
                    nonce: self.nonce,
                    role: self.role,
                    store: self.store,
                },
            );
            return;
        }
        if self.parent != self.root {
            if self.unanswered >= self.patience {
                self.attach += 1;
                self.patience = (2 * self.patience).min(PATIENCE_MAX);
                self.attached = false;
                self.unanswered = 0;
            }
            self.unanswered += 1;
        }
        if !self.attached {
            let (life, attach) = (port.life(), self.attach);
            port.send(self.parent, Message::Attach { life, attach });
        }
        let ping = Message::Ping {
            attach: self.attach,
            lower_bound: bound,
            view: self.view.id,
            waits,
            commit: self.commit,
        };
        // Until the aggregator's entry is confirmed the root is pinged, which keeps its hold fresh.
        if !self.attached || self.unanswered > UNANSWERED_MAX {
            self.pings += 1;
            port.send(self.root, ping.clone());
        }
        if self.attached {
            self.pings += 1;
            port.send(self.parent, ping);
        }
    }

    /// Processes Joined, Rejected, Attached and Pong.
    pub fn handle(&mut self, port: &mut Port, from: NodeId, body: &Message) -> Joined {
        match body {
            Message::Joined {
                nonce,
                life,
                floor,
                view,
            } if *nonce == self.nonce && !self.joined => {
                self.joined = true;
                port.join(*life, *floor);
                self.view = view.clone();
                Joined::Entered {
                    life: *life,
                    floor: *floor,
                }
            }
            Message::Rejected { nonce, reason } if *nonce == self.nonce && !self.joined => {
                Joined::Rejected(*reason)
            }
            Message::Attached { life, attach, .. }
                if *life == port.life() && *attach == self.attach =>
            {
                self.attached = true;
                self.unanswered = 0;
                Joined::Nothing
            }
            Message::Pong { view } => {
                if self.attached && from == self.parent {
                    // News that nobody asked for ends the rest: whoever told it takes it so.
                    self.told = self.asked.take();
                    self.unanswered = 0;
                    self.patience = UNANSWERED_MAX;
                }
                match view {
                    Some(view) if view.id > self.view.id => {
                        self.view = view.clone();
                        Joined::ViewChanged
                    }
                    _ => Joined::Nothing,
                }
            }
            _ => Joined::Nothing,
        }
    }

    /// Whether the newest view known says that a life was replaced or declared dead.
    #[must_use]
    pub fn is_evicted(&self, life: Life) -> bool {
        self.joined
            && self.view.seat(life.node).is_some_and(|s| {
                s.life.incarnation > life.incarnation || (s.life == life && !s.live)
            })
    }

    /// Newest view known, by number.
    #[must_use]
    pub fn view_id(&self) -> ViewId {
        self.view.id
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Incarnation;

    const ROOT: NodeId = NodeId(1);

    #[test]
    fn a_member_rests_only_while_it_would_say_what_was_answered() {
        let every = Intervals {
            ping: 10,
            rest: 100,
        };
        let mut member = Member::new(ROOT, ROOT, Role::Client, 7, every);
        let life = |incarnation| Life {
            node: NodeId(2),
            incarnation: Incarnation(incarnation),
        };
        let mut port = Port::new(life(0), ROOT, Epoch(0));
        member.handle_timeout(Time(0), &mut port, (Epoch(0), Waits::No));
        let joined = Message::Joined {
            nonce: 7,
            life: life(1),
            floor: Epoch(3),
            view: View::default(),
        };
        let due =
            |m: &Member, epoch, waits, bound| m.timeout(Epoch(epoch), waits, || Epoch(bound)).0;
        member.handle(&mut port, ROOT, &joined);
        let epoch = port.epoch().0;
        assert_eq!(
            due(&member, epoch, Waits::No, epoch),
            10,
            "it has told nothing"
        );

        let told = |m: &mut Member, port: &mut Port, at, waits| {
            m.handle_timeout(Time(at), port, (Epoch(epoch), waits));
        };
        told(&mut member, &mut port, 10, Waits::No);
        assert_eq!(due(&member, epoch, Waits::No, epoch), 20, "nobody answered");
        member.handle(&mut port, ROOT, &Message::Pong { view: None });
        assert_eq!(due(&member, epoch, Waits::No, epoch), 110);
        let mut with_news = member.clone();
        with_news.handle(&mut port, ROOT, &Message::Pong { view: None });
        assert_eq!(
            due(&with_news, epoch, Waits::No, epoch),
            20,
            "it is not taken for resting any more"
        );
        assert_eq!(
            due(&member, epoch + 1, Waits::No, epoch),
            20,
            "its epoch rose"
        );
        assert_eq!(
            due(&member, epoch, Waits::No, epoch - 1),
            20,
            "its bound moved"
        );
        assert_eq!(due(&member, epoch, Waits::Yes, epoch), 20, "it waits");
        member.connected(ROOT);
        assert_eq!(due(&member, epoch, Waits::No, epoch), 20);

        // Whoever answered one that waits does not take it for one at rest.
        told(&mut member, &mut port, 20, Waits::Yes);
        member.handle(&mut port, ROOT, &Message::Pong { view: None });
        assert_eq!(due(&member, epoch, Waits::No, epoch), 30);
        assert_eq!(member.pings(), 2);
    }
}
