//! Rare situations that a run must reach for its silence to mean anything.

macro_rules! probes {
    ($( $(#[$doc:meta])* $name:ident ),* $(,)?) => {
        /// A situation worth counting.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(missing_docs)]
        pub enum Probe {
            $( $(#[$doc])* $name ),*
        }

        impl Probe {
            /// All of them.
            pub const ALL: &[Probe] = &[ $( Probe::$name ),* ];

            /// Name for reports.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $( Probe::$name => stringify!($name) ),* }
            }
        }
    };
}

probes! {
    CompletedBySupply,
    UndoneAtEviction,
    DroppedUnseen,
    SurvivedItsClient,
    ProxyDiedWithUnmergedAcknowledged,
    ProxiesFoughtForALock,
    HomeCrashedWithUncommitted,
    CrashKeptUnsyncedRecords,
    ReclaimAfterRestart,
    ProxyBypassed,
    CompletedAtRestartedHome,
    CoordinatorDiedInPinRound,
    ProxyOriginated,
    WindowsHeldMany,
    PartsReplayed,
    HomeCrashedWhileReconnecting,
    RootCrashedWhileFencing,
    RootCrashedWhileResolving,
    RootCrashedWhileDraining,
    RootCrashedWhileReleasing,
    ZombieEvicted,
    ClientReturnedAsNewLife,
    ProxyReturnedAsNewLife,
    ClientParted,
    CheckLostRace,
    RefusedFull,
    Recycled,
    RestartFromCheckpoint,
    UndoPurged,
    RedoPressed,
    BulkWritten,
    CoveredByAggregator,
    AggregatorRestarted,
    TwoNodesDownAtOnce,
    FencedPartRefused,
    DuplicateAtHome,
    LockYielded,
    PausedAndNotEvicted,
    SupplierProxyDied,
    /// An operation wrote objects of several shards of one home.
    ExecutedBySeveralShards,
    /// One of them was undone.
    UndoneBySeveralShards,
    /// A home restarted with another number of shards.
    ShardsChanged,
    /// Undo used a record from before such a change.
    UndoneAcrossShardsChange,
    /// A crash found an operation executed by some of its shards.
    CrashSplitShards,
    WindowsDiscardedEarly,
    /// A home with a small disk had no room.
    RoomRanOut,
    /// It refused a lock for that, and granted it when there was room again.
    GrantedAfterRoomCameBack,
    /// A view told a node that the peer of an idle connection had been replaced.
    SilentEndFoundByView,
    /// So it was after the peer had died before it joined.
    EndBeforeJoinFoundByView,
    /// A client or proxy that was heard was evicted for holding m back while a log was full.
    HolderEvicted,
    /// A home was recovered twice from one disk, once with a crash on the way.
    RecoveredTwice,
    /// A ping, a report or an answer arrived before what had been sent before it.
    UrgentOvertook,
    /// A node refused what a root said that had been replaced.
    OldRootRefused,
    /// A home came back on an empty disk and was not let in.
    WipedHomeRejected,
    /// So on an old copy of its own.
    OldCopyRejected,
    IdleEpochsWatched,
    RestWatched,
}

/// How often each situation occurred.
#[derive(Clone, Debug)]
pub struct Probes {
    counts: Vec<u64>,
}

impl Default for Probes {
    fn default() -> Probes {
        Probes {
            counts: vec![0; Probe::ALL.len()],
        }
    }
}

impl Probes {
    /// Counts an occurrence.
    pub fn hit(&mut self, probe: Probe) {
        self.counts[probe as usize] += 1;
    }

    /// Counts an occurrence if `is`.
    pub fn hit_if(&mut self, probe: Probe, is: bool) {
        self.counts[probe as usize] += u64::from(is);
    }

    /// How often.
    #[must_use]
    pub fn count(&self, probe: Probe) -> u64 {
        self.counts[probe as usize]
    }

    /// Adds another run's counts.
    pub fn merge(&mut self, other: &Probes) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
    }
}
