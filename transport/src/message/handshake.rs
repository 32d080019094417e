//! Connecting and disconnecting: the connection manager's datagrams as this layer uses them.
//!
//! Owns: what our ends tell each other in the private data of REQ and REP, which connection a
//! communication id belongs to, and the *complaint*: a REJ (reason: stale connection, both ids 0)
//! with which an endpoint answers a good packet for a queue pair that it does not have. RoCE drops
//! such packets in silence, so without it a peer would talk for ever to a process that is gone.
//!
//! ```text
//!  0        1         2           4          6           8        16            24
//! +--------+---------+-----------+----------+-----------+--------+-------------+---------
//! |version | length  | credits   | budget   | lid       | node   | incarnation | hello …
//! +--------+---------+-----------+----------+-----------+--------+-------------+---------
//! ```
//! Little endian; `length` is the hello's, `budget` how many full datagrams the sender's receive
//! buffer holds, `lid` the sender's local identifier (InfiniBand; 0 elsewhere). A complaint is version, zero, zero, zero, queue pair number (u32), node,
//! incarnation.
//!
//! Invariant: a REQ is repeated until it is answered or the connection is closed.
//!
//! Deliberately absent: queue pairs and connections themselves (`endpoint` moves them).
//!
//! Source: IBTA volume 1, chapter 12; Linux `cma.c`.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;

use lowtide_transport_proto::cm::{
    Cm, CmConfig, CmEvent, CmTransmit, CommId, ConnectParams, MAD_LEN, Message, QpOffer, Rej,
    ServiceId, reason,
};
use lowtide_transport_proto::time::Nanos;
use lowtide_transport_proto::wire::{Mtu, Psn, Qpn};

use super::fabric::Fabric;
use super::{EndpointConfig, HELLO_MAX};
use crate::cm::Gsi;

/// Version of the private data and of the parcels.
const VERSION: u8 = 3;
const GREETING_LEN: usize = 24;
const COMPLAINT_LEN: usize = 24;
/// "lowtid" in the locally administered range.
const SERVICE: ServiceId = ServiceId(0x0200_6C6F_7774_6964);
/// At most one complaint per peer in this time.
const COMPLAINT_PAUSE: Nanos = Nanos::from_millis(20);
/// Peers whose last complaint is remembered.
const COMPLAINTS_MAX: usize = 1024;
/// A request that found nobody is repeated so often, whatever the connection manager does: its own
/// pauses double up to seconds, and a peer that is just starting should not wait for them.
pub(super) const REQUEST_PAUSE: Nanos = Nanos::from_millis(200);
/// How a management datagram of the connection manager begins (version, class, class version), and
/// what is before and behind it on the wire of RoCE.
const MAD_START: [u8; 3] = [1, 7, 2];
const BTH_AND_DETH: usize = 20;
const ICRC_LEN: usize = 4;
/// Retries without limit: whether a peer is dead is decided above.
pub(super) const RETRY_FOREVER: u8 = 7;

/// What an endpoint says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Greeting {
    pub(super) node: u64,
    pub(super) incarnation: u64,
    pub(super) credits: u16,
    pub(super) budget: u16,
    pub(super) lid: u16,
    pub(super) hello: Vec<u8>,
}

