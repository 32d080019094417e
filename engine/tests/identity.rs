//! A server comes back on its own storage, on an empty one, or on an old copy: a real cluster, whose
//! server is a process of its own, which is killed, also with its power.

use std::fs;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lowtide_engine::medium::power::apply_power_loss;
use lowtide_engine::node::{self, NodeConfig, NodeError, NodeHandle, Peer, Role};
use lowtide_engine::offline::{self, OfflineConfig, OfflineError};
use lowtide_engine_core::ids::NodeId;
use lowtide_engine_core::op::{Bytes, Change, Key, Mode, Range, Request, Update, Want};
use lowtide_engine_core::session::{Session, Ticket};

const ROOT: NodeId = NodeId(0);
const HOME: NodeId = NodeId(10);
const CLIENT: NodeId = NodeId(40);
const PATIENCE: Duration = Duration::from_secs(30);

/// The cluster whose addresses the process `pid` has chosen.
fn peers(pid: u32) -> Vec<Peer> {
    let peer = |(id, role): (NodeId, Role)| {
        let ip = Ipv4Addr::new(
            127,
            0x60 | (pid >> 8) as u8 & 0xF,
            pid as u8,
            1 + id.0 as u8,
        );
        Peer {
            id,
            role,
            addr: SocketAddr::new(IpAddr::V4(ip), 4791),
        }
    };
    let roles = [
        (ROOT, Role::Root),
        (HOME, Role::Meta),
        (CLIENT, Role::Client),
    ];
    roles.map(peer).into()
}

fn begin(pid: u32, id: NodeId, dir: PathBuf) -> NodeHandle {
    let peers = peers(pid);
    let me = peers.iter().find(|p| p.id == id).expect("a known node");
    let mut config = NodeConfig::new(id, me.role, me.addr);
    config.peers = peers.clone();
    config.dir = Some(dir);
    config.shards = 2;
    config.power_fail = id == HOME;
    node::start(config).expect("the node starts")
}

