//! A peer on a device of libibverbs, by way of the crate `ibverbs`, which others wrote; and one by way of
//! our own provider. Both speak the exchange and the game of `ibv_rc_pingpong` over TCP port 18515.
//!
//! `ibverbs-peer crate DEVICE GID-INDEX [ITERATIONS] [BYTES]` waits for a client, and throws its balls
//! back.
//! `ibverbs-peer verbs DEVICE GID-INDEX SERVER [ITERATIONS] [BYTES]` is such a client, and compares every
//! byte.
//!
//! The crate can only serve: it begins with PSN 0 and wants the peer's before its queue pair is made.

use std::error::Error;
use std::io::{Read, Write};
use std::net::{Ipv6Addr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use lowtide_transport::ibv::{self, Queues};
use lowtide_transport::raw::types::*;

type Outcome<T> = Result<T, Box<dyn Error>>;

const PORT: u16 = 18515;
/// LID, queue pair, PSN and GID in hexadecimal, with the terminating zero of C.
const EXCHANGE: usize = 52;
const PATIENCE: Duration = Duration::from_secs(20);
/// Some timeouts of a peer: it may not have heard that its last ball was caught.
const LINGER: Duration = Duration::from_millis(400);

/// What a side tells the other.
struct Half {
    qpn: u32,
    psn: u32,
    gid: [u8; 16],
}

impl Half {
    fn tell(&self, stream: &mut TcpStream) -> Outcome<()> {
        let gid = u128::from_be_bytes(self.gid);
        let text = format!("0000:{:06x}:{:06x}:{gid:032x}\0", self.qpn, self.psn);
        Ok(stream.write_all(text.as_bytes())?)
    }

    fn hear(stream: &mut TcpStream) -> Outcome<Half> {
        let mut text = [0; EXCHANGE];
        stream.read_exact(&mut text)?;
        let text = std::str::from_utf8(&text[..EXCHANGE - 1])?;
        let words: Vec<&str> = text.split(':').collect();
        let [_, qpn, psn, gid] = words[..] else {
            return Err(format!("the peer says {text:?}").into());
        };
        Ok(Half {
            qpn: u32::from_str_radix(qpn, 16)?,
            psn: u32::from_str_radix(psn, 16)?,
            gid: u128::from_str_radix(gid, 16)?.to_be_bytes(),
        })
    }
}

/// Serves with the crate's own words.
fn serve(device: &str, gid_index: u32, iterations: u32, bytes: usize) -> Outcome<()> {
    let devices = ibverbs::devices()?;
    let is_it =
        |d: &ibverbs::Device<'_>| d.name().is_some_and(|n| n.to_bytes() == device.as_bytes());
    let found = devices.iter().find(is_it);
    let context = found.ok_or("no device of this name")?.open()?;
    let (cq, pd) = (context.create_cq(16, 0)?, context.alloc_pd()?);
    let mut memory = pd.allocate::<u8>(2 * bytes)?;
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT))?;
    let mut stream = listener.accept()?.0;
    let peer = Half::hear(&mut stream)?;
    let prepared = pd
        .create_qp(&cq, &cq, ibverbs::ibv_qp_type::IBV_QPT_RC)
        .set_gid_index(gid_index)
        .set_rq_psn(peer.psn)
        .set_min_rnr_timer(12)
        .set_rnr_retry(7)
        .set_retry_count(7)
        .set_timeout(14)
        .set_max_send_wr(2)
        .set_max_recv_wr(2)
        .build()?;
    let here = prepared.endpoint();
    let mut gid = ibverbs::Gid::default();
    gid.as_mut().raw = peer.gid;
    let mut qp = prepared.handshake(ibverbs::QueuePairEndpoint {
        num: peer.qpn,
        lid: 0,
        gid: Some(gid),
    })?;
    // SAFETY: the memory lives as long as the queue pair, and what is posted is not looked at.
    unsafe { qp.post_receive(&mut memory, bytes.., 1) }?;
    let own = here.gid.ok_or("no GID")?;
    let [high, low] = [own.subnet_prefix(), own.interface_id()].map(u128::from);
    let here = Half {
        qpn: here.num,
        psn: 0,
        gid: (high << 64 | low).to_be_bytes(),
    };
    here.tell(&mut stream)?;
    stream.read_exact(&mut [0; 5])?;
    let (mut caught, mut thrown, mut landed) = (0, 0, 0);
    let mut since = Instant::now();
    let mut done = [ibverbs::ibv_wc::default(); 4];
    while landed < iterations {
        for work in cq.poll(&mut done)? {
            if let Some((status, vendor)) = work.error() {
                return Err(format!("{status:?} ({vendor})").into());
            }
            since = Instant::now();
            match work.wr_id() {
                1 => caught += 1,
                _ => landed += 1,
            }
        }
        if caught > thrown && landed == thrown {
            memory.copy_within(bytes.., 0);
            // SAFETY: as above; what was caught has been copied, and what was thrown has landed.
            unsafe {
                qp.post_receive(&mut memory, bytes.., 1)?;
                qp.post_send(&mut memory, ..bytes, 2)?;
            }
            thrown += 1;
        }
        if since.elapsed() > PATIENCE {
            return Err("silence for 20 s".into());
        }
    }
    std::thread::sleep(LINGER);
    println!("crate ibverbs: {iterations} iterations of {bytes} bytes");
    Ok(())
}

