//! A device among hostile peers: what they can send, and what must not change by it.
//!
//! Shared by the tests of the device and by the fuzz targets. Datagrams are handed to the device
//! directly, so every run is the same.

use std::net::Ipv4Addr;

use lowtide_transport_proto::icrc::{Flow, Icrc};
use lowtide_transport_proto::qp::{
    Access as Rights, CompletionKind, InitAttr, Lkey, RecvWr, RtrAttr, RtsAttr, SgList, Status,
    WrId,
};
use lowtide_transport_proto::wire::{
    Aeth, AtomicEth, Deth, Extension, Feth, Header, Mtu, OPCODES, Opcode, PKEY_DEFAULT,
    PayloadRule, Psn, Reth, RnrTimer, Shape, Syndrome, pad_len,
};

use super::output::flow;
use super::*;
use crate::memory::{Access, Key, SharedMemory};
use crate::names::Random;
use crate::udp::Arrival;

pub(crate) const ATTACKED: u32 = 1;
pub(crate) const OTHER: u32 = 2;
pub(crate) const PSN: u32 = 0xFF_FFF0;

/// Where a test's choices come from.
pub(crate) enum Choices<'a> {
    /// SplitMix64.
    #[cfg_attr(fuzzing, allow(dead_code, reason = "a fuzzer gives bytes"))]
    Seeded(u64),
    /// A fuzzer's bytes; zeros when they are used up.
    Given(&'a [u8]),
}

impl Choices<'_> {
    pub(crate) fn next(&mut self) -> u64 {
        match self {
            Choices::Seeded(state) => {
                *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
                let mut z = *state;
                z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
                z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
                z ^ (z >> 31)
            }
            Choices::Given(bytes) => take(bytes, 4),
        }
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        match self {
            Choices::Given(bytes) => take(bytes, if n <= 256 { 1 } else { 2 }) % n,
            Choices::Seeded(_) => self.next() % n,
        }
    }

    /// Whether nothing new will come.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self, Choices::Given(bytes) if bytes.is_empty())
    }
}

fn take(bytes: &mut &[u8], len: usize) -> u64 {
    let (now, later) = bytes.split_at(len.min(bytes.len()));
    *bytes = later;
    let mut word = [0; 8];
    word[..now.len()].copy_from_slice(now);
    u64::from_le_bytes(word)
}

pub(crate) fn device() -> Device {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let mut options = DeviceOptions::default();
    options.socket.congestion_marks = Some(true);
    Device::bind(address, &options, Peers::Any, Random::known).unwrap()
}

pub(crate) fn peer(last: u8) -> SocketAddr {
    // Nobody listens there: what the device answers is dropped by the kernel.
    SocketAddr::from((Ipv4Addr::new(127, 0, 77, last), 4791))
}

/// A working queue pair of `domain`, connected to `address`.
pub(crate) fn connect(device: &mut Device, domain: u32, address: SocketAddr) -> (QpId, Qpn) {
    let caps = QpCaps {
        send_wr_max: 16,
        recv_wr_max: 16,
        shared_receives: false,
    };
    let (id, qpn) = device.create_qp(domain, caps).unwrap();
    let qp = device.qp(id).unwrap();
    qp.to_init(InitAttr {
        access: Rights::ALL,
        pkey: PKEY_DEFAULT,
    })
    .unwrap();
    qp.to_rtr(RtrAttr {
        dest: Qpn::new(0x77),
        path_mtu: Mtu::B4096,
        rq_psn: Psn::new(PSN),
        max_dest_rd_atomic: 16,
        min_rnr_timer: RnrTimer::new(1),
    })
    .unwrap();
    qp.to_rts(RtsAttr {
        sq_psn: Psn::new(PSN),
        timeout: 14,
        retry_cnt: 7,
        rnr_retry: 7,
        max_rd_atomic: 16,
        read_chunk_packets: 16,
    })
    .unwrap();
    device.set_peer(id, address, None);
    (id, qpn)
}

/// What the kernel says of a datagram: no more than where it came from.
pub(crate) fn arrival(source: SocketAddr) -> Arrival<'static> {
    Arrival {
        source,
        target: None,
        bytes: &[],
        segment: 1,
        is_truncated: false,
        is_congested: false,
        overflow: None,
    }
}

