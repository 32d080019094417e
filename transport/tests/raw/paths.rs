//! What is the same whichever way a peer is reached, and that it is the way asked for.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicU64;
use std::thread;

use lowtide_transport::verbs::SameHost;

use super::*;

/// A queue pair's end with a slab for its memory.
struct Slab {
    mr: MemoryRegion,
}

impl Slab {
    fn new(end: &End, len: u64) -> Slab {
        Slab {
            mr: end.pd.slab(len, ALL).unwrap(),
        }
    }

    fn sge(&self, offset: u64, len: u32) -> Sge {
        Sge {
            lkey: self.mr.lkey(),
            addr: self.mr.address() + offset,
            len,
        }
    }

    fn remote(&self, offset: u64) -> Remote {
        Remote {
            va: self.mr.address() + offset,
            rkey: self.mr.rkey(),
        }
    }

    fn words(&self) -> &[AtomicU64] {
        let at = std::ptr::with_exposed_provenance(self.mr.address() as usize);
        // SAFETY: a slab is mapped as long as its region, aligned to a page, and changed by atomic
        // words or by requests that the test waits for.
        unsafe { std::slice::from_raw_parts(at, self.mr.len() as usize / 8) }
    }

    fn fill(&self, from: usize, len: usize, seed: u64) {
        for (i, word) in self.words()[from..from + len].iter().enumerate() {
            word.store(seed.wrapping_mul(0x9E37_79B9) + i as u64, Ordering::Relaxed);
        }
    }

    fn holds(&self, from: usize, len: usize, seed: u64) -> bool {
        let words = self.words()[from..from + len].iter().enumerate();
        words.into_iter().all(|(i, word)| {
            word.load(Ordering::Relaxed) == seed.wrapping_mul(0x9E37_79B9) + i as u64
        })
    }
}

/// The first requests may be faster than the peer's answer to the connection.
fn meet(a: &End, remote: Remote, sge: Sge) {
    let since = Instant::now();
    let is_met = || SAME_HOST != SameHost::Direct || a.context.counters().host_direct > 0;
    while !is_met() {
        assert!(since.elapsed() < PATIENCE);
        a.post(0, SendOp::Write(remote), &[sge]);
        a.succeed();
    }
}

#[test]
fn packets_and_requests_go_the_way_that_was_asked_for() {
    let (a, b) = pair(QpType::Rc);
    let (x, y) = (Slab::new(&a, 1 << 20), Slab::new(&b, 1 << 20));
    let swap = |compare, swap| SendOp::CompareSwap {
        remote: y.remote(8 * 1000),
        compare,
        swap,
    };
    meet(&a, y.remote(0), x.sge(0, 8));
    let before = a.context.counters();
    for (round, len) in [8u32, 600, 4096, 100_000, 1 << 20].into_iter().enumerate() {
        let words = len as usize / 8;
        x.fill(0, words, round as u64);
        a.post(4, SendOp::Write(y.remote(0)), &[x.sge(0, len)]);
        a.succeed();
        assert!(y.holds(0, words, round as u64));
        y.fill(0, words, 100 + round as u64);
        a.post(5, SendOp::Read(y.remote(0)), &[x.sge(0, len)]);
        assert_eq!(a.succeed().byte_len, len);
        assert!(x.holds(0, words, 100 + round as u64));
        y.words()[1000].store(7, Ordering::Relaxed);
        a.post(6, swap(7, 9), &[x.sge(8, 8)]);
        a.succeed();
        let word = |slab: &Slab, at: usize| slab.words()[at].load(Ordering::Relaxed);
        assert_eq!((word(&x, 1), word(&y, 1000)), (7, 9));
    }
    let after = a.context.counters();
    let direct = after.host_direct - before.host_direct;
    let packets = after.host_tx_packets - before.host_tx_packets;
    let datagrams = after.tx_datagrams - before.tx_datagrams;
    match SAME_HOST {
        SameHost::Udp => assert!(datagrams > 15 && packets == 0 && direct == 0),
        SameHost::Rings => assert!(datagrams == 0 && packets > 15 && direct == 0),
        SameHost::Direct => assert!(datagrams == 0 && packets == 0 && direct == 15),
    }
    assert_eq!(after.host_lost_packets, 0);
}

