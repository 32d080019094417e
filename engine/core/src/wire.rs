//! Encoding of messages and records: little-endian, self-delimiting, bounded.
//!
//! Contract: decoding hostile bytes returns [`Malformed`], never panics, and never allocates more
//! than a small multiple of the input's length. `decode(encode(x)) == x`.
//!
//! Deliberately absent: checksums and framing (the hands' message header and the log's record
//! header own them).

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::ids::{
    Age, Epoch, GrantId, Incarnation, Life, Lsn, NodeId, OpId, Seq, Step, StorageId, StreamSeq,
    Term, Time, Version, ViewId,
};
use crate::op::{
    Bytes, Change, Key, Mode, NAME_MAX, Operation, Participant, Range, UPDATES_MAX, Update,
    VALUE_MAX,
};

/// The bytes do not encode what was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// What was being decoded.
    pub what: &'static str,
}

impl core::fmt::Display for Malformed {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "malformed {}", self.what)
    }
}

impl core::error::Error for Malformed {}

/// A value at least this long may travel beside the encoding, in bytes: a copy would cost more than
/// the memory around it.
pub const BESIDE_MIN: usize = 16 << 10;

/// Cursor over input bytes.
#[derive(Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
    /// The values of at least [`BESIDE_MIN`] bytes, in order, unless they are part of the input.
    beside: Option<&'a [Bytes]>,
}

impl<'a> Reader<'a> {
    /// Reads from the start of `bytes`.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader {
            rest: bytes,
            beside: None,
        }
    }

    /// Reads from the start of `bytes`, which an encoder wrote that put the values of at least
    /// [`BESIDE_MIN`] bytes aside, and takes those from `beside`.
    #[must_use]
    pub fn beside(bytes: &'a [u8], beside: &'a [Bytes]) -> Reader<'a> {
        Reader {
            rest: bytes,
            beside: Some(beside),
        }
    }

    /// A value of `count` bytes.
    ///
    /// # Errors
    /// [`Malformed`] when fewer remain, or when the next value beside has another length.
    pub fn value(&mut self, count: usize, what: &'static str) -> Result<Bytes, Malformed> {
        match &mut self.beside {
            Some(beside) if count >= BESIDE_MIN => {
                let (first, rest) = beside.split_first().ok_or(Malformed { what })?;
                *beside = rest;
                match first.len() == count {
                    true => Ok(first.clone()),
                    false => Err(Malformed { what }),
                }
            }
            _ => Ok(Bytes::from(self.bytes(count, what)?)),
        }
    }

    /// The next `count` bytes.
    ///
    /// # Errors
    /// [`Malformed`] when fewer remain.
    pub fn bytes(&mut self, count: usize, what: &'static str) -> Result<&'a [u8], Malformed> {
        let (head, rest) = self
            .rest
            .split_at_checked(count)
            .ok_or(Malformed { what })?;
        self.rest = rest;
        Ok(head)
    }

    /// Bytes not yet read.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// Succeeds only when nothing remains.
    ///
    /// # Errors
    /// [`Malformed`] when bytes remain.
    pub fn finish(self, what: &'static str) -> Result<(), Malformed> {
        if self.rest.is_empty() && self.beside.is_none_or(<[Bytes]>::is_empty) {
            Ok(())
        } else {
            Err(Malformed { what })
        }
    }
}

/// Where encodings go.
pub trait Sink {
    /// Appends bytes.
    fn slice(&mut self, bytes: &[u8]);
    /// Appends a value, which the sink may keep instead of copying it.
    fn value(&mut self, value: &Bytes) {
        self.slice(value);
    }
    /// Appends one byte.
    fn push(&mut self, byte: u8) {
        self.slice(&[byte]);
    }
}

