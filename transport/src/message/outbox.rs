//! Outgoing messages of one connection, from `send` to the acknowledgement.
//!
//! Owns: the slots of registered memory that hold the messages, each copied there once, and the
//! division into parcels. Small messages share a parcel for as long as it has not been posted, so a
//! backlog packs itself; nothing waits for company. Of a message that is lent (`loans`) only the
//! offer lies here.
//!
//! Urgent messages have slots of their own, so that a backlog of ordinary ones leaves them room.
//!
//! Invariants:
//! * a parcel lies in one slot and its bytes do not change between posting and completion;
//! * parcels complete in the order posted, the slots of a lane are given back in the order taken;
//! * no more than `slots_max` slots hold ordinary messages, [`URGENT_SLOTS`] urgent ones, and one more
//!   credit parcels, which are made among the urgent ones.
//!
//! Deliberately absent: credits and sequence numbers (`connection` stamps them when it posts).

use std::collections::VecDeque;
use std::io::IoSlice;

use super::fabric::Registrar;
use super::parcel::{
    self, HEADER_LEN, Header, Kind, Lane, MESSAGE_MAX, OFFER_LEN, Offer, SLOT_LEN, Stamp,
};
use crate::memory::Key;

/// Slots cut from one region.
const SLOTS_PER_REGION: usize = 8;
/// Slots of a connection for urgent messages: one to be filled while another is on the wire.
const URGENT_SLOTS: usize = 2;

/// A stretch of [`SLOT_LEN`] bytes in a private region.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slot {
    key: Key,
    offset: u64,
}

/// Free slots of all connections of an endpoint; last in, first out, so that they stay in cache.
#[derive(Debug)]
pub(crate) struct SlotPool {
    free: Vec<Slot>,
    /// Slots that connections have.
    out: usize,
    /// Whether memory for more was refused since that was last asked.
    is_refused: bool,
    domain: u32,
}

impl SlotPool {
    pub(crate) fn new(domain: u32) -> SlotPool {
        SlotPool {
            free: Vec::new(),
            out: 0,
            is_refused: false,
            domain,
        }
    }

    /// Whether slots are in use, which will come back.
    pub(crate) fn is_any_out(&self) -> bool {
        self.out > 0
    }

    /// Whether memory was refused since this was last asked.
    pub(crate) fn take_refused(&mut self) -> bool {
        std::mem::take(&mut self.is_refused)
    }

    fn take(&mut self, memory: &mut dyn Registrar) -> Option<Slot> {
        if self.free.is_empty() {
            let key = memory.register_private(self.domain, SLOTS_PER_REGION * SLOT_LEN);
            self.is_refused |= key.is_none();
            let key = key?;
            self.free.extend((0..SLOTS_PER_REGION).rev().map(|i| Slot {
                key,
                offset: (i * SLOT_LEN) as u64,
            }));
        }
        self.out += 1;
        self.free.pop()
    }

    fn give_back(&mut self, slot: Slot) {
        self.out -= 1;
        self.free.push(slot);
    }
}

/// A slot in use.
#[derive(Debug)]
struct Held {
    slot: Slot,
    /// Bytes from its start that parcels have.
    filled: usize,
    /// Parcels in it that have not completed.
    parcels: u32,
}

/// A parcel not yet posted. Its header is written when it is.
#[derive(Debug)]
struct Waiting {
    /// Serial number of its slot.
    serial: u64,
    offset: usize,
    len: usize,
    kind: Kind,
}

/// A posted parcel, as the queue pair needs to know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Posting {
    pub(crate) key: Key,
    pub(crate) offset: u64,
    pub(crate) len: u32,
    pub(crate) is_offer: bool,
}

/// What is to be posted next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// The first that waits in a lane.
    Waiting(Lane),
    /// Nothing but credits, and how many offers have been taken.
    Credit(u32),
}

/// Slots in the order taken, and the parcels in them that are not posted.
#[derive(Debug, Default)]
struct Line {
    held: VecDeque<Held>,
    /// Serial number of `held[0]`.
    first: u64,
    waiting: VecDeque<Waiting>,
}

/// A parcel that has been posted.
#[derive(Debug)]
struct Posted {
    lane: Lane,
    /// Serial number of its slot.
    serial: u64,
    /// Whether it carries credits only.
    is_credit: bool,
}

