//! An application's threads on one side, the engine's thread on the other.
//!
//! Commands cross a bounded channel and wake the engine thread; outcomes come back through a table
//! of tickets. Submission blocks only for back-pressure: when too many operations wait for their
//! execution, or too many bytes wait for their commit.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use lowtide_engine_core::ids::{Life, NodeId};
use lowtide_engine_core::op::{Bytes, Key, Range, Request, Stamp};
use lowtide_engine_core::session::{Page, Placement, Scan, Session, SessionError, Ticket};
use lowtide_transport::message::Waker;

/// Operations submitted and not executed at one time.
const UNEXECUTED_MAX: usize = 2048;
/// Bytes submitted and not executed, or executed and not everywhere committed, at one time. Less than
/// the mind's budget, so that callers wait here, where they do not hold locks.
const UNCOMMITTED_BYTES_MAX: u64 = 48 << 20;

/// What the engine thread is asked.
#[derive(Debug)]
pub(crate) enum Command {
    Submit {
        ticket: Ticket,
        request: Request,
    },
    Read {
        ticket: Ticket,
        home: NodeId,
        key: Key,
    },
    Scan {
        ticket: Ticket,
        home: NodeId,
        range: Range,
        after: Option<Key>,
        bytes_max: u32,
    },
    /// Answer once every ticket up to this one has its outcome and all are stable.
    Barrier {
        ticket: Ticket,
    },
    Block {
        peer: NodeId,
        blocked: bool,
    },
    DeclareDead {
        node: NodeId,
    },
    Stop,
}

/// What became of a ticket.
#[derive(Debug)]
pub(crate) enum Outcome {
    Stamped(Result<Stamp, SessionError>),
    Value(Result<Option<Bytes>, SessionError>),
    Listing(Result<Page, SessionError>),
    Stable(Result<(), SessionError>),
}

#[derive(Debug, Default)]
struct Table {
    done: HashMap<Ticket, Outcome>,
    /// Weight of each operation without an outcome.
    open: HashMap<Ticket, (u64, Instant)>,
    /// Tickets whose owner waits or will wait.
    life: Option<Life>,
    closed: bool,
}

/// State shared by the handles and the engine thread.
#[derive(Debug)]
pub(crate) struct Shared {
    table: Mutex<Table>,
    changed: Condvar,
    next: AtomicU64,
    unexecuted_bytes: AtomicU64,
    /// Bytes the engine holds for redo, told by the engine thread.
    held_bytes: AtomicU64,
    awake: AtomicBool,
}

impl Shared {
    pub(crate) fn new() -> Arc<Shared> {
        Arc::new(Shared {
            table: Mutex::new(Table::default()),
            changed: Condvar::new(),
            next: AtomicU64::new(1),
            unexecuted_bytes: AtomicU64::new(0),
            held_bytes: AtomicU64::new(0),
            awake: AtomicBool::new(false),
        })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Engine thread: outcomes of one round. Returns the latencies of executed operations.
    pub(crate) fn deliver(
        &self,
        outcomes: &mut Vec<(Ticket, Outcome)>,
        latency: &mut dyn FnMut(Duration),
    ) {
        if outcomes.is_empty() {
            return;
        }
        let now = Instant::now();
        let mut table = self.table();
        for (ticket, outcome) in outcomes.drain(..) {
            if let Some((weight, since)) = table.open.remove(&ticket) {
                self.unexecuted_bytes.fetch_sub(weight, Ordering::Relaxed);
                if matches!(outcome, Outcome::Stamped(Ok(_))) {
                    latency(now.duration_since(since));
                }
            }
            table.done.insert(ticket, outcome);
        }
        drop(table);
        self.changed.notify_all();
    }

    /// Engine thread: the life under which operations are stamped.
    pub(crate) fn joined(&self, life: Life) {
        self.table().life = Some(life);
        self.changed.notify_all();
    }

    /// Engine thread: how much is held for redo.
    pub(crate) fn set_held(&self, bytes: u64) {
        let before = self.held_bytes.swap(bytes, Ordering::Relaxed);
        if before > UNCOMMITTED_BYTES_MAX && bytes <= UNCOMMITTED_BYTES_MAX {
            let _table = self.table();
            self.changed.notify_all();
        }
    }

    /// Engine thread: about to look for commands.
    pub(crate) fn rearm(&self) {
        self.awake.store(false, Ordering::SeqCst);
    }

    /// The session is over; everybody who waits is told.
    pub(crate) fn close(&self) {
        self.table().closed = true;
        self.changed.notify_all();
    }
}

/// A session on a running client node. Cheap to clone; shared by threads.
#[derive(Clone, Debug)]
pub struct SessionHandle {
    shared: Arc<Shared>,
    commands: Sender<Command>,
    waker: Waker,
    placement: Arc<Placement>,
}

impl SessionHandle {
    pub(crate) fn new(
        shared: Arc<Shared>,
        commands: Sender<Command>,
        waker: Waker,
        placement: Placement,
    ) -> SessionHandle {
        SessionHandle {
            shared,
            commands,
            waker,
            placement: Arc::new(placement),
        }
    }

