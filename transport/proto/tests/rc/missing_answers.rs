//! Answers to READs that arrive ahead of a missing one are kept, and only what is missing is asked for
//! again.

use super::*;

/// Two ends that know of each other what they do with early packets; answers with these PSNs are lost so
/// many times each.
fn losing(setup: Setup, losses: &[(u32, u32)]) -> (SimNet, Log) {
    super::losing(net(setup), 1, losses)
}

fn reported() -> Setup {
    Setup {
        early: Early::Reported,
        ..Setup::default()
    }
}

/// What one end sent.
fn sent(log: &Log, from: usize) -> usize {
    log.borrow().iter().filter(|entry| entry.0 == from).count()
}

/// READs of 40 packets, with nothing left to do afterwards; requests and answers sent, and probes.
fn read_forty(net: &mut SimNet, log: &Log) -> (usize, usize, u64) {
    send(net, 1, read_from(0), 40 * 1024);
    net.run(2_000);
    assert_eq!(statuses(&net.completions(0)), [(1, Status::Success)]);
    let [client, server] = &net.ends;
    assert_eq!(
        client.memory.regions[&REGION].bytes[..40 * 1024],
        server.memory.regions[&REGION].bytes[..40 * 1024]
    );
    assert_eq!(client.qp.packets_in_flight(), 0);
    assert_eq!(client.qp.poll_timeout(), None);
    let counters = client.qp.counters();
    assert_eq!(counters.ack_timeout, 0);
    (sent(log, 0), sent(log, 1), counters.probes)
}

#[test]
fn only_missing_answers_are_asked_for() {
    for (losses, gaps) in [
        (&[(2, 1)][..], 1),
        (&[(0, 1)], 1),
        (&[(2, 1), (3, 1), (9, 1), (30, 1)], 3),
        (&[(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1)], 1),
    ] {
        for chunk in [0, 7] {
            let setup = Setup {
                read_chunk_packets: chunk,
                ..reported()
            };
            let (mut net, log) = losing(setup, losses);
            let (requests, answers, probes) = read_forty(&mut net, &log);
            let asked = if chunk == 0 { 1 } else { 6 };
            assert_eq!(
                (requests, answers, probes),
                (asked + gaps, 40 + losses.len(), 0),
                "{losses:?}"
            );
        }
    }
}

#[test]
fn a_lost_repetition_is_found_by_what_was_asked_for_after_it() {
    // The repetitions of 2 and 20 are asked for one after the other; that of 2 is lost twice.
    let (mut net, log) = losing(reported(), &[(2, 3), (20, 1), (36, 1)]);
    let (_, answers, probes) = read_forty(&mut net, &log);
    assert_eq!(
        (answers, probes),
        (40 + 5, 1),
        "the last time nothing came after it"
    );
}

#[test]
fn a_lost_tail_is_found_by_a_probe() {
    let (mut net, log) = losing(reported(), &[(37, 1), (38, 1), (39, 1)]);
    assert_eq!(read_forty(&mut net, &log), (2, 43, 1));
    // Where something is known to be missing, a probe asks for that and no more.
    let (mut net, log) = losing(reported(), &[(2, 2), (3, 2)]);
    assert_eq!(read_forty(&mut net, &log), (3, 44, 1));
}

#[test]
fn more_gaps_than_can_be_remembered_are_filled_too() {
    let losses: Vec<_> = (0..200).step_by(2).map(|psn| (psn, 1)).collect();
    let setup = Setup {
        mtu: Mtu::B256,
        rd_atomic: 16,
        ..reported()
    };
    let (mut net, log) = losing(setup, &losses);
    send(&mut net, 1, read_from(0), 200 * 256);
    net.run(5_000);
    assert_eq!(statuses(&net.completions(0)), [(1, Status::Success)]);
    let [client, server] = &net.ends;
    assert_eq!(
        client.memory.regions[&REGION].bytes[..200 * 256],
        server.memory.regions[&REGION].bytes[..200 * 256]
    );
    assert!(sent(&log, 1) < 2 * 200, "{}", sent(&log, 1));
}

/// All of them have the same target; what the last one reads stays.
#[test]
fn reads_into_the_same_memory_end_in_their_order() {
    for lost in 0..12 {
        let (mut net, log) = losing(reported(), &[(lost, 1)]);
        for id in 0..4 {
            send(&mut net, id, read_from(id * 5_000), 3 * 1024);
        }
        net.run(2_000);
        let ids: Vec<_> = net.completions(0).iter().map(|c| c.wr_id.0).collect();
        assert_eq!(ids, [0, 1, 2, 3]);
        let [client, server] = &net.ends;
        assert_eq!(
            client.memory.regions[&REGION].bytes[..3 * 1024],
            server.memory.regions[&REGION].bytes[15_000..][..3 * 1024],
            "{lost}"
        );
        let probes = client.qp.counters().probes;
        assert_eq!(
            (sent(&log, 1), probes),
            (13, u64::from(lost == 11)),
            "{lost}"
        );
    }
}

