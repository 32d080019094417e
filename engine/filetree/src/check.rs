//! Whether a stored tree is consistent in itself: the invariants T1 to T6 of [`crate::tree`],
//! verified by scanning every space of every server.
//!
//! The tree must be at rest: operations that execute meanwhile look like damage. Memory needed is
//! some hundred bytes per inode; contents pass through page by page.
//!
//! Deliberately absent: repair, and comparison with anything outside the tree. A scan finds the
//! entries of directories that exist; entries left of one that does not would have to be found by
//! whoever can enumerate spaces.

use std::collections::{HashMap, HashSet};
use std::fmt;

use lowtide_engine_core::ids::NodeId;
use lowtide_engine_core::op::{Bytes, Key, Range};
use lowtide_engine_core::session::Session;

use crate::error::TreeError;
use crate::layout::{
    self, Chunk, DATA, Entry, FREEING, Freeing, INODES, Ino, Inode, InodePart, Kind, Malformed,
    PENDING, Parent, Pending,
};
use crate::tree::Tree;

/// Bytes of values per page of small objects.
const PAGE_BYTES: usize = 256 << 10;
/// Bytes of values per page of chunks.
const DATA_PAGE_BYTES: usize = 4 << 20;

/// Something that is not as it must be.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finding {
    /// An object that cannot be read, or that is not where its contents belong.
    Corrupt {
        /// Its server.
        home: NodeId,
        /// The object.
        key: Key,
        /// What is wrong.
        why: Malformed,
    },
    /// There is no root directory.
    NoRoot,
    /// An inode lacks its inode object, its count or, for a directory only, its parent.
    Incomplete {
        /// The inode.
        ino: Ino,
    },
    /// T1: an entry names no inode, or one of another kind.
    Dangling {
        /// The directory.
        directory: Ino,
        /// The entry's name.
        name: Vec<u8>,
        /// What it names.
        ino: Ino,
    },
    /// An inode that no entry names.
    Orphan {
        /// The inode.
        ino: Ino,
    },
    /// T2: a count of names is wrong.
    Names {
        /// The inode.
        ino: Ino,
        /// The count.
        stored: i64,
        /// The names found.
        found: i64,
    },
    /// T3: a count of entries is wrong.
    Entries {
        /// The directory.
        ino: Ino,
        /// The count.
        stored: i64,
        /// The entries found.
        found: i64,
    },
    /// T4: a directory has several names, or its parent object names another directory.
    Misplaced {
        /// The directory.
        ino: Ino,
        /// What its parent object says.
        parent: Ino,
        /// Directories that hold a name of it.
        names: i64,
    },
    /// T4: a directory cannot be reached from the root.
    Unreachable {
        /// The directory.
        ino: Ino,
    },
    /// T5: chunks of a file are missing.
    Chunks {
        /// The file.
        ino: Ino,
        /// Chunks that its size demands.
        wanted: u64,
        /// Of those, found.
        found: u64,
    },
    /// T6: a chunk that belongs to nothing.
    Stray {
        /// Its server.
        home: NodeId,
        /// The file that it would belong to.
        ino: Ino,
        /// Its number.
        chunk: u64,
    },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Finding::Corrupt { home, key, why } => write!(f, "object {key:?} on {home}: {why}"),
            Finding::NoRoot => write!(f, "there is no root directory"),
            Finding::Incomplete { ino } => write!(f, "{ino} lacks a part"),
            Finding::Dangling {
                directory,
                name,
                ino,
            } => write!(
                f,
                "entry {} of {directory} names {ino}, which is not there or of another kind",
                name.escape_ascii()
            ),
            Finding::Orphan { ino } => write!(f, "{ino} has no name"),
            Finding::Names { ino, stored, found } => {
                write!(f, "{ino} has {found} names, not {stored}")
            }
            Finding::Entries { ino, stored, found } => {
                write!(f, "{ino} has {found} entries, not {stored}")
            }
            Finding::Misplaced { ino, parent, names } => {
                write!(
                    f,
                    "directory {ino} in {parent} has {names} names elsewhere or several"
                )
            }
            Finding::Unreachable { ino } => write!(f, "directory {ino} is not below the root"),
            Finding::Chunks { ino, wanted, found } => {
                write!(f, "{ino} has {found} of {wanted} chunks")
            }
            Finding::Stray { home, ino, chunk } => {
                write!(f, "chunk {chunk} of {ino} on {home} belongs to nothing")
            }
        }
    }
}

