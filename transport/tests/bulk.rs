//! Long messages over real sockets: lent, offered, fetched.

mod common;

use std::collections::HashMap;
use std::io::IoSlice;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{PATIENCE, Stream, config, connect, run_until};
use lowtide_transport::message::{
    BindError, CloseReason, ConnId, Endpoint, EndpointConfig, Event, Faults, Limits, Piece,
    SameHost, SendError,
};

const MIB: usize = 1 << 20;

/// A configuration whose pools hold so many bytes each, and one message of a MiB.
fn pools(node: u64, bytes: usize) -> EndpointConfig {
    let mut config = config(node);
    config.limits = Limits {
        message_max: MIB,
        lent_max: bytes,
        fetched_max: bytes,
        ..Limits::default()
    };
    config
}

fn pattern(number: usize, len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i ^ i >> 8).wrapping_mul(number | 1).wrapping_add(number) as u8)
        .collect()
}

fn is_within_pools(endpoint: &Endpoint, bytes: usize) {
    let counters = endpoint.counters();
    assert!(counters.lent_bytes_peak > 0 && counters.fetched_bytes_peak > 0);
    assert!(counters.lent_bytes_peak <= bytes as u64, "{counters:?}");
    assert!(counters.fetched_bytes_peak <= bytes as u64, "{counters:?}");
    assert_eq!((counters.rcvd_rnr_err, counters.violations), (0, 0));
}

/// Both sides send `count` messages of a MiB at once.
fn flood_both_ways(a: EndpointConfig, b: EndpointConfig, count: usize) -> [Endpoint; 2] {
    let mut ends = [Endpoint::bind(a).unwrap(), Endpoint::bind(b).unwrap()];
    let [a, b] = &mut ends;
    let conns = connect(a, b);
    let conns = [conns.0, conns.1];
    let messages = [pattern(1, MIB), pattern(2, MIB)];
    let (mut sent, mut received) = ([0; 2], [0; 2]);
    run_until(
        &mut [a, b],
        &mut received,
        |received, side, _, event| match event {
            Event::Message { bytes, .. } => {
                assert!(bytes == messages[1 - side]);
                received[side] += 1;
            }
            Event::Writable { .. } => {}
            other => panic!("{other:?}"),
        },
        |received, ends| {
            for (side, end) in ends.iter_mut().enumerate() {
                while sent[side] < count {
                    match end.send(conns[side], &[IoSlice::new(&messages[side])]) {
                        Ok(()) => sent[side] += 1,
                        Err(SendError::WouldBlock) => break,
                        Err(error) => panic!("{error}"),
                    }
                }
            }
            *received == [count; 2]
        },
    );
    ends
}

#[test]
fn full_pools_on_both_sides_do_not_wait_for_each_other() {
    for mib in [1, 3] {
        let ends = flood_both_ways(pools(1, mib * MIB), pools(2, mib * MIB), 40);
        for end in &ends {
            is_within_pools(end, mib * MIB);
            assert_eq!(end.counters().bulk_fetched, 40);
        }
    }
}

#[test]
fn on_one_host_long_messages_need_no_network() {
    let config = |node| {
        let mut config = pools(node, 3 * MIB);
        config.same_host = SameHost::Direct;
        config
    };
    let ends = flood_both_ways(config(1), config(2), 40);
    for end in &ends {
        is_within_pools(end, 3 * MIB);
        let counters = end.counters();
        assert_eq!((end.paths(), counters.bulk_fetched), ((1, 0), 40));
        assert!(counters.host_rx_packets > 10_000 && counters.host_lost_packets == 0);
    }
}

#[test]
fn a_bad_network_loses_no_long_message() {
    let config = |node| {
        let mut config = pools(node, 2 * MIB);
        config.faults = Faults {
            seed: node,
            loss_percent: 10.0,
            duplicate_percent: 2.0,
            reorder_percent: 5.0,
            corrupt_percent: 1.0,
        };
        config
    };
    let ends = flood_both_ways(config(1), config(2), 6);
    for end in &ends {
        is_within_pools(end, 2 * MIB);
        assert!(end.counters().retransmitted_pkts > 0);
    }
}

#[test]
fn the_default_receive_buffer_is_enough_for_reads_both_ways() {
    let config = |node| {
        let mut config = pools(node, 4 * MIB);
        config.socket.receive_buffer_bytes = 106_496; // the kernel doubles it to the default
        config
    };
    let ends = flood_both_ways(config(1), config(2), 12);
    for end in &ends {
        assert_eq!(end.counters().rx_overflow, 0, "{:?}", end.counters());
    }
}

