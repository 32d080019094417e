//! The handshake in every order, over a network that loses and repeats.

use super::*;
use crate::wire::{Mtu, Psn};
use std::vec;
use std::vec::Vec;

mod inquiries;
mod patience;
mod refusals;

const CLIENT: usize = 0;
const SERVER: usize = 1;

fn at(i: usize) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1 + i as u8], 4791))
}

fn offer(n: u32) -> QpOffer {
    QpOffer {
        qpn: Qpn::new(0x100 + n),
        psn: Psn::new(0xabc000 + n),
        responder_resources: 4,
        initiator_depth: 5,
        rnr_retry: 7,
    }
}

fn params(private_data: &[u8]) -> ConnectParams<'_> {
    ConnectParams {
        to: at(SERVER),
        service: ServiceId::tcp(7471),
        source_port: 40_000,
        qp: offer(0),
        mtu: Mtu::B4096,
        retry_count: 7,
        ack_timeout: 17,
        private_data,
    }
}

/// Two managers. Datagrams are carried by hand, or all at once.
struct Pair {
    cm: [Cm; 2],
    now: Nanos,
}

impl Pair {
    fn new() -> Self {
        let cm = |i: usize| {
            Cm::new(CmConfig::new(
                at(i).ip(),
                0xa0 + i as u64,
                100 * i as u32 + 1,
            ))
        };
        let mut pair = Self {
            cm: [cm(CLIENT), cm(SERVER)],
            now: Nanos(1),
        };
        pair.cm[SERVER].listen(ServiceId::tcp(7471));
        pair
    }

    /// The client has asked for a connection, and the server has been told: their ids.
    fn requested() -> (Self, [CommId; 2]) {
        let mut pair = Self::new();
        let client = pair.cm[CLIENT].connect(pair.now, &params(b"")).unwrap();
        pair.settle();
        let CmEvent::ConnectRequest { id, .. } = pair.event(SERVER) else {
            panic!()
        };
        (pair, [client, id])
    }

    /// And the server has accepted, and the client has been told.
    fn accepted() -> (Self, [CommId; 2]) {
        let (mut pair, [client, id]) = Self::requested();
        pair.cm[SERVER].accept(pair.now, id, offer(1), b"").unwrap();
        pair.settle();
        assert!(matches!(pair.event(CLIENT), CmEvent::Accepted { .. }));
        (pair, [client, id])
    }

    fn take(&mut self, from: usize) -> Vec<[u8; MAD_LEN]> {
        let to = at(1 - from);
        core::iter::from_fn(|| self.cm[from].poll_transmit())
            .inspect(|t| assert_eq!(t.to, to))
            .map(|t| t.mad)
            .collect()
    }

    fn give(&mut self, to: usize, mad: &[u8]) -> CmOutcome {
        self.cm[to].handle_mad(self.now, at(1 - to), mad)
    }

    /// Carry everything across until nothing moves.
    fn settle(&mut self) {
        loop {
            let moving = [self.take(CLIENT), self.take(SERVER)];
            if moving.iter().all(Vec::is_empty) {
                return;
            }
            for (from, mads) in moving.into_iter().enumerate() {
                for mad in mads {
                    self.give(1 - from, &mad);
                }
            }
        }
    }

    fn event(&mut self, i: usize) -> CmEvent {
        self.cm[i].poll_event().expect("an event")
    }

    fn advance(&mut self, by: Nanos) {
        self.now = self.now + by;
        for cm in &mut self.cm {
            cm.handle_timeout(self.now);
        }
    }

    /// Both ends of an established connection.
    fn connected(&mut self) -> [CommId; 2] {
        let client = self.cm[CLIENT]
            .connect(self.now, &params(b"hello"))
            .unwrap();
        self.settle();
        let CmEvent::ConnectRequest { id, .. } = self.event(SERVER) else {
            panic!()
        };
        self.cm[SERVER].accept(self.now, id, offer(1), b"").unwrap();
        self.settle();
        assert!(matches!(self.event(CLIENT), CmEvent::Accepted { .. }));
        self.cm[CLIENT].establish(client).unwrap();
        self.settle();
        assert_eq!(self.event(SERVER), CmEvent::Established { id });
        [client, id]
    }
}

