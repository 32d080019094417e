//! Objects, updates and operations: the vocabulary shared by every role and by applications.
//!
//! An *object* is a key with a value at one home node. An *update* changes one object; an
//! *operation* is a set of updates, possibly at several nodes, that takes effect whole or not at
//! all (seed 001, "Definitions"). What a value means is the application's business.
//!
//! Objects live in *spaces*; within a space a 64-bit *slot* orders them, and locks cover ranges of
//! slots. Several objects may share a slot (names that hash alike): they share locks, nothing else.

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::ids::{Epoch, NodeId, OpId, StreamSeq};

pub use crate::bytes::Bytes;

/// Largest value of one update, in bytes. Larger data is many operations.
pub const VALUE_MAX: usize = 8 << 20;
/// Largest [`Key::name`], in bytes.
pub const NAME_MAX: usize = 1024;
/// Most updates in one operation.
pub const UPDATES_MAX: usize = 64;

/// Identity of an object: space, slot within the space, and a name that tells apart objects
/// sharing a slot. Ordered as its encoding: space, slot, name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Lock space (a directory's names, a server's inodes …), chosen by the application.
    pub space: u64,
    /// Coordinate that range locks cover.
    pub slot: u64,
    /// Distinguishes objects of one slot; may be empty; at most [`NAME_MAX`] bytes.
    pub name: Vec<u8>,
}

impl Key {
    /// A key without a name part.
    #[must_use]
    pub fn at(space: u64, slot: u64) -> Key {
        Key {
            space,
            slot,
            name: Vec::new(),
        }
    }

    /// The range that covers exactly this key's slot.
    #[must_use]
    pub fn range(&self) -> Range {
        Range {
            space: self.space,
            lo: self.slot,
            hi: self.slot,
        }
    }
}

/// Inclusive range of slots within one space: what locks cover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Range {
    /// The space.
    pub space: u64,
    /// First slot.
    pub lo: u64,
    /// Last slot, at least `lo`.
    pub hi: u64,
}

impl Range {
    /// Every slot of a space.
    #[must_use]
    pub fn whole(space: u64) -> Range {
        Range {
            space,
            lo: 0,
            hi: u64::MAX,
        }
    }

    /// Whether the two ranges share a slot.
    #[must_use]
    pub fn overlaps(&self, other: &Range) -> bool {
        self.space == other.space && self.lo <= other.hi && other.lo <= self.hi
    }

    /// Whether every slot of `other` lies in this range.
    #[must_use]
    pub fn contains(&self, other: &Range) -> bool {
        self.space == other.space && self.lo <= other.lo && other.hi <= self.hi
    }

    /// Whether `key` lies in this range.
    #[must_use]
    pub fn holds(&self, key: &Key) -> bool {
        self.space == key.space && (self.lo..=self.hi).contains(&key.slot)
    }
}

/// What an update does to its object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The object now has this value, whether or not it existed. Needs an exclusive lock.
    Put(Bytes),
    /// The object is gone, whether or not it existed. Needs an exclusive lock.
    Delete,
    /// Each of the object's little-endian i64 words is added the word at the same place here
    /// (wrapping; missing words count as 0; trailing bytes that fill no word are ignored).
    /// Commutes with itself, so it needs no lock; undone by the negated words.
    Add(Bytes),
}

/// One change of one object at its home.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Update {
    /// The node whose persistent storage keeps the object.
    pub home: NodeId,
    /// The object.
    pub key: Key,
    /// What happens to it.
    pub change: Change,
}

/// Lock mode. Two grants conflict when they overlap and at least one is exclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mode {
    /// Others may read.
    Shared,
    /// Nobody else may read or write.
    Exclusive,
}

/// A lock that an operation needs before it is stamped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want {
    /// Home of the objects in `range`.
    pub home: NodeId,
    /// What must be covered.
    pub range: Range,
    /// How.
    pub mode: Mode,
}

/// What a check demands of an object under the operation's locks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expect {
    /// No such object.
    Absent,
    /// The object exists.
    Present,
    /// The object exists with exactly this value.
    Value(Bytes),
}

/// A condition that decides whether an operation happens at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// Home of the object.
    pub home: NodeId,
    /// The object; it must be covered by one of the request's locks.
    pub key: Key,
    /// What must hold.
    pub expect: Expect,
}

