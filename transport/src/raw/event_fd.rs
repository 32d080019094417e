//! A file descriptor that is readable while something waits.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// An eventfd, used as a flag.
#[derive(Debug)]
pub(crate) struct EventFd(OwnedFd);

impl EventFd {
    pub(crate) fn new() -> io::Result<EventFd> {
        // SAFETY: plain arguments.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call above has just made it, and nobody else has it.
        Ok(EventFd(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// One that somebody else has made. It may be no event at all, but never makes us wait.
    pub(crate) fn adopt(fd: OwnedFd) -> io::Result<EventFd> {
        // SAFETY: flags of an open file descriptor.
        let set = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
        match set {
            0 => Ok(EventFd(fd)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Makes it readable.
    pub(crate) fn raise(&self) {
        let one = 1u64;
        // A full one is readable anyway.
        // SAFETY: eight bytes of a live variable are read.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    /// Makes it unreadable.
    pub(crate) fn clear(&self) {
        let mut count = 0u64;
        // If it was not readable, nothing changes.
        // SAFETY: eight bytes of a live variable are written.
        unsafe { libc::read(self.0.as_raw_fd(), (&raw mut count).cast(), 8) };
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
