//! A key-value store that is read without its server's processor: the client READs a key's entry
//! from the server's memory, and believes it if its checksum is right. The server changes entries
//! all the time; what was caught half way is read again.
//!
//! `cargo run -p lowtide-transport --example lookup`

use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lowtide_transport::verbs::*;

const KEYS: u64 = 256;
/// Checksum, version, key, value: 4, 4, 8 and 240 bytes.
const ENTRY: usize = 256;

fn end(last: u8) -> Result<(ProtectionDomain, QueuePair, CompletionQueue), Box<dyn Error>> {
    let pid = std::process::id();
    let ip = [127, 64 + (pid >> 8 & 31) as u8, pid as u8, last];
    let device = Device::open((ip, 4791).into(), &DeviceOptions::default())?;
    let (domain, queue) = (device.protection_domain(), device.completion_queue(2));
    let qp = domain.queue_pair(&queue, &queue, 1, 1)?;
    qp.to_init(Access::ALL)?;
    Ok((domain, qp, queue))
}

fn checksum(entry: &[u8]) -> [u8; 4] {
    crc32fast::hash(&entry[4..]).to_le_bytes()
}

/// The value is the version's low byte, over and over.
fn store(table: &MemoryRegion, key: u64, version: u32) {
    let mut entry = [version as u8; ENTRY];
    entry[4..8].copy_from_slice(&version.to_le_bytes());
    entry[8..16].copy_from_slice(&key.to_le_bytes());
    let sum = checksum(&entry);
    entry[..4].copy_from_slice(&sum);
    table.write(key as usize * ENTRY, &entry);
}

fn main() -> Result<(), Box<dyn Error>> {
    let ((home, theirs, _), (domain, ours, queue)) = (end(1)?, end(2)?);
    theirs.connect(&ours.address())?;
    ours.connect(&theirs.address())?;
    let table = home.memory_region(KEYS as usize * ENTRY, Access::ALL)?;
    (0..KEYS).for_each(|key| store(&table, key, 0));
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let versions = (1..).take_while(|_| !is_over.load(Ordering::Relaxed));
            versions.for_each(|version| store(&table, u64::from(version) % 8, version));
        });
        let (start, mut found, mut again) = (Instant::now(), 0, 0);
        let mut slot = domain.slot(ENTRY).expect("room");
        while found < 2000 {
            let (key, place) = (found % 16, Buffer::Slot(slot, ENTRY as u32));
            let read = SendOp::Read(table.remote(key * ENTRY as u64));
            ours.post_send(0, read, place).expect("room");
            let done = queue.wait(Duration::from_secs(10)).expect("an answer");
            slot = done.slot.expect("it was posted");
            if slot[..4] == checksum(&slot) {
                assert_eq!(slot[8..16], key.to_le_bytes());
                assert!(slot[16..].iter().all(|byte| *byte == slot[4]));
                found += 1;
            } else {
                again += 1;
            }
        }
        is_over.store(true, Ordering::Relaxed);
        let each = start.elapsed() / found as u32;
        println!("{found} lookups, {each:?} each, {again} read again");
    });
    Ok(())
}
