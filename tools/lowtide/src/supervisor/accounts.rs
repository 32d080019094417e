//! Figures of a run: what is taken from the nodes' reports at its end.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use super::nodes::{Node, Nodes};
use crate::config::Role;
use crate::engine::Carrier;
use crate::report::{
    LatencyReport, MinimumReport, Report, UndoReport, WindowReport, cpu_of_process,
};

/// Longest time the minimum stood still while operations waited for it.
#[derive(Debug, Default)]
pub struct Standstill {
    value: u64,
    since: Option<Instant>,
    longest: Duration,
}

impl Standstill {
    /// Whether it stands still now, and has for longer than `time`.
    #[must_use]
    pub fn is_longer_than(&self, time: Duration) -> bool {
        self.since.is_some_and(|since| since.elapsed() > time)
    }

    /// Since when it stands still, if it does and somebody waits for it.
    #[must_use]
    pub fn standing_since(&self) -> Option<Instant> {
        self.since
    }

    /// Takes in what the root reports and how many operations wait.
    pub fn observe(&mut self, minimum: u64, in_flight: u64, now: Instant) {
        if minimum != self.value || in_flight == 0 {
            self.value = minimum;
            self.since = None;
            return;
        }
        let since = *self.since.get_or_insert(now);
        self.longest = self.longest.max(now - since);
    }
}

/// Completes a report whose work is done and whose `elapsed_s` is known.
pub fn close(report: &mut Report, nodes: &Nodes, minimum: &Standstill) {
    let totals = nodes.totals();
    report.operations = totals.operations;
    report.ops_per_s = totals.operations as f64 / report.elapsed_s.max(1e-9);
    report.minimum = MinimumReport {
        final_lag: match totals.in_flight {
            0 => 0,
            _ => nodes.epoch().saturating_sub(nodes.root().minimum),
        },
        // The root's own measure is finer but ends with its life.
        max_lag_ms: (minimum.longest.as_millis() as u64).max(totals.minimum_lag_max_ms),
    };
    report.windows = WindowReport {
        sent: totals.windows_sent,
        discarded: totals.windows_discarded,
        held_max: totals.windows_held_max,
    };
    report.undo = UndoReport {
        appended: totals.undo_appended,
        purged: totals.undo_purged,
        rolled_back: totals.undo_rolled_back,
    };
    // Percentiles cannot be added up; the slowest client's are an upper bound.
    for (_, client) in nodes.of_role(Role::Client) {
        let latency = client.last().status.latency;
        report.latency_us = LatencyReport {
            p50: report.latency_us.p50.max(latency.p50),
            p99: report.latency_us.p99.max(latency.p99),
            p999: report.latency_us.p999.max(latency.p999),
        };
    }
    for (_, node) in nodes.iter() {
        let name = node.member.name.clone();
        report.memory.insert(name.clone(), node.memory());
        report.nodes.insert(name, describe(node));
    }
    if report.minimum.final_lag > 0 {
        report.problems.push(format!(
            "{} operations are not stable although all work is done",
            totals.in_flight
        ));
    }
}

/// The transport that carried the messages; of `host`, how many connections went which way.
pub fn provider(carrier: &Carrier, nodes: &Nodes) -> String {
    match carrier {
        Carrier::Softroce => return "softroce".to_owned(),
        Carrier::Verbs(chosen) => return format!("verbs ({})", chosen.device.name),
        Carrier::Host => {}
    }
    let (mut rings, mut udp) = (0, 0);
    for (_, node) in nodes.iter() {
        let status = &node.last().status;
        rings += status.host_connections;
        udp += status.udp_connections;
    }
    // Each is known to both of its ends.
    let [rings, udp] = [rings, udp].map(|ends| ends.div_ceil(2));
    format!("host ({rings} connections through shared memory, {udp} by UDP)")
}

/// Processor time of each node's process so far, in seconds.
pub fn cpu(nodes: &Nodes) -> BTreeMap<String, f64> {
    let of_node = |node: &Node| cpu_of_process(node.pid()?);
    nodes
        .iter()
        .filter_map(|(_, node)| Some((node.member.name.clone(), of_node(node)?)))
        .collect()
}

/// Leaves every node's last status in the state directory, for whoever wants to know why.
///
/// # Errors
/// In words, if it cannot be written.
pub fn leave_status(state: &Path, nodes: &Nodes) -> Result<(), String> {
    let nodes: serde_json::Map<String, serde_json::Value> = nodes
        .iter()
        .map(|(_, node)| (node.member.name.clone(), describe(node)))
        .collect();
    let path = state.join("status.json");
    std::fs::write(&path, format!("{:#}\n", serde_json::json!(nodes)))
        .map_err(|error| format!("{}: {error}", path.display()))
}

/// A node's last words.
fn describe(node: &Node) -> serde_json::Value {
    serde_json::json!({
        "lives": node.life,
        "status": node.last().status,
        "counters_of_all_lives": node.counters(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_minimum_stands_still_only_while_somebody_waits() {
        let t = Instant::now();
        let ms = |n| t + Duration::from_millis(n);
        let mut minimum = Standstill::default();
        minimum.observe(5, 1, ms(0));
        minimum.observe(5, 1, ms(10));
        minimum.observe(5, 1, ms(40));
        minimum.observe(5, 0, ms(500));
        minimum.observe(6, 1, ms(1000));
        minimum.observe(6, 1, ms(1010));
        assert_eq!(minimum.longest, Duration::from_millis(30));
    }
}
