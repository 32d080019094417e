//! The responder: requests of the peer, in PSN order, and the answers owed for them.
//!
//! Invariants: a request is executed only at the expected PSN, and executed before the expected PSN
//! moves; answers leave in the order of the requests they answer (an ACK must never overtake a READ
//! response before it, which it would declare lost); READ responses are made packet by packet as
//! the caller polls, straight from memory; whatever cannot be taken now is dropped unexecuted, for
//! the peer will repeat it.
//!
//! What comes up to 127 packets ahead of a gap the caller keeps, if it can, and hands in again when its
//! turn has come. After a gap (or an RNR NAK) one NAK is sent and then silence kept until the expected
//! packet comes; peers that report gaps are told of every change instead. What is owed stands in line in `answers`, which also remembers READs and atomics.
//!
//! Source: Linux `rxe_resp.c`. It differs from rxe in four places: no sequence NAK follows an RNR
//! NAK, a message longer than its receive is an invalid request, an ACK comes unasked after
//! 64 packets and when a gap has been closed, and none has the PSN of a READ or an atomic.

mod answers;
mod one_sided;
mod segment;

use answers::Answers;
use segment::{check_segment, place_segment};

use super::lists::Receives;
use super::memory::{Access, AccessError, AtomicOp, Fragment, Key, Memory, Rkey};
use super::types::{Allow, DropReason, Outcome, QpEvent, QpKind, RtrAttr, Transmit};
use super::work::{Completion, CompletionKind, PostError, RecvWr, Status, WrId};
use super::{Link, Reports};
use crate::wire::{
    Extension, Kind, MESSAGE_LEN_MAX, NakCode, Packet, Psn, Reth, RnrTimer, Syndrome,
};

/// Packets after which an ACK goes out that nobody asked for.
const ACK_INTERVAL: u32 = 64;

/// A message of several packets, begun and not ended.
#[derive(Clone, Copy, Debug)]
enum Open {
    None,
    /// A SEND into the receive at the front, of which so many bytes are filled.
    Send {
        filled: u32,
    },
    /// A WRITE of which so many bytes are placed.
    Write {
        reth: Reth,
        placed: u32,
    },
}

/// Why a request at the expected PSN was not executed.
#[derive(Clone, Copy, Debug)]
enum Refusal {
    /// No receive is posted.
    Rnr,
    /// The peer broke a rule; the queue pair fails.
    Nak(NakCode),
    /// The same, and the receive in use fails with a status of its own.
    NakRecv(NakCode, Status),
}

impl From<AccessError> for Refusal {
    fn from(AccessError: AccessError) -> Self {
        Self::Nak(NakCode::RemoteAccess)
    }
}

const INVALID: Refusal = Refusal::Nak(NakCode::InvalidRequest);

#[derive(Debug)]
pub(super) struct Responder {
    expected: Psn,
    msn: u32,
    /// A NAK says what is expected; nothing more is said until it comes.
    nak_sent: bool,
    /// That was an RNR NAK.
    is_rnr: bool,
    /// Bit `n`: the caller keeps packet `expected + n`. As many as the window has.
    kept: u128,
    open: Open,
    /// One that is being filled stays at the front. With a shared receive queue: at most one, taken
    /// from there.
    recv: Receives,
    recv_depth: u32,
    /// Receives come from a shared receive queue.
    is_shared: bool,
    rnr_timer: RnrTimer,
    answers: Answers,
    /// Packets executed since the last ACK was put in line.
    unacknowledged: u32,
    /// The latest packet executed that an ACK is the answer to, and the MSN with it.
    plain: (Psn, u32),
}

impl Responder {
    /// `recv_depth` is 0 with a shared receive queue.
    pub fn new(recv_depth: u32, is_shared: bool) -> Self {
        Self {
            expected: Psn::new(0),
            msn: 0,
            nak_sent: false,
            is_rnr: false,
            kept: 0,
            open: Open::None,
            recv: Receives::new(recv_depth),
            recv_depth,
            is_shared,
            rnr_timer: RnrTimer::new(0),
            answers: Answers::new(),
            unacknowledged: 0,
            plain: (Psn::new(0), 0),
        }
    }

