//! Outgoing messages of one connection, from `send` to the acknowledgement.
//!
//! Owns: the slots of registered memory that hold the messages, each copied there once, and the
//! division into parcels. Small messages share a parcel for as long as it has not been posted, so a
//! backlog packs itself; nothing waits for company. Of a message that is lent (`loans`) only the
//! offer lies here.
//!
//! Invariants:
//! * a parcel lies in one slot and its bytes do not change between posting and completion;
//! * parcels complete in the order posted, slots are given back in the order taken;
//! * no more than `slots_max` slots are held, and one more for a credit parcel.
//!
//! Deliberately absent: credits and sequence numbers (`connection` stamps them when it posts).

use std::collections::VecDeque;
use std::io::IoSlice;

use super::fabric::Registrar;
use super::parcel::{self, HEADER_LEN, Header, Kind, MESSAGE_MAX, OFFER_LEN, Offer, SLOT_LEN};
use crate::memory::Key;

/// Slots cut from one region.
const SLOTS_PER_REGION: usize = 8;

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

/// The send side's memory.
#[derive(Debug)]
pub(crate) struct Outbox {
    held: VecDeque<Held>,
    /// Serial number of `held[0]`.
    first: u64,
    waiting: VecDeque<Waiting>,
    /// Slot serials of posted parcels, in order, and whether they carry credits only.
    posted: VecDeque<(u64, bool)>,
    /// How many of them carry credits only.
    credits_posted: usize,
    packet_len: usize,
    slots_max: usize,
}

/// There is no room now; there will be when parcels complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Full;

impl Outbox {
    /// `packet_len` is the path MTU; `slots_max` bounds the memory.
    pub(crate) fn new(packet_len: usize, slots_max: usize) -> Outbox {
        Outbox {
            held: VecDeque::new(),
            first: 0,
            waiting: VecDeque::new(),
            posted: VecDeque::new(),
            credits_posted: 0,
            packet_len,
            slots_max,
        }
    }

    /// Whether a parcel waits to be posted.
    pub(crate) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Parcels posted and not completed.
    pub(crate) fn posted(&self) -> usize {
        self.posted.len()
    }

    /// Parcels with nothing but credits, posted and not completed.
    pub(crate) fn credits_posted(&self) -> usize {
        self.credits_posted
    }

    /// Whether so little memory is held that some messages of any length fit.
    pub(crate) fn is_roomy(&self) -> bool {
        self.held.len() <= self.slots_max / 4
    }

