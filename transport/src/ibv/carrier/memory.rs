//! Memory that a device of libibverbs knows, owned here until the device may not touch it any more.
//!
//! Owns: chunks with their registrations, receive buffers, memory to send from, what is lent to peers,
//! and slabs that READs fill. Who posts what is the [carrier's](super).

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::HashMap;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;

use lowtide_transport_proto::qp::Lkey;

use super::super::{MemoryRegion, ProtectionDomain, last_errno};
use crate::memory::{Key, Lent};
use crate::message::{PARCEL_ROOM, Registrar};
use crate::raw::types::{AccessFlags, Sge};

/// Receive buffers registered at once.
const BUFFERS_PER_CHUNK: usize = 8;
/// Memory lent to peers is registered in multiples of this, so that it fits the next message too.
const LOAN_STEP: usize = 256 << 10;
/// Bytes of such memory kept registered while nobody uses them.
const SPARE_BYTES_MAX: usize = 32 << 20;
/// Lock pages when they are touched.
const MLOCK_ONFAULT: libc::c_uint = 1;
/// Pages are registered whole.
const ALIGN: usize = 4096;

/// Whether this process may lock so many bytes, as registering does: the kernel is asked to lock as
/// much of nothing.
pub(super) fn may_lock(len: usize) -> bool {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping wherever there is room.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return false;
    }
    // SAFETY: the mapping just made; with this flag no page of it is touched.
    let locked = unsafe { libc::syscall(libc::SYS_mlock2, start, len, MLOCK_ONFAULT) };
    // Where the call is unknown the first registration will tell.
    let may = locked == 0 || last_errno() == libc::ENOSYS;
    // SAFETY: the same mapping, which nobody else knows.
    unsafe { libc::munmap(start, len) };
    may
}

/// Memory of ours that a device knows.
struct Chunk {
    start: NonNull<u8>,
    layout: Layout,
    /// Present until dropped.
    region: Option<MemoryRegion>,
}

// SAFETY: plain memory; who may look at it and when is the module's to say.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

impl Chunk {
    fn new(domain: &ProtectionDomain, len: usize, access: AccessFlags) -> Option<Chunk> {
        let layout = Layout::from_size_align(len.max(1), ALIGN).ok()?;
        // SAFETY: not of length zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        let mut chunk = Chunk {
            start,
            layout,
            region: None,
        };
        let address = start.as_ptr() as u64;
        // SAFETY: the memory stays until the region is gone (`drop`), and nobody refers to what the
        // device changes while it may.
        let region = unsafe { domain.register(address, layout.size() as u64, address, access) };
        match region {
            Ok(region) => chunk.region = Some(region),
            Err(error) => {
                tracing::warn!(%error, len, "memory cannot be registered");
                return None;
            }
        }
        Some(chunk)
    }

    fn len(&self) -> usize {
        self.layout.size()
    }

    fn region(&self) -> &MemoryRegion {
        self.region.as_ref().expect("registered when made")
    }

    /// A stretch as a work request names it; none beyond the end.
    fn place(&self, offset: u64, len: u32) -> Option<Sge> {
        let end = offset.checked_add(u64::from(len))?;
        (end <= self.len() as u64).then(|| Sge {
            lkey: self.region().lkey(),
            addr: self.start.as_ptr() as u64 + offset,
            len,
        })
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        self.region = None;
        // SAFETY: allocated with this layout, and not registered any more.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

/// Buffers of one parcel each.
#[derive(Default)]
pub(super) struct Receives {
    chunks: Vec<Arc<Chunk>>,
    free: Vec<u32>,
}

impl Receives {
    pub(super) fn grow(&mut self, domain: &ProtectionDomain) -> bool {
        let len = BUFFERS_PER_CHUNK * PARCEL_ROOM;
        let Some(chunk) = Chunk::new(domain, len, AccessFlags::LOCAL_WRITE) else {
            return false;
        };
        let first = (self.chunks.len() * BUFFERS_PER_CHUNK) as u32;
        self.chunks.push(Arc::new(chunk));
        self.free.extend(first..first + BUFFERS_PER_CHUNK as u32);
        true
    }

    pub(super) fn take(&mut self, domain: &ProtectionDomain) -> Option<(u32, Sge)> {
        if self.free.is_empty() && !self.grow(domain) {
            return None;
        }
        let buffer = self.free.pop()?;
        let (chunk, offset) = self.find(buffer);
        let sge = chunk.place(offset as u64, PARCEL_ROOM as u32)?;
        Some((buffer, sge))
    }

    /// These may be posted again.
    pub(super) fn give_back(&mut self, buffers: impl IntoIterator<Item = u32>) {
        self.free.extend(buffers);
    }

    fn find(&self, buffer: u32) -> (&Arc<Chunk>, usize) {
        let at = buffer as usize;
        let offset = at % BUFFERS_PER_CHUNK * PARCEL_ROOM;
        (&self.chunks[at / BUFFERS_PER_CHUNK], offset)
    }

    pub(super) fn see(&self, buffer: u32, len: usize) -> Received {
        let (chunk, offset) = self.find(buffer);
        Received {
            buffer,
            chunk: chunk.clone(),
            offset,
            len: len.min(PARCEL_ROOM),
        }
    }
}

/// A parcel that came. Its buffer is not posted again until [`Carrier::recycle`].
pub(crate) struct Received {
    pub(super) buffer: u32,
    chunk: Arc<Chunk>,
    offset: usize,
    len: usize,
}

impl Deref for Received {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: inside the chunk, which the handle keeps; initialised when it was allocated; the
        // receive has completed and is not posted again before the handle is given back.
        unsafe {
            let start = self.chunk.start.as_ptr().add(self.offset);
            std::slice::from_raw_parts(start, self.len)
        }
    }
}

