//! Queue pairs, shared receive queues, address handles.

use std::ffi::{c_int, c_void};
use std::sync::Arc;

use lowtide_transport::raw::types::{
    AccessFlags, AhAttr, Error, Gid, Mtu, Psn, QpAttr, QpAttrMask, QpCap, QpInitAttr, QpState,
    QpType, Qpn, RnrTimer, SrqAttr,
};
use lowtide_transport::raw::{AddressHandle, QueuePair, Queues, SharedReceiveQueue};

use crate::abi::*;
use crate::device::lowtide_pd;
use crate::error::{Fault, code, object, run};
use crate::handle::{
    Name, SharedNames, Unacknowledged, Uses, count, destroy, get, get_mut, lock, retire,
};

/// A queue pair.
pub struct lowtide_qp {
    /// Shared with its connection, if it has one.
    pub(crate) raw: Arc<QueuePair>,
    pub(crate) uses: Uses,
    pub(crate) unacknowledged: Unacknowledged,
    attr: lowtide_qp_init_attr,
    names: SharedNames,
    _on: [Uses; 3],
    _srq: Option<Uses>,
}

/// A shared receive queue.
pub struct lowtide_srq {
    pub(crate) raw: SharedReceiveQueue,
    pub(crate) unacknowledged: Unacknowledged,
    uses: Uses,
    names: SharedNames,
    _pd: Uses,
    context: *mut c_void,
}

/// A destination of datagrams.
pub struct lowtide_ah {
    pub(crate) raw: AddressHandle,
    uses: Uses,
    _pd: Uses,
}

fn cap_of(cap: &QpCap) -> lowtide_qp_cap {
    lowtide_qp_cap {
        max_send_wr: cap.max_send_wr,
        max_recv_wr: cap.max_recv_wr,
        max_send_sge: cap.max_send_sge,
        max_recv_sge: cap.max_recv_sge,
        max_inline_data: cap.max_inline_data,
    }
}

/// A queue pair in RESET. Writes the capacities that it got to init_attr.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_create_qp(
    pd: *mut lowtide_pd,
    init_attr: *mut lowtide_qp_init_attr,
) -> *mut lowtide_qp {
    object(|| {
        // SAFETY: the header's contract.
        let (pd, attr) = unsafe { (get(pd, "pd")?, get_mut(init_attr, "init_attr")?) };
        // SAFETY: as above.
        let send = unsafe { get(attr.send_cq, "send_cq") }?;
        // SAFETY: as above.
        let recv = unsafe { get(attr.recv_cq, "recv_cq") }?;
        let srq = match attr.srq.is_null() {
            true => None,
            // SAFETY: as above.
            false => Some(unsafe { get(attr.srq, "srq") }?),
        };
        let kind = match attr.qp_type {
            2 => QpType::Rc,
            3 => QpType::Uc,
            4 => QpType::Ud,
            _ => return Err(Error::Unsupported("queue pairs of this type").into()),
        };
        let cap = QpCap {
            max_send_wr: attr.cap.max_send_wr,
            max_recv_wr: attr.cap.max_recv_wr,
            max_send_sge: attr.cap.max_send_sge,
            max_recv_sge: attr.cap.max_recv_sge,
            max_inline_data: attr.cap.max_inline_data,
        };
        let init = QpInitAttr {
            kind,
            cap,
            sq_sig_all: attr.sq_sig_all != 0,
        };
        let queues = Queues {
            send: &send.raw,
            recv: &recv.raw,
            shared: srq.map(|srq| &srq.raw),
        };
        let raw = pd.raw.queue_pair(queues, &init)?;
        attr.cap = cap_of(&raw.init_attr().cap);
        let qpn = raw.qpn();
        let qp = Box::new(lowtide_qp {
            raw: Arc::new(raw),
            uses: Uses::default(),
            unacknowledged: Unacknowledged::default(),
            attr: *attr,
            names: pd.names.clone(),
            _on: [pd.uses.hold(), send.uses.hold(), recv.uses.hold()],
            _srq: srq.map(|srq| srq.uses.hold()),
        });
        lock(&pd.names).qps.insert(qpn, Name::of(&qp));
        Ok(qp)
    })
}

