//! What both sides of the conversation have in common: words, lines, memory.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use lowtide_transport::ibv::{self, Driver};
use lowtide_transport::raw::types::{
    AccessFlags, AsyncEvent, Error, Flush, Mtu, Psn, Remote, SendOp,
};

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

use super::conversation::Result;

pub const QKEY: u32 = 0x1111_1111;
pub const PSN: Psn = Psn::new(0xFF_FFF0); // wraps early
pub const ROOM: usize = 128 << 10;
pub const RIGHTS: AccessFlags = AccessFlags::LOCAL_WRITE
    .with(AccessFlags::REMOTE_WRITE)
    .with(AccessFlags::REMOTE_READ)
    .with(AccessFlags::REMOTE_ATOMIC);
/// Where remote operations work, after the room for messages.
pub const TARGET: u64 = 64 << 10;
pub const GRH: u32 = 40;
pub const LONGEST: u32 = 60_000;
pub const SIZES: [u32; 8] = [1, 3, 63, 1023, 1024, 1025, 4097, LONGEST];
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Every other message has immediate data.
pub fn imm(seed: u8) -> Option<u32> {
    seed.is_multiple_of(2)
        .then_some(0xC0DE_0000 | u32::from(seed))
}

/// A FLUSH of a word, for visibility.
pub fn flush(remote: Remote) -> SendOp {
    SendOp::Flush(Flush {
        remote,
        len: 8,
        global: true,
        persistent: false,
        whole_region: false,
    })
}

/// Waits for an event of a context; others may come before.
pub fn expect_event(
    context: &impl AsFd,
    mut next: impl FnMut() -> Option<AsyncEvent>,
    expected: AsyncEvent,
) -> Result<()> {
    let mut poll = Poll::new()?;
    let (fd, wish) = (context.as_fd().as_raw_fd(), Interest::READABLE);
    poll.registry()
        .register(&mut SourceFd(&fd), Token(0), wish)?;
    let (end, mut events) = (Instant::now() + PATIENCE, Events::with_capacity(4));
    while Instant::now() < end {
        while let Some(event) = next() {
            if event == expected {
                return Ok(());
            }
        }
        poll.poll(&mut events, Some(PATIENCE))?;
    }
    Err(format!("{expected:?} never came").into())
}

/// Whether the device is the kernel's rxe, which drops a FLUSH whose ICRC is right.
pub fn is_rxe(name: &str) -> bool {
    let mut devices = ibv::devices().unwrap_or_default().into_iter();
    devices.any(|device| device.name == name && device.driver == Driver::Rxe)
}

/// Whether that is why.
pub fn is_unsupported(error: &(dyn std::error::Error + 'static)) -> bool {
    matches!(error.downcast_ref(), Some(Error::Unsupported(_)))
}

/// The lesser of two MTUs.
pub trait MinCode {
    fn min_code(self, other: u8) -> Mtu;
}

impl MinCode for Mtu {
    fn min_code(self, other: u8) -> Mtu {
        Mtu::from_code(other.min(self as u8)).unwrap_or(self)
    }
}

/// What each side tells the other.
#[derive(Clone, Copy, Debug)]
pub struct Half {
    pub qpn: u32,
    pub datagram_qpn: u32,
    pub mtu: u8,
    pub gid: u128,
    pub va: u64,
    pub rkey: u32,
    /// It understands a FLUSH.
    pub flush: bool,
}

impl Half {
    pub fn line(&self) -> String {
        let Half {
            qpn,
            datagram_qpn,
            mtu,
            gid,
            va,
            rkey,
            flush,
        } = self;
        format!("{qpn} {datagram_qpn} {mtu} {gid} {va} {rkey} {flush}\n")
    }

    pub fn parse(line: &str) -> Result<Half> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [qpn, datagram_qpn, mtu, gid, va, rkey, flush] = words[..] else {
            return Err(format!("the peer says {line:?}").into());
        };
        Ok(Half {
            qpn: qpn.parse()?,
            datagram_qpn: datagram_qpn.parse()?,
            mtu: mtu.parse()?,
            gid: gid.parse()?,
            va: va.parse()?,
            rkey: rkey.parse()?,
            flush: flush.parse()?,
        })
    }
}

/// Lines over TCP.
pub struct Line(pub BufReader<TcpStream>);

impl Line {
    pub fn tell(&mut self, text: &str) -> Result<()> {
        Ok(self.0.get_mut().write_all(text.as_bytes())?)
    }

    pub fn hear(&mut self) -> Result<String> {
        let mut text = String::new();
        match self.0.read_line(&mut text)? {
            0 => Err("the peer has left".into()),
            _ => Ok(text),
        }
    }

    /// The server's verdict, or its "ready".
    pub fn expect(&mut self, word: &str) -> Result<()> {
        let heard = self.hear()?;
        (heard.trim() == word)
            .then_some(())
            .ok_or_else(|| heard.into())
    }
}

/// Registered memory that is only reached by raw pointers.
#[derive(Clone, Copy)]
pub struct Room(*mut u8);

impl Room {
    pub fn new() -> Room {
        let words = vec![0u64; ROOM / 8].into_boxed_slice();
        Room(Box::leak(words).as_mut_ptr().cast())
    }

    pub fn address(self) -> u64 {
        self.0.expose_provenance() as u64
    }

    pub fn byte(seed: u8, i: u64) -> u8 {
        seed.wrapping_add((i as u8).wrapping_mul(7))
            .wrapping_add((i >> 8) as u8)
    }

    pub fn fill(self, at: u64, len: u32, seed: u8) {
        for i in 0..u64::from(len) {
            // SAFETY: callers stay inside the room, which is never freed.
            unsafe {
                self.0
                    .add((at + i) as usize)
                    .write_volatile(Room::byte(seed, i))
            };
        }
    }

    pub fn check(self, at: u64, len: u32, seed: u8) -> Result<()> {
        for i in 0..u64::from(len) {
            // SAFETY: as above.
            let byte = unsafe { self.0.add((at + i) as usize).read_volatile() };
            if byte != Room::byte(seed, i) {
                return Err(format!("byte {i} of {len} is {byte:#x}").into());
            }
        }
        Ok(())
    }

    pub fn word(self, at: u64) -> *mut u64 {
        // SAFETY: as above; the room and `at` are aligned.
        unsafe { self.0.add(at as usize).cast() }
    }
}