    /// Waits until the client has joined the cluster; `false` when the time is over first.
    #[must_use]
    pub fn wait_joined(&self, timeout: Duration) -> bool {
        let since = Instant::now();
        let mut table = self.shared.table();
        while table.life.is_none() && !table.closed {
            let Some(left) = timeout.checked_sub(since.elapsed()) else {
                return false;
            };
            let waited = self.shared.changed.wait_timeout(table, left);
            table = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        !table.closed
    }

    fn ticket(&self) -> Ticket {
        Ticket(self.shared.next.fetch_add(1, Ordering::Relaxed))
    }

    fn send(&self, command: Command) -> Result<(), SessionError> {
        self.commands
            .send(command)
            .map_err(|_| SessionError::Closed)?;
        // One wake for all commands until the engine thread looks again.
        if !self.shared.awake.swap(true, Ordering::SeqCst) {
            self.waker.wake().map_err(|_| SessionError::Closed)?;
        }
        Ok(())
    }

    fn outcome(&self, ticket: Ticket) -> Result<Outcome, SessionError> {
        let mut table = self.shared.table();
        loop {
            if let Some(outcome) = table.done.remove(&ticket) {
                return Ok(outcome);
            }
            if table.closed {
                return Err(SessionError::Closed);
            }
            table = self
                .shared
                .changed
                .wait(table)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Blocks while too much is under way, then enters the operation.
    fn admit(&self, ticket: Ticket, weight: u64) -> Result<(), SessionError> {
        let mut table = self.shared.table();
        loop {
            if table.closed {
                return Err(SessionError::Closed);
            }
            let waiting = self.shared.unexecuted_bytes.load(Ordering::Relaxed);
            let held = self.shared.held_bytes.load(Ordering::Relaxed);
            let crowded = table.open.len() >= UNEXECUTED_MAX
                || (waiting + held > UNCOMMITTED_BYTES_MAX && waiting > 0)
                || held > UNCOMMITTED_BYTES_MAX;
            if !crowded {
                break;
            }
            table = self
                .shared
                .changed
                .wait(table)
                .unwrap_or_else(PoisonError::into_inner);
        }
        self.shared
            .unexecuted_bytes
            .fetch_add(weight, Ordering::Relaxed);
        table.open.insert(ticket, (weight, Instant::now()));
        Ok(())
    }
}

impl Session for SessionHandle {
    fn placement(&self) -> &Placement {
        &self.placement
    }

    fn life(&self) -> Life {
        let mut table = self.shared.table();
        loop {
            if let Some(life) = table.life {
                return life;
            }
            if table.closed {
                // Nothing can be made under it: every call on a closed session fails.
                return Life::default();
            }
            table = self
                .shared
                .changed
                .wait(table)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn submit(&self, request: Request) -> Result<Ticket, SessionError> {
        let ticket = self.ticket();
        let weight = request
            .updates
            .iter()
            .map(|u| u.change.weight() + 128)
            .sum::<usize>();
        self.admit(ticket, weight as u64)?;
        self.send(Command::Submit { ticket, request })?;
        Ok(ticket)
    }

    fn wait(&self, ticket: Ticket) -> Result<Stamp, SessionError> {
        match self.outcome(ticket)? {
            Outcome::Stamped(result) => result,
            _ => Err(SessionError::Closed),
        }
    }

    fn wait_stable(&self) -> Result<(), SessionError> {
        let ticket = self.ticket();
        self.send(Command::Barrier { ticket })?;
        match self.outcome(ticket)? {
            Outcome::Stable(result) => result,
            _ => Err(SessionError::Closed),
        }
    }

    fn read(&self, home: NodeId, key: &Key) -> Result<Option<Bytes>, SessionError> {
        let ticket = self.ticket();
        self.send(Command::Read {
            ticket,
            home,
            key: key.clone(),
        })?;
        match self.outcome(ticket)? {
            Outcome::Value(result) => result,
            _ => Err(SessionError::Closed),
        }
    }

    fn scan(
        &self,
        home: NodeId,
        range: Range,
        after: Option<&Key>,
        bytes_max: usize,
    ) -> Result<Page, SessionError> {
        self.scanned(self.scan_ahead(home, range, after, bytes_max))
    }

    fn scan_ahead(
        &self,
        home: NodeId,
        range: Range,
        after: Option<&Key>,
        bytes_max: usize,
    ) -> Scan {
        let ticket = self.ticket();
        let asked = self.send(Command::Scan {
            ticket,
            home,
            range,
            after: after.cloned(),
            bytes_max: u32::try_from(bytes_max).unwrap_or(u32::MAX),
        });
        match asked {
            Ok(()) => Scan::Asked(ticket),
            Err(error) => Scan::Done(Err(error)),
        }
    }

    fn scanned(&self, scan: Scan) -> Result<Page, SessionError> {
        match scan {
            Scan::Done(result) => result,
            Scan::Asked(ticket) => match self.outcome(ticket)? {
                Outcome::Listing(result) => result,
                _ => Err(SessionError::Closed),
            },
        }
    }
}

/// Engine thread's record of what has been submitted and what is stable.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    open: HashSet<Ticket>,
    barriers: Vec<Barrier>,
    newest: Option<Stamp>,
}

/// Somebody waits until every ticket up to this one has its outcome and all are stable.
#[derive(Debug)]
struct Barrier {
    ticket: Ticket,
    /// Newest stamp when the last of them had its outcome; later ones do not concern it, so that
    /// others who go on submitting cannot hold it up.
    covers: Option<Option<Stamp>>,
}

impl Ledger {
    pub(crate) fn submitted(&mut self, ticket: Ticket) {
        self.open.insert(ticket);
    }

    pub(crate) fn finished(&mut self, ticket: Ticket, result: &Result<Stamp, SessionError>) {
        self.open.remove(&ticket);
        if let Ok(stamp) = result {
            self.newest = self.newest.max(Some(*stamp));
        }
    }

    pub(crate) fn barrier(&mut self, ticket: Ticket) {
        self.barriers.push(Barrier {
            ticket,
            covers: None,
        });
    }

    /// Barriers that are passed when m is `minimum`.
    pub(crate) fn passed(&mut self, minimum: u64, out: &mut Vec<(Ticket, Outcome)>) {
        if self.barriers.is_empty() {
            return;
        }
        let first_open = self.open.iter().min().copied();
        let newest = self.newest;
        self.barriers.retain_mut(|barrier| {
            if barrier.covers.is_none() && first_open.is_none_or(|open| open > barrier.ticket) {
                barrier.covers = Some(newest);
            }
            let passed = barrier
                .covers
                .is_some_and(|stamp| stamp.is_none_or(|stamp| stamp.epoch.0 < minimum));
            if passed {
                out.push((barrier.ticket, Outcome::Stable(Ok(()))));
            }
            !passed
        });
    }
}

#[cfg(test)]
mod tests {
    use lowtide_engine_core::ids::{Epoch, OpId, Seq};

    use super::*;

    fn stamp(seq: u64, epoch: u64) -> Result<Stamp, SessionError> {
        let source = Life::default();
        let id = OpId {
            source,
            seq: Seq(seq),
        };
        let epoch = Epoch(epoch);
        Ok(Stamp { id, epoch })
    }

    /// Tickets of the barriers that are passed at `minimum`.
    fn passed(ledger: &mut Ledger, minimum: u64) -> Vec<u64> {
        let mut out = Vec::new();
        ledger.passed(minimum, &mut out);
        out.iter().map(|(ticket, _)| ticket.0).collect()
    }

    #[test]
    fn a_barrier_waits_for_what_came_before_it_and_for_nothing_else() {
        let mut ledger = Ledger::default();
        ledger.submitted(Ticket(1));
        ledger.submitted(Ticket(2));
        ledger.barrier(Ticket(3));
        ledger.finished(Ticket(2), &stamp(2, 8));
        assert_eq!(passed(&mut ledger, 100), [0; 0], "ticket 1 is open");
        ledger.finished(Ticket(1), &stamp(1, 7));
        assert_eq!(passed(&mut ledger, 8), [0; 0], "epoch 8 is not below 8");
        // Somebody goes on submitting.
        ledger.submitted(Ticket(4));
        ledger.finished(Ticket(4), &stamp(4, 50));
        ledger.submitted(Ticket(5));
        assert_eq!(passed(&mut ledger, 9), [3]);
        assert_eq!(passed(&mut ledger, 9), [0; 0], "answered once");
        ledger.barrier(Ticket(6));
        ledger.finished(Ticket(5), &Err(SessionError::Closed));
        assert_eq!(passed(&mut ledger, 50), [0; 0]);
        assert_eq!(passed(&mut ledger, 51), [6]);
    }
}
