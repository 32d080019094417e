//! Protection domains and what is made in them besides queue pairs and windows: regions, address
//! handles, shared receive queues.

use std::ffi::{c_int, c_uint, c_void};
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use super::library::Library;
use super::queue_pair::post_receives;
use super::window::Place;
use super::{Context, check, convert, ffi, last_errno};
use crate::raw::BadWr;
use crate::raw::types::{AccessFlags, AhAttr, AhId, Error, Lkey, RecvWr, Rkey, SrqAttr, SrqId};

/// Access flags that a library may ignore; the macro `ibv_reg_mr` of C takes them apart, too.
const OPTIONAL_FLAGS: u32 = 0x3FF0_0000;
const SRQ_LIMIT: c_int = 1 << 1;

/// What memory and queue pairs must have in common to meet. Cloning shares it.
#[derive(Clone)]
pub struct ProtectionDomain(Arc<Domain>);

struct Domain {
    context: Context,
    pd: NonNull<ffi::Pd>,
}

// SAFETY: the library's functions lock for themselves.
unsafe impl Send for Domain {}
// SAFETY: as above.
unsafe impl Sync for Domain {}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: the last holder goes; whatever was made in it holds it.
        unsafe { (self.context.library().dealloc_pd)(self.pd.as_ptr()) };
    }
}

impl Context {
    /// A new protection domain.
    ///
    /// # Errors
    /// The library's.
    pub fn protection_domain(&self) -> Result<ProtectionDomain, Error> {
        // SAFETY: an open context.
        let pd = unsafe { (self.library().alloc_pd)(self.raw()) };
        let pd = NonNull::new(pd).ok_or_else(|| Error::Os(last_errno()))?;
        Ok(ProtectionDomain(Arc::new(Domain {
            context: self.clone(),
            pd,
        })))
    }
}

impl ProtectionDomain {
    /// The device.
    pub fn context(&self) -> &Context {
        &self.0.context
    }

    pub(super) fn raw(&self) -> *mut ffi::Pd {
        self.0.pd.as_ptr()
    }

    fn library(&self) -> &'static Library {
        self.0.context.library()
    }

    /// Registers `len` bytes at `address` under addresses that begin with `iova` (0 with
    /// `ZERO_BASED`, whatever is said). The pages are locked in memory, unless `ON_DEMAND`.
    ///
    /// # Errors
    /// The library's: ENOMEM beyond the limit for locked memory (`ulimit -l`), EFAULT for memory
    /// that is not there; [`Error::Unsupported`] for an `iova` that an older library cannot have, and
    /// for a right to FLUSH on a device that has none.
    ///
    /// # Safety
    /// Until the region is dropped the memory must stay mapped, the device may read it at any
    /// time, and with `LOCAL_WRITE` it and, as far as the flags say, peers may change it. No
    /// reference of Rust's may stand in the way of that. Windows that are bound there go first: a
    /// device may refuse to forget a region that has any, and then goes on using the memory.
    pub unsafe fn register(
        &self,
        address: u64,
        len: u64,
        iova: u64,
        flags: AccessFlags,
    ) -> Result<MemoryRegion, Error> {
        self.context().check_rights(flags)?;
        let len = usize::try_from(len).map_err(|_| Error::Limit("the length of a region"))?;
        let start = address as *mut c_void;
        let iova = match flags.contains(AccessFlags::ZERO_BASED) {
            true => 0,
            false => iova,
        };
        // Counting from 0 is all that the flag means, and not every device knows it of a region.
        let flags = flags.without(AccessFlags::ZERO_BASED);
        let mr = match self.library().reg_mr_iova2 {
            Some(register) => {
                // SAFETY: an open domain; the caller answers for the memory.
                unsafe { register(self.raw(), start, len, iova, flags.bits() as c_uint) }
            }
            None if iova == address => {
                let flags = (flags.bits() & !OPTIONAL_FLAGS) as c_int;
                // SAFETY: as above.
                unsafe { (self.library().reg_mr)(self.raw(), start, len, flags) }
            }
            None => return Err(Error::Unsupported("registration under another address")),
        };
        let mr = NonNull::new(mr).ok_or_else(|| Error::Os(last_errno()))?;
        let region = MemoryRegion {
            domain: self.clone(),
            mr: Some(mr),
        };
        let place = Place {
            mr,
            iova,
            len: len as u64,
        };
        self.context().keys().insert_region(region.lkey(), place);
        Ok(region)
    }

    /// A handle for a destination.
    ///
    /// # Errors
    /// The library's: EINVAL for a GID index without an entry, EHOSTUNREACH or ENETUNREACH for a
    /// destination without a route.
    pub fn address_handle(&self, attr: &AhAttr) -> Result<AddressHandle, Error> {
        let mut attr = convert::ah_attr(attr);
        // SAFETY: an open domain; the structure is read during the call only.
        let ah = unsafe { (self.library().create_ah)(self.raw(), &raw mut attr) };
        let ah = NonNull::new(ah).ok_or_else(|| Error::Os(last_errno()))?;
        Ok(AddressHandle {
            domain: self.clone(),
            ah,
        })
    }

    /// A shared receive queue.
    ///
    /// # Errors
    /// The library's.
    pub fn shared_receive_queue(&self, attr: SrqAttr) -> Result<SharedReceiveQueue, Error> {
        let id = convert::fresh_number();
        let mut init = ffi::SrqInitAttr {
            srq_context: convert::number_as_context(id),
            attr: convert::srq_attr(&attr),
        };
        // SAFETY: an open domain; the structure is read and written during the call only.
        let srq = unsafe { (self.library().create_srq)(self.raw(), &raw mut init) };
        let srq = NonNull::new(srq).ok_or_else(|| Error::Os(last_errno()))?;
        Ok(SharedReceiveQueue(Arc::new(Shared {
            domain: self.clone(),
            srq,
            id: SrqId(id),
        })))
    }
}

