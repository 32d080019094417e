//! The requester: the send queue, from posting to acknowledgement.
//!
//! Packets are counted by 64-bit sequence numbers that never wrap; a PSN is the first PSN plus the
//! low bits. A READ's sequence numbers are those of its response packets. Any packet can be built
//! from its sequence number alone, so retransmission is only a change of `next`.
//!
//! Invariants: `una <= next <= high <= end` but for `next`, which falls back to `una` when a loss
//! is noticed; the work request at the queue's front contains `una`, unless it is one to be done at
//! this end that waits for its turn; `cursor` indexes the one that contains `next`, or such a one.
//!
//! What is done at this end (an invalidation, the binding of a window) has no packet and no sequence
//! number. It is done when `cursor` comes to it, so before anything posted after it is sent, and it
//! completes in its place.
//!
//! Loss is noticed by a sequence NAK, by an answer beyond a READ or atomic that has none (both go
//! back once per `una`), by an ACK of just the probe, or by the ACK timeout. Peers that report gaps
//! (see the module `qp`) get only what was lost again (`repeat` and `board`), and are asked only for
//! the answers that were lost (`answers` and `gaps`).
//!
//! Source: Linux `rxe_req.c`, `rxe_comp.c`; the probe is ours, modelled on RFC 8985's.

mod answers;
mod board;
mod failure;
mod gaps;
mod local;
mod repeat;
mod segment;
mod timeout;

use alloc::boxed::Box;
use alloc::collections::VecDeque;

use board::Board;
pub(super) use failure::Failure;
use gaps::Gaps;
use segment::Wqe;

use super::lists::Lists;
use super::memory::Memory;
use super::timers::{RoundTrip, Timer, TimerTable};
use super::types::{Allow, DropReason, Outcome, QpKind, RtsAttr, Transmit};
use super::work::{CompletionKind, PostError, SendOp, SendWr, Status};
use super::{Link, Reports};
use crate::time::Nanos;
use crate::wire::{Extension, Kind, NakCode, Packet, Psn, Syndrome};

/// Unacknowledged packets beyond which no new request starts, as in Linux rxe.
pub const WINDOW: u32 = 128;
/// Packets after which an ACK is asked for in the middle of a message.
const ACK_REQ_INTERVAL: u32 = 32;
/// The same after a loss: where packets get lost, those that ask do too.
const ACK_REQ_INTERVAL_LOSSY: u32 = 8;
/// Packets after a loss that count as after a loss.
const LOSSY: u64 = 1024;
/// Retry counts of this value are never decremented.
const RETRY_FOREVER: u8 = 7;

#[derive(Debug)]
pub(super) struct Requester {
    queue: VecDeque<Wqe>,
    /// The elements of their lists.
    lists: Lists,
    depth: u32,
    attr: RtsAttr,
    /// Oldest packet not acknowledged.
    una: u64,
    /// Next packet to send.
    next: u64,
    /// One beyond the last packet ever sent.
    high: u64,
    /// One beyond the last packet posted.
    end: u64,
    /// Index in `queue` of the work request that contains `next`.
    cursor: usize,
    /// READ requests and atomics between `una` and `next`.
    reads_out: u32,
    /// Packets sent since the last one with AckReq.
    since_ack_req: u32,
    /// The `una` at which an answer last made us go back; not twice for the same.
    went_back_at: Option<u64>,
    retries_left: u8,
    rnr_left: u8,
    /// A timeout that was noticed late has spent no retry; the next one does.
    is_excused: bool,
    probe_due: bool,
    /// The packet that the last probe repeated, and when, until something is acknowledged or sent again.
    probed: Option<(u64, Nanos)>,
    round_trip: RoundTrip,
    /// A packet being timed, and when it went.
    timed: Option<(u64, Nanos)>,
    /// Draining: no request starts here or beyond.
    drain_at: Option<u64>,
    /// After a loss, at a peer that reports gaps: what it has. Made at the first loss.
    board: Option<Box<Board>>,
    /// The board says what is true.
    is_tracking: bool,
    /// At such a peer, after an answer to a READ or atomic was lost: which are missing. Made at the
    /// first loss.
    gaps: Option<Box<Gaps>>,
    /// They say what is true.
    has_gaps: bool,
    /// Packets before this one follow a loss.
    lossy_until: u64,
}

