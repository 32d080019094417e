//! What the device does for peers on its own host.
//!
//! Owns: the packets that go through rings instead of the socket, the requests that are carried out
//! in the peer's memory without a packet, what peers are shown of our queue pairs, and the end of
//! those whose peer is gone.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};

use lowtide_transport_proto::qp::{
    self, AtomicOp, Fragment, Lkey, QpState, Remote, SendOp, SgList, Transmit,
};
use lowtide_transport_proto::time::Nanos;
use lowtide_transport_proto::wire::{HEADER_LEN_MAX, ICRC_LEN, Packet, Qpn, pad_len};

use super::output::{ACK_REQ, resolve};
use super::{Device, DeviceOptions, Input, Machine, Peer, QpId};
use crate::host::{
    self, Exports, Gone, HostBatch, Hosts, Ours, QpEntry, RING_PACKETS, SameHost, Theirs, Way, Wish,
};
use crate::memory::{Access, Key, Memory};
use crate::udp::{Arrival, Payload, TRAILER_MAX};

/// Bytes that are copied before others have their turn.
const COPY_MAX: usize = 1 << 20;
/// Shorter requests in memory that is not mapped here go as packets: two system calls cost more.
const COPY_MIN: usize = 512;
/// Bodies of packets up to this length are put together with what is around them: three pieces cost more
/// than the copy.
const SHORT_MAX: usize = 128;
/// Pad, ICRC and what fills a word, at most.
const TRAILER_ROOM: usize = 16;
const SHORT_WORDS: usize = (HEADER_LEN_MAX + SHORT_MAX + TRAILER_ROOM) / 8;
/// How often the socket and the connections are looked at by who polls rings.
const LOOK: Nanos = Nanos::from_micros(50);

/// What placing an answer needs; rights for peers are not asked.
const LOCAL_WRITE: Access = Access::LOCAL;

/// What became of the request at the front of a send queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Act {
    /// It needs packets.
    Nothing,
    /// It is finished.
    Done,
    /// Part of it; the rest in the next turn.
    More,
}

/// Listens for peers on this host, if that is wanted and nothing needs a wire.
pub(super) fn open(
    local: SocketAddr,
    options: &DeviceOptions,
    word: u64,
) -> io::Result<(Option<Hosts>, Option<Exports>)> {
    let needs_wire = options.faults.is_any() || options.capture.is_some();
    if options.same_host == SameHost::Udp || needs_wire {
        return Ok((None, None));
    }
    let (hosts, exports) = Hosts::open(local, options.same_host, word)?;
    Ok((Some(hosts), Some(exports)))
}

/// What a request wants of the peer's memory; none for what is not carried out there.
fn wish(op: &SendOp) -> Option<(Remote, Wish, Way)> {
    Some(match *op {
        SendOp::Write(remote) => (remote, Wish::Write, Way::ToThem),
        SendOp::Read(remote) => (remote, Wish::Read, Way::FromThem),
        SendOp::CompareSwap { remote, .. } | SendOp::FetchAdd { remote, .. } => {
            (remote, Wish::Atomic, Way::FromThem)
        }
        _ => return None,
    })
}

impl Device {
    /// Whether the socket, and the connections to peers on this host, are to be looked at now. Those
    /// who poll rings all the time do so every [`LOOK`] only.
    pub(crate) fn is_look_due(&mut self, now: Nanos) -> bool {
        let is_due = self.hosts.is_none() || now.since(self.looked) >= LOOK;
        if is_due {
            self.looked = now;
        }
        is_due
    }

    /// A file descriptor that is readable when something comes from this host for somebody who sleeps.
    pub(crate) fn host_fd(&self) -> Option<RawFd> {
        self.hosts.as_ref().map(Hosts::as_raw_fd)
    }

    /// Whether who drives the device may sleep; else something has come.
    pub(crate) fn may_sleep(&self) -> bool {
        self.hosts.as_ref().is_none_or(Hosts::may_sleep)
    }

