//! Range locks: the server half (at an object's home and at proxies) and, in [`Holdings`], the
//! holder half (at proxies and clients).
//!
//! A grant covers a set of slots of one space, is identified by a grant id (trap T4: a message
//! about an unknown grant is ignored) and is the widest uncontended range around what was asked,
//! so that a fresh directory or inode region costs one round trip. When somebody else asks, the
//! holder yields exactly what is wanted.
//!
//! Invariants: no two lives hold conflicting grants (L1); locks of a dead life stay until
//! [`LockServer::release_life`] is called for it, which callers do only when it is GONE (I25).
//!
//! # Why every request is granted
//!
//! Whatever takes locks has an [`Age`], which it gets once and keeps while it asks, gives back and
//! asks again, through every tier; ages are totally ordered. It travels with requests and with
//! recalls, and decides three things:
//!
//! - a server lets waiting requests pass in the order of their ages: what waits *behind* another
//!   request waits for an older one;
//! - a source whose work still lacks a lock gives back what that work has taken if it is recalled
//!   for an older age, and keeps it if for a younger one; what lacks nothing (or is not work at
//!   all: a cached grant, a prefetched lock) does not wait for locks and yields when it is done;
//! - a proxy that is asked by its home to yield takes its clients' younger requests back, and yields
//!   when the older ones were granted and are done.
//!
//! So whoever waits for a lock waits for something that ends by itself or for something older, and
//! no circle of waits exists, not over spaces, homes and proxies either. The oldest work that lacks
//! a lock is granted what it asks for: nobody is ahead of it, and every holder in its way yields. It
//! gives nothing back and finishes. Only finitely much is older than a given piece of work: an age
//! begins with the epoch, messages spread epochs (E1), and who competes for a lock hears from the
//! servers at which the older request waits, so its next ages begin with no smaller epoch; within
//! one epoch ages count the work of a source, and each source has finitely many below any number.
//! By induction everything is granted. Asking again under a new age, or letting a recall take a
//! request's turn away, would break this (seed 2147383).
//!
//! Sources acquire in one global order all the same: then hardly anything is ever given back.
//!
//! Deliberately absent: detection of circles.

mod holdings;
mod slots;

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;

pub use holdings::{Holdings, Recall};
pub use slots::SlotSet;

use crate::ids::{Age, GrantId, Life, NodeId};
use crate::message::Reclaim;
use crate::op::{Mode, Range, Want};
use crate::teeth::{Tooth, bites};

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
        /// Age of who wants it.
        age: Age,
    },
}

/// A request as its asker names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asker {
    /// Who asks.
    pub holder: Life,
    /// Number of the request at the asker.
    pub request: u64,
    /// Age of the work that it is for.
    pub age: Age,
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
    asked: Vec<(u64, u64, Age)>,
}

#[derive(Clone, Debug)]
struct Waiting {
    asker: Asker,
    lo: u64,
    hi: u64,
    mode: Mode,
    bound: (u64, u64),
}

