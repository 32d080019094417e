//! Connections begin and end: peers that are late, close, die, restart or fall silent.

mod common;

use std::io::IoSlice;
use std::time::{Duration, Instant};

use common::{PATIENCE, config, connect, run_until};
use lowtide_transport::ibv;
use lowtide_transport::message::{
    BindError, CloseReason, ConnId, Endpoint, EndpointConfig, EndpointCtx, Event, Faults, SendError,
};
use lowtide_transport::raw::types::{Error, NO_CAPTURE};
use lowtide_transport::verbs::DeviceOptions;

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
    while a.counters().sent_pkts < 4 {
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

/// Two lives of one peer.
fn two_lives() -> [EndpointConfig; 2] {
    let base = config(2);
    [1, 2].map(|incarnation| EndpointConfig {
        incarnation,
        ..base.clone()
    })
}

#[test]
fn a_restarted_peer_that_connects_ends_the_old_connection() {
    for calls_first in [true, false] {
        let mut a = Endpoint::bind(config(1)).unwrap();
        let [first_life, second_life] = two_lives();
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
fn a_restarted_peer_that_does_not_call_back_is_found_out_by_a_probe() {
    let mut a = Endpoint::bind(config(1)).unwrap();
    let [first_life, second_life] = two_lives();
    let mut b = Endpoint::bind(first_life).unwrap();
    let (old, _) = connect(&mut a, &mut b);
    // A peer that is there hears nothing of it, and neither do we.
    let quiet = &mut |_: &mut EndpointCtx, event: Event<'_>| panic!("{event:?}");
    for _ in 0..10 {
        let before = b.counters().rx_datagrams;
        a.probe(old);
        while b.counters().rx_datagrams == before || a.is_sending(old) {
            a.poll(Some(Duration::ZERO), quiet).unwrap();
            b.poll(Some(Duration::ZERO), quiet).unwrap();
        }
    }
    kill(b, &a);
    let mut b = Endpoint::bind(second_life).unwrap();
    a.probe(old);
    let closed = until_closed(&mut [&mut a, &mut b]);
    assert_eq!(closed, (old, CloseReason::PeerRestarted));
}

#[test]
fn a_restarted_peer_that_does_not_call_back_is_found_out_by_the_next_message() {
    let mut a = Endpoint::bind(config(1)).unwrap();
    let [first_life, second_life] = two_lives();
    let mut b = Endpoint::bind(first_life).unwrap();
    let (old, _) = connect(&mut a, &mut b);
    kill(b, &a);
    a.send(old, &[IoSlice::new(b"to nobody")]).unwrap();
    let mut b = Endpoint::bind(second_life).unwrap();
    let closed = until_closed(&mut [&mut a, &mut b]);
    assert_eq!(closed, (old, CloseReason::PeerRestarted));
}

#[test]
fn a_caller_that_dies_in_the_handshake_is_never_heard_of() {
    let mut a = Endpoint::bind(config(1)).unwrap();
    let lives: Vec<EndpointConfig> = {
        let base = config(2);
        let life = |incarnation| EndpointConfig {
            incarnation,
            ..base.clone()
        };
        (1..=3).map(life).collect()
    };
    // The first life dies with its REQ on the way, the second after the REP.
    for (is_answered, life) in lives[..2].iter().enumerate() {
        let mut b = Endpoint::bind(life.clone()).unwrap();
        b.connect(a.local_addr(), b"");
        b.flush();
        let before = a.counters().sent_pkts;
        let start = Instant::now();
        while is_answered == 1 && a.counters().sent_pkts == before {
            assert!(start.elapsed() < PATIENCE);
            a.poll(Some(Duration::from_millis(1)), &mut |_, event| {
                panic!("{event:?}")
            })
            .unwrap();
        }
        kill(b, &a);
    }
    let mut b = Endpoint::bind(lives[2].clone()).unwrap();
    b.connect(a.local_addr(), b"");
    let mut known = Vec::new();
    run_until(
        &mut [&mut a, &mut b],
        &mut known,
        |known, side, _, event| match event {
            Event::Connected { incarnation, .. } if side == 0 => known.push(incarnation),
            Event::Connected { .. } => {}
            other => panic!("{other:?}"),
        },
        |known, _| !known.is_empty(),
    );
    assert_eq!(known, [3]);
    assert_eq!(a.connections(), 1);
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
fn a_device_of_libibverbs_that_cannot_be_used_is_named() {
    let missing = EndpointConfig {
        device: Some("nosuch0".to_owned()),
        ..config(1)
    };
    let error = Endpoint::bind(missing.clone())
        .err()
        .expect("no such device");
    assert!(matches!(&error, BindError::Device(name, _) if name == "nosuch0"));
    assert!(error.to_string().contains("nosuch0"), "{error}");
    // What only softroce can do is refused before anything is opened, by both ways to a device.
    let faults = Faults {
        loss_percent: 5.0,
        ..Faults::default()
    };
    let lossy = EndpointConfig {
        faults,
        ..missing.clone()
    };
    let file = std::env::temp_dir().join("lowtide-that-is-never-written.pcap");
    let captured = EndpointConfig {
        capture: Some(file.clone()),
        ..missing
    };
    let refused = |config| match Endpoint::bind(config).err() {
        Some(BindError::Device(_, error)) => error,
        other => panic!("{other:?}"),
    };
    assert!(matches!(refused(lossy), Error::Unsupported(_)));
    let error = refused(captured);
    assert_eq!(error, NO_CAPTURE);
    assert!(error.to_string().contains("tcpdump"), "{error}");
    let open = |options| ibv::Context::open_with("nosuch0", &options).err().unwrap();
    let capture = DeviceOptions {
        capture: Some(file.clone()),
        ..DeviceOptions::default()
    };
    assert_eq!(open(capture), NO_CAPTURE);
    let lossy = DeviceOptions {
        faults,
        ..DeviceOptions::default()
    };
    assert!(matches!(open(lossy), Error::Unsupported(_)));
    assert_ne!(open(DeviceOptions::default()), NO_CAPTURE);
    assert!(!file.exists());
}

#[test]
fn who_is_refused_and_asks_again_at_once_does_not_stop_everything_else() {
    let mut none = config(1);
    none.limits.connections_max = 0;
    let mut a = Endpoint::bind(none).unwrap();
    let peer = config(2).addr;
    a.connect(peer, b"");
    let mut refused = 0;
    let start = Instant::now();
    while refused < 3 {
        assert!(start.elapsed() < PATIENCE);
        let events = a.poll(
            Some(Duration::from_secs(5)),
            &mut |ctx, event| match event {
                Event::Closed { reason, .. } => {
                    assert_eq!(reason, CloseReason::Refused);
                    refused += 1;
                    ctx.connect(peer, b"");
                }
                other => panic!("{other:?}"),
            },
        );
        assert_eq!(events.unwrap(), 1, "one at a time");
    }
}