/// A file whose creation was interrupted; see [`Tree::abandon`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfinished {
    /// The directory.
    pub directory: Ino,
    /// The name that the file would have.
    pub name: Vec<u8>,
    /// The inode number that it would have.
    pub ino: Ino,
}

/// What a tree consists of and what is wrong with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Inodes.
    pub inodes: u64,
    /// Directory entries.
    pub entries: u64,
    /// Chunks.
    pub chunks: u64,
    /// Bytes of contents.
    pub bytes: u64,
    /// Violations: the first [`CheckReport::KEPT_MAX`].
    pub findings: Vec<Finding>,
    /// How many violations there are.
    pub finding_count: u64,
    /// Interrupted creations. Legitimate, but they take space.
    pub unfinished: Vec<Unfinished>,
    /// Interrupted deletions ([`Tree::reclaim`]). Legitimate, but they take space.
    pub unfreed: Vec<Ino>,
}

impl CheckReport {
    /// How many findings are kept.
    pub const KEPT_MAX: usize = 10_000;

    /// Whether every invariant holds.
    #[must_use]
    pub fn is_consistent(&self) -> bool {
        self.finding_count == 0
    }

    fn add(&mut self, finding: Finding) {
        self.finding_count += 1;
        if self.findings.len() < Self::KEPT_MAX {
            self.findings.push(finding);
        }
    }
}

/// Verifies a tree at rest.
///
/// # Errors
/// Failures of the session. Damage is no error but part of the report.
pub fn check<S: Session + ?Sized>(tree: &Tree<'_, S>) -> Result<CheckReport, TreeError> {
    let mut checker = Checker {
        tree,
        report: CheckReport::default(),
        inodes: HashMap::new(),
        pending: HashSet::new(),
        freeing: HashMap::new(),
    };
    checker.scan_notes()?;
    checker.scan_inodes()?;
    checker.scan_names()?;
    checker.scan_data()?;
    checker.judge();
    Ok(checker.report)
}

/// What has been learnt about one inode.
#[derive(Default)]
struct Known {
    inode: Option<Inode>,
    count: Option<i64>,
    parent: Option<Ino>,
    /// Entries that name it, and the directory of the last.
    names: i64,
    named_in: Option<Ino>,
    /// Entries in it.
    entries: i64,
    /// Chunks of it that are as they must be.
    chunks: u64,
}

impl Known {
    fn is_directory(&self) -> bool {
        self.inode
            .as_ref()
            .is_some_and(|inode| inode.kind == Kind::Directory)
    }
}

struct Checker<'t, 's, S: Session + ?Sized> {
    tree: &'t Tree<'s, S>,
    report: CheckReport,
    inodes: HashMap<Ino, Known>,
    /// Inodes that unfinished files will have.
    pending: HashSet<Ino>,
    /// Chunks that freed files had.
    freeing: HashMap<Ino, u64>,
}

impl<S: Session + ?Sized> Checker<'_, '_, S> {
    fn scan_notes(&mut self) -> Result<(), TreeError> {
        for home in self.tree.layout().meta().to_vec() {
            self.each(home, Range::whole(PENDING), PAGE_BYTES, Self::pending)?;
            self.each(home, Range::whole(FREEING), PAGE_BYTES, Self::freeing)?;
        }
        Ok(())
    }

    fn pending(&mut self, home: NodeId, key: &Key, value: &Bytes) -> Result<(), Malformed> {
        let Pending(ino) = Pending::decode(value)?;
        let (directory, name) = layout::pending_place(key).ok_or(Malformed::Key)?;
        self.demand_place(
            (home, key),
            self.tree.layout().home(directory),
            &layout::pending_key(directory, name),
        )?;
        let name = name.to_vec();
        self.report.unfinished.push(Unfinished {
            directory,
            name,
            ino,
        });
        self.pending.insert(ino);
        Ok(())
    }