    pub fn start(&mut self, attr: &RtrAttr) {
        self.expected = attr.rq_psn;
        self.plain = (attr.rq_psn.minus(1), 0);
        self.rnr_timer = attr.min_rnr_timer;
        self.answers.start(attr.max_dest_rd_atomic);
    }

    pub fn clear(&mut self) {
        self.recv.clear();
        self.answers.clear();
        self.open = Open::None;
        (self.msn, self.nak_sent, self.unacknowledged) = (0, false, 0);
        (self.is_rnr, self.kept) = (false, 0);
    }

    pub fn set_rnr_timer(&mut self, timer: RnrTimer) {
        self.rnr_timer = timer;
    }

    /// Other numbers of READs and atomics to be remembered from now on.
    pub fn set_replay_depth(&mut self, depth: u8) {
        self.answers.start(depth);
    }

    pub fn is_shared(&self) -> bool {
        self.is_shared
    }

    pub fn expected(&self) -> Psn {
        self.expected
    }

    #[inline]
    pub fn receives_posted(&self) -> u32 {
        let in_use = usize::from(matches!(self.open, Open::Send { .. }));
        (self.recv.len() - in_use) as u32
    }

    #[inline]
    pub fn has_answers(&self) -> bool {
        !self.answers.is_empty()
    }

    #[inline]
    pub fn owes_one_ack(&self) -> bool {
        self.answers.is_one_ack()
    }

    #[inline]
    pub fn post(&mut self, wr: RecvWr, out: &Reports) -> Result<(), PostError> {
        if self.is_shared {
            return Err(PostError::Invalid);
        }
        if self.recv.len() as u32 + out.recvs >= self.recv_depth {
            return Err(PostError::QueueFull);
        }
        self.recv.push_back(wr);
        Ok(())
    }

    /// Complete every receive as flushed; the one in use with `status`, if given.
    pub fn flush(&mut self, status: Option<Status>, link: &Link, out: &mut Reports) {
        let mut of_first = match core::mem::replace(&mut self.open, Open::None) {
            Open::Send { .. } => status,
            _ => None,
        };
        while let Some(wr_id) = self.recv.pop_front() {
            let status = of_first.take().unwrap_or(Status::Flushed);
            out.complete(recv_completion(wr_id, status, link));
        }
    }

    /// The caller keeps the packet with this PSN, which is ahead of a gap.
    pub fn note_kept(&mut self, psn: Psn, link: &Link, out: &mut Reports) {
        let ahead = psn.offset_from(self.expected);
        self.kept |= 1u128.checked_shl(ahead).unwrap_or(0);
        self.complain(link, out);
    }

    /// Whether the caller keeps any.
    #[inline]
    pub fn has_kept(&self) -> bool {
        self.kept != 0
    }

    pub fn wants_kept(&self) -> Option<Psn> {
        (self.kept & 1 != 0 && !self.answers.is_full()).then_some(self.expected)
    }

    pub fn forget_kept(&mut self, link: &Link, out: &mut Reports) {
        self.kept &= !1;
        if link.reports_gaps {
            self.complain(link, out);
        } else {
            // It has been asked for the gap before this one. Its next packet asks for this one.
            self.nak_sent = false;
        }
    }

    // Requests.

