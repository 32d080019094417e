//! For a caller that has another way to the peer than packets, or knows more of it than they tell.

use super::{QpKind, QueuePair, SendOp, SgList, Status};

impl QueuePair {
    /// What is next to be sent, if nothing of it and nothing before it is under way. A
    /// caller that can do without packets what it asks for does so and calls
    /// [`Self::finish_untouched`].
    #[must_use]
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

    /// The caller knows that the peer is gone for good. If something is posted it fails with
    /// [`Status::RetryExceeded`], as it would after all retries.
    pub fn handle_peer_gone(&mut self) {
        if self.is_sending() && self.link.kind == QpKind::Rc && self.requester.posted() > 0 {
            self.enter_error(Some(self.requester.oldest_failure(Status::RetryExceeded)));
        }
    }
}
