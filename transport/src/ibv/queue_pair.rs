//! Queue pairs: states and posting.
//!
//! A reliable connection of a device that says that it can do ATOMIC WRITE or FLUSH is made by the
//! extended call, which says beforehand what will be posted; those two go through functions of the
//! queue pair (`built`), all else through `post_send` of the context, one after the other in the order
//! of the list.

mod built;

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr::{NonNull, null_mut};

use self::built::{Built, is_built};
use super::{
    CompletionQueue, Context, ProtectionDomain, SharedReceiveQueue, check, convert, ffi, last_errno,
};
use crate::raw::BadWr;
use crate::raw::types::{
    Error, Gid, QpAttr, QpAttrMask, QpInitAttr, QpType, Qpn, RecvWr, SendWr, Sge,
};

/// Work requests handed to the device at once.
const CHAIN: usize = 16;
/// Elements of one request's list at most, as of soft-RoCE; no known device has more.
const SGE_MAX: usize = 32;

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

/// A queue pair. Dropping it forgets what is posted; completions stay to be polled.
#[derive(Debug)]
pub struct QueuePair {
    pd: ProtectionDomain,
    qp: NonNull<ffi::Qp>,
    init: QpInitAttr,
    /// How the operations are posted that need it.
    built: Built,
    /// Keeps them alive.
    _queues: [CompletionQueue; 2],
    _shared: Option<SharedReceiveQueue>,
}

// SAFETY: the library and the device's own functions lock for themselves.
unsafe impl Send for QueuePair {}
// SAFETY: as above.
unsafe impl Sync for QueuePair {}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: created, and destroyed once.
        unsafe { (self.pd.context().library().destroy_qp)(self.qp.as_ptr()) };
    }
}

impl ProtectionDomain {
    /// A queue pair in RESET.
    ///
    /// # Errors
    /// [`Error::Argument`] for queues of another device, or the library's: EINVAL or ENOMEM for
    /// more than the device can do.
    pub fn queue_pair(&self, queues: Queues<'_>, init: &QpInitAttr) -> Result<QueuePair, Error> {
        let own = self.context().raw();
        if queues.send.context().raw() != own || queues.recv.context().raw() != own {
            return Err(Error::Argument("a completion queue of another device"));
        }
        let mut attr = self.attr_of(queues, init);
        let (qp, built) = match init.kind {
            QpType::Rc => built::create(self, &mut attr)?,
            _ => (self.create_plain(&mut attr)?, Built::NONE),
        };
        Ok(self.own(qp, built, &attr, queues, init))
    }

    /// The same without ATOMIC WRITE and FLUSH, by the call that every device has.
    pub(super) fn plain_queue_pair(
        &self,
        queues: Queues<'_>,
        init: &QpInitAttr,
    ) -> Result<QueuePair, Error> {
        let mut attr = self.attr_of(queues, init);
        let qp = self.create_plain(&mut attr)?;
        Ok(self.own(qp, Built::NONE, &attr, queues, init))
    }

    fn attr_of(&self, queues: Queues<'_>, init: &QpInitAttr) -> ffi::QpInitAttr {
        ffi::QpInitAttr {
            qp_context: null_mut::<c_void>(),
            send_cq: queues.send.raw(),
            recv_cq: queues.recv.raw(),
            srq: queues.shared.map_or(null_mut(), SharedReceiveQueue::raw),
            cap: convert::qp_cap(&init.cap),
            qp_type: init.kind as u32,
            sq_sig_all: init.sq_sig_all.into(),
        }
    }

    fn create_plain(&self, attr: &mut ffi::QpInitAttr) -> Result<NonNull<ffi::Qp>, Error> {
        let library = self.context().library();
        // SAFETY: live objects of one device; the structure is used during the call only.
        let qp = unsafe { (library.create_qp)(self.raw(), attr) };
        NonNull::new(qp).ok_or_else(|| Error::Os(last_errno()))
    }

    fn own(
        &self,
        qp: NonNull<ffi::Qp>,
        built: Built,
        attr: &ffi::QpInitAttr,
        queues: Queues<'_>,
        init: &QpInitAttr,
    ) -> QueuePair {
        QueuePair {
            pd: self.clone(),
            qp,
            init: QpInitAttr {
                cap: convert::cap(&attr.cap),
                ..*init
            },
            built,
            _queues: [queues.send.clone(), queues.recv.clone()],
            _shared: queues.shared.cloned(),
        }
    }
}

