//! Messages of the transport between two threads over loopback, against plain datagrams and a
//! plain TCP stream.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use lowtide_transport::message::{ConnId, Counters, Endpoint, EndpointConfig, Event, SendError};

use crate::ends::{PATIENCE, address};
use crate::row::{Better, Pick, Rounds, Row};
use crate::{Bench, Failure};

const ROUNDS: u32 = 7;
/// Round trips in a round.
const TRIPS: usize = 5_000;
/// Bytes of a short message.
const SHORT: usize = 64;
/// Bytes of headers around a short message: the yardstick's datagrams carry them too.
const HEADERS: usize = 16;
/// Short messages in a round.
const SHORTS: usize = 200_000;
/// Bytes of a long message.
const LONG: usize = 64 << 10;
/// Long messages in a round.
const LONGS: usize = 4096;
/// First byte of a message that is answered.
const QUESTION: u8 = b'?';

/// Microseconds for a short message and its answer.
///
/// # Errors
/// A socket fails.
pub fn round_trip(bench: &Bench) -> Result<Vec<Row>, Failure> {
    let (mut ours, mut yardstick) = (Vec::new(), Vec::new());
    let mut copies = Copies::default();
    for _ in 0..bench.rounds.unwrap_or(ROUNDS) {
        yardstick.push(udp_trips().map_err(Failure::io("plain datagrams"))?);
        let mut pair = Pair::open()?;
        ours.push(median_us(|| pair.ask())?);
        copies.add(pair.close(), 2 * TRIPS * SHORT);
    }
    let figures = Rounds {
        unit: "us",
        better: Better::Lower,
        yardstick_is: "plain datagrams of the same length between two threads that sleep in recv",
        ours,
        yardstick,
    };
    let row = figures.row("message-rtt", Pick::Median, &bench.machine);
    Ok(vec![copies.tell(row)])
}

/// Short messages per second in one direction.
///
/// # Errors
/// A socket fails.
pub fn rate(bench: &Bench) -> Result<Vec<Row>, Failure> {
    let (mut ours, mut yardstick) = (Vec::new(), Vec::new());
    let mut copies = Copies::default();
    for _ in 0..bench.rounds.unwrap_or(ROUNDS) {
        yardstick.push(udp_rate().map_err(Failure::io("plain datagrams"))?);
        ours.push(stream(SHORT, SHORTS, &mut copies)? / SHORT as f64);
    }
    let figures = Rounds {
        unit: "msg/s",
        better: Better::Higher,
        yardstick_is: "plain datagrams of the same length, one system call each, as many as arrived",
        ours,
        yardstick,
    };
    let row = figures.row("message-rate", Pick::Median, &bench.machine);
    Ok(vec![copies.tell(row)])
}

/// MB/s of long messages.
///
/// # Errors
/// A socket fails.
pub fn bandwidth(bench: &Bench) -> Result<Vec<Row>, Failure> {
    let (mut ours, mut yardstick) = (Vec::new(), Vec::new());
    let mut copies = Copies::default();
    for _ in 0..bench.rounds.unwrap_or(ROUNDS) {
        yardstick.push(tcp_rate().map_err(Failure::io("the TCP stream"))? / 1e6);
        ours.push(stream(LONG, LONGS, &mut copies)? / 1e6);
    }
    let figures = Rounds {
        unit: "MB/s",
        better: Better::Higher,
        yardstick_is: "a TCP stream over loopback, written in the same lengths",
        ours,
        yardstick,
    };
    let row = figures.row("message-bw", Pick::Median, &bench.machine);
    Ok(vec![copies.tell(row)])
}

/// Bytes of messages that were copied, and all bytes of messages, over all rounds.
#[derive(Debug, Default)]
struct Copies {
    to_send: u64,
    on_receipt: u64,
    of: usize,
}

impl Copies {
    /// Takes in what both ends counted while they passed `len` bytes of messages.
    fn add(&mut self, ends: [Counters; 2], len: usize) {
        for end in ends {
            self.to_send += end.bytes_copied_to_send();
            self.on_receipt += end.bytes_copied_on_receipt();
        }
        self.of += len;
    }

    /// How often each byte was copied by its sender and by its receiver.
    fn tell(&self, row: Row) -> Row {
        let each = |copied: u64| (copied as f64 / self.of as f64 * 1e3).round() / 1e3;
        row.with("copies_by_sender", each(self.to_send))
            .with("copies_by_receiver", each(self.on_receipt))
    }
}

/// Two endpoints, one of them served by a thread of its own.
struct Pair {
    client: Endpoint,
    conn: ConnId,
    server: JoinHandle<Counters>,
}

impl Pair {
    fn open() -> Result<Pair, Failure> {
        let bind = |last: u8| {
            Endpoint::bind(EndpointConfig::new(address(last), u64::from(last), 1))
                .map_err(Failure::broken)
        };
        let (mut client, server) = (bind(1)?, bind(2)?);
        let peer = server.local_addr();
        let server = thread::spawn(move || serve(server));
        let conn = client.connect(peer, b"");
        let mut pair = Pair {
            client,
            conn,
            server,
        };
        pair.wait(|event| matches!(event, Event::Connected { .. }))?;
        Ok(pair)
    }