/// Memory of the program, which no peer maps.
#[test]
fn memory_of_the_program_is_reached_too() {
    let (a, b) = pair(QpType::Rc);
    meet(&a, b.remote(0), a.sge(0, 4096));
    let before = a.context.counters().host_direct;
    for (round, len) in [100usize, 5000, 300_000].into_iter().enumerate() {
        let text = bytes(len, round);
        a.pages.write(3, &text);
        let cut = len / 3;
        let list = [a.sge(3, cut as u32), a.sge(3 + cut, (len - cut) as u32)];
        a.post(1, SendOp::Write(b.remote(500_001)), &list);
        a.succeed();
        assert_eq!(b.pages.read(500_001, len), text);
        a.post(
            2,
            SendOp::Read(b.remote(500_001)),
            &[a.sge(400_000, len as u32)],
        );
        a.succeed();
        assert_eq!(a.pages.read(400_000, len), text);
    }
    // One process may always reach itself; short requests are packets anyway.
    let direct = a.context.counters().host_direct - before;
    assert_eq!(direct, if SAME_HOST == SameHost::Direct { 4 } else { 0 });
}

/// What a message announces is there when the message is.
#[test]
fn a_write_is_there_before_the_message_after_it() {
    let (a, b) = pair(QpType::Rc);
    let (x, y) = (Slab::new(&a, 1 << 17), Slab::new(&b, 1 << 17));
    for round in 0..300u64 {
        // Eight at once, each to another place, so that some wait for those before them.
        for part in 0..4 {
            b.receive(part, &[y.sge((1 << 16) + 64 * part, 64)]);
        }
        for part in 0..4u64 {
            let at = 2048 * part as usize;
            x.fill(at, 2048, round * 4 + part);
            let (at, len) = (8 * at as u64, 8 * 2048);
            a.post(1, SendOp::Write(y.remote(at)), &[x.sge(at, len)]);
            a.post(2, SendOp::SendImm(part as u32), &[x.sge(0, 64)]);
        }
        for part in 0..4u64 {
            assert_eq!(b.succeed().imm, Some(part as u32));
            assert!(y.holds(2048 * part as usize, 2048, round * 4 + part));
        }
        for _ in 0..4 {
            assert_eq!(a.succeed().kind, CompletionKind::Write);
            assert_eq!(a.succeed().kind, CompletionKind::Send);
        }
    }
}

/// Peers' atomics on a slab and the processor's own are one sort of atomics.
#[test]
fn atomics_on_a_slab_and_the_processors_add_up() {
    const EACH: u64 = 3000;
    let (a, b) = pair(QpType::Rc);
    let (x, y) = (Slab::new(&a, 64), Slab::new(&b, 64));
    let remote = y.remote(16);
    let itself = [(&a, &x), (&b, &y)];
    thread::scope(|scope| {
        for (end, slab) in itself {
            // `b` reaches its own word through `a`'s queue pair only; so it adds by itself.
            scope.spawn(move || {
                for _ in 0..EACH {
                    match std::ptr::eq(end, &raw const *itself[0].0) {
                        true => {
                            end.post(1, SendOp::FetchAdd { remote, add: 1 }, &[slab.sge(0, 8)]);
                            end.succeed();
                        }
                        false => {
                            slab.words()[2].fetch_add(1, Ordering::Relaxed);
                            thread::yield_now();
                        }
                    }
                }
            });
        }
    });
    assert_eq!(y.words()[2].load(Ordering::Relaxed), 2 * EACH);
}