/// Ends a queue pair, after all its events are acknowledged. What is posted is forgotten. EBUSY: a
/// connection has it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_destroy_qp(qp: *mut lowtide_qp) -> c_int {
    code(|| {
        let before = |qp: &lowtide_qp| {
            let qpn = qp.raw.qpn();
            retire(
                &qp.names,
                |names| _ = names.qps.remove(&qpn),
                &qp.unacknowledged,
            );
        };
        // SAFETY: the header's contract.
        unsafe { destroy(qp, "qp", |qp| (&qp.uses, "a connection"), before) }
    })
}

/// A queue pair's number; 0 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_qp_num(qp: *const lowtide_qp) -> u32 {
    // SAFETY: the header's contract.
    run(|| Ok(unsafe { get(qp, "qp") }?.raw.qpn().value())).unwrap_or(0)
}

/// The program's own pointer that a queue pair was made with; NULL for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_qp_context(qp: *const lowtide_qp) -> *mut c_void {
    // SAFETY: the header's contract.
    run(|| Ok(unsafe { get(qp, "qp") }?.attr.qp_context)).unwrap_or(std::ptr::null_mut())
}

/// A first PSN that nobody can guess; 0 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_random_psn(qp: *const lowtide_qp) -> u32 {
    // SAFETY: the header's contract.
    run(|| Ok(unsafe { get(qp, "qp") }?.raw.random_psn().value())).unwrap_or(0)
}

/// Moves a queue pair, or changes what may be changed where it is. A call that fails changes
/// nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_modify_qp(
    qp: *mut lowtide_qp,
    attr: *const lowtide_qp_attr,
    attr_mask: c_int,
) -> c_int {
    code(|| {
        // SAFETY: the header's contract.
        let (qp, attr) = unsafe { (get(qp, "qp")?, get(attr, "attr")?) };
        let mut mask = QpAttrMask::from_bits(attr_mask.cast_unsigned());
        let attr = attr_from(attr, mask)?;
        if attr.1 {
            mask = mask.without(QpAttrMask::SQD_NOTIFY);
        }
        Ok(qp.raw.modify(&attr.0, mask)?)
    })
}

/// The attributes that `mask` means, and whether it means no notice of draining.
fn attr_from(attr: &lowtide_qp_attr, mask: QpAttrMask) -> Result<(QpAttr, bool), Fault> {
    let state =
        |code: u32, is_meant: bool| match u8::try_from(code).ok().and_then(QpState::from_code) {
            Some(state) => Ok(state),
            None if !is_meant => Ok(QpState::Reset),
            None => Err(Fault::Argument(
                "there is no queue pair state of this number",
            )),
        };
    let path_mtu = match u8::try_from(attr.path_mtu).ok().and_then(Mtu::from_code) {
        Some(mtu) => mtu,
        None if !mask.contains(QpAttrMask::PATH_MTU) => Mtu::B1024,
        None => return Err(Fault::Argument("there is no path MTU of this number")),
    };
    if mask.contains(QpAttrMask::MIN_RNR_TIMER) && attr.min_rnr_timer > 31 {
        return Err(Error::Limit("RNR timer").into());
    }
    let address = match mask.contains(QpAttrMask::ADDRESS) {
        true => ah_from(&attr.ah_attr)?,
        false => AhAttr::default(),
    };
    let changed = QpAttr {
        state: state(attr.qp_state, mask.contains(QpAttrMask::STATE))?,
        current_state: state(attr.cur_qp_state, mask.contains(QpAttrMask::CURRENT_STATE))?,
        path_mtu,
        qkey: attr.qkey,
        rq_psn: Psn::new(attr.rq_psn),
        sq_psn: Psn::new(attr.sq_psn),
        dest: Qpn::new(attr.dest_qp_num),
        access: AccessFlags::from_bits(attr.qp_access_flags),
        address,
        pkey_index: attr.pkey_index,
        max_rd_atomic: attr.max_rd_atomic,
        max_dest_rd_atomic: attr.max_dest_rd_atomic,
        min_rnr_timer: RnrTimer::new(attr.min_rnr_timer & 31),
        port: attr.port_num,
        timeout: attr.timeout,
        retry_cnt: attr.retry_cnt,
        rnr_retry: attr.rnr_retry,
        ..QpAttr::default()
    };
    Ok((changed, attr.en_sqd_async_notify == 0))
}

