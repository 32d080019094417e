//! A shard of a destination: the objects of some spaces, their locks, their log and their undo.
//!
//! A shard does what its front orders, in order, and nothing by itself; front and shards exchange
//! plain values over queues that lose nothing and keep order, so a shard may run on a thread of its
//! own or inline. Every order belongs to a *step* of the node. What several shards do in one step
//! (an operation that writes objects of both) is durable everywhere or nowhere: the hands put a step
//! into one commit group. Records carry their step, so the logs of a node can be merged again.
//!
//! A space lies wholly in one shard ([`shard_of`]), hence so do lock ranges, scans and emptiness.
//!
//! An extent is released when the operation that replaced it is past undo (its epoch lies below the
//! durable m), or when the operation that wrote it is durably undone. What an `Add` replaces waits
//! for a restart, because replaying the `Add` reads it.
//!
//! Invariants kept here: I4 (asserted at every locked write), L1 within the shard's spaces; an undo
//! record is kept until the front says that m passed it durably (b.6), or until the step that used
//! it is durable.
//!
//! Deliberately absent: sources, sessions, streams, fences, decisions, messages (the front's).

mod set;

use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;

pub use set::ShardSet;

use super::objects;
use crate::ids::{Epoch, GrantId, Life, Lsn, NodeId, Seq, Step, StreamSeq};
use crate::lock::{Asker, LockServer, Notice};
use crate::message::Reclaim;
use crate::op::{Bytes, Change, Key, Mode, Operation, Participant, Range, Update};
use crate::record::{
    Extent, OpRecord, Piece, Position, Record, Recorded, Storage, UndoneRecord, Value, Write,
    encode_record,
};
use crate::room::FRAME_BYTES;
use crate::session::Page;

/// Most shards of a destination: [`ShardSet`] is one word.
pub const SHARDS_MAX: u32 = 64;

/// The shard, of `count`, that keeps the objects of a space.
#[must_use]
pub fn shard_of(space: u64, count: u32) -> u32 {
    if count <= 1 {
        return 0;
    }
    // Spaces are often small numbers or share their low bits; the high bits of the product differ.
    let mixed = space.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    ((mixed * u64::from(count)) >> 32) as u32
}

/// What a front orders of a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// The node's step that it belongs to; orders of one shard have ascending steps.
    pub step: Step,
    /// What to do.
    pub task: Task,
}

/// See [`Order`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Task {
    /// Append a record of the front's.
    Log(Record),
    /// Execute this shard's updates of an operation.
    Execute {
        /// The operation.
        op: Arc<Operation>,
        /// Its position in the source's stream to this home.
        at: StreamSeq,
        /// Which of the step's records this shard writes.
        piece: Piece,
    },
    /// Take back the newest operation of a life, which is at this position.
    Undo {
        /// The life.
        victim: Life,
        /// The position.
        at: StreamSeq,
    },
    /// What may be let go of.
    Keep {
        /// Steps up to here are durable.
        durable: Step,
        /// Undo below this epoch is needed no more.
        minimum: Epoch,
    },
    /// Grant a lock when it can be had.
    Lock {
        /// Home as the asker names it.
        home: NodeId,
        /// Who asks.
        asker: Asker,
        /// What must be covered.
        range: Range,
        /// How.
        mode: Mode,
    },
    /// A holder yields.
    Unlock {
        /// Home as the holder names it.
        home: NodeId,
        /// The holder.
        holder: Life,
        /// The grant.
        grant: GrantId,
        /// What is yielded.
        range: Range,
    },
    /// Make a life's grants agree with what it claims; none releases all.
    Reclaim {
        /// The life.
        holder: Life,
        /// Its claims in this shard's spaces.
        claims: Vec<Reclaim>,
    },
    /// Forget what a life waits for.
    Forget {
        /// The life.
        holder: Life,
    },
    /// Read an object.
    Read {
        /// Who asks.
        to: Life,
        /// Its request.
        request: u64,
        /// The object.
        key: Key,
    },
    /// Read objects in key order.
    Scan {
        /// Who asks.
        to: Life,
        /// Its request.
        request: u64,
        /// Where.
        range: Range,
        /// Continue after this key.
        after: Option<Key>,
        /// About how many bytes of values.
        bytes_max: u32,
    },
    /// List what is held of a life.
    Gather {
        /// The life.
        victim: Life,
    },
    /// Rebuild an operation as far as this shard holds it.
    Supply {
        /// The life.
        victim: Life,
        /// The operation.
        seq: Seq,
    },
}

