//! A volume in memory that remembers what is durable and what is pending.
//!
//! Owns: for each file its durable bytes, and for each page the ordered list of stores since the
//! page was last durable. From that it builds crash images: each pending page absent, complete, a
//! prefix of its stores, a mix of sectors, or with garbage in sectors under write. It also injects
//! faults: power loss at the n-th durable operation, an error at the n-th call of a kind.
//!
//! Invariants: a crash image never differs from the durable bytes outside of pending stores; after
//! power loss nothing changes any more; a failed sync loses the pages it was asked for, silently,
//! as Linux does (a second sync would report success and write nothing).
//!
//! Deliberately absent: randomness (a generator is passed in), time, torn creation of files
//! (`create` is atomic by contract: temporary name, sync, rename).
//!
//! Source: SQLite `test6.c`, FoundationDB `AsyncFileNonDurable`, CrashMonkey.

use super::{Access, Call, Medium, MediumError, PAGE, SECTOR, Volume, pages};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Errors that can be injected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Injected {
    /// An I/O error (`EIO`).
    Io,
    /// No space (`ENOSPC`).
    NoSpace,
}

/// What became of one pending page when power failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageFate {
    /// None of its stores is there.
    Absent,
    /// All of its stores are there.
    Complete,
    /// The first so many stores are there.
    Prefix(usize),
    /// Sectors whose bit is set are complete, the others as if absent.
    Sectors(u8),
    /// As `Complete`, but changed bytes in sectors whose bit is set are replaced by garbage made
    /// from the seed.
    Garbage(u8, u64),
}

impl PageFate {
    /// A fate drawn from `rng`; garbage only if allowed.
    pub fn random(stores: usize, garbage: bool, rng: &mut dyn FnMut() -> u64) -> PageFate {
        match rng() % if garbage { 6 } else { 5 } {
            0 => PageFate::Absent,
            1 => PageFate::Complete,
            2 => PageFate::Prefix(rng() as usize % (stores + 1)),
            3 | 4 => PageFate::Sectors(rng() as u8),
            _ => PageFate::Garbage(rng() as u8 | 1, rng()),
        }
    }
}

/// A page with stores that are not durable.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PendingPage {
    /// File name.
    pub file: String,
    /// Page number.
    pub page: u64,
    /// How many stores are pending.
    pub stores: usize,
}

/// One store, within one page.
#[derive(Debug, Clone)]
struct PageStore {
    at: usize,
    bytes: Box<[u8]>,
}

#[derive(Debug, Clone, Default)]
struct FileState {
    durable: Vec<u8>,
    current: Vec<u8>,
    pending: BTreeMap<u64, Vec<PageStore>>,
}

#[derive(Debug, Clone, Default)]
struct State {
    files: BTreeMap<String, FileState>,
    durable_ops: u64,
    power_fails_at: Option<u64>,
    powerless: bool,
    calls: [u64; Call::ALL.len()],
    fail: Option<(Call, u64, Injected)>,
    calls_after_failure: BTreeMap<Call, u64>,
    failed: bool,
}

/// A volume in memory; clones share their contents.
#[derive(Debug, Clone, Default)]
pub struct RecordingVolume {
    state: Arc<Mutex<State>>,
}

