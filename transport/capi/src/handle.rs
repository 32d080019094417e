//! What all handles share: who uses them, which events of them are out, and the way to their names.

use std::collections::HashMap;
use std::ffi::c_int;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use lowtide_transport::raw::types::{CqId, Error, Qpn, SrqId};

use crate::completion::lowtide_cq;
use crate::error::Fault;
use crate::queue_pair::{lowtide_qp, lowtide_srq};

/// How many others stand on an object.
#[derive(Debug, Default, Clone)]
pub(crate) struct Uses(Arc<()>);

impl Uses {
    /// To be kept by whoever uses the object, for as long as it does.
    pub(crate) fn hold(&self) -> Uses {
        self.clone()
    }

    fn check(&self, by: &'static str) -> Result<(), Fault> {
        match Arc::strong_count(&self.0) {
            1 => Ok(()),
            _ => Err(Error::Busy(by).into()),
        }
    }
}

/// Events that were handed out and not acknowledged: their object stays until they are.
#[derive(Debug, Default)]
pub(crate) struct Unacknowledged {
    count: Mutex<u32>,
    none: Condvar,
}

impl Unacknowledged {
    pub(crate) fn add(&self) {
        *lock(&self.count) += 1;
    }

    pub(crate) fn acknowledge(&self, events: u32) {
        let mut count = lock(&self.count);
        *count = count.saturating_sub(events);
        if *count == 0 {
            self.none.notify_all();
        }
    }

    pub(crate) fn wait_for_none(&self) {
        let mut count = lock(&self.count);
        while *count > 0 {
            count = self
                .none
                .wait(count)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A handle as C knows it, for whoever has only its number.
pub(crate) struct Name<T>(NonNull<T>);

// SAFETY: C may use a handle on any thread, and all that is in one may be; the header says so.
unsafe impl<T> Send for Name<T> {}

impl<T> Name<T> {
    pub(crate) fn of(handle: &T) -> Name<T> {
        Name(NonNull::from(handle))
    }

    pub(crate) fn pointer(&self) -> *mut T {
        self.0.as_ptr()
    }

    /// # Safety
    /// The handle is alive.
    pub(crate) unsafe fn handle(&self) -> &T {
        // SAFETY: the caller's promise.
        unsafe { self.0.as_ref() }
    }
}

/// C's names of a device's objects: events know numbers. What is here is alive: an object takes its
/// name away before it ends.
#[derive(Default)]
pub(crate) struct Names {
    pub(crate) cqs: HashMap<CqId, Name<lowtide_cq>>,
    pub(crate) qps: HashMap<Qpn, Name<lowtide_qp>>,
    pub(crate) srqs: HashMap<SrqId, Name<lowtide_srq>>,
}

pub(crate) type SharedNames = Arc<Mutex<Names>>;

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A pointer from C as what it points to.
///
/// # Safety
/// It is NULL, or of a living object of this type that nobody changes meanwhile.
pub(crate) unsafe fn get<'a, T>(pointer: *const T, what: &'static str) -> Result<&'a T, Fault> {
    match pointer.is_aligned() {
        // SAFETY: the caller's promise, and its alignment was looked at.
        true => unsafe { pointer.as_ref() }.ok_or(Fault::Null(what)),
        false => Err(Fault::Null(what)),
    }
}

/// The same for what is to be written.
///
/// # Safety
/// It is NULL, or of a living object of this type that nobody else looks at meanwhile.
pub(crate) unsafe fn get_mut<'a, T>(
    pointer: *mut T,
    what: &'static str,
) -> Result<&'a mut T, Fault> {
    match pointer.is_aligned() {
        // SAFETY: the caller's promise, and its alignment was looked at.
        true => unsafe { pointer.as_mut() }.ok_or(Fault::Null(what)),
        false => Err(Fault::Null(what)),
    }
}

/// Takes a handle back from C to be dropped, unless something still uses it.
///
/// # Safety
/// It is NULL or was made by [`crate::error::object`], and C will not use it again if this
/// succeeds.
pub(crate) unsafe fn destroy<T>(
    pointer: *mut T,
    what: &'static str,
    uses: impl FnOnce(&T) -> (&Uses, &'static str),
    before: impl FnOnce(&T),
) -> Result<(), Fault> {
    // SAFETY: the caller's promise.
    let handle = unsafe { get(pointer, what) }?;
    let (held, by) = uses(handle);
    held.check(by)?;
    before(handle);
    // SAFETY: it came from a box, and the reference above is not used any more.
    drop(unsafe { Box::from_raw(pointer) });
    Ok(())
}

/// The end of an object that events name: it loses its name, then events that are out are waited
/// for.
pub(crate) fn retire(
    names: &SharedNames,
    forget: impl FnOnce(&mut Names),
    unacknowledged: &Unacknowledged,
) {
    forget(&mut lock(names));
    unacknowledged.wait_for_none();
}

/// A file descriptor as C expects it: calls that find nothing wait, unless the program says
/// otherwise with O_NONBLOCK.
pub(crate) fn make_blocking(fd: BorrowedFd<'_>) -> Result<(), Fault> {
    let fd = fd.as_raw_fd();
    // SAFETY: plain arguments.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    // SAFETY: as above.
    let done = unsafe { libc::fcntl(fd, libc::F_SETFL, flags & !libc::O_NONBLOCK) };
    match flags < 0 || done < 0 {
        true => Err(std::io::Error::last_os_error().into()),
        false => Ok(()),
    }
}

/// Takes the next of what a file descriptor tells of, asleep until it comes.
pub(crate) fn next<T>(fd: BorrowedFd<'_>, mut take: impl FnMut() -> Option<T>) -> Result<T, Fault> {
    let fd = fd.as_raw_fd();
    loop {
        if let Some(item) = take() {
            return Ok(item);
        }
        // SAFETY: plain arguments.
        if unsafe { libc::fcntl(fd, libc::F_GETFL) } & libc::O_NONBLOCK != 0 {
            return Err(Fault::Again);
        }
        let mut poll = libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one entry that lives as long as the call.
        if unsafe { libc::poll(&raw mut poll, 1, -1) } < 0 {
            let error = std::io::Error::last_os_error();
            return Err(match error.kind() {
                std::io::ErrorKind::Interrupted => Fault::Interrupted,
                _ => error.into(),
            });
        }
    }
}

/// A count from C that must not be negative.
pub(crate) fn count(value: c_int, what: &'static str) -> Result<u32, Fault> {
    u32::try_from(value).map_err(|_| Fault::Argument(what))
}

// Everything behind the handles may be used by any thread.
const _: () = {
    const fn is_shared<T: Send + Sync>() {}
    is_shared::<lowtide_transport::raw::Context>();
    is_shared::<lowtide_transport::raw::ProtectionDomain>();
    is_shared::<lowtide_transport::raw::MemoryRegion>();
    is_shared::<lowtide_transport::raw::MemoryWindow>();
    is_shared::<lowtide_transport::raw::CompletionChannel>();
    is_shared::<lowtide_transport::raw::CompletionQueue>();
    is_shared::<lowtide_transport::raw::QueuePair>();
    is_shared::<lowtide_transport::raw::SharedReceiveQueue>();
    is_shared::<lowtide_transport::raw::AddressHandle>();
    is_shared::<lowtide_transport::cm::EventChannel>();
    is_shared::<SharedNames>();
};
