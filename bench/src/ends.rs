//! Two soft-RoCE devices that talk over loopback, each used by a thread with a processor to itself.
//!
//! Owns: where things run and under which addresses, so that a yardstick runs the same way. The
//! thread of a device is started by the one that uses it, and so stays on its processor.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use lowtide_transport::verbs::{
    Access, Address, Buffer, CompletionQueue, Device, DeviceOptions, MemoryRegion,
    ProtectionDomain, QueuePair, Remote, SameHost, Status, WorkCompletion,
};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::Failure;

/// Longest silence that is no failure.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// Work requests in one queue of a queue pair.
pub const DEPTH: u32 = 128;

/// A loopback address that no other process is likely to use.
pub fn address(last: u8) -> SocketAddr {
    let pid = std::process::id();
    let ip = Ipv4Addr::new(127, 100 + (pid >> 8 & 15) as u8, pid as u8, last);
    (ip, 4791).into()
}

/// The processors of the two sides: the first and the last that this process may use.
///
/// # Errors
/// The system does not say.
pub fn processors() -> Result<[usize; 2], Failure> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).map_err(Failure::broken)?;
    let all: Vec<usize> = (0..CpuSet::count())
        .filter(|cpu| allowed.is_set(*cpu).unwrap_or(false))
        .collect();
    match (all.first(), all.last()) {
        (Some(first), Some(last)) => Ok([*first, *last]),
        _ => Err(Failure::broken("no processor")),
    }
}

/// Runs both sides at once, each on its processor.
///
/// # Errors
/// The first side's, or else the second's.
pub fn on_two<A: Send, B: Send>(
    one: impl FnOnce() -> Result<A, Failure> + Send,
    other: impl FnOnce() -> Result<B, Failure> + Send,
) -> Result<(A, B), Failure> {
    let [first, last] = processors()?;
    thread::scope(|scope| {
        let other = scope.spawn(move || bind_to(last).and_then(|()| other()));
        let one = scope.spawn(move || bind_to(first).and_then(|()| one()));
        let one = one.join().expect("a side does not panic");
        let other = other.join().expect("a side does not panic");
        Ok((one?, other?))
    })
}

fn bind_to(cpu: usize) -> Result<(), Failure> {
    let mut set = CpuSet::new();
    set.set(cpu)
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set))
        .map_err(|error| Failure::Broken(format!("processor {cpu}: {error}")))
}

/// What one end tells the other.
type Card = (Address, Remote);

/// A way for two ends to find each other.
pub struct Meeting {
    tell: Sender<Card>,
    hear: Receiver<Card>,
}

impl Meeting {
    /// Both halves.
    pub fn pair() -> (Meeting, Meeting) {
        let ((to_other, from_one), (to_one, from_other)) = (channel(), channel());
        let half = |tell, hear| Meeting { tell, hear };
        (half(to_other, from_other), half(to_one, from_one))
    }
}

/// How an end is opened: its address, the bytes of its memory, its half of the meeting.
pub type Opener = fn(u8, usize, Meeting) -> Result<End, Failure>;

/// One end of a reliable connection.
pub struct End {
    pub domain: ProtectionDomain,
    pub queue: CompletionQueue,
    pub qp: QueuePair,
    /// What the other end may read and write.
    _memory: MemoryRegion,
    /// The other end's.
    pub remote: Remote,
}

impl End {
    /// Opens a device with `bytes` of memory on loopback address `last` and connects to the end that
    /// has the other half of the meeting.
    ///
    /// # Errors
    /// The address is taken, or the other end did not come.
    pub fn open(last: u8, bytes: usize, meeting: Meeting) -> Result<End, Failure> {
        End::open_at(address(last), bytes, meeting)
    }

    /// The same on any address.
    ///
    /// # Errors
    /// As `open`.
    pub fn open_at(own: SocketAddr, bytes: usize, meeting: Meeting) -> Result<End, Failure> {
        let device = Device::open(own, &DeviceOptions::default()).map_err(Failure::io(own))?;
        End::of(&device, bytes, meeting)
    }

