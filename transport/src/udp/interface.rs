//! What the kernel says of interfaces, addresses and routes.
//!
//! Owns: the questions. All are asked of a socket, so the answers are of the network namespace that
//! the thread is in; `/sys` may still show another one's interfaces there.

use std::io;
use std::mem;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;

/// The MTU of the route from `local` to `target`, in bytes, as the kernel knows it.
///
/// # Errors
/// No route, or an address of another family.
pub fn path_mtu(local: SocketAddr, target: SocketAddr) -> io::Result<u32> {
    // Only a connected socket has a route to ask for; this one never sends.
    let probe = UdpSocket::bind(SocketAddr::new(local.ip(), 0))?;
    probe.connect(target)?;
    let (level, name) = match target {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MTU),
        SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_MTU),
    };
    let mut mtu: libc::c_int = 0;
    let mut len = mem::size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: value and length pointers describe live variables of the right size.
    let result = unsafe {
        libc::getsockopt(
            probe.as_raw_fd(),
            level,
            name,
            (&raw mut mtu).cast(),
            &raw mut len,
        )
    };
    if result == 0 {
        Ok(mtu.max(0) as u32)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The MTU of the interface that has this address of ours, in bytes.
///
/// # Errors
/// No interface has it, or the kernel does not say.
pub fn interface_mtu(address: IpAddr) -> io::Result<u32> {
    let name = match address.is_loopback() {
        // All of 127.0.0.0/8 is the loopback interface's; it lists but one.
        true => "lo".into(),
        false => interface_name(address)?,
    };
    let answer = ask(&name, libc::SIOCGIFMTU)?;
    // SAFETY: the kernel has filled this variant.
    let mtu = unsafe { answer.ifr_ifru.ifru_mtu };
    u32::try_from(mtu).map_err(|_| io::ErrorKind::InvalidData.into())
}

pub(super) fn interface_index(address: Ipv6Addr) -> io::Result<u32> {
    let answer = ask(&interface_name(address.into())?, libc::SIOCGIFINDEX)?;
    // SAFETY: the kernel has filled this variant.
    let index = unsafe { answer.ifr_ifru.ifru_ifindex };
    u32::try_from(index).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Asks the kernel one thing about the interface of this name.
fn ask(name: &str, what: libc::Ioctl) -> io::Result<libc::ifreq> {
    // SAFETY: all zero is an empty request.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    // With the zero behind it.
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    let any = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::DGRAM, None)?;
    // SAFETY: the request is alive, and of the type that such calls expect.
    let done = unsafe { libc::ioctl(any.as_raw_fd(), what as _, &raw mut request) };
    match done {
        0 => Ok(request),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The name of the interface that has this address.
fn interface_name(address: IpAddr) -> io::Result<String> {
    let has_it = |(_, each): &(String, IpAddr)| *each == address;
    let found = interface_addresses()?.into_iter().find(has_it);
    let (name, _) = found.ok_or_else(|| io::Error::from_raw_os_error(libc::EADDRNOTAVAIL))?;
    Ok(name)
}

/// The IP addresses of this host, each with the name of its interface.
///
/// # Errors
/// The kernel does not say.
pub fn interface_addresses() -> io::Result<Vec<(String, IpAddr)>> {
    let mut list = std::ptr::null_mut();
    // SAFETY: the list is stored in `list`, to be freed below.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut found = Vec::new();
    let mut next = list;
    // SAFETY: null or an entry of the list, which is valid until freeifaddrs.
    while let Some(entry) = unsafe { next.as_ref() } {
        // SAFETY: null or a socket address of at least this much.
        let family = unsafe { entry.ifa_addr.as_ref() }.map(|name| i32::from(name.sa_family));
        let address = match family {
            Some(libc::AF_INET) => {
                // SAFETY: its family says that it is a sockaddr_in.
                let v4 = unsafe { entry.ifa_addr.cast::<libc::sockaddr_in>().read_unaligned() };
                Some(IpAddr::from(u32::from_be(v4.sin_addr.s_addr).to_be_bytes()))
            }
            Some(libc::AF_INET6) => {
                // SAFETY: its family says that it is a sockaddr_in6.
                let v6 = unsafe { entry.ifa_addr.cast::<libc::sockaddr_in6>().read_unaligned() };
                Some(IpAddr::from(v6.sin6_addr.s6_addr))
            }
            _ => None,
        };
        if let Some(address) = address {
            // SAFETY: the name of an interface is a C string, valid as the entry.
            let name = unsafe { std::ffi::CStr::from_ptr(entry.ifa_name) };
            found.push((name.to_string_lossy().into_owned(), address));
        }
        next = entry.ifa_next;
    }
    // SAFETY: made by getifaddrs above, and not used after this.
    unsafe { libc::freeifaddrs(list) };
    Ok(found)
}
