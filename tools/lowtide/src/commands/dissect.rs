//! `lowtide dissect` and `lowtide capture`.

use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lowtide_transport::pcap::{Frame, Piece, Reader, merge};
use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;
use signal_hook::consts::{SIGINT, SIGTERM};

use super::{Failure, Kind};
use crate::cli::{CaptureArgs, DissectArgs};
use crate::dissect::{Explained, Finding, IcrcVerdict, explain};
use crate::engine::{CAPTURE_VARIABLE, capture_owner};

/// Time between looks at the captured command.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// What a file held.
#[derive(Debug, Default, Serialize)]
struct Summary {
    frames: u64,
    packets: u64,
    icrc_right: u64,
    icrc_wrong: u64,
    icrc_unknown: u64,
    malformed: u64,
    other: u64,
}

#[derive(Serialize)]
struct Line<'a> {
    frame: u64,
    time: String,
    #[serde(flatten)]
    packet: &'a Explained,
}

pub(super) fn dissect(args: &DissectArgs) -> Result<(), Failure> {
    let at = |error: &dyn std::fmt::Display| format!("{}: {error}", args.file.display());
    let file = File::open(&args.file).map_err(|error| Failure::usage(at(&error)))?;
    let mut reader =
        Reader::new(BufReader::new(file)).map_err(|error| Failure::usage(at(&error)))?;
    let mut out = BufWriter::new(std::io::stdout().lock());
    let mut summary = Summary::default();
    let damage = loop {
        match reader.next_frame() {
            Ok(None) => break None,
            Err(error) => break Some(at(&error)),
            Ok(Some(frame)) => {
                summary.frames += 1;
                for finding in explain(&frame, &args.port) {
                    summary.count(&finding);
                    print(&mut out, &frame, &finding, args.json).map_err(Failure::output)?;
                }
            }
        }
    };
    conclude(&mut out, &summary, args.json)
        .and_then(|()| out.flush())
        .map_err(Failure::output)?;
    let mut problems: Vec<String> = damage.into_iter().collect();
    if summary.icrc_wrong + summary.malformed > 0 {
        problems.push(format!(
            "{} packets with a wrong ICRC, {} malformed",
            summary.icrc_wrong, summary.malformed
        ));
    }
    match problems.is_empty() {
        true => Ok(()),
        false => Err(Failure::new(Kind::Verification, problems.join("\n"))),
    }
}

impl Summary {
    fn count(&mut self, finding: &Finding) {
        match finding {
            Finding::Other => self.other += 1,
            Finding::Malformed { .. } => self.malformed += 1,
            Finding::Packet(packet) => {
                self.packets += 1;
                match packet.icrc {
                    IcrcVerdict::Right { .. } => self.icrc_right += 1,
                    IcrcVerdict::Wrong { .. } => self.icrc_wrong += 1,
                    IcrcVerdict::Unknown => self.icrc_unknown += 1,
                }
            }
        }
    }
}

fn print(
    out: &mut impl Write,
    frame: &Frame,
    finding: &Finding,
    is_json: bool,
) -> std::io::Result<()> {
    let time = format!("{}.{:09}", frame.seconds, frame.nanos);
    let number = frame.number;
    match (finding, is_json) {
        (Finding::Other, _) => Ok(()),
        (Finding::Packet(packet), true) => {
            let line = Line {
                frame: number,
                time,
                packet,
            };
            writeln!(out, "{}", serde_json::to_string(&line)?)
        }
        (
            Finding::Malformed {
                source,
                target,
                why,
            },
            true,
        ) => {
            let line = serde_json::json!({
                "frame": number, "time": time, "source": source, "target": target,
                "malformed": why,
            });
            writeln!(out, "{line}")
        }
        (Finding::Packet(packet), false) => writeln!(out, "{number:>7}  {time}  {packet}"),
        (
            Finding::Malformed {
                source,
                target,
                why,
            },
            false,
        ) => {
            writeln!(
                out,
                "{number:>7}  {time}  {source} > {target}  MALFORMED: {why}"
            )
        }
    }
}

fn conclude(out: &mut impl Write, summary: &Summary, is_json: bool) -> std::io::Result<()> {
    if is_json {
        return writeln!(out, "{}", serde_json::json!({ "summary": summary }));
    }
    writeln!(
        out,
        "{} frames: {} RoCEv2 packets (ICRC right {}, wrong {}, unknown {}), {} malformed, \
         {} other",
        summary.frames,
        summary.packets,
        summary.icrc_right,
        summary.icrc_wrong,
        summary.icrc_unknown,
        summary.malformed,
        summary.other
    )
}

pub(super) fn capture(args: &CaptureArgs) -> Result<(), Failure> {
    let to = std::path::absolute(&args.to)
        .map_err(|error| Failure::usage(format!("--to {}: {error}", args.to.display())))?;
    // On the same disk as the result: they are as large.
    let parent = to.parent().unwrap_or(Path::new("/"));
    let pieces = tempfile::Builder::new()
        .prefix(".lowtide-capture-")
        .tempdir_in(parent)
        .map_err(|error| Failure::usage(format!("--to {}: {error}", to.display())))?;
    let status = run_captured(&args.command, pieces.path())?;
    let pieces = pieces_in(pieces.path()).map_err(Failure::cluster)?;
    let count = pieces.len();
    let merged = merge(pieces, &to)
        .map_err(|error| Failure::cluster(format!("--to {}: {error}", to.display())))?;
    for (_, why) in &merged.incomplete {
        eprintln!("capture   one of the devices' files is not whole: {why}");
    }
    eprintln!(
        "capture   {}: {} packets of {count} devices",
        to.display(),
        merged.packets
    );
    if count == 0 {
        return Err(Failure::usage(
            "this command opened no softroce device of its own, so there was nothing to capture \
             (with --state a running client does the work)",
        ));
    }
    match status.code() {
        Some(0) => Ok(()),
        code => {
            let kind = code.and_then(Kind::from_status).unwrap_or(Kind::Cluster);
            Err(Failure::new(
                kind,
                format!("what was captured failed: {status}"),
            ))
        }
    }
}

/// Runs this program again with other arguments; every device it opens writes a file into `dir`.
fn run_captured(arguments: &[std::ffi::OsString], dir: &Path) -> Result<ExitStatus, Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).map_err(Failure::cluster)?;
    }
    let program = std::env::current_exe().map_err(Failure::cluster)?;
    let mut child = Command::new(program)
        .args(arguments)
        .env(CAPTURE_VARIABLE, dir)
        .spawn()
        .map_err(Failure::cluster)?;
    loop {
        if let Some(status) = child.try_wait().map_err(Failure::cluster)? {
            return Ok(status);
        }
        if stop.swap(false, Ordering::Relaxed) {
            pass_on(&child);
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}

/// Asks the child to end as we were asked; a terminal has told it already, and twice is no harm.
fn pass_on(child: &Child) {
    if let Some(pid) = Pid::from_raw(child.id().cast_signed()) {
        // It may have ended meanwhile.
        let _ = kill_process(pid, Signal::TERM);
    }
}

fn pieces_in(dir: &Path) -> std::io::Result<Vec<Piece>> {
    let mut paths: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        paths.push(entry?.path());
    }
    paths.sort();
    Ok(paths
        .into_iter()
        .filter_map(|path| capture_owner(&path).map(|owner| Piece { owner, path }))
        .collect())
}
