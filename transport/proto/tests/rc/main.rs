//! The rules of a reliable connection, one by one: what is refused, retried, replayed and flushed.

#[path = "../common/mod.rs"]
mod common;
mod duplicates;
mod gaps;
mod local;
mod loss;
mod missing_answers;
mod placement;
mod refusals;
mod rnr;
mod round_trips;
mod states;
mod without_packets;

use std::cell::RefCell;
use std::rc::Rc;

use common::*;
use lowtide_transport_proto::qp::*;
use lowtide_transport_proto::time::Nanos;
use lowtide_transport_proto::wire::*;

/// A region for everything, at both ends.
const REGION: u32 = 7;
const LEN: u32 = 64 << 10;

fn pattern(seed: u64, len: u32) -> Vec<u8> {
    let mut rng = Rng(seed);
    (0..len).map(|_| rng.next() as u8).collect()
}

/// Two connected ends with one region each, of different bytes.
fn net(setup: Setup) -> SimNet {
    let mut net = SimNet::new(setup, Faults::default(), 1);
    for end in 0..2 {
        net.ends[end]
            .memory
            .register(REGION, pattern(end as u64, LEN));
    }
    net
}

/// Lets the second end be asked to flush.
fn grant_flush(net: &mut SimNet) {
    net.ends[1].qp.set_access(Access {
        flush_global: true,
        ..Access::ALL
    });
    let region = net.ends[1].memory.regions.get_mut(&REGION).unwrap();
    region.access.flush_global = true;
}

fn send(net: &mut SimNet, id: u64, op: SendOp, len: u32) {
    let wr = SendWr::new(WrId(id), op, piece(REGION, 0, len));
    net.ends[0].qp.post_send(wr).unwrap();
}

fn recv(net: &mut SimNet, id: u64, len: u32) {
    let wr = RecvWr {
        wr_id: WrId(id),
        local: piece(REGION, 32 << 10, len),
    };
    net.ends[1].qp.post_recv(wr).unwrap();
}

fn write_to(offset: u64) -> SendOp {
    SendOp::Write(remote(REGION, offset))
}

fn read_from(offset: u64) -> SendOp {
    SendOp::Read(remote(REGION, offset))
}

fn statuses(completions: &[Completion]) -> Vec<(u64, Status)> {
    completions.iter().map(|c| (c.wr_id.0, c.status)).collect()
}

/// Everything that each end sent, in order: opcode, PSN, syndrome byte.
type Log = Rc<RefCell<Vec<(usize, Opcode, u32, Option<u8>)>>>;

/// Record all packets; drop those for which `drops` says so.
fn tap(net: &mut SimNet, mut drops: impl FnMut(usize, &Packet<'_>) -> bool + 'static) -> Log {
    let log = Log::default();
    let writer = Rc::clone(&log);
    net.filter = Some(Box::new(move |from, packet: &Packet<'_>| {
        let syndrome = packet.aeth().map(|aeth| aeth.syndrome.byte());
        writer
            .borrow_mut()
            .push((from, packet.opcode(), packet.psn().value(), syndrome));
        !drops(from, packet)
    }));
    log
}

/// `net`, and all that its ends send; packets of end `of` with these PSNs are lost so many times each.
fn losing(mut net: SimNet, of: usize, losses: &[(u32, u32)]) -> (SimNet, Log) {
    let mut losses = losses.to_vec();
    let log = tap(&mut net, move |from, packet| {
        let loss = losses
            .iter_mut()
            .find(|loss| from == of && FIRST_PSN + loss.0 == packet.psn().value() && loss.1 > 0);
        loss.is_some_and(|loss| {
            loss.1 -= 1;
            true
        })
    });
    (net, log)
}

fn count(log: &Log, opcode: Opcode) -> usize {
    log.borrow()
        .iter()
        .filter(|entry| entry.1 == opcode)
        .count()
}

/// A request packet made by hand, as the client would send it.
fn request(opcode: Opcode, psn: u32, extension: Extension, payload: &[u8]) -> Vec<u8> {
    let mut header = Header::new(opcode, QPNS[1], Psn::new(psn), extension);
    header.ack_req = true;
    raw(header, payload)
}

fn raw(mut header: Header, payload: &[u8]) -> Vec<u8> {
    header.pad = pad_len(payload.len()) as u8;
    let mut bytes = vec![0; header.len()];
    header.emit(&mut bytes);
    bytes.extend_from_slice(payload);
    bytes.resize(bytes.len() + usize::from(header.pad) + ICRC_LEN, 0);
    bytes
}

/// Hand `bytes` to the server and return the outcome and its answers.
fn ask(net: &mut SimNet, bytes: &[u8]) -> (Outcome, Vec<Header>) {
    let packet = Packet::new_checked(bytes).unwrap();
    let end = &mut net.ends[1];
    let outcome = end.qp.handle_packet(Nanos(5_000), &packet, &mut end.memory);
    let mut answers = Vec::new();
    while let Some(transmit) = end.qp.poll_transmit(Nanos(5_000), Allow::All) {
        let bytes = assemble(&transmit, &end.memory, &flow(1));
        answers.push(Packet::new_checked(&bytes).unwrap().header());
    }
    (outcome, answers)
}

fn syndrome(header: &Header) -> Syndrome {
    match header.extension {
        Extension::Aeth(aeth) | Extension::AtomicAck(aeth, _) => aeth.syndrome,
        _ => panic!("no AETH: {header:?}"),
    }
}

fn reth(offset: u64, len: u32) -> Reth {
    Reth {
        va: base_of(REGION) + offset,
        rkey: REGION,
        len,
    }
}

fn fetch_add(offset: u64, add: u64) -> AtomicEth {
    AtomicEth {
        va: base_of(REGION) + offset,
        rkey: REGION,
        swap_add: add,
        compare: 0,
    }
}

const FIRST_PSN: u32 = 0x100;

/// Drop the `n`-th packet with `opcode` that end `from` sends.
fn drop_nth(from: usize, opcode: Opcode, n: usize) -> impl FnMut(usize, &Packet<'_>) -> bool {
    let mut seen = 0;
    move |sender, packet| {
        let hit = sender == from && packet.opcode() == opcode;
        seen += usize::from(hit);
        hit && seen == n
    }
}

/// Takes the server's queue pair from RESET to RTR; the client's first packet has this PSN.
fn to_rtr(qp: &mut QueuePair, psn: u32, rd_atomic: u8) {
    qp.to_init(InitAttr {
        access: Access::ALL,
        pkey: PKEY_DEFAULT,
    })
    .unwrap();
    qp.to_rtr(RtrAttr {
        dest: QPNS[0],
        path_mtu: Mtu::B1024,
        rq_psn: Psn::new(psn),
        max_dest_rd_atomic: rd_atomic,
        min_rnr_timer: RnrTimer::new(1),
    })
    .unwrap();
}