/// The send side's memory.
#[derive(Debug)]
pub(crate) struct Outbox {
    ordinary: Line,
    urgent: Line,
    /// In the order of posting.
    posted: VecDeque<Posted>,
    /// How many of them carry credits only.
    credits_posted: usize,
    packet_len: usize,
    slots_max: usize,
}

/// There is no room now; there will be when parcels complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Full;

impl Line {
    /// Makes room for another record in the last waiting parcel, if there is one that has it.
    fn extend_last(&mut self, need: usize, packet_len: usize) -> Option<usize> {
        let last = self.waiting.back_mut()?;
        let Kind::Records { count } = &mut last.kind else {
            return None;
        };
        let tail_serial = self.first + self.held.len() as u64 - 1;
        let tail = self.held.back_mut()?;
        let end = last.offset + last.len;
        if last.serial != tail_serial
            || tail.filled != end
            || last.len + need > packet_len
            || end + need > SLOT_LEN
        {
            return None;
        }
        *count += 1;
        last.len += need;
        tail.filled += need;
        Some(end)
    }

    /// Appends a parcel of `len` bytes to the last slot, or to a new one.
    fn reserve(
        &mut self,
        pool: &mut SlotPool,
        memory: &mut dyn Registrar,
        len: usize,
        kind: Kind,
        slots_max: usize,
    ) -> Result<usize, Full> {
        if self
            .held
            .back()
            .is_none_or(|held| held.filled + len > SLOT_LEN)
        {
            if self.held.len() >= slots_max {
                return Err(Full);
            }
            let slot = pool.take(memory).ok_or(Full)?;
            self.held.push_back(Held {
                slot,
                filled: 0,
                parcels: 0,
            });
        }
        let serial = self.first + self.held.len() as u64 - 1;
        let held = self.held.back_mut().expect("just pushed if empty");
        let offset = held.filled;
        // Records parcels have such a length already, so that the next record follows directly.
        held.filled += len.next_multiple_of(4);
        held.parcels += 1;
        self.waiting.push_back(Waiting {
            serial,
            offset,
            len,
            kind,
        });
        Ok(offset)
    }

    fn tail_bytes<'m>(&self, memory: &'m mut dyn Registrar) -> &'m mut [u8] {
        let slot = self.held.back().expect("a parcel was reserved").slot;
        slot_bytes(memory, slot)
    }

    /// A parcel of a slot has completed.
    fn complete(&mut self, pool: &mut SlotPool, serial: u64) {
        self.held[(serial - self.first) as usize].parcels -= 1;
        while self.held.front().is_some_and(|held| held.parcels == 0) {
            if let Some(held) = self.held.pop_front() {
                pool.give_back(held.slot);
                self.first += 1;
            }
        }
    }

    fn clear(&mut self, pool: &mut SlotPool) {
        self.waiting.clear();
        self.first += self.held.len() as u64;
        for held in self.held.drain(..) {
            pool.give_back(held.slot);
        }
    }
}

impl Outbox {
    /// `packet_len` is the path MTU; `slots_max` bounds the memory of ordinary messages.
    pub(crate) fn new(packet_len: usize, slots_max: usize) -> Outbox {
        Outbox {
            ordinary: Line::default(),
            urgent: Line::default(),
            posted: VecDeque::new(),
            credits_posted: 0,
            packet_len,
            slots_max,
        }
    }

    fn line(&mut self, lane: Lane) -> &mut Line {
        match lane {
            Lane::Ordinary => &mut self.ordinary,
            Lane::Urgent => &mut self.urgent,
        }
    }

    /// Whether a parcel of a lane waits to be posted.
    pub(crate) fn is_waiting(&self, lane: Lane) -> bool {
        match lane {
            Lane::Ordinary => !self.ordinary.waiting.is_empty(),
            Lane::Urgent => !self.urgent.waiting.is_empty(),
        }
    }

    /// Whether nothing waits and nothing is posted.
    pub(crate) fn is_idle(&self) -> bool {
        !self.is_waiting(Lane::Ordinary) && !self.is_waiting(Lane::Urgent) && self.posted.is_empty()
    }

    /// Parcels posted and not completed.
    pub(crate) fn posted(&self) -> usize {
        self.posted.len()
    }

    /// Parcels with nothing but credits, posted and not completed.
    pub(crate) fn credits_posted(&self) -> usize {
        self.credits_posted
    }

