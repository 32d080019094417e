//! The operations one by one: what they do, what they refuse, and that the tree stays whole.

mod common;

use common::{life, noise, session};
use lowtide_filetree::TreeError;
use lowtide_filetree::check::check;
use lowtide_filetree::layout::{self, Attributes, Ino, Kind};
use lowtide_filetree::local::LocalTree;
use lowtide_filetree::tree::{AttributeChange, Tree};
use std::io::{self, Read};

const A: Attributes = Attributes {
    mode: 0o644,
    uid: 5,
    gid: 6,
    mtime_sec: -1,
    mtime_nsec: 999_999_999,
};
const ROOT: Ino = Ino::ROOT;

fn file(tree: &Tree<'_, LocalTree>, dir: Ino, name: &[u8], content: &[u8]) -> Ino {
    tree.create(dir, name, &A, &mut &content[..]).unwrap()
}

fn content(tree: &Tree<'_, LocalTree>, ino: Ino) -> Vec<u8> {
    let mut bytes = Vec::new();
    tree.read(ino).unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}

fn names(tree: &Tree<'_, LocalTree>, dir: Ino) -> Vec<Vec<u8>> {
    let page = tree.readdir(dir, None, 1000).unwrap();
    assert!(page.next.is_none());
    let mut names: Vec<_> = page.entries.into_iter().map(|e| e.name).collect();
    names.sort();
    names
}

fn assert_whole(tree: &Tree<'_, LocalTree>) {
    let report = check(tree).unwrap();
    assert_eq!(report.findings, vec![]);
    assert_eq!((report.unfinished, report.unfreed), (vec![], vec![]));
}

#[test]
fn what_is_created_can_be_looked_up_and_read() {
    let s = session();
    let tree = Tree::with_chunk_log2(&s, 12).unwrap();
    let dir = tree.mkdir(ROOT, b"dir", &A).unwrap();
    for size in [0, 1, 4095, 4096, 4097, 8192, 1 << 20, (2 << 20) + 7] {
        let name = format!("{size}");
        let bytes = noise(size as u64, size);
        let ino = file(&tree, dir, name.as_bytes(), &bytes);
        assert_eq!(content(&tree, ino), bytes, "{size}");
        let stat = tree.stat(ino).unwrap();
        assert_eq!((stat.inode.size, stat.count), (size as u64, 1));
        assert_eq!((stat.inode.attributes, stat.inode.kind), (A, Kind::File));
    }
    let link = tree.symlink(dir, b"link", b"to/somewhere", &A).unwrap();
    assert_eq!(tree.stat(link).unwrap().inode.target, b"to/somewhere");
    assert_eq!(tree.resolve(b"/dir//./link").unwrap().ino, link);
    assert_eq!(tree.stat(dir).unwrap().count, 9);
    assert_eq!(tree.parent(dir).unwrap(), ROOT);
    assert_whole(&tree);
}

#[test]
fn refusals_are_typed() {
    let s = session();
    let tree = Tree::open(&s).unwrap();
    let dir = tree.mkdir(ROOT, b"dir", &A).unwrap();
    let f = file(&tree, ROOT, b"file", b"x");
    let nobody = Ino::new(12345).unwrap();
    use TreeError::*;
    macro_rules! refused {
        ($call:expr, $error:pat) => {{
            let outcome = $call;
            assert!(matches!(outcome, Err($error)), "{:?}", outcome.err());
        }};
    }
    refused!(tree.mkdir(ROOT, b"dir", &A), Exists);
    refused!(tree.mkdir(f, b"x", &A), NotADirectory);
    refused!(tree.mkdir(nobody, b"x", &A), NotFound);
    refused!(tree.mkdir(ROOT, b"a/b", &A), InvalidName);
    refused!(tree.create(ROOT, b"dir", &A, &mut &b"x"[..]), Exists);
    refused!(tree.create(f, b"x", &A, &mut &b"x"[..]), NotADirectory);
    refused!(tree.replace(ROOT, b"dir", &A, &mut &b"x"[..]), IsADirectory);
    refused!(tree.symlink(ROOT, b"s", b"", &A), InvalidTarget);
    refused!(tree.symlink(ROOT, b"s", b"a\0b", &A), InvalidTarget);
    refused!(tree.symlink(ROOT, b"s", &[b'x'; 4096], &A), InvalidTarget);
    refused!(tree.link(dir, ROOT, b"l"), IsADirectory);
    refused!(tree.link(nobody, ROOT, b"l"), NotFound);
    refused!(tree.link(f, ROOT, b"dir"), Exists);
    refused!(tree.unlink(ROOT, b"dir"), IsADirectory);
    refused!(tree.unlink(ROOT, b"none"), NotFound);
    refused!(tree.rmdir(ROOT, b"file"), NotADirectory);
    refused!(tree.rmdir(ROOT, b"none"), NotFound);
    refused!(tree.readdir(f, None, 10), NotADirectory);
    refused!(tree.readdir(nobody, None, 10), NotFound);
    refused!(tree.read(dir), NotAFile);
    refused!(tree.write(f, 2, &mut &b"x"[..]), BeyondEnd);
    refused!(tree.lookup(ROOT, b".."), InvalidName);
    let bad = AttributeChange {
        mode: Some(0o10000),
        ..AttributeChange::default()
    };
    refused!(tree.set_attributes(f, &bad), InvalidAttribute);
    file(&tree, dir, b"inside", b"");
    refused!(tree.rmdir(ROOT, b"dir"), NotEmpty);
    assert_whole(&tree);
}

