//! A peer whose packets the test makes, and those of a conversation that is over: what comes when, and
//! what comes again.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use lowtide_transport::pcap::Reader;
use lowtide_transport::udp::{ReceiveBatch, Socket, SocketOptions};
use lowtide_transport::verbs::DeviceOptions;
use lowtide_transport_proto::icrc::{Flow, Icrc};

use super::provider::Context;
use super::suite::*;
use crate::common::{self, PATIENCE};
use lowtide_transport::raw::types::*;

/// Number of the queue pair that does not exist.
const QPN: u32 = 0x12_3456;
const ACKNOWLEDGE: u8 = 0x11;
/// No error, and no limit of credits.
const ACK_SYNDROME: u8 = 0x1F;

/// A socket that sends what a device would: with the Identification that its ICRCs are for.
fn hand(at: SocketAddr) -> Socket {
    let options = SocketOptions {
        offload: false,
        ..SocketOptions::default()
    };
    Socket::bind(at, &options).unwrap()
}

/// The next datagram, if one comes in time.
fn take(hand: &mut Socket, patience: Duration) -> Option<Vec<u8>> {
    let since = Instant::now();
    let mut batch = ReceiveBatch::default();
    loop {
        if hand.receive_some(&mut batch, 1).unwrap() > 0 {
            return Some(batch.arrival(0).unwrap().bytes.to_vec());
        }
        if since.elapsed() > patience {
            return None;
        }
        std::thread::yield_now();
    }
}

/// The acknowledgement of a request.
fn acknowledgement(from: SocketAddr, to: SocketAddr, qpn: Qpn, request: &[u8]) -> Vec<u8> {
    let (SocketAddr::V4(source), SocketAddr::V4(target)) = (from, to) else {
        unreachable!("the tests use IPv4");
    };
    let mut bytes = vec![ACKNOWLEDGE, 0, 0xFF, 0xFF];
    bytes.extend_from_slice(&qpn.value().to_be_bytes());
    bytes.push(0);
    bytes.extend_from_slice(&request[9..12]);
    bytes.extend_from_slice(&[ACK_SYNDROME, 0, 0, 1]);
    let flow = Flow::v4(*source.ip(), *target.ip(), source.port());
    let (tail, len) = Icrc::begin(&flow, &bytes, bytes.len() + 4).finish(0);
    bytes.extend_from_slice(&tail[..len]);
    bytes
}

/// A process that was away finds the answer in its socket and the time over: the answer counts.
#[test]
fn an_answer_that_has_come_is_seen_before_its_time_is_over() {
    let a = end(QpType::Rc);
    let mut peer = hand(common::address());
    let (from, there) = (
        peer.local_addr(),
        SocketAddr::new(a.context.gid().gid.ip(), 4791),
    );
    let mut attr = attr_to(&a.context, Qpn::new(QPN));
    attr.address.dgid = Gid::from_ip(from.ip());
    a.to_init();
    a.qp.modify(&to(attr, QpState::Rtr), RTR_RC).unwrap();
    a.qp.modify(&to(attr, QpState::Rts), RTS_RC).unwrap();
    let bystander = end_in(a.context.clone(), a.pd.clone(), QpType::Rc, None);

    a.post(7, SendOp::Send, &[a.sge(0, 8)]);
    let request = take(&mut peer, PATIENCE).expect("the request");
    // 67 ms by its queue pair's attributes, and the device is kept from its socket for thrice as long.
    common::beside_one_that_drives(&bystander.qp, || {
        // It may have asked again meanwhile, for reasons of its own.
        while take(&mut peer, Duration::ZERO).is_some() {}
        common::send_raw(
            &mut peer,
            there,
            &acknowledgement(from, there, a.qp.qpn(), &request),
        );
        std::thread::sleep(Duration::from_millis(200));
    });
    assert_eq!(a.succeed().wr_id, 7);
    assert_eq!(
        take(&mut peer, Duration::from_millis(100)),
        None,
        "it asks for nothing"
    );
    assert_eq!(a.context.counters().ack_timeout, 0);
}

/// All that a peer has ever sent comes once more, from its address: nothing of it is done again, and
/// nobody else on the device notices.
#[test]
fn a_conversation_that_comes_again_changes_nothing() {
    let file = std::env::temp_dir().join(format!("lowtide-replay-{}.pcap", std::process::id()));
    let mut options = DeviceOptions {
        capture: Some(file.clone()),
        ..DeviceOptions::default()
    };
    options.socket.offload = false;
    let address = common::address();
    let a = end(QpType::Rc);
    let b = end_on(Context::open(address, &options).unwrap(), QpType::Rc, None);
    a.connect(&b.context, b.qp.qpn());
    b.connect(&a.context, a.qp.qpn());
    let bystanders = {
        let c = end_in(a.context.clone(), a.pd.clone(), QpType::Rc, None);
        let d = end(QpType::Rc);
        c.connect(&d.context, d.qp.qpn());
        d.connect(&c.context, c.qp.qpn());
        [c, d]
    };
    // Requests of every kind by the one, a WRITE by the other, so that there are answers, too.
    a.receive(1, &[a.sge(0, 5000)]);
    a.pages.write(100_000, &[0; 8]);
    let remote = a.remote(100_000);
    for (op, len) in [
        (SendOp::Send, 5000),
        (SendOp::Write(a.remote(10_000)), 5000),
        (SendOp::Read(a.remote(0)), 5000),
        (SendOp::FetchAdd { remote, add: 1 }, 8),
        (SendOp::AtomicWrite(a.remote(100_008)), 8),
    ] {
        b.post(2, op, &[b.sge(0, len)]);
        b.succeed();
    }
    a.succeed();
    a.post(3, SendOp::Write(b.remote(200_000)), &[a.sge(0, 5000)]);
    a.succeed();
    drop(b);

    let target = SocketAddr::new(a.context.gid().gid.ip(), 4791);
    let mut reader = Reader::new(std::fs::File::open(&file).unwrap()).unwrap();
    let mut recorded = Vec::new();
    while let Some(frame) = reader.next_frame().unwrap() {
        let datagram = frame.datagram().unwrap();
        if datagram.target == target {
            recorded.push(datagram.payload.to_vec());
        }
    }
    std::fs::remove_file(file).unwrap();
    assert!(recorded.len() >= 14, "{}", recorded.len());
    let text = bytes(LEN, 9);
    a.pages.write(0, &text);
    a.receive(4, &[a.sge(500_000, 5000)]);
    let before = a.context.counters();
    let mut stranger = hand(address);
    let [c, d] = &bystanders;
    for (number, datagram) in recorded.iter().enumerate() {
        common::send_raw(&mut stranger, target, datagram);
        c.post(5, SendOp::Write(d.remote(0)), &[c.sge(0, 5000)]);
        c.succeed();
        d.post(6, SendOp::Write(c.remote(number)), &[d.sge(0, 5000)]);
        d.succeed();
    }
    let since = Instant::now();
    let after = loop {
        let now = a.context.counters();
        if now.duplicate_request - before.duplicate_request >= 10 {
            break now;
        }
        assert!(since.elapsed() < PATIENCE, "{before:?} {now:?}");
    };
    // They were understood, and known.
    let bad = |c: lowtide_transport::message::Counters| [c.rx_bad_icrc, c.rx_malformed];
    assert_eq!(
        (bad(after), after.rx_wrong_peer),
        (bad(before), before.rx_wrong_peer)
    );
    assert!(a.is_silent());
    assert_eq!(a.qp.query().state, QpState::Rts);
    assert_eq!(a.pages.read(0, LEN), text);
}
