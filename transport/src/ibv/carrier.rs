//! A device of libibverbs as the message layer uses it: reliable connections, and memory that is
//! owned here for as long as the device may touch it. Everything outside is safe code.
//!
//! What keeps it sound:
//! * memory that is posted lies in a chunk or a slab of `memory`, and goes only after every
//!   queue pair that could name it has been destroyed, or after its completion;
//! * a receive's bytes are seen through [`Received`] alone, between its completion and the next time
//!   it is posted; the handle keeps its chunk alive;
//! * of private memory a caller gets what it asks for by `&mut`, one stretch at a time, and changes
//!   no byte that is posted (the message layer's `outbox`); the device only reads there.
//!
//! A peer may READ what is lent to it, and whatever else lies in the same chunk then or later, if it
//! keeps the key: messages to others. Keys last as long as the registration, which is too dear to be
//! made for each message. Who shares an RDMA network trusts it.
//!
//! Deliberately absent: shared receive queues. A queue pair that is destroyed gives its receives
//! back at once, whatever a driver does with what had completed and was not polled.

mod memory;

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd};

use lowtide_transport_proto::qp::{CompletionKind, QpState, Remote, SendOp, Status};
use lowtide_transport_proto::wire::{Mtu, Psn, Qpn, RnrTimer};

pub(crate) use self::memory::Received;
use self::memory::{Receives, Slabs, may_lock};
use super::{
    CompletionChannel, CompletionQueue, Context, ProtectionDomain, QueuePair, Queues, choose_gid,
};
use crate::device::QpId;
use crate::memory::Key;
use crate::message::Registrar;
use crate::raw::types::{
    AccessFlags, AhAttr, AsyncEvent, Error, Gid, PortState, QpAttr, QpAttrMask, QpCap, QpInitAttr,
    QpType, RecvWr, SendFlags, SendWr, Sge, WorkCompletion,
};

/// Completions taken from the device at once.
const BATCH: usize = 64;
/// Entries of the completion queue at first, if the device can: not every one can make it longer.
const CQ_DEPTH: u32 = 32_768;
/// Local ACK timeout: 67 ms, after seven of which a dead peer is reported.
const TIMEOUT: u8 = 14;
const RETRIES: u8 = 6;
/// A peer that found no receive asks again without end; credits see to it that this is rare.
const RNR_FOREVER: u8 = 7;
/// READs of the peer at once, and of ours, if the device can do so many.
const READS: u8 = 8;
/// What an endpoint may register by its default limits: 64 MiB each lent and fetched, what is kept of
/// both, and the parcels of some twenty connections.
const LOCKED_BYTES_MIN: usize = 256 << 20;

/// What a device has done.
pub(crate) enum Done {
    /// A request of ours ended, or a queue pair failed.
    Completed(QpId),
    /// A message came.
    Received(QpId, Received),
}

/// See the [module](self). Fields are dropped in this order: queue pairs before memory.
pub(crate) struct Carrier {
    pairs: Vec<Option<Pair>>,
    free: Vec<u32>,
    generations: u32,
    len: usize,
    batch: VecDeque<WorkCompletion>,
    polled: Vec<WorkCompletion>,
    receives: Receives,
    slabs: Slabs,
    cq: CompletionQueue,
    cq_depth: u32,
    /// Entries that queue pairs may need, those of destroyed ones included until the queue has been
    /// emptied.
    cq_needed: u32,
    cq_stale: u32,
    /// Queue pairs that were refused a post: what would have completed has failed.
    failed: VecDeque<QpId>,
    /// Why nothing more will come.
    broken: Option<Error>,
    channel: CompletionChannel,
    domain: ProtectionDomain,
    path: Path,
}

/// How peers are reached.
struct Path {
    address: Option<IpAddr>,
    port: u8,
    gid_index: u8,
    lid: u16,
    is_ethernet: bool,
    mtu: Mtu,
    reads_served: u8,
    reads: u8,
}

struct Pair {
    qp: QueuePair,
    path_mtu: Mtu,
    generation: u32,
    /// Buffers of posted receives, oldest first.
    posted: VecDeque<u32>,
    done: VecDeque<(Status, CompletionKind)>,
    /// Entries of the completion queue that it may need.
    entries: u32,
}

