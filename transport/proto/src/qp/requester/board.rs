//! What a peer has, of what is under way to it, as its reports of gaps say; and what was lost.
//!
//! Every packet sent gets the next number in order of sending, a repetition a new one. Whatever was
//! sent before something that has arrived, and has not arrived itself, is lost: so a lost repetition
//! is found like any other, and several gaps in one round trip (RFC 8985 without its clock: a packet
//! that was overtaken is sent once too often).
//!
//! Invariants: `held` and `lost` are disjoint, and of packets that were sent; bit `n` of either is the
//! packet `base + n`; the peer has executed all before `base`.

/// Packets looked at from `base` on: as many as a report tells of. The peer keeps later ones too; of
/// them nothing is known yet, and they count as under way.
const SPAN: u64 = 64;
/// Packets from `base` on whose order of sending is remembered: the window.
const MEMORY: u64 = super::WINDOW as u64;
/// The number in order of sending of what was not sent as a packet of its own: a READ's later PSNs.
const NEVER: u64 = 0;
/// Answers to packets that had been acknowledged already, after which the board is wrong.
const NEEDLESS_MAX: u8 = 32;

/// See the [module](self).
#[derive(Clone, Debug)]
pub(super) struct Board {
    /// The packet that the peer expects, as far as we know.
    base: u64,
    /// The peer keeps it until what is missing before it has come.
    held: u64,
    /// It is to be sent again.
    lost: u64,
    /// When each was last sent, by sequence number modulo [`MEMORY`].
    order: [u64; MEMORY as usize],
    /// The number last given.
    sent: u64,
    /// The highest number of a packet that has arrived.
    newest: u64,
    /// From here on everything was sent once and in sequence.
    calm: u64,
    /// Answers since the last report to what need not have been sent again.
    needless: u8,
}

impl Board {
    /// For packets `base` to `next`, all sent once, in sequence; `is_packet` tells a READ request from
    /// the PSNs of its answer.
    pub fn new(base: u64, next: u64, is_packet: impl Fn(u64) -> bool) -> Self {
        let mut board = Self {
            base,
            held: 0,
            lost: 0,
            order: [NEVER; MEMORY as usize],
            sent: NEVER,
            newest: NEVER,
            calm: next,
            needless: 0,
        };
        for seq in (base..next.min(base + MEMORY)).filter(|seq| is_packet(*seq)) {
            board.note_sent(seq);
        }
        board
    }

    /// Whether all that it was needed for has arrived.
    pub const fn is_over(&self) -> bool {
        self.base >= self.calm
    }

    /// An answer tells nothing new: something was sent again that had arrived. True if that happens so
    /// often that the board has to go. When a packet arrives that was sent twice, it is taken for the later
    /// copy; if it is the earlier one, everything sent in between counts as lost, is sent twice too, and
    /// so on without end, though nothing is lost at all (RFC 8985 tells the copies apart by its clock, and
    /// learns from the same sign, there a DSACK).
    pub const fn note_needless(&mut self) -> bool {
        self.needless = self.needless.saturating_add(1);
        self.needless >= NEEDLESS_MAX
    }

    /// How many packets are neither under way nor acknowledged.
    pub const fn absent(&self) -> u32 {
        (self.held | self.lost).count_ones()
    }

    /// Whether a packet has arrived, or is lost; none if neither is known.
    pub fn fate(&self, seq: u64) -> Option<bool> {
        let bit = match seq.checked_sub(self.base) {
            None => return Some(true),
            Some(n) => 1u64.checked_shl(n as u32).unwrap_or(0),
        };
        match (self.held & bit != 0, self.lost & bit != 0) {
            (true, _) => Some(true),
            (_, true) => Some(false),
            _ => None,
        }
    }

    /// The oldest packet to be sent again.
    pub const fn first_lost(&self) -> Option<u64> {
        match self.lost {
            0 => None,
            lost => Some(self.base + lost.trailing_zeros() as u64),
        }
    }

    /// A packet was sent.
    pub fn note_sent(&mut self, seq: u64) {
        self.sent += 1;
        if (self.base..self.base + MEMORY).contains(&seq) {
            self.order[(seq % MEMORY) as usize] = self.sent;
        }
    }

    /// A packet was sent again; nothing from `next` on has been sent.
    pub fn note_repeated(&mut self, seq: u64, next: u64) {
        self.note_sent(seq);
        if let Some(n) = seq.checked_sub(self.base).filter(|n| *n < SPAN) {
            self.lost &= !(1 << n);
        }
        self.calm = next;
    }

    /// The peer has executed all before `end`. What it turns out to have been sent before that has
    /// not arrived is lost.
    pub fn acknowledge(&mut self, end: u64, next: u64) {
        self.pass(end);
        self.judge(next);
    }

    /// The peer has executed all before `end`; of the 63 after `end` it keeps those in `map`.
    pub fn report(&mut self, end: u64, map: u64, next: u64) {
        if end < self.base {
            return; // overtaken by a later one
        }
        self.needless = 0;
        self.pass(end);
        let sent = match next.saturating_sub(self.base) {
            SPAN.. => u64::MAX,
            n => (1 << n) - 1,
        };
        // What it has dropped again is found lost, for later packets have arrived.
        self.held = map << 1 & sent;
        self.lost &= !self.held;
        let mut left = self.held;
        while left != 0 {
            let seq = self.base + u64::from(left.trailing_zeros());
            self.newest = self.newest.max(self.order_of(seq));
            left &= left - 1;
        }
        self.judge(next);
    }

    fn pass(&mut self, end: u64) {
        let passed = end.saturating_sub(self.base);
        for seq in self.base..self.base + passed.min(MEMORY) {
            let order = core::mem::take(&mut self.order[(seq % MEMORY) as usize]);
            self.newest = self.newest.max(order);
        }
        let passed_bits = passed.min(SPAN) as u32;
        self.held = self.held.checked_shr(passed_bits).unwrap_or(0);
        self.lost = self.lost.checked_shr(passed_bits).unwrap_or(0);
        self.base += passed;
    }

    /// Finds what is lost among the packets before `next`.
    fn judge(&mut self, next: u64) {
        let before = self.lost;
        for n in 0..next.saturating_sub(self.base).min(SPAN) {
            let order = self.order_of(self.base + n);
            if order != NEVER && order < self.newest {
                self.lost |= 1 << n & !self.held;
            }
        }
        if self.lost != before {
            self.calm = next;
        }
    }

    const fn order_of(&self, seq: u64) -> u64 {
        self.order[(seq % MEMORY) as usize]
    }
}
