//! The values of the file tree's objects, byte by byte. All numbers are little-endian.
//!
//! ```text
//! Entry     0 version=1  1 kind  2..8 zero  8..16 ino
//!
//! Inode     0 version=1  1 kind  2..4 mode  4..8 uid  8..12 gid  12..16 mtime ns
//!          16..24 mtime s (signed)  24..32 size  32 chunk size, log2 (files; else 0)
//!          33 checksum kind = 0 (none)  34..36 zero  36..40 writes (files; else 0)
//!          40.. target (symlinks: `size` bytes)
//!
//! Parent    0 version=1  1..8 zero  8..16 ino of the parent (the root's is its own)
//!
//! Chunk     0 form: 1 = the bytes follow   1.. bytes
//!           0 form: 2 = so many zero bytes 1..5 length
//!
//! Pending   0 version=1  1..8 zero  8..16 ino that the file will have
//!
//! Freeing   0 version=1  1..8 zero  8..16 chunks that the file had
//! ```
//!
//! A count is the engine's own word of eight bytes and has no version: the engine adds to it.
//!
//! Every value read is hostile: decoding checks every byte, reserved ones included, and answers
//! with a [`Malformed`] reason. What is encoded decodes to itself.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use lowtide_engine_core::op::Bytes;

use super::{CHUNK_LOG2_MAX, CHUNK_LOG2_MIN, Ino};

const VERSION: u8 = 1;
const FORM_BYTES: u8 = 1;
const FORM_ZEROS: u8 = 2;
const NSEC_PER_SEC: u32 = 1_000_000_000;
/// Bytes of a line of the processor's cache.
const LINE: usize = 64;

/// Longest target of a symbolic link, in bytes (Linux's `PATH_MAX` without the NUL).
pub const TARGET_MAX: usize = 4095;

mod field {
    use std::ops::Range;

    pub const VERSION: usize = 0;
    pub const KIND: usize = 1;
    /// Ino of an entry, a parent and a pending note; chunks of a freeing note.
    pub const WORD: Range<usize> = 8..16;
    pub const WORD_END: usize = 16;

    pub const MODE: Range<usize> = 2..4;
    pub const UID: Range<usize> = 4..8;
    pub const GID: Range<usize> = 8..12;
    pub const MTIME_NSEC: Range<usize> = 12..16;
    pub const MTIME_SEC: Range<usize> = 16..24;
    pub const SIZE: Range<usize> = 24..32;
    pub const CHUNK_LOG2: usize = 32;
    /// Checksum kind and two more bytes that are zero.
    pub const RESERVED: Range<usize> = 33..36;
    pub const WRITES: Range<usize> = 36..40;
    pub const INODE_END: usize = 40;
}

/// Why bytes are not the value they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// Too short, or longer than its contents say.
    #[error("wrong length")]
    Length,
    /// A version or form that this program does not know.
    #[error("unknown version {0}")]
    Version(u8),
    /// A kind that does not exist.
    #[error("unknown kind {0}")]
    Kind(u8),
    /// A reserved byte is not zero.
    #[error("a reserved byte is set")]
    Reserved,
    /// A field has a value outside its range.
    #[error("a field is out of range")]
    Range,
    /// The key is not one that this kind of object can have.
    #[error("a misshapen key")]
    Key,
    /// The object is absent although another one says that it exists.
    #[error("a missing object")]
    Missing,
    /// The object contradicts another one.
    #[error("a contradiction between objects")]
    Contradiction,
}

/// Kind of an inode. Never changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
}

impl Kind {
    fn encode(self) -> u8 {
        match self {
            Kind::File => 1,
            Kind::Directory => 2,
            Kind::Symlink => 3,
        }
    }

    fn decode(byte: u8) -> Result<Kind, Malformed> {
        match byte {
            1 => Ok(Kind::File),
            2 => Ok(Kind::Directory),
            3 => Ok(Kind::Symlink),
            other => Err(Malformed::Kind(other)),
        }
    }
}

