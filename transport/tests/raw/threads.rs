//! Several threads at one queue pair.

use std::thread;

use super::*;

/// Two threads post to one queue pair, a third polls for both; at the other end two threads receive.
#[test]
fn threads_share_a_queue_pair_and_each_keeps_its_order() {
    const EACH: u32 = 3000;
    let (a, b) = pair(QpType::Rc);
    // A send queue has room again before its completions are polled.
    for end in [&a, &b] {
        end.cq.resize(4 * EACH).unwrap();
    }
    let retry = |mut post: Box<dyn FnMut() -> Result<(), Error> + '_>| {
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = post() {
            assert_eq!(error, Error::QueueFull);
            assert!(Instant::now() < deadline, "no room");
            thread::yield_now();
        }
    };
    let mut heard = Vec::new();
    thread::scope(|scope| {
        for poster in 0..2 {
            let a = &a;
            scope.spawn(move || {
                for round in 0..EACH {
                    let list = [a.sge(0, 16)];
                    let op = SendOp::SendImm(poster << 16 | round);
                    let wr = signalled(u64::from(poster << 16 | round), op, &list);
                    retry(Box::new(|| a.try_post(wr)));
                }
            });
        }
        let polled = scope.spawn(|| {
            let ids = (0..2 * EACH).map(|_| a.succeed().wr_id as u32);
            ids.collect::<Vec<_>>()
        });
        scope.spawn(|| {
            for id in 0..2 * EACH {
                let list = [b.sge(0, 16)];
                let sg_list = &list[..];
                let wr_id = u64::from(id);
                retry(Box::new(|| {
                    // SAFETY: the pages are only copied.
                    unsafe { b.qp.post_recv(&[RecvWr { wr_id, sg_list }]) }.map_err(|bad| bad.error)
                }));
            }
        });
        for id in 0..2 * EACH {
            let got = b.succeed();
            assert_eq!(got.wr_id, u64::from(id));
            heard.push(got.imm.unwrap());
        }
        assert_eq!(polled.join().unwrap(), heard, "finished in another order");
    });
    for poster in 0..2 {
        let of = heard.iter().filter(|imm| **imm >> 16 == poster);
        let rounds: Vec<u32> = of.map(|imm| imm & 0xFFFF).collect();
        assert_eq!(rounds, (0..EACH).collect::<Vec<_>>());
    }
}
