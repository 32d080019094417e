//! Rules E1–E4 of seed 001: how epochs spread by messages.
//!
//! - **E1** on receiving X, `N.epoch = max(N.epoch, X.epoch)`;
//! - **E2** on sending X, `X.epoch = N.epoch`;
//! - **E3** any node may do `N.epoch++` at any time, without communication;
//! - **E4** null messages announce epochs; here they are the health pings.
//!
//! Invariants: I1 (an epoch never decreases), I2 (after a message the receiver is not behind it).
//! A node's state machine is driven by one thread, so E1–E3 are mutually atomic by ownership; a
//! pin (see [`crate::source`]) covers the time between reading the epoch and entering the redo.
//!
//! Deliberately absent: the ceiling of a server's epoch across restarts, which is the business of
//! whoever owns a log ([`crate::destination`]).

use crate::ids::Epoch;
use crate::teeth::{Tooth, bites};

/// Largest credible jump: a message whose epoch lies further ahead is refused, because one corrupted
/// value would otherwise infect the whole cluster in one round. Counting is [`crate::effect`]'s.
pub const JUMP_MAX: u64 = 1 << 32;

/// A node's epoch.
#[derive(Clone, Debug, Default)]
pub struct Clock {
    epoch: Epoch,
}

/// The epoch of a message lies beyond [`JUMP_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Poisoned {
    /// The epoch that was refused.
    pub epoch: Epoch,
}

impl Clock {
    /// A clock that starts at `epoch`.
    #[must_use]
    pub fn starting_at(epoch: Epoch) -> Clock {
        Clock { epoch }
    }

    /// The current epoch: what E2 puts on every message and O1 on every operation.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// E1.
    ///
    /// # Errors
    /// [`Poisoned`] when the jump is not credible; the epoch is then unchanged.
    pub fn observe(&mut self, epoch: Epoch) -> Result<(), Poisoned> {
        if epoch.0 > self.epoch.0.saturating_add(JUMP_MAX) {
            return Err(Poisoned { epoch });
        }
        self.epoch = if bites(Tooth::EpochAssigned) {
            epoch
        } else {
            self.epoch.max(epoch)
        };
        Ok(())
    }

    /// Takes the floor of a join before the jump bound applies: a node that was away for long must
    /// not be quarantined by its own absence.
    pub fn join(&mut self, floor: Epoch) {
        self.epoch = self.epoch.max(floor);
    }

    /// E3.
    pub fn tick(&mut self) {
        self.epoch = self.epoch.next();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn observing_never_lowers_the_epoch() {
        let mut clock = Clock::starting_at(Epoch(7));
        clock.observe(Epoch(3)).unwrap();
        assert_eq!(clock.epoch(), Epoch(7));
        clock.observe(Epoch(9)).unwrap();
        assert_eq!(clock.epoch(), Epoch(9));
    }

    #[test]
    fn a_poisoned_epoch_is_refused_but_a_join_may_jump() {
        let mut clock = Clock::default();
        let far = Epoch(JUMP_MAX + 1);
        assert_eq!(clock.observe(far), Err(Poisoned { epoch: far }));
        assert_eq!(clock.epoch(), Epoch(0));
        clock.join(far);
        assert_eq!(clock.epoch(), far);
    }
}
