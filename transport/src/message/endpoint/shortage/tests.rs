//! softroce's table of regions is full: it refuses as a device does that may lock no more.

use std::io::IoSlice;
use std::time::{Duration, Instant};

use super::super::super::{CloseReason, ConnId, Event, SendError};
use super::super::Endpoint;
use super::super::tests::{PATIENCE, endpoint};
use super::*;
use crate::memory::{Key, Memory};

/// A message that is fetched.
const LONG: usize = 200_000;

/// Two connected ends, and what each was told.
struct Pair {
    ends: [Endpoint; 2],
    conns: [Option<ConnId>; 2],
    heard: [usize; 2],
    is_writable: [bool; 2],
    closed: [Option<CloseReason>; 2],
}

impl Pair {
    fn new() -> Pair {
        let mut pair = Pair {
            ends: [endpoint(1), endpoint(2)],
            conns: [None; 2],
            heard: [0; 2],
            is_writable: [false; 2],
            closed: [None; 2],
        };
        let there = pair.ends[1].local_addr();
        pair.ends[0].connect(there, b"");
        pair.until(|pair| pair.conns.iter().all(Option::is_some));
        pair
    }

    fn until(&mut self, done: impl Fn(&Pair) -> bool) {
        let start = Instant::now();
        while !done(self) {
            assert!(start.elapsed() < PATIENCE, "nothing more happens");
            for side in [0, 1] {
                let Pair {
                    ends,
                    conns,
                    heard,
                    is_writable,
                    closed,
                } = self;
                let mut note = |_: &mut EndpointCtx, event: Event<'_>| match event {
                    Event::Connected { conn, .. } => conns[side] = Some(conn),
                    Event::Message { bytes, .. } => heard[side] += bytes.len(),
                    Event::Writable { .. } => is_writable[side] = true,
                    Event::Closed { reason, .. } => closed[side] = Some(reason),
                };
                let pause = Duration::from_millis(1);
                ends[side].poll(Some(pause), &mut note).unwrap();
            }
        }
    }

    fn send(&mut self, side: usize, len: usize) -> Result<(), SendError> {
        let conn = self.conns[side].unwrap();
        self.ends[side].send(conn, &[IoSlice::new(&vec![7; len])])
    }

    /// Takes all room that the device of one side has for regions; the keys of what takes it.
    fn fill(&mut self, side: usize) -> Vec<Key> {
        let memory = &mut self.ends[side].ctx.device.soft().unwrap().memory;
        let keys = std::iter::from_fn(|| memory.register_private(9, 1));
        keys.take(Memory::REGIONS_MAX).collect()
    }

    fn free(&mut self, side: usize, keys: &[Key]) {
        let memory = &mut self.ends[side].ctx.device.soft().unwrap().memory;
        for key in keys {
            memory.deregister(*key);
        }
    }
}

#[test]
fn a_send_that_found_no_memory_is_tried_again_when_there_is_some() {
    let mut pair = Pair::new();
    let keys = pair.fill(0);
    assert_eq!(pair.send(0, 100), Err(SendError::WouldBlock));
    // It is asked to try again, is refused again, and waits on.
    for _ in 0..3 {
        pair.until(|pair| pair.is_writable[0]);
        pair.is_writable[0] = false;
        assert_eq!(pair.send(0, 100), Err(SendError::WouldBlock));
    }
    pair.free(0, &keys[..4]);
    pair.until(|pair| pair.is_writable[0]);
    pair.send(0, 100).unwrap();
    pair.until(|pair| pair.heard[1] == 100);
    assert_eq!(pair.closed, [None; 2]);
    pair.until(|pair| pair.ends[0].ctx.next_retry.is_none());
}

#[test]
fn a_send_that_never_finds_memory_ends_its_connection() {
    let mut pair = Pair::new();
    pair.ends[0].ctx.shortage_max = PAUSE;
    pair.fill(0);
    assert_eq!(pair.send(0, 100), Err(SendError::WouldBlock));
    pair.until(|pair| pair.closed.iter().all(Option::is_some));
    assert_eq!(pair.closed[0], Some(CloseReason::NoMemory));
    assert_eq!(pair.closed[1], Some(CloseReason::PeerClosed));
    assert_eq!(pair.send(0, 100), Err(SendError::Closed));
}

#[test]
fn an_offer_that_found_no_slab_is_fetched_when_there_is_one() {
    let mut pair = Pair::new();
    let keys = pair.fill(1);
    pair.send(0, LONG).unwrap();
    pair.until(|pair| pair.ends[1].ctx.next_retry.is_some());
    pair.free(1, &keys[..4]);
    pair.until(|pair| pair.heard[1] == LONG);
    assert_eq!(pair.closed, [None; 2]);
}

#[test]
fn an_offer_that_never_finds_a_slab_ends_its_connection_at_both_ends() {
    let mut pair = Pair::new();
    pair.ends[1].ctx.shortage_max = PAUSE;
    pair.fill(1);
    pair.send(0, LONG).unwrap();
    pair.until(|pair| pair.closed.iter().all(Option::is_some));
    assert_eq!(pair.closed[1], Some(CloseReason::NoMemory));
    assert!(!pair.ends[0].ctx.lending.is_any_lent());
}

/// Whoever hears only, and has no memory to say so, would let its peer run out of credits.
#[test]
fn credits_that_found_no_memory_are_told_later() {
    let mut pair = Pair::new();
    let keys = pair.fill(1);
    let (mut sent, start) = (0, Instant::now());
    while pair.ends[1].ctx.next_retry.is_none() {
        assert!(start.elapsed() < PATIENCE);
        if pair.send(0, 5000).is_ok() {
            sent += 5000;
        }
        let heard = pair.heard[1];
        pair.until(|pair| pair.heard[1] > heard || pair.ends[1].ctx.next_retry.is_some());
    }
    pair.free(1, &keys[..4]);
    for _ in 0..200 {
        while pair.send(0, 5000).is_err() {
            pair.is_writable[0] = false;
            pair.until(|pair| pair.is_writable[0]);
        }
        sent += 5000;
    }
    pair.until(|pair| pair.heard[1] == sent);
    assert_eq!(pair.closed, [None; 2]);
}

#[test]
fn waiting_has_no_end_while_something_of_ours_may_come_back() {
    let mut pair = Pair::new();
    pair.ends[0].ctx.shortage_max = PAUSE;
    // Lent, and not yet taken: the peer does not work.
    pair.send(0, LONG).unwrap();
    pair.fill(0);
    let conn = pair.conns[0].unwrap();
    let index = pair.ends[0].ctx.index(conn).unwrap();
    pair.ends[0].ctx.note_memory(index, Need::Send, true);
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(200) {
        let pause = Duration::from_millis(10);
        let mut note = |_: &mut EndpointCtx, event: Event<'_>| {
            assert!(!matches!(event, Event::Closed { .. }), "{event:?}");
        };
        pair.ends[0].poll(Some(pause), &mut note).unwrap();
    }
    assert!(pair.ends[0].ctx.next_retry.is_some());
}
