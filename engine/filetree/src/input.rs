//! Reading directories of this machine: everything relative to open directories, nothing followed.
//!
//! Owns: listing a directory into compact memory, attributes of what is found, and telling when a
//! file changed while it was read. Deliberately absent: writing (`fetch`), trees of the engine.

use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, Stat};
use rustix::io::Errno;

use crate::layout::{self, Attributes, Kind};

/// Bytes of directory entries read by one system call.
const DIRENT_BYTES: usize = 32 << 10;

/// What a directory entry is, as far as storing is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sort {
    /// Something a tree can hold.
    Kind(Kind),
    /// A device node, socket or FIFO.
    Special,
}

impl Sort {
    fn of(file_type: FileType) -> Sort {
        match file_type {
            FileType::RegularFile => Sort::Kind(Kind::File),
            FileType::Directory => Sort::Kind(Kind::Directory),
            FileType::Symlink => Sort::Kind(Kind::Symlink),
            _ => Sort::Special,
        }
    }
}

/// A directory on the way down, for naming what is found in it, with what a walk wants to know
/// about it.
#[derive(Debug)]
pub(crate) struct Place<D> {
    parent: Option<Arc<Place<D>>>,
    name: Vec<u8>,
    /// What the walk knows.
    pub data: D,
}

impl<D> Place<D> {
    /// Where a walk begins.
    pub fn root(data: D) -> Arc<Self> {
        Arc::new(Place {
            parent: None,
            name: Vec::new(),
            data,
        })
    }

    /// The directory `name` in `parent`.
    pub fn below(parent: &Arc<Self>, name: &[u8], data: D) -> Arc<Self> {
        Arc::new(Place {
            parent: Some(Arc::clone(parent)),
            name: name.to_vec(),
            data,
        })
    }

    /// Name within the parent; empty for the root.
    pub fn name(&self) -> &[u8] {
        &self.name
    }

    /// The directory that holds this one.
    pub fn parent(&self) -> Option<&Arc<Self>> {
        self.parent.as_ref()
    }

    /// Path from the root, without a leading `/`; `.` for the root itself.
    pub fn path(&self) -> Vec<u8> {
        let mut parts: Vec<&[u8]> = Vec::new();
        let mut at = Some(self);
        while let Some(place) = at {
            if place.parent.is_some() {
                parts.push(&place.name);
            }
            at = place.parent.as_deref();
        }
        if parts.is_empty() {
            return b".".to_vec();
        }
        parts.reverse();
        parts.join(&b'/')
    }

    /// Path from the root of something in this directory.
    pub fn path_of(&self, name: &[u8]) -> Vec<u8> {
        if self.parent.is_none() {
            return name.to_vec();
        }
        let mut path = self.path();
        path.push(b'/');
        path.extend_from_slice(name);
        path
    }
}

impl<D> Drop for Place<D> {
    /// A chain of places is as long as a tree is deep; dropped one by one, not by recursion.
    fn drop(&mut self) {
        let mut next = self.parent.take();
        while let Some(place) = next {
            next = Arc::into_inner(place).and_then(|mut place| place.parent.take());
        }
    }
}

/// The entries of one directory, in the order in which a stored directory has them.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    names: Vec<u8>,
    items: Vec<Item>,
}

#[derive(Clone, Copy, Debug)]
struct Item {
    slot: u64,
    begin: u32,
    length: u16,
    sort: Sort,
}

/// One entry of a [`Listing`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found<'l> {
    pub slot: u64,
    pub name: &'l [u8],
    pub sort: Sort,
}

impl Listing {
    /// Lists an open directory.
    pub fn of(directory: &OwnedFd) -> Result<Listing, Errno> {
        let mut listing = Listing::default();
        let mut buffer = vec![MaybeUninit::uninit(); DIRENT_BYTES];
        let mut entries = RawDir::new(directory.as_fd(), &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            let file_type = match entry.file_type() {
                FileType::Unknown => match stat_at(directory, name) {
                    Ok(stat) => FileType::from_raw_mode(stat.st_mode),
                    Err(Errno::NOENT) => continue,
                    Err(e) => return Err(e),
                },
                known => known,
            };
            listing.push(name, Sort::of(file_type))?;
        }
        let Listing { names, items } = &mut listing;
        items
            .sort_unstable_by(|a, b| (a.slot, name_of(names, a)).cmp(&(b.slot, name_of(names, b))));
        Ok(listing)
    }

