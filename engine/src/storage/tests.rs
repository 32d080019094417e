//! Bulk data on its way to its file.

use std::time::{Duration, Instant};

use lowtide_engine_core::destination::shard::Shard;
use lowtide_engine_core::destination::{Destination, DestinationConfig};
use lowtide_engine_core::ids::{Epoch, NodeId};
use lowtide_engine_core::member::Intervals;
use lowtide_engine_core::op::Bytes;
use lowtide_engine_core::record::{Objects, Record, Storage, Value, encode_record};
use lowtide_engine_core::room::HomeRule;

use super::*;

fn mind() -> DestinationConfig {
    DestinationConfig {
        root: NodeId(1),
        parent: NodeId(1),
        pings: Intervals { ping: 1, rest: 1 },
        nonce: 1,
        carry_bytes: 0,
        room: HomeRule::default(),
    }
}

fn open(dir: &Path) -> (NodeStorage, ShardStorage, Shard) {
    let (node, mut storages, image) =
        NodeStorage::open(dir, &StorageConfig::new(1), false, || {}).unwrap();
    let (_, mut shards) = Destination::new(NodeId(2), mind(), image);
    (node, storages.remove(0), shards.remove(0))
}

#[test]
fn bulk_data_is_read_at_once_and_written_before_its_record_is_durable() {
    let dir = tempfile::tempdir().unwrap();
    let (mut node, mut storage, shard) = open(dir.path());
    for round in 1..=20u64 {
        let values: Vec<Bytes> = (1..=3)
            .map(|i| Bytes::from(vec![round as u8 + i; usize::from(i) * 70_001]))
            .collect();
        let pin = node.pin(Step(round));
        storage.begin(pin.group());
        let extents: Vec<Extent> = values.iter().map(|value| storage.place(value)).collect();
        let fetch = |storage: &mut ShardStorage| -> Vec<Bytes> {
            let fetched = extents.iter().map(|e| storage.fetch(&Value::Extent(*e)));
            fetched.map(Option::unwrap).collect()
        };
        assert_eq!(fetch(&mut storage), values);
        let record = Record::Marks {
            minimum: Epoch(round),
            ceiling: Epoch(round + 1),
        };
        let body = encode_record(Step(round), &record);
        storage.append(record.kind(), Epoch(round), &body);
        storage.finish(pin, &shard);
        let start = Instant::now();
        while node.durable() < Step(round) {
            assert_eq!(node.failure(), None);
            assert!(start.elapsed() < Duration::from_secs(60));
            std::thread::yield_now();
        }
        assert!(node.common.unwritten.map().is_empty(), "it is in the file");
        assert_eq!(fetch(&mut storage), values);
    }
    assert_eq!(node.failure(), None);
    drop(storage);
    node.close();
}

#[test]
fn closing_writes_what_is_still_to_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let (node, mut storage, _) = open(dir.path());
    let value = Bytes::from(vec![9; 1 << 20]);
    let extents: Vec<Extent> = (0..8).map(|_| storage.place(&value)).collect();
    let file = node.common.extents.clone();
    drop(storage);
    node.close();
    for extent in extents {
        assert_eq!(file.read_verify(extent_ref(&extent)).unwrap()[..], *value);
    }
}

#[test]
fn files_that_are_lost_are_missed() {
    let dir = tempfile::tempdir().unwrap();
    let config = StorageConfig {
        segment_bytes: 1 << 20,
        record_bytes_max: 64 << 10,
        ..StorageConfig::new(2)
    };
    let open = |dir: &Path| NodeStorage::open(dir, &config, false, || {});
    let (mut node, mut storages, image) = open(dir.path()).unwrap();
    let (_, shards) = Destination::new(NodeId(2), mind(), image);
    // A step of the first shard only: of the second there is nothing but its `OPEN`.
    let pin = node.pin(Step(1));
    let record = Record::Marks {
        minimum: Epoch(1),
        ceiling: Epoch(2),
    };
    storages[0].begin(pin.group());
    let body = encode_record(Step(1), &record);
    storages[0].append(record.kind(), Epoch(1), &body);
    storages[0].finish(pin, &shards[0]);
    let start = Instant::now();
    while node.durable() < Step(1) {
        assert!(start.elapsed() < Duration::from_secs(60));
        std::thread::yield_now();
    }
    drop(storages);
    node.close();
    for (lost, named) in [
        ("node.meta", "node.meta is missing beside"),
        ("shard-000-", "log shard-000: no segment file is left"),
        ("shard-001-", "log shard-001: no segment file is left"),
    ] {
        let copy = tempfile::tempdir().unwrap();
        let mut taken = 0;
        for entry in std::fs::read_dir(dir.path()).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            match name.starts_with(lost) {
                true => taken += 1,
                false => drop(std::fs::copy(entry.path(), copy.path().join(name)).unwrap()),
            }
        }
        assert!(taken > 0, "{lost}");
        for _ in 0..2 {
            let error = open(copy.path()).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(named), "without {lost}: {error}");
        }
    }
    drop(open(dir.path()).unwrap());
}
