//! What every provider of the verbs does, on memory of the test's own: softroce by each way to a peer,
//! and devices of libibverbs.

mod connections;
pub mod datagrams;
mod events;
mod memory;
mod shared_receives;
mod states;
mod threads;
mod windows;

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::provider::{
    AddressHandle, CompletionQueue, Context, MemoryRegion, ProtectionDomain, QueuePair, Queues,
    SharedReceiveQueue,
};
use super::{options, provider};
use crate::NEXT_PAGES;
use crate::common::{self, PATIENCE};
use lowtide_transport::raw::types::*;

pub const ALL: AccessFlags = AccessFlags::LOCAL_WRITE
    .with(AccessFlags::REMOTE_WRITE)
    .with(AccessFlags::REMOTE_READ)
    .with(AccessFlags::REMOTE_ATOMIC)
    .with(AccessFlags::FLUSH_GLOBAL);
pub const QKEY: u32 = 0x1357_9BDF;

/// Pages that may be taken away, as a program's own memory may.
pub struct Pages {
    pub at: usize,
    pub len: usize,
}

impl Pages {
    /// Pages where the kernel puts nothing by itself, so that what is unmapped stays unmapped.
    pub fn new(len: usize) -> Pages {
        let wish = NEXT_PAGES.fetch_add(len.next_multiple_of(1 << 30), Ordering::Relaxed);
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let wish = std::ptr::without_provenance_mut(wish);
        // SAFETY: a new private mapping, or none.
        let at = unsafe { libc::mmap(wish, len, rights, flags, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        Pages {
            at: at.expose_provenance(),
            len,
        }
    }

    pub fn address(&self) -> u64 {
        self.at as u64
    }

    pub fn pointer(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.at)
    }

    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.len);
        // SAFETY: inside the mapping; nobody has a reference to it.
        unsafe { std::ptr::copy(bytes.as_ptr(), self.pointer().add(offset), bytes.len()) };
    }

    pub fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        assert!(offset + len <= self.len);
        let mut bytes = vec![0; len];
        // SAFETY: inside the mapping; what is copied has completed.
        unsafe { std::ptr::copy(self.pointer().add(offset), bytes.as_mut_ptr(), len) };
        bytes
    }

    pub fn word(&self, offset: usize) -> u64 {
        u64::from_ne_bytes(self.read(offset, 8).try_into().unwrap())
    }

    pub fn register(&self, pd: &ProtectionDomain, flags: AccessFlags) -> MemoryRegion {
        let (at, len) = (self.address(), self.len as u64);
        // SAFETY: these pages are only ever copied into and out of.
        unsafe { pd.register(at, len, at, flags) }.unwrap()
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own. Registered or not: that is the point.
        unsafe { libc::munmap(self.pointer().cast(), self.len) };
    }
}

/// A device with memory, a completion queue and a queue pair.
pub struct End {
    pub context: Context,
    pub pd: ProtectionDomain,
    pub cq: CompletionQueue,
    pub qp: QueuePair,
    pub pages: Pages,
    pub mr: MemoryRegion,
}

pub const LEN: usize = 1 << 20;

pub fn init_attr(kind: QpType) -> QpInitAttr {
    QpInitAttr {
        kind,
        cap: QpCap {
            max_send_wr: 16,
            max_recv_wr: 16,
            max_send_sge: 4,
            max_recv_sge: 4,
            max_inline_data: 128,
        },
        sq_sig_all: false,
    }
}

pub fn end(kind: QpType) -> End {
    end_on(
        Context::open(common::address(), &options()).unwrap(),
        kind,
        None,
    )
}

pub fn end_on(context: Context, kind: QpType, shared: Option<&SharedReceiveQueue>) -> End {
    let pd = context.protection_domain();
    end_in(context, pd, kind, shared)
}

