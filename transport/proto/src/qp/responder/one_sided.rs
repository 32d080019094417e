//! Requests that the responder answers with more than an ACK, and so remembers.

use super::super::Link;
use super::super::memory::{Access, AtomicOp, Memory, Rkey};
use super::{INVALID, Refusal, Responder};
use crate::wire::{AtomicEth, Feth, MESSAGE_LEN_MAX, Reth};

impl Responder {
    pub(super) fn execute_read(
        &mut self,
        reth: Reth,
        memory: &mut impl Memory,
        link: &Link,
    ) -> Result<u32, Refusal> {
        if !link.access.remote_read || reth.len > MESSAGE_LEN_MAX || !self.answers.can_replay() {
            return Err(INVALID);
        }
        if reth.len > 0 {
            memory.check_remote(Rkey(reth.rkey), reth.va, reth.len, Access::READ)?;
        }
        let packets = link.mtu.packets(reth.len);
        self.count_message();
        self.answers.read(self.expected, packets, reth, self.msn);
        Ok(packets)
    }

    pub(super) fn execute_atomic(
        &mut self,
        eth: AtomicEth,
        op: AtomicOp,
        memory: &mut impl Memory,
        link: &Link,
    ) -> Result<u32, Refusal> {
        if !link.access.remote_atomic || !eth.va.is_multiple_of(8) || !self.answers.can_replay() {
            return Err(INVALID);
        }
        let original = memory.atomic(Rkey(eth.rkey), eth.va, op)?;
        self.count_message();
        self.answers.atomic(self.expected, original, self.msn);
        Ok(1)
    }

    pub(super) fn execute_atomic_write(
        &mut self,
        reth: Reth,
        payload: &[u8],
        memory: &mut impl Memory,
        link: &Link,
    ) -> Result<u32, Refusal> {
        let Ok(value) = payload.try_into() else {
            return Err(INVALID);
        };
        if !link.access.remote_write
            || reth.len != 8
            || !reth.va.is_multiple_of(8)
            || !self.answers.can_replay()
        {
            return Err(INVALID);
        }
        memory.atomic(Rkey(reth.rkey), reth.va, AtomicOp::Write { value })?;
        self.count_message();
        self.answers.done(self.expected, self.msn);
        Ok(1)
    }

    pub(super) fn execute_flush(
        &mut self,
        feth: Feth,
        reth: Reth,
        memory: &mut impl Memory,
        link: &Link,
    ) -> Result<u32, Refusal> {
        let access = Access {
            flush_global: feth.global(),
            flush_persistent: feth.persistent(),
            ..Access::NONE
        };
        if !feth.is_valid() || !link.access.allows(access) || !self.answers.can_replay() {
            return Err(INVALID);
        }
        if !feth.whole_region() && reth.len > 0 {
            memory.check_remote(Rkey(reth.rkey), reth.va, reth.len, access)?;
        }
        memory.flush(Rkey(reth.rkey), access)?;
        self.count_message();
        self.answers.done(self.expected, self.msn);
        Ok(1)
    }
}