/// What a shard tells its front.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Step of the order that brought it about; everything ordered before is done.
    pub step: Step,
    /// What there is to say.
    pub news: News,
}

/// See [`Answer`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// A lock request was granted, or a holder must yield.
    Notice {
        /// To be told to its holder.
        notice: Notice,
        /// Whether no object exists in a granted range.
        empty: bool,
    },
    /// Claims that conflicted with another life's grants and were ignored.
    ClaimsRefused(u64),
    /// Answers a read.
    Value {
        /// Who asked.
        to: Life,
        /// Its request.
        request: u64,
        /// The value, if the object exists.
        value: Option<Bytes>,
    },
    /// Answers a scan.
    Page {
        /// Who asked.
        to: Life,
        /// Its request.
        request: u64,
        /// The objects.
        page: Page,
    },
    /// Answers a gathering.
    Gathered {
        /// The life.
        victim: Life,
        /// One per record, ascending by seq.
        pieces: Vec<HeldPiece>,
    },
    /// Answers a supply; `None` when its values cannot be read.
    Supplied {
        /// The life.
        victim: Life,
        /// The operation.
        seq: Seq,
        /// The operation with the updates that are known here.
        op: Option<Operation>,
    },
}

/// A record of an operation, as far as a resolver wants to know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldPiece {
    /// The operation.
    pub seq: Seq,
    /// Its epoch.
    pub epoch: Epoch,
    /// Epoch of its source's preceding operation.
    pub previous: Epoch,
    /// Its participants.
    pub participants: Vec<Participant>,
    /// Other homes whose updates the record carries.
    pub carried: Vec<NodeId>,
}

/// A record of an executed operation that is kept for undo.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kept {
    pub(super) at: StreamSeq,
    pub(super) seq: Seq,
    pub(super) epoch: Epoch,
    pub(super) position: Position,
    /// What its undo step adds to a log, at most, in bytes.
    pub(super) undo: u64,
}

impl Kept {
    /// Of an operation whose record has a body of `len` bytes. The record of its undo step leaves
    /// out what was written and keeps what it restores.
    pub(super) fn undo_of(len: usize) -> u64 {
        len as u64 + FRAME_BYTES
    }
}

/// Extents by the operation that replaced them.
pub(super) type Replaced = BTreeMap<(Life, StreamSeq), Vec<Extent>>;

/// Extents that a write has replaced and that undo would bring back.
pub(super) fn extents_replaced(writes: &[Write]) -> impl Iterator<Item = Extent> + '_ {
    writes
        .iter()
        .filter_map(|w| match w.before.as_ref()?.value {
            Value::Extent(extent) => Some(extent),
            Value::Inline(_) => None,
        })
}

/// A shard. See the module's head.
#[derive(Debug)]
pub struct Shard {
    node: NodeId,
    number: u32,
    count: u32,
    carry_bytes: usize,
    locks: LockServer,
    /// Kept records per source, ascending. Two of one position stand side by side when the number
    /// of shards has changed since.
    kept: BTreeMap<Life, VecDeque<Kept>>,
    /// Undo steps that are not durable, and the records they used.
    undoing: VecDeque<(Step, Position)>,
    /// Extents that kept operations have replaced.
    replaced: Replaced,
    /// Extents of undone operations, with the step of the undo.
    garbage: VecDeque<(Step, Extent)>,
    notices: Vec<Notice>,
    answers: VecDeque<Answer>,
    /// Sum over `kept`.
    undo_bytes: u64,
    done: Step,
}

impl Shard {
    pub(super) fn new(
        node: NodeId,
        (number, count): (u32, u32),
        carry_bytes: usize,
        (kept, replaced): (BTreeMap<Life, VecDeque<Kept>>, Replaced),
        done: Step,
    ) -> Shard {
        let undo_bytes = kept.values().flatten().map(|k| k.undo).sum();
        Shard {
            node,
            number,
            count,
            carry_bytes,
            locks: LockServer::default(),
            kept,
            undoing: VecDeque::new(),
            replaced,
            garbage: VecDeque::new(),
            notices: Vec::new(),
            answers: VecDeque::new(),
            undo_bytes,
            done,
        }
    }

