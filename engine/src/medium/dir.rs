//! A volume of real files in one directory.
//!
//! Owns: the directory's lock file, creation of files that are whole or absent, positioned files.
//! Invariants: space is allocated (`posix_fallocate`), zero-filled and synced before a file is
//! mapped, so that no later write needs space or changes metadata; a new file gets its name last and
//! the directory is synced; nobody truncates a mapped file.
//! Deliberately absent: the mapping itself (`log::mapped`), subdirectories.

use super::power::PowerFailMedium;
use super::{Access, Call, Medium, MediumError, PAGE, Volume, store_each};
use crate::log::mapped::MappedFile;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{IoSlice, Read, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Name of the advisory lock file.
pub const LOCK_FILE: &str = "LOCK";
/// Suffix of a file that does not have its name yet.
const NEW: &str = ".new";
/// Bytes read at a time to bring a file to memory, and written at a time past the page cache.
const CHUNK: usize = 1 << 20;
/// Stores and reads shorter than this go through the page cache, which gathers them.
const DIRECT_MIN: usize = 256 << 10;

/// How a mapped file is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SyncMode {
    /// Past the page cache, where the file system can.
    #[default]
    Direct,
    /// Through the page cache.
    Cached,
}

/// Options of a [`DirVolume`].
#[derive(Debug, Clone, Copy, Default)]
pub struct DirOptions {
    /// How mapped files are written.
    pub sync: SyncMode,
    /// Journal the last durable image of each unsynced page, so that
    /// [`apply_power_loss`](super::power::apply_power_loss) can take the pages back. For fault
    /// injection; costs a write per page first dirtied.
    pub power_fail: bool,
}

/// A directory of real files, held by one process.
#[derive(Debug)]
pub struct DirVolume {
    dir: PathBuf,
    options: DirOptions,
    /// `None` when opened for inspection only.
    lock: Option<Arc<DirLock>>,
}

/// The directory's lock, held as long as the volume or any file of it is open.
#[derive(Debug)]
pub(crate) struct DirLock(File);

#[cfg(test)]
impl DirLock {
    pub(crate) fn of(file: File) -> DirLock {
        DirLock(file)
    }
}

impl Drop for DirLock {
    fn drop(&mut self) {
        // Explicitly: a process being forked at this moment shares the descriptor until it execs.
        let _ = self.0.unlock();
    }
}

impl DirVolume {
    /// Creates the directory if needed, takes its lock and removes files whose creation was cut off.
    ///
    /// # Errors
    /// [`MediumError::InUse`] with the holder's process id; I/O errors (read-only directory).
    pub fn open(dir: impl AsRef<Path>, options: DirOptions) -> Result<DirVolume, MediumError> {
        let dir = dir.as_ref().to_path_buf();
        let fail = |e| MediumError::from_io(&dir.display().to_string(), Call::Create, 0, 0, e);
        fs::create_dir_all(&dir).map_err(fail)?;
        let lock = Some(Arc::new(DirLock(take_lock(&dir)?)));
        let volume = DirVolume {
            dir: dir.clone(),
            options,
            lock,
        };
        for name in volume.list()? {
            if name.ends_with(NEW) {
                volume.remove(&name)?;
            }
        }
        Ok(volume)
    }

