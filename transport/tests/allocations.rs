//! Messages in steady state cost no allocation, at either end: pools are filled once.
//!
//! A program of its own, for the allocator that counts.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::IoSlice;
use std::sync::Arc;
use std::time::Duration;

use common::{config, connect};
use lowtide_transport::message::{ConnId, Endpoint, Event, Piece};

/// The system's allocator, counting what each thread asks of it.
struct Counting;

thread_local! {
    static ASKED: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    ASKED.with(|asked| asked.set(asked.get() + 1));
}

// SAFETY: every call is handed on to the system's allocator unchanged; counting touches a cell of the
// thread that needs neither a destructor nor memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise is the one that is asked for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of this thread during `act`.
fn during(act: impl FnOnce()) -> u64 {
    let before = ASKED.get();
    act();
    ASKED.get() - before
}

/// Polls both ends until `b` has heard `count` messages in all.
fn hear(a: &mut Endpoint, b: &mut Endpoint, heard: &mut u64, count: u64) {
    while *heard < count {
        a.poll(Some(Duration::ZERO), &mut |_, _| {}).unwrap();
        b.poll(Some(Duration::ZERO), &mut |_, event| {
            *heard += u64::from(matches!(event, Event::Message { .. }));
        })
        .unwrap();
    }
}

/// Allocations that 500 messages cost once 500 have gone before.
fn in_steady_state(mut send: impl FnMut(&mut Endpoint, ConnId)) -> u64 {
    const MESSAGES: u64 = 500;
    let (mut a, mut b) = (
        Endpoint::bind(config(1)).unwrap(),
        Endpoint::bind(config(2)).unwrap(),
    );
    let (conn, _) = connect(&mut a, &mut b);
    let mut heard = 0;
    let mut run = |end: u64| {
        while heard < end {
            // Two at once, so that pools hold more than one of a kind.
            let next = heard + 2;
            send(&mut a, conn);
            send(&mut a, conn);
            hear(&mut a, &mut b, &mut heard, next);
        }
    };
    run(MESSAGES);
    during(|| run(2 * MESSAGES))
}

#[test]
fn the_counter_counts() {
    assert_eq!(during(|| drop(std::hint::black_box(Box::new(1)))), 1);
}

/// One datagram, handed up where it arrived.
#[test]
fn a_short_message_allocates_nothing() {
    let bytes = vec![7; 1000];
    let asked = in_steady_state(|a, conn| a.send(conn, &[IoSlice::new(&bytes)]).unwrap());
    assert_eq!(asked, 0);
}

/// Several datagrams, put together.
#[test]
fn a_message_of_several_packets_allocates_nothing() {
    let bytes = vec![7; 60_000];
    let asked = in_steady_state(|a, conn| a.send(conn, &[IoSlice::new(&bytes)]).unwrap());
    assert_eq!(asked, 0);
}

/// Lent in pieces by one end, fetched by READ by the other.
#[test]
fn a_fetched_message_allocates_nothing() {
    let bytes: Arc<[u8]> = vec![7; 1 << 20].into();
    let mut pieces = Vec::with_capacity(2);
    let asked = in_steady_state(|a, conn| {
        pieces.push(Piece::Shared(bytes.clone(), 0..100));
        pieces.push(Piece::Shared(bytes.clone(), 100..1 << 20));
        a.send_pieces(conn, &mut pieces).unwrap();
    });
    assert_eq!(asked, 0);
}
