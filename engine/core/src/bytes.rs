//! Immutable bytes that many hold at once: in redo, windows, caches, and in what was received.
//!
//! Invariant: a value is its contents; where they lie shows in nothing but [`Bytes::place`], and
//! whether its checksum is known already in nothing but [`Bytes::checksum`].
//!
//! Deliberately absent: growth, and any way to change what somebody else may be reading.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::hash::{Hash, Hasher};
use core::ops::{Deref, Range};

/// A stretch of shared bytes, cheap to clone. It keeps all of what it is part of.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<[u8]>,
    start: u32,
    end: u32,
    checksum: Option<u32>,
}

impl Bytes {
    /// Part of `owner`; `None` if `range` is not within it or reaches beyond 4 GiB.
    #[must_use]
    pub fn part_of(owner: &Arc<[u8]>, range: Range<usize>) -> Option<Bytes> {
        owner.get(range.clone())?;
        Some(Bytes {
            owner: owner.clone(),
            start: u32::try_from(range.start).ok()?,
            end: u32::try_from(range.end).ok()?,
            checksum: None,
        })
    }

    /// Says what the CRC-32C (Castagnoli) of these bytes is, which the caller has just computed.
    #[must_use]
    pub fn with_checksum(self, checksum: u32) -> Bytes {
        Bytes {
            checksum: Some(checksum),
            ..self
        }
    }

    /// The CRC-32C of these bytes, if it was computed where they came in: of long ones, each
    /// computation costs as much as sending them.
    #[must_use]
    pub fn checksum(&self) -> Option<u32> {
        self.checksum
    }

    /// What it is part of, and which part.
    #[must_use]
    pub fn place(&self) -> (&Arc<[u8]>, Range<usize>) {
        (&self.owner, self.start as usize..self.end as usize)
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.owner[self.start as usize..self.end as usize]
    }
}

impl From<Arc<[u8]>> for Bytes {
    fn from(owner: Arc<[u8]>) -> Bytes {
        let end = u32::try_from(owner.len()).expect("values are far shorter than 4 GiB");
        Bytes {
            owner,
            start: 0,
            end,
            checksum: None,
        }
    }
}

impl From<&[u8]> for Bytes {
    fn from(bytes: &[u8]) -> Bytes {
        Arc::<[u8]>::from(bytes).into()
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Bytes {
        Arc::<[u8]>::from(bytes).into()
    }
}

impl<const N: usize> From<[u8; N]> for Bytes {
    fn from(bytes: [u8; N]) -> Bytes {
        bytes.as_slice().into()
    }
}

impl FromIterator<u8> for Bytes {
    fn from_iter<I: IntoIterator<Item = u8>>(bytes: I) -> Bytes {
        bytes.into_iter().collect::<Arc<[u8]>>().into()
    }
}

impl Default for Bytes {
    fn default() -> Bytes {
        [].into()
    }
}

impl PartialEq for Bytes {
    fn eq(&self, other: &Bytes) -> bool {
        **self == **other
    }
}

impl Eq for Bytes {}

impl Hash for Bytes {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (**self).hash(state);
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_equals_a_copy_and_keeps_its_whole() {
        let owner: Arc<[u8]> = Arc::from(*b"hello");
        let part = Bytes::part_of(&owner, 1..4).unwrap();
        assert_eq!(part, Bytes::from(*b"ell"));
        assert_eq!(part.place(), (&owner, 1..4));
        assert_eq!(Bytes::part_of(&owner, 3..6), None);
        #[allow(clippy::reversed_empty_ranges, reason = "it is what is refused")]
        let reversed = Bytes::part_of(&owner, 4..3);
        assert_eq!(reversed, None);
        assert_eq!(Bytes::part_of(&owner, 5..5), Some(Bytes::default()));
        drop(owner);
        assert_eq!(&part.place().0[..], b"hello");
    }
}