impl Requester {
    pub fn new(depth: u32) -> Self {
        Self {
            queue: VecDeque::with_capacity(depth as usize),
            lists: Lists::default(),
            depth,
            attr: RtsAttr {
                sq_psn: Psn::new(0),
                timeout: 0,
                retry_cnt: RETRY_FOREVER,
                rnr_retry: RETRY_FOREVER,
                max_rd_atomic: 0,
                read_chunk_packets: 0,
            },
            una: 0,
            next: 0,
            high: 0,
            end: 0,
            cursor: 0,
            reads_out: 0,
            since_ack_req: 0,
            went_back_at: None,
            retries_left: 0,
            rnr_left: 0,
            is_excused: false,
            probe_due: false,
            probed: None,
            round_trip: RoundTrip::new(),
            timed: None,
            drain_at: None,
            board: None,
            is_tracking: false,
            gaps: None,
            has_gaps: false,
            lossy_until: 0,
        }
    }

    pub fn start(&mut self, attr: RtsAttr) {
        self.clear();
        self.retries_left = attr.retry_cnt;
        self.rnr_left = attr.rnr_retry;
        self.attr = attr;
    }

    pub fn clear(&mut self) {
        let mut queue = core::mem::take(&mut self.queue);
        queue.clear();
        let mut lists = core::mem::take(&mut self.lists);
        lists.clear();
        *self = Self {
            queue,
            lists,
            board: self.board.take(),
            gaps: self.gaps.take(),
            depth: self.depth,
            attr: self.attr,
            ..Self::new(0)
        };
    }

    #[inline]
    pub fn posted(&self) -> u32 {
        self.queue.len() as u32
    }

    #[inline]
    pub fn in_flight(&self) -> u32 {
        if !self.is_tracking && !self.has_gaps {
            return self.span();
        }
        let requests = self.board().map_or(0, Board::absent);
        let answers = self.gaps().map_or(0, |gaps| gaps.absent(self.una));
        self.span().saturating_sub(requests + answers)
    }

    /// Packets between the oldest that is not acknowledged and the next new one.
    #[inline]
    fn span(&self) -> u32 {
        // Bounded by the window and one READ of 2^23 packets.
        self.next.saturating_sub(self.una) as u32
    }

    #[inline]
    pub fn can_send(&self, timers: &TimerTable) -> bool {
        self.probe_due
            || self.has_lost()
            || self.has_missing()
            || (self.next < self.end
                && self.span() < WINDOW
                && !timers.is_set(Timer::RnrWait)
                && !self.is_held_back())
    }

    /// Whether exactly one packet can be sent.
    #[inline]
    pub fn has_one_packet(&self, timers: &TimerTable) -> bool {
        self.next + 1 == self.end
            && !self.probe_due
            && !self.has_lost()
            && !self.has_missing()
            && self.can_send(timers)
            && self
                .queue
                .get(self.cursor)
                .is_some_and(|wqe| !wqe.is_waiting())
    }

    /// Whether nothing is to be sent, or done at this end, until something is posted, comes or falls
    /// due.
    #[inline]
    pub fn is_idle(&self) -> bool {
        self.cursor == self.queue.len() && !self.probe_due && !self.is_tracking && !self.has_gaps
    }

    /// The PSN of the next new packet.
    pub fn next_psn(&self) -> Psn {
        self.psn(self.high)
    }

    /// Other timeouts and limits from now on; the first PSN stays.
    pub fn retune(&mut self, attr: RtsAttr) {
        let sq_psn = self.attr.sq_psn;
        self.attr = RtsAttr { sq_psn, ..attr };
        self.retries_left = attr.retry_cnt;
        self.rnr_left = attr.rnr_retry;
    }

    /// Start no request that has not begun.
    pub fn drain(&mut self) {
        let begun = self.queue.iter().rfind(|wqe| wqe.first < self.high);
        self.drain_at = Some(begun.map_or(self.una, Wqe::end));
    }

    /// Start again.
    pub fn resume(&mut self) {
        self.drain_at = None;
    }

    /// Whether all that had begun when draining started is finished.
    pub fn is_drained(&self) -> bool {
        self.drain_at.is_some_and(|end| self.una >= end)
    }

