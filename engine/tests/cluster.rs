//! A whole cluster inside one process, on loopback addresses, with real sockets and real files:
//! operations over two servers become stable, survive restarts of every persistent node, and are
//! read back.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::Range as Bytewise;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use lowtide_engine::medium::dir::{DirOptions, DirVolume};
use lowtide_engine::medium::{Access, Call, Medium, MediumError, Volume};
use lowtide_engine::node::{self, NodeConfig, NodeError, NodeHandle, Peer, Role};
use lowtide_engine::offline::{self, OfflineConfig, OfflineError, Unresolved};
use lowtide_engine::store::extents::EXTENTS_FILE;
use lowtide_engine_core::ids::NodeId;
use lowtide_engine_core::op::{
    Bytes, Change, Check, Expect, Key, Mode, Range, Request, Update, Want,
};
use lowtide_engine_core::session::Session;
use lowtide_transport::message::{Endpoint, EndpointConfig, Event};

static CLUSTERS: AtomicU8 = AtomicU8::new(0);

const ROOT: NodeId = NodeId(0);
const META: [NodeId; 2] = [NodeId(10), NodeId(11)];
const OBJECT: NodeId = NodeId(20);
const PROXY: NodeId = NodeId(30);
const CLIENT: NodeId = NodeId(40);

fn peers() -> Vec<Peer> {
    let pid = std::process::id();
    let cluster = CLUSTERS.fetch_add(1, Ordering::Relaxed);
    let roles = [
        (ROOT, Role::Root),
        (META[0], Role::Meta),
        (META[1], Role::Meta),
        (OBJECT, Role::Object),
        (PROXY, Role::Proxy),
        (CLIENT, Role::Client),
    ];
    let peer = |(id, role): (NodeId, Role)| {
        // Eight clusters of one process, and those of processes with neighbouring ids, do not meet.
        let high = 0x80 | (cluster & 7) << 4 | (pid >> 8) as u8 & 0xF;
        let ip = Ipv4Addr::new(127, high, pid as u8, 1 + id.0 as u8);
        Peer {
            id,
            role,
            addr: SocketAddr::new(IpAddr::V4(ip), 4791),
        }
    };
    roles.into_iter().map(peer).collect()
}

fn begin(peers: &[Peer], id: NodeId, dir: &Path, shape: (bool, u32)) -> NodeHandle {
    node::start(config(peers, id, dir, shape)).expect("the node starts")
}

fn config(
    peers: &[Peer],
    id: NodeId,
    dir: &Path,
    (through_proxy, shards): (bool, u32),
) -> NodeConfig {
    let me = peers.iter().find(|p| p.id == id).expect("a known node");
    let mut config = NodeConfig::new(id, me.role, me.addr);
    config.peers = peers.to_vec();
    config.dir = Some(dir.join(id.to_string()));
    config.shards = shards;
    if through_proxy && id == CLIENT {
        config.via = [META[0], META[1], OBJECT]
            .map(|home| (home, PROXY))
            .to_vec();
    }
    config
}

/// Ends the process with everybody's status if the test takes far too long, because a cluster
/// that hangs says nothing by itself.
fn watch(handles: &[&NodeHandle], work: impl FnOnce()) {
    let (done, finished) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let waited = finished.recv_timeout(Duration::from_secs(40));
            if waited == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                for handle in handles {
                    eprintln!("{:#?} {:?}", handle.status(), handle.failure());
                }
                std::process::exit(1);
            }
        });
        work();
        drop(done);
    });
}

