//! The one place where the command meets the engine's node runtime.
//!
//! A node's [`Status`] travels unchanged over the control socket and into reports.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use lowtide_engine::medium::power::apply_power_loss;
use lowtide_engine::node::{self, NodeConfig, NodeHandle, Peer, StartError};
pub use lowtide_engine::status::{NodeCounters, Status};
use lowtide_engine_core::ids::NodeId;

use lowtide_transport::message::SameHost;
use lowtide_transport::provider::{self, ForMessages};

use crate::config::{Cluster, NodeFile, Provider};
use crate::report::PowerReport;

/// In the environment: a directory where every device of the process writes a capture file.
pub const CAPTURE_VARIABLE: &str = "LOWTIDE_CAPTURE";

/// The capture file of a device on `addr` of this process, where one is asked for.
#[must_use]
pub fn capture_file(addr: SocketAddr) -> Option<PathBuf> {
    let dir = std::env::var_os(CAPTURE_VARIABLE).filter(|dir| !dir.is_empty())?;
    Some(Path::new(&dir).join(format!("{addr}.{}.pcap", std::process::id())))
}

/// The address of the device that wrote a capture file, from the file's name.
#[must_use]
pub fn capture_owner(file: &Path) -> Option<SocketAddr> {
    let name = file.file_name()?.to_str()?.strip_suffix(".pcap")?;
    name.rsplit_once('.')?.0.parse().ok()
}

/// Starts the node that a file describes, on what was chosen for it.
///
/// # Errors
/// Its state cannot be opened, its address cannot be had.
pub fn start(file: &NodeFile, carrier: &Carrier) -> Result<NodeHandle, StartError> {
    let base = carrier.apply(config(&file.cluster, &file.member.name));
    node::start(NodeConfig {
        shards: file.shards.unwrap_or(base.shards),
        dir: file.dir.clone(),
        loss_percent: file.loss_percent,
        seed: file.seed,
        power_fail: file.record_unsynced,
        evict_after_ms: file.evict_after_ms.unwrap_or(base.evict_after_ms),
        ..base
    })
}

/// Joins a cluster as one of its clients, without any state.
///
/// # Errors
/// The client's address cannot be had.
pub fn join(cluster: &Cluster, client: &str, carrier: &Carrier) -> Result<NodeHandle, StartError> {
    node::start(carrier.apply(config(cluster, client)))
}

/// What of a node's settings only softroce can do.
#[must_use]
pub fn needs_wire(loss_percent: f64) -> Option<&'static str> {
    let captures = std::env::var_os(CAPTURE_VARIABLE).is_some_and(|dir| !dir.is_empty());
    match loss_percent > 0.0 {
        true => Some("injected loss"),
        false => captures.then_some("a capture"),
    }
}

/// The settings that follow from the cluster alone; `name` is one of its members.
fn config(cluster: &Cluster, name: &str) -> NodeConfig {
    let id_of = |name: &str| {
        let member = cluster.member(name);
        NodeId(member.expect("checked when the cluster was loaded").id)
    };
    let me = cluster.member(name).expect("the caller looked it up");
    NodeConfig {
        peers: cluster
            .members
            .iter()
            .map(|member| Peer {
                id: NodeId(member.id),
                role: member.role,
                addr: member.address,
            })
            .collect(),
        via: cluster
            .routes
            .iter()
            .filter(|route| route.client == name)
            .map(|route| (id_of(&route.home), id_of(&route.proxy)))
            .collect(),
        parent: me.parent.as_deref().map(id_of),
        capture: capture_file(me.address),
        ..NodeConfig::new(NodeId(me.id), me.role, me.address)
    }
}

/// Whether a node has nothing left to recover.
#[must_use]
pub fn is_complete(status: &Status) -> bool {
    status.stage.eq_ignore_ascii_case("complete")
}

/// What a node waits for, in words; `name_of` knows the name of a node by its number.
#[must_use]
pub fn waits_for(status: &Status, name_of: impl Fn(u32) -> Option<String>) -> Option<String> {
    let held = || {
        let hold = status.held_by?;
        let name = name_of(hold.id).unwrap_or_else(|| format!("node {}", hold.id));
        let (life, bound) = (hold.incarnation, hold.bound);
        Some(format!("minimum held at {bound} by {name} (life {life})"))
    };
    status.blocked_by.clone().or_else(held)
}

