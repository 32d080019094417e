//! A log segment in memory: the only place in this crate's storage that is `unsafe`.
//!
//! Owns: two mappings of the same length. The *view* is the file, mapped for reading. The *window*
//! is anonymous memory: stores go there, and a sync writes its dirty pages to the file, past the page
//! cache where the file system can. A page is *resident* from its first store until it was written
//! and is released; a resident page is read from the window, another from the view.
//!
//! Stores to a shared mapping would be simpler, and the kernel would write them. But each sync then
//! takes the right to write from each page that it finds, with an interrupt to every core that runs
//! this process, and the next store to the page faults: a megabyte took four times as long. Besides,
//! an error of the disk is an error here, not a signal.
//!
//! Both mappings are seen as slices of atomic words, so stores, reads and writes by the kernel may
//! overlap without undefined behaviour; ordering between threads comes from whoever publishes
//! positions, hence `Relaxed` for the words.
//!
//! Invariants: one thread stores to a page at a time; the bytes of a range are not stored to while it
//! is synced, but bytes behind it in its last page may be; a store that begins a page which is not
//! resident gives up what stood in it; only pages that were written are released. The file is never
//! truncated or grown while mapped. If the device fails under the view, the kernel sends SIGBUS, and
//! the handler writes one line and aborts.
//!
//! Deliberately absent: references into the mappings (callers copy in and out); remapping; use as an
//! RDMA memory region.
//!
//! Source: Crotty et al., "Are You Sure You Want to Use MMAP in Your Database Management System?".
#![allow(unsafe_code)]

use crate::medium::dir::{DirLock, SyncMode};
use crate::medium::{Call, Medium, MediumError, PAGE, pages, total_len};
use memmap2::{Advice, MmapOptions, MmapRaw, UncheckedAdvice};
use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, Once, PoisonError};

/// Bytes per word of a mapping.
const WORD: u64 = 8;
const PAGE_WORDS: usize = (PAGE / WORD) as usize;
/// Bytes at the start of a file that stay resident: what is stored there again and again.
const KEPT: u64 = 64 << 10;
/// Bytes that are released together, so that it is rare.
const RELEASED: u64 = 2 << 20;

/// The page stands in the window.
const RESIDENT: u8 = 1;
/// It is resident, and not written since the last store.
const DIRTY: u8 = 2;

/// What is known of each page: [`RESIDENT`], [`DIRTY`].
#[derive(Debug)]
struct States(Box<[AtomicU8]>);

impl States {
    fn new(pages: u64) -> States {
        States((0..pages).map(|_| AtomicU8::new(0)).collect())
    }

    #[inline]
    fn is(&self, page: u64, what: u8) -> bool {
        self.0[page as usize].load(Ordering::Acquire) & what != 0
    }

    /// Stored to. Release: who sees it sees the stores before it.
    #[inline]
    fn set(&self, page: u64) {
        let state = &self.0[page as usize];
        if state.load(Ordering::Relaxed) != RESIDENT | DIRTY {
            state.fetch_or(RESIDENT | DIRTY, Ordering::Release);
        }
    }

    /// Ends a state and says whether it was so.
    fn take(&self, page: u64, what: u8) -> bool {
        // Acquire: the stores before it are in memory.
        self.is(page, what) && self.0[page as usize].fetch_and(!what, Ordering::AcqRel) & what != 0
    }
}

/// A file in memory; see the module's comment.
#[derive(Debug)]
pub struct MappedFile {
    name: String,
    view: MmapRaw,
    window: MmapRaw,
    states: States,
    file: File,
    /// The same file past the page cache.
    direct: Option<File>,
    /// The file system took `O_DIRECT` and refused a write.
    refused: AtomicBool,
    writer: Mutex<Writer>,
    /// Keeps other processes away while the file is mapped.
    _lock: Arc<DirLock>,
}

/// What one sync at a time needs.
#[derive(Debug)]
struct Writer {
    /// Where the last page of a range is copied to: what lies behind the range may be stored to.
    last: MmapRaw,
    /// Pages from [`KEPT`] up to here were released.
    released: u64,
}

