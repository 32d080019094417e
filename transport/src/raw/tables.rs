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

use lowtide_transport_proto::qp::{Completion, QpEvent, Status};

use super::completion::{Completions, encode};
use super::event_fd::EventFd;
use super::posting::{Posting, SharedPosting};
use super::ring::ENTRY;
use super::types::{AsyncEvent, CqId, QpAttr, QpCap, QpInitAttr, QpState, QpType, Qpn, SrqId};
use crate::device::{Device, Machine, QpId};
use crate::memory::{Key, Memory};

/// Asynchronous events that may wait; later ones are lost without a trace.
const EVENTS_MAX: usize = 4096;

/// Who wants to know of completions before those who poll do: the safe layer. It admits no more
/// requests to a queue than that is deep, until their completions have been polled.
pub(crate) trait Keeper: std::fmt::Debug + Send + Sync {
    /// A request has completed. Under the token.
    fn completed(&self, wr_id: u64, memory: &mut Memory);
}

/// The same for the send queue and the receive queue of a queue pair.
pub(crate) type Keepers = [Arc<dyn Keeper>; 2];

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
    /// What posters without the token know of it.
    pub(super) posting: Arc<Posting>,
    /// Requests in the state machine, sends and receives, for which room is taken. None where a keeper
    /// counts them.
    pub(super) held: [u32; 2],
    /// Its owner wants to know when the send queue has drained.
    pub(super) tells_drained: bool,
    pub(super) keepers: Option<Keepers>,
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
    done: Arc<Completions>,
    depth: u32,
    channel: Option<ChannelLine>,
    armed: Armed,
}

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Tables {
    qps: Vec<Option<QpEntry>>,
    cqs: Vec<Option<Cq>>,
    /// What posters without the token know of shared receive queues.
    srqs: Vec<Option<Arc<SharedPosting>>>,
    pub(super) events: Line<AsyncEvent>,
}

