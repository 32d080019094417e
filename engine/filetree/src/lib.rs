//! A file tree kept on the recovery engine: the engine's reference application.
//!
//! It is written against [`lowtide_engine_core::session::Session`] alone and runs unchanged over
//! a live cluster, a simulated one and the state of a stopped one.
//!
//! Reading order:
//!
//! - [`layout`]: how inodes, names and contents are mapped to objects, and every value's format.
//! - [`tree`]: the operations (lookup, create, rename …), each one operation of the engine.
//! - [`local`]: sessions without a cluster: in memory, and read-only over a stopped cluster.
//! - [`store`], [`fetch`], [`compare`]: directories of this machine in, out, and held against
//!   a stored tree.
//! - [`check`]: whether a stored tree is consistent in itself.
//!
//! Deliberately absent: epochs, logs and messages; permission checks (a stored tree has
//! attributes, it does not enforce them); implicit changes of modification times (an application
//! sets them); extended attributes.
#![forbid(unsafe_code)]

pub mod check;
pub mod compare;
mod error;
pub mod fetch;
mod input;
pub mod layout;
pub mod local;
mod plan;
mod pool;
mod report;
pub mod store;
pub mod tree;

pub use error::TreeError;
pub use report::{Note, Notes, Progress};
