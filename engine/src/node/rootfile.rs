//! The root's durable state: one small file, replaced atomically.
//!
//! ```text
//! magic "LTRT" | version u32 | CRC-32C of the state u32 | length u32 | state
//! ```
//!
//! Written to a side file, synced, renamed over the old one, directory synced; on a thread of its
//! own. A state that is superseded before its turn is skipped, its version answered with the next.
//!
//! A full disk is no failure: the old file is whole, nothing that rests on the new one has left, and
//! the newest state is tried again until there is room. Any other error ends the node.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, TryRecvError, unbounded};
use lowtide_engine_core::root::RootState;

use super::StartError;
use crate::crc::crc32c;
use crate::medium::dir::{DirOptions, DirVolume};

const NAME: &str = "root.state";
const MAGIC: &[u8; 4] = b"LTRT";
const VERSION: u32 = 1;
const HEADER: usize = 16;
/// Time between two tries while the disk is full.
const RETRY: Duration = Duration::from_millis(200);

/// Writes states and says which version is durable.
#[derive(Debug)]
pub(crate) struct RootFile {
    /// Keeps the directory locked.
    _volume: DirVolume,
    work: Option<Sender<(u64, Vec<u8>)>>,
    persisted: Arc<AtomicU64>,
    trouble: Arc<Mutex<Trouble>>,
    thread: Option<JoinHandle<()>>,
}

/// What keeps the newest state from being durable, in words.
#[derive(Debug, Default)]
struct Trouble {
    /// There is no room for it.
    full: Option<String>,
    /// It cannot be written, ever.
    failed: Option<String>,
}

/// Reads the state in `dir` without a lock; `None` when there is none.
///
/// # Errors
/// Damage, another version, or I/O.
pub fn read_state(dir: &Path) -> Result<Option<RootState>, String> {
    let path = dir.join(NAME);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(format!("{}: {e}", path.display())),
    };
    let bad = |what: &str| Err(format!("{}: {what}", path.display()));
    let Some((header, state)) = bytes.split_at_checked(HEADER) else {
        return bad("truncated");
    };
    let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| header[at + i]));
    if &header[..4] != MAGIC {
        return bad("not a root's state");
    }
    if word(4) != VERSION {
        return bad(&format!(
            "format version {}, supported is {VERSION}",
            word(4)
        ));
    }
    if word(12) as usize != state.len() || word(8) != crc32c(state) {
        return bad("damaged");
    }
    let state = RootState::decode(state).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(Some(state))
}

/// Why a state is not written.
enum WriteError {
    /// Nothing has changed; there may be room another time.
    Full(io::Error),
    Failed(io::Error),
}

fn write(dir: &Path, state: &[u8]) -> Result<(), WriteError> {
    let (path, side) = (dir.join(NAME), dir.join("root.state.new"));
    let mut header = Vec::with_capacity(HEADER);
    header.extend_from_slice(MAGIC);
    header.extend_from_slice(&VERSION.to_le_bytes());
    header.extend_from_slice(&crc32c(state).to_le_bytes());
    header.extend_from_slice(&(state.len() as u32).to_le_bytes());
    let beside = || {
        let mut file = File::create(&side)?;
        let written = file.write_all(&header).and_then(|()| file.write_all(state));
        if written.is_err() {
            // What little it holds may be what others lack.
            let _ = file.set_len(0);
        }
        written?;
        file.sync_all()
    };
    // Also a sync that lacks room spoils nothing here: the next try writes all of it anew.
    beside().map_err(|error| match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => WriteError::Full(error),
        _ => WriteError::Failed(error),
    })?;
    fs::rename(&side, &path)
        .and_then(|()| File::open(dir)?.sync_all())
        .map_err(WriteError::Failed)
}

/// Writes the newest state that waits, again and again, until nobody sends any more or one cannot be
/// written; `wake` is called whenever there is news.
fn keep(
    dir: &Path,
    queue: &Receiver<(u64, Vec<u8>)>,
    (persisted, trouble): (&AtomicU64, &Mutex<Trouble>),
    wake: impl Fn(),
) {
    while let Ok(first) = queue.recv() {
        let mut newest = queue.try_iter().last().unwrap_or(first);
        loop {
            match write(dir, &newest.1) {
                Ok(()) => break,
                Err(WriteError::Full(e)) => {
                    let words = format!("no room for {}: {e}", dir.join(NAME).display());
                    lock(trouble).full = Some(words);
                }
                Err(WriteError::Failed(e)) => {
                    lock(trouble).failed = Some(format!("{}: {e}", dir.display()));
                    wake();
                    return;
                }
            }
            wake();
            // Nobody tells when a disk has room again.
            std::thread::sleep(RETRY);
            match queue.try_recv() {
                Ok(newer) => newest = queue.try_iter().last().unwrap_or(newer),
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return,
            }
        }
        lock(trouble).full = None;
        // Release: whoever sees the version may rely on the file.
        persisted.store(newest.0, Ordering::Release);
        wake();
    }
}

fn lock(trouble: &Mutex<Trouble>) -> MutexGuard<'_, Trouble> {
    trouble.lock().unwrap_or_else(PoisonError::into_inner)
}