impl Sink for Vec<u8> {
    fn slice(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

/// A type with an encoding.
pub trait Wire: Sized {
    /// Appends the encoding.
    fn put(&self, out: &mut impl Sink);
    /// Decodes from the cursor.
    ///
    /// # Errors
    /// [`Malformed`].
    fn take(input: &mut Reader<'_>) -> Result<Self, Malformed>;
}

/// Encodes one value.
pub fn encode<T: Wire>(value: &T) -> Vec<u8> {
    let mut out = Vec::new();
    value.put(&mut out);
    out
}

/// Decodes exactly one value.
///
/// # Errors
/// [`Malformed`] when the bytes are not exactly one encoding.
pub fn decode<T: Wire>(bytes: &[u8], what: &'static str) -> Result<T, Malformed> {
    take_all(Reader::new(bytes), what)
}

/// Decodes exactly one value from what is left of `input`.
///
/// # Errors
/// [`Malformed`] when that is not exactly one encoding.
pub fn take_all<T: Wire>(mut input: Reader<'_>, what: &'static str) -> Result<T, Malformed> {
    let value = T::take(&mut input)?;
    input.finish(what)?;
    Ok(value)
}

macro_rules! integers {
    ($($ty:ty),*) => {$(
        impl Wire for $ty {
            fn put(&self, out: &mut impl Sink) {
                out.slice(&self.to_le_bytes());
            }
            fn take(input: &mut Reader<'_>) -> Result<Self, Malformed> {
                let bytes = input.bytes(size_of::<$ty>(), "integer")?;
                let mut array = [0; size_of::<$ty>()];
                array.copy_from_slice(bytes);
                Ok(<$ty>::from_le_bytes(array))
            }
        }
    )*};
}
integers!(u8, u16, u32, u64, u128);

macro_rules! newtypes {
    ($($name:ident),*) => {$(
        impl Wire for $name {
            fn put(&self, out: &mut impl Sink) {
                self.0.put(out);
            }
            fn take(input: &mut Reader<'_>) -> Result<Self, Malformed> {
                Ok($name(Wire::take(input)?))
            }
        }
    )*};
}
newtypes!(
    NodeId,
    Incarnation,
    Epoch,
    Term,
    Seq,
    StreamSeq,
    GrantId,
    Version,
    Lsn,
    Step,
    StorageId,
    ViewId,
    Time
);

/// Implements [`Wire`] field by field, in the order given.
#[macro_export]
macro_rules! wire_struct {
    ($name:ident { $($field:ident),* $(,)? }) => {
        impl $crate::wire::Wire for $name {
            fn put(&self, out: &mut impl $crate::wire::Sink) {
                $($crate::wire::Wire::put(&self.$field, out);)*
            }
            fn take(
                input: &mut $crate::wire::Reader<'_>,
            ) -> Result<Self, $crate::wire::Malformed> {
                Ok($name { $($field: $crate::wire::Wire::take(input)?),* })
            }
        }
    };
}

wire_struct!(Life { node, incarnation });
wire_struct!(OpId { source, seq });
wire_struct!(Age {
    epoch,
    number,
    source
});
wire_struct!(Range { space, lo, hi });
wire_struct!(Participant { node, at });
wire_struct!(Update { home, key, change });

impl Wire for bool {
    fn put(&self, out: &mut impl Sink) {
        out.push(u8::from(*self));
    }
    fn take(input: &mut Reader<'_>) -> Result<Self, Malformed> {
        match u8::take(input)? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Malformed { what: "bool" }),
        }
    }
}

impl<T: Wire> Wire for Option<T> {
    fn put(&self, out: &mut impl Sink) {
        self.is_some().put(out);
        if let Some(value) = self {
            value.put(out);
        }
    }
    fn take(input: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(if bool::take(input)? {
            Some(T::take(input)?)
        } else {
            None
        })
    }
}

impl<T: Wire> Wire for Vec<T> {
    fn put(&self, out: &mut impl Sink) {
        length(self.len()).put(out);
        for item in self {
            item.put(out);
        }
    }
    fn take(input: &mut Reader<'_>) -> Result<Self, Malformed> {
        let count = u32::take(input)? as usize;
        // Every item takes at least one byte, so a lying count cannot make us allocate much.
        if count > input.remaining() {
            return Err(Malformed {
                what: "list length",
            });
        }
        let mut list = Vec::with_capacity(count.min(1024));
        for _ in 0..count {
            list.push(T::take(input)?);
        }
        Ok(list)
    }
}

impl<A: Wire, B: Wire> Wire for (A, B) {
    fn put(&self, out: &mut impl Sink) {
        self.0.put(out);
        self.1.put(out);
    }
    fn take(input: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok((A::take(input)?, B::take(input)?))
    }
}

impl<T: Wire> Wire for Arc<T> {
    fn put(&self, out: &mut impl Sink) {
        T::put(self, out);
    }
    fn take(input: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Arc::new(T::take(input)?))
    }
}

