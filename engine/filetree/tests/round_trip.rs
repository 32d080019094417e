//! Directories go into a tree and come out the same; what cannot is named.

mod common;

use std::fs;
use std::time::SystemTime;

use common::{assert_same, life, noise, placement, sample, session, set_mtime};
use lowtide_filetree::Progress;
use lowtide_filetree::compare::{CompareOptions, CompareReport, compare};
use lowtide_filetree::fetch::{FetchError, FetchOptions, fetch};
use lowtide_filetree::local::LocalTree;
use lowtide_filetree::store::{StoreOptions, StoreReport, store};
use lowtide_filetree::tree::Tree;
use tempfile::TempDir;

fn stored(session: &LocalTree, input: &TempDir) -> StoreReport {
    let tree = Tree::open(session).unwrap();
    store(
        &tree,
        input.path(),
        &StoreOptions::default(),
        &Progress::default(),
    )
    .unwrap()
}

fn compared(session: &LocalTree, input: &TempDir, since: Option<SystemTime>) -> CompareReport {
    let tree = Tree::open(session).unwrap();
    let options = CompareOptions {
        since,
        ..CompareOptions::default()
    };
    compare(&tree, input.path(), &options, &Progress::default()).unwrap()
}

#[test]
fn everything_a_tree_can_hold_comes_out_as_it_went_in() {
    let (input, output) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    sample(input.path());
    for (meta, object, chunk_log2) in [(1, 1, 18), (2, 2, 12), (3, 5, 16)] {
        let session = LocalTree::new(placement(meta, object), life(201, 1));
        let tree = Tree::with_chunk_log2(&session, chunk_log2).unwrap();
        let progress = Progress::default();
        let report = store(&tree, input.path(), &StoreOptions::default(), &progress).unwrap();
        assert!(report.unreadable.is_empty() && report.changed.is_empty());
        assert_eq!((report.files, report.symlinks, report.links), (310, 3, 4));
        assert_eq!(report.directories, 6);
        // 310 files, 3 symlinks, 4 links, 6 directories below the top, and the top.
        assert_eq!(progress.entries(), 324);

        let report = compared(&session, &input, None);
        assert_eq!(report.mismatches.list, vec![]);
        assert_eq!(report.entries, 324);

        let to = output.path().join(format!("{meta}-{object}"));
        let report = fetch(&tree, &to, &FetchOptions::default(), &Progress::default()).unwrap();
        assert!(report.damaged.is_empty());
        assert_eq!((report.files, report.symlinks, report.links), (310, 3, 4));
        assert_same(input.path(), &to);
    }
}

#[test]
fn storing_again_changes_nothing() {
    let input = TempDir::new().unwrap();
    sample(input.path());
    let session = session();
    stored(&session, &input);
    let before = session.objects().clone();
    let again = stored(&session.share(life(201, 2)), &input);
    assert_eq!((again.files, again.directories, again.symlinks), (0, 0, 0));
    assert_eq!(again.bytes, 0);
    assert!(*session.objects() == before);
}

#[test]
fn what_has_changed_is_replaced() {
    let input = TempDir::new().unwrap();
    sample(input.path());
    let session = session();
    stored(&session, &input);
    let top = input.path();
    fs::write(top.join("a/b/large"), noise(9, 12 * common::CHUNK)).unwrap();
    fs::write(top.join("a/b/chunk less one"), noise(9, 10)).unwrap();
    fs::write(top.join("a/b/zeros"), b"").unwrap();
    fs::remove_file(top.join("a/link")).unwrap();
    fs::create_dir(top.join("a/link")).unwrap();
    fs::write(top.join("a/link/inside"), b"in").unwrap();
    fs::remove_dir_all(top.join("a/b/c/d")).unwrap();
    fs::write(top.join("a/b/c/d"), b"was a directory").unwrap();
    fs::remove_file(top.join("one again")).unwrap();
    fs::write(top.join("one again"), b"1").unwrap();
    fs::remove_file(top.join("a/b/c/file 1")).unwrap();
    fs::hard_link(top.join("a/b/c/file 2"), top.join("a/b/c/file 1")).unwrap();
    set_mtime(&top.join("empty"), 77, 7);

    assert!(!compared(&session, &input, None).is_equal());
    stored(&session.share(life(201, 2)), &input);
    let report = compared(&session, &input, None);
    assert_eq!(report.mismatches.list, vec![]);
}

