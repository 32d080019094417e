//! The directory in which a cluster on this machine keeps everything.
//!
//! ```text
//! STATE/
//!   lowtide.toml      marks the directory and its version
//!   lock              held (flock) by the one process that uses it
//!   cluster.toml      the cluster
//!   status.json       every node's last status, after a run that failed
//!   NAME/node.toml    one directory per node
//!   NAME/log          what the node's process printed, all lives appended
//!   NAME/control.sock where a running node takes orders
//!   NAME/data/        persistent state, where the role has any
//! ```
//!
//! Invariant: nothing is written to a directory that is neither empty nor marked as ours in this
//! version, and only while the lock is held.

use std::fs::{File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::config::{Cluster, ConfigError};

/// Version of the layout and of everything below it.
pub const VERSION: u32 = 2;

/// Why a state directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// Another process holds the lock.
    #[error("{}: in use by another lowtide process", dir.display())]
    InUse {
        /// The directory.
        dir: PathBuf,
    },
    /// Written by another version.
    #[error("{}: state of version {found}, this lowtide knows version {VERSION}", dir.display())]
    Version {
        /// The directory.
        dir: PathBuf,
        /// What the marker says.
        found: String,
    },
    /// A run would overwrite what is there.
    #[error("{}: not empty; name a directory that is empty or does not exist yet", dir.display())]
    NotEmpty {
        /// The directory.
        dir: PathBuf,
    },
    /// There is no state here.
    #[error("{}: no lowtide state here (no lowtide.toml)", dir.display())]
    Absent {
        /// The directory.
        dir: PathBuf,
    },
    /// The description of the cluster inside is damaged.
    #[error(transparent)]
    Cluster(#[from] ConfigError),
    /// The file system refused.
    #[error("{}: {error}", path.display())]
    Io {
        /// What was accessed.
        path: PathBuf,
        /// The reason.
        error: io::Error,
    },
}

/// A state directory, locked by this process while this value lives.
#[derive(Debug)]
pub struct State {
    dir: PathBuf,
    _lock: File,
}

impl State {
    /// Makes a new state directory at `dir`, which must be absent or empty.
    ///
    /// # Errors
    /// [`StateError`]
    pub fn create(dir: &Path) -> Result<State, StateError> {
        std::fs::create_dir_all(dir).map_err(|e| io_error(dir, e))?;
        let dir = dir.canonicalize().map_err(|e| io_error(dir, e))?;
        let marker = dir.join("lowtide.toml");
        if marker.exists() {
            // Says "in use" or "another version" where that is the reason.
            State::open(&dir)?;
            return Err(StateError::NotEmpty { dir });
        }
        let mut entries = std::fs::read_dir(&dir).map_err(|e| io_error(&dir, e))?;
        if entries.next().is_some() {
            return Err(StateError::NotEmpty { dir });
        }
        let lock = lock(&dir)?;
        let mut file = File::create_new(&marker).map_err(|e| io_error(&marker, e))?;
        writeln!(file, "version = {VERSION}").map_err(|e| io_error(&marker, e))?;
        Ok(State { dir, _lock: lock })
    }

    /// Opens and locks the state that a cluster left behind.
    ///
    /// # Errors
    /// [`StateError`]; in particular [`StateError::InUse`] while the cluster runs.
    pub fn open(dir: &Path) -> Result<State, StateError> {
        let dir = check_marker(dir)?;
        let lock = lock(&dir)?;
        Ok(State { dir, _lock: lock })
    }

    /// Absolute path of the directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

/// The cluster described in a state directory, which may be in use.
///
/// # Errors
/// [`StateError`]
pub fn cluster(dir: &Path) -> Result<Cluster, StateError> {
    let dir = check_marker(dir)?;
    Ok(Cluster::load(&dir.join("cluster.toml"))?)
}

/// Where a node of a local cluster takes orders.
#[must_use]
pub fn control_socket(state: &Path, node: &str) -> PathBuf {
    state.join(node).join("control.sock")
}

/// Where a node of a local cluster keeps its state.
#[must_use]
pub fn data_dir(state: &Path, node: &str) -> PathBuf {
    state.join(node).join("data")
}

fn check_marker(dir: &Path) -> Result<PathBuf, StateError> {
    #[derive(serde::Deserialize)]
    struct Marker {
        version: toml::Value,
    }
    let marker = dir.join("lowtide.toml");
    let text = match std::fs::read_to_string(&marker) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(StateError::Absent {
                dir: dir.to_owned(),
            });
        }
        Err(error) => return Err(io_error(&marker, error)),
    };
    let found = match toml::from_str::<Marker>(&text) {
        Ok(marker) => marker.version.to_string(),
        Err(_) => "unknown".to_owned(),
    };
    if found != VERSION.to_string() {
        return Err(StateError::Version {
            dir: dir.to_owned(),
            found,
        });
    }
    dir.canonicalize().map_err(|e| io_error(dir, e))
}

fn lock(dir: &Path) -> Result<File, StateError> {
    let path = dir.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|e| io_error(&path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StateError::InUse {
            dir: dir.to_owned(),
        }),
        Err(TryLockError::Error(error)) => Err(io_error(&path, error)),
    }
}

fn io_error(path: &Path, error: io::Error) -> StateError {
    StateError::Io {
        path: path.to_owned(),
        error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_process_at_a_time() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("a/b");
        let state = State::create(&dir).unwrap();
        assert!(matches!(State::open(&dir), Err(StateError::InUse { .. })));
        assert!(matches!(State::create(&dir), Err(StateError::InUse { .. })));
        drop(state);
        State::open(&dir).unwrap();
        let error = State::create(&dir).unwrap_err();
        assert!(matches!(error, StateError::NotEmpty { .. }), "{error}");
    }

    #[test]
    fn other_peoples_directories_and_versions_are_left_alone() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path();
        assert!(matches!(State::open(dir), Err(StateError::Absent { .. })));
        std::fs::write(dir.join("thesis.tex"), "x").unwrap();
        assert!(matches!(
            State::create(dir),
            Err(StateError::NotEmpty { .. })
        ));
        assert_eq!(std::fs::read_dir(dir).unwrap().count(), 1);
        for (text, found) in [("version = 1", "1"), ("??", "unknown")] {
            std::fs::write(dir.join("lowtide.toml"), text).unwrap();
            let error = State::open(dir).unwrap_err();
            assert!(error.to_string().contains(&format!("version {found},")));
        }
    }
}
