//! The `lowtide` command.
pub mod address;
pub mod config;
pub mod control;
pub mod engine;
pub mod fault;
pub mod input;
pub mod report;
pub mod state;
pub mod supervisor;
