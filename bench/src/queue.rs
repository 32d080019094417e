//! The ring between a server's front and a shard, beside crossbeam's bounded channel: handing values
//! to a thread that is awake, and the round trip to one that sleeps.

use std::hint::black_box;
use std::time::{Duration, Instant};

use lowtide_engine::ring;

use crate::row::{Better, Pick, Rounds, Row};
use crate::{Bench, Failure};

/// Values handed over per round of the first row.
const VALUES: u64 = 2_000_000;
/// Round trips per round of the second.
const TRIPS: u64 = 20_000;
/// As many as a shard's ring holds.
const CAPACITY: usize = 64;
const ROUNDS: u32 = 9;

/// Both rows.
///
/// # Errors
/// A thread cannot be started.
pub fn queue(bench: &Bench) -> Result<Vec<Row>, Failure> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let (mut ours_trip, mut theirs_trip) = (Vec::new(), Vec::new());
    for _ in 0..bench.rounds.unwrap_or(ROUNDS) {
        ours.push(rate(own_stream()));
        theirs.push(rate(crossbeam_stream()));
        ours_trip.push(micros(own_trips()));
        theirs_trip.push(micros(crossbeam_trips()));
    }
    let stream = Rounds {
        unit: "M/s",
        better: Better::Higher,
        yardstick_is: "crossbeam_channel::bounded, same capacity, values and threads",
        ours,
        yardstick: theirs,
    };
    let trips = Rounds {
        unit: "us",
        better: Better::Lower,
        yardstick_is: "two crossbeam_channel::bounded, receivers that block",
        ours: ours_trip,
        yardstick: theirs_trip,
    };
    Ok(vec![
        stream.row("queue-stream", Pick::Median, &bench.machine),
        trips.row("queue-round-trip", Pick::Median, &bench.machine),
    ])
}

fn rate(elapsed: Duration) -> f64 {
    VALUES as f64 / elapsed.as_secs_f64() / 1e6
}

fn micros(elapsed: Duration) -> f64 {
    elapsed.as_secs_f64() * 1e6 / TRIPS as f64
}

fn own_stream() -> Duration {
    let (mut sender, mut receiver) = ring::ring(CAPACITY);
    let started = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            loop {
                while let Some(value) = receiver.receive() {
                    black_box::<u64>(value);
                }
                if !receiver.wait() {
                    return;
                }
            }
        });
        for value in 0..VALUES {
            while sender.send(value).is_err() {
                std::thread::yield_now();
            }
        }
        drop(sender);
    });
    started.elapsed()
}

fn crossbeam_stream() -> Duration {
    let (sender, receiver) = crossbeam_channel::bounded(CAPACITY);
    let started = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            while let Ok(value) = receiver.recv() {
                black_box::<u64>(value);
            }
        });
        for value in 0..VALUES {
            while sender.try_send(value).is_err() {
                std::thread::yield_now();
            }
        }
        drop(sender);
    });
    started.elapsed()
}

fn own_trips() -> Duration {
    let (mut there, mut incoming) = ring::ring::<u64>(CAPACITY);
    let (mut outgoing, mut back) = ring::ring::<u64>(CAPACITY);
    let started = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            loop {
                while let Some(value) = incoming.receive() {
                    // One is under way at a time.
                    let _ = outgoing.send(value);
                }
                if !incoming.wait() {
                    return;
                }
            }
        });
        for value in 0..TRIPS {
            let _ = there.send(value);
            while back.receive().is_none() {
                back.wait();
            }
        }
        drop(there);
    });
    started.elapsed()
}

fn crossbeam_trips() -> Duration {
    let (there, incoming) = crossbeam_channel::bounded::<u64>(CAPACITY);
    let (outgoing, back) = crossbeam_channel::bounded::<u64>(CAPACITY);
    let started = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            while let Ok(value) = incoming.recv() {
                let _ = outgoing.send(value);
            }
        });
        for value in 0..TRIPS {
            let _ = there.send(value);
            let _ = back.recv();
        }
        drop(there);
    });
    started.elapsed()
}
