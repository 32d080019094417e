//! A process that may write no large files (`ulimit -f`): its shared memory and its captures are files,
//! too. What does not fit is an error of the call, and no signal ends the process.

use std::process::Command;
use std::thread;

use lowtide_transport::verbs::{DeviceOptions, SameHost};

use super::paths::{Slab, meet};
use super::*;

/// In the environment of the process that has the limit.
const LIMITED: &str = "LOWTIDE_TEST_LIMITED";

/// Files of this process may have so many bytes from now on.
fn may_write(bytes: libc::rlim_t) {
    common::limit(libc::RLIMIT_FSIZE, bytes);
}

#[test]
fn files_that_may_not_grow_are_errors_and_end_nobody() {
    let name = thread::current().name().unwrap_or_default().to_owned();
    let module = name.rsplit_once("::").expect("a test's name").0;
    let output = Command::new(std::env::current_exe().unwrap())
        .args([&format!("{module}::limited"), "--exact", "--nocapture"])
        .env(LIMITED, "yes")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", output.status);
}

/// The process of the test above; without its word it does nothing.
#[test]
fn limited() {
    if std::env::var_os(LIMITED).is_none() {
        return;
    }
    let by_udp = SAME_HOST == SameHost::Udp;
    // Shorter than the table that peers on this host read.
    may_write(1 << 20);
    match Context::open(common::address(), &options()) {
        Ok(_) => assert!(by_udp),
        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EFBIG)),
    }
    a_capture_ends_and_the_traffic_does_not();
    // Shorter than a slab.
    may_write(6 << 20);
    let (a, b) = pair(QpType::Rc);
    match a.pd.slab(16 << 20, ALL) {
        Ok(_) => assert!(by_udp),
        Err(error) => assert_eq!(error, Error::Os(libc::EFBIG)),
    }
    // The peer may have one, and we may not write that far by ourselves.
    may_write(libc::RLIM_INFINITY);
    let slab = Slab::new(&b, 16 << 20);
    may_write(6 << 20);
    meet(&a, slab.remote(0), a.sge(0, 4096));
    let text = bytes(100_000, 3);
    a.pages.write(0, &text);
    a.post(
        1,
        SendOp::Write(slab.remote(12 << 20)),
        &[a.sge(0, 100_000)],
    );
    a.succeed();
    a.post(
        2,
        SendOp::Read(slab.remote(12 << 20)),
        &[a.sge(200_000, 100_000)],
    );
    a.succeed();
    assert_eq!(a.pages.read(200_000, 100_000), text);
}

fn a_capture_ends_and_the_traffic_does_not() {
    let file = std::env::temp_dir().join(format!("lowtide-limited-{}.pcap", std::process::id()));
    let captured = DeviceOptions {
        capture: Some(file.clone()),
        ..options()
    };
    let a = end_on(
        Context::open(common::address(), &captured).unwrap(),
        QpType::Rc,
        None,
    );
    let plain = DeviceOptions::default();
    let b = end_on(
        Context::open(common::address(), &plain).unwrap(),
        QpType::Rc,
        None,
    );
    a.connect(&b.context, b.qp.qpn());
    b.connect(&a.context, a.qp.qpn());
    for _ in 0..4 {
        a.post(1, SendOp::Write(b.remote(0)), &[a.sge(0, LEN as u32)]);
        a.succeed();
    }
    drop(a);
    let len = std::fs::metadata(&file).unwrap().len();
    std::fs::remove_file(file).unwrap();
    assert!(0 < len && len <= 1 << 20, "{len}");
}
