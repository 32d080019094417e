//! What comes in: datagrams, completions, the payload of parcels.
//!
//! Owns: the way from a datagram to the handler. Messages are handed up where they arrived; those
//! behind a message that is still being fetched are held back, and their credits with them.

use std::io;
use std::net::SocketAddr;

use lowtide_transport_proto::qp::{CompletionKind, Status};
use lowtide_transport_proto::time::Nanos;

use super::super::connection::Arrived;
use super::super::connection::Stream;
use super::super::parcel::{Lane, next_record};
use super::super::{CloseReason, ConnId, Event, Violation};
use super::super::{fabric, handshake};
use super::{EndpointCtx, Handler};
use crate::device::{Input, QpId};
use crate::host::HostBatch;
use crate::udp::{Arrival, ReceiveBatch};

/// Reassembly buffers kept for the next message of several packets.
const SPARE_MAX: usize = 4;
/// Completions of a device of libibverbs taken in one turn.
const COMPLETIONS_MAX: usize = 256;

impl EndpointCtx {
    /// Takes what has come through rings from peers on this host; whether that was all.
    pub(super) fn receive_host(
        &mut self,
        now: Nanos,
        batch: &mut HostBatch,
        handler: &mut Handler<'_>,
    ) -> bool {
        let Some(device) = self.device.soft() else {
            return true;
        };
        let is_drained = device.receive_host(batch);
        for (source, packet) in batch.packets() {
            let Some(device) = self.device.soft() else {
                break;
            };
            let input = device.handle_host(now, source, packet);
            let id = input.queue_pair();
            self.take(now, source, packet, input, handler);
            self.take_kept(now, source, id, handler);
        }
        if is_drained && let Some(device) = self.device.soft() {
            device.bury();
        }
        is_drained
    }

    /// Takes what the socket of softroce has; whether that was all.
    pub(super) fn receive_packets(
        &mut self,
        now: Nanos,
        batch: &mut ReceiveBatch,
        handler: &mut Handler<'_>,
    ) -> io::Result<bool> {
        let Some(device) = self.device.soft() else {
            return Ok(true);
        };
        if !device.is_look_due(now) {
            return Ok(false);
        }
        device.attend();
        let filled = device.receive(batch)?;
        for slot in 0..filled {
            match batch.arrival(slot) {
                Some(arrival) if !arrival.is_truncated => self.arrive(now, &arrival, handler),
                _ => {
                    if let Some(device) = self.device.soft() {
                        device.count_malformed();
                    }
                }
            }
        }
        Ok(filled < batch.capacity())
    }

    /// Takes what a device of libibverbs has done, and what came beside it; whether that was all.
    ///
    /// The connection manager's datagrams are read first and heeded last: a goodbye must not overtake
    /// messages that came before it.
    ///
    /// # Errors
    /// The device is gone.
    pub(super) fn receive_completions(
        &mut self,
        now: Nanos,
        handler: &mut Handler<'_>,
    ) -> io::Result<bool> {
        let is_last = self.device.receive_mads();
        for _ in 0..COMPLETIONS_MAX {
            match self.device.next_input() {
                None => {
                    self.device.check()?;
                    for (from, mad) in self.device.take_mads() {
                        self.note_mixed(from, handshake::is_wrapped(&mad));
                        self.handshakes.handle(now, from, &mad);
                        self.manage(now, handler);
                    }
                    return Ok(is_last);
                }
                Some(fabric::Input::Completed(id)) => {
                    self.note_heard(id, now);
                    self.poll_completions(id, None, handler);
                }
                Some(fabric::Input::Parcel(id, received)) => {
                    self.note_heard(id, now);
                    self.poll_completions(id, Some((0, &received)), handler);
                    self.device.recycle(received);
                }
            }
        }
        Ok(false)
    }

    /// Says, once, that a peer's connection manager speaks by another way than ours: the two would ask
    /// each other in vain for ever.
    fn note_mixed(&mut self, from: SocketAddr, is_mixed: bool) {
        if is_mixed && !std::mem::replace(&mut self.is_mixed_told, true) {
            tracing::error!(
                %from,
                "one of us uses softroce and the other a device of libibverbs: \
                 all nodes of a cluster need the same provider"
            );
        }
    }

