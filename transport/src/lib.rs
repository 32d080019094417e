//! Verbs transport: device, memory region, queue pair and completion over soft-RoCE.
#![deny(unsafe_code)]

pub mod device;
pub mod faults;
pub mod memory;
mod message;
#[allow(unsafe_code)] // the one place that makes socket system calls
pub mod udp;
