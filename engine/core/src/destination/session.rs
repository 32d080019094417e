//! Sessions and locks at the front: who may ask, and what is told to whom. The tables are the
//! shards'.

use alloc::vec::Vec;

use super::shard::Task;
use super::{Destination, Session, Stage, shard_of};
use crate::ids::{Life, Step};
use crate::lock::{Asker, Notice};
use crate::message::{LockRefusal, Message, Reclaim};
use crate::op::Mode;
use crate::record::Record;
use crate::teeth::{Tooth, bites};

impl Destination {
    /// A source opens its session: its grants are made to agree with what it claims. Without a
    /// view nobody is served, because the dead cannot be told from the living.
    pub(super) fn open(&mut self, from: Life, reclaim: Vec<Reclaim>) {
        if !self.member.is_joined() {
            // Said once per connection, so it is kept.
            self.early.insert(from.node, (from, reclaim));
            return;
        }
        if self.is_refused(from) {
            return;
        }
        self.deferred.retain(|(asker, _)| *asker != from);
        let since = self.reclaim(from, &reclaim);
        let session = Session { life: from, since };
        self.sessions.insert(from.node, session);
        self.returned.insert(from);
        self.counted.insert(from);
        if !self.rows.contains_key(&from) {
            let step = self.log(Record::Row(from));
            self.rows.insert(from, step);
        }
        if self
            .rows
            .get(&from)
            .is_some_and(|&step| step <= self.durable)
        {
            self.opened(from);
        } else {
            self.opening.push(from);
        }
    }

    pub(super) fn opened(&mut self, life: Life) {
        let own = self.port.life();
        self.port.send(life.node, Message::Opened { life: own });
        self.told.remove(&life.node);
    }

    /// Whoever lives may have something stamped, and dies with it.
    pub(super) fn count_living(&mut self) {
        let seats = self.member.view().seats.iter();
        let living = seats.filter(|s| s.live && s.role.is_volatile_source());
        let living = living.map(|s| s.life).filter(|life| !self.is_gone(*life));
        let living: Vec<Life> = living.collect();
        self.counted.extend(living);
    }

    /// Every shard makes the life's grants agree with its claims.
    pub(super) fn reclaim(&mut self, holder: Life, claims: &[Reclaim]) -> Step {
        let count = self.shards();
        self.order_all(|number| {
            let own = |c: &&Reclaim| shard_of(c.range.space, count) == number;
            let claims = claims.iter().filter(own).cloned().collect();
            Task::Reclaim { holder, claims }
        })
    }

    /// A life waits for nothing any more: its session ended, or it is fenced.
    pub(super) fn forget(&mut self, life: Life) {
        self.deferred.retain(|(asker, _)| *asker != life);
        self.order_all(|_| Task::Forget { holder: life });
    }

    pub(super) fn lock_message(&mut self, from: Life, body: Message) {
        if self.is_refused(from) {
            if let Message::Lock { request, .. } = body {
                let reason = LockRefusal::Fenced;
                self.port
                    .send(from.node, Message::Refused { request, reason });
            }
            return;
        }
        if self.sessions.get(&from.node).is_none_or(|s| s.life != from) {
            return;
        }
        match body {
            // A shared lock brings no work, and what is stored can be read of a full home.
            Message::Lock { request, mode, .. } if mode == Mode::Exclusive && !self.has_room() => {
                let reason = LockRefusal::Full;
                self.port
                    .send(from.node, Message::Refused { request, reason });
            }
            body @ Message::Lock { .. } if self.stage == Stage::Reconnect => {
                self.deferred.push((from, body));
            }
            Message::Lock {
                request,
                home,
                range,
                mode,
                age,
            } => {
                let holder = from;
                let asker = Asker {
                    holder,
                    request,
                    age,
                };
                let task = Task::Lock {
                    home,
                    asker,
                    range,
                    mode,
                };
                self.order(self.shard_of(range.space), task);
            }
            Message::Unlock { home, grant, range } => {
                let task = Task::Unlock {
                    home,
                    holder: from,
                    grant,
                    range,
                };
                self.order(self.shard_of(range.space), task);
            }
            _ => {}
        }
    }

    /// Whether the session that a shard answers at `step` is still the same.
    pub(super) fn is_open(&self, life: Life, step: Step) -> bool {
        let session = self.sessions.get(&life.node);
        let stale = |s: &Session| s.since > step && !bites(Tooth::StaleGrantTold);
        session.is_some_and(|s| s.life == life && !stale(s))
    }

    /// A grant or a recall. One that was meant for an earlier session is not told: that session's
    /// end has released or forgotten it, or its claims have made up for it.
    pub(super) fn notice(&mut self, step: Step, notice: Notice, empty: bool) {
        match notice {
            Notice::Grant {
                to,
                request,
                home,
                grant,
                range,
                mode,
            } => {
                if self.is_open(to, step) {
                    let granted = Message::Granted {
                        request,
                        home,
                        grant,
                        range,
                        mode,
                        empty,
                    };
                    self.port.send(to.node, granted);
                }
            }
            Notice::Revoke {
                to,
                home,
                grant,
                range,
                age,
            } => {
                if self.is_open(to, step) {
                    let revoke = Message::Revoke {
                        home,
                        grant,
                        range,
                        age,
                    };
                    self.port.send(to.node, revoke);
                }
            }
        }
    }
}
