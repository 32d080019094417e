//! Several threads at one device: who posts or polls waits for none of the others.

use super::*;
use std::thread;

/// Runs `act` while another thread drives the device.
fn beside_one_that_drives(context: &Context, act: impl FnOnce() + Send) {
    let other = end_on(context.clone(), QpType::Rc, None);
    common::beside_one_that_drives(&other.qp, act);
}

#[test]
fn posts_and_polls_do_not_wait_for_who_drives_the_device() {
    let (a, b) = pair(QpType::Rc);
    for id in 0..16 {
        b.receive(id, &[b.sge(id as usize * 64, 64)]);
    }
    a.post(100, SendOp::Send, &[a.sge(0, 1)]);
    assert_eq!(b.succeed().wr_id, 0);
    assert!(a.cq.wait(Instant::now() + PATIENCE));
    let text = bytes(64, 1);
    a.pages.write(0, &text);
    beside_one_that_drives(&a.context, || {
        // What is there is found, and what is not is not waited for.
        let mut done = Vec::new();
        assert_eq!(a.cq.poll(16, &mut done), Ok(1));
        assert_eq!((done[0].wr_id, done[0].status), (100, Status::Success));
        assert_eq!(a.cq.poll(16, &mut done), Ok(0));
        for id in 0..15 {
            let flags = match id % 2 {
                0 => SendFlags::SIGNALED,
                _ => SendFlags::SIGNALED | SendFlags::INLINE,
            };
            let list = [a.sge(id as usize, 4)];
            let wr = signalled(id, SendOp::SendImm(id as u32), &list);
            a.try_post(SendWr { flags, ..wr }).unwrap();
        }
        // Refused at once: what makes no sense, and what finds no room.
        let one = a.sge(0, 1);
        let add = SendOp::FetchAdd {
            remote: b.remote(0),
            add: 1,
        };
        let bad = a.try_post(signalled(50, add, &[one]));
        assert!(matches!(bad, Err(Error::Argument(_))), "{bad:?}");
        let long = a.try_post(signalled(51, SendOp::Send, &[one; 5]));
        assert!(matches!(long, Err(Error::Limit(_))), "{long:?}");
        a.post(15, SendOp::Write(b.remote(8000)), &[one]);
        let full = a.try_post(signalled(52, SendOp::Send, &[one]));
        assert_eq!(full, Err(Error::QueueFull));
        for id in 0..16 {
            a.receive(id, &[a.sge(9000, 1)]);
        }
        let list = [RecvWr {
            wr_id: 16,
            sg_list: &[],
        }];
        // SAFETY: it names no memory.
        let full = unsafe { a.qp.post_recv(&list) };
        let error = Error::QueueFull;
        assert_eq!(full, Err(BadWr { index: 0, error }));
    });
    for id in 0..16 {
        assert_eq!(a.succeed().wr_id, id);
    }
    for id in 0..15 {
        let got = b.succeed();
        assert_eq!((got.wr_id, got.imm), (id + 1, Some(id as u32)));
        let place = (id as usize + 1) * 64;
        assert_eq!(b.pages.read(place, 4), text[id as usize..][..4]);
    }
    b.post(1, SendOp::Send, &[]);
    assert_eq!((a.succeed().wr_id, b.succeed().wr_id), (0, 1));
}

/// Places in the line are used again, and what was inline there is no part of what comes after.
#[test]
fn what_waits_brings_its_own_bytes_in_every_round() {
    const EACH: u64 = 16;
    let (a, b) = pair(QpType::Rc);
    let text = bytes(1000, 5);
    a.pages.write(0, &text);
    for round in 0..3 {
        let from = |id: u64| (round * 100 + id * 4) as usize;
        for id in 0..EACH {
            b.receive(id, &[b.sge(id as usize * 64, 64)]);
        }
        beside_one_that_drives(&a.context, || {
            for id in 0..EACH {
                let flags = match (id + round) % 2 {
                    0 => SendFlags::SIGNALED,
                    _ => SendFlags::SIGNALED | SendFlags::INLINE,
                };
                let list = [a.sge(from(id), 4)];
                let wr = signalled(id, SendOp::Send, &list);
                a.try_post(SendWr { flags, ..wr }).unwrap();
            }
        });
        for id in 0..EACH {
            assert_eq!((a.succeed().wr_id, b.succeed().wr_id), (id, id));
            assert_eq!(b.pages.read(id as usize * 64, 4), text[from(id)..][..4]);
        }
    }
}

#[test]
fn a_shared_queue_is_posted_to_beside_who_drives_the_device() {
    let context = Context::open(common::address(), &options()).unwrap();
    let pd = context.protection_domain();
    let attr = SrqAttr {
        max_wr: 2,
        max_sge: 1,
        limit: 0,
    };
    let srq = pd.shared_receive_queue(attr).unwrap();
    let server = end_in(context.clone(), pd, QpType::Rc, Some(&srq));
    let client = end(QpType::Rc);
    server.connect(&client.context, client.qp.qpn());
    client.connect(&context, server.qp.qpn());
    let post = |wr_id| {
        let list = [server.sge(wr_id as usize * 64, 64)];
        let sg_list = &list[..];
        // SAFETY: the pages are only copied.
        unsafe { srq.post_recv(&[RecvWr { wr_id, sg_list }]) }
    };
    beside_one_that_drives(&context, || {
        assert_eq!((post(0), post(1)), (Ok(()), Ok(())));
        let error = Error::QueueFull;
        assert_eq!(post(2), Err(BadWr { index: 0, error }));
    });
    for id in 0..2 {
        client.post(id, SendOp::Send, &[client.sge(0, 64)]);
        assert_eq!(server.succeed().wr_id, id);
        // What was taken from the queue leaves room at once.
        post(id).unwrap();
    }
}

#[test]
fn what_waits_is_flushed_or_forgotten_as_what_was_posted() {
    let (a, b) = pair(QpType::Rc);
    for target in [QpState::Err, QpState::Reset] {
        thread::scope(|scope| {
            beside_one_that_drives(&a.context, || {
                for id in 0..3 {
                    a.post(id, SendOp::Send, &[a.sge(0, 8)]);
                    a.receive(10 + id, &[]);
                }
                scope.spawn(|| {
                    let attr = attr_to(&b.context, b.qp.qpn());
                    a.qp.modify(&to(attr, target), QpAttrMask::STATE).unwrap();
                });
            });
        });
        // The post of another thread may come before or after the move: in ERR all of them are
        // flushed, in RESET all of them are forgotten.
        let mut done = Vec::new();
        let expected = if target == QpState::Err { 6 } else { 0 };
        while done.len() < expected {
            done.push(a.next());
        }
        let flushed = |work: &WorkCompletion| work.status == Status::Flushed;
        assert!(done.iter().all(flushed), "{done:?}");
        let ids = |is_recv| {
            let of = done.iter().filter(move |w| w.kind.is_recv() == is_recv);
            of.map(|work| work.wr_id).collect::<Vec<_>>()
        };
        let count = expected as u64 / 2;
        assert_eq!(ids(false), (0..count).collect::<Vec<_>>());
        assert_eq!(ids(true), (10..10 + count).collect::<Vec<_>>());
        assert!(a.is_silent());
    }
    // All room has been given back.
    a.to_init();
    for id in 0..16 {
        a.receive(id, &[]);
    }
}
