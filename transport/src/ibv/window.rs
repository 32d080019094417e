//! Memory windows, and the keys by which requests name C's objects.
//!
//! A work request of the vocabulary names a region or a window by its key; C wants the object. So a
//! device's context knows the objects of its keys ([`Keys`]). Windows are found by the 24 bits of
//! their keys that are the device's: the other eight change with every bind.

use std::collections::HashMap;
use std::fmt;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::queue_pair::QueuePair;
use super::{ProtectionDomain, check, ffi, last_errno};
use crate::raw::types::{AccessFlags, Bind, Error, Lkey, MwType, Rkey, SendFlags, Sge};

/// The objects of a device's keys.
#[derive(Default)]
pub(super) struct Keys(Mutex<Tables>);

#[derive(Default)]
struct Tables {
    regions: HashMap<u32, Place>,
    windows: HashMap<u32, NonNull<ffi::Mw>>,
}

/// A region, and where its addresses lie in this process.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub mr: NonNull<ffi::Mr>,
    pub iova: u64,
    pub len: u64,
}

// SAFETY: pointers to objects that every thread may use; whoever follows one answers for its life.
unsafe impl Send for Tables {}

/// The part of a window's key that stays.
fn index(rkey: Rkey) -> u32 {
    rkey.0 >> 8
}

impl Keys {
    fn lock(&self) -> MutexGuard<'_, Tables> {
        // Nothing panics with it half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn insert_region(&self, lkey: Lkey, place: Place) {
        self.lock().regions.insert(lkey.0, place);
    }

    pub(super) fn remove_region(&self, lkey: Lkey) -> Option<Place> {
        self.lock().regions.remove(&lkey.0)
    }

    /// C's words for a bind.
    ///
    /// # Errors
    /// [`Error::Argument`] for a window or a region that there is not.
    pub(super) fn bind(&self, bind: &Bind) -> Result<ffi::BindMw, Error> {
        let tables = self.lock();
        let window = tables.windows.get(&index(bind.window));
        let region = tables.regions.get(&bind.region.0);
        Ok(ffi::BindMw {
            mw: window
                .ok_or(Error::Argument(
                    "no memory window of the device has this key",
                ))?
                .as_ptr(),
            rkey: bind.rkey.0,
            bind_info: ffi::MwBindInfo {
                mr: region
                    .ok_or(Error::Argument("no region of the device has this lkey"))?
                    .mr
                    .as_ptr(),
                addr: bind.addr,
                length: bind.len,
                access: access(bind).bits(),
            },
        })
    }

    /// Where in this process the bytes of `sge` lie.
    ///
    /// # Errors
    /// [`Error::Argument`] if they do not lie in a region.
    pub(super) fn find(&self, sge: &Sge) -> Result<*const u8, Error> {
        let tables = self.lock();
        let place = tables.regions.get(&sge.lkey.0).and_then(|place| {
            let offset = sge.addr.checked_sub(place.iova)?;
            let end = offset.checked_add(u64::from(sge.len))?;
            (end <= place.len).then_some((place.mr, offset as usize))
        });
        let (mr, offset) = place.ok_or(Error::Argument("the payload lies in no region"))?;
        // SAFETY: in the table as long as it is registered; its address does not change.
        let start = unsafe { (*mr.as_ptr()).addr };
        Ok(start.cast::<u8>().wrapping_add(offset).cast_const())
    }
}

fn access(bind: &Bind) -> AccessFlags {
    [
        (bind.access.remote_write, AccessFlags::REMOTE_WRITE),
        (bind.access.remote_read, AccessFlags::REMOTE_READ),
        (bind.access.remote_atomic, AccessFlags::REMOTE_ATOMIC),
        (bind.access.flush_global, AccessFlags::FLUSH_GLOBAL),
        (bind.access.flush_persistent, AccessFlags::FLUSH_PERSISTENT),
        (bind.zero_based, AccessFlags::ZERO_BASED),
    ]
    .into_iter()
    .filter(|(is_set, _)| *is_set)
    .fold(AccessFlags::NONE, |all, (_, flag)| all | flag)
}

