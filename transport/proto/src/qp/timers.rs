//! The timers of a queue pair: an enum and a table, and the round-trip estimate behind the probe.

use crate::time::Nanos;

/// The earliest a probe goes out after the last progress.
pub const PROBE_MIN: Nanos = Nanos::from_millis(1);
/// The same where packets are being lost, to a peer that reports gaps: there silence most often means
/// that one more was lost.
pub const PROBE_MIN_LOSSY: Nanos = Nanos::from_micros(100);
/// Round-trip time assumed before one was measured.
pub const RTT_INITIAL: Nanos = Nanos::from_millis(1);
/// The longest pause between two probes.
const PROBE_MAX: Nanos = Nanos::from_millis(1_000);
/// Doublings of the pause after which it stays as it is: from the shortest pause to the longest.
const BACKOFF_MAX: u8 = 14;
/// An answer so soon after a probe is the probe's: ends are not always given the processor at once.
const IN_TIME: Nanos = Nanos(PROBE_MIN.0 / 4);
/// So many probes answered in time and no packet timed: one after the other may have been needless.
const DOUBTFUL: u8 = 62;
/// When so many were answered, two of them in doubt, something is lost indeed, again and again.
const BELIEVED: u8 = 64;

/// What can fall due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Timer {
    /// Local ACK timeout: a retry is spent and everything unacknowledged is sent again.
    AckTimeout,
    /// The oldest unacknowledged packet is sent again, asking for an ACK; no retry is spent.
    Probe,
    /// The peer had no receive posted; until then nothing is sent.
    RnrWait,
}

impl Timer {
    const ALL: [Self; 3] = [Self::AckTimeout, Self::Probe, Self::RnrWait];
}

/// When a timer falls due that is not set.
const NEVER: Nanos = Nanos(u64::MAX);

/// When each timer falls due.
#[derive(Clone, Debug)]
pub(super) struct TimerTable {
    due: [Nanos; Timer::ALL.len()],
}

impl Default for TimerTable {
    fn default() -> Self {
        Self {
            due: [NEVER; Timer::ALL.len()],
        }
    }
}

impl TimerTable {
    #[inline]
    pub fn set(&mut self, timer: Timer, due: Nanos) {
        self.due[timer as usize] = due;
    }

    #[inline]
    pub fn stop(&mut self, timer: Timer) {
        self.due[timer as usize] = NEVER;
    }

    pub fn stop_all(&mut self) {
        self.due = [NEVER; Timer::ALL.len()];
    }

    #[inline]
    pub fn is_set(&self, timer: Timer) -> bool {
        self.due[timer as usize] != NEVER
    }

    /// The earliest due time.
    #[inline]
    pub fn next(&self) -> Option<Nanos> {
        let [a, b, c] = self.due;
        Some(a.min(b).min(c)).filter(|due| *due != NEVER)
    }

    /// Stop and return one timer that is due, and when it fell due.
    pub fn expire(&mut self, now: Nanos) -> Option<(Timer, Nanos)> {
        Timer::ALL.into_iter().find_map(|timer| {
            let due = self.due[timer as usize];
            let is_due = self.is_set(timer) && due <= now;
            is_due.then(|| {
                self.stop(timer);
                (timer, due)
            })
        })
    }
}

/// Smoothed round-trip time as TCP computes it (RFC 6298), and the probe's back-off.
///
/// A packet that a probe repeated is not timed: which of the two was answered nobody knows (Karn and
/// Partridge 1987). So on a path that has become slow, where the probe comes before every answer, the
/// new time would never be learnt. Hence their second rule: the back-off stays until a packet is timed.
/// Under loss, where few are, that would mean to wait longer and longer; so it holds only where the answer
/// came later after the probe than one to the probe would, as far as the time is known (RFC 3522 tells
/// by a time stamp, which we do not have). Where it only seems to be the probe's, their number tells.
#[derive(Clone, Debug)]
pub(super) struct RoundTrip {
    smoothed: Nanos,
    variation: Nanos,
    measured: bool,
    backoff: u8,
    /// Probes answered since a packet was timed; from [`DOUBTFUL`] on the time may have changed.
    unsure: u8,
}

impl RoundTrip {
    pub const fn new() -> Self {
        Self {
            smoothed: RTT_INITIAL,
            variation: Nanos(RTT_INITIAL.0 / 2),
            measured: false,
            backoff: 0,
            unsure: 0,
        }
    }