/// All attributes as they are now, whatever the mask says. init_attr may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_query_qp(
    qp: *mut lowtide_qp,
    attr: *mut lowtide_qp_attr,
    _attr_mask: c_int,
    init_attr: *mut lowtide_qp_init_attr,
) -> c_int {
    code(|| {
        // SAFETY: the header's contract.
        let (qp, out) = unsafe { (get(qp, "qp")?, get_mut(attr, "attr")?) };
        let known = qp.raw.query();
        *out = lowtide_qp_attr {
            qp_state: known.state as u32,
            cur_qp_state: known.current_state as u32,
            path_mtu: known.path_mtu as u32,
            qkey: known.qkey,
            rq_psn: known.rq_psn.value(),
            sq_psn: known.sq_psn.value(),
            dest_qp_num: known.dest.value(),
            qp_access_flags: known.access.bits(),
            cap: cap_of(&known.cap),
            ah_attr: ah_of(&known.address),
            pkey_index: known.pkey_index,
            en_sqd_async_notify: 0,
            sq_draining: known.sq_draining.into(),
            max_rd_atomic: known.max_rd_atomic,
            max_dest_rd_atomic: known.max_dest_rd_atomic,
            min_rnr_timer: known.min_rnr_timer.code(),
            port_num: known.port,
            timeout: known.timeout,
            retry_cnt: known.retry_cnt,
            rnr_retry: known.rnr_retry,
        };
        if !init_attr.is_null() {
            // SAFETY: as above.
            *unsafe { get_mut(init_attr, "init_attr") }? = qp.attr;
        }
        Ok(())
    })
}

/// Attaches a datagram queue pair to a multicast group; lid is InfiniBand's, and not looked at.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_attach_mcast(
    qp: *mut lowtide_qp,
    gid: *const lowtide_gid,
    _lid: u16,
) -> c_int {
    code(|| {
        // SAFETY: the header's contract.
        let (qp, gid) = unsafe { (get(qp, "qp")?, get(gid, "gid")?) };
        Ok(qp.raw.attach_multicast(Gid(gid.raw))?)
    })
}

/// Detaches it again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_detach_mcast(
    qp: *mut lowtide_qp,
    gid: *const lowtide_gid,
    _lid: u16,
) -> c_int {
    code(|| {
        // SAFETY: the header's contract.
        let (qp, gid) = unsafe { (get(qp, "qp")?, get(gid, "gid")?) };
        Ok(qp.raw.detach_multicast(Gid(gid.raw))?)
    })
}

/// A shared receive queue; its limit is not armed yet, whatever the attributes say.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_create_srq(
    pd: *mut lowtide_pd,
    init_attr: *const lowtide_srq_init_attr,
) -> *mut lowtide_srq {
    object(|| {
        // SAFETY: the header's contract.
        let (pd, init) = unsafe { (get(pd, "pd")?, get(init_attr, "init_attr")?) };
        let raw = pd.raw.shared_receive_queue(SrqAttr {
            max_wr: init.attr.max_wr,
            max_sge: init.attr.max_sge,
            limit: 0,
        })?;
        let id = raw.id();
        let srq = Box::new(lowtide_srq {
            raw,
            unacknowledged: Unacknowledged::default(),
            uses: Uses::default(),
            names: pd.names.clone(),
            _pd: pd.uses.hold(),
            context: init.srq_context,
        });
        lock(&pd.names).srqs.insert(id, Name::of(&srq));
        Ok(srq)
    })
}

/// Ends a shared receive queue, after all its events are acknowledged.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_destroy_srq(srq: *mut lowtide_srq) -> c_int {
    code(|| {
        let before = |srq: &lowtide_srq| {
            let id = srq.raw.id();
            retire(
                &srq.names,
                |names| _ = names.srqs.remove(&id),
                &srq.unacknowledged,
            );
        };
        // SAFETY: the header's contract.
        unsafe { destroy(srq, "srq", |srq| (&srq.uses, "queue pairs"), before) }
    })
}

/// The program's own pointer that a shared receive queue was made with; NULL for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_srq_context(srq: *const lowtide_srq) -> *mut c_void {
    // SAFETY: the header's contract.
    run(|| Ok(unsafe { get(srq, "srq") }?.context)).unwrap_or(std::ptr::null_mut())
}

