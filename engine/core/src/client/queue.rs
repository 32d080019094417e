//! The queue of a client: requests acquire their locks, evaluate their checks, are stamped, and read.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

use super::{Client, PREFETCH, READS_MAX};
use crate::effect::Effect;
use crate::ids::{Age, Epoch, Life, NodeId, StreamSeq};
use crate::op::{
    Bytes, Change, Check, Expect, Key, Mode, Range, Refusal, Request, Stamp, UPDATES_MAX, Update,
    Want,
};
use crate::room::{Budget, Cost};
use crate::session::{SessionError, Ticket};
use crate::teeth::{Tooth, bites};
use crate::tier::Query;

#[derive(Debug)]
pub(super) enum Item {
    Op(Request),
    Read {
        home: NodeId,
        key: Key,
    },
    Scan {
        home: NodeId,
        range: Range,
        after: Option<Key>,
        bytes_max: u32,
    },
}

#[derive(Debug)]
pub(super) struct Queued {
    pub(super) ticket: Ticket,
    pub(super) item: Item,
    pub(super) wants: Vec<Want>,
    /// Its locks were asked for ahead of its turn. Once only: what others took back since is
    /// needed more by them, and asking again for ever could starve them.
    pub(super) prefetched: bool,
    /// Given when it first asks for a lock.
    pub(super) age: Option<Age>,
}

impl Queued {
    /// Its age, given now unless it has one. `aged` counts those of the source.
    fn age(&mut self, aged: &mut u64, epoch: Epoch, source: Life) -> Age {
        *self.age.get_or_insert_with(|| {
            *aged += 1;
            Age {
                epoch,
                number: *aged,
                source,
            }
        })
    }
}

/// What the head of the queue has learned for its checks.
#[derive(Debug, Default)]
pub(super) struct Checking {
    values: BTreeMap<usize, Option<Bytes>>,
    /// Checks whose object was asked for.
    asked: BTreeSet<usize>,
}

/// What the answer to a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum For {
    /// The holdings.
    Lock,
    /// A read of the application.
    Read(Ticket),
    /// A check of the head, by its index.
    Check(usize),
    /// A scan of the application.
    Scan(Ticket),
}

impl Client {
    pub(super) fn enqueue(&mut self, queued: Queued) {
        if self.evicted {
            self.fail(queued.ticket, &queued.item);
            return;
        }
        self.queue.push_back(queued);
        self.unsettled = true;
    }

    pub(super) fn refuse(&mut self, ticket: Ticket, refusal: Refusal) {
        self.counters.refused += 1;
        let result = Err(SessionError::Refused(refusal));
        self.port.ask(Effect::Outcome { ticket, result });
    }

    pub(super) fn fail(&mut self, ticket: Ticket, item: &Item) {
        let error = SessionError::Refused(Refusal::Evicted);
        self.port.ask(match item {
            Item::Op(_) => Effect::Outcome {
                ticket,
                result: Err(error),
            },
            Item::Read { .. } => Effect::Value {
                ticket,
                result: Err(error),
            },
            Item::Scan { .. } => Effect::Listing {
                ticket,
                result: Err(error),
            },
        });
    }

    pub(super) fn tell_executed(&mut self) {
        let executed = self.redo.executed();
        while self
            .stamped
            .front()
            .is_some_and(|(_, s)| s.id.seq <= executed)
        {
            if let Some((ticket, stamp)) = self.stamped.pop_front() {
                self.port.ask(Effect::Outcome {
                    ticket,
                    result: Ok(stamp),
                });
            }
        }
    }

    /// O1 for the head of the queue, again and again while it can proceed.
    pub(super) fn advance_queue(&mut self) {
        while self.advance_head() {}
        let mut ahead: Vec<(Want, Age)> = Vec::new();
        let (epoch, source) = (self.port.epoch(), self.port.life());
        for queued in self.queue.iter_mut().skip(1).take(PREFETCH) {
            if !core::mem::replace(&mut queued.prefetched, true) {
                let age = queued.age(&mut self.aged, epoch, source);
                ahead.extend(queued.wants.iter().map(|want| (*want, age)));
            }
        }
        for (want, age) in ahead {
            if want.mode == Mode::Shared || self.has_room(want.home) {
                self.want(&want, age);
            }
        }
    }

