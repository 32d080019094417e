//! The mind of the recovery engine: epochs, operations, locks, windows, undo, the global
//! minimum and recovery, as deterministic state machines without I/O.
//!
//! Reading order:
//!
//! - [`ids`]: the number spaces (epoch, operation, incarnation, term, grant), kept apart by type.
//! - [`bytes`]: shared immutable bytes.
//! - [`op`]: objects, updates, operations and what a caller asks of a session.
//! - [`message`]: every message of the protocol and its encoding.
//! - [`epoch`]: rules E1–E4 of seed 001 and the pins under which operations are stamped.
//! - [`lock`]: range locks with grant ids, granted along a chain of tiers to an object's home.
//! - [`source`]: the redo half of every node that issues or forwards operations (windows, lower bound).
//! - [`client`], [`proxy`], [`destination`], [`root`], [`aggregator`]: one state machine per role.
//! - [`identity`]: how a home that lost its storage is noticed.
//! - [`member`]: how a node joins, pings its parent and learns the view.
//! - [`record`]: what a destination writes to its log.
//! - [`room`]: what may be stamped, so that nothing stamped is ever refused for space.
//! - [`teeth`]: faults seeded to show that the simulator finds them; absent from normal builds.
//!
//! Contract of every state machine: `handle_*(now, input)` in, effects out of a [`effect::Effects`]
//! queue, time is an argument measured in abstract ticks, no thread, no clock, no source of
//! randomness, iteration order fixed.
//!
//! Deliberately absent: sockets, pages, nanoseconds, file systems. `transport` never learns what an
//! epoch is; this crate never learns what a queue pair is.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod aggregator;
pub mod bytes;
pub mod client;
pub mod destination;
pub mod effect;
pub mod epoch;
pub mod identity;
pub mod ids;
pub mod lock;
pub mod member;
pub mod message;
pub mod op;
pub mod proxy;
pub mod record;
pub mod room;
pub mod root;
pub mod session;
pub mod source;
pub mod teeth;
mod tier;
pub mod wire;
