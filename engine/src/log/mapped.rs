//! The mapping of a log segment: the only place in this crate's storage that is `unsafe`.
//!
//! Owns: a shared mapping of a whole file of fixed, page-multiple length, and the SIGBUS handler.
//! The mapping is seen as a slice of atomic words, so stores, reads and the kernel's write-back may
//! overlap without undefined behaviour; ordering between threads comes from whoever publishes
//! positions, hence `Relaxed` everywhere here.
//!
//! Invariants: the file is never truncated or grown while mapped; its pages are allocated and
//! written before it is mapped (`medium::dir`). So a store cannot hit a hole; if the device fails
//! under a mapped page, the kernel sends SIGBUS, and the handler writes one line and aborts.
//!
//! Deliberately absent: references into the mapping (callers copy in and out); remapping; use as
//! an RDMA memory region (the kernel refuses long-term pins of file pages).
#![allow(unsafe_code)]

use crate::medium::dir::{DirLock, SyncMode};
use crate::medium::{Call, Medium, MediumError, PAGE};
use memmap2::{Advice, MmapOptions, MmapRaw};
use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Once};

/// Bytes per word of the mapping.
const WORD: u64 = 8;

/// A file mapped shared and writable.
#[derive(Debug)]
pub struct MappedFile {
    name: String,
    map: MmapRaw,
    file: File,
    mode: SyncMode,
    /// Keeps other processes away while the file is mapped.
    _lock: Arc<DirLock>,
}

impl MappedFile {
    /// Maps all of `file`, faults its pages in, and installs the SIGBUS handler once.
    ///
    /// # Errors
    /// [`MediumError::OutOfRange`] if the file is empty or no multiple of a page; I/O errors.
    pub(crate) fn map(
        name: &str,
        file: File,
        mode: SyncMode,
        lock: Arc<DirLock>,
    ) -> Result<MappedFile, MediumError> {
        let io = |e| MediumError::from_io(name, Call::Open, 0, 0, e);
        let size = file.metadata().map_err(io)?.len();
        if size == 0 || !size.is_multiple_of(PAGE) {
            return Err(MediumError::OutOfRange {
                file: name.to_owned(),
                call: Call::Open,
                offset: 0,
                len: size.next_multiple_of(PAGE).max(PAGE),
                size,
            });
        }
        install_sigbus_handler();
        let map = MmapOptions::new().populate().map_raw(&file).map_err(io)?;
        Ok(MappedFile {
            name: name.to_owned(),
            map,
            file,
            mode,
            _lock: lock,
        })
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: `map` is a live, page-aligned, read-write mapping of `len()` bytes that this
        // value owns until it is dropped, so the pointer is valid and aligned for the slice's
        // lifetime. Nobody in this process forms any other kind of reference into it. Other
        // processes are kept away by the directory's lock, which this value holds.
        unsafe {
            std::slice::from_raw_parts(
                self.map.as_ptr().cast::<AtomicU64>(),
                self.map.len() / WORD as usize,
            )
        }
    }

    fn check(&self, call: Call, offset: u64, len: u64) -> Result<(), MediumError> {
        let size = self.map.len() as u64;
        if offset.checked_add(len).is_some_and(|end| end <= size) {
            return Ok(());
        }
        Err(MediumError::OutOfRange {
            file: self.name.clone(),
            call,
            offset,
            len,
            size,
        })
    }
}

/// Calls `each(word index, byte range within the word, byte range within the buffer)` for the
/// partial words of `offset..offset+len`, and returns the whole words between them.
fn split(
    offset: u64,
    len: usize,
    mut each: impl FnMut(usize, Range<usize>, Range<usize>),
) -> (Range<usize>, Range<usize>) {
    let word = WORD as usize;
    let index = (offset / WORD) as usize;
    let head = (offset % WORD) as usize;
    let head_len = if head == 0 { 0 } else { (word - head).min(len) };
    if head_len > 0 {
        each(index, head..head + head_len, 0..head_len);
    }
    let first = index + usize::from(head > 0);
    let whole = (len - head_len) / word;
    let tail = len - head_len - whole * word;
    if tail > 0 {
        each(first + whole, 0..tail, len - tail..len);
    }
    (first..first + whole, head_len..head_len + whole * word)
}

