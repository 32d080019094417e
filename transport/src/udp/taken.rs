//! A port that is taken: by whom, and what to do.
//!
//! Only looked for after `bind` has failed, in `/proc`; a guess is never told as if it were known.

use std::fmt;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

/// Why an address and port could not be bound: somebody has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Taken {
    address: SocketAddr,
    by: Holder,
}

/// Who has a port.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Holder {
    /// This one.
    Ourselves,
    /// Its id and name.
    Process(u32, String),
    /// No process that we may look into; the kernel's soft-RoCE is loaded.
    KernelOrHidden,
    /// No process that we may look into.
    Hidden,
    /// Nobody any more.
    Gone,
}

impl Taken {
    /// The error of a `bind` that was told so.
    pub(super) fn error(address: SocketAddr) -> io::Error {
        let taken = Taken {
            address,
            by: holder(address),
        };
        io::Error::new(io::ErrorKind::AddrInUse, taken)
    }
}

impl fmt::Display for Taken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UDP {} is in use by ", self.address)?;
        match &self.by {
            Holder::Ourselves => f.write_str("another device of this process: share that one"),
            Holder::Process(id, name) => write!(f, "process {id} ({name}): stop it"),
            Holder::KernelOrHidden => f.write_str(
                "the kernel's rdma_rxe, or a process of another user: take the device away \
                 (`rdma link`, `rdma link delete NAME`), use it through libibverbs",
            ),
            Holder::Hidden => {
                f.write_str("a process of another user (`ss -ulpn` as root names it): stop it")
            }
            Holder::Gone => f.write_str("nobody any more: try again"),
        }?;
        f.write_str(", or choose another address, or another port at both ends")
    }
}

impl std::error::Error for Taken {}

fn holder(address: SocketAddr) -> Holder {
    let sockets = ["/proc/net/udp", "/proc/net/udp6"]
        .iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .flat_map(|table| table.lines().filter_map(entry).collect::<Vec<_>>())
        .filter(|(local, _)| {
            local.port() == address.port()
                && (local.ip().is_unspecified() || local.ip() == address.ip())
        });
    let mut is_held = false;
    for (_, inode) in sockets {
        is_held = true;
        if let Some(id) = process_with(inode) {
            if id == std::process::id() {
                return Holder::Ourselves;
            }
            let name = fs::read_to_string(format!("/proc/{id}/comm")).unwrap_or_default();
            return Holder::Process(id, name.trim_end().to_owned());
        }
    }
    match (is_held, Path::new("/sys/module/rdma_rxe").exists()) {
        (false, _) => Holder::Gone,
        (true, true) => Holder::KernelOrHidden,
        (true, false) => Holder::Hidden,
    }
}

/// A line of the kernel's table: where a socket is bound, and its inode.
fn entry(line: &str) -> Option<(SocketAddr, u64)> {
    let mut words = line.split_whitespace().skip(1);
    let (ip, port) = words.next()?.split_once(':')?;
    let inode = words.nth(7)?.parse().ok()?;
    // Words of 32 bits in the order of this machine.
    let word = |at: usize| {
        let digits = ip.get(at..at + 8)?;
        u32::from_str_radix(digits, 16).ok().map(u32::to_ne_bytes)
    };
    let ip: IpAddr = match ip.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let words = [word(0)?, word(8)?, word(16)?, word(24)?];
            Ipv6Addr::from_octets(words.concat().try_into().ok()?).to_canonical()
        }
        _ => return None,
    };
    let port = u16::from_str_radix(port, 16).ok()?;
    Some((SocketAddr::new(ip, port), inode))
}

/// The process that has this socket, if we may see it.
fn process_with(inode: u64) -> Option<u32> {
    let wanted = format!("socket:[{inode}]");
    fs::read_dir("/proc").ok()?.flatten().find_map(|process| {
        let id = process.file_name().to_str()?.parse().ok()?;
        let has_it = fs::read_dir(process.path().join("fd"))
            .ok()?
            .flatten()
            .any(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.as_os_str() == wanted.as_str()));
        has_it.then_some(id)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_kernels_tables_are_read() {
        let v4 = " 1234: 0100007F:12B7 00000000:0000 07 00000000:00000000 00:00000000 00000000  \
                  1000        0 98765 2 0000000000000000 0";
        let local = SocketAddr::from(([127, 0, 0, 1], 4791));
        assert_eq!(entry(v4), Some((local, 98_765)));
        let v6 = "  77: 00000000000000000000000001000000:12B7 \
                  00000000000000000000000000000000:0000 07 00000000:00000000 00:00000000 00000000 \
                  0 0 31 2 0 0";
        let local = SocketAddr::from((Ipv6Addr::LOCALHOST, 4791));
        assert_eq!(entry(v6), Some((local, 31)));
        for bad in [
            "",
            "  sl  local_address rem_address   st",
            "1: 01:2 3 4 5 6 7 8 9 10",
        ] {
            assert_eq!(entry(bad), None);
        }
    }

    #[test]
    fn the_words_say_who_and_what_to_do() {
        let address = SocketAddr::from(([127, 0, 0, 1], 4791));
        let words = |by| Taken { address, by }.to_string();
        let process = words(Holder::Process(12, "ucx".to_owned()));
        assert!(process.starts_with("UDP 127.0.0.1:4791 is in use by process 12 (ucx): stop it"));
        assert!(words(Holder::KernelOrHidden).contains("rdma link delete"));
        for by in [Holder::Ourselves, Holder::Hidden, Holder::Gone] {
            assert!(words(by).ends_with("or another port at both ends"));
        }
    }
}
