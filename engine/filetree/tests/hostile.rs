//! Whatever the stores answer, nothing panics and nothing runs away.

mod common;

use std::fs;

use common::{noise, session};
use lowtide_engine_core::op::Bytes;
use lowtide_filetree::check::check;
use lowtide_filetree::compare::{CompareOptions, compare};
use lowtide_filetree::fetch::{FetchOptions, fetch};
use lowtide_filetree::layout::{
    Attributes, Chunk, Entry, Freeing, Ino, Inode, Kind, Parent, Pending,
};
use lowtide_filetree::store::{StoreOptions, store};
use lowtide_filetree::tree::Tree;
use lowtide_filetree::{Progress, TreeError};
use proptest::prelude::*;
use tempfile::TempDir;

fn decode_all(bytes: &[u8]) {
    if let Ok(entry) = Entry::decode(bytes) {
        assert_eq!(&*entry.encode(), bytes);
    }
    if let Ok(inode) = Inode::decode(bytes) {
        assert_eq!(&*inode.encode(), bytes);
        assert!(inode.chunks() == 0 || inode.chunk_len(inode.chunks() - 1) > 0);
        assert_eq!(inode.chunk_len(inode.chunks()), 0);
    }
    if let Ok(parent) = Parent::decode(bytes) {
        assert_eq!(&*parent.encode(), bytes);
    }
    if let Ok(pending) = Pending::decode(bytes) {
        assert_eq!(&*pending.encode(), bytes);
    }
    if let Ok(freeing) = Freeing::decode(bytes) {
        assert_eq!(&*freeing.encode(), bytes);
    }
    if let Ok(chunk) = Chunk::decode(&Bytes::from(bytes)) {
        assert_eq!(&*chunk.encode(), bytes);
        let mut copy = vec![1; chunk.len()];
        assert_eq!(chunk.copy_to(0, &mut copy), chunk.len());
        assert!(chunk.equals(&copy));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_values_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
        decode_all(&bytes);
    }

    #[test]
    fn nearly_right_values_never_panic(at in 0usize..60, to in any::<u8>(), cut in 0usize..60) {
        let attributes = Attributes { mode: 0o644, uid: 1, gid: 2, mtime_sec: 3, mtime_nsec: 4 };
        let ino = Ino::new(77).unwrap();
        let values = [
            Entry { ino, kind: Kind::File }.encode(),
            Inode { kind: Kind::File, attributes, size: 9, chunk_log2: 18, writes: 1, target: vec![] }.encode(),
            Inode { kind: Kind::Symlink, attributes, size: 3, chunk_log2: 0, writes: 0, target: b"abc".to_vec() }.encode(),
            Parent(ino).encode(),
            Freeing { chunks: 5 }.encode(),
            Chunk::new(b"contents").encode(),
            Chunk::new(&[0; 100]).encode(),
        ];
        for value in values {
            decode_all(&value);
            let mut value = value.to_vec();
            if let Some(byte) = value.get_mut(at) {
                *byte = to;
            }
            decode_all(&value);
            value.truncate(cut);
            decode_all(&value);
        }
    }

    #[test]
    fn encoded_inodes_decode_to_themselves(
        mode in 0u16..=0o7777, uid: u32, gid: u32, mtime_sec: i64,
        mtime_nsec in 0u32..1_000_000_000, size in 0u64..=i64::MAX as u64,
        chunk_log2 in 12u8..=22, target in proptest::collection::vec(1u8.., 1..100),
    ) {
        let attributes = Attributes { mode, uid, gid, mtime_sec, mtime_nsec };
        let file = Inode { kind: Kind::File, attributes, size, chunk_log2, writes: uid, target: vec![] };
        let link = Inode {
            kind: Kind::Symlink, attributes, size: target.len() as u64, chunk_log2: 0, writes: 0, target,
        };
        for inode in [file, link] {
            prop_assert_eq!(Inode::decode(&inode.encode()), Ok(inode));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(60) })]

    /// Objects of a stored tree are changed or lost at random; everything still ends, with errors
    /// or findings rather than panics, and what is fetched is what was stored.
    #[test]
    fn a_damaged_tree_is_survived(damage in proptest::collection::vec(
        (any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<Option<u8>>()), 1..6,
    )) {
        let (input, output) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        fs::create_dir_all(input.path().join("a/b")).unwrap();
        fs::write(input.path().join("a/b/f"), noise(1, 20_000)).unwrap();
        fs::write(input.path().join("a/g"), b"g").unwrap();
        fs::hard_link(input.path().join("a/g"), input.path().join("h")).unwrap();
        std::os::unix::fs::symlink("g", input.path().join("a/s")).unwrap();
        let session = session();
        let tree = Tree::with_chunk_log2(&session, 12).unwrap();
        let progress = Progress::default();
        store(&tree, input.path(), &StoreOptions::default(), &progress).unwrap();
        {
            let mut objects = session.objects();
            for (which, at, to) in damage {
                let keys: Vec<_> = objects.keys().cloned().collect();
                let key = which.get(&keys).clone();
                match to {
                    None => {
                        objects.remove(&key);
                    }
                    Some(to) => {
                        let mut value = objects[&key].to_vec();
                        if !value.is_empty() {
                            let at = at.index(value.len());
                            value[at] = to;
                        }
                        objects.insert(key, Bytes::from(value));
                    }
                }
            }
        }
        check(&tree).unwrap();
        compare(&tree, input.path(), &CompareOptions::default(), &progress).unwrap();
        let to = output.path().join("to");
        // May stop where an attribute is beyond what this machine can have; must not panic.
        let _ = fetch(&tree, &to, &FetchOptions::default(), &progress);
        let _ = store(&tree, input.path(), &StoreOptions::default(), &progress);
        let _ = tree.remove_all(Ino::ROOT, b"a");
    }
}

#[test]
fn a_ring_of_directories_is_found_and_fetching_it_ends() {
    use lowtide_filetree::check::Finding;
    use lowtide_filetree::layout;
    let session = session();
    let tree = Tree::open(&session).unwrap();
    let attributes = Attributes::default();
    let a = tree.mkdir(Ino::ROOT, b"a", &attributes).unwrap();
    let b = tree.mkdir(a, b"b", &attributes).unwrap();
    // A hostile store lets b hold a.
    let entry = Entry {
        ino: a,
        kind: Kind::Directory,
    };
    let home = tree.layout().home(b);
    session
        .objects()
        .insert((home, layout::entry_key(b, b"up")), entry.encode());
    let findings = check(&tree).unwrap().findings;
    assert!(
        findings
            .iter()
            .any(|f| matches!(f, Finding::Misplaced { ino, .. } if *ino == a))
    );
    let output = TempDir::new().unwrap();
    let to = output.path().join("to");
    let report = fetch(&tree, &to, &FetchOptions::default(), &Progress::default()).unwrap();
    assert_eq!(report.damaged.count, 1);
    let input = TempDir::new().unwrap();
    fs::create_dir_all(input.path().join("a/b")).unwrap();
    let report = compare(
        &tree,
        input.path(),
        &CompareOptions::default(),
        &Progress::default(),
    )
    .unwrap();
    assert!(!report.is_equal());
    let refused = tree.remove_all(Ino::ROOT, b"a");
    assert!(matches!(refused, Err(TreeError::Corrupt { .. })));
}
