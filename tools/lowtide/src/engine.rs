//! The one place where the command meets the engine's node runtime.
//!
//! [`NodeStatus`] is what the rest of the command knows of a running node; it travels over the
//! control socket and into reports.

use lowtide_engine::medium::power::apply_power_loss;
use serde::{Deserialize, Serialize};

use std::path::Path;

use crate::config::{Provider, Role};

/// How a node is, as far as the command needs to know.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeStatus {
    /// Number of the node.
    pub id: u32,
    /// Its role; `None` before the node has started.
    pub role: Option<Role>,
    /// Its life.
    pub incarnation: u64,
    /// Its epoch.
    pub epoch: u64,
    /// The global minimum as it knows it.
    pub minimum: u64,
    /// The root's term as it knows it.
    pub term: u64,
    /// Stage of recovery, in the protocol's words; `complete` when there is nothing to recover.
    pub stage: String,
    /// Who holds the minimum back, if anybody does.
    pub blocked_by: Option<String>,
    /// Root only: every member and its life.
    pub members: Vec<MemberStatus>,
    /// Counts since this life began.
    pub counters: Counters,
    /// Latency of operations at a client.
    pub latency: Latency,
}

impl NodeStatus {
    /// Whether the node has nothing left to recover.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.stage.eq_ignore_ascii_case("complete")
    }
}

/// A member as the root sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MemberStatus {
    /// Number of the node.
    pub id: u32,
    /// Its newest life.
    pub incarnation: u64,
    /// Whether that life is a member in good standing (neither joining nor being evicted).
    pub live: bool,
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident: $combine:ident,)*) => {
        /// Counts of one node since its life began, or sums over lives and nodes.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct Counters {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            /// Counts of two lives or two nodes taken together.
            #[must_use]
            pub fn and(self, other: Counters) -> Counters {
                Counters { $($name: combine::$combine(self.$name, other.$name),)* }
            }
        }
    };
}

mod combine {
    pub(super) fn sum(a: u64, b: u64) -> u64 {
        a + b
    }
    pub(super) fn largest(a: u64, b: u64) -> u64 {
        a.max(b)
    }
}

counters! {
    /// Operations stamped by this client.
    operations: sum,
    /// Operations of this client that are not yet stable: a level, not a count.
    in_flight: sum,
    /// Operations sent again to a destination that had lost them.
    replayed: sum,
    /// Operations completed for a source that died.
    completed: sum,
    /// Operations undone.
    undone: sum,
    /// Undo records written.
    undo_appended: sum,
    /// Undo records let go because the minimum passed them.
    undo_purged: sum,
    /// Undo records used.
    undo_rolled_back: sum,
    /// Windows sent to destinations.
    windows_sent: sum,
    /// Windows discarded because the minimum passed them.
    windows_discarded: sum,
    /// Most windows held at once for one destination.
    windows_held_max: largest,
}

/// Percentiles of the time from submission to execution, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Latency {
    /// Half of all operations are faster.
    pub p50: u64,
    /// 99 of 100.
    pub p99: u64,
    /// 999 of 1000.
    pub p999: u64,
}

/// The transport behind a choice, as reports name it.
#[must_use]
pub fn provider_name(provider: Provider) -> &'static str {
    match provider {
        Provider::Auto | Provider::Softroce => "softroce",
        Provider::Host => "host",
        Provider::Verbs => "verbs",
    }
}

/// Refuses a transport that this build does not have.
///
/// # Errors
/// What is missing, and what to use.
pub fn check_provider(provider: Provider) -> Result<(), String> {
    match provider {
        Provider::Auto | Provider::Softroce => Ok(()),
        Provider::Host | Provider::Verbs => Err(format!(
            "provider {} is not in this build; use softroce",
            provider_name(provider)
        )),
    }
}

/// Plays a power failure on a dead node's directory: each page that was not yet synced becomes
/// old, new or torn. Tells in words how many.
///
/// # Errors
/// Why it could not.
pub fn lose_unsynced(dir: &Path, seed: u64) -> Result<String, String> {
    match apply_power_loss(dir, seed) {
        Ok(loss) => Ok(format!(
            "power lost: {} unsynced pages old, {} new, {} torn",
            loss.old, loss.new, loss.torn
        )),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lives_add_up_and_peaks_do_not() {
        let a = Counters {
            operations: 5,
            windows_held_max: 7,
            ..Counters::default()
        };
        let b = Counters {
            operations: 6,
            windows_held_max: 3,
            ..Counters::default()
        };
        let both = a.and(b);
        assert_eq!((both.operations, both.windows_held_max), (11, 7));
    }

    #[test]
    fn an_older_nodes_status_is_understood() {
        let status: NodeStatus = serde_json::from_str(r#"{"id":3,"later":1}"#).unwrap();
        assert_eq!(status.id, 3);
        assert!(!status.is_complete());
    }
}
