//! What two devices tell each other over their socket, and the file descriptors that go with it.
//!
//! Owns: the form of a note, and the socket calls around it; and who has the other end ([`Link`]). A
//! note is one message of [`NOTE_LEN`] bytes on a SOCK_SEQPACKET socket; whatever else comes ends the
//! connection.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use socket2::Socket;

use super::segment::check;
use crate::memory::Key;

const NOTE_LEN: usize = 48;
const MAGIC: u32 = 0x4c54_4e01;
/// File descriptors of one note at most.
const FDS_MAX: usize = 2;
/// Room for the control message that carries them.
const CONTROL_WORDS: usize = 8;

/// A note, but for its file descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Note {
    /// From who connects: its device's address. With the ring that it will send in.
    Hello(SocketAddr),
    /// The answer: an address of ours and the word that lies there, to try whether our memory can be
    /// reached. With our doorbell and our table.
    Welcome { probe: u64, word: u64 },
    /// From who was connected to: a region that can be mapped. With its file.
    Slab(Key),
    /// It is out of service.
    SlabGone(Key),
}

impl Note {
    fn emit(&self) -> [u8; NOTE_LEN] {
        let (kind, words, tail) = match *self {
            Note::Hello(address) => {
                let ip = match address.ip() {
                    IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                    IpAddr::V6(v6) => v6,
                };
                (1u32, [u64::from(address.port()), 0], ip.octets())
            }
            Note::Welcome { probe, word } => (2, [probe, word], [0; 16]),
            Note::Slab(key) => (3, [key.0.into(), 0], [0; 16]),
            Note::SlabGone(key) => (4, [key.0.into(), 0], [0; 16]),
        };
        let mut bytes = [0; NOTE_LEN];
        bytes[..4].copy_from_slice(&MAGIC.to_ne_bytes());
        bytes[4..8].copy_from_slice(&kind.to_ne_bytes());
        bytes[8..16].copy_from_slice(&words[0].to_ne_bytes());
        bytes[16..24].copy_from_slice(&words[1].to_ne_bytes());
        bytes[24..40].copy_from_slice(&tail);
        bytes
    }

    fn parse(bytes: &[u8; NOTE_LEN]) -> Option<Note> {
        let half = |at: usize| bytes[at..at + 4].try_into().map(u32::from_ne_bytes).ok();
        let word = |at: usize| bytes[at..at + 8].try_into().map(u64::from_ne_bytes).ok();
        if half(0)? != MAGIC {
            return None;
        }
        let key = Key(word(8)? as u32);
        Some(match half(4)? {
            1 => {
                let ip: [u8; 16] = bytes[24..40].try_into().ok()?;
                let ip = Ipv6Addr::from_octets(ip).to_canonical();
                Note::Hello(SocketAddr::new(ip, u16::try_from(word(8)?).ok()?))
            }
            2 => Note::Welcome {
                probe: word(8)?,
                word: word(16)?,
            },
            3 => Note::Slab(key),
            4 => Note::SlabGone(key),
            _ => return None,
        })
    }
}

#[repr(align(8))]
struct Control([u64; CONTROL_WORDS]);

/// Sends a note; never blocks.
///
/// # Errors
/// The socket's: `WouldBlock` if the peer does not read what it is told.
pub(super) fn tell(socket: &Socket, note: &Note, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    assert!(fds.len() <= FDS_MAX);
    let bytes = note.emit();
    let vector = IoSlice::new(&bytes);
    let mut control = Control([0; CONTROL_WORDS]);
    // SAFETY: an all-zero msghdr is a valid one.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    // An IoSlice is an iovec.
    message.msg_iov = (&raw const vector).cast_mut().cast();
    message.msg_iovlen = 1;
    if !fds.is_empty() {
        let len = size_of_val(fds) as u32;
        message.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: arithmetic.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(len) } as usize;
        assert!(message.msg_controllen <= size_of::<Control>());
        // SAFETY: the control block is aligned, zeroed and long enough for one header with `len`
        // bytes, as just asserted; a BorrowedFd is a plain file descriptor.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(len) as usize;
            std::ptr::copy_nonoverlapping(
                fds.as_ptr().cast::<u8>(),
                libc::CMSG_DATA(header),
                len as usize,
            );
        }
    }
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the message points at live variables; the kernel only reads them.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) };
    check(sent as libc::c_int)
}

