//! Connections of a node: which peer is reached over which, what waits for room, what was heard.
//!
//! Per peer at most one connection that this node made and one that the peer made; messages leave
//! on the own one if there is one. When either breaks, both are closed and the mind is told once,
//! so that both sides open their sessions anew from state.

use std::collections::{HashMap, VecDeque};
use std::io::IoSlice;
use std::net::SocketAddr;

use lowtide_engine_core::ids::{Incarnation, Life, NodeId};
use lowtide_engine_core::message::Envelope;
use lowtide_transport::message::{ConnId, EndpointCtx, Piece, SendError};

use crate::frame::Frame;

#[derive(Debug)]
struct Link {
    addr: SocketAddr,
    wanted: bool,
    made: Option<ConnId>,
    made_up: bool,
    taken: Option<ConnId>,
    /// Life last heard on this link; frames for it carry it.
    life: Life,
    /// Newest incarnation in a view for which an own connection that nothing has come on was probed.
    probed: Incarnation,
    waiting: VecDeque<Vec<Piece>>,
    sequence: u32,
}

/// All links of a node.
#[derive(Debug)]
pub(super) struct Links {
    own: NodeId,
    links: HashMap<NodeId, Link>,
    by_conn: HashMap<ConnId, NodeId>,
    frame: Frame,
    pub(super) messages: u64,
    pub(super) bytes: u64,
}

impl Links {
    pub(super) fn new(own: NodeId, peers: impl Iterator<Item = (NodeId, SocketAddr)>) -> Links {
        let links = peers.filter(|(id, _)| *id != own).map(|(id, addr)| {
            let life = Life {
                node: id,
                incarnation: Incarnation(0),
            };
            let link = Link {
                addr,
                wanted: false,
                made: None,
                made_up: false,
                taken: None,
                life,
                probed: Incarnation(0),
                waiting: VecDeque::new(),
                sequence: 0,
            };
            (id, link)
        });
        Links {
            own,
            links: links.collect(),
            by_conn: HashMap::new(),
            frame: Frame::default(),
            messages: 0,
            bytes: 0,
        }
    }

    pub(super) fn addr(&self, peer: NodeId) -> Option<SocketAddr> {
        self.links.get(&peer).map(|l| l.addr)
    }

    pub(super) fn peer(&self, conn: ConnId) -> Option<NodeId> {
        self.by_conn.get(&conn).copied()
    }

    /// Keeps a connection to `peer` from now on.
    pub(super) fn want(&mut self, ctx: &mut EndpointCtx, peer: NodeId) {
        let own = self.own;
        let Some(link) = self.links.get_mut(&peer) else {
            return;
        };
        link.wanted = true;
        if link.made.is_none() {
            let conn = ctx.connect(link.addr, &own.0.to_le_bytes());
            link.made = Some(conn);
            link.made_up = false;
            self.by_conn.insert(conn, peer);
        }
    }

    /// A connection came up. Returns the peer, and whether the mind must first hear that an
    /// earlier connection broke.
    pub(super) fn connected(
        &mut self,
        ctx: &mut EndpointCtx,
        conn: ConnId,
        node: NodeId,
        is_incoming: bool,
    ) -> Option<(NodeId, bool)> {
        let link = self.links.get_mut(&node)?;
        let mut broke = false;
        if is_incoming {
            if let Some(old) = link.taken.replace(conn) {
                self.by_conn.remove(&old);
                ctx.close(old);
                broke = true;
            }
        } else {
            link.made_up = true;
        }
        link.life.incarnation = Incarnation(0);
        link.probed = Incarnation(0);
        self.by_conn.insert(conn, node);
        Some((node, broke))
    }

    /// A connection is over. Returns the peer whose links were reset.
    pub(super) fn closed(&mut self, ctx: &mut EndpointCtx, conn: ConnId) -> Option<NodeId> {
        let node = self.by_conn.remove(&conn)?;
        self.reset(ctx, node);
        Some(node)
    }