/// Counts of two lives or two nodes taken together: sums, and the larger of two peaks.
#[must_use]
pub fn together(a: NodeCounters, b: NodeCounters) -> NodeCounters {
    NodeCounters {
        operations: a.operations + b.operations,
        in_flight: a.in_flight + b.in_flight,
        replayed: a.replayed + b.replayed,
        completed: a.completed + b.completed,
        undone: a.undone + b.undone,
        undo_appended: a.undo_appended + b.undo_appended,
        undo_purged: a.undo_purged + b.undo_purged,
        undo_rolled_back: a.undo_rolled_back + b.undo_rolled_back,
        windows_sent: a.windows_sent + b.windows_sent,
        windows_discarded: a.windows_discarded + b.windows_discarded,
        windows_held_max: a.windows_held_max.max(b.windows_held_max),
        messages_sent: a.messages_sent + b.messages_sent,
        message_bytes_sent: a.message_bytes_sent + b.message_bytes_sent,
        sent_bytes_copied: a.sent_bytes_copied + b.sent_bytes_copied,
        received_bytes_copied: a.received_bytes_copied + b.received_bytes_copied,
        pings_sent: a.pings_sent + b.pings_sent,
        frames_dropped: a.frames_dropped + b.frames_dropped,
        epochs_refused: a.epochs_refused + b.epochs_refused,
        epochs_refused_elsewhere: a.epochs_refused_elsewhere + b.epochs_refused_elsewhere,
        datagrams_dropped: a.datagrams_dropped + b.datagrams_dropped,
        datagrams_lost: a.datagrams_lost + b.datagrams_lost,
        datagrams_blocked: a.datagrams_blocked + b.datagrams_blocked,
        packets_repeated: a.packets_repeated + b.packets_repeated,
        evicted: a.evicted + b.evicted,
        joins_rejected: a.joins_rejected + b.joins_rejected,
        minimum_lag_max_ms: a.minimum_lag_max_ms.max(b.minimum_lag_max_ms),
    }
}

/// What carries the messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// softroce, by UDP.
    Softroce,
    /// The same, but by shared memory to peers of this machine.
    Host,
    /// A device of libibverbs.
    Verbs(ForMessages),
}

impl Carrier {
    fn apply(&self, config: NodeConfig) -> NodeConfig {
        let (same_host, device) = match self {
            Carrier::Softroce => (SameHost::Udp, None),
            Carrier::Host => (SameHost::Direct, None),
            Carrier::Verbs(chosen) => (SameHost::Udp, Some(chosen.device.name.clone())),
        };
        NodeConfig {
            same_host,
            device,
            ..config
        }
    }

    /// As files and reports name it.
    #[must_use]
    pub fn provider(&self) -> Provider {
        match self {
            Carrier::Softroce => Provider::Softroce,
            Carrier::Host => Provider::Host,
            Carrier::Verbs(_) => Provider::Verbs,
        }
    }
}

/// Which transport carries the messages of a node at `addr`, or (none) of all nodes of a cluster whose
/// addresses are still to be chosen, and why, for the log. `needs_wire` says what only softroce can do.
///
/// # Errors
/// What a forced choice lacks, and what to use.
pub fn choose_provider(
    provider: Provider,
    addr: Option<IpAddr>,
    needs_wire: Option<&str>,
) -> Result<(Carrier, String), String> {
    let softroce = |why: String| Ok((Carrier::Softroce, format!("softroce{why}")));
    match (provider, needs_wire, addr) {
        (Provider::Softroce, ..) => softroce(", as asked for".to_owned()),
        (Provider::Host, ..) => {
            let why = "host, as asked for: shared memory to peers of this machine".to_owned();
            Ok((Carrier::Host, why))
        }
        (Provider::Verbs, Some(what), _) => Err(format!(
            "provider verbs: {what} needs softroce, a device's packets are its own"
        )),
        (Provider::Auto, Some(what), _) => softroce(format!(": {what} needs it")),
        // All nodes must choose alike, and no process of a cluster knows what the others have.
        (Provider::Auto, None, Some(_)) => {
            softroce(", which every machine has; provider \"verbs\" takes a device".to_owned())
        }
        (Provider::Auto | Provider::Verbs, ..) => match provider::for_messages(addr) {
            Ok(device) => {
                let why = device.to_string();
                Ok((Carrier::Verbs(device), why))
            }
            Err(reason) if provider == Provider::Auto => softroce(format!(": {reason}")),
            Err(reason) => Err(format!("provider verbs: {reason}; use softroce")),
        },
    }
}

