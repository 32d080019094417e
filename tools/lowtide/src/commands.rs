//! What the subcommands do, and how they fail.

use std::fmt::Display;
use std::io;

use crate::cli::{Cli, Command, RunArgs};
use crate::control::{FileJob, RawPath};

mod devices;
mod dissect;
mod files;
mod log;
mod node;
mod offline;
mod perftest;
mod run;
mod status;

/// How a command fails. The number is the exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What was read back differs, or an invariant does not hold.
    Verification = 1,
    /// A mistake in the command line or a configuration file.
    Usage = 2,
    /// The cluster, the network or a file system failed.
    Cluster = 3,
    /// Verified, but some input could not be read.
    Unreadable = 4,
    /// Ctrl-C or SIGTERM.
    Interrupted = 130,
    /// Whoever read our output went away; as if SIGPIPE had ended us, and nobody to tell.
    Unread = 141,
}

impl Kind {
    /// The kind that an exit status stands for.
    fn from_status(status: i32) -> Option<Kind> {
        [
            Kind::Verification,
            Kind::Usage,
            Kind::Cluster,
            Kind::Unreadable,
            Kind::Interrupted,
            Kind::Unread,
        ]
        .into_iter()
        .find(|kind| *kind as i32 == status)
    }
}

/// A command's failure, in words for the user.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What kind, for the exit status.
    pub kind: Kind,
    /// What happened.
    pub message: String,
}

impl Failure {
    fn new(kind: Kind, message: impl Display) -> Failure {
        Failure {
            kind,
            message: message.to_string(),
        }
    }

    /// For `map_err` on mistakes of the user.
    fn usage(message: impl Display) -> Failure {
        Failure::new(Kind::Usage, message)
    }

    /// For `map_err` on writes to standard output.
    fn output(error: io::Error) -> Failure {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Failure::new(Kind::Unread, error),
            _ => Failure::new(Kind::Cluster, error),
        }
    }

    /// For `map_err` on failures of machines.
    fn cluster(message: impl Display) -> Failure {
        Failure::new(Kind::Cluster, message)
    }
}

/// Does what the command line says.
///
/// # Errors
/// The failure to print, with the exit status to leave with.
pub fn execute(cli: Cli) -> Result<(), Failure> {
    match cli.command {
        None => run::run(RunArgs::default()),
        Some(Command::Run(args)) => run::run(args),
        Some(Command::Export(args)) => offline::export(&args),
        Some(Command::Verify(args)) => offline::verify(&args),
        Some(Command::LosePower(args)) => offline::lose_power(&args),
        Some(Command::Status(args)) => status::status(&args),
        Some(Command::Log(args)) => log::log(&args),
        Some(Command::Capture(args)) => dissect::capture(&args),
        Some(Command::Devices(args)) => devices::devices(&args),
        Some(Command::Dissect(args)) => dissect::dissect(&args),
        Some(Command::PerftestPeer(args)) => perftest::peer(&args),
        Some(Command::Node(args)) => node::node(&args),
        Some(Command::Put(args)) => {
            let (from, to) = (files::local(&args.from)?, RawPath(args.to));
            files::run(&args.cluster, FileJob::Put { from, to })
        }
        Some(Command::Get(args)) => {
            let (from, to) = (RawPath(args.from), files::local(&args.to)?);
            files::run(&args.cluster, FileJob::Get { from, to })
        }
        Some(Command::Ls(args)) => {
            let (path, long) = (RawPath(args.path), args.long);
            files::run(&args.cluster, FileJob::Ls { path, long })
        }
        Some(Command::Mkdir(args)) => {
            let (path, parents) = (RawPath(args.path), args.parents);
            files::run(&args.cluster, FileJob::Mkdir { path, parents })
        }
        Some(Command::Mv(args)) => {
            let (from, to) = (RawPath(args.from), RawPath(args.to));
            files::run(&args.cluster, FileJob::Mv { from, to })
        }
        Some(Command::Ln(args)) => {
            let job = FileJob::Ln {
                target: RawPath(args.target),
                name: RawPath(args.name),
                symbolic: args.symbolic,
            };
            files::run(&args.cluster, job)
        }
        Some(Command::Rm(args)) => {
            let (path, recursive) = (RawPath(args.path), args.recursive);
            files::run(&args.cluster, FileJob::Rm { path, recursive })
        }
    }
}
