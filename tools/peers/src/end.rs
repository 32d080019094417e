//! A device with memory, and queue pairs over it that are connected out of band.
//!
//! Owns: the way of a raw queue pair, of any type, to RTS. The memory is a region of the safe verbs;
//! what a request reaches beyond it, the device refuses.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use lowtide_transport::cm::EventChannel;
use lowtide_transport::raw::types::*;
use lowtide_transport::raw::{self, AddressHandle, CompletionQueue, QueuePair, Queues};
use lowtide_transport::verbs::{
    Access, Buffer, Counters, Device, DeviceOptions, MemoryRegion, ProtectionDomain,
};

/// Completions taken from the queue at once.
const POLLED_MAX: usize = 16;
/// How long a completion is polled for before the thread sleeps.
const BUSY: Duration = Duration::from_millis(1);
/// Polls between two looks at the clock, which under emulation cost more than the rest of a poll.
const CLOCK_EVERY: u32 = 16;
/// How long a queue pair in ERR may take for all that it has.
const FLUSHED_WITHIN: Duration = Duration::from_secs(1);
/// The identity of the last request of a queue pair; that of all others is 0.
const LAST: u64 = u64::MAX;
const RIGHTS: AccessFlags = AccessFlags::LOCAL_WRITE
    .with(AccessFlags::REMOTE_WRITE)
    .with(AccessFlags::REMOTE_READ)
    .with(AccessFlags::REMOTE_ATOMIC);

/// The UDP port of a device.
pub const ROCE_PORT: u16 = 4791;
/// What the datagrams of programs carry that agree on everything out of band.
pub const QKEY: u32 = 0x1111_1111;
/// Bytes of IP header in front of a datagram that was received.
pub const GRH: u32 = 40;

/// A device with memory for every right.
#[derive(Debug)]
pub struct End {
    device: Device,
    pd: ProtectionDomain,
    region: MemoryRegion,
}

/// Where a queue pair and its memory are, as its peer must know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The queue pair.
    pub qpn: Qpn,
    /// The first number that it sends.
    pub psn: Psn,
    /// Its memory.
    pub remote: Remote,
    /// Its address.
    pub gid: Gid,
}

/// What both sides of a connection agree on.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Largest payload of a packet.
    pub mtu: Mtu,
    /// Local ACK timeout: 4.096 us times 2 to this power.
    pub timeout: u8,
    /// Timeouts without progress until it fails; 7 is without limit.
    pub retry: u8,
    /// READs and atomics that the peer serves at once.
    pub reads: u8,
    /// What datagrams carry, both ways.
    pub qkey: u32,
}

impl End {
    /// READs and atomics that are served at once.
    pub const READS: u8 = 16;

    /// A device on `ip`, with `len` zero bytes.
    ///
    /// # Errors
    /// What [`Device::open`] says, or `OutOfMemory`.
    pub fn open(ip: IpAddr, len: usize, options: &DeviceOptions) -> io::Result<End> {
        let device = Device::open(SocketAddr::new(ip, ROCE_PORT), options)?;
        let pd = device.protection_domain();
        let region = pd.memory_region(len, Access::ALL);
        let region = region.map_err(|error| io::Error::new(io::ErrorKind::OutOfMemory, error))?;
        Ok(End { device, pd, region })
    }

    /// The largest payload of a packet that the link carries.
    pub fn mtu(&self) -> Mtu {
        let port = self.device.context().query_port(1);
        port.map_or(Mtu::B1024, |port| port.active_mtu)
    }

    /// What the device has seen.
    pub fn counters(&self) -> Counters {
        self.device.counters()
    }

    /// Where events of rdma_cm's handshakes arrive.
    ///
    /// # Errors
    /// When the process has no file descriptors left.
    pub fn channel(&self) -> io::Result<EventChannel> {
        EventChannel::new(&self.device)
    }

    /// The protection domain of its memory and queue pairs.
    pub fn pd(&self) -> &raw::ProtectionDomain {
        self.pd.raw()
    }

