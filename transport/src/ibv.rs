//! The provider on libibverbs: hardware adapters and the kernel's own soft devices.
//!
//! The words are those of [`crate::raw`] and mean the same there, here and in C; what differs
//! between devices is said by [`Context::query_device`]. The library is loaded when it is first
//! asked for, so a program that has this in it starts on every machine, and [`devices`] says why
//! there are none.
//!
//! Owns: the C types (`ffi`), the library (`library`), and handles that keep what they need alive,
//! so that nothing is destroyed under something that uses it. Posting and polling go through the
//! function pointers in the device's context, as C's inline functions do, and allocate nothing.
//!
//! What only some devices have is asked from them when they are opened ([`Capabilities`]), and refused
//! by its name where they have it not: memory windows, ATOMIC WRITE, FLUSH.
//!
//! Deliberately absent, each refused with [`Error::Unsupported`]: alternate paths, on-demand paging
//! advice, device memory.
//!
//! Source: rdma-core's `verbs.h` and manual pages.

pub(crate) mod carrier;
mod completion;
mod convert;
mod ffi;
mod library;
mod memory;
mod queue_pair;
mod window;

use std::ffi::{CStr, c_int};
use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::ptr::{NonNull, null};
use std::sync::Arc;

pub use self::completion::{CompletionChannel, CompletionQueue};
use self::library::Library;
pub use self::library::NoLibrary;
pub use self::memory::{AddressHandle, MemoryRegion, ProtectionDomain, SharedReceiveQueue};
pub use self::queue_pair::{QueuePair, Queues};
use self::window::Keys;
pub use self::window::MemoryWindow;
use crate::device::DeviceOptions;
use crate::faults::Faults;
use crate::raw::types::{
    AccessFlags, AsyncEvent, DeviceAttr, Error, Gid, GidEntry, GidType, NO_CAPTURE, PortAttr,
};

/// Where the kernel tells about devices.
const SYSFS: &str = "/sys/class/infiniband";

/// What stands behind a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Driver {
    /// An adapter.
    Hardware,
    /// The kernel's soft-RoCE.
    Rxe,
    /// The kernel's soft-iWARP: no atomics, no immediate data with WRITE, no datagrams.
    Siw,
}

impl fmt::Display for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Driver::Hardware => "hardware",
            Driver::Rxe => "rxe",
            Driver::Siw => "siw",
        })
    }
}

/// A device that could be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceEntry {
    /// Its name, as in `rdma link`.
    pub name: String,
    /// What stands behind it.
    pub driver: Driver,
}

/// Refuses what is about packets: a device's are its own.
pub(crate) fn refuse_wire(wants_capture: bool, faults: &Faults) -> Result<(), Error> {
    if wants_capture {
        return Err(NO_CAPTURE);
    }
    match faults.is_any() {
        true => Err(Error::Unsupported(
            "injected faults: its packets are its own",
        )),
        false => Ok(()),
    }
}

/// Why there is no device.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NoDevices {
    /// No library.
    Library(NoLibrary),
    /// The kernel has no support for RDMA loaded.
    NoKernelSupport,
    /// Nothing is wrong, there is none.
    None,
    /// The library's error.
    Os(i32),
}

impl fmt::Display for NoDevices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NoDevices::Library(error) => error.fmt(f),
            NoDevices::NoKernelSupport => f.write_str(
                "the kernel has no RDMA support loaded (module ib_uverbs), so there is no device",
            ),
            NoDevices::None => f.write_str("there is no RDMA device"),
            NoDevices::Os(errno) => {
                let error = io::Error::from_raw_os_error(*errno);
                write!(f, "libibverbs cannot list devices: {error}")
            }
        }
    }
}

impl std::error::Error for NoDevices {}