    #[inline]
    pub fn post(&mut self, wr: SendWr, link: &Link, out: &Reports) -> Result<(), PostError> {
        if !wr.suits(link.kind) {
            return Err(PostError::Invalid);
        }
        let packets = match wr.op {
            SendOp::CompareSwap { .. }
            | SendOp::FetchAdd { .. }
            | SendOp::AtomicWrite(_)
            | SendOp::Flush(_) => 1,
            SendOp::LocalInvalidate(_) | SendOp::BindWindow(_) => 0,
            _ => link.mtu.packets(wr.local.total()),
        };
        if self.queue.len() as u32 + out.sends >= self.depth {
            return Err(PostError::QueueFull);
        }
        self.queue.push_back(Wqe {
            wr_id: wr.wr_id,
            op: wr.op,
            local: self.lists.push_back(&wr.local),
            signalled: wr.signalled,
            solicited: wr.solicited,
            fence: wr.fence,
            first: self.end,
            packets,
            is_done: false,
        });
        self.end += u64::from(packets);
        Ok(())
    }

    // Sending.

    #[inline]
    pub fn poll_transmit(
        &mut self,
        now: Nanos,
        allow: Allow,
        link: &Link,
        out: &mut Reports,
        timers: &mut TimerTable,
        into: &mut Transmit,
    ) -> bool {
        if link.kind == QpKind::Uc {
            // What was polled before has been sent, and nobody will acknowledge it.
            self.acknowledge(self.next, link, out);
        }
        if core::mem::take(&mut self.probe_due) && self.una < self.next {
            return put(self.probe(now, link, out), into);
        }
        if allow != Allow::All {
            return false;
        }
        if self.has_missing()
            && let Some(transmit) = self.ask_again(link, out)
        {
            *into = transmit;
            return true;
        }
        if self.has_lost() {
            return put(self.repeat_lost(link, out), into);
        }
        let Some(wqe) = self.queue.get(self.cursor) else {
            return false;
        };
        if self.span() >= WINDOW
            || timers.is_set(Timer::RnrWait)
            || wqe.is_waiting()
            || self.holds_back(wqe)
        {
            return false;
        }
        let (end, wants_response) = (wqe.end(), wqe.wants_response());
        let ack_req = self.next + 1 == end
            || self.since_ack_req + 1 >= self.ack_req_interval()
            || self.span() + 1 >= WINDOW
            || wants_response;
        let seq = self.next;
        let psns = self.build_into(wqe, (seq, u64::MAX), ack_req, link, into);
        self.since_ack_req = if ack_req { 0 } else { self.since_ack_req + 1 };
        self.reads_out += u32::from(wants_response);
        if self.next < self.high {
            into.is_retransmission = true;
            out.counters.retransmitted_pkts += 1;
        } else if ack_req && self.timed.is_none() {
            self.timed = Some((self.next, now));
        }
        if self.is_tracking
            && let Some(board) = self.board_mut()
        {
            board.note_sent(seq);
        }
        self.next += u64::from(psns);
        self.high = self.high.max(self.next);
        if self.next == end {
            self.cursor += 1;
            self.skip_done();
        }
        if link.kind == QpKind::Rc {
            self.arm(now, timers);
        }
        true
    }

    /// Whether the request at the cursor must wait for READs or atomics before it, or may not start.
    #[inline]
    fn is_held_back(&self) -> bool {
        let at_cursor = self.queue.get(self.cursor);
        at_cursor.is_some_and(|wqe| self.holds_back(wqe))
    }

    /// The same of that request.
    #[inline]
    fn holds_back(&self, wqe: &Wqe) -> bool {
        self.drain_at.is_some_and(|end| wqe.first >= end)
            || (wqe.wants_response() && self.reads_out >= u32::from(self.attr.max_rd_atomic.max(1)))
            || (wqe.fence && self.next == wqe.first && self.reads_out > 0)
    }

    /// The packet of sequence number `seq`, and how many it stands for. A READ asks for what lies before
    /// `end`, as far as its chunk reaches.
    fn build(&self, wqe: &Wqe, seq: u64, end: u64, ack_req: bool, link: &Link) -> (Transmit, u32) {
        let mut transmit = Transmit::EMPTY;
        let psns = self.build_into(wqe, (seq, end), ack_req, link, &mut transmit);
        (transmit, psns)
    }

