//! Power loss on real files: kill the process, then take unsynced pages back.
//!
//! A killed process loses only what it keeps in memory, because the page cache survives it; so a kill
//! tests little durability. [`PowerFailMedium`] wraps a real file whose stores go to the page cache at
//! once (those of a mapped file too) and, before the first store to a page since its last sync, saves
//! that page's image in a side file `<name>.unsynced`. [`apply_power_loss`],
//! run while the node is down, makes each page that was still unsynced old, new or torn.
//!
//! Owns: the side file. Invariants: an image is in the side file (hence in the page cache, which a
//! kill spares) before the store that it precedes; an image is given up only after a sync that began
//! after the store has returned `Ok`.
//!
//! Side file: entries of a 32-byte header, little-endian, and for `Save` a page image.
//!
//! ```text
//! 0   tag u32 ("SAVE" or "DONE")     4   CRC-32C u32 of the rest of header and image
//! 8   Save: page number              Done: first page
//! 16  Save: bytes that existed       Done: page after the last
//! 24  Save: sequence number          Done: saves up to this number are given up
//! ```
//!
//! Deliberately absent: durability of the side file (the machine itself does not lose power here),
//! garbage sectors (the recording medium has them).

use super::dir::{DirOptions, DirVolume};
use super::{Call, Medium, MediumError, PAGE, SECTOR, SplitMix, Volume, pages};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Suffix of the side file.
pub const UNSYNCED: &str = ".unsynced";
const SAVE: u32 = u32::from_le_bytes(*b"SAVE");
const DONE: u32 = u32::from_le_bytes(*b"DONE");
const HEADER: usize = 32;
const ENTRY: u64 = HEADER as u64 + PAGE;
/// The side file is rewritten with its live images when it passes this length, bytes.
const COMPACT_AT: u64 = 64 << 20;

/// Wraps a real file; see the module's comment.
#[derive(Debug)]
pub struct PowerFailMedium {
    inner: Arc<dyn Medium>,
    journal: Mutex<Journal>,
}

/// One saved image: its number and where its entry stands in the side file.
#[derive(Debug, Clone, Copy)]
struct Saved {
    seq: u64,
    at: u64,
    existed: u64,
}

#[derive(Debug)]
struct Journal {
    name: String,
    file: File,
    path: std::path::PathBuf,
    end: u64,
    seq: u64,
    /// Saves up to this number precede the newest sync's beginning: a later store saves anew.
    begun: u64,
    saved: BTreeMap<u64, Vec<Saved>>,
}

impl PowerFailMedium {
    /// Wraps `inner`, whose side file is in `dir`; continues a side file left by a killed process.
    pub fn new(
        dir: &Path,
        name: &str,
        inner: Arc<dyn Medium>,
    ) -> Result<PowerFailMedium, MediumError> {
        let journal = Journal::open(dir, name)?;
        Ok(PowerFailMedium {
            inner,
            journal: Mutex::new(journal),
        })
    }

    fn journal(&self) -> MutexGuard<'_, Journal> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Medium for PowerFailMedium {
    fn len(&self) -> Result<u64, MediumError> {
        self.inner.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), MediumError> {
        self.inner.read(offset, out)
    }

    fn store(&self, offset: u64, bytes: &[u8]) -> Result<(), MediumError> {
        // Held over the store: a sync that begins later covers it, one that began earlier does not.
        let mut journal = self.journal();
        for page in pages(&(offset..offset + bytes.len() as u64)) {
            journal.save(page, &*self.inner)?;
        }
        self.inner.store(offset, bytes)
    }

    fn sync(&self, range: Range<u64>) -> Result<(), MediumError> {
        let begun = {
            let mut journal = self.journal();
            journal.begun = journal.seq;
            journal.begun
        };
        self.inner.sync(range.clone())?;
        self.journal().done(pages(&range), begun)
    }

    fn resize(&self, len: u64) -> Result<(), MediumError> {
        self.inner.resize(len)
    }

    fn prefault(&self, range: Range<u64>) {
        self.inner.prefault(range);
    }

    fn close(&self) -> Result<(), MediumError> {
        self.inner.close()
    }
}

impl Journal {
    fn open(dir: &Path, name: &str) -> Result<Journal, MediumError> {
        let path = dir.join(format!("{name}{UNSYNCED}"));
        let fail = |e| MediumError::from_io(name, Call::Open, 0, 0, e);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(fail)?;
        let mut journal = Journal {
            name: name.to_owned(),
            file,
            path,
            end: 0,
            seq: 0,
            begun: 0,
            saved: BTreeMap::new(),
        };
        journal.replay()?;
        Ok(journal)
    }

