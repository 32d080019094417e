//! Lowtide's end of ci/guest/matrix.job: every operation against ci/guest/peer.c, which drives the
//! kernel's rxe through libibverbs.
//!
//! `matrix SOCKET IPV4-ADDRESS IPV6-ADDRESS [CAPTURE] < CELLS`
//!
//! A cell is a line "NAME FAMILY ROLE OPERATION MTU ROUNDS TIMEOUT RETRY SIZE…": family 4 or 6, role i
//! if we ask and t if we are asked. For each the two ends talk over the Unix socket SOCKET:
//!
//! ```text
//! ours                      theirs
//! cell FAMILY ROLE … -->                   ROLE is theirs
//! at QPN PSN ADDRESS KEY GID  <-> the same; both go to RTS
//! up  <->  up
//! for each size and round:
//!     go [KEY]   the target is ready (KEY: to be invalidated)
//!     done       the initiator has its completion and what it read is right
//!     ok         what the target got is right
//! end <-> end
//! ```
//! A side that finds something wrong says "fail WORDS" at any time. CAPTURE is how the names of two pcap
//! files begin. Prints "ok CELL" or "FAIL CELL: WHY"
//! for each cell.

use std::collections::HashMap;
use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use lowtide_transport::verbs::{
    Access, Address, CompletionKind, CompletionQueue, Device, DeviceOptions, MemoryRegion, Mtu,
    ProtectionDomain, Qpn, QueuePair, Reliability, Remote, Rkey, SendOp, Status, WorkCompletion,
};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Longest message.
const LIMIT: usize = 8 << 20;
const PATIENCE: Duration = Duration::from_secs(20);
const PORT: u16 = 4791;

/// The conversation with the other end.
struct Control {
    stream: UnixStream,
    /// What it says, read by a thread so that nobody has to wait for it.
    lines: Receiver<String>,
    /// One that came while nobody expected any.
    early: Option<String>,
}

impl Control {
    fn open(path: &str) -> Outcome<Control> {
        let start = Instant::now();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if start.elapsed() > PATIENCE => return Err(error.into()),
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        };
        let (sender, lines) = mpsc::channel();
        let reader = BufReader::new(stream.try_clone()?);
        std::thread::spawn(move || {
            reader
                .lines()
                .map_while(Result::ok)
                .all(|l| sender.send(l).is_ok())
        });
        let early = None;
        Ok(Control {
            stream,
            lines,
            early,
        })
    }

    fn say(&mut self, line: &str) -> Outcome<()> {
        Ok(writeln!(self.stream, "{line}")?)
    }

    /// The rest of the next line, which must begin with `word`.
    fn expect(&mut self, word: &str) -> Outcome<String> {
        let line = match self.early.take() {
            Some(line) => line,
            None => self.lines.recv_timeout(2 * PATIENCE)?,
        };
        match line.strip_prefix(word) {
            Some(rest) => Ok(rest.trim().to_owned()),
            None => Err(line.into()),
        }
    }

    /// Whether the other end has given up.
    fn has_failed(&mut self) -> bool {
        self.early = self.early.take().or_else(|| self.lines.try_recv().ok());
        self.early
            .as_ref()
            .is_some_and(|line| line.starts_with("fail"))
    }

    /// Both ends leave the cell.
    fn end(&mut self) -> Outcome<()> {
        self.say("end")?;
        self.early = None;
        while self.lines.recv_timeout(2 * PATIENCE)? != "end" {}
        Ok(())
    }
}

#[derive(Debug)]
struct Cell<'a> {
    is_ipv6: bool,
    is_initiator: bool,
    operation: &'a str,
    mtu: Mtu,
    rounds: u32,
    timeout: u8,
    retry: u8,
    sizes: Vec<u32>,
}