    /// Opens a directory to look at it: no lock, every store is refused.
    pub fn inspect(dir: impl AsRef<Path>) -> DirVolume {
        DirVolume {
            dir: dir.as_ref().to_path_buf(),
            options: DirOptions::default(),
            lock: None,
        }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    fn sync_dir(&self, call: Call) -> Result<(), MediumError> {
        File::open(&self.dir)
            .and_then(|d| d.sync_all())
            .map_err(|e| MediumError::from_io(&self.dir.display().to_string(), call, 0, 0, e))
    }

    fn wrap(&self, name: &str, file: File, access: Access) -> Result<Arc<dyn Medium>, MediumError> {
        let lock = self.lock.clone();
        let inner: Arc<dyn Medium> = match (access, lock) {
            (Access::Mapped, Some(lock)) if !self.options.power_fail => {
                let path = self.dir.join(name);
                Arc::new(MappedFile::map(&path, file, self.options.sync, lock)?)
            }
            (access, lock) => Arc::new(PositionedFile {
                direct: match access {
                    Access::Bulk if lock.is_some() => Direct::open(&self.dir.join(name)),
                    _ => None,
                },
                name: name.to_owned(),
                file,
                _lock: lock,
            }),
        };
        if self.options.power_fail && self.lock.is_some() {
            return Ok(Arc::new(PowerFailMedium::new(&self.dir, name, inner)?));
        }
        Ok(inner)
    }
}

impl Volume for DirVolume {
    fn list(&self) -> Result<Vec<String>, MediumError> {
        let fail = |e| MediumError::from_io(&self.dir.display().to_string(), Call::List, 0, 0, e);
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            if let Ok(name) = entry.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    fn open(&self, name: &str, access: Access) -> Result<Arc<dyn Medium>, MediumError> {
        let file = OpenOptions::new()
            .read(true)
            .write(self.lock.is_some())
            .open(self.dir.join(name))
            .map_err(|e| MediumError::from_io(name, Call::Open, 0, 0, e))?;
        self.wrap(name, file, access)
    }

    fn create(&self, name: &str, len: u64, access: Access) -> Result<Arc<dyn Medium>, MediumError> {
        let fail = |e| MediumError::from_io(name, Call::Create, 0, len, e);
        let path = self.dir.join(name);
        let new = self.dir.join(format!("{name}{NEW}"));
        let made = (|| {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(&new)?;
            allocate(&file, 0, len)?;
            if access == Access::Mapped {
                zero_fill(&file, len)?;
            }
            file.sync_all()?;
            if access == Access::Mapped {
                // Only a hint: the cache need not hold zeros that nobody will read.
                let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
                let _ = nix::fcntl::posix_fadvise(&file, 0, 0, advice);
            }
            fs::rename(&new, &path)?;
            Ok(file)
        })();
        let file = made.map_err(|e| {
            // Give the space back; the name was never taken.
            let _ = fs::remove_file(&new);
            fail(e)
        })?;
        self.sync_dir(Call::Create)?;
        self.wrap(name, file, access)
    }

    fn free_bytes(&self) -> Result<u64, MediumError> {
        let name = self.dir.display().to_string();
        let found = nix::sys::statvfs::statvfs(&self.dir)
            .map_err(|e| MediumError::from_io(&name, Call::List, 0, 0, e.into()))?;
        Ok(found.blocks_available() * found.fragment_size())
    }

    fn remove(&self, name: &str) -> Result<(), MediumError> {
        fs::remove_file(self.dir.join(name))
            .map_err(|e| MediumError::from_io(name, Call::Remove, 0, 0, e))?;
        self.sync_dir(Call::Remove)
    }
}

/// Takes `LOCK` and writes the process id into it.
fn take_lock(dir: &Path) -> Result<File, MediumError> {
    let shown = dir.display().to_string();
    let fail = |e| MediumError::from_io(&shown, Call::Create, 0, 0, e);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(dir.join(LOCK_FILE))
        .map_err(fail)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut text = String::new();
            let _ = file.read_to_string(&mut text);
            return Err(MediumError::InUse {
                dir: shown,
                pid: text.trim().parse().ok(),
            });
        }
        Err(TryLockError::Error(e)) => return Err(fail(e)),
    }
    file.set_len(0).map_err(fail)?;
    writeln!(file, "{}", std::process::id()).map_err(fail)?;
    Ok(file)
}

/// Promises space up front: `ENOSPC` here instead of SIGBUS or a failed write later.
fn allocate(file: &File, from: u64, to: u64) -> std::io::Result<()> {
    if to <= from {
        return Ok(());
    }
    let len = |n: u64| i64::try_from(n).map_err(|_| std::io::ErrorKind::FileTooLarge);
    nix::fcntl::posix_fallocate(file, len(from)?, len(to - from)?)?;
    Ok(())
}

/// Turns allocated but unwritten extents into written ones, so that a later sync of a mapped page
/// changes no metadata.
fn zero_fill(file: &File, len: u64) -> std::io::Result<()> {
    let zeros = vec![0u8; CHUNK];
    let mut at = 0;
    while at < len {
        let n = (len - at).min(CHUNK as u64);
        file.write_all_at(&zeros[..n as usize], at)?;
        at += n;
    }
    Ok(())
}

/// Stores and reads past the page cache.
///
/// The kernel would copy each byte to pages that it has to find first, and write them when the sync
/// asks for it. Here the disk takes what the store was given, while the next bytes are received.
/// The same on the way back: nobody is expected to read the same soon.
#[derive(Debug)]
struct Direct {
    file: File,
    /// Page-aligned memory for what is not: [`CHUNK`] bytes, and what alignment may take.
    buffer: Mutex<Vec<u8>>,
}

