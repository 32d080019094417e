//! Building one engine operation: checks and updates bring their own locks, and locks that
//! overlap are merged, so that a request is covered by construction and asks for each lock once.

use std::cmp::Ordering;

use lowtide_engine_core::ids::NodeId;
use lowtide_engine_core::op::{
    Bytes, Change, Check, Expect, Key, Mode, Range, Request, Update, Want,
};

/// An operation in the making.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    request: Request,
}

impl Plan {
    /// Demands that an object is absent.
    pub fn absent(&mut self, home: NodeId, key: Key) {
        self.check(home, key, Expect::Absent);
    }

    /// Demands that an object exists.
    pub fn present(&mut self, home: NodeId, key: Key) {
        self.check(home, key, Expect::Present);
    }

    /// Demands that an object has exactly this value.
    pub fn equal(&mut self, home: NodeId, key: Key, value: Bytes) {
        self.check(home, key, Expect::Value(value));
    }

    /// Demands that an object is absent or has this value, as it was read.
    pub fn as_read(&mut self, home: NodeId, key: Key, value: Option<Bytes>) {
        self.check(home, key, value.map_or(Expect::Absent, Expect::Value));
    }

    fn check(&mut self, home: NodeId, key: Key, expect: Expect) {
        self.lock(home, key.range(), Mode::Shared);
        self.request.checks.push(Check { home, key, expect });
    }

    /// Gives an object a value.
    pub fn put(&mut self, home: NodeId, key: Key, value: Bytes) {
        self.lock(home, key.range(), Mode::Exclusive);
        self.update(home, key, Change::Put(value));
    }

    /// Deletes an object.
    pub fn delete(&mut self, home: NodeId, key: Key) {
        self.lock(home, key.range(), Mode::Exclusive);
        self.update(home, key, Change::Delete);
    }

    /// Adds to a count. Takes no lock of its own.
    pub fn add(&mut self, home: NodeId, key: Key, amount: i64) {
        self.update(home, key, Change::Add(crate::layout::count_value(amount)));
    }

    fn update(&mut self, home: NodeId, key: Key, change: Change) {
        self.request.updates.push(Update { home, key, change });
    }

    /// Asks for a lock beyond those that checks and updates bring.
    pub fn lock(&mut self, home: NodeId, range: Range, mode: Mode) {
        self.request.locks.push(Want { home, range, mode });
    }

    /// The finished request.
    pub fn finish(mut self) -> Request {
        self.request.locks = merged(self.request.locks);
        self.request
    }
}

/// The same coverage with no two locks overlapping; an overlap is as exclusive as its stronger
/// half.
fn merged(mut wants: Vec<Want>) -> Vec<Want> {
    let order = |a: &Want, b: &Want| -> Ordering {
        (a.home, a.range.space, a.range.lo).cmp(&(b.home, b.range.space, b.range.lo))
    };
    wants.sort_unstable_by(order);
    let mut out: Vec<Want> = Vec::with_capacity(wants.len());
    for want in wants {
        match out.last_mut() {
            Some(last) if last.home == want.home && last.range.overlaps(&want.range) => {
                last.range.hi = last.range.hi.max(want.range.hi);
                last.mode = last.mode.max(want.mode);
            }
            _ => out.push(want),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn want(home: u32, lo: u64, hi: u64, mode: Mode) -> Want {
        Want {
            home: NodeId(home),
            range: Range { space: 1, lo, hi },
            mode,
        }
    }

    #[test]
    fn overlapping_locks_become_one() {
        let out = merged(vec![
            want(2, 5, 5, Mode::Shared),
            want(1, 4, 9, Mode::Exclusive),
            want(1, 5, 5, Mode::Shared),
            want(1, 1, 3, Mode::Shared),
        ]);
        assert_eq!(
            out,
            vec![
                want(1, 1, 3, Mode::Shared),
                want(1, 4, 9, Mode::Exclusive),
                want(2, 5, 5, Mode::Shared),
            ]
        );
    }

    #[test]
    fn a_check_and_an_update_of_one_object_ask_for_one_exclusive_lock() {
        let mut plan = Plan::default();
        plan.absent(NodeId(1), Key::at(1, 7));
        plan.put(NodeId(1), Key::at(1, 7), Bytes::from(*b"x"));
        assert_eq!(plan.finish().locks, vec![want(1, 7, 7, Mode::Exclusive)]);
    }
}
