//! Queue pairs: the state machines between posted work and packets.
//!
//! [`QueuePair`] is a reliable connection (RC; UC differs only in what it leaves out). It is split
//! by concern: `requester` (send queue, segmentation, acknowledgements, repetition), `responder`
//! (expected PSN, placement, answers, replay of duplicates), `timers` (one table). [`UdQueuePair`]
//! is the datagram. `work`, `memory` and `types` hold the vocabulary, that of ibverbs.
//!
//! Contract. Application commands: `to_*`, `set_*`, `post_send`, `post_recv`. Inputs:
//! `handle_packet` (its ICRC and its addresses already checked by the caller), `handle_timeout`,
//! `handle_transmit_failure`. Outputs: `poll_transmit` (and, when it has nothing,
//! `execute_local`), `poll_completion`, `poll_event`, `poll_timeout`, to be drained in this order
//! after any command or input. `now` never goes backwards.
//!
//! Loss. What arrives ahead of a gap ([`Outcome::Ahead`]) the caller may keep and hand in again in its
//! turn (`ahead`). To a peer that does so too, and is known to, only what was lost is sent again; to
//! others everything from the gap on, for the IBTA knows no other way (go-back-N). Such a peer reports
//! a gap by an atomic acknowledgement with a sequence NAK, of which the IBTA has no use; its 64 bits
//! say which of the packets behind it are kept. Of the answers to READs and atomics it is asked for
//! those that are missing, by READs as the IBTA has them.
//!
//! Payload is never copied here: a [`Transmit`] names the fragments of registered memory that its
//! payload consists of, and received payload is handed to a [`Memory`] with the place where it
//! belongs. The memory named by a posted work request must stay valid until its completion.
//!
//! Invariants:
//! * every posted work request completes at most once, in the order posted; exactly once if it is
//!   signalled, a receive, or failed or flushed;
//! * a receive is filled by one message, and a duplicate WRITE or atomic is not executed;
//! * all queues are bounded by what the configuration says; a full queue refuses, never grows.
//!
//! Absent: automatic path migration, end-to-end credits, and congestion control (the caller limits
//! data by [`Allow`]). What several queue pairs share (a receive queue, regions, windows) is the
//! caller's, behind [`Memory`].
//! Source: IBTA volume 1, chapters 9 and 10; Linux `rxe_req.c`, `rxe_comp.c`, `rxe_resp.c`.

mod admission;
mod ahead;
mod bypass;
mod lists;
mod memory;
mod reports;
mod requester;
mod responder;
mod timers;
mod types;
mod ud;
mod work;

pub use ahead::EarlyPacket;
pub use memory::{
    Access, AccessError, AtomicOp, Fragment, Fragments, Key, Lkey, Memory, Remote, Rkey, SGE_MAX,
    SgList, Sge, TooManySges,
};
pub use requester::WINDOW;
pub use timers::{PROBE_MIN, PROBE_MIN_LOSSY, RTT_INITIAL};
pub use types::{
    Allow, Counters, DropReason, InitAttr, InvalidTransition, Outcome, QpCaps, QpEvent, QpKind,
    QpState, RtrAttr, RtsAttr, Transmit,
};
pub use ud::{AddressHandle, GRH_LEN, UdQueuePair, UdSendWr};

pub use work::{
    Bind, Completion, CompletionKind, Flush, PostError, RecvWr, SendOp, SendWr, Status, WrId,
};

use crate::time::Nanos;
use crate::wire::{Class, Mtu, PKEY_DEFAULT, Packet, Qpn};
use reports::Reports;
use requester::{Failure, Requester};
use responder::Responder;
use timers::TimerTable;

/// A connected queue pair: see the [module](self).
#[derive(Debug)]
pub struct QueuePair {
    state: QpState,
    link: Link,
    requester: Requester,
    responder: Responder,
    out: Reports,
    timers: TimerTable,
    /// A packet has come in RTR.
    is_established: bool,
    /// In SQD: that the send queue has drained was reported.
    is_drain_told: bool,
}

