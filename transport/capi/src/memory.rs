//! Memory regions and windows.

use std::ffi::{c_int, c_void};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use lowtide_transport::raw::types::{AccessFlags, Bind, Error, Lkey, MwType, Rkey, SendFlags};
use lowtide_transport::raw::{MemoryRegion, MemoryWindow};

use crate::abi::*;
use crate::device::lowtide_pd;
use crate::error::{Fault, code, object, run};
use crate::handle::{Uses, destroy, get, lock};
use crate::queue_pair::lowtide_qp;

/// A memory region.
pub struct lowtide_mr {
    pub(crate) lkey: Lkey,
    rkey: Rkey,
    /// None only while it is being taken out of service.
    raw: Mutex<Option<MemoryRegion>>,
    _pd: Uses,
}

/// A memory window.
pub struct lowtide_mw {
    raw: Mutex<MemoryWindow>,
    /// Its key, for posts: they hold the device, which whoever holds `raw` may want.
    rkey: AtomicU32,
    uses: Uses,
    _pd: Uses,
}

impl lowtide_mw {
    pub(crate) fn rkey(&self) -> Rkey {
        // Relaxed, here and below: a number by itself.
        Rkey(self.rkey.load(Ordering::Relaxed))
    }

    pub(crate) fn set_rkey(&self, rkey: Rkey) {
        self.rkey.store(rkey.0, Ordering::Relaxed);
    }
}

/// Registers memory, under its own addresses. EFAULT: part of it is not mapped, or not writable as
/// LOCAL_WRITE needs. It is not locked, and may be unmapped: requests that touch it then fail.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_reg_mr(
    pd: *mut lowtide_pd,
    addr: *mut c_void,
    length: usize,
    access: c_int,
) -> *mut lowtide_mr {
    // SAFETY: the header's contract.
    unsafe { lowtide_reg_mr_iova(pd, addr, length, addr.expose_provenance() as u64, access) }
}

/// The same, under addresses that begin with iova.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_reg_mr_iova(
    pd: *mut lowtide_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    access: c_int,
) -> *mut lowtide_mr {
    object(|| {
        // SAFETY: the header's contract.
        let pd = unsafe { get(pd, "pd") }?;
        let flags = AccessFlags::from_bits(access.cast_unsigned());
        let at = addr.expose_provenance() as u64;
        // SAFETY: C has no references that could stand in the way.
        let raw = unsafe { pd.raw.register(at, length as u64, iova, flags) }?;
        Ok(Box::new(lowtide_mr {
            lkey: raw.lkey(),
            rkey: raw.rkey(),
            raw: Mutex::new(Some(raw)),
            _pd: pd.uses.hold(),
        }))
    })
}

/// Takes a region out of service. EBUSY: windows are bound to it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_dereg_mr(mr: *mut lowtide_mr) -> c_int {
    code(|| {
        // SAFETY: the header's contract.
        let handle = unsafe { get(mr, "mr") }?;
        let mut raw = lock(&handle.raw);
        if let Some(region) = raw.take()
            && let Err((error, region)) = region.deregister()
        {
            *raw = Some(region);
            return Err(error.into());
        }
        drop(raw);
        // SAFETY: it came from a box, and the reference above is not used any more.
        drop(unsafe { Box::from_raw(mr) });
        Ok(())
    })
}

/// A region's key for work requests; 0 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_mr_lkey(mr: *const lowtide_mr) -> u32 {
    // SAFETY: the header's contract.
    run(|| Ok(unsafe { get(mr, "mr") }?.lkey.0)).unwrap_or(0)
}

/// A region's key for peers; 0 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_mr_rkey(mr: *const lowtide_mr) -> u32 {
    // SAFETY: the header's contract.
    run(|| Ok(unsafe { get(mr, "mr") }?.rkey.0)).unwrap_or(0)
}

/// A memory window without a place; type is a lowtide_mw_type.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_alloc_mw(pd: *mut lowtide_pd, mw_type: u32) -> *mut lowtide_mw {
    object(|| {
        // SAFETY: the header's contract.
        let pd = unsafe { get(pd, "pd") }?;
        let kind = match mw_type {
            1 => MwType::One,
            2 => MwType::Two,
            _ => return Err(Fault::Argument("memory windows are of type 1 or 2")),
        };
        let raw = pd.raw.memory_window(kind)?;
        Ok(Box::new(lowtide_mw {
            rkey: AtomicU32::new(raw.rkey().0),
            raw: Mutex::new(raw),
            uses: Uses::default(),
            _pd: pd.uses.hold(),
        }))
    })
}

/// Ends a window; peers lose what it gave them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_dealloc_mw(mw: *mut lowtide_mw) -> c_int {
    // SAFETY: the header's contract.
    code(|| unsafe { destroy(mw, "mw", |mw| (&mw.uses, "nobody"), |_| ()) })
}

/// A window's key for peers, as the last bind that was posted gives it; 0 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_mw_rkey(mw: *const lowtide_mw) -> u32 {
    // SAFETY: the header's contract.
    run(|| Ok(unsafe { get(mw, "mw") }?.rkey().0)).unwrap_or(0)
}

/// The key for the next bind of a type 2 window.
#[unsafe(no_mangle)]
pub extern "C" fn lowtide_inc_rkey(rkey: u32) -> u32 {
    rkey & !0xFF | rkey.wrapping_add(1) & 0xFF
}

/// Posts the bind of a type 1 window, and gives it a new key.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_bind_mw(
    qp: *mut lowtide_qp,
    mw: *mut lowtide_mw,
    bind: *const lowtide_mw_bind,
) -> c_int {
    code(|| {
        // SAFETY: the header's contract.
        let (qp, mw, bind) = unsafe { (get(qp, "qp")?, get(mw, "mw")?, get(bind, "bind")?) };
        let flags = SendFlags::from_bits(bind.send_flags);
        let mut window = lock(&mw.raw);
        // SAFETY: the header's contract. The keys are filled in by the window.
        let place = unsafe { place(&bind.bind_info, Rkey(0), Rkey(0)) }?;
        // SAFETY: C has no references that could stand in the way.
        unsafe { window.bind(&qp.raw, bind.wr_id, place, flags) }?;
        mw.set_rkey(window.rkey());
        Ok(())
    })
}

/// # Safety
/// The region is NULL or alive.
pub(crate) unsafe fn place(
    info: &lowtide_mw_bind_info,
    window: Rkey,
    rkey: Rkey,
) -> Result<Bind, Error> {
    let flags = AccessFlags::from_bits(info.mw_access_flags);
    // SAFETY: the caller's promise.
    let region = unsafe { get(info.mr, "mr") };
    // Without a length the region is not looked at.
    let region = match (region, info.length) {
        (Ok(mr), _) => mr.lkey,
        (Err(_), 0) => Lkey(0),
        (Err(_), _) => return Err(Error::Argument("bind_info.mr is NULL or misaligned")),
    };
    Ok(Bind {
        window,
        rkey,
        region,
        addr: info.addr,
        len: info.length,
        access: flags.into(),
        zero_based: flags.contains(AccessFlags::ZERO_BASED),
    })
}
