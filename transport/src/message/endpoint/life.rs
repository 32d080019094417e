//! The life of a connection, from `connect` or a peer's REQ to `Closed`.
//!
//! Owns: what follows from the connection manager's news, and when a connection is over: see the
//! promises in the [module above](super::super).

use std::net::SocketAddr;

use lowtide_transport_proto::cm::CommId;
use lowtide_transport_proto::time::Nanos;
use lowtide_transport_proto::wire::{Mtu, Psn, Qpn};

use super::super::connection::Stream;
use super::super::fabric::Ends;
use super::super::handshake::{EndQp, Greeting, News};
use super::super::loans::Loans;
use super::super::outbox::Outbox;
use super::super::{CloseReason, Event};
use super::{Connection, EndpointCtx, Handler};

/// Slots of outgoing parcels that a connection may hold: twice what may be on the wire at once.
const SLOTS_MAX: usize = 16;
/// Protection domains of what single peers may reach.
const PEER_DOMAINS: u32 = 1 << 31;
/// How often silence is looked for, in parts of the time admitted.
const SILENCE_CHECKS: u64 = 8;

impl EndpointCtx {
    fn our_qp(&self, connection: &Connection, mtu: Mtu) -> EndQp {
        EndQp {
            qpn: connection.qpn,
            psn: connection.psn,
            mtu,
        }
    }

    fn our_greeting(&self, hello: &[u8]) -> Greeting {
        Greeting {
            node: self.config.node,
            incarnation: self.config.incarnation,
            credits: self.config.limits.credits,
            budget: self.device.receive_budget().min(u32::from(u16::MAX)) as u16,
            lid: self.device.lid(),
            hello: hello.to_vec(),
        }
    }

    /// Sends the REQ of a new connection, or a new one after the last was given up.
    pub(super) fn request(&mut self, index: u32) {
        let now = self.device.now();
        let Some(connection) = &self.connections[index as usize] else {
            return;
        };
        let peer = connection.peer;
        let ours = self.our_qp(connection, self.device.mtu_to(peer));
        let greeting = self.our_greeting(&connection.hello);
        if !self.handshakes.connect(now, index, peer, &ours, &greeting) {
            let id = connection.id;
            self.remove(index);
            self.refuse_later(id);
        }
    }

    /// Acts on what the connection manager has to say, and sends what it wants sent.
    pub(super) fn manage(&mut self, now: Nanos, handler: &mut Handler<'_>) {
        self.handshakes.handle_timeout(now);
        while let Some(news) = self.handshakes.poll_news(now) {
            match news {
                News::Request {
                    request,
                    from,
                    qp,
                    greeting,
                } => {
                    self.end_replaced(from, greeting.incarnation, handler);
                    self.accept(now, request, from, qp, greeting);
                }
                News::Accepted {
                    index,
                    qpn,
                    psn,
                    greeting,
                } => {
                    self.accepted(index, qpn, psn, greeting, handler);
                }
                News::Established { index } => self.establish(index, handler),
                News::Refused { index } => self.end(index, CloseReason::Refused, handler),
                News::Disconnected { index } => self.end(index, CloseReason::PeerClosed, handler),
                News::Unanswered { index } => match &self.connections[index as usize] {
                    Some(connection) if !connection.is_incoming => self.request(index),
                    _ => self.remove(index),
                },
                News::Complaint {
                    from,
                    qpn,
                    incarnation,
                } => {
                    self.believe(from, qpn, incarnation, handler);
                }
            }
        }
        while let Some((_, conn)) = self.refused.pop_front_if(|(due, _)| *due <= now) {
            handler(
                self,
                Event::Closed {
                    conn,
                    reason: CloseReason::Refused,
                },
            );
        }
        self.check_silence(now, handler);
        self.handshakes.transmit(&mut self.device);
    }

    /// Ends the connections with earlier incarnations of the process at `peer`.
    fn end_replaced(&mut self, peer: SocketAddr, incarnation: u64, handler: &mut Handler<'_>) {
        for index in 0..self.connections.len() as u32 {
            let is_replaced = self.connections[index as usize].as_ref().is_some_and(|c| {
                c.peer == peer
                    && c.greeting
                        .as_ref()
                        .is_some_and(|g| g.incarnation < incarnation)
            });
            if is_replaced {
                self.end(index, CloseReason::PeerRestarted, handler);
            }
        }
    }

    /// Answers a REQ: with a queue pair ready to work, or a refusal.
    fn accept(
        &mut self,
        now: Nanos,
        request: CommId,
        from: SocketAddr,
        theirs: EndQp,
        greeting: Greeting,
    ) {
        let hello = self.config.hello.clone();
        let is_outdated = self.connections.iter().flatten().any(|c| {
            let known = c.greeting.as_ref();
            c.peer == from && known.is_some_and(|g| g.incarnation > greeting.incarnation)
        });
        let index = if is_outdated {
            None
        } else {
            self.open(from, hello)
        };
        let Some(index) = index else {
            self.handshakes.refuse(now, request);
            return;
        };
        let mtu = theirs.mtu.min(self.device.mtu_to(from));
        if mtu < theirs.mtu {
            // The connection manager has no word for a smaller path MTU in a REP.
            self.remove(index);
            self.handshakes.refuse(now, request);
            return;
        }
        if !self.bring_up(index, theirs, greeting) {
            self.remove(index);
            self.handshakes.refuse(now, request);
            return;
        }
        let Some(connection) = &mut self.connections[index as usize] else {
            return;
        };
        connection.is_incoming = true;
        let connection = self.connections[index as usize]
            .as_ref()
            .expect("just opened");
        let ours = self.our_qp(connection, mtu);
        let answer = self.our_greeting(&connection.hello);
        if !self.handshakes.accept(now, request, index, &ours, &answer) {
            self.remove(index);
        }
    }

