//! Ends of peers, and peers that are other processes: what is reached of them, and how their death is
//! told.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::thread;

use lowtide_transport::verbs::SameHost;

use super::paths::{Slab, meet};
use super::*;

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
    /// Memory that may only be read, [`GUARDED`] bytes of twice as many; none until it has said so.
    guarded: Option<Remote>,
}

/// Bytes of the other process that may be read and not written; as many behind them may neither.
const GUARDED: usize = 60_000;
/// A user that nobody is.
const NOBODY: libc::uid_t = 65_534;

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
        Peer {
            child,
            lines,
            guarded: None,
        }
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
    if role == "shut" || role == "slab" {
        // SAFETY: plain arguments.
        assert_eq!(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0) }, 0);
    }
    if role == "stranger" {
        // SAFETY: plain arguments.
        assert_eq!(unsafe { libc::setuid(NOBODY) }, 0);
    }
    let address = common::address();
    let b = end_on(
        Context::open(address, &options()).unwrap(),
        QpType::Rc,
        None,
    );
    let tell = |words: &[u64]| {
        let words: Vec<String> = words.iter().map(u64::to_string).collect();
        println!("\npeer:{}", words.join(" "));
    };
    let ip = u128::from_be_bytes(b.context.gid().gid.0) as u64;
    let slab = Slab::new(&b, LEN as u64);
    let open = match role == "slab" {
        true => slab.remote(0),
        false => b.remote(0),
    };
    // What peers may only read, and only the first half of.
    let guarded = Pages::new(2 * GUARDED);
    guarded.write(0, &bytes(2 * GUARDED, 77));
    let (at, flags) = (guarded.address(), AccessFlags::REMOTE_READ);
    // SAFETY: the pages are only copied.
    let half = unsafe { b.pd.register(at, GUARDED as u64, at, flags) }.unwrap();
    if role == "starved" {
        starve();
    }
    let (qpn, rkeys) = (b.qp.qpn().value(), [open.rkey.0, half.rkey().0]);
    let [rkey, guarded_rkey] = rkeys.map(u64::from);
    tell(&[ip, qpn.into(), open.va, rkey, at, guarded_rkey]);
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
                let text = match role == "slab" {
                    true => slab.words()[..100_000 / 8]
                        .iter()
                        .flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes())
                        .collect(),
                    false => b.pages.read(0, 100_000),
                };
                let sum = text.iter().map(|byte| u64::from(*byte)).sum();
                tell(&[sum]);
                continue;
            }
            [5] => {
                let is_whole = guarded.read(0, 2 * GUARDED) == bytes(2 * GUARDED, 77);
                tell(&[is_whole.into()]);
                continue;
            }
            [3] => {
                tell(&[leave_a_child()]);
                continue;
            }
            [4, va, rkey] => loop {
                // Until it is killed.
                let rkey = Rkey(rkey as u32);
                b.post(
                    4,
                    SendOp::Write(Remote { va, rkey }),
                    &[b.sge(0, LEN as u32)],
                );
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
    common::limit(libc::RLIMIT_NOFILE, next as libc::rlim_t);
    assert!(std::fs::File::open("/dev/null").is_err());
}

fn gid_of(low: u64) -> Gid {
    Gid(u128::from(low).to_be_bytes())
}

