//! Plans whose homes have small disks, so that room runs out by itself.

use lowtide_engine_core::ids::NodeId;
use lowtide_engine_core::op::{Bytes, Change, Key, Update};
use lowtide_engine_core::room::{Budget, Cost, FRAME_BYTES, HomeRule};

use super::Plan;
use crate::rng::Rng;

/// What a small log keeps for the records of its front, in bytes.
const RESERVE: u64 = 1500 + 20 * FRAME_BYTES;

/// Disks on which room runs out.
#[derive(Clone, Copy, Debug)]
pub struct SmallDisk {
    /// What a source may have under way at a home, in bytes of log.
    pub budget: u64,
    /// The longest value that is replaced, in bytes.
    pub replaced: u64,
    /// What a log takes beyond the budgets of as many sources as the plan has, in bytes.
    pub spare: u64,
}

impl Plan {
    /// From a branch of its own. Most such plans write no lists, so that operations are of one size
    /// and a budget is few of them.
    pub(super) fn draw_disk(&mut self, rng: &mut Rng) {
        if !rng.chance(12) {
            return;
        }
        self.bulk = 0;
        let factor = if self.is_short { 3 } else { 2 };
        for client in &mut self.clients {
            client.ops *= factor;
        }
        let lists = rng.chance(30);
        let replaced = if lists {
            let ops: u64 = self.clients.iter().map(|c| c.ops).sum();
            8 * (8 + 4 * ops)
        } else {
            self.mix.append = 0;
            self.mix.blind += 2;
            8
        };
        let largest = self.largest_operation(replaced);
        self.small_disk = Some(SmallDisk {
            budget: largest + rng.below(largest),
            replaced,
            spare: rng.below(3000),
        });
    }

    /// What the largest operation of an application takes at a home with a small disk, at most.
    fn largest_operation(&self, replaced: u64) -> u64 {
        let budget = Budget {
            replaced,
            carried: self.carry_bytes as u64,
            ..Budget::default()
        };
        let mut updates = Vec::new();
        for home in 0..self.destinations as u32 {
            updates.extend((0..3).map(|slot| Update {
                home: NodeId(home),
                key: Key {
                    name: vec![0],
                    ..Key::at(1, slot)
                },
                change: Change::Put(Bytes::from(vec![0; replaced as usize + 8])),
            }));
        }
        let costs = budget.costs(&updates, |_| None);
        costs
            .iter()
            .map(|(_, cost)| cost.log)
            .max()
            .unwrap_or_default()
    }

    /// When a home has room.
    #[must_use]
    pub fn room_rule(&self) -> HomeRule {
        let Some(disk) = self.small_disk else {
            return HomeRule::default();
        };
        HomeRule {
            budget: Budget {
                log: disk.budget,
                disk: u64::MAX,
                replaced: disk.replaced,
                carried: self.carry_bytes as u64,
            },
            reserve: Cost {
                log: RESERVE,
                disk: 0,
            },
        }
    }

    /// What each log of a home takes, in bytes.
    #[must_use]
    pub fn log_bytes(&self) -> Option<u64> {
        let disk = self.small_disk?;
        let sources = (self.clients.len() + self.proxies) as u64;
        Some(RESERVE + sources * disk.budget + disk.spare)
    }
}
