//! `ibv` with the calls of `raw`: what cannot fail there is unwrapped, and a completion queue that can
//! be waited at.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use lowtide_transport::ibv::{self, choose_gid};
pub use lowtide_transport::ibv::{AddressHandle, CompletionChannel, MemoryRegion, MemoryWindow};
use lowtide_transport::raw::types::*;

/// C has numbers for errors.
pub const HAS_WORDS: bool = false;
/// The kernel's rxe says of every receive that it has an IP header in front.
pub const FLAGS_OF_ANY_RECEIVE: WcFlags = WcFlags::GRH;

/// Nothing can be chosen.
pub struct DeviceOptions;

/// The device's own counts, as the kernel shows them.
pub struct Counters {
    pub rcvd_rnr_err: u64,
}

/// Nobody asks early.
pub fn asked_early(_: &Context) -> u64 {
    0
}

/// One of the devices that `LOWTIDE_DEVICE` names, by turns.
pub fn device_name(turn: usize) -> String {
    let names = std::env::var("LOWTIDE_DEVICE").expect("LOWTIDE_DEVICE names devices");
    let names: Vec<&str> = names.split(',').collect();
    names[turn % names.len()].to_owned()
}

/// The devices that `LOWTIDE_DEVICE` names, by turns, each opened anew.
#[derive(Clone)]
pub struct Context {
    context: ibv::Context,
    is_ipv6: bool,
}

impl Context {
    /// Of the address only the family matters.
    pub fn open(address: SocketAddr, _: &DeviceOptions) -> Result<Context, Error> {
        static TURN: AtomicUsize = AtomicUsize::new(0);
        let turn = TURN.fetch_add(1, Ordering::Relaxed);
        Ok(Context {
            context: ibv::Context::open(&device_name(turn))?,
            is_ipv6: address.is_ipv6(),
        })
    }

    /// Its address that is routed.
    pub fn gid(&self) -> GidEntry {
        let peer: IpAddr = match self.is_ipv6 {
            false => Ipv4Addr::new(192, 0, 2, 1).into(),
            true => Ipv6Addr::new(0x2001, 0xDB8, 0, 0, 0, 0, 0, 1).into(),
        };
        choose_gid(&self.context.gids(1).unwrap(), peer).expect("a GID of RoCE v2")
    }

    pub fn counters(&self) -> Counters {
        let count = |name: &str| {
            let device = self.context.name();
            let path = format!("/sys/class/infiniband/{device}/ports/1/hw_counters/{name}");
            let text = std::fs::read_to_string(path).unwrap();
            text.trim().parse().unwrap()
        };
        Counters {
            rcvd_rnr_err: count("rcvd_rnr_err"),
        }
    }

    pub fn protection_domain(&self) -> ProtectionDomain {
        ProtectionDomain(self.context.protection_domain().unwrap())
    }

    pub fn completion_queue(
        &self,
        depth: u32,
        channel: Option<&CompletionChannel>,
    ) -> Result<CompletionQueue, Error> {
        let cq = self.context.completion_queue(depth, channel)?;
        Ok(CompletionQueue(Arc::new(Queue {
            cq,
            seen: Mutex::default(),
        })))
    }
}

impl Deref for Context {
    type Target = ibv::Context;

    fn deref(&self) -> &ibv::Context {
        &self.context
    }
}

impl AsFd for Context {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.context.as_fd()
    }
}

#[derive(Clone)]
pub struct CompletionQueue(Arc<Queue>);

struct Queue {
    cq: ibv::CompletionQueue,
    /// What was found while waiting.
    seen: Mutex<VecDeque<WorkCompletion>>,
}

impl CompletionQueue {
    pub fn id(&self) -> CqId {
        self.0.cq.id()
    }

    pub fn wait(&self, deadline: Instant) -> bool {
        loop {
            let mut seen = self.0.seen.lock().unwrap();
            let mut done = Vec::new();
            self.0.cq.poll(16, &mut done).unwrap();
            seen.extend(done);
            if !seen.is_empty() || Instant::now() >= deadline {
                return !seen.is_empty();
            }
            drop(seen);
            std::thread::yield_now();
        }
    }

