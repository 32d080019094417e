//! Reading many inodes and small files at once: those whose numbers are close are scanned
//! together, as files created one after the other are.

use std::collections::{BTreeSet, HashMap, HashSet};

use lowtide_engine_core::ids::NodeId;
use lowtide_engine_core::op::{Bytes, Key, Range};
use lowtide_engine_core::session::Session;

use super::{StatRead, Tree};
use crate::error::TreeError;
use crate::layout::{self, Chunk, DATA, INODES, Ino, Inode};
use crate::tree::Stat;

/// Inodes whose numbers are at most this far apart are scanned together: what lies between is
/// cheaper than another question.
const INODE_GAP_MAX: u64 = 64;
/// The same for contents.
const DATA_GAP_MAX: u64 = 4;
/// Bytes of values per page of inodes.
const INODE_PAGE_BYTES: usize = 256 << 10;
/// Bytes of values per page of small files.
const DATA_PAGE_BYTES: usize = 4 << 20;

impl<S: Session + ?Sized> Tree<'_, S> {
    /// [`Tree::stat`] of many inodes. Those that do not exist are absent from the answer.
    ///
    /// # Errors
    /// Failures of the session. What is corrupt is answered one by one.
    pub fn stat_many(
        &self,
        inos: &[Ino],
    ) -> Result<HashMap<Ino, Result<Stat, TreeError>>, TreeError> {
        let mut parts: HashMap<Ino, Vec<(Key, Bytes)>> = HashMap::new();
        let wanted: HashSet<Ino> = inos.iter().copied().collect();
        self.scan_runs(
            (INODES, INODE_GAP_MAX),
            inos,
            |ino| self.layout.home(ino),
            INODE_PAGE_BYTES,
            |key, value| {
                if let Some(ino) = Ino::new(key.slot).filter(|ino| wanted.contains(ino)) {
                    parts.entry(ino).or_default().push((key, value));
                }
            },
        )?;
        let mut stats = HashMap::with_capacity(parts.len());
        for (ino, objects) in parts {
            match self.assemble(ino, objects) {
                Err(TreeError::NotFound) => {}
                other => {
                    stats.insert(ino, other.map(|StatRead { stat, .. }| stat));
                }
            }
        }
        Ok(stats)
    }

    /// Contents of many files of one chunk each. Files whose chunk is missing or is not what the
    /// inode demands are absent from the answer; reading them one by one tells why.
    ///
    /// # Errors
    /// Failures of the session.
    pub(crate) fn read_many(
        &self,
        files: &[(Ino, &Inode)],
    ) -> Result<HashMap<Ino, Chunk>, TreeError> {
        let inos: Vec<Ino> = files.iter().map(|(ino, _)| *ino).collect();
        let inodes: HashMap<Ino, &Inode> = files.iter().copied().collect();
        let mut chunks = HashMap::with_capacity(files.len());
        self.scan_runs(
            (DATA, DATA_GAP_MAX),
            &inos,
            |ino| self.layout.chunk_home(ino, 0),
            DATA_PAGE_BYTES,
            |key, value| {
                let file = Ino::new(key.slot).and_then(|ino| Some((ino, inodes.get(&ino)?)));
                if let Some((ino, inode)) = file
                    && layout::chunk_number(&key) == Some(0)
                    && let Ok(chunk) = Chunk::decode(&value)
                    && chunk.len() as u64 == inode.chunk_len(0)
                {
                    chunks.insert(ino, chunk);
                }
            },
        )?;
        Ok(chunks)
    }

    /// Scans a space on the homes of `inos`, around their numbers.
    fn scan_runs(
        &self,
        (space, gap_max): (u64, u64),
        inos: &[Ino],
        home: impl Fn(Ino) -> NodeId,
        page_bytes: usize,
        mut found: impl FnMut(Key, Bytes),
    ) -> Result<(), TreeError> {
        let mut sorted = inos.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        let is_close = |a: &Ino, b: &Ino| b.get() - a.get() <= gap_max;
        for run in sorted.chunk_by(is_close) {
            let (Some(first), Some(last)) = (run.first(), run.last()) else {
                continue;
            };
            let range = Range {
                space,
                lo: first.get(),
                hi: last.get(),
            };
            let homes: BTreeSet<NodeId> = run.iter().map(|&ino| home(ino)).collect();
            for home in homes {
                let mut after = None;
                loop {
                    let page = self.session.scan(home, range, after.as_ref(), page_bytes)?;
                    after = page.entries.last().map(|(key, _)| key.clone());
                    for (key, value) in page.entries {
                        found(key, value);
                    }
                    if !page.more {
                        break;
                    }
                }
            }
        }
        Ok(())
    }
}
