//! Benchmarks, each run together with its yardstick: a peer program or the physical limit, measured
//! in the same minutes on the same machine, so that the ratio means something on a shared one.
//!
//! Owns: the command line, which benchmarks there are, where they may write. [`row`] is the form of
//! a result; every other module is one benchmark with its yardstick.
//!
//! Deliberately absent: limits that fail. A row may name its aim; whether it is met is for readers.
#![deny(unsafe_code)]

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

mod bandwidth;
mod checksum;
mod connections;
mod costs;
#[allow(unsafe_code)] // the raw verbs' contract is about memory
mod device;
mod ends;
mod guest;
mod host;
mod idle;
mod large;
mod latency;
mod logs;
mod loss;
mod machine;
mod messages;
mod programs;
mod queue;
mod rate;
mod row;
mod small;
mod tree;
mod ucx;

use machine::Machine;
use programs::Lowtide;
use row::Row;

/// Benchmarks, each run together with its yardstick.
#[derive(Debug, Parser)]
#[command(name = "lowtide-bench", after_help = AFTER_HELP)]
struct Cli {
    /// Benchmark to run, the beginning of several names ('store-small'), 'all', or 'list'
    name: String,
    /// Print rows as JSON, one a line; with 'all', also append them to bench/results/
    #[arg(long)]
    json: bool,
    /// Append the rows to bench/results/, whatever is printed
    #[arg(long)]
    keep: bool,
    /// Interleaved rounds [default: the benchmark's own]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// Files in the tree of small files; fewer than the default mark the rows as reduced
    #[arg(long, default_value_t = tree::FILES)]
    files: u64,
    /// MiB in the large file; less than the default marks the rows as reduced
    #[arg(long = "size", value_name = "MIB", default_value_t = large::MIB)]
    mib: u64,
    /// Proxies of the clusters that store small files
    #[arg(long, value_name = "N", default_value = "2")]
    proxies: String,
    /// Where to work, on the disk to be measured; emptied afterwards [default: the target directory]
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// The device of libibverbs that the benchmarks ending in '-device' use
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// The lowtide command to measure [default: the one built beside this program]
    #[arg(long, value_name = "FILE")]
    lowtide: Option<PathBuf>,
}

const AFTER_HELP: &str = "\
Exit status:
  0  compared
  1  a benchmark failed
  2  a mistake in the command line
  3  nothing was compared: a yardstick program is missing";

/// Why a benchmark has no rows.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// A yardstick cannot be run.
    #[error("nothing was compared: {program} is missing, package {package} brings it")]
    NoYardstick {
        program: &'static str,
        package: &'static str,
    },
    /// The file system refused.
    #[error("{what}: {error}")]
    Io { what: String, error: std::io::Error },
    /// Something measured did not do its work.
    #[error("{0}")]
    Broken(String),
}

impl Failure {
    fn io(what: impl std::fmt::Display) -> impl FnOnce(std::io::Error) -> Failure {
        let what = what.to_string();
        move |error| Failure::Io { what, error }
    }

    fn broken(error: impl std::fmt::Display) -> Failure {
        Failure::Broken(error.to_string())
    }

    fn exit_code(&self) -> u8 {
        match self {
            Failure::NoYardstick { .. } => 3,
            _ => 1,
        }
    }
}

/// What a benchmark gets.
struct Bench {
    /// An empty directory of its own.
    scratch: PathBuf,
    /// Rounds asked for on the command line.
    rounds: Option<u32>,
    /// Files in the tree of small files.
    files: u64,
    /// MiB in the large file.
    mib: u64,
    /// Proxies of the clusters that store small files.
    proxies: String,
    /// The device of libibverbs to be measured.
    device: Option<String>,
    lowtide: Lowtide,
    machine: Machine,
}

struct Benchmark {
    name: &'static str,
    about: &'static str,
    run: fn(&Bench) -> Result<Vec<Row>, Failure>,
}

