//! A queue pair's handle: its states, and the way of memory into a work request.
//!
//! Invariant: a slot that was posted is the request's until its completion; a request that was
//! refused gives it back.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use lowtide_transport_proto::qp::{
    self, InitAttr, InvalidTransition, Lkey, PostError, QpState, RecvWr, RtrAttr, RtsAttr, SendOp,
    SendWr, SgList, Sge, WrId,
};
use lowtide_transport_proto::wire::{MESSAGE_LEN_MAX, Mtu, PKEY_DEFAULT, Psn, Qpn, RnrTimer};

use super::{Buffer, Device, Queue};
use crate::device::QpId;
use crate::memory::Access;
use crate::raw::{self, Brought, Poster};
use crate::udp::path_mtu;

/// READs and atomics a queue pair serves, and has under way, at once.
const RD_ATOMIC: u8 = 16;
/// Response packets asked for by one READ request at most, so that no READ floods its requester: with
/// the last of the request before, two full runs of segments.
const READ_CHUNK: u32 = 33;

/// A work request that was not taken, and its memory.
#[derive(Debug)]
pub struct PostRefused {
    /// Why.
    pub error: PostError,
    /// What was to be sent or filled.
    pub buffer: Buffer,
}

impl fmt::Display for PostRefused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the work request was not taken: {:?}", self.error)
    }
}

impl std::error::Error for PostRefused {}

/// What a peer must know to connect: its socket, queue pair, first PSN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// IP address, and the UDP port it listens on.
    pub socket: SocketAddr,
    /// Queue pair number.
    pub qpn: Qpn,
    /// First packet sequence number.
    pub psn: u32,
    /// Full datagrams that its receive buffer holds; 0 if it did not say.
    pub budget: u32,
}

/// How a reliable connection behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reliability {
    /// Path MTU, the same on both sides; none takes the largest that the link carries.
    pub mtu: Option<Mtu>,
    /// Local ACK timeout: 4.096 us times 2 to this power; 0 means that no timeout fails.
    pub ack_timeout: u8,
    /// Timeouts without progress before the queue pair fails; 7 is without limit.
    pub retry_count: u8,
    /// The same for a peer that has posted no receive.
    pub rnr_retry: u8,
}

impl Default for Reliability {
    /// The link's MTU, 67 ms, and patience without limit.
    fn default() -> Self {
        Reliability {
            mtu: None,
            ack_timeout: 14,
            retry_count: 7,
            rnr_retry: 7,
        }
    }
}

/// A reliable connection's end.
#[derive(Debug)]
pub struct QueuePair {
    pub(crate) device: Device,
    pub(crate) id: QpId,
    pub(crate) qpn: Qpn,
    pub(crate) psn: Psn,
    pub(super) raw: Box<raw::QueuePair>,
    pub(super) sends: Queue,
    pub(super) recvs: Queue,
}

impl QueuePair {
    pub(crate) fn raw(&self) -> &raw::QueuePair {
        &self.raw
    }

    /// What the peer must be told.
    pub fn address(&self) -> Address {
        let state = self.device.shared.lock();
        Address {
            socket: state.device.local_addr(),
            qpn: self.qpn,
            psn: self.psn.value(),
            budget: state.device.receive_budget(),
        }
    }

    /// RESET to INIT: receives may be posted. `access` is what the peer may do at all.
    ///
    /// # Errors
    /// [`InvalidTransition`] from any state but Reset and Init.
    pub fn to_init(&self, access: Access) -> Result<(), InvalidTransition> {
        let access = qp::Access {
            remote_write: access.remote_write,
            remote_read: access.remote_read,
            remote_atomic: access.remote_atomic,
            ..qp::Access::NONE
        };
        self.with(|qp| {
            qp.to_init(InitAttr {
                access,
                pkey: PKEY_DEFAULT,
            })
        })
    }

    /// INIT to RTS: the peer is known and everything may be posted.
    ///
    /// # Errors
    /// [`InvalidTransition`] from any state but Init.
    pub fn connect(&self, peer: &Address) -> Result<(), InvalidTransition> {
        self.connect_as(peer, &Reliability::default())
    }

    /// The same, with a say in how.
    ///
    /// # Errors
    /// [`InvalidTransition`] from any state but Init.
    pub fn connect_as(&self, peer: &Address, how: &Reliability) -> Result<(), InvalidTransition> {
        let link = || {
            let link = path_mtu(self.device.local_addr(), peer.socket).unwrap_or(1500);
            Mtu::for_link(link).unwrap_or(Mtu::B256)
        };
        let rtr = RtrAttr {
            dest: peer.qpn,
            path_mtu: how.mtu.unwrap_or_else(link),
            rq_psn: Psn::new(peer.psn),
            max_dest_rd_atomic: RD_ATOMIC,
            min_rnr_timer: RnrTimer::new(12),
        };
        // Half of what our receive buffer holds, if that is less.
        let budget = self.device.shared.lock().device.receive_budget();
        let rts = RtsAttr {
            sq_psn: self.psn,
            timeout: how.ack_timeout.min(31),
            retry_cnt: how.retry_count.min(7),
            rnr_retry: how.rnr_retry.min(7),
            max_rd_atomic: RD_ATOMIC,
            read_chunk_packets: READ_CHUNK.min(budget / 2).max(1) as u16,
        };
        let mut state = self.device.shared.lock();
        let qp = state
            .device
            .qp(self.id)
            .expect("it lives as long as its handle");
        qp.to_rtr(rtr)?;
        qp.to_rts(rts)?;
        let budget = (peer.budget > 0).then_some(peer.budget);
        state.device.set_peer(self.id, peer.socket, budget);
        // Posting need not ask for the state any more.
        state.collect(self.id);
        Ok(())
    }

