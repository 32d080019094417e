//! Our way to a peer on this host: its ring, and what the peer has told of itself.
//!
//! Owns: the connection from our end, the peer's doorbell, table and slabs as they came, and the look
//! into that table before the peer's memory is reached.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

use socket2::{Domain, Socket, Type};

use super::copy::{self, Theirs};
use super::exports::{self, Wish, find, grants};
use super::note::{Link, Note, hear, tell};
use super::ring::{Sender, words_of};
use super::segment::Segment;
use super::{RING_UNITS, name};
use crate::memory::Key;
use crate::raw::event_fd::EventFd;

/// Slabs of one peer that are mapped here; each takes a file descriptor of this process. More are
/// reached by other means.
pub(super) const SLABS_MAX: usize = 64;
/// Notes that are heard at once: more than a socket holds, so that only a peer that never ends has
/// more.
const NOTES_MAX: usize = 4096;

/// Our way to a peer.
#[derive(Debug)]
pub(super) struct Outlet {
    pub(super) link: Link,
    pub(super) peer: SocketAddr,
    pub(super) ring: Segment,
    pub(super) sender: Sender,
    /// Wakes the peer; it comes with the peer's answer, as what follows.
    pub(super) doorbell: Option<EventFd>,
    table: Option<Segment>,
    /// The system lets us reach the peer's memory.
    is_reachable: bool,
    pub(super) slabs: HashMap<u32, Segment>,
    /// Something was sent since the peer was last looked at.
    pub(super) is_dirty: bool,
    pub(super) is_gone: bool,
}

impl Outlet {
    /// A way to the peer; none to one that is not of our user.
    ///
    /// # Errors
    /// Nobody listens there or its process has ended, or the system has no file descriptor or no memory.
    pub(super) fn connect(local: SocketAddr, peer: SocketAddr) -> io::Result<Option<Outlet>> {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
        socket.set_nonblocking(true)?;
        socket.connect(&name(peer)?)?;
        let Some(link) = Link::new(socket)? else {
            return Ok(None);
        };
        let ring = Segment::create(8 * words_of(RING_UNITS))?;
        let sender = Sender::new(ring.words());
        tell(&link.socket, &Note::Hello(local), &[ring.as_fd()])?;
        Ok(Some(Outlet {
            link,
            peer,
            ring,
            sender,
            doorbell: None,
            table: None,
            is_reachable: false,
            slabs: HashMap::new(),
            is_dirty: false,
            is_gone: false,
        }))
    }

    /// The right to reach the peer's memory, once it has introduced itself.
    pub(super) fn direct(&self) -> Option<Direct<'_>> {
        let table = self.table.as_ref()?;
        self.sender.begin_reaching(self.ring.words());
        Some(Direct {
            outlet: self,
            table,
        })
    }

    /// Takes what the peer has to say.
    pub(super) fn hear(&mut self, is_direct: bool) {
        for _ in 0..NOTES_MAX {
            match hear(&self.link.socket) {
                Ok(None) => return,
                Ok(Some((note, fds))) => {
                    if self.note(note, fds, is_direct).is_none() {
                        self.is_gone = true;
                        return;
                    }
                }
                Err(_) => {
                    self.is_gone = true;
                    return;
                }
            }
        }
    }

    /// None for what makes no sense.
    fn note(&mut self, note: Note, fds: Vec<OwnedFd>, is_direct: bool) -> Option<()> {
        let mut fds = fds.into_iter();
        match note {
            Note::Welcome { probe, word } if self.doorbell.is_none() => {
                let doorbell = EventFd::adopt(fds.next()?).ok()?;
                let table = Segment::adopt(fds.next()?, exports::TABLE_LEN).ok()?;
                (self.doorbell, self.table) = (Some(doorbell), Some(table));
                self.is_reachable = is_direct && copy::can_reach(self.link.pid, probe, word);
            }
            Note::Slab(key) if self.doorbell.is_some() => {
                // One that cannot be had or mapped, or is one too many, is reached by other means.
                if self.slabs.len() < SLABS_MAX
                    && let Some(Ok(slab)) = fds.next().map(|file| Segment::adopt(file, 8))
                {
                    self.slabs.insert(key.0, slab);
                }
            }
            Note::SlabGone(key) => {
                self.slabs.remove(&key.0);
            }
            _ => return None,
        }
        Some(())
    }
}

/// The right to reach a peer's memory; the peer takes nothing out of service meanwhile.
#[derive(Debug)]
pub(crate) struct Direct<'h> {
    outlet: &'h Outlet,
    table: &'h Segment,
}

impl Direct<'_> {
    /// Where the range lies, if the peer's table allows this to a queue pair connected to `qpn`, and
    /// it can be reached.
    pub(crate) fn find(
        &self,
        qpn: u32,
        key: Key,
        (va, len): (u64, usize),
        wish: Wish,
    ) -> Option<Theirs<'_>> {
        let domain = grants(self.table, qpn, wish)?;
        let found = find(self.table, key, domain, (va, len), wish)?;
        if found.is_slab
            && let Some(slab) = self.outlet.slabs.get(&key.0)
        {
            let offset = usize::try_from(found.offset).ok()?;
            let is_inside = offset.checked_add(len).is_some_and(|end| end <= slab.len());
            return is_inside.then_some(Theirs::Mapped(slab, offset));
        }
        // A process that has ended may have left its number to another.
        let link = &self.outlet.link;
        let is_alive = self.outlet.is_reachable && !link.has_ended();
        is_alive.then_some(Theirs::Process(link.pid, found.address))
    }
}

impl Drop for Direct<'_> {
    fn drop(&mut self) {
        let words = self.outlet.ring.words();
        self.outlet.sender.end_reaching(words);
    }
}
