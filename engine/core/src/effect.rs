//! What a state machine asks of its hands, and the only place where envelopes are made.
//!
//! Invariants: E1 is applied by [`Port::receive`] before a message is processed, E2 by
//! [`Port::send`] to every message that leaves (I2, and S1 by construction: no message without a
//! stamp). m only rises, and only by the word of the highest term heard (I9). A message whose epoch
//! is not credible changes nothing; it is counted and answered, so both ends know of it (T7). A root
//! whose term is older than the highest heard was replaced: nothing that it says is heard (N10).
//!
//! Transport contract assumed of the hands: per peer a connection that delivers in order without
//! loss or duplication until it breaks, but that urgent messages ([`Message::is_urgent`]), in order
//! among themselves, may overtake others; a break loses a suffix in each direction; messages to a
//! peer without a connection are dropped. Every protocol step is therefore repeated from state
//! after a reconnect, and every step is idempotent.

use alloc::collections::VecDeque;

use crate::epoch::{Clock, Poisoned};
use crate::identity::JoinRefusal;
use crate::ids::{Epoch, Incarnation, Life, NodeId, Term};
use crate::message::{Envelope, Message};
use crate::op::{Bytes, Stamp};
use crate::session::{Page, SessionError, Ticket};
use crate::teeth::{Tooth, bites};

/// Something the hands must do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Send a message; drop it when there is no connection.
    Send {
        /// Receiver.
        to: NodeId,
        /// The message.
        envelope: Envelope,
    },
    /// Keep a connection to this node open, reconnecting for ever.
    Connect(NodeId),
    /// An operation executed or was refused.
    Outcome {
        /// Its ticket.
        ticket: Ticket,
        /// What became of it.
        result: Result<Stamp, SessionError>,
    },
    /// A read is answered.
    Value {
        /// Its ticket.
        ticket: Ticket,
        /// The value, if the object exists.
        result: Result<Option<Bytes>, SessionError>,
    },
    /// A scan is answered.
    Listing {
        /// Its ticket.
        ticket: Ticket,
        /// Objects in key order.
        result: Result<Page, SessionError>,
    },
    /// The root's state must become durable; answer with the version once it is.
    Persist {
        /// Increases with every state.
        version: u64,
        /// The encoded state.
        state: alloc::vec::Vec<u8>,
    },
    /// This life was evicted, or is a root that was replaced; the node must leave.
    Evicted,
    /// The root does not let this home in; the node must leave.
    Rejected(JoinRefusal),
}

/// What became of messages whose epoch is not credible (T7).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refusals {
    /// Messages of others that this node dropped.
    pub here: u64,
    /// Messages of this node that others say they dropped.
    pub elsewhere: u64,
    /// The sender and epoch of the newest that was dropped here.
    pub newest: Option<(Life, Epoch)>,
    /// Who said so last of a message of this node, and of which epoch.
    pub newest_elsewhere: Option<(Life, Epoch)>,
}

/// Why a message must be dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Its epoch is not credible.
    Poisoned(Poisoned),
    /// It is of a root that was replaced.
    OldRoot {
        /// The term of that root.
        term: Term,
    },
}

impl From<Poisoned> for Refused {
    fn from(poisoned: Poisoned) -> Refused {
        Refused::Poisoned(poisoned)
    }
}

/// A node's mouth and ears: identity, epoch, minimum, and the queue of effects.
#[derive(Clone, Debug)]
pub struct Port {
    life: Life,
    root: NodeId,
    clock: Clock,
    minimum: Epoch,
    term: Term,
    refusals: Refusals,
    /// Messages refused because their root was replaced.
    outdated: u64,
    out: VecDeque<Effect>,
}

impl Port {
    /// A port for `life` in the cluster of `root`, starting at `epoch`.
    #[must_use]
    pub fn new(life: Life, root: NodeId, epoch: Epoch) -> Port {
        Port {
            life,
            root,
            clock: Clock::starting_at(epoch),
            minimum: Epoch(0),
            term: Term(0),
            refusals: Refusals::default(),
            outdated: 0,
            out: VecDeque::new(),
        }
    }

    /// The node in its current life.
    #[must_use]
    pub fn life(&self) -> Life {
        self.life
    }