pub fn end_in(
    context: Context,
    pd: ProtectionDomain,
    kind: QpType,
    shared: Option<&SharedReceiveQueue>,
) -> End {
    let cq = context.completion_queue(64, None).unwrap();
    let queues = Queues {
        send: &cq,
        recv: &cq,
        shared,
    };
    let qp = pd.queue_pair(queues, &init_attr(kind)).unwrap();
    let pages = Pages::new(LEN);
    let mr = pages.register(&pd, ALL | AccessFlags::MW_BIND);
    End {
        context,
        pd,
        cq,
        qp,
        pages,
        mr,
    }
}

pub const INIT: QpAttrMask = QpAttrMask::STATE
    .with(QpAttrMask::PKEY_INDEX)
    .with(QpAttrMask::PORT);
pub const RTR_UC: QpAttrMask = QpAttrMask::STATE
    .with(QpAttrMask::ADDRESS)
    .with(QpAttrMask::PATH_MTU)
    .with(QpAttrMask::DEST_QPN)
    .with(QpAttrMask::RQ_PSN);
pub const RTR_RC: QpAttrMask = RTR_UC
    .with(QpAttrMask::MAX_DEST_RD_ATOMIC)
    .with(QpAttrMask::MIN_RNR_TIMER);
pub const RTS_UC: QpAttrMask = QpAttrMask::STATE.with(QpAttrMask::SQ_PSN);
pub const RTS_RC: QpAttrMask = RTS_UC
    .with(QpAttrMask::TIMEOUT)
    .with(QpAttrMask::RETRY_CNT)
    .with(QpAttrMask::RNR_RETRY)
    .with(QpAttrMask::MAX_RD_ATOMIC);

/// What a queue pair tells its peer.
pub fn attr_to(context: &Context, dest: Qpn) -> QpAttr {
    QpAttr {
        path_mtu: Mtu::B1024,
        qkey: QKEY,
        rq_psn: Psn::new(0xFF_FFFE),
        sq_psn: Psn::new(0xFF_FFFE),
        dest,
        access: ALL,
        address: AhAttr {
            dgid: context.gid().gid,
            // Both ends have theirs at the same place.
            sgid_index: context.gid().index as u8,
            hop_limit: 64,
            port: 1,
            ..AhAttr::default()
        },
        max_rd_atomic: 4,
        max_dest_rd_atomic: 4,
        min_rnr_timer: RnrTimer::new(1),
        timeout: 14,
        retry_cnt: 7,
        rnr_retry: 7,
        ..QpAttr::default()
    }
}

pub fn to(attr: QpAttr, state: QpState) -> QpAttr {
    QpAttr { state, ..attr }
}

impl End {
    pub fn to_init(&self) {
        let attr = attr_to(&self.context, Qpn::new(0));
        let mask = match self.qp.init_attr().kind {
            QpType::Ud => INIT | QpAttrMask::QKEY,
            _ => INIT | QpAttrMask::ACCESS,
        };
        self.qp.modify(&to(attr, QpState::Init), mask).unwrap();
    }

    pub fn to_rtr(&self, peer: &Context, dest: Qpn) {
        let mask = match self.qp.init_attr().kind {
            QpType::Rc => RTR_RC,
            QpType::Uc => RTR_UC,
            QpType::Ud => QpAttrMask::STATE,
        };
        let attr = to(attr_to(peer, dest), QpState::Rtr);
        self.qp.modify(&attr, mask).unwrap();
    }

    pub fn to_rts(&self) {
        let mask = match self.qp.init_attr().kind {
            QpType::Rc => RTS_RC,
            _ => RTS_UC,
        };
        let attr = to(attr_to(&self.context, Qpn::new(0)), QpState::Rts);
        self.qp.modify(&attr, mask).unwrap();
    }

    pub fn connect(&self, peer: &Context, dest: Qpn) {
        self.to_init();
        self.to_rtr(peer, dest);
        self.to_rts();
    }

    pub fn sge(&self, offset: usize, len: u32) -> Sge {
        Sge {
            lkey: self.mr.lkey(),
            addr: self.pages.address() + offset as u64,
            len,
        }
    }

    pub fn remote(&self, offset: usize) -> Remote {
        Remote {
            va: self.pages.address() + offset as u64,
            rkey: self.mr.rkey(),
        }
    }

