//! A receive queue that several queue pairs share (SRQ).

use std::collections::VecDeque;
use std::sync::Arc;

use lowtide_transport_proto::qp::RecvWr;

use super::{Device, QUEUE_PAIRS_MAX, WORK_REQUESTS_MAX};
use crate::raw::Room;

/// The queue. It is bounded; each receive goes to one queue pair.
#[derive(Debug)]
pub(crate) struct SharedReceives {
    queue: VecDeque<RecvWr>,
    /// What posters have been promised.
    room: Arc<Room>,
    depth: u32,
    limit: u32,
    is_limit_reached: bool,
}

impl SharedReceives {
    pub(super) fn new(depth: u32, room: Arc<Room>) -> SharedReceives {
        SharedReceives {
            room,
            queue: VecDeque::with_capacity(depth as usize),
            depth,
            limit: 0,
            is_limit_reached: false,
        }
    }

    /// Appends. The caller has taken room.
    pub(crate) fn post(&mut self, wr: impl IntoIterator<Item = RecvWr>) {
        self.queue.extend(wr);
    }

    /// The next receive, for good.
    pub(super) fn take(&mut self) -> Option<RecvWr> {
        let wr = self.queue.pop_front()?;
        self.room.give(1);
        if (self.queue.len() as u32) < self.limit {
            // Told once; whoever wants to be told again sets it again.
            self.limit = 0;
            self.is_limit_reached = true;
        }
        Some(wr)
    }

    /// Arms the limit: fewer receives than this are an event, once. 0 disarms it.
    pub(crate) fn set_limit(&mut self, limit: u32) {
        self.limit = limit;
        self.is_limit_reached = false;
    }

    pub(crate) fn limit(&self) -> u32 {
        self.limit
    }

    pub(crate) fn depth(&self) -> u32 {
        self.depth
    }

    /// Whether the limit was reached since this was last asked.
    pub(crate) fn poll_limit(&mut self) -> bool {
        std::mem::take(&mut self.is_limit_reached)
    }
}

impl Device {
    /// Makes a shared receive queue; none when it is too deep or there are too many.
    pub(crate) fn create_srq(&mut self, depth: u32, room: Arc<Room>) -> Option<u32> {
        if depth > WORK_REQUESTS_MAX {
            return None;
        }
        let index = match self.srqs.iter().position(Option::is_none) {
            Some(index) => index,
            None if self.srqs.len() >= QUEUE_PAIRS_MAX => return None,
            None => {
                self.srqs.push(None);
                self.srqs.len() - 1
            }
        };
        self.srqs[index] = Some(SharedReceives::new(depth, room));
        Some(index as u32)
    }

    pub(crate) fn srq(&mut self, index: u32) -> Option<&mut SharedReceives> {
        self.srqs.get_mut(index as usize)?.as_mut()
    }

    /// No queue pair uses it any more.
    pub(crate) fn destroy_srq(&mut self, index: u32) {
        if let Some(srq) = self.srqs.get_mut(index as usize) {
            *srq = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use lowtide_transport_proto::qp::{SgList, WrId};

    use super::*;

    #[test]
    fn the_limit_is_told_once_and_only_when_it_is_crossed() {
        let mut shared = SharedReceives::new(4, Arc::new(Room::new(4)));
        let wr = |id| RecvWr {
            wr_id: WrId(id),
            local: SgList::EMPTY,
        };
        for id in 0..4 {
            assert!(shared.room.take());
            shared.post([wr(id)]);
        }
        assert!(!shared.room.take());
        shared.set_limit(3);
        assert_eq!(shared.take(), Some(wr(0)));
        assert!(!shared.poll_limit(), "three are left");
        assert_eq!(shared.take(), Some(wr(1)));
        assert!(shared.poll_limit() && !shared.poll_limit());
        assert_eq!((shared.take(), shared.limit()), (Some(wr(2)), 0));
        assert!(!shared.poll_limit(), "it is disarmed");
    }
}