/// What a work request is called: which queue pair of that place, and what it was.
#[derive(Clone, Copy)]
struct Name {
    pair: u32,
    generation: u32,
    kind: CompletionKind,
}

impl Name {
    fn pack(self) -> u64 {
        let kind = match self.kind {
            CompletionKind::Recv => 0,
            CompletionKind::Read => 1,
            _ => 2,
        };
        u64::from(self.generation) << 32 | u64::from(self.pair) << 2 | kind
    }

    fn unpack(word: u64) -> Name {
        Name {
            pair: (word as u32) >> 2,
            generation: (word >> 32) as u32,
            kind: match word & 3 {
                0 => CompletionKind::Recv,
                1 => CompletionKind::Read,
                _ => CompletionKind::Send,
            },
        }
    }
}

impl Carrier {
    /// Opens device `name`, to be reached at the address `local`, or at the first that it has.
    ///
    /// # Errors
    /// No working port has the address, or memory cannot be registered, or the library's.
    pub(crate) fn open(name: &str, local: Option<IpAddr>) -> Result<Carrier, Error> {
        let context = Context::open(name)?;
        let path = Path::of(&context, local)?;
        let channel = context.completion_channel()?;
        let cq_depth = CQ_DEPTH.min(context.query_device()?.cqe);
        let cq = context.completion_queue(cq_depth, Some(&channel))?;
        let domain = context.protection_domain()?;
        let mut receives = Receives::default();
        if !may_lock(LOCKED_BYTES_MIN) || !receives.grow(&domain) {
            return Err(Error::Limit(
                "locked memory: `ulimit -l` must be 262144 (KiB) or more",
            ));
        }
        let mut carrier = Carrier {
            pairs: Vec::new(),
            free: Vec::new(),
            generations: 0,
            len: 0,
            batch: VecDeque::new(),
            polled: Vec::new(),
            receives,
            slabs: Slabs::new(domain.clone()),
            cq,
            cq_depth,
            cq_needed: 0,
            cq_stale: 0,
            failed: VecDeque::new(),
            broken: None,
            channel,
            domain,
            path,
        };
        // Not every device has reliable connections.
        let trial = carrier.create_qp(1, 1);
        let (id, _) = trial.ok_or(Error::Unsupported("reliable connections"))?;
        carrier.destroy_qp(id);
        Ok(carrier)
    }

    /// # Errors
    /// Nothing more will come from the device.
    pub(crate) fn check(&self) -> io::Result<()> {
        match &self.broken {
            None => Ok(()),
            Some(error) => Err(io::Error::other(format!("the RDMA device failed: {error}"))),
        }
    }

    /// Readable when there are completions, and when something happens to the device.
    pub(crate) fn fds(&self) -> [BorrowedFd<'_>; 2] {
        [self.channel.as_fd(), self.domain.context().as_fd()]
    }

    /// Queue pairs that there are.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The address that peers reach it at; none of an InfiniBand port.
    pub(crate) fn address(&self) -> Option<IpAddr> {
        self.path.address
    }

    /// The port's MTU.
    pub(crate) fn mtu(&self) -> Mtu {
        self.path.mtu
    }

    /// Payload of a queue pair's full packets.
    pub(crate) fn packet_len(&self, id: QpId) -> Option<u32> {
        let pair = self.pairs.get(id.0 as usize)?.as_ref()?;
        Some(pair.path_mtu.bytes())
    }

    /// The port's local identifier; 0 on Ethernet.
    pub(crate) fn lid(&self) -> u16 {
        self.path.lid
    }

    pub(crate) fn memory(&mut self) -> &mut dyn Registrar {
        &mut self.slabs
    }

