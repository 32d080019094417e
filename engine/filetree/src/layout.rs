//! How a file tree is laid out as objects: which key holds what, and which server keeps it.
//!
//! | what | home | space | slot | name | value |
//! |---|---|---|---|---|---|
//! | entry | `home(directory)` | `NAMES` + directory's ino | [`name_slot`] of the name | the name | [`Entry`] |
//! | inode | `home(ino)` | `INODES` | ino | empty | [`Inode`] |
//! | count | `home(ino)` | `INODES` | ino | `n` | one little-endian i64 |
//! | parent | `home(ino)` | `INODES` | ino | `p` | [`Parent`], directories only |
//! | chunk | `chunk_home(ino, i)` | `DATA` | ino | `i`, 8 bytes big-endian | [`Chunk`] |
//! | removed note | `home(directory)` | `NAMES` + directory's ino | [`REMOVED_SLOT`] | empty | version byte 1 |
//! | unfinished file | `home(directory)` | `PENDING` | hash of directory and name | directory's ino, 8 bytes big-endian, then the name | [`Pending`] |
//! | freed file | `home(ino)` | `FREEING` | ino | empty | [`Freeing`] |
//!
//! The *count* of a directory is how many entries it has, of anything else how many names. It is
//! changed by commutative additions.
//!
//! A *removed note* is all that stays of a removed directory, for good: who adds a name demands
//! its absence, so somebody who still knows the number cannot bring entries into it. That
//! absence, other than the presence of an inode, is proven by the same lock on a range of fresh
//! names that proves the absence of the name itself, so creating in a new directory asks nobody.
//! The note's slot is the last one: locks are taken in the order of slots, and the lock on the
//! name, widened as far as nobody minds, then covers it too.
//!
//! An inode number is unique without coordination: it is made of the life that allocates it and
//! a counter of that life.
//!
//! ```text
//!  63 62            47 46                27 26                      0
//! +--+----------------+--------------------+-------------------------+
//! | 0|  node (16)     | incarnation (20)   | counter (27)            |
//! +--+----------------+--------------------+-------------------------+
//! ```
//!
//! The numbers below [`FIRST_COUNTER`] of every life are reserved; the root directory has number
//! 1 of node 0 in incarnation 0. The home of an inode follows from a mix of its number, so a
//! directory may live on another server than its parent, and a file on another than its name.
//! The entries of a directory live where its inode lives: an operation that creates a name and
//! proves its directory alive then needs one metadata server for both.
//!
//! Deliberately absent: locks and requests (`plan`), and anything that changes with the number
//! of servers, which is fixed for the life of a cluster.

use lowtide_engine_core::ids::{Incarnation, Life, NodeId};
use lowtide_engine_core::op::{Key, Range};
use lowtide_engine_core::session::Placement;

use crate::error::TreeError;

mod value;

pub use value::{
    Attributes, Chunk, Entry, Freeing, Inode, Kind, Malformed, Parent, Pending, Rooms, TARGET_MAX,
    count_value, read_count, removed_value,
};

/// Longest file name, in bytes (Linux's `NAME_MAX`).
pub const FILE_NAME_MAX: usize = 255;
/// Smallest chunk size, as a power of two: 4 KiB.
pub const CHUNK_LOG2_MIN: u8 = 12;
/// Largest chunk size, as a power of two: 4 MiB, so that a chunk and its header fit one update.
pub const CHUNK_LOG2_MAX: u8 = 22;
/// Chunk size of new files unless told otherwise: 1 MiB, as Lustre's stripes.
pub const CHUNK_LOG2_DEFAULT: u8 = 20;
/// First counter that a life hands out.
pub const FIRST_COUNTER: u64 = 16;

const COUNTER_BITS: u32 = 27;
const INCARNATION_BITS: u32 = 20;
const NODE_BITS: u32 = 16;
const _: () = assert!(COUNTER_BITS + INCARNATION_BITS + NODE_BITS == 63);

/// Space of all inodes of one server.
pub const INODES: u64 = 1;
/// Space of the files that are being written before they get their name.
pub const PENDING: u64 = 2;
/// Space of the files whose chunks are being deleted.
pub const FREEING: u64 = 3;
/// Space of all chunks of one server.
pub const DATA: u64 = 4;
/// Bit that, with the number of a directory, makes the space of that directory's entries.
pub const NAMES: u64 = 1 << 63;

