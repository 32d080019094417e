//! A proxy towards its clients: sessions, parts, locks, reads.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;

use super::{Proxy, WaitingLock};
use crate::ids::{Age, Life, NodeId, Seq};
use crate::lock::{Asker, Notice};
use crate::message::{Message, Parts, Reclaim, StreamBase, StreamState};
use crate::op::{Mode, Operation, Range};
use crate::room::RoomAt;
use crate::tier::Query;

impl Proxy {
    /// A client, or a coordinating proxy, opens its session.
    pub(super) fn open(&mut self, from: Life, known: Option<Life>, reclaim: &[Reclaim]) {
        if !self.member.is_joined() {
            // Said once per connection, so it is kept until there is a life to answer with. Its
            // claims are on an earlier life of this proxy.
            self.early.insert(from.node, from);
            return;
        }
        if self.is_fenced(from) {
            return;
        }
        self.sessions.insert(from.node, from);
        self.waiting.retain(|w| w.asker.holder != from);
        self.own.drop_pins_of(from);
        let own = self.port.life();
        // Claims on an earlier life of this proxy are void: it does not hold those locks.
        let claims = if known == Some(own) { reclaim } else { &[] };
        self.doubt_lost(from, claims);
        self.locks.reclaim(from, claims, &mut self.notices);
        self.port.send(from.node, Message::Opened { life: own });
        self.tell_room_to(from.node);
        // The word may have been lost.
        self.recall_again();
    }

    /// What the tiers above want back is asked of every holder who was not asked.
    fn recall_again(&mut self) {
        for recall in self.holdings.yielding() {
            self.recall(recall.home, recall.range, recall.age);
        }
    }

    /// Asks holders for what the tier above wants back. What other grants cover as well, and are not
    /// asked back there, they may keep.
    pub(super) fn recall(&mut self, home: NodeId, range: Range, age: Age) {
        let covered = |part, mode| self.holdings.covers_jointly(home, part, mode);
        let notices = &mut self.notices;
        self.locks.recall(home, range, age, covered, notices);
    }

    /// What `holder` held exclusively and does not yield in order, it may have written under without
    /// its parts passing here: it took another path, or others completed them when it died.
    pub(super) fn doubt_lost(&mut self, holder: Life, claims: &[Reclaim]) {
        let held = self
            .locks
            .grants()
            .filter(|g| g.2 == holder && g.3 == Mode::Exclusive);
        for (home, space, _, _, lo, hi) in held {
            let range = Range { space, lo, hi };
            if !claims
                .iter()
                .any(|c| c.home == home && c.range.contains(&range))
            {
                self.holdings.doubt(home, &range);
            }
        }
    }

    pub(super) fn announce(&mut self, from: Life, base: StreamBase) {
        if self.is_fenced(base.source) || self.sessions.get(&from.node) != Some(&from) {
            return;
        }
        self.outbox.open(base.source, base.home, base.base);
        self.dirty.insert((base.source, base.home));
    }

    pub(super) fn accept(&mut self, from: Life, done: Seq, batch: Vec<Parts>) {
        if done > Seq(0) && self.sessions.get(&from.node) == Some(&from) {
            self.done.insert(from, done);
        }
        for Parts { homes, op } in batch {
            let source = op.id.source;
            if self.is_fenced(source) || self.is_fenced(from) {
                self.counters.refused_fenced += homes.len() as u64;
                continue;
            }
            for home in homes {
                self.accept_part(source, home, &op);
            }
        }
    }

    pub(super) fn accept_part(&mut self, source: Life, home: NodeId, op: &Arc<Operation>) {
        let (Some(last), Some(at)) = (self.outbox.last(source, home), op.at(home)) else {
            self.counters.refused_order += 1;
            return;
        };
        self.dirty.insert((source, home));
        if at <= last {
            self.counters.duplicates += 1;
        } else if at.0 > last.0 + 1 {
            self.counters.refused_order += 1;
        } else {
            for u in op.updates_for(home) {
                self.holdings.occupy(home, &u.key);
            }
            self.outbox.push(home, op.clone());
            self.counters.accepted += 1;
        }
    }

    pub(super) fn tell_room(&mut self) {
        let clients: Vec<NodeId> = self.sessions.keys().copied().collect();
        for client in clients {
            self.tell_room_to(client);
        }
    }

