//! Long messages: lent by one end, fetched by the other by RDMA READ.
//!
//! Owns: what happens to a connection, and to those that wait for room, when something is lent,
//! offered, fetched or taken. The bounds are `loans`' and `fetch`'s.
//!
//! No cycle of waiting can form. A loan waits for the peer to take it; taking waits for a slab and for
//! READ responses; a slab is freed when its message has been handed up, whatever the peer does
//! next; responses and the word that a loan was taken need no credit, no loan and no slab of the
//! other direction. So two ends whose pools are full of messages for each other both go on.

use super::super::connection::Stream;
use super::super::fetch::Ready;
use super::super::outbox::SlotPool;
use super::super::parcel::{Lane, MESSAGE_MAX, Offer};
use super::super::{ConnId, Event, SendError, Violation};
use super::shortage::Need;
use super::{EndpointCtx, Handler};
use std::hash::BuildHasher;

use crate::memory::Lent;

impl EndpointCtx {
    /// Whether a message of `len` bytes may be sent; its connection's index.
    pub(super) fn admit(&mut self, conn: ConnId, len: usize) -> Result<u32, SendError> {
        if len > self.config.limits.message_max {
            return Err(SendError::TooLarge);
        }
        let index = self.index(conn).ok_or(SendError::Closed)?;
        let connection = self.connections[index as usize]
            .as_ref()
            .ok_or(SendError::Closed)?;
        let Some(stream) = &connection.stream else {
            return Err(SendError::WouldBlock);
        };
        if len > MESSAGE_MAX && !stream.loans.admits(&self.lending, len) {
            return Err(self.refuse(index, len));
        }
        Ok(index)
    }

    /// There is no room for a message; `Writable` will follow.
    pub(super) fn refuse(&mut self, index: u32, len: usize) -> SendError {
        if let Some(connection) = &mut self.connections[index as usize] {
            connection.refused = Some(len);
        }
        if len > MESSAGE_MAX && !self.lending.refused.contains(&index) {
            self.lending.refused.push_back(index);
        }
        SendError::WouldBlock
    }

    /// Lends an admitted message and queues the offer.
    ///
    /// # Errors
    /// The message again, and why it was not taken.
    pub(super) fn lend(&mut self, index: u32, lent: Lent) -> Result<(), (SendError, Lent)> {
        let len = lent.len();
        let connection = self.connections[index as usize].as_mut();
        let Some(stream) = connection.and_then(|connection| connection.stream.as_mut()) else {
            return Err((SendError::Closed, lent));
        };
        let memory = self.device.memory();
        let mut draw = || {
            self.draws += 1;
            self.random.hash_one(self.draws) as u32
        };
        let lending = &mut self.lending;
        let (key, offer) = match stream.loans.lend(lending, memory, &mut draw, lent) {
            Ok(lent) => lent,
            Err(lent) => {
                self.note_memory(index, Need::Send, true);
                return Err((self.refuse(index, len), lent));
            }
        };
        let told = (len as u32, key);
        let outbox = &mut stream.outbox;
        if outbox
            .push_offer(&mut self.pool, memory, told, offer)
            .is_err()
        {
            let lent = stream.loans.end_newest(lending, memory);
            let is_refused = self.pool.take_refused();
            self.note_memory(index, Need::Send, is_refused);
            return Err((self.refuse(index, len), lent));
        }
        self.note_memory(index, Need::Send, false);
        self.device.counters_mut().bulk_offered += 1;
        self.mark_dirty(index);
        Ok(())
    }

    /// The peer says how many offers it has taken: that memory is free again.
    pub(super) fn end_taken(
        &mut self,
        index: u32,
        taken: u32,
        handler: &mut Handler<'_>,
    ) -> Result<(), Violation> {
        let Some(stream) = self.connections[index as usize]
            .as_mut()
            .and_then(|connection| connection.stream.as_mut())
        else {
            return Ok(());
        };
        let memory = self.device.memory();
        if stream.loans.end_taken(&mut self.lending, memory, taken)? {
            self.lending.note_freed();
            self.offer_room(index, handler);
        }
        Ok(())
    }

