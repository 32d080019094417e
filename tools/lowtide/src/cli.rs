//! The command line: every subcommand, its options and its help.
//!
//! Deliberately absent: what the subcommands do (`commands`).

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::config::Provider;
use crate::fault::Fault;

/// A distributed store that recovers: run a cluster, break it, get everything back.
#[derive(Debug, Parser)]
#[command(name = "lowtide", version, about, after_help = AFTER_HELP)]
pub struct Cli {
    /// What to do; `run` with its defaults when nothing is said.
    #[command(subcommand)]
    pub command: Option<Command>,
}

const AFTER_HELP: &str = "\
Examples:
  lowtide                                      store a directory that every Rust machine has
  lowtide run --input ~/src --fault kill:meta1@40%
  lowtide run --state /tmp/s --report r.json   keep the state, write a report
  lowtide export --state /tmp/s --to /tmp/out  write the stored tree out of the state

Exit status:
  0  all is well
  1  what was read back differs, or an invariant does not hold
  2  a mistake in the command line or in a configuration file
  3  the cluster, the network or a file system failed
  4  verified, but some of the input could not be read (see --skip-unreadable)
  130  interrupted
  141  whoever read the output went away";

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Store a directory through a cluster of processes on this machine, break it, verify
    Run(RunArgs),
    /// Write the stored tree out of a stopped or crashed cluster's state
    Export(ExportArgs),
    /// Check a stopped or crashed cluster's state by itself
    Verify(VerifyArgs),
    /// Play a power failure on the state of a cluster that was killed
    LosePower(LosePowerArgs),
    /// Run one node of a cluster
    Node(NodeArgs),
    /// Store a local file or directory
    Put(PutArgs),
    /// Write a stored file or directory to a local path
    Get(GetArgs),
    /// List a stored directory
    Ls(LsArgs),
    /// Make a directory
    Mkdir(MkdirArgs),
    /// Rename a file or directory
    Mv(MvArgs),
    /// Give a file another name
    Ln(LnArgs),
    /// Remove a file or directory
    Rm(RmArgs),
    /// Show how the nodes of a cluster on this machine are
    Status(StatusArgs),
    /// Print and verify log segments
    Log(LogArgs),
    /// List what this machine has for RDMA, and why something is not usable
    Devices(DevicesArgs),
    /// Write a capture file of the packets that another lowtide command sends and receives
    Capture(CaptureArgs),
    /// Explain the RoCEv2 packets of a capture file
    Dissect(DissectArgs),
    /// Be the other end of perftest's ib_send_bw and its like, by softroce
    PerftestPeer(PerftestPeerArgs),
}

/// Options of `run`.
#[derive(Debug, Args)]
#[command(after_help = RUN_AFTER_HELP)]
pub struct RunArgs {
    /// Directory to store [default: one that every machine with Rust has]
    #[arg(long, value_name = "DIR")]
    pub input: Option<PathBuf>,
    /// Where the cluster keeps everything; kept afterwards [default: temporary, kept on failure]
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Metadata servers
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub meta: u32,
    /// Object servers
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub object: u32,
    /// Proxies
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..=32))]
    pub proxy: u32,
    /// Clients
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub clients: u32,
    /// Shards of each server [default: cores / number of servers, at least 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub shards: Option<u32>,
    /// Aggregators between proxies and clients and the root
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=32))]
    pub routers: u32,
    /// What to break and when; may be repeated (see below)
    #[arg(long = "fault", value_name = "SPEC")]
    pub faults: Vec<Fault>,
    /// Transport
    #[arg(long, value_enum, default_value_t = Provider::Auto)]
    pub provider: Provider,
    /// Write the report as JSON ('-' for standard output)
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Have the clients write down in files there what is stable, as soon as it is
    #[arg(long, value_name = "DIR")]
    pub journal: Option<PathBuf>,
    /// Record what servers have not synced, for `lose-power` (faults with poweroff: do so anyway)
    #[arg(long)]
    pub record_unsynced: bool,
    /// Succeed although some of the input cannot be read
    #[arg(long)]
    pub skip_unreadable: bool,
    /// Keep the cluster running after the verification, until Ctrl-C
    #[arg(long)]
    pub stay: bool,
    /// Milliseconds for which a killed process stays dead
    #[arg(long, value_name = "MS", default_value_t = 300)]
    pub restart_after: u64,
    /// Milliseconds of silence after which the root evicts a client or proxy
    #[arg(long, value_name = "MS", default_value_t = 30_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub evict_after: u64,
    /// Seconds without any progress after which the run is given up
    #[arg(long, value_name = "S", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..))]
    pub patience: u64,
    /// Seed of everything random in the run [default: from the clock, printed]
    #[arg(long)]
    pub seed: Option<u64>,
}

