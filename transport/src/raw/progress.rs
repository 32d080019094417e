//! The device under its lock, and the thread that drives it when nobody else does.
//!
//! Owns: the lock, the round of work (receive, expire, manage, send), the thread.
//!
//! The thread sleeps in epoll. Threads that post or poll drive the device themselves and note the
//! time; as long as that is less than [`TICK`] ago the thread only looks again after another
//! [`TICK`], and no packet wakes it meanwhile. A thread that is going to sleep until a completion comes
//! says so, and the device's thread takes over at once. No thread that drives the device blocks on
//! anything but its lock.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lowtide_transport_proto::time::Nanos;

use super::tables::Tables;
use crate::cm::Manager;
use crate::device::{Device, DeviceOptions, Input, Peers, QpId};
use crate::host::HostBatch;
use crate::udp::{ReceiveBatch, block_signals};

/// Nobody has driven the device for so long: its thread does.
const TICK: Duration = Duration::from_millis(1);
/// Receive batches per drive: more input waits for the next.
const BATCHES_MAX: usize = 8;
/// "No deadline" for the thread's sleep.
const NEVER: u64 = u64::MAX;
const TOKEN_SOCKET: mio::Token = mio::Token(0);
const TOKEN_WAKER: mio::Token = mio::Token(1);

/// Everything under the lock.
pub(crate) struct State {
    pub(crate) device: Device,
    /// The connections that its connection manager makes.
    pub(crate) manager: Manager,
    /// What the device does not know: completion queues, and whom they belong to.
    pub(crate) tables: Tables,
    batch: ReceiveBatch,
    host_batch: HostBatch,
    /// Protection domains made so far.
    pub(super) domains: u32,
    drawn: u64,
    random: RandomState,
}

/// A device that several threads share.
pub(crate) struct Shared {
    state: Mutex<State>,
    /// Some completion queue got something.
    completed: Condvar,
    /// Threads that wait for that. Written under the lock.
    sleepers: AtomicU32,
    origin: Instant,
    /// When a program's thread last drove the device, in nanoseconds since `origin`.
    driven_at: AtomicU64,
    /// Until when the device's thread sleeps, on the device's clock.
    sleeps_until: AtomicU64,
    /// The device's thread sleeps until rings wake it. Written under the lock.
    waits_for_rings: AtomicBool,
    is_stopping: AtomicBool,
    waker: mio::Waker,
    /// Where more sockets can be registered to wake the thread.
    registry: mio::Registry,
    /// The device's thread, to be woken from a nap.
    thread: OnceLock<std::thread::Thread>,
}

/// The device's thread; it ends when this is dropped.
pub(super) struct Thread {
    shared: Arc<Shared>,
    handle: Option<JoinHandle<()>>,
}

pub(super) fn start(
    address: SocketAddr,
    options: &DeviceOptions,
) -> io::Result<(Arc<Shared>, Thread)> {
    let random = RandomState::new();
    let device = Device::bind(address, options, Peers::Any, random.hash_one(0) as u32)?;
    let poll = mio::Poll::new()?;
    let fd = device.as_raw_fd();
    let mut source = mio::unix::SourceFd(&fd);
    poll.registry()
        .register(&mut source, TOKEN_SOCKET, mio::Interest::READABLE)?;
    if let Some(fd) = device.host_fd() {
        let mut source = mio::unix::SourceFd(&fd);
        poll.registry()
            .register(&mut source, TOKEN_SOCKET, mio::Interest::READABLE)?;
    }
    let waker = mio::Waker::new(poll.registry(), TOKEN_WAKER)?;
    let has_rings = device.host_fd().is_some();
    let manager = Manager::new(
        device.local_addr(),
        device.receive_budget(),
        random.hash_one(1),
    );
    let state = State {
        device,
        manager,
        tables: Tables::new()?,
        batch: ReceiveBatch::default(),
        host_batch: HostBatch::default(),
        domains: 0,
        drawn: 0,
        random,
    };
    let shared = Arc::new(Shared {
        state: Mutex::new(state),
        completed: Condvar::new(),
        sleepers: AtomicU32::new(0),
        origin: Instant::now(),
        driven_at: AtomicU64::new(0),
        sleeps_until: AtomicU64::new(NEVER),
        // The thread begins with a sleep.
        waits_for_rings: AtomicBool::new(has_rings),
        is_stopping: AtomicBool::new(false),
        waker,
        registry: poll.registry().try_clone()?,
        thread: OnceLock::new(),
    });
    let ours = shared.clone();
    let handle = std::thread::Builder::new()
        .name("lowtide-softroce".into())
        .spawn(move || ours.run(poll))?;
    // Set once, here.
    let _ = shared.thread.set(handle.thread().clone());
    Ok((
        shared.clone(),
        Thread {
            shared,
            handle: Some(handle),
        },
    ))
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.shared.is_stopping.store(true, Ordering::Release);
        // A thread that cannot be woken ends at its next tick or packet.
        if self.shared.wake().is_ok()
            && let Some(handle) = self.handle.take()
        {
            // It only ends by returning; a panic there has been printed.
            let _ = handle.join();
        }
    }
}

