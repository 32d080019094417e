//! What a run found, as JSON for programs and as a summary for people.
//!
//! The keys of [`Report`] that the design names as stable keep their names, places and units;
//! others may come and go.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// The result of one run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The tree read back equals the input and every invariant checked at the end holds.
    pub verified: bool,
    /// Entries stored: files, directories, symbolic links.
    pub entries: u64,
    /// Bytes of file contents stored.
    pub bytes: u64,
    /// Operations the clients had stamped.
    pub operations: u64,
    /// Differences between the input and what was read back.
    pub mismatches: u64,
    /// Operations of which some updates are in effect and others are not.
    pub partial_operations: u64,
    /// Transport that carried the messages.
    pub provider: String,
    /// From the first operation until everything was stable, in seconds.
    pub elapsed_s: f64,
    /// `operations / elapsed_s`.
    pub ops_per_s: f64,
    /// Each fault in the order of injection, those that nobody asked for included.
    pub faults: Vec<FaultReport>,
    /// What the faults `poweroff:` did to pages.
    #[serde(default)]
    pub power: PowerReport,
    /// The global minimum.
    pub minimum: MinimumReport,
    /// Windows sent to destinations.
    pub windows: WindowReport,
    /// Undo records at destinations.
    pub undo: UndoReport,
    /// Time from submission to execution of an operation, at the clients.
    pub latency_us: LatencyReport,
    /// Seed of everything random in the run.
    pub seed: u64,
    /// Entries of the input that could not be read.
    pub unreadable: u64,
    /// Input that could not be read, was skipped or changed meanwhile; each with its reason.
    pub input_notes: Vec<String>,
    /// What differed, or which invariant does not hold; the first hundred.
    pub problems: Vec<String>,
    /// Memory at its largest, per node, and of the `supervisor`: the process that starts them.
    pub memory: BTreeMap<String, MemoryReport>,
    /// Processor time, user and system, of each node's process from its start until everything was
    /// stable, in seconds. What a process that was killed had used is not in it.
    #[serde(default)]
    pub cpu_s: BTreeMap<String, f64>,
    /// Each node's own last status.
    pub nodes: BTreeMap<String, serde_json::Value>,
}

/// One fault and how the cluster took it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FaultReport {
    /// Its specification; `unplanned:NODE` for a process that somebody else killed.
    pub spec: String,
    /// From the injection until the root knew; `null` where there was nothing to know (a short
    /// pause evicts nobody).
    pub detected_ms: Option<u64>,
    /// From the injection until all members lived and recovery was complete; `null` if never.
    pub recovered_ms: Option<u64>,
    /// Operations not yet stable when the fault struck.
    pub in_flight: u64,
    /// Operations sent again to a destination that had lost them.
    pub replayed: u64,
    /// Operations that others completed for a dead node.
    pub completed: u64,
    /// Operations undone.
    pub undone: u64,
    /// Faults that were not yet recovered from when this one struck.
    #[serde(default)]
    pub during: Vec<String>,
    /// Nodes that dropped what came from and went to the other side of a partition.
    #[serde(default)]
    pub cut: Vec<String>,
    /// Longest time between injection and recovery for which the minimum stood still while
    /// operations waited for it.
    #[serde(default)]
    pub minimum_stood_ms: u64,
}

/// What became of pages that were not synced when the power failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerReport {
    /// As they were before.
    pub old: u64,
    /// As they were written.
    pub new: u64,
    /// Some sectors of both.
    pub torn: u64,
}

impl PowerReport {
    /// Adds another failure's pages.
    pub fn add(&mut self, other: PowerReport) {
        self.old += other.old;
        self.new += other.new;
        self.torn += other.torn;
    }
}

impl fmt::Display for PowerReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PowerReport { old, new, torn } = self;
        write!(f, "{old} unsynced pages old, {new} new, {torn} torn")
    }
}

/// How far the global minimum lagged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MinimumReport {
    /// Epochs between the minimum and the oldest unstable operation when all work was done.
    pub final_lag: u64,
    /// Longest time for which the minimum stood still while operations waited for it.
    pub max_lag_ms: u64,
}

