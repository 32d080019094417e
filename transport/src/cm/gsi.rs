//! Queue pair 1: how management datagrams leave a device.

use std::net::SocketAddr;

use lowtide_transport_proto::cm::GSI_QKEY;
use lowtide_transport_proto::wire::{Deth, Extension, Header, Opcode, Psn, Qpn};

use crate::device::Device;
use crate::udp::HEADER_MAX;

/// The sending side of a device's queue pair 1.
#[derive(Debug, Default)]
pub(crate) struct Gsi {
    sent: u32,
}

impl Gsi {
    /// Stages a management datagram for queue pair 1 of the device at `to`.
    pub(crate) fn send(&mut self, device: &mut Device, to: SocketAddr, mad: &[u8]) {
        let deth = Deth {
            qkey: GSI_QKEY,
            source: Qpn::GSI,
        };
        let psn = Psn::new(self.sent);
        self.sent = self.sent.wrapping_add(1);
        let header = Header::new(Opcode::UdSendOnly, Qpn::GSI, psn, Extension::Deth(deth));
        let mut bytes = [0; HEADER_MAX];
        let len = header.emit(&mut bytes);
        device.send_management(to, &bytes[..len], mad);
    }
}
