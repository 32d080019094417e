//! Random operations against a model of a few lines.

mod common;

use std::collections::BTreeMap;
use std::io::Read;

use common::{life, noise, session};
use lowtide_filetree::TreeError;
use lowtide_filetree::check::check;
use lowtide_filetree::layout::{Attributes, Ino, Kind};
use lowtide_filetree::local::LocalTree;
use lowtide_filetree::tree::{AttributeChange, Tree};
use proptest::prelude::*;

/// One operation; numbers choose among the inodes and names that there are.
#[derive(Clone, Debug)]
enum Op {
    Mkdir(usize, u8),
    Create(usize, u8, usize),
    Replace(usize, u8, usize),
    Symlink(usize, u8),
    Link(usize, usize, u8),
    Unlink(usize, u8),
    Rmdir(usize, u8),
    Rename(usize, u8, usize, u8),
    Write(usize, u64, usize),
    Chmod(usize, u16),
    RemoveAll(usize, u8),
}

fn op() -> impl Strategy<Value = Op> {
    let any_ino = 0usize..40;
    let name = 0u8..6;
    // Around chunk borders of 4 KiB, and above what one operation deletes (32 chunks).
    let size = prop_oneof![
        0usize..10,
        4090usize..4100,
        8190usize..8200,
        130_000usize..140_000
    ];
    prop_oneof![
        4 => (any_ino.clone(), name.clone()).prop_map(|(d, n)| Op::Mkdir(d, n)),
        4 => (any_ino.clone(), name.clone(), size.clone()).prop_map(|(d, n, s)| Op::Create(d, n, s)),
        2 => (any_ino.clone(), name.clone(), size.clone()).prop_map(|(d, n, s)| Op::Replace(d, n, s)),
        1 => (any_ino.clone(), name.clone()).prop_map(|(d, n)| Op::Symlink(d, n)),
        3 => (any_ino.clone(), any_ino.clone(), name.clone()).prop_map(|(i, d, n)| Op::Link(i, d, n)),
        3 => (any_ino.clone(), name.clone()).prop_map(|(d, n)| Op::Unlink(d, n)),
        2 => (any_ino.clone(), name.clone()).prop_map(|(d, n)| Op::Rmdir(d, n)),
        6 => (any_ino.clone(), name.clone(), any_ino.clone(), name.clone())
            .prop_map(|(a, b, c, d)| Op::Rename(a, b, c, d)),
        2 => (any_ino.clone(), 0u64..9000, size).prop_map(|(i, o, s)| Op::Write(i, o, s)),
        1 => (any_ino.clone(), 0u16..0o7777).prop_map(|(i, m)| Op::Chmod(i, m)),
        1 => (any_ino, name).prop_map(|(d, n)| Op::RemoveAll(d, n)),
    ]
}

/// How an operation ended, as far as the model knows.
#[derive(Debug, PartialEq)]
enum End {
    Done,
    NotFound,
    Exists,
    NotEmpty,
    NotADirectory,
    IsADirectory,
    NotAFile,
    IntoItself,
    PastSize,
}

fn end<T>(outcome: Result<T, TreeError>) -> End {
    match outcome {
        Ok(_) => End::Done,
        Err(TreeError::NotFound) => End::NotFound,
        Err(TreeError::Exists) => End::Exists,
        Err(TreeError::NotEmpty) => End::NotEmpty,
        Err(TreeError::NotADirectory) => End::NotADirectory,
        Err(TreeError::IsADirectory) => End::IsADirectory,
        Err(TreeError::NotAFile) => End::NotAFile,
        Err(TreeError::IntoItself) => End::IntoItself,
        Err(TreeError::BeyondEnd) => End::PastSize,
        Err(other) => panic!("{other:?}"),
    }
}

#[derive(Clone, Debug)]
enum Body {
    File(Vec<u8>),
    Directory(BTreeMap<u8, usize>),
    Symlink,
}

#[derive(Clone, Debug)]
struct Node {
    ino: Ino,
    mode: u16,
    body: Body,
}

/// Inodes by their number in order of creation; a removed one is `None`.
struct Model {
    nodes: Vec<Option<Node>>,
}

impl Model {
    fn dir(&self, d: usize) -> Result<&BTreeMap<u8, usize>, End> {
        match self.nodes[d].as_ref().map(|n| &n.body) {
            None => Err(End::NotFound),
            Some(Body::Directory(entries)) => Ok(entries),
            Some(_) => Err(End::NotADirectory),
        }
    }

    fn entries(&mut self, d: usize) -> &mut BTreeMap<u8, usize> {
        match self.nodes[d].as_mut().map(|n| &mut n.body) {
            Some(Body::Directory(entries)) => entries,
            _ => unreachable!("checked before"),
        }
    }

