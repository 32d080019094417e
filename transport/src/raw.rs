//! The raw verbs: ibverbs' meaning exactly, for whoever brings memory of their own.
//!
//! [`types`] is the vocabulary that every provider speaks; the rest is soft-RoCE's half of it. A C ABI
//! stands on this module, and so does the safe layer, [`crate::verbs`]: it adds only who owns a
//! buffer while a request has it.
//!
//! Owns: the objects a program holds, and everything between them and the device: completion queues
//! and their channels, asynchronous events, the thread that makes progress while nobody polls.
//!
//! Memory is the caller's and lies anywhere. It is named by key, address and length, and registering
//! and posting are `unsafe`, because the device and peers read and change it behind the compiler's
//! back. That promise is about aliasing only: memory that goes away while registered costs a
//! completion with an error, never the process (see [`crate::memory`]).
//!
//! Objects live as long as something holds them, so nothing is ever destroyed under something that
//! uses it; where C answers EBUSY, the last holder's drop does the work here.
//!
//! Progress: whoever posts or polls tries for the device's token and drives it, so an acknowledgement
//! that is owed leaves before its completion is seen, or with the post that the program makes of it, if
//! it has made one each time before (`habit`). If another thread has the token, a post waits in a line
//! for that thread (`posts`), and a poll finds what is there (`ring`); neither waits. When nobody has
//! driven the device for a millisecond, its own thread takes over and sleeps in epoll; idle devices
//! cost nothing. Asking for a notification hands over at once. All other calls wait for the token.
//!
//! A GID is an address and knows no UDP port: peers are taken to listen on the port that this device
//! listens on, [`lowtide_transport_proto::wire::UDP_PORT`] unless the caller chose another.
//!
//! Deliberately absent: alternate paths, several ports and GIDs of one device (a device is one
//! address), traffic class, hop limit and flow label of an address (they are the socket's),
//! automatic resizing of anything, on-demand paging (there is no paging: the kernel copies),
//! persistent memory.

mod address;
mod completion;
pub(crate) mod event_fd;
mod habit;
mod posting;
mod posts;
mod progress;
mod queue_pair;
mod region;
mod ring;
mod shared_receive;
mod tables;
mod token;
pub mod types;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use lowtide_transport_proto::qp::SGE_MAX;
use lowtide_transport_proto::wire::{MESSAGE_LEN_MAX, Mtu};

pub use self::address::AddressHandle;
pub use self::completion::{CompletionChannel, CompletionQueue};
use self::event_fd::EventFd;
pub(crate) use self::posting::Brought;
pub(crate) use self::posts::Room;
pub(crate) use self::progress::{Shared, State};
pub(crate) use self::queue_pair::Poster;
pub use self::queue_pair::{BadWr, QueuePair, Queues};
pub use self::region::{MemoryRegion, MemoryWindow};
pub use self::shared_receive::SharedReceiveQueue;
pub(crate) use self::tables::Keeper;
use self::types::{
    AsyncEvent, AtomicCap, DeviceAttr, Error, Gid, GidEntry, GidType, PortAttr, PortState,
};
use crate::device::{
    ADDRESSES_MAX, Counters, DeviceOptions, GROUPS_MAX, QUEUE_PAIRS_MAX, WORK_REQUESTS_MAX,
};
use crate::memory::Memory;
use crate::udp::interface_mtu;

/// Entries of a completion queue at most.
pub(crate) const CQE_MAX: u32 = 1 << 22;
/// Bytes of inline data of one request at most, as Linux rxe.
const INLINE_MAX: u32 = 512;
/// READs and atomics of one queue pair at once, each way, at most.
const RD_ATOMIC_MAX: u8 = 128;

/// An open soft-RoCE device on one address and UDP port. Cloning shares it.
#[derive(Clone)]
pub struct Context {
    pub(crate) shared: Arc<Shared>,
    events: Arc<EventFd>,
    _progress: Arc<progress::Thread>,
}

impl Context {
    /// Opens a device on `address`, one of this host's, and starts its thread.
    ///
    /// # Errors
    /// `AddrInUse` when the port is taken, `InvalidInput` for the wildcard address, or whatever the
    /// operating system says.
    pub fn open(address: SocketAddr, options: &DeviceOptions) -> io::Result<Context> {
        let (shared, thread) = progress::start(address, options)?;
        let events = shared.lock().tables.events.fd();
        Ok(Context {
            shared,
            events,
            _progress: Arc::new(thread),
        })
    }

