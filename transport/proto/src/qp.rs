//! Queue pairs: the state machines between posted work and packets.
//!
//! [`QueuePair`] is a reliable connection (RC; UC differs only in what it leaves out). It is split
//! by concern: `requester` (send queue, segmentation, acknowledgements, go-back-N), `responder`
//! (expected PSN, placement, answers, replay of duplicates), `timers` (one table). [`UdQueuePair`]
//! is the datagram. `work`, `memory` and `types` hold the vocabulary, that of ibverbs.
//!
//! Contract. Application commands: `to_*`, `post_send`, `post_recv`. Inputs: `handle_packet` (its
//! ICRC and its addresses already checked by the caller), `handle_timeout`,
//! `handle_transmit_failure`. Outputs: `poll_transmit`, `poll_completion`, `poll_timeout`, to be
//! drained in this order after any command or input. `now` never goes backwards.
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
//! Absent: shared receive queues, memory windows, FLUSH and ATOMIC WRITE, automatic path migration,
//! end-to-end credits, and congestion control (the caller limits data by [`Allow`]).
//! Source: IBTA volume 1, chapters 9 and 10; Linux `rxe_req.c`, `rxe_comp.c`, `rxe_resp.c`.

mod memory;
mod requester;
mod responder;
mod timers;
mod types;
mod ud;
mod work;

use alloc::collections::VecDeque;

pub use memory::{
    Access, AccessError, AtomicOp, Fragment, Fragments, Key, Lkey, Memory, Remote, Rkey, SGE_MAX,
    SgList, Sge, TooManySges,
};
pub use requester::WINDOW;
pub use timers::{PROBE_MIN, RTT_INITIAL};
pub use types::{
    Allow, Counters, DropReason, InitAttr, InvalidTransition, Outcome, QpCaps, QpKind, QpState,
    RtrAttr, RtsAttr, Transmit,
};
pub use ud::{AddressHandle, GRH_LEN, UdQueuePair, UdSendWr};

pub use work::{Completion, CompletionKind, PostError, RecvWr, SendOp, SendWr, Status, WrId};

use crate::time::Nanos;
use crate::wire::{Class, Mtu, PKEY_DEFAULT, Packet, Qpn};
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
}

/// What the queue pair reports: completions not yet polled, and counters.
#[derive(Debug)]
struct Reports {
    completions: VecDeque<Completion>,
    /// How many of `completions` are of sends, and of receives.
    sends: u32,
    recvs: u32,
    counters: Counters,
}

impl Reports {
    fn complete(&mut self, completion: Completion) {
        *(if completion.kind.is_recv() {
            &mut self.recvs
        } else {
            &mut self.sends
        }) += 1;
        self.completions.push_back(completion);
    }

    fn poll(&mut self) -> Option<Completion> {
        let completion = self.completions.pop_front()?;
        *(if completion.kind.is_recv() {
            &mut self.recvs
        } else {
            &mut self.sends
        }) -= 1;
        Some(completion)
    }
}

impl QueuePair {
    /// A queue pair in RESET. All memory it will ever need for queues is reserved here, but for the
    /// replay ring, which [`Self::to_rtr`] reserves.
    #[must_use]
    pub fn new(kind: QpKind, qpn: Qpn, caps: QpCaps) -> Self {
        Self {
            state: QpState::Reset,
            link: Link {
                kind,
                qpn,
                dest: Qpn::new(0),
                mtu: Mtu::B1024,
                pkey: PKEY_DEFAULT,
                access: Access::default(),
            },
            requester: Requester::new(caps.send_wr_max),
            responder: Responder::new(caps.recv_wr_max),
            out: Reports {
                completions: VecDeque::with_capacity(
                    caps.send_wr_max as usize + caps.recv_wr_max as usize,
                ),
                sends: 0,
                recvs: 0,
                counters: Counters::default(),
            },
            timers: TimerTable::default(),
        }
    }

    /// Our number.
    #[must_use]
    pub const fn qpn(&self) -> Qpn {
        self.link.qpn
    }

    /// The peer's number; meaningful from RTR on.
    #[must_use]
    pub const fn dest(&self) -> Qpn {
        self.link.dest
    }

    /// RC or UC.
    #[must_use]
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
    pub const fn state(&self) -> QpState {
        self.state
    }

    /// Anomalies seen.
    #[must_use]
    pub const fn counters(&self) -> &Counters {
        &self.out.counters
    }

    /// Request packets sent and not acknowledged; 0 right after a loss was noticed, because then
    /// all of them will be sent again. A READ counts as its response packets.
    #[must_use]
    pub fn packets_in_flight(&self) -> u32 {
        self.requester.in_flight()
    }

    /// Whether some request or answer waits to be sent, whatever [`Allow`] says.
    #[must_use]
    pub fn has_pending_transmit(&self) -> bool {
        self.responder.has_answers()
            || (self.state == QpState::Rts && self.requester.can_send(&self.timers))
    }

