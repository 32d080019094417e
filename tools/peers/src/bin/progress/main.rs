//! Progress between processes, as `ci/progress` tries it: what holds while a program sleeps, exits, is
//! stopped, or is not given a processor. Each scenario starts processes of this same program.
//!
//! `cargo run --release -p lowtide-peers --bin progress -- SCENARIO`
//!
//! * `sleeper`: WRITE, READ and atomics against a process that sleeps in read(2) the whole time;
//! * `leaver`: receivers that exit right after their last completion cost the sender no error;
//! * `crowd`: 1,000 answers from a process that is stopped for 200 ms now and then, beside eight that
//!   never rest: no error with a timeout of 67 ms and three retries;
//! * `incast`: 64 queue pairs of four processes into one that is stopped for 20 ms out of 100, with a
//!   small receive buffer: no error, and at least half of what arrives when it is not stopped.

mod part;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use lowtide_transport::verbs::{Buffer, Reliability, SendOp, Status};
use part::{End, Process};

/// A timeout of 67 ms, and three retries.
const HOW: Reliability = Reliability {
    mtu: None,
    ack_timeout: 14,
    retry_count: 3,
    rnr_retry: 7,
};
/// Bytes of memory that a peer may write.
const MEMORY: usize = 1 << 20;
/// Receive buffer of an unprivileged program where nobody has raised `net.core.rmem_max`.
const SMALL: usize = 212_992;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["sleeper"] => sleeper(),
        ["leaver"] => leaver(),
        ["crowd"] => crowd(),
        ["incast"] => incast(),
        // The other processes.
        ["spin"] => loop {
            std::hint::spin_loop();
        },
        ["sleep"] => part::target(1, MEMORY),
        ["absorb"] => part::target(64, SMALL),
        ["answer", count] => answer(count),
        ["flood", end, seconds] => flood(end, seconds),
        _ => Err("one of sleeper, leaver, crowd, incast".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("progress {}: {error}", args.join(" "));
            ExitCode::FAILURE
        }
    }
}

type Outcome = Result<(), String>;

fn sleeper() -> Outcome {
    let mut process = Process::start(&["sleep"])?;
    let end = End::open(MEMORY, 1)?;
    end.meet(&mut process, 0, &HOW)?;
    let word = end.remote(0, 8);
    for round in 0..1000u32 {
        let len = 1 + round * 61 % 60_000;
        let bytes = vec![round as u8; len as usize];
        end.memory.write(64, &bytes);
        end.run(0, SendOp::Write(end.remote(0, 4096)), 64, len)?;
        end.memory.write(64, &vec![!0; len as usize]);
        end.run(0, SendOp::Read(end.remote(0, 4096)), 64, len)?;
        let mut back = vec![0; len as usize];
        end.memory.read(64, &mut back);
        if back != bytes {
            return Err(format!(
                "round {round}: what was written is not what is read"
            ));
        }
        let add = SendOp::FetchAdd {
            remote: word,
            add: 3,
        };
        end.run(0, add, 0, 8)?;
        let mut old = [0; 8];
        end.memory.read(0, &mut old);
        if u64::from_ne_bytes(old) != 3 * u64::from(round) {
            return Err(format!(
                "round {round}: an atomic was done twice or not at all"
            ));
        }
    }
    process.end()
}

/// Answers each of so many messages but the last, and exits when that has come.
fn answer(count: &str) -> Outcome {
    let count: u32 = count.parse().map_err(|_| "a number")?;
    let end = End::open(MEMORY, 1)?;
    let receive = || end.post_receive(0);
    (0..8).try_for_each(|_| receive())?;
    part::meet_parent(&end, &HOW)?;
    for n in 1..=count {
        end.await_receive()?;
        if n == count {
            break;
        }
        end.qps[0]
            .post_send(0, SendOp::Send, Buffer::Empty)
            .map_err(|refused| refused.to_string())?;
        receive()?;
    }
    // Nothing is dropped, nothing more is polled.
    std::process::exit(0)
}

