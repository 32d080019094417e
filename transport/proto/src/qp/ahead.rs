//! Packets that arrive ahead of a gap: the caller keeps them, the queue pair says whose turn it is.

use super::QpState::{Rtr, Rts, Sqd, Sqe};
use super::QueuePair;
use crate::wire::{Packet, Psn};

/// Which packet of a queue pair is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EarlyPacket {
    /// Requests and answers have PSNs of their own.
    pub is_response: bool,
    /// Its PSN.
    pub psn: Psn,
}

impl EarlyPacket {
    /// The name of this packet.
    #[must_use]
    pub fn of(packet: &Packet<'_>) -> Self {
        Self {
            is_response: packet.opcode().is_response(),
            psn: packet.psn(),
        }
    }
}

impl QueuePair {
    /// Whether the peer keeps what arrives ahead of a gap, reports its gaps and understands reports:
    /// only for peers that said that they are of this kind, until RESET.
    pub fn set_reports_gaps(&mut self, reports_gaps: bool) {
        self.link.reports_gaps = reports_gaps;
    }

    /// The caller keeps this packet, which was [`Outcome::Ahead`](super::Outcome::Ahead) just now.
    pub fn note_kept(&mut self, packet: &Packet<'_>) {
        let EarlyPacket { is_response, psn } = EarlyPacket::of(packet);
        match is_response {
            true => self.requester.note_kept(psn),
            false => self.responder.note_kept(psn, &self.link, &mut self.out),
        }
    }

    /// A kept packet that is to be handed to [`Self::handle_packet`] now.
    #[must_use]
    #[inline]
    pub fn wants_kept(&self) -> Option<EarlyPacket> {
        if !self.responder.has_kept() && !self.requester.has_gaps() {
            return None;
        }
        let named = |is_response| move |psn| EarlyPacket { is_response, psn };
        let request = self.responder.wants_kept().map(named(false));
        let wanted = request.or_else(|| self.requester.wants_kept().map(named(true)));
        wanted.filter(|_| matches!(self.state, Rtr | Rts | Sqd | Sqe))
    }

    /// The caller does not have that packet any more.
    pub fn forget_kept(&mut self, packet: EarlyPacket) {
        match packet.is_response {
            true => self.requester.forget_kept(),
            false => self.responder.forget_kept(&self.link, &mut self.out),
        }
    }
}