impl<'a> Cell<'a> {
    fn parse(line: &'a str) -> Outcome<Cell<'a>> {
        let mut words = line.split_whitespace().skip(1);
        let mut word = || words.next().ok_or("a cell has eight words and sizes");
        let (family, role, operation) = (word()?, word()?, word()?);
        let mtu = match word()? {
            "256" => Mtu::B256,
            "512" => Mtu::B512,
            "1024" => Mtu::B1024,
            "2048" => Mtu::B2048,
            "4096" => Mtu::B4096,
            other => return Err(format!("no such MTU: {other}").into()),
        };
        let (rounds, timeout, retry) = (word()?.parse()?, word()?.parse()?, word()?.parse()?);
        let sizes = words.map(str::parse).collect::<Result<Vec<u32>, _>>()?;
        Ok(Cell {
            is_ipv6: family == "6",
            is_initiator: role == "i",
            operation,
            mtu,
            rounds,
            timeout,
            retry,
            sizes,
        })
    }

    /// As the other end is told.
    fn theirs(&self) -> String {
        let sizes: Vec<String> = self.sizes.iter().map(u32::to_string).collect();
        format!(
            "cell {} {} {} {} {} {} {} {}",
            if self.is_ipv6 { 6 } else { 4 },
            if self.is_initiator { 't' } else { 'i' },
            self.operation,
            self.mtu.bytes(),
            self.rounds,
            self.timeout,
            self.retry,
            sizes.join(" ")
        )
    }
}

/// A device with what every cell needs.
struct End {
    domain: ProtectionDomain,
    queue: CompletionQueue,
    memory: MemoryRegion,
    ip: IpAddr,
}

impl End {
    fn open(ip: IpAddr, capture: Option<&str>) -> Outcome<End> {
        let family = if ip.is_ipv4() { 4 } else { 6 };
        let options = DeviceOptions {
            capture: capture.map(|prefix| format!("{prefix}{family}.pcap").into()),
            ..DeviceOptions::default()
        };
        let device = Device::open(SocketAddr::new(ip, PORT), &options)?;
        let domain = device.protection_domain();
        Ok(End {
            queue: device.completion_queue(64),
            memory: domain.memory_region(LIMIT, Access::ALL)?,
            domain,
            ip,
        })
    }

    fn run(&self, control: &mut Control, cell: &Cell<'_>) -> Outcome<()> {
        // A cell that failed may have left completions.
        while self.queue.poll().is_some() {}
        let qp = self.domain.queue_pair(&self.queue, &self.queue, 8, 8)?;
        qp.to_init(Access::ALL)?;
        let remote = self.connect(control, cell, &qp)?;
        let mut round = 0;
        for size in &cell.sizes {
            for _ in 0..cell.rounds {
                let ask = Ask {
                    end: self,
                    qp: &qp,
                    operation: cell.operation,
                    size: *size,
                    round,
                    remote,
                };
                match cell.is_initiator {
                    true => ask.initiate(control)?,
                    false => ask.serve(control)?,
                }
                round += 1;
            }
        }
        Ok(())
    }

    fn connect(&self, control: &mut Control, cell: &Cell<'_>, qp: &QueuePair) -> Outcome<Remote> {
        let own = qp.address();
        let Remote { va, rkey } = self.memory.remote(0);
        let gid = match self.ip {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        let (qpn, psn) = (own.qpn.value(), own.psn);
        control.say(&format!("at {qpn:x} {psn:x} {va:x} {:x} {gid}", rkey.0))?;
        let theirs = control.expect("at")?;
        let words: Vec<&str> = theirs.split(' ').collect();
        let &[qpn, psn, va, rkey, gid] = words.as_slice() else {
            return Err(theirs.into());
        };
        let peer = Address {
            socket: SocketAddr::new(gid.parse::<Ipv6Addr>()?.to_canonical(), PORT),
            qpn: Qpn::new(u32::from_str_radix(qpn, 16)?),
            psn: u32::from_str_radix(psn, 16)?,
            budget: 0,
        };
        let how = Reliability {
            mtu: Some(cell.mtu),
            ack_timeout: cell.timeout,
            retry_count: cell.retry,
            rnr_retry: 7,
        };
        qp.connect_as(&peer, &how)?;
        control.say("up")?;
        control.expect("up")?;
        Ok(Remote {
            va: u64::from_str_radix(va, 16)?,
            rkey: Rkey(u32::from_str_radix(rkey, 16)?),
        })
    }
}

/// One round.
struct Ask<'a> {
    end: &'a End,
    qp: &'a QueuePair,
    operation: &'a str,
    size: u32,
    round: u32,
    remote: Remote,
}

impl Ask<'_> {
    fn pattern(&self) -> Vec<u8> {
        let seed = self.size.wrapping_add(self.round);
        let byte = |i: u32| (i.wrapping_mul(31) + i / 256).wrapping_add(seed) as u8;
        (0..self.size).map(byte).collect()
    }

    fn fill(&self, is_pattern: bool) {
        let bytes = if is_pattern {
            self.pattern()
        } else {
            vec![0xEE; self.size as usize]
        };
        self.end.memory.write(0, &bytes);
    }

    fn check(&self) -> Outcome<()> {
        let (mut bytes, expected) = (vec![0; self.size as usize], self.pattern());
        self.end.memory.read(0, &mut bytes);
        match bytes.iter().zip(&expected).position(|(a, b)| a != b) {
            None => Ok(()),
            Some(at) => Err(format!("byte {at} of {} is wrong", self.size).into()),
        }
    }

    fn word(&self) -> u64 {
        let mut word = [0; 8];
        self.end.memory.read(0, &mut word);
        u64::from_ne_bytes(word)
    }

    fn is_atomic(&self) -> bool {
        matches!(self.operation, "swap" | "add")
    }