/// What a name in a directory stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The inode.
    pub ino: Ino,
    /// Its kind, so that listing a directory needs no inode.
    pub kind: Kind,
}

impl Entry {
    /// The value of an entry object.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut bytes = word(self.ino.get());
        bytes[field::KIND] = self.kind.encode();
        Bytes::from(bytes)
    }

    /// Reads the value of an entry object.
    ///
    /// # Errors
    /// The reason why the bytes are no entry.
    pub fn decode(bytes: &[u8]) -> Result<Entry, Malformed> {
        let kind = *bytes.get(field::KIND).ok_or(Malformed::Length)?;
        let number = read_word(bytes, 2)?;
        Ok(Entry {
            ino: Ino::new(number).ok_or(Malformed::Range)?,
            kind: Kind::decode(kind)?,
        })
    }
}

/// What the owner of a file, directory or symbolic link may change about it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Permission bits with set-user, set-group and sticky: at most `0o7777`.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time, seconds since 1970.
    pub mtime_sec: i64,
    /// Nanoseconds within the second, below 10^9.
    pub mtime_nsec: u32,
}

impl Attributes {
    /// Whether every field is in its range.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        self.mode <= 0o7777 && self.mtime_nsec < NSEC_PER_SEC
    }
}

/// A file, directory or symbolic link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inode {
    /// What it is.
    pub kind: Kind,
    /// What its owner may change.
    pub attributes: Attributes,
    /// Bytes of a file, length of a symbolic link's target, 0 of a directory.
    pub size: u64,
    /// Size of a file's chunks as a power of two; 0 for anything else.
    pub chunk_log2: u8,
    /// How often bytes were written into the file, modulo 2^32: tells contents of equal size
    /// apart.
    pub writes: u32,
    /// Target of a symbolic link; empty for anything else.
    pub target: Vec<u8>,
}

impl Inode {
    /// The value of an inode object.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut bytes = vec![0; field::INODE_END + self.target.len()];
        bytes[field::VERSION] = VERSION;
        bytes[field::KIND] = self.kind.encode();
        bytes[field::MODE].copy_from_slice(&self.attributes.mode.to_le_bytes());
        bytes[field::UID].copy_from_slice(&self.attributes.uid.to_le_bytes());
        bytes[field::GID].copy_from_slice(&self.attributes.gid.to_le_bytes());
        bytes[field::MTIME_NSEC].copy_from_slice(&self.attributes.mtime_nsec.to_le_bytes());
        bytes[field::MTIME_SEC].copy_from_slice(&self.attributes.mtime_sec.to_le_bytes());
        bytes[field::SIZE].copy_from_slice(&self.size.to_le_bytes());
        bytes[field::CHUNK_LOG2] = self.chunk_log2;
        bytes[field::WRITES].copy_from_slice(&self.writes.to_le_bytes());
        bytes[field::INODE_END..].copy_from_slice(&self.target);
        debug_assert!(Inode::decode(&bytes).as_ref() == Ok(self));
        Bytes::from(bytes)
    }

    /// Reads the value of an inode object.
    ///
    /// # Errors
    /// The reason why the bytes are no inode.
    pub fn decode(bytes: &[u8]) -> Result<Inode, Malformed> {
        let (head, target) = bytes
            .split_at_checked(field::INODE_END)
            .ok_or(Malformed::Length)?;
        if head[field::VERSION] != VERSION {
            return Err(Malformed::Version(head[field::VERSION]));
        }
        if head[field::RESERVED].iter().any(|&b| b != 0) {
            return Err(Malformed::Reserved);
        }
        let inode = Inode {
            kind: Kind::decode(head[field::KIND])?,
            attributes: Attributes {
                mode: u16::from_le_bytes(array(head, field::MODE)),
                uid: u32::from_le_bytes(array(head, field::UID)),
                gid: u32::from_le_bytes(array(head, field::GID)),
                mtime_sec: i64::from_le_bytes(array(head, field::MTIME_SEC)),
                mtime_nsec: u32::from_le_bytes(array(head, field::MTIME_NSEC)),
            },
            size: u64::from_le_bytes(array(head, field::SIZE)),
            chunk_log2: head[field::CHUNK_LOG2],
            writes: u32::from_le_bytes(array(head, field::WRITES)),
            target: target.to_vec(),
        };
        inode.validate()?;
        Ok(inode)
    }

    /// Bytes of a chunk; 0 for anything but a file.
    #[must_use]
    pub fn chunk_size(&self) -> u64 {
        match self.kind {
            Kind::File => 1 << self.chunk_log2,
            _ => 0,
        }
    }

    /// How many chunks the file has: every byte below its size is in one.
    #[must_use]
    pub fn chunks(&self) -> u64 {
        match self.kind {
            Kind::File => self.size.div_ceil(1 << self.chunk_log2),
            _ => 0,
        }
    }

    /// Bytes in chunk `chunk`, 0 beyond the end.
    #[must_use]
    pub fn chunk_len(&self, chunk: u64) -> u64 {
        let size = self.chunk_size();
        self.size
            .saturating_sub(chunk.saturating_mul(size))
            .min(size)
    }

    fn validate(&self) -> Result<(), Malformed> {
        if !self.attributes.is_valid() || i64::try_from(self.size).is_err() {
            return Err(Malformed::Range);
        }
        let chunked = (CHUNK_LOG2_MIN..=CHUNK_LOG2_MAX).contains(&self.chunk_log2);
        if self.kind != Kind::File && (self.chunk_log2, self.writes) != (0, 0) {
            return Err(Malformed::Range);
        }
        let fits = match self.kind {
            Kind::File => chunked && self.target.is_empty(),
            Kind::Directory => self.size == 0 && self.target.is_empty(),
            Kind::Symlink => {
                self.size == self.target.len() as u64
                    && (1..=TARGET_MAX).contains(&self.target.len())
                    && !self.target.contains(&0)
            }
        };
        if fits { Ok(()) } else { Err(Malformed::Range) }
    }
}

