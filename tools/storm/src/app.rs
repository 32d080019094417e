//! What a client does all day: lists that show every lost update, registers, counters, deletions,
//! conditional creations, reads and scans, at one home or several.
//!
//! An append reads the list at each home, then submits one operation that puts the longer list at
//! each of them under exclusive locks, checked against what was read. A tag names one attempt.

use std::collections::BTreeMap;

use lowtide_engine_core::ids::NodeId;
use lowtide_engine_core::op::{
    Bytes, Change, Check, Expect, Key, Mode, Range, Refusal, Request, Update, Want,
};
use lowtide_engine_core::session::{Page, SessionError, Ticket};

use crate::plan::Plan;
use crate::rng::Rng;

/// Space of the lists.
pub const LISTS: u64 = 1;
/// Space of the registers.
pub const REGISTERS: u64 = 2;
/// Space of the counters.
pub const COUNTERS: u64 = 3;
/// Length of a bulk value.
const BULK: usize = 66 << 10;
/// Ticks after which what a full home refused is submitted again.
const AGAIN_AFTER: u64 = 20;

/// Something to ask the client for.
#[derive(Debug)]
pub enum Ask {
    /// Submit.
    Submit(Ticket, Request),
    /// Read.
    Read(Ticket, NodeId, Key),
    /// Scan.
    Scan(Ticket, NodeId, Range),
}

/// An answered read, for the oracle.
#[derive(Debug)]
pub struct Seen {
    /// Home.
    pub home: NodeId,
    /// Objects and values that were seen.
    pub values: Vec<(Key, Option<Bytes>)>,
    /// For a scan, what was scanned completely.
    pub whole: Option<Range>,
}

#[derive(Debug)]
enum Task {
    /// Reading lists before appending to them.
    Gather {
        keys: Vec<(NodeId, Key)>,
        values: Vec<Option<Option<Bytes>>>,
        wide: bool,
        tries: u64,
    },
    /// Append submitted.
    Append {
        keys: Vec<(NodeId, Key)>,
        wide: bool,
        tries: u64,
        tag: u64,
    },
    /// Anything that needs no second step.
    Simple { again: Option<Request> },
    /// A read.
    Read { home: NodeId, key: Key },
    /// A scan.
    Scan { home: NodeId, range: Range },
}

/// The application of one client life.
#[derive(Debug)]
pub struct App {
    rng: Rng,
    homes: Vec<NodeId>,
    slots: u64,
    wide: u64,
    multi: u64,
    bulk: u64,
    /// Percent of operations that also write objects of other spaces at the same home.
    spread: u64,
    think_max: u64,
    depth: u64,
    mix: crate::plan::Mix,
    left: u64,
    tag_base: u64,
    tags: u64,
    next_ticket: u64,
    tasks: BTreeMap<u64, Task>,
    /// Reads of a gathering task: ticket → (task, index, own last tag at that time).
    reads: BTreeMap<u64, (u64, usize, Option<u64>)>,
    /// Last acknowledged append of this life per list.
    mine: BTreeMap<(NodeId, Key), u64>,
    ready: Vec<Ask>,
    /// Requests that a full home refused, to be submitted again.
    again: Vec<Request>,
    /// When the first of them is.
    again_at: Option<u64>,
    next_at: u64,
    /// Operations that executed.
    pub executed: u64,
    /// Appends that lost against somebody else and were tried again.
    pub contended: u64,
    /// A promise of the session that was broken.
    pub complaint: Option<String>,
}

impl App {
    /// The application of one life of a client.
    #[must_use]
    pub fn new(plan: &Plan, homes: Vec<NodeId>, ops: u64, life_label: u64, now: u64) -> App {
        let rng = Rng::branch(plan.seed, 1000 + life_label);
        App {
            rng,
            homes,
            slots: plan.slots,
            wide: plan.wide,
            multi: plan.multi,
            bulk: plan.bulk,
            spread: if plan.shards.iter().any(|n| *n > 1) {
                50
            } else {
                0
            },
            think_max: plan.think_max,
            depth: plan.depth,
            mix: plan.mix,
            left: ops,
            tag_base: life_label << 20,
            tags: 0,
            next_ticket: 1,
            tasks: BTreeMap::new(),
            reads: BTreeMap::new(),
            mine: BTreeMap::new(),
            ready: Vec::new(),
            again: Vec::new(),
            again_at: None,
            next_at: now,
            executed: 0,
            contended: 0,
            complaint: None,
        }
    }