    fn arrive(&mut self, now: Nanos, arrival: &Arrival<'_>, handler: &mut Handler<'_>) {
        let datagrams = arrival.bytes.len().div_ceil(arrival.segment);
        if let Some(device) = self.device.soft() {
            device.count_receive(arrival.bytes.len(), datagrams as u64, arrival.overflow);
        }
        for (place, datagram) in arrival.datagrams() {
            let Some(device) = self.device.soft() else {
                return;
            };
            let input = device.handle(now, arrival, place, datagram);
            let id = input.queue_pair();
            self.take(now, arrival.source, datagram, input, handler);
            self.take_kept(now, arrival.source, id, handler);
        }
    }

    /// Takes what was kept behind the packet that a queue pair has just taken.
    fn take_kept(
        &mut self,
        now: Nanos,
        source: SocketAddr,
        id: Option<QpId>,
        handler: &mut Handler<'_>,
    ) {
        let kept = |ctx: &mut Self| ctx.device.soft()?.handle_kept(now, id?);
        while let Some((input, datagram)) = kept(self) {
            self.take(now, source, &datagram, input, handler);
            if let Some(device) = self.device.soft() {
                device.give_back(datagram);
            }
        }
    }

    fn take(
        &mut self,
        now: Nanos,
        source: SocketAddr,
        datagram: &[u8],
        input: Input,
        handler: &mut Handler<'_>,
    ) {
        match input {
            Input::Dropped => self.note_mixed(source, handshake::is_bare(datagram)),
            // Nobody here is in a multicast group.
            Input::Delivered => {}
            Input::Taken { id, placed } => {
                let placed = placed.map(|(offset, range)| (offset, &datagram[range]));
                self.note_heard(id, now);
                self.poll_completions(id, placed, handler);
            }
            Input::Management(range) => {
                self.handshakes.handle(now, source, &datagram[range]);
                self.manage(now, handler);
            }
            Input::UnknownQueuePair(qpn) => self.handshakes.complain(now, source, qpn),
        }
    }

    fn note_heard(&mut self, id: QpId, now: Nanos) {
        if let Some(index) = self.served_by(id)
            && let Some(connection) = &mut self.connections[index as usize]
        {
            connection.heard = now;
        }
    }

    /// Takes what a queue pair reports; `placed` is the payload that the packet just handled
    /// brought, and its offset in its parcel.
    pub(super) fn poll_completions(
        &mut self,
        id: QpId,
        placed: Option<(u64, &[u8])>,
        handler: &mut Handler<'_>,
    ) {
        let Some(index) = self.served_by(id) else {
            return;
        };
        let mut is_last = false;
        let mut failure = None;
        let mut is_acknowledged = false;
        let mut is_fetched = false;
        while let Some((status, kind)) = self.device.poll_completion(id) {
            match (status, kind) {
                (Status::Success, CompletionKind::Recv) => is_last = true,
                (Status::Success, CompletionKind::Read) => is_fetched |= self.note_read(index),
                (Status::Success, _) => {
                    is_acknowledged = true;
                    if let Some(stream) = self.stream(index) {
                        stream.0.outbox.complete(stream.1);
                    }
                }
                (
                    Status::RemoteAccess | Status::RemoteInvalidRequest | Status::BadResponse,
                    CompletionKind::Read,
                ) => failure = Some(CloseReason::Violation(Violation::OfferKey)),
                _ => failure = failure.or(Some(CloseReason::Failed)),
            }
        }
        if let Some((offset, payload)) = placed {
            self.take_payload(index, offset, payload, is_last, handler);
        } else if is_last {
            // A SEND without a byte: not even a parcel's header.
            let reason = CloseReason::Violation(Violation::Layout);
            self.end(index, reason, handler);
        }
        // The handler may have closed the connection, and another may have its place.
        if self.served_by(id) != Some(index) {
            return;
        }
        if let Some(reason) = failure {
            self.end(index, reason, handler);
            return;
        }
        if is_fetched {
            self.hand_up_waiting(index, handler);
        }
        if is_acknowledged && self.served_by(id) == Some(index) {
            self.mark_dirty(index);
            self.offer_room(index, handler);
        }
    }

