//! Who is refused and why, and how much room there is for whom.

use super::*;

/// The client asks with another queue pair.
fn ask(pair: &mut Pair, qpn: u32) {
    let other = ConnectParams {
        qp: offer(qpn),
        ..params(b"")
    };
    pair.cm[CLIENT].connect(pair.now, &other).unwrap();
}

/// The only message that an end has to send: a REJ, of this message of the peer's.
fn rejection(pair: &mut Pair, from: usize) -> (u8, [u8; MAD_LEN]) {
    let [mad] = pair.take(from)[..] else { panic!() };
    match Message::decode(&mad) {
        Ok((_, Message::Rej(rej))) => (rej.message, mad),
        other => panic!("{other:?}"),
    }
}

/// The server has room for exactly so many connections of its own.
fn fill(pair: &mut Pair, room: usize) {
    let own = ConnectParams {
        to: at(CLIENT),
        ..params(b"")
    };
    for _ in 0..room {
        pair.cm[SERVER].connect(pair.now, &own).unwrap();
    }
    let refused = pair.cm[SERVER].connect(pair.now, &own);
    assert_eq!(refused, Err(CmError::TooManyConnections));
}

#[test]
fn refusals_say_why_and_are_repeated() {
    let mut pair = Pair::new();
    let id = pair.cm[CLIENT].connect(pair.now, &params(b"")).unwrap();
    let request = pair.take(CLIENT);
    pair.give(SERVER, &request[0]);
    let CmEvent::ConnectRequest { id: server, .. } = pair.event(SERVER) else {
        panic!()
    };
    pair.cm[SERVER]
        .reject(pair.now, server, reason::CONSUMER, b"too old")
        .unwrap();
    // The rejection is lost, the request comes again, so does the rejection.
    assert_eq!(rejection(&mut pair, SERVER).0, 0, "it is the request's");
    assert_eq!(pair.give(SERVER, &request[0]), CmOutcome::Accepted);
    pair.settle();
    let CmEvent::Rejected {
        id: rejected,
        reason,
        private_data,
    } = pair.event(CLIENT)
    else {
        panic!()
    };
    assert_eq!((rejected, reason), (id, reason::CONSUMER));
    assert_eq!(private_data[..7], *b"too old");
    assert_eq!(pair.cm[CLIENT].state(id), None);
    assert_eq!(pair.cm[SERVER].poll_event(), None);
}

#[test]
fn a_client_refuses_a_reply() {
    let (mut pair, [client, server]) = Pair::accepted();
    let why = reason::CONSUMER;
    pair.cm[CLIENT]
        .reject(pair.now, client, why, b"not that one")
        .unwrap();
    let (message, mad) = rejection(&mut pair, CLIENT);
    assert_eq!(message, 1, "it is the reply's");
    assert_eq!(pair.give(SERVER, &mad), CmOutcome::Accepted);
    let event = pair.event(SERVER);
    let CmEvent::Rejected { id, reason, .. } = event else {
        panic!("{event:?}")
    };
    assert_eq!((id, reason), (server, why));
}

#[test]
fn a_service_that_nobody_offers_and_a_full_server_refuse() {
    let mut pair = Pair::new();
    pair.cm[SERVER].unlisten(ServiceId::tcp(7471));
    pair.cm[CLIENT].connect(pair.now, &params(b"")).unwrap();
    pair.settle();
    let refused = |event| match event {
        CmEvent::Rejected { reason, .. } => reason,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(pair.event(CLIENT)), reason::INVALID_SERVICE_ID);

    pair.cm[SERVER].listen(ServiceId::tcp(7471));
    pair.cm[SERVER].config.connections_max = 0;
    pair.cm[CLIENT].connect(pair.now, &params(b"")).unwrap();
    pair.settle();
    assert_eq!(refused(pair.event(CLIENT)), reason::NO_RESOURCES);
    assert_eq!(pair.cm[SERVER].poll_event(), None);
}

/// Peers that ask and do not go on leave room for connections of our own.
#[test]
fn strangers_cannot_take_the_whole_table() {
    let mut pair = Pair::new();
    pair.cm[SERVER].config.connections_max = 16;
    for n in 10..40 {
        ask(&mut pair, n);
    }
    pair.settle();
    let mut asked = 0;
    while let Some(event) = pair.cm[SERVER].poll_event() {
        assert!(matches!(event, CmEvent::ConnectRequest { .. }), "{event:?}");
        asked += 1;
    }
    assert_eq!(asked, 14);
    fill(&mut pair, 2);
}

/// Peers that are refused leave memories behind, which do not keep anybody else out.
#[test]
fn what_is_over_gives_way_to_what_is_new() {
    let mut pair = Pair::new();
    pair.cm[SERVER].config.connections_max = 4;
    let [client, server] = pair.connected();
    for n in 10..20 {
        ask(&mut pair, n);
        pair.settle();
        let CmEvent::ConnectRequest { id, .. } = pair.event(SERVER) else {
            panic!()
        };
        pair.cm[SERVER]
            .reject(pair.now, id, reason::CONSUMER, b"")
            .unwrap();
        pair.settle();
        assert!(matches!(pair.event(CLIENT), CmEvent::Rejected { .. }));
    }
    // All that is left lives.
    fill(&mut pair, 3);
    assert_eq!(pair.cm[SERVER].state(server), Some(CmState::Established));
    assert_eq!(pair.cm[CLIENT].state(client), Some(CmState::Established));
}
