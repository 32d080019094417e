//! The recovery engine.
