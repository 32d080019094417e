//! The directory that a run stores: how large it is, and which one to take when none is named.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A default input holds at least this many entries …
const ENTRIES_MIN: u64 = 300;
/// … and at most this many entries …
const ENTRIES_MAX: u64 = 60_000;
/// … and bytes, so that a first run takes seconds to minutes.
const BYTES_MAX: u64 = 512 << 20;
/// Bytes of contents that one operation carries at most, so that they are work of their own.
const BYTES_PER_OPERATION: u64 = 8 << 20;

/// Size of a tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// Entries, the directory itself not counted.
    pub entries: u64,
    /// Bytes in regular files.
    pub bytes: u64,
}

impl Survey {
    /// About how many operations it takes to store so many entries and bytes.
    #[must_use]
    pub fn operations(entries: u64, bytes: u64) -> u64 {
        entries + bytes / BYTES_PER_OPERATION
    }
}

/// Counts what lies below `dir`, until there is more than the limits. What cannot be read is not
/// counted; storing it says so with a reason.
#[must_use]
pub fn survey(dir: &Path, limit: Survey) -> Survey {
    let mut found = Survey::default();
    let mut pending = vec![dir.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            // Does not follow symbolic links.
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            found.entries += 1;
            if metadata.is_file() {
                found.bytes += metadata.size();
            } else if metadata.is_dir() {
                pending.push(entry.path());
            }
            if found.entries > limit.entries || found.bytes > limit.bytes {
                return found;
            }
        }
    }
    found
}

/// No limit for [`survey`].
pub const EVERYTHING: Survey = Survey {
    entries: u64::MAX,
    bytes: u64::MAX,
};

/// A directory of moderate size that any machine with Rust has: parts of the toolchain's
/// documentation, sources of crates that cargo has unpacked, or the toolchain's library directory.
///
/// The first candidate of fitting size wins; if none fits, the first that exists at all.
#[must_use]
pub fn default_input() -> Option<PathBuf> {
    let candidates: Vec<PathBuf> = candidates().filter(|dir| dir.is_dir()).collect();
    let limit = Survey {
        entries: ENTRIES_MAX,
        bytes: BYTES_MAX,
    };
    let fits = |dir: &&PathBuf| {
        let found = survey(dir, limit);
        found.entries >= ENTRIES_MIN && found.entries <= limit.entries && found.bytes <= limit.bytes
    };
    candidates.iter().find(fits).or(candidates.first()).cloned()
}

fn candidates() -> impl Iterator<Item = PathBuf> {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let cargo_home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(home?.join(".cargo")));
    let sysroot = sysroot();
    let below = |base: &Option<PathBuf>, path: &str| base.as_ref().map(|base| base.join(path));
    [
        below(&cargo_home, "registry/src"),
        below(&sysroot, "share/doc/rust/html/std"),
        below(&sysroot, "share/doc/rust/html/book"),
        below(&sysroot, "lib/rustlib/src"),
        below(&sysroot, "share"),
        below(&sysroot, "lib/rustlib"),
        below(&sysroot, "lib"),
    ]
    .into_iter()
    .flatten()
}

fn sysroot() -> Option<PathBuf> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc)
        .args(["--print", "sysroot"])
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    let path = String::from_utf8(output.stdout).ok()?;
    Some(PathBuf::from(path.trim_end()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_survey_counts_everything_and_follows_no_links() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path();
        fs::create_dir(dir.join("sub")).unwrap();
        fs::write(dir.join("a"), "12345").unwrap();
        fs::write(dir.join("sub/b"), "678").unwrap();
        std::os::unix::fs::symlink("..", dir.join("sub/up")).unwrap();
        let all = Survey {
            entries: 4,
            bytes: 8,
        };
        assert_eq!(survey(dir, EVERYTHING), all);
        let limited = survey(
            dir,
            Survey {
                entries: 1,
                bytes: u64::MAX,
            },
        );
        assert_eq!(limited.entries, 2, "stops beyond the limit");
    }

    #[test]
    fn this_machine_has_a_default_input() {
        let dir = default_input().expect("cargo runs this test, so there is a sysroot");
        assert!(survey(&dir, EVERYTHING).entries > 0);
    }
}
