//! Receiver not ready.

use super::*;

#[test]
fn every_rnr_timer_code_is_waited_for() {
    let tens: [u64; 32] = [
        65536, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024,
        1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152,
    ];
    for code in 0..32 {
        let mut net = net(Setup {
            rnr_timer: code,
            ..Setup::default()
        });
        let log = tap(&mut net, |_, _| false);
        send(&mut net, 1, SendOp::Send, 100);
        net.pump();
        while count(&log, Opcode::RcAcknowledge) == 0 {
            assert!(net.step());
        }
        assert_eq!(log.borrow().last().unwrap().3, Some(0x20 | code));
        let refused = net.now;
        recv(&mut net, 10, 100);
        net.run(1_000);
        let waited = net.now.0 - refused.0;
        let asked = tens[usize::from(code)] * 10_000;
        assert!(
            (asked..asked + 30_000).contains(&waited),
            "{code}: {waited}"
        );
        assert_eq!(statuses(&net.completions(0)), [(1, Status::Success)]);
        assert_eq!(count(&log, Opcode::RcSendOnly), 2);
    }
}

#[test]
fn rnr_retries_are_counted_and_exhausted() {
    for rnr_retry in 0..7 {
        let mut net = net(Setup {
            rnr_retry,
            retry_cnt: 0,
            ..Setup::default()
        });
        let log = tap(&mut net, |_, _| false);
        send(&mut net, 1, SendOp::Send, 100);
        send(&mut net, 2, write_to(0), 100);
        net.run(10_000);
        assert_eq!(count(&log, Opcode::RcSendOnly), usize::from(rnr_retry) + 1);
        let counters = net.ends[0].qp.counters();
        assert_eq!(counters.retry_rnr_exceeded_err, 1);
        // Waiting for a receive is no loss.
        assert_eq!(counters.completer_retry_err, 0);
        let flushed = [(1, Status::RnrRetryExceeded), (2, Status::Flushed)];
        assert_eq!(statuses(&net.completions(0)), flushed);
        assert_eq!(net.ends[0].qp.counters().ack_timeout, 0);
        assert_eq!(net.ends[1].qp.state(), QpState::Rts);
    }
}

#[test]
fn progress_reloads_the_rnr_count() {
    let mut net = net(Setup {
        rnr_retry: 1,
        ..Setup::default()
    });
    let log = tap(&mut net, |_, _| false);
    for id in 1..=4 {
        send(&mut net, id, SendOp::Send, 100);
    }
    net.pump();
    for posted in 0..4 {
        // Post the next receive only when the message was refused once more.
        while log
            .borrow()
            .iter()
            .filter(|e| e.3.is_some_and(|s| s >> 5 == 1))
            .count()
            <= posted
        {
            assert!(net.step());
        }
        recv(&mut net, 10 + posted as u64, 100);
    }
    net.run(1_000);
    assert_eq!(net.completions(0).len(), 4);
    assert_eq!(net.ends[0].qp.state(), QpState::Rts);
}

#[test]
fn a_write_with_immediate_waits_for_a_receive_and_runs_once() {
    for len in [100, 5000] {
        let mut net = net(Setup::default());
        let op = SendOp::WriteImm(remote(REGION, 0), 7);
        send(&mut net, 1, op, len);
        net.pump();
        while net.ends[1].qp.counters().send_rnr_err == 0 {
            assert!(net.step());
        }
        recv(&mut net, 10, 0);
        net.run(1_000);
        let got = net.completions(1);
        assert_eq!(
            (got[0].kind, got[0].byte_len),
            (CompletionKind::RecvWriteImm, len)
        );
        assert_eq!(got.len(), 1);
    }
}

#[test]
fn a_lost_rnr_nak_is_given_again() {
    let mut net = net(Setup {
        rnr_retry: 0,
        ..Setup::default()
    });
    tap(&mut net, drop_nth(1, Opcode::RcAcknowledge, 1));
    send(&mut net, 1, SendOp::Send, 100);
    net.run(1_000);
    assert_eq!(
        statuses(&net.completions(0)),
        [(1, Status::RnrRetryExceeded)]
    );
    assert_eq!(net.ends[1].qp.counters().send_rnr_err, 2);
}
