//! Clusters whose nodes are started one by one, as on several machines, and what only they show: who is
//! evicted by silence alone, who holds things up, and that a tree which was tampered with is told from a
//! sound one.

mod common;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use common::{check, lowtide, make_input, text, wait_until};
use lowtide_cli::config::{Cluster, Provider};
use lowtide_cli::control::{Control, NodeReport};
use lowtide_cli::engine::{self, Carrier};
use lowtide_cli::fault::Shape;
use lowtide_cli::state::{State, control_socket};
use lowtide_cli::supervisor::layout;
use lowtide_engine_core::op::{Change, Request, Update};
use lowtide_engine_core::session::Session;
use lowtide_filetree::layout::{Attributes, Ino, count_key, count_value};
use lowtide_filetree::tree::Tree;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Not a port of `lowtide run`, whose addresses may be the same.
const PORT: u16 = 29_391;

/// A cluster in a state directory, and those of its nodes that run.
struct ByHand {
    dir: PathBuf,
    cluster: Cluster,
    nodes: BTreeMap<String, Child>,
}

impl ByHand {
    /// One metadata server, one object server, two clients, nobody between them; none runs.
    fn new(dir: &Path, silence: Duration) -> ByHand {
        let shape = Shape {
            meta: 1,
            object: 1,
            proxy: 0,
            client: 2,
            router: 0,
        };
        drop(State::create(dir).unwrap());
        let cluster = layout::cluster(&shape, &addresses(shape.total() as u8));
        let common = layout::Common {
            provider: Provider::Softroce,
            loss_percent: 0.0,
            seed: 1,
            record_unsynced: false,
            shards: 1,
            evict_after_ms: u64::try_from(silence.as_millis()).unwrap(),
        };
        layout::write(dir, &cluster, &common).unwrap();
        ByHand {
            dir: dir.to_owned(),
            cluster,
            nodes: BTreeMap::new(),
        }
    }

    /// Starts these nodes and waits until they are a cluster.
    fn start(&mut self, names: &[&str]) {
        for name in names {
            let log = File::create(self.dir.join(name).join("log")).unwrap();
            let config = self.dir.join(name).join("node.toml");
            let node = lowtide(&["node", "--config", text(&config)])
                .stdout(Stdio::null())
                .stderr(log)
                .spawn();
            self.nodes.insert((*name).to_owned(), node.unwrap());
        }
        for name in names {
            wait_until("a node does not start", || {
                self.report(name)
                    .is_some_and(|report| report.status.stage == "COMPLETE")
            });
        }
    }

    fn report(&self, name: &str) -> Option<NodeReport> {
        let socket = control_socket(&self.dir, name);
        Control::connect(&socket).ok()?.report().ok()
    }

    fn signal(&self, name: &str, signal: Signal) {
        kill_process(pid(&self.nodes[name]), signal).unwrap();
    }

    /// Ends every node in good order.
    fn stop(&mut self) {
        for name in ["client0", "client1", "object0", "meta0", "root"] {
            if let Some(mut node) = self.nodes.remove(name) {
                kill_process(pid(&node), Signal::TERM).unwrap();
                assert!(node.wait().unwrap().success(), "{name}");
            }
        }
    }

