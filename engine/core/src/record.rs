//! What a destination writes to its log, and the storage it runs on.
//!
//! ```text
//! step, and then by kind
//! Op      id | epoch | previous | participants | position here | piece | own writes | carried updates
//! Undone  id | position | restored writes
//! Fence, Row, Gone, Entered      a life
//! Base    a stream and where it starts here
//! Marks   durable copy of m | ceiling of the epoch
//! ```
//!
//! An own write keeps the change (redo) and what it replaced (undo), with versions. Carried
//! updates are the other participants' parts, so that any holder can complete the operation. An
//! operation that writes objects of several shards has one record, a piece, in the log of each.
//! Framing, checksums, positions and epochs for purging are the log's business.

use alloc::vec::Vec;

use crate::ids::{Epoch, Life, Lsn, OpId, Seq, Step, StreamSeq, Version};
use crate::message::StreamBase;
use crate::op::{Bytes, Key, Participant, Range, Update};
use crate::session::Page;
use crate::wire::{Malformed, Reader, Sink, Wire};
use crate::wire_struct;

/// Where bulk data lies out of place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    /// Byte offset in the extent file.
    pub offset: u64,
    /// Length in bytes.
    pub len: u32,
    /// CRC-32C of the bytes.
    pub crc: u32,
}
wire_struct!(Extent { offset, len, crc });

/// A stored value: in the object itself or out of place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// The bytes.
    Inline(Bytes),
    /// Where the bytes are.
    Extent(Extent),
}

impl Wire for Value {
    fn put(&self, out: &mut impl Sink) {
        match self {
            Value::Inline(bytes) => {
                out.push(0);
                bytes.put(out);
            }
            Value::Extent(extent) => {
                out.push(1);
                extent.put(out);
            }
        }
    }
    fn take(input: &mut Reader<'_>) -> Result<Self, Malformed> {
        match u8::take(input)? {
            0 => Ok(Value::Inline(Wire::take(input)?)),
            1 => Ok(Value::Extent(Wire::take(input)?)),
            _ => Err(Malformed { what: "value" }),
        }
    }
}

/// An object as its home keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// How often it has been written.
    pub version: Version,
    /// Epoch of its last locked writer.
    pub epoch: Epoch,
    /// Its value.
    pub value: Value,
}
wire_struct!(Stored {
    version,
    epoch,
    value
});

/// The change of an own write, as recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Recorded {
    /// The object got this value.
    Put(Value),
    /// The object went away.
    Delete,
    /// Words were added.
    Add(Bytes),
}

impl Wire for Recorded {
    fn put(&self, out: &mut impl Sink) {
        match self {
            Recorded::Put(value) => {
                out.push(0);
                value.put(out);
            }
            Recorded::Delete => out.push(1),
            Recorded::Add(words) => {
                out.push(2);
                words.put(out);
            }
        }
    }
    fn take(input: &mut Reader<'_>) -> Result<Self, Malformed> {
        match u8::take(input)? {
            0 => Ok(Recorded::Put(Wire::take(input)?)),
            1 => Ok(Recorded::Delete),
            2 => Ok(Recorded::Add(Wire::take(input)?)),
            _ => Err(Malformed {
                what: "recorded change",
            }),
        }
    }
}

/// One object written by an operation here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// The object.
    pub key: Key,
    /// What was done to it (redo).
    pub change: Recorded,
    /// What it was before (undo); `None` when it did not exist. For `Add`, which is
    /// undone by the negated words, only whether it existed: its value is left out.
    pub before: Option<Stored>,
}
wire_struct!(Write {
    key,
    change,
    before
});

/// Which of the records that a step writes for one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Its number, from 0.
    pub index: u16,
    /// How many there are, at least 1.
    pub count: u16,
}
wire_struct!(Piece { index, count });

/// Where a record stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Number of the log at its node.
    pub log: u32,
    /// Position in that log.
    pub lsn: Lsn,
}

/// An executed operation's part: redo, undo and what is needed to complete it elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpRecord {
    /// The operation.
    pub id: OpId,
    /// Its epoch.
    pub epoch: Epoch,
    /// Epoch of its source's preceding operation.
    pub previous: Epoch,
    /// All participants.
    pub participants: Vec<Participant>,
    /// Position of this part in the stream to this home.
    pub at: StreamSeq,
    /// Which piece of the part.
    pub piece: Piece,
    /// Writes here, in order.
    pub writes: Vec<Write>,
    /// Other participants' updates, as far as they were carried.
    pub carried: Vec<Update>,
}
wire_struct!(OpRecord {
    id,
    epoch,
    previous,
    participants,
    at,
    piece,
    writes,
    carried
});

/// An undo step that was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UndoneRecord {
    /// The life whose operation was undone.
    pub source: Life,
    /// The operation.
    pub seq: Seq,
    /// Its position in the stream; the stream now ends before it.
    pub at: StreamSeq,
    /// Every object written by it, and what the object is now.
    pub restored: Vec<(Key, Option<Stored>)>,
}
wire_struct!(UndoneRecord {
    source,
    seq,
    at,
    restored
});