    fn fail(&self, call: Call, e: std::io::Error) -> MediumError {
        MediumError::from_io(
            &format!("{}{UNSYNCED}", self.name),
            call,
            self.end,
            ENTRY,
            e,
        )
    }

    /// Rebuilds the table from the file; stops at the first entry that was cut off.
    fn replay(&mut self) -> Result<(), MediumError> {
        let mut header = [0u8; HEADER];
        let mut image = vec![0u8; PAGE as usize];
        while self.file.read_exact_at(&mut header, self.end).is_ok() {
            let Some((tag, crc, a, b, seq)) = decode(&header) else {
                break;
            };
            match tag {
                SAVE => {
                    let at = self.end;
                    if self
                        .file
                        .read_exact_at(&mut image, at + HEADER as u64)
                        .is_err()
                        || crc != checksum(&header, &image)
                    {
                        break;
                    }
                    self.saved.entry(a).or_default().push(Saved {
                        seq,
                        at,
                        existed: b,
                    });
                    self.end += ENTRY;
                }
                _ if crc == checksum(&header, &[]) => {
                    self.give_up(a..b, seq);
                    self.end += HEADER as u64;
                }
                _ => break,
            }
            self.seq = self.seq.max(seq);
        }
        self.begun = self.seq;
        Ok(())
    }

    fn save(&mut self, page: u64, medium: &dyn Medium) -> Result<(), MediumError> {
        if self
            .saved
            .get(&page)
            .and_then(|s| s.last())
            .is_some_and(|s| s.seq > self.begun)
        {
            return Ok(());
        }
        let mut image = vec![0u8; PAGE as usize];
        let existed = medium.len()?.saturating_sub(page * PAGE).min(PAGE);
        medium.read(page * PAGE, &mut image[..existed as usize])?;
        self.seq += 1;
        let saved = Saved {
            seq: self.seq,
            at: self.end,
            existed,
        };
        self.append(SAVE, page, existed, self.seq, &image)?;
        self.saved.entry(page).or_default().push(saved);
        Ok(())
    }

    fn done(&mut self, range: Range<u64>, begun: u64) -> Result<(), MediumError> {
        if !self.give_up(range.clone(), begun) {
            return Ok(());
        }
        if self.saved.is_empty() {
            self.file
                .set_len(0)
                .map_err(|e| self.fail(Call::Resize, e))?;
            self.end = 0;
            return Ok(());
        }
        self.append(DONE, range.start, range.end, begun, &[])?;
        if self.end > COMPACT_AT {
            self.compact()
        } else {
            Ok(())
        }
    }

    /// Drops saves of `range` up to number `begun`; says whether there were any.
    fn give_up(&mut self, range: Range<u64>, begun: u64) -> bool {
        let mut any = false;
        let mut empty = Vec::new();
        for (page, saves) in self.saved.range_mut(range) {
            let before = saves.len();
            saves.retain(|s| s.seq > begun);
            any |= saves.len() < before;
            if saves.is_empty() {
                empty.push(*page);
            }
        }
        for page in empty {
            self.saved.remove(&page);
        }
        any
    }

    fn append(
        &mut self,
        tag: u32,
        a: u64,
        b: u64,
        seq: u64,
        image: &[u8],
    ) -> Result<(), MediumError> {
        let entry = encode(tag, a, b, seq, image);
        self.file
            .write_all_at(&entry, self.end)
            .map_err(|e| self.fail(Call::Store, e))?;
        self.end += entry.len() as u64;
        Ok(())
    }

    /// Rewrites the side file with the live images only, under a new name first.
    fn compact(&mut self) -> Result<(), MediumError> {
        let new = self.path.with_extension("compacting");
        let made = (|| {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(&new)?;
            let mut end = 0;
            let mut saved = self.saved.clone();
            for (page, saves) in &mut saved {
                for save in saves {
                    let image = self.image(save)?;
                    let entry = encode(SAVE, *page, save.existed, save.seq, &image);
                    file.write_all_at(&entry, end)?;
                    save.at = end;
                    end += ENTRY;
                }
            }
            std::fs::rename(&new, &self.path)?;
            Ok((file, end, saved))
        })();
        (self.file, self.end, self.saved) = made.map_err(|e| self.fail(Call::Create, e))?;
        Ok(())
    }

