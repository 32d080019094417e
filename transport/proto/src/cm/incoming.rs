//! What each message from a peer does to its connection.
//!
//! Owns: the transitions that a message causes, and what is known by them to be a duplicate or of
//! an earlier life. Deliberately absent: whether a datagram is a message at all (`mad`).

use core::net::SocketAddr;

use super::*;

impl Cm {
    pub(super) fn handle_req(
        &mut self,
        now: Nanos,
        from: SocketAddr,
        tid: u64,
        req: &Req<'_>,
    ) -> CmOutcome {
        if let Some(&id) = self.requests.get(&(from.ip(), req.local))
            && let Some(old) = self.connections.get(&id)
        {
            if (old.tid, old.remote_qpn) == (tid, req.qpn) {
                return self.repeat(id, 0);
            }
            // The peer has begun a new life and reuses its ids: the old connection is dead.
            self.end_stale(id);
        }
        if let Some(&id) = self.remote_qps.get(&(from, req.qpn)) {
            // It reuses a queue pair that is connected here: the same.
            self.end_stale(id);
        }
        let refusal = match (self.services.contains(&req.service), req.transport) {
            (true, 0) => reason::NO_RESOURCES,
            (true, _) => reason::INVALID_TRANSPORT,
            (false, _) => reason::INVALID_SERVICE_ID,
        };
        let id = match self.allocate(self.callers_max()) {
            Ok(id) if refusal == reason::NO_RESOURCES => id,
            _ => {
                self.reject_unknown(from, tid, CommId(0), req.local, 0, refusal);
                return CmOutcome::Accepted;
            }
        };
        let connection = Connection {
            remote: req.local,
            remote_qpn: req.qpn,
            is_client: false,
            give_up: now + self.config.give_up_after,
            ..Connection::new(CmState::ReqReceived, from, tid)
        };
        self.connections.insert(id, connection);
        self.requests.insert((from.ip(), req.local), id);
        self.remote_qps.insert((from, req.qpn), id);
        self.set_due(id, Some(now + self.config.give_up_after));
        let request = ConnectRequest {
            from,
            service: req.service,
            source_port: req.cma.map(|cma| cma.source_port),
            ca_guid: req.ca_guid,
            qp: QpOffer {
                qpn: req.qpn,
                psn: req.psn,
                responder_resources: req.responder_resources,
                initiator_depth: req.initiator_depth,
                rnr_retry: req.rnr_retry,
            },
            mtu: req.mtu,
            retry_count: req.retry_count,
            ack_timeout: req.ack_timeout,
            private_data: req.private_data.to_vec(),
        };
        self.events
            .push_back(CmEvent::ConnectRequest { id, request });
        CmOutcome::Accepted
    }

    /// A request or reply came again: what we answered, if we did, was lost.
    pub(super) fn repeat(&mut self, id: CommId, message: u8) -> CmOutcome {
        match self.connections.get(&id).map(|c| c.state) {
            Some(CmState::ReqReceived | CmState::RepReceived) => self.delay(id, message),
            Some(CmState::RepSent | CmState::TimeWait) => self.send(id),
            _ => return CmOutcome::Stale,
        }
        CmOutcome::Accepted
    }

    /// The peer's host has forgotten the connection.
    pub(super) fn end_stale(&mut self, id: CommId) {
        let state = self.connections.get(&id).map(|c| c.state);
        self.forget(id);
        if state.is_some_and(|state| state != CmState::TimeWait) {
            self.events.push_back(CmEvent::Disconnected { id });
        }
    }

