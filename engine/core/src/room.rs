//! Room: what a source may have stamped, and when a home lets it stamp ("reserve, then stamp",
//! b.1).
//!
//! A stamped operation is never refused for space, so what it may need is kept free before it is
//! stamped. The rule has two halves.
//!
//! - A *source* (client or proxy) has stamped, and does not know to be everywhere committed, at
//!   most [`Budget::log`] bytes of log and [`Budget::disk`] bytes of disk at each home, as [`Budget::costs`]
//!   counts them. It stamps for a home only while the newest word of that home is that it has room.
//! - A *home* says so, and grants exclusive locks, only while it has free what all its sources may
//!   stamp before they hear of it again, what undoing everything that it keeps would take, and a
//!   reserve for everything that no source stamps: [`HomeRule::has_room`].
//!
//! Why no part is ever refused: the word that something is committed, which alone lets a source
//! stamp more, carries the word about room. After a word of *room* a source can bring at most one
//! budget before it hears the next, and so much was free for each of them. After a word of *no
//! room* it stamps nothing. A source that the home does not count yet does not heed words of that
//! home: a word names the membership view it counts. A dead life is counted until it is GONE,
//! because what others complete for it comes out of its budget.
//!
//! Resolutions, undo steps, fences and marks use the reserve, and shared locks are granted always:
//! they bring no work, and what is stored can be read of a full home.
//!
//! A source may spend its whole budget in the log of one shard, so each log of a home has room for
//! all.
//!
//! Deliberately absent: credits that grow and shrink with the load.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;

use crate::destination::BULK_BYTES;
use crate::ids::{NodeId, Seq, ViewId};
use crate::op::{Change, Update};
use crate::wire_struct;

/// What the log may add to a record's body: header, padding, and room for the claim of its commit
/// group, in bytes.
pub const FRAME_BYTES: u64 = 256;
/// An operation record without participants, writes and carried updates, in bytes. An undo record
/// is no longer.
const HEAD_BYTES: u64 = 80;
/// A participant, in bytes.
const PARTICIPANT_BYTES: u64 = 12;
/// A write without name, value and what it replaces, in bytes.
const WRITE_BYTES: u64 = 64;
/// Bulk data takes whole units of so many bytes on the disk.
const EXTENT_BYTES: u64 = 4 << 10;

/// Bytes that something takes at a home, at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Of the log: its records, and those of its undo steps.
    pub log: u64,
    /// Of the disk: the same, and its bulk data.
    pub disk: u64,
}

/// What one source may have under way at one home, in bytes. The same in the whole cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Of the log.
    pub log: u64,
    /// Of the disk.
    pub disk: u64,
    /// The largest value that an update can replace in line; larger ones lie in extents. At most
    /// [`BULK_BYTES`].
    pub replaced: u64,
    /// Most bytes of other participants' updates in a record.
    pub carried: u64,
}

impl Default for Budget {
    /// The product's. The largest operation that is possible, 64 updates of values just short of
    /// [`BULK_BYTES`] that replace as long ones, takes 12.6 MiB of log.
    fn default() -> Budget {
        Budget {
            log: 32 << 20,
            disk: 56 << 20,
            replaced: BULK_BYTES as u64,
            carried: 64 << 10,
        }
    }
}

impl Budget {
    /// Whether `cost` alone exceeds the budget: then the operation can never be stamped.
    #[must_use]
    pub fn is_exceeded_by(&self, cost: &Cost) -> bool {
        cost.log > self.log || cost.disk > self.disk
    }

    /// What an operation takes at each of its homes. `replaced` bounds the length of the value that
    /// an update replaces; `None` when the source does not know.
    #[must_use]
    pub fn costs(
        &self,
        updates: &[Update],
        replaced: impl Fn(&Update) -> Option<u64>,
    ) -> Vec<(NodeId, Cost)> {
        let mut homes: Vec<NodeId> = updates.iter().map(|u| u.home).collect();
        homes.sort_unstable();
        homes.dedup();
        let participants = homes.len() as u64;
        let costs = homes.into_iter().map(|home| {
            let (mut cost, mut carried, mut others) = (Cost::default(), 0, 0);
            for update in updates {
                let length = update.change.weight() as u64 + update.key.name.len() as u64;
                if update.home != home {
                    (carried, others) = (carried + length, others + WRITE_BYTES);
                    continue;
                }
                // Each may be of another shard, with a record of its own.
                let head = HEAD_BYTES + FRAME_BYTES + participants * PARTICIPANT_BYTES;
                cost.log += 2 * (head + WRITE_BYTES + update.key.name.len() as u64);
                cost.log += self.values(update, replaced(update));
                if let Change::Put(value) = &update.change
                    && value.len() >= BULK_BYTES
                {
                    cost.disk += (value.len() as u64).next_multiple_of(EXTENT_BYTES);
                }
            }
            cost.log += others + carried.min(self.carried);
            cost.disk += cost.log;
            (home, cost)
        });
        costs.collect()
    }

    /// Bytes of values in the records of an update and of its undo step.
    fn values(&self, update: &Update, replaced: Option<u64>) -> u64 {
        let replaced = replaced.map_or(self.replaced, |length| length.min(self.replaced));
        match &update.change {
            // Its undo step records the sum: an object that is added to is as long as what is
            // added.
            Change::Add(words) => 2 * words.len() as u64,
            Change::Put(value) if value.len() < BULK_BYTES => value.len() as u64 + 2 * replaced,
            Change::Put(_) | Change::Delete => 2 * replaced,
        }
    }
}