#[test]
fn pieces_travel_uncopied_and_what_was_fetched_can_be_kept() {
    let mut a = Endpoint::bind(config(1)).unwrap();
    let mut b = Endpoint::bind(config(2)).unwrap();
    let (at_a, _) = connect(&mut a, &mut b);
    let value: Arc<[u8]> = pattern(3, 300_000).into();
    let mut pieces = vec![
        Piece::Owned(b"head".to_vec()),
        Piece::Shared(value.clone(), 1000..201_001),
        Piece::Owned(b"tail".to_vec()),
    ];
    let whole: Vec<u8> = pieces.iter().flat_map(|p| p.bytes().to_vec()).collect();
    a.send_pieces(at_a, &mut pieces).unwrap();
    assert!(pieces.is_empty(), "they are the endpoint's now");
    // Short pieces are packed like any message.
    a.send_pieces(at_a, &mut vec![Piece::Shared(value.clone(), 0..5)])
        .unwrap();
    a.send(at_a, &[IoSlice::new(&whole)]).unwrap();
    let mut kept: Vec<(Arc<[u8]>, usize)> = Vec::new();
    let mut shorts = 0;
    run_until(
        &mut [&mut a, &mut b],
        &mut kept,
        |kept, side, ctx, event| match event {
            Event::Message { bytes, .. } if bytes.len() == 5 => {
                assert!(side == 1 && kept.len() == 1 && bytes == &value[..5]);
                assert!(ctx.shared_message().is_none());
                shorts += 1;
            }
            Event::Message { bytes, .. } => {
                assert!(bytes == whole);
                let (slab, begin) = ctx.shared_message().unwrap();
                assert!(bytes.as_ptr().addr().is_multiple_of(4096));
                kept.push((slab.clone(), begin));
            }
            other => panic!("{other:?}"),
        },
        |kept, ends| kept.len() == 2 && ends.iter().all(|end| !end.is_sending(at_a)),
    );
    let holds = |(slab, begin): &(Arc<[u8]>, usize)| slab[*begin..].starts_with(&whole);
    assert!(kept.iter().all(holds));
    assert!(
        !Arc::ptr_eq(&kept[0].0, &kept[1].0),
        "a slab that is kept is not filled again"
    );
    assert_eq!(shorts, 1);
    let counters = a.counters();
    assert_eq!(
        (
            counters.bulk_offered,
            counters.bulk_copied_bytes,
            counters.sent_copied_bytes
        ),
        (2, whole.len() as u64, 5)
    );
    let counters = b.counters();
    assert_eq!(
        (
            counters.bulk_fetched,
            counters.bulk_placed_bytes,
            counters.held_copied_bytes
        ),
        (2, 2 * whole.len() as u64, 5)
    );
    assert_eq!(Arc::strong_count(&value), 1, "what was taken is let go");
}

#[test]
fn many_connections_share_small_pools() {
    const CONNECTIONS: usize = 16;
    let mut a = Endpoint::bind(pools(1, 2 * MIB)).unwrap();
    let mut b = Endpoint::bind(pools(2, 2 * MIB)).unwrap();
    for _ in 0..CONNECTIONS {
        a.connect(b.local_addr(), b"");
    }
    let mut streams: [HashMap<ConnId, Stream>; 2] = Default::default();
    run_until(
        &mut [&mut a, &mut b],
        &mut streams,
        |streams, side, _, event| match event {
            Event::Connected { conn, .. } => {
                streams[side].insert(conn, Stream::new(conn, 3 * MIB as u64));
            }
            Event::Message { conn, bytes } => {
                streams[side].get_mut(&conn).unwrap().receive(conn, bytes);
            }
            Event::Writable { .. } => {}
            other => panic!("{other:?}"),
        },
        |streams, endpoints| {
            for (side, endpoint) in endpoints.iter_mut().enumerate() {
                for stream in streams[side].values_mut() {
                    stream.send(endpoint);
                }
            }
            streams
                .iter()
                .all(|side| side.len() == CONNECTIONS && side.values().all(Stream::is_done))
        },
    );
    is_within_pools(&a, 2 * MIB);
    is_within_pools(&b, 2 * MIB);
}

