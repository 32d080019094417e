//! `lowtide status`.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use super::Failure;
use crate::cli::StatusArgs;
use crate::control::{Control, NodeReport};
use crate::{engine, state};

pub(super) fn status(args: &StatusArgs) -> Result<(), Failure> {
    let mut sockets: Vec<(String, PathBuf)> = Vec::new();
    let mut names = BTreeMap::new();
    if let Some(dir) = &args.state {
        for member in state::cluster(dir).map_err(Failure::usage)?.members {
            let socket = state::control_socket(dir, &member.name);
            names.insert(member.id, member.name.clone());
            sockets.push((member.name, socket));
        }
    }
    for socket in &args.control {
        sockets.push((socket.display().to_string(), socket.clone()));
    }
    loop {
        let answered = look(&sockets, &names, args.json)?;
        if !args.watch {
            return match answered {
                0 => Err(Failure::cluster("no node answers")),
                _ => Ok(()),
            };
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// Asks every node once and prints; returns how many answered.
fn look(
    sockets: &[(String, PathBuf)],
    names: &BTreeMap<u32, String>,
    json: bool,
) -> Result<usize, Failure> {
    let reports: Vec<_> = sockets
        .iter()
        .map(|(name, socket)| {
            let report = Control::connect(socket).and_then(|mut c| c.report());
            (name, report.map_err(|error| error.to_string()))
        })
        .collect();
    let answered = reports.iter().filter(|(_, r)| r.is_ok()).count();
    let mut out = std::io::stdout().lock();
    let written = if json {
        let nodes: serde_json::Map<String, serde_json::Value> = reports
            .iter()
            .map(|(name, report)| {
                let value = match report {
                    Ok(report) => serde_json::json!(report),
                    Err(error) => serde_json::json!({ "error": error }),
                };
                ((*name).clone(), value)
            })
            .collect();
        writeln!(out, "{}", serde_json::Value::Object(nodes))
    } else {
        reports
            .iter()
            .try_for_each(|(name, report)| match report {
                Ok(report) => writeln!(out, "{}", line(name, report, names)),
                Err(error) => writeln!(out, "{name:10} {error}"),
            })
            .and_then(|()| writeln!(out))
    };
    written.map_err(Failure::output)?;
    Ok(answered)
}

fn line(name: &str, report: &NodeReport, names: &BTreeMap<u32, String>) -> String {
    let status = &report.status;
    let mut line = format!(
        "{name:10} life {:<4} epoch {:<10} minimum {:<10} {}",
        status.incarnation, status.epoch, status.minimum, status.stage
    );
    if status.shards > 0 {
        line += &format!(", {} shards", status.shards);
    }
    let c = &status.counters;
    for (value, what) in [
        (c.operations, "operations"),
        (c.in_flight, "in flight"),
        (c.windows_sent, "windows"),
        (c.undo_appended, "undo records"),
        (c.replayed, "replayed"),
        (c.completed, "completed"),
        (c.undone, "undone"),
        (c.joins_rejected, "servers not let in"),
        (c.epochs_refused, "incredible epochs refused"),
        (c.epochs_refused_elsewhere, "incredible epochs sent"),
    ] {
        if value > 0 {
            line += &format!(", {value} {what}");
        }
    }
    if let Some(blocker) = engine::waits_for(status, |id| names.get(&id).cloned()) {
        line += &format!("; {blocker}");
    }
    line
}
