//! How the cluster notices that a home came back on another storage than its own, or on an old copy
//! of it (design D11): the home says what it has, the root what it knows, and who does not match is
//! not let in.
//!
//! A storage has a number, drawn when it was made, and a history, counted in steps. A home says
//! both when it joins, and with each ping how far its history is durable. The root keeps what the
//! pings said, and compares with it at each join.
//!
//! Invariants:
//!
//! - *A home that kept its storage is let in.* The root knows a step only from a process that had
//!   its records synced, so every later start finds them. What a start merely finds may stand in
//!   pages that were never synced: it is compared, and not kept.
//! - *A copy from before a life is smaller than that life.* A life begins with a record that counts
//!   ([`Record::Entered`](crate::record::Record::Entered)), whatever comes of it.
//! - *Trying again changes nothing.* Until it is let in, a home writes nothing that counts and
//!   answers nobody.
//!
//! Not noticed: a copy that lacks only what became durable after the home's last ping, or after
//! what the root heard last was written ([`crate::root`]).
//!
//! Deliberately absent: how to go on without the storage. What it held is lost, and with it the
//! other homes' shares of its operations; the cluster waits for it.

use crate::ids::{Step, StorageId};
use crate::wire::{Malformed, Reader, Sink, Wire};
use crate::wire_struct;

/// What a home's storage is, and how far its history goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreMark {
    /// Which one it is.
    pub storage: StorageId,
    /// The newest step that counts: that of an operation or of a record of the front, marks apart.
    pub commit: Step,
}
wire_struct!(StoreMark { storage, commit });

/// Why a home may not join.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JoinRefusal {
    /// It has another storage than the node had before.
    OtherStorage {
        /// The one that it had.
        known: StorageId,
    },
    /// Its storage is older than it was before.
    OlderStorage {
        /// What it had at least.
        known: Step,
    },
}

impl Wire for JoinRefusal {
    fn put(&self, out: &mut impl Sink) {
        match self {
            JoinRefusal::OtherStorage { known } => {
                out.push(0);
                known.put(out);
            }
            JoinRefusal::OlderStorage { known } => {
                out.push(1);
                known.put(out);
            }
        }
    }
    fn take(input: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(match u8::take(input)? {
            0 => JoinRefusal::OtherStorage {
                known: Wire::take(input)?,
            },
            1 => JoinRefusal::OlderStorage {
                known: Wire::take(input)?,
            },
            _ => {
                return Err(Malformed {
                    what: "join refusal",
                });
            }
        })
    }
}

impl StoreMark {
    /// Whether a storage that says this of itself can be the one of which `known` was said before.
    ///
    /// # Errors
    /// [`JoinRefusal`].
    pub fn follows(&self, known: &StoreMark) -> Result<(), JoinRefusal> {
        if self.storage != known.storage {
            return Err(JoinRefusal::OtherStorage {
                known: known.storage,
            });
        }
        if self.commit < known.commit {
            return Err(JoinRefusal::OlderStorage {
                known: known.commit,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire;

    #[test]
    fn a_storage_follows_itself_and_nothing_newer_or_other() {
        let mark = |storage, commit| StoreMark {
            storage: StorageId(storage),
            commit: Step(commit),
        };
        let known = mark(7, 40);
        assert_eq!(mark(7, 40).follows(&known), Ok(()));
        assert_eq!(mark(7, 41).follows(&known), Ok(()));
        let older = JoinRefusal::OlderStorage { known: Step(40) };
        assert_eq!(mark(7, 39).follows(&known), Err(older));
        let known_id = StorageId(7);
        let other = JoinRefusal::OtherStorage { known: known_id };
        // A wiped one, however far it has come since.
        for commit in [0, 40, 1000] {
            assert_eq!(mark(8, commit).follows(&known), Err(other));
        }
        for refusal in [older, other] {
            let bytes = wire::encode(&refusal);
            assert_eq!(wire::decode(&bytes, "refusal"), Ok(refusal));
        }
        assert!(wire::decode::<JoinRefusal>(&[2; 17], "refusal").is_err());
    }
}