    /// Returns whether the head left the queue.
    fn advance_head(&mut self) -> bool {
        let (epoch, source) = (self.port.epoch(), self.port.life());
        let Some(head) = self.queue.front_mut() else {
            return false;
        };
        let age = head.age(&mut self.aged, epoch, source);
        let ticket = head.ticket;
        let wants = head.wants.clone();
        if !self.acquire(ticket, &wants, age) && !bites(Tooth::StampedUnlocked) {
            return false;
        }
        let Some(head) = self.queue.front() else {
            return false;
        };
        match &head.item {
            Item::Op(request) => {
                let room = request.updates.iter().all(|u| self.has_room(u.home));
                if !room || !self.evaluate_checks() {
                    return false;
                }
                return self.stamp_head();
            }
            Item::Read { home, key } => {
                let (home, key) = (*home, key.clone());
                if !self.start_read(ticket, home, key) {
                    return false;
                }
                self.queue.pop_front();
            }
            Item::Scan {
                home,
                range,
                after,
                bytes_max,
            } => {
                let (home, range, bytes_max) = (*home, *range, *bytes_max);
                let after = after.clone();
                if self.redo.last_touching(home, &range).is_some() || self.asked.len() >= READS_MAX
                {
                    return false;
                }
                self.queue.pop_front();
                let query = Query::Scan {
                    home,
                    range,
                    after,
                    bytes_max,
                };
                self.ask(query, For::Scan(ticket));
            }
        }
        true
    }

    /// Evaluates the head's checks; `false` while values are missing or after a refusal (which
    /// removes the head).
    fn evaluate_checks(&mut self) -> bool {
        let Some(Queued {
            ticket,
            item: Item::Op(request),
            ..
        }) = self.queue.front()
        else {
            return false;
        };
        let ticket = *ticket;
        let checks: Vec<Check> = request.checks.clone();
        let mut missing = false;
        for (index, check) in checks.iter().enumerate() {
            let value = match self.checking.values.get(&index) {
                Some(value) => Some(value.clone()),
                None => self.known(check.home, &check.key),
            };
            let Some(value) = value else {
                missing = true;
                let (home, key) = (check.home, check.key.clone());
                // A counter of ours that is on its way is read once it is committed.
                let settled = self.redo.writer_of(home, &key).is_none();
                if settled && self.checking.asked.insert(index) {
                    self.ask(Query::Read { home, key }, For::Check(index));
                }
                continue;
            };
            let holds = match &check.expect {
                Expect::Absent => value.is_none(),
                Expect::Present => value.is_some(),
                Expect::Value(expected) => value.as_ref() == Some(expected),
            };
            if !holds {
                self.queue.pop_front();
                self.head_left(ticket);
                self.refuse(ticket, Refusal::CheckFailed { check: index });
                self.advance_queue();
                return false;
            }
        }
        !missing
    }

    /// Value of an object as far as it is known here under the lock held on it.
    fn known(&self, home: NodeId, key: &Key) -> Option<Option<Bytes>> {
        if let Some(op) = self.redo.writer_of(home, key) {
            let last = op.updates_for(home).filter(|u| u.key == *key).last()?;
            return match &last.change {
                Change::Put(value) => Some(Some(value.clone())),
                Change::Delete => Some(None),
                Change::Add(_) => None,
            };
        }
        self.holdings
            .proves_empty(home, key.range())
            .then_some(None)
    }

    /// Whether a home lets this life stamp.
    fn has_room(&self, home: NodeId) -> bool {
        let hop = self.routes.through(home);
        self.words.allow(hop, home, self.entered_at)
    }

    /// What an operation takes at its homes, as far as it is known what it replaces: from what this
    /// client wrote, and from the operation's checks, which hold when it is stamped.
    fn costs(&self, request: &Request) -> Vec<(NodeId, Cost)> {
        let known = |update: &Update| {
            if let Some(value) = self.known(update.home, &update.key) {
                return Some(value.map_or(0, |value| value.len() as u64));
            }
            let same = |c: &&Check| c.home == update.home && c.key == update.key;
            match &request.checks.iter().find(same)?.expect {
                Expect::Absent => Some(0),
                Expect::Value(value) => Some(value.len() as u64),
                Expect::Present => None,
            }
        };
        self.config.budget.costs(&request.updates, known)
    }

    /// Stamps the head, unless too much is under way at one of its homes; whether it did.
    fn stamp_head(&mut self) -> bool {
        let Some(Item::Op(request)) = self.queue.front().map(|head| &head.item) else {
            return false;
        };
        let costs = self.costs(request);
        if !self.ledger.admits(&self.config.budget, &costs) {
            return false;
        }
        let Some(Queued {
            ticket,
            item: Item::Op(request),
            ..
        }) = self.queue.pop_front()
        else {
            return false;
        };
        let life = self.port.life();
        let epoch = self.port.epoch();
        for u in &request.updates {
            self.holdings.occupy(u.home, &u.key);
        }
        let op = self.redo.stamp(life, epoch, request.updates);
        for p in &op.participants {
            self.outbox.open(life, p.node, StreamSeq(1));
            self.outbox.push(p.node, op.clone());
        }
        self.ledger.enter(op.id.seq, costs);
        self.counters.stamped += 1;
        self.stamped.push_back((ticket, Stamp { id: op.id, epoch }));
        self.head_left(ticket);
        true
    }