/// The next note, if one waits. Fewer file descriptors come with it than were sent if we may have no
/// more.
///
/// # Errors
/// `UnexpectedEof` when the peer is gone, `InvalidData` for what is no note; or the socket's.
pub(super) fn hear(socket: &Socket) -> io::Result<Option<(Note, Vec<OwnedFd>)>> {
    let mut bytes = [0u8; NOTE_LEN];
    let mut vector = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: NOTE_LEN,
    };
    let mut control = Control([0; CONTROL_WORDS]);
    // SAFETY: an all-zero msghdr is a valid one.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut vector;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = size_of::<Control>();
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the message points at live variables of the lengths that it says.
    let len = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
    if len < 0 {
        let error = io::Error::last_os_error();
        return match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
            io::ErrorKind::ConnectionReset => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Err(error),
        };
    }
    // Whatever came with it is ours to close.
    let fds = take_fds(&message);
    if len == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let is_whole = message.msg_flags & libc::MSG_TRUNC == 0;
    let note = Note::parse(&bytes).filter(|_| is_whole && len as usize == NOTE_LEN);
    match note {
        Some(note) => Ok(Some((note, fds))),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn take_fds(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: `message` is as the kernel left it, so its control block is valid for
    // `msg_controllen` bytes, and an SCM_RIGHTS header carries file descriptors that nobody else
    // has, as many as its length says.
    unsafe {
        let mut next = libc::CMSG_FIRSTHDR(message);
        while let Some(header) = next.as_ref() {
            if (header.cmsg_level, header.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                let len = header.cmsg_len - libc::CMSG_LEN(0) as usize;
                let first = libc::CMSG_DATA(header).cast::<libc::c_int>();
                for i in 0..len / size_of::<libc::c_int>() {
                    fds.push(OwnedFd::from_raw_fd(first.add(i).read_unaligned()));
                }
            }
            next = libc::CMSG_NXTHDR(message, header);
        }
    }
    fds
}

/// A connection with a device of another process, or of this one.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) socket: Socket,
    /// The process that opened the other end.
    pub(super) pid: libc::pid_t,
    /// A pidfd of that process: readable once it has ended. A child that it has forked may have the
    /// socket, and would keep it from hanging up. None on kernels that have no such thing (before
    /// 5.3, or behind a filter of system calls): there only the socket tells.
    process: Option<OwnedFd>,
}

impl Link {
    /// The connection with whoever has the other end of `socket`; none if that does not run under our
    /// user.
    ///
    /// # Errors
    /// The process has ended already, or the system has no file descriptor.
    pub(super) fn new(socket: Socket) -> io::Result<Option<Link>> {
        let Some(pid) = peer_of_ours(&socket) else {
            return Ok(None);
        };
        let process = match watch_process(pid) {
            Ok(process) => Some(process),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => None,
            Err(error) => return Err(error),
        };
        Ok(Some(Link {
            socket,
            pid,
            process,
        }))
    }

    /// Has `token` occur when the peer says something and when it ends.
    ///
    /// # Errors
    /// The system has no memory.
    pub(super) fn register(&self, registry: &Registry, token: Token) -> io::Result<()> {
        let socket = self.socket.as_raw_fd();
        registry.register(&mut SourceFd(&socket), token, Interest::READABLE)?;
        match &self.process {
            Some(process) => {
                let process = process.as_raw_fd();
                registry.register(&mut SourceFd(&process), token, Interest::READABLE)
            }
            None => Ok(()),
        }
    }

    /// Whether the other end is closed, or its process has ended.
    pub(super) fn has_ended(&self) -> bool {
        self.look().contains(&true)
    }

    /// Whether its process has ended, as far as can be known.
    pub(super) fn has_process_ended(&self) -> bool {
        self.look()[1]
    }

