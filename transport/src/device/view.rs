//! The device's memory as one queue pair sees it.

use std::sync::atomic::{Ordering, fence};

use lowtide_transport_proto::qp::{
    self, AccessError, AtomicOp, Bind, Fragment, Lkey, RecvWr, Rkey,
};

use super::IN_PLACE;
use super::shared_receives::SharedReceives;
use crate::memory::{Access, Key, Memory, Span, WindowPlace};

/// A device's memory as far as one queue pair and its peer may reach, for the handling of one packet.
pub(super) struct View<'a> {
    pub(super) memory: &'a mut Memory,
    /// Protection domain of our own work requests.
    pub(super) domain: u32,
    /// Protection domain of what the peer names.
    pub(super) peer_domain: u32,
    /// The queue pair's number.
    pub(super) qp: u32,
    /// Offset in its message of a payload for an [`IN_PLACE`] receive.
    pub(super) placed: Option<u64>,
    /// Where its receives come from, if several queue pairs share them.
    pub(super) shared: Option<&'a mut SharedReceives>,
}

pub(super) fn wanted(access: qp::Access) -> Access {
    Access {
        local_write: false,
        remote_write: access.remote_write,
        remote_read: access.remote_read,
        remote_atomic: access.remote_atomic,
        flush_global: access.flush_global,
        window_bind: false,
    }
}

impl View<'_> {
    fn check(
        &self,
        rkey: Rkey,
        va: u64,
        len: u32,
        access: qp::Access,
    ) -> Result<Span, AccessError> {
        // No region here is persistent.
        if access.flush_persistent {
            return Err(AccessError);
        }
        let (domain, key) = (self.peer_domain, Key(rkey.0));
        self.memory
            .check_peer(domain, self.qp, key, va, len, wanted(access))
            .map_err(|_| AccessError)
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
        self.check(rkey, va, len, access).map(drop)
    }

    fn place(&mut self, target: Fragment, payload: &[u8]) -> Result<(), AccessError> {
        let span = match target.key {
            qp::Key::Local(IN_PLACE) => {
                self.placed = Some(target.addr);
                return Ok(());
            }
            qp::Key::Local(Lkey(key)) => {
                let right = Access::LOCAL;
                let (key, va) = (Key(key), target.addr);
                let span = self.memory.check(self.domain, key, va, target.len, right);
                span.map_err(|_| AccessError)?
            }
            qp::Key::Remote(rkey) => {
                self.check(rkey, target.addr, target.len, qp::Access::WRITE)?
            }
        };
        self.memory.place(span, payload).map_err(|_| AccessError)
    }

    fn atomic(&mut self, rkey: Rkey, va: u64, op: AtomicOp) -> Result<u64, AccessError> {
        let right = match op {
            AtomicOp::Write { .. } => qp::Access::WRITE,
            _ => qp::Access::ATOMIC,
        };
        let span = self.check(rkey, va, 8, right)?;
        self.memory.atomic(span, op).map_err(|_| AccessError)
    }

    fn invalidate(&mut self, rkey: Rkey) -> Result<(), AccessError> {
        self.memory
            .invalidate(self.peer_domain, self.qp, Key(rkey.0))
            .map_err(|_| AccessError)
    }

    fn invalidate_local(&mut self, rkey: Rkey) -> Result<(), AccessError> {
        self.memory
            .invalidate(self.domain, self.qp, Key(rkey.0))
            .map_err(|_| AccessError)
    }

    fn bind(&mut self, bind: &Bind) -> Result<(), AccessError> {
        let place = WindowPlace {
            region: Key(bind.region.0),
            addr: bind.addr,
            len: bind.len,
            is_zero_based: bind.zero_based,
        };
        let (window, new) = (Key(bind.window.0), Key(bind.rkey.0));
        self.memory
            .bind(
                self.domain,
                self.qp,
                window,
                new,
                &place,
                wanted(bind.access),
            )
            .map_err(|_| AccessError)
    }

    fn flush(&mut self, rkey: Rkey, access: qp::Access) -> Result<(), AccessError> {
        if access.flush_persistent
            || !self
                .memory
                .grants_flush(self.peer_domain, self.qp, Key(rkey.0))
        {
            return Err(AccessError);
        }
        // Whoever sees the answer sees what was placed before.
        fence(Ordering::SeqCst);
        Ok(())
    }

    fn shared_receive(&mut self) -> Option<RecvWr> {
        self.shared.as_mut()?.take()
    }
}