/// A datagram with a right ICRC.
pub(crate) fn datagram(
    device: &Device,
    from: SocketAddr,
    header: Header,
    payload: &[u8],
) -> Vec<u8> {
    identified(device, from, header, payload, 0)
}

/// The same with an IPv4 Identification.
pub(crate) fn identified(
    device: &Device,
    from: SocketAddr,
    mut header: Header,
    payload: &[u8],
    identification: u16,
) -> Vec<u8> {
    header.pad = pad_len(payload.len()) as u8;
    let local = device.local_addr();
    let mut bytes = vec![0; 64];
    let len = header.emit(&mut bytes);
    bytes.truncate(len);
    let flow = flow(from, local.ip(), local.port()).unwrap();
    let flow = flow.with_identification(identification);
    let total = len + payload.len() + pad_len(payload.len()) + 4;
    let mut crc = Icrc::begin(&flow, &bytes, total);
    crc.update(payload);
    let (tail, tail_len) = crc.finish(pad_len(payload.len()));
    bytes.extend_from_slice(payload);
    bytes.extend_from_slice(&tail[..tail_len]);
    bytes
}

pub(crate) fn request(opcode: Opcode, to: Qpn, psn: u32, extension: Extension) -> Header {
    let mut header = Header::new(opcode, to, Psn::new(psn), extension);
    header.ack_req = true;
    header
}

pub(crate) fn deliver(
    device: &mut Device,
    from: SocketAddr,
    header: Header,
    payload: &[u8],
) -> Input {
    let bytes = datagram(device, from, header, payload);
    let now = device.now();
    device.handle(now, &arrival(from), 0, &bytes)
}

/// An extension with values that an attacker would try.
pub(crate) fn extension(rng: &mut Choices<'_>, shape: Shape, keys: &[u32]) -> Extension {
    let odd = [
        0,
        1,
        7,
        8,
        63,
        64,
        4095,
        4096,
        u64::from(u32::MAX),
        u64::MAX - 7,
        u64::MAX,
    ];
    let mut value = || odd[rng.below(odd.len() as u64) as usize];
    let va = value();
    let len = value() as u32;
    let word = value();
    let swap_add = value();
    let rkey = match rng.below(4) {
        0 => rng.next() as u32,
        1 => keys[rng.below(keys.len() as u64) as usize] ^ 1 << rng.below(32),
        _ => keys[rng.below(keys.len() as u64) as usize],
    };
    let reth = Reth { va, rkey, len };
    let aeth = Aeth {
        syndrome: Syndrome::from_byte(rng.next() as u8),
        msn: rng.next() as u32 & 0xFF_FFFF,
    };
    let deth = Deth {
        qkey: rng.next() as u32,
        source: Qpn::new(rng.next() as u32),
    };
    match shape {
        Shape::Bare => Extension::Bare,
        Shape::Imm => Extension::Imm(word as u32),
        Shape::Ieth => Extension::Ieth(rkey),
        Shape::Reth => Extension::Reth(reth),
        Shape::RethImm => Extension::RethImm(reth, word as u32),
        Shape::Aeth => Extension::Aeth(aeth),
        Shape::AtomicAck => Extension::AtomicAck(aeth, word),
        Shape::Atomic => Extension::Atomic(AtomicEth {
            va,
            rkey,
            swap_add,
            compare: word,
        }),
        Shape::Deth => Extension::Deth(deth),
        Shape::DethImm => Extension::DethImm(deth, word as u32),
        Shape::FethReth => Extension::FethReth(
            Feth {
                bits: rng.next() as u32,
            },
            reth,
        ),
        Shape::Cnp => Extension::Cnp,
    }
}

pub(crate) fn payload_len(rng: &mut Choices<'_>, rule: PayloadRule) -> usize {
    match rule {
        PayloadRule::None => 0,
        PayloadRule::Full => [256, 512, 1024, 2048, 4096, 4096, 4096][rng.below(7) as usize],
        PayloadRule::Eight => 8,
        PayloadRule::Tail => 1 + rng.below(4096) as usize,
        PayloadRule::Any => [0, 1, 64, 4096, rng.below(4097) as usize][rng.below(5) as usize],
    }
}

