//! What is missing of the answers to READs and atomics, ahead of which others have come.
//!
//! Answers leave the peer in the order in which they were asked for. So whatever was asked for before
//! something that has come, and has not come itself, is lost and is asked for again: by a READ of just
//! that, with its own PSNs, a duplicate as any responder serves. That is how a lost repetition is found,
//! too. An answer that was overtaken on the way is asked for once too often.
//!
//! Invariants: gaps ascend, do not overlap and end at or before `top`; what lies before `top` and in no
//! gap has come, or needs no answer of its own; the peer has executed every request before `top`.

use alloc::collections::VecDeque;

/// Gaps that are remembered: a later answer is dropped, and asked for when these are filled.
const GAPS_MAX: usize = 64;
/// Packets ahead of the oldest missing one beyond which an answer is not kept.
pub(super) const AHEAD_MAX: u64 = 512;

/// When something was asked for: behind the packet with this sequence number was sent for the first
/// time, and as which of the repetitions since. New packets are asked for in sequence, as 0th.
type Order = (u64, u32);

/// Answers `first` to `end` are missing.
#[derive(Clone, Copy, Debug)]
struct Gap {
    first: u64,
    end: u64,
    /// When they were asked for again; none while they are to be.
    asked: Option<Order>,
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Gaps {
    gaps: VecDeque<Gap>,
    top: u64,
    /// Repetitions asked for.
    turn: u32,
}

impl Gaps {
    /// Takes all the memory that it will need.
    pub fn new() -> Self {
        Self {
            gaps: VecDeque::with_capacity(GAPS_MAX),
            top: 0,
            turn: 0,
        }
    }

    /// Nothing has come from `una` on.
    pub fn restart(&mut self, una: u64) {
        self.gaps.clear();
        (self.top, self.turn) = (una, 0);
    }

    /// One beyond the last packet that the peer is known to have executed.
    pub const fn top(&self) -> u64 {
        self.top
    }

    /// How many packets from `una` on are not under way: they have come, or are to be asked for again.
    pub fn absent(&self, una: u64) -> u32 {
        let asked = self.gaps.iter().filter(|gap| gap.asked.is_some());
        let under_way: u64 = asked.map(|gap| gap.end - gap.first).sum();
        (self.top.saturating_sub(una)).saturating_sub(under_way) as u32
    }

    /// Whether the answer `una`, which is the oldest that is not taken, has come.
    pub fn has(&self, una: u64) -> bool {
        una < self.top && self.gaps.front().is_none_or(|gap| una < gap.first)
    }

    /// One beyond the last answer that is missing from `una` on without one that is not.
    pub fn end_of(&self, una: u64) -> u64 {
        self.gap_of(una).map_or(u64::MAX, |at| self.gaps[at].end)
    }

    /// All before `una` has been taken.
    pub fn pass(&mut self, una: u64) {
        while let Some(gap) = self.gaps.front_mut() {
            gap.first = gap.first.max(una);
            if gap.first < gap.end {
                break;
            }
            self.gaps.pop_front();
        }
    }

    /// Everything before `end` has been executed and answered. False if there is no room to remember
    /// what is missing of it.
    pub fn miss(&mut self, end: u64) -> bool {
        if end <= self.top {
            return true;
        }
        if self.gaps.len() >= GAPS_MAX {
            return false;
        }
        self.gaps.push_back(Gap {
            first: self.top,
            end,
            asked: None,
        });
        self.top = end;
        self.judge((end - 1, 0));
        true
    }

    /// Answer `seq` has come. Whether it is to be kept: not if it has been, nor if there is no room.
    pub fn arrive(&mut self, seq: u64) -> bool {
        if seq >= self.top {
            let has_room = self.miss(seq);
            self.judge((seq, 0));
            return has_room;
        }
        let Some(at) = self.gap_of(seq) else {
            return false;
        };
        if let Some(order) = self.gaps[at].asked {
            self.judge(order);
            if self.cut(at, seq) {
                // The answers to one request come in sequence.
                self.gaps[at].asked = None;
            }
        }
        true
    }

    /// Answer `seq`, which has just arrived, is kept.
    pub fn keep(&mut self, seq: u64) {
        if seq == self.top {
            self.top += 1;
        } else if let Some(at) = self.gap_of(seq) {
            let rest = at + usize::from(self.gaps[at].first < seq);
            if rest == at || self.cut(at, seq) {
                self.gaps[rest].first += 1;
            } else {
                self.gaps[at].end = seq; // no room: what lies behind is found missing later
                self.top = seq + 1;
                self.gaps.truncate(rest);
            }
            self.gaps.retain(|gap| gap.first < gap.end);
        }
    }

    /// Answer `una` was kept and is not any more.
    pub fn forget(&mut self, una: u64) {
        if self.has(una) {
            if self.gaps.len() >= GAPS_MAX {
                // Of the last gap and what has come behind it nothing is known any more.
                if let Some(last) = self.gaps.pop_back() {
                    self.top = last.first;
                }
            }
            self.gaps.push_front(Gap {
                first: una,
                end: una + 1,
                asked: None,
            });
        }
    }

    /// The oldest answers to be asked for, unless `max` repetitions are under way.
    pub fn first_lost(&self, max: usize) -> Option<(u64, u64)> {
        let under_way = self.gaps.iter().filter(|gap| gap.asked.is_some()).count();
        let lost = self.gaps.iter().find(|gap| gap.asked.is_none())?;
        (under_way < max).then_some((lost.first, lost.end))
    }

    /// Answers `seq` to `end`, the beginning of a gap, are asked for again; nothing from `high` on has
    /// been.
    pub fn note_asked(&mut self, seq: u64, end: u64, high: u64) {
        let Some(at) = self.gap_of(seq) else { return };
        if end < self.gaps[at].end {
            self.cut(at, end);
        }
        self.turn = self.turn.saturating_add(1);
        self.gaps[at].asked = Some((high.saturating_sub(1), self.turn));
    }

    /// Packets `seq` to `end`, the beginning of a gap, have no answer of their own.
    pub fn skip(&mut self, seq: u64, end: u64) {
        if let Some(at) = self.gap_of(seq) {
            let gap = &mut self.gaps[at];
            gap.first = end.min(gap.end);
            self.gaps.retain(|gap| gap.first < gap.end);
        }
    }

    fn gap_of(&self, seq: u64) -> Option<usize> {
        let at = self.gaps.partition_point(|gap| gap.end <= seq);
        self.gaps.get(at).filter(|gap| gap.first <= seq).map(|_| at)
    }

    /// Makes two of the gap, if it begins before `seq` and there is room. Whether it has.
    fn cut(&mut self, at: usize, seq: u64) -> bool {
        let gap = self.gaps[at];
        if gap.first >= seq || self.gaps.len() >= GAPS_MAX {
            return false;
        }
        self.gaps[at].end = seq;
        self.gaps.insert(at + 1, Gap { first: seq, ..gap });
        true
    }

    /// Something that was asked for at `order` has come: what was asked for again before that, and is
    /// missing still, is lost.
    fn judge(&mut self, order: Order) {
        for gap in &mut self.gaps {
            gap.asked = gap.asked.filter(|asked| *asked >= order);
        }
    }
}
