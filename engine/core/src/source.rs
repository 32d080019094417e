//! The redo half of every node that issues or forwards operations: streams, windows, redo.
//!
//! - A *stream* is the sequence of one source life's parts for one home, numbered without gaps.
//!   Whoever forwards it keeps the numbers, so duplicates and reordering over several paths are
//!   harmless: a home executes position n + 1 after n, whoever brings it (trap T3).
//! - A *window* is the parts of one epoch for one home (seed 000). An operation's parts carry one
//!   epoch, so no operation straddles two windows of different epochs; windows are sent in
//!   batches. A window is discarded when m exceeds its epoch (W1): commit by its own home is not
//!   enough, because the operation's other half may still be undone.
//! - The *redo* of a first source decides what is everywhere committed and yields its lower bound.
//!
//! Invariants: I3 (one epoch per operation), I11 (an unfinished operation is covered by its
//! source's bound), I14 (a discarded window is never asked for again), W1.
//!
//! Payloads: a part heavier than [`BULK_WEIGHT`] is dropped once its home has committed it (its
//! extent is durable there); the skeleton stays until the window may go.

mod redo;

use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;

pub use redo::Redo;

use crate::effect::Port;
use crate::ids::{Epoch, Life, NodeId, OpId, Seq, StreamSeq};
use crate::message::{Message, Parts, StreamBase, StreamState};
use crate::op::{Key, Operation, Range, Update};
use crate::teeth::{Tooth, bites};

/// Parts at least this heavy release their payload at commit instead of at stability, in bytes.
pub const BULK_WEIGHT: usize = 64 << 10;
/// Updates for homes on other paths that go along with a part, at most, in bytes: enough for names
/// and attributes, so that whoever holds one part of such an operation can supply the others.
pub const CARRY_BYTES: usize = 4 << 10;
/// Most bytes of one batch, unless a single part is larger.
pub const BATCH_BYTES: usize = 256 << 10;
/// Most parts of one batch.
pub const BATCH_PARTS: usize = 1024;
/// Most bytes sent to one tier above and not yet executed there.
pub const IN_FLIGHT_BYTES: usize = 4 << 20;

/// One stream as its sender keeps it.
#[derive(Debug)]
struct Stream {
    /// Position of the first entry of `parts`.
    base: StreamSeq,
    /// Parts from `base` on; kept until m passes them.
    parts: VecDeque<Arc<Operation>>,
    /// The next tier knows the stream on this connection and said how far it is.
    ready: bool,
    /// Tier above that it was announced to on this connection.
    announced: Option<NodeId>,
    /// Last position handed to the transport on this connection.
    sent: StreamSeq,
    /// Last position that the tier above has, or was told not to wait for, on this connection.
    told: StreamSeq,
    executed: StreamSeq,
    committed: StreamSeq,
    /// Last position that is no longer counted in `flying`. Not `executed`: what a tier of an
    /// earlier connection had executed may be on its way again.
    landed: StreamSeq,
    /// Bytes sent on this connection and not executed yet.
    flying: usize,
}

/// Figures about windows, as the report prints them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WindowCounters {
    /// Windows of which at least one part was sent.
    pub sent: u64,
    /// Windows let go because m passed them.
    pub discarded: u64,
    /// Most windows held at one time.
    pub held_max: u64,
    /// Parts sent again after a reconnect.
    pub replayed: u64,
    /// Parts let go before m passed them, under memory pressure.
    pub early: u64,
}

/// Streams of one node towards the tiers above it.
#[derive(Debug, Default)]
pub struct Outbox {
    streams: BTreeMap<(Life, NodeId), Stream>,
    /// Held windows: parts kept per (home, epoch), and whether a part was sent.
    windows: BTreeMap<(NodeId, Epoch), (usize, bool)>,
    bytes: usize,
    counters: WindowCounters,
}

impl Outbox {
    /// Makes the stream known locally; a known one keeps its state. If it ends before `base`, what
    /// lies between was committed over another path and will not come.
    pub fn open(&mut self, source: Life, home: NodeId, base: StreamSeq) {
        let before = StreamSeq(base.0 - 1);
        let last = self.streams.get(&(source, home)).map(Stream::last);
        if last.is_some_and(|last| last < before) {
            self.forget_stream((source, home));
        }
        self.streams
            .entry((source, home))
            .or_insert_with(|| Stream {
                base,
                parts: VecDeque::new(),
                ready: false,
                announced: None,
                sent: before,
                told: before,
                executed: before,
                committed: before,
                landed: before,
                flying: 0,
            });
    }

    /// Last position accepted into a stream; `None` when the stream is not known.
    #[must_use]
    pub fn last(&self, source: Life, home: NodeId) -> Option<StreamSeq> {
        self.streams.get(&(source, home)).map(Stream::last)
    }

