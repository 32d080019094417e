//! The interface goes away under a device, and comes back.
//!
//! It is the loopback interface of a network namespace of the test's own, which `unshare` makes; so
//! the test starts itself in there.

use lowtide_transport::verbs::SameHost;

use super::*;

#[test]
fn an_interface_that_goes_away_costs_retries_and_what_comes_after_works() {
    common::in_a_network_of_its_own("", &inside_of(module_path!()));
}

#[test]
#[ignore = "it takes the loopback interface down: the test above runs it in a namespace"]
fn inside() {
    lo(true);
    let ends = [end(QpType::Rc), end(QpType::Rc)];
    connect(&ends, 14, 7);
    let [a, b] = &ends;
    // It is this namespace's that is asked, though /sys shows the outer one's.
    let mtu = || a.context.query_port(1).unwrap().active_mtu;
    lo_mtu(1400);
    assert_eq!(mtu(), Mtu::B1024);
    let other = end_on(a.context.clone(), QpType::Rc, None);
    other.to_init();
    let attr = QpAttr {
        path_mtu: Mtu::B2048,
        ..attr_to(&b.context, b.qp.qpn())
    };
    let refused = Err(Error::Limit("path MTU beyond the port's"));
    assert_eq!(other.qp.modify(&to(attr, QpState::Rtr), RTR_RC), refused);
    lo_mtu(65_536);
    assert_eq!(mtu(), Mtu::B4096);
    b.receive(1, &[]);
    a.post(2, SendOp::Send, &[]);
    a.succeed();
    b.succeed();

    lo(false);
    if SAME_HOST != SameHost::Udp {
        // Shared memory has no interface.
        b.receive(3, &[]);
        a.post(4, SendOp::Send, &[]);
        a.succeed();
        b.succeed();
        return;
    }
    // Nothing will arrive, so there is little patience.
    reset(&ends);
    connect(&ends, 8, 1);
    let start = Instant::now();
    a.post(3, SendOp::Send, &[]);
    let work = a.next();
    assert_eq!((work.wr_id, work.status), (3, Status::RetryExceeded));
    // Four times the timeout for each try, and what a busy machine adds.
    let bound = Duration::from_micros(4096 / 1000 * 256) * 4 * 2 + Duration::from_secs(2);
    assert!(start.elapsed() < bound, "{:?}", start.elapsed());
    assert_eq!(a.qp.query().state, QpState::Err);
    // The kernel refuses what it has no route for, or takes it and it is lost.
    assert!(a.context.counters().ack_timeout > 0);

    // The same devices, when it is back: their queue pairs begin anew.
    lo(true);
    reset(&ends);
    connect(&ends, 14, 7);
    b.receive(4, &[]);
    a.post(5, SendOp::Send, &[]);
    a.succeed();
    assert_eq!(b.succeed().wr_id, 4);
}

fn reset(ends: &[End; 2]) {
    for end in ends {
        let reset = to(QpAttr::default(), QpState::Reset);
        end.qp.modify(&reset, QpAttrMask::STATE).unwrap();
    }
}

/// Both ways, with this timeout and so many retries.
fn connect(ends: &[End; 2], timeout: u8, retry_cnt: u8) {
    let [a, b] = ends;
    for (end, peer) in [(a, b), (b, a)] {
        end.to_init();
        end.to_rtr(&peer.context, peer.qp.qpn());
        let attr = QpAttr {
            timeout,
            retry_cnt,
            ..attr_to(&peer.context, peer.qp.qpn())
        };
        end.qp.modify(&to(attr, QpState::Rts), RTS_RC).unwrap();
    }
}

/// Takes this namespace's loopback interface up or down.
fn lo(is_up: bool) {
    let flags = if is_up { libc::IFF_UP } else { 0 };
    let flags = flags as libc::c_short;
    set_lo(
        libc::SIOCSIFFLAGS,
        libc::__c_anonymous_ifr_ifru { ifru_flags: flags },
    );
}

fn lo_mtu(bytes: libc::c_int) {
    set_lo(
        libc::SIOCSIFMTU,
        libc::__c_anonymous_ifr_ifru { ifru_mtu: bytes },
    );
}

fn set_lo(what: libc::Ioctl, to: libc::__c_anonymous_ifr_ifru) {
    // SAFETY: all zero is an empty request.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[..2].copy_from_slice(&[b'l', b'o'].map(|byte| byte as libc::c_char));
    request.ifr_ifru = to;
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    // SAFETY: the request is alive, and of the type that the call expects.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), what as _, &raw mut request) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}
