//! What the integration tests share: memory in vectors, a network in virtual time, a PRNG, pcaps.
#![allow(dead_code, reason = "each test binary uses its part")]

pub mod pcap;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, VecDeque};
use std::net::Ipv4Addr;

use lowtide_transport_proto::icrc::{self, Flow};
use lowtide_transport_proto::qp::*;
use lowtide_transport_proto::time::Nanos;
use lowtide_transport_proto::wire::*;

/// SplitMix64: deterministic, seeded, good enough.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// True with probability `per_mille / 1000`.
    pub fn chance(&mut self, per_mille: u32) -> bool {
        self.below(1000) < u64::from(per_mille)
    }
}

/// One region of registered memory. Its key is both lkey and rkey; addresses start at `base`.
pub struct Region {
    pub base: u64,
    pub bytes: Vec<u8>,
    pub access: Access,
    pub local_write: bool,
}

/// Registered memory in vectors.
#[derive(Default)]
pub struct TestMemory {
    pub regions: BTreeMap<u32, Region>,
    pub atomics: u32,
    pub flushes: u32,
    /// A shared receive queue.
    pub shared: VecDeque<RecvWr>,
}

impl TestMemory {
    /// Register `bytes` under `key` at the address `base_of(key)`.
    pub fn register(&mut self, key: u32, bytes: Vec<u8>) {
        let region = Region {
            base: base_of(key),
            bytes,
            access: Access::ALL,
            local_write: true,
        };
        self.regions.insert(key, region);
    }

    fn range(&self, key: u32, addr: u64, len: u32) -> Result<std::ops::Range<usize>, AccessError> {
        let region = self.regions.get(&key).ok_or(AccessError)?;
        let start = addr.checked_sub(region.base).ok_or(AccessError)?;
        let end = start.checked_add(len.into()).ok_or(AccessError)?;
        if end > region.bytes.len() as u64 {
            return Err(AccessError);
        }
        Ok(start as usize..end as usize)
    }

    pub fn bytes(&self, fragment: &Fragment) -> Result<&[u8], AccessError> {
        let key = match fragment.key {
            Key::Local(Lkey(key)) | Key::Remote(Rkey(key)) => key,
        };
        Ok(&self.regions[&key].bytes[self.range(key, fragment.addr, fragment.len)?])
    }
}

/// Where region `key` starts.
pub fn base_of(key: u32) -> u64 {
    0x7f00_0000_0000 + (u64::from(key) << 32)
}

impl Memory for TestMemory {
    fn check_remote(
        &self,
        rkey: Rkey,
        va: u64,
        len: u32,
        access: Access,
    ) -> Result<(), AccessError> {
        self.range(rkey.0, va, len)?;
        let granted = self.regions[&rkey.0].access;
        if granted.allows(access) {
            Ok(())
        } else {
            Err(AccessError)
        }
    }

    fn place(&mut self, target: Fragment, payload: &[u8]) -> Result<(), AccessError> {
        assert_eq!(target.len as usize, payload.len());
        let key = match target.key {
            Key::Local(Lkey(key)) | Key::Remote(Rkey(key)) => key,
        };
        let range = self.range(key, target.addr, target.len)?;
        let region = self.regions.get_mut(&key).ok_or(AccessError)?;
        if !region.local_write {
            return Err(AccessError);
        }
        region.bytes[range].copy_from_slice(payload);
        Ok(())
    }

    fn atomic(&mut self, rkey: Rkey, va: u64, op: AtomicOp) -> Result<u64, AccessError> {
        let right = match op {
            AtomicOp::Write { .. } => Access::WRITE,
            _ => Access::ATOMIC,
        };
        self.check_remote(rkey, va, 8, right)?;
        let range = self.range(rkey.0, va, 8)?;
        self.atomics += 1;
        let word = &mut self.regions.get_mut(&rkey.0).ok_or(AccessError)?.bytes[range];
        let old = u64::from_ne_bytes((&*word).try_into().unwrap());
        let new = match op {
            AtomicOp::CompareSwap { compare, swap } if compare == old => swap,
            AtomicOp::CompareSwap { .. } => old,
            AtomicOp::FetchAdd { add } => old.wrapping_add(add),
            AtomicOp::Write { value } => u64::from_ne_bytes(value),
        };
        word.copy_from_slice(&new.to_ne_bytes());
        Ok(old)
    }

