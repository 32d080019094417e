//! Connections: the calls of rdma_cm, on event channels of one device.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::{null, null_mut};
use std::sync::{Arc, Mutex};

use lowtide_transport::cm::{
    ConnectOptions, Connection, ConnectionId, Event, EventChannel, Listener, Request, ServiceId,
};
use lowtide_transport::raw::QueuePair;
use lowtide_transport::raw::types::Gid;

use crate::abi::*;
use crate::device::lowtide_context;
use crate::error::{Fault, code, object, run};
use crate::handle::{Name, Unacknowledged, Uses, destroy, get, lock, next};
use crate::queue_pair::lowtide_qp;

/// The port spaces of rdma_cm.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum lowtide_port_space {
    LOWTIDE_PS_TCP = 0x0106,
    LOWTIDE_PS_UDP = 0x0111,
}

/// What happens on an event channel.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum lowtide_cm_event_type {
    /// Somebody asks: id is new, to be accepted or rejected with, and to be destroyed.
    LOWTIDE_CM_EVENT_CONNECT_REQUEST = 4,
    /// The peer has not answered for too long.
    LOWTIDE_CM_EVENT_UNREACHABLE = 7,
    /// The peer refused; status is the reason of the InfiniBand architecture.
    LOWTIDE_CM_EVENT_REJECTED = 8,
    /// Both sides are ready: the queue pair is in RTS.
    LOWTIDE_CM_EVENT_ESTABLISHED = 9,
    /// The connection has ended, whoever wanted it; the queue pair is in ERR.
    LOWTIDE_CM_EVENT_DISCONNECTED = 10,
}

/// What both sides of a connection agree on.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct lowtide_conn_param {
    /// Told to the peer's program, padded with zeros; NULL is none.
    pub private_data: *const c_void,
    pub private_data_len: u8,
    /// READs and atomics of the peer served at once, and of ours under way at once.
    pub responder_resources: u8,
    pub initiator_depth: u8,
    /// A client's word counts for both sides; 7 is without limit.
    pub retry_count: u8,
    pub rnr_retry_count: u8,
    /// Local ACK timeout: 4.096 us times 2 to this power. A client's word counts for both sides.
    pub ack_timeout: u8,
}

/// An event. All it points to lives until it is acknowledged.
#[repr(C)]
pub struct lowtide_cm_event {
    pub id: *mut lowtide_cm_id,
    /// Requests: the listener; NULL if it has gone.
    pub listen_id: *mut lowtide_cm_id,
    /// A lowtide_cm_event_type.
    pub event: u32,
    pub status: i32,
    /// What the peer's program says, padded with zeros.
    pub private_data: *const c_void,
    pub private_data_len: u32,
    /// Requests: the client's address.
    pub peer: lowtide_gid,
}

/// Where events of listeners and connections arrive.
pub struct lowtide_cm_channel {
    inner: Arc<Channel>,
    uses: Uses,
    _device: Uses,
}

struct Channel {
    raw: EventChannel,
    local: SocketAddr,
    names: Mutex<Names>,
}

/// C's names: events know numbers.
#[derive(Default)]
struct Names {
    connections: HashMap<ConnectionId, Name<lowtide_cm_id>>,
    listeners: HashMap<ServiceId, Name<lowtide_cm_id>>,
}

/// A listener, a request, or a connection.
pub struct lowtide_cm_id {
    state: Mutex<State>,
    channel: Arc<Channel>,
    unacknowledged: Unacknowledged,
    context: *mut c_void,
    uses: Uses,
    /// What makes its channel stay.
    _held: Uses,
}