    /// Carries one order out.
    pub fn handle<S: Storage>(&mut self, order: Order, storage: &mut S) {
        let Order { step, task } = order;
        debug_assert!(step >= self.done, "orders come in the order of their steps");
        self.done = step;
        match task {
            Task::Log(record) => {
                append(step, &record, Epoch(0), storage);
            }
            Task::Execute { op, at, piece } => self.execute(step, &op, (at, piece), storage),
            Task::Undo { victim, at } => self.undo(step, victim, at, storage),
            Task::Keep { durable, minimum } => self.keep(durable, minimum, storage),
            Task::Lock {
                home,
                asker,
                range,
                mode,
            } => {
                let bound = Range::whole(range.space);
                let notices = &mut self.notices;
                self.locks.request(home, asker, range, mode, bound, notices);
            }
            Task::Unlock {
                home,
                holder,
                grant,
                range,
            } => self
                .locks
                .unlock(home, holder, grant, range, &mut self.notices),
            Task::Reclaim { holder, claims } => {
                let refused = self.locks.reclaim(holder, &claims, &mut self.notices);
                if refused > 0 {
                    self.answer(News::ClaimsRefused(refused as u64));
                }
            }
            Task::Forget { holder } => self.locks.forget_waiting(holder, &mut self.notices),
            Task::Read { to, request, key } => {
                let stored = storage.get(&key);
                let value = stored.and_then(|s| storage.fetch(&s.value));
                self.answer(News::Value { to, request, value });
            }
            Task::Scan {
                to,
                request,
                range,
                after,
                bytes_max,
            } => {
                let page = storage.scan(&range, after.as_ref(), bytes_max as usize);
                self.answer(News::Page { to, request, page });
            }
            Task::Gather { victim } => {
                let pieces = self.gather(victim, storage);
                self.answer(News::Gathered { victim, pieces });
            }
            Task::Supply { victim, seq } => {
                let op = self.rebuild(victim, seq, storage);
                self.answer(News::Supplied { victim, seq, op });
            }
        }
        for notice in core::mem::take(&mut self.notices) {
            let empty = match &notice {
                Notice::Grant { range, .. } => storage.is_empty(range),
                Notice::Revoke { .. } => false,
            };
            self.answer(News::Notice { notice, empty });
        }
    }

    /// What the front must hear, in order.
    pub fn poll_answer(&mut self) -> Option<Answer> {
        self.answers.pop_front()
    }

    /// Every order up to this step is carried out.
    #[must_use]
    pub fn done(&self) -> Step {
        self.done
    }

    /// Position from which `log` must keep records as far as this shard's undo is concerned;
    /// `None` when nothing of it is needed.
    #[must_use]
    pub fn undo_floor(&self, log: u32) -> Option<Lsn> {
        let first = |kept: &VecDeque<Kept>| kept.iter().find(|k| k.position.log == log).copied();
        let kept = self.kept.values().filter_map(first).map(|k| k.position.lsn);
        let used = self.undoing.iter().map(|(_, used)| used);
        let used = used.filter(|p| p.log == log).map(|p| p.lsn);
        kept.chain(used).min()
    }

    /// Bytes that undoing everything kept would add to this shard's log, at most.
    #[must_use]
    pub fn undo_bytes(&self) -> u64 {
        self.undo_bytes
    }

    /// Whether records of other logs than `log` are needed for undo: the number of shards has
    /// changed, and m has not passed what was executed before.
    #[must_use]
    pub fn needs_other_logs(&self, log: u32) -> bool {
        let mut kept = self.kept.values().filter_map(|k| k.front());
        kept.any(|k| k.position.log != log) || self.undoing.iter().any(|(_, p)| p.log != log)
    }

    /// The lock table, for invariant checks and status.
    #[must_use]
    pub fn locks(&self) -> &LockServer {
        &self.locks
    }

    fn answer(&mut self, news: News) {
        let step = self.done;
        self.answers.push_back(Answer { step, news });
    }

    fn owns(&self, key: &Key) -> bool {
        shard_of(key.space, self.count) == self.number
    }

    fn execute<S: Storage>(
        &mut self,
        step: Step,
        op: &Operation,
        (at, piece): (StreamSeq, Piece),
        storage: &mut S,
    ) {
        let own = op.updates_for(self.node).filter(|u| self.owns(&u.key));
        let writes: Vec<Write> = own.map(|u| objects::write(u, op.epoch, storage)).collect();
        for extent in extents_replaced(&writes) {
            let replaced = self.replaced.entry((op.id.source, at));
            replaced.or_default().push(extent);
        }
        // One record of the step carries the others' updates.
        let mut carried = Vec::new();
        if piece.index == 0 {
            let homes = op.carried(|home| home == self.node, self.carry_bytes);
            let others = op.updates.iter().filter(|u| homes.contains(&u.home));
            carried.extend(others.cloned());
        }
        let record = Record::Op(OpRecord {
            id: op.id,
            epoch: op.epoch,
            previous: op.previous,
            participants: op.participants.clone(),
            at,
            piece,
            writes,
            carried,
        });
        let (position, len) = append(step, &record, op.epoch, storage);
        let undo = Kept::undo_of(len);
        self.undo_bytes += undo;
        self.kept.entry(op.id.source).or_default().push_back(Kept {
            at,
            seq: op.id.seq,
            epoch: op.epoch,
            position,
            undo,
        });
    }

