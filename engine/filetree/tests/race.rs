//! Every operation against every other, executed between the planning and the execution of the
//! first: the tree stays consistent whatever was overtaken.

mod common;

use std::sync::Mutex;

use common::{life, noise, session};
use lowtide_engine_core::ids::{Life, NodeId};
use lowtide_engine_core::op::{Bytes, Key, Range, Request, Stamp};
use lowtide_engine_core::session::{Page, Placement, Session, SessionError, Ticket};
use lowtide_filetree::TreeError;
use lowtide_filetree::check::check;
use lowtide_filetree::layout::{Attributes, Ino};
use lowtide_filetree::local::LocalTree;
use lowtide_filetree::tree::{AttributeChange, Tree};

/// What somebody else does, once.
type Act<'o> = Box<dyn FnOnce() + Send + 'o>;

/// A session that lets somebody else go first, once: before its submission number `when`.
struct Polite<'o> {
    inner: LocalTree,
    other: Mutex<(u32, Option<Act<'o>>)>,
    /// What goes before the first scan.
    scanned: Mutex<Option<Act<'o>>>,
}

impl Session for Polite<'_> {
    fn placement(&self) -> &Placement {
        self.inner.placement()
    }

    fn life(&self) -> Life {
        self.inner.life()
    }

    fn submit(&self, request: Request) -> Result<Ticket, SessionError> {
        let mut other = self.other.lock().unwrap();
        if other.0 == 0 {
            if let Some(act) = other.1.take() {
                act();
            }
        } else {
            other.0 -= 1;
        }
        self.inner.submit(request)
    }

    fn wait(&self, ticket: Ticket) -> Result<Stamp, SessionError> {
        self.inner.wait(ticket)
    }

    fn wait_stable(&self) -> Result<(), SessionError> {
        self.inner.wait_stable()
    }

    fn read(&self, home: NodeId, key: &Key) -> Result<Option<Bytes>, SessionError> {
        self.inner.read(home, key)
    }

    fn scan(
        &self,
        home: NodeId,
        range: Range,
        after: Option<&Key>,
        bytes_max: usize,
    ) -> Result<Page, SessionError> {
        if let Some(act) = self.scanned.lock().unwrap().take() {
            act();
        }
        self.inner.scan(home, range, after, bytes_max)
    }
}

const A: Attributes = Attributes {
    mode: 0o700,
    uid: 0,
    gid: 0,
    mtime_sec: 0,
    mtime_nsec: 0,
};
const LARGE: usize = 200_000;
const ROOT: Ino = Ino::ROOT;

/// Numbers of what the tree holds in the beginning; they outlive their names.
#[derive(Clone, Copy)]
struct Start {
    a: Ino,
    b: Ino,
    /// Empty.
    c: Ino,
    /// Two names: `a/f` and `b/g`.
    f: Ino,
    /// One name, many chunks: `a/large`.
    large: Ino,
}

fn start(session: &LocalTree) -> Start {
    let tree = Tree::with_chunk_log2(session, 12).unwrap();
    let a = tree.mkdir(ROOT, b"a", &A).unwrap();
    let b = tree.mkdir(ROOT, b"b", &A).unwrap();
    let c = tree.mkdir(ROOT, b"c", &A).unwrap();
    let f = tree.create(a, b"f", &A, &mut &b"f"[..]).unwrap();
    tree.link(f, b, b"g").unwrap();
    let large = tree
        .create(a, b"large", &A, &mut &noise(1, LARGE)[..])
        .unwrap();
    Start { a, b, c, f, large }
}

const OPERATIONS: usize = 27;

