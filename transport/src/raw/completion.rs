//! Completion queues and the channels that tell of them.
//!
//! Polling takes from a ring without the device's token. Only a poll that finds nothing tries for
//! it, to drive the device; if another thread has it, that one drives.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use lowtide_transport_proto::qp::{Completion, CompletionKind, Status};

use super::ring::{ENTRY, Ring};
use super::tables::{ChannelLine, Line};
use super::types::{CqId, Error, Qpn, Rkey, WcFlags, WorkCompletion};
use super::{CQE_MAX, Context};
use crate::memory::zeroed_words;
use crate::raw::event_fd::EventFd;

/// Entries of a ring at first, as a logarithm; a deeper queue's grows when it has to.
const LOG_FIRST: usize = 16;
/// What stands for how it ended, and what it was, in an entry of a queue pair that has been reset since.
const VOID: u64 = u64::MAX;
/// Where in the entry.
const VOID_AT: usize = 1;
/// Sizes of rings: the largest holds [`CQE_MAX`].
const RINGS: usize = CQE_MAX.ilog2() as usize + 1;

/// Where completion queues report that something has come. Cloning shares it.
#[derive(Debug, Clone)]
pub struct CompletionChannel {
    line: ChannelLine,
    fd: Arc<EventFd>,
}

impl CompletionChannel {
    /// The number of the next completion queue that was asked to tell and got something.
    pub fn event(&self) -> Option<CqId> {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        line.pop()
    }
}

impl AsFd for CompletionChannel {
    /// Readable while an event waits.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Where completions go. Cloning shares it.
#[derive(Debug, Clone)]
pub struct CompletionQueue(Arc<Handle>);

#[derive(Debug)]
struct Handle {
    context: Context,
    id: CqId,
    done: Arc<Completions>,
}

/// Completions that have not been polled. The holder of the token appends, anybody takes.
#[derive(Debug)]
pub(crate) struct Completions {
    /// Most queues have no other.
    first: Ring,
    /// The logarithm of how many it holds.
    log: usize,
    /// Each holds twice as many as the one before.
    later: [OnceLock<Box<Ring>>; RINGS],
    /// How many of `later` are in use. The last is appended to; those before it are emptied by whoever
    /// polls: what is moved could be overtaken.
    grown: AtomicUsize,
    /// Something has been lost for want of room.
    is_broken: AtomicBool,
}

impl Completions {
    pub(super) fn new(depth: u32) -> Completions {
        let log = depth.next_power_of_two().ilog2() as usize;
        let log = log.min(LOG_FIRST);
        Completions {
            first: Ring::new(zeroed_words(ENTRY << log)),
            log,
            later: [const { OnceLock::new() }; RINGS],
            grown: AtomicUsize::new(0),
            is_broken: AtomicBool::new(false),
        }
    }

    /// Those that may hold something, oldest first.
    fn rings(&self) -> impl Iterator<Item = &Ring> {
        // Acquire pairs with `grow`: there are so many.
        let grown = self.grown.load(Ordering::Acquire);
        let later = self.later[..grown].iter();
        let later = later.filter_map(|ring| ring.get().map(Box::as_ref));
        std::iter::once(&self.first).chain(later)
    }

    /// Whether `depth` completions or more are there, those not counted that are void. Under the
    /// token.
    pub(super) fn has_as_many_as(&self, depth: usize) -> bool {
        if self.rings().map(Ring::len).sum::<usize>() < depth {
            return false;
        }
        let words = self.rings().flat_map(|ring| ring.first(ring.len()));
        words.filter(|words| !is_void(words)).count() >= depth
    }

    /// Whether nothing is there.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        // Acquire as of `rings`.
        if self.grown.load(Ordering::Acquire) > 0 {
            return self.has_none_but_void();
        }
        match self.first.first(1).next() {
            Some(words) => is_void(&words) && self.has_none_but_void(),
            None => true,
        }
    }

    #[cold]
    fn has_none_but_void(&self) -> bool {
        self.rings().all(|ring| {
            while ring.pop_if(is_void).is_some() {}
            ring.len() == 0
        })
    }

    /// Makes the completions of a queue pair void. They keep their places, so that whoever polls
    /// meanwhile finds those of others in their order. Under the token.
    pub(super) fn purge(&self, qpn: Qpn) {
        for ring in self.rings() {
            ring.mark(VOID_AT, VOID, |words| {
                !is_void(words) && qpn_of(words) == qpn
            });
            // A queue that serves one queue pair alone is empty then.
            while ring.pop_if(is_void).is_some() {}
        }
    }