    /// Whether so little memory of a lane is held that some messages of any length fit.
    pub(crate) fn is_roomy(&self, lane: Lane) -> bool {
        match lane {
            Lane::Ordinary => self.ordinary.held.len() <= self.slots_max / 4,
            Lane::Urgent => self.urgent.held.len() < URGENT_SLOTS,
        }
    }

    /// Copies a message of `len` bytes in, at most [`MESSAGE_MAX`].
    pub(crate) fn push(
        &mut self,
        pool: &mut SlotPool,
        memory: &mut dyn Registrar,
        lane: Lane,
        parts: &[IoSlice<'_>],
        len: usize,
    ) -> Result<(), Full> {
        assert!(len <= MESSAGE_MAX);
        let slots_max = match lane {
            Lane::Ordinary => self.slots_max,
            Lane::Urgent => URGENT_SLOTS,
        };
        let packet_len = self.packet_len;
        let line = self.line(lane);
        let need = parcel::record_len(len);
        if HEADER_LEN + need > packet_len {
            let kind = Kind::Message { len: len as u32 };
            let at = line.reserve(pool, memory, HEADER_LEN + len, kind, slots_max)?;
            let out = &mut line.tail_bytes(memory)[at + HEADER_LEN..][..len];
            copy_parts(out, parts);
            return Ok(());
        }
        let at = match line.extend_last(need, packet_len) {
            Some(at) => at,
            None => {
                let kind = Kind::Records { count: 1 };
                line.reserve(pool, memory, HEADER_LEN + need, kind, slots_max)? + HEADER_LEN
            }
        };
        let out = &mut line.tail_bytes(memory)[at..at + need];
        out[..parcel::RECORD_PREFIX].copy_from_slice(&(len as u32).to_le_bytes());
        let (body, pad) = out[parcel::RECORD_PREFIX..].split_at_mut(len);
        copy_parts(body, parts);
        pad.fill(0);
        Ok(())
    }

    /// Offers a message of `len` bytes that waits in memory.
    pub(crate) fn push_offer(
        &mut self,
        pool: &mut SlotPool,
        memory: &mut dyn Registrar,
        (len, key): (u32, Key),
        offer: Offer,
    ) -> Result<(), Full> {
        let kind = Kind::Offer { len, rkey: key.0 };
        let need = HEADER_LEN + OFFER_LEN;
        let line = &mut self.ordinary;
        let at = line.reserve(pool, memory, need, kind, self.slots_max)?;
        offer.emit(&mut line.tail_bytes(memory)[at + HEADER_LEN..][..OFFER_LEN]);
        Ok(())
    }

    /// Takes the next waiting parcel of a lane, or makes one that carries only credits, writes its
    /// header and counts it as posted.
    pub(crate) fn post(
        &mut self,
        pool: &mut SlotPool,
        memory: &mut dyn Registrar,
        next: Next,
        stamp: Stamp,
    ) -> Option<Posting> {
        let (lane, is_credit) = match next {
            Next::Waiting(lane) => (lane, false),
            Next::Credit(_) => (Lane::Urgent, true),
        };
        let line = self.line(lane);
        let parcel = match next {
            Next::Waiting(_) => line.waiting.pop_front()?,
            Next::Credit(taken) => {
                let kind = Kind::Credit { taken };
                line.reserve(pool, memory, HEADER_LEN, kind, URGENT_SLOTS + 1)
                    .ok()?;
                line.waiting.pop_back()?
            }
        };
        let slot = line.held[(parcel.serial - line.first) as usize].slot;
        let bytes = &mut slot_bytes(memory, slot)[parcel.offset..];
        Header {
            kind: parcel.kind,
            lane: match is_credit {
                true => Lane::Ordinary,
                false => lane,
            },
            stamp,
        }
        .emit(bytes);
        self.posted.push_back(Posted {
            lane,
            serial: parcel.serial,
            is_credit,
        });
        self.credits_posted += usize::from(is_credit);
        Some(Posting {
            key: slot.key,
            offset: slot.offset + parcel.offset as u64,
            len: parcel.len as u32,
            is_offer: matches!(parcel.kind, Kind::Offer { .. }),
        })
    }

    /// The oldest posted parcel has been acknowledged.
    pub(crate) fn complete(&mut self, pool: &mut SlotPool) {
        let posted = self
            .posted
            .pop_front()
            .expect("a completion for each posting, in order");
        self.credits_posted -= usize::from(posted.is_credit);
        self.line(posted.lane).complete(pool, posted.serial);
    }

    /// Forgets everything and gives all slots back. The queue pair must be gone.
    pub(crate) fn clear(&mut self, pool: &mut SlotPool) {
        self.posted.clear();
        self.credits_posted = 0;
        self.ordinary.clear(pool);
        self.urgent.clear(pool);
    }
}

fn slot_bytes(memory: &mut dyn Registrar, slot: Slot) -> &mut [u8] {
    memory
        .private_bytes(slot.key, slot.offset as usize, SLOT_LEN)
        .expect("slots live as long as the endpoint")
}

/// Copies the concatenated `parts`, which are as long as `out`.
fn copy_parts(mut out: &mut [u8], parts: &[IoSlice<'_>]) {
    for part in parts {
        let (now, later) = out.split_at_mut(part.len());
        now.copy_from_slice(part);
        out = later;
    }
    assert!(out.is_empty(), "the parts are as long as their sum");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;

    struct World {
        memory: Memory,
        pool: SlotPool,
        outbox: Outbox,
    }

    impl World {
        fn new(slots_max: usize) -> World {
            World {
                memory: Memory::default(),
                pool: SlotPool::new(0),
                outbox: Outbox::new(4096, slots_max),
            }
        }

        fn push(&mut self, message: &[u8]) -> Result<(), Full> {
            self.push_in(Lane::Ordinary, message)
        }

        fn push_in(&mut self, lane: Lane, message: &[u8]) -> Result<(), Full> {
            let (left, right) = message.split_at(message.len() / 3);
            let parts = [IoSlice::new(left), IoSlice::new(&[]), IoSlice::new(right)];
            let (pool, memory) = (&mut self.pool, &mut self.memory);
            self.outbox.push(pool, memory, lane, &parts, message.len())
        }

        fn offer(&mut self, number: u32) -> Result<(), Full> {
            let offer = Offer { address: 0, number };
            self.outbox.push_offer(
                &mut self.pool,
                &mut self.memory,
                (70_000, Key(0x8000_0000 | number)),
                offer,
            )
        }

        fn post(&mut self, next: Next) -> Option<Vec<u8>> {
            let World {
                memory,
                pool,
                outbox,
            } = self;
            let posting = outbox.post(pool, memory, next, STAMP)?;
            let region = memory.private_mut(posting.key).unwrap();
            Some(region[posting.offset as usize..][..posting.len as usize].to_vec())
        }
    }

    const STAMP: Stamp = Stamp {
        credits: 7,
        urgent_credits: 3,
        sequence: 9,
    };
    const ORDINARY: Next = Next::Waiting(Lane::Ordinary);
    const URGENT: Next = Next::Waiting(Lane::Urgent);
    const CREDIT: Next = Next::Credit(5);

    /// Puts parcels together again.
    fn unpack(parcels: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let mut messages = Vec::new();
        for bytes in parcels {
            let (header, mut body) = Header::parse(bytes).unwrap();
            assert_eq!(header.stamp, STAMP);
            match header.kind {
                Kind::Records { count } => {
                    assert!(bytes.len() <= 4096);
                    for _ in 0..count {
                        messages.push(parcel::next_record(&mut body).unwrap().to_vec());
                    }
                    assert!(body.is_empty());
                }
                Kind::Message { len } => {
                    assert_eq!(len as usize, body.len());
                    messages.push(body.to_vec());
                }
                Kind::Credit { taken } => assert_eq!(taken, 5),
                Kind::Offer { len, rkey } => {
                    let number = Offer::parse(body).unwrap().number;
                    assert_eq!((len, rkey), (70_000, 0x8000_0000 | number));
                    messages.push(number.to_le_bytes().to_vec());
                }
            }
        }
        messages
    }

    fn message(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 7 + len) as u8).collect()
    }

