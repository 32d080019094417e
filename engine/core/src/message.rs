//! Every message of the protocol.
//!
//! A message leaves in an [`Envelope`], which can only be made by a node's [`crate::effect::Port`]
//! and thus always carries the sender's life, epoch (E2), minimum and term. The epoch of an
//! operation travels inside the operation, fixed when it was stamped; resends keep it.
//!
//! | group | messages | from → to |
//! |---|---|---|
//! | membership | Join, Joined, Rejected, Ping, Pong, Part | every node ↔ root (Ping, Pong also ↔ aggregator) |
//! | minimum | Report, Attach, Attached | aggregator ↔ root, member → aggregator |
//! | session | Open, Opened, Stream, Progress, Reint | source ↔ next tier (proxy or destination) |
//! | locks | Lock, Granted, Refused, Revoke, Unlock | source ↔ next tier |
//! | reads | Read, ReadReply, Scan, ScanReply | source ↔ next tier |
//! | proxy cluster | Pin, Pinned, Unpin | proxy ↔ proxy |
//! | eviction | Fence, Fenced, Resolve, Resolved, Complete, Drain, Drained, Gone, GoneAck | root ↔ destinations, proxies, clients |
//! | epochs | Incredible | any → any |
//!
//! No message exists for the minimum alone: m rides on every envelope, lower bounds on pings.
//!
//! Messages keep their order on a connection, but for [urgent](Message::is_urgent) ones.

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::identity::{JoinRefusal, StoreMark};
use crate::ids::{Age, Epoch, GrantId, Life, NodeId, Seq, Step, StreamSeq, Term, ViewId};
use crate::op::{Bytes, Key, Mode, Operation, Participant, Range};
use crate::room::RoomAt;
use crate::teeth::{Tooth, bites};
use crate::wire::{Malformed, Reader, Sink, Wire};
use crate::wire_struct;

/// Version of the encoding of messages.
pub const VERSION: u8 = 5;

/// What a node is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Membership, minimum, evictions.
    Root,
    /// Persistent destination (metadata or object server).
    Destination,
    /// Write-back cache between clients and destinations.
    Proxy,
    /// Where operations are born.
    Client,
    /// Inner node of the tree that reduces the minimum.
    Aggregator,
}

impl Role {
    /// Whether the node keeps nothing across restarts and is evicted when it dies.
    #[must_use]
    pub fn is_volatile_source(self) -> bool {
        matches!(self, Role::Proxy | Role::Client)
    }
}

impl Wire for Role {
    fn put(&self, out: &mut impl Sink) {
        out.push(match self {
            Role::Root => 0,
            Role::Destination => 1,
            Role::Proxy => 2,
            Role::Client => 3,
            Role::Aggregator => 4,
        });
    }
    fn take(input: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(match u8::take(input)? {
            0 => Role::Root,
            1 => Role::Destination,
            2 => Role::Proxy,
            3 => Role::Client,
            4 => Role::Aggregator,
            _ => return Err(Malformed { what: "role" }),
        })
    }
}

/// What a member waits for m for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Waits {
    /// It does not.
    #[default]
    No,
    /// To let something go.
    Yes,
    /// For room: a home lets nothing new in, because its log is full of what m holds.
    ForRoom,
}

impl From<bool> for Waits {
    fn from(waits: bool) -> Waits {
        if waits { Waits::Yes } else { Waits::No }
    }
}

impl Wire for Waits {
    fn put(&self, out: &mut impl Sink) {
        out.push(match self {
            Waits::No => 0,
            Waits::Yes => 1,
            Waits::ForRoom => 2,
        });
    }
    fn take(input: &mut Reader<'_>) -> Result<Self, Malformed> {
        match u8::take(input)? {
            0 => Ok(Waits::No),
            1 => Ok(Waits::Yes),
            2 => Ok(Waits::ForRoom),
            _ => Err(Malformed { what: "waits" }),
        }
    }
}

/// One row of the root's membership view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seat {
    /// The node in its newest life.
    pub life: Life,
    /// What it is.
    pub role: Role,
    /// Whether that life is a member; false while it is being evicted and after it parted.
    pub live: bool,
}
wire_struct!(Seat { life, role, live });

/// The root's membership, numbered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Increases with every change.
    pub id: ViewId,
    /// Ascending by node.
    pub seats: Vec<Seat>,
}
wire_struct!(View { id, seats });