/// The devices of this machine, hardware first.
///
/// # Errors
/// Why there is none: also when there is none and nothing is wrong.
pub fn devices() -> Result<Vec<DeviceEntry>, NoDevices> {
    let library = library::library().map_err(NoDevices::Library)?;
    let list = List::read(library)?;
    let mut entries: Vec<DeviceEntry> = list
        .names()
        .map(|(_, name)| DeviceEntry {
            driver: driver_of(Path::new(SYSFS), &name),
            name,
        })
        .collect();
    entries.sort_by(|a, b| (a.driver, &a.name).cmp(&(b.driver, &b.name)));
    match entries.is_empty() {
        true => Err(NoDevices::None),
        false => Ok(entries),
    }
}

/// Soft devices have no parent on a bus; the node type tells which of the two it is.
fn driver_of(sysfs: &Path, name: &str) -> Driver {
    let place = sysfs.join(name);
    let real = place.canonicalize().unwrap_or_default();
    if !real.components().any(|part| part.as_os_str() == "virtual") {
        return Driver::Hardware;
    }
    // "1: CA" or "4: RNIC".
    match std::fs::read_to_string(place.join("node_type")) {
        Ok(text) if text.starts_with("4:") => Driver::Siw,
        _ => Driver::Rxe,
    }
}

/// The library's list of devices, freed when dropped. Devices opened from it stay.
struct List {
    library: &'static Library,
    first: NonNull<*mut ffi::Device>,
    len: usize,
}

impl List {
    fn read(library: &'static Library) -> Result<List, NoDevices> {
        let mut len: c_int = 0;
        // SAFETY: `len` is written only if a list is returned.
        let list = unsafe { (library.get_device_list)(&raw mut len) };
        match NonNull::new(list) {
            Some(first) => Ok(List {
                library,
                first,
                len: usize::try_from(len).unwrap_or(0),
            }),
            None => Err(match last_errno() {
                libc::ENOSYS => NoDevices::NoKernelSupport,
                errno => NoDevices::Os(errno),
            }),
        }
    }

    fn names(&self) -> impl Iterator<Item = (*mut ffi::Device, String)> {
        (0..self.len).map(|i| {
            // SAFETY: the list has `len` devices and lives as long as `self`.
            let device = unsafe { *self.first.as_ptr().add(i) };
            // SAFETY: a device of the list; its name lives as long as the device.
            let name = unsafe { CStr::from_ptr((self.library.get_device_name)(device)) };
            (device, name.to_string_lossy().into_owned())
        })
    }
}

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: from `get_device_list`, and freed once.
        unsafe { (self.library.free_device_list)(self.first.as_ptr()) }
    }
}

/// What only some devices can do, as this one's flags say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Capabilities {
    /// Memory windows of type 1.
    pub windows_1: bool,
    /// Memory windows of type 2B.
    pub windows_2b: bool,
    /// ATOMIC WRITE.
    pub atomic_write: bool,
    /// FLUSH for visibility.
    pub flush: bool,
}

/// An open device. Cloning shares it.
#[derive(Clone)]
pub struct Context(Arc<Inner>);

struct Inner {
    library: &'static Library,
    context: NonNull<ffi::Context>,
    name: String,
    driver: Driver,
    capabilities: Capabilities,
    keys: Keys,
}

// SAFETY: libibverbs' objects may be used from every thread; what is written to a context after it
// was opened is written by the library under its own locks.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: open, and the last holder goes: objects made from it hold it.
        unsafe { (self.library.close_device)(self.context.as_ptr()) };
    }
}

