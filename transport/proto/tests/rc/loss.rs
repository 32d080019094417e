//! Loss.

use super::*;

#[test]
fn any_single_packet_may_be_lost() {
    use Opcode::*;
    let cases = [
        (0, RcSendFirst),
        (0, RcSendMiddle),
        (0, RcSendLast),
        (0, RcWriteFirst),
        (0, RcWriteMiddle),
        (0, RcWriteLastImm),
        (0, RcReadRequest),
        (0, RcFetchAdd),
        (0, RcCompareSwap),
        (1, RcAcknowledge),
        (1, RcReadResponseFirst),
        (1, RcReadResponseMiddle),
        (1, RcReadResponseLast),
        (1, RcAtomicAcknowledge),
    ];
    for (from, opcode) in cases {
        for n in 1..=3 {
            let mut net = net(Setup::default());
            let log = tap(&mut net, drop_nth(from, opcode, n));
            for round in 0..3 {
                recv(&mut net, 10 + 2 * round, 8192);
                recv(&mut net, 11 + 2 * round, 0);
                send(&mut net, 10 * round, SendOp::Send, 4000);
                send(
                    &mut net,
                    10 * round + 1,
                    SendOp::WriteImm(remote(REGION, 0), 1),
                    4000,
                );
                send(&mut net, 10 * round + 2, read_from(0), 4000);
                let add = SendOp::FetchAdd {
                    remote: remote(REGION, 4096),
                    add: 1,
                };
                send(&mut net, 10 * round + 3, add, 8);
                let word = remote(REGION, 4104);
                send(
                    &mut net,
                    10 * round + 4,
                    SendOp::CompareSwap {
                        remote: word,
                        compare: 0,
                        swap: 1,
                    },
                    8,
                );
            }
            net.run(20_000);
            let name = format!("{opcode:?} {n}");
            assert!(
                count(&log, opcode) >= n,
                "{name}: the packet was there to be lost"
            );
            let done = net.completions(0);
            assert_eq!(done.len(), 15, "{name}");
            assert!(done.iter().all(|c| c.status == Status::Success), "{name}");
            assert!(done.is_sorted_by_key(|c| c.wr_id.0), "{name}");
            let got = net.completions(1);
            assert_eq!(
                got.iter().map(|c| c.wr_id.0).collect::<Vec<_>>(),
                [10, 11, 12, 13, 14, 15]
            );
            assert_eq!(
                net.ends[1].memory.atomics, 6,
                "{name}: atomics ran once each"
            );
            // No loss costs more than a few probes.
            assert!(net.now < Nanos::from_millis(20), "{name}: {:?}", net.now);
        }
    }
}

#[test]
fn one_sequence_nak_per_gap() {
    let mut net = net(Setup::default());
    let log = tap(&mut net, drop_nth(0, Opcode::RcWriteMiddle, 2));
    send(&mut net, 1, write_to(0), 20 * 1024);
    net.run(1_000);
    let naks: Vec<_> = log
        .borrow()
        .iter()
        .filter(|e| e.3 == Some(0x60))
        .map(|e| e.2)
        .collect();
    assert_eq!(naks, [FIRST_PSN + 2]);
    assert_eq!(net.ends[0].qp.counters().rcvd_seq_err, 1);
    assert_eq!(net.ends[0].qp.counters().ack_timeout, 0);
    assert_eq!(statuses(&net.completions(0)), [(1, Status::Success)]);
}

#[test]
fn the_next_gap_is_told_too() {
    let mut net = net(Setup::default());
    let mut middles = 0;
    let log = tap(&mut net, move |_, packet| {
        let hit = packet.opcode() == Opcode::RcWriteMiddle;
        middles += usize::from(hit);
        hit && matches!(middles, 2 | 60)
    });
    send(&mut net, 1, write_to(0), 40 * 1024);
    net.run(1_000);
    let naks = log.borrow().iter().filter(|e| e.3 == Some(0x60)).count();
    assert_eq!((naks, net.ends[0].qp.counters().probes), (2, 0));
    assert_eq!(statuses(&net.completions(0)), [(1, Status::Success)]);
}

