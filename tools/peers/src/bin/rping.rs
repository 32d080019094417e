//! The other end of librdmacm's `rping`: connections by rdma_cm's handshake, then for each ping a
//! SEND that advertises memory, a READ of it, another advertisement, and a WRITE back.
//!
//! `rping OWN-ADDRESS [SERVER] [PINGS] [BYTES] [DELAY]`
//!
//! Without SERVER ("-" stands for none) it serves one client: `rping -c -V -C 10 -a OWN-ADDRESS`. It thinks
//! about the request for DELAY seconds before it accepts.
//! With one, it is the client of `rping -s -V`, which checks what it gets.
#![forbid(unsafe_code)]

use std::error::Error;
use std::net::IpAddr;
use std::time::Duration;

use lowtide_transport::cm::{ConnectOptions, Connection, Event, EventChannel, ServiceId};
use lowtide_transport::verbs::{
    Access, Buffer, CompletionKind, CompletionQueue, Device, DeviceOptions, MemoryRegion,
    ProtectionDomain, QueuePair, Remote, Rkey, SendOp, Status, WorkCompletion,
};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Address, key and length of a buffer, big endian.
const ADVERTISEMENT: u32 = 16;
const PATIENCE: Duration = Duration::from_secs(20);
/// How long a client that has its last ball may take to hang up. librdmacm's destroys its connection
/// right after it has asked for the end, and the kernel then never repeats a request that was lost.
const FAREWELL: Duration = Duration::from_secs(5);

struct End {
    domain: ProtectionDomain,
    /// One for what is sent and one for what comes: an answer may overtake the acknowledgement.
    queues: [CompletionQueue; 2],
    buffer: MemoryRegion,
    bytes: u32,
}

impl End {
    fn new(device: &Device, bytes: u32) -> Outcome<End> {
        let domain = device.protection_domain();
        Ok(End {
            queues: [device.completion_queue(4), device.completion_queue(4)],
            buffer: domain.memory_region(bytes as usize, Access::ALL)?,
            domain,
            bytes,
        })
    }

    /// A queue pair that one advertisement may be sent to.
    fn queue_pair(&self) -> Outcome<QueuePair> {
        let [sends, recvs] = &self.queues;
        let qp = self.domain.queue_pair(sends, recvs, 4, 4)?;
        qp.to_init(Access::ALL)?;
        self.expect(&qp)?;
        Ok(qp)
    }

    fn expect(&self, qp: &QueuePair) -> Outcome<()> {
        let slot = self.domain.slot(ADVERTISEMENT as usize)?;
        Ok(qp.post_recv(0, Buffer::Slot(slot, ADVERTISEMENT))?)
    }

    fn next(&self, kind: CompletionKind) -> Outcome<WorkCompletion> {
        let queue = &self.queues[usize::from(kind == CompletionKind::Recv)];
        let done = queue.wait(PATIENCE).ok_or("silence for 20 s")?;
        if (done.status, done.kind) == (Status::Success, kind) {
            return Ok(done);
        }
        Err(format!("{:?} ended with {:?}, not {kind:?}", done.kind, done.status).into())
    }

    /// Tells the peer where our buffer is; where that does not matter, that it is its turn.
    fn advertise(&self, qp: &QueuePair) -> Outcome<()> {
        self.post_advertisement(qp)?;
        self.next(CompletionKind::Send).map(drop)
    }

    fn post_advertisement(&self, qp: &QueuePair) -> Outcome<()> {
        let Remote { va, rkey } = self.buffer.remote(0);
        let mut slot = self.domain.slot(ADVERTISEMENT as usize)?;
        slot[..8].copy_from_slice(&va.to_be_bytes());
        slot[8..12].copy_from_slice(&rkey.0.to_be_bytes());
        slot[12..].copy_from_slice(&self.bytes.to_be_bytes());
        Ok(qp.post_send(1, SendOp::Send, Buffer::Slot(slot, ADVERTISEMENT))?)
    }

