//! Queue pairs: making them, posting to them.
//!
//! How attributes move the state machine is `modify`'s.

mod modify;

use lowtide_transport_proto::qp::{
    self, PostError, QpCaps, QpKind, SGE_MAX, SgList, UdSendWr, WrId,
};
use lowtide_transport_proto::wire::Psn;

use super::tables::{QpEntry, attr_of};
use super::types::{
    Error, Gid, Lkey, QpCap, QpInitAttr, QpType, Qpn, RecvWr, SendFlags, SendOp, SendWr, Sge,
};
use super::{CompletionQueue, Context, INLINE_MAX, ProtectionDomain, SharedReceiveQueue, State};
use crate::device::{Kind, QpId, WORK_REQUESTS_MAX};
use crate::memory::Key;

/// Where a queue pair's completions go, and where its receives come from.
#[derive(Debug, Clone, Copy)]
pub struct Queues<'a> {
    /// Completions of sends.
    pub send: &'a CompletionQueue,
    /// Completions of receives.
    pub recv: &'a CompletionQueue,
    /// Receives shared with other queue pairs.
    pub shared: Option<&'a SharedReceiveQueue>,
}

/// A work request of a list that was not taken; those before it were.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadWr {
    /// Which.
    pub index: usize,
    /// Why.
    pub error: Error,
}

/// A queue pair. Dropping it forgets what is posted; completions stay to be polled.
#[derive(Debug)]
pub struct QueuePair {
    pd: ProtectionDomain,
    id: QpId,
    qpn: Qpn,
    init: QpInitAttr,
    /// Keeps them alive.
    _queues: [CompletionQueue; 2],
    _shared: Option<SharedReceiveQueue>,
}

impl ProtectionDomain {
    /// A queue pair in RESET.
    ///
    /// # Errors
    /// [`Error::Limit`] for more than the device can do, [`Error::Argument`] for queues of another
    /// device or protection domain, [`Error::Exhausted`].
    pub fn queue_pair(&self, queues: Queues<'_>, init: &QpInitAttr) -> Result<QueuePair, Error> {
        let context = &self.context;
        let is_ours = |cq: &CompletionQueue| self.is_of(cq.context());
        if !is_ours(queues.send) || !is_ours(queues.recv) {
            return Err(Error::Argument("a completion queue of another device"));
        }
        if queues.shared.is_some_and(|shared| !shared.is_of(self)) {
            return Err(Error::Argument(
                "a shared queue of another protection domain",
            ));
        }
        let cap = checked_cap(init.cap, queues.shared.is_some())?;
        let kind = match init.kind {
            QpType::Rc => Kind::Connected(QpKind::Rc),
            QpType::Uc => Kind::Connected(QpKind::Uc),
            QpType::Ud => Kind::Datagram(context.port_mtu()),
        };
        let caps = QpCaps {
            send_wr_max: cap.max_send_wr,
            recv_wr_max: cap.max_recv_wr,
            shared_receives: queues.shared.is_some(),
        };
        let srq = queues.shared.map(SharedReceiveQueue::id);
        let mut state = context.shared.lock();
        let made = state
            .device
            .create(kind, self.domain, caps, srq.map(|srq| srq.0));
        let (id, qpn) = made.ok_or(Error::Exhausted("queue pair"))?;
        let inline = match cap.max_inline_data {
            0 => None,
            len => {
                let len = len as usize * cap.max_send_wr as usize;
                let key = state.device.memory.register_private(self.domain, len);
                if key.is_none() {
                    state.device.destroy_qp(id);
                    return Err(Error::Exhausted("region for inline data"));
                }
                key
            }
        };
        let init = QpInitAttr { cap, ..*init };
        let entry = QpEntry {
            qpn,
            init,
            send_cq: queues.send.id(),
            recv_cq: queues.recv.id(),
            srq,
            attr: attr_of(cap),
            inline,
            sends_posted: 0,
            tells_drained: false,
        };
        state.tables.add_qp(id, entry);
        drop(state);
        Ok(QueuePair {
            pd: self.clone(),
            id,
            qpn,
            init,
            _queues: [queues.send.clone(), queues.recv.clone()],
            _shared: queues.shared.cloned(),
        })
    }
}

/// The capacities that a queue pair gets.
fn checked_cap(cap: QpCap, is_shared: bool) -> Result<QpCap, Error> {
    if cap.max_send_wr.max(cap.max_recv_wr) > WORK_REQUESTS_MAX {
        return Err(Error::Limit("work requests of a queue pair"));
    }
    if cap.max_send_sge.max(cap.max_recv_sge) > SGE_MAX as u32 {
        return Err(Error::Limit("elements of a request's list"));
    }
    if cap.max_inline_data > INLINE_MAX {
        return Err(Error::Limit("inline data"));
    }
    Ok(match is_shared {
        true => QpCap {
            max_recv_wr: 0,
            max_recv_sge: 0,
            ..cap
        },
        false => cap,
    })
}

impl QueuePair {
    /// Its number.
    pub fn qpn(&self) -> Qpn {
        self.qpn
    }

