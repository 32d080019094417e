//! What a source holds from the tiers above it: the holder half of the locks.
//!
//! Mirrors the server: a grant swallows the holder's weaker or equal ones beneath it. Nothing new is
//! done under slots that are asked back.
//!
//! Deliberately absent: when a slot may be yielded, which the source knows.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

use super::SlotSet;
use crate::ids::{Age, GrantId, NodeId};
use crate::message::Reclaim;
use crate::op::{Key, Mode, Range};

/// A range held from the tier above.
#[derive(Clone, Debug)]
struct Holding {
    grant: GrantId,
    mode: Mode,
    slots: SlotSet,
    /// Asked back, and the age of who wants it; nothing new is done under these slots.
    yielding: Vec<(u64, u64, Age)>,
    /// `Some`: every object in the range lies in one of these slots. `None`: not known.
    occupied: Option<BTreeSet<u64>>,
}

impl Holding {
    /// Forgets what was asked back of slots that are not held any more, as the server does.
    fn forget_idle_recalls(&mut self) {
        let slots = &self.slots;
        self.yielding.retain(|&(lo, hi, _)| slots.overlaps(lo, hi));
    }
}

/// A range that is asked back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recall {
    /// Its home.
    pub home: NodeId,
    /// The grant.
    pub grant: GrantId,
    /// What to yield.
    pub range: Range,
    /// Age of the oldest work that wants it.
    pub age: Age,
}

/// What a source holds from the tiers above it.
#[derive(Clone, Debug, Default)]
pub struct Holdings {
    spaces: BTreeMap<(NodeId, u64), Vec<Holding>>,
    /// Spaces in which something may be asked back: a source holds thousands, of which few are.
    asked_back: BTreeSet<(NodeId, u64)>,
}

impl Holdings {
    /// A grant arrived.
    pub fn granted(&mut self, home: NodeId, grant: GrantId, range: Range, mode: Mode, empty: bool) {
        let list = self.spaces.entry((home, range.space)).or_default();
        // Mirrors the server: a grant swallows the holder's weaker or equal ones beneath it.
        // What was known of the swallowed slots stays known.
        let mut known: Option<BTreeSet<u64>> = empty.then(BTreeSet::new);
        for h in list.iter_mut().filter(|h| h.mode <= mode) {
            if known.is_none() && h.slots.contains(range.lo, range.hi) {
                known = h.occupied.clone();
            }
            h.slots.subtract(range.lo, range.hi);
            h.forget_idle_recalls();
        }
        list.retain(|h| !h.slots.is_empty());
        list.push(Holding {
            grant,
            mode,
            slots: SlotSet::of(range.lo, range.hi),
            yielding: Vec::new(),
            occupied: known,
        });
    }

    /// Whether one grant covers the whole range and is not being yielded there.
    #[must_use]
    pub fn covers(&self, home: NodeId, range: Range, mode: Mode) -> bool {
        self.covering(home, range, mode).is_some()
    }

    /// Whether every slot of the range is covered by some grant that is not being yielded there. What a
    /// server below has granted from one grant may stand on several later: a new one takes from an
    /// older one what it covers.
    #[must_use]
    pub fn covers_jointly(&self, home: NodeId, range: Range, mode: Mode) -> bool {
        let mut exposed = SlotSet::of(range.lo, range.hi);
        let list = self.spaces.get(&(home, range.space));
        for h in list.into_iter().flatten().filter(|h| h.mode >= mode) {
            let mut kept = h.slots.clone();
            for &(lo, hi, _) in &h.yielding {
                kept.subtract(lo, hi);
            }
            for (lo, hi) in kept.pieces() {
                exposed.subtract(lo, hi);
            }
        }
        exposed.is_empty()
    }

    /// The widest piece around `range` that is held in `mode` and not being yielded.
    #[must_use]
    pub fn bound(&self, home: NodeId, range: Range, mode: Mode) -> Option<Range> {
        let h = self.covering(home, range, mode)?;
        let (mut lo, mut hi) = h.slots.piece(range.lo)?;
        for &(a, b, _) in &h.yielding {
            if b < range.lo {
                lo = lo.max(b + 1);
            } else if a > range.hi {
                hi = hi.min(a - 1);
            }
        }
        Some(Range {
            space: range.space,
            lo,
            hi,
        })
    }

    fn covering(&self, home: NodeId, range: Range, mode: Mode) -> Option<&Holding> {
        self.spaces.get(&(home, range.space))?.iter().find(|h| {
            h.mode >= mode
                && h.slots.contains(range.lo, range.hi)
                && !h
                    .yielding
                    .iter()
                    .any(|&(a, b, _)| a <= range.hi && range.lo <= b)
        })
    }

    /// Whether a covering grant proves that no object lies in `range`.
    #[must_use]
    pub fn proves_empty(&self, home: NodeId, range: Range) -> bool {
        self.spaces.get(&(home, range.space)).is_some_and(|list| {
            list.iter().any(|h| {
                h.slots.contains(range.lo, range.hi)
                    && h.occupied
                        .as_ref()
                        .is_some_and(|o| o.range(range.lo..=range.hi).next().is_none())
            })
        })
    }

    /// Somebody may have written in `range` past this holder: nothing is known to be empty there.
    pub fn doubt(&mut self, home: NodeId, range: &Range) {
        for h in self
            .spaces
            .get_mut(&(home, range.space))
            .into_iter()
            .flatten()
        {
            if h.slots.overlaps(range.lo, range.hi) {
                h.occupied = None;
            }
        }
    }

