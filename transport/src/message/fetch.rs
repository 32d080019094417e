//! Messages that we READ from the peer, and what came behind them.
//!
//! Owns: the bound on everything an endpoint READs at once ([`FetchPool`]), and one connection's line of
//! messages that cannot be handed up yet ([`Inbox`]): offers being fetched, and what arrived after
//! them, held back so that the order stays.
//!
//! A message is fetched into a slab of its own by READs of at most [`SEGMENT_PACKETS`] response
//! packets, several at a time. All responses come to our one socket, whoever sends them; so the
//! packets asked for and not yet here are bounded by what its receive buffer holds, over all
//! connections.
//!
//! Invariants:
//! * slabs being filled are together no more than the pool's bound, and one connection's no more
//!   than its share, so that a few peers that have stopped answering leave room for the rest;
//! * a connection in line for room or for packets is in line once;
//! * only the front of `fetches` has READs that complete next: they complete in the order posted.
//!
//! Deliberately absent: credits for what is held (`endpoint` gives them back when it is handed up,
//! which bounds it), and lending (`loans`).

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use lowtide_transport_proto::qp::{Remote, Rkey};

use super::fabric::Fabric;
use super::loans::OFFERS_MAX;
use super::parcel::{MESSAGE_MAX, Offer};
use super::{Limits, Violation};
use crate::device::QpId;
use crate::memory::Key;

/// READs of one connection under way.
pub(crate) const READS_MAX: usize = 4;
/// Response packets of one READ: with the last of the one before, two full runs of segments.
const SEGMENT_PACKETS: u32 = 63;
/// One connection's share of the pool, in parts, unless the longest message is more.
const SHARES: usize = 4;
/// Bytes of slabs kept for the next message, those included that the caller still shares.
const SPARE_BYTES_MAX: usize = 16 << 20;
/// Slabs are as long as a multiple of this, so that they fit the next message too.
const SLAB_STEP: usize = 64 << 10;
/// A message begins at an address that is a multiple of this.
const ALIGN: usize = 4096;

/// What an endpoint fetches in all.
#[derive(Debug)]
pub(crate) struct FetchPool {
    domain: u32,
    bytes: usize,
    bytes_max: usize,
    bytes_peak: usize,
    share_max: usize,
    /// Response packets asked for and not here.
    packets: u32,
    packets_max: u32,
    /// Slabs that were in use. Those that the caller still shares are not taken again.
    spare: VecDeque<Arc<[u8]>>,
    spare_bytes: usize,
    /// Connections that have something to ask for.
    line: VecDeque<u32>,
    /// Connections that found no room for a slab.
    starved: VecDeque<u32>,
    /// Whether memory for a slab was refused since that was last asked.
    is_refused: bool,
}

impl FetchPool {
    /// `receive_budget` is how many full datagrams our receive buffer holds.
    pub(crate) fn new(domain: u32, limits: &Limits, receive_budget: u32) -> FetchPool {
        FetchPool {
            domain,
            bytes: 0,
            bytes_max: limits.fetched_max,
            bytes_peak: 0,
            share_max: limits.message_max.max(limits.fetched_max / SHARES),
            packets: 0,
            // A quarter is left for what peers send unasked.
            packets_max: (receive_budget / 4 * 3).max(2),
            spare: VecDeque::new(),
            spare_bytes: 0,
            line: VecDeque::new(),
            starved: VecDeque::new(),
            is_refused: false,
        }
    }

    /// Whether slabs are being filled, which will be free then.
    pub(crate) fn is_any_filled(&self) -> bool {
        self.bytes > 0
    }

    /// Whether memory was refused since this was last asked.
    pub(crate) fn take_refused(&mut self) -> bool {
        std::mem::take(&mut self.is_refused)
    }

    /// Whoever found no room is in line again.
    pub(crate) fn retry(&mut self) {
        self.line.append(&mut self.starved);
    }

    /// The most that was ever fetched at once, in bytes.
    pub(crate) fn bytes_peak(&self) -> usize {
        self.bytes_peak
    }

    /// Whether nothing is being fetched.
    #[cfg(test)]
    pub(crate) fn is_idle(&self) -> bool {
        (self.bytes, self.packets) == (0, 0) && self.line.is_empty() && self.starved.is_empty()
    }

    fn segment_packets(&self) -> u32 {
        SEGMENT_PACKETS.min(self.packets_max / 2)
    }

