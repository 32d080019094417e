//! What the tests over real sockets share: addresses nobody else uses, and loops with an end.
#![allow(dead_code, reason = "each test program uses what it needs")]

use std::fs::File;
use std::io::IoSlice;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use lowtide_transport::message::{ConnId, Endpoint, EndpointConfig, EndpointCtx, Event, SendError};
use lowtide_transport::pcap::Reader;
use lowtide_transport::raw;
use lowtide_transport::udp::{Frame, Payload, Socket, TransmitBatch};

/// Nothing here takes longer, even on a machine that does ten other things.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A loopback address of this process alone.
pub fn address() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(1);
    let pid = std::process::id();
    let next = NEXT.fetch_add(1, Ordering::Relaxed);
    // Processes run at the same time only if their ids are close to each other.
    let high = (pid >> 7 & 0x1F) as u8 | ((next >> 8 & 3) as u8) << 5;
    let low = (pid & 0x7F) as u8;
    SocketAddr::from((Ipv4Addr::new(127, 128 | high, 1 + low, next as u8), 4791))
}

/// A configuration with a node number of its own.
pub fn config(node: u64) -> EndpointConfig {
    EndpointConfig::new(address(), node, 1)
}

/// Polls all `endpoints` in turn, for at most [`PATIENCE`], until `done`.
pub fn run_until<S>(
    endpoints: &mut [&mut Endpoint],
    state: &mut S,
    mut handler: impl FnMut(&mut S, usize, &mut EndpointCtx, Event<'_>),
    mut done: impl FnMut(&mut S, &mut [&mut Endpoint]) -> bool,
) {
    let start = Instant::now();
    while !done(state, endpoints) {
        if start.elapsed() > PATIENCE {
            let counters: Vec<_> = endpoints.iter().map(|e| e.counters()).collect();
            panic!("nothing more happens: {counters:#?}");
        }
        for (index, endpoint) in endpoints.iter_mut().enumerate() {
            endpoint
                .poll(Some(Duration::ZERO), &mut |ctx, event| {
                    handler(state, index, ctx, event)
                })
                .unwrap();
        }
    }
}

/// Connects `a` (node 1 or so) to `b` and returns the connection as both see it.
pub fn connect(a: &mut Endpoint, b: &mut Endpoint) -> (ConnId, ConnId) {
    let ours = a.connect(b.local_addr(), b"hello from a");
    let mut seen: [Option<ConnId>; 2] = [None, None];
    run_until(
        &mut [a, b],
        &mut seen,
        |seen, side, _, event| match event {
            Event::Connected {
                conn,
                hello,
                is_incoming,
                ..
            } => {
                assert_eq!(is_incoming, side == 1);
                assert_eq!(hello, if side == 1 { &b"hello from a"[..] } else { b"" });
                seen[side] = Some(conn);
            }
            other => panic!("{other:?}"),
        },
        |seen, _| seen.iter().all(Option::is_some),
    );
    assert_eq!(seen[0], Some(ours));
    (ours, seen[1].unwrap())
}

/// A checked stream on one connection: both sides send the same sequence of messages.
#[derive(Debug)]
pub struct Stream {
    conn: ConnId,
    total: u64,
    sent: (u64, u64),
    received: (u64, u64),
    buffer: Vec<u8>,
}

impl Stream {
    pub fn new(conn: ConnId, total: u64) -> Stream {
        Stream {
            conn,
            total,
            sent: (0, 0),
            received: (0, 0),
            buffer: Vec::new(),
        }
    }

    /// So many bytes more.
    pub fn go_on(&mut self, more: u64) {
        self.total += more;
    }

    /// Sends until the connection takes no more.
    pub fn send(&mut self, endpoint: &mut Endpoint) {
        while !self.has_sent_all() && self.send_one(endpoint) {}
    }

    /// Sends the next; whether the connection takes it.
    pub fn send_one(&mut self, endpoint: &mut Endpoint) -> bool {
        let len = message(self.sent.0, &mut self.buffer);
        match endpoint.send(self.conn, &[IoSlice::new(&self.buffer)]) {
            Ok(()) => self.sent = (self.sent.0 + 1, self.sent.1 + len),
            Err(SendError::WouldBlock) => return false,
            Err(error) => panic!("{error}"),
        }
        true
    }

    pub fn receive(&mut self, conn: ConnId, bytes: &[u8]) {
        assert_eq!(conn, self.conn);
        let len = message(self.received.0, &mut self.buffer);
        assert!(
            bytes == self.buffer,
            "message {} of {len} bytes",
            self.received.0
        );
        self.received = (self.received.0 + 1, self.received.1 + len);
    }

    pub fn conn(&self) -> ConnId {
        self.conn
    }

    pub fn received(&self) -> u64 {
        self.received.1
    }

    pub fn has_received_all(&self) -> bool {
        self.received.1 >= self.total
    }

    pub fn has_sent_all(&self) -> bool {
        self.sent.1 >= self.total
    }

    pub fn is_done(&self) -> bool {
        self.has_sent_all() && self.has_received_all()
    }
}

/// Makes message `number`; its length is one of many and its bytes depend on its number.
fn message(number: u64, into: &mut Vec<u8>) -> u64 {
    const LENS: [usize; 16] = [
        1,
        0,
        64,
        4_000,
        4_076,
        4_077,
        65_536,
        17,
        300,
        61_424,
        61_425,
        8_192,
        200_000,
        5,
        1 << 20,
        131_072,
    ];
    let len = LENS[number as usize % LENS.len()];
    into.clear();
    into.extend((0..len).map(|i| (i as u64).wrapping_mul(number | 1).wrapping_add(number) as u8));
    len as u64
}

/// Runs `act` while another thread is in the middle of the device, where a real one would send or
/// copy; fails if `act` waits for it. `other` is a queue pair of the device that nobody uses.
pub fn beside_one_that_drives(other: &raw::QueuePair, act: impl FnOnce() + Send) {
    let (held, is_held) = mpsc::channel();
    let (release, is_released) = mpsc::channel::<()>();
    let (done, is_done) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(move || {
            let stay = || {
                held.send(()).unwrap();
                // An error is the release.
                let _ = is_released.recv();
            };
            // SAFETY: nothing is posted.
            unsafe { other.post_sends(|_| stay()) };
        });
        is_held.recv_timeout(PATIENCE).unwrap();
        scope.spawn(move || {
            act();
            let _ = done.send(());
        });
        let is_done = is_done.recv_timeout(PATIENCE);
        drop(release);
        assert_eq!(is_done, Ok(()), "it waited, or failed");
    });
}

