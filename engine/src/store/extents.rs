//! Bulk data, written once, out of place.
//!
//! Owns: the file `extents.dat`, its allocation map (in memory only), CRCs on read.
//! An extent is written and synced before the record that points to it commits; what a record
//! points to is never overwritten. The map is rebuilt at a restart from the references that log and
//! store hold, so extents that nobody refers to are free again by themselves.
//!
//! Invariants: extents are aligned to [`EXTENT_ALIGN`] and never overlap; a read returns the bytes
//! written or an error; freeing is decided by the caller (epoch below the durable minimum).
//! Deliberately absent: deduplication, compaction, shrinking, reading parts of an extent without
//! its CRC.
//!
//! Source: design D2 ("Bulk data").

use crate::crc::crc32c;
use crate::medium::{Access, Gated, Medium, MediumError, PAGE, Poison, Volume};
use lowtide_engine_core::op::Bytes;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Name of the file.
pub const EXTENTS_FILE: &str = "extents.dat";
/// Alignment and granule of extents, bytes.
pub const EXTENT_ALIGN: u64 = PAGE;
/// Longest extent, bytes.
pub const EXTENT_MAX: u64 = 8 << 20;
/// Extents that follow each other are written together up to so many bytes: a disk takes much at once
/// nearly as fast as little.
const WRITTEN_AT_ONCE: u64 = 8 << 20;
/// The file grows by this much at once, bytes.
const GROWTH: u64 = 64 << 20;
/// It grows ahead of need only while the disk has so much free, bytes: what it has, logs and
/// checkpoints cannot have.
const PLENTY: u64 = 1 << 30;

/// Where an extent is and what it must contain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExtentRef {
    /// Byte offset in the file.
    pub offset: u64,
    /// Bytes of data.
    pub len: u32,
    /// CRC-32C of the data.
    pub crc32c: u32,
}

impl ExtentRef {
    /// The part of the file that the extent occupies.
    fn range(&self) -> Option<Range<u64>> {
        let end = self.offset.checked_add(u64::from(self.len))?;
        Some(self.offset..end.checked_next_multiple_of(EXTENT_ALIGN)?)
    }
}

/// Why an extent operation failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ExtentError {
    /// The medium failed.
    #[error(transparent)]
    Medium(#[from] MediumError),
    /// The disk, or the configured size, is exhausted. Nothing was written.
    #[error("{EXTENTS_FILE}: no space for an extent of {len} bytes")]
    NoSpace {
        /// Bytes wanted.
        len: u64,
    },
    /// Empty or longer than [`EXTENT_MAX`].
    #[error("an extent cannot have {len} bytes")]
    Length {
        /// Bytes given.
        len: u64,
    },
    /// The data does not match its reference.
    #[error(
        "{EXTENTS_FILE}: damaged at {offset}: {len} bytes have CRC {found:08x}, {expected:08x} expected"
    )]
    Damaged {
        /// Byte offset.
        offset: u64,
        /// Bytes of data.
        len: u32,
        /// CRC computed.
        found: u32,
        /// CRC in the reference.
        expected: u32,
    },
    /// A reference that cannot be: misaligned, empty, overlapping another, not allocated.
    #[error("{EXTENTS_FILE}: impossible reference {0:?}")]
    BadReference(ExtentRef),
    /// The file ends before an extent that log or store refer to: it was cut off.
    #[error(
        "{EXTENTS_FILE}: {file_len} bytes long, but {extent:?} is referred to; restore the file \
         from a copy"
    )]
    CutOff {
        /// The extent.
        extent: ExtentRef,
        /// Bytes of the file, whole pages.
        file_len: u64,
    },
}

/// Free and used space; both keyed by offset.
#[derive(Debug, Default)]
struct Map {
    /// Offset to length.
    free: BTreeMap<u64, u64>,
    /// Offset to length; guards against double frees.
    used: BTreeMap<u64, u64>,
    file_len: u64,
}

impl Map {
    /// First fit.
    fn take(&mut self, len: u64) -> Option<u64> {
        let (&at, &room) = self.free.iter().find(|(_, room)| **room >= len)?;
        self.free.remove(&at);
        if room > len {
            self.free.insert(at + len, room - len);
        }
        self.used.insert(at, len);
        Some(at)
    }