    /// Whether the socket is hung up, and whether the process has ended.
    fn look(&self) -> [bool; 2] {
        let of = |fd: libc::c_int, events| libc::pollfd {
            fd,
            events,
            revents: 0,
        };
        // A negative number is passed over.
        let process = self.process.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        // Hanging up is told unasked.
        let mut polls = [of(self.socket.as_raw_fd(), 0), of(process, libc::POLLIN)];
        // SAFETY: two live entries.
        let _ = unsafe { libc::poll(polls.as_mut_ptr(), 2, 0) };
        polls.map(|poll| poll.revents != 0)
    }
}

/// A file descriptor of a process. Of the next one of that number, if it has ended since its number
/// was learnt and nobody waits for it any more: then its sockets tell.
fn watch_process(pid: libc::pid_t) -> io::Result<OwnedFd> {
    // SAFETY: plain arguments.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    check(fd as libc::c_int)?;
    // SAFETY: the call above has just made it, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

/// The process at the other end, if it runs under our user.
fn peer_of_ours(socket: &Socket) -> Option<libc::pid_t> {
    let mut found = MaybeUninit::<libc::ucred>::zeroed();
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: value and length describe a live variable.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            found.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    check(result).ok()?;
    // SAFETY: filled by the kernel, and all zero is a value of it, too.
    let found = unsafe { found.assume_init() };
    (found.uid == user() && found.pid > 0).then_some(found.pid)
}

/// The user that we act as.
pub(super) fn user() -> libc::uid_t {
    // SAFETY: no argument.
    unsafe { libc::geteuid() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use socket2::{Domain, Type};
    use std::os::fd::AsFd;

    #[test]
    fn notes_and_files_arrive_and_rubbish_ends_the_connection() {
        let (a, b) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None).unwrap();
        let notes = [
            Note::Hello("127.1.2.3:4791".parse().unwrap()),
            Note::Hello("[fd00::7]:65535".parse().unwrap()),
            Note::Welcome {
                probe: u64::MAX,
                word: 7,
            },
            Note::Slab(Key(u32::MAX)),
            Note::SlabGone(Key(0)),
        ];
        for (count, note) in notes.into_iter().enumerate() {
            let fds = [a.as_fd(), b.as_fd()];
            tell(&a, &note, &fds[..count % 3]).unwrap();
            let (heard, fds) = hear(&b).unwrap().unwrap();
            assert_eq!((heard, fds.len()), (note, count % 3));
        }
        assert!(hear(&b).unwrap().is_none());
        assert_eq!(peer_of_ours(&a), Some(std::process::id() as i32));
        for rubbish in [&b"short"[..], &[0; NOTE_LEN], &[1; NOTE_LEN + 1]] {
            a.send(rubbish).unwrap();
            assert_eq!(hear(&b).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        let link = Link::new(b).unwrap().unwrap();
        assert!(!link.has_ended());
        drop(a);
        assert!(link.has_ended());
        let ended = hear(&link.socket).unwrap_err();
        assert_eq!(ended.kind(), io::ErrorKind::UnexpectedEof);
    }
    /// Whoever knows our name may connect; who runs under another user is not let in.
    #[test]
    fn another_users_process_is_none_of_ours() {
        if user() != 0 {
            // Only root may be somebody else.
            eprintln!("NOT CHECKED: a connection of another user");
            assert!(std::env::var_os("LOWTIDE_CHECK_ALL").is_none());
            return;
        }
        let name = format!("\0lowtide-test/{}", std::process::id());
        let name = socket2::SockAddr::unix(name).unwrap();
        let new = || Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
        let listener = new();
        listener.bind(&name).unwrap();
        listener.listen(2).unwrap();
        for nobody in [None, Some(65_534)] {
            let name = name.clone();
            let stranger = std::thread::spawn(move || {
                if let Some(nobody) = nobody {
                    let keep = -1;
                    // SAFETY: plain arguments. To the kernel users are those of threads.
                    let done = unsafe { libc::syscall(libc::SYS_setresuid, keep, nobody, keep) };
                    assert_eq!(done, 0);
                }
                let socket = new();
                socket.connect(&name).unwrap();
                socket
            });
            let _stranger = stranger.join().unwrap();
            let (socket, _) = listener.accept().unwrap();
            let link = Link::new(socket).unwrap();
            assert_eq!(link.is_some(), nobody.is_none());
        }
    }
}
