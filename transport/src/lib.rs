//! RDMA without the hardware: verbs and messages over soft-RoCE on plain UDP sockets.
//!
//! Ways in, one device beneath:
//!
//! * [`message`]: an [`Endpoint`](message::Endpoint) with connections that carry whole messages, for
//!   an engine that owns its threads.
//! * [`raw`]: ibverbs' objects and meaning exactly, on memory of the caller, with `unsafe` in the
//!   contract: RC, UC, UD, shared receives, windows, multicast, events.
//! * [`verbs`]: device, protection domain, memory region, completion queue and queue pair with the
//!   meaning of ibverbs, for RDMA software that wants to run anywhere.
//! * [`cm`]: connections as rdma_cm makes them, for queue pairs of [`verbs`]: listen, connect, accept,
//!   events. It speaks to any rdma_cm program.
//!
//! Below them, each knowing nothing of those above:
//!
//! * `device`: the soft-RoCE device: queue pairs, timers, budgets, the ICRC.
//! * [`faults`]: seeded loss, duplication, reordering, corruption and partition, on every device.
//! * [`memory`]: what may be sent, placed and reached by peers.
//! * [`pcap`]: capture files, written by devices and read again.
//! * [`udp`]: the socket; the only module with system calls of its own.
//!
//! Beside them, with the same words:
//!
//! * [`ibv`]: the verbs on libibverbs, loaded at run time: adapters, and the kernel's rxe and siw.
//! * [`host`]: what softroce does between devices of one user on one host, if asked to.
//! * [`provider`]: which of them serves.
//!
//! The state machines and formats are in the crate `lowtide_transport_proto`, which knows no socket
//! and no clock. On the wire this is RoCEv2 as the Linux kernel's rxe and adapters speak it.
//!
//! Deliberately absent: what messages mean, and who is alive.
//!
//! # Security
//!
//! RoCE has no authentication and no encryption: any process of any host that reaches the UDP port may
//! send to it, every local one among them. Queue pair numbers, first PSNs and whole 32-bit keys are
//! random, from a source seeded by the operating system; a connection hears its peer's IP address
//! alone; whatever else comes is dropped and counted before it changes anything. Who can forge
//! addresses still has to know these numbers; who can read the traffic knows them. Keep the port on a
//! network that strangers cannot send to.
//!
//! # Errors
//!
//! Calls that fail have changed nothing, say why in words, and carry the errno of their counterpart
//! in C where there is one ([`raw::types::Error`]). What the network does is never an error of a call: it is
//! a completion with a [`verbs::Status`], an event, or a counter of [`verbs::Counters`].
#![deny(unsafe_code)]
#![warn(clippy::missing_errors_doc)]

pub mod cm;
mod device;
pub mod faults;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
pub mod host;
#[allow(unsafe_code)] // calls into libibverbs
pub mod ibv;
pub mod memory;
pub mod message;
mod names;
pub mod pcap;
pub mod provider;
#[allow(unsafe_code)] // its contract is about memory of the caller
pub mod raw;
#[allow(unsafe_code)] // system calls that no safe crate offers in this form
pub mod udp;
pub mod verbs;

// Any thread may hold and use any object.
const _: () = {
    const fn is_shared<T: Send + Sync>() {}
    is_shared::<verbs::Device>();
    is_shared::<verbs::ProtectionDomain>();
    is_shared::<verbs::MemoryRegion>();
    is_shared::<verbs::Slot>();
    is_shared::<verbs::CompletionQueue>();
    is_shared::<verbs::QueuePair>();
    is_shared::<raw::Context>();
    is_shared::<raw::CompletionChannel>();
    is_shared::<raw::QueuePair>();
    is_shared::<raw::MemoryRegion>();
    is_shared::<cm::EventChannel>();
    is_shared::<cm::Connection>();
    is_shared::<cm::Request>();
    is_shared::<ibv::Context>();
};
