//! A pool of threads over a stack of tasks, some of which make more tasks. Last in, first out:
//! a walk goes deep before it goes wide, so few directories are open at a time.
//!
//! Deliberately absent: priorities, and any life beyond one [`run`].

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

/// The tasks of one run.
pub(crate) struct Pool<T, E> {
    state: Mutex<State<T, E>>,
    changed: Condvar,
}

struct State<T, E> {
    tasks: Vec<T>,
    /// Threads that have a task or may still make one.
    busy: usize,
    error: Option<E>,
}

impl<T, E> Pool<T, E> {
    /// Adds a task.
    pub fn push(&self, task: T) {
        self.lock().tasks.push(task);
        self.changed.notify_one();
    }

    /// Ends the run with this error, unless there is one already.
    fn fail(&self, error: E) {
        self.lock().error.get_or_insert(error);
        self.changed.notify_all();
    }

    /// The next task, or what this thread should do instead.
    fn next(&self) -> Next<T> {
        let mut state = self.lock();
        if state.error.is_some() {
            return Next::Stop;
        }
        match state.tasks.pop() {
            Some(task) => Next::Task(task),
            None => Next::Idle,
        }
    }

    /// Waits, idle, for a task; `None` when there will be none.
    fn wait(&self) -> Option<T> {
        let mut state = self.lock();
        state.busy -= 1;
        loop {
            if state.error.is_some() || (state.busy == 0 && state.tasks.is_empty()) {
                self.changed.notify_all();
                return None;
            }
            if let Some(task) = state.tasks.pop() {
                state.busy += 1;
                return Some(task);
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<T, E>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Next<T> {
    Task(T),
    Idle,
    Stop,
}

/// What one thread of a pool does.
pub(crate) trait Worker<T, E> {
    /// Does a task; may push others.
    fn work(&mut self, task: T, pool: &Pool<T, E>) -> Result<(), E>;

    /// Finishes the oldest of what tasks have left open, which may push others; `false` when nothing
    /// is open. Called when there is no task for the moment, and after a failure again and again,
    /// then with its own failures ignored.
    fn settle(&mut self, pool: &Pool<T, E>) -> Result<bool, E>;
}

/// Does `tasks` and all that they push, with one thread per worker; returns the workers.
///
/// # Errors
/// The first failure; tasks not begun by then are dropped.
pub(crate) fn run<T: Send, E: Send, W: Worker<T, E> + Send>(
    tasks: Vec<T>,
    workers: Vec<W>,
) -> Result<Vec<W>, E> {
    let pool = Pool {
        state: Mutex::new(State {
            tasks,
            busy: workers.len(),
            error: None,
        }),
        changed: Condvar::new(),
    };
    let workers = thread::scope(|scope| {
        let threads: Vec<_> = workers
            .into_iter()
            .map(|worker| scope.spawn(|| drive(worker, &pool)))
            .collect();
        threads
            .into_iter()
            .map(|thread| match thread.join() {
                Ok(worker) => worker,
                Err(panic) => std::panic::resume_unwind(panic),
            })
            .collect()
    });
    match pool.lock().error.take() {
        Some(error) => Err(error),
        None => Ok(workers),
    }
}

fn drive<T, E, W: Worker<T, E>>(mut worker: W, pool: &Pool<T, E>) -> W {
    /// A thread that panics must not leave the others waiting for it.
    struct Alarm<'p, T, E>(&'p Pool<T, E>);
    impl<T, E> Drop for Alarm<'_, T, E> {
        fn drop(&mut self) {
            if thread::panicking() {
                let mut state = self.0.lock();
                state.busy -= 1;
                state.tasks.clear();
                drop(state);
                self.0.changed.notify_all();
            }
        }
    }
    let _alarm = Alarm(pool);
    loop {
        let task = match pool.next() {
            Next::Task(task) => task,
            Next::Idle => match worker.settle(pool) {
                Ok(true) => continue,
                Ok(false) => match pool.wait() {
                    Some(task) => task,
                    None => return worker,
                },
                Err(error) => {
                    pool.fail(error);
                    continue;
                }
            },
            Next::Stop => {
                while !matches!(worker.settle(pool), Ok(false)) {}
                return worker;
            }
        };
        if let Err(error) = worker.work(task, pool) {
            pool.fail(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    struct Sum<'a>(&'a AtomicU64, Vec<u64>);

    impl Worker<u64, u64> for Sum<'_> {
        fn work(&mut self, task: u64, pool: &Pool<u64, u64>) -> Result<(), u64> {
            if task == 13 {
                return Err(task);
            }
            if task > 100 {
                pool.push(task / 2);
                pool.push(task - task / 2);
            } else {
                self.1.push(task);
            }
            Ok(())
        }

        fn settle(&mut self, _pool: &Pool<u64, u64>) -> Result<bool, u64> {
            let Some(n) = self.1.pop() else {
                return Ok(false);
            };
            self.0.fetch_add(n, Ordering::Relaxed);
            Ok(true)
        }
    }

    #[test]
    fn tasks_that_make_tasks_are_all_done_and_settled() {
        let total = AtomicU64::new(0);
        let workers = (0..4).map(|_| Sum(&total, Vec::new())).collect();
        run(vec![1_000_000, 17, 4], workers).unwrap();
        assert_eq!(total.load(Ordering::Relaxed), 1_000_021);
    }

    #[test]
    fn a_failure_ends_the_run() {
        let total = AtomicU64::new(0);
        let workers = (0..3).map(|_| Sum(&total, Vec::new())).collect();
        assert_eq!(run(vec![200, 13, 400], workers).err(), Some(13));
    }
}
