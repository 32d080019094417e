//! Who holds m back although it is heard (design D10): evicted when a log has no room for its sake,
//! left alone otherwise. A part is held back for ever by a connection that carries nothing.

use lowtide_engine_core::session::Ticket;
use lowtide_storm::plan::{ClientPlan, Index, Plan, SmallDisk};
use lowtide_storm::scenario::{Scenario, value};

/// Two homes with logs for a few operations, and clients that reach them directly.
fn small(clients: usize) -> Plan {
    let client = ClientPlan {
        via: Vec::new(),
        ops: 0,
        aggregated: true,
    };
    Plan {
        clients: vec![client; clients],
        small_disk: Some(SmallDisk {
            budget: 4000,
            replaced: 8,
            spare: 2600,
        }),
        ..Plan::quiet(1)
    }
}

/// C0 has written at both homes and keeps its locks, as C1 does at D0; all is stable.
fn begun(plan: Plan) -> Scenario {
    let mut s = Scenario::new(plan);
    let (c0, c1) = (s.c(0), s.c(1));
    let first = s.put(c0, &[(0, 10, 1), (1, 10, 1)]);
    s.wait(first).expect("not refused");
    let first = s.put(c1, &[(0, 20, 1)]);
    let stamp = s.wait(first).expect("not refused");
    s.until("it is stable", |s| s.minimum() > stamp.epoch);
    recycled(&mut s);
    s
}

/// Lets checkpoints pass, so that a log keeps nothing but what m will hold.
fn recycled(s: &mut Scenario) {
    s.run(700);
}

/// C0's next operation does not reach D1.
fn blocked(plan: Plan) -> Scenario {
    let mut s = begun(plan);
    let (d1, c0) = (s.d(1), s.c(0));
    s.cut(c0, d1);
    s.put(c0, &[(0, 10, 2), (1, 10, 2)]);
    s.until("it is stamped", |s| s.client(c0).counters().stamped == 2);
    s.run(100);
    s
}

/// A client writes at D0 until the log is full; its last operation waits for room.
fn fill(s: &mut Scenario, client: Index) -> Ticket {
    let d0 = s.d(0);
    for tag in 100..200 {
        let ticket = s.put(client, &[(0, 20, tag)]);
        s.wait(ticket).expect("not refused");
        s.run(40);
        if !s.home(d0).has_room() {
            return s.put(client, &[(0, 20, tag + 1)]);
        }
    }
    panic!("the log is never full");
}

/// How many ticks the root takes to evict the life at a node for holding m back; it is heard all
/// the while.
fn ticks_until_blamed(s: &mut Scenario, node: Index) -> u64 {
    let (began, life) = (s.now(), s.life(node));
    while s.root().counters().held_back == 0 {
        let silence = s.silence(life).expect("it is counted");
        assert!(silence < 60, "silent for {silence}");
        s.run(1);
        assert!(s.now() < began + 1000, "never evicted");
    }
    assert!(!s.root().is_member(life), "it was another");
    s.now() - began
}

#[test]
fn a_client_that_holds_m_while_a_log_is_full_is_evicted_and_others_finish() {
    let mut s = blocked(small(2));
    let (c0, c1) = (s.c(0), s.c(1));
    let victim = s.life(c0);
    let waiting = fill(&mut s, c1);
    let ticks = ticks_until_blamed(&mut s, c0);
    assert!((60..=180).contains(&ticks), "{ticks}");
    assert_eq!(s.outcome(waiting), None, "m stood until then");
    let stamp = s.wait(waiting).expect("there is room again");
    assert!(s.oracle().is_gone(victim), "m waits for rule X");
    s.until("it is stable", |s| s.minimum() > stamp.epoch);
    // D0 had the whole operation and supplied it.
    assert_eq!(s.stored(1, 10), Some(value(2)));
    assert_eq!(s.root().counters().held_back, 1);
    s.finish();
}

#[test]
fn a_client_that_holds_m_while_no_log_is_full_is_left_alone() {
    let roomy = Plan {
        small_disk: None,
        ..small(2)
    };
    let mut s = blocked(roomy);
    let (c0, c1) = (s.c(0), s.c(1));
    let held = s.minimum();
    for tag in 0..40 {
        let ticket = s.put(c1, &[(0, 20, tag)]);
        s.wait(ticket).expect("not refused");
        s.run(60);
    }
    assert_eq!(s.minimum(), held, "m stood all the while");
    assert!(s.root().is_member(s.life(c0)));
    assert_eq!(s.root().counters().evicted, 0);
    s.finish();
}

/// The server holds m then, not the client: without it nothing could be resolved either.
#[test]
fn a_client_that_waits_for_a_home_is_left_alone_although_a_log_is_full() {
    let mut s = begun(small(2));
    let (d1, c0, c1) = (s.d(1), s.c(0), s.c(1));
    s.crash(d1);
    let second = s.put(c0, &[(0, 10, 2), (1, 10, 2)]);
    s.until("it is stamped", |s| s.client(c0).counters().stamped == 2);
    let waiting = fill(&mut s, c1);
    s.run(2000);
    assert_eq!(s.outcome(waiting), None);
    s.start(d1);
    for ticket in [second, waiting] {
        s.wait(ticket).expect("not refused");
    }
    assert_eq!(s.root().counters().evicted, 0);
    s.finish();
}

/// An aggregator reports one bound for all its children; only the one whose it is goes.
#[test]
fn neighbours_below_an_aggregator_are_left_alone() {
    let plan = Plan {
        aggregator: true,
        ..small(3)
    };
    let mut s = blocked(plan);
    let (c0, c1, c2) = (s.c(0), s.c(1), s.c(2));
    let lives = [c1, c2].map(|c| s.life(c));
    let waiting = fill(&mut s, c1);
    ticks_until_blamed(&mut s, c0);
    s.wait(waiting).expect("there is room again");
    assert!(lives.iter().all(|life| s.root().is_member(*life)));
    s.finish();
}

/// A proxy's own operation holds m as a client's does.
#[test]
fn a_proxy_that_holds_m_while_a_log_is_full_is_evicted() {
    let plan = Plan {
        proxies: 1,
        ..small(1)
    };
    let mut s = Scenario::new(plan);
    let (d1, s0, c0) = (s.d(1), s.s(0), s.c(0));
    let first = s.originate(s0, &[(0, 10, 1), (1, 10, 1)]);
    s.wait(first).expect("not refused");
    let first = s.put(c0, &[(0, 20, 1)]);
    let stamp = s.wait(first).expect("not refused");
    s.until("it is stable", |s| s.minimum() > stamp.epoch);
    recycled(&mut s);
    s.cut(s0, d1);
    s.originate(s0, &[(0, 10, 2), (1, 10, 2)]);
    s.until("it is stamped", |s| s.proxy(s0).last_stamped().0 == 2);
    let waiting = fill(&mut s, c0);
    ticks_until_blamed(&mut s, s0);
    s.wait(waiting).expect("there is room again");
    s.finish();
}
