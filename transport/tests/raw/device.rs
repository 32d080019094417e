//! The suite on a device of libibverbs: `LOWTIDE_DEVICE=rxe0 cargo test --test device`.
//!
//! No default of `cargo test`: whoever asks for it without a device gets failures, not silence.
//! `ci/guest/verbs` runs it on the kernel's rxe, each test in a process of its own.

#[path = "../common/mod.rs"]
mod common;

use std::sync::atomic::AtomicUsize;

/// Where the next pages of a test's own lie.
static NEXT_PAGES: AtomicUsize = AtomicUsize::new(0x1000_0000_0000);

mod capabilities;
mod messages;
mod provider;

fn options() -> provider::DeviceOptions {
    provider::DeviceOptions
}

#[path = "suite.rs"]
mod suite;
mod taken_away;