impl Default for RunArgs {
    fn default() -> RunArgs {
        let cli = Cli::parse_from(["lowtide", "run"]);
        match cli.command {
            Some(Command::Run(args)) => args,
            _ => unreachable!("'run' was parsed"),
        }
    }
}

const RUN_AFTER_HELP: &str = "\
Faults (P: percent of the work; nodes: root, meta0…, object0…, proxy0…, client0…, router0…):
  kill:meta1@40%                   SIGKILL, then a restart
  kill:meta1@40%+500               the same, 500 ms after 40 % were done
  'kill:client1@30%!'              SIGKILL, never restarted (clients, proxies and routers)
  pause:client0@20%:5000           SIGSTOP for 5000 ms
  partition:proxy0,meta1@50%:5000  the two do not hear each other for 5000 ms
  loss:10                          every node loses 10 % of the datagrams it sends
  poweroff:object0@60%             SIGKILL, and each unsynced page becomes old, new or torn

Examples:
  lowtide run --input /usr/share/doc --fault kill:meta1@40%
  lowtide run --fault kill:root@60% --fault pause:proxy0@20%:5000 --report report.json
  lowtide run --state /tmp/s && lowtide export --state /tmp/s --to /tmp/out";

/// Options of `export`.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  lowtide export --state /tmp/s --to /tmp/out
  diff -r --no-dereference ~/src /tmp/out")]
pub struct ExportArgs {
    /// State directory of a cluster that does not run
    #[arg(long, value_name = "DIR")]
    pub state: PathBuf,
    /// Directory to write, which must be empty or absent
    #[arg(long, value_name = "DIR")]
    pub to: PathBuf,
}

/// Options of `verify`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  lowtide verify --state /tmp/s")]
pub struct VerifyArgs {
    /// State directory of a cluster that does not run
    #[arg(long, value_name = "DIR")]
    pub state: PathBuf,
}

/// Options of `lose-power`.
#[derive(Debug, Args)]
#[command(after_help = "\
Each page that a server had written and not yet synced becomes old, new or torn, as if the machine
under all of them had lost power when they were killed. The cluster must have been started with
`run --record-unsynced`, or with record_unsynced = true in its nodes' files.

Example:
  lowtide lose-power --state /tmp/s && lowtide export --state /tmp/s --to /tmp/out")]
pub struct LosePowerArgs {
    /// State directory of a cluster that does not run
    #[arg(long, value_name = "DIR")]
    pub state: PathBuf,
    /// Decides what becomes of each page
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// Options of `node`.
#[derive(Debug, Args)]
#[command(after_help = NODE_AFTER_HELP)]
pub struct NodeArgs {
    /// The node's file
    #[arg(long, value_name = "FILE.toml")]
    pub config: PathBuf,
    /// Die together with this process, which must be the parent
    #[arg(long, value_name = "PID")]
    pub supervised: Option<i32>,
}

const NODE_AFTER_HELP: &str = "\
A node file (paths are relative to it):
  version = 1
  cluster = \"cluster.toml\"
  name = \"meta0\"
  dir = \"/var/lib/lowtide/meta0\"   # root, meta, object
  control = \"control.sock\"
  # shards = 4                     # meta, object: a thread and a log each; default: one per core
  # evict_after_ms = 30000         # root: a client or proxy that is silent for longer is evicted

A cluster file:
  version = 1
  [[node]]
  name = \"meta0\"
  id = 2                           # unique, never reused
  role = \"meta\"                    # root, meta, object, proxy, client, router
  address = \"192.0.2.7:4791\"
  # parent = \"router0\"             # proxy, client: pings go there, not to the root
  [[route]]                        # client0 reaches meta0 through proxy0
  client = \"client0\"
  home = \"meta0\"
  proxy = \"proxy0\"

Example:
  lowtide node --config /etc/lowtide/meta0.toml";

/// Which cluster a command on files talks to.
#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub struct Where {
    /// State directory of a cluster that `lowtide run --stay` keeps running
    #[arg(long, value_name = "DIR", conflicts_with = "cluster")]
    pub state: Option<PathBuf>,
    /// Description of a cluster to join as a client
    #[arg(long, value_name = "FILE.toml")]
    pub cluster: Option<PathBuf>,
    /// Which client of that cluster to be [default: the last one]
    #[arg(long = "as", value_name = "NAME", requires = "cluster")]
    pub client: Option<String>,
    /// Transport of that cluster
    #[arg(long, value_enum, default_value_t = Provider::Auto, requires = "cluster")]
    pub provider: Provider,
}