impl Shared {
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        // A panic under the lock is a bug that has been reported; the state is no worse than after
        // a lost packet.
        self.state
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Drives the device for a program's thread.
    pub(crate) fn drive(&self, state: &mut MutexGuard<'_, State>) {
        // Relaxed: a hint about pace; whoever reads it late ticks once more.
        self.driven_at
            .store(self.origin.elapsed().as_nanos() as u64, Ordering::Relaxed);
        state.drive();
        self.tell_sleepers();
        self.note_deadline(state);
        // Peers wake once who waits for their rings, and we may just have taken what woke the thread:
        // it must look after itself again.
        if self.waits_for_rings.swap(false, Ordering::Relaxed) {
            let _ = self.wake();
        }
    }

    /// Wakes who waits for a completion. To be called under the lock.
    fn tell_sleepers(&self) {
        // The call to wake nobody is a system call, too.
        if self.sleepers.load(Ordering::Relaxed) > 0 {
            self.completed.notify_all();
        }
    }

    /// Wakes the device's thread if it would oversleep a timer.
    pub(crate) fn note_deadline(&self, state: &mut MutexGuard<'_, State>) {
        let due = match state.next_timeout() {
            _ if state.device.has_output() => 0,
            due => due.map_or(NEVER, |due| due.0),
        };
        // Both sides use the value only under the lock, but for a sleep that has begun.
        if due < self.sleeps_until.load(Ordering::Relaxed) {
            self.sleeps_until.store(due, Ordering::Relaxed);
            // At worst the timer is late by the time until the next packet.
            let _ = self.wake();
        }
    }

    /// Wakes the device's thread, from epoll or from a nap.
    fn wake(&self) -> io::Result<()> {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
        self.waker.wake()
    }

    /// Nobody here will drive the device for a while: its thread does, at once.
    pub(super) fn hand_over(&self) {
        self.driven_at.store(0, Ordering::Relaxed);
        let _ = self.wake();
    }

    /// Has another socket wake the thread, for as long as it exists.
    pub(super) fn watch(&self, fd: RawFd) -> io::Result<()> {
        let mut source = mio::unix::SourceFd(&fd);
        self.registry
            .register(&mut source, TOKEN_SOCKET, mio::Interest::READABLE)
    }

    /// Sleeps until `is_done`; false when `deadline` has passed.
    pub(crate) fn sleep_until(&self, deadline: Instant, is_done: impl Fn(&State) -> bool) -> bool {
        self.hand_over();
        let mut state = self.lock();
        while !is_done(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            self.sleepers.fetch_add(1, Ordering::Relaxed);
            let waited = self.completed.wait_timeout(state, left);
            state = waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
            self.sleepers.fetch_sub(1, Ordering::Relaxed);
        }
        true
    }

    /// The device's thread.
    fn run(&self, mut poll: mio::Poll) {
        block_signals();
        let mut occurred = mio::Events::with_capacity(4);
        let mut wait = None;
        // Acquire pairs with the Release in Thread::drop; nothing else is read after it.
        while !self.is_stopping.load(Ordering::Acquire) {
            // An interrupted or failed wait is a wait that was short.
            let _ = poll.poll(&mut occurred, wait);
            let driven_at = Duration::from_nanos(self.driven_at.load(Ordering::Relaxed));
            if self.origin.elapsed().saturating_sub(driven_at) < TICK && !driven_at.is_zero() {
                std::thread::park_timeout(TICK);
                wait = Some(Duration::ZERO);
                continue;
            }
            let mut state = self.lock();
            let is_drained = state.drive();
            self.tell_sleepers();
            let due = state.next_timeout();
            let now = state.device.now();
            self.sleeps_until
                .store(due.map_or(NEVER, |due| due.0), Ordering::Relaxed);
            wait = match due {
                _ if !is_drained || state.device.has_output() => Some(Duration::ZERO),
                _ if !state.device.may_sleep() => Some(Duration::ZERO),
                Some(due) => Some(Duration::from_nanos(due.since(now).0)),
                None => None,
            };
            let waits = wait != Some(Duration::ZERO) && state.device.host_fd().is_some();
            self.waits_for_rings.store(waits, Ordering::Relaxed);
        }
    }
}

