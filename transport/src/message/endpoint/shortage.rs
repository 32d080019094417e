//! Memory that a device would not register.
//!
//! Owns: who waits for such memory, and for how long. The usual want of room, a bound of our own,
//! ends by itself when a message is taken. What a device refuses (the limit for locked memory, its table
//! of regions) may be there later without any event of ours, so it is tried again from time to time.
//! Where nothing of ours is out that could come back, waiting has an end, and the connection with
//! it.

use lowtide_transport_proto::time::Nanos;

use super::super::CloseReason;
use super::{EndpointCtx, Handler};

/// Between two tries.
const PAUSE: Nanos = Nanos::from_millis(20);
/// How long nothing could be registered, with nothing left to wait for.
pub(super) const SHORTAGE_MAX: Nanos = Nanos::from_millis(5_000);

/// What a connection needs memory for.
#[derive(Clone, Copy)]
pub(super) enum Need {
    /// A message of the caller's.
    Send,
    /// The word that credits are back, or that a message has been taken.
    Credit,
    /// A message that the peer offers.
    Fetch,
}

/// Since when a connection was refused memory for each of its needs.
#[derive(Debug, Default)]
pub(super) struct Short([Option<Nanos>; 3]);

impl Short {
    fn is_any(&self) -> bool {
        self.0.iter().any(Option::is_some)
    }
}

impl EndpointCtx {
    /// Memory for a connection's need was refused, or was there.
    pub(super) fn note_memory(&mut self, index: u32, need: Need, is_refused: bool) {
        if !is_refused && self.next_retry.is_none() {
            // Nobody is short of anything, as ever.
            return;
        }
        let Some(connection) = &mut self.connections[index as usize] else {
            return;
        };
        let since = &mut connection.short.0[need as usize];
        match (is_refused, *since) {
            (false, None) => {}
            (false, Some(_)) => *since = None,
            (true, _) => {
                let now = self.device.now();
                since.get_or_insert(now);
                self.next_retry.get_or_insert(now + PAUSE);
            }
        }
    }

    /// Lets those try again who were refused, and ends connections that have waited for too long.
    pub(super) fn retry_registrations(&mut self, now: Nanos, handler: &mut Handler<'_>) {
        if self.next_retry.is_none_or(|due| now < due) {
            return;
        }
        self.next_retry = None;
        let may_come_back =
            self.pool.is_any_out() || self.lending.is_any_lent() || self.fetching.is_any_filled();
        self.fetching.retry();
        for index in 0..self.connections.len() as u32 {
            let Some(connection) = &mut self.connections[index as usize] else {
                continue;
            };
            if !connection.short.is_any() {
                continue;
            }
            let mut is_over = false;
            for since in connection.short.0.iter_mut().flatten() {
                match may_come_back {
                    true => *since = now,
                    false => is_over |= now.since(*since) >= self.shortage_max,
                }
            }
            self.next_retry = Some(now + PAUSE);
            if is_over {
                self.end(index, CloseReason::NoMemory, handler);
                continue;
            }
            self.mark_dirty(index);
            self.offer_room(index, handler);
        }
    }
}

#[cfg(test)]
mod tests;