    pub fn try_post(&self, wr: SendWr<'_>) -> Result<(), Error> {
        // SAFETY: the tests look at their pages only by copying, when requests have completed.
        unsafe { self.qp.post_send(&[wr]) }.map_err(|bad| bad.error)
    }

    /// Posts a signalled request.
    pub fn post(&self, wr_id: u64, op: SendOp, sg_list: &[Sge]) {
        self.try_post(signalled(wr_id, op, sg_list)).unwrap();
    }

    pub fn receive(&self, wr_id: u64, sg_list: &[Sge]) {
        // SAFETY: as above.
        unsafe { self.qp.post_recv(&[RecvWr { wr_id, sg_list }]) }.unwrap();
    }

    /// The next completion.
    pub fn next(&self) -> WorkCompletion {
        let mut done = Vec::new();
        let deadline = Instant::now() + PATIENCE;
        while self.cq.poll(1, &mut done).unwrap() == 0 {
            assert!(self.cq.wait(deadline), "no completion");
        }
        done[0]
    }

    pub fn succeed(&self) -> WorkCompletion {
        let work = self.next();
        assert_eq!(work.status, Status::Success, "{work:?}");
        work
    }

    pub fn is_silent(&self) -> bool {
        let deadline = Instant::now() + Duration::from_millis(30);
        !self.cq.wait(deadline) && self.cq.poll(1, &mut Vec::new()) == Ok(0)
    }

    /// The next asynchronous event.
    pub fn event(&self) -> AsyncEvent {
        assert!(is_readable(&self.context, PATIENCE), "no event");
        self.context.async_event().unwrap()
    }
}

/// A call was refused as it must be: softroce says what is wrong (no words here: any), C has a number
/// for it.
pub fn assert_refused<T: std::fmt::Debug>(result: Result<T, Error>, expected: Error) {
    let error = result.unwrap_err();
    let is_same = match expected {
        _ if !provider::HAS_WORDS => error.errno() == expected.errno(),
        Error::Argument("") => matches!(error, Error::Argument(_)),
        Error::Limit("") => matches!(error, Error::Limit(_)),
        expected => error == expected,
    };
    assert!(is_same, "{error:?} instead of {expected:?}");
}

pub fn signalled(wr_id: u64, op: SendOp, sg_list: &[Sge]) -> SendWr<'_> {
    SendWr {
        wr_id,
        op,
        sg_list,
        flags: SendFlags::SIGNALED,
        to: None,
    }
}

/// A FLUSH of a word; what for, it says.
pub const fn flush(remote: Remote, persistent: bool, global: bool) -> SendOp {
    SendOp::Flush(Flush {
        remote,
        len: 8,
        global,
        persistent,
        whole_region: false,
    })
}

/// Two connected ends.
pub fn pair(kind: QpType) -> (End, End) {
    let (a, b) = (end(kind), end(kind));
    a.connect(&b.context, b.qp.qpn());
    b.connect(&a.context, a.qp.qpn());
    (a, b)
}

pub fn is_readable(of: &impl AsFd, patience: Duration) -> bool {
    let mut poll = libc::pollfd {
        fd: of.as_fd().as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one live entry.
    unsafe { libc::poll(&raw mut poll, 1, patience.as_millis() as i32) == 1 }
}

pub fn bytes(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 256 + seed) as u8).collect()
}

pub fn handle(end: &End, peer: &Context) -> AddressHandle {
    let attr = attr_to(peer, Qpn::new(0));
    end.pd.address_handle(&attr.address).unwrap()
}

/// Any thread may hold and use any object.
#[test]
fn handles_are_send_and_sync() {
    fn holds<T: Send + Sync>() {}
    holds::<Context>();
    holds::<ProtectionDomain>();
    holds::<CompletionQueue>();
    holds::<provider::CompletionChannel>();
    holds::<QueuePair>();
    holds::<SharedReceiveQueue>();
    holds::<MemoryRegion>();
    holds::<provider::MemoryWindow>();
    holds::<AddressHandle>();
}
