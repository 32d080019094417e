//! What a client and a proxy have in common: connections to the tiers above (proxies and homes),
//! the sessions on them, and requests that those tiers have not answered yet.
//!
//! A session is opened once per connection: one Open is answered by one Opened; saying it twice
//! would make the tier above forget what it granted in between. Requests that were not answered
//! are asked again when a session is opened.
//!
//! Deliberately absent: which tier a home is reached through, and what an answer means.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

use crate::effect::{Effect, Port};
use crate::ids::{Age, Life, NodeId};
use crate::message::{Message, Reclaim};
use crate::op::{Key, Mode, Range};

/// Session with a tier above on the present connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Session {
    /// None, or the life that answered is dead.
    #[default]
    Closed,
    /// Open was said.
    Opening,
    /// Opened was heard.
    Open,
}

/// One tier above.
#[derive(Debug, Default)]
struct Hop {
    connected: bool,
    session: Session,
    /// Life that gave the grants held through this hop.
    life: Option<Life>,
    /// Life that the last Open claimed grants of.
    claimed: Option<Life>,
}

/// Connections to the tiers above.
#[derive(Debug, Default)]
pub(crate) struct Tiers {
    hops: BTreeMap<NodeId, Hop>,
    /// Whom the hands were asked to connect.
    dialed: BTreeSet<NodeId>,
}

impl Tiers {
    /// Asks the hands, once, for a connection.
    pub(crate) fn dial(&mut self, port: &mut Port, peer: NodeId) {
        if self.dialed.insert(peer) {
            port.ask(Effect::Connect(peer));
        }
    }

    /// A connection is up.
    pub(crate) fn connected(&mut self, peer: NodeId) {
        let hop = self.hops.entry(peer).or_default();
        hop.connected = true;
        hop.session = Session::Closed;
    }

    /// The connection broke.
    pub(crate) fn disconnected(&mut self, peer: NodeId) {
        if let Some(hop) = self.hops.get_mut(&peer) {
            hop.connected = false;
            hop.session = Session::Closed;
        }
    }

    /// Whether there is a connection and no session on it.
    pub(crate) fn may_open(&self, peer: NodeId) -> bool {
        let hop = self.hops.get(&peer);
        hop.is_some_and(|h| h.connected && h.session == Session::Closed)
    }

    /// Says Open.
    pub(crate) fn open(&mut self, port: &mut Port, peer: NodeId, reclaim: Vec<Reclaim>) {
        if let Some(hop) = self.hops.get_mut(&peer) {
            hop.session = Session::Opening;
            let known = hop.life;
            hop.claimed = known;
            port.send(peer, Message::Open { known, reclaim });
        }
    }

    /// Whether Open was said and not answered.
    pub(crate) fn is_opening(&self, peer: NodeId) -> bool {
        let hop = self.hops.get(&peer);
        hop.is_some_and(|h| h.session == Session::Opening)
    }

    /// Opened was heard from a life that counts.
    pub(crate) fn opened(&mut self, life: Life) {
        if let Some(hop) = self.hops.get_mut(&life.node) {
            hop.life = Some(life);
            hop.session = Session::Open;
        }
    }

    /// Opened was heard from a life that does not count, or on claims that are void by now.
    pub(crate) fn turned_away(&mut self, peer: NodeId) {
        if let Some(hop) = self.hops.get_mut(&peer) {
            hop.session = Session::Closed;
        }
    }

    /// The life behind the session is dead. An Open under way stays: it is for the next life, or
    /// will be answered by the dead one.
    pub(crate) fn void(&mut self, peer: NodeId) {
        if let Some(hop) = self.hops.get_mut(&peer) {
            if hop.session == Session::Open {
                hop.session = Session::Closed;
            }
            hop.life = None;
        }
    }

    /// Whether there is a session.
    pub(crate) fn is_open(&self, peer: NodeId) -> bool {
        let hop = self.hops.get(&peer);
        hop.is_some_and(|h| h.session == Session::Open)
    }

    /// The life that gave the grants held through a tier.
    pub(crate) fn life(&self, peer: NodeId) -> Option<Life> {
        self.hops.get(&peer).and_then(|h| h.life)
    }

