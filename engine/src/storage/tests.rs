//! Bulk data on its way to its file.

use std::time::{Duration, Instant};

use lowtide_engine_core::destination::shard::Shard;
use lowtide_engine_core::destination::{Destination, DestinationConfig};
use lowtide_engine_core::ids::{Epoch, NodeId};
use lowtide_engine_core::op::Bytes;
use lowtide_engine_core::record::{Objects, Record, Storage, Value, encode_record};
use lowtide_engine_core::room::HomeRule;

use super::*;

fn open(dir: &Path) -> (NodeStorage, ShardStorage, Shard) {
    let (node, mut storages, image) =
        NodeStorage::open(dir, &StorageConfig::new(1), false, || {}).unwrap();
    let config = DestinationConfig {
        root: NodeId(1),
        parent: NodeId(1),
        ping_interval: 1,
        nonce: 1,
        carry_bytes: 0,
        room: HomeRule::default(),
    };
    let (_, mut shards) = Destination::new(NodeId(2), config, image);
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
        assert_eq!(file.read_verify(extent_ref(&extent)).unwrap(), *value);
    }
}
