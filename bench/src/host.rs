//! The path of the same host: two queue pairs whose devices share memory, against UCX over its own.
//!
//! Both sides poll without rest, each on a processor of its own, as UCX's do.

use std::time::Instant;

use lowtide_transport::verbs::{Buffer, SendOp};

use crate::bandwidth;
use crate::ends::{End, Meeting, on_two, slot_of};
use crate::row::{Better, Pick, Rounds, Row, median};
use crate::ucx::{self, Ucx};
use crate::{Bench, Failure};

const ROUNDS: u32 = 9;
/// Bytes of a message that is answered.
const SHORT: usize = 64;
/// Round trips of a round, timed by so many at once: one alone is not much longer than reading the
/// clock.
const TRIPS: usize = 200_000;
const TRIPS_AT_ONCE: usize = 100;
/// Messages that may be under way, though never more than one is.
const DEPTH: usize = 8;
/// Requests of the stream in a round.
const COUNT: usize = 4096;
/// The share of a round that comes before what counts.
const WARM_UP: usize = 10;

/// Microseconds for a SEND and the one that answers it.
///
/// # Errors
/// An end fails, or UCX is not there.
pub fn round_trip(bench: &Bench) -> Result<Vec<Row>, Failure> {
    ucx::require()?;
    let ucx = Ucx {
        transports: "posix,self",
        test: "tag_lat",
        len: SHORT,
        iterations: TRIPS,
    };
    let (mut ours, mut yardstick) = (Vec::new(), Vec::new());
    for _ in 0..bench.rounds.unwrap_or(ROUNDS) {
        // It prints half of a round trip.
        yardstick.push(2.0 * ucx.run()?.latency_us);
        ours.push(trips()?);
    }
    let figures = Rounds {
        unit: "us",
        better: Better::Lower,
        yardstick_is: "ucx_perftest tag_lat over posix shared memory, both ways",
        ours,
        yardstick,
    };
    let row = figures.row("rtt-host", Pick::Median, &bench.machine);
    Ok(vec![row.aim(0.6)])
}

/// MB/s of WRITEs.
///
/// # Errors
/// An end fails, or UCX is not there.
pub fn writes(bench: &Bench) -> Result<Vec<Row>, Failure> {
    ucx::require()?;
    let ucx = Ucx {
        transports: "posix,cma,self",
        test: "tag_bw",
        len: bandwidth::LEN,
        iterations: COUNT,
    };
    let (mut ours, mut yardstick) = (Vec::new(), Vec::new());
    for _ in 0..bench.rounds.unwrap_or(ROUNDS) {
        yardstick.push(bandwidth::LEN as f64 / ucx.run()?.latency_us);
        let ours_now = bandwidth::stream(End::open_on_host, COUNT, |end| SendOp::Write(end.remote));
        ours.push(ours_now? / 1e6);
    }
    let figures = Rounds {
        unit: "MB/s",
        better: Better::Higher,
        yardstick_is: "ucx_perftest tag_bw over posix and cma, its median message",
        ours,
        yardstick,
    };
    let row = figures.row("bw-host", Pick::Median, &bench.machine);
    Ok(vec![row.aim(1.0)])
}

/// The median round trip.
fn trips() -> Result<f64, Failure> {
    let (one, other) = Meeting::pair();
    let total = TRIPS + TRIPS / WARM_UP;
    let (times, ()) = on_two(
        move || {
            let mut player = Player::new(End::open_on_host(1, SHORT, one)?)?;
            let mut times = Vec::with_capacity(TRIPS / TRIPS_AT_ONCE);
            for batch in 0..total / TRIPS_AT_ONCE {
                let began = Instant::now();
                for _ in 0..TRIPS_AT_ONCE {
                    player.serve()?;
                    player.wait()?;
                }
                if batch >= TRIPS / WARM_UP / TRIPS_AT_ONCE {
                    times.push(began.elapsed().as_secs_f64() * 1e6 / TRIPS_AT_ONCE as f64);
                }
            }
            player.rest().map(|()| times)
        },
        move || {
            let mut player = Player::new(End::open_on_host(2, SHORT, other)?)?;
            for _ in 0..total {
                player.wait()?;
                player.serve()?;
            }
            player.rest()
        },
    )?;
    Ok(median(&times))
}

/// One side of the ping-pong.
struct Player {
    end: End,
    /// What can be sent.
    balls: Vec<Buffer>,
    /// Messages that came while something else was waited for.
    received: usize,
    under_way: usize,
}

impl Player {
    fn new(end: End) -> Result<Player, Failure> {
        for _ in 0..DEPTH {
            let slot = end.slot(SHORT)?;
            end.qp.post_recv(0, slot).map_err(Failure::broken)?;
        }
        let balls = (0..DEPTH)
            .map(|_| end.slot(SHORT))
            .collect::<Result<_, _>>()?;
        Ok(Player {
            end,
            balls,
            received: 0,
            under_way: 0,
        })
    }

    fn take(&mut self) -> Result<(), Failure> {
        let done = self.end.next()?;
        match done.kind.is_recv() {
            true => {
                self.received += 1;
                let again = slot_of(done);
                self.end.qp.post_recv(0, again).map_err(Failure::broken)
            }
            false => {
                self.under_way -= 1;
                self.balls.push(slot_of(done));
                Ok(())
            }
        }
    }

    fn serve(&mut self) -> Result<(), Failure> {
        let ball = loop {
            match self.balls.pop() {
                Some(ball) => break ball,
                None => self.take()?,
            }
        };
        self.under_way += 1;
        let sent = self.end.qp.post_send(0, SendOp::Send, ball);
        sent.map_err(Failure::broken)
    }

    fn wait(&mut self) -> Result<(), Failure> {
        while self.received == 0 {
            self.take()?;
        }
        self.received -= 1;
        Ok(())
    }

    /// Until nothing is under way.
    fn rest(&mut self) -> Result<(), Failure> {
        while self.under_way > 0 {
            self.take()?;
        }
        Ok(())
    }
}
