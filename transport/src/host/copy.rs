//! Copies between our memory and a peer's, in one step.
//!
//! Owns: the two ways there. Into a mapped segment by plain stores where our side is memory that
//! cannot go away, and by `pread` and `pwrite` on its file where it is the program's; into any other
//! memory by `process_vm_readv` and `process_vm_writev`. So everything that some program may have
//! unmapped is touched by the kernel only, and fails instead of killing anybody.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU64, Ordering};

use lowtide_transport_proto::qp::AtomicOp;

use super::segment::Segment;
use crate::udp::file_size_max;

/// A stretch of our memory. Made by [`Memory::place_of`](crate::memory::Memory::place_of) only, which
/// says so of ranges in service: that registering them has promised that no reference of Rust's
/// stands in the way of reading and changing them, and that what is lasting is mapped.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ours {
    pub(crate) address: u64,
    pub(crate) len: usize,
    /// The device owns it, so it stays mapped. The program's may go.
    pub(crate) is_lasting: bool,
}

/// Where in the peer's memory.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Theirs<'s> {
    /// In a segment that is mapped here; the offset has been checked against its length.
    Mapped(&'s Segment, usize),
    /// At this address of this process.
    Process(libc::pid_t, u64),
}

/// Which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    ToThem,
    FromThem,
}

/// Part of the memory is not there, or the system does not let us. Some of it may be copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Refused;

/// Copies all of `ours`.
pub(crate) fn copy(ours: Ours, theirs: Theirs<'_>, way: Way) -> Result<(), Refused> {
    if ours.len == 0 {
        return Ok(());
    }
    match theirs {
        Theirs::Mapped(segment, offset) => {
            let end = offset.checked_add(ours.len).ok_or(Refused)?;
            // The kernel holds writes to a file against what this process may have written, and ends who
            // goes beyond; the peer's engine is under no such limit of ours.
            let by_file = way == Way::ToThem && !ours.is_lasting;
            if end > segment.len() || by_file && end as u64 > file_size_max() {
                return Err(Refused);
            }
            match ours.is_lasting {
                // SAFETY: what an `Ours` is, and the range was just checked.
                true => unsafe { copy_mapped(ours, segment, offset, way) },
                // SAFETY: what an `Ours` is.
                false => return unsafe { copy_file(ours, segment, offset, way) },
            }
            Ok(())
        }
        // SAFETY: what an `Ours` is.
        Theirs::Process(pid, address) => unsafe { copy_process(ours, pid, address, way) },
    }
}

/// # Safety
/// `ours` is what [`Ours`] says, and lasting; the range lies in the segment.
unsafe fn copy_mapped(ours: Ours, segment: &Segment, offset: usize, way: Way) {
    let first = segment.words().as_ptr().cast::<u8>().cast_mut();
    let own = std::ptr::with_exposed_provenance_mut::<u8>(ours.address as usize);
    // SAFETY: both ranges are mapped for as long as their owners live, which is beyond this call.
    // They may overlap. What other processes do meanwhile is outside of what the compiler sees; a
    // race yields old or new bytes, and nothing here looks at them.
    unsafe {
        let other = first.add(offset);
        match way {
            Way::ToThem => std::ptr::copy(own, other, ours.len),
            Way::FromThem => std::ptr::copy(other, own, ours.len),
        }
    }
}

/// # Safety
/// `ours` is what [`Ours`] says.
unsafe fn copy_file(ours: Ours, segment: &Segment, offset: usize, way: Way) -> Result<(), Refused> {
    let fd = segment.as_fd().as_raw_fd();
    let mut done = 0;
    while done < ours.len {
        let own = (ours.address + done as u64) as *mut libc::c_void;
        let (len, at) = (ours.len - done, (offset + done) as libc::off_t);
        // SAFETY: the kernel touches the memory and reports what is not there.
        let copied = unsafe {
            match way {
                Way::ToThem => libc::pwrite(fd, own, len, at),
                Way::FromThem => libc::pread(fd, own, len, at),
            }
        };
        match usize::try_from(copied) {
            Ok(copied @ 1..) => done += copied,
            _ => return Err(Refused),
        }
    }
    Ok(())
}