impl Wire for Bytes {
    fn put(&self, out: &mut impl Sink) {
        length(self.len()).put(out);
        out.value(self);
    }
    fn take(input: &mut Reader<'_>) -> Result<Self, Malformed> {
        let count = u32::take(input)? as usize;
        if count > VALUE_MAX {
            return Err(Malformed {
                what: "value length",
            });
        }
        input.value(count, "value")
    }
}

impl Wire for Key {
    fn put(&self, out: &mut impl Sink) {
        self.space.put(out);
        self.slot.put(out);
        let name_len = u16::try_from(self.name.len()).expect("names are at most NAME_MAX bytes");
        name_len.put(out);
        out.slice(&self.name);
    }
    fn take(input: &mut Reader<'_>) -> Result<Self, Malformed> {
        let space = u64::take(input)?;
        let slot = u64::take(input)?;
        let count = usize::from(u16::take(input)?);
        if count > NAME_MAX {
            return Err(Malformed {
                what: "name length",
            });
        }
        Ok(Key {
            space,
            slot,
            name: input.bytes(count, "name")?.to_vec(),
        })
    }
}

impl Wire for Mode {
    fn put(&self, out: &mut impl Sink) {
        out.push(match self {
            Mode::Shared => 0,
            Mode::Exclusive => 1,
        });
    }
    fn take(input: &mut Reader<'_>) -> Result<Self, Malformed> {
        match u8::take(input)? {
            0 => Ok(Mode::Shared),
            1 => Ok(Mode::Exclusive),
            _ => Err(Malformed { what: "lock mode" }),
        }
    }
}

impl Wire for Change {
    fn put(&self, out: &mut impl Sink) {
        match self {
            Change::Put(value) => {
                out.push(0);
                value.put(out);
            }
            Change::Delete => out.push(1),
            Change::Add(words) => {
                out.push(2);
                words.put(out);
            }
        }
    }
    fn take(input: &mut Reader<'_>) -> Result<Self, Malformed> {
        match u8::take(input)? {
            0 => Ok(Change::Put(Wire::take(input)?)),
            1 => Ok(Change::Delete),
            2 => Ok(Change::Add(Wire::take(input)?)),
            _ => Err(Malformed { what: "change" }),
        }
    }
}

impl Wire for Operation {
    fn put(&self, out: &mut impl Sink) {
        self.id.put(out);
        self.epoch.put(out);
        self.previous.put(out);
        self.participants.put(out);
        self.updates.put(out);
    }
    fn take(input: &mut Reader<'_>) -> Result<Self, Malformed> {
        let op = Operation {
            id: Wire::take(input)?,
            epoch: Wire::take(input)?,
            previous: Wire::take(input)?,
            participants: Wire::take(input)?,
            updates: Wire::take(input)?,
        };
        let ascending = op.participants.is_sorted_by(|a, b| a.node < b.node);
        if !ascending || op.participants.is_empty() || op.updates.len() > UPDATES_MAX {
            return Err(Malformed { what: "operation" });
        }
        Ok(op)
    }
}

fn length(count: usize) -> u32 {
    u32::try_from(count).expect("lists and values are far shorter than 4 Gi")
}
