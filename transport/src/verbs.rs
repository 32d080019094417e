//! The verbs: device, protection domain, memory region, completion queue, queue pair.
//!
//! The words and their meaning are those of ibverbs; the calls are safe. It stands on [`crate::raw`],
//! which has the devices, the queues and the progress; this layer owns what makes the calls safe: the
//! way of a buffer through a work request.
//!
//! Memory comes in two kinds, and neither needs a lifetime or `unsafe`:
//! * a [`Slot`] is owned by exactly one side. Posting it gives it away, its completion gives it
//!   back; in between nobody can touch it. Peers have no right to it, so it is sent without a copy
//!   and read as a plain slice.
//! * a [`MemoryRegion`] is shared with peers, which may change it at any time. It is only copied
//!   into and out of, by atomic words. Its addresses count from 0.
//!
//! Invariant: a completion queue never overflows: the queues of its queue pairs are together no
//! deeper, and a request counts until its completion has been polled.
//!
//! Posting and polling wait for no other thread: as in the raw layer, whoever has the device in hand does
//! what was posted meanwhile, and leaves what has completed to be taken.
//!
//! Queue pairs are connected by exchanging [`Address`]es as `ibv_rc_pingpong` does, or by the
//! connection manager ([`crate::cm`]).
//!
//! Deliberately absent: UC, UD and shared receive queues, inline data (copies are cheap here), memory
//! of the caller's choosing, and whatever else takes `unsafe` or has no owner: see [`crate::raw`].

mod places;
mod posts;
mod queue_pair;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lowtide_transport_proto::qp::{Lkey, SGE_MAX, Sge};

use self::posts::{Posts, Served};

pub use lowtide_transport_proto::qp::{
    CompletionKind, InvalidTransition, PostError, QpState, Remote, Rkey, SendOp, Status,
};
pub use lowtide_transport_proto::wire::{Mtu, Qpn};

pub use self::queue_pair::{Address, PostRefused, QueuePair, Reliability};
use crate::device::WORK_REQUESTS_MAX;
pub use crate::device::{Counters, DeviceOptions};
pub use crate::faults::Faults;
pub use crate::host::SameHost;
pub use crate::memory::Access;
use crate::memory::{Key, SharedMemory};
pub use crate::raw::CompletionChannel;
use crate::raw::types::{Error, QpCap, QpInitAttr, QpType};
use crate::raw::{self, Context, Queues};
pub(crate) use crate::raw::{Shared, State};
pub use crate::udp::SocketOptions;

/// A soft-RoCE device on one address and UDP port. Cloning shares it.
#[derive(Clone)]
pub struct Device {
    pub(crate) shared: Arc<Shared>,
    context: Context,
}

impl Device {
    /// Opens a device on `address`, one of this host's, and starts its thread.
    ///
    /// # Errors
    /// `AddrInUse` when the port is taken, `InvalidInput` for the wildcard address, or whatever the
    /// operating system says.
    pub fn open(address: SocketAddr, options: &DeviceOptions) -> io::Result<Device> {
        let context = Context::open(address, options)?;
        Ok(Device {
            shared: context.shared.clone(),
            context,
        })
    }

    /// Its address and port.
    pub fn local_addr(&self) -> SocketAddr {
        self.shared.lock().device.local_addr()
    }

    /// The same device's raw verbs.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// A new protection domain.
    pub fn protection_domain(&self) -> ProtectionDomain {
        ProtectionDomain {
            device: self.clone(),
            raw: self.context.protection_domain(),
        }
    }

    /// A completion queue for at most `depth` completions, or 2^22 if that is less.
    pub fn completion_queue(&self, depth: u32) -> CompletionQueue {
        self.completion_queue_on(depth, None)
    }

    /// A file descriptor that tells of completion queues, for epoll and for async runtimes.
    ///
    /// # Errors
    /// When the process has no file descriptors left.
    pub fn completion_channel(&self) -> io::Result<CompletionChannel> {
        Ok(self.context.completion_channel()?)
    }

