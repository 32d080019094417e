//! Registered memory that its owner unmaps. (Where registering pins pages, nothing happens then.)

use std::sync::atomic::AtomicBool;

use super::*;

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
fn memory_may_come_later_and_is_never_persistent() {
    let context = Context::open(common::address(), &options()).unwrap();
    let pd = context.protection_domain();
    let pages = Pages::new(64 << 10);
    let (at, len) = (pages.address(), pages.len as u64);
    drop(pages);
    let register = |flags| {
        // SAFETY: nobody uses the region.
        unsafe { pd.register(at, len, at, flags) }.map(drop)
    };
    assert_eq!(register(ALL | AccessFlags::ON_DEMAND), Ok(()));
    let refused = register(ALL | AccessFlags::FLUSH_PERSISTENT);
    assert_eq!(refused, Err(Error::Unsupported("persistent memory")));
}

/// Flags that let a device do less, or tell it what it can find out: memory is used as with none.
#[test]
fn flags_that_are_hints_are_taken() {
    let (a, b) = pair(QpType::Rc);
    for hint in [AccessFlags::RELAXED_ORDERING, AccessFlags::HUGETLB] {
        let pages = Pages::new(64 << 10);
        let region = pages.register(&b.pd, ALL | hint);
        let remote = Remote {
            va: pages.address(),
            rkey: region.rkey(),
        };
        let text = bytes(50_000, 1);
        a.pages.write(0, &text);
        a.post(1, SendOp::Write(remote), &[a.sge(0, 50_000)]);
        a.succeed();
        assert_eq!(pages.read(0, 50_000), text);
        a.post(2, SendOp::Read(remote), &[a.sge(100_000, 50_000)]);
        a.succeed();
        assert_eq!(a.pages.read(100_000, 50_000), text);
    }
}
