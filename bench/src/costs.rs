//! What a run of the small files costs beside time: memory of each process, and messages.
//!
//! The yardsticks here are limits, not programs: the memory a process may have, and the bytes that
//! have to travel at least.

use serde_json::{Map, Value};

use crate::row::{Better, Pick, Rounds, Row};
use crate::{Bench, Failure, small, tree};

/// Most memory of one process, MiB.
const MEMORY_MIB: f64 = 256.0;
/// The same with very many entries in one directory.
const MEMORY_FLAT_MIB: f64 = 512.0;
/// Entries of that directory for each file of the tree of small files: a million in all.
const FLAT_PER_FILE: u64 = 20;
/// Bytes that tag every message: the sender's epoch, its minimum, and the root's term.
const TAG_BYTES: f64 = 20.0;
/// How long the paused client holds the minimum.
const PAUSE: &str = "pause:client0@40%:30000";
/// Silence after which it would be evicted, milliseconds: twice as long.
const EVICT_AFTER: &str = "60000";
/// The least time for which the minimum has to stand still then, milliseconds.
const HELD_MS_MIN: u64 = 25_000;
/// Ways that a file's bytes have to go: to the proxy, and from there to the server.
const HOPS: f64 = 2.0;

/// Memory of every process, also while a paused client holds the minimum; and messages.
///
/// # Errors
/// A run fails, or the paused client did not hold the minimum.
pub fn costs(bench: &Bench) -> Result<Vec<Row>, Failure> {
    let (input, bytes) = small::input(bench)?;
    let shape = ["--proxy", bench.proxies.as_str()];
    let lowtide = &bench.lowtide;
    let quiet = lowtide.store_and_export(&input, &bench.scratch, &shape)?;
    let pause = ["--fault", PAUSE, "--evict-after", EVICT_AFTER];
    let options = [&shape[..], &pause].concat();
    let paused = lowtide.store(&input, &bench.scratch, &options)?;
    let (held_ms, evicted) = held(&paused)?;
    let rows = vec![
        memory(bench, "memory", &quiet, MEMORY_MIB),
        memory(bench, "memory-paused", &paused, MEMORY_MIB)
            .with("max_lag_ms", held_ms)
            .with("evicted", evicted),
        messages(bench, &quiet, bytes),
    ];
    let finish = |row: Row| {
        row.reduced(bench.files < tree::FILES)
            .with("files", bench.files)
            .with("proxies", bench.proxies.as_str())
    };
    Ok(rows.into_iter().map(finish).collect())
}

/// How long the minimum stood still in the run with the paused client, in milliseconds, and how many
/// lives were evicted.
///
/// # Errors
/// It did not stand still, or somebody was evicted: then nothing was held.
fn held(report: &Value) -> Result<(u64, u64), Failure> {
    let held_ms = report["minimum"]["max_lag_ms"].as_u64();
    let evicted = report["nodes"]["root"]["counters_of_all_lives"]["evicted"].as_u64();
    match (held_ms, evicted) {
        (Some(held_ms), Some(0)) if held_ms >= HELD_MS_MIN => Ok((held_ms, 0)),
        told => Err(Failure::Broken(format!(
            "the paused client did not hold the minimum: {told:?} ms and evictions"
        ))),
    }
}

/// Memory of every process with a million entries in one directory.
///
/// # Errors
/// A run fails.
pub fn flat(bench: &Bench) -> Result<Vec<Row>, Failure> {
    let input = bench.scratch.join("flat");
    let entries = bench.files * FLAT_PER_FILE;
    tree::make_flat(&input, entries).map_err(Failure::io(input.display()))?;
    let options = ["--proxy", bench.proxies.as_str()];
    let lowtide = &bench.lowtide;
    let report = lowtide.store_and_export(&input, &bench.scratch, &options)?;
    let row = memory(bench, "memory-million", &report, MEMORY_FLAT_MIB)
        .reduced(bench.files < tree::FILES)
        .with("entries", entries)
        .with("elapsed_s", report["elapsed_s"].clone())
        .with("proxies", bench.proxies.as_str());
    Ok(vec![row])
}

