//! Processes, and the queue pairs they connect: each line that one prints has what the other must
//! know of one queue pair.

use std::io::{BufRead, BufReader, Lines, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lowtide_transport::udp::{Socket, SocketOptions};
use lowtide_transport::verbs::{
    Access, Address, Buffer, CompletionQueue, Device, DeviceOptions, MemoryRegion,
    ProtectionDomain, Qpn, QueuePair, Reliability, Remote, Rkey, SendOp, Status,
};
use rustix::process::{Pid, Signal, kill_process};

/// Nothing here takes longer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Text for whatever a call says.
fn text(error: impl std::fmt::Debug) -> String {
    format!("{error:?}")
}

/// A process of this program.
pub struct Process {
    child: Child,
    input: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Process {
    pub fn start(args: &[&str]) -> Result<Process, String> {
        let program = std::env::current_exe().map_err(text)?;
        let mut child = Command::new(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(text)?;
        let output = child.stdout.take().expect("it was asked for");
        Ok(Process {
            input: child.stdin.take(),
            lines: BufReader::new(output).lines(),
            child,
        })
    }

    pub fn say(&mut self, line: &str) -> Result<(), String> {
        let input = self.input.as_mut().expect("open until the end");
        writeln!(input, "{line}").map_err(text)
    }

    pub fn hear(&mut self) -> Result<String, String> {
        let line = self.lines.next().ok_or("the other process said nothing")?;
        line.map_err(text)
    }

    /// Closes its input and waits for its exit.
    pub fn end(&mut self) -> Result<(), String> {
        self.input = None;
        match self.child.wait().map_err(text)? {
            status if status.success() => Ok(()),
            status => Err(status.to_string()),
        }
    }

    /// Stops it again and again until the answer is dropped.
    pub fn stop_often(&self, stopped: Duration, running: Duration) -> Stops {
        let pid = Pid::from_child(&self.child);
        let is_over = Arc::new(AtomicBool::new(false));
        let seen = is_over.clone();
        let thread = std::thread::spawn(move || {
            let mut stops = Stopped::default();
            while !seen.load(Ordering::Relaxed) {
                std::thread::sleep(running);
                let began = Instant::now();
                if kill_process(pid, Signal::STOP).is_ok() {
                    std::thread::sleep(stopped);
                    // It is the child's number until the child is waited for.
                    let _ = kill_process(pid, Signal::CONT);
                    stops.count += 1;
                    stops.longest = stops.longest.max(began.elapsed());
                }
            }
            stops
        });
        Stops {
            is_over,
            thread: Some(thread),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How often a process was stopped, and for how long at most: whoever wakes it may be late himself.
#[derive(Clone, Copy, Default)]
pub struct Stopped {
    pub count: u32,
    pub longest: Duration,
}

/// See [`Process::stop_often`].
pub struct Stops {
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<Stopped>>,
}

impl Stops {
    /// Ends it.
    pub fn finish(mut self) -> Stopped {
        self.is_over.store(true, Ordering::Relaxed);
        let thread = self.thread.take();
        let stopped = thread.map(|thread| thread.join().unwrap_or_default());
        stopped.unwrap_or_default()
    }
}

impl Drop for Stops {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A loopback address of this process alone.
fn own_ip() -> Ipv4Addr {
    let pid = std::process::id();
    let high = 32 + (pid >> 16 & 31) as u8;
    Ipv4Addr::new(127, high, (pid >> 8) as u8, pid as u8)
}

/// A device with some queue pairs, not connected yet.
pub struct End {
    pub queue: CompletionQueue,
    pub qps: Vec<QueuePair>,
    pub memory: MemoryRegion,
    remotes: Vec<OnceLock<Remote>>,
    _domain: ProtectionDomain,
}

impl End {
    pub fn open(memory: usize, qps: u32) -> Result<End, String> {
        let mut options = DeviceOptions::default();
        options.socket.receive_buffer_bytes = memory;
        let device = Device::open(SocketAddr::from((own_ip(), 4791)), &options).map_err(text)?;
        let domain = device.protection_domain();
        let queue = device.completion_queue(32 * qps);
        let memory = domain.memory_region(1 << 20, Access::ALL).map_err(text)?;
        let make = |_| {
            let qp = domain.queue_pair(&queue, &queue, 16, 16).map_err(text)?;
            qp.to_init(Access::ALL).map_err(text)?;
            Ok(qp)
        };
        Ok(End {
            qps: (0..qps).map(make).collect::<Result<_, String>>()?,
            remotes: (0..qps).map(|_| OnceLock::new()).collect(),
            queue,
            memory,
            _domain: domain,
        })
    }

    /// What a peer must know of one queue pair.
    fn card(&self, index: usize) -> String {
        let address = self.qps[index].address();
        let Remote { rkey, .. } = self.memory.remote(0);
        let (qpn, psn, budget) = (address.qpn.value(), address.psn, address.budget);
        format!("{} {qpn} {psn} {budget} {}", address.socket, rkey.0)
    }

    /// Connects one queue pair to the peer whose card this is.
    fn connect(&self, index: usize, card: &str, how: &Reliability) -> Result<(), String> {
        let bad = || format!("not a queue pair: {card:?}");
        let (socket, numbers) = card.split_once(' ').ok_or_else(bad)?;
        let socket = socket.parse().map_err(|_| bad())?;
        let numbers: Vec<u32> = numbers.split(' ').filter_map(|n| n.parse().ok()).collect();
        let [qpn, psn, budget, rkey] = numbers[..] else {
            return Err(bad());
        };
        let qpn = Qpn::new(qpn);
        let peer = Address {
            socket,
            qpn,
            psn,
            budget,
        };
        self.qps[index].connect_as(&peer, how).map_err(text)?;
        let rkey = Rkey(rkey);
        // Set once, here.
        let _ = self.remotes[index].set(Remote { va: 0, rkey });
        Ok(())
    }

    /// Connects one queue pair to the other process's next one.
    pub fn meet(
        &self,
        process: &mut Process,
        index: usize,
        how: &Reliability,
    ) -> Result<(), String> {
        process.say(&self.card(index))?;
        let card = process.hear()?;
        self.connect(index, &card, how)?;
        process.say("go")
    }

    /// A place in the peer's memory.
    pub fn remote(&self, index: usize, va: u64) -> Remote {
        let remote = self.remotes[index].get().expect("it is connected");
        Remote { va, ..*remote }
    }

    pub fn post_receive(&self, index: usize) -> Result<(), String> {
        let posted = self.qps[index].post_recv(RECEIVE, Buffer::Empty);
        posted.map_err(|refused| refused.to_string())
    }

    /// Carries out one request, and polls for nothing else.
    pub fn run(&self, index: usize, op: SendOp, at: u64, len: u32) -> Result<(), String> {
        let buffer = match op {
            SendOp::Send => Buffer::Empty,
            _ => self.memory.range(at, len),
        };
        let posted = self.qps[index].post_send(REQUEST, op, buffer);
        posted.map_err(|refused| refused.to_string())?;
        self.await_one(REQUEST)
    }

    pub fn await_receive(&self) -> Result<(), String> {
        self.await_one(RECEIVE)
    }

    /// Waits for the completion of this name; those of the other name may come first.
    fn await_one(&self, id: u64) -> Result<(), String> {
        let pending = &EARLY[id as usize];
        let began = Instant::now();
        if pending.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        while began.elapsed() < PATIENCE {
            let Some(done) = self.queue.poll() else {
                continue;
            };
            match done.status {
                Status::Success if done.id == id => return Ok(()),
                Status::Success if id == REQUEST => {
                    EARLY[done.id as usize].store(true, Ordering::Relaxed);
                }
                // Of an answer that this process has sent.
                Status::Success => {}
                status => return Err(format!("{:?}: {status:?}", done.kind)),
            }
        }
        Err("nothing came for 30 s".into())
    }
}

/// Names of work requests.
const REQUEST: u64 = 0;
const RECEIVE: u64 = 1;
/// Whether a completion of the name has come before it was waited for.
static EARLY: [AtomicBool; 2] = [AtomicBool::new(false), AtomicBool::new(false)];

/// Reads what the parent says of its queue pairs, says what it must know of ours, and waits until it
/// says that the other end is connected, too.
pub fn meet_parent(end: &End, how: &Reliability) -> Result<(), String> {
    let mut lines = std::io::stdin().lines();
    let mut hear = || lines.next().ok_or("the parent has gone")?.map_err(text);
    for index in 0..end.qps.len() {
        println!("{}", end.card(index));
        end.connect(index, &hear()?, how)?;
    }
    match hear()?.as_str() {
        "go" => Ok(()),
        other => Err(format!("{other:?} is not \"go\"")),
    }
}

/// Lets two children connect their next queue pairs.
pub fn introduce(one: &mut Process, other: &mut Process) -> Result<(), String> {
    let (ours, theirs) = (one.hear()?, other.hear()?);
    one.say(&theirs)?;
    other.say(&ours)
}

/// Fails unless the kernel grants a receive buffer of so many bytes when it is asked for half of that.
pub fn is_granted(bytes: usize) -> Result<(), String> {
    let options = SocketOptions {
        receive_buffer_bytes: bytes / 2,
        ..SocketOptions::default()
    };
    let socket = Socket::bind((own_ip(), 0).into(), &options).map_err(text)?;
    match socket.receive_buffer_bytes() {
        granted if granted == bytes => Ok(()),
        granted => Err(format!("a receive buffer of {granted} bytes, not {bytes}")),
    }
}

/// Has memory that others write to, and sleeps in read(2) meanwhile.
pub fn target(qps: u32, buffer: usize) -> Result<(), String> {
    let end = End::open(buffer, qps)?;
    let how = Reliability::default();
    let mut lines = std::io::stdin().lines();
    for index in 0..qps as usize {
        println!("{}", end.card(index));
        let card = lines.next().ok_or("the parent has gone")?.map_err(text)?;
        end.connect(index, &card, &how)?;
    }
    // Returns when the parent closes it.
    for line in lines {
        line.map_err(text)?;
    }
    Ok(())
}
