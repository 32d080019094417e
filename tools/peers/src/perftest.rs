//! The other end of perftest's programs: their exchange over TCP, then what they measure, against any
//! RoCEv2 adapter, the kernel's rxe among them.
//!
//! Owns: what happens when. How the two tell each other where they are is `exchange`.
//! Deliberately absent: perftest's other options, which must be at their defaults on its side
//! (rdma_cm with -R, both directions with -b, several queue pairs with -q, events with -e);
//! `ib_write_lat`, which polls memory.
//!
//! Source: perftest 4.5.

mod exchange;

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv6Addr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use lowtide_transport::raw::types::{
    CompletionKind, Error as VerbsError, QpType, SendOp, Status, WorkCompletion,
};
use lowtide_transport::verbs::DeviceOptions;

use self::exchange::Exchange;
use crate::end::{End, Link, Place, QKEY, Terms};

/// Where perftest listens unless told otherwise.
pub const TCP_PORT: u16 = 18515;
/// Messages of a bandwidth test that are under way, as perftest's.
const WINDOW: u32 = 128;
/// Receives that are posted at once; a datagram that finds none is lost.
const RECEIVES: u32 = 2048;
/// perftest goes round in its buffer, page by page.
const PAGE: u32 = 4096;
const PATIENCE: Duration = Duration::from_secs(20);
/// The longest message of rxe.
const BYTES_MAX: u32 = 8 << 20;

/// One of perftest's programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Test {
    /// `ib_send_lat`: a message back and forth.
    SendLat,
    /// `ib_send_bw`.
    SendBw,
    /// `ib_write_bw`.
    WriteBw,
    /// `ib_read_bw`.
    ReadBw,
    /// `ib_atomic_bw`: fetch and add.
    AtomicBw,
}

impl Test {
    /// How many messages perftest sends unless told otherwise.
    #[must_use]
    pub fn iterations(self) -> u32 {
        if self == Test::WriteBw { 5000 } else { 1000 }
    }

    /// How long they are unless told otherwise, in bytes.
    #[must_use]
    pub fn bytes(self) -> u32 {
        match self {
            Test::SendLat => 2,
            Test::AtomicBw => 8,
            Test::SendBw | Test::WriteBw | Test::ReadBw => 65_536,
        }
    }

    fn is_known_over(self, kind: QpType) -> bool {
        match kind {
            QpType::Rc => true,
            QpType::Uc => !matches!(self, Test::ReadBw | Test::AtomicBw),
            QpType::Ud => matches!(self, Test::SendLat | Test::SendBw),
        }
    }
}

impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Test::SendLat => "ib_send_lat",
            Test::SendBw => "ib_send_bw",
            Test::WriteBw => "ib_write_bw",
            Test::ReadBw => "ib_read_bw",
            Test::AtomicBw => "ib_atomic_bw",
        })
    }
}

/// What to do; as far as perftest knows it, it must be told the same.
#[derive(Clone, Debug)]
pub struct Options {
    /// The program that runs at the other end.
    pub test: Test,
    /// Type of the queue pairs.
    pub kind: QpType,
    /// Our address, of the link to measure.
    pub own: IpAddr,
    /// A file to be written with every packet.
    pub capture: Option<PathBuf>,
    /// Where the other end waits for us, host or address; if it does not, we wait for it.
    pub server: Option<String>,
    /// TCP port of the exchange; 0 to wait on any that is free.
    pub port: u16,
    /// Messages.
    pub iterations: u32,
    /// Length of each.
    pub bytes: u32,
}

/// What a run took.
#[derive(Clone, Copy, Debug)]
pub struct Report {
    /// As asked for.
    pub test: Test,
    /// As asked for.
    pub iterations: u32,
    /// As asked for.
    pub bytes: u32,
    /// Largest payload of a packet, as agreed.
    pub mtu: u32,
    /// From the first message to the last.
    pub took: Duration,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report {
            test,
            iterations,
            bytes,
            mtu,
            took,
        } = self;
        write!(f, "{test}: {iterations} x {bytes} bytes, MTU {mtu}: ")?;
        let seconds = took.as_secs_f64().max(1e-9);
        let count = f64::from(*iterations);
        match test {
            // Half of a round, as perftest says it.
            Test::SendLat => write!(f, "{:.2} us one way", seconds * 1e6 / count / 2.0),
            _ => write!(
                f,
                "{:.2} MiB/s, {:.0} messages/s",
                f64::from(*bytes) * count / seconds / f64::from(1 << 20),
                count / seconds
            ),
        }
    }
}

