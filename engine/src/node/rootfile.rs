//! The root's durable state: one small file, replaced atomically.
//!
//! ```text
//! magic "LTRT" | version u32 | CRC-32C of the state u32 | length u32 | state
//! ```
//!
//! Written to a side file, synced, renamed over the old one, directory synced; on a thread of its
//! own. A state that is superseded before its turn is skipped, its version answered with the next.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use crossbeam_channel::{Sender, unbounded};
use lowtide_engine_core::root::RootState;

use super::StartError;
use crate::crc::crc32c;
use crate::medium::dir::{DirOptions, DirVolume};

const NAME: &str = "root.state";
const MAGIC: &[u8; 4] = b"LTRT";
const VERSION: u32 = 1;
const HEADER: usize = 16;

/// Writes states and says which version is durable.
#[derive(Debug)]
pub(crate) struct RootFile {
    /// Keeps the directory locked.
    _volume: DirVolume,
    work: Option<Sender<(u64, Vec<u8>)>>,
    persisted: Arc<AtomicU64>,
    failed: Arc<std::sync::Mutex<Option<String>>>,
    thread: Option<JoinHandle<()>>,
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

fn write(dir: &Path, state: &[u8]) -> io::Result<()> {
    let (path, side) = (dir.join(NAME), dir.join("root.state.new"));
    let mut file = File::create(&side)?;
    let mut header = Vec::with_capacity(HEADER);
    header.extend_from_slice(MAGIC);
    header.extend_from_slice(&VERSION.to_le_bytes());
    header.extend_from_slice(&crc32c(state).to_le_bytes());
    header.extend_from_slice(&(state.len() as u32).to_le_bytes());
    file.write_all(&header)?;
    file.write_all(state)?;
    file.sync_all()?;
    fs::rename(&side, &path)?;
    File::open(dir)?.sync_all()
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
        let failed = Arc::new(std::sync::Mutex::new(None));
        let (work, queue) = unbounded::<(u64, Vec<u8>)>();
        let (told, told_failed) = (persisted.clone(), failed.clone());
        let thread = std::thread::Builder::new()
            .name("lowtide-root".to_owned())
            .spawn(move || {
                while let Ok(first) = queue.recv() {
                    let Some((version, state)) = queue.try_iter().last().or(Some(first)) else {
                        continue;
                    };
                    match write(&dir, &state) {
                        Ok(()) => told.store(version, Ordering::Release),
                        Err(e) => {
                            let mut slot = told_failed
                                .lock()
                                .unwrap_or_else(std::sync::PoisonError::into_inner);
                            *slot = Some(format!("{}: {e}", dir.display()));
                            wake();
                            return;
                        }
                    }
                    wake();
                }
            })
            .map_err(StartError::Thread)?;
        let file = RootFile {
            _volume: volume,
            work: Some(work),
            persisted,
            failed,
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

    pub(crate) fn failure(&self) -> Option<String> {
        self.failed
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone()
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
        write(&dir, &state()).unwrap();
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
        write(&dir, &[0xFF; 40]).unwrap();
        assert!(read_state(&dir).unwrap_err().contains(NAME));
        fs::remove_dir_all(dir).unwrap();
    }
}
