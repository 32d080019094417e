//! Memory windows and invalidation.

use lowtide_transport_proto::qp::Access;

use super::*;

fn bind_of(end: &End, offset: usize, len: u64) -> Bind {
    Bind {
        window: Rkey(0),
        rkey: Rkey(0),
        region: end.mr.lkey(),
        addr: end.pages.address() + offset as u64,
        len,
        access: Access {
            remote_read: true,
            remote_write: true,
            ..Access::NONE
        },
        zero_based: false,
    }
}

/// Binds a type 2 window of `end` to part of its region, by a work request.
fn bind(end: &End, window: &mut provider::MemoryWindow, bind: Bind) -> Status {
    let rkey = window.next_rkey();
    let bind = Bind {
        window: window.rkey(),
        rkey,
        ..bind
    };
    end.post(77, SendOp::BindWindow(bind), &[]);
    let work = end.next();
    if work.status == Status::Success {
        assert_eq!((work.wr_id, work.kind), (77, CompletionKind::BindWindow));
        window.set_rkey(rkey);
    }
    work.status
}

#[test]
fn a_window_opens_part_of_a_region_until_it_is_closed() {
    let (a, b) = pair(QpType::Rc);
    let mut window = b.pd.memory_window(MwType::Two).unwrap();
    assert_eq!(
        bind(&b, &mut window, bind_of(&b, 1000, 500)),
        Status::Success
    );
    let at = |offset: usize| Remote {
        rkey: window.rkey(),
        ..b.remote(offset)
    };
    a.pages.write(0, &bytes(500, 4));
    a.post(1, SendOp::Write(at(1000)), &[a.sge(0, 500)]);
    a.succeed();
    assert_eq!(b.pages.read(1000, 500), bytes(500, 4));
    a.post(2, SendOp::Read(at(1100)), &[a.sge(5000, 400)]);
    a.succeed();
    assert_eq!(a.pages.read(5000, 400), bytes(500, 4)[100..]);
    // Closed by its owner.
    let rkey = window.rkey();
    b.post(3, SendOp::LocalInvalidate(rkey), &[]);
    assert_eq!(b.succeed().kind, CompletionKind::LocalInvalidate);
    a.post(4, SendOp::Read(at(1000)), &[a.sge(5000, 400)]);
    assert_eq!(a.next().status, Status::RemoteAccess);
}

#[test]
fn a_peer_closes_a_window_with_a_message() {
    let (a, b) = pair(QpType::Rc);
    let mut window = b.pd.memory_window(MwType::Two).unwrap();
    for len in [10u32, 3000] {
        assert_eq!(bind(&b, &mut window, bind_of(&b, 0, 500)), Status::Success);
        let rkey = window.rkey();
        b.receive(1, &[b.sge(10_000, 4000)]);
        a.post(2, SendOp::SendInvalidate(rkey), &[a.sge(0, len)]);
        let got = b.succeed();
        let flags = got.flags.without(provider::FLAGS_OF_ANY_RECEIVE);
        assert_eq!((got.invalidated, flags), (Some(rkey), WcFlags::WITH_INV));
        a.succeed();
    }
}

#[test]
fn a_window_is_closed_once() {
    let (a, b) = pair(QpType::Rc);
    let mut window = b.pd.memory_window(MwType::Two).unwrap();
    assert_eq!(bind(&b, &mut window, bind_of(&b, 0, 500)), Status::Success);
    let close = SendOp::SendInvalidate(window.rkey());
    b.receive(0, &[]);
    a.post(1, close, &[]);
    a.succeed();
    b.succeed();
    b.receive(1, &[]);
    a.post(2, close, &[]);
    assert_eq!(a.next().status, Status::RemoteAccess);
    assert_ne!(b.next().status, Status::Success);
}

#[test]
fn a_plain_region_is_not_the_peers_to_close() {
    let (a, b) = pair(QpType::Rc);
    b.receive(1, &[]);
    a.post(2, SendOp::SendInvalidate(b.mr.rkey()), &[]);
    assert_eq!(a.next().status, Status::RemoteAccess);
}

#[test]
fn binding_keeps_the_rules() {
    let zero_based = |b: &End| {
        let (at, len) = (b.pages.address(), b.pages.len as u64);
        let flags = ALL | AccessFlags::MW_BIND | AccessFlags::ZERO_BASED;
        // SAFETY: the pages are only copied.
        unsafe { b.pd.register(at, len, 0, flags) }.unwrap()
    };
    // rxe sees no difference between such a region and one that was registered at address 0.
    let cases = [0, 1, 3, 2];
    for case in &cases[..if provider::HAS_WORDS { 4 } else { 3 }] {
        let (_a, b) = pair(QpType::Rc);
        let mut window = b.pd.memory_window(MwType::Two).unwrap();
        let closed = b.pages.register(&b.pd, ALL);
        let zero = zero_based(&b);
        let good = bind_of(&b, 0, 100);
        let bad = match *case {
            0 => Bind {
                region: closed.lkey(),
                ..good
            },
            1 => Bind {
                addr: good.addr + LEN as u64,
                ..good
            },
            2 => Bind {
                region: zero.lkey(),
                addr: 0,
                ..good
            },
            _ => Bind { len: 0, ..good },
        };
        assert_eq!(
            bind(&b, &mut window, bad),
            Status::WindowBind,
            "case {case}"
        );
        assert_eq!(b.qp.query().state, QpState::Err);
    }
}

