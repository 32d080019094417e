//! The device's state, and the thread that drives it when nobody else does.
//!
//! Owns: the round of work (receive, expire, manage, send), the thread, and when acknowledgements
//! wait for a post (`habit`). Who may touch the state is `token`'s.
//!
//! The thread sleeps in epoll. Threads that poll drive the device themselves and note the time; as
//! long as that is less than [`TICK`] ago, or one has found completions since, the thread only looks
//! again after another [`TICK`], and no packet wakes it meanwhile. A thread that is going to sleep until a completion comes
//! says so, and the device's thread takes over at once. No thread that drives the device blocks on
//! anything.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Once, OnceLock, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lowtide_transport_proto::time::Nanos;

use super::completion::Completions;
use super::habit::Habit;
use super::posting::QUEUES;
use super::posts::Pending;
use super::tables::Tables;
use super::token::Sleepers;
use crate::cm::Manager;
use crate::device::{Device, DeviceOptions, Input, Peers, QpId};
use crate::host::HostBatch;
use crate::names::Random;
use crate::udp::{ReceiveBatch, at_exit, block_signals};

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
    /// Whether what a poll has brought is answered at once.
    habit: Habit,
    /// Which queues have been posted to by threads that found the token taken.
    pub(super) posts: Arc<Pending>,
    batch: ReceiveBatch,
    /// Slots of it to be filled at once: few while hardly anything comes, for each is a look into
    /// the socket that may find nothing.
    slots: usize,
    host_batch: HostBatch,
    /// Protection domains made so far.
    pub(super) domains: u32,
    drawn: u64,
    random: RandomState,
}

