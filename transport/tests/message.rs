//! Endpoints over real sockets on loopback addresses.

mod common;

use std::collections::{BTreeSet, HashMap};
use std::io::IoSlice;
use std::net::UdpSocket;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use common::{PATIENCE, Stream, config, connect, run_until};
use lowtide_transport::message::{
    BindError, CloseReason, ConnId, Endpoint, EndpointConfig, Event, Faults, SendError,
};

#[test]
fn ping_pong() {
    let mut a = Endpoint::bind(config(1)).unwrap();
    let mut b = Endpoint::bind(config(2)).unwrap();
    let (ours, _) = connect(&mut a, &mut b);
    a.send(ours, &[IoSlice::new(b"ping "), IoSlice::new(b"0")])
        .unwrap();
    let mut rounds = 0;
    run_until(
        &mut [&mut a, &mut b],
        &mut rounds,
        |rounds, side, ctx, event| match event {
            Event::Message { conn, bytes } if side == 1 => {
                assert_eq!(bytes, format!("ping {rounds}").as_bytes());
                ctx.send(conn, &[IoSlice::new(format!("pong {rounds}").as_bytes())])
                    .unwrap();
            }
            Event::Message { conn, bytes } => {
                assert_eq!(bytes, format!("pong {rounds}").as_bytes());
                *rounds += 1;
                ctx.send(conn, &[IoSlice::new(format!("ping {rounds}").as_bytes())])
                    .unwrap();
            }
            other => panic!("{other:?}"),
        },
        |rounds, _| *rounds >= 1000,
    );
    for endpoint in [&a, &b] {
        let counters = endpoint.counters();
        assert_eq!(
            (
                counters.rx_bad_icrc,
                counters.rx_malformed,
                counters.rcvd_rnr_err
            ),
            (0, 0, 0)
        );
    }
}

/// Streams `bytes` both ways at once, in messages of all lengths, and checks every one.
fn stream_both_ways(a: EndpointConfig, b: EndpointConfig, bytes: u64) -> (Endpoint, Endpoint) {
    let mut a = Endpoint::bind(a).unwrap();
    let mut b = Endpoint::bind(b).unwrap();
    let (at_a, at_b) = connect(&mut a, &mut b);
    let mut streams = [Stream::new(at_a, bytes), Stream::new(at_b, bytes)];
    run_until(
        &mut [&mut a, &mut b],
        &mut streams,
        |streams, side, _, event| match event {
            Event::Message { conn, bytes } => streams[side].receive(conn, bytes),
            Event::Writable { .. } => {}
            other => panic!("{other:?}"),
        },
        |streams, endpoints| {
            for (stream, endpoint) in streams.iter_mut().zip(endpoints.iter_mut()) {
                stream.send(endpoint);
            }
            streams.iter().all(Stream::is_done)
        },
    );
    (a, b)
}

#[test]
fn a_stream_of_many_lengths_arrives_in_order_both_ways() {
    let (a, b) = stream_both_ways(config(1), config(2), 64 << 20);
    for endpoint in [&a, &b] {
        let counters = endpoint.counters();
        assert_eq!((counters.rcvd_rnr_err, counters.rx_bad_icrc), (0, 0));
    }
}

#[test]
fn a_bad_network_loses_nothing() {
    let faults = |seed| Faults {
        seed,
        loss_percent: 10.0,
        duplicate_percent: 2.0,
        reorder_percent: 5.0,
        corrupt_percent: 1.0,
    };
    let config = |node| EndpointConfig {
        faults: faults(node),
        ..config(node)
    };
    let (a, b) = stream_both_ways(config(1), config(2), 8 << 20);
    for endpoint in [&a, &b] {
        let counters = endpoint.counters();
        assert!(counters.faults_dropped > 0 && counters.retransmitted_pkts > 0);
        assert!(counters.rx_bad_icrc > 0, "flipped bits were noticed");
        assert_eq!(counters.rcvd_rnr_err, 0);
    }
}

