//! Range locks: the server half (at an object's home and at proxies) and the holder half (at
//! proxies and clients).
//!
//! A grant covers a set of slots of one space, is identified by a grant id (trap T4: a message
//! about an unknown grant is ignored) and is the widest uncontended range around what was asked,
//! so that a fresh directory or inode region costs one round trip. When somebody else asks, the
//! holder yields exactly what is wanted. Waiting requests are served in order of arrival; a
//! request that conflicts with an earlier waiting one waits behind it.
//!
//! Invariants: no two lives hold conflicting grants (L1); locks of a dead life stay until
//! [`LockServer::release_life`] is called for it, which callers do only when it is GONE (I25).
//!
//! Sources acquire in one global order and pin only what the request at the head of their queue
//! needs, so waiting for holders closes no circle. Waiting in a queue can: A holds slot 3 and wants
//! 5, B wants 0 to 9 and waits for A, A waits behind B. A server that sees a holder wait behind
//! somebody who waits for it asks that holder to yield a range that spans both; the holder then
//! lets go of what it has and asks again ([`LockServer::serve`], and the sources' half).
//!
//! Deliberately absent: deadlock detection across spaces, which the global order makes needless.

use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::vec::Vec;

use crate::ids::{GrantId, Life, NodeId};
use crate::message::Reclaim;
use crate::op::{Key, Mode, Range, Want};
use crate::teeth::{Tooth, bites};

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

/// What a lock server tells its owner to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A request is granted.
    Grant {
        /// The asker.
        to: Life,
        /// Its request.
        request: u64,
        /// Home of the range.
        home: NodeId,
        /// The grant.
        grant: GrantId,
        /// What is covered.
        range: Range,
        /// How.
        mode: Mode,
    },
    /// A holder must yield.
    Revoke {
        /// The holder.
        to: Life,
        /// Home of the range.
        home: NodeId,
        /// The grant.
        grant: GrantId,
        /// What to yield.
        range: Range,
    },
}

impl Notice {
    /// Who is to be told.
    #[must_use]
    pub fn to(&self) -> Life {
        match self {
            Notice::Grant { to, .. } | Notice::Revoke { to, .. } => *to,
        }
    }
}

#[derive(Clone, Debug)]
struct Grant {
    id: GrantId,
    holder: Life,
    mode: Mode,
    slots: SlotSet,
    /// Ranges that the holder was asked to yield and has not yielded yet.
    asked: Vec<(u64, u64)>,
}

#[derive(Clone, Debug)]
struct Waiting {
    holder: Life,
    request: u64,
    lo: u64,
    hi: u64,
    mode: Mode,
    bound: (u64, u64),
}

#[derive(Clone, Debug, Default)]
struct Space {
    grants: Vec<Grant>,
    waiting: VecDeque<Waiting>,
}

fn conflict(a: Mode, b: Mode) -> bool {
    a == Mode::Exclusive || b == Mode::Exclusive
}

/// Grants locks on ranges of the homes it serves.
#[derive(Clone, Debug, Default)]
pub struct LockServer {
    spaces: BTreeMap<(NodeId, u64), Space>,
    last_grant: u64,
}

impl LockServer {
    /// Asks for `want`; the grant may be widened within `bound`. A repeated request replaces the
    /// earlier one of the same number.
    pub fn request(
        &mut self,
        (home, holder, request): (NodeId, Life, u64),
        want: Range,
        mode: Mode,
        bound: Range,
        out: &mut Vec<Notice>,
    ) {
        let space = self.spaces.entry((home, want.space)).or_default();
        space
            .waiting
            .retain(|w| !(w.holder == holder && w.request == request));
        space.waiting.push_back(Waiting {
            holder,
            request,
            lo: want.lo,
            hi: want.hi,
            mode,
            bound: (bound.lo, bound.hi),
        });
        self.serve(home, want.space, out);
    }

    /// A holder yields `range` of a grant.
    pub fn unlock(
        &mut self,
        home: NodeId,
        holder: Life,
        grant: GrantId,
        range: Range,
        out: &mut Vec<Notice>,
    ) {
        let Some(space) = self.spaces.get_mut(&(home, range.space)) else {
            return;
        };
        for g in space
            .grants
            .iter_mut()
            .filter(|g| g.id == grant && g.holder == holder)
        {
            g.slots.subtract(range.lo, range.hi);
            g.asked.retain(|&(lo, hi)| g.slots.overlaps(lo, hi));
        }
        space.grants.retain(|g| !g.slots.is_empty());
        self.serve(home, range.space, out);
    }