    /// Whether everything was done and answered.
    #[must_use]
    pub fn is_done(&self) -> bool {
        let asked = self.ready.is_empty() && self.again.is_empty();
        self.left == 0 && self.tasks.is_empty() && asked
    }

    /// When [`App::poll`] may have something new; `None` while answers are awaited.
    #[must_use]
    pub fn wake_at(&self) -> Option<u64> {
        let may = self.left > 0 && (self.tasks.len() as u64) < self.depth;
        let next = (may || !self.ready.is_empty()).then_some(self.next_at);
        next.into_iter().chain(self.again_at).min()
    }

    /// What to ask for now.
    pub fn poll(&mut self, now: u64) -> Option<Ask> {
        if self.again_at.is_some_and(|at| now >= at) {
            let request = self.again.remove(0);
            self.submit(request);
            self.again_at = None;
        }
        if !self.again.is_empty() && self.again_at.is_none() {
            self.again_at = Some(now + AGAIN_AFTER);
        }
        if self.ready.is_empty()
            && self.left > 0
            && (self.tasks.len() as u64) < self.depth
            && now >= self.next_at
        {
            self.left -= 1;
            self.next_at = now + self.rng.below(self.think_max + 1);
            self.start();
        }
        if self.ready.is_empty() {
            None
        } else {
            Some(self.ready.remove(0))
        }
    }

    /// An operation's outcome.
    pub fn outcome(&mut self, ticket: Ticket, ok: bool, error: Option<SessionError>) {
        self.executed += u64::from(ok);
        match self.tasks.remove(&ticket.0) {
            Some(Task::Append {
                keys,
                wide,
                tries,
                tag,
            }) => match error {
                None => {
                    for key in keys {
                        self.mine.insert(key, tag);
                    }
                }
                Some(SessionError::Refused(Refusal::CheckFailed { .. } | Refusal::Full { .. }))
                    if tries < 12 =>
                {
                    self.contended += 1;
                    self.gather(keys, wide, tries + 1);
                }
                _ => {}
            },
            Some(Task::Simple {
                again: Some(request),
            }) if matches!(error, Some(SessionError::Refused(Refusal::Full { .. }))) => {
                self.again.push(request);
            }
            _ => {}
        }
    }

    /// A read's answer.
    pub fn value(&mut self, ticket: Ticket, value: Option<Bytes>) -> Option<Seen> {
        if let Some((task, index, own)) = self.reads.remove(&ticket.0) {
            let Some(Task::Gather { keys, values, .. }) = self.tasks.get_mut(&task) else {
                return None;
            };
            values[index] = Some(value.clone());
            let (home, key) = keys[index].clone();
            let complete = values.iter().all(Option::is_some);
            if let Some(tag) = own
                && !tags_of(value.as_deref().unwrap_or(&[])).any(|t| t == tag)
            {
                self.complaint = Some(format!("a read of {key:?} misses own append {tag:#x}"));
            }
            if complete {
                self.append(task);
            }
            let values = vec![(key, value)];
            let whole = None;
            return Some(Seen {
                home,
                values,
                whole,
            });
        }
        match self.tasks.remove(&ticket.0) {
            Some(Task::Read { home, key }) => Some(Seen {
                home,
                values: vec![(key, value)],
                whole: None,
            }),
            _ => None,
        }
    }

    /// A scan's answer.
    pub fn listing(&mut self, ticket: Ticket, page: Page) -> Option<Seen> {
        let Some(Task::Scan { home, range }) = self.tasks.remove(&ticket.0) else {
            return None;
        };
        let whole = (!page.more).then_some(range);
        let entries = page.entries.into_iter();
        Some(Seen {
            home,
            values: entries.map(|(key, value)| (key, Some(value))).collect(),
            whole,
        })
    }

