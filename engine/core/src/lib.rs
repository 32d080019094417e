//! Protocol of the recovery engine, sans-IO.
#![no_std]
#![forbid(unsafe_code)]
