//! A device of libibverbs, named by `--device`: our verbs on it, beside perftest's programs on the same
//! device, both ends on this machine. What differs is what our provider costs.
//!
//! In the guest of ci/guest/boot the kernel's rxe is such a device.

use std::net::Ipv4Addr;
use std::process::Command;
use std::time::{Duration, Instant};

use lowtide_transport::ibv::{
    self, CompletionQueue, Context, MemoryRegion, ProtectionDomain, QueuePair, Queues,
};
use lowtide_transport::raw::types::*;

use crate::ends::{insist, on_two, processors};
use crate::programs::{self, Served};
use crate::row::{Better, Pick, Rounds, Row};
use crate::{Bench, Failure};

const ROUNDS: u32 = 5;
/// Bytes of short and of long messages.
const SHORT: usize = 64;
const LONG: usize = 64 << 10;
/// Requests under way of a stream, and posted at once; perftest's are 128 and one.
const DEPTH: usize = 128;
const BATCH: usize = 16;
/// How long a stream is measured, and how long it runs before.
const MEASURED: Duration = Duration::from_secs(1);
const WARM_UP: Duration = Duration::from_millis(300);
/// Round trips in a round, and before the first that counts.
const TRIPS: usize = 2_000;
const TRIPS_BEFORE: usize = 200;
/// The port of perftest's exchange.
const PORT: u16 = 18515;

/// Microseconds for a SEND of 64 bytes and the one that answers it.
///
/// # Errors
/// There is no such device, or perftest is missing.
pub fn round_trip(bench: &Bench) -> Result<Vec<Row>, Failure> {
    let figures = Comparison {
        name: "rtt-device",
        unit: "us",
        better: Better::Lower,
        yardstick_is: "ib_send_lat on the same device, typical latency both ways",
        aim: 1.1,
        program: "ib_send_lat",
        options: &["-s", "64", "-n", "2000"],
        // Size, iterations, least, most, typical.
        column: 4,
        factor: 2.0,
    };
    figures.run(bench, ping_pong)
}

/// MiB/s of WRITEs of 64 KiB.
///
/// # Errors
/// As [`round_trip`].
pub fn writes(bench: &Bench) -> Result<Vec<Row>, Failure> {
    let figures = Comparison {
        name: "bw-device",
        unit: "MiB/s",
        better: Better::Higher,
        yardstick_is: "ib_write_bw on the same device, 64 KiB",
        aim: 1.0,
        program: "ib_write_bw",
        options: &["-s", "65536", "-D", "3", "-f", "1"],
        // Size, iterations, peak, average.
        column: 3,
        factor: 1.0,
    };
    figures.run(bench, |name| {
        let rate = stream(name, LONG, |end| SendOp::Write(end.remote))?;
        Ok(rate * LONG as f64 / f64::from(1 << 20))
    })
}

/// SENDs of 64 bytes per second through one queue pair.
///
/// # Errors
/// As [`round_trip`].
pub fn rate(bench: &Bench) -> Result<Vec<Row>, Failure> {
    let figures = Comparison {
        name: "rate-device",
        unit: "msg/s",
        better: Better::Higher,
        yardstick_is: "ib_send_bw on the same device, 64 B",
        aim: 1.0,
        program: "ib_send_bw",
        options: &["-s", "64", "-D", "3", "-f", "1"],
        // The last is millions of messages per second.
        column: 4,
        factor: 1e6,
    };
    figures.run(bench, |name| stream(name, SHORT, |_| SendOp::Send))
}

/// A benchmark and the program of perftest that is its yardstick.
struct Comparison {
    name: &'static str,
    unit: &'static str,
    better: Better,
    yardstick_is: &'static str,
    aim: f64,
    program: &'static str,
    options: &'static [&'static str],
    /// Where in perftest's line the figure stands, and what it is multiplied by.
    column: usize,
    factor: f64,
}