#[test]
#[ignore = "the test below runs it in a process of its own, which it kills"]
fn child_server() {
    let pid = std::env::var("LOWTIDE_TEST_PID").expect("run by another test");
    let dir = std::env::var_os("LOWTIDE_TEST_DIR").expect("run by another test");
    let server = begin(pid.parse().unwrap(), HOME, dir.into());
    loop {
        if let Some(why) = server.failure() {
            println!("left: {}", words(&why));
            return;
        }
        // A node ends without a word to its handle.
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A word for the parent, and the words for the user.
fn words(why: &NodeError) -> String {
    let kind = match why {
        NodeError::OtherStorage { .. } => "other",
        NodeError::OlderStorage { .. } => "older",
        _ => "else",
    };
    format!("{kind}: {why}")
}

struct Cluster {
    dir: tempfile::TempDir,
    root: NodeHandle,
    client: NodeHandle,
    server: Option<Child>,
    puts: u64,
}

impl Cluster {
    fn new() -> Cluster {
        let dir = tempfile::tempdir().expect("a directory");
        let pid = std::process::id();
        let root = begin(pid, ROOT, dir.path().join("root"));
        let client = begin(pid, CLIENT, dir.path().join("client"));
        Cluster {
            dir,
            root,
            client,
            server: None,
            puts: 0,
        }
    }

    fn home(&self) -> PathBuf {
        self.dir.path().join("home")
    }

    fn start(&mut self) {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--ignored", "--nocapture", "child_server"])
            .env("LOWTIDE_TEST_DIR", self.home())
            .env("LOWTIDE_TEST_PID", std::process::id().to_string())
            .stdout(Stdio::piped())
            .spawn();
        self.server = Some(child.unwrap());
    }

    /// SIGKILL.
    fn kill(&mut self) {
        let mut child = self.server.take().expect("it runs");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Starts the server and waits until it has left by itself; says why.
    fn start_and_see_it_leave(&mut self) -> String {
        self.start();
        let mut child = self.server.take().expect("just started");
        let mut said = String::new();
        let mut out = child.stdout.take().unwrap();
        out.read_to_string(&mut said).unwrap();
        child.wait().unwrap();
        let left = said.lines().find_map(|line| line.split_once("left: "));
        left.map(|(_, why)| why.to_owned()).expect("it says why")
    }

    /// Waits until the root has let in life number `incarnation` of the server; status can only be
    /// looked at.
    #[track_caller]
    fn until_joined(&self, incarnation: u64) {
        let since = Instant::now();
        let joined = |s: &lowtide_engine::status::Status| {
            let mut members = s.members.iter();
            members.any(|m| m.id == HOME.0 && m.incarnation == incarnation)
        };
        while !joined(&self.root.status()) {
            std::thread::sleep(Duration::from_millis(5));
            assert!(since.elapsed() < PATIENCE, "{:?}", self.root.status());
        }
    }

    /// Waits until the root's status, which is of some moment ago, says how many it did not let in.
    fn until_rejected(&self, times: u64) {
        let until = Instant::now() + PATIENCE;
        while self.rejected() < times {
            assert!(Instant::now() < until, "{} of {times}", self.rejected());
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(self.rejected(), times);
    }

    fn rejected(&self) -> u64 {
        self.root.status().counters.joins_rejected
    }

    /// Asks for so many puts; they are on their way.
    fn put(&mut self, count: u64) -> Vec<Ticket> {
        let session = self.client.session();
        assert!(session.wait_joined(PATIENCE), "the client joins");
        let submit = |slot: u64| {
            let key = Key::at(7, slot);
            let request = Request {
                locks: vec![Want {
                    home: HOME,
                    range: Range::whole(7),
                    mode: Mode::Exclusive,
                }],
                updates: vec![Update {
                    home: HOME,
                    key,
                    change: Change::Put(Bytes::from(slot.to_le_bytes())),
                }],
                ..Request::default()
            };
            session.submit(request).expect("submitted")
        };
        let first = self.puts;
        self.puts += count;
        (first..self.puts).map(submit).collect()
    }

    fn wait_stable(&self, tickets: Vec<Ticket>) {
        let session = self.client.session();
        for ticket in tickets {
            session.wait(ticket).expect("executed");
        }
        session.wait_stable().expect("stable");
    }

    /// Everything that was put is there.
    fn check(&self) {
        let session = self.client.session();
        let page = session.scan(HOME, Range::whole(7), None, 64 << 20);
        let page = page.expect("scan");
        assert_eq!((page.entries.len() as u64, page.more), (self.puts, false));
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &to),
            false => drop(fs::copy(entry.path(), to).unwrap()),
        }
    }
}

#[test]
fn a_server_is_let_in_on_its_own_storage_and_on_no_other() {
    let mut c = Cluster::new();
    c.start();
    let tickets = c.put(100);
    c.wait_stable(tickets);

    // Killed at any moment, which is what the sleeps are for, with work that is not synced, and with the power: let in each time.
    for round in 0..8u64 {
        let tickets = c.put(300);
        std::thread::sleep(Duration::from_millis(7 * round));
        c.kill();
        if round % 2 == 1 {
            apply_power_loss(c.home(), round).unwrap();
        }
        c.start();
        c.until_joined(round + 2);
        c.wait_stable(tickets);
        c.check();
    }
    assert_eq!(c.rejected(), 0);

    // What has become stable since a copy was made is missed in it.
    c.kill();
    let (own, old) = (c.dir.path().join("own"), c.dir.path().join("old"));
    copy(&c.home(), &old);
    c.start();
    c.until_joined(10);
    let tickets = c.put(50);
    c.wait_stable(tickets);
    c.kill();
    fs::rename(c.home(), &own).unwrap();
    copy(&old, &c.home());
    for times in 1..=3 {
        let why = c.start_and_see_it_leave();
        assert!(why.starts_with("older: its storage is older"), "{why}");
        c.until_rejected(times);
    }
    let offline = |c: &Cluster, root: PathBuf| {
        let config = OfflineConfig {
            root: (ROOT, root),
            servers: vec![(HOME, c.home())],
        };
        offline::open(&config)
    };

    // An empty directory, and none.
    fs::remove_dir_all(c.home()).unwrap();
    fs::create_dir(c.home()).unwrap();
    for times in 4..=5 {
        let why = c.start_and_see_it_leave();
        assert!(why.starts_with("other: its storage is another"), "{why}");
        c.until_rejected(times);
        fs::remove_dir_all(c.home()).unwrap();
    }
    let root = c.dir.path().join("root");
    let copied = c.dir.path().join("root-copied");
    copy(&root, &copied);
    let missing = offline(&c, copied.clone()).expect_err("it is gone");
    assert!(
        matches!(missing, OfflineError::Missing { node: HOME, .. }),
        "{missing}"
    );
    assert!(!c.home().exists(), "nothing is put in its place");
    copy(&old, &c.home());
    let older = offline(&c, copied).expect_err("it is old");
    let OfflineError::Rejected {
        node: HOME, error, ..
    } = &older
    else {
        panic!("{older}");
    };
    assert!(matches!(error, NodeError::OlderStorage { .. }), "{older}");
    fs::remove_dir_all(c.home()).unwrap();

    fs::rename(&own, c.home()).unwrap();
    c.start();
    c.until_joined(11);
    let tickets = c.put(50);
    c.wait_stable(tickets);
    c.check();
    c.kill();
    c.client.stop().expect("a clean end");
    c.root.stop().expect("a clean end");
}
