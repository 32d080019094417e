//! Devices, protection domains, asynchronous events.

use std::ffi::{CStr, OsStr, c_char, c_int};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;

use lowtide_transport::raw::types::{AsyncEvent, Gid};
use lowtide_transport::raw::{Context, ProtectionDomain};
use lowtide_transport::verbs::DeviceOptions;

use crate::abi::*;
use crate::error::{Fault, code, object};
use crate::handle::{SharedNames, Uses, destroy, get, get_mut, lock, make_blocking, next};

/// An open device.
pub struct lowtide_context {
    pub(crate) raw: Context,
    pub(crate) names: SharedNames,
    pub(crate) uses: Uses,
}

/// A protection domain.
pub struct lowtide_pd {
    pub(crate) raw: ProtectionDomain,
    pub(crate) names: SharedNames,
    pub(crate) uses: Uses,
    _device: Uses,
}

/// The version of the library: 10,000 times the first number, 100 times the second, the third.
#[unsafe(no_mangle)]
pub extern "C" fn lowtide_version() -> u32 {
    let part = |text: &str| text.parse::<u32>().unwrap_or(0);
    part(env!("CARGO_PKG_VERSION_MAJOR")) * 10_000
        + part(env!("CARGO_PKG_VERSION_MINOR")) * 100
        + part(env!("CARGO_PKG_VERSION_PATCH"))
}

unsafe fn address(text: *const c_char) -> Result<IpAddr, Fault> {
    if text.is_null() {
        return Err(Fault::Null("address"));
    }
    // SAFETY: not NULL, and so a string of C, as the header asks.
    let text = unsafe { CStr::from_ptr(text) };
    let address = text.to_str().ok().and_then(|text| text.parse().ok());
    address.ok_or(Fault::Argument("not a numeric IPv4 or IPv6 address"))
}

/// Opens a soft-RoCE device on a numeric address of this host and a UDP port. LOWTIDE_ROCE_PORT is
/// the one that adapters and kernels know; both ends must use the same; 0 takes any that is free.
/// EADDRINUSE: another process or the kernel's own soft-RoCE has the port, and the message says
/// what to do.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_open_device(
    address_text: *const c_char,
    port: u16,
) -> *mut lowtide_context {
    // SAFETY: the header's contract.
    object(|| unsafe { open(address_text, port, &DeviceOptions::default()) })
}

/// The same, for a device that writes a capture file (pcap): every packet that it sends,
/// and every one with a right ICRC that it receives. Its packets then go by UDP, also to peers on the
/// same host. The message of an error says what is wrong with the file.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_open_captured_device(
    address_text: *const c_char,
    port: u16,
    path: *const c_char,
) -> *mut lowtide_context {
    object(|| {
        if path.is_null() {
            return Err(Fault::Null("path"));
        }
        // SAFETY: not NULL, and so a string of C, as the header asks.
        let path = unsafe { CStr::from_ptr(path) };
        let options = DeviceOptions {
            capture: Some(OsStr::from_bytes(path.to_bytes()).into()),
            ..DeviceOptions::default()
        };
        // SAFETY: the header's contract.
        unsafe { open(address_text, port, &options) }
    })
}

unsafe fn open(
    address_text: *const c_char,
    port: u16,
    options: &DeviceOptions,
) -> Result<Box<lowtide_context>, Fault> {
    // SAFETY: the header's contract.
    let ip = unsafe { address(address_text) }?;
    let raw = Context::open(SocketAddr::new(ip, port), options)?;
    make_blocking(raw.as_fd())?;
    Ok(Box::new(lowtide_context {
        raw,
        names: SharedNames::default(),
        uses: Uses::default(),
    }))
}

/// Closes a device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_close_device(context: *mut lowtide_context) -> c_int {
    // SAFETY: the header's contract.
    code(|| unsafe {
        destroy(
            context,
            "context",
            |c| (&c.uses, "objects of the device"),
            |_| (),
        )
    })
}

/// The UDP port that a device listens on; 0 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_udp_port(context: *const lowtide_context) -> u16 {
    // SAFETY: the header's contract.
    crate::error::run(|| Ok(unsafe { get(context, "context") }?.raw.local_addr().port()))
        .unwrap_or(0)
}

/// The GID of a numeric address.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_parse_gid(text: *const c_char, gid: *mut lowtide_gid) -> c_int {
    code(|| {
        // SAFETY: the header's contract.
        let (ip, gid) = unsafe { (address(text)?, get_mut(gid, "gid")?) };
        gid.raw = Gid::from_ip(ip).0;
        Ok(())
    })
}

