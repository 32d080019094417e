//! Two processes: one is paused for five seconds, then killed and started again; over the network, and
//! through shared memory.
//!
//! Nothing is lost by the pause; the kill is noticed by the new incarnation alone.

mod common;

use std::net::SocketAddr;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use common::{PATIENCE, Stream};
use lowtide_transport::message::{
    CloseReason, ConnId, Endpoint, EndpointConfig, EndpointCtx, Event, SameHost,
};

const PAUSE: Duration = Duration::from_secs(5);
const BYTES: u64 = 64 << 20;

/// The other process: connects to `parent` and streams both ways until it is closed.
fn child(own: SocketAddr, parent: SocketAddr, incarnation: u64, same_host: SameHost) {
    let mut config = EndpointConfig::new(own, 2, incarnation);
    config.same_host = same_host;
    let mut endpoint = Endpoint::bind(config).unwrap();
    let conn = endpoint.connect(parent, b"child");
    let mut stream = Stream::new(conn, BYTES);
    let mut is_over = false;
    while !is_over {
        stream.send(&mut endpoint);
        let polled = endpoint.poll(Some(Duration::from_secs(1)), &mut |_, event| match event {
            Event::Message { conn, bytes } => stream.receive(conn, bytes),
            Event::Closed { .. } => is_over = true,
            _ => {}
        });
        polled.unwrap();
    }
    assert!(stream.is_done());
}

/// The other process, which takes the same way as our `endpoint`.
fn start_child(own: SocketAddr, endpoint: &Endpoint, incarnation: u64, way: SameHost) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args([
            "--child",
            &own.to_string(),
            &endpoint.local_addr().to_string(),
            &incarnation.to_string(),
            match way {
                SameHost::Udp => "udp",
                _ => "host",
            },
        ])
        .spawn()
        .unwrap()
}

fn signal(child: &Child, name: &str) {
    let status = Command::new("kill")
        .args([name, &child.id().to_string()])
        .status()
        .unwrap();
    assert!(status.success());
}

/// Polls until `done`, sending whatever `stream` has to send.
fn run(
    endpoint: &mut Endpoint,
    stream: &mut Option<Stream>,
    mut handler: impl FnMut(&mut Option<Stream>, &mut EndpointCtx, Event<'_>),
    mut done: impl FnMut(&Option<Stream>) -> bool,
) {
    let start = Instant::now();
    while !done(stream) {
        assert!(start.elapsed() < PATIENCE, "{:?}", endpoint.counters());
        if let Some(stream) = stream {
            stream.send(endpoint);
        }
        let step = Some(Duration::from_millis(20));
        endpoint
            .poll(step, &mut |ctx, event| handler(stream, ctx, event))
            .unwrap();
    }
}

/// Takes what a healthy connection brings; anything else is a failure.
fn healthy(stream: &mut Option<Stream>, _: &mut EndpointCtx, event: Event<'_>) {
    match event {
        Event::Connected { conn, .. } => *stream = Some(Stream::new(conn, BYTES)),
        Event::Message { conn, bytes } => stream.as_mut().unwrap().receive(conn, bytes),
        Event::Writable { .. } => {}
        other => panic!("{other:?}"),
    }
}

fn received(stream: &Option<Stream>) -> u64 {
    stream.as_ref().map_or(0, Stream::received)
}

fn pause_and_continue(endpoint: &mut Endpoint, own: SocketAddr, way: SameHost) -> (Child, ConnId) {
    let mut stream = None;
    let process = start_child(own, endpoint, 1, way);
    run(endpoint, &mut stream, healthy, |stream| {
        received(stream) > BYTES / 4
    });
    signal(&process, "-STOP");
    let paused = Instant::now();
    run(endpoint, &mut stream, healthy, |_| paused.elapsed() > PAUSE);
    assert!(!stream.as_ref().unwrap().is_done());
    signal(&process, "-CONT");
    run(endpoint, &mut stream, healthy, |stream| {
        stream.as_ref().unwrap().is_done()
    });
    (process, stream.unwrap().conn())
}

fn kill_and_restart(
    endpoint: &mut Endpoint,
    own: SocketAddr,
    (mut process, old): (Child, ConnId),
    way: SameHost,
) {
    process.kill().unwrap();
    process.wait().unwrap();
    let mut process = start_child(own, endpoint, 2, way);
    let mut stream = None;
    let mut is_closed = false;
    run(
        endpoint,
        &mut stream,
        |stream, ctx, event| match event {
            Event::Closed { conn, reason } => {
                assert_eq!(conn, old);
                // Shared memory tells of a death at once, perhaps before the next incarnation speaks.
                let is_seen_at_once = way != SameHost::Udp && reason == CloseReason::Failed;
                assert!(
                    is_seen_at_once || reason == CloseReason::PeerRestarted,
                    "{reason:?}"
                );
                is_closed = true;
            }
            event => healthy(stream, ctx, event),
        },
        |stream| stream.as_ref().is_some_and(Stream::is_done),
    );
    assert!(is_closed);
    // What we have sent may still be on its way: the child checks that all of it comes.
    let conn = stream.as_ref().unwrap().conn();
    while endpoint.is_sending(conn) {
        endpoint
            .poll(Some(Duration::from_millis(20)), &mut |_, _| {})
            .unwrap();
    }
    endpoint.close(conn);
    // Should the goodbye be lost, the child asks again.
    let start = Instant::now();
    let status = loop {
        assert!(start.elapsed() < PATIENCE);
        endpoint
            .poll(Some(Duration::from_millis(20)), &mut |_, _| {})
            .unwrap();
        if let Some(status) = process.try_wait().unwrap() {
            break status;
        }
    };
    assert!(status.success());
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if let [_, flag, own, parent, incarnation, way] = &args[..]
        && flag == "--child"
    {
        let way = match way.as_str() {
            "udp" => SameHost::Udp,
            _ => SameHost::Direct,
        };
        let (own, parent) = (own.parse().unwrap(), parent.parse().unwrap());
        child(own, parent, incarnation.parse().unwrap(), way);
        return;
    }
    for (name, way) in [("udp", SameHost::Udp), ("host", SameHost::Direct)] {
        let mut config = common::config(1);
        config.same_host = way;
        let mut endpoint = Endpoint::bind(config).unwrap();
        let own = common::address();
        let (process, conn) = pause_and_continue(&mut endpoint, own, way);
        let by_ring = usize::from(way != SameHost::Udp);
        assert_eq!(endpoint.paths(), (by_ring, 1 - by_ring));
        println!("test {name}::a_pause_of_five_seconds_loses_nothing ... ok");
        kill_and_restart(&mut endpoint, own, (process, conn), way);
        println!("test {name}::a_killed_peer_is_replaced_by_its_next_incarnation ... ok");
    }
}
