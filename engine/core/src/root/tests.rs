use super::*;
use crate::identity::{JoinRefusal, StoreMark};
use crate::ids::{Step, StorageId};

const ROOT: NodeId = NodeId(1);
const ROUTER: NodeId = NodeId(2);
const CLIENT: NodeId = NodeId(3);
const OTHER: NodeId = NodeId(4);
const HOME: NodeId = NodeId(5);

/// A root that says at once that its state is durable.
struct Bench {
    root: Root,
    now: Time,
    /// Who was sent a Pong.
    answered: Vec<NodeId>,
    /// The newest durable state.
    state: Vec<u8>,
    /// The last message that it sent besides.
    sent: Option<Message>,
}

impl Bench {
    fn new() -> Bench {
        let config = RootConfig {
            interval: 1,
            evict_after: 1000,
            retry_after: 10,
        };
        Bench::with(config, RootState::default(), Time(0))
    }

    fn with(config: RootConfig, state: RootState, now: Time) -> Bench {
        let mut bench = Bench {
            root: Root::new(ROOT, config, state, now),
            now,
            answered: Vec::new(),
            state: Vec::new(),
            sent: None,
        };
        bench.settles();
        bench
    }

    /// The root's process dies and another one starts.
    fn restarts(self) -> Bench {
        let state = RootState::decode(&self.state).expect("its own state");
        Bench::with(self.root.config, state, self.now)
    }

    fn hears(&mut self, from: Life, body: Message) {
        let epoch = match body {
            Message::Join { .. } => 1,
            _ => 100,
        };
        self.hears_at(Epoch(epoch), from, body);
    }

    fn hears_at(&mut self, epoch: Epoch, from: Life, body: Message) {
        let envelope = Envelope {
            from,
            epoch,
            minimum: Epoch(0),
            term: Term(0),
            body,
        };
        self.root.handle_message(self.now, envelope);
        self.settles();
    }

    fn settles(&mut self) {
        while let Some(effect) = self.root.poll_effect() {
            match effect {
                Effect::Persist { version, state } => {
                    self.state = state;
                    self.root.handle_persisted(self.now, version);
                }
                Effect::Send { to, envelope } => match envelope.body {
                    Message::Pong { .. } => self.answered.push(to),
                    body => self.sent = Some(body),
                },
                _ => {}
            }
        }
    }

    fn joins(&mut self, node: NodeId, role: Role) -> Life {
        let unborn = Life {
            node,
            incarnation: Incarnation(0),
        };
        let store = (role == Role::Destination).then_some(StoreMark {
            storage: StorageId(1),
            commit: Step(0),
        });
        let join = Message::Join {
            nonce: 7,
            role,
            store,
        };
        self.hears(unborn, join);
        let view = self.root.view();
        view.seat(node).expect("it joined").life
    }

    /// A new process of the home joins with this storage.
    fn home_joins(&mut self, nonce: u64, storage: u128, commit: u64) -> Result<Life, JoinRefusal> {
        let unborn = Life {
            node: HOME,
            incarnation: Incarnation(0),
        };
        let join = Message::Join {
            nonce,
            role: Role::Destination,
            store: Some(StoreMark {
                storage: StorageId(storage),
                commit: Step(commit),
            }),
        };
        self.sent = None;
        self.hears(unborn, join);
        match self.sent.take() {
            Some(Message::Joined { nonce: n, life, .. }) if n == nonce => Ok(life),
            Some(Message::Rejected { nonce: n, reason }) if n == nonce => Err(reason),
            other => panic!("{other:?}"),
        }
    }

    fn home_pings(&mut self, life: Life, commit: u64) {
        let ping = Message::Ping {
            attach: 0,
            lower_bound: Epoch(100),
            view: ViewId(0),
            waits: Waits::No,
            commit: Some(Step(commit)),
        };
        self.hears(life, ping);
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
        lowest: Some(client),
        covers: alloc::vec![Covered {
            life: client,
            attach: 1,
        }],
        view: ViewId(0),
        waits: Waits::Yes,
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
        waits: Waits::Yes,
        attach: 2,
        commit: None,
    };
    bench.hears(client, ping);
    assert_eq!(bench.minimum(), Epoch(70));
    assert!(bench.root.view().seat(CLIENT).is_some_and(|s| s.live));
}

