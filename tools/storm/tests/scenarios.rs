//! Scripted scenarios: what a seed finds by chance stands here by name, with the facts it must show.
//!
//! D0, D1 are homes, S0, S1 proxies, C0, C1 clients; D0 is reached through S0 and D1 through S1.

use lowtide_engine_core::ids::{OpId, Seq};
use lowtide_engine_core::op::Refusal;
use lowtide_engine_core::session::SessionError;
use lowtide_storm::oracle::Place;
use lowtide_storm::plan::{ClientPlan, Plan};
use lowtide_storm::scenario::{Scenario, two_by_two, value};

/// Proxies that merge only when they must.
fn lazy(clients: usize) -> Plan {
    Plan {
        merge_interval: 5000,
        ..two_by_two(clients)
    }
}

/// Proxies that hand parts of their own operations to each other.
fn originating() -> Plan {
    Plan {
        originate: (0, true),
        ..two_by_two(0)
    }
}

/// Seed 000's example (a), an operation born at a client: D0 commits W0, D1 loses power before W1
/// is durable. S0 still holds W0, S1 sends W1 again, nothing is discarded before m passes.
#[test]
fn a_window_outlives_the_commit_of_its_own_home() {
    let mut s = Scenario::new(two_by_two(1));
    let (d1, s0, s1, c0) = (s.d(1), s.s(0), s.s(1), s.c(0));
    s.stall_syncs(d1);
    let ticket = s.put(c0, &[(0, 10, 7), (1, 10, 7)]);
    let op = s.stamped(ticket);
    s.until("D0 has committed W0 and D1 has executed W1", |s| {
        s.is_committed(op, 0) && matches!(s.place(op, 1), Place::Executed(_))
    });
    s.run(50);
    assert!(!s.is_committed(op, 1));
    s.crash(d1);
    assert_eq!(s.place(op, 1), Place::Absent, "D1 lost W1");
    s.run(300);
    assert!(s.is_committed(op, 0));
    let epoch = s.wait(ticket).expect("not refused").epoch;
    assert!(s.minimum() <= epoch, "m stands below the operation");
    assert_eq!(s.proxy(s0).windows_held(), 1, "S0 still holds W0");
    assert_eq!(s.proxy(s1).windows_held(), 1, "S1 still holds W1");
    assert_eq!(s.client(c0).windows().discarded, 0);
    s.resume_syncs(d1);
    s.start(d1);
    s.until("W1 is durable", |s| s.is_committed(op, 1));
    assert_eq!(s.proxy(s1).windows().replayed, 1, "S1 sent W1 again");
    assert_eq!(s.proxy(s0).windows().replayed, 0, "and nobody else did");
    assert_eq!(s.client(c0).windows().replayed, 0);
    assert_eq!(s.proxy(s0).windows().discarded, 0, "m has not passed yet");
    s.until("m passes", |s| s.minimum() > epoch);
    s.until("the windows go", |s| {
        s.proxy(s0).windows_held() + s.proxy(s1).windows_held() == 0
    });
    assert_eq!(s.stored(1, 10), Some(value(7)));
    s.finish();
}

/// Seed 000's example (b), originated by the proxies: S0 coordinates, S1 pins, and both hold their
/// windows until m passes.
#[test]
fn a_window_of_the_proxies_own_outlives_the_commit_of_its_home() {
    let mut s = Scenario::new(originating());
    let (d1, s0, s1) = (s.d(1), s.s(0), s.s(1));
    s.stall_syncs(d1);
    let ticket = s.originate(s0, &[(0, 10, 7), (1, 10, 7)]);
    s.until("it is stamped", |s| s.proxy(s0).last_stamped() == Seq(1));
    let op = OpId {
        source: s.life(s0),
        seq: Seq(1),
    };
    s.until("D0 has W0, D1 has executed W1", |s| {
        s.is_committed(op, 0) && matches!(s.place(op, 1), Place::Executed(_))
    });
    s.run(50);
    s.crash(d1);
    s.run(300);
    assert_eq!(s.outcome(ticket), None, "not everywhere committed");
    assert!(s.proxy(s0).windows_held() >= 1, "S0 still holds W0");
    assert_eq!(s.proxy(s1).windows_held(), 1, "S1 still holds W1");
    s.resume_syncs(d1);
    s.start(d1);
    let stamp = s.wait(ticket).expect("not refused");
    assert!(s.is_committed(op, 0) && s.is_committed(op, 1));
    assert_eq!(s.proxy(s1).windows().replayed, 1, "S1 sent W1 again");
    assert!(s.minimum() <= stamp.epoch);
    s.until("m passes", |s| s.minimum() > stamp.epoch);
    s.finish();
}

