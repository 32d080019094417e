//! What a cell does with the raw verbs.

use std::net::Ipv6Addr;
use std::time::{Duration, Instant};

use lowtide_peers::end::{End, Link, Place, QKEY, Terms};
use lowtide_transport::raw::MemoryWindow;
use lowtide_transport::raw::types::*;
use lowtide_transport::verbs::Counters;
use lowtide_transport_proto::qp::Access;

use super::{Cell, Control, LIMIT, Outcome, PATIENCE};

/// How long the other end's failure may go unnoticed.
const LOOK: Duration = Duration::from_millis(50);
/// How long what is sent and not acknowledged may be under way.
const LATE: Duration = Duration::from_secs(1);

pub(super) fn run(end: &End, control: &mut Control, cell: &Cell<'_>) -> Outcome<()> {
    // Of its own, lest a completion of a failed cell is taken for one of this.
    let mut link = end.link(cell.kind, 8)?;
    let there = connect(control, cell, &mut link)?;
    let result = rounds(end, control, cell, &mut link, &there);
    result.map_err(|why| match link.break_off() {
        Ok(()) => format!("{why}; ours flushed").into(),
        Err(odd) => format!("{why}; ours did not end: {odd}").into(),
    })
}

fn rounds<'end>(
    end: &'end End,
    control: &mut Control,
    cell: &Cell<'_>,
    link: &mut Link<'end>,
    there: &Place,
) -> Outcome<()> {
    let is_window = cell.operation == "send-inv" && !cell.is_initiator;
    let mut window = match is_window {
        true => Some(end.pd().memory_window(MwType::Two)?),
        false => None,
    };
    let mut round = 0;
    for size in &cell.sizes {
        for _ in 0..cell.rounds {
            let mut ask = Ask {
                end,
                link: &mut *link,
                remote: there.remote,
                window: window.as_mut(),
                operation: cell.operation,
                size: *size,
                round,
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

/// Tells where we are, learns where the other end is, and goes to RTS.
fn connect(control: &mut Control, cell: &Cell<'_>, link: &mut Link<'_>) -> Outcome<Place> {
    let Place {
        qpn,
        psn,
        remote,
        gid,
    } = *link.here();
    let (qpn, psn) = (qpn.value(), psn.value());
    let (va, rkey, gid) = (remote.va, remote.rkey.0, Ipv6Addr::from(gid.0));
    control.say(&format!("at {qpn:x} {psn:x} {va:x} {rkey:x} {gid}"))?;
    let theirs = control.expect("at")?;
    let words: Vec<&str> = theirs.split(' ').collect();
    let &[qpn, psn, va, rkey, gid] = words.as_slice() else {
        return Err(theirs.into());
    };
    let hex = |word| u32::from_str_radix(word, 16);
    let there = Place {
        qpn: Qpn::new(hex(qpn)?),
        psn: Psn::new(hex(psn)?),
        remote: Remote {
            va: u64::from_str_radix(va, 16)?,
            rkey: Rkey(hex(rkey)?),
        },
        gid: Gid(gid.parse::<Ipv6Addr>()?.octets()),
    };
    let terms = Terms {
        mtu: cell.mtu,
        timeout: cell.timeout,
        retry: cell.retry,
        reads: 8,
        qkey: QKEY,
    };
    link.connect(&there, &terms)?;
    control.say("up")?;
    control.expect("up")?;
    Ok(there)
}

/// One round.
struct Ask<'a, 'end> {
    end: &'end End,
    link: &'a mut Link<'end>,
    remote: Remote,
    window: Option<&'a mut MemoryWindow>,
    operation: &'a str,
    size: u32,
    round: u32,
}

impl Ask<'_, '_> {
    fn pattern(&self) -> Vec<u8> {
        let seed = self.size.wrapping_add(self.round);
        let byte = |i: u32| (i.wrapping_mul(31) + i / 256).wrapping_add(seed) as u8;
        (0..self.size).map(byte).collect()
    }

    fn check(&self, at: u32) -> Outcome<()> {
        let bytes = self.end.read(at as usize, self.size as usize);
        let wrong = bytes.iter().zip(&self.pattern()).position(|(a, b)| a != b);
        match wrong {
            None => Ok(()),
            Some(at) => Err(format!("byte {at} of {} is wrong", self.size).into()),
        }
    }

    /// Whether the word at the beginning is what it should be.
    fn check_word(&self, expected: u64) -> Outcome<()> {
        let word = self.end.read(0, 8);
        let word = u64::from_ne_bytes(word.try_into().map_err(|_| "eight bytes")?);
        match word == expected {
            true => Ok(()),
            false => Err(format!("the word is {word}, not {expected}").into()),
        }
    }

    fn is_atomic(&self) -> bool {
        matches!(self.operation, "swap" | "add")
    }

    fn next(&mut self, control: &mut Control, kind: CompletionKind) -> Outcome<WorkCompletion> {
        let start = Instant::now();
        let done = loop {
            if let Some(done) = self.link.wait(LOOK)? {
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

    /// Waits until a request has found no receive, by a counter that was `before`. A counter cannot be
    /// slept on, so it is looked at whenever nothing has completed for a while.
    fn wait_for_refusal(
        &mut self,
        control: &mut Control,
        counter: fn(&Counters) -> u64,
        before: u64,
    ) -> Outcome<()> {
        let start = Instant::now();
        while counter(&self.end.counters()) == before {
            if control.has_failed() {
                return Err(control.expect("").unwrap_or_default().into());
            }
            if start.elapsed() > PATIENCE {
                return Err("no request has found no receive".into());
            }
            if let Some(done) = self.link.wait(Duration::from_millis(1))? {
                return Err(format!("completion {:?}, {:?}", done.kind, done.status).into());
            }
        }
        Ok(())
    }

    fn fill(&self, is_pattern: bool) {
        let len = (self.link.head() + self.size) as usize;
        let bytes = match is_pattern {
            true => self.pattern(),
            false => vec![0xEE; len],
        };
        self.end.write(0, &bytes);
    }

    /// We ask; what comes back is looked at here, what arrives there by the other end.
    fn initiate(&mut self, control: &mut Control) -> Outcome<()> {
        use CompletionKind as Kind;
        self.fill(!matches!(self.operation, "read" | "swap" | "add"));
        let told = control.expect("go")?;
        let (remote, imm, word) = (self.remote, self.round, u64::from(self.round));
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
        let received = |counters: &Counters| counters.rcvd_rnr_err;
        let before = received(&self.end.counters());
        self.link.post_send(op, 0, self.size)?;
        if self.operation == "rnr" {
            self.wait_for_refusal(control, received, before)?;
            control.say("refused")?;
        }
        self.next(control, kind)?;
        if self.operation == "read" {
            self.check(0)?;
        }
        if self.is_atomic() {
            self.check_word(word)?;
        }
        control.say("done")?;
        control.expect("ok").map(drop)
    }

    /// A window of the second type over the whole area: the key to invalidate.
    fn bind(&mut self, control: &mut Control) -> Outcome<Option<Rkey>> {
        let whole = self.end.sge(0, LIMIT as u32).ok_or("it has a length")?;
        let Some(window) = &mut self.window else {
            return Ok(None);
        };
        let rkey = window.next_rkey();
        let bind = Bind {
            window: window.rkey(),
            rkey,
            region: whole.lkey,
            addr: whole.addr,
            len: whole.len.into(),
            access: Access::WRITE,
            zero_based: false,
        };
        window.set_rkey(rkey);
        self.link.post_send(SendOp::BindWindow(bind), 0, 0)?;
        self.next(control, CompletionKind::BindWindow)?;
        Ok(Some(rkey))
    }

    fn serve(&mut self, control: &mut Control) -> Outcome<()> {
        let (head, word) = (self.link.head(), u64::from(self.round));
        self.fill(self.operation == "read");
        if self.is_atomic() {
            self.end.write(0, &word.to_ne_bytes());
        }
        let key = self.bind(control)?;
        if self.operation == "rnr" {
            let sent = |counters: &Counters| counters.send_rnr_err;
            let before = sent(&self.end.counters());
            control.say("go")?;
            self.wait_for_refusal(control, sent, before)?;
        }
        let takes = match self.operation {
            "send" | "send-imm" | "send-inv" | "rnr" => Some((CompletionKind::Recv, self.size)),
            "write-imm" => Some((CompletionKind::RecvWriteImm, 0)),
            _ => None,
        };
        if let Some((_, room)) = takes {
            self.link.post_recv(0, room)?;
        }
        match key {
            Some(key) => control.say(&format!("go {:x}", key.0))?,
            None if self.operation != "rnr" => control.say("go")?,
            None => {}
        }
        if let Some((kind, _)) = takes {
            let done = self.next(control, kind)?;
            let imm = self.operation.ends_with("imm").then_some(self.round);
            let seen = (done.byte_len, done.imm, done.invalidated);
            if seen != (head + self.size, imm, key) {
                return Err(format!("bytes, immediate, invalidated: {seen:?}").into());
            }
        }
        control.expect("done")?;
        if self.is_atomic() {
            self.check_word(word + if self.operation == "swap" { 3 } else { 5 })?;
        } else if self.operation == "write" && self.link.kind() == QpType::Uc {
            // Nothing tells of it, and it may come after the word that it was sent.
            let start = Instant::now();
            while self.check(head).is_err() && start.elapsed() < LATE {
                std::thread::sleep(Duration::from_millis(1));
            }
            self.check(head)?;
        } else if self.operation != "read" {
            self.check(head)?;
        }
        control.say("ok")
    }
}
