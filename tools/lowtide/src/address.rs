//! Addresses for a cluster on one machine: loopback ones, or ports of a device's address.
//!
//! Each node of a run gets an address of its own in 127.0.0.0/8, derived from the supervisor's
//! process id, so that two runs at once do not meet. The port is RoCEv2's 4791; where somebody
//! holds it on every address (the kernel's soft-RoCE binds the wildcard), another one.
//!
//! Linux answers on all of 127.0.0.0/8 without configuration.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};

/// UDP ports tried, in order. The first is RoCEv2's own.
const PORTS: [u16; 3] = [4791, 14791, 24791];
/// UDP ports at a device's address.
const DEVICE_PORTS: std::ops::Range<u16> = 10_000..30_000;
/// Blocks of addresses tried before giving up.
const BLOCKS_TRIED: u32 = 64;
/// Addresses of one block: 127.x.y.1 to 127.x.y.250.
pub const NODES_MAX: usize = 250;
/// Number of blocks: x from 1 (so that 127.0.0.1 is never touched) to 255, y from 0 to 255.
const BLOCKS: u32 = 255 * 256;

/// Every port was taken, or the machine has no such network.
#[derive(Debug, thiserror::Error)]
#[error("no free addresses for {nodes} nodes; the last one tried was {address}: {error}")]
pub struct NoAddress {
    /// How many were wanted.
    pub nodes: usize,
    /// The last one tried.
    pub address: SocketAddr,
    /// Why it could not be had.
    pub error: io::Error,
}

/// Finds `nodes` (at most [`NODES_MAX`]) free addresses with one port. They are free when this
/// returns; nothing keeps them free until the nodes bind them but the process id in them.
///
/// # Errors
/// [`NoAddress`] after 64 blocks.
pub fn choose(process_id: u32, nodes: usize) -> Result<Vec<SocketAddr>, NoAddress> {
    assert!(nodes <= NODES_MAX, "callers limit the size of a cluster");
    let mut last = None;
    for attempt in 0..BLOCKS_TRIED {
        // Process ids that differ by a few give blocks that differ; a second attempt jumps far.
        let block = (process_id.wrapping_add(attempt * 7919)) % BLOCKS;
        let (x, y) = ((block / 256 + 1) as u8, (block % 256) as u8);
        for port in PORTS {
            let addresses: Vec<SocketAddr> = (1..=nodes as u8)
                .map(|z| (Ipv4Addr::new(127, x, y, z), port).into())
                .collect();
            match first_taken(&addresses) {
                None => return Ok(addresses),
                Some(taken) => last = Some(taken),
            }
        }
    }
    let (address, error) = last.expect("at least one attempt failed");
    Err(NoAddress {
        nodes,
        address,
        error,
    })
}

/// Finds `nodes` free UDP ports at one address of a device, below those that the kernel gives out, so
/// that a node that is started again finds its own free.
///
/// # Errors
/// [`NoAddress`]: the address is not this machine's, or has no free ports.
pub fn of_device(
    address: IpAddr,
    process_id: u32,
    nodes: usize,
) -> Result<Vec<SocketAddr>, NoAddress> {
    let first = DEVICE_PORTS.start + process_id as u16 % (DEVICE_PORTS.len() as u16);
    let ports = (first..DEVICE_PORTS.end).chain(DEVICE_PORTS.start..first);
    let mut found = Vec::new();
    let mut last = None;
    for address in ports.map(|port| SocketAddr::new(address, port)) {
        match UdpSocket::bind(address) {
            Ok(_) => found.push(address),
            Err(error) => last = Some((address, error)),
        }
        if found.len() == nodes {
            return Ok(found);
        }
    }
    let (address, error) = last.expect("there are more ports than nodes");
    Err(NoAddress {
        nodes,
        address,
        error,
    })
}

fn first_taken(addresses: &[SocketAddr]) -> Option<(SocketAddr, io::Error)> {
    addresses.iter().find_map(|address| {
        UdpSocket::bind(address)
            .err()
            .map(|error| (*address, error))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_processes_get_different_addresses_on_the_usual_port() {
        let id = std::process::id();
        let a = choose(id, 9).unwrap();
        let b = choose(id.wrapping_add(1), 9).unwrap();
        assert_eq!(a.len(), 9);
        assert!(a.iter().all(|x| !b.contains(x)));
        assert!(a.iter().all(|x| x.ip().is_loopback()));
        assert!(a.iter().all(|x| x.port() == a[0].port()));
    }

    #[test]
    fn ports_at_one_address_are_free_and_different() {
        let here = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let process = std::process::id();
        let first = of_device(here, process, 9).unwrap();
        let held = UdpSocket::bind(first[3]).unwrap();
        let second = of_device(here, process, 9).unwrap();
        assert_eq!(second.len(), 9);
        assert!(!second.contains(&held.local_addr().unwrap()));
        let nowhere = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
        assert!(of_device(nowhere, process, 9).is_err());
    }

    #[test]
    fn what_is_taken_is_avoided() {
        // An id of its own, so that tests running beside this one do not matter.
        let id = std::process::id().wrapping_add(30_000);
        let first = choose(id, 3).unwrap();
        let taken = UdpSocket::bind(first[2]).unwrap();
        let second = choose(id, 3).unwrap();
        assert!(!second.contains(&taken.local_addr().unwrap()));
        assert_eq!(second[0].ip(), first[0].ip(), "another port was free");
        assert_ne!(second[0].port(), first[0].port());
    }
}