#[test]
fn an_acknowledgement_tells_of_missing_answers_and_is_not_forgotten() {
    for lost in 0..7 {
        let (mut net, log) = losing(reported(), &[(lost, 1)]);
        let add = SendOp::FetchAdd {
            remote: remote(REGION, 40_000),
            add: 1,
        };
        send(&mut net, 0, read_from(8 * 1024), 2 * 1024);
        send(&mut net, 1, write_to(0), 100);
        send(&mut net, 2, add, 8);
        send(&mut net, 3, write_to(0), 2 * 1024);
        send(&mut net, 4, read_from(8 * 1024), 100);
        net.run(2_000);
        let done = net.completions(0);
        assert_eq!(
            done.iter().map(|c| c.wr_id.0).collect::<Vec<_>>(),
            [0, 1, 2, 3, 4]
        );
        assert!(done.iter().all(|c| c.status == Status::Success));
        assert_eq!(net.ends[1].memory.atomics, 1);
        // No WRITE is sent again, and an answer that others followed needs no probe.
        assert_eq!(count(&log, Opcode::RcWriteFirst), 1, "{lost}");
        let counters = net.ends[0].qp.counters();
        assert_eq!(counters.probes, u64::from(lost == 6), "{lost}");
        assert!(counters.retransmitted_pkts <= 1, "{lost}: {counters:?}");
    }
}

#[test]
fn what_was_kept_and_forgotten_is_asked_for_again() {
    for forgets in [100, 500, 1000] {
        let (mut net, log) = losing(reported(), &[(3, 1), (17, 2), (30, 1)]);
        net.forgets = forgets;
        read_forty(&mut net, &log);
    }
}

/// A stranger sees what it always has: from the gap on everything is asked for again, once.
#[test]
fn of_a_stranger_everything_from_the_gap_on_is_asked_for() {
    for early in [Early::Dropped, Early::Kept] {
        let setup = Setup {
            early,
            ..Setup::default()
        };
        let (mut net, log) = losing(setup, &[(2, 1)]);
        assert_eq!(read_forty(&mut net, &log), (2, 40 + 38, 0));
        assert!(net.kept.iter().all(|kept| kept.is_empty()));
    }
}

/// An answer of so many bytes to the client's packet with this PSN.
fn answer(net: &mut SimNet, psn: u32, len: usize) -> Outcome {
    let psn = Psn::new(FIRST_PSN + psn);
    let header = Header::new(Opcode::RcReadResponseMiddle, QPNS[0], psn, Extension::Bare);
    let bytes = raw(header, &vec![0; len]);
    let packet = Packet::new_checked(&bytes).unwrap();
    let end = &mut net.ends[0];
    let outcome = end.qp.handle_packet(Nanos(2), &packet, &mut end.memory);
    if outcome == Outcome::Ahead {
        end.qp.note_kept(&packet);
    }
    outcome
}

#[test]
fn each_answer_is_kept_once_and_what_is_missing_is_asked_for_once() {
    let (mut net, _) = losing(reported(), &[]);
    send(&mut net, 1, read_from(0), 20 * 1024);
    let asked = |net: &mut SimNet| {
        let qp = &mut net.ends[0].qp;
        std::iter::from_fn(|| qp.poll_transmit(Nanos(2), Allow::All)).count()
    };
    assert_eq!(asked(&mut net), 1);
    assert_eq!(net.ends[0].qp.packets_in_flight(), 20);
    assert_eq!(answer(&mut net, 3, 1024), Outcome::Ahead);
    assert_eq!(net.ends[0].qp.packets_in_flight(), 16);
    assert_eq!(
        answer(&mut net, 3, 1024),
        Outcome::Dropped(DropReason::Stale)
    );
    assert_eq!(
        answer(&mut net, 5, 2048),
        Outcome::Dropped(DropReason::OutOfSequence)
    );
    assert_eq!(
        answer(&mut net, 20, 1024),
        Outcome::Dropped(DropReason::Stale)
    );
    assert_eq!(asked(&mut net), 2, "0 to 2, and 4");
    assert_eq!(net.ends[0].qp.packets_in_flight(), 19);
    assert_eq!(asked(&mut net), 0);
    assert_eq!(net.ends[0].qp.wants_kept(), None);
    for psn in 0..3 {
        assert_eq!(answer(&mut net, psn, 1024), Outcome::Accepted);
    }
    let wanted = net.ends[0].qp.wants_kept().unwrap();
    assert!(wanted.is_response && wanted.psn == Psn::new(FIRST_PSN + 3));
    net.ends[0].qp.to_error();
    assert_eq!(net.ends[0].qp.wants_kept(), None);
}
