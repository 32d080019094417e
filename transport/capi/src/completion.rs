//! Completion queues and channels.

use std::ffi::{c_int, c_void};
use std::os::fd::{AsFd, AsRawFd};

use lowtide_transport::raw::types::WorkCompletion;
use lowtide_transport::raw::{CompletionChannel, CompletionQueue};

use crate::abi::*;
use crate::device::lowtide_context;
use crate::error::{Fault, code, object, run};
use crate::handle::{
    Name, SharedNames, Unacknowledged, Uses, count, destroy, get, get_mut, lock, make_blocking,
    next, retire,
};

/// Where completion queues report that something has come.
pub struct lowtide_comp_channel {
    raw: CompletionChannel,
    names: SharedNames,
    uses: Uses,
    _device: Uses,
}

/// A completion queue.
pub struct lowtide_cq {
    pub(crate) raw: CompletionQueue,
    pub(crate) uses: Uses,
    pub(crate) unacknowledged: Unacknowledged,
    context: *mut c_void,
    names: SharedNames,
    _device: Uses,
    _channel: Option<Uses>,
}

/// A new completion channel.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_create_comp_channel(
    context: *mut lowtide_context,
) -> *mut lowtide_comp_channel {
    object(|| {
        // SAFETY: the header's contract.
        let context = unsafe { get(context, "context") }?;
        let raw = context.raw.completion_channel()?;
        make_blocking(raw.as_fd())?;
        Ok(Box::new(lowtide_comp_channel {
            raw,
            names: context.names.clone(),
            uses: Uses::default(),
            _device: context.uses.hold(),
        }))
    })
}

/// Ends a channel.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_destroy_comp_channel(channel: *mut lowtide_comp_channel) -> c_int {
    // SAFETY: the header's contract.
    code(|| unsafe {
        destroy(
            channel,
            "channel",
            |c| (&c.uses, "completion queues"),
            |_| (),
        )
    })
}

/// The file descriptor that is readable as long as an event waits; -1 for NULL. It is the
/// channel's: not to be closed or read, but O_NONBLOCK may be set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_comp_channel_fd(channel: *const lowtide_comp_channel) -> c_int {
    // SAFETY: the header's contract.
    run(|| Ok(unsafe { get(channel, "channel") }?.raw.as_fd().as_raw_fd())).unwrap_or(-1)
}

/// A completion queue for cqe entries; one entry too many breaks it. channel may be NULL;
/// comp_vector is not looked at.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_create_cq(
    context: *mut lowtide_context,
    cqe: c_int,
    cq_context: *mut c_void,
    channel: *mut lowtide_comp_channel,
    _comp_vector: c_int,
) -> *mut lowtide_cq {
    object(|| {
        // SAFETY: the header's contract.
        let context = unsafe { get(context, "context") }?;
        let channel = match channel.is_null() {
            true => None,
            // SAFETY: as above.
            false => Some(unsafe { get(channel, "channel") }?),
        };
        let depth = count(cqe, "a completion queue has at least one entry")?;
        let raw = context
            .raw
            .completion_queue(depth, channel.map(|channel| &channel.raw))?;
        let id = raw.id();
        let cq = Box::new(lowtide_cq {
            raw,
            uses: Uses::default(),
            unacknowledged: Unacknowledged::default(),
            context: cq_context,
            names: context.names.clone(),
            _device: context.uses.hold(),
            _channel: channel.map(|channel| channel.uses.hold()),
        });
        lock(&context.names).cqs.insert(id, Name::of(&cq));
        Ok(cq)
    })
}

/// Ends a completion queue, after all its events are acknowledged.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_destroy_cq(cq: *mut lowtide_cq) -> c_int {
    code(|| {
        let before = |cq: &lowtide_cq| {
            let id = cq.raw.id();
            retire(
                &cq.names,
                |names| _ = names.cqs.remove(&id),
                &cq.unacknowledged,
            );
        };
        // SAFETY: the header's contract.
        unsafe { destroy(cq, "cq", |cq| (&cq.uses, "queue pairs"), before) }
    })
}