    /// A packet that was sent once was acknowledged so long after.
    #[inline]
    pub fn sample(&mut self, rtt: Nanos) {
        (self.backoff, self.unsure) = (0, 0);
        if self.measured {
            let error = rtt.0.abs_diff(self.smoothed.0);
            self.variation = Nanos(self.variation.0 - self.variation.0 / 4 + error / 4);
            self.smoothed = Nanos(self.smoothed.0 - self.smoothed.0 / 8 + rtt.0 / 8);
        } else {
            (self.smoothed, self.variation, self.measured) = (rtt, Nanos(rtt.0 / 2), true);
        }
    }

    /// Something was acknowledged: probe early again, unless the round-trip time is in doubt. `probed`
    /// is how long ago that was sent again by a probe.
    #[inline]
    pub fn acknowledged(&mut self, probed: Option<Nanos>) {
        if let Some(probed) = probed {
            self.unsure = match probed.0 <= self.limit().max(IN_TIME.0) {
                true => (self.unsure + 1) % BELIEVED,
                false => DOUBTFUL,
            };
        }
        if self.unsure < DOUBTFUL {
            self.backoff = 0;
        }
    }

    /// A retry begins: probe early again.
    pub fn reset_backoff(&mut self) {
        (self.backoff, self.unsure) = (0, 0);
    }

    pub fn back_off(&mut self) {
        self.backoff = (self.backoff + 1).min(BACKOFF_MAX);
    }

    /// How long after the last progress the next probe goes out.
    #[inline]
    pub fn probe_after(&self, is_lossy: bool) -> Nanos {
        let min = if is_lossy { PROBE_MIN_LOSSY } else { PROBE_MIN };
        let base = self.limit().max(min.0);
        Nanos((base << self.backoff).min(PROBE_MAX.0))
    }

    /// Hardly any answer takes longer.
    const fn limit(&self) -> u64 {
        self.smoothed.0 + 4 * self.variation.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_earliest_timer_is_next_and_each_expires_once() {
        let mut table = TimerTable::default();
        assert_eq!(table.next(), None);
        table.set(Timer::AckTimeout, Nanos(30));
        table.set(Timer::Probe, Nanos(10));
        table.set(Timer::RnrWait, Nanos(20));
        assert_eq!(table.next(), Some(Nanos(10)));
        assert_eq!(table.expire(Nanos(9)), None);
        assert_eq!(table.expire(Nanos(12)), Some((Timer::Probe, Nanos(10))));
        assert_eq!(table.expire(Nanos(12)), None);
        assert_eq!(table.next(), Some(Nanos(20)));
        table.stop_all();
        assert_eq!(table.expire(Nanos(99)), None);
    }

    #[test]
    fn an_answer_that_is_not_the_probes_keeps_the_pause_until_a_packet_is_timed() {
        let fast = Nanos::from_micros(20);
        let mut rtt = RoundTrip::new();
        for _ in 0..50 {
            rtt.sample(fast);
        }
        let mut answered = |probed| {
            rtt.back_off();
            rtt.acknowledged(Some(probed));
            rtt.acknowledged(None);
            rtt.probe_after(false).0 / PROBE_MIN.0
        };
        assert_eq!(answered(fast), 1);
        assert_eq!(answered(Nanos::from_millis(2)), 2);
        // One that may be the probe's does not yet prove that it is; the second does.
        assert_eq!([answered(fast), answered(fast)], [4, 1]);
        assert_eq!(answered(Nanos::from_millis(2)), 2);
        rtt.sample(fast);
        assert_eq!(rtt.probe_after(false), PROBE_MIN);
    }

    #[test]
    fn probes_back_off_between_their_bounds() {
        let mut rtt = RoundTrip::new();
        for _ in 0..50 {
            rtt.sample(Nanos::from_micros(20));
        }
        assert_eq!(rtt.probe_after(false), PROBE_MIN);
        assert_eq!(rtt.probe_after(true), PROBE_MIN_LOSSY);
        rtt.back_off();
        assert_eq!(rtt.probe_after(false), Nanos(2 * PROBE_MIN.0));
        for _ in 0..100 {
            rtt.back_off();
        }
        assert_eq!(rtt.probe_after(false), PROBE_MAX);
        rtt.reset_backoff();
        for _ in 0..50 {
            rtt.sample(Nanos::from_millis(8));
        }
        assert!(rtt.probe_after(false) > Nanos::from_millis(8));
        rtt.sample(Nanos(u64::MAX / 8));
        assert_eq!(rtt.probe_after(false), PROBE_MAX);
    }
}
