//! `lowtide export` and `lowtide verify`: the state of a stopped or crashed cluster, recovered in
//! this process without its network; and `lowtide lose-power`, which damages such a state as a power
//! failure would.

use std::fmt::Arguments;
use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};

use lowtide_engine::offline::{self, OfflineConfig, OfflineError, OfflineState, Unresolved};
use lowtide_engine_core::ids::NodeId;
use lowtide_engine_core::op::{Bytes, Key, Range};
use lowtide_engine_core::session::{Page, Placement, SessionError};
use lowtide_filetree::fetch::{self, FetchOptions};
use lowtide_filetree::local::{Objects, Offline};
use lowtide_filetree::tree::Tree;
use lowtide_filetree::{Progress, check};

use super::{Failure, Kind};
use crate::cli::{ExportArgs, LosePowerArgs, VerifyArgs};
use crate::config::{Cluster, NodeFile, Role};
use crate::engine;
use crate::jobs::words;
use crate::report::Size;
use crate::state::{self, State};

/// Most problems that are printed.
const PROBLEMS_MAX: usize = 100;

pub(super) fn export(args: &ExportArgs) -> Result<(), Failure> {
    let state = State::open(&args.state).map_err(Failure::usage)?;
    // Before the state is touched.
    if std::fs::read_dir(&args.to).is_ok_and(|mut inside| inside.next().is_some()) {
        let to = args.to.display();
        return Err(Failure::usage(format!("--to {to}: not empty")));
    }
    let session = recover(&state)?;
    let tree = Tree::open(&session).map_err(|e| Failure::cluster(words(e)))?;
    let options = FetchOptions::default();
    let report = fetch::fetch(&tree, &args.to, &options, &Progress::default())
        .map_err(|e| Failure::cluster(words(e)))?;
    say(format_args!(
        "exported  {} files, {} directories, {} symbolic links, {} further names, {}",
        report.files,
        report.directories,
        report.symlinks,
        report.links,
        Size(report.bytes)
    ))?;
    if !report.owners_restored {
        let words = "          owners are yours; only the superuser can restore them";
        say(format_args!("{words}"))?;
    }
    let damaged = report.damaged.list.iter().map(ToString::to_string);
    judge("damaged entries", report.damaged.count, damaged)
}

pub(super) fn verify(args: &VerifyArgs) -> Result<(), Failure> {
    let state = State::open(&args.state).map_err(Failure::usage)?;
    let session = recover(&state)?;
    let tree = Tree::open(&session).map_err(|e| Failure::cluster(words(e)))?;
    let report = check::check(&tree).map_err(|e| Failure::cluster(words(e)))?;
    say(format_args!(
        "checked   {} inodes, {} entries, {} chunks, {}; {} interrupted creations, {} interrupted deletions",
        report.inodes,
        report.entries,
        report.chunks,
        Size(report.bytes),
        report.unfinished.len(),
        report.unfreed.len(),
    ))?;
    let findings = report.findings.iter().map(ToString::to_string);
    judge("violations", report.finding_count, findings)
}

pub(super) fn lose_power(args: &LosePowerArgs) -> Result<(), Failure> {
    let state = State::open(&args.state).map_err(Failure::usage)?;
    let cluster = state::cluster(state.dir()).map_err(Failure::usage)?;
    // The root keeps one small file, which it syncs before it takes the old one's place.
    for role in [Role::Meta, Role::Object] {
        for member in cluster.of_role(role) {
            let name = &member.name;
            let file = state.dir().join(name).join("node.toml");
            if !NodeFile::load(&file)
                .map_err(Failure::usage)?
                .record_unsynced
            {
                let words = "nothing was recorded; start the cluster with --record-unsynced";
                return Err(Failure::usage(format!("{name}: {words}")));
            }
            let dir = state::data_dir(state.dir(), name);
            let seed = args.seed.wrapping_add(u64::from(member.id));
            let lost = engine::lose_unsynced(&dir, seed)
                .map_err(|reason| Failure::cluster(format!("{}: {reason}", dir.display())))?;
            say(format_args!("{name:9} {lost}"))?;
        }
    }
    Ok(())
}

/// A line for the user.
fn say(line: Arguments<'_>) -> Result<(), Failure> {
    writeln!(std::io::stdout(), "{line}").map_err(Failure::output)
}

