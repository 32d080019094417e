//! Frames on their way out: grouped into runs, sealed, handed to `sendmmsg`.

use std::io;
use std::mem;
use std::net::SocketAddr;
use std::os::fd::RawFd;

use super::{
    CONTROL_BYTES, Control, HEADER_MAX, SEGMENTS_MAX, SEND_BYTES_MAX, TRAILER_MAX,
    TRANSMIT_FRAMES_MAX, vector, zeroed_name,
};

/// Frames up to this length are put together in one place: three vectors for each would cost the
/// kernel more than the copy costs us.
const SHORT_MAX: usize = 320;

/// Where a frame's payload lies. The frame never owns it: the owner keeps it unchanged until the
/// batch has been sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Payload {
    /// Which memory, in the words of the caller's `payload` function.
    pub region: u32,
    /// Length in bytes.
    pub len: u32,
    /// Offset of the first byte in that memory.
    pub offset: u64,
}

impl Payload {
    /// No payload: acknowledgements and READ requests.
    pub const EMPTY: Payload = Payload {
        region: u32::MAX,
        len: 0,
        offset: 0,
    };
}

/// One datagram to be sent: headers, payload elsewhere, pad and ICRC.
#[derive(Debug, Clone, Copy)]
pub struct Frame {
    /// Peer's address and UDP port.
    pub target: SocketAddr,
    /// BTH and extended headers; `header_len` bytes of it count.
    pub header: [u8; HEADER_MAX],
    /// Bytes used in `header`.
    pub header_len: u8,
    /// Bytes used in `trailer`: pad and ICRC.
    pub trailer_len: u8,
    /// Pad bytes (zero), then the ICRC that `seal` writes.
    pub trailer: [u8; TRAILER_MAX],
    /// What lies between them.
    pub payload: Payload,
    /// An injected fault: to be sealed wrongly.
    pub is_spoilt: bool,
}

impl Frame {
    /// Length of the UDP payload.
    pub fn wire_len(&self) -> usize {
        usize::from(self.header_len) + self.payload.len as usize + usize::from(self.trailer_len)
    }

    /// Pad and ICRC.
    pub fn trailer(&self) -> &[u8] {
        &self.trailer[..usize::from(self.trailer_len)]
    }

    /// The headers.
    pub fn header(&self) -> &[u8] {
        &self.header[..usize::from(self.header_len)]
    }
}

/// Consecutive frames that leave in one send.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Run {
    pub(super) frames: u16,
    pub(super) segment: u16,
    pub(super) bytes: u32,
    /// How many vectors it takes.
    vectors: u16,
}

impl Run {
    /// Whether the kernel must be told how to segment it: a socket that segments at `segment` by
    /// itself, or not at all if that is 0, would do something else.
    fn needs_control(&self, segment: u16) -> bool {
        match self.frames {
            1 => segment > 0 && self.bytes > u32::from(segment),
            _ => segment != self.segment,
        }
    }
}

/// Frames waiting for one [`super::Socket::send`], and the arrays that the kernel reads.
pub struct TransmitBatch {
    pub(super) frames: Vec<Frame>,
    pub(super) runs: Vec<Run>,
    /// Index of the first frame of `runs[0]`.
    first: usize,
    messages: Vec<libc::mmsghdr>,
    vectors: Vec<libc::iovec>,
    names: Vec<libc::sockaddr_storage>,
    controls: Vec<Control>,
    /// Short frames, as they go on the wire.
    short: Vec<u8>,
}

// SAFETY: the raw pointers in `messages` and `vectors` are rebuilt by every `submit` and mean
// nothing between calls; everything else is plain data.
unsafe impl Send for TransmitBatch {}

impl Default for TransmitBatch {
    fn default() -> Self {
        TransmitBatch {
            frames: Vec::with_capacity(TRANSMIT_FRAMES_MAX),
            runs: Vec::with_capacity(TRANSMIT_FRAMES_MAX),
            first: 0,
            messages: Vec::with_capacity(TRANSMIT_FRAMES_MAX),
            vectors: Vec::with_capacity(3 * TRANSMIT_FRAMES_MAX),
            names: vec![zeroed_name(); TRANSMIT_FRAMES_MAX],
            controls: vec![Control([0; CONTROL_BYTES]); TRANSMIT_FRAMES_MAX],
            short: Vec::with_capacity(TRANSMIT_FRAMES_MAX * SHORT_MAX),
        }
    }
}

