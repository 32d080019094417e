//! Operations that the proxy cluster originates itself, for a front end that speaks no epochs:
//! pin-then-max (b.4).
//!
//! The coordinator takes the locks as one of its own clients, one after the other in the global
//! order and for one operation at a time, asks every proxy that will merge a
//! part to *pin* at its current epoch, stamps with the maximum of all pins and its own epoch,
//! inserts the operation into its redo, hands the parts over, and only then lets the pins go. A pin
//! is never above the stamp, so each proxy's bound covers the operation without a gap. Pins of a
//! coordinator that dies are dropped when it is fenced.

use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;

use super::{Proxy, WaitingLock};
use crate::effect::{Effect, Port};
use crate::ids::{Age, Epoch, GrantId, Life, NodeId, Seq, StreamSeq};
use crate::lock::{Asker, normalise};
use crate::message::Message;
use crate::op::{Operation, Range, Refusal, Stamp, Update, Want};
use crate::room::Ledger;
use crate::session::{SessionError, Ticket};
use crate::source::Redo;

/// An operation for the proxy to stamp. Every object that it puts or deletes must be covered by
/// an exclusive lock.
#[derive(Clone, Debug)]
pub struct Originate {
    /// Names the request at its asker.
    pub ticket: Ticket,
    /// Locks to take first.
    pub locks: Vec<Want>,
    /// The updates.
    pub updates: Vec<Update>,
}

/// Requests of the lock server on the proxy's own behalf are numbered from here.
const OWN_REQUESTS: u64 = 1 << 62;

#[derive(Debug)]
struct Pending {
    asked: Originate,
    /// Its locks in the global order.
    wants: Vec<Want>,
    /// What was granted of them, in the same order.
    granted: Vec<(NodeId, GrantId, Range)>,
    /// The request for the next one.
    request: Option<u64>,
    /// Proxies whose pin is awaited; `None` before the round began.
    awaiting: Option<BTreeSet<NodeId>>,
    /// Proxies that were asked to pin.
    peers: BTreeSet<NodeId>,
    round: u64,
    at: Epoch,
    /// Given when it first asks for a lock.
    age: Option<Age>,
}

/// Grants of this proxy's own lock server to itself.
type Grants = Vec<(NodeId, GrantId, Range)>;

/// What the proxy keeps for its own operations and for pins of others.
#[derive(Debug)]
pub(super) struct Own {
    redo: Redo,
    /// What is stamped and not everywhere committed.
    ledger: Ledger,
    queue: VecDeque<Pending>,
    /// Stamped operations whose locks are still held.
    holding: VecDeque<(Ticket, Stamp, Grants)>,
    /// Pins held for coordinators.
    pins: BTreeMap<(Life, u64), Epoch>,
    next: u64,
}

impl Own {
    /// Whether m has not passed everything that was stamped here.
    pub(super) fn awaits(&self, minimum: Epoch) -> bool {
        self.redo.awaits(minimum)
    }

    pub(super) fn new() -> Own {
        Own {
            redo: Redo::new(),
            ledger: Ledger::default(),
            queue: VecDeque::new(),
            holding: VecDeque::new(),
            pins: BTreeMap::new(),
            next: 0,
        }
    }

    pub(super) fn bound(&self) -> Option<Epoch> {
        self.redo
            .bound()
            .into_iter()
            .chain(self.pins.values().copied())
            .min()
    }

    /// Own operations up to here are everywhere committed.
    pub(super) fn done(&self) -> Seq {
        self.redo.done()
    }

    /// Pins are not awaited from proxies that `dead` selects; their parts take another path.
    pub(super) fn forget_pins_of(&mut self, dead: impl Fn(NodeId) -> bool) {
        for pending in &mut self.queue {
            pending.peers.retain(|proxy| !dead(*proxy));
            if let Some(awaiting) = &mut pending.awaiting {
                awaiting.retain(|proxy| !dead(*proxy));
            }
        }
    }

    pub(super) fn drop_pins_of(&mut self, victim: Life) {
        self.pins.retain(|(life, _), _| *life != victim);
    }
}

