//! What a program holds: listeners, requests, connections, questions. Dropping one is an answer.

use std::net::IpAddr;

use lowtide_transport_proto::cm::{CommId, ConnectRequest, Inquiry, sidr_status};

use super::manager::ConnectingQp;
use super::{
    ConnectError, ConnectOptions, ConnectRefused, Connectable, ConnectionId, EventChannel,
    REJ_PRIVATE_MAX, SIDR_REP_PRIVATE_MAX, ServiceId, connecting, link_mtu, reason,
};
#[cfg(doc)]
use super::{Event, REQ_PRIVATE_MAX, SIDR_REQ_PRIVATE_MAX};
use crate::verbs::{Qpn, QueuePair};

/// Listens until it is dropped; requests that have come stay.
#[derive(Debug)]
pub struct Listener {
    pub(super) channel: EventChannel,
    pub(super) service: ServiceId,
}

impl Listener {
    /// What it listens on.
    pub fn service(&self) -> ServiceId {
        self.service
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let mut state = self.channel.0.context.shared.lock();
        state.manager.unlisten(self.service);
    }
}

/// Somebody asks for a connection. Dropping it rejects.
#[derive(Debug)]
pub struct Request {
    pub(super) channel: EventChannel,
    pub(super) id: CommId,
    /// None once it is answered.
    pub(super) request: Option<ConnectRequest>,
}

impl Request {
    fn asked(&self) -> &ConnectRequest {
        self.request
            .as_ref()
            .expect("an answer consumes the request")
    }

    /// Its name; the connection that comes of it has the same.
    pub fn id(&self) -> ConnectionId {
        ConnectionId(self.id)
    }

    /// What is asked for.
    pub fn service(&self) -> ServiceId {
        self.asked().service
    }

    /// The client's address.
    pub fn peer(&self) -> IpAddr {
        self.asked().from.ip()
    }

    /// The client's port in the service's port space, if it said so.
    pub fn peer_port(&self) -> Option<u16> {
        self.asked().source_port
    }

    /// What the client's program says: [`REQ_PRIVATE_MAX`] bytes, padded with zeros.
    pub fn private_data(&self) -> &[u8] {
        &self.asked().private_data
    }

    /// READs and atomics that the client serves at once, and wants to have under way at once.
    pub fn depths(&self) -> (u8, u8) {
        let qp = &self.asked().qp;
        (qp.responder_resources, qp.initiator_depth)
    }

    /// Accepts with a queue pair in INIT. It may be posted to at once; [`Event::Established`]
    /// follows.
    ///
    /// # Errors
    /// [`ConnectRefused`] gives the queue pair back; the request is rejected.
    pub fn accept<Q: Connectable>(
        mut self,
        qp: Q,
        options: &ConnectOptions,
    ) -> Result<Connection<Q>, ConnectRefused<Q>> {
        let context = self.channel.0.context.clone();
        let asked = self.asked().clone();
        if asked.mtu > link_mtu(context.local_addr(), asked.from) {
            self.refuse(reason::INVALID_MTU, &[]);
            let error = ConnectError::Mtu;
            return Err(ConnectRefused { error, qp });
        }
        let psn = qp.first_psn();
        let mut state = context.shared.lock();
        if let Some(error) = self.channel.obstacle(&mut state, qp.raw(), asked.from) {
            return Err(ConnectRefused { error, qp });
        }
        let connecting = ConnectingQp {
            mtu: asked.mtu,
            timeout: asked.ack_timeout,
            retry_count: asked.retry_count,
            ..connecting(qp.raw(), psn, asked.from, options)
        };
        let state_of = &mut *state;
        let accepted = state_of.manager.accept(
            &mut state_of.device,
            self.id,
            connecting,
            options.offer(qp.raw().qpn(), psn),
            (asked.qp, asked.ca_guid),
            &options.private_data,
        );
        if let Err(error) = accepted {
            let error = ConnectError::Refused(error);
            return Err(ConnectRefused { error, qp });
        }
        self.request = None;
        context.shared.drive(&mut state);
        drop(state);
        Ok(self.channel.connection(self.id, qp))
    }

    /// Rejects, with at most [`REJ_PRIVATE_MAX`] bytes for the client's program (what is beyond is
    /// cut off). `reason` is [`reason::CONSUMER`] unless there is a better one.
    pub fn reject(mut self, reason: u16, private_data: &[u8]) {
        self.refuse(reason, private_data);
    }