impl Benchmark {
    /// Whether `name` is this one's name, or some whole words from its beginning.
    fn is_meant_by(&self, name: &str) -> bool {
        let rest = self.name.strip_prefix(name);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    }

    /// Whether it measures the device that was named.
    fn is_of_a_device(&self) -> bool {
        self.name.ends_with("-device")
    }
}

const BENCHMARKS: &[Benchmark] = &[
    Benchmark {
        name: "store-small-1",
        about: "one client stores 50,000 small files until all is stable, against cp -a and tar",
        run: small::one_client,
    },
    Benchmark {
        name: "store-small-4",
        about: "the same with four clients",
        run: small::four_clients,
    },
    Benchmark {
        name: "store-large-proxy",
        about: "one file of 2 GiB through a proxy until it is stable, against a relayed TCP stream",
        run: large::through_proxy,
    },
    Benchmark {
        name: "store-large-direct",
        about: "the same without a proxy, against a TCP stream",
        run: large::direct,
    },
    Benchmark {
        name: "costs",
        about: "memory and messages of a run of the small files, against their limits",
        run: costs::costs,
    },
    Benchmark {
        name: "idle",
        about: "processor time of a cluster of nine processes at rest, against its limit",
        run: idle::idle,
    },
    Benchmark {
        name: "queue",
        about: "the ring between a server's front and a shard, against crossbeam's bounded channel",
        run: queue::queue,
    },
    Benchmark {
        name: "memory-million",
        about: "memory of a run with a million entries in one directory, against its limit",
        run: costs::flat,
    },
    Benchmark {
        name: "log-append",
        about: "appending 256-byte records without sync, against memcpy into memory",
        run: logs::append,
    },
    Benchmark {
        name: "log-commit",
        about: "group commit, against sequential write and fdatasync of the same blocks",
        run: logs::commit,
    },
    Benchmark {
        name: "message-rtt",
        about: "a short message and its answer, against plain datagrams",
        run: messages::round_trip,
    },
    Benchmark {
        name: "message-rate",
        about: "short messages in one direction, against plain datagrams",
        run: messages::rate,
    },
    Benchmark {
        name: "message-bw",
        about: "long messages in one direction, against a TCP stream",
        run: messages::bandwidth,
    },
    Benchmark {
        name: "rtt-udp",
        about: "a SEND of 64 bytes and its answer, against bare datagrams, both polling",
        run: latency::round_trip,
    },
    Benchmark {
        name: "rtt-udp-ucx",
        about: "the same, against UCX over TCP",
        run: latency::round_trip_ucx,
    },
    Benchmark {
        name: "bw-udp-write",
        about: "WRITEs of 1 MiB in one direction, against one TCP stream of iperf3",
        run: bandwidth::write,
    },
    Benchmark {
        name: "bw-udp-read",
        about: "READs of 1 MiB in one direction, against one TCP stream of iperf3",
        run: bandwidth::read,
    },
    Benchmark {
        name: "rtt-host",
        about: "a round trip of 64 bytes on the same host, against UCX over posix shared memory",
        run: host::round_trip,
    },
    Benchmark {
        name: "bw-host",
        about: "WRITEs of 1 MiB on the same host, against UCX over posix and cma",
        run: host::writes,
    },
    Benchmark {
        name: "rate-udp",
        about: "SENDs of 64 bytes through one queue pair, against sendmmsg of equal datagrams",
        run: rate::rate,
    },
    Benchmark {
        name: "loss",
        about: "WRITEs and READs of 10 MiB while 1, 5 and 10 % of all packets are lost, against TCP",
        run: loss::loss,
    },
    Benchmark {
        name: "connections",
        about: "memory and idle processor time of 2,000 connections, against their limits",
        run: connections::connections,
    },
    Benchmark {
        name: "icrc",
        about: "checking and placing packets of 4 KiB, against memcpy and against zlib's crc32",
        run: checksum::icrc,
    },
    Benchmark {
        name: "icrc-cached",
        about: "the same over 2 MiB that stay in the processor's cache",
        run: checksum::icrc_cached,
    },
    Benchmark {
        name: "rtt-device",
        about: "--device NAME: a SEND of 64 bytes and its answer, against ib_send_lat",
        run: device::round_trip,
    },
    Benchmark {
        name: "bw-device",
        about: "--device NAME: WRITEs of 64 KiB in one direction, against ib_write_bw",
        run: device::writes,
    },
    Benchmark {
        name: "rate-device",
        about: "--device NAME: SENDs of 64 bytes through one queue pair, against ib_send_bw",
        run: device::rate,
    },
    Benchmark {
        name: "bw-rxe",
        about: "WRITE of 64 KiB in a QEMU guest, against the kernel's rxe on an equal link",
        run: guest::bandwidth,
    },
    Benchmark {
        name: "lat-rxe",
        about: "SEND of 64 B back and forth in a QEMU guest, against the kernel's rxe likewise",
        run: guest::latency,
    },
];

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.name == "list" {
        for benchmark in BENCHMARKS {
            let line = writeln!(io::stdout(), "{:18} {}", benchmark.name, benchmark.about);
            if line.is_err() {
                // Nobody reads on.
                return ExitCode::FAILURE;
            }
        }
        return ExitCode::SUCCESS;
    }
    let is_all = cli.name == "all";
    let chosen: Vec<&Benchmark> = BENCHMARKS
        .iter()
        .filter(|b| match is_all {
            true => cli.device.is_some() || !b.is_of_a_device(),
            false => b.is_meant_by(&cli.name),
        })
        .collect();
    if chosen.is_empty() {
        eprintln!("no benchmark is called {:?}; see 'list'", cli.name);
        return ExitCode::from(2);
    }
    let mut worst = 0;
    for benchmark in chosen {
        let keep = cli.keep || (cli.json && is_all);
        let done = run(&cli, benchmark).and_then(|rows| publish(&rows, cli.json, keep));
        if let Err(failure) = done {
            eprintln!("{}: {failure}", benchmark.name);
            // A failure is worse news than a missing program.
            worst = match (worst, failure.exit_code()) {
                (1, _) | (_, 1) => 1,
                (_, code) => code,
            };
        }
    }
    ExitCode::from(worst)
}

