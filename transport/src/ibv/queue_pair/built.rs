//! ATOMIC WRITE and FLUSH, which C's structure of a work request has no words for.

use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::ptr::NonNull;

use super::{QueuePair, posted};
use crate::ibv::{Capabilities, ProtectionDomain, ffi, last_errno};
use crate::raw::BadWr;
use crate::raw::types::{Error, Flush, QpType, Remote, SendFlags, SendOp, SendWr};

/// Whether the operation is posted by a function of the queue pair.
pub(super) fn is_built(wr: &SendWr<'_>) -> bool {
    matches!(wr.op, SendOp::AtomicWrite(_) | SendOp::Flush(_))
}

/// What a queue pair was granted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Built {
    /// Present if any.
    qp: Option<NonNull<ffi::QpEx>>,
    atomic_write: bool,
    flush: bool,
}

impl Built {
    pub(super) const NONE: Built = Built {
        qp: None,
        atomic_write: false,
        flush: false,
    };
}

/// Flags for the extended call, most first: all that the device can do, then what an older library may
/// know of it.
fn wishes(can: Capabilities) -> impl Iterator<Item = u64> {
    let all = [
        (can.atomic_write, ffi::WITH_ATOMIC_WRITE),
        (can.flush, ffi::WITH_FLUSH),
    ];
    let can = all.into_iter().filter(|(is_there, _)| *is_there);
    let can = can.fold(0, |flags, (_, flag)| flags | flag);
    let both = ffi::WITH_ATOMIC_WRITE | ffi::WITH_FLUSH;
    [both, ffi::WITH_ATOMIC_WRITE, ffi::WITH_FLUSH]
        .into_iter()
        .filter(move |wish| can & wish == *wish)
}

/// A reliable connection that can do as much as device and library can. `attr` tells its capacities.
pub(super) fn create(
    pd: &ProtectionDomain,
    attr: &mut ffi::QpInitAttr,
) -> Result<(NonNull<ffi::Qp>, Built), Error> {
    let context = pd.context();
    let library = context.library();
    // SAFETY: an open context.
    let create_ex = unsafe { ffi::create_qp_ex_of(context.raw()) };
    let convert = library.qp_to_qp_ex.zip(create_ex);
    for wish in wishes(context.capabilities()) {
        let Some((to_ex, create_ex)) = convert else {
            break;
        };
        let mut extended = extended(pd, attr, wish);
        // SAFETY: live objects of one device; the structure is used during the call only.
        let qp = unsafe { create_ex(context.raw(), &raw mut extended) };
        let Some(qp) = NonNull::new(qp) else {
            match last_errno() {
                libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL => continue,
                errno => return Err(Error::Os(errno)),
            }
        };
        attr.cap = extended.cap;
        // SAFETY: a queue pair made with these flags.
        let ex = NonNull::new(unsafe { to_ex(qp.as_ptr()) });
        let built = Built {
            qp: ex,
            atomic_write: ex.is_some() && wish & ffi::WITH_ATOMIC_WRITE != 0,
            flush: ex.is_some() && wish & ffi::WITH_FLUSH != 0,
        };
        return Ok((qp, built));
    }
    // Whatever was wrong with the arguments is told here again.
    Ok((pd.create_plain(attr)?, Built::NONE))
}

fn extended(pd: &ProtectionDomain, attr: &ffi::QpInitAttr, wish: u64) -> ffi::QpInitAttrEx {
    // SAFETY: all zero is a value of it: none of what is not set.
    let zero = unsafe { MaybeUninit::<ffi::QpInitAttrEx>::zeroed().assume_init() };
    ffi::QpInitAttrEx {
        qp_context: attr.qp_context,
        send_cq: attr.send_cq,
        recv_cq: attr.recv_cq,
        srq: attr.srq,
        cap: attr.cap,
        qp_type: attr.qp_type,
        sq_sig_all: attr.sq_sig_all,
        comp_mask: ffi::INIT_ATTR_PD | ffi::INIT_ATTR_SEND_OPS,
        pd: pd.raw(),
        send_ops_flags: wish,
        ..zero
    }
}

impl QueuePair {
    /// Posts one of these.
    ///
    /// # Safety
    /// As of [`QueuePair::post_send`].
    pub(super) unsafe fn post_built(&self, wr: &SendWr<'_>) -> Result<(), BadWr> {
        // SAFETY: the caller's promise.
        let result = unsafe {
            match wr.op {
                SendOp::AtomicWrite(remote) => self.post_atomic_write(wr, remote),
                SendOp::Flush(flush) => self.post_flush(wr, flush),
                _ => Err(Error::Argument("not an operation that is built")),
            }
        };
        let result = result.map_err(|error| BadWr { index: 0, error })?;
        posted(result, 0, 0)
    }