/// Two clients behind different proxies fight for one name: exactly one wins, the other's check
/// fails, nothing is lost.
#[test]
fn one_of_two_creators_wins() {
    let mut plan = two_by_two(2);
    plan.clients[1].via = vec![(0, 1), (1, 0)];
    let mut s = Scenario::new(plan);
    let (c0, c1) = (s.c(0), s.c(1));
    let first = s.create(c0, &[(0, 10, 1)]);
    let second = s.create(c1, &[(0, 10, 2)]);
    let outcomes = [s.wait(first), s.wait(second)];
    let won: Vec<u64> = (1..)
        .zip(&outcomes)
        .filter(|(_, o)| o.is_ok())
        .map(|(tag, _)| tag)
        .collect();
    assert_eq!(won.len(), 1, "{outcomes:?}");
    let lost = outcomes.iter().find_map(|o| o.as_ref().err());
    let failed = SessionError::Refused(Refusal::CheckFailed { check: 0 });
    assert_eq!(lost, Some(&failed));
    s.until("all is at home", |s| s.oracle().unfinished() == 0);
    assert_eq!(s.stored(0, 10), Some(value(won[0])));
    s.finish();
}

/// A proxy dies with operations that it acknowledged and had not merged: all survive, because the
/// client lives.
#[test]
fn nothing_acknowledged_dies_with_a_proxy() {
    let mut s = Scenario::new(lazy(1));
    let (s0, c0) = (s.s(0), s.c(0));
    let mut ops = Vec::new();
    for tag in 1..=5 {
        let ticket = s.put(c0, &[(0, 10 * tag, tag)]);
        ops.push(s.stamped(ticket));
    }
    for op in &ops {
        assert_eq!(s.place(*op, 0), Place::Absent, "acknowledged, not merged");
    }
    let victim = s.life(s0);
    s.kill(s0);
    s.until("all are at home", |s| {
        ops.iter().all(|op| s.is_committed(*op, 0))
    });
    for tag in 1..=5 {
        assert_eq!(s.stored(0, 10 * tag), Some(value(tag)));
    }
    s.until("the proxy is GONE", |s| s.oracle().is_gone(victim));
    assert_eq!(s.oracle().tally.dropped, 0);
    s.finish();
}

/// Client and proxy die together. What S1 holds whole is completed at D0 as well; what only S0 held
/// vanishes, and with it everything later of that client.
#[test]
fn a_client_and_a_proxy_die_together() {
    let mut s = Scenario::new(lazy(1));
    let (s0, c0) = (s.s(0), s.c(0));
    let both = s.put(c0, &[(0, 10, 1), (1, 10, 1)]);
    let both = s.stamped(both);
    let only = s.put(c0, &[(0, 20, 2)]);
    let only = s.stamped(only);
    let later = s.put(c0, &[(1, 20, 3)]);
    let later = s.stamped(later);
    let victim = s.life(c0);
    s.crash(s0);
    s.crash(c0);
    s.declare_dead(s0);
    s.declare_dead(c0);
    s.until("the client is GONE", |s| s.oracle().is_gone(victim));
    assert!(s.is_committed(both, 0), "S1 supplied D0's part");
    assert!(s.is_committed(both, 1));
    assert_eq!(s.place(only, 0), Place::Absent);
    assert!(!s.is_committed(later, 1), "a prefix survives");
    assert_eq!(s.registers(0), [(10, 1)].into());
    assert_eq!(s.registers(1), [(10, 1)].into());
    let report = s.finish();
    assert_eq!(report.operations, 3);
}

