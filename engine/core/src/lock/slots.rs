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

    /// Index of the first piece that ends at `slot` or behind it.
    fn reaching(&self, slot: u64) -> usize {
        self.0.partition_point(|&(_, b)| b < slot)
    }

    /// Whether every slot from `lo` to `hi` is in the set.
    #[must_use]
    pub fn contains(&self, lo: u64, hi: u64) -> bool {
        self.piece(lo).is_some_and(|(_, b)| hi <= b)
    }

    /// Whether any slot from `lo` to `hi` is in the set.
    #[must_use]
    pub fn overlaps(&self, lo: u64, hi: u64) -> bool {
        self.0.get(self.reaching(lo)).is_some_and(|&(a, _)| a <= hi)
    }

    /// The piece that contains `slot`.
    #[must_use]
    pub fn piece(&self, slot: u64) -> Option<(u64, u64)> {
        let piece = self.0.get(self.reaching(slot)).copied();
        piece.filter(|&(a, _)| a <= slot)
    }

    /// The pieces, ascending.
    pub fn pieces(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0.iter().copied()
    }

    /// Takes the slots from `lo` to `hi` out.
    pub fn subtract(&mut self, lo: u64, hi: u64) {
        let first = self.reaching(lo);
        let behind = first + self.0[first..].partition_point(|&(a, _)| a <= hi);
        if first == behind {
            return;
        }
        let (a, b) = (self.0[first].0, self.0[behind - 1].1);
        let left = (a < lo).then(|| (a, lo - 1));
        let right = (hi < b).then(|| (hi + 1, b));
        self.0.splice(first..behind, left.into_iter().chain(right));
    }

    /// Puts the slots from `lo` to `hi` in.
    pub fn insert(&mut self, lo: u64, hi: u64) {
        self.subtract(lo, hi);
        let at = self.reaching(lo);
        self.0.insert(at, (lo, hi));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against a plain list of slots, over all that can be said about a few of them.
    #[test]
    fn a_slot_set_equals_a_list_of_slots() {
        let mut random = 0x10ad_u64;
        let mut range = || {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let (a, b) = (random >> 40 & 15, random >> 50 & 15);
            (a.min(b), a.max(b))
        };
        for _ in 0..500 {
            let mut set = SlotSet::default();
            let mut list = [false; 16];
            for step in 0..12 {
                let (lo, hi) = range();
                if step % 3 == 2 {
                    set.subtract(lo, hi);
                } else {
                    set.insert(lo, hi);
                }
                list[lo as usize..=hi as usize].fill(step % 3 != 2);
                let held: Vec<u64> = set.pieces().flat_map(|(a, b)| a..=b).collect();
                let expected = (0..16).filter(|&slot| list[slot as usize]);
                assert_eq!(held, expected.collect::<Vec<u64>>());
                let (lo, hi) = range();
                let slots = &list[lo as usize..=hi as usize];
                assert_eq!(set.overlaps(lo, hi), slots.contains(&true));
                let piece = set.pieces().find(|&(a, b)| a <= lo && lo <= b);
                assert_eq!(set.piece(lo), piece);
                assert_eq!(set.contains(lo, hi), piece.is_some_and(|(_, b)| hi <= b));
            }
        }
        let mut all = SlotSet::of(0, u64::MAX);
        all.subtract(u64::MAX, u64::MAX);
        all.subtract(0, 0);
        assert_eq!(all, SlotSet::of(1, u64::MAX - 1));
    }
}