    /// Returns what became of the packet, and whether the queue pair must go to ERR.
    pub fn handle_request(
        &mut self,
        packet: &Packet<'_>,
        memory: &mut impl Memory,
        link: &Link,
        out: &mut Reports,
    ) -> (Outcome, bool) {
        if link.kind == QpKind::Uc {
            return (self.handle_unreliable(packet, memory, link, out), false);
        }
        if self.answers.is_full() {
            return (Outcome::Dropped(DropReason::Busy), false);
        }
        match packet.psn().ahead_of(self.expected) {
            0 => {}
            ahead @ 1.. => {
                out.counters.out_of_seq_request += 1;
                self.complain(link, out);
                let fits = packet.payload().len() <= link.mtu.bytes() as usize && !self.is_rnr;
                let outcome = match 1u128.checked_shl(ahead.cast_unsigned()) {
                    Some(bit) if fits && self.kept & bit == 0 => Outcome::Ahead,
                    _ => Outcome::Dropped(DropReason::OutOfSequence),
                };
                return (outcome, false);
            }
            _ => {
                out.counters.duplicate_request += 1;
                return (self.handle_duplicate(packet, memory, link, out), false);
            }
        }
        let psn = self.expected;
        self.kept &= !1;
        match self.execute(packet, memory, link, out) {
            Ok(psns) => {
                let had_gap = core::mem::take(&mut self.nak_sent) && !self.is_rnr;
                self.is_rnr = false;
                self.expected = psn.plus(psns);
                self.kept = self.kept.checked_shr(psns).unwrap_or(0);
                if !has_own_answer(packet) {
                    self.plain = (psn, self.msn);
                }
                match self.kept {
                    0 if had_gap => self.acknowledge(link),
                    0 => self.acknowledge_if_due(packet, link),
                    // It is the caller's turn.
                    kept if kept & 1 != 0 => self.nak_sent = had_gap,
                    _ if link.reports_gaps => self.complain(link, out),
                    // What is sent again from the last gap on will fill the next one, too.
                    _ => self.acknowledge_if_due(packet, link),
                }
                (Outcome::Accepted, false)
            }
            Err(Refusal::Rnr) => {
                out.counters.send_rnr_err += 1;
                self.is_rnr = true;
                self.nak(psn, Syndrome::Rnr(self.rnr_timer), out);
                (Outcome::Dropped(DropReason::NoReceive), false)
            }
            Err(Refusal::Nak(code)) => {
                self.nak(psn, Syndrome::Nak(code), out);
                out.raise(match code {
                    NakCode::RemoteAccess => QpEvent::AccessError,
                    _ => QpEvent::RequestError,
                });
                (Outcome::Accepted, true)
            }
            Err(Refusal::NakRecv(code, status)) => {
                self.nak(psn, Syndrome::Nak(code), out);
                self.flush(Some(status), link, out);
                (Outcome::Accepted, true)
            }
        }
    }

    /// UC: no answers. A gap or an error ends the open message without a trace; its receive is used
    /// for the next one.
    fn handle_unreliable(
        &mut self,
        packet: &Packet<'_>,
        memory: &mut impl Memory,
        link: &Link,
        out: &mut Reports,
    ) -> Outcome {
        if packet.psn() != self.expected || packet.row().position.starts() {
            self.open = Open::None;
        }
        self.expected = packet.psn().plus(1);
        match self.execute(packet, memory, link, out) {
            Ok(_) => Outcome::Accepted,
            Err(refusal) => {
                self.open = Open::None;
                Outcome::Dropped(match refusal {
                    Refusal::Rnr => DropReason::NoReceive,
                    Refusal::Nak(_) => DropReason::OutOfSequence,
                    Refusal::NakRecv(..) => DropReason::Length,
                })
            }
        }
    }

    /// Execute the request and return how many PSNs it stands for.
    fn execute(
        &mut self,
        packet: &Packet<'_>,
        memory: &mut impl Memory,
        link: &Link,
        out: &mut Reports,
    ) -> Result<u32, Refusal> {
        let row = packet.row();
        let in_sequence = match row.kind {
            Kind::Send | Kind::Write if !row.position.starts() => match self.open {
                Open::None => false,
                Open::Send { .. } => row.kind == Kind::Send,
                Open::Write { .. } => row.kind == Kind::Write,
            },
            _ => matches!(self.open, Open::None),
        };
        if !in_sequence {
            return Err(INVALID);
        }
        match row.kind {
            Kind::Send => self.execute_send(packet, memory, link, out),
            Kind::Write => self.execute_write(packet, memory, link, out),
            kind => self.execute_answered(kind, packet, memory, link),
        }
    }

    /// The same of what its own response answers.
    fn execute_answered(
        &mut self,
        kind: Kind,
        packet: &Packet<'_>,
        memory: &mut impl Memory,
        link: &Link,
    ) -> Result<u32, Refusal> {
        match (kind, packet.extension()) {
            (Kind::ReadRequest, Extension::Reth(reth)) => self.execute_read(reth, memory, link),
            (Kind::CompareSwap, Extension::Atomic(eth)) => {
                let op = AtomicOp::CompareSwap {
                    compare: eth.compare,
                    swap: eth.swap_add,
                };
                self.execute_atomic(eth, op, memory, link)
            }
            (Kind::FetchAdd, Extension::Atomic(eth)) => {
                let op = AtomicOp::FetchAdd { add: eth.swap_add };
                self.execute_atomic(eth, op, memory, link)
            }
            (Kind::AtomicWrite, Extension::Reth(reth)) => {
                self.execute_atomic_write(reth, packet.payload(), memory, link)
            }
            (Kind::Flush, Extension::FethReth(feth, reth)) => {
                self.execute_flush(feth, reth, memory, link)
            }
            _ => Err(INVALID),
        }
    }