impl TransmitBatch {
    /// Whether no further frame fits.
    pub fn is_full(&self) -> bool {
        self.frames.len() >= TRANSMIT_FRAMES_MAX
    }

    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Frames waiting.
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// Adds a frame. The batch must not be full.
    pub fn push(&mut self, frame: Frame) {
        assert!(!self.is_full());
        self.frames.push(frame);
    }

    /// Groups the frames from `first` on into runs and seals them for their place in the run.
    pub(super) fn plan<'m>(
        &mut self,
        first: usize,
        is_segmenting: bool,
        payload: &impl Fn(&Payload) -> &'m [u8],
        seal: &mut impl FnMut(&mut Frame, &[u8], u16),
    ) {
        self.first = first;
        self.runs.clear();
        let mut next = first;
        while next < self.frames.len() {
            let head = &self.frames[next];
            let (target, segment) = (head.target, head.wire_len());
            let mut run = Run {
                frames: 0,
                segment: segment as u16,
                bytes: 0,
                vectors: 0,
            };
            while let Some(frame) = self.frames.get_mut(next + usize::from(run.frames)) {
                let len = frame.wire_len();
                let is_joining = run.frames > 0;
                if is_joining
                    && (!is_segmenting
                        || usize::from(run.frames) == SEGMENTS_MAX
                        || frame.target != target
                        || len > segment
                        || run.bytes as usize + len > SEND_BYTES_MAX)
                {
                    break;
                }
                seal(frame, payload(&frame.payload), run.frames);
                run.frames += 1;
                run.bytes += len as u32;
                if len < segment {
                    break;
                }
            }
            next += usize::from(run.frames);
            self.runs.push(run);
        }
    }

    /// Makes the vectors of the planned runs.
    fn point_at<'m>(&mut self, payload: &impl Fn(&Payload) -> &'m [u8]) {
        let frames = &self.frames[self.first..];
        let is_short = |frame: &Frame| frame.wire_len() <= SHORT_MAX;
        let body = |frame: &Frame| {
            let body = payload(&frame.payload);
            assert_eq!(body.len(), frame.payload.len as usize);
            body
        };
        self.short.clear();
        for frame in frames.iter().filter(|frame| is_short(frame)) {
            for part in [frame.header(), body(frame), frame.trailer()] {
                self.short.extend_from_slice(part);
            }
        }
        self.vectors.clear();
        let (mut rest, mut short) = (frames, self.short.as_slice());
        for run in &mut self.runs {
            let (of_run, later) = rest.split_at(usize::from(run.frames));
            rest = later;
            let before = self.vectors.len();
            for stretch in of_run.chunk_by(|a, b| is_short(a) && is_short(b)) {
                if is_short(&stretch[0]) {
                    let len = stretch.iter().map(Frame::wire_len).sum();
                    let (now, later) = short.split_at(len);
                    short = later;
                    self.vectors.push(vector(now));
                    continue;
                }
                for frame in stretch {
                    self.vectors.push(vector(frame.header()));
                    self.vectors.push(vector(body(frame)));
                    self.vectors.push(vector(frame.trailer()));
                }
            }
            run.vectors = (self.vectors.len() - before) as u16;
        }
    }

    /// Hands the planned runs to the kernel; returns how many of them it took. The socket segments
    /// what is longer than `segment` by itself.
    pub(super) fn submit<'m>(
        &mut self,
        fd: RawFd,
        segment: u16,
        payload: &impl Fn(&Payload) -> &'m [u8],
    ) -> io::Result<usize> {
        self.point_at(payload);
        match *self.runs {
            [run] if run.vectors == 1 && !run.needs_control(segment) => self.submit_alone(fd),
            _ => self.submit_all(fd, segment),
        }
    }

    /// One run in one piece: a shorter way into the kernel than that of many.
    fn submit_alone(&mut self, fd: RawFd) -> io::Result<usize> {
        let [vector] = *self.vectors else {
            unreachable!("the caller has looked");
        };
        let name = &mut self.names[0];
        let name_len = write_name(name, &self.frames[self.first].target);
        // SAFETY: the vector points into `short` or a payload, borrowed until the call returns, and
        // the name is ours. The kernel only reads them.
        let sent = unsafe {
            libc::sendto(
                fd,
                vector.iov_base,
                vector.iov_len,
                libc::MSG_DONTWAIT,
                (&raw const *name).cast(),
                name_len,
            )
        };
        match sent {
            ..0 => Err(io::Error::last_os_error()),
            _ => Ok(1),
        }
    }

    fn submit_all(&mut self, fd: RawFd, segment: u16) -> io::Result<usize> {
        self.messages.clear();
        let frames = &mut self.frames[self.first..];
        // One borrow of each array: a second one would end what pointers from the first may reach.
        let vectors = self.vectors.as_mut_ptr();
        let slots = self.names.iter_mut().zip(&mut self.controls);
        let (mut frame, mut vector) = (0, 0);
        for (run, (name, control)) in self.runs.iter().zip(slots) {
            let name_len = write_name(name, &frames[frame].target);
            // SAFETY: an all-zero msghdr is a valid one.
            let mut message: libc::mmsghdr = unsafe { mem::zeroed() };
            let header = &mut message.msg_hdr;
            header.msg_name = (&raw mut *name).cast();
            header.msg_namelen = name_len;
            header.msg_iov = vectors.wrapping_add(vector);
            header.msg_iovlen = usize::from(run.vectors);
            if run.needs_control(segment) {
                header.msg_controllen = write_segment_control(control, run.segment);
                header.msg_control = control.0.as_mut_ptr().cast();
            }
            self.messages.push(message);
            frame += usize::from(run.frames);
            vector += usize::from(run.vectors);
        }
        // SAFETY: `messages` has `len` valid entries; each points into `names`, `vectors` and
        // `controls`, which are not touched until the call returns, and each vector into `short`, a
        // frame or a payload that is borrowed for as long. The kernel only reads them.
        let sent = unsafe {
            libc::sendmmsg(
                fd,
                self.messages.as_mut_ptr(),
                self.messages.len() as libc::c_uint,
                libc::MSG_DONTWAIT,
            )
        };
        if sent < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(sent as usize)
        }
    }
}