    /// A completion queue that tells `channel`, each time that it was
    /// [asked to](CompletionQueue::request_notification).
    pub fn completion_queue_on(
        &self,
        depth: u32,
        channel: Option<&CompletionChannel>,
    ) -> CompletionQueue {
        let depth = depth.min(raw::CQE_MAX);
        let raw = self.context.completion_queue(depth.max(1), channel);
        CompletionQueue(Arc::new(CqHandle {
            device: self.clone(),
            raw: raw.expect("its depth is one that the device has"),
            posts: Arc::new(Posts::new(depth)),
        }))
    }

    /// What the device has seen.
    pub fn counters(&self) -> Counters {
        self.shared.lock().device.counters()
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").finish_non_exhaustive()
    }
}

/// What memory and queue pairs must have in common to meet.
#[derive(Debug, Clone)]
pub struct ProtectionDomain {
    device: Device,
    raw: raw::ProtectionDomain,
}

/// Why an object could not be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum CreateError {
    /// The device has no room for another, or for queues deeper than 65,536.
    Exhausted,
    /// The completion queue is too shallow for the queues of all its queue pairs.
    CompletionQueueTooShallow,
    /// The completion queue belongs to another device.
    OtherDevice,
}

impl fmt::Display for CreateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CreateError::Exhausted => "the device has no room for another object of this kind",
            CreateError::CompletionQueueTooShallow => {
                "the completion queue is shallower than the work queues it serves"
            }
            CreateError::OtherDevice => "the completion queue belongs to another device",
        })
    }
}

impl std::error::Error for CreateError {}

impl ProtectionDomain {
    /// The same domain for raw verbs: their queue pairs reach the regions made here.
    pub fn raw(&self) -> &raw::ProtectionDomain {
        &self.raw
    }

    /// A slot of `len` zero bytes, for SEND, RECV, and as the local side of WRITE and READ.
    ///
    /// # Errors
    /// [`CreateError::Exhausted`].
    pub fn slot(&self, len: usize) -> Result<Slot, CreateError> {
        let key = self
            .device
            .shared
            .lock()
            .device
            .memory
            .reserve(self.raw.domain);
        let key = key.ok_or(CreateError::Exhausted)?;
        let bytes = Some(vec![0; len].into_boxed_slice());
        Ok(Slot {
            bytes,
            key,
            shared: self.device.shared.clone(),
        })
    }

    /// A region of `len` zero bytes with rights for peers.
    ///
    /// # Errors
    /// [`CreateError::Exhausted`].
    pub fn memory_region(&self, len: usize, access: Access) -> Result<MemoryRegion, CreateError> {
        let mut state = self.device.shared.lock();
        let memory = state.device.memory.new_shared(len);
        let memory = memory.map_err(|_| CreateError::Exhausted)?;
        let key = state
            .device
            .memory
            .register_shared(self.raw.domain, memory.clone(), access);
        let key = key.ok_or(CreateError::Exhausted)?;
        Ok(MemoryRegion {
            memory,
            key,
            device: self.device.clone(),
        })
    }

    /// A queue pair in the Reset state, whose send and receive queues hold `send_depth` and
    /// `recv_depth` requests.
    ///
    /// # Errors
    /// [`CreateError`].
    pub fn queue_pair(
        &self,
        send_cq: &CompletionQueue,
        recv_cq: &CompletionQueue,
        send_depth: u32,
        recv_depth: u32,
    ) -> Result<QueuePair, CreateError> {
        let shared = &self.device.shared;
        let is_ours = |cq: &CompletionQueue| Arc::ptr_eq(&cq.0.device.shared, shared);
        if !is_ours(send_cq) || !is_ours(recv_cq) {
            return Err(CreateError::OtherDevice);
        }
        if send_depth.max(recv_depth) > WORK_REQUESTS_MAX {
            return Err(CreateError::Exhausted);
        }
        let [sends, recvs] = [(send_cq, send_depth), (recv_cq, recv_depth)].map(|(cq, depth)| {
            let served = cq.0.posts.serve(depth)?;
            Some(Queue {
                cq: cq.clone(),
                depth,
                served,
            })
        });
        let (Some(sends), Some(recvs)) = (sends, recvs) else {
            // The promise that was made is taken back by the queue that is dropped here.
            return Err(CreateError::CompletionQueueTooShallow);
        };
        let init = QpInitAttr {
            kind: QpType::Rc,
            cap: QpCap {
                max_send_wr: send_depth,
                max_recv_wr: recv_depth,
                max_send_sge: SGE_MAX as u32,
                max_recv_sge: SGE_MAX as u32,
                max_inline_data: 0,
            },
            sq_sig_all: true,
        };
        let queues = Queues {
            send: &send_cq.0.raw,
            recv: &recv_cq.0.raw,
            shared: None,
        };
        let keepers = [send_cq, recv_cq].map(|cq| cq.0.posts.clone() as Arc<dyn raw::Keeper>);
        let raw = self.raw.queue_pair_kept(queues, &init, Some(keepers));
        let raw = raw.map_err(|_: Error| CreateError::Exhausted)?;
        Ok(QueuePair {
            device: self.device.clone(),
            id: raw.id(),
            qpn: raw.qpn(),
            psn: raw.random_psn(),
            raw: Box::new(raw),
            sends,
            recvs,
        })
    }
}