/// What the attacker may not touch: a queue pair, a slot posted to it, memory of two kinds.
pub(crate) struct Bystander {
    pub(crate) id: QpId,
    pub(crate) qpn: Qpn,
    pub(crate) slot: Key,
    pub(crate) local: Key,
    pub(crate) foreign: Key,
}

pub(crate) fn bystander(device: &mut Device) -> Bystander {
    let (id, qpn) = connect(device, OTHER, peer(2));
    let slot = device.memory.reserve(OTHER).unwrap();
    device.memory.attach(slot, vec![5; 64].into_boxed_slice());
    let local = SgList::one(Lkey(slot.0), 0, 64);
    let wr_id = WrId(9);
    device
        .qp(id)
        .unwrap()
        .post_recv(RecvWr { wr_id, local })
        .unwrap();
    let mut shared = |domain, access| {
        let memory = SharedMemory::new(64);
        memory.write(0, &[6; 64]);
        let key = device.memory.register_shared(domain, memory, access);
        key.unwrap()
    };
    let (local, foreign) = (shared(ATTACKED, Access::LOCAL), shared(OTHER, Access::ALL));
    Bystander {
        id,
        qpn,
        slot,
        local,
        foreign,
    }
}

impl Bystander {
    /// Its receive still works, and its memory is as it was.
    pub(crate) fn check(&self, device: &mut Device) {
        let header = request(Opcode::RcSendOnly, self.qpn, PSN, Extension::Bare);
        assert!(matches!(
            deliver(device, peer(2), header, b"for me"),
            Input::Taken { .. }
        ));
        let completion = device.poll_completion(self.id).unwrap();
        assert_eq!(completion.kind, CompletionKind::Recv);
        assert_eq!(
            (completion.wr_id, completion.status, completion.byte_len),
            (WrId(9), Status::Success, 6)
        );
        assert_eq!(&device.memory.detach(self.slot).unwrap()[..6], b"for me");
        for (domain, key) in [(ATTACKED, self.local), (OTHER, self.foreign)] {
            let span = device.memory.check(domain, key, 0, 64, Access::default());
            let mut bytes = [0; 64];
            device.memory.fetch(span.unwrap(), &mut bytes).unwrap();
            assert_eq!(bytes, [6; 64]);
        }
    }
}

/// One datagram of an attacker who knows all numbers of one connection and guesses the rest.
pub(crate) fn attack(
    rng: &mut Choices<'_>,
    device: &Device,
    from: SocketAddr,
    qpns: [Qpn; 2],
    keys: &[u32],
    psn: u32,
) -> Vec<u8> {
    let row = &OPCODES[rng.below(OPCODES.len() as u64) as usize];
    let to = match rng.below(8) {
        0 => qpns[1],
        1 => Qpn::new(rng.next() as u32),
        2 => Qpn::GSI,
        _ => qpns[0],
    };
    let psn = match rng.below(4) {
        0 => rng.next() as u32,
        1 => psn.wrapping_sub(rng.below(200) as u32),
        _ => psn,
    };
    let mut header = Header::new(
        row.opcode,
        to,
        Psn::new(psn),
        extension(rng, row.shape, keys),
    );
    header.ack_req = rng.below(2) == 0;
    let payload = vec![rng.next() as u8; payload_len(rng, row.payload)];
    let mut bytes = datagram(device, from, header, &payload);
    match rng.below(12) {
        0 => bytes.truncate(rng.below(bytes.len() as u64 + 1) as usize),
        1 => {
            let at = rng.below(bytes.len() as u64) as usize;
            bytes[at] ^= 1 << rng.below(8);
        }
        2 => bytes.extend_from_slice(&[0; 3][..rng.below(4) as usize]),
        3 => bytes.clear(),
        _ => {}
    }
    bytes
}

/// The flow of a datagram between two addresses.
pub(crate) fn flow_to(from: SocketAddr, to: SocketAddr) -> Flow {
    flow(from, to.ip(), to.port()).expect("of one family")
}
