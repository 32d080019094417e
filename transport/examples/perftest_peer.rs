//! The other end of perftest's programs: their exchange over TCP port 18515, then what they
//! measure, against any RoCEv2 adapter, the kernel's rxe among them.
//!
//! `cargo run --example perftest_peer -- TEST OWN-ADDRESS [SERVER] [ITERATIONS] [BYTES]`
//!
//! TEST is send_lat, write_bw, read_bw, atomic_bw or send_bw_ud (`ib_send_bw -c UD`). Without
//! SERVER ("-" stands for none) it waits for a client, `ib_write_bw -x 1 -n ITERATIONS -s BYTES …`;
//! all of its options that are not named here at their defaults. SERVER is reached over TCP, and
//! may be another address of the host than the one that RoCE uses.
//!
//! Source: perftest 4.5, `perftest_communication.c`.

use std::error::Error;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use lowtide_transport::raw::types::*;
use lowtide_transport::raw::{
    AddressHandle, CompletionQueue, Context, MemoryRegion, ProtectionDomain, QueuePair, Queues,
};
use lowtide_transport::verbs::DeviceOptions;

type Outcome<T> = Result<T, Box<dyn Error>>;

const TCP_PORT: u16 = 18515;
const LIMIT: usize = 16 << 20;
const GRH: u32 = 40;
const QKEY: u32 = 0x1111_1111;
const READS: u8 = 16;
/// Requests under way.
const WINDOW: u32 = 64;
const PATIENCE: Duration = Duration::from_secs(20);
const RIGHTS: AccessFlags = AccessFlags::LOCAL_WRITE
    .with(AccessFlags::REMOTE_WRITE)
    .with(AccessFlags::REMOTE_READ)
    .with(AccessFlags::REMOTE_ATOMIC);

/// perftest's exchange: the client speaks first, each time.
struct Exchange {
    stream: TcpStream,
    is_client: bool,
}

impl Exchange {
    fn swap<const N: usize>(&mut self, ours: [u8; N]) -> Outcome<[u8; N]> {
        let mut theirs = [0; N];
        if self.is_client {
            self.stream.write_all(&ours)?;
            self.stream.read_exact(&mut theirs)?;
        } else {
            self.stream.read_exact(&mut theirs)?;
            self.stream.write_all(&ours)?;
        }
        Ok(theirs)
    }

    /// Version, sizes of a page and a cache line, MTU: the smaller one counts.
    fn begin(&mut self, mtu: Mtu) -> Outcome<Mtu> {
        let mut version = [0; 16];
        version[..4].copy_from_slice(b"6.06");
        self.swap(version)?;
        self.swap(4096u32.to_be_bytes())?;
        self.swap(64u32.to_be_bytes())?;
        let theirs = self.swap([b'0' + mtu as u8, 0])?;
        let theirs = Mtu::from_code(theirs[0].wrapping_sub(b'0')).ok_or("an MTU of 1 to 5")?;
        Ok(mtu.min(theirs))
    }

    /// The results of a bandwidth test: none of ours.
    fn report(&mut self) -> Outcome<()> {
        for _ in 0..5 {
            self.swap([0; 8])?;
        }
        Ok(())
    }

    fn end(&mut self, keys: &Keys) -> Outcome<()> {
        self.swap(keys.encode())?;
        // Whoever is first may be gone.
        let _ = self.stream.write_all(b"done\0");
        let _ = self.stream.read_exact(&mut [0; 5]);
        Ok(())
    }
}

/// What each side says of its queue pair and memory.
#[derive(Debug)]
struct Keys {
    reads: u8,
    qpn: Qpn,
    psn: Psn,
    remote: Remote,
    gid: Gid,
}

