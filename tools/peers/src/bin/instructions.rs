//! Counts the instructions of a round trip: a SEND of 64 bytes and the one that answers it, at both ends,
//! between two devices of one thread, so that the count is the same whatever else the machine does.
//!
//! `instructions [host|udp]...` runs itself under `valgrind --tool=callgrind` and prints the instructions
//! of a round trip by each path, those of the kernel not included. `instructions play PATH ROUNDS` is
//! what is counted, for a profile by function:
//! `valgrind --tool=callgrind --separate-threads=yes instructions play host 20000`, then
//! `callgrind_annotate --auto=yes callgrind.out.*-01`.
//!
//! Time passes some fifty times as fast there as instructions do. So a look of who polls rings into the
//! socket, due every 50 us, is counted with every poll that drives the device.
#![forbid(unsafe_code)]

use std::env;
use std::error::Error;
use std::ffi::OsString;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use lowtide_transport::verbs::{
    Access, Buffer, CompletionQueue, Device, DeviceOptions, QueuePair, SameHost, SendOp, Slot,
    Status,
};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Bytes of a message.
const LEN: usize = 64;
const DEPTH: u32 = 128;
/// Receives posted at each end.
const RECEIVES: u64 = 8;
/// Round trips of the shorter and the longer run; their difference is what counts, so that what
/// starts and ends a run does not.
const ROUNDS: [u64; 2] = [2_000, 22_000];
/// Longest silence that is no failure.
const PATIENCE: Duration = Duration::from_secs(10);

/// One side of the ping-pong.
struct End {
    queue: CompletionQueue,
    qp: QueuePair,
    ball: Option<Slot>,
    received: u64,
}

impl End {
    fn open(last: u8, same_host: SameHost) -> Outcome<End> {
        let address = SocketAddr::from(([127, 99, 7, last], 4791));
        let options = DeviceOptions {
            same_host,
            ..DeviceOptions::default()
        };
        let device = Device::open(address, &options)?;
        let domain = device.protection_domain();
        let queue = device.completion_queue(2 * DEPTH);
        let qp = domain.queue_pair(&queue, &queue, DEPTH, DEPTH)?;
        qp.to_init(Access::ALL)?;
        for id in 0..RECEIVES {
            qp.post_recv(id, whole(domain.slot(LEN)?))?;
        }
        let ball = Some(domain.slot(LEN)?);
        Ok(End {
            queue,
            qp,
            ball,
            received: 0,
        })
    }

    fn send(&mut self) -> Outcome<()> {
        let ball = self
            .ball
            .take()
            .ok_or("what was sent before is under way")?;
        Ok(self.qp.post_send(0, SendOp::Send, whole(ball))?)
    }

    /// Polls until `is_done`.
    fn poll_until(&mut self, is_done: impl Fn(&End) -> bool) -> Outcome<()> {
        while !is_done(self) {
            let done = match self.queue.poll() {
                Some(done) => done,
                // The device's own thread has it in hand, if anything is to come.
                None => self.queue.wait(PATIENCE).ok_or("the other end is silent")?,
            };
            if done.status != Status::Success {
                return Err(format!("{:?}: {:?}", done.kind, done.status).into());
            }
            let slot = done.slot.ok_or("a slot was posted")?;
            match done.kind.is_recv() {
                true => {
                    self.received += 1;
                    self.qp.post_recv(0, whole(slot))?;
                }
                false => self.ball = Some(slot),
            }
        }
        Ok(())
    }
}

fn whole(slot: Slot) -> Buffer {
    let len = slot.len() as u32;
    Buffer::Slot(slot, len)
}

/// So many round trips.
fn play(path: &str, rounds: u64) -> Outcome<()> {
    let same_host = match path {
        "host" => SameHost::Direct,
        "udp" => SameHost::Udp,
        _ => return Err("a path is 'host' or 'udp'".into()),
    };
    let (mut one, mut other) = (End::open(1, same_host)?, End::open(2, same_host)?);
    one.qp.connect(&other.qp.address())?;
    other.qp.connect(&one.qp.address())?;
    for round in 1..=rounds {
        one.send()?;
        other.poll_until(|end| end.received == round && end.ball.is_some())?;
        other.send()?;
        one.poll_until(|end| end.received == round && end.ball.is_some())?;
    }
    // The last ACK.
    other.poll_until(|end| end.ball.is_some())
}

/// Instructions of the thread that plays so many round trips.
fn count(path: &str, rounds: u64, out: &Path) -> Outcome<u64> {
    let mut file = OsString::from("--callgrind-out-file=");
    file.push(out);
    let done = Command::new("valgrind")
        .args(["--tool=callgrind", "--separate-threads=yes", "--quiet"])
        .arg(file)
        .arg(env::current_exe()?)
        .args(["play", path, &rounds.to_string()])
        .output()
        .map_err(|error| format!("valgrind: {error}"))?;
    if !done.status.success() {
        return Err(String::from_utf8_lossy(&done.stderr).into());
    }
    let mut file = out.as_os_str().to_owned();
    file.push("-01");
    let total = fs::read_to_string(file)?
        .lines()
        .find_map(|line| line.strip_prefix("totals: ")?.trim().parse().ok());
    Ok(total.ok_or("callgrind has written no total")?)
}

fn report(path: &str) -> Outcome<()> {
    let scratch = env::temp_dir().join(format!("instructions-{}", std::process::id()));
    fs::create_dir_all(&scratch)?;
    let counted = ROUNDS.map(|rounds| count(path, rounds, &scratch.join("callgrind")));
    fs::remove_dir_all(&scratch)?;
    let [short, long] = counted;
    let each = (long? - short?) / (ROUNDS[1] - ROUNDS[0]);
    println!("{path}: {each} instructions per round trip");
    Ok(())
}

fn run() -> Outcome<()> {
    let args: Vec<String> = env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["play", path, rounds] => play(path, rounds.parse()?),
        [] => ["host", "udp"].into_iter().try_for_each(report),
        _ => args.into_iter().try_for_each(report),
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("instructions: {error}");
            ExitCode::FAILURE
        }
    }
}
