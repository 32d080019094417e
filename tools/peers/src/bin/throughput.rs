//! Measures messages and verbs between two threads over loopback, next to plain UDP and TCP.
//!
//! `cargo run --release -p lowtide-peers --bin throughput -- [--mib 512] [--rounds 3]
//! [--drop PERCENT] [--seed N] [--spin MICROSECONDS]`
//!
//! Streams are measured in interleaved rounds; the last table has the medians, their ratio to the
//! TCP stream, and the processor time of both ends per byte, which other programs disturb less.

use std::io::{IoSlice, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use std::sync::Arc;

use lowtide_transport::message::{
    ConnId, Counters, Endpoint, EndpointConfig, Event, Faults, Piece, SendError,
};
use lowtide_transport::verbs::{Access, Buffer, Device, DeviceOptions, SendOp, Status};

const LENS: [usize; 5] = [64, 4_000, 60_000, 65_536, 1 << 20];
const ROUND_TRIPS: usize = 20_000;
/// Length of WRITEs and READs, and how many are under way.
const VERB_LEN: usize = 1 << 20;
const VERB_DEPTH: u64 = 8;

/// What one stream took.
struct Sample {
    name: String,
    mb_per_s: f64,
    cpu_ns_per_kb: f64,
}

/// Measures a stream of `count` times `len` bytes.
fn sample(name: &str, len: usize, count: usize, stream: impl FnOnce()) -> Sample {
    let (start, cpu) = (Instant::now(), cpu_time());
    stream();
    let bytes = (len * count) as f64;
    Sample {
        name: format!("{name} {len} B"),
        mb_per_s: bytes / start.elapsed().as_secs_f64() / 1e6,
        cpu_ns_per_kb: cpu_time().saturating_sub(cpu).as_nanos() as f64 / (bytes / 1e3),
    }
}

/// Processor time of this process so far, kernel included.
fn cpu_time() -> Duration {
    // The threads that a stream needs live until it has been measured.
    let tasks = std::fs::read_dir("/proc/self/task").expect("/proc");
    let mut nanoseconds = 0;
    for task in tasks.flatten() {
        let line = std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        let first = line.split_whitespace().next();
        nanoseconds += first.and_then(|word| word.parse().ok()).unwrap_or(0);
    }
    Duration::from_nanos(nanoseconds)
}

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
fn serve(mut endpoint: Endpoint) -> Counters {
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
    endpoint.counters()
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

fn send_piece(endpoint: &mut Endpoint, conn: ConnId, piece: Piece) {
    let mut pieces = vec![piece];
    loop {
        match endpoint.send_pieces(conn, &mut pieces) {
            Ok(()) => return,
            Err(SendError::WouldBlock) => {
                endpoint.poll(None, &mut |_, _| {}).expect("poll");
            }
            Err(error) => panic!("{error}"),
        }
    }
}

fn messages(mib: usize, is_first: bool, samples: &mut Vec<Sample>) {
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
    if is_first {
        let mut round_trips: Vec<Duration> = (0..ROUND_TRIPS)
            .map(|_| {
                let start = Instant::now();
                send(&mut client, conn, &ping);
                await_message(&mut client);
                start.elapsed()
            })
            .collect();
        print_round_trips("lowtide", &mut round_trips);
    }
    for len in LENS {
        let message = vec![0; len];
        let count = (mib << 20).min(len << 21) / len;
        samples.push(sample("message", len, count, || {
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
        }));
    }
    let len = 1 << 20;
    let shared: Arc<[u8]> = vec![0; len].into();
    samples.push(sample("message in pieces", len, mib, || {
        for _ in 0..mib {
            send_piece(&mut client, conn, Piece::Shared(shared.clone(), 0..len));
        }
        send(&mut client, conn, &ping);
        await_message(&mut client);
    }));
    if is_first {
        println!("client: {:?}", client.counters());
    }
    client.close(conn);
    drop(client);
    let counters = server.join().expect("server");
    if is_first {
        println!("server: {counters:?}");
    }
}

/// A stream of READs or WRITEs of the verbs, between two devices.
fn verbs(mib: usize, samples: &mut Vec<Sample>) {
    let open = |last| Device::open(address(last), &DeviceOptions::default()).expect("open");
    let (near, far) = (open(5), open(6));
    let queue = near.completion_queue(64);
    let local = near.protection_domain();
    let pair = local
        .queue_pair(&queue, &queue, 32, 32)
        .expect("a queue pair");
    let far_queue = far.completion_queue(64);
    let domain = far.protection_domain();
    let far_pair = domain
        .queue_pair(&far_queue, &far_queue, 32, 32)
        .expect("a queue pair");
    let region = domain
        .memory_region(VERB_LEN, Access::ALL)
        .expect("a region");
    pair.to_init(Access::LOCAL).expect("init");
    far_pair.to_init(Access::ALL).expect("init");
    pair.connect(&far_pair.address()).expect("connect");
    far_pair.connect(&pair.address()).expect("connect");
    for (name, op) in [
        ("verbs WRITE", SendOp::Write(region.remote(0))),
        ("verbs READ", SendOp::Read(region.remote(0))),
    ] {
        samples.push(sample(name, VERB_LEN, mib, || {
            let mut posted = 0;
            let mut done = 0;
            let mut free: Vec<_> = (0..VERB_DEPTH)
                .map(|_| local.slot(VERB_LEN).expect("a slot"))
                .collect();
            while done < mib as u64 {
                while posted < mib as u64
                    && let Some(slot) = free.pop()
                {
                    let buffer = Buffer::Slot(slot, VERB_LEN as u32);
                    pair.post_send(posted, op, buffer).expect("post");
                    posted += 1;
                }
                if let Some(completion) = queue.wait(Duration::from_secs(10)) {
                    assert_eq!(completion.status, Status::Success);
                    free.extend(completion.slot);
                    done += 1;
                }
            }
        }));
    }
}

fn tcp(mib: usize, is_first: bool, samples: &mut Vec<Sample>) {
    let round_trips = if is_first { ROUND_TRIPS } else { 1 };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
    let peer = listener.local_addr().expect("address");
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("accept");
        stream.set_nodelay(true).expect("nodelay");
        let mut buffer = vec![0; 1 << 20];
        let mut byte = [0; 64];
        for _ in 0..round_trips {
            stream.read_exact(&mut byte).expect("read");
            stream.write_all(&byte).expect("write");
        }
        while stream.read(&mut buffer).expect("read") > 0 {}
        stream.write_all(b"!").expect("write");
        // The processor time is read while this thread still counts.
        let _ = stream.read(&mut byte);
    });
    let mut stream = TcpStream::connect(peer).expect("connect");
    stream.set_nodelay(true).expect("nodelay");
    let mut ping = [b'?'; 64];
    let mut times: Vec<Duration> = (0..round_trips)
        .map(|_| {
            let start = Instant::now();
            stream.write_all(&ping).expect("write");
            stream.read_exact(&mut ping).expect("read");
            start.elapsed()
        })
        .collect();
    if is_first {
        print_round_trips("tcp", &mut times);
    }
    let message = vec![0; 1 << 20];
    samples.push(sample("tcp", 1 << 20, mib, || {
        for _ in 0..mib {
            stream.write_all(&message).expect("write");
        }
        stream
            .shutdown(std::net::Shutdown::Write)
            .expect("shutdown");
        stream.read_exact(&mut ping[..1]).expect("read");
    }));
    drop(stream);
    server.join().expect("server");
}

