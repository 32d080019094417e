//! Whether an acknowledgement may wait for the next post.
//!
//! An acknowledgement that leaves by itself costs both ends a packet. A program that answers what it
//! receives posts soon after, and then both leave in one send. Whether it does is learnt: after
//! [`STREAK`] receives in a row that were followed by a post, what the next one earns waits for a
//! post too. It leaves no later than the next poll that finds nothing, the device's thread (which
//! looks once per tick), a program that goes to sleep, or the process's exit. If it was the thread, the
//! guess was wrong and cost the peer time; each such time it takes more posts in a row to guess again.

/// Receives that have to be followed by a post before the guess is made.
const STREAK: u32 = 4;
/// The same at most, after wrong guesses.
const STREAK_MAX: u32 = 1 << 16;
/// How much more it takes after a wrong guess.
const WRONG: u32 = 16;

/// What is known of a program's way to poll and post.
#[derive(Debug)]
pub(super) struct Habit {
    /// Receives in a row that were followed by a post.
    streak: u32,
    /// How many it takes.
    needed: u32,
    /// A poll has found a receive, and nothing was posted since.
    has_found: bool,
    /// Something waits to be sent.
    is_owing: bool,
}

impl Default for Habit {
    fn default() -> Habit {
        Habit {
            streak: 0,
            needed: STREAK,
            has_found: false,
            is_owing: false,
        }
    }
}

impl Habit {
    /// A program looks for completions again: what it had found earned no post.
    pub(super) fn note_empty_poll(&mut self) {
        if self.has_found {
            self.streak = 0;
        }
    }

    /// What such a look has brought. Whether sending may wait.
    pub(super) fn note_found(&mut self, has_found: bool) -> bool {
        self.has_found = has_found;
        self.is_owing = has_found && self.streak >= self.needed;
        self.is_owing
    }

    /// Something was posted to be sent, and leaves with what has waited.
    pub(super) fn note_post(&mut self) {
        if self.has_found {
            self.streak = self.streak.saturating_add(1);
            if self.is_owing {
                // A right guess: an earlier wrong one counts less.
                self.needed = (self.needed - self.needed / 16).max(STREAK);
            }
        }
        (self.has_found, self.is_owing) = (false, false);
    }

    /// The device's thread sends what has waited.
    pub(super) fn note_thread(&mut self) {
        if self.is_owing {
            self.needed = (self.needed * WRONG).min(STREAK_MAX);
            self.streak = 0;
        }
        self.is_owing = false;
    }

    /// The program will neither poll nor post for a while. Whether something waits to be sent.
    pub(super) fn note_idle(&mut self) -> bool {
        std::mem::take(&mut self.is_owing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A poll that finds something; whether its acknowledgement waits.
    fn find(habit: &mut Habit) -> bool {
        habit.note_empty_poll();
        habit.note_found(true)
    }

    #[test]
    fn who_answers_each_time_is_trusted_to_answer_again() {
        let mut habit = Habit::default();
        for _ in 0..STREAK {
            assert!(!find(&mut habit));
            habit.note_post();
        }
        assert!(find(&mut habit));
        // No post this time: it leaves with the poll that finds nothing.
        habit.note_empty_poll();
        assert!(!habit.note_found(false));
        assert!(!habit.note_idle(), "nothing waits any more");
        assert!(!find(&mut habit));
    }

    #[test]
    fn a_wrong_guess_is_not_repeated_soon() {
        let mut habit = Habit::default();
        let answers = |habit: &mut Habit| {
            (0..)
                .find(|_| {
                    let waits = find(habit);
                    if !waits {
                        habit.note_post();
                    }
                    waits
                })
                .unwrap()
        };
        let mut needed = STREAK;
        for _ in 0..3 {
            assert_eq!(answers(&mut habit), needed);
            habit.note_thread();
            needed = (needed * WRONG).min(STREAK_MAX);
        }
    }
}