    fn invalidate(&mut self, rkey: Rkey) -> Result<(), AccessError> {
        self.regions.remove(&rkey.0).map(|_| ()).ok_or(AccessError)
    }

    fn invalidate_local(&mut self, rkey: Rkey) -> Result<(), AccessError> {
        self.invalidate(rkey)
    }

    /// A window is a copy here: enough to see when it is bound, and to where.
    fn bind(&mut self, bind: &Bind) -> Result<(), AccessError> {
        let range = self.range(bind.region.0, bind.addr, bind.len as u32)?;
        let bytes = self.regions[&bind.region.0].bytes[range].to_vec();
        let window = Region {
            base: bind.addr,
            bytes,
            access: bind.access,
            local_write: true,
        };
        self.regions.insert(bind.rkey.0, window);
        Ok(())
    }

    fn flush(&mut self, rkey: Rkey, access: Access) -> Result<(), AccessError> {
        let region = self.regions.get(&rkey.0).ok_or(AccessError)?;
        let granted = region.access.allows(access);
        self.flushes += u32::from(granted);
        granted.then_some(()).ok_or(AccessError)
    }

    fn shared_receive(&mut self) -> Option<RecvWr> {
        self.shared.pop_front()
    }
}

/// The flow from end `from` (0 or 1) to the other.
pub fn flow(from: usize) -> Flow {
    let address = [Ipv4Addr::new(127, 0, 0, 1), Ipv4Addr::new(127, 0, 0, 2)];
    Flow::v4(address[from], address[1 - from], UDP_PORT)
}

/// The whole UDP payload of `transmit`, ICRC included.
pub fn assemble(transmit: &Transmit, memory: &TestMemory, flow: &Flow) -> Vec<u8> {
    let mut bytes = transmit.header().to_vec();
    let mut icrc = icrc::Icrc::begin(flow, transmit.header(), transmit.udp_payload_len());
    for fragment in transmit.payload.as_slice() {
        let piece = memory.bytes(fragment).expect("memory of a transmit exists");
        icrc.update(piece);
        bytes.extend_from_slice(piece);
    }
    let (tail, len) = icrc.finish(transmit.pad.into());
    bytes.extend_from_slice(&tail[..len]);
    assert_eq!(bytes.len(), transmit.udp_payload_len());
    bytes
}

/// What the network does to packets, in thousandths.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    pub loss: u32,
    pub reorder: u32,
    pub duplicate: u32,
    pub flip: u32,
}

/// A packet under way: due time, tie breaker, receiver, bytes.
type Flying = (u64, u64, usize, Vec<u8>);

/// Whether a packet of this sender passes.
pub type Filter = dyn FnMut(usize, &Packet<'_>) -> bool;

/// One end: a queue pair and its memory.
pub struct End {
    pub qp: QueuePair,
    pub memory: TestMemory,
    pub completions: Vec<Completion>,
}

/// Two ends and a network between them, in virtual time.
pub struct SimNet {
    pub now: Nanos,
    pub ends: [End; 2],
    pub faults: Faults,
    pub rng: Rng,
    pub dropped_by_icrc: u32,
    pub packets: u64,
    wire: BinaryHeap<Reverse<Flying>>,
    /// When each sender's link is free again.
    free_at: [u64; 2],
    /// How long a packet that is sent now is under way.
    pub latency: Nanos,
    /// If set, decides what happens to each packet before the faults: false drops it.
    pub filter: Option<Box<Filter>>,
    /// What each end keeps of what arrives ahead of a gap.
    pub kept: [HashMap<EarlyPacket, Vec<u8>>; 2],
    pub early: Early,
    /// Thousandths of what is kept that is lost again.
    pub forgets: u32,
}

/// What an end does with packets that arrive ahead of a gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Early {
    /// Nothing, as Linux rxe.
    Dropped,
    /// They are kept, and the peer does not know.
    Kept,
    /// They are kept, and the peer knows what that means.
    Reported,
}

