//! Memory windows: keys to part of a region that their owner gives out and takes back.
//!
//! Owns: the rules of binding. Type 1 belongs to a protection domain and moves whenever its owner
//! says so; type 2 (2B) is bound by a work request to one queue pair, only while it has no place, and
//! loses its place when its owner or that queue pair's peer invalidates it.
//!
//! Invariant: a window's place names its region by key, so that a region that takes the index of one
//! that was deregistered is never reached through an old window.
//!
//! Source: IBTA volume 1, 10.6.7; Linux `rxe_mw.c`.

use super::{Access, AccessError, Key, Memory, Region};

/// Type of a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WindowKind {
    /// For any queue pair of its protection domain.
    One,
    /// For the queue pair that bound it (2B).
    Two,
}

/// Part of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowPlace {
    /// The region.
    pub region: Key,
    /// Address of the first byte there.
    pub addr: u64,
    /// Length in bytes.
    pub len: u64,
    /// Peers count addresses from 0.
    pub is_zero_based: bool,
}

/// A window and where it is bound.
#[derive(Debug)]
pub struct Window {
    kind: WindowKind,
    place: Option<Place>,
}

/// A checked place.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) region: Key,
    /// From the start of the region.
    pub(super) offset: u64,
    pub(super) len: u64,
    /// Number of the queue pair that bound it.
    qp: u32,
}

impl Window {
    /// Where the peer of queue pair `peer_of` may use it; none for work requests of our own.
    pub(super) fn place(&self, peer_of: Option<u32>) -> Option<Place> {
        let place = self.place?;
        let qp = peer_of?;
        (self.kind == WindowKind::One || place.qp == qp).then_some(place)
    }

    pub(super) fn place_len(&self) -> usize {
        self.place.map_or(0, |place| place.len as usize)
    }
}

impl Memory {
    /// Makes a window without a place; none when the table is full.
    pub fn create_window(&mut self, domain: u32, kind: WindowKind) -> Option<Key> {
        let window = Window { kind, place: None };
        self.register(domain, Region::Window(window), Access::default())
    }

    /// Binds a window for queue pair `qp`: under the key `new`, which differs in its low eight bits
    /// only, and with these rights. A length of 0 takes the place of a window of type 1 away.
    ///
    /// # Errors
    /// What of the rules above, or of the region's rights and bounds, is not kept.
    pub fn bind(
        &mut self,
        domain: u32,
        qp: u32,
        window: Key,
        new: Key,
        place: &WindowPlace,
        access: Access,
    ) -> Result<(), AccessError> {
        let (index, entry) = self.entry(domain, window)?;
        let Some(Region::Window(old)) = &entry.region else {
            return Err(AccessError::UnknownKey);
        };
        let kind = old.kind;
        if new.name() != window.name() || (kind == WindowKind::Two && old.place.is_some()) {
            return Err(AccessError::UnknownKey);
        }
        let bound = match (place.len, kind) {
            (0, WindowKind::Two) => return Err(AccessError::OutOfRange),
            (0, WindowKind::One) => None,
            _ => Some(self.admit(domain, qp, place, access)?),
        };
        let index = index as usize;
        self.take_place(index);
        let entry = &mut self.entries[index];
        entry.key = new;
        (entry.access, entry.rights) = (access, access.bits());
        entry.base = if place.is_zero_based { 0 } else { place.addr };
        entry.region = Some(Region::Window(Window { kind, place: bound }));
        if let Some(bound) = bound {
            let region = self.index(bound.region).expect("it has just been admitted");
            self.entries[region].windows += 1;
        }
        Ok(())
    }

    /// Whether the region lets a window be bound there.
    fn admit(
        &self,
        domain: u32,
        qp: u32,
        place: &WindowPlace,
        access: Access,
    ) -> Result<Place, AccessError> {
        let (_, entry) = self.entry(domain, place.region)?;
        let needs_write = access.remote_write || access.remote_atomic;
        let is_region = matches!(entry.region, Some(Region::Shared(_) | Region::Foreign(_)));
        if !is_region || !entry.access.window_bind || (needs_write && !entry.access.local_write) {
            return Err(AccessError::NoRight);
        }
        let size = entry.region.as_ref().map_or(0, Region::len) as u64;
        let offset = place.addr.wrapping_sub(entry.base);
        match offset.checked_add(place.len) {
            Some(end) if end <= size => Ok(Place {
                region: place.region,
                offset,
                len: place.len,
                qp,
            }),
            _ => Err(AccessError::OutOfRange),
        }
    }

