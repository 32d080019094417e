//! A posted send work request, and the packets it is cut into.
//!
//! Any packet is built from its sequence number alone: sending again needs no memory of sending.

use super::super::Link;
use super::super::lists::{Lists, Packed};
use super::super::memory::{Remote, Rkey};
use super::super::types::{QpKind, Transmit};
use super::super::work::{Completion, CompletionKind, Flush, SendOp, Status, WrId};
use crate::wire::{AtomicEth, Extension, Feth, Header, Opcode, Position, Psn, Reth};

/// A posted send work request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wqe {
    pub wr_id: WrId,
    pub op: SendOp,
    pub local: Packed,
    pub signalled: bool,
    pub solicited: bool,
    pub fence: bool,
    /// Sequence number of its first packet.
    pub first: u64,
    /// How many packets, or response packets, it takes; none for what is done at this end.
    pub packets: u32,
    /// It is done at this end, and that has happened.
    pub is_done: bool,
}

impl Wqe {
    pub const fn end(&self) -> u64 {
        self.first + self.packets as u64
    }

    /// Whether only a response of its own, not a plain ACK, finishes it.
    pub const fn wants_response(&self) -> bool {
        self.op.wants_response()
    }

    /// Whether it is to be done at this end, still.
    pub const fn is_waiting(&self) -> bool {
        self.packets == 0 && !self.is_done
    }

    /// Whether there is a request packet of this sequence number; the others are those of a READ's
    /// answer.
    pub const fn is_packet(&self, seq: u64, chunk: u16) -> bool {
        let index = seq - self.first;
        match (&self.op, chunk) {
            (SendOp::Read(_), 0) => index == 0,
            (SendOp::Read(_), chunk) => index.is_multiple_of(chunk as u64),
            _ => true,
        }
    }

    /// Bytes of the answer's packet `index`, and whether the answer is an atomic's; none if an
    /// answer makes no sense.
    pub fn answer(&self, index: u32, link: &Link) -> Option<(u32, bool)> {
        match self.op {
            SendOp::Read(_) => {
                let left = self.local.total - index * link.mtu.bytes();
                Some((left.min(link.mtu.bytes()), false))
            }
            SendOp::CompareSwap { .. } | SendOp::FetchAdd { .. } => Some((8, true)),
            SendOp::AtomicWrite(_) | SendOp::Flush(_) => Some((0, false)),
            _ => None,
        }
    }

    #[inline]
    pub const fn kind(&self) -> CompletionKind {
        match self.op {
            SendOp::Send | SendOp::SendImm(_) | SendOp::SendInvalidate(_) => CompletionKind::Send,
            SendOp::Write(_) | SendOp::WriteImm(..) => CompletionKind::Write,
            SendOp::Read(_) => CompletionKind::Read,
            SendOp::CompareSwap { .. } => CompletionKind::CompareSwap,
            SendOp::FetchAdd { .. } => CompletionKind::FetchAdd,
            SendOp::AtomicWrite(_) => CompletionKind::AtomicWrite,
            SendOp::Flush(_) => CompletionKind::Flush,
            SendOp::LocalInvalidate(_) => CompletionKind::LocalInvalidate,
            SendOp::BindWindow(_) => CompletionKind::BindWindow,
        }
    }

    #[inline]
    pub fn completion(&self, status: Status, link: &Link) -> Completion {
        let byte_len = match self.kind() {
            CompletionKind::Read | CompletionKind::CompareSwap | CompletionKind::FetchAdd => {
                self.local.total
            }
            _ => 0,
        };
        Completion {
            wr_id: self.wr_id,
            status,
            kind: self.kind(),
            byte_len,
            imm: None,
            invalidated: None,
            solicited: false,
            source: link.dest,
        }
    }

