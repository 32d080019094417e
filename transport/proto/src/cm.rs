//! Connection manager.