    /// Queue pairs whose peers are reached by rings, and by the socket.
    pub(crate) fn paths(&self) -> (usize, usize) {
        let peers = self.slots.iter().filter_map(|slot| slot.peer);
        let (by_ring, by_wire): (Vec<u32>, Vec<u32>) =
            peers.partition(|peer| self.peers[*peer as usize].outlet.is_some());
        (by_ring.len(), by_wire.len())
    }

    /// Sees to the connections with peers on this host.
    pub(crate) fn attend(&mut self) {
        if let (Some(hosts), Some(exports)) = (&mut self.hosts, &mut self.memory.exports) {
            hosts.attend(exports);
        }
    }

    /// Takes what has come through rings into `batch`; whether that was all.
    pub(crate) fn receive_host(&mut self, batch: &mut HostBatch) -> bool {
        match &mut self.hosts {
            Some(hosts) => hosts.receive(batch),
            None => true,
        }
    }

    /// Ends what was under way to peers that are gone; those that had nothing to spare for a ring are
    /// reached by UDP from now on. To be called when all that came has been
    /// handled.
    pub(crate) fn bury(&mut self) {
        let (Some(hosts), Some(exports)) = (&mut self.hosts, &mut self.memory.exports) else {
            return;
        };
        hosts.sweep(exports);
        while let Some(Gone {
            outlet,
            is_turned_away,
        }) = self.hosts.as_mut().and_then(Hosts::poll_gone)
        {
            let gone = |peer: &&mut super::Peer| peer.users > 0 && peer.outlet == Some(outlet);
            let Some(peer) = self.peers.iter_mut().find(gone) else {
                continue;
            };
            if is_turned_away && let Some(hosts) = &mut self.hosts {
                // By UDP, then; what was sent into the ring is lost, and repeated.
                peer.outlet = None;
                match peer.told {
                    Some(datagrams) => peer.budget.learn(datagrams),
                    None => peer.budget.forget(),
                }
                hosts.disconnect(outlet);
                continue;
            }
            peer.is_gone = true;
            let address = peer.address;
            for index in 0..self.slots.len() as u32 {
                let peer = self.slots[index as usize].peer;
                if peer.is_some_and(|peer| self.peers[peer as usize].address == address) {
                    self.mark_ready(index);
                }
            }
        }
    }

    /// A receive was posted. If the peer is gone it ends, as those did that were posted before.
    pub(crate) fn note_receive(&mut self, id: QpId) {
        let peer = self.slots[id.0 as usize].peer;
        if let Some(peer) = peer.filter(|peer| self.peers[*peer as usize].is_gone) {
            let _ = self.act(id.0, peer);
        }
    }

    /// Finds the way to a peer on this host.
    pub(super) fn meet(&mut self, index: u32) {
        let Some(hosts) = &mut self.hosts else { return };
        let peer = &mut self.peers[index as usize];
        if let Some(gone) = peer.outlet.filter(|_| peer.is_gone) {
            hosts.disconnect(gone);
            (peer.outlet, peer.is_gone) = (None, false);
        }
        if peer.outlet.is_none() {
            peer.outlet = hosts.connect(peer.address);
        }
        if peer.outlet.is_some() {
            peer.budget.learn(RING_PACKETS);
        }
    }

    /// Shows peers on this host what they may do to a queue pair.
    pub(super) fn show(&mut self, index: u32) {
        let Some(exports) = &mut self.memory.exports else {
            return;
        };
        let slot = &mut self.slots[index as usize];
        let entry = match &slot.machine {
            Some(Machine::Connected(qp)) if takes_requests(qp.state()) => Some(QpEntry {
                rights: [
                    qp.access().remote_write,
                    qp.access().remote_read,
                    qp.access().remote_atomic,
                ],
                domain: slot.peer_domain,
            }),
            _ => None,
        };
        if slot.shown != entry {
            slot.shown = entry;
            show_anew(exports, slot.qpn, entry);
        }
    }

