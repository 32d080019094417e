//! What is newer than the last checkpoint, in memory, in front of the store.
//!
//! Owns: an active map that a shard changes, and at most one frozen map that is being written to
//! the store by another thread. `get` looks in active, frozen, store.
//!
//! ```text
//! put/delete ─► active ──freeze(point)──► frozen ──checkpoint (other thread)──► store
//!                                            └── retire() when the store has it ──┘
//! ```
//!
//! Invariants: the frozen map never changes; it is written in one transaction, only when the log is
//! durable up to the freeze point *and* the point's commit group is durable on every log of the
//! node (WAL rule, I8: a restart drops records of groups that are not, so the store must not have
//! their effects); it stays visible here until the store has it.
//! Deliberately absent: back-pressure (the owner looks at [`Overlay::bytes`]), undo, threads.

use super::{Change, Store, StoreError};
use crate::log::Lsn;
use std::collections::BTreeMap;
use std::iter::Peekable;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Charged per entry beside key and value, bytes: tree node share, two allocations' headers.
const ENTRY_OVERHEAD: usize = 96;

type Map = BTreeMap<Box<[u8]>, Option<Box<[u8]>>>;

/// What memory knows of a range, in order; where both maps have a key the active one counts. As lazy
/// as its caller: most scans end at the first key.
struct Newer<'a> {
    frozen: Option<Peekable<Entries<'a>>>,
    active: Peekable<Entries<'a>>,
}

type Entries<'a> = std::collections::btree_map::Range<'a, Box<[u8]>, Option<Box<[u8]>>>;

impl<'a> Newer<'a> {
    /// The next entry, if its key is wanted.
    fn next_if(&mut self, wants: impl Fn(&[u8]) -> bool) -> Option<Change<'a>> {
        let frozen = self.frozen.as_mut().and_then(Peekable::peek);
        let frozen = frozen.map(|(key, _)| &***key);
        let active = self.active.peek().map(|(key, _)| &***key);
        let is_frozen = match (frozen, active) {
            (Some(frozen), Some(active)) => frozen < active,
            (frozen, _) => frozen.is_some(),
        };
        let key = if is_frozen { frozen } else { active };
        if !key.is_some_and(wants) {
            return None;
        }
        let is_both = frozen == active;
        let older = self.frozen.as_mut().filter(|_| is_frozen || is_both);
        let older = older.and_then(Iterator::next);
        let next = if is_frozen { older } else { self.active.next() };
        next.map(|(key, value)| (&**key, value.as_deref()))
    }
}

/// How far the log went when a map was frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FreezePoint {
    /// Every update in the map has its record before this position.
    pub lsn: Lsn,
    /// No update in the map belongs to a later commit group.
    pub group: u64,
}

/// How far the node is durable, for the WAL rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DurablePoint {
    /// The shard's log is durable up to here.
    pub lsn: Lsn,
    /// Groups up to this one are durable on every log.
    pub group: u64,
}

/// A frozen map, on its way into the store.
#[derive(Debug)]
pub struct Frozen {
    map: Map,
    bytes: usize,
    point: FreezePoint,
    written: AtomicBool,
}

impl Frozen {
    /// Where the log stood.
    pub fn point(&self) -> FreezePoint {
        self.point
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether nothing was changed.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Whether the store has it.
    pub fn is_written(&self) -> bool {
        // Acquire pairs with the Release in `checkpoint`.
        self.written.load(Ordering::Acquire)
    }

    /// Whether the WAL rule allows writing it.
    pub fn is_durable(&self, durable: DurablePoint) -> bool {
        durable.lsn >= self.point.lsn && durable.group >= self.point.group
    }

    /// Writes it to the store in one durable transaction that also sets the shard's position.
    /// Blocks; to be called on a thread that may.
    ///
    /// # Errors
    /// The store's; nothing of it is in the store then, unless the medium is poisoned and it cannot
    /// be known.
    ///
    /// # Panics
    /// If the WAL rule does not allow it: our own bug, and writing it would lose undo records.
    pub fn checkpoint(
        &self,
        store: &dyn Store,
        shard: u32,
        position: &[u8],
        durable: DurablePoint,
    ) -> Result<(), StoreError> {
        self.check(durable);
        store.apply_batch(&mut self.changes(), shard, position)?;
        self.written.store(true, Ordering::Release);
        Ok(())
    }

    fn check(&self, durable: DurablePoint) {
        assert!(
            self.is_durable(durable),
            "WAL rule: checkpoint of {:?} while durable is {durable:?}",
            self.point
        );
    }

    fn changes(&self) -> impl Iterator<Item = Change<'_>> {
        let entries = self.map.iter();
        entries.map(|(key, value)| (&**key, value.as_deref()))
    }
}

/// Writes frozen maps of several shards to the store in one durable transaction that also sets the
/// node's position. Blocks; to be called on a thread that may.
///
/// # Errors
/// As [`Frozen::checkpoint`].
///
/// # Panics
/// As [`Frozen::checkpoint`].
pub fn checkpoint_all(
    parts: &[(Arc<Frozen>, DurablePoint)],
    store: &dyn Store,
    position: &[u8],
) -> Result<(), StoreError> {
    for (frozen, durable) in parts {
        frozen.check(*durable);
    }
    let mut changes = parts.iter().flat_map(|(frozen, _)| frozen.changes());
    store.apply_batch(&mut changes, 0, position)?;
    for (frozen, _) in parts {
        frozen.written.store(true, Ordering::Release);
    }
    Ok(())
}

