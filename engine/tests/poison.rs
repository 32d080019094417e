//! A message with an epoch that cannot be (T7) reaches a real node over real sockets: it changes
//! nothing, is counted at both ends, and the log has a line of it now and then.

use std::io::IoSlice;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use lowtide_engine::frame::{self, Frame};
use lowtide_engine::node::{self, NodeConfig, NodeHandle, Peer, Role};
use lowtide_engine::status::NodeCounters;
use lowtide_engine_core::epoch::JUMP_MAX;
use lowtide_engine_core::ids::{Epoch, Incarnation, Life, NodeId, Term};
use lowtide_engine_core::message::{self, Envelope, Message};
use lowtide_transport::message::{ConnId, Endpoint, EndpointConfig, Event};
use tracing::span::{Attributes, Id, Record};
use tracing::{Level, Metadata, Subscriber};

const ROOT: NodeId = NodeId(0);
const LIAR: NodeId = NodeId(40);
const PATIENCE: Duration = Duration::from_secs(20);

/// Warnings that the process has logged.
static WARNINGS: AtomicU64 = AtomicU64::new(0);

/// Counts warnings, and knows nothing else.
struct Warnings;

impl Subscriber for Warnings {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::WARN
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, _: &tracing::Event<'_>) {
        WARNINGS.fetch_add(1, Ordering::Relaxed);
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

fn peers() -> Vec<Peer> {
    let pid = std::process::id();
    let peer = |(id, role): (NodeId, Role)| Peer {
        id,
        role,
        addr: SocketAddr::new(
            IpAddr::V4(Ipv4Addr::new(
                127,
                0x70 | (pid >> 8) as u8 & 0xF,
                pid as u8,
                1 + id.0 as u8,
            )),
            4791,
        ),
    };
    [(ROOT, Role::Root), (LIAR, Role::Client)].map(peer).into()
}

/// A client's end of a connection to the root that says whatever it is told to.
struct Liar {
    endpoint: Endpoint,
    conn: ConnId,
    heard: Vec<Envelope>,
    sequence: u32,
}

impl Liar {
    fn connect(peers: &[Peer]) -> Liar {
        let nonce = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let nonce = nonce.expect("a clock").as_nanos() as u64;
        let mut config = EndpointConfig::new(peers[1].addr, u64::from(LIAR.0), nonce);
        config.hello = LIAR.0.to_le_bytes().to_vec();
        let mut endpoint = Endpoint::bind(config).expect("the address is free");
        let conn = endpoint.connect(peers[0].addr, &LIAR.0.to_le_bytes());
        let mut is_up = false;
        while !is_up {
            let round = endpoint.poll(None, &mut |_, event| {
                is_up |= matches!(event, Event::Connected { conn: c, .. } if c == conn);
            });
            round.expect("a healthy socket");
        }
        Liar {
            endpoint,
            conn,
            heard: Vec::new(),
            sequence: 0,
        }
    }

    fn says(&mut self, epoch: u64, minimum: u64, body: Message) {
        let own = |node| Life {
            node,
            incarnation: Incarnation(0),
        };
        let envelope = Envelope {
            from: own(LIAR),
            epoch: Epoch(epoch),
            minimum: Epoch(minimum),
            term: Term(1),
            body,
        };
        self.sequence += 1;
        let mut frame = Frame::default();
        frame.encode(&envelope, own(ROOT), self.sequence);
        let bytes = frame.as_slice().expect("no long values");
        self.endpoint
            .send(self.conn, &[IoSlice::new(bytes)])
            .expect("there is room");
        self.endpoint.flush();
    }

    fn listens(&mut self) {
        let own = Life {
            node: LIAR,
            incarnation: Incarnation(0),
        };
        let Liar {
            endpoint, heard, ..
        } = self;
        let round = endpoint.poll(Some(Duration::from_millis(5)), &mut |_, event| {
            if let Event::Message { bytes, .. } = event {
                heard.push(frame::decode(bytes, None, own).expect("a whole frame"));
            }
        });
        round.expect("a healthy socket");
        self.endpoint.flush();
    }

    /// Listens until the node's counters are as wanted.
    #[track_caller]
    fn until(&mut self, node: &NodeHandle, what: &str, reached: impl Fn(&NodeCounters) -> bool) {
        let since = Instant::now();
        while !reached(&node.status().counters) {
            self.listens();
            assert!(since.elapsed() < PATIENCE, "{what}: {:?}", node.status());
        }
    }
}

#[test]
fn a_forged_epoch_is_refused_and_both_ends_count_it() {
    tracing::subscriber::set_global_default(Warnings).expect("nobody else has one");
    let dir = tempfile::tempdir().expect("a directory");
    let peers = peers();
    let mut config = NodeConfig::new(ROOT, Role::Root, peers[0].addr);
    config.peers = peers.clone();
    config.dir = Some(dir.path().to_path_buf());
    let root = node::start(config).expect("the root starts");
    let mut liar = Liar::connect(&peers);
    let join = || Message::Join {
        nonce: 1,
        role: message::Role::Client,
        store: None,
    };

    let far = 2 * JUMP_MAX;
    let since = Instant::now();
    liar.says(far, 0, join());
    liar.says(1, far, join());
    for _ in 0..98 {
        liar.says(far, 0, Message::Pong { view: None });
        liar.listens();
    }
    liar.until(&root, "all are refused", |c| c.epochs_refused == 100);
    let status = root.status();
    assert!(status.epoch < JUMP_MAX, "{status:?}");
    assert_eq!(status.members, [], "nobody was let in");
    assert_eq!(status.counters.epochs_refused_elsewhere, 0);
    // One line says it at once, others a second later at the earliest.
    let lines_max = 1 + since.elapsed().as_secs();
    let lines = WARNINGS.load(Ordering::Relaxed);
    assert!((1..=lines_max).contains(&lines), "{lines} warnings");
    let told = |e: &&Envelope| e.body == Message::Incredible { epoch: Epoch(far) };
    while liar.heard.iter().filter(told).count() < 100 {
        liar.listens();
        assert!(since.elapsed() < PATIENCE, "{:?}", liar.heard);
    }

    // A node whose own message was refused counts that as well, and says so.
    liar.says(1, 0, Message::Incredible { epoch: Epoch(far) });
    liar.until(&root, "it is told", |c| c.epochs_refused_elsewhere == 1);
    while WARNINGS.load(Ordering::Relaxed) == lines {
        liar.listens();
        assert!(since.elapsed() < PATIENCE, "no warning");
    }

    // Who tells the truth is heard.
    liar.says(1, 0, join());
    let joined = |e: &Envelope| matches!(e.body, Message::Joined { .. });
    while !liar.heard.iter().any(joined) {
        liar.listens();
        assert!(since.elapsed() < PATIENCE, "{:?}", liar.heard);
    }
    assert_eq!(root.status().counters.epochs_refused, 100);
    root.stop().expect("a clean end");
}