impl MappedFile {
    /// Maps all of `file`, which stands at `path`, and installs the SIGBUS handler once.
    ///
    /// # Errors
    /// [`MediumError::OutOfRange`] if the file is empty or no multiple of a page; I/O errors.
    pub(crate) fn map(
        path: &Path,
        file: File,
        mode: SyncMode,
        lock: Arc<DirLock>,
    ) -> Result<MappedFile, MediumError> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let io = |e| MediumError::from_io(&name, Call::Open, 0, 0, e);
        let size = file.metadata().map_err(io)?.len();
        if size == 0 || !size.is_multiple_of(PAGE) {
            return Err(MediumError::OutOfRange {
                file: name.into_owned(),
                call: Call::Open,
                offset: 0,
                len: size.next_multiple_of(PAGE).max(PAGE),
                size,
            });
        }
        install_sigbus_handler();
        let view = MmapOptions::new().map_raw_read_only(&file).map_err(io)?;
        let anonymous = |len: u64| {
            let len = usize::try_from(len).map_err(|_| io(io::ErrorKind::FileTooLarge.into()))?;
            let map = MmapOptions::new().no_reserve_swap().len(len).map_anon();
            Ok::<_, MediumError>(MmapRaw::from(map.map_err(io)?))
        };
        let window = anonymous(size)?;
        // Only a hint: the disk is given a few long pieces instead of many pages.
        let _ = window.advise(Advice::HugePage);
        let last = anonymous(PAGE)?;
        let direct = match mode {
            SyncMode::Direct => open_direct(path),
            SyncMode::Cached => None,
        };
        Ok(MappedFile {
            name: name.into_owned(),
            view,
            window,
            states: States::new(size / PAGE),
            file,
            direct,
            refused: AtomicBool::new(false),
            writer: Mutex::new(Writer { last, released: 0 }),
            _lock: lock,
        })
    }

    fn view(&self) -> &[AtomicU64] {
        words(&self.view)
    }

    fn window(&self) -> &[AtomicU64] {
        words(&self.window)
    }

    #[inline]
    fn check(&self, call: Call, offset: u64, len: u64) -> Result<(), MediumError> {
        let size = self.view.len() as u64;
        if offset.checked_add(len).is_some_and(|end| end <= size) {
            return Ok(());
        }
        Err(self.outside(call, offset, len))
    }

    #[cold]
    fn outside(&self, call: Call, offset: u64, len: u64) -> MediumError {
        MediumError::OutOfRange {
            file: self.name.clone(),
            call,
            offset,
            len,
            size: self.view.len() as u64,
        }
    }

    /// Brings the page that a store begins in into the window. One that it begins starts with zeros.
    #[inline]
    fn settle(&self, offset: u64) {
        let page = offset / PAGE;
        if !offset.is_multiple_of(PAGE) && !self.states.is(page, RESIDENT) {
            self.bring(page);
        }
    }

    #[cold]
    fn bring(&self, page: u64) {
        let words = page_words(page);
        for (to, from) in self.window()[words.clone()].iter().zip(&self.view()[words]) {
            to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// The dirty pages of some, as runs; they are not dirty any more.
    fn take_dirty(&self, pages: Range<u64>) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for page in pages {
            if !self.states.take(page, DIRTY) {
                continue;
            }
            match runs.last_mut() {
                Some(run) if run.end == page => run.end += 1,
                _ => runs.push(page..page + 1),
            }
        }
        runs
    }

    /// Writes pages of the window; of the page that `end` lies in, a copy. Durable with `flags`.
    fn write(
        &self,
        pages: Range<u64>,
        end: u64,
        last: &MmapRaw,
        flags: libc::c_int,
    ) -> io::Result<()> {
        let within = (end.div_ceil(PAGE) == pages.end && !end.is_multiple_of(PAGE))
            .then(|| page_words(pages.end - 1));
        if let Some(within) = &within {
            for (to, from) in words(last).iter().zip(&self.window()[within.clone()]) {
                to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
            }
        }
        let copied = if within.is_some() { PAGE as usize } else { 0 };
        let len = ((pages.end - pages.start) * PAGE) as usize;
        let part = |base: *const u8, len| libc::iovec {
            iov_base: base.cast_mut().cast(),
            iov_len: len,
        };
        let first = &self.window()[page_words(pages.start)];
        let mut parts = [
            part(first.as_ptr().cast(), len - copied),
            part(last.as_ptr(), copied),
        ];
        let mut at = pages.start * PAGE;
        while parts.iter().any(|p| p.iov_len > 0) {
            let direct = self.direct.as_ref();
            let direct = direct.filter(|_| !self.refused.load(Ordering::Relaxed));
            let file = direct.unwrap_or(&self.file);
            let offset = at.try_into().map_err(|_| io::ErrorKind::FileTooLarge)?;
            // SAFETY: the first part lies in the window, `pages` being within the file's length and
            // `copied` not longer than they are; the second is the whole of `last`. Both mappings
            // live as long as this call, and the kernel only reads from them.
            let written =
                unsafe { libc::pwritev2(file.as_raw_fd(), parts.as_ptr(), 2, offset, flags) };
            let Ok(mut written) = usize::try_from(written) else {
                let error = io::Error::last_os_error();
                match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    // A file system may take the flag and refuse the write; the cache always works.
                    io::ErrorKind::InvalidInput if direct.is_some() => {
                        self.refused.store(true, Ordering::Relaxed);
                    }
                    _ => return Err(error),
                }
                continue;
            };
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            at += written as u64;
            for part in &mut parts {
                let taken = written.min(part.iov_len);
                // SAFETY: within the part or just behind it.
                part.iov_base = unsafe { part.iov_base.cast::<u8>().add(taken) }.cast();
                part.iov_len -= taken;
                written -= taken;
            }
        }
        Ok(())
    }

    fn sync_pages(&self, range: &Range<u64>, writer: &Writer) -> io::Result<()> {
        let runs = self.take_dirty(pages(range));
        if let [run] = &runs[..] {
            let flags = libc::RWF_DSYNC;
            return self.write(run.clone(), range.end, &writer.last, flags);
        }
        for run in runs {
            self.write(run, range.end, &writer.last, 0)?;
        }
        // Also where nothing was dirty: what an earlier process wrote may be in a cache.
        self.file.sync_data()
    }

    /// Gives back the memory of pages before `end`, which were written, a good many at once.
    fn release(&self, end: u64, writer: &mut Writer) {
        if end <= KEPT {
            // The file begins anew.
            writer.released = 0;
        }
        let from = writer.released.max(KEPT);
        let mut to = end / RELEASED * RELEASED;
        if to <= from {
            return;
        }
        for page in from / PAGE..to / PAGE {
            if self.states.is(page, DIRTY) {
                to = page * PAGE;
                break;
            }
            self.states.take(page, RESIDENT);
        }
        // Who reads meanwhile sees that the page is not resident any more, and reads the view.
        // SAFETY: the range lies within the window, whose memory is only seen as atomic words; zeros
        // are as good as any other value for pages that are not resident.
        let released = unsafe {
            let (offset, len) = (from as usize, (to - from) as usize);
            self.window
                .unchecked_advise_range(UncheckedAdvice::DontNeed, offset, len)
        };
        // Otherwise the memory stays: nothing else depends on it.
        let _ = released;
        writer.released = to;
    }
}