    fn refuse(&mut self, reason: u16, private_data: &[u8]) {
        if self.request.take().is_none() {
            return;
        }
        let shared = &self.channel.0.context.shared;
        let private_data = &private_data[..private_data.len().min(REJ_PRIVATE_MAX)];
        let mut state = shared.lock();
        let now = state.device.now();
        // Withdrawn meanwhile: nobody waits for the answer.
        let _ = state.manager.reject(now, self.id, reason, private_data);
        shared.drive(&mut state);
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        self.refuse(reason::CONSUMER, &[]);
    }
}

/// A queue pair on its way to a peer, connected, or on its way back. Dropping it disconnects.
#[derive(Debug)]
pub struct Connection<Q = QueuePair> {
    pub(super) channel: EventChannel,
    pub(super) id: CommId,
    /// None only when it has been taken back.
    pub(super) qp: Option<Q>,
}

impl<Q> Connection<Q> {
    /// Its name in events.
    pub fn id(&self) -> ConnectionId {
        ConnectionId(self.id)
    }

    /// Its queue pair.
    pub fn queue_pair(&self) -> &Q {
        self.qp.as_ref().expect("it is only taken with the handle")
    }

    /// Ends it, or withdraws the request; its queue pair goes to ERR at once.
    /// [`Event::Disconnected`] follows.
    pub fn disconnect(&self) {
        let shared = &self.channel.0.context.shared;
        let mut state = shared.lock();
        let state_of = &mut *state;
        state_of.manager.disconnect(&mut state_of.device, self.id);
        shared.drive(&mut state);
    }

    /// The queue pair, after the connection is ended if it is not yet. A rejected client's is still
    /// in INIT and may be connected again.
    pub fn into_queue_pair(mut self) -> Q {
        self.qp.take().expect("it is only taken here")
    }
}

impl<Q> Drop for Connection<Q> {
    fn drop(&mut self) {
        self.disconnect();
        let mut state = self.channel.0.context.shared.lock();
        state.manager.forget(self.id);
    }
}

/// Somebody asks for a datagram queue pair. Dropping it refuses.
#[derive(Debug)]
pub struct Question {
    pub(super) channel: EventChannel,
    pub(super) id: CommId,
    pub(super) inquiry: Inquiry,
    pub(super) is_answered: bool,
}

impl Question {
    /// What is asked for.
    pub fn service(&self) -> ServiceId {
        self.inquiry.service
    }

    /// The client's address.
    pub fn peer(&self) -> IpAddr {
        self.inquiry.from.ip()
    }

    /// The client's port in the service's port space, if it said so.
    pub fn peer_port(&self) -> Option<u16> {
        self.inquiry.source_port
    }

    /// What the client's program says: [`SIDR_REQ_PRIVATE_MAX`] bytes, padded with zeros.
    pub fn private_data(&self) -> &[u8] {
        &self.inquiry.private_data
    }

    /// Answers with a datagram queue pair, and at most [`SIDR_REP_PRIVATE_MAX`] bytes for the
    /// client's program (what is beyond is cut off).
    pub fn answer(mut self, qpn: Qpn, qkey: u32, private_data: &[u8]) {
        self.say(sidr_status::SUCCESS, (qpn, qkey), private_data);
    }

    /// Refuses, with the same.
    pub fn refuse(mut self, private_data: &[u8]) {
        self.say(sidr_status::REJECT, (Qpn::new(0), 0), private_data);
    }

    fn say(&mut self, status: u8, place: (Qpn, u32), private_data: &[u8]) {
        if std::mem::replace(&mut self.is_answered, true) {
            return;
        }
        let private_data = &private_data[..private_data.len().min(SIDR_REP_PRIVATE_MAX)];
        let shared = &self.channel.0.context.shared;
        let mut state = shared.lock();
        let now = state.device.now();
        // Forgotten meanwhile: nobody waits for the answer.
        let _ = state
            .manager
            .answer(now, self.id, status, place, private_data);
        shared.drive(&mut state);
    }
}

impl Drop for Question {
    fn drop(&mut self) {
        self.say(sidr_status::REJECT, (Qpn::new(0), 0), &[]);
    }
}
