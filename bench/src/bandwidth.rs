//! WRITEs and READs of 1 MiB in one direction between two queue pairs, ICRC computed and checked,
//! against one TCP stream of `iperf3`.

use std::process::Command;
use std::time::Instant;

use lowtide_transport::verbs::{Buffer, SendOp};
use serde_json::Value;

use crate::ends::{End, Meeting, Opener, on_two, processors, slot_of};
use crate::programs::{self, Served};
use crate::row::{Better, Pick, Rounds, Row};
use crate::{Bench, Failure};

const ROUNDS: u32 = 9;
/// Bytes of one WRITE or READ.
pub const LEN: usize = 1 << 20;
/// How many are under way.
const DEPTH: usize = 8;
/// How many in a round, and how many before the first that counts.
const COUNT: usize = 1024;
const WARM_UP: usize = 64;

/// MB/s of WRITEs.
///
/// # Errors
/// A socket fails, or `iperf3` is not there.
pub fn write(bench: &Bench) -> Result<Vec<Row>, Failure> {
    compare(bench, "bw-udp-write", |end| SendOp::Write(end.remote))
}

/// MB/s of READs.
///
/// # Errors
/// A socket fails, or `iperf3` is not there.
pub fn read(bench: &Bench) -> Result<Vec<Row>, Failure> {
    compare(bench, "bw-udp-read", |end| SendOp::Read(end.remote))
}

fn compare(
    bench: &Bench,
    name: &str,
    op: impl Fn(&End) -> SendOp + Copy + Send,
) -> Result<Vec<Row>, Failure> {
    programs::require("iperf3", "iperf3")?;
    let (mut ours, mut yardstick) = (Vec::new(), Vec::new());
    for _ in 0..bench.rounds.unwrap_or(ROUNDS) {
        yardstick.push(tcp()? / 1e6);
        ours.push(stream(End::open, COUNT, op)? / 1e6);
    }
    let figures = Rounds {
        unit: "MB/s",
        better: Better::Higher,
        yardstick_is: "iperf3 over loopback, one TCP stream, counted at the receiver",
        ours,
        yardstick,
    };
    let row = figures.row(name, Pick::Median, &bench.machine);
    Ok(vec![row.aim(1.0)])
}

/// Bytes per second of `count` requests of one kind between two ends opened like this.
///
/// # Errors
/// An end fails.
pub fn stream(
    open: Opener,
    count: usize,
    op: impl Fn(&End) -> SendOp + Send,
) -> Result<f64, Failure> {
    let (one, other) = Meeting::pair();
    let (rate, ()) = on_two(
        move || {
            let end = open(1, LEN, one)?;
            let op = op(&end);
            let post = |buffer| end.qp.post_send(0, op, buffer).map_err(Failure::broken);
            for _ in 0..DEPTH {
                post(end.slot(LEN)?)?;
            }
            for _ in 0..WARM_UP {
                post(slot_of(end.next()?))?;
            }
            let began = Instant::now();
            for _ in 0..count {
                post(slot_of(end.next()?))?;
            }
            let seconds = began.elapsed().as_secs_f64();
            for _ in 0..DEPTH {
                end.next()?;
            }
            // Tells the other end to stop.
            end.qp
                .post_send(0, SendOp::Send, Buffer::Empty)
                .map_err(Failure::broken)?;
            end.next()?;
            Ok((LEN * count) as f64 / seconds)
        },
        move || {
            let end = open(2, LEN, other)?;
            end.qp
                .post_recv(0, Buffer::Empty)
                .map_err(Failure::broken)?;
            end.next().map(drop)
        },
    )?;
    Ok(rate)
}

/// Bytes per second of `iperf3`.
fn tcp() -> Result<f64, Failure> {
    let port = programs::free_port()?;
    let of_port = port.to_string();
    let [first, last] = processors()?.map(|cpu| cpu.to_string());
    let mut server = Command::new("iperf3");
    server.args(["-s", "-1", "-p", &of_port, "-A", &last]);
    let _server = Served::start(&mut server, port)?;
    let mut client = Command::new("iperf3");
    client
        .args(["-c", "127.0.0.1", "-p", &of_port, "-A", &first])
        .args(["-n", &format!("{}M", (LEN * COUNT) >> 20), "-J"]);
    let text = programs::ask(&mut client)?;
    let report: Value = serde_json::from_str(&text).map_err(Failure::broken)?;
    report["end"]["sum_received"]["bits_per_second"]
        .as_f64()
        .map(|bits| bits / 8.0)
        .ok_or_else(|| Failure::Broken(format!("iperf3 printed:\n{text}")))
}
