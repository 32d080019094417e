//! The device's memory as one queue pair sees it.

use lowtide_transport_proto::qp::{
    self, AccessError, AtomicOp, Bind, Fragment, Lkey, RecvWr, Rkey,
};

use super::IN_PLACE;
use crate::memory::{Access, Key, Memory};

pub(super) fn key_of(fragment: &Fragment) -> Key {
    match fragment.key {
        qp::Key::Local(Lkey(key)) | qp::Key::Remote(Rkey(key)) => Key(key),
    }
}

/// A device's memory as far as one queue pair and its peer may reach, for the handling of one packet.
pub(super) struct View<'a> {
    pub(super) memory: &'a mut Memory,
    /// Protection domain of our own work requests.
    pub(super) domain: u32,
    /// Protection domain of what the peer names.
    pub(super) peer_domain: u32,
    /// Offset in its message of a payload for an [`IN_PLACE`] receive.
    pub(super) placed: Option<u64>,
}

pub(super) fn wanted(access: qp::Access) -> Access {
    Access {
        local_write: false,
        remote_write: access.remote_write,
        remote_read: access.remote_read,
        remote_atomic: access.remote_atomic,
    }
}

impl qp::Memory for View<'_> {
    fn check_remote(
        &self,
        rkey: Rkey,
        va: u64,
        len: u32,
        access: qp::Access,
    ) -> Result<(), AccessError> {
        let checked = self
            .memory
            .check(self.peer_domain, Key(rkey.0), va, len, wanted(access));
        checked.map(drop).map_err(|_| AccessError)
    }

    fn place(&mut self, target: Fragment, payload: &[u8]) -> Result<(), AccessError> {
        if target.key == qp::Key::Local(IN_PLACE) {
            self.placed = Some(target.addr);
            return Ok(());
        }
        let (domain, right) = match target.key {
            qp::Key::Local(_) => (self.domain, Access::LOCAL),
            qp::Key::Remote(_) => (self.peer_domain, wanted(qp::Access::WRITE)),
        };
        let key = key_of(&target);
        let span = self
            .memory
            .check(domain, key, target.addr, target.len, right)
            .map_err(|_| AccessError)?;
        self.memory.place(span, payload);
        Ok(())
    }

    fn atomic(&mut self, rkey: Rkey, va: u64, op: AtomicOp) -> Result<u64, AccessError> {
        let right = match op {
            AtomicOp::Write { .. } => qp::Access::WRITE,
            _ => qp::Access::ATOMIC,
        };
        let span = self
            .memory
            .check(self.peer_domain, Key(rkey.0), va, 8, wanted(right))
            .map_err(|_| AccessError)?;
        let shared = self.memory.shared(span).ok_or(AccessError)?;
        let offset = span.offset as usize;
        Ok(match op {
            AtomicOp::CompareSwap { compare, swap } => shared.compare_swap(offset, compare, swap),
            AtomicOp::FetchAdd { add } => shared.fetch_add(offset, add),
            AtomicOp::Write { value } => shared.swap(offset, u64::from_ne_bytes(value)),
        })
    }

    fn invalidate(&mut self, rkey: Rkey) -> Result<(), AccessError> {
        self.memory
            .invalidate(self.peer_domain, Key(rkey.0))
            .map_err(|_| AccessError)
    }

    fn invalidate_local(&mut self, rkey: Rkey) -> Result<(), AccessError> {
        self.memory
            .invalidate(self.domain, Key(rkey.0))
            .map_err(|_| AccessError)
    }

    /// No region admits windows yet.
    fn bind(&mut self, _: &Bind) -> Result<(), AccessError> {
        Err(AccessError)
    }

    /// No region grants it yet.
    fn flush(&mut self, _: Rkey, _: qp::Access) -> Result<(), AccessError> {
        Err(AccessError)
    }

    fn shared_receive(&mut self) -> Option<RecvWr> {
        None
    }
}
