//! Requests that are carried out at this end.

use super::super::memory::{AccessError, Memory, SgList};
use super::super::work::{SendOp, Status};
use super::super::{Link, Reports};
use super::{Failure, Requester};
use crate::wire::Psn;

impl Requester {
    /// Whether a request that is done at this end has its turn.
    #[inline]
    pub fn has_local_work(&self) -> bool {
        let next = self.queue.get(self.cursor);
        next.is_some_and(|wqe| wqe.is_waiting() && !self.is_held_back())
    }

    /// Do it.
    pub fn execute_local(
        &mut self,
        memory: &mut impl Memory,
        link: &Link,
        out: &mut Reports,
    ) -> Result<(), Failure> {
        if !self.has_local_work() {
            return Ok(());
        }
        let Some(wqe) = self.queue.get_mut(self.cursor) else {
            return Ok(());
        };
        let (result, status) = match &wqe.op {
            SendOp::BindWindow(bind) => (memory.bind(bind), Status::WindowBind),
            SendOp::LocalInvalidate(rkey) => {
                (memory.invalidate_local(*rkey), Status::LocalOperation)
            }
            _ => return Ok(()),
        };
        result.map_err(|AccessError| Failure {
            seq: wqe.first,
            status,
            is_local: true,
        })?;
        wqe.is_done = true;
        self.cursor += 1;
        self.finish_done(link, out);
        Ok(())
    }

    /// Complete what was done at this end and stands at the front.
    #[inline]
    pub(super) fn finish_done(&mut self, link: &Link, out: &mut Reports) {
        while self.queue.front().is_some_and(|wqe| wqe.is_done) {
            self.finish_front(link, out);
        }
    }

    /// The request at the front, if all before it is finished, nothing of it has been sent, and it may
    /// start.
    #[inline]
    pub fn untouched(&self) -> Option<&SendOp> {
        if self.una != self.next || self.next != self.high || self.cursor != 0 {
            return None;
        }
        let wqe = self.queue.front()?;
        let is_free = !wqe.is_waiting() && !wqe.is_done && !self.is_held_back();
        (wqe.first == self.next && is_free).then_some(&wqe.op)
    }

    /// The local memory of the request at the front.
    pub fn front_list(&self) -> SgList {
        let front = self.queue.front();
        front.map_or(SgList::EMPTY, |wqe| self.lists.list(&wqe.local))
    }

    /// Completes that request without a packet. Its sequence numbers are passed over, and the PSNs of
    /// those behind it stay without a gap.
    pub fn finish_untouched(&mut self, link: &Link, out: &mut Reports) {
        if self.untouched().is_none() {
            return;
        }
        let Some(wqe) = self.queue.front() else {
            return;
        };
        let end = wqe.end();
        let passed = (end - self.una) & u64::from(Psn::MASK);
        self.attr.sq_psn = self.attr.sq_psn.minus(passed as u32);
        (self.una, self.next, self.high) = (end, end, end);
        self.is_tracking = false;
        self.has_gaps = false;
        // The cursor stays at the front, which is another request now.
        self.finish_front(link, out);
        self.finish_done(link, out);
    }

    /// What is sent again passes what need not be done again.
    #[inline]
    pub(super) fn skip_done(&mut self) {
        while self.queue.get(self.cursor).is_some_and(|wqe| wqe.is_done) {
            self.cursor += 1;
        }
    }
}