/// After a region has been dropped nobody writes there, and who tries is told.
#[test]
fn a_region_goes_under_traffic() {
    for _ in 0..20 {
        let (a, b) = pair(QpType::Rc);
        let x = Slab::new(&a, 1 << 16);
        let region = b.pages.register(&b.pd, ALL);
        let remote = Remote {
            va: b.pages.address(),
            rkey: region.rkey(),
        };
        let rounds = AtomicU64::new(0);
        thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let status = loop {
                    let round = rounds.fetch_add(1, Ordering::Relaxed) + 1;
                    x.fill(0, 8192, round);
                    a.post(1, SendOp::Write(remote), &[x.sge(0, 1 << 16)]);
                    match a.next().status {
                        Status::Success => {}
                        status => break status,
                    }
                };
                assert_eq!(status, Status::RemoteAccess);
            });
            // In the midst of one, after others.
            while rounds.load(Ordering::Relaxed) < 4 && !writer.is_finished() {
                thread::yield_now();
            }
            drop(region);
            b.pages.write(0, &[0xEE; 1 << 16]);
            while !writer.is_finished() {
                thread::yield_now();
            }
            assert!(b.pages.read(0, 1 << 16).iter().all(|byte| *byte == 0xEE));
        });
    }
}

/// For a peer that will not answer. Over UDP only retries tell, so they end soon; on one host the end
/// of the peer does: retries there would go on for ever.
fn retries(attr: QpAttr) -> QpAttr {
    let (timeout, retry_cnt) = match SAME_HOST {
        SameHost::Udp => (10, 3),
        SameHost::Rings | SameHost::Direct => (18, 7),
    };
    QpAttr {
        timeout,
        retry_cnt,
        ..attr
    }
}

fn connect_for_a_death(end: &End, peer: &Context, dest: Qpn) {
    end.to_init();
    end.to_rtr(peer, dest);
    let attr = retries(to(attr_to(peer, dest), QpState::Rts));
    end.qp.modify(&attr, RTS_RC).unwrap();
}

/// Three sends and two receives.
fn post_five(a: &End) {
    for wr_id in 1..=3 {
        a.post(wr_id, SendOp::Send, &[a.sge(0, 8)]);
    }
    a.receive(10, &[a.sge(0, 8)]);
    a.receive(11, &[a.sge(0, 8)]);
}

/// They end within a second of the peer's end: the first send fails, the rest is flushed.
fn five_end(a: &End, since: Instant) {
    let ends: Vec<_> = (0..5).map(|_| a.next()).collect();
    assert!(since.elapsed() < Duration::from_secs(1), "{since:?}");
    let status_of = |wr_id| ends.iter().find(|work| work.wr_id == wr_id).unwrap().status;
    assert_eq!(status_of(1), Status::RetryExceeded);
    for wr_id in [2, 3, 10, 11] {
        assert_eq!(status_of(wr_id), Status::Flushed);
    }
    assert_eq!(a.qp.query().state, QpState::Err);
}

#[test]
fn a_device_that_is_closed_answers_no_more() {
    let (a, b) = (end(QpType::Rc), end(QpType::Rc));
    connect_for_a_death(&a, &b.context, b.qp.qpn());
    b.connect(&a.context, a.qp.qpn());
    b.receive(1, &[b.sge(0, 8)]);
    a.post(1, SendOp::Send, &[a.sge(0, 8)]);
    assert_eq!(b.succeed().kind, CompletionKind::Recv);
    // Whoever leaves after its last completion owes no answer.
    drop(b);
    assert_eq!(a.succeed().kind, CompletionKind::Send);
    let since = Instant::now();
    post_five(&a);
    five_end(&a, since);
}

/// Another process with an end of its own, which does what the lines say.
struct Peer {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

/// In the environment of such a process: the way to the peer's end.
const PEER: &str = "LOWTIDE_TEST_PEER";

impl Peer {
    fn start(role: &str) -> Peer {
        let name = thread::current().name().unwrap_or_default().to_owned();
        // "rings::suite::paths::…": the test that is the other process, in the same module.
        let module = name.rsplit_once("::").expect("a test's name").0;
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                &format!("{module}::other_process"),
                "--exact",
                "--nocapture",
            ])
            .env(PEER, role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Peer { child, lines }
    }

