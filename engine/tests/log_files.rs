//! The log on real, mapped files: what the file system can do to it.

mod common;

use common::{STORAGE, TINY_SEGMENT, TempDir, tiny};
use lowtide_engine::log::inspect::{Entry, Verdict, inspect};
use lowtide_engine::log::set::{LogSet, SetConfig};
use lowtide_engine::log::{
    Append, Log, LogConfig, LogIdentity, Lsn, OpenError, ReserveError, Scanned,
};
use lowtide_engine::medium::dir::{DirOptions, DirVolume, SyncMode};
use lowtide_engine::medium::{Access, MediumError, Poison, Volume};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

fn volume(dir: &Path) -> Arc<dyn Volume> {
    Arc::new(DirVolume::open(dir, DirOptions::default()).unwrap())
}

fn append(log: &mut Log, epoch: u64, body: &[u8]) -> Lsn {
    log.append(Append {
        kind: 1,
        flags: 0,
        epoch,
        group: 1,
        parts: &[body],
    })
    .unwrap()
}

fn fill(dir: &Path, records: u64) {
    let (mut log, _) = Log::open(volume(dir), tiny("log", 1)).unwrap();
    let handle = log.sync_handle();
    for epoch in 1..=records {
        append(&mut log, epoch, &[epoch as u8; 100]);
        handle.sync(log.end()).unwrap();
        handle.prepare().unwrap();
    }
}

#[test]
fn both_ways_of_syncing_survive_a_restart_and_the_log_goes_round() {
    for sync in [SyncMode::Direct, SyncMode::Cached] {
        let dir = TempDir::new("round");
        let options = DirOptions {
            sync,
            ..DirOptions::default()
        };
        let open = || {
            let volume = Arc::new(DirVolume::open(dir.path(), options).unwrap());
            Log::open(volume, tiny("log", 1)).unwrap()
        };
        let mut epoch = 0;
        for life in 0..4 {
            let (mut log, report) = open();
            assert_eq!(report.epoch_max, epoch);
            let newest = log.iter(Lsn(0)).map(|r| r.unwrap().header.epoch).last();
            assert_eq!(newest.unwrap_or(0), epoch, "life {life}");
            let handle = log.sync_handle();
            for _ in 0..500 {
                epoch += 1;
                append(&mut log, epoch, &[epoch as u8; 300]);
                handle.sync(log.end()).unwrap();
                handle.prepare().unwrap();
                log.recycle(Lsn(log.durable().0.saturating_sub(20 << 10)));
            }
            assert_eq!(log.stalls(), 0);
        }
        let files = std::fs::read_dir(dir.path()).unwrap().filter(|f| {
            f.as_ref()
                .unwrap()
                .path()
                .extension()
                .is_some_and(|e| e == "seg")
        });
        assert!(files.count() <= 4, "segments are used again");
    }
}

#[test]
fn segments_that_are_not_ours_are_refused_by_name() {
    let dir = TempDir::new("refuse");
    fill(dir.path(), 10);
    let path = dir.path().join("log-00000.seg");
    let good = std::fs::read(&path).unwrap();
    let open = || Log::open(volume(dir.path()), tiny("log", 1)).map(|_| ());
    let restore = || std::fs::write(&path, &good).unwrap();

    for len in [0, 100, 4096, 8192, TINY_SEGMENT + 4096] {
        std::fs::File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(len)
            .unwrap();
        assert!(
            matches!(open(), Err(OpenError::Length { found, .. }) if found == len),
            "{len}: {:?}",
            open()
        );
        restore();
    }
    let other = LogIdentity {
        storage: STORAGE + 1,
        number: 1,
    };
    let opened = Log::open(
        volume(dir.path()),
        lowtide_engine::log::LogConfig {
            identity: other,
            ..tiny("log", 1)
        },
    );
    assert!(matches!(
        opened,
        Err(OpenError::Foreign { found: Some(_), .. })
    ));

    std::fs::write(&path, vec![b'x'; TINY_SEGMENT as usize]).unwrap();
    assert!(matches!(
        open(),
        Err(OpenError::Foreign { found: None, .. })
    ));
    restore();

    let file = std::fs::File::options().write(true).open(&path).unwrap();
    for version in [0u32, 1, 77] {
        file.write_all_at(&version.to_le_bytes(), 8).unwrap();
        assert!(matches!(open(), Err(OpenError::Version { found, .. }) if found == version));
        restore();
    }

    std::fs::copy(&path, dir.path().join("log-00007.seg")).unwrap();
    assert!(matches!(open(), Err(OpenError::Duplicate { .. })));
    std::fs::remove_file(dir.path().join("log-00007.seg")).unwrap();

    // A file whose creation was cut off is removed; the rest is untouched.
    let cut_off = dir.path().join("log-00009.seg.new");
    std::fs::write(&cut_off, b"half").unwrap();
    open().unwrap();
    assert!(!cut_off.exists());
}

