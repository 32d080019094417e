//! Lists of elements as a queue keeps them: the first with the request, the others beside the queue.
//!
//! Most requests have one element. Room for [`super::SGE_MAX`] in each would be the larger part of a
//! queue pair's memory.
//!
//! Invariant: what lies beside the queue is that of its requests, in their order.

use alloc::collections::VecDeque;

use super::memory::{Fragments, SgList, Sge, slice};
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

    /// The same at the front.
    pub fn push_front(&mut self, list: &SgList) -> Packed {
        for sge in list.elements().iter().skip(1).rev() {
            self.others.push_front(*sge);
            self.begin = self.begin.wrapping_sub(1);
        }
        packed(list, self.begin)
    }

    /// The list of the request at the front, which leaves the queue.
    #[inline]
    pub fn pop_front(&mut self, packed: &Packed) -> SgList {
        let list = self.list(packed);
        self.drop_front(packed);
        list
    }

    /// The same for one that nobody looks at any more.
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
    #[inline]
    pub fn slice(&self, packed: &Packed, offset: u32, len: u32) -> Fragments {
        if packed.others() == 0 {
            let first = (packed.rest & COUNT != 0).then_some(packed.first);
            return slice(first.into_iter(), offset, len);
        }
        slice(self.elements(packed), offset, len)
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

    pub fn push_front(&mut self, wr: RecvWr) {
        let packed = self.lists.push_front(&wr.local);
        self.queue.push_front((wr.wr_id, packed));
    }

    #[inline]
    pub fn pop_front(&mut self) -> Option<RecvWr> {
        let (wr_id, packed) = self.queue.pop_front()?;
        let local = self.lists.pop_front(&packed);
        Some(RecvWr { wr_id, local })
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
        for round in 0..1000u32 {
            let new = list(round as usize * 7 % (SGE_MAX + 1), round);
            queue.push_back((lists.push_back(&new), new));
            for (packed, list) in &queue {
                assert_eq!(lists.list(packed), *list);
                assert_eq!(packed.total, list.total());
                assert_eq!(lists.slice(packed, 2, 5), list.slice(2, 5));
            }
            if round % 3 == 0 {
                let (packed, list) = queue.pop_front().unwrap();
                assert_eq!(lists.pop_front(&packed), list);
                if round % 2 == 0 {
                    queue.push_front((lists.push_front(&list), list));
                }
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
