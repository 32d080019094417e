//! The device's sending side: who sends next, where the payload lies, the ICRC.
//!
//! Owns: the round of ready queue pairs, and the way of a packet from its state machine through the
//! fault injector to the socket.

use std::net::{IpAddr, SocketAddr};
use std::ops::ControlFlow;

use lowtide_transport_proto::icrc::{self, Flow, Icrc, Ip};
use lowtide_transport_proto::qp::{self, Allow, Lkey, QpKind, Rkey, Transmit};
use lowtide_transport_proto::time::Nanos;
use lowtide_transport_proto::wire::pad_len;

use super::host::Act;
use super::view::{View, wanted};
use super::{Device, Machine, Peer, Slot};
use crate::faults::Fate;
use crate::memory::{self, Access, Key, Memory, Span};
use crate::udp::{Frame, HEADER_MAX, Payload, TRAILER_MAX};

/// Frames, and about how many bytes, one queue pair sends before the next has its turn: one
/// UDP_SEGMENT send.
const BURST: usize = 64;
const BURST_BYTES: usize = 61_000;
/// Datagrams that one queue pair sends in one [`Device::transmit`] at most in answer to READs: their
/// number is the peer's choice, up to 2^23 for one request. Then input has its turn.
pub(super) const RESPONSES_MAX: u32 = 256;
/// Byte and bit of the BTH that ask for an acknowledgement.
pub(super) const ACK_REQ: (usize, u8) = (8, 0x80);
/// Region number of payload that was copied for sending.
const SCRATCH: u32 = u32::MAX - 1;

