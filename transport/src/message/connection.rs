//! One connection after its handshake: credits, order, reassembly.
//!
//! Owns: the outbox, the credits both ways, and a message whose fragments are still coming in.
//!
//! Invariants:
//! * a data parcel is posted only against a credit, and each side posts [`RESERVE`] receives more
//!   than it grants: a credit parcel needs no credit and there are never more than two of them
//!   under way, since each returns half of what is granted. So no receive is ever missing (RNR),
//!   and two sides that have spent all their credits still hear from each other;
//! * what is received is taken before the receive is posted again; the peer's pace is ours.
//!
//! Deliberately absent: who the peer is (`endpoint`), retransmission (the queue pair).

use std::ops::Range;

use lowtide_transport_proto::qp::{Lkey, QueuePair};
use lowtide_transport_proto::qp::{RecvWr, SendOp, SendWr, SgList, WrId};

use super::outbox::{Outbox, SlotPool};
use super::parcel::{Header, Kind, SLOT_LEN, Violation, next_record};
use crate::device::{Device, IN_PLACE, QpId};

/// Receives and sends beyond the credits, for credit parcels.
pub(crate) const RESERVE: u16 = 4;
/// Data parcels under way at most, however many the peer grants: it bounds the send queue.
pub(crate) const SENDS_MAX: u16 = 128;

/// A connection's data path.
pub(crate) struct Stream {
    pub(crate) qp: QpId,
    pub(crate) outbox: Outbox,
    /// Data parcels we may still post.
    credits: u16,
    /// What the peer granted in all.
    credits_max: u16,
    /// Credits taken from the peer and not yet given back.
    owed: u16,
    /// What we granted in all.
    granted: u16,
    tx_sequence: u32,
    rx_sequence: u32,
    assembly: Assembly,
}

/// A message coming in as fragments.
#[derive(Default)]
struct Assembly {
    message: Vec<u8>,
    /// Its full length; 0 when there is none.
    message_len: usize,
    /// Whether a parcel of it is open: its header has been read, its last packet has not come.
    is_open: bool,
}

/// What a packet of a parcel brought.
pub(crate) enum Arrived {
    /// Nothing to hand up yet.
    Nothing,
    /// Whole messages: so many records in this part of the payload.
    Records { count: u32, body: Range<usize> },
    /// One whole message, this part of the payload.
    Whole(Range<usize>),
    /// A message that was put together.
    Assembled(Vec<u8>),
}

impl Stream {
    /// `credits` were granted by the peer, `granted` by us.
    pub(crate) fn new(qp: QpId, outbox: Outbox, credits: u16, granted: u16) -> Stream {
        Stream {
            qp,
            outbox,
            credits,
            credits_max: credits,
            owed: 0,
            granted,
            tx_sequence: 0,
            rx_sequence: 0,
            assembly: Assembly::default(),
        }
    }

    /// Posts one receive; its bytes are handed up where they arrive.
    pub(crate) fn post_receive(qp: &mut QueuePair) {
        let local = SgList::one(IN_PLACE, 0, SLOT_LEN as u32);
        // A queue as deep as the grants plus the reserve is never full, and a queue pair in error
        // reports itself by its completions.
        let _ = qp.post_recv(RecvWr {
            wr_id: WrId(0),
            local,
        });
    }

    /// Posts what waits and may go, and returns credits if many are owed.
    pub(crate) fn pump(&mut self, device: &mut Device, pool: &mut SlotPool) {
        while self.outbox.is_waiting() && self.credits > 0 {
            if !self.post(device, pool, false) {
                return;
            }
            self.credits -= 1;
        }
        if self.owed > 0 && self.owed >= self.granted / 2 {
            self.post(device, pool, true);
        }
    }

    fn post(&mut self, device: &mut Device, pool: &mut SlotPool, is_credit: bool) -> bool {
        let reserve = if is_credit { RESERVE } else { 0 };
        if self.outbox.posted() >= usize::from(SENDS_MAX + reserve) {
            return false;
        }
        let memory = &mut device.memory;
        let posting = self
            .outbox
            .post(pool, memory, is_credit, self.owed, self.tx_sequence);
        let (Some(posting), Some(qp)) = (posting, device.qp(self.qp)) else {
            return false;
        };
        let local = SgList::one(Lkey(posting.key.0), posting.offset, posting.len);
        if qp
            .post_send(SendWr::new(WrId(0), SendOp::Send, local))
            .is_err()
        {
            // Only a queue pair in error refuses; its completions will close the connection.
            return false;
        }
        self.owed = 0;
        self.tx_sequence = self.tx_sequence.wrapping_add(1);
        true
    }