fn leaver() -> Outcome {
    for count in [1, 2, 3, 10, 50, 500] {
        for _ in 0..5 {
            let mut process = Process::start(&["answer", &count.to_string()])?;
            let end = End::open(MEMORY, 1)?;
            end.meet(&mut process, 0, &HOW)?;
            ping(&end, count, true)?;
            process.end()?;
        }
    }
    Ok(())
}

/// Sends `count` messages and waits for the answer to each, but for the last if nobody answers that.
fn ping(end: &End, count: u32, last_is_silent: bool) -> Outcome {
    for n in 1..=count {
        end.post_receive(0)?;
        end.run(0, SendOp::Send, 0, 64)
            .map_err(|error| format!("message {n} of {count}: {error}"))?;
        if n < count || !last_is_silent {
            end.await_receive()?;
        }
    }
    Ok(())
}

fn crowd() -> Outcome {
    let _spinning: Vec<Process> = (0..8)
        .map(|_| Process::start(&["spin"]))
        .collect::<Result<_, _>>()?;
    let mut process = Process::start(&["answer", "1000"])?;
    let end = End::open(MEMORY, 1)?;
    end.meet(&mut process, 0, &HOW)?;
    let stopped = process.stop_often(Duration::from_millis(200), Duration::from_millis(800));
    ping(&end, 1000, true)?;
    let stops = stopped.finish();
    process.end()?;
    println!("1,000 messages, {stops} stops of 200 ms");
    match stops {
        0 => Err("it was over before the first stop".into()),
        _ => Ok(()),
    }
}

/// Writes through sixteen queue pairs for so many seconds and prints how many bytes were written.
fn flood(first: &str, seconds: &str) -> Outcome {
    let _: u32 = first.parse().map_err(|_| "a number")?;
    let seconds: u64 = seconds.parse().map_err(|_| "a number")?;
    let end = End::open(MEMORY, 16)?;
    part::meet_parent(&end, &HOW)?;
    const LEN: u32 = 16 << 10;
    let post = |index: usize| {
        let op = SendOp::Write(end.remote(index, 0));
        let posted = end.qps[index].post_send(index as u64, op, end.memory.range(0, LEN));
        posted.map_err(|refused| refused.to_string())
    };
    (0..32).try_for_each(|n| post(n % 16))?;
    let (began, mut bytes) = (Instant::now(), 0u64);
    while began.elapsed() < Duration::from_secs(seconds) {
        let Some(done) = end.queue.wait(Duration::from_millis(100)) else {
            continue;
        };
        if done.status != Status::Success {
            return Err(format!("{:?} after {bytes} bytes", done.status));
        }
        bytes += u64::from(LEN);
        post(done.id as usize)?;
    }
    println!("{bytes}");
    Ok(())
}

fn incast() -> Outcome {
    let unstopped = storm(false)?;
    let stopped = storm(true)?;
    let percent = 100 * stopped / unstopped.max(1);
    println!("{unstopped} bytes, and {stopped} while it was stopped now and then: {percent} %");
    if percent < 50 {
        return Err("less than half of what arrives when it is not stopped".into());
    }
    Ok(())
}

/// Bytes that four processes write to one in four seconds.
fn storm(is_stopped: bool) -> Result<u64, String> {
    let mut target = Process::start(&["absorb"])?;
    let mut senders = Vec::new();
    for index in 0..4 {
        let mut sender = Process::start(&["flood", &index.to_string(), "4"])?;
        for _ in 0..16 {
            part::introduce(&mut sender, &mut target)?;
        }
        senders.push(sender);
    }
    // All begin together.
    senders.iter_mut().try_for_each(|sender| sender.say("go"))?;
    let stops =
        is_stopped.then(|| target.stop_often(Duration::from_millis(20), Duration::from_millis(80)));
    let mut bytes = 0;
    for mut sender in senders {
        let line = sender.hear()?;
        bytes += line.parse::<u64>().map_err(|_| line)?;
        sender.end()?;
    }
    drop(stops);
    target.end()?;
    Ok(bytes)
}
