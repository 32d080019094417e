//! Which provider serves: an adapter, the kernel's soft device, or softroce.
//!
//! Owns the order of preference, and the reason for what was chosen, for logs.

use std::fmt;

use crate::ibv::{self, DeviceEntry, NoDevices};

/// What the user asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// An adapter; else the kernel's soft device; else softroce.
    Auto,
    /// A device of libibverbs, whatever stands behind it.
    Verbs,
    /// Our own RoCEv2 over UDP sockets.
    Softroce,
}

/// What serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chosen {
    /// This device, by [`crate::ibv`].
    Verbs(DeviceEntry),
    /// softroce, by [`crate::raw`].
    Softroce {
        /// Why there is nothing better; none if it was asked for.
        because: Option<NoDevices>,
    },
}

impl fmt::Display for Chosen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Chosen::Verbs(DeviceEntry { name, driver }) => {
                write!(f, "verbs on {name} ({driver})")
            }
            Chosen::Softroce { because: None } => f.write_str("softroce, as asked for"),
            Chosen::Softroce {
                because: Some(reason),
            } => write!(f, "softroce: {reason}"),
        }
    }
}

/// Chooses.
///
/// # Errors
/// A device was asked for and there is none; the reason.
pub fn choose(wanted: Wanted) -> Result<Chosen, NoDevices> {
    match wanted {
        Wanted::Softroce => Ok(Chosen::Softroce { because: None }),
        _ => choose_among(wanted, ibv::devices()),
    }
}

/// `devices`: the best first.
fn choose_among(
    wanted: Wanted,
    devices: Result<Vec<DeviceEntry>, NoDevices>,
) -> Result<Chosen, NoDevices> {
    let first = devices.and_then(|list| list.into_iter().next().ok_or(NoDevices::None));
    match (first, wanted) {
        (Ok(device), _) => Ok(Chosen::Verbs(device)),
        (Err(reason), Wanted::Verbs) => Err(reason),
        (Err(reason), _) => Ok(Chosen::Softroce {
            because: Some(reason),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ibv::Driver;

    #[test]
    fn the_best_device_serves_and_softroce_where_there_is_none() {
        let device = |name: &str, driver| DeviceEntry {
            name: name.to_owned(),
            driver,
        };
        let list = vec![
            device("mlx5_0", Driver::Hardware),
            device("rxe0", Driver::Rxe),
        ];
        for wanted in [Wanted::Auto, Wanted::Verbs] {
            let chosen = choose_among(wanted, Ok(list.clone())).unwrap();
            assert_eq!(chosen.to_string(), "verbs on mlx5_0 (hardware)");
        }
        let none = || Err(NoDevices::NoKernelSupport);
        let chosen = choose_among(Wanted::Auto, none()).unwrap();
        assert!(
            chosen
                .to_string()
                .starts_with("softroce: the kernel has no")
        );
        let refused = choose_among(Wanted::Verbs, none());
        assert_eq!(refused, Err(NoDevices::NoKernelSupport));
        let asked = choose(Wanted::Softroce).unwrap();
        assert_eq!(asked.to_string(), "softroce, as asked for");
    }
}
