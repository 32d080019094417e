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
#![deny(unsafe_code)]

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