    fn undo<S: Storage>(&mut self, step: Step, victim: Life, at: StreamSeq, storage: &mut S) {
        while let Some(kept) = self.newest(victim, at) {
            let Some(record) = storage.load(kept.position) else {
                return;
            };
            let mut restored = Vec::with_capacity(record.writes.len());
            for w in record.writes.iter().rev() {
                if !self.owns(&w.key) {
                    continue;
                }
                restored.push((w.key.clone(), objects::undo(w, storage)));
                if let Recorded::Put(Value::Extent(extent)) = w.change {
                    self.garbage.push_back((step, extent));
                }
            }
            // They are back in their objects.
            self.replaced.remove(&(victim, at));
            let undone = Record::Undone(UndoneRecord {
                source: victim,
                seq: kept.seq,
                at,
                restored,
            });
            append(step, &undone, kept.epoch, storage);
            self.undoing.push_back((step, kept.position));
            if let Some(list) = self.kept.get_mut(&victim)
                && let Some(place) = list.iter().rposition(|k| k.position == kept.position)
            {
                list.remove(place);
                self.undo_bytes -= kept.undo;
            }
        }
    }

    /// The newest record of the operation at `at`; nothing later is kept when it is undone.
    fn newest(&self, life: Life, at: StreamSeq) -> Option<Kept> {
        let mut newest = self.kept.get(&life)?.iter().rev();
        newest.find(|k| k.at <= at).filter(|k| k.at == at).copied()
    }

    fn keep<S: Storage>(&mut self, durable: Step, minimum: Epoch, storage: &mut S) {
        while let Some((_, extent)) = self.garbage.pop_front_if(|(step, _)| *step <= durable) {
            storage.release(extent);
        }
        while self
            .undoing
            .front()
            .is_some_and(|(step, _)| *step <= durable)
        {
            self.undoing.pop_front();
        }
        let (replaced, undo_bytes) = (&mut self.replaced, &mut self.undo_bytes);
        self.kept.retain(|life, kept| {
            while let Some(k) = kept.pop_front_if(|k| k.epoch < minimum) {
                *undo_bytes -= k.undo;
                if !replaced.is_empty()
                    && let Some(extents) = replaced.remove(&(*life, k.at))
                {
                    extents.into_iter().for_each(|e| storage.release(e));
                }
            }
            !kept.is_empty()
        });
    }

    fn gather<S: Storage>(&self, victim: Life, storage: &mut S) -> Vec<HeldPiece> {
        let kept = self.kept.get(&victim).into_iter().flatten();
        kept.filter_map(|k| {
            let record = storage.load(k.position)?;
            let mut carried: Vec<NodeId> = record.carried.iter().map(|u| u.home).collect();
            carried.dedup();
            Some(HeldPiece {
                seq: k.seq,
                epoch: k.epoch,
                previous: record.previous,
                participants: record.participants,
                carried,
            })
        })
        .collect()
    }

    /// The operation as far as this shard's records hold it.
    fn rebuild<S: Storage>(&self, victim: Life, seq: Seq, storage: &mut S) -> Option<Operation> {
        let mut whole: Option<Operation> = None;
        let kept = self.kept.get(&victim)?.iter();
        for k in kept.filter(|k| k.seq == seq) {
            let record = storage.load(k.position)?;
            let op = whole.get_or_insert_with(|| Operation {
                id: record.id,
                epoch: record.epoch,
                previous: record.previous,
                participants: record.participants,
                updates: Vec::new(),
            });
            op.updates.extend(record.carried);
            for w in record.writes.into_iter().filter(|w| self.owns(&w.key)) {
                let change = match w.change {
                    Recorded::Put(value) => Change::Put(storage.fetch(&value)?),
                    Recorded::Delete => Change::Delete,
                    Recorded::Add(words) => Change::Add(words),
                };
                op.updates.push(Update {
                    home: self.node,
                    key: w.key,
                    change,
                });
            }
        }
        whole
    }
}

/// Appends a record; returns its position and the length of its body.
fn append<S: Storage>(
    step: Step,
    record: &Record,
    epoch: Epoch,
    storage: &mut S,
) -> (Position, usize) {
    let body = encode_record(step, record);
    (storage.append(record.kind(), epoch, &body), body.len())
}
