//! Locks, hops and routes of a client: acquiring in order, pinning, yielding, reconnecting.

use alloc::collections::BTreeSet;

use super::Client;
use super::queue::{For, Item};
use crate::ids::{Age, Life, NodeId};
use crate::lock::Recall;
use crate::message::{LockRefusal, Message, Role};
use crate::op::{Range, Refusal, Want};
use crate::session::Ticket;
use crate::teeth::{Tooth, bites};
use crate::tier::Query;

impl Client {
    /// Whether the root called this life of a proxy dead. Its process may not know yet.
    pub(super) fn is_dead(&self, life: Life) -> bool {
        self.routes.is_proxy(life.node)
            && (self.member.is_evicted(life)
                || self
                    .dead
                    .get(&life.node)
                    .is_some_and(|&dead| life.incarnation <= dead))
    }

    /// Whether a session message comes from a proxy's life other than the one in use: a grant or
    /// an answer of a dead life is worth nothing.
    pub(super) fn is_stale(&self, from: Life, body: &Message) -> bool {
        let session = matches!(
            body,
            Message::Granted { .. }
                | Message::Refused { .. }
                | Message::Revoke { .. }
                | Message::Progress { .. }
                | Message::ReadReply { .. }
                | Message::ScanReply { .. }
        );
        let used = self.tiers.is_open(from.node)
            && (self.tiers.life(from.node) == Some(from) || !self.routes.is_proxy(from.node));
        session && !used
    }

    /// Says Open on a connected hop once the client has a life.
    pub(super) fn open_hop(&mut self, hop: NodeId) {
        if !self.tiers.may_open(hop) || !self.member.is_joined() {
            return;
        }
        let routes = &self.routes;
        let used = if routes.is_proxy(hop) {
            routes.is_used(hop) || self.may_release(hop)
        } else {
            let seat = self.member.view().seat(hop);
            let home = seat.is_some_and(|s| s.role == Role::Destination);
            (home || routes.via.contains_key(&hop)) && routes.through(hop) == hop
        };
        if !used || self.is_between_lives(hop) {
            return;
        }
        let reached = |home: NodeId| routes.through(home) == hop;
        self.holdings.forget_revokes(reached);
        let reclaim = self.holdings.claims(reached);
        self.tiers.open(&mut self.port, hop, reclaim);
    }

    /// What was sent through a hop may be lost.
    pub(super) fn path_closed(&mut self, hop: NodeId) {
        let routes = &self.routes;
        self.outbox.closed(|_, home| routes.through(home) == hop);
    }

    /// Whether the newest life of a proxy that is known here is dead. A process that still runs in
    /// that life would take a session without claims for the release of what it granted, and grant
    /// it to others who have not heard yet.
    fn is_between_lives(&self, proxy: NodeId) -> bool {
        let seat = self.member.view().seat(proxy);
        let newest = seat
            .map(|s| s.life.incarnation)
            .max(self.dead.get(&proxy).copied());
        newest.is_some_and(|incarnation| {
            self.is_dead(Life {
                node: proxy,
                incarnation,
            })
        })
    }

    /// Opens sessions with proxies whose next life the view names.
    pub(super) fn reopen_proxies(&mut self) {
        let proxies: BTreeSet<NodeId> = self.routes.via.values().copied().collect();
        for proxy in proxies {
            if self.routes.is_used(proxy) {
                self.open_hop(proxy);
            }
        }
    }

    /// Whether a bypassed proxy may hear that nothing is claimed from it any more: it lives after
    /// all, so others wait for what it granted, and what was stamped under those grants is
    /// everywhere committed, so nobody can overtake it.
    fn may_release(&self, hop: NodeId) -> bool {
        let of_hop = self.voided.iter().filter(|(l, _)| l.node == hop);
        let mut living = of_hop.filter(|(l, _)| !self.is_dead(**l)).peekable();
        living.peek().is_some() && living.all(|(_, &seq)| seq <= self.redo.done())
    }

    /// Opens sessions with bypassed proxies, to release what they granted.
    pub(super) fn release_voided(&mut self) {
        let bypassed: BTreeSet<NodeId> = self.voided.keys().map(|life| life.node).collect();
        for proxy in bypassed {
            if !self.routes.is_used(proxy) {
                self.open_hop(proxy);
            }
        }
    }

    pub(super) fn hop_opened(&mut self, life: Life) {
        let hop = life.node;
        if !self.tiers.is_opening(hop) {
            return;
        }
        // Claims that became void on their way stand at the proxy until they are released in order.
        let void = self.voided.contains_key(&life) && self.tiers.claimed(hop) == Some(life);
        if void || self.is_dead(life) {
            self.tiers.turned_away(hop);
            return;
        }
        let before = self.tiers.life(hop);
        if let Some(old) = before.filter(|old| *old != life && self.routes.is_proxy(hop)) {
            self.void(old);
        }
        self.tiers.opened(life);
        let routes = &self.routes;
        let again = self
            .asked
            .select(|query, _| routes.through(query.home()) == hop);
        self.path_closed(hop);
        for request in again {
            self.send_asked(request);
        }
    }

    /// The grants of a dead proxy life are worth nothing; remember what was stamped under them.
    pub(super) fn void(&mut self, victim: Life) {
        let hop = victim.node;
        if self.tiers.life(hop) != Some(victim) || self.voided.contains_key(&victim) {
            return;
        }
        self.voided.insert(victim, self.redo.last());
        let routes = &self.routes;
        self.holdings.void(|home| routes.through(home) == hop);
        self.pins
            .retain(|(_, home, _)| routes.through(*home) != hop);
        self.tiers.void(hop);
        self.path_closed(hop);
        // A check that was read under a void grant must be read again under the next one.
        self.forget_checks();
        self.requeue_reads(hop);
    }

