//! Urgent messages over real sockets and rings: they overtake, and nothing else changes.

mod common;

use std::io::IoSlice;
use std::time::{Duration, Instant};

use common::{PATIENCE, Stream, config, connect, run_until};
use lowtide_transport::message::{
    ConnId, Endpoint, EndpointConfig, EndpointCtx, Event, Faults, SameHost, SendError,
};

/// Every way that messages travel here.
const WAYS: [SameHost; 3] = [SameHost::Udp, SameHost::Rings, SameHost::Direct];
/// How an urgent message of these tests begins; no ordinary one does.
const MARK: &[u8] = b"urgent! ";

/// Urgent message `number`, which says how many ordinary ones were sent before it.
fn urgent(number: u64, sent: u64) -> Vec<u8> {
    [MARK, &number.to_le_bytes(), &sent.to_le_bytes()].concat()
}

/// Its number, and how many ordinary ones were sent before it; none of an ordinary message.
fn parse(bytes: &[u8]) -> Option<(u64, u64)> {
    let (number, sent) = bytes.strip_prefix(MARK)?.split_first_chunk::<8>()?;
    let sent = u64::from_le_bytes(sent.try_into().ok()?);
    Some((u64::from_le_bytes(*number), sent))
}

/// Queues 64 MiB in messages of `len` bytes at `a`, of which the endpoint takes what it takes and the
/// rest waits with the caller; returns the messages that wait.
fn back_up(a: &mut Endpoint, conn: ConnId, len: usize) -> usize {
    let message = vec![7; len];
    let mut left = (64 << 20) / len;
    while left > 0 {
        match a.send(conn, &[IoSlice::new(&message)]) {
            Ok(()) => left -= 1,
            Err(SendError::WouldBlock) => break,
            Err(error) => panic!("{error}"),
        }
    }
    left
}

/// Ordinary messages handed up before the first urgent one, and in all, when 64 MiB of messages of
/// `len` bytes had been sent before to a peer that did not poll.
fn handed_up_before(same_host: SameHost, len: usize) -> (usize, usize) {
    let config = |node| {
        let mut config = config(node);
        config.same_host = same_host;
        config.limits.lent_max = 256 << 20;
        config
    };
    let mut a = Endpoint::bind(config(1)).unwrap();
    let mut b = Endpoint::bind(config(2)).unwrap();
    let (at_a, _) = connect(&mut a, &mut b);
    let mut left = back_up(&mut a, at_a, len);
    // The peer grants nothing, since it does nothing: this spends all credits that there are.
    for _ in 0..200 {
        a.poll(Some(Duration::from_millis(1)), &mut |_, event| {
            panic!("{event:?}")
        })
        .unwrap();
    }
    assert_eq!(left > 0, len < 100_000, "the backlog fills what there is");
    for number in 0..10 {
        a.send_urgent(at_a, &[IoSlice::new(&urgent(number, 0))])
            .unwrap();
    }
    let message = vec![7; len];
    let (mut ordinary, mut numbers, mut before) = (0, Vec::new(), 0);
    let total = (64 << 20) / len;
    run_until(
        &mut [&mut a, &mut b],
        &mut (&mut ordinary, &mut left),
        |(ordinary, left), side, ctx, event| match event {
            Event::Message { bytes, .. } if side == 1 => match parse(bytes) {
                Some((number, _)) => {
                    if numbers.is_empty() {
                        before = **ordinary;
                    }
                    numbers.push(number);
                }
                None => {
                    assert!(bytes == message);
                    **ordinary += 1;
                }
            },
            Event::Writable { conn } => {
                while **left > 0 && ctx.send(conn, &[IoSlice::new(&message)]).is_ok() {
                    **left -= 1;
                }
            }
            other => panic!("{other:?}"),
        },
        |(ordinary, _), _| **ordinary == total,
    );
    assert_eq!(numbers, (0..10).collect::<Vec<_>>(), "all, once, in order");
    let counters = b.counters();
    assert_eq!((counters.urgent_messages, counters.rcvd_rnr_err), (10, 0));
    (before, total)
}

