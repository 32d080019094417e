//! Measures messages between two threads over loopback, next to plain UDP and TCP in the same run.
//!
//! `cargo run --release -p lowtide-transport --example throughput -- [--mib 512] [--drop PERCENT]
//! [--seed N] [--spin MICROSECONDS]`

use std::io::{IoSlice, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use lowtide_transport::message::{ConnId, Endpoint, EndpointConfig, Event, Faults, SendError};

const LENS: [usize; 4] = [64, 4_000, 65_536, 1 << 20];
const ROUNDS: usize = 20_000;

fn address(last: u8) -> SocketAddr {
    let pid = std::process::id();
    SocketAddr::from((
        Ipv4Addr::new(127, 100 + (pid >> 8 & 15) as u8, pid as u8, last),
        4791,
    ))
}

fn option(name: &str, default: f64) -> f64 {
    let mut args = std::env::args().skip_while(|arg| arg != name);
    args.nth(1)
        .map_or(default, |value| value.parse().expect("a number"))
}

fn endpoint(last: u8) -> Endpoint {
    let mut config = EndpointConfig::new(address(last), u64::from(last), 1);
    config.faults = Faults {
        seed: option("--seed", 1.0) as u64,
        loss_percent: option("--drop", 0.0),
        ..Faults::default()
    };
    config.spin = Duration::from_micros(option("--spin", 20.0) as u64);
    Endpoint::bind(config).expect("bind")
}

/// A peer that returns short messages and swallows long ones, answering the last of a run.
fn serve(mut endpoint: Endpoint) {
    let mut is_done = false;
    while !is_done {
        let polled = endpoint.poll(
            Some(Duration::from_secs(1)),
            &mut |ctx, event| match event {
                Event::Message { conn, bytes } if bytes.first() == Some(&b'?') => {
                    ctx.send(conn, &[IoSlice::new(&bytes[..bytes.len().min(64)])])
                        .expect("an answer");
                }
                Event::Closed { .. } => is_done = true,
                _ => {}
            },
        );
        polled.expect("poll");
    }
    let counters = endpoint.counters();
    println!("server: {counters:?}");
}

fn await_message(endpoint: &mut Endpoint) {
    let mut is_here = false;
    while !is_here {
        endpoint
            .poll(None, &mut |_, event| {
                is_here |= matches!(event, Event::Message { .. })
            })
            .expect("poll");
    }
}

fn send(endpoint: &mut Endpoint, conn: ConnId, bytes: &[u8]) {
    loop {
        match endpoint.send(conn, &[IoSlice::new(bytes)]) {
            Ok(()) => return,
            Err(SendError::WouldBlock) => {
                endpoint.poll(None, &mut |_, _| {}).expect("poll");
            }
            Err(error) => panic!("{error}"),
        }
    }
}

fn lowtide(mib: usize) {
    let (mut client, server) = (endpoint(1), endpoint(2));
    let peer = server.local_addr();
    let server = thread::spawn(move || serve(server));
    let conn = client.connect(peer, b"");
    client
        .poll(None, &mut |_, event| {
            assert!(matches!(event, Event::Connected { .. }))
        })
        .unwrap();
    let ping = [b'?'; 64];
    let mut round_trips: Vec<Duration> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            send(&mut client, conn, &ping);
            await_message(&mut client);
            start.elapsed()
        })
        .collect();
    print_round_trips("lowtide", &mut round_trips);
    for len in LENS {
        let message = vec![0; len];
        let count = (mib << 20).min(len << 21) / len;
        let start = Instant::now();
        for i in 0..count {
            send(&mut client, conn, &message);
            if len < 4096 && i % 64 == 0 {
                client
                    .poll(Some(Duration::ZERO), &mut |_, _| {})
                    .expect("poll");
            }
        }
        send(&mut client, conn, &ping);
        await_message(&mut client);
        print_rate("lowtide", len, count, start.elapsed());
    }
    println!("client: {:?}", client.counters());
    client.close(conn);
    drop(client);
    server.join().expect("server");
}

fn tcp(mib: usize) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
    let peer = listener.local_addr().expect("address");
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("accept");
        stream.set_nodelay(true).expect("nodelay");
        let mut buffer = vec![0; 1 << 20];
        let mut byte = [0; 64];
        for _ in 0..ROUNDS {
            stream.read_exact(&mut byte).expect("read");
            stream.write_all(&byte).expect("write");
        }
        while stream.read(&mut buffer).expect("read") > 0 {}
        stream.write_all(b"!").expect("write");
    });
    let mut stream = TcpStream::connect(peer).expect("connect");
    stream.set_nodelay(true).expect("nodelay");
    let mut ping = [b'?'; 64];
    let mut round_trips: Vec<Duration> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            stream.write_all(&ping).expect("write");
            stream.read_exact(&mut ping).expect("read");
            start.elapsed()
        })
        .collect();
    print_round_trips("tcp", &mut round_trips);
    let message = vec![0; 65_536];
    let start = Instant::now();
    for _ in 0..mib * 16 {
        stream.write_all(&message).expect("write");
    }
    stream
        .shutdown(std::net::Shutdown::Write)
        .expect("shutdown");
    stream.read_exact(&mut ping[..1]).expect("read");
    print_rate("tcp", 65_536, mib * 16, start.elapsed());
    server.join().expect("server");
}

/// Round trips of bare datagrams between two threads asleep in recv: the floor for sleepers.
fn udp() {
    let (a, b) = (UdpSocket::bind(address(3)), UdpSocket::bind(address(4)));
    let (a, b) = (a.expect("bind"), b.expect("bind"));
    let peer = b.local_addr().expect("address");
    let server = thread::spawn(move || {
        let mut buffer = [0; 128];
        for _ in 0..ROUNDS {
            let (len, from) = b.recv_from(&mut buffer).expect("receive");
            b.send_to(&buffer[..len], from).expect("send");
        }
    });
    let mut buffer = [0; 128];
    let mut round_trips: Vec<Duration> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            a.send_to(&[0; 80], peer).expect("send");
            a.recv_from(&mut buffer).expect("receive");
            start.elapsed()
        })
        .collect();
    print_round_trips("udp", &mut round_trips);
    server.join().expect("server");
}

fn print_round_trips(who: &str, samples: &mut [Duration]) {
    samples.sort();
    let at = |part: f64| samples[(samples.len() as f64 * part) as usize].as_nanos() as f64 / 1e3;
    println!(
        "{who:8} 64 B round trip: p50 {:.1} us, p99 {:.1} us",
        at(0.5),
        at(0.99)
    );
}

fn print_rate(who: &str, len: usize, count: usize, time: Duration) {
    let seconds = time.as_secs_f64();
    let rate = (len * count) as f64 / seconds / 1e6;
    println!(
        "{who:8} {len:8} B: {rate:8.0} MB/s, {:9.0} messages/s",
        count as f64 / seconds
    );
}

fn main() {
    let mib = option("--mib", 512.0) as usize;
    udp();
    tcp(mib);
    lowtide(mib);
}