fn memory(bench: &Bench, name: &str, report: &Value, limit_mib: f64) -> Row {
    let mib = |v: &Value| v.as_f64().unwrap_or(f64::NAN) / f64::from(1 << 20);
    let mut own = Map::new();
    let mut mapped = Map::new();
    let mut most = 0.0f64;
    for (node, memory) in report["memory"].as_object().into_iter().flatten() {
        let sum = mib(&memory["rss_anon"]) + mib(&memory["rss_shmem"]);
        most = most.max(sum);
        own.insert(node.clone(), round(sum));
        mapped.insert(node.clone(), round(mib(&memory["rss_file"])));
    }
    let figures = Rounds {
        unit: "MiB",
        better: Better::Lower,
        yardstick_is: "the limit for RssAnon + RssShmem of one process; ours is the largest one",
        ours: vec![most],
        yardstick: vec![limit_mib],
    };
    figures
        .row(name, Pick::Median, &bench.machine)
        .aim(1.0)
        .with("anon_and_shmem_mib", own)
        .with("mapped_files_mib", mapped)
}

fn round(x: f64) -> Value {
    ((x * 10.0).round() / 10.0).into()
}

/// Bytes of messages for each byte stored, by whom, and how many messages carry nothing but life
/// signs. There is no kind of message for the minimum: it travels in every header.
fn messages(bench: &Bench, report: &Value, bytes: u64) -> Row {
    let count =
        |node: &Value, key: &str| node["counters_of_all_lives"][key].as_f64().unwrap_or(0.0);
    let nodes = report["nodes"].as_object();
    let total = |key: &str| -> f64 {
        nodes
            .into_iter()
            .flatten()
            .map(|(_, node)| count(node, key))
            .sum()
    };
    let mut mean = Map::new();
    for (name, node) in nodes.into_iter().flatten() {
        let of_one = count(node, "message_bytes_sent") / count(node, "messages_sent").max(1.0);
        mean.insert(name.clone(), round(of_one));
    }
    let (messages, pings) = (total("messages_sent"), total("pings_sent"));
    let sent = total("message_bytes_sent");
    let copies = |key: &str| (total(key) / sent * 1e3).round() / 1e3;
    let operations = report["operations"].as_f64().unwrap_or(0.0).max(1.0);
    let figures = Rounds {
        unit: "B/B",
        better: Better::Lower,
        yardstick_is: "every byte of the files once to a proxy and once to a server; ours also \
                       has what reading back sends",
        ours: vec![sent / bytes.max(1) as f64],
        yardstick: vec![HOPS],
    };
    figures
        .row("message-bytes", Pick::Median, &bench.machine)
        .with("messages", messages)
        .with("messages_per_operation", round(messages / operations))
        .with("bytes_per_message", round(sent / messages.max(1.0)))
        .with("bytes_per_message_by_node", mean)
        .with("tag_bytes_per_message", TAG_BYTES)
        .with(
            "tag_bytes_percent",
            round(100.0 * TAG_BYTES * messages / sent),
        )
        .with("copies_by_sender", copies("sent_bytes_copied"))
        .with("copies_by_receiver", copies("received_bytes_copied"))
        .with("pings", pings)
        .with("pings_percent", round(100.0 * pings / messages.max(1.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minimum_that_was_not_held_is_no_result() {
        let report = |lag: Option<u64>, evicted: u64| {
            serde_json::json!({
                "minimum": { "max_lag_ms": lag },
                "nodes": { "root": { "counters_of_all_lives": { "evicted": evicted } } },
            })
        };
        assert_eq!(held(&report(Some(29_950), 0)).unwrap(), (29_950, 0));
        assert!(held(&report(Some(24_999), 0)).is_err());
        assert!(held(&report(Some(29_950), 1)).is_err());
        assert!(held(&report(None, 0)).is_err());
    }
}