fn write_segment_control(control: &mut Control, segment: u16) -> usize {
    let header = control.0.as_mut_ptr().cast::<libc::cmsghdr>();
    // SAFETY: `control` is aligned for cmsghdr and far larger than CMSG_SPACE(2).
    unsafe {
        (*header).cmsg_level = libc::SOL_UDP;
        (*header).cmsg_type = libc::UDP_SEGMENT;
        (*header).cmsg_len = libc::CMSG_LEN(2) as usize;
        libc::CMSG_DATA(header)
            .cast::<u16>()
            .write_unaligned(segment);
        libc::CMSG_SPACE(2) as usize
    }
}

fn write_name(storage: &mut libc::sockaddr_storage, address: &SocketAddr) -> libc::socklen_t {
    let len = match address {
        SocketAddr::V4(v4) => {
            // SAFETY: sockaddr_storage is larger than, and aligned for, every socket address; it
            // was initialised with zeroes.
            let name = unsafe { &mut *(&raw mut *storage).cast::<libc::sockaddr_in>() };
            name.sin_family = libc::AF_INET as libc::sa_family_t;
            name.sin_port = v4.port().to_be();
            name.sin_addr.s_addr = u32::from(*v4.ip()).to_be();
            mem::size_of::<libc::sockaddr_in>()
        }
        SocketAddr::V6(v6) => {
            // SAFETY: as above.
            let name = unsafe { &mut *(&raw mut *storage).cast::<libc::sockaddr_in6>() };
            name.sin6_family = libc::AF_INET6 as libc::sa_family_t;
            name.sin6_port = v6.port().to_be();
            name.sin6_flowinfo = 0;
            name.sin6_addr.s6_addr = v6.ip().octets();
            name.sin6_scope_id = v6.scope_id();
            mem::size_of::<libc::sockaddr_in6>()
        }
    };
    len as libc::socklen_t
}
