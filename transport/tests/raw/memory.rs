//! Memory of the program: what is registered, and what happens when it goes away.

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
    assert_refused(register(at, len, ALL), fault);
    assert_eq!(fault.errno(), libc::EFAULT);
    drop(pages);
    assert_refused(register(at, len, AccessFlags::NONE), fault);
}

#[test]
fn flags_and_ranges_that_make_no_sense_are_not_registered() {
    let context = Context::open(common::address(), &options()).unwrap();
    let pd = context.protection_domain();
    let pages = Pages::new(64 << 10);
    let register = |address, len, flags| {
        // SAFETY: if it succeeds nobody uses the region.
        unsafe { pd.register(address, len, address, flags) }.map(drop)
    };
    let at = pages.address();
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