#[test]
fn a_directory_has_one_holder_and_says_who() {
    let dir = TempDir::new("lock");
    let held = DirVolume::open(dir.path(), DirOptions::default()).unwrap();
    let second = DirVolume::open(dir.path(), DirOptions::default());
    assert!(
        matches!(second, Err(MediumError::InUse { pid: Some(pid), .. }) if pid == std::process::id())
    );
    drop(held);
    DirVolume::open(dir.path(), DirOptions::default()).unwrap();
}

#[test]
fn a_log_can_be_looked_at_while_it_is_held() {
    let dir = TempDir::new("inspect");
    let (mut log, _) = Log::open(volume(dir.path()), tiny("log", 1)).unwrap();
    for epoch in 1..=40 {
        append(&mut log, epoch, &[epoch as u8; 600]);
        log.sync_handle().prepare().unwrap();
    }
    // What is not durable yet is not in the files.
    log.sync_handle().sync(log.end()).unwrap();
    let entries: Vec<_> = inspect(dir.path()).unwrap().map(|e| e.unwrap()).collect();
    let epochs: Vec<u64> = entries
        .iter()
        .filter_map(|e| match e {
            Entry::Record {
                header,
                body: Some(_),
                ..
            } if header.kind == 1 => Some(header.epoch),
            _ => None,
        })
        .collect();
    assert_eq!(epochs, (1..=40).collect::<Vec<_>>());
    let ends = entries.iter().filter_map(|e| match e {
        Entry::End { verdict, .. } => Some(*verdict),
        _ => None,
    });
    let ends: Vec<_> = ends.collect();
    assert!(
        ends.contains(&Verdict::Sealed) && ends.contains(&Verdict::Unwritten),
        "{ends:?}"
    );
    let one = inspect(dir.path().join("log-00001.seg")).unwrap();
    assert!(one.count() < entries.len());
    // The scan proper, without the lock and without changing a byte.
    let before = std::fs::read(dir.path().join("log-00000.seg")).unwrap();
    let looking = Arc::new(DirVolume::inspect(dir.path()));
    let scanned = Scanned::scan(looking, tiny("log", 1), Arc::new(Poison::default())).unwrap();
    assert_eq!(scanned.report().end, log.end());
    assert_eq!(
        std::fs::read(dir.path().join("log-00000.seg")).unwrap(),
        before
    );
}

/// 1 GiB through a log of four default-sized segments.
#[test]
fn a_gibibyte_goes_round_in_default_segments() {
    let dir = TempDir::new("gib");
    let identity = LogIdentity {
        storage: STORAGE,
        number: 1,
    };
    let config = lowtide_engine::log::LogConfig {
        segments_max: 4,
        ..lowtide_engine::log::LogConfig::new("log", identity)
    };
    let (mut log, _) = Log::open(volume(dir.path()), config.clone()).unwrap();
    let handle = log.sync_handle();
    let body = vec![0x5a; 512 << 10];
    let mut epoch = 0;
    while log.end().0 < (1 << 30) + (192 << 20) {
        epoch += 1;
        append(&mut log, epoch, &body);
        if epoch.is_multiple_of(32) {
            handle.sync(log.end()).unwrap();
            handle.prepare().unwrap();
            log.recycle(Lsn(log.durable().0 - (32 << 20)));
        }
    }
    handle.sync(log.end()).unwrap();
    let end = log.end();
    drop(log);
    drop(handle);
    let (log, report) = Log::open(volume(dir.path()), config).unwrap();
    assert_eq!((report.end, report.epoch_max), (end, epoch));
    assert!(log.iter(Lsn(0)).all(|r| r.unwrap().body == body));
}

// Full disks and read-only directories.

/// A small file system of its own, if this process may mount one.
struct Tmpfs(TempDir);