#[test]
fn without_offloads_it_works_too() {
    let config = |node| {
        let mut config = config(node);
        config.socket.offload = false;
        config
    };
    let (a, _) = stream_both_ways(config(1), config(2), 4 << 20);
    assert_eq!(a.counters().gso_sends, 0);
}

#[test]
fn with_the_default_receive_buffer_the_budget_prevents_overflow() {
    let config = |node| {
        let mut config = config(node);
        config.socket.receive_buffer_bytes = 106_496; // the kernel doubles it to the default
        config
    };
    let (a, b) = stream_both_ways(config(1), config(2), 8 << 20);
    assert_eq!(a.counters().rx_overflow + b.counters().rx_overflow, 0);
}

#[test]
fn a_peer_that_does_not_poll_for_a_while_misses_nothing() {
    let mut a = Endpoint::bind(config(1)).unwrap();
    let mut b = Endpoint::bind(config(2)).unwrap();
    let (at_a, at_b) = connect(&mut a, &mut b);
    let (go, wait) = mpsc::channel::<()>();
    let total = 16 << 20;
    let sleeper = std::thread::spawn(move || {
        wait.recv().unwrap();
        let mut stream = Stream::new(at_b, total);
        let start = Instant::now();
        while !stream.has_received_all() {
            assert!(start.elapsed() < PATIENCE);
            b.poll(
                Some(Duration::from_millis(100)),
                &mut |_, event| match event {
                    Event::Message { conn, bytes } => stream.receive(conn, bytes),
                    other => panic!("{other:?}"),
                },
            )
            .unwrap();
        }
        b
    });
    // It sleeps until the sender can neither send more nor has missed its probes.
    let mut stream = Stream::new(at_a, total);
    let start = Instant::now();
    while a.counters().probes < 6 {
        assert!(start.elapsed() < PATIENCE);
        stream.send(&mut a);
        a.poll(Some(Duration::from_millis(10)), &mut |_, event| {
            panic!("{event:?}")
        })
        .unwrap();
    }
    assert!(!stream.has_sent_all(), "memory is bounded");
    go.send(()).unwrap();
    while !sleeper.is_finished() {
        stream.send(&mut a);
        a.poll(Some(Duration::from_millis(10)), &mut |_, event| {
            assert!(matches!(event, Event::Writable { .. }), "{event:?}");
        })
        .unwrap();
    }
    sleeper.join().unwrap();
    assert!(stream.has_sent_all());
}

#[test]
fn connecting_before_the_peer_exists_succeeds_once_it_does() {
    let mut a = Endpoint::bind(config(1)).unwrap();
    let later = config(2);
    let conn = a.connect(later.addr, b"early");
    assert_eq!(
        a.send(conn, &[IoSlice::new(b"x")]),
        Err(SendError::WouldBlock)
    );
    let start = Instant::now();
    while a.counters().tx_datagrams < 4 {
        assert!(start.elapsed() < PATIENCE);
        a.poll(Some(Duration::from_millis(20)), &mut |_, event| {
            panic!("{event:?}")
        })
        .unwrap();
    }
    let mut b = Endpoint::bind(later).unwrap();
    let mut connected = [0; 2];
    run_until(
        &mut [&mut a, &mut b],
        &mut connected,
        |connected, side, _, event| match event {
            Event::Connected { conn: which, .. } => {
                assert!(side == 1 || which == conn);
                connected[side] += 1;
            }
            other => panic!("{other:?}"),
        },
        |connected, _| *connected == [1, 1],
    );
}

#[test]
fn a_connect_that_is_closed_stays_silent() {
    let mut a = Endpoint::bind(config(1)).unwrap();
    let conn = a.connect(common::address(), b"");
    a.poll(Some(Duration::from_millis(1)), &mut |_, event| {
        panic!("{event:?}")
    })
    .unwrap();
    a.close(conn);
    assert_eq!(a.connections(), 0);
    assert_eq!(a.send(conn, &[IoSlice::new(b"x")]), Err(SendError::Closed));
    a.poll(Some(Duration::from_millis(1)), &mut |_, event| {
        panic!("{event:?}")
    })
    .unwrap();
}

