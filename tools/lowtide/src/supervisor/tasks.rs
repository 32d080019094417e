//! Work given to clients, and what happens to it when a client dies.
//!
//! A task is one job that must end once. It belongs to a client; when that client comes back in a
//! new life the job is started again there (jobs may be repeated without harm), when it is gone
//! for good another client takes over.

use std::time::{Duration, Instant};

use super::nodes::{NodeIndex, Nodes};
use crate::config::Role;
use crate::control::{Answer, Job, JobReport, Order, Outcome, Progress};

/// A job that fails while its client is dying is no failure; time for the death to show.
const DEATH_SHOWS_WITHIN: Duration = Duration::from_secs(3);

/// A job and who does it.
#[derive(Debug)]
pub struct Task {
    job: Job,
    owner: NodeIndex,
    running: Option<Running>,
    /// Largest progress in any life, so that percentages do not fall.
    progress: Progress,
    failed_at: Option<Instant>,
    outcome: Option<Outcome>,
}

#[derive(Debug)]
struct Running {
    /// Life of the owner in which the job was started.
    life: u64,
    /// Number of the job in that life.
    id: u64,
}

impl Task {
    /// A job for a client.
    #[must_use]
    pub fn new(job: Job, owner: NodeIndex) -> Task {
        Task {
            job,
            owner,
            running: None,
            progress: Progress::default(),
            failed_at: None,
            outcome: None,
        }
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.progress
    }

    /// Its result, once there is one.
    #[must_use]
    pub fn outcome(&self) -> Option<&Outcome> {
        self.outcome.as_ref()
    }

    /// Starts the job where it is not running, and follows it. Returns what happened, in words.
    pub fn tick(&mut self, nodes: &Nodes, now: Instant) -> Option<String> {
        if self.outcome.is_some() {
            return None;
        }
        let mut event = None;
        if nodes.get(self.owner).gone {
            let heir = heir(nodes, self.owner)?;
            event = Some(format!(
                "{} takes over the work of {}",
                nodes.get(heir).member.name,
                nodes.get(self.owner).member.name
            ));
            self.owner = heir;
            self.running = None;
            self.failed_at = None;
        }
        let owner = nodes.get(self.owner);
        match &self.running {
            Some(running) if running.life == owner.life => {
                let id = running.id;
                if let Some(report) = owner.last().jobs.iter().find(|job| job.id == id) {
                    let report = report.clone();
                    self.follow(report, nodes, now);
                }
            }
            _ if owner.is_answering() => self.start(nodes),
            _ => {}
        }
        event
    }

    fn start(&mut self, nodes: &Nodes) {
        let order = Order::Start {
            job: self.job.clone(),
        };
        // A client that does not take the order now gets it at the next tick.
        if let Ok(Answer::Started { job }) = nodes.order(self.owner, &order) {
            self.failed_at = None;
            self.running = Some(Running {
                life: nodes.get(self.owner).life,
                id: job,
            });
        }
    }

    fn follow(&mut self, report: JobReport, nodes: &Nodes, now: Instant) {
        self.progress = Progress {
            entries: self.progress.entries.max(report.progress.entries),
            bytes: self.progress.bytes.max(report.progress.bytes),
        };
        match report.outcome {
            None => {}
            Some(Outcome::Failed { reason }) => {
                let since = *self.failed_at.get_or_insert(now);
                if now - since >= DEATH_SHOWS_WITHIN {
                    self.outcome = Some(Outcome::Failed { reason });
                }
            }
            Some(outcome) => {
                // The outcome is ours now; a client that does not hear this keeps a few bytes. One
                // that is stopped is not asked: it would stop us, too.
                if nodes.get(self.owner).is_answering() {
                    let _ = nodes.order(self.owner, &Order::Forget { job: report.id });
                }
                self.outcome = Some(outcome);
            }
        }
    }
}

/// Who takes over from a client that is gone.
fn heir(nodes: &Nodes, gone: NodeIndex) -> Option<NodeIndex> {
    nodes
        .of_role(Role::Client)
        .find(|(index, node)| *index != gone && !node.gone)
        .map(|(index, _)| index)
}
