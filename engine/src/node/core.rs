//! The role's state machine, whichever it is, behind one face.

use lowtide_engine_core::aggregator::Aggregator;
use lowtide_engine_core::client::Client;
use lowtide_engine_core::destination::{Destination, Stage};
use lowtide_engine_core::effect::{Effect, Port};
use lowtide_engine_core::ids::{Epoch, NodeId, Time};
use lowtide_engine_core::message::Envelope;
use lowtide_engine_core::proxy::Proxy;
use lowtide_engine_core::root::Root;

use super::rootfile::RootFile;
use crate::server::Server;
use crate::status::{HoldStatus, MemberStatus, NodeCounters, Status};

/// A state machine with what it needs to run.
pub(super) enum Core {
    Root(Box<Root>, RootFile),
    Destination(Box<Server>),
    Proxy(Box<Proxy>),
    Client(Box<Client>),
    Aggregator(Box<Aggregator>),
}

impl Core {
    pub(super) fn port(&self) -> &Port {
        match self {
            Core::Root(c, _) => c.port(),
            Core::Destination(c) => c.front().port(),
            Core::Proxy(c) => c.port(),
            Core::Client(c) => c.port(),
            Core::Aggregator(c) => c.port(),
        }
    }

    pub(super) fn handle_connected(&mut self, now: Time, peer: NodeId) {
        match self {
            Core::Destination(c) => c.front_mut().handle_connected(peer),
            Core::Aggregator(c) => c.handle_connected(peer),
            Core::Proxy(c) => c.handle_connected(now, peer),
            Core::Client(c) => c.handle_connected(now, peer),
            Core::Root(..) => {}
        }
    }

    pub(super) fn handle_disconnected(&mut self, peer: NodeId) {
        match self {
            Core::Destination(c) => c.front_mut().handle_disconnected(peer),
            Core::Proxy(c) => c.handle_disconnected(peer),
            Core::Client(c) => c.handle_disconnected(peer),
            Core::Root(..) | Core::Aggregator(_) => {}
        }
    }

    pub(super) fn handle_message(&mut self, now: Time, envelope: Envelope) {
        match self {
            Core::Root(c, _) => c.handle_message(now, envelope),
            Core::Destination(c) => c.front_mut().handle_message(now, envelope),
            Core::Proxy(c) => c.handle_message(now, envelope),
            Core::Client(c) => c.handle_message(now, envelope),
            Core::Aggregator(c) => c.handle_message(now, envelope),
        }
    }

    pub(super) fn handle_timeout(&mut self, now: Time) {
        match self {
            Core::Root(c, _) => c.handle_timeout(now),
            Core::Destination(c) => c.front_mut().handle_timeout(now),
            Core::Proxy(c) => c.handle_timeout(now),
            Core::Client(c) => c.handle_timeout(now),
            Core::Aggregator(c) => c.handle_timeout(now),
        }
    }

    pub(super) fn poll_timeout(&self) -> Time {
        match self {
            Core::Root(c, _) => c.poll_timeout(),
            Core::Destination(c) => c.front().poll_timeout(),
            Core::Proxy(c) => c.poll_timeout(),
            Core::Client(c) => c.poll_timeout(),
            Core::Aggregator(c) => c.poll_timeout(),
        }
    }

    pub(super) fn poll_effect(&mut self) -> Option<Effect> {
        match self {
            Core::Root(c, _) => c.poll_effect(),
            Core::Destination(c) => c.front_mut().poll_effect(),
            Core::Proxy(c) => c.poll_effect(),
            Core::Client(c) => c.poll_effect(),
            Core::Aggregator(c) => c.poll_effect(),
        }
    }

    /// What the threads that block have finished since the last call.
    pub(super) fn handle_durability(&mut self, now: Time) {
        match self {
            Core::Root(c, file) => c.handle_persisted(now, file.persisted()),
            Core::Destination(c) => c.settle(now),
            _ => {}
        }
    }

    /// Ends a round: what was ordered goes to the shards, what they append to the committer.
    pub(super) fn finish_batch(&mut self, now: Time) {
        if let Core::Destination(c) = self {
            c.pass(now);
        }
    }

