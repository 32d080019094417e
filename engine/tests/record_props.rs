//! Records: decoding inverts encoding, and no damage passes.

mod common;

use common::{TINY_SEGMENT, tiny};
use lowtide_engine::log::record::{BadHeader, ClaimBody, OpenBody, SegmentHeader};
use lowtide_engine::log::{Append, Log, LogIdentity, Lsn, RecordHeader};
use lowtide_engine::medium::recording::{PageFate, RecordingVolume};
use proptest::prelude::*;
use std::sync::Arc;

prop_compose! {
    fn header()(
        (lsn, epoch, group, durable) in any::<(u64, u64, u64, u64)>(),
        (generation, body_len, body_crc) in any::<(u32, u32, u32)>(),
        (kind, flags, tag) in any::<(u8, u8, u64)>(),
    ) -> RecordHeader {
        let (lsn, durable) = (Lsn(lsn), Lsn(durable));
        RecordHeader { lsn, epoch, group, durable, generation, body_len, body_crc, kind, flags, tag }
    }
}

proptest! {
    // Failing cases are shrunk and printed; none are kept in files.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn headers_survive_the_round_trip(header in header()) {
        prop_assert_eq!(RecordHeader::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn no_changed_bit_of_a_header_passes(header in header(), bit in 0usize..512) {
        let mut bytes = header.encode();
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(RecordHeader::decode(&bytes).is_err());
    }

    #[test]
    fn arbitrary_bytes_are_no_header(bytes in any::<[u8; 32]>()) {
        let mut slot = [0u8; 64];
        slot[..32].copy_from_slice(&bytes);
        prop_assert!(RecordHeader::decode(&slot).is_err());
        slot[..4].copy_from_slice(b"LTRC");
        prop_assert_eq!(RecordHeader::decode(&slot), Err(BadHeader::Damaged));
    }

    #[test]
    fn segment_headers_survive_the_round_trip(
        (storage, number, seq, segment_bytes) in any::<(u128, u32, u64, u64)>(),
        bit in 0usize..512,
    ) {
        let header =
            SegmentHeader { identity: LogIdentity { storage, number }, seq, segment_bytes };
        let mut bytes = header.encode();
        prop_assert_eq!(SegmentHeader::decode(&bytes), Ok(header));
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(SegmentHeader::decode(&bytes).is_err());
    }

    #[test]
    fn own_bodies_survive_the_round_trip(
        durable_group in 0u64..u64::MAX,
        more in 1u64..1000,
        ends in proptest::collection::vec(any::<u64>(), 0..20),
        noise in proptest::collection::vec(any::<u8>(), 0..40),
    ) {
        let open = OpenBody { durable_group, next_group: durable_group.saturating_add(more) };
        prop_assert_eq!(OpenBody::decode(&open.encode()), Some(open));
        let ends: Vec<Lsn> = ends.into_iter().map(Lsn).collect();
        let mut bytes = Vec::new();
        ClaimBody::encode_into(durable_group, &ends, &mut bytes);
        prop_assert_eq!(ClaimBody::decode(&bytes), Some(ClaimBody { durable_group, ends }));
        // Never a panic on noise.
        let _ = OpenBody::decode(&noise);
        let _ = ClaimBody::decode(&noise);
    }

    /// Whole logs: what is appended in any pieces is read back; one damaged byte anywhere in the
    /// newest record ends the log before it.
    #[test]
    fn logs_return_what_was_appended(
        bodies in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..600), 1..60),
        cut in any::<prop::sample::Index>(),
        damage in any::<prop::sample::Index>(),
        flip in 1u8..,
    ) {
        let volume = RecordingVolume::new();
        let (mut log, _) = Log::open(Arc::new(volume.clone()), tiny("log", 1)).unwrap();
        for (i, body) in bodies.iter().enumerate() {
            let (a, b) = body.split_at(cut.index(body.len() + 1));
            let (epoch, group) = (i as u64, 3);
            log.append(Append { kind: 9, flags: 7, epoch, group, parts: &[a, b, &[]] }).unwrap();
            log.sync_handle().prepare().unwrap();
        }
        let found: Vec<_> = log.iter(Lsn(0)).map(|r| r.unwrap()).collect();
        prop_assert_eq!(found.len(), bodies.len());
        for (record, body) in found.iter().zip(&bodies) {
            prop_assert_eq!(&record.body, body);
            prop_assert_eq!((record.header.kind, record.header.flags), (9, 7));
            prop_assert_eq!(&log.read(record.header.lsn).unwrap(), record);
        }
        let last = found.last().unwrap().header;
        let image = volume.crash_image(&mut |_| PageFate::Complete);
        let offset = last.lsn.0 % TINY_SEGMENT + damage.index(64 + last.body_len as usize) as u64;
        let file = format!("log-{:05}.seg", last.lsn.0 / TINY_SEGMENT - 1);
        let medium = lowtide_engine::medium::Volume::open(
            &image, &file, lowtide_engine::medium::Access::Positioned).unwrap();
        let mut byte = [0u8];
        medium.read(offset, &mut byte).unwrap();
        prop_assert!(image.corrupt(&file, offset, &[byte[0] ^ flip]));
        let (log, report) = Log::open(Arc::new(image), tiny("log", 1)).unwrap();
        prop_assert_eq!(log.iter(Lsn(0)).count(), bodies.len() - 1);
        prop_assert_eq!(report.end, last.lsn);
    }
}