    fn freeing(&mut self, home: NodeId, key: &Key, value: &Bytes) -> Result<(), Malformed> {
        let Freeing { chunks } = Freeing::decode(value)?;
        let ino = Ino::new(key.slot).ok_or(Malformed::Key)?;
        let expected = layout::freeing_key(ino);
        self.demand_place((home, key), self.tree.layout().home(ino), &expected)?;
        self.report.unfreed.push(ino);
        self.freeing.insert(ino, chunks);
        Ok(())
    }

    fn scan_inodes(&mut self) -> Result<(), TreeError> {
        for home in self.tree.layout().meta().to_vec() {
            self.each(home, Range::whole(INODES), PAGE_BYTES, Self::inode_part)?;
        }
        Ok(())
    }

    fn inode_part(&mut self, home: NodeId, key: &Key, value: &Bytes) -> Result<(), Malformed> {
        let ino = Ino::new(key.slot).ok_or(Malformed::Key)?;
        let part = layout::inode_part(key).ok_or(Malformed::Key)?;
        self.demand_place((home, key), self.tree.layout().home(ino), key)?;
        let known = self.inodes.entry(ino).or_default();
        match part {
            InodePart::Inode => known.inode = Some(Inode::decode(value)?),
            InodePart::Count => known.count = Some(layout::read_count(value)?),
            InodePart::Parent => known.parent = Some(Parent::decode(value)?.0),
        }
        Ok(())
    }

    fn scan_names(&mut self) -> Result<(), TreeError> {
        let mut directories: Vec<Ino> = self
            .inodes
            .iter()
            .filter(|(_, known)| known.is_directory())
            .map(|(ino, _)| *ino)
            .collect();
        directories.sort_unstable();
        for directory in directories {
            let home = self.tree.layout().home(directory);
            let names = Range::whole(layout::names_space(directory));
            self.each(home, names, PAGE_BYTES, |checker, home, key, value| {
                checker.entry(directory, home, key, value)
            })?;
        }
        Ok(())
    }

    fn entry(
        &mut self,
        directory: Ino,
        home: NodeId,
        key: &Key,
        value: &Bytes,
    ) -> Result<(), Malformed> {
        if !layout::is_file_name(&key.name) {
            return Err(Malformed::Key);
        }
        let expected = layout::entry_key(directory, &key.name);
        self.demand_place((home, key), home, &expected)?;
        self.report.entries += 1;
        if let Some(known) = self.inodes.get_mut(&directory) {
            known.entries += 1;
        }
        let Entry { ino, kind } = Entry::decode(value)?;
        if let Some(known) = self.inodes.get_mut(&ino) {
            known.names += 1;
            known.named_in = Some(directory);
            if known.inode.as_ref().is_some_and(|inode| inode.kind == kind) {
                return Ok(());
            }
        }
        self.report.add(Finding::Dangling {
            directory,
            name: key.name.clone(),
            ino,
        });
        Ok(())
    }

    fn scan_data(&mut self) -> Result<(), TreeError> {
        for home in self.tree.layout().object().to_vec() {
            self.each(home, Range::whole(DATA), DATA_PAGE_BYTES, Self::chunk)?;
        }
        Ok(())
    }

    fn chunk(&mut self, home: NodeId, key: &Key, value: &Bytes) -> Result<(), Malformed> {
        let ino = Ino::new(key.slot).ok_or(Malformed::Key)?;
        let number = layout::chunk_number(key).ok_or(Malformed::Key)?;
        let expected = layout::chunk_key(ino, number);
        let right_home = self.tree.layout().chunk_home(ino, number);
        self.demand_place((home, key), right_home, &expected)?;
        let chunk = Chunk::decode(value)?;
        self.report.chunks += 1;
        self.report.bytes += chunk.len() as u64;
        let is_noted = self.pending.contains(&ino)
            || self.freeing.get(&ino).is_some_and(|&below| number < below);
        let inode = self.inodes.get(&ino).and_then(|known| known.inode.as_ref());
        match inode.map(|inode| inode.chunk_len(number)) {
            Some(length) if length > 0 => {
                if length != chunk.len() as u64 {
                    return Err(Malformed::Contradiction);
                }
                if let Some(known) = self.inodes.get_mut(&ino) {
                    known.chunks += 1;
                }
            }
            _ if is_noted => {}
            _ => self.report.add(Finding::Stray {
                home,
                ino,
                chunk: number,
            }),
        }
        Ok(())
    }