impl Comparison {
    fn run(
        self,
        bench: &Bench,
        ours_of: impl Fn(&str) -> Result<f64, Failure>,
    ) -> Result<Vec<Row>, Failure> {
        let name = bench.device.as_deref().ok_or_else(|| {
            let devices = match ibv::devices() {
                Ok(devices) => devices.iter().map(|d| d.name.clone()).collect(),
                Err(none) => vec![none.to_string()],
            };
            Failure::Broken(format!("--device NAME is needed: {}", devices.join(", ")))
        })?;
        programs::require(self.program, "perftest")?;
        let (mut ours, mut yardstick) = (Vec::new(), Vec::new());
        for _ in 0..bench.rounds.unwrap_or(ROUNDS) {
            yardstick.push(self.perftest(name)? * self.factor);
            ours.push(ours_of(name)?);
        }
        let rounds = Rounds {
            unit: self.unit,
            better: self.better,
            yardstick_is: self.yardstick_is,
            ours,
            yardstick,
        };
        let row = rounds.row(self.name, Pick::Median, &bench.machine);
        Ok(vec![row.with("device", name).aim(self.aim)])
    }

    /// What perftest says of the device.
    fn perftest(&self, name: &str) -> Result<f64, Failure> {
        let path = Path::of(&open(name)?)?;
        let cpus = processors()?.map(|cpu| cpu.to_string());
        let command = |cpu: &str| {
            let mut command = Command::new("taskset");
            command.args(["-c", cpu, self.program, "-d", name, "-F"]);
            command.args(["-x", &path.gid.index.to_string()]);
            command.args(["-p", &PORT.to_string()]).args(self.options);
            command
        };
        let _server = Served::start(&mut command(&cpus[1]), PORT)?;
        let said = programs::ask(command(&cpus[0]).arg("127.0.0.1"))?;
        figure(&said, self.column)
            .ok_or_else(|| Failure::Broken(format!("{} printed:\n{said}", self.program)))
    }
}

/// The number in a column of the line that begins with size and iterations.
fn figure(said: &str, column: usize) -> Option<f64> {
    let numbers = said.lines().find_map(|line| {
        let words = line.split_whitespace().map(str::parse::<f64>);
        let numbers: Vec<f64> = words.collect::<Result<_, _>>().ok()?;
        (numbers.len() > column).then_some(numbers)
    })?;
    Some(numbers[column])
}

fn open(name: &str) -> Result<Context, Failure> {
    Context::open(name).map_err(|error| Failure::Broken(format!("device {name}: {error}")))
}

/// Port 1, and how it is reached.
struct Path {
    port: PortAttr,
    gid: GidEntry,
}

impl Path {
    fn of(context: &Context) -> Result<Path, Failure> {
        let port = context.query_port(1).map_err(Failure::broken)?;
        let gids = context.gids(1).map_err(Failure::broken)?;
        let routed = ibv::choose_gid(&gids, Ipv4Addr::UNSPECIFIED.into());
        // InfiniBand has no GID of an address, and needs none.
        let gid = routed.or(gids.first().copied());
        let gid = gid.ok_or_else(|| Failure::broken("port 1 of the device has no GID"))?;
        Ok(Path { port, gid })
    }

    fn address(&self) -> AhAttr {
        AhAttr {
            dgid: match self.port.is_ethernet {
                true => self.gid.gid,
                false => Gid::default(),
            },
            sgid_index: self.gid.index as u8,
            hop_limit: 64,
            dlid: self.port.lid,
            port: 1,
            ..AhAttr::default()
        }
    }
}

/// One end of a reliable connection, with memory of two long messages. Fields are dropped in this
/// order: the queue pair before the memory.
struct End {
    qp: QueuePair,
    cq: CompletionQueue,
    mr: MemoryRegion,
    memory: Box<[u64]>,
    remote: Remote,
    _pd: ProtectionDomain,
}

impl End {
    fn new(context: &Context) -> Result<End, Error> {
        let pd = context.protection_domain()?;
        let cq = context.completion_queue(4 * DEPTH as u32, None)?;
        let queues = Queues {
            send: &cq,
            recv: &cq,
            shared: None,
        };
        let cap = QpCap {
            max_send_wr: 2 * DEPTH as u32,
            max_recv_wr: 2 * DEPTH as u32,
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline_data: SHORT as u32,
        };
        let init = QpInitAttr {
            kind: QpType::Rc,
            cap,
            sq_sig_all: false,
        };
        let qp = pd.queue_pair(queues, &init)?;
        let memory = vec![0u64; 2 * LONG / 8].into_boxed_slice();
        let va = memory.as_ptr().expose_provenance() as u64;
        let rights = AccessFlags::LOCAL_WRITE | AccessFlags::REMOTE_WRITE;
        // SAFETY: the memory is never looked at, and goes after the region.
        let mr = unsafe { pd.register(va, 2 * LONG as u64, va, rights) }?;
        let remote = Remote {
            va,
            rkey: mr.rkey(),
        };
        Ok(End {
            qp,
            cq,
            mr,
            memory,
            remote,
            _pd: pd,
        })
    }