/// An operation that creates `name` at one metadata server and its inode at the other.
fn create(slot: u64, value: &[u8]) -> Request {
    let key = Key {
        space: 7,
        slot,
        name: b"name".to_vec(),
    };
    let inode = Key::at(8, slot);
    let lock = |home, space| Want {
        home,
        range: Range::whole(space),
        mode: Mode::Exclusive,
    };
    Request {
        locks: vec![lock(META[0], 7), lock(META[1], 8), lock(OBJECT, 9)],
        checks: vec![Check {
            home: META[0],
            key: key.clone(),
            expect: Expect::Absent,
        }],
        updates: vec![
            Update {
                home: META[0],
                key,
                change: Change::Put(Bytes::from(value)),
            },
            Update {
                home: META[1],
                key: inode,
                change: Change::Put(Bytes::from(value)),
            },
            // Another space at the same home: another shard, if there are several.
            Update {
                home: META[1],
                key: Key::at(101, slot % 7),
                change: Change::Add(Bytes::from(1i64.to_le_bytes())),
            },
            Update {
                home: OBJECT,
                key: Key::at(9, slot),
                change: Change::Put(Bytes::from(value.repeat(1 + slot as usize * 700))),
            },
        ],
    }
}

/// The servers run with `shards[0]` shards at first, then with `shards[1]`.
fn run(through_proxy: bool, shards: [u32; 2]) {
    let dir = tempfile::tempdir().expect("a directory");
    let peers = peers();
    let begin = |id, shards| begin(&peers, id, dir.path(), (through_proxy, shards));
    let [first, second] = shards;
    let servers = [ROOT, META[0], META[1], OBJECT, PROXY].map(|id| begin(id, first));
    let client = begin(CLIENT, first);
    let mut handles: Vec<&NodeHandle> = servers.iter().collect();
    handles.push(&client);
    watch(&handles, || {
        let session = client.session();
        assert!(
            session.wait_joined(Duration::from_secs(20)),
            "the client joins"
        );
        let tickets: Vec<_> = (0..200)
            .map(|slot| session.submit(create(slot, b"value")).expect("submitted"))
            .collect();
        for ticket in tickets {
            session.wait(ticket).expect("executed");
        }
        let again = session.submit(create(5, b"other")).expect("submitted");
        session.wait(again).expect_err("the name exists");
        session.wait_stable().expect("stable");
    });
    client.stop().expect("a clean end");
    for server in servers {
        server.stop().expect("a clean end");
    }

    let servers = [ROOT, META[0], META[1], OBJECT, PROXY].map(|id| begin(id, second));
    let client = begin(CLIENT, second);
    let mut handles: Vec<&NodeHandle> = servers.iter().collect();
    handles.push(&client);
    watch(&handles, || {
        let session = client.session();
        assert!(
            session.wait_joined(Duration::from_secs(20)),
            "the client joins again"
        );
        for slot in [0, 5, 150, 199] {
            let read = session.read(META[1], &Key::at(8, slot)).expect("read");
            assert_eq!(read.as_deref(), Some(&b"value"[..]));
            let data = session
                .read(OBJECT, &Key::at(9, slot))
                .expect("read")
                .expect("exists");
            assert_eq!(data.len(), 5 * (1 + slot as usize * 700));
        }
        let page = session
            .scan(META[0], Range::whole(7), None, 1 << 20)
            .expect("scan");
        assert_eq!((page.entries.len(), page.more), (200, false));
    });
    client.stop().expect("a clean end");
    for server in servers {
        server.stop().expect("a clean end");
    }

    let dir_of = |id: NodeId| (id, dir.path().join(id.to_string()));
    let config = OfflineConfig {
        root: dir_of(ROOT),
        servers: [META[0], META[1], OBJECT].map(dir_of).to_vec(),
    };
    let mut state = offline::open(&config).expect("recovers offline");
    let page = state
        .scan(META[0], &Range::whole(7), None, 1 << 20)
        .expect("scan");
    assert_eq!((page.entries.len(), page.more), (200, false));
    let data = state
        .get(OBJECT, &Key::at(9, 199))
        .expect("get")
        .expect("exists");
    assert_eq!(data.len(), 5 * (1 + 199 * 700));
    let mut counted = 0;
    for slot in 0..7 {
        let words = state.get(META[1], &Key::at(101, slot)).expect("get");
        let words = words.expect("exists")[..8].try_into().expect("a word");
        counted += i64::from_le_bytes(words);
    }
    assert_eq!(counted, 200);
}

