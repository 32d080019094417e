//! Queue pairs that are reset or broken while others post to them and poll beside them.

use std::sync::atomic::AtomicBool;
use std::thread;

use super::super::provider::QueuePair;
use super::*;

/// A queue pair whose receives go to `end`'s completion queue, and which has room for so many.
fn neighbour(end: &End, receives: u32) -> QueuePair {
    let queues = Queues {
        send: &end.cq,
        recv: &end.cq,
        shared: None,
    };
    let mut init = init_attr(QpType::Rc);
    init.cap.max_recv_wr = receives;
    end.pd.queue_pair(queues, &init).unwrap()
}

fn modify(qp: &QueuePair, context: &Context, state: QpState) {
    let attr = to(attr_to(context, Qpn::new(0)), state);
    let mask = match state {
        QpState::Init => INIT | QpAttrMask::ACCESS,
        _ => QpAttrMask::STATE,
    };
    qp.modify(&attr, mask).unwrap();
}

/// Somebody polls while the completions of one queue pair among many are forgotten.
#[test]
fn a_reset_changes_nobody_elses_order() {
    const MANY: u32 = 5_000;
    let end = end(QpType::Rc);
    end.cq.resize(2 * MANY).unwrap();
    let (one, other) = (neighbour(&end, 16), neighbour(&end, MANY));
    for round in 0..20 {
        let mut order = [(&one, 16), (&other, MANY)];
        order.rotate_left(round % 2);
        for (qp, count) in order {
            modify(qp, &end.context, QpState::Init);
            for id in 0..count {
                let list = [RecvWr {
                    wr_id: u64::from(id),
                    sg_list: &[],
                }];
                // SAFETY: it names no memory.
                unsafe { qp.post_recv(&list) }.unwrap();
            }
            modify(qp, &end.context, QpState::Err);
        }
        let mut next = 0;
        thread::scope(|scope| {
            scope.spawn(|| modify(&one, &end.context, QpState::Reset));
            while next < MANY {
                let done = end.next();
                if done.qpn == other.qpn() {
                    assert_eq!(done.wr_id, u64::from(next), "overtaken");
                    next += 1;
                }
            }
        });
        // What was not taken of the one that was reset is gone.
        assert_eq!(end.cq.poll(1, &mut Vec::new()), Ok(0));
        modify(&other, &end.context, QpState::Reset);
    }
}

/// A queue is not made shallower than what it holds, and one that has broken says so to nobody after
/// its end.
#[test]
fn a_completion_queue_holds_what_is_there_until_it_ends() {
    let end = end(QpType::Rc);
    let cq = end.context.completion_queue(4, None).unwrap();
    let queues = Queues {
        send: &end.cq,
        recv: &cq,
        shared: None,
    };
    let qp = end.pd.queue_pair(queues, &init_attr(QpType::Rc)).unwrap();
    let other = End { qp, ..end };
    let fill = |count| {
        modify(&other.qp, &other.context, QpState::Reset);
        modify(&other.qp, &other.context, QpState::Init);
        (0..count).for_each(|id| other.receive(id, &[]));
        modify(&other.qp, &other.context, QpState::Err);
    };
    fill(3);
    let refused = Err(Error::Limit("completion queue entries"));
    assert_eq!(cq.resize(2), refused);
    assert_eq!(cq.resize(3), Ok(()));
    let mut done = Vec::new();
    assert_eq!(cq.poll(9, &mut done), Ok(3));
    assert!(done.iter().map(|work| work.wr_id).eq(0..3));
    fill(4);
    assert!(is_readable(&other.context, PATIENCE));
    drop((other.qp, cq));
    assert_eq!(other.context.async_event(), None);
}

/// Posts from two threads until it is told to stop; how many were taken.
fn post_until(end: &End, is_over: &AtomicBool) -> [u64; 2] {
    let counts = [0, 1].map(|poster: u64| {
        move || {
            let mut taken = [0, 0];
            while !is_over.load(Ordering::Relaxed) {
                let id = poster << 32 | taken[0];
                match end.try_post(signalled(id, SendOp::Send, &[])) {
                    Ok(()) => taken[0] += 1,
                    Err(Error::QueueFull | Error::State(_)) => thread::yield_now(),
                    Err(error) => panic!("{error}"),
                }
                let wr_id = 1 << 40 | poster << 32 | taken[1];
                let list = [RecvWr {
                    wr_id,
                    sg_list: &[],
                }];
                // SAFETY: it names no memory.
                match unsafe { end.qp.post_recv(&list) }.map_err(|bad| bad.error) {
                    Ok(()) => taken[1] += 1,
                    Err(Error::QueueFull | Error::State(_)) => thread::yield_now(),
                    Err(error) => panic!("{error}"),
                }
                // The completion queue has room for all of them.
                if taken[0].max(taken[1]) >= 10_000 {
                    break;
                }
            }
            taken
        }
    });
    thread::scope(|scope| {
        let posters = counts.map(|count| scope.spawn(count));
        let mut sum = [0, 0];
        for poster in posters {
            let taken = poster.join().unwrap();
            sum = [sum[0] + taken[0], sum[1] + taken[1]];
        }
        sum
    })
}

/// Two threads post while a third drives the device and a fourth moves the queue pair to ERR: what was
/// taken completes, each once. To RESET: all of it is forgotten, and all room is there again.
#[test]
fn what_was_taken_beside_a_move_completes_or_is_forgotten() {
    let (a, b) = pair(QpType::Rc);
    a.cq.resize(100_000).unwrap();
    for round in 0..30 {
        let is_over = AtomicBool::new(false);
        let target = [QpState::Err, QpState::Reset][round % 2];
        let taken = thread::scope(|scope| {
            let posters = scope.spawn(|| post_until(&a, &is_over));
            // Polls nothing, but drives the device.
            let driver = scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    assert!(b.cq.poll(0, &mut Vec::new()).is_ok());
                    a.qp.query();
                }
            });
            // Time for posts before the move, and after it.
            thread::sleep(Duration::from_millis(2));
            modify(&a.qp, &a.context, target);
            thread::sleep(Duration::from_millis(2));
            is_over.store(true, Ordering::Relaxed);
            driver.join().unwrap();
            posters.join().unwrap()
        });
        if target == QpState::Err {
            let mut ids: Vec<u64> = (0..taken[0] + taken[1]).map(|_| a.next().wr_id).collect();
            ids.sort_unstable();
            ids.dedup();
            assert_eq!(ids.len() as u64, taken[0] + taken[1], "one completed twice");
            modify(&a.qp, &a.context, QpState::Reset);
        }
        assert!(a.is_silent());
        a.connect(&b.context, b.qp.qpn());
        for id in 0..16 {
            a.receive(id, &[]);
            a.post(id, SendOp::Send, &[]);
        }
        modify(&a.qp, &a.context, QpState::Reset);
        a.connect(&b.context, b.qp.qpn());
    }
}
