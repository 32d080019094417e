//! Messages of a sender that goes back N as Linux's rxe does, to a receiver that sleeps now and then, over a
//! network that loses, repeats and reorders: our responder receives each message whole. And what comes of
//! it when the sender says two things under one number, as rxe does.
//!
//! The sender is a model of `rxe_req.c` and `rxe_comp.c` (Linux 6.1). It sends one packet at a time, so
//! answers arrive while a message goes out again. One to all of that message is noted, and does not
//! complete it before it has been sent again. If a timeout comes then, rxe goes on behind the last byte of
//! the message: it sends an empty SEND Only under the number of the next one's first packet, and
//! all that follows moves on by one. If the receiver has begun the next message, that one's last packet
//! comes one too late: too much for its receive.

mod common;

use std::collections::{BTreeMap, VecDeque};

use common::*;
use lowtide_transport_proto::qp::*;
use lowtide_transport_proto::time::Nanos;
use lowtide_transport_proto::wire::*;

const SOURCE: u32 = 1;
const RECEIVE: u32 = 2;
const MTU: u32 = 256;
/// 16 packets.
const LEN: u32 = 16 * MTU;
const MESSAGES: u32 = 60;
/// rxe's.
const WINDOW: i32 = 128;
const TIMEOUT: u64 = 67_108_864;
/// For a packet to be made, to fly, and twice to be taken.
const PACE: u64 = 20_000;
const LATENCY: u64 = 30_000;
/// How long the receiver sleeps at most, and after what time a run is over.
const NAP_MAX: u64 = 150_000_000;
const PATIENCE: u64 = 60_000_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Posted,
    Processing,
    Pending,
}

#[derive(Clone, Copy, Debug)]
struct Message {
    state: State,
    first: Psn,
    last: Psn,
    left: u32,
}

/// The sender.
struct GoBack {
    messages: Vec<Message>,
    /// The oldest message that is not complete, and the one that is being sent.
    oldest: usize,
    next: usize,
    psn: Psn,
    /// All before this is acknowledged.
    acked: Psn,
    last_opcode: Option<Opcode>,
    is_retrying: bool,
    timer: Option<u64>,
    /// A message that is acknowledged is complete before anything is sent again; rxe's is not.
    is_careful: bool,
    refused: Option<Syndrome>,
}

impl GoBack {
    fn new(first: Psn, is_careful: bool) -> Self {
        let message = Message {
            state: State::Posted,
            first,
            last: first,
            left: LEN,
        };
        Self {
            messages: vec![message; MESSAGES as usize],
            oldest: 0,
            next: 0,
            psn: first,
            acked: first,
            last_opcode: None,
            is_retrying: false,
            timer: None,
            is_careful,
            refused: None,
        }
    }

    fn opcode(&self) -> Opcode {
        let begun = matches!(
            self.last_opcode,
            Some(Opcode::RcSendFirst | Opcode::RcSendMiddle)
        );
        match (begun, self.messages[self.next].left <= MTU) {
            (false, false) => Opcode::RcSendFirst,
            (false, true) => Opcode::RcSendOnly,
            (true, false) => Opcode::RcSendMiddle,
            (true, true) => Opcode::RcSendLast,
        }
    }

    fn can_send(&self) -> bool {
        self.refused.is_none()
            && self.next < self.messages.len()
            && self.psn.ahead_of(self.acked) <= WINDOW
    }

    fn send(&mut self, now: u64, memory: &TestMemory) -> Vec<u8> {
        let (opcode, psn) = (self.opcode(), self.psn);
        let message = &mut self.messages[self.next];
        let len = message.left.min(MTU);
        let at = self.next as u32 * LEN + (LEN - message.left);
        message.left -= len;
        if matches!(opcode, Opcode::RcSendFirst | Opcode::RcSendOnly) {
            message.first = psn;
            message.last = psn.plus(message.left.div_ceil(MTU));
        }
        let is_last = matches!(opcode, Opcode::RcSendLast | Opcode::RcSendOnly);
        message.state = match is_last {
            true => State::Pending,
            false => State::Processing,
        };
        self.next += usize::from(is_last);
        self.psn = psn.plus(1);
        self.last_opcode = Some(opcode);
        self.timer.get_or_insert(now + TIMEOUT);
        let mut header = Header::new(opcode, QPNS[1], psn, Extension::Bare);
        header.ack_req = is_last;
        let mut bytes = vec![0; header.len()];
        header.emit(&mut bytes);
        bytes.extend_from_slice(&memory.regions[&SOURCE].bytes[at as usize..][..len as usize]);
        bytes.extend_from_slice(&[0; ICRC_LEN]);
        bytes
    }

    fn complete(&mut self) {
        self.oldest += 1;
    }

    /// The oldest message, if something of it has been sent since the last time back.
    fn begun(&self) -> Option<Message> {
        let message = *self.messages.get(self.oldest)?;
        (message.state != State::Posted).then_some(message)
    }

