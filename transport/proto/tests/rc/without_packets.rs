//! Requests that the caller carries out itself, and peers that it knows to be gone.

use super::*;

#[test]
fn what_was_done_without_packets_leaves_no_gap_in_those_behind_it() {
    let mut net = net(Setup::default());
    let log = tap(&mut net, |_, _| false);
    send(&mut net, 1, write_to(0), 5000);
    let op_of = |net: &SimNet| net.ends[0].qp.untouched().copied();
    assert_eq!(op_of(&net), Some(write_to(0)));
    assert_eq!(net.ends[0].qp.front_list().total(), 5000);
    send(&mut net, 2, read_from(0), 9000);
    send(&mut net, 3, write_to(100), 100);
    net.ends[0].qp.finish_untouched();
    assert_eq!(op_of(&net), Some(read_from(0)));
    assert_eq!(net.ends[0].qp.front_list().total(), 9000);
    net.ends[0].qp.finish_untouched();
    net.run(1_000);
    assert_eq!(op_of(&net), None);
    // Behind what had packets, too.
    send(&mut net, 4, write_to(0), 100_000);
    net.ends[0].qp.finish_untouched();
    send(&mut net, 5, write_to(200), 100);
    net.run(1_000);
    let done = net.completions(0);
    assert_eq!(
        statuses(&done),
        [1, 2, 3, 4, 5].map(|id| (id, Status::Success))
    );
    assert_eq!(
        (done[1].kind, done[1].byte_len),
        (CompletionKind::Read, 9000)
    );
    let psns: Vec<_> = log
        .borrow()
        .iter()
        .filter(|entry| entry.0 == 0)
        .map(|entry| (entry.1, entry.2))
        .collect();
    let write = Opcode::RcWriteOnly;
    assert_eq!(psns, [(write, FIRST_PSN), (write, FIRST_PSN + 1)]);
}

#[test]
fn only_what_is_next_and_has_not_begun_is_offered() {
    let mut net = net(Setup::default());
    recv(&mut net, 9, 100);
    send(&mut net, 1, SendOp::Send, 100);
    net.ends[0].qp.poll_transmit(Nanos(0), Allow::All).unwrap();
    // The SEND is under way: nothing behind it may be done, and asking for it changes nothing.
    send(&mut net, 2, write_to(0), 100);
    assert!(net.ends[0].qp.untouched().is_none());
    net.ends[0].qp.finish_untouched();
    assert_eq!(net.completions(0), []);
    net.run(1_000);
    let expected = [1, 2].map(|id| (id, Status::Success));
    assert_eq!(statuses(&net.completions(0)), expected);
    net.ends[0].qp.to_sqd().unwrap();
    send(&mut net, 3, write_to(0), 100);
    assert!(net.ends[0].qp.untouched().is_none(), "it may not start");
    net.ends[0].qp.resume().unwrap();
    assert!(net.ends[0].qp.untouched().is_some());
    net.ends[0].qp.to_error();
    assert!(net.ends[0].qp.untouched().is_none());
}

#[test]
fn a_peer_that_is_gone_fails_the_oldest_request_and_flushes_the_rest() {
    let mut net = net(Setup::default());
    assert!(!net.ends[0].qp.handle_peer_gone());
    assert_eq!(net.ends[0].qp.state(), QpState::Rts, "nothing was asked");
    for id in 1..=3 {
        send(&mut net, id, SendOp::Send, 100);
    }
    net.ends[0].qp.poll_transmit(Nanos(0), Allow::All).unwrap();
    assert!(net.ends[0].qp.handle_peer_gone());
    let expected = [
        (1, Status::RetryExceeded),
        (2, Status::Flushed),
        (3, Status::Flushed),
    ];
    let done: Vec<_> = std::iter::from_fn(|| net.ends[0].qp.poll_completion()).collect();
    assert_eq!(statuses(&done), expected);
    assert_eq!(net.ends[0].qp.state(), QpState::Err);
}

#[test]
fn a_peer_that_is_gone_ends_receives_that_nothing_was_sent_beside() {
    let mut net = net(Setup::default());
    for id in 1..=2 {
        recv(&mut net, id, 100);
    }
    // The receives are of the end at 1.
    assert!(net.ends[1].qp.handle_peer_gone());
    let done: Vec<_> = std::iter::from_fn(|| net.ends[1].qp.poll_completion()).collect();
    let expected = [1, 2].map(|id| (id, Status::Flushed));
    assert_eq!(statuses(&done), expected);
    assert_eq!(net.ends[1].qp.state(), QpState::Err);
    assert!(!net.ends[1].qp.handle_peer_gone(), "there is nothing left");
}
