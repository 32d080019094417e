//! The store on redb.
//!
//! Owns: the adapter from our [`Medium`] to redb's backend, and the two tables (state, positions).
//! Invariants: one write transaction per batch, with immediate durability; after any failed store
//! or sync every later write is refused (redb's own `PreviousIo`, and our gate below it).
//! Deliberately absent: redb's own file and lock (the volume has them), savepoints, compaction.
//!
//! Trusts of its medium (redb's design document): bytes are written atomically, a sync that
//! returned is durable, bytes that do not change are not damaged.

use super::{Change, KeyRange, Store, StoreError};
use crate::medium::{Access, Gated, Medium, MediumError, Poison, Volume};
use redb::{Database, Durability, ReadableDatabase, StorageBackend, TableDefinition};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Name of the file.
pub const STORE_FILE: &str = "store.redb";
/// Length of redb's magic number, at the beginning of the file.
const MAGIC_LEN: usize = 9;
const STATE: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("state");
const POSITIONS: TableDefinition<'_, u32, &[u8]> = TableDefinition::new("positions");

/// A store in one redb file.
#[derive(Debug)]
pub struct RedbStore {
    database: Database,
    last_error: Arc<Mutex<Option<MediumError>>>,
}

impl RedbStore {
    /// Opens or creates the store; `cache_bytes` bounds redb's page cache.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn open(volume: &dyn Volume, cache_bytes: usize) -> Result<RedbStore, StoreError> {
        let mut is_new = true;
        let medium = match volume.open(STORE_FILE, Access::Positioned) {
            // Cut off while being created: the magic number is written last. Whoever knows of a
            // checkpoint must compare it with `last_checkpoint`, as after any other loss.
            Ok(medium) if is_blank(&*medium)? => {
                volume.create(STORE_FILE, 0, Access::Positioned)?
            }
            Ok(medium) => {
                is_new = false;
                medium
            }
            Err(MediumError::NotFound { .. }) => {
                volume.create(STORE_FILE, 0, Access::Positioned)?
            }
            Err(e) => return Err(e.into()),
        };
        let last_error = Arc::new(Mutex::new(None));
        let medium = Gated::new(STORE_FILE, medium, Arc::new(Poison::default()));
        let backend = Backend {
            medium,
            last_error: last_error.clone(),
        };
        let is_repaired = Arc::new(AtomicBool::new(is_new));
        let repaired = is_repaired.clone();
        let open = || {
            let mut database = Database::builder()
                .set_cache_size(cache_bytes)
                .set_repair_callback(move |_| repaired.store(true, Ordering::Relaxed))
                .create_with_backend(backend)
                .map_err(|e| error(&last_error, e.into()))?;
            // A repair has compared everything already.
            if !is_repaired.load(Ordering::Relaxed) {
                verify(&mut database, &last_error)?;
            }
            let store = RedbStore {
                database,
                last_error: last_error.clone(),
            };
            store.create_tables()?;
            Ok(store)
        };
        unless_it_panics(open)
    }

    fn create_tables(&self) -> Result<(), StoreError> {
        // Readers may then rely on both; nothing is written if they exist.
        let ready = self.read(|read| {
            let tables = read
                .open_table(STATE)
                .and_then(|_| read.open_table(POSITIONS));
            match tables {
                Ok(_) => Ok(true),
                Err(redb::TableError::TableDoesNotExist(_)) => Ok(false),
                Err(e) => Err(e.into()),
            }
        })?;
        if ready {
            Ok(())
        } else {
            self.apply(&mut std::iter::empty(), None)
        }
    }

    fn read<T>(
        &self,
        act: impl FnOnce(&redb::ReadTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        let result = self
            .database
            .begin_read()
            .map_err(redb::Error::from)
            .and_then(|r| act(&r));
        result.map_err(|e| error(&self.last_error, e))
    }

    fn apply(
        &self,
        changes: &mut dyn Iterator<Item = Change<'_>>,
        position: Option<(u32, &[u8])>,
    ) -> Result<(), StoreError> {
        let commit = || -> Result<(), redb::Error> {
            let mut write = self.database.begin_write()?;
            write.set_durability(Durability::Immediate)?;
            {
                let mut state = write.open_table(STATE)?;
                for (key, value) in changes {
                    match value {
                        Some(value) => state.insert(key, value)?,
                        None => state.remove(key)?,
                    };
                }
                let mut positions = write.open_table(POSITIONS)?;
                if let Some((shard, position)) = position {
                    positions.insert(shard, position)?;
                }
            }
            write.commit()?;
            Ok(())
        };
        commit().map_err(|e| error(&self.last_error, e))
    }
}