#[test]
fn on_an_unreliable_connection_a_loss_costs_its_message_and_no_receive() {
    let mut net = net(Setup {
        kind: QpKind::Uc,
        ..Setup::default()
    });
    tap(&mut net, drop_nth(0, Opcode::UcSendMiddle, 1));
    recv(&mut net, 20, 4096);
    send(&mut net, 1, SendOp::Send, 3000);
    send(&mut net, 2, SendOp::Send, 100);
    net.run(1_000);
    let got = net.completions(1);
    assert_eq!(statuses(&got), [(20, Status::Success)]);
    assert_eq!(got[0].byte_len, 100);
}

/// Hand the client an ACK, NAK or RNR NAK.
fn tell(net: &mut SimNet, byte: u8, psn: u32) -> Outcome {
    let syndrome = Syndrome::from_byte(byte);
    let aeth = Extension::Aeth(Aeth { syndrome, msn: 1 });
    let psn = Psn::new(psn);
    let bytes = raw(Header::new(Opcode::RcAcknowledge, QPNS[0], psn, aeth), &[]);
    let packet = Packet::new_checked(&bytes).unwrap();
    let end = &mut net.ends[0];
    end.qp.handle_packet(Nanos(2), &packet, &mut end.memory)
}

/// How many packets the client now sends.
fn burst(net: &mut SimNet, now: Nanos) -> usize {
    std::iter::from_fn(|| net.ends[0].qp.poll_transmit(now, Allow::All)).count()
}

#[test]
fn an_ack_that_comes_after_going_back_still_counts() {
    let mut net = net(Setup::default());
    send(&mut net, 1, write_to(0), 5 * 1024);
    assert_eq!(burst(&mut net, Nanos(1)), 5);
    assert_eq!(tell(&mut net, 0x60, FIRST_PSN + 1), Outcome::Accepted);
    // One packet goes out again; then it turns out that all had arrived.
    assert!(
        net.ends[0]
            .qp
            .poll_transmit(Nanos(2), Allow::All)
            .unwrap()
            .is_retransmission
    );
    assert_eq!(tell(&mut net, 0x1f, FIRST_PSN + 4), Outcome::Accepted);
    assert_eq!(burst(&mut net, Nanos(3)), 0);
    net.pump();
    assert_eq!(statuses(&net.completions(0)), [(1, Status::Success)]);
    assert_eq!(net.ends[0].qp.poll_timeout(), None);
}

#[test]
fn a_sequence_nak_after_an_rnr_wait_is_heard() {
    let mut net = net(Setup::default());
    send(&mut net, 1, SendOp::Send, 3000);
    assert_eq!(burst(&mut net, Nanos(1)), 3);
    tell(&mut net, 0x2c, FIRST_PSN);
    // rxe complains of the packets behind it, too; that must not end the wait.
    tell(&mut net, 0x60, FIRST_PSN);
    assert_eq!(burst(&mut net, Nanos(3)), 0);
    let due = net.ends[0].qp.poll_timeout().unwrap();
    assert_eq!(due, Nanos(2) + RnrTimer::new(12).wait());
    net.ends[0].qp.handle_timeout(due);
    assert_eq!(burst(&mut net, due), 3);
    // The first of them is lost again.
    tell(&mut net, 0x60, FIRST_PSN);
    assert_eq!(burst(&mut net, due), 3);
}

#[test]
fn when_everything_is_lost_one_probe_finds_out() {
    let mut net = net(Setup::default());
    let mut left = 40;
    tap(&mut net, move |_, _| {
        left -= 1;
        left >= 0
    });
    send(&mut net, 1, write_to(0), 40 * 1024);
    net.run(1_000);
    assert_eq!(statuses(&net.completions(0)), [(1, Status::Success)]);
    assert_eq!(net.ends[0].qp.counters().probes, 1);
}

