//! A megabyte of mixed traffic each way, over networks that lose, reorder, repeat and damage
//! packets: everything completes once, in order, with the bytes that were sent.

mod common;

use common::*;
use lowtide_transport_proto::qp::*;
use lowtide_transport_proto::wire::*;

/// Regions of each end.
const SOURCE: u32 = 1; // what is sent and read, never written
const TARGET: u32 = 2; // what the peer writes to
const RETURN: u32 = 3; // where READs and atomics put their bytes
const RECEIVE: u32 = 4; // receives, one slot each
const WORDS: u32 = 5; // atomics
const WINDOWS: u32 = 1000; // and beyond: what is bound

const SLOT: u32 = 24_000;
const SLOTS: u32 = 12;
const TRAFFIC: u64 = 1 << 20;

/// One operation of the plan, with where its bytes are and go.
#[derive(Clone, Copy, Debug)]
struct Op {
    kind: u8,
    len: u32,
    /// In SOURCE of the end that gives the bytes.
    from: u64,
    /// In TARGET or RETURN of the end that takes them.
    to: u64,
}

fn plan(rng: &mut Rng) -> Vec<Op> {
    let mut ops = Vec::new();
    let (mut total, mut to) = (0, 0);
    while total < TRAFFIC {
        let kind = rng.below(11) as u8;
        let len = match rng.below(6) {
            0 => 0,
            1 => rng.below(8) as u32,
            2 => 1024 * rng.below(5) as u32,
            3 => rng.below(1025) as u32,
            _ => rng.below(SLOT.into()) as u32,
        };
        let len = match kind {
            6..=8 => 8,
            9 | 10 => 0,
            _ => len,
        };
        ops.push(Op {
            kind,
            len,
            from: rng.below(TRAFFIC),
            to,
        });
        to += u64::from(len).next_multiple_of(8);
        total += u64::from(len);
    }
    ops
}

fn work_request(i: usize, ops: &[Op]) -> SendWr {
    let op = ops[i];
    let source = || {
        // Three pieces, so that fragments cross packets.
        let (a, b) = (op.len / 3, op.len / 2);
        let at = |from: u32, to: u32| Sge {
            lkey: Lkey(SOURCE),
            addr: base_of(SOURCE) + op.from + u64::from(from),
            len: to - from,
        };
        SgList::new(&[at(0, a), at(a, b), at(b, op.len)]).unwrap()
    };
    let back = piece(RETURN, op.to, op.len);
    let target = remote(TARGET, op.to);
    let (what, local) = match op.kind {
        0 | 1 => (SendOp::Send, source()),
        2 => (SendOp::SendImm(i as u32), source()),
        3 => (SendOp::Write(target), source()),
        4 => (SendOp::WriteImm(target, i as u32), source()),
        5 => (SendOp::Read(remote(SOURCE, op.from)), back),
        6 => (
            SendOp::FetchAdd {
                remote: remote(WORDS, 0),
                add: 3,
            },
            back,
        ),
        8 => (SendOp::AtomicWrite(target), source()),
        9 => {
            let flush = Flush {
                remote: target,
                len: 64,
                global: true,
                persistent: false,
                whole_region: i.is_multiple_of(2),
            };
            (SendOp::Flush(flush), SgList::EMPTY)
        }
        10 => {
            let bind = Bind {
                window: Rkey(0),
                rkey: Rkey(WINDOWS + i as u32),
                region: Lkey(WORDS),
                addr: base_of(WORDS),
                len: 8,
                access: Access::ALL,
                zero_based: false,
            };
            (SendOp::BindWindow(bind), SgList::EMPTY)
        }
        _ => {
            // A chain: each one finds what the one before stored.
            let compare = ops[..i].iter().filter(|op| op.kind == 7).count() as u64;
            let swap = compare + 1;
            let remote = remote(WORDS, 8);
            (
                SendOp::CompareSwap {
                    remote,
                    compare,
                    swap,
                },
                back,
            )
        }
    };
    SendWr::new(WrId(i as u64), what, local)
}

struct Run {
    net: SimNet,
    ops: [Vec<Op>; 2],
    posted: [usize; 2],
    received: [usize; 2],
    finished: [usize; 2],
}

