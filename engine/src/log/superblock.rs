//! The few fields of a node that stand outside of its logs.
//!
//! Owns: the file `node.meta`, two pages, each a whole copy:
//!
//! ```text
//!  0  magic u32 "LTSB"    4  CRC-32C of bytes 8..len    8  version u32    12  len u32
//! 16  sequence u64       24  storage uuid u128         40  boots u64      48  epoch ceiling u64
//! 56  minimum u64        64  purge point u64           72  one checkpoint position u64 per log
//! ```
//!
//! An update writes one copy, syncs, writes the other, syncs. So a torn write leaves the other copy,
//! and damage to one copy later does not bring back an older state. The newest intact copy counts.
//! Deliberately absent: what the fields mean (the recovery of `engine-core`), locking (the volume's).

use super::Lsn;
use super::record::u64_at;
use crate::crc::crc32c;
use crate::medium::{Access, Gated, Medium, MediumError, PAGE, Poison, Volume};
use std::sync::Arc;

/// Name of the file.
pub const SUPERBLOCK_FILE: &str = "node.meta";
/// Version of this file, and of what the mind writes to logs and store beside it: in those of version 1
/// nothing tells how far the history goes that the root may rely on.
const VERSION: u32 = 2;
const MAGIC: u32 = u32::from_le_bytes(*b"LTSB");
const FIXED: usize = 72;
/// Most logs whose checkpoint position fits.
pub const CHECKPOINTS_MAX: usize = (PAGE as usize - FIXED) / 8;

/// The fields.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeState {
    /// The storage's uuid; logs and store belong to it.
    pub storage: u128,
    /// How often the node was started: its incarnation.
    pub boots: u64,
    /// The node's epoch never exceeds it; after a restart it starts there.
    pub epoch_ceiling: u64,
    /// `m_D`: the node's durable copy of the global minimum epoch.
    pub minimum: u64,
    /// Undo records of epochs below it may be gone; never above `minimum`.
    pub purge_point: u64,
    /// By log number: the store holds everything before this position.
    pub checkpoints: Vec<Lsn>,
}

/// Why a superblock cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum SuperblockError {
    /// The medium failed, or is poisoned by an earlier failure.
    #[error(transparent)]
    Medium(#[from] MediumError),
    /// There is none: the directory is not a node's, or was never initialised.
    #[error("{SUPERBLOCK_FILE} does not exist")]
    Absent,
    /// There is one already.
    #[error("{SUPERBLOCK_FILE} exists already")]
    Exists,
    /// Neither copy is intact.
    #[error("{SUPERBLOCK_FILE} is damaged")]
    Damaged,
    /// Written by another version.
    #[error("{SUPERBLOCK_FILE}: format version {found}, supported is {VERSION}")]
    Version {
        /// Its version.
        found: u32,
    },
    /// Of another storage.
    #[error("{SUPERBLOCK_FILE} is of storage {found:032x}, not {expected:032x}")]
    WrongStorage {
        /// Its uuid.
        found: u128,
        /// The uuid wanted.
        expected: u128,
    },
}

/// An open superblock.
#[derive(Debug)]
pub struct Superblock {
    medium: Gated,
    sequence: u64,
    state: NodeState,
}

impl Superblock {
    /// Creates the file with a first state.
    ///
    /// # Errors
    /// See [`SuperblockError`].
    pub fn create(volume: &dyn Volume, state: NodeState) -> Result<Superblock, SuperblockError> {
        if volume.list()?.iter().any(|name| name == SUPERBLOCK_FILE) {
            match Superblock::open(volume, None) {
                // Creation was cut off before the first copy was durable.
                Err(SuperblockError::Damaged) if is_blank(volume)? => {}
                Err(error @ SuperblockError::Medium(_)) => return Err(error),
                _ => return Err(SuperblockError::Exists),
            }
        }
        let medium = volume.create(SUPERBLOCK_FILE, 2 * PAGE, Access::Positioned)?;
        let medium = Gated::new(SUPERBLOCK_FILE, medium, Arc::new(Poison::default()));
        let mut block = Superblock {
            medium,
            sequence: 0,
            state,
        };
        block.write()?;
        Ok(block)
    }

    /// Opens the file; `storage` is checked if given.
    ///
    /// # Errors
    /// See [`SuperblockError`].
    pub fn open(volume: &dyn Volume, storage: Option<u128>) -> Result<Superblock, SuperblockError> {
        let medium = volume
            .open(SUPERBLOCK_FILE, Access::Positioned)
            .map_err(|e| match e {
                MediumError::NotFound { .. } => SuperblockError::Absent,
                e => e.into(),
            })?;
        let medium = Gated::new(SUPERBLOCK_FILE, medium, Arc::new(Poison::default()));
        let mut newest: Option<(u64, NodeState)> = None;
        let mut version = None;
        for copy in 0..2 {
            let mut page = vec![0u8; PAGE as usize];
            match medium.read(copy * PAGE, &mut page) {
                Ok(()) => {}
                Err(MediumError::OutOfRange { .. }) => continue,
                Err(e) => return Err(e.into()),
            }
            match decode(&page) {
                Copy::Intact(sequence, state) => {
                    if newest.as_ref().is_none_or(|(s, _)| sequence > *s) {
                        newest = Some((sequence, state));
                    }
                }
                Copy::Version(found) => version = Some(found),
                Copy::Damaged => {}
            }
        }
        // A copy of another version, even beside one of ours: somebody upgraded half-way.
        if let Some(found) = version {
            return Err(SuperblockError::Version { found });
        }
        let (sequence, state) = newest.ok_or(SuperblockError::Damaged)?;
        if let Some(expected) = storage.filter(|s| *s != state.storage) {
            return Err(SuperblockError::WrongStorage {
                found: state.storage,
                expected,
            });
        }
        Ok(Superblock {
            medium,
            sequence,
            state,
        })
    }

