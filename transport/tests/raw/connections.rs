//! What RC and UC carry.

use super::*;

#[test]
fn messages_are_gathered_and_scattered() {
    for kind in [QpType::Rc, QpType::Uc] {
        let (a, b) = pair(kind);
        for (round, len) in [0usize, 3, 64, 1024, 1025, 50_000].into_iter().enumerate() {
            let text = bytes(len, round);
            a.pages.write(100, &text);
            // Three pieces there, two here, cut at different places.
            let (x, y) = (len / 3, len / 2);
            let cut = [
                a.sge(100, x as u32),
                a.sge(100 + x, (y - x) as u32),
                a.sge(100 + y, (len - y) as u32),
            ];
            let into = [b.sge(0, (len / 5) as u32), b.sge(200_000, len as u32)];
            b.receive(7, &into);
            a.post(8, SendOp::SendImm(round as u32), &cut);
            let got = b.succeed();
            let expected = (7, CompletionKind::Recv, len as u32, Some(round as u32));
            assert_eq!((got.wr_id, got.kind, got.byte_len, got.imm), expected);
            let flags = got.flags.without(provider::FLAGS_OF_ANY_RECEIVE);
            assert_eq!((got.qpn, flags), (b.qp.qpn(), WcFlags::WITH_IMM));
            let mut whole = b.pages.read(0, len / 5);
            whole.extend(b.pages.read(200_000, len - len / 5));
            assert_eq!(whole, text);
            let sent = a.succeed();
            assert_eq!((sent.wr_id, sent.kind), (8, CompletionKind::Send));

            b.receive(9, &[]);
            a.post(10, SendOp::WriteImm(b.remote(400_000), 5), &cut);
            let got = b.succeed();
            let expected = (9, CompletionKind::RecvWriteImm, len as u32, Some(5));
            assert_eq!((got.wr_id, got.kind, got.byte_len, got.imm), expected);
            assert_eq!(b.pages.read(400_000, len), text);
            assert_eq!(a.succeed().kind, CompletionKind::Write);
        }
    }
}

#[test]
fn one_sided_operations_do_what_they_say() {
    let (a, b) = pair(QpType::Rc);
    b.pages.write(0, &bytes(30_000, 1));
    let into = [a.sge(500, 10_000), a.sge(100_000, 20_000)];
    a.post(1, SendOp::Read(b.remote(0)), &into);
    assert_eq!(a.succeed().byte_len, 30_000);
    let mut whole = a.pages.read(500, 10_000);
    whole.extend(a.pages.read(100_000, 20_000));
    assert_eq!(whole, bytes(30_000, 1));

    b.pages.write(64, &5u64.to_ne_bytes());
    let remote = b.remote(64);
    let old = [a.sge(0, 8)];
    a.post(2, SendOp::FetchAdd { remote, add: 7 }, &old);
    assert_eq!(
        (a.succeed().kind, a.pages.word(0)),
        (CompletionKind::FetchAdd, 5)
    );
    let swap = |compare, swap| SendOp::CompareSwap {
        remote,
        compare,
        swap,
    };
    for (compare, new, was, is) in [(11, 1, 12, 12), (12, 99, 12, 99)] {
        a.post(3, swap(compare, new), &old);
        a.succeed();
        assert_eq!((a.pages.word(0), b.pages.word(64)), (was, is));
    }

    a.pages.write(8, &0x0102_0304_0506_0708u64.to_ne_bytes());
    a.post(4, SendOp::AtomicWrite(remote), &[a.sge(8, 8)]);
    assert_eq!(a.succeed().kind, CompletionKind::AtomicWrite);
    assert_eq!(b.pages.word(64), 0x0102_0304_0506_0708);
}

#[test]
fn a_flush_is_carried_out() {
    let (a, b) = pair(QpType::Rc);
    for whole_region in [false, true] {
        let flush = Flush {
            remote: b.remote(0),
            len: 4096,
            global: true,
            persistent: false,
            whole_region,
        };
        a.post(5, SendOp::Flush(flush), &[]);
        assert_eq!(a.succeed().kind, CompletionKind::Flush);
    }
}

