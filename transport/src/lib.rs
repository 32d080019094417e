//! Verbs transport: device, memory region, queue pair and completion over soft-RoCE.
#![deny(unsafe_code)]

mod device;
pub mod faults;
pub mod memory;
pub mod message;
#[allow(unsafe_code)] // the one place that makes socket system calls
pub mod udp;
pub mod verbs;
