//! One packet of a SEND: whether its length is right, and the way of its bytes into the receive.

use super::super::Link;
use super::super::lists::Receives;
use super::super::memory::{AccessError, Memory};
use super::super::work::Status;
use super::{INVALID, Refusal};
use crate::wire::{NakCode, Position};

/// Puts a SEND's packet where it belongs in the receive at the front, of which so many bytes are
/// filled.
#[inline]
pub(super) fn place_segment(
    recv: &Receives,
    filled: u32,
    payload: &[u8],
    memory: &mut impl Memory,
) -> Result<(), Refusal> {
    let len = payload.len() as u32;
    if len > recv.front_total() - filled {
        return Err(Refusal::NakRecv(
            NakCode::InvalidRequest,
            Status::LocalLength,
        ));
    }
    let mut rest = payload;
    recv.each_of_front((filled, len), |fragment| {
        let (piece, tail) = rest.split_at(fragment.len as usize);
        rest = tail;
        memory.place(fragment, piece).map_err(|AccessError| {
            Refusal::NakRecv(NakCode::RemoteOperational, Status::LocalProtection)
        })
    })
}

/// A SEND's packet must be full unless it ends the message, which must not exceed the MTU.
pub(super) fn check_segment(len: usize, position: Position, link: &Link) -> Result<(), Refusal> {
    let mtu = link.mtu.bytes() as usize;
    let fits = match position {
        Position::First | Position::Middle => len == mtu,
        Position::Last | Position::Only => len <= mtu,
    };
    if fits { Ok(()) } else { Err(INVALID) }
}