    /// The peer offers a message.
    pub(super) fn note_offer(
        &mut self,
        index: u32,
        len: u32,
        rkey: u32,
        offer: Offer,
    ) -> Result<(), Violation> {
        let message_max = self.config.limits.message_max;
        let Some(stream) = self.connections[index as usize]
            .as_mut()
            .and_then(|connection| connection.stream.as_mut())
        else {
            return Ok(());
        };
        stream.inbox.offer(len, rkey, offer, message_max)?;
        // An offer takes no memory to speak of, and how many there are is bounded.
        stream.owe(Lane::Ordinary);
        self.fetching.enter(&mut stream.inbox, index);
        Ok(())
    }

    /// Posts READs for whoever is in line, a segment each in turn.
    pub(super) fn ask(&mut self) {
        while let Some(index) = self.fetching.next() {
            let Some(connection) = &mut self.connections[index as usize] else {
                continue;
            };
            let qp = connection.qp;
            let Some(stream) = &mut connection.stream else {
                continue;
            };
            let Some(packet_len) = self.device.packet_len(qp) else {
                continue;
            };
            let (fetching, device) = (&mut self.fetching, &mut self.device);
            stream.inbox.ask(fetching, device, qp, packet_len, index);
            let is_refused = fetching.take_refused();
            self.note_memory(index, Need::Fetch, is_refused);
        }
    }

    /// A READ has completed. Returns whether a message is complete.
    pub(super) fn note_read(&mut self, index: u32) -> bool {
        let Some(stream) = self.connections[index as usize]
            .as_mut()
            .and_then(|connection| connection.stream.as_mut())
        else {
            return false;
        };
        let (fetching, device) = (&mut self.fetching, &mut self.device);
        stream.inbox.note_read(fetching, device, index)
    }

    /// Hands up what has waited and need not any more.
    pub(super) fn hand_up_waiting(&mut self, index: u32, handler: &mut Handler<'_>) {
        let Some(conn) = self.connections[index as usize].as_ref().map(|c| c.id) else {
            return;
        };
        self.mark_dirty(index);
        while self.index(conn).is_some() {
            let Some(stream) = self.connections[index as usize]
                .as_mut()
                .and_then(|connection| connection.stream.as_mut())
            else {
                return;
            };
            match stream.inbox.pop(&mut self.fetching, &mut self.device) {
                None => return,
                Some(Ready::Credit) => stream.owe(Lane::Ordinary),
                Some(Ready::Message(bytes)) => {
                    self.hand_up(conn, Lane::Ordinary, &bytes, handler);
                    self.keep_spare(bytes);
                }
                Some(Ready::Fetched(slab, range)) => {
                    self.device.counters_mut().bulk_fetched += 1;
                    self.handing_up = Some((slab.clone(), range.start));
                    self.hand_up(conn, Lane::Ordinary, &slab[range], handler);
                    self.handing_up = None;
                    self.fetching.recycle(slab);
                }
            }
        }
    }

    pub(super) fn stream(&mut self, index: u32) -> Option<(&mut Stream, &mut SlotPool)> {
        let connection = self.connections[index as usize].as_mut()?;
        Some((connection.stream.as_mut()?, &mut self.pool))
    }

    /// Tells a caller that was refused that there is room again, if there is.
    pub(super) fn offer_room(&mut self, index: u32, handler: &mut Handler<'_>) {
        let Some(connection) = &mut self.connections[index as usize] else {
            return;
        };
        let Some(stream) = &connection.stream else {
            return;
        };
        let has_room = connection.refused.is_some_and(|len| {
            stream.outbox.is_roomy(Lane::Ordinary)
                && (len <= MESSAGE_MAX || stream.loans.is_roomy(&self.lending, len))
        });
        let has_urgent_room = connection.is_urgent_refused && stream.outbox.is_roomy(Lane::Urgent);
        if has_room {
            connection.refused = None;
            self.lending.refused.retain(|other| *other != index);
        }
        connection.is_urgent_refused &= !has_urgent_room;
        if has_room || has_urgent_room {
            let conn = connection.id;
            handler(self, Event::Writable { conn });
        }
    }

    /// The same for everybody who was refused for want of room to lend, if some was freed.
    pub(super) fn offer_room_to_all(&mut self, handler: &mut Handler<'_>) {
        if !self.lending.take_freed() {
            return;
        }
        let refused = self.lending.refused.clone();
        for index in refused {
            self.offer_room(index, handler);
        }
    }
}
