//! The processes of a local cluster and the sum of what they report.
//!
//! Owns which life of which node runs, restarts what died, and keeps the counts of dead lives, so
//! that totals never go back. Counts of a life's last moments (up to one report interval before it
//! was killed) are lost with it.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::child::{Child, Program, describe_exit, log_tail};
use crate::config::{Cluster, Member, Role};
use crate::control::{Answer, Control, ControlError, NodeReport, Order};
use crate::engine::{self, NodeCounters, Status};
use crate::report::MemoryReport;
use crate::state;

/// A report older than this says nothing about now.
const FRESH: Duration = Duration::from_millis(700);
/// More deaths that nobody ordered than this …
const DEATHS_MAX: usize = 5;
/// … within this time, and the node is given up.
const DEATHS_WITHIN: Duration = Duration::from_secs(60);

/// Index of a node within its cluster's members.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeIndex(pub usize);

/// Why the processes cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NodesError {
    /// A process cannot be started or signalled.
    #[error("{name}: {error}")]
    Process {
        /// The node.
        name: String,
        /// The reason.
        error: io::Error,
    },
    /// A node dies again and again.
    #[error("{name} keeps dying ({exit}); the end of {}:\n{tail}", log.display())]
    KeepsDying {
        /// The node.
        name: String,
        /// How it ended last.
        exit: String,
        /// Its log.
        log: PathBuf,
        /// The end of its log.
        tail: String,
    },
}

/// A death that nobody ordered.
#[derive(Clone, Debug)]
pub struct Death {
    /// Who.
    pub node: NodeIndex,
    /// How, in words.
    pub exit: String,
}

/// One node.
#[derive(Debug)]
pub struct Node {
    /// Its description.
    pub member: Member,
    /// How many lives it has had, the current one included.
    pub life: u64,
    /// Whether it is dead and stays dead.
    pub gone: bool,
    program: Program,
    child: Option<Child>,
    /// Whether we have stopped it: it takes orders, and answers none.
    paused: bool,
    restart_at: Option<Instant>,
    deaths: VecDeque<Instant>,
    /// Counts of lives that are over.
    past: NodeCounters,
    /// The last report of the current life, or of the last one.
    last: NodeReport,
    /// When that report arrived.
    arrived: Option<Instant>,
    memory: MemoryReport,
}

/// All nodes.
#[derive(Debug)]
pub struct Nodes {
    nodes: Vec<Node>,
    restart_after: Duration,
}

impl Nodes {
    /// Describes the processes of the cluster whose files lie in `state`; starts none.
    #[must_use]
    pub fn new(
        executable: &Path,
        state: &Path,
        cluster: &Cluster,
        restart_after: Duration,
    ) -> Nodes {
        let nodes = cluster
            .members
            .iter()
            .map(|member| {
                let dir = state.join(&member.name);
                Node {
                    member: member.clone(),
                    life: 0,
                    gone: false,
                    program: Program {
                        path: executable.to_owned(),
                        args: vec![
                            "node".into(),
                            "--config".into(),
                            dir.join("node.toml").into(),
                            "--supervised".into(),
                            std::process::id().to_string().into(),
                        ],
                        log: dir.join("log"),
                        control: state::control_socket(state, &member.name),
                    },
                    child: None,
                    paused: false,
                    restart_at: None,
                    deaths: VecDeque::new(),
                    past: NodeCounters::default(),
                    last: NodeReport::default(),
                    arrived: None,
                    memory: MemoryReport::default(),
                }
            })
            .collect();
        Nodes {
            nodes,
            restart_after,
        }
    }

    /// Starts every node.
    ///
    /// # Errors
    /// A process cannot be started.
    pub fn start_all(&mut self) -> Result<(), NodesError> {
        self.nodes.iter_mut().try_for_each(Node::start)
    }

    /// Asks the nodes that run now for their reports less often.
    pub fn watch_calmly(&self) {
        let children = self.nodes.iter().filter_map(|node| node.child.as_ref());
        children.for_each(Child::watch_calmly);
    }

