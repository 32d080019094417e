//! Registered memory as queue pairs see it: keys, pieces, lists of pieces, and the [`Memory`] that
//! the caller brings. No byte is touched here.

use super::work::{Bind, RecvWr};

/// Scatter/gather elements per work request, and so fragments per packet.
pub const SGE_MAX: usize = 4;

/// Key of a memory region for its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Lkey(pub u32);

/// Key of a memory region for the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Rkey(pub u32);

impl Rkey {
    /// The key for the next bind of the type 2 window that has this one: another low byte, which is the
    /// owner's to choose.
    #[must_use]
    pub const fn next_of_window(self) -> Rkey {
        Rkey(self.0 & !0xFF | self.0.wrapping_add(1) & 0xFF)
    }
}

/// A piece of local memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Sge {
    /// Key of the region it lies in.
    pub lkey: Lkey,
    /// Address of its first byte.
    pub addr: u64,
    /// Length, bytes.
    pub len: u32,
}

/// More than [`SGE_MAX`] elements, or more than 2^31 bytes in sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooManySges;

/// The local memory of a work request: up to [`SGE_MAX`] pieces, at most 2^31 bytes in all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct SgList {
    elements: [Sge; SGE_MAX],
    count: u8,
    total: u32,
}

impl SgList {
    /// No memory: a message of zero bytes.
    pub const EMPTY: Self = Self {
        elements: [Sge {
            lkey: Lkey(0),
            addr: 0,
            len: 0,
        }; SGE_MAX],
        count: 0,
        total: 0,
    };

    /// The list of `elements`, in order.
    ///
    /// # Errors
    ///
    /// [`TooManySges`] beyond the limits above.
    #[inline]
    pub fn new(elements: &[Sge]) -> Result<Self, TooManySges> {
        if let [Sge { lkey, addr, len }] = *elements
            && len <= crate::wire::MESSAGE_LEN_MAX
        {
            return Ok(Self::one(lkey, addr, len));
        }
        let mut list = Self::EMPTY;
        if elements.len() > SGE_MAX {
            return Err(TooManySges);
        }
        let mut total = 0u64;
        for (slot, element) in list.elements.iter_mut().zip(elements) {
            *slot = *element;
            total += u64::from(element.len);
        }
        if total > u64::from(crate::wire::MESSAGE_LEN_MAX) {
            return Err(TooManySges);
        }
        list.count = elements.len() as u8;
        list.total = total as u32;
        Ok(list)
    }

    /// One piece.
    ///
    /// # Panics
    ///
    /// If `len` exceeds 2^31: a bug of the caller.
    #[must_use]
    #[inline]
    pub fn one(lkey: Lkey, addr: u64, len: u32) -> Self {
        assert!(len <= crate::wire::MESSAGE_LEN_MAX);
        let mut list = Self::EMPTY;
        list.elements[0] = Sge { lkey, addr, len };
        list.count = 1;
        list.total = len;
        list
    }

    /// The list of `first` if `count` is 1, and of nothing if it is 0.
    #[inline]
    pub(super) const fn of_first(first: Sge, count: u32, total: u32) -> Self {
        let mut list = Self::EMPTY;
        list.elements[0] = first;
        list.count = count as u8;
        list.total = total;
        list
    }

    /// The pieces.
    #[must_use]
    #[inline]
    pub fn elements(&self) -> &[Sge] {
        &self.elements[..usize::from(self.count)]
    }

    /// Bytes in all.
    #[must_use]
    #[inline]
    pub const fn total(&self) -> u32 {
        self.total
    }

    /// The fragments that hold bytes `offset` to `offset + len`, as far as the list reaches.
    #[must_use]
    #[inline]
    pub fn slice(&self, offset: u32, len: u32) -> Fragments {
        let mut fragments = Fragments::EMPTY;
        pieces(self.elements().iter().copied(), offset, len)
            .for_each(|fragment| fragments.push(fragment));
        fragments
    }
}

/// The fragments of a list that hold bytes `offset` to `offset + len`, as far as it reaches.
#[inline]
pub(super) fn pieces(
    list: impl Iterator<Item = Sge>,
    offset: u32,
    len: u32,
) -> impl Iterator<Item = Fragment> {
    let (mut skip, mut left) = (offset, len);
    list.filter_map(move |sge| {
        let skipped = skip.min(sge.len);
        skip -= skipped;
        let take = left.min(sge.len - skipped);
        left -= take;
        (take > 0).then_some(Fragment {
            key: Key::Local(sge.lkey),
            addr: sge.addr.wrapping_add(u64::from(skipped)),
            len: take,
        })
    })
}

/// By which key a fragment's memory is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// Memory of a local work request.
    Local(Lkey),
    /// Our memory, named by the peer in a WRITE or READ.
    Remote(Rkey),
}

/// A piece of registered memory of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Which region.
    pub key: Key,
    /// Address of the first byte.
    pub addr: u64,
    /// Length, bytes.
    pub len: u32,
}

/// The payload of one packet: up to [`SGE_MAX`] fragments in order.
#[derive(Clone, Copy, Debug)]
pub struct Fragments {
    /// Behind the first `count` of them lies what was there before.
    list: [Fragment; SGE_MAX],
    count: u8,
    total: u32,
}

impl Fragments {
    /// No payload.
    pub const EMPTY: Self = Self {
        list: [Fragment {
            key: Key::Local(Lkey(0)),
            addr: 0,
            len: 0,
        }; SGE_MAX],
        count: 0,
        total: 0,
    };

