//! `run`: a whole cluster of processes on this machine, from nothing to a verified report.
//!
//! Owns the order of events: describe the cluster, start it, have the clients store the input,
//! break things meanwhile, wait until the cluster has recovered, have a client read everything
//! back and compare, stop the cluster, report.
//!
//! One thread does all of it in small steps, ten milliseconds apart; whatever could block
//! (a node that is stopped, say) is asked by [`child`]'s threads. Nodes tell how they are only when
//! asked, so that the supervisor's death needs no protocol.
//!
//! Deliberately absent: anything that a cluster of several machines could not do to itself. The
//! supervisor only starts and kills processes and gives orders that `lowtide` could give by hand;
//! the one exception is that it tells the root of a process that it knows to be dead for good.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use crate::config::Role;
use crate::control::{Job, Outcome, Progress};
use crate::engine::{self, Carrier};
use crate::fault::{Fault, Shape};
use crate::input::{self, Survey};
use crate::report::{MemoryReport, Report};
use crate::state::State;
use crate::{address, state};

pub mod accounts;
pub mod chaos;
pub mod child;
pub mod display;
pub mod layout;
pub mod nodes;
pub mod tasks;

use accounts::Standstill;
use chaos::Chaos;
use display::{Display, Moment, Phase};
use nodes::{Nodes, NodesError};
use tasks::Task;

/// Time between two steps.
const TICK: Duration = Duration::from_millis(10);
/// Time for all processes to come up.
const START_PATIENCE: Duration = Duration::from_secs(60);
/// Time for one process to end in good order.
const STOP_PATIENCE: Duration = Duration::from_secs(20);
/// Time between two looks at the supervisor's own memory.
const OWN_MEMORY_EVERY: Duration = Duration::from_millis(50);
/// A minimum that stands still for this long gets an explanation on the screen.
const HELD_AFTER: Duration = Duration::from_secs(1);
/// Most problems and notes kept in a report.
const NOTES_MAX: usize = 100;
/// What the supervisor's own process is called in a report; no node of a run is.
const SUPERVISOR: &str = "supervisor";

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The directory to store.
    pub input: PathBuf,
    /// How many nodes of each role.
    pub shape: Shape,
    /// Shards of each server; `None` shares the machine's cores out to them.
    pub shards: Option<u32>,
    /// What to break; validated against `shape`.
    pub faults: Vec<Fault>,
    /// Transport.
    pub carrier: Carrier,
    /// Why it was chosen.
    pub why: String,
    /// Seed of everything random.
    pub seed: u64,
    /// How long a killed process stays dead.
    pub restart_after: Duration,
    /// Silence after which the root evicts a client or proxy, in milliseconds, at least 1.
    pub evict_after_ms: u64,
    /// How long nothing may move before the run is given up.
    pub patience: Duration,
    /// Keep the cluster running after the verification, until interrupted.
    pub stay: bool,
    /// Record what servers have not synced, also if no fault needs it.
    pub record_unsynced: bool,
    /// Directory for the clients' journals of what is stable, if they are to keep any.
    pub journal: Option<PathBuf>,
}

/// Why a run has no report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// No loopback addresses.
    #[error(transparent)]
    Address(#[from] address::NoAddress),
    /// A file of the state directory cannot be written.
    #[error("{}: {error}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The reason.
        error: io::Error,
    },
    /// The processes cannot go on.
    #[error(transparent)]
    Nodes(#[from] NodesError),
    /// A process did not come up.
    #[error("{name} did not start within {} s; the end of its log:\n{tail}", START_PATIENCE.as_secs())]
    NotStarted {
        /// The node.
        name: String,
        /// The end of its log.
        tail: String,
    },
    /// A client could not do its work.
    #[error("{what}: {reason}")]
    Job {
        /// The work.
        what: Phase,
        /// Why.
        reason: String,
    },
    /// Nothing moved for a long time.
    #[error("nothing moved for {} s; last seen: {moment}", patience.as_secs())]
    Stalled {
        /// How long.
        patience: Duration,
        /// How things stood.
        moment: Box<Moment>,
    },
    /// Ctrl-C or SIGTERM.
    #[error("interrupted")]
    Interrupted,
    /// Power loss could not be played on a node's files.
    #[error("{}: power loss could not be played: {reason}", dir.display())]
    PowerLoss {
        /// The node's directory.
        dir: PathBuf,
        /// Why.
        reason: String,
    },
}