#[test]
fn a_region_stays_while_windows_are_bound_to_it() {
    let (_a, b) = pair(QpType::Rc);
    let mut window = b.pd.memory_window(MwType::Two).unwrap();
    assert_eq!(bind(&b, &mut window, bind_of(&b, 0, 100)), Status::Success);
    let (error, mr) = b.mr.deregister().unwrap_err();
    match provider::HAS_WORDS {
        true => assert_eq!(error, Error::Busy("memory windows")),
        false => assert!([libc::EBUSY, libc::EINVAL].contains(&error.errno())),
    }
    drop(window);
    assert!(mr.deregister().is_ok());
}

#[test]
fn a_window_is_for_the_connection_that_bound_it() {
    let (a, b) = pair(QpType::Rc);
    let (c, d) = (
        end_in(a.context.clone(), a.pd.clone(), QpType::Rc, None),
        end_in(b.context.clone(), b.pd.clone(), QpType::Rc, None),
    );
    c.connect(&d.context, d.qp.qpn());
    d.connect(&c.context, c.qp.qpn());
    let mut window = b.pd.memory_window(MwType::Two).unwrap();
    assert_eq!(bind(&b, &mut window, bind_of(&b, 0, 100)), Status::Success);
    let remote = Remote {
        rkey: window.rkey(),
        ..b.remote(0)
    };
    a.post(1, SendOp::Write(remote), &[a.sge(0, 8)]);
    a.succeed();
    c.post(1, SendOp::Write(remote), &[c.sge(0, 8)]);
    assert_eq!(c.next().status, Status::RemoteAccess);
}

#[test]
fn a_type_1_window_moves_and_is_for_the_whole_domain() {
    type_1(false);
}

#[test]
fn a_type_1_window_may_count_from_zero() {
    type_1(true);
}

fn type_1(zero_based: bool) {
    let (a, b) = pair(QpType::Rc);
    let (c, d) = (
        end_in(a.context.clone(), a.pd.clone(), QpType::Rc, None),
        end_in(b.context.clone(), b.pd.clone(), QpType::Rc, None),
    );
    c.connect(&d.context, d.qp.qpn());
    d.connect(&c.context, c.qp.qpn());
    let mut window = b.pd.memory_window(MwType::One).unwrap();
    for offset in [0, 5000] {
        let place = Bind {
            zero_based,
            ..bind_of(&b, offset, 100)
        };
        // SAFETY: the pages are only copied.
        unsafe { window.bind(&b.qp, 5, place, SendFlags::SIGNALED) }.unwrap();
        assert_eq!(b.succeed().wr_id, 5);
        let base = if zero_based { 0 } else { place.addr };
        let remote = Remote {
            va: base + 10,
            rkey: window.rkey(),
        };
        for (from, text) in [(&a, [1; 8]), (&c, [2; 8])] {
            from.pages.write(0, &text);
            from.post(1, SendOp::Write(remote), &[from.sge(0, 8)]);
            from.succeed();
            assert_eq!(b.pages.read(offset + 10, 8), text);
        }
    }
    let mut other = b.pd.memory_window(MwType::Two).unwrap();
    // SAFETY: as above.
    let refused = unsafe { other.bind(&b.qp, 5, bind_of(&b, 0, 8), SendFlags::SIGNALED) };
    assert!(matches!(refused, Err(Error::Argument(_))));
}

#[test]
fn what_is_bound_is_there_before_the_message_that_tells_of_it() {
    let (a, b) = pair(QpType::Rc);
    let mut window = b.pd.memory_window(MwType::Two).unwrap();
    let rkey = window.next_rkey();
    let place = Bind {
        window: window.rkey(),
        rkey,
        ..bind_of(&b, 0, 100)
    };
    a.receive(1, &[a.sge(0, 8)]);
    let sends = [b.sge(0, 8)];
    let list = [
        signalled(1, SendOp::Write(a.remote(64)), &sends),
        SendWr {
            flags: SendFlags::NONE,
            ..signalled(2, SendOp::BindWindow(place), &[])
        },
        signalled(3, SendOp::Send, &sends),
    ];
    // SAFETY: the pages are only copied.
    unsafe { b.qp.post_send(&list) }.unwrap();
    window.set_rkey(rkey);
    a.succeed();
    let remote = Remote {
        rkey,
        ..b.remote(0)
    };
    a.post(4, SendOp::Write(remote), &[a.sge(0, 8)]);
    a.succeed();
    assert_eq!((b.succeed().wr_id, b.succeed().wr_id), (1, 3));
}