/// Windows of all sources.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WindowReport {
    /// Sent to a destination.
    pub sent: u64,
    /// Discarded because the minimum passed them.
    pub discarded: u64,
    /// Most that one source held at once for one destination.
    pub held_max: u64,
}

/// Undo records of all destinations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct UndoReport {
    /// Written.
    pub appended: u64,
    /// Let go because the minimum passed them.
    pub purged: u64,
    /// Used to take an operation back.
    pub rolled_back: u64,
}

/// Percentiles in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LatencyReport {
    /// Half of all operations are faster.
    pub p50: u64,
    /// 99 of 100.
    pub p99: u64,
    /// 999 of 1000.
    pub p999: u64,
}

/// Resident memory of a process, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MemoryReport {
    /// Anonymous: heap and stacks.
    pub rss_anon: u64,
    /// Shared memory.
    pub rss_shmem: u64,
    /// Mapped files, which the kernel may drop at will.
    pub rss_file: u64,
}

/// User and system time of a process so far, in seconds; `None` when it is gone.
#[must_use]
pub fn cpu_of_process(pid: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let ticks = cpu_ticks(&stat)?;
    Some(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// The fields `utime` and `stime` of `/proc/PID/stat`, added up.
fn cpu_ticks(stat: &str) -> Option<u64> {
    // The second field, the program's name, may hold anything, also spaces and parentheses.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(next()? + next()?)
}

impl MemoryReport {
    /// The larger of both, field by field.
    #[must_use]
    pub fn max(self, other: MemoryReport) -> MemoryReport {
        MemoryReport {
            rss_anon: self.rss_anon.max(other.rss_anon),
            rss_shmem: self.rss_shmem.max(other.rss_shmem),
            rss_file: self.rss_file.max(other.rss_file),
        }
    }

    /// Reads `/proc/PID/status`; `None` when the process is gone.
    #[must_use]
    pub fn of_process(pid: u32) -> Option<MemoryReport> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        Some(MemoryReport::parse(&text))
    }

    fn parse(status: &str) -> MemoryReport {
        let field = |name: &str| {
            status
                .lines()
                .find_map(|line| {
                    line.strip_prefix(name)?
                        .strip_suffix("kB")?
                        .trim()
                        .parse()
                        .ok()
                })
                .map_or(0, |kib: u64| kib * 1024)
        };
        MemoryReport {
            rss_anon: field("RssAnon:"),
            rss_shmem: field("RssShmem:"),
            rss_file: field("RssFile:"),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "stored    {} entries, {} in {} operations, {:.1} s ({:.0} operations/s), provider {}",
            self.entries,
            Size(self.bytes),
            self.operations,
            self.elapsed_s,
            self.ops_per_s,
            self.provider,
        )?;
        writeln!(
            f,
            "latency   p50 {} us, p99 {} us, p99.9 {} us",
            self.latency_us.p50, self.latency_us.p99, self.latency_us.p999
        )?;
        for fault in &self.faults {
            writeln!(
                f,
                "fault     {}: detected {}, recovered {}; {} in flight, {} replayed, {} completed, {} undone",
                fault.spec,
                Millis(fault.detected_ms),
                Millis(fault.recovered_ms),
                fault.in_flight,
                fault.replayed,
                fault.completed,
                fault.undone,
            )?;
        }
        writeln!(
            f,
            "minimum   final lag {}, longest standstill {} ms",
            self.minimum.final_lag, self.minimum.max_lag_ms
        )?;
        writeln!(
            f,
            "windows   {} sent, {} discarded, at most {} held; undo {} appended, {} purged, {} rolled back",
            self.windows.sent,
            self.windows.discarded,
            self.windows.held_max,
            self.undo.appended,
            self.undo.purged,
            self.undo.rolled_back,
        )?;
        if let Some((name, memory)) = self
            .memory
            .iter()
            .max_by_key(|(_, memory)| memory.rss_anon + memory.rss_shmem)
        {
            writeln!(
                f,
                "memory    at most {} in one process ({name}), mapped files {}",
                Size(memory.rss_anon + memory.rss_shmem),
                Size(memory.rss_file),
            )?;
        }
        if !self.cpu_s.is_empty() {
            let total: f64 = self.cpu_s.values().sum();
            writeln!(
                f,
                "processor {total:.1} s in all nodes until all was stable"
            )?;
        }
        for note in &self.input_notes {
            writeln!(f, "input     {note}")?;
        }
        for problem in &self.problems {
            writeln!(f, "PROBLEM   {problem}")?;
        }
        write!(
            f,
            "{}: {} mismatches, {} partial operations",
            if self.verified {
                "verified"
            } else {
                "NOT VERIFIED"
            },
            self.mismatches,
            self.partial_operations,
        )
    }
}

/// Bytes for people.
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
        if self.0 < 1024 {
            return write!(f, "{} B", self.0);
        }
        let mut value = self.0 as f64 / 1024.0;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        write!(f, "{value:.1} {}", UNITS[unit])
    }
}