#[test]
fn a_connection_carries_what_both_sides_offer_and_ends() {
    let mut pair = Pair::new();
    let client = pair.cm[CLIENT]
        .connect(pair.now, &params(b"node 7, life 3"))
        .unwrap();
    pair.settle();
    let CmEvent::ConnectRequest {
        id: server,
        request,
    } = pair.event(SERVER)
    else {
        panic!()
    };
    assert_eq!(request.private_data[..14], *b"node 7, life 3");
    assert!(request.private_data[14..].iter().all(|&b| b == 0));
    assert_eq!(request.private_data.len(), REQ_PRIVATE_MAX);
    assert_eq!(
        (request.from, request.source_port),
        (at(CLIENT), Some(40_000))
    );
    assert_eq!((request.qp, request.ca_guid), (offer(0), 0xa0));
    assert_eq!(request.mtu, Mtu::B4096);
    assert_eq!((request.retry_count, request.ack_timeout), (7, 17));

    pair.cm[SERVER]
        .accept(pair.now, server, offer(1), b"welcome")
        .unwrap();
    pair.settle();
    let CmEvent::Accepted {
        id,
        qp,
        ca_guid,
        private_data,
    } = pair.event(CLIENT)
    else {
        panic!()
    };
    assert_eq!((id, qp, ca_guid), (client, offer(1), 0xa1));
    assert_eq!(private_data[..7], *b"welcome");
    assert_eq!(pair.cm[SERVER].poll_event(), None);

    pair.cm[CLIENT].establish(client).unwrap();
    pair.settle();
    assert_eq!(pair.event(SERVER), CmEvent::Established { id: server });
    // Established connections wait for nothing.
    assert_eq!(pair.cm[CLIENT].poll_timeout(), None);
    assert_eq!(pair.cm[SERVER].poll_timeout(), None);

    pair.cm[SERVER].disconnect(pair.now, server).unwrap();
    pair.settle();
    assert_eq!(pair.event(CLIENT), CmEvent::Disconnected { id: client });
    assert_eq!(pair.event(SERVER), CmEvent::Disconnected { id: server });
    assert_eq!(pair.cm[CLIENT].state(client), Some(CmState::TimeWait));
    pair.advance(Nanos::from_millis(5_001));
    assert_eq!(pair.cm[CLIENT].state(client), None);
    assert_eq!(pair.cm[SERVER].state(server), None);
    assert_eq!(pair.cm[SERVER].poll_timeout(), None);
}

#[test]
fn every_message_of_the_handshake_may_be_lost_or_come_twice() {
    // Bit i of `lost`: the i-th datagram that anybody sends is lost; of `twice`: it comes twice.
    for (lost, twice) in (0..64u32).flat_map(|lost| [(lost, !lost), (lost, 0)]) {
        let mut pair = Pair::new();
        let mut sent = 0;
        let mut events: [Vec<CmEvent>; 2] = [vec![], vec![]];
        let client = pair.cm[CLIENT].connect(pair.now, &params(b"")).unwrap();
        let mut asked_to_end = false;
        for _ in 0..200 {
            for from in [CLIENT, SERVER] {
                for mad in pair.take(from) {
                    let bit = 1u32.checked_shl(sent).unwrap_or(0);
                    sent += 1;
                    let copies = if lost & bit != 0 {
                        0
                    } else {
                        1 + u32::from(twice & bit != 0)
                    };
                    for _ in 0..copies {
                        pair.give(1 - from, &mad);
                    }
                }
            }
            for i in [CLIENT, SERVER] {
                while let Some(event) = pair.cm[i].poll_event() {
                    match &event {
                        CmEvent::ConnectRequest { id, .. } => {
                            pair.cm[i].accept(pair.now, *id, offer(1), b"").unwrap();
                        }
                        CmEvent::Accepted { id, .. } => pair.cm[i].establish(*id).unwrap(),
                        CmEvent::Established { .. } if !asked_to_end => {
                            asked_to_end = true;
                            pair.cm[CLIENT].disconnect(pair.now, client).unwrap();
                        }
                        _ => {}
                    }
                    events[i].push(event);
                }
            }
            pair.advance(Nanos::from_millis(60));
        }
        let names = |events: &[CmEvent]| -> Vec<&'static str> {
            let name = |event: &CmEvent| match event {
                CmEvent::ConnectRequest { .. } => "request",
                CmEvent::Accepted { .. } => "accepted",
                CmEvent::Established { .. } => "established",
                CmEvent::Disconnected { .. } => "disconnected",
                CmEvent::Rejected { .. } => "rejected",
                CmEvent::TimedOut { .. } => "timed out",
                _ => "of an inquiry",
            };
            events.iter().map(name).collect()
        };
        assert_eq!(
            names(&events[CLIENT]),
            ["accepted", "disconnected"],
            "lost {lost:b}"
        );
        assert_eq!(
            names(&events[SERVER]),
            ["request", "established", "disconnected"],
            "lost {lost:b}"
        );
    }
}

