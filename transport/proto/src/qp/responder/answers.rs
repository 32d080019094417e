//! The line of answers owed to the peer, and the memory of READs and atomics for answering again.
//!
//! Invariants: answers leave in the order in which they were put in line; the line is bounded (the
//! responder takes no request while it is full, and a request adds at most one answer); an ACK or
//! a report of a gap replaces one that stands last in line.

use alloc::collections::VecDeque;

use super::super::Link;
use super::super::memory::{Access, Fragment, Fragments, Key, Memory, Rkey};
use super::super::types::{Allow, Transmit};
use crate::wire::{Aeth, Extension, Header, NakCode, Opcode, Position, Psn, Reth, Syndrome};

/// Deepest replay ring.
const REPLAY_MAX: usize = 128;
/// What an ATOMIC WRITE or FLUSH returns.
const NOTHING: Reth = Reth {
    va: 0,
    rkey: 0,
    len: 0,
};
/// Answers besides those to READs and atomics that may wait.
const OTHER_ANSWERS_MAX: usize = 8;

/// What is remembered of a READ or atomic.
#[derive(Clone, Copy, Debug)]
enum Replay {
    Read {
        psn: Psn,
        packets: u32,
        reth: Reth,
    },
    Atomic {
        psn: Psn,
        original: u64,
    },
    /// An ATOMIC WRITE or FLUSH, answered by a READ response without payload.
    Done {
        psn: Psn,
    },
}

/// A READ being answered.
#[derive(Clone, Copy, Debug)]
struct ReadAnswer {
    /// The next response packet's PSN.
    psn: Psn,
    /// What remains to be sent, in our memory.
    rkey: Rkey,
    va: u64,
    left: u32,
    /// No packet of it has been sent.
    fresh: bool,
    /// The request was a repeated one.
    again: bool,
    msn: u32,
}

/// An answer that waits to be sent.
#[derive(Clone, Copy, Debug)]
enum Answer {
    /// ACK, RNR NAK or NAK.
    Acknowledge {
        psn: Psn,
        msn: u32,
        syndrome: Syndrome,
    },
    Atomic {
        psn: Psn,
        msn: u32,
        original: u64,
    },
    /// Packet `psn` is missing; bit `n` of `kept`: `psn + 1 + n` is not.
    Report {
        psn: Psn,
        msn: u32,
        kept: u64,
    },
    Read(ReadAnswer),
}

#[derive(Debug)]
pub(super) struct Answers {
    line: VecDeque<Answer>,
    replay: VecDeque<Replay>,
    replay_depth: usize,
}

impl Answers {
    pub const fn new() -> Self {
        Self {
            line: VecDeque::new(),
            replay: VecDeque::new(),
            replay_depth: 0,
        }
    }

    /// Remember `depth` READs and atomics.
    pub fn start(&mut self, depth: u8) {
        self.replay_depth = usize::from(depth).min(REPLAY_MAX);
        self.replay.reserve(self.replay_depth);
        self.line.reserve(self.line_max());
    }

    pub fn clear(&mut self) {
        self.line.clear();
        self.replay.clear();
    }

    #[inline]
    pub fn is_empty(&self) -> bool {
        self.line.is_empty()
    }

    /// Whether all that waits is one ACK.
    #[inline]
    pub fn is_one_ack(&self) -> bool {
        self.line.len() == 1
            && matches!(
                self.line.front(),
                Some(Answer::Acknowledge {
                    syndrome: Syndrome::ACK,
                    ..
                })
            )
    }

    #[inline]
    pub fn is_full(&self) -> bool {
        self.line.len() >= self.line_max()
    }

    /// Whether READs and atomics can be served at all.
    pub const fn can_replay(&self) -> bool {
        self.replay_depth > 0
    }

    /// READs and atomics may each wait twice (once executed, once replayed).
    const fn line_max(&self) -> usize {
        2 * self.replay_depth + OTHER_ANSWERS_MAX
    }

    /// An ACK of everything to `psn`.
    #[inline]
    pub fn acknowledge(&mut self, psn: Psn, msn: u32) {
        self.drop_older();
        self.nak(psn, msn, Syndrome::ACK);
    }

    /// A report of the gap at `psn`. Whether it is another than waits already.
    pub fn report(&mut self, psn: Psn, msn: u32, kept: u64) -> bool {
        let is_new = !self.drop_older();
        self.line.push_back(Answer::Report { psn, msn, kept });
        is_new
    }

