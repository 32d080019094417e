//! `lowtide run`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, SystemTime};

use signal_hook::consts::{SIGINT, SIGTERM};

use super::{Failure, Kind};
use crate::cli::RunArgs;
use crate::fault::{Fault, Shape};
use crate::report::Report;
use crate::state::State;
use crate::supervisor::{self, Options, RunError};
use crate::{address, engine, input};

pub(super) fn run(args: RunArgs) -> Result<(), Failure> {
    let options = options(&args)?;
    let executable = std::env::current_exe().map_err(Failure::cluster)?;
    let interrupted = catch_signals()?;
    let place = Place::prepare(args.state.as_deref())?;
    let result = supervisor::run(&options, &place.state, &executable, &interrupted);
    let outcome = result
        .map_err(|error| match error {
            RunError::Interrupted => Failure::new(Kind::Interrupted, "interrupted"),
            error => Failure::cluster(error),
        })
        .and_then(|report| {
            publish(&report, args.report.as_deref())?;
            judge(&report, args.skip_unreadable)
        });
    place.finish(outcome)
}

/// Checks the arguments against each other and the machine.
fn options(args: &RunArgs) -> Result<Options, Failure> {
    let shape = Shape {
        meta: args.meta,
        object: args.object,
        proxy: args.proxy,
        client: args.clients,
        router: args.routers,
    };
    for fault in &args.faults {
        fault.validate(&shape).map_err(Failure::usage)?;
    }
    let count = shape.total() as usize;
    if count > address::NODES_MAX {
        return Err(Failure::usage(format!(
            "{count} nodes are too many for one machine, at most {}",
            address::NODES_MAX
        )));
    }
    let on_wire = |fault: &&Fault| matches!(fault, Fault::Loss { .. } | Fault::Partition { .. });
    let on_wire = args.faults.iter().find(on_wire).map(Fault::to_string);
    let needs_wire = on_wire.as_deref().or(engine::needs_wire(0.0));
    let chosen = engine::choose_provider(args.provider, None, needs_wire);
    let (carrier, why) = chosen.map_err(Failure::usage)?;
    let input = match &args.input {
        Some(dir) => dir.clone(),
        None => input::default_input().ok_or_else(|| {
            Failure::usage("no default input found on this machine; name one with --input DIR")
        })?,
    };
    let input = std::fs::read_dir(&input)
        .and_then(|_| input.canonicalize())
        .map_err(|error| Failure::usage(format!("--input {}: {error}", input.display())))?;
    if let Some(state) = &args.state {
        check_apart(&input, state)?;
    }
    if let Some(report) = args.report.as_deref()
        && report.as_os_str() != "-"
    {
        check_report(report)?;
    }
    Ok(Options {
        input,
        shape,
        shards: args.shards,
        faults: args.faults.clone(),
        carrier,
        why,
        seed: args.seed.unwrap_or_else(seed_from_clock),
        restart_after: Duration::from_millis(args.restart_after),
        evict_after_ms: args.evict_after,
        patience: Duration::from_secs(args.patience),
        stay: args.stay,
        record_unsynced: args.record_unsynced,
        journal: args.journal.as_deref().map(journal).transpose()?,
    })
}

/// The directory of the journals, absolute, since nodes may run elsewhere.
fn journal(dir: &Path) -> Result<PathBuf, Failure> {
    std::fs::create_dir_all(dir)
        .and_then(|()| dir.canonicalize())
        .map_err(|error| Failure::usage(format!("--journal {}: {error}", dir.display())))
}

/// A state directory inside the input would be stored while it grows.
fn check_apart(input: &Path, state: &Path) -> Result<(), Failure> {
    let state = std::path::absolute(state).map_err(Failure::usage)?;
    // The deepest part that exists decides where the rest will be.
    let real = state
        .ancestors()
        .find_map(|dir| dir.canonicalize().ok())
        .unwrap_or(state);
    if real.starts_with(input) {
        return Err(Failure::usage(format!(
            "--state {} lies inside of the input {}",
            real.display(),
            input.display()
        )));
    }
    Ok(())
}

fn seed_from_clock() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |d| d.as_nanos() as u64)
        & i64::MAX as u64
}

/// A signal asks the run to end; it looks every few milliseconds, so none is needed to insist.
fn catch_signals() -> Result<Arc<AtomicBool>, Failure> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted)).map_err(Failure::cluster)?;
    }
    Ok(interrupted)
}

/// The state directory and what becomes of it.
struct Place {
    state: State,
    temporary: Option<tempfile::TempDir>,
}