#[test]
fn silence_ends_in_a_timeout_after_repetitions() {
    let mut pair = Pair::new();
    let id = pair.cm[CLIENT].connect(pair.now, &params(b"")).unwrap();
    let mut repetitions = 0;
    while let Some(due) = pair.cm[CLIENT].poll_timeout() {
        pair.now = due;
        pair.cm[CLIENT].handle_timeout(due);
        repetitions += pair.take(CLIENT).len();
    }
    assert_eq!(pair.event(CLIENT), CmEvent::TimedOut { id });
    // 50 ms, doubling to 4 s: 8 pauses of 12.75 s in all, then 4 s each up to 30 s.
    assert!((10..=16).contains(&repetitions), "{repetitions}");
    assert!(pair.now >= Nanos::from_millis(30_000) && pair.now < Nanos::from_millis(35_000));
}

#[test]
fn a_server_that_never_answers_its_request_forgets_it() {
    let mut pair = Pair::new();
    pair.cm[CLIENT].connect(pair.now, &params(b"")).unwrap();
    pair.settle();
    let CmEvent::ConnectRequest { id, .. } = pair.event(SERVER) else {
        panic!()
    };
    pair.now = pair.cm[SERVER].poll_timeout().unwrap();
    pair.cm[SERVER].handle_timeout(pair.now);
    assert_eq!(pair.event(SERVER), CmEvent::TimedOut { id });
    assert_eq!(
        pair.cm[SERVER].accept(pair.now, id, offer(1), b""),
        Err(CmError::UnknownConnection)
    );
    // And says so: the client need not wait for its own patience to end.
    pair.settle();
    let CmEvent::Rejected { reason, .. } = pair.event(CLIENT) else {
        panic!()
    };
    assert_eq!(reason, reason::TIMEOUT);
}

#[test]
fn disconnecting_from_a_peer_that_is_gone_ends_too() {
    let mut pair = Pair::new();
    let [client, _] = pair.connected();
    pair.cm[CLIENT].disconnect(pair.now, client).unwrap();
    let mut repetitions = 0;
    while pair.cm[CLIENT].state(client) == Some(CmState::DreqSent) {
        pair.now = pair.cm[CLIENT].poll_timeout().unwrap();
        pair.cm[CLIENT].handle_timeout(pair.now);
        repetitions += pair.take(CLIENT).len();
    }
    assert!(repetitions > 5);
    assert_eq!(pair.event(CLIENT), CmEvent::Disconnected { id: client });
    assert_eq!(pair.cm[CLIENT].state(client), Some(CmState::TimeWait));
}

