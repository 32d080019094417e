//! Injects the faults of a run and measures how the cluster takes each of them.
//!
//! A fault strikes when its share of the work is done, whatever the cluster does at that moment.
//! It is *detected* when the root's view shows it (a victim not live, or in a new life), and
//! *recovered* when its cause is over, every process that should live does and says that nothing
//! is left to recover, the root knows each of them in its present life, and the minimum has passed
//! every operation that was stamped when the fault struck. What is not detected by then never will
//! be: short pauses and partitions evict nobody.
//!
//! Deaths that nobody ordered are measured in the same way.

use std::time::{Duration, Instant};

use super::nodes::{NodeIndex, Nodes, NodesError};
use crate::control::Order;
use crate::engine::{NodeCounters, Status};
use crate::fault::{Fault, Moment};
use crate::report::FaultReport;

/// Faults to come, faults that last, faults that are over.
#[derive(Debug, Default)]
pub struct Chaos {
    /// Not yet injected, in the order in which they become due.
    pending: Vec<Pending>,
    injected: Vec<Injected>,
    /// Told once the process is dead and before it is started again, where power failed.
    powerless: Vec<NodeIndex>,
}

#[derive(Debug)]
struct Pending {
    fault: Fault,
    moment: Moment,
    /// When its share of the work was done; its delay runs from then.
    reached: Option<Instant>,
}

impl Pending {
    /// Whether it strikes now, when `percent` of the work are done.
    fn is_due(&mut self, percent: f64, now: Instant) -> bool {
        if self.reached.is_none() && self.moment.percent <= percent {
            self.reached = Some(now);
        }
        let delay = Duration::from_millis(self.moment.delay_ms);
        self.reached.is_some_and(|at| now - at >= delay)
    }
}

#[derive(Debug)]
struct Injected {
    report: FaultReport,
    struck: Instant,
    victims: Vec<Victim>,
    effect: Effect,
    /// When its cause was over; recovery is judged by reports that arrive later.
    over: Option<Instant>,
    before: NodeCounters,
    /// Largest epoch in the cluster when it struck.
    epoch: u64,
}

/// A node that a fault strikes, and its life in the root's view when that happened.
#[derive(Debug)]
struct Victim {
    index: NodeIndex,
    life_seen: u64,
}

#[derive(Debug)]
enum Effect {
    /// Over at once if the node comes back; the restart is the business of [`Nodes`].
    Death {
        /// Whether it does not, which the root must be told.
        is_last: bool,
        /// Life of the root that was told. A root may die before it has written that down, so its next
        /// life is told again.
        told: Option<u64>,
    },
    Pause {
        until: Instant,
    },
    Partition {
        until: Instant,
        /// Life of each side in which it was told to block the other.
        told: [Option<u64>; 2],
    },
}

impl Chaos {
    /// Faults of a run, injected in the order of their moments.
    #[must_use]
    pub fn new(faults: &[Fault]) -> Chaos {
        let mut pending: Vec<Pending> = faults
            .iter()
            .filter_map(|fault| {
                Some(Pending {
                    moment: fault.at()?,
                    fault: fault.clone(),
                    reached: None,
                })
            })
            .collect();
        // Stable, so that faults of one moment strike in the order of the command line.
        pending.sort_by(|Pending { moment: a, .. }, Pending { moment: b, .. }| {
            let by_share = a.percent.total_cmp(&b.percent);
            by_share.then(a.delay_ms.cmp(&b.delay_ms))
        });
        let always = faults.iter().filter(|fault| fault.at().is_none());
        Chaos {
            pending,
            injected: Vec::new(),
            powerless: Vec::new(),
        }
        .with_constant(always)
    }

