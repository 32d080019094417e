//! The vocabulary in C's structures, and back.

use std::ffi::{c_int, c_uint, c_void};
use std::ptr::{NonNull, with_exposed_provenance_mut, without_provenance_mut};
use std::sync::atomic::{AtomicU32, Ordering};

use super::window::Keys;
use super::{Driver, ffi};
use crate::raw::types::{
    AccessFlags, AhAttr, AsyncEvent, AtomicCap, CompletionKind, CqId, DeviceAttr, Error, Gid,
    GidEntry, GidType, Mtu, PortAttr, PortState, Psn, QpAttr, QpAttrMask, QpCap, QpState, Qpn,
    Remote, Rkey, RnrTimer, SendOp, SendWr, SrqAttr, SrqId, Status, WcFlags, WorkCompletion,
};

/// A number for a completion queue or a shared receive queue, as events name them: the library
/// gives back a pointer of ours, which is the number.
pub(super) fn fresh_number() -> u32 {
    static LAST: AtomicU32 = AtomicU32::new(0);
    // Only uniqueness matters.
    LAST.fetch_add(1, Ordering::Relaxed).wrapping_add(1)
}

pub(super) fn number_as_context(number: u32) -> *mut c_void {
    without_provenance_mut(number as usize)
}

pub(super) fn context_as_number(context: *mut c_void) -> u32 {
    context.addr() as u32
}

fn unsigned(value: c_int) -> u32 {
    value.max(0).cast_unsigned()
}

pub(super) fn device_attr(attr: &ffi::DeviceAttr) -> DeviceAttr {
    DeviceAttr {
        guid: u64::from_be(attr.node_guid),
        mr_size: attr.max_mr_size,
        qp: unsigned(attr.max_qp),
        qp_wr: unsigned(attr.max_qp_wr),
        sge: unsigned(attr.max_sge),
        // C has no field for it: making a queue pair tells.
        inline_data: 0,
        cq: unsigned(attr.max_cq),
        cqe: unsigned(attr.max_cqe),
        mr: unsigned(attr.max_mr),
        mw: unsigned(attr.max_mw),
        pd: unsigned(attr.max_pd),
        ah: unsigned(attr.max_ah),
        srq: unsigned(attr.max_srq),
        srq_wr: unsigned(attr.max_srq_wr),
        qp_rd_atom: unsigned(attr.max_qp_rd_atom),
        qp_init_rd_atom: unsigned(attr.max_qp_init_rd_atom),
        mcast_grp: unsigned(attr.max_mcast_grp),
        atomic_cap: match attr.atomic_cap {
            1 => AtomicCap::Device,
            2 => AtomicCap::Global,
            _ => AtomicCap::None,
        },
        phys_port_cnt: attr.phys_port_cnt,
    }
}

fn mtu(code: c_uint) -> Result<Mtu, Error> {
    let code = u8::try_from(code).ok().and_then(Mtu::from_code);
    code.ok_or(Error::Argument("the device tells an MTU that there is not"))
}

pub(super) fn port_attr(attr: &ffi::PortAttr) -> Result<PortAttr, Error> {
    Ok(PortAttr {
        state: match attr.state {
            1 => PortState::Down,
            2 => PortState::Init,
            3 => PortState::Armed,
            4 => PortState::Active,
            _ => PortState::Nop,
        },
        max_mtu: mtu(attr.max_mtu)?,
        active_mtu: mtu(attr.active_mtu)?,
        gid_tbl_len: unsigned(attr.gid_tbl_len),
        max_msg_sz: attr.max_msg_sz,
        pkey_tbl_len: attr.pkey_tbl_len,
        lid: attr.lid,
        is_ethernet: attr.link_layer == ffi::LINK_LAYER_ETHERNET,
    })
}

pub(super) fn gid_entry(entry: &ffi::GidEntry) -> GidEntry {
    GidEntry {
        index: entry.gid_index,
        gid: Gid(entry.gid.0),
        kind: match entry.gid_type {
            2 => GidType::RoceV2,
            _ => GidType::InfinibandOrRoceV1,
        },
    }
}

pub(super) fn ah_attr(attr: &AhAttr) -> ffi::AhAttr {
    ffi::AhAttr {
        grh: ffi::GlobalRoute {
            dgid: ffi::Gid(attr.dgid.0),
            flow_label: attr.flow_label,
            sgid_index: attr.sgid_index,
            hop_limit: attr.hop_limit,
            traffic_class: attr.traffic_class,
        },
        dlid: attr.dlid,
        sl: attr.sl,
        src_path_bits: 0,
        static_rate: 0,
        // Only a path inside one InfiniBand subnet has none.
        is_global: (attr.dgid != Gid::default()).into(),
        port_num: attr.port,
    }
}

