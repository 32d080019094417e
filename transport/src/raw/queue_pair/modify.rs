//! From attributes to moves of the state machine, and back.

use lowtide_transport_proto::qp::{InitAttr, QpState, RtrAttr, RtsAttr};
use lowtide_transport_proto::wire::PKEY_DEFAULT;

use super::super::address::destination;
use super::super::types::{Error, QpAttr, QpAttrMask, QpType};
use super::super::{RD_ATOMIC_MAX, State, port_mtu};
use super::QueuePair;

/// Response packets asked for by one READ request at most, so that no READ floods its requester: with
/// the last of the request before, two full runs of segments.
const READ_CHUNK: u32 = 33;

impl QueuePair {
    /// Moves the queue pair, or changes what may be changed where it is. What each transition needs
    /// is said by [`QpAttrMask::of_transition`]. Nothing is changed by a call that fails.
    ///
    /// # Errors
    /// [`Error::Transition`], [`Error::MissingAttributes`], [`Error::ExcessAttributes`];
    /// [`Error::Limit`] or [`Error::Argument`] for an attribute that makes no sense here.
    pub fn modify(&self, attr: &QpAttr, mask: QpAttrMask) -> Result<(), Error> {
        let shared = &self.context().shared;
        let mut state = shared.lock();
        let from = self.state(&mut state);
        if mask.contains(QpAttrMask::CURRENT_STATE) && attr.current_state != from {
            return Err(Error::Argument("the queue pair is in another state"));
        }
        let to = match mask.contains(QpAttrMask::STATE) {
            true => attr.state,
            false => from,
        };
        mask.check(self.init.kind, from, to)?;
        check_ranges(attr, mask)?;
        if mask.contains(QpAttrMask::ADDRESS) {
            self.check_address(&mut state, attr, mask)?;
        }
        let merged = merge(&state.tables.qp(self.id).attr, attr, mask);
        self.apply(&mut state, from, to, &merged, mask)?;
        let entry = state.tables.qp(self.id);
        entry.attr = merged;
        if from != QpState::Sqd {
            entry.tells_drained = mask.contains(QpAttrMask::SQD_NOTIFY);
        }
        state.collect(self.id);
        shared.drive(&mut state);
        Ok(())
    }

    /// All attributes as they are now: PSNs, state and draining are the state machine's.
    pub fn query(&self) -> QpAttr {
        let mut state = self.context().shared.lock();
        let now = self.state(&mut state);
        let mut attr = state.tables.qp(self.id).attr;
        (attr.state, attr.current_state) = (now, now);
        let machine = state.device.qp(self.id).map(|qp| {
            let psns = (qp.expected_psn(), qp.next_psn());
            (psns, qp.is_draining(), qp.dest(), qp.path_mtu())
        });
        if now == QpState::Reset {
            return QpAttr {
                cap: attr.cap,
                ..QpAttr::default()
            };
        }
        match machine {
            Some((psns, is_draining, dest, mtu)) => {
                if !matches!(now, QpState::Init) {
                    // The connection manager moves queue pairs without this module.
                    (attr.dest, attr.path_mtu) = (dest, mtu);
                    (attr.rq_psn, attr.sq_psn) = psns;
                }
                attr.sq_draining = is_draining;
            }
            None => {
                if let Some(qp) = state.device.datagram(self.id) {
                    (attr.sq_psn, attr.qkey) = (qp.next_psn(), qp.qkey());
                }
            }
        }
        attr
    }

    fn state(&self, state: &mut State) -> QpState {
        match self.init.kind {
            QpType::Ud => state.device.datagram(self.id).map(|qp| qp.state()),
            _ => state.device.qp(self.id).map(|qp| qp.state()),
        }
        .expect("it lives as long as its handle")
    }

    /// Whether the peer can be reached, with packets of that size.
    fn check_address(
        &self,
        state: &mut State,
        attr: &QpAttr,
        mask: QpAttrMask,
    ) -> Result<(), Error> {
        destination(state.device.local_addr(), &attr.address)?;
        if attr.address.dgid.is_multicast() {
            return Err(Error::Argument("a connection has one peer, not a group"));
        }
        if mask.contains(QpAttrMask::PATH_MTU)
            && attr.path_mtu > port_mtu(state.device.local_addr())
        {
            return Err(Error::Limit("path MTU beyond the port's"));
        }
        Ok(())
    }

    /// Moves the state machine. Everything has been checked, so that only its own rules are left.
    fn apply(
        &self,
        state: &mut State,
        from: QpState,
        to: QpState,
        attr: &QpAttr,
        mask: QpAttrMask,
    ) -> Result<(), Error> {
        match (to, self.init.kind) {
            (QpState::Reset, _) => {
                match state.device.qp(self.id) {
                    Some(qp) => qp.to_reset(),
                    None => self.datagram(state).to_reset(),
                }
                state.device.clear_peer(self.id);
                state.tables.purge(self.id);
            }
            (QpState::Err, QpType::Ud) => self.datagram(state).to_error(),
            (QpState::Err, _) => self.connected(state).to_error(),
            (_, QpType::Ud) => self.apply_datagram(state, from, to, attr)?,
            _ => self.apply_connected(state, from, to, attr, mask)?,
        }
        Ok(())
    }

