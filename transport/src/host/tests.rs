//! Two devices' rings, without the devices.

use std::time::Duration;

use super::outlet::SLABS_MAX;
use super::ring::Sender;
use super::*;
use crate::memory::Key;

fn address() -> SocketAddr {
    use std::sync::atomic::{AtomicU8, Ordering};
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let pid = std::process::id();
    let last = NEXT.fetch_add(1, Ordering::Relaxed);
    let ip = [127, 64 | (pid >> 8 & 63) as u8, pid as u8, last];
    SocketAddr::from((ip, 4791))
}

struct Side {
    hosts: Hosts,
    exports: Exports,
    batch: HostBatch,
    poll: mio::Poll,
}

impl Side {
    fn new() -> Side {
        let (hosts, exports) = Hosts::open(address(), SameHost::Direct, 0xFEED).unwrap();
        let poll = mio::Poll::new().unwrap();
        let fd = hosts.as_raw_fd();
        poll.registry()
            .register(&mut SourceFd(&fd), Token(9), Interest::READABLE)
            .unwrap();
        Side {
            hosts,
            exports,
            batch: HostBatch::default(),
            poll,
        }
    }

    /// The records that have come.
    fn take(&mut self) -> Vec<Vec<u8>> {
        self.hosts.attend(&mut self.exports);
        self.hosts.receive(&mut self.batch);
        self.hosts.sweep(&mut self.exports);
        let packets = self.batch.packets();
        packets.map(|(_, packet)| packet.to_vec()).collect()
    }

    fn is_woken(&mut self, patience: Duration) -> bool {
        let mut events = Events::with_capacity(4);
        self.poll.poll(&mut events, Some(patience)).unwrap();
        !events.is_empty()
    }
}

#[test]
fn who_sleeps_is_woken_each_time() {
    let (mut a, mut b) = (Side::new(), Side::new());
    let outlet = a.hosts.connect(b.hosts.local).unwrap();
    for round in 0..200u8 {
        // Some messages find the receiver awake, and some are taken by somebody else than who sleeps.
        assert!(b.take().is_empty());
        while b.is_woken(Duration::ZERO) {}
        if round % 3 > 0 {
            assert!(b.hosts.may_sleep());
        }
        assert!(a.hosts.send(outlet, &[&[round]]));
        a.hosts.ring_doorbells();
        if round % 3 == 1 {
            assert!(b.is_woken(Duration::from_secs(5)), "round {round}");
        }
        assert_eq!(b.take(), [[round]]);
    }
}

/// A connection to a device's listener from whom it does not know.
fn stranger(to: &Side) -> Socket {
    let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
    socket.connect(&name(to.hosts.local).unwrap()).unwrap();
    socket
}

/// Whether the device has ended the connection.
fn is_turned_away(by: &mut Side, socket: &Socket) -> bool {
    by.take();
    Link::new(socket.try_clone().unwrap())
        .unwrap()
        .unwrap()
        .has_ended()
}

