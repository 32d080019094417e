//! What queue pairs to one host get of the budget that they share.

use std::time::{Duration, Instant};

use super::suite::*;
use lowtide_transport::raw::types::*;

/// Queue pairs of one device, each connected to one of another.
fn pairs(count: usize) -> Vec<(End, End)> {
    let (a, b) = pair(QpType::Rc);
    let mut pairs = vec![(a, b)];
    while pairs.len() < count {
        let like = |end: &End| end_in(end.context.clone(), end.pd.clone(), QpType::Rc, None);
        let (a, b) = (like(&pairs[0].0), like(&pairs[0].1));
        a.connect(&b.context, b.qp.qpn());
        b.connect(&a.context, a.qp.qpn());
        pairs.push((a, b));
    }
    pairs
}

/// Bytes that each queue pair has written after a while: of each the length of its WRITEs, and how
/// many it has posted at once.
fn written(pairs: &[(End, End)], what: &[(u32, u64)]) -> Vec<u64> {
    const WHILE: Duration = Duration::from_millis(1500);
    let post = |index: usize| {
        let ((a, b), (len, _)) = (&pairs[index], what[index]);
        a.post(0, SendOp::Write(b.remote(0)), &[a.sge(0, len)]);
    };
    for (index, (_, at_once)) in what.iter().enumerate() {
        (0..*at_once).for_each(|_| post(index));
    }
    let mut bytes = vec![0; what.len()];
    let mut done = Vec::new();
    let since = Instant::now();
    while since.elapsed() < WHILE {
        for (index, (a, _)) in pairs.iter().enumerate() {
            a.cq.poll(16, &mut done).unwrap();
            for work in done.drain(..) {
                assert_eq!(work.status, Status::Success);
                bytes[index] += u64::from(what[index].0);
                post(index);
            }
        }
    }
    bytes
}

/// One that has always 16 MiB to send keeps nobody waiting who sends a page now and then.
#[test]
fn one_that_is_greedy_leaves_those_with_little_their_turn() {
    const SMALL: usize = 8;
    let pairs = pairs(1 + SMALL);
    let what: Vec<_> = std::iter::once((1 << 20, 16))
        .chain([(4096, 1); SMALL])
        .collect();
    let bytes = written(&pairs, &what);
    let (greedy, small) = (bytes[0], &bytes[1..]);
    let (least, most) = (small.iter().min().unwrap(), small.iter().max().unwrap());
    // Measured: of the greedy one 165 KiB pass before each page.
    let turns = least / 4096;
    assert!(greedy / turns < 1 << 20, "{bytes:?}");
    assert!(*most < 2 * least && greedy > *most, "{bytes:?}");
}

/// One has no more under way than its window, of which the budget holds eight: here it is spent, and
/// who wants some of it stands in line.
#[test]
fn those_with_little_have_their_turn_when_the_budget_is_spent() {
    const GREEDY: usize = 16;
    const SMALL: usize = 4;
    let pairs = pairs(GREEDY + SMALL);
    let what = [vec![(1 << 20, 4); GREEDY], vec![(4096, 1); SMALL]].concat();
    let bytes = written(&pairs, &what);
    let (greedy, small) = bytes.split_at(GREEDY);
    let (least, most) = (greedy.iter().min().unwrap(), greedy.iter().max().unwrap());
    assert!(*most < 2 * least + (4 << 20), "{bytes:?}");
    // Measured: of each greedy one 110 KiB pass before each page.
    let turns = small.iter().min().unwrap() / 4096;
    assert!(turns > 0 && most / turns < 512 << 10, "{bytes:?}");
}

/// Two that send all they can get half each, or nearly so.
#[test]
fn two_that_are_greedy_share() {
    let pairs = pairs(2);
    let bytes = written(&pairs, &[(1 << 20, 16); 2]);
    let sum: u64 = bytes.iter().sum();
    assert!(bytes.iter().all(|bytes| *bytes > sum / 4), "{bytes:?}");
}
