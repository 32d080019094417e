//! What an update does to an object: execution, replay, and the way back.

use alloc::vec::Vec;

use crate::ids::{Epoch, Version};
use crate::op::{Bytes, Change, Key, Update};
use crate::record::{Objects, Recorded, Storage, Stored, Value, Write};

/// Values at least this long are placed out of line and their record points to them, in bytes.
pub const BULK_BYTES: usize = 64 << 10;

/// Executes one update in volatile state and returns what the record keeps of it.
pub(super) fn write<S: Storage>(update: &Update, epoch: Epoch, storage: &mut S) -> Write {
    let before = storage.get(&update.key);
    let version = next_version(before.as_ref());
    let (change, after, before) = match &update.change {
        Change::Put(bytes) => {
            check_order(before.as_ref(), epoch);
            let value = if bytes.len() >= BULK_BYTES {
                Value::Extent(storage.place(bytes))
            } else {
                Value::Inline(bytes.clone())
            };
            let after = Stored {
                version,
                epoch,
                value: value.clone(),
            };
            (Recorded::Put(value), Some(after), before)
        }
        Change::Delete => {
            check_order(before.as_ref(), epoch);
            (Recorded::Delete, None, before)
        }
        Change::Add(words) => {
            let existed = before.clone().map(|stored| Stored {
                value: Value::Inline(Bytes::from([])),
                ..stored
            });
            let after = add(before, words, storage);
            (Recorded::Add(words.clone()), Some(after), existed)
        }
    };
    storage.put(&update.key, after);
    Write {
        key: update.key.clone(),
        change,
        before,
    }
}

/// Applies a recorded change again after a restart.
pub(super) fn redo<S: Objects>(key: &Key, change: &Recorded, epoch: Epoch, storage: &mut S) {
    let before = storage.get(key);
    let version = next_version(before.as_ref());
    let after = match change {
        Recorded::Put(value) => Some(Stored {
            version,
            epoch,
            value: value.clone(),
        }),
        Recorded::Delete => None,
        Recorded::Add(words) => Some(add(before, words, storage)),
    };
    storage.put(key, after);
}

/// Takes a recorded write back and returns what the object is now.
pub(super) fn undo<S: Objects>(write: &Write, storage: &mut S) -> Option<Stored> {
    let now = storage.get(&write.key);
    let version = next_version(now.as_ref());
    let after = match &write.change {
        Recorded::Add(words) => {
            let old = now.and_then(|s| storage.fetch(&s.value));
            let sum = add_words(old.as_deref().unwrap_or(&[]), &negate_words(words));
            // An addition that made the object takes it away again, unless others have added to it
            // since.
            let keeps = write.before.is_some() || sum.iter().any(|b| *b != 0);
            let value = Value::Inline(sum);
            keeps.then_some(Stored {
                version,
                epoch: Epoch(0),
                value,
            })
        }
        Recorded::Put(_) | Recorded::Delete => {
            write.before.clone().map(|s| Stored { version, ..s })
        }
    };
    storage.put(&write.key, after.clone());
    after
}

fn next_version(before: Option<&Stored>) -> Version {
    Version(before.map_or(0, |s| s.version.0) + 1)
}

/// I4: a locked write never has a smaller epoch than the one it overwrites. A violation is a bug
/// in the lock protocol, and continuing would let undo restore the wrong state.
fn check_order(before: Option<&Stored>, epoch: Epoch) {
    if let Some(stored) = before {
        assert!(
            epoch >= stored.epoch,
            "S2 violated: {epoch} after {}",
            stored.epoch
        );
    }
}

/// The object after `words` were added. Counters carry no epoch: they are ordered by no lock.
fn add<S: Objects>(before: Option<Stored>, words: &Bytes, storage: &mut S) -> Stored {
    let version = next_version(before.as_ref());
    let old = before
        .and_then(|s| storage.fetch(&s.value))
        .unwrap_or_else(|| Bytes::from([]));
    let sum = add_words(&old, words);
    Stored {
        version,
        epoch: Epoch(0),
        value: Value::Inline(sum),
    }
}

/// Word by word sum of two lists of little-endian i64, the shorter one extended by zeros.
#[must_use]
pub fn add_words(a: &[u8], b: &[u8]) -> Bytes {
    let word = |list: &[u8], i: usize| {
        let chunk = list.get(i * 8..i * 8 + 8)?;
        Some(i64::from_le_bytes(chunk.try_into().ok()?))
    };
    let count = (a.len() / 8).max(b.len() / 8);
    let mut sum = Vec::with_capacity(count * 8);
    for i in 0..count {
        let value = word(a, i)
            .unwrap_or(0)
            .wrapping_add(word(b, i).unwrap_or(0));
        sum.extend_from_slice(&value.to_le_bytes());
    }
    Bytes::from(sum)
}

/// The words whose addition undoes the addition of `words`.
#[must_use]
pub fn negate_words(words: &[u8]) -> Bytes {
    let mut negated = Vec::with_capacity(words.len());
    for chunk in words.chunks_exact(8) {
        let word = i64::from_le_bytes(chunk.try_into().unwrap_or_default());
        negated.extend_from_slice(&word.wrapping_neg().to_le_bytes());
    }
    Bytes::from(negated)
}