    /// Homes speak for themselves; what another proxy says of them is hearsay, and not passed on.
    fn tell_room_to(&mut self, client: NodeId) {
        let (streams, room) = (Vec::new(), self.words.own().collect());
        self.port.send(client, Message::Progress { streams, room });
    }

    pub(super) fn downstream(&mut self, from: Life, body: Message) {
        if self.is_fenced(from) || self.sessions.get(&from.node) != Some(&from) {
            return;
        }
        match body {
            Message::Lock {
                request,
                home,
                range,
                mode,
                age,
            } => {
                let asker = Asker {
                    holder: from,
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
            Message::Unlock { home, grant, range } => {
                self.locks
                    .unlock(home, from, grant, range, &mut self.notices);
            }
            Message::Read { request, home, key } => {
                self.ask(Query::Read { home, key }, Some((from, request)));
            }
            Message::Scan {
                request,
                home,
                range,
                after,
                bytes_max,
            } => {
                let query = Query::Scan {
                    home,
                    range,
                    after,
                    bytes_max,
                };
                self.ask(query, Some((from, request)));
            }
            _ => {}
        }
    }

    /// Clients' lock requests that the proxy's own locks cover go to the lock server; for the
    /// others the home is asked. `of` says which may have to do with what has changed.
    pub(super) fn serve_waiting(&mut self, of: impl Fn(&WaitingLock) -> bool) {
        let waiting = core::mem::take(&mut self.waiting);
        for w in waiting {
            if !of(&w) {
                self.waiting.push(w);
                continue;
            }
            if let Some(bound) = self.holdings.bound(w.home, w.range, w.mode) {
                let notices = &mut self.notices;
                self.locks
                    .request(w.home, w.asker, w.range, w.mode, bound, notices);
                continue;
            }
            self.waiting.push(w);
            // Own requests wait until there is room; a client's is refused by the home.
            let waits = w.asker.holder == self.port.life() && !self.may_stamp(w.home);
            let pending = waits || self.asked.awaits(w.home, &w.range, w.mode, w.asker.age);
            if !pending {
                let query = Query::Lock {
                    home: w.home,
                    range: w.range,
                    mode: w.mode,
                    age: w.asker.age,
                };
                self.ask(query, None);
            }
        }
    }

    pub(super) fn send_notices(&mut self) {
        let notices = core::mem::take(&mut self.notices);
        let granted = |n: &Notice| matches!(n, Notice::Grant { .. });
        if notices.iter().any(granted) {
            // Granted to work older than what the tier above wants it for; it is wanted all the same.
            self.recall_again();
        }
        for notice in notices {
            match notice {
                Notice::Grant {
                    to,
                    request,
                    home,
                    grant,
                    range,
                    mode,
                } => {
                    if to == self.port.life() {
                        self.own_granted(request, home, grant, range);
                        continue;
                    }
                    if self.sessions.get(&to.node) != Some(&to) {
                        // Not told to the node's next life; the reclaim of this one drops it.
                        continue;
                    }
                    let empty = self.holdings.proves_empty(home, range);
                    self.port.send(
                        to.node,
                        Message::Granted {
                            request,
                            home,
                            grant,
                            range,
                            mode,
                            empty,
                        },
                    );
                }
                Notice::Revoke {
                    to,
                    home,
                    grant,
                    range,
                    age,
                } if to != self.port.life() => {
                    if self.sessions.get(&to.node) == Some(&to) {
                        let revoke = Message::Revoke {
                            home,
                            grant,
                            range,
                            age,
                        };
                        self.port.send(to.node, revoke);
                    }
                }
                Notice::Revoke { grant, age, .. } => self.own_revoked(grant, age),
            }
        }
    }

    pub(super) fn tell_progress(&mut self) {
        let mut per_client: BTreeMap<NodeId, Vec<StreamState>> = BTreeMap::new();
        for (source, home) in core::mem::take(&mut self.dirty) {
            if self.sessions.get(&source.node) != Some(&source) {
                continue;
            }
            let (Some(state), Some(last)) = (
                self.outbox.state(source, home),
                self.outbox.last(source, home),
            ) else {
                continue;
            };
            per_client
                .entry(source.node)
                .or_default()
                .push(StreamState {
                    executed: last,
                    ..state
                });
        }
        let room: Vec<RoomAt> = self.words.own().collect();
        for (client, streams) in per_client {
            self.port.send(
                client,
                Message::Progress {
                    streams,
                    room: room.clone(),
                },
            );
        }
    }
}