    fn take_payload(
        &mut self,
        index: u32,
        offset: u64,
        payload: &[u8],
        is_last: bool,
        handler: &mut Handler<'_>,
    ) {
        // The first packet may overtake the RTU: then it is as good as one.
        self.establish(index, handler);
        let Some(connection) = &mut self.connections[index as usize] else {
            return;
        };
        let (conn, qp) = (connection.id, connection.qp);
        let Some(stream) = &mut connection.stream else {
            return;
        };
        let arrived = stream.receive(payload, offset, is_last, &mut self.spare);
        let lane = stream.lane();
        if is_last {
            if !self.device.post_receive(qp) {
                self.end(index, CloseReason::Failed, handler);
                return;
            }
            self.mark_dirty(index);
        }
        let taken = match arrived {
            Ok(Arrived::Nothing) => return,
            Ok(Arrived::Credit { taken }) => self.end_taken(index, taken, handler),
            Ok(Arrived::Offer { len, rkey, offer }) => self.note_offer(index, len, rkey, offer),
            Ok(Arrived::Whole(range)) => {
                self.take_message(conn, lane, &payload[range], handler);
                self.give_credit(conn, lane);
                Ok(())
            }
            Ok(Arrived::Records { count, body }) => {
                let mut body = &payload[body];
                for _ in 0..count {
                    let Ok(bytes) = next_record(&mut body) else {
                        break;
                    };
                    self.take_message(conn, lane, bytes, handler);
                }
                self.give_credit(conn, lane);
                Ok(())
            }
            Ok(Arrived::Assembled(bytes)) => {
                self.take_assembled(conn, lane, bytes, handler);
                self.give_credit(conn, lane);
                Ok(())
            }
            Err(violation) => Err(violation),
        };
        if let Err(violation) = taken {
            self.end(index, CloseReason::Violation(violation), handler);
        }
    }

    /// Hands a message up in place, or keeps a copy if others must go first. Nothing happens if the
    /// handler has closed the connection meanwhile.
    fn take_message(&mut self, conn: ConnId, lane: Lane, bytes: &[u8], handler: &mut Handler<'_>) {
        let Some(stream) = self.stream_of(conn) else {
            return;
        };
        if is_held(stream, lane) {
            stream.inbox.hold(bytes.to_vec());
            let counters = self.device.counters_mut();
            counters.copies += 1;
            counters.held_copied_bytes += bytes.len() as u64;
        } else {
            self.hand_up(conn, lane, bytes, handler);
        }
    }

    fn take_assembled(
        &mut self,
        conn: ConnId,
        lane: Lane,
        bytes: Vec<u8>,
        handler: &mut Handler<'_>,
    ) {
        let counters = self.device.counters_mut();
        counters.copies += 1;
        counters.assembled_copied_bytes += bytes.len() as u64;
        let Some(stream) = self.stream_of(conn) else {
            return;
        };
        if is_held(stream, lane) {
            stream.inbox.hold(bytes);
        } else {
            self.hand_up(conn, lane, &bytes, handler);
            self.keep_spare(bytes);
        }
    }

    pub(super) fn keep_spare(&mut self, mut bytes: Vec<u8>) {
        if self.spare.len() < SPARE_MAX {
            bytes.clear();
            self.spare.push(bytes);
        }
    }

    /// A parcel has been dealt with: its credit goes back, behind what is held.
    fn give_credit(&mut self, conn: ConnId, lane: Lane) {
        if let Some(stream) = self.stream_of(conn) {
            if is_held(stream, lane) {
                stream.inbox.hold_credit();
            } else {
                stream.owe(lane);
            }
        }
    }

    pub(super) fn hand_up(
        &mut self,
        conn: ConnId,
        lane: Lane,
        bytes: &[u8],
        handler: &mut Handler<'_>,
    ) {
        let counters = self.device.counters_mut();
        counters.messages += 1;
        counters.urgent_messages += u64::from(lane == Lane::Urgent);
        handler(self, Event::Message { conn, bytes });
    }

    fn stream_of(&mut self, conn: ConnId) -> Option<&mut Stream> {
        let index = self.index(conn)?;
        self.connections[index as usize].as_mut()?.stream.as_mut()
    }
}

/// Whether messages of a lane must wait until others have been fetched.
fn is_held(stream: &Stream, lane: Lane) -> bool {
    lane == Lane::Ordinary && stream.inbox.is_holding()
}