/// An operation in the memory of a peer.
type Request = fn(&End) -> SendOp;

/// What the peer refuses, and how.
fn refused_by_the_peer(op: Request, len: u32, status: Status) {
    let (a, b) = pair(QpType::Rc);
    a.pages.write(0, &[7; 8]);
    let list = [a.sge(0, len)];
    let list = if len == 0 { &[][..] } else { &list[..] };
    match a.try_post(signalled(1, op(&b), list)) {
        Ok(()) => assert_eq!(a.next().status, status, "{:?}", op(&b)),
        // A library of C may see before what the peer would see.
        Err(error) => {
            assert!(!provider::HAS_WORDS && error.errno() == libc::EINVAL);
            return;
        }
    }
    let deadline = Instant::now() + PATIENCE;
    while b.qp.query().state != QpState::Err {
        assert!(Instant::now() < deadline, "the target goes on");
    }
    assert_eq!(b.pages.word(0), 0);
}

#[test]
fn what_makes_no_sense_or_is_not_granted_is_refused() {
    let cases: [(Request, Status); 3] = [
        (
            |b| SendOp::AtomicWrite(b.remote(4)),
            Status::RemoteInvalidRequest,
        ),
        (|b| SendOp::AtomicWrite(b.remote(LEN)), Status::RemoteAccess),
        (
            |b| SendOp::FetchAdd {
                remote: b.remote(4),
                add: 1,
            },
            Status::RemoteInvalidRequest,
        ),
    ];
    for (op, status) in cases {
        refused_by_the_peer(op, 8, status);
    }
}

#[test]
fn a_flush_that_makes_no_sense_or_is_not_granted_is_refused() {
    let cases: [(Request, Status); 3] = [
        (
            |b| flush(b.remote(0), true, false),
            Status::RemoteInvalidRequest,
        ),
        (|b| flush(b.remote(LEN), false, true), Status::RemoteAccess),
        // Of a whole region there is no range to check.
        (
            |b| flush_whole(Rkey(b.mr.rkey().0 ^ 1)),
            Status::RemoteAccess,
        ),
    ];
    for (op, status) in cases {
        refused_by_the_peer(op, 0, status);
    }
}

fn flush_whole(rkey: Rkey) -> SendOp {
    SendOp::Flush(Flush {
        remote: Remote { va: 0, rkey },
        len: 0,
        global: true,
        persistent: false,
        whole_region: true,
    })
}

#[test]
fn what_a_region_does_not_grant_is_refused() {
    refused_by_the_region(SendOp::Write);
    refused_by_the_region(SendOp::AtomicWrite);
}

#[test]
fn a_flush_that_a_region_does_not_grant_is_refused() {
    refused_by_the_region(|remote| flush_whole(remote.rkey));
}

/// The queue pair would let the peer do it.
fn refused_by_the_region(op: impl Fn(Remote) -> SendOp) {
    const READ_AND_ADD: AccessFlags = AccessFlags::LOCAL_WRITE
        .with(AccessFlags::REMOTE_READ)
        .with(AccessFlags::REMOTE_ATOMIC);
    let (a, b) = pair(QpType::Rc);
    let pages = Pages::new(4096);
    let region = pages.register(&b.pd, READ_AND_ADD);
    let remote = Remote {
        va: pages.address(),
        rkey: region.rkey(),
    };
    let add = SendOp::FetchAdd { remote, add: 1 };
    for granted in [SendOp::Read(remote), add] {
        a.post(1, granted, &[a.sge(0, 8)]);
        a.succeed();
    }
    a.pages.write(0, &[7; 8]);
    let list = [a.sge(0, 8)];
    let list = match op(remote) {
        SendOp::Flush(_) => &[],
        _ => &list[..],
    };
    a.post(2, op(remote), list);
    assert_eq!(a.next().status, Status::RemoteAccess, "{:?}", op(remote));
    assert_eq!(pages.word(0), 1);
}

#[test]
fn a_flush_for_nothing_is_refused() {
    let nothing: Request = |b| flush(b.remote(0), false, false);
    refused_by_the_peer(nothing, 0, Status::RemoteInvalidRequest);
}