impl Tmpfs {
    fn mount(bytes: u64) -> Option<Tmpfs> {
        let dir = TempDir::new("tmpfs");
        let options = format!("size={bytes}");
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(
            Some("tmpfs"),
            dir.path(),
            Some("tmpfs"),
            flags,
            Some(&options[..]),
        )
        .ok()?;
        Some(Tmpfs(dir))
    }

    fn read_only(&self) {
        let flags = nix::mount::MsFlags::MS_REMOUNT | nix::mount::MsFlags::MS_RDONLY;
        nix::mount::mount(
            Some("tmpfs"),
            self.0.path(),
            Some("tmpfs"),
            flags,
            None::<&str>,
        )
        .unwrap();
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

/// Runs a log into a limit set from outside: reservations are refused, what was promised fits, and
/// a restart finds all of it.
fn run_full(dir: &Path) {
    let mut config = tiny("log", 1);
    config.segment_bytes = 256 << 10;
    config.segments_max = 100;
    let (mut log, _) = Log::open(volume(dir), config.clone()).unwrap();
    let handle = log.sync_handle();
    let mut epoch = 0;
    loop {
        match log.reserve(800) {
            Ok(space) => {
                epoch += 1;
                let parts: &[&[u8]] = &[&[epoch as u8; 800]];
                let a = Append {
                    kind: 1,
                    flags: 0,
                    epoch,
                    group: 1,
                    parts,
                };
                log.append_reserved(a, space).unwrap();
                handle.sync(log.end()).unwrap();
                handle.prepare().unwrap();
            }
            Err(ReserveError::HighWater { .. }) => handle.prepare().unwrap(),
            Err(ReserveError::DiskFull { .. }) => break,
            Err(e) => panic!("{e}"),
        }
    }
    assert!(epoch > 500, "{epoch}");
    drop(log);
    drop(handle);
    let (mut log, _) = Log::open(volume(dir), config).unwrap();
    assert_eq!(log.iter(Lsn(0)).count() as u64, epoch);
    // Recycling makes room without asking the disk.
    assert!(log.recycle(log.durable()) > 0);
    assert!(log.reserve(800).is_ok());
}

#[test]
fn a_full_file_system_refuses_new_reservations_only() {
    let Some(tmpfs) = Tmpfs::mount(2 << 20) else {
        println!("skipped: this process may not mount a tmpfs");
        return;
    };
    run_full(tmpfs.0.path());
    // Not even a first segment: refused at opening, and nothing is left behind.
    let Some(tmpfs) = Tmpfs::mount(100 << 10) else {
        return;
    };
    let mut config = tiny("log", 1);
    config.segment_bytes = 256 << 10;
    let opened = Log::open(volume(tmpfs.0.path()), config).map(|_| ());
    assert!(
        matches!(opened, Err(OpenError::Medium(MediumError::NoSpace { .. }))),
        "{opened:?}"
    );
    assert_eq!(volume(tmpfs.0.path()).list().unwrap(), ["LOCK"]);
}

#[test]
fn a_read_only_directory_is_an_error_not_a_crash() {
    let is_error = |dir: &Path| {
        let opened = DirVolume::open(dir, DirOptions::default());
        assert!(matches!(opened, Err(MediumError::Io { .. })), "{opened:?}");
    };
    if let Some(tmpfs) = Tmpfs::mount(1 << 20) {
        fill(tmpfs.0.path(), 5);
        tmpfs.read_only();
        is_error(tmpfs.0.path());
        // Looking is possible.
        assert!(inspect(tmpfs.0.path()).unwrap().count() > 5);
    } else {
        let dir = TempDir::new("readonly");
        fill(dir.path(), 5);
        std::fs::remove_file(dir.path().join("LOCK")).unwrap();
        let mode = |m| std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(m)).unwrap();
        mode(0o555);
        is_error(dir.path());
        mode(0o755);
    }
}

// Children: this program again, running one of the ignored tests below.

fn child(test: &str, dir: &Path, prelude: &str) -> std::process::Output {
    let exe = std::env::current_exe().unwrap();
    Command::new("sh")
        .arg("-c")
        .arg(format!(
            "{prelude} exec \"$0\" --exact --ignored --nocapture {test}"
        ))
        .arg(exe)
        .env("LOWTIDE_TEST_DIR", dir)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn child_dir() -> std::path::PathBuf {
    std::env::var_os("LOWTIDE_TEST_DIR")
        .expect("run by another test")
        .into()
}

#[test]
fn a_file_size_limit_is_like_a_full_disk() {
    let dir = TempDir::new("fsize");
    // 512-byte blocks: a segment of 256 KiB fits, one of 512 KiB does not.
    let output = child(
        "child_meets_a_file_size_limit",
        dir.path(),
        "trap '' XFSZ; ulimit -f 600;",
    );
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
#[ignore = "run as a child process by a_file_size_limit_is_like_a_full_disk"]
fn child_meets_a_file_size_limit() {
    let dir = child_dir();
    fill(&dir.join("small"), 5);
    let mut config = tiny("log", 1);
    config.segment_bytes = 512 << 10;
    let opened = Log::open(volume(&dir.join("large")), config).map(|_| ());
    assert!(
        matches!(opened, Err(OpenError::Medium(MediumError::NoSpace { .. }))),
        "{opened:?}"
    );
}

#[test]
fn sigbus_says_one_line_and_aborts() {
    let dir = TempDir::new("sigbus");
    let output = child("child_reads_beyond_the_end_of_its_file", dir.path(), "");
    assert_eq!(
        output.status.signal(),
        Some(nix::sys::signal::Signal::SIGABRT as i32)
    );
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(stderr.matches("lowtide: SIGBUS").count(), 1, "{stderr}");
}

#[test]
#[ignore = "run as a child process by sigbus_says_one_line_and_aborts; dies"]
fn child_reads_beyond_the_end_of_its_file() {
    let dir = child_dir();
    let volume = volume(&dir);
    let medium = volume.create("f", 16384, Access::Mapped).unwrap();
    medium.store(8192, b"fine").unwrap();
    // Somebody does what nobody may do.
    std::fs::File::options()
        .write(true)
        .open(dir.join("f"))
        .unwrap()
        .set_len(4096)
        .unwrap();
    let _ = medium.read(12288, &mut [0; 9]);
}

/// Bytes of pages that this thread made dirty, as the kernel counts them; 0 on a file system in
/// memory.
fn dirtied_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/io").unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix("write_bytes: "));
    line.unwrap().parse().unwrap()
}

#[test]
fn a_small_store_to_a_mapped_file_is_a_small_write() {
    const LEN: u64 = 4 << 20;
    let dir = TempDir::new("amplify");
    let check = |medium: &dyn lowtide_engine::medium::Medium, what: &str| {
        for page in 0..16u64 {
            let before = dirtied_bytes();
            medium.store(page * 20 * 4096, &[1; 64]).unwrap();
            medium
                .sync(page * 20 * 4096..page * 20 * 4096 + 64)
                .unwrap();
            let dirtied = dirtied_bytes() - before;
            assert!(
                dirtied <= 16 << 10,
                "{what}: 64 B stored dirtied {dirtied} B"
            );
        }
    };
    let volume = DirVolume::open(dir.path(), DirOptions::default()).unwrap();
    let created = volume.create("m", LEN, Access::Mapped).unwrap();
    check(&*created, "a new file");
    drop(created);
    // As after a reboot: nothing of the file is in memory.
    let file = std::fs::File::open(dir.path().join("m")).unwrap();
    let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
    nix::fcntl::posix_fadvise(&file, 0, 0, advice).unwrap();
    let opened = volume.open("m", Access::Mapped).unwrap();
    check(&*opened, "a file read back");
}

/// Nothing is committed while there is no room, so growth must not wait for a commit.
#[test]
fn a_log_grows_while_nothing_is_committed() {
    let dir = TempDir::new("grows");
    let config = SetConfig {
        storage: STORAGE,
        shards: 1,
        shard: LogConfig {
            segments_max: 9,
            ..tiny("", 0)
        },
        must_reach: Vec::new(),
        was_opened: false,
    };
    let (set, _) = LogSet::open(volume(dir.path()), &config).unwrap();
    let (mut shards, committer) = set.start(|_| {}).unwrap();
    let log = &mut shards[0].log;
    // Six segments, since each keeps pages for itself; a log begins with two or three.
    let wanted = 4 * TINY_SEGMENT;
    let until = Instant::now() + Duration::from_secs(20);
    while let Err(error) = log.reserve(wanted) {
        let is_growing = matches!(error, ReserveError::HighWater { .. });
        assert!(is_growing && Instant::now() < until, "{error}");
        // As a shard does: it looks again, nobody tells it.
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(shards);
    committer.stop();
}