#[test]
fn other_transports_are_refused() {
    let mut pair = Pair::new();
    pair.cm[CLIENT].connect(pair.now, &params(b"")).unwrap();
    let mut request = pair.take(CLIENT)[0];
    for transport in [1, 3] {
        request[24 + 43] = request[24 + 43] & 0xf9 | transport << 1;
        request[27] += 1;
        assert_eq!(pair.give(SERVER, &request), CmOutcome::Accepted);
        let answer = pair.take(SERVER);
        let Ok((_, Message::Rej(rej))) = Message::decode(&answer[0]) else {
            panic!()
        };
        assert_eq!(rej.reason, reason::INVALID_TRANSPORT);
    }
    assert_eq!(pair.cm[SERVER].poll_event(), None);
}

#[test]
fn a_queue_pair_that_connects_anew_ends_its_old_connection() {
    let mut pair = Pair::new();
    let [_, server] = pair.connected();
    // Other ids, as after a restart, but by chance the same queue pair.
    pair.cm[CLIENT] = Cm::new(CmConfig::new(at(CLIENT).ip(), 0xa0, 70_000));
    pair.cm[CLIENT].connect(pair.now, &params(b"")).unwrap();
    pair.settle();
    assert_eq!(pair.event(SERVER), CmEvent::Disconnected { id: server });
    assert!(matches!(pair.event(SERVER), CmEvent::ConnectRequest { .. }));
    assert_eq!(pair.cm[SERVER].state(server), None);
    // The same number on another host is another queue pair.
    let stranger = SocketAddr::from(([127, 0, 0, 9], 4791));
    let mut other = Cm::new(CmConfig::new(stranger.ip(), 0xa9, 5));
    other.connect(pair.now, &params(b"")).unwrap();
    let mad = other.poll_transmit().unwrap().mad;
    pair.cm[SERVER].handle_mad(pair.now, stranger, &mad);
    assert!(matches!(pair.event(SERVER), CmEvent::ConnectRequest { .. }));
    assert_eq!(pair.cm[SERVER].poll_event(), None);
}

/// A client whose request the server has answered with an MRA; the client's identifier, and the MRA.
fn asked_for_patience(timeout: u8) -> (Pair, CommId, Message<'static>) {
    let mut pair = Pair::new();
    let id = pair.cm[CLIENT].connect(pair.now, &params(b"")).unwrap();
    pair.take(CLIENT);
    let mra = Message::Mra {
        local: CommId(9),
        remote: id,
        message: 0,
        timeout,
    };
    assert_eq!(pair.give(CLIENT, &mra.encode(1)), CmOutcome::Accepted);
    (pair, id, mra)
}

#[test]
fn more_time_is_granted_when_asked_for() {
    let (pair, _, mra) = asked_for_patience(21);
    assert_eq!(
        pair.cm[CLIENT].poll_timeout(),
        Some(pair.now + Nanos::from_ib_exponent(21))
    );
    assert_eq!(mra.encode(1)[24 + 9], 21 << 3);
}

#[test]
fn a_client_that_withdraws_tells_the_server() {
    let mut pair = Pair::new();
    let id = pair.cm[CLIENT].connect(pair.now, &params(b"")).unwrap();
    pair.settle();
    let CmEvent::ConnectRequest { id: server, .. } = pair.event(SERVER) else {
        panic!()
    };
    pair.cm[CLIENT].disconnect(pair.now, id).unwrap();
    assert_eq!(pair.event(CLIENT), CmEvent::Disconnected { id });
    pair.settle();
    assert!(matches!(pair.event(SERVER), CmEvent::Rejected { id, .. } if id == server));
    assert_eq!(pair.cm[SERVER].state(server), None);
}

#[test]
fn a_reply_to_a_forgotten_request_is_refused() {
    let mut pair = Pair::new();
    pair.cm[CLIENT].connect(pair.now, &params(b"")).unwrap();
    pair.settle();
    let CmEvent::ConnectRequest { id, .. } = pair.event(SERVER) else {
        panic!()
    };
    // The client dies and comes back with other ids.
    pair.cm[CLIENT] = Cm::new(CmConfig::new(at(CLIENT).ip(), 0xa0, 5_000));
    pair.cm[SERVER].accept(pair.now, id, offer(1), b"").unwrap();
    pair.settle();
    assert!(matches!(
        pair.event(SERVER),
        CmEvent::Rejected {
            reason: reason::INVALID_COMM_ID,
            ..
        }
    ));
}

