//! One step of one node: an input, its effects, and the checks that follow every step.

use std::collections::BTreeSet;

use lowtide_engine_core::effect::{Effect, Port};
use lowtide_engine_core::ids::{Life, Step, Time};
use lowtide_engine_core::message::{Envelope, Message, Reclaim};
use lowtide_engine_core::op::{Range, Refusal};
use lowtide_engine_core::root::RootState;
use lowtide_engine_core::session::SessionError;
use lowtide_engine_core::wire;

use crate::app::Ask;
use crate::plan::Index;
use crate::probe::Probe;
use crate::scenario::TICKETS;
use crate::world::{Core, Event, World};

impl Core {
    /// Identity, epoch and minimum; `None` when down.
    #[must_use]
    pub fn port(&self) -> Option<&Port> {
        match self {
            Core::Down => None,
            Core::Root(c) => Some(c.port()),
            Core::Destination(c) => Some(c.port()),
            Core::Proxy(c) => Some(c.port()),
            Core::Client(c) => Some(c.port()),
            Core::Aggregator(c) => Some(c.port()),
        }
    }

    fn poll_effect(&mut self) -> Option<Effect> {
        match self {
            Core::Down => None,
            Core::Root(c) => c.poll_effect(),
            Core::Destination(c) => c.poll_effect(),
            Core::Proxy(c) => c.poll_effect(),
            Core::Client(c) => c.poll_effect(),
            Core::Aggregator(c) => c.poll_effect(),
        }
    }

    /// Newest step of a destination.
    fn step(&self) -> Step {
        match self {
            Core::Destination(c) => c.step(),
            _ => Step(0),
        }
    }

    fn poll_timeout(&self) -> Option<Time> {
        match self {
            Core::Down => None,
            Core::Root(c) => Some(c.poll_timeout()),
            Core::Destination(c) => Some(c.poll_timeout()),
            Core::Proxy(c) => Some(c.poll_timeout()),
            Core::Client(c) => Some(c.poll_timeout()),
            Core::Aggregator(c) => Some(c.poll_timeout()),
        }
    }

    fn handle_message(&mut self, now: Time, envelope: Envelope) {
        match self {
            Core::Down => {}
            Core::Root(c) => c.handle_message(now, envelope),
            Core::Destination(c) => c.handle_message(now, envelope),
            Core::Proxy(c) => c.handle_message(now, envelope),
            Core::Client(c) => c.handle_message(now, envelope),
            Core::Aggregator(c) => c.handle_message(now, envelope),
        }
    }
}

impl World {
    /// A home learns what is free.
    fn before_message(&mut self, node: Index) {
        let n = &mut self.nodes[node];
        if let Core::Destination(c) = &mut n.core {
            c.handle_space(n.shards.space(&n.disk));
        }
    }

    pub(crate) fn timer(&mut self, node: Index) {
        let now = self.time();
        let n = &mut self.nodes[node];
        if n.timer_at > self.now {
            return;
        }
        n.timer_at = u64::MAX;
        match &mut n.core {
            Core::Down => {}
            Core::Root(c) => c.handle_timeout(now),
            Core::Destination(c) => {
                c.handle_space(n.shards.space(&n.disk));
                c.handle_timeout(now);
            }
            Core::Proxy(c) => c.handle_timeout(now),
            Core::Client(c) => c.handle_timeout(now),
            Core::Aggregator(c) => c.handle_timeout(now),
        }
        self.after(node);
    }

    pub(crate) fn wake(&mut self, node: Index) {
        self.nodes[node].wake_at = u64::MAX;
        self.after(node);
    }

    pub(crate) fn synced(&mut self, node: Index) {
        let now = self.time();
        let n = &mut self.nodes[node];
        let Some(upto) = n.disk.syncing.take() else {
            return;
        };
        n.disk.synced = upto;
        let id = n.id;
        if !self.swapped.contains_key(&node) {
            self.oracle.synced(id, upto);
        }
        let n = &mut self.nodes[node];
        if let Core::Destination(c) = &mut n.core {
            c.handle_space(n.shards.space(&n.disk));
            c.handle_durable(now, upto);
        }
        self.note(3, || format!("{id} log durable to {upto}"));
        if self.nodes[node].disk.apply_checkpoint() {
            self.note(4, || format!("{id} checkpoint applied"));
        }
        self.after(node);
    }

