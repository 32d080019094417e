//! Homes on another storage than their own, or on an old copy of it (design D11): D0 and D1 are homes,
//! C0 is a client.

use lowtide_engine_core::identity::JoinRefusal;
use lowtide_storm::scenario::{Scenario, two_by_two};

/// A home comes back on an empty disk: it is not let in, however often it tries, and says nothing to
/// anybody. On its own disk it goes on.
#[test]
fn a_wiped_home_is_not_let_in() {
    let mut s = Scenario::new(two_by_two(1));
    let (d0, c0) = (s.d(0), s.c(0));
    let first = s.put(c0, &[(0, 10, 1), (1, 10, 1)]);
    let first = s.stamped(first);
    s.until("it is committed", |s| s.is_committed(first, 0));
    let (before, storage) = (s.life(d0), s.disk(d0).storage);
    s.swap(d0, None);
    for times in 1..=3 {
        s.start(d0);
        s.until("it is not let in", |s| s.rejections(d0).len() == times);
        assert!(!s.is_up(d0), "it leaves");
    }
    let known = JoinRefusal::OtherStorage { known: storage };
    assert_eq!(s.rejections(d0), [known; 3]);
    assert_eq!(s.root().counters().rejected, 3);
    let second = s.put(c0, &[(0, 20, 2)]);
    let second = s.stamped(second);
    s.run(200);
    assert!(!s.is_committed(second, 0), "the home is waited for");
    s.restore(d0);
    s.start(d0);
    s.until("it is at home", |s| s.is_committed(second, 0));
    assert_eq!(s.life(d0).incarnation.0, before.incarnation.0 + 1);
    assert_eq!(s.registers(0), [(10, 1), (20, 2)].into());
    s.finish();
}

/// A home comes back on a copy of its disk from before its last operation, or from before a life
/// that did nothing at all.
#[test]
fn a_home_on_an_old_copy_is_not_let_in() {
    for idle in [false, true] {
        let mut s = Scenario::new(two_by_two(1));
        let (d0, c0) = (s.d(0), s.c(0));
        let first = s.put(c0, &[(0, 10, 1)]);
        let first = s.stamped(first);
        s.until("it is committed", |s| s.is_committed(first, 0));
        s.run(100);
        let copy = s.copy(d0);
        if idle {
            s.crash(d0);
            s.start(d0);
            s.run(200);
        } else {
            let second = s.put(c0, &[(0, 20, 2)]);
            let second = s.stamped(second);
            s.until("it is committed", |s| s.is_committed(second, 0));
            s.run(100);
        }
        // The root's death makes no difference.
        s.crash(0);
        s.run(30);
        s.start(0);
        let copied = copy.commit();
        s.swap(d0, Some(copy));
        for times in 1..=5 {
            s.start(d0);
            s.until("it is not let in", |s| s.rejections(d0).len() == times);
            assert_eq!(s.disk(d0).commit(), copied, "trying changes nothing");
        }
        for why in s.rejections(d0) {
            let JoinRefusal::OlderStorage { known } = why else {
                panic!("{why:?}");
            };
            assert!(known > copied);
        }
        s.restore(d0);
        s.start(d0);
        s.until("it is let in", |s| s.life(d0).incarnation.0 > 1);
        let kept = if idle {
            vec![(10, 1)]
        } else {
            vec![(10, 1), (20, 2)]
        };
        assert_eq!(s.registers(0), kept.into_iter().collect());
        s.finish();
    }
}

/// A home on an old copy is asked what it holds of a dead life before the root has heard who it is.
/// It does not answer: the root would take what the copy lacks for never executed.
#[test]
fn a_home_that_is_not_let_in_has_no_say_in_an_eviction() {
    let mut s = Scenario::new(two_by_two(1).direct());
    let (d0, c0) = (s.d(0), s.c(0));
    let copy = s.copy(d0);
    let op = s.put(c0, &[(0, 10, 1)]);
    let op = s.stamped(op);
    s.until("it is committed", |s| s.is_committed(op, 0));
    s.run(100);
    s.swap(d0, Some(copy));
    let victim = s.life(c0);
    s.crash(c0);
    s.declare_dead(c0);
    s.run(50);
    s.start(d0);
    s.cut(d0, 0);
    let written = s.disk(d0).commit();
    s.run(300);
    assert_eq!(s.rejections(d0), [], "the root does not hear it");
    assert_eq!(s.stage(victim), Some("FENCING"));
    assert_eq!(s.disk(d0).commit(), written);
    s.mend(d0, 0);
    s.until("it is not let in", |s| s.rejections(d0).len() == 1);
    assert_eq!(s.stage(victim), Some("FENCING"));
    s.restore(d0);
    s.start(d0);
    s.until("the client is GONE", |s| s.oracle().is_gone(victim));
    assert!(s.is_committed(op, 0), "it survives");
    assert_eq!(s.registers(0), [(10, 1)].into());
    s.finish();
}