impl View {
    /// The row of a node.
    #[must_use]
    pub fn seat(&self, node: NodeId) -> Option<&Seat> {
        self.seats.iter().find(|s| s.life.node == node)
    }
}

/// Cumulative state of one stream (source life → home): positions up to and including.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamState {
    /// The source life.
    pub source: Life,
    /// The home.
    pub home: NodeId,
    /// Executed by the sender of this state (volatile there).
    pub executed: StreamSeq,
    /// Committed at the home.
    pub committed: StreamSeq,
}
wire_struct!(StreamState {
    source,
    home,
    executed,
    committed
});

/// A grant that a holder re-establishes after its lock server restarted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reclaim {
    /// Home of the range.
    pub home: NodeId,
    /// What is held.
    pub range: Range,
    /// How.
    pub mode: Mode,
    /// The grant's id before the restart.
    pub grant: GrantId,
}
wire_struct!(Reclaim {
    home,
    range,
    mode,
    grant
});

/// What a destination or proxy tells the resolver about one operation of a fenced life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// The operation's position at its source.
    pub seq: Seq,
    /// Its epoch.
    pub epoch: Epoch,
    /// Epoch of the source's preceding operation.
    pub previous: Epoch,
    /// Its participants.
    pub participants: Vec<Participant>,
    /// Homes whose updates the holder could send in full.
    pub supplies: Vec<NodeId>,
}
wire_struct!(Held {
    seq,
    epoch,
    previous,
    participants,
    supplies
});

/// Why a lock is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockRefusal {
    /// The home has no room for new work (log above high-water, disk full).
    Full,
    /// The asker's life is fenced.
    Fenced,
}

impl Message {
    /// Whether it may overtake all others on its connection: so the bounds and the health of a node
    /// are heard of while it has much else to say. Pings, reports and answers without a view tell
    /// how things stand, the next of their kind supersedes them, and they may get lost. They keep their
    /// order among themselves. Whatever is answered, counted or done keeps its place: a view too, which
    /// an aggregator compares with the attachments that came before it.
    #[must_use]
    pub fn is_urgent(&self) -> bool {
        match self {
            Message::Ping { .. } | Message::Report { .. } | Message::Pong { view: None } => true,
            Message::Progress { .. } => bites(Tooth::ProgressUrgent),
            _ => false,
        }
    }
}

impl Wire for LockRefusal {
    fn put(&self, out: &mut impl Sink) {
        out.push(match self {
            LockRefusal::Full => 0,
            LockRefusal::Fenced => 1,
        });
    }
    fn take(input: &mut Reader<'_>) -> Result<Self, Malformed> {
        match u8::take(input)? {
            0 => Ok(LockRefusal::Full),
            1 => Ok(LockRefusal::Fenced),
            _ => Err(Malformed {
                what: "lock refusal",
            }),
        }
    }
}

/// One operation's parts for some of its homes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parts {
    /// The homes that shall execute it, ascending.
    pub homes: Vec<NodeId>,
    /// The operation, with all updates for these homes and, if they are small, those for others,
    /// so that whoever holds it can complete it elsewhere.
    pub op: Arc<Operation>,
}
wire_struct!(Parts { homes, op });

/// A stream that a source (or a proxy for it) is about to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamBase {
    /// The source life.
    pub source: Life,
    /// The home.
    pub home: NodeId,
    /// Lowest position that may still be sent; all lower ones are committed.
    pub base: StreamSeq,
}
wire_struct!(StreamBase { source, home, base });

/// A member's bound as carried by an aggregator's report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Covered {
    /// The member.
    pub life: Life,
    /// The attachment that the report covers.
    pub attach: u32,
}
wire_struct!(Covered { life, attach });