#[test]
fn a_client_in_a_new_life_replaces_its_old_connection() {
    let mut pair = Pair::new();
    let [_, server] = pair.connected();
    // The same ids again, but another queue pair.
    pair.cm[CLIENT] = Cm::new(CmConfig::new(at(CLIENT).ip(), 0xa0, 1));
    let again = ConnectParams {
        qp: offer(9),
        ..params(b"")
    };
    pair.cm[CLIENT].connect(pair.now, &again).unwrap();
    pair.settle();
    assert_eq!(pair.event(SERVER), CmEvent::Disconnected { id: server });
    let CmEvent::ConnectRequest { id, request } = pair.event(SERVER) else {
        panic!()
    };
    assert!(id != server && request.qp == offer(9));
}

#[test]
fn a_packet_before_the_rtu_establishes_and_the_rtu_is_then_stale() {
    let mut pair = Pair::new();
    let client = pair.cm[CLIENT].connect(pair.now, &params(b"")).unwrap();
    pair.settle();
    let CmEvent::ConnectRequest { id: server, .. } = pair.event(SERVER) else {
        panic!()
    };
    pair.cm[SERVER]
        .accept(pair.now, server, offer(1), b"")
        .unwrap();
    pair.settle();
    pair.cm[CLIENT].establish(client).unwrap();
    pair.cm[SERVER].handle_communication(server);
    pair.cm[SERVER].handle_communication(server);
    assert_eq!(pair.event(SERVER), CmEvent::Established { id: server });
    let rtu = pair.take(CLIENT);
    assert_eq!(pair.give(SERVER, &rtu[0]), CmOutcome::Stale);
    assert_eq!(pair.cm[SERVER].poll_event(), None);
    assert_eq!(pair.cm[SERVER].poll_timeout(), None);
}

#[test]
fn both_sides_may_end_at_once() {
    let mut pair = Pair::new();
    let [client, server] = pair.connected();
    pair.cm[CLIENT].disconnect(pair.now, client).unwrap();
    pair.cm[SERVER].disconnect(pair.now, server).unwrap();
    pair.settle();
    assert_eq!(pair.event(CLIENT), CmEvent::Disconnected { id: client });
    assert_eq!(pair.event(SERVER), CmEvent::Disconnected { id: server });
    assert_eq!(
        (pair.cm[CLIENT].poll_event(), pair.cm[SERVER].poll_event()),
        (None, None)
    );
}

#[test]
fn an_unknown_connection_is_disconnected_already() {
    let mut pair = Pair::new();
    let dreq = Message::Dreq {
        local: CommId(77),
        remote: CommId(88),
        qpn: Qpn::new(5),
    };
    assert_eq!(pair.give(SERVER, &dreq.encode(6)), CmOutcome::Stale);
    let drep = pair.take(SERVER);
    let expected = Message::Drep {
        local: CommId(88),
        remote: CommId(77),
    };
    assert_eq!(Message::decode(&drep[0]), Ok((6, expected)));
}

/// The client's host has begun anew, and ends what it has of its former life.
#[test]
fn an_end_that_names_another_connection_of_its_own_ends_none_here() {
    let mut pair = Pair::new();
    let [client, server] = pair.connected();
    let dreq = Message::Dreq {
        local: CommId(client.0 + 1),
        remote: server,
        qpn: Qpn::new(0x100),
    };
    assert_eq!(pair.give(SERVER, &dreq.encode(6)), CmOutcome::Stale);
    assert_eq!(pair.cm[SERVER].state(server), Some(CmState::Established));
    assert_eq!(pair.cm[SERVER].poll_event(), None);
    assert_eq!(pair.take(SERVER).len(), 1, "it need not ask again");
}

