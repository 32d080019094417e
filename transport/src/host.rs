//! The provider `host`: between devices of one user on one host packets go through shared memory.
//!
//! A device that is opened with [`SameHost::Rings`] or [`SameHost::Direct`] reaches every peer device
//! that was opened so, too, without the network: addresses, queue pairs, states, completions and
//! errors are softroce's, because they are made by the same state machines. Peers elsewhere, or that
//! did not ask for it, are reached by UDP as ever; so are datagrams and the connection manager.
//!
//! How it works. A device listens on a socket in the abstract namespace, under its user and its
//! address. Who is given a peer connects there, hands over a ring (`ring`) in a sealed memfd
//! (`segment`), and sends in it from then on; the other direction is the peer's own connection. The
//! answer (`note`) brings an eventfd to wake the peer, and its table of queue pairs and regions
//! (`exports`). With that, a WRITE, READ or atomic whose turn has come is carried out by the
//! initiator (`copy`): in memory that is mapped on both sides, or by `process_vm_readv` and
//! `process_vm_writev` if a try at connecting has shown that the system lets us. Whatever is not
//! found in the table or cannot be reached goes through the ring as packets, and the peer's engine
//! judges and copies; so refusals are always the target's own.
//!
//! Order: the initiator acts only when everything before is acknowledged, and what comes after leaves
//! later. So what a SEND announces has been written, and nothing is written that should have been
//! flushed.
//!
//! **Trust.** Peers on this path must trust each other as threads of one program do. Only processes of
//! one user meet, and the checks of keys, rights and bounds are the initiator's, against a table that
//! the target shows; a peer that skips them writes where it likes, which a process of the same user
//! could do by other means. Against mistakes and crashes this side is safe: nothing that a peer
//! writes into a ring, a note or a table makes it panic or leave its memory, and a peer's death is
//! noticed at once: its sockets hang up, and a pidfd tells if a child that it has forked still has
//! them. But memory that a peer says it is reaching stays in service until
//! the peer has done, or dies: nobody could take it away from under a copy.
//!
//! Deliberately absent: faults and capture, which are about wires (a device with either uses UDP
//! only); windows and datagrams as direct accesses.

#[allow(unsafe_code)] // copies into the memory of other processes
mod copy;
mod exports;
#[allow(unsafe_code)] // file descriptors as control messages
mod note;
mod outlet;
mod ring;
#[allow(unsafe_code)] // mappings
mod segment;

use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use mio::unix::SourceFd;
use mio::{Events, Interest, Token};
use socket2::{Domain, SockAddr, Socket, Type};

pub(crate) use self::copy::{Ours, Theirs, Way, atomic, copy};
pub(crate) use self::exports::{Exports, QpEntry, Reader, Wish};
use self::note::{Link, Note, hear, tell};
pub(crate) use self::outlet::Direct;
use self::outlet::Outlet;
use self::ring::{Receiver, words_of};
pub(crate) use self::segment::Segment;
use crate::raw::event_fd::EventFd;
use crate::udp::{HEADER_MAX, TRAILER_MAX};

/// Units of a ring, 64 bytes each: twice what a peer's budget lets be under way.
const RING_UNITS: usize = 1 << 14;
/// Full packets that a ring holds for one direction of requests, and as many for what they ask for.
pub(crate) const RING_PACKETS: u32 = 96;
/// Records taken from one ring in one turn at most.
const RECORDS_MAX: usize = 64;
/// Bytes of a full packet and its headers.
const RECORD_LEN: usize = 4096 + HEADER_MAX + TRAILER_MAX;
/// Rings at once, to us; who comes later is turned away and uses UDP.
const INLETS_MAX: usize = 4096;
const LISTENER: Token = Token(0);
const DOORBELL: Token = Token(1);
/// Tokens of connections: from here on, outlets even and inlets odd.
const LINKS: usize = 2;

/// How a device reaches peers on its own host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SameHost {
    /// By UDP, as all others.
    #[default]
    Udp,
    /// By rings in shared memory; the target's engine copies.
    Rings,
    /// By rings; and WRITE, READ and atomics by the initiator, where the system lets it.
    Direct,
}

/// What came in through rings.
#[derive(Debug, Default)]
pub(crate) struct HostBatch {
    /// The records, each from the beginning of a word.
    words: Vec<[u8; 8]>,
    /// Whose they are, and which bytes of `words`.
    records: Vec<(SocketAddr, Range<usize>)>,
}

impl HostBatch {
    pub(crate) fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// The packets and their sources.
    pub(crate) fn packets(&self) -> impl Iterator<Item = (SocketAddr, &[u8])> {
        let bytes = self.words.as_flattened();
        let packet = |(source, range): &(_, Range<usize>)| (*source, &bytes[range.clone()]);
        self.records.iter().map(packet)
    }
}

