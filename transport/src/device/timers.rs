//! When which queue pair wants to be called again.
//!
//! Owns: a heap of due times that is corrected lazily. A deadline that moves later, as it does with
//! every acknowledgement, costs nothing; its owner is looked at once when the old one falls due.
//!
//! Invariant: an index has at most one live entry; others in the heap are ignored when they surface.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use lowtide_transport_proto::time::Nanos;

/// Due times by index.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    heap: BinaryHeap<Reverse<(Nanos, u32)>>,
    /// Time of the live entry of each index.
    live: Vec<Option<Nanos>>,
}

impl Timers {
    /// `index` wants a call at `due` or not at all. Calls may also come earlier.
    pub(crate) fn set(&mut self, index: u32, due: Option<Nanos>) {
        let Some(due) = due else { return };
        if self.live.len() <= index as usize {
            self.live.resize(index as usize + 1, None);
        }
        let live = &mut self.live[index as usize];
        if live.is_none_or(|at| due < at) {
            *live = Some(due);
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