/// Prints what was found and fails if there was anything.
fn judge(what: &str, count: u64, list: impl Iterator<Item = String>) -> Result<(), Failure> {
    if count == 0 {
        return Ok(());
    }
    let mut message = format!("{count} {what}");
    for line in list.take(PROBLEMS_MAX) {
        message += "\n  ";
        message += &line;
    }
    Err(Failure::new(Kind::Verification, message))
}

/// Recovers the state: what clients and proxies left is completed or undone, in place.
fn recover(state: &State) -> Result<Offline<RecoveredObjects>, Failure> {
    let cluster = state::cluster(state.dir()).map_err(Failure::usage)?;
    let place = |member: &crate::config::Member| {
        (
            NodeId(member.id),
            state::data_dir(state.dir(), &member.name),
        )
    };
    let servers = [Role::Meta, Role::Object].map(|role| cluster.of_role(role).map(place));
    let config = OfflineConfig {
        root: cluster
            .of_role(Role::Root)
            .map(place)
            .next()
            .expect("checked when the cluster was loaded"),
        servers: servers.into_iter().flatten().collect(),
    };
    let recovered = offline::open(&config).map_err(|error| match error {
        OfflineError::Unresolved(all) => {
            let words: Vec<String> = all.iter().map(|one| unresolved(&cluster, one)).collect();
            Failure::cluster(words.join("; "))
        }
        error => Failure::cluster(words(error)),
    })?;
    let (undone, completed) = recovered.undone_and_completed();
    say(format_args!(
        "recovered {} dead lives, {completed} operations completed, {undone} undone",
        recovered.resolved()
    ))?;
    Ok(Offline::new(RecoveredObjects {
        placement: placement(&cluster),
        state: Mutex::new(recovered),
    }))
}

/// Whose work is unresolved for want of whom, by the names of the cluster.
fn unresolved(cluster: &Cluster, work: &Unresolved) -> String {
    let name = |node: NodeId| {
        let mut members = cluster.members.iter();
        let member = members.find(|member| member.id == node.0);
        member.map_or_else(|| format!("node {node}"), |member| member.name.clone())
    };
    let missing: Vec<String> = work.missing.iter().map(|node| name(*node)).collect();
    let (whose, stage) = (name(work.life.node), work.stage);
    format!(
        "the work of {whose} is unresolved ({stage}) without {}",
        missing.join(", ")
    )
}

fn placement(cluster: &Cluster) -> Placement {
    let of = |role| cluster.of_role(role).map(|m| NodeId(m.id)).collect();
    Placement {
        meta: of(Role::Meta),
        object: of(Role::Object),
    }
}

/// The objects of a recovered cluster. Reading moves caches, so one thread reads at a time.
struct RecoveredObjects {
    placement: Placement,
    state: Mutex<OfflineState>,
}

impl RecoveredObjects {
    fn state(&self) -> MutexGuard<'_, OfflineState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unavailable(home: NodeId) -> impl FnOnce(OfflineError) -> SessionError {
    move |error| {
        eprintln!("lowtide: server {home}: {error}");
        SessionError::Unavailable { home }
    }
}

impl Objects for RecoveredObjects {
    fn placement(&self) -> &Placement {
        &self.placement
    }

    fn get(&self, home: NodeId, key: &Key) -> Result<Option<Bytes>, SessionError> {
        self.state().get(home, key).map_err(unavailable(home))
    }

    fn scan(
        &self,
        home: NodeId,
        range: Range,
        after: Option<&Key>,
        bytes_max: usize,
    ) -> Result<Page, SessionError> {
        self.state()
            .scan(home, &range, after, bytes_max)
            .map_err(unavailable(home))
    }
}

#[cfg(test)]
mod tests {
    use lowtide_engine_core::ids::{Incarnation, Life};

    use super::*;

    #[test]
    fn unresolved_work_is_named_as_the_cluster_names_its_nodes() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("cluster.toml");
        std::fs::write(&file, include_str!("../../tests/data/cluster.toml")).unwrap();
        let cluster = Cluster::load(&file).unwrap();
        let client = cluster.of_role(Role::Client).next().unwrap();
        let meta = cluster.of_role(Role::Meta).next().unwrap();
        let work = Unresolved {
            life: Life {
                node: NodeId(client.id),
                incarnation: Incarnation(3),
            },
            stage: "FENCING",
            missing: vec![NodeId(meta.id), NodeId(4711)],
        };
        let words = unresolved(&cluster, &work);
        let expected = format!(
            "the work of {} is unresolved (FENCING) without {}, node {}",
            client.name,
            meta.name,
            NodeId(4711)
        );
        assert_eq!(words, expected);
    }
}