    /// Takes the place of a type 2 window away, for queue pair `qp` or its peer.
    pub(super) fn unbind(&mut self, qp: u32, key: Key) -> Result<(), AccessError> {
        let index = self.index(key).ok_or(AccessError::UnknownKey)?;
        match &self.entries[index].region {
            Some(Region::Window(window)) if window.kind == WindowKind::Two => {
                if window.place(Some(qp)).is_none() {
                    return Err(AccessError::UnknownKey);
                }
                self.take_place(index);
                Ok(())
            }
            _ => Err(AccessError::NoRight),
        }
    }

    fn take_place(&mut self, index: usize) {
        let Some(Region::Window(window)) = &mut self.entries[index].region else {
            return;
        };
        let Some(place) = window.place.take() else {
            return;
        };
        if let Some(region) = self.index(place.region) {
            let region = &mut self.entries[region];
            region.windows = region.windows.saturating_sub(1);
        }
    }

    /// Destroys a window, by its key or one that it had.
    pub fn destroy_window(&mut self, key: Key) {
        let Some(index) = self.names.find(key.name()) else {
            return;
        };
        let index = index as usize;
        if let Some(Region::Window(_)) = self.entries[index].region {
            self.take_place(index);
            self.entries[index].region = None;
            self.release(index);
        }
    }

    /// Windows bound to a region.
    pub fn windows(&self, key: Key) -> u32 {
        self.index(key)
            .map_or(0, |index| self.entries[index].windows)
    }
}

#[cfg(test)]
mod tests {
    use super::super::SharedMemory;
    use super::*;

    const READ: Access = Access {
        remote_read: true,
        local_write: false,
        remote_write: false,
        remote_atomic: false,
        flush_global: false,
        window_bind: false,
    };

    fn place(region: Key, addr: u64, len: u64) -> WindowPlace {
        WindowPlace {
            region,
            addr,
            len,
            is_zero_based: false,
        }
    }

    #[test]
    fn a_type_2_window_is_for_one_queue_pair_and_bound_once_at_a_time() {
        let mut memory = Memory::default();
        let region = memory
            .register_shared(1, SharedMemory::new(100), Access::ALL)
            .unwrap();
        let window = memory.create_window(1, WindowKind::Two).unwrap();
        let check = |memory: &Memory, qp, key, va, len| {
            memory
                .check_peer(1, qp, key, va, len, READ)
                .map(|s| s.offset)
        };
        assert_eq!(
            check(&memory, 7, window, 0, 1),
            Err(AccessError::UnknownKey)
        );
        let new = Key(window.0 ^ 0xFF);
        let bind = |memory: &mut Memory, from, to, place: &WindowPlace| {
            memory.bind(1, 7, from, to, place, READ)
        };
        let outside = place(region, 90, 11);
        assert_eq!(
            bind(&mut memory, window, new, &outside),
            Err(AccessError::OutOfRange)
        );
        let nothing = place(region, 90, 0);
        assert_eq!(
            bind(&mut memory, window, new, &nothing),
            Err(AccessError::OutOfRange)
        );
        let other = Key(window.0 + 256);
        assert!(bind(&mut memory, window, other, &place(region, 0, 1)).is_err());
        assert_eq!(
            bind(&mut memory, window, new, &place(region, 20, 30)),
            Ok(())
        );
        assert_eq!(memory.windows(region), 1);
        assert_eq!(check(&memory, 7, new, 20, 30), Ok(20));
        assert_eq!(check(&memory, 7, new, 21, 30), Err(AccessError::OutOfRange));
        assert_eq!(check(&memory, 7, new, 19, 1), Err(AccessError::OutOfRange));
        assert_eq!(check(&memory, 8, new, 20, 1), Err(AccessError::UnknownKey));
        assert_eq!(
            check(&memory, 7, window, 20, 1),
            Err(AccessError::UnknownKey)
        );
        let write = Access {
            remote_write: true,
            ..Access::default()
        };
        assert!(memory.check_peer(1, 7, new, 20, 1, write).is_err());
        let ours = memory.check(1, new, 20, 1, Access::default());
        assert_eq!(
            ours,
            Err(AccessError::UnknownKey),
            "no work request uses a window"
        );
        assert!(
            bind(&mut memory, new, window, &place(region, 0, 1)).is_err(),
            "it is bound"
        );
        assert!(
            memory.invalidate(1, 8, new).is_err(),
            "another queue pair's"
        );
        assert_eq!(memory.invalidate(1, 7, new), Ok(()));
        assert_eq!(
            (
                check(&memory, 7, new, 20, 1).is_err(),
                memory.windows(region)
            ),
            (true, 0)
        );
        assert_eq!(bind(&mut memory, new, window, &place(region, 0, 1)), Ok(()));
    }