#[test]
fn inline_data_is_taken_when_posting() {
    for kind in [QpType::Rc, QpType::Uc] {
        let (a, b) = pair(kind);
        for round in 0..40usize {
            b.receive(1, &[b.sge(0, 128)]);
            let mut text = bytes(round * 3, round);
            let (head, tail) = text.split_at_mut(round);
            // Neither piece is registered, and both change at once.
            let list = [&*head, &*tail].map(|piece| Sge {
                lkey: Lkey(0xBAD),
                addr: piece.as_ptr() as u64,
                len: piece.len() as u32,
            });
            let wr = SendWr {
                flags: SendFlags::INLINE | SendFlags::SIGNALED,
                ..signalled(2, SendOp::Send, &list)
            };
            a.try_post(wr).unwrap();
            text.fill(0xEE);
            assert_eq!(b.succeed().byte_len as usize, round * 3);
            assert_eq!(b.pages.read(0, round * 3), bytes(round * 3, round));
            a.succeed();
        }
        let long = bytes(129, 1);
        let list = [Sge {
            lkey: Lkey(0),
            addr: long.as_ptr() as u64,
            len: 129,
        }];
        let inline = |op| SendWr {
            flags: SendFlags::INLINE,
            ..signalled(2, op, &list)
        };
        assert_refused(
            a.try_post(inline(SendOp::Send)),
            Error::Limit("inline data"),
        );
    }
}

#[test]
fn an_answer_is_never_inline() {
    let (a, b) = pair(QpType::Rc);
    let list = [a.sge(0, 8)];
    let wr = SendWr {
        flags: SendFlags::INLINE,
        ..signalled(2, SendOp::Read(b.remote(0)), &list)
    };
    assert_refused(a.try_post(wr), Error::Argument(""));
}

#[test]
fn each_inline_request_keeps_its_own_bytes_until_it_is_delivered() {
    let (a, b) = pair(QpType::Rc);
    // A device may give more than it is asked for.
    let depth = u64::from(a.qp.init_attr().cap.max_send_wr);
    assert!(b.qp.init_attr().cap.max_recv_wr as u64 >= depth);
    let post = |seed: u64| {
        let text = seed.to_ne_bytes();
        let list = [Sge {
            lkey: Lkey(0),
            addr: text.as_ptr() as u64,
            len: 8,
        }];
        a.try_post(SendWr {
            flags: match seed % 100 == depth - 1 {
                true => SendFlags::INLINE | SendFlags::SIGNALED,
                false => SendFlags::INLINE,
            },
            ..signalled(seed, SendOp::Send, &list)
        })
    };
    // Nothing is posted at the peer, so all of them are sent again later.
    for round in 0..3u64 {
        let rnr_naks = a.context.counters().rcvd_rnr_err;
        for seed in 0..depth {
            post(100 * round + seed).unwrap();
        }
        assert_eq!(post(99), Err(Error::QueueFull));
        let deadline = Instant::now() + PATIENCE;
        while a.context.counters().rcvd_rnr_err == rnr_naks {
            assert!(Instant::now() < deadline, "it was not sent in vain");
            std::thread::yield_now();
        }
        for seed in 0..depth {
            b.receive(seed, &[b.sge(seed as usize * 8, 8)]);
        }
        for seed in 0..depth {
            assert_eq!(b.succeed().wr_id, seed);
            assert_eq!(b.pages.word(seed as usize * 8), 100 * round + seed);
        }
        assert_eq!(a.succeed().wr_id, 100 * round + depth - 1);
    }
}

