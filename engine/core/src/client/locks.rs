//! Locks, hops and routes of a client: acquiring in order, pinning, yielding, reconnecting.

use alloc::collections::BTreeSet;
use alloc::vec::Vec;

use super::{Asked, Client, HopSession, Item, Queued};
use crate::ids::{Life, NodeId};
use crate::message::{LockRefusal, Message};
use crate::op::{Mode, Range, Refusal, Want};
use crate::session::Ticket;

impl Client {
    /// The tier through which a home is reached.
    pub(super) fn route(&self, home: NodeId) -> NodeId {
        let direct = self
            .direct
            .get(&home)
            .or_else(|| self.config.via.get(&home));
        direct.copied().unwrap_or(home)
    }

    /// Homes reached through `hop`.
    pub(super) fn routes_through(&self, hop: NodeId) -> Vec<NodeId> {
        let mut homes: Vec<NodeId> = self
            .config
            .via
            .keys()
            .copied()
            .filter(|home| self.route(*home) == hop)
            .collect();
        if !homes.contains(&hop) && self.route(hop) == hop && !self.is_proxy(hop) {
            homes.push(hop);
        }
        homes
    }

    fn is_proxy(&self, node: NodeId) -> bool {
        self.config.via.values().any(|p| *p == node)
    }

    /// Whether the root called this life of a proxy dead. Its process may not know yet.
    pub(super) fn is_dead(&self, life: Life) -> bool {
        self.is_proxy(life.node)
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
        let used = self
            .hops
            .get(&from.node)
            .is_some_and(|h| h.is_open() && (h.life == Some(from) || !self.is_proxy(from.node)));
        session && !used
    }

