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

/// Softroce as the suite wants a provider.
mod softroce_provider {
    pub use lowtide_transport::raw::*;

    /// Its errors say what is wrong, not only a number.
    pub const HAS_WORDS: bool = true;
    /// Every completion of a receive has these flags.
    pub const FLAGS_OF_ANY_RECEIVE: types::WcFlags = types::WcFlags::NONE;

    /// Packets that the device has repeated to ask how things stand.
    pub fn asked_early(context: &Context) -> u64 {
        context.counters().probes
    }
}

/// What a way to a peer is asked for by.
macro_rules! way {
    ($way:ident) => {
        use crate::softroce_provider as provider;
        use lowtide_transport::verbs::{DeviceOptions, SameHost};

        const SAME_HOST: SameHost = SameHost::$way;

        fn options() -> DeviceOptions {
            DeviceOptions {
                same_host: SAME_HOST,
                ..DeviceOptions::default()
            }
        }
    };
}

/// By UDP on loopback addresses.
#[path = "."]
mod udp {
    way!(Udp);
    #[path = "by_hand.rs"]
    mod by_hand;
    #[path = "fair.rs"]
    mod fair;
    #[path = "softroce.rs"]
    mod softroce;
    #[path = "suite.rs"]
    mod suite;
}

/// By rings in shared memory; the target copies.
#[path = "."]
mod rings {
    way!(Rings);
    #[path = "softroce.rs"]
    mod softroce;
    #[path = "suite.rs"]
    mod suite;
}

/// By rings, and by the initiator in the target's memory.
#[path = "."]
mod direct {
    way!(Direct);
    #[path = "mixed.rs"]
    mod mixed;
    #[path = "softroce.rs"]
    mod softroce;
    #[path = "suite.rs"]
    mod suite;
}