    /// Waits for the peer's advertisement: where its buffer is, and how long.
    fn learn(&self, qp: &QueuePair) -> Outcome<(Remote, u32)> {
        let told = self
            .next(CompletionKind::Recv)?
            .slot
            .ok_or("it had a slot")?;
        self.expect(qp)?;
        let (va, rest) = told.split_first_chunk::<8>().ok_or("16 bytes")?;
        let word = |at: usize| u32::from_be_bytes([0, 1, 2, 3].map(|i| rest[at + i]));
        let remote = Remote {
            va: u64::from_be_bytes(*va),
            rkey: Rkey(word(0)),
        };
        Ok((remote, word(4)))
    }

    fn serve(&self, qp: &QueuePair, pings: u32) -> Outcome<()> {
        for ping in 1..=pings {
            let (source, len) = self.learn(qp)?;
            qp.post_send(2, SendOp::Read(source), self.buffer.range(0, len))?;
            self.next(CompletionKind::Read)?;
            self.advertise(qp)?;
            let (sink, len) = self.learn(qp)?;
            qp.post_send(3, SendOp::Write(sink), self.buffer.range(0, len))?;
            self.next(CompletionKind::Write)?;
            self.post_advertisement(qp)?;
            // Whoever has got the last one hangs up, maybe before its acknowledgement is here.
            if ping < pings {
                self.next(CompletionKind::Send)?;
            }
        }
        Ok(())
    }

    fn ping(&self, qp: &QueuePair, pings: u32) -> Outcome<()> {
        for ping in 0..pings {
            // A string of C: rping's server sends no more back than that.
            let letter = |i| b'A' + ((ping + i) % 58) as u8;
            let mut ball: Vec<u8> = (0..self.bytes).map(letter).collect();
            ball[self.bytes as usize - 1] = 0;
            self.buffer.write(0, &ball);
            self.advertise(qp)?;
            self.learn(qp)?;
            self.buffer.write(0, &vec![0; ball.len()]);
            self.advertise(qp)?;
            self.learn(qp)?;
            let mut back = vec![0; ball.len()];
            self.buffer.read(0, &mut back);
            (back == ball).then_some(()).ok_or("it came back changed")?;
        }
        Ok(())
    }
}

fn main() -> Outcome<()> {
    let mut args = std::env::args().skip(1);
    let own: IpAddr = args.next().ok_or("say the own address")?.parse()?;
    let server = args.next().filter(|server| server != "-");
    let mut number = |or| args.next().map_or(Ok(or), |n| n.parse::<u32>());
    let (pings, bytes) = (number(10)?, number(64)?.max(1));
    let delay = Duration::from_secs(number(0)?.into());
    let device = Device::open((own, 4791).into(), &DeviceOptions::default())?;
    let (channel, end) = (EventChannel::new(&device)?, End::new(&device, bytes)?);
    let (service, options) = (ServiceId::tcp(7174), ConnectOptions::default());
    let is_client = server.is_some();
    let next = || channel.wait(PATIENCE).ok_or("silence for 20 s");
    let connection: Connection = match server {
        Some(server) => {
            let to = (server.parse::<IpAddr>()?, 4791).into();
            channel.connect(to, service, end.queue_pair()?, &options)?
        }
        None => {
            let _listener = channel.listen(service)?;
            eprintln!("waiting for rping on port 7174");
            match next()? {
                Event::Request(request) => {
                    std::thread::sleep(delay);
                    request.accept(end.queue_pair()?, &options)?
                }
                other => return Err(format!("{other:?}").into()),
            }
        }
    };
    match next()? {
        Event::Established { .. } => {}
        other => return Err(format!("{other:?}").into()),
    }
    if is_client {
        end.ping(connection.queue_pair(), pings)?;
        connection.disconnect();
    } else {
        end.serve(connection.queue_pair(), pings)?;
    }
    let mut farewell = channel.wait(FAREWELL);
    let is_silent = farewell.is_none();
    if is_silent {
        connection.disconnect();
        farewell = Some(next()?);
    }
    match farewell {
        Some(Event::Disconnected { .. }) if is_silent => {
            println!("{pings} pings of {bytes} bytes; the client did not say farewell");
        }
        Some(Event::Disconnected { .. }) => println!("{pings} pings of {bytes} bytes"),
        other => return Err(format!("{other:?}").into()),
    }
    Ok(())
}