/// A peer's way to us.
#[derive(Debug)]
struct Inlet {
    reader: Arc<Reader>,
    receiver: Receiver,
    source: SocketAddr,
    /// No more will come than lies in the ring.
    is_closed: bool,
    /// What lies there makes no sense.
    is_broken: bool,
}

impl Inlet {
    fn is_waiting(&self) -> bool {
        !self.is_broken && self.receiver.is_waiting(self.reader.ring.words())
    }

    /// Whether nothing will come any more.
    fn is_over(&self) -> bool {
        self.is_broken || (self.is_closed && !self.is_waiting())
    }
}

#[derive(Debug)]
enum Entry {
    Free,
    /// It has not said who it is.
    Unnamed(Link),
    Named(Inlet),
}

/// An outlet that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gone {
    pub(crate) outlet: u32,
    /// The peer, or we, had nothing to spare for a ring; the peer may be reached by other means.
    pub(crate) is_turned_away: bool,
}

/// All rings of one device. See the [module](self).
#[derive(Debug)]
pub(crate) struct Hosts {
    local: SocketAddr,
    is_direct: bool,
    listener: Socket,
    poll: mio::Poll,
    occurred: Events,
    doorbell: EventFd,
    /// A word for peers to try to read.
    probe: Box<u64>,
    outlets: Vec<Option<Outlet>>,
    inlets: Vec<Entry>,
    /// Outlets whose peer is gone and of which nobody has been told.
    gone: Vec<Gone>,
    /// To be given up when there is no file descriptor left, so that who waits can be turned away.
    spare: Option<OwnedFd>,
}

/// The name that a device listens under.
fn name(address: SocketAddr) -> io::Result<SockAddr> {
    let user = note::user();
    SockAddr::unix(format!("\0lowtide-host/{user}/{address}"))
}

