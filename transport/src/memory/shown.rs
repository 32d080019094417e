//! Regions that peers on this host reach by themselves, and what we need to reach theirs.

use std::io;
use std::sync::Arc;

use super::{Key, Memory, Region, SharedMemory, Span};
use crate::host::{Exports, Ours};
use crate::names::Random;

impl Memory {
    /// No region, and where those to come are shown to peers on this host.
    pub(crate) fn shown_by(exports: Option<Exports>, random: Random) -> Memory {
        Memory {
            exports,
            ..Memory::new(random)
        }
    }

    /// Shows a region to peers on this host.
    pub(super) fn show(&mut self, key: Key, index: usize) {
        let (Some(exports), Some(entry)) = (&mut self.exports, self.entries.get(index)) else {
            return;
        };
        let (address, segment) = match &entry.region {
            Some(Region::Shared(memory)) => (memory.address(), memory.segment()),
            Some(Region::Foreign(memory)) => (memory.address, None),
            _ => return,
        };
        let len = entry.region.as_ref().map_or(0, Region::len);
        let place = (entry.base, address, len);
        exports.show(key, entry.domain, entry.access, place, segment);
    }

    /// Shared memory that peers on this host map, if there may be any.
    ///
    /// # Errors
    /// The system has no file descriptor or no memory.
    pub(crate) fn new_shared(&self, len: usize) -> io::Result<Arc<SharedMemory>> {
        match self.exports {
            Some(_) if len > 0 => SharedMemory::mapped(len),
            _ => Ok(SharedMemory::new(len)),
        }
    }

    /// Where the bytes of a checked span of our own lie, to be copied from or to; none for what is
    /// in several pieces or gone.
    pub(crate) fn place_of(&mut self, span: Span) -> Option<Ours> {
        let entry = self.entries.get_mut(span.region as usize)?;
        let (address, is_lasting) = match entry.region.as_mut()? {
            Region::Private(bytes) => (bytes.as_mut_ptr().expose_provenance() as u64, true),
            Region::Slab(bytes) => {
                let bytes = Arc::get_mut(bytes)?;
                (bytes.as_mut_ptr().expose_provenance() as u64, true)
            }
            Region::Shared(memory) => (memory.address(), true),
            Region::Foreign(memory) => (memory.address, false),
            Region::Window(_) => return None,
        };
        Some(Ours {
            address: address + span.offset,
            len: span.len as usize,
            is_lasting,
        })
    }
}