    /// The same, written over another.
    #[inline]
    fn build_into(
        &self,
        wqe: &Wqe,
        (seq, end): (u64, u64),
        ack_req: bool,
        link: &Link,
        into: &mut Transmit,
    ) -> u32 {
        let answers = match wqe.op {
            SendOp::Read(_) => {
                let index = (seq - wqe.first) as u32;
                let chunk = wqe.read_packets(index, self.attr.read_chunk_packets);
                u64::from(chunk).min(end - seq) as u32
            }
            _ => 1,
        };
        let psn = self.psn(seq);
        wqe.packet(seq, psn, ack_req, answers, (link, &self.lists), into);
        answers
    }

    #[inline]
    fn psn(&self, seq: u64) -> Psn {
        self.attr.sq_psn.plus((seq & u64::from(Psn::MASK)) as u32)
    }

    /// Start the timers that are not running, if anything is unacknowledged.
    #[inline]
    fn arm(&mut self, now: Nanos, timers: &mut TimerTable) {
        if self.una >= self.next {
            return;
        }
        if self.attr.timeout != 0 && !timers.is_set(Timer::AckTimeout) {
            timers.set(
                Timer::AckTimeout,
                now + Nanos::from_ib_exponent(self.attr.timeout),
            );
        }
        if !timers.is_set(Timer::Probe) {
            timers.set(Timer::Probe, now + self.probe_after());
        }
    }

    // Answers.

    pub fn handle_response(
        &mut self,
        now: Nanos,
        packet: &Packet<'_>,
        memory: &mut impl Memory,
        link: &Link,
        out: &mut Reports,
        timers: &mut TimerTable,
    ) -> (Outcome, Option<Failure>) {
        const STALE: Outcome = Outcome::Dropped(DropReason::Stale);
        let offset = packet.psn().offset_from(self.psn(self.una));
        let seq = self.una + u64::from(offset);
        if seq >= self.high {
            self.note_stale(packet);
            return (STALE, None);
        }
        let (una, probed) = (self.una, self.probed);
        let mut is_repaired = false;
        let result = match packet.aeth() {
            // Most answers.
            Some(aeth) if packet.row().kind == Kind::Acknowledge => {
                self.handle_acknowledge(now, seq, aeth.syndrome, link, out, timers)
            }
            _ => match packet.extension() {
                Extension::AtomicAck(aeth, original)
                    if matches!(aeth.syndrome, Syndrome::Ack { .. }) =>
                {
                    self.handle_answer(seq, &original.to_ne_bytes(), true, memory, link, out)
                }
                Extension::AtomicAck(aeth, map) if is_report(aeth.syndrome, link) => {
                    self.acknowledge(seq, link, out);
                    out.counters.rcvd_seq_err += 1;
                    is_repaired = self.handle_report(now, seq, map)
                        && (self.una >= seq || self.miss(seq, link));
                    Ok(Outcome::Accepted)
                }
                Extension::AtomicAck(..) => Ok(Outcome::Dropped(DropReason::Unsupported)),
                Extension::Aeth(aeth) => match (packet.row().kind, aeth.syndrome) {
                    (Kind::ReadResponse, Syndrome::Ack { .. }) => {
                        self.handle_answer(seq, packet.payload(), false, memory, link, out)
                    }
                    _ => Ok(Outcome::Dropped(DropReason::Unsupported)),
                },
                _ => self.handle_answer(seq, packet.payload(), false, memory, link, out),
            },
        };
        if matches!(result, Ok(Outcome::Accepted))
            && self.una <= seq
            && !is_repaired
            && !timers.is_set(Timer::RnrWait)
        {
            // It speaks of a packet beyond one that is not answered: that one was lost.
            let syndrome = packet.aeth().map(|aeth| aeth.syndrome);
            let is_ack = matches!(syndrome, Some(Syndrome::Ack { .. }));
            if !self.miss(seq + u64::from(is_ack), link) {
                self.go_back_once(out, timers);
            }
        }
        if self.has_gaps {
            self.time_early(now, seq);
            self.pass_gaps(link, out);
        }
        if self.una > una {
            self.progress(now, probed.map(|(_, sent)| now.since(sent)), timers);
        }
        match result {
            Ok(outcome) => (outcome, None),
            Err(failure) => (Outcome::Accepted, Some(failure)),
        }
    }