    /// Pins the head's locks in order; `false` while one is missing.
    pub(super) fn acquire(&mut self, ticket: Ticket, wants: &[Want], age: Age) -> bool {
        for want in wants {
            let held = self.pins.iter().any(|(owner, home, range)| {
                *owner == ticket.0 && *home == want.home && range.contains(&want.range)
            });
            if held {
                continue;
            }
            if !self.holdings.covers(want.home, want.range, want.mode) {
                // Locks that were lost with a proxy leave later ones pinned; nobody may hold a
                // later one while it waits for an earlier one.
                let first = order(want.home, &want.range);
                self.pins
                    .retain(|(pin, h, r)| *pin != ticket.0 || order(*h, r) < first);
                self.want(want, age);
                return false;
            }
            self.pins.push((ticket.0, want.home, want.range));
        }
        true
    }

    /// Asks for a lock unless it is held or asked for already.
    pub(super) fn want(&mut self, want: &Want, age: Age) {
        let Want { home, range, mode } = *want;
        let pending = self.asked.awaits(home, &range, mode, age);
        if pending || self.fenced || self.holdings.covers(home, range, mode) {
            return;
        }
        self.counters.locks_asked += 1;
        let query = Query::Lock {
            home,
            range,
            mode,
            age,
        };
        self.ask(query, For::Lock);
    }

    pub(super) fn ask(&mut self, query: Query, what_for: For) {
        let request = self.asked.add(query, what_for);
        self.send_asked(request);
    }

    fn send_asked(&mut self, request: u64) {
        if let Some(query) = self.asked.get(request) {
            let hop = self.routes.through(query.home());
            if self.tiers.is_open(hop) {
                self.port.send(hop, query.message(request));
            }
        }
    }

    /// A full home refuses the whole head; anything else is asked again after a reconnect.
    pub(super) fn lock_refused(&mut self, request: u64, reason: LockRefusal) {
        let Some((query, _)) = self.asked.take(request) else {
            return;
        };
        let home = query.home();
        if reason == LockRefusal::Fenced {
            self.fenced = true;
            return;
        }
        // Asked for again once the home says that it has room, unless the head insists.
        self.words.refused(self.routes.through(home), home);
        let Some(head) = self.queue.front() else {
            return;
        };
        if matches!(head.item, Item::Op(_)) && head.wants.iter().any(|w| w.home == home) {
            let ticket = head.ticket;
            self.queue.pop_front();
            self.head_left(ticket);
            self.refuse(ticket, Refusal::Full { home });
        }
    }

    pub(super) fn unpin(&mut self, owner: u64) {
        self.pins.retain(|(pin, _, _)| *pin != owner);
    }

    /// Yields what was asked back, is not pinned, and whose operations are everywhere committed.
    /// Returns whether the head gave something back, which it must ask for again.
    pub(super) fn yield_locks(&mut self) -> bool {
        let yielding = self.holdings.yielding();
        let mut gave_back = false;
        for recall in yielding {
            let Recall {
                home,
                grant,
                range,
                age,
            } = recall;
            if let Some((owner, own)) = self.waiting()
                && (age < own || bites(Tooth::AgeIgnored))
            {
                gave_back |= self.give_back(owner, home, &range);
            }
            let pinned = self
                .pins
                .iter()
                .any(|(_, h, r)| *h == home && r.overlaps(&range));
            let unsettled = self.is_unsettled(home, &range) && !bites(Tooth::UnlockOvertakes);
            if pinned || unsettled {
                continue;
            }
            let hop = self.routes.through(home);
            if !self.tiers.is_open(hop) {
                continue;
            }
            self.holdings.yielded(home, grant, range);
            self.counters.yielded += 1;
            self.port.send(hop, Message::Unlock { home, grant, range });
        }
        gave_back
    }

    /// The head and its age, while it lacks a lock. It gives back what older work wants and keeps
    /// what younger work wants (see [`crate::lock`]).
    fn waiting(&self) -> Option<(u64, Age)> {
        let head = self.queue.front()?;
        let lacks = head.wants.iter().any(|want| {
            !self.pins.iter().any(|(owner, home, range)| {
                *owner == head.ticket.0 && *home == want.home && range.contains(&want.range)
            })
        });
        head.age.filter(|_| lacks).map(|age| (head.ticket.0, age))
    }

    /// Unpins what the head `owner` has in `range`, and what it acquired after that: it must not
    /// hold later locks while it waits for an earlier one. Returns whether there was any.
    fn give_back(&mut self, owner: u64, home: NodeId, range: &Range) -> bool {
        let mine = self.pins.iter().filter(|(pin, _, _)| *pin == owner);
        let first = mine
            .filter(|(_, h, r)| *h == home && r.overlaps(range))
            .map(|(_, h, r)| order(*h, r))
            .min();
        if let Some(first) = first {
            self.pins
                .retain(|(pin, h, r)| *pin != owner || order(*h, r) < first);
        }
        first.is_some()
    }

    /// `commit_on_share`: something stamped up to the last write in the range is not everywhere
    /// committed. Operations are finished in order of their seq, so the redo's prefix decides.
    fn is_unsettled(&self, home: NodeId, range: &Range) -> bool {
        self.redo
            .last_touching(home, range)
            .is_some_and(|seq| seq > self.redo.done())
    }
}

/// The global order in which locks are acquired.
fn order(home: NodeId, range: &Range) -> (NodeId, u64, u64) {
    (home, range.space, range.lo)
}
