//! Packets that arrived ahead of a gap, until their turn comes.
//!
//! Owns: copies of at most [`SLOTS`] datagrams of all queue pairs of a device. It is a cache: a packet
//! may push out another queue pair's, whose peer then sends that again. So queue pairs take no room in
//! it, and nobody has to clean up behind one that is gone: what a queue pair does not ask for is never
//! looked at.
//!
//! Invariants: the packets of one queue pair that are within [`SLOTS`] of each other never push each
//! other out; memory is taken at the first use of a slot, and then kept.

use lowtide_transport_proto::wire::Psn;

/// Datagrams, of up to 4 KiB each.
const SLOTS: usize = 1024;

/// Whose packet: the queue pair's index, and the PSN.
type Key = (u32, Psn);

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// Empty until something is kept.
    slots: Vec<Option<(Key, Vec<u8>)>>,
    /// Buffers of slots that were emptied.
    spare: Vec<Vec<u8>>,
}

impl Kept {
    /// Keeps a copy.
    pub(super) fn keep(&mut self, queue_pair: u32, psn: Psn, bytes: &[u8]) {
        if self.slots.is_empty() {
            self.slots.resize(SLOTS, None);
            self.spare.reserve(SLOTS);
        }
        let slot = &mut self.slots[place(queue_pair, psn)];
        let before = slot.take().map(|(_, buffer)| buffer);
        let mut buffer = before.or_else(|| self.spare.pop()).unwrap_or_default();
        buffer.clear();
        buffer.extend_from_slice(bytes);
        *slot = Some(((queue_pair, psn), buffer));
    }

    /// The packet, if it is still here; the buffer is to be given back.
    pub(super) fn take(&mut self, queue_pair: u32, psn: Psn) -> Option<Vec<u8>> {
        let slot = self.slots.get_mut(place(queue_pair, psn))?;
        slot.take_if(|(key, _)| *key == (queue_pair, psn))
            .map(|(_, buffer)| buffer)
    }

    /// For the next packet.
    pub(super) fn give_back(&mut self, buffer: Vec<u8>) {
        self.spare.push(buffer);
    }
}

/// Neighbours in one queue pair are neighbours here, and queue pairs are spread.
const fn place(queue_pair: u32, psn: Psn) -> usize {
    let start = queue_pair.wrapping_mul(0x9e37_79b1) >> 16;
    start.wrapping_add(psn.value()) as usize % SLOTS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_is_found_once_and_by_its_own_key_only() {
        let mut kept = Kept::default();
        let psn = Psn::new(0xff_ffff);
        assert_eq!(kept.take(1, psn), None);
        kept.keep(1, psn, b"one");
        assert_eq!(kept.take(2, psn), None);
        assert_eq!(kept.take(1, Psn::new(0)), None);
        assert_eq!(kept.take(1, psn).as_deref(), Some(&b"one"[..]));
        assert_eq!(kept.take(1, psn), None);
    }

    #[test]
    fn a_window_fits_and_what_is_full_forgets() {
        let mut kept = Kept::default();
        let psns = |first: u32| (first..first + SLOTS as u32).map(Psn::new);
        for round in 0..3 {
            for psn in psns(round * 5000) {
                kept.keep(9, psn, &psn.value().to_le_bytes());
            }
        }
        for psn in psns(10_000) {
            let bytes = kept.take(9, psn).expect("nothing else was kept since");
            assert_eq!(bytes, psn.value().to_le_bytes());
            kept.give_back(bytes);
        }
        assert!(psns(5000).all(|psn| kept.take(9, psn).is_none()));
        assert_eq!(kept.spare.len(), SLOTS, "and no buffer is made twice");
    }
}