/// Round trips of bare datagrams between two threads asleep in recv: the floor for sleepers.
fn udp() {
    let (a, b) = (UdpSocket::bind(address(3)), UdpSocket::bind(address(4)));
    let (a, b) = (a.expect("bind"), b.expect("bind"));
    let peer = b.local_addr().expect("address");
    let server = thread::spawn(move || {
        let mut buffer = [0; 128];
        for _ in 0..ROUND_TRIPS {
            let (len, from) = b.recv_from(&mut buffer).expect("receive");
            b.send_to(&buffer[..len], from).expect("send");
        }
    });
    let mut buffer = [0; 128];
    let mut round_trips: Vec<Duration> = (0..ROUND_TRIPS)
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

fn print_table(samples: &[Sample]) {
    let median = |name: &str, figure: fn(&Sample) -> f64| {
        let of_name = samples.iter().filter(|sample| sample.name == name);
        let mut figures: Vec<f64> = of_name.map(figure).collect();
        figures.sort_by(f64::total_cmp);
        figures[figures.len() / 2]
    };
    let mut names: Vec<&str> = Vec::new();
    for sample in samples {
        if !names.contains(&sample.name.as_str()) {
            names.push(&sample.name);
        }
    }
    let rate = |name| median(name, |sample| sample.mb_per_s);
    let cpu = |name| median(name, |sample| sample.cpu_ns_per_kb);
    println!(
        "{:28} {:>10} {:>8} {:>12}",
        "", "MB/s", "of TCP", "CPU ns/kB"
    );
    for name in &names {
        let part = rate(name) / rate(names[0]);
        println!(
            "{name:28} {:10.0} {part:8.2} {:12.0}",
            rate(name),
            cpu(name)
        );
    }
}

fn main() {
    let mib = option("--mib", 512.0) as usize;
    let mut samples = Vec::new();
    udp();
    for round in 0..option("--rounds", 3.0) as usize {
        tcp(mib, round == 0, &mut samples);
        messages(mib, round == 0, &mut samples);
        verbs(mib, &mut samples);
    }
    print_table(&samples);
}