    pub(super) fn handle_rep(&mut self, from: SocketAddr, tid: u64, rep: &Rep<'_>) -> CmOutcome {
        let Some(connection) = self.of_peer(rep.remote, from) else {
            // We have forgotten that we asked; the server need not wait.
            self.reject_unknown(from, tid, rep.remote, rep.local, 1, reason::INVALID_COMM_ID);
            return CmOutcome::Stale;
        };
        match connection.state {
            CmState::ReqSent => {
                connection.state = CmState::RepReceived;
                connection.remote = rep.local;
                connection.remote_qpn = rep.qpn;
                self.set_due(rep.remote, None);
                self.events.push_back(CmEvent::Accepted {
                    id: rep.remote,
                    qp: QpOffer {
                        qpn: rep.qpn,
                        psn: rep.psn,
                        responder_resources: rep.responder_resources,
                        initiator_depth: rep.initiator_depth,
                        rnr_retry: rep.rnr_retry,
                    },
                    ca_guid: rep.ca_guid,
                    private_data: rep.private_data.to_vec(),
                });
                CmOutcome::Accepted
            }
            CmState::Established if connection.is_client && connection.remote == rep.local => {
                // Our RTU was lost.
                self.send(rep.remote);
                CmOutcome::Accepted
            }
            CmState::RepReceived if connection.remote == rep.local => self.repeat(rep.remote, 1),
            _ => CmOutcome::Stale,
        }
    }

    /// The peer asks for time: the next repetition waits that long, and giving up too.
    pub(super) fn handle_mra(
        &mut self,
        now: Nanos,
        from: SocketAddr,
        id: CommId,
        timeout: u8,
    ) -> CmOutcome {
        // An exponent of 31 would be hours; no peer of ours needs more than a minute.
        let wait = Nanos::from_ib_exponent(timeout.min(24));
        match self.of_peer(id, from) {
            Some(c) if matches!(c.state, CmState::ReqSent | CmState::RepSent) => {
                c.give_up = c.give_up.max(now + wait + RESEND_MAX);
                self.set_due(id, Some(now + wait));
                CmOutcome::Accepted
            }
            _ => CmOutcome::Stale,
        }
    }

    pub(super) fn handle_rej(&mut self, from: SocketAddr, rej: &Rej<'_>) -> CmOutcome {
        use CmState::{DreqSent, Established, RepReceived, RepSent, ReqReceived, ReqSent};
        let id = if rej.remote == CommId(0) {
            // A client that withdraws before it knows our id.
            self.requests.get(&(from.ip(), rej.local)).copied()
        } else {
            Some(rej.remote)
        };
        let Some((id, connection)) = id.and_then(|id| Some((id, self.of_peer(id, from)?))) else {
            return CmOutcome::Stale;
        };
        match connection.state {
            ReqSent | ReqReceived | RepSent | RepReceived => {}
            // The server gave up waiting for our RTU, or has forgotten the connection.
            Established | DreqSent if connection.remote == rej.local => {
                self.end_stale(id);
                return CmOutcome::Accepted;
            }
            _ => return CmOutcome::Stale,
        }
        self.forget(id);
        self.events.push_back(CmEvent::Rejected {
            id,
            reason: rej.reason,
            private_data: rej.private_data.to_vec(),
        });
        CmOutcome::Accepted
    }

    pub(super) fn handle_rtu(&mut self, from: SocketAddr, id: CommId) -> CmOutcome {
        match self.of_peer(id, from) {
            Some(c) if c.state == CmState::RepSent => {
                self.handle_communication(id);
                CmOutcome::Accepted
            }
            _ => CmOutcome::Stale,
        }
    }

    pub(super) fn handle_dreq(
        &mut self,
        now: Nanos,
        from: SocketAddr,
        tid: u64,
        remote: CommId,
        id: CommId,
    ) -> CmOutcome {
        let drep = Message::Drep { local: id, remote }.encode(tid);
        let Some(connection) = self.of_peer(id, from).filter(|c| c.remote == remote) else {
            // Unknown or forgotten: it is as disconnected as can be.
            self.transmits.push_back(CmTransmit {
                to: from,
                mad: drep,
            });
            return CmOutcome::Stale;
        };
        let is_news = connection.state != CmState::TimeWait;
        connection.sent = drep;
        self.send(id);
        if is_news {
            self.wind_down(now, id);
            self.events.push_back(CmEvent::Disconnected { id });
        }
        CmOutcome::Accepted
    }

    pub(super) fn handle_drep(&mut self, now: Nanos, from: SocketAddr, id: CommId) -> CmOutcome {
        match self.of_peer(id, from) {
            Some(c) if c.state == CmState::DreqSent => {
                self.wind_down(now, id);
                self.events.push_back(CmEvent::Disconnected { id });
                CmOutcome::Accepted
            }
            _ => CmOutcome::Stale,
        }
    }
}
