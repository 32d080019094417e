//! Lists of elements as a queue keeps them: the first with the request, the others beside the queue.
//!
//! Most requests have one element. Room for [`super::SGE_MAX`] in each would be the larger part of a
//! queue pair's memory.
//!
//! Invariant: what lies beside the queue is that of its requests, in their order.

use alloc::collections::VecDeque;

use super::memory::{Fragment, Fragments, SgList, Sge, pieces};
use super::work::{RecvWr, WrId};

/// Bits of [`Packed::rest`] that count elements.
const COUNT_BITS: u32 = 3;
const COUNT: u32 = (1 << COUNT_BITS) - 1;
const PLACE: u32 = u32::MAX >> COUNT_BITS;

/// A list whose elements but the first lie in a [`Lists`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Packed {
    first: Sge,
    /// Bytes in all.
    pub total: u32,
    /// How many elements it has, and where the others are, counted from the beginning of time.
    rest: u32,
}

impl Packed {
    #[inline]
    const fn others(&self) -> usize {
        (self.rest & COUNT).saturating_sub(1) as usize
    }
}

/// The elements that do not lie with their requests.
#[derive(Debug, Default)]
pub(super) struct Lists {
    others: VecDeque<Sge>,
    /// Place of the first of them.
    begin: u32,
}

impl Lists {
    /// The list of a request that goes to the end of the queue.
    #[inline]
    pub fn push_back(&mut self, list: &SgList) -> Packed {
        let place = self.begin.wrapping_add(self.others.len() as u32);
        if let Some((_, others @ [_, ..])) = list.elements().split_first() {
            self.others.extend(others);
        }
        packed(list, place)
    }

    /// The request at the front leaves the queue, and its list is not looked at any more.
    #[inline]
    pub fn drop_front(&mut self, packed: &Packed) {
        let count = packed.others();
        if count > 0 {
            self.others.drain(..count);
            self.begin = self.begin.wrapping_add(count as u32);
        }
    }

    /// The whole list.
    #[inline]
    pub fn list(&self, packed: &Packed) -> SgList {
        if packed.others() == 0 {
            // Most lists.
            return SgList::of_first(packed.first, packed.rest & COUNT, packed.total);
        }
        let mut elements = [Sge::default(); super::SGE_MAX];
        let mut count = 0;
        for (slot, sge) in elements.iter_mut().zip(self.elements(packed)) {
            *slot = sge;
            count += 1;
        }
        SgList::new(&elements[..count]).unwrap_or(SgList::EMPTY)
    }

    /// As [`SgList::slice`].
    pub fn slice(&self, packed: &Packed, offset: u32, len: u32) -> Fragments {
        let mut fragments = Fragments::EMPTY;
        self.slice_into(packed, (offset, len), &mut fragments);
        fragments
    }

    /// The same, written over others.
    #[inline]
    pub fn slice_into(&self, packed: &Packed, (offset, len): (u32, u32), into: &mut Fragments) {
        into.clear();
        if packed.others() == 0 {
            // Most lists. Of none the first has no byte.
            pieces(core::iter::once(packed.first), offset, len).for_each(|piece| into.push(piece));
        } else {
            pieces(self.elements(packed), offset, len).for_each(|piece| into.push(piece));
        }
    }

    #[inline]
    fn elements(&self, packed: &Packed) -> impl Iterator<Item = Sge> {
        let place = (packed.rest >> COUNT_BITS).wrapping_sub(self.begin) & PLACE;
        let is_empty = packed.rest & COUNT == 0;
        let others = (0..packed.others()).map_while(move |at| self.others.get(place as usize + at));
        (!is_empty)
            .then_some(packed.first)
            .into_iter()
            .chain(others.copied())
    }

    pub fn clear(&mut self) {
        self.others.clear();
    }
}

/// Receives in their order.
#[derive(Debug)]
pub(super) struct Receives {
    queue: VecDeque<(WrId, Packed)>,
    lists: Lists,
}

impl Receives {
    pub fn new(depth: u32) -> Self {
        Self {
            queue: VecDeque::with_capacity(depth as usize),
            lists: Lists::default(),
        }
    }

    pub fn len(&self) -> usize {
        self.queue.len()
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    #[inline]
    pub fn push_back(&mut self, wr: RecvWr) {
        let packed = self.lists.push_back(&wr.local);
        self.queue.push_back((wr.wr_id, packed));
    }

    /// Bytes that the one at the front has room for.
    #[inline]
    pub fn front_total(&self) -> u32 {
        self.queue.front().map_or(0, |(_, packed)| packed.total)
    }

    /// Calls `each` with the fragments of its bytes `offset` to `offset + len`, as far as it reaches.
    #[inline]
    pub fn each_of_front<E>(
        &self,
        (offset, len): (u32, u32),
        each: impl FnMut(Fragment) -> Result<(), E>,
    ) -> Result<(), E> {
        match self.queue.front() {
            // Most of them. Of none the first has no byte.
            Some((_, packed)) if packed.others() == 0 => {
                pieces(core::iter::once(packed.first), offset, len).try_for_each(each)
            }
            Some((_, packed)) => {
                pieces(self.lists.elements(packed), offset, len).try_for_each(each)
            }
            None => Ok(()),
        }
    }

    #[inline]
    pub fn pop_front(&mut self) -> Option<WrId> {
        let (wr_id, packed) = self.queue.pop_front()?;
        self.lists.drop_front(&packed);
        Some(wr_id)
    }

    pub fn clear(&mut self) {
        self.queue.clear();
        self.lists.clear();
    }
}

#[inline]
fn packed(list: &SgList, place: u32) -> Packed {
    let elements = list.elements();
    Packed {
        first: elements.first().copied().unwrap_or_default(),
        total: list.total(),
        rest: place << COUNT_BITS | elements.len() as u32,
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::super::{Lkey, SGE_MAX};
    use super::*;

    /// A list of `count` elements that no other has.
    fn list(count: usize, name: u32) -> SgList {
        let elements: Vec<_> = (0..count as u32)
            .map(|at| Sge {
                lkey: Lkey(name),
                addr: u64::from(at) << 20,
                len: at + 1,
            })
            .collect();
        SgList::new(&elements).unwrap()
    }

    #[test]
    fn lists_are_what_they_were_wherever_they_lie() {
        let mut lists = Lists {
            // Places pass the end of their numbers.
            begin: PLACE - 20,
            ..Lists::default()
        };
        let mut queue = VecDeque::new();
        let mut slice = Fragments::EMPTY;
        for round in 0..1000u32 {
            let new = list(round as usize * 7 % (SGE_MAX + 1), round);
            queue.push_back((lists.push_back(&new), new));
            for (packed, list) in &queue {
                assert_eq!(lists.list(packed), *list);
                assert_eq!(packed.total, list.total());
                lists.slice_into(packed, (2, 5), &mut slice);
                assert_eq!(slice, list.slice(2, 5));
            }
            if round % 3 == 0 {
                let (packed, list) = queue.pop_front().unwrap();
                assert_eq!(lists.list(&packed), list);
                lists.drop_front(&packed);
            }
            if queue.len() > 8 {
                let (packed, _) = queue.pop_front().unwrap();
                lists.drop_front(&packed);
            }
        }
        let others: usize = queue.iter().map(|(packed, _)| packed.others()).sum();
        assert_eq!(lists.others.len(), others, "nothing stays behind");
    }
}
