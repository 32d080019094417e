//! What a person sees while a run goes on: a bar on a terminal, plain lines otherwise.
//!
//! Everything goes to standard error; standard output is for the summary.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::nodes::Nodes;
use crate::control::Progress;
use crate::engine;
use crate::report::Size;

/// Time between two plain lines.
const LINE_INTERVAL: Duration = Duration::from_secs(2);

/// Live progress of a run.
#[derive(Debug)]
pub struct Display {
    bar: Option<ProgressBar>,
    last_line: Option<Instant>,
    began: Instant,
}

/// What a run is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Processes come up and join.
    Starting,
    /// Clients store the input.
    Storing,
    /// Everything is stored; faults are not yet over.
    Recovering,
    /// A client reads everything back.
    Verifying,
    /// The cluster stays for the user.
    Staying,
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Phase::Starting => "starting",
            Phase::Storing => "storing",
            Phase::Recovering => "recovering",
            Phase::Verifying => "verifying",
            Phase::Staying => "staying",
        })
    }
}

/// One moment of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Moment {
    /// What is going on.
    pub phase: Phase,
    /// Share of the phase's work that is done, 0 to 100.
    pub percent: f64,
    /// What the phase has done.
    pub progress: Progress,
    /// Operations stamped.
    pub operations: u64,
    /// Largest epoch.
    pub epoch: u64,
    /// The global minimum at the root.
    pub minimum: u64,
    /// Operations not yet stable.
    pub in_flight: u64,
    /// Stages of nodes that have something to recover, and who holds the minimum.
    pub trouble: String,
}

impl Moment {
    /// Reads the state of a cluster; `is_held` tells whether the minimum has stood still for
    /// long enough to say why.
    #[must_use]
    pub fn of(
        phase: Phase,
        percent: f64,
        progress: Progress,
        nodes: &Nodes,
        is_held: bool,
    ) -> Moment {
        let totals = nodes.totals();
        let mut trouble: Vec<String> = nodes
            .iter()
            .filter(|(_, node)| !node.gone)
            .filter_map(|(_, node)| {
                let name = &node.member.name;
                let status = &node.last().status;
                if node.pid().is_none() {
                    Some(format!("{name} down"))
                } else if !node.is_answering() {
                    Some(format!("{name} silent"))
                } else if engine::is_complete(status) {
                    None
                } else {
                    Some(format!("{name} {}", status.stage))
                }
            })
            .collect();
        let reason = is_held.then(|| engine::waits_for(nodes.root(), |id| nodes.name_of(id)));
        trouble.extend(reason.flatten());
        Moment {
            phase,
            percent,
            progress,
            operations: totals.operations,
            epoch: nodes.epoch(),
            minimum: nodes.root().minimum,
            in_flight: totals.in_flight,
            trouble: trouble.join(", "),
        }
    }
}

impl Moment {
    /// What happens and how far it is.
    fn headline(&self) -> String {
        format!("{} {:.1}%", self.phase, self.percent)
    }

    fn details(&self) -> String {
        format!(
            "{} operations ({} unstable), {} entries, {}, epoch {}, minimum {} (lag {}), {}",
            self.operations,
            self.in_flight,
            self.progress.entries,
            Size(self.progress.bytes),
            self.epoch,
            self.minimum,
            self.epoch.saturating_sub(self.minimum),
            if self.trouble.is_empty() {
                "complete"
            } else {
                &self.trouble
            },
        )
    }
}

impl std::fmt::Display for Moment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.headline(), self.details())
    }
}

impl Display {
    /// A bar if standard error is a terminal.
    #[must_use]
    pub fn new() -> Display {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style =
                ProgressStyle::with_template("{bar:32.cyan/blue} {elapsed} {prefix}\n{msg}")
                    .expect("a constant template");
            ProgressBar::new(1000).with_style(style)
        });
        Display {
            bar,
            last_line: None,
            began: Instant::now(),
        }
    }

    /// Something worth keeping on the screen.
    pub fn event(&self, text: &str) {
        let line = format!("{:8.1} s  {text}", self.began.elapsed().as_secs_f64());
        match &self.bar {
            Some(bar) => bar.println(line),
            None => eprintln!("{line}"),
        }
    }

    /// Shows a moment; plain lines only every two seconds.
    pub fn show(&mut self, moment: &Moment, now: Instant) {
        if let Some(bar) = &self.bar {
            bar.set_position((moment.percent * 10.0) as u64);
            bar.set_prefix(moment.headline());
            bar.set_message(moment.details());
        } else if self
            .last_line
            .is_none_or(|last| now - last >= LINE_INTERVAL)
        {
            self.last_line = Some(now);
            self.event(&moment.to_string());
        }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Default for Display {
    fn default() -> Display {
        Display::new()
    }
}