/// An end here, connected to one in another process; where that end's memory is.
fn pair_of_processes(role: &str) -> (End, Peer, Remote) {
    let mut peer = Peer::start(role);
    let [ip, qpn, va, rkey, guarded, guarded_rkey] = peer.hear()[..] else {
        panic!("six numbers");
    };
    peer.guarded = Some(Remote {
        va: guarded,
        rkey: Rkey(guarded_rkey as u32),
    });
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

/// Kills the peer while it holds up five requests.
#[track_caller]
fn its_death_is_told(a: &End, peer: &mut Peer) {
    // It has posted no receive, so all this waits for it.
    post_five(a);
    assert!(a.is_silent());
    let since = Instant::now();
    peer.child.kill().unwrap();
    peer.child.wait().unwrap();
    five_end(a, since);
}

#[test]
fn the_memory_of_another_process_is_reached_and_its_death_is_told() {
    let (a, mut peer, remote) = pair_of_processes("open");
    let direct = reach(&a, &mut peer, remote, false);
    assert_eq!(direct, if SAME_HOST == SameHost::Direct { 6 } else { 0 });
    its_death_is_told(&a, &mut peer);
}

/// A process ends and leaves a child that has its sockets, so that these do not hang up.
#[test]
fn the_death_of_a_process_is_told_though_its_child_has_its_sockets() {
    let (a, mut peer, remote) = pair_of_processes("open");
    reach(&a, &mut peer, remote, false);
    peer.tell("3");
    let _child = Orphan(peer.hear()[0] as libc::pid_t);
    its_death_is_told(&a, &mut peer);
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
    // Nor does anything wait to be looked at that would be looked at now.
    assert!(a.is_silent());
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
        // Nothing shows when the copy has begun.
        thread::sleep(Duration::from_millis(50));
        let since = Instant::now();
        thread::scope(|scope| {
            scope.spawn(|| {
                // In the midst of what the loop below does.
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
    // Root reaches everybody, unless it gives that right up.
    common::be_as_anybody();
    let (a, mut peer, remote) = pair_of_processes("shut");
    assert_eq!(reach(&a, &mut peer, remote, true), 0);
    assert!(a.context.counters().host_tx_packets > 0 || SAME_HOST == SameHost::Udp);
}

/// What the table of the other process does not grant is refused as by the wire, and no byte of either
/// has moved.
#[test]
fn what_another_process_does_not_grant_is_refused_and_moves_nothing() {
    let swap = |remote| SendOp::CompareSwap {
        remote,
        compare: 0,
        swap: 1,
    };
    let at = |remote: Remote, offset: usize| Remote {
        va: remote.va + offset as u64,
        ..remote
    };
    // What is asked for, how much, and how much of that is granted: a long READ is asked for in pieces,
    // and those before the refusal may have come.
    type Attempt<'a> = &'a dyn Fn(Remote) -> (SendOp, usize, usize);
    let attempts: [Attempt<'_>; 6] = [
        &|guarded| (SendOp::Write(guarded), 5000, 0),
        &|guarded| (SendOp::Write(guarded), GUARDED, 0),
        &|guarded| (swap(guarded), 8, 0),
        &|guarded| (SendOp::Read(at(guarded, 1)), GUARDED, GUARDED - 1),
        &|guarded| (SendOp::Read(at(guarded, GUARDED)), 5000, 0),
        &|guarded| {
            let rkey = Rkey(guarded.rkey.0 ^ 0x100);
            (SendOp::Read(Remote { rkey, ..guarded }), 5000, 0)
        },
    ];
    for (number, attempt) in attempts.into_iter().enumerate() {
        let (a, mut peer, open) = pair_of_processes("open");
        reach(&a, &mut peer, open, false);
        let guarded = peer.guarded.unwrap();
        // What is granted is had.
        a.post(1, SendOp::Read(guarded), &[a.sge(0, GUARDED as u32)]);
        a.succeed();
        assert_eq!(a.pages.read(0, GUARDED), bytes(GUARDED, 77));
        a.pages.write(0, &[0xEE; LEN]);
        let before = a.context.counters().host_direct;
        let (op, len, granted) = attempt(guarded);
        a.post(2, op, &[a.sge(0, len as u32)]);
        assert_eq!(a.next().status, Status::RemoteAccess, "attempt {number}");
        assert_eq!(a.context.counters().host_direct, before);
        let here = a.pages.read(granted, LEN - granted);
        assert!(here.iter().all(|byte| *byte == 0xEE), "attempt {number}");
        peer.tell("5");
        assert_eq!(peer.hear(), [1], "attempt {number}");
    }
}

/// A slab is mapped by peers of the same user, whether or not the system lets them into the process.
#[test]
fn a_slab_of_another_process_is_mapped() {
    common::be_as_anybody();
    let (a, mut peer, remote) = pair_of_processes("slab");
    let direct = reach(&a, &mut peer, remote, false);
    let is_direct = SAME_HOST == SameHost::Direct;
    assert_eq!(direct, if is_direct { 6 } else { 0 });
    // Atomics, too, are the processor's on the mapped word.
    let (before, old) = (a.context.counters().host_direct, Slab::new(&a, 64));
    for wr_id in [3, 4] {
        let add = SendOp::FetchAdd { remote, add: 1 };
        a.post(wr_id, add, &[old.sge(8 * wr_id, 8)]);
        a.succeed();
    }
    let old = [3, 4].map(|at: usize| old.words()[at].load(Ordering::Relaxed));
    assert_eq!(old[1], old[0].wrapping_add(1));
    let direct = a.context.counters().host_direct - before;
    assert_eq!(direct, if is_direct { 2 } else { 0 });
}

/// Who runs under another user is reached by UDP, and reaches us so.
#[test]
fn a_process_of_another_user_is_reached_by_udp() {
    // SAFETY: no argument.
    if unsafe { libc::geteuid() } != 0 {
        return common::not_checked("a process of another user, which only root may start");
    }
    let (a, mut peer, remote) = pair_of_processes("stranger");
    assert_eq!(reach(&a, &mut peer, remote, true), 0);
    let counters = a.context.counters();
    assert_eq!((counters.host_tx_packets, counters.host_rx_packets), (0, 0));
    assert!(counters.sent_pkts > 0);
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
    assert!(counters.sent_pkts >= 3 && counters.host_direct == 0);
    peer.child.kill().unwrap();
    peer.child.wait().unwrap();
}
