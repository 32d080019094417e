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

/// A session that lets somebody else go first, once: before its call number `when`, be it to
/// read, to scan or to submit.
struct Polite<'o> {
    inner: LocalTree,
    other: Mutex<(u32, Option<Act<'o>>)>,
}

impl Polite<'_> {
    fn step_aside(&self) {
        let mut other = self.other.lock().unwrap();
        if other.0 == 0 {
            if let Some(act) = other.1.take() {
                act();
            }
        } else {
            other.0 -= 1;
        }
    }
}

impl Session for Polite<'_> {
    fn placement(&self) -> &Placement {
        self.inner.placement()
    }

    fn life(&self) -> Life {
        self.inner.life()
    }

    fn submit(&self, request: Request) -> Result<Ticket, SessionError> {
        self.step_aside();
        self.inner.submit(request)
    }

    fn wait(&self, ticket: Ticket) -> Result<Stamp, SessionError> {
        self.inner.wait(ticket)
    }

    fn wait_stable(&self) -> Result<(), SessionError> {
        self.inner.wait_stable()
    }

    fn read(&self, home: NodeId, key: &Key) -> Result<Option<Bytes>, SessionError> {
        self.step_aside();
        self.inner.read(home, key)
    }

    fn scan(
        &self,
        home: NodeId,
        range: Range,
        after: Option<&Key>,
        bytes_max: usize,
    ) -> Result<Page, SessionError> {
        self.step_aside();
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
    /// Holds `d`, an empty directory, and nothing else.
    e: Ino,
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
    let e = tree.mkdir(ROOT, b"e", &A).unwrap();
    tree.mkdir(e, b"d", &A).unwrap();
    Start {
        a,
        b,
        c,
        f,
        large,
        e,
    }
}

/// The calls of an operation that the other one may come before.
const CALLS_MAX: u32 = 24;
const OPERATIONS: usize = 35;

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
        27 => tree.rename((s.e, b"d"), (ROOT, b"e")),
        28 => tree.rename((s.e, b"d"), (s.c, b"d")),
        29 => tree.rename((s.a, b"f"), (s.a, b"f")),
        30 => tree.rename((ROOT, b"c"), (ROOT, b"c")),
        31 => tree.rename((s.e, b"d"), (ROOT, b"c")),
        32 => tree.rmdir(s.e, b"d"),
        33 => tree.remove_all(ROOT, b"e"),
        34 => tree.rename((ROOT, b"c"), (s.e, b"d")),
        other => unreachable!("operation {other}"),
    }
}

#[test]
fn no_operation_overtaking_another_breaks_the_tree() {
    let mut overtaken = 0;
    for first in 0..OPERATIONS {
        for other in 0..OPERATIONS {
            for when in 0..CALLS_MAX {
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
                    break; // it calls less often
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