    /// What it was made with; capacities as they are.
    pub fn init_attr(&self) -> &QpInitAttr {
        &self.init
    }

    pub(crate) fn id(&self) -> QpId {
        self.id
    }

    pub(crate) fn context(&self) -> &Context {
        &self.pd.context
    }

    /// A number for the first PSN that nobody can guess.
    pub fn random_psn(&self) -> Psn {
        Psn::new(self.context().shared.lock().draw() as u32)
    }

    /// Posts sends, in order, and sends what may be sent.
    ///
    /// # Errors
    /// The first that was not taken, and why; those before it were.
    ///
    /// # Safety
    /// Until a request has completed (or one after it), the memory that it names is the device's:
    /// it reads it, and for READ and atomics changes it, so no reference of Rust's may stand in the
    /// way of that. Memory of an `INLINE` request is read here, as `sg_list` says, and must be
    /// readable now. Address handles must be of this device.
    pub unsafe fn post_send(&self, list: &[SendWr<'_>]) -> Result<(), BadWr> {
        let mut result = Ok(());
        // SAFETY: the caller's promise.
        unsafe {
            self.post_sends(|post| {
                for (index, wr) in list.iter().enumerate() {
                    if let Err(error) = post(wr) {
                        result = Err(BadWr { index, error });
                        break;
                    }
                }
            });
        }
        result
    }

    /// The same for requests that lie in no slice: `feed` posts one after the other, under the
    /// device's lock, so it must not call into the device by another way.
    ///
    /// # Safety
    /// As of [`QueuePair::post_send`].
    pub unsafe fn post_sends(
        &self,
        feed: impl FnOnce(&mut dyn FnMut(&SendWr<'_>) -> Result<(), Error>),
    ) {
        let shared = &self.context().shared;
        let mut state = shared.lock();
        // SAFETY: the caller's promise.
        feed(&mut |wr| unsafe { self.post_one(&mut state, wr) });
        state.collect(self.id);
        shared.send_posted(&mut state);
    }

    /// # Safety
    /// As of `post_send`.
    unsafe fn post_one(&self, state: &mut State, wr: &SendWr<'_>) -> Result<(), Error> {
        let is_inline = wr.flags.contains(SendFlags::INLINE);
        let local = match is_inline {
            // SAFETY: the caller's promise.
            true => unsafe { self.take_inline(state, wr) }?,
            false => list(wr.sg_list, self.init.cap.max_send_sge)?,
        };
        self.post_list(state, wr, local)
    }

    /// Posts a request whose memory is `local`, whatever its list says.
    pub(crate) fn post_list(
        &self,
        state: &mut State,
        wr: &SendWr<'_>,
        local: SgList,
    ) -> Result<(), Error> {
        let signalled = self.init.sq_sig_all || wr.flags.contains(SendFlags::SIGNALED);
        let solicited = wr.flags.contains(SendFlags::SOLICITED);
        let wr_id = WrId(wr.wr_id);
        let posted = if self.init.kind == QpType::Ud {
            let imm = match wr.op {
                SendOp::Send => None,
                SendOp::SendImm(imm) => Some(imm),
                _ => return Err(Error::Argument("datagrams can only be sent")),
            };
            let to = wr
                .to
                .ok_or(Error::Argument("a datagram needs a destination"))?;
            let address = qp::AddressHandle(to.ah.0);
            if !state.device.has_address(address) {
                return Err(Error::Argument("no such address handle"));
            }
            let wr = UdSendWr {
                wr_id,
                local,
                address,
                dest: to.qpn,
                qkey: to.qkey,
                imm,
                signalled,
                solicited,
            };
            state.device.datagram(self.id).map(|qp| qp.post_send(wr))
        } else {
            let wr = qp::SendWr {
                wr_id,
                op: wr.op,
                local,
                signalled,
                solicited,
                fence: wr.flags.contains(SendFlags::FENCE),
            };
            state.device.qp(self.id).map(|qp| qp.post_send(wr))
        };
        let posted = posted.expect("it lives as long as its handle");
        posted.map_err(posting_error)?;
        state.tables.qp(self.id).sends_posted += 1;
        Ok(())
    }

    /// Copies inline data to the place of the next request.
    ///
    /// # Safety
    /// What `sg_list` names is readable.
    unsafe fn take_inline(&self, state: &mut State, wr: &SendWr<'_>) -> Result<SgList, Error> {
        let is_sent = matches!(
            wr.op,
            SendOp::Send
                | SendOp::SendImm(_)
                | SendOp::SendInvalidate(_)
                | SendOp::Write(_)
                | SendOp::WriteImm(..)
                | SendOp::AtomicWrite(_)
        );
        if !is_sent {
            return Err(Error::Argument("only what is sent can be inline"));
        }
        let max = u64::from(self.init.cap.max_inline_data);
        let total: u64 = wr.sg_list.iter().map(|sge| u64::from(sge.len)).sum();
        if total > max || wr.sg_list.len() > self.init.cap.max_send_sge as usize {
            return Err(Error::Limit("inline data"));
        }
        let entry = state.tables.qp(self.id);
        let place = entry.sends_posted % u64::from(self.init.cap.max_send_wr.max(1)) * max;
        let Some(key) = entry.inline.filter(|_| total > 0) else {
            return Ok(SgList::EMPTY);
        };
        if self.is_full(state) {
            // Its place is still that of an older request.
            return Err(Error::QueueFull);
        }
        let region = state.device.memory.private_mut(key);
        let mut room = region.map_or(&mut [][..], |bytes| &mut bytes[place as usize..]);
        for sge in wr.sg_list {
            let (now, later) = room.split_at_mut(sge.len as usize);
            // SAFETY: the caller says that these bytes are readable; `now` is a place of ours, and
            // so not one of them.
            unsafe {
                std::ptr::copy_nonoverlapping(sge.addr as *const u8, now.as_mut_ptr(), now.len());
            }
            room = later;
        }
        Ok(SgList::one(Lkey(key.0), place, total as u32))
    }

    /// Whether the send queue has no room.
    fn is_full(&self, state: &mut State) -> bool {
        let depth = self.init.cap.max_send_wr;
        let posted = match self.init.kind {
            QpType::Ud => state.device.datagram(self.id).map(|qp| qp.sends_posted()),
            _ => state.device.qp(self.id).map(|qp| qp.sends_posted()),
        };
        posted.is_none_or(|posted| posted >= depth)
    }

    /// Posts receives, in order.
    ///
    /// # Errors
    /// The first that was not taken, and why; those before it were.
    ///
    /// # Safety
    /// Until a receive has completed the memory that it names is the device's: it changes it, so no
    /// reference of Rust's may stand in the way of that.
    pub unsafe fn post_recv(&self, list: &[RecvWr<'_>]) -> Result<(), BadWr> {
        let mut state = self.context().shared.lock();
        let mut result = Ok(());
        for (index, wr) in list.iter().enumerate() {
            let posted = recv_wr(wr, self.init.cap.max_recv_sge)
                .and_then(|wr| self.post_receive(&mut state, wr));
            if let Err(error) = posted {
                result = Err(BadWr { index, error });
                break;
            }
        }
        state.collect(self.id);
        result
    }

    pub(crate) fn post_receive(&self, state: &mut State, wr: qp::RecvWr) -> Result<(), Error> {
        let posted = match self.init.kind {
            QpType::Ud => state.device.datagram(self.id).map(|qp| qp.post_recv(wr)),
            // Nothing to be sent comes of a receive.
            _ => state.device.connected(self.id).map(|qp| qp.post_recv(wr)),
        };
        let posted = posted.expect("it lives as long as its handle");
        posted.map_err(posting_error)
    }

    /// Attaches a datagram queue pair to a multicast group (IGMP or MLD joins it on the device's
    /// interface).
    ///
    /// # Errors
    /// [`Error::Argument`] for another type or a GID that is no group of the device's family,
    /// [`Error::Os`].
    pub fn attach_multicast(&self, group: Gid) -> Result<(), Error> {
        if self.init.kind != QpType::Ud || !group.is_multicast() {
            return Err(Error::Argument("only datagrams, and only multicast GIDs"));
        }
        let shared = &self.context().shared;
        let mut state = shared.lock();
        let os = |error: std::io::Error| match error.raw_os_error() {
            Some(errno) => Error::Os(errno),
            None => Error::Argument("not a group of the device's address family"),
        };
        if let Some(fd) = state.device.attach(self.id, group.ip()).map_err(os)? {
            shared.watch(fd).map_err(os)?;
        }
        Ok(())
    }

    /// Detaches it again.
    ///
    /// # Errors
    /// [`Error::Argument`] if it was not attached.
    pub fn detach_multicast(&self, group: Gid) -> Result<(), Error> {
        let mut state = self.context().shared.lock();
        match state.device.detach(self.id, group.ip()) {
            true => Ok(()),
            false => Err(Error::Argument("not attached to that group")),
        }
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        let mut state = self.context().shared.lock();
        state.collect(self.id);
        // An acknowledgement that is owed leaves first.
        state.transmit();
        state.device.destroy_qp(self.id);
        state.tables.forget_events(self.qpn);
        if let Some(QpEntry {
            inline: Some(Key(key)),
            ..
        }) = state.tables.remove_qp(self.id)
        {
            state.device.memory.deregister(Key(key));
        }
    }
}

/// The elements of a request.
fn list(elements: &[Sge], max: u32) -> Result<SgList, Error> {
    if elements.len() > max as usize {
        return Err(Error::Limit("elements of a request's list"));
    }
    SgList::new(elements).map_err(|_| Error::Limit("bytes of one message: 2^31"))
}

pub(super) fn recv_wr(wr: &RecvWr<'_>, max_sge: u32) -> Result<qp::RecvWr, Error> {
    Ok(qp::RecvWr {
        wr_id: WrId(wr.wr_id),
        local: list(wr.sg_list, max_sge)?,
    })
}

fn posting_error(error: PostError) -> Error {
    match error {
        PostError::QueueFull => Error::QueueFull,
        PostError::State(state) => Error::State(state),
        _ => Error::Argument(
            "the queue pair does not do that, its lengths are wrong, or its receives are shared",
        ),
    }
}