    /// Whether a receive is among the first: something that a program may answer. Under the token.
    pub(super) fn has_received(&self) -> bool {
        let first = self.rings().flat_map(|ring| ring.first(2)).take(2);
        { first }.any(|words| is_recv(&words))
    }

    /// The oldest.
    #[inline]
    pub(crate) fn pop(&self) -> Option<WorkCompletion> {
        self.pop_entry().map(|words| decode(&words))
    }

    fn pop_entry(&self) -> Option<[u64; ENTRY]> {
        loop {
            // Acquire as of `rings`.
            let words = match self.grown.load(Ordering::Acquire) {
                0 => self.first.pop()?,
                _ => self.pop_of_several()?,
            };
            if !is_void(&words) {
                return Some(words);
            }
        }
    }

    #[cold]
    fn pop_of_several(&self) -> Option<[u64; ENTRY]> {
        self.rings().find_map(Ring::pop)
    }

    /// Appends what a queue pair reports if fewer than `depth` are there. Under the token.
    #[inline]
    pub(super) fn push(&self, depth: usize, entry: [u64; ENTRY]) -> bool {
        let has_grown = self.grown.load(Ordering::Relaxed) > 0;
        !has_grown && self.first.push_to(depth, entry) || self.grow(depth, entry)
    }

    /// The same for a queue that has grown, or has to: a ring may be full of what is void.
    #[cold]
    fn grow(&self, depth: usize, entry: [u64; ENTRY]) -> bool {
        if self.has_as_many_as(depth) {
            return false;
        }
        let grown = self.grown.load(Ordering::Relaxed);
        let current = match grown {
            0 => Some(&self.first),
            _ => self.later[grown - 1].get().map(Box::as_ref),
        };
        if current.is_some_and(|ring| ring.push(entry)) {
            return true;
        }
        let log = self.log + grown + 1;
        if log >= RINGS {
            return false;
        }
        let ring =
            self.later[grown].get_or_init(|| Box::new(Ring::new(zeroed_words(ENTRY << log))));
        ring.push(entry);
        self.grown.store(grown + 1, Ordering::Release);
        true
    }

    pub(super) fn is_broken(&self) -> bool {
        self.is_broken.load(Ordering::Relaxed)
    }

    pub(super) fn set_broken(&self) {
        self.is_broken.store(true, Ordering::Relaxed);
    }
}

/// In an entry: the message has immediate data, or it invalidated a key. None has both.
const IMM: u32 = 1;
const KEY: u32 = 2;
/// In an entry: a datagram was received, behind 40 bytes of header.
const GRH: u32 = 4;

/// A completion as an entry of the ring.
#[inline]
pub(super) fn encode(done: &Completion, qpn: Qpn, is_datagram: bool) -> [u64; ENTRY] {
    let pair = |high: u32, low: u32| u64::from(high) << 32 | u64::from(low);
    let (value, mut has) = match (done.imm, done.invalidated) {
        (Some(imm), _) => (imm, IMM),
        (None, Some(Rkey(key))) => (key, KEY),
        (None, None) => (0, 0),
    };
    let is_received = done.kind == CompletionKind::Recv && done.status == Status::Success;
    if is_datagram && is_received {
        has |= GRH;
    }
    let what = u32::from(done.status.code()) | (done.kind as u32) << 8 | has << 16;
    [
        done.wr_id.0,
        pair(done.byte_len, what),
        pair(value, qpn.value()),
        u64::from(done.source.value()),
    ]
}

fn is_void(words: &[u64; ENTRY]) -> bool {
    words[VOID_AT] == VOID
}

fn is_recv(words: &[u64; ENTRY]) -> bool {
    kind(words).is_some_and(CompletionKind::is_recv)
}

fn kind(words: &[u64; ENTRY]) -> Option<CompletionKind> {
    CompletionKind::from_code((words[1] >> 8) as u8)
}

fn qpn_of(words: &[u64; ENTRY]) -> Qpn {
    Qpn::new(words[2] as u32)
}

#[inline]
fn decode(words: &[u64; ENTRY]) -> WorkCompletion {
    let high = |word: u64| (word >> 32) as u32;
    let what = words[1] as u32;
    let has = |bit: u32| what >> 16 & bit != 0;
    let flag = |bit, flag| if has(bit) { flag } else { WcFlags::NONE };
    let whole = "only whole entries are taken";
    WorkCompletion {
        wr_id: words[0],
        status: Status::from_code(what as u8).expect(whole),
        kind: kind(words).expect(whole),
        vendor_err: 0,
        byte_len: high(words[1]),
        imm: has(IMM).then_some(high(words[2])),
        invalidated: has(KEY).then_some(Rkey(high(words[2]))),
        qpn: qpn_of(words),
        source: Qpn::new(words[3] as u32),
        flags: flag(IMM, WcFlags::WITH_IMM)
            | flag(KEY, WcFlags::WITH_INV)
            | flag(GRH, WcFlags::GRH),
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.context.shared.lock().tables.remove_cq(self.id);
    }
}