    /// Copies bytes into the memory, from `at` on. Panics when they do not fit.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        self.region.write(at, bytes);
    }

    /// Copies `len` bytes out, from `at` on. Panics outside the memory.
    pub fn read(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.region.read(at, &mut bytes);
        bytes
    }

    /// `len` bytes of the memory, from `at` on; none of length 0.
    pub fn sge(&self, at: u64, len: u32) -> Option<Sge> {
        match self.region.range(at, len) {
            Buffer::Region(sge) if len > 0 => Some(sge),
            _ => None,
        }
    }

    /// A queue pair in RESET with a completion queue of its own; `depth` requests fit each way.
    ///
    /// # Errors
    /// As the device says.
    pub fn link(&self, kind: QpType, depth: u32) -> Result<Link<'_>, Error> {
        let queue = self.device.context().completion_queue(2 * depth, None)?;
        let init = QpInitAttr {
            kind,
            cap: QpCap {
                max_send_wr: depth,
                max_recv_wr: depth,
                max_send_sge: 1,
                max_recv_sge: 1,
                max_inline_data: 0,
            },
            sq_sig_all: true,
        };
        let queues = Queues {
            send: &queue,
            recv: &queue,
            shared: None,
        };
        let qp = self.pd().queue_pair(queues, &init)?;
        let here = Place {
            qpn: qp.qpn(),
            psn: qp.random_psn(),
            remote: self.region.remote(0),
            gid: self.device.context().gid().gid,
        };
        Ok(Link {
            end: self,
            queue,
            qp,
            kind,
            here,
            to: None,
            done: Vec::with_capacity(POLLED_MAX),
        })
    }
}

/// A queue pair.
#[derive(Debug)]
pub struct Link<'a> {
    end: &'a End,
    queue: CompletionQueue,
    qp: QueuePair,
    kind: QpType,
    here: Place,
    /// Of datagrams, when it is connected.
    to: Option<(AddressHandle, Qpn, u32)>,
    /// Polled and not yet taken, the first one last.
    done: Vec<WorkCompletion>,
}