/// Link from a directory to its parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parent(
    /// The parent; the root names itself.
    pub Ino,
);

impl Parent {
    /// The value of a parent object.
    #[must_use]
    pub fn encode(self) -> Bytes {
        Bytes::from(word(self.0.get()))
    }

    /// Reads the value of a parent object.
    ///
    /// # Errors
    /// The reason why the bytes are no parent.
    pub fn decode(bytes: &[u8]) -> Result<Parent, Malformed> {
        Ino::new(read_word(bytes, 1)?)
            .map(Parent)
            .ok_or(Malformed::Range)
    }
}

/// Note that a file is being written whose name does not stand in its directory yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending(
    /// The inode number that its chunks already carry.
    pub Ino,
);

impl Pending {
    /// The value of a pending note.
    #[must_use]
    pub fn encode(self) -> Bytes {
        Bytes::from(word(self.0.get()))
    }

    /// Reads the value of a pending note.
    ///
    /// # Errors
    /// The reason why the bytes are no pending note.
    pub fn decode(bytes: &[u8]) -> Result<Pending, Malformed> {
        Ino::new(read_word(bytes, 1)?)
            .map(Pending)
            .ok_or(Malformed::Range)
    }
}

/// Note that a file is gone except for chunks of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Freeing {
    /// How many chunks the file had; some of `0 .. chunks` are still to be deleted.
    pub chunks: u64,
}

impl Freeing {
    /// No file has more chunks.
    pub const CHUNKS_MAX: u64 = (i64::MAX as u64 >> CHUNK_LOG2_MIN) + 1;

    /// The value of a freeing note.
    #[must_use]
    pub fn encode(self) -> Bytes {
        Bytes::from(word(self.chunks))
    }

    /// Reads the value of a freeing note.
    ///
    /// # Errors
    /// The reason why the bytes are no freeing note.
    pub fn decode(bytes: &[u8]) -> Result<Freeing, Malformed> {
        let chunks = read_word(bytes, 1)?;
        if chunks > Self::CHUNKS_MAX {
            return Err(Malformed::Range);
        }
        Ok(Freeing { chunks })
    }
}

