//! Packets that arrived ahead of a gap, until their turn comes.
//!
//! Owns: copies of at most [`SLOTS`] datagrams of all queue pairs of a device. It is a cache: a packet
//! may push out another queue pair's, whose peer then sends that again. So queue pairs take no room in
//! it, and nobody has to clean up behind one that is gone: what a queue pair does not ask for is never
//! looked at.
//!
//! Invariants: the requests of one queue pair that are within [`SLOTS`] of each other never push each
//! other out, nor do its answers; memory is taken at the first use of a slot, and then kept.

use lowtide_transport_proto::qp::EarlyPacket;

use crate::udp::{HEADER_MAX, TRAILER_MAX};

/// Datagrams, of up to 4 KiB and headers each.
const SLOTS: usize = 1024;
const DATAGRAM_LEN: usize = 4096 + HEADER_MAX + TRAILER_MAX;

/// Whose packet: the queue pair's index, and which of its.
type Key = (u32, EarlyPacket);

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
    pub(super) fn keep(&mut self, queue_pair: u32, packet: EarlyPacket, bytes: &[u8]) {
        if self.slots.is_empty() {
            self.slots.resize(SLOTS, None);
            self.spare.reserve(SLOTS);
        }
        let slot = &mut self.slots[place(queue_pair, packet)];
        let before = slot.take().map(|(_, buffer)| buffer);
        let buffer = before.or_else(|| self.spare.pop());
        // As long as any, so that it serves whatever comes.
        let mut buffer = buffer.unwrap_or_else(|| Vec::with_capacity(DATAGRAM_LEN));
        buffer.clear();
        buffer.extend_from_slice(bytes);
        *slot = Some(((queue_pair, packet), buffer));
    }

    /// The packet, if it is still here; the buffer is to be given back.
    pub(super) fn take(&mut self, queue_pair: u32, packet: EarlyPacket) -> Option<Vec<u8>> {
        let slot = self.slots.get_mut(place(queue_pair, packet))?;
        slot.take_if(|(key, _)| *key == (queue_pair, packet))
            .map(|(_, buffer)| buffer)
    }

    /// For the next packet.
    pub(super) fn give_back(&mut self, buffer: Vec<u8>) {
        self.spare.push(buffer);
    }
}

/// Neighbours in one queue pair are neighbours here, and queue pairs are spread.
const fn place(queue_pair: u32, packet: EarlyPacket) -> usize {
    let direction = 2 * queue_pair + packet.is_response as u32;
    let start = direction.wrapping_mul(0x9e37_79b1) >> 16;
    start.wrapping_add(packet.psn.value()) as usize % SLOTS
}

#[cfg(test)]
mod tests {
    use lowtide_transport_proto::wire::Psn;

    use super::*;

    fn request(psn: u32) -> EarlyPacket {
        EarlyPacket {
            is_response: false,
            psn: Psn::new(psn),
        }
    }

    #[test]
    fn a_packet_is_found_once_and_by_its_own_key_only() {
        let mut kept = Kept::default();
        let packet = request(0xff_ffff);
        let answer = EarlyPacket {
            is_response: true,
            ..packet
        };
        assert_eq!(kept.take(1, packet), None);
        kept.keep(1, packet, b"one");
        kept.keep(1, answer, b"answer");
        assert_eq!(kept.take(2, packet), None);
        assert_eq!(kept.take(1, request(0)), None);
        assert_eq!(kept.take(1, packet).as_deref(), Some(&b"one"[..]));
        assert_eq!(kept.take(1, packet), None);
        assert_eq!(kept.take(1, answer).as_deref(), Some(&b"answer"[..]));
    }

    #[test]
    fn a_window_fits_and_what_is_full_forgets() {
        let mut kept = Kept::default();
        let requests = |first: u32| (first..first + SLOTS as u32).map(request);
        for round in 0..3 {
            for packet in requests(round * 5000) {
                kept.keep(9, packet, &packet.psn.value().to_le_bytes());
            }
        }
        for packet in requests(10_000) {
            let bytes = kept.take(9, packet).expect("nothing else was kept since");
            assert_eq!(bytes, packet.psn.value().to_le_bytes());
            kept.give_back(bytes);
        }
        assert!(requests(5000).all(|packet| kept.take(9, packet).is_none()));
        assert_eq!(kept.spare.len(), SLOTS, "and no buffer is made twice");
    }
}