#[test]
fn an_inode_lives_as_long_as_one_of_its_names() {
    let s = session();
    let tree = Tree::open(&s).unwrap();
    let dir = tree.mkdir(ROOT, b"dir", &A).unwrap();
    let f = file(&tree, ROOT, b"one", b"contents");
    tree.link(f, dir, b"two").unwrap();
    tree.link(f, dir, b"three").unwrap();
    assert_eq!(tree.stat(f).unwrap().count, 3);
    tree.unlink(ROOT, b"one").unwrap();
    tree.unlink(dir, b"three").unwrap();
    assert_eq!(tree.stat(f).unwrap().count, 1);
    assert_eq!(content(&tree, f), b"contents");
    assert_whole(&tree);
    tree.unlink(dir, b"two").unwrap();
    assert!(matches!(tree.stat(f), Err(TreeError::NotFound)));
    assert!(matches!(tree.link(f, ROOT, b"x"), Err(TreeError::NotFound)));
    assert_whole(&tree);
    tree.rmdir(ROOT, b"dir").unwrap();
    assert_eq!(check(&tree).unwrap().inodes, 1);
    // Of the tree only the root's three objects are left, and the note that `dir` is removed.
    assert_eq!(s.objects().len(), 4);
    let late = [
        tree.mkdir(dir, b"x", &A),
        tree.create(dir, b"x", &A, &mut &b"x"[..]),
        tree.create(dir, b"x", &A, &mut &noise(1, 1 << 20)[..]),
        tree.replace(dir, b"x", &A, &mut &b"x"[..]),
    ];
    for outcome in late {
        assert!(matches!(outcome, Err(TreeError::NotFound)), "{outcome:?}");
    }
    let f = file(&tree, ROOT, b"f", b"f");
    let late = [
        tree.link(f, dir, b"x"),
        tree.rename((ROOT, b"f"), (dir, b"x")),
    ];
    for outcome in late {
        assert!(matches!(outcome, Err(TreeError::NotFound)), "{outcome:?}");
    }
    let gone = tree.readdir(dir, None, 10);
    assert!(matches!(gone, Err(TreeError::NotFound)));
    assert_whole(&tree);
}