    pub(crate) fn persisted(&mut self, node: Index) {
        let now = self.time();
        let Some(version) = self.nodes[node].root_disk.complete() else {
            return;
        };
        match RootState::decode(&self.nodes[node].root_disk.durable) {
            Ok(state) => {
                self.evictions_persisted(&state);
                self.oracle.minimum_persisted(state.minimum());
            }
            Err(e) => self.oracle.fail(format!("root state does not decode: {e}")),
        }
        if let Core::Root(c) = &mut self.nodes[node].core {
            c.handle_persisted(now, version);
        }
        self.after(node);
    }

    /// Lives whose eviction is durably decided and carried out count as GONE: what the root does
    /// before its state is durable may be forgotten in a crash.
    pub(crate) fn evictions_persisted(&mut self, state: &RootState) {
        // From RELEASING on, because homes release the locks one by one.
        let open = state.evictions().filter(|(_, stage)| *stage != "RELEASING");
        let now: BTreeSet<Life> = open.map(|(life, _)| life).collect();
        let done: Vec<Life> = self.evicting.difference(&now).copied().collect();
        self.evicting = now;
        for life in done {
            self.progress += 1;
            self.oracle.resolved(life);
        }
        // An eviction that needs nobody's answer is over within one state.
        let view = state.view();
        if view.id == self.seen_view {
            return;
        }
        self.seen_view = view.id;
        let sources = view.seats.iter().filter(|s| s.role.is_volatile_source());
        self.lives.extend(sources.map(|s| s.life));
        let over = |life: &&Life| {
            let seat = view.seat(life.node);
            seat.is_some_and(|s| s.life > **life || (s.life == **life && !s.live))
                && !self.evicting.contains(life)
                && !self.oracle.is_gone(**life)
        };
        let done: Vec<Life> = self.lives.iter().filter(over).copied().collect();
        for life in done {
            self.oracle.resolved(life);
        }
    }

    pub(crate) fn connected(&mut self, node: Index, peer: Index) {
        let now = self.time();
        let id = self.nodes[peer].id;
        let n = &mut self.nodes[node];
        match &mut n.core {
            Core::Destination(c) => c.handle_connected(id),
            Core::Aggregator(c) => c.handle_connected(id),
            Core::Proxy(c) => c.handle_connected(now, id),
            Core::Client(c) => c.handle_connected(now, id),
            _ => {}
        }
        let own = n.id;
        self.note(1, || format!("{own} connected to {id}"));
        self.after(node);
    }

    pub(crate) fn disconnected(&mut self, node: Index, peer: Index) {
        let id = self.nodes[peer].id;
        let n = &mut self.nodes[node];
        match &mut n.core {
            Core::Destination(c) => c.handle_disconnected(id),
            Core::Proxy(c) => c.handle_disconnected(id),
            Core::Client(c) => c.handle_disconnected(id),
            _ => {}
        }
        let own = n.id;
        self.note(2, || format!("{own} lost {id}"));
        self.after(node);
    }

