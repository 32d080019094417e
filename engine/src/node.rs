//! A node: one role of the protocol on one address, with its threads.
//!
//! The engine thread owns the transport endpoint and the role's state machine and never blocks on
//! anything but the wait for input. Logs, extents and checkpoints are synced on threads of their
//! own ([`crate::storage`]); applications talk through [`SessionHandle`].

mod core;
mod link;
pub(crate) mod rootfile;
mod run;

pub(crate) use run::process_nonce;

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crossbeam_channel::Sender;
use lowtide_engine_core::destination::shard::SHARDS_MAX;
use lowtide_engine_core::identity::JoinRefusal;
use lowtide_engine_core::ids::NodeId;
use lowtide_engine_core::session::Placement;
use lowtide_transport::message::{BindError, SameHost, Waker};
use serde::{Deserialize, Serialize};

use crate::medium::Volume;
use crate::session::{Command, SessionHandle, Shared};
use crate::status::Status;
use crate::storage::StorageError;

/// What a node is in the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Membership, minimum, evictions.
    Root,
    /// Metadata server: a persistent destination.
    Meta,
    /// Object server: a persistent destination.
    Object,
    /// Write-back cache between clients and servers.
    Proxy,
    /// Library client.
    Client,
    /// Aggregator of the health tree.
    Router,
}

impl Role {
    /// The role in lower case.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Role::Root => "root",
            Role::Meta => "meta",
            Role::Object => "object",
            Role::Proxy => "proxy",
            Role::Client => "client",
            Role::Router => "router",
        }
    }

    /// Whether the role keeps state on disk.
    #[must_use]
    pub fn is_persistent(self) -> bool {
        matches!(self, Role::Root | Role::Meta | Role::Object)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A node as every node of the cluster knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Number, unique in the cluster.
    pub id: NodeId,
    /// What it is.
    pub role: Role,
    /// Where it listens.
    pub addr: SocketAddr,
}

/// Settings of a node.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Its number.
    pub id: NodeId,
    /// What it is.
    pub role: Role,
    /// Where it listens.
    pub addr: SocketAddr,
    /// Persistent state; required for persistent roles, unused otherwise.
    pub dir: Option<PathBuf>,
    /// A server's state instead of the files in `dir`: a medium that fails on purpose, say.
    pub volume: Option<Arc<dyn Volume>>,
    /// The whole cluster, this node included.
    pub peers: Vec<Peer>,
    /// Homes that a client reaches through a proxy; others are reached directly.
    pub via: Vec<(NodeId, NodeId)>,
    /// Where pings go instead of the root: an aggregator.
    pub parent: Option<NodeId>,
    /// Datagrams lost on the way out, in percent, for fault injection.
    pub loss_percent: f64,
    /// Seed of injected faults.
    pub seed: u64,
    /// Keep what a power failure could take back, for fault injection.
    pub power_fail: bool,
    /// Milliseconds between pings, while anything moves.
    pub ping_interval_ms: u64,
    /// The same at rest: while the node waits for nothing and has said so.
    pub rest_interval_ms: u64,
    /// Milliseconds of silence, or of holding m back while a log has no room, after which the root
    /// evicts a client or proxy.
    pub evict_after_ms: u64,
    /// Most bytes of other participants' updates in one log record.
    pub carry_bytes: usize,
    /// Shards of a persistent server, 1 to 64; each but a single one has a thread of its own. May
    /// differ from the last start.
    pub shards: u32,
    /// A pcap file to be written, of what the node sends and accepts.
    pub capture: Option<PathBuf>,
    /// How peers on this host are reached; by UDP if packets are lost on purpose or captured.
    pub same_host: SameHost,
    /// A device of libibverbs instead of softroce, by name; then all nodes need one.
    pub device: Option<String>,
}

impl NodeConfig {
    /// Defaults for a node.
    #[must_use]
    pub fn new(id: NodeId, role: Role, addr: SocketAddr) -> NodeConfig {
        NodeConfig {
            id,
            role,
            addr,
            dir: None,
            volume: None,
            peers: Vec::new(),
            via: Vec::new(),
            parent: None,
            loss_percent: 0.0,
            seed: 0,
            power_fail: false,
            ping_interval_ms: 20,
            rest_interval_ms: 200,
            evict_after_ms: 30_000,
            carry_bytes: 64 << 10,
            shards: default_shards(),
            capture: None,
            same_host: SameHost::Udp,
            device: None,
        }
    }

    fn root(&self) -> Option<NodeId> {
        self.peers
            .iter()
            .find(|p| p.role == Role::Root)
            .map(|p| p.id)
    }

    fn placement(&self) -> Placement {
        let of = |role| {
            self.peers
                .iter()
                .filter(move |p| p.role == role)
                .map(|p| p.id)
                .collect()
        };
        Placement {
            meta: of(Role::Meta),
            object: of(Role::Object),
        }
    }
}