impl QueuePair {
    /// Its number.
    pub fn qpn(&self) -> Qpn {
        // SAFETY: alive until dropped; the number does not change.
        Qpn::new(unsafe { (*self.qp.as_ptr()).qp_num })
    }

    /// What it was made with; capacities as they are.
    pub fn init_attr(&self) -> &QpInitAttr {
        &self.init
    }

    fn context(&self) -> &Context {
        self.pd.context()
    }

    pub(super) fn raw(&self) -> *mut ffi::Qp {
        self.qp.as_ptr()
    }

    /// Changes what `mask` names, the state among it.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for alternate paths and for a right that the device does not have, or
    /// the library's: EINVAL for a transition that there is not or that lacks attributes.
    pub fn modify(&self, attr: &QpAttr, mask: QpAttrMask) -> Result<(), Error> {
        if mask.intersects(QpAttrMask::ALT_PATH | QpAttrMask::PATH_MIG_STATE) {
            return Err(Error::Unsupported("alternate paths"));
        }
        if mask.contains(QpAttrMask::ACCESS) {
            self.context().check_rights(attr.access)?;
        }
        let mut attr = convert::qp_attr(attr, mask);
        let modify = self.context().library().modify_qp;
        // SAFETY: a live queue pair; the structure is read during the call only.
        check(unsafe { modify(self.qp.as_ptr(), &raw mut attr, mask.bits() as c_int) })
    }

    /// How it is.
    ///
    /// # Errors
    /// The library's.
    pub fn query(&self) -> Result<QpAttr, Error> {
        let mut attr = MaybeUninit::<ffi::QpAttr>::zeroed();
        let mut init = MaybeUninit::<ffi::QpInitAttr>::zeroed();
        let query = self.context().library().query_qp;
        // Everything that the vocabulary has a word for.
        let all = (1 << 21) - 1;
        // SAFETY: a live queue pair; the library fills the structures.
        let result = unsafe { query(self.qp.as_ptr(), attr.as_mut_ptr(), all, init.as_mut_ptr()) };
        check(result)?;
        // SAFETY: all zero is a value of it, too.
        convert::queried(unsafe { attr.assume_init_ref() })
    }