/// A key of its own to part of a region; freed when dropped, which closes it.
pub struct MemoryWindow {
    domain: ProtectionDomain,
    mw: NonNull<ffi::Mw>,
    kind: MwType,
    /// Its place among the device's keys.
    index: u32,
}

// SAFETY: the library's functions lock for themselves, and the key changes by `&mut` only.
unsafe impl Send for MemoryWindow {}
// SAFETY: as above.
unsafe impl Sync for MemoryWindow {}

impl ProtectionDomain {
    /// A memory window without a place.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a type that the device has not, or the library's: ENOMEM for too
    /// many.
    pub fn memory_window(&self, kind: MwType) -> Result<MemoryWindow, Error> {
        let can = self.context().capabilities();
        let (is_there, name) = match kind {
            MwType::One => (
                can.windows_1,
                "memory windows of type 1: no such capability",
            ),
            MwType::Two => (
                can.windows_2b,
                "memory windows of type 2B: no such capability",
            ),
        };
        let alloc = self.context().ops().alloc_mw.filter(|_| is_there);
        let alloc = alloc.ok_or(Error::Unsupported(name))?;
        // SAFETY: an open domain.
        let mw = unsafe { alloc(self.raw(), kind as u32) };
        let mw = NonNull::new(mw).ok_or_else(|| Error::Os(last_errno()))?;
        let mut window = MemoryWindow {
            domain: self.clone(),
            mw,
            kind,
            index: 0,
        };
        window.index = index(window.rkey());
        let keys = self.context().keys();
        keys.lock().windows.insert(window.index, mw);
        Ok(window)
    }
}

impl MemoryWindow {
    /// Its key for peers. That of a type 2 window is whatever the last bind said.
    pub fn rkey(&self) -> Rkey {
        // SAFETY: allocated until dropped.
        Rkey(unsafe { self.mw.as_ref() }.rkey)
    }

    /// Its type.
    pub fn kind(&self) -> MwType {
        self.kind
    }

    /// The key for the next bind of a type 2 window: another low byte.
    pub fn next_rkey(&self) -> Rkey {
        self.rkey().next_of_window()
    }

    /// Posts the bind of a type 1 window, and gives it a new key (`ibv_bind_mw`). `bind` says where;
    /// its keys are filled in.
    ///
    /// # Errors
    /// [`Error::Argument`] for a type 2 window, which is bound by a work request, and for a region
    /// that there is not; else the device's: EINVAL for what it does not bind, as rxe a zero-based
    /// window.
    ///
    /// # Safety
    /// As of [`QueuePair::post_send`].
    pub unsafe fn bind(
        &mut self,
        qp: &QueuePair,
        wr_id: u64,
        bind: Bind,
        flags: SendFlags,
    ) -> Result<(), Error> {
        if self.kind != MwType::One {
            let what = "a type 2 window is bound by a work request";
            return Err(Error::Argument(what));
        }
        let context = self.domain.context();
        let post = context.ops().bind_mw;
        let post = post.ok_or(Error::Unsupported("memory windows of type 1"))?;
        let window = self.rkey();
        let made = context.keys().bind(&Bind { window, ..bind })?;
        let mut order = ffi::MwBind {
            wr_id,
            send_flags: flags.bits(),
            bind_info: made.bind_info,
        };
        // SAFETY: a live queue pair, window and region; the structure is read during the call only.
        check(unsafe { post(qp.raw(), self.mw.as_ptr(), &raw mut order) })
    }

    /// Notes the key that a work request has bound a type 2 window under.
    pub fn set_rkey(&mut self, rkey: Rkey) {
        // SAFETY: allocated until dropped; C's programs write the field, too.
        unsafe { self.mw.as_mut() }.rkey = rkey.0;
    }
}

impl Drop for MemoryWindow {
    fn drop(&mut self) {
        let context = self.domain.context();
        context.keys().lock().windows.remove(&self.index);
        if let Some(free) = context.ops().dealloc_mw {
            // SAFETY: allocated, and freed once.
            unsafe { free(self.mw.as_ptr()) };
        }
    }
}

impl fmt::Debug for MemoryWindow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MemoryWindow").field(&self.rkey()).finish()
    }
}