    /// Why the storage failed, if it did.
    pub(super) fn failure(&self) -> Option<String> {
        match self {
            Core::Root(_, file) => file.failure(),
            Core::Destination(c) => c.failure(),
            _ => None,
        }
    }

    /// Bytes of operations that a client holds for redo.
    pub(super) fn held_bytes(&self) -> u64 {
        match self {
            Core::Client(c) => c.held_bytes() as u64,
            _ => 0,
        }
    }

    pub(super) fn close(self) {
        if let Core::Destination(c) = self {
            c.close();
        }
    }

    /// Fills in what the state machine knows.
    pub(super) fn describe(&self, now: Time, status: &mut Status) {
        let port = self.port();
        status.incarnation = port.life().incarnation.0;
        status.epoch = port.epoch().0;
        status.minimum = port.minimum().0;
        status.term = port.term().0;
        let joined = status.incarnation > 0;
        status.stage = if joined { "COMPLETE" } else { "JOINING" }.to_owned();
        status.blocked_by = None;
        let counters = &mut status.counters;
        match self {
            Core::Root(c, file) => {
                describe_root(c, now, status);
                if let Some(why) = file.full() {
                    status.stage = "FULL".to_owned();
                    status.blocked_by = Some(why);
                }
            }
            Core::Destination(c) => {
                describe_destination(c.front(), counters);
                status.shards = c.front().shards();
                let (stage, waiting) = c.front().stage();
                if joined && stage == Stage::Reconnect {
                    status.stage = "RECONNECT".to_owned();
                    let names: Vec<String> = waiting.iter().map(ToString::to_string).collect();
                    status.blocked_by = Some(format!("waits for {}", names.join(", ")));
                } else if let Some(why) = c.full() {
                    status.stage = "FULL".to_owned();
                    status.blocked_by = Some(why);
                } else {
                    status.blocked_by = c.lock_waits();
                }
            }
            Core::Proxy(c) => {
                status.blocked_by = c.waits_for();
                let windows = c.windows();
                counters.operations = c.counters().stamped;
                counters.replayed = windows.replayed;
                counters.windows_sent = windows.sent;
                counters.windows_discarded = windows.discarded;
                counters.windows_held_max = windows.held_max;
                counters.pings_sent = c.pings();
            }
            Core::Client(c) => {
                status.blocked_by = c.waits_for();
                let (queued, uncommitted) = c.backlog();
                let windows = c.windows();
                counters.operations = c.counters().stamped;
                counters.in_flight = queued as u64 + uncommitted;
                counters.replayed = windows.replayed;
                counters.windows_sent = windows.sent;
                counters.windows_discarded = windows.discarded;
                counters.windows_held_max = windows.held_max;
                counters.pings_sent = c.pings();
            }
            Core::Aggregator(_) => {}
        }
    }

    /// Whether the minimum is above `epoch`.
    pub(super) fn minimum(&self) -> Epoch {
        self.port().minimum()
    }
}

fn describe_destination(c: &Destination, counters: &mut NodeCounters) {
    let own = c.counters();
    counters.undo_appended = own.executed;
    counters.undo_purged = own.purged;
    counters.undo_rolled_back = own.undone;
    counters.completed = own.completed;
    counters.undone = own.undone;
    counters.pings_sent = c.pings();
}

fn describe_root(c: &Root, now: Time, status: &mut Status) {
    let own = c.counters();
    status.counters.evicted = own.evicted;
    status.counters.joins_rejected = own.rejected;
    status.counters.minimum_lag_max_ms = own.lag_max;
    let view = c.view();
    status.members = view
        .seats
        .iter()
        .map(|seat| MemberStatus {
            id: seat.life.node.0,
            incarnation: seat.life.incarnation.0,
            live: seat.live,
            silent_ms: c.silence(now, seat.life).unwrap_or(0),
        })
        .collect();
    status.held_by = c.blocked_by().map(|(life, bound)| HoldStatus {
        id: life.node.0,
        incarnation: life.incarnation.0,
        bound: bound.0,
    });
    let evictions: Vec<String> = c
        .evictions()
        .map(|(victim, stage)| format!("{victim} {stage}"))
        .collect();
    if !evictions.is_empty() {
        status.stage = "RESOLVE".to_owned();
        status.blocked_by = Some(evictions.join(", "));
    }
}
