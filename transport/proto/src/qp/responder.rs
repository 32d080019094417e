//! The responder: requests of the peer, in PSN order, and the answers owed for them.
//!
//! Invariants: a request is executed only at the expected PSN, and executed before the expected PSN
//! moves; answers leave in the order of the requests they answer (an ACK must never overtake a READ
//! response before it, which it would declare lost); READ responses are made packet by packet as
//! the caller polls, straight from memory; whatever cannot be taken now is dropped unexecuted, for
//! the peer will repeat it.
//!
//! After a gap (or an RNR NAK) one NAK is sent and then silence kept until the expected packet
//! comes. READs and atomics are remembered, `max_dest_rd_atomic` of them, to be answered again.
//!
//! Source: Linux `rxe_resp.c`. It differs from rxe in three places: no sequence NAK follows an RNR
//! NAK, a message longer than its receive is an invalid request, and an ACK comes unasked after
//! 64 packets.

use alloc::collections::VecDeque;

use super::types::{
    Access, AccessError, Allow, AtomicOp, Completion, CompletionKind, DropReason, Fragment,
    Fragments, Key, Memory, Outcome, PostError, QpKind, RecvWr, Rkey, RtrAttr, Status, Transmit,
    WrId,
};
use super::{Link, Reports, transmit};
use crate::wire::{
    Aeth, AtomicEth, Extension, Header, Kind, MESSAGE_LEN_MAX, NakCode, Opcode, Packet, Position,
    Psn, Reth, RnrTimer, Syndrome,
};

/// Packets after which an ACK goes out that nobody asked for.
const ACK_INTERVAL: u32 = 64;
/// Deepest replay ring.
const REPLAY_MAX: usize = 128;
/// Answers besides those to READs and atomics that may wait.
const OTHER_ANSWERS_MAX: usize = 8;

/// A message of several packets, begun and not ended.
#[derive(Clone, Copy, Debug)]
enum Open {
    None,
    /// A SEND into this receive, of which so many bytes are filled.
    Send {
        wr: RecvWr,
        filled: u32,
    },
    /// A WRITE of which so many bytes are placed.
    Write {
        reth: Reth,
        placed: u32,
    },
}

/// What is remembered of a READ or atomic.
#[derive(Clone, Copy, Debug)]
enum Replay {
    Read { psn: Psn, packets: u32, reth: Reth },
    Atomic { psn: Psn, original: u64 },
}

/// A READ being answered.
#[derive(Clone, Copy, Debug)]
struct ReadAnswer {
    /// The next response packet's PSN.
    psn: Psn,
    /// What remains to be sent, in our memory.
    rkey: Rkey,
    va: u64,
    left: u32,
    /// No packet of it has been sent.
    fresh: bool,
    msn: u32,
}

/// An answer that waits to be sent.
#[derive(Clone, Copy, Debug)]
enum Answer {
    /// ACK, RNR NAK or NAK.
    Acknowledge {
        psn: Psn,
        msn: u32,
        syndrome: Syndrome,
    },
    Atomic {
        psn: Psn,
        msn: u32,
        original: u64,
    },
    Read(ReadAnswer),
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
    open: Open,
    recv: VecDeque<RecvWr>,
    recv_depth: u32,
    replay: VecDeque<Replay>,
    replay_depth: usize,
    rnr_timer: RnrTimer,
    answers: VecDeque<Answer>,
    /// Packets executed since the last ACK was put in line.
    unacknowledged: u32,
}

impl Responder {
    pub fn new(recv_depth: u32) -> Self {
        Self {
            expected: Psn::new(0),
            msn: 0,
            nak_sent: false,
            open: Open::None,
            recv: VecDeque::with_capacity(recv_depth as usize),
            recv_depth,
            replay: VecDeque::new(),
            replay_depth: 0,
            rnr_timer: RnrTimer::new(0),
            answers: VecDeque::new(),
            unacknowledged: 0,
        }
    }