/// Slot of the note that a directory is removed, in the space of its entries.
pub const REMOVED_SLOT: u64 = u64::MAX;

const COUNT_NAME: &[u8] = b"n";
const PARENT_NAME: &[u8] = b"p";

/// Number of an inode: below 2^63 and never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ino(u64);

impl Ino {
    /// The root directory.
    pub const ROOT: Ino = Ino(1);

    /// The inode of that number, if it can be one.
    #[must_use]
    pub fn new(number: u64) -> Option<Ino> {
        (number != 0 && number < NAMES).then_some(Ino(number))
    }

    /// The number.
    #[must_use]
    pub fn get(self) -> u64 {
        self.0
    }

    /// The life that handed out the number.
    #[must_use]
    pub fn life(self) -> Life {
        let life = self.0 >> COUNTER_BITS;
        Life {
            node: NodeId((life >> INCARNATION_BITS) as u32),
            incarnation: Incarnation(life & ((1 << INCARNATION_BITS) - 1)),
        }
    }
}

impl std::fmt::Display for Ino {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "inode {:x}", self.0)
    }
}

/// The inode numbers of one life: `first ..= last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Smallest number that the life may hand out.
    pub first: u64,
    /// Largest.
    pub last: u64,
}

impl Region {
    /// The numbers of `life`.
    ///
    /// # Errors
    /// [`TreeError::LifeTooLarge`] when the life's numbers do not fit an inode number.
    pub fn of(life: Life) -> Result<Region, TreeError> {
        let node = u64::from(life.node.0);
        let incarnation = life.incarnation.0;
        if node >> NODE_BITS != 0 || incarnation >> INCARNATION_BITS != 0 {
            return Err(TreeError::LifeTooLarge { life });
        }
        let base = (node << INCARNATION_BITS | incarnation) << COUNTER_BITS;
        Ok(Region {
            first: base + FIRST_COUNTER,
            last: base + (1 << COUNTER_BITS) - 1,
        })
    }
}

/// Where the objects of a tree are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    meta: Vec<NodeId>,
    object: Vec<NodeId>,
}

impl Layout {
    /// The layout over the servers of a cluster.
    ///
    /// # Errors
    /// [`TreeError::NoServers`] without at least one metadata and one object server.
    pub fn new(placement: &Placement) -> Result<Layout, TreeError> {
        if placement.meta.is_empty() || placement.object.is_empty() {
            return Err(TreeError::NoServers);
        }
        Ok(Layout {
            meta: placement.meta.clone(),
            object: placement.object.clone(),
        })
    }

    /// Metadata servers, in placement order.
    #[must_use]
    pub fn meta(&self) -> &[NodeId] {
        &self.meta
    }

    /// Object servers, in placement order.
    #[must_use]
    pub fn object(&self) -> &[NodeId] {
        &self.object
    }

    /// Server of an inode, of its count and, for a directory, of its entries.
    #[must_use]
    pub fn home(&self, ino: Ino) -> NodeId {
        self.meta[(mix(ino.0) as u32 as usize) % self.meta.len()]
    }

    /// Server of one chunk: chunks go round the object servers from a start that depends on the
    /// file.
    #[must_use]
    pub fn chunk_home(&self, ino: Ino, chunk: u64) -> NodeId {
        let start = mix(ino.0) >> 32;
        self.object[(start.wrapping_add(chunk) % self.object.len() as u64) as usize]
    }
}

/// Key of an entry.
#[must_use]
pub fn entry_key(directory: Ino, name: &[u8]) -> Key {
    Key {
        space: names_space(directory),
        slot: name_slot(name),
        name: name.to_vec(),
    }
}

/// Space of a directory's entries.
#[must_use]
pub fn names_space(directory: Ino) -> u64 {
    NAMES | directory.0
}

/// Key of the note that a directory is removed. No entry has it, as no name is empty.
#[must_use]
pub fn removed_key(directory: Ino) -> Key {
    Key::at(names_space(directory), REMOVED_SLOT)
}

/// Key of an inode.
#[must_use]
pub fn inode_key(ino: Ino) -> Key {
    Key::at(INODES, ino.0)
}

/// Key of an inode's count: names of a file, entries of a directory.
#[must_use]
pub fn count_key(ino: Ino) -> Key {
    named(INODES, ino.0, COUNT_NAME)
}

/// Key of a directory's link to its parent.
#[must_use]
pub fn parent_key(ino: Ino) -> Key {
    named(INODES, ino.0, PARENT_NAME)
}

