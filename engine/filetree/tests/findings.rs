//! Each thing that can be wrong with a tree is found, as what it is and as nothing else: one damage,
//! and the whole list of findings that it must give.

mod common;

use std::fs;

use common::{noise, session};
use lowtide_engine_core::ids::NodeId;
use lowtide_engine_core::op::{Bytes, Key};
use lowtide_filetree::Progress;
use lowtide_filetree::check::{CheckReport, Finding, Unfinished, check};
use lowtide_filetree::layout::{
    self, Attributes, Chunk, Entry, Freeing, Ino, Inode, Kind, Layout, Malformed, Parent, Pending,
};
use lowtide_filetree::local::{LocalTree, ObjectMap};
use lowtide_filetree::store::{StoreOptions, store};
use lowtide_filetree::tree::Tree;
use tempfile::TempDir;

/// Bytes of a chunk.
const CHUNK: usize = 4096;
/// Entries of the directory `a`.
const ENTRIES: i64 = 5;

/// A stored tree: `a/`, `a/b/`, `a/b/c/`, `a/empty`, `a/file` of three chunks, `a/one`, also called
/// `other`, and `a/link`.
struct Stored {
    session: LocalTree,
}

/// Where things are in it.
struct Facts {
    layout: Layout,
    a: Ino,
    b: Ino,
    c: Ino,
    empty: Ino,
    file: Ino,
    one: Ino,
    /// Is nobody's.
    stranger: Ino,
}

impl Stored {
    fn new() -> (Stored, Facts) {
        let input = TempDir::new().unwrap();
        let at = |name: &str| input.path().join(name);
        fs::create_dir_all(at("a/b/c")).unwrap();
        fs::write(at("a/empty"), "").unwrap();
        fs::write(at("a/file"), noise(3, 2 * CHUNK + 100)).unwrap();
        fs::write(at("a/one"), "one inode, two names").unwrap();
        fs::hard_link(at("a/one"), at("other")).unwrap();
        std::os::unix::fs::symlink("one", at("a/link")).unwrap();
        let session = session();
        let tree = Tree::with_chunk_log2(&session, CHUNK.ilog2() as u8).unwrap();
        let options = StoreOptions::default();
        store(&tree, input.path(), &options, &Progress::default()).unwrap();
        let ino = |path: &[u8]| tree.resolve(path).unwrap().ino;
        let facts = Facts {
            layout: tree.layout().clone(),
            a: ino(b"a"),
            b: ino(b"a/b"),
            c: ino(b"a/b/c"),
            empty: ino(b"a/empty"),
            file: ino(b"a/file"),
            one: ino(b"other"),
            stranger: Ino::new(987_654_321).unwrap(),
        };
        drop(tree);
        (Stored { session }, facts)
    }

    fn check(&self) -> CheckReport {
        check(&Tree::with_chunk_log2(&self.session, CHUNK.ilog2() as u8).unwrap()).unwrap()
    }
}

impl Facts {
    /// Where an object about an inode, or a name in a directory, is kept.
    fn at(&self, ino: Ino, key: Key) -> (NodeId, Key) {
        (self.layout.home(ino), key)
    }

    fn inode(&self, ino: Ino) -> (NodeId, Key) {
        self.at(ino, layout::inode_key(ino))
    }

    fn count(&self, ino: Ino) -> (NodeId, Key) {
        self.at(ino, layout::count_key(ino))
    }

    fn parent(&self, ino: Ino) -> (NodeId, Key) {
        self.at(ino, layout::parent_key(ino))
    }

    fn entry(&self, directory: Ino, name: &[u8]) -> (NodeId, Key) {
        self.at(directory, layout::entry_key(directory, name))
    }

    fn chunk(&self, ino: Ino, number: u64) -> (NodeId, Key) {
        let home = self.layout.chunk_home(ino, number);
        (home, layout::chunk_key(ino, number))
    }

    /// A note that a file is being made in `a`, as if its client had died.
    fn pending(&self) -> (NodeId, Key) {
        self.at(self.a, layout::pending_key(self.a, b"unfinished"))
    }
}

/// Removes what must be there.
fn remove(objects: &mut ObjectMap, place: &(NodeId, Key)) {
    assert!(objects.remove(place).is_some(), "{place:?}");
}

fn file_of(size: u64) -> Bytes {
    let attributes = Attributes {
        mode: 0o644,
        ..Attributes::default()
    };
    let inode = Inode {
        kind: Kind::File,
        attributes,
        size,
        chunk_log2: CHUNK.ilog2() as u8,
        writes: 0,
        target: Vec::new(),
    };
    inode.encode()
}

/// A name, the damage, and what must be found.
type Row = (
    &'static str,
    fn(&mut ObjectMap, &Facts),
    fn(&Facts) -> Vec<Finding>,
);

