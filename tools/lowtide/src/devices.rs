//! What this machine has for RDMA: devices of libibverbs, and the addresses that softroce can
//! serve.
//!
//! Owns the survey and the advice: why something cannot be used or is slower than it need be, and
//! which package, right or sysctl helps.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::Path;

use lowtide_transport::ibv::{self, Context, DeviceEntry, NoDevices};
use lowtide_transport::raw::types::{Error, GidType, PortState};
use lowtide_transport::udp::{Socket, SocketOptions, interface_addresses, interface_mtu};
use lowtide_transport_proto::wire::{Mtu, UDP_PORT};
use rustix::io::Errno;
use serde::Serialize;

const EACCES: i32 = Errno::ACCESS.raw_os_error();
const EPERM: i32 = Errno::PERM.raw_os_error();
const ENOENT: i32 = Errno::NOENT.raw_os_error();

/// What was found.
#[derive(Debug, Serialize)]
pub struct Survey {
    /// Devices of libibverbs, adapters first.
    pub verbs: Vec<VerbsDevice>,
    /// Why there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_verbs: Option<String>,
    /// Addresses of this host.
    pub softroce: Vec<SoftroceDevice>,
    /// What would help.
    pub advice: Vec<String>,
}

/// A device of libibverbs.
#[derive(Debug, Serialize)]
pub struct VerbsDevice {
    /// Its name.
    pub name: String,
    /// `hardware`, `rxe` or `siw`.
    pub driver: String,
    /// Why it cannot be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unusable: Option<String>,
    /// Queue pairs at most.
    pub queue_pairs: u32,
    /// Elements of one request's list at most.
    pub sge: u32,
    /// What it has and others have not.
    pub can: Vec<&'static str>,
    /// Its ports.
    pub ports: Vec<Port>,
}

/// A port.
#[derive(Debug, Serialize)]
pub struct Port {
    /// From 1.
    pub number: u8,
    /// `active`, `down` and so on.
    pub state: String,
    /// `ethernet` or `infiniband`.
    pub link: &'static str,
    /// Payload of full packets, bytes.
    pub mtu: u32,
    /// RoCE v2 addresses: index and address.
    pub addresses: Vec<(u32, IpAddr)>,
}

/// An address that softroce can serve.
#[derive(Debug, Serialize)]
pub struct SoftroceDevice {
    /// The address.
    pub address: IpAddr,
    /// Its interface.
    pub interface: String,
    /// Why it cannot be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unusable: Option<String>,
    /// Payload of full packets, bytes.
    pub mtu: u32,
    /// Bytes of receive buffer that the kernel grants.
    pub receive_buffer: usize,
    /// Full packets that fit it while nobody reads.
    pub receive_packets: usize,
}

impl Survey {
    /// Looks at this machine.
    ///
    /// # Errors
    /// The kernel does not tell its addresses.
    pub fn take() -> io::Result<Survey> {
        let mut advice = Vec::new();
        let (verbs, no_verbs) = match ibv::devices() {
            Ok(entries) => (entries.iter().map(verbs_device).collect(), None),
            Err(error) => {
                advice.extend(advice_without_verbs(&error));
                (Vec::new(), Some(error.to_string()))
            }
        };
        let addresses = interface_addresses()?;
        let softroce = addresses.into_iter().map(softroce_device).collect();
        let survey = Survey {
            verbs,
            no_verbs,
            softroce,
            advice,
        };
        Ok(survey.with_advice_on_buffers())
    }

    fn with_advice_on_buffers(mut self) -> Survey {
        let wanted = SocketOptions::default().receive_buffer_bytes;
        let granted = self.softroce.iter().filter(|d| d.unusable.is_none());
        // The kernel grants and tells twice what it is asked for, for its own overhead.
        if let Some(least) = granted.map(|d| d.receive_buffer / 2).min()
            && least < wanted
        {
            self.advice.push(format!(
                "net.core.rmem_max limits receive buffers to {least} bytes of {wanted} wanted, and \
                 so the speed of softroce: sysctl -w net.core.rmem_max={wanted}"
            ));
        }
        self
    }
}

/// What helps if there is no device; nothing where nothing is amiss.
fn advice_without_verbs(error: &NoDevices) -> Option<String> {
    let sysfs = Path::new("/sys/class/infiniband");
    let mut known = std::fs::read_dir(sysfs).ok()?.flatten();
    let name = known.next()?.file_name();
    let name = name.to_string_lossy();
    Some(match error {
        NoDevices::Library(_) => {
            format!(
                "the kernel has device {name}: install libibverbs1 and ibverbs-providers to use it"
            )
        }
        _ => format!(
            "the kernel has device {name}, libibverbs does not find it: install ibverbs-providers, \
             and look for /dev/infiniband/uverbs0 (modprobe ib_uverbs)"
        ),
    })
}

fn verbs_device(entry: &DeviceEntry) -> VerbsDevice {
    let mut device = VerbsDevice {
        name: entry.name.clone(),
        driver: entry.driver.to_string(),
        unusable: None,
        queue_pairs: 0,
        sge: 0,
        can: Vec::new(),
        ports: Vec::new(),
    };
    let mut look = || -> Result<(), Error> {
        let context = Context::open(&entry.name)?;
        let attr = context.query_device()?;
        (device.queue_pairs, device.sge) = (attr.qp, attr.sge);
        device.can = capabilities(&context);
        for number in 1..=attr.phys_port_cnt {
            device.ports.push(port(&context, number)?);
        }
        Ok(())
    };
    if let Err(error) = look() {
        device.unusable = Some(match error {
            Error::Os(errno) if [EACCES, EPERM].contains(&errno) => {
                "no right to open its node in /dev/infiniband: join the group of that file"
                    .to_owned()
            }
            Error::Os(ENOENT) => {
                "its node in /dev/infiniband is missing: modprobe ib_uverbs".to_owned()
            }
            other => other.to_string(),
        });
    } else if device.ports.iter().all(|port| port.state != "active") {
        device.unusable = Some("no port is active".to_owned());
    }
    device
}