#[derive(Clone, Debug, Default)]
struct Space {
    grants: Vec<Grant>,
    /// The oldest first.
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
        home: NodeId,
        asker: Asker,
        want: Range,
        mode: Mode,
        bound: Range,
        out: &mut Vec<Notice>,
    ) {
        let space = self.spaces.entry((home, want.space)).or_default();
        space
            .waiting
            .retain(|w| w.asker.holder != asker.holder || w.asker.request != asker.request);
        let age = |w: &Waiting| w.asker.age <= asker.age && !bites(Tooth::AgeIgnored);
        let place = space.waiting.partition_point(age);
        let waiting = Waiting {
            asker,
            lo: want.lo,
            hi: want.hi,
            mode,
            bound: (bound.lo, bound.hi),
        };
        space.waiting.insert(place, waiting);
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
            g.asked.retain(|&(lo, hi, _)| g.slots.overlaps(lo, hi));
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
            space.waiting.retain(|w| w.asker.holder != holder);
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
            space.waiting.retain(|w| w.asker.holder != holder);
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

    /// Asks to yield `range` because the tier above wants it for work of this age: every holder of
    /// a slot there in a mode that `covered` does not cover.
    pub fn recall(
        &mut self,
        home: NodeId,
        range: Range,
        age: Age,
        covered: impl Fn(Range, Mode) -> bool,
        out: &mut Vec<Notice>,
    ) {
        let space = self.spaces.get_mut(&(home, range.space));
        for g in space.into_iter().flat_map(|s| &mut s.grants) {
            let exposed = |piece| exposed(piece, g.mode, &range, &covered);
            let used = g.slots.pieces().any(exposed);
            if used {
                ask(g, home, range, age, out);
            }
        }
    }

    /// Takes back every waiting request that overlaps `range` and is younger than `age`, because
    /// the tier above recalls it, and keeps the others from being widened into it.
    pub fn withdraw(&mut self, home: NodeId, range: Range, age: Age) -> Vec<(Asker, Range, Mode)> {
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
                if w.asker.age > age {
                    taken.push((w.asker, want, w.mode));
                    return false;
                }
                w.bound = (w.lo, w.hi);
            } else if range.lo > w.hi {
                w.bound.1 = w.bound.1.min(range.lo - 1);
            } else {
                w.bound.0 = w.bound.0.max(range.hi + 1);
            }
            true
        });
        taken
    }

    /// Whether any life holds any slot of `range`, or waits for any with work that is no younger
    /// than `age`, in a mode that `covered` does not cover there. Younger work that waits under
    /// another grant must not keep this one from who is older than it.
    #[must_use]
    pub fn is_used(
        &self,
        home: NodeId,
        range: Range,
        age: Age,
        covered: impl Fn(Range, Mode) -> bool,
    ) -> bool {
        let exposed = |piece, mode| exposed(piece, mode, &range, &covered);
        self.spaces.get(&(home, range.space)).is_some_and(|s| {
            let held = |g: &Grant| g.slots.pieces().any(|piece| exposed(piece, g.mode));
            s.grants.iter().any(held)
                || s.waiting
                    .iter()
                    .any(|w| w.asker.age <= age && exposed((w.lo, w.hi), w.mode))
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
                .map(move |w| (home, space, w.asker.holder, w.mode, w.lo, w.hi))
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
                e.asker.holder != w.asker.holder
                    && conflict(e.mode, w.mode)
                    && e.lo <= w.hi
                    && w.lo <= e.hi
            });
            let mut blocked = behind;
            let holder = w.asker.holder;
            if !behind {
                for g in &mut space.grants {
                    let contends = g.holder != holder
                        && conflict(g.mode, w.mode)
                        && g.slots.overlaps(w.lo, w.hi);
                    if contends {
                        blocked = true;
                        let range = Range {
                            space: space_id,
                            lo: w.lo,
                            hi: w.hi,
                        };
                        ask(g, home, range, w.asker.age, out);
                    }
                }
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
                .filter(|g| g.holder == holder && g.mode <= w.mode)
            {
                g.slots.subtract(lo, hi);
                g.asked.retain(|&(a, b, _)| g.slots.overlaps(a, b));
            }
            space.grants.retain(|g| !g.slots.is_empty());
            space.grants.push(Grant {
                id,
                holder,
                mode: w.mode,
                slots: SlotSet::of(lo, hi),
                asked: Vec::new(),
            });
            let range = Range {
                space: space_id,
                lo,
                hi,
            };
            let (to, request, mode) = (holder, w.asker.request, w.mode);
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

/// Whether the slots of `piece` that lie in `range` are not `covered`.
fn exposed(
    piece: (u64, u64),
    mode: Mode,
    range: &Range,
    covered: impl Fn(Range, Mode) -> bool,
) -> bool {
    let common = Range {
        space: range.space,
        lo: piece.0.max(range.lo),
        hi: piece.1.min(range.hi),
    };
    common.lo <= common.hi && !covered(common, mode)
}

/// Asks a holder to yield, unless it was asked for the same range by something as old.
fn ask(g: &mut Grant, home: NodeId, range: Range, age: Age, out: &mut Vec<Notice>) {
    let Range { lo, hi, .. } = range;
    let asked = g.asked.iter_mut().find(|a| (a.0, a.1) == (lo, hi));
    match asked {
        Some(asked) if asked.2 <= age => return,
        Some(asked) => asked.2 = age,
        None => g.asked.push((lo, hi, age)),
    }
    out.push(Notice::Revoke {
        to: g.holder,
        home,
        grant: g.id,
        range,
        age,
    });
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
    for g in space.grants.iter().filter(|g| g.holder != w.asker.holder) {
        if conflict(g.mode, w.mode) {
            g.slots.pieces().for_each(|(a, b)| fence(a, b));
        }
    }
    let others = space
        .waiting
        .iter()
        .filter(|e| e.asker.holder != w.asker.holder);
    for e in others {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Epoch, Incarnation};

    const HOME: NodeId = NodeId(1);

    fn life(node: u32) -> Life {
        Life {
            node: NodeId(node),
            incarnation: Incarnation(1),
        }
    }

    fn age(node: u32, number: u64) -> Age {
        Age {
            epoch: Epoch(7),
            number,
            source: life(node),
        }
    }

    fn range(lo: u64, hi: u64) -> Range {
        Range { space: 0, lo, hi }
    }

    /// Node `node` asks for `lo` to `hi` and nothing more, under the age `number`.
    fn ask(server: &mut LockServer, node: u32, (lo, hi): (u64, u64), number: u64) -> Vec<Notice> {
        let asker = Asker {
            holder: life(node),
            request: number,
            age: age(node, number),
        };
        let (want, mut out) = (range(lo, hi), Vec::new());
        server.request(HOME, asker, want, Mode::Exclusive, want, &mut out);
        out
    }

    fn granted(notices: &[Notice]) -> Vec<(u32, GrantId)> {
        let grant = |n: &Notice| match n {
            Notice::Grant { to, grant, .. } => Some((to.node.0, *grant)),
            Notice::Revoke { .. } => None,
        };
        notices.iter().filter_map(grant).collect()
    }

    fn recalled(notices: &[Notice]) -> Vec<(u32, u64)> {
        let recall = |n: &Notice| match n {
            Notice::Revoke { to, age, .. } => Some((to.node.0, age.number)),
            Notice::Grant { .. } => None,
        };
        notices.iter().filter_map(recall).collect()
    }

    #[test]
    fn the_older_request_goes_first_whenever_it_arrives() {
        let mut server = LockServer::default();
        let (_, grant) = granted(&ask(&mut server, 2, (0, 9), 5))[0];
        assert_eq!(recalled(&ask(&mut server, 3, (4, 4), 8)), [(2, 8)]);
        // Waits behind nobody, although it spans what another one has waited for; the holder
        // hears that something older wants it.
        assert_eq!(recalled(&ask(&mut server, 4, (0, 9), 3)), [(2, 3)]);
        let mut out = Vec::new();
        server.unlock(HOME, life(2), grant, range(0, 9), &mut out);
        assert_eq!(granted(&out), [(4, GrantId(2))]);
        assert_eq!(recalled(&out), [(4, 8)]);
    }

    #[test]
    fn a_recall_is_repeated_for_something_older_only() {
        let mut server = LockServer::default();
        ask(&mut server, 2, (0, 9), 5);
        assert_eq!(recalled(&ask(&mut server, 3, (4, 4), 8)), [(2, 8)]);
        assert_eq!(recalled(&ask(&mut server, 4, (4, 4), 9)), []);
        assert_eq!(recalled(&ask(&mut server, 5, (4, 4), 6)), [(2, 6)]);
    }

    #[test]
    fn the_tier_above_takes_the_turn_of_younger_requests_only() {
        let mut server = LockServer::default();
        ask(&mut server, 2, (0, 0), 1);
        ask(&mut server, 3, (0, 9), 4);
        ask(&mut server, 4, (0, 9), 6);
        let taken = server.withdraw(HOME, range(9, 9), age(9, 5));
        assert_eq!(taken.len(), 1);
        assert_eq!(taken[0].0.holder, life(4));
        // What stays still needs slot 9.
        let used = |number| server.is_used(HOME, range(9, 9), age(9, number), |_, _| false);
        assert!(used(5));
        // What is younger than the recall does not keep it.
        assert!(!used(0));
    }
}
