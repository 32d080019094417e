//! The vocabulary of ibverbs as plain data: attributes, work requests, completions, events, errors.
//!
//! Owns: names, numbers and the table of attributes per state transition. Numbers in flag sets and
//! enumerations are those of `<infiniband/verbs.h>`, so that a C ABI only copies them. Nothing here
//! knows how a device works; every provider speaks these words.
//!
//! Two words differ from C in form only: an operation is an `enum` with its arguments
//! ([`SendOp`]), and immediate data is a number here, big endian on the wire (in C it is 32 bits in
//! network order).
//!
//! Source: rdma-core's `verbs.h`, `ibv_modify_qp(3)`, Linux `ib_modify_qp_is_ok`.

mod error;
mod flags;

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

pub use lowtide_transport_proto::qp::{
    Bind, CompletionKind, Flush, InvalidTransition, Lkey, QpState, Remote, Rkey, SendOp, Sge,
    Status,
};
pub use lowtide_transport_proto::wire::{Mtu, Psn, Qpn, RnrTimer};

pub use self::error::{Error, NO_CAPTURE};
pub use self::flags::{AccessFlags, QpAttrMask, SendFlags, WcFlags};

/// A global identifier: an IPv6 address, or an IPv4 one as `::ffff:a.b.c.d`.
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Gid(pub [u8; 16]);

impl Gid {
    /// The GID of an IP address.
    pub const fn from_ip(ip: IpAddr) -> Gid {
        Gid(match ip {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        })
    }

    /// The IP address of a RoCE v2 GID.
    pub const fn ip(self) -> IpAddr {
        let v6 = Ipv6Addr::from_octets(self.0);
        match v6.to_ipv4_mapped() {
            Some(v4) => IpAddr::V4(v4),
            None => IpAddr::V6(v6),
        }
    }

    /// Whether it names a multicast group.
    pub const fn is_multicast(self) -> bool {
        match self.ip() {
            IpAddr::V4(v4) => v4.is_multicast(),
            IpAddr::V6(v6) => v6.is_multicast(),
        }
    }
}

impl fmt::Debug for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gid {}", Ipv6Addr::from_octets(self.0))
    }
}

/// What a GID stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GidType {
    /// InfiniBand, or RoCE v1.
    InfinibandOrRoceV1,
    /// An IP address.
    RoceV2,
}

/// An entry of a port's GID table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GidEntry {
    /// Its place in the table.
    pub index: u32,
    /// The GID.
    pub gid: Gid,
    /// What it stands for.
    pub kind: GidType,
}

/// How far atomics are atomic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum AtomicCap {
    /// There are none.
    None = 0,
    /// Among the queue pairs of this device.
    Device = 1,
    /// Among everything that reaches the memory.
    Global = 2,
}

/// What a device can do at most; named as in C without `max_`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceAttr {
    /// Node and system image GUID.
    pub guid: u64,
    /// Bytes of one region.
    pub mr_size: u64,
    /// Queue pairs.
    pub qp: u32,
    /// Work requests of one queue.
    pub qp_wr: u32,
    /// Elements of one request's list.
    pub sge: u32,
    /// Bytes of inline data.
    pub inline_data: u32,
    /// Completion queues.
    pub cq: u32,
    /// Entries of one completion queue.
    pub cqe: u32,
    /// Regions.
    pub mr: u32,
    /// Windows.
    pub mw: u32,
    /// Protection domains.
    pub pd: u32,
    /// Address handles.
    pub ah: u32,
    /// Shared receive queues.
    pub srq: u32,
    /// Receives in one of them.
    pub srq_wr: u32,
    /// READs and atomics that one queue pair serves at once.
    pub qp_rd_atom: u32,
    /// READs and atomics that one queue pair has under way at once.
    pub qp_init_rd_atom: u32,
    /// Multicast groups.
    pub mcast_grp: u32,
    /// Atomics.
    pub atomic_cap: AtomicCap,
    /// Ports.
    pub phys_port_cnt: u8,
}

/// State of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PortState {
    /// Unknown.
    Nop = 0,
    /// No link.
    Down = 1,
    /// A link that carries nothing yet.
    Init = 2,
    /// Configured.
    Armed = 3,
    /// Working.
    Active = 4,
}

/// A port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortAttr {
    /// Its state.
    pub state: PortState,
    /// The largest MTU it could have.
    pub max_mtu: Mtu,
    /// Its MTU.
    pub active_mtu: Mtu,
    /// Entries of its GID table.
    pub gid_tbl_len: u32,
    /// Bytes of the longest message.
    pub max_msg_sz: u32,
    /// Entries of its P_Key table.
    pub pkey_tbl_len: u16,
    /// Local identifier; InfiniBand only.
    pub lid: u16,
    /// Whether it is Ethernet (RoCE), not InfiniBand.
    pub is_ethernet: bool,
}

