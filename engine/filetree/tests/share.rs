//! Several clients store one directory together.

mod common;

use std::fs;

use common::{assert_same, life, noise, sample, session};
use lowtide_filetree::Progress;
use lowtide_filetree::check::check;
use lowtide_filetree::compare::{CompareOptions, compare};
use lowtide_filetree::fetch::{FetchOptions, fetch};
use lowtide_filetree::local::LocalTree;
use lowtide_filetree::store::{Share, StoreOptions, StoreReport, store};
use lowtide_filetree::tree::Tree;
use tempfile::TempDir;

/// Stores with `of` clients at once; their reports one by one.
fn store_together(base: &LocalTree, input: &TempDir, of: u32) -> Vec<StoreReport> {
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..of)
            .map(|index| {
                scope.spawn(move || {
                    let session = base.share(life(500 + index, 1));
                    let tree = Tree::open(&session).unwrap();
                    let options = StoreOptions {
                        share: Share { index, of },
                        threads: 2,
                        ..StoreOptions::default()
                    };
                    store(&tree, input.path(), &options, &Progress::default()).unwrap()
                })
            })
            .collect();
        clients.into_iter().map(|c| c.join().unwrap()).collect()
    })
}

#[test]
fn a_shared_store_is_whole_and_nothing_is_stored_twice() {
    let (input, output) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    sample(input.path());
    for d in 0..50 {
        let dir = input.path().join(format!("many/{}/{d}", d % 7));
        fs::create_dir_all(&dir).unwrap();
        for f in 0..20 {
            fs::write(dir.join(format!("{f}")), noise(f, 50)).unwrap();
        }
    }
    for of in [2, 3, 5] {
        let base = session();
        let mut total = StoreReport::default();
        for report in store_together(&base, &input, of) {
            assert!(report.files > 0, "a client of {of} had nothing to do");
            total.merge(report);
        }
        assert_eq!((total.files, total.symlinks, total.links), (1310, 3, 4));
        assert_eq!(total.directories, 6 + 1 + 7 + 50);
        let tree = Tree::open(&base).unwrap();
        let report = check(&tree).unwrap();
        assert_eq!((report.findings, report.unfinished), (vec![], vec![]));
        let report = compare(
            &tree,
            input.path(),
            &CompareOptions::default(),
            &Progress::default(),
        )
        .unwrap();
        assert_eq!(report.mismatches.list, vec![]);
        let to = output.path().join(format!("{of}"));
        fetch(&tree, &to, &FetchOptions::default(), &Progress::default()).unwrap();
        assert_same(input.path(), &to);
    }
}

#[test]
fn one_large_directory_is_divided() {
    let input = TempDir::new().unwrap();
    for f in 0..6000 {
        fs::write(input.path().join(format!("{f}")), b"").unwrap();
    }
    let base = session();
    let reports = store_together(&base, &input, 3);
    let files: Vec<u64> = reports.iter().map(|r| r.files).collect();
    assert_eq!(files.iter().sum::<u64>(), 6000);
    assert!(files.iter().all(|&n| n > 1500), "{files:?}");
}

#[test]
fn clients_that_store_the_very_same_thing_agree() {
    let input = TempDir::new().unwrap();
    sample(input.path());
    let base = session();
    std::thread::scope(|scope| {
        for node in 0..3 {
            let (base, input) = (&base, &input);
            scope.spawn(move || {
                // A large file may be overtaken by another client's; then the run ends, as it
                // does when a client is killed, and is repeated.
                for incarnation in 1.. {
                    assert!(incarnation < 100);
                    let session = base.share(life(500 + node, incarnation));
                    let tree = Tree::open(&session).unwrap();
                    let options = StoreOptions::default();
                    if store(&tree, input.path(), &options, &Progress::default()).is_ok() {
                        break;
                    }
                }
            });
        }
    });
    // Hard links that the clients chose different first names for are settled by one more run.
    let last = base.share(life(600, 1));
    let tree = Tree::open(&last).unwrap();
    store(
        &tree,
        input.path(),
        &StoreOptions::default(),
        &Progress::default(),
    )
    .unwrap();
    let report = check(&tree).unwrap();
    assert_eq!((report.findings, report.unfinished), (vec![], vec![]));
    let report = compare(
        &tree,
        input.path(),
        &CompareOptions::default(),
        &Progress::default(),
    )
    .unwrap();
    assert_eq!(report.mismatches.list, vec![]);
}