    /// The payload of one packet, which begins at `offset` of its parcel and, if `is_last`, ends it.
    pub(crate) fn receive(
        &mut self,
        payload: &[u8],
        offset: u64,
        is_last: bool,
        message_max: usize,
        spare: &mut Vec<Vec<u8>>,
    ) -> Result<Arrived, Violation> {
        if offset > 0 {
            if !self.assembly.is_open {
                return Err(Violation);
            }
            return self.append(payload, is_last);
        }
        let (header, body) = Header::parse(payload)?;
        if header.sequence != self.rx_sequence || self.assembly.is_open {
            return Err(Violation);
        }
        self.rx_sequence = self.rx_sequence.wrapping_add(1);
        self.credits = self.credits.checked_add(header.credits).ok_or(Violation)?;
        if self.credits > self.credits_max {
            return Err(Violation);
        }
        if header.kind != Kind::Credit {
            self.owed += 1;
        }
        let body_range = payload.len() - body.len()..payload.len();
        match header.kind {
            Kind::Credit if is_last => Ok(Arrived::Nothing),
            Kind::Records { count } if is_last && self.assembly.message_len == 0 => {
                check_records(count, body)?;
                Ok(Arrived::Records {
                    count,
                    body: body_range,
                })
            }
            Kind::Fragment {
                message_len,
                offset,
            } => {
                let message_len = message_len as usize;
                if offset as usize != self.assembly.message.len()
                    || message_len > message_max
                    || message_len == 0
                {
                    return Err(Violation);
                }
                if offset == 0 {
                    if is_last && body.len() == message_len {
                        return Ok(Arrived::Whole(body_range));
                    }
                    self.assembly.message = spare.pop().unwrap_or_default();
                    self.assembly.message_len = message_len;
                } else if message_len != self.assembly.message_len {
                    return Err(Violation);
                }
                self.append(body, is_last)
            }
            _ => Err(Violation),
        }
    }

    fn append(&mut self, bytes: &[u8], is_last: bool) -> Result<Arrived, Violation> {
        let assembly = &mut self.assembly;
        assembly.is_open = !is_last;
        if bytes.len() > assembly.message_len - assembly.message.len() {
            return Err(Violation);
        }
        assembly.message.extend_from_slice(bytes);
        if !is_last || assembly.message.len() < assembly.message_len {
            return Ok(Arrived::Nothing);
        }
        assembly.message_len = 0;
        Ok(Arrived::Assembled(std::mem::take(&mut assembly.message)))
    }
}

/// Makes sure that the body is `count` records and nothing else, before the first is handed up.
fn check_records(count: u32, mut body: &[u8]) -> Result<(), Violation> {
    for _ in 0..count {
        next_record(&mut body)?;
    }
    if body.is_empty() {
        Ok(())
    } else {
        Err(Violation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> Stream {
        Stream::new(QpId(0), Outbox::new(4096, 8), 8, 8)
    }

    fn parcel(kind: Kind, credits: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; super::super::parcel::HEADER_LEN];
        Header {
            kind,
            credits,
            sequence,
        }
        .emit(&mut bytes);
        bytes.extend_from_slice(body);
        bytes
    }

    #[test]
    fn fragments_of_several_packets_become_one_message() {
        let mut stream = stream();
        let mut spare = Vec::new();
        let first = Kind::Fragment {
            message_len: 10,
            offset: 0,
        };
        let second = Kind::Fragment {
            message_len: 10,
            offset: 6,
        };
        let start = parcel(first, 0, 0, b"abc");
        let mut receive =
            |bytes: &[u8], offset, last| stream.receive(bytes, offset, last, 100, &mut spare);
        assert!(matches!(receive(&start, 0, false), Ok(Arrived::Nothing)));
        assert!(matches!(receive(b"def", 19, true), Ok(Arrived::Nothing)));
        let end = parcel(second, 0, 1, b"ghij");
        match receive(&end, 0, true) {
            Ok(Arrived::Assembled(message)) => assert_eq!(message, b"abcdefghij"),
            _ => panic!("the message is complete"),
        }
    }

    #[test]
    fn every_broken_rule_is_a_violation() {
        let fragment = |message_len, offset| Kind::Fragment {
            message_len,
            offset,
        };
        let cases: [(&str, Vec<u8>, bool); 8] = [
            ("wrong sequence", parcel(Kind::Credit, 0, 1, b""), true),
            (
                "credits from nowhere",
                parcel(Kind::Credit, 1, 0, b""),
                true,
            ),
            (
                "longer than admitted",
                parcel(fragment(101, 0), 0, 0, b"x"),
                true,
            ),
            (
                "more than announced",
                parcel(fragment(2, 0), 0, 0, b"abc"),
                true,
            ),
            (
                "starts in the middle",
                parcel(fragment(10, 5), 0, 0, b"abcde"),
                true,
            ),
            (
                "fewer records than said",
                parcel(Kind::Records { count: 1 }, 0, 0, b""),
                true,
            ),
            (
                "bytes after the records",
                parcel(Kind::Records { count: 0 }, 0, 0, b"abcd"),
                true,
            ),
            (
                "records over two packets",
                parcel(Kind::Records { count: 0 }, 0, 0, b""),
                false,
            ),
        ];
        for (name, bytes, is_last) in cases {
            let result = stream().receive(&bytes, 0, is_last, 100, &mut Vec::new());
            assert!(result.is_err(), "{name}");
        }
    }
}
