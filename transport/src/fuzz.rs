//! Fuzz targets: functions of a byte string that panic if a promise is broken.
//!
//! libFuzzer calls them (`transport/fuzz`, `ci/fuzz`), and the tests below, on the corpus and on
//! seeded mutations of it. Compiled for nobody else.
//!
//! The promises: nothing panics or works without bound; what decodes encodes to the same; a work
//! request completes once; a queue pair and memory that a peer has no right to are as they were.

use std::collections::HashSet;

use lowtide_transport_proto::cm::{
    Cm, CmConfig, CmEvent, CommId, ConnectParams, MAD_LEN, Message, QpOffer, ResolveParams,
    ServiceId,
};
use lowtide_transport_proto::icrc;
use lowtide_transport_proto::qp::{
    Lkey, QpState, RecvWr, Remote, Rkey, SendOp, SendWr, SgList, WINDOW, WrId,
};
use lowtide_transport_proto::time::Nanos;
use lowtide_transport_proto::wire::{HEADER_LEN_MAX, ICRC_LEN, Mtu, Packet, Psn, Qpn};

use crate::device::hostile::{
    ATTACKED, Choices, arrival, attack, bystander, connect, device, flow_to, peer,
};
use crate::memory::{Access, SharedMemory};
use crate::pcap::Reader;

/// Steps of one run at most.
const STEPS_MAX: usize = 300;
const REGION: usize = 8192;

/// A datagram: every accessor, and the header again.
pub fn packet(data: &[u8]) {
    let Ok(packet) = Packet::new_checked(data) else {
        return;
    };
    let header = packet.header();
    let mut out = [0; HEADER_LEN_MAX];
    let len = header.emit(&mut out);
    assert_eq!(len, packet.header_bytes().len());
    let again = [&out[..len], &data[len..]].concat();
    assert_eq!(
        Packet::new_checked(&again).expect("as long").header(),
        header
    );
    assert_eq!(packet.payload(), &data[packet.payload_range()]);
    assert_eq!(packet.covered_bytes().len() + ICRC_LEN, packet.len());
    let _ = (packet.icrc(), packet.reth(), packet.aeth(), packet.imm());
    let solved = icrc::check_unknown_identification(&flow_to(peer(1), peer(2)), &packet);
    if let Some(identification) = solved {
        let flow = flow_to(peer(1), peer(2)).with_identification(identification);
        assert!(icrc::check(&flow, &packet), "solved, and so right");
    }
}

/// A connection manager that does what its program might, and hears whatever the bytes say.
pub fn handshake(data: &[u8]) {
    const CONNECTIONS_MAX: usize = 20;
    let mut choices = Choices::Given(data);
    let mut cm = Cm::new(CmConfig {
        connections_max: CONNECTIONS_MAX,
        ..CmConfig::new(peer(1).ip(), 1, 1)
    });
    cm.listen(ServiceId::tcp(1));
    cm.listen_datagram(ServiceId::udp(1));
    let (mut now, mut ended) = (Nanos(1), HashSet::new());
    for _ in 0..STEPS_MAX {
        if choices.is_over() {
            break;
        }
        match choices.below(8) {
            0 => begin(&mut cm, now, &mut choices),
            1 => now = now + Nanos::from_millis(choices.below(40_000)),
            _ => _ = cm.handle_mad(now, peer(2), &mad(&mut choices)),
        }
        for _ in 0..STEPS_MAX {
            match cm.poll_timeout() {
                Some(due) if due <= now => cm.handle_timeout(now),
                _ => break,
            }
        }
        let mut sent = 0;
        while let Some(transmit) = cm.poll_transmit() {
            let (tid, message) =
                Message::decode(&transmit.mad).expect("what we say is well formed");
            assert_eq!(message.encode(tid)[..], transmit.mad[..]);
            sent += 1;
            assert!(sent <= 4 * CONNECTIONS_MAX, "unbounded output");
        }
        while let Some(event) = cm.poll_event() {
            if let Some(id) = answer(&mut cm, now, &event, &mut choices) {
                assert!(ended.insert(id), "{event:?} after the end");
            }
        }
    }
}

/// Connects or asks as a client.
fn begin(cm: &mut Cm, now: Nanos, choices: &mut Choices<'_>) {
    let private_data = &[7; 255][..choices.below(256) as usize];
    if choices.below(2) == 0 {
        let params = ResolveParams {
            to: peer(2),
            service: ServiceId::udp(1),
            source_port: 1,
            private_data,
        };
        // Refused when there are too many.
        let _ = cm.resolve(now, &params);
        return;
    }
    let params = ConnectParams {
        to: peer(2),
        service: ServiceId::tcp(1),
        source_port: 1,
        qp: offer(),
        mtu: Mtu::B1024,
        retry_count: 7,
        ack_timeout: 14,
        private_data,
    };
    let _ = cm.connect(now, &params);
}

