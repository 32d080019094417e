//! The recovery engine's hands: threads, logs, store and clock around the state machines of
//! `lowtide-engine-core`, on the messages of `lowtide-transport`.
//!
//! - [`node`]: a running node of any role; start here.
//! - [`session`]: what an application holds of a client node.
//! - `server`: a destination's front and shards with their threads and [`ring`]s.
//! - [`storage`]: a destination's durable state behind the mind's `Storage` trait.
//! - [`log`], [`store`], [`medium`]: mapped log with group commit, checkpoint store, and the media
//!   both run on.
//! - [`offline`]: the state of a stopped or crashed cluster, recovered without its network.
//! - [`frame`]: how an envelope travels; [`crc`]: the checksum all of them carry.
//! - [`status`]: what a node tells about itself.
#![deny(unsafe_code)]

pub mod crc;
pub mod frame;
pub mod log;
pub mod medium;
pub mod node;
pub mod offline;
#[allow(unsafe_code)] // cells that one of two threads owns
pub mod ring;
pub(crate) mod server;
pub mod session;
pub mod status;
pub mod storage;
pub mod store;
