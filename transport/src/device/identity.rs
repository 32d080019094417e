//! Which IPv4 Identifications are believed.
//!
//! A UDP socket never shows the Identification, and the ICRC covers it; so the receiver solves for
//! the value that makes the ICRC right, and a random error passes if that value is plausible. This
//! module says what is.
//!
//! Owns: a few bytes per source address. Our own ends send 0 to 127 (segments of one
//! `UDP_SEGMENT` send). Kernels and adapters count up, with gaps: a window of [`WINDOW`] plus
//! [`WINDOW_PER_MS`] per millisecond after the last one is believed, [`BEHIND`] before it because
//! wires reorder, and two packets in a row that agree with each other move it elsewhere.
//!
//! Source: `__ip_select_ident` of Linux; the residual risk of a random error is about 2^-21.7 where
//! the sender counts and 2^-25 where it is ours.

use std::collections::HashMap;
use std::net::IpAddr;

use lowtide_transport_proto::icrc::GSO_IDENTIFICATION_MAX;
use lowtide_transport_proto::time::Nanos;

const WINDOW: u64 = 1024;
const WINDOW_PER_MS: u64 = 4;
/// How far behind the highest one believed a packet may be that was overtaken: twice the packets that
/// a queue pair of Linux has under way.
const BEHIND: u16 = 256;
/// Source addresses remembered; beyond, all start anew.
const SOURCES_MAX: usize = 4096;

/// Who may talk to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Peers {
    /// Only our own ends.
    Own,
    /// Also kernels and adapters.
    Any,
}

/// What one source has sent.
#[derive(Debug, Clone, Copy)]
struct Source {
    /// The last Identification believed, and when; none while it sends those of our own ends.
    counted: Option<(u16, Nanos)>,
    /// One that was not believed.
    odd: Option<u16>,
}

/// The memory of all sources.
#[derive(Debug)]
pub(crate) struct Identities {
    peers: Peers,
    sources: HashMap<IpAddr, Source>,
    /// The last source, if it has only ever sent what our own ends send: no need to look it up.
    plain: Option<IpAddr>,
}

impl Identities {
    pub(crate) fn new(peers: Peers) -> Identities {
        Identities {
            peers,
            sources: HashMap::new(),
            plain: None,
        }
    }

    /// Whether a packet from `from` can have had this Identification.
    pub(crate) fn believe(&mut self, now: Nanos, from: IpAddr, solved: u16) -> bool {
        // IPv6 has none; the whole ICRC was checked.
        if self.peers == Peers::Own || from.is_ipv6() {
            return solved <= GSO_IDENTIFICATION_MAX;
        }
        let is_own = solved <= GSO_IDENTIFICATION_MAX;
        if is_own && self.plain == Some(from) {
            return true;
        }
        self.plain = None;
        let Some(source) = self.sources.get_mut(&from) else {
            if self.sources.len() >= SOURCES_MAX {
                self.sources.clear();
            }
            let counted = (!is_own).then_some((solved, now));
            self.sources.insert(from, Source { counted, odd: None });
            return true;
        };
        let is_expected = match source.counted {
            None => is_own,
            Some((last, at)) => {
                let window = WINDOW + WINDOW_PER_MS * (now.since(at).0 / 1_000_000);
                if last.wrapping_sub(solved) <= BEHIND {
                    // Overtaken on the way: it says nothing new.
                    return true;
                }
                u64::from(solved.wrapping_sub(last)) <= window
            }
        };
        let is_confirmed = source
            .odd
            .is_some_and(|odd| u64::from(solved.wrapping_sub(odd)) <= WINDOW);
        if !is_expected && !is_confirmed {
            source.odd = Some(solved);
            return false;
        }
        source.odd = None;
        if source.counted.is_some() || !is_expected {
            source.counted = Some((solved, now));
        }
        self.plain = source.counted.is_none().then_some(from);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_ends_are_held_to_their_few_values() {
        let mut identities = Identities::new(Peers::Own);
        let from = "127.0.0.1".parse().unwrap();
        assert!(identities.believe(Nanos::ZERO, from, 127));
        assert!(!identities.believe(Nanos::ZERO, from, 128));
    }

    #[test]
    fn a_counting_source_is_followed_and_a_jump_needs_confirmation() {
        let mut identities = Identities::new(Peers::Any);
        let from = "10.0.0.1".parse().unwrap();
        let mut believe = |ms, id| identities.believe(Nanos::from_millis(ms), from, id);
        assert!(believe(0, 65_000));
        assert!(believe(0, 65_500) && believe(0, 100), "over the wrap");
        assert!(!believe(0, 5_000), "too far");
        assert!(believe(1_000, 4_000), "not too far after a second");
        assert!(!believe(1_000, 40_000));
        assert!(believe(1_000, 40_003), "two that agree");
        assert!(!believe(1_000, 39_000), "too far back");
        assert!(
            believe(1_000, 40_020) && believe(1_000, 40_010),
            "overtaken"
        );
        assert!(believe(1_000, 39_990), "overtaken by two");
        assert!(
            !believe(1_000, 40_020 - 257),
            "and the window stays where it is"
        );
        let ours = "10.0.0.2".parse().unwrap();
        assert!(identities.believe(Nanos::ZERO, ours, 3));
        assert!(identities.believe(Nanos::ZERO, ours, 0));
        assert!(!identities.believe(Nanos::ZERO, ours, 500));
    }
}