/// Plays with our provider.
fn play(device: &str, gid_index: u32, server: &str, iterations: u32, bytes: usize) -> Outcome<()> {
    let context = ibv::Context::open(device)?;
    let gids = context.gids(1)?;
    let own = gids.iter().find(|entry| entry.index == gid_index);
    let own = own.ok_or("no GID of this index")?;
    let pd = context.protection_domain()?;
    let cq = context.completion_queue(16, None)?;
    let memory = vec![0u8; 2 * bytes].into_boxed_slice();
    let start = Box::into_raw(memory).cast::<u8>();
    let va = start.expose_provenance() as u64;
    // SAFETY: the memory is never freed, and reached by raw pointers only.
    let mr = unsafe { pd.register(va, 2 * bytes as u64, va, AccessFlags::LOCAL_WRITE) }?;
    let queues = Queues {
        send: &cq,
        recv: &cq,
        shared: None,
    };
    let init = QpInitAttr {
        kind: QpType::Rc,
        cap: QpCap {
            max_send_wr: 2,
            max_recv_wr: 2,
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline_data: 0,
        },
        sq_sig_all: true,
    };
    let qp = pd.queue_pair(queues, &init)?;
    let psn = Psn::new(0x00C0_FFEE);
    let here = Half {
        qpn: qp.qpn().value(),
        psn: psn.value(),
        gid: own.gid.0,
    };
    let mut stream = TcpStream::connect((server, PORT))?;
    here.tell(&mut stream)?;
    let peer = Half::hear(&mut stream)?;
    let attr = QpAttr {
        path_mtu: context.query_port(1)?.active_mtu,
        dest: Qpn::new(peer.qpn),
        rq_psn: Psn::new(peer.psn),
        sq_psn: psn,
        address: AhAttr {
            dgid: Gid(peer.gid),
            sgid_index: u8::try_from(gid_index)?,
            hop_limit: 64,
            port: 1,
            ..AhAttr::default()
        },
        max_rd_atomic: 1,
        max_dest_rd_atomic: 1,
        min_rnr_timer: RnrTimer::new(12),
        timeout: 14,
        retry_cnt: 7,
        rnr_retry: 7,
        ..QpAttr::default()
    };
    for state in [QpState::Init, QpState::Rtr, QpState::Rts] {
        let from = match state {
            QpState::Init => QpState::Reset,
            QpState::Rtr => QpState::Init,
            _ => QpState::Rtr,
        };
        let needed = QpAttrMask::of_transition(QpType::Rc, from, state);
        let mask = needed.ok_or("no such transition")?.0 | QpAttrMask::STATE;
        qp.modify(&QpAttr { state, ..attr }, mask)?;
    }
    let place = |half: usize| {
        [Sge {
            lkey: mr.lkey(),
            addr: va + (half * bytes) as u64,
            len: bytes as u32,
        }]
    };
    let catch = || {
        let list = RecvWr {
            wr_id: 1,
            sg_list: &place(1),
        };
        // SAFETY: the memory is not looked at before the receive has completed.
        unsafe { qp.post_recv(&[list]) }.map_err(|bad| bad.error)
    };
    catch()?;
    stream.write_all(b"done\0")?;
    for round in 0..iterations {
        let ball: Vec<u8> = (0..bytes).map(|i| (round as usize + 7 * i) as u8).collect();
        // SAFETY: inside the memory; nothing is posted there now.
        unsafe { start.copy_from_nonoverlapping(ball.as_ptr(), bytes) };
        let list = place(0);
        let wr = SendWr {
            wr_id: 2,
            op: SendOp::Send,
            sg_list: &list,
            flags: SendFlags::SIGNALED,
            to: None,
        };
        // SAFETY: the memory does not change before the completion.
        unsafe { qp.post_send(&[wr]) }.map_err(|bad| bad.error)?;
        let (mut done, since) = (Vec::new(), Instant::now());
        while done.len() < 2 {
            cq.poll(2, &mut done)?;
            if since.elapsed() > PATIENCE {
                return Err("silence for 20 s".into());
            }
        }
        if let Some(failed) = done.iter().find(|work| work.status != Status::Success) {
            return Err(format!("{failed:?}").into());
        }
        let mut back = vec![0; bytes];
        // SAFETY: inside the memory; the receive has completed.
        unsafe {
            back.as_mut_ptr()
                .copy_from_nonoverlapping(start.add(bytes), bytes)
        };
        if back != ball {
            return Err(format!("ball {round} came back changed").into());
        }
        catch()?;
    }
    std::thread::sleep(LINGER);
    println!("our verbs: {iterations} iterations of {bytes} bytes");
    Ok(())
}

fn main() -> Outcome<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let number = |at: usize, or: u32| words.get(at).map_or(Ok(or), |word| word.parse::<u32>());
    match words[..] {
        ["crate", device, gid_index, ..] => serve(
            device,
            gid_index.parse()?,
            number(3, 1000)?,
            number(4, 4096)? as usize,
        ),
        ["verbs", device, gid_index, server, ..] => {
            let (iterations, bytes) = (number(4, 1000)?, number(5, 4096)?);
            play(
                device,
                gid_index.parse()?,
                server,
                iterations,
                bytes as usize,
            )
        }
        _ => Err("ibverbs-peer crate|verbs DEVICE GID-INDEX [SERVER] [ITERATIONS] [BYTES]".into()),
    }
}
