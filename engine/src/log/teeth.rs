//! Seeded faults that the crash and error tests must find.
//!
//! Owns: the list, and the choice of one at run time by the environment variable `LOWTIDE_TOOTH`,
//! in builds with the feature `teeth` only; in all others every question is constantly `false`.
//! A test run with a tooth must fail; one without must pass.

/// A seeded fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tooth {
    /// A group is reported before the shards' logs are synced (found by `commit_crash`,
    /// `store_crash`).
    NoticeBeforeDurable,
    /// The scan goes on after a gap (found by `log_crash`, `hostile_files`).
    ScanAfterGap,
    /// Generations are not checked (found by `log_crash`).
    AnyGeneration,
    /// Positions are not checked: an earlier use of a segment is believed (found by `log_crash`,
    /// `hostile_files`).
    AnyPosition,
    /// A failed sync is tried again and does not poison (found by `io_errors`).
    RetrySync,
    /// Groups that were not durable everywhere are kept by a restart (found by `commit_crash`).
    NothingVoid,
    /// A segment is used before its new header is durable (found by `log_crash`).
    HeaderNotSynced,
    /// Every claim is written over the one before it (found by `commit_crash`).
    OneClaimSlot,
    /// A claim is written to room that is durable already (found by `commit_crash`).
    StaleRoom,
}

#[cfg(feature = "teeth")]
pub(crate) fn bites(tooth: Tooth) -> bool {
    use std::sync::OnceLock;
    static CHOSEN: OnceLock<Option<String>> = OnceLock::new();
    let chosen = CHOSEN.get_or_init(|| std::env::var("LOWTIDE_TOOTH").ok());
    chosen
        .as_ref()
        .is_some_and(|name| *name == format!("{tooth:?}"))
}

#[cfg(not(feature = "teeth"))]
pub(crate) const fn bites(_: Tooth) -> bool {
    false
}