fn address(attr: &ffi::AhAttr) -> AhAttr {
    let route = &attr.grh;
    AhAttr {
        dgid: Gid(route.dgid.0),
        sgid_index: route.sgid_index,
        flow_label: route.flow_label,
        hop_limit: route.hop_limit,
        traffic_class: route.traffic_class,
        dlid: attr.dlid,
        sl: attr.sl,
        port: attr.port_num,
    }
}

pub(super) fn qp_cap(cap: &QpCap) -> ffi::QpCap {
    ffi::QpCap {
        max_send_wr: cap.max_send_wr,
        max_recv_wr: cap.max_recv_wr,
        max_send_sge: cap.max_send_sge,
        max_recv_sge: cap.max_recv_sge,
        max_inline_data: cap.max_inline_data,
    }
}

pub(super) fn cap(cap: &ffi::QpCap) -> QpCap {
    QpCap {
        max_send_wr: cap.max_send_wr,
        max_recv_wr: cap.max_recv_wr,
        max_send_sge: cap.max_send_sge,
        max_recv_sge: cap.max_recv_sge,
        max_inline_data: cap.max_inline_data,
    }
}

pub(super) fn srq_attr(attr: &SrqAttr) -> ffi::SrqAttr {
    ffi::SrqAttr {
        max_wr: attr.max_wr,
        max_sge: attr.max_sge,
        srq_limit: attr.limit,
    }
}

pub(super) fn qp_attr(attr: &QpAttr, mask: QpAttrMask) -> ffi::QpAttr {
    let path = ah_attr(&attr.address);
    ffi::QpAttr {
        qp_state: attr.state as c_uint,
        cur_qp_state: attr.current_state as c_uint,
        path_mtu: attr.path_mtu as c_uint,
        path_mig_state: 0,
        qkey: attr.qkey,
        rq_psn: attr.rq_psn.value(),
        sq_psn: attr.sq_psn.value(),
        dest_qp_num: attr.dest.value(),
        qp_access_flags: attr.access.bits(),
        cap: qp_cap(&attr.cap),
        ah_attr: path,
        alt_ah_attr: path,
        pkey_index: attr.pkey_index,
        alt_pkey_index: 0,
        en_sqd_async_notify: mask.contains(QpAttrMask::SQD_NOTIFY).into(),
        sq_draining: 0,
        max_rd_atomic: attr.max_rd_atomic,
        max_dest_rd_atomic: attr.max_dest_rd_atomic,
        min_rnr_timer: attr.min_rnr_timer.code(),
        port_num: attr.port,
        timeout: attr.timeout,
        retry_cnt: attr.retry_cnt,
        rnr_retry: attr.rnr_retry,
        alt_port_num: 0,
        alt_timeout: 0,
        rate_limit: 0,
    }
}

pub(super) fn queried(attr: &ffi::QpAttr) -> Result<QpAttr, Error> {
    let state = |code: c_uint| {
        let state = u8::try_from(code).ok().and_then(QpState::from_code);
        state.ok_or(Error::Argument(
            "the device tells a state that there is not",
        ))
    };
    Ok(QpAttr {
        state: state(attr.qp_state)?,
        current_state: state(attr.cur_qp_state)?,
        // Before RTR a device may tell none.
        path_mtu: mtu(attr.path_mtu).unwrap_or(Mtu::B1024),
        qkey: attr.qkey,
        rq_psn: Psn::new(attr.rq_psn),
        sq_psn: Psn::new(attr.sq_psn),
        dest: Qpn::new(attr.dest_qp_num),
        access: AccessFlags::from_bits(attr.qp_access_flags),
        cap: cap(&attr.cap),
        address: address(&attr.ah_attr),
        pkey_index: attr.pkey_index,
        sq_draining: attr.sq_draining != 0,
        max_rd_atomic: attr.max_rd_atomic,
        max_dest_rd_atomic: attr.max_dest_rd_atomic,
        min_rnr_timer: RnrTimer::new(attr.min_rnr_timer),
        port: attr.port_num,
        timeout: attr.timeout,
        retry_cnt: attr.retry_cnt,
        rnr_retry: attr.rnr_retry,
    })
}

