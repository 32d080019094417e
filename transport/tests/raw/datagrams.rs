//! UD: addresses, the IP header in front, groups.

use std::net::IpAddr;

use super::*;

const GRH: usize = 40;

fn post(end: &End, ah: &AddressHandle, qpn: Qpn, qkey: u32, op: SendOp, len: u32) {
    let to = Destination {
        ah: ah.id(),
        qpn,
        qkey,
    };
    let list = [end.sge(0, len)];
    let list = if len > 0 { &list[..] } else { &[] };
    let wr = SendWr {
        to: Some(to),
        ..signalled(1, op, list)
    };
    end.try_post(wr).unwrap();
}

#[test]
fn an_answer_finds_its_way_by_the_header_of_the_question() {
    let (a, b) = pair(QpType::Ud);
    let ah = handle(&a, &b.context);
    for (round, len) in [0u32, 1, 100, 1024, 4096].into_iter().enumerate() {
        let text = bytes(len as usize, round);
        a.pages.write(0, &text);
        b.receive(5, &[b.sge(0, 10), b.sge(50_000, GRH as u32 + 4096)]);
        post(&a, &ah, b.qp.qpn(), QKEY, SendOp::SendImm(9), len);
        let got = b.succeed();
        assert_eq!((got.byte_len, got.imm), (GRH as u32 + len, Some(9)));
        assert_eq!((got.source, got.qpn), (a.qp.qpn(), b.qp.qpn()));
        assert_eq!(got.flags, WcFlags::GRH | WcFlags::WITH_IMM);
        let mut whole = b.pages.read(0, 10);
        whole.extend(b.pages.read(50_000, GRH - 10 + len as usize));
        assert_eq!(whole[GRH..], text);
        a.succeed();

        let header: [u8; GRH] = whole[..GRH].try_into().unwrap();
        let back = AhAttr {
            sgid_index: b.context.gid().index as u8,
            ..AhAttr::from_grh(&header).unwrap()
        };
        assert_eq!(back.dgid, a.context.gid().gid);
        let back = b.pd.address_handle(&back).unwrap();
        a.receive(6, &[a.sge(0, 100)]);
        post(&b, &back, got.source, QKEY, SendOp::Send, 3);
        assert_eq!(a.succeed().source, b.qp.qpn());
        b.succeed();
    }
    assert_eq!(AhAttr::from_grh(&[0x11; GRH]), None);
}

#[test]
fn what_does_not_fit_is_dropped_and_harms_nobody() {
    let (a, b) = pair(QpType::Ud);
    let ah = handle(&a, &b.context);
    let (b_qpn, nobody) = (b.qp.qpn(), Qpn::new(b.qp.qpn().value() ^ 0x10_0000));
    b.receive(1, &[b.sge(0, 140)]);
    post(&a, &ah, b_qpn, QKEY + 1, SendOp::Send, 8); // another key
    post(&a, &ah, nobody, QKEY, SendOp::Send, 8); // another queue pair
    post(&a, &ah, b_qpn, QKEY, SendOp::Send, 101); // too long for the receive
    post(&a, &ah, b_qpn, QKEY, SendOp::Send, 100);
    for _ in 0..4 {
        a.succeed();
    }
    assert_eq!(b.succeed().byte_len, 140);
    post(&a, &ah, b_qpn, QKEY, SendOp::Send, 1); // no receive
    a.succeed();
    assert!(b.is_silent());
    assert_eq!(
        (a.qp.query().state, b.qp.query().state),
        (QpState::Rts, QpState::Rts)
    );

    let to = Destination {
        ah: ah.id(),
        qpn: b_qpn,
        qkey: QKEY,
    };
    let write = SendOp::Write(b.remote(0));
    let refused = a.try_post(SendWr {
        to: Some(to),
        ..signalled(1, write, &[])
    });
    assert_refused(refused, Error::Argument(""));
}

#[test]
fn a_datagram_is_one_packet() {
    let (a, b) = pair(QpType::Ud);
    let ah = handle(&a, &b.context);
    let to = Destination {
        ah: ah.id(),
        qpn: b.qp.qpn(),
        qkey: QKEY,
    };
    let long = [a.sge(0, 4097)];
    let refused = a.try_post(SendWr {
        to: Some(to),
        ..signalled(1, SendOp::Send, &long)
    });
    assert_refused(refused, Error::Argument(""));
}

#[test]
fn every_member_of_a_group_gets_a_copy() {
    let (a, b) = pair(QpType::Ud);
    everybody_hears("239.77.1.2".parse().unwrap(), &a, &b);
}

