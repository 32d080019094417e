//! Connections between nodes: in order and without loss until they break.
//!
//! Only urgent messages overtake: as many of the others as chance will have it, none of their own
//! kind.
//!
//! One connection per pair. A break keeps a random prefix of what is in flight in each direction,
//! then the end of the connection is noticed; only after both sides noticed may it come up again.
//! A partition (possibly one way) holds messages back, and no connection comes up across it.
//!
//! The end of a process is noticed as over real queue pairs, which retry for ever: a peer with
//! nothing under way is none the wiser ([`Ghost`]). It hears from the next process at that address
//! that the connection is over, when it sends again or that process calls it. When a view names a
//! newer life than the connection's, the hands of a node send something by themselves.
//!
//! Deliberately absent: loss and any other reordering within a connection, which the transport repairs.

use std::collections::{BTreeMap, VecDeque};

use lowtide_engine_core::ids::Incarnation;

/// Something that travels in one direction of a connection.
#[derive(Clone, Debug)]
pub enum Item {
    /// The connection is up, seen by the receiving side.
    Up,
    /// An encoded envelope.
    Message {
        /// Its bytes.
        bytes: Vec<u8>,
        /// Whether it may overtake those that are not.
        is_urgent: bool,
    },
    /// The connection is over, seen by the receiving side.
    Down,
}

/// What one side knows of the connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Side {
    /// No connection, or its end was noticed.
    #[default]
    Closed,
    /// Coming up; `Item::Up` is on its way.
    Opening,
    /// Usable.
    Open,
}

/// One direction: what is in flight towards a receiver.
#[derive(Debug, Default)]
pub struct Lane {
    /// In flight, oldest first.
    pub queue: VecDeque<Item>,
    /// No delivery before this time: keeps the lane in order.
    pub last_at: u64,
    /// Held back by a partition until then.
    pub blocked_until: u64,
}

impl Lane {
    /// How many messages at the end of the lane an urgent one may overtake.
    #[must_use]
    pub fn overtakable(&self) -> usize {
        let is_ordinary = |item: &&Item| {
            matches!(
                item,
                Item::Message {
                    is_urgent: false,
                    ..
                }
            )
        };
        self.queue.iter().rev().take_while(is_ordinary).count()
    }
}

/// The process at one end is gone, and the other end does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ghost {
    /// Index within the pair of the side that does not know.
    pub side: usize,
    /// Newest incarnation that the node had whose process is gone.
    pub newest: Incarnation,
    /// Whether that process had joined.
    pub joined: bool,
    /// Something is under way, which the next process at that address answers.
    pub asks: bool,
}

/// The connection of one pair, index 0 for the lower node.
#[derive(Debug, Default)]
pub struct Link {
    /// State at the lower and the higher node.
    pub side: [Side; 2],
    /// Lanes towards the lower and the higher node.
    pub lane: [Lane; 2],
    /// The transport has given this connection up; what is sent is lost.
    pub broken: bool,
    /// It is given up at one side only.
    pub ghost: Option<Ghost>,
    /// Either side wants it, and an attempt is scheduled.
    pub dialing: bool,
    /// Wanted by the lower or the higher node.
    pub wanted: [bool; 2],
}

/// All connections.
#[derive(Debug, Default)]
pub struct Net {
    links: BTreeMap<(usize, usize), Link>,
}

/// Key of the pair and the index of `node` within it.
#[must_use]
pub fn pair(node: usize, peer: usize) -> ((usize, usize), usize) {
    if node < peer {
        ((node, peer), 0)
    } else {
        ((peer, node), 1)
    }
}

impl Net {
    /// The link of a pair, created on first use.
    pub fn link(&mut self, key: (usize, usize)) -> &mut Link {
        self.links.entry(key).or_default()
    }

    /// Pairs that have a link with `node`.
    #[must_use]
    pub fn pairs_of(&self, node: usize) -> Vec<(usize, usize)> {
        let keys = self.links.keys();
        keys.filter(|k| k.0 == node || k.1 == node)
            .copied()
            .collect()
    }

    /// All pairs.
    #[must_use]
    pub fn pairs(&self) -> Vec<(usize, usize)> {
        self.links.keys().copied().collect()
    }

    /// Whether `from` has a connection to `to`, and all that it has sent there has arrived.
    #[must_use]
    pub fn is_delivered(&self, from: usize, to: usize) -> bool {
        let (key, side) = pair(from, to);
        let link = self.links.get(&key);
        let is_open = |l: &&Link| l.side[side] == Side::Open && !l.broken;
        link.filter(is_open)
            .is_some_and(|l| l.lane[1 - side].queue.is_empty())
    }

    /// Whether any message is in flight.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.links
            .values()
            .all(|l| l.lane.iter().all(|lane| lane.queue.is_empty()))
    }
}
