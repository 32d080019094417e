//! Vectors from published captures, and the algebra.

use super::*;
use std::vec;
use std::vec::Vec;

/// A CNP captured on a ConnectX-4 Lx (scapy's test suite): identification 0x718c, DF, source port
/// 0, sixteen reserved bytes.
fn hardware_cnp() -> (Flow, Vec<u8>) {
    let mut bytes = vec![0x81, 0x00, 0xff, 0xff, 0x40, 0x00, 0x01, 0x18];
    bytes.extend_from_slice(&[0; 4 + 16]);
    bytes.extend_from_slice(&[0x82, 0xfd, 0x00, 0x2a]);
    let flow = Flow::v4(Ipv4Addr::new(10, 0, 17, 1), Ipv4Addr::new(10, 0, 18, 1), 0)
        .with_identification(0x718c);
    (flow, bytes)
}

fn uc_send() -> Vec<u8> {
    let mut bytes = vec![0x24, 0x60, 0xff, 0xff, 0x00, 0x00, 0x00, 211, 0x00];
    bytes.extend_from_slice(&13_571_856u32.to_be_bytes()[1..]);
    bytes.extend_from_slice(&[
        0x46, 0x30, 0x81, 0x8b, 0xe2, 0x89, 0x35, 0xd9, 0x0e, 0x9a, 0x95, 0x50, 0x54, 0x01, 0xbe,
        0x88, 0x5e, 0x50, 0x00, 0x00,
    ]);
    bytes
}

#[test]
fn hardware_vector_matches_and_its_identification_is_found() {
    let (flow, bytes) = hardware_cnp();
    let packet = Packet::new_checked(&bytes).unwrap();
    assert!(check(&flow, &packet));
    assert!(!check(&flow.with_identification(0), &packet));
    assert_eq!(
        check_unknown_identification(&flow.with_identification(0), &packet),
        Some(0x718c)
    );
}

#[test]
fn published_vectors_match_in_both_families() {
    let mut v4 = uc_send();
    v4.extend_from_slice(&[0x78, 0xf3, 0x53, 0xf3]);
    let flow = Flow::v4(
        Ipv4Addr::new(192, 168, 0, 7),
        Ipv4Addr::new(192, 168, 0, 7),
        49152,
    )
    .with_identification(1144);
    let packet = Packet::new_checked(&v4).unwrap();
    assert_eq!(packet.payload().len(), 18);
    assert!(check(&flow, &packet));
    assert_eq!(
        check_unknown_identification(&flow.with_identification(0), &packet),
        Some(1144)
    );

    let mut v6 = uc_send();
    v6.extend_from_slice(&[0x3e, 0x5b, 0x74, 0x3b]);
    let (source, target) = ("2022::1023".parse().unwrap(), "2023::1024".parse().unwrap());
    let flow = Flow::v6(source, target, 49152);
    let packet = Packet::new_checked(&v6).unwrap();
    assert!(check(&flow, &packet));
    assert_eq!(check_unknown_identification(&flow, &packet), Some(0));
}

#[test]
fn gathered_slices_give_the_same_icrc_as_the_whole() {
    let bytes = uc_send();
    let flow = Flow::v4(
        Ipv4Addr::new(192, 168, 0, 7),
        Ipv4Addr::new(192, 168, 0, 7),
        49152,
    )
    .with_identification(1144);
    for cut in 12..=30 {
        let mut icrc = Icrc::begin(&flow, &bytes[..12], bytes.len() + ICRC_LEN);
        icrc.update(&bytes[12..cut]);
        icrc.update(&bytes[cut..30]);
        let (tail, len) = icrc.finish(2);
        assert_eq!(tail[..len], [0, 0, 0x78, 0xf3, 0x53, 0xf3]);
    }
}

#[test]
fn the_identification_is_found_for_every_length_and_value() {
    let flow = Flow::v4(
        Ipv4Addr::new(127, 0, 0, 1),
        Ipv4Addr::new(127, 0, 0, 2),
        4791,
    );
    let mut solved = 0;
    for words in 0..=1024usize {
        let payload = words * 4;
        let mut bytes = vec![0x5a; 12 + payload + ICRC_LEN];
        bytes[..12].copy_from_slice(&[0x04, 0, 0xff, 0xff, 0, 0, 0, 17, 0x80, 0, 0, 1]);
        for identification in [0u16, 1, 0x8000, 0x00ff, 0xfffe, (words * 61) as u16] {
            let flow = flow.with_identification(identification);
            let crc = {
                let packet = Packet::new_checked(&bytes).unwrap();
                expected(&flow, &packet)
            };
            let end = bytes.len() - ICRC_LEN;
            bytes[end..].copy_from_slice(&crc.to_le_bytes());
            let packet = Packet::new_checked(&bytes).unwrap();
            for guess in [0, identification, 63, 0x1234] {
                let flow = flow.with_identification(guess);
                assert_eq!(
                    check_unknown_identification(&flow, &packet),
                    Some(identification)
                );
                solved += 1;
            }
        }
    }
    assert_eq!(solved, 1025 * 6 * 4);
}

#[test]
fn a_random_icrc_is_explained_by_some_identification_once_in_65536() {
    let (flow, mut bytes) = hardware_cnp();
    let at = bytes.len() - ICRC_LEN;
    let mut state = 1u32;
    let mut accepted = 0;
    for _ in 0..1_000_000 {
        // A full-period generator over 32 bits.
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bytes[at..].copy_from_slice(&state.to_le_bytes());
        let packet = Packet::new_checked(&bytes).unwrap();
        accepted += u32::from(
            check_unknown_identification(&flow.with_identification(0), &packet).is_some(),
        );
    }
    // Expected 15.3 of a million.
    assert!((1..=40).contains(&accepted), "{accepted}");
}