    /// Appends the next part of a known stream. Its position must be the one after
    /// [`Outbox::last`].
    pub fn push(&mut self, home: NodeId, op: Arc<Operation>) {
        let stream = self
            .streams
            .get_mut(&(op.id.source, home))
            .expect("a stream is opened before its first part");
        assert_eq!(
            op.at(home),
            Some(StreamSeq(stream.last().0 + 1)),
            "streams have no gaps"
        );
        self.bytes += op.weight();
        self.windows.entry((home, op.epoch)).or_default().0 += 1;
        self.counters.held_max = self.counters.held_max.max(self.windows.len() as u64);
        stream.parts.push_back(op);
    }

    /// State of a stream as known here.
    #[must_use]
    pub fn state(&self, source: Life, home: NodeId) -> Option<StreamState> {
        let s = self.streams.get(&(source, home))?;
        Some(StreamState {
            source,
            home,
            executed: s.executed,
            committed: s.committed,
        })
    }

    /// Progress of a stream as `from` tells it. Returns whether anything became committed. `keep`:
    /// payloads stay although their home has them.
    pub fn progress(&mut self, from: NodeId, state: &StreamState, keep: bool) -> bool {
        let Some(s) = self.streams.get_mut(&(state.source, state.home)) else {
            return false;
        };
        if !s.ready && s.announced == Some(from) {
            // First word on this connection: everything not executed there is sent (again). A
            // tier that the stream went through before may still speak; it knows of commits only.
            s.ready = true;
            if s.sent > state.executed {
                self.counters.replayed += s.sent.0 - state.executed.0;
            }
            s.sent = state.executed.max(s.base.before()).min(s.last());
            s.told = s.told.max(state.executed);
            s.landed = s.sent;
            s.flying = 0;
        }
        let landed = state.executed.max(state.committed).min(s.sent);
        while s.landed < landed {
            s.landed = StreamSeq(s.landed.0 + 1);
            let weight = s.part(s.landed).map_or(0, |op| op.weight());
            s.flying = s.flying.saturating_sub(weight);
        }
        s.executed = s.executed.max(state.executed).min(s.last());
        let committed = state.committed.min(s.last());
        if committed <= s.committed {
            return false;
        }
        for at in s.committed.0 + 1..=committed.0 {
            let Some(index) = at.checked_sub(s.base.0) else {
                continue;
            };
            let part = &mut s.parts[index as usize];
            if part.weight() >= BULK_WEIGHT && !keep {
                self.bytes -= part.weight();
                *part = Arc::new(Operation {
                    updates: Vec::new(),
                    ..Operation::clone(part)
                });
                self.bytes += part.weight();
            }
        }
        s.committed = committed;
        true
    }

    /// The connection behind the streams that `through` selects broke, or they take another path
    /// now: whatever was sent may be lost.
    pub fn closed(&mut self, through: impl Fn(Life, NodeId) -> bool) {
        for ((source, home), s) in &mut self.streams {
            if through(*source, *home) {
                s.ready = false;
                s.announced = None;
                s.flying = 0;
            }
        }
    }

    /// Announces and sends what may be sent to the homes reached through `hop`.
    /// `done` is what the redo of this node says of its own operations.
    pub fn flush(
        &mut self,
        port: &mut Port,
        hop: NodeId,
        done: Seq,
        through: impl Fn(Life, NodeId) -> bool,
    ) {
        let mut in_flight = 0;
        for ((source, home), s) in &self.streams {
            if through(*source, *home) && s.ready {
                in_flight += s.flying;
            }
        }
        for (&(source, home), s) in &mut self.streams {
            if through(source, home) {
                s.announce(source, home, hop, port);
            }
        }
        let due = self.streams.iter();
        let due = due.filter(|&(&(source, home), s)| s.is_due() && through(source, home));
        let mut sources: Vec<Life> = due.map(|((source, _), _)| *source).collect();
        sources.dedup();
        let mut batch = Batch::default();
        let epoch = port.epoch();
        for source in sources {
            while in_flight < IN_FLIGHT_BYTES {
                let Some(parts) = self.take_parts(source, &through, &mut in_flight, epoch) else {
                    break;
                };
                batch.push(parts, |parts| {
                    port.send(hop, Message::Reint { done, parts })
                });
            }
        }
        if !batch.parts.is_empty() {
            let parts = batch.parts;
            port.send(hop, Message::Reint { done, parts });
        }
    }