    /// What is said of everything to a PSN makes what was said last of less needless. Whether that
    /// was a report.
    #[inline]
    fn drop_older(&mut self) -> bool {
        let is_report = matches!(self.line.back(), Some(Answer::Report { .. }));
        let is_ack = matches!(
            self.line.back(),
            Some(Answer::Acknowledge {
                syndrome: Syndrome::ACK,
                ..
            })
        );
        if is_report || is_ack {
            self.line.pop_back();
        }
        is_report
    }

    /// A NAK or RNR NAK of `psn`.
    #[inline]
    pub fn nak(&mut self, psn: Psn, msn: u32, syndrome: Syndrome) {
        self.line
            .push_back(Answer::Acknowledge { psn, msn, syndrome });
    }

    /// The response to a READ that takes `packets` PSNs from `psn` on.
    pub fn read(&mut self, psn: Psn, packets: u32, reth: Reth, msn: u32) {
        self.remember(Replay::Read { psn, packets, reth });
        self.line
            .push_back(Answer::Read(ReadAnswer::new(psn, reth, msn, false)));
    }

    /// The response to an atomic.
    pub fn atomic(&mut self, psn: Psn, original: u64, msn: u32) {
        self.remember(Replay::Atomic { psn, original });
        self.line.push_back(Answer::Atomic { psn, msn, original });
    }

    /// The response to an ATOMIC WRITE or FLUSH: that of a READ of nothing.
    pub fn done(&mut self, psn: Psn, msn: u32) {
        self.remember(Replay::Done { psn });
        self.line
            .push_back(Answer::Read(ReadAnswer::new(psn, NOTHING, msn, false)));
    }

    /// The same again, if it is remembered. False if not.
    pub fn repeat_done(&mut self, psn: Psn, msn: u32) -> bool {
        let is_it = |replay: &Replay| matches!(replay, Replay::Done { psn: at } if *at == psn);
        if !self.replay.iter().any(is_it) {
            return false;
        }
        let is_it = |a: &Answer| matches!(a, Answer::Read(waiting) if waiting.psn == psn);
        if !self.line.iter().any(is_it) {
            self.line
                .push_back(Answer::Read(ReadAnswer::new(psn, NOTHING, msn, true)));
        }
        true
    }

    /// Answer a repeated READ request again, if it lies within one that is remembered and its
    /// memory still is readable. False if not.
    pub fn repeat_read(
        &mut self,
        psn: Psn,
        asked: Reth,
        msn: u32,
        memory: &impl Memory,
        link: &Link,
    ) -> bool {
        let known = self.replay.iter().any(|replay| match *replay {
            Replay::Read {
                psn: first,
                packets,
                reth,
            } => {
                let skip = psn.offset_from(first);
                let bytes = asked.va.wrapping_sub(reth.va);
                skip < packets
                    && bytes == u64::from(skip) * u64::from(link.mtu.bytes())
                    && bytes + u64::from(asked.len) <= u64::from(reth.len)
                    && asked.rkey == reth.rkey
            }
            Replay::Atomic { .. } | Replay::Done { .. } => false,
        });
        let rkey = Rkey(asked.rkey);
        let readable = asked.len == 0
            || memory
                .check_remote(rkey, asked.va, asked.len, Access::READ)
                .is_ok();
        if !known || !readable {
            return false;
        }
        // Not if the first answer still has to send all that is asked for.
        let waits = self.line.iter().any(|waiting| match waiting {
            Answer::Read(first) => {
                let skip = asked.va.wrapping_sub(first.va);
                psn.ahead_of(first.psn) >= 0
                    && skip.checked_add(asked.len.into()) == Some(first.left.into())
            }
            _ => false,
        });
        if !waits {
            self.line
                .push_back(Answer::Read(ReadAnswer::new(psn, asked, msn, true)));
        }
        true
    }

    /// Answer a repeated atomic with the value saved, if it is remembered. False if not.
    pub fn repeat_atomic(&mut self, psn: Psn, msn: u32) -> bool {
        let saved = self.replay.iter().find_map(|replay| match *replay {
            Replay::Atomic { psn: at, original } if at == psn => Some(original),
            _ => None,
        });
        let Some(original) = saved else { return false };
        let is_it =
            |a: &Answer| matches!(a, Answer::Atomic { psn: waiting, .. } if *waiting == psn);
        if !self.line.iter().any(is_it) {
            self.line.push_back(Answer::Atomic { psn, msn, original });
        }
        true
    }