impl Context {
    /// Opens the device of this name.
    ///
    /// # Errors
    /// [`Error::Argument`] when there is none of the name, [`Error::Os`] with the library's error:
    /// EACCES or EPERM where `/dev/infiniband` is not ours to open, ENOSYS without the library.
    pub fn open(name: &str) -> Result<Context, Error> {
        let library = library::library().map_err(|_| Error::Os(libc::ENOSYS))?;
        let list = List::read(library).map_err(|error| match error {
            NoDevices::Os(errno) => Error::Os(errno),
            _ => Error::Os(libc::ENOSYS),
        })?;
        let device = list.names().find(|(_, each)| each == name);
        let (device, _) = device.ok_or(Error::Argument("no device of this name"))?;
        // SAFETY: a device of a list that is not freed yet.
        let context = unsafe { (library.open_device)(device) };
        let context = NonNull::new(context).ok_or_else(|| Error::Os(last_errno()))?;
        let opened = Context(Arc::new(Inner {
            library,
            context,
            name: name.to_owned(),
            driver: driver_of(Path::new(SYSFS), name),
            capabilities: capabilities_of(library, context),
            keys: Keys::default(),
        }));
        // SAFETY: as long as the context is open.
        let fd = unsafe { (*context.as_ptr()).async_fd };
        set_nonblocking(fd)?;
        Ok(opened)
    }

    /// The same for a program that takes the provider and what it wants of it from its user: what
    /// only softroce can do is refused, and so before the device is looked for. Sockets are not a
    /// device's to have, and ways to peers on this host it has of its own: these are passed over.
    ///
    /// # Errors
    /// [`NO_CAPTURE`], [`Error::Unsupported`] for injected faults; those of [`Context::open`].
    pub fn open_with(name: &str, options: &DeviceOptions) -> Result<Context, Error> {
        refuse_wire(options.capture.is_some(), &options.faults)?;
        Context::open(name)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// What the device can do.
    ///
    /// # Errors
    /// The library's.
    pub fn query_device(&self) -> Result<DeviceAttr, Error> {
        let mut attr = MaybeUninit::<ffi::DeviceAttr>::zeroed();
        // SAFETY: an open context; the library fills the structure.
        check(unsafe { (self.library().query_device)(self.raw(), attr.as_mut_ptr()) })?;
        // SAFETY: all zero is a value of it, too.
        Ok(convert::device_attr(unsafe { attr.assume_init_ref() }))
    }

    /// What it can do that others cannot.
    pub fn capabilities(&self) -> Capabilities {
        self.0.capabilities
    }

    /// The kernel says no more than EINVAL of a right that it does not know.
    fn check_rights(&self, rights: AccessFlags) -> Result<(), Error> {
        let flush = AccessFlags::FLUSH_GLOBAL | AccessFlags::FLUSH_PERSISTENT;
        match rights.intersects(flush) && !self.capabilities().flush {
            true => Err(Error::Unsupported("rights to FLUSH: no such capability")),
            false => Ok(()),
        }
    }

    fn keys(&self) -> &Keys {
        &self.0.keys
    }

    /// Port `port`, from 1.
    ///
    /// # Errors
    /// The library's: EINVAL for no such port.
    pub fn query_port(&self, port: u8) -> Result<PortAttr, Error> {
        let mut attr = MaybeUninit::<ffi::PortAttr>::zeroed();
        // SAFETY: an open context; the library fills at most the structure, older ones less.
        check(unsafe { (self.library().query_port)(self.raw(), port, attr.as_mut_ptr()) })?;
        // SAFETY: all zero is a value of it, too.
        convert::port_attr(unsafe { attr.assume_init_ref() })
    }

    /// The valid entries of a port's GID table.
    ///
    /// # Errors
    /// The library's.
    pub fn gids(&self, port: u8) -> Result<Vec<GidEntry>, Error> {
        let len = self.query_port(port)?.gid_tbl_len as usize;
        let Some(query) = self.library().query_gid_table else {
            return self.gids_one_by_one(port, len);
        };
        // The call tells of all ports at once.
        let ports = usize::from(self.query_device()?.phys_port_cnt);
        let empty = ffi::GidEntry {
            gid: ffi::Gid([0; 16]),
            gid_index: 0,
            port_num: 0,
            gid_type: 0,
            ndev_ifindex: 0,
        };
        let mut table = vec![empty; len * ports.max(1)];
        // SAFETY: an open context, and a table of the length and entry size that are said.
        let count = unsafe {
            let size = size_of::<ffi::GidEntry>();
            query(self.raw(), table.as_mut_ptr(), table.len(), 0, size)
        };
        let count = usize::try_from(count).map_err(|_| Error::Os(-(count as i32)))?;
        table.truncate(count);
        table.retain(|entry| entry.port_num == u32::from(port));
        Ok(table.iter().map(convert::gid_entry).collect())
    }

    /// As older libraries have it: the table's entries, and their types from the kernel.
    fn gids_one_by_one(&self, port: u8, len: usize) -> Result<Vec<GidEntry>, Error> {
        let mut entries = Vec::new();
        for index in 0..len as u32 {
            let mut gid = ffi::Gid([0; 16]);
            // SAFETY: an open context; the library fills the GID.
            let result = unsafe {
                (self.library().query_gid)(self.raw(), port, index as c_int, &raw mut gid)
            };
            if result != 0 || gid.0 == [0; 16] {
                continue;
            }
            let types = format!(
                "{SYSFS}/{}/ports/{port}/gid_attrs/types/{index}",
                self.name()
            );
            let kind = match std::fs::read_to_string(types) {
                Ok(text) if text.trim() == "RoCE v2" => GidType::RoceV2,
                _ => GidType::InfinibandOrRoceV1,
            };
            entries.push(GidEntry {
                index,
                gid: Gid(gid.0),
                kind,
            });
        }
        Ok(entries)
    }

    /// The next asynchronous event, if there is one. Events that the vocabulary has no word for are
    /// passed over.
    pub fn async_event(&self) -> Option<AsyncEvent> {
        loop {
            let mut event = MaybeUninit::<ffi::AsyncEvent>::zeroed();
            // SAFETY: an open context whose file descriptor does not block.
            let result =
                unsafe { (self.library().get_async_event)(self.raw(), event.as_mut_ptr()) };
            if result != 0 {
                return None;
            }
            // SAFETY: filled by the library.
            let mut event = unsafe { event.assume_init() };
            // SAFETY: what the event is about lives until the event is acknowledged, below: to
            // destroy it waits for that.
            let told = unsafe { convert::async_event(&event) };
            // SAFETY: got above, acknowledged once.
            unsafe { (self.library().ack_async_event)(&raw mut event) };
            if told.is_some() {
                return told;
            }
        }
    }

    fn library(&self) -> &'static Library {
        self.0.library
    }

