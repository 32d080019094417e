//! Peers that break the rules of long messages: each loses its connection, and nobody else notices.
//!
//! A hostile peer is one of our own endpoints whose state is tampered with: what it then sends is
//! well-formed down to the ICRC.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU8, Ordering};

use super::super::parcel::Offer;
use super::super::{Limits, Violation};
use super::*;
use crate::memory::{Key, Lent};

const MIB: usize = 1 << 20;
pub(super) const PATIENCE: Duration = Duration::from_secs(120);

pub(super) fn endpoint(node: u64) -> Endpoint {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let pid = std::process::id();
    let (high, low) = ((pid >> 7 & 0x7F) as u8, (pid & 0x7F) as u8);
    // Beside the addresses of the test programs.
    let ip = Ipv4Addr::new(
        127,
        high | 0x20,
        1 + low,
        NEXT.fetch_add(1, Ordering::Relaxed),
    );
    let mut config = EndpointConfig::new(SocketAddr::from((ip, 4791)), node, 1);
    config.limits = Limits {
        lent_max: 4 * MIB,
        fetched_max: 4 * MIB,
        ..Limits::default()
    };
    Endpoint::bind(config).unwrap()
}

/// A victim, an honest peer and a hostile one; connections as (victim's, peer's).
struct World {
    ends: [Endpoint; 3],
    honest: (ConnId, ConnId),
    hostile: (ConnId, ConnId),
    heard: usize,
    closed: [Option<CloseReason>; 3],
    /// Long messages of the honest peer's, both ways.
    message: Vec<u8>,
}

const VICTIM: usize = 0;
const HONEST: usize = 1;
const HOSTILE: usize = 2;

impl World {
    fn new() -> World {
        let mut world = World {
            ends: [endpoint(1), endpoint(2), endpoint(3)],
            honest: (ConnId(0), ConnId(0)),
            hostile: (ConnId(0), ConnId(0)),
            heard: 0,
            closed: [None; 3],
            message: (0..300_000).map(|i| ((i * 7) >> 3) as u8).collect(),
        };
        world.honest = world.connect(HONEST);
        world.hostile = world.connect(HOSTILE);
        world
    }

    fn connect(&mut self, peer: usize) -> (ConnId, ConnId) {
        let victim = self.ends[VICTIM].local_addr();
        let theirs = self.ends[peer].connect(victim, b"");
        let mut ours = None;
        let mut is_up = false;
        let start = Instant::now();
        while ours.is_none() || !is_up {
            assert!(start.elapsed() < PATIENCE);
            for side in [VICTIM, peer] {
                self.ends[side]
                    .poll(Some(Duration::ZERO), &mut |_, event| match event {
                        Event::Connected { conn, .. } if side == VICTIM => ours = Some(conn),
                        Event::Connected { .. } => is_up = true,
                        other => panic!("{other:?}"),
                    })
                    .unwrap();
            }
        }
        (ours.unwrap(), theirs)
    }

    fn turn(&mut self) {
        let World {
            ends,
            heard,
            closed,
            message,
            ..
        } = self;
        for (side, end) in ends.iter_mut().enumerate() {
            end.poll(Some(Duration::ZERO), &mut |_, event| match event {
                Event::Message { bytes, .. } => {
                    assert!(bytes == *message, "only what is honest is handed up");
                    *heard += 1;
                }
                Event::Closed { reason, .. } => closed[side] = Some(reason),
                Event::Writable { .. } => {}
                other => panic!("{other:?}"),
            })
            .unwrap();
        }
    }

    fn until(&mut self, done: impl Fn(&World) -> bool) {
        let start = Instant::now();
        while !done(self) {
            assert!(start.elapsed() < PATIENCE, "nothing more happens");
            self.turn();
        }
    }

    /// The stream of one side of a connection.
    fn stream(&mut self, side: usize, conn: ConnId) -> (&mut EndpointCtx, u32) {
        let ctx = &mut self.ends[side].ctx;
        let index = ctx.index(conn).expect("it is open");
        (ctx, index)
    }

