//! Memory of the program: what is registered, and what happens when it goes away.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

#[test]
fn only_what_is_there_is_registered() {
    let context = Context::open(common::address(), &options()).unwrap();
    let pd = context.protection_domain();
    let pages = Pages::new(64 << 10);
    let register = |address, len, flags| {
        // SAFETY: if it succeeds nobody uses the region.
        unsafe { pd.register(address, len, address, flags) }.map(drop)
    };
    let (at, len) = (pages.address(), pages.len as u64);
    assert_eq!(register(at, len, ALL), Ok(()));
    assert_eq!(register(at + 1, len - 5, AccessFlags::NONE), Ok(()));
    // SAFETY: the pages are the test's, and nobody has a reference to them.
    unsafe { libc::mprotect(pages.pointer().cast(), pages.len, libc::PROT_READ) };
    assert_eq!(register(at, len, AccessFlags::REMOTE_READ), Ok(()));
    let fault = Error::Fault { addr: at, len };
    assert_eq!(register(at, len, ALL), Err(fault));
    assert_eq!(fault.errno(), libc::EFAULT);
    drop(pages);
    assert_eq!(register(at, len, AccessFlags::NONE), Err(fault));
    assert_eq!(register(at, len, ALL | AccessFlags::ON_DEMAND), Ok(()));
    let silly = [
        (at, 0, AccessFlags::NONE),
        (u64::MAX - 8, 16, AccessFlags::NONE),
        (at, 8, AccessFlags::REMOTE_WRITE),
        (at, 8, AccessFlags::REMOTE_ATOMIC),
        (at, 8, AccessFlags::from_bits(1 << 15)),
    ];
    for (at, len, flags) in silly {
        let refused = register(at, len, flags).unwrap_err();
        assert_eq!(refused.errno(), libc::EINVAL, "{flags:?}");
    }
    let refused = register(at, 8, ALL | AccessFlags::FLUSH_PERSISTENT).unwrap_err();
    assert_eq!(refused, Error::Unsupported("persistent memory"));
}

#[test]
fn memory_that_has_gone_costs_an_error_and_never_the_process() {
    type Attempt = fn(&End, &End, &MemoryRegion, u64) -> (Status, Status);
    let lost_here: Attempt = |a, b, mr, at| {
        let gone = [Sge {
            lkey: mr.lkey(),
            addr: at,
            len: 5000,
        }];
        b.receive(1, &[b.sge(0, 8192)]);
        a.post(2, SendOp::Send, &gone);
        (a.next().status, Status::LocalProtection)
    };
    let read_into: Attempt = |a, b, mr, at| {
        let gone = [Sge {
            lkey: mr.lkey(),
            addr: at,
            len: 5000,
        }];
        a.post(2, SendOp::Read(b.remote(0)), &gone);
        (a.next().status, Status::LocalProtection)
    };
    // The peer's memory is registered at b, so roles are the other way round from here on.
    let write_to: Attempt = |a, b, mr, at| {
        let remote = Remote {
            va: at,
            rkey: mr.rkey(),
        };
        b.post(2, SendOp::Write(remote), &[b.sge(0, 5000)]);
        let _ = a;
        (b.next().status, Status::RemoteAccess)
    };
    let read_from: Attempt = |_, b, mr, at| {
        let remote = Remote {
            va: at,
            rkey: mr.rkey(),
        };
        b.post(2, SendOp::Read(remote), &[b.sge(0, 5000)]);
        (b.next().status, Status::RemoteOperation)
    };
    let add_to: Attempt = |_, b, mr, at| {
        let remote = Remote {
            va: at,
            rkey: mr.rkey(),
        };
        b.post(2, SendOp::FetchAdd { remote, add: 1 }, &[b.sge(0, 8)]);
        (b.next().status, Status::RemoteAccess)
    };
    let receive_into: Attempt = |a, b, mr, at| {
        a.receive(
            1,
            &[Sge {
                lkey: mr.lkey(),
                addr: at,
                len: 8192,
            }],
        );
        b.post(2, SendOp::Send, &[b.sge(0, 5000)]);
        assert_eq!(a.next().status, Status::LocalProtection);
        (b.next().status, Status::RemoteOperation)
    };
    for attempt in [
        lost_here,
        read_into,
        write_to,
        read_from,
        add_to,
        receive_into,
    ] {
        let (a, b) = pair(QpType::Rc);
        let pages = Pages::new(16 << 10);
        let at = pages.address();
        let mr = pages.register(&a.pd, ALL);
        drop(pages);
        let (seen, expected) = attempt(&a, &b, &mr, at);
        assert_eq!(seen, expected);
        // The device lives: another pair on it works.
        let (c, d) = (
            end_in(a.context.clone(), a.pd.clone(), QpType::Rc, None),
            end_in(b.context.clone(), b.pd.clone(), QpType::Rc, None),
        );
        c.connect(&d.context, d.qp.qpn());
        d.connect(&c.context, c.qp.qpn());
        c.post(3, SendOp::Write(d.remote(0)), &[c.sge(0, 5000)]);
        c.succeed();
    }
}

