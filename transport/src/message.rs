//! Messages between processes: connections over reliable queue pairs.
//!
//! Owns: [`Endpoint`], the thing an engine holds: one device, its connections, its receive pool and
//! the wait for something to happen. A connection carries whole messages both
//! ways, in order, without loss or duplication, for as long as it lives; urgent ones
//! ([`EndpointCtx::send_urgent`]) in an order of their own.
//!
//! How it works. Each connection is a pair of RC queue pairs set up by the connection manager
//! (REQ, REP, RTU on queue pair 1, DREQ and DREP at the end). Messages of up to fifteen packets
//! travel as one SEND each, small ones together in one packet for as long as they wait (`parcel`);
//! receives are granted as credits (`connection`), so the peer never runs into an empty receive
//! queue. Longer messages stay where they are: the sender lends them (`loans`) and sends an offer,
//! the receiver READs them into memory of its own (`fetch`) and says that it has. So a receive never
//! needs more than 60 KiB, and a long message is copied once, by the receiver, if the sender has it
//! in shared memory. Short messages whose order to others does not matter, such as pings, can be sent
//! as urgent: they overtake whatever waits, and have credits of their own.
//!
//! All this goes over softroce, or over a device of libibverbs (`fabric`, [`EndpointConfig::device`]).
//! There a parcel is received whole and what is lent is copied once, into memory that any peer may
//! READ who kept a key; a peer that cannot be reached for half a second (adapters may take two), or
//! whose process is gone, ends the connection ([`CloseReason::Failed`]).
//!
//! What a caller may rely on:
//! * an endpoint belongs to one thread; only [`Waker`] crosses threads;
//! * [`EndpointCtx::send`] only queues; what is queued leaves in the next [`Endpoint::poll`];
//! * nothing is lost however long a peer pauses or is cut off, unless
//!   [`EndpointConfig::silence_max`] says otherwise. Who is dead is decided above; then
//!   [`close`](EndpointCtx::close) it. Two things end a connection from below: the peer's DREQ, and the news
//!   that the peer's process has been replaced ([`CloseReason::PeerRestarted`]). That news comes
//!   with the new process's REQ (its incarnation is larger), or as its answer to a packet for a
//!   queue pair that it does not have; so an idle connection to a peer that never calls back stays
//!   open until something is sent on it, were it only a [`probe`](EndpointCtx::probe). Through shared
//!   memory the end of the peer's process is seen at once ([`CloseReason::Failed`]);
//! * a message that is shorter than a packet is handed up where it arrived; a longer one is copied
//!   once. Its bytes are valid during the call of the handler; those of a fetched one can be kept
//!   ([`EndpointCtx::shared_message`]);
//! * memory is bounded by [`Limits`], whatever peers do: what does not fit is refused
//!   ([`SendError::WouldBlock`]) or waits its turn, and all of it is free again when the connection
//!   ends. A connection that breaks forgets what it lent and fetched; sending again is for above;
//! * memory that a device refuses to register is asked for again until it is there, or until nothing
//!   has been for five seconds in which nothing could come back: then the connection that needs it
//!   ends ([`CloseReason::NoMemory`]);
//! * a peer that breaks a rule of this layer loses its connection ([`Violation`], counted), and no
//!   other peer notices.
//!
//! Deliberately absent: WRITE (the receiver knows best when it has room, so it READs), reconnecting,
//! and the meaning of a hello.

mod connection;
mod endpoint;
mod fabric;
mod fetch;
mod handshake;
mod loans;
mod outbox;
mod parcel;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use self::endpoint::{Endpoint, EndpointCtx};
pub(crate) use self::fabric::Registrar;
pub(crate) use self::parcel::SLOT_LEN as PARCEL_ROOM;
pub use crate::device::Counters;
pub use crate::faults::Faults;
pub use crate::host::SameHost;
pub use crate::memory::Piece;
pub use crate::udp::SocketOptions;

/// Bytes of a caller's own in a hello.
pub const HELLO_MAX: usize = 32;

/// What an endpoint is made with.
#[derive(Debug, Clone)]
pub struct EndpointConfig {
    /// One address of this host, never the wildcard, and the UDP port: 4791 for RoCE, any other
    /// between our own ends, 0 for a free one.
    pub addr: SocketAddr,
    /// Who we are, for the peer's `Connected`; opaque here.
    pub node: u64,
    /// Larger than in any earlier life of this address.
    pub incarnation: u64,
    /// What peers that connect to us are told; at most [`HELLO_MAX`] bytes.
    pub hello: Vec<u8>,
    /// Bounds.
    pub limits: Limits,
    /// Injected faults.
    pub faults: Faults,
    /// How long `poll` spins before it sleeps, if the last one brought work. On a machine with
    /// fewer cores than busy processes, less is more.
    pub spin: Duration,
    /// A connection with unacknowledged data whose peer has not been heard for so long is closed;
    /// none: never.
    pub silence_max: Option<Duration>,
    /// Requested socket buffers and offloads.
    pub socket: SocketOptions,
    /// A pcap file to be written, of everything sent and everything with a right ICRC received.
    pub capture: Option<PathBuf>,
    /// How peers on this host are reached. By UDP in any case if there are faults or a capture.
    pub same_host: SameHost,
    /// A device of libibverbs instead of softroce, by name. `addr` is then an address of the
    /// device, and the UDP port is for connecting only; every peer must use a device, too.
    pub device: Option<String>,
}