    fn raw(&self) -> *mut ffi::Context {
        self.0.context.as_ptr()
    }

    /// The device's own functions.
    fn ops(&self) -> &ffi::ContextOps {
        // SAFETY: open, and the table does not change.
        unsafe { &(*self.raw()).ops }
    }
}

impl AsFd for Context {
    /// Readable while an asynchronous event waits.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: open as long as the context is.
        unsafe { BorrowedFd::borrow_raw((*self.raw()).async_fd) }
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Context").field(&self.name()).finish()
    }
}

/// None of what a device does not tell.
fn capabilities_of(library: &Library, context: NonNull<ffi::Context>) -> Capabilities {
    let mut attr = MaybeUninit::<ffi::DeviceAttrEx>::zeroed();
    let (raw, size) = (context.as_ptr(), size_of::<ffi::DeviceAttrEx>());
    // SAFETY: an open context.
    let asked = unsafe { ffi::query_device_ex_of(raw) }.is_some_and(|query| {
        // SAFETY: as above; the library fills at most as much as is said.
        unsafe { query(raw, null(), attr.as_mut_ptr(), size) == 0 }
    });
    if !asked {
        // SAFETY: as above; the structure begins with the one that this fills.
        unsafe { (library.query_device)(raw, attr.as_mut_ptr().cast()) };
    }
    // SAFETY: all zero is a value of it, too.
    let attr = unsafe { attr.assume_init_ref() };
    let has = |flag| attr.orig.device_cap_flags & flag != 0;
    let has_ex = |flag| attr.device_cap_flags_ex & flag != 0;
    Capabilities {
        windows_1: has(ffi::MEM_WINDOW_DEVICE),
        windows_2b: has(ffi::MEM_WINDOW_2B_DEVICE),
        atomic_write: has_ex(ffi::ATOMIC_WRITE_DEVICE),
        flush: has_ex(ffi::FLUSH_DEVICE),
    }
}

