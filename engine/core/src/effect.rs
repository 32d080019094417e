//! What a state machine asks of its hands, and the only place where envelopes are made.
//!
//! Invariants: E1 is applied by [`Port::receive`] before a message is processed, E2 by
//! [`Port::send`] to every message that leaves (I2, and S1 by construction: no message without a
//! stamp). m only rises, and only by the word of the highest term heard (I9). A root whose term is
//! older than that was replaced: nothing that it says is heard (N10).
//!
//! Transport contract assumed of the hands: per peer a connection that delivers in order without
//! loss or duplication until it breaks; a break loses a suffix in each direction; messages to a
//! peer without a connection are dropped. Every protocol step is therefore repeated from state
//! after a reconnect, and every step is idempotent.

use alloc::collections::VecDeque;

use crate::epoch::{Clock, Poisoned};
use crate::ids::{Epoch, Life, NodeId, Term};
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

    /// Highest term heard.
    #[must_use]
    pub fn term(&self) -> Term {
        self.term
    }

    /// Messages refused for an incredible epoch.
    #[must_use]
    pub fn poisoned(&self) -> u64 {
        self.clock.refused()
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
    /// [`Refused`]: the message must be dropped.
    pub fn receive(&mut self, envelope: &Envelope) -> Result<(), Refused> {
        self.clock.observe(envelope.epoch)?;
        // A root speaks in its own term, all others in the newest that they have heard.
        let term = envelope.term;
        let is_old = envelope.from.node == self.root && term < self.term;
        if is_old && !bites(Tooth::OldRootHeard) {
            self.outdated += 1;
            return Err(Refused::OldRoot { term });
        }
        if envelope.term >= self.term {
            self.term = envelope.term;
            if envelope.minimum > self.minimum {
                self.clock.observe(envelope.minimum)?;
                self.minimum = envelope.minimum;
            }
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
    use crate::ids::Incarnation;

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