    fn with_constant<'a>(mut self, faults: impl Iterator<Item = &'a Fault>) -> Chaos {
        let now = Instant::now();
        for fault in faults {
            self.injected.push(Injected {
                report: FaultReport {
                    spec: fault.to_string(),
                    detected_ms: Some(0),
                    recovered_ms: Some(0),
                    ..FaultReport::default()
                },
                struck: now,
                victims: Vec::new(),
                effect: Effect::Death {
                    is_last: false,
                    told: None,
                },
                over: Some(now),
                before: NodeCounters::default(),
                epoch: 0,
            });
        }
        self
    }

    /// Injects what is due when `stored` percent of the work are done (`None`: it is not the time
    /// for faults), ends what has lasted long enough, and measures. `standing` tells since when the
    /// minimum stands still, if it does. Returns what happened, in words.
    ///
    /// # Errors
    /// A process cannot be killed or signalled.
    pub fn tick(
        &mut self,
        nodes: &mut Nodes,
        stored: Option<f64>,
        standing: Option<Instant>,
        now: Instant,
    ) -> Result<Vec<String>, NodesError> {
        let mut events = Vec::new();
        if let Some(percent) = stored {
            let due: Vec<Pending> = self
                .pending
                .extract_if(.., |pending| pending.is_due(percent, now))
                .collect();
            for Pending { fault, .. } in due {
                events.push(format!("fault {fault} at {percent:.1}%"));
                self.inject(&fault, nodes)?;
            }
        }
        for fault in &mut self.injected {
            fault.drive(nodes, now, &mut events)?;
            fault.measure(nodes, standing, &mut events);
        }
        Ok(events)
    }

    /// Takes note of a death that nobody ordered.
    pub fn note_death(&mut self, nodes: &Nodes, node: NodeIndex, exit: &str) {
        let spec = format!("unplanned:{} ({exit})", nodes.get(node).member.name);
        self.add(
            spec,
            &[node],
            nodes,
            Effect::Death {
                is_last: false,
                told: None,
            },
        );
    }

    /// Whether every fault was injected and is recovered from.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.pending.is_empty() && self.injected.iter().all(Injected::is_over)
    }

    /// Whether a fault is at work now.
    #[must_use]
    pub fn is_raging(&self) -> bool {
        !self.injected.iter().all(Injected::is_over)
    }

    /// Nodes whose power failed since the last call. Each is dead now and is to lose its
    /// unsynced pages before its next life begins.
    pub fn take_powerless(&mut self) -> Vec<NodeIndex> {
        std::mem::take(&mut self.powerless)
    }

    /// What was measured, in the order of injection.
    #[must_use]
    pub fn reports(&self) -> Vec<FaultReport> {
        self.injected.iter().map(|f| f.report.clone()).collect()
    }

    fn inject(&mut self, fault: &Fault, nodes: &mut Nodes) -> Result<(), NodesError> {
        let victims: Vec<NodeIndex> = fault
            .nodes()
            .iter()
            .map(|name| {
                nodes
                    .find(&name.to_string())
                    .expect("faults were validated against the cluster")
            })
            .collect();
        let now = Instant::now();
        let effect = match *fault {
            Fault::Kill { restart, .. } => Effect::Death {
                is_last: !restart,
                told: None,
            },
            Fault::PowerOff { .. } => Effect::Death {
                is_last: false,
                told: None,
            },
            Fault::Pause { duration_ms, .. } => Effect::Pause {
                until: now + Duration::from_millis(duration_ms),
            },
            Fault::Partition { duration_ms, .. } => Effect::Partition {
                until: now + Duration::from_millis(duration_ms),
                told: [None; 2],
            },
            Fault::Loss { .. } => unreachable!("loss holds from the start and is never pending"),
        };
        self.add(fault.to_string(), &victims, nodes, effect);
        match fault {
            Fault::Kill { restart, .. } => nodes.kill(victims[0], *restart),
            Fault::PowerOff { .. } => {
                self.powerless.push(victims[0]);
                nodes.kill(victims[0], true)
            }
            Fault::Pause { .. } => nodes.set_paused(victims[0], true),
            Fault::Partition { .. } | Fault::Loss { .. } => Ok(()),
        }
    }

    fn add(&mut self, spec: String, victims: &[NodeIndex], nodes: &Nodes, effect: Effect) {
        let before = nodes.totals();
        let now = Instant::now();
        let over = matches!(effect, Effect::Death { is_last: false, .. }).then_some(now);
        let during = self.injected.iter().filter(|other| !other.is_over());
        let during = during.map(|other| other.report.spec.clone()).collect();
        self.injected.push(Injected {
            report: FaultReport {
                spec,
                during,
                in_flight: before.in_flight,
                ..FaultReport::default()
            },
            struck: now,
            victims: victims
                .iter()
                .map(|index| Victim {
                    index: *index,
                    life_seen: life_in_view(nodes, *index),
                })
                .collect(),
            effect,
            over,
            before,
            epoch: nodes.epoch(),
        });
    }
}

/// The victim's life as the root sees it; the root's own life for the root.
fn life_in_view(nodes: &Nodes, victim: NodeIndex) -> u64 {
    let root = nodes.root();
    let id = nodes.get(victim).member.id;
    if root.id == id {
        return root.incarnation;
    }
    member(root, id).map_or(0, |(incarnation, _)| incarnation)
}

fn member(root: &Status, id: u32) -> Option<(u64, bool)> {
    root.members
        .iter()
        .find(|m| m.id == id)
        .map(|m| (m.incarnation, m.live))
}