/// The GID that RoCE v2 to `peer` goes out from: of the peer's family; one that is routable for a
/// peer that is, a link-local one for a link-local peer; the first of several.
#[must_use]
pub fn choose_gid(entries: &[GidEntry], peer: IpAddr) -> Option<GidEntry> {
    let is_link_local = |ip: IpAddr| match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    let fits = |entry: &&GidEntry| {
        let own = entry.gid.ip();
        entry.kind == GidType::RoceV2
            && own.is_ipv4() == peer.is_ipv4()
            && is_link_local(own) == is_link_local(peer)
    };
    entries.iter().filter(fits).min_by_key(|e| e.index).copied()
}

fn last_errno() -> i32 {
    io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or(libc::EIO)
}

/// The error of a function that returns 0, an error number, or -1 and `errno`.
fn check(result: c_int) -> Result<(), Error> {
    match result {
        0 => Ok(()),
        -1 => Err(Error::Os(last_errno())),
        other => Err(Error::Os(other.abs())),
    }
}

fn set_nonblocking(fd: c_int) -> Result<(), Error> {
    // SAFETY: flags of an open file descriptor.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    // SAFETY: as above.
    if flags < 0 || unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
        return Err(Error::Os(last_errno()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_devices_says_why_and_one_with_them_tells_about_each() {
        match devices() {
            Err(error) => assert!(!error.to_string().is_empty()),
            Ok(entries) => {
                for entry in entries {
                    let context = Context::open(&entry.name).unwrap();
                    assert!(context.query_device().unwrap().phys_port_cnt > 0);
                    context.query_port(1).unwrap();
                    context.gids(1).unwrap();
                }
            }
        }
        assert!(Context::open("no such device").is_err());
    }

    #[test]
    fn the_gid_is_of_the_peers_family_and_scope() {
        let entry = |index, ip: &str, kind| GidEntry {
            index,
            gid: Gid::from_ip(ip.parse().unwrap()),
            kind,
        };
        let table = [
            entry(0, "fe80::1", GidType::InfinibandOrRoceV1),
            entry(1, "fe80::1", GidType::RoceV2),
            entry(2, "10.0.0.1", GidType::InfinibandOrRoceV1),
            entry(5, "10.1.0.1", GidType::RoceV2),
            entry(3, "10.0.0.1", GidType::RoceV2),
            entry(4, "2001:db8::1", GidType::RoceV2),
        ];
        for (peer, index) in [
            ("192.0.2.1", Some(3)),
            ("2001:db8::9", Some(4)),
            ("fe80::9", Some(1)),
            ("169.254.0.9", None),
        ] {
            let chosen = choose_gid(&table, peer.parse().unwrap());
            assert_eq!(chosen.map(|e| e.index), index, "{peer}");
        }
    }

    #[test]
    fn what_stands_behind_a_device_is_told_by_its_place_and_type() {
        let root = std::env::temp_dir().join(format!("lowtide-sysfs-{}", std::process::id()));
        let class = root.join("class");
        std::fs::create_dir_all(&class).unwrap();
        for (name, place, kind, driver) in [
            ("mlx5_0", "devices/pci0/mlx5_0", "1: CA\n", Driver::Hardware),
            ("rxe0", "devices/virtual/rxe0", "1: CA\n", Driver::Rxe),
            ("siw0", "devices/virtual/siw0", "4: RNIC\n", Driver::Siw),
        ] {
            let real = root.join(place);
            std::fs::create_dir_all(&real).unwrap();
            std::fs::write(real.join("node_type"), kind).unwrap();
            std::os::unix::fs::symlink(&real, class.join(name)).unwrap();
            assert_eq!(driver_of(&class, name), driver);
        }
        std::fs::remove_dir_all(root).unwrap();
    }
}