    /// Copies a message of `len` bytes in, at most [`MESSAGE_MAX`].
    pub(crate) fn push(
        &mut self,
        pool: &mut SlotPool,
        memory: &mut dyn Registrar,
        parts: &[IoSlice<'_>],
        len: usize,
    ) -> Result<(), Full> {
        assert!(len <= MESSAGE_MAX);
        if HEADER_LEN + parcel::record_len(len) <= self.packet_len {
            return self.push_record(pool, memory, parts, len);
        }
        let kind = Kind::Message { len: len as u32 };
        let at = self.reserve(pool, memory, HEADER_LEN + len, kind, self.slots_max)?;
        let out = &mut self.tail_bytes(memory)[at + HEADER_LEN..][..len];
        copy_parts(out, parts);
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
        let at = self.reserve(pool, memory, need, kind, self.slots_max)?;
        offer.emit(&mut self.tail_bytes(memory)[at + HEADER_LEN..][..OFFER_LEN]);
        Ok(())
    }

    fn push_record(
        &mut self,
        pool: &mut SlotPool,
        memory: &mut dyn Registrar,
        parts: &[IoSlice<'_>],
        len: usize,
    ) -> Result<(), Full> {
        let need = parcel::record_len(len);
        let at = match self.extend_last(need) {
            Some(at) => at,
            None => {
                let kind = Kind::Records { count: 1 };
                let slots_max = self.slots_max;
                self.reserve(pool, memory, HEADER_LEN + need, kind, slots_max)? + HEADER_LEN
            }
        };
        let out = &mut self.tail_bytes(memory)[at..at + need];
        out[..parcel::RECORD_PREFIX].copy_from_slice(&(len as u32).to_le_bytes());
        let (body, pad) = out[parcel::RECORD_PREFIX..].split_at_mut(len);
        copy_parts(body, parts);
        pad.fill(0);
        Ok(())
    }

    /// Makes room for another record in the last waiting parcel, if there is one that has it.
    fn extend_last(&mut self, need: usize) -> Option<usize> {
        let last = self.waiting.back_mut()?;
        let Kind::Records { count } = &mut last.kind else {
            return None;
        };
        let tail_serial = self.first + self.held.len() as u64 - 1;
        let tail = self.held.back_mut()?;
        let end = last.offset + last.len;
        if last.serial != tail_serial
            || tail.filled != end
            || last.len + need > self.packet_len
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

    /// Takes the next waiting parcel, or (if `credit` is how many offers have been taken) makes one
    /// that carries only that, writes its header and counts it as posted.
    pub(crate) fn post(
        &mut self,
        pool: &mut SlotPool,
        memory: &mut dyn Registrar,
        credit: Option<u32>,
        credits: u16,
        sequence: u32,
    ) -> Option<Posting> {
        let parcel = if let Some(taken) = credit {
            let slots_max = self.slots_max + 1;
            self.reserve(pool, memory, HEADER_LEN, Kind::Credit { taken }, slots_max)
                .ok()?;
            self.waiting.pop_back()?
        } else {
            self.waiting.pop_front()?
        };
        let slot = self.held[(parcel.serial - self.first) as usize].slot;
        let bytes = &mut slot_bytes(memory, slot)[parcel.offset..];
        Header {
            kind: parcel.kind,
            credits,
            sequence,
        }
        .emit(bytes);
        self.posted.push_back((parcel.serial, credit.is_some()));
        self.credits_posted += usize::from(credit.is_some());
        Some(Posting {
            key: slot.key,
            offset: slot.offset + parcel.offset as u64,
            len: parcel.len as u32,
            is_offer: matches!(parcel.kind, Kind::Offer { .. }),
        })
    }

    /// The oldest posted parcel has been acknowledged.
    pub(crate) fn complete(&mut self, pool: &mut SlotPool) {
        let (serial, is_credit) = self
            .posted
            .pop_front()
            .expect("a completion for each posting, in order");
        self.credits_posted -= usize::from(is_credit);
        self.held[(serial - self.first) as usize].parcels -= 1;
        self.release(pool);
    }

    fn release(&mut self, pool: &mut SlotPool) {
        while self.held.front().is_some_and(|held| held.parcels == 0) {
            if let Some(held) = self.held.pop_front() {
                pool.give_back(held.slot);
                self.first += 1;
            }
        }
    }

    /// Forgets everything and gives all slots back. The queue pair must be gone.
    pub(crate) fn clear(&mut self, pool: &mut SlotPool) {
        self.waiting.clear();
        self.posted.clear();
        self.credits_posted = 0;
        self.first += self.held.len() as u64;
        for held in self.held.drain(..) {
            pool.give_back(held.slot);
        }
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
            let (left, right) = message.split_at(message.len() / 3);
            let parts = [IoSlice::new(left), IoSlice::new(&[]), IoSlice::new(right)];
            self.outbox
                .push(&mut self.pool, &mut self.memory, &parts, message.len())
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

        fn post(&mut self, is_credit: bool) -> Option<Vec<u8>> {
            let credit = is_credit.then_some(5);
            let World {
                memory,
                pool,
                outbox,
            } = self;
            let posting = outbox.post(pool, memory, credit, 7, 9)?;
            let region = memory.private_mut(posting.key).unwrap();
            Some(region[posting.offset as usize..][..posting.len as usize].to_vec())
        }
    }

    /// Puts parcels together again.
    fn unpack(parcels: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let mut messages = Vec::new();
        for bytes in parcels {
            let (header, mut body) = Header::parse(bytes).unwrap();
            assert_eq!((header.credits, header.sequence), (7, 9));
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
        while let Some(parcel) = world.post(false) {
            parcels.push(parcel);
            parcels.extend(world.post(true));
        }
        assert_eq!(unpack(&parcels), messages);
        for _ in 0..parcels.len() {
            world.outbox.complete(&mut world.pool);
        }
        assert!(world.outbox.posted() == 0 && world.outbox.held.is_empty());
    }

    #[test]
    fn a_backlog_of_small_messages_shares_parcels() {
        let mut world = World::new(4);
        for _ in 0..100 {
            world.push(&message(36)).unwrap();
        }
        let mut parcels = 0;
        while world.post(false).is_some() {
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
        while world.post(false).is_some() {
            posted += 1;
        }
        assert!(
            world.post(true).is_some(),
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
}
