//! Why calls fail, and what C calls it.

use std::fmt;

use super::{InvalidTransition, QpAttrMask, QpState};

/// What every provider but softroce answers to whoever wants a capture file: it makes its packets itself,
/// and they pass no code of ours.
pub const NO_CAPTURE: Error = Error::Unsupported(
    "capture of its own: `tcpdump -i INTERFACE udp port 4791` sees the packets of the kernel's soft-RoCE, \
     ibdump, or tcpdump on an interface with RDMA sniffing, those of an adapter; `lowtide dissect` reads \
     what they write",
);

/// Why a call failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// There is no such transition.
    Transition(InvalidTransition),
    /// The transition needs these attributes too.
    MissingAttributes(QpAttrMask),
    /// The transition does not take these attributes.
    ExcessAttributes(QpAttrMask),
    /// An argument lies outside what the named limit allows.
    Limit(&'static str),
    /// An argument makes no sense.
    Argument(&'static str),
    /// The queue is full; completions must come first.
    QueueFull,
    /// The queue pair's state does not admit posting.
    State(QpState),
    /// Part of this memory is not there, or not as accessible as asked.
    Fault {
        /// Its first byte.
        addr: u64,
        /// Its length.
        len: u64,
    },
    /// The device has no room for another object of this kind.
    Exhausted(&'static str),
    /// Something still uses it.
    Busy(&'static str),
    /// The provider does not have this.
    Unsupported(&'static str),
    /// The operating system's own words.
    Os(i32),
}

impl Error {
    /// The number that the C function returns.
    pub const fn errno(self) -> i32 {
        match self {
            Error::QueueFull | Error::Exhausted(_) => libc::ENOMEM,
            Error::Fault { .. } => libc::EFAULT,
            Error::Busy(_) => libc::EBUSY,
            Error::Unsupported(_) => libc::EOPNOTSUPP,
            Error::Os(errno) => errno,
            _ => libc::EINVAL,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Transition(error) => error.fmt(f),
            Error::MissingAttributes(mask) => write!(f, "the transition also needs {mask:?}"),
            Error::ExcessAttributes(mask) => write!(f, "the transition does not take {mask:?}"),
            Error::Limit(what) => write!(f, "{what} is beyond what the device can do"),
            Error::Argument(what) => write!(f, "{what}"),
            Error::QueueFull => f.write_str("the queue is full: poll its completion queue first"),
            Error::State(state) => write!(f, "nothing can be posted in state {state:?}"),
            Error::Fault { addr, len } => write!(
                f,
                "memory {addr:#x}+{len:#x} is not mapped, or not writable as the access flags ask"
            ),
            Error::Exhausted(what) => write!(f, "the device has no room for another {what}"),
            Error::Busy(what) => write!(f, "still in use by {what}"),
            Error::Unsupported(what) => write!(f, "the provider has no {what}"),
            Error::Os(errno) => std::io::Error::from_raw_os_error(*errno).fmt(f),
        }
    }
}

impl std::error::Error for Error {}

impl From<InvalidTransition> for Error {
    fn from(error: InvalidTransition) -> Error {
        Error::Transition(error)
    }
}

impl From<Error> for std::io::Error {
    fn from(error: Error) -> std::io::Error {
        std::io::Error::from_raw_os_error(error.errno())
    }
}