enum State {
    Listening(#[allow(dead_code, reason = "dropping it stops listening")] Listener),
    Requested(Request),
    Connected(
        Connection<Arc<QueuePair>>,
        #[allow(dead_code, reason = "keeps the queue pair")] Uses,
    ),
    Answered,
}

impl lowtide_cm_id {
    fn new(channel: &Arc<Channel>, state: State, context: *mut c_void, held: Uses) -> Box<Self> {
        Box::new(lowtide_cm_id {
            state: Mutex::new(state),
            channel: channel.clone(),
            unacknowledged: Unacknowledged::default(),
            context,
            uses: Uses::default(),
            _held: held,
        })
    }
}

fn service(port_space: u32, port: u16) -> Result<ServiceId, Fault> {
    match port_space {
        0x0106 => Ok(ServiceId::tcp(port)),
        0x0111 => Ok(ServiceId::udp(port)),
        _ => Err(Fault::Argument("not a port space of rdma_cm")),
    }
}

/// # Safety
/// NULL, or of a live structure whose data is as long as it says.
unsafe fn options(param: *const lowtide_conn_param) -> Result<ConnectOptions, Fault> {
    if param.is_null() {
        return Ok(ConnectOptions::default());
    }
    // SAFETY: the caller's promise.
    let param = unsafe { get(param, "conn_param") }?;
    // SAFETY: the caller's promise.
    let private_data = unsafe { data(param.private_data, param.private_data_len) }?;
    Ok(ConnectOptions {
        private_data: private_data.to_vec(),
        responder_resources: param.responder_resources,
        initiator_depth: param.initiator_depth,
        retry_count: param.retry_count,
        rnr_retry: param.rnr_retry_count,
        ack_timeout: param.ack_timeout,
    })
}

/// # Safety
/// NULL, or of so many bytes.
unsafe fn data<'a>(data: *const c_void, len: u8) -> Result<&'a [u8], Fault> {
    match (data.is_null(), len) {
        (_, 0) => Ok(&[]),
        (true, _) => Err(Fault::Null("private_data")),
        // SAFETY: the caller's promise.
        (false, len) => Ok(unsafe { std::slice::from_raw_parts(data.cast(), len.into()) }),
    }
}

/// A new event channel.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_cm_create_channel(
    context: *mut lowtide_context,
) -> *mut lowtide_cm_channel {
    object(|| {
        // SAFETY: the header's contract.
        let context = unsafe { get(context, "context") }?;
        Ok(Box::new(lowtide_cm_channel {
            inner: Arc::new(Channel {
                raw: EventChannel::on(&context.raw)?,
                local: context.raw.local_addr(),
                names: Mutex::default(),
            }),
            uses: Uses::default(),
            _device: context.uses.hold(),
        }))
    })
}

/// Ends a channel; requests that wait in it are rejected.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_cm_destroy_channel(channel: *mut lowtide_cm_channel) -> c_int {
    // SAFETY: the header's contract.
    code(|| unsafe {
        destroy(
            channel,
            "channel",
            |c| (&c.uses, "ids of the channel"),
            |_| (),
        )
    })
}

/// The file descriptor that is readable as long as an event waits; -1 for NULL. It is the
/// channel's: not to be closed or read, but O_NONBLOCK may be set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_cm_channel_fd(channel: *const lowtide_cm_channel) -> c_int {
    run(|| {
        // SAFETY: the header's contract.
        Ok(unsafe { get(channel, "channel") }?
            .inner
            .raw
            .as_fd()
            .as_raw_fd())
    })
    .unwrap_or(-1)
}

/// Listens for connections to a port of a lowtide_port_space, until the id is destroyed.
/// EADDRINUSE: somebody does on this device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_cm_listen(
    channel: *mut lowtide_cm_channel,
    port_space: u32,
    port: u16,
    context: *mut c_void,
) -> *mut lowtide_cm_id {
    object(|| {
        // SAFETY: the header's contract.
        let channel = unsafe { get(channel, "channel") }?;
        let service = service(port_space, port)?;
        let mut names = lock(&channel.inner.names);
        let listener = channel.inner.raw.listen(service)?;
        let held = channel.uses.hold();
        let id = lowtide_cm_id::new(&channel.inner, State::Listening(listener), context, held);
        names.listeners.insert(service, Name::of(&id));
        Ok(id)
    })
}