fn loose_file(len: usize) -> OwnedFd {
    let path = std::env::temp_dir().join(format!("lowtide-loose-{}-{len}", std::process::id()));
    let file = std::fs::File::create_new(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    file.set_len(len as u64).unwrap();
    file.into()
}

#[test]
fn whoever_breaks_the_rules_is_turned_away_and_harms_nobody() {
    let (mut a, mut b) = (Side::new(), Side::new());
    let outlet = a.hosts.connect(b.hosts.local).unwrap();
    let hello = Note::Hello(address());
    let ring = |units: usize, is_begun: bool| {
        let segment = Segment::create(8 * words_of(units)).unwrap();
        if is_begun {
            Sender::new(segment.words());
        }
        segment
    };
    let (short, strange, good) = (ring(1, true), ring(64, false), ring(64, true));
    let loose = loose_file(8 * words_of(64));
    for (note, files) in [
        (hello, vec![]),
        (hello, vec![short.as_fd()]),
        (hello, vec![strange.as_fd()]),
        (hello, vec![loose.as_fd()]),
        (Note::Slab(Key(1)), vec![good.as_fd()]),
        (Note::SlabGone(Key(1)), vec![]),
    ] {
        let socket = stranger(&b);
        assert!(!is_turned_away(&mut b, &socket), "it has said nothing yet");
        tell(&socket, &note, &files).unwrap();
        assert!(is_turned_away(&mut b, &socket), "{note:?}");
    }
    let socket = stranger(&b);
    socket.send(b"rubbish").unwrap();
    assert!(is_turned_away(&mut b, &socket));
    // A second word is one too many.
    let socket = stranger(&b);
    tell(&socket, &hello, &[good.as_fd()]).unwrap();
    assert!(!is_turned_away(&mut b, &socket));
    tell(&socket, &hello, &[good.as_fd()]).unwrap();
    assert!(is_turned_away(&mut b, &socket));
    // Somebody who is known, and then writes rubbish where a length should be.
    let (socket, ring) = (stranger(&b), ring(64, true));
    tell(&socket, &hello, &[ring.as_fd()]).unwrap();
    assert!(!is_turned_away(&mut b, &socket));
    for word in &ring.words()[64..] {
        word.store(u64::MAX, std::sync::atomic::Ordering::Relaxed);
    }
    b.take();
    assert!(is_turned_away(&mut b, &socket));

    assert!(a.hosts.send(outlet, &[b"still here"]));
    assert_eq!(b.take(), [b"still here"]);
    a.take();
    assert!(a.hosts.direct(outlet).is_some(), "and introduced");
}

#[test]
fn a_peer_that_breaks_its_own_index_or_leaves_is_gone_for_us() {
    let mut a = Side::new();
    for leaves in [false, true] {
        let mut b = Side::new();
        let outlet = a.hosts.connect(b.hosts.local).unwrap();
        b.take();
        a.take();
        assert_eq!(a.hosts.poll_gone(), None);
        if leaves {
            drop(b);
        } else {
            let Some(Some(Outlet { ring, .. })) = a.hosts.outlets.first() else {
                panic!("it is the first");
            };
            ring.words()[8].store(u64::MAX, std::sync::atomic::Ordering::Relaxed);
            // The index is looked at when there seems to be no room.
            let long = vec![0; 60_000];
            while a.hosts.send(outlet, &[&long]) {}
            drop(b);
        }
        a.take();
        let gone = Gone {
            outlet,
            is_turned_away: false,
        };
        assert_eq!(a.hosts.poll_gone(), Some(gone));
        assert_eq!(a.hosts.poll_gone(), None);
        a.hosts.disconnect(outlet);
    }
}

/// Each would take a file descriptor, of which this process has few.
#[test]
fn a_peer_with_many_slabs_has_some_of_them_mapped() {
    let (mut a, mut b) = (Side::new(), Side::new());
    let outlet = a.hosts.connect(b.hosts.local).unwrap();
    b.take();
    a.take();
    let access = crate::memory::Access::ALL;
    let slab = Arc::new(Segment::create(4096).unwrap());
    for index in 0..3 * SLABS_MAX as u32 {
        let place = (0, 0, 4096);
        b.exports
            .show(Key(index << 8), 1, access, place, Some(&slab));
        a.take();
    }
    assert_eq!(a.hosts.outlets[0].as_ref().unwrap().slabs.len(), SLABS_MAX);
    b.exports.withdraw(Key(0));
    a.take();
    let known = &a.hosts.outlets[0].as_ref().unwrap().slabs;
    assert_eq!(known.len(), SLABS_MAX - 1);
    assert_eq!(a.hosts.poll_gone(), None);
    assert!(a.hosts.direct(outlet).is_some());
}

#[test]
fn what_was_sent_before_leaving_arrives_even_if_nobody_had_let_the_sender_in() {
    let mut b = Side::new();
    let mut a = Side::new();
    let outlet = a.hosts.connect(b.hosts.local).unwrap();
    assert!(a.hosts.send(outlet, &[b"last words"]));
    drop(a);
    assert_eq!(b.take(), [b"last words"]);
    assert!(matches!(b.hosts.inlets[..], [Entry::Free]));
}

/// Who has nothing to spare for a ring hangs up without a word, and so does who ends; but then nobody
/// has its name.
#[test]
fn who_turns_us_away_is_still_there_and_who_leaves_is_not() {
    for is_there in [false, true] {
        let (mut a, at) = (Side::new(), address());
        let listener = Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
        listener.bind(&name(at).unwrap()).unwrap();
        listener.listen(8).unwrap();
        let outlet = a.hosts.connect(at).unwrap();
        assert_eq!(a.hosts.poll_gone(), None);
        // Who waits at a listener that is closed hears of it.
        let listener = is_there.then_some(listener);
        if let Some(listener) = &listener {
            drop(listener.accept().unwrap());
        }
        a.take();
        let gone = Gone {
            outlet,
            is_turned_away: is_there,
        };
        assert_eq!(a.hosts.poll_gone(), Some(gone));
    }
}

#[test]
fn a_name_is_had_once_and_nobody_answers_where_nobody_listens() {
    let mut a = Side::new();
    let taken = Hosts::open(a.hosts.local, SameHost::Rings, 1).unwrap_err();
    assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
    assert_eq!(a.hosts.connect(address()), None);
}