/// Arms the limit (LOWTIDE_SRQ_LIMIT).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_modify_srq(
    srq: *mut lowtide_srq,
    attr: *const lowtide_srq_attr,
    mask: c_int,
) -> c_int {
    code(|| {
        // SAFETY: the header's contract.
        let (srq, attr) = unsafe { (get(srq, "srq")?, get(attr, "attr")?) };
        if count(mask, "a negative mask")? & !(lowtide_srq_attr_mask::LOWTIDE_SRQ_LIMIT as u32) != 0
        {
            return Err(Error::Unsupported("other sizes for a shared receive queue").into());
        }
        if mask != 0 {
            srq.raw.set_limit(attr.srq_limit)?;
        }
        Ok(())
    })
}

/// A shared receive queue's limits as they are.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_query_srq(
    srq: *mut lowtide_srq,
    attr: *mut lowtide_srq_attr,
) -> c_int {
    code(|| {
        // SAFETY: the header's contract.
        let (srq, attr) = unsafe { (get(srq, "srq")?, get_mut(attr, "attr")?) };
        let known = srq.raw.query();
        *attr = lowtide_srq_attr {
            max_wr: known.max_wr,
            max_sge: known.max_sge,
            srq_limit: known.limit,
        };
        Ok(())
    })
}

fn ah_from(attr: &lowtide_ah_attr) -> Result<AhAttr, Fault> {
    if attr.is_global == 0 {
        return Err(Fault::Argument(
            "RoCE knows global paths only: set is_global and the GID",
        ));
    }
    Ok(AhAttr {
        dgid: Gid(attr.grh.dgid.raw),
        sgid_index: attr.grh.sgid_index,
        flow_label: attr.grh.flow_label,
        hop_limit: attr.grh.hop_limit,
        traffic_class: attr.grh.traffic_class,
        dlid: 0,
        sl: attr.sl,
        port: attr.port_num,
    })
}

fn ah_of(attr: &AhAttr) -> lowtide_ah_attr {
    lowtide_ah_attr {
        grh: lowtide_global_route {
            dgid: lowtide_gid { raw: attr.dgid.0 },
            flow_label: attr.flow_label,
            sgid_index: attr.sgid_index,
            hop_limit: attr.hop_limit,
            traffic_class: attr.traffic_class,
        },
        sl: attr.sl,
        is_global: (attr.dgid != Gid::default()).into(),
        port_num: attr.port,
    }
}

fn new_ah(pd: &lowtide_pd, attr: &AhAttr) -> Result<Box<lowtide_ah>, Fault> {
    Ok(Box::new(lowtide_ah {
        raw: pd.raw.address_handle(attr)?,
        uses: Uses::default(),
        _pd: pd.uses.hold(),
    }))
}

/// A destination of datagrams; a multicast GID too.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_create_ah(
    pd: *mut lowtide_pd,
    attr: *const lowtide_ah_attr,
) -> *mut lowtide_ah {
    object(|| {
        // SAFETY: the header's contract.
        let (pd, attr) = unsafe { (get(pd, "pd")?, get(attr, "attr")?) };
        new_ah(pd, &ah_from(attr)?)
    })
}

/// The way back to the sender of a datagram: grh is the first 40 bytes of its receive.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_create_ah_from_grh(
    pd: *mut lowtide_pd,
    grh: *const c_void,
) -> *mut lowtide_ah {
    object(|| {
        // SAFETY: the header's contract: 40 bytes, of any alignment.
        let (pd, grh) = unsafe { (get(pd, "pd")?, get(grh.cast::<[u8; 40]>(), "grh")?) };
        let attr = AhAttr::from_grh(grh);
        new_ah(
            pd,
            &attr.ok_or(Fault::Argument("these 40 bytes are no IP header"))?,
        )
    })
}

/// Ends an address handle; requests that name it and have not been sent fail.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_destroy_ah(ah: *mut lowtide_ah) -> c_int {
    // SAFETY: the header's contract.
    code(|| unsafe { destroy(ah, "ah", |ah| (&ah.uses, "nobody"), |_| ()) })
}