/// Asks the peer with this GID for a connection to a port of a lowtide_port_space. Its device is
/// taken to listen on udp_port; 0 is the port of this device. The queue pair is in INIT, with
/// receives posted, and the connection's until the id is destroyed. ESTABLISHED, REJECTED or
/// UNREACHABLE follows. param may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_cm_connect(
    channel: *mut lowtide_cm_channel,
    peer: *const lowtide_gid,
    udp_port: u16,
    port_space: u32,
    port: u16,
    qp: *mut lowtide_qp,
    param: *const lowtide_conn_param,
    context: *mut c_void,
) -> *mut lowtide_cm_id {
    object(|| {
        // SAFETY: the header's contract.
        let (channel, qp) = unsafe { (get(channel, "channel")?, get(qp, "qp")?) };
        // SAFETY: as above.
        let (peer, options) = unsafe { (get(peer, "peer")?, options(param)?) };
        let udp_port = match udp_port {
            0 => channel.inner.local.port(),
            port => port,
        };
        let to = SocketAddr::new(Gid(peer.raw).ip(), udp_port);
        let service = service(port_space, port)?;
        // Held until the answer's event can find the id.
        let mut names = lock(&channel.inner.names);
        let connection = channel
            .inner
            .raw
            .connect(to, service, qp.raw.clone(), &options)
            .map_err(|refused| Fault::Connect(refused.error))?;
        let number = connection.id();
        let state = State::Connected(connection, qp.uses.hold());
        let id = lowtide_cm_id::new(&channel.inner, state, context, channel.uses.hold());
        names.connections.insert(number, Name::of(&id));
        Ok(id)
    })
}

/// Accepts a request with a queue pair in INIT, which is the connection's until the id is
/// destroyed. It may be posted to at once; ESTABLISHED follows. param may be NULL. A request that
/// could not be accepted is rejected.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_cm_accept(
    id: *mut lowtide_cm_id,
    qp: *mut lowtide_qp,
    param: *const lowtide_conn_param,
) -> c_int {
    code(|| {
        // SAFETY: the header's contract.
        let (id, qp) = unsafe { (get(id, "id")?, get(qp, "qp")?) };
        // SAFETY: as above.
        let options = unsafe { options(param) }?;
        let mut state = lock(&id.state);
        let request = take_request(&mut state)?;
        let connection = request
            .accept(qp.raw.clone(), &options)
            .map_err(|refused| Fault::Connect(refused.error))?;
        *state = State::Connected(connection, qp.uses.hold());
        Ok(())
    })
}

fn take_request(state: &mut State) -> Result<Request, Fault> {
    match std::mem::replace(state, State::Answered) {
        State::Requested(request) => Ok(request),
        other => {
            *state = other;
            Err(Fault::Argument("the id is not of a request that waits"))
        }
    }
}

/// Rejects a request; private_data may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_cm_reject(
    id: *mut lowtide_cm_id,
    private_data: *const c_void,
    private_data_len: u8,
) -> c_int {
    code(|| {
        // SAFETY: the header's contract.
        let id = unsafe { get(id, "id") }?;
        // SAFETY: as above.
        let words = unsafe { data(private_data, private_data_len) }?;
        let request = take_request(&mut lock(&id.state))?;
        request.reject(lowtide_transport::cm::reason::CONSUMER, words);
        Ok(())
    })
}

/// Ends a connection, or withdraws a request of ours. The queue pair goes to ERR at once;
/// DISCONNECTED follows.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_cm_disconnect(id: *mut lowtide_cm_id) -> c_int {
    code(|| {
        // SAFETY: the header's contract.
        let id = unsafe { get(id, "id") }?;
        match &*lock(&id.state) {
            State::Connected(connection, _) => connection.disconnect(),
            _ => return Err(Fault::Argument("the id is not of a connection")),
        }
        Ok(())
    })
}

/// Ends an id, after all its events are acknowledged: stops listening, rejects, disconnects. No
/// event follows.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_cm_destroy_id(id: *mut lowtide_cm_id) -> c_int {
    code(|| {
        let before = |id: &lowtide_cm_id| {
            let is_other = |known: &Name<_>| !std::ptr::eq(known.pointer(), id);
            let mut names = lock(&id.channel.names);
            names.connections.retain(|_, known| is_other(known));
            names.listeners.retain(|_, known| is_other(known));
            drop(names);
            id.unacknowledged.wait_for_none();
        };
        // SAFETY: the header's contract.
        unsafe { destroy(id, "id", |id| (&id.uses, "nobody"), before) }
    })
}

/// The program's own pointer that an id was made with (a request's is its listener's); NULL for
/// NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_cm_context(id: *const lowtide_cm_id) -> *mut c_void {
    // SAFETY: the header's contract.
    run(|| Ok(unsafe { get(id, "id") }?.context)).unwrap_or(null_mut())
}