    #[test]
    fn messages_of_every_length_come_out_as_they_went_in() {
        let mut world = World::new(100);
        let lens = [
            0, 1, 3, 4, 100, 4076, 4077, 4080, 5000, 61_423, 61_424, 8, 4076, 9,
        ];
        let mut messages: Vec<_> = lens.iter().map(|len| message(*len)).collect();
        for message in &messages {
            world.push(message).unwrap();
        }
        // Offers keep their place among the others.
        for number in 0..3 {
            world.offer(number).unwrap();
            world.push(b"between").unwrap();
            messages.push(number.to_le_bytes().to_vec());
            messages.push(b"between".to_vec());
        }
        let mut parcels = Vec::new();
        while let Some(parcel) = world.post(ORDINARY) {
            parcels.push(parcel);
            parcels.extend(world.post(CREDIT));
        }
        assert_eq!(unpack(&parcels), messages);
        for _ in 0..parcels.len() {
            world.outbox.complete(&mut world.pool);
        }
        assert!(world.outbox.is_idle() && world.pool.out == 0);
    }

    #[test]
    fn a_backlog_of_small_messages_shares_parcels() {
        let mut world = World::new(4);
        for _ in 0..100 {
            world.push(&message(36)).unwrap();
        }
        let mut parcels = 0;
        while world.post(ORDINARY).is_some() {
            parcels += 1;
        }
        assert_eq!(parcels, 1);
    }