    fn names_of(&self, i: usize) -> usize {
        let dirs = self.nodes.iter().flatten();
        dirs.map(|n| match &n.body {
            Body::Directory(entries) => entries.values().filter(|&&x| x == i).count(),
            _ => 0,
        })
        .sum()
    }

    fn is_dir(&self, i: usize) -> bool {
        self.dir(i).is_ok()
    }

    /// Looks a name up; a directory that is none holds nothing.
    fn find(&self, d: usize, name: u8) -> Option<usize> {
        self.dir(d).ok()?.get(&name).copied()
    }

    fn demand_free(&self, d: usize, name: u8) -> Result<(), End> {
        match self.dir(d)?.get(&name) {
            Some(_) => Err(End::Exists),
            None => Ok(()),
        }
    }

    fn add(&mut self, d: usize, name: u8, ino: Ino, mode: u16, body: Body) {
        self.nodes.push(Some(Node { ino, mode, body }));
        let new = self.nodes.len() - 1;
        self.entries(d).insert(name, new);
    }

    fn drop_name(&mut self, d: usize, name: u8) {
        if let Some(i) = self.entries(d).remove(&name)
            && self.names_of(i) == 0
        {
            self.nodes[i] = None;
        }
    }

    fn contains(&self, top: usize, d: usize) -> bool {
        top == d
            || self
                .dir(top)
                .is_ok_and(|entries| entries.values().any(|&c| self.contains(c, d)))
    }

    fn remove_all(&mut self, d: usize, name: u8) {
        if let Some(i) = self.find(d, name)
            && let Ok(entries) = self.dir(i)
        {
            for child in entries.clone().into_keys() {
                self.remove_all(i, child);
            }
        }
        self.drop_name(d, name);
    }

    fn may_rename(&self, a: (usize, u8), b: (usize, u8)) -> Result<bool, End> {
        let moved = self.find(a.0, a.1).ok_or(End::NotFound)?;
        self.dir(b.0)?;
        let target = self.find(b.0, b.1);
        if target == Some(moved) {
            return Ok(false);
        }
        if self.is_dir(moved) && a.0 != b.0 && self.contains(moved, b.0) {
            return Err(End::IntoItself);
        }
        if let Some(target) = target {
            match (self.is_dir(moved), self.dir(target)) {
                (true, Ok(entries)) if !entries.is_empty() => return Err(End::NotEmpty),
                (true, Err(_)) => return Err(End::NotADirectory),
                (false, Ok(_)) => return Err(End::IsADirectory),
                _ => {}
            }
        }
        Ok(true)
    }
}

struct Pair<'s> {
    tree: Tree<'s, LocalTree>,
    model: Model,
    /// Grows with each operation, so that contents differ.
    step: u64,
}

const A: Attributes = Attributes {
    mode: 0o600,
    uid: 0,
    gid: 0,
    mtime_sec: 0,
    mtime_nsec: 0,
};

fn name(n: u8) -> [u8; 1] {
    [b'a' + n]
}

