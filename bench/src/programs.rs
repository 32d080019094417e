//! Programs that are measured: the lowtide command, and those of the yardsticks.

use std::env;
use std::fs::File;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Failure;

/// Bytes of a failed program's output that are shown.
const TAIL: usize = 2000;

/// The directory that this program lies in.
///
/// # Errors
/// The system does not say.
pub fn own_dir() -> Result<PathBuf, Failure> {
    let own = env::current_exe().map_err(Failure::io("this program"))?;
    Ok(own.parent().unwrap_or(Path::new(".")).to_owned())
}

/// Checks that a yardstick's program can be found.
///
/// # Errors
/// [`Failure::NoYardstick`], with the package.
pub fn require(program: &'static str, package: &'static str) -> Result<(), Failure> {
    let paths = env::var_os("PATH").unwrap_or_default();
    if env::split_paths(&paths).any(|dir| dir.join(program).is_file()) {
        return Ok(());
    }
    Err(Failure::NoYardstick { program, package })
}

/// Runs a program to its end and says how long it took; its output goes to `log`.
///
/// # Errors
/// It cannot be started or fails.
pub fn run(command: &mut Command, log: &Path) -> Result<Duration, Failure> {
    let name = command.get_program().display().to_string();
    let out = File::create(log).map_err(Failure::io(log.display()))?;
    let err = out.try_clone().map_err(Failure::io(log.display()))?;
    let began = Instant::now();
    let status = command
        .stdout(out)
        .stderr(err)
        .status()
        .map_err(Failure::io(&name))?;
    let took = began.elapsed();
    if status.success() {
        return Ok(took);
    }
    let said = std::fs::read(log).unwrap_or_default();
    let said = String::from_utf8_lossy(&said[said.len().saturating_sub(TAIL)..]).into_owned();
    Err(Failure::Broken(format!("{name}: {status}\n{said}")))
}

/// A port of the loopback interface that nobody listens on.
///
/// # Errors
/// There is none.
pub fn free_port() -> Result<u16, Failure> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    listener
        .and_then(|listener| listener.local_addr())
        .map(|address| address.port())
        .map_err(Failure::io("a free port"))
}

/// A server that a yardstick needs, killed when dropped.
#[derive(Debug)]
pub struct Served(Child);