#[test]
fn an_urgent_message_overtakes_a_backlog_of_64_mib_without_an_ordinary_credit() {
    for same_host in WAYS {
        // Whole parcels: what was posted before is ahead, and no more was than slots are held.
        let (before, total) = handed_up_before(same_host, 60_000);
        assert!(before <= 16 && total > 1000, "{before} of {total}");
        // Messages that are lent: all 64 credits are spent on offers, and fetching has only begun.
        let (before, total) = handed_up_before(same_host, 1 << 20);
        assert!(before <= 4 && total == 64, "{before} of {total}");
        // A parcel holds many small ones, so here the bound is one of parcels, 64 of a packet each.
        let (before, total) = handed_up_before(same_host, 100);
        assert!(before <= 64 * 40 && total > 600_000, "{before} of {total}");
    }
}

/// It is ahead of what waits when it is sent, and goes when the peer has given no credit back.
#[test]
fn an_urgent_message_goes_first_and_without_an_ordinary_credit() {
    const CREDITS: usize = 4;
    for same_host in WAYS {
        let config = |node| {
            let mut config = config(node);
            config.same_host = same_host;
            config.limits.credits = CREDITS as u16;
            config
        };
        let mut a = Endpoint::bind(config(1)).unwrap();
        let mut b = Endpoint::bind(config(2)).unwrap();
        let (at_a, _) = connect(&mut a, &mut b);
        // Each of them takes a parcel, and so a credit; two more than there are.
        let message = [7; 3000];
        for _ in 0..CREDITS + 2 {
            a.send(at_a, &[IoSlice::new(&message)]).unwrap();
        }
        for number in 0..2 {
            a.send_urgent(at_a, &[IoSlice::new(&urgent(number, 0))])
                .unwrap();
            for _ in 0..20 {
                a.poll(Some(Duration::from_millis(1)), &mut |_, event| {
                    panic!("{event:?}")
                })
                .unwrap();
            }
        }
        // From here on only the receiver is at work, so nothing is sent for what it gives back.
        let mut heard = Vec::new();
        run_until(
            &mut [&mut b],
            &mut heard,
            |heard, _, _, event| match event {
                Event::Message { bytes, .. } => heard.push(parse(bytes).map(|(number, _)| number)),
                other => panic!("{other:?}"),
            },
            |heard, _| heard.contains(&Some(1)),
        );
        let ordinary = [None; CREDITS];
        assert_eq!(heard, [&[Some(0)], &ordinary[..], &[Some(1)]].concat());
    }
}

/// One end of a conversation of both kinds.
struct End {
    stream: Stream,
    /// Ordinary messages handed to the endpoint, and handed up.
    sent: u64,
    received: u64,
    urgent_sent: u64,
    urgent_received: u64,
    /// Urgent messages that came before an ordinary one sent before them.
    overtaking: u64,
}

impl End {
    fn new(conn: ConnId, bytes: u64) -> End {
        End {
            stream: Stream::new(conn, bytes),
            sent: 0,
            received: 0,
            urgent_sent: 0,
            urgent_received: 0,
            overtaking: 0,
        }
    }

    fn receive(&mut self, conn: ConnId, bytes: &[u8]) {
        match parse(bytes) {
            Some((number, before)) => {
                assert_eq!(number, self.urgent_received, "lost, doubled or overtaken");
                self.urgent_received += 1;
                self.overtaking += u64::from(self.received < before);
            }
            None => {
                self.stream.receive(conn, bytes);
                self.received += 1;
            }
        }
    }

