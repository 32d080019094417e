//! The device under its lock, and the thread that drives it when nobody else does.
//!
//! Owns: the lock, work requests between posting and polling, completion queues, the thread.
//!
//! The thread sleeps in epoll. Threads that post or poll drive the device themselves and note the
//! time; as long as that is less than [`TICK`] ago the thread only looks again after another
//! [`TICK`], and no packet wakes it meanwhile. A thread that is going to sleep until a completion comes says so, and the device's
//! thread takes over at once. No thread that drives the device blocks on anything but its lock.

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lowtide_transport_proto::qp::{Completion, CompletionKind, QpCaps, QueuePair, Status};
use lowtide_transport_proto::time::Nanos;
use lowtide_transport_proto::wire::Qpn;

use super::CreateError;
use crate::cm::Manager;
use crate::device::{Device, DeviceOptions, Input, Peers, QpId};
use crate::memory::Key;
use crate::udp::{ReceiveBatch, block_signals};

/// Nobody has driven the device for so long: its thread does.
const TICK: Duration = Duration::from_millis(1);
/// Receive batches per drive: more input waits for the next.
const BATCHES_MAX: usize = 8;
/// "No deadline" for the thread's sleep.
const NEVER: u64 = u64::MAX;
const TOKEN_SOCKET: mio::Token = mio::Token(0);
const TOKEN_WAKER: mio::Token = mio::Token(1);

/// Index of a completion queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CqId(usize);

/// A work request under way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Posted {
    pub(super) id: u64,
    pub(super) slot: Option<Key>,
}

/// One of a queue pair's two queues.
#[derive(Debug)]
pub(super) struct Queue {
    posted: VecDeque<Posted>,
    /// Completions not polled yet; they count too.
    unpolled: u32,
    depth: u32,
    cq: CqId,
}

impl Queue {
    pub(super) fn is_full(&self) -> bool {
        self.posted.len() as u32 + self.unpolled >= self.depth
    }

    pub(super) fn push(&mut self, posted: Posted) {
        self.posted.push_back(posted);
    }
}

/// What is known of a queue pair besides its state machine.
#[derive(Debug)]
pub(super) struct QpEntry {
    qpn: Qpn,
    /// Tells lives of one id apart.
    life: u64,
    pub(super) sends: Queue,
    pub(super) recvs: Queue,
}

/// A completion on its way to the program.
#[derive(Debug, Clone, Copy)]
pub(super) struct Done {
    pub(super) id: u64,
    pub(super) status: Status,
    pub(super) kind: CompletionKind,
    pub(super) byte_len: u32,
    pub(super) imm: Option<u32>,
    pub(super) qpn: Qpn,
    slot: Option<Key>,
    qp: QpId,
    life: u64,
}

#[derive(Debug, Default)]
struct Cq {
    done: VecDeque<Done>,
    depth: u32,
    /// The depth that its queue pairs' queues may fill.
    promised: u32,
    is_live: bool,
}

/// Everything under the lock.
pub(crate) struct State {
    pub(crate) device: Device,
    /// The connections that its connection manager makes.
    pub(crate) manager: Manager,
    batch: ReceiveBatch,
    qps: Vec<Option<QpEntry>>,
    cqs: Vec<Cq>,
    /// Protection domains made so far.
    pub(super) domains: u32,
    lives: u64,
    random: RandomState,
}

