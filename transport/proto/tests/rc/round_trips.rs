//! The round-trip time of a path changes while it is in use, and is learnt anew.

use super::*;

/// One way, before and after.
const FAST: Nanos = Nanos::from_micros(5);
const SLOW: Nanos = Nanos::from_millis(35);

/// Round trips in which a new time is learnt, and probes meanwhile.
const LEARNING: u64 = 5;
const PROBES_MAX: u64 = 12;

/// What a client has to do without end: so many requests at once, of this length.
#[derive(Clone, Copy, Debug)]
struct Work {
    is_read: bool,
    depth: u32,
    len: u32,
}

const WORKS: [Work; 7] = [
    Work::of(false, 1, 100),
    Work::of(false, 2, 100),
    Work::of(false, 64, 1000),
    Work::of(false, 64, 2 * 1024),
    Work::of(false, 16, 40 * 1024),
    Work::of(true, 1, 100),
    Work::of(true, 16, 4 * 1024),
];

impl Work {
    const fn of(is_read: bool, depth: u32, len: u32) -> Self {
        Self {
            is_read,
            depth,
            len,
        }
    }

    /// Two ends with patience enough for the slow path.
    fn between(self, early: Early) -> SimNet {
        net(Setup {
            early,
            depth: self.depth,
            timeout: 18,
            rd_atomic: 16,
            ..Setup::default()
        })
    }

    /// Keeps the client busy for some round trips.
    fn go_on(self, net: &mut SimNet, round_trips: u64) -> Done {
        let counted = |net: &SimNet| {
            let counters = net.ends[0].qp.counters();
            assert_eq!(counters.ack_timeout, 0);
            (counters.probes, counters.retransmitted_pkts)
        };
        let before = counted(net);
        let until = Nanos(net.now.0 + round_trips * 2 * net.latency.0);
        let op = if self.is_read { read_from } else { write_to };
        let mut finished = 0;
        while net.now < until {
            for done in net.completions(0) {
                assert_eq!(done.status, Status::Success);
                finished += 1;
            }
            let next = || SendWr::new(WrId(0), op(0), piece(REGION, 0, self.len));
            while net.ends[0].qp.post_send(next()).is_ok() {}
            net.pump();
            assert!(net.step());
        }
        let after = counted(net);
        Done {
            finished,
            probes: after.0 - before.0,
            repeated: after.1 - before.1,
        }
    }

    /// Requests that a window holds.
    fn at_once(self) -> u64 {
        u64::from(self.depth.min(WINDOW / self.len.div_ceil(1024)))
    }
}

/// Unacknowledged packets beyond which no new request starts.
const WINDOW: u32 = 128;

#[derive(Clone, Copy, Debug)]
struct Done {
    finished: u64,
    probes: u64,
    /// Packets sent again, probes too.
    repeated: u64,
}

#[test]
fn a_path_that_becomes_slow_is_learnt() {
    for early in [Early::Dropped, Early::Kept, Early::Reported] {
        for work in WORKS {
            let name = format!("{early:?} {work:?}");
            let mut net = work.between(early);
            work.go_on(&mut net, 100);
            let fast = work.go_on(&mut net, 500);
            assert_eq!(fast.repeated, 0, "{name}");

            net.latency = SLOW;
            let learning = work.go_on(&mut net, LEARNING);
            assert!(learning.probes > 0, "{name}: {learning:?}");
            assert!(learning.probes <= PROBES_MAX, "{name}: {learning:?}");
            let slow = work.go_on(&mut net, 8);
            assert_eq!((slow.probes, slow.repeated), (0, 0), "{name}");
            assert!(slow.finished >= 7 * work.at_once(), "{name}: {slow:?}");

            // As soon as what was under way on the slow path has come.
            net.latency = FAST;
            work.go_on(&mut net, 8_000);
            let again = work.go_on(&mut net, 500);
            assert_eq!((again.probes, again.repeated), (0, 0), "{name}");
            let least = fast.finished * 99 / 100;
            assert!(again.finished >= least, "{name}: {fast:?}, {again:?}");
            net.run(100_000);
            net.completions(0);
            let began = net.now;
            tap(&mut net, drop_nth(0, Opcode::RcWriteOnly, 1));
            send(&mut net, 1, write_to(0), 100);
            net.run(100);
            assert_eq!(net.completions(0).len(), 1, "{name}");
            let took = net.now.since(began);
            assert!(took < Nanos(2 * PROBE_MIN.0), "{name}: {took:?}");
        }
    }
}

/// The answer comes just after the probe, and so seems to be the probe's.
#[test]
fn an_answer_that_is_not_the_probes_is_found_out() {
    for early in [Early::Dropped, Early::Reported] {
        for work in [Work::of(false, 1, 100), Work::of(true, 1, 100)] {
            let mut net = work.between(early);
            work.go_on(&mut net, 500);
            net.latency = Nanos(PROBE_MIN.0 / 2 + 10_000);
            let learning = work.go_on(&mut net, 100);
            assert!((20..=70).contains(&learning.probes), "{learning:?}");
            let slow = work.go_on(&mut net, 20);
            assert_eq!((slow.probes, slow.repeated), (0, 0), "{early:?} {work:?}");
            assert!(slow.finished >= 19, "{slow:?}");
        }
    }
}