/// A device that several threads share.
pub(crate) struct Shared {
    /// Taken by `token` only.
    pub(super) state: Mutex<State>,
    pub(super) posts: Arc<Pending>,
    /// Threads asleep until some completion queue gets something.
    pub(super) sleepers: Sleepers,
    origin: Instant,
    /// When a program's thread last drove the device, on the device's clock.
    driven_at: AtomicU64,
    /// A program's thread has found completions since the device's thread last asked.
    is_polled: AtomicBool,
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
    let device = Device::bind(address, options, Peers::Any, Random::default)?;
    let poll = mio::Poll::new()?;
    let fd = device.as_raw_fd();
    let mut source = mio::unix::SourceFd(&fd);
    poll.registry()
        .register(&mut source, TOKEN_SOCKET, mio::Interest::READABLE)?;
    let rings = device.host_fd();
    if let Some(fd) = rings {
        let mut source = mio::unix::SourceFd(&fd);
        poll.registry()
            .register(&mut source, TOKEN_SOCKET, mio::Interest::READABLE)?;
    }
    let has_rings = rings.is_some();
    let waker = mio::Waker::new(poll.registry(), TOKEN_WAKER)?;
    let manager = Manager::new(
        device.local_addr(),
        device.receive_budget(),
        random.hash_one(1),
    );
    let posts = Arc::new(Pending::new(QUEUES));
    let state = State {
        device,
        manager,
        tables: Tables::new()?,
        habit: Habit::default(),
        posts: posts.clone(),
        batch: ReceiveBatch::default(),
        slots: 1,
        host_batch: HostBatch::default(),
        domains: 0,
        drawn: 0,
        random,
    };
    let origin = state.device.origin();
    let shared = Arc::new(Shared {
        state: Mutex::new(state),
        posts,
        sleepers: Sleepers::default(),
        origin,
        driven_at: AtomicU64::new(0),
        is_polled: AtomicBool::new(false),
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
    keep_for_exit(&shared);
    Ok((
        shared.clone(),
        Thread {
            shared,
            handle: Some(handle),
        },
    ))
}

/// The devices of this process, for its exit.
static OPEN: Mutex<Vec<Weak<Shared>>> = Mutex::new(Vec::new());

/// A process that exits right after its last completion must not cost its peer an error.
fn keep_for_exit(shared: &Arc<Shared>) {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| at_exit(pay_all));
    let mut open = OPEN.lock().unwrap_or_else(|poison| poison.into_inner());
    open.retain(|device| device.strong_count() > 0);
    open.push(Arc::downgrade(shared));
}

extern "C" fn pay_all() {
    // Whoever holds a lock here may be gone.
    if let Ok(open) = OPEN.try_lock() {
        open.iter()
            .filter_map(Weak::upgrade)
            .for_each(|device| device.pay());
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.shared.pay();
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
    /// Drives the device for a program's thread.
    pub(crate) fn drive(&self, state: &mut State) {
        let now = state.device.now();
        self.note_driven(now);
        state.receive(now);
        self.note_taken();
        state.send(now);
        self.finish(state);
    }

    /// What `take` takes from `queue`, for a program's thread: drives the device first if nothing is
    /// there, and the token is free.
    #[inline]
    pub(crate) fn find<T>(
        &self,
        queue: &Completions,
        take: impl FnOnce() -> Option<T>,
    ) -> Option<T> {
        if !queue.is_empty() {
            self.note_found();
        } else if let Some(mut state) = self.try_lock() {
            self.drive_for(&mut state, queue);
        }
        take()
    }

    /// Who finds something each time drives nothing, and the device's thread would go on to be ahead
    /// of it, woken by each packet. Relaxed: as `note_driven`.
    fn note_found(&self) {
        if !self.is_polled.load(Ordering::Relaxed) {
            self.is_polled.store(true, Ordering::Relaxed);
        }
    }

    /// Drives the device for one that has found an empty completion queue. What is owed to peers for
    /// what it finds there now may wait for the post that it will make of it.
    fn drive_for(&self, state: &mut State, queue: &Completions) {
        let now = state.device.now();
        self.note_driven(now);
        state.habit.note_empty_poll();
        state.receive_for(now, queue);
        self.note_taken();
        let has_received = queue.has_received();
        if state.habit.note_found(has_received) {
            self.sleepers.notify();
        } else {
            state.send(now);
            self.finish(state);
        }
    }

    /// Sends what was posted, and what has waited for that.
    pub(crate) fn send_posted(&self, state: &mut State) {
        state.habit.note_post();
        state.transmit();
        // What needed no packet is done.
        self.sleepers.notify();
        self.note_deadline(state);
    }

    /// Relaxed: a hint about pace; whoever reads it late ticks once more.
    fn note_driven(&self, now: Nanos) {
        self.driven_at.store(now.0, Ordering::Relaxed);
    }

    /// Peers wake once who waits for their rings, and we may just have taken what woke the device's
    /// thread: it must look after itself again.
    fn note_taken(&self) {
        let waits = &self.waits_for_rings;
        if waits.load(Ordering::Relaxed) && waits.swap(false, Ordering::Relaxed) {
            let _ = self.wake();
        }
    }

    fn finish(&self, state: &mut State) {
        self.sleepers.notify();
        self.note_deadline(state);
    }

    /// Wakes the device's thread if it would oversleep a timer.
    pub(crate) fn note_deadline(&self, state: &mut State) {
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
    pub(super) fn wake(&self) -> io::Result<()> {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
        self.waker.wake()
    }

    /// Nobody here will drive the device for a while: its thread does, at once.
    pub(super) fn hand_over(&self, state: &mut State) {
        state.pay();
        self.driven_at.store(0, Ordering::Relaxed);
        self.is_polled.store(false, Ordering::Relaxed);
        let _ = self.wake();
    }

    /// Sends what waits for a post, if nobody is at work here.
    pub(super) fn pay(&self) {
        if let Some(mut state) = self.try_lock() {
            state.pay();
        }
    }

    /// Has another socket wake the thread, for as long as it exists.
    pub(super) fn watch(&self, fd: RawFd) -> io::Result<()> {
        let mut source = mio::unix::SourceFd(&fd);
        self.registry
            .register(&mut source, TOKEN_SOCKET, mio::Interest::READABLE)
    }

    /// The device's thread.
    fn run(&self, mut poll: mio::Poll) {
        block_signals();
        let mut occurred = mio::Events::with_capacity(4);
        let mut wait = None;
        let mut socket = Watch::new(self.lock().device.as_raw_fd());
        // Acquire pairs with the Release in Thread::drop; nothing else is read after it.
        while !self.is_stopping.load(Ordering::Acquire) {
            let sleeps = wait != Some(Duration::ZERO);
            if sleeps && !socket.set(&self.registry, true) {
                wait = Some(TICK);
            }
            // An interrupted or failed wait is a wait that was short.
            let _ = poll.poll(&mut occurred, wait);
            let driven_at = Duration::from_nanos(self.driven_at.load(Ordering::Relaxed));
            let is_driven =
                !driven_at.is_zero() && self.origin.elapsed().saturating_sub(driven_at) < TICK;
            if self.is_polled.swap(false, Ordering::Relaxed) || is_driven {
                socket.set(&self.registry, false);
                std::thread::park_timeout(TICK);
                wait = Some(Duration::ZERO);
                continue;
            }
            let mut state = self.lock();
            let now = state.device.now();
            state.habit.note_thread();
            let is_drained = state.receive(now);
            state.send(now);
            self.sleepers.notify();
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

/// Whether the device's socket wakes its thread. While programs look themselves each datagram would
/// call into epoll for nobody, at the sender's cost on the same host.
struct Watch {
    fd: RawFd,
    is_on: bool,
}

impl Watch {
    /// Of a socket that is registered.
    fn new(fd: RawFd) -> Watch {
        Watch { fd, is_on: true }
    }

    /// Whether it could be done. A socket that is readable when it is watched again wakes at once.
    fn set(&mut self, registry: &mio::Registry, is_on: bool) -> bool {
        if self.is_on == is_on {
            return true;
        }
        let mut source = mio::unix::SourceFd(&self.fd);
        let changed = match is_on {
            true => registry.register(&mut source, TOKEN_SOCKET, mio::Interest::READABLE),
            false => registry.deregister(&mut source),
        };
        if changed.is_ok() {
            self.is_on = is_on;
        }
        changed.is_ok()
    }
}

impl State {
    pub(super) fn draw(&mut self) -> u64 {
        self.drawn += 1;
        self.random.hash_one(self.drawn)
    }

    /// Takes what has arrived and what has fallen due. Returns whether nothing more has come.
    fn receive(&mut self, now: Nanos) -> bool {
        let is_drained = self.receive_all(now, None);
        self.expire(now);
        is_drained
    }

    /// The same, until something is in the completion queue: who polls it wants no more.
    fn receive_for(&mut self, now: Nanos, queue: &Completions) {
        self.receive_all(now, Some(queue));
        self.expire(now);
    }

    fn receive_all(&mut self, now: Nanos, until: Option<&Completions>) -> bool {
        let is_looking = self.device.is_look_due(now);
        let mut is_drained = is_looking;
        if is_looking {
            self.device.attend();
            is_drained &= self.receive_batches(now, until);
            is_drained &= self.receive_multicast(now);
        }
        is_drained & self.receive_host(now)
    }

    /// What comes through rings; whether that was all.
    fn receive_host(&mut self, now: Nanos) -> bool {
        let mut batch = std::mem::take(&mut self.host_batch);
        let is_drained = self.device.receive_host(&mut batch);
        if !batch.is_empty() {
            self.take_posts();
        }
        for (source, packet) in batch.packets() {
            if let Input::Taken { id, .. } = self.device.handle_host(now, source, packet) {
                self.manager.note_communication(id);
                collect_with_kept(&mut self.tables, &mut self.device, now, id);
            }
        }
        self.host_batch = batch;
        if is_drained {
            self.device.bury();
        }
        is_drained
    }

    fn receive_batches(&mut self, now: Nanos, until: Option<&Completions>) -> bool {
        for _ in 0..BATCHES_MAX {
            // An error of the socket is as good as silence; the next call sees it again.
            let slots = self.slots;
            let filled = self
                .device
                .receive_some(&mut self.batch, slots)
                .unwrap_or(0);
            if filled > 0 {
                self.take_posts();
            }
            for slot in 0..filled {
                self.take(now, slot);
            }
            match filled {
                0 => self.slots = 1,
                _ if filled == slots => self.slots = (2 * slots).min(self.batch.capacity()),
                _ => {}
            }
            if filled < slots {
                return true;
            }
            if until.is_some_and(|queue| !queue.is_empty()) {
                return false;
            }
        }
        false
    }

    fn expire(&mut self, now: Nanos) {
        while let Some(id) = self.device.expire(now) {
            self.collect(id);
        }
        self.manage(now);
    }

    /// The same for the groups joined.
    fn receive_multicast(&mut self, now: Nanos) -> bool {
        for _ in 0..BATCHES_MAX {
            let filled = self.device.receive_multicast(&mut self.batch).unwrap_or(0);
            if filled == 0 {
                return true;
            }
            self.take_posts();
            for slot in 0..filled {
                self.take(now, slot);
            }
            self.collect_finished();
        }
        false
    }

    /// Lets the connection manager act, and takes what its moves flush.
    fn manage(&mut self, now: Nanos) {
        self.manager.advance(now, &mut self.device);
        while let Some(id) = self.manager.poll_failed() {
            self.collect(id);
        }
    }

    fn next_timeout(&self) -> Option<Nanos> {
        match (self.device.next_timeout(), self.manager.next_timeout()) {
            (Some(ours), Some(managed)) => Some(ours.min(managed)),
            (ours, managed) => ours.or(managed),
        }
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
        for (place, datagram) in arrival.datagrams() {
            let input = self.device.handle(now, &arrival, place, datagram);
            match input {
                Input::Taken { id, .. } => {
                    self.manager.note_communication(id);
                    collect_with_kept(&mut self.tables, &mut self.device, now, id);
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
        self.send(self.device.now());
    }

    fn send(&mut self, now: Nanos) {
        self.habit.note_sent();
        self.device.transmit(now);
        self.collect_finished();
    }

    /// Sends what waits for a post that may never come.
    fn pay(&mut self) {
        if self.habit.note_idle() {
            self.transmit();
        }
    }

    fn collect_finished(&mut self) {
        while let Some(id) = self.device.poll_finished() {
            self.collect(id);
        }
    }

    /// Moves a queue pair's completions to their queues, and its events to theirs.
    #[inline]
    pub(crate) fn collect(&mut self, id: QpId) {
        self.tables.collect(&mut self.device, id);
    }
}

/// Takes what a packet has finished, and what was kept behind it.
fn collect_with_kept(tables: &mut Tables, device: &mut Device, now: Nanos, id: QpId) {
    tables.collect(device, id);
    while let Some((_, datagram)) = device.handle_kept(now, id) {
        device.give_back(datagram);
        tables.collect(device, id);
    }
}