    /// # Safety
    /// As of [`QueuePair::post_send`].
    unsafe fn post_atomic_write(&self, wr: &SendWr<'_>, remote: Remote) -> Result<c_int, Error> {
        let can = self.context().capabilities().atomic_write;
        let ex = self.built_with(
            self.built.atomic_write,
            can,
            [
                "ATOMIC WRITE: the device has no such capability",
                "ATOMIC WRITE: the device has it, and its library does not know it",
            ],
        )?;
        // SAFETY: the caller's promise.
        let word = unsafe { self.gather_word(wr) }?;
        // SAFETY: alive, and made with the flag, so the function has its place.
        let write = unsafe { (*ex.as_ptr()).wr_atomic_write };
        let write = write.ok_or(Error::Unsupported("ATOMIC WRITE"))?;
        let add = |qp: *mut ffi::QpEx| {
            // SAFETY: between start and end; the word is copied during the call.
            unsafe { write(qp, remote.rkey.0, remote.va, word.as_ptr().cast()) }
        };
        self.build(ex, wr, add)
    }

    /// # Safety
    /// As of [`QueuePair::post_send`].
    unsafe fn post_flush(&self, wr: &SendWr<'_>, flush: Flush) -> Result<c_int, Error> {
        let can = self.context().capabilities().flush;
        let ex = self.built_with(
            self.built.flush,
            can,
            [
                "FLUSH: the device has no such capability",
                "FLUSH: the device has it, and its library does not know it",
            ],
        )?;
        if !wr.sg_list.is_empty() {
            return Err(Error::Argument("a FLUSH has no payload"));
        }
        // SAFETY: alive, and made with the flag, so the function has its place.
        let function = unsafe { (*ex.as_ptr()).wr_flush };
        let function = function.ok_or(Error::Unsupported("FLUSH"))?;
        let bit = |is_set, bit| if is_set { bit } else { 0 };
        let kind =
            bit(flush.global, ffi::FLUSH_GLOBAL) | bit(flush.persistent, ffi::FLUSH_PERSISTENT);
        let level = match flush.whole_region {
            true => ffi::FLUSH_REGION,
            false => ffi::FLUSH_RANGE,
        };
        let Remote { va, rkey } = flush.remote;
        let add = |qp: *mut ffi::QpEx| {
            // SAFETY: between start and end.
            unsafe { function(qp, rkey.0, va, flush.len as usize, kind, level) }
        };
        self.build(ex, wr, add)
    }

    /// The queue pair as these functions want it, or why it has none.
    fn built_with(
        &self,
        is_granted: bool,
        can: bool,
        [no_device, no_library]: [&'static str; 2],
    ) -> Result<NonNull<ffi::QpEx>, Error> {
        if self.init.kind != QpType::Rc {
            return Err(Error::Argument(
                "only reliable connections have the operation",
            ));
        }
        match (self.built.qp, can) {
            (Some(ex), _) if is_granted => Ok(ex),
            (_, true) => Err(Error::Unsupported(no_library)),
            (_, false) => Err(Error::Unsupported(no_device)),
        }
    }

    /// The eight bytes of an ATOMIC WRITE, which C takes when it is posted.
    ///
    /// # Safety
    /// The memory that the request names is readable.
    unsafe fn gather_word(&self, wr: &SendWr<'_>) -> Result<[u8; 8], Error> {
        let total: u64 = wr.sg_list.iter().map(|sge| u64::from(sge.len)).sum();
        if total != 8 {
            return Err(Error::Argument("an ATOMIC WRITE has eight bytes"));
        }
        let (mut word, mut at) = ([0; 8], 0);
        for sge in wr.sg_list {
            let from = match wr.flags.contains(SendFlags::INLINE) {
                true => std::ptr::with_exposed_provenance(sge.addr as usize),
                false => self.context().keys().find(sge)?,
            };
            let len = sge.len as usize;
            // SAFETY: readable, as the caller says; all lengths together are the word's.
            unsafe { std::ptr::copy_nonoverlapping(from, word.as_mut_ptr().add(at), len) };
            at += len;
        }
        Ok(word)
    }

    /// Posts what `add` adds, under the queue pair's lock.
    fn build(
        &self,
        ex: NonNull<ffi::QpEx>,
        wr: &SendWr<'_>,
        add: impl FnOnce(*mut ffi::QpEx),
    ) -> Result<c_int, Error> {
        let qp = ex.as_ptr();
        // SAFETY: alive; these two are in every version.
        let (start, complete) = unsafe { ((*qp).wr_start, (*qp).wr_complete) };
        let (start, complete) = start.zip(complete).ok_or(Error::Unsupported("posting"))?;
        // SAFETY: alive; after `start` the fields are this thread's until `complete`.
        unsafe {
            start(qp);
            (*qp).wr_id = wr.wr_id;
            (*qp).wr_flags = wr.flags.without(SendFlags::INLINE).bits();
            add(qp);
            Ok(complete(qp))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_much_is_asked_for_as_the_device_can_do_and_then_less() {
        let wishes = |atomic_write, flush| {
            let can = Capabilities {
                atomic_write,
                flush,
                ..Capabilities::default()
            };
            wishes(can).collect::<Vec<_>>()
        };
        let (write, flush) = (ffi::WITH_ATOMIC_WRITE, ffi::WITH_FLUSH);
        assert_eq!(wishes(true, true), [write | flush, write, flush]);
        assert_eq!(wishes(true, false), [write]);
        assert_eq!(wishes(false, true), [flush]);
        assert_eq!(wishes(false, false), []);
    }
}