    fn push(&mut self, name: &[u8], sort: Sort) -> Result<(), Errno> {
        let item = Item {
            slot: layout::name_slot(name),
            begin: u32::try_from(self.names.len()).map_err(|_| Errno::OVERFLOW)?,
            length: u16::try_from(name.len()).map_err(|_| Errno::NAMETOOLONG)?,
            sort,
        };
        self.names.extend_from_slice(name);
        self.items.push(item);
        Ok(())
    }

    pub fn len(&self) -> usize {
        self.items.len()
    }

    pub fn at(&self, index: usize) -> Found<'_> {
        let item = &self.items[index];
        Found {
            slot: item.slot,
            name: name_of(&self.names, item),
            sort: item.sort,
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = Found<'_>> {
        (0..self.items.len()).map(|i| self.at(i))
    }
}

fn name_of<'l>(names: &'l [u8], item: &Item) -> &'l [u8] {
    &names[item.begin as usize..][..usize::from(item.length)]
}

/// Opens the directory that a walk begins with.
pub(crate) fn open_root(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
}

/// Opens a directory within an open one.
pub(crate) fn open_directory(parent: &OwnedFd, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, c_name(name)?, flags, Mode::empty())
}

/// Opens a directory by its path from an open one, also where the path is longer than a system
/// call takes.
pub(crate) fn open_beneath(root: &OwnedFd, path: &[u8]) -> Result<OwnedFd, Errno> {
    /// Below Linux's `PATH_MAX` with the longest name to spare.
    const PIECE_MAX: usize = 3800;
    let mut at = None;
    let mut rest = path;
    while rest.len() > PIECE_MAX {
        let cut = rest[..PIECE_MAX].iter().rposition(|&b| b == b'/');
        let (piece, after) = rest.split_at(cut.ok_or(Errno::NAMETOOLONG)?);
        at = Some(open_directory(at.as_ref().unwrap_or(root), piece)?);
        rest = &after[1..];
    }
    open_directory(at.as_ref().unwrap_or(root), rest)
}

/// Opens a file within an open directory. Never blocks, should it have become a FIFO.
pub(crate) fn open_file(parent: &OwnedFd, name: &[u8]) -> Result<File, Errno> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::openat(parent, c_name(name)?, flags, Mode::empty()).map(File::from)
}

/// Attributes of a name itself, not of what a symbolic link points to.
pub(crate) fn stat_at(parent: &OwnedFd, name: &[u8]) -> Result<Stat, Errno> {
    rustix::fs::statat(parent, c_name(name)?, AtFlags::SYMLINK_NOFOLLOW)
}

/// Target of a symbolic link.
pub(crate) fn read_link(parent: &OwnedFd, name: &[u8]) -> Result<Vec<u8>, Errno> {
    let target = rustix::fs::readlinkat(parent, c_name(name)?, Vec::new())?;
    Ok(target.into_bytes())
}

/// A name as system calls want it.
pub(crate) fn c_name(name: &[u8]) -> Result<CString, Errno> {
    CString::new(name).map_err(|_| Errno::INVAL)
}

/// What a tree keeps of a file's attributes.
pub(crate) fn attributes(stat: &Stat) -> Attributes {
    Attributes {
        mode: (stat.st_mode & 0o7777) as u16,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime_sec: stat.st_mtime,
        mtime_nsec: stat.st_mtime_nsec as u32,
    }
}

/// What a name found in a directory turned out to be.
pub(crate) fn sort_of(stat: &Stat) -> Sort {
    Sort::of(FileType::from_raw_mode(stat.st_mode))
}

/// Identity of an inode of this machine: device and inode number.
pub(crate) fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

/// Whether a file is as it was: same inode, size, and times of modification and change.
pub(crate) fn is_unchanged(before: &Stat, after: &Stat) -> bool {
    let key = |s: &Stat| {
        (
            identity(s),
            s.st_size,
            (s.st_mtime, s.st_mtime_nsec),
            (s.st_ctime, s.st_ctime_nsec),
        )
    };
    key(before) == key(after)
}

/// Fills `buffer` from a file as far as it goes; returns how far.
pub(crate) fn read_full(file: &mut impl Read, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}