/// What a source has stamped and does not know to be everywhere committed, per home.
#[derive(Debug, Default)]
pub struct Ledger {
    open: VecDeque<(Seq, Vec<(NodeId, Cost)>)>,
    owed: BTreeMap<NodeId, Cost>,
}

impl Ledger {
    /// Whether the budget has room for one operation more.
    #[must_use]
    pub fn admits(&self, budget: &Budget, costs: &[(NodeId, Cost)]) -> bool {
        costs.iter().all(|(home, cost)| {
            let owed = self.owed.get(home).copied().unwrap_or_default();
            let sum = Cost {
                log: owed.log + cost.log,
                disk: owed.disk + cost.disk,
            };
            !budget.is_exceeded_by(&sum)
        })
    }

    /// The operation `seq` is stamped.
    pub fn enter(&mut self, seq: Seq, costs: Vec<(NodeId, Cost)>) {
        for (home, cost) in &costs {
            let owed = self.owed.entry(*home).or_default();
            owed.log += cost.log;
            owed.disk += cost.disk;
        }
        self.open.push_back((seq, costs));
    }

    /// Operations up to `done` are everywhere committed.
    pub fn settle(&mut self, done: Seq) {
        while let Some((_, costs)) = self.open.pop_front_if(|(seq, _)| *seq <= done) {
            for (home, cost) in costs {
                if let Some(owed) = self.owed.get_mut(&home) {
                    owed.log -= cost.log;
                    owed.disk -= cost.disk;
                }
            }
        }
    }
}

/// Free space of a home, as its hands report it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Bytes that the fullest log takes without recycling, less what undoing everything that it
    /// keeps would take ([`crate::destination::shard::Shard::undo_bytes`]).
    pub log: u64,
    /// Bytes that the disk under logs, objects and bulk data takes.
    pub disk: u64,
    /// A shard has more to do than it keeps up with: room for work is short, not for bytes.
    pub is_crowded: bool,
}

impl Space {
    /// Without bounds.
    pub const UNBOUNDED: Space = Space {
        log: u64::MAX,
        disk: u64::MAX,
        is_crowded: false,
    };
    /// With room for nothing new.
    pub const NONE: Space = Space {
        log: 0,
        disk: 0,
        is_crowded: false,
    };
}

/// When a home has room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HomeRule {
    /// What each source may have under way.
    pub budget: Budget,
    /// Kept for what no source stamps: of the log for fences, rows and marks, of the disk for the
    /// checkpoint.
    pub reserve: Cost,
}

impl Default for HomeRule {
    /// The product's: the largest record of the front, and two checkpoints of 32 MiB.
    fn default() -> HomeRule {
        HomeRule {
            budget: Budget::default(),
            reserve: Cost {
                log: 1 << 20,
                disk: 64 << 20,
            },
        }
    }
}

impl HomeRule {
    /// What must be free so that each of `sources` may stamp.
    #[must_use]
    pub fn needed(&self, sources: u64) -> Cost {
        let all =
            |budget: u64, reserve: u64| sources.saturating_mul(budget).saturating_add(reserve);
        Cost {
            log: all(self.budget.log, self.reserve.log),
            disk: all(self.budget.disk, self.reserve.disk),
        }
    }

    /// Whether new work may come.
    #[must_use]
    pub fn has_room(&self, space: &Space, sources: u64) -> bool {
        let is_on_disk = space.disk >= self.needed(sources).disk;
        self.has_room_in_log(space, sources) && is_on_disk && !space.is_crowded
    }

    /// Whether the logs are below their high-water: as far as they go, new work may come.
    #[must_use]
    pub fn has_room_in_log(&self, space: &Space, sources: u64) -> bool {
        space.log >= self.needed(sources).log
    }
}

/// A home's word that it has room for new work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoomAt {
    /// The home.
    pub home: NodeId,
    /// The view whose sources it counts.
    pub view: ViewId,
}
wire_struct!(RoomAt { home, view });

/// The newest words about room, by the tier that passed them.
#[derive(Debug, Default)]
pub struct Words {
    heard: BTreeMap<NodeId, Vec<RoomAt>>,
}

impl Words {
    /// A tier names all homes that have room; returns whether anything changed.
    pub fn hear(&mut self, hop: NodeId, room: &[RoomAt]) -> bool {
        let heard = self.heard.entry(hop).or_default();
        let changed = heard != room;
        if changed {
            *heard = room.to_vec();
        }
        changed
    }

    /// A home that is reached through `hop` has refused: it has no room until it says so again.
    pub fn refused(&mut self, hop: NodeId, home: NodeId) {
        if let Some(heard) = self.heard.get_mut(&hop) {
            heard.retain(|word| word.home != home);
        }
    }

    /// The word of `home` that it has room, as `hop` passed it.
    #[must_use]
    pub fn room_at(&self, hop: NodeId, home: NodeId) -> Option<RoomAt> {
        let heard = self.heard.get(&hop)?;
        heard.iter().find(|word| word.home == home).copied()
    }

    /// Whether a source that joined with `entered` may stamp for a home reached through `hop`. A
    /// home that is reached directly counts whoever has opened a session.
    #[must_use]
    pub fn allow(&self, hop: NodeId, home: NodeId, entered: ViewId) -> bool {
        let word = self.room_at(hop, home);
        word.is_some_and(|word| hop == home || word.view >= entered)
    }

    /// What each home that is reached directly said itself.
    pub fn own(&self) -> impl Iterator<Item = RoomAt> + '_ {
        self.heard.iter().flat_map(|(hop, words)| {
            let own = move |word: &&RoomAt| word.home == *hop;
            words.iter().filter(own).copied()
        })
    }
}

#[cfg(test)]
mod tests;