    /// An object in this slot may exist from now on.
    pub fn occupy(&mut self, home: NodeId, key: &Key) {
        let Some(list) = self.spaces.get_mut(&(home, key.space)) else {
            return;
        };
        for h in list
            .iter_mut()
            .filter(|h| h.slots.contains(key.slot, key.slot))
        {
            if let Some(occupied) = &mut h.occupied {
                occupied.insert(key.slot);
            }
        }
    }

    /// The tier above wants a range back, for work of this age. Returns whether the grant is held
    /// there at all.
    pub fn revoke(&mut self, home: NodeId, grant: GrantId, range: Range, age: Age) -> bool {
        let Some(list) = self.spaces.get_mut(&(home, range.space)) else {
            return false;
        };
        let Some(h) = list.iter_mut().find(|h| h.grant == grant) else {
            return false;
        };
        let held = h.slots.overlaps(range.lo, range.hi);
        let same = |y: &&mut (u64, u64, Age)| (y.0, y.1) == (range.lo, range.hi);
        if let Some(known) = h.yielding.iter_mut().find(same) {
            known.2 = known.2.min(age);
        } else if held {
            h.yielding.push((range.lo, range.hi, age));
            self.asked_back.insert((home, range.space));
        }
        held
    }

    /// What is asked back and not yielded yet, cut to what each grant still has: who holds the rest
    /// of the range under another grant keeps nobody from yielding this one.
    #[must_use]
    pub fn yielding(&self) -> Vec<Recall> {
        let mut all = Vec::new();
        for &(home, space) in &self.asked_back {
            for h in self.spaces.get(&(home, space)).into_iter().flatten() {
                for &(lo, hi, age) in &h.yielding {
                    let held = h.slots.pieces().filter(|&(a, b)| a <= hi && lo <= b);
                    all.extend(held.map(|(a, b)| Recall {
                        home,
                        grant: h.grant,
                        range: Range {
                            space,
                            lo: a.max(lo),
                            hi: b.min(hi),
                        },
                        age,
                    }));
                }
            }
        }
        all
    }

    /// The range is yielded: forget it.
    pub fn yielded(&mut self, home: NodeId, grant: GrantId, range: Range) {
        let Some(list) = self.spaces.get_mut(&(home, range.space)) else {
            return;
        };
        for h in list.iter_mut().filter(|h| h.grant == grant) {
            h.slots.subtract(range.lo, range.hi);
            h.forget_idle_recalls();
            if let Some(occupied) = &mut h.occupied {
                let yielded = occupied.range(range.lo..=range.hi).copied();
                for slot in yielded.collect::<Vec<u64>>() {
                    occupied.remove(&slot);
                }
            }
        }
        list.retain(|h| !h.slots.is_empty());
        if list.iter().all(|h| h.yielding.is_empty()) {
            self.asked_back.remove(&(home, range.space));
        }
        if list.is_empty() {
            self.spaces.remove(&(home, range.space));
        }
    }

    /// Everything held at the homes that `of` selects, as claims for a restarted server.
    pub fn claims(&self, of: impl Fn(NodeId) -> bool) -> Vec<Reclaim> {
        let mut claims = Vec::new();
        for (&(home, space), list) in self.spaces.iter().filter(|((home, _), _)| of(*home)) {
            for h in list {
                for (lo, hi) in h.slots.pieces() {
                    let range = Range { space, lo, hi };
                    claims.push(Reclaim {
                        home,
                        range,
                        mode: h.mode,
                        grant: h.grant,
                    });
                }
            }
        }
        claims
    }

    /// Server's requests to yield are repeated after a reclaim; forget the old ones.
    pub fn forget_revokes(&mut self, of: impl Fn(NodeId) -> bool) {
        for ((home, _), list) in &mut self.spaces {
            if of(*home) {
                list.iter_mut().for_each(|h| h.yielding.clear());
            }
        }
        self.asked_back.retain(|(home, _)| !of(*home));
    }

    /// Drops everything held at the homes that `of` selects.
    pub fn void(&mut self, of: impl Fn(NodeId) -> bool) {
        self.spaces.retain(|(home, _), _| !of(*home));
        self.asked_back.retain(|(home, _)| !of(*home));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Epoch, Incarnation, Life};

    const HOME: NodeId = NodeId(1);

    fn range(lo: u64, hi: u64) -> Range {
        Range { space: 0, lo, hi }
    }

    #[test]
    fn what_one_grant_covered_is_covered_by_those_that_took_from_it() {
        let mut holdings = Holdings::default();
        let all = range(0, u64::MAX);
        holdings.granted(HOME, GrantId(1), all, Mode::Shared, false);
        assert!(holdings.covers(HOME, all, Mode::Shared));
        holdings.granted(HOME, GrantId(2), range(30, 30), Mode::Shared, false);
        assert!(!holdings.covers(HOME, all, Mode::Shared));
        assert!(holdings.covers_jointly(HOME, all, Mode::Shared));
        assert!(!holdings.covers_jointly(HOME, all, Mode::Exclusive));

        let source = Life {
            node: NodeId(2),
            incarnation: Incarnation(1),
        };
        let age = Age {
            epoch: Epoch(1),
            number: 1,
            source,
        };
        assert!(holdings.revoke(HOME, GrantId(2), range(30, 30), age));
        assert!(!holdings.covers_jointly(HOME, all, Mode::Shared));
        assert!(holdings.covers_jointly(HOME, range(31, 99), Mode::Shared));
    }
}