    /// Its address and port.
    pub fn local_addr(&self) -> SocketAddr {
        self.shared.lock().device.local_addr()
    }

    /// What the device has seen.
    pub fn counters(&self) -> Counters {
        self.shared.lock().device.counters()
    }

    /// What the device can do.
    pub fn query_device(&self) -> DeviceAttr {
        DeviceAttr {
            guid: guid(self.local_addr()),
            mr_size: isize::MAX as u64,
            qp: QUEUE_PAIRS_MAX as u32,
            qp_wr: WORK_REQUESTS_MAX,
            sge: SGE_MAX as u32,
            inline_data: INLINE_MAX,
            cq: QUEUE_PAIRS_MAX as u32,
            cqe: CQE_MAX,
            mr: Memory::REGIONS_MAX as u32,
            mw: Memory::REGIONS_MAX as u32,
            pd: u32::MAX,
            ah: ADDRESSES_MAX as u32,
            srq: QUEUE_PAIRS_MAX as u32,
            srq_wr: WORK_REQUESTS_MAX,
            qp_rd_atom: u32::from(RD_ATOMIC_MAX),
            qp_init_rd_atom: u32::from(RD_ATOMIC_MAX),
            mcast_grp: GROUPS_MAX as u32,
            atomic_cap: AtomicCap::Device,
            phys_port_cnt: 1,
        }
    }

    /// Port 1.
    ///
    /// # Errors
    /// [`Error::Limit`] for any other port.
    pub fn query_port(&self, port: u8) -> Result<PortAttr, Error> {
        if port != 1 {
            return Err(Error::Limit("port number"));
        }
        Ok(PortAttr {
            state: PortState::Active,
            max_mtu: Mtu::B4096,
            active_mtu: self.port_mtu(),
            gid_tbl_len: 1,
            max_msg_sz: MESSAGE_LEN_MAX,
            pkey_tbl_len: 1,
            lid: 0,
            is_ethernet: true,
        })
    }

    /// The one GID.
    pub fn gid(&self) -> GidEntry {
        GidEntry {
            index: 0,
            gid: Gid::from_ip(self.local_addr().ip()),
            kind: GidType::RoceV2,
        }
    }

    fn port_mtu(&self) -> Mtu {
        port_mtu(self.local_addr())
    }

    /// A new protection domain.
    pub fn protection_domain(&self) -> ProtectionDomain {
        let mut state = self.shared.lock();
        state.domains += 1;
        ProtectionDomain {
            context: self.clone(),
            domain: state.domains,
        }
    }

    /// The next asynchronous event, if there is one. The context is readable, for whoever polls
    /// file descriptors, as long as there is.
    pub fn async_event(&self) -> Option<AsyncEvent> {
        self.shared.lock().tables.events.pop()
    }
}

impl AsFd for Context {
    /// Readable while an asynchronous event waits.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").finish_non_exhaustive()
    }
}

/// What memory and queue pairs must have in common to meet. Cloning shares it.
#[derive(Debug, Clone)]
pub struct ProtectionDomain {
    pub(crate) context: Context,
    pub(crate) domain: u32,
}

impl ProtectionDomain {
    /// Its device.
    pub fn context(&self) -> &Context {
        &self.context
    }

    fn is_of(&self, context: &Context) -> bool {
        Arc::ptr_eq(&self.context.shared, &context.shared)
    }
}

/// The largest MTU of packets that fit the interface of this address.
fn port_mtu(address: SocketAddr) -> Mtu {
    // An interface that cannot be asked is taken for an Ethernet.
    let link = interface_mtu(address.ip()).unwrap_or(1500);
    Mtu::for_link(link).unwrap_or(Mtu::B256)
}

/// A GUID as rxe makes one: of the address, locally administered.
fn guid(address: SocketAddr) -> u64 {
    let Gid(bytes) = Gid::from_ip(address.ip());
    let mut low = [0; 8];
    low.copy_from_slice(&bytes[8..]);
    u64::from_be_bytes(low) | 0x0200_0000_0000_0000
}
