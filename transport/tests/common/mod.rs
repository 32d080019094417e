//! What the tests over real sockets share: addresses nobody else uses, and loops with an end.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use lowtide_transport::message::{Endpoint, EndpointConfig, EndpointCtx, Event};

/// Nothing here takes longer, even on a machine that does ten other things.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A loopback address of this process alone.
pub fn address() -> SocketAddr {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let pid = std::process::id();
    // Processes run at the same time only if their ids are close to each other.
    let (high, low) = ((pid >> 7 & 0x7F) as u8, (pid & 0x7F) as u8);
    let last = NEXT.fetch_add(1, Ordering::Relaxed);
    SocketAddr::from((Ipv4Addr::new(127, 128 | high, 1 + low, last), 4791))
}

/// A configuration with a node number of its own.
pub fn config(node: u64) -> EndpointConfig {
    EndpointConfig::new(address(), node, 1)
}

/// Polls all `endpoints` in turn, for at most [`PATIENCE`], until `done`.
pub fn run_until<S>(
    endpoints: &mut [&mut Endpoint],
    state: &mut S,
    mut handler: impl FnMut(&mut S, usize, &mut EndpointCtx, Event<'_>),
    mut done: impl FnMut(&mut S, &mut [&mut Endpoint]) -> bool,
) {
    let start = Instant::now();
    while !done(state, endpoints) {
        assert!(start.elapsed() < PATIENCE, "nothing more happens");
        for (index, endpoint) in endpoints.iter_mut().enumerate() {
            endpoint
                .poll(Some(Duration::ZERO), &mut |ctx, event| {
                    handler(state, index, ctx, event)
                })
                .unwrap();
        }
    }
}
