//! Packets that arrive ahead of a gap: the caller keeps them, the queue pair says whose turn it is.

use super::QueuePair;
use crate::wire::{Packet, Psn};

impl QueuePair {
    /// Whether the peer keeps what arrives ahead of a gap, reports its gaps and understands reports:
    /// only for peers that said that they are of this kind, until RESET.
    pub fn set_reports_gaps(&mut self, reports_gaps: bool) {
        self.link.reports_gaps = reports_gaps;
    }

    /// The caller keeps this packet, which was [`Outcome::Ahead`](super::Outcome::Ahead) just now.
    pub fn note_kept(&mut self, packet: &Packet<'_>) {
        let psn = packet.psn();
        self.responder.note_kept(psn, &self.link, &mut self.out);
    }

    /// The PSN of a kept packet that is to be handed to [`Self::handle_packet`] now.
    #[must_use]
    pub fn wants_kept(&self) -> Option<Psn> {
        self.responder.wants_kept()
    }

    /// The caller does not have that packet any more.
    pub fn forget_kept(&mut self) {
        self.responder.forget_kept(&self.link, &mut self.out);
    }
}