impl Greeting {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(GREETING_LEN + HELLO_MAX);
        bytes.push(VERSION);
        bytes.push(self.hello.len() as u8);
        bytes.extend_from_slice(&self.credits.to_le_bytes());
        bytes.extend_from_slice(&self.budget.to_le_bytes());
        bytes.extend_from_slice(&self.lid.to_le_bytes());
        bytes.extend_from_slice(&self.node.to_le_bytes());
        bytes.extend_from_slice(&self.incarnation.to_le_bytes());
        bytes.extend_from_slice(&self.hello);
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Greeting> {
        let (fixed, rest) = bytes.split_first_chunk::<GREETING_LEN>()?;
        let hello = rest
            .get(..usize::from(fixed[1]))
            .filter(|hello| hello.len() <= HELLO_MAX)?;
        let credits = u16::from_le_bytes([fixed[2], fixed[3]]);
        if fixed[0] != VERSION || !(2..=1024).contains(&credits) {
            return None;
        }
        Some(Greeting {
            node: word(fixed, 8),
            incarnation: word(fixed, 16),
            credits,
            budget: u16::from_le_bytes([fixed[4], fixed[5]]),
            lid: u16::from_le_bytes([fixed[6], fixed[7]]),
            hello: hello.to_vec(),
        })
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// One end's queue pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EndQp {
    pub(super) qpn: Qpn,
    pub(super) psn: Psn,
    pub(super) mtu: Mtu,
}

/// What the connection manager has to tell the endpoint.
#[derive(Debug)]
pub(super) enum News {
    /// Somebody wants to connect: accept or refuse `request`.
    Request {
        request: CommId,
        from: SocketAddr,
        qp: EndQp,
        greeting: Greeting,
    },
    /// Our request was accepted: move the queue pair, then `establish`.
    Accepted {
        index: u32,
        qpn: Qpn,
        psn: Psn,
        greeting: Greeting,
    },
    /// The client is ready.
    Established { index: u32 },
    /// The handshake failed for good.
    Refused { index: u32 },
    /// Nobody has answered for long: the client asks anew, the server gives up.
    Unanswered { index: u32 },
    /// The peer disconnected.
    Disconnected { index: u32 },
    /// The peer says that it has no such queue pair.
    Complaint {
        from: SocketAddr,
        qpn: Qpn,
        incarnation: u64,
    },
}

/// A request to be repeated.
struct Asking {
    request: CmTransmit,
    due: Nanos,
}

/// The connection manager of an endpoint.
pub(super) struct Handshakes {
    cm: Cm,
    by_comm: HashMap<CommId, u32>,
    by_index: HashMap<u32, CommId>,
    /// Requests that nobody has answered.
    asking: BTreeMap<u32, Asking>,
    /// Complaints heard, and other news that is not the state machine's.
    heard: VecDeque<News>,
    /// When each peer was last complained to.
    complained: HashMap<SocketAddr, Nanos>,
    node: u64,
    incarnation: u64,
    gsi: Gsi,
    /// Complaints waiting to be sent.
    complaints: Vec<(SocketAddr, Qpn)>,
    /// Datagrams of the connection manager waiting to be sent.
    outgoing: Vec<CmTransmit>,
}

impl Handshakes {
    pub(super) fn new(config: &EndpointConfig, local: SocketAddr, salt: u64) -> Handshakes {
        let mut cm = Cm::new(CmConfig {
            connections_max: 2 * config.limits.connections_max + 64,
            ..CmConfig::new(local.ip(), config.node, salt as u32)
        });
        cm.listen(SERVICE);
        Handshakes {
            cm,
            by_comm: HashMap::new(),
            by_index: HashMap::new(),
            asking: BTreeMap::new(),
            heard: VecDeque::new(),
            complained: HashMap::new(),
            node: config.node,
            incarnation: config.incarnation,
            gsi: Gsi::default(),
            complaints: Vec::new(),
            outgoing: Vec::new(),
        }
    }

    /// Asks `peer` to connect to connection `index`; false if there are too many.
    pub(super) fn connect(
        &mut self,
        now: Nanos,
        index: u32,
        peer: SocketAddr,
        ours: &EndQp,
        greeting: &Greeting,
    ) -> bool {
        let params = ConnectParams {
            to: peer,
            service: SERVICE,
            source_port: 0,
            qp: offer(ours),
            mtu: ours.mtu,
            retry_count: RETRY_FOREVER,
            ack_timeout: 0,
            private_data: &greeting.encode(),
        };
        match self.cm.connect(now, &params) {
            Ok(id) => {
                self.by_comm.insert(id, index);
                self.by_index.insert(index, id);
                while let Some(transmit) = self.cm.poll_transmit() {
                    // The last one is the request.
                    let due = now + REQUEST_PAUSE;
                    self.asking.insert(
                        index,
                        Asking {
                            request: transmit.clone(),
                            due,
                        },
                    );
                    self.outgoing.push(transmit);
                }
                true
            }
            Err(_) => false,
        }
    }

    /// Accepts a request for connection `index`, whose queue pair is ready to receive.
    pub(super) fn accept(
        &mut self,
        now: Nanos,
        request: CommId,
        index: u32,
        ours: &EndQp,
        greeting: &Greeting,
    ) -> bool {
        let accepted = self
            .cm
            .accept(now, request, offer(ours), &greeting.encode())
            .is_ok();
        if accepted {
            self.by_comm.insert(request, index);
            self.by_index.insert(index, request);
        }
        accepted
    }

    pub(super) fn refuse(&mut self, now: Nanos, request: CommId) {
        // It may have been withdrawn meanwhile; then there is nothing to refuse.
        let _ = self.cm.reject(now, request, reason::NO_RESOURCES, &[]);
    }

    /// The client's queue pair is ready.
    pub(super) fn establish(&mut self, index: u32) -> bool {
        self.by_index
            .get(&index)
            .is_some_and(|id| self.cm.establish(*id).is_ok())
    }