    /// Posts sends, in order.
    ///
    /// # Errors
    /// The first that was not taken, and why; those before it were. [`Error::QueueFull`],
    /// [`Error::Unsupported`] for ATOMIC WRITE and FLUSH where the device or its library has none,
    /// [`Error::Argument`] for a window or a region that the device does not know, or the device's:
    /// EINVAL for a state that does not admit posting.
    ///
    /// # Safety
    /// Until a request has completed (or one after it), the memory that it names is the device's:
    /// it reads it, and for READ and atomics changes it, so no reference of Rust's may stand in the
    /// way of that. Memory of an `INLINE` request and of an ATOMIC WRITE must be readable now.
    /// Address handles must be alive and of this device. A window or region that a bind names must
    /// not be dropped, nor told a key, during the call.
    pub unsafe fn post_send(&self, list: &[SendWr<'_>]) -> Result<(), BadWr> {
        let mut first = 0;
        for run in list.chunk_by(|a, b| !is_built(a) && !is_built(b)) {
            let posted = match run {
                // SAFETY: the caller's promise.
                [wr] if is_built(wr) => unsafe { self.post_built(wr) },
                // SAFETY: the caller's promise.
                _ => unsafe { self.post_listed(run) },
            };
            posted.map_err(|bad| BadWr {
                index: first + bad.index,
                ..bad
            })?;
            first += run.len();
        }
        Ok(())
    }

    /// # Safety
    /// As of [`QueuePair::post_send`].
    unsafe fn post_listed(&self, list: &[SendWr<'_>]) -> Result<(), BadWr> {
        let post = self.context().ops().post_send;
        let keys = self.context().keys();
        post_chains(
            list,
            |wr| wr.sg_list,
            |wr, sges, count| convert::send_wr(keys, wr, sges, count),
            |wr, next| wr.next = next,
            |start, bad| {
                // SAFETY: a live queue pair, a chain that lives during the call; memory and
                // address handles: the caller.
                post.map(|post| unsafe { post(self.qp.as_ptr(), start, bad) })
            },
        )
    }

    /// Posts receives, in order.
    ///
    /// # Errors
    /// The first that was not taken, and why; those before it were.
    ///
    /// # Safety
    /// Until a receive has completed, the memory that it names is the device's, which changes it:
    /// no reference of Rust's may stand in the way of that.
    pub unsafe fn post_recv(&self, list: &[RecvWr<'_>]) -> Result<(), BadWr> {
        let post = self.context().ops().post_recv;
        post_receives(list, |wr, bad| {
            // SAFETY: a live queue pair, a chain that lives during the call; memory: the caller.
            post.map(|post| unsafe { post(self.qp.as_ptr(), wr, bad) })
        })
    }

    /// Joins a multicast group; datagrams to it arrive here as well. Whether the network brings them
    /// to the port is not this call's: on Ethernet the host must be a member of the group, too
    /// (`IP_ADD_MEMBERSHIP` on a socket of the program's, as rdma_cm does it).
    ///
    /// # Errors
    /// [`Error::Argument`] for what is no group, or a queue pair that is not UD, or the library's.
    pub fn attach_multicast(&self, group: Gid) -> Result<(), Error> {
        if self.init.kind != QpType::Ud || !group.is_multicast() {
            return Err(Error::Argument("a multicast group, of a UD queue pair"));
        }
        let (gid, attach) = (ffi::Gid(group.0), self.context().library().attach_mcast);
        // SAFETY: a live queue pair; the GID is read during the call only.
        check(unsafe { attach(self.qp.as_ptr(), &raw const gid, 0) })
    }

    /// Leaves it.
    ///
    /// # Errors
    /// The library's.
    pub fn detach_multicast(&self, group: Gid) -> Result<(), Error> {
        let (gid, detach) = (ffi::Gid(group.0), self.context().library().detach_mcast);
        // SAFETY: as above.
        check(unsafe { detach(self.qp.as_ptr(), &raw const gid, 0) })
    }
}

/// Posts receives through `post`, which is called with chains and returns none if the device has no
/// such function.
pub(super) fn post_receives(
    list: &[RecvWr<'_>],
    post: impl FnMut(*mut ffi::RecvWr, *mut *mut ffi::RecvWr) -> Option<c_int>,
) -> Result<(), BadWr> {
    let make = |wr: &RecvWr<'_>, sg_list, num_sge| {
        Ok(ffi::RecvWr {
            wr_id: wr.wr_id,
            next: null_mut(),
            sg_list,
            num_sge,
        })
    };
    post_chains(list, |wr| wr.sg_list, make, |wr, next| wr.next = next, post)
}

/// Posts `list` in chains of C's work requests, each made by `make` with its list of elements. One
/// that cannot be made ends its chain; those before it are posted.
fn post_chains<W, C>(
    list: &[W],
    elements_of: impl Fn(&W) -> &[Sge],
    make: impl Fn(&W, *mut ffi::Sge, c_int) -> Result<C, Error>,
    set_next: impl Fn(&mut C, *mut C),
    mut post: impl FnMut(*mut C, *mut *mut C) -> Option<c_int>,
) -> Result<(), BadWr> {
    for (chunk, requests) in list.chunks(CHAIN).enumerate() {
        let first = chunk * CHAIN;
        // Most lists are short, and so most of this is never touched.
        let mut elements = [const { MaybeUninit::<[ffi::Sge; SGE_MAX]>::uninit() }; CHAIN];
        let mut chain = [const { MaybeUninit::<C>::uninit() }; CHAIN];
        // One pointer for all, so that each may lead to the next.
        let start = chain.as_mut_ptr().cast::<C>();
        let (mut refused, mut len) = (None, 0);
        for (wr, sges) in requests.iter().zip(&mut elements) {
            let place = sges.as_mut_ptr().cast::<ffi::Sge>();
            let made = copy_list(elements_of(wr), sges).and_then(|count| make(wr, place, count));
            match made {
                // SAFETY: `len` is below CHAIN, the number of requests at most.
                Ok(wr) => unsafe { start.add(len).write(wr) },
                Err(error) => {
                    refused = Some(error);
                    break;
                }
            }
            if len > 0 {
                // SAFETY: the one before was written by the last round.
                let before = unsafe { &mut *start.add(len - 1) };
                // SAFETY: inside the chain.
                set_next(before, unsafe { start.add(len) });
            }
            len += 1;
        }
        if len > 0 {
            let mut bad = null_mut::<C>();
            let result = post(start, &raw mut bad).ok_or(BadWr {
                index: first,
                error: Error::Unsupported("posting"),
            })?;
            posted(result, first, index_of(start, bad, len))?;
        }
        if let Some(error) = refused {
            let index = first + len;
            return Err(BadWr { index, error });
        }
    }
    Ok(())
}

/// Copies a list of elements; returns their number.
fn copy_list(list: &[Sge], into: &mut MaybeUninit<[ffi::Sge; SGE_MAX]>) -> Result<c_int, Error> {
    if list.len() > SGE_MAX {
        return Err(Error::Limit("elements of a request's list"));
    }
    let start = into.as_mut_ptr().cast::<ffi::Sge>();
    for (i, from) in list.iter().enumerate() {
        let element = ffi::Sge {
            addr: from.addr,
            length: from.len,
            lkey: from.lkey.0,
        };
        // SAFETY: `i` is below SGE_MAX.
        unsafe { start.add(i).write(element) };
    }
    Ok(list.len() as c_int)
}

/// Which request of a chain of `len` the device refused.
fn index_of<T>(start: *mut T, bad: *mut T, len: usize) -> usize {
    let offset = bad.addr().wrapping_sub(start.addr()) / size_of::<T>();
    if bad.is_null() || offset >= len {
        0
    } else {
        offset
    }
}

/// What posting a chain returned, `bad` being the index in it of the request not taken.
fn posted(result: c_int, first: usize, bad: usize) -> Result<(), BadWr> {
    check(result).map_err(|error| BadWr {
        index: first + bad,
        error: match error {
            Error::Os(libc::ENOMEM) => Error::QueueFull,
            other => other,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raw::types::Lkey;

    #[test]
    fn a_chain_is_handed_over_in_order_and_the_refused_request_is_named() {
        let element = Sge {
            lkey: Lkey(7),
            addr: 0x1000,
            len: 5,
        };
        let requests: Vec<RecvWr<'_>> = (0..40)
            .map(|wr_id| RecvWr {
                wr_id,
                sg_list: std::slice::from_ref(&element),
            })
            .collect();
        for refused in [None, Some(0), Some(15), Some(16), Some(39)] {
            let mut seen = Vec::new();
            let result = post_receives(&requests, |mut wr, bad| {
                while !wr.is_null() {
                    // SAFETY: the chain of the caller.
                    let each = unsafe { *wr };
                    if Some(each.wr_id) == refused {
                        // SAFETY: the caller's.
                        unsafe { *bad = wr };
                        return Some(libc::ENOMEM);
                    }
                    // SAFETY: the caller's list.
                    let sge = unsafe { *each.sg_list };
                    assert_eq!(
                        (each.num_sge, sge.addr, sge.length, sge.lkey),
                        (1, 0x1000, 5, 7)
                    );
                    seen.push(each.wr_id);
                    wr = each.next;
                }
                Some(0)
            });
            let end = refused.unwrap_or(40);
            assert_eq!(seen, (0..end).collect::<Vec<_>>());
            let expected = refused.map(|n| BadWr {
                index: n as usize,
                error: Error::QueueFull,
            });
            assert_eq!(result.err(), expected);
        }
    }

    #[test]
    fn a_list_too_long_is_refused_after_what_is_before_it_was_posted() {
        let long = [Sge::default(); SGE_MAX + 1];
        let requests = [(0, 1), (1, 0), (2, SGE_MAX + 1), (3, 1)].map(|(wr_id, len)| RecvWr {
            wr_id,
            sg_list: &long[..len],
        });
        let mut count = 0;
        let result = post_receives(&requests, |mut wr, _| {
            while !wr.is_null() {
                count += 1;
                // SAFETY: the chain of the caller.
                wr = unsafe { (*wr).next };
            }
            Some(0)
        });
        assert_eq!((count, result.unwrap_err().index), (2, 2));
    }
}