/// A home that is killed while sources reconnect after its first crash starts over.
#[test]
fn a_home_dies_again_while_it_recovers() {
    let mut s = Scenario::new(two_by_two(2).direct());
    let (d0, c0, c1) = (s.d(0), s.c(0), s.c(1));
    s.stall_syncs(d0);
    let first = s.put(c0, &[(0, 10, 1), (1, 10, 1)]);
    let first = s.stamped(first);
    let second = s.put(c1, &[(0, 20, 2)]);
    let second = s.stamped(second);
    assert!(!s.is_committed(first, 0) && !s.is_committed(second, 0));
    s.crash(d0);
    assert_eq!(s.place(first, 0), Place::Absent);
    s.resume_syncs(d0);
    s.cut(c1, d0);
    for _ in 0..3 {
        s.start(d0);
        let awaited = s.home(d0).stage().1.len();
        assert_eq!(awaited, 4, "sources that may hold locks are awaited");
        s.until("all but one are back", |s| s.home(d0).stage().1.len() == 1);
        s.crash(d0);
    }
    s.mend(c1, d0);
    s.start(d0);
    s.until("all is at home", |s| {
        s.is_committed(first, 0) && s.is_committed(second, 0)
    });
    assert_eq!(s.registers(0), [(10, 1), (20, 2)].into());
    s.finish();
}

/// The root is killed in each stage of rule X, again and again; the decision stays.
#[test]
fn the_root_dies_in_each_stage_of_an_eviction() {
    for stage in ["FENCING", "RESOLVING", "DRAINING", "RELEASING"] {
        let mut s = Scenario::new(lazy(2));
        let (s0, c0, c1) = (s.s(0), s.c(0), s.c(1));
        let both = s.put(c0, &[(0, 10, 1), (1, 10, 1)]);
        let both = s.stamped(both);
        let lost = s.put(c0, &[(0, 20, 2)]);
        let lost = s.stamped(lost);
        let kept = s.put(c1, &[(1, 30, 3)]);
        let kept = s.stamped(kept);
        // Draining exists for proxies; the other stages are those of the client.
        let proxy = stage == "DRAINING";
        let victim = s.life(if proxy { s0 } else { c0 });
        s.crash(s0);
        s.crash(c0);
        s.declare_dead(s0);
        s.declare_dead(c0);
        for _ in 0..2 {
            s.until(stage, |s| s.stage(victim) == Some(stage));
            s.crash(0);
            s.run(30);
            s.start(0);
        }
        let dead = [s.life(s0), s.life(c0)];
        s.until("both are GONE", |s| {
            dead.iter().all(|life| s.oracle().is_gone(*life))
        });
        assert!(
            s.is_committed(both, 0) && s.is_committed(both, 1),
            "{stage}"
        );
        assert_eq!(s.place(lost, 0), Place::Absent, "{stage}");
        s.converge();
        assert!(s.is_committed(kept, 1), "{stage}");
        assert_eq!(s.registers(0), [(10, 1)].into(), "{stage}");
        assert_eq!(s.registers(1), [(10, 1), (30, 3)].into(), "{stage}");
        s.finish();
    }
}

/// A client that is killed and never returns is evicted for its silence; whoever waits for its
/// locks goes on.
#[test]
fn a_silent_client_is_evicted_and_others_finish() {
    let mut s = Scenario::new(two_by_two(2));
    let (c0, c1) = (s.c(0), s.c(1));
    let mine = s.put(c0, &[(0, 10, 1)]);
    s.stamped(mine);
    let victim = s.life(c0);
    s.crash(c0);
    let theirs = s.put(c1, &[(0, 10, 2)]);
    s.run(60);
    assert_eq!(
        s.outcome(theirs),
        None,
        "locks of a life that may live stay"
    );
    assert!(!s.oracle().is_gone(victim));
    let stamp = s.wait(theirs).expect("not refused");
    assert!(s.oracle().is_gone(victim), "not before it is resolved");
    s.until("it is stable", |s| s.minimum() > stamp.epoch);
    assert_eq!(s.stored(0, 10), Some(value(2)));
    s.finish();
}

