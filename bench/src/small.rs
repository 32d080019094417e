//! Storing many small files until all is stable, against `cp -a` followed by `sync`, and against
//! `tar` to one file that is synced.
//!
//! The clock of ours is the run's own: from the order to store until every operation is stable.
//! Each round also reads everything back and compares it, outside of the clock.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::programs::{remove, require, run, settle};
use crate::row::{Better, Pick, Rounds, Row, median};
use crate::{Bench, Failure, tree};

const ROUNDS: u32 = 5;
/// Half of `cp -a`.
const AIM: f64 = 0.5;

/// One client.
///
/// # Errors
/// A yardstick is missing or fails, a run fails.
pub fn one_client(bench: &Bench) -> Result<Vec<Row>, Failure> {
    store_small(bench, "1")
}

/// Four clients, which divide the directories.
///
/// # Errors
/// A yardstick is missing or fails, a run fails.
pub fn four_clients(bench: &Bench) -> Result<Vec<Row>, Failure> {
    store_small(bench, "4")
}

fn store_small(bench: &Bench, clients: &str) -> Result<Vec<Row>, Failure> {
    require("cp", "coreutils")?;
    require("sync", "coreutils")?;
    require("tar", "tar")?;
    let (input, bytes) = input(bench)?;
    let rate = |seconds: f64| bench.files as f64 / seconds;
    let (mut ours, mut cp, mut tar) = (Vec::new(), Vec::new(), Vec::new());
    let mut cpu = Vec::new();
    let rounds = bench.rounds.unwrap_or(ROUNDS);
    for _ in 0..rounds {
        cp.push(rate(copy(&bench.scratch, &input)?));
        tar.push(rate(archive(&bench.scratch, &input)?));
        settle(&bench.scratch)?;
        let options = ["--clients", clients, "--proxy", &bench.proxies];
        let report = bench.lowtide.store(&input, &bench.scratch, &options)?;
        ours.push(rate(report["elapsed_s"].as_f64().unwrap_or(f64::NAN)));
        let seconds = report["cpu_s"].as_object().into_iter().flatten();
        let seconds: f64 = seconds.filter_map(|(_, s)| s.as_f64()).sum();
        cpu.push(seconds * 1e6 / bench.files as f64);
    }
    let cpu = median(&cpu).round();
    let row = |name: String, yardstick: Vec<f64>, yardstick_is| {
        Rounds {
            unit: "files/s",
            better: Better::Higher,
            yardstick_is,
            ours: ours.clone(),
            yardstick,
        }
        .row(name, Pick::BestYardstick, &bench.machine)
        .reduced(bench.files < tree::FILES || rounds < ROUNDS)
        .with("files", bench.files)
        .with("bytes", bytes)
        .with("our_processor_us_per_file", cpu)
        .with("proxies", bench.proxies.as_str())
    };
    let cp_is = "cp -a of the same tree, then sync -f; the fastest round";
    let tar_is = "tar of the same tree to one file, then fdatasync; the fastest round";
    Ok(vec![
        row(format!("store-small-{clients}"), cp, cp_is).aim(AIM),
        row(format!("store-small-{clients}-tar"), tar, tar_is),
    ])
}

/// Makes the tree of small files and returns its place and its bytes.
pub fn input(bench: &Bench) -> Result<(PathBuf, u64), Failure> {
    let input = bench.scratch.join("input");
    let bytes = tree::make(&input, bench.files).map_err(Failure::io(input.display()))?;
    Ok((input, bytes))
}

/// Seconds for `cp -a` and `sync`.
fn copy(scratch: &Path, input: &Path) -> Result<f64, Failure> {
    let to = scratch.join("copy");
    settle(scratch)?;
    let mut cp = Command::new("cp");
    cp.arg("-a").arg(input).arg(&to);
    let took = run(&mut cp, &scratch.join("cp.log"))? + settle(scratch)?;
    remove(&to)?;
    Ok(took.as_secs_f64())
}

/// Seconds for `tar` and `fdatasync`.
fn archive(scratch: &Path, input: &Path) -> Result<f64, Failure> {
    let to = scratch.join("archive.tar");
    settle(scratch)?;
    let mut tar = Command::new("tar");
    tar.arg("-cf").arg(&to).arg("-C").arg(input).arg(".");
    let packed = run(&mut tar, &scratch.join("tar.log"))?;
    let began = std::time::Instant::now();
    File::open(&to)
        .and_then(|file| file.sync_data())
        .map_err(Failure::io(to.display()))?;
    let took = packed + began.elapsed();
    std::fs::remove_file(&to).map_err(Failure::io(to.display()))?;
    Ok(took.as_secs_f64())
}