impl Keys {
    fn encode(&self) -> [u8; 108] {
        let Keys {
            reads, qpn, psn, ..
        } = self;
        let Remote { va, rkey } = self.remote;
        let gid: Vec<String> = self
            .gid
            .0
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let (qpn, psn, gid) = (qpn.value(), psn.value(), gid.join(":"));
        let text = format!(
            "0000:{reads:04x}:{qpn:06x}:{psn:06x}:{:08x}:{va:016x}:{gid}:{:08x}:",
            rkey.0, 0
        );
        let mut bytes = [0; 108];
        bytes[..text.len()].copy_from_slice(text.as_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Outcome<Keys> {
        let text = std::str::from_utf8(bytes)?;
        let words: Vec<u64> = text
            .split(':')
            .take(22)
            .map(|word| u64::from_str_radix(word, 16))
            .collect::<Result<_, _>>()?;
        let [_, reads, qpn, psn, rkey, va, gid @ ..] = words.as_slice() else {
            return Err("the peer's keys are cut short".into());
        };
        let gid: Vec<u8> = gid.iter().map(|byte| *byte as u8).collect();
        Ok(Keys {
            reads: (*reads).min(255) as u8,
            qpn: Qpn::new(*qpn as u32),
            psn: Psn::new(*psn as u32),
            remote: Remote {
                va: *va,
                rkey: Rkey(*rkey as u32),
            },
            gid: Gid(gid.try_into().map_err(|_| "a GID has 16 bytes")?),
        })
    }
}

struct End {
    context: Context,
    pd: ProtectionDomain,
    region: MemoryRegion,
    queue: CompletionQueue,
    qp: QueuePair,
    kind: QpType,
}

impl End {
    fn new(own: IpAddr, kind: QpType, depth: u32) -> Outcome<End> {
        let context = Context::open((own, 4791).into(), &DeviceOptions::default())?;
        let pd = context.protection_domain();
        let memory = Box::leak(vec![0u64; LIMIT / 8].into_boxed_slice()).as_mut_ptr();
        let (at, len) = (memory as u64, LIMIT as u64);
        // SAFETY: nobody refers to this memory any more, and it is never freed.
        let region = unsafe { pd.register(at, len, at, RIGHTS) }?;
        let queue = context.completion_queue(2 * depth, None)?;
        let init = QpInitAttr {
            kind,
            cap: QpCap {
                max_send_wr: depth,
                max_recv_wr: depth,
                max_send_sge: 1,
                max_recv_sge: 1,
                max_inline_data: 0,
            },
            sq_sig_all: true,
        };
        let queues = Queues {
            send: &queue,
            recv: &queue,
            shared: None,
        };
        let qp = pd.queue_pair(queues, &init)?;
        Ok(End {
            context,
            pd,
            region,
            queue,
            qp,
            kind,
        })
    }

    fn keys(&self) -> Keys {
        Keys {
            reads: READS,
            qpn: self.qp.qpn(),
            psn: self.qp.random_psn(),
            remote: Remote {
                va: self.region.address(),
                rkey: self.region.rkey(),
            },
            gid: self.context.gid().gid,
        }
    }

    fn connect(&self, ours: &Keys, theirs: &Keys, mtu: Mtu) -> Outcome<Option<AddressHandle>> {
        let address = AhAttr {
            dgid: theirs.gid,
            hop_limit: 64,
            port: 1,
            ..AhAttr::default()
        };
        let attr = QpAttr {
            qkey: QKEY,
            access: RIGHTS,
            address,
            path_mtu: mtu,
            dest: theirs.qpn,
            rq_psn: theirs.psn,
            sq_psn: ours.psn,
            max_dest_rd_atomic: READS,
            max_rd_atomic: READS.min(theirs.reads).max(1),
            min_rnr_timer: RnrTimer::new(12),
            timeout: 14,
            retry_cnt: 7,
            rnr_retry: 7,
            ..QpAttr::default()
        };
        for state in [QpState::Init, QpState::Rtr, QpState::Rts] {
            let from = self.qp.query().state;
            let wanted = QpAttrMask::of_transition(self.kind, from, state);
            let (wanted, _) = wanted.ok_or("no such transition")?;
            let mask = wanted.with(QpAttrMask::STATE);
            self.qp.modify(&QpAttr { state, ..attr }, mask)?;
        }
        Ok(match self.kind {
            QpType::Ud => Some(self.pd.address_handle(&address)?),
            _ => None,
        })
    }

    fn sge(&self, len: u32) -> [Sge; 1] {
        let (lkey, addr) = (self.region.lkey(), self.region.address());
        [Sge { lkey, addr, len }]
    }

    fn receive(&self, len: u32) -> Outcome<()> {
        let wr = RecvWr {
            wr_id: 0,
            sg_list: &self.sge(len),
        };
        // SAFETY: as of the registration.
        Ok(unsafe { self.qp.post_recv(&[wr]) }.map_err(|bad| bad.error)?)
    }

    fn send(&self, op: SendOp, len: u32, to: Option<Destination>) -> Outcome<()> {
        let wr = SendWr {
            wr_id: 0,
            op,
            sg_list: &self.sge(len),
            flags: SendFlags::SIGNALED,
            to,
        };
        // SAFETY: as of the registration.
        Ok(unsafe { self.qp.post_send(&[wr]) }.map_err(|bad| bad.error)?)
    }

    fn next(&self) -> Outcome<WorkCompletion> {
        let mut done = Vec::new();
        while self.queue.poll(1, &mut done)? == 0 {
            if !self.queue.wait(Instant::now() + PATIENCE) {
                return Err("silence for 20 s".into());
            }
        }
        match done[0].status {
            Status::Success => Ok(done[0]),
            status => Err(format!("{:?} ended with {status:?}", done[0].kind).into()),
        }
    }

    /// As fast as it goes, `count` times.
    fn stream(&self, count: u32, len: u32, op: SendOp, to: Option<Destination>) -> Outcome<()> {
        let (mut posted, mut done) = (0, 0);
        while done < count {
            while posted < count && posted - done < WINDOW {
                self.send(op, len, to)?;
                posted += 1;
            }
            self.next()?;
            done += 1;
        }
        Ok(())
    }

    /// Back and forth, `count` times.
    fn bounce(&self, count: u32, len: u32, is_client: bool) -> Outcome<()> {
        for round in 0..count {
            if is_client || round > 0 {
                self.send(SendOp::Send, len, None)?;
            }
            let (mut is_back, mut is_sent) = (false, !is_client && round == 0);
            while !(is_back && is_sent) {
                let is_recv = self.next()?.kind == CompletionKind::Recv;
                *(if is_recv { &mut is_back } else { &mut is_sent }) = true;
            }
            self.receive(len)?;
        }
        if !is_client {
            self.send(SendOp::Send, len, None)?;
            self.next()?;
        }
        Ok(())
    }
}

fn main() -> Outcome<()> {
    let mut args = std::env::args().skip(1);
    let test = args.next().ok_or("perftest_peer TEST OWN-ADDRESS …")?;
    let own: IpAddr = args.next().ok_or("say the own address")?.parse()?;
    let server = args.next().filter(|server| server != "-");
    let mut number = |or| args.next().map_or(Ok(or), |n| n.parse::<u32>());
    let (count, bytes) = (number(1000)?, number(65_536)?);
    let is_client = server.is_some();
    let is_ud = test == "send_bw_ud";
    let kind = if is_ud { QpType::Ud } else { QpType::Rc };
    let end = End::new(own, kind, if is_ud { count + WINDOW } else { 2 * WINDOW })?;
    let port = end.context.query_port(1)?;
    let stream = match server {
        Some(server) => TcpStream::connect((server, TCP_PORT))?,
        None => {
            let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, TCP_PORT));
            TcpListener::bind(any)?.accept()?.0
        }
    };
    stream.set_read_timeout(Some(3 * PATIENCE))?;
    let mut exchange = Exchange { stream, is_client };
    let mtu = exchange.begin(port.active_mtu)?;
    let ours = end.keys();
    let theirs = Keys::decode(&exchange.swap(ours.encode())?)?;
    let handle = end.connect(&ours, &theirs, mtu)?;
    // Both are ready, and both know what the other printed.
    exchange.swap(ours.encode())?;
    exchange.swap(ours.encode())?;
    let start = Instant::now();
    match test.as_str() {
        "send_lat" => {
            for _ in 0..WINDOW {
                end.receive(bytes)?;
            }
            exchange.swap(ours.encode())?;
            end.bounce(count, bytes, is_client)?;
        }
        "send_bw_ud" => {
            let to = handle.as_ref().map(|handle| Destination {
                ah: handle.id(),
                qpn: theirs.qpn,
                qkey: QKEY,
            });
            if !is_client {
                // Nobody sends a lost datagram again: there is room for all of them.
                for _ in 0..count {
                    end.receive(bytes + GRH)?;
                }
            }
            exchange.swap(ours.encode())?;
            if is_client {
                end.stream(count, bytes, SendOp::Send, to)?;
            } else {
                for _ in 0..count {
                    end.next()?;
                }
            }
        }
        _ => {
            let remote = theirs.remote;
            let (op, len) = match test.as_str() {
                "write_bw" => (SendOp::Write(remote), bytes),
                "read_bw" => (SendOp::Read(remote), bytes),
                "atomic_bw" => (SendOp::FetchAdd { remote, add: 1 }, 8),
                other => return Err(format!("no such test: {other}").into()),
            };
            if is_client {
                end.stream(count, len, op, None)?;
            }
            exchange.swap(ours.encode())?;
            exchange.report()?;
        }
    }
    let took = start.elapsed();
    exchange.end(&ours)?;
    println!("{test}: {count} x {bytes} bytes, {took:?}");
    Ok(())
}
