//! Both ends of each program are ours here; ci/guest has the programs themselves.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, TcpListener};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;

use lowtide_peers::perftest::{Options, PeerError, Test, run};
use lowtide_transport::raw::types::QpType;

/// Addresses of one test: the port of RoCE is fixed.
fn addresses(test: u8) -> [Ipv4Addr; 2] {
    [1, 2].map(|host| Ipv4Addr::new(127, 48, test, host))
}

fn options(test: Test, kind: QpType, own: Ipv4Addr, bytes: u32) -> Options {
    Options {
        test,
        kind,
        own: own.into(),
        capture: None,
        server: None,
        port: 0,
        iterations: 300,
        bytes,
    }
}

#[test]
fn every_program_of_perftest_meets_its_other_end() {
    let [here, there] = addresses(1);
    let cells = [
        (Test::SendLat, QpType::Rc, 64),
        (Test::SendLat, QpType::Ud, 64),
        (Test::SendBw, QpType::Rc, 65_536),
        (Test::WriteBw, QpType::Rc, 65_536),
        (Test::ReadBw, QpType::Rc, 5000),
        (Test::AtomicBw, QpType::Rc, 8),
    ];
    for (test, kind, bytes) in cells {
        let (tell, port) = mpsc::channel();
        let server = thread::spawn(move || {
            run(&options(test, kind, here, bytes), |port| {
                tell.send(port).unwrap();
            })
        });
        let client = Options {
            server: Some(here.to_string()),
            port: port.recv().unwrap(),
            ..options(test, kind, there, bytes)
        };
        let report = run(&client, |_| unreachable!("a client does not wait")).unwrap();
        assert_eq!((report.bytes, report.iterations), (bytes, 300));
        assert_eq!(server.join().unwrap().unwrap().mtu, report.mtu, "{report}");
    }
}

#[test]
fn what_cannot_be_is_said_at_once() {
    let [here, _] = addresses(2);
    let refused = |options: &Options| run(options, |_| {}).unwrap_err();
    for (test, kind) in [
        (Test::ReadBw, QpType::Ud),
        (Test::AtomicBw, QpType::Uc),
        (Test::WriteBw, QpType::Ud),
    ] {
        let error = refused(&options(test, kind, here, 8));
        assert!(matches!(error, PeerError::Options(_)), "{error}");
    }
    for bytes in [0, (8 << 20) + 1] {
        let error = refused(&options(Test::SendBw, QpType::Rc, here, bytes));
        assert!(matches!(error, PeerError::Options(_)), "{error}");
    }
    let error = refused(&options(Test::SendBw, QpType::Ud, here, 4097));
    assert!(error.to_string().contains("say less with -s"), "{error}");
    // An address of nobody's.
    let error = refused(&options(Test::SendBw, QpType::Rc, [192, 0, 2, 1].into(), 8));
    assert!(error.to_string().contains("lowtide devices"), "{error}");
    let nobody = TcpListener::bind((here, 0)).unwrap();
    let port = nobody.local_addr().unwrap().port();
    let taken = Options {
        port,
        ..options(Test::SendBw, QpType::Rc, here, 8)
    };
    let error = refused(&taken);
    assert!(
        matches!(error, PeerError::Listen(p, _) if p == port),
        "{error}"
    );
    drop(nobody);
    let client = Options {
        server: Some(here.to_string()),
        ..taken
    };
    let error = refused(&client).to_string();
    assert!(error.contains("start `ib_send_bw` there first"), "{error}");
}

#[test]
fn a_peer_that_is_not_perftest_is_named() {
    let [here, _] = addresses(3);
    let (tell, port) = mpsc::channel();
    let server = thread::spawn(move || {
        run(&options(Test::WriteBw, QpType::Rc, here, 8), |port| {
            tell.send(port).unwrap();
        })
    });
    let mut stream = std::net::TcpStream::connect((here, port.recv().unwrap())).unwrap();
    std::io::Write::write_all(
        &mut stream,
        b"GET / HTTP/1.1\r\nHost: somebody-or-other\r\n",
    )
    .unwrap();
    let error = server.join().unwrap().unwrap_err();
    assert!(matches!(error, PeerError::Words(_)), "{error}");
}

#[test]
fn rping_meets_itself() {
    let rping = env!("CARGO_BIN_EXE_rping");
    let [here, there] = addresses(4).map(|ip| ip.to_string());
    let mut server = Command::new(rping)
        .args([&here, "-", "30", "3000"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    let mut lines = BufReader::new(server.stderr.take().unwrap());
    lines.read_line(&mut said).unwrap();
    assert!(said.starts_with("waiting"), "{said}");
    let client = Command::new(rping)
        .args([&there, &here, "30", "3000"])
        .output()
        .unwrap();
    assert!(client.status.success(), "{client:?}");
    assert!(server.wait().unwrap().success());
}

#[test]
fn pingpong_meets_itself() {
    let [here, there] = addresses(5).map(|ip| ip.to_string());
    for (kind, bytes) in [("rc", "20000"), ("ud", "1024")] {
        let start = |own: &str, server: &str| {
            Command::new(env!("CARGO_BIN_EXE_pingpong"))
                .args([kind, own, server, "50", bytes])
                .output()
                .unwrap()
        };
        let [server, client] = thread::scope(|scope| {
            let server = scope.spawn(|| start(&here, "-"));
            // Its TCP port is fixed: a client that comes early is refused, and comes again.
            let client = loop {
                let client = start(&there, &here);
                if client.status.success() || server.is_finished() {
                    break client;
                }
            };
            [server.join().unwrap(), client]
        });
        assert!(client.status.success(), "{client:?}");
        assert!(server.status.success(), "{server:?}");
    }
}