    /// The hostile peer says that it has a message, which need not be so.
    fn lie(&mut self, len: u32, key: u32, offer: Offer) {
        let conn = self.hostile.1;
        let (ctx, index) = self.stream(HOSTILE, conn);
        let stream = ctx.connections[index as usize].as_mut().unwrap();
        let outbox = &mut stream.stream.as_mut().unwrap().outbox;
        let memory = ctx.device.memory();
        outbox
            .push_offer(&mut ctx.pool, memory, (len, Key(key)), offer)
            .unwrap();
        ctx.mark_dirty(index);
    }

    /// The victim has closed the hostile connection for this reason, and serves the honest peer.
    fn expect(&mut self, violation: Violation) {
        self.until(|world| world.closed[VICTIM].is_some());
        let reason = CloseReason::Violation(violation);
        assert_eq!(self.closed[VICTIM].take(), Some(reason));
        self.is_unharmed(1);
    }

    fn is_unharmed(&mut self, violations: u64) {
        let (at_victim, at_honest) = self.honest;
        let before = self.heard;
        let message = self.message.clone();
        for _ in 0..3 {
            self.ends[VICTIM]
                .send(at_victim, &[IoSlice::new(&message)])
                .unwrap();
            self.ends[HONEST]
                .send(at_honest, &[IoSlice::new(&message)])
                .unwrap();
        }
        self.until(|world| world.heard == before + 6 && world.ends.iter().all(World::is_quiet));
        assert_eq!(self.closed[HONEST], None);
        assert_eq!(self.ends[VICTIM].counters().violations, violations);
    }

    /// Whether nothing is lent or fetched.
    fn is_quiet(end: &Endpoint) -> bool {
        !end.ctx.lending.is_any_lent() && end.ctx.fetching.is_idle()
    }
}

fn offer(number: u32) -> Offer {
    Offer { address: 0, number }
}

#[test]
fn an_offer_with_a_wrong_key_closes_its_connection_alone() {
    for key in [0, 1, 0x100, 0x101, 1 << 28, 0x8000_0000, u32::MAX] {
        let mut world = World::new();
        world.lie(100_000, key, offer(0));
        world.expect(Violation::OfferKey);
    }
}

#[test]
fn an_offer_of_another_length_closes_its_connection_alone() {
    for len in [0, 1, 61_424, MIB as u32 + 1, 1 << 31, u32::MAX] {
        let mut world = World::new();
        world.lie(len, 0x8000_0000, offer(0));
        world.expect(Violation::Length);
    }
}

#[test]
fn an_offer_beyond_what_is_lent_closes_its_connection_alone() {
    for (len, address) in [
        (100_001, 0),
        (100_000, 1),
        (100_000, u64::MAX - 100),
        (70_000, 1 << 40),
    ] {
        let mut world = World::new();
        let conn = world.hostile.1;
        let (ctx, index) = world.stream(HOSTILE, conn);
        let key = Key(0xABCD_EF01);
        let stream = ctx.connections[index as usize].as_mut().unwrap();
        let loans = &mut stream.stream.as_mut().unwrap().loans;
        let lent = Lent::new([Piece::Owned(vec![1; 100_000])]);
        loans
            .lend(&mut ctx.lending, ctx.device.memory(), &mut || key.0, lent)
            .unwrap();
        world.lie(len, key.0, Offer { address, number: 0 });
        world.expect(Violation::OfferKey);
    }
}

#[test]
fn a_repeated_or_missing_offer_closes_its_connection_alone() {
    for numbers in [&[0, 0][..], &[1], &[0, 2], &[0, 1, 0], &[u32::MAX]] {
        let mut world = World::new();
        for number in numbers {
            world.lie(100_000, 0x8000_0000, offer(*number));
        }
        world.expect(Violation::OfferOrder);
    }
}

#[test]
fn who_takes_what_was_not_offered_loses_its_connection() {
    let mut world = World::new();
    let conn = world.hostile.1;
    let (ctx, index) = world.stream(HOSTILE, conn);
    let stream = ctx.connections[index as usize].as_mut().unwrap();
    stream.stream.as_mut().unwrap().inbox.set_taken(7);
    ctx.mark_dirty(index);
    world.expect(Violation::Taken);
}

