//! The simulator's command line.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
#[cfg(feature = "teeth")]
use lowtide_engine_core::teeth::Tooth;
use lowtide_storm::plan::Plan;
use lowtide_storm::probe::Probe;
use lowtide_storm::runner::{Summary, minimise, run, sweep, sweep_until};

/// Seeds of a gate unless told otherwise; every probe must be hit by them.
const GATE_SEEDS: u64 = 20_000;

/// Simulates whole clusters in virtual time and checks every invariant after every step.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a fixed number of seeds; every rare situation must be reached.
    Gate {
        /// How many seeds.
        #[arg(long, default_value_t = GATE_SEEDS)]
        seeds: u64,
        /// The first one.
        #[arg(long, default_value_t = 1)]
        first: u64,
        /// Threads.
        #[arg(long, default_value_t = 1)]
        jobs: usize,
        /// Print the summary as JSON before the last line.
        #[arg(long)]
        json: bool,
    },
    /// Run seeds until one fails; exit status 0 if one does. For builds with a seeded fault.
    Hunt {
        /// How many seeds at most.
        #[arg(long, default_value_t = GATE_SEEDS)]
        seeds: u64,
        /// The first one.
        #[arg(long, default_value_t = 1)]
        first: u64,
        /// Threads.
        #[arg(long, default_value_t = 1)]
        jobs: usize,
    },
    /// List the seeded faults that this build can be given by LOWTIDE_TOOTH.
    #[cfg(feature = "teeth")]
    Teeth,
    /// Run one seed; on failure minimise it and print the end of its trace.
    Seed {
        /// The seed.
        seed: u64,
        /// Print the last events even if it passes.
        #[arg(long)]
        trace: bool,
        /// Do not minimise.
        #[arg(long)]
        whole: bool,
        /// Print what every node was at the end.
        #[arg(long)]
        state: bool,
        /// How many of the last events to print.
        #[arg(long, default_value_t = 120)]
        lines: usize,
    },
    /// Run fresh seeds for a while.
    Soak {
        /// For how long.
        #[arg(long, default_value_t = 10)]
        minutes: u64,
        /// Threads.
        #[arg(long, default_value_t = 1)]
        jobs: usize,
        /// The first seed; the clock decides otherwise.
        #[arg(long)]
        first: Option<u64>,
    },
}

