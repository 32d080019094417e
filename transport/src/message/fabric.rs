//! What carries connections: softroce, or a device of libibverbs.
//!
//! Owns: the choice, and for a device of libibverbs the plain UDP socket on which its connections
//! are made: the connection manager's datagrams are queue pair 1's on softroce, but a device keeps
//! that for itself. Everything above speaks of queue pairs, parcels and registered memory, whoever
//! has them.
//!
//! Deliberately absent: interworking of the two in one cluster.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use lowtide_transport_proto::qp::{
    self, CompletionKind, InitAttr, Lkey, QpCaps, Remote, RtrAttr, RtsAttr, SendOp, SendWr, SgList,
    Status, WrId,
};
use lowtide_transport_proto::time::Nanos;
use lowtide_transport_proto::wire::{Mtu, PKEY_DEFAULT, Psn, Qpn, RnrTimer};

use super::connection::Stream;
use super::handshake::{EndQp, RETRY_FOREVER};
use super::{BindError, Counters, EndpointConfig};
use crate::cm::Gsi;
use crate::device::{Device, DeviceOptions, Peers, QpId};
use crate::ibv::carrier::{Carrier, Done, Received};
use crate::ibv::refuse_wire;
use crate::memory::{Key, Lent, Memory, Region};
use crate::names::Random;
use crate::udp::path_mtu;

/// READs of the peer that are remembered, and those of ours under way; a few more than are used.
const READS_SERVED: u8 = 8;
/// A management datagram has 256 bytes; anything longer is cut and does not parse.
const MAD_ROOM: usize = 512;
/// Management datagrams taken in one turn.
const MADS_MAX: usize = 64;

/// Registered memory, of whichever device.
pub(crate) trait Registrar {
    /// Registers `len` zero bytes to send from; none when there is no room.
    fn register_private(&mut self, domain: u32, len: usize) -> Option<Key>;

    /// A stretch of what was so registered, to be filled.
    fn private_bytes(&mut self, key: Key, offset: usize, len: usize) -> Option<&mut [u8]>;

    /// Lets the peer of `domain` READ bytes, under a key drawn from `draw` if it may be chosen;
    /// returns the key and the address of the first byte.
    ///
    /// # Errors
    /// The bytes again, if there is no room.
    fn lend_to(
        &mut self,
        domain: u32,
        draw: &mut dyn FnMut() -> u32,
        lent: Lent,
    ) -> Result<(Key, u64), Lent>;

    /// Ends a loan.
    fn end_loan(&mut self, key: Key) -> Option<Lent>;

    /// Registers a slab that nobody else has, to be filled by READs.
    fn register_slab(&mut self, domain: u32, slab: Arc<[u8]>) -> Option<Key>;

    /// Takes it back.
    fn release_slab(&mut self, key: Key) -> Option<Arc<[u8]>>;
}

impl Registrar for Memory {
    fn register_private(&mut self, domain: u32, len: usize) -> Option<Key> {
        Memory::register_private(self, domain, len)
    }

    fn private_bytes(&mut self, key: Key, offset: usize, len: usize) -> Option<&mut [u8]> {
        self.private_mut(key)?.get_mut(offset..)?.get_mut(..len)
    }

    fn lend_to(
        &mut self,
        domain: u32,
        draw: &mut dyn FnMut() -> u32,
        mut lent: Lent,
    ) -> Result<(Key, u64), Lent> {
        loop {
            let key = Key(draw());
            match self.lend(domain, key, lent) {
                Ok(()) => return Ok((key, 0)),
                Err(again) => lent = again,
            }
        }
    }

    fn end_loan(&mut self, key: Key) -> Option<Lent> {
        self.take_back(key)
    }

    fn register_slab(&mut self, domain: u32, slab: Arc<[u8]>) -> Option<Key> {
        Memory::register_slab(self, domain, slab)
    }

    fn release_slab(&mut self, key: Key) -> Option<Arc<[u8]>> {
        match self.deregister(key) {
            Some(Region::Slab(slab)) => Some(slab),
            _ => None,
        }
    }
}

/// Both ends of a connection about to work.
pub(super) struct Ends {
    pub(super) peer: SocketAddr,
    pub(super) theirs: EndQp,
    pub(super) psn: Psn,
    /// Full datagrams that the peer's receive buffer holds, and its local identifier: each if it has
    /// one.
    pub(super) budget: Option<u32>,
    pub(super) lid: u16,
    /// Protection domain of what the peer may reach.
    pub(super) domain: u32,
}

/// See the [module](self).
#[allow(clippy::large_enum_variant, reason = "one per endpoint")]
pub(super) enum Fabric {
    Soft(Device),
    Verbs(Verbs),
}