/// An operation as an application asks for it: take `locks`, verify `checks` under them, then
/// effect all `updates` or none.
///
/// Every object that a check reads must be covered by a lock, and every object that a
/// [`Change::Put`] or [`Change::Delete`] names by an exclusive one; otherwise the request is
/// refused as [`Refusal::NotCovered`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Locks, in any order; they are acquired in one global order.
    pub locks: Vec<Want>,
    /// Conditions, evaluated once all locks are held.
    pub checks: Vec<Check>,
    /// The updates; at most one per key and at most [`UPDATES_MAX`].
    pub updates: Vec<Update>,
}

/// Identity and epoch that an operation received when it was stamped. The operation is *stable*
/// once the global minimum exceeds `epoch`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stamp {
    /// Tag of the operation.
    pub id: OpId,
    /// Its epoch.
    pub epoch: Epoch,
}

/// Why a request had no effect at all.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// A check did not hold; `check` is its index in [`Request::checks`].
    CheckFailed {
        /// Index of the failed check.
        check: usize,
    },
    /// An update or check is not covered by the request's locks, or a limit of this module is
    /// exceeded. A mistake of the caller.
    NotCovered,
    /// The home of a wanted lock refuses new work.
    Full {
        /// The node that refuses (log above high-water, disk full).
        home: NodeId,
    },
    /// This life of the session was evicted; nothing more is accepted from it.
    Evicted,
}

/// One participant of an operation: a home and the position of its part in the source's stream
/// to that home.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Participant {
    /// The home.
    pub node: NodeId,
    /// Position of this operation in the stream (source life, home).
    pub at: StreamSeq,
}

/// A stamped operation: what redo, windows and records hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// Its tag.
    pub id: OpId,
    /// Its epoch, fixed when it was stamped.
    pub epoch: Epoch,
    /// Epoch of the source's preceding operation (0 for the first of a life). Lets a resolver
    /// tell a vanished predecessor from one that is already stable.
    pub previous: Epoch,
    /// Every home that takes part, ascending by node, each with its stream position.
    pub participants: Vec<Participant>,
    /// Updates, in the order of the request; of each home all or none. A source has them all; who
    /// forwards or executes a part may lack those for other homes.
    pub updates: Vec<Update>,
}

impl Operation {
    /// Position of this operation in the stream to `home`, if it takes part.
    #[must_use]
    pub fn at(&self, home: NodeId) -> Option<StreamSeq> {
        self.participants
            .iter()
            .find(|p| p.node == home)
            .map(|p| p.at)
    }

    /// The updates for one home, in order.
    pub fn updates_for(&self, home: NodeId) -> impl Iterator<Item = &Update> {
        self.updates.iter().filter(move |u| u.home == home)
    }

    /// Homes other than `own` ones whose updates fit into `budget` bytes together, in order. A
    /// home's are taken all or not at all: half of a part completes nothing.
    pub fn carried(&self, own: impl Fn(NodeId) -> bool, budget: usize) -> Vec<NodeId> {
        let mut left = budget;
        let mut carried = Vec::new();
        for p in self.participants.iter().filter(|p| !own(p.node)) {
            let weights = self
                .updates_for(p.node)
                .map(|u| u.change.weight() + u.key.name.len());
            let (count, weight) = weights.fold((0, 0), |(n, sum), w| (n + 1, sum + w));
            if count > 0 && weight <= left {
                left -= weight;
                carried.push(p.node);
            }
        }
        carried
    }

    /// The operation as it is sent to `own` homes: with all their updates, and with those for other
    /// homes as [`Operation::carried`] says.
    #[must_use]
    pub fn sent_to(self: &Arc<Self>, own: impl Fn(NodeId) -> bool, budget: usize) -> Arc<Self> {
        let carried = self.carried(&own, budget);
        let goes = |u: &&Update| own(u.home) || carried.contains(&u.home);
        if self.updates.iter().all(|u| goes(&u)) {
            return self.clone();
        }
        Arc::new(Operation {
            id: self.id,
            epoch: self.epoch,
            previous: self.previous,
            participants: self.participants.clone(),
            updates: self.updates.iter().filter(goes).cloned().collect(),
        })
    }

    /// Bytes of values carried, for budgets.
    #[must_use]
    pub fn weight(&self) -> usize {
        self.updates
            .iter()
            .map(|u| u.change.weight() + u.key.name.len() + 48)
            .sum::<usize>()
            + 96
    }
}

impl Change {
    /// Bytes of value carried.
    #[must_use]
    pub fn weight(&self) -> usize {
        match self {
            Change::Put(value) | Change::Add(value) => value.len(),
            Change::Delete => 0,
        }
    }
}