    /// Replaces what `holder` holds by what it says it holds, after every connect: a grant whose
    /// reply was lost is forgotten, an unlock that was lost is made up for, and a restarted server
    /// learns its grants anew. Requests of the holder are forgotten; it repeats them.
    ///
    /// Returns how many claims conflicted with another life's grants and were ignored; more than 0
    /// is a bug of the caller or of the holder.
    pub fn reclaim(&mut self, holder: Life, claims: &[Reclaim], out: &mut Vec<Notice>) -> usize {
        // What was not told yet belongs to the session before: the claims do not know of it.
        out.retain(|notice| notice.to() != holder || bites(Tooth::StaleGrantTold));
        for space in self.spaces.values_mut() {
            space.grants.retain(|g| g.holder != holder);
            space.waiting.retain(|w| w.holder != holder);
        }
        let mut refused = 0;
        for claim in claims {
            let Range { space, lo, hi } = claim.range;
            let space = self.spaces.entry((claim.home, space)).or_default();
            if space.grants.iter().any(|g| {
                g.holder != holder && conflict(g.mode, claim.mode) && g.slots.overlaps(lo, hi)
            }) {
                refused += 1;
                continue;
            }
            self.last_grant = self.last_grant.max(claim.grant.0);
            match space
                .grants
                .iter_mut()
                .find(|g| g.id == claim.grant && g.holder == holder)
            {
                Some(g) => g.slots.insert(lo, hi),
                None => space.grants.push(Grant {
                    id: claim.grant,
                    holder,
                    mode: claim.mode,
                    slots: SlotSet::of(lo, hi),
                    asked: Vec::new(),
                }),
            }
        }
        let keys: Vec<_> = self.spaces.keys().copied().collect();
        for (home, space) in keys {
            self.serve(home, space, out);
        }
        refused
    }

    /// Forgets what a life waits for: its session ended, or it is fenced. What it holds stays.
    pub fn forget_waiting(&mut self, holder: Life, out: &mut Vec<Notice>) {
        let mut changed = Vec::new();
        for (&key, space) in &mut self.spaces {
            let before = space.waiting.len();
            space.waiting.retain(|w| w.holder != holder);
            if space.waiting.len() < before {
                changed.push(key);
            }
        }
        for (home, space) in changed {
            self.serve(home, space, out);
        }
    }

    /// Releases everything of a life that is GONE or has parted.
    pub fn release_life(&mut self, holder: Life, out: &mut Vec<Notice>) {
        self.reclaim(holder, &[], out);
    }

    /// Asks every holder to yield `range`, whatever its mode, because the tier above wants it.
    /// Returns whether anything is still held there.
    pub fn recall(&mut self, home: NodeId, range: Range, out: &mut Vec<Notice>) -> bool {
        let Some(space) = self.spaces.get_mut(&(home, range.space)) else {
            return false;
        };
        let mut held = false;
        for g in &mut space.grants {
            if g.slots.overlaps(range.lo, range.hi) {
                held = true;
                ask(g, home, range, out);
            }
        }
        held
    }

    /// Takes back every waiting request that overlaps `range`, because the tier above recalls it,
    /// and keeps the others from being widened into it. Returns (holder, request, range, mode).
    pub fn withdraw(&mut self, home: NodeId, range: Range) -> Vec<(Life, u64, Range, Mode)> {
        let Some(space) = self.spaces.get_mut(&(home, range.space)) else {
            return Vec::new();
        };
        let mut taken = Vec::new();
        space.waiting.retain_mut(|w| {
            if w.lo <= range.hi && range.lo <= w.hi {
                let want = Range {
                    space: range.space,
                    lo: w.lo,
                    hi: w.hi,
                };
                taken.push((w.holder, w.request, want, w.mode));
                return false;
            }
            if range.lo > w.hi {
                w.bound.1 = w.bound.1.min(range.lo - 1);
            } else {
                w.bound.0 = w.bound.0.max(range.hi + 1);
            }
            true
        });
        taken
    }

    /// Whether any life holds any slot of `range` in a mode that `covered` does not cover there.
    #[must_use]
    pub fn is_held(
        &self,
        home: NodeId,
        range: Range,
        covered: impl Fn(Range, Mode) -> bool,
    ) -> bool {
        self.spaces.get(&(home, range.space)).is_some_and(|s| {
            s.grants.iter().any(|g| {
                g.slots.pieces().any(|(lo, hi)| {
                    let common = Range {
                        space: range.space,
                        lo: lo.max(range.lo),
                        hi: hi.min(range.hi),
                    };
                    common.lo <= common.hi && !covered(common, g.mode)
                })
            })
        })
    }