    fn remember(&mut self, replay: Replay) {
        if self.replay.len() >= self.replay_depth {
            self.replay.pop_front();
        }
        self.replay.push_back(replay);
    }

    /// Writes the next packet of the answer at the head of the line, if `allow` admits it.
    #[inline]
    pub fn poll_transmit(&mut self, allow: Allow, link: &Link, into: &mut Transmit) -> bool {
        let Some(head) = self.line.front_mut() else {
            return false;
        };
        into.payload.clear();
        let mut is_over = true;
        let mut is_retransmission = false;
        let mut header = match head {
            Answer::Acknowledge { psn, msn, syndrome } => {
                // By itself, for most answers are, and all about its header is known here.
                let aeth = Extension::Aeth(Aeth {
                    syndrome: *syndrome,
                    msn: *msn,
                });
                let mut header = Header::new(Opcode::RcAcknowledge, link.dest, *psn, aeth);
                header.pkey = link.pkey;
                into.begin(header);
                self.drop_first();
                return true;
            }
            Answer::Report { psn, msn, kept } => {
                let aeth = Aeth {
                    syndrome: Syndrome::Nak(NakCode::SequenceError),
                    msn: *msn,
                };
                let extension = Extension::AtomicAck(aeth, *kept);
                Header::new(Opcode::RcAtomicAcknowledge, link.dest, *psn, extension)
            }
            Answer::Atomic { psn, msn, original } => {
                let aeth = Aeth {
                    syndrome: Syndrome::ACK,
                    msn: *msn,
                };
                let extension = Extension::AtomicAck(aeth, *original);
                Header::new(Opcode::RcAtomicAcknowledge, link.dest, *psn, extension)
            }
            Answer::Read(read) => {
                if allow == Allow::ControlOnly && read.left > 0 {
                    return false;
                }
                let header = read.next_packet(link, &mut into.payload);
                is_over = read.left == 0;
                is_retransmission = read.again;
                header
            }
        };
        if is_over {
            self.drop_first();
        }
        header.pkey = link.pkey;
        into.begin(header);
        into.is_retransmission = is_retransmission;
        true
    }

    #[inline]
    fn drop_first(&mut self) {
        self.line.pop_front();
        if self.line.is_empty() {
            // Begins at the front again: memory for the worst case is not touched in all others.
            self.line.clear();
        }
    }

    /// The memory of a repeated answer is gone after its packet `psn` was made: its peer has what it
    /// needs already, or will ask once more and hear nothing.
    pub fn forget_repeated(&mut self, psn: Psn) {
        if let Some(Answer::Read(read)) = self.line.front()
            && read.again
            && read.psn == psn.plus(1)
        {
            self.drop_first();
        }
    }
}

impl ReadAnswer {
    const fn new(psn: Psn, reth: Reth, msn: u32, again: bool) -> Self {
        Self {
            psn,
            rkey: Rkey(reth.rkey),
            va: reth.va,
            left: reth.len,
            fresh: true,
            again,
            msn,
        }
    }

    /// The next response packet; moves on by it.
    fn next_packet(&mut self, link: &Link, payload: &mut Fragments) -> Header {
        let len = self.left.min(link.mtu.bytes());
        let position = match (self.fresh, len == self.left) {
            (true, true) => Position::Only,
            (true, false) => Position::First,
            (false, false) => Position::Middle,
            (false, true) => Position::Last,
        };
        let aeth = Extension::Aeth(Aeth {
            syndrome: Syndrome::ACK,
            msn: self.msn,
        });
        let (opcode, extension) = match position {
            Position::Only => (Opcode::RcReadResponseOnly, aeth),
            Position::First => (Opcode::RcReadResponseFirst, aeth),
            Position::Middle => (Opcode::RcReadResponseMiddle, Extension::Bare),
            Position::Last => (Opcode::RcReadResponseLast, aeth),
        };
        if len > 0 {
            payload.push(Fragment {
                key: Key::Remote(self.rkey),
                addr: self.va,
                len,
            });
        }
        let header = Header::new(opcode, link.dest, self.psn, extension);
        self.fresh = false;
        self.psn = self.psn.plus(1);
        self.va = self.va.wrapping_add(u64::from(len));
        self.left -= len;
        header
    }
}
