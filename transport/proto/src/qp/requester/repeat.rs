//! Selective repetition, to peers that report gaps: only what was lost is sent again.

use alloc::boxed::Box;

use super::super::types::Transmit;
use super::super::{Link, Reports};
use super::board::Board;
use crate::time::Nanos;
use crate::wire::{Packet, Syndrome};

use super::{ACK_REQ_INTERVAL, ACK_REQ_INTERVAL_LOSSY, LOSSY, Requester, WINDOW, Wqe};

impl Requester {
    /// The peer reports a gap at `seq`, and which of the packets behind it keeps. False if it has kept
    /// none, so that everything must be sent again.
    pub(super) fn handle_report(&mut self, now: Nanos, seq: u64, map: u64) -> bool {
        if map == 0 {
            return false;
        }
        self.track(seq);
        let next = self.next;
        let Some(board) = self.board_mut() else {
            return false;
        };
        board.report(seq, map, next);
        self.time_kept(now);
        self.settle();
        true
    }

    /// What arrived ahead of a gap is timed by the report, not by the end of the gap; what was lost, not
    /// at all.
    fn time_kept(&mut self, now: Nanos) {
        let Some((seq, sent)) = self.timed else {
            return;
        };
        match self.board().and_then(|board| board.fate(seq)) {
            Some(true) => {
                self.round_trip.sample(now.since(sent));
                self.timed = None;
            }
            Some(false) => self.timed = None,
            None => {}
        }
    }

    /// The peer has executed every request before `end`.
    pub(super) fn note_executed(&mut self, end: u64) {
        let next = self.next;
        if let Some(board) = self.board_mut() {
            board.acknowledge(end, next);
            self.settle();
        }
    }

    /// An answer of no packet that is waited for.
    pub(super) fn note_stale(&mut self, packet: &Packet<'_>) {
        let back = self.psn(self.una).offset_from(packet.psn());
        let syndrome = packet.aeth().map(|aeth| aeth.syndrome);
        let is_repeated = matches!(syndrome, Some(Syndrome::Ack { .. })) && back <= WINDOW;
        if is_repeated && self.board_mut().is_some_and(Board::note_needless) {
            // Everything counts as under way; what is missing the next report tells.
            self.is_tracking = false;
        }
    }

    /// A probe repeats the oldest packet: an answer tells that all sent before it has arrived, or is
    /// lost. Of a READ it asks for what is known to be missing.
    pub(super) fn probe(&mut self, now: Nanos, link: &Link, out: &mut Reports) -> Option<Transmit> {
        let (una, next, high) = (self.una, self.next, self.high);
        let wqe = *self.queue.front()?;
        let end = self.gaps().map_or(u64::MAX, |gaps| gaps.end_of(una));
        let (mut transmit, psns) = self.build(&wqe, una, end, true, link);
        transmit.is_retransmission = true;
        self.probed = Some((una, now));
        self.timed = None;
        if wqe.wants_response() {
            if let Some(gaps) = self.gaps_mut() {
                gaps.note_asked(una, una + u64::from(psns), high);
            }
        } else if link.reports_gaps {
            self.track(una);
            if let Some(board) = self.board_mut() {
                board.note_repeated(una, next);
            }
        }
        out.counters.probes += 1;
        out.counters.retransmitted_pkts += 1;
        Some(transmit)
    }

    /// Send the oldest lost packet again.
    pub(super) fn repeat_lost(&mut self, link: &Link, out: &mut Reports) -> Option<Transmit> {
        let seq = self.board()?.first_lost()?;
        let at = self.queue.partition_point(|wqe| wqe.end() <= seq);
        let (mut transmit, _) = self.build(self.queue.get(at)?, seq, u64::MAX, true, link);
        transmit.is_retransmission = true;
        out.counters.retransmitted_pkts += 1;
        let next = self.next;
        if let Some(board) = self.board_mut() {
            board.note_repeated(seq, next);
        }
        Some(transmit)
    }

    #[inline]
    pub(super) fn has_lost(&self) -> bool {
        self.is_tracking && self.board().and_then(Board::first_lost).is_some()
    }

    /// Packets after which an ACK is asked for.
    pub(super) fn ack_req_interval(&self) -> u32 {
        match self.is_lossy() {
            true => ACK_REQ_INTERVAL_LOSSY,
            false => ACK_REQ_INTERVAL,
        }
    }

    /// How long after the last progress the next probe goes out.
    pub(super) fn probe_after(&self) -> Nanos {
        self.round_trip.probe_after(self.is_lossy())
    }

    const fn is_lossy(&self) -> bool {
        self.next < self.lossy_until
    }

    pub(super) fn board(&self) -> Option<&Board> {
        self.board.as_deref().filter(|_| self.is_tracking)
    }

    pub(super) fn board_mut(&mut self) -> Option<&mut Board> {
        self.board.as_deref_mut().filter(|_| self.is_tracking)
    }

    /// Have a board; the peer expects `base`.
    fn track(&mut self, base: u64) {
        if self.is_tracking {
            return;
        }
        let chunk = self.attr.read_chunk_packets;
        let is_packet = |seq| {
            let at = self.queue.partition_point(|wqe: &Wqe| wqe.end() <= seq);
            self.queue
                .get(at)
                .is_some_and(|wqe| wqe.is_packet(seq, chunk))
        };
        let board = Board::new(base, self.next, is_packet);
        match &mut self.board {
            Some(old) => **old = board,
            // Once in the life of the queue pair.
            None => self.board = Some(Box::new(board)),
        }
        self.is_tracking = true;
    }

    /// After news from the peer.
    pub(super) fn settle(&mut self) {
        if self.has_lost() || self.has_missing() {
            self.lossy_until = self.next + LOSSY;
        }
        if self.board().is_some_and(Board::is_over) {
            self.is_tracking = false;
        }
    }
}
