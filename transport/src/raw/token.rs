//! The device's token: who has it may touch the state.
//!
//! Posting and polling only try for it. Whoever finds it taken leaves its work in a line (`posts`),
//! and [`Token`]'s drop, which gives it back, looks whether somebody has. All other calls wait for it.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Instant;

use super::progress::{Shared, State};

/// How often a thread posts for others before it goes on with its own.
const ROUNDS_MAX: usize = 16;

/// The right to touch the state, until it is dropped.
pub(crate) struct Token<'a> {
    /// Given back before `_left` looks: fields are dropped in their order.
    state: MutexGuard<'a, State>,
    _left: Left<'a>,
}

/// What others have left meanwhile is done when this is dropped.
struct Left<'a>(&'a Shared);

impl Drop for Left<'_> {
    #[inline]
    fn drop(&mut self) {
        self.0.take_left();
    }
}

impl Deref for Token<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl DerefMut for Token<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

impl Shared {
    /// The token, when it is free.
    pub(crate) fn lock(&self) -> Token<'_> {
        // A panic under the lock is a bug that has been reported; the state is no worse than after
        // a lost packet.
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        Token {
            state,
            _left: Left(self),
        }
    }

    /// The token, if it is free.
    #[inline]
    pub(crate) fn try_lock(&self) -> Option<Token<'_>> {
        Some(Token {
            state: self.try_state()?,
            _left: Left(self),
        })
    }

    /// The token, for a poster: not if it is taken, unless the poster `waits`, and not if `clear` cannot
    /// empty the queue's line, because somebody is still writing there.
    #[inline]
    pub(super) fn lock_to_post(
        &self,
        waits: bool,
        clear: impl FnOnce(&mut State) -> bool,
    ) -> Option<Token<'_>> {
        let mut token = match waits {
            true => self.lock(),
            false => self.try_lock()?,
        };
        match clear(&mut token) {
            true => Some(token),
            false => None,
        }
    }

    #[inline]
    fn try_state(&self) -> Option<MutexGuard<'_, State>> {
        match self.state.try_lock() {
            Ok(state) => Some(state),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Says that there is work in the line of a queue, and sees that it is done.
    pub(super) fn leave(&self, queue: usize) {
        self.posts.note(queue);
        self.take_left();
    }

    /// Posts what was left in lines, unless somebody has the token and will: for whoever has left
    /// something, and for whoever has just given the token back.
    #[inline]
    pub(super) fn take_left(&self) {
        if self.posts.is_any() {
            self.take_what_is_left();
        }
    }

    #[cold]
    fn take_what_is_left(&self) {
        for _ in 0..ROUNDS_MAX {
            let Some(mut state) = self.try_state() else {
                return;
            };
            state.take_posts();
            self.send_posted(&mut state);
            drop(state);
            if !self.posts.is_any() {
                return;
            }
        }
        // Others post as fast as this thread can send for them; it has work of its own.
        let _ = self.wake();
    }

    /// Sleeps until `is_done`; false when `deadline` has passed.
    pub(crate) fn sleep_until(&self, deadline: Instant, is_done: impl Fn(&State) -> bool) -> bool {
        self.hand_over(&mut self.lock());
        loop {
            let state = self.lock();
            if is_done(&state) {
                return true;
            }
            let nap = self.sleepers.begin();
            drop(state);
            if !nap.sleep(deadline) {
                return is_done(&self.lock());
            }
        }
    }
}

/// Threads that sleep until something completes.
#[derive(Debug, Default)]
pub(super) struct Sleepers {
    count: AtomicU32,
    /// How often something has.
    turns: Mutex<u32>,
    woken: Condvar,
}

/// A sleep that has been announced.
struct Nap<'a> {
    sleepers: &'a Sleepers,
    turn: u32,
}

impl Sleepers {
    /// Announces a sleep. Under the token: what completes later ends it.
    fn begin(&self) -> Nap<'_> {
        // Relaxed: both sides have the token.
        self.count.fetch_add(1, Ordering::Relaxed);
        Nap {
            sleepers: self,
            turn: *self.turns(),
        }
    }

    fn turns(&self) -> MutexGuard<'_, u32> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes whoever sleeps. Under the token.
    #[inline]
    pub(super) fn notify(&self) {
        if self.count.load(Ordering::Relaxed) > 0 {
            self.wake_all();
        }
    }

    #[cold]
    fn wake_all(&self) {
        let mut turn = self.turns();
        *turn = turn.wrapping_add(1);
        self.woken.notify_all();
    }
}

impl Nap<'_> {
    /// False when `deadline` has passed.
    fn sleep(&self, deadline: Instant) -> bool {
        let mut turn = self.sleepers.turns();
        while *turn == self.turn {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.sleepers.woken.wait_timeout(turn, left);
            turn = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl Drop for Nap<'_> {
    fn drop(&mut self) {
        // Relaxed: at worst somebody wakes nobody.
        self.sleepers.count.fetch_sub(1, Ordering::Relaxed);
    }
}