    /// A slab that nobody else has, of at least `len` bytes behind its first multiple of [`ALIGN`].
    fn slab(&mut self, len: usize) -> Arc<[u8]> {
        let len = len + ALIGN;
        let fits = |slab: &mut Arc<[u8]>| {
            (len..=len.saturating_mul(2)).contains(&slab.len()) && Arc::get_mut(slab).is_some()
        };
        // The one that was used last: most of it is in the processor's cache.
        let found = self.spare.iter_mut().rposition(fits);
        match found.and_then(|index| self.spare.remove(index)) {
            Some(slab) => {
                self.spare_bytes -= slab.len();
                slab
            }
            None => std::iter::repeat_n(0, len.next_multiple_of(SLAB_STEP)).collect(),
        }
    }

    /// Takes back a slab that has been handed up; the caller may still share it.
    pub(crate) fn recycle(&mut self, slab: Arc<[u8]>) {
        self.spare_bytes += slab.len();
        self.spare.push_back(slab);
        while self.spare_bytes > SPARE_BYTES_MAX
            && let Some(oldest) = self.spare.pop_front()
        {
            self.spare_bytes -= oldest.len();
        }
    }

    /// Puts a connection in line if it is not.
    pub(crate) fn enter(&mut self, inbox: &mut Inbox, index: u32) {
        if !inbox.is_in_line && inbox.may_ask() {
            inbox.is_in_line = true;
            self.line.push_back(index);
        }
    }

    /// The next connection in line, if there are packets to ask for.
    pub(crate) fn next(&mut self) -> Option<u32> {
        (self.packets + self.segment_packets() <= self.packets_max)
            .then(|| self.line.pop_front())
            .flatten()
    }

    /// Frees the room of a slab: whoever found none is in line again.
    fn release(&mut self, len: usize) {
        self.bytes -= len;
        self.retry();
    }
}

/// A message being fetched.
#[derive(Debug)]
struct Fetch {
    from: Remote,
    len: u32,
    /// Where it goes, and how many bytes behind the beginning.
    slab: Option<(Key, usize)>,
    /// Bytes that READs have been posted for, and that have come.
    asked: u32,
    come: u32,
}

/// One in the line of what is to be handed up.
#[derive(Debug)]
enum Waiting {
    /// The next of `fetches`.
    Fetch,
    /// A message that came behind it.
    Message(Vec<u8>),
    /// The parcel of the messages before has no more: its credit can be given back.
    Credit,
}

/// What can be handed up.
#[derive(Debug)]
pub(crate) enum Ready {
    /// A message that was fetched, and where in the slab it is.
    Fetched(Arc<[u8]>, Range<usize>),
    /// A message that had been held back.
    Message(Vec<u8>),
    /// Give a credit back.
    Credit,
}

/// One connection's messages that cannot be handed up yet.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    waiting: VecDeque<Waiting>,
    fetches: VecDeque<Fetch>,
    /// Index in `fetches` of the first that is not wholly asked for.
    asking: usize,
    /// Bytes of slabs.
    bytes: usize,
    /// Lengths of the READs under way, in order, and their packets.
    reads: VecDeque<(u32, u32)>,
    is_in_line: bool,
    /// Offers heard and taken so far, modulo 2^32.
    heard: u32,
    taken: u32,
}

