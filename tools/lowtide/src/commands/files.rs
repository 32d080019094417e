//! `lowtide put`, `get`, `ls` and the other commands on names: handed to a running client of a
//! local cluster, or done by this process as a client of its own.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use super::{Failure, Kind};
use crate::cli::Where;
use crate::config::{Cluster, Role};
use crate::control::{Control, ControlError, FileJob, Job, JobReport, Order, Outcome, RawPath};
use crate::jobs::Jobs;
use crate::{engine, state};

/// Time between two looks at a job.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// A path on this machine, whatever the directory of the process that will use it.
pub(super) fn local(path: &Path) -> Result<RawPath, Failure> {
    let absolute = std::path::absolute(path)
        .map_err(|error| Failure::usage(format!("{}: {error}", path.display())))?;
    Ok(RawPath(absolute))
}

/// Does a command and prints what it tells.
pub(super) fn run(cluster: &Where, job: FileJob) -> Result<(), Failure> {
    let outcome = match (&cluster.state, &cluster.cluster) {
        (Some(dir), _) => on_running_client(dir, job)?,
        (None, Some(file)) => as_client(file, cluster, job)?,
        (None, None) => return Err(Failure::usage("name a cluster with --state or --cluster")),
    };
    match outcome {
        Outcome::Output { lines } => {
            let mut out = std::io::stdout().lock();
            lines
                .iter()
                .try_for_each(|line| writeln!(out, "{line}"))
                .map_err(Failure::output)
        }
        Outcome::Failed { reason } => Err(Failure::cluster(reason)),
        other => Err(Failure::cluster(format!("unexpected outcome {other:?}"))),
    }
}

fn on_running_client(dir: &Path, job: FileJob) -> Result<Outcome, Failure> {
    let cluster = state::cluster(dir).map_err(Failure::usage)?;
    let mut control = cluster
        .of_role(Role::Client)
        .find_map(|client| Control::connect(&state::control_socket(dir, &client.name)).ok())
        .ok_or_else(|| {
            Failure::cluster(format!(
                "{}: no client of this cluster is running (lowtide run --stay keeps them)",
                dir.display()
            ))
        })?;
    let follow = |control: &mut Control| -> Result<Outcome, ControlError> {
        let id = control.start(Job::Files(job))?;
        let outcome = loop {
            if let Some(outcome) = ended(&control.report()?.jobs, id) {
                break outcome;
            }
            std::thread::sleep(LOOK_INTERVAL);
        };
        control.ask(&Order::Forget { job: id })?;
        Ok(outcome)
    };
    follow(&mut control).map_err(Failure::cluster)
}

fn as_client(file: &Path, place: &Where, job: FileJob) -> Result<Outcome, Failure> {
    let cluster = Cluster::load(file).map_err(Failure::usage)?;
    let name = place.client.as_deref();
    let client = match name {
        Some(name) => cluster.member(name).filter(|m| m.role == Role::Client),
        // The first ones are likely to be in use.
        None => cluster.of_role(Role::Client).last(),
    };
    let client = client.ok_or_else(|| {
        Failure::usage(format!(
            "{}: no client {}",
            file.display(),
            name.unwrap_or("at all")
        ))
    })?;
    let at = Some(client.address.ip());
    let chosen = engine::choose_provider(place.provider, at, engine::needs_wire(0.0));
    let (carrier, _) = chosen.map_err(Failure::usage)?;
    let node = engine::join(&cluster, &client.name, &carrier).map_err(Failure::cluster)?;
    let jobs = Jobs::start(node.session()).map_err(Failure::cluster)?;
    let id = jobs.submit(Job::Files(job)).map_err(Failure::cluster)?;
    let outcome = loop {
        if let Some(outcome) = ended(&jobs.reports(), id) {
            break outcome;
        }
        if let Some(failure) = node.failure() {
            return Err(Failure::new(Kind::Cluster, failure));
        }
        std::thread::sleep(LOOK_INTERVAL);
    };
    node.stop().map_err(Failure::cluster)?;
    Ok(outcome)
}

fn ended(jobs: &[JobReport], id: u64) -> Option<Outcome> {
    jobs.iter().find(|job| job.id == id)?.outcome.clone()
}
