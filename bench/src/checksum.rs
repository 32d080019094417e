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
/// Bytes of payload in a packet, and in all of them.
const PAYLOAD: usize = 4096;
const RING: usize = 64 << 20;
/// BTH and ICRC of a packet in the middle of a message.
const AROUND: usize = 16;
const DOMAIN: u32 = 1;

/// Nanoseconds per packet, against memcpy and against zlib.
///
/// # Errors
/// A packet is not what was made.
pub fn icrc(bench: &Bench) -> Result<Vec<Row>, Failure> {
    programs::require("python3", "python3")?;
    let flow = Flow::v4(Ipv4Addr::LOCALHOST, Ipv4Addr::LOCALHOST, 4791);
    let ring = packets(&flow);
    let mut memory = Memory::default();
    let region = SharedMemory::new(RING);
    let key = memory.register_shared(DOMAIN, region, Access::ALL);
    let key = key.ok_or_else(|| Failure::broken("no room for a region"))?;
    let mut copy = vec![0u8; RING];
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
            zlib.push(zlib_crc32()?);
        }
    }
    let row = |name, yardstick, yardstick_is, aim| {
        let figures = Rounds {
            unit: "ns",
            better: Better::Lower,
            yardstick_is,
            ours: ours.clone(),
            yardstick,
        };
        figures.row(name, Pick::Median, &bench.machine).aim(aim)
    };
    Ok(vec![
        row("icrc", copied, "memcpy of the same payloads", 1.5),
        row("icrc-zlib", zlib, "crc32 of zlib over as many bytes", 0.25),
    ])
}

/// Nanoseconds that zlib takes for as many bytes as a packet's payload, of a buffer as long as all of
/// them. Python brings the zlib of the system.
fn zlib_crc32() -> Result<f64, Failure> {
    let program = format!(
        "import os, time, zlib\n\
         data = os.urandom(1 << 20) * {}\n\
         began = time.perf_counter_ns()\n\
         zlib.crc32(data)\n\
         print((time.perf_counter_ns() - began) / {})",
        RING >> 20,
        RING / PAYLOAD,
    );
    let text = programs::ask(Command::new("python3").args(["-c", &program]))?;
    text.trim().parse().map_err(Failure::broken)
}

/// Nanoseconds per packet.
fn per_packet(
    ring: &[u8],
    mut act: impl FnMut(usize, &[u8]) -> Result<(), &'static str>,
) -> Result<f64, Failure> {
    let packets = ring.chunks_exact(PAYLOAD + AROUND);
    let count = packets.len() as f64;
    let began = Instant::now();
    for (index, packet) in packets.enumerate() {
        act(index, packet).map_err(Failure::broken)?;
    }
    Ok(began.elapsed().as_nanos() as f64 / count)
}

fn payload(packet: &[u8]) -> &[u8] {
    &packet[AROUND - 4..][..PAYLOAD]
}

/// Packets of one long WRITE, one behind the other.
fn packets(flow: &Flow) -> Vec<u8> {
    let count = RING / PAYLOAD;
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