    fn apply_datagram(
        &self,
        state: &mut State,
        from: QpState,
        to: QpState,
        attr: &QpAttr,
    ) -> Result<(), Error> {
        let qp = self.datagram(state);
        let init = InitAttr {
            access: attr.access.into(),
            pkey: PKEY_DEFAULT,
        };
        match (from, to) {
            (_, QpState::Init) => qp.to_init(init, attr.qkey)?,
            (QpState::Init, QpState::Rtr) => qp.to_rtr()?,
            (QpState::Rtr, QpState::Rts) => qp.to_rts(attr.sq_psn)?,
            (_, QpState::Sqd) => qp.to_sqd()?,
            _ => qp.resume()?,
        }
        qp.set_qkey(attr.qkey);
        Ok(())
    }

    fn apply_connected(
        &self,
        state: &mut State,
        from: QpState,
        to: QpState,
        attr: &QpAttr,
        mask: QpAttrMask,
    ) -> Result<(), Error> {
        let access = attr.access.into();
        let local = state.device.local_addr();
        // Half of what our receive buffer holds, if that is less.
        let chunk = READ_CHUNK.min(state.device.receive_budget() / 2).max(1);
        let rts = RtsAttr {
            sq_psn: attr.sq_psn,
            timeout: attr.timeout,
            retry_cnt: attr.retry_cnt,
            rnr_retry: attr.rnr_retry,
            max_rd_atomic: attr.max_rd_atomic,
            read_chunk_packets: chunk as u16,
        };
        let qp = self.connected(state);
        match (from, to) {
            (_, QpState::Init) => qp.to_init(InitAttr {
                access,
                pkey: PKEY_DEFAULT,
            })?,
            (QpState::Init, QpState::Rtr) => qp.to_rtr(RtrAttr {
                dest: attr.dest,
                path_mtu: attr.path_mtu,
                rq_psn: attr.rq_psn,
                max_dest_rd_atomic: attr.max_dest_rd_atomic,
                min_rnr_timer: attr.min_rnr_timer,
            })?,
            (QpState::Rtr, QpState::Rts) => qp.to_rts(rts)?,
            (_, QpState::Sqd) => qp.to_sqd()?,
            _ => qp.resume()?,
        }
        let retries = QpAttrMask::TIMEOUT
            | QpAttrMask::RETRY_CNT
            | QpAttrMask::RNR_RETRY
            | QpAttrMask::MAX_RD_ATOMIC;
        if from == QpState::Sqd && mask.intersects(retries) {
            qp.set_rts_attr(rts);
        }
        if from == QpState::Sqd && mask.contains(QpAttrMask::MAX_DEST_RD_ATOMIC) {
            qp.set_max_dest_rd_atomic(attr.max_dest_rd_atomic);
        }
        if mask.contains(QpAttrMask::ACCESS) {
            qp.set_access(access);
        }
        if mask.contains(QpAttrMask::MIN_RNR_TIMER) {
            qp.set_min_rnr_timer(attr.min_rnr_timer);
        }
        if mask.contains(QpAttrMask::ADDRESS) {
            let peer = destination(local, &attr.address)?;
            state.device.clear_peer(self.id);
            state.device.set_peer(self.id, peer, None);
        }
        Ok(())
    }

    fn connected<'s>(
        &self,
        state: &'s mut State,
    ) -> &'s mut lowtide_transport_proto::qp::QueuePair {
        let qp = state.device.qp(self.id);
        qp.expect("it lives as long as its handle, and is of its kind")
    }

    fn datagram<'s>(
        &self,
        state: &'s mut State,
    ) -> &'s mut lowtide_transport_proto::qp::UdQueuePair {
        let qp = state.device.datagram(self.id);
        qp.expect("it lives as long as its handle, and is of its kind")
    }
}

/// Whether each attribute is in its range.
fn check_ranges(attr: &QpAttr, mask: QpAttrMask) -> Result<(), Error> {
    let checks = [
        (QpAttrMask::PORT, attr.port == 1, "port number"),
        (
            QpAttrMask::PKEY_INDEX,
            attr.pkey_index == 0,
            "partition key index",
        ),
        (QpAttrMask::TIMEOUT, attr.timeout < 32, "timeout"),
        (QpAttrMask::RETRY_CNT, attr.retry_cnt < 8, "retry count"),
        (QpAttrMask::RNR_RETRY, attr.rnr_retry < 8, "RNR retry count"),
        (
            QpAttrMask::MAX_RD_ATOMIC,
            attr.max_rd_atomic <= RD_ATOMIC_MAX,
            "READs and atomics under way",
        ),
        (
            QpAttrMask::MAX_DEST_RD_ATOMIC,
            attr.max_dest_rd_atomic <= RD_ATOMIC_MAX,
            "READs and atomics served at once",
        ),
    ];
    match checks
        .iter()
        .find(|(bit, is_good, _)| mask.contains(*bit) && !is_good)
    {
        Some((_, _, what)) => Err(Error::Limit(what)),
        None => Ok(()),
    }
}

/// The attributes after a call.
fn merge(old: &QpAttr, new: &QpAttr, mask: QpAttrMask) -> QpAttr {
    let mut attr = *old;
    macro_rules! take {
        ($($bit:ident $field:ident)*) => {
            $(if mask.contains(QpAttrMask::$bit) {
                attr.$field = new.$field;
            })*
        };
    }
    take! {
        ACCESS access
        PKEY_INDEX pkey_index
        PORT port
        QKEY qkey
        ADDRESS address
        PATH_MTU path_mtu
        TIMEOUT timeout
        RETRY_CNT retry_cnt
        RNR_RETRY rnr_retry
        RQ_PSN rq_psn
        MAX_RD_ATOMIC max_rd_atomic
        MIN_RNR_TIMER min_rnr_timer
        SQ_PSN sq_psn
        MAX_DEST_RD_ATOMIC max_dest_rd_atomic
        DEST_QPN dest
    }
    attr
}
