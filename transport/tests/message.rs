//! Endpoints over real sockets on loopback addresses.

mod common;

use std::collections::{BTreeSet, HashMap};
use std::io::IoSlice;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use common::{PATIENCE, Stream, config, connect, packets_of, run_until, scratch, traffic};
use lowtide_transport::message::{
    BindError, CloseReason, ConnId, Endpoint, EndpointConfig, Event, Faults, SameHost, SendError,
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
    traffic(&mut a, &mut b, &mut streams, |_, _| true);
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
fn on_one_host_messages_need_no_network() {
    for same_host in [SameHost::Rings, SameHost::Direct] {
        let config = |node| {
            let mut config = config(node);
            config.same_host = same_host;
            config.faults.seed = 7; // of faults that there are none of
            config
        };
        let (a, b) = stream_both_ways(config(1), config(2), 64 << 20);
        for endpoint in [&a, &b] {
            let counters = endpoint.counters();
            assert_eq!(endpoint.paths(), (1, 0));
            assert!(counters.host_tx_packets > 1000 && counters.host_rx_packets > 1000);
            assert!(counters.sent_pkts < 100, "{counters:?}");
            // Probes of a process that ran late are no loss.
            assert_eq!(counters.host_lost_packets, 0, "{counters:?}");
        }
    }
}

/// A peer that did not ask for it, and faults of a wire: both mean UDP.
#[test]
fn who_does_not_share_memory_is_reached_by_the_network() {
    let host = |node| {
        let mut config = config(node);
        config.same_host = SameHost::Direct;
        config
    };
    let lossy = |node| {
        let mut config = host(node);
        config.faults.loss_percent = 1.0;
        config
    };
    let captured = |node| {
        let mut config = host(node);
        config.capture = Some(scratch("captured.pcap"));
        config
    };
    for other in [config(2), lossy(3), captured(4)] {
        let (a, b) = stream_both_ways(host(1), other, 1 << 20);
        for endpoint in [&a, &b] {
            assert_eq!(endpoint.paths(), (0, 1));
            assert_eq!(endpoint.counters().host_tx_packets, 0);
        }
    }
    // All that went over the wire is in the file.
    let packets = packets_of(&scratch("captured.pcap"));
    std::fs::remove_file(scratch("captured.pcap")).unwrap();
    let bytes: usize = packets.iter().map(|(_, packet)| packet.len()).sum();
    assert!(bytes > 2 << 20, "{bytes} bytes of two streams of 1 MiB");
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
    let config = |node| {
        let mut config = config(node);
        config.faults = faults(node);
        config
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

/// What finds no room in the receive buffer is counted, to the last datagram: the kernel tells with
/// each that it hands up how many were lost before it.
#[test]
fn datagrams_that_found_no_room_are_counted() {
    const SENT: u64 = 2000;
    const RUBBISH: [u8; 1000] = [0xFF; 1000];
    let mut config = config(1);
    config.socket.receive_buffer_bytes = 106_496;
    let mut endpoint = Endpoint::bind(config).unwrap();
    let to = endpoint.local_addr();
    let stranger = UdpSocket::bind(common::address()).unwrap();
    // Nobody drives the endpoint meanwhile.
    for _ in 0..SENT {
        stranger.send_to(&RUBBISH, to).unwrap();
    }
    let mut seen = 0;
    loop {
        let patience = Some(Duration::from_millis(20));
        endpoint.poll(patience, &mut |_, _| {}).unwrap();
        match endpoint.counters().rx_malformed {
            now if now == seen => break,
            now => seen = now,
        }
    }
    assert!(0 < seen && seen < SENT, "{seen}");
    stranger.send_to(&RUBBISH, to).unwrap();
    run_until(
        &mut [&mut endpoint],
        &mut (),
        |(), _, _, event| panic!("{event:?}"),
        |(), endpoints| endpoints[0].counters().rx_malformed > seen,
    );
    assert_eq!(endpoint.counters().rx_overflow, SENT - seen);
}

/// Whether the kernel takes an option of UDP's sockets.
fn kernel_takes(option: libc::c_int, value: libc::c_int) -> bool {
    let socket = UdpSocket::bind(common::address()).unwrap();
    let len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: value and length describe a live variable, which is only read.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            option,
            (&raw const value).cast(),
            len,
        )
    };
    result == 0
}

/// Where the kernel can cut and join datagrams, it does.
#[test]
fn what_the_kernel_can_do_for_segments_is_used() {
    let (cuts, joins) = (
        kernel_takes(libc::UDP_SEGMENT, 4096),
        kernel_takes(libc::UDP_GRO, 1),
    );
    let (a, b) = stream_both_ways(config(1), config(2), 8 << 20);
    for endpoint in [&a, &b] {
        let counters = endpoint.counters();
        let used = (counters.gso_sends > 0, counters.gro_receives > 0);
        // What is not cut is not joined either: a loopback wire leaves it as it was sent.
        assert_eq!(used, (cuts, cuts && joins), "{counters:?}");
    }
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
    traffic(&mut a, &mut b, &mut streams, |streams, endpoints| {
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
        true
    });
    assert!(cut_at.is_some_and(|probes| a.counters().probes >= probes));
}

#[test]
fn a_taken_address_is_named() {
    let taken = config(1);
    let socket = UdpSocket::bind(taken.addr).unwrap();
    let error = Endpoint::bind(taken.clone()).err().unwrap();
    assert!(matches!(error, BindError::AddrInUse(_)));
    assert!(
        error.to_string().contains(&taken.addr.to_string()),
        "{error}"
    );
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

/// How often this thread has gone to sleep of its own will.
fn sleeps() -> u64 {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    line.unwrap().trim().parse().unwrap()
}

#[test]
fn an_idle_connection_wakes_nobody() {
    let (mut a, _b) = stream_both_ways(config(1), config(2), 1 << 20);
    // Timers of the traffic before run out.
    a.poll(Some(Duration::from_millis(100)), &mut |_, _| {})
        .unwrap();
    let before = sleeps();
    a.poll(Some(Duration::from_secs(1)), &mut |_, event| {
        panic!("{event:?}")
    })
    .unwrap();
    assert!(
        sleeps() - before <= 2,
        "{} sleeps in a second",
        sleeps() - before
    );
}

#[test]
fn connections_come_and_go_and_leave_nothing_behind() {
    let mut a = Endpoint::bind(config(1)).unwrap();
    let mut b = Endpoint::bind(config(2)).unwrap();
    let peer = b.local_addr();
    // 2,000 in flocks of 50; each says one word and is closed by the side that heard it.
    for flock in 0..40 {
        for _ in 0..50 {
            a.connect(peer, b"");
        }
        let mut closed = 0;
        run_until(
            &mut [&mut a, &mut b],
            &mut closed,
            |closed, side, ctx, event| match event {
                Event::Connected { conn, .. } if side == 0 => {
                    ctx.send(conn, &[IoSlice::new(b"word")]).unwrap();
                }
                Event::Message { conn, bytes } => {
                    assert_eq!((side, bytes), (1, &b"word"[..]));
                    ctx.close(conn);
                }
                Event::Closed {
                    reason: CloseReason::PeerClosed,
                    ..
                } if side == 0 => *closed += 1,
                Event::Connected { .. } => {}
                other => panic!("{other:?}"),
            },
            |closed, _| *closed == 50,
        );
        assert_eq!((a.connections(), b.connections()), (0, 0), "flock {flock}");
    }
}

#[test]
fn an_endpoint_can_connect_to_itself() {
    let mut a = Endpoint::bind(config(1)).unwrap();
    let address = a.local_addr();
    let ours = a.connect(address, b"me");
    let mut heard = Vec::new();
    run_until(
        &mut [&mut a],
        &mut heard,
        |heard, _, ctx, event| match event {
            Event::Connected {
                conn, is_incoming, ..
            } => {
                assert_eq!(conn == ours, !is_incoming);
                let word: &[u8] = if is_incoming {
                    b"from server"
                } else {
                    b"from client"
                };
                ctx.send(conn, &[IoSlice::new(word)]).unwrap();
            }
            Event::Message { conn, bytes } => heard.push((conn == ours, bytes.to_vec())),
            other => panic!("{other:?}"),
        },
        |heard, _| heard.len() == 2,
    );
    heard.sort();
    assert_eq!(
        heard,
        [
            (false, b"from client".to_vec()),
            (true, b"from server".to_vec())
        ]
    );
}

#[test]
fn a_handler_may_close_the_connection_whose_messages_it_is_given() {
    let mut a = Endpoint::bind(config(1)).unwrap();
    let mut b = Endpoint::bind(config(2)).unwrap();
    let (at_a, at_b) = connect(&mut a, &mut b);
    for _ in 0..10 {
        a.send(at_a, &[IoSlice::new(b"one of many in a packet")])
            .unwrap();
    }
    let mut heard = 0;
    run_until(
        &mut [&mut b, &mut a],
        &mut heard,
        |heard, side, ctx, event| match event {
            Event::Message { conn, .. } => {
                assert_eq!((side, conn), (0, at_b));
                *heard += 1;
                if *heard == 3 {
                    ctx.close(conn);
                }
            }
            Event::Closed {
                conn,
                reason: CloseReason::PeerClosed,
            } => {
                assert_eq!((side, conn), (1, at_a));
                *heard += 100;
            }
            other => panic!("{other:?}"),
        },
        |heard, _| *heard >= 100,
    );
    assert_eq!(heard, 103);
}

#[test]
fn endpoints_move_between_threads() {
    fn is_send<T: Send>() {}
    is_send::<Endpoint>();
    is_send::<lowtide_transport::verbs::Device>();
    is_send::<lowtide_transport::verbs::QueuePair>();
}
