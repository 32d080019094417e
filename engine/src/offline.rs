//! The state of a stopped or crashed cluster, recovered without its network.
//!
//! The root and all persistent servers are run in this process on their own directories, with
//! messages handed over directly; every client and proxy is declared dead, so that rule X completes
//! or undoes whatever they left. It is the same code and the same log records as in a running
//! cluster, and may be interrupted and repeated like there. Afterwards the objects can be read.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lowtide_engine_core::destination::{DestinationConfig, DestinationCounters};
use lowtide_engine_core::effect::Effect;
use lowtide_engine_core::ids::{Life, NodeId, StorageId, Time};
use lowtide_engine_core::member::Intervals;
use lowtide_engine_core::message::Envelope;
use lowtide_engine_core::op::{Bytes, Key, Range};
use lowtide_engine_core::record::{Objects, Storage};
use lowtide_engine_core::room::HomeRule;
use lowtide_engine_core::root::{Root, RootConfig};
use lowtide_engine_core::session::Page;

use crate::log::superblock::SUPERBLOCK_FILE;
use crate::node::rootfile::RootFile;
use crate::node::{NodeError, StartError};
use crate::server::Server;
use crate::storage::StorageError;

/// How long recovery may go without any progress before it is given up.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where a cluster's persistent nodes keep their state.
#[derive(Clone, Debug)]
pub struct OfflineConfig {
    /// The root and its directory.
    pub root: (NodeId, PathBuf),
    /// Metadata and object servers and their directories; all of them.
    pub servers: Vec<(NodeId, PathBuf)>,
}

/// Why a cluster's state cannot be recovered offline.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OfflineError {
    /// The root's directory.
    #[error("root: {0}")]
    Root(#[from] StartError),
    /// A server's directory.
    #[error("server {node} in {dir}: {error}")]
    Server {
        /// The server.
        node: NodeId,
        /// Its directory.
        dir: PathBuf,
        /// What is wrong.
        error: StorageError,
    },
    /// A server's state is not there, and the cluster knows that there was one.
    #[error(
        "server {node} in {dir}: its storage is gone (there is no {SUPERBLOCK_FILE}), and the \
             cluster knows that there was one ({known}): put the directory back"
    )]
    Missing {
        /// The server.
        node: NodeId,
        /// Its directory.
        dir: PathBuf,
        /// The storage that it had.
        known: StorageId,
    },
    /// A server's state cannot be the one that the cluster knows.
    #[error("server {node} in {dir}: {error}")]
    Rejected {
        /// The server.
        node: NodeId,
        /// Its directory.
        dir: PathBuf,
        /// Why.
        error: NodeError,
    },
    /// A storage failed while recovery ran.
    #[error("storage failed: {0}")]
    Failed(String),
    /// Recovery stopped making progress.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Unresolved(Vec<Unresolved>),
}

/// A dead life whose work cannot be completed or undone, and what is missing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the work of {life} is unresolved ({stage}) without {}", nodes(.missing))]
pub struct Unresolved {
    /// Whose work.
    pub life: Life,
    /// How far it came.
    pub stage: &'static str,
    /// Nodes that have not said what they have of it, or done what was decided.
    pub missing: Vec<NodeId>,
}

fn nodes(missing: &[NodeId]) -> String {
    let words: Vec<String> = missing.iter().map(|node| format!("node {node}")).collect();
    words.join(", ")
}

/// A recovered cluster at rest.
pub struct OfflineState {
    servers: BTreeMap<NodeId, Server>,
    resolved: u64,
}

impl std::fmt::Debug for OfflineState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OfflineState")
            .field("resolved", &self.resolved)
            .finish_non_exhaustive()
    }
}

/// Opens and recovers a cluster's state. The nodes must not run: their directories are locked.
///
/// # Errors
/// See [`OfflineError`].
pub fn open(config: &OfflineConfig) -> Result<OfflineState, OfflineError> {
    open_within(config, PATIENCE)
}

/// As [`open`], and gives up when recovery makes no progress for as long as `patience`.
///
/// # Errors
/// As [`open`].
pub fn open_within(
    config: &OfflineConfig,
    patience: Duration,
) -> Result<OfflineState, OfflineError> {
    let mut recovery = Recovery::new(config)?;
    recovery.run(patience)?;
    let resolved = recovery.root.counters().evicted;
    Ok(OfflineState {
        servers: std::mem::take(&mut recovery.servers),
        resolved,
    })
}