/// A device of libibverbs and the socket beside it.
pub(super) struct Verbs {
    carrier: Carrier,
    socket: UdpSocket,
    local: SocketAddr,
    origin: Instant,
    counters: Counters,
    /// Management datagrams not yet heeded.
    mads: Vec<(SocketAddr, Vec<u8>)>,
}

/// What a turn of a device of libibverbs brings.
pub(super) enum Input {
    /// A queue pair has something to be polled.
    Completed(QpId),
    /// A parcel; [`Fabric::recycle`] it.
    Parcel(QpId, Received),
}

impl Fabric {
    pub(super) fn open(config: &EndpointConfig) -> Result<Fabric, BindError> {
        match &config.device {
            Some(name) => Verbs::open(name, config).map(Fabric::Verbs),
            None => {
                let options = DeviceOptions {
                    socket: config.socket,
                    faults: config.faults,
                    capture: config.capture.clone(),
                    same_host: config.same_host,
                };
                let device = Device::bind(config.addr, &options, Peers::Own, Random::default);
                let device = device.map_err(|error| BindError::of_socket(config.addr, error))?;
                Ok(Fabric::Soft(device))
            }
        }
    }

    /// softroce, whose packets are for us to handle.
    pub(super) fn soft(&mut self) -> Option<&mut Device> {
        match self {
            Fabric::Soft(device) => Some(device),
            Fabric::Verbs(_) => None,
        }
    }

    /// File descriptors that are readable when there is work.
    pub(super) fn fds(&self) -> Vec<RawFd> {
        match self {
            Fabric::Soft(device) => {
                let host = device.host_fd();
                [device.as_raw_fd()].into_iter().chain(host).collect()
            }
            Fabric::Verbs(verbs) => {
                let device = verbs.carrier.fds().map(|fd| fd.as_raw_fd());
                [verbs.socket.as_raw_fd()]
                    .into_iter()
                    .chain(device)
                    .collect()
            }
        }
    }

    pub(super) fn now(&self) -> Nanos {
        match self {
            Fabric::Soft(device) => device.now(),
            Fabric::Verbs(verbs) => Nanos(verbs.origin.elapsed().as_nanos() as u64),
        }
    }

    pub(super) fn local_addr(&self) -> SocketAddr {
        match self {
            Fabric::Soft(device) => device.local_addr(),
            Fabric::Verbs(verbs) => verbs.local,
        }
    }

    /// Full packets that may be under way to us: what our receive buffer holds. A device's flow
    /// control needs no such bound.
    pub(super) fn receive_budget(&self) -> u32 {
        match self {
            Fabric::Soft(device) => device.receive_budget(),
            Fabric::Verbs(_) => u32::from(u16::MAX),
        }
    }

    /// Our local identifier, if the fabric is InfiniBand; 0 on Ethernet.
    pub(super) fn lid(&self) -> u16 {
        match self {
            Fabric::Soft(_) => 0,
            Fabric::Verbs(verbs) => verbs.carrier.lid(),
        }
    }

    /// The largest MTU on the way to `peer`.
    pub(super) fn mtu_to(&self, peer: SocketAddr) -> Mtu {
        match self {
            Fabric::Soft(device) => {
                // Where the kernel does not know, an Ethernet is the safe guess.
                let link = path_mtu(device.local_addr(), peer).unwrap_or(1500);
                Mtu::for_link(link).unwrap_or(Mtu::B256)
            }
            Fabric::Verbs(verbs) => {
                let port = verbs.carrier.mtu();
                let way = path_mtu(verbs.local, peer).ok().and_then(Mtu::for_link);
                // InfiniBand's packets do not take the way of IP.
                way.filter(|_| verbs.carrier.lid() == 0)
                    .map_or(port, |way| port.min(way))
            }
        }
    }

    pub(super) fn set_blocked(&mut self, peer: SocketAddr, is_blocked: bool) {
        if let Some(device) = self.soft() {
            device.set_blocked(peer, is_blocked);
        }
    }

    pub(super) fn counters(&self) -> Counters {
        match self {
            Fabric::Soft(device) => device.counters(),
            Fabric::Verbs(verbs) => verbs.counters,
        }
    }

    pub(super) fn counters_mut(&mut self) -> &mut Counters {
        match self {
            Fabric::Soft(device) => device.counters_mut(),
            Fabric::Verbs(verbs) => &mut verbs.counters,
        }
    }

    pub(super) fn memory(&mut self) -> &mut dyn Registrar {
        match self {
            Fabric::Soft(device) => &mut device.memory,
            Fabric::Verbs(verbs) => verbs.carrier.memory(),
        }
    }

    // Queue pairs.