    /// Sends a packet through a ring.
    pub(super) fn push_host(
        &mut self,
        (outlet, target): (u32, SocketAddr),
        transmit: &Transmit,
        payload: Payload,
        is_last: bool,
    ) {
        let Some(hosts) = &mut self.hosts else { return };
        if self.faults.is_blocked(&target) {
            self.counters.faults_blocked += 1;
            return;
        }
        let mut words = [[0; 8]; SHORT_WORDS];
        let bytes = words.as_flattened_mut();
        // With what lies behind it: a copy of fixed length.
        let (header, header_len) = transmit.header_room();
        bytes[..HEADER_LEN_MAX].copy_from_slice(header);
        if is_last {
            bytes[ACK_REQ.0] |= ACK_REQ.1;
        }
        let body = resolve(&payload, &self.scratch, &self.memory);
        let trailer_len = pad_len(body.len()) + ICRC_LEN;
        let is_sent = if body.len() <= SHORT_MAX {
            let end = header_len + body.len();
            bytes[header_len..end].copy_from_slice(body);
            // Pad, the place of the ICRC, and the rest of the last word.
            bytes[end..end + TRAILER_ROOM].fill(0);
            let len = end + trailer_len;
            hosts.send_words(outlet, &words[..len.div_ceil(8)], len)
        } else {
            hosts.send(
                outlet,
                &[&bytes[..header_len], body, &[0; TRAILER_MAX][..trailer_len]],
            )
        };
        match is_sent {
            true => self.counters.host_tx_packets += 1,
            false => self.counters.host_lost_packets += 1,
        }
    }

    /// Takes a packet that came through a ring.
    pub(crate) fn handle_host(&mut self, now: Nanos, source: SocketAddr, bytes: &[u8]) -> Input {
        if self.faults.is_blocked(&source) {
            self.counters.faults_blocked += 1;
            return Input::Dropped;
        }
        let Ok(packet) = Packet::new_checked(bytes) else {
            self.counters.rx_malformed += 1;
            return Input::Dropped;
        };
        // It never was on a wire: nothing is sealed, and nothing but connections comes this way.
        self.counters.host_rx_packets += 1;
        self.handle_unicast(now, &host_arrival(source, bytes), 0, &packet)
    }

    /// Carries out the request at the front of a queue pair's send queue in the memory of its peer, if
    /// it can be; or fails it, if the peer is gone.
    #[inline(always)] // asked before each packet, and of a SEND there is nothing to do
    pub(super) fn act(&mut self, index: u32, peer: u32) -> Act {
        let slot = &mut self.slots[index as usize];
        if let Some(Machine::Connected(qp)) = &slot.machine
            && qp.untouched().is_none_or(|op| wish(op).is_none())
            && !self.peers[peer as usize].is_gone
        {
            slot.copied = 0;
            return Act::Nothing;
        }
        self.act_on(index, peer)
    }

    fn act_on(&mut self, index: u32, peer: u32) -> Act {
        let slot = &mut self.slots[index as usize];
        // It stays only if more is copied now: whatever goes as packets goes whole.
        let from = std::mem::take(&mut slot.copied);
        let (
            Some(Machine::Connected(qp)),
            Peer {
                address,
                outlet: Some(outlet),
                is_gone,
                ..
            },
        ) = (&mut slot.machine, &self.peers[peer as usize])
        else {
            return Act::Nothing;
        };
        if *is_gone {
            if qp.handle_peer_gone() {
                self.settle(index);
                self.note_finished(index);
            }
            return Act::Nothing;
        }
        let Some(op) = qp.untouched() else {
            return Act::Nothing;
        };
        let Some((remote, wish, way)) = wish(op) else {
            return Act::Nothing;
        };
        let (op, local, dest) = (*op, qp.front_list(), qp.dest());
        let len = local.total() as usize;
        if len == 0 {
            return Act::Nothing;
        }
        if self.faults.is_blocked(address) {
            return Act::Nothing;
        }
        let Some(direct) = self.hosts.as_mut().and_then(|hosts| hosts.direct(*outlet)) else {
            return Act::Nothing;
        };
        let range = (remote.va, len);
        let Some(theirs) = direct.find(dest.value(), Key(remote.rkey.0), range, wish) else {
            return Act::Nothing;
        };
        let domain = slot.domain;
        let memory = &mut self.memory;
        let done = match op {
            SendOp::Write(_) | SendOp::Read(_) => {
                copy_some(memory, domain, &local, (from, COPY_MAX), theirs, way)
            }
            _ => atomic(memory, domain, (&op, &local), remote.va, theirs).map(|()| len),
        };
        drop(direct);
        // What was refused is asked for by packets, and the peer says what is wrong.
        let Some(done) = done else {
            return Act::Nothing;
        };
        if done < len {
            self.slots[index as usize].copied = done;
            return Act::More;
        }
        if let Some(Machine::Connected(qp)) = &mut self.slots[index as usize].machine {
            qp.finish_untouched();
        }
        self.counters.host_direct += 1;
        self.settle(index);
        self.note_finished(index);
        Act::Done
    }
}