#[test]
fn operations_survive_a_restart_of_the_whole_cluster() {
    run(false, [1, 1]);
}

#[test]
fn operations_survive_a_restart_with_more_shards() {
    run(false, [1, 3]);
}

#[test]
fn operations_survive_a_restart_with_fewer_shards() {
    run(false, [3, 2]);
}

#[test]
fn operations_through_a_proxy_survive_a_restart_of_the_whole_cluster() {
    run(true, [2, 1]);
}

/// A server's process takes a client's Open, so that nothing is under way, and dies before it has
/// joined or said a word. The client must find the life that comes after it.
#[test]
fn a_life_that_never_spoke_is_not_waited_for() {
    let dir = tempfile::tempdir().expect("a directory");
    let peers = peers();
    let begin = |id| begin(&peers, id, dir.path(), (false, 1));
    let mut servers = Vec::from([ROOT, META[0], OBJECT].map(begin));
    let client = begin(CLIENT);
    let first = begin(META[1]);
    let session = client.session();
    assert!(session.wait_joined(Duration::from_secs(20)));
    let ticket = session.submit(create(1, b"one")).expect("submitted");
    session.wait(ticket).expect("executed");
    session.wait_stable().expect("stable");
    first.stop().expect("a clean end");

    let ticket = session.submit(create(2, b"two")).expect("submitted");
    take_opens_and_die(&peers, META[1]);
    servers.push(begin(META[1]));
    let mut handles: Vec<&NodeHandle> = servers.iter().collect();
    handles.push(&client);
    watch(&handles, || {
        session.wait(ticket).expect("executed");
        session.wait_stable().expect("stable");
    });
    client.stop().expect("a clean end");
    for server in servers {
        server.stop().expect("a clean end");
    }
}

/// A process at `node`'s address that acknowledges what comes, until the client has connected and
/// its Open has come; then it is gone without a goodbye.
fn take_opens_and_die(peers: &[Peer], node: NodeId) {
    let me = peers.iter().find(|p| p.id == node).expect("a known node");
    let nonce = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let nonce = nonce.expect("a clock").as_nanos() as u64;
    let mut config = EndpointConfig::new(me.addr, u64::from(node.0), nonce);
    config.hello = node.0.to_le_bytes().to_vec();
    let mut endpoint = Endpoint::bind(config).expect("the address is free");
    let mut from_client = None;
    let mut is_open = false;
    while !is_open {
        let round = endpoint.poll(None, &mut |_, event| match event {
            Event::Connected { conn, node, .. } if node == u64::from(CLIENT.0) => {
                from_client = Some(conn);
            }
            Event::Message { conn, .. } => is_open |= from_client == Some(conn),
            _ => {}
        });
        round.expect("a healthy socket");
    }
    // What has come is acknowledged; what the end of the endpoint would say is not heard.
    endpoint.flush();
    for peer in peers {
        endpoint.set_blocked(peer.addr, true);
    }
}

/// Files of a directory of which some can no longer be synced once the switch is thrown.
#[derive(Debug)]
struct Failing {
    files: DirVolume,
    which: fn(&str) -> bool,
    switch: Arc<AtomicBool>,
}

#[derive(Debug)]
struct FailingFile {
    name: String,
    file: Arc<dyn Medium>,
    switch: Arc<AtomicBool>,
}

impl Failing {
    fn wrap(&self, name: &str, file: Arc<dyn Medium>) -> Arc<dyn Medium> {
        if !(self.which)(name) {
            return file;
        }
        let (name, switch) = (name.to_owned(), self.switch.clone());
        Arc::new(FailingFile { name, file, switch })
    }
}

impl Volume for Failing {
    fn list(&self) -> Result<Vec<String>, MediumError> {
        self.files.list()
    }

    fn open(&self, name: &str, access: Access) -> Result<Arc<dyn Medium>, MediumError> {
        Ok(self.wrap(name, self.files.open(name, access)?))
    }

