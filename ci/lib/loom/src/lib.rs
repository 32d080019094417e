//! See `ci/loom`.
#[path = "../../../../engine/src/ring.rs"]
pub mod ring;