/// Memory of chunks, taken again when nobody holds what was in it: fresh pages cost as much as the
/// copy into them.
#[derive(Debug, Default)]
pub struct Rooms(VecDeque<Arc<[u8]>>);

impl Rooms {
    /// Bytes kept, those included that are still held by others.
    const BYTES_MAX: usize = 64 << 20;

    /// Room for a value of a chunk that nobody else has, and where the value is in it.
    ///
    /// The contents, behind the form byte, begin where a cache line does: the kernel's copies are
    /// slower to other places, and slowest close behind the same offset of another page, which is where
    /// the page cache has what is read.
    fn take(&mut self, contents_max: usize) -> (Arc<[u8]>, Range<usize>) {
        let len = contents_max + LINE;
        // The oldest is the first to be let go.
        let is_free = |room: &mut Arc<[u8]>| room.len() == len && Arc::get_mut(room).is_some();
        let found = self.0.pop_front_if(is_free);
        let room: Arc<[u8]> = found.unwrap_or_else(|| std::iter::repeat_n(0, len).collect());
        let begin = room[1..].as_ptr().align_offset(LINE);
        (room, begin..begin + 1 + contents_max)
    }

    fn keep(&mut self, room: &Arc<[u8]>) {
        self.0.push_back(room.clone());
        while self.0.len().saturating_mul(room.len()) > Rooms::BYTES_MAX {
            self.0.pop_front();
        }
    }
}

/// Contents of one chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// The value of a chunk object: the form byte, then the contents.
    Bytes(Bytes),
    /// So many zero bytes.
    Zeros(u32),
}

impl Chunk {
    /// A chunk with the given contents. Zeros are not kept.
    #[must_use]
    pub fn new(contents: &[u8]) -> Chunk {
        if !contents.is_empty() && contents.iter().all(|&b| b == 0) {
            return Chunk::Zeros(u32::try_from(contents.len()).unwrap_or(u32::MAX));
        }
        let mut value = Vec::with_capacity(1 + contents.len());
        value.push(FORM_BYTES);
        value.extend_from_slice(contents);
        Chunk::Bytes(Bytes::from(value))
    }

    /// As [`Chunk::new`], copying once: the contents begin at the second byte of `framed`, the
    /// first is overwritten.
    #[must_use]
    pub fn from_framed(framed: &mut [u8]) -> Chunk {
        match framed {
            [form, contents @ ..] if contents.iter().any(|&b| b != 0) => *form = FORM_BYTES,
            _ => return Chunk::new(framed.get(1..).unwrap_or_default()),
        }
        Chunk::Bytes(Bytes::from(&*framed))
    }

