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
    let devices = ibv::devices().map_err(NotForMessages::None)?;
    best_of(devices, |name| {
        let carrier = ibv::carrier::Carrier::open(name, local)?;
        let lack = Error::Argument("an InfiniBand port has no address: name one");
        let address = carrier.address().or(local).ok_or(lack)?;
        // In a container the address may be another network namespace's.
        UdpSocket::bind((address, 0)).map_err(|error| {
            let errno = error.raw_os_error().unwrap_or(libc::EADDRNOTAVAIL);
            Error::Os(errno)
        })?;
        Ok(address)
    })
}

/// The first of the devices, adapters before the kernel's, of which `attempt` makes an address.
fn best_of(
    mut devices: Vec<DeviceEntry>,
    attempt: impl Fn(&str) -> Result<IpAddr, Error>,
) -> Result<ForMessages, NotForMessages> {
    devices.sort_by(|a, b| (a.driver, &a.name).cmp(&(b.driver, &b.name)));
    let mut refused = Vec::new();
    for device in devices {
        match attempt(&device.name) {
            Ok(address) => return Ok(ForMessages { device, address }),
            Err(error) => refused.push((device.name, error)),
        }
    }
    Err(NotForMessages::Each(refused))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::ibv::Driver;

    #[test]
    fn adapters_come_before_the_kernels_devices_and_all_are_tried() {
        let entry = |name: &str, driver| DeviceEntry {
            name: name.to_owned(),
            driver,
        };
        let devices = vec![
            entry("a_siw", Driver::Siw),
            entry("b_rxe", Driver::Rxe),
            entry("mlx5_1", Driver::Hardware),
            entry("c_rxe", Driver::Rxe),
            entry("mlx5_0", Driver::Hardware),
        ];
        let order = ["mlx5_0", "mlx5_1", "b_rxe", "c_rxe", "a_siw"];
        let address = IpAddr::from([192, 0, 2, 1]);
        for able in 0..=order.len() {
            let tried = RefCell::new(Vec::new());
            let found = best_of(devices.clone(), |name| {
                tried.borrow_mut().push(name.to_owned());
                match order.iter().position(|each| *each == name) >= Some(able) {
                    true => Ok(address),
                    false => Err(Error::Unsupported("what it takes")),
                }
            });
            let tried = tried.into_inner();
            match order.get(able) {
                Some(name) => {
                    let found = found.unwrap();
                    assert_eq!((&found.device.name[..], found.address), (*name, address));
                    assert_eq!(tried, order[..=able]);
                }
                // Then softroce serves: `lowtide`'s choice has that, with these reasons.
                None => {
                    let refused = found.unwrap_err().to_string();
                    assert_eq!(tried, order);
                    assert!(refused.starts_with("mlx5_0: "), "{refused}");
                }
            }
        }
    }

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