/// Ends the servers' threads, which hold their directories.
fn close(servers: &mut BTreeMap<NodeId, Server>) {
    for server in std::mem::take(servers).into_values() {
        server.close();
    }
}

impl Drop for OfflineState {
    fn drop(&mut self) {
        close(&mut self.servers);
    }
}

impl Drop for Recovery {
    fn drop(&mut self) {
        close(&mut self.servers);
    }
}

struct Recovery {
    root_id: NodeId,
    root: Root,
    root_file: RootFile,
    servers: BTreeMap<NodeId, Server>,
    dirs: BTreeMap<NodeId, PathBuf>,
    mail: VecDeque<(NodeId, Envelope)>,
    now: u64,
    /// Counts what other threads made durable.
    events: Arc<AtomicU64>,
}

impl Recovery {
    fn new(config: &OfflineConfig) -> Result<Recovery, OfflineError> {
        let events = Arc::new(AtomicU64::new(0));
        let wake = {
            let events = events.clone();
            move || {
                events.fetch_add(1, Ordering::Release);
            }
        };
        let (root_id, root_dir) = &config.root;
        let (root_file, state) = RootFile::open(root_dir.clone(), wake.clone())?;
        let settings = RootConfig {
            interval: 1,
            evict_after: u64::MAX,
            retry_after: 50,
        };
        // Before anything is created in the place of what is lost.
        for (node, dir) in &config.servers {
            let known = state.store(*node).map(|store| store.storage);
            if let Some(known) = known.filter(|_| !dir.join(SUPERBLOCK_FILE).exists()) {
                let (node, dir) = (*node, dir.clone());
                return Err(OfflineError::Missing { node, dir, known });
            }
        }
        let root = Root::new(*root_id, settings, state, Time(0));
        let mut servers = BTreeMap::new();
        for (index, (node, dir)) in config.servers.iter().enumerate() {
            let nonce = crate::node::process_nonce().wrapping_add(index as u64);
            let settings = DestinationConfig {
                root: *root_id,
                parent: *root_id,
                pings: Intervals { ping: 1, rest: 1 },
                nonce,
                carry_bytes: 0,
                room: HomeRule::default(),
            };
            // One shard, whatever the cluster ran with: its objects are read from this thread.
            let server = Server::open(*node, settings, (dir, false), 1, wake.clone());
            let server = server.map_err(|error| OfflineError::Server {
                node: *node,
                dir: dir.clone(),
                error,
            })?;
            servers.insert(*node, server);
        }
        let (root_id, mail) = (*root_id, VecDeque::new());
        Ok(Recovery {
            root_id,
            root,
            root_file,
            servers,
            dirs: config.servers.iter().cloned().collect(),
            mail,
            now: 0,
            events,
        })
    }

    fn run(&mut self, patience: Duration) -> Result<(), OfflineError> {
        let mut last_progress = Instant::now();
        let mut last_seen = self.measure();
        loop {
            self.step()?;
            let view = self.root.view();
            let known = |node: &NodeId| view.seat(*node).is_some_and(|s| s.live);
            if self.servers.keys().all(known) {
                for seat in view
                    .seats
                    .iter()
                    .filter(|s| s.live && s.role.is_volatile_source())
                {
                    self.root.declare_dead(Time(self.now), seat.life.node);
                }
                if self.is_finished() {
                    return Ok(());
                }
            }
            let seen = self.measure();
            if seen != last_seen {
                (last_seen, last_progress) = (seen, Instant::now());
            } else if last_progress.elapsed() > patience {
                return Err(OfflineError::Unresolved(self.unresolved()));
            }
        }
    }

