//! Rubbish from a stranger, in the midst of what two endpoints say to each other.

mod common;

use std::net::{IpAddr, SocketAddr};

use common::{Stream, config, connect, packets_of, scratch, traffic};
use lowtide_transport::message::Endpoint;
use lowtide_transport::udp::{Socket, SocketOptions};
use lowtide_transport_proto::cm::GSI_QKEY;
use lowtide_transport_proto::icrc::{Flow, Icrc};
use lowtide_transport_proto::wire::{Class, OPCODES, PayloadRule};

/// Datagrams of all sorts of wrongness: noise, truncated packets, flipped bits; and packets with a
/// right ICRC of every opcode, for queue pair 1, for the queue pair `qpn`, for none.
fn garbage(round: u64, from: SocketAddr, to: SocketAddr, qpn: u32) -> Vec<u8> {
    let mut state = round.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    if round.is_multiple_of(4) {
        return (0..1 + next() % 300).map(|_| next() as u8).collect();
    }
    let row = &OPCODES[next() as usize % OPCODES.len()];
    let payload = match row.payload {
        PayloadRule::None => 0,
        PayloadRule::Full => 4096,
        PayloadRule::Eight => 8,
        PayloadRule::Tail | PayloadRule::Any if row.class == Class::Ud => 256,
        PayloadRule::Tail | PayloadRule::Any => 4 + 4 * (next() as usize % 64),
    };
    let mut bytes: Vec<u8> = (0..row.shape.header_len() + payload)
        .map(|_| next() as u8)
        .collect();
    bytes[..4].copy_from_slice(&[row.opcode.code(), 0, 0xFF, 0xFF]);
    let target = [1, qpn, next() as u32][next() as usize % 3];
    bytes[5..8].copy_from_slice(&target.to_be_bytes()[1..]);
    if row.class == Class::Ud {
        bytes[12..16].copy_from_slice(&GSI_QKEY.to_be_bytes());
        let mad = row.shape.header_len();
        bytes[mad..mad + 4].copy_from_slice(&[1, 7, 2, 3]);
        bytes[mad + 16..mad + 18].copy_from_slice(&[0, 0x10 + (next() % 9) as u8]);
    }
    let flow = match (from.ip(), to.ip()) {
        (IpAddr::V4(source), IpAddr::V4(target)) => Flow::v4(source, target, from.port()),
        _ => unreachable!("the tests use IPv4"),
    };
    let header = row.shape.header_len();
    let mut crc = Icrc::begin(&flow, &bytes[..header], bytes.len() + 4);
    crc.update(&bytes[header..]);
    let (tail, len) = crc.finish(0);
    bytes.extend_from_slice(&tail[..len]);
    match round % 4 {
        1 => bytes.truncate(next() as usize % bytes.len() + 1),
        2 => {
            let at = next() as usize % bytes.len();
            bytes[at] ^= 1 << (next() % 8);
        }
        _ => {}
    }
    bytes
}

#[test]
fn garbage_in_the_middle_of_traffic_is_counted_and_harms_nobody() {
    const COUNT: u64 = 10_000;
    // Queue pair numbers are secret; a capture tells.
    let spied = scratch("spied.pcap");
    let mut a = config(1);
    a.capture = Some(spied.clone());
    let mut a = Endpoint::bind(a).unwrap();
    let mut b = Endpoint::bind(config(2)).unwrap();
    let (at_a, at_b) = connect(&mut a, &mut b);
    let targets = [a.local_addr(), b.local_addr()];
    let mut streams = [Stream::new(at_a, 1 << 20), Stream::new(at_b, 1 << 20)];
    traffic(&mut a, &mut b, &mut streams, |_, _| true);
    let packets = packets_of(&spied);
    std::fs::remove_file(spied).unwrap();
    let qpns = targets.map(|target| {
        let to = packets.iter().filter(|(to, _)| *to == target);
        let qpn = |bytes: &[u8]| u32::from_be_bytes([0, bytes[5], bytes[6], bytes[7]]);
        let mut qpns = to.map(|(_, bytes)| qpn(bytes));
        qpns.find(|qpn| *qpn != 1).expect("a stream of packets")
    });
    // A socket of our own kind, or the kernel's Identification would spoil every ICRC.
    let options = SocketOptions {
        offload: false,
        ..SocketOptions::default()
    };
    let mut stranger = Socket::bind(common::address(), &options).unwrap();
    let from = stranger.local_addr();
    let bytes = 8 << 20;
    streams.iter_mut().for_each(|stream| stream.go_on(bytes));
    let mut sent = 0;
    traffic(&mut a, &mut b, &mut streams, |_, _| {
        for _ in 0..if sent < COUNT { 20 } else { 0 } {
            // Every kind to each of them.
            let side = sent as usize / 4 % 2;
            let datagram = garbage(sent, from, targets[side], qpns[side]);
            common::send_raw(&mut stranger, targets[side], &datagram);
            sent += 1;
        }
        sent == COUNT
    });
    let dropped = |endpoint: &Endpoint| {
        let counters = endpoint.counters();
        counters.rx_malformed + counters.rx_bad_icrc + counters.rx_unknown_qp + counters.rx_overflow
    };
    assert!(dropped(&a) + dropped(&b) > COUNT / 2);
    for endpoint in [&a, &b] {
        // What was whole and for the right queue pair came from the wrong address.
        assert!(endpoint.counters().rx_wrong_peer > 100);
        assert_eq!(endpoint.connections(), 1);
    }
}