#[test]
fn unsignalled_requests_complete_in_silence_and_failures_never_do() {
    let (a, b) = pair(QpType::Rc);
    for round in 0..100u64 {
        let list = [a.sge(0, 8)];
        let wr = SendWr {
            flags: if round % 10 == 9 {
                SendFlags::SIGNALED
            } else {
                SendFlags::NONE
            },
            ..signalled(round, SendOp::Write(b.remote(0)), &list)
        };
        a.try_post(wr).unwrap();
        if round % 10 == 9 {
            assert_eq!(a.succeed().wr_id, round);
        }
    }
    let list = [a.sge(0, 8)];
    let wr = SendWr {
        flags: SendFlags::NONE,
        ..signalled(1000, SendOp::Write(b.remote(LEN)), &list)
    };
    a.try_post(wr).unwrap();
    let failed = a.next();
    assert_eq!((failed.wr_id, failed.status), (1000, Status::RemoteAccess));
}

#[test]
fn a_fence_waits_for_reads() {
    let (a, b) = pair(QpType::Rc);
    b.pages.write(0, &bytes(200_000, 3));
    // The SEND's payload is what the READ brings. A short one leaves at once if it may, a long one may
    // have to wait for the READ's answers anyway.
    for len in [4000, 200_000].repeat(5) {
        a.pages.write(0, &vec![0; len]);
        let list = [a.sge(0, len as u32)];
        b.receive(1, &[b.sge(300_000, len as u32)]);
        a.post(2, SendOp::Read(b.remote(0)), &list);
        let wr = SendWr {
            flags: SendFlags::FENCE | SendFlags::SIGNALED,
            ..signalled(3, SendOp::Send, &list)
        };
        a.try_post(wr).unwrap();
        assert_eq!((a.succeed().wr_id, a.succeed().wr_id), (2, 3));
        b.succeed();
        assert!(b.pages.read(300_000, len) == bytes(200_000, 3)[..len]);
    }
}

#[test]
fn a_queue_pair_talks_to_itself_and_to_another_of_its_device() {
    for kind in [QpType::Rc, QpType::Uc] {
        let context = Context::open(common::address(), &options()).unwrap();
        let alone = end_on(context.clone(), kind, None);
        alone.connect(&context, alone.qp.qpn());
        let (a, b) = (
            end_on(context.clone(), kind, None),
            end_on(context, kind, None),
        );
        a.connect(&b.context, b.qp.qpn());
        b.connect(&a.context, a.qp.qpn());
        for (from, onto) in [(&alone, &alone), (&a, &b), (&b, &a)] {
            let text = bytes(10_000, 9);
            from.pages.write(0, &text);
            onto.receive(1, &[onto.sge(500_000, 10_000)]);
            from.post(2, SendOp::Send, &[from.sge(0, 10_000)]);
            let mut ids = [from.succeed().wr_id, onto.succeed().wr_id];
            ids.sort_unstable();
            assert_eq!(ids, [1, 2]);
            assert_eq!(onto.pages.read(500_000, 10_000), text);
            if kind == QpType::Rc {
                from.post(
                    3,
                    SendOp::Read(onto.remote(500_000)),
                    &[from.sge(700_000, 10_000)],
                );
                from.succeed();
                assert_eq!(from.pages.read(700_000, 10_000), text);
            }
        }
    }
}

#[test]
fn a_list_is_taken_up_to_the_bad_request() {
    let (a, b) = pair(QpType::Uc);
    let list = [a.sge(0, 8)];
    let good = signalled(1, SendOp::Write(b.remote(0)), &list);
    let many = [a.sge(0, 1); 33];
    let bad = signalled(2, SendOp::Send, &many);
    // SAFETY: the pages are only copied.
    let refused = unsafe { a.qp.post_send(&[good, good, bad, good]) }.unwrap_err();
    assert_eq!(refused.index, 2);
    assert_eq!((a.succeed().wr_id, a.succeed().wr_id), (1, 1));
    assert!(matches!(refused.error, Error::Limit(_)));
    let one_more = &many[..a.qp.init_attr().cap.max_send_sge as usize + 1];
    let refused = a.try_post(signalled(1, SendOp::Send, one_more));
    assert_refused(refused, Error::Limit(""));
}

#[test]
fn an_unreliable_connection_asks_for_nothing() {
    let (a, b) = pair(QpType::Uc);
    let list = [a.sge(0, 8)];
    let refused = a.try_post(signalled(2, SendOp::Read(b.remote(0)), &list));
    assert_refused(refused, Error::Argument(""));
}
