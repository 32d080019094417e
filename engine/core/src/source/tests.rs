use super::*;
use crate::effect::Effect;
use crate::ids::Incarnation;
use crate::op::Change;

const HOME: NodeId = NodeId(3);
const PROXY: NodeId = NodeId(2);

fn life() -> Life {
    Life {
        node: NodeId(1),
        incarnation: Incarnation(1),
    }
}

/// Positions of the parts that a flush sends through `hop`.
fn flushed(outbox: &mut Outbox, port: &mut Port, hop: NodeId) -> Vec<u64> {
    outbox.flush(port, hop, Seq(0), |_, _| true);
    let mut sent = Vec::new();
    while let Some(effect) = port.poll() {
        let Effect::Send { envelope, .. } = effect else {
            continue;
        };
        if let Message::Reint { parts, .. } = envelope.body {
            sent.extend(parts.iter().filter_map(|p| Some(p.op.at(HOME)?.0)));
        }
    }
    sent
}

fn told(executed: u64, committed: u64) -> StreamState {
    StreamState {
        source: life(),
        home: HOME,
        executed: StreamSeq(executed),
        committed: StreamSeq(committed),
    }
}

#[test]
fn what_is_sent_again_counts_as_on_its_way_until_it_lands_again() {
    let mut port = Port::new(life(), NodeId(1), Epoch(1));
    let (mut outbox, mut redo) = (Outbox::default(), Redo::new());
    outbox.open(life(), HOME, StreamSeq(1));
    let value: crate::op::Bytes = alloc::vec![7u8; IN_FLIGHT_BYTES / 2].into();
    for slot in 0..6 {
        let update = Update {
            home: HOME,
            key: Key::at(1, slot),
            change: Change::Put(value.clone()),
        };
        outbox.push(HOME, redo.stamp(life(), Epoch(1), alloc::vec![update]));
    }
    assert_eq!(flushed(&mut outbox, &mut port, PROXY), [0u64; 0]);
    outbox.progress(PROXY, &told(0, 0), false);
    assert_eq!(flushed(&mut outbox, &mut port, PROXY), [1, 2]);
    outbox.progress(PROXY, &told(2, 0), false);
    assert_eq!(flushed(&mut outbox, &mut port, PROXY), [3, 4]);
    outbox.progress(PROXY, &told(4, 0), false);

    // The proxy dies with all of it; the home has nothing.
    outbox.closed(|_, _| true);
    flushed(&mut outbox, &mut port, HOME);
    outbox.progress(HOME, &told(0, 0), false);
    assert_eq!(flushed(&mut outbox, &mut port, HOME), [1, 2]);
    assert_eq!(
        flushed(&mut outbox, &mut port, HOME),
        [0u64; 0],
        "room for two"
    );
    outbox.progress(HOME, &told(2, 2), false);
    assert_eq!(flushed(&mut outbox, &mut port, HOME), [3, 4]);
    outbox.progress(HOME, &told(4, 2), false);
    assert_eq!(flushed(&mut outbox, &mut port, HOME), [5, 6]);
}