/// `None` where the file system does not offer it.
fn open_direct(path: &Path) -> Option<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = File::options();
    let options = options.write(true).custom_flags(libc::O_DIRECT);
    options.open(path).ok()
}

fn words(map: &MmapRaw) -> &[AtomicU64] {
    // SAFETY: `map` is a live, page-aligned mapping of `len()` bytes that outlives the borrow, so the
    // pointer is valid and aligned for the slice's lifetime. Nobody in this process forms any other
    // kind of reference into it, and the view, which is mapped for reading, is only loaded from.
    // Other processes are kept away by the directory's lock, which the owner holds.
    unsafe {
        std::slice::from_raw_parts(map.as_ptr().cast::<AtomicU64>(), map.len() / WORD as usize)
    }
}

/// Words of a page.
fn page_words(page: u64) -> Range<usize> {
    let first = page as usize * PAGE_WORDS;
    first..first + PAGE_WORDS
}

/// The pieces of `offset..offset+len` that lie in a page each, and where they lie in a buffer.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, Range<usize>)> {
    let end = offset + len as u64;
    pages(&(offset..end)).map(move |page| {
        let (from, to) = (offset.max(page * PAGE), end.min((page + 1) * PAGE));
        (page, (from - offset) as usize..(to - offset) as usize)
    })
}

