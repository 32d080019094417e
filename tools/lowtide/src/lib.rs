//! The `lowtide` command, as a library so that tests can reach its parts.
//!
//! Reading order:
//!
//! - [`cli`]: the command line; [`commands`]: what each subcommand does and how it fails.
//! - [`config`]: cluster and node files; [`state`]: the directory of a local cluster;
//!   [`address`]: where its nodes listen.
//! - [`fault`]: what `run` can break; [`input`]: what it stores; [`report`]: what it found.
//! - [`supervisor`]: the run itself.
//! - [`jobs`], [`files`], [`journal`]: what a client process does with the tree.
//! - [`devices`]: what this machine has for RDMA.
//! - [`dissect`]: what packets in capture files say.
//! - [`control`]: how node processes take orders; [`engine`]: the one place that meets the engine.
#![forbid(unsafe_code)]

pub mod address;
pub mod cli;
pub mod commands;
pub mod config;
pub mod control;
pub mod devices;
pub mod dissect;
pub mod engine;
pub mod fault;
pub mod files;
pub mod input;
pub mod jobs;
pub mod journal;
pub mod report;
pub mod state;
pub mod supervisor;
