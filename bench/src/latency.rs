//! The round trip of a SEND of 64 bytes between two queue pairs whose owners poll without rest, against
//! bare datagrams between two sockets used the same way, and against UCX over TCP.

use std::io;
use std::net::UdpSocket;
use std::time::{Duration, Instant};

use lowtide_transport::verbs::{CompletionKind, SendOp};

use crate::ends::{End, Meeting, address, bare_socket, insist, on_two, slot_of};
use crate::row::{Better, Pick, Rounds, Row};
use crate::ucx::{self, Ucx};
use crate::{Bench, Failure};

const ROUNDS: u32 = 9;
/// Round trips in a round.
const TRIPS: usize = 20_000;
/// Round trips before the first that counts.
const WARM_UP: usize = 1_000;
/// Bytes of a message.
const LEN: usize = 64;
/// Headers and ICRC of a SEND in one packet.
const AROUND: usize = 16;
/// Receives posted.
const RECEIVES: u64 = 8;

/// Microseconds for a SEND and the one that answers it.
///
/// # Errors
/// A socket fails.
pub fn round_trip(bench: &Bench) -> Result<Vec<Row>, Failure> {
    let (mut ours, mut yardstick) = (Vec::new(), Vec::new());
    for _ in 0..bench.rounds.unwrap_or(ROUNDS) {
        yardstick.push(datagrams()?);
        ours.push(sends()?);
    }
    let figures = Rounds {
        unit: "us",
        better: Better::Lower,
        yardstick_is: "bare datagrams of the same length, unconnected sockets, both sides polling",
        ours,
        yardstick,
    };
    let row = figures.row("rtt-udp", Pick::Median, &bench.machine);
    Ok(vec![row.aim(1.25)])
}

/// The same against UCX over TCP.
///
/// # Errors
/// A socket fails, or UCX is not there.
pub fn round_trip_ucx(bench: &Bench) -> Result<Vec<Row>, Failure> {
    ucx::require()?;
    let ucx = Ucx {
        transports: "tcp",
        test: "tag_lat",
        len: LEN,
        iterations: TRIPS,
    };
    let (mut ours, mut yardstick) = (Vec::new(), Vec::new());
    for _ in 0..bench.rounds.unwrap_or(ROUNDS) {
        // It prints half of a round trip.
        yardstick.push(2.0 * ucx.run()?.latency_us);
        ours.push(sends()?);
    }
    let figures = Rounds {
        unit: "us",
        better: Better::Lower,
        yardstick_is: "ucx_perftest tag_lat over tcp, both ways",
        ours,
        yardstick,
    };
    let row = figures.row("rtt-udp-ucx", Pick::Median, &bench.machine);
    Ok(vec![row.aim(0.6)])
}

/// The median round trip of two queue pairs.
fn sends() -> Result<f64, Failure> {
    let (one, other) = Meeting::pair();
    let (median, ()) = on_two(
        move || {
            let end = End::open(1, LEN, one)?;
            let mut ball = Some(end.slot(LEN)?);
            for id in 0..RECEIVES {
                end.qp
                    .post_recv(id, end.slot(LEN)?)
                    .map_err(Failure::broken)?;
            }
            let median = median_us(|| {
                let sent = ball.take().expect("its completion has come");
                end.qp
                    .post_send(0, SendOp::Send, sent)
                    .map_err(Failure::broken)?;
                let mut is_answered = false;
                while !is_answered || ball.is_none() {
                    let done = end.next()?;
                    match done.kind {
                        CompletionKind::Send => ball = Some(slot_of(done)),
                        _ => {
                            is_answered = true;
                            end.qp
                                .post_recv(0, slot_of(done))
                                .map_err(Failure::broken)?;
                        }
                    }
                }
                Ok(())
            })?;
            Ok(median)
        },
        move || {
            let end = End::open(2, LEN, other)?;
            let mut balls = vec![end.slot(LEN)?, end.slot(LEN)?];
            for id in 0..RECEIVES {
                end.qp
                    .post_recv(id, end.slot(LEN)?)
                    .map_err(Failure::broken)?;
            }
            let (mut received, mut sent) = (0, 0);
            while sent < WARM_UP + TRIPS {
                let done = end.next()?;
                match done.kind {
                    CompletionKind::Send => {
                        sent += 1;
                        balls.push(slot_of(done));
                    }
                    _ => {
                        received += 1;
                        let ball = balls.pop().expect("the one before the last came back");
                        end.qp
                            .post_send(received, SendOp::Send, ball)
                            .map_err(Failure::broken)?;
                        end.qp
                            .post_recv(0, slot_of(done))
                            .map_err(Failure::broken)?;
                    }
                }
            }
            Ok(())
        },
    )?;
    Ok(median)
}

/// The median round trip of two sockets.
fn datagrams() -> Result<f64, Failure> {
    let sockets = || Ok::<_, io::Error>((bare_socket(3)?, bare_socket(4)?));
    let (a, b) = sockets().map_err(Failure::io("bare datagrams"))?;
    let bytes = [0; LEN + AROUND];
    let (median, ()) = on_two(
        || {
            median_us(|| {
                a.send_to(&bytes, address(4)).map_err(Failure::io("send"))?;
                receive(&a).map(drop)
            })
        },
        || {
            for _ in 0..WARM_UP + TRIPS {
                let len = receive(&b)?;
                b.send_to(&bytes[..len], address(3))
                    .map_err(Failure::io("send"))?;
            }
            Ok(())
        },
    )?;
    Ok(median)
}

/// Waits for a datagram without rest; its length.
fn receive(socket: &UdpSocket) -> Result<usize, Failure> {
    let mut buffer = [0; 2 * LEN];
    insist(|| match socket.recv_from(&mut buffer) {
        Ok((len, _)) => Some(Ok(len.min(LEN + AROUND))),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
        Err(error) => Some(Err(Failure::io("receive")(error))),
    })?
}

/// The median of [`TRIPS`] calls, in microseconds.
fn median_us(mut trip: impl FnMut() -> Result<(), Failure>) -> Result<f64, Failure> {
    for _ in 0..WARM_UP {
        trip()?;
    }
    let mut times: Vec<Duration> = Vec::with_capacity(TRIPS);
    for _ in 0..TRIPS {
        let began = Instant::now();
        trip()?;
        times.push(began.elapsed());
    }
    times.sort();
    Ok(times[TRIPS / 2].as_nanos() as f64 / 1e3)
}