/// A send request whose list of `num_sge` elements lies at `sges`; the objects of its keys are `keys`'.
pub(super) fn send_wr(
    keys: &Keys,
    wr: &SendWr<'_>,
    sges: *mut ffi::Sge,
    num_sge: c_int,
) -> Result<ffi::SendWr, Error> {
    let mut out = ffi::SendWr {
        wr_id: wr.wr_id,
        sg_list: sges,
        num_sge,
        send_flags: wr.flags.bits(),
        ..ffi::SendWr::ZERO
    };
    let rdma = |remote: Remote| ffi::Wr {
        rdma: ffi::Rdma {
            remote_addr: remote.va,
            rkey: remote.rkey.0,
        },
    };
    let atomic = |remote: Remote, compare_add, swap| ffi::Wr {
        atomic: ffi::Atomic {
            remote_addr: remote.va,
            compare_add,
            swap,
            rkey: remote.rkey.0,
        },
    };
    match wr.op {
        SendOp::Send => out.opcode = ffi::WR_SEND,
        SendOp::SendImm(imm) => {
            (out.opcode, out.imm_or_rkey) = (ffi::WR_SEND_WITH_IMM, imm.to_be())
        }
        SendOp::SendInvalidate(rkey) => {
            (out.opcode, out.imm_or_rkey) = (ffi::WR_SEND_WITH_INV, rkey.0);
        }
        SendOp::Write(remote) => (out.opcode, out.wr) = (ffi::WR_RDMA_WRITE, rdma(remote)),
        SendOp::WriteImm(remote, imm) => {
            (out.opcode, out.wr) = (ffi::WR_RDMA_WRITE_WITH_IMM, rdma(remote));
            out.imm_or_rkey = imm.to_be();
        }
        SendOp::Read(remote) => (out.opcode, out.wr) = (ffi::WR_RDMA_READ, rdma(remote)),
        SendOp::CompareSwap {
            remote,
            compare,
            swap,
        } => (out.opcode, out.wr) = (ffi::WR_ATOMIC_CMP_AND_SWP, atomic(remote, compare, swap)),
        SendOp::FetchAdd { remote, add } => {
            (out.opcode, out.wr) = (ffi::WR_ATOMIC_FETCH_AND_ADD, atomic(remote, add, 0));
        }
        SendOp::LocalInvalidate(rkey) => {
            (out.opcode, out.imm_or_rkey) = (ffi::WR_LOCAL_INV, rkey.0);
        }
        SendOp::BindWindow(bind) => {
            (out.opcode, out.bind) = (ffi::WR_BIND_MW, keys.bind(&bind)?);
        }
        SendOp::AtomicWrite(_) | SendOp::Flush(_) => {
            unreachable!("posted by functions of their own (`built`)")
        }
    }
    if let Some(to) = wr.to {
        if !matches!(wr.op, SendOp::Send | SendOp::SendImm(_)) {
            return Err(Error::Argument("datagrams can only be sent"));
        }
        out.wr = ffi::Wr {
            ud: ffi::Ud {
                ah: with_exposed_provenance_mut(to.ah.0 as usize),
                remote_qpn: to.qpn.value(),
                remote_qkey: to.qkey,
            },
        };
    }
    Ok(out)
}

/// The kernel's number for [`WcFlags::WITH_INV`], which rxe hands to programs as it is; in C it would
/// say that an IP checksum was good, which rxe does not look at.
const WITH_INV_OF_RXE: WcFlags = WcFlags::from_bits(1 << 2);

pub(super) fn completion(wc: &ffi::Wc, driver: Driver) -> WorkCompletion {
    let mut flags = WcFlags::from_bits(wc.wc_flags);
    if driver == Driver::Rxe && flags.contains(WITH_INV_OF_RXE) {
        flags = flags.without(WITH_INV_OF_RXE) | WcFlags::WITH_INV;
    }
    let code = u8::try_from(wc.status).ok();
    WorkCompletion {
        wr_id: wc.wr_id,
        // Statuses of reliable datagrams and of tag matching, which are not served, are "else".
        status: code.and_then(Status::from_code).unwrap_or(Status::General),
        kind: kind(wc.opcode),
        vendor_err: wc.vendor_err,
        byte_len: wc.byte_len,
        imm: flags
            .contains(WcFlags::WITH_IMM)
            .then(|| u32::from_be(wc.imm_or_rkey)),
        invalidated: flags
            .contains(WcFlags::WITH_INV)
            .then_some(Rkey(wc.imm_or_rkey)),
        qpn: Qpn::new(wc.qp_num),
        source: Qpn::new(wc.src_qp),
        flags,
    }
}

