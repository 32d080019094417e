//! A proxy towards its homes: sessions, locks, reads, and the merging of windows.

use super::{Proxy, WaitingLock};
use crate::ids::{Life, NodeId};
use crate::lock::Recall;
use crate::message::{LockRefusal, Message, Role, StreamState};
use crate::room::RoomAt;
use crate::tier::Query;

impl Proxy {
    pub(super) fn open_hop(&mut self, hop: NodeId) {
        let role = self.member.view().seat(hop).map(|s| s.role);
        let upstream = role == Some(Role::Destination)
            || (role == Some(Role::Proxy) && self.config.via.values().any(|p| *p == hop));
        if !upstream || !self.tiers.may_open(hop) || !self.member.is_joined() {
            return;
        }
        self.holdings.forget_revokes(|home| home == hop);
        let reclaim = self.holdings.claims(|home| home == hop);
        self.tiers.open(&mut self.port, hop, reclaim);
    }

    pub(super) fn hop_opened(&mut self, life: Life) {
        if !self.tiers.is_opening(life.node) {
            return;
        }
        self.tiers.opened(life);
        let (via, own) = (&self.via, self.port.life());
        self.outbox
            .closed(|source, home| Self::hop_of(via, own, source, home) == life.node);
        let again = self.asked.select(|query, _| query.home() == life.node);
        for request in again {
            self.send_asked(request);
        }
        Self::repeat_pins(&mut self.port, &mut self.own, life.node);
        self.serve_waiting(|_| true);
        self.hurry = true;
    }

    pub(super) fn progress(&mut self, from: Life, streams: &[StreamState], room: &[RoomAt]) {
        let changed = self.words.hear(from.node, room);
        for state in streams {
            // What was listed to the resolver may be asked for, whoever has committed it since.
            let keep = self.is_fenced(state.source);
            if self.outbox.progress(from.node, state, keep) {
                self.dirty.insert((state.source, state.home));
            }
        }
        if changed {
            self.tell_room();
            self.serve_waiting(|_| true);
        }
    }

    pub(super) fn upstream(&mut self, body: Message) {
        match body {
            Message::Granted {
                request,
                home,
                grant,
                range,
                mode,
                empty,
            } => {
                if self.asked.take(request).is_none() {
                    return;
                }
                self.holdings.granted(home, grant, range, mode, empty);
                if empty {
                    // What is on its way was not there when the home looked.
                    for key in self.outbox.touched_in(home, &range) {
                        self.holdings.occupy(home, key);
                    }
                }
                self.serve_waiting(|w| w.is_in(home, range.space));
            }
            Message::Refused { request, reason } => self.refused(request, reason),
            Message::Revoke {
                home,
                grant,
                range,
                age,
            } => {
                if self.holdings.revoke(home, grant, range, age) {
                    for (asker, range, mode) in self.locks.withdraw(home, range, age) {
                        self.waiting.push(WaitingLock {
                            asker,
                            home,
                            range,
                            mode,
                        });
                    }
                    self.recall(home, range, age);
                    self.serve_waiting(|w| w.is_in(home, range.space));
                } else {
                    self.port.send(home, Message::Unlock { home, grant, range });
                }
            }
            Message::ReadReply { request, value } => {
                if let Some((_, Some((to, request)))) = self.asked.take(request)
                    && self.sessions.get(&to.node) == Some(&to)
                {
                    self.port
                        .send(to.node, Message::ReadReply { request, value });
                }
            }
            Message::ScanReply {
                request,
                entries,
                more,
            } => {
                if let Some((_, Some((to, request)))) = self.asked.take(request)
                    && self.sessions.get(&to.node) == Some(&to)
                {
                    self.port.send(
                        to.node,
                        Message::ScanReply {
                            request,
                            entries,
                            more,
                        },
                    );
                }
            }
            _ => {}
        }
    }

    pub(super) fn refused(&mut self, request: u64, reason: LockRefusal) {
        let Some((Query::Lock { home, range, .. }, _)) = self.asked.take(request) else {
            return;
        };
        if reason != LockRefusal::Full {
            return;
        }
        let waiting = core::mem::take(&mut self.waiting);
        for w in waiting {
            let own = w.asker.holder == self.port.life();
            if w.home == home && w.range.overlaps(&range) && !own {
                self.port.send(
                    w.asker.holder.node,
                    Message::Refused {
                        request: w.asker.request,
                        reason,
                    },
                );
            } else {
                self.waiting.push(w);
            }
        }
    }

    pub(super) fn ask(&mut self, query: Query, what_for: Option<(Life, u64)>) {
        let request = self.asked.add(query, what_for);
        self.send_asked(request);
    }

    pub(super) fn send_asked(&mut self, request: u64) {
        if let Some(query) = self.asked.get(request) {
            let home = query.home();
            if self.tiers.is_open(home) {
                self.port.send(home, query.message(request));
            }
        }
    }

    /// Merges the windows into the homes.
    pub(super) fn merge(&mut self) {
        let (via, own) = (&self.via, self.port.life());
        let done = self.own.done();
        for hop in self.tiers.sessions() {
            self.outbox
                .flush(&mut self.port, hop, done, |source, home| {
                    Self::hop_of(via, own, source, home) == hop
                });
        }
    }

    pub(super) fn yield_locks(&mut self) {
        for recall in self.holdings.yielding() {
            let Recall {
                home,
                grant,
                range,
                age,
            } = recall;
            // What other grants cover as well, and are not asked back there, may stay held.
            let covered = |part, mode| self.holdings.covers_jointly(home, part, mode);
            if self.locks.is_used(home, range, age, covered) {
                continue;
            }
            if self.outbox.touched_in(home, &range).next().is_some() {
                self.hurry = true;
                continue;
            }
            if !self.tiers.is_open(home) {
                continue;
            }
            self.holdings.yielded(home, grant, range);
            self.counters.yielded += 1;
            self.port.send(home, Message::Unlock { home, grant, range });
        }
    }
}