    fn tell(&mut self, line: &str) {
        let stdin = self.child.stdin.as_mut().unwrap();
        writeln!(stdin, "{line}").unwrap();
    }

    /// The words of the next line that is ours.
    fn hear(&mut self) -> Vec<u64> {
        loop {
            let mut line = String::new();
            assert!(self.lines.read_line(&mut line).unwrap() > 0, "it has left");
            // The harness may have begun the line.
            if let Some((_, words)) = line.trim().split_once("peer:") {
                return words
                    .split_whitespace()
                    .map(|w| w.parse().unwrap())
                    .collect();
            }
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Not a test by itself, but the other process of those below: without their word it does nothing.
#[test]
fn other_process() {
    let Ok(role) = std::env::var(PEER) else {
        return;
    };
    if role == "shut" {
        // SAFETY: plain arguments.
        assert_eq!(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0) }, 0);
    }
    let address = common::address();
    let b = end_on(
        Context::open(address, &options()).unwrap(),
        QpType::Rc,
        None,
    );
    if role == "starved" {
        starve();
    }
    let tell = |words: &[u64]| {
        let words: Vec<String> = words.iter().map(u64::to_string).collect();
        println!("\npeer:{}", words.join(" "));
    };
    let ip = u128::from_be_bytes(b.context.gid().gid.0) as u64;
    let remote = b.remote(0);
    tell(&[
        ip,
        b.qp.qpn().value().into(),
        remote.va,
        remote.rkey.0.into(),
    ]);
    for line in std::io::stdin().lines() {
        let words: Vec<u64> = line
            .unwrap()
            .split(' ')
            .map(|w| w.parse().unwrap())
            .collect();
        match words[..] {
            [ip, qpn] => {
                b.to_init();
                let mut attr = attr_to(&b.context, Qpn::new(qpn as u32));
                attr.address.dgid = gid_of(ip);
                b.qp.modify(&to(attr, QpState::Rtr), RTR_RC).unwrap();
                b.to_rts();
            }
            [0] => b.receive(1, &[b.sge(0, 64)]),
            [1] => drop(b.succeed()),
            [2] => {
                // The other end is to reach this memory.
                let text = b.pages.read(0, 100_000);
                let sum = text.iter().map(|byte| u64::from(*byte)).sum();
                tell(&[sum]);
                continue;
            }
            [3] => {
                tell(&[leave_a_child()]);
                continue;
            }
            [4, va, rkey] => loop {
                // Until it is killed.
                let rkey = Rkey(rkey as u32);
                b.post(4, SendOp::Write(Remote { va, rkey }), &[b.sge(0, LEN as u32)]);
                b.succeed();
            },
            _ => unreachable!("{words:?}"),
        }
        tell(&[]);
    }
}

/// Forks a child that has all files of this process, the sockets of its device among them, and does
/// nothing; its number.
fn leave_a_child() -> u64 {
    // SAFETY: the child calls only what a child of a process with threads may.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: plain arguments. What the harness waits for is closed; if nobody kills the child, the
        // alarm does.
        unsafe {
            for fd in 0..3 {
                libc::close(fd);
            }
            libc::alarm(PATIENCE.as_secs() as libc::c_uint);
            loop {
                libc::pause();
            }
        }
    }
    u64::try_from(child).expect("a process may fork")
}

/// A process that is nobody's child here, to be killed.
struct Orphan(libc::pid_t);

impl Drop for Orphan {
    fn drop(&mut self) {
        // SAFETY: plain arguments. It ends in no other way before this.
        unsafe { libc::kill(self.0, libc::SIGKILL) };
    }
}

/// From here on this process gets no file descriptor.
fn starve() {
    let next = std::fs::File::open("/dev/null").unwrap().as_raw_fd();
    let limit = libc::rlimit {
        rlim_cur: next as libc::rlim_t,
        rlim_max: next as libc::rlim_t,
    };
    // SAFETY: a live structure, which is only read.
    let result = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
    assert_eq!(result, 0);
    assert!(std::fs::File::open("/dev/null").is_err());
}