#[test]
fn rename_replaces_as_posix_says() {
    let s = session();
    let tree = Tree::open(&s).unwrap();
    let (a, b) = (
        tree.mkdir(ROOT, b"a", &A).unwrap(),
        tree.mkdir(ROOT, b"b", &A).unwrap(),
    );
    let f = file(&tree, a, b"f", b"f");
    let g = file(&tree, b, b"g", b"g");
    tree.rename((a, b"f"), (a, b"f2")).unwrap();
    assert_eq!(names(&tree, a), [b"f2"]);
    tree.rename((a, b"f2"), (b, b"g")).unwrap();
    assert!(matches!(tree.stat(g), Err(TreeError::NotFound)));
    assert_eq!(tree.lookup(b, b"g").unwrap().ino, f);
    assert_eq!(names(&tree, a), Vec::<Vec<u8>>::new());
    assert_whole(&tree);

    // Two names of one inode stay.
    tree.link(f, a, b"h").unwrap();
    tree.rename((a, b"h"), (b, b"g")).unwrap();
    assert_eq!(tree.stat(f).unwrap().count, 2);
    tree.rename((b, b"g"), (b, b"g")).unwrap();
    assert_whole(&tree);

    // Directories: into an empty one, not into one with entries, not below itself.
    let c = tree.mkdir(a, b"c", &A).unwrap();
    let d = tree.mkdir(c, b"d", &A).unwrap();
    let into_itself = [
        tree.rename((ROOT, b"a"), (d, b"x")),
        tree.rename((a, b"c"), (d, b"x")),
        tree.rename((a, b"c"), (c, b"x")),
    ];
    for outcome in into_itself {
        assert!(matches!(outcome, Err(TreeError::IntoItself)), "{outcome:?}");
    }
    let full = tree.rename((ROOT, b"b"), (a, b"c"));
    assert!(matches!(full, Err(TreeError::NotEmpty)));
    tree.rename((a, b"c"), (b, b"c2")).unwrap();
    assert_eq!(tree.parent(c).unwrap(), b);
    let e = tree.mkdir(a, b"e", &A).unwrap();
    tree.rename((b, b"c2"), (a, b"e")).unwrap();
    assert!(matches!(tree.stat(e), Err(TreeError::NotFound)));
    assert_eq!(tree.lookup(a, b"e").unwrap().ino, c);
    assert!(matches!(
        tree.rename((a, b"e"), (a, b"h")),
        Err(TreeError::NotADirectory)
    ));
    assert!(matches!(
        tree.rename((a, b"h"), (a, b"e")),
        Err(TreeError::IsADirectory)
    ));
    assert!(matches!(
        tree.rename((a, b"none"), (a, b"e")),
        Err(TreeError::NotFound)
    ));
    assert_whole(&tree);
}

#[test]
fn writing_changes_bytes_in_place_and_grows() {
    let s = session();
    let tree = Tree::with_chunk_log2(&s, 12).unwrap();
    let mut model = noise(1, 10_000);
    let f = file(&tree, ROOT, b"f", &model);
    for (offset, length) in [
        (0, 1),
        (4090, 20),
        (4096, 4096),
        (9_999, 1),
        (10_000, 9000),
        (5, 0),
    ] {
        let bytes = noise(offset as u64 + 77, length);
        let written = tree.write(f, offset as u64, &mut &bytes[..]).unwrap();
        assert_eq!(written, length as u64);
        model.resize(model.len().max(offset + length), 0);
        model[offset..offset + length].copy_from_slice(&bytes);
        assert_eq!(content(&tree, f), model);
        assert_whole(&tree);
    }
}

#[test]
fn large_files_are_freed_in_pieces() {
    let s = session();
    let tree = Tree::with_chunk_log2(&s, 12).unwrap();
    let f = file(&tree, ROOT, b"f", &noise(3, 1_000_000));
    let before = s.objects().len();
    assert!(before > 245);
    tree.replace(ROOT, b"f", &A, &mut &b"small"[..]).unwrap();
    assert!(matches!(tree.stat(f), Err(TreeError::NotFound)));
    assert_whole(&tree);
    tree.replace(ROOT, b"f", &A, &mut &noise(4, 1_000_000)[..])
        .unwrap();
    file(&tree, ROOT, b"g", &noise(5, 1_000_000));
    tree.rename((ROOT, b"g"), (ROOT, b"f")).unwrap();
    assert_whole(&tree);
    tree.unlink(ROOT, b"f").unwrap();
    assert_eq!(s.objects().len(), 3);
}

#[test]
fn an_input_that_fails_leaves_nothing_behind() {
    struct Failing(usize);
    impl Read for Failing {
        fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
            if self.0 == 0 {
                return Err(io::Error::other("gone"));
            }
            let n = self.0.min(to.len());
            to[..n].fill(1);
            self.0 -= n;
            Ok(n)
        }
    }
    let s = session();
    let tree = Tree::with_chunk_log2(&s, 12).unwrap();
    let old = file(&tree, ROOT, b"old", b"old");
    for size in [0, 100, 10_000, 500_000] {
        let failed = tree.create(ROOT, b"new", &A, &mut Failing(size));
        assert!(matches!(failed, Err(TreeError::Input(_))));
        let failed = tree.replace(ROOT, b"old", &A, &mut Failing(size));
        assert!(matches!(failed, Err(TreeError::Input(_))));
        assert_whole(&tree);
    }
    assert_eq!(content(&tree, old), b"old");
    assert_eq!(names(&tree, ROOT), [b"old"]);
}

