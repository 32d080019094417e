//! What the tests of the command share.
#![allow(dead_code)] // each test program uses its part

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

pub fn lowtide(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lowtide"));
    command.args(args);
    command
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

/// Some files of each kind.
pub fn make_input(dir: &Path, files: u32) {
    for i in 0..files {
        let sub = dir.join(format!("d{}", i % 10));
        fs::create_dir_all(&sub).unwrap();
        let contents = vec![i as u8; (i as usize * 977) % 50_000];
        fs::write(sub.join(format!("f{i}")), contents).unwrap();
    }
    fs::write(dir.join("large"), vec![0xa5; 3 << 20]).unwrap();
    fs::set_permissions(dir.join("large"), fs::Permissions::from_mode(0o640)).unwrap();
    symlink("d0/f0", dir.join("link")).unwrap();
    fs::hard_link(dir.join("large"), dir.join("d1/also-large")).unwrap();
    fs::create_dir(dir.join("empty")).unwrap();
}

pub fn check(output: &Output, status: i32) {
    assert_eq!(
        output.status.code(),
        Some(status),
        "{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

pub fn diff(a: &Path, b: &Path) {
    let output = Command::new("diff")
        .args(["-r", "--no-dereference"])
        .args([a, b])
        .output()
        .unwrap();
    check(&output, 0);
}

/// Processes of this state directory.
pub fn processes(state: &Path) -> BTreeSet<u32> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            line.contains("node.toml") && line.contains(text(state))
        })
        .collect()
}

pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A `run` that stays, once it says so; its output goes on to be read by a thread.
pub fn start_staying(input: &Path, state: &Path) -> Child {
    let mut child = lowtide(&["run", "--stay", "--clients", "1", "--input", text(input)])
        .args(["--state", text(state)])
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut seen = Vec::new();
    loop {
        let line = lines.next().expect("the run ended early").unwrap();
        let stays = line.contains("staying;");
        seen.push(line);
        if stays {
            break;
        }
        assert!(seen.len() < 1000, "{seen:?}");
    }
    std::thread::spawn(move || lines.for_each(drop));
    child
}