    /// A reliable connection's queue pair in INIT; none where the device has no more.
    pub(crate) fn create_qp(&mut self, sends: u32, receives: u32) -> Option<(QpId, Qpn)> {
        let entries = sends + receives;
        if self.cq_needed + entries > self.cq_depth {
            let depth = (self.cq_needed + entries).next_power_of_two();
            self.cq.resize(depth).ok()?;
            self.cq_depth = depth;
        }
        let init = QpInitAttr {
            kind: QpType::Rc,
            cap: QpCap {
                max_send_wr: sends,
                max_recv_wr: receives,
                max_send_sge: 1,
                max_recv_sge: 1,
                max_inline_data: 0,
            },
            sq_sig_all: true,
        };
        let queues = Queues {
            send: &self.cq,
            recv: &self.cq,
            shared: None,
        };
        let qp = self.domain.plain_queue_pair(queues, &init).ok()?;
        let attr = QpAttr {
            state: QpState::Init,
            port: self.path.port,
            access: AccessFlags::REMOTE_READ,
            ..QpAttr::default()
        };
        let mask = QpAttrMask::STATE
            .with(QpAttrMask::PKEY_INDEX)
            .with(QpAttrMask::PORT)
            .with(QpAttrMask::ACCESS);
        qp.modify(&attr, mask).ok()?;
        let qpn = qp.qpn();
        let index = self.free.pop().unwrap_or_else(|| {
            self.pairs.push(None);
            self.pairs.len() as u32 - 1
        });
        self.generations = self.generations.wrapping_add(1);
        self.pairs[index as usize] = Some(Pair {
            qp,
            path_mtu: self.path.mtu,
            generation: self.generations,
            posted: VecDeque::new(),
            done: VecDeque::new(),
            entries,
        });
        self.cq_needed += entries;
        self.len += 1;
        Some((QpId(index), qpn))
    }

    /// Destroys a queue pair; what was posted is ours again.
    pub(crate) fn destroy_qp(&mut self, id: QpId) {
        let Some(pair) = self.pairs.get_mut(id.0 as usize).and_then(Option::take) else {
            return;
        };
        drop(pair.qp);
        self.receives.give_back(pair.posted);
        // Completions of it may lie in the queue until it has been emptied.
        self.cq_stale += pair.entries;
        self.len -= 1;
        self.free.push(id.0);
    }

    /// Moves a queue pair to RTS: to the queue pair `qpn` at `peer`, whose first PSN is `rq_psn`.
    pub(crate) fn bring_up(
        &mut self,
        id: QpId,
        (peer, lid): (IpAddr, u16),
        (dest, rq_psn, path_mtu): (Qpn, Psn, Mtu),
        sq_psn: Psn,
    ) -> bool {
        let Some(pair) = self.pairs.get_mut(id.0 as usize).and_then(Option::as_mut) else {
            return false;
        };
        pair.path_mtu = path_mtu;
        let path = &self.path;
        let dgid = if path.is_ethernet {
            Gid::from_ip(peer)
        } else {
            Gid::default()
        };
        let attr = QpAttr {
            state: QpState::Rtr,
            path_mtu,
            dest,
            rq_psn,
            sq_psn,
            address: AhAttr {
                dgid,
                sgid_index: path.gid_index,
                hop_limit: 64,
                dlid: lid,
                port: path.port,
                ..AhAttr::default()
            },
            max_dest_rd_atomic: path.reads_served,
            max_rd_atomic: path.reads,
            min_rnr_timer: RnrTimer::new(1),
            timeout: TIMEOUT,
            retry_cnt: RETRIES,
            rnr_retry: RNR_FOREVER,
            ..QpAttr::default()
        };
        let to_rtr = QpAttrMask::STATE
            .with(QpAttrMask::ADDRESS)
            .with(QpAttrMask::PATH_MTU)
            .with(QpAttrMask::DEST_QPN)
            .with(QpAttrMask::RQ_PSN)
            .with(QpAttrMask::MAX_DEST_RD_ATOMIC)
            .with(QpAttrMask::MIN_RNR_TIMER);
        let to_rts = QpAttrMask::STATE
            .with(QpAttrMask::SQ_PSN)
            .with(QpAttrMask::TIMEOUT)
            .with(QpAttrMask::RETRY_CNT)
            .with(QpAttrMask::RNR_RETRY)
            .with(QpAttrMask::MAX_RD_ATOMIC);
        let rts = QpAttr {
            state: QpState::Rts,
            ..attr
        };
        let moved = pair.qp.modify(&attr, to_rtr);
        let moved = moved.and_then(|()| pair.qp.modify(&rts, to_rts));
        if let Err(error) = &moved {
            tracing::warn!(%peer, %error, "no way to the peer");
        }
        moved.is_ok()
    }

