//! Completion queues and their channels.

use std::ffi::{c_int, c_void};
use std::fmt;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use super::{Context, check, convert, ffi, last_errno, set_nonblocking};
use crate::raw::types::{CqId, Error, WorkCompletion};

/// Completions taken from the device at once.
const BATCH: usize = 16;

/// A file descriptor that tells of completions. Cloning shares it.
#[derive(Clone)]
pub struct CompletionChannel(Arc<Channel>);

struct Channel {
    context: Context,
    channel: NonNull<ffi::CompChannel>,
}

// SAFETY: the library locks for itself.
unsafe impl Send for Channel {}
// SAFETY: as above.
unsafe impl Sync for Channel {}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: the last holder goes; completion queues on it hold it.
        unsafe { (self.context.library().destroy_comp_channel)(self.channel.as_ptr()) };
    }
}

impl CompletionChannel {
    /// The next queue that had a completion after it was asked to tell; none if there is none. For
    /// edge-triggered polling: ask until there is none, rearm, and poll the queue once more.
    pub fn event(&self) -> Option<CqId> {
        let library = self.0.context.library();
        let (mut cq, mut context) = (null_mut::<ffi::Cq>(), null_mut::<c_void>());
        let channel = self.0.channel.as_ptr();
        // SAFETY: a live channel whose file descriptor does not block.
        let result = unsafe { (library.get_cq_event)(channel, &raw mut cq, &raw mut context) };
        if result != 0 {
            return None;
        }
        // SAFETY: the queue of the event just got: to destroy it waits for this acknowledgement.
        unsafe { (library.ack_cq_events)(cq, 1) };
        Some(CqId(convert::context_as_number(context)))
    }
}

impl AsFd for CompletionChannel {
    /// Readable while an event waits.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: open as long as the channel lives.
        unsafe { BorrowedFd::borrow_raw(self.0.channel.as_ref().fd) }
    }
}

impl fmt::Debug for CompletionChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompletionChannel").finish_non_exhaustive()
    }
}

/// A completion queue. Cloning shares it.
#[derive(Clone)]
pub struct CompletionQueue(Arc<Handle>);

struct Handle {
    context: Context,
    /// Keeps it alive.
    _channel: Option<CompletionChannel>,
    cq: NonNull<ffi::Cq>,
    id: CqId,
}

// SAFETY: the library and the device's own functions lock for themselves.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: the last holder goes; queue pairs that report here hold it.
        unsafe { (self.context.library().destroy_cq)(self.cq.as_ptr()) };
    }
}

impl Context {
    /// A new channel.
    ///
    /// # Errors
    /// The library's.
    pub fn completion_channel(&self) -> Result<CompletionChannel, Error> {
        // SAFETY: an open context.
        let channel = unsafe { (self.library().create_comp_channel)(self.raw()) };
        let channel = NonNull::new(channel).ok_or_else(|| Error::Os(last_errno()))?;
        let owned = CompletionChannel(Arc::new(Channel {
            context: self.clone(),
            channel,
        }));
        // SAFETY: a live channel.
        set_nonblocking(unsafe { channel.as_ref() }.fd)?;
        Ok(owned)
    }

    /// A completion queue for at least `depth` entries, which tells `channel` when asked to.
    ///
    /// # Errors
    /// [`Error::Argument`] for a channel of another device, or the library's: EINVAL for none or
    /// too many entries.
    pub fn completion_queue(
        &self,
        depth: u32,
        channel: Option<&CompletionChannel>,
    ) -> Result<CompletionQueue, Error> {
        if channel.is_some_and(|channel| channel.0.context.raw() != self.raw()) {
            return Err(Error::Argument("a channel of another device"));
        }
        let depth = c_int::try_from(depth).map_err(|_| Error::Limit("completion queue entries"))?;
        let id = convert::fresh_number();
        let raw_channel = channel.map_or(null_mut(), |channel| channel.0.channel.as_ptr());
        let number = convert::number_as_context(id);
        // SAFETY: an open context and a live channel or none; the number is given back only.
        let cq = unsafe { (self.library().create_cq)(self.raw(), depth, number, raw_channel, 0) };
        let cq = NonNull::new(cq).ok_or_else(|| Error::Os(last_errno()))?;
        Ok(CompletionQueue(Arc::new(Handle {
            context: self.clone(),
            _channel: channel.cloned(),
            cq,
            id: CqId(id),
        })))
    }
}

impl CompletionQueue {
    /// Its number, as events name it.
    pub fn id(&self) -> CqId {
        self.0.id
    }

    pub(super) fn context(&self) -> &Context {
        &self.0.context
    }

    pub(super) fn raw(&self) -> *mut ffi::Cq {
        self.0.cq.as_ptr()
    }

    /// Appends up to `max` completions to `done` and returns how many.
    ///
    /// # Errors
    /// The device's: the queue has overflowed, or the device is gone.
    pub fn poll(&self, max: usize, done: &mut Vec<WorkCompletion>) -> Result<usize, Error> {
        let poll = self.0.context.ops().poll_cq;
        let poll = poll.ok_or(Error::Unsupported("polling"))?;
        let before = done.len();
        while done.len() - before < max {
            let room = BATCH.min(max - (done.len() - before));
            let mut batch = MaybeUninit::<[ffi::Wc; BATCH]>::uninit();
            // SAFETY: a live queue and room for as many completions as are asked for.
            let count = unsafe { poll(self.raw(), room as c_int, batch.as_mut_ptr().cast()) };
            let count = usize::try_from(count).map_err(|_| Error::Os(count.abs()))?;
            for i in 0..count.min(room) {
                // SAFETY: the device filled the first `count`.
                let wc = unsafe { &*batch.as_ptr().cast::<ffi::Wc>().add(i) };
                done.push(convert::completion(wc, self.0.context.0.driver));
            }
            if count < room {
                break;
            }
        }
        Ok(done.len() - before)
    }

    /// Has the next completion told to the channel, once; `solicited_only`: the next one of a
    /// solicited message or a failure. What is there already may not be told: poll once more
    /// afterwards.
    ///
    /// # Errors
    /// The device's.
    pub fn request_notification(&self, solicited_only: bool) -> Result<(), Error> {
        let request = self.0.context.ops().req_notify_cq;
        let request = request.ok_or(Error::Unsupported("notification"))?;
        // SAFETY: a live queue.
        check(unsafe { request(self.raw(), solicited_only.into()) })
    }

    /// Changes the number of entries.
    ///
    /// # Errors
    /// The library's: EINVAL for fewer than are there.
    pub fn resize(&self, depth: u32) -> Result<(), Error> {
        let depth = c_int::try_from(depth).map_err(|_| Error::Limit("completion queue entries"))?;
        // SAFETY: a live queue.
        check(unsafe { (self.0.context.library().resize_cq)(self.raw(), depth) })
    }
}

impl fmt::Debug for CompletionQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CompletionQueue").field(&self.id()).finish()
    }
}