    /// The server has accepted.
    fn accepted(
        &mut self,
        index: u32,
        qpn: Qpn,
        psn: Psn,
        greeting: Greeting,
        handler: &mut Handler<'_>,
    ) {
        let Some(connection) = &self.connections[index as usize] else {
            return;
        };
        let peer = connection.peer;
        let mtu = self.device.mtu_to(peer);
        self.end_replaced(peer, greeting.incarnation, handler);
        // The handler may have closed this one too.
        if self.connections[index as usize].is_some() {
            if !self.bring_up(index, EndQp { qpn, psn, mtu }, greeting) {
                self.end(index, CloseReason::Failed, handler);
                return;
            }
            self.handshakes.establish(index);
            self.establish(index, handler);
        }
    }

    /// Moves the queue pair to RTS; false if the device knows no way to the peer.
    fn bring_up(&mut self, index: u32, theirs: EndQp, greeting: Greeting) -> bool {
        let Some(connection) = &mut self.connections[index as usize] else {
            return false;
        };
        connection.peer_qpn = theirs.qpn;
        // The serial numbers of connections stay below 2^31 for longer than anybody lives.
        let domain = PEER_DOMAINS | (connection.id.0 >> 24) as u32;
        let ends = Ends {
            peer: connection.peer,
            theirs,
            psn: connection.psn,
            budget: Some(u32::from(greeting.budget)).filter(|budget| *budget > 0),
            lid: greeting.lid,
            domain,
        };
        if !self.device.bring_up(connection.qp, &ends) {
            return false;
        }
        let outbox = Outbox::new(theirs.mtu.bytes() as usize, SLOTS_MAX);
        let granted = self.config.limits.credits;
        connection.stream = Some(Stream::new(
            connection.qp,
            outbox,
            Loans::new(domain),
            greeting.credits,
            granted,
        ));
        connection.greeting = Some(greeting);
        true
    }

    /// Both sides are ready: from now on the connection exists for the caller.
    pub(super) fn establish(&mut self, index: u32, handler: &mut Handler<'_>) {
        let Some(connection) = &mut self.connections[index as usize] else {
            return;
        };
        if connection.is_established || connection.stream.is_none() {
            return;
        }
        connection.is_established = true;
        connection.heard = self.device.now();
        let greeting = connection
            .greeting
            .as_ref()
            .expect("known since the queue pair came up");
        let hello = greeting.hello.clone();
        let event = Event::Connected {
            conn: connection.id,
            peer: connection.peer,
            node: greeting.node,
            incarnation: greeting.incarnation,
            is_incoming: connection.is_incoming,
            hello: &hello,
        };
        self.handshakes.communication(index);
        handler(self, event);
    }

    /// A peer says that it does not have the queue pair we send to.
    fn believe(&mut self, from: SocketAddr, qpn: Qpn, incarnation: u64, handler: &mut Handler<'_>) {
        for index in 0..self.connections.len() as u32 {
            let Some(connection) = &self.connections[index as usize] else {
                continue;
            };
            let Some(known) = connection.greeting.as_ref().map(|g| g.incarnation) else {
                continue;
            };
            if connection.peer != from || connection.peer_qpn != qpn || incarnation < known {
                continue;
            }
            let reason = match incarnation > known {
                true => CloseReason::PeerRestarted,
                false => CloseReason::PeerClosed,
            };
            self.end(index, reason, handler);
        }
    }

    /// Closes connections whose peer owes an answer for too long, if that is asked for.
    fn check_silence(&mut self, now: Nanos, handler: &mut Handler<'_>) {
        let Some(silence_max) = self.config.silence_max else {
            return;
        };
        if now < self.next_silence_check {
            return;
        }
        let silence_max = Nanos(silence_max.as_nanos() as u64);
        self.next_silence_check = now + Nanos(silence_max.0 / SILENCE_CHECKS);
        for index in 0..self.connections.len() as u32 {
            let is_silent = self.connections[index as usize].as_ref().is_some_and(|c| {
                let is_owed = c
                    .stream
                    .as_ref()
                    .is_some_and(|s| s.outbox.posted() > 0 || s.inbox.is_reading());
                is_owed && now.since(c.heard) > silence_max
            });
            if is_silent {
                self.end(index, CloseReason::Silent, handler);
            }
        }
    }

    pub(super) fn next_timeout(&self) -> Option<Nanos> {
        let silence = self.config.silence_max.map(|_| self.next_silence_check);
        [
            self.device.next_timeout(),
            self.handshakes.next_timeout(),
            self.refused.front().map(|(due, _)| *due),
            self.next_retry,
            silence,
        ]
        .into_iter()
        .flatten()
        .min()
    }
}