/// Options of `put`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  lowtide put --state /tmp/s notes.txt /docs/notes.txt")]
pub struct PutArgs {
    /// The cluster
    #[command(flatten)]
    pub cluster: Where,
    /// Local file or directory
    pub from: PathBuf,
    /// Name in the tree, which must not exist
    pub to: PathBuf,
}

/// Options of `get`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  lowtide get --state /tmp/s /docs /tmp/docs")]
pub struct GetArgs {
    /// The cluster
    #[command(flatten)]
    pub cluster: Where,
    /// Name in the tree
    pub from: PathBuf,
    /// Local path, which must not exist
    pub to: PathBuf,
}

/// Options of `ls`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  lowtide ls --state /tmp/s -l /docs")]
pub struct LsArgs {
    /// The cluster
    #[command(flatten)]
    pub cluster: Where,
    /// Kind, permissions, links, size and time too
    #[arg(short, long)]
    pub long: bool,
    /// Name in the tree
    #[arg(default_value = "/")]
    pub path: PathBuf,
}

/// Options of `mkdir`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  lowtide mkdir --state /tmp/s -p /docs/2026")]
pub struct MkdirArgs {
    /// The cluster
    #[command(flatten)]
    pub cluster: Where,
    /// Make missing parents; an existing directory is no error
    #[arg(short, long)]
    pub parents: bool,
    /// Name in the tree
    pub path: PathBuf,
}

/// Options of `mv`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  lowtide mv --state /tmp/s /docs /texts")]
pub struct MvArgs {
    /// The cluster
    #[command(flatten)]
    pub cluster: Where,
    /// Name in the tree
    pub from: PathBuf,
    /// New name in the tree
    pub to: PathBuf,
}

/// Options of `ln`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  lowtide ln --state /tmp/s -s ../notes.txt /docs/link")]
pub struct LnArgs {
    /// The cluster
    #[command(flatten)]
    pub cluster: Where,
    /// A symbolic link instead of a hard one
    #[arg(short, long)]
    pub symbolic: bool,
    /// File in the tree, or the symbolic link's text
    pub target: PathBuf,
    /// New name in the tree
    pub name: PathBuf,
}

/// Options of `rm`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  lowtide rm --state /tmp/s -r /docs")]
pub struct RmArgs {
    /// The cluster
    #[command(flatten)]
    pub cluster: Where,
    /// A directory and everything in it
    #[arg(short, long)]
    pub recursive: bool,
    /// Name in the tree
    pub path: PathBuf,
}

/// Options of `status`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  lowtide status --state /tmp/s --watch
  lowtide status --control /var/lib/lowtide/meta0/control.sock --json")]
#[group(required = true, multiple = true)]
pub struct StatusArgs {
    /// State directory of a running cluster on this machine
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Control socket of a node; may be repeated
    #[arg(long, value_name = "SOCKET")]
    pub control: Vec<PathBuf>,
    /// JSON, one line per look
    #[arg(long)]
    pub json: bool,
    /// Look again every second, until Ctrl-C
    #[arg(long)]
    pub watch: bool,
}

/// Options of `log`.
#[derive(Debug, Args)]
#[command(after_help = "\
Stops at the first bad record of each segment and says so. A torn end is what a crash leaves; a
record that is missing although a later one proves that it was durable is an error.

Examples:
  lowtide log /tmp/s/meta0/data
  lowtide log --verify /tmp/s/meta0/data")]
pub struct LogArgs {
    /// Segment file, or the directory that holds a node's logs
    pub path: PathBuf,
    /// Only verify; print one line per log
    #[arg(long)]
    pub verify: bool,
}

/// Options of `devices`.
#[derive(Debug, Args)]
#[command(after_help = "\
Adapters and the kernel's rxe and siw as libibverbs shows them (it is loaded when it is there), and
the addresses that softroce can serve; with the package, right or sysctl that would help.

Examples:
  lowtide devices
  lowtide devices --json | jq '.softroce[] | select(.unusable | not) | .address'")]
