//! What both sides of the conversation have in common: words, lines, memory.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;

use super::conversation::{ROOM, Result};

/// What each side tells the other.
#[derive(Clone, Copy, Debug)]
pub struct Half {
    pub qpn: u32,
    pub datagram_qpn: u32,
    pub mtu: u8,
    pub gid: u128,
    pub va: u64,
    pub rkey: u32,
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
        } = self;
        format!("{qpn} {datagram_qpn} {mtu} {gid} {va} {rkey}\n")
    }

    pub fn parse(line: &str) -> Result<Half> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [qpn, datagram_qpn, mtu, gid, va, rkey] = words[..] else {
            return Err(format!("the peer says {line:?}").into());
        };
        Ok(Half {
            qpn: qpn.parse()?,
            datagram_qpn: datagram_qpn.parse()?,
            mtu: mtu.parse()?,
            gid: gid.parse()?,
            va: va.parse()?,
            rkey: rkey.parse()?,
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