impl Injected {
    fn is_over(&self) -> bool {
        self.report.recovered_ms.is_some()
    }

    /// Gives the orders that the fault consists of and ends it in time.
    fn drive(
        &mut self,
        nodes: &mut Nodes,
        now: Instant,
        events: &mut Vec<String>,
    ) -> Result<(), NodesError> {
        if let Effect::Death {
            is_last: true,
            told,
        } = &mut self.effect
        {
            let node = nodes.get(self.victims[0].index).member.id;
            let root = nodes.find("root").expect("every cluster has a root");
            let life = Some(nodes.root().incarnation);
            if *told != life
                && nodes.get(root).is_answering()
                && nodes.order(root, &Order::Gone { node }).is_ok()
            {
                *told = life;
                self.over = Some(now);
            }
        }
        if self.over.is_some() {
            return Ok(());
        }
        match &mut self.effect {
            Effect::Death { .. } => {}
            Effect::Pause { until } if now >= *until => {
                nodes.set_paused(self.victims[0].index, false)?;
                events.push(format!("{} continues", self.report.spec));
                self.over = Some(now);
            }
            Effect::Pause { .. } => {}
            Effect::Partition { until, told } => {
                let healing = now >= *until;
                let sides = [self.victims[0].index, self.victims[1].index];
                for (side, told) in told.iter_mut().enumerate() {
                    tell_side(nodes, sides[side], sides[1 - side], told, !healing);
                    let name = &nodes.get(sides[side]).member.name;
                    if told.is_some() && !self.report.cut.contains(name) {
                        self.report.cut.push(name.clone());
                    }
                }
                if healing && told.iter().all(Option::is_none) {
                    events.push(format!("{} healed", self.report.spec));
                    self.over = Some(now);
                }
            }
        }
        Ok(())
    }

    fn measure(&mut self, nodes: &Nodes, standing: Option<Instant>, events: &mut Vec<String>) {
        if self.is_over() {
            return;
        }
        if let Some(since) = standing {
            let stood_ms = since.max(self.struck).elapsed().as_millis() as u64;
            self.report.minimum_stood_ms = self.report.minimum_stood_ms.max(stood_ms);
        }
        let elapsed_ms = self.struck.elapsed().as_millis() as u64;
        if self.report.detected_ms.is_none() && self.is_detected(nodes) {
            self.report.detected_ms = Some(elapsed_ms);
        }
        // Counts rise until recovery is complete.
        let total = nodes.totals();
        self.report.replayed = total.replayed.saturating_sub(self.before.replayed);
        self.report.completed = total.completed.saturating_sub(self.before.completed);
        self.report.undone = total.undone.saturating_sub(self.before.undone);
        let was_killed = matches!(self.effect, Effect::Death { .. });
        let noticed = !was_killed || self.report.detected_ms.is_some();
        let passed = nodes.root().minimum > self.epoch;
        if noticed && passed && self.over.is_some_and(|over| nodes.is_well_since(over)) {
            self.report.recovered_ms = Some(elapsed_ms);
            events.push(format!(
                "{} recovered after {elapsed_ms} ms: {} in flight, {} replayed, {} completed, {} undone",
                self.report.spec,
                self.report.in_flight,
                self.report.replayed,
                self.report.completed,
                self.report.undone
            ));
        }
    }

    fn is_detected(&self, nodes: &Nodes) -> bool {
        let root = nodes.root();
        self.victims.iter().any(|victim| {
            let id = nodes.get(victim.index).member.id;
            if root.id == id {
                return root.incarnation > victim.life_seen;
            }
            match member(root, id) {
                Some((incarnation, live)) => !live || incarnation > victim.life_seen,
                // A root that knows anybody has forgotten it.
                None => !root.members.is_empty(),
            }
        })
    }
}

/// Brings one side of a partition to the wanted state, in whichever life it is. A side that does
/// not answer is told later.
fn tell_side(
    nodes: &Nodes,
    side: NodeIndex,
    peer: NodeIndex,
    told: &mut Option<u64>,
    blocked: bool,
) {
    let node = nodes.get(side);
    if node.gone || (!blocked && *told != Some(node.life)) {
        // A new life knows of no partition.
        *told = None;
        return;
    }
    if !node.is_answering() || (blocked && *told == Some(node.life)) {
        return;
    }
    let order = Order::Block {
        peer: nodes.get(peer).member.id,
        blocked,
    };
    if nodes.order(side, &order).is_ok() {
        *told = blocked.then_some(node.life);
    }
}
