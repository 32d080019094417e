//! What softroce does and other providers do not, or cannot be made to do in a test: its ways to a
//! peer, its faults, memory that is not pinned, numbers that nobody guesses.

mod contention;
mod gone;
mod groups;
mod limits;
mod locked;
mod network;
mod others;
mod paths;
mod resets;
mod secrets;
mod unplugged;

use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::provider::{BadWr, Context, MemoryRegion, Queues};
use super::suite::*;
use super::{SAME_HOST, options};
use crate::common::{self, PATIENCE};
use lowtide_transport::raw::types::*;

/// The test `inside` of a module, without the name of this program.
fn inside_of(module: &str) -> String {
    let (_, module) = module.split_once("::").unwrap();
    format!("{module}::inside")
}
