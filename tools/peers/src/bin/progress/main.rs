//! Progress between processes, as `ci/progress` tries it: what holds while a program sleeps, exits, is
//! stopped, or is not given a processor. Each scenario starts processes of this same program.
//!
//! `cargo run --release -p lowtide-peers --bin progress -- SCENARIO`
//!
//! * `sleeper`: WRITE, READ and atomics against a process that sleeps in read(2) the whole time;
//! * `leaver`: processes that end right after their last completion, of a message or of a WRITE with
//!   immediate data, by `exit` or from `main`, cost the sender no error;
//! * `crowd`: 1,000 answers from a process that is stopped for 200 ms now and then, beside eight that
//!   never rest: no error with a timeout of 67 ms and three retries. All of them on two processors,
//!   which whoever starts it sees to (`taskset`);
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
/// What to ask for to get the receive buffer of an unprivileged program where nobody has raised
/// `net.core.rmem_max`: that much by default, and the kernel doubles it.
const SMALL: usize = 212_992;
/// Stops of 20 ms in the four seconds of a storm, at least: one in 100 ms, and some to spare.
const STOPS_MIN: u32 = 30;

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
        ["absorb"] => part::is_granted(2 * SMALL).and_then(|()| part::target(64, SMALL)),
        ["answer", count, ending] => answer(count, ending),
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

/// Answers each of so many messages but the last, and ends when that has come: by `exit`, or by the
/// end of `main`.
fn answer(count: &str, ending: &str) -> Outcome {
    let count: u32 = count.parse().map_err(|_| "a number")?;
    // Not dropped, whatever the way out: nobody has a chance to finish anything.
    let end = std::mem::ManuallyDrop::new(End::open(MEMORY, 1)?);
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
    // Nothing more is polled.
    match ending {
        "exit" => std::process::exit(0),
        _ => Ok(()),
    }
}

fn leaver() -> Outcome {
    for count in [1, 2, 3, 10, 50, 500] {
        for ending in ["exit", "return"] {
            for is_write in [false, true] {
                for _ in 0..3 {
                    let mut process = Process::start(&["answer", &count.to_string(), ending])?;
                    let end = End::open(MEMORY, 1)?;
                    end.meet(&mut process, 0, &HOW)?;
                    let op = match is_write {
                        true => SendOp::WriteImm(end.remote(0, 64), 7),
                        false => SendOp::Send,
                    };
                    ping(&end, op, count, true)
                        .map_err(|error| format!("{op:?}, {ending}: {error}"))?;
                    process.end()?;
                }
            }
        }
    }
    Ok(())
}

/// Sends `count` messages and waits for the answer to each, but for the last if nobody answers that.
fn ping(end: &End, op: SendOp, count: u32, last_is_silent: bool) -> Outcome {
    for n in 1..=count {
        end.post_receive(0)?;
        end.run(0, op, 0, 64)
            .map_err(|error| format!("message {n} of {count}: {error}"))?;
        if n < count || !last_is_silent {
            end.await_receive()?;
        }
    }
    Ok(())
}

fn crowd() -> Outcome {
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    if processors > 2 {
        return Err(format!(
            "no crowd on {processors} processors: taskset -c 0,1"
        ));
    }
    let _spinning: Vec<Process> = (0..8)
        .map(|_| Process::start(&["spin"]))
        .collect::<Result<_, _>>()?;
    let mut process = Process::start(&["answer", "1000", "exit"])?;
    let end = End::open(MEMORY, 1)?;
    end.meet(&mut process, 0, &HOW)?;
    let stopped = process.stop_often(Duration::from_millis(200), Duration::from_millis(800));
    let done = ping(&end, SendOp::Send, 1000, true);
    let stops = stopped.finish();
    let (count, longest) = (stops.count, stops.longest.as_millis());
    done.map_err(|error| format!("{error}; it was stopped {count} times, for {longest} ms once"))?;
    process.end()?;
    println!("1,000 messages, {count} stops of 200 ms, the longest of {longest}");
    match count {
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
    let (unstopped, _) = storm(false)?;
    let (stopped, stops) = storm(true)?;
    let percent = 100 * stopped / unstopped.max(1);
    println!(
        "{unstopped} bytes, and {stopped} while it was stopped {stops} times for 20 ms: {percent} %"
    );
    if stops < STOPS_MIN {
        return Err(format!("fewer than {STOPS_MIN} stops"));
    }
    if percent < 50 {
        return Err("less than half of what arrives when it is not stopped".into());
    }
    Ok(())
}

/// Bytes that four processes write to one in four seconds, and how often that was stopped meanwhile.
fn storm(is_stopped: bool) -> Result<(u64, u32), String> {
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
    let stops = stops.map_or(0, |stops| stops.finish().count);
    target.end()?;
    Ok((bytes, stops))
}