    /// Closes whatever leads to `node` and starts over if a connection is wanted.
    pub(super) fn reset(&mut self, ctx: &mut EndpointCtx, node: NodeId) {
        let Some(link) = self.links.get_mut(&node) else {
            return;
        };
        for conn in [link.made.take(), link.taken.take()].into_iter().flatten() {
            if self.by_conn.remove(&conn).is_some() {
                ctx.close(conn);
            }
        }
        link.made_up = false;
        link.waiting.clear();
        link.life.incarnation = Incarnation(0);
        if link.wanted {
            self.want(ctx, node);
        }
    }

    /// What a peer's message says about its life. Returns `false` for a message of an older life.
    pub(super) fn heard(&mut self, from: Life) -> bool {
        let Some(link) = self.links.get_mut(&from.node) else {
            return false;
        };
        if from.incarnation < link.life.incarnation {
            return false;
        }
        link.life = from;
        true
    }

    /// A view names this life of a peer. Returns whether the connection belongs to an older one: it
    /// leads nowhere, even if it is too idle to have noticed. If nothing has come on it, it may
    /// belong to a process that took what was sent and died before it spoke; then that is asked.
    pub(super) fn is_replaced(&mut self, ctx: &mut EndpointCtx, life: Life) -> bool {
        let Some(link) = self.links.get_mut(&life.node) else {
            return false;
        };
        if link.life.incarnation > Incarnation(0) {
            return link.life.incarnation < life.incarnation;
        }
        if let Some(conn) = link.made.filter(|_| link.made_up)
            && link.probed < life.incarnation
        {
            link.probed = life.incarnation;
            ctx.probe(conn);
        }
        false
    }

    /// Sends a message, or keeps it until there is room; drops it without a connection. An urgent one
    /// overtakes what is kept, and what the connection has not sent.
    pub(super) fn send(&mut self, ctx: &mut EndpointCtx, to: NodeId, envelope: &Envelope) {
        let Some(link) = self.links.get_mut(&to) else {
            return;
        };
        let Some(conn) = link.made.filter(|_| link.made_up).or(link.taken) else {
            return;
        };
        link.sequence = link.sequence.wrapping_add(1);
        self.frame.encode(envelope, link.life, link.sequence);
        self.messages += 1;
        self.bytes += self.frame.len() as u64;
        if let Some(bytes) = self.frame.as_slice() {
            let parts = [IoSlice::new(bytes)];
            let sent = match link.waiting.is_empty() {
                _ if envelope.body.is_urgent() => ctx.send_urgent(conn, &parts),
                true => ctx.send(conn, &parts),
                false => Err(SendError::WouldBlock),
            };
            match sent {
                // Also one that is too long for the urgent lane goes the ordinary way.
                Err(SendError::WouldBlock | SendError::TooLarge) => {}
                other => return log_lost(to, envelope, other),
            }
        }
        let mut pieces = self.frame.take_pieces();
        let sent = match link.waiting.is_empty() {
            true => ctx.send_pieces(conn, &mut pieces),
            false => Err(SendError::WouldBlock),
        };
        match sent {
            Err(SendError::WouldBlock) => link.waiting.push_back(pieces),
            other => log_lost(to, envelope, other),
        }
    }

    /// There is room again.
    pub(super) fn writable(&mut self, ctx: &mut EndpointCtx, conn: ConnId) {
        let Some(link) = self
            .by_conn
            .get(&conn)
            .and_then(|node| self.links.get_mut(node))
        else {
            return;
        };
        while let Some(pieces) = link.waiting.front_mut() {
            match ctx.send_pieces(conn, pieces) {
                Err(SendError::WouldBlock) => return,
                _ => {
                    link.waiting.pop_front();
                }
            }
        }
    }
}