fn operate<S: Session>(which: usize, tree: &Tree<'_, S>, s: &Start) -> Result<(), TreeError> {
    let chmod = AttributeChange {
        mode: Some(0o123),
        ..AttributeChange::default()
    };
    match which {
        0 => tree.rename((ROOT, b"a"), (s.b, b"x")),
        1 => tree.rename((ROOT, b"b"), (s.a, b"x")),
        2 => tree.rename((ROOT, b"a"), (s.c, b"x")),
        3 => tree.rename((ROOT, b"c"), (s.a, b"x")),
        4 => tree.rename((ROOT, b"c"), (s.b, b"x")),
        5 => tree.rename((ROOT, b"a"), (ROOT, b"c")),
        6 => tree.rename((s.a, b"f"), (s.c, b"new")),
        7 => tree.rename((s.a, b"f"), (s.a, b"large")),
        8 => tree.rename((s.a, b"large"), (s.b, b"g")),
        9 => tree.rename((s.a, b"large"), (s.a, b"f")),
        10 => tree.unlink(s.a, b"f"),
        11 => tree.unlink(s.b, b"g"),
        12 => tree.unlink(s.a, b"large"),
        13 => tree.link(s.f, s.c, b"link"),
        14 => tree.link(s.large, s.c, b"link"),
        15 => tree.link(s.large, s.b, b"x"),
        16 => tree.rmdir(ROOT, b"c"),
        17 => tree.create(s.c, b"new", &A, &mut &b"n"[..]).map(|_| ()),
        18 => tree
            .create(s.c, b"new", &A, &mut &noise(2, LARGE)[..])
            .map(|_| ()),
        19 => tree.mkdir(s.c, b"new", &A).map(|_| ()),
        20 => tree.replace(s.a, b"f", &A, &mut &b"n"[..]).map(|_| ()),
        21 => tree
            .replace(s.a, b"large", &A, &mut &noise(3, LARGE)[..])
            .map(|_| ()),
        22 => tree
            .write(s.large, 100_000, &mut &noise(4, LARGE)[..])
            .map(|_| ()),
        23 => tree.write(s.f, 1, &mut &noise(5, 10)[..]).map(|_| ()),
        24 => tree.set_attributes(s.f, &chmod),
        25 => tree.remove_all(ROOT, b"a"),
        26 => tree.remove_all(ROOT, b"c"),
        other => unreachable!("operation {other}"),
    }
}

#[test]
fn no_operation_overtaking_another_breaks_the_tree() {
    let mut overtaken = 0;
    for first in 0..OPERATIONS {
        for other in 0..OPERATIONS {
            for when in 0..4 {
                let base = session();
                let s = start(&base);
                let rival = base.share(life(801, 1));
                let act = || {
                    let tree = Tree::with_chunk_log2(&rival, 12).unwrap();
                    let _ = operate(other, &tree, &s);
                };
                let polite = Polite {
                    inner: base.share(life(802, 1)),
                    other: Mutex::new((when, Some(Box::new(act)))),
                    scanned: Mutex::default(),
                };
                let tree = Tree::with_chunk_log2(&polite, 12).unwrap();
                let outcome = operate(first, &tree, &s);
                let context = format!("operation {first} overtaken by {other} at {when}");
                assert!(
                    !matches!(
                        outcome,
                        Err(TreeError::Corrupt { .. } | TreeError::Session(_))
                    ),
                    "{context}: {outcome:?}"
                );
                if polite.other.lock().unwrap().1.is_some() {
                    break; // it submits less often
                }
                overtaken += 1;
                let report = check(&tree).unwrap();
                assert_eq!(report.findings, vec![], "{context}: {outcome:?}");
                assert_eq!(report.unfinished, vec![], "{context}");
                assert_eq!(report.unfreed, vec![], "{context}");
            }
        }
    }
    assert!(overtaken > OPERATIONS * OPERATIONS);
}

/// Another takes the name away after it was read; the directory that held it is then empty, and
/// looks as if it could be replaced by what was in it.
#[test]
fn a_directory_is_not_replaced_by_what_it_holds() {
    for is_gone in [false, true] {
        let base = session();
        let s = start(&base);
        let rival = base.share(life(801, 1));
        Tree::open(&base).unwrap().mkdir(s.c, b"d", &A).unwrap();
        let act: Act<'_> = Box::new(|| Tree::open(&rival).unwrap().rmdir(s.c, b"d").unwrap());
        let polite = Polite {
            inner: base.share(life(802, 1)),
            other: Mutex::new((0, None)),
            scanned: Mutex::new(is_gone.then_some(act)),
        };
        let tree = Tree::open(&polite).unwrap();
        let outcome = tree.rename((s.c, b"d"), (ROOT, b"c"));
        assert!(matches!(outcome, Err(TreeError::NotEmpty)), "{outcome:?}");
        assert_eq!(tree.lookup(ROOT, b"c").unwrap().ino, s.c);
    }
}
