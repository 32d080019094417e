//! Sets of flags; the bits are those of `<infiniband/verbs.h>`.

use std::fmt;

macro_rules! flags {
    ($(#[$doc:meta])* $name:ident { $($(#[$flag_doc:meta])* $flag:ident = $value:expr;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Default, Hash)]
        pub struct $name(u32);

        impl $name {
            /// None.
            pub const NONE: Self = Self(0);
            $($(#[$flag_doc])* pub const $flag: Self = Self($value);)*

            /// The flags with these bits, whatever they are.
            pub const fn from_bits(bits: u32) -> Self {
                Self(bits)
            }

            /// The bits.
            pub const fn bits(self) -> u32 {
                self.0
            }

            /// Whether all of `other` are set.
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// Whether any of `other` is set.
            pub const fn intersects(self, other: Self) -> bool {
                self.0 & other.0 != 0
            }

            /// Whether none is set.
            pub const fn is_empty(self) -> bool {
                self.0 == 0
            }

            /// Both.
            pub const fn with(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }

            /// Those of `self` that are not in `other`.
            pub const fn without(self, other: Self) -> Self {
                Self(self.0 & !other.0)
            }
        }

        impl std::ops::BitOr for $name {
            type Output = Self;

            fn bitor(self, other: Self) -> Self {
                self.with(other)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let mut set = f.debug_set();
                let mut rest = self.0;
                $(if $value != 0 && self.0 & $value == $value {
                    set.entry(&format_args!(stringify!($flag)));
                    rest &= !$value;
                })*
                if rest != 0 {
                    set.entry(&format_args!("{rest:#x}"));
                }
                set.finish()
            }
        }
    };
}

flags! {
    /// Rights of a region or window, or what the peer of a queue pair may do; and how addresses
    /// count. Without any flag memory may be read by its owner.
    AccessFlags {
        /// Receives, READ answers and atomics' old values may be placed here.
        LOCAL_WRITE = 1;
        /// WRITE and ATOMIC WRITE; needs `LOCAL_WRITE`.
        REMOTE_WRITE = 1 << 1;
        /// READ.
        REMOTE_READ = 1 << 2;
        /// Atomics; needs `LOCAL_WRITE`.
        REMOTE_ATOMIC = 1 << 3;
        /// Memory windows may be bound here.
        MW_BIND = 1 << 4;
        /// Peers' addresses count from 0, not from the address of the first byte.
        ZERO_BASED = 1 << 5;
        /// Pages need not be there yet.
        ON_DEMAND = 1 << 6;
        /// The memory is of huge pages.
        HUGETLB = 1 << 7;
        /// FLUSH for visibility.
        FLUSH_GLOBAL = 1 << 8;
        /// FLUSH for persistence.
        FLUSH_PERSISTENT = 1 << 9;
        /// Writes need not be seen in order. A device may ignore it.
        RELAXED_ORDERING = 1 << 20;
    }
}

flags! {
    /// How a send work request is to be treated.
    SendFlags {
        /// Start only when all READs and atomics before it have finished.
        FENCE = 1;
        /// Report success too; failures and flushes always are.
        SIGNALED = 1 << 1;
        /// The peer's completion is a solicited one.
        SOLICITED = 1 << 2;
        /// The payload is taken when posting; its lkey is not looked at.
        INLINE = 1 << 3;
    }
}

flags! {
    /// What a work completion carries.
    WcFlags {
        /// The first 40 bytes of the receive are an IP header.
        GRH = 1;
        /// There is immediate data.
        WITH_IMM = 1 << 1;
        /// A key of ours was invalidated.
        WITH_INV = 1 << 3;
    }
}

flags! {
    /// Which fields of a [`QpAttr`](super::QpAttr) are meant.
    QpAttrMask {
        /// `state`.
        STATE = 1;
        /// `current_state`: fail if the queue pair is in another.
        CURRENT_STATE = 1 << 1;
        /// Report when the send queue has drained.
        SQD_NOTIFY = 1 << 2;
        /// `access`.
        ACCESS = 1 << 3;
        /// `pkey_index`.
        PKEY_INDEX = 1 << 4;
        /// `port`.
        PORT = 1 << 5;
        /// `qkey`.
        QKEY = 1 << 6;
        /// `address`.
        ADDRESS = 1 << 7;
        /// `path_mtu`.
        PATH_MTU = 1 << 8;
        /// `timeout`.
        TIMEOUT = 1 << 9;
        /// `retry_cnt`.
        RETRY_CNT = 1 << 10;
        /// `rnr_retry`.
        RNR_RETRY = 1 << 11;
        /// `rq_psn`.
        RQ_PSN = 1 << 12;
        /// `max_rd_atomic`.
        MAX_RD_ATOMIC = 1 << 13;
        /// The alternate path; no provider here has one.
        ALT_PATH = 1 << 14;
        /// `min_rnr_timer`.
        MIN_RNR_TIMER = 1 << 15;
        /// `sq_psn`.
        SQ_PSN = 1 << 16;
        /// `max_dest_rd_atomic`.
        MAX_DEST_RD_ATOMIC = 1 << 17;
        /// The path migration state; no provider here has one.
        PATH_MIG_STATE = 1 << 18;
        /// `cap`; no provider here changes it.
        CAP = 1 << 19;
        /// `dest`.
        DEST_QPN = 1 << 20;
    }
}