pub struct DevicesArgs {
    /// JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `capture`.
#[derive(Debug, Args)]
#[command(after_help = "\
Every process of the command writes what its device sends and accepts; in FILE each packet is once,
as its sender saw it. What the fault injector loses is not in it. No rights are needed. Nodes that
are killed lose the last few KiB. In a configuration of your own, start nodes with
LOWTIDE_CAPTURE=DIR in the environment: each writes DIR/ADDRESS.PID.pcap.

Examples:
  lowtide capture --to run.pcap -- run --input ~/src --fault loss:5
  lowtide capture --to put.pcap -- put --cluster cluster.toml notes.txt /notes.txt
  lowtide dissect run.pcap")]
pub struct CaptureArgs {
    /// The pcap file to write
    #[arg(long, value_name = "FILE")]
    pub to: PathBuf,
    /// The lowtide command, such as run, node, put or get, with its options
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// Options of `dissect`.
#[derive(Debug, Args)]
#[command(after_help = "\
Tells opcode, queue pair, PSN, the headers that follow, what management datagrams say, and whether
the invariant CRC is right. Reads pcap and pcapng files of any program. UDP port 4791 is RoCEv2; so
is what parses and has a right ICRC on any other port. Runs that segmentation offload had not cut up yet are
taken apart. Exit status 1 if an ICRC is wrong, a packet is malformed
or the file is damaged. With --json one object a line, the last one with the sums.

Examples:
  lowtide dissect run.pcap
  tcpdump -i eth0 -w wire.pcap udp port 4791; lowtide dissect wire.pcap
  lowtide dissect --json run.pcap | jq 'select(.aeth.kind == \"NAK\")'")]
pub struct DissectArgs {
    /// The capture file
    pub file: PathBuf,
    /// Another UDP port of RoCEv2; may be repeated
    #[arg(long, value_name = "PORT")]
    pub port: Vec<u16>,
    /// JSON, one line per packet
    #[arg(long)]
    pub json: bool,
}

/// Options of `perftest-peer`.
#[derive(Debug, Args)]
#[command(after_help = PERFTEST_PEER_AFTER_HELP)]
pub struct PerftestPeerArgs {
    /// Which of perftest's programs runs at the other end
    #[arg(value_enum, value_name = "PROGRAM")]
    pub program: PerftestProgram,
    /// Host or address where that program waits; without, it is waited for here
    pub server: Option<String>,
    /// Address of this machine to serve with softroce; its UDP port 4791 must be free
    #[arg(long, value_name = "IP")]
    pub address: IpAddr,
    /// Connection type
    #[arg(short, long, value_enum, ignore_case = true, default_value_t = PerftestConnection::Rc)]
    pub connection: PerftestConnection,
    /// Messages [default: as perftest: 5000 of ib_write_bw, else 1000]
    #[arg(short = 'n', long = "iters", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub iterations: Option<u32>,
    /// Bytes of a message [default: as perftest: 2 of ib_send_lat, 8 of ib_atomic_bw, else 65536]
    #[arg(short, long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1..=8 << 20))]
    pub size: Option<u32>,
    /// TCP port on which the two find each other
    #[arg(short, long, default_value_t = lowtide_peers::perftest::TCP_PORT)]
    pub port: u16,
}

/// perftest's programs, as it calls them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs, reason = "the names say it, and are what the help shows")]
#[value(rename_all = "snake_case")]
pub enum PerftestProgram {
    IbSendLat,
    IbSendBw,
    IbWriteBw,
    IbReadBw,
    IbAtomicBw,
}

/// Types of queue pairs, as perftest calls them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs, reason = "as above")]
#[value(rename_all = "UPPER")]
pub enum PerftestConnection {
    Rc,
    Uc,
    Ud,
}

const PERFTEST_PEER_AFTER_HELP: &str = "\
Options that perftest has too must be the same there; its others must be at their defaults (no -R,
-b, -q, -e). The other end may be any RoCEv2 adapter, or the kernel's rxe on another machine or in
another network namespace. On its side -x chooses the RoCE v2 GID of the right address. ib_send_lat
prints half of a round trip, as perftest does. Ctrl-C ends it at any time.

Examples:
  lowtide perftest-peer ib_write_bw --address 192.0.2.7
    and there: ib_write_bw -x 1 -F 192.0.2.7
  lowtide perftest-peer ib_send_lat -s 64 --address 192.0.2.7 192.0.2.1
    after, there: ib_send_lat -x 1 -F -s 64
  lowtide perftest-peer ib_send_bw -c UD -s 1024 -n 400 --address 192.0.2.7
    and there: ib_send_bw -x 1 -F -c UD -s 1024 -n 400 192.0.2.7";

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definitions_are_consistent() {
        Cli::command().debug_assert();
        assert_eq!(RunArgs::default().clients, 2);
    }

    #[test]
    fn a_wrong_fault_is_explained() {
        let error = Cli::try_parse_from(["lowtide", "run", "--fault", "kill:meta@4%"]).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("which one? say meta0"), "{text}");
        assert!(text.contains("example: --fault kill:meta1@40%"), "{text}");
        assert_eq!(error.exit_code(), 2);
    }
}