    /// The PSN that the peer's next request must have (`rq_psn` of ibverbs).
    #[must_use]
    pub fn expected_psn(&self) -> crate::wire::Psn {
        self.responder.expected()
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
        if self.state == QpState::Rts {
            // ibverbs lets some attributes change here; this crate has no use for it.
            return Err(InvalidTransition {
                from: QpState::Rts,
                to: QpState::Rts,
            });
        }
        self.transition(QpState::Rts)?;
        self.requester.start(attr);
        Ok(())
    }

    /// Any state to ERR: everything posted is flushed.
    pub fn to_error(&mut self) {
        self.enter_error(None);
    }

    /// Any state to RESET: everything posted and every completion not polled is forgotten.
    pub fn to_reset(&mut self) {
        self.state = QpState::Reset;
        self.timers.stop_all();
        self.requester.clear();
        self.responder.clear();
        self.out.completions.clear();
        (self.out.sends, self.out.recvs) = (0, 0);
    }

    /// Append to the send queue.
    ///
    /// In ERR the request is taken and flushed at once.
    ///
    /// # Errors
    ///
    /// [`PostError`]; the request was not taken.
    pub fn post_send(&mut self, wr: SendWr) -> Result<(), PostError> {
        if !matches!(self.state, QpState::Rts | QpState::Err) {
            return Err(PostError::State(self.state));
        }
        self.requester.post(wr, &self.link, &self.out)?;
        if self.state == QpState::Err {
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
            Ok(()) if packet.opcode().is_response() => {
                let (outcome, failure) = self.requester.handle_response(
                    now,
                    packet,
                    memory,
                    &self.link,
                    &mut self.out,
                    &mut self.timers,
                );
                if failure.is_some() {
                    self.enter_error(failure);
                }
                outcome
            }
            Ok(()) => {
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
            Outcome::Dropped(_) => self.out.counters.dropped_pkts += 1,
        }
        outcome
    }

    /// The time that [`Self::poll_timeout`] named has come (calling early does no harm).
    pub fn handle_timeout(&mut self, now: Nanos) {
        while let Some(timer) = self.timers.expire(now) {
            let failure = self
                .requester
                .handle_timer(now, timer, &mut self.out, &mut self.timers);
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
            self.enter_error(Some(self.requester.local_failure(transmit.psn)));
        }
    }

    /// The next packet to send, if there is one and `allow` admits it.
    ///
    /// Answers come before requests. In ERR only answers already owed come.
    pub fn poll_transmit(&mut self, now: Nanos, allow: Allow) -> Option<Transmit> {
        let mut transmit = self.responder.poll_transmit(allow, &self.link);
        if transmit.is_none() && self.state == QpState::Rts {
            transmit = self.requester.poll_transmit(
                now,
                allow,
                &self.link,
                &mut self.out,
                &mut self.timers,
            );
        }
        self.out.counters.sent_pkts += u64::from(transmit.is_some());
        transmit
    }

    /// The next completion.
    pub fn poll_completion(&mut self) -> Option<Completion> {
        self.out.poll()
    }

    /// When [`Self::handle_timeout`] wants to be called, unless something happens before.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Nanos> {
        self.timers.next()
    }

    /// Whether state, class and partition let the packet in.
    fn admit(&self, packet: &Packet<'_>) -> Result<(), DropReason> {
        let working = match self.state {
            QpState::Rts => true,
            QpState::Rtr => !packet.opcode().is_response(),
            _ => false,
        };
        if !working {
            return Err(DropReason::State(self.state));
        }
        let fits = match packet.row().class {
            Class::Rc => self.link.kind == QpKind::Rc,
            Class::Uc => self.link.kind == QpKind::Uc,
            Class::Cnp => true,
            Class::Ud => false,
        };
        if !fits {
            return Err(DropReason::Class);
        }
        if !pkeys_match(packet.pkey(), self.link.pkey) {
            return Err(DropReason::Pkey);
        }
        Ok(())
    }

    fn transition(&mut self, to: QpState) -> Result<(), InvalidTransition> {
        let from = self.state;
        if !from.legal(to) {
            return Err(InvalidTransition { from, to });
        }
        self.state = to;
        Ok(())
    }

    /// Go to ERR and flush: `failure` names the send that is to blame, if one is.
    fn enter_error(&mut self, failure: Option<Failure>) {
        self.state = QpState::Err;
        self.timers.stop_all();
        self.requester.flush(failure, &self.link, &mut self.out);
        self.responder.flush(None, &self.link, &mut self.out);
    }
}

/// Two partition keys match if their low 15 bits do and one of them is a full member.
fn pkeys_match(a: u16, b: u16) -> bool {
    a & 0x7fff == b & 0x7fff && (a | b) & 0x8000 != 0
}

/// Put `header` in front of `payload`, with the pad the payload needs.
fn transmit(mut header: crate::wire::Header, payload: Fragments) -> Transmit {
    header.pad = crate::wire::pad_len(payload.total() as usize) as u8;
    let is_response = header.opcode.is_response();
    let mut bytes = [0; crate::wire::HEADER_LEN_MAX];
    let header_len = header.emit(&mut bytes) as u8;
    Transmit {
        header: bytes,
        header_len,
        psn: header.psn,
        payload,
        pad: header.pad,
        is_response,
        is_retransmission: false,
    }
}