/// What both halves know of the connection.
#[derive(Clone, Copy, Debug)]
struct Link {
    kind: QpKind,
    qpn: Qpn,
    dest: Qpn,
    mtu: Mtu,
    pkey: u16,
    access: Access,
    /// The peer reports gaps, and understands reports.
    reports_gaps: bool,
}

impl QueuePair {
    /// A queue pair in RESET. All memory it will ever need for queues is reserved here, but for the
    /// replay ring, which [`Self::to_rtr`] reserves, and for lists of several elements, whose others
    /// take memory when they first come.
    #[must_use]
    pub fn new(kind: QpKind, qpn: Qpn, caps: QpCaps) -> Self {
        // Of shared receives one at a time is in use here.
        let recv_wr_max = if caps.shared_receives {
            0
        } else {
            caps.recv_wr_max
        };
        Self {
            state: QpState::Reset,
            link: Link {
                kind,
                qpn,
                dest: Qpn::new(0),
                mtu: Mtu::B1024,
                pkey: PKEY_DEFAULT,
                access: Access::default(),
                reports_gaps: false,
            },
            requester: Requester::new(caps.send_wr_max),
            responder: Responder::new(recv_wr_max, caps.shared_receives),
            out: Reports::new(caps.send_wr_max as usize + recv_wr_max as usize + 2),
            timers: TimerTable::default(),
            is_established: false,
            is_drain_told: false,
        }
    }

    /// Our number.
    #[must_use]
    #[inline]
    pub const fn qpn(&self) -> Qpn {
        self.link.qpn
    }

    /// The peer's number; meaningful from RTR on.
    #[must_use]
    #[inline]
    pub const fn dest(&self) -> Qpn {
        self.link.dest
    }

    /// RC or UC.
    #[must_use]
    #[inline]
    pub const fn kind(&self) -> QpKind {
        self.link.kind
    }

    /// Path MTU; meaningful from RTR on.
    #[must_use]
    pub const fn path_mtu(&self) -> Mtu {
        self.link.mtu
    }

    /// State.
    #[must_use]
    #[inline]
    pub const fn state(&self) -> QpState {
        self.state
    }

    /// Anomalies seen.
    #[must_use]
    #[inline]
    pub const fn counters(&self) -> &Counters {
        &self.out.counters
    }

    /// Request packets sent and not acknowledged; 0 right after a loss was noticed, because then
    /// all of them will be sent again. A READ counts as its response packets.
    #[must_use]
    #[inline]
    pub fn packets_in_flight(&self) -> u32 {
        self.requester.in_flight()
    }

    /// Whether some request or answer waits to be sent, whatever [`Allow`] says.
    #[must_use]
    #[inline]
    pub fn has_pending_transmit(&self) -> bool {
        self.responder.has_answers() || (self.is_sending() && self.requester.can_send(&self.timers))
    }

    /// Whether [`Self::poll_transmit`] and [`Self::execute_local`] have nothing to do: for who wants to
    /// spare a call of them. False may mean that, too.
    #[must_use]
    #[inline]
    pub fn is_idle(&self) -> bool {
        // UC finishes in `poll_transmit` what it has sent, and SQD may drain there.
        let is_plain = self.state == QpState::Rts && self.link.kind == QpKind::Rc;
        is_plain && !self.responder.has_answers() && self.requester.is_idle()
    }

    /// The PSN that the peer's next request must have (`rq_psn` of ibverbs).
    #[must_use]
    pub fn expected_psn(&self) -> crate::wire::Psn {
        self.responder.expected()
    }

    /// The PSN of our next new request packet (`sq_psn` of ibverbs).
    #[must_use]
    pub fn next_psn(&self) -> crate::wire::Psn {
        self.requester.next_psn()
    }

    /// What the peer may do.
    #[must_use]
    pub const fn access(&self) -> Access {
        self.link.access
    }

