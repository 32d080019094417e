//! How a node joins the cluster, pings its parent and learns the membership view.
//!
//! Pings go out at a fixed interval whether or not there is work (E4), carry the lower bound, and
//! are answered by the parent with the newest view if the member's is old. A lost ping costs one
//! interval; nothing is retransmitted.
//!
//! A member below an aggregator that gets no answers attaches anew, under the next number, and
//! pings the root until the aggregator has confirmed it (b.3 rule 5): the aggregator may be gone,
//! or may have restarted with an empty table, and then answers nobody it does not count.

use crate::effect::Port;
use crate::identity::{JoinRefusal, StoreMark};
use crate::ids::{Epoch, Life, NodeId, Step, Time, ViewId};
use crate::message::{Message, Role, View};

/// Pings to an aggregator in a row without an answer after which a member attaches anew. Each
/// further attempt waits twice as long, because an attachment takes two round trips and a number
/// that was given up is not confirmed any more.
const UNANSWERED_MAX: u32 = 3;
/// Most pings that an attempt waits.
const PATIENCE_MAX: u32 = 96;

/// Membership half of a node.
#[derive(Debug)]
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
    interval: u64,
    next_ping: Time,
    view: View,
    pings: u64,
    /// What a home has on disk.
    store: Option<StoreMark>,
    /// How far a home's history is durable, as this life knows.
    commit: Option<Step>,
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
    /// every `interval` ticks. `parent` is the root or an aggregator.
    #[must_use]
    pub fn new(root: NodeId, parent: NodeId, role: Role, nonce: u64, interval: u64) -> Member {
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
            interval,
            next_ping: Time(0),
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

    /// The root.
    #[must_use]
    pub fn root(&self) -> NodeId {
        self.root
    }

    /// When [`Member::handle_timeout`] wants to run.
    #[must_use]
    pub fn timeout(&self) -> Time {
        self.next_ping
    }

    /// Joins, attaches or pings, as the time has come, with the lower bound and whether anything
    /// waits for the minimum.
    pub fn handle_timeout(&mut self, now: Time, port: &mut Port, (bound, waits): (Epoch, bool)) {
        if now < self.next_ping {
            return;
        }
        self.next_ping = now.after(self.interval);
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
        // Until the aggregator's entry is confirmed the root is pinged, which keeps its hold fresh.
        let to = if self.attached {
            self.parent
        } else {
            self.root
        };
        self.pings += 1;
        port.send(
            to,
            Message::Ping {
                attach: self.attach,
                lower_bound: bound,
                view: self.view.id,
                waits,
                commit: self.commit,
            },
        );
    }

    /// Processes Joined, Rejected, Attached and Pong.
    pub fn handle(&mut self, port: &mut Port, body: &Message) -> Joined {
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
                if self.attached {
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

    /// Moves under another parent (b.3 rule 4): attach there before leaving the old one.
    pub fn reparent(&mut self, parent: NodeId) {
        self.parent = parent;
        self.attach += 1;
        self.attached = parent == self.root;
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