    /// To ERR: everything posted completes as flushed.
    pub fn to_error(&self) {
        self.with(|qp| qp.to_error());
        let shared = &self.device.shared;
        shared.drive(&mut shared.lock());
    }

    /// State.
    pub fn state(&self) -> QpState {
        self.with(|qp| qp.state())
    }

    fn with<R>(&self, act: impl FnOnce(&mut qp::QueuePair) -> R) -> R {
        let mut state = self.device.shared.lock();
        let qp = state.device.qp(self.id);
        let result = act(qp.expect("it lives as long as its handle"));
        state.collect(self.id);
        result
    }

    /// Takes memory now that the first post beside a thread that drives the device would take: some
    /// 200 bytes for each request that its queues hold.
    pub fn expect_contention(&self) {
        self.raw.expect_contention();
    }

    /// Posts to the send queue, and sends what the peer's budget allows. `id` comes back in the
    /// completion; for READ and atomics `buffer` is where the answer goes.
    ///
    /// # Errors
    /// [`PostRefused`] gives the memory back.
    pub fn post_send(&self, id: u64, op: SendOp, buffer: Buffer) -> Result<(), PostRefused> {
        self.raw
            .post_to_sends(|poster| self.post_one_send(poster, id, op, buffer))
    }

    /// Posts several, in order, and then sends: short messages leave together.
    ///
    /// # Errors
    /// [`PostRefused`] gives the memory of the first that was not taken back; those after it are still
    /// in `list`.
    pub fn post_sends(
        &self,
        list: &mut impl Iterator<Item = (u64, SendOp, Buffer)>,
    ) -> Result<(), PostRefused> {
        self.raw.post_to_sends(|poster| {
            list.try_for_each(|(id, op, buffer)| self.post_one_send(poster, id, op, buffer))
        })
    }

    #[inline]
    fn post_one_send(
        &self,
        poster: &mut Poster<'_>,
        id: u64,
        op: SendOp,
        buffer: Buffer,
    ) -> Result<(), PostRefused> {
        self.post(id, buffer, &self.sends, |wr_id, local, buffer| {
            let wr = SendWr::new(wr_id, op, local);
            let bring = || bring(buffer);
            self.raw.post_kept_send(poster, &wr, bring)
        })
    }

    /// Posts to the receive queue.
    ///
    /// # Errors
    /// [`PostRefused`] gives the memory back.
    pub fn post_recv(&self, id: u64, buffer: Buffer) -> Result<(), PostRefused> {
        self.raw
            .post_to_receives(|poster| self.post_one_receive(poster, id, buffer))
    }

    /// Posts several, in order.
    ///
    /// # Errors
    /// As of [`post_sends`](Self::post_sends).
    pub fn post_recvs(
        &self,
        list: &mut impl Iterator<Item = (u64, Buffer)>,
    ) -> Result<(), PostRefused> {
        self.raw.post_to_receives(|poster| {
            list.try_for_each(|(id, buffer)| self.post_one_receive(poster, id, buffer))
        })
    }

    #[inline]
    fn post_one_receive(
        &self,
        poster: &mut Poster<'_>,
        id: u64,
        buffer: Buffer,
    ) -> Result<(), PostRefused> {
        self.post(id, buffer, &self.recvs, |wr_id, local, buffer| {
            let wr = RecvWr { wr_id, local };
            let bring = || bring(buffer);
            self.raw.post_kept_receive(poster, &wr, bring)
        })
    }

    /// Posts one by `post`, which brings the slot when it has taken the rest.
    #[inline]
    fn post(
        &self,
        id: u64,
        mut buffer: Buffer,
        queue: &Queue,
        post: impl FnOnce(WrId, SgList, &mut Buffer) -> Result<(), PostError>,
    ) -> Result<(), PostRefused> {
        let (sge, slot) = match &buffer {
            Buffer::Empty => (None, None),
            Buffer::Slot(slot, len) => (
                Some(Sge {
                    lkey: Lkey(slot.key.0),
                    addr: 0,
                    len: *len,
                }),
                Some(slot.key),
            ),
            Buffer::Region(sge) => (Some(*sge), None),
        };
        // The key of another device's slot could be that of any slot here.
        let is_ours = match &buffer {
            Buffer::Slot(slot, _) => Arc::ptr_eq(&slot.shared, &self.device.shared),
            _ => true,
        };
        let is_too_long = sge.is_some_and(|sge| sge.len > MESSAGE_LEN_MAX);
        let refuse = |error, buffer| Err(PostRefused { error, buffer });
        if !is_ours || is_too_long {
            return refuse(PostError::Invalid, buffer);
        }
        let posts = &queue.cq.0.posts;
        let Some(name) = posts.add(queue.served, queue.depth, id, slot) else {
            return refuse(PostError::QueueFull, buffer);
        };
        let local = match sge {
            Some(Sge { lkey, addr, len }) => SgList::one(lkey, addr, len),
            None => SgList::EMPTY,
        };
        if let Err(error) = post(WrId(name), local, &mut buffer) {
            posts.take(name);
            return refuse(error, buffer);
        }
        Ok(())
    }
}

/// The bytes of a request's slot. From here on the key belongs to the request, and dropping the rest is
/// nothing.
fn bring(buffer: &mut Buffer) -> Brought {
    match buffer {
        Buffer::Slot(slot, _) => Some((slot.key, slot.bytes.take().unwrap_or_default())),
        _ => None,
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // What is posted comes back flushed; then the queues give up the rest of their promise.
        self.to_error();
    }
}