/// How the ends are connected.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub kind: QpKind,
    pub mtu: Mtu,
    pub psn: [u32; 2],
    pub timeout: u8,
    pub retry_cnt: u8,
    pub rnr_retry: u8,
    pub rnr_timer: u8,
    pub rd_atomic: u8,
    pub read_chunk_packets: u16,
    pub access: Access,
    pub depth: u32,
    pub shared_receives: bool,
    pub early: Early,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            kind: QpKind::Rc,
            mtu: Mtu::B1024,
            psn: [0x100, 0x200],
            timeout: 14,
            retry_cnt: 7,
            rnr_retry: 7,
            rnr_timer: 12,
            rd_atomic: 4,
            read_chunk_packets: 0,
            access: Access::ALL,
            depth: 64,
            shared_receives: false,
            early: Early::Dropped,
        }
    }
}

/// Numbers of the two queue pairs.
pub const QPNS: [Qpn; 2] = [Qpn::new(17), Qpn::new(18)];

impl SimNet {
    pub fn new(setup: Setup, faults: Faults, seed: u64) -> Self {
        let end = |i: usize| End {
            qp: connected(i, setup),
            memory: TestMemory::default(),
            completions: Vec::new(),
        };
        Self {
            now: Nanos(1_000),
            ends: [end(0), end(1)],
            faults,
            rng: Rng(seed),
            dropped_by_icrc: 0,
            packets: 0,
            wire: BinaryHeap::new(),
            free_at: [0; 2],
            latency: Nanos::from_micros(5),
            filter: None,
            kept: [HashMap::new(), HashMap::new()],
            early: setup.early,
            forgets: 0,
        }
    }

    /// Send what the ends have to send, collect completions.
    pub fn pump(&mut self) {
        for from in 0..2 {
            loop {
                while let Some(transmit) = self.ends[from].qp.poll_transmit(self.now, Allow::All) {
                    let bytes = assemble(&transmit, &self.ends[from].memory, &flow(from));
                    self.carry(from, bytes);
                }
                let End { qp, memory, .. } = &mut self.ends[from];
                if !qp.has_local_work() {
                    break;
                }
                qp.execute_local(memory);
            }
            while let Some(completion) = self.ends[from].qp.poll_completion() {
                self.ends[from].completions.push(completion);
            }
        }
    }

