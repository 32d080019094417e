//! How much a session is asked: no round trip per file.

mod common;

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{noise, session};
use lowtide_engine_core::ids::{Life, NodeId};
use lowtide_engine_core::op::{Bytes, Expect, Key, Range, Request, Stamp};
use lowtide_engine_core::session::{Page, Placement, Session, SessionError, Ticket};
use lowtide_filetree::Progress;
use lowtide_filetree::compare::{CompareOptions, compare};
use lowtide_filetree::fetch::{FetchOptions, fetch};
use lowtide_filetree::local::LocalTree;
use lowtide_filetree::store::{StoreOptions, store};
use lowtide_filetree::tree::Tree;
use tempfile::TempDir;

/// Counts what it is asked.
struct Counting {
    inner: LocalTree,
    submits: AtomicU64,
    reads: AtomicU64,
    scans: AtomicU64,
    /// Checks that a lock on a range without objects cannot prove.
    unproven: AtomicU64,
    in_flight: AtomicU64,
    in_flight_max: AtomicU64,
}

impl Counting {
    fn take(&self) -> (u64, u64, u64) {
        let take = |n: &AtomicU64| n.swap(0, Ordering::Relaxed);
        (take(&self.submits), take(&self.reads), take(&self.scans))
    }
}

impl Session for Counting {
    fn placement(&self) -> &Placement {
        self.inner.placement()
    }

    fn life(&self) -> Life {
        self.inner.life()
    }

    fn submit(&self, request: Request) -> Result<Ticket, SessionError> {
        self.submits.fetch_add(1, Ordering::Relaxed);
        let unproven = request.checks.iter().filter(|c| c.expect != Expect::Absent);
        self.unproven
            .fetch_add(unproven.count() as u64, Ordering::Relaxed);
        let open = self.in_flight.fetch_add(1, Ordering::Relaxed) + 1;
        self.in_flight_max.fetch_max(open, Ordering::Relaxed);
        self.inner.submit(request)
    }

    fn wait(&self, ticket: Ticket) -> Result<Stamp, SessionError> {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.inner.wait(ticket)
    }

    fn wait_stable(&self) -> Result<(), SessionError> {
        self.inner.wait_stable()
    }

    fn read(&self, home: NodeId, key: &Key) -> Result<Option<Bytes>, SessionError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.inner.read(home, key)
    }

    fn scan(
        &self,
        home: NodeId,
        range: Range,
        after: Option<&Key>,
        bytes_max: usize,
    ) -> Result<Page, SessionError> {
        self.scans.fetch_add(1, Ordering::Relaxed);
        self.inner.scan(home, range, after, bytes_max)
    }
}

#[test]
fn a_file_is_one_operation_and_reading_goes_by_pages() {
    const DIRECTORIES: u64 = 20;
    const FILES: u64 = 200 * DIRECTORIES;
    let (input, output) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    for d in 0..DIRECTORIES {
        let dir = input.path().join(format!("{d}"));
        fs::create_dir(&dir).unwrap();
        for f in 0..FILES / DIRECTORIES {
            fs::write(dir.join(format!("{f}")), noise(f, 100)).unwrap();
        }
    }
    let session = Counting {
        inner: session(),
        submits: AtomicU64::new(0),
        reads: AtomicU64::new(0),
        scans: AtomicU64::new(0),
        unproven: AtomicU64::new(0),
        in_flight: AtomicU64::new(0),
        in_flight_max: AtomicU64::new(0),
    };
    let progress = Progress::default();
    let tree = Tree::open(&session).unwrap();
    session.take();
    store(&tree, input.path(), &StoreOptions::default(), &progress).unwrap();
    let (submits, reads, scans) = session.take();
    // One for each file and directory, one for the attributes of the top.
    assert_eq!(submits, FILES + DIRECTORIES + 1);
    assert!(reads + scans < 20, "{reads} reads, {scans} scans");
    // Of these only the last depends on an object that exists.
    assert_eq!(session.unproven.load(Ordering::Relaxed), 1);
    let deep = session.in_flight_max.load(Ordering::Relaxed);
    // The windows of all threads, and an operation that each waits for at once.
    assert!((500..=2048 + 16).contains(&deep), "{deep} in flight");

    store(&tree, input.path(), &StoreOptions::default(), &progress).unwrap();
    let (submits, reads, scans) = session.take();
    // A directory that exists is found by trying to create it.
    assert_eq!(submits, DIRECTORIES);
    assert!(reads + scans < FILES / 5, "{reads} reads, {scans} scans");

    compare(&tree, input.path(), &CompareOptions::default(), &progress).unwrap();
    let (submits, reads, scans) = session.take();
    assert_eq!(submits, 0);
    assert!(reads + scans < FILES / 5, "{reads} reads, {scans} scans");

    let to = output.path().join("to");
    fetch(&tree, &to, &FetchOptions::default(), &progress).unwrap();
    let (submits, reads, scans) = session.take();
    assert_eq!(submits, 0);
    assert!(reads + scans < FILES / 5, "{reads} reads, {scans} scans");
}