/// As many shards as there are cores to run on.
fn default_shards() -> u32 {
    let cores = std::thread::available_parallelism();
    cores.map_or(1, |n| (n.get() as u32).min(SHARDS_MAX))
}

/// Why a node cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The configuration contradicts itself.
    #[error("configuration: {0}")]
    Config(&'static str),
    /// The address cannot be had.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The persistent state cannot be opened.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The root's state cannot be read.
    #[error("root state: {0}")]
    Root(String),
    /// A thread cannot be started.
    #[error("cannot start the engine thread: {0}")]
    Thread(std::io::Error),
}

/// Why a node left by itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum NodeError {
    /// Its life was evicted, and a restart joins as a new one; or it is a root and another has taken
    /// its place.
    #[error("this life was evicted from the cluster, or is a root that another has replaced")]
    Evicted,
    /// The root knows another storage of this node.
    #[error(
        "its storage is another than the cluster knows ({known}): it was wiped, or is another \
         node's; put back the directory as this node left it last. The cluster waits for what it held"
    )]
    OtherStorage {
        /// The one that the node had, in hexadecimal.
        known: String,
    },
    /// The root knows of work that this node's storage had and lacks now.
    #[error(
        "its storage is older than the cluster knows (it once had step {known}): it is an old copy; \
         put back the directory as this node left it last. The cluster waits for what it held"
    )]
    OlderStorage {
        /// The step that it had at least.
        known: u64,
    },
    /// Its storage failed; nothing was acknowledged after that.
    #[error("storage failed: {0}")]
    Storage(String),
    /// Its socket failed.
    #[error("transport failed: {0}")]
    Transport(String),
}

impl From<JoinRefusal> for NodeError {
    fn from(reason: JoinRefusal) -> NodeError {
        match reason {
            JoinRefusal::OtherStorage { known } => NodeError::OtherStorage {
                known: known.to_string(),
            },
            JoinRefusal::OlderStorage { known } => NodeError::OlderStorage { known: known.0 },
        }
    }
}

/// What the engine thread publishes.
#[derive(Debug, Default)]
struct Board {
    status: Status,
    failure: Option<NodeError>,
}

/// A running node. Dropping it stops the node.
#[derive(Debug)]
pub struct NodeHandle {
    commands: Sender<Command>,
    waker: Waker,
    board: Arc<Mutex<Board>>,
    shared: Arc<Shared>,
    placement: Placement,
    thread: Option<JoinHandle<()>>,
}

/// Starts a node: opens its state, binds its address, and begins to join.
///
/// # Errors
/// See [`StartError`].
pub fn start(config: NodeConfig) -> Result<NodeHandle, StartError> {
    let placement = config.placement();
    let board = Arc::new(Mutex::new(Board::default()));
    let shared = Shared::new();
    let (commands, incoming) = crossbeam_channel::bounded(4096);
    let engine = run::Engine::new(config, incoming, board.clone(), shared.clone())?;
    let waker = engine.waker();
    let thread = std::thread::Builder::new()
        .name("lowtide-engine".to_owned())
        .spawn(move || engine.run())
        .map_err(StartError::Thread)?;
    Ok(NodeHandle {
        commands,
        waker,
        board,
        shared,
        placement,
        thread: Some(thread),
    })
}

impl NodeHandle {
    /// The newest status, at most some 20 ms old.
    #[must_use]
    pub fn status(&self) -> Status {
        self.board
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .status
            .clone()
    }

    /// Why the node left by itself, if it did.
    #[must_use]
    pub fn failure(&self) -> Option<NodeError> {
        self.board
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .failure
            .clone()
    }

    /// The session of a client node. On other roles every call fails as closed.
    #[must_use]
    pub fn session(&self) -> SessionHandle {
        let (shared, commands) = (self.shared.clone(), self.commands.clone());
        SessionHandle::new(shared, commands, self.waker.clone(), self.placement.clone())
    }

    /// Fault injection: drop everything from and to a peer, or stop doing so.
    pub fn set_blocked(&self, peer: NodeId, blocked: bool) {
        self.command(Command::Block { peer, blocked });
    }

    /// At the root: this node's process is known to have ended.
    pub fn declare_dead(&self, node: NodeId) {
        self.command(Command::DeclareDead { node });
    }

    /// Stops the node: a client parts from the cluster, a server commits what it has.
    ///
    /// # Errors
    /// Why the node had left by itself before.
    pub fn stop(mut self) -> Result<(), NodeError> {
        self.join();
        self.failure().map_or(Ok(()), Err)
    }

    fn command(&self, command: Command) {
        // A node that has left takes no commands; its failure says why.
        if self.commands.send(command).is_ok() {
            let _ = self.waker.wake();
        }
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.command(Command::Stop);
            // A panic there was reported by the panic hook.
            let _ = thread.join();
        }
    }
}

impl Drop for NodeHandle {
    fn drop(&mut self) {
        self.join();
    }
}