/// An event as C holds it, and what it points to.
#[repr(C)]
struct Held {
    event: lowtide_cm_event,
    private_data: Vec<u8>,
}

/// The next event, asleep until it comes. EAGAIN: the descriptor does not block. Each must be
/// acknowledged, which frees it: destroying its id waits for that.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_cm_get_event(
    channel: *mut lowtide_cm_channel,
    event: *mut *mut lowtide_cm_event,
) -> c_int {
    code(|| {
        // SAFETY: the header's contract.
        let channel = unsafe { get(channel, "channel") }?;
        if event.is_null() || !event.is_aligned() {
            return Err(Fault::Null("event"));
        }
        let held = next(channel.inner.raw.as_fd(), || {
            loop {
                let event = channel.inner.raw.poll()?;
                // One of an id that is gone tells nobody anything.
                if let Some(held) = translate(channel, event) {
                    return Some(held);
                }
            }
        })?;
        // SAFETY: not NULL, and aligned; the event is the first field.
        unsafe { event.write(Box::into_raw(held).cast()) };
        Ok(())
    })
}

fn translate(channel: &lowtide_cm_channel, event: Event) -> Option<Box<Held>> {
    use lowtide_cm_event_type::*;
    let mut names = lock(&channel.inner.names);
    let mut held = Box::new(Held {
        event: lowtide_cm_event {
            id: null_mut(),
            listen_id: null_mut(),
            event: 0,
            status: 0,
            private_data: null(),
            private_data_len: 0,
            peer: lowtide_gid { raw: [0; 16] },
        },
        private_data: Vec::new(),
    });
    let (kind, id) = match event {
        Event::Request(request) => {
            held.private_data = request.private_data().to_vec();
            held.event.peer.raw = Gid::from_ip(request.peer()).0;
            let mut context = null_mut();
            if let Some(listener) = names.listeners.get(&request.service()) {
                held.event.listen_id = listener.pointer();
                // SAFETY: what has a name lives, and from here on until it is acknowledged.
                let listener = unsafe { listener.handle() };
                listener.unacknowledged.add();
                context = listener.context;
            }
            let number = request.id();
            let state = State::Requested(request);
            let id = lowtide_cm_id::new(&channel.inner, state, context, channel.uses.hold());
            names.connections.insert(number, Name::of(Box::leak(id)));
            (LOWTIDE_CM_EVENT_CONNECT_REQUEST, number)
        }
        Event::Established { id, private_data } => {
            held.private_data = private_data;
            (LOWTIDE_CM_EVENT_ESTABLISHED, id)
        }
        Event::Rejected {
            id,
            reason,
            private_data,
        } => {
            held.private_data = private_data;
            held.event.status = reason.into();
            (LOWTIDE_CM_EVENT_REJECTED, id)
        }
        Event::Unreachable { id } => {
            held.event.status = -libc::ETIMEDOUT;
            (LOWTIDE_CM_EVENT_UNREACHABLE, id)
        }
        Event::Disconnected { id } => (LOWTIDE_CM_EVENT_DISCONNECTED, id),
        // Datagram services are not served here.
        _ => return None,
    };
    let id = names.connections.get(&id)?;
    // SAFETY: what has a name lives, and from here on until it is acknowledged.
    unsafe { id.handle() }.unacknowledged.add();
    held.event.id = id.pointer();
    held.event.event = kind as u32;
    held.event.private_data = held.private_data.as_ptr().cast();
    held.event.private_data_len = held.private_data.len() as u32;
    Some(held)
}

/// Acknowledges and frees an event.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_cm_ack_event(event: *mut lowtide_cm_event) -> c_int {
    code(|| {
        if event.is_null() {
            return Err(Fault::Null("event"));
        }
        // SAFETY: the header's contract: an event from the function above, not acknowledged yet.
        let held = unsafe { Box::from_raw(event.cast::<Held>()) };
        for id in [held.event.id, held.event.listen_id] {
            // SAFETY: ids live until their events are acknowledged.
            if let Ok(id) = unsafe { get(id, "id") } {
                id.unacknowledged.acknowledge(1);
            }
        }
        Ok(())
    })
}
