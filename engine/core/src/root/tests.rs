use super::*;

const ROOT: NodeId = NodeId(1);
const ROUTER: NodeId = NodeId(2);
const CLIENT: NodeId = NodeId(3);

/// A root that says at once that its state is durable.
struct Bench {
    root: Root,
    now: Time,
}

impl Bench {
    fn new() -> Bench {
        let config = RootConfig {
            interval: 1,
            evict_after: 1000,
            retry_after: 10,
        };
        let root = Root::new(ROOT, config, RootState::default(), Time(0));
        Bench { root, now: Time(0) }
    }

    fn hears(&mut self, from: Life, body: Message) {
        let envelope = Envelope {
            from,
            epoch: Epoch(if matches!(body, Message::Join { .. }) {
                1
            } else {
                100
            }),
            minimum: Epoch(0),
            term: Term(0),
            body,
        };
        self.root.handle_message(self.now, envelope);
        self.settles();
    }

    fn settles(&mut self) {
        while let Some(effect) = self.root.poll_effect() {
            if let Effect::Persist { version, .. } = effect {
                self.root.handle_persisted(self.now, version);
            }
        }
    }

    fn joins(&mut self, node: NodeId, role: Role) -> Life {
        let unborn = Life {
            node,
            incarnation: Incarnation(0),
        };
        self.hears(unborn, Message::Join { nonce: 7, role });
        let view = self.root.view();
        view.seat(node).expect("it joined").life
    }

    fn minimum(&mut self) -> Epoch {
        self.now = Time(self.now.0 + 1);
        self.root.handle_timeout(self.now);
        self.settles();
        self.root.port().minimum()
    }
}

#[test]
fn a_dead_routers_children_are_held_where_it_last_had_them() {
    let mut bench = Bench::new();
    let router = bench.joins(ROUTER, Role::Aggregator);
    let client = bench.joins(CLIENT, Role::Client);
    let attach = Message::Attach {
        life: client,
        attach: 1,
    };
    bench.hears(router, attach);
    let report = |bound| Message::Report {
        lower_bound: Epoch(bound),
        covers: alloc::vec![Covered {
            life: client,
            attach: 1,
        }],
        view: ViewId(0),
        waits: true,
    };
    bench.hears(router, report(40));
    assert_eq!(bench.minimum(), Epoch(40));

    bench.root.declare_dead(bench.now, ROUTER);
    bench.settles();
    assert!(bench.root.view().seat(ROUTER).is_some_and(|s| !s.live));
    // What the dead life said is late; only the client itself can raise its bound now.
    bench.hears(router, report(60));
    assert_eq!(bench.minimum(), Epoch(40));
    let ping = Message::Ping {
        lower_bound: Epoch(70),
        view: ViewId(0),
        waits: true,
        attach: 2,
    };
    bench.hears(client, ping);
    assert_eq!(bench.minimum(), Epoch(70));
    assert!(bench.root.view().seat(CLIENT).is_some_and(|s| s.live));
}

#[test]
fn a_root_whose_states_are_not_kept_grows_no_further_and_then_goes_on() {
    let mut bench = Bench::new();
    let client = bench.joins(CLIENT, Role::Client);
    let before = bench.minimum();
    let hear = |root: &mut Root, from: Life, now: u64, body: Message| {
        let envelope = Envelope {
            from,
            epoch: Epoch(now),
            minimum: Epoch(0),
            term: Term(0),
            body,
        };
        root.handle_message(Time(now), envelope);
    };
    let mut version = 0;
    let mut poll = |root: &mut Root| {
        while let Some(effect) = root.poll_effect() {
            match effect {
                Effect::Persist { version: v, .. } => version = v,
                other => panic!("{other:?} rests on a state that is not kept"),
            }
        }
        version
    };
    let unborn = Life {
        node: ROUTER,
        incarnation: Incarnation(0),
    };
    for now in 200..10_200 {
        let ping = Message::Ping {
            lower_bound: Epoch(now),
            view: ViewId(0),
            waits: true,
            attach: 0,
        };
        hear(&mut bench.root, client, now, ping);
        let join = Message::Join {
            nonce: 9,
            role: Role::Aggregator,
        };
        hear(&mut bench.root, unborn, now, join);
        poll(&mut bench.root);
    }
    assert!(bench.root.waiting.len() <= WAITING_MANY + 8);
    assert!(bench.root.unpublished.len() <= UNPUBLISHED_MAX);
    assert_eq!(bench.root.port().minimum(), before);

    let version = poll(&mut bench.root);
    bench.root.handle_persisted(Time(10_200), version);
    bench.settles();
    assert!(bench.root.waiting.is_empty() && bench.root.unpublished.is_empty());
    assert_eq!(bench.root.port().minimum(), Epoch(10_199));
    assert!(bench.root.view().seat(ROUTER).is_some_and(|s| s.live));
}
