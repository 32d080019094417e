//! Unreliable datagrams: one packet per message, a Q_Key instead of a connection.
//!
//! Absent: multicast groups (the caller delivers a copy to each attached queue pair) and answers.
//! Source: Linux `rxe_req.c`, `rxe_recv.c`; roles of GRH and Q_Key from ibverbs.

use alloc::collections::VecDeque;

use super::Reports;
use super::admission::pkeys_match;
use super::memory::{AccessError, Memory, SgList};
use super::types::{
    Counters, DropReason, InitAttr, InvalidTransition, Outcome, QpCaps, QpEvent, QpState, Transmit,
};
use super::work::{Completion, CompletionKind, PostError, RecvWr, Status, WrId};
use crate::wire::{Class, Deth, Extension, Header, Mtu, Opcode, PKEY_DEFAULT, Packet, Psn, Qpn};

/// Bytes at the start of every UD receive that hold the IP header: an IPv6 header, or 20 zero bytes
/// and an IPv4 header.
pub const GRH_LEN: usize = 40;

/// The caller's name for a destination address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AddressHandle(pub u64);

/// A datagram to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UdSendWr {
    /// The caller's name for it.
    pub wr_id: WrId,
    /// The payload, at most one MTU.
    pub local: SgList,
    /// The host to send to.
    pub address: AddressHandle,
    /// The queue pair there.
    pub dest: Qpn,
    /// The Q_Key that queue pair expects.
    pub qkey: u32,
    /// Immediate data.
    pub imm: Option<u32>,
    /// Report success too.
    pub signalled: bool,
    /// Wake the peer's event handler.
    pub solicited: bool,
}

/// A datagram queue pair. Contract and order of calls as of [`super::QueuePair`], but that it has
/// no timers.
#[derive(Debug)]
pub struct UdQueuePair {
    qpn: Qpn,
    state: QpState,
    mtu: Mtu,
    pkey: u16,
    qkey: u32,
    psn: Psn,
    caps: QpCaps,
    sends: VecDeque<UdSendWr>,
    recvs: VecDeque<RecvWr>,
    out: Reports,
    /// The datagram polled last.
    last: Option<UdSendWr>,
}

impl UdQueuePair {
    /// A datagram queue pair in RESET; `mtu` is the port's.
    #[must_use]
    pub fn new(qpn: Qpn, mtu: Mtu, caps: QpCaps) -> Self {
        let sends = caps.send_wr_max as usize;
        let recvs = match caps.shared_receives {
            true => 0,
            false => caps.recv_wr_max as usize,
        };
        Self {
            qpn,
            state: QpState::Reset,
            mtu,
            pkey: PKEY_DEFAULT,
            qkey: 0,
            psn: Psn::new(0),
            last: None,
            caps,
            sends: VecDeque::with_capacity(sends),
            recvs: VecDeque::with_capacity(recvs),
            out: Reports::new(sends + recvs + 2),
        }
    }

