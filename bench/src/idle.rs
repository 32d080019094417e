//! What a cluster costs that has nothing to do: processor time of its processes at rest, of one
//! processor. The yardstick is a limit, not a program.
//!
//! `lowtide run --stay` keeps the cluster. Its supervisor asks every node how it is thirty times a
//! second; so each round is made twice, with the supervisor at work and while it is stopped. The row
//! is of the first, since whoever runs a cluster that way pays for both.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use serde_json::{Map, Value};

use crate::programs::Staying;
use crate::row::{Better, Pick, Rounds, Row, median};
use crate::{Bench, Failure, tree};

const ROUNDS: u32 = 3;
/// How long a cluster is left alone in a round.
const IDLE: Duration = Duration::from_secs(5);
/// How long it has to come to rest before.
const SETTLE: Duration = Duration::from_secs(2);
/// Percent of a processor that all its processes together may take.
const PERCENT: f64 = 2.0;
/// A root, two metadata servers, two object servers, two proxies, two clients.
const PROCESSES: usize = 9;
/// Files stored before; what they are does not matter at rest.
const FILES: u64 = 1000;

/// Processor time of a cluster at rest.
///
/// # Errors
/// The cluster does not start, or loses a process.
pub fn idle(bench: &Bench) -> Result<Vec<Row>, Failure> {
    let input = bench.scratch.join("input");
    tree::make(&input, FILES).map_err(Failure::io(input.display()))?;
    let cluster = bench.lowtide.stay(&input, &bench.scratch)?;
    let nodes = cluster.nodes()?;
    if nodes.len() != PROCESSES {
        return Err(Failure::Broken(format!("not nine nodes: {nodes:?}")));
    }
    let (mut ours, mut unasked, mut supervisor) = (Vec::new(), Vec::new(), Vec::new());
    let mut by_node = Map::new();
    let rounds = bench.rounds.unwrap_or(ROUNDS);
    for _ in 0..rounds {
        let shares = rest(&cluster, &nodes)?;
        ours.push(shares.nodes.iter().sum());
        supervisor.push(shares.supervisor);
        let names = nodes.iter().map(|(name, _)| name.clone());
        by_node = names.zip(shares.nodes.into_iter().map(round)).collect();
        signal(cluster.supervisor(), Signal::SIGSTOP)?;
        let shares = rest(&cluster, &nodes);
        signal(cluster.supervisor(), Signal::SIGCONT)?;
        unasked.push(shares?.nodes.iter().sum());
    }
    let figures = Rounds {
        unit: "%",
        better: Better::Lower,
        yardstick_is: "the limit for all nine processes together while nothing happens, of one \
                       processor",
        yardstick: vec![PERCENT; ours.len()],
        ours,
    };
    Ok(vec![
        figures
            .row("idle", Pick::Median, &bench.machine)
            .aim(1.0)
            .reduced(rounds < ROUNDS)
            .with("seconds", IDLE.as_secs())
            .with("percent_by_node", by_node)
            .with("percent_while_nobody_asks", round(median(&unasked)))
            .with("percent_of_the_supervisor", round(median(&supervisor))),
    ])
}

/// Percent of a processor that processes took in a while.
struct Shares {
    nodes: Vec<f64>,
    supervisor: f64,
}

fn rest(cluster: &Staying, nodes: &[(String, u32)]) -> Result<Shares, Failure> {
    let look = || -> Result<Vec<Duration>, Failure> {
        let pids = nodes.iter().map(|(_, pid)| *pid);
        pids.chain([cluster.supervisor()]).map(used).collect()
    };
    std::thread::sleep(SETTLE);
    let (before, began) = (look()?, Instant::now());
    std::thread::sleep(IDLE);
    let (after, took) = (look()?, began.elapsed());
    let used = after
        .iter()
        .zip(before)
        .map(|(after, before)| *after - before);
    let mut shares: Vec<f64> = used
        .map(|used| 100.0 * used.as_secs_f64() / took.as_secs_f64())
        .collect();
    let supervisor = shares.pop().unwrap_or(f64::NAN);
    Ok(Shares {
        nodes: shares,
        supervisor,
    })
}

/// Processor time of a process so far.
fn used(pid: u32) -> Result<Duration, Failure> {
    let clock = clock_getcpuclockid(Pid::from_raw(pid as i32)).map_err(Failure::broken)?;
    clock_gettime(clock)
        .map(Duration::from)
        .map_err(Failure::broken)
}

fn signal(pid: u32, signal: Signal) -> Result<(), Failure> {
    kill(Pid::from_raw(pid as i32), signal).map_err(Failure::broken)
}

fn round(percent: f64) -> Value {
    ((percent * 1e3).round() / 1e3).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_time_of_a_process_grows_while_it_works() {
        let before = used(std::process::id()).unwrap();
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(30) {
            std::hint::spin_loop();
        }
        assert!(used(std::process::id()).unwrap() > before);
        // No process has this number: proc(5), pid_max.
        assert!(used(1 << 22).is_err());
    }
}