#[test]
fn memory_is_unmapped_under_traffic() {
    // The pages go away while packets of a message are on their way out of them, or into them.
    for round in 0..20u64 {
        let (a, b) = pair(QpType::Rc);
        let (out, into) = (Pages::new(LEN), Pages::new(LEN));
        let (out_at, into_at) = (out.address(), into.address());
        let (out_mr, into_mr) = (out.register(&a.pd, ALL), into.register(&b.pd, ALL));
        let list = [Sge {
            lkey: out_mr.lkey(),
            addr: out_at,
            len: LEN as u32,
        }];
        let remote = Remote {
            va: into_at,
            rkey: into_mr.rkey(),
        };
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let victim = if round % 2 == 0 { out } else { into };
                std::thread::sleep(Duration::from_micros(200 + 150 * round));
                drop(victim);
                is_over.store(true, Ordering::Release);
            });
            loop {
                let op = match round % 4 {
                    0 | 1 => SendOp::Write(remote),
                    _ => SendOp::Read(remote),
                };
                a.post(1, op, &list);
                let status = a.next().status;
                if status != Status::Success {
                    let expected = [
                        Status::LocalProtection,
                        Status::RemoteAccess,
                        Status::RemoteOperation,
                    ];
                    assert!(expected.contains(&status), "{status:?}");
                    break;
                }
            }
        });
        assert!(is_over.load(Ordering::Acquire));
    }
}

#[test]
fn addresses_begin_where_the_owner_says() {
    let (a, b) = pair(QpType::Rc);
    let pages = Pages::new(8192);
    let (at, len) = (pages.address(), 8192);
    // SAFETY: the pages are only copied.
    let zero = unsafe { b.pd.register(at, len, at, ALL | AccessFlags::ZERO_BASED) }.unwrap();
    // SAFETY: as above.
    let high = unsafe { b.pd.register(at, len, 0xFFFF_0000_0000_0000, ALL) }.unwrap();
    for (mr, base) in [(&zero, 0), (&high, 0xFFFF_0000_0000_0000u64)] {
        let text = bytes(5000, base as usize + 3);
        a.pages.write(0, &text);
        let remote = Remote {
            va: base + 1000,
            rkey: mr.rkey(),
        };
        a.post(1, SendOp::Write(remote), &[a.sge(0, 5000)]);
        a.succeed();
        assert_eq!(pages.read(1000, 5000), text);
        // Their owner counts the same way.
        let list = [Sge {
            lkey: mr.lkey(),
            addr: base + 1000,
            len: 5000,
        }];
        a.receive(2, &[a.sge(10_000, 5000)]);
        b.post(3, SendOp::Send, &list);
        a.succeed();
        b.succeed();
        assert_eq!(a.pages.read(10_000, 5000), text);
    }
    let remote = Remote {
        va: at,
        rkey: zero.rkey(),
    };
    a.post(1, SendOp::Write(remote), &[a.sge(0, 8)]);
    assert_eq!(
        a.next().status,
        Status::RemoteAccess,
        "not by its own address"
    );
}

#[test]
fn atomics_of_many_queue_pairs_add_up() {
    let (a, b) = pair(QpType::Rc);
    let (c, d) = (
        end_in(a.context.clone(), a.pd.clone(), QpType::Rc, None),
        end_in(b.context.clone(), b.pd.clone(), QpType::Rc, None),
    );
    c.connect(&d.context, d.qp.qpn());
    d.connect(&c.context, c.qp.qpn());
    let remote = b.remote(0);
    std::thread::scope(|scope| {
        for from in [&a, &c] {
            scope.spawn(move || {
                for _ in 0..300 {
                    let add = SendOp::FetchAdd { remote, add: 1 };
                    from.post(1, add, &[from.sge(0, 8)]);
                    from.succeed();
                }
            });
        }
    });
    assert_eq!(b.pages.word(0), 600);
}
