//! What a cell does with the raw verbs.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Instant;

use lowtide_transport::raw::types::*;
use lowtide_transport::raw::{
    AddressHandle, CompletionQueue, Context, MemoryRegion, MemoryWindow, ProtectionDomain,
    QueuePair, Queues,
};
use lowtide_transport::verbs::DeviceOptions;

use lowtide_transport_proto::qp::Access;

use super::{Cell, Control, Outcome, PATIENCE};

/// Longest message.
const LIMIT: usize = 8 << 20;
/// IP header in front of a datagram.
const GRH: u32 = 40;
const QKEY: u32 = 0x1111_1111;
const PORT: u16 = 4791;
const RIGHTS: AccessFlags = AccessFlags::LOCAL_WRITE
    .with(AccessFlags::REMOTE_WRITE)
    .with(AccessFlags::REMOTE_READ)
    .with(AccessFlags::REMOTE_ATOMIC);

/// Memory that peers change: it is only copied into and out of.
struct Area(*mut u8);

impl Area {
    fn new() -> Area {
        let words = vec![0u64; (LIMIT + 4096) / 8];
        Area(Box::leak(words.into_boxed_slice()).as_mut_ptr().cast())
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= LIMIT + 4096);
        // SAFETY: inside the allocation, which is never freed and to which there is no reference.
        unsafe { std::ptr::copy(bytes.as_ptr(), self.0.add(at), bytes.len()) };
    }

    fn read(&self, at: usize, len: usize) -> Vec<u8> {
        assert!(at + len <= LIMIT + 4096);
        let mut bytes = vec![0; len];
        // SAFETY: as in `write`; what is read has completed.
        unsafe { std::ptr::copy(self.0.add(at), bytes.as_mut_ptr(), len) };
        bytes
    }
}

/// A device with memory.
pub(super) struct End {
    context: Context,
    pd: ProtectionDomain,
    area: Area,
    region: MemoryRegion,
    ip: IpAddr,
}

/// Where the peer is.
struct Peer {
    qpn: Qpn,
    remote: Remote,
    address: Option<AddressHandle>,
}

impl End {
    pub(super) fn open(ip: IpAddr, capture: Option<&str>) -> Outcome<End> {
        let family = if ip.is_ipv4() { 4 } else { 6 };
        let options = DeviceOptions {
            capture: capture.map(|prefix| format!("{prefix}{family}.pcap").into()),
            ..DeviceOptions::default()
        };
        let context = Context::open(SocketAddr::new(ip, PORT), &options)?;
        let (pd, area) = (context.protection_domain(), Area::new());
        let (at, len) = (area.0 as u64, LIMIT as u64 + 4096);
        let flags = RIGHTS | AccessFlags::MW_BIND;
        // SAFETY: the area is only ever copied into and out of.
        let region = unsafe { pd.register(at, len, at, flags) }?;
        Ok(End {
            context,
            pd,
            area,
            region,
            ip,
        })
    }