impl fmt::Debug for ProtectionDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProtectionDomain").finish_non_exhaustive()
    }
}

/// Registered memory; deregistered when dropped.
#[derive(Debug)]
pub struct MemoryRegion {
    domain: ProtectionDomain,
    /// Present until deregistered.
    mr: Option<NonNull<ffi::Mr>>,
}

// SAFETY: keys and address do not change, and deregistering takes the region.
unsafe impl Send for MemoryRegion {}
// SAFETY: as above.
unsafe impl Sync for MemoryRegion {}

impl MemoryRegion {
    fn as_ref(&self) -> &ffi::Mr {
        let mr = self.mr.expect("registered until it is taken");
        // SAFETY: registered until dropped.
        unsafe { mr.as_ref() }
    }

    /// The key for work requests.
    pub fn lkey(&self) -> Lkey {
        Lkey(self.as_ref().lkey)
    }

    /// The key for peers.
    pub fn rkey(&self) -> Rkey {
        Rkey(self.as_ref().rkey)
    }

    /// Takes it out of service.
    ///
    /// # Errors
    /// The device's, and the region: EBUSY or, as rxe says it, EINVAL while windows are bound to it.
    pub fn deregister(mut self) -> Result<(), (Error, MemoryRegion)> {
        match self.end() {
            Ok(()) => Ok(()),
            Err(error) => Err((error, self)),
        }
    }

    fn end(&mut self) -> Result<(), Error> {
        let Some(mr) = self.mr else { return Ok(()) };
        let (lkey, keys) = (self.lkey(), self.domain.context().keys());
        // First: afterwards the key may be another region's.
        let place = keys.remove_region(lkey);
        // SAFETY: registered, and not used after a success.
        let result = check(unsafe { (self.domain.library().dereg_mr)(mr.as_ptr()) });
        match (&result, place) {
            (Ok(()), _) => self.mr = None,
            (Err(_), Some(place)) => keys.insert_region(lkey, place),
            (Err(_), None) => {}
        }
        result
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        // What the device will not let go stays with it: see `register`.
        let _ = self.end();
    }
}

/// Where datagrams go.
#[derive(Debug)]
pub struct AddressHandle {
    domain: ProtectionDomain,
    ah: NonNull<ffi::Ah>,
}

// SAFETY: never looked into here, and the library locks for itself.
unsafe impl Send for AddressHandle {}
// SAFETY: as above.
unsafe impl Sync for AddressHandle {}

impl AddressHandle {
    /// Its number, for [`crate::raw::types::Destination`].
    pub fn id(&self) -> AhId {
        AhId(self.ah.as_ptr().expose_provenance() as u64)
    }
}

impl Drop for AddressHandle {
    fn drop(&mut self) {
        // SAFETY: created, and destroyed once; posting with it afterwards is the poster's breach.
        unsafe { (self.domain.library().destroy_ah)(self.ah.as_ptr()) };
    }
}

/// Receives for several queue pairs. Cloning shares it.
#[derive(Clone)]
pub struct SharedReceiveQueue(Arc<Shared>);

struct Shared {
    domain: ProtectionDomain,
    srq: NonNull<ffi::Srq>,
    id: SrqId,
}

// SAFETY: the library and the device's own functions lock for themselves.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the last holder goes; queue pairs that take from it hold it.
        unsafe { (self.domain.library().destroy_srq)(self.srq.as_ptr()) };
    }
}

impl SharedReceiveQueue {
    /// Its number, as events name it.
    pub fn id(&self) -> SrqId {
        self.0.id
    }

    pub(super) fn raw(&self) -> *mut ffi::Srq {
        self.0.srq.as_ptr()
    }

    /// Posts receives, in order.
    ///
    /// # Errors
    /// The first that was not taken, and why; those before it were.
    ///
    /// # Safety
    /// As of [`super::QueuePair::post_recv`].
    pub unsafe fn post_recv(&self, list: &[RecvWr<'_>]) -> Result<(), BadWr> {
        let post = self.0.domain.context().ops().post_srq_recv;
        post_receives(list, |wr, bad| {
            // SAFETY: a live queue, a list that lives during the call; memory: the caller.
            post.map(|post| unsafe { post(self.raw(), wr, bad) })
        })
    }

    /// Arms the limit: when fewer receives are left, an event comes, once. 0 disarms it.
    ///
    /// # Errors
    /// The library's.
    pub fn set_limit(&self, limit: u32) -> Result<(), Error> {
        let mut attr = ffi::SrqAttr {
            max_wr: 0,
            max_sge: 0,
            srq_limit: limit,
        };
        let modify = self.0.domain.library().modify_srq;
        // SAFETY: a live queue; the structure is read during the call only.
        check(unsafe { modify(self.raw(), &raw mut attr, SRQ_LIMIT) })
    }

    /// Its limits as they are.
    ///
    /// # Errors
    /// The library's.
    pub fn query(&self) -> Result<SrqAttr, Error> {
        let mut attr = ffi::SrqAttr {
            max_wr: 0,
            max_sge: 0,
            srq_limit: 0,
        };
        // SAFETY: a live queue; the library fills the structure.
        check(unsafe { (self.0.domain.library().query_srq)(self.raw(), &raw mut attr) })?;
        Ok(SrqAttr {
            max_wr: attr.max_wr,
            max_sge: attr.max_sge,
            limit: attr.srq_limit,
        })
    }
}

impl fmt::Debug for SharedReceiveQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SharedReceiveQueue")
            .field(&self.id())
            .finish()
    }
}