/// Type of a queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum QpType {
    /// Reliable connection.
    Rc = 2,
    /// Unreliable connection.
    Uc = 3,
    /// Unreliable datagram.
    Ud = 4,
}

/// How much a queue pair can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct QpCap {
    /// Send work requests.
    pub max_send_wr: u32,
    /// Receive work requests; not looked at with a shared receive queue.
    pub max_recv_wr: u32,
    /// Elements of a send request's list.
    pub max_send_sge: u32,
    /// Elements of a receive request's list.
    pub max_recv_sge: u32,
    /// Bytes of inline data.
    pub max_inline_data: u32,
}

/// What a queue pair is made with, besides its queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QpInitAttr {
    /// Its type.
    pub kind: QpType,
    /// How much it can hold.
    pub cap: QpCap,
    /// Every send reports success, whatever its flags say.
    pub sq_sig_all: bool,
}

/// Where a connection or a datagram goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct AhAttr {
    /// The peer's GID.
    pub dgid: Gid,
    /// Which GID of ours.
    pub sgid_index: u8,
    /// IPv6 flow label, 20 bits.
    pub flow_label: u32,
    /// TTL or hop limit.
    pub hop_limit: u8,
    /// IP traffic class.
    pub traffic_class: u8,
    /// Local identifier; InfiniBand only.
    pub dlid: u16,
    /// Service level.
    pub sl: u8,
    /// Our port, from 1.
    pub port: u8,
}

/// All that can be set of and asked from a queue pair. Which fields a transition needs is said by
/// [`QpAttrMask::of_transition`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QpAttr {
    /// Where to go, or where it is.
    pub state: QpState,
    /// Where it is believed to be.
    pub current_state: QpState,
    /// Payload of full packets.
    pub path_mtu: Mtu,
    /// Datagrams: what senders must know.
    pub qkey: u32,
    /// First PSN of the peer.
    pub rq_psn: Psn,
    /// First PSN of ours.
    pub sq_psn: Psn,
    /// The peer's number.
    pub dest: Qpn,
    /// What the peer may do.
    pub access: AccessFlags,
    /// How much it holds (query only).
    pub cap: QpCap,
    /// The peer.
    pub address: AhAttr,
    /// Index of the partition key.
    pub pkey_index: u16,
    /// The send queue is being drained (query only).
    pub sq_draining: bool,
    /// READs and atomics of ours under way at once.
    pub max_rd_atomic: u8,
    /// READs and atomics of the peer's at once.
    pub max_dest_rd_atomic: u8,
    /// How long a peer waits that found no receive.
    pub min_rnr_timer: RnrTimer,
    /// Our port, from 1.
    pub port: u8,
    /// Local ACK timeout: 4.096 us times 2 to this power; 0 is none.
    pub timeout: u8,
    /// Retries after timeouts; 7 is without end on soft-RoCE.
    pub retry_cnt: u8,
    /// Retries after RNR NAKs; 7 is without end.
    pub rnr_retry: u8,
}

impl Default for QpAttr {
    fn default() -> QpAttr {
        QpAttr {
            state: QpState::Reset,
            current_state: QpState::Reset,
            path_mtu: Mtu::B1024,
            qkey: 0,
            rq_psn: Psn::new(0),
            sq_psn: Psn::new(0),
            dest: Qpn::new(0),
            access: AccessFlags::NONE,
            cap: QpCap::default(),
            address: AhAttr::default(),
            pkey_index: 0,
            sq_draining: false,
            max_rd_atomic: 0,
            max_dest_rd_atomic: 0,
            min_rnr_timer: RnrTimer::new(0),
            port: 1,
            timeout: 0,
            retry_cnt: 0,
            rnr_retry: 0,
        }
    }
}

/// A send work request.
#[derive(Clone, Copy, Debug)]
pub struct SendWr<'a> {
    /// The caller's name for it.
    pub wr_id: u64,
    /// What to do.
    pub op: SendOp,
    /// Where the payload lies, or goes (READ, atomics).
    pub sg_list: &'a [Sge],
    /// How to treat it.
    pub flags: SendFlags,
    /// Where a datagram goes; connected queue pairs know.
    pub to: Option<Destination>,
}

/// Where a datagram goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// The address handle, by the number that its provider gives it.
    pub ah: AhId,
    /// The queue pair there.
    pub qpn: Qpn,
    /// The Q_Key that it expects.
    pub qkey: u32,
}

/// An address handle's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AhId(pub u64);

/// A receive work request.
#[derive(Clone, Copy, Debug)]
pub struct RecvWr<'a> {
    /// The caller's name for it.
    pub wr_id: u64,
    /// Where the message goes. For datagrams the first 40 bytes receive the IP header.
    pub sg_list: &'a [Sge],
}