/// Memory that one side owns: the program, or a work request.
///
/// What has been posted is the device's until its completion gives it back:
///
/// ```
/// # use lowtide_transport::verbs::{Buffer, CompletionQueue, QueuePair, SendOp, Slot};
/// fn send(qp: &QueuePair, queue: &CompletionQueue, mut slot: Slot) -> Option<Slot> {
///     slot[0] = 1;
///     qp.post_send(1, SendOp::Send, Buffer::Slot(slot, 8)).ok()?;
///     queue.poll()?.slot
/// }
/// ```
///
/// The device may still read it, so that this is no program:
///
/// ```compile_fail,E0382
/// # use lowtide_transport::verbs::{Buffer, CompletionQueue, QueuePair, SendOp, Slot};
/// fn send(qp: &QueuePair, queue: &CompletionQueue, mut slot: Slot) -> Option<Slot> {
///     qp.post_send(1, SendOp::Send, Buffer::Slot(slot, 8)).ok()?;
///     slot[0] = 1;
///     queue.poll()?.slot
/// }
/// ```
pub struct Slot {
    /// None once posted; but then no program holds it.
    bytes: Option<Box<[u8]>>,
    key: Key,
    /// The device's, alone: a slot comes and goes with each request.
    shared: Arc<Shared>,
}

impl Deref for Slot {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes.as_deref().unwrap_or_default()
    }
}

impl DerefMut for Slot {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.bytes.as_deref_mut().unwrap_or_default()
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot")
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}

impl Drop for Slot {
    #[inline]
    fn drop(&mut self) {
        if self.bytes.is_some() {
            self.shared.lock().device.memory.unreserve(self.key);
        }
    }
}

/// Memory that peers may read and write. Dropping it takes their rights away.
///
/// It is copied into and out of. Nobody can have a reference to bytes that a peer may change:
///
/// ```compile_fail,E0308
/// # use lowtide_transport::verbs::MemoryRegion;
/// fn bytes(region: &MemoryRegion) -> &[u8] {
///     region
/// }
/// ```
#[derive(Debug)]
pub struct MemoryRegion {
    memory: Arc<SharedMemory>,
    key: Key,
    device: Device,
}

impl MemoryRegion {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.memory.len()
    }

    /// Whether it has no byte at all.
    pub fn is_empty(&self) -> bool {
        self.memory.is_empty()
    }

    /// What a peer must know to reach the byte at `offset`.
    pub fn remote(&self, offset: u64) -> Remote {
        Remote {
            va: offset,
            rkey: Rkey(self.key.0),
        }
    }

    /// Copies bytes out. Panics outside the region.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        self.memory.read(offset, into);
    }

    /// Copies bytes in. Panics outside the region.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        self.memory.write(offset, bytes);
    }

    /// `len` bytes from `offset` on, as the local side of a work request. A range outside the
    /// region fails the request with [`Status::LocalProtection`].
    pub fn range(&self, offset: u64, len: u32) -> Buffer {
        Buffer::Region(Sge {
            lkey: Lkey(self.key.0),
            addr: offset,
            len,
        })
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        self.device.shared.lock().device.memory.deregister(self.key);
    }
}

/// The local memory of a work request.
#[derive(Debug)]
pub enum Buffer {
    /// None.
    Empty,
    /// The first so many bytes of a slot; it comes back with the completion.
    Slot(Slot, u32),
    /// A stretch of a region: see [`MemoryRegion::range`].
    Region(Sge),
}