    fn ticket(&mut self) -> u64 {
        self.next_ticket += 1;
        self.next_ticket
    }

    fn tag(&mut self) -> u64 {
        self.tags += 1;
        self.tag_base + self.tags
    }

    fn start(&mut self) {
        let m = self.mix;
        let total = m.append + m.blind + m.add + m.delete + m.create + m.read + m.scan;
        let mut draw = self.rng.below(total);
        let mut is = |share: u64| {
            let hit = draw < share;
            draw = draw.wrapping_sub(share);
            hit
        };
        if is(m.append) {
            let homes = self.some_homes();
            let keys = homes.into_iter().map(|h| (h, self.key(LISTS))).collect();
            let wide = self.rng.chance(self.wide);
            self.gather(keys, wide, 0);
        } else if is(m.blind) {
            self.blind(false);
        } else if is(m.add) {
            self.add();
        } else if is(m.delete) {
            self.blind(true);
        } else if is(m.create) {
            self.create();
        } else if is(m.read) {
            let home = *self.rng.pick(&self.homes);
            let space = *self.rng.pick(&[LISTS, REGISTERS]);
            let key = self.key(space);
            let ticket = self.ticket();
            let task = Task::Read {
                home,
                key: key.clone(),
            };
            self.tasks.insert(ticket, task);
            self.ready.push(Ask::Read(Ticket(ticket), home, key));
        } else {
            let home = *self.rng.pick(&self.homes);
            let space = *self.rng.pick(&[LISTS, REGISTERS]);
            let range = self.wide_range(space, 0);
            let ticket = self.ticket();
            self.tasks.insert(ticket, Task::Scan { home, range });
            self.ready.push(Ask::Scan(Ticket(ticket), home, range));
        }
    }

    fn some_homes(&mut self) -> Vec<NodeId> {
        let mut homes = self.homes.clone();
        let many = if self.rng.chance(self.multi) {
            homes.len() as u64
        } else {
            1
        };
        let keep = self.rng.range(1, many);
        while homes.len() as u64 > keep {
            let index = self.rng.below(homes.len() as u64) as usize;
            homes.remove(index);
        }
        homes
    }

    /// Slots lie apart so that ranges of different width make sense; two names share a slot.
    fn key(&mut self, space: u64) -> Key {
        let slot = self.rng.below(self.slots) * 10;
        let name = if self.rng.chance(20) {
            b"b".to_vec()
        } else {
            Vec::new()
        };
        Key { space, slot, name }
    }

    fn wide_range(&mut self, space: u64, slot: u64) -> Range {
        let lo = slot - self.rng.below(slot + 1);
        match self.rng.below(3) {
            0 => Range::whole(space),
            1 => Range {
                space,
                lo,
                hi: slot + self.rng.below(30),
            },
            _ => Range {
                space,
                lo: slot,
                hi: u64::MAX,
            },
        }
    }

    fn want(&mut self, home: NodeId, key: &Key, wide: bool) -> Want {
        let range = if wide {
            self.wide_range(key.space, key.slot)
        } else {
            key.range()
        };
        Want {
            home,
            range,
            mode: Mode::Exclusive,
        }
    }

    fn gather(&mut self, keys: Vec<(NodeId, Key)>, wide: bool, tries: u64) {
        let task = self.ticket();
        for (index, place) in keys.iter().enumerate() {
            let ticket = self.ticket();
            let own = self.mine.get(place).copied();
            self.reads.insert(ticket, (task, index, own));
            let (home, key) = place.clone();
            self.ready.push(Ask::Read(Ticket(ticket), home, key));
        }
        let values = vec![None; keys.len()];
        self.tasks.insert(
            task,
            Task::Gather {
                keys,
                values,
                wide,
                tries,
            },
        );
    }

