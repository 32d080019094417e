//! 10 MiB of WRITEs, and of READs, while packets are lost, against 10 MiB through a TCP connection over
//! the same wire.
//!
//! Two network namespaces with a third between them that forwards, and drops what the kernel's random
//! number says. Offloads are off on all links, so a packet that is dropped is one of the wire for both.
//! Needs root.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Instant;

use lowtide_transport::verbs::{Buffer, Remote, SendOp};
use nix::sched::{CloneFlags, setns};

use crate::ends::{End, Meeting, slot_of};
use crate::row::{Better, Pick, Rounds, Row};
use crate::{Bench, Failure, programs};

const ROUNDS: u32 = 5;
/// Bytes of one WRITE, and how many there are.
const LEN: usize = 1 << 20;
const COUNT: usize = 10;
const PERCENTS: [u32; 3] = [1, 5, 10];
const PORT: u16 = 4791;
/// The two ends, and the gateway of each.
const ENDS: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 77, 1, 2), Ipv4Addr::new(10, 77, 2, 2)];
const GATEWAYS: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 77, 1, 1), Ipv4Addr::new(10, 77, 2, 1)];

/// MB/s at each rate of loss.
///
/// # Errors
/// The namespaces cannot be made, or an end fails.
pub fn loss(bench: &Bench) -> Result<Vec<Row>, Failure> {
    programs::require("ip", "iproute2")?;
    programs::require("nft", "nftables")?;
    programs::require("ethtool", "ethtool")?;
    let wire = Wire::lay()?;
    let mut rows = Vec::new();
    for percent in PERCENTS {
        wire.lose(percent)?;
        let mut yardstick = Vec::new();
        let mut ours = [const { Vec::new() }; 2];
        let ops: [fn(Remote) -> SendOp; 2] = [SendOp::Write, SendOp::Read];
        for _ in 0..bench.rounds.unwrap_or(ROUNDS) {
            yardstick.push(wire.between(tcp_client, tcp_server)? / 1e6);
            for (op, rates) in ops.into_iter().zip(&mut ours) {
                let (one, other) = Meeting::pair();
                let (done, is_done) = channel();
                let rate = wire.between(
                    move || act(op, one, done),
                    move || be_acted_upon(other, &is_done),
                )?;
                rates.push(rate / 1e6);
            }
        }
        let [writes, reads] = ours;
        let row = |name, ours| {
            let figures = Rounds {
                unit: "MB/s",
                better: Better::Higher,
                yardstick_is: "10 MiB through a TCP connection with the kernel's defaults",
                ours,
                yardstick: yardstick.clone(),
            };
            figures.row(name, Pick::Median, &bench.machine)
        };
        rows.push(row(format!("loss-{percent}"), writes).aim(1.0));
        rows.push(row(format!("loss-{percent}-read"), reads));
    }
    Ok(rows)
}