/// A completed work request.
#[derive(Debug)]
pub struct WorkCompletion {
    /// The name it was posted under.
    pub id: u64,
    /// How it ended.
    pub status: Status,
    /// What it was.
    pub kind: CompletionKind,
    /// Bytes received or read.
    pub byte_len: u32,
    /// Immediate data.
    pub imm: Option<u32>,
    /// The local queue pair.
    pub qpn: Qpn,
    /// The slot it was posted with.
    pub slot: Option<Slot>,
}

/// Where completions go. Cloning shares it.
#[derive(Debug, Clone)]
pub struct CompletionQueue(Arc<CqHandle>);

#[derive(Debug)]
struct CqHandle {
    device: Device,
    raw: raw::CompletionQueue,
    posts: Arc<Posts>,
}

/// A send or receive queue: its place in the completion queue that serves it.
#[derive(Debug)]
struct Queue {
    cq: CompletionQueue,
    depth: u32,
    served: Served,
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.cq.0.posts.release(self.served, self.depth);
    }
}

impl Drop for CqHandle {
    fn drop(&mut self) {
        let mut state = self.device.shared.lock();
        for key in self.posts.abandoned() {
            state.device.memory.unreserve(key);
        }
    }
}

impl CompletionQueue {
    /// The next completion, if there is one. Drives the device if none is there, unless another thread
    /// has it in hand. Never waits for one.
    pub fn poll(&self) -> Option<WorkCompletion> {
        let shared = &self.0.device.shared;
        shared.find(self.0.raw.completions(), || self.take())
    }

    /// Appends up to `max` completions to `done`; how many.
    pub fn poll_many(&self, max: usize, done: &mut Vec<WorkCompletion>) -> usize {
        let before = done.len();
        if max > 0
            && let Some(first) = self.poll()
        {
            done.push(first);
            done.extend(std::iter::from_fn(|| self.take()).take(max - 1));
        }
        done.len() - before
    }

    #[inline(always)] // a completion is large: it is made where it goes
    fn take(&self) -> Option<WorkCompletion> {
        let handle = &*self.0;
        let done = handle.raw.completions().pop()?;
        let post = handle.posts.take(done.wr_id);
        let post = post.expect("what completes has been posted");
        Some(WorkCompletion {
            id: post.id,
            status: done.status,
            kind: done.kind,
            byte_len: done.byte_len,
            imm: done.imm,
            qpn: done.qpn,
            slot: post.slot.map(|kept| Slot {
                bytes: kept.bytes,
                key: kept.key,
                shared: handle.device.shared.clone(),
            }),
        })
    }

    /// Has the next completion told to the queue's channel, once. What is there already is not told:
    /// poll once more afterwards.
    pub fn request_notification(&self) {
        self.0.raw.request_notification(false);
    }

    /// The next completion, asleep until it comes or `timeout` is over.
    pub fn wait(&self, timeout: Duration) -> Option<WorkCompletion> {
        let deadline = deadline_in(timeout);
        loop {
            if let Some(completion) = self.poll() {
                return Some(completion);
            }
            if !self.0.raw.wait(deadline) {
                return self.poll();
            }
        }
    }
}

/// When `timeout` will be over; a time that no clock reaches is as good as for ever.
pub(crate) fn deadline_in(timeout: Duration) -> Instant {
    const FOREVER: Duration = Duration::from_secs(1 << 32);
    let now = Instant::now();
    now.checked_add(timeout).unwrap_or(now + FOREVER)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Its key too, for there are no more than so many.
    #[test]
    fn a_slot_that_nobody_polls_is_freed_with_its_completion_queue() {
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let device = Device::open(address, &DeviceOptions::default()).unwrap();
        let domain = device.protection_domain();
        let keys = || device.shared.lock().device.memory.keys();
        let before = keys();
        let queue = device.completion_queue(8);
        let qp = domain.queue_pair(&queue, &queue, 4, 4).unwrap();
        qp.to_init(Access::LOCAL).unwrap();
        for id in 0..4 {
            let slot = domain.slot(64).unwrap();
            qp.post_recv(id, Buffer::Slot(slot, 64)).unwrap();
        }
        drop(qp);
        drop(queue.poll().expect("what is posted comes back"));
        assert_eq!(keys(), before + 3);
        drop(queue);
        assert_eq!(keys(), before);
    }
}