/// Whether a device may listen under an address: false if it is known that none does.
fn may_listen(address: SocketAddr) -> bool {
    let tried = Socket::new(Domain::UNIX, Type::SEQPACKET, None).and_then(|socket| {
        socket.set_nonblocking(true)?;
        socket.connect(&name(address)?)
    });
    !tried.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

impl Hosts {
    /// Listens for peers of the device at `local`.
    ///
    /// # Errors
    /// `AddrInUse` when somebody has the name; or the system's.
    pub(crate) fn open(
        local: SocketAddr,
        kind: SameHost,
        word: u64,
    ) -> io::Result<(Hosts, Exports)> {
        let listener = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
        listener.set_nonblocking(true)?;
        listener.bind(&name(local)?)?;
        listener.listen(1024)?;
        let doorbell = EventFd::new()?;
        let poll = mio::Poll::new()?;
        for (fd, token) in [
            (listener.as_raw_fd(), LISTENER),
            (doorbell.as_fd().as_raw_fd(), DOORBELL),
        ] {
            poll.registry()
                .register(&mut SourceFd(&fd), token, Interest::READABLE)?;
        }
        let spare = Some(doorbell.as_fd().try_clone_to_owned()?);
        let hosts = Hosts {
            local,
            is_direct: kind == SameHost::Direct,
            listener,
            poll,
            occurred: Events::with_capacity(64),
            doorbell,
            probe: Box::new(word),
            outlets: Vec::new(),
            inlets: Vec::new(),
            gone: Vec::new(),
            spare,
        };
        Ok((hosts, Exports::new()?))
    }

    /// Makes a way to a peer; none if it is not on this host, not of our user, or uses UDP only.
    pub(crate) fn connect(&mut self, peer: SocketAddr) -> Option<u32> {
        let outlet = Outlet::connect(self.local, peer).ok()??;
        let index = match self.outlets.iter().position(Option::is_none) {
            Some(index) => index,
            None => {
                self.outlets.push(None);
                self.outlets.len() - 1
            }
        };
        let token = Token(LINKS + 2 * index);
        outlet.link.register(self.poll.registry(), token).ok()?;
        self.outlets[index] = Some(outlet);
        Some(index as u32)
    }

    pub(crate) fn disconnect(&mut self, outlet: u32) {
        self.outlets[outlet as usize] = None;
        self.gone.retain(|gone| gone.outlet != outlet);
    }

    /// Sends a packet; false if it was lost.
    pub(crate) fn send(&mut self, outlet: u32, parts: &[&[u8]]) -> bool {
        self.send_by(outlet, |sender, ring| sender.send(ring, parts))
    }

    /// The same of one that lies in whole words, of whose bytes the first `len` count.
    pub(crate) fn send_words(&mut self, outlet: u32, words: &[[u8; 8]], len: usize) -> bool {
        self.send_by(outlet, |sender, ring| sender.send_words(ring, words, len))
    }

    #[inline]
    fn send_by(
        &mut self,
        outlet: u32,
        send: impl FnOnce(&mut ring::Sender, &[ring::Word]) -> Result<bool, ring::Broken>,
    ) -> bool {
        let Some(Some(outlet)) = self.outlets.get_mut(outlet as usize) else {
            return false;
        };
        match send(&mut outlet.sender, outlet.ring.words()) {
            Ok(is_sent) => {
                outlet.is_dirty |= is_sent;
                is_sent
            }
            Err(ring::Broken) => {
                // The socket's end follows, and with it everything else.
                let _ = outlet.link.socket.shutdown(std::net::Shutdown::Both);
                false
            }
        }
    }

    /// Wakes the peers that sleep and have been sent something.
    pub(crate) fn ring_doorbells(&mut self) {
        for outlet in self.outlets.iter_mut().flatten() {
            if std::mem::take(&mut outlet.is_dirty) && outlet.sender.is_wanted(outlet.ring.words())
            {
                if outlet.doorbell.is_none() {
                    // It was sent before the peer could say that it sleeps.
                    outlet.hear(self.is_direct);
                }
                if let Some(doorbell) = &outlet.doorbell {
                    doorbell.raise();
                }
            }
        }
    }

    /// A way to a peer on which the initiator may act by itself.
    pub(crate) fn direct(&mut self, outlet: u32) -> Option<Direct<'_>> {
        let outlet = self.outlets.get(outlet as usize)?.as_ref();
        let outlet = outlet.filter(|_| self.is_direct)?;
        outlet.direct()
    }

    /// Takes what has come into `batch`; whether that was all.
    pub(crate) fn receive(&mut self, batch: &mut HostBatch) -> bool {
        batch.words.clear();
        batch.records.clear();
        // What one peer may bring in one turn, so that it grows only for several.
        batch.words.reserve(RECORDS_MAX * RECORD_LEN / 8);
        batch.records.reserve(RECORDS_MAX);
        let mut is_drained = true;
        for entry in &mut self.inlets {
            let Entry::Named(inlet) = entry else { continue };
            for _ in 0..RECORDS_MAX {
                let start = 8 * batch.words.len();
                let words = inlet.reader.ring.words();
                match inlet.receiver.receive(words, &mut batch.words) {
                    Ok(Some(len)) => batch.records.push((inlet.source, start..start + len)),
                    Ok(None) => break,
                    Err(ring::Broken) => {
                        inlet.is_broken = true;
                        let _ = inlet.reader.link.socket.shutdown(std::net::Shutdown::Both);
                        break;
                    }
                }
            }
            is_drained &= !inlet.is_waiting();
        }
        is_drained
    }

    /// Looks at connections: new ones, news on old ones, and those that have ended.
    pub(crate) fn attend(&mut self, exports: &mut Exports) {
        loop {
            let polled = self
                .poll
                .poll(&mut self.occurred, Some(std::time::Duration::ZERO));
            if polled.is_err() || self.occurred.is_empty() {
                return;
            }
            // Out of the way, and back: none takes no memory.
            let occurred = std::mem::replace(&mut self.occurred, Events::with_capacity(0));
            for event in &occurred {
                let token = event.token().0;
                match token.checked_sub(LINKS) {
                    None if token == LISTENER.0 => self.accept(exports),
                    None => {}
                    Some(link) if link % 2 == 0 => self.hear_outlet(link / 2),
                    Some(link) => self.hear_inlet(link / 2, exports),
                }
            }
            self.occurred = occurred;
        }
    }

    fn accept(&mut self, exports: &mut Exports) {
        loop {
            match self.listener.accept() {
                Ok((socket, _)) => self.let_in(socket, exports),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Nobody would tell us again that somebody waits; if somebody does: the kernel looks
                // for a descriptor first.
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
                        && self.spare.take().is_some()
                        && self.listener.accept().is_ok() => {}
                Err(_) => break,
            }
            self.keep_spare();
        }
        self.keep_spare();
    }

    fn keep_spare(&mut self) {
        if self.spare.is_none() {
            self.spare = self.doorbell.as_fd().try_clone_to_owned().ok();
        }
    }

    fn let_in(&mut self, socket: Socket, exports: &mut Exports) {
        let free = self.inlets.iter().position(|e| matches!(e, Entry::Free));
        let index = free.unwrap_or(self.inlets.len());
        if index >= INLETS_MAX || socket.set_nonblocking(true).is_err() {
            return;
        }
        let Ok(Some(link)) = Link::new(socket) else {
            return;
        };
        let token = Token(LINKS + 2 * index + 1);
        if link.register(self.poll.registry(), token).is_err() {
            return;
        }
        if index == self.inlets.len() {
            self.inlets.push(Entry::Free);
        }
        self.inlets[index] = Entry::Unnamed(link);
        self.hear_inlet(index, exports);
    }

    fn hear_inlet(&mut self, index: usize, exports: &mut Exports) {
        let Some(entry) = self.inlets.get_mut(index) else {
            return;
        };
        match std::mem::replace(entry, Entry::Free) {
            Entry::Free => {}
            Entry::Unnamed(link) => match hear(&link.socket) {
                // Not if it has ended in silence and left its socket to a child.
                Ok(None) if !link.has_ended() => *entry = Entry::Unnamed(link),
                Ok(Some((Note::Hello(source), fds))) => {
                    // What is no ring, or cannot be answered, is dropped with its connection.
                    if let Some(inlet) = self.welcome(link, source, fds, exports) {
                        self.inlets[index] = Entry::Named(inlet);
                    }
                }
                Ok(_) | Err(_) => {}
            },
            Entry::Named(mut inlet) => {
                // Nothing more is said on it, so it can only have ended.
                let link = &inlet.reader.link;
                inlet.is_closed |= !matches!(hear(&link.socket), Ok(None)) || link.has_ended();
                match inlet.is_over() {
                    true => exports.remove_reader(&inlet.reader),
                    false => *entry = Entry::Named(inlet),
                }
            }
        }
    }

    fn welcome(
        &self,
        link: Link,
        source: SocketAddr,
        fds: Vec<OwnedFd>,
        exports: &mut Exports,
    ) -> Option<Inlet> {
        let ring = fds.into_iter().next()?;
        let ring = Segment::adopt(ring, 8 * words_of(2)).ok()?;
        let receiver = Receiver::new(ring.words()).ok()?;
        let note = Note::Welcome {
            probe: (&raw const *self.probe).expose_provenance() as u64,
            word: *self.probe,
        };
        // Who has left already may have left something in its ring.
        let told = tell(
            &link.socket,
            &note,
            &[self.doorbell.as_fd(), exports.table()],
        );
        let reader = Arc::new(Reader { ring, link });
        exports.add_reader(reader.clone());
        // Who sleeps while another thread lets the peer in is woken, too.
        receiver.may_sleep(reader.ring.words());
        Some(Inlet {
            reader,
            receiver,
            source,
            is_closed: told.is_err(),
            is_broken: false,
        })
    }

    fn hear_outlet(&mut self, index: usize) {
        let Some(Some(outlet)) = self.outlets.get_mut(index) else {
            return;
        };
        outlet.hear(self.is_direct);
        outlet.is_gone |= outlet.link.has_ended();
        if outlet.is_gone && !self.gone.iter().any(|gone| gone.outlet == index as u32) {
            self.gone.push(Gone {
                outlet: index as u32,
                is_turned_away: outlet.doorbell.is_none()
                    && !outlet.link.has_process_ended()
                    && may_listen(outlet.peer),
            });
        }
    }

    /// An outlet that has ended. Ask when everything that came has been taken: it may be the
    /// answer to what was sent there.
    pub(crate) fn poll_gone(&mut self) -> Option<Gone> {
        self.gone.pop()
    }

    /// Forgets the inlets that have ended.
    pub(crate) fn sweep(&mut self, exports: &mut Exports) {
        for entry in &mut self.inlets {
            let is_over = matches!(entry, Entry::Named(inlet) if inlet.is_over());
            if is_over && let Entry::Named(inlet) = std::mem::replace(entry, Entry::Free) {
                exports.remove_reader(&inlet.reader);
            }
        }
    }

    /// Says that we are going to sleep on [`Self::as_raw_fd`]; false if something has come.
    pub(crate) fn may_sleep(&self) -> bool {
        // All of them: whoever sends next must know.
        self.named().fold(true, |may, inlet| {
            let may_sleep = inlet.receiver.may_sleep(inlet.reader.ring.words());
            (may_sleep || inlet.is_broken) && may
        })
    }

    fn named(&self) -> impl Iterator<Item = &Inlet> {
        self.inlets.iter().filter_map(|entry| match entry {
            Entry::Named(inlet) => Some(inlet),
            _ => None,
        })
    }
}

/// Readable when something has come for somebody who sleeps, and when [`Hosts::attend`] is due.
impl AsRawFd for Hosts {
    fn as_raw_fd(&self) -> RawFd {
        self.poll.as_raw_fd()
    }
}

#[cfg(test)]
mod tests;
