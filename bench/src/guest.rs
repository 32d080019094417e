//! softroce beside the kernel's rxe, in a QEMU guest where both have equal links: see
//! ci/guest/rates.job.
//!
//! The guest's processors are emulated, so figures mean something only beside each other.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::programs::{require, run};
use crate::row::{Better, Pick, Rounds, Row};
use crate::{Bench, Failure};

const ROUNDS: u32 = 9;
/// Where ci/guest/boot keeps its kernel, unless GUEST says otherwise.
const GUEST: &str = "/var/tmp/lowtide-guest";
/// Longest that a guest may take, in seconds.
const LIMIT: &str = "900";

/// Long WRITEs in one direction.
///
/// # Errors
/// There is no guest, or something in it fails.
pub fn bandwidth(bench: &Bench) -> Result<Vec<Row>, Failure> {
    let yardstick_is = "ib_write_bw on the kernel's rxe, 64 KiB, in the same guest";
    let unit = ("MiB/s", Better::Higher);
    compare(
        bench,
        "ib_write_bw -n 1000",
        unit,
        yardstick_is,
        ("bw-rxe", 2.0),
    )
}

/// A short SEND, half of its round trip.
///
/// # Errors
/// As [`bandwidth`].
pub fn latency(bench: &Bench) -> Result<Vec<Row>, Failure> {
    let yardstick_is = "ib_send_lat on the kernel's rxe, 64 B, in the same guest";
    let unit = ("us", Better::Lower);
    compare(
        bench,
        "ib_send_lat -s 64 -n 2000",
        unit,
        yardstick_is,
        ("lat-rxe", 1.3),
    )
}

/// A row of this name and aim, of what `program` measures.
fn compare(
    bench: &Bench,
    program: &str,
    (unit, better): (&'static str, Better),
    yardstick_is: &'static str,
    (name, aim): (&str, f64),
) -> Result<Vec<Row>, Failure> {
    let (ours, yardstick) = measure(bench, program)?;
    let rounds = Rounds {
        unit,
        better,
        yardstick_is,
        ours,
        yardstick,
    };
    let row = rounds
        .row(name, Pick::Median, &bench.machine)
        .with("guest", "QEMU without KVM, 2 processors, links of MTU 4096");
    Ok(vec![row.aim(aim)])
}

/// The figures of all rounds, ours and rxe's.
fn measure(bench: &Bench, program: &str) -> Result<(Vec<f64>, Vec<f64>), Failure> {
    require("qemu-system-x86_64", "qemu-system-x86")?;
    require("ib_write_bw", "perftest")?;
    let ci = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ci/guest");
    let guest = std::env::var_os("GUEST").unwrap_or_else(|| GUEST.into());
    let boot = || {
        let mut command = Command::new(ci.join("boot"));
        command.env("GUEST", &guest).env("LIMIT", LIMIT);
        command
    };
    if !Path::new(&guest).join("initramfs").exists() {
        run(boot().arg("setup"), &bench.scratch.join("setup.log"))?;
    }
    let out = bench.scratch.join("guest");
    fill(&out, &ci, bench, program)?;
    let log = bench.scratch.join("guest.log");
    run(boot().arg("run").arg(ci.join("rates.job")).arg(&out), &log)?;
    let said = fs::read_to_string(&log).map_err(Failure::io(log.display()))?;
    let figures = figures(&said);
    match figures.0.is_empty() {
        true => Err(Failure::broken(format!("the guest said\n{said}"))),
        false => Ok(figures),
    }
}

/// What the guest finds in its folder.
fn fill(out: &Path, ci: &Path, bench: &Bench, program: &str) -> Result<(), Failure> {
    let rounds = bench.rounds.unwrap_or(ROUNDS);
    let lowtide = bench.lowtide.path()?;
    let fill = || {
        fs::create_dir_all(out.join("programs"))?;
        fs::copy(lowtide, out.join("programs/lowtide"))?;
        fs::copy(ci.join("wire.sh"), out.join("wire.sh"))?;
        fs::copy(ci.join("../lib/wait.sh"), out.join("wait.sh"))?;
        fs::write(out.join("scale"), "some\n")?;
        fs::write(out.join("rate"), format!("{rounds} {program}\n"))
    };
    fill().map_err(Failure::io(out.display()))
}

/// Lines "round OURS KERNEL" between whatever else a console says.
fn figures(said: &str) -> (Vec<f64>, Vec<f64>) {
    let round = |line: &str| -> Option<(f64, f64)> {
        let (ours, kernel) = line.strip_prefix("round ")?.split_once(' ')?;
        Some((ours.parse().ok()?, kernel.trim().parse().ok()?))
    };
    said.lines().filter_map(round).unzip()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_rounds_count() {
        let said = "[  1.0] boot\nround 60.5 58.64\nround 1\nround x 2\nround 29 103.47\r\n";
        assert_eq!(figures(said), (vec![60.5, 29.0], vec![58.64, 103.47]));
    }
}
