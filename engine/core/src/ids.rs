//! Number spaces of the protocol, one newtype each so that none is mistaken for another.
//!
//! Source: the seeds' words (epoch, operation, node) and the table of number spaces in the
//! protocol notes: who owns a number, whether it is durable, what it is for.

use core::fmt;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty), $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

number!(
    /// Identity of a node, stable across its restarts. Assigned by configuration.
    NodeId(u32), "n"
);
number!(
    /// One life of a node. A larger incarnation proves every smaller one dead.
    Incarnation(u64), "i"
);
number!(
    /// Lamport-style epoch (seed 001, rules E1–E4). Never decreases at a node.
    Epoch(u64), "e"
);
number!(
    /// Reign of a root. Messages of an older term are ignored.
    Term(u64), "t"
);
number!(
    /// Per-source sequence of operations, from 1, without gaps within an incarnation.
    Seq(u64), "#"
);
number!(
    /// Per-source and per-destination sequence of updates, from 1, without gaps. A destination
    /// executes one source's updates in exactly this order.
    StreamSeq(u64), "@"
);
number!(
    /// Identity of a lock grant at its lock server. Rejects late and duplicated grants.
    GrantId(u64), "g"
);
number!(
    /// Version of an object at its home: how often it has been written, undo steps included.
    Version(u64), "v"
);
number!(
    /// Position in a destination's log. Positions are dense enough to compare, not to subtract.
    Lsn(u64), "l"
);
number!(
    /// A step of a destination: its shards' work of one step is durable as a whole. Increases over
    /// all of the node's lives; records of all its logs in the order of their steps are its history.
    Step(u64), "s"
);
number!(
    /// Number of a membership view of the root.
    ViewId(u64), "w"
);
number!(
    /// Virtual time in ticks. The hands decide what a tick is (one millisecond in the product).
    Time(u64), ""
);

/// A home's storage, told from every other one. Drawn by chance when it is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StorageId(pub u128);

impl fmt::Display for StorageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl Time {
    /// This moment and `ticks` more.
    #[must_use]
    pub fn after(self, ticks: u64) -> Time {
        Time(self.0.saturating_add(ticks))
    }

    /// Ticks from `earlier` until this moment; 0 when `earlier` lies in the future.
    #[must_use]
    pub fn since(self, earlier: Time) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl Epoch {
    /// The epoch after this one.
    #[must_use]
    pub fn next(self) -> Epoch {
        Epoch(self.0 + 1)
    }
}

/// A node in one of its lives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Life {
    /// Which node.
    pub node: NodeId,
    /// Which of its lives.
    pub incarnation: Incarnation,
}

impl fmt::Display for Life {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.node, self.incarnation.0)
    }
}

/// Seniority of work that takes locks: the smaller is the older. Given once and kept while the work
/// asks, gives back and asks again. See [`crate::lock`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Age {
    /// Epoch of the source when the work first asked.
    pub epoch: Epoch,
    /// How many pieces of work of the source asked before it.
    pub number: u64,
    /// The source.
    pub source: Life,
}

/// Unique tag of an operation, given by its first source and kept through proxies and resends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId {
    /// The source that stamped it, in the life in which it did.
    pub source: Life,
    /// Position among that life's operations.
    pub seq: Seq,
}

impl fmt::Display for OpId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.source, self.seq)
    }
}
