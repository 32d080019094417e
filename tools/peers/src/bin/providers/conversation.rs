//! One half of a conversation in verbs, on any provider; each half judges what the other does.
//!
//! The client drives: SEND (plain, inline, with immediate data; into a shared receive queue with a
//! limit), WRITE, READ, both atomics, ATOMIC WRITE, FLUSH, datagrams, and at last what must be refused;
//! the server says what it saw. Both wait for completions in a channel under mio.

use std::io::BufReader;
use std::net::{IpAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Instant;

use lowtide_transport::ibv::{self, choose_gid};
use lowtide_transport::raw;
use lowtide_transport::raw::types::*;
use lowtide_transport::verbs::{DeviceOptions, SameHost};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

use super::parts::*;

pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The same source for both providers: their calls have the same names and meaning, not the same
/// types.
macro_rules! side {
    ($name:ident, $api:ident, |$c:ident| $domain:expr, |$q:ident| $arm:expr,
     |$d:ident| $flush:expr) => {
        mod $name {
            use super::*;

            pub struct Side {
                room: Room,
                mr: $api::MemoryRegion,
                rights: AccessFlags,
                pd: $api::ProtectionDomain,
                rc: $api::QueuePair,
                ud: $api::QueuePair,
                cq: $api::CompletionQueue,
                srq: $api::SharedReceiveQueue,
                context: $api::Context,
                channel: $api::CompletionChannel,
                poll: Poll,
                gid: GidEntry,
                mtu: Mtu,
                done: Vec<WorkCompletion>,
            }

            impl Side {
                pub fn new($c: &$api::Context, gid: GidEntry) -> Result<Side> {
                    let room = Room::new();
                    let pd = $domain;
                    let va = room.address();
                    let register = |rights| {
                        // SAFETY: the room is never freed, and reached by raw pointers only.
                        unsafe { pd.register(va, ROOM as u64, va, rights) }
                    };
                    let all = RIGHTS | AccessFlags::FLUSH_GLOBAL;
                    let (mr, rights) = match register(all) {
                        // Not every device has FLUSH.
                        Err(Error::Unsupported(_)) => (register(RIGHTS)?, RIGHTS),
                        other => (other?, all),
                    };
                    let channel = $c.completion_channel()?;
                    let cq = $c.completion_queue(64, Some(&channel))?;
                    let srq = pd.shared_receive_queue(SrqAttr {
                        max_wr: 8,
                        max_sge: 1,
                        limit: 0,
                    })?;
                    let make = |kind, shared| {
                        let cap = QpCap {
                            max_send_wr: 8,
                            max_recv_wr: 8,
                            max_send_sge: 2,
                            max_recv_sge: 1,
                            max_inline_data: 64,
                        };
                        let queues = $api::Queues {
                            send: &cq,
                            recv: &cq,
                            shared,
                        };
                        pd.queue_pair(
                            queues,
                            &QpInitAttr {
                                kind,
                                cap,
                                sq_sig_all: false,
                            },
                        )
                    };
                    let (rc, ud) = (make(QpType::Rc, Some(&srq))?, make(QpType::Ud, None)?);
                    let poll = Poll::new()?;
                    let fd = channel.as_fd().as_raw_fd();
                    let wish = Interest::READABLE;
                    poll.registry()
                        .register(&mut SourceFd(&fd), Token(0), wish)?;
                    let mtu = $c.query_port(1)?.active_mtu;
                    let done = Vec::new();
                    Ok(Side {
                        room,
                        mr,
                        rights,
                        pd,
                        rc,
                        ud,
                        cq,
                        srq,
                        context: $c.clone(),
                        channel,
                        poll,
                        gid,
                        mtu,
                        done,
                    })
                }

                pub fn half(&self) -> Half {
                    let $d = &self.context;
                    Half {
                        flush: $flush,
                        qpn: self.rc.qpn().value(),
                        datagram_qpn: self.ud.qpn().value(),
                        mtu: self.mtu as u8,
                        gid: u128::from_be_bytes(self.gid.gid.0),
                        va: self.room.address() + TARGET,
                        rkey: self.mr.rkey().0,
                    }
                }

                fn path(&self, peer: &Half) -> AhAttr {
                    AhAttr {
                        dgid: Gid(peer.gid.to_be_bytes()),
                        sgid_index: self.gid.index as u8,
                        hop_limit: 64,
                        port: 1,
                        ..AhAttr::default()
                    }
                }

                pub fn connect(&self, peer: &Half) -> Result<()> {
                    use QpAttrMask as M;
                    let mtu = self.mtu.min_code(peer.mtu);
                    let base = QpAttr {
                        access: self.rights.without(AccessFlags::LOCAL_WRITE),
                        path_mtu: mtu,
                        dest: Qpn::new(peer.qpn),
                        rq_psn: PSN,
                        sq_psn: PSN,
                        qkey: QKEY,
                        address: self.path(peer),
                        max_rd_atomic: 1,
                        max_dest_rd_atomic: 1,
                        min_rnr_timer: RnrTimer::new(12),
                        timeout: 14,
                        retry_cnt: 6,
                        rnr_retry: 6,
                        ..QpAttr::default()
                    };
                    let place = M::STATE | M::PKEY_INDEX | M::PORT;
                    let path = M::ADDRESS | M::PATH_MTU | M::DEST_QPN | M::RQ_PSN;
                    let answers = M::MAX_DEST_RD_ATOMIC | M::MIN_RNR_TIMER;
                    let retries = M::TIMEOUT | M::RETRY_CNT | M::RNR_RETRY | M::MAX_RD_ATOMIC;
                    for (qp, state, mask) in [
                        (&self.rc, QpState::Init, place | M::ACCESS),
                        (&self.rc, QpState::Rtr, M::STATE | path | answers),
                        (&self.rc, QpState::Rts, M::STATE | retries | M::SQ_PSN),
                        (&self.ud, QpState::Init, place | M::QKEY),
                        (&self.ud, QpState::Rtr, M::STATE),
                        (&self.ud, QpState::Rts, M::STATE | M::SQ_PSN),
                    ] {
                        qp.modify(&QpAttr { state, ..base }, mask)?;
                    }
                    Ok(())
                }

                fn sge(&self, at: u64, len: u32) -> Sge {
                    Sge {
                        lkey: self.mr.lkey(),
                        addr: self.room.address() + at,
                        len,
                    }
                }

                fn receive(&self, is_datagram: bool) -> Result<()> {
                    let list = [self.sge(0, LONGEST + GRH)];
                    let wr = RecvWr {
                        wr_id: 7,
                        sg_list: &list,
                    };
                    // SAFETY: the room is reached by raw pointers only.
                    let posted = unsafe {
                        match is_datagram {
                            true => self.ud.post_recv(&[wr]),
                            false => self.srq.post_recv(&[wr]),
                        }
                    };
                    posted.map_err(|bad| bad.error.into())
                }

                fn post(&self, op: SendOp, list: &[Sge], flags: SendFlags) -> Result<()> {
                    let flags = flags | SendFlags::SIGNALED;
                    let wr = SendWr {
                        wr_id: 9,
                        op,
                        sg_list: list,
                        flags,
                        to: None,
                    };
                    // SAFETY: as above.
                    unsafe { self.rc.post_send(&[wr]) }.map_err(|bad| bad.error)?;
                    Ok(())
                }

                /// The next completion, by way of the channel.
                fn next(&mut self) -> Result<WorkCompletion> {
                    let end = Instant::now() + PATIENCE;
                    let mut events = Events::with_capacity(4);
                    loop {
                        if self.done.is_empty() {
                            let $q = &self.cq;
                            $arm;
                            self.cq.poll(16, &mut self.done)?;
                        }
                        if !self.done.is_empty() {
                            return Ok(self.done.remove(0));
                        }
                        let left = end.saturating_duration_since(Instant::now());
                        self.poll.poll(&mut events, Some(left))?;
                        while let Some(id) = self.channel.event() {
                            assert_eq!(id, self.cq.id());
                        }
                        if Instant::now() >= end {
                            return Err("no completion for 20 s".into());
                        }
                    }
                }

                fn finish(&mut self, kind: CompletionKind) -> Result<WorkCompletion> {
                    let work = self.next()?;
                    let is_right = work.status == Status::Success && work.kind == kind;
                    is_right
                        .then_some(work)
                        .ok_or_else(|| format!("{work:?}").into())
                }

                /// Serves what the client announces until it has enough.
                pub fn serve(&mut self, line: &mut Line) -> Result<()> {
                    loop {
                        let order = line.hear()?;
                        let words: Vec<&str> = order.split_whitespace().collect();
                        if words[..] == ["end"] {
                            return Ok(());
                        }
                        let (len, seed) = match words[..] {
                            [_, len, seed] => (len.parse::<u32>()?, seed.parse::<u8>()?),
                            _ => return Err(format!("an order {order:?}").into()),
                        };
                        let verdict = match words[0] {
                            "send" | "datagram" => self.expect_message(line, &words, len, seed),
                            "write-imm" => self.expect_write(line, len, seed),
                            "fill" => {
                                self.room.fill(TARGET, len, seed);
                                line.tell("ready\n")?;
                                continue;
                            }
                            "check" => self.room.check(TARGET, len, seed),
                            other => return Err(format!("an order {other:?}").into()),
                        };
                        match verdict {
                            Ok(()) => line.tell("ok\n")?,
                            Err(error) => {
                                line.tell(&format!("{order:?}: {error}\n"))?;
                                return Err(error);
                            }
                        }
                    }
                }

                fn expect_message(
                    &mut self,
                    line: &mut Line,
                    words: &[&str],
                    len: u32,
                    seed: u8,
                ) -> Result<()> {
                    let is_datagram = words[0] == "datagram";
                    self.receive(is_datagram)?;
                    let is_watched = !is_datagram && seed == 1;
                    if is_watched {
                        self.srq.set_limit(1)?;
                    }
                    line.tell("ready\n")?;
                    let work = self.finish(CompletionKind::Recv)?;
                    let start = if is_datagram { GRH } else { 0 };
                    if work.byte_len != start + len || work.imm != imm(seed) {
                        return Err(format!("{work:?}").into());
                    }
                    let has_grh = work.flags.contains(WcFlags::GRH);
                    // The kernel's rxe says so of connected messages, too, where there is none.
                    if is_datagram && !has_grh {
                        return Err(format!("{work:?}").into());
                    }
                    if is_watched {
                        let reached = AsyncEvent::SrqLimitReached(self.srq.id());
                        expect_event(&self.context, || self.context.async_event(), reached)?;
                    }
                    self.room.check(start.into(), len, seed)
                }

                fn expect_write(&mut self, line: &mut Line, len: u32, seed: u8) -> Result<()> {
                    self.receive(false)?;
                    line.tell("ready\n")?;
                    let work = self.finish(CompletionKind::RecvWriteImm)?;
                    if work.imm != Some(seed.into()) {
                        return Err(format!("{work:?}").into());
                    }
                    self.room.check(TARGET, len, seed)
                }

                /// Does everything once for each size.
                pub fn drive(&mut self, line: &mut Line, peer: &Half) -> Result<u32> {
                    let mut count = 0;
                    let remote = Remote {
                        va: peer.va,
                        rkey: Rkey(peer.rkey),
                    };
                    for (seed, len) in (1u8..).zip(SIZES) {
                        self.send(line, len, seed)?;
                        self.write(line, remote, len, seed)?;
                        self.read(line, remote, len, seed)?;
                        self.datagram(
                            line,
                            peer,
                            len.min(self.mtu.min_code(peer.mtu).bytes()),
                            seed,
                        )?;
                        count += 6;
                    }
                    self.atomics(line, remote)?;
                    count += self.newer(remote, peer)?;
                    self.refused(remote)?;
                    line.tell("end\n")?;
                    Ok(count + 4)
                }

                fn send(&mut self, line: &mut Line, len: u32, seed: u8) -> Result<()> {
                    // From two pieces; short ones inline.
                    let (flags, half) = match len {
                        ..=64 => (SendFlags::INLINE, len / 2),
                        _ => (SendFlags::SOLICITED, len / 2),
                    };
                    line.tell(&format!("send {len} {seed}\n"))?;
                    line.expect("ready")?;
                    self.room.fill(0, len, seed);
                    let list = [self.sge(0, half), self.sge(half.into(), len - half)];
                    let op = imm(seed).map_or(SendOp::Send, SendOp::SendImm);
                    self.post(op, &list, flags)?;
                    self.finish(CompletionKind::Send)?;
                    line.expect("ok")
                }

                fn write(
                    &mut self,
                    line: &mut Line,
                    remote: Remote,
                    len: u32,
                    seed: u8,
                ) -> Result<()> {
                    self.room.fill(0, len, seed ^ 0x55);
                    self.post(SendOp::Write(remote), &[self.sge(0, len)], SendFlags::NONE)?;
                    self.finish(CompletionKind::Write)?;
                    line.tell(&format!("check {len} {}\n", seed ^ 0x55))?;
                    line.expect("ok")?;
                    line.tell(&format!("write-imm {len} {seed}\n"))?;
                    line.expect("ready")?;
                    self.room.fill(0, len, seed);
                    let op = SendOp::WriteImm(remote, seed.into());
                    self.post(op, &[self.sge(0, len)], SendFlags::NONE)?;
                    self.finish(CompletionKind::Write)?;
                    line.expect("ok")
                }

                fn read(
                    &mut self,
                    line: &mut Line,
                    remote: Remote,
                    len: u32,
                    seed: u8,
                ) -> Result<()> {
                    line.tell(&format!("fill {len} {}\n", seed ^ 0xAA))?;
                    line.expect("ready")?;
                    self.room.fill(0, len, 0);
                    self.post(SendOp::Read(remote), &[self.sge(0, len)], SendFlags::NONE)?;
                    self.finish(CompletionKind::Read)?;
                    self.room.check(0, len, seed ^ 0xAA)
                }

                fn datagram(
                    &mut self,
                    line: &mut Line,
                    peer: &Half,
                    len: u32,
                    seed: u8,
                ) -> Result<()> {
                    line.tell(&format!("datagram {len} {seed}\n"))?;
                    line.expect("ready")?;
                    self.room.fill(0, len, seed);
                    let handle = self.pd.address_handle(&self.path(peer))?;
                    let wr = SendWr {
                        wr_id: 11,
                        op: imm(seed).map_or(SendOp::Send, SendOp::SendImm),
                        sg_list: &[self.sge(0, len)],
                        flags: SendFlags::SIGNALED,
                        to: Some(Destination {
                            ah: handle.id(),
                            qpn: Qpn::new(peer.datagram_qpn),
                            qkey: QKEY,
                        }),
                    };
                    // SAFETY: as above; the handle lives until the completion.
                    unsafe { self.ud.post_send(&[wr]) }.map_err(|bad| bad.error)?;
                    self.finish(CompletionKind::Send)?;
                    line.expect("ok")
                }

                fn atomics(&mut self, line: &mut Line, remote: Remote) -> Result<()> {
                    let word = self.room.word(0);
                    line.tell("fill 8 1\n")?;
                    line.expect("ready")?;
                    let bytes: [u8; 8] = std::array::from_fn(|i| Room::byte(1, i as u64));
                    let start = u64::from_ne_bytes(bytes);
                    let add = 0x0101_0101_0101_0101;
                    let steps = [
                        (
                            SendOp::FetchAdd { remote, add },
                            CompletionKind::FetchAdd,
                            start,
                        ),
                        (
                            SendOp::CompareSwap {
                                remote,
                                compare: start,
                                swap: 5,
                            },
                            CompletionKind::CompareSwap,
                            start.wrapping_add(add),
                        ),
                        (
                            SendOp::CompareSwap {
                                remote,
                                compare: start.wrapping_add(add),
                                swap: 42,
                            },
                            CompletionKind::CompareSwap,
                            start.wrapping_add(add),
                        ),
                        (SendOp::Read(remote), CompletionKind::Read, 42),
                    ];
                    for (op, kind, old) in steps {
                        self.post(op, &[self.sge(0, 8)], SendFlags::NONE)?;
                        self.finish(kind)?;
                        // SAFETY: inside the room; the device is done with it.
                        let found = unsafe { word.read_volatile() };
                        if found != old {
                            return Err(format!("{op:?} found {found:#x}, not {old:#x}").into());
                        }
                    }
                    Ok(())
                }

                /// ATOMIC WRITE and FLUSH, which not every device has; how many it has.
                fn newer(&mut self, remote: Remote, peer: &Half) -> Result<u32> {
                    let mut count = 0;
                    let word = [self.sge(0, 8)];
                    for (op, list, kind) in [
                        (
                            SendOp::AtomicWrite(remote),
                            &word[..],
                            CompletionKind::AtomicWrite,
                        ),
                        (flush(remote), &[], CompletionKind::Flush),
                    ] {
                        if kind == CompletionKind::Flush && !peer.flush {
                            println!("not tried: FLUSH to rxe, see ci/excludes/verbs");
                            continue;
                        }
                        self.room.fill(0, 8, 99);
                        match self.post(op, list, SendFlags::NONE) {
                            Err(error) if is_unsupported(&*error) => {
                                println!("not tried: {error}");
                                continue;
                            }
                            other => other?,
                        }
                        self.finish(kind)?;
                        count += 1;
                        self.room.fill(0, 8, 0);
                        self.post(SendOp::Read(remote), &[self.sge(0, 8)], SendFlags::NONE)?;
                        self.finish(CompletionKind::Read)?;
                        self.room.check(0, 8, 99)?;
                    }
                    Ok(count)
                }

                /// A key that there is not: the peer refuses, and the queue pair is of no more use.
                fn refused(&mut self, remote: Remote) -> Result<()> {
                    let wrong = Remote {
                        rkey: Rkey(remote.rkey.0 ^ 0x5A5A_5A00),
                        ..remote
                    };
                    self.post(SendOp::Read(wrong), &[self.sge(0, 8)], SendFlags::NONE)?;
                    let work = self.next()?;
                    if work.status != Status::RemoteAccess {
                        return Err(format!("a wrong key: {work:?}").into());
                    }
                    self.receive(true)?;
                    let attr = QpAttr {
                        state: QpState::Err,
                        ..QpAttr::default()
                    };
                    self.ud.modify(&attr, QpAttrMask::STATE)?;
                    let work = self.next()?;
                    match work.status {
                        Status::Flushed => Ok(()),
                        _ => Err(format!("a receive after the end: {work:?}").into()),
                    }
                }
            }
        }
    };
}

side!(
    softroce,
    raw,
    |context| context.protection_domain(),
    |cq| cq.request_notification(false),
    |_context| true
);
side!(
    verbs,
    ibv,
    |context| context.protection_domain()?,
    |cq| cq.request_notification(false)?,
    |context| !is_rxe(context.name())
);

macro_rules! converse {
    ($side:expr, $line:expr, $is_client:expr) => {{
        let (mut side, line) = ($side, $line);
        line.tell(&side.half().line())?;
        let peer = Half::parse(&line.hear()?)?;
        side.connect(&peer)?;
        line.tell("connected\n")?;
        line.expect("connected")?;
        match $is_client {
            true => side.drive(line, &peer)?,
            false => side.serve(line).map(|()| 0)?,
        }
    }};
}

/// Speaks on `provider`: `softroce:ADDRESS`, `rings:ADDRESS` or `host:ADDRESS` (softroce that reaches
/// peers on this host by shared memory), or `verbs:DEVICE`. Returns how many operations were right.
///
/// # Errors
/// What was not, or that there is no such provider.
pub fn converse(provider: &str, stream: TcpStream, is_client: bool) -> Result<u32> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(3 * PATIENCE))?;
    let peer = stream.peer_addr()?.ip().to_canonical();
    let line = &mut Line(BufReader::new(stream));
    let (kind, place) = provider.split_once(':').unwrap_or((provider, ""));
    let same_host = match kind {
        "softroce" => SameHost::Udp,
        "rings" => SameHost::Rings,
        "host" => SameHost::Direct,
        "verbs" => {
            let context = ibv::Context::open(place)?;
            let gid = choose_gid(&context.gids(1)?, peer).ok_or("no GID of the peer's family")?;
            return Ok(converse!(verbs::Side::new(&context, gid)?, line, is_client));
        }
        _ => return Err("softroce:ADDRESS, rings:ADDRESS, host:ADDRESS or verbs:DEVICE".into()),
    };
    let address: IpAddr = place.parse()?;
    let options = DeviceOptions {
        same_host,
        ..DeviceOptions::default()
    };
    let context = raw::Context::open((address, 4791).into(), &options)?;
    let side = softroce::Side::new(&context, context.gid())?;
    let count = converse!(side, line, is_client);
    // Each provider is what it says.
    let by_ring = context.counters().host_tx_packets > 0;
    match by_ring == (same_host != SameHost::Udp) {
        true => Ok(count),
        false => Err(format!("{provider}: {:?}", context.counters()).into()),
    }
}
