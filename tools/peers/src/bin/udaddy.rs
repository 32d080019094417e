//! The other end of librdmacm's `udaddy`: the client asks for the server's datagram queue pair by SIDR,
//! sends ten datagrams of 100 bytes with its own queue pair's number as immediate data, and gets ten
//! back.
//!
//! `udaddy OWN-ADDRESS [SERVER]`
//!
//! Without SERVER it serves one client: `udaddy -s OWN-ADDRESS`. With one, it is the client of `udaddy`,
//! whose answers lie where the questions came to rest: the header that is put in front of a datagram,
//! then as much of the question as there is room for.

use std::error::Error;
use std::net::IpAddr;
use std::time::Duration;

use lowtide_peers::end::{End, GRH, Link, Place, Terms};
use lowtide_transport::cm::{Event, EventChannel, ServiceId};
use lowtide_transport::raw::types::{
    CompletionKind, Gid, QpType, Qpn, SendOp, Status, WorkCompletion,
};
use lowtide_transport::verbs::DeviceOptions;

type Outcome<T> = Result<T, Box<dyn Error>>;

const SERVICE: ServiceId = ServiceId::udp(7174);
/// What all of rdma_cm's datagram queue pairs take.
const QKEY: u32 = 0x0123_4567;
const DATAGRAMS: u32 = 10;
const BYTES: u32 = 100;
/// Where what comes lies, one datagram after the other.
const COME: u64 = 4096;
const PATIENCE: Duration = Duration::from_secs(20);

struct Game<'a> {
    end: &'a End,
    link: Link<'a>,
}

impl Game<'_> {
    /// Goes to RTS, able to send to `gid` and `qpn`, with all receives posted.
    fn begin(&mut self, gid: Gid, qpn: Qpn, qkey: u32) -> Outcome<()> {
        let there = Place {
            gid,
            qpn,
            ..*self.link.here()
        };
        let terms = Terms {
            mtu: self.end.mtu(),
            timeout: 0,
            retry: 0,
            reads: 0,
            qkey: QKEY,
        };
        self.link.connect(&there, &terms)?;
        self.link.aim(gid, qpn, qkey)?;
        for i in 0..DATAGRAMS {
            self.link.post_recv(Self::place(i), BYTES)?;
        }
        Ok(())
    }

    fn place(i: u32) -> u64 {
        COME + u64::from(i * (GRH + BYTES))
    }

    /// What the first of them says.
    fn collect(&mut self, kind: CompletionKind) -> Outcome<WorkCompletion> {
        let mut first = None;
        for _ in 0..DATAGRAMS {
            let done = self.link.wait(PATIENCE)?.ok_or("silence for 20 s")?;
            if (done.status, done.kind) != (Status::Success, kind) {
                return Err(format!("{:?} ended with {:?}", done.kind, done.status).into());
            }
            if kind == CompletionKind::Recv && done.byte_len != GRH + BYTES {
                return Err(format!("{} bytes came", done.byte_len).into());
            }
            first.get_or_insert(done);
        }
        Ok(first.ok_or("at least one")?)
    }

    fn send(&mut self) -> Outcome<()> {
        for _ in 0..DATAGRAMS {
            let own = self.link.here().qpn.value();
            self.link.post_send(SendOp::SendImm(own), 0, BYTES)?;
        }
        // None is answered before all are there, so these are the first to complete.
        self.collect(CompletionKind::Send).map(drop)
    }

    fn ask(&mut self, channel: &EventChannel, server: IpAddr) -> Outcome<()> {
        let asked = channel.resolve((server, 4791).into(), SERVICE, &[]);
        asked.map_err(|error| error.to_string())?;
        let (qpn, qkey) = match channel.wait(PATIENCE) {
            Some(Event::Resolved { qpn, qkey, .. }) => (qpn, qkey),
            other => return Err(format!("{other:?}").into()),
        };
        self.begin(Gid::from_ip(server), qpn, qkey)?;
        let question: Vec<u8> = (1..=BYTES as u8).collect();
        self.end.write(0, &question);
        self.send()?;
        self.collect(CompletionKind::Recv)?;
        let room = (BYTES - GRH) as usize;
        for i in 0..DATAGRAMS {
            let answer = self
                .end
                .read((Self::place(i) + 2 * u64::from(GRH)) as usize, room);
            if answer != question[..room] {
                return Err(format!("answer {i} is {answer:?}").into());
            }
        }
        Ok(())
    }

    fn serve(&mut self, channel: &EventChannel) -> Outcome<()> {
        let _listener = channel.listen_datagram(SERVICE)?;
        eprintln!("waiting for udaddy");
        let question = match channel.wait(PATIENCE) {
            Some(Event::Question(question)) => question,
            other => return Err(format!("{other:?}").into()),
        };
        let (client, own) = (Gid::from_ip(question.peer()), self.link.here().qpn);
        // Which queue pair of the client's asks it will say itself.
        self.begin(client, own, QKEY)?;
        question.answer(own, QKEY, &[]);
        let first = self.collect(CompletionKind::Recv)?;
        let qpn = Qpn::new(first.imm.ok_or("immediate data: its queue pair")?);
        self.link.aim(client, qpn, QKEY)?;
        self.send()
    }
}

fn main() -> Outcome<()> {
    let mut args = std::env::args().skip(1);
    let own: IpAddr = args.next().ok_or("say the own address")?.parse()?;
    let server: Option<IpAddr> = args.next().map(|server| server.parse()).transpose()?;
    let end = End::open(own, 8192, &DeviceOptions::default())?;
    let link = end.link(QpType::Ud, DATAGRAMS)?;
    let (channel, mut game) = (end.channel()?, Game { end: &end, link });
    match server {
        Some(server) => game.ask(&channel, server)?,
        None => game.serve(&channel)?,
    }
    println!("{DATAGRAMS} datagrams of {BYTES} bytes each way");
    Ok(())
}