impl Served {
    /// Starts it, and returns when it listens on this TCP port; its output goes nowhere.
    ///
    /// # Errors
    /// It cannot be started, ends, or does not listen within 5 s.
    pub fn start(command: &mut Command, port: u16) -> Result<Served, Failure> {
        const PATIENCE: Duration = Duration::from_secs(5);
        let name = command.get_program().display().to_string();
        let quiet = command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut served = quiet.spawn().map(Served).map_err(Failure::io(&name))?;
        let began = Instant::now();
        while !listens(port)? {
            if let Some(status) = served.0.try_wait().map_err(Failure::io(&name))? {
                return Err(Failure::Broken(format!("{name} as a server: {status}")));
            }
            if began.elapsed() > PATIENCE {
                return Err(Failure::Broken(format!("{name} does not listen on {port}")));
            }
            // Programs of others do not say that they listen; the kernel's table is all there is.
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(served)
    }
}

/// Whether somebody listens on a TCP port: proc(5), state 0A.
fn listens(port: u16) -> Result<bool, Failure> {
    let end = format!(":{port:04X}");
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let text = std::fs::read_to_string(table).map_err(Failure::io(table))?;
        let is_found = text.lines().any(|line| {
            let words: Vec<&str> = line.split_whitespace().take(4).collect();
            matches!(words[..], [_, local, _, "0A"] if local.ends_with(&end))
        });
        if is_found {
            return Ok(true);
        }
    }
    Ok(false)
}

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a program prints.
///
/// # Errors
/// It fails.
pub fn ask(command: &mut Command) -> Result<String, Failure> {
    let name = command.get_program().display().to_string();
    let done = command.output().map_err(Failure::io(&name))?;
    if done.status.success() {
        return Ok(String::from_utf8_lossy(&done.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    Err(Failure::Broken(format!("{name}: {}\n{said}", done.status)))
}

/// Writes everything back that is dirty on the disk of `dir`, so that no round pays for another.
///
/// # Errors
/// `sync` cannot be run or fails.
pub fn settle(dir: &Path) -> Result<Duration, Failure> {
    run(
        Command::new("sync").arg("-f").arg(dir),
        &dir.join("sync.log"),
    )
}

/// The lowtide command.
#[derive(Debug)]
pub struct Lowtide {
    given: Option<PathBuf>,
    found: OnceLock<PathBuf>,
}

impl Lowtide {
    /// The command `given`, or the one beside this program.
    pub fn new(given: Option<PathBuf>) -> Lowtide {
        Lowtide {
            given,
            found: OnceLock::new(),
        }
    }

    /// Where the command is. Under `cargo run` it is brought up to date first, otherwise only
    /// built if it is not there.
    ///
    /// # Errors
    /// It is not there and cannot be built.
    pub fn path(&self) -> Result<&Path, Failure> {
        if let Some(given) = &self.given {
            return Ok(given);
        }
        if let Some(found) = self.found.get() {
            return Ok(found);
        }
        let path = own_dir()?.join("lowtide");
        let cargo = env::var_os("CARGO");
        if cargo.is_some() || !path.is_file() {
            let mut build = Command::new(cargo.unwrap_or("cargo".into()));
            build
                .args(["build", "--release", "-p", "lowtide"])
                .current_dir(env!("CARGO_MANIFEST_DIR"));
            let status = build.status().map_err(Failure::io("cargo"))?;
            if !status.success() {
                return Err(Failure::broken("cargo build --release -p lowtide failed"));
            }
        }
        if !path.is_file() {
            return Err(Failure::Broken(format!("no {}", path.display())));
        }
        Ok(self.found.get_or_init(|| path))
    }

    /// Stores `input` in a new cluster whose state lies in `scratch`, reads it back, and returns
    /// the verified report. `elapsed_s` in it runs from the order to store until all is stable;
    /// starting the cluster and reading back are not in it.
    ///
    /// # Errors
    /// The run fails, or what it read back differs.
    pub fn store(&self, input: &Path, scratch: &Path, options: &[&str]) -> Result<Value, Failure> {
        Ok(self.store_then(input, scratch, options, |_| Ok(()))?.0)
    }

    /// The same, and then exports the state; the memory of the process that does so is in the report
    /// beside that of the others, as `export`.
    ///
    /// # Errors
    /// The run or the export fails, or what the run read back differs.
    pub fn store_and_export(
        &self,
        input: &Path,
        scratch: &Path,
        options: &[&str],
    ) -> Result<Value, Failure> {
        let to = scratch.join("exported");
        let export = |state: &Path| {
            let mut command = Command::new(self.path()?);
            command.arg("export").arg("--state").arg(state);
            let memory = memory_of(command.arg("--to").arg(&to), &scratch.join("export.log"));
            remove(&to)?;
            memory
        };
        let (mut report, memory) = self.store_then(input, scratch, options, export)?;
        report["memory"]["export"] = memory;
        Ok(report)
    }

    fn store_then<T>(
        &self,
        input: &Path,
        scratch: &Path,
        options: &[&str],
        then: impl FnOnce(&Path) -> Result<T, Failure>,
    ) -> Result<(Value, T), Failure> {
        let (state, report) = (scratch.join("state"), scratch.join("report.json"));
        let mut command = self.run_command(input, &state)?;
        command.arg("--report").arg(&report).args(options);
        let ran = run(&mut command, &scratch.join("run.log")).and_then(|_| then(&state));
        // Keeps nothing of a failed run either: what it said is in the error.
        remove(&state)?;
        let done = ran?;
        let text = std::fs::read(&report).map_err(Failure::io(report.display()))?;
        let report: Value = serde_json::from_slice(&text).map_err(Failure::broken)?;
        if report["verified"] != true {
            return Err(Failure::broken("the run did not verify"));
        }
        Ok((report, done))
    }

    /// `lowtide run` on `input` with its state in `state`, to be completed.
    fn run_command(&self, input: &Path, state: &Path) -> Result<Command, Failure> {
        let mut command = Command::new(self.path()?);
        command.args(["run", "--seed", "1", "--input"]).arg(input);
        command.arg("--state").arg(state);
        Ok(command)
    }

    /// Stores `input` in a cluster whose state lies in `scratch`, reads it back, and keeps the
    /// cluster running.
    ///
    /// # Errors
    /// The run fails, or has not got so far within a minute.
    pub fn stay(&self, input: &Path, scratch: &Path) -> Result<Staying, Failure> {
        const PATIENCE: Duration = Duration::from_secs(60);
        let (state, log) = (scratch.join("state"), scratch.join("run.log"));
        let out = File::create(&log).map_err(Failure::io(log.display()))?;
        let mut command = self.run_command(input, &state)?;
        command.arg("--stay").stdout(Stdio::null()).stderr(out);
        let name = command.get_program().display().to_string();
        let supervisor = command.spawn().map_err(Failure::io(&name))?;
        let mut staying = Staying { supervisor, state };
        let began = Instant::now();
        loop {
            let said = std::fs::read_to_string(&log).map_err(Failure::io(log.display()))?;
            if said.contains("staying; try:") {
                return Ok(staying);
            }
            let ended = staying.supervisor.try_wait().map_err(Failure::io(&name))?;
            if ended.is_some() || began.elapsed() > PATIENCE {
                return Err(Failure::Broken(format!("{name} does not stay\n{said}")));
            }
            // It says so in a file.
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// A cluster of processes that has nothing to do. Its supervisor is killed when this is dropped, and
/// the nodes with it.
#[derive(Debug)]
pub struct Staying {
    supervisor: Child,
    state: PathBuf,
}

impl Staying {
    /// Process id of the supervisor.
    pub fn supervisor(&self) -> u32 {
        self.supervisor.id()
    }

    /// Names and process ids of the nodes.
    ///
    /// # Errors
    /// The system does not say.
    pub fn nodes(&self) -> Result<Vec<(String, u32)>, Failure> {
        let fail = || Failure::io("/proc");
        let mut nodes = Vec::new();
        for entry in std::fs::read_dir("/proc").map_err(fail())? {
            let entry = entry.map_err(fail())?;
            let pid = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            // Whatever ends meanwhile is none of ours.
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let name = line.split(|byte| *byte == 0).find_map(|argument| {
                let path = Path::new(std::str::from_utf8(argument).ok()?);
                let dir = path.strip_prefix(&self.state).ok()?.parent()?;
                Some(dir.display().to_string()).filter(|_| path.ends_with("node.toml"))
            });
            nodes.extend(name.zip(pid));
        }
        nodes.sort();
        Ok(nodes)
    }
}

impl Drop for Staying {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.supervisor.kill();
        let _ = self.supervisor.wait();
        let _ = remove(&self.state);
    }
}

/// Runs a program to its end and says what memory it had at most, as a report of a run does; looks
/// every millisecond, so what lasts less may be missed.
///
/// # Errors
/// It cannot be started or fails.
fn memory_of(command: &mut Command, log: &Path) -> Result<Value, Failure> {
    let name = command.get_program().display().to_string();
    let out = File::create(log).map_err(Failure::io(log.display()))?;
    let err = out.try_clone().map_err(Failure::io(log.display()))?;
    let spawned = command.stdout(out).stderr(err).spawn();
    let mut child = spawned.map_err(Failure::io(&name))?;
    let mut most = [0; MEMORY.len()];
    let status = loop {
        let path = format!("/proc/{}/status", child.id());
        let text = std::fs::read_to_string(path).unwrap_or_default();
        for (most, (line, _)) in most.iter_mut().zip(MEMORY) {
            *most = memory_line(&text, line).max(*most);
        }
        if let Some(status) = child.try_wait().map_err(Failure::io(&name))? {
            break status;
        }
        // How often its memory is looked at.
        std::thread::sleep(Duration::from_millis(1));
    };
    if !status.success() {
        let said = std::fs::read_to_string(log).unwrap_or_default();
        return Err(Failure::Broken(format!("{name}: {status}\n{said}")));
    }
    let fields = most.iter().zip(MEMORY);
    Ok(fields
        .map(|(bytes, (_, key))| (key.to_owned(), Value::from(*bytes)))
        .collect::<serde_json::Map<_, _>>()
        .into())
}

/// Lines of proc(5)'s status and what a report calls them.
const MEMORY: [(&str, &str); 3] = [
    ("RssAnon:", "rss_anon"),
    ("RssShmem:", "rss_shmem"),
    ("RssFile:", "rss_file"),
];

/// Bytes that a line of proc(5)'s status tells; 0 for a process that is ending.
fn memory_line(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let kib = line.and_then(|rest| rest.trim().strip_suffix("kB"));
    let kib = kib.and_then(|kib| kib.trim().parse::<u64>().ok());
    kib.map_or(0, |kib| kib * 1024)
}

/// Removes a directory that may not be there.
///
/// # Errors
/// The file system refuses.
pub fn remove(dir: &Path) -> Result<(), Failure> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Failure::io(dir.display())(error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_of_a_program_is_seen_while_it_runs() {
        let dir = tempfile::tempdir().unwrap();
        let mut shell = Command::new("sh");
        // 64 MiB in a variable, and time to be looked at.
        let script = "x=$(head -c 67108864 /dev/zero | tr '\\0' x); sleep 0.1; exit $(( ${#x} != 67108864 ))";
        let memory = memory_of(shell.args(["-c", script]), &dir.path().join("log")).unwrap();
        assert!(memory["rss_anon"].as_u64().unwrap() > 64 << 20, "{memory}");
        let failed = memory_of(&mut Command::new("false"), &dir.path().join("log"));
        assert!(matches!(failed, Err(Failure::Broken(_))));
    }
}