const ROWS: &[Row] = &[
    ("nothing", |_, _| {}, |_| vec![]),
    (
        "an object that does not decode",
        |objects, facts| {
            objects.insert(facts.pending(), Bytes::from(*b"?"));
        },
        |facts| {
            let (home, key) = facts.pending();
            let why = Pending::decode(b"?").unwrap_err();
            vec![Finding::Corrupt { home, key, why }]
        },
    ),
    (
        "an object on another server than its own",
        |objects, facts| {
            let (home, key) = facts.pending();
            let other = facts.layout.meta().iter().find(|meta| **meta != home);
            objects.insert((*other.unwrap(), key), Pending(facts.stranger).encode());
        },
        |facts| {
            let (right, key) = facts.pending();
            let home = *facts.layout.meta().iter().find(|m| **m != right).unwrap();
            let why = Malformed::Key;
            vec![Finding::Corrupt { home, key, why }]
        },
    ),
    (
        "a chunk of an unknown form",
        |objects, facts| {
            let place = facts.chunk(facts.file, 1);
            let mut value = objects[&place].to_vec();
            value[0] = 9;
            objects.insert(place, Bytes::from(value));
        },
        |facts| {
            let (home, key) = facts.chunk(facts.file, 1);
            let why = Malformed::Version(9);
            vec![
                Finding::Corrupt { home, key, why },
                Finding::Chunks {
                    ino: facts.file,
                    wanted: 3,
                    found: 2,
                },
            ]
        },
    ),
    (
        "a chunk shorter than its file demands",
        |objects, facts| {
            let short = Chunk::new(&noise(4, CHUNK - 1)).encode();
            objects.insert(facts.chunk(facts.file, 0), short);
        },
        |facts| {
            let (home, key) = facts.chunk(facts.file, 0);
            let why = Malformed::Contradiction;
            vec![
                Finding::Corrupt { home, key, why },
                Finding::Chunks {
                    ino: facts.file,
                    wanted: 3,
                    found: 2,
                },
            ]
        },
    ),
    (
        "no count of names",
        |objects, facts| remove(objects, &facts.count(facts.empty)),
        |facts| vec![Finding::Incomplete { ino: facts.empty }],
    ),
    (
        "no parent of a directory",
        |objects, facts| remove(objects, &facts.parent(facts.b)),
        |facts| vec![Finding::Incomplete { ino: facts.b }],
    ),
    (
        "a parent of a file",
        |objects, facts| {
            objects.insert(facts.parent(facts.empty), Parent(facts.a).encode());
        },
        |facts| vec![Finding::Incomplete { ino: facts.empty }],
    ),
    (
        "an entry without its inode",
        |objects, facts| {
            remove(objects, &facts.inode(facts.empty));
            remove(objects, &facts.count(facts.empty));
        },
        |facts| {
            vec![Finding::Dangling {
                directory: facts.a,
                name: b"empty".to_vec(),
                ino: facts.empty,
            }]
        },
    ),
    (
        "an entry of another kind than its inode",
        |objects, facts| {
            let entry = Entry {
                ino: facts.empty,
                kind: Kind::Symlink,
            };
            objects.insert(facts.entry(facts.a, b"empty"), entry.encode());
        },
        |facts| {
            vec![Finding::Dangling {
                directory: facts.a,
                name: b"empty".to_vec(),
                ino: facts.empty,
            }]
        },
    ),
    (
        "an inode without an entry, never counted",
        |objects, facts| {
            objects.insert(facts.inode(facts.stranger), file_of(0));
            objects.insert(facts.count(facts.stranger), layout::count_value(0));
        },
        |facts| {
            vec![Finding::Orphan {
                ino: facts.stranger,
            }]
        },
    ),
    (
        "an inode whose entry is gone",
        |objects, facts| remove(objects, &facts.entry(facts.a, b"empty")),
        |facts| {
            let (ino, a) = (facts.empty, facts.a);
            vec![
                Finding::Orphan { ino },
                Finding::Names {
                    ino,
                    stored: 1,
                    found: 0,
                },
                Finding::Entries {
                    ino: a,
                    stored: ENTRIES,
                    found: ENTRIES - 1,
                },
            ]
        },
    ),
    (
        "a wrong count of names",
        |objects, facts| {
            objects.insert(facts.count(facts.one), layout::count_value(3));
        },
        |facts| {
            vec![Finding::Names {
                ino: facts.one,
                stored: 3,
                found: 2,
            }]
        },
    ),
    (
        "a wrong count of entries",
        |objects, facts| {
            objects.insert(facts.count(facts.a), layout::count_value(ENTRIES + 1));
        },
        |facts| {
            vec![Finding::Entries {
                ino: facts.a,
                stored: ENTRIES + 1,
                found: ENTRIES,
            }]
        },
    ),
    (
        "a parent that does not hold the directory",
        |objects, facts| {
            objects.insert(facts.parent(facts.b), Parent(Ino::ROOT).encode());
        },
        |facts| {
            vec![Finding::Misplaced {
                ino: facts.b,
                parent: Ino::ROOT,
                names: 1,
            }]
        },
    ),
    (
        "a directory with two names",
        |objects, facts| {
            let entry = Entry {
                ino: facts.c,
                kind: Kind::Directory,
            };
            objects.insert(facts.entry(facts.a, b"again"), entry.encode());
            objects.insert(facts.count(facts.a), layout::count_value(ENTRIES + 1));
        },
        |facts| {
            vec![Finding::Misplaced {
                ino: facts.c,
                parent: facts.b,
                names: 2,
            }]
        },
    ),
    (
        "a ring of directories",
        |objects, facts| {
            let entry = objects.remove(&facts.entry(facts.a, b"b")).unwrap();
            objects.insert(facts.entry(facts.c, b"b"), entry);
            objects.insert(facts.parent(facts.b), Parent(facts.c).encode());
            objects.insert(facts.count(facts.a), layout::count_value(ENTRIES - 1));
            objects.insert(facts.count(facts.c), layout::count_value(1));
        },
        |facts| {
            vec![
                Finding::Unreachable { ino: facts.b },
                Finding::Unreachable { ino: facts.c },
            ]
        },
    ),
    (
        "a missing chunk",
        |objects, facts| remove(objects, &facts.chunk(facts.file, 2)),
        |facts| {
            vec![Finding::Chunks {
                ino: facts.file,
                wanted: 3,
                found: 2,
            }]
        },
    ),
    (
        "a chunk of no file",
        |objects, facts| {
            let chunk = Chunk::new(b"whose?").encode();
            objects.insert(facts.chunk(facts.stranger, 0), chunk);
        },
        |facts| {
            let (home, _) = facts.chunk(facts.stranger, 0);
            vec![Finding::Stray {
                home,
                ino: facts.stranger,
                chunk: 0,
            }]
        },
    ),
    (
        "a chunk behind the end of its file",
        |objects, facts| {
            let chunk = Chunk::new(b"too far").encode();
            objects.insert(facts.chunk(facts.file, 3), chunk);
        },
        |facts| {
            let (home, _) = facts.chunk(facts.file, 3);
            vec![Finding::Stray {
                home,
                ino: facts.file,
                chunk: 3,
            }]
        },
    ),
    (
        "no root",
        |objects, _| objects.clear(),
        |_| vec![Finding::NoRoot],
    ),
];

