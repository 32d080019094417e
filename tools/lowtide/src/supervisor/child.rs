//! One node process: started, watched, stopped, killed.
//!
//! Each life of a node is a process in a process group of its own (Ctrl-C on the terminal reaches
//! only the supervisor) that dies with the supervisor (`node` asks for the parent's death signal).
//! A watching thread asks the node for its report thirty times a second, so that a node that is
//! paused, dead or slow never delays the supervisor; a tenth as often when the run is over and the
//! cluster only stays.

use std::fs::File;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::control::{Control, NodeReport};

/// Time between two reports.
const WATCH_INTERVAL: Duration = Duration::from_millis(30);
/// The same while the cluster only stays.
const CALM_INTERVAL: Duration = Duration::from_millis(300);

/// A running node process.
#[derive(Debug)]
pub struct Child {
    process: std::process::Child,
    watch: Watch,
}

/// What to start: a program, its arguments, where its output goes, where it takes orders.
#[derive(Clone, Debug)]
pub struct Program {
    /// The executable.
    pub path: PathBuf,
    /// Its arguments.
    pub args: Vec<std::ffi::OsString>,
    /// File to which its output is appended.
    pub log: PathBuf,
    /// Its control socket.
    pub control: PathBuf,
}

impl Child {
    /// Starts the program. The calling thread must live as long as the child: Linux ties the
    /// parent's death signal to the thread that forked.
    ///
    /// # Errors
    /// The log cannot be opened or the program cannot be executed.
    pub fn spawn(program: &Program) -> io::Result<Child> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(&program.log)?;
        let process = Command::new(&program.path)
            .args(&program.args)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()?;
        Ok(Child {
            process,
            watch: Watch::start(&program.control)?,
        })
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// The newest report and when it arrived; `None` before the first.
    #[must_use]
    pub fn report(&self) -> Option<(Instant, NodeReport)> {
        self.watch.latest()
    }

    /// Asks for reports less often from now on.
    pub fn watch_calmly(&self) {
        self.watch.shared.is_calm.store(true, Ordering::Relaxed);
    }

    /// How the process ended, once it has.
    ///
    /// # Errors
    /// The system call failed.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.process.try_wait()
    }

    /// SIGKILL, and waits until the process is gone. SIGKILL also ends a stopped process.
    ///
    /// # Errors
    /// A system call failed.
    pub fn kill(&mut self) -> io::Result<ExitStatus> {
        self.process.kill()?;
        self.process.wait()
    }

    /// SIGSTOP.
    ///
    /// # Errors
    /// The system call failed.
    pub fn pause(&self) -> io::Result<()> {
        self.signal(Signal::STOP)
    }

    /// SIGCONT.
    ///
    /// # Errors
    /// The system call failed.
    pub fn resume(&self) -> io::Result<()> {
        self.signal(Signal::CONT)
    }

    fn signal(&self, signal: Signal) -> io::Result<()> {
        let pid = i32::try_from(self.process.id())
            .ok()
            .and_then(Pid::from_raw)
            .ok_or(io::ErrorKind::InvalidInput)?;
        // The process is not reaped before `self` says so, so the number is still its own.
        Ok(kill_process(pid, signal)?)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Already reaped, or the supervisor leaves early: nothing may stay behind.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// In words: `killed by signal 9`, `exit status: 3`.
#[must_use]
pub fn describe_exit(status: ExitStatus) -> String {
    match status.signal() {
        Some(signal) => format!("killed by signal {signal}"),
        None => status.to_string(),
    }
}

/// The last lines of a log, for error messages.
#[must_use]
pub fn log_tail(log: &Path, lines: usize) -> String {
    let bytes = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(16 << 10)..]);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Asks one life of a node for its report until dropped.
#[derive(Debug)]
struct Watch {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    latest: Mutex<Option<(Instant, NodeReport)>>,
    over: AtomicBool,
    is_calm: AtomicBool,
}

impl Watch {
    fn start(socket: &Path) -> io::Result<Watch> {
        let shared = Arc::new(Shared::default());
        let (socket, own) = (socket.to_owned(), Arc::clone(&shared));
        std::thread::Builder::new()
            .name("watch".to_owned())
            .spawn(move || watch_loop(&socket, &own))?;
        Ok(Watch { shared })
    }

    fn latest(&self) -> Option<(Instant, NodeReport)> {
        self.shared.latest.lock().expect("no holder panics").clone()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Not joined: the thread may wait for a stopped process for some seconds. It holds
        // nothing but its connection and ends by itself.
        self.shared.over.store(true, Ordering::Relaxed);
    }
}

fn watch_loop(socket: &Path, shared: &Shared) {
    let mut connection: Option<Control> = None;
    while !shared.over.load(Ordering::Relaxed) {
        if connection.is_none() {
            connection = Control::connect(socket).ok();
        }
        match connection.as_mut().map(Control::report) {
            Some(Ok(report)) => {
                *shared.latest.lock().expect("no holder panics") = Some((Instant::now(), report));
            }
            Some(Err(_)) => connection = None,
            None => {}
        }
        std::thread::sleep(match shared.is_calm.load(Ordering::Relaxed) {
            true => CALM_INTERVAL,
            false => WATCH_INTERVAL,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{Answer, Server};

    fn program(dir: &Path, script: &str) -> Program {
        Program {
            path: "/bin/sh".into(),
            args: vec!["-c".into(), script.into()],
            log: dir.join("log"),
            control: dir.join("control.sock"),
        }
    }

    #[test]
    fn output_and_exit_are_told() {
        let tmp = tempfile::tempdir().unwrap();
        let program = program(tmp.path(), "echo one; echo two >&2; exit 3");
        let mut child = Child::spawn(&program).unwrap();
        let status = child.process.wait().unwrap();
        assert_eq!(describe_exit(status), "exit status: 3");
        assert_eq!(log_tail(&program.log, 5), "one\ntwo");
        assert_eq!(log_tail(&program.log, 1), "two");
    }

    #[test]
    fn a_stopped_process_can_be_killed() {
        let tmp = tempfile::tempdir().unwrap();
        let mut child = Child::spawn(&program(tmp.path(), "exec sleep 1000")).unwrap();
        child.pause().unwrap();
        child.resume().unwrap();
        child.pause().unwrap();
        assert_eq!(child.try_wait().unwrap(), None);
        let status = child.kill().unwrap();
        assert_eq!(describe_exit(status), "killed by signal 9");
    }

    #[test]
    fn reports_arrive_once_the_node_listens() {
        let tmp = tempfile::tempdir().unwrap();
        let program = program(tmp.path(), "exec sleep 1000");
        let child = Child::spawn(&program).unwrap();
        assert_eq!(child.report(), None);
        let _server = Server::start(
            &program.control,
            Arc::new(|_| Answer::Report(Box::default())),
        )
        .unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while child.report().is_none() {
            assert!(Instant::now() < deadline, "no report");
            std::thread::yield_now();
        }
    }
}
