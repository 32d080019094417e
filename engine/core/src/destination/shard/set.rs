//! Sets of a destination's shards, in one word.

use super::SHARDS_MAX;

/// Some shards of a destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShardSet(u64);

impl ShardSet {
    /// The shards with numbers below `count`.
    #[must_use]
    pub fn all(count: u32) -> ShardSet {
        ShardSet(u64::MAX >> (64 - count.clamp(1, SHARDS_MAX)))
    }

    /// Puts a shard in.
    pub fn insert(&mut self, number: u32) {
        self.0 |= 1 << number;
    }

    /// Puts all of `others` in.
    pub fn extend(&mut self, others: ShardSet) {
        self.0 |= others.0;
    }

    /// Takes a shard out; whether it was in.
    pub fn remove(&mut self, number: u32) -> bool {
        let before = self.0;
        self.0 &= !(1 << number);
        before != self.0
    }

    /// How many.
    #[must_use]
    pub fn len(self) -> u32 {
        self.0.count_ones()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Their numbers, ascending.
    pub fn iter(self) -> impl Iterator<Item = u32> {
        (0..SHARDS_MAX).filter(move |n| self.0 >> n & 1 == 1)
    }
}