#[test]
fn a_key_is_worth_nothing_on_another_connection() {
    let mut world = World::new();
    // The victim lends to the honest peer, which does not fetch yet.
    let message = world.message.clone();
    let at_victim = world.honest.0;
    world.ends[VICTIM]
        .send(at_victim, &[IoSlice::new(&message)])
        .unwrap();
    let (ctx, index) = world.stream(VICTIM, at_victim);
    let stream = ctx.connections[index as usize].as_ref().unwrap();
    let key = stream.stream.as_ref().unwrap().loans.newest_key();
    // The hostile one has learnt the key, and READs.
    let conn = world.hostile.1;
    let (ctx, index) = world.stream(HOSTILE, conn);
    let stream = ctx.connections[index as usize].as_mut().unwrap();
    let inbox = &mut stream.stream.as_mut().unwrap().inbox;
    inbox
        .offer(message.len() as u32, key.0, offer(0), MIB)
        .unwrap();
    ctx.fetching.enter(inbox, index);
    world.until(|world| world.closed[VICTIM].is_some() && world.closed[HOSTILE].is_some());
    let refused = CloseReason::Violation(Violation::OfferKey);
    assert_eq!(world.closed[HOSTILE], Some(refused), "no byte was read");
    assert_eq!(world.closed[VICTIM].take(), Some(CloseReason::Failed));
    world.until(|world| world.heard == 1 && World::is_quiet(&world.ends[VICTIM]));
    world.is_unharmed(0);
}

#[test]
fn random_offers_are_never_believed() {
    let mut state = 0x1234_5678_9ABC_DEF1u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut world = World::new();
    for round in 1..=60 {
        let len = match next() % 3 {
            0 => next() as u32,
            _ => 61_425 + (next() % MIB as u64) as u32,
        };
        let offer = Offer {
            address: if next() % 2 == 0 { 0 } else { next() },
            number: if next() % 4 == 0 { next() as u32 } else { 0 },
        };
        world.lie(len, next() as u32, offer);
        world.until(|world| world.closed[VICTIM].is_some());
        let reason = world.closed[VICTIM].take().unwrap();
        assert!(matches!(reason, CloseReason::Violation(_)), "{reason:?}");
        world.is_unharmed(round);
        world.until(|world| world.closed[HOSTILE].is_some());
        world.closed[HOSTILE] = None;
        world.hostile = world.connect(HOSTILE);
    }
}

#[test]
fn urgent_messages_need_no_ordinary_credit() {
    let mut world = World::new();
    let conns = [world.honest.0, world.honest.1];
    let set_credits = |world: &mut World, credits: [u16; 2]| {
        let mut before = [0; 2];
        for side in [VICTIM, HONEST] {
            let (ctx, index) = world.stream(side, conns[side]);
            let connection = ctx.connections[index as usize].as_mut().unwrap();
            let stream = connection.stream.as_mut().unwrap();
            before[side] = stream.replace_credits(credits[side]);
            ctx.mark_dirty(index);
        }
        before
    };
    let granted = set_credits(&mut world, [0; 2]);
    let mut heard: [Vec<Vec<u8>>; 2] = Default::default();
    let mut until = |world: &mut World, count: usize| {
        let start = Instant::now();
        while heard.iter().any(|side| side.len() < count) {
            assert!(start.elapsed() < PATIENCE, "nothing more happens");
            for (side, heard) in heard.iter_mut().enumerate() {
                let poll =
                    world.ends[side].poll(Some(Duration::ZERO), &mut |_, event| match event {
                        Event::Message { bytes, .. } => heard.push(bytes.to_vec()),
                        other => panic!("{other:?}"),
                    });
                poll.unwrap();
            }
        }
        heard.clone()
    };
    for (side, conn) in conns.into_iter().enumerate() {
        let ordinary = [IoSlice::new(b"ordinary")];
        world.ends[side].send(conn, &ordinary).unwrap();
    }
    // Far more than there are urgent credits, so these come back without any other traffic.
    let expected: Vec<Vec<u8>> = (0..1000u32).map(|n| n.to_le_bytes().to_vec()).collect();
    for (round, message) in expected.iter().enumerate() {
        for (side, conn) in conns.into_iter().enumerate() {
            let urgent = [IoSlice::new(message)];
            world.ends[side].send_urgent(conn, &urgent).unwrap();
        }
        until(&mut world, round + 1);
    }
    assert_eq!(
        until(&mut world, 1000),
        [expected.clone(), expected.clone()]
    );
    set_credits(&mut world, granted);
    for side in until(&mut world, 1001) {
        assert_eq!(side.last().unwrap(), b"ordinary");
    }
}
