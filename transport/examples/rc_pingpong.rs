//! The other end of libibverbs' `ibv_rc_pingpong`: the same exchange over TCP port 18515, the same
//! messages, against any RoCEv2 adapter, the kernel's rxe among them, or against itself.
//!
//! `cargo run --example rc_pingpong -- OWN-ADDRESS [SERVER] [ITERATIONS] [BYTES]`
//!
//! Without SERVER ("-" stands for none) it waits for a client. The peer is started with the GID
//! index of its IPv4 address: `ibv_rc_pingpong -g 1 -c OWN-ADDRESS` (-c checks what arrives).

use std::error::Error;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use lowtide_transport::verbs::{
    Access, Address, Buffer, CompletionKind, Device, DeviceOptions, Mtu, Qpn, Reliability, SendOp,
    Status,
};

const PORT: u16 = 18515;
/// LID, queue pair, PSN and GID in hexadecimal, with the terminating zero of C.
const EXCHANGE: usize = 52;

fn tell(stream: &mut TcpStream, own: &Address) -> Result<(), Box<dyn Error>> {
    let gid = match own.socket.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    let gid = u128::from(gid);
    let (qpn, psn) = (own.qpn.value(), own.psn);
    // In one piece: the peer reads once.
    let text = format!("0000:{qpn:06x}:{psn:06x}:{gid:032x}\0");
    Ok(stream.write_all(text.as_bytes())?)
}

fn learn(stream: &mut TcpStream) -> Result<Address, Box<dyn Error>> {
    let mut text = [0; EXCHANGE];
    stream.read_exact(&mut text)?;
    let text = std::str::from_utf8(&text[..EXCHANGE - 1])?;
    let mut words = text.split(':').skip(1);
    let mut word = || words.next().ok_or("the peer's words are too few");
    let qpn = Qpn::new(u32::from_str_radix(word()?, 16)?);
    let psn = u32::from_str_radix(word()?, 16)?;
    let ip = Ipv6Addr::from(u128::from_str_radix(word()?, 16)?).to_canonical();
    let socket = SocketAddr::new(ip, 4791);
    Ok(Address {
        socket,
        qpn,
        psn,
        budget: 0,
    })
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let own: IpAddr = args.next().ok_or("say the own address")?.parse()?;
    let server = args.next().filter(|s| s != "-");
    let mut number = |or| args.next().map_or(Ok(or), |n| n.parse());
    let (iterations, bytes) = (number(1000)?, number(4096)?);

    let device = Device::open((own, 4791).into(), &DeviceOptions::default())?;
    let (domain, queue) = (device.protection_domain(), device.completion_queue(8));
    let qp = domain.queue_pair(&queue, &queue, 2, 2)?;
    qp.to_init(Access::LOCAL)?;
    qp.post_recv(0, Buffer::Slot(domain.slot(bytes as usize)?, bytes))?;
    let is_client = server.is_some();
    let mut stream = match server {
        Some(server) => TcpStream::connect((server, PORT))?,
        None => TcpListener::bind((own, PORT))?.accept()?.0,
    };
    if is_client {
        tell(&mut stream, &qp.address())?;
    }
    // Nobody is told the path MTU: this is the one that `ibv_rc_pingpong` takes by itself.
    let mtu = Some(Mtu::B1024);
    let how = Reliability {
        mtu,
        ..Reliability::default()
    };
    qp.connect_as(&learn(&mut stream)?, &how)?;
    if is_client {
        stream.write_all(b"done\0")?;
    } else {
        tell(&mut stream, &qp.address())?;
        stream.read_exact(&mut [0; 5])?;
    }

    let mut ball = Some(domain.slot(bytes as usize)?);
    let (start, mut received) = (Instant::now(), 0);
    let throw = |slot| qp.post_send(1, SendOp::Send, Buffer::Slot(slot, bytes));
    if is_client {
        ball.take().map(throw).transpose()?;
    }
    let (mut thrown, mut back) = (u32::from(is_client), 0);
    while received < iterations || back < iterations {
        let Some(done) = queue.wait(Duration::from_secs(20)) else {
            // A peer that has all may be gone before it acknowledges our last message; a server has
            // answered that one.
            let over = received == iterations && back + 1 == iterations;
            over.then_some(()).ok_or("silence for 20 s")?;
            break;
        };
        if done.status != Status::Success {
            return Err(format!("{:?} ended with {:?}", done.kind, done.status).into());
        }
        let slot = done.slot.ok_or("it was posted with a slot")?;
        if done.kind == CompletionKind::Recv {
            (received, _) = (received + 1, assert_eq!(done.byte_len, bytes));
            qp.post_recv(0, Buffer::Slot(slot, bytes))?;
        } else {
            (back, ball) = (back + 1, Some(slot));
        }
        if thrown < iterations && ball.is_some() && received + u32::from(is_client) > thrown {
            ball.take().map(throw).transpose()?;
            thrown += 1;
        }
    }
    let each = start.elapsed() / iterations;
    println!(
        "{iterations} iterations of {bytes} bytes, {each:?} each, {:?}",
        device.counters()
    );
    Ok(())
}
