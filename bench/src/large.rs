//! Storing one large file until it is stable, against one TCP stream over loopback whose receiver
//! writes a file and syncs it; for the way through a proxy, with a relay in between.
//!
//! The file is in the page cache on both sides.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::Instant;

use lowtide_engine::medium::SplitMix;
use serde_json::Value;

use crate::programs::{remove, settle};
use crate::row::{Better, Pick, Rounds, Row};
use crate::{Bench, Failure};

const ROUNDS: u32 = 3;
/// Length that the benchmark defines, MiB.
pub const MIB: u64 = 2048;
/// Bytes read and written at a time by the yardstick.
const BUFFER: usize = 1 << 20;

/// Client to proxy to object server.
///
/// # Errors
/// The disk refuses, a run fails.
pub fn through_proxy(bench: &Bench) -> Result<Vec<Row>, Failure> {
    let is =
        "a TCP stream over loopback through a relay; the receiver writes a file, then fdatasync";
    let row = store(bench, "store-large-proxy", &["--proxy", "1"], true, is)?;
    Ok(vec![row.aim(0.5)])
}

/// Client to object server.
///
/// # Errors
/// The disk refuses, a run fails.
pub fn direct(bench: &Bench) -> Result<Vec<Row>, Failure> {
    let is = "a TCP stream over loopback; the receiver writes a file, then fdatasync";
    let row = store(bench, "store-large-direct", &["--proxy", "0"], false, is)?;
    Ok(vec![row.aim(0.8)])
}

fn store(
    bench: &Bench,
    name: &str,
    shape: &[&str],
    relayed: bool,
    yardstick_is: &'static str,
) -> Result<Row, Failure> {
    let input = bench.scratch.join("input");
    let file = input.join("large");
    std::fs::create_dir_all(&input)
        .and_then(|()| make(&file, bench.mib))
        .map_err(Failure::io(file.display()))?;
    let mut options = vec!["--clients", "1"];
    options.extend(shape);
    let rate = |seconds: f64| (bench.mib << 20) as f64 / seconds / 1e6;
    let (mut ours, mut yardstick) = (Vec::new(), Vec::new());
    let mut kept_max = 0;
    let rounds = bench.rounds.unwrap_or(ROUNDS);
    for _ in 0..rounds {
        settle(&bench.scratch)?;
        let to = bench.scratch.join("copy");
        yardstick.push(rate(stream(&file, &to, relayed)?));
        std::fs::remove_file(&to).map_err(Failure::io(to.display()))?;
        settle(&bench.scratch)?;
        let report = bench.lowtide.store(&input, &bench.scratch, &options)?;
        let (process, kept) = most_kept(&report)?;
        if kept > memory_max(bench.mib << 20) {
            let kept = kept >> 20;
            let what = format!("{process} kept {kept} MiB of a file of {} MiB", bench.mib);
            return Err(Failure::Broken(what));
        }
        kept_max = kept_max.max(kept);
        ours.push(rate(report["elapsed_s"].as_f64().unwrap_or(f64::NAN)));
    }
    remove(&input)?;
    let figures = Rounds {
        unit: "MB/s",
        better: Better::Higher,
        yardstick_is,
        ours,
        yardstick,
    };
    Ok(figures
        .row(name, Pick::Median, &bench.machine)
        .reduced(bench.mib < MIB || rounds < ROUNDS)
        .with("mib", bench.mib)
        .with("kept_mib_max", kept_max >> 20))
}

/// Bytes that a process may keep while it stores or passes on a file of `len`: an eighth, but not
/// less than what buffers and windows take with any file. So no process has the whole of it.
fn memory_max(len: u64) -> u64 {
    (len / 8).max(128 << 20)
}

/// The process that kept the most memory of its own during a run, and how many bytes; mapped files,
/// which are the kernel's to drop, do not count.
fn most_kept(report: &Value) -> Result<(&str, u64), Failure> {
    let processes = report["memory"].as_object();
    let kept = processes.into_iter().flatten().map(|(name, memory)| {
        let part = |which: &str| memory[which].as_u64();
        let bytes = part("rss_anon")?.checked_add(part("rss_shmem")?)?;
        Some((name.as_str(), bytes))
    });
    let kept: Option<Vec<_>> = kept.collect();
    kept.and_then(|kept| kept.into_iter().max_by_key(|(_, bytes)| *bytes))
        .ok_or_else(|| Failure::broken("the report does not say what processes keep"))
}

/// A file of incompressible bytes.
fn make(path: &Path, mib: u64) -> io::Result<()> {
    let mut random = SplitMix(mib);
    let mut file = File::create(path)?;
    let mut block = vec![0; BUFFER];
    for _ in 0..mib {
        for word in block.chunks_exact_mut(8) {
            word.copy_from_slice(&random.next_u64().to_le_bytes());
        }
        file.write_all(&block)?;
    }
    file.sync_data()
}

/// Seconds from the first byte read until the received file is durable.
fn stream(from: &Path, to: &Path, relayed: bool) -> Result<f64, Failure> {
    let fail = || Failure::io("the TCP yardstick");
    let receiver = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(fail())?;
    let relay = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(fail())?;
    let end = receiver.local_addr().map_err(fail())?;
    let first = match relayed {
        true => relay.local_addr().map_err(fail())?,
        false => end,
    };
    let began = Instant::now();
    let done: io::Result<()> = thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let mut file = File::create(to)?;
            pump(&mut receiver.accept()?.0, &mut file)?;
            file.sync_data()
        });
        let relaying = relayed
            .then(|| scope.spawn(|| pump(&mut relay.accept()?.0, &mut TcpStream::connect(end)?)));
        send(from, first)?;
        if let Some(relaying) = relaying {
            relaying.join().expect("the relay does not panic")?;
        }
        receiving.join().expect("the receiver does not panic")
    });
    done.map_err(fail())?;
    Ok(began.elapsed().as_secs_f64())
}

fn send(from: &Path, to: SocketAddr) -> io::Result<()> {
    // Connecting cannot fail for want of a listener: it listens already.
    pump(&mut File::open(from)?, &mut TcpStream::connect(to)?)
}

/// Copies through user space: `io::copy` would let the kernel splice, which no relay that looks
/// at what it passes on can do.
fn pump(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            n => to.write_all(&buffer[..n])?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_that_keeps_most_is_found_and_a_silent_report_refused() {
        let report = serde_json::json!({ "memory": {
            "a": { "rss_anon": 5, "rss_shmem": 1, "rss_file": 900 },
            "b": { "rss_anon": 2, "rss_shmem": 9, "rss_file": 0 },
        }});
        assert_eq!(most_kept(&report).unwrap(), ("b", 11));
        assert!(most_kept(&serde_json::json!({})).is_err());
        assert!(most_kept(&serde_json::json!({ "memory": { "a": {} } })).is_err());
    }

    #[test]
    fn the_yardstick_carries_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        make(&from, 3).unwrap();
        for relayed in [false, true] {
            assert!(stream(&from, &to, relayed).unwrap() > 0.0);
            assert_eq!(std::fs::read(&from).unwrap(), std::fs::read(&to).unwrap());
        }
    }
}
