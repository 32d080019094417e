//! What a poster without the device's token knows of a queue, and what waits for the token.
//!
//! Owns: the copy of a queue pair's state that posting checks, room and lines of its queues, and the
//! way from the lines into the state machines.
//!
//! A line's memory is taken when a thread first finds the token taken, or when the program says that one
//! will, so that queues that are never contended have none: it would double what a queue pair takes.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};

use lowtide_transport_proto::qp::{self, QpState, UdSendWr};

use super::posts::{Line, QUEUES_MAX, Room};
use super::progress::State;
use super::types::SrqId;
use crate::device::{QUEUE_PAIRS_MAX, QpId};
use crate::memory::Key;

/// Queues that may have work in lines: of queue pairs, then shared ones.
pub(super) const QUEUES: usize = 2 * QUEUE_PAIRS_MAX;
const _: () = assert!(QUEUES <= QUEUES_MAX);

/// A checked request of a send queue.
#[derive(Debug, Clone, Copy)]
pub(super) enum Request {
    Connected(qp::SendWr),
    Datagram(UdSendWr),
}

/// The bytes of a slot that a request brings with it, and the key that they lie behind.
pub(crate) type Brought = Option<(Key, Box<[u8]>)>;

/// A request that waits for the token.
#[derive(Debug)]
pub(super) struct WaitingSend {
    pub(super) request: Option<Request>,
    /// Its inline data, if it has any.
    pub(super) inline: Vec<u8>,
    pub(super) brought: Brought,
}

/// A receive that waits for the token.
#[derive(Debug, Default)]
pub(super) struct WaitingReceive {
    pub(super) wr: Option<qp::RecvWr>,
    pub(super) brought: Brought,
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Posting {
    /// The state, as it was when completions were last collected.
    state: AtomicU8,
    /// Of the send queue and the receive queue. Not used where a keeper counts.
    pub(super) room: [Room; 2],
    depths: [u32; 2],
    /// Bytes of inline data of one request at most.
    inline_max: u32,
    sends: OnceLock<Line<WaitingSend>>,
    receives: OnceLock<Line<WaitingReceive>>,
}

impl Posting {
    /// For so many sends and receives.
    pub(super) fn new(depths: [u32; 2], inline_max: u32) -> Posting {
        Posting {
            state: AtomicU8::new(QpState::Reset as u8),
            room: depths.map(Room::new),
            depths,
            inline_max,
            sends: OnceLock::new(),
            receives: OnceLock::new(),
        }
    }

    /// Relaxed, as `state`: whoever moves the queue pair tells whoever posts by other means.
    pub(super) fn note_state(&self, state: QpState) {
        let state = state as u8;
        if self.state.load(Ordering::Relaxed) != state {
            self.state.store(state, Ordering::Relaxed);
        }
    }

    fn state(&self) -> QpState {
        QpState::from_code(self.state.load(Ordering::Relaxed)).unwrap_or(QpState::Reset)
    }

    /// Whether sends are taken, for all that is known.
    pub(super) fn admits_sends(&self) -> bool {
        use QpState::{Err, Rts, Sqd, Sqe};
        matches!(self.state(), Rts | Sqd | Sqe | Err)
    }

    /// Whether receives are.
    pub(super) fn admits_receives(&self) -> bool {
        self.state() != QpState::Reset
    }

    pub(super) fn sends(&self) -> &Line<WaitingSend> {
        let item = || WaitingSend {
            request: None,
            inline: Vec::with_capacity(self.inline_max as usize),
            brought: None,
        };
        self.sends.get_or_init(|| Line::new(self.depths[0], item))
    }

    pub(super) fn receives(&self) -> &Line<WaitingReceive> {
        self.receives
            .get_or_init(|| Line::new(self.depths[1], WaitingReceive::default))
    }

    /// Takes the memory of the lines now.
    pub(super) fn prepare(&self) {
        self.sends();
        self.receives();
    }

    /// Whether nothing waits.
    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.sends.get().is_none_or(Line::is_empty)
            && self.receives.get().is_none_or(Line::is_empty)
    }

    /// Forgets what waits. Under the token.
    pub(super) fn clear(&self) {
        while self.sends.get().is_some_and(|line| line.pop(|_| ())) {
            self.room[0].give(1);
        }
        while self.receives.get().is_some_and(|line| line.pop(|_| ())) {
            self.room[1].give(1);
        }
    }
}

/// The same for a shared receive queue.
#[derive(Debug)]
pub(super) struct SharedPosting {
    pub(super) room: Arc<Room>,
    depth: u32,
    receives: OnceLock<Line<WaitingReceive>>,
}