struct Millis(Option<u64>);

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(ms) => write!(f, "after {ms} ms"),
            None => f.write_str("-"),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// The stable keys with a value of their type, as programs rely on them.
    fn stable() -> Value {
        json!({
            "verified": true, "entries": 1, "bytes": 2, "operations": 3, "mismatches": 4,
            "partial_operations": 5, "provider": "softroce", "elapsed_s": 6.5, "ops_per_s": 0.5,
            "faults": [{"spec": "kill:meta1@40%", "detected_ms": 1, "recovered_ms": 2,
                "in_flight": 3, "replayed": 4, "completed": 5, "undone": 6}],
            "minimum": {"final_lag": 1, "max_lag_ms": 2},
            "windows": {"sent": 1, "discarded": 2, "held_max": 3},
            "undo": {"appended": 1, "purged": 2, "rolled_back": 3},
            "latency_us": {"p50": 1, "p99": 2, "p999": 3}
        })
    }

    fn assert_contains(actual: &Value, expected: &Value, path: &str) {
        match expected {
            Value::Object(fields) => {
                for (key, value) in fields {
                    assert!(actual.get(key).is_some(), "{path}.{key} is missing");
                    assert_contains(&actual[key], value, &format!("{path}.{key}"));
                }
            }
            Value::Array(items) => {
                for (i, item) in items.iter().enumerate() {
                    assert_contains(&actual[i], item, &format!("{path}[{i}]"));
                }
            }
            value => assert_eq!(actual, value, "{path}"),
        }
    }

    #[test]
    fn processor_time_is_found_behind_any_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 94 0 0 0 12 30 5 6 20 0 3 0 99";
        assert_eq!(cpu_ticks(stat), Some(42));
        assert_eq!(cpu_ticks("7 (a) S 1"), None);
    }

    #[test]
    fn the_stable_keys_are_there() {
        let mut full = stable();
        for (key, empty) in [
            ("seed", json!(7)),
            ("power", json!({"old": 0, "new": 0, "torn": 0})),
            ("unreadable", json!(0)),
            ("input_notes", json!([])),
            ("problems", json!([])),
            ("memory", json!({})),
            ("cpu_s", json!({})),
            ("nodes", json!({})),
        ] {
            full[key] = empty;
        }
        let report: Report = serde_json::from_value(full).unwrap();
        let printed = serde_json::to_value(&report).unwrap();
        assert_contains(&printed, &stable(), "report");
    }

    #[test]
    fn a_fault_without_recovery_keeps_its_keys() {
        let value = serde_json::to_value(FaultReport::default()).unwrap();
        assert_eq!(value["recovered_ms"], Value::Null);
        assert!(value.as_object().unwrap().contains_key("detected_ms"));
    }

    #[test]
    fn memory_is_read_from_proc() {
        let own = MemoryReport::of_process(std::process::id()).unwrap();
        assert!(own.rss_anon > 0);
        let text = "VmRSS:\t 9 kB\nRssAnon:\t    1024 kB\nRssFile:\t  12 kB\nRssShmem:\t 3 kB\n";
        assert_eq!(
            MemoryReport::parse(text),
            MemoryReport {
                rss_anon: 1 << 20,
                rss_shmem: 3 << 10,
                rss_file: 12 << 10
            }
        );
    }

    #[test]
    fn sizes_read_well() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.5 KiB"),
            (5 << 30, "5.0 GiB"),
            (u64::MAX, "16384.0 PiB"),
        ] {
            assert_eq!(Size(bytes).to_string(), text);
        }
    }
}