    /// Holds what was learnt about each inode against what its objects say.
    fn judge(&mut self) {
        let reachable = self.reachable();
        let mut inos: Vec<Ino> = self.inodes.keys().copied().collect();
        inos.sort_unstable();
        if !self.inodes.get(&Ino::ROOT).is_some_and(Known::is_directory) {
            self.report.add(Finding::NoRoot);
        }
        for ino in inos {
            let known = &self.inodes[&ino];
            let (Some(inode), Some(stored)) = (&known.inode, known.count) else {
                self.report.add(Finding::Incomplete { ino });
                continue;
            };
            self.report.inodes += 1;
            let mut findings = Vec::new();
            if known.names == 0 && ino != Ino::ROOT {
                findings.push(Finding::Orphan { ino });
            }
            match (inode.kind, known.parent) {
                (Kind::Directory, Some(parent)) => {
                    let found = known.entries;
                    if stored != found {
                        findings.push(Finding::Entries { ino, stored, found });
                    }
                    let names = known.names;
                    let is_placed = if ino == Ino::ROOT {
                        names == 0 && parent == ino
                    } else {
                        names == 0 || (names == 1 && known.named_in == Some(parent))
                    };
                    if !is_placed {
                        findings.push(Finding::Misplaced { ino, parent, names });
                    } else if !reachable.contains(&ino) && names > 0 {
                        findings.push(Finding::Unreachable { ino });
                    }
                }
                (Kind::Directory, None) | (_, Some(_)) => {
                    findings.push(Finding::Incomplete { ino });
                }
                (_, None) => {
                    let found = known.names;
                    if stored != found {
                        findings.push(Finding::Names { ino, stored, found });
                    }
                    let (wanted, found) = (inode.chunks(), known.chunks);
                    if wanted != found {
                        findings.push(Finding::Chunks { ino, wanted, found });
                    }
                }
            }
            for finding in findings {
                self.report.add(finding);
            }
        }
    }

    /// Directories from which following the directories that hold a name ends at the root.
    fn reachable(&self) -> HashSet<Ino> {
        let mut children: HashMap<Ino, Vec<Ino>> = HashMap::new();
        for (ino, known) in &self.inodes {
            if let (true, Some(holder)) = (known.is_directory(), known.named_in) {
                children.entry(holder).or_default().push(*ino);
            }
        }
        let mut reached = HashSet::from([Ino::ROOT]);
        let mut stack = vec![Ino::ROOT];
        while let Some(ino) = stack.pop() {
            for child in children.remove(&ino).unwrap_or_default() {
                if reached.insert(child) {
                    stack.push(child);
                }
            }
        }
        reached
    }

    /// Fails unless an object is on its server and has its own key.
    fn demand_place(
        &self,
        found: (NodeId, &Key),
        home: NodeId,
        key: &Key,
    ) -> Result<(), Malformed> {
        if found == (home, key) {
            Ok(())
        } else {
            Err(Malformed::Key)
        }
    }

    /// Looks at every object of a range; what is malformed is a finding.
    fn each(
        &mut self,
        home: NodeId,
        range: Range,
        page_bytes: usize,
        mut look: impl FnMut(&mut Self, NodeId, &Key, &Bytes) -> Result<(), Malformed>,
    ) -> Result<(), TreeError> {
        let mut after: Option<Key> = None;
        loop {
            let rest = Range {
                lo: after.as_ref().map_or(range.lo, |key| key.slot),
                ..range
            };
            let page = self
                .tree
                .session()
                .scan(home, rest, after.as_ref(), page_bytes)?;
            for (key, value) in &page.entries {
                if let Err(why) = look(self, home, key, value) {
                    let key = key.clone();
                    self.report.add(Finding::Corrupt { home, key, why });
                }
            }
            match page.entries.last() {
                Some((key, _)) if page.more => after = Some(key.clone()),
                _ => return Ok(()),
            }
        }
    }
}
