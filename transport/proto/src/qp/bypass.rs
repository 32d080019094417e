//! For a caller that has another way to the peer than packets, or knows more of it than they tell.

use super::{QpKind, QpState, QueuePair, SendOp, SgList, Status};

impl QueuePair {
    /// What is next to be sent, if nothing of it and nothing before it is under way. A
    /// caller that can do without packets what it asks for does so and calls
    /// [`Self::finish_untouched`].
    #[must_use]
    #[inline]
    pub fn untouched(&self) -> Option<&SendOp> {
        let is_sending = self.is_sending() && self.link.kind == QpKind::Rc;
        self.requester.untouched().filter(|_| is_sending)
    }

    /// The local memory of that request, or of whichever stands at the front.
    #[must_use]
    pub fn front_list(&self) -> SgList {
        self.requester.front_list()
    }

    /// That request has been carried out.
    pub fn finish_untouched(&mut self) {
        if self.untouched().is_some() {
            self.requester.finish_untouched(&self.link, &mut self.out);
            self.note_drained();
        }
    }

    /// The caller knows that the peer is gone for good; whether that has changed anything. If
    /// something is posted, it ends: the oldest send with [`Status::RetryExceeded`], as it would after
    /// all retries, and all else flushed. Otherwise nothing happens until something is.
    pub fn handle_peer_gone(&mut self) -> bool {
        use QpState::{Rtr, Rts, Sqd, Sqe};
        let is_connected = matches!(self.state, Rtr | Rts | Sqd | Sqe);
        let is_waiting = self.requester.posted() > 0 || self.responder.receives_posted() > 0;
        let has_ended = is_connected && is_waiting && self.link.kind == QpKind::Rc;
        if has_ended {
            let is_sending = self.requester.posted() > 0;
            let oldest = self.requester.oldest_failure(Status::RetryExceeded);
            self.enter_error(Some(oldest).filter(|_| is_sending));
        }
        has_ended
    }
}