impl Context {
    /// A new channel.
    ///
    /// # Errors
    /// [`Error::Os`] without file descriptors.
    pub fn completion_channel(&self) -> Result<CompletionChannel, Error> {
        let line = Line::new().map_err(|error| Error::Os(error.raw_os_error().unwrap_or(0)))?;
        Ok(CompletionChannel {
            fd: line.fd(),
            line: Arc::new(Mutex::new(line)),
        })
    }

    /// A completion queue for `depth` entries, which tells `channel` when asked to. One entry too
    /// many breaks it ([`super::types::AsyncEvent::CqError`]).
    ///
    /// # Errors
    /// [`Error::Limit`] for none or too many entries.
    pub fn completion_queue(
        &self,
        depth: u32,
        channel: Option<&CompletionChannel>,
    ) -> Result<CompletionQueue, Error> {
        if depth == 0 || depth > CQE_MAX {
            return Err(Error::Limit("completion queue entries"));
        }
        let line = channel.map(|channel| channel.line.clone());
        let (id, done) = self.shared.lock().tables.add_cq(depth, line);
        Ok(CompletionQueue(Arc::new(Handle {
            context: self.clone(),
            id,
            done,
        })))
    }
}

impl CompletionQueue {
    /// Its number, as events name it.
    pub fn id(&self) -> CqId {
        self.0.id
    }

    pub(crate) fn context(&self) -> &Context {
        &self.0.context
    }

    pub(crate) fn completions(&self) -> &Completions {
        &self.0.done
    }

    /// Appends up to `max` completions to `done` and returns how many. Drives the device if none is
    /// there, unless another thread has it in hand. Never waits for one.
    ///
    /// # Errors
    /// [`Error::Exhausted`] when nothing is left of a queue that had no room once.
    pub fn poll(&self, max: usize, done: &mut Vec<WorkCompletion>) -> Result<usize, Error> {
        self.poll_each(max, |work| done.push(work))
    }

    /// Hands up to `max` completions to `take` and returns how many.
    ///
    /// # Errors
    /// As of [`CompletionQueue::poll`].
    pub fn poll_each(
        &self,
        max: usize,
        mut take: impl FnMut(WorkCompletion),
    ) -> Result<usize, Error> {
        let done = self.completions();
        let mut taken = 0;
        let mut next = match max {
            0 => None,
            _ => self.0.context.shared.find(done, || done.pop()),
        };
        while let Some(work) = next {
            take(work);
            taken += 1;
            next = match taken < max {
                true => done.pop(),
                false => None,
            };
        }
        if taken == 0 && max > 0 && done.is_broken() {
            return Err(Error::Exhausted("completion: the queue has overflowed"));
        }
        Ok(taken)
    }

    /// Sleeps until there is a completion; false when `deadline` has passed.
    pub fn wait(&self, deadline: Instant) -> bool {
        let (shared, done) = (&self.0.context.shared, self.completions());
        shared.sleep_until(deadline, |_| !done.is_empty())
    }

    /// Has the next completion told to the channel, once; `solicited_only`: the next one of a
    /// solicited message or a failure. What is there already is not told: poll once more afterwards.
    pub fn request_notification(&self, solicited_only: bool) {
        let shared = &self.0.context.shared;
        let mut state = shared.lock();
        state.tables.arm_cq(self.0.id, solicited_only);
        shared.hand_over(&mut state);
    }