    /// Free bytes in one piece up to the file's end.
    fn room_at_end(&self) -> u64 {
        let last = self.free.last_key_value();
        let last = last.filter(|(at, len)| *at + *len == self.file_len);
        last.map_or(0, |(_, len)| *len)
    }

    /// Gives back, merging with neighbours.
    fn give(&mut self, mut at: u64, mut len: u64) {
        if let Some((&before, &room)) = self.free.range(..at).next_back()
            && before + room == at
        {
            self.free.remove(&before);
            (at, len) = (before, room + len);
        }
        if let Some(room) = self.free.remove(&(at + len)) {
            len += room;
        }
        self.free.insert(at, len);
    }
}

/// The bulk data of a node. All methods take `&self`; reads and writes may run on several threads.
#[derive(Debug)]
pub struct ExtentFile {
    medium: Gated,
    map: Mutex<Map>,
    /// One growth at a time.
    growing: Mutex<()>,
    bytes_max: u64,
}

impl ExtentFile {
    /// Opens or creates the file and rebuilds the map: everything that no reference in `live`
    /// covers is free. `bytes_max` bounds the file.
    ///
    /// # Errors
    /// [`ExtentError::BadReference`] if two references overlap, [`ExtentError::CutOff`] if one lies
    /// outside of the file: then something is damaged, and nothing may be overwritten.
    pub fn open(
        volume: &dyn Volume,
        bytes_max: u64,
        live: impl IntoIterator<Item = ExtentRef>,
    ) -> Result<ExtentFile, ExtentError> {
        let file = ExtentFile::open_for_reading(volume, bytes_max)?;
        file.adopt(live)?;
        Ok(file)
    }

    /// Opens or creates the file without a map: nothing may be written before
    /// [`adopt`](Self::adopt) has said what is in use.
    ///
    /// # Errors
    /// The medium's.
    pub fn open_for_reading(
        volume: &dyn Volume,
        bytes_max: u64,
    ) -> Result<ExtentFile, ExtentError> {
        let medium = match volume.open(EXTENTS_FILE, Access::Bulk) {
            Ok(medium) => medium,
            Err(MediumError::NotFound { .. }) => volume.create(EXTENTS_FILE, 0, Access::Bulk)?,
            Err(e) => return Err(e.into()),
        };
        let medium = Gated::new(EXTENTS_FILE, medium, Arc::new(Poison::default()));
        let file_len = medium.len()? / EXTENT_ALIGN * EXTENT_ALIGN;
        let map = Map {
            file_len,
            ..Map::default()
        };
        Ok(ExtentFile {
            medium,
            map: Mutex::new(map),
            growing: Mutex::new(()),
            bytes_max,
        })
    }

    /// Rebuilds the map: everything that no reference in `live` covers is free.
    ///
    /// # Errors
    /// As [`ExtentFile::open`].
    pub fn adopt(&self, live: impl IntoIterator<Item = ExtentRef>) -> Result<(), ExtentError> {
        let file_len = self.map().file_len;
        let mut map = Map {
            file_len,
            ..Map::default()
        };
        let mut live: Vec<ExtentRef> = live.into_iter().collect();
        live.sort_unstable();
        // Several versions of an object may refer to one extent.
        live.dedup();
        let mut end = 0;
        for extent in live {
            let bad = ExtentError::BadReference(extent);
            let Some(range) = extent.range() else {
                return Err(bad);
            };
            if range.end > file_len {
                return Err(ExtentError::CutOff { extent, file_len });
            }
            if range.start < end || !range.start.is_multiple_of(EXTENT_ALIGN) || extent.len == 0 {
                return Err(bad);
            }
            if range.start > end {
                map.free.insert(end, range.start - end);
            }
            map.used.insert(range.start, range.end - range.start);
            end = range.end;
        }
        if file_len > end {
            map.free.insert(end, file_len - end);
        }
        *self.map() = map;
        Ok(())
    }

    fn map(&self) -> MutexGuard<'_, Map> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes data to free space. Not durable before [`sync`](Self::sync).
    ///
    /// # Errors
    /// See [`ExtentError`].
    pub fn write(&self, data: &[u8]) -> Result<ExtentRef, ExtentError> {
        let extent = self.reserve(data, None)?;
        self.fill(extent, data)?;
        Ok(extent)
    }