    /// The life that the last Open claimed grants of.
    pub(crate) fn claimed(&self, peer: NodeId) -> Option<Life> {
        self.hops.get(&peer).and_then(|h| h.claimed)
    }

    /// Everybody who was ever connected.
    pub(crate) fn peers(&self) -> Vec<NodeId> {
        self.hops.keys().copied().collect()
    }

    /// Tiers with a session.
    pub(crate) fn sessions(&self) -> impl Iterator<Item = NodeId> + '_ {
        let open = self.hops.iter().filter(|(_, h)| h.session == Session::Open);
        open.map(|(&peer, _)| peer)
    }
}

/// What may be asked of a tier above.
#[derive(Clone, Debug)]
pub(crate) enum Query {
    /// A lock.
    Lock {
        home: NodeId,
        range: Range,
        mode: Mode,
        age: Age,
    },
    /// The value of an object.
    Read { home: NodeId, key: Key },
    /// Objects in key order.
    Scan {
        home: NodeId,
        range: Range,
        after: Option<Key>,
        bytes_max: u32,
    },
}

impl Query {
    /// The home that it is about.
    pub(crate) fn home(&self) -> NodeId {
        match self {
            Query::Lock { home, .. } | Query::Read { home, .. } | Query::Scan { home, .. } => *home,
        }
    }

    /// The message that asks it.
    pub(crate) fn message(&self, request: u64) -> Message {
        match self.clone() {
            Query::Lock {
                home,
                range,
                mode,
                age,
            } => Message::Lock {
                request,
                home,
                range,
                mode,
                age,
            },
            Query::Read { home, key } => Message::Read { request, home, key },
            Query::Scan {
                home,
                range,
                after,
                bytes_max,
            } => Message::Scan {
                request,
                home,
                range,
                after,
                bytes_max,
            },
        }
    }
}

/// Requests under way, each with what its answer is for.
#[derive(Debug)]
pub(crate) struct Requests<W> {
    next: u64,
    asked: BTreeMap<u64, (Query, W)>,
    /// Those among them that ask for locks.
    locks: BTreeSet<u64>,
}

impl<W> Default for Requests<W> {
    fn default() -> Requests<W> {
        Requests {
            next: 1,
            asked: BTreeMap::new(),
            locks: BTreeSet::new(),
        }
    }
}

impl<W> Requests<W> {
    /// Enters a request; returns its number.
    pub(crate) fn add(&mut self, query: Query, what_for: W) -> u64 {
        let request = self.next;
        self.next += 1;
        if matches!(query, Query::Lock { .. }) {
            self.locks.insert(request);
        }
        self.asked.insert(request, (query, what_for));
        request
    }

    /// A request was answered, or need not be.
    pub(crate) fn take(&mut self, request: u64) -> Option<(Query, W)> {
        self.locks.remove(&request);
        self.asked.remove(&request)
    }

    /// A request under way.
    pub(crate) fn get(&self, request: u64) -> Option<&Query> {
        self.asked.get(&request).map(|(query, _)| query)
    }

    /// How many are under way.
    pub(crate) fn len(&self) -> usize {
        self.asked.len()
    }

    /// Whether a lock that covers this one is asked for already, under no younger age: a younger
    /// request may wait for work that in turn waits for the older one.
    pub(crate) fn awaits(&self, home: NodeId, range: &Range, mode: Mode, age: Age) -> bool {
        self.locks.iter().filter_map(|r| self.get(*r)).any(|query| {
            matches!(query, Query::Lock { home: h, range: r, mode: m, age: a }
                if *h == home && r.contains(range) && *m >= mode && *a <= age)
        })
    }

    /// Requests that `of` selects, in the order in which they were made.
    pub(crate) fn select(&self, of: impl Fn(&Query, &W) -> bool) -> Vec<u64> {
        let chosen = self.asked.iter().filter(|(_, (query, w))| of(query, w));
        chosen.map(|(&request, _)| request).collect()
    }

    /// All queries, for status.
    pub(crate) fn queries(&self) -> impl Iterator<Item = &Query> {
        self.asked.values().map(|(query, _)| query)
    }
}
