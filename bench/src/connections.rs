//! What a connected queue pair costs: memory once its queues have been full, the time to make it, and
//! processor time while all of them are idle.
//!
//! The yardsticks here are limits, not programs.

use std::time::{Duration, Instant};

use lowtide_transport::verbs::{
    Access, CompletionQueue, Device, DeviceOptions, MemoryRegion, ProtectionDomain, QueuePair,
    Remote, SendOp, Status, WorkCompletion,
};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

use crate::ends::{address, insist};
use crate::row::{Better, Pick, Rounds, Row};
use crate::{Bench, Failure};

/// Connections; each has a queue pair at both ends, and both are counted.
const PAIRS: usize = 2000;
/// Work requests in each queue.
const DEPTH: u32 = 64;
/// READs among the sends.
const READS: u32 = 16;
/// Bytes of a message.
const LEN: u32 = 64;
/// KiB that a queue pair may take.
const KIB: f64 = 16.0;
/// How long all of them are left alone.
const IDLE: Duration = Duration::from_secs(3);
/// Percent of a processor that they may take meanwhile.
const IDLE_PERCENT: f64 = 1.0;

/// One device and the queue pairs on it.
struct Side {
    queue: CompletionQueue,
    memory: MemoryRegion,
    qps: Vec<QueuePair>,
    domain: ProtectionDomain,
}

impl Side {
    fn open(last: u8) -> Result<Side, Failure> {
        let own = address(last);
        let device = Device::open(own, &DeviceOptions::default()).map_err(Failure::io(own))?;
        let domain = device.protection_domain();
        let memory = domain.memory_region(LEN as usize, Access::ALL);
        let memory = memory.map_err(Failure::broken)?;
        Ok(Side {
            queue: device.completion_queue(2 * DEPTH * PAIRS as u32),
            memory,
            qps: Vec::with_capacity(PAIRS),
            domain,
        })
    }

    fn add(&mut self) -> Result<(), Failure> {
        let queue = &self.queue;
        let qp = self.domain.queue_pair(queue, queue, DEPTH, DEPTH);
        let qp = qp.map_err(Failure::broken)?;
        qp.to_init(Access::ALL).map_err(Failure::broken)?;
        self.qps.push(qp);
        Ok(())
    }

    fn post_receives(&self, index: usize, count: u32) -> Result<(), Failure> {
        let local = || self.memory.range(0, LEN);
        let mut list = (0..count).map(|_| (0, local()));
        self.qps[index]
            .post_recvs(&mut list)
            .map_err(Failure::broken)
    }

    fn post_sends(&self, index: usize, remote: Remote) -> Result<(), Failure> {
        let mut list = (0..DEPTH).map(|n| {
            let op = match n < READS {
                true => SendOp::Read(remote),
                false => SendOp::Send,
            };
            (0, op, self.memory.range(0, LEN))
        });
        self.qps[index]
            .post_sends(&mut list)
            .map_err(Failure::broken)
    }

    /// Polls once; how many were finished.
    fn poll(&self, done: &mut Vec<WorkCompletion>) -> Result<u32, Failure> {
        let count = self.queue.poll_many(DEPTH as usize, done);
        match done.drain(..).find(|done| done.status != Status::Success) {
            Some(done) => Err(Failure::Broken(format!(
                "{:?}: {:?}",
                done.kind, done.status
            ))),
            None => Ok(count as u32),
        }
    }
}

/// Memory, time and idle processor time of a queue pair.
///
/// # Errors
/// The devices do not do what is asked of them.
pub fn connections(bench: &Bench) -> Result<Vec<Row>, Failure> {
    let (mut a, mut b) = (Side::open(1)?, Side::open(2)?);
    // Code, buffers of the sockets and tables that every device has are not counted.
    connect(&mut a, &mut b)?;
    fill(&a, &b, 0)?;
    let (before, began) = (resident()?, Instant::now());
    for _ in 1..PAIRS {
        connect(&mut a, &mut b)?;
    }
    let made = began.elapsed();
    for index in 1..PAIRS {
        fill(&a, &b, index)?;
    }
    let counted = 2.0 * (PAIRS - 1) as f64;
    let kib = (resident()? - before) / 1024.0 / counted;
    // What is still owed leaves first, and nobody is told when it has: an ACK, a timer that finds
    // nothing to do.
    std::thread::sleep(Duration::from_millis(200));
    let (used, began) = (processor_time()?, Instant::now());
    std::thread::sleep(IDLE);
    let used = processor_time()? - used;
    let percent = 100.0 * used.as_secs_f64() / began.elapsed().as_secs_f64();
    let row = |name: &str, unit, yardstick_is, ours, limit| {
        let figures = Rounds {
            unit,
            better: Better::Lower,
            yardstick_is,
            ours: vec![ours],
            yardstick: vec![limit],
        };
        figures.row(name, Pick::Median, &bench.machine).aim(1.0)
    };
    let memory_is = "the limit for resident memory of one queue pair whose queues have been full";
    let idle_is = "the limit for all of them together while nothing happens, of one processor";
    Ok(vec![
        row("connections", "KiB", memory_is, kib, KIB)
            .with("pairs", PAIRS)
            .with("us_each", made.as_secs_f64() * 1e6 / counted),
        row("connections-idle", "%", idle_is, percent, IDLE_PERCENT).with("pairs", PAIRS),
    ])
}

/// Adds a connection.
fn connect(a: &mut Side, b: &mut Side) -> Result<(), Failure> {
    a.add()?;
    b.add()?;
    let index = a.qps.len() - 1;
    let (ours, theirs) = (&a.qps[index], &b.qps[index]);
    ours.connect(&theirs.address()).map_err(Failure::broken)?;
    theirs.connect(&ours.address()).map_err(Failure::broken)
}

/// Fills all four queues of a connection, waits until all has been done, and leaves the receive queues
/// full.
fn fill(a: &Side, b: &Side, index: usize) -> Result<(), Failure> {
    let sends = DEPTH - READS;
    a.post_receives(index, DEPTH)?;
    b.post_receives(index, DEPTH)?;
    a.post_sends(index, b.memory.remote(0))?;
    b.post_sends(index, a.memory.remote(0))?;
    let mut left = 2 * (DEPTH + sends);
    let mut done = Vec::with_capacity(DEPTH as usize);
    while left > 0 {
        left -= insist(|| {
            let polled = a.poll(&mut done).and_then(|n| Ok(n + b.poll(&mut done)?));
            match polled {
                Ok(0) => None,
                polled => Some(polled),
            }
        })??;
    }
    a.post_receives(index, sends)?;
    b.post_receives(index, sends)
}

/// Bytes of memory that this process has.
fn resident() -> Result<f64, Failure> {
    let path = "/proc/self/status";
    let text = std::fs::read_to_string(path).map_err(Failure::io(path))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
    kib.map(|kib| kib * 1024.0)
        .ok_or_else(|| Failure::broken("no VmRSS in /proc/self/status"))
}

fn processor_time() -> Result<Duration, Failure> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).map_err(Failure::broken)?;
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(Duration::from_micros(micros as u64))
}
