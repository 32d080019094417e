//! `lowtide node`: one node as a process.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use lowtide_engine::node::NodeHandle;
use lowtide_engine_core::ids::NodeId;
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use signal_hook::consts::{SIGINT, SIGTERM};

use super::Failure;
use crate::cli::NodeArgs;
use crate::config::{NodeFile, Role};
use crate::control::{Answer, NodeReport, Order, Server};
use crate::engine;
use crate::jobs::Jobs;

/// Time between looks at the engine's health; signals and orders need no look.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

pub(super) fn node(args: &NodeArgs) -> Result<(), Failure> {
    if let Some(parent) = args.supervised {
        die_with(parent)?;
    }
    log_to_stderr();
    let file = NodeFile::load(&args.config).map_err(Failure::usage)?;
    let needs_wire = engine::needs_wire(file.loss_percent);
    let at = Some(file.member.address.ip());
    let chosen = engine::choose_provider(file.provider, at, needs_wire);
    let (carrier, provider) = chosen.map_err(Failure::usage)?;
    let handle = engine::start(&file, &carrier).map_err(Failure::cluster)?;
    tracing::info!(
        name = file.member.name,
        address = %file.member.address,
        provider,
        "node started"
    );
    let jobs = match file.member.role {
        Role::Client => Some(Jobs::start(handle.session()).map_err(Failure::cluster)?),
        _ => None,
    };
    let (mut stopped, stop) = stop_channel().map_err(Failure::cluster)?;
    let duty = Arc::new(Duty {
        node: RwLock::new(Some(handle)),
        jobs,
        stop,
    });
    let orders = Arc::clone(&duty);
    let server = Server::start(&file.control, Arc::new(move |order| orders.answer(order)))
        .map_err(|e| Failure::cluster(format!("{}: {e}", file.control.display())))?;

    let healthy = || duty.with(|node| node.failure().is_none()).unwrap_or(false);
    while healthy() {
        match stopped.read(&mut [0]) {
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            _ => break,
        }
    }
    drop(server);
    let node = duty
        .node
        .write()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    // Jobs end once their session is closed; the last owner of the duty waits for them.
    let ended = node.map_or(Ok(()), NodeHandle::stop);
    tracing::info!(name = file.member.name, ?ended, "node stopped");
    ended.map_err(|error| Failure::cluster(format!("{} left: {error}", file.member.name)))
}

/// What orders act on.
struct Duty {
    /// `None` once the node is stopping.
    node: RwLock<Option<NodeHandle>>,
    jobs: Option<Jobs>,
    /// A byte here ends the process in good order.
    stop: UnixStream,
}

impl Duty {
    fn with<T>(&self, act: impl FnOnce(&NodeHandle) -> T) -> Option<T> {
        let node = self.node.read().unwrap_or_else(PoisonError::into_inner);
        node.as_ref().map(act)
    }

    fn answer(&self, order: Order) -> Answer {
        self.carry_out(order)
            .unwrap_or_else(|reason| Answer::Refused { reason })
    }

    fn carry_out(&self, order: Order) -> Result<Answer, String> {
        let stopping = || "the node is stopping".to_owned();
        match order {
            Order::Report => {
                let status = self.with(NodeHandle::status).ok_or_else(stopping)?;
                let jobs = self.jobs.as_ref().map(Jobs::reports);
                return Ok(Answer::Report(Box::new(NodeReport {
                    status,
                    jobs: jobs.unwrap_or_default(),
                })));
            }
            Order::Block { peer, blocked } => self
                .with(|node| node.set_blocked(NodeId(peer), blocked))
                .ok_or_else(stopping)?,
            Order::Gone { node: dead } => self
                .with(|node| node.declare_dead(NodeId(dead)))
                .ok_or_else(stopping)?,
            Order::Start { job } => {
                let jobs = self.jobs.as_ref().ok_or("only clients do jobs")?;
                return Ok(Answer::Started {
                    job: jobs.submit(job)?,
                });
            }
            Order::Forget { job } => self
                .jobs
                .as_ref()
                .ok_or("only clients do jobs")?
                .forget(job),
            // Full means that somebody else gave the order already.
            Order::Stop => drop((&self.stop).write(&[0])),
        }
        Ok(Answer::Done)
    }
}

/// What an order to stop and every signal to end write a byte to, and the end that is read, for
/// [`LOOK_INTERVAL`] at a time.
fn stop_channel() -> std::io::Result<(UnixStream, UnixStream)> {
    let (read, write) = UnixStream::pair()?;
    read.set_read_timeout(Some(LOOK_INTERVAL))?;
    write.set_nonblocking(true)?;
    for signal in [SIGINT, SIGTERM] {
        signal_hook::low_level::pipe::register(signal, write.try_clone()?)?;
    }
    Ok((read, write))
}

/// Has the kernel kill this process when its parent dies.
fn die_with(parent: i32) -> Result<(), Failure> {
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(Failure::cluster)?;
    // The parent may have died before that call.
    if getppid() != Pid::from_raw(parent) {
        return Err(Failure::usage(format!(
            "process {parent} is not the parent"
        )));
    }
    Ok(())
}

/// Events of this process go to its standard error; `LOWTIDE_LOG` sets the level.
fn log_to_stderr() {
    let level = std::env::var("LOWTIDE_LOG")
        .ok()
        .and_then(|level| level.parse().ok())
        .unwrap_or(tracing::Level::INFO);
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_max_level(level)
        .init();
}