impl SharedPosting {
    pub(super) fn new(depth: u32) -> SharedPosting {
        SharedPosting {
            room: Arc::new(Room::new(depth)),
            depth,
            receives: OnceLock::new(),
        }
    }

    pub(super) fn receives(&self) -> &Line<WaitingReceive> {
        self.receives
            .get_or_init(|| Line::new(self.depth, WaitingReceive::default))
    }
}

/// What a queue is noted under in `Pending`.
pub(super) fn queue_of(id: QpId) -> usize {
    id.0 as usize
}

/// The same for a shared queue.
pub(super) fn queue_of_shared(id: SrqId) -> usize {
    QUEUE_PAIRS_MAX + id.0 as usize
}

impl State {
    /// Posts what has been left in lines.
    pub(super) fn take_posts(&mut self) {
        if !self.posts.has_any() {
            return;
        }
        let posts = self.posts.clone();
        posts.take(|queue| {
            if queue < QUEUE_PAIRS_MAX {
                self.take_posts_of(QpId(queue as u32));
            } else {
                self.take_posts_of_shared(SrqId((queue - QUEUE_PAIRS_MAX) as u32));
            }
        });
    }

    /// Posts what has been left for one queue pair. Whether nothing is left: whoever has not finished
    /// writing its request holds up those behind it.
    pub(super) fn take_posts_of(&mut self, id: QpId) -> bool {
        let Some(posting) = self.tables.posting(id) else {
            return true;
        };
        if posting.is_empty() {
            return true;
        }
        let posting = posting.clone();
        if let Some(line) = posting.receives.get() {
            while line.pop(|waiting| {
                self.attach(waiting.brought.take());
                if let Some(wr) = waiting.wr.take() {
                    self.post_waiting_receive(id, &wr, &posting);
                }
            }) {}
        }
        if let Some(line) = posting.sends.get() {
            while line.pop(|waiting| {
                self.attach(waiting.brought.take());
                if let Some(request) = waiting.request.take() {
                    self.post_waiting_send(id, request, &waiting.inline, &posting);
                }
            }) {}
        }
        self.collect(id);
        posting.is_empty()
    }

    /// Puts what a request has brought where the device finds it.
    pub(super) fn attach(&mut self, brought: Brought) {
        if let Some((key, bytes)) = brought {
            self.device.memory.attach(key, bytes);
        }
    }

    /// A request for which room is taken. In a state that takes none the queue pair has been reset
    /// since, while whoever posted was at it: that forgets requests. The safe layer resets none, so its
    /// slots are never forgotten.
    fn post_waiting_send(&mut self, id: QpId, request: Request, inline: &[u8], posting: &Posting) {
        let request = match inline.len() {
            0 => request,
            _ => self.with_inline(id, request, |place| place.copy_from_slice(inline)),
        };
        if self.post_request(id, request).is_err() {
            debug_assert!(self.tables.qp(id).keepers.is_none());
            posting.room[0].give(1);
        }
    }

    fn post_waiting_receive(&mut self, id: QpId, wr: &qp::RecvWr, posting: &Posting) {
        if self.post_receive(id, wr).is_err() {
            debug_assert!(self.tables.qp(id).keepers.is_none());
            posting.room[1].give(1);
        }
    }

    /// The same for a shared queue.
    pub(super) fn take_posts_of_shared(&mut self, id: SrqId) -> bool {
        let Some(line) = self
            .tables
            .srq(id)
            .and_then(|posting| posting.receives.get())
        else {
            return true;
        };
        if let Some(queue) = self.device.srq(id.0) {
            while line.pop(|waiting| queue.post(waiting.wr.take())) {}
        }
        line.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_forgotten_leaves_all_room_again() {
        let posting = Posting::new([3, 5], 0);
        for _ in 0..3 {
            while posting.room[0].take() {
                posting.sends().push(|_| ());
            }
            while posting.room[1].take() {
                posting.receives().push(|_| ());
            }
            assert!(!posting.is_empty());
            posting.clear();
            assert!(posting.is_empty());
            for (room, depth) in posting.room.iter().zip(posting.depths) {
                let taken = (0..=depth).filter(|_| room.take()).count() as u32;
                assert_eq!(taken, depth);
                room.give(taken);
            }
        }
    }

    /// What `QueuePair::expect_contention` says that it takes.
    #[test]
    fn a_line_takes_some_200_bytes_for_each_request() {
        let sizes = [size_of::<WaitingSend>(), size_of::<WaitingReceive>()];
        assert!(sizes[0] <= 200 && sizes[1] <= 120, "{sizes:?}");
    }
}