    /// The same of a device that reaches peers on this host by shared memory.
    ///
    /// # Errors
    /// As `open`.
    pub fn open_on_host(last: u8, bytes: usize, meeting: Meeting) -> Result<End, Failure> {
        let (own, options) = (
            address(last),
            DeviceOptions {
                same_host: SameHost::Direct,
                ..DeviceOptions::default()
            },
        );
        let device = Device::open(own, &options).map_err(Failure::io(own))?;
        End::of(&device, bytes, meeting)
    }

    fn of(device: &Device, bytes: usize, meeting: Meeting) -> Result<End, Failure> {
        let domain = device.protection_domain();
        let queue = device.completion_queue(2 * DEPTH);
        let qp = domain
            .queue_pair(&queue, &queue, DEPTH, DEPTH)
            .map_err(Failure::broken)?;
        let memory = domain
            .memory_region(bytes, Access::ALL)
            .map_err(Failure::broken)?;
        qp.to_init(Access::ALL).map_err(Failure::broken)?;
        // An end that gave up has dropped its half.
        let _ = meeting.tell.send((qp.address(), memory.remote(0)));
        let (peer, remote) = meeting.hear.recv().map_err(Failure::broken)?;
        qp.connect(&peer).map_err(Failure::broken)?;
        Ok(End {
            domain,
            queue,
            qp,
            _memory: memory,
            remote,
        })
    }

    /// A slot of `len` bytes, to be posted whole.
    ///
    /// # Errors
    /// The device has no room.
    pub fn slot(&self, len: usize) -> Result<Buffer, Failure> {
        let slot = self.domain.slot(len).map_err(Failure::broken)?;
        Ok(Buffer::Slot(slot, len as u32))
    }

    /// The next completion, asked for without rest.
    ///
    /// # Errors
    /// It failed, or none comes.
    pub fn next(&self) -> Result<WorkCompletion, Failure> {
        let done = insist(|| self.queue.poll())?;
        checked(&done)?;
        Ok(done)
    }

    /// The same for up to `max` at once, appended to `done`; how many.
    ///
    /// # Errors
    /// One failed, or none comes.
    pub fn next_many(&self, max: usize, done: &mut Vec<WorkCompletion>) -> Result<usize, Failure> {
        let count = insist(|| match self.queue.poll_many(max, done) {
            0 => None,
            count => Some(count),
        })?;
        done.iter().try_for_each(checked)?;
        Ok(count)
    }
}

fn checked(done: &WorkCompletion) -> Result<(), Failure> {
    match done.status {
        Status::Success => Ok(()),
        status => Err(Failure::Broken(format!("{:?}: {status:?}", done.kind))),
    }
}

/// Asks without rest until there is an answer.
///
/// # Errors
/// None came for long.
pub fn insist<T>(mut ask: impl FnMut() -> Option<T>) -> Result<T, Failure> {
    let mut asked = 0u32;
    let mut began = None;
    loop {
        if let Some(answer) = ask() {
            return Ok(answer);
        }
        asked += 1;
        // The clock is not read in the first microseconds of a wait.
        if asked.is_multiple_of(1024) && began.get_or_insert_with(Instant::now).elapsed() > PATIENCE
        {
            return Err(Failure::broken("the other side is silent"));
        }
    }
}

/// The whole slot of a completion, to be posted again.
pub fn slot_of(done: WorkCompletion) -> Buffer {
    match done.slot {
        Some(slot) => {
            let len = slot.len() as u32;
            Buffer::Slot(slot, len)
        }
        None => Buffer::Empty,
    }
}

/// A bare UDP socket that never sleeps, unconnected as those of soft-RoCE are.
///
/// # Errors
/// The address is taken.
pub fn bare_socket(last: u8) -> io::Result<std::net::UdpSocket> {
    let socket = std::net::UdpSocket::bind(address(last))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}