/// A home joins for the first time after a client was evicted that has not heard of it. What the
/// dead life still sends is refused (seed 6244).
#[test]
fn a_home_that_joins_late_refuses_the_dead() {
    let mut plan = Plan {
        destinations: 1,
        proxies: 1,
        ..two_by_two(1)
    };
    plan.clients[0].via = vec![(0, 0)];
    let mut s = Scenario::starting(plan);
    let (d0, s0, c0) = (s.d(0), s.s(0), s.c(0));
    s.start_late(d0, 400);
    s.start_late(s0, 5000);
    s.until("the client has joined", |s| s.life(c0).incarnation.0 == 1);
    let victim = s.life(c0);
    s.cut(0, c0);
    s.count(c0, 0, 10);
    s.declare_dead(c0);
    s.until("it is GONE", |s| s.oracle().is_gone(victim));
    assert!(!s.is_up(d0), "the home was not asked");
    s.until("the home has joined", |s| s.life(d0).incarnation.0 == 1);
    s.run(400);
    assert_eq!(s.life(c0), victim, "the dead life still runs");
    let seq = Seq(1);
    let op = OpId {
        source: victim,
        seq,
    };
    assert_eq!(s.place(op, 0), Place::Absent);
    s.finish();
}

/// The word to let a pin go is lost with the connection; m does not stand for ever (seed 8845).
#[test]
fn a_lost_unpin_does_not_hold_the_minimum() {
    let mut s = Scenario::new(originating());
    let (s0, s1) = (s.s(0), s.s(1));
    let ticket = s.originate(s0, &[(0, 10, 7), (1, 10, 7)]);
    s.until("it is stamped", |s| s.proxy(s0).last_stamped() == Seq(1));
    s.sever(s0, s1);
    let stamp = s.wait(ticket).expect("not refused");
    s.until("m passes", |s| s.minimum() > stamp.epoch);
    s.finish();
}

/// A proxy that the root cannot hear is evicted while a home that does not hear the root still
/// takes what it brings. The client bypasses it, so parts arrive over both paths and take effect
/// once.
#[test]
fn parts_that_arrive_over_two_paths_execute_once() {
    let mut s = Scenario::new(Plan {
        merge_interval: 200,
        ..two_by_two(1)
    });
    let (d0, s0, c0) = (s.d(0), s.s(0), s.c(0));
    let first = s.count(c0, 0, 10);
    let first = s.stamped(first);
    s.until("the stream is in use", |s| s.is_committed(first, 0));
    let second = s.count(c0, 0, 10);
    let second = s.stamped(second);
    assert_eq!(s.place(second, 0), Place::Absent, "it is not merged yet");
    let victim = s.life(s0);
    s.cut(s0, 0);
    s.cut(0, s0);
    s.cut(0, d0);
    s.cut(s0, d0);
    s.until("the client sent it on the direct path", |s| {
        s.place(second, 0) != Place::Absent
    });
    s.run(300);
    assert_eq!(s.life(s0), victim, "the proxy's process lives");
    assert_eq!(s.home(d0).counters().duplicates, 0);
    s.mend(s0, d0);
    s.until("the proxy's copy arrives", |s| {
        s.home(d0).counters().duplicates > 0
    });
    s.mend(s0, 0);
    s.mend(0, s0);
    s.mend(0, d0);
    s.until("the proxy is GONE", |s| s.oracle().is_gone(victim));
    s.finish();
}

/// A client that bypassed a proxy which lives after all releases what it was granted there
/// (seed 1007894).
#[test]
fn a_bypassed_proxy_that_lives_gets_its_grants_back() {
    let mut plan = Plan {
        destinations: 1,
        proxies: 1,
        ..two_by_two(1)
    };
    plan.clients[0].via = vec![(0, 0)];
    let mut s = Scenario::starting(plan);
    let (s0, c0) = (s.s(0), s.c(0));
    // The client joins first and does not hear that the proxy has joined as well.
    s.start_late(s0, 60);
    s.until("the client has joined", |s| s.life(c0).incarnation.0 == 1);
    s.cut(0, c0);
    let first = s.put(c0, &[(0, 10, 1)]);
    s.stamped(first);
    assert_eq!(s.proxy(s0).counters().accepted, 1);
    s.cut(s0, c0);
    s.sever(s0, c0);
    s.run(400);
    s.mend(s0, c0);
    let second = s.put(c0, &[(0, 20, 2)]);
    s.stamped(second);
    assert_eq!(s.proxy(s0).counters().accepted, 1, "it went past the proxy");
    assert_eq!(s.root().counters().evicted, 0);
    s.finish();
}

