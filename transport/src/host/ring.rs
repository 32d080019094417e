//! A ring of records from one process to another, in shared words.
//!
//! Owns: the layout of the ring, the hand-over of records, and the sleep of its receiver.
//!
//! ```text
//! word 0   version                        written once, by the sender
//! word 8   head: units taken so far       written by the receiver
//! word 16  asleep                         set by the receiver, cleared by either
//! word 24  odd: the sender reaches the    written by the sender: see `host::exports`
//!          receiver's memory
//! word 64… records, each whole units of eight words: one word of header, then the bytes
//! ```
//!
//! A header is 0 until its record is complete, then the record's length. The sender zeroes the
//! header *behind* a record before it publishes the record, so the receiver never takes old bytes
//! for a header, and no index but `head` is shared.
//!
//! Sleep: the receiver says that it is going to sleep and looks once more; the sender looks for that
//! word after what it has sent. The two fences order each side's write before its look at the
//! other's, so that not both miss (the pattern of Dekker's algorithm).
//!
//! Nothing that the other side writes can make this side panic or leave the ring: a header or `head`
//! that cannot be right ends the ring ([`Broken`]).
//!
//! Deliberately absent: waiting for room. A record that finds none is lost; the queue pairs above
//! repeat it, and their budget keeps it from happening.

#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, Ordering, fence};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU64, Ordering, fence};

const VERSION: u64 = 0x4c54_5249_4e47_0001;
const WORD_HEAD: usize = 8;
const WORD_ASLEEP: usize = 16;
const WORD_REACHING: usize = 24;
const WORD_RECORDS: usize = 64;
/// Bytes of the longest record. Packets are far shorter; a peer may make its ring as long as it
/// likes, and must not have us copy, or reserve, all of that.
const LEN_MAX: usize = 1 << 16;
/// Words of a unit: a cache line.
const UNIT: usize = 8;

/// The other side has broken the ring's rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Broken;

/// What a ring consists of.
pub type Word = AtomicU64;

/// Words that a ring of `units` units takes.
pub const fn words_of(units: usize) -> usize {
    WORD_RECORDS + units * UNIT
}

/// Units of a ring in so many words: a power of two.
fn units_in(words: usize) -> usize {
    let units = words.saturating_sub(WORD_RECORDS) / UNIT;
    match units {
        0 => 0,
        _ => 1 << units.ilog2(),
    }
}

const fn units_of(len: usize) -> usize {
    (8 + len).div_ceil(8 * UNIT)
}

/// The sender's end.
#[derive(Debug)]
pub struct Sender {
    units: usize,
    /// Bytes of the longest record.
    len_max: usize,
    tail: u64,
    /// What was last seen of `head`.
    head: u64,
}

/// The receiver's end.
#[derive(Debug)]
pub struct Receiver {
    units: usize,
    head: u64,
}

impl Sender {
    /// Of new words, all zero.
    pub fn new(words: &[AtomicU64]) -> Sender {
        // Relaxed, as everything that the hand-over of the segment itself orders.
        words[0].store(VERSION, Ordering::Relaxed);
        let units = units_in(words.len());
        // One unit behind the longest record is for the next header.
        let room = (units.saturating_sub(1) * UNIT).saturating_sub(1) * 8;
        Sender {
            units,
            len_max: room.min(LEN_MAX),
            tail: 0,
            head: 0,
        }
    }

    /// Sends the concatenation of `parts`; false if there is no room. Follow with [`Self::is_wanted`].
    ///
    /// # Errors
    /// The receiver's index makes no sense.
    pub fn send(&mut self, words: &[AtomicU64], parts: &[&[u8]]) -> Result<bool, Broken> {
        let len = parts.iter().map(|part| part.len()).sum();
        self.publish(words, len, |places| places.put_parts(parts))
    }

    /// The same of bytes that lie in whole words, of which the first `len` count.
    ///
    /// # Errors
    /// As `send`.
    pub fn send_words(
        &mut self,
        words: &[AtomicU64],
        record: &[[u8; 8]],
        len: usize,
    ) -> Result<bool, Broken> {
        assert_eq!(record.len(), len.div_ceil(8));
        self.publish(words, len, |places| places.put(record))
    }

