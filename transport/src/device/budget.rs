//! How many datagrams may be under way to one peer host.
//!
//! Owns: one window per peer. All queue pairs to a peer share its socket's receive buffer, and a
//! descheduled peer reads nothing, so a window per queue pair would overflow it and go-back-N would
//! send everything again.
//!
//! Rules: the window starts at what the peer says its buffer holds, or [`UNKNOWN_PEER`]; what is sent
//! again shrinks it to seven tenths (as TCP's CUBIC, RFC 9438: most losses are no congestion), a
//! congestion notification (CNP) to a half, at most once per [`EVENT`]; each round trip (a window's
//! worth of acknowledgements) adds one, up to what the peer said, or [`WINDOW_MAX`].
//!
//! Deliberately absent: rates.

use lowtide_transport_proto::time::Nanos;

/// Datagrams granted to a peer that has told nothing: less than what the default SO_RCVBUF holds.
const UNKNOWN_PEER: u32 = 16;
/// The window to a peer that has told nothing never grows beyond this.
const WINDOW_MAX: u32 = 1024;
/// The window never falls below this; queue pairs probe with single packets anyway.
const WINDOW_MIN: u32 = 4;
/// Two losses within this time are one event.
const EVENT: Nanos = Nanos::from_millis(1);

/// The window to one peer.
#[derive(Debug)]
pub(crate) struct Budget {
    window: u32,
    window_max: u32,
    in_flight: u32,
    /// Acknowledged since the window last grew.
    acknowledged: u32,
    last_cut: Option<Nanos>,
}

impl Default for Budget {
    fn default() -> Self {
        Budget {
            window: UNKNOWN_PEER,
            window_max: WINDOW_MAX,
            in_flight: 0,
            acknowledged: 0,
            last_cut: None,
        }
    }
}

impl Budget {
    /// The peer has said how many full datagrams its receive buffer holds.
    pub(crate) fn learn(&mut self, datagrams: u32) {
        self.window_max = datagrams.clamp(WINDOW_MIN, 1 << 16);
        self.window = self.window_max;
    }

    /// The way to the peer is another one, of which nothing is known.
    pub(crate) fn forget(&mut self) {
        self.window_max = WINDOW_MAX;
        self.window = UNKNOWN_PEER;
    }

    /// Datagrams that may still go out.
    pub(crate) fn room(&self) -> u32 {
        self.window.saturating_sub(self.in_flight)
    }

    /// A queue pair's count of unacknowledged packets went from `before` to `after`.
    pub(crate) fn update(&mut self, before: u32, after: u32) {
        self.in_flight = self.in_flight + after - before;
        if after < before {
            self.acknowledged += before - after;
            if self.acknowledged >= self.window {
                self.acknowledged = 0;
                self.window = (self.window + 1).min(self.window_max);
            }
        }
    }

    /// Packets were lost.
    pub(crate) fn note_loss(&mut self, now: Nanos) {
        self.shrink(now, 7);
    }

    /// Some switch on the way is about to lose packets.
    pub(crate) fn note_congestion(&mut self, now: Nanos) {
        self.shrink(now, 5);
    }

    fn shrink(&mut self, now: Nanos, tenths: u32) {
        if self.last_cut.is_some_and(|last| now.since(last) < EVENT) {
            return;
        }
        self.last_cut = Some(now);
        self.acknowledged = 0;
        self.window = (self.window * tenths / 10).max(WINDOW_MIN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forgotten_peer_begins_anew_and_grows() {
        let mut budget = Budget::default();
        budget.learn(4);
        budget.update(0, 3);
        budget.forget();
        assert_eq!(budget.room(), UNKNOWN_PEER - 3);
        for _ in 0..10_000 {
            budget.update(3, 13);
            budget.update(13, 3);
        }
        assert!(budget.room() > 2 * UNKNOWN_PEER);
    }

    #[test]
    fn the_window_shrinks_once_per_event_and_grows_by_one_per_round_trip() {
        let mut budget = Budget::default();
        budget.learn(100);
        assert_eq!(budget.room(), 100);
        budget.update(0, 60);
        assert_eq!(budget.room(), 40);
        let at = Nanos::from_millis(10);
        budget.note_congestion(at);
        budget.note_loss(at);
        assert_eq!(budget.room(), 0);
        budget.update(60, 0);
        assert_eq!(
            budget.room(),
            51,
            "sixty acknowledgements are one round trip of fifty"
        );
        for _ in 0..10_000 {
            budget.update(0, 10);
            budget.update(10, 0);
        }
        assert_eq!(
            budget.room(),
            100,
            "and no further than what the peer can hold"
        );
        budget.note_loss(Nanos::from_millis(20));
        assert_eq!(budget.room(), 70);
        for ms in 21..40 {
            budget.note_loss(Nanos::from_millis(ms));
        }
        assert_eq!(budget.room(), WINDOW_MIN);
    }
}