/// The root stands still for longer than silence may last. Nobody is evicted, because what they
/// sent meanwhile lies before it (seed 1046001).
#[test]
fn a_root_that_stood_still_evicts_nobody() {
    let mut s = Scenario::new(two_by_two(2));
    let lives = [s.s(0), s.s(1), s.c(0), s.c(1)].map(|n| s.life(n));
    s.pause(0, 2000);
    s.run(2500);
    for life in lives {
        let seat = s.root().view().seat(life.node).cloned();
        assert!(seat.is_some_and(|seat| seat.life == life && seat.live));
    }
    assert_eq!(s.root().counters().evicted, 0);
    s.finish();
}

/// I42, with a level between: a root that returns knows no attachment, and the aggregator, which
/// lives, answers whoever it counts. Its report alone must bound them, or m stands where the last
/// root left it and they fall silent one and all.
#[test]
fn a_root_that_returns_counts_whom_an_aggregator_reports() {
    let mut plan = two_by_two(2);
    plan.aggregator = true;
    plan.clients.iter_mut().for_each(|c| c.aggregated = true);
    let evict_after = plan.evict_after;
    let mut s = Scenario::new(plan);
    let members = [s.s(0), s.s(1), s.c(0), s.c(1)];
    let lives = members.map(|n| s.life(n));
    s.crash(0);
    s.run(50);
    s.start(0);
    for round in 0..4 {
        for (number, &client) in members[2..].iter().enumerate() {
            let slot = 20 + number as u64;
            let ticket = s.put(client, &[(0, slot, round), (1, slot, round)]);
            let stamp = s.wait(ticket).expect("not refused");
            s.until("it is stable", |s| s.minimum() > stamp.epoch);
        }
        s.run(evict_after);
    }
    for life in lives {
        let silence = s.silence(life).expect("it counts");
        assert!(silence < evict_after / 2, "{life} is silent for {silence}");
    }
    assert_eq!(s.root().counters().evicted, 0);
    s.finish();
}

/// A proxy below an aggregator says nothing to the root, so it does not notice that the root died. It
/// hears of the new term and connects again, or the fence of whoever dies next never reaches it.
#[test]
fn a_proxy_below_an_aggregator_is_told_what_a_returned_root_decides() {
    let mut plan = two_by_two(2);
    plan.aggregator = true;
    let mut s = Scenario::new(plan);
    let victim = s.c(0);
    s.crash(0);
    s.run(50);
    s.start(0);
    s.run(200);
    let life = s.life(victim);
    s.kill(victim);
    s.until("it is gone", |s| s.root().counters().evicted == 1);
    assert_eq!(s.stage(life), None);
    let survivor = s.c(1);
    let ticket = s.put(survivor, &[(0, 10, 1), (1, 10, 1)]);
    let stamp = s.wait(ticket).expect("not refused");
    s.until("it is stable", |s| s.minimum() > stamp.epoch);
    s.finish();
}

