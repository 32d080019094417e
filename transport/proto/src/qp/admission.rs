//! Which packets a queue pair lets in.

use super::types::DropReason;
use super::{QpKind, QpState, QueuePair};
use crate::wire::{Class, Packet};

impl QueuePair {
    /// Whether state, class and partition let the packet in.
    #[inline]
    pub(super) fn admit(&self, packet: &Packet<'_>) -> Result<(), DropReason> {
        let working = match self.state {
            QpState::Rts | QpState::Sqd | QpState::Sqe => true,
            QpState::Rtr => !packet.row().is_response(),
            _ => false,
        };
        if !working {
            return Err(DropReason::State(self.state));
        }
        let fits = match packet.row().class {
            Class::Rc => self.link.kind == QpKind::Rc,
            Class::Uc => self.link.kind == QpKind::Uc,
            Class::Cnp => true,
            Class::Ud => false,
        };
        if !fits {
            return Err(DropReason::Class);
        }
        if !pkeys_match(packet.pkey(), self.link.pkey) {
            return Err(DropReason::Pkey);
        }
        Ok(())
    }
}

/// Two partition keys match if their low 15 bits do and one of them is a full member.
pub(super) fn pkeys_match(a: u16, b: u16) -> bool {
    a & 0x7fff == b & 0x7fff && (a | b) & 0x8000 != 0
}
