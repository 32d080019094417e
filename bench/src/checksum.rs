//! What a received packet costs before and while its bytes are put where they belong: the ICRC of
//! every packet is checked, then its payload is placed in a region that peers may write.
//!
//! Both yardsticks go over the same packets: memcpy of the payloads, and zlib's crc32 of as many bytes.

use std::hint::black_box;
use std::net::Ipv4Addr;
use std::process::Command;
use std::time::Instant;

use lowtide_transport::memory::{Access, Memory, SharedMemory};
use lowtide_transport_proto::icrc::{Flow, Icrc, check_unknown_identification};
use lowtide_transport_proto::wire::{Extension, HEADER_LEN_MAX, Header, Opcode, Packet, Psn, Qpn};

use crate::programs;
use crate::row::{Better, Pick, Rounds, Row};
use crate::{Bench, Failure};

const ROUNDS: u32 = 15;
/// Bytes of payload in a packet.
const PAYLOAD: usize = 4096;
/// Bytes of payload that a round goes over.
const TOTAL: usize = 64 << 20;
/// Bytes of payload in all packets, where they come from memory and where they stay in the cache.
const RING: usize = TOTAL;
const RING_CACHED: usize = 2 << 20;
/// BTH and ICRC of a packet in the middle of a message.
const AROUND: usize = 16;
const DOMAIN: u32 = 1;

/// Nanoseconds per packet, against memcpy and against zlib.
///
/// # Errors
/// A packet is not what was made.
pub fn icrc(bench: &Bench) -> Result<Vec<Row>, Failure> {
    rows(bench, RING, ["icrc", "icrc-zlib"], Some([1.5, 0.25]))
}

/// The same over packets that stay in the processor's cache, as many times: what the checksum itself
/// costs beside zlib's, where neither waits for memory.
///
/// # Errors
/// As of [`icrc`].
pub fn icrc_cached(bench: &Bench) -> Result<Vec<Row>, Failure> {
    rows(
        bench,
        RING_CACHED,
        ["icrc-cached", "icrc-zlib-cached"],
        None,
    )
}

fn rows(
    bench: &Bench,
    len: usize,
    names: [&'static str; 2],
    aims: Option<[f64; 2]>,
) -> Result<Vec<Row>, Failure> {
    programs::require("python3", "python3")?;
    let flow = Flow::v4(Ipv4Addr::LOCALHOST, Ipv4Addr::LOCALHOST, 4791);
    let ring = packets(&flow, len);
    let mut memory = Memory::default();
    let region = SharedMemory::new(len);
    let key = memory.register_shared(DOMAIN, region, Access::ALL);
    let key = key.ok_or_else(|| Failure::broken("no room for a region"))?;
    let mut copy = vec![0u8; len];
    let (mut ours, mut copied, mut zlib) = (Vec::new(), Vec::new(), Vec::new());
    // The first round of each touches memory that nobody has touched.
    for round in 0..=bench.rounds.unwrap_or(ROUNDS) {
        let rows = [
            per_packet(&ring, |index, bytes| {
                let packet = Packet::new_checked(bytes).map_err(|_| "malformed")?;
                if check_unknown_identification(&flow, &packet) != Some(0) {
                    return Err("wrong ICRC");
                }
                let (at, len) = ((index * PAYLOAD) as u64, PAYLOAD as u32);
                let span = memory.check(DOMAIN, key, at, len, Access::ALL);
                let span = span.map_err(|_| "no access")?;
                memory
                    .place(span, packet.payload())
                    .map_err(|_| "no access")
            })?,
            per_packet(&ring, |index, bytes| {
                copy[index * PAYLOAD..][..PAYLOAD].copy_from_slice(payload(bytes));
                Ok(())
            })?,
        ];
        black_box(&copy);
        if round > 0 {
            ours.push(rows[0]);
            copied.push(rows[1]);
            zlib.push(zlib_crc32(len)?);
        }
    }
    let row = |at: usize, yardstick, yardstick_is| {
        let figures = Rounds {
            unit: "ns",
            better: Better::Lower,
            yardstick_is,
            ours: ours.clone(),
            yardstick,
        };
        let row = figures.row(names[at], Pick::Median, &bench.machine);
        match aims {
            Some(aims) => row.aim(aims[at]),
            None => row,
        }
    };
    Ok(vec![
        row(0, copied, "memcpy of the same payloads"),
        row(1, zlib, "crc32 of zlib over as many bytes"),
    ])
}

/// Nanoseconds that zlib takes for as many bytes as a packet's payload, of a buffer of `len` bytes, as
/// often as makes a round. Python brings the zlib of the system.
fn zlib_crc32(len: usize) -> Result<f64, Failure> {
    let program = format!(
        "import os, time, zlib\n\
         data = os.urandom(1 << 20) * {}\n\
         began = time.perf_counter_ns()\n\
         for _ in range({}): zlib.crc32(data)\n\
         print((time.perf_counter_ns() - began) / {})",
        len >> 20,
        TOTAL / len,
        TOTAL / PAYLOAD,
    );
    let text = programs::ask(Command::new("python3").args(["-c", &program]))?;
    text.trim().parse().map_err(Failure::broken)
}

/// Nanoseconds per packet of a round.
fn per_packet(
    ring: &[u8],
    mut act: impl FnMut(usize, &[u8]) -> Result<(), &'static str>,
) -> Result<f64, Failure> {
    let packets = ring.chunks_exact(PAYLOAD + AROUND);
    let passes = TOTAL / PAYLOAD / packets.len();
    let began = Instant::now();
    for _ in 0..passes {
        for (index, packet) in packets.clone().enumerate() {
            act(index, packet).map_err(Failure::broken)?;
        }
    }
    Ok(began.elapsed().as_nanos() as f64 / (TOTAL / PAYLOAD) as f64)
}

fn payload(packet: &[u8]) -> &[u8] {
    &packet[AROUND - 4..][..PAYLOAD]
}

/// Packets of one WRITE of `len` bytes, one behind the other.
fn packets(flow: &Flow, len: usize) -> Vec<u8> {
    let count = len / PAYLOAD;
    let mut ring = Vec::with_capacity(count * (PAYLOAD + AROUND));
    let mut bytes = vec![0u8; PAYLOAD];
    for index in 0..count {
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = (index.wrapping_mul(31) + at.wrapping_mul(7)) as u8;
        }
        let psn = Psn::new(index as u32);
        let header = Header::new(Opcode::RcWriteMiddle, Qpn::new(17), psn, Extension::Bare);
        let mut head = [0; HEADER_LEN_MAX];
        let len = header.emit(&mut head);
        let mut icrc = Icrc::begin(flow, &head[..len], len + PAYLOAD + 4);
        icrc.update(&bytes);
        let (trailer, trailer_len) = icrc.finish(0);
        ring.extend_from_slice(&head[..len]);
        ring.extend_from_slice(&bytes);
        ring.extend_from_slice(&trailer[..trailer_len]);
    }
    ring
}