/// Runs until side 0 has seen a connection closed; returns which and why.
fn until_closed(endpoints: &mut [&mut Endpoint]) -> (ConnId, CloseReason) {
    let mut closed = None;
    run_until(
        endpoints,
        &mut closed,
        |closed, side, _, event| match event {
            Event::Closed { conn, reason } if side == 0 => *closed = Some((conn, reason)),
            _ => {}
        },
        |closed, _| closed.is_some(),
    );
    closed.unwrap()
}

#[test]
fn closing_and_dropping_tell_the_peer() {
    let mut a = Endpoint::bind(config(1)).unwrap();
    let mut b = Endpoint::bind(config(2)).unwrap();
    let (at_a, at_b) = connect(&mut a, &mut b);
    b.close(at_b);
    assert_eq!(
        until_closed(&mut [&mut a, &mut b]),
        (at_a, CloseReason::PeerClosed)
    );
    let (at_a, _) = connect(&mut a, &mut b);
    drop(b);
    assert_eq!(until_closed(&mut [&mut a]), (at_a, CloseReason::PeerClosed));
}

/// Makes the endpoint vanish as if killed: the DREQs of its drop never arrive.
fn kill(mut endpoint: Endpoint, peer: &Endpoint) {
    endpoint.set_blocked(peer.local_addr(), true);
}

#[test]
fn a_restarted_peer_that_connects_ends_the_old_connection() {
    for calls_first in [true, false] {
        let mut a = Endpoint::bind(config(1)).unwrap();
        let second_life = EndpointConfig {
            incarnation: 2,
            ..config(2)
        };
        let first_life = EndpointConfig {
            incarnation: 1,
            ..second_life.clone()
        };
        let mut b = Endpoint::bind(first_life).unwrap();
        let old = match calls_first {
            true => connect(&mut b, &mut a).1,
            false => connect(&mut a, &mut b).0,
        };
        kill(b, &a);
        let mut b = Endpoint::bind(second_life).unwrap();
        b.connect(a.local_addr(), b"again");
        let mut events = Vec::new();
        run_until(
            &mut [&mut a, &mut b],
            &mut events,
            |events, side, _, event| match event {
                Event::Closed { conn, reason } if side == 0 => {
                    assert_eq!((conn, reason), (old, CloseReason::PeerRestarted));
                    events.push("closed");
                }
                Event::Connected {
                    incarnation, hello, ..
                } if side == 0 => {
                    assert_eq!((incarnation, hello), (2, &b"again"[..]));
                    events.push("connected");
                }
                Event::Connected { .. } => {}
                other => panic!("{other:?}"),
            },
            |events, _| events.len() == 2,
        );
        assert_eq!(events, ["closed", "connected"]);
    }
}

#[test]
fn a_restarted_peer_that_does_not_call_back_is_found_out_by_the_next_message() {
    let mut a = Endpoint::bind(config(1)).unwrap();
    let second_life = EndpointConfig {
        incarnation: 2,
        ..config(2)
    };
    let first_life = EndpointConfig {
        incarnation: 1,
        ..second_life.clone()
    };
    let mut b = Endpoint::bind(first_life).unwrap();
    let (old, _) = connect(&mut a, &mut b);
    kill(b, &a);
    a.send(old, &[IoSlice::new(b"to nobody")]).unwrap();
    let mut b = Endpoint::bind(second_life).unwrap();
    let closed = until_closed(&mut [&mut a, &mut b]);
    assert_eq!(closed, (old, CloseReason::PeerRestarted));
}