/// A value found in front of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cached<'a> {
    /// The newest value.
    Value(&'a [u8]),
    /// The key was deleted.
    Deleted,
}

/// See the module's comment.
#[derive(Debug)]
pub struct Overlay {
    store: Arc<dyn Store>,
    active: Map,
    active_bytes: usize,
    frozen: Option<Arc<Frozen>>,
}

impl Overlay {
    /// An empty overlay over `store`.
    pub fn new(store: Arc<dyn Store>) -> Overlay {
        Overlay {
            store,
            active: Map::new(),
            active_bytes: 0,
            frozen: None,
        }
    }

    /// Memory in use, bytes, approximately.
    pub fn bytes(&self) -> usize {
        self.active_bytes + self.frozen.as_ref().map_or(0, |f| f.bytes)
    }

    /// Memory of the active map alone: what a freeze would take along.
    pub fn active_bytes(&self) -> usize {
        self.active_bytes
    }

    /// Sets (`Some`) or deletes (`None`) a key. Its log record must have been appended.
    pub fn put(&mut self, key: &[u8], value: Option<&[u8]>) {
        let new = value.map_or(0, <[u8]>::len);
        match self.active.get_mut(key) {
            Some(slot) => {
                let old = slot.as_ref().map_or(0, |v| v.len());
                self.active_bytes = self.active_bytes + new - old;
                *slot = value.map(Box::from);
            }
            None => {
                self.active_bytes += key.len() + new + ENTRY_OVERHEAD;
                self.active.insert(key.into(), value.map(Box::from));
            }
        }
    }

    /// Looks in memory only; `None` means that the store decides.
    pub fn cached(&self, key: &[u8]) -> Option<Cached<'_>> {
        let found = self
            .active
            .get(key)
            .or_else(|| self.frozen.as_ref()?.map.get(key))?;
        Some(found.as_deref().map_or(Cached::Deleted, Cached::Value))
    }

    /// The newest value of a key; may block on the store.
    ///
    /// # Errors
    /// The store's.
    pub fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        match self.cached(key) {
            Some(Cached::Value(value)) => Ok(Some(value.to_vec())),
            Some(Cached::Deleted) => Ok(None),
            None => self.store.get(key),
        }
    }

    /// The newest values of up to `limit` keys from `from` (included) to `to` (excluded; `None` is
    /// no bound), in order, until `visit` returns `false`; may block on the store.
    ///
    /// # Errors
    /// The store's.
    pub fn scan(
        &self,
        from: &[u8],
        to: Option<&[u8]>,
        limit: usize,
        visit: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StoreError> {
        let upper = to.map_or(Bound::Unbounded, Bound::Excluded);
        let range = (Bound::Included(from), upper);
        if to.is_some_and(|to| to <= from) {
            return Ok(());
        }
        let frozen = self.frozen.as_ref().map(|frozen| &frozen.map);
        let mut newer = Newer {
            frozen: frozen.map(|map| map.range::<[u8], _>(range).peekable()),
            active: self.active.range::<[u8], _>(range).peekable(),
        };
        let mut left = limit;
        let mut go_on = limit > 0;
        let mut show = |key: &[u8], value: Option<&[u8]>, go_on: &mut bool| {
            if let Some(value) = value.filter(|_| *go_on) {
                left -= 1;
                *go_on = visit(key, value) && left > 0;
            }
        };
        if go_on {
            self.store.scan(range, usize::MAX, &mut |key, value| {
                while go_on && let Some((k, v)) = newer.next_if(|k| k < key) {
                    show(k, v, &mut go_on);
                }
                match newer.next_if(|k| k == key) {
                    Some((k, v)) => show(k, v, &mut go_on),
                    None => show(key, Some(value), &mut go_on),
                }
                go_on
            })?;
        }
        while go_on && let Some((key, value)) = newer.next_if(|_| true) {
            show(key, value, &mut go_on);
        }
        Ok(())
    }

    /// Freezes the active map for a checkpoint, unless one is still under way.
    pub fn freeze(&mut self, point: FreezePoint) -> Option<Arc<Frozen>> {
        if self.frozen.is_some() {
            return None;
        }
        let map = std::mem::take(&mut self.active);
        let bytes = std::mem::take(&mut self.active_bytes);
        let frozen = Arc::new(Frozen {
            map,
            bytes,
            point,
            written: AtomicBool::new(false),
        });
        self.frozen = Some(frozen.clone());
        Some(frozen)
    }

    /// Forgets the frozen map if the store has it; says what point the store has reached then.
    pub fn retire(&mut self) -> Option<FreezePoint> {
        let point = self.frozen.as_ref().filter(|f| f.is_written())?.point;
        self.frozen = None;
        Some(point)
    }

    /// What the active map holds: keys in order with their values, `None` for deleted ones.
    pub fn newer(&self) -> impl Iterator<Item = Change<'_>> {
        let entries = self.active.iter();
        entries.map(|(key, value)| (&**key, value.as_deref()))
    }

    /// The store behind.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }
}