impl Pair<'_> {
    fn ino(&self, i: usize) -> (usize, Ino) {
        let i = i % self.model.nodes.len();
        match &self.model.nodes[i] {
            Some(node) => (i, node.ino),
            None => (i, Ino::new(9_999_999_999).unwrap()), // nobody's
        }
    }

    fn assert_end(&self, op: &Op, expected: Result<(), End>, found: End) {
        let expected = expected.err().unwrap_or(End::Done);
        assert_eq!(found, expected, "{op:?}");
    }

    fn apply(&mut self, op: &Op) {
        self.step += 1;
        match *op {
            Op::Mkdir(d, n) => {
                let (d, ino) = self.ino(d);
                let expected = self.model.demand_free(d, n);
                let made = self.tree.mkdir(ino, &name(n), &A);
                if let Ok(ino) = made {
                    let body = Body::Directory(BTreeMap::new());
                    self.model.add(d, n, ino, A.mode, body);
                }
                self.assert_end(op, expected, end(made));
            }
            Op::Symlink(d, n) => {
                let (d, ino) = self.ino(d);
                let expected = self.model.demand_free(d, n);
                let made = self.tree.symlink(ino, &name(n), b"to", &A);
                if let Ok(ino) = made {
                    self.model.add(d, n, ino, A.mode, Body::Symlink);
                }
                self.assert_end(op, expected, end(made));
            }
            Op::Create(d, n, size) => {
                let (d, ino) = self.ino(d);
                let expected = self.model.demand_free(d, n);
                let bytes = noise(self.step, size);
                let made = self.tree.create(ino, &name(n), &A, &mut &bytes[..]);
                if let Ok(ino) = made {
                    self.model.add(d, n, ino, A.mode, Body::File(bytes));
                }
                self.assert_end(op, expected, end(made));
            }
            Op::Replace(d, n, size) => {
                let (d, ino) = self.ino(d);
                let target = self.model.find(d, n);
                let expected = self.model.dir(d).map(|_| ()).and_then(|()| match target {
                    Some(t) if self.model.is_dir(t) => Err(End::IsADirectory),
                    _ => Ok(()),
                });
                let bytes = noise(self.step, size);
                let made = self.tree.replace(ino, &name(n), &A, &mut &bytes[..]);
                if let Ok(ino) = made {
                    self.model.drop_name(d, n);
                    self.model.add(d, n, ino, A.mode, Body::File(bytes));
                }
                self.assert_end(op, expected, end(made));
            }
            Op::Link(i, d, n) => {
                let ((i, target), (d, ino)) = (self.ino(i), self.ino(d));
                let expected = match &self.model.nodes[i] {
                    None => Err(End::NotFound),
                    Some(_) if self.model.is_dir(i) => Err(End::IsADirectory),
                    Some(_) => self.model.demand_free(d, n),
                };
                let linked = self.tree.link(target, ino, &name(n));
                if linked.is_ok() {
                    self.model.entries(d).insert(n, i);
                }
                self.assert_end(op, expected, end(linked));
            }
            _ => self.apply_rest(op),
        }
    }

    fn apply_rest(&mut self, op: &Op) {
        match *op {
            Op::Unlink(d, n) | Op::Rmdir(d, n) | Op::RemoveAll(d, n) => {
                let (d, ino) = self.ino(d);
                let target = self.model.find(d, n);
                let inside = target.and_then(|t| self.model.dir(t).ok());
                let expected = match (op, target, inside) {
                    (_, None, _) => Err(End::NotFound),
                    (Op::Unlink(..), _, Some(_)) => Err(End::IsADirectory),
                    (Op::Rmdir(..), _, None) => Err(End::NotADirectory),
                    (Op::Rmdir(..), _, Some(e)) if !e.is_empty() => Err(End::NotEmpty),
                    _ => Ok(()),
                };
                let done = match op {
                    Op::Unlink(..) => self.tree.unlink(ino, &name(n)),
                    Op::Rmdir(..) => self.tree.rmdir(ino, &name(n)),
                    _ => self.tree.remove_all(ino, &name(n)),
                };
                if done.is_ok() {
                    self.model.remove_all(d, n);
                }
                self.assert_end(op, expected, end(done));
            }
            Op::Rename(a, an, b, bn) => {
                let ((a, a_ino), (b, b_ino)) = (self.ino(a), self.ino(b));
                let expected = self.model.may_rename((a, an), (b, bn));
                let done = self.tree.rename((a_ino, &name(an)), (b_ino, &name(bn)));
                if done.is_ok() && expected == Ok(true) {
                    let moved = self.model.find(a, an).unwrap();
                    self.model.drop_name(b, bn);
                    self.model.entries(a).remove(&an);
                    self.model.entries(b).insert(bn, moved);
                }
                self.assert_end(op, expected.map(|_| ()), end(done));
            }
            Op::Write(i, offset, size) => {
                let (i, ino) = self.ino(i);
                let bytes = noise(self.step, size);
                let expected = match self.model.nodes[i].as_mut().map(|n| &mut n.body) {
                    None => Err(End::NotFound),
                    Some(Body::File(_)) if size == 0 => Ok(()),
                    Some(Body::File(content)) if offset > content.len() as u64 => {
                        Err(End::PastSize)
                    }
                    Some(Body::File(content)) => {
                        let offset = offset as usize;
                        content.resize(content.len().max(offset + size), 0);
                        content[offset..offset + size].copy_from_slice(&bytes);
                        Ok(())
                    }
                    Some(_) => Err(End::NotAFile),
                };
                let done = self.tree.write(ino, offset, &mut &bytes[..]);
                self.assert_end(op, expected, end(done));
            }
            Op::Chmod(i, mode) => {
                let (i, ino) = self.ino(i);
                let change = AttributeChange {
                    mode: Some(mode),
                    ..AttributeChange::default()
                };
                let done = self.tree.set_attributes(ino, &change);
                let expected = match &mut self.model.nodes[i] {
                    None => Err(End::NotFound),
                    Some(node) => {
                        node.mode = mode;
                        Ok(())
                    }
                };
                self.assert_end(op, expected, end(done));
            }
            _ => unreachable!("applied before"),
        }
    }

    fn assert_same(&self) {
        let report = check(&self.tree).unwrap();
        assert_eq!(report.findings, vec![]);
        assert_eq!((report.unfinished, report.unfreed), (vec![], vec![]));
        assert_eq!(
            report.inodes,
            self.model.nodes.iter().flatten().count() as u64
        );
        for (i, node) in self.model.nodes.iter().enumerate() {
            let Some(node) = node else { continue };
            let stat = self.tree.stat(node.ino).unwrap();
            if i > 0 {
                assert_eq!(stat.inode.attributes.mode, node.mode);
            }
            match &node.body {
                Body::File(content) => {
                    assert_eq!(stat.count, self.model.names_of(i) as i64);
                    let mut bytes = Vec::new();
                    let mut reader = self.tree.read(node.ino).unwrap();
                    reader.read_to_end(&mut bytes).unwrap();
                    assert!(bytes == *content);
                }
                Body::Symlink => assert_eq!(stat.inode.kind, Kind::Symlink),
                Body::Directory(entries) => {
                    let page = self.tree.readdir(node.ino, None, 1000).unwrap();
                    let found: BTreeMap<u8, Ino> = page
                        .entries
                        .iter()
                        .map(|e| (e.name[0] - b'a', e.entry.ino))
                        .collect();
                    let expected: BTreeMap<u8, Ino> = entries
                        .iter()
                        .map(|(n, i)| (*n, self.model.nodes[*i].as_ref().unwrap().ino))
                        .collect();
                    assert_eq!(found, expected);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    #[test]
    fn operations_do_what_the_model_does(ops in proptest::collection::vec(op(), 1..80)) {
        let session = session();
        let tree = Tree::with_chunk_log2(&session, 12).unwrap();
        let root = Node {
            ino: Ino::ROOT,
            mode: 0,
            body: Body::Directory(BTreeMap::new()),
        };
        let model = Model { nodes: vec![Some(root)] };
        let mut pair = Pair { tree, model, step: 0 };
        for op in &ops {
            pair.apply(op);
        }
        pair.assert_same();
    }

    /// Several sessions at once: whatever the interleaving, the tree stays consistent.
    #[test]
    fn concurrent_operations_keep_the_tree_consistent(
        scripts in proptest::collection::vec(proptest::collection::vec(op(), 1..40), 3),
    ) {
        let base = session();
        std::thread::scope(|scope| {
            for (node, script) in (700..).zip(&scripts) {
                let session = base.share(life(node, 1));
                scope.spawn(move || {
                    let tree = Tree::with_chunk_log2(&session, 12).unwrap();
                    for op in script {
                        blindly(&tree, op);
                    }
                });
            }
        });
        let tree = Tree::open(&base).unwrap();
        let report = check(&tree).unwrap();
        prop_assert_eq!(report.findings, vec![]);
        prop_assert_eq!((report.unfinished, report.unfreed), (vec![], vec![]));
    }
}

/// Applies an operation to whatever is found at paths of two names, and ignores refusals.
fn blindly(tree: &Tree<'_, LocalTree>, op: &Op) {
    let find = |i: usize| -> Ino {
        let mut at = Ino::ROOT;
        for n in [i % 7, i / 7 % 7] {
            if let Ok(entry) = tree.lookup(at, &name(n as u8)) {
                at = entry.ino;
            }
        }
        at
    };
    let ended = match *op {
        Op::Mkdir(d, n) => end_or_race(tree.mkdir(find(d), &name(n), &A)),
        Op::Symlink(d, n) => end_or_race(tree.symlink(find(d), &name(n), b"to", &A)),
        Op::Create(d, n, s) => {
            end_or_race(tree.create(find(d), &name(n), &A, &mut &noise(1, s)[..]))
        }
        Op::Replace(d, n, s) => {
            end_or_race(tree.replace(find(d), &name(n), &A, &mut &noise(2, s)[..]))
        }
        Op::Link(i, d, n) => end_or_race(tree.link(find(i), find(d), &name(n))),
        Op::Unlink(d, n) => end_or_race(tree.unlink(find(d), &name(n))),
        Op::Rmdir(d, n) => end_or_race(tree.rmdir(find(d), &name(n))),
        Op::RemoveAll(d, n) => end_or_race(tree.remove_all(find(d), &name(n))),
        Op::Rename(a, an, b, bn) => {
            end_or_race(tree.rename((find(a), &name(an)), (find(b), &name(bn))))
        }
        Op::Write(i, o, s) => end_or_race(tree.write(find(i), o, &mut &noise(3, s)[..])),
        Op::Chmod(i, m) => {
            let change = AttributeChange {
                mode: Some(m),
                ..AttributeChange::default()
            };
            end_or_race(tree.set_attributes(find(i), &change))
        }
    };
    assert!(ended, "{op:?}");
}

/// Whether an operation ended as it may while others run: done or refused, never damaged.
fn end_or_race<T>(outcome: Result<T, TreeError>) -> bool {
    match outcome {
        Err(damage @ (TreeError::Corrupt { .. } | TreeError::Session(_))) => {
            eprintln!("{damage}");
            false
        }
        Err(TreeError::Contended) | Ok(_) => true,
        Err(other) => {
            end::<T>(Err(other));
            true
        }
    }
}
