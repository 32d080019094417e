//! What the tests share: sessions in memory, sample directories, and a walk of a directory that
//! uses nothing of the crate under test.
#![allow(dead_code)] // each test program uses its part

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use lowtide_engine_core::ids::{Incarnation, Life, NodeId};
use lowtide_engine_core::session::Placement;
use lowtide_filetree::local::LocalTree;

pub fn placement(meta: u32, object: u32) -> Placement {
    Placement {
        meta: (1..=meta).map(NodeId).collect(),
        object: (101..=100 + object).map(NodeId).collect(),
    }
}

pub fn life(node: u32, incarnation: u64) -> Life {
    Life {
        node: NodeId(node),
        incarnation: Incarnation(incarnation),
    }
}

pub fn session() -> LocalTree {
    LocalTree::new(placement(2, 2), life(201, 1))
}

/// Everything that tells two directory entries apart.
#[derive(Debug, PartialEq, Eq)]
pub struct Seen {
    pub mode: u32,
    pub owner: (u32, u32),
    pub mtime: (i64, i64),
    pub content: Vec<u8>,
    /// Smallest path of the same inode.
    pub same_as: PathBuf,
}

/// All entries below `top`, and `top` itself as the empty path.
pub fn walk(top: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut seen = BTreeMap::new();
    let mut stack = vec![PathBuf::new()];
    while let Some(path) = stack.pop() {
        let full = top.join(&path);
        let meta = fs::symlink_metadata(&full).unwrap();
        let content = if meta.is_dir() {
            for entry in fs::read_dir(&full).unwrap() {
                stack.push(path.join(entry.unwrap().file_name()));
            }
            Vec::new()
        } else if meta.is_symlink() {
            fs::read_link(&full).unwrap().into_os_string().into_vec()
        } else if meta.is_file() {
            fs::read(&full).unwrap()
        } else {
            continue;
        };
        let entry = Seen {
            mode: meta.mode(),
            owner: (meta.uid(), meta.gid()),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            content,
            same_as: path.clone(),
        };
        seen.insert(path, entry);
    }
    let mut first: BTreeMap<u64, PathBuf> = BTreeMap::new();
    for (path, entry) in &mut seen {
        let ino = fs::symlink_metadata(top.join(path)).unwrap().ino();
        entry.same_as = first.entry(ino).or_insert_with(|| path.clone()).clone();
    }
    seen
}

/// Fails with the first difference between two directories.
pub fn assert_same(left: &Path, right: &Path) {
    let (a, b) = (walk(left), walk(right));
    for (path, entry) in &a {
        assert_eq!(Some(entry), b.get(path), "{}", path.display());
    }
    assert_eq!(a.len(), b.len(), "only on the right: {:?}", b.keys());
    silent("diff", &["-r", "--no-dereference"], left, right);
    let (mut left, mut right) = (left.to_path_buf(), right.to_path_buf());
    left.push("");
    right.push("");
    silent(
        "rsync",
        &["-aHnc", "--delete", "--itemize-changes"],
        &left,
        &right,
    );
}

/// A program, where it is installed, finds no difference either.
fn silent(program: &str, arguments: &[&str], left: &Path, right: &Path) {
    let Ok(output) = Command::new(program)
        .args(arguments)
        .arg(left)
        .arg(right)
        .output()
    else {
        return;
    };
    // diff cannot read FIFOs; those are not in the tree and are told apart by name.
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(said, "", "{program}");
}

/// Bytes that look random and depend on `seed` alone.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

pub fn set_mtime(path: &Path, sec: i64, nsec: i64) {
    let time = rustix::fs::Timespec {
        tv_sec: sec,
        tv_nsec: nsec,
    };
    let times = rustix::fs::Timestamps {
        last_access: time,
        last_modification: time,
    };
    let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, flags).unwrap();
}

pub fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Bytes of a chunk.
pub const CHUNK: usize = 1 << lowtide_filetree::layout::CHUNK_LOG2_DEFAULT;

/// A directory with one of everything that a tree can hold.
pub fn sample(top: &Path) {
    let dir = |name: &str| fs::create_dir_all(top.join(name)).unwrap();
    let file = |name: &str, bytes: &[u8]| fs::write(top.join(name), bytes).unwrap();
    dir("empty");
    dir("a/b/c/d/e");
    file("a/zero", b"");
    file("a/one", b"1");
    file("a/b/chunk less one", &noise(1, CHUNK - 1));
    file("a/b/chunk", &noise(2, CHUNK));
    file("a/b/chunk and one", &noise(3, CHUNK + 1));
    file("a/b/large", &noise(4, 20 * CHUNK));
    file("a/b/zeros", &vec![0; 4 * CHUNK]);
    let mut holes = vec![0; 3 * CHUNK + CHUNK / 2];
    holes[CHUNK + 300_000..CHUNK + 300_100].fill(7);
    file("a/b/mostly zeros", &holes);
    for i in 0..300 {
        file(
            &format!("a/b/c/file {i}"),
            &noise(i, (i * 37 % 9000) as usize),
        );
    }
    symlink("one", top.join("a/link")).unwrap();
    symlink("/nonexistent/\u{fc}", top.join("dangling")).unwrap();
    symlink("x".repeat(4000), top.join("long link")).unwrap();
    let raw = std::ffi::OsStr::from_bytes(b"\xff\xfe not utf-8 \x01\n");
    fs::write(top.join(raw), b"bytes").unwrap();
    fs::write(top.join("n".repeat(255)), b"long name").unwrap();
    fs::hard_link(top.join("a/one"), top.join("one again")).unwrap();
    fs::hard_link(top.join("a/one"), top.join("a/b/c/one more")).unwrap();
    fs::hard_link(top.join("a/b/large"), top.join("large again")).unwrap();
    fs::hard_link(top.join("a/zero"), top.join("empty/zero again")).unwrap();

    set_mtime(&top.join("a/link"), 1_000_000_000, 123_456_789);
    set_mtime(&top.join("a/one"), -86_400, 1);
    set_mtime(&top.join("a/b/chunk"), 4_000_000_000, 999_999_999);
    set_mode(&top.join("a/zero"), 0o000);
    set_mode(&top.join("a/b/chunk"), 0o4755);
    set_mode(&top.join("a/b/c/file 7"), 0o2711);
    set_mode(&top.join("empty"), 0o1777);
    set_mode(&top.join("a/b/c"), 0o555);
    set_mtime(&top.join("a/b/c"), 1_234_567_890, 42);
    set_mtime(top, 1_600_000_000, 5);
}