#[test]
fn a_third_host_cannot_speak_for_the_peer() {
    let mut pair = Pair::new();
    let [client, server] = pair.connected();
    let stranger = SocketAddr::from(([127, 0, 0, 99], 4791));
    let dreq = Message::Dreq {
        local: server,
        remote: client,
        qpn: Qpn::new(0x100),
    };
    let outcome = pair.cm[CLIENT].handle_mad(pair.now, stranger, &dreq.encode(1));
    assert_eq!(outcome, CmOutcome::Stale);
    assert_eq!(pair.cm[CLIENT].state(client), Some(CmState::Established));
}

#[test]
fn commands_in_the_wrong_state_are_refused() {
    let mut pair = Pair::new();
    let [client, server] = pair.connected();
    let state = Err(CmError::State(CmState::Established));
    assert_eq!(pair.cm[CLIENT].establish(client), state);
    assert_eq!(
        pair.cm[SERVER].accept(pair.now, server, offer(1), b""),
        state
    );
    assert_eq!(pair.cm[SERVER].reject(pair.now, server, 1, b""), state);
    assert_eq!(
        pair.cm[CLIENT].establish(CommId(4711)),
        Err(CmError::UnknownConnection)
    );
    let long = [0; REQ_PRIVATE_MAX + 1];
    let refused = pair.cm[CLIENT].connect(pair.now, &params(&long));
    assert_eq!(refused, Err(CmError::PrivateDataTooLong));
    let full = pair.cm[CLIENT].connect(pair.now, &params(&long[1..]));
    assert!(full.is_ok());
}

#[test]
fn input_is_refused_while_the_caller_does_not_listen() {
    let mut pair = Pair::new();
    let mut outcomes = Vec::new();
    for i in 0..300u32 {
        let mut other = Cm::new(CmConfig::new(at(CLIENT).ip(), 1, 1_000 + i));
        let theirs = ConnectParams {
            qp: offer(i),
            ..params(b"")
        };
        other.connect(pair.now, &theirs).unwrap();
        let mad = other.poll_transmit().unwrap().mad;
        outcomes.push(pair.give(SERVER, &mad));
    }
    assert_eq!(
        outcomes
            .iter()
            .filter(|&&o| o == CmOutcome::Accepted)
            .count(),
        256
    );
    assert_eq!(outcomes[299], CmOutcome::Busy);
}

#[test]
fn malformed_datagrams_are_named() {
    let mut pair = Pair::new();
    pair.cm[CLIENT].connect(pair.now, &params(b"")).unwrap();
    let good = pair.take(CLIENT)[0];
    let bad = |bytes: &[u8]| CmOutcome::Malformed(Message::decode(bytes).unwrap_err());
    assert_eq!(
        pair.give(SERVER, &good[..255]),
        CmOutcome::Malformed(BadMad::Length)
    );
    for (byte, value, expected) in [
        (0, 2, BadMad::Header),
        (1, 3, BadMad::Header),
        (2, 1, BadMad::Header),
        (3, 1, BadMad::Header),
        (17, 0x19, BadMad::Attribute(0x19)),
        (24 + 50, 0x70, BadMad::Field),
    ] {
        let mut mad = good;
        mad[byte] = value;
        assert_eq!(pair.give(SERVER, &mad), CmOutcome::Malformed(expected));
        assert_eq!(bad(&mad), CmOutcome::Malformed(expected));
    }
    assert_eq!(pair.cm[SERVER].poll_event(), None);
}

#[test]
fn addresses_and_gids_convert() {
    for text in ["10.9.0.1", "fd00:9::1", "::1"] {
        let ip: IpAddr = text.parse().unwrap();
        assert_eq!(address(gid(ip)), ip);
    }
    let v4 = gid("1.2.3.4".parse().unwrap());
    assert_eq!(v4, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 1, 2, 3, 4]);
    assert_eq!(ServiceId::tcp(0x1d2f).0, 0x0106_1d2f);
}