    #[inline]
    fn publish(
        &mut self,
        words: &[AtomicU64],
        len: usize,
        write: impl FnOnce(&mut Places<'_>),
    ) -> Result<bool, Broken> {
        if len > self.len_max {
            return Ok(false);
        }
        let need = units_of(len) as u64;
        if !self.has_room(need + 1) {
            // Acquire pairs with the Release in `Receiver::receive`: it has read what was there.
            let head = words[WORD_HEAD].load(Ordering::Acquire);
            if head < self.head || head > self.tail {
                return Err(Broken);
            }
            self.head = head;
            if !self.has_room(need + 1) {
                return Ok(false);
            }
        }
        // Relaxed here and in the copy: the header's Release is what publishes them.
        let behind = self.header(self.tail + need);
        words[behind].store(0, Ordering::Relaxed);
        let (wrapped, straight) = halves(words, self.units, self.tail);
        write(&mut Places {
            next: straight,
            then: wrapped,
        });
        // Release pairs with the Acquire in `Receiver::receive`.
        let header = self.header(self.tail);
        words[header].store(len as u64 + 1, Ordering::Release);
        self.tail += need;
        Ok(true)
    }

    /// Whether the receiver sleeps and must be woken, once.
    pub fn is_wanted(&self, words: &[AtomicU64]) -> bool {
        // Pairs with the fence in `Receiver::may_sleep`.
        fence(Ordering::SeqCst);
        let asleep = &words[WORD_ASLEEP];
        asleep.load(Ordering::Relaxed) != 0 && asleep.swap(0, Ordering::Relaxed) != 0
    }

    /// Says that we are going to reach the receiver's memory without it; until it is said that we
    /// have done, the receiver takes no memory out of service. What is in service is to be looked up
    /// after this.
    pub fn begin_reaching(&self, words: &[AtomicU64]) {
        // Nobody else writes it.
        let reaches = words[WORD_REACHING].load(Ordering::Relaxed) | 1;
        // Release: who sees this may never see that the last time has ended.
        words[WORD_REACHING].store(reaches, Ordering::Release);
        // Pairs with the fence in `Receiver::reach`.
        fence(Ordering::SeqCst);
    }

    /// Says that we have done.
    pub fn end_reaching(&self, words: &[AtomicU64]) {
        let reaches = words[WORD_REACHING].load(Ordering::Relaxed);
        // Release: the accesses come before.
        words[WORD_REACHING].store(reaches.wrapping_add(1) & !1, Ordering::Release);
    }

    fn has_room(&self, units: u64) -> bool {
        self.tail + units - self.head <= self.units as u64
    }

    fn header(&self, unit: u64) -> usize {
        WORD_RECORDS + (unit as usize & (self.units - 1)) * UNIT
    }
}

/// Words to be written, in order.
struct Places<'w> {
    next: &'w [AtomicU64],
    /// After those.
    then: &'w [AtomicU64],
}

impl Places<'_> {
    fn put_parts(&mut self, parts: &[&[u8]]) {
        // Bytes of parts that end within a word wait for the next part.
        let (mut rest, mut held) = ([0; 8], 0);
        for part in parts {
            let mut part = *part;
            if held > 0 {
                let taken = part.len().min(8 - held);
                rest[held..held + taken].copy_from_slice(&part[..taken]);
                held += taken;
                part = &part[taken..];
                if held < 8 {
                    continue;
                }
                self.put(&[rest]);
            }
            let (whole, tail) = part.as_chunks();
            self.put(whole);
            held = tail.len();
            if held > 0 {
                rest[..held].copy_from_slice(tail);
            }
        }
        if held > 0 {
            self.put(&[rest]);
        }
    }

    fn put(&mut self, mut words: &[[u8; 8]]) {
        while !words.is_empty() && !self.next.is_empty() {
            let count = words.len().min(self.next.len());
            let (now, later) = words.split_at(count);
            let (places, free) = self.next.split_at(count);
            for (word, place) in now.iter().zip(places) {
                place.store(u64::from_ne_bytes(*word), Ordering::Relaxed);
            }
            words = later;
            self.next = match free.is_empty() {
                true => std::mem::take(&mut self.then),
                false => free,
            };
        }
    }
}

