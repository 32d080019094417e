//! Completion queues and the channels that tell of them.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::tables::{ChannelLine, Line};
use super::types::{CqId, Error, WorkCompletion};
use super::{CQE_MAX, Context};
use crate::raw::event_fd::EventFd;

/// Where completion queues report that something has come. Cloning shares it.
#[derive(Debug, Clone)]
pub struct CompletionChannel {
    line: ChannelLine,
    fd: Arc<EventFd>,
}

impl CompletionChannel {
    /// The number of the next completion queue that was asked to tell and got something.
    pub fn event(&self) -> Option<CqId> {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        line.pop()
    }
}

impl AsFd for CompletionChannel {
    /// Readable while an event waits.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Where completions go. Cloning shares it.
#[derive(Debug, Clone)]
pub struct CompletionQueue(Arc<Handle>);

#[derive(Debug)]
struct Handle {
    context: Context,
    id: CqId,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.context.shared.lock().tables.remove_cq(self.id);
    }
}

impl Context {
    /// A new channel.
    ///
    /// # Errors
    /// [`Error::Os`] without file descriptors.
    pub fn completion_channel(&self) -> Result<CompletionChannel, Error> {
        let line = Line::new().map_err(|error| Error::Os(error.raw_os_error().unwrap_or(0)))?;
        Ok(CompletionChannel {
            fd: line.fd(),
            line: Arc::new(Mutex::new(line)),
        })
    }

    /// A completion queue for `depth` entries, which tells `channel` when asked to. One entry too
    /// many breaks it ([`super::types::AsyncEvent::CqError`]).
    ///
    /// # Errors
    /// [`Error::Limit`] for none or too many entries.
    pub fn completion_queue(
        &self,
        depth: u32,
        channel: Option<&CompletionChannel>,
    ) -> Result<CompletionQueue, Error> {
        if depth == 0 || depth > CQE_MAX {
            return Err(Error::Limit("completion queue entries"));
        }
        let line = channel.map(|channel| channel.line.clone());
        let id = self.shared.lock().tables.add_cq(depth, line);
        Ok(CompletionQueue(Arc::new(Handle {
            context: self.clone(),
            id,
        })))
    }
}

impl CompletionQueue {
    /// Its number, as events name it.
    pub fn id(&self) -> CqId {
        self.0.id
    }

    pub(crate) fn context(&self) -> &Context {
        &self.0.context
    }

    /// Appends up to `max` completions to `done` and returns how many. Drives the device if none is
    /// there.
    ///
    /// # Errors
    /// [`Error::Exhausted`] when nothing is left of a queue that had no room once.
    pub fn poll(&self, max: usize, done: &mut Vec<WorkCompletion>) -> Result<usize, Error> {
        self.poll_each(max, |work| done.push(work))
    }

    /// Hands up to `max` completions to `take` and returns how many. `take` runs under the device's
    /// lock, so it must not call into the device.
    ///
    /// # Errors
    /// As of [`CompletionQueue::poll`].
    pub fn poll_each(
        &self,
        max: usize,
        mut take: impl FnMut(WorkCompletion),
    ) -> Result<usize, Error> {
        let shared = &self.0.context.shared;
        let mut state = shared.lock_polled(self.0.id);
        let mut taken = 0;
        while taken < max {
            match state.tables.pop_cq(self.0.id) {
                Some(work) => take(work),
                None => break,
            }
            taken += 1;
        }
        if taken == 0 && max > 0 && state.tables.is_cq_broken(self.0.id) {
            return Err(Error::Exhausted("completion: the queue has overflowed"));
        }
        Ok(taken)
    }

    /// Sleeps until there is a completion; false when `deadline` has passed.
    pub fn wait(&self, deadline: Instant) -> bool {
        let id = self.0.id;
        let shared = &self.0.context.shared;
        shared.sleep_until(deadline, |state| !state.tables.is_cq_empty(id))
    }

    /// Has the next completion told to the channel, once; `solicited_only`: the next one of a
    /// solicited message or a failure. What is there already is not told: poll once more afterwards.
    pub fn request_notification(&self, solicited_only: bool) {
        let shared = &self.0.context.shared;
        let mut state = shared.lock();
        state.tables.arm_cq(self.0.id, solicited_only);
        shared.hand_over(&mut state);
    }

    /// Changes the number of entries.
    ///
    /// # Errors
    /// [`Error::Limit`] for none, too many, or fewer than are there.
    pub fn resize(&self, depth: u32) -> Result<(), Error> {
        let mut state = self.0.context.shared.lock();
        if depth == 0 || depth > CQE_MAX || !state.tables.resize_cq(self.0.id, depth) {
            return Err(Error::Limit("completion queue entries"));
        }
        Ok(())
    }
}
