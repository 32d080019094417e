//! What a queue pair has to tell.

use alloc::collections::VecDeque;

use super::memory::Rkey;
use super::types::{Counters, QpEvent};
use super::work::{Completion, CompletionKind, Status, WrId};
use crate::wire::Qpn;

/// A completion while it waits: there is room for every work request's, so its length counts.
#[derive(Debug)]
pub(super) struct Waiting {
    wr_id: WrId,
    byte_len: u32,
    /// Immediate data or the key that became invalid; no message has both.
    value: u32,
    source: Qpn,
    status: Status,
    kind: CompletionKind,
    /// Of [`IMM`], [`KEY`] and [`SOLICITED`].
    flags: u8,
}

const IMM: u8 = 1;
const KEY: u8 = 2;
const SOLICITED: u8 = 4;
const _: () = assert!(size_of::<Waiting>() == 24);

/// What the queue pair reports: completions not yet polled, and counters.
#[derive(Debug)]
pub(super) struct Reports {
    pub completions: VecDeque<Waiting>,
    /// How many of `completions` are of sends, and of receives.
    pub sends: u32,
    pub recvs: u32,
    pub counters: Counters,
    /// One bit per [`QpEvent`].
    events: u8,
}

impl Reports {
    pub fn new(depth: usize) -> Self {
        Self {
            completions: VecDeque::with_capacity(depth),
            sends: 0,
            recvs: 0,
            counters: Counters::default(),
            events: 0,
        }
    }

    pub fn raise(&mut self, event: QpEvent) {
        self.events |= 1 << event as u8;
    }

    /// Whether there is anything to poll.
    #[inline]
    pub fn is_any(&self) -> bool {
        self.events != 0 || !self.completions.is_empty()
    }

    #[inline]
    pub fn poll_event(&mut self) -> Option<QpEvent> {
        let events = self.events;
        if events == 0 {
            return None;
        }
        let is_raised = |event: &QpEvent| events & (1 << *event as u8) != 0;
        let event = QpEvent::ALL.iter().copied().find(is_raised)?;
        self.events &= !(1 << event as u8);
        Some(event)
    }

    /// Forget all but the counters.
    pub fn clear(&mut self) {
        self.completions.clear();
        (self.sends, self.recvs, self.events) = (0, 0, 0);
    }

    #[inline]
    pub fn complete(&mut self, completion: Completion) {
        let is_received = completion.kind.is_recv() && completion.status == Status::Success;
        self.counters.rdma_recvs += u64::from(is_received);
        *(if completion.kind.is_recv() {
            &mut self.recvs
        } else {
            &mut self.sends
        }) += 1;
        let key = completion.invalidated.map(|Rkey(key)| key);
        self.completions.push_back(Waiting {
            wr_id: completion.wr_id,
            byte_len: completion.byte_len,
            value: completion.imm.or(key).unwrap_or(0),
            source: completion.source,
            status: completion.status,
            kind: completion.kind,
            flags: (IMM * u8::from(completion.imm.is_some()))
                | (KEY * u8::from(key.is_some()))
                | (SOLICITED * u8::from(completion.solicited)),
        });
    }

    #[inline]
    pub fn poll(&mut self) -> Option<Completion> {
        let waiting = self.completions.pop_front()?;
        *(if waiting.kind.is_recv() {
            &mut self.recvs
        } else {
            &mut self.sends
        }) -= 1;
        if self.completions.is_empty() {
            // Begins at the front again: memory for the worst case is not touched in all others.
            self.completions.clear();
        }
        Some(Completion {
            wr_id: waiting.wr_id,
            status: waiting.status,
            kind: waiting.kind,
            byte_len: waiting.byte_len,
            imm: (waiting.flags & IMM != 0).then_some(waiting.value),
            invalidated: (waiting.flags & KEY != 0).then_some(Rkey(waiting.value)),
            solicited: waiting.flags & SOLICITED != 0,
            source: waiting.source,
        })
    }
}