/// A work completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkCompletion {
    /// The name given when posting.
    pub wr_id: u64,
    /// How it ended. If not [`Status::Success`], only `wr_id`, `qpn` and `vendor_err` mean
    /// something.
    pub status: Status,
    /// What it was.
    pub kind: CompletionKind,
    /// The provider's own error number.
    pub vendor_err: u32,
    /// Bytes received (datagrams: with the 40 bytes of header), read, or returned by an atomic.
    pub byte_len: u32,
    /// Immediate data.
    pub imm: Option<u32>,
    /// The key of ours that the message invalidated.
    pub invalidated: Option<Rkey>,
    /// The local queue pair.
    pub qpn: Qpn,
    /// Datagrams: the sender's queue pair.
    pub source: Qpn,
    /// What it carries.
    pub flags: WcFlags,
}

/// A shared receive queue's limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct SrqAttr {
    /// Receives it holds.
    pub max_wr: u32,
    /// Elements of one's list.
    pub max_sge: u32,
    /// An event comes, once, when fewer receives are left; 0 is never.
    pub limit: u32,
}

/// Type of a memory window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum MwType {
    /// Bound by a call, to any queue pair of its protection domain.
    One = 1,
    /// Bound by a work request, to one queue pair (2B); peers may invalidate it.
    Two = 2,
}

/// A completion queue's number, unique while it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CqId(pub u32);

/// A shared receive queue's number, unique while it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SrqId(pub u32);

/// What happens without a work request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AsyncEvent {
    /// A completion queue had no room; its queue pairs are in the error state.
    CqError(CqId),
    /// A queue pair is in the error state for no reason a completion tells.
    QpFatal(Qpn),
    /// The peer's request broke a rule; the queue pair is in the error state.
    QpRequestError(Qpn),
    /// The peer touched memory that it may not; the queue pair is in the error state.
    QpAccessError(Qpn),
    /// The first packet came before the queue pair was told to send.
    CommunicationEstablished(Qpn),
    /// The send queue has drained.
    SendQueueDrained(Qpn),
    /// A queue pair in the error state takes no more from its shared receive queue.
    LastWqeReached(Qpn),
    /// A shared receive queue has failed.
    SrqError(SrqId),
    /// Fewer receives are left than the limit.
    SrqLimitReached(SrqId),
    /// A port works.
    PortActive(u8),
    /// A port works no more.
    PortError(u8),
    /// The device works no more.
    DeviceFatal,
}

impl QpAttrMask {
    /// The attributes that a transition must bring, and those that it may bring besides `STATE` and
    /// `CURRENT_STATE`; none if there is no such transition.
    ///
    /// | transition | RC | UC | UD |
    /// |---|---|---|---|
    /// | Reset→Init | pkey, port, access | pkey, port, access | pkey, port, qkey |
    /// | Init→Init | (pkey, port, access) | (pkey, port, access) | (pkey, port, qkey) |
    /// | Init→Rtr | address, mtu, dest, rq_psn, dest_rd_atomic, rnr_timer (access, pkey) | address, mtu, dest, rq_psn (access, pkey) | (pkey, qkey) |
    /// | Rtr→Rts | sq_psn, timeout, retry, rnr_retry, rd_atomic (access, rnr_timer) | sq_psn (access) | sq_psn (qkey) |
    /// | Rts→Rts, Sqe→Rts | (access, rnr_timer) | (access) | (qkey) |
    /// | Rts→Sqd | (notify) | (notify) | (notify) |
    /// | Sqd→Rts | (access, rnr_timer) | (access) | (qkey) |
    /// | Sqd→Sqd | (address, timeout, retry, rnr_retry, rd_atomic, dest_rd_atomic, access, pkey, port, rnr_timer) | (address, access, pkey, port) | (pkey, qkey) |
    pub const fn of_transition(
        kind: QpType,
        from: QpState,
        to: QpState,
    ) -> Option<(QpAttrMask, QpAttrMask)> {
        use QpState::{Init, Reset, Rtr, Rts, Sqd, Sqe};
        use QpType::{Rc, Uc, Ud};
        const NONE: QpAttrMask = QpAttrMask::NONE;
        if !from.legal(to) {
            return None;
        }
        let place = Self::PKEY_INDEX.with(Self::PORT);
        let path = Self::ADDRESS
            .with(Self::PATH_MTU)
            .with(Self::DEST_QPN)
            .with(Self::RQ_PSN);
        let answers = Self::MAX_DEST_RD_ATOMIC.with(Self::MIN_RNR_TIMER);
        let retries = Self::TIMEOUT
            .with(Self::RETRY_CNT)
            .with(Self::RNR_RETRY)
            .with(Self::MAX_RD_ATOMIC);
        let rights = match kind {
            Rc => Self::ACCESS.with(Self::MIN_RNR_TIMER),
            Uc => Self::ACCESS,
            Ud => Self::QKEY,
        };
        Some(match (from, to, kind) {
            (Reset, Init, Rc | Uc) => (place.with(Self::ACCESS), NONE),
            (Reset, Init, Ud) => (place.with(Self::QKEY), NONE),
            (Init, Init, Rc | Uc) => (NONE, place.with(Self::ACCESS)),
            (Init, Init, Ud) => (NONE, place.with(Self::QKEY)),
            (Init, Rtr, Rc) => (path.with(answers), Self::ACCESS.with(Self::PKEY_INDEX)),
            (Init, Rtr, Uc) => (path, Self::ACCESS.with(Self::PKEY_INDEX)),
            (Init, Rtr, Ud) => (NONE, Self::PKEY_INDEX.with(Self::QKEY)),
            (Rtr, Rts, Rc) => (retries.with(Self::SQ_PSN), rights),
            (Rtr, Rts, Uc | Ud) => (Self::SQ_PSN, rights),
            (Rts | Sqe | Sqd, Rts, _) => (NONE, rights),
            (Rts, Sqd, _) => (NONE, Self::SQD_NOTIFY),
            (Sqd, Sqd, Rc) => {
                let may = rights.with(retries).with(place).with(Self::ADDRESS);
                (NONE, may.with(Self::MAX_DEST_RD_ATOMIC))
            }
            (Sqd, Sqd, Uc) => (NONE, rights.with(place).with(Self::ADDRESS)),
            (Sqd, Sqd, Ud) => (NONE, rights.with(Self::PKEY_INDEX)),
            _ => (NONE, NONE),
        })
    }

