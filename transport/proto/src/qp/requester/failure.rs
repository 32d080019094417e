//! How the send queue stops: the request to blame, and the end of all others.

use super::super::work::Status;
use super::super::{Link, Reports};
use super::{Psn, Requester, Wqe};

/// Why the send queue stops: the packet to blame and the status of its work request.
#[derive(Clone, Copy, Debug)]
pub struct Failure {
    pub(super) seq: u64,
    pub(super) status: Status,
    /// Not a packet is to blame, but the first request at or behind `seq` that waits to be done at
    /// this end.
    pub(super) is_local: bool,
}

impl Failure {
    pub(super) const fn of_packet(seq: u64, status: Status) -> Self {
        Self {
            seq,
            status,
            is_local: false,
        }
    }
}

impl Requester {
    /// Complete everything: up to the packet to blame as flushed, that one with its status.
    pub fn flush(&mut self, mut failure: Option<Failure>, link: &Link, out: &mut Reports) {
        while let Some(wqe) = self.queue.pop_front() {
            let status = match failure {
                Some(f) if f.is_local && wqe.is_waiting() && wqe.first >= f.seq => f.status,
                Some(f) if !f.is_local && (wqe.first..wqe.end()).contains(&f.seq) => f.status,
                _ => Status::Flushed,
            };
            failure = failure.filter(|_| status == Status::Flushed);
            out.complete(wqe.completion(status, link));
        }
        self.lists.clear();
        self.una = self.end;
        self.next = self.end;
        self.high = self.end;
        self.reads_out = 0;
        self.cursor = 0;
        self.probe_due = false;
        self.is_tracking = false;
        self.has_gaps = false;
    }

    /// The failure of a packet whose payload cannot be found.
    pub fn local_failure(&self, psn: Psn) -> Failure {
        let seq = self.una + u64::from(psn.offset_from(self.psn(self.una)));
        Failure::of_packet(seq, Status::LocalProtection)
    }

    /// The failure of the oldest request.
    pub fn oldest_failure(&self, status: Status) -> Failure {
        Failure {
            seq: self.una,
            status,
            is_local: self.queue.front().is_some_and(Wqe::is_waiting),
        }
    }
}
