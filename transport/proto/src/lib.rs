//! RoCEv2 wire formats and queue pair state machines, sans-IO.
#![no_std]
#![forbid(unsafe_code)]