    /// Whether `holder` holds any grant.
    #[must_use]
    pub fn holds_any(&self, holder: Life) -> bool {
        self.spaces
            .values()
            .any(|s| s.grants.iter().any(|g| g.holder == holder))
    }

    /// Requests that wait, for status: (home, space, holder, mode, lo, hi).
    pub fn waiting(&self) -> impl Iterator<Item = (NodeId, u64, Life, Mode, u64, u64)> + '_ {
        self.spaces.iter().flat_map(|(&(home, space), s)| {
            s.waiting
                .iter()
                .map(move |w| (home, space, w.holder, w.mode, w.lo, w.hi))
        })
    }

    /// Every grant, for invariant checks and status: (home, space, holder, mode, lo, hi).
    pub fn grants(&self) -> impl Iterator<Item = (NodeId, u64, Life, Mode, u64, u64)> + '_ {
        self.spaces.iter().flat_map(|(&(home, space), s)| {
            s.grants.iter().flat_map(move |g| {
                g.slots
                    .pieces()
                    .map(move |(lo, hi)| (home, space, g.holder, g.mode, lo, hi))
            })
        })
    }

    /// Serves waiting requests of one space in order, as far as possible.
    pub(crate) fn serve(&mut self, home: NodeId, space_id: u64, out: &mut Vec<Notice>) {
        let Some(space) = self.spaces.get_mut(&(home, space_id)) else {
            return;
        };
        let mut index = 0;
        while index < space.waiting.len() {
            let w = space.waiting[index].clone();
            let behind = space.waiting.iter().take(index).any(|e| {
                e.holder != w.holder && conflict(e.mode, w.mode) && e.lo <= w.hi && w.lo <= e.hi
            });
            let mut blocked = behind;
            if !behind {
                for g in &mut space.grants {
                    let contends = g.holder != w.holder
                        && conflict(g.mode, w.mode)
                        && g.slots.overlaps(w.lo, w.hi);
                    if contends {
                        blocked = true;
                        ask(
                            g,
                            home,
                            Range {
                                space: space_id,
                                lo: w.lo,
                                hi: w.hi,
                            },
                            out,
                        );
                    }
                }
            }
            if behind {
                open_circle(space, home, space_id, index, out);
            }
            if blocked {
                index += 1;
                continue;
            }
            space.waiting.remove(index);
            let (lo, hi) = widen(space, &w);
            self.last_grant += 1;
            let id = GrantId(self.last_grant);
            for g in space
                .grants
                .iter_mut()
                .filter(|g| g.holder == w.holder && g.mode <= w.mode)
            {
                g.slots.subtract(lo, hi);
                g.asked.retain(|&(a, b)| g.slots.overlaps(a, b));
            }
            space.grants.retain(|g| !g.slots.is_empty());
            space.grants.push(Grant {
                id,
                holder: w.holder,
                mode: w.mode,
                slots: SlotSet::of(lo, hi),
                asked: Vec::new(),
            });
            let range = Range {
                space: space_id,
                lo,
                hi,
            };
            let (to, request, mode) = (w.holder, w.request, w.mode);
            out.push(Notice::Grant {
                to,
                request,
                home,
                grant: id,
                range,
                mode,
            });
        }
        if space.grants.is_empty() && space.waiting.is_empty() {
            self.spaces.remove(&(home, space_id));
        }
    }
}

/// The waiting request at `index` waits behind others. If one of those waits for a grant of the
/// same holder, that holder is asked for a range that spans the grant and the request.
fn open_circle(
    space: &mut Space,
    home: NodeId,
    space_id: u64,
    index: usize,
    out: &mut Vec<Notice>,
) {
    let Space { grants, waiting } = space;
    let w = &waiting[index];
    let blocks = |g: &Grant, e: &Waiting| {
        g.holder == w.holder && conflict(g.mode, e.mode) && g.slots.overlaps(e.lo, e.hi)
    };
    let earlier = || waiting.iter().take(index).filter(|e| e.holder != w.holder);
    if !earlier().any(|e| grants.iter().any(|g| blocks(g, e))) {
        return;
    }
    // Everything that the request waits behind, directly or through others.
    let mut chain: Vec<&Waiting> = alloc::vec![w];
    for e in waiting.iter().take(index).rev() {
        let ahead = chain.iter().any(|c| {
            e.holder != c.holder && conflict(e.mode, c.mode) && e.lo <= c.hi && c.lo <= e.hi
        });
        if ahead {
            chain.push(e);
        }
    }
    for e in chain.into_iter().skip(1) {
        let span = Range {
            space: space_id,
            lo: e.lo.min(w.lo),
            hi: e.hi.max(w.hi),
        };
        for g in grants.iter_mut().filter(|g| blocks(g, e)) {
            ask(g, home, span, out);
        }
    }
}