/// N10. A root stops, its successor takes its place, and then it goes on: it hears nobody, takes
/// everybody for silent and begins to evict them. Whoever has heard the successor refuses all that.
#[test]
fn what_a_root_says_that_was_replaced_is_refused() {
    let mut s = Scenario::new(two_by_two(2));
    let (d0, d1, s0, s1, c0, c1) = (s.d(0), s.d(1), s.s(0), s.s(1), s.c(0), s.c(1));
    let everybody = [d0, d1, s0, s1, c0, c1];
    let lives = everybody.map(|n| s.life(n));
    let before = s.put(c0, &[(0, 10, 1), (1, 10, 1)]);
    s.wait(before).expect("not refused");
    let term = s.term(0);
    s.replace_root(100, 100_000);
    s.until("everybody has heard the successor", |s| {
        s.is_up(0) && everybody.iter().all(|n| s.term(*n) > term)
    });
    assert_eq!(s.old_root_said(), Vec::<&str>::new(), "it sleeps");
    s.run(500);
    assert_eq!(s.old_root_said(), ["Fence"], "it evicts them all");
    for home in [d0, d1] {
        assert!(s.outdated(home) > 4, "it tells of four lives, and again");
    }
    // Nobody is fenced, and m goes on.
    for (number, client) in [c0, c1].into_iter().enumerate() {
        let slot = 20 + number as u64;
        let ticket = s.put(client, &[(0, slot, 2), (1, slot, 2)]);
        let stamp = s.wait(ticket).expect("not refused");
        s.until("it is stable", |s| s.minimum() > stamp.epoch);
    }
    for life in lives {
        let seat = s.root().view().seat(life.node).cloned();
        assert!(seat.is_some_and(|seat| seat.life == life && seat.live));
    }
    assert_eq!(s.root().counters().evicted, 0);
    assert!(
        s.old_root_hears(c0),
        "the first word of the successor's term ends it"
    );
    s.finish();
}

/// A client reads through its proxy what was completed elsewhere after another one's death
/// (seed 1087175): the proxy never saw that part and must not call the range empty.
#[test]
fn a_completed_part_is_seen_through_the_proxy_it_did_not_pass() {
    let mut s = Scenario::new(lazy(2));
    let (s0, s1, c0, c1) = (s.s(0), s.s(1), s.c(0), s.c(1));
    // S0 learns that the range is empty but for slot 10.
    let warm = s.put(c0, &[(0, 10, 1), (1, 10, 1)]);
    s.stamped(warm);
    s.cut(c0, s0);
    let accepted = s.proxy(s1).counters().accepted;
    s.put(c0, &[(0, 20, 2), (1, 20, 2)]);
    s.until("S1 has accepted its part", |s| {
        s.proxy(s1).counters().accepted > accepted
    });
    let op = OpId {
        source: s.life(c0),
        seq: Seq(2),
    };
    let victim = s.life(c0);
    s.kill(c0);
    s.until("the client is GONE", |s| s.oracle().is_gone(victim));
    assert!(
        s.is_committed(op, 0) && s.is_committed(op, 1),
        "S1 supplied"
    );
    let read = s.read(c1, 0, 20);
    s.until("the read is answered", |s| s.found(read).is_some());
    assert_eq!(s.found(read), Some(&Some(value(2))));
    s.finish();
}

/// A client stands still and holds m, while another one works. Under memory pressure its proxy lets
/// windows go that are everywhere committed with all that they depend on; nothing is missed later.
#[test]
fn a_proxy_under_pressure_discards_what_nobody_will_ask_for() {
    let held = |window_bytes| {
        let mut s = Scenario::new(Plan {
            window_bytes,
            evict_after: 10_000,
            ..two_by_two(2)
        });
        let (d0, s0, c0, c1) = (s.d(0), s.s(0), s.c(0), s.c(1));
        s.pause(c0, 5000);
        let before = s.minimum();
        let mut last = None;
        for tag in 1..=40 {
            let ticket = s.put(c1, &[(0, 10 * tag, tag), (1, 10 * tag, tag)]);
            let op = s.stamped(ticket);
            s.until("it is everywhere committed", |s| {
                s.is_committed(op, 0) && s.is_committed(op, 1)
            });
            s.run(60);
            last = Some(op);
        }
        let last = last.expect("40 operations");
        let epoch = s.client(c1).port().epoch();
        assert!(s.minimum() < epoch, "m stands: {before} {epoch}");
        let bytes = s.proxy(s0).held_bytes();
        // Neither the home's crash nor the client's death asks for what went.
        s.crash(d0);
        s.start(d0);
        let victim = s.life(c1);
        s.kill(c1);
        s.until("the client is GONE", |s| s.oracle().is_gone(victim));
        assert!(s.is_committed(last, 0) && s.is_committed(last, 1));
        s.converge();
        assert_eq!(s.registers(0).len(), 40);
        s.finish();
        bytes
    };
    let (free, pressed) = (held(1 << 20), held(0));
    assert!(free > 30 * 200, "{free} bytes are kept without pressure");
    assert!(
        pressed < free / 10,
        "{pressed} bytes are kept under pressure"
    );
}