    pub(super) fn run(&self, control: &mut Control, cell: &Cell<'_>) -> Outcome<()> {
        // Of its own, lest a completion of a failed cell is taken for one of this.
        let queue = self.context.completion_queue(64, None)?;
        let init = QpInitAttr {
            kind: cell.kind,
            cap: QpCap {
                max_send_wr: 8,
                max_recv_wr: 8,
                max_send_sge: 1,
                max_recv_sge: 1,
                max_inline_data: 0,
            },
            sq_sig_all: true,
        };
        let queues = Queues {
            send: &queue,
            recv: &queue,
            shared: None,
        };
        let qp = self.pd.queue_pair(queues, &init)?;
        let peer = self.connect(control, cell, &qp)?;
        let is_window = cell.operation == "send-inv" && !cell.is_initiator;
        let mut window = match is_window {
            true => Some(self.pd.memory_window(MwType::Two)?),
            false => None,
        };
        let mut round = 0;
        for size in &cell.sizes {
            for _ in 0..cell.rounds {
                let mut ask = Ask {
                    end: self,
                    qp: &qp,
                    queue: &queue,
                    peer: &peer,
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
    fn connect(&self, control: &mut Control, cell: &Cell<'_>, qp: &QueuePair) -> Outcome<Peer> {
        use QpAttrMask as M;
        let (own, psn) = (Gid::from_ip(self.ip), qp.random_psn());
        let (va, rkey) = (self.region.address(), self.region.rkey().0);
        let gid = Ipv6Addr::from(own.0);
        let qpn = qp.qpn().value();
        control.say(&format!(
            "at {qpn:x} {:x} {va:x} {rkey:x} {gid}",
            psn.value()
        ))?;
        let theirs = control.expect("at")?;
        let words: Vec<&str> = theirs.split(' ').collect();
        let &[qpn, rq_psn, va, rkey, gid] = words.as_slice() else {
            return Err(theirs.into());
        };
        let hex = |word| u32::from_str_radix(word, 16);
        let address = AhAttr {
            dgid: Gid(gid.parse::<Ipv6Addr>()?.octets()),
            hop_limit: 64,
            port: 1,
            ..AhAttr::default()
        };
        let attr = QpAttr {
            qkey: QKEY,
            access: RIGHTS,
            address,
            path_mtu: cell.mtu,
            dest: Qpn::new(hex(qpn)?),
            rq_psn: Psn::new(hex(rq_psn)?),
            sq_psn: psn,
            max_dest_rd_atomic: 8,
            max_rd_atomic: 8,
            min_rnr_timer: RnrTimer::new(12),
            timeout: cell.timeout,
            retry_cnt: cell.retry,
            rnr_retry: 7,
            ..QpAttr::default()
        };
        for state in [QpState::Init, QpState::Rtr, QpState::Rts] {
            let from = qp.query().state;
            let wanted = M::of_transition(cell.kind, from, state)
                .ok_or("no such transition")?
                .0;
            qp.modify(&QpAttr { state, ..attr }, wanted.with(M::STATE))?;
        }
        control.say("up")?;
        control.expect("up")?;
        Ok(Peer {
            qpn: attr.dest,
            remote: Remote {
                va: u64::from_str_radix(va, 16)?,
                rkey: Rkey(hex(rkey)?),
            },
            address: match cell.kind {
                QpType::Ud => Some(self.pd.address_handle(&address)?),
                _ => None,
            },
        })
    }
}

/// One round.
struct Ask<'a> {
    end: &'a End,
    qp: &'a QueuePair,
    queue: &'a CompletionQueue,
    peer: &'a Peer,
    window: Option<&'a mut MemoryWindow>,
    operation: &'a str,
    size: u32,
    round: u32,
}

impl Ask<'_> {
    fn pattern(&self) -> Vec<u8> {
        let seed = self.size.wrapping_add(self.round);
        let byte = |i: u32| (i.wrapping_mul(31) + i / 256).wrapping_add(seed) as u8;
        (0..self.size).map(byte).collect()
    }

    /// Bytes in front of what is received.
    fn head(&self) -> u32 {
        if self.peer.address.is_some() { GRH } else { 0 }
    }

    fn check(&self, at: u32) -> Outcome<()> {
        let bytes = self.end.area.read(at as usize, self.size as usize);
        let wrong = bytes.iter().zip(&self.pattern()).position(|(a, b)| a != b);
        match wrong {
            None => Ok(()),
            Some(at) => Err(format!("byte {at} of {} is wrong", self.size).into()),
        }
    }

    /// Whether the word at the beginning is what it should be.
    fn check_word(&self, expected: u64) -> Outcome<()> {
        let word = self.end.area.read(0, 8);
        let word = u64::from_ne_bytes(word.try_into().map_err(|_| "eight bytes")?);
        match word == expected {
            true => Ok(()),
            false => Err(format!("the word is {word}, not {expected}").into()),
        }
    }

    fn is_atomic(&self) -> bool {
        matches!(self.operation, "swap" | "add")
    }

    fn next(&self, control: &mut Control, kind: CompletionKind) -> Outcome<WorkCompletion> {
        let (start, mut done) = (Instant::now(), Vec::new());
        while self.queue.poll(1, &mut done)? == 0 {
            let slice = Instant::now() + std::time::Duration::from_millis(50);
            if !self.queue.wait(slice) && control.has_failed() {
                return Err(control.expect("").unwrap_or_default().into());
            }
            if start.elapsed() > PATIENCE {
                return Err("no completion".into());
            }
        }
        let done = done[0];
        if (done.status, done.kind) == (Status::Success, kind) {
            return Ok(done);
        }
        Err(format!("completion {:?}, {:?}", done.kind, done.status).into())
    }

    fn sge(&self, len: u32) -> Option<Sge> {
        (len > 0).then_some(Sge {
            lkey: self.end.region.lkey(),
            addr: self.end.region.address(),
            len,
        })
    }

    fn post_send(&self, op: SendOp, len: u32) -> Outcome<()> {
        let to = self.peer.address.as_ref().map(|handle| Destination {
            ah: handle.id(),
            qpn: self.peer.qpn,
            qkey: QKEY,
        });
        let sge = self.sge(len);
        let wr = SendWr {
            wr_id: 1,
            op,
            sg_list: sge.as_slice(),
            flags: SendFlags::SIGNALED,
            to,
        };
        // SAFETY: the area is only copied into and out of, and lives as long as the process.
        Ok(unsafe { self.qp.post_send(&[wr]) }.map_err(|bad| bad.error)?)
    }

    fn post_recv(&self, len: u32) -> Outcome<()> {
        let sge = self.sge(len);
        let wr = RecvWr {
            wr_id: 2,
            sg_list: sge.as_slice(),
        };
        // SAFETY: as in `post_send`.
        Ok(unsafe { self.qp.post_recv(&[wr]) }.map_err(|bad| bad.error)?)
    }

    fn fill(&self, is_pattern: bool) {
        let len = (self.head() + self.size) as usize;
        let bytes = match is_pattern {
            true => self.pattern(),
            false => vec![0xEE; len],
        };
        self.end.area.write(0, &bytes);
    }

    /// We ask; what comes back is looked at here, what arrives there by the other end.
    fn initiate(&mut self, control: &mut Control) -> Outcome<()> {
        use CompletionKind as Kind;
        self.fill(!matches!(self.operation, "read" | "swap" | "add"));
        let told = control.expect("go")?;
        let (remote, imm, word) = (self.peer.remote, self.round, u64::from(self.round));
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
        self.post_send(op, self.size)?;
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
        let region = &self.end.region;
        let Some(window) = &mut self.window else {
            return Ok(None);
        };
        let rkey = window.next_rkey();
        let bind = Bind {
            window: window.rkey(),
            rkey,
            region: region.lkey(),
            addr: region.address(),
            len: region.len(),
            access: Access::WRITE,
            zero_based: false,
        };
        window.set_rkey(rkey);
        self.post_send(SendOp::BindWindow(bind), 0)?;
        self.next(control, CompletionKind::BindWindow)?;
        Ok(Some(rkey))
    }

    fn serve(&mut self, control: &mut Control) -> Outcome<()> {
        let (head, word) = (self.head(), u64::from(self.round));
        self.fill(self.operation == "read");
        if self.is_atomic() {
            self.end.area.write(0, &word.to_ne_bytes());
        }
        let key = self.bind(control)?;
        if self.operation == "rnr" {
            control.say("go")?;
            std::thread::sleep(std::time::Duration::from_millis(3));
        }
        let takes = match self.operation {
            "send" | "send-imm" | "send-inv" | "rnr" => {
                Some((CompletionKind::Recv, head + self.size))
            }
            "write-imm" => Some((CompletionKind::RecvWriteImm, 0)),
            _ => None,
        };
        if let Some((_, room)) = takes {
            self.post_recv(room)?;
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
        } else if self.operation != "read" {
            self.check(head)?;
        }
        control.say("ok")
    }
}