    /// A command of a client of its own.
    fn spawn(&self, client: &str, command: &str, args: &[&str]) -> Child {
        lowtide(&[command, "--cluster", text(&self.dir.join("cluster.toml"))])
            .args(["--as", client])
            .args(args)
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// Whether the root counts a node among the living.
    fn is_live(&self, name: &str) -> bool {
        let id = self.cluster.member(name).unwrap().id;
        let root = self.report("root").unwrap().status;
        root.members.iter().any(|m| m.id == id && m.live)
    }
}

impl Drop for ByHand {
    fn drop(&mut self) {
        for node in self.nodes.values_mut() {
            let _ = node.kill();
            let _ = node.wait();
        }
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id() as i32).unwrap()
}

/// Loopback addresses that no other test of this process has.
fn addresses(count: u8) -> Vec<SocketAddr> {
    static BLOCKS: AtomicU8 = AtomicU8::new(0);
    let block = BLOCKS.fetch_add(1, Ordering::Relaxed);
    let process = (std::process::id() % 250) as u8;
    (1..=count)
        .map(|node| ([127, 254, process, block * 16 + node], PORT).into())
        .collect()
}

/// Waits for a command that must succeed in time; `std` has no wait with a limit.
fn ends_well(mut child: Child, within: Duration) {
    let deadline = Instant::now() + within;
    loop {
        match child.try_wait().unwrap() {
            Some(status) => break assert!(status.success(), "{status}"),
            None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
            None => {
                let _ = child.kill();
                panic!("a command did not end within {within:?}");
            }
        }
    }
}

#[test]
fn a_client_that_falls_silent_is_evicted_and_its_locks_pass_on() {
    let tmp = tempfile::tempdir().unwrap();
    let silence = Duration::from_secs(3);
    let mut cluster = ByHand::new(&tmp.path().join("state"), silence);
    cluster.start(&["root", "meta0", "object0"]);

    let (large, small) = (tmp.path().join("large"), tmp.path().join("small"));
    fs::write(&large, vec![0x5a; 256 << 20]).unwrap();
    fs::write(&small, "whose name was taken").unwrap();
    let mut dead = cluster.spawn("client0", "put", &[text(&large), "/name"]);
    wait_until("nothing is stored", || {
        let object = cluster.report("object0").unwrap().status;
        object.counters.undo_appended > 0
    });
    assert!(dead.try_wait().unwrap().is_none(), "it is still at work");
    dead.kill().unwrap();
    dead.wait().unwrap();
    let killed = Instant::now();
    assert!(cluster.is_live("client0"), "nobody has told the root");

    let next = cluster.spawn("client1", "put", &[text(&small), "/name"]);
    ends_well(next, Duration::from_secs(25));
    // Its locks were the dead one's until that had been silent for long enough.
    assert!(killed.elapsed() > silence - Duration::from_millis(500));
    assert!(!cluster.is_live("client0"));
    let got = tmp.path().join("got");
    let get = cluster.spawn("client1", "get", &["/name", text(&got)]);
    ends_well(get, Duration::from_secs(25));
    assert_eq!(fs::read(&got).unwrap(), fs::read(&small).unwrap());
}

#[test]
fn status_names_the_client_that_holds_the_minimum() {
    let tmp = tempfile::tempdir().unwrap();
    let mut cluster = ByHand::new(&tmp.path().join("state"), Duration::from_secs(30));
    cluster.start(&["root", "meta0", "object0", "client0", "client1"]);
    let file = tmp.path().join("file");
    fs::write(&file, "small").unwrap();
    cluster.signal("client1", Signal::STOP);
    // The first client takes the command; its work waits for the other one's word.
    let put = lowtide(&["put", "--state", text(&cluster.dir)])
        .args([text(&file), "/file"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let holder = cluster.cluster.member("client1").unwrap().id;
    let executed = || {
        cluster
            .report("object0")
            .unwrap()
            .status
            .counters
            .undo_appended
            > 0
    };
    wait_until("nothing is stored", executed);
    wait_until("nobody holds the minimum", || {
        let root = cluster.report("root").unwrap().status;
        root.epoch > root.minimum + 5 && root.held_by.is_some_and(|hold| hold.id == holder)
    });
    let output = lowtide(&["status", "--state", text(&cluster.dir)]).output();
    let output = output.unwrap();
    check(&output, 0);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let of = |name: &str| {
        let line = said.lines().find(|line| line.starts_with(name));
        line.unwrap_or_else(|| panic!("no line of {name}: {said}"))
    };
    assert!(of("root").contains("; minimum held at "), "{said}");
    assert!(of("root").contains(" by client1 (life 1)"), "{said}");
    assert!(of("meta0").contains("COMPLETE, 1 shards"), "{said}");
    assert!(!of("client1").contains("COMPLETE"), "{said}");
    cluster.signal("client1", Signal::CONT);
    ends_well(put, Duration::from_secs(25));
    cluster.stop();
}

#[test]
fn a_data_directory_serves_one_node_and_says_whom() {
    let tmp = tempfile::tempdir().unwrap();
    let mut first = ByHand::new(&tmp.path().join("first"), Duration::from_secs(30));
    let second = ByHand::new(&tmp.path().join("second"), Duration::from_secs(30));
    first.start(&["root", "meta0"]);
    for name in ["root", "meta0"] {
        // Another address, the same directory.
        let file = second.dir.join(name).join("node.toml");
        let settings = fs::read_to_string(&file).unwrap();
        let data = first.dir.join(name).join("data");
        let settings = settings.replace("\"data\"", &format!("{data:?}"));
        fs::write(&file, settings).unwrap();
        let output = lowtide(&["node", "--config", text(&file)]).output();
        let output = output.unwrap();
        check(&output, 3);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let words = format!("in use by process {}", first.nodes[name].id());
        assert!(said.contains(&words), "{said}");
    }
}

#[test]
fn verify_tells_a_tree_with_half_an_operation_from_a_sound_one() {
    let tmp = tempfile::tempdir().unwrap();
    let mut cluster = ByHand::new(&tmp.path().join("state"), Duration::from_secs(30));
    let servers = ["root", "meta0", "object0"];
    cluster.start(&servers);
    let file = tmp.path().join("file");
    fs::write(&file, "sound").unwrap();
    let put = cluster.spawn("client0", "put", &[text(&file), "/file"]);
    ends_well(put, Duration::from_secs(25));
    cluster.stop();
    let verify = || {
        let state = text(&cluster.dir);
        lowtide(&["verify", "--state", state]).output().unwrap()
    };
    check(&verify(), 0);

    cluster.start(&servers);
    let node = engine::join(&cluster.cluster, "client1", &Carrier::Softroce).unwrap();
    let session = node.session();
    let tree = Tree::open(&session).unwrap();
    let ino = tree.resolve(b"/file").unwrap().ino;
    // A further name is counted, and there is none: what an operation would leave of which only the
    // part at the inode's home is in effect.
    let update = Update {
        home: tree.layout().home(ino),
        key: count_key(ino),
        change: Change::Add(count_value(1)),
    };
    let request = Request {
        updates: vec![update],
        ..Request::default()
    };
    let ticket = session.submit(request).unwrap();
    session.wait(ticket).unwrap();
    session.wait_stable().unwrap();
    drop(tree);
    node.stop().unwrap();
    cluster.stop();
    let verify = || {
        let state = text(&cluster.dir);
        lowtide(&["verify", "--state", state]).output().unwrap()
    };
    let output = verify();
    check(&output, 1);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("1 violations"), "{said}");
    assert!(said.contains(" has 1 names, not 2"), "{said}");
}

#[test]
fn a_run_whose_tree_was_tampered_with_ends_in_1() {
    let tmp = tempfile::tempdir().unwrap();
    let (input, state) = (tmp.path().join("in"), tmp.path().join("state"));
    make_input(&input, 400);
    // What changes in the second in which a run begins counts as changed during it.
    std::thread::sleep(Duration::from_millis(1100));
    let report_file = tmp.path().join("report.json");
    // The one client leaves its seat; the other one is away while that is taken.
    let run = lowtide(&["run", "--patience", "40", "--input", text(&input)])
        .args(["--state", text(&state), "--report", text(&report_file)])
        .args(["--fault", "kill:client1@10%!"])
        .args(["--fault", "pause:client0@30%:5000"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let root = || {
        let mut root = Control::connect(&control_socket(&state, "root")).ok()?;
        Some(root.report().ok()?.status)
    };
    wait_until("the dead client is not evicted", || {
        let Some(root) = root() else { return false };
        let gone = root.members.iter().any(|m| m.id == 9 && !m.live);
        gone && root.stage == "COMPLETE"
    });
    let cluster = Cluster::load(&state.join("cluster.toml")).unwrap();
    assert_eq!(cluster.member("client1").unwrap().id, 9);
    let node = engine::join(&cluster, "client1", &Carrier::Softroce).unwrap();
    let session = node.session();
    let tree = Tree::open(&session).unwrap();
    tree.mkdir(Ino::ROOT, b"intruder", &Attributes::default())
        .unwrap();
    session.wait_stable().unwrap();
    drop(tree);
    node.stop().unwrap();

    let output = run.wait_with_output().unwrap();
    check(&output, 1);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("NOT VERIFIED: "), "{said}");
    let problem = |line: &str| line.starts_with("PROBLEM ") && line.contains("intruder");
    assert!(said.lines().any(problem), "{said}");
    let report: Value = serde_json::from_slice(&fs::read(&report_file).unwrap()).unwrap();
    assert_eq!(report["verified"], false);
    assert!(report["mismatches"].as_u64().unwrap() > 0);
    // A client that is stopped does not stop who would give it the dead one's work.
    let detected = &report["faults"][0]["detected_ms"];
    assert!(detected.as_u64().unwrap() < 3000, "{detected}");
}