impl RecordingVolume {
    /// An empty volume.
    pub fn new() -> RecordingVolume {
        RecordingVolume::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Durable operations so far: syncs, creations, removals, changes of length.
    pub fn durable_ops(&self) -> u64 {
        self.state().durable_ops
    }

    /// Power fails instead of the `nth` durable operation from now (1 is the next): that call and
    /// all later ones return [`MediumError::PowerLost`].
    pub fn fail_power_at(&self, nth: u64) {
        let mut state = self.state();
        state.power_fails_at = Some(state.durable_ops + nth);
    }

    /// The `nth` call of this kind from now (1 is the next) fails; later ones do not.
    pub fn fail_call(&self, call: Call, nth: u64, how: Injected) {
        let mut state = self.state();
        let at = state.calls[call as usize] + nth;
        state.fail = Some((call, at, how));
        state.failed = false;
        state.calls_after_failure.clear();
    }

    /// How many calls of this kind there were.
    pub fn calls(&self, call: Call) -> u64 {
        self.state().calls[call as usize]
    }

    /// Whether the injected failure has happened.
    pub fn has_failed(&self) -> bool {
        self.state().failed
    }

    /// How many calls of this kind came after the injected failure.
    pub fn calls_after_failure(&self, call: Call) -> u64 {
        self.state()
            .calls_after_failure
            .get(&call)
            .copied()
            .unwrap_or(0)
    }

    /// All pending pages, sorted.
    pub fn pending_pages(&self) -> Vec<PendingPage> {
        let state = self.state();
        let pages = state.files.iter().flat_map(|(name, file)| {
            file.pending.iter().map(|(page, stores)| PendingPage {
                file: name.clone(),
                page: *page,
                stores: stores.len(),
            })
        });
        pages.collect()
    }

    /// The volume as it may be found after power came back, each pending page as `fate` says. The
    /// image has no pending pages, no faults, and shares nothing with this volume.
    pub fn crash_image(&self, fate: &mut dyn FnMut(&PendingPage) -> PageFate) -> RecordingVolume {
        let state = self.state();
        let mut image = State::default();
        for (name, file) in &state.files {
            let mut bytes = file.durable.clone();
            for (page, stores) in &file.pending {
                let pending = PendingPage {
                    file: name.clone(),
                    page: *page,
                    stores: stores.len(),
                };
                let start = (*page * PAGE) as usize;
                let end = (start + PAGE as usize).min(bytes.len());
                if start < end {
                    apply_fate(&mut bytes[start..end], stores, fate(&pending));
                }
            }
            let file = FileState {
                current: bytes.clone(),
                durable: bytes,
                ..Default::default()
            };
            image.files.insert(name.clone(), file);
        }
        RecordingVolume {
            state: Arc::new(Mutex::new(image)),
        }
    }

    /// Lets the kernel write pages back on its own: those that `choose` picks become durable.
    pub fn write_back(&self, choose: &mut dyn FnMut(&PendingPage) -> bool) {
        let mut state = self.state();
        for (name, file) in &mut state.files {
            let picked: Vec<u64> = file
                .pending
                .iter()
                .filter(|(page, stores)| {
                    choose(&PendingPage {
                        file: name.clone(),
                        page: **page,
                        stores: stores.len(),
                    })
                })
                .map(|(page, _)| *page)
                .collect();
            for page in picked {
                file.settle(page);
            }
        }
    }

    /// Changes durable bytes behind everybody's back (bit rot), for tests of detection; says whether
    /// the file has them.
    pub fn corrupt(&self, name: &str, offset: u64, bytes: &[u8]) -> bool {
        let mut state = self.state();
        let at = offset as usize..offset as usize + bytes.len();
        let Some(file) = state
            .files
            .get_mut(name)
            .filter(|f| f.durable.len() >= at.end)
        else {
            return false;
        };
        file.durable[at.clone()].copy_from_slice(bytes);
        file.current[at].copy_from_slice(bytes);
        true
    }
}

impl FileState {
    fn settle(&mut self, page: u64) {
        if let Some(stores) = self.pending.remove(&page) {
            let start = (page * PAGE) as usize;
            let end = (start + PAGE as usize).min(self.durable.len());
            for store in &stores {
                store.apply(&mut self.durable[start..end]);
            }
        }
    }
}

impl PageStore {
    fn apply(&self, page: &mut [u8]) {
        page[self.at..self.at + self.bytes.len()].copy_from_slice(&self.bytes);
    }
}

fn apply_fate(page: &mut [u8], stores: &[PageStore], fate: PageFate) {
    let count = match fate {
        PageFate::Absent => 0,
        PageFate::Prefix(n) => n.min(stores.len()),
        _ => stores.len(),
    };
    let old = page.to_vec();
    for store in &stores[..count] {
        store.apply(page);
    }
    let sector_of = |at: usize| (at as u64 / SECTOR) as u32;
    match fate {
        PageFate::Sectors(kept) => {
            for at in (0..page.len()).filter(|at| kept >> sector_of(*at) & 1 == 0) {
                page[at] = old[at];
            }
        }
        PageFate::Garbage(hit, seed) => {
            let mut rng = super::SplitMix(seed);
            for at in 0..page.len() {
                if hit >> sector_of(at) & 1 == 1 && page[at] != old[at] {
                    page[at] = rng.next_u64() as u8;
                }
            }
        }
        _ => {}
    }
}

impl State {
    /// Counts the call and applies the planned faults.
    fn enter(&mut self, call: Call, name: &str, range: Range<u64>) -> Result<(), MediumError> {
        if self.powerless {
            return Err(MediumError::PowerLost);
        }
        self.calls[call as usize] += 1;
        if self.failed {
            *self.calls_after_failure.entry(call).or_default() += 1;
        }
        if matches!(
            call,
            Call::Sync | Call::Create | Call::Remove | Call::Resize
        ) {
            self.durable_ops += 1;
            if self.power_fails_at == Some(self.durable_ops) {
                self.powerless = true;
                return Err(MediumError::PowerLost);
            }
        }
        let Some((kind, nth, how)) = self.fail else {
            return Ok(());
        };
        if kind != call || nth != self.calls[call as usize] {
            return Ok(());
        }
        self.failed = true;
        let code = match how {
            Injected::Io => nix::libc::EIO,
            Injected::NoSpace => nix::libc::ENOSPC,
        };
        let error = std::io::Error::from_raw_os_error(code);
        Err(MediumError::from_io(
            name,
            call,
            range.start,
            range.end - range.start,
            error,
        ))
    }

    fn file(&mut self, name: &str) -> Result<&mut FileState, MediumError> {
        self.files
            .get_mut(name)
            .ok_or_else(|| MediumError::NotFound {
                file: name.to_owned(),
            })
    }
}

impl Volume for RecordingVolume {
    fn list(&self) -> Result<Vec<String>, MediumError> {
        let mut state = self.state();
        state.enter(Call::List, "", 0..0)?;
        Ok(state.files.keys().cloned().collect())
    }

