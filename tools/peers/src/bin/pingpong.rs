//! The other end of libibverbs' `ibv_rc_pingpong` and `ibv_ud_pingpong`: the same exchange over TCP
//! port 18515, the same messages, against any RoCEv2 adapter, the kernel's rxe among them, or against
//! itself.
//!
//! `pingpong rc|ud OWN-ADDRESS [SERVER] [ITERATIONS] [BYTES]`
//!
//! Without SERVER ("-" stands for none) it waits for a client. The peer is started with the GID
//! index of its IPv4 address: `ibv_rc_pingpong -g 1 -c OWN-ADDRESS` (-c checks what arrives). A
//! client compares every byte that comes back.
#![forbid(unsafe_code)]

use std::error::Error;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use lowtide_peers::end::{End, Link, Place, QKEY, Terms};
use lowtide_transport::raw::types::{
    CompletionKind, Gid, Psn, QpType, Qpn, Remote, Rkey, SendOp, Status,
};
use lowtide_transport::verbs::DeviceOptions;

type Outcome<T> = Result<T, Box<dyn Error>>;

const PORT: u16 = 18515;
/// LID, queue pair, PSN and GID in hexadecimal, with the terminating zero of C.
const EXCHANGE: usize = 52;
const PATIENCE: Duration = Duration::from_secs(20);
/// Some timeouts of a peer (67 ms each).
const LINGER: Duration = Duration::from_millis(400);

fn tell(stream: &mut TcpStream, here: &Place) -> Outcome<()> {
    let (qpn, psn, gid) = (
        here.qpn.value(),
        here.psn.value(),
        u128::from_be_bytes(here.gid.0),
    );
    // In one piece: the peer reads once.
    let text = format!("0000:{qpn:06x}:{psn:06x}:{gid:032x}\0");
    Ok(stream.write_all(text.as_bytes())?)
}

fn learn(stream: &mut TcpStream) -> Outcome<Place> {
    let mut text = [0; EXCHANGE];
    stream.read_exact(&mut text)?;
    let text = std::str::from_utf8(&text[..EXCHANGE - 1])?;
    let mut words = text.split(':').skip(1);
    let mut word = || words.next().ok_or("the peer's words are too few");
    Ok(Place {
        qpn: Qpn::new(u32::from_str_radix(word()?, 16)?),
        psn: Psn::new(u32::from_str_radix(word()?, 16)?),
        gid: Gid(u128::from_str_radix(word()?, 16)?.to_be_bytes()),
        remote: Remote {
            va: 0,
            rkey: Rkey(0),
        },
    })
}

/// Meets the other end, goes to RTS, and is ready to catch at `half`.
fn meet(
    link: &mut Link<'_>,
    server: Option<&str>,
    terms: &Terms,
    (half, bytes): (u64, u32),
) -> Outcome<()> {
    let mut stream = match server {
        Some(server) => TcpStream::connect((server, PORT))?,
        None => {
            TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT))?
                .accept()?
                .0
        }
    };
    if server.is_some() {
        tell(&mut stream, link.here())?;
    }
    link.connect(&learn(&mut stream)?, terms)?;
    link.post_recv(half, bytes)?;
    if server.is_some() {
        stream.write_all(b"done\0")?;
    } else {
        tell(&mut stream, link.here())?;
        stream.read_exact(&mut [0; 5])?;
    }
    Ok(())
}

/// A game: the ball lies at the beginning of the memory, and is caught in its second half.
struct Game<'a> {
    end: &'a End,
    link: Link<'a>,
    bytes: u32,
    half: u64,
    thrown: u32,
    /// Throws that have completed.
    landed: u32,
    caught: u32,
}

impl Game<'_> {
    fn throw(&mut self, ball: &[u8]) -> Outcome<()> {
        // What is under way must not change.
        self.wait_for(|game| game.landed == game.thrown)?;
        self.end.write(0, ball);
        self.thrown += 1;
        Ok(self.link.post_send(SendOp::Send, 0, self.bytes)?)
    }

    /// The next ball; a catch is ready for the one after it.
    fn catch(&mut self) -> Outcome<Vec<u8>> {
        let so_far = self.caught;
        self.wait_for(|game| game.caught > so_far)?;
        let at = self.half as usize + self.link.head() as usize;
        let ball = self.end.read(at, self.bytes as usize);
        self.link.post_recv(self.half, self.bytes)?;
        Ok(ball)
    }

    fn wait_for(&mut self, condition: impl Fn(&Self) -> bool) -> Outcome<()> {
        while !condition(self) {
            let done = self.link.wait(PATIENCE)?.ok_or("silence for 20 s")?;
            match (done.status, done.kind) {
                (Status::Success, CompletionKind::Send) => self.landed += 1,
                (Status::Success, _) if done.byte_len == self.link.head() + self.bytes => {
                    self.caught += 1;
                }
                _ => return Err(format!("{done:?}").into()),
            }
        }
        Ok(())
    }

    fn play(&mut self, iterations: u32, is_client: bool) -> Outcome<()> {
        for round in 0..iterations {
            if is_client {
                // Each page begins with a zero: ibv_rc_pingpong -c looks there.
                let byte = |i| if i % 4096 == 0 { 0 } else { (round + i) as u8 };
                let ball: Vec<u8> = (0..self.bytes).map(byte).collect();
                self.throw(&ball)?;
                (self.catch()? == ball)
                    .then_some(())
                    .ok_or("a ball came back changed")?;
            } else {
                let ball = self.catch()?;
                self.throw(&ball)?;
            }
        }
        Ok(())
    }
}

fn main() -> Outcome<()> {
    let mut args = std::env::args().skip(1);
    let kind = match args.next().as_deref() {
        Some("rc") => QpType::Rc,
        Some("ud") => QpType::Ud,
        _ => return Err("pingpong rc|ud OWN-ADDRESS [SERVER] [ITERATIONS] [BYTES]".into()),
    };
    let own: IpAddr = args.next().ok_or("say the own address")?.parse()?;
    let server = args.next().filter(|server| server != "-");
    let mut number = |or| args.next().map_or(Ok(or), |n| n.parse::<u32>());
    let (iterations, bytes) = (number(1000)?.max(1), number(4096)?);

    let half = (u64::from(bytes) + 40).next_multiple_of(4096);
    let end = End::open(own, 2 * half as usize, &DeviceOptions::default())?;
    let mut link = end.link(kind, 2)?;
    let terms = Terms {
        mtu: end.mtu(),
        timeout: 14,
        retry: 7,
        reads: 1,
        qkey: QKEY,
    };
    meet(&mut link, server.as_deref(), &terms, (half, bytes))?;
    let mut game = Game {
        end: &end,
        link,
        bytes,
        half,
        thrown: 0,
        landed: 0,
        caught: 0,
    };
    let start = Instant::now();
    game.play(iterations, server.is_some())?;
    let each = start.elapsed() / iterations;
    // A client that has all may be gone before it acknowledges the last ball.
    let _ = game.wait_for(|game| game.landed == game.thrown);
    // It may not have heard that its last ball was caught, and throws it again: the device answers.
    std::thread::sleep(LINGER);
    println!(
        "{iterations} iterations of {bytes} bytes, {each:?} each, {:?}",
        end.counters()
    );
    Ok(())
}
