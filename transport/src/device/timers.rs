//! When which queue pair wants to be called again.
//!
//! Owns: a heap of due times that is corrected lazily. A deadline that moves later, as it does with
//! every acknowledgement, costs nothing; its owner is looked at once when the old one falls due.
//!
//! Invariants: an index has at most one live entry; others in the heap are ignored when they surface.
//! The heap never has more than [`ENTRIES`] entries per index: then the dead ones are taken out. Its
//! memory is reserved when an index comes into use, so setting a timer allocates nothing.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use lowtide_transport_proto::time::Nanos;

/// Entries of the heap per index that was ever in use, dead ones included.
const ENTRIES: usize = 4;

/// Due times by index.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    heap: BinaryHeap<Reverse<(Nanos, u32)>>,
    /// Time of the live entry of each index.
    live: Vec<Option<Nanos>>,
}

impl Timers {
    /// `index` wants a call at `due` or not at all. Calls may also come earlier.
    #[inline(always)] // there is nothing to do, most often
    pub(crate) fn set(&mut self, index: u32, due: Option<Nanos>) {
        let Some(due) = due else { return };
        match self.live.get(index as usize) {
            Some(Some(at)) if *at <= due => {}
            _ => self.bring_forward(index, due),
        }
    }

    #[inline(never)]
    fn bring_forward(&mut self, index: u32, due: Nanos) {
        if self.live.len() <= index as usize {
            self.live.resize(index as usize + 1, None);
            let room = ENTRIES * self.live.len();
            self.heap.reserve(room - self.heap.len());
        }
        let live = &mut self.live[index as usize];
        if live.is_none_or(|at| due < at) {
            *live = Some(due);
            if self.heap.len() == ENTRIES * self.live.len() {
                let live = &self.live;
                // The new entry is not in it, and an index has no other that is live.
                self.heap
                    .retain(|Reverse((at, index))| live[*index as usize] == Some(*at));
            }
            self.heap.push(Reverse((due, index)));
        }
    }

    /// The next index whose time has come; it must be set again.
    pub(crate) fn pop(&mut self, now: Nanos) -> Option<u32> {
        while let Some(&Reverse((at, index))) = self.heap.peek() {
            if at > now {
                return None;
            }
            self.heap.pop();
            if self.live[index as usize] == Some(at) {
                self.live[index as usize] = None;
                return Some(index);
            }
        }
        None
    }

    /// When `pop` will return something at the earliest.
    pub(crate) fn next(&self) -> Option<Nanos> {
        self.heap.peek().map(|Reverse((at, _))| *at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dead_entries_do_not_pile_up() {
        let mut timers = Timers::default();
        timers.set(0, Some(Nanos(1_000_000)));
        let capacity = timers.heap.capacity();
        for round in 0..1000 {
            // A short time falls due, and the long one is set anew.
            timers.set(0, Some(Nanos(round)));
            assert_eq!(timers.pop(Nanos(round)), Some(0));
            timers.set(0, Some(Nanos(2_000_000 + round)));
        }
        assert_eq!(timers.heap.capacity(), capacity);
        assert_eq!(timers.pop(Nanos(2_000_998)), None);
        assert_eq!(timers.pop(Nanos(2_000_999)), Some(0));
    }

    #[test]
    fn only_the_earliest_time_of_an_index_counts() {
        let at = Nanos;
        let mut timers = Timers::default();
        timers.set(3, Some(at(50)));
        timers.set(3, Some(at(90)));
        timers.set(1, Some(at(70)));
        timers.set(3, Some(at(20)));
        timers.set(2, None);
        assert_eq!(timers.next(), Some(at(20)));
        assert_eq!(timers.pop(at(19)), None);
        assert_eq!(timers.pop(at(20)), Some(3));
        assert_eq!(timers.pop(at(60)), None, "the entry at 50 is dead");
        assert_eq!(timers.pop(at(70)), Some(1));
        assert_eq!((timers.pop(at(1000)), timers.next()), (None, None));
    }
}