    /// No payload from now on.
    #[inline]
    pub(crate) fn clear(&mut self) {
        (self.count, self.total) = (0, 0);
    }

    /// Append; a list is made from at most [`SGE_MAX`] elements, so there is room.
    #[inline]
    pub(crate) fn push(&mut self, fragment: Fragment) {
        self.list[usize::from(self.count)] = fragment;
        self.count += 1;
        self.total += fragment.len;
    }

    /// The fragments.
    #[must_use]
    #[inline]
    pub fn as_slice(&self) -> &[Fragment] {
        &self.list[..usize::from(self.count)]
    }

    /// Bytes in all.
    #[must_use]
    #[inline]
    pub const fn total(&self) -> u32 {
        self.total
    }
}

impl PartialEq for Fragments {
    fn eq(&self, other: &Self) -> bool {
        self.as_slice() == other.as_slice()
    }
}

impl Eq for Fragments {}

/// A place in the peer's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remote {
    /// Virtual address there.
    pub va: u64,
    /// The peer's key for it.
    pub rkey: Rkey,
}

/// What a peer may do with our memory through one queue pair; also the rights asked of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Access {
    /// WRITE.
    pub remote_write: bool,
    /// READ.
    pub remote_read: bool,
    /// Atomics.
    pub remote_atomic: bool,
    /// FLUSH for visibility.
    pub flush_global: bool,
    /// FLUSH for persistence.
    pub flush_persistent: bool,
}

impl Access {
    /// Nothing.
    pub const NONE: Self = Self {
        remote_write: false,
        remote_read: false,
        remote_atomic: false,
        flush_global: false,
        flush_persistent: false,
    };
    /// WRITE, READ and atomics.
    pub const ALL: Self = Self {
        remote_write: true,
        remote_read: true,
        remote_atomic: true,
        ..Self::NONE
    };
    /// READ alone.
    pub const READ: Self = Self {
        remote_read: true,
        ..Self::NONE
    };
    /// WRITE alone.
    pub const WRITE: Self = Self {
        remote_write: true,
        ..Self::NONE
    };
    /// Atomics alone.
    pub const ATOMIC: Self = Self {
        remote_atomic: true,
        ..Self::NONE
    };

    /// Whether all of `wanted` is among these rights.
    #[must_use]
    pub const fn allows(self, wanted: Self) -> bool {
        (self.remote_write || !wanted.remote_write)
            && (self.remote_read || !wanted.remote_read)
            && (self.remote_atomic || !wanted.remote_atomic)
            && (self.flush_global || !wanted.flush_global)
            && (self.flush_persistent || !wanted.flush_persistent)
    }
}

/// Memory is not registered, not long enough, or not granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccessError;

/// An atomic operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtomicOp {
    /// Store `swap` if the word equals `compare`.
    CompareSwap {
        /// Compared with the word.
        compare: u64,
        /// Stored if equal.
        swap: u64,
    },
    /// Add, wrapping.
    FetchAdd {
        /// The addend.
        add: u64,
    },
    /// Store `value`, whatever was there.
    Write {
        /// The eight bytes, as they lie in memory.
        value: [u8; 8],
    },
}

/// Registered memory, as a queue pair needs it: implemented by the hands over their regions, by the
/// tests over vectors. One protection domain.
pub trait Memory {
    /// Whether the peer may do `access` to `len` bytes at `va` under `rkey`. Called once per WRITE
    /// message, READ request and FLUSH, with `len > 0`, before the first byte moves.
    ///
    /// # Errors
    ///
    /// [`AccessError`] if not; the peer gets a remote access NAK.
    fn check_remote(
        &self,
        rkey: Rkey,
        va: u64,
        len: u32,
        access: Access,
    ) -> Result<(), AccessError>;

    /// Copy received payload to the fragment (`payload.len() == target.len`).
    ///
    /// # Errors
    ///
    /// [`AccessError`] if the memory went away or was never writable.
    fn place(&mut self, target: Fragment, payload: &[u8]) -> Result<(), AccessError>;

    /// Perform `op` on the native-order 64-bit word at `va` (a multiple of 8) and return its old
    /// value, atomically with regard to all other queue pairs. [`AtomicOp::Write`] needs the right
    /// to WRITE, the others that of atomics.
    ///
    /// # Errors
    ///
    /// [`AccessError`] if the peer may not.
    fn atomic(&mut self, rkey: Rkey, va: u64, op: AtomicOp) -> Result<u64, AccessError>;

    /// Make the peer's key invalid (SEND with invalidate).
    ///
    /// # Errors
    ///
    /// [`AccessError`] if there is no such key, or it may not be invalidated.
    fn invalidate(&mut self, rkey: Rkey) -> Result<(), AccessError>;

    /// Make the key invalid because its owner says so.
    ///
    /// # Errors
    ///
    /// [`AccessError`] if there is no such key, or it may not be invalidated.
    fn invalidate_local(&mut self, rkey: Rkey) -> Result<(), AccessError>;

    /// Give a memory window its place.
    ///
    /// # Errors
    ///
    /// [`AccessError`] if window or region do not admit that.
    fn bind(&mut self, bind: &Bind) -> Result<(), AccessError>;

    /// Make what has been placed under `rkey` visible to everybody, or persistent.
    ///
    /// # Errors
    ///
    /// [`AccessError`] if there is no such key, or it does not grant that.
    fn flush(&mut self, rkey: Rkey, access: Access) -> Result<(), AccessError>;

    /// The next receive of the shared receive queue, for a queue pair that was made with one.
    fn shared_receive(&mut self) -> Option<RecvWr>;
}