/// What a device can do at most.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_query_device(
    context: *const lowtide_context,
    attr: *mut lowtide_device_attr,
) -> c_int {
    code(|| {
        // SAFETY: the header's contract.
        let (context, attr) = unsafe { (get(context, "context")?, get_mut(attr, "attr")?) };
        let known = context.raw.query_device();
        *attr = lowtide_device_attr {
            node_guid: known.guid,
            max_mr_size: known.mr_size,
            max_qp: known.qp,
            max_qp_wr: known.qp_wr,
            max_sge: known.sge,
            max_inline_data: known.inline_data,
            max_cq: known.cq,
            max_cqe: known.cqe,
            max_mr: known.mr,
            max_mw: known.mw,
            max_pd: known.pd,
            max_ah: known.ah,
            max_srq: known.srq,
            max_srq_wr: known.srq_wr,
            max_qp_rd_atom: known.qp_rd_atom,
            max_qp_init_rd_atom: known.qp_init_rd_atom,
            max_mcast_grp: known.mcast_grp,
            atomic_cap: known.atomic_cap as u32,
            phys_port_cnt: known.phys_port_cnt.into(),
        };
        Ok(())
    })
}

/// A port of a device; there is one, number 1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_query_port(
    context: *const lowtide_context,
    port: u8,
    attr: *mut lowtide_port_attr,
) -> c_int {
    code(|| {
        // SAFETY: the header's contract.
        let (context, attr) = unsafe { (get(context, "context")?, get_mut(attr, "attr")?) };
        let known = context.raw.query_port(port)?;
        *attr = lowtide_port_attr {
            state: known.state as u32,
            max_mtu: known.max_mtu as u32,
            active_mtu: known.active_mtu as u32,
            gid_tbl_len: known.gid_tbl_len,
            max_msg_sz: known.max_msg_sz,
            pkey_tbl_len: known.pkey_tbl_len,
            link_layer: if known.is_ethernet { 2 } else { 1 },
        };
        Ok(())
    })
}

/// A device's GID; there is one, port 1, index 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_query_gid(
    context: *const lowtide_context,
    port: u8,
    index: c_int,
    gid: *mut lowtide_gid,
) -> c_int {
    code(|| {
        // SAFETY: the header's contract.
        let (context, gid) = unsafe { (get(context, "context")?, get_mut(gid, "gid")?) };
        if (port, index) != (1, 0) {
            return Err(Fault::Argument("the device has port 1 and GID index 0"));
        }
        gid.raw = context.raw.gid().gid.0;
        Ok(())
    })
}

/// What a device has seen.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_query_counters(
    context: *const lowtide_context,
    counters: *mut lowtide_counters,
) -> c_int {
    code(|| {
        // SAFETY: the header's contract.
        let (context, out) = unsafe { (get(context, "context")?, get_mut(counters, "counters")?) };
        let seen = context.raw.counters();
        *out = lowtide_counters {
            sent_pkts: seen.sent_pkts,
            tx_bytes: seen.tx_bytes,
            rx_datagrams: seen.rx_datagrams,
            rcvd_pkts: seen.rcvd_pkts,
            rx_bytes: seen.rx_bytes,
            send_err: seen.send_err,
            rx_overflow: seen.rx_overflow,
            rx_malformed: seen.rx_malformed,
            rx_bad_icrc: seen.rx_bad_icrc,
            rx_unknown_qp: seen.rx_unknown_qp,
            rx_wrong_peer: seen.rx_wrong_peer,
            duplicate_request: seen.duplicate_request,
            out_of_seq_request: seen.out_of_seq_request,
            rcvd_seq_err: seen.rcvd_seq_err,
            rcvd_rnr_err: seen.rcvd_rnr_err,
            send_rnr_err: seen.send_rnr_err,
            retry_exceeded_err: seen.retry_exceeded_err,
            retry_rnr_exceeded_err: seen.retry_rnr_exceeded_err,
            completer_retry_err: seen.completer_retry_err,
            rdma_sends: seen.rdma_sends,
            rdma_recvs: seen.rdma_recvs,
            ack_timeout: seen.ack_timeout,
            retransmitted_pkts: seen.retransmitted_pkts,
            dropped_pkts: seen.dropped_pkts,
        };
        Ok(())
    })
}

/// A new protection domain.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_alloc_pd(context: *mut lowtide_context) -> *mut lowtide_pd {
    object(|| {
        // SAFETY: the header's contract.
        let context = unsafe { get(context, "context") }?;
        Ok(Box::new(lowtide_pd {
            raw: context.raw.protection_domain(),
            names: context.names.clone(),
            uses: Uses::default(),
            _device: context.uses.hold(),
        }))
    })
}

/// Ends a protection domain.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_dealloc_pd(pd: *mut lowtide_pd) -> c_int {
    // SAFETY: the header's contract.
    code(|| unsafe { destroy(pd, "pd", |pd| (&pd.uses, "objects of the domain"), |_| ()) })
}