/// A root that returns knows no attachment: a report tells it of those that an earlier life of the
/// root confirmed, but of none that is older than what the child itself says, and of nobody dead.
#[test]
fn a_root_that_returns_takes_attachments_from_reports() {
    let mut bench = Bench::new();
    // It never answers a fence, so the dead stay counted.
    bench.joins(HOME, Role::Destination);
    let router = bench.joins(ROUTER, Role::Aggregator);
    let lives = [CLIENT, OTHER].map(|node| bench.joins(node, Role::Client));
    let [client, other] = lives;
    let report = |bound| Message::Report {
        lower_bound: Epoch(bound),
        lowest: None,
        covers: lives.map(|life| Covered { life, attach: 1 }).to_vec(),
        view: ViewId(0),
        waits: Waits::Yes,
    };
    for life in lives {
        bench.hears(router, Message::Attach { life, attach: 1 });
    }
    bench.hears(router, report(40));
    assert_eq!(bench.minimum(), Epoch(40));

    let mut bench = bench.restarts();
    assert_eq!(bench.minimum(), Epoch(40), "everybody is held");
    bench.hears(router, report(60));
    assert_eq!(bench.minimum(), Epoch(60));

    let mut bench = bench.restarts();
    let left = Message::Ping {
        lower_bound: Epoch(70),
        view: ViewId(0),
        waits: Waits::Yes,
        attach: 2,
        commit: None,
    };
    bench.hears(client, left);
    bench.hears(router, report(80));
    assert_eq!(bench.minimum(), Epoch(70), "it has left the router");

    let mut bench = bench.restarts();
    bench.root.declare_dead(bench.now, OTHER);
    bench.hears(router, report(90));
    assert_eq!(bench.root.counts(other), Some(Epoch(70)), "it is frozen");
    assert_eq!(bench.root.counts(client), Some(Epoch(90)));
}

/// Whoever asks again to be let in lives, however long the root's disk takes to let it know.
#[test]
fn who_asks_to_join_is_not_silent() {
    let mut bench = Bench::new();
    let client = bench.joins(CLIENT, Role::Client);
    for _ in 0..30 {
        bench.now = bench.now.after(100);
        bench.joins(CLIENT, Role::Client);
        bench.minimum();
    }
    assert!(bench.root.is_member(client));
    assert_eq!(bench.root.evictions().count(), 0);
}

/// A ping of a member that waits for something.
fn ping(lower_bound: u64, waits: Waits) -> Message {
    Message::Ping {
        attach: 0,
        lower_bound: Epoch(lower_bound),
        view: ViewId(0),
        waits,
        commit: None,
    }
}

/// Lets `evict_after` pass twice, in which a home, a router and who it covers are heard: CLIENT
/// holds its branch at 40, OTHER does not. Returns who lives then, of the two.
fn branch_held_at_40(waits: Waits) -> (bool, bool) {
    let mut bench = Bench::new();
    let router = bench.joins(ROUTER, Role::Aggregator);
    let home = bench.joins(HOME, Role::Destination);
    let lives = [CLIENT, OTHER].map(|node| bench.joins(node, Role::Client));
    for life in lives {
        bench.hears(router, Message::Attach { life, attach: 1 });
    }
    let covers = lives.map(|life| Covered { life, attach: 1 });
    for _ in 0..200 {
        bench.now = bench.now.after(10);
        bench.hears(home, ping(60, waits));
        let report = Message::Report {
            lower_bound: Epoch(40),
            lowest: Some(lives[0]),
            covers: covers.to_vec(),
            view: ViewId(0),
            waits: Waits::Yes,
        };
        bench.hears(router, report);
        bench.root.handle_timeout(bench.now);
        bench.settles();
    }
    assert_eq!(
        bench.root.port().minimum(),
        Epoch(40),
        "nobody answered a fence"
    );
    let [client, other] = lives.map(|life| bench.root.is_member(life));
    assert_eq!(
        bench.root.counters().held_back,
        u64::from(!client) + u64::from(!other)
    );
    (client, other)
}

#[test]
fn a_child_that_holds_m_while_a_log_is_full_is_told_from_its_neighbours() {
    assert_eq!(branch_held_at_40(Waits::ForRoom), (false, true));
}