    pub(crate) fn receive(&mut self, node: Index, peer: Index, bytes: &[u8]) {
        let envelope: Envelope = match wire::decode(bytes, "envelope") {
            Ok(envelope) => envelope,
            Err(e) => {
                return self
                    .oracle
                    .fail(format!("an envelope does not decode: {e}"));
            }
        };
        let digest = bytes.chunks(64).fold(bytes.len() as u64, |h, c| {
            c.iter()
                .fold(h, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
        });
        let own = self.nodes[node].id;
        let health = envelope.body.is_urgent();
        self.note(digest, || {
            if health {
                return String::new();
            }
            let Envelope {
                from,
                epoch,
                minimum,
                body,
                ..
            } = &envelope;
            format!("{own} <- {from} {epoch} m {} {body:?}", minimum.0)
        });
        self.watch_delivery(node, peer, &envelope);
        let (epoch, from) = (envelope.epoch, envelope.from);
        let completing = matches!(envelope.body, Message::Complete { .. });
        self.before_message(node);
        let granted = match &envelope.body {
            Message::Granted { home, range, .. } => Some((*home, *range)),
            _ => None,
        };
        let now = self.time();
        let n = &mut self.nodes[node];
        let before = n.core.step();
        n.core.handle_message(now, envelope);
        if completing {
            let steps = before.0 + 1..=n.core.step().0;
            n.shards.completing.extend(steps.map(Step));
        }
        if n.core.port().is_some_and(|p| p.epoch() < epoch) {
            self.oracle
                .fail(format!("I2: {own} is behind a message of {from}"));
        }
        self.after(node);
        if let Some((home, range)) = granted {
            self.check_grant(node, home, range);
        }
    }

    /// Probes that a delivery may hit.
    fn watch_delivery(&mut self, node: Index, peer: Index, envelope: &Envelope) {
        match &envelope.body {
            Message::Open { reclaim, .. } => {
                let restarted = self.nodes[node].boot > 1 && !reclaim.is_empty();
                let home = matches!(self.nodes[node].core, Core::Destination(_));
                self.probes
                    .hit_if(Probe::ReclaimAfterRestart, restarted && home);
            }
            Message::Pin { .. } => {
                self.pins.insert((peer, node));
            }
            Message::Unpin { .. } => {
                self.pins.remove(&(peer, node));
            }
            Message::Refused { .. } => self.hit(Probe::RefusedFull),
            Message::Part { life } => {
                self.parted.insert(*life);
            }
            Message::Report { covers, .. } if !covers.is_empty() => {
                self.hit(Probe::CoveredByAggregator);
            }
            Message::Lock { .. } if self.is_proxy(peer) => {
                self.nodes[node].originate.1 = peer as u64;
            }
            _ => {}
        }
    }

    pub(crate) fn is_proxy(&self, node: Index) -> bool {
        (self.plan.first_proxy()..self.plan.first_client()).contains(&node)
    }

    pub(crate) fn is_destination(&self, node: Index) -> bool {
        (self.plan.first_destination()..self.plan.first_proxy()).contains(&node)
    }

    /// Carries out effects, feeds the application, reports to the oracle, sets timers.
    pub(crate) fn after(&mut self, node: Index) {
        self.pass_orders(node);
        loop {
            while let Some(effect) = self.nodes[node].core.poll_effect() {
                self.report(node);
                self.carry_out(node, effect);
            }
            if matches!(self.nodes[node].core, Core::Down) || !self.feed(node) {
                break;
            }
        }
        self.report(node);
        self.compare_lives(node);
        self.start_sync(node);
        self.set_timers(node);
    }

    fn carry_out(&mut self, node: Index, effect: Effect) {
        let answer = matches!(
            effect,
            Effect::Outcome { .. } | Effect::Value { .. } | Effect::Listing { .. }
        );
        self.progress += u64::from(answer);
        self.check_quiet(node, &effect);
        match effect {
            Effect::Send { to, envelope } => {
                let home = self.is_destination(node);
                if self.swapped.contains_key(&node) {
                    if !matches!(envelope.body, Message::Join { .. }) {
                        let id = self.nodes[node].id;
                        let text = format!("D11: {id} on a wrong disk says {:?}", envelope.body);
                        return self.oracle.fail(text);
                    }
                } else {
                    self.watch_room(node, to, &envelope.body);
                    self.oracle
                        .sent(envelope.from, home, envelope.epoch, envelope.minimum);
                }
                if let Message::Progress { streams, .. } = &envelope.body
                    && home
                {
                    self.oracle.committed(self.nodes[node].id, streams);
                }
                let Some(&peer) = self.by_id.get(&to) else {
                    return self
                        .oracle
                        .fail(format!("a message to {to}, which nobody is"));
                };
                if matches!(envelope.body, Message::Revoke { .. }) && home && self.is_proxy(peer) {
                    let asker = self.nodes[node].originate.1;
                    let fought = asker != 0 && asker != peer as u64;
                    self.probes.hit_if(Probe::ProxiesFoughtForALock, fought);
                }
                self.transmit(node, peer, &envelope);
            }
            Effect::Connect(to) => {
                if let Some(&peer) = self.by_id.get(&to) {
                    if node >= self.plan.first_client() && self.is_destination(peer) {
                        let number = peer - self.plan.first_destination();
                        let plan = &self.plan.clients[node - self.plan.first_client()];
                        let bypassed = plan.via.iter().any(|(home, _)| *home == number);
                        self.probes.hit_if(Probe::ProxyBypassed, bypassed);
                    }
                    self.want(node, peer);
                }
            }
            Effect::Outcome { ticket, result } => {
                if ticket.0 >= TICKETS {
                    self.outcomes.insert(ticket, result);
                    return;
                }
                let n = &mut self.nodes[node];
                if let Core::Proxy(_) = n.core {
                    n.originate.1 = n.originate.1.saturating_sub(1);
                    return;
                }
                if let Ok(stamp) = &result {
                    n.acknowledged = n.acknowledged.max(stamp.id.seq);
                }
                let lost = matches!(
                    result,
                    Err(SessionError::Refused(Refusal::CheckFailed { .. }))
                );
                self.probes.hit_if(Probe::CheckLostRace, lost);
                if let Some(app) = &mut n.app {
                    app.outcome(ticket, result.is_ok(), result.err());
                }
            }
            Effect::Value { ticket, result } => {
                if ticket.0 >= TICKETS {
                    self.found.extend(result.ok().map(|value| (ticket, value)));
                    return;
                }
                let n = &mut self.nodes[node];
                let life = n.life;
                let (Some(app), Ok(value)) = (&mut n.app, result) else {
                    return;
                };
                if let Some(seen) = app.value(ticket, value) {
                    self.oracle.seen(life, &seen);
                }
            }
            Effect::Listing { ticket, result } => {
                let n = &mut self.nodes[node];
                let life = n.life;
                let (Some(app), Ok(page)) = (&mut n.app, result) else {
                    return;
                };
                if let Some(seen) = app.listing(ticket, page) {
                    self.oracle.seen(life, &seen);
                }
            }
            Effect::Persist { version, state } => {
                let n = &mut self.nodes[node];
                n.root_disk.pending.push_back((version, state));
                let boot = n.boot;
                let delay = self.sync_delay(node);
                // Completions are handled in order because each one completes the oldest state.
                self.at(self.now + delay, Event::Persisted { node, boot });
            }
            Effect::Evicted => self.evicted(node),
            Effect::Rejected(reason) => self.rejected(node, reason),
        }
    }

    /// At rest nodes send pings and their answers, and the root writes nothing.
    fn check_quiet(&mut self, node: Index, effect: &Effect) {
        let is_health = match effect {
            Effect::Send { envelope, .. } => envelope.body.is_urgent(),
            _ => false,
        };
        if self.is_quiet && !is_health {
            let id = self.nodes[node].id;
            self.oracle.fail(format!("idle: {id} does {effect:?}"));
        }
    }

    /// Lets the application go on; whether it asked for anything.
    fn feed(&mut self, node: Index) -> bool {
        let now = self.time();
        let n = &mut self.nodes[node];
        let (Core::Client(client), Some(app)) = (&mut n.core, &mut n.app) else {
            return self.feed_proxy(node);
        };
        let Some(ask) = app.poll(now.0) else {
            return false;
        };
        match ask {
            Ask::Submit(ticket, request) => client.submit(now, ticket, request),
            Ask::Read(ticket, home, key) => client.read(now, ticket, home, key),
            Ask::Scan(ticket, home, range) => client.scan(now, ticket, (home, range), None, 4096),
        }
        if let Some(text) = app.complaint.take() {
            self.oracle.fail(text);
        }
        true
    }

    /// Every member is counted, and what it counts with covers what it has not finished.
    fn check_counted(&mut self) {
        let Core::Root(root) = &self.nodes[0].core else {
            return;
        };
        for n in &self.nodes {
            let source = matches!(n.core, Core::Client(_) | Core::Proxy(_));
            if source && root.is_member(n.life) && root.counts(n.life).is_none() {
                let text = format!("I12: member {} is not counted", n.life);
                return self.oracle.fail(text);
            }
        }
        self.oracle.counted(|life| root.counts(life));
        let begun = root.evictions().map(|(life, _)| life);
        let begun: Vec<Life> = begun.filter(|life| self.begun.insert(*life)).collect();
        // Whoever holds m back while a log is full is evicted though it is heard.
        if root.counters().held_back == 0 {
            self.check_silent(&begun);
        }
    }

    /// I42: where nothing has disturbed for most of the time that silence may last, nobody who runs
    /// is silent, whatever was restarted before.
    fn check_silent(&mut self, evicted: &[Life]) {
        let calm = self.now.saturating_sub(self.disturbed_until);
        if 4 * calm <= 3 * self.plan.evict_after {
            return;
        }
        let runs = |life: &&Life| {
            let node = self.by_id.get(&life.node).map(|&node| &self.nodes[node]);
            node.is_some_and(|n| n.life == **life && !matches!(n.core, Core::Down))
                && !self.parted.contains(life)
        };
        if let Some(life) = evicted.iter().find(runs) {
            let text = format!("I42: {life} runs and is evicted {calm} ticks after the last fault");
            self.oracle.fail(text);
        }
    }

    /// Tells the oracle what this step did.
    fn report(&mut self, node: Index) {
        let n = &mut self.nodes[node];
        let Some(port) = n.core.port() else {
            return;
        };
        let (epoch, life) = (port.epoch(), port.life());
        if epoch < n.epoch {
            let text = format!("I1: {} falls from {} to {epoch}", n.id, n.epoch);
            self.oracle.fail(text);
        }
        n.epoch = epoch;
        n.life = life;
        n.newest = n.newest.max(life.incarnation);
        match &n.core {
            Core::Client(c) => {
                let known = self.oracle.known(life);
                for op in c.stamped_after(known) {
                    self.oracle.stamped(op);
                }
                self.oracle.covered(life, c.bound());
                self.oracle.held(life, |op| c.holds(op));
            }
            Core::Proxy(c) => {
                let known = self.oracle.known(life);
                for op in c.stamped_after(known) {
                    self.oracle.stamped(op);
                }
                self.oracle.covered(life, c.bound());
                self.oracle.held(life, |op| c.holds(op));
            }
            Core::Destination(_) if self.swapped.contains_key(&node) => {}
            Core::Destination(front) => {
                // In the order of steps, hence only as far as every shard has come.
                let executed = n.shards.executed(front);
                let records = n.disk.records(n.reported, executed);
                n.reported = executed;
                if !records.is_empty() {
                    let id = n.id;
                    if self.is_quiet {
                        self.oracle.fail(format!("idle: {id} writes {records:?}"));
                    }
                    let completed = self.oracle.tally.completed;
                    self.oracle.appended(id, &records, &n.shards.completing);
                    n.shards.completing.retain(|step| *step > executed);
                    let restarted = self.nodes[node].boot > 1;
                    let more = self.oracle.tally.completed > completed;
                    self.probes
                        .hit_if(Probe::CompletedAtRestartedHome, more && restarted);
                }
            }
            Core::Root(_) => self.check_counted(),
            _ => {}
        }
    }

    pub(crate) fn sync_delay(&mut self, node: Index) -> u64 {
        let factor = if self.nodes[node].slow_until > self.now {
            10
        } else {
            1
        };
        factor * (1 + self.rng.below(self.plan.sync_max))
    }

    fn start_sync(&mut self, node: Index) {
        let n = &mut self.nodes[node];
        let Core::Destination(front) = &n.core else {
            return;
        };
        let newest = n.disk.newest(n.shards.executed(front));
        let disk = &mut n.disk;
        if disk.syncing.is_none() && newest > disk.synced {
            disk.syncing = Some(newest);
            if self.stalled.contains(&node) {
                return;
            }
            let boot = self.nodes[node].boot;
            let delay = self.sync_delay(node);
            self.at(self.now + delay, Event::Synced { node, boot });
        }
    }

    fn set_timers(&mut self, node: Index) {
        let n = &self.nodes[node];
        let boot = n.boot;
        if let Some(at) = n.core.poll_timeout() {
            let at = at.0.max(self.now + 1);
            if at < n.timer_at {
                self.nodes[node].timer_at = at;
                self.at(at, Event::Timer { node, boot });
            }
        }
        let n = &self.nodes[node];
        if let Some(at) = n.app.as_ref().and_then(|a| a.wake_at()) {
            let at = at.max(self.now + 1);
            if at < n.wake_at {
                self.nodes[node].wake_at = at;
                self.at(at, Event::Wake { node, boot });
            }
        }
    }

    /// Locks that a process holds for work of its own.
    pub(crate) fn leaf_locks(&self, node: Index) -> Vec<Reclaim> {
        match &self.nodes[node].core {
            Core::Client(c) => c.holdings().claims(|_| true),
            Core::Proxy(c) => {
                let own = c.port().life();
                let grants = c.locks().grants().filter(|g| g.2 == own);
                grants
                    .map(|(home, space, _, mode, lo, hi)| Reclaim {
                        home,
                        range: Range { space, lo, hi },
                        mode,
                        grant: Default::default(),
                    })
                    .collect()
            }
            _ => Vec::new(),
        }
    }

    /// A grant arrived: nobody else holds anything that conflicts (L1, I25), and what others wrote
    /// beneath it is finished (`commit_on_share`).
    fn check_grant(&mut self, node: Index, home: lowtide_engine_core::ids::NodeId, range: Range) {
        let life = self.nodes[node].life;
        let mine: Vec<Reclaim> = self.leaf_locks(node);
        let mine: Vec<Reclaim> = mine
            .into_iter()
            .filter(|c| c.home == home && c.range.overlaps(&range))
            .collect();
        if mine.is_empty() {
            return;
        }
        let mut others: Vec<(Life, Vec<Reclaim>)> = Vec::new();
        for index in 0..self.nodes.len() {
            if index != node {
                others.push((self.nodes[index].life, self.leaf_locks(index)));
            }
        }
        let frozen = self.oracle.frozen_locks().iter();
        others.extend(frozen.map(|(l, c)| (*l, c.clone())));
        for claim in &mine {
            for (other, claims) in &others {
                for theirs in claims {
                    self.oracle.exclusive((life, claim), (*other, theirs));
                }
            }
            if matches!(self.nodes[node].core, Core::Client(_)) {
                self.oracle.granted(life, home, &claim.range);
            }
        }
    }
}
