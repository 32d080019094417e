//! Multicast groups of IPv6. A loopback interface has none, so there is a pair of others in a network
//! namespace of the test's own.

use std::net::{Ipv6Addr, SocketAddr};

use super::super::suite::datagrams::everybody_hears;
use super::*;

/// (Devices of libibverbs keep a queue pair that is in a group.)
#[test]
fn a_queue_pair_that_is_destroyed_leaves_its_groups() {
    let (a, b) = pair(QpType::Ud);
    let group = Gid::from_ip("239.77.1.3".parse().unwrap());
    let mut attr = attr_to(&a.context, Qpn::new(0)).address;
    attr.dgid = group;
    let ah = a.pd.address_handle(&attr).unwrap();
    let to = Destination {
        ah: ah.id(),
        qpn: Qpn::new(0xFF_FFFF),
        qkey: QKEY,
    };
    // Twice is as good as once.
    for _ in 0..2 {
        b.qp.attach_multicast(group).unwrap();
    }
    for id in 0..6 {
        b.receive(id, &[b.sge(0, 200)]);
    }
    // Its place in the device's tables is the next one's.
    for round in 0..3 {
        let other = end_on(b.context.clone(), QpType::Ud, None);
        other.connect(&b.context, Qpn::new(0));
        other.receive(1, &[other.sge(0, 200)]);
        if round == 0 {
            other.qp.attach_multicast(group).unwrap();
            drop(other.qp);
        }
        let wr = SendWr {
            to: Some(to),
            ..signalled(1, SendOp::Send, &[])
        };
        a.try_post(wr).unwrap();
        a.succeed();
        assert_eq!(b.succeed().wr_id, round);
        assert_eq!(other.cq.poll(1, &mut Vec::new()), Ok(0));
    }
    assert!(b.is_silent(), "one copy of each");
}

const SET_UP: &str = "ip link set lo up
ip link add here type veth peer name there
ip link set here up
ip link set there up
ip -6 addr add fd00::1/64 dev here nodad
ip -6 addr add fd00::2/64 dev here nodad";

#[test]
fn every_member_of_a_group_of_ipv6_gets_a_copy() {
    common::in_a_network_of_its_own(SET_UP, &inside_of(module_path!()));
}

#[test]
#[ignore = "it needs addresses: the test above runs it in a namespace that has them"]
fn inside() {
    let [a, b] = [1, 2].map(|last| {
        let ip = Ipv6Addr::new(0xFD00, 0, 0, 0, 0, 0, 0, last);
        let context = Context::open(SocketAddr::from((ip, 4791)), &options());
        end_on(context.unwrap(), QpType::Ud, None)
    });
    a.connect(&b.context, b.qp.qpn());
    b.connect(&a.context, a.qp.qpn());
    everybody_hears("ff15::77".parse().unwrap(), &a, &b);
}