impl Place {
    fn prepare(dir: Option<&Path>) -> Result<Place, Failure> {
        if let Some(dir) = dir {
            return Ok(Place {
                state: State::create(dir).map_err(Failure::usage)?,
                temporary: None,
            });
        }
        let temporary = tempfile::Builder::new()
            .prefix("lowtide-")
            .tempdir()
            .map_err(Failure::cluster)?;
        Ok(Place {
            state: State::create(temporary.path()).map_err(Failure::cluster)?,
            temporary: Some(temporary),
        })
    }

    /// Removes a temporary state after a success, and says where it is after a failure.
    fn finish(self, outcome: Result<(), Failure>) -> Result<(), Failure> {
        let dir: PathBuf = match (self.temporary, &outcome) {
            (Some(temporary), Err(_)) => temporary.keep(),
            (Some(_), Ok(())) => return outcome,
            (None, _) => self.state.dir().to_owned(),
        };
        eprintln!("state     {}", dir.display());
        outcome
    }
}

/// Prints the summary and writes the report where it was asked for. On standard output the report is
/// alone, for programs that read it there.
fn publish(report: &Report, file: Option<&Path>) -> Result<(), Failure> {
    // A reader that went away does not change how the run ended.
    let is_alone = file.is_some_and(|path| path.as_os_str() == "-");
    let _ = match is_alone {
        true => writeln!(std::io::stderr(), "{report}"),
        false => writeln!(std::io::stdout(), "{report}"),
    };
    let Some(path) = file else {
        return Ok(());
    };
    let json = serde_json::to_string_pretty(report).expect("plain data") + "\n";
    let written = match is_alone {
        true => std::io::stdout().write_all(json.as_bytes()),
        false => std::fs::write(path, json),
    };
    written.map_err(|error| Failure::cluster(format!("--report {}: {error}", path.display())))
}

/// A report that could not be written would cost the whole run.
fn check_report(path: &Path) -> Result<(), Failure> {
    let found = match path.metadata() {
        Ok(_) => std::fs::OpenOptions::new()
            .append(true)
            .open(path)
            .map(drop),
        Err(_) => {
            let dir = std::path::absolute(path).map_err(Failure::usage)?;
            std::fs::read_dir(dir.parent().unwrap_or(&dir)).map(drop)
        }
    };
    found.map_err(|error| Failure::usage(format!("--report {}: {error}", path.display())))
}

/// Decides about success.
fn judge(report: &Report, skip_unreadable: bool) -> Result<(), Failure> {
    if !report.verified {
        return Err(Failure::new(Kind::Verification, "not verified"));
    }
    if report.unreadable > 0 && !skip_unreadable {
        return Err(Failure::new(
            Kind::Unreadable,
            format!(
                "{} entries of the input could not be read (--skip-unreadable accepts that)",
                report.unreadable
            ),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contradictions_are_usage_errors() {
        let tmp = tempfile::tempdir().unwrap();
        let good = || RunArgs {
            input: Some(tmp.path().to_owned()),
            ..RunArgs::default()
        };
        options(&good()).unwrap();
        let file = tmp.path().join("file");
        std::fs::write(&file, "").unwrap();
        let table: [(RunArgs, &str); 7] = [
            (
                RunArgs {
                    faults: vec!["kill:meta7@5%".parse().unwrap()],
                    ..good()
                },
                "meta0 to meta1",
            ),
            (
                RunArgs {
                    input: Some(tmp.path().join("absent")),
                    ..good()
                },
                "No such file",
            ),
            (
                RunArgs {
                    report: Some(tmp.path().join("absent/report.json")),
                    ..good()
                },
                "--report",
            ),
            (
                RunArgs {
                    report: Some(tmp.path().to_owned()),
                    ..good()
                },
                "directory",
            ),
            (
                RunArgs {
                    input: Some(file),
                    ..good()
                },
                "Not a directory",
            ),
            (
                RunArgs {
                    state: Some(tmp.path().join("new/state")),
                    ..good()
                },
                "inside of the input",
            ),
            (
                RunArgs {
                    meta: 64,
                    object: 64,
                    proxy: 64,
                    clients: 64,
                    ..good()
                },
                "too many",
            ),
        ];
        for (args, message) in table {
            let failure = options(&args).unwrap_err();
            assert_eq!(failure.kind, Kind::Usage);
            assert!(failure.message.contains(message), "{failure}");
        }
    }

    #[test]
    fn unread_input_fails_a_run_unless_it_is_accepted() {
        let report = |verified, unreadable| Report {
            verified,
            unreadable,
            ..Report::default()
        };
        judge(&report(true, 0), false).unwrap();
        judge(&report(true, 1), true).unwrap();
        let kind = |report: &Report, skip| judge(report, skip).unwrap_err().kind;
        assert_eq!(kind(&report(true, 1), false), Kind::Unreadable);
        assert_eq!(kind(&report(false, 0), true), Kind::Verification);
    }
}