#[test]
fn a_finished_read_makes_room_for_the_next() {
    let mut net = net(Setup {
        rd_atomic: 2,
        ..Setup::default()
    });
    for id in 0..4 {
        send(&mut net, id, read_from(0), 100);
    }
    let end = &mut net.ends[0];
    let asked =
        |qp: &mut QueuePair| std::iter::from_fn(|| qp.poll_transmit(Nanos(1), Allow::All)).count();
    assert_eq!(asked(&mut end.qp), 2);
    for (answered, more) in [(0, 1), (1, 1), (2, 0)] {
        let aeth = Extension::Aeth(Aeth {
            syndrome: Syndrome::ACK,
            msn: 1,
        });
        let psn = Psn::new(FIRST_PSN + answered);
        let header = Header::new(Opcode::RcReadResponseOnly, QPNS[0], psn, aeth);
        let bytes = raw(header, &[9; 100]);
        let packet = Packet::new_checked(&bytes).unwrap();
        end.qp.handle_packet(Nanos(2), &packet, &mut end.memory);
        assert_eq!(asked(&mut end.qp), more, "after answer {answered}");
    }
}

#[test]
fn waiting_for_a_receive_spends_no_retry() {
    // The peer asks for 655 ms, the ACK timeout is one.
    let setup = Setup {
        rnr_timer: 0,
        timeout: 8,
        retry_cnt: 0,
        ..Setup::default()
    };
    let mut net = net(setup);
    send(&mut net, 1, SendOp::Send, 100);
    net.pump();
    while net.ends[0].qp.counters().rcvd_rnr_err == 0 {
        assert!(net.step());
    }
    recv(&mut net, 10, 100);
    net.run(1_000);
    assert_eq!(statuses(&net.completions(0)), [(1, Status::Success)]);
    assert_eq!(net.ends[0].qp.counters().ack_timeout, 0);
}

#[test]
fn silence_exhausts_the_retries() {
    for (retry_cnt, timeouts) in [(0, 1), (1, 2), (3, 4), (6, 7)] {
        let mut net = net(Setup {
            retry_cnt,
            ..Setup::default()
        });
        tap(&mut net, |_, _| true);
        for id in 1..=3 {
            send(&mut net, id, SendOp::Send, 100);
        }
        recv(&mut net, 10, 100);
        net.run(10_000);
        let flushed = [
            (1, Status::RetryExceeded),
            (2, Status::Flushed),
            (3, Status::Flushed),
        ];
        assert_eq!(statuses(&net.completions(0)), flushed);
        assert_eq!(net.ends[0].qp.state(), QpState::Err);
        let counters = net.ends[0].qp.counters();
        assert_eq!(counters.ack_timeout, timeouts);
        // The last timeout is the end, not another try.
        assert_eq!(counters.completer_retry_err, timeouts - 1);
        assert_eq!((counters.retry_exceeded_err, counters.rdma_sends), (1, 0));
        let expected = INTERVAL * timeouts;
        assert!(
            (expected..expected + 1_000_000).contains(&net.now.0),
            "{:?}",
            net.now
        );
        assert!(net.ends[0].qp.counters().probes > timeouts);
        assert_eq!(net.ends[0].qp.poll_timeout(), None);
    }
}

/// 4.096 us * 2^14.
const INTERVAL: u64 = 67_108_864;

#[test]
fn a_process_that_runs_late_spends_no_retry_the_first_time() {
    let mut net = net(Setup {
        retry_cnt: 1,
        ..Setup::default()
    });
    send(&mut net, 1, SendOp::Send, 100);
    assert_eq!(burst(&mut net, Nanos(1)), 1);
    let mut expire = |at: u64| {
        net.ends[0].qp.handle_timeout(Nanos(at));
        let sent = burst(&mut net, Nanos(at));
        (net.ends[0].qp.counters().ack_timeout, sent)
    };
    // An ACK timeout without progress, noticed more than a quarter late: all it does is ask again.
    let late = 1 + INTERVAL + INTERVAL / 4 + 1;
    assert_eq!(expire(late), (0, 1));
    // Late again: that is spent, as is one that is noticed in time.
    assert_eq!(expire(late + 2 * INTERVAL), (1, 1));
    let started = late + 2 * INTERVAL;
    assert_eq!(expire(started + INTERVAL), (2, 0));
    let done = net.ends[0].qp.poll_completion();
    assert_eq!(done.unwrap().status, Status::RetryExceeded);
}

