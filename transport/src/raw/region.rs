//! Memory regions and windows.

use std::sync::Arc;

use lowtide_transport_proto::qp;

use super::types::{AccessFlags, Bind, Error, Lkey, MwType, Rkey, SendFlags, SendOp, SendWr};
use super::{BadWr, ProtectionDomain, QueuePair};
use crate::memory::{Access, Foreign, Key, SharedMemory, WindowKind};

/// Flags that a region may have here. `HUGETLB` and `RELAXED_ORDERING` change nothing.
const REGION_FLAGS: AccessFlags = AccessFlags::LOCAL_WRITE
    .with(AccessFlags::REMOTE_WRITE)
    .with(AccessFlags::REMOTE_READ)
    .with(AccessFlags::REMOTE_ATOMIC)
    .with(AccessFlags::MW_BIND)
    .with(AccessFlags::ZERO_BASED)
    .with(AccessFlags::ON_DEMAND)
    .with(AccessFlags::HUGETLB)
    .with(AccessFlags::FLUSH_GLOBAL)
    .with(AccessFlags::RELAXED_ORDERING);

/// Memory of the program that work requests may name, and peers as far as its flags say. Dropping
/// it takes all rights away, and the place of every window bound there.
#[derive(Debug)]
pub struct MemoryRegion {
    pd: ProtectionDomain,
    key: Key,
    address: u64,
    len: u64,
    /// The bytes of a slab, which stay mapped as long as the region.
    _slab: Option<Arc<SharedMemory>>,
}

impl ProtectionDomain {
    /// Registers `len` bytes at `address` under addresses that begin with `iova` (which is `address`
    /// itself for `ibv_reg_mr`; 0 with `ZERO_BASED`, whatever is said). The pages are looked at, but
    /// for `ON_DEMAND`, and not locked.
    ///
    /// # Errors
    /// [`Error::Fault`] if part of it is not mapped or not as accessible as the flags need,
    /// [`Error::Argument`] for flags that make no sense, [`Error::Unsupported`] for persistence,
    /// [`Error::Exhausted`].
    ///
    /// # Safety
    /// While it is registered the device may read the memory at any time, and with `LOCAL_WRITE` it
    /// and, as far as the flags say, peers may change it. No reference of Rust's may stand in the way
    /// of that. (The memory need not stay mapped.)
    pub unsafe fn register(
        &self,
        address: u64,
        len: u64,
        iova: u64,
        flags: AccessFlags,
    ) -> Result<MemoryRegion, Error> {
        check_flags(flags)?;
        let is_writable = flags.contains(AccessFlags::LOCAL_WRITE);
        let found = match flags.contains(AccessFlags::ON_DEMAND) {
            // SAFETY: the caller's promise.
            true => unsafe { Foreign::unprobed(address, len) },
            // SAFETY: as above.
            false => unsafe { Foreign::probe(address, len, is_writable) },
        };
        let foreign = found.map_err(|error| match error.raw_os_error() {
            Some(libc::EFAULT) => Error::Fault { addr: address, len },
            Some(libc::EINVAL) => Error::Argument("a region is not empty and does not wrap"),
            errno => Error::Os(errno.unwrap_or(libc::EIO)),
        })?;
        let base = match flags.contains(AccessFlags::ZERO_BASED) {
            true => 0,
            false => iova,
        };
        let mut state = self.context.shared.lock();
        let key = state
            .device
            .memory
            .register_foreign(self.domain, foreign, base, access_of(flags))
            .map_err(|error| Error::Os(error.raw_os_error().unwrap_or(libc::ENOMEM)))?;
        Ok(MemoryRegion {
            pd: self.clone(),
            key: key.ok_or(Error::Exhausted("memory region"))?,
            address,
            len,
            _slab: None,
        })
    }

    /// A region of `len` zero bytes of the device's own. Its addresses are those of this process, and
    /// mapped until the region is dropped. Peers on this host map it too, if the device reaches them
    /// by rings ([`crate::host`]), and its atomics are the processor's.
    ///
    /// # Errors
    /// As [`register`](Self::register), which takes the same flags, and [`Error::Os`] without memory.
    pub fn slab(&self, len: u64, flags: AccessFlags) -> Result<MemoryRegion, Error> {
        let size = usize::try_from(len).ok().filter(|size| *size > 0);
        let size = size.ok_or(Error::Argument("a region is not empty and does not wrap"))?;
        check_flags(flags)?;
        let mut state = self.context.shared.lock();
        let memory = &mut state.device.memory;
        let slab = memory
            .new_shared(size)
            .map_err(|error| Error::Os(error.raw_os_error().unwrap_or(libc::ENOMEM)))?;
        let address = slab.address();
        let base = match flags.contains(AccessFlags::ZERO_BASED) {
            true => 0,
            false => address,
        };
        let key = memory.register_shared_at(self.domain, slab.clone(), base, access_of(flags));
        Ok(MemoryRegion {
            pd: self.clone(),
            key: key.ok_or(Error::Exhausted("memory region"))?,
            address,
            len,
            _slab: Some(slab),
        })
    }