    /// An ACK, NAK or RNR NAK of packet `seq`.
    #[inline]
    fn handle_acknowledge(
        &mut self,
        now: Nanos,
        seq: u64,
        syndrome: Syndrome,
        link: &Link,
        out: &mut Reports,
        timers: &mut TimerTable,
    ) -> Result<Outcome, Failure> {
        let status = match syndrome {
            Syndrome::Ack { .. } => {
                self.acknowledge(seq + 1, link, out);
                if self.is_tracking {
                    self.note_executed(seq + 1);
                }
                if self
                    .probed
                    .is_some_and(|(probed, _)| self.una == probed + 1)
                    && self.board().is_none()
                {
                    // The responder had nothing beyond the probe: the rest was lost.
                    self.go_back_once(out, timers);
                }
                return Ok(Outcome::Accepted);
            }
            Syndrome::Unknown(_) => return Ok(Outcome::Dropped(DropReason::Unsupported)),
            Syndrome::Rnr(timer) => {
                self.acknowledge(seq, link, out);
                out.counters.rcvd_rnr_err += 1;
                if self.una == seq && !timers.is_set(Timer::RnrWait) {
                    if self.rnr_left == 0 {
                        out.counters.retry_rnr_exceeded_err += 1;
                        return Err(Failure::of_packet(seq, Status::RnrRetryExceeded));
                    }
                    if self.attr.rnr_retry != RETRY_FOREVER {
                        self.rnr_left -= 1;
                    }
                    self.go_back(timers);
                    timers.set(Timer::RnrWait, now + timer.wait());
                }
                return Ok(Outcome::Accepted);
            }
            Syndrome::Nak(NakCode::SequenceError) => {
                self.acknowledge(seq, link, out);
                out.counters.rcvd_seq_err += 1;
                return Ok(Outcome::Accepted);
            }
            Syndrome::Nak(NakCode::InvalidRequest) => Status::RemoteInvalidRequest,
            Syndrome::Nak(NakCode::RemoteAccess) => Status::RemoteAccess,
            Syndrome::Nak(NakCode::RemoteOperational) => Status::RemoteOperation,
        };
        self.acknowledge(seq, link, out);
        Err(Failure::of_packet(seq, status))
    }

    /// Everything before `end` is acknowledged, as far as no READ or atomic stands in between.
    #[inline]
    fn acknowledge(&mut self, end: u64, link: &Link, out: &mut Reports) {
        let una = self.una;
        while self.una < end {
            let Some(wqe) = self.queue.front() else { break };
            if wqe.wants_response() || wqe.is_waiting() {
                break;
            }
            self.una = wqe.end().min(end);
            if self.una == wqe.end() {
                self.finish_front(link, out);
                self.finish_done(link, out);
            }
        }
        if self.una > una {
            self.rnr_left = self.attr.rnr_retry;
        }
        self.catch_up();
    }

    #[inline]
    fn finish_front(&mut self, link: &Link, out: &mut Reports) {
        let Some(wqe) = self.queue.pop_front() else {
            return;
        };
        self.lists.drop_front(&wqe.local);
        self.cursor = self.cursor.saturating_sub(1);
        out.counters.rdma_sends += u64::from(wqe.kind() == CompletionKind::Send);
        if wqe.signalled {
            out.complete(wqe.completion(Status::Success, link));
        }
    }

    /// A late answer may acknowledge what we were about to send again.
    #[inline]
    fn catch_up(&mut self) {
        if self.next <= self.una {
            self.next = self.una;
            self.cursor = 0;
            self.reads_out = 0;
        }
    }

    /// Something was acknowledged, which a probe had repeated `probed` ago: counters and timers start
    /// afresh.
    #[inline]
    fn progress(&mut self, now: Nanos, probed: Option<Nanos>, timers: &mut TimerTable) {
        self.is_excused = false;
        self.retries_left = self.attr.retry_cnt;
        self.probed = None;
        self.probe_due = false;
        self.round_trip.acknowledged(probed);
        if let Some((seq, sent)) = self.timed
            && seq < self.una
        {
            self.round_trip.sample(now.since(sent));
            self.timed = None;
        }
        timers.stop(Timer::AckTimeout);
        timers.stop(Timer::Probe);
        self.arm(now, timers);
    }
}

/// Writes a packet, if there is one, over another.
fn put(transmit: Option<Transmit>, into: &mut Transmit) -> bool {
    transmit.map(|transmit| *into = transmit).is_some()
}

/// Whether an atomic acknowledgement of this kind reports a gap.
const fn is_report(syndrome: Syndrome, link: &Link) -> bool {
    link.reports_gaps && matches!(syndrome, Syndrome::Nak(NakCode::SequenceError))
}
