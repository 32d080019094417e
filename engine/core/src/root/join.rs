//! Who is let in: the next life of a node, and of a home only on its own storage ([`crate::identity`]).
//!
//! What homes say with their pings of their storages is written with the next state, at rest within
//! an eighth of `evict_after`: it is a lower bound, so an older one does no harm and is only of less
//! use.

use super::state::Row;
use super::{Bound, Root};
use crate::identity::StoreMark;
use crate::ids::{Epoch, Incarnation, Life, NodeId, Step, Time};
use crate::message::{Message, Role};
use crate::teeth::{Tooth, bites};

impl Root {
    /// A home says how far its history is durable.
    pub(super) fn committed(&mut self, life: Life, commit: Option<Step>) {
        let row = self.row(life.node).filter(|r| r.life == life);
        let store = row.and_then(|r| r.store.as_mut());
        if let (Some(store), Some(commit)) = (store, commit)
            && store.commit < commit
        {
            store.commit = commit;
            self.grown = true;
        }
    }

    /// Lets a process in as the next life of its node, or says why not; an answer that got lost is given
    /// again.
    pub(super) fn join(
        &mut self,
        now: Time,
        node: NodeId,
        (nonce, role): (u64, Role),
        said: Option<StoreMark>,
    ) {
        if role == Role::Destination && said.is_none() {
            // Every home says what it has.
            return;
        }
        let known = self.row(node).map(|r| (r.life, r.nonce, r.live, r.role));
        let store = self.row(node).and_then(|r| r.store);
        let life = match known {
            Some((life, seen, true, _)) if seen == nonce => {
                // It lives, and waits for a state that is not durable yet.
                self.heard(now, life);
                life
            }
            _ => {
                if let (Some(said), Some(known)) = (said, store)
                    && let Err(reason) = said.follows(&known)
                    && !bites(Tooth::AnyStorageAdmitted)
                {
                    // It asks again until it has heard.
                    let is_new = self.rejected.insert(node, nonce) != Some(nonce);
                    self.counters.rejected += u64::from(is_new);
                    self.port.send(node, Message::Rejected { nonce, reason });
                    return;
                }
                let last = known.map_or(0, |(life, ..)| life.incarnation.0);
                let life = Life {
                    node,
                    incarnation: if bites(Tooth::SameIncarnation) {
                        Incarnation(1)
                    } else {
                        Incarnation(last + 1)
                    },
                };
                if let Some((old, _, true, old_role)) = known {
                    if old_role.is_volatile_source() {
                        self.start_eviction(old);
                    } else if old_role == Role::Aggregator {
                        self.branch_lost(node);
                    }
                }
                // Of a storage that is new here only its number is known.
                let commit = store.map_or(Step(0), |known| known.commit);
                let store = said.map(|said| StoreMark { commit, ..said });
                let row = Row {
                    life,
                    nonce,
                    role,
                    live: true,
                    store,
                };
                self.admit(now, row);
                life
            }
        };
        let floor = self.port.minimum();
        let view = self.view();
        self.port.send(
            node,
            Message::Joined {
                nonce,
                life,
                floor,
                view,
            },
        );
    }

    /// A life of its own for a process, counted from now on.
    fn admit(&mut self, now: Time, row: Row) {
        let (life, role) = (row.life, row.role);
        match self
            .state
            .rows
            .binary_search_by_key(&life.node, |r| r.life.node)
        {
            Ok(index) => self.state.rows[index] = row,
            Err(index) => self.state.rows.insert(index, row),
        }
        if role.is_volatile_source() {
            let hold = if bites(Tooth::JoinerNotHeld) {
                Epoch(u64::MAX)
            } else {
                self.port.minimum()
            };
            let bound = Bound {
                hold,
                covered: None,
                attach: (0, None),
                last_heard: now,
            };
            self.bounds.insert(life, bound);
        } else if role == Role::Destination {
            self.holders.joined();
        }
        self.view_changed();
    }
}