impl Inbox {
    /// Whether messages must wait their turn.
    pub(crate) fn is_holding(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether the peer owes us READ responses.
    pub(crate) fn is_reading(&self) -> bool {
        !self.reads.is_empty()
    }

    /// Offers taken so far.
    pub(crate) fn taken(&self) -> u32 {
        self.taken
    }

    /// Makes it lie about what it has taken.
    #[cfg(test)]
    pub(crate) fn set_taken(&mut self, taken: u32) {
        self.taken = taken;
    }

    /// Keeps a message until those before it have been handed up.
    pub(crate) fn hold(&mut self, message: Vec<u8>) {
        self.waiting.push_back(Waiting::Message(message));
    }

    /// Keeps a parcel's credit until the messages before it have been handed up.
    pub(crate) fn hold_credit(&mut self) {
        self.waiting.push_back(Waiting::Credit);
    }

    /// The peer offers a message.
    ///
    /// # Errors
    /// [`Violation`]: too long, too short, out of order, too many.
    pub(crate) fn offer(
        &mut self,
        len: u32,
        rkey: u32,
        offer: Offer,
        message_max: usize,
    ) -> Result<(), Violation> {
        if len as usize > message_max || len as usize <= MESSAGE_MAX {
            return Err(Violation::Length);
        }
        if offer.number != self.heard {
            return Err(Violation::OfferOrder);
        }
        if self.fetches.len() >= OFFERS_MAX {
            return Err(Violation::OfferFlood);
        }
        self.heard = self.heard.wrapping_add(1);
        self.fetches.push_back(Fetch {
            from: Remote {
                va: offer.address,
                rkey: Rkey(rkey),
            },
            len,
            slab: None,
            asked: 0,
            come: 0,
        });
        self.waiting.push_back(Waiting::Fetch);
        Ok(())
    }

    fn may_ask(&self) -> bool {
        self.asking < self.fetches.len() && self.reads.len() < READS_MAX
    }

    /// Posts one READ, if that is possible, for the connection `index` that was in line.
    pub(crate) fn ask(
        &mut self,
        pool: &mut FetchPool,
        device: &mut Fabric,
        qp: QpId,
        packet_len: u32,
        index: u32,
    ) {
        self.is_in_line = false;
        if !self.may_ask() {
            return;
        }
        let fetch = &mut self.fetches[self.asking];
        let len = fetch.len as usize;
        let (key, begin) = match fetch.slab {
            Some(place) => place,
            None => {
                let has_room =
                    pool.bytes + len <= pool.bytes_max && self.bytes + len <= pool.share_max;
                let domain = pool.domain;
                let register = |slab: Arc<[u8]>| {
                    let begin = slab.as_ptr().align_offset(ALIGN);
                    Some((device.memory().register_slab(domain, slab)?, begin))
                };
                let place = has_room.then(|| pool.slab(len)).and_then(register);
                let Some(place) = place else {
                    pool.is_refused |= has_room;
                    self.is_in_line = true;
                    pool.starved.push_back(index);
                    return;
                };
                self.bytes += len;
                pool.bytes += len;
                pool.bytes_peak = pool.bytes_peak.max(pool.bytes);
                fetch.slab = Some(place);
                place
            }
        };
        let take = (fetch.len - fetch.asked).min(pool.segment_packets() * packet_len);
        let packets = take.div_ceil(packet_len);
        let from = Remote {
            va: fetch.from.va.wrapping_add(u64::from(fetch.asked)),
            ..fetch.from
        };
        let into = (key, begin as u64 + u64::from(fetch.asked), take);
        if !device.post_read(qp, from, into) {
            // Only a queue pair in error refuses; its completions will close the connection.
            return;
        }
        fetch.asked += take;
        if fetch.asked == fetch.len {
            self.asking += 1;
        }
        self.reads.push_back((take, packets));
        pool.packets += packets;
        pool.enter(self, index);
    }

    /// The oldest READ has completed. Returns whether a message is complete.
    pub(crate) fn note_read(
        &mut self,
        pool: &mut FetchPool,
        device: &mut Fabric,
        index: u32,
    ) -> bool {
        let (len, packets) = self.reads.pop_front().expect("a READ that was posted");
        pool.packets -= packets;
        let fetch = self.fetches.front_mut().expect("a READ is for a fetch");
        fetch.come += len;
        device.counters_mut().bulk_placed_bytes += u64::from(len);
        let is_complete = fetch.come == fetch.len;
        if is_complete {
            self.taken = self.taken.wrapping_add(1);
        }
        pool.enter(self, index);
        is_complete
    }

    /// Takes the next thing that can be handed up.
    pub(crate) fn pop(&mut self, pool: &mut FetchPool, device: &mut Fabric) -> Option<Ready> {
        match self.waiting.front()? {
            Waiting::Fetch => {
                let fetch = self.fetches.front().expect("one for each in line");
                if fetch.come < fetch.len {
                    return None;
                }
                let fetch = self.fetches.pop_front().expect("just seen");
                self.asking -= 1;
                self.waiting.pop_front();
                let (_, begin) = fetch.slab?;
                let slab = self.free(&fetch, pool, device);
                Some(Ready::Fetched(slab?, begin..begin + fetch.len as usize))
            }
            _ => match self.waiting.pop_front()? {
                Waiting::Message(message) => Some(Ready::Message(message)),
                _ => Some(Ready::Credit),
            },
        }
    }

    /// Forgets everything; the queue pair must be gone.
    pub(crate) fn clear(&mut self, pool: &mut FetchPool, device: &mut Fabric, index: u32) {
        for (_, packets) in self.reads.drain(..) {
            pool.packets -= packets;
        }
        for fetch in std::mem::take(&mut self.fetches) {
            if let Some(slab) = self.free(&fetch, pool, device) {
                pool.recycle(slab);
            }
        }
        self.waiting.clear();
        self.asking = 0;
        if std::mem::take(&mut self.is_in_line) {
            pool.line.retain(|other| *other != index);
            pool.starved.retain(|other| *other != index);
        }
    }

    fn free(
        &mut self,
        fetch: &Fetch,
        pool: &mut FetchPool,
        device: &mut Fabric,
    ) -> Option<Arc<[u8]>> {
        let slab = device.memory().release_slab(fetch.slab?.0);
        self.bytes -= fetch.len as usize;
        pool.release(fetch.len as usize);
        slab
    }
}
