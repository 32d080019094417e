//! Who holds m back while a log has no room (design D10).
//!
//! A client or proxy that is heard is not evicted for what it holds back: others only wait for
//! their undo records to go. It is another matter when a home can take no new work, because its log
//! is full of what m holds: then everybody stands still for one. The rule: whoever has held m at
//! one bound for longer than the root's patience, without a break in which no log was full, is
//! evicted; rule X decides about its operations, m goes on, and the log can be recycled.
//!
//! It holds m back only if nobody else is to blame. So the clock starts anew when m moves, when
//! every home has room, when a home has not been heard for a quarter of that time, and when a home
//! comes back: whoever waits for a server does not hold m, the server does, and without it nothing
//! could be resolved either. A dead life's bound holds m as well; while it does, whoever lives
//! above it does not.
//!
//! Deliberately absent: other reasons for which a home may be full. m does not empty a disk.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use super::Root;
use crate::ids::{Epoch, Life, NodeId, Time};
use crate::message::{Role, Waits};

/// What the root knows about full logs, and who has held m back meanwhile.
#[derive(Clone, Debug, Default)]
pub(super) struct Holders {
    /// When each home was heard last, and whether it said that its log has no room for m's sake.
    homes: BTreeMap<NodeId, (Time, bool)>,
    /// The bound that they hold m at.
    at: Epoch,
    /// Who, and since when as far as the looks have seen.
    since: BTreeMap<Life, Time>,
}

impl Holders {
    /// A home pinged.
    pub(super) fn heard(&mut self, now: Time, home: NodeId, is_full: bool) {
        self.homes.insert(home, (now, is_full));
    }

    /// A home has joined in a new life: what was waited for may have been the home.
    pub(super) fn joined(&mut self) {
        self.since.clear();
    }

    /// The root did nothing for so many ticks: that is nobody's doing.
    pub(super) fn absent(&mut self, ticks: u64) {
        let heard = self.homes.values_mut().map(|(at, _)| at);
        for at in heard.chain(self.since.values_mut()) {
            *at = at.after(ticks);
        }
    }

    /// A look: `homes` are all there are, `holding` live and hold m at `at`. Returns those whose
    /// time is up.
    pub(super) fn look(
        &mut self,
        now: Time,
        homes: impl IntoIterator<Item = NodeId>,
        (at, holding): (Epoch, &[Life]),
        patience: u64,
    ) -> Vec<Life> {
        let mut is_full = false;
        let mut are_heard = true;
        for home in homes {
            let said = self.homes.get(&home);
            are_heard &= said.is_some_and(|(at, _)| now.since(*at) <= patience / 4);
            is_full |= said.is_some_and(|(_, is_full)| *is_full);
        }
        if !is_full || !are_heard || at != self.at {
            self.since.clear();
        }
        self.at = at;
        self.since.retain(|life, _| holding.contains(life));
        if is_full && are_heard {
            for life in holding {
                self.since.entry(*life).or_insert(now);
            }
        }
        let up = |since: &Time| now.since(*since) > patience;
        let holders = self.since.iter().filter(|(_, since)| up(since));
        holders.map(|(life, _)| *life).collect()
    }
}

impl Root {
    /// A home says with its ping whether its log has room.
    pub(super) fn room_heard(&mut self, now: Time, from: Life, waits: Waits) {
        let rows = &self.state.rows;
        let place = rows.binary_search_by_key(&from.node, |r| r.life.node);
        let row = place.ok().map(|i| &rows[i]).filter(|r| r.life == from);
        if row.is_some_and(|r| r.role == Role::Destination) {
            let is_full = waits == Waits::ForRoom;
            self.holders.heard(now, from.node, is_full);
        }
    }