    fn image(&self, save: &Saved) -> std::io::Result<Vec<u8>> {
        let mut image = vec![0u8; PAGE as usize];
        self.file
            .read_exact_at(&mut image, save.at + HEADER as u64)?;
        Ok(image)
    }
}

fn checksum(header: &[u8; HEADER], image: &[u8]) -> u32 {
    crate::crc::crc32c_of_all(&[&header[8..], image])
}

fn encode(tag: u32, a: u64, b: u64, seq: u64, image: &[u8]) -> Vec<u8> {
    let mut header = [0u8; HEADER];
    header[0..4].copy_from_slice(&tag.to_le_bytes());
    header[8..16].copy_from_slice(&a.to_le_bytes());
    header[16..24].copy_from_slice(&b.to_le_bytes());
    header[24..32].copy_from_slice(&seq.to_le_bytes());
    let crc = checksum(&header, image);
    header[4..8].copy_from_slice(&crc.to_le_bytes());
    [&header[..], image].concat()
}

fn decode(header: &[u8; HEADER]) -> Option<(u32, u32, u64, u64, u64)> {
    let (words, _) = header.as_chunks::<8>();
    let [first, a, b, seq] = words else {
        return None;
    };
    let first = u64::from_le_bytes(*first);
    let tag = first as u32;
    let [a, b, seq] = [a, b, seq].map(|w| u64::from_le_bytes(*w));
    (tag == SAVE && b <= PAGE || tag == DONE).then_some((tag, (first >> 32) as u32, a, b, seq))
}

/// What a power loss did to the pages that were unsynced.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PowerLoss {
    /// Pages put back to their last durable image (or one between two syncs).
    pub old: u64,
    /// Pages left as they were.
    pub new: u64,
    /// Pages made of sectors of both.
    pub torn: u64,
}

/// Rewrites each unsynced page below `dir` as old, new or torn, as `seed` decides, and empties the
/// side files. Only while the node is down.
///
/// # Errors
/// [`MediumError::InUse`] while the node runs; I/O errors, after which it may be called again.
pub fn apply_power_loss(dir: impl AsRef<Path>, seed: u64) -> Result<PowerLoss, MediumError> {
    let dir = dir.as_ref();
    let volume = DirVolume::open(dir, DirOptions::default())?;
    let mut rng = SplitMix(seed);
    let mut loss = PowerLoss::default();
    for side in volume.list()? {
        let Some(name) = side.strip_suffix(UNSYNCED) else {
            continue;
        };
        let io = |call, e| MediumError::from_io(name, call, 0, 0, e);
        let journal = Journal::open(dir, name)?;
        let target = match OpenOptions::new()
            .read(true)
            .write(true)
            .open(dir.join(name))
        {
            Ok(target) => Some(target),
            // The file was removed after its last store.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(io(Call::Open, e)),
        };
        if let Some(target) = target {
            for (page, saves) in &journal.saved {
                lose_page(&target, *page, saves, &journal, &mut rng, &mut loss)
                    .map_err(|e| io(Call::Store, e))?;
            }
            target.sync_all().map_err(|e| io(Call::Sync, e))?;
        }
        journal.file.set_len(0).map_err(|e| io(Call::Resize, e))?;
    }
    Ok(loss)
}

fn lose_page(
    target: &File,
    page: u64,
    saves: &[Saved],
    journal: &Journal,
    rng: &mut SplitMix,
    loss: &mut PowerLoss,
) -> std::io::Result<()> {
    // The first image is the last durable one; later ones may have been written back by a sync
    // that was under way.
    let Some(save) = saves.get((rng.next_u64() % saves.len().max(1) as u64) as usize) else {
        return Ok(());
    };
    let old = journal.image(save)?;
    let start = page * PAGE;
    let len = target.metadata()?.len().saturating_sub(start).min(PAGE) as usize;
    let sectors = (PAGE / SECTOR) as u32;
    let keep_new: u64 = match rng.next_u64() % 4 {
        0 => {
            loss.old += 1;
            0
        }
        1 => {
            loss.new += 1;
            u64::MAX
        }
        choice => {
            loss.torn += 1;
            // A prefix of the sectors, or any subset.
            if choice == 2 {
                (1 << (rng.next_u64() % u64::from(sectors))) - 1
            } else {
                rng.next_u64()
            }
        }
    };
    for sector in 0..sectors as usize {
        if keep_new >> sector & 1 == 0 {
            let from = sector * SECTOR as usize;
            let to = (from + SECTOR as usize).min(len);
            if from < to {
                target.write_all_at(&old[from..to], start + from as u64)?;
            }
        }
    }
    Ok(())
}