    /// A memory window without a place.
    ///
    /// # Errors
    /// [`Error::Exhausted`].
    pub fn memory_window(&self, kind: MwType) -> Result<MemoryWindow, Error> {
        let window = match kind {
            MwType::One => WindowKind::One,
            MwType::Two => WindowKind::Two,
        };
        let mut state = self.context.shared.lock();
        let key = state.device.memory.create_window(self.domain, window);
        Ok(MemoryWindow {
            pd: self.clone(),
            key: key.ok_or(Error::Exhausted("memory window"))?,
            kind,
        })
    }
}

impl MemoryRegion {
    /// Its key for work requests.
    pub fn lkey(&self) -> Lkey {
        Lkey(self.key.0)
    }

    /// Its key for peers.
    pub fn rkey(&self) -> Rkey {
        Rkey(self.key.0)
    }

    /// Address of its first byte in this process.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Never: an empty region is refused.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes it out of service.
    ///
    /// # Errors
    /// [`Error::Busy`] and the region while windows are bound to it.
    pub fn deregister(self) -> Result<(), (Error, MemoryRegion)> {
        let windows = self
            .pd
            .context
            .shared
            .lock()
            .device
            .memory
            .windows(self.key);
        match windows {
            0 => Ok(()),
            _ => Err((Error::Busy("memory windows"), self)),
        }
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        let mut state = self.pd.context.shared.lock();
        state.device.memory.deregister(self.key);
    }
}

/// A key of its own to part of a region.
#[derive(Debug)]
pub struct MemoryWindow {
    pd: ProtectionDomain,
    key: Key,
    kind: MwType,
}

impl MemoryWindow {
    /// Its key for peers. That of a type 2 window is whatever the last bind said.
    pub fn rkey(&self) -> Rkey {
        Rkey(self.key.0)
    }

    /// Its type.
    pub fn kind(&self) -> MwType {
        self.kind
    }

    /// The key for the next bind of a type 2 window: another low byte.
    pub fn next_rkey(&self) -> Rkey {
        self.rkey().next_of_window()
    }

    /// Posts the bind of a type 1 window, and gives it a new key (`ibv_bind_mw`). `bind` says where;
    /// its keys are filled in. A length of 0 takes the place away.
    ///
    /// # Errors
    /// [`Error::Argument`] for a type 2 window, which is bound by a work request; else as
    /// [`QueuePair::post_send`].
    ///
    /// # Safety
    /// As of [`QueuePair::post_send`].
    pub unsafe fn bind(
        &mut self,
        qp: &QueuePair,
        wr_id: u64,
        bind: Bind,
        flags: SendFlags,
    ) -> Result<(), Error> {
        if self.kind != MwType::One {
            return Err(Error::Argument(
                "a type 2 window is bound by a work request",
            ));
        }
        let rkey = self.next_rkey();
        let bind = Bind {
            window: self.rkey(),
            rkey,
            ..bind
        };
        let wr = SendWr {
            wr_id,
            op: SendOp::BindWindow(bind),
            sg_list: &[],
            flags,
            to: None,
        };
        // SAFETY: the caller's promise.
        unsafe { qp.post_send(&[wr]) }.map_err(|BadWr { error, .. }| error)?;
        self.key = Key(rkey.0);
        Ok(())
    }

    /// Notes the key that a work request has bound a type 2 window under.
    pub fn set_rkey(&mut self, rkey: Rkey) {
        self.key = Key(rkey.0);
    }
}

impl Drop for MemoryWindow {
    fn drop(&mut self) {
        let mut state = self.pd.context.shared.lock();
        state.device.memory.destroy_window(self.key);
    }
}

/// Whether a region may have these flags.
fn check_flags(flags: AccessFlags) -> Result<(), Error> {
    if flags.contains(AccessFlags::FLUSH_PERSISTENT) {
        return Err(Error::Unsupported("persistent memory"));
    }
    let writes = AccessFlags::REMOTE_WRITE | AccessFlags::REMOTE_ATOMIC;
    let is_writable = flags.contains(AccessFlags::LOCAL_WRITE);
    if !REGION_FLAGS.contains(flags) || (flags.intersects(writes) && !is_writable) {
        let what = "access flags: unknown, or remote writing without local writing";
        return Err(Error::Argument(what));
    }
    Ok(())
}

fn access_of(flags: AccessFlags) -> Access {
    Access {
        local_write: flags.contains(AccessFlags::LOCAL_WRITE),
        remote_write: flags.contains(AccessFlags::REMOTE_WRITE),
        remote_read: flags.contains(AccessFlags::REMOTE_READ),
        remote_atomic: flags.contains(AccessFlags::REMOTE_ATOMIC),
        flush_global: flags.contains(AccessFlags::FLUSH_GLOBAL),
        // Peers of a window of a zero-based region would count from neither end.
        window_bind: flags.contains(AccessFlags::MW_BIND)
            && !flags.contains(AccessFlags::ZERO_BASED),
    }
}

impl From<AccessFlags> for qp::Access {
    /// What the peer of a queue pair, or of a window, may do.
    fn from(flags: AccessFlags) -> qp::Access {
        qp::Access {
            remote_write: flags.contains(AccessFlags::REMOTE_WRITE),
            remote_read: flags.contains(AccessFlags::REMOTE_READ),
            remote_atomic: flags.contains(AccessFlags::REMOTE_ATOMIC),
            flush_global: flags.contains(AccessFlags::FLUSH_GLOBAL),
            flush_persistent: flags.contains(AccessFlags::FLUSH_PERSISTENT),
        }
    }
}
