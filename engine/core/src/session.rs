//! What an application sees of a cluster: a session that submits operations and reads objects.
//!
//! Implemented by the client of a running cluster, by a simulated client, and by the offline
//! reader of a stopped cluster's state; applications such as the file tree are written against
//! this trait alone.
//!
//! Three words, never mixed: *executed* (the next tier has it in volatile state), *committed*
//! (durable at every participant), *stable* (the global minimum passed it; it can never be undone).

use alloc::vec::Vec;
use core::fmt;

use crate::ids::{Life, NodeId};
use crate::op::{Bytes, Key, Range, Refusal, Request, Stamp};

/// The nodes an application places objects on. Fixed for the life of a cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// Metadata servers, in configuration order.
    pub meta: Vec<NodeId>,
    /// Object servers, in configuration order.
    pub object: Vec<NodeId>,
}

/// One page of a scan: objects in key order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// The objects.
    pub entries: Vec<(Key, Bytes)>,
    /// Whether the range holds more objects after the last of `entries`.
    pub more: bool,
}

/// Why a session could not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SessionError {
    /// The request had no effect.
    Refused(Refusal),
    /// The session was closed, or its node is going down.
    Closed,
    /// The node that keeps the object cannot serve it.
    Unavailable {
        /// The home of the object.
        home: NodeId,
    },
}

impl fmt::Display for SessionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SessionError::Refused(Refusal::CheckFailed { check }) => {
                write!(f, "check {check} of the operation does not hold")
            }
            SessionError::Refused(Refusal::NotCovered) => {
                write!(
                    f,
                    "the operation names an object that none of its locks covers"
                )
            }
            SessionError::Refused(Refusal::Full { home }) => {
                write!(f, "server {home} is full and refuses new work")
            }
            SessionError::Refused(Refusal::Evicted) => write!(f, "this session was evicted"),
            SessionError::Closed => write!(f, "the session is closed"),
            SessionError::Unavailable { home } => write!(f, "server {home} is unavailable"),
        }
    }
}

impl core::error::Error for SessionError {}

/// A live connection of one application to a cluster.
///
/// Shared by threads. A blocking call returns once its answer is known, across crashes and
/// restarts of servers and proxies; it fails only when the session itself ends.
pub trait Session: Sync {
    /// Where objects may be placed.
    fn placement(&self) -> &Placement;

    /// The life under which this session stamps operations. No two lives of any node are equal,
    /// so it may be used to make identifiers that nobody else makes.
    fn life(&self) -> Life;

    /// Queues an operation and returns its ticket. Operations of one session take effect in the
    /// order of their tickets where they conflict. Blocks only for back-pressure.
    ///
    /// # Errors
    /// [`SessionError::Closed`] when the session has ended.
    fn submit(&self, request: Request) -> Result<Ticket, SessionError>;

    /// Waits until the operation of `ticket` has executed or was refused. Each ticket may be
    /// waited for once; a ticket that nobody waits for is forgotten when the session ends.
    ///
    /// # Errors
    /// The refusal, or [`SessionError::Closed`].
    fn wait(&self, ticket: Ticket) -> Result<Stamp, SessionError>;

    /// Waits until every operation submitted so far was refused or is *stable*.
    ///
    /// # Errors
    /// [`SessionError::Closed`], or the eviction that made stability unreachable.
    fn wait_stable(&self) -> Result<(), SessionError>;

    /// Reads one object under a shared lock on its slot. Sees every earlier operation of this
    /// session.
    ///
    /// # Errors
    /// [`SessionError::Unavailable`] or [`SessionError::Closed`].
    fn read(&self, home: NodeId, key: &Key) -> Result<Option<Bytes>, SessionError>;

    /// Reads objects of `range` in key order, after `after` if given, under a shared lock on the
    /// range, until about `bytes_max` bytes of values are gathered. A page holds at least one
    /// object where there is one.
    ///
    /// # Errors
    /// [`SessionError::Unavailable`] or [`SessionError::Closed`].
    fn scan(
        &self,
        home: NodeId,
        range: Range,
        after: Option<&Key>,
        bytes_max: usize,
    ) -> Result<Page, SessionError>;

    /// Asks for what [`scan`](Session::scan) returns; [`scanned`](Session::scanned) waits for it. A
    /// session that cannot do anything else meanwhile has it at once.
    fn scan_ahead(
        &self,
        home: NodeId,
        range: Range,
        after: Option<&Key>,
        bytes_max: usize,
    ) -> Scan {
        Scan::Done(self.scan(home, range, after, bytes_max))
    }

    /// Waits for what was asked for with [`scan_ahead`](Session::scan_ahead). What nobody waits for
    /// is kept until the session ends.
    ///
    /// # Errors
    /// As [`Session::scan`].
    fn scanned(&self, scan: Scan) -> Result<Page, SessionError> {
        match scan {
            Scan::Done(result) => result,
            Scan::Asked(_) => Err(SessionError::Closed),
        }
    }
}

/// A page that was asked for.
#[derive(Debug)]
pub enum Scan {
    /// The answer comes under this ticket.
    Asked(Ticket),
    /// The answer.
    Done(Result<Page, SessionError>),
}

/// Names a submitted operation until its outcome is fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);
