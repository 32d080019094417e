//! Lowtide's end of ci/guest/matrix.job: every operation against ci/guest/peer.c, which drives the
//! kernel's rxe through libibverbs.
//!
//! `matrix SOCKET IPV4-ADDRESS IPV6-ADDRESS [CAPTURE] < CELLS`
//!
//! A cell is a line "NAME FAMILY ROLE OPERATION MTU ROUNDS TIMEOUT RETRY SIZE…": family 4 or 6,
//! role i if we ask and t if we are asked; operations on unreliable queue pairs begin with "uc-" or
//! "ud-". For each the two ends talk over the Unix socket SOCKET:
//!
//! ```text
//! ours                      theirs
//! cell FAMILY ROLE … -->                   ROLE is theirs
//! at QPN PSN ADDRESS KEY GID  <-> the same; both go to RTS
//! up  <->  up
//! for each size and round:
//!     go [KEY]   the target is ready (KEY: to be invalidated)
//!     refused    rnr, when we ask: our request has found no receive, which may be posted now
//!     done       the initiator has its completion and what it read is right
//!     ok         what the target got is right
//! end <-> end
//! ```
//! A side that finds something wrong says "fail WORDS" at any time. Then our queue pair goes to ERR, where
//! whatever it still has must end as flushed: "ours flushed". CAPTURE is how the names of two pcap files
//! begin. Prints "ok CELL" or "FAIL CELL: WHY" for each cell.
#![forbid(unsafe_code)]

mod round;

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use lowtide_peers::end::End;
use lowtide_transport::raw::types::{Mtu, QpType};
use lowtide_transport::verbs::DeviceOptions;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Longest message, and a page for what stands in front of it.
const LIMIT: usize = (8 << 20) + 4096;
const PATIENCE: Duration = Duration::from_secs(20);

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
                // The other end makes the socket when it has come up; a name that is not there yet
                // cannot be waited for.
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
    kind: QpType,
    /// Without the type of the queue pair.
    operation: &'a str,
    /// With it.
    name: &'a str,
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
        let (family, role, name) = (word()?, word()?, word()?);
        let (kind, operation) = match name.split_at_checked(3) {
            Some(("uc-", rest)) => (QpType::Uc, rest),
            Some(("ud-", rest)) => (QpType::Ud, rest),
            _ => (QpType::Rc, name),
        };
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
            kind,
            operation,
            name,
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
            self.name,
            self.mtu.bytes(),
            self.rounds,
            self.timeout,
            self.retry,
            sizes.join(" ")
        )
    }
}

fn open(ip: IpAddr, capture: Option<&str>) -> Outcome<End> {
    let family = if ip.is_ipv4() { 4 } else { 6 };
    let options = DeviceOptions {
        capture: capture.map(|prefix| format!("{prefix}{family}.pcap").into()),
        ..DeviceOptions::default()
    };
    Ok(End::open(ip, LIMIT, &options)?)
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
    let ends: Vec<End> = addresses
        .into_iter()
        .map(|ip| open(ip, capture.as_deref()))
        .collect::<Outcome<_>>()?;
    for line in std::io::stdin().lines() {
        let line = line?;
        let cell = Cell::parse(&line)?;
        let start = Instant::now();
        control.say(&cell.theirs())?;
        let result = round::run(&ends[usize::from(cell.is_ipv6)], &mut control, &cell);
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
