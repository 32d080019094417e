//! Queue pairs: making them, posting to them.
//!
//! How attributes move the state machine is `modify`'s.

mod modify;

use std::sync::Arc;

use lowtide_transport_proto::qp::{
    self, PostError, QpCaps, QpKind, SGE_MAX, SgList, UdSendWr, WrId,
};
use lowtide_transport_proto::wire::{Mtu, Psn};

use super::posting::{Brought, Posting, Request, queue_of};
use super::tables::{Keepers, QpEntry, attr_of};
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

/// Who posts: with the device's token, or into lines.
pub(crate) struct Poster<'a>(Option<&'a mut State>);

impl Poster<'_> {
    fn state(&mut self) -> Option<&mut State> {
        self.0.as_deref_mut()
    }
}

/// A queue pair. Dropping it forgets what is posted; completions stay to be polled.
#[derive(Debug)]
pub struct QueuePair {
    pd: ProtectionDomain,
    id: QpId,
    qpn: Qpn,
    init: QpInitAttr,
    /// The port's MTU: what a datagram holds.
    mtu: Mtu,
    posting: Arc<Posting>,
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
        self.queue_pair_kept(queues, init, None)
    }

    /// The same, whose completions are told to `keepers` first.
    pub(crate) fn queue_pair_kept(
        &self,
        queues: Queues<'_>,
        init: &QpInitAttr,
        keepers: Option<Keepers>,
    ) -> Result<QueuePair, Error> {
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
        let mtu = context.port_mtu();
        let kind = match init.kind {
            QpType::Rc => Kind::Connected(QpKind::Rc),
            QpType::Uc => Kind::Connected(QpKind::Uc),
            QpType::Ud => Kind::Datagram(mtu),
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
        let depths = [cap.max_send_wr, cap.max_recv_wr];
        let posting = Arc::new(Posting::new(depths, cap.max_inline_data));
        let entry = QpEntry {
            qpn,
            init,
            send_cq: queues.send.id(),
            recv_cq: queues.recv.id(),
            srq,
            attr: attr_of(cap),
            inline,
            sends_posted: 0,
            posting: posting.clone(),
            held: [0; 2],
            tells_drained: false,
            keepers,
        };
        state.tables.add_qp(id, entry);
        drop(state);
        Ok(QueuePair {
            pd: self.clone(),
            id,
            qpn,
            init,
            mtu,
            posting,
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

    /// Takes memory now that the first post beside a thread that drives the device would take: some
    /// 200 bytes for each request that its queues hold.
    pub fn expect_contention(&self) {
        self.posting.prepare();
    }

    /// Posts sends, in order, and sends what may be sent. If another thread drives the device, that
    /// one sends; this never waits for it, but in a state that does not admit posting.
    ///
    /// # Errors
    /// The first that was not taken, and why; those before it were.
    ///
    /// # Safety
    /// Until a request has completed (or one after it), the memory that it names is the device's:
    /// it reads it, and for READ and atomics changes it, so no reference of Rust's may stand in the
    /// way of that. Memory of an `INLINE` request is read here, as `sg_list` says, and must be
    /// readable now. Address handles must be of this device, and exist until then: the request fails
    /// otherwise.
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

    /// The same for requests that lie in no slice: `feed` posts one after the other. It must not call
    /// into the device by another way.
    ///
    /// # Safety
    /// As of [`QueuePair::post_send`].
    pub unsafe fn post_sends(
        &self,
        feed: impl FnOnce(&mut dyn FnMut(&SendWr<'_>) -> Result<(), Error>),
    ) {
        self.post_to_sends(|poster| {
            // SAFETY: the caller's promise.
            feed(&mut |wr| unsafe { self.post_one(poster, wr) });
        });
    }

    /// Lets `feed` post to the send queue, and sends what may be sent.
    #[inline]
    pub(crate) fn post_to_sends<R>(&self, feed: impl FnOnce(&mut Poster<'_>) -> R) -> R {
        let shared = &self.context().shared;
        // In another state it may have been moved by the connection manager.
        let waits = !self.posting.admits_sends();
        let mut token = shared.lock_to_post(waits, |state| self.clear(state));
        let result = feed(&mut Poster(token.as_deref_mut()));
        match token.as_deref_mut() {
            Some(state) => {
                self.collect(state, waits);
                shared.send_posted(state);
            }
            None => shared.leave(queue_of(self.id)),
        }
        result
    }

    /// The same for the receive queue.
    #[inline]
    pub(crate) fn post_to_receives<R>(&self, feed: impl FnOnce(&mut Poster<'_>) -> R) -> R {
        let shared = &self.context().shared;
        let waits = !self.posting.admits_receives();
        let mut token = shared.lock_to_post(waits, |state| self.clear(state));
        let result = feed(&mut Poster(token.as_deref_mut()));
        match token.as_deref_mut() {
            Some(state) => {
                self.collect(state, waits);
                shared.sleepers.notify();
            }
            None => shared.leave(queue_of(self.id)),
        }
        result
    }

    /// What is posted in ERR has ended already. Who `waits` has seen another state than the one it knew.
    #[inline]
    fn collect(&self, state: &mut State, waits: bool) {
        if waits || state.device.has_reports(self.id) {
            state.collect(self.id);
        }
    }

    /// Posts what waits in the lines; false if somebody is still writing there.
    fn clear(&self, state: &mut State) -> bool {
        self.posting.is_empty() || state.take_posts_of(self.id)
    }

    /// # Safety
    /// As of `post_send`.
    unsafe fn post_one(&self, poster: &mut Poster<'_>, wr: &SendWr<'_>) -> Result<(), Error> {
        if !wr.flags.contains(SendFlags::INLINE) {
            let local = list(wr.sg_list, self.init.cap.max_send_sge)?;
            let request = self.request(wr, local)?;
            self.take_room(poster, 0)?;
            match poster.state() {
                Some(state) => return self.post_with_room(state, request),
                None => self.posting.sends().push(|waiting| {
                    waiting.request = Some(request);
                    waiting.inline.clear();
                }),
            }
            return Ok(());
        }
        let local = self.inline_list(wr)?;
        let request = self.request(wr, local)?;
        self.take_room(poster, 0)?;
        let Some(state) = poster.state() else {
            self.posting.sends().push(|waiting| {
                waiting.request = Some(request);
                waiting.inline.clear();
                waiting.inline.resize(local.total() as usize, 0);
                // SAFETY: the caller's promise; the vector is ours.
                unsafe { gather(wr.sg_list, &mut waiting.inline) };
            });
            return Ok(());
        };
        // SAFETY: the caller's promise; the place is the device's own.
        let fill = |place: &mut [u8]| unsafe { gather(wr.sg_list, place) };
        let request = state.with_inline(self.id, request, fill);
        self.post_with_room(state, request)
    }

    /// Posts a send of a connection's keeper, which has counted it; of one that is taken `bring` is asked
    /// for the bytes of its slot.
    #[inline]
    pub(crate) fn post_kept_send(
        &self,
        poster: &mut Poster<'_>,
        wr: &qp::SendWr,
        bring: impl FnOnce() -> Brought,
    ) -> Result<(), PostError> {
        if !wr.suits(QpKind::Rc) {
            return Err(PostError::Invalid);
        }
        match poster.state() {
            Some(state) => {
                state.connection(self.id).post_send(*wr)?;
                state.attach(bring());
            }
            None => self.posting.sends().push(|waiting| {
                waiting.request = Some(Request::Connected(*wr));
                waiting.brought = bring();
            }),
        }
        Ok(())
    }

    /// The same for a receive.
    #[inline]
    pub(crate) fn post_kept_receive(
        &self,
        poster: &mut Poster<'_>,
        wr: &qp::RecvWr,
        bring: impl FnOnce() -> Brought,
    ) -> Result<(), PostError> {
        match poster.state() {
            Some(state) => {
                state.receive_into(self.id, wr)?;
                state.attach(bring());
            }
            None => self.posting.receives().push(|waiting| {
                waiting.wr = Some(*wr);
                waiting.brought = bring();
            }),
        }
        Ok(())
    }

    fn post_with_room(&self, state: &mut State, request: Request) -> Result<(), Error> {
        let posted = match request {
            Request::Datagram(wr) if !state.device.has_address(wr.address) => {
                Err(Error::Argument("no such address handle"))
            }
            request => state.post_request(self.id, request),
        };
        posted.inspect_err(|_| self.posting.room[0].give(1))
    }

    /// What a request asks of the state machine, if it may be asked.
    fn request(&self, wr: &SendWr<'_>, local: SgList) -> Result<Request, Error> {
        let signalled = self.init.sq_sig_all || wr.flags.contains(SendFlags::SIGNALED);
        let solicited = wr.flags.contains(SendFlags::SOLICITED);
        let wr_id = WrId(wr.wr_id);
        let kind = match self.init.kind {
            QpType::Rc => QpKind::Rc,
            QpType::Uc => QpKind::Uc,
            QpType::Ud => {
                let imm = match wr.op {
                    SendOp::Send => None,
                    SendOp::SendImm(imm) => Some(imm),
                    _ => return Err(Error::Argument("datagrams can only be sent")),
                };
                let to = wr
                    .to
                    .ok_or(Error::Argument("a datagram needs a destination"))?;
                if local.total() > self.mtu.bytes() {
                    return Err(posting_error(PostError::Invalid));
                }
                return Ok(Request::Datagram(UdSendWr {
                    wr_id,
                    local,
                    address: qp::AddressHandle(to.ah.0),
                    dest: to.qpn,
                    qkey: to.qkey,
                    imm,
                    signalled,
                    solicited,
                }));
            }
        };
        let wr = qp::SendWr {
            wr_id,
            op: wr.op,
            local,
            signalled,
            solicited,
            fence: wr.flags.contains(SendFlags::FENCE),
        };
        match wr.suits(kind) {
            true => Ok(Request::Connected(wr)),
            false => Err(posting_error(PostError::Invalid)),
        }
    }

    /// Room in the send queue (0) or the receive queue (1).
    fn take_room(&self, poster: &mut Poster<'_>, side: usize) -> Result<(), Error> {
        let room = &self.posting.room[side];
        if room.take() {
            return Ok(());
        }
        // What has finished and reports nothing may not have been noticed.
        if let Some(state) = poster.state() {
            state.collect(self.id);
            if room.take() {
                return Ok(());
            }
        }
        Err(Error::QueueFull)
    }

    /// A list as long as the inline data of a request, if it may have any.
    fn inline_list(&self, wr: &SendWr<'_>) -> Result<SgList, Error> {
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
        Ok(match total {
            0 => SgList::EMPTY,
            _ => SgList::one(Lkey(0), 0, total as u32),
        })
    }

    /// Posts receives, in order. If another thread drives the device, they are there before it
    /// handles what comes next; this never waits for it, but in RESET.
    ///
    /// # Errors
    /// The first that was not taken, and why; those before it were.
    ///
    /// # Safety
    /// Until a receive has completed the memory that it names is the device's: it changes it, so no
    /// reference of Rust's may stand in the way of that.
    pub unsafe fn post_recv(&self, list: &[RecvWr<'_>]) -> Result<(), BadWr> {
        self.post_to_receives(|poster| {
            each(list, |wr| {
                let wr = recv_wr(wr, self.init.cap.max_recv_sge)?;
                self.post_receive(poster, wr)
            })
        })
    }

    fn post_receive(&self, poster: &mut Poster<'_>, wr: qp::RecvWr) -> Result<(), Error> {
        if self._shared.is_some() {
            return Err(posting_error(PostError::Invalid));
        }
        self.take_room(poster, 1)?;
        match poster.state() {
            Some(state) => {
                let posted = state.post_receive(self.id, &wr);
                posted.inspect_err(|_| self.posting.room[1].give(1))
            }
            None => {
                self.posting
                    .receives()
                    .push(|waiting| waiting.wr = Some(wr));
                Ok(())
            }
        }
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
        // Who had the token when something was posted may not have seen it yet.
        state.take_posts_of(self.id);
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

impl State {
    /// A connection's state machine, to post to.
    #[inline]
    fn connection(&mut self, id: QpId) -> &mut qp::QueuePair {
        self.device.qp(id).expect("it lives as long as its handle")
    }

    /// Hands a request for which room is taken to its state machine.
    pub(super) fn post_request(&mut self, id: QpId, request: Request) -> Result<(), Error> {
        let posted = match request {
            Request::Connected(wr) => self.connection(id).post_send(wr),
            Request::Datagram(wr) => self
                .device
                .datagram(id)
                .expect("it lives as long as its handle")
                .post_send(wr),
        };
        posted.map_err(posting_error)?;
        let entry = self.tables.qp(id);
        entry.sends_posted += 1;
        entry.hold(0);
        Ok(())
    }

    /// The same for a receive.
    pub(super) fn post_receive(&mut self, id: QpId, wr: &qp::RecvWr) -> Result<(), Error> {
        self.receive_into(id, wr).map_err(posting_error)?;
        self.tables.qp(id).hold(1);
        Ok(())
    }

    #[inline]
    fn receive_into(&mut self, id: QpId, wr: &qp::RecvWr) -> Result<(), PostError> {
        // Nothing to be sent comes of a receive, but its end may.
        let posted = match self.device.connected(id) {
            Some(qp) => Some(qp.post_recv(*wr)),
            None => self.device.datagram(id).map(|qp| qp.post_recv(*wr)),
        };
        posted.expect("it lives as long as its handle")?;
        self.device.note_receive(id);
        Ok(())
    }

    /// The request with its inline data where the device finds it; `fill` puts it there. Room is
    /// taken for it.
    pub(super) fn with_inline(
        &mut self,
        id: QpId,
        mut request: Request,
        fill: impl FnOnce(&mut [u8]),
    ) -> Request {
        let local = match &mut request {
            Request::Connected(wr) => &mut wr.local,
            Request::Datagram(wr) => &mut wr.local,
        };
        let entry = self.tables.qp(id);
        let (cap, turn) = (entry.init.cap, entry.sends_posted);
        let Some(key) = entry.inline.filter(|_| local.total() > 0) else {
            return request;
        };
        // Requests finish in order, so that this one's place is free.
        let place = turn % u64::from(cap.max_send_wr.max(1)) * u64::from(cap.max_inline_data);
        if let Some(region) = self.device.memory.private_mut(key) {
            fill(&mut region[place as usize..][..local.total() as usize]);
            *local = SgList::one(Lkey(key.0), place, local.total());
        }
        request
    }
}

/// Copies the bytes that a list names.
///
/// # Safety
/// They are readable, as many as `into` is long, and not part of it.
unsafe fn gather(list: &[Sge], into: &mut [u8]) {
    let mut room = into;
    for sge in list {
        let (now, later) = room.split_at_mut(sge.len as usize);
        // SAFETY: the caller's promise.
        unsafe {
            std::ptr::copy_nonoverlapping(sge.addr as *const u8, now.as_mut_ptr(), now.len());
        }
        room = later;
    }
}

/// Posts each, up to the first that is not taken.
pub(super) fn each<W>(
    list: &[W],
    mut post: impl FnMut(&W) -> Result<(), Error>,
) -> Result<(), BadWr> {
    for (index, wr) in list.iter().enumerate() {
        post(wr).map_err(|error| BadWr { index, error })?;
    }
    Ok(())
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
