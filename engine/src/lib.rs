//! The recovery engine.

pub mod log;
pub mod medium;
pub mod store;