    /// A queue pair in INIT.
    pub(super) fn create_qp(&mut self, domain: u32, caps: QpCaps) -> Option<(QpId, Qpn)> {
        match self {
            Fabric::Soft(device) => {
                let (id, qpn) = device.create_qp(domain, caps)?;
                let init = InitAttr {
                    access: qp::Access::READ,
                    pkey: PKEY_DEFAULT,
                };
                let qp = device.qp(id)?;
                qp.to_init(init).expect("a new queue pair is in Reset");
                Some((id, qpn))
            }
            Fabric::Verbs(verbs) => verbs.carrier.create_qp(caps.send_wr_max, caps.recv_wr_max),
        }
    }

    pub(super) fn destroy_qp(&mut self, id: QpId) {
        match self {
            Fabric::Soft(device) => device.destroy_qp(id),
            Fabric::Verbs(verbs) => verbs.carrier.destroy_qp(id),
        }
    }

    /// Moves a queue pair to RTS. Whether that worked: a device may know no way to the peer.
    pub(super) fn bring_up(&mut self, id: QpId, ends: &Ends) -> bool {
        match self {
            Fabric::Soft(device) => bring_up_soft(device, id, ends),
            Fabric::Verbs(verbs) => verbs.carrier.bring_up(
                id,
                (ends.peer.ip(), ends.lid),
                (ends.theirs.qpn, ends.theirs.psn, ends.theirs.mtu),
                ends.psn,
            ),
        }
    }

    /// Payload of full packets.
    pub(super) fn packet_len(&mut self, id: QpId) -> Option<u32> {
        match self {
            Fabric::Soft(device) => Some(device.connected(id)?.path_mtu().bytes()),
            Fabric::Verbs(verbs) => verbs.carrier.packet_len(id),
        }
    }

    /// Posts one receive; false if there is no memory for it.
    pub(super) fn post_receive(&mut self, id: QpId) -> bool {
        match self {
            Fabric::Soft(device) => {
                if let Some(qp) = device.qp(id) {
                    Stream::post_receive(qp);
                }
                true
            }
            Fabric::Verbs(verbs) => verbs.carrier.post_receive(id),
        }
    }

    /// Posts a SEND of registered bytes; false if the queue pair is in error, as its completions will
    /// say.
    pub(super) fn post_send(&mut self, id: QpId, key: Key, offset: u64, len: u32) -> bool {
        match self {
            Fabric::Soft(device) => {
                let local = SgList::one(Lkey(key.0), offset, len);
                let wr = SendWr::new(WrId(0), SendOp::Send, local);
                device.qp(id).is_some_and(|qp| qp.post_send(wr).is_ok())
            }
            Fabric::Verbs(verbs) => verbs.carrier.post_send(id, key, offset, len),
        }
    }

    /// Posts a READ into a registered slab; the same.
    pub(super) fn post_read(
        &mut self,
        id: QpId,
        from: Remote,
        (key, offset, len): (Key, u64, u32),
    ) -> bool {
        match self {
            Fabric::Soft(device) => {
                let local = SgList::one(Lkey(key.0), offset, len);
                let wr = SendWr::new(WrId(0), SendOp::Read(from), local);
                device.qp(id).is_some_and(|qp| qp.post_send(wr).is_ok())
            }
            Fabric::Verbs(verbs) => verbs.carrier.post_read(id, from, (key, offset, len)),
        }
    }

    /// The next completion of a queue pair.
    pub(super) fn poll_completion(&mut self, id: QpId) -> Option<(Status, CompletionKind)> {
        match self {
            Fabric::Soft(device) => device.poll_completion(id).map(|c| (c.status, c.kind)),
            Fabric::Verbs(verbs) => verbs.carrier.poll_completion(id),
        }
    }

    // Work.

    /// The next thing that a device of libibverbs has done.
    pub(super) fn next_input(&mut self) -> Option<Input> {
        let Fabric::Verbs(verbs) = self else {
            return None;
        };
        Some(match verbs.carrier.next()? {
            Done::Completed(id) => Input::Completed(id),
            Done::Received(id, received) => Input::Parcel(id, received),
        })
    }

    /// The parcel has been handed up.
    pub(super) fn recycle(&mut self, received: Received) {
        if let Fabric::Verbs(verbs) = self {
            verbs.carrier.recycle(received);
        }
    }

    /// Reads management datagrams that came beside a device of libibverbs; whether those are all.
    pub(super) fn receive_mads(&mut self) -> bool {
        let Fabric::Verbs(verbs) = self else {
            return true;
        };
        let mut bytes = [0; MAD_ROOM];
        while verbs.mads.len() < MADS_MAX {
            // An error is an answer to something sent earlier, if it is not that there is no more.
            match verbs.socket.recv_from(&mut bytes) {
                Ok((len, from)) => verbs.mads.push((from, bytes[..len].to_vec())),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(_) => break,
            }
        }
        false
    }

    /// Those that were read, to be heeded: whatever was sent before them has been handed up.
    pub(super) fn take_mads(&mut self) -> Vec<(SocketAddr, Vec<u8>)> {
        match self {
            Fabric::Soft(_) => Vec::new(),
            Fabric::Verbs(verbs) => std::mem::take(&mut verbs.mads),
        }
    }