    /// Notices deaths, restarts what is due and takes in reports. To be called often.
    ///
    /// # Errors
    /// A process cannot be started, or a node is given up.
    pub fn tick(&mut self, now: Instant) -> Result<Vec<Death>, NodesError> {
        let mut deaths = Vec::new();
        let restart_after = self.restart_after;
        for (index, node) in self.nodes.iter_mut().enumerate() {
            node.take_report();
            if let Some(exit) = node.reap()? {
                node.count_death(now, &exit)?;
                node.restart_at = Some(now + restart_after);
                deaths.push(Death {
                    node: NodeIndex(index),
                    exit,
                });
            }
            if node.restart_at.is_some_and(|at| at <= now) {
                node.start()?;
            }
        }
        Ok(deaths)
    }

    /// Kills a node; it is started again by [`Nodes::tick`] after the restart delay, or stays
    /// dead.
    ///
    /// # Errors
    /// A system call failed.
    pub fn kill(&mut self, index: NodeIndex, restart: bool) -> Result<(), NodesError> {
        let restart_at = Instant::now() + self.restart_after;
        let node = &mut self.nodes[index.0];
        node.take_report();
        if let Some(mut child) = node.child.take() {
            child.kill().map_err(|e| node.error(e))?;
        }
        node.gone = !restart;
        node.restart_at = restart.then_some(restart_at);
        Ok(())
    }

    /// Stops or continues a node's process.
    ///
    /// # Errors
    /// A system call failed.
    pub fn set_paused(&mut self, index: NodeIndex, paused: bool) -> Result<(), NodesError> {
        let node = &mut self.nodes[index.0];
        let done = match &node.child {
            Some(child) if paused => child.pause(),
            Some(child) => child.resume(),
            // Died meanwhile; its next life is not paused.
            None => return Ok(()),
        };
        node.paused = paused;
        done.map_err(|e| node.error(e))
    }

    /// Gives an order to the current life of a node.
    ///
    /// # Errors
    /// The node is not there, or refuses.
    pub fn order(&self, index: NodeIndex, order: &Order) -> Result<Answer, ControlError> {
        Control::connect(&self.nodes[index.0].program.control)?.ask(order)
    }

    /// The node at an index.
    #[must_use]
    pub fn get(&self, index: NodeIndex) -> &Node {
        &self.nodes[index.0]
    }

    /// Every node with its index.
    pub fn iter(&self) -> impl Iterator<Item = (NodeIndex, &Node)> {
        self.nodes
            .iter()
            .enumerate()
            .map(|(index, node)| (NodeIndex(index), node))
    }

    /// Nodes of one role.
    pub fn of_role(&self, role: Role) -> impl Iterator<Item = (NodeIndex, &Node)> {
        self.iter()
            .filter(move |(_, node)| node.member.role == role)
    }

    /// The node of this name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<NodeIndex> {
        self.iter()
            .find(|(_, node)| node.member.name == name)
            .map(|(index, _)| index)
    }

    /// The name of the node with this number.
    #[must_use]
    pub fn name_of(&self, id: u32) -> Option<String> {
        let node = self.nodes.iter().find(|node| node.member.id == id)?;
        Some(node.member.name.clone())
    }

    /// The root's last status.
    #[must_use]
    pub fn root(&self) -> &Status {
        let (_, root) = self
            .of_role(Role::Root)
            .next()
            .expect("every cluster has a root");
        &root.last.status
    }

    /// Counts of all nodes and lives.
    #[must_use]
    pub fn totals(&self) -> NodeCounters {
        self.nodes
            .iter()
            .fold(NodeCounters::default(), |sum, node| {
                engine::together(sum, node.counters())
            })
    }

    /// The largest epoch any node reported.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.nodes
            .iter()
            .map(|node| node.last.status.epoch)
            .max()
            .unwrap_or(0)
    }

    /// Whether every node that should live does, says that nothing is left to recover in a report
    /// that arrived after `since`, and is known to the root in its present life.
    #[must_use]
    pub fn is_well_since(&self, since: Instant) -> bool {
        let members = &self.root().members;
        self.nodes.iter().all(|node| {
            let seen = members.iter().find(|m| m.id == node.member.id);
            if node.gone {
                return seen.is_none_or(|m| !m.live);
            }
            let Some((arrived, report)) = node.child.as_ref().and_then(Child::report) else {
                return false;
            };
            let known = node.member.role == Role::Root
                || seen.is_some_and(|m| m.live && m.incarnation == report.status.incarnation);
            arrived > since && engine::is_complete(&report.status) && known
        })
    }

    /// Asks the node to end in good order and waits for it; after `patience` it is killed.
    ///
    /// # Errors
    /// What went wrong, in words; the process is gone in any case.
    pub fn stop(&mut self, index: NodeIndex, patience: Duration) -> Result<(), String> {
        let node = &mut self.nodes[index.0];
        node.restart_at = None;
        node.gone = true;
        node.take_report();
        let Some(mut child) = node.child.take() else {
            return Ok(());
        };
        let name = &node.member.name;
        let ordered = Control::connect(&node.program.control).and_then(|mut c| c.ask(&Order::Stop));
        if let Err(error) = ordered {
            return Err(format!("{name} did not take the order to stop: {error}"));
        }
        let deadline = Instant::now() + patience;
        loop {
            match child.try_wait() {
                Ok(Some(status)) if status.success() => return Ok(()),
                Ok(Some(status)) => {
                    return Err(format!("{name} ended with {}", describe_exit(status)));
                }
                Ok(None) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Ok(None) => return Err(format!("{name} did not stop within {patience:?}")),
                Err(error) => return Err(format!("{name}: {error}")),
            }
        }
    }
}

