//! What a queue pair has to tell.

use alloc::collections::VecDeque;

use super::types::{Counters, QpEvent};
use super::work::Completion;

/// What the queue pair reports: completions not yet polled, and counters.
#[derive(Debug)]
pub(super) struct Reports {
    pub completions: VecDeque<Completion>,
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

    pub fn poll_event(&mut self) -> Option<QpEvent> {
        let events = self.events;
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

    pub fn complete(&mut self, completion: Completion) {
        *(if completion.kind.is_recv() {
            &mut self.recvs
        } else {
            &mut self.sends
        }) += 1;
        self.completions.push_back(completion);
    }

    pub fn poll(&mut self) -> Option<Completion> {
        let completion = self.completions.pop_front()?;
        *(if completion.kind.is_recv() {
            &mut self.recvs
        } else {
            &mut self.sends
        }) -= 1;
        if self.completions.is_empty() {
            // Begins at the front again: memory for the worst case is not touched in all others.
            self.completions.clear();
        }
        Some(completion)
    }
}
