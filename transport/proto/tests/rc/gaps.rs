//! What arrives ahead of a gap is kept, and only what was lost is sent again.

use super::*;

/// Two ends that keep what arrives early and know it of each other; the client loses the packets with
/// these PSNs so many times each.
fn losing(early: Early, losses: &[(u32, u32)]) -> (SimNet, Log) {
    let setup = Setup {
        early,
        ..Setup::default()
    };
    super::losing(net(setup), 0, losses)
}

/// Writes 40 packets; how many were sent again, and how many probes.
fn write_forty(net: &mut SimNet) -> (u64, u64) {
    send(net, 1, write_to(0), 40 * 1024);
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
    (counters.retransmitted_pkts, counters.probes)
}

#[test]
fn only_what_was_lost_is_sent_again() {
    for losses in [
        &[(2, 1)][..],
        &[(0, 1)],
        &[(2, 1), (3, 1), (9, 1), (30, 1)],
        &[(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (6, 1)],
    ] {
        let (mut net, _) = losing(Early::Reported, losses);
        assert_eq!(
            write_forty(&mut net),
            (losses.len() as u64, 0),
            "{losses:?}"
        );
    }
}

#[test]
fn a_whole_window_behind_a_gap_is_kept() {
    let (mut net, _) = losing(Early::Reported, &[(0, 1), (100, 1)]);
    for id in 1..=3 {
        send(&mut net, id, write_to(0), 40 * 1024);
    }
    net.run(2_000);
    assert_eq!(net.completions(0).len(), 3);
    assert_eq!(net.ends[0].qp.counters().retransmitted_pkts, 2);
}

#[test]
fn a_lost_repetition_is_found_by_what_was_sent_after_it() {
    let (mut net, _) = losing(Early::Reported, &[(2, 3), (20, 2), (30, 1), (36, 1)]);
    assert_eq!(write_forty(&mut net), (7, 0));
}

#[test]
fn one_probe_finds_all_of_a_lost_tail() {
    let (mut net, _) = losing(Early::Reported, &[(36, 1), (37, 1), (38, 1), (39, 1)]);
    // It repeats the oldest that is not acknowledged, which had arrived.
    assert_eq!(write_forty(&mut net), (1 + 4, 1));
    // The same where the last packet is all that is lost, twice.
    let (mut net, _) = losing(Early::Reported, &[(39, 2)]);
    assert_eq!(write_forty(&mut net), (1 + 2, 2));
}

#[test]
fn a_probe_waits_less_where_packets_were_lost_before() {
    let took = |losses| {
        let (mut net, _) = losing(Early::Reported, losses);
        let began = net.now;
        let (_, probes) = write_forty(&mut net);
        (probes, net.now.since(began))
    };
    let (probes, calm) = took(&[(39, 1)]);
    assert!(probes == 1 && calm > PROBE_MIN, "{calm:?}");
    let (probes, lossy) = took(&[(2, 1), (39, 2)]);
    assert!(probes == 1 && lossy < Nanos(PROBE_MIN.0 / 2), "{lossy:?}");
}

#[test]
fn a_lost_report_is_made_good_by_the_next() {
    let (mut net, _) = losing(Early::Reported, &[]);
    let (mut writes, mut reports) = (0, 0);
    tap(&mut net, move |from, packet| {
        writes += usize::from(packet.opcode() == Opcode::RcWriteMiddle);
        reports += usize::from(packet.opcode() == Opcode::RcAtomicAcknowledge);
        (from == 0 && writes == 2) || (from == 1 && reports < 12)
    });
    assert_eq!(write_forty(&mut net), (1, 0));
}

#[test]
fn packets_that_overtake_each_other_cost_less_than_going_back() {
    let mut sent = [0; 2];
    for seed in 0..100 {
        for (early, sent) in [Early::Dropped, Early::Reported].into_iter().zip(&mut sent) {
            let mut net = net(Setup {
                early,
                ..Setup::default()
            });
            (net.faults.reorder, net.rng) = (100, Rng(seed));
            recv(&mut net, 10, 20 * 1024);
            send(&mut net, 1, SendOp::Send, 20 * 1024);
            net.run(1_000);
            assert_eq!(statuses(&net.completions(0)), [(1, Status::Success)]);
            assert_eq!(statuses(&net.completions(1)), [(10, Status::Success)]);
            *sent += net.ends[0].qp.counters().retransmitted_pkts;
        }
    }
    assert!(3 * sent[1] < sent[0], "{sent:?}");
}

/// A peer that goes back to the gap and sends everything again, as Linux rxe, has nothing to lose.
#[test]
fn to_keep_what_is_early_costs_a_peer_that_does_not_know_no_packet() {
    for seed in 0..200 {
        let mut rng = Rng(seed);
        let losses: Vec<(u32, u32)> = (0..1 + rng.below(4))
            .map(|_| (rng.below(40) as u32, 1 + rng.below(2) as u32))
            .collect();
        let sent = [Early::Dropped, Early::Kept].map(|early| {
            let (mut net, log) = losing(early, &losses);
            write_forty(&mut net);
            assert_eq!(count(&log, Opcode::RcAtomicAcknowledge), 0);
            let log = log.borrow();
            log.iter().filter(|entry| entry.0 == 0).count()
        });
        assert!(sent[1] <= sent[0], "{losses:?}: {sent:?}");
    }
}

#[test]
fn what_is_kept_waits_for_receives_too() {
    for early in [Early::Kept, Early::Reported] {
        let (mut net, _) = losing(early, &[(1, 2)]);
        for id in 1..=6 {
            send(&mut net, id, SendOp::Send, 1000);
        }
        recv(&mut net, 11, 1000);
        recv(&mut net, 12, 1000);
        net.pump();
        while net.ends[0].qp.counters().rcvd_rnr_err == 0 {
            assert!(net.step());
        }
        for id in 13..=16 {
            recv(&mut net, id, 1000);
        }
        net.run(1_000);
        let ids = |done: Vec<Completion>| {
            statuses(&done)
                .iter()
                .map(|done| done.0)
                .collect::<Vec<_>>()
        };
        assert_eq!(
            ids(net.completions(1)),
            [11, 12, 13, 14, 15, 16],
            "{early:?}"
        );
        assert_eq!(ids(net.completions(0)), [1, 2, 3, 4, 5, 6]);
    }
}

/// A report: this PSN is missing, and of those behind it these are kept.
fn report(net: &mut SimNet, psn: u32, kept: u64) -> Outcome {
    let syndrome = Syndrome::Nak(NakCode::SequenceError);
    let extension = Extension::AtomicAck(Aeth { syndrome, msn: 0 }, kept);
    let header = Header::new(
        Opcode::RcAtomicAcknowledge,
        QPNS[0],
        Psn::new(FIRST_PSN + psn),
        extension,
    );
    let bytes = raw(header, &[]);
    let packet = Packet::new_checked(&bytes).unwrap();
    let end = &mut net.ends[0];
    end.qp.handle_packet(Nanos(2), &packet, &mut end.memory)
}

/// The PSNs that the client now sends.
fn sent(net: &mut SimNet) -> Vec<u32> {
    let qp = &mut net.ends[0].qp;
    let packets = std::iter::from_fn(|| qp.poll_transmit(Nanos(2), Allow::All));
    packets
        .map(|packet| {
            Psn::new(u32::from_be_bytes(
                packet.header()[8..12].try_into().unwrap(),
            ))
        })
        .map(|psn| psn.value() - FIRST_PSN)
        .collect()
}

#[test]
fn reports_say_what_is_under_way_and_what_goes_again() {
    let (mut net, _) = losing(Early::Reported, &[]);
    send(&mut net, 1, write_to(0), 10 * 1024);
    assert_eq!(sent(&mut net).len(), 10);
    // 2 and 4 are missing, 8 and 9 not heard of.
    assert_eq!(report(&mut net, 2, 0b1_1101), Outcome::Accepted);
    assert_eq!(net.ends[0].qp.packets_in_flight(), 2);
    assert_eq!(sent(&mut net), [2, 4]);
    assert_eq!(net.ends[0].qp.packets_in_flight(), 4);
    // The same again: it says nothing of what has just been sent.
    report(&mut net, 2, 0b1_1101);
    assert_eq!(sent(&mut net), [0; 0]);
    // 9 has come, 8 has not; 2 and 4 were sent after both.
    report(&mut net, 2, 0b101_1101);
    assert_eq!(sent(&mut net), [8]);
    // 8 has come, so 2 and 4 are lost again. An older report changes nothing.
    report(&mut net, 2, 0b111_1101);
    let old = report(&mut net, 1, 0b1);
    assert_eq!(old, Outcome::Dropped(DropReason::Stale));
    assert_eq!(sent(&mut net), [2, 4]);
}

#[test]
fn a_peer_that_could_keep_nothing_gets_everything_again() {
    let (mut net, _) = losing(Early::Reported, &[]);
    send(&mut net, 1, write_to(0), 5 * 1024);
    assert_eq!(sent(&mut net), [0, 1, 2, 3, 4]);
    report(&mut net, 1, 0);
    assert_eq!(sent(&mut net), [1, 2, 3, 4]);
}

#[test]
fn a_stranger_does_not_report() {
    let (mut net, _) = losing(Early::Kept, &[]);
    send(&mut net, 1, write_to(0), 5 * 1024);
    assert_eq!(sent(&mut net).len(), 5);
    let outcome = report(&mut net, 1, 1);
    assert_eq!(outcome, Outcome::Dropped(DropReason::Unsupported));
    assert_eq!(sent(&mut net), [0; 0]);
}

#[test]
fn what_a_peer_forgot_is_sent_again() {
    for forgets in [100, 500, 1000] {
        let (mut net, _) = losing(Early::Reported, &[(3, 1), (17, 2), (30, 1)]);
        net.forgets = forgets;
        write_forty(&mut net);
    }
}

fn early_request(psn: u32) -> EarlyPacket {
    EarlyPacket {
        is_response: false,
        psn: Psn::new(FIRST_PSN + psn),
    }
}

#[test]
fn nothing_that_was_kept_is_asked_for_after_an_error() {
    let (mut net, _) = losing(Early::Reported, &[]);
    let write = |psn| {
        let packet = request(
            Opcode::RcWriteOnly,
            FIRST_PSN + psn,
            Extension::Reth(reth(0, 4)),
            b"late",
        );
        (psn, packet)
    };
    for (psn, bytes) in [write(1), write(2)] {
        let (outcome, answers) = ask(&mut net, &bytes);
        assert_eq!((outcome, answers.len()), (Outcome::Ahead, 1), "{psn}");
        let qp = &mut net.ends[1].qp;
        qp.note_kept(&Packet::new_checked(&bytes).unwrap());
        assert_eq!(qp.wants_kept(), None);
    }
    ask(&mut net, &write(0).1);
    let qp = &mut net.ends[1].qp;
    assert_eq!(qp.wants_kept(), Some(early_request(1)));
    qp.to_error();
    assert_eq!(qp.wants_kept(), None);
    // A new life begins with nothing.
    qp.to_reset();
    assert_eq!(qp.wants_kept(), None);
}

fn write_of(psn: u32, bytes: &[u8]) -> Vec<u8> {
    let extension = Extension::Reth(reth(0, bytes.len() as u32));
    request(Opcode::RcWriteOnly, FIRST_PSN + psn, extension, bytes)
}

/// A stranger is asked once for each gap. One that opens because what was kept is gone is another.
#[test]
fn a_gap_that_a_forgotten_packet_leaves_is_asked_for() {
    let (mut net, _) = losing(Early::Kept, &[]);
    let early = write_of(1, b"early");
    assert_eq!(ask(&mut net, &early).0, Outcome::Ahead);
    let qp = &mut net.ends[1].qp;
    qp.note_kept(&Packet::new_checked(&early).unwrap());
    ask(&mut net, &write_of(0, b"late"));
    let qp = &mut net.ends[1].qp;
    let wanted = qp.wants_kept().unwrap();
    assert_eq!(wanted, early_request(1));
    qp.forget_kept(wanted);
    let (outcome, answers) = ask(&mut net, &write_of(2, b"next"));
    assert_eq!((outcome, answers.len()), (Outcome::Ahead, 1));
    assert_eq!(ask(&mut net, &write_of(3, b"more")).1.len(), 0);
}

#[test]
fn nothing_longer_than_a_packet_is_kept() {
    let (mut net, _) = losing(Early::Reported, &[]);
    let outcomes = [1024, 1028].map(|len| ask(&mut net, &write_of(2, &vec![0; len])).0);
    let too_long = Outcome::Dropped(DropReason::OutOfSequence);
    assert_eq!(outcomes, [Outcome::Ahead, too_long]);
}
