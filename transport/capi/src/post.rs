//! Posting: C's linked lists of work requests.

use std::ffi::c_int;

use lowtide_transport::raw::BadWr;
use lowtide_transport::raw::types::{
    Destination, Error, Flush, Lkey, QpType, Qpn, RecvWr, Remote, Rkey, SendFlags, SendOp, SendWr,
    Sge,
};

use crate::abi::*;
use crate::error::{Fault, code};
use crate::handle::{get, get_mut};
use crate::memory::place;
use crate::queue_pair::{lowtide_qp, lowtide_srq};

const SGES: usize = LOWTIDE_SGE_MAX as usize;

/// Copies a request's list to where the device wants it.
///
/// # Safety
/// `list` is NULL or of at least `len` elements.
unsafe fn elements(
    list: *const lowtide_sge,
    len: c_int,
    room: &mut [Sge; SGES],
) -> Result<&[Sge], Error> {
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    if len > SGES {
        return Err(Error::Limit("elements of a request's list"));
    }
    if len > 0 && (list.is_null() || !list.is_aligned()) {
        return Err(Error::Argument("sg_list is NULL or misaligned"));
    }
    for (index, to) in room[..len].iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        let sge = unsafe { list.add(index).read() };
        *to = Sge {
            lkey: Lkey(sge.lkey),
            addr: sge.addr,
            len: sge.length,
        };
    }
    Ok(&room[..len])
}

/// Posts sends, in order, and sends them together. If one is not taken, bad_wr says which, and
/// those before it were. bad_wr may be NULL. Data of LOWTIDE_SEND_INLINE is copied before the call
/// returns; all other memory belongs to the device until the request has completed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_post_send(
    qp: *mut lowtide_qp,
    wr: *mut lowtide_send_wr,
    bad_wr: *mut *mut lowtide_send_wr,
) -> c_int {
    code(|| {
        // SAFETY: the header's contract.
        let qp = unsafe { get(qp, "qp") }?;
        let (mut next, mut result) = (wr, Ok(()));
        // SAFETY: the header's contract; C has no references that could stand in the way.
        unsafe {
            qp.raw.post_sends(|post| {
                while !next.is_null() && result.is_ok() {
                    result = post_one(next, qp, post);
                    if result.is_ok() {
                        next = (*next).next;
                    }
                }
            });
        }
        // SAFETY: the header's contract.
        result.inspect_err(|_| unsafe { point_at(bad_wr, next) })
    })
}