    pub fn start(&mut self, attr: &RtrAttr) {
        self.expected = attr.rq_psn;
        self.rnr_timer = attr.min_rnr_timer;
        self.replay_depth = usize::from(attr.max_dest_rd_atomic).min(REPLAY_MAX);
        self.replay.reserve(self.replay_depth);
        self.answers.reserve(self.answers_max());
    }

    pub fn clear(&mut self) {
        self.recv.clear();
        self.replay.clear();
        self.answers.clear();
        self.open = Open::None;
        (self.msn, self.nak_sent, self.unacknowledged) = (0, false, 0);
    }

    pub fn receives_posted(&self) -> u32 {
        self.recv.len() as u32
    }

    pub fn has_answers(&self) -> bool {
        !self.answers.is_empty()
    }

    /// READs and atomics may each wait twice (once executed, once replayed).
    fn answers_max(&self) -> usize {
        2 * self.replay_depth + OTHER_ANSWERS_MAX
    }

    pub fn post(&mut self, wr: RecvWr, out: &Reports) -> Result<(), PostError> {
        let in_use = u32::from(matches!(self.open, Open::Send { .. }));
        if self.receives_posted() + in_use + out.recvs >= self.recv_depth {
            return Err(PostError::QueueFull);
        }
        self.recv.push_back(wr);
        Ok(())
    }

