//! See `ci/loom`.
#[path = "../../../../engine/src/ring.rs"]
pub mod ring;
#[path = "../../../../transport/src/host/ring.rs"]
pub mod host_ring;
