//! Which queue pair serves datagrams: asked and answered, whatever is lost.

use super::*;

fn question(private_data: &[u8]) -> ResolveParams<'_> {
    ResolveParams {
        to: at(SERVER),
        service: ServiceId::udp(7174),
        source_port: 40_001,
        private_data,
    }
}

#[test]
fn inquiries_are_answered_whatever_is_lost_or_comes_twice() {
    // Bit i of `lost`: the i-th datagram that anybody sends is lost; the others come twice.
    for lost in 0..64u32 {
        let mut pair = Pair::new();
        pair.cm[SERVER].listen_datagram(ServiceId::udp(7174));
        let id = pair.cm[CLIENT]
            .resolve(pair.now, &question(b"who?"))
            .unwrap();
        let (mut sent, mut asked, mut resolved) = (0, 0, Vec::new());
        for _ in 0..100 {
            for from in [CLIENT, SERVER] {
                for mad in pair.take(from) {
                    if lost & 1u32.checked_shl(sent).unwrap_or(0) == 0 {
                        pair.give(1 - from, &mad);
                        pair.give(1 - from, &mad);
                    }
                    sent += 1;
                }
            }
            while let Some(event) = pair.cm[SERVER].poll_event() {
                let CmEvent::Inquiry { id, inquiry } = event else {
                    panic!("{event:?}")
                };
                assert_eq!(
                    (inquiry.from, inquiry.source_port),
                    (at(CLIENT), Some(40_001))
                );
                assert_eq!(inquiry.private_data[..4], *b"who?");
                assert_eq!(inquiry.private_data.len(), SIDR_REQ_PRIVATE_MAX);
                asked += 1;
                let here = (Qpn::new(0x777), 0x0123_4567);
                let success = sidr_status::SUCCESS;
                pair.cm[SERVER]
                    .answer(pair.now, id, success, here, b"me")
                    .unwrap();
            }
            resolved.extend(core::iter::from_fn(|| pair.cm[CLIENT].poll_event()));
            pair.advance(Nanos::from_millis(60));
        }
        assert_eq!((asked, resolved.len()), (1, 1), "lost {lost:b}");
        let CmEvent::Resolved {
            id: of,
            qpn,
            qkey,
            private_data,
        } = &resolved[0]
        else {
            panic!("{resolved:?}")
        };
        assert_eq!((*of, qpn.value(), *qkey), (id, 0x777, 0x0123_4567));
        assert_eq!(private_data[..2], *b"me");
        assert_eq!(pair.cm[CLIENT].state(id), None);
        pair.advance(Nanos::from_millis(5_001));
        assert_eq!(pair.cm[SERVER].poll_timeout(), None);
    }
}

#[test]
fn inquiries_in_vain_say_why() {
    let mut pair = Pair::new();
    let status = |event| match event {
        CmEvent::Unresolved { status, .. } => status,
        other => panic!("{other:?}"),
    };
    // A service of connections is none of datagrams.
    let tcp = ResolveParams {
        service: ServiceId::tcp(7471),
        ..question(b"")
    };
    for params in [question(b""), tcp] {
        pair.cm[CLIENT].resolve(pair.now, &params).unwrap();
        pair.settle();
        assert_eq!(status(pair.event(CLIENT)), sidr_status::UNSUPPORTED);
    }
    pair.cm[SERVER].listen_datagram(ServiceId::udp(7174));
    pair.cm[CLIENT].resolve(pair.now, &question(b"")).unwrap();
    pair.settle();
    let CmEvent::Inquiry { id, .. } = pair.event(SERVER) else {
        panic!()
    };
    let nothing = (Qpn::new(0), 0);
    assert_eq!(
        pair.cm[SERVER].accept(pair.now, id, offer(1), b""),
        Err(CmError::State(CmState::SidrReqReceived))
    );
    let reject = sidr_status::REJECT;
    pair.cm[SERVER]
        .answer(pair.now, id, reject, nothing, b"")
        .unwrap();
    pair.settle();
    assert_eq!(status(pair.event(CLIENT)), sidr_status::REJECT);
    let long = [0; SIDR_REQ_PRIVATE_MAX + 1];
    let refused = pair.cm[CLIENT].resolve(pair.now, &question(&long));
    assert_eq!(refused, Err(CmError::PrivateDataTooLong));
    // Withdrawn: nobody need be told, and an answer is for nobody.
    let id = pair.cm[CLIENT].resolve(pair.now, &question(b"")).unwrap();
    pair.cm[CLIENT].disconnect(pair.now, id).unwrap();
    assert_eq!(pair.event(CLIENT), CmEvent::Disconnected { id });
    pair.settle();
    assert!(matches!(pair.event(SERVER), CmEvent::Inquiry { .. }));
    assert_eq!(pair.cm[CLIENT].poll_timeout(), None);
}

/// Ids of requests and of inquiries are two sorts of numbers: one that is used for both ends nothing.
#[test]
fn an_inquiry_with_the_id_of_a_connection_leaves_it_alone() {
    let mut pair = Pair::new();
    pair.cm[SERVER].listen_datagram(ServiceId::udp(7174));
    let [client, server] = pair.connected();
    let ask = Message::SidrReq(SidrReq {
        request: client,
        pkey: PKEY_DEFAULT,
        service: ServiceId::udp(7174),
        cma: None,
        private_data: &[],
    });
    assert_eq!(pair.give(SERVER, &ask.encode(7)), CmOutcome::Accepted);
    let CmEvent::Inquiry { id, .. } = pair.event(SERVER) else {
        panic!()
    };
    assert_eq!(pair.cm[SERVER].state(server), Some(CmState::Established));
    // Nor does forgetting the one forget the other: the request is still known.
    pair.cm[SERVER]
        .answer(pair.now, id, sidr_status::REJECT, (Qpn::new(0), 0), &[])
        .unwrap();
    pair.advance(Nanos::from_millis(5_001));
    assert_eq!(pair.cm[SERVER].state(id), None);
    pair.cm[CLIENT].disconnect(pair.now, client).unwrap();
    pair.settle();
    assert_eq!(pair.event(SERVER), CmEvent::Disconnected { id: server });
}
