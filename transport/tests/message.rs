//! Endpoints over real sockets on loopback addresses.

mod common;

use std::collections::HashMap;
use std::io::IoSlice;
use std::time::Duration;

use common::{PATIENCE, config, run_until};
use lowtide_transport::message::{ConnId, Endpoint, Event};

/// Connects `a` to `b` and returns the connection as both see it.
fn connect(a: &mut Endpoint, b: &mut Endpoint) -> (ConnId, ConnId) {
    let ours = a.connect(b.local_addr(), b"hello from a");
    let mut seen: [Option<ConnId>; 2] = [None, None];
    run_until(
        &mut [a, b],
        &mut seen,
        |seen, side, _, event| match event {
            Event::Connected {
                conn,
                hello,
                is_incoming,
                node,
                ..
            } => {
                assert_eq!(is_incoming, side == 1);
                assert_eq!(node, 2 - side as u64);
                if side == 1 {
                    assert_eq!(hello, b"hello from a");
                }
                seen[side] = Some(conn);
            }
            other => panic!("{other:?}"),
        },
        |seen, _| seen.iter().all(Option::is_some),
    );
    assert_eq!(seen[0], Some(ours));
    (ours, seen[1].unwrap())
}

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
