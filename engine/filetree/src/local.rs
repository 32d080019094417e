//! Sessions without a cluster.
//!
//! [`LocalTree`] keeps all objects in an ordered map in memory; any number of sessions share one
//! map. Every operation is atomic, and what the engine demands of a request (coverage by locks,
//! limits, one update per object) is demanded here too, so an application that satisfies this
//! session asks a cluster for nothing wrong.
//!
//! [`Offline`] reads the state of a stopped cluster through [`Objects`]; nothing can be changed.
//!
//! Deliberately absent: waiting for locks (an operation holds them for no time), durability.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lowtide_engine_core::ids::{Epoch, Life, NodeId, OpId, Seq};
use lowtide_engine_core::op::{
    Bytes, Change, Expect, Key, Mode, NAME_MAX, Range, Refusal, Request, Stamp, UPDATES_MAX,
    VALUE_MAX,
};
use lowtide_engine_core::session::{Page, Placement, Session, SessionError, Ticket};

/// Objects of all servers: the server first, then the key.
pub type ObjectMap = BTreeMap<(NodeId, Key), Bytes>;

/// A session over objects in memory.
pub struct LocalTree {
    placement: Placement,
    life: Life,
    objects: Arc<Mutex<ObjectMap>>,
    outcomes: Mutex<Outcomes>,
}

#[derive(Default)]
struct Outcomes {
    submitted: u64,
    /// Outcomes that nobody has waited for yet.
    open: HashMap<u64, Result<Stamp, SessionError>>,
}

impl LocalTree {
    /// A session over no objects.
    #[must_use]
    pub fn new(placement: Placement, life: Life) -> LocalTree {
        Self::from_objects(placement, life, [])
    }

    /// A session over the given objects.
    #[must_use]
    pub fn from_objects(
        placement: Placement,
        life: Life,
        objects: impl IntoIterator<Item = (NodeId, Key, Bytes)>,
    ) -> LocalTree {
        let map = objects.into_iter().map(|(n, k, v)| ((n, k), v)).collect();
        LocalTree {
            placement,
            life,
            objects: Arc::new(Mutex::new(map)),
            outcomes: Mutex::default(),
        }
    }

    /// Another session over the same objects. `life` must be new to them.
    #[must_use]
    pub fn share(&self, life: Life) -> LocalTree {
        LocalTree {
            placement: self.placement.clone(),
            life,
            objects: Arc::clone(&self.objects),
            outcomes: Mutex::default(),
        }
    }