    fn handle(&mut self, now: u64, aeth: Aeth, psn: Psn) {
        self.timer = Some(now + TIMEOUT);
        while let Some(message) = self.begun() {
            if psn.ahead_of(message.last) > 0 {
                if message.state != State::Pending {
                    return;
                }
                self.is_retrying = false;
                if message.last.ahead_of(self.acked) >= 0 {
                    self.acked = message.last.plus(1);
                }
                self.complete();
                continue;
            }
            let is_new = psn.ahead_of(self.acked) >= 0;
            if !is_new && psn == message.last {
                return self.complete();
            }
            if !is_new {
                return;
            }
            return match aeth.syndrome {
                Syndrome::ACK => {
                    self.is_retrying = false;
                    self.acked = psn.plus(1);
                    if message.state == State::Pending && psn == message.last {
                        self.complete();
                    }
                }
                Syndrome::Nak(NakCode::SequenceError) => {
                    self.acked = psn;
                    if !self.is_retrying {
                        self.go_back();
                    }
                }
                other => self.refused = Some(other),
            };
        }
    }

    fn handle_timeout(&mut self, now: u64) {
        self.timer = None;
        if self.begun().is_some() {
            self.go_back();
            self.timer = Some(now + TIMEOUT);
        }
    }

    fn go_back(&mut self) {
        if self.psn.ahead_of(self.acked) <= 0 {
            return;
        }
        self.is_retrying = true;
        while self.is_careful
            && let Some(message) = self.begun()
            && message.last.ahead_of(self.acked) < 0
        {
            self.complete();
        }
        (self.next, self.psn, self.last_opcode) = (self.oldest, self.acked, None);
        for index in self.oldest..self.messages.len() {
            if self.messages[index].state == State::Posted {
                break;
            }
            self.messages[index].left = LEN;
            if index == self.oldest {
                for _ in 0..self.acked.offset_from(self.messages[index].first) {
                    self.last_opcode = Some(self.opcode());
                    let left = &mut self.messages[index].left;
                    *left = left.saturating_sub(MTU);
                }
            }
            self.messages[index].state = State::Posted;
        }
    }
}

/// The receiver: our queue pair, behind a socket that has room for a few datagrams.
struct Receiver {
    qp: QueuePair,
    memory: TestMemory,
    kept: BTreeMap<u32, Vec<u8>>,
    inbox: VecDeque<Vec<u8>>,
    room: usize,
    wakes_at: u64,
    got: Vec<Completion>,
}

impl Receiver {
    fn new(first: Psn, room: usize, rng: &mut Rng) -> Self {
        let setup = Setup {
            mtu: Mtu::B256,
            psn: [first.value(), 0],
            depth: MESSAGES,
            ..Setup::default()
        };
        let mut qp = connected(1, setup);
        let mut memory = TestMemory::default();
        let len = (MESSAGES * LEN) as usize;
        let said = std::iter::repeat_with(|| rng.next() as u8);
        memory.register(SOURCE, said.take(len).collect());
        memory.register(RECEIVE, vec![0; len]);
        for index in 0..MESSAGES {
            let local = piece(RECEIVE, u64::from(index * LEN), LEN);
            let wr_id = WrId(index.into());
            qp.post_recv(RecvWr { wr_id, local }).unwrap();
        }
        Self {
            qp,
            memory,
            kept: BTreeMap::new(),
            inbox: VecDeque::new(),
            room,
            wakes_at: 0,
            got: Vec::new(),
        }
    }

    /// Takes the next datagram out of the socket; what it answers.
    fn take(&mut self, now: u64) -> Vec<Vec<u8>> {
        let now = Nanos(now);
        let bytes = self.inbox.pop_front().unwrap();
        let packet = Packet::new_checked(&bytes).unwrap();
        let outcome = self.qp.handle_packet(now, &packet, &mut self.memory);
        if outcome == Outcome::Ahead {
            self.kept.insert(packet.psn().value(), bytes.clone());
            self.qp.note_kept(&packet);
        }
        while let Some(wanted) = self.qp.wants_kept() {
            let bytes = self.kept.remove(&wanted.psn.value()).unwrap();
            let packet = Packet::new_checked(&bytes).unwrap();
            self.qp.handle_packet(now, &packet, &mut self.memory);
        }
        let Self {
            qp, memory, got, ..
        } = self;
        got.extend(std::iter::from_fn(|| qp.poll_completion()));
        let answers = std::iter::from_fn(|| qp.poll_transmit(now, Allow::All));
        answers.map(|t| assemble(&t, memory, &flow(1))).collect()
    }

    /// Every receive has what was sent for it.
    fn is_whole(&self) -> bool {
        let bytes = |key| &self.memory.regions[&key].bytes;
        self.got.len() == MESSAGES as usize
            && self.got.iter().all(|c| c.status == Status::Success)
            && self.got.iter().all(|c| c.byte_len == LEN)
            && bytes(SOURCE) == bytes(RECEIVE)
    }
}

/// One direction of the network.
struct Wire {
    faults: Faults,
    flying: BTreeMap<(u64, u64), Vec<u8>>,
    count: u64,
}