    /// Takes free space for data, which is still to be written; `checksum` is its CRC-32C, if that
    /// is known.
    ///
    /// # Errors
    /// See [`ExtentError`].
    pub fn reserve(&self, data: &[u8], checksum: Option<u32>) -> Result<ExtentRef, ExtentError> {
        let len = data.len() as u64;
        if len == 0 || len > EXTENT_MAX {
            return Err(ExtentError::Length { len });
        }
        Ok(ExtentRef {
            offset: self.allocate(len)?,
            len: len as u32,
            crc32c: checksum.unwrap_or_else(|| crc32c(data)),
        })
    }

    /// Writes the data of a reserved extent. Not durable before [`sync`](Self::sync).
    ///
    /// # Errors
    /// See [`ExtentError`]; then the space is free again.
    pub fn fill(&self, extent: ExtentRef, data: &[u8]) -> Result<(), ExtentError> {
        self.fill_all(&[(extent, data)])
    }

    /// Writes the data of reserved extents; those that follow each other in the file with one write,
    /// where all but the last fill their pages.
    ///
    /// # Errors
    /// See [`ExtentError`]; then the space of all that were not written is free again.
    pub fn fill_all(&self, mut extents: &[(ExtentRef, &[u8])]) -> Result<(), ExtentError> {
        while let Some((first, _)) = extents.first() {
            let (mut end, mut count) = (first.offset, 0);
            for (extent, data) in extents {
                let bytes = end - first.offset + data.len() as u64;
                if extent.offset != end || (count > 0 && bytes > WRITTEN_AT_ONCE) {
                    break;
                }
                end += data.len() as u64;
                count += 1;
            }
            let (run, rest) = extents.split_at(count);
            let stretches: Vec<&[u8]> = run.iter().map(|(_, data)| *data).collect();
            if let Err(error) = self.medium.store_all(first.offset, &stretches) {
                for (extent, _) in extents {
                    self.free(*extent)?;
                }
                let len = end - first.offset;
                return Err(if error.is_no_space() {
                    ExtentError::NoSpace { len }
                } else {
                    error.into()
                });
            }
            extents = rest;
        }
        Ok(())
    }

    fn allocate(&self, len: u64) -> Result<u64, ExtentError> {
        let room = len.next_multiple_of(EXTENT_ALIGN);
        if let Some(at) = self.map().take(room) {
            return Ok(at);
        }
        let _one = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        // Somebody else may have grown the file meanwhile.
        if let Some(at) = self.map().take(room) {
            return Ok(at);
        }
        self.grow(room)?;
        self.map().take(room).ok_or(ExtentError::NoSpace { len })
    }

    /// Grows the file if less than a step is left at its end, so that who takes space need not wait
    /// for the disk: for a thread that may. Not while `disk_free`, in bytes, is little; no space for
    /// a whole step is no error.
    ///
    /// # Errors
    /// The medium's.
    pub fn grow_ahead(
        &self,
        disk_free: impl FnOnce() -> Result<u64, MediumError>,
    ) -> Result<(), ExtentError> {
        if self.map().room_at_end() >= GROWTH || disk_free()? < PLENTY {
            return Ok(());
        }
        let _one = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        match self.grow(GROWTH) {
            Err(ExtentError::NoSpace { .. }) => Ok(()),
            grown => grown,
        }
    }