    /// Posts a receive of one parcel.
    /// Whether there was memory for it.
    pub(crate) fn post_receive(&mut self, id: QpId) -> bool {
        let Some(pair) = self.pairs.get_mut(id.0 as usize).and_then(Option::as_mut) else {
            return true;
        };
        let Some((buffer, sge)) = self.receives.take(&self.domain) else {
            return false;
        };
        let name = Name {
            pair: id.0,
            generation: pair.generation,
            kind: CompletionKind::Recv,
        };
        let wr = RecvWr {
            wr_id: name.pack(),
            sg_list: &[sge],
        };
        // SAFETY: a buffer of ours that nobody sees until it has completed or the queue pair is gone.
        match unsafe { pair.qp.post_recv(&[wr]) } {
            Ok(()) => pair.posted.push_back(buffer),
            Err(_) => {
                // A queue as deep as what is posted is never full, so the device has failed.
                self.receives.give_back([buffer]);
                self.fail(id, CompletionKind::Recv);
            }
        }
        true
    }

    /// Posts a SEND of private bytes; false if the device refuses.
    pub(crate) fn post_send(&mut self, id: QpId, key: Key, offset: u64, len: u32) -> bool {
        let place = self.slabs.private_place(key, offset, len);
        self.post(id, SendOp::Send, CompletionKind::Send, place)
    }

    /// Posts a READ into a slab; the same.
    pub(crate) fn post_read(
        &mut self,
        id: QpId,
        from: Remote,
        (key, offset, len): (Key, u64, u32),
    ) -> bool {
        let place = self.slabs.slab_place(key, offset, len);
        self.post(id, SendOp::Read(from), CompletionKind::Read, place)
    }

    fn post(&mut self, id: QpId, op: SendOp, kind: CompletionKind, place: Option<Sge>) -> bool {
        let pair = self.pairs.get(id.0 as usize).and_then(Option::as_ref);
        let (Some(pair), Some(sge)) = (pair, place) else {
            self.fail(id, kind);
            return false;
        };
        let name = Name {
            pair: id.0,
            generation: pair.generation,
            kind,
        };
        let wr = SendWr {
            wr_id: name.pack(),
            op,
            sg_list: &[sge],
            flags: SendFlags::SIGNALED,
            to: None,
        };
        // SAFETY: registered memory of ours, in bounds, which stays until the queue pair is gone or
        // the request has completed; see the module's head for who looks at it meanwhile.
        let posted = unsafe { pair.qp.post_send(&[wr]) }.is_ok();
        if !posted {
            self.fail(id, kind);
        }
        posted
    }

    /// What the device would not take counts as ended in error, or it would be waited for for ever.
    fn fail(&mut self, id: QpId, kind: CompletionKind) {
        if let Some(pair) = self.pairs.get_mut(id.0 as usize).and_then(Option::as_mut) {
            pair.done.push_back((Status::LocalOperation, kind));
            self.failed.push_back(id);
        }
    }

    /// The next thing that the device has done.
    pub(crate) fn next(&mut self) -> Option<Done> {
        if let Some(id) = self.failed.pop_front() {
            return Some(Done::Completed(id));
        }
        loop {
            if self.batch.is_empty() && !self.fill() {
                return None;
            }
            let wc = self.batch.pop_front()?;
            let name = Name::unpack(wc.wr_id);
            let pair = self.pairs.get_mut(name.pair as usize);
            let pair = pair.and_then(Option::as_mut);
            let Some(pair) = pair.filter(|pair| pair.generation == name.generation) else {
                continue;
            };
            let id = QpId(name.pair);
            pair.done.push_back((wc.status, name.kind));
            if name.kind != CompletionKind::Recv {
                return Some(Done::Completed(id));
            }
            // Receives complete in the order posted.
            let Some(buffer) = pair.posted.pop_front() else {
                continue;
            };
            if wc.status != Status::Success {
                self.receives.give_back([buffer]);
                return Some(Done::Completed(id));
            }
            return Some(Done::Received(
                id,
                self.receives.see(buffer, wc.byte_len as usize),
            ));
        }
    }