impl Device {
    /// Whether some queue pair has something to send.
    pub(crate) fn has_output(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Sends what queue pairs have to send and budgets allow.
    pub(crate) fn transmit(&mut self, now: Nanos) {
        let mut later = std::mem::take(&mut self.later);
        // Each packet is written over the one before.
        let mut transmit = Transmit::EMPTY;
        while let Some(index) = self.ready.pop_front() {
            self.slots[index as usize].is_ready = false;
            if self.transmit_from(index, now, &mut transmit).is_break() {
                later.push(index);
            }
        }
        self.flush();
        for index in later.drain(..) {
            self.mark_ready(index);
        }
        self.later = later;
    }

    /// One turn of one queue pair; `Break` if it has answered enough for now.
    fn transmit_from(
        &mut self,
        index: u32,
        now: Nanos,
        transmit: &mut Transmit,
    ) -> ControlFlow<()> {
        let slot = &self.slots[index as usize];
        if let Some(Machine::Datagram(_)) = slot.machine {
            self.transmit_datagrams(index);
            return ControlFlow::Continue(());
        }
        let Some(peer) = slot.peer else {
            return ControlFlow::Continue(());
        };
        let Peer {
            address, outlet, ..
        } = self.peers[peer as usize];
        let mut bytes = 0;
        for sent in 0.. {
            if outlet.is_some() {
                match self.act(index, peer) {
                    Act::Nothing => {}
                    Act::Done => continue,
                    Act::More => return ControlFlow::Break(()),
                }
            }
            if sent == BURST || bytes >= BURST_BYTES {
                self.mark_ready(index);
                break;
            }
            let slot = &mut self.slots[index as usize];
            let to = &mut self.peers[peer as usize];
            if slot.responses >= RESPONSES_MAX {
                slot.responses = 0;
                return ControlFlow::Break(());
            }
            let room = to.budget.room();
            // Answers need no room. The peer keeps room for the READ responses it asks for; and an
            // ACK that waits behind one must not wait for the ACKs that we wait for.
            let allow = if room > 0 { Allow::All } else { Allow::Answers };
            let Some(Machine::Connected(qp)) = slot.machine.as_mut() else {
                return ControlFlow::Continue(());
            };
            if !qp.poll_transmit_into(now, allow, transmit) {
                if qp.has_local_work() {
                    self.execute_local(index);
                    continue;
                }
                if room == 0 && qp.has_pending_transmit() && !slot.is_waiting {
                    slot.is_waiting = true;
                    to.waiting.push_back(index);
                }
                slot.responses = 0;
                break;
            }
            bytes += transmit.header().len() + transmit.payload_len() as usize;
            slot.responses += u32::from(transmit.is_response);
            let is_unreliable = qp.kind() == QpKind::Uc;
            let was_last = qp.is_idle();
            let counters = qp.counters();
            let losses = counters.retransmitted_pkts - counters.probes;
            if losses > std::mem::replace(&mut slot.losses, losses) {
                to.budget.note_loss(now);
            }
            if !transmit.is_response {
                self.settle(index);
            }
            let is_last = !transmit.is_response && self.peers[peer as usize].budget.room() == 0;
            let payload = match transmit.payload.as_slice() {
                [] => Ok(Payload::EMPTY),
                _ => self.gather(index, transmit),
            };
            let is_found = payload.is_ok();
            match payload {
                Ok(payload) => match outlet {
                    Some(outlet) => {
                        self.push_host((outlet, address), transmit, payload, is_last);
                    }
                    None => self.push(address, transmit.header(), payload, is_last),
                },
                Err(_) => {
                    // Memory that went away under a posted request, or a peer's READ.
                    if let Some(Machine::Connected(qp)) = &mut self.slots[index as usize].machine {
                        qp.handle_transmit_failure(transmit);
                    }
                    self.settle(index);
                    self.note_finished(index);
                }
            }
            if is_unreliable {
                // What is sent is finished.
                self.note_finished(index);
            }
            if was_last && is_found {
                self.slots[index as usize].responses = 0;
                break;
            }
        }
        let slot = &self.slots[index as usize];
        if let Some(Machine::Connected(qp)) = &slot.machine {
            self.timers.set(index, qp.poll_timeout());
        }
        self.show(index);
        ControlFlow::Continue(())
    }

    /// Carries out the request at the head of a send queue that needs no packet.
    fn execute_local(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        let Some(Machine::Connected(qp)) = slot.machine.as_mut() else {
            return;
        };
        qp.execute_local(&mut View {
            memory: &mut self.memory,
            domain: slot.domain,
            peer_domain: slot.peer_domain,
            qp: slot.qpn.value(),
            placed: None,
            shared: None,
        });
        self.settle(index);
        self.note_finished(index);
    }

    /// Sends one management datagram of queue pair 1: headers and payload.
    pub(crate) fn send_management(&mut self, target: SocketAddr, header: &[u8], payload: &[u8]) {
        let copied = self.scratch_space(payload.len());
        copied.1.copy_from_slice(payload);
        let payload = copied.0;
        self.push(target, header, payload, false);
    }

    /// Room for payload that has to be copied. What it held before is overwritten, not cleared: that
    /// would be another pass over every such packet.
    fn scratch_space(&mut self, len: usize) -> (Payload, &mut [u8]) {
        let start = self.scratch_used;
        self.scratch_used += len;
        if self.scratch.len() < self.scratch_used {
            self.scratch.resize(self.scratch_used, 0);
        }
        let payload = Payload {
            region: SCRATCH,
            offset: start as u64,
            len: len as u32,
        };
        (payload, &mut self.scratch[start..start + len])
    }

    /// Finds a packet's payload: by reference where nobody else can change it, else as a copy.
    pub(super) fn gather(
        &mut self,
        index: u32,
        transmit: &Transmit,
    ) -> Result<Payload, memory::AccessError> {
        let Slot {
            domain,
            peer_domain,
            qpn,
            ..
        } = self.slots[index as usize];
        let fragments = transmit.payload.as_slice();
        let mut payload = Payload::EMPTY;
        for fragment in fragments {
            let (va, len) = (fragment.addr, fragment.len);
            let span = match fragment.key {
                qp::Key::Local(Lkey(key)) => {
                    self.memory
                        .check(domain, Key(key), va, len, Access::default())
                }
                qp::Key::Remote(Rkey(key)) => {
                    let (qp, right) = (qpn.value(), wanted(qp::Access::READ));
                    self.memory
                        .check_peer(peer_domain, qp, Key(key), va, len, right)
                }
            }?;
            if fragments.len() == 1 && self.memory.is_stable(span) {
                return Ok(Payload {
                    region: span.region,
                    offset: span.offset,
                    len: span.len,
                });
            }
            let (copied, _) = self.scratch_space(span.len as usize);
            let into = &mut self.scratch[copied.offset as usize..][..span.len as usize];
            self.memory.fetch(span, into)?;
            match payload.len {
                0 => payload = copied,
                _ => payload.len += span.len,
            }
        }
        Ok(payload)
    }

    /// Adds a packet to the batch. `is_last`: nothing more may follow until the peer acknowledges,
    /// so the packet asks for that, whatever the state machine thought.
    pub(super) fn push(
        &mut self,
        target: SocketAddr,
        header: &[u8],
        payload: Payload,
        is_last: bool,
    ) {
        let mut frame = Frame {
            target,
            header: [0; HEADER_MAX],
            header_len: header.len() as u8,
            trailer_len: (pad_len(payload.len as usize) + 4) as u8,
            trailer: [0; TRAILER_MAX],
            payload,
            is_spoilt: false,
        };
        frame.header[..header.len()].copy_from_slice(header);
        if is_last {
            frame.header[ACK_REQ.0] |= ACK_REQ.1;
        }
        let fate = self.faults.fate(&target);
        match fate {
            Fate::Lose => {
                self.counters.faults_dropped += 1;
                return;
            }
            Fate::Block => {
                self.counters.faults_blocked += 1;
                return;
            }
            Fate::Reorder if self.overtaken.is_none() => {
                self.overtaken = Some(frame);
                return;
            }
            Fate::Corrupt => frame.is_spoilt = true,
            _ => {}
        }
        self.staged.push(frame);
        if fate == Fate::Duplicate && !self.staged.is_full() {
            self.staged.push(frame);
        }
        if !self.staged.is_full()
            && let Some(overtaken) = self.overtaken.take()
        {
            self.staged.push(overtaken);
        }
        if self.staged.is_full() {
            self.flush();
        }
    }

    /// Hands the batch to the kernel.
    pub(crate) fn flush(&mut self) {
        // In a batch that is full `push` has put it off to the next one, which is not.
        if !self.staged.is_full()
            && let Some(overtaken) = self.overtaken.take()
        {
            self.staged.push(overtaken);
        }
        if let Some(hosts) = &mut self.hosts {
            hosts.ring_doorbells();
        }
        if self.staged.is_empty() {
            self.scratch_used = 0;
            return;
        }
        let Device {
            socket,
            staged,
            scratch,
            scratch_used,
            memory,
            counters,
            capture,
            ..
        } = self;
        let local = socket.local_addr();
        let report = socket.send(
            staged,
            |payload| resolve(payload, scratch, memory),
            |frame, payload, identification| {
                seal(local, frame, payload, identification);
                if let Some(capture) = capture {
                    let parts = [frame.header(), payload, frame.trailer()];
                    capture.record(local, frame.target, identification, &parts);
                }
            },
        );
        counters.sent_pkts += report.datagrams;
        counters.tx_bytes += report.bytes;
        counters.gso_sends += report.gso_sends;
        counters.send_err += report.refused;
        *scratch_used = 0;
    }
}

pub(super) fn resolve<'m>(payload: &Payload, scratch: &'m [u8], memory: &'m Memory) -> &'m [u8] {
    match payload.region {
        _ if payload.len == 0 => &[],
        SCRATCH => &scratch[payload.offset as usize..][..payload.len as usize],
        region => memory
            .stable(Span {
                region,
                offset: payload.offset,
                len: payload.len,
            })
            .expect("staged payload outlives its batch"),
    }
}

/// Writes pad and ICRC for the place in a run that the frame got.
fn seal(local: SocketAddr, frame: &mut Frame, payload: &[u8], identification: u16) {
    let Some(flow) = flow(local, frame.target.ip(), frame.target.port()) else {
        return;
    };
    let flow = flow.with_identification(identification);
    let mut crc = Icrc::begin(&flow, frame.header(), frame.wire_len());
    crc.update(payload);
    let (mut trailer, len) = crc.finish(pad_len(payload.len()));
    if frame.is_spoilt {
        trailer[len - 1] ^= 0x10;
    }
    frame.trailer[..len].copy_from_slice(&trailer[..len]);
    frame.trailer_len = len as u8;
}

/// The flow of a packet from `source` to `target`; none if their families differ.
pub(super) fn flow(source: SocketAddr, target: IpAddr, target_port: u16) -> Option<Flow> {
    let ip = match (source.ip(), target) {
        (IpAddr::V4(source), IpAddr::V4(target)) => Ip::V4 {
            source,
            target,
            identification: 0,
            flags: icrc::DONT_FRAGMENT,
        },
        (IpAddr::V6(source), IpAddr::V6(target)) => Ip::V6 { source, target },
        _ => return None,
    };
    Some(Flow {
        ip,
        source_port: source.port(),
        target_port,
    })
}