    fn grow(&self, room: u64) -> Result<(), ExtentError> {
        let now = self.map().file_len;
        let limit = self.bytes_max / EXTENT_ALIGN * EXTENT_ALIGN;
        // A whole step if there is room for it, else just enough.
        for step in [GROWTH, room] {
            let to = now.saturating_add(step.max(room)).min(limit);
            if to < now + room {
                continue;
            }
            match self.medium.resize(to) {
                Ok(()) => {
                    let mut map = self.map();
                    map.file_len = to;
                    map.give(now, to - now);
                    return Ok(());
                }
                Err(error) if error.is_no_space() => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(ExtentError::NoSpace { len: room })
    }

    /// Makes every extent written so far durable.
    ///
    /// # Errors
    /// The first failure poisons the file.
    pub fn sync(&self) -> Result<(), ExtentError> {
        let len = self.map().file_len;
        Ok(self.medium.sync(0..len)?)
    }

    /// Reads an extent and checks its CRC. It is read whole pages at a time to an address that is one
    /// of a page, as the disk itself could do it.
    ///
    /// # Errors
    /// [`ExtentError::Damaged`], [`ExtentError::BadReference`], or the medium's.
    pub fn read_verify(&self, extent: ExtentRef) -> Result<Bytes, ExtentError> {
        const PAGE_LEN: usize = PAGE as usize;
        let file_len = self.map().file_len;
        let range = extent.range().filter(|range| range.end <= file_len);
        let range = range.filter(|_| u64::from(extent.len) <= EXTENT_MAX);
        let Some(range) = range else {
            return Err(ExtentError::BadReference(extent));
        };
        let padded = (range.end - range.start) as usize;
        let zeros = std::iter::repeat_n(0, padded + PAGE_LEN - 1);
        let mut owner: Arc<[u8]> = zeros.collect();
        let begin = owner.as_ptr().align_offset(PAGE_LEN);
        let pages = Arc::get_mut(&mut owner).and_then(|all| all.get_mut(begin..begin + padded));
        self.medium
            .read(extent.offset, pages.expect("nobody else has it"))?;
        let data = Bytes::part_of(&owner, begin..begin + extent.len as usize);
        let data = data.expect("it lies within");
        let found = crc32c(&data);
        if found != extent.crc32c {
            let ExtentRef {
                offset,
                len,
                crc32c: expected,
            } = extent;
            return Err(ExtentError::Damaged {
                offset,
                len,
                found,
                expected,
            });
        }
        Ok(data.with_checksum(found))
    }

    /// Gives the space of an extent back. Nothing durable may refer to it any more.
    ///
    /// # Errors
    /// [`ExtentError::BadReference`] if it is not allocated.
    pub fn free(&self, extent: ExtentRef) -> Result<(), ExtentError> {
        let mut map = self.map();
        let room = extent.range().map(|r| r.end - r.start);
        if room.is_none() || map.used.get(&extent.offset).copied() != room {
            return Err(ExtentError::BadReference(extent));
        }
        if let Some(len) = map.used.remove(&extent.offset) {
            map.give(extent.offset, len);
        }
        Ok(())
    }

    /// Bytes of the file that no extent occupies, in one piece or in many.
    pub fn free_bytes(&self) -> u64 {
        self.map().free.values().sum()
    }

    /// Bytes in use, padding included.
    pub fn used_bytes(&self) -> u64 {
        self.map().used.values().sum()
    }

    /// Bytes of the file.
    pub fn file_bytes(&self) -> u64 {
        self.map().file_len
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::medium::dir::{DirOptions, DirVolume};

    #[test]
    fn whoever_takes_space_finds_the_file_grown() {
        let dir = tempfile::tempdir().unwrap();
        let volume = DirVolume::open(dir.path(), DirOptions::default()).unwrap();
        let limit = 3 * GROWTH;
        let file = ExtentFile::open(&volume, limit, []).unwrap();
        let length = || {
            std::fs::metadata(dir.path().join(EXTENTS_FILE))
                .unwrap()
                .len()
        };
        let data = vec![1; 1 << 20];
        let take = |count| {
            for _ in 0..count {
                file.reserve(&data, Some(0)).unwrap();
            }
        };
        take(1);
        assert_eq!(length(), GROWTH, "the first waits");
        file.grow_ahead(|| Ok(PLENTY - 1)).unwrap();
        assert_eq!(length(), GROWTH, "others need the disk");
        file.grow_ahead(|| Ok(PLENTY)).unwrap();
        assert_eq!(length(), 2 * GROWTH);
        take(63);
        file.grow_ahead(|| Ok(PLENTY)).unwrap();
        assert_eq!(length(), 2 * GROWTH, "a step is left");
        take(1);
        file.grow_ahead(|| Ok(PLENTY)).unwrap();
        assert_eq!(length(), limit);
        take(3 * 64 - 65);
        file.grow_ahead(|| Ok(PLENTY)).unwrap();
        let full = file.reserve(&data, Some(0));
        assert!(matches!(full, Err(ExtentError::NoSpace { .. })));
        assert_eq!(length(), limit);
    }
}