    /// Two ends, connected.
    fn pair(name: &str) -> Result<[End; 2], Failure> {
        // Each opens the device for itself, as two programs do.
        let contexts = [open(name)?, open(name)?];
        let path = Path::of(&contexts[0])?;
        let new = |context| End::new(context).map_err(Failure::broken);
        let mut ends = [new(&contexts[0])?, new(&contexts[1])?];
        let numbers = [ends[1].qp.qpn(), ends[0].qp.qpn()];
        for (end, dest) in ends.iter().zip(numbers) {
            end.connect(&path, dest).map_err(Failure::broken)?;
        }
        let [one, other] = &mut ends;
        std::mem::swap(&mut one.remote, &mut other.remote);
        Ok(ends)
    }

    fn connect(&self, path: &Path, dest: Qpn) -> Result<(), Error> {
        use QpAttrMask as M;
        let base = QpAttr {
            access: AccessFlags::REMOTE_WRITE,
            path_mtu: path.port.active_mtu,
            dest,
            address: path.address(),
            max_rd_atomic: 1,
            max_dest_rd_atomic: 1,
            min_rnr_timer: RnrTimer::new(12),
            timeout: 14,
            retry_cnt: 7,
            rnr_retry: 7,
            ..QpAttr::default()
        };
        let place = M::STATE | M::PKEY_INDEX | M::PORT;
        let way = M::ADDRESS | M::PATH_MTU | M::DEST_QPN | M::RQ_PSN;
        let retries = M::TIMEOUT | M::RETRY_CNT | M::RNR_RETRY | M::MAX_RD_ATOMIC;
        for (state, mask) in [
            (QpState::Init, place | M::ACCESS),
            (
                QpState::Rtr,
                M::STATE | way | M::MAX_DEST_RD_ATOMIC | M::MIN_RNR_TIMER,
            ),
            (QpState::Rts, M::STATE | retries | M::SQ_PSN),
        ] {
            self.qp.modify(&QpAttr { state, ..base }, mask)?;
        }
        Ok(())
    }

    /// Memory for what comes, or what goes.
    fn place(&self, half: usize, len: usize) -> [Sge; 1] {
        [Sge {
            lkey: self.mr.lkey(),
            addr: self.memory.as_ptr().expose_provenance() as u64 + (half * LONG) as u64,
            len: len as u32,
        }]
    }

    /// Posts some, of which the last reports success if `is_told`, as perftest has it.
    fn send(&self, count: usize, op: SendOp, len: usize, is_told: bool) -> Result<(), Failure> {
        let inline = match len <= SHORT {
            true => SendFlags::INLINE,
            false => SendFlags::NONE,
        };
        let list = self.place(0, len);
        let wr = SendWr {
            wr_id: 0,
            op,
            sg_list: &list,
            flags: inline,
            to: None,
        };
        let told = SendWr {
            flags: inline | SendFlags::SIGNALED,
            ..wr
        };
        let last = if is_told { told } else { wr };
        // A single one is not copied sixteen times: its latency is measured.
        let several = (count > 1).then(|| {
            let mut several = [wr; BATCH];
            several[count - 1] = last;
            several
        });
        let requests = match &several {
            Some(several) => &several[..count],
            None => std::slice::from_ref(&last),
        };
        // SAFETY: memory of this end, which nobody looks at and which outlives the queue pair.
        let posted = unsafe { self.qp.post_send(requests) };
        posted.map_err(|bad| Failure::broken(bad.error))
    }

    fn receive(&self, count: usize) -> Result<(), Failure> {
        let list = self.place(1, SHORT);
        let wr = RecvWr {
            wr_id: 0,
            sg_list: &list,
        };
        // SAFETY: as above.
        let posted = unsafe { self.qp.post_recv(&[wr; BATCH][..count]) };
        posted.map_err(|bad| Failure::broken(bad.error))
    }

