//! A deterministic simulator of whole clusters: the real state machines of the engine, with a
//! simulated network, simulated storage, faults and an all-seeing oracle.
//!
//! Reading order: [`plan`] (what a seed stands for), [`world`] (events), `connection`, [`mod@step`], `shards`, `recovery`, `old_root` and [`fate`] (what a node does, what befalls it), [`oracle`] (invariants),
//! [`runner`] (many seeds, determinism, minimising), [`scenario`] (scripts instead of chance).
#![forbid(unsafe_code)]

pub mod app;
mod connection;
pub mod disk;
pub mod fate;
pub mod net;
pub(crate) mod old_root;
pub mod oracle;
pub mod plan;
pub mod probe;
pub(crate) mod recovery;
pub mod rng;
pub mod runner;
pub mod scenario;
pub(crate) mod shards;
pub mod step;
pub mod verify;
pub mod world;