/// The words of the ring that a record at unit `unit` has for its bytes: those that follow its header,
/// after those at the front.
fn halves(words: &[AtomicU64], units: usize, unit: u64) -> (&[AtomicU64], &[AtomicU64]) {
    let first = (unit as usize & (units - 1)) * UNIT + 1;
    words[WORD_RECORDS..][..units * UNIT].split_at(first)
}

impl Receiver {
    /// Of words that the other side has begun a ring in.
    ///
    /// # Errors
    /// It has not, or the ring is too short to hold anything.
    pub fn new(words: &[AtomicU64]) -> Result<Receiver, Broken> {
        let units = units_in(words.len());
        if units < 2 || words[0].load(Ordering::Relaxed) != VERSION {
            return Err(Broken);
        }
        Ok(Receiver { units, head: 0 })
    }

    fn header<'w>(&self, words: &'w [AtomicU64]) -> &'w AtomicU64 {
        &words[WORD_RECORDS + (self.head as usize & (self.units - 1)) * UNIT]
    }

    /// Whether a record waits.
    pub fn is_waiting(&self, words: &[AtomicU64]) -> bool {
        self.header(words).load(Ordering::Relaxed) != 0
    }

    /// Appends the next record to `into`, with what fills its last word, and returns its length; none if
    /// there is none.
    ///
    /// # Errors
    /// A length that the ring cannot hold, or that no packet has.
    pub fn receive(
        &mut self,
        words: &[AtomicU64],
        into: &mut Vec<[u8; 8]>,
    ) -> Result<Option<usize>, Broken> {
        // Acquire pairs with the Release in `Sender::send`.
        let len = match self.header(words).load(Ordering::Acquire) {
            0 => return Ok(None),
            header => usize::try_from(header - 1).map_err(|_| Broken)?,
        };
        if len > LEN_MAX || units_of(len) >= self.units {
            return Err(Broken);
        }
        let (wrapped, straight) = halves(words, self.units, self.head);
        let count = len.div_ceil(8);
        let here = count.min(straight.len());
        let taken = |word: &AtomicU64| word.load(Ordering::Relaxed).to_ne_bytes();
        into.extend(straight[..here].iter().map(taken));
        if here < count {
            into.extend(wrapped[..count - here].iter().map(taken));
        }
        self.head += units_of(len) as u64;
        // Release pairs with the Acquire in `Sender::send`: what was here has been read.
        words[WORD_HEAD].store(self.head, Ordering::Release);
        Ok(Some(len))
    }

    /// Says that we are going to sleep; whether we may: if not, something has come. The
    /// word stays until somebody has sent something.
    pub fn may_sleep(&self, words: &[AtomicU64]) -> bool {
        words[WORD_ASLEEP].store(1, Ordering::Relaxed);
        // Pairs with the fence in `Sender::is_wanted`.
        fence(Ordering::SeqCst);
        !self.is_waiting(words)
    }

    /// What the sender is doing with memory that has just been taken out of service; none if it does
    /// not reach any.
    pub fn reach(words: &[AtomicU64]) -> Option<Reach> {
        // Pairs with the fence in `Sender::begin_reaching`.
        fence(Ordering::SeqCst);
        // Acquire pairs with the Release in `Sender::end_reaching`.
        let reaches = words[WORD_REACHING].load(Ordering::Acquire);
        (reaches % 2 == 1).then_some(Reach(reaches))
    }
}

/// One time that a sender reaches the receiver's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach(u64);