fn ask(g: &mut Grant, home: NodeId, range: Range, out: &mut Vec<Notice>) {
    if !g.asked.contains(&(range.lo, range.hi)) {
        g.asked.push((range.lo, range.hi));
        out.push(Notice::Revoke {
            to: g.holder,
            home,
            grant: g.id,
            range,
        });
    }
}

/// The widest range around a request, within its bound, that touches nobody else's conflicting
/// grant and nobody else's waiting request.
fn widen(space: &Space, w: &Waiting) -> (u64, u64) {
    let (mut lo, mut hi) = (w.bound.0.min(w.lo), w.bound.1.max(w.hi));
    let mut fence = |a: u64, b: u64| {
        if b < w.lo {
            lo = lo.max(b + 1);
        } else if a > w.hi {
            hi = hi.min(a - 1);
        } else {
            // Compatible and overlapping: a shared range that others share stays as asked.
            (lo, hi) = (w.lo, w.hi);
        }
    };
    for g in space.grants.iter().filter(|g| g.holder != w.holder) {
        if conflict(g.mode, w.mode) {
            g.slots.pieces().for_each(|(a, b)| fence(a, b));
        }
    }
    for e in space.waiting.iter().filter(|e| e.holder != w.holder) {
        fence(e.lo, e.hi);
    }
    (lo, hi)
}

/// Wants in the global order, overlapping ones merged under the stronger mode, so that a request
/// never waits for itself.
#[must_use]
pub fn normalise(wants: &[Want]) -> Vec<Want> {
    let mut sorted = wants.to_vec();
    sorted.sort_unstable_by_key(|w| (w.home, w.range.space, w.range.lo, w.range.hi));
    let mut merged: Vec<Want> = Vec::with_capacity(sorted.len());
    for want in sorted {
        match merged.last_mut() {
            Some(last) if last.home == want.home && last.range.overlaps(&want.range) => {
                last.range.hi = last.range.hi.max(want.range.hi);
                last.mode = last.mode.max(want.mode);
            }
            _ => merged.push(want),
        }
    }
    merged
}

/// A range held from the tier above.
#[derive(Clone, Debug)]
struct Holding {
    grant: GrantId,
    mode: Mode,
    slots: SlotSet,
    /// Asked back; nothing new is done under these slots.
    yielding: Vec<(u64, u64)>,
    /// `Some`: every object in the range lies in one of these slots. `None`: not known.
    occupied: Option<BTreeSet<u64>>,
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

    /// The widest piece around `range` that is held in `mode` and not being yielded.
    #[must_use]
    pub fn bound(&self, home: NodeId, range: Range, mode: Mode) -> Option<Range> {
        let h = self.covering(home, range, mode)?;
        let (mut lo, mut hi) = h.slots.piece(range.lo)?;
        for &(a, b) in &h.yielding {
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
                    .any(|&(a, b)| a <= range.hi && range.lo <= b)
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

    /// The tier above wants `range` back. Returns whether the grant is held there at all.
    pub fn revoke(&mut self, home: NodeId, grant: GrantId, range: Range) -> bool {
        let Some(list) = self.spaces.get_mut(&(home, range.space)) else {
            return false;
        };
        let Some(h) = list.iter_mut().find(|h| h.grant == grant) else {
            return false;
        };
        let held = h.slots.overlaps(range.lo, range.hi);
        if held && !h.yielding.contains(&(range.lo, range.hi)) {
            h.yielding.push((range.lo, range.hi));
            self.asked_back.insert((home, range.space));
        }
        held
    }

    /// Ranges asked back and not yielded yet: (home, grant, range).
    #[must_use]
    pub fn yielding(&self) -> Vec<(NodeId, GrantId, Range)> {
        let mut all = Vec::new();
        for &(home, space) in &self.asked_back {
            for h in self.spaces.get(&(home, space)).into_iter().flatten() {
                for &(lo, hi) in &h.yielding {
                    all.push((home, h.grant, Range { space, lo, hi }));
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
            h.yielding.retain(|&y| y != (range.lo, range.hi));
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