/// Key of a chunk.
#[must_use]
pub fn chunk_key(ino: Ino, chunk: u64) -> Key {
    named(DATA, ino.0, &chunk.to_be_bytes())
}

/// Key of the note that a file of this name is being written.
#[must_use]
pub fn pending_key(directory: Ino, name: &[u8]) -> Key {
    let mut tail = directory.0.to_be_bytes().to_vec();
    tail.extend_from_slice(name);
    Key {
        space: PENDING,
        slot: mix(directory.0 ^ name_slot(name)),
        name: tail,
    }
}

/// Key of the note that a file's chunks are being deleted.
#[must_use]
pub fn freeing_key(ino: Ino) -> Key {
    Key::at(FREEING, ino.0)
}

/// The slot that holds an inode, its count and its parent.
#[must_use]
pub fn inode_range(ino: Ino) -> Range {
    inode_key(ino).range()
}

/// The slot that holds all chunks of a file on one server.
#[must_use]
pub fn data_range(ino: Ino) -> Range {
    Key::at(DATA, ino.0).range()
}

/// What an object of the [`INODES`] space is, by its name part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InodePart {
    /// The inode itself.
    Inode,
    /// Its count.
    Count,
    /// Its parent.
    Parent,
}

/// The part of an inode that `key` names, if any.
#[must_use]
pub fn inode_part(key: &Key) -> Option<InodePart> {
    match key.name.as_slice() {
        [] => Some(InodePart::Inode),
        COUNT_NAME => Some(InodePart::Count),
        PARENT_NAME => Some(InodePart::Parent),
        _ => None,
    }
}

/// The number in a chunk's key, if it is one.
#[must_use]
pub fn chunk_number(key: &Key) -> Option<u64> {
    Some(u64::from_be_bytes(key.name.as_slice().try_into().ok()?))
}

/// Directory and name in the key of an unfinished file, if it is one.
#[must_use]
pub fn pending_place(key: &Key) -> Option<(Ino, &[u8])> {
    let (directory, name) = key.name.split_first_chunk::<8>()?;
    Some((Ino::new(u64::from_be_bytes(*directory))?, name))
}

/// Whether `name` may stand in a directory: 1 to [`FILE_NAME_MAX`] bytes without `/` and NUL,
/// neither `.` nor `..`. Nothing is demanded of the encoding.
#[must_use]
pub fn is_file_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= FILE_NAME_MAX
        && name != b"."
        && name != b".."
        && !name.iter().any(|&b| b == b'/' || b == 0)
}