/// A slab that READs fill. Fields are dropped in this order: the registration before the memory.
struct Filled {
    region: MemoryRegion,
    slab: Arc<[u8]>,
    start: NonNull<u8>,
}

// SAFETY: the pointer is to the slab that it owns alone.
unsafe impl Send for Filled {}

/// Everything else that is registered.
pub(super) struct Slabs {
    domain: ProtectionDomain,
    private: Vec<Chunk>,
    loans: HashMap<u32, (Chunk, Lent)>,
    spare: Vec<Chunk>,
    spare_bytes: usize,
    filled: Vec<Option<Filled>>,
    free: Vec<u32>,
}

impl Slabs {
    pub(super) fn new(domain: ProtectionDomain) -> Slabs {
        Slabs {
            domain,
            private: Vec::new(),
            loans: HashMap::new(),
            spare: Vec::new(),
            spare_bytes: 0,
            filled: Vec::new(),
            free: Vec::new(),
        }
    }

    pub(super) fn private_place(&self, key: Key, offset: u64, len: u32) -> Option<Sge> {
        self.private.get(key.0 as usize)?.place(offset, len)
    }

    pub(super) fn slab_place(&self, key: Key, offset: u64, len: u32) -> Option<Sge> {
        let filled = self.filled.get(key.0 as usize)?.as_ref()?;
        let end = offset.checked_add(u64::from(len))?;
        (end <= filled.slab.len() as u64).then(|| Sge {
            lkey: Lkey(filled.region.lkey().0),
            addr: filled.start.as_ptr() as u64 + offset,
            len,
        })
    }

    /// What `register` makes; if nothing, once more without the memory that is kept for nobody.
    fn with_room<T>(
        &mut self,
        mut register: impl FnMut(&ProtectionDomain) -> Option<T>,
    ) -> Option<T> {
        if let Some(made) = register(&self.domain) {
            return Some(made);
        }
        if self.spare.is_empty() {
            return None;
        }
        self.spare.clear();
        self.spare_bytes = 0;
        register(&self.domain)
    }

