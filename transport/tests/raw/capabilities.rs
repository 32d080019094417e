//! What a device has not is refused by its name, and what it has is not.

use super::suite::*;
use lowtide_transport::raw::types::*;

/// Refused with the reason that the flags give, or not at all.
fn agrees(has: bool, outcome: Result<(), Error>) {
    match (has, outcome) {
        (true, Ok(())) => {}
        (true, Err(Error::Unsupported(why))) => {
            assert!(why.contains("its library does not know it"), "{why}");
        }
        (false, Err(Error::Unsupported(why))) => {
            assert!(why.contains("no such capability"), "{why}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_a_device_can_do_is_asked_and_not_guessed() {
    let (a, b) = pair(QpType::Rc);
    let can = a.context.capabilities();
    let list = [a.sge(0, 8)];
    let write = signalled(1, SendOp::AtomicWrite(b.remote(0)), &list);
    agrees(can.atomic_write, a.try_post(write));
    let flush = signalled(2, flush(b.remote(0), false, true), &[]);
    agrees(can.flush, a.try_post(flush));
    let one = a.pd.memory_window(MwType::One).map(drop);
    agrees(can.windows_1, one);
    let (at, len) = (a.pages.address(), a.pages.len as u64);
    let flags = AccessFlags::LOCAL_WRITE | AccessFlags::FLUSH_GLOBAL;
    // SAFETY: nobody uses the region. It is the device's own word that is asked for.
    let region =
        unsafe { lowtide_transport::ibv::ProtectionDomain::register(&a.pd, at, len, at, flags) };
    agrees(can.flush, region.map(drop));
    let two = a.pd.memory_window(MwType::Two).map(drop);
    agrees(can.windows_2b, two);
}

#[test]
fn an_unreliable_queue_pair_has_neither_atomic_write_nor_flush() {
    for kind in [QpType::Uc, QpType::Ud] {
        let (a, b) = pair(kind);
        let list = [a.sge(0, 8)];
        let write = signalled(1, SendOp::AtomicWrite(b.remote(0)), &list);
        assert!(matches!(a.try_post(write), Err(Error::Argument(_))));
    }
}