/// Plays a power failure on a dead node's directory: each page that was not yet synced becomes
/// old, new or torn.
///
/// # Errors
/// Why it could not.
pub fn lose_unsynced(dir: &Path, seed: u64) -> Result<PowerReport, String> {
    match apply_power_loss(dir, seed) {
        Ok(loss) => Ok(PowerReport {
            old: loss.old,
            new: loss.new,
            torn: loss.torn,
        }),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use lowtide_engine::status::HoldStatus;

    use super::*;

    #[test]
    fn lives_add_up_and_peaks_do_not() {
        let a = NodeCounters {
            operations: 5,
            windows_held_max: 7,
            ..NodeCounters::default()
        };
        let b = NodeCounters {
            operations: 6,
            windows_held_max: 3,
            ..NodeCounters::default()
        };
        let both = together(a, b);
        assert_eq!((both.operations, both.windows_held_max), (11, 7));
    }

    #[test]
    fn who_holds_the_minimum_is_called_by_name() {
        let mut status = Status::default();
        let name_of = |id| (id == 8).then(|| "client0".to_owned());
        assert_eq!(waits_for(&status, name_of), None);
        status.held_by = Some(HoldStatus {
            id: 8,
            incarnation: 2,
            bound: 17,
        });
        let words = "minimum held at 17 by client0 (life 2)";
        assert_eq!(waits_for(&status, name_of).as_deref(), Some(words));
        let words = "minimum held at 17 by node 8 (life 2)";
        assert_eq!(waits_for(&status, |_| None).as_deref(), Some(words));
        // What a node says itself goes first.
        status.blocked_by = Some("no room".to_owned());
        assert_eq!(waits_for(&status, name_of).as_deref(), Some("no room"));
    }

    #[test]
    fn a_choice_has_a_reason_and_a_forced_one_may_be_refused() {
        let chosen = |provider, addr: &str, needs_wire| {
            choose_provider(provider, Some(addr.parse().unwrap()), needs_wire)
        };
        for (provider, addr, needs_wire, why) in [
            (Provider::Auto, "192.0.2.1", None, "softroce, which every"),
            (
                Provider::Auto,
                "192.0.2.1",
                Some("loss:5"),
                "softroce: loss:5",
            ),
            (Provider::Softroce, "192.0.2.1", None, "softroce, as asked"),
        ] {
            let (carrier, reason) = chosen(provider, addr, needs_wire).unwrap();
            assert_eq!(carrier, Carrier::Softroce);
            assert!(reason.starts_with(why), "{reason}");
        }
        let (carrier, _) = chosen(Provider::Host, "127.9.8.7", None).unwrap();
        assert_eq!(carrier, Carrier::Host);
        let refused = chosen(Provider::Verbs, "192.0.2.1", None).unwrap_err();
        assert!(refused.ends_with("use softroce"), "{refused}");
        let refused = chosen(Provider::Verbs, "192.0.2.1", Some("loss:5")).unwrap_err();
        assert!(refused.contains("loss:5 needs softroce"), "{refused}");
    }

    #[test]
    fn an_older_nodes_status_is_understood() {
        let status: Status = serde_json::from_str(r#"{"id":3,"later":1}"#).unwrap();
        assert_eq!(status.id, 3);
        assert!(!is_complete(&status));
    }

    #[test]
    fn a_client_goes_through_its_own_proxies_only() {
        let text = include_str!("../tests/data/cluster.toml");
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("cluster.toml");
        std::fs::write(&file, text).unwrap();
        let cluster = Cluster::load(&file).unwrap();
        let client = config(&cluster, "client1");
        assert_eq!(client.id, NodeId(6));
        assert_eq!(client.peers.len(), cluster.members.len());
        assert_eq!(client.via, [(NodeId(2), NodeId(4))]);
        assert_eq!(config(&cluster, "meta0").via, []);
    }
}
