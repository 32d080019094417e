//! SENDs of 64 bytes through one queue pair, counted where they complete, against as many datagrams of
//! the same length as `sendmmsg` and `recvmmsg` move.

use std::io::{IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lowtide_transport::verbs::SendOp;
use nix::errno::Errno;
use nix::sys::socket::{
    MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, sendmmsg, setsockopt, sockopt,
};

use crate::ends::{DEPTH, End, Meeting, address, bare_socket, on_two, slot_of};
use crate::row::{Better, Pick, Rounds, Row};
use crate::{Bench, Failure};

const ROUNDS: u32 = 9;
/// Bytes of a message.
const LEN: usize = 64;
/// Headers and ICRC of a SEND in one packet.
const AROUND: usize = 16;
/// SENDs in a round, and before the first that counts.
const COUNT: usize = 1_000_000;
const WARM_UP: usize = 50_000;
/// Datagrams per call of the yardstick.
const BATCH: usize = 64;
/// How long the yardstick sends.
const YARDSTICK: Duration = Duration::from_millis(600);
/// Bytes asked for the yardstick's receive buffer: as much as a device asks for.
const BUFFER: usize = 4 << 20;

/// Messages per second.
///
/// # Errors
/// A socket fails.
pub fn rate(bench: &Bench) -> Result<Vec<Row>, Failure> {
    let (mut ours, mut yardstick) = (Vec::new(), Vec::new());
    for _ in 0..bench.rounds.unwrap_or(ROUNDS) {
        yardstick.push(datagrams()?);
        ours.push(sends()?);
    }
    let figures = Rounds {
        unit: "msg/s",
        better: Better::Higher,
        yardstick_is: "sendmmsg of 64 datagrams of the same length, counted at recvmmsg",
        ours,
        yardstick,
    };
    let row = figures.row("rate-udp", Pick::Median, &bench.machine);
    Ok(vec![row.aim(2.0)])
}

/// Completed receives per second.
fn sends() -> Result<f64, Failure> {
    let (one, other) = Meeting::pair();
    let total = WARM_UP + COUNT;
    let ((), rate) = on_two(
        move || {
            let end = End::open(1, LEN, one)?;
            let mut done = Vec::with_capacity(BATCH);
            let mut balls = Vec::with_capacity(DEPTH as usize);
            for _ in 0..DEPTH {
                balls.push(end.slot(LEN)?);
            }
            let (mut posted, mut finished) = (0, 0);
            while finished < total {
                let count = balls.len().min(total - posted);
                let mut list = balls.drain(..count).map(|ball| (0, SendOp::Send, ball));
                end.qp.post_sends(&mut list).map_err(Failure::broken)?;
                drop(list);
                posted += count;
                finished += end.next_many(BATCH, &mut done)?;
                balls.extend(done.drain(..).map(slot_of));
            }
            Ok(())
        },
        move || {
            let end = End::open(2, LEN, other)?;
            let mut done = Vec::with_capacity(BATCH);
            for id in 0..DEPTH {
                let glove = end.slot(LEN)?;
                end.qp
                    .post_recv(u64::from(id), glove)
                    .map_err(Failure::broken)?;
            }
            let (mut finished, mut began) = (0, None);
            while finished < total {
                finished += end.next_many(BATCH, &mut done)?;
                let mut list = done.drain(..).map(|done| (0, slot_of(done)));
                end.qp.post_recvs(&mut list).map_err(Failure::broken)?;
                if began.is_none() && finished >= WARM_UP {
                    began = Some((Instant::now(), finished));
                }
            }
            let (began, before) = began.expect("the warm-up is part of the total");
            Ok((total - before) as f64 / began.elapsed().as_secs_f64())
        },
    )?;
    Ok(rate)
}

/// Datagrams that arrive per second; what the receiver's buffer cannot hold is lost.
fn datagrams() -> Result<f64, Failure> {
    let open = |last| {
        let socket = bare_socket(last).map_err(Failure::io("bare datagrams"))?;
        setsockopt(&socket, sockopt::RcvBuf, &BUFFER).map_err(Failure::broken)?;
        setsockopt(&socket, sockopt::SndBuf, &BUFFER).map_err(Failure::broken)?;
        Ok(socket)
    };
    let (from, to) = (open(3)?, open(4)?);
    let is_over = AtomicBool::new(false);
    let ((), rate) = on_two(
        || {
            let bytes = [0; LEN + AROUND];
            let parts = [[IoSlice::new(&bytes)]; BATCH];
            let peer = [Some(storage(address(4))); BATCH];
            let mut headers = MultiHeaders::preallocate(BATCH, None);
            let began = Instant::now();
            while began.elapsed() < YARDSTICK {
                let flags = MsgFlags::MSG_DONTWAIT;
                match sendmmsg(from.as_raw_fd(), &mut headers, &parts, peer, [], flags) {
                    Ok(_) | Err(Errno::EAGAIN) => {}
                    Err(error) => return Err(Failure::broken(error)),
                }
            }
            is_over.store(true, Ordering::Release);
            Ok(())
        },
        || {
            let mut buffers = [[0; LEN + AROUND]; BATCH];
            let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(BATCH, None);
            let (mut count, mut began) = (0, None);
            while !is_over.load(Ordering::Acquire) {
                let mut parts = buffers.each_mut().map(|b| [IoSliceMut::new(b)]);
                let flags = MsgFlags::MSG_DONTWAIT;
                match recvmmsg(to.as_raw_fd(), &mut headers, &mut parts, flags, None) {
                    Ok(got) => {
                        began.get_or_insert_with(Instant::now);
                        count += got.count();
                    }
                    Err(Errno::EAGAIN) => {}
                    Err(error) => return Err(Failure::broken(error)),
                }
            }
            let seconds = began.map_or(f64::INFINITY, |began| began.elapsed().as_secs_f64());
            Ok(count as f64 / seconds)
        },
    )?;
    Ok(rate)
}

fn storage(address: SocketAddr) -> SockaddrStorage {
    SockaddrStorage::from(address)
}