    /// Whether the state is SQD and requests that had begun are not finished.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.state == QpState::Sqd && !self.requester.is_drained()
    }

    /// Sends posted and not finished, or finished and not polled.
    #[must_use]
    #[inline]
    pub fn sends_posted(&self) -> u32 {
        self.requester.posted() + self.out.sends
    }

    /// Receives posted and not yet used.
    #[must_use]
    pub fn receives_posted(&self) -> u32 {
        self.responder.receives_posted()
    }

    /// RESET or INIT to INIT.
    ///
    /// # Errors
    ///
    /// [`InvalidTransition`] from any other state.
    pub fn to_init(&mut self, attr: InitAttr) -> Result<(), InvalidTransition> {
        self.transition(QpState::Init)?;
        self.link.pkey = attr.pkey;
        self.link.access = attr.access;
        Ok(())
    }

    /// INIT to RTR.
    ///
    /// # Errors
    ///
    /// [`InvalidTransition`] from any other state.
    pub fn to_rtr(&mut self, attr: RtrAttr) -> Result<(), InvalidTransition> {
        self.transition(QpState::Rtr)?;
        self.link.dest = attr.dest;
        self.link.mtu = attr.path_mtu;
        self.responder.start(&attr);
        Ok(())
    }

    /// RTR to RTS.
    ///
    /// # Errors
    ///
    /// [`InvalidTransition`] from any other state.
    pub fn to_rts(&mut self, attr: RtsAttr) -> Result<(), InvalidTransition> {
        if self.state != QpState::Rtr {
            return Err(InvalidTransition {
                from: self.state,
                to: QpState::Rts,
            });
        }
        self.transition(QpState::Rts)?;
        self.requester.start(attr);
        Ok(())
    }

    /// RTS to SQD: what has begun is finished, then [`QpEvent::SendQueueDrained`] comes.
    ///
    /// # Errors
    ///
    /// [`InvalidTransition`] from any state but RTS and SQD.
    pub fn to_sqd(&mut self) -> Result<(), InvalidTransition> {
        if self.state == QpState::Sqd {
            return Ok(());
        }
        self.transition(QpState::Sqd)?;
        self.requester.drain();
        self.is_drain_told = false;
        self.note_drained();
        Ok(())
    }

    /// SQD or SQE to RTS: sending goes on. In RTS it changes nothing.
    ///
    /// # Errors
    ///
    /// [`InvalidTransition`] from any other state.
    pub fn resume(&mut self) -> Result<(), InvalidTransition> {
        if self.state == QpState::Rtr {
            return Err(InvalidTransition {
                from: self.state,
                to: QpState::Rts,
            });
        }
        self.transition(QpState::Rts)?;
        self.requester.resume();
        Ok(())
    }

    /// What the peer may do, from now on.
    pub fn set_access(&mut self, access: Access) {
        self.link.access = access;
    }

    /// How long a peer waits that finds no receive posted, from now on.
    pub fn set_min_rnr_timer(&mut self, timer: crate::wire::RnrTimer) {
        self.responder.set_rnr_timer(timer);
    }

    /// Other timeouts, retries and limits of READs, from now on; `sq_psn` is not looked at.
    pub fn set_rts_attr(&mut self, attr: RtsAttr) {
        self.requester.retune(attr);
    }

    /// How many READs and atomics of the peer are remembered, from now on.
    pub fn set_max_dest_rd_atomic(&mut self, depth: u8) {
        self.responder.set_replay_depth(depth);
    }

    /// Any state to ERR: everything posted is flushed.
    pub fn to_error(&mut self) {
        self.enter_error(None);
    }

    /// Any state to RESET: everything posted and every completion not polled is forgotten.
    pub fn to_reset(&mut self) {
        self.state = QpState::Reset;
        self.is_established = false;
        self.link.reports_gaps = false;
        self.timers.stop_all();
        self.requester.clear();
        self.responder.clear();
        self.out.clear();
    }

    /// Append to the send queue.
    ///
    /// In ERR and SQE the request is taken and flushed at once; in SQD it waits.
    ///
    /// # Errors
    ///
    /// [`PostError`]; the request was not taken.
    #[inline]
    pub fn post_send(&mut self, wr: SendWr) -> Result<(), PostError> {
        use QpState::{Err, Rts, Sqd, Sqe};
        if !matches!(self.state, Rts | Sqd | Sqe | Err) {
            return Result::Err(PostError::State(self.state));
        }
        self.requester.post(wr, &self.link, &self.out)?;
        if matches!(self.state, Sqe | Err) {
            self.requester.flush(None, &self.link, &mut self.out);
        }
        Ok(())
    }

    /// Append to the receive queue.
    ///
    /// In ERR the request is taken and flushed at once.
    ///
    /// # Errors
    ///
    /// [`PostError`]; the request was not taken.
    #[inline]
    pub fn post_recv(&mut self, wr: RecvWr) -> Result<(), PostError> {
        if self.state == QpState::Reset {
            return Err(PostError::State(self.state));
        }
        self.responder.post(wr, &self.out)?;
        if self.state == QpState::Err {
            self.responder.flush(None, &self.link, &mut self.out);
        }
        Ok(())
    }

    /// A packet for this queue pair came in, with the right ICRC, from the right address.
    pub fn handle_packet(
        &mut self,
        now: Nanos,
        packet: &Packet<'_>,
        memory: &mut impl Memory,
    ) -> Outcome {
        let outcome = match self.admit(packet) {
            Err(reason) => Outcome::Dropped(reason),
            Ok(()) if packet.row().class == Class::Cnp => {
                self.out.counters.cnp_handled += 1;
                Outcome::Accepted
            }
            Ok(()) if packet.row().is_response() => {
                let (outcome, failure) = self.requester.handle_response(
                    now,
                    packet,
                    memory,
                    &self.link,
                    &mut self.out,
                    &mut self.timers,
                );
                match failure {
                    Some(_) => self.enter_error(failure),
                    None => self.note_drained(),
                }
                outcome
            }
            Ok(()) => {
                if self.state == QpState::Rtr && !self.is_established {
                    self.is_established = true;
                    self.out.raise(QpEvent::CommunicationEstablished);
                }
                let (outcome, failed) =
                    self.responder
                        .handle_request(packet, memory, &self.link, &mut self.out);
                if failed {
                    self.enter_error(None);
                }
                outcome
            }
        };
        match outcome {
            Outcome::Accepted => self.out.counters.rcvd_pkts += 1,
            Outcome::Ahead => {} // counted in its turn
            Outcome::Dropped(_) => self.out.counters.dropped_pkts += 1,
        }
        outcome
    }

    /// The time that [`Self::poll_timeout`] named has come (calling early does no harm). What has
    /// arrived until now has been handled: a retry must not be spent on an ACK that waits in a socket.
    pub fn handle_timeout(&mut self, now: Nanos) {
        while let Some((timer, due)) = self.timers.expire(now) {
            let late = now.since(due);
            let failure =
                self.requester
                    .handle_timer(now, timer, late, &mut self.out, &mut self.timers);
            if failure.is_some() {
                self.enter_error(failure);
            }
        }
    }

    /// The caller could not find the memory that a [`Transmit`] named. The queue pair goes to ERR:
    /// the oldest send fails with [`Status::LocalProtection`], or the peer's READ is refused. The
    /// answer to a repeated READ is dropped instead: what was answered before may be deregistered.
    pub fn handle_transmit_failure(&mut self, transmit: &Transmit) {
        if transmit.is_response && transmit.is_retransmission {
            self.responder.forget_repeated(transmit.psn);
        } else if transmit.is_response {
            self.responder.refuse_read(transmit.psn, &mut self.out);
            self.enter_error(None);
        } else {
            self.fail_send(self.requester.local_failure(transmit.psn));
        }
    }

    /// Whether a request stands first in line that is carried out at this end.
    #[must_use]
    #[inline]
    pub fn has_local_work(&self) -> bool {
        self.is_sending() && self.requester.has_local_work()
    }

    /// Carry it out.
    pub fn execute_local(&mut self, memory: &mut impl Memory) {
        if !self.is_sending() {
            return;
        }
        let done = self
            .requester
            .execute_local(memory, &self.link, &mut self.out);
        if let Err(failure) = done {
            self.fail_send(failure);
        }
    }

    /// The next packet to send, if there is one and `allow` admits it.
    ///
    /// Answers come before requests, except that an ACK follows a single request that is there too:
    /// the longer packet first, both leave in one segmented send. In ERR only answers already owed
    /// come.
    pub fn poll_transmit(&mut self, now: Nanos, allow: Allow) -> Option<Transmit> {
        let mut transmit = Transmit::EMPTY;
        self.poll_transmit_into(now, allow, &mut transmit)
            .then_some(transmit)
    }

    /// The same, written over another packet: one is too long to be handed from hand to hand. If
    /// there is none, `into` means nothing.
    #[inline]
    pub fn poll_transmit_into(&mut self, now: Nanos, allow: Allow, into: &mut Transmit) -> bool {
        let is_request_first = self.is_sending()
            && allow == Allow::All
            && self.responder.owes_one_ack()
            && self.requester.has_one_packet(&self.timers);
        if !is_request_first && self.responder.poll_transmit(allow, &self.link, into) {
            self.out.counters.sent_pkts += 1;
            return true;
        }
        if !self.is_sending() {
            return false;
        }
        let (link, out, timers) = (&self.link, &mut self.out, &mut self.timers);
        let is_request = self
            .requester
            .poll_transmit(now, allow, link, out, timers, into);
        self.note_drained();
        self.out.counters.sent_pkts += u64::from(is_request);
        is_request
    }

    /// Whether there is a completion or an event to poll.
    #[must_use]
    #[inline]
    pub fn has_reports(&self) -> bool {
        self.out.is_any()
    }

    /// The next completion.
    #[inline]
    pub fn poll_completion(&mut self) -> Option<Completion> {
        self.out.poll()
    }

    /// The next event.
    #[inline]
    pub fn poll_event(&mut self) -> Option<QpEvent> {
        self.out.poll_event()
    }

    /// When [`Self::handle_timeout`] wants to be called, unless something happens before.
    #[must_use]
    #[inline]
    pub fn poll_timeout(&self) -> Option<Nanos> {
        self.timers.next()
    }

    fn transition(&mut self, to: QpState) -> Result<(), InvalidTransition> {
        let from = self.state;
        if !from.legal(to) {
            return Err(InvalidTransition { from, to });
        }
        self.state = to;
        Ok(())
    }

    #[inline]
    const fn is_sending(&self) -> bool {
        matches!(self.state, QpState::Rts | QpState::Sqd)
    }

    /// Tell that the send queue has drained, once.
    #[inline]
    fn note_drained(&mut self) {
        if self.state == QpState::Sqd && !self.is_draining() && !self.is_drain_told {
            self.is_drain_told = true;
            self.out.raise(QpEvent::SendQueueDrained);
        }
    }

    /// A send failed at this end: the end of an RC, a pause for a UC.
    fn fail_send(&mut self, failure: Failure) {
        match self.link.kind {
            QpKind::Rc => self.enter_error(Some(failure)),
            QpKind::Uc => {
                self.state = QpState::Sqe;
                self.requester
                    .flush(Some(failure), &self.link, &mut self.out);
            }
        }
    }

    /// Go to ERR and flush: `failure` names the send that is to blame, if one is.
    fn enter_error(&mut self, failure: Option<Failure>) {
        if self.responder.is_shared() && self.state != QpState::Err {
            self.out.raise(QpEvent::LastWqeReached);
        }
        self.state = QpState::Err;
        self.timers.stop_all();
        self.requester.flush(failure, &self.link, &mut self.out);
        self.responder.flush(None, &self.link, &mut self.out);
    }
}