    /// D10, at each look at who is silent.
    pub(super) fn evict_holders(&mut self, now: Time) {
        let at = self.blocked_by().map_or(Epoch(0), |(_, at)| at);
        let mut holding = Vec::new();
        for (life, bound) in &self.bounds {
            let branch = bound.covered.and_then(|a| self.branches.get(&a));
            let is_own = branch.is_none_or(|(_, lowest)| *lowest == Some(*life));
            let lives = !self.evictions.contains_key(life);
            if lives && is_own && self.effective(bound) == at {
                holding.push(*life);
            }
        }
        let homes = self.live_nodes(Role::Destination);
        let patience = self.config.evict_after;
        let holders = self.holders.look(now, homes, (at, &holding), patience);
        for life in holders {
            self.counters.held_back += 1;
            self.start_eviction(life);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Incarnation;

    const HOME: NodeId = NodeId(2);
    const OTHER: NodeId = NodeId(3);
    const PATIENCE: u64 = 100;

    fn life(node: u32) -> Life {
        Life {
            node: NodeId(node),
            incarnation: Incarnation(1),
        }
    }

    /// Two homes that ping with every look, of which the first may be full, and whoever holds m.
    struct Bench {
        holders: Holders,
        now: Time,
    }

    impl Bench {
        fn new() -> Bench {
            let (holders, now) = (Holders::default(), Time(0));
            Bench { holders, now }
        }

        /// Looks every 10 ticks until `until`; returns when somebody's time is up, and whose.
        fn looks(
            &mut self,
            until: u64,
            (is_full, is_other_up): (bool, bool),
            (at, holding): (u64, &[Life]),
        ) -> Option<(u64, Vec<Life>)> {
            while self.now.0 < until {
                self.now = self.now.after(10);
                self.holders.heard(self.now, HOME, is_full);
                if is_other_up {
                    self.holders.heard(self.now, OTHER, false);
                }
                let held = (Epoch(at), holding);
                let up = self.holders.look(self.now, [HOME, OTHER], held, PATIENCE);
                if !up.is_empty() {
                    return Some((self.now.0, up));
                }
            }
            None
        }
    }

    const FULL: (bool, bool) = (true, true);

    #[test]
    fn who_holds_m_while_a_log_is_full_has_as_long_as_who_is_silent() {
        let mut bench = Bench::new();
        let up = bench.looks(1000, FULL, (5, &[life(7), life(8)]));
        assert_eq!(up, Some((120, alloc::vec![life(7), life(8)])));
    }

    #[test]
    fn nobody_is_blamed_while_every_log_has_room() {
        let mut bench = Bench::new();
        assert_eq!(bench.looks(1000, (false, true), (5, &[life(7)])), None);
        // The time before does not count.
        assert_eq!(bench.looks(1100, FULL, (5, &[life(7)])), None);
        assert_eq!(bench.looks(1110, (false, true), (5, &[life(7)])), None);
        assert_eq!(bench.looks(1210, FULL, (5, &[life(7)])), None);
        assert!(bench.looks(1300, FULL, (5, &[life(7)])).is_some());
    }

    #[test]
    fn the_clock_starts_anew_when_m_moves_or_another_holds_it() {
        let mut bench = Bench::new();
        assert_eq!(bench.looks(90, FULL, (5, &[life(7)])), None);
        assert_eq!(bench.looks(180, FULL, (6, &[life(7)])), None);
        assert_eq!(bench.looks(270, FULL, (6, &[life(8)])), None);
        let up = bench.looks(1000, FULL, (6, &[life(7), life(8)]));
        assert_eq!(
            up,
            Some((300, alloc::vec![life(8)])),
            "not the one that came back"
        );
    }

    #[test]
    fn who_waits_for_a_home_is_not_to_blame() {
        let mut bench = Bench::new();
        assert_eq!(bench.looks(70, FULL, (5, &[life(7)])), None);
        assert_eq!(bench.looks(1000, (true, false), (5, &[life(7)])), None);
        assert_eq!(bench.looks(1100, FULL, (5, &[life(7)])), None);
        bench.holders.joined();
        assert_eq!(bench.looks(1200, FULL, (5, &[life(7)])), None);
        assert!(bench.looks(1300, FULL, (5, &[life(7)])).is_some());
    }

    #[test]
    fn the_root_s_own_absence_does_not_count() {
        let mut bench = Bench::new();
        assert_eq!(bench.looks(60, FULL, (5, &[life(7)])), None);
        bench.now = bench.now.after(1000);
        bench.holders.absent(1000);
        assert_eq!(bench.looks(1110, FULL, (5, &[life(7)])), None);
        assert!(bench.looks(1130, FULL, (5, &[life(7)])).is_some());
    }
}