/// Runs a cluster in `state`, which is new.
///
/// `interrupted` ends the run when it becomes true. The calling thread must be the one that
/// outlives all children, since Linux ties their lives to it.
///
/// # Errors
/// Why there is no report. All processes are gone in any case.
pub fn run(
    options: &Options,
    state: &State,
    executable: &Path,
    interrupted: &Arc<AtomicBool>,
) -> Result<Report, RunError> {
    let mut run = Run::prepare(options, state, executable, interrupted)?;
    let result = run.all_phases();
    run.display.finish();
    if result.is_err()
        && let Err(error) = accounts::leave_status(run.state, &run.nodes)
    {
        run.display.event(&error);
    }
    result
}

struct Run<'a> {
    options: &'a Options,
    state: &'a Path,
    interrupted: &'a AtomicBool,
    nodes: Nodes,
    chaos: Chaos,
    display: Display,
    survey: Survey,
    minimum: Standstill,
    moved: Movement,
    own_memory: OwnMemory,
    report: Report,
}

/// The supervisor's own memory at its largest, and when it was looked at.
#[derive(Debug, Default)]
struct OwnMemory {
    most: MemoryReport,
    looked: Option<Instant>,
}

impl OwnMemory {
    fn look(&mut self, now: Instant) {
        if self.looked.is_some_and(|at| now - at < OWN_MEMORY_EVERY) {
            return;
        }
        self.looked = Some(now);
        let now = MemoryReport::of_process(std::process::id()).unwrap_or_default();
        self.most = self.most.max(now);
    }
}

/// When the work moved last.
#[derive(Debug)]
struct Movement {
    seen: (Progress, u64),
    at: Instant,
}

