//! A client that is killed while it stores, again and again, at every point.

mod common;

use std::fs;
use std::path::Path;
use std::sync::Mutex;

use common::{life, noise, session};
use lowtide_engine_core::ids::{Life, NodeId};
use lowtide_engine_core::op::{Bytes, Key, Range, Request, Stamp};
use lowtide_engine_core::session::{Page, Placement, Session, SessionError, Ticket};
use lowtide_filetree::Progress;
use lowtide_filetree::check::check;
use lowtide_filetree::compare::{CompareOptions, compare};
use lowtide_filetree::local::LocalTree;
use lowtide_filetree::store::{Share, StoreOptions, store};
use lowtide_filetree::tree::Tree;
use tempfile::TempDir;

/// A session that dies: `whole` submitted operations take effect, of the next `torn` ones only
/// some, then nothing is answered any more.
struct Mortal {
    inner: LocalTree,
    lived: Mutex<Lived>,
}

struct Lived {
    whole: u64,
    torn: u64,
    dice: u64,
}

impl Mortal {
    fn new(inner: LocalTree, whole: u64, torn: u64) -> Mortal {
        let dice = whole.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let lived = Mutex::new(Lived { whole, torn, dice });
        Mortal { inner, lived }
    }

    fn demand_alive(&self) -> Result<(), SessionError> {
        let lived = self.lived.lock().unwrap();
        if lived.whole == 0 && lived.torn == 0 {
            return Err(SessionError::Closed);
        }
        Ok(())
    }
}

impl Session for Mortal {
    fn placement(&self) -> &Placement {
        self.inner.placement()
    }

    fn life(&self) -> Life {
        self.inner.life()
    }

    fn submit(&self, request: Request) -> Result<Ticket, SessionError> {
        let mut lived = self.lived.lock().unwrap();
        if lived.whole > 0 {
            lived.whole -= 1;
            return self.inner.submit(request);
        }
        lived.torn = lived.torn.checked_sub(1).ok_or(SessionError::Closed)?;
        lived.dice ^= lived.dice << 13;
        lived.dice ^= lived.dice >> 7;
        lived.dice ^= lived.dice << 17;
        if lived.dice.is_multiple_of(2) {
            self.inner.submit(request)
        } else {
            Ok(Ticket(u64::MAX)) // lost with the client
        }
    }

    fn wait(&self, ticket: Ticket) -> Result<Stamp, SessionError> {
        self.demand_alive()?;
        self.inner.wait(ticket)
    }

    fn wait_stable(&self) -> Result<(), SessionError> {
        self.demand_alive()
    }

    fn read(&self, home: NodeId, key: &Key) -> Result<Option<Bytes>, SessionError> {
        self.demand_alive()?;
        self.inner.read(home, key)
    }

    fn scan(
        &self,
        home: NodeId,
        range: Range,
        after: Option<&Key>,
        bytes_max: usize,
    ) -> Result<Page, SessionError> {
        self.demand_alive()?;
        self.inner.scan(home, range, after, bytes_max)
    }
}

fn input() -> TempDir {
    let input = TempDir::new().unwrap();
    let top = input.path();
    for d in 0..4 {
        let dir = top.join(format!("dir {d}/sub"));
        fs::create_dir_all(&dir).unwrap();
        for f in 0..6 {
            fs::write(dir.join(format!("{f}")), noise(f, 100 * f as usize)).unwrap();
        }
        fs::write(dir.join("large"), noise(d, 60_000)).unwrap();
        fs::write(dir.join("huge"), noise(d, 400_000)).unwrap();
        std::os::unix::fs::symlink("0", dir.join("link")).unwrap();
        fs::hard_link(dir.join("1"), top.join(format!("dir {d}/one"))).unwrap();
        fs::hard_link(dir.join("large"), top.join(format!("large {d}"))).unwrap();
    }
    input
}

fn options(share: Share, threads: usize) -> StoreOptions {
    StoreOptions {
        share,
        threads,
        ..StoreOptions::default()
    }
}

fn assert_complete(session: &LocalTree, input: &Path, context: &str) {
    let tree = Tree::open(session).unwrap();
    let report = compare(
        &tree,
        input,
        &CompareOptions::default(),
        &Progress::default(),
    )
    .unwrap();
    assert_eq!(report.mismatches.list, vec![], "{context}");
    let report = check(&tree).unwrap();
    assert_eq!(report.findings, vec![], "{context}");
    assert_eq!(report.unfinished, vec![], "{context}");
    assert_eq!(report.unfreed, vec![], "{context}");
}

#[test]
fn a_half_stored_tree_is_completed_wherever_it_stopped() {
    let input = input();
    for threads in [1, 3] {
        for kill in 0..120 {
            let base = session();
            let mortal = Mortal::new(base.share(life(300, 1)), kill, kill % 7);
            if let Ok(tree) = Tree::with_chunk_log2(&mortal, 12) {
                let options = options(Share::ALL, threads);
                let outcome = store(&tree, input.path(), &options, &Progress::default());
                assert!(kill > 60 || outcome.is_err());
            }
            // What is there is consistent, whole files only.
            // The client comes back, or another takes its place.
            let other = base.share(if kill % 2 == 0 {
                life(300, 2)
            } else {
                life(301, 1)
            });
            let tree = Tree::with_chunk_log2(&other, 12).unwrap();
            let context = format!("{threads} threads, killed at {kill}");
            assert_eq!(check(&tree).unwrap().findings, vec![], "{context}");
            let options = options(Share::ALL, threads);
            store(&tree, input.path(), &options, &Progress::default()).unwrap();
            assert_complete(&base, input.path(), &context);
        }
    }
}

#[test]
fn a_client_killed_many_times_gets_there() {
    let input = input();
    let base = session();
    let mut lives = 0;
    loop {
        lives += 1;
        // Enough for the 18 operations of a large file, which a life begins anew, and for little else.
        let mortal = Mortal::new(base.share(life(300, lives)), 20, 4);
        let Ok(tree) = Tree::with_chunk_log2(&mortal, 12) else {
            continue;
        };
        // Two threads may share a life so that neither finishes its file; one does.
        let options = options(Share::ALL, 1 + lives as usize % 2);
        match store(&tree, input.path(), &options, &Progress::default()) {
            Ok(_) => break,
            Err(_) => assert!(lives < 1000, "no progress"),
        }
    }
    assert!(lives > 4, "{lives}");
    assert_complete(&base, input.path(), "at last");
}

#[test]
fn of_sharing_clients_one_is_killed_and_comes_back() {
    let input = input();
    for kill in (0..40).step_by(3) {
        let base = session();
        std::thread::scope(|scope| {
            for index in 0..3 {
                let (base, input) = (&base, input.path());
                scope.spawn(move || {
                    let share = Share { index, of: 3 };
                    let own = |incarnation| base.share(life(400 + index, incarnation));
                    if index == 1 {
                        let mortal = Mortal::new(own(1), kill, 3);
                        if let Ok(tree) = Tree::with_chunk_log2(&mortal, 12) {
                            let _ = store(&tree, input, &options(share, 2), &Progress::default());
                        }
                    }
                    let session = own(2);
                    let tree = Tree::with_chunk_log2(&session, 12).unwrap();
                    store(&tree, input, &options(share, 2), &Progress::default()).unwrap();
                });
            }
        });
        assert_complete(&base, input.path(), &format!("killed at {kill}"));
    }
}