/// Copies from words.
fn load(words: &[AtomicU64], offset: u64, out: &mut [u8]) {
    let (whole, bytes) = split(offset, out.len(), |index, within, at| {
        let word = words[index].load(Ordering::Relaxed).to_ne_bytes();
        out[at].copy_from_slice(&word[within]);
    });
    for (word, chunk) in words[whole].iter().zip(out[bytes].chunks_exact_mut(8)) {
        chunk.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
    }
}

/// Copies to words, line by line, which the compiler unrolls. One thread stores to a page at a time.
#[inline]
fn store(words: &[AtomicU64], offset: u64, bytes: &[u8]) {
    if !offset.is_multiple_of(WORD) {
        return store_any(words, offset, bytes);
    }
    let (of_lines, rest) = bytes.as_chunks::<64>();
    let (lines, _) = words[(offset / WORD) as usize..].as_chunks::<8>();
    for (line, bytes) in lines.iter().zip(of_lines) {
        let (bytes, _) = bytes.as_chunks::<8>();
        for n in 0..8 {
            line[n].store(u64::from_ne_bytes(bytes[n]), Ordering::Relaxed);
        }
    }
    if !rest.is_empty() {
        store_any(words, offset + (bytes.len() - rest.len()) as u64, rest);
    }
}

fn store_any(words: &[AtomicU64], offset: u64, bytes: &[u8]) {
    // A partial word is read, changed and written.
    let (whole, range) = split(offset, bytes.len(), |index, within, at| {
        let mut word = words[index].load(Ordering::Relaxed).to_ne_bytes();
        word[within].copy_from_slice(&bytes[at]);
        words[index].store(u64::from_ne_bytes(word), Ordering::Relaxed);
    });
    for (word, chunk) in words[whole].iter().zip(bytes[range].as_chunks::<8>().0) {
        word.store(u64::from_ne_bytes(*chunk), Ordering::Relaxed);
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
        Ok(self.view.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), MediumError> {
        self.check(Call::Read, offset, out.len() as u64)?;
        for (page, at) in pieces(offset, out.len()) {
            let from = offset + at.start as u64;
            loop {
                let is_resident = self.states.is(page, RESIDENT);
                let words = if is_resident {
                    self.window()
                } else {
                    self.view()
                };
                load(words, from, &mut out[at.clone()]);
                // If it was released meanwhile, what was read may be zeros.
                fence(Ordering::Acquire);
                if self.states.is(page, RESIDENT) == is_resident {
                    break;
                }
            }
        }
        Ok(())
    }

    fn store(&self, offset: u64, bytes: &[u8]) -> Result<(), MediumError> {
        self.store_all(offset, &[bytes])
    }

    fn store_all(&self, offset: u64, stretches: &[&[u8]]) -> Result<(), MediumError> {
        let len = total_len(stretches);
        self.check(Call::Store, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        self.settle(offset);
        let words = self.window();
        let mut at = offset;
        for bytes in stretches {
            store(words, at, bytes);
            at += bytes.len() as u64;
        }
        // Behind the stores, so that a sync which takes the mark has seen them.
        let (first, last) = (offset / PAGE, (at - 1) / PAGE);
        self.states.set(first);
        for page in first + 1..last + 1 {
            self.states.set(page);
        }
        Ok(())
    }

    fn sync(&self, range: Range<u64>) -> Result<(), MediumError> {
        let len = range.end.saturating_sub(range.start);
        self.check(Call::Sync, range.start, len)?;
        if len == 0 {
            return Ok(());
        }
        // A panic there left at most pages that are dirty no more, as a failure does.
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        self.sync_pages(&range, &writer)
            .map_err(|e| MediumError::from_io(&self.name, Call::Sync, range.start, len, e))?;
        self.release(range.end, &mut writer);
        Ok(())
    }

    fn prefault(&self, range: Range<u64>) {
        let end = range.end.min(self.window.len() as u64);
        let start = (range.start / PAGE * PAGE).min(end);
        // Linux 5.14; an older kernel refuses, and stores fault then.
        let _ = self.window.advise_range(
            Advice::PopulateWrite,
            start as usize,
            (end - start) as usize,
        );
    }

    fn resize(&self, len: u64) -> Result<(), MediumError> {
        let size = self.view.len() as u64;
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
    use std::sync::atomic::AtomicBool;

    /// A file of so many zero bytes, mapped, in a directory that goes with the value.
    struct Mapped {
        dir: std::path::PathBuf,
        _volume: DirVolume,
        file: MappedFile,
    }

    impl Mapped {
        fn new(name: &str, len: u64, mode: SyncMode) -> Mapped {
            let dir = format!("lowtide-mapped-{}-{name}-{mode:?}", std::process::id());
            let dir = std::env::temp_dir().join(dir);
            let volume = DirVolume::open(&dir, DirOptions::default()).unwrap();
            drop(volume.create("m", len, Access::Mapped).unwrap());
            let file = Mapped::map(&dir, mode);
            Mapped {
                dir,
                _volume: volume,
                file,
            }
        }

        fn map(dir: &Path, mode: SyncMode) -> MappedFile {
            let path = dir.join("m");
            let file = File::options().read(true).write(true).open(&path).unwrap();
            // Not the volume's lock: that one is held already.
            let lock = Arc::new(DirLock::of(File::open(&path).unwrap()));
            MappedFile::map(&path, file, mode, lock).unwrap()
        }

        fn on_disk(&self) -> Vec<u8> {
            std::fs::read(self.dir.join("m")).unwrap()
        }
    }

    impl Drop for Mapped {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }

    const MODES: [SyncMode; 2] = [SyncMode::Direct, SyncMode::Cached];

    #[test]
    fn stores_at_any_alignment_equal_a_plain_copy() {
        for mode in MODES {
            let mapped = Mapped::new("copy", 3 * PAGE, mode);
            let map = &mapped.file;
            let mut model = vec![0u8; 3 * PAGE as usize];
            let mut rng = SplitMix(7);
            for round in 0..4000 {
                let len = (rng.next_u64() % 70) as usize;
                let at = (rng.next_u64() as usize) % (model.len() - len + 1);
                let bytes: Vec<u8> = (0..len).map(|_| rng.next_u64() as u8).collect();
                map.store(at as u64, &bytes).unwrap();
                model[at..at + len].copy_from_slice(&bytes);
                let from = (rng.next_u64() as usize) % (model.len() - len + 1);
                let mut out = vec![0u8; len];
                map.read(from as u64, &mut out).unwrap();
                assert_eq!(out, model[from..from + len]);
                if round % 100 == 0 {
                    map.sync(at as u64..(at + len) as u64).unwrap();
                    let disk = mapped.on_disk();
                    assert_eq!(disk[at..at + len], model[at..at + len]);
                }
            }
            map.sync(0..3 * PAGE).unwrap();
            assert_eq!(mapped.on_disk(), model);
            assert!(map.store(3 * PAGE - 1, &[0, 0]).is_err());
            assert!(map.read(u64::MAX, &mut [0]).is_err());
            assert!(map.sync(PAGE..4 * PAGE).is_err());
        }
    }

    /// Nothing reaches the file before it is synced, and then only the pages of the range; a store
    /// into the middle of a page that is not resident keeps what stands before it.
    #[test]
    fn a_sync_writes_its_pages_and_no_others() {
        for mode in MODES {
            let mapped = Mapped::new("pages", 8 * PAGE, mode);
            mapped.file.store(0, &[1; 8 * PAGE as usize]).unwrap();
            assert!(mapped.on_disk().iter().all(|b| *b == 0));
            mapped.file.sync(PAGE + 5..2 * PAGE + 1).unwrap();
            let page = |disk: &[u8], n: u64| disk[(n * PAGE) as usize];
            let disk = mapped.on_disk();
            let pages: Vec<u8> = (0..8).map(|n| page(&disk, n)).collect();
            assert_eq!(pages, [0, 1, 1, 0, 0, 0, 0, 0]);
            // Two stretches with a clean page between them.
            mapped.file.store(4 * PAGE, &[2; 10]).unwrap();
            mapped.file.sync(0..PAGE).unwrap();
            mapped.file.sync(3 * PAGE..8 * PAGE).unwrap();
            mapped.file.store(0, &[3]).unwrap();
            mapped.file.store(5 * PAGE, &[3]).unwrap();
            mapped.file.sync(0..8 * PAGE).unwrap();
            let disk = mapped.on_disk();
            assert_eq!((page(&disk, 0), page(&disk, 4), page(&disk, 5)), (3, 2, 3));
            // Another life: the middle of page 1.
            let again = Mapped::map(&mapped.dir, mode);
            again.store(PAGE + 100, &[9; 4]).unwrap();
            again.sync(PAGE..2 * PAGE).unwrap();
            let disk = mapped.on_disk();
            let (at, end) = (PAGE as usize, 2 * PAGE as usize);
            assert!(disk[at..at + 100].iter().all(|b| *b == 1));
            assert_eq!(disk[at + 100..at + 104], [9; 4]);
            assert!(disk[at + 104..end].iter().all(|b| *b == 1));
        }
    }

    /// What lies at an offset of a long file in its so manieth use.
    fn word_at(offset: u64, life: u64) -> [u8; 8] {
        (offset ^ life << 56).to_le_bytes()
    }

    /// One thread appends, another syncs, a third reads what was appended, while pages are released;
    /// then the file begins anew.
    #[test]
    fn pages_are_released_under_readers() {
        const LEN: u64 = 3 * RELEASED;
        for mode in MODES {
            let mapped = Mapped::new("release", LEN, mode);
            for life in 1..3 {
                let (end, done) = (AtomicU64::new(0), AtomicBool::new(false));
                std::thread::scope(|scope| {
                    scope.spawn(|| {
                        for offset in (0..LEN).step_by(8) {
                            mapped.file.store(offset, &word_at(offset, life)).unwrap();
                            end.store(offset + 8, Ordering::Release);
                        }
                    });
                    scope.spawn(|| {
                        let mut synced = 0;
                        // As a segment's header is.
                        mapped.file.sync(0..PAGE).unwrap();
                        while synced < LEN {
                            let to = end.load(Ordering::Acquire);
                            mapped.file.sync(synced..to).unwrap();
                            synced = to;
                        }
                        done.store(true, Ordering::Release);
                    });
                    scope.spawn(|| {
                        let mut rng = SplitMix(life);
                        while !done.load(Ordering::Acquire) {
                            let words = end.load(Ordering::Acquire) / 8;
                            let offset = rng.next_u64() % words.max(1) * 8;
                            let mut out = [0; 8];
                            mapped.file.read(offset, &mut out).unwrap();
                            assert!(words == 0 || out == word_at(offset, life), "{offset}");
                        }
                    });
                });
                let resident = (0..LEN / PAGE)
                    .filter(|p| mapped.file.states.is(*p, RESIDENT))
                    .count();
                assert_eq!(resident as u64, KEPT / PAGE);
                let disk = mapped.on_disk();
                for (offset, word) in (0..).step_by(8).zip(disk.as_chunks::<8>().0) {
                    assert_eq!(*word, word_at(offset, life));
                }
            }
        }
    }
}