    /// The node.
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.life.node
    }

    /// The current epoch.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.clock.epoch()
    }

    /// Largest m heard.
    #[must_use]
    pub fn minimum(&self) -> Epoch {
        self.minimum
    }

    /// The newest life of the root that this node knows of, whoever it heard of it from. Its view does
    /// not name the root.
    #[must_use]
    pub fn root_life(&self) -> Life {
        Life {
            node: self.root,
            incarnation: Incarnation(self.term.0),
        }
    }

    /// Highest term heard.
    #[must_use]
    pub fn term(&self) -> Term {
        self.term
    }

    /// Messages dropped for an incredible epoch, here and elsewhere.
    #[must_use]
    pub fn refusals(&self) -> Refusals {
        self.refusals
    }

    /// Messages refused because the root that said them was replaced.
    #[must_use]
    pub fn outdated(&self) -> u64 {
        self.outdated
    }

    /// Enters a life with the floor the root gave.
    pub fn join(&mut self, life: Life, floor: Epoch) {
        assert_eq!(life.node, self.life.node, "a node joins as itself");
        self.life = life;
        self.clock.join(floor);
        self.minimum = self.minimum.max(floor);
    }

    /// E3.
    pub fn tick(&mut self) {
        self.clock.tick();
    }

    /// Raises the epoch to at least `epoch` (a server's ceiling, a shared stamp).
    pub fn raise(&mut self, epoch: Epoch) {
        self.clock.join(epoch);
    }

    /// The root publishes a minimum that is durable.
    pub fn publish(&mut self, term: Term, minimum: Epoch) {
        assert!(minimum >= self.minimum, "m never decreases");
        self.term = self.term.max(term);
        self.minimum = minimum;
    }

    /// E1 and the minimum, before the message is looked at.
    ///
    /// # Errors
    /// [`Refused`]: the message must be dropped. Whoever sent an epoch that is not credible is told.
    pub fn receive(&mut self, envelope: &Envelope) -> Result<(), Refused> {
        // A root speaks in its own term, all others in the newest that they have heard.
        let term = envelope.term;
        let is_old = envelope.from.node == self.root && term < self.term;
        let is_old = is_old && !bites(Tooth::OldRootHeard);
        match envelope.body {
            // The floor comes before the bound: a node may have been away for long (T7).
            Message::Joined { floor, .. } if self.life.incarnation == Incarnation(0) && !is_old => {
                self.clock.join(floor);
            }
            Message::Incredible { epoch } => {
                self.refusals.elsewhere += 1;
                self.refusals.newest_elsewhere = Some((envelope.from, epoch));
            }
            _ => {}
        }
        if let Err(poisoned) = self.clock.observe(envelope.epoch.max(envelope.minimum)) {
            let epoch = poisoned.epoch;
            self.refusals.here += 1;
            self.refusals.newest = Some((envelope.from, epoch));
            if !matches!(envelope.body, Message::Incredible { .. }) {
                self.send(envelope.from.node, Message::Incredible { epoch });
            }
            return Err(poisoned.into());
        }
        if is_old {
            self.outdated += 1;
            return Err(Refused::OldRoot { term });
        }
        if envelope.term >= self.term {
            self.term = envelope.term;
            self.minimum = self.minimum.max(envelope.minimum);
        }
        Ok(())
    }

    /// E2.
    pub fn send(&mut self, to: NodeId, body: Message) {
        let envelope = Envelope {
            from: self.life,
            epoch: self.clock.epoch(),
            minimum: self.minimum,
            term: self.term,
            body,
        };
        self.out.push_back(Effect::Send { to, envelope });
    }

    /// Queues another effect.
    pub fn ask(&mut self, effect: Effect) {
        self.out.push_back(effect);
    }

    /// The next effect, in order.
    pub fn poll(&mut self) -> Option<Effect> {
        self.out.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epoch::JUMP_MAX;
    use crate::message::View;

    fn life(node: u32, incarnation: u64) -> Life {
        Life {
            node: NodeId(node),
            incarnation: Incarnation(incarnation),
        }
    }

    fn envelope(from: Life, epoch: u64, minimum: u64, body: Message) -> Envelope {
        Envelope {
            from,
            epoch: Epoch(epoch),
            minimum: Epoch(minimum),
            term: Term(3),
            body,
        }
    }

    #[test]
    fn an_incredible_message_changes_nothing_and_both_ends_count_it() {
        let (liar, honest) = (life(7, 2), life(1, 4));
        let far = JUMP_MAX + 6;
        for (epoch, minimum) in [(far, 0), (5, far)] {
            let mut port = Port::new(honest, NodeId(9), Epoch(5));
            let pong = || Message::Pong { view: None };
            let refused = port.receive(&envelope(liar, epoch, minimum, pong()));
            let epoch = Epoch(far);
            assert_eq!(refused, Err(Poisoned { epoch }.into()));
            let state = (port.epoch(), port.minimum(), port.term());
            assert_eq!(state, (Epoch(5), Epoch(0), Term(0)));
            assert_eq!(port.refusals().here, 1);
            assert_eq!(port.refusals().newest, Some((liar, epoch)));
            let Some(Effect::Send {
                to,
                envelope: answer,
            }) = port.poll()
            else {
                panic!("the sender is told");
            };
            assert_eq!(
                (to, &answer.body),
                (liar.node, &Message::Incredible { epoch })
            );

            let mut other = Port::new(liar, NodeId(9), epoch);
            assert_eq!(other.receive(&answer), Ok(()));
            assert_eq!(other.refusals().elsewhere, 1);
            assert_eq!(other.refusals().newest_elsewhere, Some((honest, epoch)));
            assert_eq!(other.refusals().here, 0);
            assert_eq!(other.poll(), None);
        }
    }

    #[test]
    fn no_answer_to_an_answer() {
        let mut port = Port::new(life(1, 1), NodeId(9), Epoch(5));
        let body = Message::Incredible { epoch: Epoch(1) };
        port.receive(&envelope(life(2, 1), JUMP_MAX + 6, 0, body))
            .expect_err("not credible");
        assert_eq!(port.poll(), None);
        let Refusals {
            here, elsewhere, ..
        } = port.refusals();
        assert_eq!((here, elsewhere), (1, 1));
    }

    /// T7: "a (re)joining node takes its floor before the bound applies".
    #[test]
    fn a_node_that_was_away_for_long_can_join() {
        let mut port = Port::new(life(5, 0), NodeId(1), Epoch(1));
        let floor = Epoch(3 * JUMP_MAX);
        let joined = |floor| Message::Joined {
            nonce: 1,
            life: life(5, 9),
            floor,
            view: View::default(),
        };
        let told = envelope(life(1, 1), floor.0 + 20, floor.0, joined(floor));
        assert_eq!(port.receive(&told), Ok(()));
        assert_eq!(port.epoch(), Epoch(floor.0 + 20));
        port.join(life(5, 9), floor);
        // Once it has a life, nobody lifts the bound.
        let far = Epoch(floor.0 + 20 + JUMP_MAX + 1);
        let told = envelope(life(1, 1), far.0, 0, joined(far));
        port.receive(&told).expect_err("not credible");
        assert_eq!(port.epoch(), Epoch(floor.0 + 20));
    }

    #[test]
    fn a_root_of_an_older_term_is_not_heard() {
        let life = |node, incarnation| Life {
            node: NodeId(node),
            incarnation: Incarnation(incarnation),
        };
        let said = |from: Life, term, minimum| Envelope {
            from,
            epoch: Epoch(9),
            minimum: Epoch(minimum),
            term: Term(term),
            body: Message::Pong { view: None },
        };
        let mut port = Port::new(life(2, 1), NodeId(1), Epoch(0));
        assert_eq!(port.receive(&said(life(1, 1), 1, 3)), Ok(()));
        // A neighbour has heard the successor.
        assert_eq!(port.receive(&said(life(3, 1), 2, 5)), Ok(()));
        let term = Term(1);
        let refused = Err(Refused::OldRoot { term });
        assert_eq!(port.receive(&said(life(1, 1), 1, 7)), refused);
        assert_eq!((port.minimum(), port.outdated()), (Epoch(5), 1));
        // Whoever has not heard it yet is believed, but for m.
        assert_eq!(port.receive(&said(life(4, 1), 1, 7)), Ok(()));
        assert_eq!(port.receive(&said(life(1, 2), 2, 6)), Ok(()));
        assert_eq!((port.minimum(), port.outdated()), (Epoch(6), 1));
    }
}
