//! Softroce locks no memory, so it needs no right to: neither the limit for locked memory nor a
//! privilege stands between a program and a region.

use super::*;

/// Kilobytes that this process has locked, and that are pinned for it.
fn locked_kb() -> [u64; 2] {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    ["VmLck:", "VmPin:"].map(|name| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let count = line.and_then(|line| line.split_whitespace().next());
        count.expect("the kernel tells").parse().unwrap()
    })
}

/// What registers memory of every kind, and uses it.
fn write_and_read() {
    let (a, b) = pair(QpType::Rc);
    let slab = b.pd.slab(LEN as u64, ALL).unwrap();
    let remote = Remote {
        va: slab.address(),
        rkey: slab.rkey(),
    };
    let text = bytes(LEN, 5);
    a.pages.write(0, &text);
    for (there, here) in [(b.remote(0), 3), (remote, 5)] {
        a.post(1, SendOp::Write(there), &[a.sge(0, LEN as u32)]);
        a.succeed();
        a.pages.write(0, &vec![here; LEN]);
        a.post(2, SendOp::Read(there), &[a.sge(0, LEN as u32)]);
        a.succeed();
        assert_eq!(a.pages.read(0, LEN), text);
    }
    assert_eq!(locked_kb(), [0, 0]);
}

#[test]
fn no_memory_is_locked_and_none_need_be() {
    // Who may lock everything does not.
    write_and_read();
    // Who may lock nothing need not.
    common::be_as_anybody();
    common::may_lock(0);
    let page = Pages::new(4096);
    // SAFETY: a mapping of that length; locking changes nothing in it.
    let refused = unsafe { libc::mlock(page.pointer().cast(), page.len) };
    assert_eq!(refused, -1, "the limit holds");
    write_and_read();
}
