//! What the root keeps durable, and its encoding.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

use crate::identity::StoreMark;
use crate::ids::{Epoch, Life, NodeId, Seq, StreamSeq, Term, Time, ViewId};
use crate::message::{Held, Role, Seat, View};
use crate::wire::{Malformed, Reader, Wire};
use crate::wire_struct;

/// Version of the encoding. 1 did not say whether a decision is a second one, 2 nothing of storages.
const VERSION: u8 = 3;

/// Why a persisted state cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StateError {
    /// Another version of this program wrote it.
    Version {
        /// The version found.
        found: u8,
        /// The version that this program reads and writes.
        supported: u8,
    },
    /// Not a root's state although its checksum is right.
    Malformed(Malformed),
}

impl core::fmt::Display for StateError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            StateError::Version { found, supported } => write!(
                f,
                "the root's state has version {found}, this program reads version {supported}: \
                 finish evictions with the version that wrote it, or start a new cluster"
            ),
            StateError::Malformed(m) => write!(f, "the root's state: {m}"),
        }
    }
}

impl core::error::Error for StateError {}

impl From<Malformed> for StateError {
    fn from(m: Malformed) -> StateError {
        StateError::Malformed(m)
    }
}

/// A node and its newest life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) life: Life,
    pub(super) nonce: u64,
    pub(super) role: Role,
    pub(super) live: bool,
    /// What is known of a home's storage.
    pub(super) store: Option<StoreMark>,
}
wire_struct!(Row {
    life,
    nonce,
    role,
    live,
    store
});

/// Durable state of a root.
#[derive(Clone, Debug, Default)]
pub struct RootState {
    pub(super) term: Term,
    pub(super) minimum: Epoch,
    pub(super) ceiling: Epoch,
    pub(super) view: ViewId,
    pub(super) rows: Vec<Row>,
    pub(super) evictions: Vec<Eviction>,
}

impl RootState {
    pub(super) fn encode(&self, evictions: &[Eviction]) -> Vec<u8> {
        let mut out = alloc::vec![VERSION];
        self.term.put(&mut out);
        self.minimum.put(&mut out);
        self.ceiling.put(&mut out);
        self.view.put(&mut out);
        self.rows.put(&mut out);
        let list: Vec<DurableEviction> = evictions.iter().map(DurableEviction::of).collect();
        list.put(&mut out);
        out
    }

    /// Decodes a persisted state.
    ///
    /// # Errors
    /// [`StateError`]: another version, or not a root's state.
    pub fn decode(bytes: &[u8]) -> Result<RootState, StateError> {
        let mut input = Reader::new(bytes);
        let found = u8::take(&mut input)?;
        if found != VERSION {
            let supported = VERSION;
            return Err(StateError::Version { found, supported });
        }
        let mut state = RootState {
            term: Wire::take(&mut input)?,
            minimum: Wire::take(&mut input)?,
            ceiling: Wire::take(&mut input)?,
            view: Wire::take(&mut input)?,
            rows: Wire::take(&mut input)?,
            evictions: Vec::new(),
        };
        let list = Vec::<DurableEviction>::take(&mut input)?;
        state.evictions = list.into_iter().map(DurableEviction::revive).collect();
        input.finish("root state")?;
        Ok(state)
    }

    /// m as persisted.
    #[must_use]
    pub fn minimum(&self) -> Epoch {
        self.minimum
    }

    /// Term as persisted.
    #[must_use]
    pub fn term(&self) -> Term {
        self.term
    }

    /// What was known of a home's storage.
    #[must_use]
    pub fn store(&self, home: NodeId) -> Option<StoreMark> {
        let row = self.rows.iter().find(|r| r.life.node == home)?;
        row.store
    }

    /// The membership view.
    #[must_use]
    pub fn view(&self) -> View {
        let seat = |r: &Row| Seat {
            life: r.life,
            role: r.role,
            live: r.live,
        };
        View {
            id: self.view,
            seats: self.rows.iter().map(seat).collect(),
        }
    }