macro_rules! messages {
    ($( $(#[$doc:meta])* $kind:literal $name:ident { $( $(#[$fdoc:meta])* $field:ident: $ty:ty ),* $(,)? } )*) => {
        /// Body of a message.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub enum Message {
            $( $(#[$doc])* $name { $( $(#[$fdoc])* $field: $ty ),* } ),*
        }

        impl Message {
            /// Name of the kind, for traces and counters.
            #[must_use]
            pub fn name(&self) -> &'static str {
                match self { $( Message::$name { .. } => stringify!($name) ),* }
            }
        }

        impl Wire for Message {
            fn put(&self, out: &mut impl Sink) {
                match self {
                    $( Message::$name { $($field),* } => {
                        out.push($kind);
                        $( $field.put(out); )*
                    } ),*
                }
            }
            fn take(input: &mut Reader<'_>) -> Result<Self, Malformed> {
                match u8::take(input)? {
                    $( $kind => Ok(Message::$name { $( $field: <$ty as Wire>::take(input)? ),* }), )*
                    _ => Err(Malformed { what: "message kind" }),
                }
            }
        }
    };
}

messages! {
    /// A node asks the root for an incarnation.
    1 Join {
        /// Tells this process start from every other one of the node.
        nonce: u64,
        /// What the node is.
        role: Role,
        /// What it has on disk, if it is a home.
        store: Option<StoreMark>,
    }
    /// The root admits a node.
    2 Joined {
        /// The nonce of the Join.
        nonce: u64,
        /// The life that was admitted.
        life: Life,
        /// The minimum below which it must not issue.
        floor: Epoch,
        /// Membership.
        view: View,
    }
    /// Health ping of a member to its parent; E4.
    3 Ping {
        /// Attachment that this report belongs to.
        attach: u32,
        /// Lower bound on the epochs of unfinished and future operations.
        lower_bound: Epoch,
        /// Newest view the member knows.
        view: ViewId,
        /// What the member waits for the minimum for.
        waits: Waits,
        /// How far a home's history is durable ([`StoreMark::commit`]), once this life knows.
        commit: Option<Step>,
    }
    /// Answer to a ping.
    4 Pong {
        /// Membership, if the member's is old.
        view: Option<View>,
    }
    /// The root does not admit a home, because its storage cannot be the one that it had.
    9 Rejected {
        /// The nonce of the Join.
        nonce: u64,
        /// Why.
        reason: JoinRefusal,
    }
    /// A member leaves on purpose; what it left unfinished is resolved like a dead one's.
    8 Part {
        /// The life that ends.
        life: Life,
    }
    /// A member asks to be counted through an aggregator; forwarded by it to the root.
    5 Attach {
        /// The member.
        life: Life,
        /// Number of the attachment, increasing.
        attach: u32,
    }
    /// The root has recorded the attachment.
    6 Attached {
        /// The member.
        life: Life,
        /// The attachment.
        attach: u32,
        /// Bound at which the aggregator's entry starts.
        floor: Epoch,
    }
    /// An aggregator's bound over its children.
    7 Report {
        /// Minimum over the children.
        lower_bound: Epoch,
        /// The child whose bound that is; `None` if it is the aggregator's own epoch.
        lowest: Option<Life>,
        /// The children it covers.
        covers: Vec<Covered>,
        /// Newest view known.
        view: ViewId,
        /// What the children wait for the minimum for.
        waits: Waits,
    }
    /// A source opens its session with the next tier, after every connect.
    10 Open {
        /// Life of the next tier that the grants below come from.
        known: Option<Life>,
        /// Grants to re-establish.
        reclaim: Vec<Reclaim>,
    }
    /// The next tier accepts the session.
    11 Opened {
        /// The life that answers; grants of an older life are void unless reclaimed.
        life: Life,
    }
    /// Announces a stream before its first part on this connection. Answered by Progress.
    12 Stream {
        /// The stream.
        base: StreamBase,
    }
    /// Cumulative progress of streams.
    13 Progress {
        /// State of each stream that changed.
        streams: Vec<StreamState>,
        /// Homes that have room for new work. All others have none now, or are not known to; what is
        /// stamped is taken all the same.
        room: Vec<RoomAt>,
    }
    /// Reintegrate: a batch of one source node's windows for one next tier.
    14 Reint {
        /// Operations that the sender stamped, up to and including this one, are everywhere
        /// committed: nobody will ask for them, whatever m is.
        done: Seq,
        /// Parts, in stream order per stream.
        parts: Vec<Parts>,
    }
    /// Asks for a lock.
    20 Lock {
        /// Names the request at its sender.
        request: u64,
        /// Home of the range.
        home: NodeId,
        /// What must be covered.
        range: Range,
        /// How.
        mode: Mode,
        /// Age of the work that it is for.
        age: Age,
    }
    /// Grants a lock; RepLOCK of seed 001.
    21 Granted {
        /// The request.
        request: u64,
        /// Home of the range.
        home: NodeId,
        /// The grant.
        grant: GrantId,
        /// What is covered: at least what was asked, the widest uncontended range.
        range: Range,
        /// How.
        mode: Mode,
        /// Whether no object exists in the range.
        empty: bool,
    }
    /// Refuses a lock.
    22 Refused {
        /// The request.
        request: u64,
        /// Why.
        reason: LockRefusal,
    }
    /// Asks a holder to yield part of a grant.
    23 Revoke {
        /// Home of the range.
        home: NodeId,
        /// The grant.
        grant: GrantId,
        /// What to yield.
        range: Range,
        /// Age of the work that wants it.
        age: Age,
    }
    /// Yields part of a grant. Sent only after every operation stamped under it has executed.
    24 Unlock {
        /// Home of the range.
        home: NodeId,
        /// The grant.
        grant: GrantId,
        /// What is yielded.
        range: Range,
    }
    /// Reads one object.
    25 Read {
        /// Names the request at its sender.
        request: u64,
        /// Home of the object.
        home: NodeId,
        /// The object.
        key: Key,
    }
    /// Answers a read.
    26 ReadReply {
        /// The request.
        request: u64,
        /// The value, if the object exists.
        value: Option<Bytes>,
    }
    /// Reads objects in key order.
    27 Scan {
        /// Names the request at its sender.
        request: u64,
        /// Home of the range.
        home: NodeId,
        /// Where to look.
        range: Range,
        /// Continue after this key.
        after: Option<Key>,
        /// About how many bytes of values to return.
        bytes_max: u32,
    }
    /// Answers a scan.
    28 ScanReply {
        /// The request.
        request: u64,
        /// Objects in key order.
        entries: Vec<(Key, Bytes)>,
        /// Whether more follow.
        more: bool,
    }
    /// A coordinating proxy asks another to hold its bound down (pin-then-max).
    30 Pin {
        /// Names the round at the coordinator.
        round: u64,
    }
    /// The pinned epoch.
    31 Pinned {
        /// The round.
        round: u64,
        /// Epoch at which the proxy is pinned.
        at: Epoch,
    }
    /// The round's operation was sent before this, or the round is abandoned: let go.
    32 Unpin {
        /// The round.
        round: u64,
    }
    /// Refuse everything of a life from now on, and say what you hold of it.
    40 Fence {
        /// The life.
        victim: Life,
        /// Round of fencing and deciding; increases for a victim when a decision is revised.
        round: u32,
    }
    /// The fence and every listed operation are durable here.
    41 Fenced {
        /// The life.
        victim: Life,
        /// The round of the Fence.
        round: u32,
        /// Operations held, ascending by seq.
        held: Vec<Held>,
    }
    /// The logged decision: operations up to `through` are completed, later ones undone.
    42 Resolve {
        /// The life.
        victim: Life,
        /// The round that led to the decision.
        round: u32,
        /// Last operation that survives.
        through: Seq,
        /// Where the receiver's stream must end, if any surviving operation involves it.
        until: StreamSeq,
        /// Operations whose parts the receiver must send to the named homes, ascending.
        supply: Vec<(Seq, NodeId)>,
    }
    /// The receiver's state agrees with the decision, durably.
    43 Resolved {
        /// The life.
        victim: Life,
        /// The round of the Resolve.
        round: u32,
    }
    /// A holder sends an operation to a participant that lacks it, by order of a Resolve.
    44 Complete {
        /// The operation.
        op: Arc<Operation>,
    }
    /// Asks a client whether it still depends on locks of a dead proxy.
    45 Drain {
        /// The dead proxy.
        victim: Life,
    }
    /// Nothing stamped under that proxy's locks is unfinished, and none is used any more.
    46 Drained {
        /// The dead proxy.
        victim: Life,
    }
    /// The life is resolved everywhere: release its locks, forget its streams.
    47 Gone {
        /// The life.
        victim: Life,
    }
    /// The locks are released, durably.
    48 GoneAck {
        /// The life.
        victim: Life,
    }
    /// A message of the receiver's was dropped, because its epoch or its m is not credible (T7).
    50 Incredible {
        /// The larger of the two.
        epoch: Epoch,
    }
}

/// A message with what every message carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// Sender; incarnation 0 before it has joined.
    pub from: Life,
    /// The sender's epoch (E2).
    pub epoch: Epoch,
    /// The sender's copy of the global minimum.
    pub minimum: Epoch,
    /// Term of the root that published it.
    pub term: Term,
    /// The message.
    pub body: Message,
}
wire_struct!(Envelope {
    from,
    epoch,
    minimum,
    term,
    body
});