    /// The next operation of `source` on a path, for all homes whose streams have come to it.
    fn take_parts(
        &mut self,
        source: Life,
        through: impl Fn(Life, NodeId) -> bool,
        in_flight: &mut usize,
        epoch: Epoch,
    ) -> Option<Parts> {
        let of_source = (source, NodeId(0))..=(source, NodeId(u32::MAX));
        let due = self.streams.range(of_source.clone());
        let due = due.filter(|&(&(_, home), s)| s.is_due() && through(source, home));
        let seq = due.filter_map(|(_, s)| Some(s.next()?.id.seq)).min()?;
        let mut op: Option<Arc<Operation>> = None;
        let mut homes = Vec::new();
        for (&(_, home), s) in self.streams.range_mut(of_source) {
            let is_next = s.is_due() && through(source, home);
            let Some(next) = s.next().filter(|op| is_next && op.id.seq == seq).cloned() else {
                continue;
            };
            s.sent = StreamSeq(s.sent.0 + 1);
            s.told = s.sent;
            s.flying += next.weight();
            *in_flight += next.weight();
            if let Some(window) = self.windows.get_mut(&(home, next.epoch)) {
                self.counters.sent += u64::from(!window.1);
                window.1 = true;
            }
            homes.push(home);
            op = op.or(Some(next));
        }
        let mut op = op?.sent_to(|home| through(source, home), CARRY_BYTES);
        if bites(Tooth::ResendRetagged) {
            Arc::make_mut(&mut op).epoch = epoch;
        }
        Some(Parts { homes, op })
    }

    /// Discards every window below `minimum` (rule b.5: m > e).
    pub fn purge(&mut self, minimum: Epoch) {
        let Outbox {
            streams,
            windows,
            counters,
            bytes,
            ..
        } = self;
        for ((_, home), s) in streams.iter_mut() {
            let past =
                |op: &Arc<Operation>| op.epoch < minimum || bites(Tooth::DiscardedOnOwnCommit);
            while s.parts.front().is_some_and(past) && s.base <= s.committed {
                discard_front(*home, s, windows, counters, bytes);
            }
        }
    }

    /// Under memory pressure: discards committed parts of `source` up to `through`, an operation
    /// whose whole dependency closure is everywhere committed (rule b.5, second form). With
    /// `commit_on_share` that closure is the source's own earlier operations. A resolver does not
    /// need them: every home lists what it committed as long as m has not passed it.
    pub fn discard_early(&mut self, source: Life, through: Seq) {
        let Outbox {
            streams,
            windows,
            counters,
            bytes,
            ..
        } = self;
        for ((life, home), s) in streams.iter_mut() {
            while *life == source
                && s.base <= s.committed
                && s.parts
                    .front()
                    .is_some_and(|op| op.id.seq <= through || bites(Tooth::PressedDiscardsAll))
            {
                discard_front(*home, s, windows, counters, bytes);
                counters.early += 1;
            }
        }
    }

    /// Whether every part of an operation is held, for invariant checks.
    #[must_use]
    pub fn holds(&self, op: &Operation) -> bool {
        op.participants.iter().all(|p| {
            let stream = self.streams.get(&(op.id.source, p.node));
            stream.is_some_and(|s| s.part(p.at).is_some_and(|held| held.id == op.id))
        })
    }

    /// Forgets every stream of a life that is GONE.
    pub fn forget(&mut self, source: Life) {
        let gone: Vec<_> = self
            .streams
            .keys()
            .filter(|k| k.0 == source)
            .copied()
            .collect();
        for key in gone {
            self.forget_stream(key);
        }
    }

    fn forget_stream(&mut self, key: (Life, NodeId)) {
        let Some(mut s) = self.streams.remove(&key) else {
            return;
        };
        while !s.parts.is_empty() {
            discard_front(
                key.1,
                &mut s,
                &mut self.windows,
                &mut self.counters,
                &mut self.bytes,
            );
        }
    }

    /// Operations of `source` that are held, ascending by seq, each with all updates that any of
    /// its parts here has.
    #[must_use]
    pub fn held_of(&self, source: Life) -> Vec<Arc<Operation>> {
        let mut held: BTreeMap<OpId, Arc<Operation>> = BTreeMap::new();
        for (_, s) in self.streams.iter().filter(|((life, _), _)| *life == source) {
            for op in &s.parts {
                let whole = held.entry(op.id).or_insert_with(|| op.clone());
                let has = |home: NodeId| whole.updates_for(home).next().is_some();
                let more: Vec<Update> = op
                    .updates
                    .iter()
                    .filter(|u| !has(u.home))
                    .cloned()
                    .collect();
                if !more.is_empty() {
                    Arc::make_mut(whole).updates.extend(more);
                }
            }
        }
        held.into_values().collect()
    }

