//! Answers to READs and atomics: their bytes are placed in sequence; those that come ahead of a missing
//! one the caller keeps, and only what is missing is asked for again, of peers that report gaps.
//!
//! A READ's bytes could be placed ahead of their turn. But two READs may have the same target, and then
//! the later one's bytes must stay.

use alloc::boxed::Box;

use super::super::memory::Memory;
use super::super::types::{DropReason, Outcome, Transmit};
use super::super::work::Status;
use super::super::{Link, Reports};
use super::gaps::{AHEAD_MAX, Gaps};
use super::{Failure, Requester};
use crate::time::Nanos;
use crate::wire::Psn;

impl Requester {
    /// A READ response packet or an atomic's old value, for sequence number `seq`.
    pub(super) fn handle_answer(
        &mut self,
        seq: u64,
        payload: &[u8],
        atomic: bool,
        memory: &mut impl Memory,
        link: &Link,
        out: &mut Reports,
    ) -> Result<Outcome, Failure> {
        self.acknowledge(seq, link, out);
        self.note_executed(seq + 1);
        let Some(wqe) = self.queue.front().copied().filter(|_| self.una == seq) else {
            return Ok(self.judge_early(seq, payload.len(), link));
        };
        let index = (seq - wqe.first) as u32;
        let Some((len, _)) = wqe
            .answer(index, link)
            .filter(|answer| *answer == (payload.len() as u32, atomic))
        else {
            return Err(Failure::of_packet(seq, Status::BadResponse));
        };
        let offset = index * link.mtu.bytes();
        let mut rest = payload;
        for fragment in self.lists.slice(&wqe.local, offset, len).as_slice() {
            let (piece, tail) = rest.split_at(fragment.len as usize);
            if memory.place(*fragment, piece).is_err() {
                return Err(Failure::of_packet(seq, Status::LocalProtection));
            }
            rest = tail;
        }
        // The last packet of a request that was sent frees its place among max_rd_atomic.
        if atomic || wqe.read_packets(index, self.attr.read_chunk_packets) == 1 {
            self.reads_out = self.reads_out.saturating_sub(1);
        }
        self.una += 1;
        if self.una == wqe.end() {
            self.finish_front(link, out);
            self.finish_done(link, out);
        }
        self.catch_up();
        Ok(Outcome::Accepted)
    }

    /// An answer that comes before its turn.
    fn judge_early(&mut self, seq: u64, len: usize, link: &Link) -> Outcome {
        if !link.reports_gaps || seq >= self.next {
            return Outcome::Accepted; // it has told that others were lost
        }
        let fits = len <= link.mtu.bytes() as usize && seq - self.una < AHEAD_MAX;
        match self.open_gaps().arrive(seq) {
            true if fits => Outcome::Ahead,
            true => Outcome::Dropped(DropReason::OutOfSequence),
            false => Outcome::Dropped(DropReason::Stale),
        }
    }

    /// The peer has answered everything before `end`, and some of it has not come. False if that is no
    /// news, or of a peer that reports no gaps.
    pub(super) fn miss(&mut self, end: u64, link: &Link) -> bool {
        let is_news = link.reports_gaps && self.una < end && end <= self.next;
        if is_news {
            self.open_gaps().miss(end);
        }
        is_news
    }

    /// The caller keeps the answer with this PSN, which has just come.
    pub fn note_kept(&mut self, psn: Psn) {
        let seq = self.una + u64::from(psn.offset_from(self.psn(self.una)));
        if let Some(gaps) = self.gaps_mut() {
            gaps.keep(seq);
        }
    }

    /// The PSN of the answer whose turn has come, if the caller keeps it.
    pub fn wants_kept(&self) -> Option<Psn> {
        let is_answer = self.queue.front().is_some_and(|wqe| wqe.wants_response());
        let has_come = self.gaps().is_some_and(|gaps| gaps.has(self.una));
        (is_answer && has_come).then(|| self.psn(self.una))
    }

    /// The caller does not have it any more.
    pub fn forget_kept(&mut self) {
        let una = self.una;
        if let Some(gaps) = self.gaps_mut() {
            gaps.forget(una);
        }
    }

    /// After news: what is before the oldest gap is done with, and what has been executed behind it
    /// needs no more answer.
    pub(super) fn pass_gaps(&mut self, link: &Link, out: &mut Reports) {
        let Some(top) = self.gaps().map(Gaps::top) else {
            return;
        };
        self.acknowledge(top, link, out);
        let una = self.una;
        if let Some(gaps) = self.gaps_mut() {
            gaps.pass(una);
        }
        self.settle();
        self.has_gaps = una < top;
    }

    /// A packet that is missing is not timed, and what has come ahead of it is by its coming.
    pub(super) fn time_early(&mut self, now: Nanos, seq: u64) {
        if let Some((timed, sent)) = self.timed
            && self.has_gaps
            && timed <= seq
        {
            if timed == seq {
                self.round_trip.sample(now.since(sent));
            }
            self.timed = None;
        }
    }

    /// Ask for the oldest answers that were lost: the whole gap, or what one request had asked for of it.
    pub(super) fn ask_again(&mut self, link: &Link, out: &mut Reports) -> Option<Transmit> {
        loop {
            let (seq, end) = self.first_missing()?;
            let at = self.queue.partition_point(|wqe| wqe.end() <= seq);
            let wqe = *self.queue.get(at)?;
            let high = self.high;
            if !wqe.wants_response() {
                self.gaps_mut()?.skip(seq, wqe.end());
                continue;
            }
            let (mut transmit, psns) = self.build(&wqe, seq, end, true, link);
            transmit.is_retransmission = true;
            out.counters.retransmitted_pkts += 1;
            self.gaps_mut()?
                .note_asked(seq, seq + u64::from(psns), high);
            return Some(transmit);
        }
    }

    /// The peer remembers as many READs and atomics, and no more of them may wait for their answers.
    fn first_missing(&self) -> Option<(u64, u64)> {
        self.gaps()?
            .first_lost(usize::from(self.attr.max_rd_atomic.max(1)))
    }

    #[inline]
    pub(super) fn has_missing(&self) -> bool {
        self.has_gaps && self.first_missing().is_some()
    }

    /// Whether answers are missing.
    #[inline]
    pub fn has_gaps(&self) -> bool {
        self.has_gaps
    }

    pub(super) fn gaps(&self) -> Option<&Gaps> {
        self.gaps.as_deref().filter(|_| self.has_gaps)
    }

    pub(super) fn gaps_mut(&mut self) -> Option<&mut Gaps> {
        self.gaps.as_deref_mut().filter(|_| self.has_gaps)
    }

    fn open_gaps(&mut self) -> &mut Gaps {
        let una = self.una;
        let gaps = self.gaps.get_or_insert_with(|| Box::new(Gaps::new()));
        if !core::mem::replace(&mut self.has_gaps, true) {
            gaps.restart(una);
        }
        gaps
    }
}
