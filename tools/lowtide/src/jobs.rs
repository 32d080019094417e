//! Work on the file tree inside a client process, and how far it is.
//!
//! One thread owns the session and the tree on it; each job is a thread of its own beside the
//! others. A job ends by itself once the session is closed, so stopping the node ends all jobs.
//!
//! Deliberately absent: what the commands on names do ([`crate::files`]).

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, UNIX_EPOCH};

use lowtide_engine_core::session::Session;
use lowtide_filetree::check;
use lowtide_filetree::compare::{self, CompareOptions};
use lowtide_filetree::store::{self, Share, StoreOptions, StoreReport};
use lowtide_filetree::tree::Tree;
use lowtide_filetree::{Notes, Progress as TreeProgress};

use crate::control::{Job, JobReport, Outcome, Progress};
use crate::{files, journal};

/// Most jobs at one time, those included whose outcome nobody has fetched.
const JOBS_MAX: usize = 64;
/// Most notes of one kind in an outcome.
const NOTES_MAX: usize = 100;

/// The jobs of one client.
#[derive(Debug)]
pub struct Jobs {
    table: Arc<Mutex<Table>>,
    orders: Option<Sender<(u64, Job)>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Table {
    last: u64,
    jobs: BTreeMap<u64, Entry>,
}

#[derive(Debug, Default)]
struct Entry {
    progress: Arc<TreeProgress>,
    outcome: Option<Outcome>,
}

impl Jobs {
    /// Makes ready for jobs on `session`.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start<S: Session + Send + 'static>(session: S) -> std::io::Result<Jobs> {
        let table = Arc::new(Mutex::new(Table::default()));
        let (orders, receiver) = channel();
        let shared = Arc::clone(&table);
        let thread = std::thread::Builder::new()
            .name("jobs".to_owned())
            .spawn(move || serve(&session, &receiver, &shared))?;
        Ok(Jobs {
            table,
            orders: Some(orders),
            thread: Some(thread),
        })
    }

    /// Starts a job and returns its number.
    ///
    /// # Errors
    /// There are too many.
    pub fn submit(&self, job: Job) -> Result<u64, String> {
        let mut table = lock(&self.table);
        if table.jobs.len() >= JOBS_MAX {
            return Err(format!("{JOBS_MAX} jobs are in progress already"));
        }
        table.last += 1;
        let id = table.last;
        table.jobs.insert(id, Entry::default());
        let sent = self.orders.as_ref().map(|orders| orders.send((id, job)));
        match sent {
            Some(Ok(())) => Ok(id),
            _ => Err("the client is going down".to_owned()),
        }
    }

    /// Every job that was not forgotten.
    #[must_use]
    pub fn reports(&self) -> Vec<JobReport> {
        lock(&self.table)
            .jobs
            .iter()
            .map(|(id, entry)| JobReport {
                id: *id,
                progress: Progress {
                    entries: entry.progress.entries(),
                    bytes: entry.progress.bytes(),
                },
                outcome: entry.outcome.clone(),
            })
            .collect()
    }

    /// Forgets a job that has ended; one that goes on is forgotten by nobody.
    pub fn forget(&self, id: u64) {
        let mut table = lock(&self.table);
        if table.jobs.get(&id).is_some_and(|e| e.outcome.is_some()) {
            table.jobs.remove(&id);
        }
    }
}