    fn append(&mut self, task: u64) {
        let Some(Task::Gather {
            keys,
            values,
            wide,
            tries,
        }) = self.tasks.remove(&task)
        else {
            return;
        };
        let tag = self.tag();
        let mut request = Request::default();
        for ((home, key), value) in keys.iter().zip(values) {
            let old = value.flatten();
            let mut list = old.as_deref().unwrap_or(&[]).to_vec();
            list.extend_from_slice(&tag.to_le_bytes());
            let want = self.want(*home, key, wide);
            request.locks.push(want);
            request.checks.push(Check {
                home: *home,
                key: key.clone(),
                expect: old.map_or(Expect::Absent, Expect::Value),
            });
            request.updates.push(Update {
                home: *home,
                key: key.clone(),
                change: Change::Put(Bytes::from(list)),
            });
            if self.is_spread() {
                let other = self.key(REGISTERS);
                let want = self.want(*home, &other, false);
                request.locks.push(want);
                request.updates.push(Update {
                    home: *home,
                    key: other,
                    change: Change::Put(self.register_value()),
                });
            }
        }
        let ticket = self.ticket();
        let task = Task::Append {
            keys,
            wide,
            tries,
            tag,
        };
        self.tasks.insert(ticket, task);
        self.ready.push(Ask::Submit(Ticket(ticket), request));
    }

    fn submit(&mut self, request: Request) {
        let ticket = self.ticket();
        let again = Some(request.clone());
        self.tasks.insert(ticket, Task::Simple { again });
        self.ready.push(Ask::Submit(Ticket(ticket), request));
    }

    fn register_value(&mut self) -> Bytes {
        let tag = self.tag();
        let mut value = tag.to_le_bytes().to_vec();
        if self.rng.chance(self.bulk) {
            value.resize(BULK, 7);
        }
        Bytes::from(value)
    }

    fn blind(&mut self, delete: bool) {
        let value = self.register_value();
        let wide = self.rng.chance(self.wide);
        let mut request = Request::default();
        for home in self.some_homes() {
            for _ in 0..=self.rng.below(2) {
                let key = self.key(REGISTERS);
                if request
                    .updates
                    .iter()
                    .any(|u| u.home == home && u.key == key)
                {
                    continue;
                }
                let want = self.want(home, &key, wide);
                request.locks.push(want);
                let change = if delete {
                    Change::Delete
                } else {
                    Change::Put(value.clone())
                };
                request.updates.push(Update { home, key, change });
            }
            if self.is_spread() {
                let key = self.key(COUNTERS);
                let change = Change::Add(Bytes::from(1i64.to_le_bytes()));
                request.updates.push(Update { home, key, change });
            }
        }
        self.submit(request);
    }

    /// Draws nothing in plans with one shard, which therefore run as they did before.
    fn is_spread(&mut self) -> bool {
        self.spread > 0 && self.rng.chance(self.spread)
    }

    fn create(&mut self) {
        let value = self.register_value();
        let mut request = Request::default();
        let expect = if self.rng.chance(70) {
            Expect::Absent
        } else {
            Expect::Present
        };
        for home in self.some_homes() {
            let key = self.key(REGISTERS);
            let want = self.want(home, &key, false);
            request.locks.push(want);
            request.checks.push(Check {
                home,
                key: key.clone(),
                expect: expect.clone(),
            });
            request.updates.push(Update {
                home,
                key,
                change: Change::Put(value.clone()),
            });
        }
        self.submit(request);
    }

    fn add(&mut self) {
        let mut request = Request::default();
        for home in self.some_homes() {
            let key = self.key(COUNTERS);
            let mut words = Vec::new();
            for _ in 0..=self.rng.below(2) {
                let word = self.rng.below(7) as i64 - 3;
                words.extend_from_slice(&word.to_le_bytes());
            }
            let change = Change::Add(Bytes::from(words));
            request.updates.push(Update { home, key, change });
        }
        self.submit(request);
    }
}

/// Tags of a list, oldest first.
pub fn tags_of(list: &[u8]) -> impl Iterator<Item = u64> + '_ {
    list.chunks_exact(8)
        .map(|c| u64::from_le_bytes(c.try_into().expect("chunks of 8")))
}