    fn carry(&mut self, from: usize, mut bytes: Vec<u8>) {
        self.packets += 1;
        if let Some(filter) = &mut self.filter {
            let packet = Packet::new_checked(&bytes).expect("we emit valid packets");
            if !filter(from, &packet) {
                return;
            }
        }
        // One nanosecond per byte.
        self.free_at[from] = self.free_at[from].max(self.now.0) + bytes.len() as u64;
        let due = self.free_at[from] + self.latency.0;
        if self.rng.chance(self.faults.loss) {
            return;
        }
        if self.rng.chance(self.faults.flip) {
            for _ in 0..1 + self.rng.below(3) {
                let bit = self.rng.below(bytes.len() as u64 * 8) as usize;
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
        }
        let copies = 1 + u64::from(self.rng.chance(self.faults.duplicate));
        for _ in 0..copies {
            let late = if self.rng.chance(self.faults.reorder) {
                self.rng.below(20_000)
            } else {
                0
            };
            self.wire
                .push(Reverse((due + late, self.packets, 1 - from, bytes.clone())));
        }
    }

    /// Deliver the next packet or timeout. False if nothing is left to happen.
    pub fn step(&mut self) -> bool {
        let packet = self.wire.peek().map(|Reverse((due, ..))| *due);
        let timer = self
            .ends
            .iter()
            .filter_map(|e| e.qp.poll_timeout())
            .min()
            .map(|t| t.0);
        let Some(next) = packet.into_iter().chain(timer).min() else {
            return false;
        };
        self.now = Nanos(next.max(self.now.0));
        if packet == Some(next)
            && let Some(Reverse((_, _, to, bytes))) = self.wire.pop()
        {
            self.deliver(to, &bytes);
        } else {
            for end in &mut self.ends {
                end.qp.handle_timeout(self.now);
            }
        }
        self.pump();
        true
    }

    fn deliver(&mut self, to: usize, bytes: &[u8]) {
        let Ok(packet) = Packet::new_checked(bytes) else {
            self.dropped_by_icrc += 1;
            return;
        };
        let id = icrc::check_unknown_identification(&flow(1 - to), &packet);
        if id.is_none_or(|id| id > icrc::GSO_IDENTIFICATION_MAX) {
            self.dropped_by_icrc += 1;
            return;
        }
        assert_eq!(packet.dest(), QPNS[to]);
        let end = &mut self.ends[to];
        let outcome = end.qp.handle_packet(self.now, &packet, &mut end.memory);
        if outcome == Outcome::Ahead && self.early != Early::Dropped {
            self.kept[to].insert(EarlyPacket::of(&packet), bytes.to_vec());
            end.qp.note_kept(&packet);
        }
        while let Some(wanted) = end.qp.wants_kept() {
            let kept = self.kept[to].remove(&wanted);
            if self.rng.chance(self.forgets) {
                end.qp.forget_kept(wanted);
                break;
            }
            let bytes = kept.expect("what is wanted was kept");
            let packet = Packet::new_checked(&bytes).unwrap();
            end.qp.handle_packet(self.now, &packet, &mut end.memory);
        }
    }

    /// Run until nothing is left to happen, at most `steps` events.
    pub fn run(&mut self, steps: u64) {
        self.pump();
        for _ in 0..steps {
            if !self.step() {
                return;
            }
        }
        panic!("still busy after {steps} events at {:?}", self.now);
    }

    pub fn completions(&mut self, end: usize) -> Vec<Completion> {
        std::mem::take(&mut self.ends[end].completions)
    }
}

/// Queue pair `i` of the two, in RTS.
pub fn connected(i: usize, setup: Setup) -> QueuePair {
    let caps = QpCaps {
        send_wr_max: setup.depth,
        recv_wr_max: setup.depth,
        shared_receives: setup.shared_receives,
    };
    let mut qp = QueuePair::new(setup.kind, QPNS[i], caps);
    qp.set_reports_gaps(setup.early == Early::Reported);
    qp.to_init(InitAttr {
        access: setup.access,
        pkey: PKEY_DEFAULT,
    })
    .unwrap();
    qp.to_rtr(RtrAttr {
        dest: QPNS[1 - i],
        path_mtu: setup.mtu,
        rq_psn: Psn::new(setup.psn[1 - i]),
        max_dest_rd_atomic: setup.rd_atomic,
        min_rnr_timer: RnrTimer::new(setup.rnr_timer),
    })
    .unwrap();
    qp.to_rts(RtsAttr {
        sq_psn: Psn::new(setup.psn[i]),
        timeout: setup.timeout,
        retry_cnt: setup.retry_cnt,
        rnr_retry: setup.rnr_retry,
        max_rd_atomic: setup.rd_atomic,
        read_chunk_packets: setup.read_chunk_packets,
    })
    .unwrap();
    qp
}

/// A piece of region `key`.
pub fn piece(key: u32, offset: u64, len: u32) -> SgList {
    SgList::one(Lkey(key), base_of(key) + offset, len)
}

/// A place in the peer's region `key`.
pub fn remote(key: u32, offset: u64) -> Remote {
    Remote {
        va: base_of(key) + offset,
        rkey: Rkey(key),
    }
}
