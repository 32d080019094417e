//! One connection after its handshake: credits, order, reassembly.
//!
//! Owns: the outbox, the credits both ways, what is lent and fetched, and a message whose packets
//! are still coming in.
//!
//! Urgent parcels have credits of their own, [`URGENT_CREDITS`] on every connection, which come back as
//! soon as they have been handed up, and they are posted before all ordinary ones. So nothing is ahead
//! of one but what has been posted, and in each round trip at most [`URGENT_CREDITS`] parcels are ahead of
//! the ordinary ones.
//!
//! Invariants:
//! * a data parcel is posted only against a credit of its lane, and each side posts [`RESERVE`] receives
//!   more than it grants of ordinary ones: enough for the urgent ones, and for credit parcels, which need
//!   no credit and of which at most [`CREDITS_MAX`] are under way. So no receive is ever missing (RNR),
//!   and two sides that have spent all their credits still hear from each other;
//! * what is received is taken before the receive is posted again; the peer's pace is ours.
//!
//! Deliberately absent: who the peer is (`endpoint`), retransmission (the queue pair).

use std::ops::Range;

use lowtide_transport_proto::qp::{QueuePair, RecvWr, SgList, WrId};

use super::Violation;
use super::fabric::Fabric;
use super::fetch::Inbox;
use super::loans::Loans;
use super::outbox::{Next, Outbox, SlotPool};
use super::parcel::{Header, Kind, Lane, MESSAGE_MAX, Offer, SLOT_LEN, Stamp, next_record};
use crate::device::{IN_PLACE, QpId};

/// Urgent parcels that each side may have under way.
const URGENT_CREDITS: u16 = 4;
/// Receives and sends beyond the ordinary credits: for urgent parcels and for credit parcels.
pub(crate) const RESERVE: u16 = URGENT_CREDITS + 4;
/// Credit parcels under way at most.
const CREDITS_MAX: usize = 2;
/// Data parcels under way at most, however many the peer grants: it bounds the send queue.
pub(crate) const SENDS_MAX: u16 = 128;

/// A connection's data path.
pub(crate) struct Stream {
    pub(crate) qp: QpId,
    pub(crate) outbox: Outbox,
    pub(crate) loans: Loans,
    pub(crate) inbox: Inbox,
    /// Data parcels we may still post.
    credits: u16,
    /// What the peer granted in all.
    credits_max: u16,
    /// Credits taken from the peer and not yet given back.
    owed: u16,
    /// What we granted in all.
    granted: u16,
    /// Urgent parcels we may still post.
    urgent_credits: u16,
    /// Urgent credits taken from the peer and not yet given back.
    urgent_owed: u16,
    /// Offers that the peer has been told we have taken.
    taken_told: u32,
    /// A parcel is wanted although there is nothing to say: whether the peer is there shows by its
    /// answer.
    is_probing: bool,
    tx_sequence: u32,
    rx_sequence: u32,
    assembly: Assembly,
}

/// The parcel coming in, perhaps as several packets.
#[derive(Default)]
struct Assembly {
    lane: Lane,
    message: Vec<u8>,
    /// Its full length.
    len: usize,
    /// Whether a parcel of it is open: its header has been read, its last packet has not come.
    is_open: bool,
}

/// What a packet of a parcel brought.
#[derive(Debug)]
pub(crate) enum Arrived {
    /// Nothing to hand up yet.
    Nothing,
    /// Whole messages: so many records in this part of the payload.
    Records { count: u32, body: Range<usize> },
    /// One whole message, this part of the payload.
    Whole(Range<usize>),
    /// A message that was put together.
    Assembled(Vec<u8>),
    /// Nothing but credits; so many offers of ours have been taken.
    Credit { taken: u32 },
    /// A message of `len` bytes can be fetched.
    Offer { len: u32, rkey: u32, offer: Offer },
}