    /// Evictions that are not over: victim and stage.
    pub fn evictions(&self) -> impl Iterator<Item = (Life, &'static str)> + '_ {
        self.evictions.iter().map(|e| (e.victim, e.stage.name()))
    }

    /// Lives whose resolution is not finished.
    #[must_use]
    pub fn unresolved(&self) -> Vec<Life> {
        self.evictions.iter().map(|e| e.victim).collect()
    }
}

/// Progress of an eviction: LIVE → FENCING → RESOLVING → (DRAINING →) RELEASING → GONE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    /// Fences are being acknowledged.
    Fencing,
    /// The decision is durable and being carried out.
    Resolving,
    /// A proxy's clients finish what they stamped under its locks.
    Draining,
    /// Locks are being released.
    Releasing,
}

impl Stage {
    pub(super) fn name(self) -> &'static str {
        match self {
            Stage::Fencing => "FENCING",
            Stage::Resolving => "RESOLVING",
            Stage::Draining => "DRAINING",
            Stage::Releasing => "RELEASING",
        }
    }
}

/// The logged decision about a dead life's operations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Decision {
    /// Last surviving operation.
    pub(super) through: Seq,
    /// Where each destination's stream ends.
    pub(super) until: Vec<(NodeId, StreamSeq)>,
    /// Per holder: which operations to send where, ascending.
    pub(super) supply: Vec<(Life, Vec<(Seq, NodeId)>)>,
}
wire_struct!(Decision {
    through,
    until,
    supply
});

/// One eviction under way.
#[derive(Clone, Debug)]
pub(super) struct Eviction {
    pub(super) victim: Life,
    pub(super) role: Role,
    pub(super) stage: Stage,
    pub(super) decision: Decision,
    /// Above 0 the decision is a later one: a supplier died before the one before was carried out.
    /// It keeps no more than that did. Answers name their round: one that was long under way must
    /// not be taken for the answer to a later question.
    pub(super) round: u32,
    /// Answers to the fence.
    pub(super) fenced: BTreeMap<Life, Vec<Held>>,
    /// Nodes that answered the current stage.
    pub(super) answered: BTreeSet<NodeId>,
    pub(super) next_send: Time,
}

impl Eviction {
    pub(super) fn new(victim: Life, role: Role) -> Eviction {
        Eviction {
            victim,
            role,
            stage: Stage::Fencing,
            decision: Decision::default(),
            round: 0,
            fenced: BTreeMap::new(),
            answered: BTreeSet::new(),
            next_send: Time(0),
        }
    }

    pub(super) fn enter(&mut self, stage: Stage) {
        self.stage = stage;
        self.answered.clear();
        self.next_send = Time(0);
    }
}

/// What survives of an eviction: a restart repeats fencing, but never a logged decision.
struct DurableEviction {
    victim: Life,
    role: Role,
    stage: u8,
    round: u32,
    decision: Decision,
}
wire_struct!(DurableEviction {
    victim,
    role,
    stage,
    round,
    decision
});

impl DurableEviction {
    fn of(e: &Eviction) -> DurableEviction {
        let stage = e.stage as u8;
        DurableEviction {
            victim: e.victim,
            role: e.role,
            stage,
            round: e.round,
            decision: e.decision.clone(),
        }
    }

    fn revive(self) -> Eviction {
        let stage = match self.stage {
            0 => Stage::Fencing,
            1 => Stage::Resolving,
            2 => Stage::Draining,
            _ => Stage::Releasing,
        };
        let decision = self.decision;
        let round = self.round;
        Eviction {
            stage,
            round,
            decision,
            ..Eviction::new(self.victim, self.role)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_version_is_refused_by_name() {
        let mut bytes = RootState::default().encode(&[]);
        assert!(RootState::decode(&bytes).is_ok());
        bytes[0] = 2;
        let error = RootState::decode(&bytes).expect_err("version 2");
        let (found, supported) = (2, VERSION);
        assert_eq!(error, StateError::Version { found, supported });
        let text = alloc::format!("{error}");
        assert!(
            text.contains("version 2") && text.contains("version 3"),
            "{text}"
        );
    }

    #[test]
    fn a_truncated_state_is_refused() {
        let bytes = RootState::default().encode(&[]);
        for len in 0..bytes.len() {
            assert!(RootState::decode(&bytes[..len]).is_err(), "{len} bytes");
        }
    }
}