fn capabilities(context: &Context) -> Vec<&'static str> {
    let can = context.capabilities();
    let words = [
        (can.windows_1, "memory windows of type 1"),
        (can.windows_2b, "memory windows of type 2B"),
        (can.atomic_write, "ATOMIC WRITE"),
        (can.flush, "FLUSH"),
    ];
    let has = words.into_iter().filter(|(is_there, _)| *is_there);
    has.map(|(_, word)| word).collect()
}

fn port(context: &Context, number: u8) -> Result<Port, Error> {
    let attr = context.query_port(number)?;
    let gids = context.gids(number)?;
    let roce = gids.iter().filter(|entry| entry.kind == GidType::RoceV2);
    Ok(Port {
        number,
        state: match attr.state {
            PortState::Nop => "unknown",
            PortState::Down => "down",
            PortState::Init => "init",
            PortState::Armed => "armed",
            PortState::Active => "active",
        }
        .to_owned(),
        link: match attr.is_ethernet {
            true => "ethernet",
            false => "infiniband",
        },
        mtu: attr.active_mtu.bytes(),
        addresses: roce.map(|entry| (entry.index, entry.gid.ip())).collect(),
    })
}

fn softroce_device((interface, address): (String, IpAddr)) -> SoftroceDevice {
    let mut device = SoftroceDevice {
        address,
        interface,
        unusable: None,
        mtu: 0,
        receive_buffer: 0,
        receive_packets: 0,
    };
    let mtu = interface_mtu(address).ok().and_then(Mtu::for_link);
    let Some(mtu) = mtu else {
        device.unusable = Some("the interface's MTU is below 336 bytes".to_owned());
        return device;
    };
    device.mtu = mtu.bytes();
    if let IpAddr::V6(v6) = address
        && v6.is_unicast_link_local()
    {
        device.unusable = Some("link-local: it does not name an interface by itself".to_owned());
        return device;
    }
    match Socket::bind((address, UDP_PORT).into(), &SocketOptions::default()) {
        Ok(socket) => {
            device.receive_buffer = socket.receive_buffer_bytes();
            device.receive_packets = socket.receive_budget();
        }
        Err(error) => device.unusable = Some(error.to_string()),
    }
    device
}

impl fmt::Display for Survey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for device in &self.verbs {
            writeln!(f, "{device}")?;
        }
        if let Some(why) = &self.no_verbs {
            writeln!(f, "verbs     none: {why}")?;
        }
        for device in &self.softroce {
            writeln!(f, "{device}")?;
        }
        for advice in &self.advice {
            writeln!(f, "advice    {advice}")?;
        }
        Ok(())
    }
}

impl fmt::Display for VerbsDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "verbs     {} ({})", self.name, self.driver)?;
        if let Some(why) = &self.unusable {
            write!(f, ": not usable: {why}")?;
        }
        if !self.can.is_empty() {
            write!(f, "\n          has {}", self.can.join(", "))?;
        }
        for port in &self.ports {
            let Port {
                number,
                state,
                link,
                mtu,
                addresses,
            } = port;
            write!(f, "\n          port {number} {state}, {link}, MTU {mtu}")?;
            for (index, address) in addresses {
                write!(f, ", GID {index} {address}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for SoftroceDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SoftroceDevice {
            address, interface, ..
        } = self;
        write!(f, "softroce  {address} on {interface}")?;
        match &self.unusable {
            Some(why) => write!(f, ": not usable: {why}"),
            None => write!(
                f,
                ", MTU {}, receive buffer {} bytes ({} full packets)",
                self.mtu, self.receive_buffer, self.receive_packets
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_found_and_a_taken_port_is_named() {
        let survey = Survey::take().unwrap();
        let loopback = |survey: &Survey| {
            let mut all = survey.softroce.iter();
            let device = all.find(|d| d.address.is_loopback() && d.address.is_ipv4());
            device.map(ToString::to_string)
        };
        assert!(
            loopback(&survey)
                .unwrap()
                .starts_with("softroce  127.0.0.1 on lo")
        );
        assert_eq!(survey.verbs.is_empty(), survey.no_verbs.is_some());
        let address: IpAddr = "127.93.7.1".parse().unwrap();
        let taken = Socket::bind((address, UDP_PORT).into(), &SocketOptions::default());
        let device = softroce_device(("lo".to_owned(), address));
        // The kernel's rxe may have the port itself.
        let why = device.unusable.expect("the port is taken");
        assert!(why.contains("UDP 127.93.7.1:4791 is in use by"), "{why}");
        drop(taken);
    }

    #[test]
    fn a_small_buffer_brings_advice() {
        let device = |receive_buffer, unusable| SoftroceDevice {
            address: "127.0.0.1".parse().unwrap(),
            interface: "lo".to_owned(),
            unusable,
            mtu: 4096,
            receive_buffer,
            receive_packets: 1,
        };
        let survey = |softroce| Survey {
            verbs: Vec::new(),
            no_verbs: None,
            softroce,
            advice: Vec::new(),
        };
        let small =
            survey(vec![device(425_984, None), device(8 << 20, None)]).with_advice_on_buffers();
        assert!(
            small
                .to_string()
                .contains("sysctl -w net.core.rmem_max=4194304")
        );
        let large = vec![device(8 << 20, None), device(0, Some("no".to_owned()))];
        assert!(survey(large).with_advice_on_buffers().advice.is_empty());
    }
}