/// # Safety
/// `ours` is what [`Ours`] says.
unsafe fn copy_process(
    ours: Ours,
    pid: libc::pid_t,
    address: u64,
    way: Way,
) -> Result<(), Refused> {
    let mut done = 0;
    while done < ours.len {
        let vector = |address: u64| libc::iovec {
            iov_base: (address + done as u64) as *mut libc::c_void,
            iov_len: ours.len - done,
        };
        let (own, other) = (vector(ours.address), vector(address));
        let call = match way {
            Way::ToThem => libc::process_vm_writev,
            Way::FromThem => libc::process_vm_readv,
        };
        // SAFETY: one live vector each; the kernel touches both sides and reports what is not there.
        let copied = unsafe { call(pid, &raw const own, 1, &raw const other, 1, 0) };
        match usize::try_from(copied) {
            Ok(copied @ 1..) => done += copied,
            _ => return Err(Refused),
        }
    }
    Ok(())
}

/// Whether the system lets us reach the memory of a process, which says that `word` lies at `probe`.
pub(super) fn can_reach(pid: libc::pid_t, probe: u64, word: u64) -> bool {
    let mut seen = !word;
    let ours = Ours {
        address: (&raw mut seen).expose_provenance() as u64,
        len: 8,
        is_lasting: true,
    };
    let copied = copy(ours, Theirs::Process(pid, probe), Way::FromThem);
    copied.is_ok() && seen == word
}

/// Performs `op` on a word and returns what was there.
pub(crate) fn atomic(word: &AtomicU64, op: AtomicOp) -> u64 {
    // SeqCst: verbs promise no less between atomics of one device.
    match op {
        AtomicOp::CompareSwap { compare, swap } => {
            match word.compare_exchange(compare, swap, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(old) | Err(old) => old,
            }
        }
        AtomicOp::FetchAdd { add } => word.fetch_add(add, Ordering::SeqCst),
        AtomicOp::Write { value } => word.swap(u64::from_ne_bytes(value), Ordering::SeqCst),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(segment: &Segment) -> u64 {
        segment.words().as_ptr().expose_provenance() as u64
    }

    fn ours(address: u64, len: usize, is_lasting: bool) -> Ours {
        Ours {
            address,
            len,
            is_lasting,
        }
    }

    #[test]
    fn every_way_copies_and_what_is_not_there_is_refused() {
        let (own, other) = (
            Segment::create(8192).unwrap(),
            Segment::create(8192).unwrap(),
        );
        let word = |segment: &Segment| segment.words()[2].load(Ordering::Relaxed);
        // SAFETY: no argument.
        let pid = unsafe { libc::getpid() };
        let mut expected = 0u64;
        for is_lasting in [true, false] {
            for is_mapped in [true, false] {
                let theirs = match is_mapped {
                    true => Theirs::Mapped(&other, 16),
                    false => Theirs::Process(pid, address(&other) + 16),
                };
                let place = ours(address(&own) + 16, 8, is_lasting);
                expected += 0x0101;
                own.words()[2].store(expected, Ordering::Relaxed);
                copy(place, theirs, Way::ToThem).unwrap();
                assert_eq!(word(&other), expected);
                own.words()[2].store(0, Ordering::Relaxed);
                copy(place, theirs, Way::FromThem).unwrap();
                assert_eq!(word(&own), expected);
            }
        }
        let place = ours(address(&own), 16, true);
        for theirs in [
            Theirs::Mapped(&other, 8192 - 8),
            Theirs::Mapped(&other, usize::MAX),
            Theirs::Process(pid, 64),
        ] {
            for way in [Way::ToThem, Way::FromThem] {
                assert_eq!(copy(place, theirs, way), Err(Refused));
            }
        }
        let nowhere = ours(64, 16, false);
        for theirs in [
            Theirs::Mapped(&other, 0),
            Theirs::Process(pid, address(&other)),
        ] {
            assert_eq!(copy(nowhere, theirs, Way::ToThem), Err(Refused));
        }
    }
}