impl Direct {
    /// `None` where the file system does not offer it.
    fn open(path: &Path) -> Option<Direct> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(nix::fcntl::OFlag::O_DIRECT.bits())
            .open(path)
            .ok()?;
        let buffer = Mutex::new(vec![0; CHUNK + PAGE as usize]);
        Some(Direct { file, buffer })
    }

    /// Stores `bytes`, and zeros up to the end of their last page.
    fn store(&self, mut offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        const PAGE_LEN: usize = PAGE as usize;
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        let begin = buffer.as_ptr().align_offset(PAGE_LEN);
        let aligned = &mut buffer[begin..begin + CHUNK];
        let is_aligned = bytes.as_ptr().addr().is_multiple_of(PAGE_LEN);
        for piece in bytes.chunks(CHUNK) {
            let in_place = match is_aligned {
                true => piece.len() / PAGE_LEN * PAGE_LEN,
                false => 0,
            };
            let (in_place, copied) = piece.split_at(in_place);
            let padded = copied.len().next_multiple_of(PAGE_LEN);
            aligned[..copied.len()].copy_from_slice(copied);
            aligned[copied.len()..padded].fill(0);
            self.write_all(offset, &[in_place, &aligned[..padded]])?;
            offset += (in_place.len() + padded) as u64;
        }
        Ok(())
    }

    /// All in one call: each waits for the disk.
    fn write_all(&self, mut offset: u64, parts: &[&[u8]]) -> std::io::Result<()> {
        let mut parts: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
        let mut parts = &mut parts[..];
        // Takes empty parts off.
        IoSlice::advance_slices(&mut parts, 0);
        while !parts.is_empty() {
            let at = i64::try_from(offset).map_err(|_| std::io::ErrorKind::FileTooLarge)?;
            match nix::sys::uio::pwritev(&self.file, parts, at) {
                Ok(0) => return Err(std::io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    IoSlice::advance_slices(&mut parts, written);
                    offset += written as u64;
                }
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// What came of a call past the page cache, unless the file system refuses such calls though it took
/// the flag: the cache always works. Any other error counts; it is not tried again.
fn taken<T>(result: Option<std::io::Result<T>>) -> Option<std::io::Result<T>> {
    let is_refusal = |e: &std::io::Error| e.kind() == std::io::ErrorKind::InvalidInput;
    result.filter(|result| !result.as_ref().is_err_and(is_refusal))
}

/// A file accessed by `pread` and `pwrite`.
#[derive(Debug)]
struct PositionedFile {
    name: String,
    file: File,
    direct: Option<Direct>,
    /// Keeps the directory ours while the file is open.
    _lock: Option<Arc<DirLock>>,
}

impl PositionedFile {
    fn error(&self, call: Call, offset: u64, len: u64, e: std::io::Error) -> MediumError {
        MediumError::from_io(&self.name, call, offset, len, e)
    }
}

impl Medium for PositionedFile {
    fn len(&self) -> Result<u64, MediumError> {
        let meta = self
            .file
            .metadata()
            .map_err(|e| self.error(Call::Read, 0, 0, e))?;
        Ok(meta.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), MediumError> {
        let is_aligned = [offset, out.len() as u64, out.as_ptr().addr() as u64]
            .iter()
            .all(|n| n.is_multiple_of(PAGE));
        let direct = self.direct.as_ref();
        let direct = direct.filter(|_| out.len() >= DIRECT_MIN && is_aligned);
        let read = direct.map(|direct| direct.file.read_exact_at(out, offset));
        taken(read)
            .unwrap_or_else(|| self.file.read_exact_at(out, offset))
            .map_err(|e| match e.kind() {
                std::io::ErrorKind::UnexpectedEof => MediumError::OutOfRange {
                    file: self.name.clone(),
                    call: Call::Read,
                    offset,
                    len: out.len() as u64,
                    size: self.len().unwrap_or(0),
                },
                _ => self.error(Call::Read, offset, out.len() as u64, e),
            })
    }

    fn store(&self, offset: u64, bytes: &[u8]) -> Result<(), MediumError> {
        let direct = self.direct.as_ref();
        let direct = direct.filter(|_| bytes.len() >= DIRECT_MIN && offset.is_multiple_of(PAGE));
        taken(direct.map(|direct| direct.store(offset, bytes)))
            .unwrap_or_else(|| self.file.write_all_at(bytes, offset))
            .map_err(|e| self.error(Call::Store, offset, bytes.len() as u64, e))
    }

    fn store_all(&self, offset: u64, stretches: &[&[u8]]) -> Result<(), MediumError> {
        let len: usize = stretches.iter().map(|bytes| bytes.len()).sum();
        let are_pages = stretches.iter().all(|bytes| {
            let (address, len) = (bytes.as_ptr().addr() as u64, bytes.len() as u64);
            address.is_multiple_of(PAGE) && len.is_multiple_of(PAGE)
        });
        let direct = self.direct.as_ref();
        let direct =
            direct.filter(|_| len >= DIRECT_MIN && are_pages && offset.is_multiple_of(PAGE));
        taken(direct.map(|direct| direct.write_all(offset, stretches))).map_or_else(
            || store_each(self, offset, stretches),
            |stored| stored.map_err(|e| self.error(Call::Store, offset, len as u64, e)),
        )
    }

    fn sync(&self, range: Range<u64>) -> Result<(), MediumError> {
        self.file
            .sync_data()
            .map_err(|e| self.error(Call::Sync, range.start, range.end - range.start, e))
    }

    fn resize(&self, len: u64) -> Result<(), MediumError> {
        let now = self.len()?;
        let fail = |e| self.error(Call::Resize, 0, len, e);
        if len > now {
            // The last page may hold stale bytes beyond the end only if somebody else wrote there.
            allocate(&self.file, now / PAGE * PAGE, len).map_err(fail)?;
        }
        self.file.set_len(len).map_err(fail)?;
        self.file
            .sync_all()
            .map_err(|e| self.error(Call::Sync, 0, len, e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Stretches of whole pages go past the cache together, others one by one: read back alike.
    #[test]
    fn stretches_stored_together_are_read_as_they_were_given() {
        const PAGE_LEN: usize = PAGE as usize;
        let dir = tempfile::tempdir().unwrap();
        let volume = DirVolume::open(dir.path(), DirOptions::default()).unwrap();
        let file = volume.create("bulk", 4 << 20, Access::Bulk).unwrap();
        let source: Vec<u8> = (0..3 << 20).map(|i| (i % 251) as u8 + 1).collect();
        let begin = source.as_ptr().align_offset(PAGE_LEN);
        for shift in [0, 1] {
            let part = |from: usize, len| &source[begin + shift + from..][..len];
            let stretches = [
                part(0, DIRECT_MIN),
                part(DIRECT_MIN + PAGE_LEN, 2 * PAGE_LEN),
                part(1 << 20, DIRECT_MIN + shift),
            ];
            file.store_all(PAGE, &stretches).unwrap();
            let expected = stretches.concat();
            let mut found = vec![0; expected.len()];
            file.read(PAGE, &mut found).unwrap();
            assert!(found == expected, "shift {shift}");
        }
    }

    /// An error of the disk is an error, not a reason to try the page cache.
    #[test]
    fn a_store_that_failed_past_the_cache_is_not_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bulk");
        std::fs::write(&path, []).unwrap();
        let full = || OpenOptions::new().read(true).write(true).open("/dev/full");
        let medium = PositionedFile {
            name: "bulk".to_owned(),
            file: OpenOptions::new().write(true).open(&path).unwrap(),
            direct: Some(Direct {
                file: full().unwrap(),
                buffer: Mutex::new(vec![0; CHUNK + PAGE as usize]),
            }),
            _lock: None,
        };
        let source = vec![7; DIRECT_MIN + PAGE as usize];
        let begin = source.as_ptr().align_offset(PAGE as usize);
        let pages = &source[begin..begin + DIRECT_MIN];
        assert!(medium.store(0, pages).unwrap_err().is_no_space());
        assert!(medium.store_all(0, &[pages]).unwrap_err().is_no_space());
        assert!(std::fs::read(&path).unwrap().is_empty());
    }

    /// Whatever the store's address, length and neighbours: what is read is what was stored, zeros
    /// may fill its last page, and nothing else changes.
    #[test]
    fn bulk_stores_are_read_as_they_were_given() {
        const PAGES: usize = 2 * CHUNK / PAGE as usize + 8;
        let dir = tempfile::tempdir().unwrap();
        let volume = DirVolume::open(dir.path(), DirOptions::default()).unwrap();
        let file = volume
            .create("bulk", (PAGES as u64) * PAGE, Access::Bulk)
            .unwrap();
        let source: Vec<u8> = (0..3 * CHUNK).map(|i| (i % 249) as u8 + 1).collect();
        let mut expected = vec![0; PAGES * PAGE as usize];
        let lens = [
            DIRECT_MIN - 1,
            DIRECT_MIN,
            DIRECT_MIN + 1,
            CHUNK,
            CHUNK + 4095,
            2 * CHUNK + 1,
        ];
        for (round, len) in lens.into_iter().cycle().take(24).enumerate() {
            let page_address = source.as_ptr().align_offset(PAGE as usize);
            // Half of them begin with a page of memory.
            let from = page_address + round % 2 * (round * 7 + 1);
            let bytes = &source[from..from + len];
            let at = (round % 5) * PAGE as usize;
            // Something short and still in the cache lies next to it.
            let behind = (at + len).next_multiple_of(PAGE as usize);
            file.store(behind as u64, b"neighbour").unwrap();
            expected[behind..behind + 9].copy_from_slice(b"neighbour");
            file.store(at as u64, bytes).unwrap();
            expected[at..at + len].copy_from_slice(bytes);
            let mut found = vec![0; expected.len()];
            file.read(0, &mut found).unwrap();
            if found[at + len..behind].iter().all(|byte| *byte == 0) {
                expected[at + len..behind].fill(0);
            }
            assert!(found == expected, "round {round}: {len} bytes");
        }
        file.sync(0..PAGE).unwrap();
        assert!(file.store(0, &[]).is_ok());
    }
}
