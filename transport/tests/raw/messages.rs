//! Messages on a device that may lock no more memory.
//!
//! Each test is a process of its own here, so it may give its rights up.

use std::io::IoSlice;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use lowtide_transport::ibv::{self, choose_gid};
use lowtide_transport::message::{CloseReason, ConnId, Endpoint, EndpointConfig, Event, SendError};

use crate::common::{self, PATIENCE};
use crate::provider::device_name;

/// A message that is lent and fetched.
const LONG: usize = 300_000;

/// An endpoint on one of the devices of `LOWTIDE_DEVICE`.
fn endpoint(turn: usize) -> Endpoint {
    let name = device_name(turn);
    let gids = ibv::Context::open(&name).unwrap().gids(1).unwrap();
    let gid = choose_gid(&gids, Ipv4Addr::new(192, 0, 2, 1).into()).unwrap();
    let addr = (gid.gid.ip(), 9000 + turn as u16).into();
    Endpoint::bind(EndpointConfig {
        device: Some(name),
        ..EndpointConfig::new(addr, turn as u64 + 1, 1)
    })
    .unwrap()
}

/// What the sender was told, and how much the other heard.
#[derive(Default)]
struct Told {
    is_writable: bool,
    closed: Option<CloseReason>,
    heard: usize,
}

fn until(ends: &mut [Endpoint; 2], told: &mut Told, done: impl Fn(&Told) -> bool) {
    let start = Instant::now();
    while !done(told) {
        assert!(start.elapsed() < PATIENCE, "nothing more happens");
        for (side, end) in ends.iter_mut().enumerate() {
            end.poll(
                Some(Duration::from_millis(1)),
                &mut |_, event| match event {
                    Event::Writable { .. } if side == 0 => told.is_writable = true,
                    Event::Closed { reason, .. } if side == 0 => told.closed = Some(reason),
                    Event::Message { bytes, .. } => told.heard += bytes.len(),
                    _ => {}
                },
            )
            .unwrap();
        }
    }
}

/// Two connected ends (devices opened before are of no more use), the first of which was refused the memory for a message.
fn refused() -> ([Endpoint; 2], ConnId, Vec<u8>) {
    common::be_as_anybody();
    let mut ends = [endpoint(0), endpoint(1)];
    let [a, b] = &mut ends;
    let (conn, _) = common::connect(a, b);
    let message = vec![7; LONG];
    common::may_lock(0);
    let refused = ends[0].send(conn, &[IoSlice::new(&message)]);
    assert_eq!(refused, Err(SendError::WouldBlock));
    (ends, conn, message)
}

#[test]
fn a_message_that_could_not_be_registered_goes_when_it_can() {
    let (mut ends, conn, message) = refused();
    let mut told = Told::default();
    until(&mut ends, &mut told, |told| told.is_writable);
    let refused = ends[0].send(conn, &[IoSlice::new(&message)]);
    assert_eq!(refused, Err(SendError::WouldBlock));
    common::may_lock(libc::RLIM_INFINITY);
    told.is_writable = false;
    until(&mut ends, &mut told, |told| told.is_writable);
    ends[0].send(conn, &[IoSlice::new(&message)]).unwrap();
    until(&mut ends, &mut told, |told| told.heard == LONG);
    assert_eq!(told.closed, None);
}

#[test]
fn a_message_that_cannot_be_registered_ends_its_connection() {
    let (mut ends, conn, message) = refused();
    let mut told = Told::default();
    until(&mut ends, &mut told, |told| told.closed.is_some());
    assert_eq!(told.closed, Some(CloseReason::NoMemory));
    let refused = ends[0].send(conn, &[IoSlice::new(&message)]);
    assert_eq!(refused, Err(SendError::Closed));
}