    fn wait(&mut self, is_it: impl Fn(&Event<'_>) -> bool) -> Result<(), Failure> {
        let deadline = Instant::now() + PATIENCE;
        let mut is_here = false;
        while !is_here {
            if Instant::now() > deadline {
                return Err(Failure::broken("the peer is silent"));
            }
            self.client
                .poll(Some(PATIENCE), &mut |_, event| is_here |= is_it(&event))
                .map_err(Failure::broken)?;
        }
        Ok(())
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        loop {
            match self.client.send(self.conn, &[IoSlice::new(bytes)]) {
                Ok(()) => return Ok(()),
                Err(SendError::WouldBlock) => self
                    .client
                    .poll(Some(PATIENCE), &mut |_, _| {})
                    .map_err(Failure::broken)?,
                Err(error) => return Err(Failure::broken(error)),
            };
        }
    }

    fn ask(&mut self) -> Result<(), Failure> {
        self.send(&[QUESTION; SHORT])?;
        self.wait(|event| matches!(event, Event::Message { .. }))
    }

    /// What both ends have counted.
    fn close(mut self) -> [Counters; 2] {
        self.client.close(self.conn);
        let own = self.client.counters();
        drop(self.client);
        [own, self.server.join().expect("the server does not panic")]
    }
}

/// Answers questions, swallows everything else, until the peer closes or is silent for long.
fn serve(mut endpoint: Endpoint) -> Counters {
    let mut is_done = false;
    let mut heard = Instant::now();
    while !is_done && heard.elapsed() < PATIENCE {
        let polled = endpoint.poll(Some(PATIENCE), &mut |ctx, event| {
            heard = Instant::now();
            match event {
                Event::Message { conn, bytes } if bytes.first() == Some(&QUESTION) => {
                    // Without an answer the asker fails by itself.
                    let _ = ctx.send(conn, &[IoSlice::new(&bytes[..bytes.len().min(SHORT)])]);
                }
                Event::Closed { .. } => is_done = true,
                _ => {}
            }
        });
        is_done |= polled.is_err();
    }
    endpoint.counters()
}

/// Bytes per second of `count` messages, the last of which is answered.
fn stream(len: usize, count: usize, copies: &mut Copies) -> Result<f64, Failure> {
    let mut pair = Pair::open()?;
    let message = vec![0; len];
    let began = Instant::now();
    for n in 0..count {
        pair.send(&message)?;
        if len == SHORT && n % 64 == 0 {
            pair.client
                .poll(Some(Duration::ZERO), &mut |_, _| {})
                .map_err(Failure::broken)?;
        }
    }
    pair.ask()?;
    let seconds = began.elapsed().as_secs_f64();
    // A question and its answer besides.
    copies.add(pair.close(), len * count + 2 * SHORT);
    Ok((len * count) as f64 / seconds)
}

/// The median of [`TRIPS`] calls, in microseconds.
fn median_us<E>(mut trip: impl FnMut() -> Result<(), E>) -> Result<f64, E> {
    let mut times = Vec::with_capacity(TRIPS);
    for _ in 0..TRIPS {
        let began = Instant::now();
        trip()?;
        times.push(began.elapsed());
    }
    times.sort();
    Ok(times[TRIPS / 2].as_nanos() as f64 / 1e3)
}

fn sockets() -> io::Result<(UdpSocket, UdpSocket)> {
    let pair = (UdpSocket::bind(address(3))?, UdpSocket::bind(address(4))?);
    pair.0.connect(pair.1.local_addr()?)?;
    pair.1.connect(pair.0.local_addr()?)?;
    pair.0.set_read_timeout(Some(PATIENCE))?;
    pair.1.set_read_timeout(Some(PATIENCE))?;
    Ok(pair)
}

fn udp_trips() -> io::Result<f64> {
    let (a, b) = sockets()?;
    let server = thread::spawn(move || -> io::Result<()> {
        let mut buffer = [0; 2 * SHORT];
        for _ in 0..TRIPS {
            let len = b.recv(&mut buffer)?;
            b.send(&buffer[..len])?;
        }
        Ok(())
    });
    let mut buffer = [0; 2 * SHORT];
    let median = median_us(|| {
        a.send(&[0; SHORT + HEADERS])?;
        a.recv(&mut buffer).map(|_| ())
    });
    server.join().expect("the server does not panic")?;
    median
}

/// Datagrams that arrived, per second: what the receiver's buffer cannot hold is lost.
fn udp_rate() -> io::Result<f64> {
    let (a, b) = sockets()?;
    b.set_read_timeout(Some(Duration::from_millis(200)))?;
    let server = thread::spawn(move || {
        let (mut buffer, mut count, mut last) = ([0; 2 * SHORT], 0u32, Instant::now());
        while b.recv(&mut buffer).is_ok() {
            count += 1;
            last = Instant::now();
        }
        (count, last)
    });
    let began = Instant::now();
    for _ in 0..SHORTS {
        a.send(&[0; SHORT + HEADERS])?;
    }
    let (count, last) = server.join().expect("the server does not panic");
    Ok(f64::from(count) / (last - began).as_secs_f64())
}

fn tcp_rate() -> io::Result<f64> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let peer = listener.local_addr()?;
    let server = thread::spawn(move || -> io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        let mut buffer = vec![0; 1 << 20];
        while stream.read(&mut buffer)? > 0 {}
        stream.write_all(b"!")
    });
    let mut stream = TcpStream::connect(peer)?;
    let message = vec![0; LONG];
    let began = Instant::now();
    for _ in 0..LONGS {
        stream.write_all(&message)?;
    }
    stream.shutdown(Shutdown::Write)?;
    stream.read_exact(&mut [0])?;
    let seconds = began.elapsed().as_secs_f64();
    server.join().expect("the server does not panic")?;
    Ok((LONG * LONGS) as f64 / seconds)
}