fn offer() -> QpOffer {
    QpOffer {
        qpn: Qpn::new(5),
        psn: Psn::new(6),
        responder_resources: 1,
        initiator_depth: 1,
        rnr_retry: 7,
    }
}

/// A management datagram that gets past the first checks, most of the time.
fn mad(choices: &mut Choices<'_>) -> Vec<u8> {
    let mut mad = vec![0; MAD_LEN];
    mad[..4].copy_from_slice(&[1, 7, 2, 3]);
    mad[17] = 0x10 + choices.below(11) as u8;
    // Small ids, so that messages meet connections.
    mad[27] = choices.below(CONNECTED_IDS) as u8;
    mad[31] = choices.below(CONNECTED_IDS) as u8;
    // Services that are listened on, half of the time.
    match choices.below(4) {
        0 => mad[32..40].copy_from_slice(&ServiceId::tcp(1).0.to_be_bytes()),
        1 => mad[36..44].copy_from_slice(&ServiceId::udp(1).0.to_be_bytes()),
        _ => {}
    }
    for _ in 0..choices.below(16) {
        let at = choices.below(MAD_LEN as u64) as usize;
        mad[at] = choices.below(256) as u8;
    }
    if choices.below(16) == 15 {
        mad.truncate(choices.below(MAD_LEN as u64) as usize);
    }
    if let Ok((tid, message)) = Message::decode(&mad) {
        let emitted = message.encode(tid);
        assert_eq!(Message::decode(&emitted), Ok((tid, message)));
    }
    mad
}

/// Ids that a run may meet: those of its own connections, and of the peer's.
const CONNECTED_IDS: u64 = 64;

/// Does one of the things that a program may do; the connection or question that has ended.
fn answer(cm: &mut Cm, now: Nanos, event: &CmEvent, choices: &mut Choices<'_>) -> Option<CommId> {
    let id = match *event {
        CmEvent::Inquiry { id, .. } => {
            let _ = cm.answer(now, id, choices.below(3) as u8, (Qpn::new(9), 9), b"here");
            return None;
        }
        CmEvent::ConnectRequest { id, .. }
        | CmEvent::Accepted { id, .. }
        | CmEvent::Established { id } => id,
        CmEvent::Rejected { id, .. }
        | CmEvent::Disconnected { id }
        | CmEvent::TimedOut { id }
        | CmEvent::Resolved { id, .. }
        | CmEvent::Unresolved { id, .. } => return Some(id),
    };
    // Whatever is out of turn is refused, and changes nothing.
    let _ = match choices.below(6) {
        0 | 1 => cm.accept(now, id, offer(), b"yes"),
        2 => cm.reject(now, id, 28, b"no"),
        3 => cm.establish(id),
        4 => cm.disconnect(now, id),
        _ => {
            cm.handle_communication(id);
            Ok(())
        }
    };
    None
}

/// A device with a queue pair that posts and hears whatever the bytes say, beside one of another
/// protection domain that must not notice.
pub fn queue_pair(data: &[u8]) {
    let mut choices = Choices::Given(data);
    let mut device = device();
    let bystander = bystander(&mut device);
    let memory = SharedMemory::new(REGION);
    let mine = device.memory.register_shared(ATTACKED, memory, Access::ALL);
    let mine = mine.expect("room").0;
    let keys = [
        mine,
        bystander.slot.0,
        bystander.local.0,
        bystander.foreign.0,
    ];
    let (id, qpn) = connect(&mut device, ATTACKED, peer(1));
    let before = *device.qp(bystander.id).expect("made").counters();
    let reports_gaps = choices.below(2) == 0;
    device.qp(id).expect("made").set_reports_gaps(reports_gaps);
    let (mut posted, mut completed, mut sent) = (0u64, 0u64, 0u64);
    let mut now = device.now();
    for _ in 0..STEPS_MAX {
        if choices.is_over() {
            break;
        }
        let qp = device.qp(id).expect("made");
        match choices.below(8) {
            0 => posted += u64::from(post(qp, mine, &mut choices)),
            1 => now = now + Nanos::from_micros(choices.below(60_000)),
            2 if qp.state() == QpState::Rts => qp.to_sqd().expect("it was in RTS"),
            2 if qp.state() == QpState::Sqd => qp.resume().expect("it was in SQD"),
            _ => {
                let psn = qp.expected_psn().value();
                let from = peer(1 + u8::from(choices.below(16) == 15) * 7);
                let numbers = [qpn, bystander.qpn];
                let bytes = attack(&mut choices, &device, from, numbers, &keys, psn);
                device.handle(now, &arrival(from), 0, &bytes);
                while let Some((_, datagram)) = device.handle_kept(now, id) {
                    device.give_back(datagram);
                }
            }
        }
        while device.expire(now).is_some() {}
        device.transmit(now);
        let counters = device.counters();
        let after = counters.sent_pkts + counters.send_err;
        assert!(after - sent <= 4 * u64::from(WINDOW), "unbounded output");
        sent = after;
        while let Some(completion) = device.poll_completion(id) {
            completed += 1;
            assert!(completion.byte_len as usize <= REGION);
        }
        while device
            .reporting(id)
            .is_some_and(|(machine, _)| machine.poll_event().is_some())
        {}
    }
    device.qp(id).expect("made").to_error();
    completed += std::iter::from_fn(|| device.poll_completion(id)).count() as u64;
    assert_eq!(posted, completed, "every request completes once");
    let after = *device.qp(bystander.id).expect("made").counters();
    assert_eq!(before, after, "the bystander heard nothing");
    bystander.check(&mut device);
}