fn main() -> ExitCode {
    #[cfg(feature = "teeth")]
    choose_tooth();
    let good = match Arguments::parse().command {
        Command::Gate {
            seeds,
            first,
            jobs,
            json,
        } => gate(first, seeds, jobs, json),
        Command::Hunt { seeds, first, jobs } => hunt(first, seeds, jobs),
        #[cfg(feature = "teeth")]
        Command::Teeth => {
            for tooth in Tooth::ALL {
                println!("{tooth:?}");
            }
            true
        }
        Command::Seed {
            seed,
            trace,
            whole,
            state,
            lines,
        } => {
            let show = Show {
                trace,
                state,
                lines,
            };
            one(seed, whole, &show)
        }
        Command::Soak {
            minutes,
            jobs,
            first,
        } => soak(minutes, jobs, first),
    };
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Seeds that once found something, with what it was.
const FOUND: &str = include_str!("../../../ci/seeds.txt");

/// The numbers in [`FOUND`]: the first word of each line that is not a comment.
fn found() -> Vec<u64> {
    let lines = FOUND.lines().filter(|line| !line.starts_with('#'));
    let numbers = lines.filter_map(|line| line.split_whitespace().next());
    numbers
        .map(|n| n.parse().expect("ci/seeds.txt: a line begins with a seed"))
        .collect()
}

/// Replays the seeds that once found something; returns how many fail.
fn replay() -> usize {
    let seeds = found();
    let mut failed = 0;
    for &seed in &seeds {
        if let Some(what) = run(&Plan::of(seed), false).failure {
            println!("seed {seed} of ci/seeds.txt failed: {what}");
            failed += 1;
        }
    }
    println!("{} seeds of ci/seeds.txt replayed", seeds.len());
    failed
}

fn gate(first: u64, seeds: u64, jobs: usize, json: bool) -> bool {
    let started = Instant::now();
    let found = replay();
    let progress = AtomicU64::new(0);
    let summary = sweep(first, jobs, |seed| {
        let done = progress.fetch_add(1, Ordering::Relaxed);
        if done > 0 && done.is_multiple_of(5000) {
            println!("{done} seeds, {:.1} s", started.elapsed().as_secs_f64());
        }
        seed >= first + seeds
    });
    let missed = if seeds >= GATE_SEEDS {
        missed(&summary)
    } else {
        Vec::new()
    };
    report(&summary, started.elapsed(), json);
    for probe in &missed {
        println!("never reached: {}", probe.name());
    }
    let failed = summary.failures.len() + missed.len() + found;
    println!("{} passed, {failed} failed", summary.passed);
    failed == 0
}

/// Lets the fault that LOWTIDE_TOOTH names bite.
#[cfg(feature = "teeth")]
fn choose_tooth() {
    let Ok(name) = std::env::var("LOWTIDE_TOOTH") else {
        return;
    };
    let all = Tooth::ALL.iter().copied();
    match all.into_iter().find(|t| format!("{t:?}") == name) {
        Some(tooth) => lowtide_engine_core::teeth::choose(tooth),
        None => {
            eprintln!("LOWTIDE_TOOTH: no seeded fault is called {name:?}; `teeth` lists them");
            std::process::exit(2);
        }
    }
}

/// Runs seeds until one fails. With several threads it is not always the smallest.
fn hunt(first: u64, seeds: u64, jobs: usize) -> bool {
    let found = AtomicU64::new(0);
    let summary = sweep_until(first, jobs, |seed, failures| {
        found.fetch_max(u64::from(failures > 0), Ordering::Relaxed);
        seed >= first + seeds || found.load(Ordering::Relaxed) > 0
    });
    let tried = summary.passed + summary.failures.len() as u64;
    match summary.failures.first() {
        Some(failure) => println!(
            "found after {tried} seeds: seed {} {}",
            failure.seed, failure.what
        ),
        None => println!("not found in {tried} seeds"),
    }
    !summary.failures.is_empty()
}

fn missed(summary: &Summary) -> Vec<Probe> {
    let all = Probe::ALL.iter().copied();
    all.filter(|p| summary.probes.count(*p) == 0).collect()
}

fn report(summary: &Summary, elapsed: Duration, json: bool) {
    let seconds = elapsed.as_secs_f64();
    let seeds = summary.passed + summary.failures.len() as u64;
    for failure in summary.failures.iter().take(20) {
        println!("seed {} failed: {}", failure.seed, failure.what);
    }
    if json {
        let probes: Vec<String> = Probe::ALL
            .iter()
            .map(|p| format!("\"{}\":{}", p.name(), summary.probes.count(*p)))
            .collect();
        println!(
            "{{\"seeds\":{seeds},\"failed\":{},\"events\":{},\"operations\":{},\"doubled\":{},\"seconds\":{seconds:.1},\"probes\":{{{}}}}}",
            summary.failures.len(),
            summary.events,
            summary.operations,
            summary.doubled,
            probes.join(",")
        );
    } else {
        for p in Probe::ALL {
            println!("{:>9}  {}", summary.probes.count(*p), p.name());
        }
    }
    println!(
        "{seeds} seeds, {} events, {} operations, {} run twice, {seconds:.1} s, {:.0} seeds/s",
        summary.events,
        summary.operations,
        summary.doubled,
        seeds as f64 / seconds
    );
}

/// What to print of one seed.
struct Show {
    trace: bool,
    state: bool,
    lines: usize,
}

fn one(seed: u64, whole: bool, show: &Show) -> bool {
    let mut plan = Plan::of(seed);
    let first = run(&plan, false).failure;
    if first.is_some() && !whole {
        plan = minimise(&plan);
    }
    let result = run(&plan, true);
    let failed = first.is_some() || result.failure.is_some();
    if failed || show.trace {
        let skip = result.trace.len().saturating_sub(show.lines);
        for line in &result.trace[skip..] {
            println!("{line}");
        }
        println!("{plan:?}");
    }
    if show.state {
        for node in &result.nodes {
            println!("{node}");
        }
    }
    if let Some(what) = first.as_ref().or(result.failure.as_ref()) {
        println!("seed {seed} failed: {what}");
    }
    if let Some(what) = result.failure.filter(|what| first.as_ref() != Some(what)) {
        println!("thinned out: {what}");
    }
    println!("hash {:016x}, {} events", result.hash, result.events);
    println!("{} passed, {} failed", u8::from(!failed), u8::from(failed));
    !failed
}

fn soak(minutes: u64, jobs: usize, first: Option<u64>) -> bool {
    let started = Instant::now();
    let end = Duration::from_secs(minutes * 60);
    let clock = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    let first = first.unwrap_or(clock << 20);
    println!("from seed {first}");
    let progress = AtomicU64::new(0);
    let summary = sweep(first, jobs, |_| {
        let done = progress.fetch_add(1, Ordering::Relaxed);
        if done > 0 && done.is_multiple_of(50_000) {
            println!("{done} seeds, {:.0} s", started.elapsed().as_secs_f64());
        }
        started.elapsed() > end
    });
    report(&summary, started.elapsed(), false);
    println!(
        "{} passed, {} failed",
        summary.passed,
        summary.failures.len()
    );
    summary.failures.is_empty()
}
