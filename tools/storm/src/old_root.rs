//! Two roots (N10): one stops, its successor takes its place, and then it goes on.
//!
//! The old root writes to a disk of its own, and what it says arrives at once, but only at nodes
//! that have heard the successor: what keeps it from all others is that `root.state` has one owner,
//! and a root says nothing that is not durable there. It hears nothing, so it takes everybody for
//! silent.

use lowtide_engine_core::effect::Effect;
use lowtide_engine_core::ids::Time;
use lowtide_engine_core::message::Envelope;
use lowtide_engine_core::root::Root;
use lowtide_engine_core::wire;

use crate::plan::Index;
use crate::probe::Probe;
use crate::world::{Core, Event, World};

/// Ticks between two looks of an old root at its clock.
const INTERVAL: u64 = 10;

/// A root that has been replaced.
#[derive(Debug)]
pub(crate) struct OldRoot {
    root: Box<Root>,
    /// It stops for good then.
    until: u64,
}

impl World {
    /// The root stops; its successor starts after `down` ticks, and the old one goes on `asleep`
    /// ticks later, for `ticks`.
    pub(crate) fn replace_root(&mut self, (down, asleep, ticks): (u64, u64, u64)) {
        let Core::Root(root) = &self.nodes[0].core else {
            return;
        };
        let root = root.clone();
        self.crash(0);
        self.at(self.now + down, Event::Start { node: 0 });
        let wakes = self.now + down + asleep;
        let until = wakes + ticks;
        self.old_root = Some(OldRoot { root, until });
        self.at(wakes, Event::OldRoot);
    }

    /// Time passes for the old root.
    pub(crate) fn old_root_goes_on(&mut self) {
        let now = self.now;
        let Some(mut old) = self.old_root.take_if(|old| now <= old.until) else {
            return;
        };
        old.root.handle_timeout(Time(now));
        self.old_root_speaks(&mut old);
        self.old_root = Some(old);
        self.at(now + INTERVAL, Event::OldRoot);
    }

    /// The old root hears a message; returns whether it leaves.
    pub(crate) fn old_root_hears(&mut self, envelope: Envelope) -> bool {
        let Some(mut old) = self.old_root.take() else {
            return false;
        };
        old.root.handle_message(Time(self.now), envelope);
        let leaves = self.old_root_speaks(&mut old);
        self.old_root = Some(old).filter(|_| !leaves);
        leaves
    }

    /// Carries out its effects; whether it leaves.
    fn old_root_speaks(&mut self, old: &mut OldRoot) -> bool {
        while let Some(effect) = old.root.poll_effect() {
            match effect {
                Effect::Persist { version, .. } => {
                    old.root.handle_persisted(Time(self.now), version);
                }
                Effect::Send { to, envelope } => {
                    if let Some(&peer) = self.by_id.get(&to) {
                        self.hear_old_root(peer, &envelope);
                    }
                }
                Effect::Evicted => return true,
                _ => {}
            }
        }
        false
    }

    fn hear_old_root(&mut self, node: Index, envelope: &Envelope) {
        let n = &self.nodes[node];
        let heard = |n: &crate::world::Node| n.core.port().map(|p| (p.term(), p.outdated()));
        let Some((term, before)) = heard(n).filter(|_| n.paused_until <= self.now) else {
            return;
        };
        if term > envelope.term {
            self.receive(node, 0, &wire::encode(envelope));
            let refused = heard(&self.nodes[node]).is_some_and(|(_, after)| after > before);
            self.probes.hit_if(Probe::OldRootRefused, refused);
            self.old_root_said.insert(envelope.body.name());
        }
    }
}