#[test]
fn a_child_that_holds_m_is_left_alone_while_every_log_has_room() {
    assert_eq!(branch_held_at_40(Waits::Yes), (true, true));
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
    for tick in 200..10_200 {
        let ping = Message::Ping {
            lower_bound: Epoch(tick),
            view: ViewId(0),
            waits: Waits::Yes,
            attach: 0,
            commit: None,
        };
        hear(&mut bench.root, client, tick, ping);
        let join = Message::Join {
            nonce: 9,
            role: Role::Aggregator,
            store: None,
        };
        hear(&mut bench.root, unborn, tick, join);
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

#[test]
fn who_rests_is_told_once_when_the_epoch_rises_or_the_view_changes() {
    let mut bench = Bench::new();
    let client = bench.joins(CLIENT, Role::Client);
    let other = bench.joins(OTHER, Role::Client);
    // All news is told with answers; then the client has nothing to say any more.
    for _ in 0..3 {
        bench.now = bench.now.after(1);
        let epoch = bench.root.port().epoch();
        bench.hears_at(epoch, client, ping(epoch.0, Waits::No));
    }
    let epoch = bench.root.port().epoch();
    bench.answered.clear();
    bench.now = bench.now.after(5);
    bench.hears_at(epoch, other, ping(epoch.0, Waits::Yes));
    assert!(bench.root.port().epoch() > epoch, "somebody waits");
    bench.answered.sort_unstable();
    assert_eq!(bench.answered, [CLIENT, OTHER]);

    // It has not pinged since, so it does not rest.
    bench.answered.clear();
    bench.now = bench.now.after(5);
    bench.hears_at(epoch, other, ping(epoch.0, Waits::Yes));
    assert_eq!(bench.answered, [OTHER]);

    let epoch = bench.root.port().epoch();
    bench.hears_at(epoch, client, ping(epoch.0, Waits::No));
    bench.answered.clear();
    let home = bench.joins(HOME, Role::Destination);
    assert_eq!(bench.answered, [CLIENT], "{home} is in the view");
}

#[test]
fn a_root_that_hears_a_newer_term_leaves_and_says_nothing_more() {
    let mut bench = Bench::new();
    let client = bench.joins(CLIENT, Role::Client);
    let says = |term| Envelope {
        from: client,
        epoch: Epoch(100),
        minimum: Epoch(0),
        term: Term(term),
        body: ping(50, Waits::Yes),
    };
    bench.root.handle_message(bench.now, says(1));
    // An answer and a new m are under way when it hears of another root.
    bench.root.handle_message(bench.now, says(2));
    assert_eq!(bench.root.poll_effect(), Some(Effect::Evicted));
    bench.now = Time(100_000);
    bench.root.handle_message(bench.now, says(1));
    bench.root.declare_dead(bench.now, CLIENT);
    bench.root.handle_timeout(bench.now);
    bench.root.handle_persisted(bench.now, 1000);
    assert_eq!(bench.root.poll_effect(), None);
}

#[test]
fn a_home_on_another_storage_or_an_old_copy_is_not_let_in() {
    let mut bench = Bench::new();
    let first = bench.home_joins(1, 7, 0).expect("nothing is known of it");
    bench.home_pings(first, 50);
    bench.home_pings(first, 30);
    let other = JoinRefusal::OtherStorage {
        known: StorageId(7),
    };
    let older = JoinRefusal::OlderStorage { known: Step(50) };
    let view = bench.root.view();
    assert_eq!(bench.home_joins(2, 8, 0), Err(other));
    assert_eq!(bench.home_joins(3, 8, 1000), Err(other));
    assert_eq!(bench.home_joins(4, 7, 49), Err(older));
    assert_eq!(bench.home_joins(4, 7, 49), Err(older), "it asks again");
    assert_eq!(bench.root.counters().rejected, 3);
    assert_eq!(bench.root.view(), view, "nobody is replaced by them");
    assert!(bench.root.is_member(first));
    let second = bench.home_joins(5, 7, 50).expect("its own storage");
    assert!(second > first);
    // A Join that comes again is the same process, whatever it says now.
    assert_eq!(bench.home_joins(5, 7, 50), Ok(second));
    let third = bench.home_joins(6, 7, 60).expect("it has gone on");
    assert!(third > second);
}

#[test]
fn only_pings_of_the_life_that_counts_raise_what_is_known_of_a_storage() {
    let mut bench = Bench::new();
    let first = bench.home_joins(1, 7, 10).expect("new");
    // What a start found may be lost in a power failure.
    let second = bench.home_joins(2, 7, 9).expect("a join is no promise");
    bench.home_pings(first, 40);
    let stranger = Life {
        node: CLIENT,
        ..second
    };
    bench.home_pings(stranger, 40);
    bench
        .home_joins(3, 7, 9)
        .expect("an older life says nothing");
}

#[test]
fn a_roots_restart_forgets_no_storage() {
    let mut bench = Bench::new();
    let home = bench.home_joins(1, 7, 0).expect("new");
    // Its epoch is news, and so m is.
    bench.home_pings(home, 10);
    bench.home_pings(home, 50);
    let known = |bench: &Bench| RootState::decode(&bench.state).unwrap().store(HOME);
    assert_eq!(
        known(&bench).unwrap().commit,
        Step(10),
        "not for that alone"
    );
    // At rest nothing else would have the state written.
    bench.now = Time(bench.now.0 + 1000 / 8);
    bench.root.handle_timeout(bench.now);
    bench.settles();
    assert_eq!(known(&bench).unwrap().commit, Step(50));
    let before = bench.state.clone();
    bench.now = Time(bench.now.0 + 1000);
    bench.root.handle_timeout(bench.now);
    bench.settles();
    assert_eq!(bench.state, before, "it is written once");

    let mut bench = bench.restarts();
    let older = JoinRefusal::OlderStorage { known: Step(50) };
    assert_eq!(bench.home_joins(2, 7, 49), Err(older));
    assert!(bench.home_joins(3, 8, 50).is_err());
    bench.home_joins(4, 7, 50).expect("its own storage");
}

#[test]
fn a_home_that_does_not_say_what_it_has_is_not_heard() {
    let mut bench = Bench::new();
    let unborn = Life {
        node: HOME,
        incarnation: Incarnation(0),
    };
    let join = Message::Join {
        nonce: 1,
        role: Role::Destination,
        store: None,
    };
    bench.hears(unborn, join);
    assert_eq!(bench.root.view().seat(HOME), None);
}
