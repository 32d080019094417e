//! Seeded faults that the simulator must find, each within a stated number of seeds (`ci/teeth`).
//!
//! Owns: the list, and the choice of one at run time in builds with the feature `teeth`; in all
//! others every question is constantly `false`, so production code carries no switch. Names in
//! brackets are those of the table of naive minima (N) and of the verification plan (K).

/// A seeded fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(feature = "teeth"), allow(dead_code))]
#[repr(u8)]
pub enum Tooth {
    /// E1 assigns instead of taking the larger (K1).
    EpochAssigned = 1,
    /// A resend is stamped with the current epoch (K2).
    ResendRetagged,
    /// A client without unfinished work reports no bound (N1).
    IdleIsUnbounded,
    /// A client takes an operation for finished when the next tier has executed it (N2).
    FinishedOnReply,
    /// The root does not hold a member that it has admitted until it reports (N4, K5).
    JoinerNotHeld,
    /// A member is let go by the root before its aggregator's report covers it (N5).
    DetachedFirst,
    /// An evicted life does not bound the minimum any more (N6).
    EvictedNotHeld,
    /// A home resolves without refusing the life (N7).
    NotFenced,
    /// A node that starts again keeps its incarnation (N8).
    SameIncarnation,
    /// A root that returns does not count whom an aggregator reports under an attachment that it does
    /// not know (b.3 rule 9).
    AttachmentsForgotten,
    /// A child that a report does not list any more is not held (N9).
    UnlistedNotHeld,
    /// The root publishes m before it is durable (N11).
    PublishedEarly,
    /// A home purges undo records below an m that it has not made durable (N11, K8).
    PurgedEarly,
    /// A home's epoch starts at 0 after a restart (N12).
    EpochReset,
    /// A client yields a lock before what it stamped under it is everywhere committed (N13).
    UnlockOvertakes,
    /// The resolver keeps operations after one that cannot be completed (N14).
    GapCompleted,
    /// Undo runs from the oldest operation on.
    UndoneForward,
    /// A home forgets the position of a stream that is announced again.
    PositionForgotten,
    /// A full home refuses stamped operations.
    StampedRefused,
    /// A home lets new work in although it has no room.
    Overgrants,
    /// A client stamps without its locks.
    StampedUnlocked,
    /// A home releases the locks of a life when it is fenced (I25).
    ReleasedAtFence,
    /// A source discards a window when its own home has committed it (K7, seed 000).
    DiscardedOnOwnCommit,
    /// A home says committed when it has executed (K9).
    CommittedEarly,
    /// A dead proxy's locks go without asking its clients.
    NotDrained,
    /// A grant that was not told yet outlives the session (seed 1001217).
    StaleGrantTold,
    /// A proxy under memory pressure discards what is committed at its own home only.
    PressedDiscardsAll,
    /// Requests are served, and locks given back, whatever the ages (seed 2147383).
    AgeIgnored,
    /// The root's epoch goes on although nobody waits for m.
    NeverRests,
    /// A connection to a process that died before it spoke is not asked when the view names another.
    SilentEndIgnored,
    /// A connection to a root that died is kept although a newer term was heard.
    ReturnedRootUnnoticed,
    /// What a root says is heard although its term is older than another that was heard (N10).
    OldRootHeard,
    /// What a home says of streams may overtake what it said before.
    ProgressUrgent,
    /// A home tells the root how far its history goes before that is durable.
    CommitToldEarly,
    /// The root lets a home in whatever its storage is.
    AnyStorageAdmitted,
    /// A home answers before it was let in.
    AnswersUnjoined,
}

impl Tooth {
    /// All of them.
    #[cfg(feature = "teeth")]
    pub const ALL: &[Tooth] = &[
        Tooth::EpochAssigned,
        Tooth::ResendRetagged,
        Tooth::IdleIsUnbounded,
        Tooth::FinishedOnReply,
        Tooth::JoinerNotHeld,
        Tooth::DetachedFirst,
        Tooth::EvictedNotHeld,
        Tooth::NotFenced,
        Tooth::SameIncarnation,
        Tooth::AttachmentsForgotten,
        Tooth::UnlistedNotHeld,
        Tooth::PublishedEarly,
        Tooth::PurgedEarly,
        Tooth::EpochReset,
        Tooth::UnlockOvertakes,
        Tooth::GapCompleted,
        Tooth::UndoneForward,
        Tooth::PositionForgotten,
        Tooth::StampedRefused,
        Tooth::Overgrants,
        Tooth::StampedUnlocked,
        Tooth::ReleasedAtFence,
        Tooth::DiscardedOnOwnCommit,
        Tooth::CommittedEarly,
        Tooth::NotDrained,
        Tooth::StaleGrantTold,
        Tooth::PressedDiscardsAll,
        Tooth::AgeIgnored,
        Tooth::NeverRests,
        Tooth::SilentEndIgnored,
        Tooth::ReturnedRootUnnoticed,
        Tooth::OldRootHeard,
        Tooth::ProgressUrgent,
        Tooth::CommitToldEarly,
        Tooth::AnyStorageAdmitted,
        Tooth::AnswersUnjoined,
    ];
}

#[cfg(feature = "teeth")]
mod chosen {
    use core::sync::atomic::{AtomicU8, Ordering};

    use super::Tooth;

    static CHOSEN: AtomicU8 = AtomicU8::new(0);

    /// Lets one fault bite from now on. Call it before any state machine runs.
    pub fn choose(tooth: Tooth) {
        // Only the number matters, no other memory hangs on it.
        CHOSEN.store(tooth as u8, Ordering::Relaxed);
    }

    /// Whether this fault bites.
    #[must_use]
    pub fn bites(tooth: Tooth) -> bool {
        CHOSEN.load(Ordering::Relaxed) == tooth as u8
    }
}

#[cfg(feature = "teeth")]
pub use chosen::{bites, choose};

/// No fault bites in a build without the feature.
#[cfg(not(feature = "teeth"))]
#[must_use]
pub const fn bites(_: Tooth) -> bool {
    false
}