fn gid_of(low: u64) -> Gid {
    Gid(u128::from(low).to_be_bytes())
}

/// An end here, connected to one in another process; where that end's memory is.
fn pair_of_processes(role: &str) -> (End, Peer, Remote) {
    let mut peer = Peer::start(role);
    let [ip, qpn, va, rkey] = peer.hear()[..] else {
        panic!("four numbers");
    };
    let a = end(QpType::Rc);
    a.to_init();
    let mut attr = attr_to(&a.context, Qpn::new(qpn as u32));
    attr.address.dgid = gid_of(ip);
    a.qp.modify(&to(attr, QpState::Rtr), RTR_RC).unwrap();
    let attr = retries(to(attr, QpState::Rts));
    a.qp.modify(&attr, RTS_RC).unwrap();
    let own = u128::from_be_bytes(a.context.gid().gid.0) as u64;
    peer.tell(&format!("{own} {}", a.qp.qpn().value()));
    peer.hear();
    let rkey = Rkey(rkey as u32);
    (a, peer, Remote { va, rkey })
}

/// WRITEs and READs of memory of the other process's program; how many were carried out from here.
fn reach(a: &End, peer: &mut Peer, remote: Remote, is_shut: bool) -> u64 {
    peer.tell("0");
    peer.hear();
    a.post(1, SendOp::Send, &[a.sge(0, 64)]);
    a.succeed();
    peer.tell("1");
    peer.hear();
    if !is_shut {
        meet(a, remote, a.sge(0, 4096));
    }
    let before = a.context.counters().host_direct;
    for round in 0..3 {
        let text = bytes(100_000, round);
        a.pages.write(0, &text);
        a.post(1, SendOp::Write(remote), &[a.sge(0, 100_000)]);
        a.succeed();
        a.post(2, SendOp::Read(remote), &[a.sge(200_000, 100_000)]);
        a.succeed();
        assert_eq!(a.pages.read(200_000, 100_000), text);
        peer.tell("2");
        let sum = text.iter().map(|byte| u64::from(*byte)).sum::<u64>();
        assert_eq!(peer.hear(), [sum]);
    }
    a.context.counters().host_direct - before
}

#[test]
fn the_memory_of_another_process_is_reached_and_its_death_is_told() {
    let (a, mut peer, remote) = pair_of_processes("open");
    let direct = reach(&a, &mut peer, remote, false);
    assert_eq!(direct, if SAME_HOST == SameHost::Direct { 6 } else { 0 });
    // The peer has posted no receive, so all this waits for it.
    post_five(&a);
    assert!(a.is_silent());
    let since = Instant::now();
    peer.child.kill().unwrap();
    peer.child.wait().unwrap();
    five_end(&a, since);
}

/// A process ends and leaves a child that has its sockets, so that these do not hang up.
#[test]
fn the_death_of_a_process_is_told_though_its_child_has_its_sockets() {
    let (a, mut peer, remote) = pair_of_processes("open");
    reach(&a, &mut peer, remote, false);
    peer.tell("3");
    let _child = Orphan(peer.hear()[0] as libc::pid_t);
    post_five(&a);
    assert!(a.is_silent());
    let since = Instant::now();
    peer.child.kill().unwrap();
    peer.child.wait().unwrap();
    five_end(&a, since);
}

/// Who only waits is told, too, where the end of a process can be seen. By the network it cannot, and
/// nothing is asked of the peer.
#[test]
fn receives_end_with_the_process_that_would_have_sent() {
    for leaves_child in [false, true] {
        let (a, mut peer, remote) = pair_of_processes("open");
        reach(&a, &mut peer, remote, false);
        peer.tell("3");
        let child = Orphan(peer.hear()[0] as libc::pid_t);
        let _child = leaves_child.then_some(child);
        for wr_id in [10, 11] {
            a.receive(wr_id, &[a.sge(0, 8)]);
        }
        assert!(a.is_silent());
        let since = Instant::now();
        peer.child.kill().unwrap();
        peer.child.wait().unwrap();
        if SAME_HOST == SameHost::Udp {
            assert!(a.is_silent());
            continue;
        }
        for wr_id in [10, 11] {
            let work = a.next();
            assert_eq!((work.wr_id, work.status), (wr_id, Status::Flushed));
        }
        assert!(since.elapsed() < Duration::from_secs(1), "{since:?}");
        assert_eq!(a.qp.query().state, QpState::Err);
        // And what comes later has no time to wait.
        a.receive(12, &[a.sge(0, 8)]);
        assert_eq!(a.next().status, Status::Flushed);
    }
}