    /// Waits without rest for some completions: how many sends and receives.
    fn next(&self, done: &mut Vec<WorkCompletion>) -> Result<(usize, usize), Failure> {
        done.clear();
        insist(|| match self.cq.poll(BATCH, done) {
            Ok(0) => None,
            other => Some(other),
        })?
        .map_err(Failure::broken)?;
        if let Some(failed) = done.iter().find(|work| work.status != Status::Success) {
            return Err(Failure::Broken(format!("{failed:?}")));
        }
        let receives = done.iter().filter(|work| work.kind.is_recv()).count();
        Ok((done.len() - receives, receives))
    }
}

/// Microseconds of the median round trip.
fn ping_pong(name: &str) -> Result<f64, Failure> {
    let [one, other] = End::pair(name)?;
    one.receive(BATCH)?;
    other.receive(BATCH)?;
    let answer = |end: &End, done: &mut Vec<WorkCompletion>| {
        let mut receives = 0;
        while receives == 0 {
            receives = end.next(done)?.1;
        }
        end.receive(receives)
    };
    let (median, ()) = on_two(
        || {
            let (mut done, mut trips) = (Vec::new(), Vec::new());
            for trip in 0..TRIPS_BEFORE + TRIPS {
                let began = Instant::now();
                one.send(1, SendOp::Send, SHORT, trip % DEPTH == 0)?;
                answer(&one, &mut done)?;
                trips.push(began.elapsed());
            }
            trips.drain(..TRIPS_BEFORE);
            trips.sort_unstable();
            Ok(trips[TRIPS / 2].as_secs_f64() * 1e6)
        },
        || {
            let mut done = Vec::new();
            for trip in 0..TRIPS_BEFORE + TRIPS {
                answer(&other, &mut done)?;
                other.send(1, SendOp::Send, SHORT, trip % DEPTH == 0)?;
            }
            Ok(())
        },
    )?;
    Ok(median)
}

/// Requests of one kind per second; the other end has receives for SENDs, and hears of the end by one
/// with immediate data.
fn stream(name: &str, len: usize, op: impl Fn(&End) -> SendOp) -> Result<f64, Failure> {
    let [one, other] = End::pair(name)?;
    let op = op(&one);
    for _ in 0..DEPTH / BATCH {
        other.receive(BATCH)?;
    }
    let is_heard = matches!(op, SendOp::Send);
    let (rate, ()) = on_two(
        || {
            let mut done = Vec::new();
            let (mut free, mut finished) = (DEPTH, 0);
            let mut run = |length: Duration| {
                let began = Instant::now();
                let before = finished;
                while began.elapsed() < length {
                    while free >= BATCH {
                        one.send(BATCH, op, len, true)?;
                        free -= BATCH;
                    }
                    let count = BATCH * one.next(&mut done)?.0;
                    free += count;
                    finished += count;
                }
                Ok((finished - before) as f64 / began.elapsed().as_secs_f64())
            };
            run(WARM_UP)?;
            let rate = run(MEASURED)?;
            while free < DEPTH {
                free += BATCH * one.next(&mut done)?.0;
            }
            one.send(1, SendOp::SendImm(0), SHORT, true)?;
            one.next(&mut done)?;
            Ok(rate)
        },
        || {
            if !is_heard {
                // Nobody looks while WRITEs arrive: a soft device needs the processor.
                return Ok(());
            }
            let mut done = Vec::new();
            loop {
                let receives = other.next(&mut done)?.1;
                if done.iter().any(|work| work.imm.is_some()) {
                    return Ok(());
                }
                other.receive(receives)?;
            }
        },
    )?;
    Ok(rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figure_is_in_the_line_of_numbers() {
        let said = "\
 #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]
 64      2000          21.05          84.00        25.50       \t       27.10
---------------------------------------------------------------------------------------";
        assert_eq!(figure(said, 4), Some(25.5));
        assert_eq!(figure("#bytes #iterations\n 64 2000 1.0", 4), None);
    }

    #[test]
    fn a_device_that_is_not_there_is_named() {
        let error = open("no such device").err().unwrap();
        assert!(error.to_string().contains("no such device"));
    }
}