/// Changes the number of entries.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_resize_cq(cq: *mut lowtide_cq, cqe: c_int) -> c_int {
    code(|| {
        // SAFETY: the header's contract.
        let cq = unsafe { get(cq, "cq") }?;
        Ok(cq
            .raw
            .resize(count(cqe, "a completion queue has at least one entry")?)?)
    })
}

/// Has the next completion told to the channel, once. solicited_only: the next one of a solicited
/// message or a failure. What is there already is not told: poll once more afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_req_notify_cq(
    cq: *mut lowtide_cq,
    solicited_only: c_int,
) -> c_int {
    code(|| {
        // SAFETY: the header's contract.
        let cq = unsafe { get(cq, "cq") }?;
        cq.raw.request_notification(solicited_only != 0);
        Ok(())
    })
}

/// The next completion queue of a channel that was asked to tell and got something, asleep until
/// one does. EAGAIN: the descriptor does not block. Each event must be acknowledged:
/// lowtide_destroy_cq waits for that. cq_context may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_get_cq_event(
    channel: *mut lowtide_comp_channel,
    cq: *mut *mut lowtide_cq,
    cq_context: *mut *mut c_void,
) -> c_int {
    code(|| {
        // SAFETY: the header's contract.
        let (channel, out) = unsafe { (get(channel, "channel")?, get_mut(cq, "cq")?) };
        let out_context = match cq_context.is_null() {
            true => None,
            // SAFETY: as above. Before an event is taken, which could not be given back.
            false => Some(unsafe { get_mut(cq_context, "cq_context") }?),
        };
        let (cq, context) = next(channel.raw.as_fd(), || {
            loop {
                let id = channel.raw.event()?;
                let names = lock(&channel.names);
                if let Some(cq) = names.cqs.get(&id) {
                    // SAFETY: what has a name lives, and from here on until it is acknowledged.
                    let handle = unsafe { cq.handle() };
                    handle.unacknowledged.add();
                    return Some((cq.pointer(), handle.context));
                }
            }
        })?;
        *out = cq;
        if let Some(place) = out_context {
            *place = context;
        }
        Ok(())
    })
}

/// Acknowledges events of a completion queue.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_ack_cq_events(cq: *mut lowtide_cq, nevents: u32) -> c_int {
    code(|| {
        // SAFETY: the header's contract.
        let cq = unsafe { get(cq, "cq") }?;
        cq.unacknowledged.acknowledge(nevents);
        Ok(())
    })
}

/// Takes up to num_entries completions; returns how many, or a negative errno value: -ENOMEM when
/// nothing is left of a queue that had no room once.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_poll_cq(
    cq: *mut lowtide_cq,
    num_entries: c_int,
    wc: *mut lowtide_wc,
) -> c_int {
    let polled = run(|| {
        // SAFETY: the header's contract.
        let cq = unsafe { get(cq, "cq") }?;
        let room = count(num_entries, "a negative number of completions")? as usize;
        if room > 0 && (wc.is_null() || !wc.is_aligned()) {
            return Err(Fault::Null("wc"));
        }
        let mut taken = 0;
        cq.raw.poll_each(room, |work| {
            // SAFETY: fewer than `room` were written before.
            unsafe { wc.add(taken).write(completion(&work)) };
            taken += 1;
        })?;
        Ok(taken as c_int)
    });
    polled.unwrap_or_else(|errno| -errno)
}

fn completion(work: &WorkCompletion) -> lowtide_wc {
    lowtide_wc {
        wr_id: work.wr_id,
        status: work.status.code().into(),
        opcode: work.kind as u32,
        vendor_err: work.vendor_err,
        byte_len: work.byte_len,
        imm_data: work.imm.unwrap_or(0).to_be(),
        invalidated_rkey: work.invalidated.map_or(0, |rkey| rkey.0),
        qp_num: work.qpn.value(),
        src_qp: work.source.value(),
        wc_flags: work.flags.bits(),
    }
}