#[test]
fn compare_names_every_kind_of_difference() {
    let input = TempDir::new().unwrap();
    sample(input.path());
    let session = session();
    stored(&session, &input);
    let since = SystemTime::now() + std::time::Duration::from_secs(3600);
    let top = input.path();
    let one_byte = |path: &str| {
        let path = top.join(path);
        let meta = fs::metadata(&path).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        let at = bytes.len() / 2;
        bytes[at] ^= 1;
        fs::write(&path, bytes).unwrap();
        use std::os::unix::fs::MetadataExt;
        set_mtime(&path, meta.mtime(), meta.mtime_nsec());
    };
    one_byte("a/b/large");
    one_byte("a/b/c/file 100");
    one_byte("a/b/zeros");
    fs::write(top.join("a/b/chunk"), b"short").unwrap();
    fs::write(top.join("new"), b"new").unwrap();
    fs::remove_file(top.join("dangling")).unwrap();
    set_mtime(&top.join("a/b/c/file 5"), 1, 1);
    common::set_mode(&top.join("a/b/c/file 6"), 0o600);
    fs::hard_link(top.join("a/b/c/file 8"), top.join("empty/file 8")).unwrap();

    let report = compared(&session, &input, Some(since));
    let found: std::collections::BTreeMap<String, String> = report
        .mismatches
        .list
        .iter()
        .map(|n| (n.path.display().to_string(), n.what.clone()))
        .collect();
    let large = fs::metadata(top.join("a/b/large")).unwrap().len() / 2;
    let whole = common::CHUNK as u64;
    let chunk = large / whole * whole;
    for (path, what) in [
        ("a/b/large", format!("contents from byte {chunk} on")),
        ("a/b/c/file 100", "contents from byte 0 on".into()),
        ("a/b/zeros", format!("contents from byte {} on", 2 * whole)),
        ("a/b/chunk", "size".into()),
        ("new", "not in the tree".into()),
        ("dangling", "only in the tree".into()),
        ("a/b/c/file 5", "modification time".into()),
        ("a/b/c/file 6", "permissions".into()),
        ("empty/file 8", "not in the tree".into()),
    ] {
        assert_eq!(found.get(path), Some(&what), "{path} in {found:#?}");
    }
    // The directories whose entries changed have other modification times.
    assert_eq!(
        found.get(".").map(String::as_str),
        Some("modification time")
    );

    // All of it happened after a storing that began at the epoch: nothing is a mismatch.
    let report = compared(&session, &input, Some(SystemTime::UNIX_EPOCH));
    assert_eq!(report.mismatches.list, vec![]);
    assert!(report.changed.count >= 10);
}

#[test]
fn special_files_are_named_and_left_out() {
    let (input, output) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    fs::write(input.path().join("file"), b"x").unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        input.path().join("pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(input.path().join("socket")).unwrap();
    let session = session();
    let report = stored(&session, &input);
    assert_eq!((report.files, report.special.count), (1, 2));
    let report = compared(&session, &input, None);
    assert_eq!((report.mismatches.count, report.special.count), (0, 2));
    let to = output.path().join("to");
    let tree = Tree::open(&session).unwrap();
    fetch(&tree, &to, &FetchOptions::default(), &Progress::default()).unwrap();
    assert_eq!(fs::read_dir(&to).unwrap().count(), 1);
}

#[test]
fn a_target_that_is_not_empty_is_left_alone() {
    let output = TempDir::new().unwrap();
    fs::write(output.path().join("mine"), b"precious").unwrap();
    let session = session();
    let tree = Tree::open(&session).unwrap();
    let refused = fetch(
        &tree,
        output.path(),
        &FetchOptions::default(),
        &Progress::default(),
    );
    assert!(matches!(refused, Err(FetchError::NotEmpty { .. })));
    assert_eq!(fs::read(output.path().join("mine")).unwrap(), b"precious");
}

#[test]
fn damage_is_named_and_the_rest_comes_out() {
    let (input, output) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    sample(input.path());
    let session = session();
    stored(&session, &input);
    let tree = Tree::open(&session).unwrap();
    let large = tree.resolve(b"a/b/large").unwrap().ino;
    let layout = tree.layout();
    let lost = lowtide_filetree::layout::chunk_key(large, 3);
    let home = layout.chunk_home(large, 3);
    assert!(session.objects().remove(&(home, lost)).is_some());
    let to = output.path().join("to");
    let report = fetch(&tree, &to, &FetchOptions::default(), &Progress::default()).unwrap();
    assert_eq!(report.damaged.count, 2); // both names
    assert_eq!(report.files, 309);
    assert!(!to.join("a/b/large").exists() && !to.join("large again").exists());
    let report = compared(&session, &input, None);
    assert_eq!(report.mismatches.count, 2);
}

#[test]
fn a_file_that_changes_meanwhile_is_named_by_compare() {
    let input = TempDir::new().unwrap();
    fs::write(input.path().join("still"), b"x").unwrap();
    fs::write(input.path().join("busy"), b"before").unwrap();
    set_mtime(&input.path().join("still"), 1, 0);
    // Change times come from the kernel's coarse clock, which lags behind.
    let since = SystemTime::now() - std::time::Duration::from_millis(20);
    let session = session();
    stored(&session, &input);
    fs::write(input.path().join("busy"), b"after").unwrap();
    let report = compared(&session, &input, Some(since));
    assert_eq!(report.mismatches.count, 0);
    assert_eq!(report.changed.list[0].path, std::path::Path::new("busy"));
}

#[test]
fn a_deep_path_longer_than_a_system_call_takes_round_trips() {
    let (input, output) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let name = "d".repeat(200);
    let mut at = rustix::fs::open(
        input.path(),
        rustix::fs::OFlags::DIRECTORY,
        rustix::fs::Mode::empty(),
    )
    .unwrap();
    for _ in 0..30 {
        rustix::fs::mkdirat(&at, &name, rustix::fs::Mode::RWXU).unwrap();
        let flags = rustix::fs::OFlags::DIRECTORY;
        at = rustix::fs::openat(&at, &name, flags, rustix::fs::Mode::empty()).unwrap();
    }
    rustix::fs::symlinkat("leaf", &at, "leaf").unwrap();
    let session = session();
    let report = stored(&session, &input);
    assert_eq!((report.directories, report.symlinks), (30, 1));
    assert_eq!(compared(&session, &input, None).mismatches.list, vec![]);
    let to = output.path().join("to");
    let tree = Tree::open(&session).unwrap();
    let report = fetch(&tree, &to, &FetchOptions::default(), &Progress::default()).unwrap();
    assert_eq!((report.directories, report.symlinks), (31, 1));
}