/// A packet from a ring as one from a socket.
fn host_arrival(source: SocketAddr, bytes: &[u8]) -> Arrival<'_> {
    Arrival {
        source,
        target: None,
        bytes,
        segment: bytes.len().max(1),
        is_truncated: false,
        is_congested: false,
        overflow: None,
    }
}

#[cold]
fn show_anew(exports: &mut Exports, qpn: Qpn, entry: Option<QpEntry>) {
    exports.show_qp(qpn.value(), entry);
}

fn takes_requests(state: QpState) -> bool {
    matches!(
        state,
        QpState::Rtr | QpState::Rts | QpState::Sqd | QpState::Sqe
    )
}

/// Copies up to `most` bytes of a request, from its byte `from` on; how far it has come.
fn copy_some(
    memory: &mut Memory,
    domain: u32,
    local: &SgList,
    (from, most): (usize, usize),
    theirs: Theirs<'_>,
    way: Way,
) -> Option<usize> {
    let total = local.total() as usize;
    if matches!(theirs, Theirs::Process(..)) && total < COPY_MIN {
        return None;
    }
    let end = total.min(from + most);
    let mut at = from;
    for fragment in local.slice(from as u32, (end - from) as u32).as_slice() {
        let ours = place_of(memory, domain, fragment, way)?;
        let theirs = match theirs {
            Theirs::Mapped(segment, offset) => Theirs::Mapped(segment, offset + at),
            Theirs::Process(pid, address) => Theirs::Process(pid, address + at as u64),
        };
        host::copy(ours, theirs, way).ok()?;
        at += ours.len;
    }
    Some(end)
}

/// Performs an atomic on a word that is mapped here.
fn atomic(
    memory: &mut Memory,
    domain: u32,
    (op, local): (&SendOp, &SgList),
    va: u64,
    theirs: Theirs<'_>,
) -> Option<()> {
    let op = match *op {
        SendOp::CompareSwap { compare, swap, .. } => AtomicOp::CompareSwap { compare, swap },
        SendOp::FetchAdd { add, .. } => AtomicOp::FetchAdd { add },
        _ => return None,
    };
    let Theirs::Mapped(segment, offset) = theirs else {
        return None;
    };
    let [sge] = local.elements() else {
        return None;
    };
    let is_aligned = va.is_multiple_of(8) && offset.is_multiple_of(8);
    let word = segment.words().get(offset / 8).filter(|_| is_aligned)?;
    let key = Key(sge.lkey.0);
    let span = memory.check(domain, key, sge.addr, 8, LOCAL_WRITE).ok()?;
    // The place of the old value is looked at before the word changes: it must not be lost.
    memory.place_of(span).filter(|ours| ours.is_lasting)?;
    let old = host::atomic(word, op);
    memory.place(span, &old.to_ne_bytes()).ok()
}

/// Where a stretch of the request's own memory lies, if it may be used so.
fn place_of(memory: &mut Memory, domain: u32, fragment: &Fragment, way: Way) -> Option<Ours> {
    let wanted = match way {
        Way::ToThem => Access::default(),
        Way::FromThem => LOCAL_WRITE,
    };
    let qp::Key::Local(Lkey(key)) = fragment.key else {
        return None;
    };
    let span = memory.check(domain, Key(key), fragment.addr, fragment.len, wanted);
    memory.place_of(span.ok()?)
}

#[cfg(test)]
mod tests;