impl Proxy {
    /// Queues an operation of the proxy's own. One that exceeds the budget alone is refused: it could
    /// never be stamped.
    pub fn originate(&mut self, now: crate::ids::Time, asked: Originate) {
        let budget = &self.config.budget;
        let costs = budget.costs(&asked.updates, |_| None);
        if costs.iter().any(|(_, cost)| budget.is_exceeded_by(cost)) {
            let result = Err(SessionError::Refused(Refusal::NotCovered));
            let ticket = asked.ticket;
            self.port.ask(Effect::Outcome { ticket, result });
            return;
        }
        self.own.next += 1;
        let wants = normalise(&asked.locks);
        self.own.queue.push_back(Pending {
            asked,
            wants,
            granted: Vec::new(),
            request: None,
            awaiting: None,
            peers: BTreeSet::new(),
            round: self.own.next,
            at: Epoch(0),
            age: None,
        });
        self.settle(now);
    }

    /// Asks for the next lock of the head; `true` when it has all.
    fn acquire_own(&mut self) -> bool {
        let own = self.port.life();
        let Some(head) = self.own.queue.front_mut() else {
            return false;
        };
        let Some(&Want { home, range, mode }) = head.wants.get(head.granted.len()) else {
            return true;
        };
        if head.request.is_none() {
            self.own.next += 1;
            let request = OWN_REQUESTS + self.own.next;
            head.request = Some(request);
            let age = *head.age.get_or_insert(Age {
                epoch: self.port.epoch(),
                number: self.own.next,
                source: own,
            });
            let asker = Asker {
                holder: own,
                request,
                age,
            };
            self.waiting.push(WaitingLock {
                asker,
                home,
                range,
                mode,
            });
            self.serve_waiting(|w| w.is_in(home, range.space));
        }
        false
    }

    /// Older work wants what the head has: while the head lacks a lock it gives that back, and all
    /// later ones, and asks again (see [`crate::lock`]).
    pub(super) fn own_revoked(&mut self, grant: GrantId, age: Age) {
        let Some(head) = self.own.queue.front_mut() else {
            return;
        };
        let lacks = head.granted.len() < head.wants.len();
        if !lacks || head.age.is_none_or(|own| own < age) {
            return;
        }
        let Some(index) = head.granted.iter().position(|(_, g, _)| *g == grant) else {
            return;
        };
        head.request = None;
        let back = head.granted.split_off(index);
        self.let_go(back);
    }

    /// Lets grants go that the head has no use for. What was stamped before may have written there,
    /// under grants that these have swallowed: then they stay until that is finished.
    fn let_go(&mut self, back: Grants) {
        if let Some((_, _, grants)) = self.own.holding.back_mut() {
            grants.extend(back);
            return;
        }
        let own = self.port.life();
        for (home, grant, range) in back {
            self.locks
                .unlock(home, own, grant, range, &mut self.notices);
        }
    }

    pub(super) fn own_granted(&mut self, request: u64, home: NodeId, grant: GrantId, range: Range) {
        let head = self.own.queue.front_mut();
        if let Some(head) = head.filter(|head| head.request == Some(request)) {
            head.request = None;
            head.granted.push((home, grant, range));
            return;
        }
        self.let_go(alloc::vec![(home, grant, range)]);
    }

    pub(super) fn pin(&mut self, from: Life, round: u64) {
        if self.is_fenced(from) {
            return;
        }
        let at = self.port.epoch();
        let at = *self.own.pins.entry((from, round)).or_insert(at);
        self.port.send(from.node, Message::Pinned { round, at });
    }

    pub(super) fn unpin(&mut self, from: Life, round: u64) {
        self.own.pins.remove(&(from, round));
    }

    pub(super) fn pinned(&mut self, from: Life, round: u64, at: Epoch) {
        for pending in self.own.queue.iter_mut().filter(|p| p.round == round) {
            if let Some(awaiting) = &mut pending.awaiting {
                awaiting.remove(&from.node);
                pending.at = pending.at.max(at);
            }
        }
    }