    /// Says Open on a connected hop once the client has a life.
    pub(super) fn open_hop(&mut self, hop: NodeId) {
        let homes = self.routes_through(hop);
        let joined = self.member.is_joined();
        let Some(state) = self.hops.get_mut(&hop) else {
            return;
        };
        let idle = state.connected && state.session == HopSession::Closed;
        if !idle || hop == self.config.root || !joined {
            return;
        }
        if (homes.is_empty() && !self.may_release(hop)) || self.is_between_lives(hop) {
            return;
        }
        let Some(state) = self.hops.get_mut(&hop) else {
            return;
        };
        state.session = HopSession::Opening;
        let known = state.life;
        self.holdings.forget_revokes(|home| homes.contains(&home));
        let reclaim = self.holdings.claims(|home| homes.contains(&home));
        self.port.send(hop, Message::Open { known, reclaim });
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
        let proxies: BTreeSet<NodeId> = self.config.via.values().copied().collect();
        for proxy in proxies {
            if !self.routes_through(proxy).is_empty() {
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
            if self.routes_through(proxy).is_empty() {
                self.open_hop(proxy);
            }
        }
    }

    pub(super) fn hop_opened(&mut self, life: Life) {
        let (dead, proxy) = (self.is_dead(life), self.is_proxy(life.node));
        let Some(hop) = self.hops.get_mut(&life.node) else {
            return;
        };
        if hop.session != HopSession::Opening {
            return;
        }
        if dead {
            // Its process will leave; the next one connects anew.
            hop.session = HopSession::Closed;
            return;
        }
        if let Some(old) = hop.life.filter(|old| *old != life && proxy) {
            self.void(old);
        }
        let Some(hop) = self.hops.get_mut(&life.node) else {
            return;
        };
        hop.life = Some(life);
        hop.session = HopSession::Open;
        let homes = self.routes_through(life.node);
        self.full.retain(|home| !homes.contains(home));
        self.outbox.closed(|_, home| homes.contains(&home));
        let again: Vec<u64> = self
            .asked
            .iter()
            .filter(|(_, a)| homes.contains(&a.home()))
            .map(|(&request, _)| request)
            .collect();
        for request in again {
            self.send_asked(request);
        }
    }

    /// The grants of a dead proxy life are worth nothing; remember what was stamped under them.
    pub(super) fn void(&mut self, victim: Life) {
        let used = self
            .hops
            .get(&victim.node)
            .is_some_and(|h| h.life == Some(victim));
        if !used || self.voided.contains_key(&victim) {
            return;
        }
        self.voided.insert(victim, self.redo.last());
        let homes = self.routes_through(victim.node);
        self.holdings.void(|home| homes.contains(&home));
        self.pins.retain(|(_, home, _)| !homes.contains(home));
        if let Some(hop) = self.hops.get_mut(&victim.node) {
            // An Open under way is for the next life, or will be answered by the dead one.
            if hop.is_open() {
                hop.session = HopSession::Closed;
            }
            hop.life = None;
        }
        self.outbox.closed(|_, home| homes.contains(&home));
        // A check that was read under a void grant must be read again under the next one.
        self.forget_checks();
        self.requeue_reads(&homes);
    }

    /// Reads under way whose locks are void start over, ahead of everything else.
    fn requeue_reads(&mut self, homes: &[NodeId]) {
        let void: Vec<u64> = self
            .asked
            .iter()
            .filter(|(_, a)| !matches!(a, Asked::Lock { .. }) && homes.contains(&a.home()))
            .map(|(&request, _)| request)
            .collect();
        for request in void.into_iter().rev() {
            let (ticket, item, range) = match self.asked.remove(&request) {
                Some(Asked::Read { ticket, home, key }) => {
                    let range = key.range();
                    (ticket, Item::Read { home, key }, range)
                }
                Some(Asked::Scan {
                    ticket,
                    home,
                    range,
                    after,
                    bytes_max,
                }) => {
                    let item = Item::Scan {
                        home,
                        range,
                        after,
                        bytes_max,
                    };
                    (ticket, item, range)
                }
                _ => continue,
            };
            let (Item::Read { home, .. } | Item::Scan { home, .. }) = &item else {
                continue;
            };
            let wants = alloc::vec![Want {
                home: *home,
                range,
                mode: Mode::Shared
            }];
            self.queue.push_front(Queued {
                ticket,
                item,
                wants,
                prefetched: false,
            });
        }
    }

    /// Pins the head's locks in order; `false` while one is missing.
    pub(super) fn acquire(&mut self, ticket: Ticket, wants: &[Want]) -> bool {
        for want in wants {
            let held = self.pins.iter().any(|(owner, home, range)| {
                *owner == ticket.0 && *home == want.home && range.contains(&want.range)
            });
            if held {
                continue;
            }
            if !self.holdings.covers(want.home, want.range, want.mode) {
                // Locks that were lost with a proxy leave later ones pinned; nobody may hold a later
                // one while it waits for an earlier one.
                let first = order(want.home, &want.range);
                self.pins
                    .retain(|(pin, h, r)| *pin != ticket.0 || order(*h, r) < first);
                self.want(want);
                return false;
            }
            self.pins.push((ticket.0, want.home, want.range));
        }
        true
    }

    /// Asks for a lock unless it is held or asked for already.
    pub(super) fn want(&mut self, want: &Want) {
        let Want { home, range, mode } = *want;
        let pending = self.asked.values().any(|a| {
            matches!(a, Asked::Lock { home: h, range: r, mode: m }
                if *h == home && r.contains(&range) && *m >= mode)
        });
        if pending || self.fenced || self.holdings.covers(home, range, mode) {
            return;
        }
        self.counters.locks_asked += 1;
        self.ask(Asked::Lock { home, range, mode });
    }

    pub(super) fn ask(&mut self, asked: Asked) {
        let request = self.next_request;
        self.next_request += 1;
        self.asked.insert(request, asked);
        self.send_asked(request);
    }

    fn send_asked(&mut self, request: u64) {
        let Some(asked) = self.asked.get(&request) else {
            return;
        };
        let hop = self.route(asked.home());
        if !self.hops.get(&hop).is_some_and(super::Hop::is_open) {
            return;
        }
        let body = match asked {
            Asked::Lock { home, range, mode } => Message::Lock {
                request,
                home: *home,
                range: *range,
                mode: *mode,
            },
            Asked::Read { home, key, .. } | Asked::CheckRead { home, key, .. } => Message::Read {
                request,
                home: *home,
                key: key.clone(),
            },
            Asked::Scan {
                home,
                range,
                after,
                bytes_max,
                ..
            } => Message::Scan {
                request,
                home: *home,
                range: *range,
                after: after.clone(),
                bytes_max: *bytes_max,
            },
        };
        self.port.send(hop, body);
    }

    /// A full home refuses the whole head; anything else is asked again after a reconnect.
    pub(super) fn lock_refused(&mut self, request: u64, reason: LockRefusal) {
        let Some(asked) = self.asked.remove(&request) else {
            return;
        };
        let home = asked.home();
        if reason == LockRefusal::Fenced {
            self.fenced = true;
            return;
        }
        // Asked for again once the home says that it has room, unless the head insists.
        if !self.full.contains(&home) {
            self.full.push(home);
        }
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
    pub(super) fn yield_locks(&mut self) {
        let yielding = self.holdings.yielding();
        if yielding.is_empty() {
            return;
        }
        let awaited = self.awaited();
        for (home, grant, range) in yielding {
            let blocked = |w: &Want| w.home == home && w.range.overlaps(&range);
            if let Some((owner, _)) = awaited.filter(|(_, want)| blocked(want)) {
                self.give_back(owner, home, &range);
            }
            let pinned = self
                .pins
                .iter()
                .any(|(_, h, r)| *h == home && r.overlaps(&range));
            if pinned || self.is_unsettled(home, &range) {
                continue;
            }
            let hop = self.route(home);
            if !self.hops.get(&hop).is_some_and(super::Hop::is_open) {
                continue;
            }
            self.holdings.yielded(home, grant, range);
            self.counters.yielded += 1;
            self.port.send(hop, Message::Unlock { home, grant, range });
        }
    }

    /// The lock that the head waits for. Locks are acquired in one order, so waiting for another
    /// holder cannot close a circle; waiting in a queue can, behind somebody who wants a range
    /// that spans both what the head has and what it waits for. Then the head gives back what it
    /// has, and asks for it again.
    fn awaited(&self) -> Option<(u64, Want)> {
        let head = self.queue.front()?;
        let missing = head.wants.iter().find(|want| {
            !self.pins.iter().any(|(owner, home, range)| {
                *owner == head.ticket.0 && *home == want.home && range.contains(&want.range)
            })
        })?;
        Some((head.ticket.0, *missing))
    }

    /// Unpins what the head `owner` has in `range`, and what it acquired after that: it must not
    /// hold later locks while it waits for an earlier one.
    fn give_back(&mut self, owner: u64, home: NodeId, range: &Range) {
        let mine = self.pins.iter().filter(|(pin, _, _)| *pin == owner);
        let first = mine
            .filter(|(_, h, r)| *h == home && r.overlaps(range))
            .map(|(_, h, r)| order(*h, r))
            .min();
        if let Some(first) = first {
            self.pins
                .retain(|(pin, h, r)| *pin != owner || order(*h, r) < first);
        }
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