/// The file descriptor that is readable as long as an asynchronous event waits; -1 for NULL. It is
/// the device's: not to be closed or read, but O_NONBLOCK may be set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_async_fd(context: *const lowtide_context) -> c_int {
    // SAFETY: the header's contract.
    crate::error::run(|| Ok(unsafe { get(context, "context") }?.raw.as_fd().as_raw_fd()))
        .unwrap_or(-1)
}

/// The next asynchronous event, asleep until it comes. EAGAIN: the descriptor does not block. Each
/// must be acknowledged: destroying what it is about waits for that.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_get_async_event(
    context: *mut lowtide_context,
    event: *mut lowtide_async_event,
) -> c_int {
    code(|| {
        // SAFETY: the header's contract.
        let (context, out) = unsafe { (get(context, "context")?, get_mut(event, "event")?) };
        *out = next(context.raw.as_fd(), || {
            loop {
                // One about an object that is gone tells nobody anything.
                let event = context.raw.async_event()?;
                // SAFETY: what has a name lives.
                if let Some(event) = unsafe { named(&context.names, event) } {
                    return Some(event);
                }
            }
        })?;
        Ok(())
    })
}

/// Acknowledges an event.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lowtide_ack_async_event(event: *const lowtide_async_event) -> c_int {
    code(|| {
        // SAFETY: the header's contract: an event from the function above, so the element is of the
        // type that its number says, and lives until it is acknowledged here.
        unsafe {
            let event = get(event, "event")?;
            match event.event_type {
                0 => get(event.element.cq, "cq")?.unacknowledged.acknowledge(1),
                1..=5 | 16 => get(event.element.qp, "qp")?.unacknowledged.acknowledge(1),
                14 | 15 => get(event.element.srq, "srq")?.unacknowledged.acknowledge(1),
                _ => {}
            }
        }
        Ok(())
    })
}

/// An event with the name that C has for what it is about, which stays alive from here on.
///
/// # Safety
/// What `names` has is alive.
unsafe fn named(names: &SharedNames, event: AsyncEvent) -> Option<lowtide_async_event> {
    use lowtide_async_event_type::*;
    let names = lock(names);
    let (event_type, qp) = match event {
        AsyncEvent::CqError(id) => {
            let cq = names.cqs.get(&id)?;
            // SAFETY: the caller's promise.
            unsafe { cq.handle() }.unacknowledged.add();
            let element = lowtide_event_element { cq: cq.pointer() };
            let event_type = LOWTIDE_EVENT_CQ_ERR as u32;
            return Some(lowtide_async_event {
                element,
                event_type,
            });
        }
        AsyncEvent::SrqError(id) | AsyncEvent::SrqLimitReached(id) => {
            let srq = names.srqs.get(&id)?;
            // SAFETY: the caller's promise.
            unsafe { srq.handle() }.unacknowledged.add();
            let element = lowtide_event_element { srq: srq.pointer() };
            let event_type = match event {
                AsyncEvent::SrqError(_) => LOWTIDE_EVENT_SRQ_ERR,
                _ => LOWTIDE_EVENT_SRQ_LIMIT_REACHED,
            } as u32;
            return Some(lowtide_async_event {
                element,
                event_type,
            });
        }
        AsyncEvent::PortActive(port) => return Some(of_port(LOWTIDE_EVENT_PORT_ACTIVE, port)),
        AsyncEvent::PortError(port) => return Some(of_port(LOWTIDE_EVENT_PORT_ERR, port)),
        AsyncEvent::DeviceFatal => return Some(of_port(LOWTIDE_EVENT_DEVICE_FATAL, 0)),
        AsyncEvent::QpFatal(qpn) => (LOWTIDE_EVENT_QP_FATAL, qpn),
        AsyncEvent::QpRequestError(qpn) => (LOWTIDE_EVENT_QP_REQ_ERR, qpn),
        AsyncEvent::QpAccessError(qpn) => (LOWTIDE_EVENT_QP_ACCESS_ERR, qpn),
        AsyncEvent::CommunicationEstablished(qpn) => (LOWTIDE_EVENT_COMM_EST, qpn),
        AsyncEvent::SendQueueDrained(qpn) => (LOWTIDE_EVENT_SQ_DRAINED, qpn),
        AsyncEvent::LastWqeReached(qpn) => (LOWTIDE_EVENT_QP_LAST_WQE_REACHED, qpn),
        // One that C has no number for yet.
        _ => return None,
    };
    let qp = names.qps.get(&qp)?;
    // SAFETY: the caller's promise.
    unsafe { qp.handle() }.unacknowledged.add();
    let element = lowtide_event_element { qp: qp.pointer() };
    let event_type = event_type as u32;
    Some(lowtide_async_event {
        element,
        event_type,
    })
}

fn of_port(kind: lowtide_async_event_type, port: u8) -> lowtide_async_event {
    lowtide_async_event {
        element: lowtide_event_element {
            port_num: port.into(),
        },
        event_type: kind as u32,
    }
}
