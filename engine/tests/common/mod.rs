//! What the storage tests share: small shapes, crash images, a directory that removes itself.
#![allow(dead_code, reason = "each test program uses a part")]

use lowtide_engine::log::{LogConfig, LogIdentity};
use lowtide_engine::medium::SplitMix;
use lowtide_engine::medium::recording::{PageFate, RecordingVolume};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

pub const STORAGE: u128 = 0x1234_5678_9abc_def0_0fed_cba9_8765_4321;

/// Length of a segment of [`tiny`], bytes: room for 12 KiB of records.
pub const TINY_SEGMENT: u64 = 24 << 10;

/// Small segments: a handful of records each, so that everything happens often.
pub fn tiny(prefix: &str, number: u32) -> LogConfig {
    LogConfig {
        segment_bytes: TINY_SEGMENT,
        record_bytes_max: 1024,
        segments_min: 2,
        segments_max: 5,
        reserve_bytes: 0,
        ..LogConfig::new(
            prefix,
            LogIdentity {
                storage: STORAGE,
                number,
            },
        )
    }
}

/// The crash images to look at: none, all, each single pending page missing, each single one
/// present (up to `singles` of each), and `random` mixtures with torn pages.
pub fn images(
    volume: &RecordingVolume,
    singles: usize,
    random: usize,
    garbage: bool,
    rng: &mut SplitMix,
) -> Vec<RecordingVolume> {
    let pending = volume.pending_pages();
    let mut images = vec![volume.crash_image(&mut |_| PageFate::Absent)];
    if pending.is_empty() {
        return images;
    }
    images.push(volume.crash_image(&mut |_| PageFate::Complete));
    for one in pending.iter().take(singles) {
        let (others, this) = (PageFate::Complete, PageFate::Absent);
        images.push(volume.crash_image(&mut |p| if p == one { this } else { others }));
        images.push(volume.crash_image(&mut |p| if p == one { others } else { this }));
    }
    for _ in 0..random {
        images.push(
            volume
                .crash_image(&mut |p| PageFate::random(p.stores, garbage, &mut || rng.next_u64())),
        );
    }
    images
}

/// A directory under the system's temporary one, removed when dropped.
pub struct TempDir(pub PathBuf);

impl TempDir {
    pub fn new(name: &str) -> TempDir {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("lowtide-{name}-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        TempDir(dir)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