    /// Have a receive at the front of `recv`, if there is any.
    #[inline]
    fn fetch_receive(&mut self, memory: &mut impl Memory) -> bool {
        if self.recv.is_empty()
            && self.is_shared
            && let Some(wr) = memory.shared_receive()
        {
            self.recv.push_back(wr);
        }
        !self.recv.is_empty()
    }

    fn execute_send(
        &mut self,
        packet: &Packet<'_>,
        memory: &mut impl Memory,
        link: &Link,
        out: &mut Reports,
    ) -> Result<u32, Refusal> {
        let (payload, position) = (packet.payload(), packet.row().position);
        check_segment(payload.len(), position, link)?;
        let filled = match (position.starts(), self.open) {
            (true, _) if self.fetch_receive(memory) => 0,
            (true, _) => return Err(Refusal::Rnr),
            (false, Open::Send { filled }) => filled,
            (false, _) => return Err(INVALID),
        };
        let placed = place_segment(&self.recv, filled, payload, memory);
        let filled = filled + payload.len() as u32;
        let (imm, invalidated) = (packet.imm(), packet.ieth().map(Rkey));
        let done = placed.and_then(|()| match invalidated {
            Some(rkey) => memory.invalidate(rkey).map_err(|AccessError| {
                Refusal::NakRecv(NakCode::RemoteAccess, Status::LocalProtection)
            }),
            None => Ok(()),
        });
        if done.is_err() || !position.ends() {
            // In use, still or to be failed.
            self.open = Open::Send { filled };
            return done.map(|()| 1);
        }
        self.open = Open::None;
        self.count_message();
        if let Some(wr_id) = self.recv.pop_front() {
            out.complete(Completion {
                byte_len: filled,
                imm,
                invalidated,
                solicited: packet.solicited(),
                ..recv_completion(wr_id, Status::Success, link)
            });
        }
        Ok(1)
    }

    fn execute_write(
        &mut self,
        packet: &Packet<'_>,
        memory: &mut impl Memory,
        link: &Link,
        out: &mut Reports,
    ) -> Result<u32, Refusal> {
        let (payload, position) = (packet.payload(), packet.row().position);
        if packet.imm().is_some() && !self.fetch_receive(memory) {
            return Err(Refusal::Rnr);
        }
        if let Some(reth) = packet.reth() {
            if !link.access.remote_write || reth.len > MESSAGE_LEN_MAX {
                return Err(INVALID);
            }
            if reth.len > 0 {
                memory.check_remote(Rkey(reth.rkey), reth.va, reth.len, Access::WRITE)?;
            }
            self.open = Open::Write { reth, placed: 0 };
        }
        let Open::Write { reth, placed } = self.open else {
            return Err(INVALID);
        };
        let left = reth.len - placed;
        let len = left.min(link.mtu.bytes());
        if payload.len() != len as usize || (left == len) != position.ends() {
            return Err(INVALID);
        }
        if len > 0 {
            let target = Fragment {
                key: Key::Remote(Rkey(reth.rkey)),
                addr: reth.va.wrapping_add(u64::from(placed)),
                len,
            };
            memory.place(target, payload)?;
        }
        self.open = Open::Write {
            reth,
            placed: placed + len,
        };
        if position.ends() {
            self.open = Open::None;
            self.count_message();
            if let Some(wr_id) = packet.imm().and_then(|_| self.recv.pop_front()) {
                out.complete(Completion {
                    kind: CompletionKind::RecvWriteImm,
                    byte_len: reth.len,
                    imm: packet.imm(),
                    solicited: packet.solicited(),
                    ..recv_completion(wr_id, Status::Success, link)
                });
            }
        }
        Ok(1)
    }