impl Node {
    /// The current life's process id, if it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::pid)
    }

    /// Whether it runs and answered within the last moments, so that an order need not be waited for.
    #[must_use]
    pub fn is_answering(&self) -> bool {
        !self.paused && self.report_age().is_some_and(|age| age < FRESH)
    }

    /// Age of the current life's newest report.
    #[must_use]
    pub fn report_age(&self) -> Option<Duration> {
        let (arrived, _) = self.child.as_ref()?.report()?;
        Some(arrived.elapsed())
    }

    /// The last report of the current life, or of the last one that reported.
    #[must_use]
    pub fn last(&self) -> &NodeReport {
        &self.last
    }

    /// Counts of all its lives. A dead life has nothing in flight: its work is its successor's or
    /// that of the resolver.
    #[must_use]
    pub fn counters(&self) -> NodeCounters {
        let mut counters = engine::together(self.past, self.last.status.counters);
        if self.child.is_none() {
            counters.in_flight = 0;
        }
        counters
    }

    /// Its memory at its largest over all lives.
    #[must_use]
    pub fn memory(&self) -> MemoryReport {
        self.memory
    }

    /// The end of its log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        log_tail(&self.program.log, 12)
    }

    fn start(&mut self) -> Result<(), NodesError> {
        let ended = NodeCounters {
            in_flight: 0,
            ..self.last.status.counters
        };
        self.past = engine::together(self.past, ended);
        self.last = NodeReport::default();
        self.restart_at = None;
        self.paused = false;
        self.life += 1;
        self.child = Some(Child::spawn(&self.program).map_err(|e| self.error(e))?);
        Ok(())
    }

    fn take_report(&mut self) {
        let Some(child) = &self.child else {
            return;
        };
        let Some((arrived, report)) = child.report() else {
            return;
        };
        if self.arrived.replace(arrived) == Some(arrived) {
            return;
        }
        self.last = report;
        if let Some(memory) = MemoryReport::of_process(child.pid()) {
            self.memory = self.memory.max(memory);
        }
    }

    /// In words how the process ended, if it just did.
    fn reap(&mut self) -> Result<Option<String>, NodesError> {
        let Some(child) = &mut self.child else {
            return Ok(None);
        };
        match child.try_wait() {
            Ok(None) => Ok(None),
            Ok(Some(status)) => {
                self.child = None;
                Ok(Some(describe_exit(status)))
            }
            Err(error) => Err(self.error(error)),
        }
    }

    fn count_death(&mut self, now: Instant, exit: &str) -> Result<(), NodesError> {
        self.deaths.push_back(now);
        while self
            .deaths
            .front()
            .is_some_and(|t| now - *t > DEATHS_WITHIN)
        {
            self.deaths.pop_front();
        }
        if self.deaths.len() <= DEATHS_MAX {
            return Ok(());
        }
        Err(NodesError::KeepsDying {
            name: self.member.name.clone(),
            exit: exit.to_owned(),
            log: self.program.log.clone(),
            tail: self.log_tail(),
        })
    }

    fn error(&self, error: io::Error) -> NodesError {
        NodesError::Process {
            name: self.member.name.clone(),
            error,
        }
    }
}
