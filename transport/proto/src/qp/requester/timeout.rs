//! What a requester does when a timer is due, and how it goes back.

use super::super::Reports;
use super::super::timers::{Timer, TimerTable};
use super::super::work::Status;
use super::{Failure, RETRY_FOREVER, Requester};
use crate::time::Nanos;

/// A timeout noticed later than this part of its interval says more about us than about the peer.
const LATE: u64 = 4;

impl Requester {
    pub fn handle_timer(
        &mut self,
        now: Nanos,
        timer: Timer,
        late: Nanos,
        out: &mut Reports,
        timers: &mut TimerTable,
    ) -> Option<Failure> {
        let interval = Nanos::from_ib_exponent(self.attr.timeout);
        match timer {
            Timer::RnrWait => None,
            Timer::Probe => {
                if self.una < self.next {
                    self.probe_due = true;
                    self.round_trip.back_off();
                    timers.set(Timer::Probe, now + self.probe_after());
                }
                None
            }
            Timer::AckTimeout if late.0 > interval.0 / LATE && !self.is_excused => {
                // Not the peer was late but we, who were not given the processor: an answer may be
                // on its way to a socket that nobody has read.
                self.is_excused = true;
                self.probe_due = self.una < self.next;
                timers.set(Timer::AckTimeout, now + interval);
                None
            }
            Timer::AckTimeout => {
                self.is_excused = false;
                out.counters.ack_timeout += 1;
                if self.retries_left == 0 {
                    out.counters.retry_exceeded_err += 1;
                    return Some(Failure::of_packet(self.una, Status::RetryExceeded));
                }
                if self.attr.retry_cnt != RETRY_FOREVER {
                    self.retries_left -= 1;
                }
                self.round_trip.reset_backoff();
                out.counters.completer_retry_err += 1;
                self.go_back(timers);
                None
            }
        }
    }

    /// Send again from the oldest unacknowledged packet.
    pub(super) fn go_back(&mut self, timers: &mut TimerTable) {
        self.next = self.una;
        self.cursor = 0;
        self.reads_out = 0;
        self.since_ack_req = 0;
        self.timed = None;
        self.probed = None;
        self.probe_due = false;
        self.is_tracking = false;
        self.has_gaps = false;
        timers.stop(Timer::AckTimeout);
        timers.stop(Timer::Probe);
    }

    /// The same because of an answer: once per `una`, for each later answer says the same.
    pub(super) fn go_back_once(&mut self, out: &mut Reports, timers: &mut TimerTable) {
        if self.went_back_at != Some(self.una) {
            self.went_back_at = Some(self.una);
            out.counters.completer_retry_err += 1;
            self.go_back(timers);
        }
    }
}