fn run(cli: &Cli, benchmark: &Benchmark) -> Result<Vec<Row>, Failure> {
    let parent = match &cli.scratch {
        Some(dir) => dir.clone(),
        None => programs::own_dir()?,
    };
    let scratch = tempfile::Builder::new()
        .prefix("bench-")
        .tempdir_in(&parent)
        .map_err(Failure::io(parent.display()))?;
    let bench = Bench {
        scratch: scratch.path().to_owned(),
        rounds: cli.rounds,
        files: cli.files,
        mib: cli.mib,
        proxies: cli.proxies.clone(),
        device: cli.device.clone(),
        lowtide: Lowtide::new(cli.lowtide.clone()),
        machine: Machine::look(scratch.path()),
    };
    (benchmark.run)(&bench)
}

fn publish(rows: &[Row], as_json: bool, keep: bool) -> Result<(), Failure> {
    for row in rows {
        let line = match as_json {
            true => row.to_json(),
            false => row.to_string(),
        };
        writeln!(io::stdout(), "{line}").map_err(Failure::io("standard output"))?;
    }
    if keep {
        row::append_to_results(rows)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_beginning_of_names_means_all_of_them() {
        let meant = |name: &str| BENCHMARKS.iter().filter(|b| b.is_meant_by(name)).count();
        assert_eq!(meant("store-small"), 2);
        assert_eq!(meant("store-small-1"), 1);
        assert_eq!((meant("store-sm"), meant("")), (0, 0));
        assert_eq!(meant("log"), 2);
    }
}