    /// # Errors
    /// The device of libibverbs is gone, or its completions are.
    pub(super) fn check(&self) -> io::Result<()> {
        match self {
            Fabric::Soft(_) => Ok(()),
            Fabric::Verbs(verbs) => verbs.carrier.check(),
        }
    }

    /// Sends, or stages, a management datagram.
    pub(super) fn send_mad(&mut self, gsi: &mut Gsi, to: SocketAddr, mad: &[u8]) {
        match self {
            Fabric::Soft(device) => gsi.send(device, to, mad),
            Fabric::Verbs(verbs) => {
                // One that is lost is sent again.
                let _ = verbs.socket.send_to(mad, to);
            }
        }
    }

    /// Queue pairs that finished something while they sent.
    pub(super) fn poll_finished(&mut self) -> Option<QpId> {
        match self {
            Fabric::Soft(device) => device.poll_finished(),
            Fabric::Verbs(_) => None,
        }
    }

    pub(super) fn expire(&mut self, now: Nanos) -> Option<QpId> {
        match self {
            Fabric::Soft(device) => device.expire(now),
            Fabric::Verbs(_) => None,
        }
    }

    pub(super) fn next_timeout(&self) -> Option<Nanos> {
        match self {
            Fabric::Soft(device) => device.next_timeout(),
            Fabric::Verbs(_) => None,
        }
    }

    pub(super) fn transmit(&mut self, now: Nanos) {
        if let Some(device) = self.soft() {
            device.transmit(now);
        }
    }

    /// Sends what is staged, at the very end.
    pub(super) fn flush(&mut self) {
        if let Some(device) = self.soft() {
            device.flush();
        }
    }

    /// Whether nothing would be missed in sleep: asked right before it.
    pub(super) fn may_sleep(&mut self) -> bool {
        match self {
            Fabric::Soft(device) => !device.has_output() && device.may_sleep(),
            Fabric::Verbs(verbs) => verbs.carrier.arm(),
        }
    }

    /// Connections by rings, and by a wire.
    pub(super) fn paths(&self) -> (usize, usize) {
        match self {
            Fabric::Soft(device) => device.paths(),
            Fabric::Verbs(verbs) => (0, verbs.carrier.len()),
        }
    }
}

impl Verbs {
    fn open(name: &str, config: &EndpointConfig) -> Result<Verbs, BindError> {
        refuse_wire(config.capture.is_some(), &config.faults)
            .map_err(|error| BindError::Device(name.to_owned(), error))?;
        let carrier = Carrier::open(name, Some(config.addr.ip()))
            .map_err(|error| BindError::Device(name.to_owned(), error))?;
        let socket = UdpSocket::bind(config.addr)
            .and_then(|socket| socket.set_nonblocking(true).map(|()| socket));
        let socket = socket.map_err(|error| BindError::of_socket(config.addr, error))?;
        let local = socket.local_addr();
        let local = local.map_err(|error| BindError::Io(config.addr, error))?;
        Ok(Verbs {
            carrier,
            socket,
            local,
            origin: Instant::now(),
            counters: Counters::default(),
            mads: Vec::new(),
        })
    }
}

impl BindError {
    fn of_socket(addr: SocketAddr, error: io::Error) -> BindError {
        match error.kind() {
            io::ErrorKind::AddrInUse => BindError::AddrInUse(error),
            _ => BindError::Io(addr, error),
        }
    }
}

fn bring_up_soft(device: &mut Device, id: QpId, ends: &Ends) -> bool {
    device.set_peer(id, ends.peer, ends.budget);
    let Some(qp) = device.qp(id) else {
        return false;
    };
    let rtr = RtrAttr {
        dest: ends.theirs.qpn,
        path_mtu: ends.theirs.mtu,
        // Both ends of this protocol tell the PSN they begin with; the IBTA has it the other way
        // round, and `cm`, which kernels must understand, too.
        rq_psn: ends.theirs.psn,
        max_dest_rd_atomic: READS_SERVED,
        min_rnr_timer: RnrTimer::new(1),
    };
    // No ACK timeout: probes find losses, and a paused peer is not flooded.
    let rts = RtsAttr {
        sq_psn: ends.psn,
        timeout: 0,
        retry_cnt: RETRY_FOREVER,
        rnr_retry: RETRY_FOREVER,
        max_rd_atomic: READS_SERVED,
        read_chunk_packets: 0, // a READ of ours is one request
    };
    qp.to_rtr(rtr)
        .expect("the queue pair is in Init until its peer is known");
    qp.to_rts(rts).expect("Rtr leads to Rts");
    device.set_peer_domain(id, ends.domain);
    true
}
