//! What the oracle judges: locks, reads, evictions, what is kept, and the state at the end.

use std::collections::BTreeMap;

use lowtide_engine_core::ids::{Epoch, Life, NodeId, OpId, Seq, Step};
use lowtide_engine_core::message::Reclaim;
use lowtide_engine_core::op::{Bytes, Change, Key, Mode, Operation, Range};

use super::{Entry, Oracle, Place};
use crate::app::{COUNTERS, LISTS, Seen, tags_of};
use crate::disk::Disk;

impl Oracle {
    /// Records of operations were recycled (I13): each is below the durable m, or was durably
    /// undone.
    pub fn recycled(&mut self, node: NodeId, records: &[Step]) {
        let home = self.homes.entry(node).or_default();
        let durable = home.log.iter().take_while(|(step, _)| *step <= home.synced);
        let marks = durable.filter_map(|(_, e)| match e {
            Entry::Marks(m) => Some(*m),
            _ => None,
        });
        let minimum = marks.max().unwrap_or_default();
        let mut text = None;
        for (_, entry) in home
            .log
            .iter()
            .filter(|(step, _)| records.binary_search(step).is_ok())
        {
            let Entry::Op(id) = entry else {
                continue;
            };
            let state = &self.ops[id];
            let undone = state
                .places
                .iter()
                .zip(&state.op.participants)
                .any(|(place, p)| {
                    p.node == node && matches!(place, Place::Undone(step) if *step <= home.synced)
                });
            if state.op.epoch >= minimum && !undone {
                let epoch = state.op.epoch;
                text = Some(format!(
                    "I13: {node} recycles {id} at {epoch}, durable m is {minimum}"
                ));
            }
        }
        if let Some(text) = text {
            self.fail(text);
        }
    }

    /// I17: a home's objects are those of the surviving operations in log order.
    pub fn compare(&mut self, node: NodeId, disk: &mut Disk, when: &str) {
        let home = self.homes.entry(node).or_default();
        let mut text = None;
        for (key, history) in &home.objects {
            let expected = history.last().and_then(|(_, _, v)| v.clone());
            let found = disk
                .objects
                .get(key)
                .cloned()
                .and_then(|s| disk.fetch(&s.value));
            if expected != found {
                let show =
                    |v: &Option<Bytes>| v.as_ref().map(|b| tags_of(b).take(9).collect::<Vec<_>>());
                let (e, f) = (show(&expected), show(&found));
                text = Some(format!(
                    "I17: {when}: {node} {key:?} is {f:x?} and should be {e:x?}"
                ));
            }
        }
        for (key, sum) in &home.counters {
            let found = disk
                .objects
                .get(key)
                .cloned()
                .and_then(|s| disk.fetch(&s.value));
            let trim = |b: &[u8]| b.iter().rposition(|x| *x != 0).map_or(0, |i| i + 1);
            let found = found.unwrap_or_else(|| Bytes::from([]));
            if found[..trim(&found)] != sum[..trim(sum)] {
                text = Some(format!(
                    "I17: {when}: {node} {key:?} is {found:?} and should be {sum:?}"
                ));
            }
        }
        for key in disk.objects.keys() {
            if !home.objects.contains_key(key) && !home.counters.contains_key(key) {
                text = Some(format!("I17: {when}: {node} has {key:?} that nobody wrote"));
            }
        }
        if let Some(text) = text {
            self.fail(text);
        }
    }

    /// The process of a life ended while it held these locks.
    pub fn frozen(&mut self, life: Life, claims: Vec<Reclaim>) {
        if life.incarnation.0 > 0 && !self.gone.contains(&life) {
            self.frozen.insert(life, claims);
        }
    }

    /// Locks of lives whose process is gone and that are not GONE.
    #[must_use]
    pub fn frozen_locks(&self) -> &BTreeMap<Life, Vec<Reclaim>> {
        &self.frozen
    }

