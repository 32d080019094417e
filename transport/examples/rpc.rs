//! Remote procedure calls over SEND and RECV: a server that adds numbers, and its client.
//!
//! `cargo run -p lowtide-transport --example rpc`

use std::error::Error;
use std::time::{Duration, Instant};

use lowtide_transport::cm::{ConnectOptions, Event, EventChannel, ServiceId};
use lowtide_transport::verbs::*;

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

const ADDER: ServiceId = ServiceId::tcp(7001);
const PATIENCE: Duration = Duration::from_secs(10);

/// A device with a queue pair in INIT that has a receive posted, and a slot for what it sends.
fn end(last: u8) -> Outcome<(EventChannel, QueuePair, CompletionQueue, Slot)> {
    let pid = std::process::id();
    let ip = [127, 64 + (pid >> 8 & 31) as u8, pid as u8, last];
    let device = Device::open((ip, 4791).into(), &DeviceOptions::default())?;
    let (domain, queue) = (device.protection_domain(), device.completion_queue(4));
    let qp = domain.queue_pair(&queue, &queue, 2, 2)?;
    qp.to_init(Access::LOCAL)?;
    qp.post_recv(0, Buffer::Slot(domain.slot(64)?, 64))?;
    Ok((EventChannel::new(&device)?, qp, queue, domain.slot(64)?))
}

/// Sends, and waits for the answer; for a server, for the next request. Both slots.
fn exchange(qp: &QueuePair, queue: &CompletionQueue, message: Slot) -> Outcome<[Slot; 2]> {
    qp.post_send(1, SendOp::Send, Buffer::Slot(message, 16))?;
    let mut slots = [None, None];
    while let [None, _] | [_, None] = &slots {
        let done = queue.wait(PATIENCE).ok_or("nothing comes")?;
        if done.status != Status::Success {
            return Err("the connection has ended".into());
        }
        slots[usize::from(done.kind.is_recv())] = done.slot;
    }
    Ok(slots.map(|slot| slot.expect("looked at above")))
}

fn serve(events: EventChannel, qp: QueuePair, queue: CompletionQueue, slot: Slot) -> Outcome<()> {
    let Some(Event::Request(client)) = events.wait(PATIENCE) else {
        return Err("no client".into());
    };
    let connection = client.accept(qp, &ConnectOptions::default())?;
    let (qp, first) = (connection.queue_pair(), queue.wait(PATIENCE));
    let (mut answer, mut request) = (slot, first.and_then(|done| done.slot).ok_or("no request")?);
    loop {
        let [a, b] = [0, 8].map(|at| u64::from_le_bytes(*request[at..].first_chunk().unwrap()));
        answer[..8].copy_from_slice(&(a + b).to_le_bytes());
        qp.post_recv(0, Buffer::Slot(request, 64))?;
        match exchange(qp, &queue, answer) {
            Ok(slots) => [answer, request] = slots,
            Err(_) => return Ok(()),
        }
    }
}

fn main() -> Outcome<()> {
    let ((events, qp, queue, mut request), theirs) = (end(1)?, end(2)?);
    let (to, _listener) = (theirs.1.address().socket, theirs.0.listen(ADDER)?);
    let server = std::thread::spawn(|| serve(theirs.0, theirs.1, theirs.2, theirs.3));
    let connection = events.connect(to, ADDER, qp, &ConnectOptions::default())?;
    let answer = events.wait(PATIENCE);
    assert!(matches!(answer, Some(Event::Established { .. })));
    let (start, calls, qp) = (Instant::now(), 1000u32, connection.queue_pair());
    for call in 0..u64::from(calls) {
        request[..8].copy_from_slice(&call.to_le_bytes());
        request[8..16].copy_from_slice(&7u64.to_le_bytes());
        let [sent, answer] = exchange(qp, &queue, request)?;
        assert_eq!(answer[..8], (call + 7).to_le_bytes());
        qp.post_recv(0, Buffer::Slot(answer, 64))?;
        request = sent;
    }
    println!("{calls} calls, {:?} each", start.elapsed() / calls);
    drop(connection);
    server.join().expect("it does not panic")
}