    /// Checks the attributes that a caller brings for a transition.
    ///
    /// # Errors
    /// [`Error::Transition`], [`Error::MissingAttributes`] or [`Error::ExcessAttributes`].
    pub fn check(self, kind: QpType, from: QpState, to: QpState) -> Result<(), Error> {
        let (must, may) = Self::of_transition(kind, from, to)
            .ok_or(Error::Transition(InvalidTransition { from, to }))?;
        let missing = must.without(self);
        if !missing.is_empty() {
            return Err(Error::MissingAttributes(missing));
        }
        let always = Self::STATE.with(Self::CURRENT_STATE);
        let excess = self.without(must.with(may).with(always));
        if !excess.is_empty() {
            return Err(Error::ExcessAttributes(excess));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_transition_wants_exactly_its_attributes() {
        use QpState::{Err as Error_, Init, Reset, Rtr, Rts, Sqd, Sqe};
        let states = [Reset, Init, Rtr, Rts, Sqd, Sqe, Error_];
        for kind in [QpType::Rc, QpType::Uc, QpType::Ud] {
            for (from, to) in states.iter().flat_map(|f| states.map(|t| (*f, t))) {
                let Some((must, may)) = QpAttrMask::of_transition(kind, from, to) else {
                    assert!(!from.legal(to));
                    let refused = QpAttrMask::STATE.check(kind, from, to);
                    assert!(matches!(refused, Err(Error::Transition(_))));
                    continue;
                };
                assert!(!must.intersects(may), "{kind:?} {from:?} {to:?}");
                assert_eq!(must.with(QpAttrMask::STATE).check(kind, from, to), Ok(()));
                for bit in (0..21).map(|bit| QpAttrMask::from_bits(1 << bit)) {
                    if must.contains(bit) {
                        let without = must.without(bit).check(kind, from, to);
                        assert_eq!(without, Err(Error::MissingAttributes(bit)));
                    } else if !may.with(QpAttrMask::from_bits(3)).contains(bit) {
                        let with = must.with(bit).check(kind, from, to);
                        assert_eq!(with, Err(Error::ExcessAttributes(bit)));
                    }
                }
            }
        }
    }

    #[test]
    fn gids_are_addresses() {
        for text in ["10.1.2.3", "2001:db8::7", "224.0.1.2", "ff0e::1"] {
            let ip: IpAddr = text.parse().unwrap();
            let gid = Gid::from_ip(ip);
            assert_eq!(gid.ip(), ip);
            assert_eq!(gid.is_multicast(), ip.is_multicast());
        }
        let v4 = Gid::from_ip("1.2.3.4".parse().unwrap());
        assert_eq!(v4.0[10..], [0xFF, 0xFF, 1, 2, 3, 4]);
    }

    #[test]
    fn flags_print_as_words() {
        let flags = AccessFlags::LOCAL_WRITE | AccessFlags::from_bits(1 << 30);
        assert_eq!(format!("{flags:?}"), "{LOCAL_WRITE, 0x40000000}");
    }
}
