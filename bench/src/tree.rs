//! The tree of small files: always the same one.

use std::fs;
use std::io;
use std::path::Path;

use lowtide_engine::medium::SplitMix;

/// Files in the tree.
pub const FILES: u64 = 50_000;
/// Directories that they are spread over, in turn.
const DIRECTORIES: u64 = 500;
/// Longest file, bytes.
const LEN_MAX: u64 = 64 << 10;
/// Seed of lengths and contents.
const SEED: u64 = 0x10ad;

/// Writes `files` files below `dir` and returns the bytes in them: lengths log-uniform from 0 to
/// 64 KiB, contents incompressible. What was written is in the page cache.
///
/// # Errors
/// The file system refuses.
pub fn make(dir: &Path, files: u64) -> io::Result<u64> {
    for d in 0..DIRECTORIES.min(files) {
        fs::create_dir_all(dir.join(format!("d{d:03}")))?;
    }
    let mut random = SplitMix(SEED);
    let mut bytes = 0;
    for file in 0..files {
        let len = length(&mut random);
        let mut content = Vec::with_capacity(len as usize + 8);
        while content.len() < len as usize {
            content.extend_from_slice(&random.next_u64().to_le_bytes());
        }
        content.truncate(len as usize);
        let (d, n) = (file % DIRECTORIES, file / DIRECTORIES);
        fs::write(dir.join(format!("d{d:03}/f{n:05}")), &content)?;
        bytes += len;
    }
    Ok(bytes)
}

/// Writes `files` empty files into the one directory `dir`.
///
/// # Errors
/// The file system refuses.
pub fn make_flat(dir: &Path, files: u64) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    (0..files).try_for_each(|file| fs::File::create(dir.join(format!("f{file:07}"))).map(drop))
}

/// A length from 0 to [`LEN_MAX`], its logarithm uniform.
fn length(random: &mut SplitMix) -> u64 {
    let unit = (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    let scaled = ((LEN_MAX + 1) as f64).powf(unit);
    (scaled as u64 - 1).min(LEN_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_spread_over_all_magnitudes() {
        let mut random = SplitMix(SEED);
        let lengths: Vec<u64> = (0..10_000).map(|_| length(&mut random)).collect();
        assert_eq!(lengths.iter().min(), Some(&0));
        assert!(lengths.iter().all(|len| *len <= LEN_MAX));
        // Half of the logarithms lie below the half of the largest one.
        let short = lengths.iter().filter(|len| **len < 255).count();
        assert!((4_800..5_200).contains(&short), "{short}");
    }

    #[test]
    fn the_tree_is_always_the_same() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let bytes: Vec<u64> = dirs
            .iter()
            .map(|dir| make(dir.path(), 600).unwrap())
            .collect();
        assert_eq!(bytes[0], bytes[1]);
        let one = |dir: &tempfile::TempDir| fs::read(dir.path().join("d007/f00001")).unwrap();
        assert_eq!(one(&dirs[0]), one(&dirs[1]));
    }
}
