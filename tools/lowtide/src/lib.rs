//! The `lowtide` command.
pub mod config;
pub mod fault;
