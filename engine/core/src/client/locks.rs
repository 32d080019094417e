//! Locks, hops and routes of a client: acquiring in order, pinning, yielding, reconnecting.

use alloc::vec::Vec;

use super::{Asked, Client, Item};
use crate::ids::{Life, NodeId};
use crate::message::{LockRefusal, Message};
use crate::op::{Range, Refusal, Want};
use crate::session::Ticket;

/// Wants in the global order, overlapping ones merged under the stronger mode, so that a request
/// never waits for itself.
pub(super) fn normalise(wants: &[Want]) -> Vec<Want> {
    let mut sorted = wants.to_vec();
    sorted.sort_unstable_by_key(|w| (w.home, w.range.space, w.range.lo, w.range.hi));
    let mut merged: Vec<Want> = Vec::with_capacity(sorted.len());
    for want in sorted {
        match merged.last_mut() {
            Some(last) if last.home == want.home && last.range.overlaps(&want.range) => {
                last.range.hi = last.range.hi.max(want.range.hi);
                last.mode = last.mode.max(want.mode);
            }
            _ => merged.push(want),
        }
    }
    merged
}

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
        if !homes.contains(&hop) && self.route(hop) == hop {
            homes.push(hop);
        }
        homes
    }

    /// Says Open on a connected hop once the client has a life.
    pub(super) fn open_hop(&mut self, hop: NodeId) {
        let homes = self.routes_through(hop);
        let Some(state) = self.hops.get(&hop) else {
            return;
        };
        if !state.connected || state.open || hop == self.config.root || !self.member.is_joined() {
            return;
        }
        self.holdings.forget_revokes(|home| homes.contains(&home));
        let reclaim = self.holdings.claims(|home| homes.contains(&home));
        self.port.send(
            hop,
            Message::Open {
                known: state.life,
                reclaim,
            },
        );
    }

    pub(super) fn hop_opened(&mut self, life: Life) {
        let Some(hop) = self.hops.get(&life.node) else {
            return;
        };
        let proxy = self.config.via.values().any(|p| *p == life.node);
        if let Some(old) = hop.life.filter(|old| *old != life && proxy) {
            self.void(old);
        }
        let Some(hop) = self.hops.get_mut(&life.node) else {
            return;
        };
        hop.life = Some(life);
        hop.open = true;
        let homes = self.routes_through(life.node);
        self.outbox.closed(|home| homes.contains(&home));
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
            hop.open = false;
            hop.life = None;
        }
        self.outbox.closed(|home| homes.contains(&home));
        // A check that was read under a void grant must be read again under the next one.
        self.checking = super::Checking::default();
        self.asked
            .retain(|_, a| !matches!(a, Asked::CheckRead { .. }));
        self.open_hop(victim.node);
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
        if pending || self.holdings.covers(home, range, mode) {
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
        if !self.hops.get(&hop).is_some_and(|h| h.open) {
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
        if reason != LockRefusal::Full {
            return;
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
        for (home, grant, range) in self.holdings.yielding() {
            let pinned = self
                .pins
                .iter()
                .any(|(_, h, r)| *h == home && r.overlaps(&range));
            if pinned || self.is_unsettled(home, &range) {
                continue;
            }
            let hop = self.route(home);
            if !self.hops.get(&hop).is_some_and(|h| h.open) {
                continue;
            }
            self.holdings.yielded(home, grant, range);
            self.counters.yielded += 1;
            self.port.send(hop, Message::Unlock { home, grant, range });
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
