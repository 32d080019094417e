//! Faults between the ends.

use lowtide_transport::verbs::{DeviceOptions, Faults};

use super::*;

#[test]
fn over_a_bad_network_everything_is_done_once() {
    let options = |seed| DeviceOptions {
        faults: Faults {
            seed,
            loss_percent: 5.0,
            duplicate_percent: 5.0,
            reorder_percent: 5.0,
            ..Faults::default()
        },
        ..options()
    };
    let open = |seed| Context::open(common::address(), &options(seed)).unwrap();
    let (a, b) = (
        end_on(open(1), QpType::Rc, None),
        end_on(open(2), QpType::Rc, None),
    );
    a.connect(&b.context, b.qp.qpn());
    b.connect(&a.context, a.qp.qpn());
    for round in 0..150u64 {
        let text = bytes(3000, round as usize);
        a.pages.write(100, &text);
        a.pages.write(0, &round.to_ne_bytes());
        b.receive(round, &[b.sge(5000, 4000)]);
        let add = SendOp::FetchAdd {
            remote: b.remote(0),
            add: 3,
        };
        let (word, old, list) = ([a.sge(0, 8)], [a.sge(8, 8)], [a.sge(100, 3000)]);
        let requests = [
            signalled(1, add, &old),
            signalled(2, SendOp::AtomicWrite(b.remote(8)), &word),
            signalled(3, flush(b.remote(0), false, true), &[]),
            signalled(4, SendOp::Send, &list),
        ];
        // SAFETY: the pages are only copied.
        unsafe { a.qp.post_send(&requests) }.unwrap();
        assert_eq!([0; 4].map(|_| a.succeed().wr_id), [1, 2, 3, 4]);
        assert_eq!(b.succeed().wr_id, round);
        assert_eq!((a.pages.word(8), b.pages.word(8)), (3 * round, round));
        assert_eq!(b.pages.read(5000, 3000), text);
    }
    assert_eq!(b.pages.word(0), 450);
    assert!(a.context.counters().retransmitted_pkts > 0);
}