impl Stream {
    /// `credits` were granted by the peer, `granted` by us.
    pub(crate) fn new(
        qp: QpId,
        outbox: Outbox,
        loans: Loans,
        credits: u16,
        granted: u16,
    ) -> Stream {
        Stream {
            qp,
            outbox,
            loans,
            inbox: Inbox::default(),
            credits,
            credits_max: credits,
            owed: 0,
            granted,
            urgent_credits: URGENT_CREDITS,
            urgent_owed: 0,
            taken_told: 0,
            is_probing: false,
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

    /// Owes the peer the credit of a parcel that has been handed up.
    pub(crate) fn owe(&mut self, lane: Lane) {
        match lane {
            Lane::Ordinary => self.owed += 1,
            Lane::Urgent => self.urgent_owed += 1,
        }
    }

    /// Makes it believe that the peer grants so many; how many it granted.
    #[cfg(test)]
    pub(crate) fn replace_credits(&mut self, credits: u16) -> u16 {
        std::mem::replace(&mut self.credits, credits)
    }

    /// The lane of the parcel whose packet was received last.
    pub(crate) fn lane(&self) -> Lane {
        self.assembly.lane
    }

    /// Sends something soon, unless what is under way will be answered anyway.
    pub(crate) fn probe(&mut self) {
        self.is_probing = true;
    }

    /// Posts what waits and may go, and returns credits if many are owed, or at once if an offer has
    /// been taken or a probe is wanted.
    pub(crate) fn pump(&mut self, device: &mut Fabric, pool: &mut SlotPool) {
        while self.outbox.is_waiting(Lane::Urgent)
            && self.urgent_credits > 0
            && self.post(device, pool, Next::Waiting(Lane::Urgent))
        {
            self.urgent_credits -= 1;
        }
        while self.outbox.is_waiting(Lane::Ordinary)
            && self.credits > 0
            && self.post(device, pool, Next::Waiting(Lane::Ordinary))
        {
            self.credits -= 1;
        }
        let is_owing = (self.owed > 0 && self.owed >= self.granted / 2)
            || self.urgent_owed >= URGENT_CREDITS / 2;
        let taken = self.inbox.taken();
        self.is_probing &= self.outbox.posted() == 0;
        let is_due = is_owing || taken != self.taken_told || self.is_probing;
        if is_due
            && self.outbox.credits_posted() < CREDITS_MAX
            && self.post(device, pool, Next::Credit(taken))
        {
            self.taken_told = taken;
            self.is_probing = false;
        }
    }

    fn post(&mut self, device: &mut Fabric, pool: &mut SlotPool, next: Next) -> bool {
        let reserve = match next {
            Next::Waiting(Lane::Ordinary) => 0,
            Next::Waiting(Lane::Urgent) => URGENT_CREDITS,
            Next::Credit(_) => RESERVE,
        };
        if self.outbox.posted() >= usize::from(SENDS_MAX + reserve) {
            return false;
        }
        let memory = device.memory();
        let stamp = Stamp {
            credits: self.owed,
            urgent_credits: self.urgent_owed,
            sequence: self.tx_sequence,
        };
        let Some(posting) = self.outbox.post(pool, memory, next, stamp) else {
            return false;
        };
        if !device.post_send(self.qp, posting.key, posting.offset, posting.len) {
            // Only a queue pair in error refuses; its completions will close the connection.
            return false;
        }
        if posting.is_offer {
            self.loans.note_told();
        }
        (self.owed, self.urgent_owed) = (0, 0);
        self.tx_sequence = self.tx_sequence.wrapping_add(1);
        true
    }

    /// The payload of one packet, which begins at `offset` of its parcel and, if `is_last`, ends it.
    pub(crate) fn receive(
        &mut self,
        payload: &[u8],
        offset: u64,
        is_last: bool,
        spare: &mut Vec<Vec<u8>>,
    ) -> Result<Arrived, Violation> {
        if offset > 0 {
            if !self.assembly.is_open {
                return Err(Violation::Layout);
            }
            return self.append(payload, is_last);
        }
        let (header, body) = Header::parse(payload)?;
        let Header { kind, lane, stamp } = header;
        if stamp.sequence != self.rx_sequence || self.assembly.is_open {
            return Err(Violation::Sequence);
        }
        self.rx_sequence = self.rx_sequence.wrapping_add(1);
        self.credits = more(self.credits, stamp.credits, self.credits_max)?;
        self.urgent_credits = more(self.urgent_credits, stamp.urgent_credits, URGENT_CREDITS)?;
        if lane == Lane::Urgent && self.urgent_owed >= URGENT_CREDITS {
            // It has not been given so many back.
            return Err(Violation::Credits);
        }
        self.assembly.lane = lane;
        let body_range = payload.len() - body.len()..payload.len();
        match kind {
            Kind::Credit { taken } if is_last => Ok(Arrived::Credit { taken }),
            Kind::Offer { len, rkey } if is_last => {
                let offer = Offer::parse(body)?;
                Ok(Arrived::Offer { len, rkey, offer })
            }
            Kind::Records { count } if is_last => {
                check_records(count, body)?;
                Ok(Arrived::Records {
                    count,
                    body: body_range,
                })
            }
            Kind::Message { len } => {
                let len = len as usize;
                if len == 0 || len > MESSAGE_MAX {
                    return Err(Violation::Length);
                }
                if is_last && body.len() == len {
                    return Ok(Arrived::Whole(body_range));
                }
                self.assembly.message = spare.pop().unwrap_or_default();
                self.assembly.len = len;
                self.append(body, is_last)
            }
            _ => Err(Violation::Layout),
        }
    }

    fn append(&mut self, bytes: &[u8], is_last: bool) -> Result<Arrived, Violation> {
        let assembly = &mut self.assembly;
        assembly.is_open = !is_last;
        let left = assembly.len - assembly.message.len();
        if bytes.len() > left || (is_last && bytes.len() < left) {
            return Err(Violation::Length);
        }
        assembly.message.extend_from_slice(bytes);
        if !is_last {
            return Ok(Arrived::Nothing);
        }
        Ok(Arrived::Assembled(std::mem::take(&mut assembly.message)))
    }
}

/// Credits when some have come back; no more than there are in all.
fn more(credits: u16, back: u16, max: u16) -> Result<u16, Violation> {
    let credits = credits.checked_add(back).filter(|credits| *credits <= max);
    credits.ok_or(Violation::Credits)
}

/// Makes sure that the body is `count` records and nothing else, before the first is handed up.
fn check_records(count: u32, mut body: &[u8]) -> Result<(), Violation> {
    for _ in 0..count {
        next_record(&mut body)?;
    }
    if body.is_empty() {
        Ok(())
    } else {
        Err(Violation::Layout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> Stream {
        Stream::new(QpId(0), Outbox::new(4096, 8), Loans::new(1), 8, 8)
    }

    fn parcel(kind: Kind, credits: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; super::super::parcel::HEADER_LEN];
        let stamp = Stamp {
            credits,
            urgent_credits: 0,
            sequence,
        };
        let lane = Lane::Ordinary;
        Header { kind, lane, stamp }.emit(&mut bytes);
        bytes.extend_from_slice(body);
        bytes
    }

    /// An urgent record, which also returns urgent credits.
    fn urgent(urgent_credits: u16, sequence: u32) -> Vec<u8> {
        let mut bytes = parcel(Kind::Records { count: 1 }, 0, 0, &[0; 4]);
        let stamp = Stamp {
            credits: 0,
            urgent_credits,
            sequence,
        };
        Header {
            kind: Kind::Records { count: 1 },
            lane: Lane::Urgent,
            stamp,
        }
        .emit(&mut bytes);
        bytes
    }

    #[test]
    fn urgent_parcels_are_as_many_as_were_granted() {
        let mut stream = stream();
        let receive = |stream: &mut Stream, bytes: &[u8]| {
            let arrived = stream.receive(bytes, 0, true, &mut Vec::new());
            arrived.map(|_| stream.lane())
        };
        for sequence in 0..u32::from(URGENT_CREDITS) {
            assert_eq!(receive(&mut stream, &urgent(0, sequence)), Ok(Lane::Urgent));
            stream.owe(Lane::Urgent);
        }
        let next = u32::from(URGENT_CREDITS);
        let ordinary = parcel(Kind::Records { count: 0 }, 0, next, b"");
        assert_eq!(receive(&mut stream, &ordinary), Ok(Lane::Ordinary));
        let flood = receive(&mut stream, &urgent(0, next + 1));
        assert_eq!(flood, Err(Violation::Credits));
        // None of ours is out, so none can come back.
        let mut idle = Stream::new(QpId(0), Outbox::new(4096, 8), Loans::new(1), 8, 8);
        assert_eq!(receive(&mut idle, &urgent(1, 0)), Err(Violation::Credits));
    }

    #[test]
    fn several_packets_become_one_message() {
        let mut stream = stream();
        let mut spare = Vec::new();
        let start = parcel(Kind::Message { len: 10 }, 0, 0, b"abc");
        let mut receive =
            |bytes: &[u8], offset, last| stream.receive(bytes, offset, last, &mut spare);
        assert!(matches!(receive(&start, 0, false), Ok(Arrived::Nothing)));
        assert!(matches!(receive(b"def", 19, false), Ok(Arrived::Nothing)));
        match receive(b"ghij", 22, true) {
            Ok(Arrived::Assembled(message)) => assert_eq!(message, b"abcdefghij"),
            other => panic!("the message is complete, but {other:?}"),
        }
        let next = parcel(Kind::Message { len: 2 }, 0, 1, b"kl");
        assert!(matches!(receive(&next, 0, true), Ok(Arrived::Whole(range)) if range.len() == 2));
    }

    #[test]
    fn every_broken_rule_is_a_violation() {
        let message = |len| Kind::Message { len };
        let credit = Kind::Credit { taken: 0 };
        let offer = Kind::Offer { len: 1, rkey: 2 };
        let none = Kind::Records { count: 0 };
        use Violation::{Credits, Layout, Length, Sequence};
        let cases: [(&str, Violation, Vec<u8>, bool); 10] = [
            ("wrong sequence", Sequence, parcel(credit, 0, 1, b""), true),
            (
                "credits from nowhere",
                Credits,
                parcel(credit, 1, 0, b""),
                true,
            ),
            (
                "longer than admitted",
                Length,
                parcel(message(1 << 16), 0, 0, b"x"),
                false,
            ),
            (
                "more than announced",
                Length,
                parcel(message(2), 0, 0, b"abc"),
                true,
            ),
            (
                "less than announced",
                Length,
                parcel(message(4), 0, 0, b"abc"),
                true,
            ),
            (
                "fewer records than said",
                Layout,
                parcel(Kind::Records { count: 1 }, 0, 0, b""),
                true,
            ),
            (
                "bytes after the records",
                Layout,
                parcel(none, 0, 0, b"abcd"),
                true,
            ),
            (
                "records over two packets",
                Layout,
                parcel(none, 0, 0, b""),
                false,
            ),
            (
                "an offer cut short",
                Layout,
                parcel(offer, 0, 0, &[0; 15]),
                true,
            ),
            (
                "an offer over two packets",
                Layout,
                parcel(offer, 0, 0, &[0; 16]),
                false,
            ),
        ];
        for (name, violation, bytes, is_last) in cases {
            let result = stream().receive(&bytes, 0, is_last, &mut Vec::new());
            assert_eq!(result.err(), Some(violation), "{name}");
        }
        let middle = stream().receive(b"abc", 4096, true, &mut Vec::new());
        assert_eq!(middle.err(), Some(Layout), "starts in the middle");
    }

    #[test]
    fn offers_are_numbered_bounded_and_neither_short_nor_long() {
        let offer = |number| Offer { address: 0, number };
        let mut inbox = Inbox::default();
        let (short, long) = (MESSAGE_MAX as u32, 1 << 20);
        let mut ask = |len, number| inbox.offer(len, 1, offer(number), 1 << 20);
        assert_eq!(ask(short, 0), Err(Violation::Length));
        assert_eq!(ask(long + 1, 0), Err(Violation::Length));
        assert_eq!(ask(u32::MAX, 0), Err(Violation::Length));
        assert_eq!(ask(long, 1), Err(Violation::OfferOrder));
        for number in 0..super::super::loans::OFFERS_MAX as u32 {
            assert_eq!(ask(short + 1, number), Ok(()));
            assert_eq!(ask(long, number), Err(Violation::OfferOrder), "repeated");
        }
        let next = super::super::loans::OFFERS_MAX as u32;
        assert_eq!(ask(long, next), Err(Violation::OfferFlood));
    }
}