#[test]
fn an_outdated_incarnation_is_refused() {
    let mut a = Endpoint::bind(config(1)).unwrap();
    let new = EndpointConfig {
        incarnation: 2,
        ..config(2)
    };
    let mut b = Endpoint::bind(new.clone()).unwrap();
    connect(&mut b, &mut a);
    kill(b, &a);
    let mut b = Endpoint::bind(EndpointConfig {
        incarnation: 1,
        ..new
    })
    .unwrap();
    let conn = b.connect(a.local_addr(), b"");
    assert_eq!(
        until_closed(&mut [&mut b, &mut a]),
        (conn, CloseReason::Refused)
    );
}

#[test]
fn a_silent_peer_is_given_up_only_if_asked_for() {
    let mut a_config = config(1);
    a_config.silence_max = Some(Duration::from_millis(300));
    let mut a = Endpoint::bind(a_config).unwrap();
    let mut b = Endpoint::bind(config(2)).unwrap();
    let (at_a, _) = connect(&mut a, &mut b);
    kill(b, &a);
    a.send(at_a, &[IoSlice::new(b"anybody there?")]).unwrap();
    assert_eq!(until_closed(&mut [&mut a]), (at_a, CloseReason::Silent));
}

#[test]
fn many_connections_share_two_endpoints() {
    const CONNECTIONS: usize = 32;
    let mut a = Endpoint::bind(config(1)).unwrap();
    let mut b = Endpoint::bind(config(2)).unwrap();
    for _ in 0..CONNECTIONS {
        a.connect(b.local_addr(), b"");
    }
    let mut streams: [HashMap<ConnId, Stream>; 2] = Default::default();
    run_until(
        &mut [&mut a, &mut b],
        &mut streams,
        |streams, side, _, event| match event {
            Event::Connected { conn, .. } => {
                streams[side].insert(conn, Stream::new(conn, 1 << 20));
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
    let ids: BTreeSet<_> = streams[0].keys().collect();
    assert_eq!(ids.len(), CONNECTIONS);
}

#[test]
fn a_partition_delays_and_loses_nothing() {
    let mut a = Endpoint::bind(config(1)).unwrap();
    let mut b = Endpoint::bind(config(2)).unwrap();
    let (at_a, at_b) = connect(&mut a, &mut b);
    let bytes = 4 << 20;
    let mut streams = [Stream::new(at_a, bytes), Stream::new(at_b, bytes)];
    let peer = b.local_addr();
    let mut cut_at = None;
    run_until(
        &mut [&mut a, &mut b],
        &mut streams,
        |streams, side, _, event| match event {
            Event::Message { conn, bytes } => streams[side].receive(conn, bytes),
            Event::Writable { .. } => {}
            other => panic!("{other:?}"),
        },
        |streams, endpoints| {
            for (stream, endpoint) in streams.iter_mut().zip(endpoints.iter_mut()) {
                stream.send(endpoint);
            }
            // In the middle one side alone cuts the line, both ways, for several probes.
            match cut_at {
                None if streams[1].received() > bytes / 2 => {
                    endpoints[0].set_blocked(peer, true);
                    cut_at = Some(endpoints[0].counters().probes + 5);
                }
                Some(probes) if endpoints[0].counters().probes >= probes => {
                    endpoints[0].set_blocked(peer, false);
                }
                _ => {}
            }
            streams.iter().all(Stream::is_done)
        },
    );
    assert!(cut_at.is_some_and(|probes| a.counters().probes >= probes));
}

#[test]
fn a_taken_address_is_named() {
    let taken = config(1);
    let socket = UdpSocket::bind(taken.addr).unwrap();
    let error = Endpoint::bind(taken.clone()).err().unwrap();
    assert!(matches!(error, BindError::AddrInUse(addr) if addr == taken.addr));
    assert!(error.to_string().contains(&taken.addr.to_string()));
    drop(socket);
    Endpoint::bind(taken).unwrap();
}

#[test]
fn too_long_messages_and_bad_configurations_are_refused() {
    let mut a = Endpoint::bind(config(1)).unwrap();
    let mut b = Endpoint::bind(config(2)).unwrap();
    let (at_a, _) = connect(&mut a, &mut b);
    let long = vec![0; (1 << 20) + 1];
    assert_eq!(
        a.send(at_a, &[IoSlice::new(&long)]),
        Err(SendError::TooLarge)
    );
    a.send(at_a, &[IoSlice::new(&long[1..])]).unwrap();
    let mut bad = config(3);
    bad.limits.credits = 1;
    assert!(matches!(Endpoint::bind(bad), Err(BindError::Config(_))));
}

#[test]
fn a_waker_ends_a_poll_of_another_thread() {
    let mut a = Endpoint::bind(config(1)).unwrap();
    let waker = a.waker();
    let poller =
        std::thread::spawn(move || a.poll(None, &mut |_, event| panic!("{event:?}")).unwrap());
    while !poller.is_finished() {
        waker.wake().unwrap();
        std::thread::yield_now();
    }
    assert_eq!(poller.join().unwrap(), 0);
}

#[test]
fn an_idle_poll_returns_when_its_time_is_up() {
    let mut a = Endpoint::bind(config(1)).unwrap();
    let start = Instant::now();
    let events = a
        .poll(Some(Duration::from_millis(30)), &mut |_, _| {})
        .unwrap();
    assert_eq!(events, 0);
    assert!(start.elapsed() >= Duration::from_millis(30));
}

/// Datagrams of all sorts of wrongness, among them good ones with one byte changed.
fn garbage(round: u64, sample: &[u8]) -> Vec<u8> {
    let mut state = round.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut bytes = match round % 3 {
        0 => (0..next() % 300).map(|_| next() as u8).collect(),
        1 => sample[..(next() as usize % sample.len())].to_vec(),
        _ => sample.to_vec(),
    };
    if let Some(at) = (next() as usize).checked_rem(bytes.len()) {
        bytes[at] ^= 1 << (next() % 8);
        if round % 2 == 0 {
            // The BTH's opcode and flags, where the parsers branch.
            bytes[0] = next() as u8;
        }
    }
    bytes
}

#[test]
fn garbage_in_the_middle_of_traffic_is_counted_and_harms_nobody() {
    let mut a = Endpoint::bind(config(1)).unwrap();
    let mut b = Endpoint::bind(config(2)).unwrap();
    let (at_a, at_b) = connect(&mut a, &mut b);
    let stranger = UdpSocket::bind(common::address()).unwrap();
    let bytes = 8 << 20;
    let mut streams = [Stream::new(at_a, bytes), Stream::new(at_b, bytes)];
    let (to_a, to_b) = (a.local_addr(), b.local_addr());
    let sample: Vec<u8> = [0x04, 0, 0xFF, 0xFF, 0, 0, 0, 17, 0x80, 0, 0, 1]
        .into_iter()
        .chain((0..120).map(|i| i as u8))
        .collect();
    let mut sent = 0;
    run_until(
        &mut [&mut a, &mut b],
        &mut streams,
        |streams, side, _, event| match event {
            Event::Message { conn, bytes } => streams[side].receive(conn, bytes),
            Event::Writable { .. } => {}
            other => panic!("{other:?}"),
        },
        |streams, endpoints| {
            for (stream, endpoint) in streams.iter_mut().zip(endpoints.iter_mut()) {
                stream.send(endpoint);
            }
            for _ in 0..if sent < 10_000 { 20 } else { 0 } {
                let bytes = garbage(sent, &sample);
                stranger
                    .send_to(&bytes, if sent % 2 == 0 { to_a } else { to_b })
                    .unwrap();
                sent += 1;
            }
            sent == 10_000 && streams.iter().all(Stream::is_done)
        },
    );
    let dropped = |endpoint: &Endpoint| {
        let counters = endpoint.counters();
        counters.rx_malformed + counters.rx_bad_icrc + counters.rx_overflow
    };
    // Empty datagrams are not counted; all others are.
    assert!(dropped(&a) + dropped(&b) > 9_900);
    assert_eq!((a.connections(), b.connections()), (1, 1));
}
