//! Where a datagram queue pair is: SIDR_REQ and SIDR_REP.
//!
//! An inquiry is kept as a connection whose `remote` is the client's id of the request, and that
//! ends with the answer. Deliberately absent: redirection to another port.

use super::*;

impl Cm {
    /// Report inquiries for `service` from now on; others are answered "unsupported".
    pub fn listen_datagram(&mut self, service: ServiceId) {
        self.datagram_services.insert(service);
    }

    /// Answer inquiries for `service` "unsupported" again.
    pub fn unlisten_datagram(&mut self, service: ServiceId) {
        self.datagram_services.remove(&service);
    }

    /// Client: ask for the datagram queue pair of a service.
    ///
    /// # Errors
    ///
    /// [`CmError::PrivateDataTooLong`], [`CmError::TooManyConnections`].
    pub fn resolve(&mut self, now: Nanos, params: &ResolveParams<'_>) -> Result<CommId, CmError> {
        if params.private_data.len() > SIDR_REQ_PRIVATE_MAX {
            return Err(CmError::PrivateDataTooLong);
        }
        let id = self.allocate(self.config.connections_max)?;
        let message = Message::SidrReq(SidrReq {
            request: id,
            pkey: PKEY_DEFAULT,
            service: params.service,
            cma: Some(CmaHeader {
                source_port: params.source_port,
                source: self.config.local,
                target: params.to.ip(),
            }),
            private_data: params.private_data,
        });
        let tid = self.tid(id);
        let connection = Connection {
            sent: message.encode(tid),
            ..Connection::new(CmState::SidrReqSent, params.to, tid)
        };
        self.connections.insert(id, connection);
        self.send_awaiting(now, id);
        Ok(id)
    }

    /// Server: say where the datagram queue pair is, or why there is none (a status of
    /// [`sidr_status`]; queue pair and Q_Key then do not matter).
    ///
    /// # Errors
    ///
    /// [`CmError`]; nothing was sent.
    pub fn answer(
        &mut self,
        now: Nanos,
        id: CommId,
        status: u8,
        (qpn, qkey): (Qpn, u32),
        private_data: &[u8],
    ) -> Result<(), CmError> {
        if private_data.len() > SIDR_REP_PRIVATE_MAX {
            return Err(CmError::PrivateDataTooLong);
        }
        let connection = self.in_state(id, &[CmState::SidrReqReceived])?;
        let rep = Message::SidrRep(SidrRep {
            request: connection.remote,
            status,
            qpn,
            // What was asked waits where the answer will be.
            service: asked_service(&connection.sent),
            qkey,
            private_data,
        });
        connection.sent = rep.encode(connection.tid);
        self.send(id);
        self.wind_down(now, id);
        Ok(())
    }

    pub(super) fn handle_sidr_req(
        &mut self,
        now: Nanos,
        from: SocketAddr,
        tid: u64,
        req: &SidrReq<'_>,
    ) -> CmOutcome {
        if let Some(&id) = self.inquiries.get(&(from.ip(), req.request))
            && let Some(old) = self.connections.get(&id)
        {
            if old.tid == tid {
                // There is no word to ask for patience; the client will ask again.
                return self.repeat(id, 0);
            }
            self.end_stale(id);
        }
        if !self.datagram_services.contains(&req.service) {
            let rep = Message::SidrRep(SidrRep {
                request: req.request,
                status: sidr_status::UNSUPPORTED,
                qpn: Qpn::new(0),
                service: req.service,
                qkey: 0,
                private_data: &[],
            });
            let mad = rep.encode(tid);
            self.transmits.push_back(CmTransmit { to: from, mad });
            return CmOutcome::Accepted;
        }
        let Ok(id) = self.allocate(self.callers_max()) else {
            return CmOutcome::Busy;
        };
        let due = now + self.config.give_up_after;
        let connection = Connection {
            remote: req.request,
            sent: Message::SidrReq(*req).encode(tid),
            give_up: due,
            is_client: false,
            ..Connection::new(CmState::SidrReqReceived, from, tid)
        };
        self.connections.insert(id, connection);
        self.inquiries.insert((from.ip(), req.request), id);
        self.set_due(id, Some(due));
        let inquiry = Inquiry {
            from,
            service: req.service,
            source_port: req.cma.map(|cma| cma.source_port),
            private_data: req.private_data.to_vec(),
        };
        self.events.push_back(CmEvent::Inquiry { id, inquiry });
        CmOutcome::Accepted
    }

    pub(super) fn handle_sidr_rep(&mut self, from: SocketAddr, rep: &SidrRep<'_>) -> CmOutcome {
        let id = rep.request;
        match self.of_peer(id, from) {
            Some(c) if c.state == CmState::SidrReqSent => {}
            _ => return CmOutcome::Stale,
        }
        self.forget(id);
        let private_data = rep.private_data.to_vec();
        self.events.push_back(match rep.status {
            sidr_status::SUCCESS => CmEvent::Resolved {
                id,
                qpn: rep.qpn,
                qkey: rep.qkey,
                private_data,
            },
            status => CmEvent::Unresolved {
                id,
                status,
                private_data,
            },
        });
        CmOutcome::Accepted
    }
}

fn asked_service(request: &[u8; MAD_LEN]) -> ServiceId {
    match Message::decode(request) {
        Ok((_, Message::SidrReq(req))) => req.service,
        _ => unreachable!("an inquiry keeps its request until it is answered"),
    }
}