/// A message that no connection takes: the reason, unless it is that the connection is gone.
fn log_lost(to: NodeId, envelope: &Envelope, sent: Result<(), SendError>) {
    if let Err(error) = sent
        && error != SendError::Closed
    {
        tracing::error!(%to, %error, message = envelope.body.name(), "message not sent");
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::time::{Duration, Instant};

    use lowtide_engine_core::ids::{Epoch, Term, ViewId};
    use lowtide_engine_core::message::{Message, Waits};
    use lowtide_engine_core::op::Bytes;
    use lowtide_transport::message::{Endpoint, EndpointConfig, Event};

    use super::*;
    use crate::frame::decode;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn endpoint(node: u64) -> Endpoint {
        let pid = std::process::id();
        let ip = Ipv4Addr::new(127, 16 | (pid >> 8 & 15) as u8, pid as u8, node as u8);
        Endpoint::bind(EndpointConfig::new(SocketAddr::from((ip, 4791)), node, 1)).unwrap()
    }

    fn envelope(body: Message) -> Envelope {
        Envelope {
            from: Life {
                node: NodeId(1),
                incarnation: Incarnation(1),
            },
            epoch: Epoch(5),
            minimum: Epoch(1),
            term: Term(1),
            body,
        }
    }

    /// A ping that is sent when the connection takes no more, and more waits here, is heard before
    /// that; and what waits keeps its order.
    #[test]
    fn a_ping_overtakes_what_waits_for_room() {
        let (mut ours, mut theirs) = (endpoint(1), endpoint(2));
        let peer = theirs.local_addr();
        let mut links = Links::new(NodeId(1), [(NodeId(2), peer)].into_iter());
        links.want(&mut ours, NodeId(2));
        let start = Instant::now();
        let mut is_up = false;
        while !is_up {
            assert!(start.elapsed() < PATIENCE);
            ours.poll(Some(Duration::ZERO), &mut |ctx, event| {
                if let Event::Connected { conn, .. } = event {
                    links.connected(ctx, conn, NodeId(2), false);
                    is_up = true;
                }
            })
            .unwrap();
            theirs.poll(Some(Duration::ZERO), &mut |_, _| ()).unwrap();
        }
        const BACKLOG: u64 = 200;
        for request in 0..BACKLOG {
            let value = Some(Bytes::from_iter((0..30_000).map(|i| i as u8)));
            let reply = envelope(Message::ReadReply { request, value });
            links.send(&mut ours, NodeId(2), &reply);
        }
        assert!(
            links.links[&NodeId(2)].waiting.len() > 100,
            "it is a backlog"
        );
        let ping = envelope(Message::Ping {
            attach: 0,
            lower_bound: Epoch(3),
            view: ViewId(1),
            waits: Waits::No,
            commit: None,
        });
        links.send(&mut ours, NodeId(2), &ping);
        let (mut heard, mut before) = (0, None);
        while heard < BACKLOG || before.is_none() {
            assert!(start.elapsed() < PATIENCE);
            ours.poll(Some(Duration::ZERO), &mut |ctx, event| {
                if let Event::Writable { conn } = event {
                    links.writable(ctx, conn);
                }
            })
            .unwrap();
            theirs
                .poll(Some(Duration::ZERO), &mut |ctx, event| {
                    let Event::Message { bytes, .. } = event else {
                        return;
                    };
                    let own = Life {
                        node: NodeId(2),
                        incarnation: Incarnation(1),
                    };
                    match decode(bytes, ctx.shared_message(), own).unwrap().body {
                        Message::Ping { .. } => before = Some(heard),
                        Message::ReadReply { request, .. } => {
                            assert_eq!(request, heard);
                            heard += 1;
                        }
                        other => panic!("{other:?}"),
                    }
                })
                .unwrap();
        }
        let before = before.expect("heard");
        assert!(
            before < BACKLOG / 4,
            "{before} of {BACKLOG} were heard first"
        );
    }
}