/// Polls `endpoints` until a side hears a long message of `from`, which sends one when it can.
fn one_more(ends: &mut [&mut Endpoint], from: (usize, ConnId), message: &[u8]) {
    let mut is_sent = false;
    let mut is_heard = false;
    run_until(
        ends,
        &mut is_heard,
        |is_heard, side, _, event| match event {
            Event::Message { bytes, .. } => {
                assert!(side != from.0 && bytes == message);
                *is_heard = true;
            }
            Event::Writable { .. } | Event::Closed { .. } => {}
            other => panic!("{other:?}"),
        },
        |is_heard, ends| {
            if !is_sent {
                match ends[from.0].send(from.1, &[IoSlice::new(message)]) {
                    Ok(()) => is_sent = true,
                    Err(SendError::WouldBlock) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            *is_heard
        },
    );
}

#[test]
fn a_dead_peer_gives_its_room_back() {
    // `hub` has room for one long message each way.
    let mut hub = Endpoint::bind(pools(1, MIB)).unwrap();
    let mut dead = Endpoint::bind(pools(2, MIB)).unwrap();
    let mut other = Endpoint::bind(pools(3, MIB)).unwrap();
    let (to_dead, at_dead) = connect(&mut hub, &mut dead);
    let (to_other, at_other) = connect(&mut hub, &mut other);
    let message = pattern(5, MIB);

    // It dies with a loan of ours open, and with a fetch of ours begun.
    hub.send(to_dead, &[IoSlice::new(&message)]).unwrap();
    dead.send(at_dead, &[IoSlice::new(&message)]).unwrap();
    dead.flush();
    dead.set_blocked(hub.local_addr(), true);
    drop(dead);
    other.send(at_other, &[IoSlice::new(&message)]).unwrap();
    let start = Instant::now();
    while hub.counters().fetched_bytes_peak == 0 || start.elapsed() < Duration::from_millis(50) {
        assert!(start.elapsed() < PATIENCE);
        for end in [&mut hub, &mut other] {
            end.poll(Some(Duration::ZERO), &mut |_, event| panic!("{event:?}"))
                .unwrap();
        }
    }
    let refused = hub.send(to_other, &[IoSlice::new(&message)]);
    assert_eq!(
        refused,
        Err(SendError::WouldBlock),
        "the dead one has it all"
    );

    // Who is dead is decided above.
    hub.close(to_dead);
    let mut heard = [false; 2];
    run_until(
        &mut [&mut hub, &mut other],
        &mut heard,
        |heard, side, ctx, event| match event {
            Event::Message { bytes, .. } => {
                assert!(bytes == message);
                heard[side] = true;
            }
            Event::Writable { conn } => ctx.send(conn, &[IoSlice::new(&message)]).unwrap(),
            other => panic!("{other:?}"),
        },
        |heard, _| *heard == [true; 2],
    );
}

#[test]
fn a_peer_that_reads_nothing_leaves_room_for_the_others() {
    let mut hub = Endpoint::bind(pools(1, 4 * MIB)).unwrap();
    let mut asleep = Endpoint::bind(pools(2, 4 * MIB)).unwrap();
    let mut awake = Endpoint::bind(pools(3, 4 * MIB)).unwrap();
    let (to_asleep, _) = connect(&mut hub, &mut asleep);
    let (to_awake, _) = connect(&mut hub, &mut awake);
    let message = pattern(7, MIB);
    let mut lent = 0;
    while hub.send(to_asleep, &[IoSlice::new(&message)]).is_ok() {
        lent += 1;
    }
    assert_eq!(lent, 1, "its share of four MiB");
    for _ in 0..5 {
        one_more(&mut [&mut hub, &mut awake], (0, to_awake), &message);
    }
    one_more(&mut [&mut hub, &mut asleep], (0, to_asleep), &message);
}

#[test]
fn a_message_that_was_refused_is_taken_after_writable() {
    let mut a = Endpoint::bind(pools(1, MIB)).unwrap();
    let mut b = Endpoint::bind(pools(2, MIB)).unwrap();
    let (at_a, _) = connect(&mut a, &mut b);
    let message = pattern(9, MIB);
    a.send(at_a, &[IoSlice::new(&message)]).unwrap();
    let refused = a.send(at_a, &[IoSlice::new(&message)]);
    assert_eq!(refused, Err(SendError::WouldBlock));
    let mut heard = 0;
    run_until(
        &mut [&mut a, &mut b],
        &mut heard,
        |heard, side, ctx, event| match event {
            Event::Writable { conn } => {
                assert_eq!((side, conn), (0, at_a));
                ctx.send(conn, &[IoSlice::new(&message)]).unwrap();
            }
            Event::Message { bytes, .. } => {
                assert!(bytes == message);
                *heard += 1;
            }
            other => panic!("{other:?}"),
        },
        |heard, _| *heard == 2,
    );
}

#[test]
fn a_connection_closed_in_the_middle_says_so_and_no_more() {
    let mut a = Endpoint::bind(config(1)).unwrap();
    let mut b = Endpoint::bind(config(2)).unwrap();
    for round in 0..30 {
        let (at_a, at_b) = connect(&mut a, &mut b);
        for number in 0..4 {
            let message = pattern(number, MIB);
            a.send(at_a, &[IoSlice::new(&message)]).unwrap();
            b.send(at_b, &[IoSlice::new(&message)]).unwrap();
        }
        for _ in 0..round {
            for end in [&mut a, &mut b] {
                end.poll(Some(Duration::ZERO), &mut |_, _| {}).unwrap();
            }
        }
        a.close(at_a);
        let mut is_closed = false;
        run_until(
            &mut [&mut a, &mut b],
            &mut is_closed,
            |is_closed, side, _, event| match event {
                Event::Closed { conn, reason } => {
                    assert_eq!((side, conn, reason), (1, at_b, CloseReason::PeerClosed));
                    *is_closed = true;
                }
                Event::Message { conn, .. } => assert_eq!((side, conn), (1, at_b)),
                other => panic!("{other:?}"),
            },
            |is_closed, _| *is_closed,
        );
    }
    assert_eq!(a.counters().violations + b.counters().violations, 0);
}

#[test]
fn pools_smaller_than_a_message_are_refused() {
    let mut bad = config(1);
    bad.limits.fetched_max = MIB - 1;
    assert!(matches!(Endpoint::bind(bad), Err(BindError::Config(_))));
}
