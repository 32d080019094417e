//! The checkpoint: state larger than memory, newer state in front of it, bulk data beside it.
//!
//! Owns: the [`Store`] trait; [`redb_store`] implements it over a medium that we supply, [`overlay`]
//! keeps what is newer than the last checkpoint, [`extents`] keeps bulk data out of place.
//!
//! The WAL rule (I8, U1): the store only ever contains updates whose log records are durable, and
//! whose commit group is durable on every log of the node. [`overlay`] enforces it where it writes.
//!
//! Why redb: it is the one candidate that runs on a supplied medium (`StorageBackend`), so crash
//! images and injected faults cover log and store alike. fjall and LMDB open their own files.
//!
//! Deliberately absent: the meaning of keys and values; versions and undo (the log's records).
#![deny(unsafe_code)]

pub mod extents;
pub mod overlay;
pub mod redb_store;

use crate::medium::MediumError;
use redb_store::STORE_FILE;
use std::fmt::Debug;
use std::ops::Bound;

/// Why the store refused.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The medium failed, or is full. After anything but a lack of space the store is poisoned.
    #[error(transparent)]
    Medium(#[from] MediumError),
    /// The database reports an error of its own: damage, or a refusal after an earlier error.
    #[error("{STORE_FILE}: {0}")]
    Database(String),
    /// Damaged. It is not repaired: the node must not serve what may lack committed updates.
    #[error("{STORE_FILE}: damaged ({0}); restore the node's directory from a copy")]
    Damaged(String),
    /// Written by another version, or not a store.
    #[error("{STORE_FILE}: {0}")]
    Foreign(String),
}

/// A range of keys.
pub type KeyRange<'a> = (Bound<&'a [u8]>, Bound<&'a [u8]>);

/// One change of a batch: a key and its new value, or `None` to delete it.
pub type Change<'a> = (&'a [u8], Option<&'a [u8]>);

/// A transactional, ordered map from bytes to bytes. All methods may block on I/O.
pub trait Store: Send + Sync + Debug {
    /// The value of `key`.
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError>;

    /// Shows up to `limit` entries of `range` in order of keys, until `visit` returns `false`.
    fn scan(
        &self,
        range: KeyRange<'_>,
        limit: usize,
        visit: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StoreError>;

    /// Applies all changes and sets the checkpoint position of `shard`, atomically and durably.
    fn apply_batch(
        &self,
        changes: &mut dyn Iterator<Item = Change<'_>>,
        shard: u32,
        position: &[u8],
    ) -> Result<(), StoreError>;

    /// The position that the last batch of `shard` set.
    fn last_checkpoint(&self, shard: u32) -> Result<Option<Vec<u8>>, StoreError>;
}
