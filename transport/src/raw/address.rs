//! Address handles, and where datagrams come from.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use lowtide_transport_proto::qp::{self, GRH_LEN};

use super::ProtectionDomain;
use super::types::{AhAttr, AhId, Error, Gid};

/// A destination of datagrams. A request that still waits when it is dropped fails.
#[derive(Debug)]
pub struct AddressHandle {
    pd: ProtectionDomain,
    id: qp::AddressHandle,
}

impl ProtectionDomain {
    /// A handle for a destination; a multicast GID too.
    ///
    /// # Errors
    /// [`Error::Argument`] for a GID of the other address family or of no address, [`Error::Limit`]
    /// for another port or GID of ours, [`Error::Exhausted`].
    pub fn address_handle(&self, attr: &AhAttr) -> Result<AddressHandle, Error> {
        let target = destination(self.context.local_addr(), attr)?;
        let mut state = self.context.shared.lock();
        let id = state.device.create_address(target);
        Ok(AddressHandle {
            pd: self.clone(),
            id: id.ok_or(Error::Exhausted("address handle"))?,
        })
    }
}

impl AddressHandle {
    /// Its number, for [`super::types::Destination`].
    pub fn id(&self) -> AhId {
        AhId(self.id.0)
    }
}

impl Drop for AddressHandle {
    fn drop(&mut self) {
        let mut state = self.pd.context.shared.lock();
        state.device.destroy_address(self.id);
    }
}

/// The socket address that a device on `local` sends to for these attributes.
pub(super) fn destination(local: SocketAddr, attr: &AhAttr) -> Result<SocketAddr, Error> {
    if attr.port != 1 || attr.sgid_index != 0 {
        return Err(Error::Limit("port 1 and GID index 0"));
    }
    let ip = attr.dgid.ip();
    if ip.is_unspecified() || ip.is_ipv4() != local.ip().is_ipv4() {
        return Err(Error::Argument(
            "the destination GID is no address of the device's family",
        ));
    }
    Ok(SocketAddr::new(ip, local.port()))
}

impl AhAttr {
    /// The way back to the sender of a datagram, from the first 40 bytes of its receive
    /// (`ibv_init_ah_from_wc`); none if they are no IP header.
    pub fn from_grh(grh: &[u8; GRH_LEN]) -> Option<AhAttr> {
        let v4 = &grh[20..];
        let (source, traffic_class, hop_limit): (IpAddr, _, _) = match (grh[0] >> 4, v4[0]) {
            (6, _) => {
                let source: [u8; 16] = grh[8..24].try_into().ok()?;
                let class = grh[0] << 4 | grh[1] >> 4;
                (Ipv6Addr::from_octets(source).into(), class, grh[7])
            }
            (0, 0x45) => {
                let source: [u8; 4] = v4[12..16].try_into().ok()?;
                (Ipv4Addr::from_octets(source).into(), v4[1], v4[8])
            }
            _ => return None,
        };
        Some(AhAttr {
            dgid: Gid::from_ip(source),
            traffic_class,
            hop_limit,
            port: 1,
            ..AhAttr::default()
        })
    }
}