    /// Sends as many of both kinds as are taken.
    fn send(&mut self, endpoint: &mut Endpoint) {
        while !self.stream.has_sent_all() && self.stream.send_one(endpoint) {
            self.sent += 1;
        }
        let conn = self.stream.conn();
        loop {
            let message = urgent(self.urgent_sent, self.sent);
            match endpoint.send_urgent(conn, &[IoSlice::new(&message)]) {
                Ok(()) => self.urgent_sent += 1,
                Err(SendError::WouldBlock) => return,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

fn hear(ends: &mut [End; 2], side: usize, _: &mut EndpointCtx, event: Event<'_>) {
    match event {
        Event::Message { conn, bytes } => ends[side].receive(conn, bytes),
        Event::Writable { .. } => {}
        other => panic!("{other:?}"),
    }
}

/// Streams both ways while more urgent messages are sent than the lane takes: these neither hold up
/// the others nor lose their order.
fn converse(config: impl Fn(u64) -> EndpointConfig, bytes: u64) {
    let mut a = Endpoint::bind(config(1)).unwrap();
    let mut b = Endpoint::bind(config(2)).unwrap();
    let (at_a, at_b) = connect(&mut a, &mut b);
    let mut ends = [End::new(at_a, bytes), End::new(at_b, bytes)];
    run_until(&mut [&mut a, &mut b], &mut ends, hear, |ends, endpoints| {
        let is_done = ends.iter().all(|end| end.stream.is_done());
        for (end, endpoint) in ends.iter_mut().zip(endpoints.iter_mut()) {
            if !is_done {
                end.send(endpoint);
            }
        }
        is_done
    });
    // What is still under way arrives, too.
    run_until(&mut [&mut a, &mut b], &mut ends, hear, |ends, _| {
        let [first, second] = ends;
        first.urgent_received == second.urgent_sent && second.urgent_received == first.urgent_sent
    });
    for (end, endpoint) in ends.iter().zip([&a, &b]) {
        assert!(end.overtaking > 100, "{} overtook", end.overtaking);
        let counters = endpoint.counters();
        assert_eq!((counters.rcvd_rnr_err, counters.violations), (0, 0));
    }
}

#[test]
fn a_flood_of_urgent_messages_holds_up_no_others() {
    for same_host in WAYS {
        let config = |node| {
            let mut config = config(node);
            config.same_host = same_host;
            config
        };
        converse(config, 16 << 20);
    }
}

#[test]
fn a_bad_network_loses_no_urgent_message() {
    let config = |node| {
        let mut config = config(node);
        config.faults = Faults {
            seed: node,
            loss_percent: 10.0,
            duplicate_percent: 2.0,
            reorder_percent: 5.0,
            corrupt_percent: 1.0,
        };
        config
    };
    converse(config, 4 << 20);
}

/// Messages of one kind of a sender that sends again what a broken connection may have lost.
#[derive(Default)]
struct Numbers {
    /// The next to be sent on this connection; what comes before was sent on it, or has arrived.
    next: u64,
    /// The next that the receiver lacks.
    arrived: u64,
    /// Those of the connection at hand: none twice, none missing.
    last: Option<u64>,
}

impl Numbers {
    fn reconnect(&mut self) {
        self.next = self.arrived;
        self.last = None;
    }

    fn receive(&mut self, number: u64) {
        if let Some(last) = self.last {
            assert_eq!(
                number,
                last + 1,
                "doubled or lost while the connection lives"
            );
        }
        self.last = Some(number);
        assert!(number <= self.arrived, "lost over a reconnect");
        self.arrived = self.arrived.max(number + 1);
    }
}

/// The receiver is killed and comes back ten times; between, both kinds arrive without gaps.
#[test]
fn reconnecting_neither_doubles_nor_loses() {
    for same_host in WAYS {
        let base = config(2);
        let mut ours = config(1);
        ours.same_host = same_host;
        let mut a = Endpoint::bind(ours).unwrap();
        // Kinds: ordinary, urgent. Lengths of both vary by number.
        let mut kinds = [Numbers::default(), Numbers::default()];
        for incarnation in 1..=10 {
            let life = EndpointConfig {
                incarnation,
                same_host,
                ..base.clone()
            };
            let mut b = Endpoint::bind(life).unwrap();
            let (at_a, at_b) = connect(&mut a, &mut b);
            kinds.iter_mut().for_each(Numbers::reconnect);
            let goals = [0, 1].map(|kind: usize| kinds[kind].arrived + 300);
            run_until(
                &mut [&mut a, &mut b],
                &mut kinds,
                |kinds, _, _, event| match event {
                    Event::Message { conn, bytes } => {
                        assert_eq!(conn, at_b);
                        let (kind, number) = bytes.split_first_chunk::<1>().unwrap();
                        let number = number.first_chunk::<8>().unwrap();
                        kinds[usize::from(kind[0])].receive(u64::from_le_bytes(*number));
                    }
                    Event::Writable { .. } => {}
                    other => panic!("{other:?}"),
                },
                |kinds, ends| {
                    for (kind, numbers) in kinds.iter_mut().enumerate() {
                        // Some in flight when the connection breaks.
                        while numbers.next < goals[kind] + 200 {
                            let number = numbers.next.to_le_bytes();
                            let filler = vec![0; [90_000, 5_000, 10][numbers.next as usize % 3]];
                            let filler = &filler[..filler.len().min([90_000, 5_000][kind])];
                            let kind_byte = [kind as u8];
                            let parts = [&kind_byte[..], &number, filler].map(IoSlice::new);
                            let sent = match kind {
                                0 => ends[0].send(at_a, &parts),
                                _ => ends[0].send_urgent(at_a, &parts),
                            };
                            match sent {
                                Ok(()) => numbers.next += 1,
                                Err(SendError::WouldBlock) => break,
                                Err(error) => panic!("{error}"),
                            }
                        }
                    }
                    (0..2).all(|kind| kinds[kind].arrived >= goals[kind])
                },
            );
            assert!(a.is_sending(at_a), "something is lost with the connection");
            // As if killed: no goodbye arrives.
            b.set_blocked(a.local_addr(), true);
            drop(b);
            a.close(at_a);
        }
        assert!(kinds.iter().all(|numbers| numbers.arrived >= 3_000));
    }
}

#[test]
fn what_cannot_be_sent_as_urgent_is_refused() {
    let mut a = Endpoint::bind(config(1)).unwrap();
    let mut b = Endpoint::bind(config(2)).unwrap();
    let early = a.connect(b.local_addr(), b"");
    let ping = [IoSlice::new(b"ping")];
    assert_eq!(a.send_urgent(early, &ping), Err(SendError::WouldBlock));
    a.close(early);
    assert_eq!(a.send_urgent(early, &ping), Err(SendError::Closed));
    let (at_a, _) = connect(&mut a, &mut b);
    let long = vec![1; 61_425];
    assert_eq!(
        a.send_urgent(at_a, &[IoSlice::new(&long)]),
        Err(SendError::TooLarge)
    );
    // One of several packets is whole, and one that was refused is told when there is room.
    a.send_urgent(at_a, &[IoSlice::new(&long[1..])]).unwrap();
    let mut sent = 1;
    while a.send_urgent(at_a, &[IoSlice::new(&long[1..])]).is_ok() {
        sent += 1;
    }
    assert!(sent <= 4, "memory is bounded");
    let (mut received, mut is_writable, start) = (0, false, Instant::now());
    while received < sent || !is_writable {
        assert!(start.elapsed() < PATIENCE);
        for (side, end) in [&mut a, &mut b].into_iter().enumerate() {
            end.poll(Some(Duration::ZERO), &mut |_, event| match event {
                Event::Message { bytes, .. } if side == 1 => {
                    assert!(bytes == &long[1..]);
                    received += 1;
                }
                Event::Writable { conn } => is_writable |= conn == at_a,
                other => panic!("{other:?}"),
            })
            .unwrap();
        }
    }
}
