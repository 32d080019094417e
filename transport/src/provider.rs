//! Which device of libibverbs carries messages, if one can: an adapter, or the kernel's soft-RoCE.
//!
//! Owns the order of preference, and the reasons why a device was passed over, for logs. Where there
//! is none, softroce serves.

use std::fmt;
use std::net::{IpAddr, UdpSocket};

use crate::ibv::{self, DeviceEntry, NoDevices};
use crate::raw::types::Error;

/// A device of libibverbs that can carry messages ([`crate::message`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForMessages {
    /// The device.
    pub device: DeviceEntry,
    /// An address of its own, where peers reach it.
    pub address: IpAddr,
}

impl fmt::Display for ForMessages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ForMessages { device, address } = self;
        write!(
            f,
            "verbs on {} ({}) at {address}",
            device.name, device.driver
        )
    }
}

/// Why no device can carry messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotForMessages {
    /// There is none.
    None(NoDevices),
    /// Those that there are, and what each lacks.
    Each(Vec<(String, Error)>),
}

impl fmt::Display for NotForMessages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NotForMessages::None(reason) => reason.fmt(f),
            NotForMessages::Each(devices) => {
                for (i, (name, error)) in devices.iter().enumerate() {
                    let separator = if i == 0 { "" } else { "; " };
                    write!(f, "{separator}{name}: {error}")?;
                }
                Ok(())
            }
        }
    }
}

impl std::error::Error for NotForMessages {}

/// The best device that can carry messages at the address `local`, or at any of its own. Each is
/// tried out: it is opened, memory is registered, a queue pair is made, and the address is bound.
///
/// # Errors
/// Why there is none.
pub fn for_messages(local: Option<IpAddr>) -> Result<ForMessages, NotForMessages> {
    let mut refused = Vec::new();
    for device in ibv::devices().map_err(NotForMessages::None)? {
        let opened = ibv::carrier::Carrier::open(&device.name, local);
        match opened.map(|carrier| carrier.address().or(local)) {
            // In a container the address may be another network namespace's.
            Ok(Some(address)) => match UdpSocket::bind((address, 0)) {
                Ok(_) => return Ok(ForMessages { device, address }),
                Err(error) => {
                    let errno = error.raw_os_error().unwrap_or(libc::EADDRNOTAVAIL);
                    refused.push((device.name, Error::Os(errno)));
                }
            },
            Ok(None) => {
                let lack = Error::Argument("an InfiniBand port has no address: name one");
                refused.push((device.name, lack));
            }
            Err(error) => refused.push((device.name, error)),
        }
    }
    Err(NotForMessages::Each(refused))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_no_device_can_carry_messages_the_reasons_are_told() {
        // An address that is kept for documentation; so no device has it.
        let refused = for_messages(Some("192.0.2.9".parse().unwrap())).unwrap_err();
        assert!(!refused.to_string().is_empty());
        let each = NotForMessages::Each(vec![
            ("rxe0".to_owned(), Error::Argument("no such address")),
            ("mlx5_0".to_owned(), Error::Limit("locked memory")),
        ]);
        let words = each.to_string();
        assert!(
            words.starts_with("rxe0: ") && words.contains("; mlx5_0: "),
            "{words}"
        );
    }
}