impl Drop for Jobs {
    /// Waits for the jobs: whoever drops this has closed the session, or waits for their work.
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock(table: &Mutex<Table>) -> MutexGuard<'_, Table> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs jobs until there can be no more.
fn serve<S: Session + Send>(session: &S, orders: &Receiver<(u64, Job)>, table: &Mutex<Table>) {
    let finish = |id, outcome| {
        if let Some(entry) = lock(table).jobs.get_mut(&id) {
            entry.outcome = Some(outcome);
        }
    };
    // A session has one tree; it is opened by the first job and shared by all.
    let mut tree: Option<Arc<Tree<'_, S>>> = None;
    std::thread::scope(|scope| {
        for (id, job) in orders {
            let opened = match &tree {
                Some(tree) => Ok(Arc::clone(tree)),
                None => Tree::open(session).map(Arc::new),
            };
            let opened = match opened {
                Ok(opened) => opened,
                Err(error) => {
                    let reason = error.to_string();
                    finish(id, Outcome::Failed { reason });
                    continue;
                }
            };
            tree = Some(Arc::clone(&opened));
            let progress = match lock(table).jobs.get(&id) {
                Some(entry) => Arc::clone(&entry.progress),
                None => continue,
            };
            scope.spawn(move || finish(id, execute(&opened, &job, &progress)));
        }
    });
}

/// Does a job to its end.
pub fn execute<S: Session + ?Sized>(
    tree: &Tree<'_, S>,
    job: &Job,
    progress: &TreeProgress,
) -> Outcome {
    let done = match job {
        Job::Store {
            input,
            share,
            shares,
            journal,
        } => {
            let options = StoreOptions {
                share: Share {
                    index: *share,
                    of: *shares,
                },
                ..StoreOptions::default()
            };
            let journal = journal.as_ref().map(|path| path.0.as_path());
            store_share(tree, &input.0, options, journal, progress)
        }
        Job::Verify { input, since } => verify(tree, &input.0, *since, progress),
        Job::Files(job) => {
            files::execute(tree, job, progress).map(|lines| Outcome::Output { lines })
        }
    };
    done.unwrap_or_else(|reason| Outcome::Failed { reason })
}

fn store_share<S: Session + ?Sized>(
    tree: &Tree<'_, S>,
    input: &Path,
    mut options: StoreOptions,
    journal: Option<&Path>,
    progress: &TreeProgress,
) -> Result<Outcome, String> {
    let Share { index, of } = options.share;
    if index >= of {
        return Err(format!("no share {index} of {of}"));
    }
    let Some(path) = journal else {
        let report = store::store(tree, input, &options, progress).map_err(words)?;
        return Ok(stored(&report));
    };
    let failed = |error: std::io::Error| format!("{}: {error}", path.display());
    let file = journal::open(path).map_err(failed)?;
    let (executed, receiver) = channel();
    options.executed = Some(executed);
    std::thread::scope(|scope| {
        let keeper = scope.spawn(move || journal::keep(tree.session(), receiver, file));
        let report = store::store(tree, input, &options, progress).map_err(words);
        // The keeper ends once nothing can arrive any more.
        drop(options);
        let kept = keeper
            .join()
            .unwrap_or_else(|_| Err(std::io::ErrorKind::Other.into()));
        kept.map_err(failed)?;
        Ok(stored(&report?))
    })
}

fn stored(report: &StoreReport) -> Outcome {
    Outcome::Stored {
        unreadable_count: report.unreadable.count,
        unreadable: lines(&report.unreadable),
        skipped: lines(&report.special),
        changed: lines(&report.changed),
    }
}

fn verify<S: Session + ?Sized>(
    tree: &Tree<'_, S>,
    input: &Path,
    since: u64,
    progress: &TreeProgress,
) -> Result<Outcome, String> {
    let options = CompareOptions {
        since: UNIX_EPOCH.checked_add(Duration::from_secs(since)),
        ..CompareOptions::default()
    };
    let compared = compare::compare(tree, input, &options, progress).map_err(words)?;
    let checked = check::check(tree).map_err(words)?;
    let findings = checked.findings.iter().take(NOTES_MAX);
    let mut problems = lines(&compared.mismatches);
    problems.extend(findings.map(ToString::to_string));
    Ok(Outcome::Verified {
        entries: compared.entries,
        bytes: compared.bytes,
        mismatches: compared.mismatches.count,
        partial_operations: checked.finding_count,
        problems,
        changed: lines(&compared.changed),
    })
}

fn lines(notes: &Notes) -> Vec<String> {
    notes
        .list
        .iter()
        .take(NOTES_MAX)
        .map(ToString::to_string)
        .collect()
}

/// An error with its causes.
pub(crate) fn words(error: impl std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use lowtide_engine_core::ids::{Incarnation, Life, NodeId};
    use lowtide_engine_core::session::Placement;
    use lowtide_filetree::local::LocalTree;

    use super::*;
    use crate::control::{FileJob, RawPath};

    fn jobs() -> Jobs {
        let placement = Placement {
            meta: vec![NodeId(2)],
            object: vec![NodeId(3)],
        };
        let life = Life {
            node: NodeId(9),
            incarnation: Incarnation(1),
        };
        Jobs::start(LocalTree::new(placement, life)).unwrap()
    }

    fn outcome(jobs: &Jobs, job: Job) -> Outcome {
        let id = jobs.submit(job).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let report = jobs.reports().into_iter().find(|r| r.id == id).unwrap();
            if let Some(outcome) = report.outcome {
                jobs.forget(id);
                return outcome;
            }
            assert!(Instant::now() < deadline, "the job does not end");
            std::thread::yield_now();
        }
    }

    #[test]
    fn shares_make_up_the_whole_and_are_verified() {
        let tmp = tempfile::tempdir().unwrap();
        for i in 0..50 {
            let dir = tmp.path().join(format!("d{}", i % 7));
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(dir.join(format!("f{i}")), vec![i; 100 * i as usize]).unwrap();
        }
        let input = RawPath(tmp.path().to_owned());
        let since = 1; // Long ago: changes after this are excused, so none may be made.
        let jobs = jobs();
        for share in 0..2 {
            let stored = outcome(
                &jobs,
                Job::Store {
                    input: input.clone(),
                    share,
                    shares: 2,
                    journal: None,
                },
            );
            assert!(matches!(
                stored,
                Outcome::Stored {
                    unreadable_count: 0,
                    ..
                }
            ));
        }
        let verified = outcome(
            &jobs,
            Job::Verify {
                input: input.clone(),
                since,
            },
        );
        assert!(
            matches!(
                verified,
                Outcome::Verified {
                    entries: 58,
                    mismatches: 0,
                    ..
                }
            ),
            "{verified:?}"
        );
        let removed = outcome(
            &jobs,
            Job::Files(FileJob::Rm {
                path: RawPath("/d3/f3".into()),
                recursive: false,
            }),
        );
        assert_eq!(removed, Outcome::Output { lines: Vec::new() });
        let later = u64::MAX >> 8;
        match outcome(
            &jobs,
            Job::Verify {
                input,
                since: later,
            },
        ) {
            Outcome::Verified {
                mismatches: 1,
                problems,
                ..
            } => assert!(problems[0].contains("d3/f3"), "{problems:?}"),
            other => panic!("{other:?}"),
        }
        assert_eq!(jobs.reports(), []);
    }

    #[test]
    fn a_job_that_cannot_be_done_says_why() {
        let jobs = jobs();
        let failed = outcome(
            &jobs,
            Job::Store {
                input: RawPath("/nonexistent/input".into()),
                share: 0,
                shares: 1,
                journal: None,
            },
        );
        match failed {
            Outcome::Failed { reason } => assert!(reason.contains("/nonexistent/input")),
            other => panic!("{other:?}"),
        }
    }
}