    /// Moves the head of the queue on: locks, pins, stamp, hand-over; lets finished locks go.
    pub(super) fn originate_settle(&mut self) {
        self.own.redo.advance(&self.outbox);
        self.own.ledger.settle(self.own.redo.done());
        while let Some((ticket, stamp, _)) = self.own.holding.front() {
            if stamp.id.seq > self.own.redo.done() {
                break;
            }
            let (ticket, stamp) = (*ticket, *stamp);
            self.port.ask(Effect::Outcome {
                ticket,
                result: Ok(stamp),
            });
            let Some((_, _, grants)) = self.own.holding.pop_front() else {
                break;
            };
            for (home, grant, range) in grants {
                let own = self.port.life();
                self.locks
                    .unlock(home, own, grant, range, &mut self.notices);
            }
        }
        if !self.acquire_own() {
            return;
        }
        let own = self.port.life();
        if !self.may_begin_round() {
            return;
        }
        let Some(head) = self.own.queue.front_mut() else {
            return;
        };
        if head.awaiting.is_none() {
            let peers: BTreeSet<NodeId> = head
                .asked
                .updates
                .iter()
                .filter_map(|u| self.via.get(&u.home).copied())
                .collect();
            for &peer in &peers {
                self.port.send(peer, Message::Pin { round: head.round });
            }
            head.peers.clone_from(&peers);
            head.awaiting = Some(peers);
        }
        if head.awaiting.as_ref().is_some_and(BTreeSet::is_empty) {
            self.stamp_own(own);
        }
    }

    /// Whether the head may be stamped as far as room goes. Asked before its pin round: pins hold m
    /// down, so nothing that m must pass first may be waited for under them. What the round will
    /// stamp is part of the budget from here on, because the head is the only one in a round.
    fn may_begin_round(&self) -> bool {
        let Some(head) = self
            .own
            .queue
            .front()
            .filter(|head| head.awaiting.is_none())
        else {
            return true;
        };
        let updates = &head.asked.updates;
        let costs = self.config.budget.costs(updates, |_| None);
        updates.iter().all(|u| self.may_stamp(u.home))
            && self.own.ledger.admits(&self.config.budget, &costs)
    }

    /// Whether a home lets this proxy stamp operations of its own.
    pub(super) fn may_stamp(&self, home: NodeId) -> bool {
        let own = self.port.life();
        let hop = Self::hop_of(&self.via, own, own, home);
        self.words.allow(hop, home, self.entered_at)
    }

    /// A peer drops the pins of a coordinator that opens a session, because the word to let go
    /// may have been lost with the last one. The round that is not over asks again.
    pub(super) fn repeat_pins(port: &mut Port, own: &mut Own, peer: NodeId) {
        let Some(head) = own.queue.front_mut() else {
            return;
        };
        if let Some(awaiting) = head
            .awaiting
            .as_mut()
            .filter(|_| head.peers.contains(&peer))
        {
            awaiting.insert(peer);
            port.send(peer, Message::Pin { round: head.round });
        }
    }

    fn stamp_own(&mut self, own: Life) {
        let Some(head) = self.own.queue.pop_front() else {
            return;
        };
        let epoch = self.port.epoch().max(head.at);
        self.port.raise(epoch);
        for u in &head.asked.updates {
            self.holdings.occupy(u.home, &u.key);
        }
        let costs = self.config.budget.costs(&head.asked.updates, |_| None);
        let op = self.own.redo.stamp(own, epoch, head.asked.updates);
        self.own.ledger.enter(op.id.seq, costs);
        for p in &op.participants {
            self.outbox.open(own, p.node, StreamSeq(1));
            self.outbox.push(p.node, op.clone());
        }
        let stamp = Stamp { id: op.id, epoch };
        self.own
            .holding
            .push_back((head.asked.ticket, stamp, head.granted));
        self.counters.stamped += 1;
        // The parts leave before the pins are let go: same connection, in order. A part that has
        // to wait for the stream to be ready is still covered by this coordinator's own redo.
        self.merge();
        for peer in head.peers {
            self.port.send(peer, Message::Unpin { round: head.round });
        }
    }

    pub(super) fn own_purge(&mut self, pressed: bool) {
        let minimum = self.port.minimum();
        self.own.redo.purge(minimum, pressed);
    }

    /// Whether every part of an own operation can still be sent, for invariant checks (I14).
    #[must_use]
    pub fn holds(&self, op: &Operation) -> bool {
        self.outbox.holds(op)
    }

    /// Operations that this proxy stamped after `seq` and still keeps, for invariant checks.
    pub fn stamped_after(&self, seq: Seq) -> impl Iterator<Item = &Arc<Operation>> {
        self.own.redo.after(seq)
    }

    /// Seq of the newest operation that this proxy stamped.
    #[must_use]
    pub fn last_stamped(&self) -> Seq {
        self.own.redo.last()
    }
}
