//! The device of an open context is deleted, after its link went down.
//!
//! It takes the second device of `LOWTIDE_DEVICE` away from the machine, so it is `ci/guest/verbs` that runs
//! it, after all others.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lowtide_transport::ibv;
use lowtide_transport::raw::types::*;

use super::provider::device_name;
use super::suite::{End, RTS_RC, attr_to, end, to};

/// Far longer than anything here takes, but for what would never end.
const SOON: Duration = Duration::from_secs(10);

/// The network interface of the second device.
fn interface() -> String {
    let path = format!("/sys/class/infiniband/{}/parent", device_name(1));
    std::fs::read_to_string(path).unwrap().trim().to_owned()
}

/// Nothing will arrive, so there is little patience.
fn connect(a: &End, b: &End) {
    a.to_init();
    a.to_rtr(&b.context, b.qp.qpn());
    let attr = QpAttr {
        timeout: 8,
        retry_cnt: 1,
        ..attr_to(&a.context, Qpn::new(0))
    };
    a.qp.modify(&to(attr, QpState::Rts), RTS_RC).unwrap();
}

#[test]
#[ignore = "it takes the device away: ci/guest/verbs runs it last"]
fn a_device_that_is_taken_away_is_told_and_let_go() {
    let (a, b) = (end(QpType::Rc), end(QpType::Rc));
    connect(&a, &b);
    connect(&b, &a);
    b.receive(1, &[]);
    a.post(2, SendOp::Send, &[]);
    a.succeed();
    b.succeed();

    let (name, link) = (device_name(1), interface());
    let down = Command::new("ip")
        .args(["link", "set", &link, "down"])
        .status();
    assert!(down.unwrap().success());
    let start = Instant::now();
    while b.event() != AsyncEvent::PortError(1) {
        assert!(start.elapsed() < SOON, "no word of the port");
    }
    let port = b.context.query_port(1).unwrap();
    assert_ne!(port.state, PortState::Active, "{port:?}");
    a.post(3, SendOp::Send, &[]);
    let work = a.next();
    assert_eq!((work.wr_id, work.status), (3, Status::RetryExceeded));

    // The kernel waits for whoever has the device open, and it is as it was for those.
    let mut deleting = Command::new("rdma")
        .args(["link", "delete", &name])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    // Nothing tells that the kernel has begun to wait.
    std::thread::sleep(Duration::from_millis(500));
    let start = Instant::now();
    b.receive(4, &[]);
    let broken = to(attr_to(&b.context, Qpn::new(0)), QpState::Err);
    b.qp.modify(&broken, QpAttrMask::STATE).unwrap();
    let work = b.next();
    assert_eq!((work.wr_id, work.status), (4, Status::Flushed));
    drop((a, b));
    assert!(
        start.elapsed() < SOON,
        "letting go took {:?}",
        start.elapsed()
    );

    while deleting.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < SOON, "{name} is not let go");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(deleting.wait().unwrap().success());
    let left = ibv::devices().unwrap();
    assert!(left.iter().all(|device| device.name != name), "{left:?}");
    let refused = ibv::Context::open(&name).map(drop).unwrap_err();
    assert_eq!(refused, Error::Argument("no device of this name"));
}
