//! Records read back: one by one from any thread, or all in order by the thread that has the log.
//!
//! Deliberately absent: what a bad record means (`recover`); any cache.

use super::record::{KIND_RESERVED, KIND_SEAL, Lsn};
use super::segment::{SEGMENT_START, Shared};
use super::{Log, ReadError, Record, recover};
use std::sync::Arc;

/// Reads single records of a log that another thread may be appending to. For rare use: it takes
/// the lock of the segment table. Whoever reads knows that the record is there and not recycled.
#[derive(Debug, Clone)]
pub struct LogReader {
    pub(super) shared: Arc<Shared>,
    pub(super) tag: u64,
}

impl LogReader {
    /// Reads the record at `lsn` and verifies it.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub fn read(&self, lsn: Lsn) -> Result<Record, ReadError> {
        let segment_bytes = self.shared.config.segment_bytes;
        let segment = self.shared.live_segment(lsn.0 / segment_bytes);
        let segment = segment.ok_or(ReadError::Outside {
            lsn,
            first: Lsn(0),
            end: self.shared.durable(),
        })?;
        recover::read_record(
            &segment,
            lsn.0 % segment_bytes,
            &self.shared.config,
            self.tag,
        )
        .map_err(|e| e.at(lsn))
    }
}

/// Iterator over a log's records; see [`Log::iter`].
#[derive(Debug)]
pub struct Records<'a> {
    pub(super) log: &'a Log,
    pub(super) next: Lsn,
}

impl Iterator for Records<'_> {
    type Item = Result<Record, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.next < self.log.end() {
            let record = match self.log.read(self.next) {
                Ok(record) => record,
                Err(error) => {
                    // Nothing after a bad record can be trusted.
                    self.next = self.log.end();
                    return Some(Err(error));
                }
            };
            let segment_bytes = self.log.shared.config.segment_bytes;
            self.next = match record.header.kind {
                KIND_SEAL => Lsn((self.next.0 / segment_bytes + 1) * segment_bytes + SEGMENT_START),
                _ => Lsn(self.next.0 + record.header.total_len()),
            };
            let own = record.header.kind >= KIND_RESERVED;
            if !own && !self.log.is_void(record.header.group) {
                return Some(Ok(record));
            }
        }
        None
    }
}