#[test]
fn each_damage_is_found_as_what_it_is() {
    for (name, damage, expected) in ROWS {
        let (stored, facts) = Stored::new();
        // Opening a tree makes its root, so the session is looked at through a tree of before.
        let tree = Tree::with_chunk_log2(&stored.session, CHUNK.ilog2() as u8).unwrap();
        damage(&mut stored.session.objects(), &facts);
        let report = check(&tree).unwrap();
        let sorted = |mut findings: Vec<Finding>| {
            findings.sort_by_key(|finding| format!("{finding:?}"));
            findings
        };
        let expected = sorted(expected(&facts));
        assert_eq!(
            report.finding_count,
            expected.len() as u64,
            "{name}: {report:?}"
        );
        assert_eq!(sorted(report.findings.clone()), expected, "{name}");
        assert_eq!(report.is_consistent(), expected.is_empty(), "{name}");
        for finding in &report.findings {
            assert!(!finding.to_string().is_empty());
        }
    }
}

#[test]
fn what_was_interrupted_is_told_and_is_no_damage() {
    let (stored, facts) = Stored::new();
    {
        let mut objects = stored.session.objects();
        objects.insert(facts.pending(), Pending(facts.stranger).encode());
        let chunk = Chunk::new(b"not yet a file").encode();
        objects.insert(facts.chunk(facts.stranger, 0), chunk.clone());
        let freed = Ino::new(facts.stranger.get() + 1).unwrap();
        let note = facts.at(freed, layout::freeing_key(freed));
        objects.insert(note, Freeing { chunks: 1 }.encode());
        objects.insert(facts.chunk(freed, 0), chunk);
    }
    let report = stored.check();
    assert_eq!(report.findings, []);
    let unfinished = Unfinished {
        directory: facts.a,
        name: b"unfinished".to_vec(),
        ino: facts.stranger,
    };
    assert_eq!(
        (report.unfinished, report.unfreed.len()),
        (vec![unfinished], 1)
    );
    let whole = Stored::new().0.check();
    assert_eq!((whole.inodes, whole.entries, whole.chunks), (8, 8, 4));
}