    /// A packet came on the connection: the peer's RTU, if it is missing, is implied.
    pub(super) fn communication(&mut self, index: u32) {
        if let Some(id) = self.by_index.get(&index) {
            self.cm.handle_communication(*id);
        }
    }

    /// Tells the peer that the connection is over and forgets it.
    pub(super) fn disconnect(&mut self, now: Nanos, index: u32) {
        if let Some(id) = self.forget(index) {
            // Already ended by the peer: nothing to say.
            let _ = self.cm.disconnect(now, id);
        }
    }

    /// Forgets which connection `index` was.
    pub(super) fn forget(&mut self, index: u32) -> Option<CommId> {
        self.asking.remove(&index);
        let id = self.by_index.remove(&index)?;
        self.by_comm.remove(&id);
        Some(id)
    }

    /// A datagram for queue pair 1.
    pub(super) fn handle(&mut self, now: Nanos, from: SocketAddr, mad: &[u8]) {
        if let Ok((_, Message::Rej(rej))) = Message::decode(mad)
            && rej.reason == reason::STALE_CONNECTION
            && rej.remote == CommId(0)
            && rej.local == CommId(0)
        {
            if let Some((qpn, incarnation)) = decode_complaint(rej.private_data) {
                self.heard.push_back(News::Complaint {
                    from,
                    qpn,
                    incarnation,
                });
            }
            return;
        }
        self.cm.handle_mad(now, from, mad);
    }

    /// Tells a peer that we have no such queue pair, now and then.
    pub(super) fn complain(&mut self, now: Nanos, to: SocketAddr, qpn: Qpn) {
        if self
            .complained
            .get(&to)
            .is_some_and(|last| now.since(*last) < COMPLAINT_PAUSE)
        {
            return;
        }
        if self.complained.len() >= COMPLAINTS_MAX {
            self.complained.clear();
        }
        self.complained.insert(to, now);
        self.complaints.push((to, qpn));
    }

    /// Repeats and gives up what is due.
    pub(super) fn handle_timeout(&mut self, now: Nanos) {
        if self.cm.poll_timeout().is_some_and(|due| due <= now) {
            self.cm.handle_timeout(now);
        }
        for asking in self.asking.values_mut() {
            if asking.due <= now {
                asking.due = now + REQUEST_PAUSE;
                self.outgoing.push(asking.request.clone());
            }
        }
    }

    pub(super) fn next_timeout(&self) -> Option<Nanos> {
        let asking = self.asking.values().map(|asking| asking.due).min();
        [self.cm.poll_timeout(), asking].into_iter().flatten().min()
    }

    /// The next thing the endpoint must know.
    pub(super) fn poll_news(&mut self, now: Nanos) -> Option<News> {
        if let Some(news) = self.heard.pop_front() {
            return Some(news);
        }
        while let Some(event) = self.cm.poll_event() {
            if let Some(news) = self.translate(now, event) {
                return Some(news);
            }
        }
        None
    }

    fn translate(&mut self, now: Nanos, event: CmEvent) -> Option<News> {
        match event {
            CmEvent::ConnectRequest { id, request } => {
                let Some(greeting) = Greeting::decode(&request.private_data) else {
                    self.refuse(now, id);
                    return None;
                };
                let qp = EndQp {
                    qpn: request.qp.qpn,
                    psn: request.qp.psn,
                    mtu: request.mtu,
                };
                Some(News::Request {
                    request: id,
                    from: request.from,
                    qp,
                    greeting,
                })
            }
            CmEvent::Accepted {
                id,
                qp,
                private_data,
                ..
            } => {
                let index = *self.by_comm.get(&id)?;
                self.asking.remove(&index);
                match Greeting::decode(&private_data) {
                    Some(greeting) => Some(News::Accepted {
                        index,
                        qpn: qp.qpn,
                        psn: qp.psn,
                        greeting,
                    }),
                    None => {
                        let _ = self.cm.reject(now, id, reason::CONSUMER, &[]);
                        self.forget(index);
                        Some(News::Refused { index })
                    }
                }
            }
            CmEvent::Established { id } => Some(News::Established {
                index: *self.by_comm.get(&id)?,
            }),
            CmEvent::Rejected { id, .. } => {
                let index = *self.by_comm.get(&id)?;
                self.forget(index);
                Some(News::Refused { index })
            }
            CmEvent::Disconnected { id } => {
                let index = *self.by_comm.get(&id)?;
                self.forget(index);
                Some(News::Disconnected { index })
            }
            CmEvent::TimedOut { id, .. } => {
                let index = *self.by_comm.get(&id)?;
                self.forget(index);
                Some(News::Unanswered { index })
            }
            // Endpoints neither offer datagram queue pairs nor ask for any.
            CmEvent::Inquiry { .. } | CmEvent::Resolved { .. } | CmEvent::Unresolved { .. } => None,
        }
    }

