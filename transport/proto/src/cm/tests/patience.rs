//! Who takes its time asks for more, and is waited for.

use super::*;

#[test]
fn a_server_that_takes_its_time_is_waited_for() {
    let (mut pair, [client, id]) = Pair::requested();
    // 29 s: without a word the client would have asked a dozen times more.
    let mut asked = 0;
    while pair.now < Nanos::from_millis(29_000) {
        pair.advance(Nanos::from_millis(10));
        let requests = pair.take(CLIENT);
        asked += requests.len();
        for mad in requests {
            assert_eq!(pair.give(SERVER, &mad), CmOutcome::Accepted);
        }
        for mad in pair.take(SERVER) {
            let message = Message::decode(&mad).unwrap().1;
            assert!(
                matches!(message, Message::Mra { message: 0, .. }),
                "{message:?}"
            );
            assert_eq!(pair.give(CLIENT, &mad), CmOutcome::Accepted);
        }
    }
    assert!((20..=30).contains(&asked), "{asked}");
    pair.cm[SERVER].accept(pair.now, id, offer(1), b"").unwrap();
    pair.settle();
    assert!(matches!(pair.event(CLIENT), CmEvent::Accepted { id, .. } if id == client));
}

/// Longer than it would have waited for a word, and no longer than 69 s and what one more try takes,
/// whatever is asked for.
#[test]
fn who_is_asked_for_much_time_gives_up_after_that() {
    for timeout in [24, 31] {
        let (mut pair, id, _) = asked_for_patience(timeout);
        let due = pair.now + Nanos::from_ib_exponent(24);
        assert_eq!(pair.cm[CLIENT].poll_timeout(), Some(due));
        let mut asked = 0;
        while let Some(next) = pair.cm[CLIENT].poll_timeout() {
            pair.now = next;
            pair.cm[CLIENT].handle_timeout(next);
            asked += pair.take(CLIENT).len();
        }
        assert_eq!(pair.event(CLIENT), CmEvent::TimedOut { id });
        assert!(asked > 0, "it asks again");
        assert!(pair.now <= due + Nanos(2 * RESEND_MAX.0));
    }
}

#[test]
fn a_client_that_takes_its_time_is_waited_for() {
    let (mut pair, [client, id]) = Pair::accepted();
    pair.advance(Nanos::from_millis(60));
    let again = pair.take(SERVER);
    assert_eq!(pair.give(CLIENT, &again[0]), CmOutcome::Accepted);
    let mra = pair.take(CLIENT);
    assert!(matches!(
        Message::decode(&mra[0]),
        Ok((_, Message::Mra { message: 1, .. }))
    ));
    assert_eq!(pair.give(SERVER, &mra[0]), CmOutcome::Accepted);
    assert!(pair.cm[SERVER].poll_timeout().unwrap() > pair.now + Nanos::from_millis(1_000));
    pair.cm[CLIENT].establish(client).unwrap();
    pair.settle();
    assert_eq!(pair.event(SERVER), CmEvent::Established { id });
}

#[test]
fn a_client_that_is_never_ready_is_told_that_the_server_gave_up() {
    let (mut pair, [client, id]) = Pair::accepted();
    // Its RTU is lost, and so is every repetition of the reply: it believes in the connection.
    pair.cm[CLIENT].establish(client).unwrap();
    pair.take(CLIENT);
    while pair.cm[SERVER].state(id).is_some() {
        let mads = pair.take(SERVER);
        assert!(mads.len() <= 1);
        pair.now = pair.cm[SERVER].poll_timeout().unwrap();
        pair.cm[SERVER].handle_timeout(pair.now);
    }
    assert_eq!(pair.event(SERVER), CmEvent::TimedOut { id });
    let last = pair.take(SERVER);
    let Ok((_, Message::Rej(rej))) = Message::decode(&last[0]) else {
        panic!()
    };
    assert_eq!((rej.reason, rej.ca_guid), (reason::TIMEOUT, 0xa1));
    // One that does not know the server's id is not believed.
    let stranger = Message::Rej(Rej {
        local: CommId(0x7777),
        ..rej
    });
    assert_eq!(pair.give(CLIENT, &stranger.encode(1)), CmOutcome::Stale);
    assert_eq!(pair.give(CLIENT, &last[0]), CmOutcome::Accepted);
    assert_eq!(pair.event(CLIENT), CmEvent::Disconnected { id: client });
}
