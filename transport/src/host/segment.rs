//! Memory that two processes have mapped.
//!
//! Owns: a memfd of fixed length and its mapping. The file is sealed against shrinking and growing
//! before anybody else gets it, and one that comes from elsewhere is refused unless it is: so no peer
//! can take pages away under our feet, and touching a mapped segment never raises SIGBUS. A file of
//! huge pages is refused, too: their pool may be empty when a page is touched.
//!
//! The bytes are atomic words. Whatever the other process does to them meanwhile, a load yields some
//! value, and whoever loads checks it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use crate::udp::without_sigxfsz;

/// Longest segment that is taken from a peer, bytes.
const LEN_MAX: usize = 1 << 40;
const SEALS: libc::c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;

/// A mapped, sealed file in memory.
#[derive(Debug)]
pub(crate) struct Segment {
    file: OwnedFd,
    map: NonNull<AtomicU64>,
    /// Bytes; a multiple of eight, and not zero.
    len: usize,
}

// SAFETY: the mapping belongs to this value, and all access to it is by atomic words or by the
// copies in `host::copy`, which say what they need.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

impl Segment {
    /// At least `len` zero bytes.
    ///
    /// # Errors
    /// The system has no file descriptor or no memory, or the process may have no file so long (EFBIG).
    pub(crate) fn create(len: usize) -> io::Result<Segment> {
        let len = len.max(8).next_multiple_of(8);
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"lowtide-host".as_ptr(), flags) };
        check(fd)?;
        // SAFETY: the call above has just made it, and nobody else has it.
        let file = unsafe { OwnedFd::from_raw_fd(fd) };
        let size = libc::off_t::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: plain arguments.
        without_sigxfsz(|| check(unsafe { libc::ftruncate(fd, size) }))?;
        let seals = SEALS | libc::F_SEAL_SEAL;
        // SAFETY: plain arguments.
        check(unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) })?;
        Segment::map(file, len)
    }

    /// Maps a file that a peer has sent.
    ///
    /// # Errors
    /// `InvalidData` for one that could still change its length, or is shorter than `len_min` or no
    /// whole number of words, or does not lie in plain memory; or the system's.
    pub(crate) fn adopt(file: OwnedFd, len_min: usize) -> io::Result<Segment> {
        let fd = file.as_raw_fd();
        // SAFETY: plain arguments; a file that knows no seals fails.
        let seals = unsafe { libc::fcntl(fd, libc::F_GET_SEALS) };
        check(seals)?;
        let mut stat = std::mem::MaybeUninit::<libc::stat>::zeroed();
        // SAFETY: the kernel fills the structure.
        check(unsafe { libc::fstat(fd, stat.as_mut_ptr()) })?;
        // SAFETY: filled above, and all zero is a value of it, too.
        let len = usize::try_from(unsafe { stat.assume_init() }.st_size).unwrap_or(0);
        let is_sound = (len_min.max(8)..=LEN_MAX).contains(&len) && len.is_multiple_of(8);
        let mut system = std::mem::MaybeUninit::<libc::statfs>::zeroed();
        // SAFETY: the kernel fills the structure.
        check(unsafe { libc::fstatfs(fd, system.as_mut_ptr()) })?;
        // SAFETY: filled above, and all zero is a value of it, too.
        let is_plain = unsafe { system.assume_init() }.f_type == libc::TMPFS_MAGIC;
        if seals & SEALS != SEALS || !is_sound || !is_plain {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Segment::map(file, len)
    }

    fn map(file: OwnedFd, len: usize) -> io::Result<Segment> {
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping of a file that has this length for as long as it exists.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                rights,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(map.cast::<AtomicU64>()) {
            Some(words) if map != libc::MAP_FAILED => Ok(Segment {
                file,
                map: words,
                len,
            }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// All of it.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is that long, aligned to a page, initialised (a new file is zeroes),
        // lives as long as `self`, and is never taken for anything but atomic words.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr(), self.len / 8) }
    }
}

impl AsFd for Segment {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and this is the end of it.
        unsafe { libc::munmap(self.map.as_ptr().cast(), self.len) };
    }
}

/// The error of a system call that returns a negative number.
pub(super) fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::IntoRawFd;
    use std::sync::atomic::Ordering;

    #[test]
    fn two_mappings_show_the_same_words_and_a_file_that_may_shrink_is_refused() {
        let ours = Segment::create(4096).unwrap();
        let theirs = Segment::adopt(ours.as_fd().try_clone_to_owned().unwrap(), 4096).unwrap();
        ours.words()[511].store(7, Ordering::Relaxed);
        assert_eq!(theirs.words()[511].load(Ordering::Relaxed), 7);
        let longer = Segment::adopt(ours.as_fd().try_clone_to_owned().unwrap(), 4097);
        assert_eq!(longer.unwrap_err().kind(), io::ErrorKind::InvalidData);

        // SAFETY: a new file, owned here.
        let loose = unsafe {
            let fd = libc::memfd_create(c"loose".as_ptr(), libc::MFD_ALLOW_SEALING);
            assert_eq!(libc::ftruncate(fd, 4096), 0);
            OwnedFd::from_raw_fd(fd)
        };
        let refused = Segment::adopt(loose, 4096).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidData);
        // Whether there are any huge pages: their file can be made without one.
        // SAFETY: a new file, owned here.
        let huge = unsafe {
            let flags = libc::MFD_ALLOW_SEALING | libc::MFD_HUGETLB;
            let fd = libc::memfd_create(c"huge".as_ptr(), flags);
            assert_eq!(libc::ftruncate(fd, 1 << 30), 0);
            assert_eq!(libc::fcntl(fd, libc::F_ADD_SEALS, SEALS), 0);
            OwnedFd::from_raw_fd(fd)
        };
        let refused = Segment::adopt(huge, 4096).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidData);
        let plain = std::fs::File::open("/proc/self/exe").unwrap().into_raw_fd();
        // SAFETY: just opened.
        assert!(Segment::adopt(unsafe { OwnedFd::from_raw_fd(plain) }, 8).is_err());
    }
}