    fn fill(&mut self) -> bool {
        match self.cq.poll(BATCH, &mut self.polled) {
            // Then the queue is empty, and nothing of destroyed queue pairs is left in it.
            Ok(count) if count < BATCH => self.cq_needed -= std::mem::take(&mut self.cq_stale),
            Ok(_) => {}
            Err(error) => self.broken = self.broken.or(Some(error)),
        }
        self.batch.extend(self.polled.drain(..));
        !self.batch.is_empty()
    }

    /// The completion of a queue pair that came first.
    pub(crate) fn poll_completion(&mut self, id: QpId) -> Option<(Status, CompletionKind)> {
        let pair = self.pairs.get_mut(id.0 as usize)?.as_mut()?;
        pair.done.pop_front()
    }

    /// A received parcel has been dealt with.
    pub(crate) fn recycle(&mut self, received: Received) {
        self.receives.give_back([received.buffer]);
    }

    /// Has the next completion told to the file descriptor; false if there are some already.
    pub(crate) fn arm(&mut self) -> bool {
        while self.channel.event().is_some() {}
        while let Some(event) = self.domain.context().async_event() {
            if matches!(event, AsyncEvent::DeviceFatal | AsyncEvent::CqError(_)) {
                self.broken = self.broken.or(Some(Error::Os(libc::ENODEV)));
            }
        }
        if let Err(error) = self.cq.request_notification(false) {
            self.broken = self.broken.or(Some(error));
        }
        // What came before that is not told.
        self.broken.is_none() && self.failed.is_empty() && self.batch.is_empty() && !self.fill()
    }
}

impl Path {
    /// The first working port with the address `local`, or with any that is routed; an InfiniBand
    /// port has none.
    fn of(context: &Context, local: Option<IpAddr>) -> Result<Path, Error> {
        let device = context.query_device()?;
        let within = |most: u32| most.clamp(1, u32::from(READS)) as u8;
        for port in 1..=device.phys_port_cnt {
            let Ok(attr) = context.query_port(port) else {
                continue;
            };
            // Who is neither on Ethernet nor has a local identifier is of a kind that we do not know.
            if attr.state != PortState::Active || !(attr.is_ethernet || attr.lid != 0) {
                continue;
            }
            let gids = context.gids(port)?;
            let gid = match local {
                Some(local) => {
                    let own = gids.iter().filter(|entry| entry.gid == Gid::from_ip(local));
                    choose_gid(&own.copied().collect::<Vec<_>>(), local)
                }
                None => [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()]
                    .into_iter()
                    .find_map(|any| choose_gid(&gids, any)),
            };
            let gid = gid.filter(|entry| entry.index <= u32::from(u8::MAX));
            if gid.is_none() && attr.is_ethernet {
                continue;
            }
            return Ok(Path {
                address: gid.filter(|_| attr.is_ethernet).map(|entry| entry.gid.ip()),
                port,
                gid_index: gid.map_or(0, |entry| entry.index as u8),
                lid: if attr.is_ethernet { 0 } else { attr.lid },
                is_ethernet: attr.is_ethernet,
                mtu: attr.active_mtu,
                reads_served: within(device.qp_rd_atom),
                reads: within(device.qp_init_rd_atom),
            });
        }
        Err(Error::Argument(
            "no active port has the node's address (see `lowtide devices`)",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_known_by_its_name_again() {
        for (pair, generation) in [(0, 1), (7, u32::MAX), ((1 << 30) - 1, 0)] {
            for kind in [
                CompletionKind::Recv,
                CompletionKind::Read,
                CompletionKind::Send,
            ] {
                let name = Name {
                    pair,
                    generation,
                    kind,
                };
                let again = Name::unpack(name.pack());
                assert_eq!(
                    (again.pair, again.generation, again.kind),
                    (pair, generation, kind)
                );
            }
        }
    }
}