    /// All objects, to look at or to damage. Operations wait while the guard lives.
    pub fn objects(&self) -> MutexGuard<'_, ObjectMap> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn outcomes(&self) -> MutexGuard<'_, Outcomes> {
        self.outcomes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Session for LocalTree {
    fn placement(&self) -> &Placement {
        &self.placement
    }

    fn life(&self) -> Life {
        self.life
    }

    fn submit(&self, request: Request) -> Result<Ticket, SessionError> {
        let mut outcomes = self.outcomes();
        outcomes.submitted += 1;
        let number = outcomes.submitted;
        let outcome = execute(&mut self.objects(), &request);
        let stamp = Stamp {
            id: OpId {
                source: self.life,
                seq: Seq(number),
            },
            epoch: Epoch(number),
        };
        let outcome = outcome.map(|()| stamp).map_err(SessionError::Refused);
        outcomes.open.insert(number, outcome);
        Ok(Ticket(number))
    }

    fn wait(&self, ticket: Ticket) -> Result<Stamp, SessionError> {
        // A ticket is waited for once; a second wait is the caller's mistake.
        self.outcomes()
            .open
            .remove(&ticket.0)
            .unwrap_or(Err(SessionError::Closed))
    }

    fn wait_stable(&self) -> Result<(), SessionError> {
        Ok(())
    }

    fn read(&self, home: NodeId, key: &Key) -> Result<Option<Bytes>, SessionError> {
        Ok(self.objects().get(&(home, key.clone())).cloned())
    }

    fn scan(
        &self,
        home: NodeId,
        range: Range,
        after: Option<&Key>,
        bytes_max: usize,
    ) -> Result<Page, SessionError> {
        let objects = self.objects();
        let begin = Key::at(range.space, range.lo);
        let begin = match after {
            Some(after) if *after >= begin => Bound::Excluded((home, after.clone())),
            _ => Bound::Included((home, begin)),
        };
        let mut page = Page::default();
        let mut bytes = 0;
        for ((_, key), value) in objects
            .range((begin, Bound::Unbounded))
            .take_while(|((node, key), _)| *node == home && range.holds(key))
        {
            if !page.entries.is_empty() && bytes + value.len() > bytes_max {
                page.more = true;
                break;
            }
            bytes += value.len();
            page.entries.push((key.clone(), value.clone()));
        }
        Ok(page)
    }
}

/// Effects a request, or nothing of it.
fn execute(objects: &mut ObjectMap, request: &Request) -> Result<(), Refusal> {
    if !is_proper(request) {
        return Err(Refusal::NotCovered);
    }
    for (index, check) in request.checks.iter().enumerate() {
        let value = objects.get(&(check.home, check.key.clone()));
        let holds = match &check.expect {
            Expect::Absent => value.is_none(),
            Expect::Present => value.is_some(),
            Expect::Value(expected) => value == Some(expected),
        };
        if !holds {
            return Err(Refusal::CheckFailed { check: index });
        }
    }
    for update in &request.updates {
        let place = (update.home, update.key.clone());
        match &update.change {
            Change::Put(value) => {
                objects.insert(place, value.clone());
            }
            Change::Delete => {
                objects.remove(&place);
            }
            Change::Add(amounts) => {
                let value = objects.entry(place).or_insert_with(|| Bytes::from([]));
                *value = added(value, amounts);
            }
        }
    }
    Ok(())
}

/// Whether the request keeps to the rules of [`lowtide_engine_core::op`].
fn is_proper(request: &Request) -> bool {
    let covers = |home: NodeId, key: &Key, mode: Mode| {
        request
            .locks
            .iter()
            .any(|want| want.home == home && want.mode >= mode && want.range.holds(key))
    };
    let mut seen = BTreeSet::new();
    request.updates.len() <= UPDATES_MAX
        && request.locks.iter().all(|w| w.range.lo <= w.range.hi)
        && request
            .checks
            .iter()
            .all(|c| c.key.name.len() <= NAME_MAX && covers(c.home, &c.key, Mode::Shared))
        && request.updates.iter().all(|u| {
            u.key.name.len() <= NAME_MAX
                && u.change.weight() <= VALUE_MAX
                && seen.insert((u.home, &u.key))
                && (matches!(u.change, Change::Add(_)) || covers(u.home, &u.key, Mode::Exclusive))
        })
}

/// Words of `value` and `amounts`, added one by one as [`Change::Add`] says.
fn added(value: &[u8], amounts: &[u8]) -> Bytes {
    const WORD: usize = 8;
    let word = |bytes: &[u8], i: usize| -> i64 {
        let mut word = [0; WORD];
        if let Some(bytes) = bytes.get(i * WORD..(i + 1) * WORD) {
            word.copy_from_slice(bytes);
        }
        i64::from_le_bytes(word)
    };
    let words = value.len().max(amounts.len()) / WORD;
    (0..words)
        .flat_map(|i| word(value, i).wrapping_add(word(amounts, i)).to_le_bytes())
        .collect()
}

/// Reads the objects of a stopped cluster.
pub trait Objects: Sync {
    /// Where objects may be.
    fn placement(&self) -> &Placement;

    /// One object.
    ///
    /// # Errors
    /// [`SessionError::Unavailable`] when the server's state cannot be read.
    fn get(&self, home: NodeId, key: &Key) -> Result<Option<Bytes>, SessionError>;

    /// Objects of a range in key order, as [`Session::scan`] says.
    ///
    /// # Errors
    /// [`SessionError::Unavailable`] when the server's state cannot be read.
    fn scan(
        &self,
        home: NodeId,
        range: Range,
        after: Option<&Key>,
        bytes_max: usize,
    ) -> Result<Page, SessionError>;
}

/// A session over the state of a stopped cluster. Every operation is answered with
/// [`SessionError::Closed`].
pub struct Offline<O: Objects> {
    objects: O,
}

impl<O: Objects> Offline<O> {
    /// A session that reads `objects`.
    pub fn new(objects: O) -> Offline<O> {
        Offline { objects }
    }
}

impl<O: Objects> Session for Offline<O> {
    fn placement(&self) -> &Placement {
        self.objects.placement()
    }

    fn life(&self) -> Life {
        Life::default()
    }

    fn submit(&self, _request: Request) -> Result<Ticket, SessionError> {
        Err(SessionError::Closed)
    }

    fn wait(&self, _ticket: Ticket) -> Result<Stamp, SessionError> {
        Err(SessionError::Closed)
    }

    fn wait_stable(&self) -> Result<(), SessionError> {
        Ok(())
    }

    fn read(&self, home: NodeId, key: &Key) -> Result<Option<Bytes>, SessionError> {
        self.objects.get(home, key)
    }

    fn scan(
        &self,
        home: NodeId,
        range: Range,
        after: Option<&Key>,
        bytes_max: usize,
    ) -> Result<Page, SessionError> {
        self.objects.scan(home, range, after, bytes_max)
    }
}
