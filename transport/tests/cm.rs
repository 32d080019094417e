//! Connections by the connection manager, over real sockets on loopback addresses.

mod common;

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use common::PATIENCE;
use lowtide_transport::cm::{
    CmError, ConnectError, ConnectOptions, Connection, Event, EventChannel, Question,
    REQ_PRIVATE_MAX, Request, ServiceId, reason,
};
use lowtide_transport::verbs::{
    Access, Buffer, CompletionQueue, Device, DeviceOptions, Faults, ProtectionDomain, QpState, Qpn,
    QueuePair, SendOp, Status,
};

const SERVICE: ServiceId = ServiceId::tcp(7471);

struct Side {
    device: Device,
    domain: ProtectionDomain,
    queue: CompletionQueue,
    channel: EventChannel,
}

impl Side {
    fn new(faults: &Faults) -> Side {
        let options = DeviceOptions {
            faults: *faults,
            ..DeviceOptions::default()
        };
        let device = Device::open(common::address(), &options).unwrap();
        Side {
            domain: device.protection_domain(),
            queue: device.completion_queue(1024),
            channel: EventChannel::new(&device).unwrap(),
            device,
        }
    }

    fn qp(&self) -> QueuePair {
        let qp = self
            .domain
            .queue_pair(&self.queue, &self.queue, 8, 8)
            .unwrap();
        qp.to_init(Access::ALL).unwrap();
        qp
    }

    fn address(&self) -> SocketAddr {
        self.device.local_addr()
    }

    fn event(&self) -> Event {
        self.channel.wait(PATIENCE).expect("an event")
    }

    fn request(&self) -> Request {
        match self.event() {
            Event::Request(request) => request,
            other => panic!("{other:?}"),
        }
    }

    fn question(&self) -> Question {
        match self.event() {
            Event::Question(question) => question,
            other => panic!("{other:?}"),
        }
    }
}

fn pair() -> [Side; 2] {
    [(); 2].map(|()| Side::new(&Faults::default()))
}

fn saying(private_data: &[u8]) -> ConnectOptions {
    ConnectOptions {
        private_data: private_data.to_vec(),
        ..ConnectOptions::default()
    }
}

/// One message over the connection.
fn talk(from: (&Side, &Connection), to: (&Side, &Connection), byte: u8) {
    let slot = to.0.domain.slot(100).unwrap();
    to.1.queue_pair()
        .post_recv(1, Buffer::Slot(slot, 100))
        .unwrap();
    let mut slot = from.0.domain.slot(100).unwrap();
    slot.fill(byte);
    from.1
        .queue_pair()
        .post_send(2, SendOp::Send, Buffer::Slot(slot, 100))
        .unwrap();
    let received = to.0.queue.wait(PATIENCE).expect("a completion");
    assert_eq!((received.id, received.status), (1, Status::Success));
    assert_eq!(received.slot.unwrap()[..], [byte; 100]);
    let sent = from.0.queue.wait(PATIENCE).expect("a completion");
    assert_eq!((sent.id, sent.status), (2, Status::Success));
}