/// Means something only for a success, and then it is one of these.
fn kind(opcode: c_uint) -> CompletionKind {
    match opcode {
        1 => CompletionKind::Write,
        2 => CompletionKind::Read,
        3 => CompletionKind::CompareSwap,
        4 => CompletionKind::FetchAdd,
        5 => CompletionKind::BindWindow,
        6 => CompletionKind::LocalInvalidate,
        8 => CompletionKind::Flush,
        9 => CompletionKind::AtomicWrite,
        128 => CompletionKind::Recv,
        129 => CompletionKind::RecvWriteImm,
        _ => CompletionKind::Send,
    }
}

/// None for an event that the vocabulary has no word for.
///
/// # Safety
/// The event is from the library and not acknowledged, so what it is about lives.
pub(super) unsafe fn async_event(event: &ffi::AsyncEvent) -> Option<AsyncEvent> {
    let element = event.element;
    let cq = || {
        // SAFETY: an event of a completion queue; see above.
        let cq = unsafe { NonNull::new(element.cq)?.as_ref() };
        Some(CqId(context_as_number(cq.cq_context)))
    };
    let qp = || {
        // SAFETY: an event of a queue pair; see above.
        let qp = unsafe { NonNull::new(element.qp)?.as_ref() };
        Some(Qpn::new(qp.qp_num))
    };
    let srq = || {
        // SAFETY: an event of a shared receive queue; see above.
        let srq = unsafe { NonNull::new(element.srq)?.as_ref() };
        Some(SrqId(context_as_number(srq.srq_context)))
    };
    // SAFETY: an integer whatever was written.
    let port = || u8::try_from(unsafe { element.port_num }).ok();
    Some(match event.event_type {
        0 => AsyncEvent::CqError(cq()?),
        1 => AsyncEvent::QpFatal(qp()?),
        2 => AsyncEvent::QpRequestError(qp()?),
        3 => AsyncEvent::QpAccessError(qp()?),
        4 => AsyncEvent::CommunicationEstablished(qp()?),
        5 => AsyncEvent::SendQueueDrained(qp()?),
        8 => AsyncEvent::DeviceFatal,
        9 => AsyncEvent::PortActive(port()?),
        10 => AsyncEvent::PortError(port()?),
        14 => AsyncEvent::SrqError(srq()?),
        15 => AsyncEvent::SrqLimitReached(srq()?),
        16 => AsyncEvent::LastWqeReached(qp()?),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use std::ptr::null_mut;

    use lowtide_transport_proto::qp::Access;

    use super::*;
    use crate::raw::types::{AhId, Bind, Destination, Lkey, SendFlags};

    #[test]
    fn requests_and_completions_mean_in_c_what_they_mean_here() {
        let remote = Remote {
            va: 0x1122_3344_5566_7788,
            rkey: Rkey(0xAABB),
        };
        let request = |op, to| SendWr {
            wr_id: 9,
            op,
            sg_list: &[],
            flags: SendFlags::SIGNALED | SendFlags::FENCE,
            to,
        };
        let keys = Keys::default();
        let put = |op| send_wr(&keys, &request(op, None), null_mut(), 0).unwrap();
        let imm = put(SendOp::WriteImm(remote, 0x0102_0304));
        assert_eq!((imm.wr_id, imm.opcode, imm.send_flags), (9, 1, 3));
        assert_eq!(imm.imm_or_rkey.to_ne_bytes(), [1, 2, 3, 4]);
        // SAFETY: written as this variant.
        let rdma = unsafe { imm.wr.rdma };
        assert_eq!((rdma.remote_addr, rdma.rkey), (remote.va, 0xAABB));
        let swap = put(SendOp::CompareSwap {
            remote,
            compare: 5,
            swap: 6,
        });
        // SAFETY: written as this variant.
        let atomic = unsafe { swap.wr.atomic };
        assert_eq!((swap.opcode, atomic.compare_add, atomic.swap), (5, 5, 6));
        assert_eq!(put(SendOp::SendInvalidate(Rkey(77))).imm_or_rkey, 77);

        let to = Destination {
            ah: AhId(0x1000),
            qpn: Qpn::new(17),
            qkey: 0x1111,
        };
        let datagram = send_wr(&keys, &request(SendOp::Send, Some(to)), null_mut(), 0).unwrap();
        // SAFETY: written as this variant.
        let ud = unsafe { datagram.wr.ud };
        assert_eq!(
            (ud.ah.addr(), ud.remote_qpn, ud.remote_qkey),
            (0x1000, 17, 0x1111)
        );
        let wrong = send_wr(
            &keys,
            &request(SendOp::Read(remote), Some(to)),
            null_mut(),
            0,
        );
        assert!(matches!(wrong, Err(Error::Argument(_))));
        let bind = SendOp::BindWindow(Bind {
            window: Rkey(7),
            rkey: Rkey(8),
            region: Lkey(9),
            addr: 0,
            len: 8,
            access: Access::NONE,
            zero_based: false,
        });
        let absent = send_wr(&keys, &request(bind, None), null_mut(), 0);
        assert!(matches!(absent, Err(Error::Argument(_))));

        let wc = ffi::Wc {
            wr_id: 3,
            status: 0,
            opcode: 129,
            vendor_err: 0,
            byte_len: 12,
            imm_or_rkey: 0x0102_0304u32.to_be(),
            qp_num: 5,
            src_qp: 6,
            wc_flags: 2,
            pkey_index: 0,
            slid: 0,
            sl: 0,
            dlid_path_bits: 0,
        };
        let told = completion(&wc, Driver::Rxe);
        assert_eq!(
            (told.kind, told.imm),
            (CompletionKind::RecvWriteImm, Some(0x0102_0304))
        );
        for (status, expected) in [
            (12, Status::RetryExceeded),
            (18, Status::General),
            (300, Status::General),
        ] {
            let told = completion(&ffi::Wc { status, ..wc }, Driver::Hardware);
            assert_eq!(told.status, expected);
        }
        // The same bit, of rxe and of an adapter.
        let wc = ffi::Wc { wc_flags: 4, ..wc };
        let told = completion(&wc, Driver::Rxe);
        let key = Rkey(wc.imm_or_rkey);
        assert_eq!(
            (told.flags, told.invalidated),
            (WcFlags::WITH_INV, Some(key))
        );
        assert_eq!(completion(&wc, Driver::Hardware).invalidated, None);
    }

    #[test]
    fn a_device_that_has_gone_is_told() {
        let told = |event_type, port_num| {
            let element = ffi::EventElement { port_num };
            let event = ffi::AsyncEvent {
                element,
                event_type,
            };
            // SAFETY: of these types nothing but the port's number is looked at.
            unsafe { async_event(&event) }
        };
        assert_eq!(told(8, 0), Some(AsyncEvent::DeviceFatal));
        assert_eq!(told(10, 2), Some(AsyncEvent::PortError(2)));
        assert_eq!(told(9, 2), Some(AsyncEvent::PortActive(2)));
        assert_eq!(told(10, 256), None, "there is no such port");
        assert_eq!(told(99, 0), None, "a word of later libraries");
    }

    #[test]
    fn attributes_survive_the_way_through_c() {
        let attr = QpAttr {
            state: QpState::Sqe,
            current_state: QpState::Err,
            path_mtu: Mtu::B4096,
            qkey: 1,
            rq_psn: Psn::new(2),
            sq_psn: Psn::new(3),
            dest: Qpn::new(4),
            access: AccessFlags::REMOTE_READ,
            cap: QpCap {
                max_send_wr: 5,
                max_recv_wr: 6,
                max_send_sge: 7,
                max_recv_sge: 8,
                max_inline_data: 9,
            },
            address: AhAttr {
                dgid: Gid([10; 16]),
                sgid_index: 11,
                flow_label: 12,
                hop_limit: 13,
                traffic_class: 14,
                dlid: 15,
                sl: 16,
                port: 17,
            },
            pkey_index: 18,
            sq_draining: false,
            max_rd_atomic: 19,
            max_dest_rd_atomic: 20,
            min_rnr_timer: RnrTimer::new(21),
            port: 22,
            timeout: 23,
            retry_cnt: 24,
            rnr_retry: 25,
        };
        let through = queried(&qp_attr(&attr, QpAttrMask::SQD_NOTIFY)).unwrap();
        assert_eq!(through, attr);
        assert_eq!(
            qp_attr(&attr, QpAttrMask::SQD_NOTIFY).en_sqd_async_notify,
            1
        );
        for code in 0..=u8::MAX {
            let state = QpState::from_code(code);
            assert!(state.map_or(code > 6, |state| state as u8 == code));
        }
    }
}
