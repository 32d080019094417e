//! Sets of slots.

use alloc::vec::Vec;

/// Disjoint inclusive ranges of slots, ascending.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SlotSet(Vec<(u64, u64)>);

impl SlotSet {
    /// One range.
    #[must_use]
    pub fn of(lo: u64, hi: u64) -> SlotSet {
        SlotSet(alloc::vec![(lo, hi)])
    }

    /// Whether nothing is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether every slot from `lo` to `hi` is in the set.
    #[must_use]
    pub fn contains(&self, lo: u64, hi: u64) -> bool {
        self.0.iter().any(|&(a, b)| a <= lo && hi <= b)
    }

    /// Whether any slot from `lo` to `hi` is in the set.
    #[must_use]
    pub fn overlaps(&self, lo: u64, hi: u64) -> bool {
        self.0.iter().any(|&(a, b)| a <= hi && lo <= b)
    }

    /// The piece that contains `slot`.
    #[must_use]
    pub fn piece(&self, slot: u64) -> Option<(u64, u64)> {
        self.0
            .iter()
            .copied()
            .find(|&(a, b)| a <= slot && slot <= b)
    }

    /// The pieces, ascending.
    pub fn pieces(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0.iter().copied()
    }

    /// Takes the slots from `lo` to `hi` out.
    pub fn subtract(&mut self, lo: u64, hi: u64) {
        let mut rest = Vec::with_capacity(self.0.len() + 1);
        for &(a, b) in &self.0 {
            if b < lo || hi < a {
                rest.push((a, b));
                continue;
            }
            if a < lo {
                rest.push((a, lo - 1));
            }
            if hi < b {
                rest.push((hi + 1, b));
            }
        }
        self.0 = rest;
    }

    /// Puts the slots from `lo` to `hi` in.
    pub fn insert(&mut self, lo: u64, hi: u64) {
        self.subtract(lo, hi);
        self.0.push((lo, hi));
        self.0.sort_unstable();
    }
}
