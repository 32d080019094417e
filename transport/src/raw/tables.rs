//! What stands between the device's queue pairs and their owners: completion queues, events.
//!
//! Owns: where each queue pair's completions and events go, the completion queues' entries, their
//! notification, and the line of asynchronous events.
//!
//! Invariants:
//! * a completion queue holds at most as many entries as its owner said; one more, and it is broken
//!   for good: it keeps what it has, its queue pairs go to ERR, and everybody concerned is told;
//! * an eventfd is readable exactly as long as something is in its line.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use lowtide_transport_proto::qp::{Completion, CompletionKind, QpEvent, Status};

use super::event_fd::EventFd;
use super::types::{
    AsyncEvent, CqId, QpAttr, QpCap, QpInitAttr, QpState, QpType, Qpn, SrqId, WcFlags,
    WorkCompletion,
};
use crate::device::{Device, QpId};
use crate::memory::Key;

/// Asynchronous events that may wait; later ones are lost without a trace.
const EVENTS_MAX: usize = 4096;

/// Entries of a completion queue for which memory is reserved when it is made.
const CQE_RESERVED: u32 = 1 << 16;

/// What is known of a queue pair besides its state machine.
#[derive(Debug)]
pub(crate) struct QpEntry {
    pub(crate) qpn: Qpn,
    pub(super) init: QpInitAttr,
    pub(super) send_cq: CqId,
    pub(super) recv_cq: CqId,
    pub(super) srq: Option<SrqId>,
    /// What was last set.
    pub(super) attr: QpAttr,
    /// Room for inline data: a region of as many places as the send queue has.
    pub(super) inline: Option<Key>,
    pub(super) sends_posted: u64,
    /// Its owner wants to know when the send queue has drained.
    pub(super) tells_drained: bool,
}

/// A line of things to be told and the eventfd that says that there are some.
#[derive(Debug)]
pub(super) struct Line<T> {
    waiting: VecDeque<T>,
    fd: Arc<EventFd>,
}

impl<T> Line<T> {
    pub(super) fn new() -> io::Result<Line<T>> {
        Ok(Line {
            waiting: VecDeque::new(),
            fd: Arc::new(EventFd::new()?),
        })
    }

    pub(super) fn fd(&self) -> Arc<EventFd> {
        self.fd.clone()
    }

    pub(super) fn push(&mut self, item: T) {
        if self.waiting.len() >= EVENTS_MAX {
            return;
        }
        if self.waiting.is_empty() {
            self.fd.raise();
        }
        self.waiting.push_back(item);
    }

    pub(super) fn pop(&mut self) -> Option<T> {
        let item = self.waiting.pop_front()?;
        if self.waiting.is_empty() {
            self.fd.clear();
        }
        Some(item)
    }

    pub(super) fn retain(&mut self, keep: impl FnMut(&T) -> bool) {
        let was_empty = self.waiting.is_empty();
        self.waiting.retain(keep);
        // What is not readable is not read: its holder may have made it blocking.
        if self.waiting.is_empty() && !was_empty {
            self.fd.clear();
        }
    }
}

/// The line of a completion channel.
pub(super) type ChannelLine = Arc<Mutex<Line<CqId>>>;

/// What a completion queue's owner waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Armed {
    No,
    Solicited,
    Any,
}

#[derive(Debug)]
struct Cq {
    entries: VecDeque<WorkCompletion>,
    depth: u32,
    channel: Option<ChannelLine>,
    armed: Armed,
    is_broken: bool,
}

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Tables {
    qps: Vec<Option<QpEntry>>,
    cqs: Vec<Option<Cq>>,
    pub(super) events: Line<AsyncEvent>,
}

impl Tables {
    pub(super) fn new() -> io::Result<Tables> {
        Ok(Tables {
            qps: Vec::new(),
            cqs: Vec::new(),
            events: Line::new()?,
        })
    }

    // Queue pairs.

    pub(super) fn add_qp(&mut self, id: QpId, entry: QpEntry) {
        let index = id.0 as usize;
        if self.qps.len() <= index {
            self.qps.resize_with(index + 1, || None);
        }
        self.qps[index] = Some(entry);
    }

    pub(super) fn remove_qp(&mut self, id: QpId) -> Option<QpEntry> {
        self.qps.get_mut(id.0 as usize)?.take()
    }