impl State {
    pub(super) fn draw(&mut self) -> u64 {
        self.drawn += 1;
        self.random.hash_one(self.drawn)
    }

    /// Receives, expires timers, sends. Returns whether nothing more has come.
    fn drive(&mut self) -> bool {
        let now = self.device.now();
        let mut is_drained = match self.device.is_look_due(now) {
            true => {
                self.device.attend();
                self.receive() & self.receive_multicast()
            }
            false => false,
        };
        is_drained &= self.receive_host();
        let now = self.device.now();
        while let Some(id) = self.device.expire(now) {
            self.collect(id);
        }
        self.manage();
        self.transmit();
        is_drained
    }

    /// What comes from the socket; whether that was all.
    fn receive(&mut self) -> bool {
        for _ in 0..BATCHES_MAX {
            let now = self.device.now();
            // An error of the socket is as good as silence; the next call sees it again.
            let filled = self.device.receive(&mut self.batch).unwrap_or(0);
            for slot in 0..filled {
                self.take(now, slot);
            }
            if filled < self.batch.capacity() {
                return true;
            }
        }
        false
    }

    /// What comes through rings; whether that was all.
    fn receive_host(&mut self) -> bool {
        let mut batch = std::mem::take(&mut self.host_batch);
        let is_drained = self.device.receive_host(&mut batch);
        let now = self.device.now();
        for (source, range) in &batch.records {
            let input = self
                .device
                .handle_host(now, *source, &batch.bytes[range.clone()]);
            if let Input::Taken { id, .. } = input {
                self.manager.note_communication(id);
                self.tables.collect(&mut self.device, id);
            }
        }
        self.host_batch = batch;
        if is_drained {
            self.device.bury();
        }
        is_drained
    }

    /// The same for the groups joined.
    fn receive_multicast(&mut self) -> bool {
        for _ in 0..BATCHES_MAX {
            let now = self.device.now();
            let filled = self.device.receive_multicast(&mut self.batch).unwrap_or(0);
            if filled == 0 {
                return true;
            }
            for slot in 0..filled {
                self.take(now, slot);
            }
            self.collect_finished();
        }
        false
    }

    /// Lets the connection manager act, and takes what its moves flush.
    pub(crate) fn manage(&mut self) {
        let now = self.device.now();
        self.manager.advance(now, &mut self.device);
        while let Some(id) = self.manager.poll_failed() {
            self.collect(id);
        }
    }

    fn next_timeout(&self) -> Option<Nanos> {
        let managed = self.manager.next_timeout();
        [self.device.next_timeout(), managed]
            .into_iter()
            .flatten()
            .min()
    }

    fn take(&mut self, now: Nanos, slot: usize) {
        let Some(arrival) = self
            .batch
            .arrival(slot)
            .filter(|arrival| !arrival.is_truncated)
        else {
            self.device.count_malformed();
            return;
        };
        let datagrams = arrival.bytes.len().div_ceil(arrival.segment);
        self.device
            .count_receive(arrival.bytes.len(), datagrams as u64, arrival.overflow);
        for datagram in arrival.bytes.chunks(arrival.segment) {
            let input = self.device.handle(now, &arrival, datagram);
            match input {
                Input::Taken { id, .. } => {
                    self.manager.note_communication(id);
                    self.tables.collect(&mut self.device, id);
                }
                Input::Management(range) => {
                    self.manager.handle(now, arrival.source, &datagram[range]);
                }
                // What is for nobody is dropped in silence.
                Input::Dropped | Input::UnknownQueuePair(_) => {}
                // `receive_multicast` collects.
                Input::Delivered => {}
            }
        }
    }

    /// Sends what may be sent.
    pub(crate) fn transmit(&mut self) {
        let now = self.device.now();
        self.device.transmit(now);
        self.collect_finished();
    }

    fn collect_finished(&mut self) {
        while let Some(id) = self.device.poll_finished() {
            self.collect(id);
        }
    }

    /// Moves a queue pair's completions to their queues, and its events to theirs.
    pub(crate) fn collect(&mut self, id: QpId) {
        self.tables.collect(&mut self.device, id);
    }
}