    pub(super) fn head_left(&mut self, ticket: Ticket) {
        self.unpin(ticket.0);
        self.forget_checks();
    }

    /// Answers that are still on their way belong to another head or to lost locks.
    pub(super) fn forget_checks(&mut self) {
        let asked = core::mem::take(&mut self.checking).asked;
        if asked.is_empty() {
            return;
        }
        for request in self.asked.select(|_, w| matches!(w, For::Check(_))) {
            self.asked.take(request);
        }
    }

    /// Answers a read from what is known, or asks the tier above. `false` when it must wait.
    fn start_read(&mut self, ticket: Ticket, home: NodeId, key: Key) -> bool {
        if let Some(value) = self.known(home, &key) {
            self.unpin(ticket.0);
            self.port.ask(Effect::Value {
                ticket,
                result: Ok(value),
            });
            return true;
        }
        if self.redo.writer_of(home, &key).is_some() || self.asked.len() >= READS_MAX {
            return false;
        }
        self.ask(Query::Read { home, key }, For::Read(ticket));
        true
    }

    pub(super) fn read_replied(&mut self, request: u64, value: Option<Bytes>) {
        match self.asked.take(request).map(|(_, w)| w) {
            Some(For::Read(ticket)) => {
                self.unpin(ticket.0);
                self.port.ask(Effect::Value {
                    ticket,
                    result: Ok(value),
                });
            }
            Some(For::Check(check)) => {
                self.checking.values.insert(check, value);
            }
            _ => {}
        }
    }

    /// Reads under way whose locks are void start over, ahead of everything else.
    pub(super) fn requeue_reads(&mut self, hop: NodeId) {
        let routes = &self.routes;
        let mut void = self.asked.select(|query, w| {
            let reads = matches!(w, For::Read(_) | For::Scan(_));
            reads && routes.through(query.home()) == hop
        });
        void.reverse();
        for request in void {
            let Some((query, For::Read(ticket) | For::Scan(ticket))) = self.asked.take(request)
            else {
                continue;
            };
            let (item, home, range) = match query {
                Query::Read { home, key } => {
                    let range = key.range();
                    (Item::Read { home, key }, home, range)
                }
                Query::Scan {
                    home,
                    range,
                    after,
                    bytes_max,
                } => {
                    let item = Item::Scan {
                        home,
                        range,
                        after,
                        bytes_max,
                    };
                    (item, home, range)
                }
                Query::Lock { .. } => continue,
            };
            let mode = Mode::Shared;
            self.queue.push_front(Queued {
                ticket,
                item,
                wants: alloc::vec![Want { home, range, mode }],
                prefetched: false,
                age: None,
            });
        }
    }
}

/// Limits and coverage of a request (S1 and S2 rest on it). What exceeds the budget alone could never
/// be stamped.
pub(super) fn validate(request: &Request, budget: &Budget) -> Result<(), Refusal> {
    let covered = |home: NodeId, key: &Key, mode: Mode| {
        request
            .locks
            .iter()
            .any(|w| w.home == home && w.mode >= mode && w.range.holds(key))
    };
    let mut keys: Vec<(NodeId, &Key)> = request.updates.iter().map(|u| (u.home, &u.key)).collect();
    keys.sort_unstable();
    let distinct = keys.windows(2).all(|pair| pair[0] != pair[1]);
    let sized = !request.updates.is_empty() && request.updates.len() <= UPDATES_MAX;
    let updates = request.updates.iter().all(|u| {
        u.key.name.len() <= crate::op::NAME_MAX
            && u.change.weight() <= crate::op::VALUE_MAX
            && (matches!(u.change, Change::Add(_)) || covered(u.home, &u.key, Mode::Exclusive))
    });
    let checks = request
        .checks
        .iter()
        .all(|c| covered(c.home, &c.key, Mode::Shared));
    let costs = budget.costs(&request.updates, |_| None);
    let fits = !costs.iter().any(|(_, cost)| budget.is_exceeded_by(cost));
    if distinct && sized && updates && checks && fits {
        Ok(())
    } else {
        Err(Refusal::NotCovered)
    }
}