impl Reach {
    /// Whether it lasts. The next one does not count: what is out of service is not found any more.
    pub fn lasts(self, words: &[AtomicU64]) -> bool {
        // Acquire as in `Receiver::reach`.
        words[WORD_REACHING].load(Ordering::Acquire) == self.0
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn words(units: usize) -> Vec<AtomicU64> {
        (0..words_of(units)).map(|_| AtomicU64::new(0)).collect()
    }

    #[test]
    fn records_of_every_length_come_out_as_they_went_in_around_the_ring() {
        let words = words(16);
        let mut sender = Sender::new(&words);
        let mut receiver = Receiver::new(&words).unwrap();
        assert_eq!(sender.len_max, 15 * 64 - 8);
        for len in (0..=sender.len_max).chain((0..500).rev()) {
            // Bytes that look like headers.
            let bytes: Vec<u8> = (0..len).map(|i| 1 + (i % 3) as u8).collect();
            let (a, b) = bytes.split_at(len / 3);
            let (b, c) = b.split_at(b.len() / 5);
            assert_eq!(sender.send(&words, &[a, b, &[], c]), Ok(true));
            let mut out = vec![[9; 8]];
            assert_eq!(receiver.receive(&words, &mut out), Ok(Some(len)));
            assert_eq!(out.as_flattened()[8..8 + len], bytes);
            assert_eq!(out.len(), 1 + len.div_ceil(8));
            assert_eq!(receiver.receive(&words, &mut out), Ok(None));
            // In whole words.
            let mut record = vec![[7; 8]; len.div_ceil(8)];
            record.as_flattened_mut()[..len].copy_from_slice(&bytes);
            assert_eq!(sender.send_words(&words, &record, len), Ok(true));
            let mut out = Vec::new();
            assert_eq!(receiver.receive(&words, &mut out), Ok(Some(len)));
            assert_eq!(out, record);
        }
        let long = vec![0; sender.len_max + 1];
        assert_eq!(sender.send(&words, &[&long]), Ok(false));
    }

    #[test]
    fn a_full_ring_takes_no_more_until_something_is_taken_out() {
        let words = words(8);
        let mut sender = Sender::new(&words);
        let mut receiver = Receiver::new(&words).unwrap();
        for round in 0..100u8 {
            for _ in 0..7 {
                assert_eq!(sender.send(&words, &[&[round]]), Ok(true));
            }
            assert_eq!(sender.send(&words, &[&[round]]), Ok(false));
            let mut out = Vec::new();
            for _ in 0..7 {
                assert_eq!(receiver.receive(&words, &mut out), Ok(Some(1)));
            }
            assert_eq!(receiver.receive(&words, &mut out), Ok(None));
            let first: Vec<u8> = out.iter().map(|word| word[0]).collect();
            assert_eq!(first, [round; 7]);
        }
    }

    #[test]
    fn whatever_the_other_side_writes_nothing_panics_or_leaves_the_ring() {
        let mut draw = 1u64;
        let mut random = move || {
            draw ^= draw << 13;
            draw ^= draw >> 7;
            draw ^= draw << 17;
            draw
        };
        let (mut broken_sends, mut broken_receives) = (0, 0);
        for _ in 0..2000 {
            let words = words(8);
            let mut sender = Sender::new(&words);
            let mut receiver = Receiver::new(&words).unwrap();
            let mut out = Vec::new();
            for _ in 0..20 {
                let at = random() as usize % words.len();
                let value = random() >> (random() % 64);
                words[at].store(value, Ordering::Relaxed);
                words[WORD_HEAD].store(random() >> (random() % 64), Ordering::Relaxed);
                let bytes = vec![1; random() as usize % 600];
                broken_sends += u32::from(sender.send(&words, &[&bytes]).is_err());
                broken_receives += u32::from(receiver.receive(&words, &mut out).is_err());
                out.clear();
            }
            words[0].store(random(), Ordering::Relaxed);
            assert_eq!(Receiver::new(&words).unwrap_err(), Broken);
        }
        assert!(broken_sends > 100 && broken_receives > 100);
        // A ring that could hold it, and a record that is no packet's.
        let words = self::words(1 << 13);
        for (len, is_sound) in [(LEN_MAX, true), (LEN_MAX + 1, false)] {
            Sender::new(&words);
            let mut receiver = Receiver::new(&words).unwrap();
            words[WORD_RECORDS].store(len as u64 + 1, Ordering::Relaxed);
            let mut out = Vec::new();
            assert_eq!(
                receiver.receive(&words, &mut out).is_ok(),
                is_sound,
                "{len}"
            );
            assert_eq!(out.len(), if is_sound { len / 8 } else { 0 });
        }
        for units in [0, 1] {
            assert!(Receiver::new(&self::words(units)).is_err());
        }
        assert!(Receiver::new(&[]).is_err());
    }

    #[test]
    fn who_sleeps_is_woken_once() {
        let words = words(8);
        let mut sender = Sender::new(&words);
        let receiver = Receiver::new(&words).unwrap();
        assert!(!sender.is_wanted(&words));
        assert!(receiver.may_sleep(&words));
        sender.send(&words, &[&[1]]).unwrap();
        assert!(sender.is_wanted(&words) && !sender.is_wanted(&words));
        assert!(!receiver.may_sleep(&words), "something waits");
        assert!(sender.is_wanted(&words), "which it learns by and by");
        sender.begin_reaching(&words);
        let reach = Receiver::reach(&words).unwrap();
        assert!(reach.lasts(&words));
        sender.end_reaching(&words);
        assert!(!reach.lasts(&words) && Receiver::reach(&words).is_none());
        // Who is back before anybody has looked is not waited for again.
        sender.begin_reaching(&words);
        assert!(!reach.lasts(&words) && Receiver::reach(&words).is_some());
    }
}

/// Explored by `ci/loom`.
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    fn words(units: usize) -> Arc<Vec<AtomicU64>> {
        Arc::new((0..words_of(units)).map(|_| AtomicU64::new(0)).collect())
    }