impl Store for RedbStore {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.read(|read| {
            let value = read.open_table(STATE)?.get(key)?;
            Ok(value.map(|v| v.value().to_vec()))
        })
    }

    fn scan(
        &self,
        range: KeyRange<'_>,
        limit: usize,
        visit: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StoreError> {
        self.read(|read| {
            for entry in read.open_table(STATE)?.range::<&[u8]>(range)?.take(limit) {
                let (key, value) = entry?;
                if !visit(key.value(), value.value()) {
                    break;
                }
            }
            Ok(())
        })
    }

    fn apply_batch(
        &self,
        changes: &mut dyn Iterator<Item = Change<'_>>,
        shard: u32,
        position: &[u8],
    ) -> Result<(), StoreError> {
        self.apply(changes, Some((shard, position)))
    }

    fn last_checkpoint(&self, shard: u32) -> Result<Option<Vec<u8>>, StoreError> {
        self.read(|read| {
            let position = read.open_table(POSITIONS)?.get(shard)?;
            Ok(position.map(|p| p.value().to_vec()))
        })
    }
}

/// Compares every page with its checksum: redb itself does so only after a crash, and would read a
/// damaged page as if it were whole. Reads the whole file, as the search for live extents does.
fn verify(
    database: &mut Database,
    last_error: &Mutex<Option<MediumError>>,
) -> Result<(), StoreError> {
    match database.check_integrity() {
        Ok(true) => Ok(()),
        // Perhaps to an earlier commit; the checkpoint's position tells, and the log goes on there.
        Ok(false) => {
            tracing::warn!("{STORE_FILE} was damaged where redb could repair it");
            Ok(())
        }
        Err(e) => Err(error(last_error, e.into())),
    }
}

/// redb asserts what it reads from the file, so damage may make it panic.
fn unless_it_panics(
    open: impl FnOnce() -> Result<RedbStore, StoreError>,
) -> Result<RedbStore, StoreError> {
    // Nothing of what was under way is used afterwards.
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(open)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(StoreError::Damaged(text.unwrap_or("panic").to_owned()))
    })
}

/// Whether a store's creation was never finished.
fn is_blank(medium: &dyn Medium) -> Result<bool, MediumError> {
    let mut magic = [0u8; MAGIC_LEN];
    if medium.len()? < MAGIC_LEN as u64 {
        return Ok(true);
    }
    medium.read(0, &mut magic)?;
    Ok(magic == [0; MAGIC_LEN])
}

/// The medium's own error if there was one; redb wraps it, and repeats it as `PreviousIo`.
fn error(last: &Mutex<Option<MediumError>>, error: redb::Error) -> StoreError {
    let cause = last.lock().unwrap_or_else(PoisonError::into_inner).clone();
    match (error, cause) {
        (redb::Error::Io(_) | redb::Error::PreviousIo, Some(cause)) => cause.into(),
        (error @ redb::Error::UpgradeRequired(_), _) => StoreError::Foreign(error.to_string()),
        // redb reports a bad magic number as invalid data.
        (redb::Error::Io(e), None) if e.kind() == io::ErrorKind::InvalidData => {
            StoreError::Foreign(e.to_string())
        }
        (redb::Error::Corrupted(what), _) => StoreError::Damaged(what),
        (error, _) => StoreError::Database(error.to_string()),
    }
}

/// redb's view of a medium.
#[derive(Debug)]
struct Backend {
    medium: Gated,
    last_error: Arc<Mutex<Option<MediumError>>>,
}

impl Backend {
    fn note<T>(&self, result: Result<T, MediumError>) -> io::Result<T> {
        result.map_err(|e| {
            let mut last = self
                .last_error
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            last.get_or_insert_with(|| e.clone());
            e.into()
        })
    }
}

impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        self.note(self.medium.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.note(self.medium.read(offset, out))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.note(self.medium.resize(len))
    }

    fn sync_data(&self) -> io::Result<()> {
        let len = self.medium.len();
        self.note(len.and_then(|len| self.medium.sync(0..len)))
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.note(self.medium.store(offset, data))
    }

    fn close(&self) -> io::Result<()> {
        self.note(self.medium.close())
    }
}