    /// The state, as it is on disk.
    pub fn state(&self) -> &NodeState {
        &self.state
    }

    /// Changes the state, durably and atomically.
    ///
    /// # Errors
    /// [`SuperblockError::Medium`]; a failed sync poisons the superblock, and then it is unknown
    /// whether the change is on disk.
    ///
    /// # Panics
    /// If a field that only grows would shrink, or the storage would change: our own bug.
    pub fn update(&mut self, change: impl FnOnce(&mut NodeState)) -> Result<(), SuperblockError> {
        let mut next = self.state.clone();
        change(&mut next);
        let now = &self.state;
        assert_eq!(next.storage, now.storage, "a storage keeps its uuid");
        assert!(next.boots >= now.boots && next.epoch_ceiling >= now.epoch_ceiling);
        assert!(next.minimum >= now.minimum && next.purge_point >= now.purge_point);
        assert!(
            next.purge_point <= next.minimum,
            "nothing is purged above the durable minimum"
        );
        assert!(next.checkpoints.len() <= CHECKPOINTS_MAX);
        assert!(next.checkpoints.len() >= now.checkpoints.len());
        assert!(
            now.checkpoints
                .iter()
                .zip(&next.checkpoints)
                .all(|(a, b)| a <= b)
        );
        let before = std::mem::replace(&mut self.state, next);
        self.write().inspect_err(|_| self.state = before)
    }

    fn write(&mut self) -> Result<(), SuperblockError> {
        self.sequence += 1;
        let page = encode(self.sequence, &self.state);
        for copy in 0..2 {
            let at = copy * PAGE;
            self.medium.store(at, &page)?;
            self.medium.sync(at..at + PAGE)?;
        }
        Ok(())
    }
}

/// Whether the file was created and never written.
fn is_blank(volume: &dyn Volume) -> Result<bool, MediumError> {
    let medium = volume.open(SUPERBLOCK_FILE, Access::Positioned)?;
    let mut bytes = vec![0u8; medium.len()?.min(2 * PAGE) as usize];
    medium.read(0, &mut bytes)?;
    // The first copy may be torn; the second is written after the first is durable.
    Ok(bytes.iter().skip(PAGE as usize).all(|b| *b == 0))
}

fn encode(sequence: u64, state: &NodeState) -> Vec<u8> {
    let mut page = vec![0u8; PAGE as usize];
    let len = FIXED + 8 * state.checkpoints.len();
    page[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    page[8..12].copy_from_slice(&VERSION.to_le_bytes());
    page[12..16].copy_from_slice(&(len as u32).to_le_bytes());
    page[16..24].copy_from_slice(&sequence.to_le_bytes());
    page[24..40].copy_from_slice(&state.storage.to_le_bytes());
    page[40..48].copy_from_slice(&state.boots.to_le_bytes());
    page[48..56].copy_from_slice(&state.epoch_ceiling.to_le_bytes());
    page[56..64].copy_from_slice(&state.minimum.to_le_bytes());
    page[64..72].copy_from_slice(&state.purge_point.to_le_bytes());
    for (slot, lsn) in page[FIXED..len].chunks_exact_mut(8).zip(&state.checkpoints) {
        slot.copy_from_slice(&lsn.0.to_le_bytes());
    }
    let crc = crc32c(&page[8..len]);
    page[4..8].copy_from_slice(&crc.to_le_bytes());
    page
}

enum Copy {
    Intact(u64, NodeState),
    Version(u32),
    Damaged,
}

fn decode(page: &[u8]) -> Copy {
    let u32_at = |at: usize| u64_at(page, at) as u32;
    if u32_at(0) != MAGIC {
        return Copy::Damaged;
    }
    let len = u32_at(12) as usize;
    if !(FIXED..=page.len()).contains(&len)
        || !(len - FIXED).is_multiple_of(8)
        || u32_at(4) != crc32c(&page[8..len])
    {
        return Copy::Damaged;
    }
    match u32_at(8) {
        VERSION => {}
        found => return Copy::Version(found),
    }
    let checkpoints = page[FIXED..len].as_chunks::<8>().0;
    let state = NodeState {
        storage: u128::from(u64_at(page, 24)) | u128::from(u64_at(page, 32)) << 64,
        boots: u64_at(page, 40),
        epoch_ceiling: u64_at(page, 48),
        minimum: u64_at(page, 56),
        purge_point: u64_at(page, 64),
        checkpoints: checkpoints
            .iter()
            .map(|c| Lsn(u64::from_le_bytes(*c)))
            .collect(),
    };
    Copy::Intact(u64_at(page, 16), state)
}