    /// Four records through a ring that holds one or two: each arrives once, whole, in order.
    #[test]
    fn records_are_neither_lost_nor_torn() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            let words = words(2);
            let theirs = words.clone();
            let mut sender = Sender::new(&words);
            let mut receiver = Receiver::new(&words).unwrap();
            let sending = thread::spawn(move || {
                for record in 1..=3u8 {
                    while !sender.send(&theirs, &[&[record; 16]]).unwrap() {
                        thread::yield_now();
                    }
                }
            });
            let mut out = Vec::new();
            while out.len() < 6 {
                if receiver.receive(&words, &mut out).unwrap().is_none() {
                    thread::yield_now();
                }
            }
            sending.join().unwrap();
            let expected: Vec<[u8; 8]> = (1..=3).flat_map(|record| [[record; 8]; 2]).collect();
            assert_eq!(out, expected);
        });
    }

    /// Either the receiver sees the record before it sleeps, or the sender sees that it sleeps.
    #[test]
    fn no_record_leaves_its_receiver_asleep() {
        loom::model(|| {
            let words = words(2);
            let theirs = words.clone();
            let mut sender = Sender::new(&words);
            let receiver = Receiver::new(&words).unwrap();
            let sending = thread::spawn(move || {
                assert_eq!(sender.send(&theirs, &[&[1]]), Ok(true));
                sender.is_wanted(&theirs)
            });
            let sleeps = receiver.may_sleep(&words);
            assert!(sending.join().unwrap() || !sleeps);
        });
    }

    /// Memory is not taken out of service while the other side reaches it: the word of the table is
    /// cleared, then what is being reached is waited for.
    #[test]
    fn nobody_reaches_what_is_out_of_service() {
        loom::model(|| {
            let words = words(2);
            let in_service = Arc::new(AtomicU64::new(1));
            let memory = Arc::new(AtomicU64::new(1));
            let (theirs, table, target) = (words.clone(), in_service.clone(), memory.clone());
            let sender = Sender::new(&words);
            let receiver = Receiver::new(&words).unwrap();
            let reaching = thread::spawn(move || {
                for _ in 0..2 {
                    sender.begin_reaching(&theirs);
                    if table.load(Ordering::Acquire) == 1 {
                        assert_eq!(target.load(Ordering::Relaxed), 1, "it is still there");
                    }
                    sender.end_reaching(&theirs);
                }
            });
            in_service.store(0, Ordering::Release);
            if let Some(reach) = Receiver::reach(&words) {
                while reach.lasts(&words) {
                    thread::yield_now();
                }
            }
            memory.store(0, Ordering::Relaxed);
            reaching.join().unwrap();
        });
    }
}