impl EndpointConfig {
    /// Defaults for `addr`; the hello is empty.
    pub fn new(addr: SocketAddr, node: u64, incarnation: u64) -> EndpointConfig {
        EndpointConfig {
            addr,
            node,
            incarnation,
            hello: Vec::new(),
            limits: Limits::default(),
            faults: Faults::default(),
            spin: Duration::from_micros(20),
            silence_max: None,
            socket: SocketOptions::default(),
            capture: None,
            same_host: SameHost::Udp,
            device: None,
        }
    }
}

/// Bounds of an endpoint and its connections.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The longest message, in bytes; both ends should agree.
    pub message_max: usize,
    /// Parcels a peer may have under way to us per connection, 2 to 1024; besides, four urgent ones.
    pub credits: u16,
    /// Connections at once, both those we make and those we accept.
    pub connections_max: usize,
    /// Bytes of long messages that are lent to peers and not taken by them at once, over all
    /// connections; one connection may have a quarter, or one longest message.
    pub lent_max: usize,
    /// Bytes of long messages that are being fetched at once, shared in the same way. What has been
    /// handed up and is kept by the caller does not count.
    pub fetched_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            message_max: 1 << 20,
            credits: 64,
            connections_max: 1024,
            lent_max: 64 << 20,
            fetched_max: 64 << 20,
        }
    }
}

/// A connection of one endpoint; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnId(u64);

/// What the handler of [`Endpoint::poll`] is told.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The connection works, from both sides. From now on messages may be sent.
    Connected {
        /// Which: as returned by `connect`, or new.
        conn: ConnId,
        /// The peer's address and port.
        peer: SocketAddr,
        /// The peer's node, incarnation.
        node: u64,
        /// The peer's incarnation.
        incarnation: u64,
        /// Whether the peer called us.
        is_incoming: bool,
        /// What the peer said: `connect`'s hello, or its configuration's.
        hello: &'a [u8],
    },
    /// A message.
    Message {
        /// From which connection.
        conn: ConnId,
        /// Its bytes, valid during this call.
        bytes: &'a [u8],
    },
    /// After `WouldBlock`: there is room again.
    Writable {
        /// On which connection.
        conn: ConnId,
    },
    /// The connection is over; nothing more will come from it. Also the answer to a `connect` that
    /// was refused.
    Closed {
        /// Which.
        conn: ConnId,
        /// Why.
        reason: CloseReason,
    },
}

/// Why a connection ended. There is no such event after one's own `close`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum CloseReason {
    /// The peer closed it.
    PeerClosed,
    /// The peer's process was replaced by a later incarnation.
    PeerRestarted,
    /// The peer refused to connect: too many connections, or another version.
    Refused,
    /// Nothing was heard for [`EndpointConfig::silence_max`].
    Silent,
    /// The queue pair failed.
    Failed,
    /// The device refuses to register memory that the connection needs (`ulimit -l`), has done so for
    /// five seconds, and nothing of the endpoint's was under way whose end could free some.
    NoMemory,
    /// The peer sent what this layer does not allow.
    Violation(Violation),
}

/// What a peer did that this layer does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Violation {
    /// A parcel does not parse.
    Layout,
    /// Parcels are missing, repeated or mixed up.
    Sequence,
    /// More credits came back than were granted.
    Credits,
    /// A message is longer than [`Limits::message_max`], or longer or shorter than was said.
    Length,
    /// An offer is repeated, or one is missing.
    OfferOrder,
    /// More offers are open than is allowed.
    OfferFlood,
    /// The peer refuses to let us READ what it has offered: a wrong key, address or length.
    OfferKey,
    /// More was taken than had been offered, or less than before.
    Taken,
}

/// Why a message was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SendError {
    /// Not connected yet, or too much is under way; `Connected` or `Writable` will follow.
    WouldBlock,
    /// There is no such connection any more.
    Closed,
    /// Longer than [`Limits::message_max`].
    TooLarge,
}

impl fmt::Display for SendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SendError::WouldBlock => "the connection cannot take a message now",
            SendError::Closed => "the connection is closed",
            SendError::TooLarge => "the message is longer than the endpoint's limit",
        })
    }
}

impl std::error::Error for SendError {}

/// Why there is no endpoint.
#[derive(Debug)]
#[non_exhaustive]
pub enum BindError {
    /// Another process, or the kernel's own soft-RoCE, has the address and port: the words say who.
    AddrInUse(io::Error),
    /// The configuration contradicts itself.
    Config(&'static str),
    /// The operating system refused.
    Io(SocketAddr, io::Error),
    /// The device of libibverbs of this name cannot be used.
    Device(String, crate::raw::types::Error),
}

impl fmt::Display for BindError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BindError::AddrInUse(error) => error.fmt(f),
            BindError::Config(what) => f.write_str(what),
            BindError::Io(addr, error) => write!(f, "cannot bind UDP {addr}: {error}"),
            BindError::Device(name, error) => write!(f, "cannot use device {name}: {error}"),
        }
    }
}

impl std::error::Error for BindError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            BindError::Io(_, error) => Some(error),
            BindError::Device(_, error) => Some(error),
            _ => None,
        }
    }
}

/// Ends a `poll` of another thread's endpoint, or the next one if none is waiting.
#[derive(Debug, Clone)]
pub struct Waker(Arc<mio::Waker>);

impl Waker {
    /// Wakes the endpoint.
    ///
    /// # Errors
    /// What the operating system says; none is known for a live endpoint.
    pub fn wake(&self) -> io::Result<()> {
        self.0.wake()
    }
}