/// A receive that is posted when the peer's end has been told to nobody.
#[test]
fn a_receive_after_the_death_of_the_peer_ends_at_once() {
    let (a, mut peer, remote) = pair_of_processes("open");
    reach(&a, &mut peer, remote, false);
    peer.child.kill().unwrap();
    peer.child.wait().unwrap();
    // Nothing is posted, so nothing happens.
    assert!(a.is_silent());
    assert_eq!(a.qp.query().state, QpState::Rts);
    a.receive(1, &[a.sge(0, 8)]);
    if SAME_HOST == SameHost::Udp {
        assert!(a.is_silent());
    } else {
        assert_eq!(a.next().status, Status::Flushed);
    }
}

/// One end is killed in the midst of a copy, which the other's memory waits for; its child lives on.
#[test]
fn a_process_may_die_while_it_copies() {
    for copies_there in [false, true] {
        let (a, mut peer, remote) = pair_of_processes("open");
        reach(&a, &mut peer, remote, false);
        peer.tell("3");
        let _child = Orphan(peer.hear()[0] as libc::pid_t);
        let target = Pages::new(LEN);
        let region = target.register(&a.pd, ALL);
        if copies_there {
            peer.tell(&format!("4 {} {}", target.address(), region.rkey().0));
        } else {
            a.post(1, SendOp::Write(remote), &[a.sge(0, LEN as u32)]);
        }
        thread::sleep(Duration::from_millis(50));
        let since = Instant::now();
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(10));
                peer.child.kill().unwrap();
                peer.child.wait().unwrap();
            });
            let mut is_over = copies_there;
            while !is_over {
                let work = a.next();
                is_over = work.status != Status::Success;
                if is_over {
                    assert_eq!(work.status, Status::RetryExceeded);
                } else {
                    a.post(1, SendOp::Write(remote), &[a.sge(0, LEN as u32)]);
                }
            }
        });
        drop(region);
        let second = Duration::from_secs(1);
        assert!(since.elapsed() < second, "{:?}", since.elapsed());
    }
}

/// The system does not let us reach that process's memory, so its own engine copies.
#[test]
fn a_process_that_cannot_be_reached_copies_for_us() {
    // Root reaches everybody, unless it gives that right up. Rights are those of a thread and the
    // threads that it starts: this test's.
    let header = [0x2008_0522u32, 0];
    let none = [0u32; 6];
    // SAFETY: header and data are as long as the version in the header says, and are only read.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
    assert_eq!(result, 0);
    let (a, mut peer, remote) = pair_of_processes("shut");
    assert_eq!(reach(&a, &mut peer, remote, true), 0);
    assert!(a.context.counters().host_tx_packets > 0 || SAME_HOST == SameHost::Udp);
}

/// A peer that has no file descriptor left for a ring is reached by UDP.
#[test]
fn a_process_without_descriptors_is_reached_by_udp() {
    let (a, mut peer, _) = pair_of_processes("starved");
    for round in 0..3 {
        peer.tell("0");
        peer.hear();
        a.post(round, SendOp::Send, &[a.sge(0, 64)]);
        assert_eq!(a.succeed().wr_id, round);
        peer.tell("1");
        peer.hear();
    }
    let counters = a.context.counters();
    assert!(counters.tx_datagrams >= 3 && counters.host_direct == 0);
    peer.child.kill().unwrap();
    peer.child.wait().unwrap();
}
