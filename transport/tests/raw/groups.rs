//! Multicast groups of IPv6. A loopback interface has none, so there is a pair of others in a network
//! namespace of the test's own.

use std::net::{Ipv6Addr, SocketAddr};

use super::super::suite::datagrams::everybody_hears;
use super::*;

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