    /// The root finished an eviction: each operation holds everywhere or nowhere (I21), durably,
    /// and what holds is a prefix.
    pub fn resolved(&mut self, life: Life) {
        if !self.gone.insert(life) {
            return;
        }
        self.tally.gone += 1;
        self.frozen.remove(&life);
        let from = OpId {
            source: life,
            seq: Seq(0),
        };
        let ids: Vec<OpId> = self
            .ops
            .range(from..)
            .take_while(|(id, _)| id.source == life)
            .map(|(id, _)| *id)
            .collect();
        let mut ended = None;
        for id in ids {
            let state = &self.ops[&id];
            let whole = self.is_durable(state);
            let none = state
                .op
                .participants
                .iter()
                .zip(&state.places)
                .all(|(p, place)| {
                    let synced = self.homes.get(&p.node).map_or(Step(0), |h| h.synced);
                    match place {
                        Place::Absent => true,
                        Place::Undone(step) => *step <= synced,
                        Place::Executed(_) => false,
                    }
                });
            let places = state.places.clone();
            if !whole && !none {
                self.fail(format!(
                    "I21: {id} of a life that is GONE stands at {places:?}"
                ));
            }
            if whole {
                self.tally.survived += 1;
                if let Some(first) = ended {
                    self.fail(format!("{id} survives though {first} before it does not"));
                }
            } else {
                self.tally.dropped += 1;
                if self.observed.contains(&id) {
                    self.fail(format!(
                        "I18: {id} is dropped and another source has seen it"
                    ));
                }
                ended = ended.or(Some(id));
                if let Some(state) = self.ops.get_mut(&id) {
                    state.dropped = true;
                }
            }
            self.refresh(id);
        }
    }

    /// `commit_on_share`: a lock was granted to `life`; nobody else's write beneath it is
    /// unfinished, nor any earlier operation of such a writer.
    pub fn granted(&mut self, life: Life, home: NodeId, range: &Range) {
        if self.gone.contains(&life) {
            return;
        }
        let mut first: BTreeMap<Life, Seq> = BTreeMap::new();
        for (_, id) in &self.unfinished {
            if id.source != life {
                let seq = first.entry(id.source).or_insert(id.seq);
                *seq = (*seq).min(id.seq);
            }
        }
        let mut text = None;
        for (source, seq) in first {
            let from = OpId { source, seq };
            let later = self
                .ops
                .range(from..)
                .take_while(|(id, _)| id.source == source);
            for (id, state) in later.filter(|(_, s)| !s.dropped) {
                let touches = state
                    .op
                    .updates_for(home)
                    .any(|u| !matches!(u.change, Change::Add(_)) && range.holds(&u.key));
                if touches {
                    text = Some(format!(
                        "commit_on_share: {life} is granted {range:?} at {home} over {id}, {source}#{} is unfinished",
                        seq.0
                    ));
                }
            }
        }
        if let Some(text) = text {
            self.fail(text);
        }
    }

    /// L1 between two lives.
    pub fn exclusive(&mut self, a: (Life, &Reclaim), b: (Life, &Reclaim)) {
        let conflict = a.1.mode == Mode::Exclusive || b.1.mode == Mode::Exclusive;
        let both = a.0 != b.0 && a.1.home == b.1.home && a.1.range.overlaps(&b.1.range);
        if conflict && both && !self.gone.contains(&a.0) && !self.gone.contains(&b.0) {
            self.fail(format!(
                "L1: {} holds {:?} and {} holds {:?}",
                a.0, a.1, b.0, b.1
            ));
        }
    }

    /// A life saw values under its locks.
    pub fn seen(&mut self, life: Life, seen: &Seen) {
        if self.gone.contains(&life) {
            return;
        }
        let mut text = None;
        for (key, value) in &seen.values {
            let tags = tags_of(value.as_deref().unwrap_or(&[]));
            let tags: Vec<u64> = if key.space == LISTS {
                tags.collect()
            } else {
                tags.take(1).collect()
            };
            for tag in tags {
                let ids = self.by_tag.get(&tag).cloned().unwrap_or_default();
                for id in ids.into_iter().filter(|id| id.source != life) {
                    let open = self.unfinished.iter();
                    let mut open = open.filter(|(_, o)| o.source == id.source && o.seq <= id.seq);
                    if let Some((_, o)) = open.next() {
                        text = Some(format!(
                            "{life} reads {id} in {key:?} while {o} is unfinished"
                        ));
                    }
                    self.observed.insert(id);
                }
            }
            text = text.or_else(|| self.misread(life, seen.home, key, value.as_ref()));
        }
        if let (Some(range), Some(home)) = (&seen.whole, self.homes.get(&seen.home)) {
            for (key, history) in &home.objects {
                let listed = seen.values.iter().any(|(k, _)| k == key);
                if let Some((id, _, Some(_))) = history.last()
                    && range.holds(key)
                    && !listed
                    && id.source != life
                {
                    text = Some(format!("{life} scans {range:?} and misses {key:?} of {id}"));
                }
            }
        }
        if let Some(text) = text {
            self.fail(text);
        }
    }