    /// Sends what is waiting.
    pub(super) fn transmit(&mut self, device: &mut Fabric) {
        for (to, qpn) in std::mem::take(&mut self.complaints) {
            let rej = Rej {
                local: CommId(0),
                remote: CommId(0),
                message: 2,
                reason: reason::STALE_CONNECTION,
                ca_guid: 0,
                private_data: &self.encode_complaint(qpn),
            };
            let mad = Message::Rej(rej).encode(0);
            device.send_mad(&mut self.gsi, to, &mad);
        }
        for transmit in std::mem::take(&mut self.outgoing) {
            device.send_mad(&mut self.gsi, transmit.to, &transmit.mad);
        }
        while let Some(transmit) = self.cm.poll_transmit() {
            device.send_mad(&mut self.gsi, transmit.to, &transmit.mad);
        }
    }

    fn encode_complaint(&self, qpn: Qpn) -> [u8; COMPLAINT_LEN] {
        let mut bytes = [0; COMPLAINT_LEN];
        bytes[0] = VERSION;
        bytes[4..8].copy_from_slice(&qpn.value().to_le_bytes());
        bytes[8..16].copy_from_slice(&self.node.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.incarnation.to_le_bytes());
        bytes
    }
}

fn decode_complaint(bytes: &[u8]) -> Option<(Qpn, u64)> {
    let bytes = bytes.get(..COMPLAINT_LEN)?;
    if bytes[..4] != [VERSION, 0, 0, 0] {
        return None;
    }
    let qpn = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
    Some((Qpn::new(qpn), word(bytes, 16)))
}

/// Whether a datagram is the connection manager's without the headers of RoCE: a device of
/// libibverbs sent it.
pub(super) fn is_bare(datagram: &[u8]) -> bool {
    datagram.len() == MAD_LEN && datagram.starts_with(&MAD_START)
}

/// Whether it is with them: softroce sent it.
pub(super) fn is_wrapped(datagram: &[u8]) -> bool {
    let mad = datagram.get(BTH_AND_DETH..).unwrap_or_default();
    mad.len() == MAD_LEN + ICRC_LEN && mad.starts_with(&MAD_START)
}

fn offer(qp: &EndQp) -> QpOffer {
    QpOffer {
        qpn: qp.qpn,
        psn: qp.psn,
        responder_resources: 0,
        initiator_depth: 0,
        rnr_retry: RETRY_FOREVER,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_that_came_the_other_way_is_recognised() {
        let rej = Rej {
            local: CommId(1),
            remote: CommId(2),
            message: 0,
            reason: reason::CONSUMER,
            ca_guid: 0,
            private_data: &[],
        };
        let mad = Message::Rej(rej).encode(7);
        assert!(is_bare(&mad) && !is_wrapped(&mad));
        let wrapped = [&[0x64; BTH_AND_DETH][..], &mad, &[0; ICRC_LEN]].concat();
        assert!(is_wrapped(&wrapped) && !is_bare(&wrapped));
        assert!(!is_bare(&wrapped[..255]) && !is_wrapped(&mad[..100]));
    }

    #[test]
    fn greetings_survive_the_zeroes_that_the_wire_appends() {
        let greeting = Greeting {
            node: 7,
            incarnation: u64::MAX,
            credits: 64,
            budget: 984,
            lid: 3,
            hello: b"hello".to_vec(),
        };
        let mut bytes = greeting.encode();
        bytes.resize(56, 0);
        assert_eq!(Greeting::decode(&bytes), Some(greeting));
    }

    #[test]
    fn greetings_of_strangers_are_refused() {
        let good = Greeting {
            node: 0,
            incarnation: 0,
            credits: 2,
            budget: 0,
            lid: 0,
            hello: vec![],
        };
        let good = good.encode();
        assert!(Greeting::decode(&good).is_some());
        for (at, value) in [(0, VERSION - 1), (0, VERSION + 1), (1, 33), (2, 0)] {
            let mut bytes = good.clone();
            bytes.resize(200, 0);
            bytes[at] = value;
            assert_eq!(Greeting::decode(&bytes), None, "byte {at}");
        }
        assert_eq!(Greeting::decode(&good[..23]), None);
    }
}
