//! Connection events and completions awaited under tokio: both channels are file descriptors that
//! are readable while something waits. `cargo run -p lowtide-transport --example awaits`

use std::error::Error;
use std::os::fd::{AsFd, OwnedFd};

use lowtide_transport::cm::{ConnectOptions, Event, EventChannel, ServiceId};
use lowtide_transport::verbs::*;
use tokio::io::unix::AsyncFd;

/// A channel, and a descriptor of it for the runtime.
struct Awaited<C>(C, AsyncFd<OwnedFd>);

impl<C: AsFd> Awaited<C> {
    fn new(channel: C) -> Result<Self, Box<dyn Error>> {
        let fd = channel.as_fd().try_clone_to_owned()?;
        // SAFETY: an OwnedFd is open, and the same descriptor, as long as it lives.
        Ok(Awaited(channel, unsafe { AsyncFd::register(fd) }?))
    }

    /// Polls, and sleeps on the descriptor while there is nothing.
    async fn next<T>(&self, mut poll: impl FnMut(&C) -> Option<T>) -> T {
        loop {
            if let Some(item) = poll(&self.0) {
                return item;
            }
            self.1.readable().await.expect("a runtime").clear_ready();
        }
    }
}

#[rustfmt::skip]
type Side = (Awaited<EventChannel>, QueuePair, Awaited<CompletionChannel>, CompletionQueue, Slot);

fn side(last: u8) -> Result<Side, Box<dyn Error>> {
    let pid = std::process::id().to_le_bytes();
    let address = ([127, 64 + pid[1] % 32, pid[0], last], 4791).into();
    let device = Device::open(address, &DeviceOptions::default())?;
    let channel = device.completion_channel()?;
    let queue = device.completion_queue_on(4, Some(&channel));
    let domain = device.protection_domain();
    let qp = domain.queue_pair(&queue, &queue, 2, 2)?;
    qp.to_init(Access::LOCAL)?;
    let events = Awaited::new(EventChannel::new(&device)?)?;
    Ok((events, qp, Awaited::new(channel)?, queue, domain.slot(64)?))
}

async fn completion(channel: &Awaited<CompletionChannel>, queue: &CompletionQueue) -> Slot {
    let done = channel.next(|channel| {
        while channel.event().is_some() {}
        queue.request_notification();
        queue.poll()
    });
    done.await.slot.expect("it was posted with one")
}

#[rustfmt::skip]
fn main() -> Result<(), Box<dyn Error>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(async {
        let (asks, qp, sent, sends, mut ball) = side(1)?;
        let (asked, peer, come, receives, mut glove) = side(2)?;
        let (service, options) = (ServiceId::tcp(7002), ConnectOptions::default());
        let _listener = asked.0.listen(service)?;
        let thrower = asks.0.connect(peer.address().socket, service, qp, &options)?;
        let Event::Request(request) = asked.next(EventChannel::poll).await else { panic!() };
        let catcher = request.accept(peer, &options)?;
        asks.next(EventChannel::poll).await; // Event::Established
        for round in 0..1000u32 {
            ball[..4].copy_from_slice(&round.to_le_bytes());
            catcher.queue_pair().post_recv(0, Buffer::Slot(glove, 64))?;
            thrower.queue_pair().post_send(0, SendOp::Send, Buffer::Slot(ball, 64))?;
            (glove, ball) = (completion(&come, &receives).await, completion(&sent, &sends).await);
            assert_eq!(glove[..4], round.to_le_bytes());
        }
        println!("1000 messages awaited");
        Ok(())
    })
}
