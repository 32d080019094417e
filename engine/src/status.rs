//! What a node tells about itself, as numbers and words.

use serde::{Deserialize, Serialize};

/// A member as the root sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberStatus {
    /// Number of the node.
    pub id: u32,
    /// Its newest life.
    pub incarnation: u64,
    /// Whether that life is a member in good standing.
    pub live: bool,
    /// Milliseconds since it was last heard; 0 for members that are not counted.
    pub silent_ms: u64,
}

/// A life whose bound the minimum waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldStatus {
    /// Number of the node.
    pub id: u32,
    /// Its life.
    pub incarnation: u64,
    /// The bound, an epoch.
    pub bound: u64,
}

/// Counts since this life of the process began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeCounters {
    /// Operations stamped here.
    pub operations: u64,
    /// Operations submitted or stamped here and not everywhere committed: a level.
    pub in_flight: u64,
    /// Parts sent again to a tier that had lost them.
    pub replayed: u64,
    /// Operations of dead lives completed here.
    pub completed: u64,
    /// Operations of dead lives undone here.
    pub undone: u64,
    /// Undo records appended.
    pub undo_appended: u64,
    /// Undo records let go because m passed them.
    pub undo_purged: u64,
    /// Undo records used.
    pub undo_rolled_back: u64,
    /// Windows sent.
    pub windows_sent: u64,
    /// Windows discarded because m passed them.
    pub windows_discarded: u64,
    /// Most windows held at one time.
    pub windows_held_max: u64,
    /// Messages sent.
    pub messages_sent: u64,
    /// Bytes of messages sent, headers included.
    pub message_bytes_sent: u64,
    /// Bytes of messages sent that were copied to be sent.
    pub sent_bytes_copied: u64,
    /// Bytes of messages received that were copied: put together, held back, or placed by READ.
    pub received_bytes_copied: u64,
    /// Pings among the messages sent.
    pub pings_sent: u64,
    /// Frames dropped: not whole, not ours, not decodable.
    pub frames_dropped: u64,
    /// Messages of others dropped here because their epoch is not credible.
    pub epochs_refused: u64,
    /// Messages from here that others said they dropped because their epoch is not credible.
    pub epochs_refused_elsewhere: u64,
    /// Datagrams dropped by the transport as malformed or with a wrong checksum.
    pub datagrams_dropped: u64,
    /// Datagrams lost on purpose on their way out (`loss`).
    pub datagrams_lost: u64,
    /// Datagrams to and from peers cut off on purpose (`partition`).
    pub datagrams_blocked: u64,
    /// Packets that the transport has sent again.
    pub packets_repeated: u64,
    /// Lives evicted (root).
    pub evicted: u64,
    /// Processes of servers that were not let in for their storage (root).
    pub joins_rejected: u64,
    /// Longest time between two steps of m, in milliseconds (root).
    pub minimum_lag_max_ms: u64,
}

/// Percentiles of the time from submission to execution, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LatencyUs {
    /// Half of all operations are faster.
    pub p50: u64,
    /// 99 of 100.
    pub p99: u64,
    /// 999 of 1000.
    pub p999: u64,
}

/// A node's status.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// Number of the node.
    pub id: u32,
    /// Its role in lower case.
    pub role: String,
    /// Its life; 0 before it has joined.
    pub incarnation: u64,
    /// Its epoch.
    pub epoch: u64,
    /// The global minimum as it knows it.
    pub minimum: u64,
    /// The root's term as it knows it.
    pub term: u64,
    /// `JOINING`, `RECONNECT`, `COMPLETE`, at the root also stages of evictions; `FULL` when new
    /// work is refused, at the root when nothing new can become durable.
    pub stage: String,
    /// Shards of a persistent server; 0 for other roles.
    pub shards: u32,
    /// Connections whose packets go through shared memory.
    pub host_connections: u64,
    /// Connections whose packets go by UDP.
    pub udp_connections: u64,
    /// What it waits for, in words.
    pub blocked_by: Option<String>,
    /// Root only: who holds the minimum where it is.
    pub held_by: Option<HoldStatus>,
    /// Root only: every member.
    pub members: Vec<MemberStatus>,
    /// Counts.
    pub counters: NodeCounters,
    /// Client only.
    pub latency: LatencyUs,
}