/// Posts something; whether it was taken.
fn post(
    qp: &mut lowtide_transport_proto::qp::QueuePair,
    key: u32,
    choices: &mut Choices<'_>,
) -> bool {
    let (kind, at) = (choices.below(9), choices.below(REGION as u64 / 8) * 8);
    let len = choices.below(REGION as u64 + 1 - at) as u32;
    let local = SgList::one(Lkey(key), at, len);
    let remote = Remote {
        va: at,
        rkey: Rkey(key),
    };
    let word = SgList::one(Lkey(key), at, 8);
    let (op, local) = match kind {
        0 => (SendOp::Send, local),
        1 => (SendOp::SendImm(1), local),
        2 => (SendOp::Write(remote), local),
        3 => (SendOp::WriteImm(remote, 2), local),
        4 => (SendOp::Read(remote), local),
        5 => (SendOp::FetchAdd { remote, add: 1 }, word),
        6 => (SendOp::AtomicWrite(remote), word),
        _ => {
            let wr_id = WrId(1);
            return qp.post_recv(RecvWr { wr_id, local }).is_ok();
        }
    };
    qp.post_send(SendWr::new(WrId(0), op, local)).is_ok()
}

/// A capture file: read to its end, and what every frame holds.
pub fn capture(data: &[u8]) {
    let Ok(mut reader) = Reader::new(data) else {
        return;
    };
    let mut frames = 0;
    while let Ok(Some(frame)) = reader.next_frame() {
        if let Ok(datagram) = frame.datagram() {
            packet(datagram.payload);
        }
        frames += 1;
        assert!(frames <= data.len(), "a frame takes bytes");
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Runs a target on its corpus, and on `mutations` of that.
    fn replay(name: &str, target: fn(&[u8]), mutations: u32) {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("fuzz/corpus")
            .join(name);
        let mut files: Vec<_> = std::fs::read_dir(&dir)
            .unwrap_or_else(|error| panic!("{}: {error}", dir.display()))
            .map(|entry| entry.unwrap().path())
            .collect();
        files.sort();
        let corpus: Vec<Vec<u8>> = files
            .iter()
            .map(|file| std::fs::read(file).unwrap())
            .collect();
        assert!(
            corpus.len() >= 20,
            "{} has {} files",
            dir.display(),
            corpus.len()
        );
        corpus.iter().for_each(|input| target(input));
        let mut choices = Choices::Seeded(11);
        for _ in 0..mutations {
            let mut pick = || corpus[choices.below(corpus.len() as u64) as usize].clone();
            let (mut input, other) = (pick(), pick());
            for _ in 0..=choices.below(4) {
                mutate(&mut choices, &mut input, &other);
            }
            target(&input);
        }
    }

    fn mutate(choices: &mut Choices<'_>, input: &mut Vec<u8>, other: &[u8]) {
        let at = choices.below(input.len() as u64 + 1) as usize;
        let len = choices.below(64) as usize;
        match choices.below(6) {
            0 => input.truncate(at),
            1 => drop(input.drain(at..input.len().min(at + len))),
            2 => input.insert(at, choices.next() as u8),
            3 => {
                let from = choices.below(other.len() as u64 + 1) as usize;
                let piece = other[from..].iter().take(len).copied();
                input.splice(at..at, piece);
            }
            _ => {
                if let Some(byte) = input.get_mut(at) {
                    *byte = match choices.below(4) {
                        0 => 0,
                        1 => 0xFF,
                        2 => choices.next() as u8,
                        _ => *byte ^ 1 << choices.below(8),
                    };
                }
            }
        }
    }

    #[test]
    fn packets_and_their_mutations_keep_the_promises() {
        replay("packet", packet, 20_000);
    }

    #[test]
    fn handshakes_and_their_mutations_keep_the_promises() {
        replay("handshake", handshake, 3_000);
    }

    #[test]
    fn queue_pairs_and_their_mutations_keep_the_promises() {
        replay("queue_pair", queue_pair, 1_000);
    }

    #[test]
    fn captures_and_their_mutations_keep_the_promises() {
        replay("capture", capture, 3_000);
    }
}