    /// Complete every receive as flushed; the one in use with `status`, if given.
    pub fn flush(&mut self, status: Option<Status>, link: &Link, out: &mut Reports) {
        if let Open::Send { wr, .. } = core::mem::replace(&mut self.open, Open::None) {
            out.complete(recv_completion(
                wr.wr_id,
                status.unwrap_or(Status::Flushed),
                link,
            ));
        }
        while let Some(wr) = self.recv.pop_front() {
            out.complete(recv_completion(wr.wr_id, Status::Flushed, link));
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
        if self.answers.len() >= self.answers_max() {
            return (Outcome::Dropped(DropReason::Busy), false);
        }
        match packet.psn().ahead_of(self.expected) {
            0 => {}
            1.. => {
                out.counters.out_of_seq_request += 1;
                if !self.nak_sent {
                    self.nak(self.expected, Syndrome::Nak(NakCode::SequenceError), out);
                }
                return (Outcome::Dropped(DropReason::OutOfSequence), false);
            }
            _ => {
                out.counters.duplicate_request += 1;
                return (self.handle_duplicate(packet, memory, link), false);
            }
        }
        let psn = self.expected;
        match self.execute(packet, memory, link, out) {
            Ok(psns) => {
                self.nak_sent = false;
                self.expected = psn.plus(psns);
                self.acknowledge_if_due(packet);
                (Outcome::Accepted, false)
            }
            Err(Refusal::Rnr) => {
                out.counters.send_rnr_err += 1;
                self.nak(psn, Syndrome::Rnr(self.rnr_timer), out);
                (Outcome::Dropped(DropReason::NoReceive), false)
            }
            Err(Refusal::Nak(code)) => {
                self.nak(psn, Syndrome::Nak(code), out);
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
            self.abandon();
        }
        self.expected = packet.psn().plus(1);
        match self.execute(packet, memory, link, out) {
            Ok(_) => Outcome::Accepted,
            Err(refusal) => {
                self.abandon();
                Outcome::Dropped(match refusal {
                    Refusal::Rnr => DropReason::NoReceive,
                    Refusal::Nak(_) => DropReason::OutOfSequence,
                    Refusal::NakRecv(..) => DropReason::Length,
                })
            }
        }
    }

    fn abandon(&mut self) {
        if let Open::Send { wr, .. } = core::mem::replace(&mut self.open, Open::None) {
            self.recv.push_front(wr);
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
        match (row.kind, packet.extension()) {
            (Kind::Send, _) => self.execute_send(packet, memory, link, out),
            (Kind::Write, _) => self.execute_write(packet, memory, link, out),
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
            // FLUSH and ATOMIC WRITE.
            _ => Err(INVALID),
        }
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
        if position.starts() {
            let wr = self.recv.pop_front().ok_or(Refusal::Rnr)?;
            self.open = Open::Send { wr, filled: 0 };
        }
        let Open::Send { wr, filled } = self.open else {
            return Err(INVALID);
        };
        let len = payload.len() as u32;
        if len > wr.local.total() - filled {
            return Err(Refusal::NakRecv(
                NakCode::InvalidRequest,
                Status::LocalLength,
            ));
        }
        let mut rest = payload;
        for fragment in wr.local.slice(filled, len).as_slice() {
            let (piece, tail) = rest.split_at(fragment.len as usize);
            memory.place(*fragment, piece).map_err(|AccessError| {
                Refusal::NakRecv(NakCode::RemoteOperational, Status::LocalProtection)
            })?;
            rest = tail;
        }
        let filled = filled + len;
        self.open = Open::Send { wr, filled };
        if !position.ends() {
            return Ok(1);
        }
        let invalidated = match packet.extension() {
            Extension::Ieth(rkey) => Some(Rkey(rkey)),
            _ => None,
        };
        if let Some(rkey) = invalidated {
            memory.invalidate(rkey).map_err(|AccessError| {
                Refusal::NakRecv(NakCode::RemoteAccess, Status::LocalProtection)
            })?;
        }
        self.open = Open::None;
        self.count_message();
        out.complete(Completion {
            byte_len: filled,
            imm: packet.imm(),
            invalidated,
            solicited: packet.solicited(),
            ..recv_completion(wr.wr_id, Status::Success, link)
        });
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
        if packet.imm().is_some() && self.recv.is_empty() {
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
            if let Some(wr) = packet.imm().and_then(|_| self.recv.pop_front()) {
                out.complete(Completion {
                    kind: CompletionKind::RecvWriteImm,
                    byte_len: reth.len,
                    imm: packet.imm(),
                    solicited: packet.solicited(),
                    ..recv_completion(wr.wr_id, Status::Success, link)
                });
            }
        }
        Ok(1)
    }

    fn execute_read(
        &mut self,
        reth: Reth,
        memory: &mut impl Memory,
        link: &Link,
    ) -> Result<u32, Refusal> {
        if !link.access.remote_read || reth.len > MESSAGE_LEN_MAX || self.replay_depth == 0 {
            return Err(INVALID);
        }
        if reth.len > 0 {
            memory.check_remote(Rkey(reth.rkey), reth.va, reth.len, Access::READ)?;
        }
        let (psn, packets) = (self.expected, link.mtu.packets(reth.len));
        self.remember(Replay::Read { psn, packets, reth });
        self.count_message();
        self.push(Answer::Read(ReadAnswer {
            psn,
            rkey: Rkey(reth.rkey),
            va: reth.va,
            left: reth.len,
            fresh: true,
            msn: self.msn,
        }));
        Ok(packets)
    }

    fn execute_atomic(
        &mut self,
        eth: AtomicEth,
        op: AtomicOp,
        memory: &mut impl Memory,
        link: &Link,
    ) -> Result<u32, Refusal> {
        if !link.access.remote_atomic || !eth.va.is_multiple_of(8) || self.replay_depth == 0 {
            return Err(INVALID);
        }
        let original = memory.atomic(Rkey(eth.rkey), eth.va, op)?;
        let psn = self.expected;
        self.remember(Replay::Atomic { psn, original });
        self.count_message();
        self.push(Answer::Atomic {
            psn,
            msn: self.msn,
            original,
        });
        Ok(1)
    }

    /// A request behind the expected PSN: answered again, never executed again (a READ is, which
    /// harms nobody).
    fn handle_duplicate(
        &mut self,
        packet: &Packet<'_>,
        memory: &mut impl Memory,
        link: &Link,
    ) -> Outcome {
        let psn = packet.psn();
        match packet.row().kind {
            Kind::Send | Kind::Write => {
                self.acknowledge(self.expected.minus(1));
                Outcome::Accepted
            }
            Kind::ReadRequest => {
                let answer = packet
                    .reth()
                    .and_then(|reth| self.replay_read(psn, reth, memory, link));
                self.replay_answer(answer.map(Answer::Read))
            }
            Kind::CompareSwap | Kind::FetchAdd => {
                let msn = self.msn;
                let answer = self.replay.iter().find_map(|replay| match *replay {
                    Replay::Atomic { psn: at, original } if at == psn => {
                        Some(Answer::Atomic { psn, msn, original })
                    }
                    _ => None,
                });
                self.replay_answer(answer)
            }
            _ => Outcome::Dropped(DropReason::Stale),
        }
    }

    /// The answer to a repeated READ request, if it lies within one that is remembered.
    fn replay_read(
        &self,
        psn: Psn,
        asked: Reth,
        memory: &impl Memory,
        link: &Link,
    ) -> Option<ReadAnswer> {
        self.replay.iter().find(|replay| match **replay {
            Replay::Read {
                psn: first,
                packets,
                reth,
            } => {
                let skip = psn.offset_from(first);
                let bytes = asked.va.wrapping_sub(reth.va);
                skip < packets
                    && bytes == u64::from(skip) * u64::from(link.mtu.bytes())
                    && bytes + u64::from(asked.len) <= u64::from(reth.len)
                    && asked.rkey == reth.rkey
            }
            Replay::Atomic { .. } => false,
        })?;
        if asked.len > 0 {
            memory
                .check_remote(Rkey(asked.rkey), asked.va, asked.len, Access::READ)
                .ok()?;
        }
        Some(ReadAnswer {
            psn,
            rkey: Rkey(asked.rkey),
            va: asked.va,
            left: asked.len,
            fresh: true,
            msn: self.msn,
        })
    }

    /// Put a repeated answer in line, unless the first one still waits there.
    fn replay_answer(&mut self, answer: Option<Answer>) -> Outcome {
        let Some(answer) = answer else {
            return Outcome::Dropped(DropReason::Stale);
        };
        let waits = self.answers.iter().any(|waiting| match (waiting, &answer) {
            (Answer::Atomic { psn, .. }, Answer::Atomic { psn: again, .. }) => psn == again,
            (Answer::Read(first), Answer::Read(again)) => {
                // `first` still has to send everything that `again` asks for.
                again.psn.ahead_of(first.psn) >= 0
                    && again
                        .va
                        .wrapping_sub(first.va)
                        .checked_add(again.left.into())
                        == Some(u64::from(first.left))
            }
            _ => false,
        });
        if !waits {
            self.push(answer);
        }
        Outcome::Accepted
    }

    fn remember(&mut self, replay: Replay) {
        if self.replay.len() >= self.replay_depth {
            self.replay.pop_front();
        }
        self.replay.push_back(replay);
    }

    fn count_message(&mut self) {
        self.msn = (self.msn + 1) & 0x00ff_ffff;
    }

    // Answers.

    fn push(&mut self, answer: Answer) {
        // Every request may add one answer and one ACK; handle_request leaves room for one, and an
        // ACK that finds none is not needed: an answer that acknowledges as much goes before it.
        if self.answers.len() < self.answers_max() {
            self.answers.push_back(answer);
        }
    }

    fn acknowledge_if_due(&mut self, packet: &Packet<'_>) {
        if packet.reth().is_some() && packet.row().kind == Kind::ReadRequest
            || matches!(packet.row().kind, Kind::CompareSwap | Kind::FetchAdd)
        {
            return; // answered by its response
        }
        self.unacknowledged += 1;
        if packet.ack_req() || self.unacknowledged >= ACK_INTERVAL {
            self.acknowledge(self.expected.minus(1));
        }
    }

    /// An ACK of everything to `psn`. Adjacent ACKs merge.
    fn acknowledge(&mut self, psn: Psn) {
        self.unacknowledged = 0;
        let ack = Answer::Acknowledge {
            psn,
            msn: self.msn,
            syndrome: Syndrome::ACK,
        };
        match self.answers.back_mut() {
            Some(
                last @ Answer::Acknowledge {
                    syndrome: Syndrome::ACK,
                    ..
                },
            ) => *last = ack,
            _ => self.push(ack),
        }
    }

    fn nak(&mut self, psn: Psn, syndrome: Syndrome, out: &mut Reports) {
        self.nak_sent = true;
        if matches!(syndrome, Syndrome::Nak(_)) {
            out.counters.send_nak += 1;
        }
        self.push(Answer::Acknowledge {
            psn,
            msn: self.msn,
            syndrome,
        });
    }

    /// The READ at the head of the line cannot be answered: its memory is gone.
    pub fn refuse_read(&mut self, out: &mut Reports) {
        let psn = match self.answers.front() {
            // The packet that failed was the one before.
            Some(Answer::Read(read)) if !read.fresh => read.psn.minus(1),
            _ => self.expected.minus(1),
        };
        self.answers.clear();
        self.nak(psn, Syndrome::Nak(NakCode::RemoteOperational), out);
    }

    pub fn poll_transmit(&mut self, allow: Allow, link: &Link) -> Option<Transmit> {
        let (opcode, psn, extension, payload) = match self.answers.front_mut()? {
            Answer::Acknowledge { psn, msn, syndrome } => {
                let aeth = Aeth {
                    syndrome: *syndrome,
                    msn: *msn,
                };
                (
                    Opcode::RcAcknowledge,
                    *psn,
                    Extension::Aeth(aeth),
                    Fragments::EMPTY,
                )
            }
            Answer::Atomic { psn, msn, original } => {
                let aeth = Aeth {
                    syndrome: Syndrome::ACK,
                    msn: *msn,
                };
                let extension = Extension::AtomicAck(aeth, *original);
                (
                    Opcode::RcAtomicAcknowledge,
                    *psn,
                    extension,
                    Fragments::EMPTY,
                )
            }
            Answer::Read(read) => {
                if allow == Allow::ControlOnly && read.left > 0 {
                    return None;
                }
                let (mut header, payload) = read.next_packet(link);
                if read.left == 0 {
                    self.answers.pop_front();
                }
                header.pkey = link.pkey;
                return Some(transmit(header, payload));
            }
        };
        self.answers.pop_front();
        let mut header = Header::new(opcode, link.dest, psn, extension);
        header.pkey = link.pkey;
        Some(transmit(header, payload))
    }
}

impl ReadAnswer {
    /// The next response packet; moves on by it.
    fn next_packet(&mut self, link: &Link) -> (Header, Fragments) {
        let len = self.left.min(link.mtu.bytes());
        let position = match (self.fresh, len == self.left) {
            (true, true) => Position::Only,
            (true, false) => Position::First,
            (false, false) => Position::Middle,
            (false, true) => Position::Last,
        };
        let aeth = Extension::Aeth(Aeth {
            syndrome: Syndrome::ACK,
            msn: self.msn,
        });
        let (opcode, extension) = match position {
            Position::Only => (Opcode::RcReadResponseOnly, aeth),
            Position::First => (Opcode::RcReadResponseFirst, aeth),
            Position::Middle => (Opcode::RcReadResponseMiddle, Extension::Bare),
            Position::Last => (Opcode::RcReadResponseLast, aeth),
        };
        let mut payload = Fragments::EMPTY;
        if len > 0 {
            payload.push(Fragment {
                key: Key::Remote(self.rkey),
                addr: self.va,
                len,
            });
        }
        let header = Header::new(opcode, link.dest, self.psn, extension);
        self.fresh = false;
        self.psn = self.psn.plus(1);
        self.va = self.va.wrapping_add(u64::from(len));
        self.left -= len;
        (header, payload)
    }
}

/// A SEND's packet must be full unless it ends the message, which must not exceed the MTU.
fn check_segment(len: usize, position: Position, link: &Link) -> Result<(), Refusal> {
    let mtu = link.mtu.bytes() as usize;
    let fits = match position {
        Position::First | Position::Middle => len == mtu,
        Position::Last | Position::Only => len <= mtu,
    };
    if fits { Ok(()) } else { Err(INVALID) }
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