/// # Safety
/// What the request points to is alive.
unsafe fn post_one(
    wr: *const lowtide_send_wr,
    qp: &lowtide_qp,
    post: &mut dyn FnMut(&SendWr<'_>) -> Result<(), Error>,
) -> Result<(), Fault> {
    // SAFETY: the caller's promise.
    let wr = unsafe { get(wr, "wr") }?;
    let mut room = [Sge::default(); SGES];
    let is_datagram = qp.raw.init_attr().kind == QpType::Ud;
    // SAFETY: the caller's promise.
    let request = unsafe {
        SendWr {
            wr_id: wr.wr_id,
            op: operation(wr)?,
            sg_list: elements(wr.sg_list, wr.num_sge, &mut room)?,
            flags: SendFlags::from_bits(wr.send_flags),
            to: match is_datagram {
                true => Some(destination(wr)?),
                false => None,
            },
        }
    };
    post(&request)?;
    if let SendOp::BindWindow(bind) = request.op {
        // SAFETY: it was looked at to make the operation.
        unsafe { get(wr.bind_mw.mw, "bind_mw.mw") }?.set_rkey(bind.rkey);
    }
    Ok(())
}

/// # Safety
/// Every variant of the union is plain numbers, but for a datagram's handle, which is alive.
unsafe fn destination(wr: &lowtide_send_wr) -> Result<Destination, Fault> {
    // SAFETY: the caller's promise.
    let ud = unsafe { wr.wr.ud };
    // SAFETY: the caller's promise.
    let ah = unsafe { get(ud.ah, "wr.ud.ah") }?;
    Ok(Destination {
        ah: ah.raw.id(),
        qpn: Qpn::new(ud.remote_qpn),
        qkey: ud.remote_qkey,
    })
}

/// # Safety
/// Memory windows and regions named are alive.
unsafe fn operation(wr: &lowtide_send_wr) -> Result<SendOp, Fault> {
    // SAFETY: C fills the variant that its opcode means; all are plain numbers.
    let rdma = || unsafe { remote(wr.wr.rdma.remote_addr, wr.wr.rdma.rkey) };
    // SAFETY: as above.
    let atomic = || unsafe { wr.wr.atomic };
    let imm = u32::from_be(wr.imm_data);
    let key = Rkey(wr.invalidate_rkey);
    Ok(match wr.opcode {
        0 => SendOp::Write(rdma()),
        1 => SendOp::WriteImm(rdma(), imm),
        2 => SendOp::Send,
        3 => SendOp::SendImm(imm),
        4 => SendOp::Read(rdma()),
        5 => SendOp::CompareSwap {
            remote: remote(atomic().remote_addr, atomic().rkey),
            compare: atomic().compare_add,
            swap: atomic().swap,
        },
        6 => SendOp::FetchAdd {
            remote: remote(atomic().remote_addr, atomic().rkey),
            add: atomic().compare_add,
        },
        7 => SendOp::LocalInvalidate(key),
        8 => {
            // SAFETY: the caller's promise.
            let mw = unsafe { get(wr.bind_mw.mw, "bind_mw.mw") }?;
            // SAFETY: the caller's promise.
            let bind = unsafe { place(&wr.bind_mw.bind_info, mw.rkey(), Rkey(wr.bind_mw.rkey)) };
            SendOp::BindWindow(bind?)
        }
        9 => SendOp::SendInvalidate(key),
        14 => SendOp::Flush(Flush {
            remote: rdma(),
            len: wr.flush.length,
            global: wr.flush.persistent == 0,
            persistent: wr.flush.persistent != 0,
            whole_region: wr.flush.whole_region != 0,
        }),
        15 => SendOp::AtomicWrite(rdma()),
        _ => return Err(Fault::Argument("there is no send operation of this number")),
    })
}

fn remote(va: u64, rkey: u32) -> Remote {
    Remote {
        va,
        rkey: Rkey(rkey),
    }
}

/// Posts receives, in order. If one is not taken, bad_wr says which, and those before it were.
/// bad_wr may be NULL. The memory belongs to the device until the receive has completed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_post_recv(
    qp: *mut lowtide_qp,
    wr: *mut lowtide_recv_wr,
    bad_wr: *mut *mut lowtide_recv_wr,
) -> c_int {
    code(|| {
        // SAFETY: the header's contract.
        let qp = unsafe { get(qp, "qp") }?;
        // SAFETY: as above; C has no references that could stand in the way.
        unsafe { post_receives(wr, bad_wr, |wr| qp.raw.post_recv(&[wr])) }
    })
}

/// The same to a shared receive queue.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_post_srq_recv(
    srq: *mut lowtide_srq,
    wr: *mut lowtide_recv_wr,
    bad_wr: *mut *mut lowtide_recv_wr,
) -> c_int {
    code(|| {
        // SAFETY: the header's contract.
        let srq = unsafe { get(srq, "srq") }?;
        // SAFETY: as above; C has no references that could stand in the way.
        unsafe { post_receives(wr, bad_wr, |wr| srq.raw.post_recv(&[wr])) }
    })
}

/// # Safety
/// A list as the header asks for.
unsafe fn post_receives(
    mut next: *mut lowtide_recv_wr,
    bad_wr: *mut *mut lowtide_recv_wr,
    post: impl Fn(RecvWr<'_>) -> Result<(), BadWr>,
) -> Result<(), Fault> {
    while !next.is_null() {
        // SAFETY: the caller's promise.
        let posted = unsafe { get(next, "wr") }.and_then(|wr| {
            let mut room = [Sge::default(); SGES];
            // SAFETY: the caller's promise.
            let sg_list = unsafe { elements(wr.sg_list, wr.num_sge, &mut room) }?;
            let posted = post(RecvWr {
                wr_id: wr.wr_id,
                sg_list,
            });
            posted.map_err(|BadWr { error, .. }| error)?;
            Ok(wr.next)
        });
        match posted {
            Ok(after) => next = after,
            Err(fault) => {
                // SAFETY: the caller's promise.
                unsafe { point_at(bad_wr, next) };
                return Err(fault);
            }
        }
    }
    Ok(())
}

/// # Safety
/// `bad_wr` is NULL or may be written.
unsafe fn point_at<T>(bad_wr: *mut *mut T, wr: *mut T) {
    // SAFETY: the caller's promise. NULL: C does not want to know.
    if let Ok(place) = unsafe { get_mut(bad_wr, "bad_wr") } {
        *place = wr;
    }
}