impl Link<'_> {
    /// What its peer must know.
    pub fn here(&self) -> &Place {
        &self.here
    }

    /// Of which type it is.
    pub fn kind(&self) -> QpType {
        self.kind
    }

    /// Bytes in front of what is received.
    pub fn head(&self) -> u32 {
        if self.kind == QpType::Ud { GRH } else { 0 }
    }

    /// Goes to RTS, with its peer there.
    ///
    /// # Errors
    /// As the device says.
    pub fn connect(&mut self, there: &Place, terms: &Terms) -> Result<(), Error> {
        let address = address_of(there.gid);
        let attr = QpAttr {
            qkey: terms.qkey,
            access: RIGHTS,
            address,
            path_mtu: terms.mtu,
            dest: there.qpn,
            rq_psn: there.psn,
            sq_psn: self.here.psn,
            max_dest_rd_atomic: End::READS,
            max_rd_atomic: terms.reads.clamp(1, End::READS),
            min_rnr_timer: RnrTimer::new(12),
            timeout: terms.timeout,
            retry_cnt: terms.retry,
            rnr_retry: 7,
            ..QpAttr::default()
        };
        for state in [QpState::Init, QpState::Rtr, QpState::Rts] {
            let from = self.qp.query().state;
            let wanted = QpAttrMask::of_transition(self.kind, from, state);
            let (wanted, _) = wanted.ok_or(Error::State(from))?;
            let mask = wanted.with(QpAttrMask::STATE);
            self.qp.modify(&QpAttr { state, ..attr }, mask)?;
        }
        if self.kind == QpType::Ud {
            self.aim(there.gid, there.qpn, terms.qkey)?;
        }
        Ok(())
    }

    /// Sends datagrams there from now on.
    ///
    /// # Errors
    /// As the device says.
    pub fn aim(&mut self, gid: Gid, qpn: Qpn, qkey: u32) -> Result<(), Error> {
        let handle = self.end.pd().address_handle(&address_of(gid))?;
        self.to = Some((handle, qpn, qkey));
        Ok(())
    }

    /// Posts an operation on `len` bytes of the memory.
    ///
    /// # Errors
    /// As the device says.
    pub fn post_send(&self, op: SendOp, at: u64, len: u32) -> Result<(), Error> {
        let to = self.to.as_ref().map(|(handle, qpn, qkey)| Destination {
            ah: handle.id(),
            qpn: *qpn,
            qkey: *qkey,
        });
        let sge = self.end.sge(at, len);
        let wr = SendWr {
            wr_id: 0,
            op,
            sg_list: sge.as_slice(),
            flags: SendFlags::SIGNALED,
            to,
        };
        // SAFETY: the memory is a region of the safe verbs, which anybody may change at any time.
        unsafe { self.qp.post_send(&[wr]) }.map_err(|bad| bad.error)
    }

    /// Posts a receive of `len` bytes, behind what stands in front of a datagram.
    ///
    /// # Errors
    /// As the device says.
    pub fn post_recv(&self, at: u64, len: u32) -> Result<(), Error> {
        let sge = self.end.sge(at, self.head() + len);
        let wr = RecvWr {
            wr_id: 0,
            sg_list: sge.as_slice(),
        };
        // SAFETY: as in `post_send`.
        unsafe { self.qp.post_recv(&[wr]) }.map_err(|bad| bad.error)
    }

    /// Goes to ERR, where whatever is under way must end as flushed: also a receive that is posted last
    /// of all, behind which nothing is left.
    ///
    /// # Errors
    /// What it says instead.
    pub fn break_off(&mut self) -> io::Result<()> {
        let odd = |what: String| io::Error::other(what);
        let attr = QpAttr {
            state: QpState::Err,
            ..QpAttr::default()
        };
        let refused = |error: Error| odd(format!("going to ERR: {error}"));
        self.qp.modify(&attr, QpAttrMask::STATE).map_err(refused)?;
        let last = RecvWr {
            wr_id: LAST,
            sg_list: &[],
        };
        // SAFETY: it names no memory.
        unsafe { self.qp.post_recv(&[last]) }.map_err(|bad| refused(bad.error))?;
        loop {
            let work = self.wait(FLUSHED_WITHIN).map_err(refused)?;
            let work = work.ok_or_else(|| odd("nothing more was flushed".into()))?;
            match (work.wr_id, work.status) {
                (LAST, Status::Flushed) => return Ok(()),
                // What had come to its end before.
                (0, _) => {}
                (id, status) => return Err(odd(format!("request {id} ended with {status:?}"))),
            }
        }
    }

    /// The next completion, if it comes within `patience`.
    ///
    /// # Errors
    /// The queue has overrun.
    pub fn wait(&mut self, patience: Duration) -> Result<Option<WorkCompletion>, Error> {
        self.next_within(BUSY, patience)
    }

    /// The same without sleeping.
    ///
    /// # Errors
    /// The queue has overrun.
    pub fn poll(&mut self, patience: Duration) -> Result<Option<WorkCompletion>, Error> {
        self.next_within(patience, Duration::ZERO)
    }

    /// The next completion, after so much polling, then asleep until `patience` ends.
    fn next_within(
        &mut self,
        busy: Duration,
        patience: Duration,
    ) -> Result<Option<WorkCompletion>, Error> {
        if let Some(work) = self.done.pop() {
            return Ok(Some(work));
        }
        let (start, mut looks) = (Instant::now(), 0u32);
        while self.queue.poll(POLLED_MAX, &mut self.done)? == 0 {
            looks = looks.wrapping_add(1);
            let is_over = looks.is_multiple_of(CLOCK_EVERY) && start.elapsed() > busy;
            if is_over && !self.queue.wait(start + patience) {
                return Ok(None);
            }
        }
        self.done.reverse();
        Ok(self.done.pop())
    }
}

fn address_of(gid: Gid) -> AhAttr {
    AhAttr {
        dgid: gid,
        hop_limit: 64,
        port: 1,
        ..AhAttr::default()
    }
}