#[test]
fn an_answer_excuses_the_next_delay_too() {
    let mut net = net(Setup {
        retry_cnt: 0,
        ..Setup::default()
    });
    let mut at = 1;
    for round in 0..5 {
        send(&mut net, round.into(), SendOp::Send, 100);
        assert_eq!(burst(&mut net, Nanos(at)), 1);
        at += 2 * INTERVAL;
        net.ends[0].qp.handle_timeout(Nanos(at));
        assert_eq!(burst(&mut net, Nanos(at)), 1, "it asks again");
        assert_eq!(tell(&mut net, 0x1f, FIRST_PSN + round), Outcome::Accepted);
    }
    assert_eq!(net.ends[0].qp.counters().ack_timeout, 0);
}

#[test]
fn less_patience_counts_from_when_it_is_set() {
    let setup = Setup {
        retry_cnt: 6,
        ..Setup::default()
    };
    let mut net = net(setup);
    tap(&mut net, |_, _| true);
    let qp = &mut net.ends[0].qp;
    qp.to_sqd().unwrap();
    qp.set_rts_attr(RtsAttr {
        sq_psn: Psn::new(0),
        timeout: setup.timeout,
        retry_cnt: 1,
        rnr_retry: setup.rnr_retry,
        max_rd_atomic: setup.rd_atomic,
        read_chunk_packets: setup.read_chunk_packets,
    });
    qp.resume().unwrap();
    send(&mut net, 1, write_to(0), 100);
    net.run(10_000);
    assert_eq!(statuses(&net.completions(0)), [(1, Status::RetryExceeded)]);
    assert_eq!(net.ends[0].qp.counters().ack_timeout, 2);
}

/// A quarter of every interval and more is lost to others, and the peer is dead.
#[test]
fn a_dead_peer_is_reported_in_time_by_a_slow_process_too() {
    for retry_cnt in 0..=6 {
        let mut net = net(Setup {
            retry_cnt,
            ..Setup::default()
        });
        send(&mut net, 1, SendOp::Send, 100);
        let mut now = 1;
        while net.ends[0].qp.state() != QpState::Err {
            burst(&mut net, Nanos(now));
            now += INTERVAL + INTERVAL / 4 + 1;
            net.ends[0].qp.handle_timeout(Nanos(now));
            assert!(now <= 4 * (u64::from(retry_cnt) + 1) * INTERVAL, "{now}");
        }
    }
}

#[test]
fn retry_count_seven_never_gives_up() {
    let mut net = net(Setup {
        retry_cnt: 7,
        ..Setup::default()
    });
    let mut left = 300;
    tap(&mut net, move |_, _| {
        left -= 1;
        left > 0
    });
    send(&mut net, 1, write_to(0), 100);
    net.run(10_000);
    assert!(net.ends[0].qp.counters().ack_timeout > 7);
    assert_eq!(statuses(&net.completions(0)), [(1, Status::Success)]);
}

#[test]
fn without_ack_timeout_probes_still_recover() {
    let mut net = net(Setup {
        timeout: 0,
        retry_cnt: 0,
        ..Setup::default()
    });
    let mut left = 20;
    tap(&mut net, move |_, _| {
        left -= 1;
        left > 0
    });
    send(&mut net, 1, write_to(0), 5000);
    net.run(10_000);
    assert_eq!(statuses(&net.completions(0)), [(1, Status::Success)]);
    assert_eq!(net.ends[0].qp.counters().ack_timeout, 0);
}
