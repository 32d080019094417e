//! Runs plans: one, many, twice; turns panics into failures; thins a failing plan out.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::plan::Plan;
use crate::probe::Probes;
use crate::world::{Report, World};

thread_local! {
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
    static CAUGHT: RefCell<bool> = const { RefCell::new(false) };
}

/// Panics inside a run become its failure instead of noise on the terminal.
fn install_hook() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let other = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if CAUGHT.with(|c| *c.borrow()) {
                PANIC.with(|p| *p.borrow_mut() = Some(info.to_string()));
            } else {
                other(info);
            }
        }));
    });
}

/// Runs one plan.
#[must_use]
pub fn run(plan: &Plan, traced: bool) -> Report {
    install_hook();
    let mut world = World::new(plan.clone(), traced);
    CAUGHT.with(|c| *c.borrow_mut() = true);
    let result = catch_unwind(AssertUnwindSafe(|| world.drive()));
    CAUGHT.with(|c| *c.borrow_mut() = false);
    if result.is_err() {
        let text = PANIC.with(|p| p.borrow_mut().take()).unwrap_or_default();
        world.panicked(&text);
    }
    world.into_report()
}

/// A failing seed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// What was violated.
    pub what: String,
}

/// Sum over many seeds.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Seeds without a violation.
    pub passed: u64,
    /// Seeds with one.
    pub failures: Vec<Failure>,
    /// Events processed.
    pub events: u64,
    /// Operations stamped.
    pub operations: u64,
    /// Seeds that were run twice.
    pub doubled: u64,
    /// Situations reached.
    pub probes: Probes,
}

impl Summary {
    fn merge(&mut self, other: Summary) {
        self.passed += other.passed;
        self.failures.extend(other.failures);
        self.events += other.events;
        self.operations += other.operations;
        self.doubled += other.doubled;
        self.probes.merge(&other.probes);
    }
}

/// Runs the seeds from `first` on until `stop` says so (asked with each seed), on `jobs` threads.
/// One seed in fifty is run twice and must leave the same trace hash.
pub fn sweep(first: u64, jobs: usize, stop: impl Fn(u64) -> bool + Sync) -> Summary {
    sweep_until(first, jobs, |seed, _| stop(seed))
}

/// As [`sweep`]; `stop` is told how many seeds of the asking thread have failed so far.
pub fn sweep_until(first: u64, jobs: usize, stop: impl Fn(u64, usize) -> bool + Sync) -> Summary {
    let next = AtomicU64::new(first);
    let mut total = Summary::default();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs)
            .map(|_| {
                scope.spawn(|| {
                    let mut mine = Summary::default();
                    loop {
                        // Only the number matters, no other memory hangs on it.
                        let seed = next.fetch_add(1, Ordering::Relaxed);
                        if stop(seed, mine.failures.len()) {
                            return mine;
                        }
                        one(seed, &mut mine);
                    }
                })
            })
            .collect();
        for worker in workers {
            match worker.join() {
                Ok(part) => total.merge(part),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    });
    total.failures.sort_by_key(|f| f.seed);
    total
}

fn one(seed: u64, sum: &mut Summary) {
    let plan = Plan::of(seed);
    let report = run(&plan, false);
    let mut failure = report.failure;
    if seed.is_multiple_of(50) && failure.is_none() {
        sum.doubled += 1;
        let again = run(&plan, false);
        if again.hash != report.hash {
            failure = Some("not deterministic: two runs left different traces".to_owned());
        }
    }
    sum.events += report.events;
    sum.operations += report.operations;
    sum.probes.merge(&report.probes);
    match failure {
        None => sum.passed += 1,
        Some(what) => sum.failures.push(Failure { seed, what }),
    }
}

/// Drops faults and operations as long as the plan still fails in the same way.
#[must_use]
pub fn minimise(plan: &Plan) -> Plan {
    let class = |p: &Plan| {
        let failure = run(p, false).failure;
        failure.map(|f| f.split(':').next().unwrap_or_default().to_owned())
    };
    let original = class(plan);
    let fails = |p: &Plan| class(p) == original;
    let mut best = plan.clone();
    loop {
        let mut shrunk = false;
        let mut index = 0;
        while index < best.faults.len() {
            let mut candidate = best.clone();
            candidate.faults.remove(index);
            if fails(&candidate) {
                best = candidate;
                shrunk = true;
            } else {
                index += 1;
            }
        }
        for client in 0..best.clients.len() {
            while best.clients[client].ops > 0 {
                let mut candidate = best.clone();
                candidate.clients[client].ops -= best.clients[client].ops.div_ceil(3);
                if !fails(&candidate) {
                    break;
                }
                best = candidate;
                shrunk = true;
            }
        }
        if best.shards != [1] {
            let mut candidate = best.clone();
            candidate.shards = vec![1];
            if fails(&candidate) {
                best = candidate;
                shrunk = true;
            }
        }
        if best.originate.0 > 0 {
            let mut candidate = best.clone();
            candidate.originate.0 /= 2;
            if fails(&candidate) {
                best = candidate;
                shrunk = true;
            }
        }
        if !shrunk {
            return best;
        }
    }
}