/// What `a` sends to the group reaches all who are in it on the device of `b`, and who has left not.
pub fn everybody_hears(group: IpAddr, a: &End, b: &End) {
    // Two queue pairs of one device, and one of another.
    let c = end_on(b.context.clone(), QpType::Ud, None);
    c.connect(&b.context, Qpn::new(0));
    let members = [b, &c];
    let gid = Gid::from_ip(group);
    for member in members {
        member.qp.attach_multicast(gid).unwrap();
        member.receive(1, &[member.sge(0, 200)]);
        member.receive(2, &[member.sge(300, 200)]);
    }
    let mut attr = attr_to(&a.context, Qpn::new(0)).address;
    attr.dgid = gid;
    let ah = a.pd.address_handle(&attr).unwrap();
    let everybody = Qpn::new(0xFF_FFFF);
    a.pages.write(0, b"to whom it may concern");
    post(a, &ah, everybody, QKEY, SendOp::Send, 22);
    a.succeed();
    for member in members {
        let got = member.succeed();
        assert_eq!((got.wr_id, got.source, got.byte_len), (1, a.qp.qpn(), 62));
        assert_eq!(member.pages.read(40, 22), b"to whom it may concern");
        let header: [u8; GRH] = member.pages.read(0, GRH).try_into().unwrap();
        match group {
            IpAddr::V4(group) => assert_eq!(header[36..], group.octets()),
            IpAddr::V6(group) => assert_eq!(header[24..], group.octets()),
        }
    }
    c.qp.detach_multicast(gid).unwrap();
    assert!(c.qp.detach_multicast(gid).is_err());
    post(a, &ah, everybody, QKEY, SendOp::Send, 22);
    assert_eq!(b.succeed().wr_id, 2);
    assert!(b.is_silent() && c.is_silent());
}

#[test]
fn only_datagrams_go_to_groups_and_only_of_their_family() {
    let gid = Gid::from_ip("239.77.1.2".parse().unwrap());
    let (rc, b) = (end(QpType::Rc), end(QpType::Ud));
    assert!(matches!(
        rc.qp.attach_multicast(gid),
        Err(Error::Argument(_))
    ));
    let unicast = Gid::from_ip("10.0.0.1".parse().unwrap());
    assert!(matches!(
        b.qp.attach_multicast(unicast),
        Err(Error::Argument(_))
    ));
    if provider::HAS_WORDS {
        // A device has addresses of both.
        let v6 = Gid::from_ip("ff0e::7".parse().unwrap());
        assert!(matches!(b.qp.attach_multicast(v6), Err(Error::Argument(_))));
    }
}

#[test]
fn datagrams_and_a_connection_share_a_device() {
    let (a, b) = pair(QpType::Ud);
    let (c, d) = (
        end_on(a.context.clone(), QpType::Rc, None),
        end_on(b.context.clone(), QpType::Rc, None),
    );
    c.connect(&d.context, d.qp.qpn());
    d.connect(&c.context, c.qp.qpn());
    let ah = handle(&a, &b.context);
    for round in 0..200 {
        for _ in 0..16 {
            post(&a, &ah, b.qp.qpn(), QKEY, SendOp::Send, 1024);
        }
        c.post(2, SendOp::Write(d.remote(0)), &[c.sge(0, 3000)]);
        c.succeed();
        for _ in 0..16 {
            assert_eq!(a.succeed().wr_id, 1, "round {round}");
        }
    }
}

#[test]
fn ipv6_has_its_header_whole() {
    // There is one loopback address, so both ends are of one device.
    let address = "[::1]:0".parse().unwrap();
    let context = Context::open(address, &options()).unwrap();
    let (a, b) = (
        end_on(context.clone(), QpType::Ud, None),
        end_on(context.clone(), QpType::Ud, None),
    );
    a.connect(&context, Qpn::new(0));
    b.connect(&context, Qpn::new(0));
    let ah = handle(&a, &context);
    b.receive(1, &[b.sge(0, 200)]);
    post(&a, &ah, b.qp.qpn(), QKEY, SendOp::Send, 100);
    assert_eq!(b.succeed().byte_len, 140);
    let header: [u8; GRH] = b.pages.read(0, GRH).try_into().unwrap();
    assert_eq!(header[0] >> 4, 6);
    let back = AhAttr::from_grh(&header).unwrap();
    assert_eq!(back.dgid, context.gid().gid);
}