    /// Writes the packet that stands for sequence number `seq`, with this PSN. It takes one PSN, or
    /// as many as the packets that a READ asks for (`answers`).
    #[inline]
    pub fn packet(
        &self,
        seq: u64,
        psn: Psn,
        ack_req: bool,
        answers: u32,
        (link, lists): (&Link, &Lists),
        into: &mut Transmit,
    ) {
        let mtu = link.mtu.bytes();
        let index = (seq - self.first) as u32;
        let offset = index * mtu;
        let left = self.local.total - offset.min(self.local.total);
        let position = match (index == 0, index + 1 == self.packets) {
            (true, true) => Position::Only,
            (true, false) => Position::First,
            (false, false) => Position::Middle,
            (false, true) => Position::Last,
        };
        lists.slice_into(&self.local, (offset, left.min(mtu)), &mut into.payload);
        let (opcode, extension) = match self.op {
            SendOp::Read(remote) => {
                into.payload.clear();
                let reth = Reth {
                    va: remote.va.wrapping_add(u64::from(offset)),
                    rkey: remote.rkey.0,
                    len: left.min(answers.saturating_mul(mtu)),
                };
                (Opcode::RcReadRequest, Extension::Reth(reth))
            }
            SendOp::CompareSwap {
                remote,
                compare,
                swap,
            } => {
                into.payload.clear();
                (Opcode::RcCompareSwap, atomic(remote, swap, compare))
            }
            SendOp::FetchAdd { remote, add } => {
                into.payload.clear();
                (Opcode::RcFetchAdd, atomic(remote, add, 0))
            }
            SendOp::AtomicWrite(remote) => {
                let extension = Extension::Reth(reth(remote, 8));
                (Opcode::RcAtomicWrite, extension)
            }
            SendOp::Flush(flush) => (Opcode::RcFlush, flush_header(flush)),
            op => message_header(op, position, self.local.total, link.kind),
        };
        let mut header = Header::new(opcode, link.dest, psn, extension);
        header.pkey = link.pkey;
        header.ack_req = ack_req && link.kind == QpKind::Rc;
        header.solicited = self.solicited && position.ends() && self.op.takes_receive();
        into.begin(header);
    }

    /// Response packets that a READ request starting at packet `index` asks for: to the end of its
    /// chunk. Chunks start at multiples, so a repeated request lies within the original one.
    #[inline]
    pub fn read_packets(&self, index: u32, chunk: u16) -> u32 {
        let chunk = match u32::from(chunk) {
            0 => self.packets,
            n => n,
        };
        (chunk - index % chunk).min(self.packets - index)
    }
}

const fn reth(remote: Remote, len: u32) -> Reth {
    let Rkey(rkey) = remote.rkey;
    Reth {
        va: remote.va,
        rkey,
        len,
    }
}

const fn atomic(remote: Remote, swap_add: u64, compare: u64) -> Extension {
    Extension::Atomic(AtomicEth {
        va: remote.va,
        rkey: remote.rkey.0,
        swap_add,
        compare,
    })
}

fn flush_header(flush: Flush) -> Extension {
    let feth = Feth::new(flush.global, flush.persistent, flush.whole_region);
    Extension::FethReth(feth, reth(flush.remote, flush.len))
}

/// Opcode and extension of a SEND or WRITE packet.
#[inline]
fn message_header(op: SendOp, position: Position, total: u32, kind: QpKind) -> (Opcode, Extension) {
    use Position::{First, Last, Middle, Only};
    let reth = |remote: Remote| reth(remote, total);
    let (opcode, extension) = match (op, position) {
        (SendOp::SendImm(imm), Last) => (Opcode::RcSendLastImm, Extension::Imm(imm)),
        (SendOp::SendImm(imm), Only) => (Opcode::RcSendOnlyImm, Extension::Imm(imm)),
        (SendOp::SendInvalidate(key), Last) => {
            (Opcode::RcSendLastInvalidate, Extension::Ieth(key.0))
        }
        (SendOp::SendInvalidate(key), Only) => {
            (Opcode::RcSendOnlyInvalidate, Extension::Ieth(key.0))
        }
        (SendOp::Write(remote) | SendOp::WriteImm(remote, _), First) => {
            (Opcode::RcWriteFirst, Extension::Reth(reth(remote)))
        }
        (SendOp::Write(_) | SendOp::WriteImm(..), Middle) => {
            (Opcode::RcWriteMiddle, Extension::Bare)
        }
        (SendOp::Write(_), Last) => (Opcode::RcWriteLast, Extension::Bare),
        (SendOp::Write(remote), Only) => (Opcode::RcWriteOnly, Extension::Reth(reth(remote))),
        (SendOp::WriteImm(_, imm), Last) => (Opcode::RcWriteLastImm, Extension::Imm(imm)),
        (SendOp::WriteImm(remote, imm), Only) => (
            Opcode::RcWriteOnlyImm,
            Extension::RethImm(reth(remote), imm),
        ),
        (_, First) => (Opcode::RcSendFirst, Extension::Bare),
        (_, Middle) => (Opcode::RcSendMiddle, Extension::Bare),
        (_, Last) => (Opcode::RcSendLast, Extension::Bare),
        (_, Only) => (Opcode::RcSendOnly, Extension::Bare),
    };
    match kind {
        QpKind::Rc => (opcode, extension),
        // The classes differ in one bit; `post` refused what UC does not have.
        QpKind::Uc => (
            Opcode::from_code(opcode.code() | 0x20).unwrap_or(opcode),
            extension,
        ),
    }
}