    pub fn poll(&self, max: usize, done: &mut Vec<WorkCompletion>) -> Result<usize, Error> {
        let mut seen = self.0.seen.lock().unwrap();
        let known = seen.len().min(max);
        done.extend(seen.drain(..known));
        Ok(known + self.0.cq.poll(max - known, done)?)
    }

    pub fn request_notification(&self, solicited_only: bool) {
        self.0.cq.request_notification(solicited_only).unwrap();
    }

    pub fn resize(&self, depth: u32) -> Result<(), Error> {
        self.0.cq.resize(depth)
    }
}

#[derive(Clone)]
pub struct ProtectionDomain(ibv::ProtectionDomain);

impl Deref for ProtectionDomain {
    type Target = ibv::ProtectionDomain;

    fn deref(&self) -> &ibv::ProtectionDomain {
        &self.0
    }
}

pub struct Queues<'a> {
    pub send: &'a CompletionQueue,
    pub recv: &'a CompletionQueue,
    pub shared: Option<&'a SharedReceiveQueue>,
}

/// The suite grants every right; some devices have fewer.
fn rights_of(context: &ibv::Context, flags: AccessFlags) -> AccessFlags {
    match context.capabilities().flush {
        true => flags,
        false => flags.without(AccessFlags::FLUSH_GLOBAL),
    }
}

impl ProtectionDomain {
    /// # Safety
    /// As of [`ibv::ProtectionDomain::register`].
    pub unsafe fn register(
        &self,
        address: u64,
        len: u64,
        iova: u64,
        flags: AccessFlags,
    ) -> Result<MemoryRegion, Error> {
        let flags = rights_of(self.0.context(), flags);
        // SAFETY: the caller's promise.
        unsafe { self.0.register(address, len, iova, flags) }
    }

    pub fn queue_pair(&self, queues: Queues<'_>, init: &QpInitAttr) -> Result<QueuePair, Error> {
        let queues = ibv::Queues {
            send: &queues.send.0.cq,
            recv: &queues.recv.0.cq,
            shared: queues.shared.map(|shared| &shared.0),
        };
        let gids = self.0.context().gids(1)?;
        let peer = Ipv4Addr::new(192, 0, 2, 1).into();
        let here = choose_gid(&gids, peer).expect("a GID of RoCE v2").gid.ip();
        let IpAddr::V4(here) = here else {
            unreachable!("of the peer's family")
        };
        Ok(QueuePair {
            qp: self.0.queue_pair(queues, init)?,
            context: self.0.context().clone(),
            here,
            member: UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap(),
        })
    }

    pub fn shared_receive_queue(&self, attr: SrqAttr) -> Result<SharedReceiveQueue, Error> {
        self.0.shared_receive_queue(attr).map(SharedReceiveQueue)
    }
}

pub struct SharedReceiveQueue(ibv::SharedReceiveQueue);

impl SharedReceiveQueue {
    pub fn query(&self) -> SrqAttr {
        self.0.query().unwrap()
    }
}

impl Deref for SharedReceiveQueue {
    type Target = ibv::SharedReceiveQueue;

    fn deref(&self) -> &ibv::SharedReceiveQueue {
        &self.0
    }
}

#[derive(Debug)]
pub struct QueuePair {
    qp: ibv::QueuePair,
    context: ibv::Context,
    /// Our address there, and the host's membership in groups: the network asks the host.
    here: Ipv4Addr,
    member: UdpSocket,
}

impl QueuePair {
    pub fn query(&self) -> QpAttr {
        self.qp.query().unwrap()
    }

    pub fn modify(&self, attr: &QpAttr, mask: QpAttrMask) -> Result<(), Error> {
        let access = rights_of(&self.context, attr.access);
        self.qp.modify(&QpAttr { access, ..*attr }, mask)
    }

    pub fn attach_multicast(&self, group: Gid) -> Result<(), Error> {
        self.qp.attach_multicast(group)?;
        if let IpAddr::V4(group) = group.ip() {
            self.member.join_multicast_v4(&group, &self.here).unwrap();
        }
        Ok(())
    }
}

impl Deref for QueuePair {
    type Target = ibv::QueuePair;

    fn deref(&self) -> &ibv::QueuePair {
        &self.qp
    }
}