/// Slot of a file name: FNV-1a over its bytes, then [`mix`]ed so that also the high bits, by
/// which ranges divide a directory, depend on every byte. Part of the format: it never changes.
#[must_use]
pub fn name_slot(name: &[u8]) -> u64 {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for &byte in name {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    mix(hash)
}

/// The finaliser of splitmix64: a fixed permutation of 64-bit words. Part of the format.
#[must_use]
pub fn mix(word: u64) -> u64 {
    let mut z = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn named(space: u64, slot: u64, name: &[u8]) -> Key {
    Key {
        space,
        slot,
        name: name.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn life(node: u32, incarnation: u64) -> Life {
        Life {
            node: NodeId(node),
            incarnation: Incarnation(incarnation),
        }
    }

    #[test]
    fn the_hash_on_disk_never_changes() {
        assert_eq!(mix(0), 0xe220_a839_7b1d_cdaf); // first output of splitmix64 seeded with 0
        assert_eq!(name_slot(b""), mix(0xcbf2_9ce4_8422_2325));
        // FNV-1a 64 of "foobar" is 0x85944171f73967e8 (the reference vectors of FNV).
        assert_eq!(name_slot(b"foobar"), mix(0x8594_4171_f739_67e8));
    }

    #[test]
    fn regions_of_lives_do_not_overlap() {
        let lives = [(0, 0), (0, 1), (1, 0), (7, 3), (65535, 0xf_ffff)];
        let mut regions = Vec::new();
        for (node, incarnation) in lives {
            let region = Region::of(life(node, incarnation)).unwrap();
            for number in [region.first, region.last] {
                let ino = Ino::new(number).unwrap();
                assert_eq!(ino.life(), life(node, incarnation));
            }
            regions.push(region);
        }
        regions.sort_by_key(|r| r.first);
        for pair in regions.windows(2) {
            assert!(pair[0].last < pair[1].first);
        }
        assert!(Ino::ROOT.get() < regions[0].first);
    }

    #[test]
    fn a_life_that_does_not_fit_is_refused() {
        for l in [life(1 << 16, 0), life(0, 1 << 20), life(u32::MAX, u64::MAX)] {
            assert!(matches!(
                Region::of(l),
                Err(TreeError::LifeTooLarge { life }) if life == l
            ));
        }
    }

    #[test]
    fn homes_and_stripes_use_every_server() {
        let nodes = |base: u32, n: u32| (base..base + n).map(NodeId).collect();
        let layout = Layout::new(&Placement {
            meta: nodes(10, 3),
            object: nodes(20, 4),
        })
        .unwrap();
        let mut meta = [0u32; 3];
        let mut object = [0u32; 4];
        for n in 0..6000 {
            let ino = Ino::new(1000 + 2 * n).unwrap();
            meta[(layout.home(ino).0 - 10) as usize] += 1;
            object[(layout.chunk_home(ino, 0).0 - 20) as usize] += 1;
        }
        assert!(meta.iter().all(|&n| (1800..2200).contains(&n)), "{meta:?}");
        assert!(
            object.iter().all(|&n| (1350..1650).contains(&n)),
            "{object:?}"
        );
        let ino = Ino::new(99).unwrap();
        let round: std::collections::BTreeSet<_> =
            (0..4).map(|c| layout.chunk_home(ino, c)).collect();
        assert_eq!(round.len(), 4);
    }

    #[test]
    fn file_names_are_bytes_with_few_exceptions() {
        for good in [&b"a"[..], b"\xff\xfe", b"...", b" ", &[b'x'; 255]] {
            assert!(is_file_name(good));
        }
        for bad in [&b""[..], b".", b"..", b"a/b", b"a\0", &[b'x'; 256]] {
            assert!(!is_file_name(bad));
        }
    }

    #[test]
    fn a_chunk_that_is_filled_is_the_chunk_of_its_contents() {
        let mut rooms = Rooms::default();
        let mut fill = |len_max, contents: &[u8]| {
            Chunk::fill(&mut rooms, len_max, |room| {
                room[..contents.len()].copy_from_slice(contents);
                Ok::<_, ()>(contents.len())
            })
            .unwrap()
        };
        assert_eq!(fill(8, b""), None);
        for (len_max, contents) in [
            (8, &b"full 8 b"[..]),
            (8, b"short"),
            (8, &[0; 8]),
            (8, &[0; 3]),
        ] {
            let chunk = fill(len_max, contents).unwrap();
            assert_eq!(chunk, Chunk::new(contents));
            assert_eq!(Chunk::decode(&chunk.encode()), Ok(chunk));
        }
        assert_eq!(Chunk::fill(&mut rooms, 8, |_| Err(5)), Err(5));
    }

    #[test]
    fn the_room_of_a_chunk_is_taken_again_only_when_nobody_holds_it() {
        let mut rooms = Rooms::default();
        let mut fill = |byte: u8| {
            let filled = Chunk::fill(&mut rooms, 100, |room| {
                assert_eq!(room.as_ptr().addr() % 64, 0, "contents begin a cache line");
                room.fill(byte);
                Ok::<_, ()>(room.len())
            });
            let chunk = filled.unwrap().unwrap();
            let at = match &chunk {
                Chunk::Bytes(value) => value.as_ptr(),
                Chunk::Zeros(_) => panic!("not zeros"),
            };
            (chunk, at)
        };
        let (first, place) = fill(1);
        let (second, elsewhere) = fill(2);
        assert_eq!(first, Chunk::new(&[1; 100]));
        assert_ne!(place, elsewhere);
        drop(first);
        assert_eq!(fill(3).1, place);
        assert_eq!(second, Chunk::new(&[2; 100]));
    }

    #[test]
    fn keys_tell_what_they_name() {
        let dir = Ino::new(77).unwrap();
        assert_eq!(inode_part(&inode_key(dir)), Some(InodePart::Inode));
        assert_eq!(inode_part(&count_key(dir)), Some(InodePart::Count));
        assert_eq!(inode_part(&parent_key(dir)), Some(InodePart::Parent));
        assert_eq!(chunk_number(&chunk_key(dir, 9)), Some(9));
        assert_eq!(chunk_number(&inode_key(dir)), None);
        assert_eq!(
            pending_place(&pending_key(dir, b"name")),
            Some((dir, &b"name"[..]))
        );
    }
}