impl Wire {
    fn new(faults: Faults) -> Self {
        let flying = BTreeMap::new();
        let count = 0;
        Self {
            faults,
            flying,
            count,
        }
    }

    fn carry(&mut self, now: u64, bytes: Vec<u8>, rng: &mut Rng) {
        if rng.chance(self.faults.loss) {
            return;
        }
        for _ in 0..1 + u32::from(rng.chance(self.faults.duplicate)) {
            let late = u64::from(rng.chance(self.faults.reorder)) * rng.below(500_000);
            self.count += 1;
            self.flying
                .insert((now + LATENCY + late, self.count), bytes.clone());
        }
    }

    fn due(&self) -> Option<u64> {
        self.flying.keys().next().map(|key| key.0)
    }

    fn arrive(&mut self) -> Vec<u8> {
        self.flying.pop_first().unwrap().1
    }
}

/// What a run came to.
struct End {
    is_whole: bool,
    is_too_long: bool,
    refused: Option<Syndrome>,
    /// The sender has sent something again; and something else under the same number.
    went_back: bool,
    contradicted: bool,
}

fn run(seed: u64, is_careful: bool) -> End {
    let mut rng = Rng(seed);
    let mut pick = |of: &[u32]| of[rng.below(of.len() as u64) as usize];
    let faults = Faults {
        loss: pick(&[0, 0, 3, 20]),
        reorder: pick(&[0, 0, 10]),
        duplicate: pick(&[0, 0, 10]),
        flip: 0,
    };
    // Datagrams that wait while the receiver sleeps, and how often it does, in thousandths.
    let (room, sleeps) = (pick(&[30, 200]) as usize, pick(&[3, 20]));
    let first = Psn::new(rng.next() as u32);
    let mut sender = GoBack::new(first, is_careful);
    let mut receiver = Receiver::new(first, room, &mut rng);
    let (mut there, mut back) = (Wire::new(faults), Wire::new(faults));
    let (mut now, mut sends_at) = (0, 0);
    let (mut said, mut went_back, mut contradicted) = (BTreeMap::new(), false, false);
    while receiver.got.len() < MESSAGES as usize && now < PATIENCE {
        let sends = sender.can_send().then_some(sends_at);
        let takes = (!receiver.inbox.is_empty()).then_some(receiver.wakes_at);
        let times = [sends, there.due(), back.due(), takes, sender.timer];
        let Some(due) = times.into_iter().flatten().min() else {
            break;
        };
        now = now.max(due);
        if sends == Some(due) {
            let bytes = sender.send(now, &receiver.memory);
            let packet = Packet::new_checked(&bytes).unwrap();
            let what = (packet.opcode(), packet.payload().to_vec());
            if let Some(before) = said.insert(packet.psn().value(), what.clone()) {
                went_back = true;
                contradicted |= before != what;
            }
            there.carry(now, bytes, &mut rng);
            sends_at = now + PACE;
        } else if there.due() == Some(due) {
            let bytes = there.arrive();
            if receiver.inbox.len() < receiver.room {
                receiver.inbox.push_back(bytes);
            }
        } else if back.due() == Some(due) {
            let bytes = back.arrive();
            let packet = Packet::new_checked(&bytes).unwrap();
            sender.handle(now, packet.aeth().unwrap(), packet.psn());
        } else if takes == Some(due) {
            for answer in receiver.take(now) {
                back.carry(now, answer, &mut rng);
            }
            let nap = u64::from(rng.chance(sleeps)) * rng.below(NAP_MAX);
            receiver.wakes_at = now + PACE / 2 + nap;
        } else {
            sender.handle_timeout(now);
        }
    }
    let is_too_long = |c: &Completion| c.status == Status::LocalLength;
    End {
        is_whole: receiver.is_whole(),
        is_too_long: receiver.got.iter().any(is_too_long),
        refused: sender.refused,
        went_back,
        contradicted,
    }
}

const SEEDS: u64 = 1000;

#[test]
fn whoever_goes_back_is_received_whole() {
    let mut went_back = 0;
    for seed in 0..SEEDS {
        let end = run(seed, true);
        assert!(!end.contradicted, "seed {seed}: the model is right");
        assert_eq!(end.refused, None, "seed {seed}");
        assert!(end.is_whole, "seed {seed}");
        went_back += u64::from(end.went_back);
    }
    assert!(went_back > SEEDS / 2, "{went_back} of {SEEDS} runs");
}

#[test]
fn only_who_contradicts_himself_is_refused() {
    let (mut too_long, mut other) = (0, 0);
    for seed in 0..SEEDS {
        let end = run(seed, false);
        let is_right = end.is_whole && end.refused.is_none();
        assert!(is_right || end.contradicted, "seed {seed}");
        too_long += u32::from(end.is_too_long);
        other += u32::from(!is_right && !end.is_too_long);
    }
    println!("{SEEDS} runs: {too_long} ended with a message too long, {other} otherwise wrong");
    assert!(too_long > 0, "the model does what rxe does");
}
