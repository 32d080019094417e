//! The other ends of RDMA programs that others wrote, so that those can judge us.
//!
//! - [`perftest`]: `ib_send_bw` and its like; the command `lowtide perftest-peer`.
//! - [`end`]: what it stands on, a device with memory, and queue pairs whose places are told out of
//!   band.
//!
//! The binaries are what ci/guest runs against the kernel's rxe: `rping` and `udaddy` (librdmacm's),
//! `pingpong` (libibverbs'), `matrix`, the counterpart of ci/guest/peer.c, and `providers`, a conversation
//! between any two providers; `progress`, which ci/progress runs; `throughput`, which shows what
//! streams cost here and now (what is kept is measured by `bench`); and `instructions`, which counts those
//! of a round trip.
#![deny(unsafe_code)]

#[allow(unsafe_code)] // the raw verbs' contract is about memory
pub mod end;
pub mod perftest;