impl Run {
    fn new(setup: Setup, faults: Faults, seed: u64) -> Self {
        let access = Access {
            flush_global: true,
            ..Access::ALL
        };
        let mut net = SimNet::new(Setup { access, ..setup }, faults, seed);
        let ops = [plan(&mut net.rng), plan(&mut net.rng)];
        for end in 0..2 {
            let memory = &mut net.ends[end].memory;
            let mut rng = Rng(seed ^ 0x5eed ^ end as u64);
            let noise = (0..TRAFFIC + u64::from(SLOT))
                .map(|_| rng.next() as u8)
                .collect();
            memory.register(SOURCE, noise);
            for key in [TARGET, RETURN] {
                memory.register(key, vec![0xee; 2 * TRAFFIC as usize]);
            }
            memory.register(RECEIVE, vec![0; (SLOT * SLOTS) as usize]);
            memory.register(WORDS, vec![0; 16]);
            for region in memory.regions.values_mut() {
                region.access = access;
            }
        }
        let mut run = Self {
            net,
            ops,
            posted: [0; 2],
            received: [0; 2],
            finished: [0; 2],
        };
        for end in 0..2 {
            for slot in 0..SLOTS {
                run.post_receive(end, slot.into());
            }
        }
        run
    }

    fn post_receive(&mut self, end: usize, n: u64) {
        let offset = n % u64::from(SLOTS) * u64::from(SLOT);
        let local = piece(RECEIVE, offset, SLOT);
        self.net.ends[end]
            .qp
            .post_recv(RecvWr {
                wr_id: WrId(n),
                local,
            })
            .unwrap();
    }

    fn post(&mut self) {
        for end in 0..2 {
            while self.posted[end] < self.ops[end].len() {
                let wr = work_request(self.posted[end], &self.ops[end]);
                match self.net.ends[end].qp.post_send(wr) {
                    Ok(()) => self.posted[end] += 1,
                    Err(PostError::QueueFull) => break,
                    Err(e) => panic!("{e:?}"),
                }
            }
        }
    }

    fn slice(&self, end: usize, key: u32, offset: u64, len: u32) -> &[u8] {
        &self.net.ends[end].memory.regions[&key].bytes[offset as usize..][..len as usize]
    }

    /// Check every completion against the plan, and repost receives.
    fn check(&mut self) {
        for end in 0..2 {
            for completion in self.net.completions(end) {
                assert_eq!(completion.status, Status::Success);
                if completion.kind.is_recv() {
                    self.check_receive(end, &completion);
                } else {
                    self.check_send(end, &completion);
                }
            }
        }
    }

    fn check_receive(&mut self, end: usize, completion: &Completion) {
        let (i, op) = self.ops[1 - end]
            .iter()
            .enumerate()
            .filter(|(_, op)| matches!(op.kind, 0..=2 | 4))
            .nth(self.received[end])
            .map(|(i, op)| (i, *op))
            .expect("no more receives than sends");
        assert_eq!(completion.wr_id, WrId(self.received[end] as u64));
        assert_eq!(completion.byte_len, op.len);
        assert_eq!(completion.imm, matches!(op.kind, 2 | 4).then_some(i as u32));
        let sent = self.slice(1 - end, SOURCE, op.from, op.len);
        if op.kind == 4 {
            assert_eq!(completion.kind, CompletionKind::RecvWriteImm);
            assert_eq!(self.slice(end, TARGET, op.to, op.len), sent);
        } else {
            let offset = completion.wr_id.0 % u64::from(SLOTS) * u64::from(SLOT);
            assert_eq!(self.slice(end, RECEIVE, offset, op.len), sent);
        }
        self.received[end] += 1;
        self.post_receive(end, completion.wr_id.0 + u64::from(SLOTS));
    }