    fn open(&self, name: &str, access: Access) -> Result<Arc<dyn Medium>, MediumError> {
        let mut state = self.state();
        state.enter(Call::Open, name, 0..0)?;
        let size = state.file(name)?.current.len() as u64;
        if access == Access::Mapped && (size == 0 || !size.is_multiple_of(PAGE)) {
            let len = size.next_multiple_of(PAGE).max(PAGE);
            let file = name.to_owned();
            return Err(MediumError::OutOfRange {
                file,
                call: Call::Open,
                offset: 0,
                len,
                size,
            });
        }
        Ok(Arc::new(RecordingFile {
            name: name.to_owned(),
            access,
            state: self.state.clone(),
        }))
    }

    fn create(&self, name: &str, len: u64, access: Access) -> Result<Arc<dyn Medium>, MediumError> {
        let mut state = self.state();
        state.enter(Call::Create, name, 0..len)?;
        let bytes = vec![0u8; len as usize];
        let file = FileState {
            current: bytes.clone(),
            durable: bytes,
            ..Default::default()
        };
        state.files.insert(name.to_owned(), file);
        Ok(Arc::new(RecordingFile {
            name: name.to_owned(),
            access,
            state: self.state.clone(),
        }))
    }

    fn remove(&self, name: &str) -> Result<(), MediumError> {
        let mut state = self.state();
        state.enter(Call::Remove, name, 0..0)?;
        state.file(name)?;
        state.files.remove(name);
        Ok(())
    }
}

/// One file of a [`RecordingVolume`].
#[derive(Debug)]
struct RecordingFile {
    name: String,
    access: Access,
    state: Arc<Mutex<State>>,
}

impl RecordingFile {
    /// Enters the call and finds the file; `range` must lie within `limit` of its length.
    fn with<T>(
        &self,
        call: Call,
        range: Range<u64>,
        act: impl FnOnce(&mut FileState) -> T,
    ) -> Result<T, MediumError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let entered = state.enter(call, &self.name, range.clone());
        let file = state.file(&self.name)?;
        if let Err(error) = entered {
            if call == Call::Sync && !matches!(error, MediumError::PowerLost) {
                // fsyncgate: the pages are marked clean and never written.
                for page in pages(&range) {
                    file.pending.remove(&page);
                }
            }
            return Err(error);
        }
        let size = file.current.len() as u64;
        if range.end > size && !matches!(call, Call::Sync | Call::Resize | Call::Close) {
            let (offset, len) = (range.start, range.end - range.start);
            let file = self.name.clone();
            return Err(MediumError::OutOfRange {
                file,
                call,
                offset,
                len,
                size,
            });
        }
        Ok(act(file))
    }
}

impl Medium for RecordingFile {
    fn len(&self) -> Result<u64, MediumError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(state.file(&self.name)?.current.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), MediumError> {
        let end = offset.saturating_add(out.len() as u64);
        self.with(Call::Read, offset..end, |file| {
            out.copy_from_slice(&file.current[offset as usize..end as usize]);
        })
    }

    fn store(&self, offset: u64, bytes: &[u8]) -> Result<(), MediumError> {
        let end = offset.saturating_add(bytes.len() as u64);
        self.with(Call::Store, offset..end, |file| {
            file.current[offset as usize..end as usize].copy_from_slice(bytes);
            for page in pages(&(offset..end)) {
                let from = offset.max(page * PAGE);
                let to = end.min((page + 1) * PAGE);
                file.pending.entry(page).or_default().push(PageStore {
                    at: (from - page * PAGE) as usize,
                    bytes: bytes[(from - offset) as usize..(to - offset) as usize].into(),
                });
            }
        })
    }

    fn sync(&self, range: Range<u64>) -> Result<(), MediumError> {
        self.with(Call::Sync, range.clone(), |file| {
            for page in pages(&range) {
                file.settle(page);
            }
        })
    }

    fn resize(&self, len: u64) -> Result<(), MediumError> {
        if self.access == Access::Mapped {
            let (file, size) = (self.name.clone(), self.len()?);
            return Err(MediumError::OutOfRange {
                file,
                call: Call::Resize,
                offset: 0,
                len,
                size,
            });
        }
        self.with(Call::Resize, 0..len, |file| {
            file.durable.resize(len as usize, 0);
            file.current.resize(len as usize, 0);
            file.pending.retain(|page, stores| {
                for store in stores.iter_mut() {
                    let room = (len.saturating_sub(*page * PAGE) as usize).saturating_sub(store.at);
                    if room < store.bytes.len() {
                        store.bytes = store.bytes[..room].into();
                    }
                }
                *page * PAGE < len
            });
        })
    }

    fn close(&self) -> Result<(), MediumError> {
        self.with(Call::Close, 0..0, |_| ())
    }
}
