//! Numbers of the wire that must not be mixed: packet sequence numbers, queue pair numbers, MTUs.

use core::fmt;

/// A packet sequence number: 24 bits, compared by serial arithmetic (window 2^23).
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Psn(u32);

impl Psn {
    /// Bits in use.
    pub const MASK: u32 = 0x00ff_ffff;

    /// The low 24 bits of `value`.
    #[must_use]
    pub const fn new(value: u32) -> Self {
        Self(value & Self::MASK)
    }

    /// The number, below 2^24.
    #[must_use]
    pub const fn value(self) -> u32 {
        self.0
    }

    /// `self + n` modulo 2^24.
    #[must_use]
    pub const fn plus(self, n: u32) -> Self {
        Self::new(self.0.wrapping_add(n))
    }

    /// `self - n` modulo 2^24.
    #[must_use]
    pub const fn minus(self, n: u32) -> Self {
        Self::new(self.0.wrapping_sub(n))
    }

    /// How far `self` lies ahead of `origin`: negative if behind, -2^23 to 2^23 - 1.
    #[must_use]
    pub const fn ahead_of(self, origin: Self) -> i32 {
        (self.0.wrapping_sub(origin.0) << 8).cast_signed() >> 8
    }

    /// How far `self` lies ahead of `origin` going upwards only: 0 to 2^24 - 1.
    #[must_use]
    pub const fn offset_from(self, origin: Self) -> u32 {
        self.0.wrapping_sub(origin.0) & Self::MASK
    }
}

impl fmt::Debug for Psn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "psn {:#08x}", self.0)
    }
}

/// A queue pair number: 24 bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Hash)]
pub struct Qpn(u32);

impl Qpn {
    /// The general services interface, where connection managers talk.
    pub const GSI: Self = Self(1);
    /// The destination of UD multicast.
    pub const MULTICAST: Self = Self(0x00ff_ffff);

    /// The low 24 bits of `value`.
    #[must_use]
    pub const fn new(value: u32) -> Self {
        Self(value & 0x00ff_ffff)
    }

    /// The number, below 2^24.
    #[must_use]
    pub const fn value(self) -> u32 {
        self.0
    }
}

impl fmt::Debug for Qpn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "qpn {:#x}", self.0)
    }
}

/// A path MTU: the payload of every First and Middle packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Mtu {
    /// 256 bytes.
    B256 = 1,
    /// 512 bytes.
    B512 = 2,
    /// 1024 bytes, what a 1500-byte Ethernet carries.
    B1024 = 3,
    /// 2048 bytes.
    B2048 = 4,
    /// 4096 bytes.
    B4096 = 5,
}

impl Mtu {
    /// Payload bytes per full packet.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        128 << self as u8
    }

    /// The value of the IBTA enumeration (1 to 5), as the connection manager writes it.
    #[must_use]
    pub const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::B256,
            2 => Self::B512,
            3 => Self::B1024,
            4 => Self::B2048,
            5 => Self::B4096,
            _ => return None,
        })
    }

    /// The largest MTU whose packets fit a link MTU of `link_bytes` with 80 bytes of headers, as
    /// Linux rxe computes it; `None` below 336.
    #[must_use]
    pub const fn for_link(link_bytes: u32) -> Option<Self> {
        match link_bytes.saturating_sub(80) {
            4096.. => Some(Self::B4096),
            2048.. => Some(Self::B2048),
            1024.. => Some(Self::B1024),
            512.. => Some(Self::B512),
            256.. => Some(Self::B256),
            _ => None,
        }
    }

    /// Packets, and so PSNs, that a message of `len` bytes takes: at least one.
    #[must_use]
    pub const fn packets(self, len: u32) -> u32 {
        let n = len.div_ceil(self.bytes());
        if n == 0 { 1 } else { n }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn psn_compares_by_serial_arithmetic() {
        let top = Psn::new(Psn::MASK);
        assert_eq!(top.plus(1), Psn::new(0));
        assert_eq!(Psn::new(0).minus(1), top);
        assert_eq!(Psn::new(0).ahead_of(top), 1);
        assert_eq!(top.ahead_of(Psn::new(0)), -1);
        assert_eq!(Psn::new(5).ahead_of(Psn::new(5)), 0);
        // The edges of the 2^23 window: one less is ahead, exactly half is behind.
        for origin in [0, 1, 0x7f_ffff, 0x80_0000, 0xff_ffff] {
            let origin = Psn::new(origin);
            assert_eq!(origin.plus(0x7f_ffff).ahead_of(origin), 0x7f_ffff);
            assert_eq!(origin.plus(0x80_0000).ahead_of(origin), -0x80_0000);
            assert_eq!(origin.minus(0x80_0000).ahead_of(origin), -0x80_0000);
            assert_eq!(origin.minus(0x7f_ffff).ahead_of(origin), -0x7f_ffff);
            assert_eq!(origin.minus(1).offset_from(origin), 0xff_ffff);
        }
        assert_eq!(Psn::new(0xff00_0001), Psn::new(1));
    }

    #[test]
    fn mtu_segments_and_fits_links() {
        assert_eq!(Mtu::B256.bytes(), 256);
        assert_eq!(Mtu::B4096.bytes(), 4096);
        for code in 1..=5 {
            assert_eq!(Mtu::from_code(code).map(|m| m as u8), Some(code));
        }
        assert_eq!(Mtu::from_code(0), None);
        assert_eq!(Mtu::from_code(6), None);
        assert_eq!(Mtu::B1024.packets(0), 1);
        assert_eq!(Mtu::B1024.packets(1024), 1);
        assert_eq!(Mtu::B1024.packets(1025), 2);
        assert_eq!(Mtu::B256.packets(1 << 31), 1 << 23);
        assert_eq!(Mtu::for_link(1500), Some(Mtu::B1024));
        assert_eq!(Mtu::for_link(4175), Some(Mtu::B2048));
        assert_eq!(Mtu::for_link(4176), Some(Mtu::B4096));
        assert_eq!(Mtu::for_link(65536), Some(Mtu::B4096));
        assert_eq!(Mtu::for_link(300), None);
    }
}