    fn next(&self, control: &mut Control, kind: CompletionKind) -> Outcome<WorkCompletion> {
        let start = Instant::now();
        let done = loop {
            if let Some(done) = self.end.queue.wait(Duration::from_millis(50)) {
                break done;
            }
            if control.has_failed() {
                return Err(control.expect("").unwrap_or_default().into());
            }
            if start.elapsed() > PATIENCE {
                return Err("no completion".into());
            }
        };
        if (done.status, done.kind) == (Status::Success, kind) {
            return Ok(done);
        }
        Err(format!("completion {:?}, {:?}", done.kind, done.status).into())
    }

    fn initiate(&self, control: &mut Control) -> Outcome<()> {
        use CompletionKind as Kind;
        self.fill(!matches!(self.operation, "read" | "swap" | "add"));
        let told = control.expect("go")?;
        let (remote, imm) = (self.remote, self.round);
        let word = u64::from(self.round);
        let (op, kind) = match self.operation {
            "send" | "rnr" => (SendOp::Send, Kind::Send),
            "send-imm" => (SendOp::SendImm(imm), Kind::Send),
            "send-inv" => {
                let key = Rkey(u32::from_str_radix(&told, 16)?);
                (SendOp::SendInvalidate(key), Kind::Send)
            }
            "write" => (SendOp::Write(remote), Kind::Write),
            "write-imm" => (SendOp::WriteImm(remote, imm), Kind::Write),
            "read" => (SendOp::Read(remote), Kind::Read),
            "swap" => {
                let (compare, swap) = (word, word + 3);
                let op = SendOp::CompareSwap {
                    remote,
                    compare,
                    swap,
                };
                (op, Kind::CompareSwap)
            }
            "add" => (SendOp::FetchAdd { remote, add: 5 }, Kind::FetchAdd),
            other => return Err(format!("no such operation: {other}").into()),
        };
        let local = self.end.memory.range(0, self.size);
        self.qp.post_send(1, op, local)?;
        self.next(control, kind)?;
        if self.operation == "read" {
            self.check()?;
        }
        if self.is_atomic() && self.word() != word {
            return Err(format!("the word was {}, not {word}", self.word()).into());
        }
        control.say("done")?;
        control.expect("ok").map(drop)
    }

    fn serve(&self, control: &mut Control) -> Outcome<()> {
        let word = u64::from(self.round);
        self.fill(self.operation == "read");
        if self.is_atomic() {
            self.end.memory.write(0, &word.to_ne_bytes());
        }
        if self.operation == "rnr" {
            control.say("go")?;
            std::thread::sleep(Duration::from_millis(3));
        }
        let takes = match self.operation {
            "send" | "send-imm" | "rnr" => Some((CompletionKind::Recv, self.size)),
            "write-imm" => Some((CompletionKind::RecvWriteImm, 0)),
            _ => None,
        };
        if let Some((_, room)) = takes {
            self.qp.post_recv(2, self.end.memory.range(0, room))?;
        }
        if self.operation != "rnr" {
            control.say("go")?;
        }
        if let Some((kind, _)) = takes {
            let done = self.next(control, kind)?;
            let imm = self.operation.ends_with("imm").then_some(self.round);
            if (done.byte_len, done.imm) != (self.size, imm) {
                return Err(format!("{} bytes, immediate {:?}", done.byte_len, done.imm).into());
            }
        }
        control.expect("done")?;
        let becomes = word + if self.operation == "swap" { 3 } else { 5 };
        if self.is_atomic() {
            if self.word() != becomes {
                return Err(format!("the word became {}, not {becomes}", self.word()).into());
            }
        } else if self.operation != "read" {
            self.check()?;
        }
        control.say("ok")
    }
}

fn main() -> Outcome<()> {
    let mut args = std::env::args().skip(1);
    let mut arg = || {
        args.next()
            .ok_or("matrix SOCKET IPV4 IPV6 [CAPTURE] < CELLS")
    };
    let mut control = Control::open(&arg()?)?;
    let addresses: [IpAddr; 2] = [arg()?.parse()?, arg()?.parse()?];
    let capture = arg().ok();
    let mut ends = HashMap::new();
    for ip in addresses {
        ends.insert(ip.is_ipv6(), End::open(ip, capture.as_deref())?);
    }
    for line in std::io::stdin().lines() {
        let line = line?;
        let cell = Cell::parse(&line)?;
        let start = Instant::now();
        control.say(&cell.theirs())?;
        let result = ends[&cell.is_ipv6].run(&mut control, &cell);
        if let Err(error) = &result {
            control.say(&format!("fail {error}"))?;
        }
        control.end()?;
        let took = start.elapsed().as_millis();
        match result {
            Ok(()) => println!("ok {line} ({took} ms)"),
            Err(error) => println!("FAIL {line} ({took} ms): {error}"),
        }
    }
    Ok(())
}