    #[test]
    fn memory_is_bounded_and_comes_back_when_parcels_complete() {
        let mut world = World::new(18);
        let big = message(MESSAGE_MAX);
        for _ in 0..17 {
            world.push(&big).unwrap();
        }
        let mut small = 0;
        while world.push(&message(3000)).is_ok() {
            small += 1;
        }
        assert!((1..=20).contains(&small));
        assert_eq!(world.push(&big), Err(Full));
        let mut posted = 0;
        while world.post(ORDINARY).is_some() {
            posted += 1;
        }
        assert!(
            world.post(CREDIT).is_some(),
            "credits are never stuck behind data"
        );
        for _ in 0..=posted {
            world.outbox.complete(&mut world.pool);
        }
        assert_eq!(
            (world.outbox.posted(), world.outbox.credits_posted()),
            (0, 0)
        );
        for _ in 0..17 {
            world.push(&big).unwrap();
        }
        assert!(
            world.pool.free.len() < 3 * SLOTS_PER_REGION,
            "slots are used again"
        );
    }

    #[test]
    fn urgent_messages_have_room_of_their_own_and_keep_their_order() {
        let mut world = World::new(4);
        let big = message(MESSAGE_MAX);
        while world.push(&big).is_ok() {}
        assert_eq!(world.push(b"one more"), Err(Full));
        let mut expected = Vec::new();
        for number in 0..20_000u32 {
            let message = number.to_le_bytes();
            if world.push_in(Lane::Urgent, &message).is_err() {
                break;
            }
            expected.push(message.to_vec());
        }
        assert!((1_000..20_000).contains(&expected.len()), "bounded");
        let mut parcels = Vec::new();
        while let Some(parcel) = world.post(URGENT) {
            let header = Header::parse(&parcel).unwrap().0;
            assert_eq!(header.lane, Lane::Urgent);
            parcels.push(parcel);
        }
        assert!(parcels.len() * 4 < expected.len(), "they share parcels");
        assert_eq!(unpack(&parcels), expected);
        // All of them, and the backlog, are still there; credits are stuck behind neither.
        assert!(world.post(CREDIT).is_some());
        assert!(!world.outbox.is_roomy(Lane::Urgent));
        for _ in 0..=parcels.len() {
            world.outbox.complete(&mut world.pool);
        }
        assert!(world.outbox.is_roomy(Lane::Urgent) && !world.outbox.is_roomy(Lane::Ordinary));
        assert_eq!(world.pool.out, 4, "only the backlog has slots");
    }

    #[test]
    fn a_connection_that_ends_gives_the_memory_of_all_lanes_back() {
        let mut world = World::new(4);
        for _ in 0..2 {
            for (lane, next) in [(Lane::Ordinary, ORDINARY), (Lane::Urgent, URGENT)] {
                world.push_in(lane, b"posted").unwrap();
                world.post(next).unwrap();
                world.push_in(lane, b"waiting").unwrap();
            }
            world.post(CREDIT).unwrap();
            assert!(world.pool.out >= 2);
            world.outbox.clear(&mut world.pool);
            assert!(world.outbox.is_idle());
            let credits = world.outbox.credits_posted();
            assert_eq!((world.pool.out, credits), (0, 0));
        }
    }
}