    /// Whatever recovery moves: evictions, operations, durable positions.
    fn measure(&self) -> (u64, u64, Vec<(Life, &'static str)>) {
        let done: u64 = self
            .servers
            .values()
            .map(|s| total(s.front().counters()))
            .sum();
        (
            self.root.counters().evicted,
            done,
            self.root.evictions().collect(),
        )
    }

    fn is_finished(&self) -> bool {
        let live = self
            .root
            .view()
            .seats
            .iter()
            .any(|s| s.live && s.role.is_volatile_source());
        !live
            && self.root.evictions().next().is_none()
            && self
                .servers
                .values()
                .all(|s| s.front().stage().1.is_empty())
    }

    /// Evictions that nobody answers, and lives that a server still expects back.
    fn unresolved(&self) -> Vec<Unresolved> {
        let evictions = self.root.unanswered_evictions();
        let mut all: Vec<Unresolved> = evictions
            .map(|(life, stage, missing)| Unresolved {
                life,
                stage,
                missing,
            })
            .collect();
        for (node, server) in &self.servers {
            let expected = server.front().stage().1.into_iter();
            let is_told = |life: &Life| all.iter().any(|u| u.life == *life);
            let untold: Vec<Life> = expected.filter(|life| !is_told(life)).collect();
            all.extend(untold.into_iter().map(|life| Unresolved {
                life,
                stage: "RECONNECT",
                missing: vec![*node],
            }));
        }
        all
    }

    fn step(&mut self) -> Result<(), OfflineError> {
        self.now += 1;
        let now = Time(self.now);
        let before = self.events.load(Ordering::Acquire);
        while let Some((to, envelope)) = self.mail.pop_front() {
            if to == self.root_id {
                self.root.handle_message(now, envelope);
            } else if let Some(server) = self.servers.get_mut(&to) {
                server.front_mut().handle_message(now, envelope);
            }
        }
        self.root.handle_persisted(now, self.root_file.persisted());
        self.root.handle_timeout(now);
        // Nobody makes room for an export; it is told at once.
        let why = self.root_file.failure().or_else(|| self.root_file.full());
        if let Some(why) = why {
            return Err(OfflineError::Failed(why));
        }
        while let Some(effect) = self.root.poll_effect() {
            match effect {
                Effect::Send { to, envelope } => self.mail.push_back((to, envelope)),
                Effect::Persist { version, state } => self.root_file.persist(version, state),
                _ => {}
            }
        }
        for (node, server) in &mut self.servers {
            server.settle(now);
            server.front_mut().handle_timeout(now);
            server.pass(now);
            if let Some(why) = server.failure() {
                return Err(OfflineError::Failed(why));
            }
            while let Some(effect) = server.front_mut().poll_effect() {
                match effect {
                    Effect::Send { to, envelope } => self.mail.push_back((to, envelope)),
                    Effect::Rejected(reason) => {
                        let (node, dir) = (*node, self.dirs[node].clone());
                        let error = reason.into();
                        return Err(OfflineError::Rejected { node, dir, error });
                    }
                    _ => {}
                }
            }
        }
        if self.events.load(Ordering::Acquire) == before {
            // Nothing became durable meanwhile; a sync takes about this long.
            std::thread::park_timeout(Duration::from_micros(200));
        }
        Ok(())
    }
}

fn total(c: DestinationCounters) -> u64 {
    c.executed + c.purged + c.undone + c.completed + c.duplicates
}

impl OfflineState {
    /// The servers whose objects can be read.
    pub fn servers(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.servers.keys().copied()
    }

    /// Lives that had to be resolved.
    #[must_use]
    pub fn resolved(&self) -> u64 {
        self.resolved
    }

    /// Operations undone and completed meanwhile.
    #[must_use]
    pub fn undone_and_completed(&self) -> (u64, u64) {
        let counters = self.servers.values().map(|s| s.front().counters());
        counters.fold((0, 0), |(u, c), next| (u + next.undone, c + next.completed))
    }

    /// One object's value.
    ///
    /// # Errors
    /// [`OfflineError::Failed`] when the storage cannot be read.
    pub fn get(&mut self, home: NodeId, key: &Key) -> Result<Option<Bytes>, OfflineError> {
        let Some(server) = self.servers.get_mut(&home) else {
            return Ok(None);
        };
        let value = server.objects().and_then(|objects| {
            let stored = objects.get(key)?;
            objects.fetch(&stored.value)
        });
        server
            .failure()
            .map_or(Ok(value), |why| Err(OfflineError::Failed(why)))
    }

    /// Objects of a range in key order.
    ///
    /// # Errors
    /// [`OfflineError::Failed`] when the storage cannot be read.
    pub fn scan(
        &mut self,
        home: NodeId,
        range: &Range,
        after: Option<&Key>,
        bytes_max: usize,
    ) -> Result<Page, OfflineError> {
        let Some(server) = self.servers.get_mut(&home) else {
            return Ok(Page::default());
        };
        let objects = server.objects();
        let page = objects.map(|o| o.scan(range, after, bytes_max));
        let page = page.unwrap_or_default();
        server
            .failure()
            .map_or(Ok(page), |why| Err(OfflineError::Failed(why)))
    }
}