    /// The entry of a queue pair whose handle exists.
    pub(super) fn qp(&mut self, id: QpId) -> &mut QpEntry {
        let entry = self.qps.get_mut(id.0 as usize).and_then(Option::as_mut);
        entry.expect("it lives as long as its handle")
    }

    // Completion queues.

    pub(super) fn add_cq(&mut self, depth: u32, channel: Option<ChannelLine>) -> CqId {
        let cq = Cq {
            entries: VecDeque::with_capacity(depth.min(CQE_RESERVED) as usize),
            depth,
            channel,
            armed: Armed::No,
            is_broken: false,
        };
        let index = match self.cqs.iter().position(Option::is_none) {
            Some(index) => index,
            None => {
                self.cqs.push(None);
                self.cqs.len() - 1
            }
        };
        self.cqs[index] = Some(cq);
        CqId(index as u32)
    }

    /// No queue pair uses it any more: their handles keep it alive.
    pub(super) fn remove_cq(&mut self, id: CqId) {
        let Some(cq) = self.cqs[id.0 as usize].take() else {
            return;
        };
        if let Some(channel) = cq.channel {
            let mut line = channel.lock().unwrap_or_else(PoisonError::into_inner);
            line.retain(|waiting| *waiting != id);
        }
        self.events
            .retain(|event| *event != AsyncEvent::CqError(id));
    }

    pub(crate) fn is_cq_empty(&self, id: CqId) -> bool {
        let cq = self.cqs[id.0 as usize].as_ref();
        cq.is_none_or(|cq| cq.entries.is_empty())
    }

    /// Whether a receive is among the first completions: something that a program may answer.
    pub(super) fn has_received(&self, id: CqId) -> bool {
        let cq = self.cqs[id.0 as usize].as_ref();
        cq.is_some_and(|cq| cq.entries.iter().take(2).any(|work| work.kind.is_recv()))
    }

    /// Whether something has been lost for want of room.
    pub(super) fn is_cq_broken(&self, id: CqId) -> bool {
        let cq = self.cqs[id.0 as usize].as_ref();
        cq.is_some_and(|cq| cq.is_broken)
    }

    pub(crate) fn pop_cq(&mut self, id: CqId) -> Option<WorkCompletion> {
        let entries = &mut self.cqs[id.0 as usize].as_mut()?.entries;
        let work = entries.pop_front();
        if entries.is_empty() {
            // Begins at the front again: what it never fills is never touched.
            entries.clear();
        }
        work
    }

    /// Changes how many entries fit; false if more are there.
    pub(super) fn resize_cq(&mut self, id: CqId, depth: u32) -> bool {
        let Some(cq) = self.cqs[id.0 as usize].as_mut() else {
            return false;
        };
        let fits = cq.entries.len() <= depth as usize;
        if fits {
            let reserved = depth.min(CQE_RESERVED) as usize;
            cq.entries
                .reserve(reserved.saturating_sub(cq.entries.len()));
            cq.depth = depth;
        }
        fits
    }

    /// Tells the channel of the next completion, or the next solicited or failed one.
    pub(super) fn arm_cq(&mut self, id: CqId, solicited_only: bool) {
        if let Some(cq) = self.cqs[id.0 as usize].as_mut() {
            cq.armed = match (solicited_only, cq.armed) {
                (true, Armed::No | Armed::Solicited) => Armed::Solicited,
                _ => Armed::Any,
            };
        }
    }

    /// Forgets a queue pair's completions: it has been reset.
    pub(super) fn purge(&mut self, qpn: Qpn) {
        for cq in self.cqs.iter_mut().flatten() {
            cq.entries.retain(|entry| entry.qpn != qpn);
        }
    }