#[test]
fn an_upload_that_was_overtaken_leaves_nothing_behind() {
    /// Somebody who takes the writer for dead while it reads its input.
    struct Impatient<'t>(&'t Tree<'t, LocalTree>, usize);
    impl Read for Impatient<'_> {
        fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
            self.1 += to.len();
            if self.1 > 3_000_000 {
                return Ok(0);
            }
            self.0.abandon(ROOT, b"f").unwrap();
            to.fill(1);
            Ok(to.len())
        }
    }
    let s = session();
    let other = s.share(life(202, 1));
    let tree = Tree::with_chunk_log2(&s, 12).unwrap();
    let impatient = Tree::open(&other).unwrap();
    let outcome = tree.create(ROOT, b"f", &A, &mut Impatient(&impatient, 0));
    assert!(matches!(outcome, Err(TreeError::Contended)), "{outcome:?}");
    assert_whole(&tree);
    assert_eq!(s.objects().len(), 3);
}

#[test]
fn remove_all_takes_everything_below() {
    let s = session();
    let tree = Tree::with_chunk_log2(&s, 12).unwrap();
    let top = tree.mkdir(ROOT, b"top", &A).unwrap();
    let kept = file(&tree, ROOT, b"kept", b"k");
    let mut at = top;
    for depth in 0..3000 {
        if depth % 100 == 0 {
            for i in 0..20 {
                file(&tree, at, format!("{i}").as_bytes(), &noise(i, 5000));
            }
            tree.link(kept, at, b"link").unwrap();
        }
        at = tree.mkdir(at, b"d", &A).unwrap();
    }
    tree.remove_all(ROOT, b"top").unwrap();
    tree.unlink(ROOT, b"kept").unwrap();
    // The root, and a note for each of 3001 directories.
    assert_eq!(s.objects().len(), 3 + 3001);
}

#[test]
fn a_later_tree_of_the_same_session_numbers_on() {
    let s = session();
    let mut inos = Vec::new();
    for round in 0..4 {
        let tree = Tree::open(&s).unwrap();
        for i in 0..5 {
            let name = format!("{round} {i}");
            inos.push(file(&tree, ROOT, name.as_bytes(), b"x"));
        }
    }
    let mut unique = inos.clone();
    unique.sort();
    unique.dedup();
    assert_eq!(unique, inos);
}

#[test]
fn a_hundred_thousand_entries_are_listed_in_bounded_pages() {
    const ENTRIES: usize = 100_000;
    let s = session();
    let tree = Tree::open(&s).unwrap();
    let dir = tree.mkdir(ROOT, b"dir", &A).unwrap();
    let first = file(&tree, dir, b"first", b"");
    for i in 1..ENTRIES {
        tree.link(first, dir, format!("{i}").as_bytes()).unwrap();
    }
    let mut seen = std::collections::BTreeSet::new();
    let mut cursor = None;
    let mut last = (0, Vec::new());
    loop {
        let page = tree.readdir(dir, cursor.as_ref(), 1000).unwrap();
        assert!(page.entries.len() <= 1000);
        for e in page.entries {
            let key = (layout::name_slot(&e.name), e.name.clone());
            assert!(key > last);
            last = key;
            assert!(seen.insert(e.name));
        }
        cursor = page.next;
        if cursor.is_none() {
            break;
        }
    }
    assert_eq!(seen.len(), ENTRIES);
    assert_eq!(tree.stat(dir).unwrap().count, ENTRIES as i64);
    assert_eq!(tree.stat(first).unwrap().count, ENTRIES as i64);
    assert_whole(&tree);
}

#[test]
fn concurrent_writers_lose_nothing() {
    let s = session();
    let tree = Tree::with_chunk_log2(&s, 12).unwrap();
    let f = file(&tree, ROOT, b"f", &[0; 4096]);
    std::thread::scope(|scope| {
        for writer in 0..4u64 {
            let other = s.share(life(900 + writer as u32, 1));
            scope.spawn(move || {
                let tree = Tree::with_chunk_log2(&other, 12).unwrap();
                for i in 0..200 {
                    tree.write(f, i * 4 + writer, &mut &[1][..]).unwrap();
                }
            });
        }
    });
    assert_eq!(&content(&tree, f)[..800], [1; 800]);
}