/// Bytes per second of WRITEs or READs. `_done` is dropped when nothing more is awaited.
fn act(op: fn(Remote) -> SendOp, meeting: Meeting, _done: Sender<()>) -> Result<f64, Failure> {
    let end = End::open_at(SocketAddr::from((ENDS[0], PORT)), LEN, meeting)?;
    let op = op(end.remote);
    let began = Instant::now();
    for _ in 0..2 {
        let buffer = end.slot(LEN)?;
        end.qp.post_send(0, op, buffer).map_err(Failure::broken)?;
    }
    for n in 2..COUNT + 2 {
        let buffer = slot_of(end.next()?);
        if n < COUNT {
            end.qp.post_send(0, op, buffer).map_err(Failure::broken)?;
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    let last = end.qp.post_send(0, SendOp::Send, Buffer::Empty);
    last.map_err(Failure::broken)?;
    end.next()?;
    Ok((LEN * COUNT) as f64 / seconds)
}

fn be_acted_upon(meeting: Meeting, is_done: &Receiver<()>) -> Result<(), Failure> {
    let end = End::open_at(SocketAddr::from((ENDS[1], PORT)), LEN, meeting)?;
    end.qp
        .post_recv(0, Buffer::Empty)
        .map_err(Failure::broken)?;
    // The other end gives up long before.
    let heard = (0..COUNT).find_map(|_| end.next().ok());
    // The ACK of that may be lost: whoever is gone cannot send another.
    let _ = is_done.recv();
    heard
        .map(drop)
        .ok_or_else(|| Failure::broken("the other end is silent"))
}

/// Bytes per second of a stream, until its end has been heard of.
fn tcp_client() -> Result<f64, Failure> {
    let stream = || -> io::Result<f64> {
        let mut stream = connect()?;
        let block = vec![0; LEN];
        let began = Instant::now();
        for _ in 0..COUNT {
            stream.write_all(&block)?;
        }
        stream.read_exact(&mut [0])?;
        Ok((LEN * COUNT) as f64 / began.elapsed().as_secs_f64())
    };
    stream().map_err(Failure::io("the TCP stream"))
}

/// The server may not listen yet.
fn connect() -> io::Result<TcpStream> {
    let began = Instant::now();
    loop {
        match TcpStream::connect((ENDS[1], PORT)) {
            Err(_) if began.elapsed() < crate::ends::PATIENCE => thread::yield_now(),
            done => return done,
        }
    }
}

fn tcp_server() -> Result<(), Failure> {
    let serve = || -> io::Result<()> {
        let listener = TcpListener::bind((ENDS[1], PORT))?;
        let (mut stream, _) = listener.accept()?;
        let (mut buffer, mut left) = (vec![0; LEN], LEN * COUNT);
        while left > 0 {
            left -= match stream.read(&mut buffer)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                len => len,
            };
        }
        stream.write_all(b"!")
    };
    serve().map_err(Failure::io("the TCP stream's other end"))
}

/// Two namespaces, and the one between them; all go when this is dropped.
struct Wire {
    /// Their names: the ends', and the middle's.
    names: [String; 3],
}

impl Wire {
    fn lay() -> Result<Wire, Failure> {
        let names = ["a", "b", "m"].map(|end| format!("lt{}{end}", std::process::id()));
        let wire = Wire { names };
        for name in &wire.names {
            run("ip", &["netns", "add", name])?;
        }
        let middle = wire.names[2].as_str();
        for side in 0..2 {
            let name = wire.names[side].as_str();
            let outer = format!("w{side}");
            let inner = ["type", "veth", "peer", "name", "w", "netns", name];
            let mut add = vec!["-n", middle, "link", "add", outer.as_str()];
            add.extend(inner);
            run("ip", &add)?;
            for (space, link, address) in [
                (middle, outer.as_str(), GATEWAYS[side]),
                (name, "w", ENDS[side]),
            ] {
                let address = format!("{address}/24");
                run("ip", &["-n", space, "addr", "add", &address, "dev", link])?;
                run("ip", &["-n", space, "link", "set", link, "up"])?;
                let features = "gso off gro off tso off tx-udp-segmentation off".split(' ');
                let mut off = vec!["netns", "exec", space, "ethtool", "-K", link];
                off.extend(features);
                run("ip", &off)?;
            }
            let gateway = GATEWAYS[side].to_string();
            run(
                "ip",
                &["-n", name, "route", "add", "default", "via", &gateway],
            )?;
        }
        let forward = ["sysctl", "-qw", "net.ipv4.ip_forward=1"];
        run(
            "ip",
            &[["netns", "exec", middle].as_slice(), &forward].concat(),
        )?;
        Ok(wire)
    }

    /// Loses so many percent of all that is forwarded, from now on.
    fn lose(&self, percent: u32) -> Result<(), Failure> {
        let rules = format!(
            "flush ruleset\n\
             table ip lossy {{\nchain forward {{\ntype filter hook forward priority 0;\n\
             numgen random mod 100 < {percent} drop\n}}\n}}\n"
        );
        let mut nft = Command::new("ip")
            .args(["netns", "exec", &self.names[2], "nft", "-f", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .map_err(Failure::io("nft"))?;
        let mut input = nft.stdin.take().expect("it was asked for");
        input
            .write_all(rules.as_bytes())
            .map_err(Failure::io("nft"))?;
        drop(input);
        match nft.wait().map_err(Failure::io("nft"))? {
            status if status.success() => Ok(()),
            status => Err(Failure::Broken(format!("nft: {status}"))),
        }
    }

    /// Runs both ends at once, each in its namespace; what the first one says.
    fn between(
        &self,
        one: impl FnOnce() -> Result<f64, Failure> + Send,
        other: impl FnOnce() -> Result<(), Failure> + Send,
    ) -> Result<f64, Failure> {
        thread::scope(|scope| {
            let other = scope.spawn(move || enter(&self.names[1]).and_then(|()| other()));
            let one = scope.spawn(move || enter(&self.names[0]).and_then(|()| one()));
            let rate = one.join().expect("an end does not panic")?;
            other.join().expect("an end does not panic")?;
            Ok(rate)
        })
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        for name in &self.names {
            // One that was never made is missed by nobody.
            let _ = run("ip", &["netns", "del", name]);
        }
    }
}

/// Moves this thread, and those that it starts, into a namespace.
fn enter(name: &str) -> Result<(), Failure> {
    let path = format!("/run/netns/{name}");
    let file = File::open(&path).map_err(Failure::io(&path))?;
    setns(file.as_fd(), CloneFlags::CLONE_NEWNET).map_err(Failure::broken)
}

fn run(program: &str, args: &[&str]) -> Result<(), Failure> {
    let done = Command::new(program)
        .args(args)
        .output()
        .map_err(Failure::io(program))?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    Err(Failure::Broken(format!(
        "{program} {}: {}",
        args.join(" "),
        said.trim()
    )))
}