    /// Our number.
    #[must_use]
    pub const fn qpn(&self) -> Qpn {
        self.qpn
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

    /// RESET to INIT. Of `attr` only the partition key matters.
    ///
    /// # Errors
    ///
    /// [`InvalidTransition`] from any other state.
    pub fn to_init(&mut self, attr: InitAttr, qkey: u32) -> Result<(), InvalidTransition> {
        self.transition(QpState::Init)?;
        (self.pkey, self.qkey) = (attr.pkey, qkey);
        Ok(())
    }

    /// INIT to RTR.
    ///
    /// # Errors
    ///
    /// [`InvalidTransition`] from any other state.
    pub fn to_rtr(&mut self) -> Result<(), InvalidTransition> {
        self.transition(QpState::Rtr)
    }

    /// RTR to RTS, sending from `sq_psn`.
    ///
    /// # Errors
    ///
    /// [`InvalidTransition`] from any other state.
    pub fn to_rts(&mut self, sq_psn: Psn) -> Result<(), InvalidTransition> {
        if self.state != QpState::Rtr {
            return Err(self.invalid(QpState::Rts));
        }
        self.transition(QpState::Rts)?;
        self.psn = sq_psn;
        Ok(())
    }

    /// RTS to SQD. A datagram has no answer to wait for, so the queue is drained at once.
    ///
    /// # Errors
    ///
    /// [`InvalidTransition`] from any state but RTS and SQD.
    pub fn to_sqd(&mut self) -> Result<(), InvalidTransition> {
        let is_new = self.state != QpState::Sqd;
        self.transition(QpState::Sqd)?;
        if is_new {
            self.out.raise(QpEvent::SendQueueDrained);
        }
        Ok(())
    }

    /// SQD or SQE to RTS: sending goes on. In RTS it changes nothing.
    ///
    /// # Errors
    ///
    /// [`InvalidTransition`] from any other state.
    pub fn resume(&mut self) -> Result<(), InvalidTransition> {
        if self.state == QpState::Rtr {
            return Err(self.invalid(QpState::Rts));
        }
        self.transition(QpState::Rts)
    }

    /// What senders must know, from now on.
    pub fn set_qkey(&mut self, qkey: u32) {
        self.qkey = qkey;
    }

    /// What senders must know.
    #[must_use]
    pub const fn qkey(&self) -> u32 {
        self.qkey
    }

    /// The PSN of the next datagram.
    #[must_use]
    pub const fn next_psn(&self) -> Psn {
        self.psn
    }

    /// Sends posted and not sent, or sent and not polled.
    #[must_use]
    pub fn sends_posted(&self) -> u32 {
        self.sends.len() as u32 + self.out.sends
    }

    /// Receives posted and not yet used.
    #[must_use]
    pub fn receives_posted(&self) -> u32 {
        self.recvs.len() as u32
    }

    /// Any state to ERR: everything posted is flushed.
    pub fn to_error(&mut self) {
        if self.caps.shared_receives && self.state != QpState::Err {
            self.out.raise(QpEvent::LastWqeReached);
        }
        self.state = QpState::Err;
        self.flush_sends();
        while let Some(wr) = self.recvs.pop_front() {
            self.out
                .complete(recv_completion(wr.wr_id, Status::Flushed));
        }
    }

    /// Any state to RESET: everything posted and every completion not polled is forgotten.
    pub fn to_reset(&mut self) {
        self.state = QpState::Reset;
        self.sends.clear();
        self.recvs.clear();
        self.out.clear();
    }

    /// Append to the send queue.
    ///
    /// # Errors
    ///
    /// [`PostError`]; the request was not taken.
    pub fn post_send(&mut self, wr: UdSendWr) -> Result<(), PostError> {
        use QpState::{Err, Rts, Sqd, Sqe};
        if !matches!(self.state, Rts | Sqd | Sqe | Err) {
            return Result::Err(PostError::State(self.state));
        }
        if wr.local.total() > self.mtu.bytes() {
            return Result::Err(PostError::Invalid);
        }
        if self.sends.len() as u32 + self.out.sends >= self.caps.send_wr_max {
            return Result::Err(PostError::QueueFull);
        }
        self.sends.push_back(wr);
        if matches!(self.state, Sqe | Err) {
            self.flush_sends();
        }
        Ok(())
    }

    /// Append to the receive queue.
    ///
    /// # Errors
    ///
    /// [`PostError`]; the request was not taken.
    pub fn post_recv(&mut self, wr: RecvWr) -> Result<(), PostError> {
        if self.state == QpState::Reset {
            return Err(PostError::State(self.state));
        }
        if self.caps.shared_receives {
            return Err(PostError::Invalid);
        }
        if self.recvs.len() as u32 + self.out.recvs >= self.caps.recv_wr_max {
            return Err(PostError::QueueFull);
        }
        self.recvs.push_back(wr);
        if self.state == QpState::Err {
            self.to_error();
        }
        Ok(())
    }

    /// A packet for this queue pair came in, with the right ICRC. `grh` is the IP header as
    /// [`GRH_LEN`] describes it.
    pub fn handle_packet(
        &mut self,
        packet: &Packet<'_>,
        grh: &[u8; GRH_LEN],
        memory: &mut impl Memory,
    ) -> Outcome {
        match self.receive(packet, grh, memory) {
            Ok(completion) => {
                self.out.counters.rcvd_pkts += 1;
                self.out.complete(completion);
                Outcome::Accepted
            }
            Err(reason) => {
                self.out.counters.dropped_pkts += 1;
                Outcome::Dropped(reason)
            }
        }
    }

    /// The next packet to send and where to. Its work request is complete then, or failed by
    /// [`Self::handle_transmit_failure`] before anything else is called.
    pub fn poll_transmit(&mut self) -> Option<(Transmit, AddressHandle)> {
        if self.state != QpState::Rts {
            return None;
        }
        let wr = self.sends.pop_front()?;
        let deth = Deth {
            qkey: wr.qkey,
            source: self.qpn,
        };
        let (opcode, extension) = match wr.imm {
            Some(imm) => (Opcode::UdSendOnlyImm, Extension::DethImm(deth, imm)),
            None => (Opcode::UdSendOnly, Extension::Deth(deth)),
        };
        let mut header = Header::new(opcode, wr.dest, self.psn, extension);
        header.pkey = self.pkey;
        header.solicited = wr.solicited;
        self.psn = self.psn.plus(1);
        self.out.counters.sent_pkts += 1;
        self.out.counters.rdma_sends += 1;
        self.last = Some(wr);
        if wr.signalled {
            self.out.complete(send_completion(&wr, Status::Success));
        }
        let mut transmit = Transmit::EMPTY;
        transmit.payload = wr.local.slice(0, wr.local.total());
        transmit.begin(header);
        Some((transmit, wr.address))
    }

    /// The caller could not find the memory of the datagram that it just polled: its request fails,
    /// those behind it are flushed, and the state is SQE.
    pub fn handle_transmit_failure(&mut self) {
        let Some(wr) = self.last.take() else { return };
        if wr.signalled && self.out.completions.pop_back().is_some() {
            self.out.sends -= 1;
        }
        self.out.counters.sent_pkts -= 1;
        self.out.counters.rdma_sends -= 1;
        self.out
            .complete(send_completion(&wr, Status::LocalProtection));
        self.state = QpState::Sqe;
        self.flush_sends();
    }

    fn flush_sends(&mut self) {
        while let Some(wr) = self.sends.pop_front() {
            self.out.complete(send_completion(&wr, Status::Flushed));
        }
    }

    /// Whether some datagram waits to be sent.
    #[must_use]
    pub fn has_pending_transmit(&self) -> bool {
        self.state == QpState::Rts && !self.sends.is_empty()
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<QpEvent> {
        self.out.poll_event()
    }

    /// Whether there is a completion or an event to poll.
    #[must_use]
    pub fn has_reports(&self) -> bool {
        self.out.is_any()
    }

    /// The next completion.
    pub fn poll_completion(&mut self) -> Option<Completion> {
        self.out.poll()
    }

    fn receive(
        &mut self,
        packet: &Packet<'_>,
        grh: &[u8; GRH_LEN],
        memory: &mut impl Memory,
    ) -> Result<Completion, DropReason> {
        use QpState::{Rtr, Rts, Sqd, Sqe};
        if !matches!(self.state, Rtr | Rts | Sqd | Sqe) {
            return Err(DropReason::State(self.state));
        }
        if packet.row().class != Class::Ud {
            return Err(DropReason::Class);
        }
        if !pkeys_match(packet.pkey(), self.pkey) {
            return Err(DropReason::Pkey);
        }
        let (Extension::Deth(deth) | Extension::DethImm(deth, _)) = packet.extension() else {
            return Err(DropReason::Class);
        };
        if deth.qkey != self.qkey {
            return Err(DropReason::Qkey);
        }
        if self.recvs.is_empty() && self.caps.shared_receives {
            self.recvs.extend(memory.shared_receive());
        }
        let wr = self.recvs.front().ok_or(DropReason::NoReceive)?;
        let len = (GRH_LEN + packet.payload().len()) as u32;
        if packet.payload().len() > self.mtu.bytes() as usize || len > wr.local.total() {
            return Err(DropReason::Length);
        }
        let (wr_id, local) = (wr.wr_id, wr.local);
        self.recvs.pop_front();
        let placed = place(&local, 0, grh, memory).is_ok()
            && place(&local, GRH_LEN as u32, packet.payload(), memory).is_ok();
        let status = if placed {
            Status::Success
        } else {
            Status::LocalProtection
        };
        Ok(Completion {
            byte_len: len,
            imm: packet.imm(),
            solicited: packet.solicited(),
            source: deth.source,
            ..recv_completion(wr_id, status)
        })
    }

    fn transition(&mut self, to: QpState) -> Result<(), InvalidTransition> {
        if !self.state.legal(to) {
            return Err(self.invalid(to));
        }
        self.state = to;
        Ok(())
    }

    const fn invalid(&self, to: QpState) -> InvalidTransition {
        InvalidTransition {
            from: self.state,
            to,
        }
    }
}

/// Copy `bytes` to `local` from `offset` on.
fn place(
    local: &SgList,
    offset: u32,
    bytes: &[u8],
    memory: &mut impl Memory,
) -> Result<(), AccessError> {
    let mut rest = bytes;
    for fragment in local.slice(offset, bytes.len() as u32).as_slice() {
        let (piece, tail) = rest.split_at(fragment.len as usize);
        memory.place(*fragment, piece)?;
        rest = tail;
    }
    Ok(())
}

fn send_completion(wr: &UdSendWr, status: Status) -> Completion {
    Completion {
        kind: CompletionKind::Send,
        source: wr.dest,
        ..recv_completion(wr.wr_id, status)
    }
}

fn recv_completion(wr_id: WrId, status: Status) -> Completion {
    Completion {
        wr_id,
        status,
        kind: CompletionKind::Recv,
        byte_len: 0,
        imm: None,
        invalidated: None,
        solicited: false,
        source: Qpn::new(0),
    }
}
