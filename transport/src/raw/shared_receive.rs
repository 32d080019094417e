//! Shared receive queues.

use std::sync::Arc;

use lowtide_transport_proto::qp::SGE_MAX;

use super::posting::{SharedPosting, queue_of_shared};
use super::queue_pair::{each, recv_wr};
use super::types::{Error, RecvWr, SrqAttr, SrqId};
use super::{BadWr, ProtectionDomain, State};
use crate::device::WORK_REQUESTS_MAX;

/// Receives that several queue pairs take from. Cloning shares it.
#[derive(Debug, Clone)]
pub struct SharedReceiveQueue(Arc<Handle>);

#[derive(Debug)]
struct Handle {
    pd: ProtectionDomain,
    id: SrqId,
    max_sge: u32,
    posting: Arc<SharedPosting>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut state = self.pd.context.shared.lock();
        state.tables.remove_srq(self.id);
        state.device.destroy_srq(self.id.0);
    }
}

impl ProtectionDomain {
    /// A shared receive queue; the limit is not armed yet.
    ///
    /// # Errors
    /// [`Error::Limit`], [`Error::Exhausted`].
    pub fn shared_receive_queue(&self, attr: SrqAttr) -> Result<SharedReceiveQueue, Error> {
        if attr.max_wr == 0 || attr.max_wr > WORK_REQUESTS_MAX {
            return Err(Error::Limit("receives of a shared receive queue"));
        }
        if attr.max_sge > SGE_MAX as u32 {
            return Err(Error::Limit("elements of a request's list"));
        }
        let mut state = self.context.shared.lock();
        let posting = Arc::new(SharedPosting::new(attr.max_wr));
        let id = state.device.create_srq(attr.max_wr, posting.room.clone());
        let id = SrqId(id.ok_or(Error::Exhausted("shared receive queue"))?);
        state.tables.add_srq(id, posting.clone());
        drop(state);
        Ok(SharedReceiveQueue(Arc::new(Handle {
            pd: self.clone(),
            id,
            max_sge: attr.max_sge,
            posting,
        })))
    }
}

impl SharedReceiveQueue {
    /// Its number, as events name it.
    pub fn id(&self) -> SrqId {
        self.0.id
    }

    pub(super) fn is_of(&self, pd: &ProtectionDomain) -> bool {
        self.0.pd.is_of(&pd.context) && self.0.pd.domain == pd.domain
    }

    /// Posts receives, in order. Never waits for another thread: as of
    /// [`super::QueuePair::post_recv`].
    ///
    /// # Errors
    /// The first that was not taken, and why; those before it were.
    ///
    /// # Safety
    /// As of [`super::QueuePair::post_recv`].
    pub unsafe fn post_recv(&self, list: &[RecvWr<'_>]) -> Result<(), BadWr> {
        let (shared, posting) = (&self.0.pd.context.shared, &self.0.posting);
        let checked = |wr: &RecvWr<'_>| {
            let wr = recv_wr(wr, self.0.max_sge)?;
            match posting.room.take() {
                true => Ok(wr),
                false => Err(Error::QueueFull),
            }
        };
        let clear = |state: &mut State| state.take_posts_of_shared(self.id());
        if let Some(mut state) = shared.lock_to_post(false, clear) {
            each(list, |wr| {
                let queue = state.device.srq(self.id().0);
                let queue = queue.ok_or(Error::Argument("no such queue"))?;
                queue.post([checked(wr)?]);
                Ok(())
            })
        } else {
            let result = each(list, |wr| {
                let wr = checked(wr)?;
                posting.receives().push(|waiting| waiting.wr = Some(wr));
                Ok(())
            });
            shared.leave(queue_of_shared(self.id()));
            result
        }
    }

    /// Arms the limit: when fewer receives are left, an event comes, once. 0 disarms it.
    ///
    /// # Errors
    /// [`Error::Limit`] for more than the queue holds.
    pub fn set_limit(&self, limit: u32) -> Result<(), Error> {
        let mut state = self.0.pd.context.shared.lock();
        match state.device.srq(self.0.id.0) {
            Some(queue) if limit <= queue.depth() => {
                queue.set_limit(limit);
                Ok(())
            }
            _ => Err(Error::Limit("the queue's depth")),
        }
    }

    /// Its limits as they are.
    pub fn query(&self) -> SrqAttr {
        let mut state = self.0.pd.context.shared.lock();
        let queue = state.device.srq(self.0.id.0);
        let (max_wr, limit) = queue.map_or((0, 0), |queue| (queue.depth(), queue.limit()));
        SrqAttr {
            max_wr,
            max_sge: self.0.max_sge,
            limit,
        }
    }
}
