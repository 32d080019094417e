//! RoCEv2 wire formats and queue pair state machines, sans-IO.
//!
//! The crate is the mind of a soft-RoCE device. It owns no socket, no clock, no memory region and
//! no random source; the caller (the hands) brings bytes in and carries bytes out. From the bottom:
//!
//! * [`time`]: `Nanos`, the only notion of time; always an argument.
//! * [`wire`]: the packet formats: one table of opcodes, [`wire::Packet`] to read, [`wire::Header`]
//!   to emit.
//! * [`icrc`]: the invariant CRC over what the network may not change, and how to check it where
//!   the socket hides the IPv4 identification.
//! * [`qp`]: queue pairs. [`qp::QueuePair`] is the reliable (and the unreliable) connection,
//!   [`qp::UdQueuePair`] the datagram.
//! * [`cm`]: the connection manager that rdma_cm peers speak on queue pair 1.
//!
//! Every state machine has four kinds of methods: application commands (`post_*`, `to_*`,
//! `connect`), inputs (`handle_*`), outputs (`poll_*`) and getters. After any command or input the
//! caller drains `poll_transmit`, then `poll_completion` (or `poll_event`), then asks
//! `poll_timeout` when to come back.
//!
//! What each packet passes is `#[inline]`: nearly all of it has one caller, in another crate, and a call
//! costs as much as what it does.
//!
//! Deliberately absent: sockets, IP headers on the way out, memory registration, completion queues
//! shared by several queue pairs, and any knowledge of what the messages mean.
#![no_std]
#![warn(clippy::missing_errors_doc)]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(any(test, feature = "std"))]
extern crate std;

pub mod cm;
pub mod icrc;
pub mod qp;
pub mod time;
pub mod wire;
