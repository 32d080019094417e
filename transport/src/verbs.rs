//! The verbs: device, protection domain, memory region, completion queue, queue pair.
//!
//! The words and their meaning are those of ibverbs; the calls are safe. Owns: the objects a program
//! holds, the thread that makes progress while nobody polls, and the way of a buffer through a work
//! request.
//!
//! Memory comes in two kinds, and neither needs a lifetime or `unsafe`:
//! * a [`Slot`] is owned by exactly one side. Posting it gives it away, its completion gives it
//!   back; in between nobody can touch it. Peers have no right to it, so it is sent without a copy
//!   and read as a plain slice.
//! * a [`MemoryRegion`] is shared with peers, which may change it at any time. It is only copied
//!   into and out of, by atomic words. Its addresses count from 0.
//!
//! Progress: whoever posts or polls drives the device under its lock, so an acknowledgement that is
//! owed leaves before its completion is seen. When nobody has for a millisecond, the device's own
//! thread takes over and sleeps in epoll; idle devices cost nothing.
//!
//! Invariant: a completion queue never overflows: the queues of its queue pairs are together no
//! deeper, and a request counts until its completion has been polled.
//!
//! Queue pairs are connected by exchanging [`Address`]es as `ibv_rc_pingpong` does, or by the
//! connection manager ([`crate::cm`]).
//!
//! Deliberately absent: UD and shared receive queues, inline data (copies are cheap here), memory of
//! the caller's choosing (a raw layer for a C ABI will bring it, with `unsafe` in its contract).

mod progress;
mod queue_pair;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lowtide_transport_proto::qp::{Lkey, QpCaps, Sge};
use lowtide_transport_proto::wire::Psn;

pub use lowtide_transport_proto::qp::{
    CompletionKind, InvalidTransition, PostError, QpState, Remote, Rkey, SendOp, Status,
};
pub use lowtide_transport_proto::wire::{Mtu, Qpn};

use self::progress::CqId;
pub(crate) use self::progress::{Shared, State};
pub use self::queue_pair::{Address, PostRefused, QueuePair, Reliability};
pub use crate::device::{Counters, DeviceOptions};
pub use crate::faults::Faults;
pub use crate::memory::Access;
use crate::memory::{Key, SharedMemory};
pub use crate::udp::SocketOptions;

/// A soft-RoCE device on one address and UDP port. Cloning shares it.
#[derive(Clone)]
pub struct Device {
    pub(crate) shared: Arc<Shared>,
    _progress: Arc<progress::Thread>,
}

impl Device {
    /// Opens a device on `address`, one of this host's, and starts its thread.
    ///
    /// # Errors
    /// `AddrInUse` when the port is taken, `InvalidInput` for the wildcard address, or whatever the
    /// operating system says.
    pub fn open(address: SocketAddr, options: &DeviceOptions) -> io::Result<Device> {
        let (shared, thread) = progress::start(address, options)?;
        Ok(Device {
            shared,
            _progress: Arc::new(thread),
        })
    }

    /// Its address and port.
    pub fn local_addr(&self) -> SocketAddr {
        self.shared.lock().device.local_addr()
    }

    /// A new protection domain.
    pub fn protection_domain(&self) -> ProtectionDomain {
        let mut state = self.shared.lock();
        state.domains += 1;
        ProtectionDomain {
            device: self.clone(),
            domain: state.domains,
        }
    }

    /// A completion queue for at most `depth` completions.
    pub fn completion_queue(&self, depth: u32) -> CompletionQueue {
        let id = self.shared.lock().add_cq(depth);
        CompletionQueue(Arc::new(CqHandle {
            device: self.clone(),
            id,
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
    domain: u32,
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
    /// A slot of `len` zero bytes, for SEND, RECV, and as the local side of WRITE and READ.
    ///
    /// # Errors
    /// [`CreateError::Exhausted`].
    pub fn slot(&self, len: usize) -> Result<Slot, CreateError> {
        let key = self.device.shared.lock().device.memory.reserve(self.domain);
        let key = key.ok_or(CreateError::Exhausted)?;
        let bytes = Some(vec![0; len].into_boxed_slice());
        Ok(Slot {
            bytes,
            key,
            device: self.device.clone(),
        })
    }

    /// A region of `len` zero bytes with rights for peers.
    ///
    /// # Errors
    /// [`CreateError::Exhausted`].
    pub fn memory_region(&self, len: usize, access: Access) -> Result<MemoryRegion, CreateError> {
        let memory = SharedMemory::new(len);
        let mut state = self.device.shared.lock();
        let key = state
            .device
            .memory
            .register_shared(self.domain, memory.clone(), access);
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
        let mut state = shared.lock();
        let psn = Psn::new(state.draw() as u32);
        let caps = QpCaps {
            send_wr_max: send_depth,
            recv_wr_max: recv_depth,
        };
        let (id, qpn) = state.add_qp(self.domain, caps, send_cq.0.id, recv_cq.0.id)?;
        drop(state);
        Ok(QueuePair {
            device: self.device.clone(),
            id,
            qpn,
            psn,
            _queues: [send_cq.clone(), recv_cq.clone()],
        })
    }
}

/// Memory that one side owns: the program, or a work request.
pub struct Slot {
    /// None while posted; but then no program holds it.
    bytes: Option<Box<[u8]>>,
    key: Key,
    device: Device,
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
    fn drop(&mut self) {
        if self.bytes.is_some() {
            self.device.shared.lock().device.memory.unreserve(self.key);
        }
    }
}

/// Memory that peers may read and write. Dropping it takes their rights away.
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
    id: CqId,
}

impl Drop for CqHandle {
    fn drop(&mut self) {
        self.device.shared.lock().remove_cq(self.id);
    }
}

impl CompletionQueue {
    /// The next completion, if there is one.
    pub fn poll(&self) -> Option<WorkCompletion> {
        let device = &self.0.device;
        let mut state = device.shared.lock();
        if state.is_cq_empty(self.0.id) {
            device.shared.drive(&mut state);
        }
        let (done, bytes) = state.pop_cq(self.0.id)?;
        drop(state);
        Some(WorkCompletion {
            id: done.id,
            status: done.status,
            kind: done.kind,
            byte_len: done.byte_len,
            imm: done.imm,
            qpn: done.qpn,
            slot: bytes.map(|(key, bytes)| Slot {
                bytes: Some(bytes),
                key,
                device: device.clone(),
            }),
        })
    }

    /// The next completion, asleep until it comes or `timeout` is over.
    pub fn wait(&self, timeout: Duration) -> Option<WorkCompletion> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(completion) = self.poll() {
                return Some(completion);
            }
            if !self.0.device.shared.sleep(self.0.id, deadline) {
                return self.poll();
            }
        }
    }
}