#[test]
fn a_connection_carries_private_data_and_messages_and_ends() {
    let [client, server] = pair();
    let _listener = server.channel.listen(SERVICE).unwrap();
    let ours = client
        .channel
        .connect(server.address(), SERVICE, client.qp(), &saying(b"hello"))
        .unwrap();
    let request = server.request();
    assert_eq!(request.private_data()[..6], *b"hello\0");
    assert_eq!(request.private_data().len(), REQ_PRIVATE_MAX);
    assert_eq!(
        (request.service(), request.peer(), request.depths()),
        (SERVICE, client.address().ip(), (8, 8))
    );
    let theirs = request.accept(server.qp(), &saying(b"welcome")).unwrap();
    match client.event() {
        Event::Established { id, private_data } => {
            assert_eq!(id, ours.id());
            assert_eq!(private_data[..8], *b"welcome\0");
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(server.event(), Event::Established { id, .. } if id == theirs.id()));
    talk((&client, &ours), (&server, &theirs), 7);
    talk((&server, &theirs), (&client, &ours), 8);
    let slot = server.domain.slot(10).unwrap();
    theirs
        .queue_pair()
        .post_recv(3, Buffer::Slot(slot, 10))
        .unwrap();
    ours.disconnect();
    assert!(matches!(client.event(), Event::Disconnected { id } if id == ours.id()));
    assert!(matches!(server.event(), Event::Disconnected { id } if id == theirs.id()));
    // Nothing has been asked of the queue pair meanwhile.
    let flushed = server.queue.poll().expect("it is there before the event");
    assert_eq!((flushed.id, flushed.status), (3, Status::Flushed));
    assert_eq!(ours.queue_pair().state(), QpState::Err);
    assert_eq!(theirs.queue_pair().state(), QpState::Err);
    ours.disconnect();
    assert!(client.channel.poll().is_none() && server.channel.poll().is_none());
}

/// Each end says how often the other may try in vain to find a receive.
#[test]
fn a_peer_without_receives_is_tried_as_often_as_it_says() {
    let [client, server] = pair();
    let _listener = server.channel.listen(SERVICE).unwrap();
    let impatient = ConnectOptions {
        rnr_retry: 0,
        ..ConnectOptions::default()
    };
    let ours = client
        .channel
        .connect(server.address(), SERVICE, client.qp(), &saying(b""))
        .unwrap();
    let theirs = server.request().accept(server.qp(), &impatient).unwrap();
    for side in [&client, &server] {
        assert!(matches!(side.event(), Event::Established { .. }));
    }
    let send = |connection: &Connection| {
        let qp = connection.queue_pair();
        qp.post_send(1, SendOp::Send, Buffer::Empty).unwrap();
    };
    // The client has said that it may be asked for ever.
    send(&theirs);
    assert!(server.queue.wait(Duration::from_millis(100)).is_none());
    send(&ours);
    let work = client.queue.wait(PATIENCE).expect("a completion");
    assert_eq!((work.id, work.status), (1, Status::RnrRetryExceeded));
}

#[test]
fn many_connections_are_made_and_ended_over_a_lossy_wire() {
    for seed in 1..=3 {
        let faults = Faults {
            seed,
            loss_percent: 20.0,
            duplicate_percent: 20.0,
            reorder_percent: 10.0,
            ..Faults::default()
        };
        let [client, server] = [Side::new(&faults), Side::new(&Faults::default())];
        let _listener = server.channel.listen(SERVICE).unwrap();
        let ours: Vec<Connection> = (0..20)
            .map(|i| {
                let options = saying(&[i]);
                client
                    .channel
                    .connect(server.address(), SERVICE, client.qp(), &options)
                    .unwrap()
            })
            .collect();
        let (mut theirs, mut established) = (vec![], 0);
        while established < 20 {
            match server.event() {
                Event::Request(request) => {
                    let said = request.private_data()[0];
                    let connection = request.accept(server.qp(), &saying(&[said])).unwrap();
                    theirs.push((usize::from(said), connection));
                }
                Event::Established { .. } => established += 1,
                other => panic!("{other:?}"),
            }
        }
        for _ in 0..20 {
            match client.event() {
                Event::Established { id, private_data } => {
                    assert_eq!(ours[usize::from(private_data[0])].id(), id);
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(theirs.len(), 20);
        let (said, connection) = &theirs[3];
        talk((&server, connection), (&client, &ours[*said]), 9);
        // Half of them end here, half there; handles are dropped, so only the peer hears of it.
        let mut left = theirs.split_off(10);
        drop(theirs);
        for _ in 0..10 {
            assert!(matches!(client.event(), Event::Disconnected { .. }));
        }
        for (_, connection) in &left {
            connection.disconnect();
        }
        for _ in 0..10 {
            assert!(matches!(client.event(), Event::Disconnected { .. }));
            assert!(matches!(server.event(), Event::Disconnected { .. }));
        }
        left.clear();
    }
}

#[test]
fn refusals_say_why_and_give_the_queue_pair_back() {
    let [client, server] = pair();
    let to = server.address();
    let attempt = |qp| {
        client
            .channel
            .connect(to, SERVICE, qp, &saying(b""))
            .unwrap()
    };
    let rejected = |connection: Connection, expected| {
        match client.event() {
            Event::Rejected { id, reason, .. } => {
                assert_eq!((id, reason), (connection.id(), expected));
            }
            other => panic!("{other:?}"),
        }
        let qp = connection.into_queue_pair();
        assert_eq!(qp.state(), QpState::Init);
        qp
    };
    // Nobody listens.
    let qp = rejected(attempt(client.qp()), reason::INVALID_SERVICE_ID);
    let listener = server.channel.listen(SERVICE).unwrap();
    assert_eq!(listener.service(), SERVICE);
    let taken = EventChannel::new(&server.device).unwrap().listen(SERVICE);
    assert_eq!(taken.unwrap_err().kind(), ErrorKind::AddrInUse);
    // The program refuses, in so many words.
    let connection = attempt(qp);
    server.request().reject(reason::CONSUMER, b"too old");
    match client.event() {
        Event::Rejected {
            reason: reason::CONSUMER,
            private_data,
            ..
        } => assert_eq!(private_data[..8], *b"too old\0"),
        other => panic!("{other:?}"),
    }
    // A request that is dropped is refused, one that nobody takes too.
    let connection = attempt(connection.into_queue_pair());
    drop(server.request());
    let connection = attempt(rejected(connection, reason::CONSUMER));
    while !is_readable(&server.channel, PATIENCE) {}
    let Side { channel, .. } = server;
    drop((channel, listener));
    rejected(connection, reason::CONSUMER);
    assert!(client.channel.poll().is_none());
}

#[test]
fn a_queue_pair_that_cannot_be_connected_comes_back() {
    let [client, server] = pair();
    let _listener = server.channel.listen(SERVICE).unwrap();
    let to = server.address();
    let refused = |qp, to, options: &ConnectOptions| {
        let refused = client
            .channel
            .connect(to, SERVICE, qp, options)
            .unwrap_err();
        (refused.error, refused.qp)
    };
    let raw = client
        .domain
        .queue_pair(&client.queue, &client.queue, 8, 8)
        .unwrap();
    let (error, raw) = refused(raw, to, &saying(b""));
    assert_eq!(error, ConnectError::State(QpState::Reset));
    assert!(error.to_string().contains("move it to Init"));
    raw.to_init(Access::LOCAL).unwrap();
    let long = saying(&[0; REQ_PRIVATE_MAX + 1]);
    let (error, raw) = refused(raw, to, &long);
    assert_eq!(error, ConnectError::Refused(CmError::PrivateDataTooLong));
    let six = SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], 4791));
    let (error, raw) = refused(raw, six, &saying(b""));
    assert_eq!(error, ConnectError::Family);
    let (error, _) = refused(server.qp(), to, &saying(b""));
    assert_eq!(error, ConnectError::OtherDevice);
    // A withdrawn request cannot be accepted.
    let connection = client
        .channel
        .connect(to, SERVICE, raw, &saying(b""))
        .unwrap();
    let request = server.request();
    drop(connection);
    match server.event() {
        Event::Rejected { id, reason, .. } => {
            assert_eq!((id, reason), (request.id(), reason::TIMEOUT));
        }
        other => panic!("{other:?}"),
    }
    let refused = request.accept(server.qp(), &saying(b"")).unwrap_err();
    assert_eq!(
        refused.error,
        ConnectError::Refused(CmError::UnknownConnection)
    );
    assert_eq!(refused.qp.state(), QpState::Init);
}

/// Were it in two, the end of one would be the end of the other.
#[test]
fn a_shared_queue_pair_is_in_one_connection_at_a_time() {
    let [client, server] = pair();
    let _listener = server.channel.listen(SERVICE).unwrap();
    let qp = Arc::new(client.qp());
    let connect = || {
        let options = ConnectOptions::default();
        let to = server.address();
        client.channel.connect(to, SERVICE, qp.clone(), &options)
    };
    let first = connect().unwrap();
    assert_eq!(connect().unwrap_err().error, ConnectError::InUse);
    let Some(Event::Request(request)) = server.channel.wait(Duration::MAX) else {
        panic!("a request");
    };
    drop(request);
    assert!(matches!(client.event(), Event::Rejected { .. }));
    assert_eq!(connect().unwrap_err().error, ConnectError::InUse);
    drop(first);
    connect().unwrap();
}

#[test]
fn a_slow_server_is_waited_for() {
    let [client, server] = pair();
    let _listener = server.channel.listen(SERVICE).unwrap();
    let ours = client
        .channel
        .connect(server.address(), SERVICE, client.qp(), &saying(b""))
        .unwrap();
    let request = server.request();
    // Meanwhile the client asks again and is told to be patient: it hears nothing else.
    assert!(client.channel.wait(Duration::from_millis(300)).is_none());
    let theirs = request.accept(server.qp(), &saying(b"")).unwrap();
    assert!(matches!(client.event(), Event::Established { .. }));
    assert!(matches!(server.event(), Event::Established { .. }));
    talk((&client, &ours), (&server, &theirs), 1);
}

#[test]
fn both_ends_may_be_on_one_device() {
    let [side, _] = pair();
    let [ours, theirs] = {
        let _listener = side.channel.listen(SERVICE).unwrap();
        let ours = side
            .channel
            .connect(side.address(), SERVICE, side.qp(), &saying(b""))
            .unwrap();
        [
            ours,
            side.request().accept(side.qp(), &saying(b"")).unwrap(),
        ]
    };
    let ids = [ours.id(), theirs.id()];
    for _ in ids {
        assert!(matches!(side.event(), Event::Established { id, .. } if ids.contains(&id)));
    }
    drop(ours);
    assert!(matches!(side.event(), Event::Disconnected { id } if id == theirs.id()));
}

#[test]
fn a_channel_is_readable_as_long_as_an_event_waits() {
    let [client, server] = pair();
    let _listener = server.channel.listen(SERVICE).unwrap();
    assert!(!is_readable(&server.channel, Duration::ZERO));
    let attempt = || {
        client
            .channel
            .connect(server.address(), SERVICE, client.qp(), &saying(b""))
            .unwrap()
    };
    let ours = [attempt(), attempt()];
    // Nobody polls: the device's thread answers, and both wait here.
    while !is_readable(&server.channel, PATIENCE) {}
    let first = server.request();
    let second = server.request();
    assert!(!is_readable(&server.channel, Duration::ZERO));
    drop((first, second));
    while !is_readable(&client.channel, PATIENCE) {}
    for _ in ours {
        assert!(is_readable(&client.channel, PATIENCE));
        assert!(matches!(client.event(), Event::Rejected { .. }));
    }
    assert!(!is_readable(&client.channel, Duration::ZERO));
}

fn is_readable(channel: &EventChannel, patience: Duration) -> bool {
    use std::os::fd::AsFd;
    let fd = channel.as_fd().as_raw_fd();
    let mut poll = mio::Poll::new().unwrap();
    let mut source = mio::unix::SourceFd(&fd);
    poll.registry()
        .register(&mut source, mio::Token(0), mio::Interest::READABLE)
        .unwrap();
    let mut events = mio::Events::with_capacity(1);
    poll.poll(&mut events, Some(patience)).unwrap();
    !events.is_empty()
}

#[test]
fn a_datagram_service_says_where_its_queue_pair_is() {
    let faults = Faults {
        seed: 5,
        loss_percent: 30.0,
        ..Faults::default()
    };
    let [client, server] = [Side::new(&faults), Side::new(&Faults::default())];
    let service = ServiceId::udp(7174);
    let ask = || {
        client
            .channel
            .resolve(server.address(), service, b"who?")
            .unwrap()
    };
    let id = ask();
    assert!(matches!(
        client.event(),
        Event::Unresolved { id: of, status: 1, .. } if of == id
    ));
    let _listener = server.channel.listen_datagram(service).unwrap();
    for round in 0..10 {
        let id = ask();
        let question = server.question();
        assert_eq!(question.private_data()[..5], *b"who?\0");
        assert_eq!(
            (question.service(), question.peer()),
            (service, client.address().ip())
        );
        if round % 2 == 0 {
            question.answer(Qpn::new(round), 0x0123_4567, b"me");
        } else {
            question.refuse(b"not me");
        }
        match client.event() {
            Event::Resolved {
                id: of,
                qpn,
                qkey,
                private_data,
            } => {
                assert_eq!((of, qpn, qkey), (id, Qpn::new(round), 0x0123_4567));
                assert_eq!(
                    (private_data[..3].to_vec(), round % 2),
                    (b"me\0".to_vec(), 0)
                );
            }
            Event::Unresolved { id: of, status, .. } => {
                assert_eq!((of, status, round % 2), (id, 2, 1));
            }
            other => panic!("{other:?}"),
        }
    }
}
