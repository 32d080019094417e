//! Lowtide for C: the raw verbs and the connection manager under ibverbs' names.
//!
//! `include/lowtide.h` is made from this crate and is its documentation for C. Everything below is
//! translation: [`lowtide_transport::raw`] and [`lowtide_transport::cm`] do the work.
//!
//! Owns: the layout of C's structures, the handles behind C's pointers, who uses whom (EBUSY), and
//! events that are handed out and not acknowledged yet.
//!
//! Invariants:
//! * no panic leaves a function: it becomes EIO, with its words in the message;
//! * a pointer is looked at before it is followed: NULL and misaligned ones are EINVAL. Whether one
//!   that is neither is of a living object only the caller knows: that is the contract of every
//!   function here, and why all are `unsafe`;
//! * numbers from C never become a Rust `enum` unchecked: fields are integers, and the enumerations
//!   of the header only name their values.
//!
//! Deliberately absent: ibverbs' own ABI (its inline functions reach into structures of the
//! provider), datagram services of the connection manager, messages.
#![allow(
    non_camel_case_types,
    reason = "C's names, so that the header is this text"
)]
#![allow(
    clippy::missing_safety_doc,
    reason = "one contract for all: the head of this file and of the header"
)]

#[allow(
    missing_docs,
    reason = "the names are ibverbs', and so is what they mean"
)]
mod abi;
mod completion;
#[allow(missing_docs, reason = "as above, of rdma_cm")]
mod connect;
mod device;
mod error;
mod handle;
mod memory;
mod post;
mod queue_pair;

pub use abi::*;
pub use completion::*;
pub use connect::*;
pub use device::*;
pub use error::{lowtide_error_message, lowtide_wc_status_str};
pub use memory::*;
pub use post::*;
pub use queue_pair::*;