impl<'a> Run<'a> {
    fn prepare(
        options: &'a Options,
        state: &'a State,
        executable: &Path,
        interrupted: &'a AtomicBool,
    ) -> Result<Run<'a>, RunError> {
        let shape = &options.shape;
        let count = shape.total();
        let addresses = match &options.carrier {
            Carrier::Verbs(chosen) => {
                address::of_device(chosen.address, std::process::id(), count as usize)?
            }
            Carrier::Softroce | Carrier::Host => {
                address::choose(std::process::id(), count as usize)?
            }
        };
        let cluster = layout::cluster(shape, &addresses);
        let loss_percent = options
            .faults
            .iter()
            .map(|fault| match fault {
                Fault::Loss { percent } => *percent,
                _ => 0.0,
            })
            .fold(0.0, f64::max);
        let common = layout::Common {
            provider: options.carrier.provider(),
            loss_percent,
            seed: options.seed,
            record_unsynced: options.record_unsynced
                || options
                    .faults
                    .iter()
                    .any(|fault| matches!(fault, Fault::PowerOff { .. })),
            shards: options
                .shards
                .unwrap_or_else(|| layout::shards_for(shape.meta + shape.object)),
            evict_after_ms: options.evict_after_ms,
        };
        layout::write(state.dir(), &cluster, &common)
            .map_err(|(path, error)| RunError::Write { path, error })?;
        let display = Display::new();
        let survey = input::survey(&options.input, input::EVERYTHING);
        display.event(&format!(
            "input {}: {} entries, {}",
            options.input.display(),
            survey.entries,
            crate::report::Size(survey.bytes)
        ));
        display.event(&format!(
            "cluster of {count} processes at {} and above, state in {}, seed {}",
            addresses[0],
            state.dir().display(),
            options.seed
        ));
        if let Carrier::Verbs(_) = options.carrier {
            display.event(&format!("messages run on {}", options.why));
        }
        Ok(Run {
            options,
            state: state.dir(),
            interrupted,
            nodes: Nodes::new(executable, state.dir(), &cluster, options.restart_after),
            chaos: Chaos::new(&options.faults),
            display,
            survey,
            minimum: Standstill::default(),
            moved: Movement {
                seen: (Progress::default(), 0),
                at: Instant::now(),
            },
            own_memory: OwnMemory::default(),
            report: Report::default(),
        })
    }

    fn all_phases(&mut self) -> Result<Report, RunError> {
        let since = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |d| d.as_secs());
        self.start()?;
        self.store()?;
        self.recover()?;
        self.verify(since)?;
        self.report.provider = accounts::provider(&self.options.carrier, &self.nodes);
        self.report.seed = self.options.seed;
        accounts::close(&mut self.report, &self.nodes, &self.minimum);
        let own = (SUPERVISOR.to_owned(), self.own_memory.most);
        self.report.memory.extend([own]);
        if self.options.stay {
            self.stay()?;
        }
        self.stop();
        self.report.verified = self.report.mismatches == 0
            && self.report.partial_operations == 0
            && self.report.problems.is_empty();
        Ok(std::mem::take(&mut self.report))
    }

    /// Starts all processes and waits until they are a cluster.
    fn start(&mut self) -> Result<(), RunError> {
        let began = Instant::now();
        self.nodes.start_all()?;
        while !self.nodes.is_well_since(began) {
            self.step(Phase::Starting, 0.0, Progress::default())?;
            if began.elapsed() > START_PATIENCE {
                return Err(self.not_started());
            }
        }
        self.display.event(&format!(
            "cluster up after {} ms",
            began.elapsed().as_millis()
        ));
        Ok(())
    }

    /// Names a node that is to blame, with the end of its log.
    fn not_started(&self) -> RunError {
        let is_down =
            |node: &nodes::Node| !node.is_answering() || !engine::is_complete(&node.last().status);
        let (_, node) = self
            .nodes
            .iter()
            .find(|(_, node)| is_down(node))
            .or(self.nodes.of_role(Role::Root).next())
            .expect("every cluster has a root");
        RunError::NotStarted {
            name: node.member.name.clone(),
            tail: node.log_tail(),
        }
    }

    /// Has the clients store the input, one share each.
    fn store(&mut self) -> Result<(), RunError> {
        let began = Instant::now();
        let clients: Vec<_> = self.nodes.of_role(Role::Client).map(|(i, _)| i).collect();
        let shares = clients.len() as u32;
        let tasks = (0..).zip(clients).map(|(share, client)| {
            let job = Job::Store {
                input: self.options.input.as_path().into(),
                share,
                shares,
                journal: self.options.journal.as_ref().map(|dir| {
                    let file = dir.join(format!("share-{share}"));
                    file.as_path().into()
                }),
            };
            Task::new(job, client)
        });
        for outcome in self.finish_tasks(Phase::Storing, tasks.collect())? {
            if let Outcome::Stored {
                unreadable_count,
                unreadable,
                skipped,
                changed,
            } = outcome
            {
                self.report.unreadable += unreadable_count;
                self.note_input("cannot be read", &unreadable);
                self.note_input("skipped", &skipped);
                self.note_input("changed during the run", &changed);
            }
        }
        self.report.elapsed_s = began.elapsed().as_secs_f64();
        self.report.cpu_s = accounts::cpu(&self.nodes);
        self.display
            .event(&format!("all stable after {:.1} s", self.report.elapsed_s));
        Ok(())
    }

    /// Waits until the faults are injected, over, and recovered from.
    fn recover(&mut self) -> Result<(), RunError> {
        self.moved.at = Instant::now();
        while !self.chaos.is_over() {
            self.step(Phase::Recovering, 100.0, Progress::default())?;
            self.give_up_if_stalled(Phase::Recovering, Progress::default())?;
        }
        Ok(())
    }

    /// Has one client read everything back.
    fn verify(&mut self, since: u64) -> Result<(), RunError> {
        let reader = self
            .nodes
            .of_role(Role::Client)
            .find(|(_, node)| !node.gone)
            .map(|(index, _)| index)
            .expect("validation leaves at least one client alive");
        let job = Job::Verify {
            input: self.options.input.as_path().into(),
            since,
        };
        for outcome in self.finish_tasks(Phase::Verifying, vec![Task::new(job, reader)])? {
            if let Outcome::Verified {
                entries,
                bytes,
                mismatches,
                partial_operations,
                problems,
                changed,
            } = outcome
            {
                let report = &mut self.report;
                report.entries = entries;
                report.bytes = bytes;
                report.mismatches = mismatches;
                report.partial_operations = partial_operations;
                report.problems.extend(problems);
                let changed = changed
                    .iter()
                    .map(|x| format!("changed during the run: {x}"));
                report.input_notes.extend(changed);
                report.input_notes.truncate(NOTES_MAX);
            }
        }
        self.report.faults = self.chaos.reports();
        Ok(())
    }

    /// Keeps the cluster for the user's own commands.
    fn stay(&mut self) -> Result<(), RunError> {
        self.display.event(&format!(
            "staying; try: lowtide ls --state {} /   (Ctrl-C ends)",
            self.state.display()
        ));
        self.nodes.watch_calmly();
        while !self.interrupted.load(Ordering::Relaxed) {
            self.step(Phase::Staying, 100.0, Progress::default())
                .or_else(|error| match error {
                    RunError::Interrupted => Ok(()),
                    error => Err(error),
                })?;
        }
        Ok(())
    }

    /// Stops all processes, those first that depend on others.
    fn stop(&mut self) {
        for role in [
            Role::Client,
            Role::Proxy,
            Role::Router,
            Role::Object,
            Role::Meta,
            Role::Root,
        ] {
            let indexes: Vec<_> = self.nodes.of_role(role).map(|(index, _)| index).collect();
            for index in indexes {
                if let Err(problem) = self.nodes.stop(index, STOP_PATIENCE) {
                    self.report.problems.push(problem);
                }
            }
        }
    }

    fn note_input(&mut self, what: &str, notes: &[String]) {
        let list = &mut self.report.input_notes;
        list.extend(notes.iter().map(|note| format!("{what}: {note}")));
        list.truncate(NOTES_MAX);
    }

    /// Steps until every task has its outcome.
    fn finish_tasks(
        &mut self,
        phase: Phase,
        mut tasks: Vec<Task>,
    ) -> Result<Vec<Outcome>, RunError> {
        self.moved.at = Instant::now();
        loop {
            let progress = tasks
                .iter()
                .fold(Progress::default(), |sum, task| Progress {
                    entries: sum.entries + task.progress().entries,
                    bytes: sum.bytes + task.progress().bytes,
                });
            let now = Instant::now();
            for task in &mut tasks {
                if let Some(event) = task.tick(&self.nodes, now) {
                    self.display.event(&event);
                }
                if let Some(Outcome::Failed { reason }) = task.outcome() {
                    return Err(RunError::Job {
                        what: phase,
                        reason: reason.clone(),
                    });
                }
            }
            if tasks.iter().all(|task| task.outcome().is_some()) {
                return Ok(tasks
                    .iter()
                    .filter_map(|task| task.outcome().cloned())
                    .collect());
            }
            let percent = self.percent(phase, progress);
            self.step(phase, percent, progress)?;
            self.give_up_if_stalled(phase, progress)?;
        }
    }

    /// Share of a phase's operations that are done.
    fn percent(&self, phase: Phase, done: Progress) -> f64 {
        let all = Survey::operations(self.survey.entries, self.survey.bytes).max(1);
        let mut done = Survey::operations(done.entries, done.bytes);
        if phase == Phase::Storing {
            // Large files make progress long before they are whole entries.
            let totals = self.nodes.totals();
            done = done.max(totals.operations.saturating_sub(totals.in_flight));
        }
        (done as f64 * 100.0 / all as f64).min(100.0)
    }

    /// One step of everything that goes on by itself.
    fn step(&mut self, phase: Phase, percent: f64, progress: Progress) -> Result<(), RunError> {
        if self.interrupted.load(Ordering::Relaxed) {
            return Err(RunError::Interrupted);
        }
        let now = Instant::now();
        for death in self.nodes.tick(now)? {
            let name = &self.nodes.get(death.node).member.name;
            self.display
                .event(&format!("{name} died: {}; restarting it", death.exit));
            self.chaos.note_death(&self.nodes, death.node, &death.exit);
        }
        // Faults belong to the storing; whatever is left strikes right after it.
        let is_time = matches!(phase, Phase::Storing | Phase::Recovering);
        let stored = is_time.then_some(percent);
        let standing = self.minimum.standing_since();
        for event in self.chaos.tick(&mut self.nodes, stored, standing, now)? {
            self.display.event(&event);
        }
        for node in self.chaos.take_powerless() {
            let dir = state::data_dir(self.state, &self.nodes.get(node).member.name);
            let lost = engine::lose_unsynced(&dir, self.options.seed ^ self.nodes.get(node).life)
                .map_err(|reason| RunError::PowerLoss { dir, reason })?;
            let name = &self.nodes.get(node).member.name;
            self.display.event(&format!("{name} lost power: {lost}"));
            self.report.power.add(lost);
        }
        let totals = self.nodes.totals();
        self.minimum
            .observe(self.nodes.root().minimum, totals.in_flight, now);
        self.own_memory.look(now);
        let moment = self.moment(phase, percent, progress);
        self.display.show(&moment, now);
        std::thread::sleep(TICK);
        Ok(())
    }

    fn moment(&self, phase: Phase, percent: f64, progress: Progress) -> Moment {
        let is_held = self.minimum.is_longer_than(HELD_AFTER);
        Moment::of(phase, percent, progress, &self.nodes, is_held)
    }

    fn give_up_if_stalled(&mut self, phase: Phase, progress: Progress) -> Result<(), RunError> {
        let seen = (progress, self.nodes.totals().operations);
        if seen != self.moved.seen {
            self.moved = Movement {
                seen,
                at: Instant::now(),
            };
        }
        if self.moved.at.elapsed() < self.options.patience {
            return Ok(());
        }
        Err(RunError::Stalled {
            patience: self.options.patience,
            moment: Box::new(self.moment(phase, self.percent(phase, progress), progress)),
        })
    }
}