/// A log record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// An operation executed.
    Op(OpRecord),
    /// An operation was undone.
    Undone(UndoneRecord),
    /// A life is refused from here on.
    Fence(Life),
    /// A life may hold locks here.
    Row(Life),
    /// A life is resolved everywhere; its locks are free.
    Gone(Life),
    /// A stream was announced.
    Base(StreamBase),
    /// Durable m and ceiling.
    Marks {
        /// m_D: undo below it may be purged.
        minimum: Epoch,
        /// The epoch may rise up to here before the next such record.
        ceiling: Epoch,
    },
    /// The root let this home in, in this life: what follows is that life's.
    Entered(Life),
}

/// Kind byte of [`Record::Op`] in the log's record header.
pub const KIND_OP: u8 = 1;

impl Record {
    /// Kind byte for the log's record header.
    #[must_use]
    pub fn kind(&self) -> u8 {
        match self {
            Record::Op(_) => KIND_OP,
            Record::Undone(_) => 2,
            Record::Fence(_) => 3,
            Record::Row(_) => 4,
            Record::Gone(_) => 5,
            Record::Base(_) => 6,
            Record::Marks { .. } => 7,
            Record::Entered(_) => 8,
        }
    }

    /// Decodes kind and body.
    ///
    /// # Errors
    /// [`Malformed`]; the log's checksum was right, so this means another version or a bug.
    pub fn from_parts(kind: u8, body: &[u8]) -> Result<(Step, Record), Malformed> {
        let mut input = Reader::new(body);
        let input_ref = &mut input;
        let step = Wire::take(input_ref)?;
        let record = match kind {
            KIND_OP => Record::Op(Wire::take(input_ref)?),
            2 => Record::Undone(Wire::take(input_ref)?),
            3 => Record::Fence(Wire::take(input_ref)?),
            4 => Record::Row(Wire::take(input_ref)?),
            5 => Record::Gone(Wire::take(input_ref)?),
            6 => Record::Base(Wire::take(input_ref)?),
            7 => Record::Marks {
                minimum: Wire::take(input_ref)?,
                ceiling: Wire::take(input_ref)?,
            },
            8 => Record::Entered(Wire::take(input_ref)?),
            _ => {
                return Err(Malformed {
                    what: "record kind",
                });
            }
        };
        input.finish("record")?;
        Ok((step, record))
    }
}

/// A record's body; its kind travels in the log's record header.
#[must_use]
pub fn encode_record(step: Step, record: &Record) -> Vec<u8> {
    let mut out = Vec::new();
    step.put(&mut out);
    match record {
        Record::Op(r) => r.put(&mut out),
        Record::Undone(r) => r.put(&mut out),
        Record::Fence(life) | Record::Row(life) | Record::Gone(life) | Record::Entered(life) => {
            life.put(&mut out);
        }
        Record::Base(base) => base.put(&mut out),
        Record::Marks { minimum, ceiling } => {
            minimum.put(&mut out);
            ceiling.put(&mut out);
        }
    }
    out
}

/// The step of a record, without decoding the rest.
///
/// # Errors
/// [`Malformed`] when the body is too short.
pub fn step_of(body: &[u8]) -> Result<Step, Malformed> {
    Wire::take(&mut Reader::new(body))
}

/// Objects, as replaying a log needs them. Calls do not fail: storage that breaks is poisoned, and
/// the hands then stop the node before anything is acknowledged.
pub trait Objects {
    /// The object's newest executed state.
    fn get(&mut self, key: &Key) -> Option<Stored>;
    /// Replaces the object's executed state (volatile until its record is durable).
    fn put(&mut self, key: &Key, value: Option<Stored>);
    /// Bytes of a value.
    fn fetch(&mut self, value: &Value) -> Option<Bytes>;
}

/// What a shard needs of its hands while it executes. As for [`Objects`], calls do not fail.
pub trait Storage: Objects {
    /// Whether any object lies in the range.
    fn is_empty(&mut self, range: &Range) -> bool;
    /// Objects of the range in key order after `after`, about `bytes_max` bytes of values.
    fn scan(&mut self, range: &Range, after: Option<&Key>, bytes_max: usize) -> Page;
    /// Appends a record to the shard's log; later calls return larger positions.
    fn append(&mut self, kind: u8, epoch: Epoch, body: &[u8]) -> Position;
    /// An appended operation record that is not purged yet, of any log of the node. `None` when the
    /// medium has failed: the node stops before anything that follows from it gets out.
    fn load(&mut self, position: Position) -> Option<OpRecord>;
    /// Writes bulk data out of place. It becomes durable no later than any record appended after.
    fn place(&mut self, bytes: &Bytes) -> Extent;
    /// The space of an extent may be used again: no object has it, and no undo brings it back.
    fn release(&mut self, extent: Extent);
}