    /// Moves a queue pair's completions to their queues, and its events to the line.
    pub(super) fn collect(&mut self, device: &mut Device, id: QpId) {
        let Some(entry) = self.qps.get(id.0 as usize).and_then(Option::as_ref) else {
            return;
        };
        let qpn = entry.qpn;
        let mut broken = None;
        while let Some(completion) = device.poll_completion(id) {
            let cq = match completion.kind.is_recv() {
                true => entry.recv_cq,
                false => entry.send_cq,
            };
            let solicited = completion.solicited || completion.status != Status::Success;
            let work = work_completion(&completion, entry);
            let Some(target) = self.cqs[cq.0 as usize].as_mut() else {
                continue;
            };
            if !target.push(cq, work, solicited) {
                broken = Some(cq);
            }
        }
        while let Some(event) = device.poll_event(id) {
            if event == QpEvent::SendQueueDrained && !entry.tells_drained {
                continue;
            }
            self.events.push(match event {
                QpEvent::CommunicationEstablished => AsyncEvent::CommunicationEstablished(qpn),
                QpEvent::SendQueueDrained => AsyncEvent::SendQueueDrained(qpn),
                QpEvent::RequestError => AsyncEvent::QpRequestError(qpn),
                QpEvent::AccessError => AsyncEvent::QpAccessError(qpn),
                QpEvent::LastWqeReached => AsyncEvent::LastWqeReached(qpn),
            });
        }
        if let Some(srq) = entry.srq
            && device.srq(srq.0).is_some_and(|queue| queue.poll_limit())
        {
            self.events.push(AsyncEvent::SrqLimitReached(srq));
        }
        if let Some(cq) = broken {
            self.break_cq(device, cq);
        }
    }

    /// A completion was lost: its queue is no longer worth anything to its queue pairs.
    fn break_cq(&mut self, device: &mut Device, cq: CqId) {
        self.events.push(AsyncEvent::CqError(cq));
        for (index, entry) in self.qps.iter().enumerate() {
            let Some(entry) = entry else { continue };
            if entry.send_cq != cq && entry.recv_cq != cq {
                continue;
            }
            let id = QpId(index as u32);
            if let Some(qp) = device.qp(id) {
                qp.to_error();
            } else if let Some(qp) = device.datagram(id) {
                qp.to_error();
            }
            self.events.push(AsyncEvent::QpFatal(entry.qpn));
            // What is flushed waits in the state machine for the next collection.
            device.note_finished(index as u32);
        }
    }

    /// Forgets what was to be told of a queue pair that is gone.
    pub(super) fn forget_events(&mut self, qpn: Qpn) {
        self.events.retain(|event| {
            !matches!(event,
                AsyncEvent::QpFatal(of)
                | AsyncEvent::QpRequestError(of)
                | AsyncEvent::QpAccessError(of)
                | AsyncEvent::CommunicationEstablished(of)
                | AsyncEvent::SendQueueDrained(of)
                | AsyncEvent::LastWqeReached(of) if *of == qpn)
        });
    }
}

impl Cq {
    /// Appends and tells whoever waits; false if this is what broke the queue.
    fn push(&mut self, id: CqId, work: WorkCompletion, solicited: bool) -> bool {
        if self.is_broken {
            return true;
        }
        if self.entries.len() >= self.depth as usize {
            self.is_broken = true;
            return false;
        }
        self.entries.push_back(work);
        let is_awaited = match self.armed {
            Armed::No => false,
            Armed::Solicited => solicited,
            Armed::Any => true,
        };
        if let Some(channel) = self.channel.as_ref().filter(|_| is_awaited) {
            self.armed = Armed::No;
            let mut line = channel.lock().unwrap_or_else(PoisonError::into_inner);
            line.push(id);
        }
        true
    }
}

fn work_completion(completion: &Completion, entry: &QpEntry) -> WorkCompletion {
    let is_good = completion.status == Status::Success;
    let is_datagram = entry.init.kind == QpType::Ud;
    let mut flags = WcFlags::NONE;
    if is_good && is_datagram && completion.kind == CompletionKind::Recv {
        flags = flags | WcFlags::GRH;
    }
    if completion.imm.is_some() {
        flags = flags | WcFlags::WITH_IMM;
    }
    if completion.invalidated.is_some() {
        flags = flags | WcFlags::WITH_INV;
    }
    WorkCompletion {
        wr_id: completion.wr_id.0,
        status: completion.status,
        kind: completion.kind,
        vendor_err: 0,
        byte_len: completion.byte_len,
        imm: completion.imm,
        invalidated: completion.invalidated,
        qpn: entry.qpn,
        source: completion.source,
        flags,
    }
}

/// A queue pair's attributes before anything is set.
pub(super) fn attr_of(cap: QpCap) -> QpAttr {
    QpAttr {
        cap,
        state: QpState::Reset,
        current_state: QpState::Reset,
        ..QpAttr::default()
    }
}