    fn create(&self, name: &str, len: u64, access: Access) -> Result<Arc<dyn Medium>, MediumError> {
        Ok(self.wrap(name, self.files.create(name, len, access)?))
    }

    fn remove(&self, name: &str) -> Result<(), MediumError> {
        self.files.remove(name)
    }

    fn free_bytes(&self) -> Result<u64, MediumError> {
        self.files.free_bytes()
    }
}

impl Medium for FailingFile {
    fn len(&self) -> Result<u64, MediumError> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), MediumError> {
        self.file.read(offset, out)
    }

    fn store(&self, offset: u64, bytes: &[u8]) -> Result<(), MediumError> {
        self.file.store(offset, bytes)
    }

    fn store_all(&self, offset: u64, stretches: &[&[u8]]) -> Result<(), MediumError> {
        self.file.store_all(offset, stretches)
    }

    fn sync(&self, range: Bytewise<u64>) -> Result<(), MediumError> {
        if !self.switch.load(Ordering::SeqCst) {
            return self.file.sync(range);
        }
        Err(MediumError::Io {
            file: self.name.clone(),
            call: Call::Sync,
            offset: range.start,
            len: range.end - range.start,
            source: Arc::new(std::io::Error::other("the disk is gone")),
        })
    }

    fn resize(&self, len: u64) -> Result<(), MediumError> {
        self.file.resize(len)
    }

    fn prefault(&self, range: Bytewise<u64>) {
        self.file.prefault(range);
    }

    fn close(&self) -> Result<(), MediumError> {
        self.file.close()
    }
}

/// Operations before the disk fails, and after it.
const BEFORE: u64 = 60;
const AFTER: u64 = 40;