/// Why a run came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// Options that make no sense.
    #[error("{0}")]
    Options(String),
    /// softroce did not come up.
    #[error("softroce on {0}: {1} (`lowtide devices` shows what can be used)")]
    Device(IpAddr, #[source] io::Error),
    /// The port cannot be listened on.
    #[error("TCP port {0}: {1}; take another one with -p, on both sides")]
    Listen(u16, #[source] io::Error),
    /// Nobody waits for us.
    #[error("{0}, TCP port {1}: {2}; start `{3}` there first, or check -p")]
    Reach(String, u16, #[source] io::Error, Test),
    /// The exchange broke.
    #[error("the exchange over TCP: {0}; the other end says why, or is called with other options")]
    Exchange(#[source] io::Error),
    /// What came is not what perftest says.
    #[error("the peer says {0:?}, which perftest does not; are -R and -q at their defaults there?")]
    Words(String),
    /// The device refuses.
    #[error("softroce: {0}")]
    Verbs(#[from] VerbsError),
    /// A message came to nothing.
    #[error("{0:?} ended with {1:?} after {2} of {3} messages")]
    Completion(CompletionKind, Status, u32, u32),
    /// Nothing came any more.
    #[error(
        "silence for 20 s after {0} of {1} messages; are -n, -s and -c the same on both sides, and \
         is UDP port 4791 open between them?"
    )]
    Silence(u32, u32),
}

/// Does it once. `listening` is called with the TCP port when a client may come.
///
/// # Errors
/// [`PeerError`].
pub fn run(options: &Options, listening: impl FnOnce(u16)) -> Result<Report, PeerError> {
    let Options {
        test, kind, bytes, ..
    } = *options;
    if !test.is_known_over(kind) {
        return Err(PeerError::Options(format!("{test} does not know {kind:?}")));
    }
    if options.iterations == 0 || bytes == 0 || bytes > BYTES_MAX {
        return Err(PeerError::Options(format!(
            "{} messages of {bytes} bytes: at least one, of 1 to {BYTES_MAX} bytes",
            options.iterations
        )));
    }
    let room = 2 * bytes.max(PAGE) as usize + PAGE as usize;
    let device = DeviceOptions {
        capture: options.capture.clone(),
        ..DeviceOptions::default()
    };
    let end = End::open(options.own, room, &device)
        .map_err(|error| PeerError::Device(options.own, error))?;
    if kind == QpType::Ud && bytes > end.mtu().bytes() {
        return Err(PeerError::Options(format!(
            "a datagram holds {} bytes on this link, not {bytes}; say less with -s on both sides",
            end.mtu().bytes()
        )));
    }
    let link = end.link(kind, RECEIVES)?;
    let stream = meet(options, listening)?;
    let mut exchange = Exchange::new(stream, options.server.is_some(), 3 * PATIENCE)?;
    let mtu = exchange.begin(end.mtu())?;
    let (there, reads) = exchange.places(link.here())?;
    let mut run = Run {
        link,
        there,
        count: options.iterations,
        bytes,
        done: 0,
    };
    // perftest's own: 67 ms, for ever.
    let terms = Terms {
        mtu,
        timeout: 14,
        retry: 7,
        reads,
        qkey: QKEY,
    };
    run.link.connect(&run.there, &terms)?;
    if test == Test::SendLat || (test == Test::SendBw && !exchange.is_client()) {
        for _ in 0..run.count.min(RECEIVES) {
            run.link.post_recv(0, bytes)?;
        }
    }
    // Both are ready, and both know what the other printed; receives, once more.
    let is_one_sided = matches!(test, Test::WriteBw | Test::ReadBw | Test::AtomicBw);
    exchange.agree(run.link.here(), if is_one_sided { 2 } else { 3 })?;
    let took = run.measure(test, exchange.is_client())?;
    if is_one_sided {
        // Whoever is asked does not see the end.
        exchange.agree(run.link.here(), 1)?;
        exchange.results()?;
    }
    exchange.end(run.link.here())?;
    Ok(Report {
        test,
        iterations: options.iterations,
        bytes,
        mtu: mtu.bytes(),
        took,
    })
}

/// The TCP connection to the other end.
fn meet(options: &Options, listening: impl FnOnce(u16)) -> Result<TcpStream, PeerError> {
    let port = options.port;
    if let Some(server) = &options.server {
        return TcpStream::connect((server.as_str(), port))
            .map_err(|error| PeerError::Reach(server.clone(), port, error, options.test));
    }
    let failed = |error| PeerError::Listen(port, error);
    // Of either family; or of this one, where there is no IPv6.
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
        .or_else(|_| TcpListener::bind((options.own, port)))
        .map_err(failed)?;
    let here = listener.local_addr().map_err(failed)?;
    listening(here.port());
    Ok(listener.accept().map_err(failed)?.0)
}

/// A run under way.
struct Run<'a> {
    link: Link<'a>,
    there: Place,
    count: u32,
    bytes: u32,
    /// Messages that are behind us.
    done: u32,
}

impl Run<'_> {
    fn measure(&mut self, test: Test, is_client: bool) -> Result<Duration, PeerError> {
        let (start, remote) = (Instant::now(), self.there.remote);
        match (test, is_client) {
            (Test::SendLat, _) => self.bounce(is_client)?,
            (Test::SendBw, true) => self.stream(SendOp::Send)?,
            (Test::SendBw, false) => self.drain()?,
            (Test::WriteBw, true) => self.stream(SendOp::Write(remote))?,
            (Test::ReadBw, true) => self.stream(SendOp::Read(remote))?,
            (Test::AtomicBw, true) => self.stream(SendOp::FetchAdd { remote, add: 1 })?,
            (Test::WriteBw | Test::ReadBw | Test::AtomicBw, false) => {}
        }
        Ok(start.elapsed())
    }

    fn next(&mut self) -> Result<WorkCompletion, PeerError> {
        let work = self.link.wait(PATIENCE)?;
        self.succeeded(work)
    }

    /// The same without sleeping, as perftest does it. Of two ends that sleep each may wake the other later
    /// than it would have polled, so that both go on sleeping.
    fn poll(&mut self) -> Result<WorkCompletion, PeerError> {
        let work = self.link.poll(PATIENCE)?;
        self.succeeded(work)
    }

    fn succeeded(&self, work: Option<WorkCompletion>) -> Result<WorkCompletion, PeerError> {
        let (done, count) = (self.done, self.count);
        let work = work.ok_or(PeerError::Silence(done, count))?;
        match work.status {
            Status::Success => Ok(work),
            status => Err(PeerError::Completion(work.kind, status, done, count)),
        }
    }

    /// As fast as it goes.
    fn stream(&mut self, op: SendOp) -> Result<(), PeerError> {
        let mut posted = 0;
        while self.done < self.count {
            while posted < self.count && posted - self.done < WINDOW {
                self.link.post_send(op, 0, self.bytes)?;
                posted += 1;
            }
            self.next()?;
            self.done += 1;
        }
        Ok(())
    }

    /// Takes what comes.
    fn drain(&mut self) -> Result<(), PeerError> {
        while self.done < self.count {
            self.next()?;
            self.done += 1;
            if self.done + RECEIVES <= self.count {
                self.link.post_recv(0, self.bytes)?;
            }
        }
        Ok(())
    }

    /// Back and forth; the client begins.
    fn bounce(&mut self, is_client: bool) -> Result<(), PeerError> {
        while self.done < self.count {
            if is_client || self.done > 0 {
                self.link.post_send(SendOp::Send, 0, self.bytes)?;
            }
            let (mut is_back, mut is_sent) = (false, !is_client && self.done == 0);
            while !(is_back && is_sent) {
                let is_recv = self.poll()?.kind == CompletionKind::Recv;
                *(if is_recv { &mut is_back } else { &mut is_sent }) = true;
            }
            self.done += 1;
            if self.done + RECEIVES <= self.count {
                self.link.post_recv(0, self.bytes)?;
            }
        }
        if !is_client {
            self.link.post_send(SendOp::Send, 0, self.bytes)?;
            self.next()?;
        }
        Ok(())
    }
}
