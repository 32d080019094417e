//! Seeded faults between the device and its socket.
//!
//! Owns: the decision what happens to each datagram on its way out, and which peers are cut off.
//! Every decision comes from one seeded generator, so a run with one thread and the same traffic
//! repeats itself.
//!
//! Deliberately absent: delays (the operating system schedules enough of them) and anything that
//! survives a restart.
//!
//! Source: the faults in scope of the design: loss, duplication, reordering, corruption, partition
//! (also one-way: block on one side only).

use std::collections::BTreeSet;
use std::net::SocketAddr;

/// What a device does to the datagrams it sends. All zero by default: nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Faults {
    /// Seed of the decisions.
    pub seed: u64,
    /// Datagrams lost, in percent.
    pub loss_percent: f64,
    /// Datagrams sent twice, in percent.
    pub duplicate_percent: f64,
    /// Datagrams overtaken by the next one, in percent.
    pub reorder_percent: f64,
    /// Datagrams with one flipped bit, in percent.
    pub corrupt_percent: f64,
}

impl Faults {
    /// Whether anything is to happen at all.
    pub(crate) fn is_any(&self) -> bool {
        let none = Faults {
            seed: self.seed,
            ..Faults::default()
        };
        *self != none
    }
}

/// What happens to one datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It leaves as it is.
    Pass,
    /// It is never sent.
    Lose,
    /// It is never sent, because its target is cut off.
    Block,
    /// It leaves twice.
    Duplicate,
    /// It leaves after the next datagram.
    Reorder,
    /// It leaves with a flipped bit.
    Corrupt,
}

/// The generator, the thresholds and the block list.
#[derive(Debug)]
pub(crate) struct FaultInjector {
    state: u64,
    /// Upper bounds of each fate in the range of a u32, cumulative: lose, duplicate, reorder,
    /// corrupt.
    bounds: [u64; 4],
    blocked: BTreeSet<SocketAddr>,
}

impl FaultInjector {
    pub(crate) fn new(faults: &Faults) -> FaultInjector {
        let percents = [
            faults.loss_percent,
            faults.duplicate_percent,
            faults.reorder_percent,
            faults.corrupt_percent,
        ];
        let mut sum = 0.0;
        let bounds = percents.map(|percent| {
            sum += percent.clamp(0.0, 100.0);
            (sum / 100.0 * 4_294_967_296.0) as u64
        });
        FaultInjector {
            state: faults.seed,
            bounds,
            blocked: BTreeSet::new(),
        }
    }

    /// Cuts `peer` off, or lets it through again.
    pub(crate) fn set_blocked(&mut self, peer: SocketAddr, is_blocked: bool) {
        if is_blocked {
            self.blocked.insert(peer);
        } else {
            self.blocked.remove(&peer);
        }
    }

    /// Whether datagrams to and from `peer` are dropped.
    #[inline]
    pub(crate) fn is_blocked(&self, peer: &SocketAddr) -> bool {
        !self.blocked.is_empty() && self.blocked.contains(peer)
    }

    /// Decides about the next datagram to `target`.
    pub(crate) fn fate(&mut self, target: &SocketAddr) -> Fate {
        if self.is_blocked(target) {
            return Fate::Block;
        }
        if self.bounds[3] == 0 {
            return Fate::Pass;
        }
        let draw = self.draw();
        match self.bounds.iter().position(|bound| draw < *bound) {
            Some(0) => Fate::Lose,
            Some(1) => Fate::Duplicate,
            Some(2) => Fate::Reorder,
            Some(_) => Fate::Corrupt,
            None => Fate::Pass,
        }
    }

    /// splitmix64, upper half.
    fn draw(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) >> 32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fates_come_in_the_asked_proportions_and_repeat() {
        let faults = Faults {
            seed: 7,
            loss_percent: 10.0,
            duplicate_percent: 5.0,
            reorder_percent: 25.0,
            corrupt_percent: 1.0,
        };
        let target = "127.0.0.1:4791".parse().unwrap();
        let run = || {
            let mut injector = FaultInjector::new(&faults);
            (0..100_000)
                .map(|_| injector.fate(&target))
                .collect::<Vec<_>>()
        };
        let fates = run();
        let share = |fate| fates.iter().filter(|f| **f == fate).count();
        assert!((9_500..10_500).contains(&share(Fate::Lose)));
        assert!((4_600..5_400).contains(&share(Fate::Duplicate)));
        assert!((24_300..25_700).contains(&share(Fate::Reorder)));
        assert!((800..1_200).contains(&share(Fate::Corrupt)));
        assert_eq!(fates, run());
    }

    #[test]
    fn a_blocked_peer_gets_nothing_and_others_everything() {
        let mut injector = FaultInjector::new(&Faults::default());
        let (cut, free) = (
            "127.0.0.1:1".parse().unwrap(),
            "127.0.0.1:2".parse().unwrap(),
        );
        injector.set_blocked(cut, true);
        assert_eq!(injector.fate(&cut), Fate::Block);
        assert_eq!(injector.fate(&free), Fate::Pass);
        injector.set_blocked(cut, false);
        assert_eq!(injector.fate(&cut), Fate::Pass);
    }
}