/// A device that several threads share.
pub(crate) struct Shared {
    state: Mutex<State>,
    /// Some completion queue got something.
    completed: Condvar,
    origin: Instant,
    /// When a program's thread last drove the device, in nanoseconds since `origin`.
    driven_at: AtomicU64,
    /// Until when the device's thread sleeps, on the device's clock.
    sleeps_until: AtomicU64,
    is_stopping: AtomicBool,
    waker: mio::Waker,
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
    let waker = mio::Waker::new(poll.registry(), TOKEN_WAKER)?;
    let manager = Manager::new(
        device.local_addr(),
        device.receive_budget(),
        random.hash_one(1),
    );
    let state = State {
        device,
        manager,
        batch: ReceiveBatch::default(),
        qps: Vec::new(),
        cqs: Vec::new(),
        domains: 0,
        lives: 0,
        random,
    };
    let shared = Arc::new(Shared {
        state: Mutex::new(state),
        completed: Condvar::new(),
        origin: Instant::now(),
        driven_at: AtomicU64::new(0),
        sleeps_until: AtomicU64::new(NEVER),
        is_stopping: AtomicBool::new(false),
        waker,
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
        self.completed.notify_all();
        self.note_deadline(state);
    }

    /// Wakes the device's thread if it would oversleep a timer.
    pub(super) fn note_deadline(&self, state: &mut MutexGuard<'_, State>) {
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

    /// Sleeps until something completes on `cq`; false when `deadline` has passed.
    pub(super) fn sleep(&self, cq: CqId, deadline: Instant) -> bool {
        self.sleep_until(deadline, |state| !state.is_cq_empty(cq))
    }

    /// Sleeps until `is_done`; false when `deadline` has passed.
    pub(crate) fn sleep_until(&self, deadline: Instant, is_done: impl Fn(&State) -> bool) -> bool {
        self.driven_at.store(0, Ordering::Relaxed);
        let _ = self.wake();
        let mut state = self.lock();
        while !is_done(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.completed.wait_timeout(state, left);
            state = waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
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
            self.completed.notify_all();
            let due = state.next_timeout();
            let now = state.device.now();
            self.sleeps_until
                .store(due.map_or(NEVER, |due| due.0), Ordering::Relaxed);
            wait = match due {
                _ if !is_drained || state.device.has_output() => Some(Duration::ZERO),
                Some(due) => Some(Duration::from_nanos(due.since(now).0)),
                None => None,
            };
        }
    }
}

impl State {
    pub(super) fn draw(&mut self) -> u64 {
        self.lives += 1;
        self.random.hash_one(self.lives)
    }

    /// Receives, expires timers, sends. Returns whether the socket is empty.
    fn drive(&mut self) -> bool {
        let mut is_drained = false;
        for _ in 0..BATCHES_MAX {
            let now = self.device.now();
            // An error of the socket is as good as silence; the next call sees it again.
            let filled = self.device.receive(&mut self.batch).unwrap_or(0);
            for slot in 0..filled {
                self.take(now, slot);
            }
            if filled < self.batch.capacity() {
                is_drained = true;
                break;
            }
        }
        let now = self.device.now();
        while let Some(id) = self.device.expire(now) {
            self.collect(id);
        }
        self.manage();
        self.transmit();
        is_drained
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
                    collect(&mut self.device, &mut self.qps, &mut self.cqs, id);
                }
                Input::Management(range) => {
                    self.manager.handle(now, arrival.source, &datagram[range]);
                }
                // What is for nobody is dropped in silence.
                Input::Dropped | Input::UnknownQueuePair(_) => {}
            }
        }
    }

    /// Sends what may be sent.
    pub(super) fn transmit(&mut self) {
        let now = self.device.now();
        self.device.transmit(now);
        while let Some(id) = self.device.poll_finished() {
            self.collect(id);
        }
    }

    /// Moves a queue pair's completions to their queues.
    pub(super) fn collect(&mut self, id: QpId) {
        collect(&mut self.device, &mut self.qps, &mut self.cqs, id);
    }

    pub(super) fn with_qp<R>(
        &mut self,
        id: QpId,
        act: impl FnOnce(&mut QueuePair, &mut QpEntry) -> R,
    ) -> R {
        let entry = self.qps[id.0 as usize]
            .as_mut()
            .expect("it lives as long as its handle");
        act(self.device.qp(id).expect("as its entry"), entry)
    }

    pub(super) fn add_qp(
        &mut self,
        domain: u32,
        caps: QpCaps,
        send_cq: CqId,
        recv_cq: CqId,
    ) -> Result<(QpId, Qpn), CreateError> {
        let wanted = [(send_cq, caps.send_wr_max), (recv_cq, caps.recv_wr_max)];
        let fits = |cq: &Cq, extra: u32| cq.promised.saturating_add(extra) <= cq.depth;
        let fit = match send_cq == recv_cq {
            true => fits(
                &self.cqs[send_cq.0],
                caps.send_wr_max.saturating_add(caps.recv_wr_max),
            ),
            false => wanted
                .iter()
                .all(|(cq, depth)| fits(&self.cqs[cq.0], *depth)),
        };
        if !fit {
            return Err(CreateError::CompletionQueueTooShallow);
        }
        let (id, qpn) = self
            .device
            .create_qp(domain, caps)
            .ok_or(CreateError::Exhausted)?;
        let [sends, recvs] = wanted.map(|(cq, depth)| {
            self.cqs[cq.0].promised += depth;
            Queue {
                posted: VecDeque::new(),
                unpolled: 0,
                depth,
                cq,
            }
        });
        self.lives += 1;
        if self.qps.len() <= id.0 as usize {
            self.qps.resize_with(id.0 as usize + 1, || None);
        }
        self.qps[id.0 as usize] = Some(QpEntry {
            qpn,
            life: self.lives,
            sends,
            recvs,
        });
        Ok((id, qpn))
    }

    /// Destroys a queue pair; what was posted is forgotten, completions stay to be polled.
    pub(super) fn remove_qp(&mut self, id: QpId) {
        self.collect(id);
        self.transmit();
        self.device.destroy_qp(id);
        let Some(entry) = self.qps[id.0 as usize].take() else {
            return;
        };
        for queue in [entry.sends, entry.recvs] {
            // Completions left in the queue keep their place until they are polled.
            self.cqs[queue.cq.0].promised -= queue.depth - queue.unpolled;
            for posted in queue.posted {
                self.free_slot(posted.slot);
            }
        }
    }

    fn free_slot(&mut self, slot: Option<Key>) {
        if let Some(key) = slot {
            self.device.memory.unreserve(key);
        }
    }

    pub(super) fn add_cq(&mut self, depth: u32) -> CqId {
        let cq = Cq {
            depth,
            is_live: true,
            ..Cq::default()
        };
        match self.cqs.iter().position(|cq| !cq.is_live) {
            Some(index) => {
                self.cqs[index] = cq;
                CqId(index)
            }
            None => {
                self.cqs.push(cq);
                CqId(self.cqs.len() - 1)
            }
        }
    }

    /// No queue pair uses it any more: their handles keep it alive.
    pub(super) fn remove_cq(&mut self, id: CqId) {
        let cq = std::mem::take(&mut self.cqs[id.0]);
        for done in cq.done {
            self.free_slot(done.slot);
        }
    }

    pub(super) fn is_cq_empty(&self, id: CqId) -> bool {
        self.cqs[id.0].done.is_empty()
    }

    /// Takes a completion, and its slot's bytes out of the device.
    #[allow(
        clippy::type_complexity,
        reason = "a completion and what its slot is made of"
    )]
    pub(super) fn pop_cq(&mut self, id: CqId) -> Option<(Done, Option<(Key, Box<[u8]>)>)> {
        let done = self.cqs[id.0].done.pop_front()?;
        match self.qps[done.qp.0 as usize]
            .as_mut()
            .filter(|entry| entry.life == done.life)
        {
            Some(entry) => {
                let is_recv = done.kind.is_recv();
                let queue = if is_recv {
                    &mut entry.recvs
                } else {
                    &mut entry.sends
                };
                queue.unpolled -= 1;
            }
            None => self.cqs[id.0].promised -= 1,
        }
        let bytes = done
            .slot
            .and_then(|key| Some((key, self.device.memory.detach(key)?)));
        Some((done, bytes))
    }
}

fn collect(device: &mut Device, qps: &mut [Option<QpEntry>], cqs: &mut [Cq], id: QpId) {
    let Some(entry) = qps.get_mut(id.0 as usize).and_then(Option::as_mut) else {
        return;
    };
    while let Some(completion) = device.poll_completion(id) {
        let Completion {
            status,
            kind,
            byte_len,
            imm,
            ..
        } = completion;
        let queue = if kind.is_recv() {
            &mut entry.recvs
        } else {
            &mut entry.sends
        };
        let posted = queue
            .posted
            .pop_front()
            .expect("completions come in the order posted");
        queue.unpolled += 1;
        cqs[queue.cq.0].done.push_back(Done {
            id: posted.id,
            status,
            kind,
            byte_len,
            imm,
            qpn: entry.qpn,
            slot: posted.slot,
            qp: id,
            life: entry.life,
        });
    }
}