    /// A read under a lock shows the newest state, unless the reader itself changed it meanwhile.
    fn misread(
        &self,
        life: Life,
        home: NodeId,
        key: &Key,
        value: Option<&Bytes>,
    ) -> Option<String> {
        if key.space == COUNTERS {
            return None;
        }
        let history = self.homes.get(&home)?.objects.get(key);
        let (id, now) = match history.and_then(|h| h.last()) {
            Some((id, _, now)) => (Some(*id), now.as_ref()),
            None => (None, None),
        };
        let own_pending = self.unfinished.iter().any(|(_, o)| {
            o.source == life && self.ops[o].op.updates_for(home).any(|u| u.key == *key)
        });
        if now == value || own_pending || id.is_some_and(|id| id.source == life) {
            return None;
        }
        Some(format!(
            "{life} reads an old {key:?} at {home}; newest is by {id:?}"
        ))
    }

    /// After healing: every operation of a live life holds everywhere, of a dead one everywhere or
    /// nowhere (I20, I21).
    pub fn finish(&mut self, live: impl Fn(Life) -> bool) {
        let mut text = None;
        for (id, state) in &self.ops {
            let whole = self.is_durable(state);
            let gone = self.gone.contains(&id.source);
            if !whole && live(id.source) {
                text = Some(format!(
                    "I20: {id} of a live source stands at {:?}",
                    state.places
                ));
            } else if !whole && !gone {
                text = Some(format!("I21: {id} is unresolved at {:?}", state.places));
            }
        }
        if let Some(text) = text {
            self.fail(text);
        }
    }

    /// Largest epoch of any operation.
    #[must_use]
    pub fn newest(&self) -> Epoch {
        let alive = self.ops.values().filter(|s| !s.dropped);
        alive.map(|s| s.op.epoch).max().unwrap_or_default()
    }

    /// Where the unfinished operations stand, for a liveness report.
    #[must_use]
    pub fn describe_unfinished(&self) -> String {
        let mut text = String::new();
        for (epoch, id) in self.unfinished.iter().take(4) {
            let state = &self.ops[id];
            let nodes: Vec<String> = state
                .op
                .participants
                .iter()
                .map(|p| format!("{}{}", p.node, p.at))
                .collect();
            text.push_str(&format!(" {id} at {epoch} {nodes:?} {:?};", state.places));
        }
        text
    }

    /// How an operation stands at a home.
    #[must_use]
    pub fn place(&self, id: OpId, home: NodeId) -> Place {
        let state = self.ops.get(&id);
        let places = state.and_then(|s| {
            let mut all = s.op.participants.iter().zip(&s.places);
            all.find(|(p, _)| p.node == home).map(|(_, place)| *place)
        });
        places.unwrap_or(Place::Absent)
    }

    /// Whether an operation's record is durable at a home.
    #[must_use]
    pub fn is_committed(&self, id: OpId, home: NodeId) -> bool {
        let synced = self.homes.get(&home).map_or(Step(0), |h| h.synced);
        matches!(self.place(id, home), Place::Executed(step) if step <= synced)
    }

    /// Whether an operation up to `seq` of `life` has not executed at `home`.
    #[must_use]
    pub fn is_unmerged(&self, life: Life, seq: Seq, home: NodeId) -> bool {
        self.unfinished.iter().any(|(_, id)| {
            let state = &self.ops[id];
            let places = state.op.participants.iter().zip(&state.places);
            id.source == life
                && id.seq <= seq
                && places
                    .into_iter()
                    .any(|(p, place)| p.node == home && *place == Place::Absent)
        })
    }

    /// I14: a live source can send every part of an operation that is not finished; whatever a
    /// recovery may ask it for lies from there on.
    pub fn held(&mut self, life: Life, holds: impl Fn(&Operation) -> bool) {
        let mut first = self.unfinished.iter().filter(|(_, id)| id.source == life);
        let Some((_, id)) = first.next() else {
            return;
        };
        if !holds(&self.ops[id].op) {
            let text = format!("I14: {id} is not finished and its source has let a window go");
            self.fail(text);
        }
    }

    /// I11: what the root counts a life with covers its unfinished operations, also when its
    /// process is gone.
    pub fn counted(&mut self, counts: impl Fn(Life) -> Option<Epoch>) {
        let mut text = None;
        for (epoch, id) in &self.unfinished {
            if let Some(counted) = counts(id.source).filter(|c| c > epoch) {
                text = Some(format!(
                    "I11: {id} at {epoch} is not finished and its life counts with {counted}"
                ));
            }
        }
        if let Some(text) = text {
            self.fail(text);
        }
    }

    /// I11: a live source's bound covers its unfinished operations.
    pub fn covered(&mut self, life: Life, bound: Epoch) {
        let mut first = self.unfinished.iter().filter(|(_, id)| id.source == life);
        if let Some((epoch, id)) = first.next()
            && *epoch < bound
        {
            let text = format!("I11: {id} at {epoch} is not covered by bound {bound}");
            self.fail(text);
        }
    }
}