    /// A request behind the expected PSN: answered again, never executed again (a READ is, which
    /// harms nobody).
    fn handle_duplicate(
        &mut self,
        packet: &Packet<'_>,
        memory: &mut impl Memory,
        link: &Link,
        out: &mut Reports,
    ) -> Outcome {
        let psn = packet.psn();
        let is_known = match (packet.row().kind, packet.extension()) {
            (Kind::Send | Kind::Write, _) => {
                match self.nak_sent && link.reports_gaps {
                    true => self.complain(link, out),
                    false => self.acknowledge(link),
                }
                true
            }
            (Kind::ReadRequest, Extension::Reth(reth)) => {
                self.answers.repeat_read(psn, reth, self.msn, memory, link)
            }
            (Kind::CompareSwap | Kind::FetchAdd, _) => self.answers.repeat_atomic(psn, self.msn),
            (Kind::AtomicWrite | Kind::Flush, _) => self.answers.repeat_done(psn, self.msn),
            _ => false,
        };
        if is_known {
            Outcome::Accepted
        } else {
            Outcome::Dropped(DropReason::Stale)
        }
    }

    fn count_message(&mut self) {
        self.msn = (self.msn + 1) & 0x00ff_ffff;
    }

    #[inline]
    fn acknowledge_if_due(&mut self, packet: &Packet<'_>, link: &Link) {
        if has_own_answer(packet) {
            return;
        }
        self.unacknowledged += 1;
        if packet.ack_req() || self.unacknowledged >= ACK_INTERVAL {
            self.acknowledge(link);
        }
    }

    /// An ACK of everything executed; but to peers that are not of our kind never with the PSN of what has
    /// an answer of its own. rxe takes such an ACK for that answer, if it comes before it or alone,
    /// and completes a READ whose bytes never came (`check_psn` and `check_ack` in its
    /// `rxe_comp.c`). Our kind learns from it what it has missed.
    #[inline]
    fn acknowledge(&mut self, link: &Link) {
        self.unacknowledged = 0;
        let (psn, msn) = match self.plain {
            // The PSNs have not gone half around since.
            plain if !link.reports_gaps && plain.0.ahead_of(self.expected) < 0 => plain,
            _ => (self.expected.minus(1), self.msn),
        };
        self.answers.acknowledge(psn, msn);
    }

    /// There is a gap at the expected packet: tell, unless it has been told.
    fn complain(&mut self, link: &Link, out: &mut Reports) {
        if link.reports_gaps && !self.is_rnr {
            self.nak_sent = true;
            self.unacknowledged = 0;
            let nearest = (self.kept >> 1) as u64;
            if self.answers.report(self.expected, self.msn, nearest) {
                out.counters.send_nak += 1;
            }
        } else if !self.nak_sent {
            self.nak(self.expected, Syndrome::Nak(NakCode::SequenceError), out);
        }
    }

    fn nak(&mut self, psn: Psn, syndrome: Syndrome, out: &mut Reports) {
        self.nak_sent = true;
        if matches!(syndrome, Syndrome::Nak(_)) {
            out.counters.send_nak += 1;
        }
        self.answers.nak(psn, self.msn, syndrome);
    }

    /// The memory of the READ response with this PSN is gone: nothing after it can be answered.
    pub fn refuse_read(&mut self, psn: Psn, out: &mut Reports) {
        self.answers.clear();
        self.nak(psn, Syndrome::Nak(NakCode::RemoteOperational), out);
    }

    /// The memory of a READ response to a repeated request is gone.
    pub fn forget_repeated(&mut self, psn: Psn) {
        self.answers.forget_repeated(psn);
    }

    /// Writes the next answer, if there is one and `allow` admits it.
    #[inline]
    pub fn poll_transmit(&mut self, allow: Allow, link: &Link, into: &mut Transmit) -> bool {
        self.answers.poll_transmit(allow, link, into)
    }
}

/// Whether the packet's request is answered by more than an ACK.
#[inline]
fn has_own_answer(packet: &Packet<'_>) -> bool {
    matches!(
        packet.row().kind,
        Kind::ReadRequest | Kind::CompareSwap | Kind::FetchAdd | Kind::AtomicWrite | Kind::Flush
    )
}

fn recv_completion(wr_id: WrId, status: Status, link: &Link) -> Completion {
    Completion {
        wr_id,
        status,
        kind: CompletionKind::Recv,
        byte_len: 0,
        imm: None,
        invalidated: None,
        solicited: false,
        source: link.dest,
    }
}