impl Tables {
    pub(super) fn new() -> io::Result<Tables> {
        Ok(Tables {
            qps: Vec::new(),
            cqs: Vec::new(),
            srqs: Vec::new(),
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

    pub(super) fn posting(&self, id: QpId) -> Option<&Arc<Posting>> {
        Some(&self.qps.get(id.0 as usize)?.as_ref()?.posting)
    }

    // Completion queues.

    pub(super) fn add_cq(
        &mut self,
        depth: u32,
        channel: Option<ChannelLine>,
    ) -> (CqId, Arc<Completions>) {
        let done = Arc::new(Completions::new(depth));
        let cq = Cq {
            done: done.clone(),
            depth,
            channel,
            armed: Armed::No,
        };
        let index = match self.cqs.iter().position(Option::is_none) {
            Some(index) => index,
            None => {
                self.cqs.push(None);
                self.cqs.len() - 1
            }
        };
        self.cqs[index] = Some(cq);
        (CqId(index as u32), done)
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

    /// Changes how many entries fit; false if more are there.
    pub(super) fn resize_cq(&mut self, id: CqId, depth: u32) -> bool {
        let Some(cq) = self.cqs[id.0 as usize].as_mut() else {
            return false;
        };
        let fits = !cq.done.has_as_many_as(depth as usize + 1);
        if fits {
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

    /// Forgets a queue pair's completions and what of its work holds room: it has been reset.
    pub(super) fn purge(&mut self, id: QpId) {
        let entry = self.qp(id);
        let qpn = entry.qpn;
        entry.forget();
        for cq in self.cqs.iter().flatten() {
            // A broken queue takes nothing again, and keeps what it has.
            if !cq.done.is_broken() {
                cq.done.purge(qpn);
            }
        }
    }

    // Shared receive queues.

    pub(super) fn add_srq(&mut self, id: SrqId, posting: Arc<SharedPosting>) {
        let index = id.0 as usize;
        if self.srqs.len() <= index {
            self.srqs.resize_with(index + 1, || None);
        }
        self.srqs[index] = Some(posting);
    }

    pub(super) fn remove_srq(&mut self, id: SrqId) {
        self.srqs[id.0 as usize] = None;
    }

    pub(super) fn srq(&self, id: SrqId) -> Option<&Arc<SharedPosting>> {
        self.srqs.get(id.0 as usize)?.as_ref()
    }

    /// Moves a queue pair's completions to their queues, and its events to the line.
    #[inline]
    pub(super) fn collect(&mut self, device: &mut Device, id: QpId) {
        let entry = self.qps.get_mut(id.0 as usize).and_then(Option::as_mut);
        let (Some(entry), Some((machine, memory))) = (entry, device.reporting(id)) else {
            return;
        };
        entry.posting.note_state(machine.state());
        let sends = machine.sends_posted();
        if entry.held[0] > sends {
            // Finished and not reported.
            entry.give(0, entry.held[0] - sends);
        }
        let srq = entry.srq;
        if machine.has_reports() {
            let broken = report(entry, machine, memory, &mut self.cqs, &mut self.events);
            if let Some(cq) = broken {
                self.break_cq(device, cq);
            }
        }
        if let Some(srq) = srq {
            self.note_limit(device, srq);
        }
    }

    fn note_limit(&mut self, device: &mut Device, srq: SrqId) {
        if device.srq(srq.0).is_some_and(|queue| queue.poll_limit()) {
            self.events.push(AsyncEvent::SrqLimitReached(srq));
        }
    }

    /// A completion was lost: its queue is no longer worth anything to its queue pairs.
    #[cold]
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

/// Moves what a queue pair has to report; the completion queue that had no room for it.
fn report(
    entry: &mut QpEntry,
    machine: &mut Machine,
    memory: &mut Memory,
    cqs: &mut [Option<Cq>],
    events: &mut Line<AsyncEvent>,
) -> Option<CqId> {
    let (qpn, is_datagram) = (entry.qpn, entry.init.kind == QpType::Ud);
    let mut broken = None;
    let mut hand_on = |completion: Completion| {
        let is_recv = completion.kind.is_recv();
        let side = usize::from(is_recv);
        let solicited = completion.solicited || completion.status != Status::Success;
        let words = encode(&completion, qpn, is_datagram);
        // Whoever sees the completion finds room.
        match &entry.keepers {
            Some(keepers) => keepers[side].completed(completion.wr_id.0, memory),
            None => entry.give(side, 1),
        }
        let cq = match is_recv {
            true => entry.recv_cq,
            false => entry.send_cq,
        };
        let target = cqs[cq.0 as usize].as_mut();
        if target.is_some_and(|target| !target.push(cq, words, solicited)) {
            broken = Some(cq);
        }
    };
    match machine {
        Machine::Connected(qp) => {
            while let Some(completion) = qp.poll_completion() {
                hand_on(completion);
            }
        }
        Machine::Datagram(qp) => {
            while let Some(completion) = qp.poll_completion() {
                hand_on(completion);
            }
        }
    }
    while let Some(event) = machine.poll_event() {
        if event == QpEvent::SendQueueDrained && !entry.tells_drained {
            continue;
        }
        events.push(match event {
            QpEvent::CommunicationEstablished => AsyncEvent::CommunicationEstablished(qpn),
            QpEvent::SendQueueDrained => AsyncEvent::SendQueueDrained(qpn),
            QpEvent::RequestError => AsyncEvent::QpRequestError(qpn),
            QpEvent::AccessError => AsyncEvent::QpAccessError(qpn),
            QpEvent::LastWqeReached => AsyncEvent::LastWqeReached(qpn),
        });
    }
    broken
}

impl QpEntry {
    /// A request is in the state machine, for which room is taken: a send (0) or a receive (1).
    #[inline]
    pub(super) fn hold(&mut self, side: usize) {
        if self.keepers.is_none() {
            self.held[side] += 1;
        }
    }

    /// Gives back the room of so many sends (0) or receives (1). Shared receives have their own.
    #[inline]
    fn give(&mut self, side: usize, count: u32) {
        if side == 1 && self.srq.is_some() {
            return;
        }
        self.held[side] -= count;
        self.posting.room[side].give(count);
    }

    /// Nothing is posted any more.
    fn forget(&mut self) {
        self.posting.clear();
        for (held, room) in self.held.iter_mut().zip(&self.posting.room) {
            room.give(std::mem::take(held));
        }
    }
}

impl Cq {
    /// Appends and tells whoever waits; false if this is what broke the queue.
    #[inline]
    fn push(&mut self, id: CqId, entry: [u64; ENTRY], solicited: bool) -> bool {
        if self.done.is_broken() {
            return true;
        }
        if !self.done.push(self.depth as usize, entry) {
            self.done.set_broken();
            return false;
        }
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

/// A queue pair's attributes before anything is set.
pub(super) fn attr_of(cap: QpCap) -> QpAttr {
    QpAttr {
        cap,
        state: QpState::Reset,
        current_state: QpState::Reset,
        ..QpAttr::default()
    }
}
