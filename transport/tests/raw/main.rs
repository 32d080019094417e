//! The raw verbs: every test of the suite, for every way in which softroce reaches a peer.
#![allow(
    clippy::duplicate_mod,
    reason = "the same tests, each time with another way to the peer"
)]

#[path = "../common/mod.rs"]
mod common;

use std::sync::atomic::AtomicUsize;

/// Where the next pages of a test's own lie.
static NEXT_PAGES: AtomicUsize = AtomicUsize::new(0x1000_0000_0000);

/// By UDP on loopback addresses.
#[path = "."]
mod udp {
    use lowtide_transport::verbs::SameHost;

    const SAME_HOST: SameHost = SameHost::Udp;
    #[path = "suite.rs"]
    mod suite;
}

/// By rings in shared memory; the target copies.
#[path = "."]
mod rings {
    use lowtide_transport::verbs::SameHost;

    const SAME_HOST: SameHost = SameHost::Rings;
    #[path = "suite.rs"]
    mod suite;
}

/// By rings, and by the initiator in the target's memory.
#[path = "."]
mod direct {
    use lowtide_transport::verbs::SameHost;

    const SAME_HOST: SameHost = SameHost::Direct;
    #[path = "suite.rs"]
    mod suite;
}