    /// Registered memory of at least `len` bytes and at most a few times that.
    fn chunk_for(&mut self, len: usize) -> Option<Chunk> {
        let fits = |chunk: &Chunk| (len..=(4 * len).max(LOAN_STEP)).contains(&chunk.len());
        match self.spare.iter().rposition(fits) {
            Some(index) => {
                let chunk = self.spare.remove(index);
                self.spare_bytes -= chunk.len();
                Some(chunk)
            }
            None => {
                let len = len.next_multiple_of(LOAN_STEP);
                self.with_room(|domain| Chunk::new(domain, len, AccessFlags::REMOTE_READ))
            }
        }
    }
}

impl Registrar for Slabs {
    fn register_private(&mut self, _: u32, len: usize) -> Option<Key> {
        let chunk = self.with_room(|domain| Chunk::new(domain, len, AccessFlags::NONE))?;
        self.private.push(chunk);
        Some(Key(self.private.len() as u32 - 1))
    }

    fn private_bytes(&mut self, key: Key, offset: usize, len: usize) -> Option<&mut [u8]> {
        let chunk = self.private.get_mut(key.0 as usize)?;
        chunk.place(offset as u64, u32::try_from(len).ok()?)?;
        // SAFETY: inside the chunk, as just checked; the borrow of `self` keeps others from getting
        // another; the device reads of it what is posted, and that is not changed.
        Some(unsafe { std::slice::from_raw_parts_mut(chunk.start.as_ptr().add(offset), len) })
    }

    fn lend_to(
        &mut self,
        _: u32,
        _: &mut dyn FnMut() -> u32,
        lent: Lent,
    ) -> Result<(Key, u64), Lent> {
        let Some(chunk) = self.chunk_for(lent.len()) else {
            return Err(lent);
        };
        let mut at = 0;
        for piece in lent.pieces() {
            let bytes = piece.bytes();
            // SAFETY: the chunk is as long as all pieces, and nobody else's: its last loan has ended.
            unsafe {
                let to = chunk.start.as_ptr().add(at);
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
            }
            at += bytes.len();
        }
        let key = Key(chunk.region().rkey().0);
        let address = chunk.start.as_ptr() as u64;
        self.loans.insert(key.0, (chunk, lent));
        Ok((key, address))
    }

    fn end_loan(&mut self, key: Key) -> Option<Lent> {
        let (chunk, lent) = self.loans.remove(&key.0)?;
        if self.spare_bytes + chunk.len() <= SPARE_BYTES_MAX {
            self.spare_bytes += chunk.len();
            self.spare.push(chunk);
        }
        Some(lent)
    }

    fn register_slab(&mut self, _: u32, mut slab: Arc<[u8]>) -> Option<Key> {
        let bytes = Arc::get_mut(&mut slab)?;
        let (start, len) = (NonNull::new(bytes.as_mut_ptr())?, bytes.len());
        let address = start.as_ptr() as u64;
        let register = |domain: &ProtectionDomain| {
            let access = AccessFlags::LOCAL_WRITE;
            // SAFETY: the slab is ours alone and is not looked at until it leaves this table, when
            // the registration ends.
            let region = unsafe { domain.register(address, len as u64, address, access) };
            match region {
                Ok(region) => Some(region),
                Err(error) => {
                    tracing::warn!(%error, len, "memory cannot be registered");
                    None
                }
            }
        };
        let filled = Filled {
            region: self.with_room(register)?,
            slab,
            start,
        };
        let index = self.free.pop().unwrap_or_else(|| {
            self.filled.push(None);
            self.filled.len() as u32 - 1
        });
        self.filled[index as usize] = Some(filled);
        Some(Key(index))
    }

    fn release_slab(&mut self, key: Key) -> Option<Arc<[u8]>> {
        let Filled { slab, region, .. } = self.filled.get_mut(key.0 as usize)?.take()?;
        drop(region);
        self.free.push(key.0);
        Some(slab)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_says_how_much_may_be_locked() {
        assert!(may_lock(4096));
        assert!(!may_lock(1 << 60), "more than there are addresses");
    }
}