impl Medium for MappedFile {
    fn len(&self) -> Result<u64, MediumError> {
        Ok(self.map.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), MediumError> {
        self.check(Call::Read, offset, out.len() as u64)?;
        let words = self.words();
        let (whole, bytes) = split(offset, out.len(), |index, within, at| {
            let word = words[index].load(Ordering::Relaxed).to_ne_bytes();
            out[at].copy_from_slice(&word[within]);
        });
        for (word, chunk) in words[whole].iter().zip(out[bytes].chunks_exact_mut(8)) {
            chunk.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
        }
        Ok(())
    }

    fn store(&self, offset: u64, bytes: &[u8]) -> Result<(), MediumError> {
        self.check(Call::Store, offset, bytes.len() as u64)?;
        let words = self.words();
        // A partial word is read, changed and written: one thread stores to a segment.
        let (whole, range) = split(offset, bytes.len(), |index, within, at| {
            let mut word = words[index].load(Ordering::Relaxed).to_ne_bytes();
            word[within].copy_from_slice(&bytes[at]);
            words[index].store(u64::from_ne_bytes(word), Ordering::Relaxed);
        });
        for (word, chunk) in words[whole].iter().zip(bytes[range].as_chunks::<8>().0) {
            word.store(u64::from_ne_bytes(*chunk), Ordering::Relaxed);
        }
        Ok(())
    }

    fn sync(&self, range: Range<u64>) -> Result<(), MediumError> {
        let len = range.end.saturating_sub(range.start);
        self.check(Call::Sync, range.start, len)?;
        if len == 0 {
            return Ok(());
        }
        let done = match self.mode {
            SyncMode::Range => self.map.flush_range(range.start as usize, len as usize),
            SyncMode::File => self.file.sync_data(),
        };
        done.map_err(|e| MediumError::from_io(&self.name, Call::Sync, range.start, len, e))
    }

    fn prefault(&self, range: Range<u64>) {
        let end = range.end.min(self.map.len() as u64);
        let start = (range.start / PAGE * PAGE).min(end);
        // Faults the pages in writable (Linux 5.14); an older kernel refuses, and stores fault then.
        let _ = self.map.advise_range(
            Advice::PopulateWrite,
            start as usize,
            (end - start) as usize,
        );
    }

    fn resize(&self, len: u64) -> Result<(), MediumError> {
        let size = self.map.len() as u64;
        Err(MediumError::OutOfRange {
            file: self.name.clone(),
            call: Call::Resize,
            offset: 0,
            len,
            size,
        })
    }
}

/// What is said before dying; one write, no formatting, because it runs in a signal handler.
const LAST_WORDS: &[u8] =
    b"lowtide: SIGBUS: a mapped log page could not be read or written; aborting\n";

extern "C" fn on_sigbus(_signal: libc::c_int) {
    // SAFETY: write(2) is async-signal-safe and reads a static of the given length.
    unsafe { libc::write(2, LAST_WORDS.as_ptr().cast(), LAST_WORDS.len()) };
    // SAFETY: abort(3) is async-signal-safe and does not return.
    unsafe { libc::abort() };
}

fn install_sigbus_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let action = SigAction::new(
            SigHandler::Handler(on_sigbus),
            SaFlags::SA_RESETHAND | SaFlags::SA_NODEFER,
            SigSet::empty(),
        );
        // SAFETY: the handler calls only async-signal-safe functions and touches no memory of the
        // interrupted thread; it is installed before the first mapping exists.
        let installed = unsafe { sigaction(Signal::SIGBUS, &action) };
        // Without the handler the default action still kills the process: nothing is lost but the
        // line of text, so a refusal (seccomp) is not an error.
        let _ = installed;
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::medium::dir::{DirOptions, DirVolume};
    use crate::medium::{Access, SplitMix, Volume};

    #[test]
    fn stores_at_any_alignment_equal_a_plain_copy() {
        let dir = std::env::temp_dir().join(format!("lowtide-mapped-{}", std::process::id()));
        let volume = DirVolume::open(&dir, DirOptions::default()).unwrap();
        let map = volume.create("m", 2 * PAGE, Access::Mapped).unwrap();
        let path = dir.join("m");
        let mut model = vec![0u8; 2 * PAGE as usize];
        let mut rng = SplitMix(7);
        for _ in 0..4000 {
            let len = (rng.next_u64() % 70) as usize;
            let at = (rng.next_u64() as usize) % (model.len() - len + 1);
            let bytes: Vec<u8> = (0..len).map(|_| rng.next_u64() as u8).collect();
            map.store(at as u64, &bytes).unwrap();
            model[at..at + len].copy_from_slice(&bytes);
            let from = (rng.next_u64() as usize) % (model.len() - len + 1);
            let mut out = vec![0u8; len];
            map.read(from as u64, &mut out).unwrap();
            assert_eq!(out, model[from..from + len]);
        }
        map.sync(0..2 * PAGE).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), model);
        assert!(map.store(2 * PAGE - 1, &[0, 0]).is_err());
        assert!(map.read(u64::MAX, &mut [0]).is_err());
        std::fs::remove_dir_all(dir).unwrap();
    }
}
