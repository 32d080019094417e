//! Time as the state machines see it: nanoseconds since an origin the caller chooses.
//!
//! Absent: a clock. The caller promises only that successive `now` arguments do not go backwards.

use core::fmt;
use core::ops::{Add, Sub};

/// A point in time or a span, in nanoseconds. 64 bits last 584 years.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nanos(pub u64);

impl Nanos {
    /// The origin, or an empty span.
    pub const ZERO: Self = Self(0);

    /// A span of `n` microseconds.
    #[must_use]
    pub const fn from_micros(n: u64) -> Self {
        Self(n * 1_000)
    }

    /// A span of `n` milliseconds.
    #[must_use]
    pub const fn from_millis(n: u64) -> Self {
        Self(n * 1_000_000)
    }

    /// `self - earlier`, or zero where `earlier` is later.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Self {
        Self(self.0.saturating_sub(earlier.0))
    }

    /// Four point zero nine six microseconds times two to the `exponent`: how InfiniBand writes
    /// timeouts (local ACK timeout, CM response timeout). `exponent` is a 5-bit field.
    #[must_use]
    pub const fn from_ib_exponent(exponent: u8) -> Self {
        Self(4_096 << (exponent & 0x1f))
    }
}

impl Add for Nanos {
    type Output = Self;
    fn add(self, rhs: Self) -> Self {
        Self(self.0.saturating_add(rhs.0))
    }
}

impl Sub for Nanos {
    type Output = Self;
    fn sub(self, rhs: Self) -> Self {
        self.since(rhs)
    }
}

impl fmt::Debug for Nanos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ns", self.0)
    }
}