    fn check_send(&mut self, end: usize, completion: &Completion) {
        let i = self.finished[end];
        assert_eq!(completion.wr_id, WrId(i as u64));
        let op = self.ops[end][i];
        let before = |kind: u8| self.ops[end][..i].iter().filter(|o| o.kind == kind).count() as u64;
        match op.kind {
            3 | 8 => assert_eq!(
                self.slice(1 - end, TARGET, op.to, op.len),
                self.slice(end, SOURCE, op.from, op.len)
            ),
            5 => assert_eq!(
                self.slice(end, RETURN, op.to, op.len),
                self.slice(1 - end, SOURCE, op.from, op.len)
            ),
            6 | 7 => {
                let old = self.slice(end, RETURN, op.to, 8).try_into().unwrap();
                let step = if op.kind == 6 { 3 } else { 1 };
                assert_eq!(u64::from_ne_bytes(old), step * before(op.kind));
            }
            10 => {
                let bound = &self.net.ends[end].memory.regions;
                assert!(bound.contains_key(&(WINDOWS + i as u32)));
            }
            _ => {}
        }
        self.finished[end] += 1;
    }

    fn is_done(&self) -> bool {
        (0..2).all(|end| {
            let sends = self.ops[1 - end]
                .iter()
                .filter(|op| matches!(op.kind, 0..=2 | 4))
                .count();
            self.finished[end] == self.ops[end].len() && self.received[end] == sends
        })
    }

    fn run(&mut self) {
        let mut steps = 0u64;
        self.post();
        self.net.pump();
        while !self.is_done() {
            assert!(self.net.step(), "nothing left to happen: {self:?}");
            self.check();
            self.post();
            self.net.pump();
            steps += 1;
            assert!(steps < 2_000_000, "livelock: {self:?}");
        }
        for end in 0..2 {
            // However often they were sent.
            let count = |kinds: std::ops::RangeInclusive<u8>| {
                let mine = self.ops[1 - end].iter();
                mine.filter(|op| kinds.contains(&op.kind)).count() as u32
            };
            let memory = &self.net.ends[end].memory;
            assert_eq!(
                (memory.atomics, memory.flushes),
                (count(6..=8), count(9..=9))
            );
        }
    }
}

impl std::fmt::Debug for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{:?} {:?}", self.net.now, self.net.faults)?;
        for end in 0..2 {
            writeln!(
                f,
                "end {end}: {} ops, posted {}, finished {}, received {}: {:?}",
                self.ops[end].len(),
                self.posted[end],
                self.finished[end],
                self.received[end],
                self.net.ends[end].qp
            )?;
        }
        Ok(())
    }
}

fn grid(setup: Setup) {
    for loss in [0, 10, 50, 100, 300] {
        for (reorder, duplicate, flip) in [(0, 0, 0), (100, 0, 0), (0, 100, 0), (100, 100, 50)] {
            let faults = Faults {
                loss,
                reorder,
                duplicate,
                flip,
            };
            let mut run = Run::new(setup, faults, u64::from(loss * 7 + reorder + duplicate));
            // What is kept may be lost again, where the network is worst.
            run.net.forgets = flip;
            run.run();
            let goodput = 2_000 * TRAFFIC / (run.net.now.0 / 1_000);
            println!(
                "{faults:?}: {} packets, {} dropped by ICRC, {} ms, {goodput} kB/s",
                run.net.packets,
                run.net.dropped_by_icrc,
                run.net.now.0 / 1_000_000
            );
            assert_eq!(run.net.dropped_by_icrc > 0, flip > 0);
            let [a, b] = &run.net.ends;
            for end in [a, b] {
                assert_eq!(end.qp.state(), QpState::Rts);
            }
        }
    }
}

#[test]
fn mixed_traffic_completes_once_in_order_over_bad_networks() {
    grid(Setup::default());
}

#[test]
fn the_same_where_ends_keep_what_arrives_ahead_of_a_gap() {
    for early in [Early::Kept, Early::Reported] {
        grid(Setup {
            early,
            ..Setup::default()
        });
    }
}

#[test]
fn the_same_with_small_packets_chunked_reads_and_wrapping_psns() {
    grid(Setup {
        mtu: Mtu::B256,
        psn: [0xff_fff0, 0xff_0000],
        read_chunk_packets: 8,
        rd_atomic: 2,
        early: Early::Reported,
        ..Setup::default()
    });
}

#[test]
fn the_same_with_the_largest_packets_and_one_read_at_a_time() {
    grid(Setup {
        mtu: Mtu::B4096,
        rd_atomic: 1,
        read_chunk_packets: 1,
        ..Setup::default()
    });
}