/// `failing` cannot sync files that `which` selects from some moment on: it leaves and has told nobody
/// that anything later is committed; after its restart all that was submitted becomes stable.
fn leaves_when_a_sync_fails(failing: NodeId, shards: u32, which: fn(&str) -> bool) {
    let dir = tempfile::tempdir().expect("a directory");
    let peers = peers();
    let begin = |id| begin(&peers, id, dir.path(), (false, shards));
    let switch = Arc::new(AtomicBool::new(false));
    let node = {
        let mut config = config(&peers, failing, dir.path(), (false, shards));
        let own = config.dir.take().expect("a server has one");
        let files = DirVolume::open(own, DirOptions::default()).expect("the directory is free");
        let switch = switch.clone();
        config.volume = Some(Arc::new(Failing {
            files,
            which,
            switch,
        }));
        node::start(config).expect("the node starts")
    };
    let others = [ROOT, META[0], META[1], OBJECT].into_iter();
    let mut servers: Vec<NodeHandle> = others.filter(|id| *id != failing).map(begin).collect();
    let client = begin(CLIENT);
    let session = client.session();
    let submit = |slot| session.submit(create(slot, b"value")).expect("submitted");
    watch(&[&node, &client], || {
        assert!(session.wait_joined(Duration::from_secs(20)));
        for ticket in (0..BEFORE).map(submit).collect::<Vec<_>>() {
            session.wait(ticket).expect("executed");
        }
        session.wait_stable().expect("stable");
        switch.store(true, Ordering::SeqCst);
        let _executed_or_not: Vec<_> = (BEFORE..BEFORE + AFTER).map(submit).collect();
        // A node ends without a word to its handle; `watch` bounds the wait.
        while node.failure().is_none() {
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    let (told, stable) = mpsc::channel();
    let waits = std::thread::spawn({
        let session = client.session();
        move || told.send(session.wait_stable())
    });
    let silence = stable.recv_timeout(Duration::from_millis(700));
    assert_eq!(silence.err(), Some(mpsc::RecvTimeoutError::Timeout));
    // Every one of them wrote something there.
    assert_eq!(client.status().counters.in_flight, AFTER);
    match node.stop() {
        Err(NodeError::Storage(why)) => assert!(why.contains("the disk is gone"), "{why}"),
        other => panic!("{other:?}"),
    }

    servers.push(begin(failing));
    let mut handles: Vec<&NodeHandle> = servers.iter().collect();
    handles.push(&client);
    watch(&handles, || {
        let told = stable.recv().expect("the waiting thread lives");
        told.expect("stable after the restart");
    });
    waits.join().expect("no panic").expect("somebody listened");
    client.stop().expect("a clean end");
    for server in servers {
        server.stop().expect("a clean end");
    }
    let mut state = offline::open(&offline_config(dir.path(), &[META[0], META[1], OBJECT]))
        .expect("recovers offline");
    for slot in 0..BEFORE + AFTER {
        let inode = state.get(META[1], &Key::at(8, slot)).expect("get");
        assert_eq!(inode.as_deref(), Some(&b"value"[..]), "{slot}");
        let data = state.get(OBJECT, &Key::at(9, slot)).expect("get");
        assert_eq!(
            data.map(|d| d.len()),
            Some(5 * (1 + slot as usize * 700)),
            "{slot}"
        );
    }
}

fn offline_config(dir: &Path, servers: &[NodeId]) -> OfflineConfig {
    let place = |id: &NodeId| (*id, dir.join(id.to_string()));
    OfflineConfig {
        root: place(&ROOT),
        servers: servers.iter().map(place).collect(),
    }
}

#[test]
fn a_server_whose_log_cannot_be_synced_leaves() {
    leaves_when_a_sync_fails(META[1], 1, |name| name.ends_with(".seg"));
}

#[test]
fn a_server_of_several_shards_leaves_when_one_log_cannot_be_synced() {
    leaves_when_a_sync_fails(META[1], 3, |name| name.ends_with("-00000.seg"));
}

#[test]
fn a_server_whose_extents_cannot_be_synced_leaves() {
    leaves_when_a_sync_fails(OBJECT, 1, |name| name == EXTENTS_FILE);
}

/// The client ends when there is no root to hear of it; so its work has to be resolved by all servers.
#[test]
fn offline_recovery_says_whose_work_is_unresolved_without_whom() {
    let dir = tempfile::tempdir().expect("a directory");
    let peers = peers();
    let begin = |id| begin(&peers, id, dir.path(), (false, 1));
    let root = begin(ROOT);
    let servers = [META[0], META[1], OBJECT].map(begin);
    let client = begin(CLIENT);
    let session = client.session();
    let mut handles: Vec<&NodeHandle> = servers.iter().collect();
    handles.extend([&root, &client]);
    watch(&handles, || {
        assert!(session.wait_joined(Duration::from_secs(20)));
        let ticket = session.submit(create(1, b"one")).expect("submitted");
        session.wait(ticket).expect("executed");
        session.wait_stable().expect("stable");
    });
    root.stop().expect("a clean end");
    client.stop().expect("a clean end");
    for server in servers {
        server.stop().expect("a clean end");
    }

    let open = |servers: &[NodeId]| {
        let config = offline_config(dir.path(), servers);
        offline::open_within(&config, Duration::from_secs(2))
    };
    let began = Instant::now();
    match open(&[META[0], OBJECT]) {
        Err(OfflineError::Unresolved(all)) => {
            let missing = |u: &Unresolved| u.life.node == CLIENT && u.missing == [META[1]];
            assert!(all.iter().any(missing), "{all:?}");
            let words = OfflineError::Unresolved(all).to_string();
            assert!(words.contains("is unresolved"), "{words}");
            assert!(
                words.contains(&format!("without node {}", META[1])),
                "{words}"
            );
        }
        other => panic!("{other:?}"),
    }
    assert!(began.elapsed() >= Duration::from_secs(2));
    // Nothing was spoilt by the try.
    let mut state = open(&[META[0], META[1], OBJECT]).expect("recovers offline");
    assert_eq!(state.resolved(), 1);
    let inode = state.get(META[1], &Key::at(8, 1)).expect("get");
    assert_eq!(inode.as_deref(), Some(&b"one"[..]));
}