/// A client hears that its proxy is dead, and loses the connection to the process, which does not
/// know yet. The process must keep what it granted until the client's operations are at home
/// (seed 19528).
#[test]
fn a_dead_proxy_keeps_its_grants_when_a_client_connects_again() {
    let mut s = Scenario::new(Plan {
        merge_interval: 400,
        ..two_by_two(2)
    });
    let (d0, s0, c0, c1) = (s.d(0), s.s(0), s.c(0), s.c(1));
    let first = s.put(c0, &[(0, 10, 1)]);
    let first = s.stamped(first);
    s.until("it is at home", |s| s.is_committed(first, 0));
    s.cut(s0, d0);
    let second = s.put(c0, &[(0, 10, 2)]);
    s.stamped(second);
    // The process hears nothing from the root, and C1 nothing of its death.
    s.cut(0, s0);
    s.cut(0, c1);
    s.declare_dead(s0);
    s.until("C0 has left the dead life", |s| {
        s.client(c0)
            .view()
            .seat(s.id(s0))
            .is_some_and(|seat| !seat.live)
    });
    s.sever(s0, c0);
    let third = s.put(c1, &[(0, 10, 3)]);
    s.run(40);
    assert_eq!(s.outcome(third), None, "C0's lock is not given away");
    s.mend(s0, d0);
    s.mend(0, c1);
    s.stamped(third);
    s.converge();
    assert_eq!(s.stored(0, 10), Some(value(3)));
    s.finish();
}

/// Clients of two proxies want two slots each, or a range that spans both: everybody is served,
/// although each proxy is asked to yield before its clients have used what it was granted (seed
/// 2147383).
#[test]
fn a_range_and_its_slots_are_both_granted() {
    let via = |proxy| ClientPlan {
        via: vec![(0, proxy)],
        ops: 0,
        aggregated: false,
    };
    for seed in 0..20 {
        let mut s = Scenario::new(Plan {
            destinations: 1,
            proxies: 2,
            clients: vec![via(0), via(1), via(0), via(1)],
            delay_max: 1 + seed % 3,
            ..Plan::quiet(seed)
        });
        let mut tickets = Vec::new();
        for round in 0..10 {
            for number in 0..4 {
                let client = s.c(number);
                let mut request = s.request(&[(0, 0, round), (0, 10, round)], None);
                if number == 2 {
                    request.locks.truncate(1);
                    request.locks[0].range.hi = 15;
                }
                tickets.push(s.submit(client, request));
            }
        }
        for ticket in tickets {
            s.stamped(ticket);
        }
        s.finish();
    }
}

/// D1's second process never hears from the root: it takes the Open of S1, and dies before it has
/// joined or said a word. Nothing is under way then, so only the view of its third process tells S1
/// that it must open its session again; D1 waits for S1's claims, and m for D1.
#[test]
fn a_home_that_died_before_it_spoke_is_not_waited_for() {
    let mut s = Scenario::new(two_by_two(1));
    let (d1, s1, c0) = (s.d(1), s.s(1), s.c(0));
    let ticket = s.put(c0, &[(0, 10, 7), (1, 10, 7)]);
    let first = s.wait(ticket).expect("not refused").epoch;
    s.until("it is stable", |s| s.minimum() > first);
    s.crash(d1);
    // S1 notices the end of the first process by this.
    let ticket = s.put(c0, &[(0, 10, 8), (1, 10, 8)]);
    s.cut(0, d1);
    s.start(d1);
    s.until("S1 has said Open", |s| s.is_connected_and_idle(s1, d1));
    s.crash(d1);
    s.mend(0, d1);
    s.start(d1);
    let second = s.wait(ticket).expect("not refused").epoch;
    s.until("the second is stable too", |s| s.minimum() > second);
    s.finish();
}