/// Gives up root's right to lock what it likes and to reach whom it likes; rights are those of this
/// thread and of the threads that it starts.
pub fn be_as_anybody() {
    let header = [0x2008_0522u32, 0];
    let none = [0u32; 6];
    // SAFETY: header and data are as long as the version in the header says, and are only read.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
    assert_eq!(result, 0);
}

/// Sets a limit of this process, or as much of it as it may be given at all.
pub fn limit(what: libc::__rlimit_resource_t, most: libc::rlim_t) {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the structure is alive, and filled.
    let asked = unsafe { libc::getrlimit(what, &raw mut limit) };
    limit.rlim_cur = most.min(limit.rlim_max);
    // SAFETY: the structure is alive, and only read.
    let set = unsafe { libc::setrlimit(what, &raw const limit) };
    assert_eq!((asked, set), (0, 0));
}

/// The most that this process may lock from now on, bytes.
pub fn may_lock(bytes: libc::rlim_t) {
    limit(libc::RLIMIT_MEMLOCK, bytes);
}

/// A test cannot be made on this machine. Said, and a failure for who asks for all of them.
pub fn not_checked(what: &str) {
    eprintln!("NOT CHECKED: {what}");
    let is_wanted = std::env::var_os("LOWTIDE_CHECK_ALL").is_some();
    assert!(!is_wanted, "{what}, and LOWTIDE_CHECK_ALL is set");
}

/// Sends a datagram as it is.
pub fn send_raw(socket: &mut Socket, target: SocketAddr, bytes: &[u8]) {
    let header_len = bytes.len().min(12);
    let mut frame = Frame {
        target,
        header: [0; 64],
        header_len: header_len as u8,
        trailer_len: 0,
        trailer: [0; 8],
        payload: Payload {
            region: 0,
            len: (bytes.len() - header_len) as u32,
            offset: 0,
        },
        is_spoilt: false,
    };
    frame.header[..header_len].copy_from_slice(&bytes[..header_len]);
    let mut batch = TransmitBatch::default();
    batch.push(frame);
    let report = socket.send(&mut batch, |_| &bytes[header_len..], |_, _, _| {});
    assert_eq!(report.datagrams, 1);
}

/// Runs an ignored test of this program in a network namespace of its own, after `set_up`, a line for
/// the shell.
pub fn in_a_network_of_its_own(set_up: &str, test: &str) {
    let inside = |line: &str| {
        std::process::Command::new("unshare")
            .args(["-rn", "sh", "-ec", line, "sh"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", test, "--ignored", "--nocapture"])
            .output()
    };
    if !inside(set_up).is_ok_and(|output| output.status.success()) {
        // Neither root nor user namespaces are to be had, or a tool is missing.
        return not_checked(&format!("{test}: no network namespace with {set_up:?}"));
    }
    let output = inside(&format!("{set_up}\nexec \"$@\"")).unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}{complaint}"
    );
}

/// Sends and hears both streams to their ends, and asks `also` each time whether that is all.
pub fn traffic(
    a: &mut Endpoint,
    b: &mut Endpoint,
    streams: &mut [Stream; 2],
    mut also: impl FnMut(&[Stream; 2], &mut [&mut Endpoint]) -> bool,
) {
    run_until(
        &mut [a, b],
        streams,
        |streams, side, _, event| match event {
            Event::Message { conn, bytes } => streams[side].receive(conn, bytes),
            Event::Writable { .. } => {}
            other => panic!("{other:?}"),
        },
        |streams, endpoints| {
            for (stream, endpoint) in streams.iter_mut().zip(endpoints.iter_mut()) {
                stream.send(endpoint);
            }
            also(streams, endpoints) && streams.iter().all(Stream::is_done)
        },
    );
}

/// A file of this process's own.
pub fn scratch(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("lowtide-test-{}-{name}", std::process::id()))
}

/// The packets that a capture has so far, and where they went.
pub fn packets_of(path: &Path) -> Vec<(SocketAddr, Vec<u8>)> {
    let mut reader = Reader::new(File::open(path).unwrap()).unwrap();
    let mut packets = Vec::new();
    // It may still be written.
    while let Ok(Some(frame)) = reader.next_frame() {
        let datagram = frame.datagram().unwrap();
        packets.push((datagram.target, datagram.payload.to_vec()));
    }
    packets
}
