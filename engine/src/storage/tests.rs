//! Bulk data on its way to its file.

use std::time::{Duration, Instant};

use super::*;

fn open(dir: &Path) -> ShardStorage {
    ShardStorage::open(dir, false, || {}).unwrap().0
}

#[test]
fn bulk_data_is_read_at_once_and_written_before_its_record_is_durable() {
    let dir = tempfile::tempdir().unwrap();
    let mut storage = open(dir.path());
    for round in 1..=20u64 {
        let values: Vec<Bytes> = (1..=3)
            .map(|i| Bytes::from(vec![round as u8 + i; usize::from(i) * 70_001]))
            .collect();
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
        let lsn = storage.append(record.kind(), Epoch(round), &record.body());
        storage.finish_batch(Vec::new, None, || 0);
        let start = Instant::now();
        while storage.durable() < lsn {
            assert_eq!(storage.failure(), None);
            assert!(start.elapsed() < Duration::from_secs(60));
            std::thread::yield_now();
        }
        assert!(storage.unwritten.map().is_empty(), "it is in the file");
        assert_eq!(fetch(&mut storage), values);
    }
    assert_eq!(storage.failure(), None);
    storage.close();
}

#[test]
fn closing_writes_what_is_still_to_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let mut storage = open(dir.path());
    let value = Bytes::from(vec![9; 1 << 20]);
    let extents: Vec<Extent> = (0..8).map(|_| storage.place(&value)).collect();
    let file = storage.extents.clone();
    storage.close();
    for extent in extents {
        assert_eq!(file.read_verify(extent_ref(&extent)).unwrap(), *value);
    }
}