impl RootFile {
    pub(crate) fn open(
        dir: PathBuf,
        wake: impl Fn() + Send + 'static,
    ) -> Result<(RootFile, RootState), StartError> {
        let volume = DirVolume::open(&dir, DirOptions::default())
            .map_err(|e| StartError::Root(e.to_string()))?;
        let state = read_state(&dir)
            .map_err(StartError::Root)?
            .unwrap_or_default();
        let persisted = Arc::new(AtomicU64::new(0));
        let trouble = Arc::new(Mutex::new(Trouble::default()));
        let (work, queue) = unbounded();
        let told = (persisted.clone(), trouble.clone());
        let thread = std::thread::Builder::new()
            .name("lowtide-root".to_owned())
            .spawn(move || keep(&dir, &queue, (&told.0, &told.1), wake))
            .map_err(StartError::Thread)?;
        let file = RootFile {
            _volume: volume,
            work: Some(work),
            persisted,
            trouble,
            thread: Some(thread),
        };
        Ok((file, state))
    }

    pub(crate) fn persist(&self, version: u64, state: Vec<u8>) {
        if let Some(work) = &self.work {
            // After a failure nobody reads; the node is about to leave.
            let _ = work.send((version, state));
        }
    }

    pub(crate) fn persisted(&self) -> u64 {
        self.persisted.load(Ordering::Acquire)
    }

    /// Why the newest state is not durable yet, if that is for want of room.
    pub(crate) fn full(&self) -> Option<String> {
        lock(&self.trouble).full.clone()
    }

    pub(crate) fn failure(&self) -> Option<String> {
        lock(&self.trouble).failed.clone()
    }
}

impl Drop for RootFile {
    fn drop(&mut self) {
        self.work = None;
        if let Some(thread) = self.thread.take() {
            // A panic there was reported by the panic hook.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowtide_engine_core::effect::Effect;
    use lowtide_engine_core::ids::{NodeId, Time};
    use lowtide_engine_core::root::{Root, RootConfig};

    /// What a new root wants kept first.
    fn state() -> Vec<u8> {
        let config = RootConfig {
            interval: 1,
            evict_after: 1,
            retry_after: 1,
        };
        let mut root = Root::new(NodeId(1), config, RootState::default(), Time(0));
        root.handle_timeout(Time(1));
        match root.poll_effect() {
            Some(Effect::Persist { state, .. }) => state,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_damaged_file_is_named_and_a_whole_one_read() {
        let dir = std::env::temp_dir().join(format!("lowtide-root-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        assert!(read_state(&dir).unwrap().is_none(), "a new root");
        assert!(write(&dir, &state()).is_ok());
        let whole = fs::read(dir.join(NAME)).unwrap();
        assert!(read_state(&dir).unwrap().is_some());
        let refused = |bytes: &[u8]| {
            fs::write(dir.join(NAME), bytes).unwrap();
            let error = read_state(&dir).unwrap_err();
            assert!(error.contains(NAME), "{error}");
        };
        for len in 0..whole.len() {
            refused(&whole[..len]);
        }
        for at in 0..whole.len() {
            for flip in [1, 0x80, 0xFF] {
                let mut bytes = whole.clone();
                bytes[at] ^= flip;
                refused(&bytes);
            }
        }
        refused(&[&whole[..], &[0]].concat());
        // A write that was cut off leaves the state before.
        fs::write(dir.join(NAME), &whole).unwrap();
        fs::write(dir.join("root.state.new"), &whole[..9]).unwrap();
        assert!(read_state(&dir).unwrap().is_some());
        // What a right checksum covers may still make no sense.
        assert!(write(&dir, &[0xFF; 40]).is_ok());
        assert!(read_state(&dir).unwrap_err().contains(NAME));
        fs::remove_dir_all(dir).unwrap();
    }

    /// Waits for what the file's thread does, which a test can only look at.
    fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while !condition() {
            assert!(std::time::Instant::now() < deadline, "{what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_full_disk_is_told_and_waited_for_and_any_other_error_is_the_end() {
        let dir = std::env::temp_dir().join(format!("lowtide-full-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let side = dir.join("root.state.new");
        let (file, _) = RootFile::open(dir.clone(), || {}).unwrap();
        // Whatever is written there meets ENOSPC.
        std::os::unix::fs::symlink("/dev/full", &side).unwrap();
        file.persist(1, state());
        wait_until("a full disk is told", || file.full().is_some());
        let words = file.full().unwrap();
        assert!(words.contains(NAME) && words.contains("space"), "{words}");
        file.persist(2, state());
        // Time in which it tries again and must not get through.
        std::thread::sleep(2 * RETRY);
        assert_eq!((file.persisted(), file.failure()), (0, None));
        assert!(read_state(&dir).unwrap().is_none(), "nothing is half there");
        fs::remove_file(&side).unwrap();
        wait_until("the newest state is written", || file.persisted() == 2);
        assert_eq!(file.full(), None);
        assert!(read_state(&dir).unwrap().is_some());

        fs::create_dir(&side).unwrap();
        file.persist(3, state());
        wait_until("another error is a failure", || file.failure().is_some());
        assert_eq!((file.persisted(), file.full()), (2, None));
        drop(file);
        fs::remove_dir_all(dir).unwrap();
    }
}