    /// Changes the number of entries.
    ///
    /// # Errors
    /// [`Error::Limit`] for none, too many, or fewer than are there.
    pub fn resize(&self, depth: u32) -> Result<(), Error> {
        let mut state = self.0.context.shared.lock();
        if depth == 0 || depth > CQE_MAX || !state.tables.resize_cq(self.0.id, depth) {
            return Err(Error::Limit("completion queue entries"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use lowtide_transport_proto::qp::WrId;

    use super::*;

    const OURS: Qpn = Qpn::new(0xFF_FFFF);

    fn reported(wr_id: u64) -> Completion {
        Completion {
            wr_id: WrId(wr_id),
            status: Status::Success,
            kind: CompletionKind::RecvWriteImm,
            byte_len: 1 << 31,
            imm: Some(u32::MAX),
            invalidated: None,
            solicited: true,
            source: Qpn::new(0xABCDEF),
        }
    }

    fn work(wr_id: u64) -> WorkCompletion {
        WorkCompletion {
            wr_id,
            status: Status::Success,
            kind: CompletionKind::RecvWriteImm,
            vendor_err: 0,
            byte_len: 1 << 31,
            imm: Some(u32::MAX),
            invalidated: None,
            qpn: OURS,
            source: Qpn::new(0xABCDEF),
            flags: WcFlags::WITH_IMM,
        }
    }

    fn entry(wr_id: u64) -> [u64; ENTRY] {
        encode(&reported(wr_id), OURS, false)
    }

    #[test]
    fn an_entry_says_all_that_a_completion_does() {
        let failed = Completion {
            status: Status::Flushed,
            kind: CompletionKind::Send,
            byte_len: 0,
            imm: None,
            ..reported(u64::MAX)
        };
        let invalidated = Completion {
            imm: None,
            invalidated: Some(Rkey(0x1234_5678)),
            kind: CompletionKind::Recv,
            ..reported(0)
        };
        let failed_receive = Completion {
            kind: CompletionKind::Recv,
            ..failed
        };
        let cases = [
            (reported(1), false, WcFlags::WITH_IMM),
            (failed, true, WcFlags::NONE),
            (invalidated, false, WcFlags::WITH_INV),
            (invalidated, true, WcFlags::WITH_INV | WcFlags::GRH),
            (failed_receive, true, WcFlags::NONE),
        ];
        for (done, is_datagram, flags) in cases {
            let expected = WorkCompletion {
                wr_id: done.wr_id.0,
                status: done.status,
                kind: done.kind,
                byte_len: done.byte_len,
                imm: done.imm,
                invalidated: done.invalidated,
                flags,
                ..work(0)
            };
            let entry = encode(&done, OURS, is_datagram);
            assert_eq!(decode(&entry), expected);
            assert_eq!(is_recv(&entry), done.kind.is_recv());
            assert_eq!(qpn_of(&entry), OURS);
            assert!(!is_void(&entry));
        }
    }

    #[test]
    fn a_deep_queue_grows_and_keeps_the_order() {
        let done = Completions::new(1 << (LOG_FIRST + 2));
        let count = 3 << LOG_FIRST;
        (0..count).for_each(|id| assert!(done.push(count as usize, entry(id))));
        assert!(!done.push(count as usize, entry(count)));
        let has = |count: u64| done.has_as_many_as(count as usize);
        assert!(has(count) && !has(count + 1));
        (0..count).for_each(|id| assert_eq!(done.pop(), Some(work(id))));
        assert!(done.is_empty() && done.pop().is_none());
    }

    #[test]
    fn completions_of_a_queue_pair_that_was_reset_are_neither_had_nor_counted() {
        let done = Completions::new(16);
        let of = |id: u64, qpn| WorkCompletion {
            qpn: Qpn::new(qpn),
            ..work(id)
        };
        let push = |id, qpn| done.push(16, encode(&reported(id), Qpn::new(qpn), false));
        for id in 0..12 {
            assert!(push(id, 1 + id as u32 % 3));
        }
        done.purge(Qpn::new(1));
        assert!(done.has_as_many_as(8) && !done.has_as_many_as(9));
        for id in (0..12).filter(|id| id % 3 > 0) {
            assert!(!done.is_empty());
            assert_eq!(done.pop(), Some(of(id, 1 + id as u32 % 3)));
        }
        assert!(done.is_empty() && done.pop().is_none());
        // A queue that serves one alone has all its room again, however often.
        for _ in 0..1000 {
            (0..16).for_each(|id| assert!(push(id, 1)));
            assert!(!push(16, 1));
            done.purge(Qpn::new(1));
        }
        assert_eq!(done.grown.load(Ordering::Relaxed), 0);
        assert!(done.is_empty());
    }

    /// Voids count for nothing, so a ring may be full of them while the queue has room.
    #[test]
    fn what_is_void_in_the_middle_takes_no_room_of_the_queues() {
        let done = Completions::new(16);
        let push = |id, qpn| done.push(16, encode(&reported(id), Qpn::new(qpn), false));
        assert!(push(0, 1));
        (1..16).for_each(|id| assert!(push(id, 2)));
        done.purge(Qpn::new(2));
        (1..16).for_each(|id| assert!(push(id, 1)));
        assert!(!push(16, 1));
        (0..16).for_each(|id| assert_eq!(done.pop().map(|work| work.wr_id), Some(id)));
        assert!(done.is_empty());
    }
}