    /// Lower bound over the held, uncommitted operations that `source` stamped.
    #[must_use]
    pub fn bound_of(&self, source: Life) -> Option<Epoch> {
        self.streams
            .iter()
            .filter(|((life, _), _)| *life == source)
            .filter_map(|(_, s)| {
                let index = (s.committed.0 + 1).checked_sub(s.base.0)? as usize;
                s.parts.get(index).map(|op| op.epoch)
            })
            .min()
    }

    /// Objects in `range` at `home` that held, uncommitted parts write.
    pub fn touched_in<'a>(
        &'a self,
        home: NodeId,
        range: &'a Range,
    ) -> impl Iterator<Item = &'a Key> {
        let streams = self.streams.iter().filter(move |((_, h), _)| *h == home);
        let parts = streams.flat_map(|(_, s)| {
            let skip = (s.committed.0 + 1).saturating_sub(s.base.0) as usize;
            s.parts.iter().skip(skip)
        });
        parts
            .flat_map(move |op| op.updates_for(home))
            .map(|u| &u.key)
            .filter(|key| range.holds(key))
    }

    /// Whether nothing of `source` is uncommitted.
    #[must_use]
    pub fn is_settled(&self, source: Life) -> bool {
        self.bound_of(source).is_none()
    }

    /// Bytes of parts held, each stream's copy counted.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Windows held now.
    #[must_use]
    pub fn windows_held(&self) -> usize {
        self.windows.len()
    }

    /// Figures so far.
    #[must_use]
    pub fn counters(&self) -> WindowCounters {
        self.counters
    }
}

fn discard_front(
    home: NodeId,
    s: &mut Stream,
    windows: &mut BTreeMap<(NodeId, Epoch), (usize, bool)>,
    counters: &mut WindowCounters,
    bytes: &mut usize,
) {
    let Some(op) = s.parts.pop_front() else {
        return;
    };
    s.base = StreamSeq(s.base.0 + 1);
    *bytes -= op.weight();
    if let Some(window) = windows.get_mut(&(home, op.epoch)) {
        window.0 -= 1;
        if window.0 == 0 {
            windows.remove(&(home, op.epoch));
            counters.discarded += 1;
        }
    }
}

impl StreamSeq {
    /// The position before this one.
    #[must_use]
    pub fn before(self) -> StreamSeq {
        StreamSeq(self.0 - 1)
    }
}

/// Parts that leave in one message.
#[derive(Debug, Default)]
struct Batch {
    parts: Vec<Parts>,
    bytes: usize,
}

impl Batch {
    /// Adds parts; `send` gets what is full before or after that.
    fn push(&mut self, parts: Parts, mut send: impl FnMut(Vec<Parts>)) {
        let weight = parts.op.weight();
        if self.bytes + weight > BATCH_BYTES && !self.parts.is_empty() {
            send(core::mem::take(&mut self.parts));
            self.bytes = 0;
        }
        self.bytes += weight;
        self.parts.push(parts);
        if self.parts.len() == BATCH_PARTS {
            send(core::mem::take(&mut self.parts));
            self.bytes = 0;
        }
    }
}

impl Stream {
    /// Says on a new connection that the stream is about to be used, and on any what will not come.
    fn announce(&mut self, source: Life, home: NodeId, hop: NodeId, port: &mut Port) {
        if self.announced.is_none() && !self.parts.is_empty() {
            self.announced = Some(hop);
            let base = StreamBase {
                source,
                home,
                base: self.unsure(),
            };
            self.told = self.committed;
            port.send(hop, Message::Stream { base });
        }
        let committed = self.committed.min(self.last());
        if committed > self.sent {
            self.sent = committed;
            self.landed = committed;
        }
        if self.is_due() && self.told < self.sent {
            // Committed over another path since the stream was announced: the tier above must
            // not wait for what is left out.
            let base = StreamBase {
                source,
                home,
                base: StreamSeq(self.sent.0 + 1),
            };
            self.told = self.sent;
            port.send(hop, Message::Stream { base });
        }
    }

    /// Whether there is something to send on this connection.
    fn is_due(&self) -> bool {
        self.ready && self.sent < self.last()
    }

    /// The part to be sent next.
    fn next(&self) -> Option<&Arc<Operation>> {
        self.part(StreamSeq(self.sent.0 + 1))
    }

    fn last(&self) -> StreamSeq {
        StreamSeq(self.base.0 + self.parts.len() as u64 - 1)
    }

    /// Lowest position not known to be committed.
    fn unsure(&self) -> StreamSeq {
        StreamSeq(self.committed.0 + 1)
    }

    fn part(&self, at: StreamSeq) -> Option<&Arc<Operation>> {
        self.parts.get(at.0.checked_sub(self.base.0)? as usize)
    }
}

#[cfg(test)]
mod tests;