    #[test]
    fn a_type_1_window_moves_and_dies_with_its_region() {
        let mut memory = Memory::default();
        let region = memory
            .register_shared(1, SharedMemory::new(100), Access::ALL)
            .unwrap();
        let window = memory.create_window(1, WindowKind::One).unwrap();
        for (addr, is_zero_based) in [(0, false), (50, true)] {
            let place = WindowPlace {
                is_zero_based,
                ..place(region, addr, 50)
            };
            assert_eq!(memory.bind(1, 7, window, window, &place, READ), Ok(()));
            assert_eq!(memory.windows(region), 1, "it moves");
            let va = if is_zero_based { 0 } else { addr };
            let ours = memory.check(1, window, va, 1, Access::default());
            assert_eq!(ours, Err(AccessError::UnknownKey), "for peers alone");
            let span = memory.check_peer(1, 9, window, va, 50, READ).unwrap();
            assert_eq!(span.offset, addr, "any queue pair of the domain");
            assert!(memory.check_peer(2, 9, window, va, 50, READ).is_err());
        }
        assert_eq!(memory.invalidate(1, 7, window), Err(AccessError::NoRight));
        memory.deregister(region);
        // Another takes its place in the table, under another key.
        let again = memory.register_shared(1, SharedMemory::new(100), Access::ALL);
        assert_ne!(again.unwrap(), region);
        assert!(memory.check_peer(1, 9, window, 0, 1, READ).is_err());
        let nowhere = place(region, 0, 0);
        assert_eq!(memory.bind(1, 7, window, window, &nowhere, READ), Ok(()));
        memory.destroy_window(window);
        assert!(memory.bind(1, 7, window, window, &nowhere, READ).is_err());
    }

    /// A flush of all of it names no range that would be checked.
    #[test]
    fn a_window_is_flushed_for_the_queue_pair_that_bound_it_if_it_says_so() {
        let mut memory = Memory::default();
        let region = memory
            .register_shared(1, SharedMemory::new(8), Access::ALL)
            .unwrap();
        let flush = Access {
            flush_global: true,
            ..Access::default()
        };
        for (access, is_granted) in [(flush, true), (READ, false)] {
            let window = memory.create_window(1, WindowKind::Two).unwrap();
            let all = place(region, 0, 8);
            assert!(!memory.grants_flush(1, 7, window), "it has no place");
            memory.bind(1, 7, window, window, &all, access).unwrap();
            let grants = [7, 8].map(|qp| memory.grants_flush(1, qp, window));
            assert_eq!(grants, [is_granted, false]);
        }
        assert!(memory.grants_flush(1, 8, region) && !memory.grants_flush(2, 7, region));
    }

    #[test]
    fn a_region_says_what_windows_may_do() {
        let mut memory = Memory::default();
        let read_only = Access {
            window_bind: true,
            ..READ
        };
        let closed = Access {
            window_bind: false,
            ..Access::ALL
        };
        let mut shared = |access| {
            memory
                .register_shared(1, SharedMemory::new(8), access)
                .unwrap()
        };
        let (read_only, closed) = (shared(read_only), shared(closed));
        let window = memory.create_window(1, WindowKind::Two).unwrap();
        let write = Access {
            remote_write: true,
            ..Access::default()
        };
        for (region, access) in [(read_only, write), (closed, READ), (window, READ)] {
            let bound = memory.bind(1, 7, window, window, &place(region, 0, 8), access);
            assert_eq!(bound, Err(AccessError::NoRight));
        }
    }
}