    /// A chunk whose contents `fill` puts where they are kept: into the first bytes of the room it is
    /// given, of which it returns how many it used. `None` if it used none. What the room holds
    /// before is not said.
    ///
    /// # Errors
    /// Those of `fill`.
    pub fn fill<E>(
        rooms: &mut Rooms,
        len_max: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<Option<Chunk>, E> {
        let (mut room, place) = rooms.take(len_max);
        let mut len = 0;
        let whole = Arc::get_mut(&mut room).expect("nobody else has it");
        if let [form, contents @ ..] = &mut whole[place.clone()] {
            *form = FORM_BYTES;
            len = fill(contents)?;
        }
        rooms.keep(&room);
        let framed = &room[place.clone()];
        let contents = framed.get(1..1 + len).unwrap_or_default();
        if contents.is_empty() {
            return Ok(None);
        }
        // A short end is copied: it would keep all of its room.
        if len < len_max || contents.iter().all(|&b| b == 0) {
            return Ok(Some(Chunk::new(contents)));
        }
        // Now, while they are in the processor's cache.
        let checksum = crc_fast::crc32_iscsi(framed);
        let value = Bytes::part_of(&room, place).expect("a place within the room");
        Ok(Some(Chunk::Bytes(value.with_checksum(checksum))))
    }

    /// The value of a chunk object.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        match self {
            Chunk::Bytes(value) => value.clone(),
            Chunk::Zeros(length) => {
                let mut value = [FORM_ZEROS, 0, 0, 0, 0];
                value[1..].copy_from_slice(&length.to_le_bytes());
                Bytes::from(value)
            }
        }
    }

    /// Reads the value of a chunk object; contents are not copied.
    ///
    /// # Errors
    /// The reason why the bytes are no chunk.
    pub fn decode(value: &Bytes) -> Result<Chunk, Malformed> {
        let (&form, rest) = value.split_first().ok_or(Malformed::Length)?;
        let chunk = match form {
            FORM_BYTES => Chunk::Bytes(value.clone()),
            FORM_ZEROS => Chunk::Zeros(u32::from_le_bytes(
                rest.try_into().map_err(|_| Malformed::Length)?,
            )),
            other => return Err(Malformed::Version(other)),
        };
        if chunk.len() == 0 || chunk.len() > 1 << CHUNK_LOG2_MAX {
            return Err(Malformed::Range);
        }
        Ok(chunk)
    }

    /// Bytes of contents.
    #[must_use]
    #[allow(clippy::len_without_is_empty)] // a chunk is never empty
    pub fn len(&self) -> usize {
        match self {
            Chunk::Bytes(value) => value.len() - 1,
            Chunk::Zeros(length) => *length as usize,
        }
    }

    /// The contents where they are kept, `None` for zeros.
    #[must_use]
    pub fn contents(&self) -> Option<&[u8]> {
        match self {
            Chunk::Bytes(value) => Some(&value[1..]),
            Chunk::Zeros(_) => None,
        }
    }

    /// Copies contents from `offset` on to `to`; returns how many bytes were copied.
    pub fn copy_to(&self, offset: usize, to: &mut [u8]) -> usize {
        let length = self.len().saturating_sub(offset).min(to.len());
        match self.contents() {
            Some(contents) => to[..length].copy_from_slice(&contents[offset..offset + length]),
            None => to[..length].fill(0),
        }
        length
    }

    /// Whether the contents are these bytes.
    #[must_use]
    pub fn equals(&self, bytes: &[u8]) -> bool {
        match self.contents() {
            Some(contents) => contents == bytes,
            None => bytes.len() == self.len() && bytes.iter().all(|&b| b == 0),
        }
    }
}

/// The value of the note that a directory is removed.
#[must_use]
pub fn removed_value() -> Bytes {
    Bytes::from([VERSION])
}

/// A count, or an amount to add to one, as the engine's word.
#[must_use]
pub fn count_value(count: i64) -> Bytes {
    Bytes::from(count.to_le_bytes())
}

/// Reads a count.
///
/// # Errors
/// [`Malformed::Length`] when the bytes are not one word.
pub fn read_count(bytes: &[u8]) -> Result<i64, Malformed> {
    Ok(i64::from_le_bytes(
        bytes.try_into().map_err(|_| Malformed::Length)?,
    ))
}

fn word(number: u64) -> [u8; field::WORD_END] {
    let mut bytes = [0; field::WORD_END];
    bytes[field::VERSION] = VERSION;
    bytes[field::WORD].copy_from_slice(&number.to_le_bytes());
    bytes
}

/// The word of a 16-byte value whose bytes from `reserved` up to the word must be zero.
fn read_word(bytes: &[u8], reserved: usize) -> Result<u64, Malformed> {
    if bytes.len() != field::WORD_END {
        return Err(Malformed::Length);
    }
    if bytes[field::VERSION] != VERSION {
        return Err(Malformed::Version(bytes[field::VERSION]));
    }
    if bytes[reserved..field::WORD.start].iter().any(|&b| b != 0) {
        return Err(Malformed::Reserved);
    }
    Ok(u64::from_le_bytes(array(bytes, field::WORD)))
}

/// The bytes of a field that the caller has made sure of.
fn array<const N: usize>(bytes: &[u8], range: std::ops::Range<usize>) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[range]);
    out
}
